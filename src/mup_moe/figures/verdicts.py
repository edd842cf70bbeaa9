"""Draws every test of every claim: its estimate with its interval, and its verdict."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mup_moe.analysis.names import panel_title
from mup_moe.analysis.runs import read_rows
from mup_moe.config.settings import ClaimsSettings, Config
from mup_moe.figures.dots import Column, draw_dots, excess_column
from mup_moe.figures.plotting import Figure, Line2D, sns
from mup_moe.figures.style import FAINT, INK, draw_legend
from mup_moe.files import UserError

SPREAD = 0.36  # of a row's height, which the points of one row share
CONTROL = "control (has to fail)"


class ClaimTest(NamedTuple):
    """The columns of claims/tests.csv that are drawn; `analysis.verdict.Test` explains them."""

    claim: str
    panel: str
    kind: str
    what: str
    expected: float
    estimate: float
    low: float
    high: float
    excess: float
    excess_low: float
    excess_high: float
    verdict: str


def draw(config: Config, _name: str, results: Path) -> Figure:
    """Draws the tests of a config's claims. Raises UserError if claims/tests.csv is missing or damaged."""
    path = results / "claims/tests.csv"
    tests = read_rows(path, ClaimTest)
    if not tests:
        raise UserError(f"{path} has no tests: delete it and run the same command again")
    return draw_rows(tests, config.claims)


def draw_rows(tests: Sequence[ClaimTest], settings: ClaimsSettings) -> Figure:
    """Draws the tests from top to bottom as given; those of one panel or quantity share a row."""
    rows: dict[str, list[ClaimTest]] = {}
    for test in tests:
        rows.setdefault(_label(test), []).append(test)
    places = [place + offset for place, row in enumerate(rows.values()) for offset in _offsets(len(row))]
    drawn = [test for row in rows.values() for test in row]
    slope = np.array([test.kind == "slope" for test in drawn])[:, None]
    over = np.array([(t.estimate - t.expected, t.low - t.expected, t.high - t.expected) for t in drawn])
    excesses = [(test.excess, test.excess_low, test.excess_high) for test in drawn]
    columns = []
    if not slope.all():
        band = (-settings.drift_margin, settings.drift_margin)
        columns.append(Column("drift", "octaves per octave", np.where(slope, np.nan, over).tolist(), band=band))
        columns.append(excess_column("excess", "nats", excesses, settings.excess_margin))
    if slope.any():
        band = (-settings.slope_margin, settings.slope_margin)
        columns.append(Column("slope", "minus prediction", np.where(slope, over, np.nan).tolist(), band=band))
    palette = sns.color_palette("colorblind")
    colors = {"replicated": palette[0], "inconclusive": palette[1], "not replicated": palette[3], CONTROL: FAINT}
    looks = [CONTROL if test.kind == "control" else test.verdict for test in drawn]
    tested = [row[0].kind != "control" for row in rows.values()]
    inks = [INK if is_test else FAINT for is_test in tested]
    figure = draw_dots(list(rows), columns, [colors[look] for look in looks], tested, places, inks)
    handles = {look: Line2D([], [], color=colors[look], marker="o", ms=4.5) for look in colors if look in looks}
    draw_legend(figure, handles, loc="outside upper center", handlelength=1.4)
    return figure


def _offsets(count: int) -> Sequence[float]:
    """Where the points of a row are, in parts of its height."""
    return np.linspace(-SPREAD / 2, SPREAD / 2, count).tolist() if count > 1 else [0.0]


def _label(test: ClaimTest) -> str:
    """What a test is about: its claim, and the panel or the quantity."""
    if test.kind == "slope":
        return f"{test.claim} {test.what.removeprefix('slope of ').split(', ')[0]}"
    return f"{test.claim} {panel_title(test.panel)}"
