"""What a person sees of a run, on a terminal and in a file."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain import console
from hpctrain.console import Console, Progress

ROWS = [
    {"epoch": 1, "loss": 2.302585, "accuracy": 0.1, "lr": 0.1, "samples_per_second": 1234.5, "seconds": 12.34},
    {"epoch": 12, "loss": 1.2e-6, "accuracy": 1.0, "test_loss": 0.5, "samples_per_second": 99.9, "seconds": 1.0},
]


# --- tables ----------------------------------------------------------------------------------------------------------


def table(capsys: pytest.CaptureFixture[str], *rows: dict[str, float]) -> list[str]:
    """The lines that epochs with these records print."""
    screen = Console(0)
    for row in rows:
        screen.epoch(row)
    return capsys.readouterr().out.splitlines()


def test_table_is_aligned_and_fits(capsys: pytest.CaptureFixture[str]) -> None:
    first, row, second, late = table(capsys, *ROWS)
    assert len(first) == len(row) < 80
    assert len(second) == len(late) < 80
    assert first.split() == ["epoch", "loss", "acc", "lr", "samples/s", "seconds"]
    assert row.split() == ["1", "2.303", "10.00", "%", "0.1000", "1,234", "12.3"]
    assert second.split() == ["epoch", "loss", "acc", "test", "loss", "samples/s", "seconds"]
    assert late.split() == ["12", "1.20e-06", "100.00", "%", "0.5000", "99.9", "1.0"]


def test_missing_values_are_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    assert table(capsys, ROWS[0], {"epoch": 2, "loss": None, "accuracy": 0.5})[-1].split() == [
        *("2", "-", "50.00", "%", "-", "-", "-")
    ]


def test_table_leaves_out_columns_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    row = {f"figure_number_{n}": float(n) for n in range(20)}
    assert max(len(line) for line in table(capsys, row)) < 80


def test_rows_come_one_by_one_as_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Console(0)
    for row in ROWS:
        screen.epoch(row)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["epoch", "1", "epoch", "12"]  # a new key brings a new heading
    screen.epoch(ROWS[0])
    assert capsys.readouterr().out.split()[:2] == ["1", "2.303"]


# --- who speaks where ------------------------------------------------------------------------------------------------


def test_only_rank_0_notes_and_any_rank_warns_once(capsys: pytest.CaptureFixture[str]) -> None:
    other = Console(3)
    other.note("hello")
    other.epoch(ROWS[0])
    for _ in range(3):
        other.warn("sample 7 is odd")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "hpctrain: warning: rank 3: sample 7 is odd\n"
    other.close()
    assert capsys.readouterr().err == "hpctrain: warning: rank 3: 3 times in all: sample 7 is odd\n"


def test_progress_without_a_terminal_is_whole_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console, "can_draw", lambda: False)
    with Console(0, log_every=10).progress(100, "epoch 1/2") as bar:
        bar.advance(40)  # done before a resume: says nothing of the speed
        for _ in range(50):
            now[0] += 1
            bar.advance(1, "loss 0.5")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[0] == "epoch 1/2   50/100  0:50 left  loss 0.5"
    assert len(said.err.splitlines()) == 5
    assert not re.search(r"[\r\x1b]", said.err)


def test_other_ranks_show_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress(10, "x", shown=False, log_every=0.0)
    bar.advance(5)
    said = capsys.readouterr()
    assert said.out + said.err == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:01 left"), (61, "1:01 left"), (3723, "1:02:03 left")])
def test_time_left(seconds: float, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    bar = Progress(3, "x", shown=False, log_every=1.0)
    bar.advance(1)
    now[0] += seconds
    bar.advance(1)
    assert bar._left() == text


# --- on a terminal ---------------------------------------------------------------------------------------------------

PROGRAM = """
import time
from hpctrain.console import Console
screen = Console(0)
screen.note("a sentence of many words " * 6 + "\\ncommand " + "to paste " * 12)
with screen.progress(50, "epoch 1/2") as bar:
    for i in range(50):
        time.sleep(0.01)
        bar.advance(1, "loss " + "9" * (200 if i == 20 else 3))
screen.note("the end")
"""


def on_terminal(columns: int, **env: str) -> str:
    """What PROGRAM writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, True)
    import fcntl
    import struct
    import termios

    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=theirs, env=os.environ | env)
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # how Linux says that the other side is closed
            break
        said += part
    os.close(ours)
    assert child.wait() == 0
    return said.decode()


def screen_after(text: str) -> list[str]:
    """The lines on a terminal after `text`, for the three control sequences that we use."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[A|\x1b\[K|\r|\n)", text):
        if part == "\x1b[A":
            row -= 1
        elif part == "\x1b[K":
            lines[row] = ""
        elif part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part not in ("", "\r"):
            lines[row] = part
    return lines


def test_bar_is_drawn_over_and_leaves_nothing() -> None:
    said = on_terminal(80, TERM="xterm", PYTHONIOENCODING="utf-8")
    assert said.count("epoch 1/2") > 2
    assert "━" in said
    *wrapped, command, end, rest = screen_after(said)
    assert (end, rest) == ("the end", "")
    assert len(wrapped) == 2
    assert max(map(len, wrapped)) < 80
    assert command.startswith("command to paste")  # whole, however long
    assert len(command) > 80
    bars = re.findall(r"epoch 1/2[^\r\n]*", said)
    assert max(map(len, bars)) < 80
    # a launcher may hold back what is not a whole line
    assert all(re.search(re.escape(bar) + r"\r?\n", said) for bar in bars)


@pytest.mark.parametrize(("columns", "term"), [(80, "dumb"), (0, "xterm")])
def test_terminal_that_cannot_be_drawn_on(columns: int, term: str) -> None:
    said = on_terminal(columns, TERM=term)
    assert "\x1b" not in said
    assert "epoch" not in said


def test_json_is_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json("train", [{"epoch": 1, "loss": 0.5}])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["command"] == "train"
    assert last["results"] == [{"epoch": 1, "loss": 0.5}]
    assert last["machine"]["cores"] >= 1
    assert re.match(r"3\.\d+", last["versions"]["python"])


def test_console_module_is_light(tmp_path: Path) -> None:
    program = "import sys, hpctrain.console; print(sorted({'rich', 'numpy', 'mpi4py'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert said.stdout.strip() == "[]"
