"""Optimizers, one file each; `TABLE` lists them. Each updates the flat parameters in place from flat gradients."""

from __future__ import annotations

from hpctrain.optim.sgd import SGD

TABLE = {"sgd": SGD}
