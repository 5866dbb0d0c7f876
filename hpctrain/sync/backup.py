"""Spare replicas (Chen et al. 2016): a step takes the mean gradient of the first ones, and the late take its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hpctrain.comm.onesided import Patience, Vectors
from hpctrain.comm.replicas import Replicas
from hpctrain.comm.watch import Wait
from hpctrain.comm.watched import others
from hpctrain.config import Sync
from hpctrain.sync.base import Held, Stateless, pack, size_of, unpack
from hpctrain.sync.rules import mean


class Round(NamedTuple):
    """Which step gathers gradients and who has come; which step was the last complete one and whose those were."""

    open: int
    here: tuple[int, ...]
    closed: int
    members: tuple[int, ...]


def arrive(found: Round, step: int, replica: int, wanted: int) -> Round:
    """What `found` becomes when `replica` comes with a gradient of `step`: the same where that is no longer open."""
    if step < found.open:
        return found
    here = (*(found.here if step == found.open else ()), replica)
    if len(here) < wanted:
        return Round(step, here, found.closed, found.members)
    return Round(step + 1, (), step, tuple(sorted(here)))


class Backup(Stateless):
    """All replicas have the same weights and optimizer state after each step that they make.

    Each shows its gradient; a board at replica 0 says whose count. Each of these adds them in the order of replicas,
    and shows its weights and optimizer state after the update: a late one takes them, however many steps it has missed.
    """

    lockstep = True

    def __init__(self, replicas: Replicas, held: Held, config: Sync, seed: int) -> None:
        self.replicas, self.gradients = replicas, held.gradients
        self.kept = [*held.weights, *held.optimizer]
        self.wanted = replicas.count - config.spare
        """How many gradients a step takes."""
        dtype = pack(held.weights).dtype
        self._gradients = Vectors(replicas, size_of(held.gradients), dtype)
        self._results = Vectors(replicas, size_of(self.kept), dtype)
        self._board = Vectors(replicas, 2 + 2 * replicas.count, np.dtype(np.int64))
        self._wait = Wait("", "gradients of other replicas", others(replicas.across))
        self.dropped = 0
        """How many gradients of this replica have not been counted."""

    def update(self, step: int, move: Callable[[], None]) -> int:
        """Show the gradient, wait until enough have come; the optimizer's part, or the result of others."""
        own = self.replicas.index
        with self._gradients.locked(own):
            self._gradients.put(own, pack(self.gradients), step + 1)
        members = self._members(step)
        found = self._collect(step, members)
        if found is None:
            return self._take(step)
        unpack(mean(found), self.gradients)
        move()
        with self._results.locked(own):
            self._results.put(own, pack(self.kept), step + 1)
        return step + 1

    def _members(self, step: int) -> tuple[int, ...]:
        """Whose gradients of `step` count, once that is known; nobody's where later steps are complete by now."""
        with self._board.locked(0):
            before, version = self._read()
            now = arrive(before, step, self.replicas.index, self.wanted)
            if now != before:
                self._board.put(0, self._words(now), version + 1)
        self.dropped += now == before
        patience = Patience()
        with self._wait:
            while now.open <= step:
                patience.pause()
                with self._board.locked(0, shared=True):
                    now, _ = self._read()
        return now.members if now.closed == step else ()

    def _collect(self, step: int, members: tuple[int, ...]) -> list[np.ndarray] | None:
        """The gradients of `members`, in order; None for a replica that is not one, or too slow to find them all."""
        if self.replicas.index not in members:
            return None
        found = []
        for member in members:
            gradient = np.empty(self._gradients.size, self._gradients.dtype)
            with self._gradients.locked(member, shared=True):
                version = self._gradients.get(member, gradient)
            if version != step + 1:  # it has gone on, and so has a result to take
                return None
            found.append(gradient)
        return found

    def _take(self, step: int) -> int:
        """Take weights and optimizer state from a replica that has done `step`; how many steps it has done."""
        result, patience = np.empty(self._results.size, self._results.dtype), Patience()
        while True:
            with self._board.locked(0, shared=True):
                now, _ = self._read()
            for member in now.members:
                with self._results.locked(member, shared=True):
                    done = self._results.version(member)
                    if done > step:
                        self._results.get(member, result)
                if done > step:
                    unpack(result, self.kept)
                    return done
            patience.pause()

    def _read(self) -> tuple[Round, int]:
        words = np.empty(self._board.size, np.int64)
        version = self._board.get(0, words)
        if version == 0:
            return Round(0, (), -1, ()), 0
        here, members = words[2:].reshape(2, -1)
        return Round(int(words[0]), _listed(here), int(words[1]), _listed(members)), version

    def _words(self, found: Round) -> np.ndarray:
        words = np.zeros(self._board.size, np.int64)
        words[:2] = found.open, found.closed
        here, members = words[2:].reshape(2, -1)
        here[list(found.here)], members[list(found.members)] = 1, 1
        return words

    def free(self) -> None:
        """Release the windows."""
        for window in (self._gradients, self._results, self._board):
            window.free()


def _listed(flags: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.flatnonzero(flags))
