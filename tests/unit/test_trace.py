"""Traces: what Perfetto needs of one, and that it says what the timeline says."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from hpctrain.planner.trace import Span, Timeline, to_json, write

TIMELINE = Timeline(
    7.0,
    (0, 0, 3),
    (
        Span(0, "conv", "compute", 0.0, 2.0),
        Span(0, "conv:0", "halo", 2.0, 2.5),
        Span(0, "sum", "allreduce", 4.0, 5.0),
        Span(1, "conv", "compute", 0.5, 3.0),
        Span(1, "sum", "allreduce", 6.0, 7.0),
        Span(2, 'a "quoted" \\ name, é', "compute", 0.0, 1.5e-6),
    ),
    (Span(0, "a", "sum", 1.0, 3.0), Span(0, "b", "sum", 2.0, 5.0), Span(1, "a", "sum", 6.0, 7.0)),
)


def test_every_span_is_an_event_of_its_rank(tmp_path: Path) -> None:
    write(TIMELINE, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    found = [(e["tid"], e["name"], e["cat"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in events]
    assert [event[:3] for event in found] == [span[:3] for span in TIMELINE.spans]
    assert [event[3:] for event in found] == [pytest.approx(span[3:]) for span in TIMELINE.spans]
    assert {(e["tid"], e["pid"]) for e in events} == {(0, 0), (1, 0), (2, 3)}


def test_hosts_and_ranks_are_named() -> None:
    events = json.loads(to_json(TIMELINE))["traceEvents"]
    named = {(e["name"], e["pid"], e.get("tid")): e["args"] for e in events if e["ph"] == "M"}
    assert named["process_name", 3, None] == {"name": "host 3"}
    assert named["thread_name", 0, 1] == {"name": "rank 1"}
    assert named["thread_name", 3, 2] == {"name": "rank 2"}


def test_sums_begin_and_end_as_pairs_beside_the_ranks() -> None:
    events = [event for event in json.loads(to_json(TIMELINE))["traceEvents"] if event["ph"] in "be"]
    by_id: dict[int, list[dict]] = {}
    for event in events:
        by_id.setdefault(event["id"], []).append(event)
    assert len(by_id) == len(TIMELINE.sums)
    for (begin, end), span in zip(by_id.values(), TIMELINE.sums, strict=True):
        assert (begin["ph"], end["ph"]) == ("b", "e")
        assert (begin["name"], begin["cat"]) == (end["name"], end["cat"])
        assert (begin["ts"], end["ts"]) == pytest.approx((span.begin * 1e6, span.end * 1e6))


def test_every_event_has_what_its_phase_asks_for() -> None:
    asked = {
        "X": {"name", "cat", "ts", "dur", "pid", "tid"},
        "M": {"name", "args", "pid"},
        "b": {"name", "cat", "id", "ts", "pid"},
    }
    asked["e"] = asked["b"]
    for event in json.loads(to_json(TIMELINE))["traceEvents"]:
        assert asked[event["ph"]] <= event.keys()
        assert all(isinstance(event[key], int) for key in ("pid", "tid", "id") if key in event)


def test_shares_of_a_timeline() -> None:
    assert TIMELINE.phases(0) == {"compute": 2.0, "halo": 0.5, "allreduce": 1.0}
    assert all(a.end <= b.begin for a, b in pairwise(TIMELINE.of(0)))
    # under way from 1 to 5 on rank 0 and from 6 to 7 on rank 1; shown are one second of each
    assert TIMELINE.hidden == pytest.approx(1 - 2 / 5)
    assert Timeline(1.0, (0,), ()).hidden == 0.0
