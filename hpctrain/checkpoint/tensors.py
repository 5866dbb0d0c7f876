"""Between a rank's tensors and checkpoint blocks: who writes what, and how each rank finds its part on any grid."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from hpctrain.checkpoint.reader import Checkpoint
from hpctrain.checkpoint.writer import Block
from hpctrain.errors import CheckpointError
from hpctrain.parameters import Tensor
from hpctrain.partition import whole

PRIVATE = re.compile(r"(rank|replica)\d+/|sync/")
"""What the names of tensors begin with that only a run on as many ranks, or replicas, can make use of."""


def blocks(tensors: Sequence[Tensor], rank: int) -> list[Block]:
    """What `rank` writes: its box of each tensor, if it is the first of those that hold the same."""
    return [Block(tensor.name, tensor.shape, tensor.box, tensor.array) for tensor in tensors if tensor.saved_by(rank)]


def owned(tensors: Sequence[Tensor], owner: str) -> list[Tensor]:
    """`tensors` as those of `owner` alone, "replica2" for instance: the same arrays under the names owner/name."""
    return [replace(tensor, name=f"{owner}/{tensor.name}") for tensor in tensors]


def rank_blocks(arrays: Mapping[str, np.ndarray], rank: int) -> list[Block]:
    """What `rank` writes of arrays that no other rank has anything of, as tensors rankN/name."""
    return [Block(f"rank{rank}/{name}", a.shape, whole(a.shape), a) for name, a in arrays.items()]


def restore_rank(checkpoint: Checkpoint, arrays: Mapping[str, np.ndarray], rank: int) -> bool:
    """Fill `arrays` with what `rank` wrote of them; False, and nothing filled, where it did not write just these.

    Raises CheckpointError where the file is damaged.
    """
    stored = {f"rank{rank}/{name}": (a.shape, a.dtype) for name, a in arrays.items()}
    if any(checkpoint.tensors.get(name) != kind for name, kind in stored.items()):
        return False
    for name, array in arrays.items():
        checkpoint.read(f"rank{rank}/{name}", whole(array.shape), array)
    return True


def restore(checkpoint: Checkpoint, tensors: Sequence[Tensor]) -> None:
    """Fill every tensor's array from `checkpoint`, whatever grid wrote it; what is private there may be left.

    Raises CheckpointError, naming the tensor, where the checkpoint is of another network or precision.
    """
    for tensor in tensors:
        if tensor.name not in checkpoint.tensors:
            raise CheckpointError(
                f"{checkpoint.path}: has no {tensor.name}, so it is of another network; "
                "resume with the config it was made by"
            )
        shape, dtype = checkpoint.tensors[tensor.name]
        if shape != tensor.shape or dtype != tensor.array.dtype:
            raise CheckpointError(
                f"{checkpoint.path}: {tensor.name} is {shape} {dtype}, the network has {tensor.shape} "
                f"{tensor.array.dtype}; resume with the config it was made by"
            )
    public = {name for name in checkpoint.tensors if not PRIVATE.match(name)}
    if extra := public - {tensor.name for tensor in tensors}:
        raise CheckpointError(
            f"{checkpoint.path}: holds {min(extra)}, which the network lacks: it is of another network"
        )
    fill(checkpoint, tensors)


def fill(checkpoint: Checkpoint, tensors: Sequence[Tensor]) -> None:
    """Fill every tensor's array from `checkpoint`. Raises CheckpointError where it has another or none of a name."""
    for tensor in tensors:
        if tensor.array.size:
            checkpoint.read(tensor.name, tensor.box, tensor.array)
