"""What is planned, on which machine, from which data: choices, and messages that say what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import launching
import msgspec
import pytest

from hpctrain import config_file, machine, planning, prepare
from hpctrain.config import Config
from hpctrain.data.dataset import Dataset
from hpctrain.data.make.digits import make_digits
from hpctrain.errors import BackendUnavailable, ConfigError, DataError
from hpctrain.machine import Compute, Level, Machine, Power
from hpctrain.memory import Room
from hpctrain.partition import Partition
from hpctrain.planner.plan import Plan, uniform
from hpctrain.planner.scaling import Scaling, Step, how_many
from hpctrain.planner.seconds import LayerCost, PlanCost
from hpctrain.prepare import Described
from hpctrain.report import layers, plot, totals
from hpctrain.report import scaling as scalings

CONFIG = """\
[model]
name = "lenet"
[data]
train = "{data}"
{sample}
[optim]
lr = 0.1
momentum = 0.9
[train]
epochs = 1
batch = 20
"""

DIGITS = "sample = {shape = [28, 28, 1], classes = 10, count = 1438}"

FIGURES = Machine(
    name="toy",
    node=Level(1e-6, 1e-10, 1e-11),
    network=Level(5e-6, 1e-9, 1e-11),
    per_host=2,
    hosts=4,
    compute=Compute(1e10, 1e10),
    memory=2.0**30,
    power=Power(50.0, 200.0),
    date="2026-01-02",
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with digits in train/."""
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder)
    return folder


def config(folder: Path, data: Path | str, sample: str = "", *overrides: str) -> Config:
    """A config for LeNet, written into `folder`."""
    path = folder / "net.toml"
    path.write_text(CONFIG.format(data=data, sample=sample))
    return config_file.load(path, overrides)


def written(path: Path, found: Machine) -> Path:
    """A machine's file."""
    path.write_bytes(machine.encode(found))
    return path


# --- which machine ---------------------------------------------------------------------------------------------------


def test_this_machine_is_taken_where_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = written(tmp_path / "own.json", FIGURES)
    other = written(tmp_path / "other.json", Machine(name="other", compute=Compute(1.0, 1.0)))
    monkeypatch.setenv("HPCTRAIN_MACHINE", str(own))
    plain = config(tmp_path, "nowhere", DIGITS)
    found = planning.choose_machine(plain)
    assert (found.machine, found.name, found.here, found.most_ranks) == (FIGURES, "toy", True, 8)
    assert "2026-01-02" in str(found)
    assert planning.choose_machine(plain, str(own)).here
    named = config(tmp_path, "nowhere", DIGITS, f"plan.machine={other}")
    found = planning.choose_machine(named)
    assert (found.name, found.here, found.most_ranks) == ("other", False, None)
    assert planning.choose_machine(named, "cori-knl").machine == machine.named(
        "cori-knl"
    )  # the command line goes first


def test_unmeasured_machine_is_one_message_with_both_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCTRAIN_MACHINE", str(tmp_path / "none.json"))
    with pytest.raises(ConfigError) as error:
        planning.choose_machine(config(tmp_path, "nowhere", DIGITS), None, "a run.toml")
    text = str(error.value)
    assert f"no {tmp_path}/none.json" in text
    assert "--machine" in text
    assert "cori-knl" in text
    assert text.splitlines()[-1].endswith(" calibrate 'a run.toml'")


