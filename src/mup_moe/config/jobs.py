"""Which cells share a process."""

from collections.abc import Collection, Iterable, Mapping

from mup_moe.config.cell import Cell


def jobs(figures: Mapping[str, Iterable[Cell]], lockstep: Collection[str]) -> dict[str, list[Cell]]:
    """The cells of all figures by the job that trains them, each in one; the job is named by what they share.

    Cells share a job when they differ in the axes `lockstep` only and the same figures show them, so
    that what one figure needs never waits for what another one does. Without axes, no cell shares.
    """
    shown_in: dict[Cell, list[str]] = {}
    for figure, cells in figures.items():
        for cell in cells:
            shown_in.setdefault(cell, []).append(figure)
    groups: dict[tuple[str, tuple[str, ...]], list[Cell]] = {}
    for cell, names in shown_in.items():
        groups.setdefault((cell.name(without=lockstep), tuple(names)), []).append(cell)
    result: dict[str, list[Cell]] = {}
    for (shared, _), cells in groups.items():
        # A second group of this name has other figures.
        others = sum(name.rpartition("~")[0] == shared or name == shared for name in result)
        result[f"{shared}~{others + 1}" if others else shared] = cells
    return result
