"""For any grid and values, every axis has labels that are true, within its limits, and do not overlap."""

import itertools
import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from mup_moe.analysis.slopes import columns_over, slopes
from mup_moe.config.cell import LearningRate
from mup_moe.figures import composition
from mup_moe.figures.activations import draw_activations
from mup_moe.figures.covariance import draw_covariance
from mup_moe.figures.plotting import Text
from mup_moe.figures.style import drawing_style
from test_figure import compose, drawn, make_request, make_tables, over
from test_names import names

few = settings(
    deadline=None,
    max_examples=20,
    phases=[Phase.explicit, Phase.generate],  # shrinking would draw figures for minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def plain(text):
    """Returns the number that a label shows."""
    return float(text.replace("\N{MINUS SIGN}", "-"))


def log2(text):
    """Returns the position on a log2 axis of the number that a label shows."""
    power = re.fullmatch(r"\$2\^\{(-?\d+)\}\$", text)
    return int(power[1]) if power else math.log2(plain(text))


def check_names(figure):
    """Checks that titles and legends are on the page, do not overlap, and cover no panel."""
    legends = [legend for part in (figure, *figure.subfigs) for legend in part.legends]
    legends += [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    titles = [axes.yaxis.label for axes in figure.axes if axes.get_ylabel()]
    for axes in figure.axes:
        said = {axes.get_title(), axes.get_title(loc="left")} - {""}
        titles += [text for text in axes.get_children() if isinstance(text, Text) and text.get_text() in said]
    # Except for half a pixel, by which a title's descenders reach into the line below.
    boxes = [part.get_window_extent().padded(-0.5) for part in [*legends, *titles]]
    assert all((figure.bbox.min <= box.min).all() and (box.max <= figure.bbox.max).all() for box in boxes)
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)
    texts = [text.get_window_extent() for axes in figure.axes for text in axes.texts if text.get_text()]
    panels = [axes.get_window_extent() for axes in figure.axes]
    assert not any(box.overlaps(other) for box in boxes for other in texts + panels)


def check(figure, expected):
    """Checks all labels, titles and legends of a figure.

    expected: axes -> for x and for y, the least number of labels and a function from a label's text to its place.
    """
    figure.draw_without_rendering()
    check_names(figure)
    found = []
    for axes in figure.axes:
        for axis, side, (least, place_of) in zip(
            (axes.xaxis, axes.yaxis), ("labelbottom", "labelleft"), expected(axes), strict=True
        ):
            if not axis.get_tick_params().get(side, True):
                continue  # shared with the panel below or to the left
            low, high = axis.get_view_interval()
            ticks = [(tick.get_loc(), tick.label1) for tick in axis.get_major_ticks() if tick.label1.get_text()]
            ticks = [(place, label) for place, label in ticks if low <= place <= high]
            assert len(ticks) >= least
            assert axis.get_offset_text().get_text() == ""
            for place, label in ticks:
                assert place_of(label.get_text()) == pytest.approx(place, abs=(high - low) / 100)
            found += [label for _, label in ticks]
    boxes = [label.get_window_extent() for label in found]
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    for (a, label), (b, other) in itertools.combinations(zip(boxes, found, strict=True), 2):
        assert not a.overlaps(b), (label, other)


@st.composite
def grids(draw):
    """Draws learning rates as a config spells them: close together or far apart, powers of 2 or not."""
    span = draw(st.sampled_from([1e-5, 1e-3, 0.05, 0.5, 0.9, 1.1, 1.9, 3.3, 8.0, 60.0]))
    start = draw(st.floats(-90, 30))
    parts = draw(st.lists(st.floats(0, 1), max_size=6))
    rates = {f"{2 ** (start + span * part):.9g}" for part in (0, 1, *parts)}
    return sorted(rates, key=float)[: draw(st.sampled_from([1, 2, 9]))]


@few
@given(
    grids(),
    st.sampled_from([1, 2, 3, 5]),
    st.sampled_from([0.0, 1e-3, 3.0, 11.0, 1e4, 123456.0, 1e30, math.nan]),
    st.sampled_from([0.0, 1e-9, 0.1, 40.0]),
)
@example(["0.0014", "0.00145"], 3, 3.0, 0.1)
@example(["0.0014"], 2, 3.0, 0.0)
@example(["0.00140000", "0.00140001"], 3, 3.0, 0.1)
@example(["1e-05", "1.00001e-05"], 3, 3.0, 0.1)
@example(["1e-4", "3e-4", "1e-3"], 3, 3.0, 0.1)
@example(["2^-40", "2^20"], 3, 1e30, 0.1)
@example(["0.0014", "0.00145"], 3, math.nan, 0.1)
def test_a_figure_has_labels_whatever_the_learning_rates_and_losses(tmp_path, rates, panels, level, bend):
    request = make_request(("sp", "simplep", "mup", "experts-only", "mine")[:panels], (32, 64))
    request["axes"]["learning_rate"] = rates
    places = [math.log2(LearningRate(rate)) for rate in rates]
    middle = places[len(places) // 2]
    make_tables(tmp_path, request, lambda cell, _: level + bend * (math.log2(cell.learning_rate) - middle) ** 2)
    figure = drawn(tmp_path, request)
    with drawing_style():
        check(figure, lambda _: ((min(2, len(rates)), log2), (0 if math.isnan(level) else 2, plain)))
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert all(low < place < high for place in places)


def probe_values(widths, steps, quantities, power, rules=("sp", "mup")):
    """Makes values of two seeds, where each quantity is a power of the width."""
    rows = [
        (rule, width, seed, step, quantity, "", width**power * (1 + seed / 1e3))
        for rule, width, seed, step, quantity in itertools.product(rules, widths, (0, 1), steps, quantities)
    ]
    return pd.DataFrame(rows, columns=columns_over("width"))


QUANTITIES = ("inner product", "cosine", "router logits", "logits", "norm")
WIDTHS = st.lists(st.integers(1, 2**20), min_size=1, max_size=12, unique=True) | st.sampled_from(
    [[64], [40, 48], [96, 100], [64, 66, 1024], [1048000, 1048576], [8, 16, 32, 64, 128, 256, 512, 1024]]
)
STEPS = st.lists(st.integers(0, 10**6), min_size=1, max_size=30, unique=True).map(sorted)


@few
@given(WIDTHS, STEPS, st.sampled_from([0, 0.001, -0.5, 1, 20]), st.booleans(), st.booleans())
@example([96, 100], [0, 1], 0, True, False)
@example([96, 100], [0, 1], 0, False, True)
@example([64, 128], list(range(0, 1001, 100)), 0, True, False)
@example([64, 128], list(range(0, 25001, 2500)), 0, True, False)
@example([1855, 465, 147993], [*range(5), 1710, 2554, 52835, 183887, 359780, 715816], 0, False, False)
@example([1048000, 1048576], [508, 100000], 0, False, False)
@example([1048000, 1048576], [1000000, 2000000], 20, False, False)
def test_a_probe_has_labels_whatever_the_widths_steps_and_values(widths, steps, power, activations, lost):
    values = probe_values(widths, steps, QUANTITIES, power)
    if lost:  # one quantity has no positive value, another one none at the smallest width
        values.loc[values["quantity"] == "cosine", "value"] = np.nan
        values.loc[(values["quantity"] == "norm") & (values["width"] == min(widths)), "value"] = 0
    found = list(slopes(values, 0.95))
    x = min(2, len(widths)), log2
    by_step = min(2, len(steps)), lambda text: steps.index(int(text))
    with drawing_style():
        figure = (draw_activations if activations else draw_covariance)(values, found)
        check(figure, lambda axes: (by_step, (2, plain)) if axes.get_xlabel() == "steps taken" else (x, (2, log2)))


@few
@given(st.lists(names, min_size=1, max_size=6, unique=True))
@example(["mup-router-lr-sqrt-fan-in", "mup-router-init-one", "mup-router-as-hidden"])
@example(["mup", "simplep", "experts-only", "sp", "router-half", "router-lr-sqrt"])
def test_names_of_rules_do_not_overlap_in_probes_and_figures(tmp_path, rules):
    values = probe_values((64, 128), (0, 1), QUANTITIES, -0.5, rules)
    found = list(slopes(values, 0.95))
    request = make_request(rules, (32, 64))
    make_tables(tmp_path, request)
    with drawing_style():
        for figure in (draw_activations(values, found), draw_covariance(values, found), drawn(tmp_path, request)):
            figure.draw_without_rendering()
            check_names(figure)


@pytest.mark.parametrize(("panel", "values"), [("experts", (8, 16, 32)), ("granularity", (1, 2, 4))])
@pytest.mark.parametrize("rule", ["experts-only", "mup", "a-rule-that-changes-the-router-s-learning-rate"])
def test_titles_of_panels_over_another_axis_do_not_overlap(tmp_path, panel, values, rule):
    request = make_request((rule,), (32, 64)) | {"panel": panel}
    request["axes"][panel] = list(values)
    make_tables(tmp_path, request)
    figure = drawn(tmp_path, request)
    with drawing_style():
        check_names(figure)
    titles = [" ".join(axes.get_title(loc="left").split()) for axes in figure.axes]
    assert len(set(titles)) == len(values)


@pytest.mark.parametrize("rules", [("sp",), ("sp", "mup"), ("sp", "mup", "simplep")])
@pytest.mark.parametrize("seeds", [1, 3, 10])
def test_the_legend_of_all_marks_is_on_the_page(tmp_path, rules, seeds):
    def loss(cell, _):
        place = math.log2(cell.learning_rate)
        if place > -5:
            return math.nan
        return 3 - 0.1 * place if cell.parametrization == "mup" else 3 + 0.1 * (place + 7) ** 2 + 9 * (place < -8)

    request = make_request(rules, (32, 64), seeds) | {"reference": "published.csv"}
    make_tables(tmp_path, request, loss)
    points = "sp,32,2^-6,3.1\nsp,32,2^-7,9.9\n"
    (tmp_path / "f/reference.csv").write_text(f"parametrization,width,learning_rate,published_loss\n{points}")
    figure = drawn(tmp_path, request)
    with drawing_style():
        check_names(figure)
    assert len(figure.legends[-1].get_texts()) >= 5


def test_titles_and_legends_of_a_composition_do_not_overlap(tmp_path):
    requests = [over("experts", [2**power for power in range(14)], 8), make_request(("mup",)) | {"panel": "experts"}]
    requests[1]["axes"] |= {"experts": [8, 16, 32], "parametrization": ["experts-only"]}
    with drawing_style():
        figure = composition.draw(compose(tmp_path, dict(zip("ab", requests, strict=True))), "both", tmp_path)
        figure.draw_without_rendering()
        check_names(figure)
