"""Gradient compression: one file per codec. `TABLE` lists them by the names of `compress.codec`.

Every codec makes a flat gradient the sum, over the ranks that hold the same parameters, of what each of them sends, the
same bits on all. What a rank does not send it keeps and adds to its next gradient (error feedback), except where what
it sends has the right mean by itself (qsgd, terngrad).
"""

from __future__ import annotations

from hpctrain.comm.codecs.base import Codec, Message, Part, Wire
from hpctrain.comm.codecs.cast import BF16, FP16
from hpctrain.comm.codecs.onebit import OneBit
from hpctrain.comm.codecs.powersgd import PowerSGD
from hpctrain.comm.codecs.qsgd import QSGD
from hpctrain.comm.codecs.terngrad import TernGrad
from hpctrain.comm.codecs.topk import TopK

__all__ = ["TABLE", "Codec", "Message", "Part", "Wire"]

TABLE: dict[str, type[Codec]] = {
    "fp16": FP16,
    "bf16": BF16,
    "onebit": OneBit,
    "qsgd": QSGD,
    "terngrad": TernGrad,
    "topk": TopK,
    "powersgd": PowerSGD,
}
