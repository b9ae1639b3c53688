"""Draw a plan: who holds which tokens, and which rank computes which block at which hop.

python -m tools.draw_plan --cp 4 --seq-len 32 --layout zigzag --out docs/ring.svg
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

import ringattn
from ringattn.mask import Relation

# Okabe and Ito's colours, told apart by colour-blind readers; more ranks repeat them.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="file to write: .svg, .png or .pdf")],
    cp: Annotated[int, typer.Option(help="ranks in the ring")] = 4,
    seq_len: Annotated[int, typer.Option(help="tokens of the row; a few dozen can be read")] = 32,
    layout: Annotated[str, typer.Option(help="contiguous, zigzag or striped")] = "zigzag",
    window: Annotated[int | None, typer.Option(help="sliding window (tokens)")] = None,
    documents: Annotated[str | None, typer.Option(help="document starts, such as 0,10,32")] = None,
) -> None:
    """Draw the ring and its table of blocks from the Plan that attention itself uses."""
    starts = None if documents is None else tuple(int(start) for start in documents.split(","))
    try:
        plan = ringattn.Plan(seq_len, cp, layout=layout, window=window, documents=starts)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    figure = draw(plan)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, bbox_inches="tight", dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)


def draw(plan: ringattn.Plan) -> Any:
    """A matplotlib figure: left the ring with each rank's tokens, right the T x T table of (rank, hop)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2))
    ring, table = figure.subplots(1, 2, width_ratios=[1, 1.1])
    _draw_ring(ring, plan)
    _draw_table(table, plan)
    return figure


def owners(plan: ringattn.Plan) -> dict[tuple[int, int], tuple[int, int]]:
    """(query, key) -> (rank, hop) that computes it, for every visible pair."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for rank in range(plan.cp_size):
        queries = plan.positions(rank).tolist()
        for hop in range(plan.num_hops):
            source = plan.source(rank, hop)
            keys = plan.positions(source).tolist()
            for block in plan.blocks(rank, source):
                rows, columns = queries[block.q_start : block.q_stop], keys[block.k_start : block.k_stop]
                visible = plan.mask.visible(
                    plan.positions(rank)[block.q_start : block.q_stop],
                    plan.positions(source)[block.k_start : block.k_stop],
                )
                for i, row in enumerate(rows):
                    for j, column in enumerate(columns):
                        if block.relation is Relation.FULL or visible[i, j]:
                            found[row, column] = (rank, hop)
    return found


def _draw_ring(axes: Any, plan: ringattn.Plan) -> None:
    from matplotlib.patches import FancyArrowPatch

    axes.set_title("keys and values travel, queries stay", fontsize=11)
    angles = [math.pi / 2 - 2 * math.pi * rank / plan.cp_size for rank in range(plan.cp_size)]
    points = [(math.cos(angle), math.sin(angle)) for angle in angles]
    for rank, (x, y) in enumerate(points):
        chunks = ", ".join(_chunk_name(chunk) for chunk in plan.chunks(rank))
        box = {"boxstyle": "round,pad=0.5", "facecolor": _COLOURS[rank % len(_COLOURS)], "edgecolor": "none"}
        label = f"rank {rank}\n{chunks}"
        axes.text(x, y, label, ha="center", va="center", color="white", fontsize=10, weight="bold", bbox=box, zorder=3)
        if plan.cp_size > 1:
            arrow = FancyArrowPatch(
                points[rank],
                points[(rank + 1) % plan.cp_size],
                connectionstyle="arc3,rad=-0.25",
                arrowstyle="-|>",
                mutation_scale=18,
                linewidth=1.6,
                color="#555555",
                shrinkA=42,
                shrinkB=42,
            )
            axes.add_patch(arrow)
    axes.text(
        0, 0, f"{plan.num_hops} hops,\nthe first is local", ha="center", va="center", fontsize=10, color="#333333"
    )
    axes.set(xlim=(-1.5, 1.5), ylim=(-1.35, 1.35), aspect="equal")
    axes.axis("off")


def _draw_table(axes: Any, plan: ringattn.Plan) -> None:
    from matplotlib.colors import to_rgb

    pairs = owners(plan)
    picture = [[(1.0, 1.0, 1.0)] * plan.seq_len for _ in range(plan.seq_len)]
    for (query, key), (rank, _) in pairs.items():
        picture[query][key] = to_rgb(_COLOURS[rank % len(_COLOURS)])
    axes.imshow(picture, interpolation="nearest")
    if plan.seq_len <= 48:
        for (query, key), (_, hop) in pairs.items():
            axes.text(key, query, str(hop), ha="center", va="center", fontsize=160 / plan.seq_len, color="white")
    axes.set_xlabel("key position")
    axes.set_ylabel("query position")
    axes.set_title("colour: the rank that computes the pair; number: the hop", fontsize=11)


def _chunk_name(chunk: range) -> str:
    last = chunk[-1]
    return f"{chunk.start}-{last}" if chunk.step == 1 else f"{chunk.start}, {chunk.start + chunk.step} ... {last}"


if __name__ == "__main__":
    app()
