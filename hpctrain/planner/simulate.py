"""A simulation of one step of training: what every rank does when, for slow ranks, overlap and shared links.

Each rank goes through its schedule as the executor does. An exchange makes it wait for its messages, and on a host for
those it reads and who read it; a message flows when both sides are ready for it, and shares links with others. Sums of
gradients between hosts go through the steps of their algorithm, when backward has made a bucket, and further whenever
the rank looks at them: between layers where they overlap backward. Sums on one host, those of libraries, and the
statistics of norms take what `sums` says from when the last of their ranks comes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from hpctrain.errors import PlanError
from hpctrain.graph import Graph
from hpctrain.planner.compute import Pricer
from hpctrain.planner.events import Events, Half, Process, Waiting
from hpctrain.planner.pairs import Way
from hpctrain.planner.plan import Plan
from hpctrain.planner.reduction import Bucket
from hpctrain.planner.rounds import Post, Wait, steps_of
from hpctrain.planner.schedule import Key
from hpctrain.planner.setting import Setting
from hpctrain.planner.topology import Network
from hpctrain.planner.trace import Span, Timeline
from hpctrain.planner.workload import Workload, workload
from hpctrain.precision import exact


def simulate(
    graph: Graph,
    plan: Plan,
    setting: Setting,
    slow: Mapping[int, float] | None = None,
    ranks: int | None = None,
    pricer: Pricer | None = None,
) -> Timeline:
    """One step by `plan` on so many ranks, those that it uses where None.

    `slow`: {rank: how many times longer it computes and updates}. `graph` is for a part of a batch; `pricer` may be one
    made before for the same graph, setting and ranks. Raises PlanError where `slow` names no rank, or no factor, and
    ConfigError where the machine says too little.
    """
    ranks, slow = ranks or plan.ranks, slow or {}
    for rank, factor in slow.items():
        if not 0 <= rank < ranks or not factor > 0:
            raise PlanError(f"slow rank {rank}, factor {factor}: give a rank of 0 to {ranks - 1} and a factor above 0")
    network = Network(setting.machine, ranks)
    work = workload(graph, plan, setting, network.hosts, pricer)
    shared = _Shared(setting, work, Events(network))
    processes = [_Rank(shared, rank, slow.get(rank, 1.0)) for rank in range(ranks)]
    for process in processes:
        shared.events.start(process.step())
    shared.events.run()
    spans = tuple(span for process in processes for span in process.spans)
    summed = tuple(span for process in processes for span in process.summed)
    return Timeline(max((span.end for span in spans), default=0.0), network.hosts, spans, summed)


class _Handover:
    """One transfer among ranks of a host: what each waits for before it reads, and before it goes on."""

    def __init__(self, way: Way) -> None:
        self.offers = [Waiting(len(ranks)) for ranks in way.writers]
        self.readers = [Waiting(len(ranks)) for ranks in way.readers]


class _Shared:
    """What all ranks of a simulation have in common."""

    def __init__(self, setting: Setting, work: Workload, events: Events) -> None:
        self.setting, self.work, self.events = setting, work, events
        self._handovers: dict[Hashable, _Handover] = {}
        self._meetings: dict[Hashable, tuple[list[int], Waiting]] = {}

    def handover(self, key: Hashable, way: Way) -> _Handover:
        """The one called `key`."""
        if key not in self._handovers:
            self._handovers[key] = _Handover(way)
        return self._handovers[key]

    def meet(self, key: Hashable, ranks: int, seconds: float) -> Waiting:
        """For so many ranks to come, and then for so long."""
        missing, waiting = self._meetings.setdefault(key, ([ranks], Waiting(1)))
        missing[0] -= 1
        if not missing[0]:
            del self._meetings[key]
            self.events.after(seconds, lambda: self.events.happened(waiting))
        return waiting


@dataclass
class _Sum:
    """A sum of gradients that a rank has begun."""

    bucket: Bucket
    process: Process
    begin: float
    waiting: Waiting | None
    """What it waits for; None when it is done."""


class _Rank:
    """One rank: its processes, and what it has done so far."""

    def __init__(self, shared: _Shared, rank: int, slowness: float) -> None:
        self.rank, self.slowness = rank, slowness
        self.shared, self.work, self.events = shared, shared.work, shared.events
        self.spans: list[Span] = []
        self.summed: list[Span] = []
        self._sums: list[_Sum] = []
        self._times: dict[Hashable, int] = {}

    def step(self) -> Process:
        """One step of training."""
        work, parts = self.work, self.shared.setting.parts
        for part in range(parts):
            yield from self._busy("input", "input", work.input[self.rank])
            for i in range(len(work.schedule.units)):
                yield from self._forward(i, "forward")
            for again, i in work.schedule.backward():
                if not again:
                    yield from self._backward(i)
                    yield from self._completed(i, part == parts - 1)
                elif i in work.schedule.again:
                    yield from self._forward(i, "again")
                else:
                    yield from self._read(i, "again")
        for each in self._sums:
            yield from self._finish(each)
        yield from self._busy("update", "update", work.update[self.rank] * self.slowness)
        yield from self._publish()
        yield from self._busy("step", "step", self.shared.setting.machine.step)

    # --- layers ----------------------------------------------------------------------------------------------------

    def _read(self, i: int, pass_: str) -> Process:
        for key in self.work.schedule.units[i].inputs:
            yield from self._exchange(key, pass_, backward=False)

    def _forward(self, i: int, pass_: str) -> Process:
        unit = self.work.schedule.units[i]
        yield from self._read(i, pass_)
        yield from self._busy(f"{unit.name} {pass_}", "compute", self.work.compute[i][self.rank][0] * self.slowness)
        if pass_ == "forward":
            yield from self._gather(unit.head, 0)
        yield from self._exchange((unit.head, None), pass_, backward=False)

    def _backward(self, i: int) -> Process:
        unit = self.work.schedule.units[i]
        if unit.name not in self.work.varied:
            return
        yield from self._exchange((unit.head, None), "backward", backward=True)
        yield from self._busy(f"{unit.name} backward", "compute", self.work.compute[i][self.rank][1] * self.slowness)
        yield from self._gather(unit.head, 1)
        for key in unit.inputs:
            yield from self._exchange(key, "backward", backward=True)

    def _gather(self, name: str, backward: int) -> Process:
        gathers = self.work.gathers.get(name)
        if gathers is None or not gathers.ranks[self.rank]:
            return
        ranks = gathers.ranks[self.rank]
        key = self._occasion("statistics", name, backward, ranks[0])
        meeting = self.shared.meet(key, len(ranks), gathers.seconds[backward])
        yield from self._waiting(f"{name} statistics", "statistics", meeting)

    def _exchange(self, key: Key, pass_: str, backward: bool) -> Process:
        moves = self.work.moves.get(key)
        way = None if moves is None else moves.backward if backward else moves.forward
        if moves is None or way is None or way.idle(self.rank):
            return
        begin, me, occasion = self.events.now, self.rank, self._occasion(key, backward)
        halves = self._post(way, occasion)
        handover = self.shared.handover(occasion, way) if way.readers[me] or way.writers[me] else None
        if handover is not None:
            for reader in way.readers[me]:
                self.events.happened(handover.offers[reader])
        yield self.events.wait_for(halves)
        if handover is not None:
            yield handover.offers[me]
        yield way.copying[me]
        if handover is not None:
            for writer in way.writers[me]:
                self.events.happened(handover.readers[writer])
            yield handover.readers[me]
        consumer, slot = key
        what = "partial sums" if slot is None else f"input {slot}"
        self._did(f"{consumer} {what} {pass_}", moves.phase, begin)

    def _post(self, way: Way, tag: Hashable) -> list[Half]:
        """All messages leave when all are made up: a rank takes alpha for each of the direction that has more."""
        me, alpha = self.rank, self.events.network.alpha
        sends, receives = way.sends[me], way.receives[me]
        latency = max(sum(alpha(me, peer) for peer, _ in peers) for peers in (sends, receives))
        post = self.events.post
        return [post(me, peer, tag, nbytes, latency, sends=False) for peer, nbytes in receives] + [
            post(me, peer, tag, nbytes, latency, sends=True) for peer, nbytes in sends
        ]

    # --- sums of gradients -----------------------------------------------------------------------------------------

    def _completed(self, i: int, last: bool) -> Process:
        """Backward of a unit has ended; only those of a batch's last part are summed."""
        for bucket in self.work.sums[self.rank].get(i, ()) if last else ():
            process = self._together(bucket) if bucket.steps is None else self._steps(bucket, bucket.steps)
            each = _Sum(bucket, process, self.events.now, Waiting(0))
            yield from self._go_on(each)
            if self.work.overlaps:
                self._sums.append(each)
            else:
                yield from self._finish(each)
        for each in self._sums:
            yield from self._go_on(each)

    def _go_on(self, each: _Sum) -> Process:
        """As far as is possible without waiting."""
        while each.waiting is not None and not each.waiting.left:
            due = next(each.process, None)
            if due is None:
                self.summed.append(Span(self.rank, each.bucket.name, "sum", each.begin, self.events.now))
            if due is None or isinstance(due, Waiting):
                each.waiting = due
            else:
                yield from self._busy(each.bucket.name, "allreduce", due)

    def _finish(self, each: _Sum) -> Process:
        while each.waiting is not None:
            yield from self._waiting(each.bucket.name, "allreduce", each.waiting)
            yield from self._go_on(each)

    def _together(self, bucket: Bucket) -> Process:
        yield self.shared.meet(bucket.tag, len(bucket.ranks), bucket.seconds)

    def _steps(self, bucket: Bucket, algorithm: str) -> Process:
        """The rank's messages and additions; of several messages that leave at once, each takes alpha."""
        network, dtype = self.events.network, exact(self.shared.setting.dtype)
        place = bucket.ranks.index(self.rank)
        posts: list[Half] = []
        latency = 0.0
        for step in steps_of(algorithm, bucket.hosts, place, bucket.elements, dtype):
            if isinstance(step, Post):
                peer = bucket.ranks[step.peer]
                latency += network.alpha(self.rank, peer) if step.sends else 0.0
                since = latency if step.sends else 0.0
                posts.append(self.events.post(self.rank, peer, (algorithm, bucket.tag), step.nbytes, since, step.sends))
            elif isinstance(step, Wait):
                latency = 0.0
                yield self.events.wait_for([posts[number] for number in step.posts])
            else:
                yield step.nbytes * (network.near_gamma if step.near else network.far_gamma)

    def _publish(self) -> Process:
        """Where each rank updates a share of the weights, all get the others'."""
        if not self.shared.setting.shard or self.shared.setting.share_weights:
            return
        for bucket in (bucket for completed in self.work.sums[self.rank].values() for bucket in completed):
            each = _Sum(bucket, self._steps(bucket, "allgather"), self.events.now, Waiting(0))
            yield from self._go_on(each)
            yield from self._finish(each)

    # --- keeping count ---------------------------------------------------------------------------------------------

    def _occasion(self, *what: Hashable) -> Hashable:
        """`what`, and how often this rank has done it: others do it equally often."""
        self._times[what] = self._times.get(what, 0) + 1
        return what, self._times[what]

    def _busy(self, name: str, phase: str, seconds: float) -> Process:
        begin = self.events.now
        yield seconds
        self._did(name, phase, begin)

    def _waiting(self, name: str, phase: str, waiting: Waiting) -> Process:
        begin = self.events.now
        yield waiting
        self._did(name, phase, begin)

    def _did(self, name: str, phase: str, begin: float) -> None:
        if self.events.now > begin:
            self.spans.append(Span(self.rank, name, phase, begin, self.events.now))
