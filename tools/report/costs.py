"""What cutting rows over more GPUs costs, in sentences, and in one figure that hides none."""

from __future__ import annotations

from collections.abc import Sequence

from tools.report.derive import COSTS, Row
from tools.report.names import short
from tools.report.yardsticks import is_no_cost, priced, yardstick_of

_SAME = {"cost_same_tokens": "same tokens per rank", "cost_same_length": "same length"}


def cost_in_short(rows: Sequence[Row]) -> tuple[str, str] | None:
    """(value, label) of the largest cost of the largest ring, softmax's if it has any; the label has all of its kind.

    Costs of a changed model count only where the preset as it is has none.
    """
    every = [(row, name) for name in COSTS for row in priced(rows, name)]
    every = [(row, name) for row, name in every if not row.changed] or every
    if not every:
        return None
    of_softmax, cp = max((row.attention == "softmax", row.cp) for row, _ in every)
    every = [(row, name) for row, name in every if (row.attention == "softmax", row.cp) == (of_softmax, cp)]
    row, name = max(every, key=lambda one: getattr(*one))
    on = f", {short(row.gpu)}" if len({other.gpu for other in rows if other.ok}) > 1 and row.gpu else ""
    label = f"cost of cp {cp} against cp 1 at the {_SAME[name]}: {row.tokens:,} tokens, {row.kind}{on}"
    label += f"{across(row, name)}{_of_runs(row, name)}"
    others = [
        f"{getattr(other, what):.1%} at the {_SAME[what]}, {other.tokens:,} tokens{across(other, what)}"
        for other, what in every
        if other.kind == row.kind and (other, what) != (row, name)
    ]
    told = "; ".join(others)
    return f"{getattr(row, name):.1%}", f"{label}. The largest; the others: {told}" if others else label


def costs(rows: Sequence[Row]) -> list[str]:
    """Of the first kind that has any: each length of each ring that has its yardstick."""
    found = {name: priced(rows, name) for name in COSTS}
    every = [row for row in rows if any(row in own for own in found.values())]
    kind = every[0].kind if every else ""
    several = len({row.gpu for row in rows}) > 1
    sentences = []
    for cp in sorted({row.cp for row in every if row.kind == kind}):
        told = []
        for name, words in COSTS.items():
            against = f" against cp 1 {words}"
            for row in sorted(found[name], key=lambda row: row.tokens):
                if (row.kind, row.cp) == (kind, cp):
                    where = f"at {row.tokens:,} tokens{f' on {short(row.gpu)}' if several else ''}{across(row, name)}"
                    told.append(f"{getattr(row, name):.1%}{against} ({where}{_of_runs(row, name)})")
                    against = ""  # said once
        sentences.append(f"Cost of cp {cp}, {kind}: {'; '.join(told)}.")
    return sentences


def _of_runs(row: Row, name: str) -> str:
    """What the cost would be of other runs of the row's case: speeds are as times are not."""
    runs, own = row.all_runs, row.step_seconds
    if runs is None or own is None:
        return ""
    least, most = (1 - (1 - getattr(row, name)) * own / seconds for seconds in (runs[0], runs[-1]))
    return f", {least:.1%} to {most:.1%} by its {len(runs)} runs"


def no_costs(sound: Sequence[Row]) -> list[str]:
    """What `costs` and the key figures leave out, and why: a sentence for each row of cp 1 that is no yardstick."""
    left_out: dict[tuple[int, str], list[tuple[Row, str]]] = {}
    for row in sound:
        for name in row.no_yardstick:
            left_out.setdefault(yardstick_of(row, name), []).append((row, name))
    sentences = []
    for (tokens, gpu), costs in left_out.items():
        shown = ", ".join(
            f"{getattr(row, name):.1%} for {row.point} against cp 1 {COSTS[name]}"
            for row, name in costs
            if is_no_cost(row, name)
        )
        sentences.append(
            f"Left out of the costs of cp, here, in the table and the plots: all {len(costs)} against cp 1 at "
            f"{tokens:,} tokens on {short(gpu)}. They would be {shown or 'far below 0 for a row that is left out'}: "
            "something else holds cp 1 back there, its host or settings of memory that it needs. So it is no yardstick "
            "of what cutting a row costs, and that of other kinds is none either, on whichever side of 0 their costs "
            "come out."
        )
    return sentences


def across(row: Row, name: str) -> str:
    """How the two rows of a comparison differ beside what is compared."""
    gpus = f", {short(row.gpu)} against {short(row.across[name])}" if name in row.across else ""
    memory = f", cp 1 with {row.other_memory[name]}" if name in row.other_memory else ""
    return f"{gpus}{memory}{', by different commits' if name in row.other_code else ''}"
