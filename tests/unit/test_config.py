"""The config file: what it takes, what it refuses and how it says so."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain import config_file, toml_text
from hpctrain.config import Config, Grid
from hpctrain.errors import ConfigError
from hpctrain.partition import AXES, Partition

GOOD = """\
# a comment = "that is no key"
[model]
name = "lenet"
[data]
train = "shards/train"
[plan]
grid = {batch = 2, height = 2}
[optim]
lr = 1
[train]
epochs = 10
batch = 64
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good config, in a folder that is not the current one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = tmp_path / "net.toml"
    path.write_text(GOOD)
    return path


def refused(path: Path, *overrides: str) -> str:
    """The message with which a config is refused."""
    with pytest.raises(ConfigError) as error:
        config_file.load(path, overrides)
    return str(error.value)


def changed(path: Path, old: str, new: str) -> Path:
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    return path


# --- what it takes ---------------------------------------------------------------------------------------------------


def test_values_and_defaults(file: Path) -> None:
    found = config_file.load(file)
    assert found.model.name == "lenet"
    assert found.plan.grid == Grid(batch=2, height=2)
    assert isinstance(found.plan.grid, Grid)
    assert found.plan.grid.partition == Partition(batch=2, height=2)
    assert found.optim.lr == 1.0
    assert isinstance(found.optim.lr, float)
    assert (found.train.precision, found.train.steps, found.checkpoint.keep) == ("float32", None, 2)


def test_grid_has_the_axes_of_a_partition() -> None:
    assert Grid.__struct_fields__ == AXES


def test_paths_count_from_the_current_directory(file: Path) -> None:
    found = config_file.load(file, ["plan.grid=plan.json", "model.name=nets/my.py:build"])
    assert found.data.train == str(Path.cwd() / "shards/train")
    assert found.plan.grid == str(Path.cwd() / "plan.json")
    assert found.model.name == str(Path.cwd() / "nets/my.py:build")
    assert found.run.folder == str(Path.cwd() / "runs/net")  # named after the file
    assert config_file.load(file, ["data.train=/elsewhere"]).data.train == "/elsewhere"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.epochs=3", "train.epochs", 3),
        ("train.precision=float64", "train.precision", "float64"),
        ('train.precision="float64"', "train.precision", "float64"),
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("optim.nesterov=false", "optim.nesterov", False),
        ("plan.grid.width=3", "plan.grid", Grid(batch=2, height=2, width=3)),
        ("plan.grid={depth=4}", "plan.grid", Grid(depth=4)),
        ("model.options={filters=[1, 2]}", "model.options", {"filters": [1, 2]}),
        ("model.options.name=a b=c", "model.options", {"name": "a b=c"}),
        ("plan.grid=", "plan.grid", Grid()),
    ],
)
def test_override(file: Path, override: str, key: str, value: Any) -> None:
    found: Any = config_file.load(file, [override])
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value


def test_resolved_config_reads_back_equal(file: Path) -> None:
    odd = 'model.options={a = "quote \\" backslash \\\\ tab \\t \\u007f é", b = [1.5, {c = true}], "d e" = 2024-01-02}'
    found = config_file.load(
        file, [odd, "optim.schedule={name='step', milestones=[3, 7]}", "train.steps=5", "optim.lr=1e-5"]
    )
    again = file.with_name("again.toml")
    again.write_text(config_file.to_toml(found), encoding="utf-8")
    assert config_file.load(again) == found
    assert tomllib.loads(config_file.to_toml(found))["optim"]["momentum"] == 0.0  # defaults are written out


TOML_VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), TOML_VALUES, max_size=4))
@settings(max_examples=200, deadline=None)
def test_writer_agrees_with_the_standard_library_reader(table: dict[str, Any]) -> None:
    assert tomllib.loads(toml_text.dumps(table)) == table


