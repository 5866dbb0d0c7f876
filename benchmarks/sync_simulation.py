"""Up to 128 workers in one process, by a clock of events: the rules of hpctrain.sync on a small network and the digits.

A step takes a worker one unit of time, give or take 5 %, and the delayed one more. What a worker reads of others is
what these had at that moment. Exchanges take no time.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from math import log2

import numpy as np

from hpctrain.sync import rules

SHAPES = ((64, 32), (32,), (32, 10), (10,))
MOMENTUM = 0.9
PERIOD = 4
"""local: steps between averagings."""


@dataclass(frozen=True)
class Setting:
    """One simulation; `batch` is that of a worker, as in the paper: more workers make fewer and larger steps."""

    strategy: str
    workers: int
    lr: float
    samples: int
    delay: float = 0.0
    """Units of time that the last worker takes longer for a step."""
    batch: int = 8
    seed: int = 0

    @property
    def spare(self) -> int:
        """backup: how many workers a step does not wait for."""
        return max(1, self.workers // 16)


@dataclass(frozen=True)
class Point:
    """The loss of the mean of all workers after so many samples, of all of them together, and so much time."""

    samples: int
    time: float
    loss: float


@dataclass
class Digits:
    """Images float32 (N, 64), scaled to mean 0, and labels int (N,)."""

    x: np.ndarray
    y: np.ndarray

    @classmethod
    def load(cls) -> Digits:
        """Those of scikit-learn."""
        from sklearn.datasets import load_digits

        found = load_digits()
        return cls(((found.data - found.data.mean()) / found.data.std()).astype(np.float32), found.target)


def initial(seed: int) -> np.ndarray:
    """The weights that all start from, as one vector."""
    rng = np.random.default_rng([seed, 1])
    parts = [rng.standard_normal(s) * (2 / s[0]) ** 0.5 if len(s) == 2 else np.zeros(s) for s in SHAPES]
    return np.concatenate([part.ravel() for part in parts]).astype(np.float32)


def loss_and_gradient(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean cross-entropy of the network 64-32-10 with weights (n,), and its gradient."""
    parts, at = [], 0
    for shape in SHAPES:
        size = int(np.prod(shape))
        parts.append(weights[at : at + size].reshape(shape))
        at += size
    first, bias, second, bias2 = parts
    hidden = np.maximum(x @ first + bias, 0)
    logits = hidden @ second + bias2
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = np.arange(len(y))
    loss = -float(logits[rows, y].mean())
    d = np.exp(logits)
    d[rows, y] -= 1
    d /= len(y)
    dh = (d @ second.T) * (hidden > 0)
    return loss, np.concatenate([(x.T @ dh).ravel(), dh.sum(axis=0), (hidden.T @ d).ravel(), d.sum(axis=0)])


