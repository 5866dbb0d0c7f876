"""Configurations from files and command lines and back to TOML, and what one key says about another."""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import asdict, replace

from hpctrain.config import AUTO, Compress, Config, Grid, Optim, Schedule, Sync
from hpctrain.errors import ConfigError
from hpctrain.machine import shipped
from hpctrain.toml_errors import Problem, find_problems, report
from hpctrain.toml_text import dumps, lay_over, parse_override, read


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in `path`, with `section.key=value` overrides laid over it.

    An override's value is TOML, or else taken as text; an empty one restores the default. Relative paths in the file
    and in overrides count from the current directory, not from the file, and come out absolute: what `to_toml` writes
    into the run folder then works from anywhere. Raises ConfigError that lists every mistake, each with its line.
    """
    text, table = read(path)
    given = [parse_override(word) for word in overrides]
    for key_path, value in given:
        lay_over(table, key_path, value)
    if isinstance(run := table.setdefault("run", {}), dict):
        run.setdefault("folder", f"runs/{path.stem}")
    problems = find_problems(Config, table)
    if not problems:
        config = msgspec.convert(table, Config)
        problems = list(_contradictions(config))
        if not problems:
            return _absolute(config)
    raise ConfigError(report(path, text, table, [key_path for key_path, _ in given], problems))


def to_toml(config: Config) -> str:
    """`config` with every default written out, as TOML that `load` reads back equal."""
    return dumps(_builtins(config))


def config_hash(config: Config) -> str:
    """16 hex digits of what a run must share with the one whose checkpoint it goes on from.

    That is the network, how samples are treated and in what order and batches they come, and the precision. Left out is
    what may change on the way (a resumed run says what did): how the work is cut and by which backend, where data lies
    (its index names the content), the optimizer's numbers, evaluation, checkpoints, logging, and when to stop.
    """
    table = _builtins(config)
    for path in _MAY_CHANGE:
        section, _, key = path.partition(".")
        if key:
            del table[section][key]
        else:
            del table[section]
    table["model"]["name"] = Path(config.model.name).name
    return hashlib.blake2b(msgspec.json.encode(table, order="sorted"), digest_size=8).hexdigest()


_MAY_CHANGE = (
    "data.train",
    "data.test",
    "data.verify",
    "data.sample",
    "plan",
    "optim",
    "train.backend",
    "train.exact",
    "train.epochs",
    "train.nonfinite",
    "train.eval_every",
    "train.steps",
    "memory",
    "checkpoint",
    "run",
    "sync",
    "compress",
    "debug",
)


def _builtins(config: Config) -> dict[str, Any]:
    dates = (datetime.datetime, datetime.date, datetime.time)  # TOML has them, so `model.options` may
    table: dict[str, Any] = msgspec.to_builtins(config, builtin_types=dates)
    return table


# --- checks that need more than one key ------------------------------------------------------------------------------

_OPTIM_KEYS = {
    "sgd": ("momentum", "nesterov"),
    "adam": ("beta1", "beta2", "eps", "decoupled_decay"),
    "lars": ("momentum", "trust_coefficient"),
    "lamb": ("beta1", "beta2", "eps"),
}

_SYNC_KEYS = {
    "allreduce": (),
    "local": ("replicas", "period"),
    "elastic": ("replicas", "period", "rate"),
    "gossip-pull": ("replicas", "period"),
    "gossip-push": ("replicas", "period"),
    "backup": ("replicas", "spare"),
}

_CODEC_KEYS = {
    "none": (),
    "fp16": ("force",),
    "bf16": ("force",),
    "onebit": ("force",),
    "qsgd": ("force", "bits"),
    "terngrad": ("force",),
    "topk": ("force", "sparsity", "warmup_epochs", "clip"),
    "powersgd": ("force", "rank"),
}

_SCHEDULE_KEYS = {
    "constant": (),
    "step": ("milestones", "gamma"),
    "cosine": ("final_lr",),
    "polynomial": ("power", "final_lr"),
}


def _contradictions(config: Config) -> Iterator[Problem]:
    """Keys that are right alone and wrong together."""
    optim, train, grid = config.optim, config.train, config.plan.grid
    schedule = optim.schedule
    yield from _without_effect(("optim",), optim, Optim(lr=optim.lr), _OPTIM_KEYS, optim.name, "optimizer")
    yield from _without_effect(("optim", "schedule"), schedule, Schedule(), _SCHEDULE_KEYS, schedule.name, "schedule")
    yield from _without_effect(("sync",), config.sync, Sync(), _SYNC_KEYS, config.sync.strategy, "strategy")
    yield from _without_effect(("compress",), config.compress, Compress(), _CODEC_KEYS, config.compress.codec, "codec")
    if optim.name == "sgd" and optim.nesterov and optim.momentum == 0:
        yield Problem(("optim", "nesterov"), "needs momentum; set optim.momentum, for instance 0.9")
    if optim.name == "adam" and optim.decoupled_decay and optim.weight_decay == 0:
        yield Problem(("optim", "decoupled_decay"), "needs a decay; set optim.weight_decay, for instance 0.01")
    if schedule.name == "step" and not schedule.milestones:
        yield Problem(("optim", "schedule", "milestones"), "schedule 'step' needs epochs, for instance [30, 60]")
    if list(schedule.milestones) != sorted(set(schedule.milestones)):
        yield Problem(("optim", "schedule", "milestones"), "expected epochs in ascending order, each once")
    if schedule.warmup_epochs > train.epochs:
        yield Problem(("optim", "schedule", "warmup_epochs"), f"longer than the run; train.epochs is {train.epochs}")
    if schedule.final_lr > (full := optim.full_lr(train.batch)):
        scaled = "" if full == optim.lr else f", scaled to {full:g} by train.batch / optim.base_batch"
        text = f"above optim.lr, which is {optim.lr}{scaled}; rates only fall"
        yield Problem(("optim", "schedule", "final_lr"), text)
    if train.exact and train.backend != "native":
        yield Problem(("train", "exact"), f"has no effect with backend {train.backend!r}; it belongs to native")
    if config.sync.strategy == "backup" and train.nonfinite == "skip":
        yield Problem(("train", "nonfinite"), "cannot skip with sync.strategy 'backup': replicas would no longer agree")
    if (config.debug.delay_rank is None) != (config.debug.delay_seconds == 0):
        yield Problem(("debug", "delay_seconds"), "needs debug.delay_rank, which needs it: give both or none")
    yield from _sums(config)
    if optim.scale_lr == "none" and optim.base_batch != Optim(lr=1).base_batch:
        yield Problem(("optim", "base_batch"), "has no effect without optim.scale_lr = 'linear'")
    if config.run.abort_seconds <= config.run.stall_seconds:
        text = f"not above run.stall_seconds, which is {config.run.stall_seconds}; nobody would learn why the job ends"
        yield Problem(("run", "abort_seconds"), text)
    if train.batch % train.accumulate:
        yield Problem(("train", "accumulate"), f"train.batch ({train.batch}) does not divide into so many equal parts")
    elif isinstance(grid, Grid) and grid.batch > train.part:
        has, remedy = f"train.batch has samples ({train.batch})", "lower the grid or raise the batch"
        if train.accumulate > 1:
            has = f"train.batch / train.accumulate has samples ({train.batch} / {train.accumulate})"
            remedy += ", or accumulate in fewer parts"
        yield Problem(("plan", "grid", "batch"), f"more blocks than {has}; {remedy}")


def _sums(config: Config) -> Iterator[Problem]:
    """What is said of gradient sums that does not go together."""
    optim, strategy, codec = config.optim, config.sync.strategy, config.compress.codec
    sharing = (("optim", "shard"), optim.shard), (("memory", "share_weights"), config.memory.share_weights)
    for path in (path for path, asked in sharing if asked):
        if strategy != "allreduce":
            text = f"needs sync.strategy 'allreduce', not {strategy!r}, where all ranks of a replica change all weights"
            yield Problem(path, f"{text}; set it to false")
        if codec != "none":
            yield Problem(path, f"cannot go with compress.codec {codec!r}, which sums whole gradients; set one of them")
    if codec == "topk" and optim.name != "sgd":
        text = f"'topk' takes over the momentum of optimizer sgd, and optim.name is {optim.name!r}"
        yield Problem(("compress", "codec"), f"{text}; choose sgd or another codec")
    if codec == "topk" and optim.nesterov:
        text = "'topk' takes over the momentum, and knows no other form of it"
        yield Problem(("optim", "nesterov"), f"{text}; set it to false or choose another compress.codec")


def _without_effect(
    path: tuple[str, ...], given: Any, default: Any, keys: Mapping[str, tuple[str, ...]], chosen: str, what: str
) -> Iterator[Problem]:
    """Keys of `given`, differing from `default`, that belong to choices other than the one `chosen`."""
    for key, value in asdict(default).items():
        users = [name for name, used in keys.items() if key in used]
        if users and chosen not in users and getattr(given, key) != value:
            text = f"has no effect with {what} {chosen!r}; it belongs to {' and '.join(users)}"
            yield Problem((*path, key), text)


def _absolute(config: Config) -> Config:
    """`config` with the paths of files absolute."""
    model, data, plan, run = config.model, config.data, config.plan, config.run
    name = str(Path(model.name).absolute()) if re.search(r"\.(py:\w+)$", model.name) else model.name
    test = None if data.test is None else str(Path(data.test).absolute())
    grid = str(Path(plan.grid).absolute()) if isinstance(plan.grid, str) and plan.grid != AUTO else plan.grid
    machine = str(Path(plan.machine).absolute()) if plan.machine and plan.machine not in shipped() else plan.machine
    return replace(
        config,
        model=replace(model, name=name),
        data=replace(data, train=str(Path(data.train).absolute()), test=test),
        plan=replace(plan, grid=grid, machine=machine),
        run=replace(run, folder=str(Path(run.folder).absolute())),
    )