# --- what decides the numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        *("plan.grid={channel=3}", "plan.allreduce=mpi", "train.backend=reference", "run.folder=x", "run.log_every=1"),
        *("checkpoint.every_steps=5", "data.verify=true", "data.train=moved", "train.eval_every=2", "train.steps=7"),
        *("train.epochs=20", "data.test=t", "train.nonfinite=skip", "optim.lr=2", "optim.schedule.warmup_epochs=1"),
    ],
)
def test_hash_is_blind_to_what_only_rounds_reports_or_stops(file: Path, override: str) -> None:
    assert config_file.config_hash(config_file.load(file, [override])) == config_file.config_hash(
        config_file.load(file)
    )


@pytest.mark.parametrize(
    "override",
    [
        *("model.name=mlp", "model.options.x=1", "data.normalize=false"),
        *("train.batch=32", "train.seed=1", "train.precision=float64"),
    ],
)
def test_hash_sees_what_changes_the_numbers(file: Path, override: str) -> None:
    assert config_file.config_hash(config_file.load(file, [override])) != config_file.config_hash(
        config_file.load(file)
    )


def test_hash_is_the_same_in_every_process(file: Path) -> None:
    program = "import sys, pathlib, hpctrain.config_file as c; print(c.config_hash(c.load(pathlib.Path(sys.argv[1]))))"
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-c", program, str(file)]
        said = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": hash_seed}, capture_output=True, check=True)
        assert said.stdout.decode().strip() == config_file.config_hash(config_file.load(file))


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("epochs = 10", "epoch = 10", 11, ("train.epoch = 10", "no such key", "did you mean train.epochs?", "seed")),
        ("[optim]", "[optm]", 8, ("optm", "did you mean optim?")),
        ("batch = 64", "batch = 64\nlr = 0.1", 13, ("train.lr = 0.1", "did you mean optim.lr?")),
        ("height = 2", "hieght = 2", 7, ("plan.grid.hieght = 2", "did you mean plan.grid.height?", "contraction")),
        ("height = 2", "height = 0", 7, ("plan.grid.height = 0", "whole number, at least 1")),
        ("batch = 64", "batch = -4", 12, ("train.batch = -4", "at least 1")),
        ("batch = 64", "batch = 6.5", 12, ("train.batch = 6.5", "whole number")),
        ("batch = 64", "batch = true", 12, ("train.batch = true", "whole number")),
        ("epochs = 10", 'epochs = "ten"', 11, ('train.epochs = "ten"', "whole number")),
        ("lr = 1", "lr = 0", 9, ("optim.lr = 0", "above 0")),
        ("lr = 1", "lr = inf", 9, ("optim.lr = inf", "finite")),
        ("lr = 1", "lr = nan", 9, ("optim.lr = nan", "number")),
        ("lr = 1", "", 8, ("optim.lr", "missing", "above 0")),
        ("lr = 1", "lr = 1\nmomentum = 1.0", 10, ("optim.momentum = 1.0", "below 1")),
        ('name = "lenet"', 'name = ""', 3, ("model.name", "not empty")),
        ('name = "lenet"', "name = 5", 3, ("model.name = 5", "text in quotes")),
        ('name = "lenet"', 'name = "lenet"\noptions = 3', 4, ("model.options = 3", "a table")),
        (
            "[plan]",
            '[plan]\nallreduce = "rng"',
            7,
            ('plan.allreduce = "rng"', '"recursive_doubling", "ring"', 'did you mean "ring"?'),
        ),
        ("grid = {batch = 2, height = 2}", "grid = 4", 7, ("plan.grid = 4", "a table with batch, depth", "text")),
        ("batch = 64", "batch = 1", 7, ("plan.grid.batch = 2", "train.batch", "(1)")),
        ("lr = 1", "lr = 1\nnesterov = true", 10, ("optim.nesterov = true", "optim.momentum")),
        ("lr = 1", 'lr = 1\nschedule.name = "step"', 10, ("optim.schedule.milestones", "[30, 60]")),
        (
            "lr = 1",
            "lr = 1\nbeta1 = 0.5",
            10,
            ("optim.beta1 = 0.5", "no effect with optimizer 'sgd'", "belongs to adam"),
        ),
        (
            "lr = 1",
            "name = 'adam'\nlr = 1\nmomentum = 0.5",
            11,
            ("optim.momentum", "'adam'", "belongs to sgd and lars"),
        ),
        ("lr = 1", "name = 'adam'\nlr = 1\ndecoupled_decay = true", 11, ("decoupled_decay", "optim.weight_decay")),
        ("lr = 1", "lr = 1\nschedule.gamma = 0.5", 10, ("optim.schedule.gamma = 0.5", "belongs to step")),
        ("lr = 1", 'lr = 1\n[optim.schedule]\nname = "step"\nmilestones = [3, 2]', 12, ("[3, 2]", "ascending")),
        ("lr = 1", "lr = 1\n[optim.schedule]\nwarmup_epochs = 11", 11, ("warmup_epochs = 11", "train.epochs is 10")),
        (
            "lr = 1",
            "lr = 1\n[optim.schedule]\nname = 'cosine'\nfinal_lr = 2",
            12,
            ("final_lr = 2", "lr, which is 1.0;"),
        ),
        (
            "lr = 1",
            "lr = 1\nscale_lr = 'linear'\n[optim.schedule]\nname = 'cosine'\nfinal_lr = 0.5",
            13,
            ("final_lr = 0.5", "optim.lr, which is 1.0, scaled to 0.25 by train.batch / optim.base_batch; rates only"),
        ),
        ("batch = 64", "batch = 64\naccumulate = 5", 13, ("train.accumulate = 5", "train.batch (64)", "equal parts")),
        (
            "batch = 64",
            "batch = 64\naccumulate = 64",
            7,
            ("plan.grid.batch = 2", "train.batch / train.accumulate", "(64 / 64)", "accumulate in fewer parts"),
        ),
        (
            "lr = 1",
            "lr = 1\nshard = true\n[sync]\nstrategy = 'local'",
            10,
            ("optim.shard = true", "needs sync.strategy 'allreduce', not 'local'", "set it to false"),
        ),
        (
            "batch = 64",
            "batch = 64\n[memory]\nshare_weights = true\n[sync]\nstrategy = 'backup'",
            14,
            ("memory.share_weights = true", "needs sync.strategy 'allreduce', not 'backup'", "set it to false"),
        ),
        (
            "lr = 1",
            "lr = 1\nshard = true\n[compress]\ncodec = 'fp16'",
            10,
            ("optim.shard = true", "cannot go with compress.codec 'fp16'", "set one of them"),
        ),
        (
            "batch = 64",
            "batch = 64\n[memory]\nshare_weights = true\n[compress]\ncodec = 'qsgd'",
            14,
            ("memory.share_weights = true", "cannot go with compress.codec 'qsgd'", "set one of them"),
        ),
        (
            "lr = 1",
            "name = 'adam'\nlr = 1\n[compress]\ncodec = 'topk'",
            12,
            ('compress.codec = "topk"', "optim.name is 'adam'", "choose sgd or another codec"),
        ),
        (
            "lr = 1",
            "lr = 1\nmomentum = 0.5\nnesterov = true\n[compress]\ncodec = 'topk'",
            11,
            ("optim.nesterov = true", "takes over the momentum", "set it to false or choose another compress.codec"),
        ),
        ("batch = 64", "batch = 64\n[checkpoint]\nkeep = 1", 14, ("checkpoint.keep = 1", "at least 2")),
    ],
)
def test_mistake_is_named_with_line_key_value_and_remedy(
    file: Path, old: str, new: str, line: int, says: tuple[str, ...]
) -> None:
    message = refused(changed(file, old, new))
    for words in (f"{file}:{line}: ", *says):
        assert words in message


