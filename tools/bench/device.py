"""The --device of a benchmark."""

from __future__ import annotations

import typer


def pick_device(name: str) -> str:
    """ "cpu" or "cuda" for auto, cpu or cuda.

    Raises:
        typer.BadParameter: No such name, or CUDA is asked for and not there.
    """
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"--device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: no CUDA device is visible; use --device cpu or auto")
    return "cuda" if torch.cuda.is_available() and name != "cpu" else "cpu"
