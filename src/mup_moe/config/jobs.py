"""Which cells share a process."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, pairwise
from typing import TypeVar

from mup_moe.config.cell import AXES, Cell
from mup_moe.config.settings import MOST_CELLS_PER_JOB

T = TypeVar("T")


def even_parts(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """The items in as few parts as hold `most` each, of sizes that differ by one at most: 7 by 6 are 4 and 3."""
    count = math.ceil(len(items) / most) if items else 0
    bounds = [round(part * len(items) / count) for part in range(count + 1)] if count else []
    return [items[first:last] for first, last in pairwise(bounds)]


def jobs(
    figures: Mapping[str, Collection[Cell]], lockstep: Collection[str], cells_per_job: int = 1
) -> dict[str, list[Cell]]:
    """The cells of all figures by the job that trains them, each in one; the job is named by what they share.

    Cells share a job when they differ in the axes `lockstep` only and the same figures show them, so
    that what one figure needs never waits for what another one does. Without axes, no cell shares.
    Jobs of fewer than `cells_per_job` cells are put together, as long as their cells have the set-up,
    the parametrizations and the figures in common. Cells that are more than MOST_CELLS_PER_JOB are cut into
    several jobs. They come in the order of the figures, which changes
    nothing else of them: a job's name means the same cells whichever file lists a figure first.
    """
    place = {cell: number for number, cell in enumerate(dict.fromkeys(chain.from_iterable(figures.values())))}
    shown_in: dict[Cell, list[str]] = {}
    for figure in sorted(figures):
        for cell in figures[figure]:
            shown_in.setdefault(cell, []).append(figure)
    curves: dict[tuple[str, ...], dict[str, list[Cell]]] = {}
    for cell, names in shown_in.items():
        row = "" if "parametrization" in lockstep else cell.parametrization
        alike = curves.setdefault((cell.setup, row, *names), {})
        alike.setdefault(cell.name(without=lockstep), []).append(cell)
    result: dict[str, list[Cell]] = {}
    named: Counter[str] = Counter()
    for alike in curves.values():
        parts = list(chain.from_iterable(map(_cut, alike.values())))
        for cells in _put_together(parts, cells_per_job):
            differing = (axis for axis in AXES if len({getattr(cell, axis) for cell in cells}) > 1)
            shared = cells[0].name(without={*lockstep, *differing})
            named[shared] += 1
            # A second one of this name has other figures, or other values of what differs.
            result[shared if named[shared] == 1 else f"{shared}~{named[shared]}"] = cells
    return dict(sorted(result.items(), key=lambda job: min(place[cell] for cell in job[1])))


def _cut(curve: Sequence[Cell]) -> Sequence[Sequence[Cell]]:
    """A curve in parts that a job takes."""
    if len(curve) <= MOST_CELLS_PER_JOB:
        return [curve]
    # By seed: the cells of one that is added later join the last part, and the others have nothing to do.
    return even_parts(sorted(curve, key=lambda cell: cell.seed), MOST_CELLS_PER_JOB)


def _put_together(curves: Sequence[Sequence[Cell]], least: int) -> list[list[Cell]]:
    """Neighbouring curves in lists of at least so many cells each; what is left over at the end joins the last.

    None of the lists is longer than a job takes, even if that leaves another one short.
    """
    together: list[list[Cell]] = []
    left = sum(map(len, curves))
    for curve in curves:
        short = bool(together) and (len(together[-1]) < least or left < least)
        if short and len(together[-1]) + len(curve) <= MOST_CELLS_PER_JOB:
            together[-1] += curve
        else:
            together.append(list(curve))
        left -= len(curve)
    return together
