"""How replicas that run apart come together: at epochs' ends and checkpoints, and whenever one of them asks for it."""

from __future__ import annotations

from hpctrain.comm.onesided import Patience, Words
from hpctrain.comm.replicas import Replicas
from hpctrain.comm.watch import Wait
from hpctrain.comm.watched import others

CALLED = 0
"""The word that is not 0 once any replica has asked for a meeting; the others are, by replica, steps and arrivals."""


class Meeting:
    """Kept by the first rank of each replica, in words at the very first one. No replica waits within a step.

    In lockstep, where a step may need all replicas, those that came early go on until they have done as many steps as
    any replica has begun: else the others would wait for them. A replica says that it begins a step before it looks for
    a call, and who waits looks for beginnings after the call, so that one of them sees the other.
    """

    def __init__(self, replicas: Replicas, lockstep: bool) -> None:
        self.replicas, self.lockstep = replicas, lockstep
        self._words = Words(replicas.across, 1 + 2 * replicas.count) if replicas.inside.rank == 0 else None
        self._arrivals, self._waiting = 0, False
        # out of step, others may be far behind without being stuck
        self._wait = Wait("", "a meeting of replicas", others(replicas.across), patient=not lockstep)

    def begin(self, step: int) -> None:
        """Say that this replica begins step `step`."""
        if self._words is not None:
            self._words.set(1 + self.replicas.index, step + 1)

    def call(self) -> None:
        """Ask all replicas to come after their step. By any rank of the replica; its first one makes the call."""
        if self._words is not None:
            self._words.set(CALLED, 1)

    def called(self) -> bool:
        """Whether any replica has asked for a meeting; False on all but the first rank of a replica."""
        return self._words is not None and self._words.read()[CALLED] > 0

    def complete(self, done: int) -> bool:
        """Wait, after `done` steps, until all are here. False: make one more step first, then come again.

        Collective over the replica.
        """
        with self._wait:
            found = self._gather(done) if self._words is not None else None
        return bool(self.replicas.inside.bcast(found))

    def _gather(self, done: int) -> bool:
        if self._words is None:  # not the first rank
            return False
        count, patience = self.replicas.count, Patience()
        if not self._waiting:
            self._waiting, self._arrivals = True, self._arrivals + 1
            self._words.set(1 + count + self.replicas.index, self._arrivals)
        while True:
            words = self._words.read()
            begun, arrivals = words[1 : 1 + count], words[1 + count :]
            if self.lockstep and max(begun) > done:
                return False
            if min(arrivals) >= self._arrivals:
                self._waiting = False
                return True
            patience.pause()

    def free(self) -> None:
        """Release the words. Collective over all replicas."""
        if self._words is not None:
            self._words.free()
