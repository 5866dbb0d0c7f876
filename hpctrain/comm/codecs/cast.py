"""Gradients as 16-bit floats: what rounding takes off stays on the rank, and is added to its next gradient."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from hpctrain.comm.codecs.base import Codec, Message, Wire


class Cast(Codec):
    """Rounded to `type`, and summed in it by any allreduce algorithm."""

    type: np.dtype

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.state = {"residual": np.zeros(self.size, self.dtype)}

    def exchange(self, wire: Wire, gradient: np.ndarray, step: int, epoch: float) -> None:
        """As in Codec."""
        gradient += self.state["residual"]
        sent = gradient.astype(self.type)
        gradient -= sent.astype(self.dtype)
        wire.total(sent)
        total = sent.astype(self.dtype)
        if np.isfinite(total).all():
            self.state["residual"][...] = gradient
        gradient[...] = total

    def messages(self, epoch: float) -> list[Message]:
        """As in Codec."""
        return [Message(False, self.size, self.type.itemsize)]


class FP16(Cast):
    """IEEE 754 half precision: 11 digits; beyond 65504 it is infinite, below 2**-25 nothing."""

    type = np.dtype(np.float16)


class BF16(Cast):
    """bfloat16: 8 digits, and the range of float32."""

    type = np.dtype(ml_dtypes.bfloat16)
