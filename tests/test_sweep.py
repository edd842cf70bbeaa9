"""The cells, jobs and files of a config, without Snakemake."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import CONFIG, ROOT, TABLE, config_of, make_request, write_tokens
from mup_moe.config.cell import Cell
from mup_moe.config.jobs import jobs
from mup_moe.config.settings import CorpusSettings
from mup_moe.data.tokens import Tokens
from mup_moe.figures.shown import drawn_in_paper
from mup_moe.files import UserError
from mup_moe.model.inventory import ModelShape, model_size
from mup_moe.sweep import Sweep, digest, one_of
from mup_moe.training.memory import memory_mb

SWEEP = Sweep(CONFIG)
CELL = "small_moe_mup_w64_e8_g1_lr2^-6_s0"


def with_execution(**changes) -> Sweep:
    return Sweep(replace(CONFIG, execution=replace(CONFIG.execution, **changes)))


def test_a_sweep_needs_no_torch_pandas_or_numpy():
    heavy = ["torch", "pandas", "numpy", "scipy", "matplotlib", "snakemake"]
    code = f"import sys, mup_moe.sweep; print([name for name in {heavy} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_figures_and_compositions_are_chosen_by_name_in_the_given_order():
    assert list(SWEEP.chosen(None)) == list(CONFIG.figures)
    assert SWEEP.chosen(["figure3", "figure2"]) == {
        name: CONFIG.figures[name].cells() for name in ("figure3", "figure2a", "figure2b", "figure2b-authors")
    }
    with pytest.raises(UserError, match="`figures` has no 'figure22': did you mean figure2"):
        SWEEP.chosen(["figure22"])


def test_the_paper_draws_the_figures_of_a_composition_only_there():
    assert drawn_in_paper(CONFIG) == [
        *("figure1", "figure3", "figure4", "attribution", "attribution4", "sensitivity", "figure2"),
        *CONFIG.probes,
        "verdicts",
    ]


@pytest.mark.parametrize("axes", [(), ("seed",), ("learning_rate", "seed")])
def test_every_cell_of_a_figure_has_one_job(axes):
    sweep = with_execution(lockstep=axes)
    assert sweep.jobs == jobs(sweep.figures, axes, 1)
    shown = {cell for cells in sweep.figures.values() for cell in cells}
    assert sweep.job_of.keys() == shown
    assert all(cell in sweep.jobs[job] for cell, job in sweep.job_of.items())
    if not axes:
        assert all(job == cell.id for cell, job in sweep.job_of.items())


def test_a_request_is_the_same_by_name_and_by_cell_whether_in_a_figure_or_not():
    request = SWEEP.request(CELL)
    assert request == SWEEP.request(Cell.parse(CELL))
    assert (request.model, request.training) == (CONFIG.setups["small"].model, CONFIG.setups["small"].training)
    assert request.parametrization == TABLE["mup"]
    assert SWEEP.request("small_moe_experts-only_w24_e4_g2_lr0.003_s5").cell.seed == 5


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        ("small_moe_ntk_w32_e8_g1_lr2^-6_s0", "config.yaml does not list 'ntk'"),
        ("big_moe_mup_w32_e8_g1_lr2^-6_s0", "config.yaml does not list 'big'"),
        ("small_moe_mup_w33_e8_g1_lr2^-6_s0", "not divisible"),
        ("nonsense", "is not a cell's id"),
    ],
)
def test_a_cell_that_cannot_be_built_is_refused(cell, sentence):
    with pytest.raises(UserError, match=sentence):
        SWEEP.request(cell)


def test_the_digest_of_settings_ignores_names_of_cells_and_execution():
    other = CELL.replace("w64", "w32")
    assert (
        SWEEP.settings_digest([CELL])
        == SWEEP.settings_digest([other, CELL])
        == with_execution(threads=2).settings_digest([CELL])
    )
    assert SWEEP.settings_digest([CELL]) != SWEEP.settings_digest([CELL.replace("_mup_", "_sp_")])
    small = CONFIG.setups["small"]
    longer = replace(small, training=replace(small.training, steps=301))
    assert Sweep(replace(CONFIG, setups=CONFIG.setups | {"small": longer})).settings_digest(
        [CELL]
    ) != SWEEP.settings_digest([CELL])


def test_fingerprints_are_empty_until_the_tokens_are_there(tmp_path, tokens):
    requests = [make_request(seed=seed) for seed in (0, 1)]
    first, cells = requests[0], [request.cell for request in requests]
    sweep = Sweep(config_of(cells, model=first.model, training=first.training), tmp_path)
    assert sweep.fingerprints("figure1") == {cell.id: "" for cell in cells}
    folder = sweep.tokens(sweep.corpus(cells[0]))
    folder.mkdir(parents=True)
    write_tokens(folder, tokens)
    expected = {request.cell.id: request.fingerprint(Tokens.open(folder).digest) for request in requests}
    assert sweep.fingerprints("figure1") == expected


def test_memory_is_that_of_the_device_that_the_config_names():
    requests = [SWEEP.request(CELL)]
    for device in ("cpu", "cuda"):
        assert with_execution(device=device).memory_mb([CELL]) == memory_mb(requests, 1024, device, "auto")


def test_a_probe_asks_for_the_memory_of_its_widest_model_without_checkpoints():
    sweep, model = with_execution(device="cpu"), CONFIG.setups["probe"].model
    widest = max(CONFIG.probes["lemma_b1"].cells(), key=lambda cell: cell.width)
    parameters = model_size(ModelShape.of(widest, model, 1024), model).parameters
    # Float32 parameters, gradients and Adam's two moments.
    assert 16e-6 * parameters < sweep.probe_memory_mb("lemma_b1") < sweep.memory_mb([widest])


def test_the_benchmark_is_that_of_a_gpu_where_one_was_measured_and_will_train(tmp_path):
    (tmp_path / "gpu").mkdir()
    assert with_execution(device="cuda").benchmark(tmp_path) == tmp_path / "step.csv"
    (tmp_path / "gpu/step.csv").touch()
    assert with_execution(device="cuda").benchmark(tmp_path) == tmp_path / "gpu/step.csv"
    assert with_execution(device="cpu").benchmark(tmp_path) == tmp_path / "step.csv"


def test_missing_text_is_reported_with_its_corpus():
    settings = {"source": "text", "files": ("nothing-*.txt",), "tokenizer": "bpe", "vocabulary": 300}
    corpora = {"python": CorpusSettings(**settings, validation_fraction=0.1)}
    with pytest.raises(UserError, match=r"`corpora.python`: .*nothing-\*.txt"):
        Sweep(replace(CONFIG, corpora=corpora)).text("python")


def test_paths_are_in_the_folder_of_results():
    sweep = Sweep(CONFIG, Path("elsewhere"))
    paths = [
        sweep.cells,
        sweep.tokens("python"),
        sweep.runs("figure1"),
        sweep.optima("figure1"),
        sweep.slopes("lemma_b1"),
    ]
    paths += [*sweep.token_files("python"), sweep.probe_values("lemma_b1")]
    assert all(path.is_relative_to("elsewhere") for path in paths)
    assert sweep.runs("figure1") == Path("elsewhere/figure1/runs.csv")


def test_names_and_digests():
    assert one_of("a", ["a", "b"], "figures") == "a"
    with pytest.raises(UserError, match="`figures` has no 'x': choose from a, b"):
        one_of("x", ["a", "b"], "figures")
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1})
