"""`hpctrain verify`: does this plan compute what one rank computes, and move the bytes that the cost model counts?"""

from __future__ import annotations

from hpctrain.verify.command import Options, run

__all__ = ["Options", "run"]
