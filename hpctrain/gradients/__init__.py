"""The sums of gradients over replicas: where they lie, who makes which part of them, and when."""

from __future__ import annotations

from hpctrain.gradients.summing import Gradients, Summing

__all__ = ["Gradients", "Summing"]
