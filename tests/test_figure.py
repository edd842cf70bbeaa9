import itertools
import json
import math
import re
import zlib
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import CONFIG, spec_of
from mup_moe.__main__ import main
from mup_moe.analysis.optima import OptimumRow, optimum_rows, read_optima
from mup_moe.analysis.runs import figure_curves, read_runs
from mup_moe.config.settings import AnalysisSettings
from mup_moe.figures import composition
from mup_moe.figures.panel import summary
from mup_moe.figures.plotting import matplotlib
from mup_moe.figures.style import drawing_style, new_figure
from mup_moe.figures.transfer import draw_content, read_content, shared_scale
from mup_moe.files import UserError, write_csv

ANALYSIS = {"loss": "train_loss", "fit_points": 5, "confidence": 0.95, "resamples": 200, "foreign_cells": "stop"}


def make_request(parametrizations=("sp", "mup"), widths=(32, 64, 128), seeds=1, architecture="moe"):
    axes = {
        "architecture": [architecture],
        "parametrization": list(parametrizations),
        "width": list(widths),
        "experts": [8 if architecture == "moe" else 1],
        "granularity": [1],
        "learning_rate": [f"2^{octave}" for octave in range(-11, -3)],
        "seed": list(range(seeds)),
    }
    return {
        "setup": "small",
        "panel": "parametrization",
        "curve": "width",
        "base": 32,
        "axes": axes,
        "analysis": ANALYSIS,
    }


def leaving_out(request):
    """Returns the request of a sweep that may lack cells."""
    return request | {"analysis": ANALYSIS | {"foreign_cells": "leave_out"}}


def over(axis, values, base, parametrizations=("simplep", "mup")):
    """Returns the request of a figure over an axis other than width."""
    request = make_request(parametrizations, (64,))
    return request | {"curve": axis, "base": base, "axes": request["axes"] | {axis: list(values)}}


def synthetic_loss(cell, noise):
    """SP drifts down by 0.9 octaves per doubling and muP does not; both diverge far above their optimum."""
    doublings = math.log2(cell.width / 32)
    distance = math.log2(cell.learning_rate) + 7 + (0.9 * doublings if cell.parametrization == "sp" else 0)
    return math.nan if distance > 2.6 else 4.2 - 0.22 * doublings + 0.07 * distance**2 + noise


def make_tables(results, request, loss=synthetic_loss, name="f"):
    """Writes runs and optima of a figure; a cell with a loss of None is left out."""
    folder = results / name
    folder.mkdir(exist_ok=True)
    cells = spec_of(request).figure.cells()
    noise = np.random.default_rng(0).normal(0, 0.01, len(cells))
    losses = [loss(cell, float(draw)) for cell, draw in zip(cells, noise, strict=True)]
    rows = [(cell.id, loss, loss) for cell, loss in zip(cells, losses, strict=True) if loss is not None]
    runs = pd.DataFrame(rows, columns=["cell", "train_loss", "valid_loss"])
    runs["status"] = np.where(runs["train_loss"].isna(), "diverged", "finished")
    runs.to_csv(folder / "runs.csv", index=False)
    write_optima(folder, name, request)


def write_optima(folder, name, request):
    """Writes the optima of a figure's runs.csv."""
    found = optimum_rows(read_runs(folder / "runs.csv"), name, spec_of(request))
    write_csv(folder / "optima.csv", OptimumRow._fields, found)


def config_of(requests, **sections):
    """Returns a config with the figures of these requests, by name, and nothing else to draw."""
    figures = {name: spec_of(request).figure for name, request in requests.items()}
    rules = [rule for figure in figures.values() for rule in figure.axes.parametrization]
    (analysis,) = {json.dumps(request["analysis"]): request["analysis"] for request in requests.values()}.values()
    empty = {"compositions": {}, "trends": {}, "probes": {}, "claims": replace(CONFIG.claims, table={})}
    table = dict.fromkeys(rules, CONFIG.parametrizations["sp"]) | CONFIG.parametrizations
    parts = {"figures": figures, "parametrizations": table, "analysis": AnalysisSettings(**analysis)}
    return replace(CONFIG, **empty | parts | sections)


def call(command, name, results, config):
    """Calls a command on a figure of a config."""
    path = results / "config.json"
    path.write_text(json.dumps(asdict(config)))
    return main([command, name, "--config", str(path), "--results", str(results)])


def draw(folder, request):
    """Draws the figure `f` from the tables in the folder of this name."""
    return call("figure", "f", folder, config_of({"f": request}))


def pdf_text(data):
    """Returns the PDF with its streams decompressed."""
    parts = [data]
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", data, re.DOTALL):
        try:
            parts.append(zlib.decompress(stream))
        except zlib.error:
            continue
    return b"\n".join(parts)


