"""Writes the models, sweeps and hyperparameters of all figures as CSV, Markdown and LaTeX.

The paper's own Table 2 is not public; this one describes the sweep that runs. The CSV has a row per model, with its
sweep and its set-up's hyperparameters; Markdown and LaTeX have a separate part for each. Sizes are counted from each
model's inventory of tensors, with the vocabulary size that tokenization found.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mup_moe.analysis.markup import grouped, latex_table, latex_text, markdown_table, markdown_text
from mup_moe.analysis.names import axis_value, parametrization_title
from mup_moe.analysis.pages import write_page
from mup_moe.config.architecture import SHARED_SETTINGS
from mup_moe.config.cell import Cell
from mup_moe.config.settings import Config, CorpusSettings, FigureSettings, SetupSettings
from mup_moe.data.tokens import MANIFEST
from mup_moe.figures.plotting import EngFormatter
from mup_moe.files import UserError, read_json, write_csv, write_text
from mup_moe.model.inventory import ModelShape, ModelSize, model_size
from mup_moe.options import read_sweep

_SHAPE = ("setup", "architecture", "width", "experts", "granularity")  # fields that all cells of one model share
# Settings that the columns of each model already show.
_SHOWN_PER_MODEL = {"blocks", "heads", "head_size"}


def run(arguments: argparse.Namespace) -> None:
    """Writes table2.csv, .md, .html and .tex. Raises UserError."""
    sweep = read_sweep(arguments)
    config, out = sweep.config, sweep.results / "table2"
    setups = {figure.setup: config.setups[figure.setup] for figure in config.figures.values()}
    names = dict.fromkeys(setup.corpus for setup in setups.values())
    corpora = {name: read_corpus(name, config.corpora[name], sweep.tokens(name)) for name in names}
    models = models_of(config, {name: corpus["vocabulary"] for name, corpus in corpora.items()})
    ours = {model.cells[0].setup for model in models if model.shape.hub is None}
    shared = {name: hyperparameters_of(setup, corpora[setup.corpus], name in ours) for name, setup in setups.items()}
    rows = [
        model.row() | {name: value for group in shared[model.cells[0].setup].values() for name, value in group.items()}
        for model in models
    ]
    write_csv(out.with_suffix(".csv"), list(rows[0]), ([_plain(value) for value in row.values()] for row in rows))
    parts = {
        "Models": _model_part(models),
        "Sweeps": _sweep_part(config.figures),
        "Hyperparameters": _hyperparameter_part(shared),
    }
    tables = (f"## {title}\n\n{markdown_table(*_escaped(part, markdown_text))}" for title, part in parts.items())
    write_page(out, "\n".join(tables))
    tables = (f"% {title}\n{latex_table(*_escaped(part, latex_text))}" for title, part in parts.items())
    write_text(out.with_suffix(".tex"), "\n".join(tables))


@dataclass(frozen=True)
class Model:
    """A model shape in the sweep, with its cells from all figures."""

    cells: list[Cell]
    figures: list[str]
    setup: SetupSettings
    shape: ModelShape
    size: ModelSize

    def row(self) -> dict[str, Any]:
        """Returns the model's columns of the CSV before the hyperparameters; values in which cells differ are lists."""
        cell, shape, size, tokens = self.cells[0], self.shape, self.size, self.setup.tokens_per_run
        return {
            **{name: getattr(cell, name) for name in _SHAPE},
            "figures": self.figures,
            "blocks": self.setup.model.blocks,
            "heads": shape.heads,
            "head_size": shape.head_size,
            "total_experts": None if shape.dense else shape.total_experts,
            "active_experts": None if shape.dense else shape.active_experts,
            "expert_size": shape.expert_size,
            "parameters": size.parameters,
            "active_parameters": size.active_parameters,
            "tokens": tokens,
            "flops": tokens * size.flops_per_token,
            "parametrizations": _distinct(cell.parametrization for cell in self.cells),
            "learning_rates": _distinct(cell.learning_rate for cell in self.cells),
            "seeds": _distinct(cell.seed for cell in self.cells),
        }


