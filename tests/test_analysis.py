import csv
import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conftest import lines_after_config, read_config, run_step, write_result
from mup_moe.analysis import aggregate
from mup_moe.analysis.aggregate import mixtures
from mup_moe.analysis.collect import is_of, join_finished_tables, join_tables
from mup_moe.analysis.curve import ABSENT, Curve, Regret, bracket, find_optimum, loss_at, regret, window_interval
from mup_moe.analysis.figure_spec import FigureSpec
from mup_moe.analysis.markup import latex_text
from mup_moe.analysis.optima import OptimumRow, read_optima
from mup_moe.analysis.runs import figure_curves
from mup_moe.analysis.transfer import measure_transfer
from mup_moe.config.cell import Cell, LearningRate
from mup_moe.config.settings import AnalysisSettings
from mup_moe.files import UserError
from mup_moe.parametrization import FACTORS, ROLES, Parametrization, parse_table
from mup_moe.sweep import Sweep
from mup_moe.tables import table1

CONFIG = Path(__file__).parent.parent / "config.yaml"
SWEEP = Sweep(read_config(CONFIG))
ANALYSIS = AnalysisSettings(loss="train_loss", fit_points=5, confidence=0.95, resamples=500, foreign_cells="stop")
GRID = np.arange(-10.0, -3.0)


def quadratic(vertex, curvature=0.05, level=3.0, log2_lr=GRID, noise=0.0, seeds=1):
    losses = level + curvature * (log2_lr - vertex) ** 2
    return Curve(log2_lr, losses + noise * np.random.default_rng(0).normal(size=(seeds, log2_lr.size)))


def curve(*losses):
    return Curve(np.arange(float(len(losses))), np.array([losses], dtype=float))


inside = st.floats(-8.9, -5.1)
curvatures = st.floats(0.005, 0.4)
loss_lists = st.lists(st.one_of(st.just(math.nan), st.just(ABSENT), st.floats(1, 10)), min_size=1, max_size=9)


# ---------------------------------------------------------------- one curve


@given(inside, curvatures, st.sampled_from([3, 4, 5, 7]))
def test_exact_parabola_is_recovered(vertex, curvature, fit_points):
    best = find_optimum(quadratic(vertex, curvature), fit_points)
    assert best.log2_lr == pytest.approx(vertex, abs=1e-8)
    assert best.loss == pytest.approx(3.0, abs=1e-8)
    assert best.fit == "parabola"
    assert not best.at_edge


@given(inside)
def test_exact_parabola_is_recovered_on_an_uneven_grid(vertex):
    uneven = np.log2([1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2])
    assume(uneven[1] < vertex < uneven[-2])
    assert find_optimum(quadratic(vertex, log2_lr=uneven), 5).log2_lr == pytest.approx(vertex, abs=1e-8)


@given(loss_lists, st.floats(-5, 5), st.integers(-20, 20))
def test_shifting_a_curve_only_shifts_its_optimum(losses, level, octaves):
    # Losses on a grid of 1/16, so that adding a level neither breaks nor makes a tie.
    losses, level = np.round(np.array(losses) * 16) / 16, round(level * 16) / 16
    here = find_optimum(curve(*losses), 5)
    there = find_optimum(Curve(np.arange(float(losses.size)) + octaves, losses[None] + level), 5)
    assert there.fit == here.fit
    assert there.log2_lr == pytest.approx(here.log2_lr + octaves, abs=1e-6, nan_ok=True)
    assert there.loss == pytest.approx(here.loss + level, abs=1e-6, nan_ok=True)


@given(loss_lists)
def test_the_optimum_is_close_to_the_lowest_converged_loss(losses):
    measured = curve(*losses)
    best = find_optimum(measured, 5)
    losses = np.where(np.isfinite(losses), losses, np.nan)
    if np.isnan(losses).all():
        assert best.fit == "none"
        assert np.isnan(best.log2_lr)
        return
    lowest = int(np.nanargmin(losses))
    assert abs(best.log2_lr - lowest) <= 2
    steps = np.arange(min(lowest, int(best.log2_lr)), max(lowest, math.ceil(best.log2_lr)) + 1)
    assert np.isfinite(np.array(losses)[steps]).all()