class Simulation:
    """The workers' weights x and velocities v, (workers, n), and what they are doing."""

    def __init__(self, setting: Setting, data: Digits) -> None:
        self.setting, self.data = setting, data
        self.rng = np.random.default_rng([setting.seed, 2])
        self.x = np.tile(initial(setting.seed), (setting.workers, 1))
        self.v = np.zeros_like(self.x)
        self.steps = max(1, setting.samples // (setting.workers * setting.batch))
        self.points = 40

    def run(self) -> list[Point]:
        """The curve of the loss, about 40 points."""
        events = self._rounds() if self.setting.strategy in ("allreduce", "local", "backup") else self._events()
        every, due, found = self.steps * self.setting.workers / self.points, 0.0, []
        for steps, time in events:
            if steps >= due:
                due += every
                found.append(self._point(steps, time))
        return [*found, self._point(steps, time)]

    def _point(self, steps: int, time: float) -> Point:
        mean = self.x.mean(axis=0, dtype=np.float64).astype(np.float32)
        loss, _ = loss_and_gradient(mean, self.data.x, self.data.y)
        return Point(steps * self.setting.batch, time, loss)

    def _gradient(self, worker: int) -> np.ndarray:
        ids = self.rng.integers(len(self.data.y), size=self.setting.batch)
        return loss_and_gradient(self.x[worker], self.data.x[ids], self.data.y[ids])[1]

    def _move(self, worker: int, gradient: np.ndarray) -> None:
        """Nesterov's momentum, as optim.name = "sgd" with nesterov has it."""
        self.v[worker] = MOMENTUM * self.v[worker] + gradient
        self.x[worker] -= self.setting.lr * (gradient + MOMENTUM * self.v[worker])

    def _durations(self) -> np.ndarray:
        taken = 1 + 0.05 * self.rng.uniform(-1, 1, self.setting.workers)
        taken[-1] += self.setting.delay
        return taken

    # --- strategies in which workers wait for each other ------------------------------------------------------------

    def _rounds(self) -> Iterator[tuple[int, float]]:
        """(steps of all workers, time) after each round."""
        yield 0, 0.0
        p, free, time = self.setting.workers, np.zeros(self.setting.workers), 0.0
        for step in range(self.steps):
            if self.setting.strategy == "local":
                free += self._durations()
                for worker in range(p):
                    self._move(worker, self._gradient(worker))
                if rules.due(step, PERIOD):
                    self.x[:] = rules.mean(list(self.x))
                    free[:] = free.max()
                time = float(free.max())
            else:
                wanted = p - self.setting.spare if self.setting.strategy == "backup" else p
                free = np.maximum(free, time) + np.where(free > time, 0, self._durations())
                time = float(np.sort(free)[wanted - 1])
                counted = np.flatnonzero(free <= time)
                gradient = rules.mean([self._gradient(worker) for worker in counted])
                self._move(0, gradient)
                self.x[:], self.v[:] = self.x[0], self.v[0]
            yield (step + 1) * p, time

    # --- strategies in which nobody waits ---------------------------------------------------------------------------

    def _events(self) -> Iterator[tuple[int, float]]:
        """(steps of all workers so far, time) after each step of any worker; all make as many steps in all."""
        yield 0, 0.0
        p, exchange = self.setting.workers, EXCHANGES[self.setting.strategy](self)
        queue = [(taken, worker, 0) for worker, taken in enumerate(self._durations())]
        heapq.heapify(queue)
        for done in range(1, self.steps * p + 1):
            time, worker, step = heapq.heappop(queue)
            exchange.step(worker, step, self._gradient(worker))
            yield done, time
            heapq.heappush(queue, (time + float(self._durations()[worker]), worker, step + 1))


class Elastic:
    """A step of one worker with a centre that is there for all."""

    def __init__(self, simulation: Simulation) -> None:
        self.all, self.centre = simulation, simulation.x[0].copy()
        self.rate = rules.elastic_rate(simulation.setting.workers)

    def step(self, worker: int, step: int, gradient: np.ndarray) -> None:
        """By values before the exchange; both moves are added to these."""
        taken = rules.elastic_pull(self.all.x[worker], self.centre, self.rate)
        self.centre += taken
        self.all._move(worker, gradient)
        self.all.x[worker] -= taken


class Pull:
    """A step, and half of the way to what another worker shows."""

    def __init__(self, simulation: Simulation) -> None:
        self.all, self.shown = simulation, simulation.x.copy()

    def step(self, worker: int, step: int, gradient: np.ndarray) -> None:
        """Step, show, ask."""
        self.all._move(worker, gradient)
        self.shown[worker] = self.all.x[worker]
        other = rules.partner(self.all.setting.seed, step, worker, self.all.setting.workers)
        if other != worker:
            rules.pull(self.all.x[worker], self.shown[other])


class Push:
    """A step, and the mean with what others have left."""

    def __init__(self, simulation: Simulation) -> None:
        self.all = simulation
        self.inbox, self.count = np.zeros_like(simulation.x), np.zeros(simulation.setting.workers, int)

    def step(self, worker: int, step: int, gradient: np.ndarray) -> None:
        """Step, tell, take."""
        self.all._move(worker, gradient)
        other = rules.partner(self.all.setting.seed, step, worker, self.all.setting.workers)
        if other != worker:
            self.inbox[other] += self.all.x[worker]
            self.count[other] += 1
        if self.count[worker]:
            rules.push(self.all.x[worker], self.inbox[worker], int(self.count[worker]), other == worker)
            self.inbox[worker], self.count[worker] = 0, 0


EXCHANGES = {"elastic": Elastic, "gossip-pull": Pull, "gossip-push": Push}
STRATEGIES = ("allreduce", "local", "elastic", "gossip-pull", "gossip-push", "backup")


def final_loss(curve: list[Point]) -> float:
    """The mean of the last tenth of a curve; infinite where it left the numbers."""
    last = [point.loss for point in curve[-max(1, len(curve) // 10) :]]
    return float(np.mean(last)) if np.isfinite(last).all() else float("inf")


def time_per_step(curve: list[Point], setting: Setting) -> float:
    """Units of time for as many steps as there are workers, at half of the samples: while all are still at work."""
    half = min(curve, key=lambda point: abs(point.samples - setting.samples / 2))
    return half.time / max(1, half.samples / (setting.workers * setting.batch))


def doublings(most: int) -> list[int]:
    """4, 8, 16, ... up to `most`."""
    return [2**i for i in range(2, int(log2(most)) + 1)]
