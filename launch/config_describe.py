"""Words for fields and values: what a field accepts, what was given instead, and the table of --print-config."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}


def describe_field(field: FieldInfo) -> str:
    """What the field accepts, for example `an integer >= 1 or auto`."""
    return _describe(field.annotation, _constraints(field.metadata))


def describe_value(value: object) -> str:
    """A value as its YAML spelling and kind, for example `text 'abc'`."""
    if value is None or isinstance(value, bool):
        return yaml_spelling(value)
    kinds: dict[type, str] = {str: "text", int: "the integer", float: "the number", list: "the list", dict: "a mapping"}
    kind = kinds.get(type(value), type(value).__name__)
    return f"{kind} with keys {', '.join(map(str, value))}" if isinstance(value, dict) else f"{kind} {value!r}"


def yaml_spelling(value: object) -> str:
    """How the value is written in a configuration file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(yaml_spelling(item) for item in value) + "]"
    return str(value)


def hint(field: FieldInfo, value: object) -> str:
    """What to write instead, where that can be guessed; else empty."""
    kinds = list(_leaves(field.annotation))
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if isinstance(value, str):
        if bool in kinds and value.lower() in ("yes", "no", "on", "off", "y", "n", "true", "false"):
            return f"write {yaml_spelling(value.lower() in ('yes', 'on', 'y', 'true'))}, without quotes"
        if types.NoneType in kinds and value.lower() in ("none", "nil", "null"):
            return "write null, without quotes"
        if int in kinds or float in kinds:
            number = _as_number(value)
            if number is not None:
                return f"write {number}, without quotes or underscores"
        if get_origin(field.annotation) is tuple:
            return f"write [{value}]"
        near = nearest(value, choices)
        return f"did you mean {near}?" if near else ""
    if isinstance(value, float) and int in kinds and value.is_integer():
        return f"write {int(value)}"
    if isinstance(value, (int, float)) and str in kinds:
        return f'write "{value}" in quotes'
    if isinstance(value, bool) and choices:
        return f"write one of {', '.join(choices)}"
    return ""


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, or None if none is like it."""
    found = difflib.get_close_matches(name.lower(), list(candidates), n=1, cutoff=0.55)
    return found[0] if found else None


def config_table(rows: Iterable[tuple[str, object, str, str]], *, rich_output: bool) -> None:
    """Print (key, value, source, description) rows: a rich table on a terminal, aligned plain columns in a pipe."""
    header = ("setting", "value", "from", "meaning")
    lines = [(key, yaml_spelling(value), source, meaning) for key, value, source, meaning in rows]
    if rich_output:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*header)
        for line in lines:
            # Text objects: a value such as [0.9, 0.95] is not markup.
            table.add_row(*(Text(cell, style="dim" if line[2] == "default" else "") for cell in line))
        Console().print(table)
        return
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(3)]
    for line in [header, *lines]:
        padded = [cell.ljust(width) for cell, width in zip(line[:3], widths, strict=True)]
        print("  ".join([*padded, line[3]]).rstrip())


def _describe(annotation: Any, constraints: Mapping[str, Any]) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *extra = get_args(annotation)
        merged = {**constraints, **_constraints(extra)}
        return _describe(base, merged)
    if origin is Literal:
        choices = [str(choice) for choice in get_args(annotation)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option, constraints) for option in get_args(annotation))
    if origin is tuple:
        items = get_args(annotation)
        if len(items) == 2 and items[1] is Ellipsis:
            return f"a list of {_describe(items[0], {}).removeprefix('non-empty ')}"
        return f"a list of {len(items)} items, each {_describe(items[0], {})}"
    return _ranged(_NAMES.get(annotation, str(annotation)), annotation, constraints)


def _ranged(name: str, kind: Any, constraints: Mapping[str, Any]) -> str:
    if kind is str:
        return f"non-empty {name}" if "min_length" in constraints else name
    if kind not in (int, float):
        return name
    signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
    bounds = [f"{sign} {constraints[key]}" for key, sign in signs if key in constraints]
    multiple = f"that is a multiple of {constraints['multiple_of']}" if "multiple_of" in constraints else ""
    return " ".join(part for part in (name, " and ".join(bounds), multiple) if part)


def _constraints(metadata: Iterable[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in metadata:
        if isinstance(item, FieldInfo):
            found.update(_constraints(item.metadata))
        for name in ("gt", "ge", "lt", "le", "multiple_of", "min_length"):
            value = getattr(item, name, None)
            if isinstance(item, annotated_types.BaseMetadata) and value is not None:
                found[name] = value
    return found


def _leaves(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from _leaves(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _leaves(option)
    else:
        yield annotation


def _as_number(text: str) -> str | None:
    cleaned = text.replace("_", "").replace(",", "")
    try:
        float(cleaned)
    except ValueError:
        return None
    return cleaned