@pytest.mark.parametrize(
    ("losses", "at", "bounds"),
    [
        ((1, 2, 3, 4), 0, (-np.inf, 1)),
        ((4, 3, 2, 1), 3, (2, np.inf)),
        ((3, 2, 1, np.nan, np.nan), 2, (1, 3)),
        ((np.nan, 1, np.nan), 1, (0, 2)),
        ((1,), 0, (-np.inf, np.inf)),
    ],
)
def test_unbracketed_minimum_is_flagged(losses, at, bounds):
    best = find_optimum(curve(*losses), 5)
    assert best.at_edge
    assert best.log2_lr == at
    assert bracket(curve(*losses)) == bounds


def test_if_the_center_is_flat_the_grid_point_is_reported():
    tiny = 1e-12
    best = find_optimum(curve(1 + tiny, 1, 1 + tiny), 5)
    assert (best.fit, best.log2_lr, best.loss) == ("grid", 1, 1)
    assert not best.at_edge
    assert measure_transfer({32: curve(1 + tiny, 1, 1 + tiny)}, 32, ANALYSIS).intervals[32].kind == "bracket"


def test_a_window_that_is_not_convex_falls_back_to_three_points():
    best = find_optimum(curve(1.0, 1.2, 0.99, 1.2, 1.0), 5)
    assert best.fit == "three-point"
    assert best.log2_lr == pytest.approx(2)


def test_a_cliff_at_the_window_end_does_not_move_the_optimum():
    calm = find_optimum(curve(3.4, 3.1, 3.0, 3.1, 3.4), 5).log2_lr
    assert find_optimum(curve(3.4, 3.1, 3.0, 3.1, 9.0), 5).log2_lr == pytest.approx(calm, abs=0.02)


def test_a_spike_next_to_the_window_does_not_move_the_optimum_of_the_authors_narrowest_curve():
    # reference/authors_sp.csv, width 64: the loss at 2e-2 is a spike next to the window of the minimum.
    rates = np.log2([1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2])
    losses = [6.21, 5.8465625, 5.385, 5.1390625, 5.00625, 4.9878125, 5.08125, 6.145625, 5.3371875]
    best = find_optimum(Curve(rates, np.array([losses])), 5)
    assert 2e-3 < 2**best.log2_lr < 5e-3
    assert best.high == pytest.approx(np.log2(1e-2))


def test_one_diverged_seed_makes_the_learning_rate_diverged():
    losses = np.array([[3.0, 2.0, 1.0, 2.0], [3.0, 2.0, np.nan, 2.0]])
    measured = Curve(np.arange(4.0), losses)
    assert np.isnan(measured.mean[2])
    assert find_optimum(measured, 5).log2_lr == 1


@pytest.mark.parametrize(
    ("losses", "at", "bounds"),
    [
        ((4, 3, ABSENT, 3.5, 4), 1, (0, 3)),
        ((4, ABSENT, 3, ABSENT, np.nan, 4), 2, (0, 4)),
        ((ABSENT, 3, 4, 5), 1, (-np.inf, 2)),
    ],
)
def test_an_optimum_next_to_a_gap_is_not_bracketed_by_it(losses, at, bounds):
    measured = curve(*losses)
    best = find_optimum(measured, 5)
    assert (best.fit, best.log2_lr) == ("edge", at)
    assert bracket(measured) == bounds
    interval = measure_transfer({32: measured}, 32, ANALYSIS).intervals[32]
    assert (interval.low, interval.high, interval.kind) == (*bounds, "bracket")


def test_a_gap_is_not_a_divergence():
    losses = np.array([[3.0, np.nan, ABSENT, ABSENT, 2.0], [3.0, 2.0, np.nan, 2.0, 2.0]])
    measured = Curve(np.arange(5.0), losses)
    assert measured.diverged.tolist() == [False, True, True, False, False]
    assert measured.gaps.tolist() == [False, False, False, True, False]
    assert np.isfinite(measured.mean).tolist() == [True, False, False, False, True]
    assert measured.missing == 2


@given(st.integers(1, 3), st.data())
def test_missing_cells_of_a_panel_never_change_a_number_silently(seeds, data):
    complete = {32 * 2**k: quadratic(-7 - 0.2 * k, noise=0.01, seeds=seeds) for k in range(3)}
    places = st.tuples(st.sampled_from(sorted(complete)), st.integers(0, seeds - 1), st.integers(0, GRID.size - 1))
    losses = {value: curve.losses.copy() for value, curve in complete.items()}
    for value, seed, rate in data.draw(st.sets(places)):
        losses[value][seed, rate] = ABSENT
    curves = {value: Curve(GRID, of_value) for value, of_value in losses.items()}
    before, after = (measure_transfer(panel, 32, ANALYSIS) for panel in (complete, curves))
    for value, of_value in curves.items():
        best, interval = after.optima[value], after.intervals[value]
        if of_value.missing == 0:
            assert best == before.optima[value]
        if np.isfinite(best.log2_lr):
            assert interval.low <= best.log2_lr <= interval.high
            at = np.flatnonzero((best.low <= GRID) & (best.high >= GRID))
            assert not of_value.gaps[at].any()
        else:
            assert of_value.missing >= GRID.size
    if all(of_value.missing == 0 for of_value in curves.values()):
        assert after == before


