"""TernGrad (Wen et al. 2017): of each number its sign, or zero, in two bits."""

from __future__ import annotations

from hpctrain.comm.codecs.base import Part
from hpctrain.comm.codecs.qsgd import QSGD


class TernGrad(QSGD):
    """QSGD of one level, with one scale per parameter: sign(x) * max with probability abs(x) / max, else 0.

    Every rank sends the largest number of its own. The paper can make ranks share the largest of all, so that a
    parameter server may add levels as whole numbers; here ranks add what they decode, so that it would only cost a
    message more and a larger variance. Nor is the gradient clipped first, which would shift its mean.
    """

    @property
    def bits(self) -> int:
        """As in QSGD."""
        return 2

    def bucket(self, part: Part) -> int:
        """As in QSGD."""
        return part.size
