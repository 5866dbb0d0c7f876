"""What a person sees of a run: notes, one table row per epoch, progress. Rank 0 speaks; any rank may warn."""

from __future__ import annotations

import json
import math
import os
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hpctrain import environment
from hpctrain.partition import AXES, Partition

_UP = "\x1b[A\r\x1b[K"
"""To the beginning of the line above, and erase it."""

WIDTH = 79
"""Columns of text that fit every terminal."""

LETTERS = dict(zip(AXES, "bdhwck", strict=True))
"""For axes, in tables."""

_HEADINGS = {
    "accuracy": "acc",
    "test_accuracy": "test acc",
    "samples_per_second": "samples/s",
}


# --- tables ----------------------------------------------------------------------------------------------------------


def _columns(record: Mapping[str, Any]) -> dict[str, int]:
    """{key: width} of the columns of a table, as many as fit."""
    columns: dict[str, int] = {}
    for key, value in record.items():
        columns[key] = max(len(_title(key)), 5 if isinstance(value, int) else 8)
        if sum(columns.values()) + 2 * (len(columns) - 1) > WIDTH:
            del columns[key]
            break
    return columns


def _title(key: str) -> str:
    return _HEADINGS.get(key, key.replace("_", " ").replace(" seconds", " s"))


def _heading(columns: Mapping[str, int]) -> str:
    return "  ".join(_title(key).rjust(width) for key, width in columns.items())


def _row(columns: Mapping[str, int], record: Mapping[str, Any]) -> str:
    return "  ".join(_cell(key, record.get(key)).rjust(width) for key, width in columns.items())


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    if key.endswith("accuracy"):
        return f"{100 * value:.2f} %"
    if key.endswith("per_second"):
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    if key.endswith("seconds"):
        return f"{value:.1f}"
    return f"{value:#.4g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


# --- progress --------------------------------------------------------------------------------------------------------


class Progress:
    """How far something is: a bar where there is a terminal to draw on, else a line every `log_every` seconds."""

    def __init__(self, total: int, description: str, shown: bool, log_every: float) -> None:
        self.total, self.description, self.done, self.text = total, description, 0, ""
        self.live = shown and can_draw()
        self._shown = shown
        self._every = 0.1 if self.live else log_every
        self._start, self._first, self._drawn = 0.0, 0, False
        self._due = time.monotonic() + (0 if self.live else log_every)

    def advance(self, n: int = 1, text: str = "") -> None:
        """`n` more are done; `text` goes at the end of the line."""
        self.done += n
        self.text = text or self.text
        if not self._start:  # what was done before a resume, or a first step that warms up, says nothing of the rest
            self._start, self._first = time.monotonic(), self.done
        if self._shown and time.monotonic() >= self._due:
            self._due = time.monotonic() + self._every
            self._draw()

    def clear(self) -> None:
        """Take the bar away, so that something else can be written in its line."""
        if self._drawn:
            sys.stdout.write(_UP)
            sys.stdout.flush()
            self._drawn = False

    def _draw(self) -> None:
        counts = f"{self.done:>{len(str(self.total))}}/{self.total}"
        tail = "  ".join(part for part in (counts, self._left(), self.text) if part)
        if not self.live:
            print(f"{self.description}  {tail}", file=sys.stderr, flush=True)
            return
        columns = os.get_terminal_size(1).columns - 1
        room = max(0, min(30, columns - len(self.description) - len(tail) - 4))
        line = f"{self.description}  {_bar(self.done / max(self.total, 1), room)}  {tail}"
        # The bar is a whole line, and is drawn over from below: Open MPI 5's mpirun keeps back a line without its end.
        self.clear()
        sys.stdout.write(f"{line[:columns]}\n")
        sys.stdout.flush()
        self._drawn = True

    def _left(self) -> str:
        if not self._first < self.done < self.total:
            return ""
        each = (time.monotonic() - self._start) / (self.done - self._first)
        seconds = math.ceil(each * (self.total - self.done))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"