def test_loss_at_any_learning_rate():
    measured = curve(4.0, 3.2, 3.0, 3.2, 4.0, 4.4, np.nan, 5.0)
    best = find_optimum(measured, 5)
    assert loss_at(measured, best, best.log2_lr) == best.loss
    assert loss_at(measured, best, 5.0) == pytest.approx(4.4)
    assert 4.0 < loss_at(measured, best, 4.5) < 4.4
    assert loss_at(measured, best, 7.0) == 5.0
    for beyond in (-0.1, 5.1, 6.0, 6.9, 7.1):
        assert loss_at(measured, best, beyond) == np.inf
    assert np.isnan(loss_at(measured, best, np.nan))


@given(loss_lists, st.floats(-1, 9))
def test_regret_is_never_negative(losses, log2_lr):
    measured = curve(*losses)
    best = find_optimum(measured, 5)
    cost = regret(measured, best, log2_lr)
    assert cost.nats >= 0 or np.isnan(best.log2_lr)
    assert np.isfinite(cost.nats) or np.isnan(best.log2_lr)


def test_regret_beyond_the_converged_rates_is_a_lower_bound():
    measured = curve(4.0, 3.2, 3.0, 3.2, 4.0, 4.4, np.nan, 5.0)
    best = find_optimum(measured, 5)
    assert regret(measured, best, 4.0) == Regret(pytest.approx(1.0, abs=0.05), False)
    for right in (5.1, 6.0, 6.9, 7.1):
        assert regret(measured, best, right) == Regret(4.4 - best.loss, True)
    assert regret(measured, best, -1.0) == Regret(4.0 - best.loss, True)


@given(st.lists(st.one_of(st.just(math.nan), st.floats(1, 10)), min_size=1, max_size=4), st.floats(0.01, 0.99))
def test_one_seeds_interval_holds_the_optimum(losses, lowest):
    measured = curve(*losses, 1.0, lowest, 1.0, *reversed(losses))
    best = find_optimum(measured, 5)
    low, high = window_interval(measured, best)
    assert low <= best.log2_lr - 0.25
    assert high >= best.log2_lr + 0.25


def test_one_seeds_interval_shows_how_far_windows_disagree():
    lopsided = curve(3.45, 3.2, 3.0, 3.1, 3.45)
    best = find_optimum(lopsided, 5)
    three = find_optimum(lopsided, 3)
    low, high = window_interval(lopsided, best)
    assert low <= min(best.log2_lr, three.log2_lr)
    assert high >= max(best.log2_lr, three.log2_lr)


def test_curves_refuse_wrong_shapes():
    with pytest.raises(ValueError, match="losses"):
        Curve(np.arange(3.0), np.zeros((1, 4)))
    with pytest.raises(ValueError, match="ascend"):
        Curve(np.array([1.0, 0.0]), np.zeros((1, 2)))


# ---------------------------------------------------------------- a panel of curves


@settings(max_examples=30)
@given(st.floats(-0.9, 0.9), curvatures)
def test_drift_and_regret_of_exact_curves(slope, curvature):
    curves = {32 * 2**k: quadratic(-7 + slope * k, curvature) for k in range(3)}
    transfer = measure_transfer(curves, 32, ANALYSIS)
    assert transfer.drift == pytest.approx(slope, abs=1e-8)
    if transfer.drift_interval.kind == "t":
        assert transfer.drift_interval.low == pytest.approx(slope, abs=1e-6)
    assert transfer.regrets[32] == Regret(0.0, False)
    shift = abs(slope)
    if transfer.optima[64].low <= -7 <= transfer.optima[64].high:
        assert transfer.regrets[64].nats == pytest.approx(curvature * shift**2, abs=1e-8)


def test_two_curves_have_a_drift_without_interval_and_one_has_none():
    two = measure_transfer({32: quadratic(-7), 64: quadratic(-8)}, 32, ANALYSIS)
    assert two.drift == pytest.approx(-1)
    assert two.drift_interval.kind == ""
    one = measure_transfer({32: quadratic(-7)}, 32, ANALYSIS)
    assert np.isnan(one.drift)