def test_linear_scaling_lets_rates_fall_from_the_scaled_one(file: Path) -> None:
    given = "lr = 1\nscale_lr = 'linear'\nbase_batch = 16\n[optim.schedule]\nname = 'cosine'\nfinal_lr = 3"
    assert config_file.load(changed(file, "lr = 1", given)).optim.full_lr(64) == 4.0


@pytest.mark.parametrize(
    "overrides",
    [
        ("optim.shard=true", "memory.share_weights=true", "train.accumulate=4"),
        ("compress.codec=topk", "optim.momentum=0.9"),
        ("compress.codec=onebit", "optim.name=adam", "sync.strategy=local"),
    ],
)
def test_sums_of_gradients_that_go_together(file: Path, overrides: tuple[str, ...]) -> None:
    config_file.load(file, overrides)


def test_all_mistakes_are_listed(file: Path) -> None:
    changed(file, "epochs = 10", "epoch = 10")
    lines = refused(file, "optim.lr=-1", "plan.gird={}").splitlines()
    assert lines[0] == f"{file}: 4 mistakes"
    assert [line.split(": ")[0] for line in lines[1:]] == ["command line", "command line", f"{file}:11", f"{file}:10"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("epochs=3", "did you mean train.epochs?"),
        ("train.epochs", "write section.key=value"),
        ("=3", "write section.key=value"),
        ("train.seed=-1", "command line: train.seed = -1: expected a whole number, at least 0"),
        ("train.seed=.5", 'command line: train.seed = ".5": expected a whole number'),
        ("model.name.x=3", "model.name is 'lenet' here, which has no keys"),
        ("data.train=", "command line: data.train: missing; give text in quotes"),
        ("train={}", "command line: train.epochs: missing"),
    ],
)
def test_bad_override(file: Path, override: str, says: str) -> None:
    assert says in refused(file, override)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[model\n", ":1: not TOML"),
        (b"[model]\nname = lenet\n", ":2: not TOML"),
        (b"[a]\n[a]\n", ":2: not TOML"),
        (b"\xff\xfe[model]", "not UTF-8 text at byte 0"),
        (b"", "model: missing"),
    ],
)
def test_file_that_is_no_config(file: Path, content: bytes, says: str) -> None:
    file.write_bytes(content)
    message = refused(file)
    assert says in message
    assert str(file) in message


