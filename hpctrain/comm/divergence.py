"""What a rank is about to do with others, as a message to them, and the text of the error where they do not agree."""

from __future__ import annotations

import struct
import textwrap
from collections.abc import Mapping
from typing import NamedTuple

from hpctrain.comm.watch import WIDTH, ranks

_TEXT = 240
_RECORD = struct.Struct(f"<q{_TEXT}s")
LENGTH = _RECORD.size
"""Bytes of a message."""


class Doing(NamedTuple):
    """What a rank is about to do."""

    text: str
    nbytes: int

    def pack(self) -> bytes:
        """As a message of fixed length; a longer text is cut."""
        return _RECORD.pack(self.nbytes, self.text.encode()[:_TEXT])

    @classmethod
    def unpack(cls, message: bytes | bytearray) -> Doing:
        """What `pack` made."""
        nbytes, text = _RECORD.unpack(message)
        return cls(text.rstrip(b"\0").decode(errors="replace"), nbytes)

    def __str__(self) -> str:
        return f"{self.text}, {self.nbytes} B" if self.nbytes else self.text


def describe(said: Mapping[int, Doing], size: int) -> str:
    """Who is about to do what, the fewest ranks first, in lines of at most WIDTH columns; `said` by rank of `size`."""
    groups: dict[Doing, list[int]] = {}
    for rank in sorted(said):
        groups.setdefault(said[rank], []).append(rank)
    order = sorted(groups.items(), key=lambda item: (len(item[1]), item[1]))
    lines = [f"{ranks(who)} {'calls' if len(who) == 1 else 'call'} {what}" for what, who in order]
    if silent := [rank for rank in range(size) if rank not in said]:
        lines.append(f"{ranks(silent)} {'does' if len(silent) == 1 else 'do'} not answer")
    told = [textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="    ") for line in lines]
    remedy = "look for what depends on the rank, in a layer of your own say, or report it"
    return "\n".join(["the ranks do not do the same:", *told, remedy])