def test_machine_that_was_measured_for_sums_only_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `hpctrain calibrate` without a config leaves it."""
    path = written(tmp_path / "sums.json", Machine(library="MPI", node=FIGURES.node))
    monkeypatch.setenv("HPCTRAIN_MACHINE", str(path))
    for named in (None, str(path)):
        with pytest.raises(ConfigError, match=r"sums\.json: it does not say how fast a rank computes") as error:
            planning.choose_machine(config(tmp_path, "nowhere", DIGITS), named)
        assert "calibrate CONFIG.toml" in str(error.value)


@pytest.mark.parametrize("text", ["{}", "{", '{"version": 99}', '{"version": 2, "compute": {"flops": -1}}', "[]"])
def test_bad_machine_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.json") as error:
        planning.choose_machine(config(tmp_path, "nowhere", DIGITS), str(path))
    assert "calibrate" in str(error.value)


def test_unknown_machine_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"machine 'summit'.*cori-knl.*perlmutter"):
        planning.choose_machine(config(tmp_path, "nowhere", DIGITS), "summit")


# --- what is planned -------------------------------------------------------------------------------------------------


def test_network_without_the_data(tmp_path: Path, digits: Path) -> None:
    """The same as with them."""
    there = config(tmp_path, digits / "train", DIGITS)
    away = config(tmp_path, "nowhere", DIGITS)
    data = prepare.known_data(there)
    said = prepare.known_data(away)
    assert isinstance(data, Dataset)
    assert isinstance(said, Described)
    graphs = [prepare.build_graph(c, d) for c, d in ((there, data), (away, said))]
    assert list(graphs[0]) == list(graphs[1])
    assert (said.samples, said.folder.name) == (1438, "nowhere")


@pytest.mark.parametrize(
    ("sample", "y_shape", "classes"),
    [
        ("{shape = [8, 8, 1], classes = 3, count = 5}", (), 3),
        ("{shape = [8, 8, 1], classes = 3, positions = [8, 8], count = 5}", (8, 8), 3),
        ("{shape = [8, 8, 8, 2], values = 4, count = 5}", (4,), None),
        ("{shape = [8, 8, 8, 2], count = 5}", (1,), None),
    ],
)
def test_what_a_sample_is_said_to_be(
    sample: str, y_shape: tuple[int, ...], classes: int | None, tmp_path: Path
) -> None:
    said = prepare.described(config(tmp_path, "nowhere", f"sample = {sample}"))
    assert said is not None
    assert (said.y_shape, said.classes) == (y_shape, classes)


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        ("{shape = [8, 8, 1], classes = 3, values = 4, count = 5}", "values = 4 has no effect beside classes"),
        ("{shape = [8, 8, 1], positions = [8, 8], count = 5}", "data.sample.classes"),
    ],
)
def test_sample_that_says_two_things(sample: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        prepare.described(config(tmp_path, "nowhere", f"sample = {sample}"))


def test_missing_data_without_a_sample(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder.*data\.sample = \{shape = "):
        prepare.known_data(config(tmp_path, "nowhere"))


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        ("{shape = [28, 28, 1], classes = 10, count = 9}", r"samples 1438, but data\.sample says 9"),
        ("{shape = [28, 29, 1], classes = 10, count = 1438}", r"x_shape \(28, 28, 1\), but data\.sample says \(28, 29"),
        ("{shape = [28, 28, 1], values = 10, count = 1438}", r"y_shape \(\), but data\.sample says \(10,\)"),
    ],
)
def test_data_that_are_there_must_be_as_said(sample: str, says: str, tmp_path: Path, digits: Path) -> None:
    """In training too."""
    found = config(tmp_path, digits / "train", f"sample = {sample}")
    for read in (prepare.known_data, prepare.open_datasets):
        with pytest.raises(DataError, match=says):
            read(found)


def test_sample_is_no_part_of_what_a_resumed_run_must_share(tmp_path: Path) -> None:
    plain, said = config(tmp_path, "nowhere"), config(tmp_path, "nowhere", DIGITS)
    assert plain != said
    assert config_file.config_hash(plain) == config_file.config_hash(said)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """The file of a machine."""
    return written(tmp_path / "toy.json", FIGURES)


def test_steps_of_an_epoch_are_whole(tmp_path: Path, toy: Path) -> None:
    task = planning.task(config(tmp_path, "nowhere", DIGITS), str(toy))
    assert (task.steps, task.batch) == (71, 20)
    task = planning.task(config(tmp_path, "nowhere", DIGITS, "train.batch=1440"), str(toy))
    with pytest.raises(ConfigError, match=r"train\.batch = 1440, but .*nowhere has only 1438 samples.*smaller batch"):
        _ = task.steps


def test_memory_is_the_machines_unless_given(tmp_path: Path, toy: Path) -> None:
    found = config(tmp_path, "nowhere", DIGITS)
    assert planning.task(found, str(toy)).memory_limit == 2**30
    assert planning.task(found, str(toy), 0.5).memory_limit == 2**29
    assert planning.task(found, str(toy), 0.5).limit(4) == 2**29
    task = planning.task(found, str(toy))
    plan = uniform(task.graph, Partition(batch=2, height=2))
    assert task.memory(plan, 4).total < task.memory(uniform(task.graph, Partition()), 1).total < 2**30


def test_memory_of_this_host_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its file does not say what a rank has: the toy has 2 ranks on a host."""
    monkeypatch.setattr(planning, "host_room", lambda: Room(600, "the test"))
    own = written(tmp_path / "own.json", msgspec.structs.replace(FIGURES, memory=None))
    monkeypatch.setenv("HPCTRAIN_MACHINE", str(own))
    task = planning.task(config(tmp_path, "nowhere", DIGITS))
    assert [task.limit(ranks) for ranks in (1, 2, 8)] == [600, 300, 300]
    away = written(tmp_path / "away.json", msgspec.structs.replace(FIGURES, memory=None))
    assert planning.task(config(tmp_path, "nowhere", DIGITS), str(away)).limit(2) is None


