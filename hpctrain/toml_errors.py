"""What keeps a TOML table from filling a struct: all mistakes at once, with nearest names and accepted values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect, structs

from hpctrain.toml_text import KeyPath, format_value, key_lines, nearest

Table = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """One mistake: the key path it is at, and what to do about it."""

    path: KeyPath
    text: str


def find_problems(kind: type[msgspec.Struct], table: Table) -> list[Problem]:
    """Everything that keeps `table` from becoming a `kind`; empty when nothing does."""
    return list(_in_table(kind, kind, table, ()))


def value_at(table: Table, path: KeyPath) -> str:
    """` = value` of the key at `path` for a message, shortened; empty where `table` has no such key."""
    value: Any = table
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return ""
        value = value[key]
    text = format_value(value)
    return f" = {text if len(text) <= 60 else text[:57] + '...'}"


def report(path: Path, text: str, table: Mapping[str, Any], given: list[KeyPath], problems: list[Problem]) -> str:
    """One line for each problem: where, which key, its value, and what to do."""
    lines = key_lines(text)

    def place(at: KeyPath) -> str:
        prefixes = [at[:n] for n in range(len(at), 0, -1)]
        if any(prefix in given for prefix in prefixes):
            return "command line"
        known = [lines[prefix] for prefix in prefixes if prefix in lines]
        return f"{path}:{known[0]}" if known else str(path)

    said = [f"{place(p.path)}: {'.'.join(p.path)}{value_at(table, p.path)}: {p.text}" for p in problems]
    return said[0] if len(said) == 1 else "\n".join([f"{path}: {len(said)} mistakes", *said])


# --- walking ---------------------------------------------------------------------------------------------------------


def _in_table(root: type[msgspec.Struct], kind: type[msgspec.Struct], table: Table, path: KeyPath) -> Iterator[Problem]:
    fields = {field.encode_name: field for field in structs.fields(kind)}
    for key in table:
        if key not in fields:
            yield Problem((*path, key), _unknown_key(root, key, path, list(fields)))
    for key, field in fields.items():
        at = (*path, key)
        inner = _struct_in(field.type)
        if key not in table:
            if field.required:
                yield Problem(at, f"missing; give {_expected(inspect.type_info(field.type))}")
        elif inner is not None and isinstance(table[key], Mapping):
            yield from _in_table(root, inner, table[key], at)
        else:
            yield from _in_value(field.type, table[key], at)


def _in_value(kind: Any, value: Any, path: KeyPath) -> Iterator[Problem]:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        info = inspect.type_info(kind)
        guess = nearest(value, _choices(info)) if isinstance(value, str) else None
        hint = f"; did you mean {format_value(guess)}?" if guess else ""
        yield Problem(path, f"expected {_expected(info)}{hint}")
        return
    if isinstance(value, float) and not math.isfinite(value):
        yield Problem(path, "expected a finite number")  # bounds do not catch nan


def _unknown_key(root: type[msgspec.Struct], key: str, path: KeyPath, names: list[str]) -> str:
    here = ".".join(path)
    near = nearest(key, names)
    elsewhere = [(*place, key) for place, keys in _tables(root, ()) if key in keys]
    guess = (*path, near) if near else elsewhere[0] if elsewhere else None
    hint = f"did you mean {'.'.join(guess)}? " if guess else ""
    return f"no such key; {hint}{f'[{here}]' if here else 'a config'} has {', '.join(names)}"


def _tables(kind: type[msgspec.Struct], path: KeyPath) -> Iterator[tuple[KeyPath, list[str]]]:
    """(path, key names) of every table of a config."""
    fields = structs.fields(kind)
    yield path, [field.encode_name for field in fields]
    for field in fields:
        if inner := _struct_in(field.type):
            yield from _tables(inner, (*path, field.encode_name))


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:
    """The struct that `kind` is, or that is one of its alternatives."""
    return next(
        (info.cls for info in _alternatives(inspect.type_info(kind)) if isinstance(info, inspect.StructType)), None
    )


# --- describing types ------------------------------------------------------------------------------------------------


def _expected(info: inspect.Type) -> str:
    """What a value of this type looks like, for a person."""
    match info:
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType() | inspect.FloatType():
            return ("a whole number" if isinstance(info, inspect.IntType) else "a number") + _bounds(info)
        case inspect.StrType():
            return "text in quotes" + (", not empty" if info.min_length else "")
        case inspect.LiteralType():
            return "one of " + ", ".join(map(format_value, info.values))
        case inspect.VarTupleType():
            return f"a list, each item {_expected(info.item_type)}"
        case inspect.StructType():
            return f"a table with {', '.join(field.encode_name for field in info.fields)}"
        case inspect.DictType():
            return "a table"
        case inspect.UnionType():
            return " or ".join(map(_expected, _alternatives(info)))
    raise TypeError(f"no description of {info} for messages")


def _bounds(info: inspect.IntType | inspect.FloatType) -> str:
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    limits = [f"{word} {getattr(info, name)}" for name, word in words.items() if getattr(info, name) is not None]
    return ", " + " and ".join(limits) if limits else ""


def _alternatives(info: inspect.Type) -> list[inspect.Type]:
    """The types a value may have; None is left out, since TOML has no way to write it."""
    types = list(info.types) if isinstance(info, inspect.UnionType) else [info]
    return [kind for kind in types if not isinstance(kind, inspect.NoneType)]


def _choices(info: inspect.Type) -> list[str]:
    return [
        str(value) for kind in _alternatives(info) if isinstance(kind, inspect.LiteralType) for value in kind.values
    ]
