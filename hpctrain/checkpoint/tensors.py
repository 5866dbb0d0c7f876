"""Between a rank's tensors and checkpoint blocks: who writes what, and how each rank finds its part on any grid."""

from __future__ import annotations

from collections.abc import Sequence

from hpctrain.checkpoint.reader import Checkpoint
from hpctrain.checkpoint.writer import Block
from hpctrain.errors import CheckpointError
from hpctrain.parameters import Tensor


def blocks(tensors: Sequence[Tensor], rank: int) -> list[Block]:
    """What `rank` writes: its box of each tensor, if it is the first of those that hold the same."""
    return [Block(tensor.name, tensor.shape, tensor.box, tensor.array) for tensor in tensors if tensor.saved_by(rank)]


def restore(checkpoint: Checkpoint, tensors: Sequence[Tensor]) -> None:
    """Fill every tensor's array from `checkpoint`, whatever grid wrote it.

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
    if extra := set(checkpoint.tensors) - {tensor.name for tensor in tensors}:
        raise CheckpointError(
            f"{checkpoint.path}: holds {min(extra)}, which the network lacks: it is of another network"
        )
    for tensor in tensors:
        if tensor.array.size:
            checkpoint.read(tensor.name, tensor.box, tensor.array)
