"""Groups cells into jobs, which share a process."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, pairwise
from typing import TypeVar

from mup_moe.config.cell import AXES, Cell
from mup_moe.config.settings import MOST_CELLS_PER_JOB

T = TypeVar("T")


def even_parts(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """Splits items into as few parts as possible, of at most `most` items and nearly equal size: 7 by 6 is 4 and 3."""
    count = math.ceil(len(items) / most) if items else 0
    bounds = [round(part * len(items) / count) for part in range(count + 1)] if count else []
    return [items[first:last] for first, last in pairwise(bounds)]


def jobs(
    figures: Mapping[str, Collection[Cell]], lockstep: Collection[str], cells_per_job: int = 1
) -> dict[str, list[Cell]]:
    """Returns the cells of all figures by job; each cell is in one job, which is named after what its cells share.

    Cells share a job if they differ only in the axes `lockstep` and the same figures show them, so that one figure
    never waits for cells that only another one needs. Without axes, every job has one cell. Jobs of fewer than
    `cells_per_job` cells are put together if their cells have the same set-up, figures and, unless it is an axis of
    `lockstep`, parametrization. More than MOST_CELLS_PER_JOB cells are split into several jobs. The jobs come in the
    order of the figures. That order affects nothing else: a job's name means the same cells whichever figure comes
    first.
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
            # A second job with this name has other figures, or other values on the axes that differ.
            result[shared if named[shared] == 1 else f"{shared}~{named[shared]}"] = cells
    return dict(sorted(result.items(), key=lambda job: min(place[cell] for cell in job[1])))


def _cut(curve: Sequence[Cell]) -> Sequence[Sequence[Cell]]:
    """Splits a curve into parts that fit a job."""
    if len(curve) <= MOST_CELLS_PER_JOB:
        return [curve]
    # Sorted by seed: the cells of a seed that is added later are in the last parts, and other jobs have nothing to do.
    return even_parts(sorted(curve, key=lambda cell: cell.seed), MOST_CELLS_PER_JOB)


def _put_together(curves: Sequence[Sequence[Cell]], least: int) -> list[list[Cell]]:
    """Puts neighboring curves together in lists of at least `least` cells; the remainder joins the last list.

    No list has more cells than a job may have, even if that leaves another one short.
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
