"""Bytes that the edges of a network moved, beside those that the cost model counts."""

from __future__ import annotations

from dataclasses import dataclass

from hpctrain.executor import Executor
from hpctrain.planner.layout import edges, sent_bytes


@dataclass(frozen=True)
class Traffic:
    """One edge, summed over ranks and steps: bytes sent in forward and in backward passes, counted and predicted."""

    edge: str
    consumer: str
    forward: int
    backward: int
    predicted_forward: int
    predicted_backward: int
    steps: int
    equal: bool
    """On every rank, not only in sum."""

    def record(self) -> dict[str, str | int | bool]:
        """As it stands in JSON."""
        return {
            "edge": self.edge,
            "steps": self.steps,
            "forward_bytes": self.forward,
            "backward_bytes": self.backward,
            "predicted_forward_bytes": self.predicted_forward,
            "predicted_backward_bytes": self.predicted_backward,
            "equal": self.equal,
        }


def traffic(executor: Executor, steps: int) -> list[Traffic]:
    """Every edge, after `steps` steps forward and backward; on rank 0, elsewhere nothing. Collective."""
    graph, rank, found = executor.graph, executor.rank, []
    moved = edges(graph, executor.plan, executor.layouts)
    for edge in moved:
        exchange = executor.exchanges.get((edge.consumer, edge.slot))  # none within a unit of fused layers
        fwd = 0 if exchange is None else exchange.fwd.bytes_sent
        bwd = 0 if exchange is None or exchange.bwd is None else exchange.bwd.bytes_sent
        # partial sums run backwards in the forward pass
        counted = (fwd, bwd) if edge.slot is not None else (bwd, fwd)
        forward, backward = sent_bytes(edge, rank, executor.dtype)
        found.append((*counted, forward * steps, backward * steps))
    every = executor.comm.gather(found)
    if every is None:
        return []
    result = []
    for i, edge in enumerate(moved):
        rows = [rank_found[i] for rank_found in every]
        source = None if edge.slot is None else graph[edge.consumer].inputs[edge.slot]
        name = f"partial sums of {edge.consumer}" if source is None else f"{source} -> {edge.consumer}"
        forward, backward, expected_forward, expected_backward = map(sum, zip(*rows, strict=True))
        equal = all(row[:2] == row[2:] for row in rows)
        result.append(
            Traffic(name, edge.consumer, forward, backward, expected_forward, expected_backward, steps, equal)
        )
    return result
