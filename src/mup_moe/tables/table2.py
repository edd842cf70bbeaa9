"""Writes the models, sweeps and hyperparameters of all figures as CSV, Markdown and LaTeX.

The paper's own Table 2 is not public: this is that of the sweep that runs. The CSV has a row per
model, its sweep and its set-up's hyperparameters beside it; Markdown and LaTeX have a part for each.
Sizes are counted from each model's inventory of tensors, with the vocabulary that tokenization found.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mup_moe.analysis.markup import html_page, latex_table, latex_text, markdown_table, markdown_text
from mup_moe.analysis.names import parametrization_title
from mup_moe.config.cell import Cell
from mup_moe.config.options import add_config_arguments, read_sweep
from mup_moe.config.settings import Config, CorpusSettings, FigureSettings, SetupSettings
from mup_moe.data.tokens import MANIFEST
from mup_moe.figures.plotting import EngFormatter
from mup_moe.files import UserError, read_json, write_csv, write_text
from mup_moe.model.inventory import ModelShape, size_of

MODEL_COLUMNS = (
    *("setup", "architecture", "width", "experts", "granularity", "figures", "blocks", "heads", "head_size"),
    *("total_experts", "active_experts", "expert_size", "parameters", "active_parameters", "tokens", "flops"),
    *("parametrizations", "learning_rates", "seeds"),
)
CORPUS_COLUMNS = ("corpus", "source", "tokenizer", "vocabulary", "training_tokens", "validation_tokens")
# What MODEL_COLUMNS tells of each model.
_TOLD = {"blocks", "heads", "head_size"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `table2`."""
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Writes table2.csv, .md, .html and .tex. Raises UserError."""
    sweep = read_sweep(arguments)
    config, out = sweep.config, sweep.results / "table2"
    setups = {figure.setup: config.setups[figure.setup] for figure in config.figures.values()}
    names = dict.fromkeys(setup.corpus for setup in setups.values())
    corpora = {name: read_corpus(name, config.corpora[name], sweep.tokens(name)) for name in names}
    models = models_of(config, {name: corpus["vocabulary"] for name, corpus in corpora.items()})
    shared = {name: hyperparameters_of(setup, corpora[setup.corpus]) for name, setup in setups.items()}
    rows = [model.row() | _flat(shared[model.cells[0].setup]) for model in models]
    write_csv(out.with_suffix(".csv"), list(rows[0]), ([_plain(value) for value in row.values()] for row in rows))
    parts = {
        "Models": _model_part(models),
        "Sweeps": _sweep_part(config.figures),
        "Hyperparameters": _hyperparameter_part(shared),
    }
    markdown = "\n".join(_markdown(*part) for part in parts.items())
    write_text(out.with_suffix(".md"), markdown)
    write_text(out.with_suffix(".html"), html_page("Models, sweeps and hyperparameters", markdown))
    write_text(out.with_suffix(".tex"), "\n".join(_latex(*part) for part in parts.items()))


@dataclass(frozen=True)
class Model:
    """A shape that figures train.

    cells: those of one shape, of all figures. tokens, flops: of one run.
    """

    shape: ModelShape
    setup: SetupSettings
    parameters: int
    active_parameters: int
    tokens: int
    flops: int
    figures: list[str] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """The values of MODEL_COLUMNS; those of an axis as a list."""
        cell, shape = self.cells[0], self.shape
        values = (
            *(cell.setup, cell.architecture, cell.width, cell.experts, cell.granularity),
            *(self.figures, self.setup.model.blocks, shape.heads, shape.head_size),
            *((None, None) if shape.dense else (shape.total_experts, shape.active_experts)),
            *(shape.expert_size, self.parameters, self.active_parameters, self.tokens, self.flops),
            _distinct(cell.parametrization for cell in self.cells),
            _distinct(cell.learning_rate for cell in self.cells),
            _distinct(cell.seed for cell in self.cells),
        )
        return dict(zip(MODEL_COLUMNS, values, strict=True))


def models_of(config: Config, vocabularies: Mapping[str, int]) -> list[Model]:
    """The distinct models of all figures, in their order; `vocabularies`: corpus -> its size."""
    models: dict[tuple[Any, ...], Model] = {}
    for name, figure in config.figures.items():
        setup = config.setups[figure.setup]
        vocabulary, tokens = vocabularies[setup.corpus], setup.tokens_per_run
        for cell in figure.cells():
            key = (cell.setup, cell.architecture, cell.width, cell.experts, cell.granularity)
            if key not in models:
                size = size_of(cell, setup.model, vocabulary)
                models[key] = Model(
                    shape=ModelShape.of(cell, setup.model, vocabulary),
                    setup=setup,
                    parameters=size.parameters,
                    active_parameters=size.active_parameters,
                    tokens=tokens,
                    flops=tokens * size.flops_per_token,
                )
            models[key].cells.append(cell)
            if name not in models[key].figures:
                models[key].figures.append(name)
    order = _distinct(model.cells[0].setup for model in models.values())
    return sorted(models.values(), key=lambda model: order.index(model.cells[0].setup))


def read_corpus(name: str, settings: CorpusSettings, folder: Path) -> dict[str, Any]:
    """The values of CORPUS_COLUMNS for a corpus that is tokenized in a folder. Raises UserError."""
    path = folder / MANIFEST
    manifest = read_json(path)
    try:
        tokens = [int(manifest["splits"][split]["tokens"]) for split in ("train", "valid")]
        values = (name, settings.source, settings.tokenizer, int(manifest["vocabulary"]), *tokens)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}): delete its folder and tokenize the corpus again") from None
    return dict(zip(CORPUS_COLUMNS, values, strict=True))


def hyperparameters_of(setup: SetupSettings, corpus: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All that the cells of a set-up share, but for what MODEL_COLUMNS tells: group -> name -> value."""
    model = {name: value for name, value in vars(setup.model).items() if name not in _TOLD}
    return {"Text": dict(corpus), "Model": model, "Training": dict(vars(setup.training))}