def test_run_that_recomputes_is_planned_as_such(tmp_path: Path, toy: Path) -> None:
    assert planning.task(config(tmp_path, "nowhere", DIGITS), str(toy)).setting.economy.recompute == 0
    deep = ["model.name=mlp", "model.options={hidden=[64, 64, 64, 64, 64, 64]}", "memory.recompute=true"]
    assert planning.task(config(tmp_path, "nowhere", DIGITS, *deep), str(toy)).setting.economy.recompute > 1


def test_where_times_of_layers_are_from(tmp_path: Path, toy: Path) -> None:
    task = planning.task(config(tmp_path, "nowhere", DIGITS), str(toy))
    sources = task.sources(uniform(task.graph, Partition(batch=2)), 2)
    assert sources["conv1"] == "formula"
    assert "x" not in sources


def test_loosely_coupled_replicas_are_refused(tmp_path: Path, toy: Path) -> None:
    elastic = config(tmp_path, "nowhere", DIGITS, "sync.strategy=elastic", "sync.replicas=2")
    with pytest.raises(ConfigError, match=r"sync\.strategy = 'elastic'.*sync\.strategy=allreduce"):
        planning.task(elastic, str(toy))


# --- tables ----------------------------------------------------------------------------------------------------------


def layer(name: str, parts: dict[str, int], compute: float = 1e-3, kind: str = "Conv") -> LayerCost:
    """With halo 2, redistribution 3, statistics 4 and allreduce 5 times as much, forward and backward alike."""
    times = [compute / 2 * n for n in (1, 1, 2, 2, 3, 3)]
    return LayerCost(name, kind, Partition.of(parts), *times, 4 * compute, 5 * compute, int(compute * 2**30), 8)


def widest(text: list[str]) -> int:
    """Columns of the longest line; an entry may hold several."""
    return max(len(line) for entry in text for line in entry.splitlines())


def test_every_layer_has_a_line_and_sums_are_right() -> None:
    cost = PlanCost(
        (layer("x", {}, 0.0, "Input"), layer("a", {"batch": 2}), layer("b", {"height": 2}, 2e-3)), 2, parts=3
    )
    text = list(layers.table(cost))
    assert text[0].split() == ["layers", "blocks", "compute", "halo", "redistr.", "allreduce", "MiB"]
    assert text[1].split() == ["a", "b2", "3.00", "6.00", "21.0", "5.00", "1.02"]
    assert text[2].split() == ["b", "h2", "6.00", "12.0", "42.0", "10.0", "2.05"]
    assert text[3].split() == ["all", "9.00", "18.0", "63.0", "15.0"]
    assert "Times in ms" in text[4]
    assert "b batch, h height" in " ".join(" ".join(text[4:]).split())
    records = layers.records(cost, 10, {"a": "measured"})
    assert [r["layer"] for r in records] == ["x", "a", "b"]
    assert records[1]["compute_seconds"] == pytest.approx(0.03)
    assert records[1]["redistribution_seconds"] == pytest.approx(0.21)
    assert records[1]["allreduce_seconds"] == pytest.approx(0.05)
    assert (records[1]["source"], records[1]["pc"], records[2]["pr"]) == ("measured", 2, 2)


