"""Every table returns names unchanged, even those that read like a null, a boolean or a number."""

import csv
import gzip
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from conftest import CONFIG, make_project, snakemake, spec_of
from mup_moe.__main__ import main
from mup_moe.analysis import verdict
from mup_moe.analysis.optima import OptimumRow, read_optima
from mup_moe.analysis.published import read_published
from mup_moe.analysis.runs import figure_curves, read_rows, read_runs
from mup_moe.analysis.slopes import Slope, columns_over, read_values, slopes
from mup_moe.config.cell import NAME
from mup_moe.config.settings import RESERVED, RESULT_NAME, ClaimSettings, ClaimsSettings, DriftTest, SlopeTest
from mup_moe.files import csv_text, write_csv
from mup_moe.tables.machine import Machine
from test_figure import config_of, make_request, write_optima

LIKE_OTHERS = ["null", "nan", "na", "none", "true", "false", "inf", "infinity", "1e5", "007", "0", "n-a", "1-2", "0x1f"]
names = st.sampled_from(LIKE_OTHERS) | st.from_regex(NAME, fullmatch=True).filter(lambda name: len(name) < 30)
result_names = names | st.from_regex(RESULT_NAME, fullmatch=True).filter(lambda name: len(name) < 30)
in_a_folder = settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


def write_runs(path, cells):
    rows = [(cell.id, "finished", 100, 3.0 + index, 3.0) for index, cell in enumerate(cells)]
    write_csv(path, ["cell", "status", "tokens", "train_loss", "valid_loss"], rows)


@in_a_folder
@given(figure=result_names, setup=names, rules=st.lists(names, min_size=1, max_size=3, unique=True))
def test_optima_and_runs_keep_every_name(tmp_path, figure, setup, rules):
    request = make_request(rules, (32, 64)) | {"setup": setup}
    parsed = spec_of(request)
    cells = parsed.figure.cells()
    runs, optima = tmp_path / "runs.csv", tmp_path / "optima.csv"
    write_runs(runs, cells)
    assert read_runs(runs).index.tolist() == [cell.id for cell in cells]
    curves = [curve for of_panel in figure_curves(read_runs(runs), parsed).values() for curve in of_panel.values()]
    assert [loss for curve in curves for loss in curve.mean] == [3.0 + index for index in range(len(cells))]
    write_optima(tmp_path, figure, request)
    found = read_rows(optima, OptimumRow)
    assert [(row.figure, row.setup, row.panel, row.parametrization) for row in found] == [
        (figure, setup, rule, rule) for rule in rules for _ in (32, 64)
    ]
    assert csv_text(OptimumRow._fields, found) == optima.read_text()
    assert list(read_optima(optima, figure, parsed)) == rules


@in_a_folder
@given(rules=st.lists(names, min_size=1, max_size=3, unique=True), quantity=names, block=names | st.just(""))
def test_values_and_slopes_keep_every_name(tmp_path, rules, quantity, block):
    path, out = tmp_path / "values.csv", tmp_path / "slopes.csv"
    rows = [(rule, width, 0, 1, quantity, block, float(width)) for rule in rules for width in (8, 16)]
    write_csv(path, columns_over("width"), rows)
    assert list(read_values(path).itertuples(index=False, name=None)) == rows
    write_csv(out, Slope._fields, slopes(read_values(path), 0.9))
    found = read_rows(out, Slope)
    assert [(slope.parametrization, slope.quantity, slope.block) for slope in found] == [
        (rule, quantity, block) for rule in rules
    ]
    assert csv_text(Slope._fields, found) == out.read_text()


@in_a_folder
@given(figure=result_names, probe=result_names, rule=names)
def test_a_claim_is_tested_on_what_it_names(tmp_path, figure, probe, rule):
    assume(figure != probe and not {figure, probe} & RESERVED)
    request = make_request([rule], (32, 64, 128))
    folder = tmp_path / "figures" / figure
    folder.mkdir(parents=True, exist_ok=True)
    write_runs(folder / "runs.csv", spec_of(request).figure.cells())
    write_optima(folder, figure, request)
    write_csv(folder.parent / f"{probe}.csv", Slope._fields, [(rule, "logits", "", 1, 0.5, 0.4, 0.6, 2, 2, 8, 16)])
    claim = ClaimSettings(
        says="it holds",
        decided_by="more",
        drifts=(DriftTest(figure=figure, panel=rule, expect="keeps"),),
        slopes=(SlopeTest(probe=probe, parametrization=rule, quantity="logits", step=1, slope=0.5),),
    )
    claims = ClaimsSettings(
        drift_margin=1.0,
        excess_margin=0.1,
        slope_margin=0.2,
        refuting_tokens=1,
        refuting_octaves=1.0,
        table={"c": claim},
    )
    config = config_of({figure: request})
    probes = {probe: replace(CONFIG.probes["lemma_b1"], setup="small")}
    config = replace(config, claims=claims, probes=probes)
    drift, slope = verdict.tests_of("c", claim, claims, verdict.read_evidence(config, folder.parent))
    assert drift.octaves == 2
    assert (slope.estimate, slope.verdict) == (0.5, "replicated")


