"""PowerSGD (Vogels et al. 2019): a matrix as the product of two narrow ones, found by one step of power iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hpctrain.comm.codecs.base import Codec, Message, Part, Wire
from hpctrain.partition import whole
from hpctrain.randomness import normal


@dataclass(frozen=True)
class Factored:
    """A part that is sent as P (rows, rank) and Q (columns, rank), and where these begin in the buffers of all."""

    part: Part
    rows: int
    columns: int
    rank: int
    p_at: int
    q_at: int

    def matrix(self, flat: np.ndarray) -> np.ndarray:
        """(rows, columns) of a flat gradient."""
        return flat[self.part.where].reshape(self.rows, self.columns)

    def p(self, buffer: np.ndarray) -> np.ndarray:
        """(rows, rank)."""
        return buffer[self.p_at : self.p_at + self.rows * self.rank].reshape(self.rows, self.rank)

    def q(self, buffer: np.ndarray) -> np.ndarray:
        """(columns, rank)."""
        return buffer[self.q_at : self.q_at + self.columns * self.rank].reshape(self.columns, self.rank)

    def start(self, seed: int) -> np.ndarray:
        """Q before the first step, the same on all ranks."""
        shape = (self.columns, self.rank)
        return normal(seed, f"powersgd/{self.part.name}", shape, whole(shape))


class PowerSGD(Codec):
    """Of a gradient M, rows by columns, P = M Q is summed over ranks and made orthonormal, then Q = M^T P is summed.

    P Q^T then is the projection of the sum of M on the space of P, and Q is where the next step starts from. A rank
    keeps what its own M loses in it. The rows of a weight are its inputs and kernel positions, the columns its outputs.
    Biases, scales and matrices that are no larger than their factors are summed whole, along with P.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._factored: list[Factored] = []
        self._plain: list[tuple[Part, slice]] = []
        at_p = at_q = 0
        for part in self.parts:
            columns = part.shape[-1] if part.shape else 1
            rows = part.size // columns
            rank = min(self.settings.rank, rows, columns)
            if rank * (rows + columns) < part.size:
                self._factored.append(Factored(part, rows, columns, rank, at_p, at_q))
                at_p, at_q = at_p + rows * rank, at_q + columns * rank
            else:
                self._plain.append((part, slice(at_p, at_p + part.size)))
                at_p += part.size
        self._first, self._second = np.empty(at_p, self.dtype), np.empty(at_q, self.dtype)
        self.state = {"residual": np.zeros(self.size, self.dtype), "factor": np.empty(at_q, self.dtype)}
        for f in self._factored:
            f.q(self.state["factor"])[...] = f.start(self.seed)

    def messages(self, epoch: float) -> list[Message]:
        """As in Codec."""
        return [Message(False, buffer.size, self.dtype.itemsize) for buffer in (self._first, self._second)]

    def exchange(self, wire: Wire, gradient: np.ndarray, step: int, epoch: float) -> None:
        """As in Codec."""
        self._project(gradient)
        wire.total(self._first)
        if not np.isfinite(self._first).all():  # on all ranks alike
            gradient.fill(np.nan)
            return
        self._subtract(gradient)
        wire.total(self._second)
        if np.isfinite(self._second).all():
            self._keep(gradient)
        self._decode(gradient)

    def _project(self, gradient: np.ndarray) -> None:
        """P of this rank, and what is summed whole."""
        for f in self._factored:
            matrix = f.matrix(gradient)
            matrix += f.matrix(self.state["residual"])
            np.matmul(matrix, f.q(self.state["factor"]), out=f.p(self._first))
        for part, at in self._plain:
            self._first[at] = gradient[part.where]

    def _subtract(self, gradient: np.ndarray) -> None:
        """P orthonormal, Q of this rank, and what their product leaves of the gradient."""
        for f in self._factored:
            matrix, p, q = f.matrix(gradient), f.p(self._first), f.q(self._second)
            p[...] = np.linalg.qr(p)[0]
            np.matmul(matrix.T, p, out=q)
            matrix -= p @ q.T

    def _keep(self, gradient: np.ndarray) -> None:
        """The residual, and the summed Q; a column of it that is 0 would never find anything, and starts again."""
        self.state["factor"][...] = self._second
        for f in self._factored:
            f.matrix(self.state["residual"])[...] = f.matrix(gradient)
            q = f.q(self.state["factor"])
            nothing = ~q.any(axis=0)
            if nothing.any():
                q[:, nothing] = f.start(self.seed)[:, nothing]

    def _decode(self, gradient: np.ndarray) -> None:
        """The sum over ranks."""
        for f in self._factored:
            np.matmul(f.p(self._first), f.q(self._second).T, out=f.matrix(gradient))
        for part, at in self._plain:
            gradient[part.where] = self._first[at]