def _flat(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for group in groups.values() for name, value in group.items()}


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


_Part = tuple[Sequence[str], Sequence[Sequence[str]]]  # headings and rows


def _model_part(models: Iterable[Model]) -> _Part:
    headings = (
        *("Set-up", "Figures", "Model", "Width", "Blocks", "Heads", "Head size"),
        *("Total experts", "Active experts", "Granularity", "Expert size", "Parameters", "Active", "Tokens", "FLOPs"),
    )
    prefixed = EngFormatter(places=2)
    rows = []
    for model in models:
        row = model.row()
        counts = ("total_experts", "active_experts", "granularity", "expert_size")
        rows.append(
            [row["setup"], ", ".join(row["figures"]), {"moe": "MoE"}.get(row["architecture"], row["architecture"])]
            + [_shown(row[name]) for name in ("width", "blocks", "heads", "head_size", *counts)]
            + [prefixed(row[name]) for name in ("parameters", "active_parameters", "tokens", "flops")]
        )
    return headings, _grouped(rows)


def _sweep_part(figures: Mapping[str, FigureSettings]) -> _Part:
    headings = ("Set-up", "Figure", "Parametrizations", "Widths", "Experts", "Granularity", "Learning rates", "Seeds")
    rows = [
        [figure.setup, name, ", ".join(map(parametrization_title, figure.axes.parametrization))]
        + [_shown(list(getattr(figure.axes, axis))) for axis in ("width", "experts", "granularity")]
        + [_shown(list(figure.axes.learning_rate)), _shown(list(figure.axes.seed))]
        for name, figure in figures.items()
    ]
    return headings, _grouped(rows)


def _hyperparameter_part(shared: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> _Part:
    groups = next(iter(shared.values()))
    rows = [
        [group, name.replace("_", " "), *(_shown(setup[group][name]) for setup in shared.values())]
        for group in groups
        for name in groups[group]
    ]
    return ("Group", "Hyperparameter", *shared), _grouped(rows)


def _grouped(rows: Iterable[list[str]]) -> list[list[str]]:
    """The rows, with a first cell only where it changes."""
    told: list[list[str]] = []
    previous = None
    for first, *rest in rows:
        told.append(["" if first == previous else first, *rest])
        previous = first
    return told


def _plain(value: Any) -> str:
    """A value in the CSV: lists joined by spaces, nothing for None."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _shown(value: Any) -> str:
    """A value as people read it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "--" if value is None else str(value)


def _markdown(title: str, part: _Part) -> str:
    headings, rows = part
    table = markdown_table(_each(markdown_text, headings), (_each(markdown_text, row) for row in rows))
    return f"## {title}\n\n{table}"


def _latex(title: str, part: _Part) -> str:
    headings, rows = part
    return f"% {title}\n" + latex_table(_each(latex_text, headings), (_each(latex_text, row) for row in rows))


def _each(escape: Callable[[str], str], cells: Iterable[str]) -> list[str]:
    return [escape(cell) for cell in cells]