def test_missing_file_suggests_its_neighbour(file: Path) -> None:
    message = refused(file.with_name("nett.toml"))
    assert "no such file" in message
    assert f"did you mean {file}?" in message
    assert "hpctrain demo" in refused(file.parent / "x" / "y.toml")
    assert "cannot be read" in refused(file.parent)


def test_windows_text_is_read(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert config_file.load(file).train.batch == 64


def test_any_one_value_replaced_by_junk_is_refused_with_its_line(file: Path, seed: int) -> None:
    # Every line of a full config, its value replaced by one of another type.
    full = config_file.to_toml(config_file.load(file, ["train.steps=5", "data.test=t", "model.options.a=1"]))
    rng, lines, tried = random.Random(seed), full.splitlines(), 0
    for number, line in enumerate(lines, start=1):
        key, equals, _ = line.partition(" = ")
        if not equals or key == "a":
            continue
        junk = rng.choice(["-1", "[-1]", "{x = -1}", "2024-01-02"])
        file.write_text("\n".join([*lines[: number - 1], f"{key} = {junk}", *lines[number:]]))
        assert f"{file}:{number}: " in refused(file), line
        tried += 1
    assert tried > 30


# --- lines -----------------------------------------------------------------------------------------------------------


def test_lines_of_keys() -> None:
    text = '''# [no]
[a]
x = 1  # y = 2
long = """
z = 3
[b]
"""
list = [
  1,  # c = 5
  2,
]
"quo ted" = {in = 1, deep = {er = 2}}
dot.ted = 3
[a.sub]
x = 4
[[many]]
y = 1
'''
    assert toml_text.key_lines(text) == {
        ("a",): 2,
        ("a", "x"): 3,
        ("a", "long"): 4,
        ("a", "list"): 8,
        ("a", "quo ted"): 12,
        ("a", "quo ted", "in"): 12,
        ("a", "quo ted", "deep"): 12,
        ("a", "quo ted", "deep", "er"): 12,
        ("a", "dot"): 13,
        ("a", "dot", "ted"): 13,
        ("a", "sub"): 14,
        ("a", "sub", "x"): 15,
        ("many",): 16,
        ("many", "y"): 17,
    }


def test_config_is_immutable(file: Path) -> None:
    found: Config = config_file.load(file)
    with pytest.raises(AttributeError):
        found.train.epochs = 3  # type: ignore[misc]
