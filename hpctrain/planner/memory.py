"""The memory that a rank needs to train by a plan, counted from the boxes that the executor makes its arrays of."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from math import prod

import numpy as np

from hpctrain import optim
from hpctrain.backends.windows import COLUMN_BYTES
from hpctrain.config import Config
from hpctrain.graph import Graph
from hpctrain.layers import (
    GELU,
    AvgPool,
    BatchNorm,
    BCEWithLogits,
    Conv,
    ConvTranspose,
    Dice,
    Dropout,
    GroupNorm,
    Huber,
    Input,
    InstanceNorm,
    LayerNorm,
    Loss,
    Softmax,
    SoftmaxCrossEntropy,
)
from hpctrain.layers.activation import Activation
from hpctrain.layers.dropout import SLAB
from hpctrain.layers.loss import Elementwise
from hpctrain.layers.resample import Resample
from hpctrain.memory import mib
from hpctrain.partition import Box, Shape, extent, volume
from hpctrain.planner.arena import Buffers, EdgeViews, arena_bytes
from hpctrain.planner.buffers import buffers
from hpctrain.planner.layout import Edge, Layout, edges, layouts
from hpctrain.planner.plan import Plan
from hpctrain.planner.schedule import KEEP, LEAN, Economy, schedule, segments_to_try
from hpctrain.planner.weights import Weights, weights
from hpctrain.precision import TYPES, exact
from hpctrain.regions import Share, owners

FLOAT64 = 8
"""Bytes of what is summed or divided in double precision."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. All but `workspace` are exact; Python, MPI and the batch being read come on top."""

    parameters: int
    """Weights and their gradients, sums of the gradients of a batch's parts, and copies of the weights in bf16."""
    optimizer: int
    """What the optimizer keeps per weight, and computes in. Where ranks update shares of several buckets, each of them
    may be an element longer or shorter than what is counted here."""
    statistics: int
    """Running statistics."""
    tensors: int
    """What flows between layers, halos and padding included, and its gradients."""
    messages: int
    """Buffers of what travels between ranks of different hosts and is not contiguous in a tensor."""
    kept: int
    """What layers keep for their gradient besides: winners of max pools, masks, probabilities."""
    workspace: int
    """The largest temporary arrays; an estimate."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(astuple(self))

    def __str__(self) -> str:
        parts = {
            "tensors": self.tensors,
            "weights and gradients": self.parameters,
            "optimizer": self.optimizer,
            "messages": self.messages,
            "kept for gradients": self.kept,
            "workspace": self.workspace,
        }
        said = [f"{what} {mib(n)}" for what, n in parts.items() if n >= 0.01 * self.total]
        return f"{mib(self.total)} ({', '.join(said)})"


def predict(
    graph: Graph,
    plan: Plan,
    ranks: Iterable[int] | None = None,
    precision: str = "float32",
    optimizer_arrays: int = 1,
    backend: str = "native",
    economy: Economy = KEEP,
    accumulate: bool = False,
    hosts: Sequence[int] | None = None,
    shard: bool = False,
    share_weights: bool = False,
) -> dict[int, Memory]:
    """{rank: what it needs to train `graph` by `plan`} for `ranks`, or for all that the plan uses.

    `optimizer_arrays` says how many numbers the optimizer keeps per weight: 1 for momentum, 2 for Adam, 3 for LAMB.
    `graph` is for what is computed at a time: where `accumulate`, that is a part of a batch. `hosts` has a number for
    each rank; None: every rank is on a host of its own, which takes the most memory. `shard` and `share_weights` are
    those of the config; what ranks of a host share is counted with the first of them that has it.
    """
    places, dtype = layouts(graph, plan), TYPES[precision]
    moved, order = edges(graph, plan, places), schedule(graph, places, economy)
    found = {}
    for rank in range(plan.ranks) if ranks is None else ranks:
        arrays = buffers(graph, places, moved, order, economy, rank)
        far = range(plan.ranks) if hosts is None else [r for r, host in enumerate(hosts) if host != hosts[rank]]
        remote = set(far) - {rank}
        held = weights(places, rank, hosts, shard, share_weights)
        found[rank] = _of_rank(places, moved, rank, remote, dtype, arrays, optimizer_arrays, backend, accumulate, held)
    return found


def of_run(
    config: Config, graph: Graph, plan: Plan, ranks: Iterable[int] | None = None, hosts: Sequence[int] | None = None
) -> dict[int, Memory]:
    """`predict` for a run as `config` describes it."""
    train = config.train
    arrays, saving = optim.TABLE[config.optim.name].arrays, economy(config, graph, plan)
    shares = config.optim.shard, config.memory.share_weights
    accumulate = train.accumulate > 1
    return predict(graph, plan, ranks, train.precision, arrays, train.backend, saving, accumulate, hosts, *shares)


def economy(config: Config, graph: Graph, plan: Plan) -> Economy:
    """How a run as `config` describes it saves memory and time.

    Where it recomputes, in the number of segments that leaves rank 0 the smallest arena, as it has the longest blocks.
    """
    if not config.memory.recompute:
        return LEAN
    places, dtype = layouts(graph, plan), TYPES[config.train.precision]
    moved = edges(graph, plan, places)

    def size(segments: int) -> int:
        tried = replace(LEAN, recompute=segments)
        return arena_bytes(buffers(graph, places, moved, schedule(graph, places, tried), tried, 0), dtype)

    return replace(LEAN, recompute=min((0, *segments_to_try(graph)), key=size))


def largest(found: dict[int, Memory]) -> tuple[int, Memory]:
    """(rank, its memory) of the rank that needs most, the first where several do."""
    rank = max(found, key=lambda r: (found[r].total, -r))
    return rank, found[rank]


def _of_rank(
    places: dict[str, Layout],
    moved: Sequence[Edge],
    rank: int,
    far: Collection[int],
    dtype: np.dtype,
    arrays: Buffers,
    optimizer_arrays: int,
    backend: str,
    accumulate: bool,
    held: Weights,
) -> Memory:
    itemsize, full = dtype.itemsize, exact(dtype).itemsize
    running = sum(volume(d.box(rank)) for place in places.values() for d in place.state.values()) * full
    between = [(edge, views) for edge in moved if (views := arrays.edges.get((edge.consumer, edge.slot)))]
    messages = sum(
        _message_elements(edge, rank, far, arrays, v) * edge.kind.dtype(dtype).itemsize for edge, v in between
    )
    kept = workspace = 0
    for place in places.values():
        size = full if isinstance(place.node.layer, Loss) else itemsize
        produced = extent((place.output if place.partial is None else place.partial).box(rank))
        kept += place.node.layer.kept_bytes(size, produced, *(extent(want.box(rank)) for want in place.inputs))
        if not isinstance(place.node.layer, Input):
            workspace = max(workspace, _workspace(place, rank, size, backend))
    gradients = (2 if accumulate else 1) * held.used * full
    copies = held.used * itemsize if itemsize < full else 0
    parameters, state = held.kept * full + gradients + copies, optimizer_arrays * held.updated * full
    return Memory(parameters, state, running, arena_bytes(arrays, dtype), messages, kept, workspace)


def _message_elements(edge: Edge, rank: int, far: Collection[int], found: Buffers, views: EdgeViews) -> int:
    """Elements of the message buffers that `comm.exchange.Exchange` makes for an edge, to and from ranks `far` away."""
    mine = edge.have.box(rank)
    outgoing = [edge.want.shares(r, mine) for r in edge.want.meeting(mine) if r in far]
    incoming = [edge.want.shares(rank, edge.have.box(r)) for r in owners(edge.have, edge.want, rank) if r in far]
    owned, wish = found.found[views.src.buffer].shape, found.found[views.dst.buffer].shape
    elements = sum(_packed(shares, owned) for shares in outgoing)
    elements += sum(_packed(shares, wish, wanted=True) for shares in incoming)
    if views.gradient is not None:  # what arrives is added, so that it never goes straight into the array
        elements += sum(_packed(shares, found.found[views.gradient.buffer].shape, wanted=True) for shares in incoming)
        elements += sum(volume(share.source) for shares in outgoing for share in shares)
    return elements


def _packed(shares: Sequence[Share], array: Shape, wanted: bool = False) -> int:
    """Elements of the buffer between `shares` of an array of these extents and the wire; 0 where it needs none.

    In the array that has what was `wanted`, nothing is reversed.
    """
    if len(shares) == 1 and _contiguous(
        shares[0].source, array, (False,) * len(array) if wanted else shares[0].flipped
    ):
        return 0
    return sum(volume(share.source) for share in shares)


def _contiguous(box: Box, array: Shape, flipped: tuple[bool, ...]) -> bool:
    """Whether NumPy calls a view of these extents into an array contiguous; a dim of 1 never keeps it from that."""
    step = dense = 1
    for n, whole, backwards in zip(reversed(extent(box)), reversed(array), reversed(flipped), strict=True):
        if n != 1:
            if backwards or step != dense:
                return False
            dense *= n
        step *= whole
    return True


def _workspace(place: Layout, rank: int, itemsize: int, backend: str) -> int:
    """Bytes of the temporaries of one layer, as measured: the arrays of NumPy formulas, those in float64 included.

    Compiled kernels have none, but for convolution in float64, which `native` leaves to NumPy.
    """
    layer, x, work = place.node.layer, place.inputs[0].box(rank), place.work.box(rank)
    output = volume(place.output.box(rank))
    inputs = [volume(want.box(rank)) for want in place.inputs]
    compiled, largest = backend == "native", max(output, *inputs)
    match layer:
        case Conv() | ConvTranspose() if compiled and itemsize == 4:  # packed, or by Winograd 36 numbers for 9 taps
            return ENGINE_BYTES + 4 * itemsize * volume(place.weights["weight"].box(rank))
        case Conv() | ConvTranspose():  # unfolded
            taps = prod(layer.weights(*place.node.input_shapes)["weight"].shape[:-2])
            positions, channels = (work[:-2], x[-1:]) if isinstance(layer, Conv) else (x[:-1], work[-2:-1])
            return min(COLUMN_BYTES, taps * volume(positions) * volume(channels) * itemsize) + output * itemsize
        case Dropout():  # random numbers
            return 2 * FLOAT64 * min(output, SLAB)
        case Dice():  # sums in double, of numbers cast by and by
            return CAST_BYTES * (2 if itemsize == FLOAT64 else 3) if compiled else 2 * itemsize * inputs[0]
        case _ if compiled:
            return 0
        case LayerNorm():
            return (3 * FLOAT64 + itemsize) * output
        case BatchNorm() | GroupNorm() | InstanceNorm():
            return 3 * FLOAT64 * output
        case SoftmaxCrossEntropy():  # shifted logits, and seven numbers per position
            return itemsize * inputs[0] + 7 * FLOAT64 * volume(x[:-1])
        case Elementwise():
            return _LOSS_ARRAYS.get(type(layer), 2) * itemsize * inputs[0]
        case Softmax() | Resample():
            return 2 * itemsize * largest
        case AvgPool():
            return itemsize * output
        case GELU():  # the error function goes through Python's floats
            return (8 * FLOAT64 + 2 * itemsize) * output
        case Activation():
            return 4 * itemsize * output
        case _:
            return itemsize * largest


ENGINE_BYTES = 2 * 2**20
"""What the compiled convolution works in: blocks that stay in a core's cache."""

CAST_BYTES = FLOAT64 * 2**13
"""What NumPy casts the numbers of an array in."""

_LOSS_ARRAYS = {BCEWithLogits: 3, Huber: 4}
"""Arrays as large as the predictions that a loss of elements takes, where they are not 2."""
