"""Colours and type of the pictures, for light paper and for dark."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's colours, which people with any colour vision can tell apart; those of a seventh kind and more are only
# different.
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#882255", "#999933", "#6a51a3", "#8c564b"),
)
RIVAL_COLOUR = "#7b8794"
INK = "#22272e"
_TICKS = "#4b5563"
_EDGE = "#9aa3ad"
_GRID = "#e6e9ec"
_DARK = {
    INK: "#e6e8ea",
    _TICKS: "#b3bac2",
    _EDGE: "#68717b",
    _GRID: "#2c3238",
    "#0072b2": "#4aa8e0",
    "#882255": "#c2417f",
    "#6a51a3": "#9e8ad0",
    "#8c564b": "#b9857a",
    "#ffffff": "#16191d",
}

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": _EDGE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _TICKS,
    "ytick.color": _TICKS,
    "svg.fonttype": "path",
    "svg.hashsalt": "ringattn",
}


def darkened(svg: bytes) -> bytes:
    """The same picture for dark paper: ink, grid and the darkest line are swapped, the other colours serve both."""
    text = svg.decode("utf-8")
    for light, dark in _DARK.items():
        text = text.replace(light, dark)
    return text.encode("utf-8")