def test_a_figure_of_three_seeds_embeds_its_fonts_and_is_reproducible(tmp_path):
    request = make_request(("sp", "simplep", "mup"), seeds=3)
    make_tables(tmp_path, request)
    assert draw(tmp_path, request) == 0
    first = {suffix: (tmp_path / f"f.{suffix}").read_bytes() for suffix in ("pdf", "png")}
    assert draw(tmp_path, request) == 0
    assert {suffix: (tmp_path / f"f.{suffix}").read_bytes() for suffix in first} == first
    pdf = pdf_text((tmp_path / "f.pdf").read_bytes())
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert b"CreationDate" not in pdf
    with Image.open(tmp_path / "f.png") as image:
        assert image.size[0] == 1400
        assert image.info["dpi"] == pytest.approx((200, 200), rel=1e-3)
        assert "Software" not in image.info


@pytest.mark.parametrize(
    ("request_", "loss"),
    [
        (make_request(), lambda *_: math.nan),
        (make_request(), lambda cell, noise: math.nan if cell.parametrization == "sp" else synthetic_loss(cell, noise)),
        (make_request(), lambda *_: 3.0),
        (make_request(("mup",), (32,)), synthetic_loss),
        (make_request(("sp", "simplep", "mup", "experts-only", "mine"), (32, 64), 2), synthetic_loss),
        (leaving_out(make_request()), lambda *_: None),
        (leaving_out(make_request()), lambda cell, noise: None if cell.width == 32 else synthetic_loss(cell, noise)),
        (leaving_out(make_request()), lambda cell, _: None if cell.parametrization == "sp" else math.nan),
        (leaving_out(make_request(seeds=2)), lambda cell, noise: None if cell.seed else synthetic_loss(cell, noise)),
    ],
    ids=[
        *("all diverged", "a panel diverged", "flat", "one curve", "five panels"),
        *("all left out", "the base left out", "left out or diverged", "a seed left out"),
    ],
)
def test_odd_figures_still_draw(tmp_path, request_, loss):
    make_tables(tmp_path, request_, loss)
    assert draw(tmp_path, request_) == 0


def test_missing_cells_are_marked_differently_from_diverged_cells(tmp_path):
    request = leaving_out(make_request(("mup",)))
    legends = {}
    for kind, loss in (("diverged", math.nan), ("missing", None)):
        best = lambda cell, noise, loss=loss: loss if cell.learning_rate == 2**-7 else 4 + noise  # noqa: E731
        make_tables(tmp_path, request, best)
        figure = drawn(tmp_path, request)
        legends[kind] = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert "diverged" in legends["diverged"] - legends["missing"]
    assert "missing" in legends["missing"] - legends["diverged"]


def test_a_panel_without_any_remaining_cell_says_so(tmp_path):
    request = leaving_out(make_request())
    make_tables(tmp_path, request, lambda cell, _: None if cell.width > 32 else math.nan)
    _, rows = parts(tmp_path, request)
    assert "missing" in summary(rows["sp"], 32)


def test_optima_of_another_config_are_refused(tmp_path, capsys):
    make_tables(tmp_path, make_request())
    assert draw(tmp_path, make_request(widths=(32, 64))) == 1
    assert "optima.csv" in capsys.readouterr().err


def parts(folder, request):
    parsed = spec_of(request)
    curves = figure_curves(read_runs(folder / "f/runs.csv"), parsed)
    return curves, read_optima(folder / "f/optima.csv", "f", parsed)


def drawn(folder, request, letter=""):
    """Returns the matplotlib figure, laid out."""
    content = read_content(config_of({"f": request}), "f", folder)
    with drawing_style():
        figure = new_figure(*content.size)
        draw_content(figure, content, content.size[0], letter)
        figure.draw_without_rendering()
    return figure


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_a_cliff_does_not_squash_the_scale(tmp_path):
    request = make_request()
    make_tables(tmp_path, request)
    calm = shared_scale(*parts(tmp_path, request), published={})

    def cliff(cell, noise):
        loss = synthetic_loss(cell, noise)
        return 500.0 if math.isnan(loss) else loss

    make_tables(tmp_path, request, cliff)
    steep = shared_scale(*parts(tmp_path, request), published={})
    assert steep.top == pytest.approx(calm.top, abs=0.2)
    curves, rows = parts(tmp_path, request)
    assert all(row.best_loss < steep.top for of_panel in rows.values() for row in of_panel)
    assert steep.lanes == len(curves["mup"])


def test_a_figure_without_strays_has_no_strip(tmp_path):
    request = make_request()
    make_tables(tmp_path, request, lambda cell, noise: 3 + 0.01 * (math.log2(cell.learning_rate) + 7) ** 2 + noise / 9)
    scale = shared_scale(*parts(tmp_path, request), published={})
    assert scale.lanes == 0
    assert scale.upper == scale.top