def network(cut: Callable[[int, int, int], int]) -> list[LayerCost]:
    """4 stages of 5 blocks of 9 layers and two more; `cut` gives blocks along the batch, of stage, block and layer."""
    found = [
        layer(f"stage{i}.{j}.a_layer_of_long_name{k}", {"batch": cut(i, j, k)})
        for i in range(4)
        for j in range(5)
        for k in range(9)
    ]
    return [layer("first", {"batch": 4}), *found, layer("last", {"batch": 4})]


@pytest.mark.parametrize(
    ("cut", "count", "name", "blocks"),
    [
        (lambda i, j, k: 4, 6, "stage0.0.a_layer_of_long_name0 +44", "b4"),
        (lambda i, j, k: 4 if j < 2 else 2, 10, "stage0.0.a_layer_of_long_name0 +17", "b4"),
        (lambda i, j, k: 2 if k == 0 else 4, 38, "stage0.0.a_layer_of_long_name0 x5", "b2"),
        (lambda i, j, k: 2 if k % 4 == 0 else 4, 38, "stage0.0.a_layer_of_long_name0 x5", "b2"),
        (lambda i, j, k: 2 if (j + k) % 5 == 0 else 4, 6, "stage0.0.a_layer_of_long_name0 +44", "b4 .."),
    ],
    ids=["alike", "two halves", "one layer", "some layers", "no order"],
)
def test_many_layers_share_lines_that_add_up(
    cut: Callable[[int, int, int], int], count: int, name: str, blocks: str
) -> None:
    found = network(cut)
    rows = layers.lines(PlanCost(tuple(found), 4))
    assert (len(rows), rows[1].name, rows[1].blocks) == (count, name, blocks)
    assert sorted(layer.name for row in rows for layer in row.layers) == sorted(layer.name for layer in found)
    assert sum(row.figures(1)[0] for row in rows) == pytest.approx(0.182)
    assert len(layers.lines(PlanCost(tuple(found), 4), every=True)) == 182
    text = list(layers.table(PlanCost(tuple(found), 4)))
    assert widest(text) <= 79
    legend = " ".join(text[-1].split())
    assert ("xN: in N blocks alike" in legend) == (" x" in name)
    assert ("+N: with the N layers after it" in legend) == (" +" in name)
    assert (".. : and others" in legend) == blocks.endswith("..")


def test_layers_without_time_of_their_own_go_with_the_one_before() -> None:
    found = [
        layer(name, {"batch": 4}, compute) for i in range(30) for name, compute in ((f"c{i}", 1.0), (f"r{i}", 0.0))
    ]
    rows = layers.lines(PlanCost(tuple(found), 4))
    assert [row.name for row in rows] == [f"c{i} +1" for i in range(30)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (0.00123, "0.001"), (0.9994, "0.999"), (0.99951, "1.00"), (9.994, "9.99"), (9.996, "10.0")),
        *((99.94, "99.9"), (99.96, "100"), (12345.6, "12,346")),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert layers.number(value) == text


def test_plan_beside_others() -> None:
    cost = PlanCost((layer("a", {"batch": 2}),), 2, allreduce=5e-3, hidden=1e-3, update=1e-3, input=2e-3)
    slower = PlanCost((layer("a", {}),), 2, allreduce=30e-3)
    plan = Plan({"a": Partition(height=2), "b": Partition(height=2), "c": Partition()})
    others = {"data": (plan, slower), "domain": "layer a has only 1 row, and " + "so on " * 30}
    text = list(totals.beside(cost, others))
    assert widest(text) <= 79
    assert text[1].split() == ["this", "plan", "17.0", "1.00"]
    assert text[2].split() == ["data", "40.0", "2.35", "mostly", "height=2"]
    assert text[3].startswith("domain     -  layer a has only 1 row")
    summary, beside, refused = totals.records(cost, others, 1)
    assert summary["seconds"] == pytest.approx(0.017)
    assert sum(summary[f"{phase}_seconds"] for phase in cost.phases()) == pytest.approx(0.017)
    assert (beside["peer"], beside["ratio"]) == ("data", pytest.approx(40 / 17))
    assert refused["peer_seconds"] is None
    said = totals.phases(cost)
    assert said.startswith("a step takes 17.0 ms: compute 1.00, halo 2.00")
    assert "allreduce 4.00 (and 1.00 behind backward)" in said
    assert "redistribution 7.00 (4.00 of it statistics of norms)" in said
    assert totals.rates(cost, 34, 3400) == "2,000 samples/s; an epoch of 100 steps takes 1.70 s"


