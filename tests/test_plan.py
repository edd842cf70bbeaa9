"""The bill and Table 2, counted from models before anything is trained."""

import csv
import json
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
from tokenizers import pre_tokenizers

from conftest import CONFIG, ROOT, VOCABULARY, run_step
from mup_moe.config.cell import LearningRate
from mup_moe.config.load import validate
from mup_moe.config.settings import Config
from mup_moe.data.corpus import BYTES, vocabulary_of
from mup_moe.data.tokenizer import gpt2
from mup_moe.files import UserError
from mup_moe.model.inventory import size_of
from mup_moe.model.transformer import Transformer
from mup_moe.sweep import Sweep
from mup_moe.tables import plan, table2

BENCHMARK = ROOT / "benchmarks" / "step.csv"
MACHINE = plan.Machine.read(BENCHMARK)


def bill(config: Config = CONFIG) -> dict[str, plan.PlanRow]:
    return {row.sweep: row for row in plan.plan(Sweep(config), MACHINE)}


def with_figure(name: str, **axes) -> Config:
    figure = CONFIG.figures[name]
    figures = CONFIG.figures | {name: replace(figure, axes=replace(figure.axes, **axes))}
    return replace(CONFIG, figures=figures)


def write_benchmark(path: Path, *rows: str) -> Path:
    lines = [f"moe,yes,{row}" for row in rows]
    # Rows that are not the pipeline's default, or not MoE, must not be used.
    others = ["moe,no,64,9000,A CPU,1,", "dense,yes,64,9000,A CPU,1,"]
    path.write_text("\n".join(["architecture,default,width,gflops,cpu,threads,gpu", *lines, *others, ""]))
    return path


def test_a_config_survives_a_round_trip_through_json():
    config = with_figure("figure1", learning_rate=tuple(map(LearningRate, ("0.003", "2^-6.25", "2^-6", 0.1))))
    assert validate(json.loads(json.dumps(asdict(config)))) == config


def test_plan_needs_nothing_but_config_and_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_step("plan", "--benchmark", BENCHMARK, config=CONFIG, results=Path("results")) == 0
    assert {path.name for path in tmp_path.rglob("plan*")} == {"plan.csv", "plan.html", "plan.md"}
    table = pd.read_csv("results/plan.csv")
    assert list(table["sweep"]) == ["python", *CONFIG.figures, *CONFIG.probes, "total"]
    assert set(table["machine"]) == {MACHINE.name}
    printed = capsys.readouterr().out
    for name in CONFIG.figures:
        assert name in printed
    lines = Path("results/plan.md").read_text().splitlines()
    assert len({line.count(" | ") for line in lines if line.startswith("|")}) == 1


def test_the_bill_of_a_probe_on_a_cpu_includes_its_parameter_updates():
    on_cpu, on_gpu = (
        {row.sweep: row for row in plan.plan(Sweep(CONFIG), m)} for m in (MACHINE, replace(MACHINE, gpu=True))
    )
    for name in CONFIG.figures:
        assert on_cpu[name].device_hours == on_gpu[name].device_hours
    probe = CONFIG.probes["lemma_b1"]
    setup = CONFIG.setups[probe.setup]
    sizes = [size_of(cell, setup.model, vocabulary_of(CONFIG.corpora[setup.corpus])) for cell in probe.cells()]
    updates = probe.steps[-1] * sum(size.parameters for size in sizes)
    more = 3600 * (on_cpu["lemma_b1"].device_hours - on_gpu["lemma_b1"].device_hours)
    assert more == pytest.approx(MACHINE.update_seconds(1, 1) * updates)


