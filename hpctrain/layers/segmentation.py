"""Losses of whole segmentations: sums over all positions of a sample meet in one quotient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from hpctrain.backends.base import Array
from hpctrain.errors import PlanError
from hpctrain.layers.base import Phase, Place, spatial_axes
from hpctrain.layers.loss import COUNT, LOSS, SCORE, WEIGHT, Loss
from hpctrain.layers.statistics import gather
from hpctrain.partition import Shape, extent


@dataclass(frozen=True)
class Dice(Loss):
    """1 - (2 sum of p t + smooth) / (sum of p + sum of t + smooth) per sample and class, then the mean over classes.

    Logits (N, ..., K) with integer labels (N, ...): p is their softmax, t 1 where the label is the class. Positions of
    label `ignore` are left out of all sums, and samples of nothing else out of the mean over samples. With a target of
    the logits' shape p is their sigmoid and t the target. Without `background` class 0 is left out. The score is the
    coefficient 2 |P and T| / (|P| + |T|) of what is predicted (the largest logit; or logits above 0 and targets above
    0.5), 1 for a class that neither is predicted nor occurs.
    """

    score: ClassVar[str] = "dice"
    smooth: float = 1.0
    background: bool = True
    ignore: int | None = None
    scale: float = 1.0

    def output_shape(self, *x: Shape) -> Shape:
        logits, target = x
        if len(logits) < 2 or target not in (logits, logits[:-1]):
            raise PlanError(
                f"dice: logits {logits} and target {target}; it takes (N, ..., K), and labels (N, ...) or a target of "
                f"the same shape"
            )
        if self.ignore is not None and target == logits:
            raise PlanError(
                f"dice: ignore = {self.ignore} with a target {target} of the logits' shape; it is for labels "
                f"{logits[:-1]}: give these, or leave ignore out"
            )
        if self.smooth < 0:
            raise PlanError(f"dice: smooth = {self.smooth}; give 0 or more")
        if logits[-1] == 1 and not self.background:
            raise PlanError("dice: class 0, the background, is the only one; give logits of more, or background=True")
        return super().output_shape(*x)

    def reduce_axes(self, *x: Shape) -> tuple[str, ...]:
        return spatial_axes(len(x[0]))

    def labels(self, *x: Shape) -> tuple[bool, ...]:
        return (False, len(x[1]) < len(x[0]))

    def invalid(self, target: Array, classes: int) -> Array:
        wrong: Array = np.logical_or(target < 0, target >= classes)
        if target.dtype.kind not in "iu":
            return np.zeros_like(wrong)
        return wrong if self.ignore is None else wrong & (target != self.ignore)

    def kept_bytes(self, itemsize: int, output: Shape, *x: Shape) -> int:
        positions = prod(x[0][:-1])
        masks = 2 * prod(x[0]) + (8 * positions if len(x[1]) < len(x[0]) else 0)
        return 3 * itemsize * prod(x[0]) + masks + (0 if self.ignore is None else positions)

    def bind(self, place: Place) -> DiceOp:
        return DiceOp(self, place)


class DiceOp:
    """Sums per sample and class go round in one allgather, and are added in rank order.

    All ranks that share a sample then know its row: the first of them writes it, the others zeros.
    """

    def __init__(self, layer: Dice, place: Place) -> None:
        self.layer, self.backend, self.comm = layer, place.backend, place.comm
        (_, self.labels) = layer.labels(*place.shapes)
        self.samples, self.classes = extent(place.output)[0], place.shapes[0][-1]
        self.first = 0 if layer.background else 1
        block = extent(place.inputs[0])
        self.p, self.t, self.dp = (place.backend.empty(block, place.dtype) for _ in range(3))
        self.true, self.guessed = (place.backend.empty(block, np.dtype(bool)) for _ in range(2))
        if self.labels:
            self.best = place.backend.empty(block[:-1], np.dtype(np.intp))
        if layer.ignore is not None:
            self.left_out = place.backend.empty((*block[:-1], 1), np.dtype(bool))

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        self.x = x[0]
        mine = np.zeros((5, self.samples, self.classes))
        if self.x.size:
            mine[...] = self._sums(*x)
        both, self.either, *predicted = gather(self.comm, mine).sum(axis=0)
        self.overlap = 2 * both + self.layer.smooth
        self.either += self.layer.smooth
        y.fill(0)
        if self.comm is None or self.comm.rank == 0:
            hit, guessed, true = predicted
            # of labels one class is predicted at each position that counts
            counts = guessed.any(axis=1) if self.labels else np.ones(self.samples, bool)
            y[:, LOSS] = 1 - _quotient(self.overlap, self.either)[:, self.first :].mean(axis=1)
            y[:, SCORE] = _quotient(2 * hit, guessed + true)[:, self.first :].mean(axis=1) * counts
            y[:, WEIGHT] = y[:, COUNT] = counts

    def _sums(self, x: Array, target: Array) -> Array:
        """Of this rank's positions, per sample and class: p t; p + t; predicted and true; predicted; true."""
        if self.labels:
            self.backend.softmax(x, self.p)
            every = np.arange(self.classes)
            np.argmax(x, axis=-1, out=self.best)
            np.equal(target[..., None], every, out=self.true)
            np.equal(self.best[..., None], every, out=self.guessed)
            if self.layer.ignore is not None:
                np.equal(target[..., None], self.layer.ignore, out=self.left_out)
                np.copyto(self.p, 0, where=self.left_out)  # which leaves them without gradient, too
                np.copyto(self.true, False, where=self.left_out)
                np.copyto(self.guessed, False, where=self.left_out)
            np.copyto(self.t, self.true)
        else:
            self.backend.activate("sigmoid", x, self.p)
            np.greater(target, 0.5, out=self.true)
            np.greater(x, 0, out=self.guessed)
            np.copyto(self.t, target)
        p, t = _flat(self.p), _flat(self.t)
        both = np.einsum("npk,npk->nk", p, t, dtype=np.float64)
        either = p.sum(axis=1, dtype=np.float64) + t.sum(axis=1, dtype=np.float64)
        guessed, true = (_flat(found).sum(axis=1, dtype=np.float64) for found in (self.guessed, self.true))
        self.true &= self.guessed
        return np.stack([both, either, _flat(self.true).sum(axis=1, dtype=np.float64), guessed, true])

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        by_logits, by_target = dx
        if not self.x.size:
            return
        # dL/dp = constant + slope * t, and the same with p and t exchanged
        share = -dy[:, LOSS, None] / (self.classes - self.first)
        slope = 2 * share * _quotient(np.ones_like(self.either), self.either, empty=0)
        constant = -share * _quotient(self.overlap, self.either**2, empty=0)
        slope[:, : self.first] = constant[:, : self.first] = 0
        if by_logits is not None:
            self._linear(slope, self.t, constant)
            if self.labels:
                self.backend.softmax_dx(self.dp, self.p, by_logits)
            else:
                self.backend.activate_dx("sigmoid", self.dp, self.x, by_logits)
        if by_target is not None:
            self._linear(slope, self.p, constant)
            by_target[...] = self.dp

    def _linear(self, slope: Array, values: Array, constant: Array) -> None:
        """dp = slope * values + constant, with slope and constant (N, K)."""
        shape = (self.samples, *(1,) * (values.ndim - 2), self.classes)
        np.multiply(values, slope.reshape(shape), out=self.dp)
        self.dp += constant.reshape(shape).astype(self.dp.dtype)


def _flat(values: Array) -> Array:
    """Values (N, ..., K) as (N, positions, K)."""
    return values.reshape(len(values), prod(values.shape[1:-1]), values.shape[-1])


def _quotient(a: Array, b: Array, empty: float = 1.0) -> Array:
    """a / b, and `empty` where b is 0."""
    return np.divide(a, b, out=np.full_like(b, empty), where=b != 0)