def test_optima_at_one_edge_have_no_interval_of_drift():
    falling = curve(4, 3, 2)
    transfer = measure_transfer({32: falling, 64: falling, 128: falling}, 32, ANALYSIS)
    assert transfer.drift == 0
    assert transfer.drift_interval.kind == ""


def test_without_the_base_value_there_is_no_regret():
    transfer = measure_transfer({64: quadratic(-7), 128: quadratic(-7)}, 32, ANALYSIS)
    assert all(np.isnan(cost.nats) for cost in transfer.regrets.values())


def test_regret_at_a_diverged_rate_is_at_least_that_of_the_last_converged_rate():
    losses = quadratic(-9).losses.copy()
    losses[:, -4:] = np.nan
    transfer = measure_transfer({32: quadratic(-6), 64: Curve(GRID, losses)}, 32, ANALYSIS)
    last = losses[np.isfinite(losses)][-1]
    assert transfer.regrets[64] == Regret(pytest.approx(last - transfer.optima[64].loss), True)


def test_the_bootstrap_interval_holds_its_estimate_and_narrows_as_seeds_agree():
    def panel(noise):
        return measure_transfer(
            {32 * 2**k: quadratic(-7 - 0.3 * k, noise=noise, seeds=4) for k in range(3)}, 32, ANALYSIS
        )

    widths = []
    for noise in (0.05, 0.005, 0.0):
        transfer = panel(noise)
        if noise:
            assert transfer.drift_interval.kind == "t"
            assert transfer.drift_interval.low <= transfer.drift <= transfer.drift_interval.high
        for value, interval in transfer.intervals.items():
            assert interval.kind == "bootstrap"
            assert interval.low <= transfer.optima[value].log2_lr <= interval.high
        widths.append(max(interval.high - interval.low for interval in transfer.intervals.values()))
    assert widths[0] > widths[1] > widths[2]
    assert widths[2] == pytest.approx(0, abs=1e-9)
    assert panel(0.05) == panel(0.05)


def test_noise_that_the_curves_of_a_seed_share_does_not_widen_the_drift():
    # Every curve of a seed is shifted by the same octaves: the drift does not depend on the seed.
    seeds = np.array([-0.5, 0.0, 0.4])
    curves = {
        32 * 2**k: Curve(GRID, np.stack([quadratic(-7 - 0.2 * k + shift).losses[0] for shift in seeds]))
        for k in range(3)
    }
    transfer = measure_transfer(curves, 32, ANALYSIS)
    assert transfer.intervals[32].high - transfer.intervals[32].low > 0.5
    assert transfer.drift_interval.high - transfer.drift_interval.low < 1e-6


def test_an_edge_is_bracketed_however_well_seeds_agree():
    falling = np.tile(np.linspace(5, 3, GRID.size), (3, 1))
    interval = measure_transfer({32: Curve(GRID, falling)}, 32, ANALYSIS).intervals[32]
    assert (interval.low, interval.high, interval.kind) == (-5, np.inf, "bracket")


# ---------------------------------------------------------------- the commands


def summary_of(cell, loss, **changes):
    finished = loss is not None
    return {
        "cell": asdict(cell),
        "id": cell.id,
        "status": "finished" if finished else "diverged",
        "train_loss": loss,
        "valid_loss": loss + 0.1 if finished else math.nan,
        "steps": 300,
        "tokens": 307200,
        "wall_seconds": 1.5,
        "flops": 1e12,
        "parameters": 1000,
        "active_parameters": 500,
        "fingerprint": "f" * 8,
        "version": 1,
        "code": "c",
        "tokens_digest": "t",
        "request": "r",
        "precision": "float32",
        "device": "cpu",
        "machine": {},
        "versions": {"torch": "2.13.0+cpu"},
        "settings": {},
    } | changes


def write_summaries(results, cells, loss, **changes):
    for cell in cells:
        own = {"request": SWEEP.request(cell).digest}
        write_result(results / cell.id, summary_of(cell, loss(cell), **own | changes))


def transferring(cell):
    """SP's optimum falls by an octave per doubling; others stay. Far above it, cells diverge."""
    doublings = math.log2(cell.width / 32)
    distance = math.log2(cell.learning_rate) + 6.8 + (doublings if cell.parametrization == "sp" else 0)
    return None if distance > 3 else 4 - 0.2 * doublings + 0.05 * distance**2