def test_the_total_counts_every_cell_once():
    rows = bill()
    cells = {cell.id: cell for figure in CONFIG.figures.values() for cell in figure.cells()}
    probes = sum(len(probe.cells()) for probe in CONFIG.probes.values())
    total = rows.pop("total")
    assert total.cells == len(cells) + probes == sum(row.new_cells or 0 for row in rows.values())
    flops = 0
    for cell in cells.values():
        setup = CONFIG.setups[cell.setup]
        vocabulary = vocabulary_of(CONFIG.corpora[setup.corpus])
        flops += setup.tokens_per_run * size_of(cell, setup.model, vocabulary).flops_per_token
    assert total.flops == flops + sum(rows[name].flops for name in CONFIG.probes)
    assert total.disk_bytes == sum(
        row.disk_bytes * row.new_cells // row.cells if row.cells else row.disk_bytes for row in rows.values()
    )


def test_figures_that_share_cells_pay_once():
    shared = {cell.id for cell in CONFIG.figures["figure2a"].cells()} & {
        c.id for c in CONFIG.figures["figure2b"].cells()
    }
    row = bill()["figure2b"]
    assert shared
    assert row.cells - row.new_cells >= len(shared)


def test_the_saving_depends_on_the_widths_and_not_on_the_grid():
    figure = CONFIG.figures["figure1"]
    row = bill()["figure1"]
    setup = CONFIG.setups[figure.setup]
    vocabulary = vocabulary_of(CONFIG.corpora[setup.corpus])
    base, target = (
        next(size_of(cell, setup.model, vocabulary).flops_per_token for cell in figure.cells() if cell.width == width)
        for width in (setup.model.base_width, max(figure.axes.width))
    )
    assert row.saving == pytest.approx(target / base)
    assert row.flops_at_base == base * setup.tokens_per_run * len(figure.axes.learning_rate)
    more = bill(with_figure("figure1", seed=(0, 1)))["figure1"]
    assert (more.flops_at_base, more.flops_at_target) == (2 * row.flops_at_base, 2 * row.flops_at_target)
    assert bill()["figure2a"].saving is None


def test_hours_follow_the_measured_rate_at_a_cells_width(tmp_path):
    path = write_benchmark(tmp_path / "step.csv", "256,40,A CPU,1,", "64,20,A CPU,1,")
    machine = plan.Machine.read(path)
    flops = 10**12
    assert machine.name == "A CPU, 1 thread"
    assert machine.seconds(flops, 64, "moe") == pytest.approx(flops / 20e9)
    assert machine.seconds(flops, 128, "moe") == pytest.approx(flops / 30e9)
    assert machine.seconds(flops, 8, "moe") == machine.seconds(flops, 64, "moe")
    assert machine.seconds(flops, 4096, "moe") == machine.seconds(flops, 256, "moe")


def test_a_model_of_transformers_is_planned_at_the_measured_rate_of_transformers(tmp_path):
    rows = pd.read_csv(BENCHMARK)
    # A bill uses the rows for all of the machine's instructions.
    rows = rows[rows["instructions"] == rows["instructions"][0]]
    alike = (rows["precision"] == "float32") & (rows["step"] == "eager") & (rows["allocator"] == "kept")
    peer = rows[(rows["system"] == "transformers") & (rows["architecture"] == "moe") & alike]
    expected = 1e12 / (1e9 * peer[peer["width"] == 64]["gflops"].item())
    assert MACHINE.seconds(1e12, 64, "mixtral") == pytest.approx(expected)
    assert MACHINE.seconds(1e12, 64, "mixtral") > MACHINE.seconds(1e12, 64, "moe")
    # If transformers was not measured at every width, our own rate is used.
    rows.drop(peer.index[-1]).to_csv(tmp_path / "step.csv")
    without = plan.Machine.read(tmp_path / "step.csv")
    assert without.seconds(1e12, 64, "mixtral") == without.seconds(1e12, 64, "moe")


def test_the_machine_is_the_gpu_where_there_is_one(tmp_path):
    path = write_benchmark(tmp_path / "step.csv", "64,2000,A CPU,1,A GPU")
    assert plan.Machine.read(path).name == "A GPU"