def _bar(part: float, width: int) -> str:
    full, rest = ("━", "╌") if (sys.stdout.encoding or "").lower().startswith("utf") else ("#", ".")
    done = min(width, int(part * width))
    return full * done + rest * (width - done)


def _wrap(text: str) -> str:
    """Lines broken between words to fit WIDTH, except the last of several, which is there to be pasted."""
    *lines, last = text.split("\n")
    if not lines:
        lines, last = [last], ""
    wrapped = [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ") or [""]]
    return "\n".join([*wrapped, last] if last else wrapped)


def wrapped(text: str, prefix: str = "") -> str:
    """`text` in lines that fit every terminal, each with `prefix`."""
    return textwrap.fill(text, WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False)


def blocks(partition: Partition) -> str:
    """A partition in a table: "b4 h2"."""
    return " ".join(f"{LETTERS[axis]}{n}" for axis, n in partition.parts().items()) or "1"


def can_draw() -> bool:
    """Whether stdout is a terminal on which a line can be drawn over.

    Under Open MPI's mpirun every rank's stdout claims to be a terminal, also when it is a file; then it has no columns.
    """
    try:
        return os.isatty(1) and os.get_terminal_size(1).columns > 0 and os.environ.get("TERM", "dumb") != "dumb"
    except OSError:
        return False


# --- console ---------------------------------------------------------------------------------------------------------


class Console:
    """Results go to stdout, diagnostics to stderr. No colours, so nothing to switch off."""

    def __init__(self, world_rank: int, log_every: float = 10.0) -> None:
        self.rank, self.log_every = world_rank, log_every
        self._keys: set[str] = set()
        self._columns: dict[str, int] = {}
        self._bar: Progress | None = None
        self._warned: Counter[str] = Counter()

    def note(self, text: str) -> None:
        """Text for the person, from rank 0. On a terminal lines are wrapped, except a last one: it may be a command."""
        if self.rank == 0:
            self._clear()
            _print(_wrap(text) if can_draw() else text)

    def warn(self, text: str) -> None:
        """A warning from any rank, to stderr; a text that comes again is only counted."""
        self._warned[text] += 1
        if self._warned[text] == 1:
            # rank 0's bar erases the line above it when it moves: let that be an empty one
            end = "\n\n" if can_draw() and (self.rank or self._bar is not None) else "\n"
            sys.stderr.write(f"hpctrain: warning: {self._who()}{text}{end}")
            sys.stderr.flush()

    def epoch(self, record: Mapping[str, Any]) -> None:
        """A row of the table of epochs. Its keys are the columns, as many as fit; a new key starts a new heading."""
        if not record.keys() <= self._keys:
            self._keys |= record.keys()
            self._columns = _columns(record)
            self.note(_heading(self._columns))
        self.note(_row(self._columns, record))

    @contextmanager
    def progress(self, total: int, description: str) -> Iterator[Progress]:
        """Shows how far the work inside is, which calls `advance(n, text)`. Nothing stays on the screen afterwards."""
        self._bar = Progress(total, description, self.rank == 0, self.log_every)
        try:
            yield self._bar
        finally:
            self._clear()
            self._bar = None

    def close(self) -> None:
        """Say how often each repeated warning came. Idempotent."""
        for text, count in self._warned.items():
            if count > 1:
                print(f"hpctrain: warning: {self._who()}{count} times in all: {text}", file=sys.stderr, flush=True)
        self._warned.clear()

    def _who(self) -> str:
        return f"rank {self.rank}: " if self.rank else ""

    def _clear(self) -> None:
        if self._bar is not None:
            self._bar.clear()


def print_json(command: str, results: Sequence[Mapping[str, Any]]) -> None:
    """The one object that --json adds as the last line of stdout."""
    about = {"command": command, "machine": environment.machine(), "versions": environment.versions()}
    # as in metrics.jsonl: strict JSON has no NaN
    finite = [
        {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in r.items()} for r in results
    ]
    _print(json.dumps(about | {"results": finite}))


def _print(text: str) -> None:
    """A line to stdout. Where nobody reads any more (`| head`), training goes on without."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
