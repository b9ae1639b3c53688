"""YAML read strictly: every value keeps its line, and scalars mean what YAML 1.2 says.

PyYAML follows YAML 1.1 and takes `3e-4` for a string, `12:30` for 750 and `yes` for true. Here the core schema of
YAML 1.2 decides: `3e-4` is a number, `12:30` and `yes` are strings. Duplicate keys, anchors and tags are errors: a
configuration has no use for them, and each hides what a value is.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import yaml

_MAX_DEPTH = 20


class YamlError(ValueError):
    """Text that is not the YAML a configuration may use; `line` is 1-based."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


@dataclass(frozen=True, kw_only=True)
class Located:
    """A plain Python value and where it is. In a mapping the values are again `Located`, and `line` is its first key's.

    `duplicates` lists keys that the mapping has twice, each with the lines of the first and the second.
    """

    value: Any
    line: int
    duplicates: tuple[tuple[str, int, int], ...] = ()


class _CoreLoader(yaml.SafeLoader):
    """Composes nodes with YAML 1.2 tags; nothing is ever constructed by PyYAML."""

    depth = 0
    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise YamlError(line, "anchors and aliases (& and *) are not allowed here; write the value out or quote it")
        if getattr(event, "tag", None) is not None:
            raise YamlError(line, f"the tag {event.tag} is not allowed here; a quoted value is a string")
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise YamlError(line, f"nested more than {_MAX_DEPTH} deep; a configuration has two levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_NULL, _BOOL = "tag:yaml.org,2002:null", "tag:yaml.org,2002:bool"
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
for _tag, _pattern, _first in (
    (_NULL, r"null|Null|NULL|~|", [*"nN~", ""]),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    (_INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
):
    _CoreLoader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)


def parse_yaml(text: str) -> Located:
    """Parse one YAML document.

    Returns:
        The document with lines; its value is None for an empty text.

    Raises:
        YamlError: not valid YAML, more than one document, or an anchor, alias or tag.
    """
    try:
        node = _CoreLoader(text).get_single_node()
        return Located(value=None, line=1) if node is None else _convert(node)
    except yaml.MarkedYAMLError as error:
        mark, begun = error.problem_mark or error.context_mark, error.context_mark
        # PyYAML places what is missing at the end into the line after the last.
        line = min(mark.line + 1, max(1, len(text.splitlines()))) if mark else 1
        what = " ".join(part for part in (error.context, error.problem) if part)
        since = f" (begun in line {begun.line + 1})" if begun and begun.line + 1 != line else ""
        raise YamlError(line, f"not valid YAML: {what}{since}") from None
    except yaml.YAMLError as error:
        raise YamlError(1, f"not valid YAML: {' '.join(str(error).split())}") from None


def plain(located: Located) -> Any:
    """The value without its lines."""
    if isinstance(located.value, dict):
        return {key: plain(item) for key, item in located.value.items()}
    if isinstance(located.value, list):
        return [plain(item) for item in located.value]
    return located.value


def _convert(node: yaml.Node) -> Located:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, line)
    if isinstance(node, yaml.SequenceNode):
        return Located(value=[_convert(item) for item in node.value], line=line)
    try:
        return Located(value=_scalar(node.tag, node.value), line=line)
    except ValueError as error:  # Python refuses integers of more than some thousand digits
        raise YamlError(line, f"not a usable number: {error}") from None


def _mapping(node: yaml.MappingNode, line: int) -> Located:
    items: dict[str, Located] = {}
    duplicates = []
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise YamlError(key_line, "a key must be a name, got a list or a mapping")
        key = key_node.value
        item = _convert(value_node)
        if key in items:
            duplicates.append((key, items[key].line, key_line))
        else:
            # The key's line, not the value's: that is where a reader looks for `section.key`.
            items[key] = Located(value=item.value, line=key_line, duplicates=item.duplicates)
    return Located(value=items, line=line, duplicates=tuple(duplicates))


def _scalar(tag: str, text: str) -> Any:
    if tag == _NULL:
        return None
    if tag == _BOOL:
        return text.lower() == "true"
    if tag == _INT:
        digits = text.lower()
        return int(digits[2:], 8 if digits[1] == "o" else 16) if digits[:2] in ("0o", "0x") else int(text)
    if tag == _FLOAT:
        if text.lower().endswith(("inf", "nan")):
            return math.nan if text.lower() == ".nan" else math.copysign(math.inf, -1 if text[0] == "-" else 1)
        return float(text)
    return text
