"""Nearest valid names: what a mistyped section, setting, override or file was probably meant to be."""

from __future__ import annotations

import os
from pathlib import Path

from launch.config import SECTIONS
from launch.config_describe import nearest

# `section: word`, short for `section: {word: true}`
SHORT_FORMS = {"memory": "auto"}
_MOVED = {"engine.recompute": "memory.recompute"}


def unknown_section(name: str) -> str:
    """What to say about a section that does not exist."""
    near = nearest(name, SECTIONS)
    owners = [section for section, model in SECTIONS.items() if name in model.model_fields]
    if owners:
        return f"{name}: no such section; the setting {name} belongs to {' and '.join(owners)}"
    return f"{name}: no such section; " + (f"did you mean {near}?" if near else f"sections are {', '.join(SECTIONS)}")


def similar_key(section: str, key: str) -> str:
    """`; did you mean ...?` for a setting that the section does not have."""
    if f"{section}.{key}" in _MOVED:
        return f"; it is {_MOVED[f'{section}.{key}']} now"
    owners = [name for name, model in SECTIONS.items() if key in model.model_fields]
    if owners:
        return f"; did you mean {owners[0]}.{key}?"
    near = nearest(key, SECTIONS[section].model_fields)
    if near:
        return f"; did you mean {section}.{near}?"
    return f"; {section} has {keys_of(section)}"


def override_hint(dotted: str, equals: str, text: str) -> str:
    """`; did you mean ...?` for an override without its section."""
    if not equals:
        return ""
    owners = [name for name, model in SECTIONS.items() if dotted in model.model_fields]
    return f"; did you mean {owners[0]}.{dotted}={text}?" if owners else ""


def similar_file(path: Path) -> str:
    """`; did you mean ...?` for a configuration file that cannot be read."""
    try:
        siblings = sorted(os.listdir(path.parent))
    except OSError:
        return f"; there is no folder {path.parent}"
    near = nearest(path.name, [name for name in siblings if name.endswith((".yaml", ".yml"))])
    return f"; did you mean {path.parent / near}?" if near and near != path.name else ""


def keys_of(section: str) -> str:
    """The section's settings, for messages."""
    return ", ".join(SECTIONS[section].model_fields)