@pytest.fixture
def figure1(tmp_path):
    # A grid that does not depend on the default one.
    grid = tmp_path / "grid.yaml"
    rates = ", ".join(f"2^{exponent}" for exponent in range(-10, -3))
    grid.write_text(f"figures: {{figure1: {{axes: {{width: [32, 64, 128], learning_rate: [{rates}]}}}}}}")
    config = read_config(CONFIG, grid)
    cells = config.figures["figure1"].cells()
    write_summaries(tmp_path / "cells", cells, transferring)
    return tmp_path, config, cells


def run_aggregate(folder, config):
    return run_step("aggregate", "figure1", config=config, results=folder)


def leaving_out(config):
    return replace(config, analysis=replace(config.analysis, foreign_cells="leave_out"))


def run_optima(folder, config):
    return run_step("optima", "figure1", config=config, results=folder)


def test_runs_have_a_row_per_cell_in_order(figure1):
    folder, config, cells = figure1
    assert run_aggregate(folder, config) == 0
    runs = pd.read_csv(folder / "figure1/runs.csv")
    assert list(runs.columns) == list(aggregate.COLUMNS)
    assert runs["cell"].tolist() == [cell.id for cell in cells]
    assert runs["log2_learning_rate"].tolist() == [math.log2(cell.learning_rate) for cell in cells]
    diverged = runs["status"] == "diverged"
    assert diverged.any()
    assert runs.loc[diverged, ["train_loss", "valid_loss"]].isna().all(axis=None)
    assert runs.loc[~diverged, "train_loss"].tolist() == [transferring(c) for c in cells if transferring(c) is not None]
    assert set(runs["device"]) == {"cpu"}
    assert set(runs["torch"]) == {"2.13.0+cpu"}


@pytest.mark.parametrize("changes", [{"status": "finished", "train_loss": None}, {"status": "running"}, {"id": "x"}])
def test_a_summary_that_contradicts_itself_is_refused(figure1, changes):
    folder, _, cells = figure1
    write_summaries(folder / "cells", cells[:1], transferring, **changes)
    with pytest.raises(UserError, match="does not belong to this cell"):
        aggregate.run_rows([(cells[0].id, "r")], folder / "cells")


def test_another_cells_summary_is_refused(figure1):
    folder, _, cells = figure1
    first, second = (folder / "cells" / cell.id / "summary.json" for cell in cells[:2])
    first.write_text(second.read_text())
    with pytest.raises(UserError, match="it holds cell"):
        aggregate.run_rows([(cells[0].id, "r")], folder / "cells")


FOREIGN = [
    ("version", "trained by another version"),
    ("precision", "trained in another precision"),
    ("tokens_digest", "trained on other tokens"),
    ("request", "made under another config"),
]


@pytest.mark.parametrize(("key", "reason"), FOREIGN)
def test_cells_that_cannot_be_compared_are_not_mixed(figure1, capsys, key, reason):
    folder, config, cells = figure1
    write_summaries(folder / "cells", cells[7:12], transferring, **{key: "other"})
    assert run_aggregate(folder, config) == 1
    assert not (folder / "figure1/runs.csv").exists()
    (reported,) = lines_after_config(capsys.readouterr().err)
    shown = ", ".join(cell.id for cell in cells[7:10])
    assert f"5 {reason} ({shown} and 2 more)" in reported
    assert "delete" in reported
    assert "`analysis.foreign_cells`" in reported


@pytest.mark.parametrize(("key", "reason"), FOREIGN)
def test_cells_that_cannot_be_compared_are_left_out_by_name_if_the_user_chose_so(figure1, capsys, key, reason):
    folder, config, cells = figure1
    run_aggregate(folder, config)
    complete = (folder / "figure1/runs.csv").read_text().splitlines()
    write_summaries(folder / "cells", cells[7:12], transferring, **{key: "other"})
    assert run_aggregate(folder, leaving_out(config)) == 0
    reported = lines_after_config(capsys.readouterr().err)
    assert reported == [f"left out {cell.id}: {reason}" for cell in cells[7:12]]
    assert (folder / "figure1/runs.csv").read_text().splitlines() == complete[:8] + complete[13:]


AWAY = {"device": "cuda", "versions": {"torch": "2.11.0+cu126"}}
MIXED = [
    ({"device": "cuda"}, "devices", "on cuda", "on cpu"),
    ({"versions": AWAY["versions"]}, "versions of torch", "with torch 2.11.0+cu126", "with torch 2.13.0+cpu"),
    (
        AWAY,
        "devices and several versions of torch",
        "on cuda with torch 2.11.0+cu126",
        "on cpu with torch 2.13.0+cpu",
    ),
]


