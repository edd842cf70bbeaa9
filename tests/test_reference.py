"""Published losses: their file, what they are compared with, and how they are drawn."""

import csv
import math
import os
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml

from conftest import CONFIG, ROOT, snakemake, spec_of
from mup_moe.analysis.curve import Curve, find_optimum, regret
from mup_moe.analysis.published import check_reference, read_published
from mup_moe.analysis.reference import compare, published_curves
from mup_moe.figures.style import drawing_style, new_figure
from mup_moe.figures.transfer import draw_content, read_content, shared_scale
from mup_moe.files import UserError
from test_figure import call, write_optima
from test_figure import config_of as figure_config

AUTHORS = ROOT / "reference" / "authors_sp.csv"
RATES = ["1e-4", "2e-4", "5e-4", "1e-3", "2e-3", "5e-3", "1e-2", "2e-2", "5e-2"]


def make_request(reference=AUTHORS, widths=(64, 128, 256, 512), seeds=1, **axes):
    return {
        "setup": "authors",
        "panel": "parametrization",
        "curve": "width",
        "base": 64,
        "axes": {
            "architecture": ["moe"],
            "parametrization": ["sp", "mup"],
            "width": list(widths),
            "experts": [8],
            "granularity": [1],
            "learning_rate": RATES,
            "seed": list(range(seeds)),
        }
        | axes,
        "analysis": {
            "loss": "train_loss",
            "fit_points": 5,
            "confidence": 0.95,
            "resamples": 200,
            "foreign_cells": "stop",
        },
        "reference": str(reference),
    }


def make_tables(folder, request, loss):
    """Writes runs and optima of the figure `f`."""
    folder = folder / "f"
    folder.mkdir(exist_ok=True)
    cells = spec_of(request).figure.cells()
    losses = [loss(cell) for cell in cells]
    runs = pd.DataFrame({"cell": [cell.id for cell in cells], "train_loss": losses, "valid_loss": losses})
    runs["status"] = np.where(runs["train_loss"].isna(), "diverged", "finished")
    runs.to_csv(folder / "runs.csv", index=False)
    write_optima(folder, "f", request)


def published_at(cell):
    """Returns the authors' own loss of a cell, which a perfect replication of SP would measure."""
    points = {point[1:3]: point.loss for point in read_published(AUTHORS, "train_loss")}
    return points[cell.width, float(cell.learning_rate)]


def config_of(request):
    setups = {"authors": replace(CONFIG.setups["small"], model=replace(CONFIG.setups["small"].model, base_width=64))}
    return figure_config({"f": request}, setups=setups)


def command(folder, request, name="reference"):
    return call(name, "f", folder, config_of(request))


def content_of(folder, request):
    assert command(folder, request) == 0
    return read_content(config_of(request), "f", folder)


def test_the_authors_losses_have_the_optima_that_the_decisions_name():
    points = read_published(AUTHORS, "train_loss")
    assert len(points) == 36
    curves = published_curves(points)["sp"]
    optima = {width: find_optimum(curve, 5) for width, curve in curves.items()}
    assert [2**best.log2_lr for best in optima.values()] == pytest.approx([3.6e-3, 2.5e-3, 1.7e-3, 1.04e-3], rel=0.02)
    assert regret(curves[512], optima[512], optima[64].log2_lr).nats == pytest.approx(0.20, abs=0.005)
    drift = np.polyfit(np.log2(list(optima)), [best.log2_lr for best in optima.values()], 1)[0]
    assert drift == pytest.approx(-0.59, abs=0.005)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_csv_saved_by_a_spreadsheet_is_read_by_its_byte_order_mark(tmp_path, encoding, end):
    (tmp_path / "saved.csv").write_bytes(AUTHORS.read_text().replace("\n", end).encode(encoding))
    assert read_published(tmp_path / "saved.csv", "train_loss") == read_published(AUTHORS, "train_loss")


@pytest.mark.parametrize("separator", [";", "\t", ", ", " ; "])
def test_the_first_line_of_a_csv_determines_its_separator(tmp_path, separator):
    (tmp_path / "saved.csv").write_text(AUTHORS.read_text().replace(",", separator).replace(" ;", ";"))
    assert read_published(tmp_path / "saved.csv", "train_loss") == read_published(AUTHORS, "train_loss")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_a_csv_in_another_encoding_without_a_mark_is_named(tmp_path, encoding):
    (tmp_path / "saved.csv").write_bytes(AUTHORS.read_text().encode(encoding))
    with pytest.raises(UserError, match=r"saved\.csv cannot be read as CSV \(it contains NUL"):
        read_published(tmp_path / "saved.csv", "train_loss")