@in_a_folder
@given(rule=names, machine=names)
def test_published_losses_and_benchmarks_keep_every_name(tmp_path, rule, machine):
    write_csv(tmp_path / "p.csv", ["parametrization", "width", "learning_rate", "train_loss"], [(rule, 8, 0.1, 3.0)])
    assert [point.parametrization for point in read_published(tmp_path / "p.csv", "train_loss")] == [rule]
    columns = ["architecture", "default", "width", "gflops", "cpu", "gpu", "threads"]
    write_csv(tmp_path / "step.csv", columns, [("moe", "yes", 8, 1.5, machine, None, 2)])
    assert Machine.read(tmp_path / "step.csv").name == f"{machine}, 2 threads"
    write_csv(tmp_path / "step.csv", columns, [("moe", "yes", 8, 1.5, "any", machine, 2)])
    assert Machine.read(tmp_path / "step.csv").name == machine


ALIKE = """
corpora:
  "none": {source: text, files: [smoke.txt], tokenizer: bpe, vocabulary: 300, validation_fraction: 0.1}
parametrizations:
  "null": {like: sp}
  "nan": {like: mup}
  "007": {like: mup}
setups:
  "na":
    like: small
    corpus: "none"
    model: {base_width: 8, base_experts: 2, heads: 2, sequence: 16, blocks: 1}
    training: {steps: 2, batch_size: 2, warmup_steps: 1, final_loss_steps: 1, validation_batches: 1}
figures:
  "inf":
    setup: "na"
    panel: parametrization
    curve: width
    reference: published.csv
    axes: &axes
      architecture: [moe]
      parametrization: ["null", "nan", "007"]
      width: [8, 16]
      experts: [2]
      granularity: [1]
      learning_rate: [2^-7, 2^-6, 2^-5]
      seed: [0]
  "1e5":
    setup: "na"
    panel: width
    curve: experts
    axes: {<<: *axes, parametrization: ["null"], width: [8], experts: [2, 4]}
compositions: {"false": ["inf", "1e5"]}
probes:
  "true":
    setup: "na"
    measure: activations
    steps: [0, 1]
    axes: {<<: *axes, learning_rate: [2^-6]}
claims:
  table:
    "no":
      says: muP keeps
      decided_by: more
      drifts: [{figure: "inf", panel: "nan", expect: keeps}, {figure: "1e5", panel: "8", expect: keeps}]
      slopes: [{probe: "true", parametrization: "007", quantity: router logits, step: 1, slope: 0}]
"""


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.workflow
def test_the_whole_paper_is_made_with_names_that_read_like_other_values(tmp_path):
    project = make_project(tmp_path / "project")
    document = yaml.safe_load((project / "config.yaml").read_text())
    document |= {"figures": {}, "compositions": {}, "trends": {}, "probes": {}}
    document["claims"]["table"] = {}
    (project / "config.yaml").write_text(yaml.safe_dump(document))
    (project / "names.yaml").write_text(ALIKE)
    points = [("null", 8, 2**-6, 5.0), ("007", 16, 2**-6, 5.0)]
    columns = ["parametrization", "width", "learning_rate", document["analysis"]["loss"]]
    write_csv(project / "published.csv", columns, points)
    done = snakemake(project, "results/paper", "--cores", "2", "--configfile", "names.yaml")
    assert done.returncode == 0, done.stdout
    results = project / "results"
    drawn = {Path(path).stem for path in (results / "paper").read_text().split() if path.endswith(".pdf")}
    assert drawn == {"false", "true", "verdicts"}
    runs = rows_of(results / "runs.csv")
    assert {(row["setup"], row["parametrization"]) for row in runs} == {("na", rule) for rule in ("null", "nan", "007")}
    panels = {(row["figure"], row["panel"]) for row in rows_of(results / "optima.csv")}
    assert panels == {("inf", "null"), ("inf", "nan"), ("inf", "007"), ("1e5", "8")}
    compared = rows_of(results / "inf/reference.csv")
    assert [row["parametrization"] for row in compared] == ["null", "007"]
    assert all(row["our_loss"] for row in compared)
    tests = rows_of(results / "claims/tests.csv")
    assert {test["claim"] for test in tests} == {"no"}
    assert not any("has no panel" in test["reason"] or "did not measure" in test["reason"] for test in tests)
    assert {"none", "inf", "1e5", "true"} < {row["sweep"] for row in rows_of(results / "plan.csv")}
    assert {row["corpus"] for row in rows_of(results / "table2.csv")} == {"none"}
    config = ["--config", str(project / "config.yaml"), str(project / "names.yaml")]
    assert main(["record", "nan", "--results", str(results), *config]) == 0
    for table in ("runs.csv", "optima.csv", "claims.csv", "true.csv", "inf/reference.csv"):
        assert (results / "recorded/nan" / table).read_bytes() == (results / table).read_bytes()
    values = (results / "recorded/nan/true/values.csv.gz").read_bytes()
    assert gzip.decompress(values) == (results / "true/values.csv").read_bytes()
