"""Plans: files, checks whose messages say what would work, and one grid fitted to all layers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from networks import LAYERS, network, random_plan, sandwich, single, with_partitions

from hpctrain.config import Config, Data, Grid, Model, Optim, Run, Train
from hpctrain.config import Plan as ConfiguredPlan
from hpctrain.errors import PlanError
from hpctrain.graph import Graph
from hpctrain.layers import MSE, Conv, Dense, Flatten, MaxPool
from hpctrain.models import Sample, cosmoflow, lenet, mlp
from hpctrain.partition import AXES, Partition, names
from hpctrain.planner import plan as plans
from hpctrain.planner.layout import edges, layouts, sent_bytes
from hpctrain.planner.plan import Plan, extents, uniform
from hpctrain.planner.replicas import replica_groups
from hpctrain.prepare import make_plan


def digits(batch: int = 8) -> Graph:
    """LeNet as the digits are trained with it."""
    return lenet.build(batch, Sample((28, 28, 1), classes=10))


# --- files --------------------------------------------------------------------------------------------------------


def test_plan_is_the_same_after_json(seed: int, tmp_path: Path) -> None:
    rng, net = np.random.default_rng(seed), digits()
    for number in range(20):
        plan = random_plan(rng, net, 6)
        path = tmp_path / f"{number}.json"
        path.write_text(plan.to_json())
        assert plans.load(path) == Plan.from_json(plan.to_json(), "here") == plan
        assert plans.load(path).allreduce == plan.allreduce


def test_plan_file_is_for_people() -> None:
    text = Plan({"conv1": Partition(batch=2, height=2), "fc": Partition()}, "mpi").to_json()
    layers = {"conv1": {"batch": 2, "height": 2}, "fc": {}}
    assert json.loads(text) == {"version": 1, "allreduce": "mpi", "layers": layers}
    assert text.endswith("}\n")
    assert '\n    "conv1": {\n' in text


def test_plan_names_algorithms_for_all_groups_for_each_or_for_none() -> None:
    cuts = {"conv1": Partition(batch=2, height=2), "fc": Partition(batch=2, channel=2)}
    conv, dense = (cuts["conv1"], ("batch", "height")), (cuts["fc"], ("batch",))
    for_all, none = Plan(cuts, "tree"), Plan(cuts)
    each = for_all.with_choices({conv: "shared", dense: "ring"})
    assert each.allreduce == {"batch=2 x height=2: batch, height": "shared", "batch=2 x channel=2: batch": "ring"}
    assert [plan.algorithm(conv) for plan in (for_all, none, each)] == ["tree", None, "shared"]
    assert each.algorithm((cuts["fc"], ("channel",))) is None
    for plan in (for_all, none, each):
        assert Plan.from_json(plan.to_json(), "here") == plan
        assert json.loads(plan.to_json())["allreduce"] == plan.allreduce
    without = {key: value for key, value in json.loads(none.to_json()).items() if key != "allreduce"}
    assert Plan.from_json(json.dumps(without), "here") == none


def test_replica_groups_by_hand() -> None:
    """LeNet on 28 x 28: two convolutions on batch x height, three dense layers cut by channel, whose bias is too."""
    net, grid, dense = digits(), Partition(batch=2, height=2), Partition(batch=2, channel=2)
    found = replica_groups(net, uniform(net, grid), np.dtype(np.float32))
    convolutions = 5 * 5 * 1 * 6 + 6 + 5 * 5 * 6 * 16 + 16
    # a layer's units are cut in two: 60 of 120, 42 of 84, 5 of 10
    rest = (400 + 1) * 60 + (120 + 1) * 42 + (84 + 1) * 5
    assert found == {(grid, ("batch", "height")): 4 * convolutions, (dense, ("batch",)): 4 * rest}
    assert replica_groups(net, uniform(net, Partition()), np.dtype(np.float32)) == {}


def config(grid: Grid | str, allreduce: str | None = None) -> Config:
    """That of a run."""
    train, plan = Train(epochs=1, batch=8), ConfiguredPlan(grid=grid, allreduce=allreduce)
    return Config(
        model=Model(name="lenet"), data=Data(train="x"), plan=plan, optim=Optim(lr=1), train=train, run=Run(folder="x")
    )


def test_resumed_run_keeps_the_algorithms_that_were_chosen(tmp_path: Path) -> None:
    net = digits()
    both = config(Grid(batch=2))
    first = make_plan(both, net, tmp_path)
    assert first.allreduce is None
    ((group, _),) = replica_groups(net, first, np.dtype(np.float32)).items()
    (tmp_path / "plan.json").write_text(first.with_choices({group: "tree"}).to_json())
    assert make_plan(both, net, tmp_path).algorithm(group) == "tree"
    assert make_plan(both, net, tmp_path).resumed
    assert make_plan(both, net).allreduce is None
    assert make_plan(config(Grid(batch=4)), net, tmp_path).allreduce is None, "other partitions, other groups"
    assert make_plan(config(Grid(batch=2), "mpi"), net, tmp_path).allreduce == "mpi"


def test_algorithm_for_ranks_that_are_no_group_is_refused(tmp_path: Path) -> None:
    net, path = digits(), tmp_path / "plan.json"
    plan = uniform(net, Partition(batch=2))
    path.write_text(replace(plan, allreduce={"batch=2: bath": "ring"}).to_json())
    with pytest.raises(
        PlanError, match=r"plan.json: allreduce of 'batch=2: bath': no such group .* one of batch=2: batch$"
    ):
        make_plan(config(str(path)), net)
    path.write_text(replace(plan, allreduce={"batch=2: batch": "ring"}).to_json())
    assert make_plan(config(str(path)), net).allreduce == {"batch=2: batch": "ring"}


GOOD = {"version": 1, "allreduce": "ring", "layers": {"conv1": {"batch": 2}}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a plan"),
        ("{", "not a plan"),
        ("[]", "not a plan"),
        ("7", "not a plan"),
        ('{"version": 1}', "not a plan.*layers"),
        (json.dumps(GOOD | {"layers": [1]}), "not a plan"),
        (json.dumps(GOOD | {"layers": {"conv1": [2]}}), "(conv1|not a plan)"),
        (json.dumps(GOOD | {"layers": {"conv1": 2}}), "(conv1|not a plan)"),
        (json.dumps(GOOD | {"version": 2}), "plan version 2, this program reads 1; make the plan again"),
        (json.dumps(GOOD | {"layers": {"conv1": {"heigth": 2}}}), "conv1.*no axis 'heigth'; the axes are batch, depth"),
        (json.dumps(GOOD | {"layers": {"conv1": {"batch": 0}}}), "conv1.*batch = 0; give a whole number of blocks"),
        (json.dumps(GOOD | {"layers": {"conv1": {"batch": -2}}}), "conv1.*batch = -2; give a whole number"),
        (json.dumps(GOOD | {"layers": {"conv1": {"batch": 2.0}}}), "conv1.*batch = 2.0; give a whole number"),
        (json.dumps(GOOD | {"layers": {"conv1": {"batch": "2"}}}), "conv1.*batch = '2'; give a whole number"),
        ("[" * 100_000, "not a plan"),
        (json.dumps(GOOD | {"allreduce": {"x": "fast"}}), "allreduce of x = 'fast'; choose one of ring, .*nccl"),
        (json.dumps(GOOD | {"allreduce": {"x": 1}}), "not a plan"),
        (json.dumps(GOOD | {"allreduce": "fast"}), "allreduce = 'fast'; choose one of ring, .*mpi"),
    ],
    ids=lambda value: value[:70],
)  # fmt: skip
def test_bad_plan_file_names_file_layer_and_remedy(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=rf"^my/plan.json: .*{message}") as caught:
        Plan.from_json(text, "my/plan.json")
    assert len(str(caught.value)) < 500


def test_plan_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"missing.json: cannot be read"):
        plans.load(tmp_path / "missing.json")
    with pytest.raises(PlanError, match="cannot be read"):
        plans.load(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"binary.json: cannot be read"):
        plans.load(tmp_path / "binary.json")


# --- checks -------------------------------------------------------------------------------------------------------


def test_a_plan_must_be_for_this_network() -> None:
    net = network("dense")
    good = single(net).partitions
    Plan(good).check(net)
    with pytest.raises(PlanError, match=r'^no partition for layer pre; add "pre": \{\} \(one rank\)$'):
        Plan({name: p for name, p in good.items() if name != "pre"}).check(net)
    with pytest.raises(PlanError, match=r"^no partition for layer pre nor 2 others; add "):
        Plan({name: good[name] for name in ("x", "y")}).check(net)
    with pytest.raises(PlanError, match=r"^no layer conv9 in this network of 5 layers; remove it from the plan$"):
        Plan(good | {"conv9": Partition()}).check(net)
    renamed = {"lyer" if name == "layer" else name: partition for name, partition in good.items()}
    with pytest.raises(PlanError, match=r"^no layer lyer in this network of 5 layers; did you mean layer\?$"):
        Plan(renamed).check(net)


@pytest.mark.parametrize("case", LAYERS)
def test_an_axis_that_cuts_nothing_of_a_layer_is_refused(case: str) -> None:
    """Else its ranks would do the same work, and gradients would count twice."""
    net = network(case)
    for node in net:
        work = layouts(net, single(net))[node.name].work
        able = [axis for axis in AXES if any(axis in names(entry) for entry in work.axes)]
        for axis in AXES:
            plan = with_partitions(net, {node.name: Partition.of({axis: 2})})
            if axis in able:
                plan.check(net)
                continue
            with pytest.raises(PlanError) as caught:
                plan.check(net)
            assert f"layer {node.name}: {axis}=2 cuts nothing of it" in str(caught.value)
            assert f"it can be cut along {', '.join(able)}" in str(caught.value)


def test_empty_blocks_are_refused_unless_the_plan_insists() -> None:
    net = Graph()
    x = net.input("x", (2, 7, 5, 3))
    x = net.add("conv1", Conv(4, kernel=3), x)
    x = net.add("flat", Flatten(), x)
    net.add("loss", MSE(), x, net.input("y", net[x].shape))
    with pytest.raises(PlanError) as caught:
        with_partitions(net, {"conv1": Partition(batch=2, height=6)}, empty_blocks=False).check(net)
    assert str(caught.value) == (
        "layer conv1 (Conv, output 2 x 5 x 3 x 4): height=6 cuts 5 elements into 6 blocks, some of them empty; at most "
        'height=5, or write "empty_blocks": true into the plan if idle ranks are meant'
    )
    with pytest.raises(PlanError, match=r"height=8, channel=9 cuts 60 elements into 72 .* at most 60 blocks along "):
        with_partitions(net, {"flat": Partition(height=8, channel=9)}, empty_blocks=False).check(net)
    insisting = with_partitions(net, {"conv1": Partition(batch=2, height=6)})
    insisting.check(net)
    assert Plan.from_json(insisting.to_json(), "plan.json") == insisting
    assert json.loads(insisting.to_json())["empty_blocks"] is True


def test_most_blocks_of_a_layer() -> None:
    net = cosmoflow.build(5, Sample((9, 7, 11, 2), values=3), filters=3, hidden=7)
    assert extents(net["x"]) == {"batch": 5, "depth": 9, "height": 7, "width": 11, "channel": 2}
    assert extents(net["conv1"]) == {**extents(net["x"]), "channel": 3, "contraction": 2}
    assert extents(net["pool1"]) == {"batch": 5, "depth": 4, "height": 3, "width": 5, "channel": 3}
    assert extents(net["fc1"]) == {"batch": 5, "channel": 7, "contraction": 180}
    assert extents(net["loss"]) == {"batch": 5, "channel": 3}
    # flat elements are dealt to all that cut the tensor before
    flat = {"batch": 5, "depth": 180, "height": 180, "width": 180, "channel": 180}
    assert extents(net["flatten"]) == flat


# --- one grid for all layers --------------------------------------------------------------------------------------


def test_grid_goes_unchanged_to_layers_that_can_take_it() -> None:
    net, grid = digits(), Partition(batch=2)
    plan = uniform(net, grid, "mpi")
    assert plan == Plan(dict.fromkeys(net.nodes, grid), "mpi")
    assert (plan.ranks, plan.notes) == (2, ())


def test_dense_layers_take_positions_as_channels_and_the_loss_as_samples() -> None:
    net, grid = digits(), Partition(batch=2, height=2)
    plan = uniform(net, grid)
    images = ["x", "conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "flatten"]
    dense = ["fc1", "relu3", "fc2", "relu4", "fc3"]
    expected = dict.fromkeys(images, grid) | dict.fromkeys(dense, Partition(batch=2, channel=2))
    assert plan.partitions == expected | dict.fromkeys(["y", "loss"], Partition(batch=4))
    assert plan.ranks == 4
    assert len(plan.notes) == 2
    assert (
        "batch=2 x height=2 -> batch=2 x channel=2 for fc1, relu3, fc2, relu4, fc3: no height, so channel"
        in plan.notes[0]
    )
    assert "batch=2 x height=2 -> batch=4 for loss, y: no height, so batch" in plan.notes[1].replace(
        "y, loss", "loss, y"
    )
    plan.check(net)


def test_small_layers_get_fewer_blocks_and_the_notes_say_so() -> None:
    net = lenet.build(3, Sample((13, 13, 1), classes=2))
    plan = uniform(net, Partition(height=4))
    # 13 -> 6 -> 2 -> 1 rows; two logits; three samples
    assert plan.partitions["conv1"] == plan.partitions["pool1"] == Partition(height=4)
    assert plan.partitions["conv2"] == Partition(height=2)
    assert plan.partitions["pool2"] == Partition()
    assert plan.partitions["fc3"] == Partition(channel=2)
    assert plan.partitions["loss"] == Partition(batch=3)
    notes = "\n".join(plan.notes)
    assert "height=4 -> height=2 for conv2, relu2: height has only 2" in notes
    assert "height=4 -> 1 rank for pool2: height has only 1" in notes
    assert "channel has only 2" in notes
    assert "batch has only 3" in notes


def test_no_layer_gets_an_empty_block(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nets = [
        lenet.build(5, Sample((13, 15, 1), classes=3)),
        cosmoflow.build(2, Sample((9, 7, 11, 2), values=3), filters=3, hidden=7),
        mlp.build(3, Sample((7, 5), classes=2)),
    ]
    for _ in range(60):
        net = nets[rng.integers(3)]
        axes = sorted({axis for node in net for axis in extents(node)}, key=AXES.index)
        grid = Partition.of({axis: int(rng.integers(1, 6)) for axis in rng.permutation(axes)[:3].tolist()})
        plan = uniform(net, grid)
        plan.check(net)
        assert plan.ranks <= grid.size
        for node in net:
            assert all(n <= extents(node)[axis] for axis, n in plan.partitions[node.name].parts().items())
        unchanged = all(partition == grid for partition in plan.partitions.values())
        assert bool(plan.notes) != unchanged


def test_every_change_is_told_with_the_layers_it_concerns(seed: int) -> None:
    net, grid = digits(3), Partition(batch=4, width=2, contraction=2)
    plan = uniform(net, grid)
    for name, partition in plan.partitions.items():
        told = [note for note in plan.notes if f"{grid} -> {partition} for " in note]
        assert bool(told) == (partition != grid), name
        few = [note for note in told if " layers, " not in note]
        listed = any(name in note.split(" for ")[1].split(":")[0].split(", ") for note in few)
        assert partition == grid or listed or len(few) < len(told), name


def test_many_layers_are_told_by_number_and_by_the_first_and_last() -> None:
    net = digits()
    (note,) = uniform(net, Partition(height=29)).notes[:1]
    assert note == "height=29 -> height=28 for x, conv1, relu1: height has only 28"
    volumes = cosmoflow.build(2, Sample((9, 9, 9, 2), values=3), filters=3, hidden=7)
    notes = uniform(volumes, Partition(batch=3)).notes
    assert notes == (f"batch=3 -> batch=2 for {len(volumes.nodes)} layers, x to loss: batch has only 2",)


def test_planning_loads_no_mpi() -> None:
    code = "import sys, hpctrain.planner.plan, hpctrain.planner.memory\nprint('mpi4py.MPI' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_grid_along_an_axis_that_no_layer_has_is_refused() -> None:
    with pytest.raises(
        PlanError, match=r"no layer can be cut along depth \(= 2\); this network has batch, height, width"
    ):
        uniform(digits(), Partition(depth=2))
    vectors = mlp.build(5, Sample((7,), classes=3))
    with pytest.raises(PlanError, match=r"along height \(= 3\); this network has batch, channel, contraction"):
        uniform(vectors, Partition(height=3))


# --- prices -------------------------------------------------------------------------------------------------------


def test_bytes_of_a_halo_by_hand() -> None:
    """Two ranks, 8 rows each, kernel 3: one row of 2 x 5 x 3 elements each way, forward and backward."""
    net = sandwich((2, 16, 5, 3), MaxPool(3, stride=1, padding=1))
    plan = with_partitions(net, {}, other=Partition(height=2))
    found = {(edge.consumer, edge.slot): sent_bytes(edge, 0, np.dtype(np.float32)) for edge in edges(net, plan)}
    assert found["pre", 0] == (0, 0)
    assert found["layer", 0] == (2 * 5 * 3 * 4, 2 * 5 * 3 * 4)


@pytest.mark.parametrize(("pr", "pc"), [(2, 3), (3, 2), (4, 1), (1, 4)])
def test_bytes_of_dense_layers_are_those_of_the_15d_algorithm(pr: int, pc: int) -> None:
    """Gholami et al. 2018, equation 8: a rank gathers B (Pr - 1) / Pr * d / Pc elements of a layer's input of d units.

    Backward each rank needs only its own block of the sum: a reduce-scatter of as many, half of the paper's all-reduce.
    """
    batch, units = 12, 24
    net = mlp.build(batch, Sample((10,), classes=5), hidden=(units, units))
    plan = with_partitions(net, {}, other=Partition(batch=pc, channel=pr))
    found = {(edge.consumer, edge.slot): edge for edge in edges(net, plan)}
    gathered = batch * (pr - 1) * units // (pr * pc)
    for rank in range(pr * pc):
        assert sent_bytes(found["fc2", 0], rank, np.dtype(np.float32)) == (4 * gathered, 4 * gathered)
        assert sent_bytes(found["relu2", 0], rank, np.dtype(np.float32)) == (0, 0)


def test_bytes_of_a_split_contraction_by_hand() -> None:
    """Dense of 6 to 4, contraction 2, float64: half of (5, 4) sums goes over, and half of the gradient comes back."""
    net = sandwich((5, 6), Dense(4))
    cut = Partition(contraction=2)
    plan = with_partitions(net, {"pre": Partition(channel=2), "layer": cut})
    found = {(edge.consumer, edge.slot): edge for edge in edges(net, plan)}
    for rank in (0, 1):
        assert sent_bytes(found["layer", None], rank, np.dtype(np.float64)) == (5 * 2 * 8, 5 * 2 * 8)
        assert sent_bytes(found["layer", 0], rank, np.dtype(np.float64)) == (0, 0), (
            "cut channels of the layer before are those wanted"
        )


def test_bytes_of_labels_are_8_each_whatever_the_precision() -> None:
    net = lenet.build(4, Sample((12, 12, 1), classes=3))
    plan = with_partitions(net, {"loss": Partition(batch=4)})
    labels = next(edge for edge in edges(net, plan) if (edge.consumer, edge.slot) == ("loss", 1))
    assert [sent_bytes(labels, rank, np.dtype(np.float32)) for rank in range(4)] == [(3 * 8, 0), (0, 0), (0, 0), (0, 0)]