def test_the_differences_are_ours_minus_theirs(tmp_path):
    request = make_request(seeds=2)

    def loss(cell):
        if cell.parametrization != "sp":
            return 5.0
        diverges = cell.width == 512 and float(cell.learning_rate) == 0.05
        return math.nan if diverges else published_at(cell) + cell.width / 1000 + (0.1 if cell.seed else -0.1)

    make_tables(tmp_path, request, loss)
    assert command(tmp_path, request) == 0
    with (tmp_path / "f/reference.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["parametrization", "width", "learning_rate", "published_loss", "our_loss", "difference"]
    assert list(rows[0]) == columns
    assert len(rows) == 36
    for row in rows:
        if (row["width"], row["learning_rate"]) == ("512", "0.05"):
            assert row["our_loss"] == row["difference"] == ""
        else:
            assert float(row["difference"]) == pytest.approx(int(row["width"]) / 1000)
            assert float(row["our_loss"]) - float(row["published_loss"]) == pytest.approx(float(row["difference"]))


def test_points_without_a_cell_of_ours_are_kept_and_empty(tmp_path):
    request = make_request(widths=(64, 128), learning_rate=["2^-10", *RATES[:4]])
    make_tables(tmp_path, request, lambda _: 5.0)
    assert command(tmp_path, request) == 0
    rows = pd.read_csv(tmp_path / "f/reference.csv")
    assert len(rows) == 36
    ours = rows[rows["our_loss"].notna()]
    assert set(ours["width"]) == {64, 128}
    assert sorted(set(ours["learning_rate"])) == [1e-4, 2e-4, 5e-4, 1e-3]


@pytest.mark.parametrize(("factor", "same"), [(1 + 1e-12, True), (1 + 1e-6, False)])
def test_learning_rates_are_equal_up_to_rounding(factor, same):
    (_, *rest), *_ = read_published(AUTHORS, "train_loss")
    curve = Curve(np.log2([rest[1] * factor]), np.array([[6.0]]))
    found = [row[-2] for row in compare(read_published(AUTHORS, "train_loss"), {"sp": {rest[0]: curve}})]
    assert [loss for loss in found if loss is not None] == ([6.0] if same else [])


HEADER = "parametrization,width,learning_rate,train_loss\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "does not exist"),
        ("parametrization,width,learning_rate,loss\nsp,64,1e-3,5\n", "lacks the column `train_loss`"),
        (HEADER + "sp,64,fast,5\n", "line 2"),
        (HEADER + "sp,64,1e-3\n", "line 2"),
        (HEADER + "sp,64.5,1e-3,5\n", "64.5 is not a whole number"),
        (HEADER + "sp,inf,1e-3,5\n", "inf is not a whole number"),
        (HEADER + "sp,64,1e-3,nan\n", "finite"),
        (HEADER + "sp,0,1e-3,5\n", "line 2 must name a parametrization, a positive width"),
        (HEADER + "sp,-64,1e-3,5\n", "line 2 must name a parametrization, a positive width"),
        (HEADER.replace(",", ";") + "sp;64;0,001;5,5\n", "line 2"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "is a Git LFS pointer"),
        (HEADER + "sp,64,1e-3,5\nsp,64,0.001,6\n", "twice"),
        (b"\xff\xfe\x00", "cannot be read"),
        ("", "lacks the column"),
        (HEADER + "mup,64,1e-3,5\nsp,65,1e-3,5\n", "none of the figure's"),
    ],
)
def test_an_unusable_file_is_named(tmp_path, capsys, text, sentence):
    path = tmp_path / "theirs.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    request = make_request(path, widths=(64, 128), parametrization=["sp"])
    make_tables(tmp_path, request, lambda _: 5.0)
    capsys.readouterr()
    assert command(tmp_path, request) == 1
    error = capsys.readouterr().err
    assert "theirs.csv" in error
    assert sentence in error
    assert command(tmp_path, request, "figure") == 1
    assert "f/reference.csv does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("width", ["64", "64.0", "6.4e1"])
def test_a_width_is_an_integer_in_any_notation(tmp_path, width):
    path = tmp_path / "theirs.csv"
    path.write_text(f"{HEADER}sp,{width},1e-3,5\n")
    (point,) = read_published(path, "train_loss")
    assert point.width == 64


