"""`bench allreduce` under mpirun: what it prints, and what it refuses."""

from __future__ import annotations

import pytest
from runs import measuring, results

from hpctrain.comm.allreduce import TABLE


@pytest.mark.parametrize("ranks", [2, 3])
def test_bench_times_every_algorithm_beside_that_of_mpi(ranks: int) -> None:
    ended = measuring(ranks, "bench", "allreduce", "--quick", "--json")
    records = results(ended)
    expected = {*TABLE, "shared, copied"} - {"hierarchical"}
    for nbytes in (1024, 65536):
        of_size = {r["algorithm"]: r for r in records if r["bytes"] == nbytes}
        assert of_size.keys() == expected
        assert [r["algorithm"] for r in of_size.values() if r["chosen"]] == ["shared"]
        for r in of_size.values():
            assert (r["ranks"], r["precision"], r["peer"]) == (ranks, "float32", "mpi")
            assert r["peer_seconds"] == of_size["mpi"]["seconds"] > 0
            assert r["ratio"] == pytest.approx(r["peer_seconds"] / r["seconds"])
            assert r["bus_bandwidth"] == pytest.approx(2 * (ranks - 1) / ranks * nbytes / r["seconds"])
    text = ended.stdout.splitlines()[:-1]
    assert "no measurements in /nonexistent/machine.json; hpctrain calibrate makes them" in " ".join(text[:3])
    assert all(len(line) <= 80 for line in text), max(text, key=len)
    assert sum(line.startswith("* shared ") for line in text) == 2


def test_bench_of_what_is_asked_for() -> None:
    ended = measuring(
        2, "bench", "allreduce", "--sizes", "4K,7", "--algorithms", "tree", "--dtype", "bf16", "--json", "--repeat=2"
    )
    assert [(r["bytes"], r["precision"]) for r in results(ended)] == [(4096, "bf16")] * 2 + [(7, "bf16")] * 2
    assert {r["algorithm"] for r in results(ended)} == {"mpi", "tree"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sizes", "64k,1X"], "--sizes 1X: give bytes, with K, M or G"),
        (["--algorithms", "ring,rng"], "'rng' does not exist; choose one of ring, "),
        (["--algorithms", "horovod", "--quick"], "export HPCTRAIN_MPI_THREADS=multiple|build_horovod.sh VENV"),
        (["--algorithms", "nccl", "--quick"], "in host memory; choose another"),
    ],
)
def test_bench_refuses_and_names_the_remedy(words: list[str], message: str) -> None:
    ended = measuring(2, "bench", "allreduce", *words)
    assert ended.status == 2
    assert any(part in ended.stderr for part in message.split("|"))
    assert "Traceback" not in ended.stderr
