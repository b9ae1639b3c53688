"""Kinds of attention that a report compares: the settings of each, and the name of a row's from its settings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from model.presets import PRESETS

KINDS = ("softmax", "selective", "lagged", "sas")
RIVAL = "rival"
_LAG = 128
_EXPANSION = 2
# What names a kind; anything else in a row's settings, but for memory's, is said beside the name.
_OF_KINDS = re.compile(r"model\.(attention|simulated_heads|simulated_dim|selection|selection_lag|selection_gain)=")
_LAYERS = "model.layers="
_SETTING = re.compile(r"(memory|[a-z]+\.[a-z_]+)=")


def kind_settings(kind: str, preset: str) -> tuple[str, ...]:
    """`section.key=value` of a kind for a preset: "selective" is exact, "lagged" counts votes at multiples of 128,
    "sas" has twice the preset's heads, of the same width."""
    shape = PRESETS[preset]
    heads, width = _EXPANSION * shape["heads"], shape["head_dim"]
    selective = ("model.selection=true", "model.selection_gain=learned")
    return {
        "softmax": (),
        "selective": selective,
        "lagged": (*selective, f"model.selection_lag={_LAG}"),
        "sas": ("model.attention=sas", f"model.simulated_heads={heads}", f"model.simulated_dim={width}"),
    }[kind]


def settings_of(text: str) -> tuple[str, ...]:
    """The `section.key=value` of a row's settings, without what the rival's own choices are."""
    try:
        parts = shlex.split(text)
    except ValueError:  # a lone quotation mark
        parts = text.split()
    return tuple(part for part in parts if _SETTING.match(part))


def rival_memory(text: str) -> str:
    """What the rival's own choices say of its layers: "layers kept" or "layers recomputed"; "" if nothing."""
    found = re.search(r"\blayers=(kept|recomputed)\b", text)
    return f"layers {found[1]}" if found else ""


def kind_of(settings: Sequence[str], preset: str) -> str:
    """The name of a kind, short enough for a legend."""
    values = dict(setting.split("=", 1) for setting in settings)
    names = []
    attention = values.get("model.attention", "")
    if attention == "sas":
        heads = int(values.get("model.simulated_heads", 0)) / PRESETS[preset]["heads"]
        names.append(f"SAS r={heads:g}")
    elif attention:
        names.append(attention)
    if values.get("model.selection", "false").lower() == "true":
        lag = int(values.get("model.selection_lag", 1))
        names.append("selective" if lag == 1 else f"lagged {lag}")
    return ", ".join(names) or "softmax"


def other_settings(settings: Sequence[str]) -> tuple[str, ...]:
    """Those that neither name the kind nor belong to the `memory` section."""
    return tuple(one for one in settings if not _OF_KINDS.match(one) and not one.startswith("memory"))


def in_words(setting: str) -> str:
    """A setting as names and legends say it; one that has no words stays as it is."""
    if not setting.startswith(_LAYERS):
        return setting
    number = setting.removeprefix(_LAYERS)
    return f"{number} layer{'' if number == '1' else 's'}"


def changes_model(setting: str) -> bool:
    """Whether one of `other_settings` makes another model than the preset."""
    return setting.startswith("model.")