def test_rows_of_two_machines_are_refused(tmp_path):
    path = write_benchmark(tmp_path / "step.csv", "64,20,A CPU,1,", "64,2000,A CPU,1,A GPU")
    with pytest.raises(UserError, match="A CPU, 1 thread and A GPU"):
        plan.Machine.read(path)


def test_ten_thousand_cells_are_planned():
    rates = tuple(LearningRate(f"2^-{n / 4}") for n in range(8, 58))
    config = with_figure("figure1", learning_rate=rates, seed=tuple(range(14)))
    row = bill(config)["figure1"]
    assert row.cells >= 10_000


def test_a_corpus_takes_more_disk_space_the_more_it_may_read():
    python = CONFIG.corpora["python"]
    small = replace(CONFIG, corpora={"python": replace(python, max_bytes=1_000_000)})
    assert bill(small)["python"].disk_bytes < bill()["python"].disk_bytes
    wide = replace(CONFIG, corpora={"python": replace(python, max_bytes=1_000_000, vocabulary=70_000)})
    row = bill(wide)["python"]
    assert row.disk_bytes == 4 * row.tokens


def test_gpt2_has_the_vocabulary_that_its_own_config_says():
    transformers = pytest.importorskip("transformers")
    gpt2 = replace(CONFIG.corpora["python"], tokenizer="gpt2", vocabulary=None)
    assert vocabulary_of(gpt2) == transformers.GPT2Config().vocab_size


NUMBERED = {token: i for i, token in enumerate([*sorted(BYTES), "ab"])}


def test_the_vocabulary_is_read_from_the_tokenizers_own_files(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(NUMBERED))
    assert vocabulary_of(corpus_of(tmp_path)) == 257


def corpus_of(folder):
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    Path(files[1]).touch()
    return replace(CONFIG.corpora["python"], tokenizer="gpt2", vocabulary=None, tokenizer_files=files)


NOT_A_VOCABULARY = {
    "absent": None,
    "empty": b"",
    "not UTF-8": b"\xff",
    "a list": b"[1, 2]",
    "endless": b"{" * 100_000,
    "cut off": b'{"a": ',
    "without tokens": {},
    "a tokenizer.json": {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": NUMBERED}},
    "split at white space": {token: i for i, token in enumerate("abcdefgh")},
    "a byte short": {token: i for i, token in enumerate(sorted(BYTES)[:-1])},
    "a gap": NUMBERED | {"ab": 300},
    "a repetition": NUMBERED | {"ab": 5},
    "from -1": NUMBERED | {"ab": -1},
    "fractions": {token: float(i) for token, i in NUMBERED.items()},
    "truth values": {"a": False, "b": True},
}


@pytest.mark.parametrize("kind", NOT_A_VOCABULARY)
def test_a_file_that_is_not_a_byte_level_vocabulary_is_refused_before_the_run_and_by_the_job(tmp_path, kind):
    content = NOT_A_VOCABULARY[kind]
    if content is not None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / "vocab.json").write_bytes(data)
    corpus = corpus_of(tmp_path)
    for read in (lambda: vocabulary_of(corpus), lambda: gpt2(corpus.tokenizer_files)):
        with pytest.raises(UserError, match=r"vocab\.json.* give GPT-2's vocab.json and merges.txt"):
            read()


def test_the_bytes_of_a_vocabulary_are_those_of_the_library():
    assert set(pre_tokenizers.ByteLevel.alphabet()) == BYTES


def models() -> list[table2.Model]:
    return table2.models_of(CONFIG, dict.fromkeys(CONFIG.corpora, VOCABULARY))


def test_table2_counts_what_a_real_model_has():
    for model in models():
        real = Transformer(model.shape, model.setup.model)
        assert model.size.parameters == sum(parameter.numel() for parameter in real.parameters())
        assert model.size.active_parameters <= model.size.parameters