def test_the_summary_shows_drift_and_regret(tmp_path):
    request = make_request()
    make_tables(tmp_path, request)
    _, rows = parts(tmp_path, request)
    first, second = summary(rows["sp"], 32).split("\n")
    assert re.fullmatch(r"drift -0\.[89]\d \[-[01]\.\d\d, [-+]\d\.\d\d\]", first.replace("\N{MINUS SIGN}", "-"))
    assert re.fullmatch(r"regret 0\.\d{3} nats at width 128", second)
    lost = [row._replace(regret=0.25, regret_at_least=True, drift=-0.001, drift_low=math.nan) for row in rows["sp"]]
    assert summary(lost, 32) == "drift +0.00\nregret ≥ 0.250 nats at width 128"


@pytest.mark.parametrize(
    ("regrets", "line"),
    [
        ((0.2, 0.0, 0.1), "regret 0.200 nats at 2 experts"),
        ((0.1, 0.0, 0.1), "regret 0.100 nats at 32 experts"),
        ((0.1, 0.0, math.nan), "regret 0.100 nats at 2 experts"),
    ],
)
def test_with_the_base_in_the_middle_the_more_costly_end_counts(tmp_path, regrets, line):
    request = over("experts", (2, 8, 32), 8)
    make_tables(tmp_path, request)
    _, rows = parts(tmp_path, request)
    given = [row._replace(regret=regret) for row, regret in zip(rows["mup"], regrets, strict=True)]
    assert summary(given, 8).split("\n")[1] == line


def test_a_dense_figure_says_so(tmp_path):
    request = make_request(architecture="dense")
    make_tables(tmp_path, request)
    assert titles(drawn(tmp_path, request)) == ["SP, dense", "μP, dense"]


def test_panels_of_another_axis_name_their_parametrization(tmp_path):
    request = make_request(("mup",)) | {"panel": "experts"}
    make_tables(tmp_path, request)
    assert titles(drawn(tmp_path, request)) == ["8 experts, μP"]


@pytest.mark.parametrize("parametrizations", [("sp", "simplep", "mup"), ("sp", "simplep", "mup", "experts-only")])
def test_summaries_do_not_overlap(tmp_path, parametrizations):
    request = over("granularity", (1, 2, 4, 8, 16), 1, parametrizations)
    make_tables(tmp_path, request)
    figure = drawn(tmp_path, request)
    summaries = [
        text.get_window_extent() for text in figure.findobj(matplotlib.text.Text) if "regret" in text.get_text()
    ]
    assert len(summaries) == len(parametrizations)
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in summaries)
    for a, b in itertools.combinations(summaries, 2):
        assert not a.overlaps(b)


def compose(folder, requests):
    """Makes a folder per figure; returns the config of these figures and of the composition `both`."""
    for name, request in requests.items():
        make_tables(folder, request, name=name)
    return config_of(requests, compositions={"both": tuple(requests)})


def test_a_composition_draws_its_figures_below_each_other(tmp_path):
    requests = {"a": over("experts", (2, 8, 32), 8), "b": over("granularity", (1, 2, 4), 1)}
    with drawing_style():
        figure = composition.draw(compose(tmp_path, requests), "both", tmp_path)
        figure.draw_without_rendering()
    above, below = figure.subfigs
    legends = [part.legends[0].get_texts() for part in (above, below)]
    assert [[text.get_text() for text in of_part] for of_part in legends] == [
        ["(a) number of experts", "2", "8 (base)", "32"],
        ["(b) granularity", "1 (base)", "2", "4"],
    ]
    assert titles(above) == titles(below) == ["simpleP", "μP"]
    tops = [max(axes.get_tightbbox().y1 for axes in part.axes) for part in (above, below)]
    bottoms = [min(axes.get_tightbbox().y0 for axes in part.axes) for part in (above, below)]
    assert tops[1] < bottoms[0]


def test_a_composition_is_reproducible(tmp_path):
    requests = {"a": over("experts", (2, 8), 8), "b": make_request(architecture="dense")}
    config = compose(tmp_path, requests)
    assert call("figure", "both", tmp_path, config) == 0
    first = {suffix: (tmp_path / f"both.{suffix}").read_bytes() for suffix in ("pdf", "png")}
    assert call("figure", "both", tmp_path, config) == 0
    assert {suffix: (tmp_path / f"both.{suffix}").read_bytes() for suffix in first} == first


def test_a_truncated_table_of_runs_names_the_missing_cell_and_what_to_delete(tmp_path):
    request = make_request()
    make_tables(tmp_path, request)
    parsed = spec_of(request)
    last = parsed.figure.cells()[-1].id
    with pytest.raises(UserError, match=f"lack cell {re.escape(last)}, .*: delete its runs.csv"):
        figure_curves(read_runs(tmp_path / "f/runs.csv").iloc[:-1], parsed)