def models_of(config: Config, vocabularies: Mapping[str, int]) -> list[Model]:
    """Returns the distinct models of all figures, set-up by set-up. vocabularies: corpus -> vocabulary size."""
    alike: dict[tuple[Any, ...], list[tuple[str, Cell]]] = {}
    for name, figure in config.figures.items():
        for cell in figure.cells():
            alike.setdefault(tuple(getattr(cell, axis) for axis in _SHAPE), []).append((name, cell))
    models = []
    for found in alike.values():
        cells = [cell for _, cell in found]
        setup = config.setups[cells[0].setup]
        architecture = config.architecture(cells[0])
        shape = ModelShape.of(cells[0], setup.model, vocabularies[setup.corpus], architecture)
        models.append(Model(cells, _distinct(name for name, _ in found), setup, shape, model_size(shape, setup.model)))
    order = _distinct(setup for setup, *_ in alike)
    return sorted(models, key=lambda model: order.index(model.cells[0].setup))


def read_corpus(name: str, settings: CorpusSettings, folder: Path) -> dict[str, Any]:
    """Returns the columns of the CSV for a corpus, read from its folder of tokens. Raises UserError."""
    path = folder / MANIFEST
    manifest = read_json(path)
    try:
        return {
            "corpus": name,
            "source": settings.source,
            "tokenizer": settings.tokenizer,
            "vocabulary": int(manifest["vocabulary"]),
            "training_tokens": int(manifest["splits"]["train"]["tokens"]),
            "validation_tokens": int(manifest["splits"]["valid"]["tokens"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r}): delete its folder and tokenize the corpus again") from None


def hyperparameters_of(setup: SetupSettings, corpus: Mapping[str, Any], ours: bool) -> dict[str, dict[str, Any]]:
    """Returns everything that the cells of a set-up share, except _SHOWN_PER_MODEL: group -> name -> value.

    ours: whether some cells train our own model; otherwise settings that only concern our model are None.
    """
    model = {
        name: value if ours or name in SHARED_SETTINGS else None
        for name, value in vars(setup.model).items()
        if name not in _SHOWN_PER_MODEL
    }
    return {"Text": dict(corpus), "Model": model, "Training": dict(vars(setup.training))}


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
            [row["setup"], ", ".join(row["figures"]), axis_value("architecture", row["architecture"])]
            + [_shown(row[name]) for name in ("width", "blocks", "heads", "head_size", *counts)]
            + [prefixed(row[name]) for name in ("parameters", "active_parameters", "tokens", "flops")]
        )
    return headings, grouped(rows)


def _sweep_part(figures: Mapping[str, FigureSettings]) -> _Part:
    headings = ("Set-up", "Figure", "Parametrizations", "Widths", "Experts", "Granularity", "Learning rates", "Seeds")
    rows = [
        [figure.setup, name, ", ".join(map(parametrization_title, figure.axes.parametrization))]
        + [_shown(list(getattr(figure.axes, axis))) for axis in ("width", "experts", "granularity")]
        + [_shown(list(figure.axes.learning_rate)), _shown(list(figure.axes.seed))]
        for name, figure in figures.items()
    ]
    return headings, grouped(rows)


def _hyperparameter_part(shared: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> _Part:
    groups = next(iter(shared.values()))
    rows = [
        [group, name.replace("_", " "), *(_shown(setup[group][name]) for setup in shared.values())]
        for group in groups
        for name in groups[group]
    ]
    return ("Group", "Hyperparameter", *shared), grouped(rows)


def _plain(value: Any) -> Any:
    """Returns a value for the CSV; lists are joined by spaces."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    """Formats a value for readers."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "--" if value is None else str(value)


def _escaped(part: _Part, escape: Callable[[str], str]) -> _Part:
    headings, rows = part
    return [escape(cell) for cell in headings], [[escape(cell) for cell in row] for row in rows]