def test_table2_has_every_model_once_with_the_figures_that_train_it():
    rows = [model.row() for model in models()]
    shape = ("setup", "architecture", "width", "experts", "granularity")
    keys = [tuple(row[name] for name in shape) for row in rows]
    cells = [cell for figure in CONFIG.figures.values() for cell in figure.cells()]
    assert max(Counter(keys).values()) == 1
    assert set(keys) == {(c.setup, c.architecture, c.width, c.experts, c.granularity) for c in cells}
    for name, figure in CONFIG.figures.items():
        widths = {row["width"] for row in rows if name in row["figures"]}
        assert widths == set(figure.axes.width)


def test_granularity_changes_nothing_but_the_router():
    rows = [model for model in models() if "figure2b" in model.figures]
    granularities = {model.shape.granularity for model in rows}
    assert len(granularities) > 2

    def except_the_router(model: table2.Model) -> tuple[int, int, int]:
        router = model.setup.model.blocks * model.shape.width * model.shape.total_experts
        size = model.size
        return size.parameters - router, size.active_parameters - router, size.flops_per_token - 6 * router

    assert len({except_the_router(model) for model in rows}) == 1
    assert len({model.row()["flops"] for model in rows}) == len(granularities)


@pytest.fixture
def tables(tmp_path) -> Path:
    for name in {CONFIG.setups[figure.setup].corpus for figure in CONFIG.figures.values()}:
        (tmp_path / "data" / name).mkdir(parents=True)
        manifest = {"vocabulary": VOCABULARY, "splits": {"train": {"tokens": 5000}, "valid": {"tokens": 100}}}
        (tmp_path / "data" / name / "manifest.json").write_text(json.dumps(manifest))
    assert run_step("table2", config=CONFIG, results=tmp_path) == 0
    return tmp_path / "table2"


def test_table2_csv_holds_sizes_and_hyperparameters(tables):
    with Path(f"{tables}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["parameters"]) for row in rows] == [model.size.parameters for model in models()]
    first = rows[0]
    setup = CONFIG.setups[first["setup"]]
    for section in (setup.model, setup.training):
        for name in vars(section):
            assert name in first
    assert int(first["vocabulary"]) == VOCABULARY
    assert int(first["training_tokens"]) == 5000
    assert int(first["steps"]) == setup.training.steps
    assert float(first["adam_eps"]) == setup.training.adam_eps
    rates = {LearningRate(rate) for rate in first["learning_rates"].split()}
    assert rates == set(CONFIG.figures[first["figures"].split()[0]].axes.learning_rate)


def test_table2_reads_as_markdown_and_latex(tables):
    for part in Path(f"{tables}.md").read_text().split("## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len(lines) > 2
        assert len({line.count(" | ") for line in lines}) == 1
    text = Path(f"{tables}.tex").read_text()
    assert text.isascii()
    for tabular in text.split(r"\toprule")[1:]:
        body = [line for line in tabular.splitlines() if line.endswith(r"\\")]
        assert len({len(re.findall(r"(?<!\\)&", line)) for line in body}) == 1


def test_table2_leaves_out_settings_that_do_not_apply_to_models_of_transformers():
    setup = CONFIG.setups["mixtral"]
    ours, theirs = (table2.hyperparameters_of(setup, {}, of_ours)["Model"] for of_ours in (True, False))
    assert theirs["top_k"] == ours["top_k"]
    assert ours["capacity_factor"] == 1.25
    assert theirs["capacity_factor"] is None
    assert list(ours) == list(theirs)


@pytest.mark.parametrize("text", ['{"vocabulary": 97}', "[]", "{"])
def test_table2_names_a_damaged_manifest(tables, text, capsys):
    (tables.parent / "data/python/manifest.json").write_text(text)
    assert run_step("table2", config=CONFIG, results=tables.parent) == 1
    assert "python/manifest.json is damaged" in capsys.readouterr().err
