"""The configuration of a run: frozen structs, filled by `config_file`. Every default is stated here, once."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from msgspec.structs import asdict

from hpctrain.partition import Partition

Name = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]

Allreduce = Literal[
    "ring",
    "segmented_ring",
    "recursive_doubling",
    "halving_doubling",
    "binary_blocks",
    "tree",
    "hierarchical",
    "two_dimensional",
    "shared",
    "mpi",
    "horovod",
    "nccl",
]
"""The names of comm.allreduce.TABLE."""

AUTO = "auto"
"""The plan.grid that the planner finds."""

Axis = Literal["batch", "depth", "height", "width", "channel", "contraction"]
"""Those of partition.AXES."""


class Model(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which network."""

    name: Name
    """A network of the zoo, or `"net.py:build"`: a function in a file that returns a Graph."""
    options: dict[str, Any] = {}
    """Keyword arguments of its builder."""


class Sample(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one sample of data that are elsewhere looks like."""

    shape: tuple[Count, ...]
    """Of x, channels last."""
    classes: Count | None = None
    """y is a label, or one for each of `positions`; or absent, and y is `values` numbers."""
    values: Count = 1
    positions: tuple[Count, ...] = ()
    count: Count
    """How many samples there are."""


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
    sample: Sample | None = None
    """What `hpctrain plan` takes for a sample where the data are not there."""


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
    """One grid for all layers, the path of a plan.json, or "auto": the planner finds how to cut each layer."""
    machine: Name | None = None
    """auto: the machine it is for, by name or file; this one, as calibrated, when absent."""
    objective: Literal["time", "energy", "cost"] = "time"
    """auto: what shall be least of an epoch."""
    fewer: Literal["none", "head", "all"] = "head"
    """auto: which layers may be cut over fewer ranks than there are: none, those from the last pooling or flattening
    on, or all."""
    only: dict[str, tuple[Axis, ...]] = {}
    """auto: by kind of layer, the axes that it may be cut along: { Conv = ["batch", "height"] }; all where absent."""
    allreduce: Allreduce | None = None
    """The algorithm that sums gradients; as a plan file says, or else chosen by size and ranks, when absent."""
    bucket_mib: Positive = 16.0
    """Gradients are summed in pieces of about so many MiB, each as soon as backward has completed it."""
    overlap: bool | None = None
    """Whether backward goes on meanwhile; when absent, only where ranks are on several hosts."""


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

    name: Literal["sgd", "adam", "lars", "lamb"] = "sgd"
    lr: Positive
    scale_lr: Literal["none", "linear"] = "none"
    """linear: `lr` is that of `base_batch` samples, and is multiplied by train.batch / base_batch. Warm-up then begins
    at `lr`; else it begins near 0."""
    base_batch: Count = 256
    """scale_lr = linear."""
    clip_norm: NotNegative = 0.0
    """Gradients whose norm over the whole network is longer are shortened to it; 0 is never."""
    shard: bool = False
    """Each of the ranks that hold a parameter updates a share of it and keeps the optimizer's state of that alone."""
    momentum: Fraction = 0.0
    """sgd, lars."""
    nesterov: bool = False
    """sgd."""
    weight_decay: NotNegative = 0.0
    decoupled_decay: bool = False
    """adam: weights shrink by lr * weight_decay apart from the gradient: AdamW."""
    beta1: Fraction = 0.9
    """adam, lamb: how much of the gradient's running mean stays at each update."""
    beta2: Fraction = 0.999
    """adam, lamb: the same for the mean of its square."""
    eps: Positive = 1e-8
    """adam, lamb: added to the root of the latter."""
    trust_coefficient: Positive = 0.001
    """lars: how long a step of a parameter is beside its norm, at lr = 1 and without momentum."""
    schedule: Schedule = Schedule()

    def full_lr(self, batch: int) -> float:
        """The rate at the end of warm-up for batches of so many samples: Goyal et al. 2017, section 2.1, if linear."""
        return self.lr * batch / self.base_batch if self.scale_lr == "linear" else self.lr


class Train(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long, how large, how exact."""

    epochs: Count
    batch: Count
    """Samples of a step, over all ranks. What does not fill an epoch's last one is left out; evaluation pads it."""
    accumulate: Count = 1
    """The batch is computed in so many equal parts, one after the other, and their gradients added before the update.

    A part's gradient is that of its mean loss over the number of parts: that of the whole batch, where all parts weigh
    the same. Labels that count for nothing and class weights can make them differ, and batch norm has the statistics
    of a part.
    """
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

    @property
    def part(self) -> int:
        """Samples that the network computes at a time."""
        return self.batch // self.accumulate


class Sync(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How replicas of the network keep together: by one sum of gradients in every step, or more loosely."""

    strategy: Literal["allreduce", "local", "elastic", "gossip-pull", "gossip-push", "backup"] = "allreduce"
    replicas: Count | None = None
    """All but allreduce: so many copies of the network, each on a plan of its own; as many as fit when absent."""
    period: Count = 1
    """local, elastic, gossip: steps from one averaging to the next."""
    rate: Positive | None = None
    """elastic: how far a replica and the centre move towards each other; 0.8 / replicas when absent."""
    spare: Whole = 0
    """backup: how many replicas a step does not wait for."""


class Compress(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What gradients are turned into on the way between ranks; what gets lost is added to the next ones."""

    codec: Literal["none", "fp16", "bf16", "onebit", "qsgd", "terngrad", "topk", "powersgd"] = "none"
    bits: Annotated[int, Meta(ge=2, le=8)] = 4
    """qsgd: of each number, its sign included."""
    sparsity: Fraction = 0.999
    """topk: the share of numbers that is not sent."""
    warmup_epochs: NotNegative = 4.0
    """topk: how long until the sparsity is reached, from 0.75."""
    clip: NotNegative = 0.0
    """topk: gradients of a rank are shortened to this norm over the root of the ranks; 0 is never."""
    rank: Count = 2
    """powersgd: of the two factors of each gradient matrix."""
    force: bool = False
    """Compress even where that is slower on this machine."""


class Memory(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is traded for memory."""

    recompute: bool = False
    """Backward computes most of the forward pass a second time instead of keeping what it needs of it."""
    share_weights: bool = False
    """Ranks of one host that hold the same weights keep one copy, of which each updates a share."""


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
    stall_seconds: Positive = 60.0
    """A rank that waits longer for others says what for."""
    abort_seconds: Positive = 600.0
    """A rank that waits longer for others ends the job."""


class Debug(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Checks and trials that cost time."""

    collectives: bool = False
    """Before ranks communicate, they compare what they are about to do."""
    delay_rank: Whole | None = None
    """A rank that sleeps in each step of training: to see what a slow one does to the others."""
    delay_seconds: NotNegative = 0.0
    """For how long."""


class Config(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One run, checked. Fields are the tables of the file."""

    model: Model
    data: Data
    plan: Plan = Plan()
    optim: Optim
    train: Train
    sync: Sync = Sync()
    compress: Compress = Compress()
    memory: Memory = Memory()
    checkpoint: Checkpoint = Checkpoint()
    run: Run
    debug: Debug = Debug()
