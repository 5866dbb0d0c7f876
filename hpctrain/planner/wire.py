"""What moving bytes between ranks costs on a machine: within a host by copying or by messages, between hosts."""

from __future__ import annotations

from typing import NamedTuple

from hpctrain.errors import ConfigError
from hpctrain.planner.setting import Setting


class Wire(NamedTuple):
    """Seconds of a transfer between two layers, for a rank on a host of `per_host` consecutive ranks.

    Where `copies`, ranks of a host read each other's memory: a transfer takes `near_alpha` once, `near_beta` per byte
    that the rank copies and `run` per contiguous run of them. Else they exchange messages: `near_alpha` per peer and
    `near_beta` per byte of the direction that carries more. Between hosts likewise, by `far_alpha` and `far_beta`.
    """

    near_alpha: float
    near_beta: float
    run: float
    far_alpha: float
    far_beta: float
    per_host: int
    copies: bool = True

    @classmethod
    def of(cls, setting: Setting, ranks: int) -> Wire:
        """That of `setting`'s machine, for so many ranks in all. Raises ConfigError, naming what its file lacks.

        Ranks of a host that share a link have their part of it: beta is that of as many as share one.
        """
        machine = setting.machine
        per_host = min(ranks, machine.per_host or ranks)
        name = machine.name or "this machine"
        near: tuple[float, float, float] = (0.0, 0.0, 0.0)
        if machine.copies is not None:
            near = machine.copies.alpha, machine.copies.beta, machine.copies.run
        elif machine.node is not None:
            near = machine.node.alpha, machine.node.beta, 0.0
        elif per_host > 1:
            raise ConfigError(
                f"{name}: {per_host} ranks on a host, but its file has neither 'copies' nor 'node', what moving bytes "
                "between them costs; measure it with hpctrain calibrate, or add one of them"
            )
        far = 0.0, 0.0
        if ranks > per_host:
            if machine.network is None:
                raise ConfigError(
                    f"{name}: {ranks} ranks on hosts of {per_host}, but its file has no 'network', what messages "
                    "between hosts cost; add it (alpha, beta, gamma), or plan for the ranks of one host"
                )
            sharing = -(-per_host // machine.links)
            far = machine.network.alpha, machine.network.beta * sharing
        return cls(*near, *far, per_host, machine.copies is not None)
