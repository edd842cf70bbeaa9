"""A sweep, as defined by its config and results folder: cells, jobs, requests, tokens, memory, and every path.

The workflow and the commands share it. It imports no torch, pandas or numpy, so that a Snakefile starts fast.
"""

import difflib
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from itertools import chain
from operator import attrgetter
from pathlib import Path

from mup_moe.config.cell import Cell
from mup_moe.config.jobs import jobs
from mup_moe.config.settings import Config, without_neutral
from mup_moe.data.corpus import SPLITS, tokenizer_paths, vocabulary_of
from mup_moe.data.text_files import find
from mup_moe.files import UserError
from mup_moe.parametrization import Parametrization, control
from mup_moe.training.memory import memory_mb
from mup_moe.training.request import TrainingRequest


class Sweep:
    """Everything that a config defines about cells and files.

    results: the folder that a run writes to. layers: the sources that the config was merged from, for display.
    Cells given as text are named by their ids.
    """

    def __init__(self, config: Config, results: Path = Path("results"), layers: str = "given by hand") -> None:
        self.config, self.results, self.layers = config, results, layers
        self._requests: dict[Cell | str, TrainingRequest] = {}
        self._vocabularies: dict[str, int] = {}

    # ------------------------------------------------------------ cells

    @cached_property
    def figures(self) -> dict[str, list[Cell]]:
        """The cells of every figure, in config order."""
        return {name: figure.cells() for name, figure in self.config.figures.items()}

    @cached_property
    def jobs(self) -> dict[str, list[Cell]]:
        """The cells of every job, by the job's name; without `lockstep`, each cell is a job of its own."""
        return self.jobs_of(self.figures)

    def jobs_of(self, figures: dict[str, list[Cell]]) -> dict[str, list[Cell]]:
        """Returns the jobs of a sweep that has only these figures."""
        execution = self.config.execution
        return jobs(figures, execution.lockstep, execution.cells_per_job)

    @cached_property
    def job_of(self) -> dict[Cell, str]:
        """The job that trains each cell of the figures."""
        return {cell: job for job, cells in self.jobs.items() for cell in cells}

    @property
    def parametrizations(self) -> dict[str, Parametrization]:
        """The rows of the parametrization table in the config."""
        return self.config.rows

    def rules(self, name: str) -> Parametrization:
        """Returns a row of the table, or a control built from two rows (`parametrization.control`). Raises KeyError."""
        found = self.parametrizations.get(name) or control(self.parametrizations, name)
        if found is None:
            raise KeyError(name)
        return found

    def chosen(self, names: Sequence[str] | None) -> dict[str, list[Cell]]:
        """Returns the cells of the named figures and compositions, in that order; None: all. Raises UserError."""
        if names is None:
            return self.figures
        parts = self.config.parts
        known = [*self.config.figures, *parts]
        named = (parts.get(one_of(name, known, "figures"), (name,)) for name in names)
        return {figure: self.figures[figure] for figure in chain.from_iterable(named)}

    def request(self, cell: Cell | str) -> TrainingRequest:
        """Returns a cell's training request, in a figure or not. Raises UserError if the config cannot build it."""
        if cell in self._requests:
            return self._requests[cell]
        try:
            found = Cell.parse(cell) if isinstance(cell, str) else cell
            setup = self.config.setups[found.setup]
            architecture = self.config.architecture(found)
            setup.model.check(found, architecture)
            rules = self.rules(found.parametrization)
        except KeyError as error:
            raise UserError(
                f"cell {cell}: config.yaml does not list {error}: add it, or correct the cell's id"
            ) from None
        except ValueError as error:
            raise UserError(f"cell {cell}: {error}") from None
        self._requests[cell] = TrainingRequest(found, setup.model, setup.training, rules, architecture)
        return self._requests[cell]

    def settings_digest(self, cells: Iterable[Cell | str]) -> str:
        """Returns a digest of the settings that cells' names do not include; a change to it retrains the cells."""
        # They depend on the set-up, architecture and row only, so thousands of cells share a few.
        one_of_each = {(of.cell.setup, of.architecture, of.cell.parametrization): of for of in map(self.request, cells)}
        return digest(*sorted(request.to_json(cell=False) for request in one_of_each.values()))

    def setup_digest(self, setup: str) -> str:
        """Returns a digest of a set-up's settings, not of its name."""
        settings = self.config.setups[setup]
        return digest(settings.corpus, without_neutral(settings.model), without_neutral(settings.training))

    def fingerprints(self, figure: str) -> dict[str, str]:
        """Returns the fingerprints in the rows of a figure's runs; empty strings if its tokens are not here."""
        # Imported here because it imports numpy, which would slow the start of every job on a cluster.
        from mup_moe.data.tokens import Tokens

        cells = self.figures[figure]
        try:
            tokens = Tokens.open(self.tokens(self.corpus(cells[0]))).digest
        except UserError:
            return dict.fromkeys((cell.id for cell in cells), "")
        return {cell.id: self.request(cell).fingerprint(tokens) for cell in cells}

    # ------------------------------------------------------------ corpora

    def corpus(self, cell: Cell | str) -> str:
        """Returns the corpus that a cell is trained on. Raises UserError."""
        return self.config.setups[self.request(cell).cell.setup].corpus

    def probe_corpus(self, probe: str) -> str:
        """Returns the corpus that a probe's models are trained on."""
        return self.config.setups[self.config.probes[probe].setup].corpus

    @cached_property
    def corpora(self) -> list[str]:
        """The corpora that figures and probes use."""
        figures, probes = self.config.figures.values(), self.config.probes.values()
        setups = [*(figure.setup for figure in figures), *(probe.setup for probe in probes)]
        return list(dict.fromkeys(self.config.setups[setup].corpus for setup in setups))

    def text(self, corpus: str) -> list[Path]:
        """Returns the user's files that a corpus is made of. Raises UserError if one is missing."""
        settings = self.config.corpora[corpus]
        with _of_corpus(corpus):
            return find(settings.files) + tokenizer_paths(settings.tokenizer_files)

    def vocabulary(self, corpus: str) -> int:
        """Returns the largest vocabulary that a corpus's tokenizer can have. Raises UserError."""
        if corpus not in self._vocabularies:
            with _of_corpus(corpus):
                self._vocabularies[corpus] = vocabulary_of(self.config.corpora[corpus])
        return self._vocabularies[corpus]

    # ------------------------------------------------------------ resources of a job

    def memory_mb(self, cells: Collection[Cell | str], checkpoints: bool = True) -> int:
        """Estimates the memory of a job of these cells, in MB. checkpoints: whether the job writes any."""
        requests, execution = [self.request(cell) for cell in cells], self.config.execution
        vocabulary = self.vocabulary(self.corpus(next(iter(cells))))
        return memory_mb(requests, vocabulary, execution.device, str(execution.replicas), checkpoints)

    def probe_cells(self, probe: str) -> list[Cell]:
        """Returns the models of a probe, the largest last."""
        settings = self.config.probes[probe]
        return sorted(settings.cells(), key=attrgetter(settings.over))

    def probe_memory_mb(self, probe: str) -> int:
        """Estimates the memory of a probe, in MB; it trains its models one at a time and does not save them."""
        return self.memory_mb(self.probe_cells(probe)[-1:], checkpoints=False)

    def benchmark(self, folder: Path = Path("benchmarks")) -> Path:
        """Returns the benchmark of the training device in a folder of benchmarks, or the CPU's if there is none."""
        gpu = folder / "gpu/step.csv"
        return gpu if self.config.execution.device == "cuda" and gpu.exists() else folder / "step.csv"

    # ------------------------------------------------------------ paths

    @property
    def cells(self) -> Path:
        """The folder that has a folder for every cell."""
        return self.results / "cells"

    def tokens(self, corpus: str) -> Path:
        """Returns the folder of a tokenized corpus."""
        return self.results / "data" / corpus

    def token_files(self, corpus: str) -> list[Path]:
        """Returns the token files of a corpus."""
        return [self.tokens(corpus) / f"{split}.bin" for split in SPLITS]

    def runs(self, figure: str) -> Path:
        """Returns the path of the table of a figure's cells."""
        return self.results / figure / "runs.csv"

    def optima(self, figure: str) -> Path:
        """Returns the path of the table of a figure's optima."""
        return self.results / figure / "optima.csv"

    def sensitivities(self) -> list[Path]:
        """Returns the paths of all sensitivity tables that exist here, the recorded ones last."""
        return [
            *sorted(self.results.glob("*/sensitivity.csv")),
            *sorted(self.results.glob("recorded/*/*/sensitivity.csv")),
        ]

    def probe_values(self, probe: str) -> Path:
        """Returns the path of the table of a probe's values."""
        return self.results / probe / "values.csv"

    def slopes(self, probe: str) -> Path:
        """Returns the path of the table of a probe's slopes."""
        return self.results / f"{probe}.csv"


@contextmanager
def _of_corpus(corpus: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"config: `corpora.{corpus}`: {error}") from None


def digest(*parts: object) -> str:
    """Returns a short digest that identifies JSON values and settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=asdict).encode()).hexdigest()[:16]


def one_of(name: str, known: Collection[str], section: str) -> str:
    """Returns the name if a section of the config lists it; otherwise raises UserError that suggests similar names."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
        raise UserError(f"`{section}` has no {name!r}: {hint}")
    return name
