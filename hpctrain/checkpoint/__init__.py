"""Checkpoints: atomic, hashed, and readable by any other grid or number of ranks."""

from hpctrain.checkpoint.reader import Checkpoint, newest, open_checkpoint
from hpctrain.checkpoint.retention import retain
from hpctrain.checkpoint.writer import Block, save

__all__ = ["Block", "Checkpoint", "newest", "open_checkpoint", "retain", "save"]
