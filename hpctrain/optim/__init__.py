"""Optimizers, one file each; `TABLE` lists them. Each updates blocks of parameters in place from their gradients."""

from __future__ import annotations

from hpctrain.optim.adam import Adam
from hpctrain.optim.base import Block, Optimizer, Shard
from hpctrain.optim.lamb import LAMB
from hpctrain.optim.lars import LARS
from hpctrain.optim.sgd import SGD

TABLE: dict[str, type[SGD] | type[Adam] | type[LARS] | type[LAMB]] = {
    "sgd": SGD,
    "adam": Adam,
    "lars": LARS,
    "lamb": LAMB,
}

__all__ = ["LAMB", "LARS", "SGD", "TABLE", "Adam", "Block", "Optimizer", "Shard"]