@pytest.mark.parametrize(("changes", "several", "away", "home"), MIXED)
def test_mixed_devices_or_versions_of_torch_are_reported_and_the_table_is_made(
    figure1, capsys, changes, several, away, home
):
    folder, config, cells = figure1
    write_summaries(folder / "cells", cells[:2], transferring, **changes)
    assert run_aggregate(folder, config) == 0
    names = [cell.id for cell in cells]
    shown, more = ", ".join(names[2:5]), len(names) - 5
    assert lines_after_config(capsys.readouterr().err) == [
        f"cells of mixtral were trained on several {several}:"
        f" 2 {away} ({names[0]}, {names[1]}); {more + 3} {home} ({shown} and {more} more)"
    ]
    runs = pd.read_csv(folder / "figure1/runs.csv")
    assert runs["cell"].tolist() == names
    elsewhere = (runs["device"] == "cuda") | (runs["torch"] == "2.11.0+cu126")
    assert runs.loc[elsewhere, "cell"].tolist() == names[:2]


def test_no_mixture_is_reported_for_cells_that_were_left_out(figure1, capsys):
    folder, config, cells = figure1
    write_summaries(folder / "cells", cells[7:12], transferring, **AWAY, precision="bfloat16")
    assert run_aggregate(folder, leaving_out(config)) == 0
    assert [line.partition(" ")[0] for line in lines_after_config(capsys.readouterr().err)] == ["left"] * 5


def test_set_ups_with_different_devices_are_not_a_mixture():
    rows = [{"cell": "a", "setup": "small", "device": "cpu", "torch": "2"}]
    assert mixtures([*rows, {"cell": "b", "setup": "large", "device": "cuda", "torch": "3"}]) == []


def test_if_no_cell_is_of_the_config_the_table_is_empty(figure1):
    folder, config, cells = figure1
    write_summaries(folder / "cells", cells, transferring, request="other")
    assert run_aggregate(folder, leaving_out(config)) == 0
    assert (folder / "figure1/runs.csv").read_text() == ",".join(aggregate.COLUMNS) + "\n"
    assert run_optima(folder, leaving_out(config)) == 0
    table = pd.read_csv(folder / "figure1/optima.csv")
    assert table["log2_lr"].isna().all()
    assert (table["points"] + table["diverged"] == 0).all()
    assert (table["missing"] == 7).all()


def test_the_newest_row_of_a_cell_in_several_tables_counts(tmp_path):
    for name, rows in {"one": "a,1\nb,1\n", "two": "b,2\nc,2\n", "three": "b,3\n"}.items():
        (tmp_path / name).write_text("cell,loss\n" + rows)
    for age, name in enumerate(["two", "three", "one"]):
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    join_tables([tmp_path / name for name in ("one", "two", "missing", "three")], tmp_path / "out")
    assert (tmp_path / "out").read_text() == "cell,loss\na,1\nb,2\nc,2\n"


@pytest.mark.parametrize(("content", "said"), [("", "is empty"), ("cell,other\na,1\n", "has different columns")])
def test_tables_that_do_not_fit_together_are_refused(tmp_path, content, said):
    tables = [tmp_path / "one", tmp_path / "two"]
    for path, text in zip(tables, ("cell,loss\na,1\n", content), strict=True):
        path.write_text(text)
    with pytest.raises(UserError, match=f"two {said}.*: delete it"):
        join_tables(tables, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("cell,fingerprint\na,1\nb,2\n", True),
        ("cell,fingerprint\na,1\nc,anything\n", True),
        ("cell,fingerprint\na,1\nb,1\n", False),
        ("cell,fingerprint\na,1\nd,1\n", False),
        ("cell,loss\na,1\n", False),
        ("loss\n1\n", False),
        ("cell,fingerprint\n", False),
        ("", False),
        (None, False),
    ],
)
def test_runs_are_those_of_the_current_figure_or_not(tmp_path, text, known):
    path = tmp_path / "runs.csv"
    if text is not None:
        path.write_text(text)
    assert is_of(path, {"a": "1", "b": "2", "c": ""}) == known


