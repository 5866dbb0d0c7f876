"""The steps of one replica among others: what it exchanges with them, and how all come together on errors and stops."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from hpctrain import sync
from hpctrain.comm.replicas import Replicas
from hpctrain.comm.world import World, agree
from hpctrain.config import Config
from hpctrain.errors import HpctrainError
from hpctrain.executor import Executor
from hpctrain.metrics import Totals
from hpctrain.optim import Optimizer
from hpctrain.verdict import Verdict


class Together:
    """Replicas that agree in every step are one: nothing here communicates then."""

    def __init__(
        self, world: World, replicas: Replicas, config: Config, executor: Executor, optimizer: Optimizer
    ) -> None:
        """Collective over all ranks; all replicas have the same weights."""
        self.world, self.replicas, self.executor, self.optimizer = world, replicas, executor, optimizer
        held = sync.held(executor.parameters, list(optimizer.state.values()))
        self.strategy = sync.make(replicas, held, config.sync, config.train.seed)
        self.apart = config.sync.strategy != "allreduce"
        """Whether replicas only meet at times."""
        self.meeting = sync.Meeting(replicas, self.strategy.lockstep) if self.apart else None
        self.failed: HpctrainError | None = None
        """What this replica met, until all learn of it. It goes on without updates, as others may wait for it."""
        self.seconds = 0.0
        """Time spent exchanging with others, and waiting for them in a step."""
        self.waited = 0.0
        """Time spent waiting for others at meetings."""

    def gradients(self, step: int, make: Callable[[], Verdict]) -> Verdict:
        """What `make` does for the gradients of `step`; an error of several replicas is kept, and a meeting called."""
        if self.meeting is None:
            return make()
        self.meeting.begin(step)
        verdict = Verdict(Totals(), finite=False, stop=True)
        if self.failed is None:
            try:
                verdict = make()
            except HpctrainError as error:
                self.failed = type(error)(f"replica {self.replicas.index}: {error}")
        if verdict.stop:
            self.meeting.call()
        return verdict

    def update(self, step: int, lr: float, finite: bool) -> int:
        """The update of `step`, if its loss was `finite`, and what replicas exchange; how many steps it leads on."""
        moved, moving = 0, 0.0

        def move() -> None:
            nonlocal moved, moving
            begin, moved = perf_counter(), 1
            if finite:
                self.optimizer.step(lr)
            moving = perf_counter() - begin

        begin = perf_counter()
        done = self.strategy.update(step, move) - step
        self.seconds += perf_counter() - begin - moving
        self.optimizer.updates += done - moved  # those that others have made
        if self.apart:
            self.executor.gradients.changed()
        self.executor.updated()
        return done

    def stop_asked(self) -> bool:
        """Whether this rank was asked to stop, or this replica to a meeting."""
        return self.world.stop.received is not None or (self.meeting is not None and self.meeting.called())

    def complete(self, done: int) -> bool:
        """Wait, after `done` steps, until all replicas are here. False: make one more step first, then come again."""
        if self.meeting is None:
            return True
        begin = perf_counter()
        complete = self.meeting.complete(done)
        self.waited += perf_counter() - begin
        return complete

    def settle(self) -> bool:
        """Once all are here: whether any rank was asked to stop. Raises what any replica met, on all. Collective."""
        agree(self.world.comm, self.failed)
        return self.world.comm.allreduce(int(self.world.stop.received is not None)) > 0
