"""The learning rate as a function of the step: linear warm-up, then constant, step, cosine or polynomial decay."""

from __future__ import annotations

from math import cos, pi

from hpctrain.config import Optim


def learning_rate(optim: Optim, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The rate for update number `step` (from 0) of `total_steps`; warm-up ends at `optim.lr` (Goyal et al. 2017)."""
    schedule, lr = optim.schedule, optim.lr
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if schedule.name == "constant":
        return lr
    if schedule.name == "step":
        passed = sum(step >= milestone * steps_per_epoch for milestone in schedule.milestones)
        return lr * schedule.gamma**passed
    progress = min(1.0, (step - warmup) / max(1.0, total_steps - warmup))
    # cosine: Loshchilov & Hutter 2017, equation 5, without restarts
    remaining = 0.5 * (1 + cos(pi * progress)) if schedule.name == "cosine" else (1 - progress) ** schedule.power
    return schedule.final_lr + (lr - schedule.final_lr) * remaining