def test_shares_of_layer_times_by_where_they_are_from() -> None:
    cost = PlanCost((layer("a", {}, 3.0), layer("b", {}, 1.0), layer("c", {}, 0.0)), 1)
    said = totals.shares(cost, {"a": "measured", "b": "formula", "c": "interpolated"})
    assert said == "layer times: 75 % measured, 25 % by formula"


# --- scaling ---------------------------------------------------------------------------------------------------------


def scaled() -> tuple[Scaling, dict[str, dict[int, float]]]:
    """1 to 16 ranks, of which 8 are taken, and a baseline that has no plan for 16."""
    steps = {n: Step(1 / n + 0.01 * n, 1 / n) for n in (1, 2, 4, 8, 16)}
    found = how_many(steps.__getitem__, steps, 1000, "time", FIGURES)
    return found, {"data": {n: 2 * steps[n].seconds for n in (1, 2, 4, 8)}}


def test_table_of_scaling() -> None:
    found, others = scaled()
    text = list(scalings.table(found, others, FIGURES))
    assert text[0].split() == ["ranks", "s", "samples/s", "efficiency", "x", "data", "J/sample"]
    assert text[1].split() == ["1", "1.01", "990", "100.0", "%", "2.00", "0.201"]
    assert [line.startswith("*") for line in text[:6]] == [False, False, False, False, True, False]
    assert text[5].split()[-3:] == ["%", "-", f"{(200 + 16 * 50 * 0.16) / 1000:.3f}"]
    assert widest(text) <= 79
    records = scalings.records(found, others, FIGURES, 7)
    assert [r["ranks"] for r in records if r["chosen"]] == [8]
    assert records[1]["predicted_seconds"] == pytest.approx(7 * 0.52)
    assert records[1]["joules"] == pytest.approx(7 * 2 * (0.5 * 200 + 0.02 * 50))
    assert "data_seconds" in records[3]
    assert "data_seconds" not in records[4]


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_plot_of_scaling(suffix: str, tmp_path: Path) -> None:
    found, others = scaled()
    path = tmp_path / f"scaling{suffix}"
    plot.require(path)
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        plot.scaling(path, found, others, "lenet on a toy")
    raw = path.read_bytes()
    if suffix == ".png":
        assert raw.startswith(b"\x89PNG")
    else:
        for text in (
            "lenet on a toy",
            "ranks",
            "samples per second, predicted",
            "ideal",
            "data alone",
            "plan of hpctrain",
        ):
            assert f">{text}</text>" in raw.decode()


def test_plot_that_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--plot a\.txt: name a file that ends in \.png, \.svg"):
        plot.require(Path("a.txt"))
    found, others = scaled()
    with pytest.raises(ConfigError, match=r"--plot .*nowhere/a\.png: cannot be written"):
        plot.scaling(tmp_path / "nowhere" / "a.png", found, others, "")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendUnavailable, match=r"leave --plot out, or\npip install 'hpctrain\[report\]'"):
        plot.require(tmp_path / "a.png")


def test_loading_the_planner_starts_no_mpi() -> None:
    program = "import sys, hpctrain.plan_command\nprint('mpi4py.MPI' in sys.modules, 'matplotlib' in sys.modules)"
    ended = launching.run([sys.executable, "-c", program], timeout=60)
    assert (ended.status, ended.stdout) == (0, "False False\n"), ended.stderr
