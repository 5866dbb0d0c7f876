"""The configuration of a run: frozen structs filled from TOML and overrides. Every default is stated here, once."""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import asdict, replace

from hpctrain.errors import ConfigError
from hpctrain.partition import Partition
from hpctrain.toml_errors import Problem, find_problems, report
from hpctrain.toml_text import dumps, lay_over, parse_override, read

Name = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]


class Model(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which network."""

    name: Name
    """A network of the zoo, or `"net.py:build"`: a function in a file that returns a Graph."""
    options: dict[str, Any] = {}
    """Keyword arguments of its builder."""


class Data(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which samples."""

    train: Name
    """Folder of shards to train on."""
    test: Name | None = None
    """Folder of shards to evaluate on."""
    normalize: bool = True
    """Shift and scale inputs by the training set's mean and deviation."""
    verify: bool = False
    """Read all data once at the start, shared among the ranks, and compare its hashes."""


class Grid(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Blocks along each axis of the process grid, the same for every layer. Fields are those of `Partition`."""

    batch: Count = 1
    depth: Count = 1
    height: Count = 1
    width: Count = 1
    channel: Count = 1
    contraction: Count = 1

    @property
    def partition(self) -> Partition:
        """This grid as the noun that the rest of the program uses."""
        return Partition.of(asdict(self))


class Plan(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the work is cut over ranks."""

    grid: Grid | Name = Grid()
    """One grid for all layers, or the path of a plan.json."""
    allreduce: Literal["ring", "mpi"] | None = None
    """How gradients are summed; as a plan file says, or else by ring, when absent."""


class Schedule(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The learning rate over time: a linear warm-up to `optim.lr`, and from there down."""

    name: Literal["constant", "step", "cosine", "polynomial"] = "constant"
    warmup_epochs: NotNegative = 0.0
    milestones: tuple[Count, ...] = ()
    """step: epochs after which the rate is multiplied by gamma."""
    gamma: Annotated[float, Meta(gt=0, le=1)] = 0.1
    power: Positive = 1.0
    """polynomial: exponent."""
    final_lr: NotNegative = 0.0
    """cosine, polynomial: the rate that it falls towards."""


class Optim(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How weights are updated."""

    name: Literal["sgd", "adam", "lars"] = "sgd"
    lr: Positive
    momentum: Fraction = 0.0
    """sgd, lars."""
    nesterov: bool = False
    """sgd."""
    weight_decay: NotNegative = 0.0
    decoupled_decay: bool = False
    """adam: weights shrink by lr * weight_decay apart from the gradient: AdamW."""
    beta1: Fraction = 0.9
    """adam: how much of the gradient's running mean stays at each update."""
    beta2: Fraction = 0.999
    """adam: the same for the mean of its square."""
    eps: Positive = 1e-8
    """adam: added to the root of the latter."""
    trust_coefficient: Positive = 0.001
    """lars: how long a step of a parameter is beside its norm, at lr = 1 and without momentum."""
    schedule: Schedule = Schedule()


class Train(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long, how large, how exact."""

    epochs: Count
    batch: Count
    """Samples of a step, over all ranks. What does not fill an epoch's last one is left out; evaluation pads it."""
    seed: Whole = 0
    precision: Literal["float32", "float64", "bf16"] = "float32"
    """bf16: tensors between layers and the weights that these use; sums, gradients, updates and losses are float32."""
    loss_scale: Positive = 1.0
    """What the loss is multiplied by before backward; gradients are divided by it again before the update."""
    backend: Literal["native", "reference"] = "native"
    exact: bool = False
    """native: never Winograd's convolution, which multiplies less and rounds about 3 times as much."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What a sample or loss that is not finite does: stop the run, or skip its step."""
    steps: Count | None = None
    """Stop after so many steps, whatever `epochs` says."""
    eval_every: Count = 1
    """Epochs between evaluations."""


class Memory(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is traded for memory."""

    recompute: bool = False
    """Backward computes most of the forward pass a second time instead of keeping what it needs of it."""


class Checkpoint(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """When the run is saved besides at its end or stop; 0 is never."""

    every_epochs: Whole = 1
    every_steps: Whole = 0
    keep: Annotated[int, Meta(ge=2)] = 2
    """How many checkpoints are kept: if the newest is damaged, there must be one to fall back to."""


class Run(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is written about the run."""

    folder: Name
    """The run folder; `runs/NAME` for NAME.toml when absent."""
    log_every: Positive = 10.0
    """Seconds between lines of progress where there is no terminal to draw on."""


class Config(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One run, checked. Fields are the tables of the file."""

    model: Model
    data: Data
    plan: Plan = Plan()
    optim: Optim
    train: Train
    memory: Memory = Memory()
    checkpoint: Checkpoint = Checkpoint()
    run: Run


# --- reading and writing ---------------------------------------------------------------------------------------------


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
    yield from _without_effect(("optim",), optim, Optim(lr=optim.lr), _OPTIM_KEYS, "optimizer")
    yield from _without_effect(("optim", "schedule"), schedule, Schedule(), _SCHEDULE_KEYS, "schedule")
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
    if schedule.final_lr > optim.lr:
        yield Problem(("optim", "schedule", "final_lr"), f"above optim.lr, which is {optim.lr}; rates only fall")
    if train.exact and train.backend != "native":
        yield Problem(("train", "exact"), f"has no effect with backend {train.backend!r}; it belongs to native")
    if isinstance(grid, Grid) and grid.batch > train.batch:
        text = f"more blocks than train.batch has samples ({train.batch}); lower the grid or raise the batch"
        yield Problem(("plan", "grid", "batch"), text)


def _without_effect(
    path: tuple[str, ...], given: Any, default: Any, keys: Mapping[str, tuple[str, ...]], what: str
) -> Iterator[Problem]:
    """Keys of `given`, differing from `default`, that belong to choices of `given.name` other than the one made."""
    for key, value in asdict(default).items():
        users = [name for name, used in keys.items() if key in used]
        if users and given.name not in users and getattr(given, key) != value:
            text = f"has no effect with {what} {given.name!r}; it belongs to {' and '.join(users)}"
            yield Problem((*path, key), text)


def _absolute(config: Config) -> Config:
    """`config` with the paths of files absolute."""
    model, data, plan, run = config.model, config.data, config.plan, config.run
    name = str(Path(model.name).absolute()) if re.search(r"\.(py:\w+)$", model.name) else model.name
    test = None if data.test is None else str(Path(data.test).absolute())
    grid = str(Path(plan.grid).absolute()) if isinstance(plan.grid, str) else plan.grid
    return replace(
        config,
        model=replace(model, name=name),
        data=replace(data, train=str(Path(data.train).absolute()), test=test),
        plan=replace(plan, grid=grid),
        run=replace(run, folder=str(Path(run.folder).absolute())),
    )
