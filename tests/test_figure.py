import json
import math
import re
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mup_moe.__main__ import main
from mup_moe.analysis.figure import shared_scale
from mup_moe.analysis.optima import read_optima
from mup_moe.analysis.panel import summary
from mup_moe.analysis.request import FigureRequest
from mup_moe.analysis.runs import figure_curves, read_runs

ANALYSIS = {"loss": "train_loss", "fit_points": 5, "confidence": 0.95, "resamples": 200}


def make_request(parametrizations=("sp", "mup"), widths=(32, 64, 128), seeds=1):
    axes = {
        "architecture": ["moe"],
        "parametrization": list(parametrizations),
        "width": list(widths),
        "experts": [8],
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


def synthetic_loss(cell, noise):
    """SP drifts down by 0.9 octaves a doubling, muP stays; both diverge above their optimum."""
    doublings = math.log2(cell.width / 32)
    distance = math.log2(cell.learning_rate) + 7 + (0.9 * doublings if cell.parametrization == "sp" else 0)
    return math.nan if distance > 2.6 else 4.2 - 0.22 * doublings + 0.07 * distance**2 + noise


def make_tables(folder, request, loss=synthetic_loss):
    cells = FigureRequest.of(request).figure.cells()
    noise = np.random.default_rng(0).normal(0, 0.01, len(cells))
    losses = [loss(cell, float(draw)) for cell, draw in zip(cells, noise, strict=True)]
    runs = pd.DataFrame({"cell": [cell.id for cell in cells], "train_loss": losses, "valid_loss": losses})
    runs["status"] = np.where(runs["train_loss"].isna(), "diverged", "finished")
    runs.to_csv(folder / "runs.csv", index=False)
    arguments = ["--runs", folder / "runs.csv", "--figures", json.dumps({"f": request}), "--out", folder / "optima.csv"]
    assert main(["optima", *map(str, arguments)]) == 0


def draw(folder, request, name="f"):
    inputs = ["--runs", folder / "runs.csv", "--optima", folder / "optima.csv"]
    outputs = ["--out", folder / f"{name}.pdf", "--png", folder / f"{name}.png"]
    return main(["figure", *map(str, [*inputs, "--figure", json.dumps(request), "--name", "f", *outputs])])


def pdf_text(data):
    """The PDF with its streams decompressed."""
    parts = [data]
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", data, re.DOTALL):
        try:
            parts.append(zlib.decompress(stream))
        except zlib.error:
            continue
    return b"\n".join(parts)


def test_a_figure_of_three_seeds_is_embedded_and_the_same_twice(tmp_path):
    request = make_request(("sp", "simplep", "mup"), seeds=3)
    make_tables(tmp_path, request)
    assert draw(tmp_path, request) == 0
    assert draw(tmp_path, request, "again") == 0
    for suffix in ("pdf", "png"):
        assert (tmp_path / f"f.{suffix}").read_bytes() == (tmp_path / f"again.{suffix}").read_bytes()
    pdf = pdf_text((tmp_path / "f.pdf").read_bytes())
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert b"CreationDate" not in pdf
    with Image.open(tmp_path / "f.png") as image:
        assert image.size[0] == 1400
        assert "Software" not in image.info


@pytest.mark.parametrize(
    ("request_", "loss"),
    [
        (make_request(), lambda *_: math.nan),
        (make_request(), lambda cell, noise: math.nan if cell.parametrization == "sp" else synthetic_loss(cell, noise)),
        (make_request(), lambda *_: 3.0),
        (make_request(("mup",), (32,)), synthetic_loss),
        (make_request(("sp", "simplep", "mup", "experts-only", "mine"), (32, 64), 2), synthetic_loss),
    ],
    ids=["all diverged", "a panel diverged", "flat", "one curve", "five panels"],
)
def test_odd_figures_still_draw(tmp_path, request_, loss):
    make_tables(tmp_path, request_, loss)
    assert draw(tmp_path, request_) == 0


def test_optima_of_another_config_are_refused(tmp_path, capsys):
    make_tables(tmp_path, make_request())
    assert draw(tmp_path, make_request(widths=(32, 64))) == 1
    assert "optima.csv" in capsys.readouterr().err


def parts(folder, request):
    parsed = FigureRequest.of(request)
    curves = figure_curves(read_runs(folder / "runs.csv"), parsed)
    return curves, read_optima(folder / "optima.csv", "f", parsed)


def test_a_cliff_does_not_squash_the_scale(tmp_path):
    request = make_request()
    make_tables(tmp_path, request)
    calm = shared_scale(*parts(tmp_path, request))

    def cliff(cell, noise):
        loss = synthetic_loss(cell, noise)
        return 500.0 if math.isnan(loss) else loss

    make_tables(tmp_path, request, cliff)
    steep = shared_scale(*parts(tmp_path, request))
    assert steep.top == pytest.approx(calm.top, abs=0.2)
    curves, rows = parts(tmp_path, request)
    assert all(row.best_loss < steep.top for of_panel in rows.values() for row in of_panel)
    assert steep.lanes == len(curves["mup"])


def test_a_figure_without_strays_has_no_strip(tmp_path):
    request = make_request()
    make_tables(tmp_path, request, lambda cell, noise: 3 + 0.01 * (math.log2(cell.learning_rate) + 7) ** 2 + noise / 9)
    scale = shared_scale(*parts(tmp_path, request))
    assert scale.lanes == 0
    assert scale.upper == scale.top


def test_the_summary_says_drift_and_regret(tmp_path):
    request = make_request()
    make_tables(tmp_path, request)
    _, rows = parts(tmp_path, request)
    first, second = summary(rows["sp"], 32).split("\n")
    assert re.fullmatch(r"drift -0\.[89]\d \[-[01]\.\d\d, [-+]\d\.\d\d\]", first.replace("\N{MINUS SIGN}", "-"))
    assert re.fullmatch(r"regret 0\.\d{3} nats at 128", second)
    lost = [row._replace(regret=0.25, regret_at_least=True, drift=-0.001, drift_low=math.nan) for row in rows["sp"]]
    assert summary(lost, 32) == "drift +0.00\nregret ≥ 0.250 nats at 128"