@pytest.mark.parametrize(
    "changes",
    [
        {"curve": "experts", "axes": {"width": [64], "experts": [4, 8]}},
        {"axes": {"architecture": ["dense"], "experts": [1]}},
        {"panel": "granularity", "axes": {"parametrization": ["sp"]}},
    ],
)
def test_losses_over_width_are_overlaid_on_no_other_figure(changes):
    request = make_request()
    request |= changes | {"axes": request["axes"] | changes["axes"]}
    with pytest.raises(UserError, match="curve per width"):
        check_reference(spec_of(request).figure, read_published(AUTHORS, "train_loss"), AUTHORS)


def test_published_points_are_drawn_only_in_their_own_panel(tmp_path):
    request = make_request(widths=(64, 128))
    make_tables(tmp_path, request, lambda cell: published_at(cell) + 0.05)
    content = content_of(tmp_path, request)
    assert list(content.published["sp"]) == [64, 128]
    assert content.published["mup"] == {}
    with drawing_style():
        figure = new_figure(*content.size)
        draw_content(figure, content, content.size[0])
        sp, mup = figure.axes
        theirs = {tuple(line.get_ydata()) for line in sp.lines}
        assert tuple(content.published["sp"][64].mean) in theirs
        assert len(sp.lines) == len(mup.lines) + 2
    assert "published" in [text.get_text().split(" (")[0] for text in figure.legends[1].get_texts()]


def test_the_scale_includes_published_losses_as_long_as_ours_stay_readable(tmp_path):
    request = make_request()
    make_tables(tmp_path, request, lambda cell: published_at(cell) - 0.3)
    content = content_of(tmp_path, request)
    alone = shared_scale(content.curves, content.rows, {})
    near = shared_scale(content.curves, content.rows, content.published)
    best = [curve.mean.min() for curve in content.published["sp"].values()]
    assert near.bottom == pytest.approx(alone.bottom, abs=0.1)
    assert near.bottom < min(best) < max(best) < near.top
    make_tables(tmp_path, request, lambda cell: published_at(cell) - 3)
    content = content_of(tmp_path, request)
    assert shared_scale(content.curves, content.rows, content.published) == shared_scale(
        content.curves, content.rows, {}
    )


def dry_run(folder, references):
    """Runs Snakemake dry for Figure 1, from a folder outside the repository."""
    figures = {"figure1": {"axes": {"width": [32, 64, 128]}}, "figure2a": {}, "figure3": {}, "figure4": {}}
    figures = {name: overlay | {"reference": references.get(name)} for name, overlay in figures.items()}
    (folder / "mine.yaml").write_text(yaml.safe_dump({"figures": figures}))
    arguments = ["-s", ROOT / "Snakefile", "--configfile", "mine.yaml", "--cores", "1", "-n", "results/figure1.pdf"]
    return snakemake(folder, *arguments)


@pytest.mark.workflow
def test_a_reference_is_found_in_the_repository_and_its_differences_come_with_the_figure(tmp_path):
    done = dry_run(tmp_path, {"figure1": "reference/authors_sp.csv"})
    assert done.returncode == 0, done.stdout
    assert "output: results/figure1/reference.csv" in done.stdout
    assert os.path.relpath(AUTHORS, tmp_path) in done.stdout


@pytest.mark.workflow
def test_a_file_next_to_the_results_takes_precedence_over_that_of_the_repository(tmp_path):
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference/authors_sp.csv").write_text(HEADER + "sp,64,1e-3,nan\n")
    done = dry_run(tmp_path, {"figure1": "reference/authors_sp.csv"})
    assert "reference/authors_sp.csv, line 2 must name" in done.stdout


@pytest.mark.workflow
def test_a_reference_is_found_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    shutil.copy(AUTHORS, tmp_path / "home" / "theirs.csv")
    done = dry_run(tmp_path, {"figure1": "~/theirs.csv"})
    assert done.returncode == 0, done.stdout
    assert str(tmp_path / "home" / "theirs.csv") in done.stdout


@pytest.mark.workflow
@pytest.mark.parametrize(
    ("references", "sentence"),
    [
        ({"figure1": "nowhere.csv"}, "`figures.figure1.reference`"),
        ({"figure1": "~nobody-of-this-name/a.csv"}, "`figures.figure1.reference`"),
        ({"figure3": "reference/authors_sp.csv"}, "`figures.figure3.reference`"),
    ],
)
def test_an_unusable_reference_is_reported_before_anything_runs(tmp_path, references, sentence):
    done = dry_run(tmp_path, references)
    assert done.returncode != 0
    assert sentence in done.stdout
    assert "Traceback" not in done.stdout
