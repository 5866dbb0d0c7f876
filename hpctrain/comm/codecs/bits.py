"""Small whole numbers packed to as many bits as they need."""

from __future__ import annotations

from functools import cache

import numpy as np


def packed_bytes(n: int, bits: int) -> int:
    """Bytes of n numbers: `bits` bytes for every 8 of them."""
    return -(-n // 8) * bits


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Numbers (n,) below 2**bits, uint8, as uint8 (packed_bytes,): of 8 the first is in the lowest bits."""
    words = np.zeros(-(-codes.size // 8), "<u8")
    for i in range(8):
        lane = codes[i::8]
        words[: lane.size] |= lane.astype("<u8") << np.uint64(i * bits)
    return words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)


def unpack(packed: np.ndarray, n: int, bits: int) -> np.ndarray:
    """What `pack` was given: uint8 (n,)."""
    if 8 % bits == 0:
        return np.take(_of_byte(bits), packed, axis=0).reshape(-1)[:n]
    padded = np.zeros((packed.size // bits, 8), np.uint8)
    padded[:, :bits] = packed.reshape(-1, bits)
    words = padded.view("<u8").reshape(-1)
    codes = np.empty((words.size, 8), np.uint8)
    for i in range(8):
        codes[:, i] = (words >> np.uint64(i * bits)) & np.uint64(2**bits - 1)
    return codes.reshape(-1)[:n]


@cache
def _of_byte(bits: int) -> np.ndarray:
    """(256, 8 // bits): the numbers in each byte, for which looking them up is several times as fast."""
    byte, shifts = np.arange(256)[:, None], np.arange(0, 8, bits)
    return (byte >> shifts & (2**bits - 1)).astype(np.uint8)