def test_finished_figures_are_collected_and_damaged_tables_are_reported(tmp_path):
    cells = {"a": "1", "b": "2"}
    for figure in ("done", "older-optima", "of-another-config", "damaged", "no-optima"):
        (tmp_path / figure).mkdir()
        (tmp_path / figure / "runs.csv").write_text(f"cell,fingerprint,figure\na,1,{figure}\n")
        if figure != "no-optima":
            (tmp_path / figure / "optima.csv").write_text(f"figure,drift\n{figure},0\n")
    os.utime(tmp_path / "older-optima" / "optima.csv", (0, 0))
    (tmp_path / "damaged" / "runs.csv").write_bytes(b"cell,fingerprint,figure\n\xff")
    figures = dict.fromkeys(["done", "older-optima", "of-another-config", "damaged", "no-optima", "absent"], cells)
    figures["of-another-config"] = {"a": "3"}
    (problem,) = join_finished_tables(tmp_path, figures)
    assert "runs.csv lacks damaged" in problem
    assert "delete it" in problem
    # The three figures have this cell in common, which gives one row.
    assert (tmp_path / "runs.csv").read_text() == "cell,fingerprint,figure\na,1,no-optima\n"
    assert (tmp_path / "optima.csv").read_text() == "figure,drift\ndone,0\n"


def test_text_that_is_not_a_cell_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a cell's id"):
        aggregate.run_rows([("nonsense", "r")], tmp_path)


def test_optima_of_a_figure(figure1):
    folder, config, _ = figure1
    assert run_aggregate(folder, config) == 0
    assert run_optima(folder, config) == 0
    table = pd.read_csv(folder / "figure1/optima.csv")
    assert list(table.columns) == list(OptimumRow._fields)
    assert table["panel"].tolist() == ["sp"] * 3 + ["simplep"] * 3 + ["mup"] * 3
    assert table["value"].tolist() == [32, 64, 128] * 3
    drift = table.groupby("panel")["drift"].first()
    assert drift["sp"] == pytest.approx(-1)
    assert drift["mup"] == pytest.approx(0, abs=1e-8)
    base = table[table["value"] == 32]
    assert (base["regret"] == 0).all()
    assert table["regret"][2] == pytest.approx(0.05 * 4, abs=0.02)
    assert table["regret"][5] == pytest.approx(0, abs=1e-8)
    assert (table["points"] + table["diverged"] == 7).all()
    assert table["interval"].tolist() == ["window"] * 9
    assert not table["at_edge"].any()


def test_optima_read_back(figure1):
    folder, config, _ = figure1
    run_aggregate(folder, config)
    run_optima(folder, config)
    request = FigureSpec.of(config, "figure1")
    rows = read_optima(folder / "figure1/optima.csv", "figure1", request)
    assert [row.value for row in rows["mup"]] == [32, 64, 128]
    with pytest.raises(UserError, match="figure2"):
        read_optima(folder / "figure1/optima.csv", "figure2", request)


def without(runs, *cells):
    """Removes cells from a table of runs."""
    lines = runs.read_text().splitlines(keepends=True)
    runs.write_text("".join(line for line in lines if line.partition(",")[0] not in {cell.id for cell in cells}))


def test_runs_that_lack_a_cell_are_named(figure1, capsys):
    folder, config, cells = figure1
    run_aggregate(folder, config)
    without(folder / "figure1/runs.csv", cells[4])
    assert run_optima(folder, config) == 1
    assert cells[4].id in capsys.readouterr().err


def test_cells_that_were_left_out_are_counted_and_not_as_diverged(figure1):
    folder, config, cells = figure1
    run_aggregate(folder, config)
    run_optima(folder, config)
    complete = pd.read_csv(folder / "figure1/optima.csv")
    best = [cell for cell in cells if (cell.parametrization, cell.width, cell.learning_rate) == ("mup", 64, 2**-7)]
    without(folder / "figure1/runs.csv", *best)
    assert run_optima(folder, leaving_out(config)) == 0
    table = pd.read_csv(folder / "figure1/optima.csv")
    assert (table["points"] + table["diverged"] + table["missing"] == 7).all()
    assert table["missing"].tolist() == [0] * 7 + [1, 0]
    assert table["diverged"].tolist() == complete["diverged"].tolist()
    assert bool(table.loc[7, "at_edge"])
    others = table["panel"] != "mup"
    pd.testing.assert_frame_equal(table[others], complete[others])


def with_axes(config, panel="parametrization", **axes):
    """Returns the config with other axes for figure 1."""
    figure = config.figures["figure1"]
    other = replace(figure, panel=panel, axes=replace(figure.axes, **axes))
    return replace(config, figures=config.figures | {"figure1": other})


