"""The learning rate as a function of the step: linear warm-up, then constant, step, cosine or polynomial decay."""

from __future__ import annotations

from math import cos, pi

from hpctrain.config import Optim


def learning_rate(optim: Optim, batch: int, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The rate for update number `step` (from 0) of `total_steps`; warm-up ends at the full rate.

    It begins near 0, or at `optim.lr` where batches scale that up (Goyal et al. 2017, section 2.2).
    """
    schedule, full = optim.schedule, optim.full_lr(batch)
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        if optim.scale_lr == "linear":
            base = min(optim.lr, full)
            return base + (full - base) * step / warmup
        return full * (step + 1) / (warmup + 1)
    if schedule.name == "constant":
        return full
    if schedule.name == "step":
        passed = sum(step >= milestone * steps_per_epoch for milestone in schedule.milestones)
        return full * schedule.gamma**passed
    progress = min(1.0, (step - warmup) / max(1.0, total_steps - warmup))
    # cosine: Loshchilov & Hutter 2017, equation 5, without restarts
    remaining = 0.5 * (1 + cos(pi * progress)) if schedule.name == "cosine" else (1 - progress) ** schedule.power
    return schedule.final_lr + (full - schedule.final_lr) * remaining


def describe(optim: Optim, batch: int) -> str | None:
    """What became of `optim.lr`, for the head of a run; None where it is the rate."""
    if optim.scale_lr == "none":
        return None
    begins = f", warmed up from {min(optim.lr, optim.full_lr(batch)):g}" if optim.schedule.warmup_epochs else ""
    return (
        f"learning rate {optim.full_lr(batch):g}: optim.lr = {optim.lr:g} for {optim.base_batch} samples, and "
        f"batches are of {batch}{begins}"
    )
