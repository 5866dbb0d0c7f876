"""Documents that are written from the code are what the code says now."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hpctrain import layers

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_layers_is_not_stale() -> None:
    spec = importlib.util.spec_from_file_location("docs_layers", DOCS / "layers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (DOCS / "layers.md").read_text(encoding="utf-8")
    assert written == module.text(), "run `python docs/layers.py`"


def test_the_table_names_every_layer() -> None:
    written = (DOCS / "layers.md").read_text(encoding="utf-8")
    kinds = [name for name in layers.__all__ if isinstance(getattr(layers, name), type)]
    concrete = [name for name in kinds if issubclass(getattr(layers, name), layers.Layer)]
    for name in set(concrete) - {"Layer", "Loss", "Input"}:
        assert f"### {name}\n" in written, name