def test_a_panel_need_not_be_a_parametrization(tmp_path):
    config = with_axes(read_config(CONFIG), "granularity", parametrization=("sp",), granularity=(4, 1))
    write_summaries(tmp_path / "cells", config.figures["figure1"].cells(), transferring)
    assert run_aggregate(tmp_path, config) == 0
    assert run_optima(tmp_path, config) == 0
    table = pd.read_csv(tmp_path / "figure1/optima.csv")
    values = len(config.figures["figure1"].axes.width)
    assert table["panel"].tolist() == [4] * values + [1] * values
    assert set(table["parametrization"]) == {"sp"}


def test_every_loss_lands_on_its_own_curve():
    # Each cell has a unique loss, over all four axes of a figure and with unsorted values.
    rates = tuple(map(LearningRate, ("2^-6", "2^-9", "2^-7")))
    config = with_axes(read_config(CONFIG), width=(128, 32, 64), seed=(3, 1), learning_rate=rates)
    parsed = FigureSpec.of(config, "figure1")
    cells = parsed.figure.cells()
    runs = pd.DataFrame(
        {"cell": [c.id for c in cells], "status": "finished", "train_loss": np.arange(len(cells), dtype=float)}
    ).set_index("cell")
    runs = runs.sample(frac=1, random_state=0)
    curves = figure_curves(runs, parsed)
    for cell in cells:
        found = curves[cell.parametrization][cell.width]
        rate = np.flatnonzero(found.log2_lr == math.log2(cell.learning_rate))[0]
        assert found.losses[[3, 1].index(cell.seed), rate] == runs.loc[cell.id, "train_loss"]


# ---------------------------------------------------------------- table 1


@pytest.fixture
def tables(tmp_path):
    parsed = parse_table(read_config(CONFIG).parametrizations)
    strange = {role: ["sqrt(total_experts)/fan_in/width", 1, "fan_in^-1/3", 1] for role in ROLES}
    parsed["mine"] = Parametrization.parse("mine", strange | {"attention_logits": "1/sqrt(head_size)"})
    table1.write(parsed, tmp_path)
    return tmp_path / "table1", parsed


def test_table1_csv_reads_back(tables):
    path, parsed = tables
    read = {}
    with Path(f"{path}.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            factors = [row[factor] for factor in FACTORS]
            is_logits = row["role"] == "attention_logits"
            read.setdefault(row["parametrization"], {})[row["role"]] = row["multiplier"] if is_logits else factors
    assert {name: Parametrization.parse(name, row) for name, row in read.items()} == parsed


def test_table1_tex_is_a_booktabs_tabular(tables):
    path, parsed = tables
    lines = Path(f"{path}.tex").read_text().splitlines()
    assert lines[0] == r"\begin{tabular}{llllll}"
    assert lines[-1] == r"\end{tabular}"
    body = [line for line in lines if line.endswith(r"\\")]
    assert len(body) == 1 + len(parsed) * (len(ROLES) + 1)
    assert all(line.count(" & ") == 5 for line in body)
    assert lines.count(r"\midrule") == len(parsed)
    text = "\n".join(lines)
    assert r"$1/\mathrm{fan\_in}$" in text
    assert r"$\mu$P & embedding" in text
    assert r"$\sqrt{\mathrm{total\_experts}}/(\mathrm{fan\_in}\,\mathrm{width})$" in text
    assert r"$1/\mathrm{fan\_in}^{1/3}$" in text
    assert text.isascii()
    for line in body:
        assert line.replace(r"\$", "").count("$") % 2 == 0
        assert line.count("{") == line.count("}")


def test_table1_markdown_has_equal_columns(tables):
    lines = Path(f"{tables[0]}.md").read_text().splitlines()
    assert len({line.count(" | ") for line in lines}) == 1
    assert any(r"| router | 1 | 1/fan\_in | 1 | 1 |" in line for line in lines)
    assert any(r"√head\_size" in line for line in lines)


def test_tex_escapes_what_tex_reads_as_commands():
    assert latex_text(r"a_b & 5% #1 \x~^{}$") == (
        r"a\_b \& 5\% \#1 \textbackslash{}x\textasciitilde{}\textasciicircum{}\{\}\$"
    )


def test_cell_axes_agree_with_the_summary():
    cell = Cell.parse("small_moe_mup_w64_e8_g1_lr2^-8_s0")
    assert aggregate._row(cell, json.loads(json.dumps(summary_of(cell, 3.0))))["learning_rate"] == 2**-8
