"""TOML as text: on which line each key stands (tomllib does not say), and writing tables out again (it cannot)."""

from __future__ import annotations

import datetime
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hpctrain.errors import ConfigError

KeyPath = tuple[str, ...]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


# --- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """(text, table) of a TOML file."""
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        others = sorted(str(other) for other in path.parent.glob("*.toml"))
        guess = nearest(str(path), others)
        remedy = f"did you mean {guess}?" if guess else "`hpctrain demo` writes one to start from"
        raise ConfigError(f"{path}: no such file; {remedy}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a TOML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}; give a TOML file") from error
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        where = re.search(r"line (\d+)", str(error))
        line = int(where[1]) if where else text.count("\n") + 1
        shown = text.split("\n")[line - 1].strip()
        raise ConfigError(f'{path}:{line}: not TOML: {error}: {shown}\n(text needs quotes: name = "lenet")') from error


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name most like `word`, or None where none is like it."""
    return next(iter(get_close_matches(word, list(names), n=1, cutoff=0.6)), None)


# --- overrides -------------------------------------------------------------------------------------------------------

_RESET = object()
"""Value of an override that restores the default."""


def parse_override(word: str) -> tuple[KeyPath, Any]:
    """(key path, value) of `section.key=value`."""
    key, equals, value = word.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(re.fullmatch(r"[A-Za-z0-9_-]+", part) for part in path):
        raise ConfigError(f"command line: {word!r} is not an override; write section.key=value, as in train.epochs=5")
    if not value.strip():
        return path, _RESET
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return path, value
    return path, parsed["value"] if len(parsed) == 1 else value


def lay_over(table: dict[str, Any], path: KeyPath, value: Any) -> None:
    """Set the key at `path`, making tables on the way."""
    for depth, key in enumerate(path[:-1], start=1):
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            here = ".".join(path[:depth])
            raise ConfigError(
                f"command line: {'.'.join(path)}: {here} is {inner!r} here, which has no keys; "
                f"write {here}={{{'.'.join(path[depth:])}=...}} to replace it"
            )
        table = inner
    if value is _RESET:
        table.pop(path[-1], None)
    else:
        table[path[-1]] = value


# --- lines -----------------------------------------------------------------------------------------------------------


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line (from 1) of every table and key of `text`, which must be valid TOML; keys of inline tables included."""
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for line, statement, parsed in _statements(text):
        if statement.lstrip().startswith("["):
            table = max(_paths(parsed), key=len)
            lines.setdefault(table, line)
        else:
            for path in _paths(parsed):
                lines.setdefault((*table, *path), line)
    return lines


def _statements(text: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(first line, text, parsed) of each header and each assignment: a statement ends where it parses on its own."""
    statement, first = "", 1
    for number, line in enumerate(text.split("\n"), start=1):
        if not statement:
            first = number
        statement += line + "\n"
        try:
            parsed = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        if parsed:
            yield first, statement, parsed
        statement = ""


def _paths(table: Mapping[str, Any]) -> Iterator[KeyPath]:
    """Every key path in `table`, outer before inner; of an array of tables, those of its last one."""
    for key, value in table.items():
        yield (key,)
        inner = value[-1] if isinstance(value, list) and value else value
        if isinstance(inner, dict):
            yield from ((key, *rest) for rest in _paths(inner))


# --- writing ---------------------------------------------------------------------------------------------------------


def dumps(table: Mapping[str, Any]) -> str:
    """`table` as a TOML document that reads back equal; entries that are None are left out (TOML has no null)."""
    return "\n".join(_section(table, ())).strip("\n") + "\n"


def _section(table: Mapping[str, Any], path: KeyPath) -> Iterator[str]:
    """Lines of one table: its values first, since everything after a sub-table's header would belong to that."""
    tables = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    values = {key: value for key, value in table.items() if key not in tables and value is not None}
    if path and (values or not tables):
        yield f"\n[{'.'.join(map(_key, path))}]"
    for key, value in values.items():
        yield f"{_key(key)} = {format_value(value)}"
    for key, value in tables.items():
        yield from _section(value, (*path, key))


def format_value(value: Any) -> str:
    """`value` as TOML writes it. Raises TypeError for what TOML cannot hold."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)  # inf and nan are TOML too
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's
        case datetime.date() | datetime.time():  # a datetime is a date
            return value.isoformat()
        case Mapping():
            items = (f"{_key(key)} = {format_value(item)}" for key, item in value.items() if item is not None)
            return "{" + ", ".join(items) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(format_value, value)) + "]"
    raise TypeError(f"{type(value).__name__} {value!r} cannot be written as TOML")


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else format_value(key)
