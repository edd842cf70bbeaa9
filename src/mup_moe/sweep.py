"""A sweep as its config and its folder of results have it: cells, jobs, requests, tokens, memory, and every path.

Shared by the workflow and the commands. Needs no torch, pandas or numpy, so that a Snakefile starts fast.
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
    """All that a config says of cells and files.

    results: the folder that a run writes. layers: what the config was laid together from, for people. Cells are
    named by their ids.
    """

    def __init__(self, config: Config, results: Path = Path("results"), layers: str = "given by hand") -> None:
        self.config, self.results, self.layers = config, results, layers
        self._requests: dict[Cell | str, TrainingRequest] = {}
        self._vocabularies: dict[str, int] = {}

    # ------------------------------------------------------------ cells

    @cached_property
    def figures(self) -> dict[str, list[Cell]]:
        """The cells of every figure, in the order of the config."""
        return {name: figure.cells() for name, figure in self.config.figures.items()}

    @cached_property
    def jobs(self) -> dict[str, list[Cell]]:
        """The cells of every job, by its name; without `lockstep` a cell is a job for itself."""
        return self.jobs_of(self.figures)

    def jobs_of(self, figures: dict[str, list[Cell]]) -> dict[str, list[Cell]]:
        """The jobs of a sweep that has these figures alone."""
        execution = self.config.execution
        return jobs(figures, execution.lockstep, execution.cells_per_job)

    @cached_property
    def job_of(self) -> dict[Cell, str]:
        """The job that trains a cell of a figure."""
        return {cell: job for job, cells in self.jobs.items() for cell in cells}

    @property
    def parametrizations(self) -> dict[str, Parametrization]:
        """The rows of the table, as the config lists them."""
        return self.config.rows

    def rules(self, name: str) -> Parametrization:
        """A row of the table, or one that is made of two (`parametrization.control`). Raises KeyError."""
        found = self.parametrizations.get(name) or control(self.parametrizations, name)
        if found is None:
            raise KeyError(name)
        return found

    def chosen(self, names: Sequence[str] | None) -> dict[str, list[Cell]]:
        """The cells of figures and of compositions' figures, in their order; None: of all. Raises UserError."""
        if names is None:
            return self.figures
        parts = self.config.parts
        known = [*self.config.figures, *parts]
        named = (parts.get(one_of(name, known, "figures"), (name,)) for name in names)
        return {figure: self.figures[figure] for figure in chain.from_iterable(named)}

    def request(self, cell: Cell | str) -> TrainingRequest:
        """What a cell is trained by, in a figure or not, as long as the config can build it. Raises UserError."""
        if cell in self._requests:
            return self._requests[cell]
        try:
            found = Cell.parse(cell) if isinstance(cell, str) else cell
            setup = self.config.setups[found.setup]
            architecture = self.config.architecture(found)
            setup.model.check(found, architecture)
            rules = self.rules(found.parametrization)
        except KeyError as error:
            raise UserError(f"cell {cell}: config.yaml lists no {error}") from None
        except ValueError as error:
            raise UserError(f"cell {cell}: {error}") from None
        self._requests[cell] = TrainingRequest(found, setup.model, setup.training, rules, architecture)
        return self._requests[cell]

    def settings_digest(self, cells: Iterable[Cell | str]) -> str:
        """Of what cells are trained with, apart from what their names say: an edit of it trains them again."""
        # They are those of a set-up, an architecture and a row: thousands of cells have a few.
        one_of_each = {(of.cell.setup, of.architecture, of.cell.parametrization): of for of in map(self.request, cells)}
        return digest(*sorted(request.to_json(cell=False) for request in one_of_each.values()))

    def setup_digest(self, setup: str) -> str:
        """Of all that a set-up says, whatever it is called."""
        told = self.config.setups[setup]
        return digest(told.corpus, without_neutral(told.model), without_neutral(told.training))

    def fingerprints(self, figure: str) -> dict[str, str]:
        """What the rows of a figure's runs have as fingerprints; empty where its tokens are not here."""
        # Here, as it takes numpy along, which no start needs: every job on a cluster is one.
        from mup_moe.data.tokens import Tokens

        cells = self.figures[figure]
        try:
            tokens = Tokens.open(self.tokens(self.corpus(cells[0]))).digest
        except UserError:
            return dict.fromkeys((cell.id for cell in cells), "")
        return {cell.id: self.request(cell).fingerprint(tokens) for cell in cells}

    # ------------------------------------------------------------ corpora

    def corpus(self, cell: Cell | str) -> str:
        """The corpus that a cell is trained on. Raises UserError."""
        return self.config.setups[self.request(cell).cell.setup].corpus

    def probe_corpus(self, probe: str) -> str:
        """The corpus whose tokens a probe's models see."""
        return self.config.setups[self.config.probes[probe].setup].corpus

    @cached_property
    def corpora(self) -> list[str]:
        """The corpora that figures and probes use."""
        figures, probes = self.config.figures.values(), self.config.probes.values()
        setups = [*(figure.setup for figure in figures), *(probe.setup for probe in probes)]
        return list(dict.fromkeys(self.config.setups[setup].corpus for setup in setups))

    def text(self, corpus: str) -> list[Path]:
        """The files of one's own that a corpus is made of. Raises UserError where one is not there."""
        settings = self.config.corpora[corpus]
        with _of_corpus(corpus):
            return find(settings.files) + tokenizer_paths(settings.tokenizer_files)

    def vocabulary(self, corpus: str) -> int:
        """How many tokens the models of a corpus know, at most. Raises UserError."""
        if corpus not in self._vocabularies:
            with _of_corpus(corpus):
                self._vocabularies[corpus] = vocabulary_of(self.config.corpora[corpus])
        return self._vocabularies[corpus]

    # ------------------------------------------------------------ what a job takes

    def memory_mb(self, cells: Collection[Cell | str], checkpoints: bool = True) -> int:
        """About how much memory a job of these cells takes, in MB, with the checkpoints that it writes or without."""
        requests, execution = [self.request(cell) for cell in cells], self.config.execution
        vocabulary = self.vocabulary(self.corpus(next(iter(cells))))
        return memory_mb(requests, vocabulary, execution.device, str(execution.replicas), checkpoints)

    def probe_cells(self, probe: str) -> list[Cell]:
        """The models of a probe, the largest last."""
        settings = self.config.probes[probe]
        return sorted(settings.cells(), key=attrgetter(settings.over))

    def probe_memory_mb(self, probe: str) -> int:
        """About how much memory a probe takes, in MB: its models are trained one at a time, and not saved."""
        return self.memory_mb(self.probe_cells(probe)[-1:], checkpoints=False)

    def benchmark(self, folder: Path = Path("benchmarks")) -> Path:
        """The speed of the device that will train, once it is measured, in a folder of benchmarks."""
        gpu = folder / "gpu/step.csv"
        return gpu if self.config.execution.device == "cuda" and gpu.exists() else folder / "step.csv"

    # ------------------------------------------------------------ paths

    @property
    def cells(self) -> Path:
        """Has a folder for every cell."""
        return self.results / "cells"

    def tokens(self, corpus: str) -> Path:
        """The folder of a tokenized corpus."""
        return self.results / "data" / corpus

    def token_files(self, corpus: str) -> list[Path]:
        """The tokens themselves."""
        return [self.tokens(corpus) / f"{split}.bin" for split in SPLITS]

    def runs(self, figure: str) -> Path:
        """The table of a figure's cells."""
        return self.results / figure / "runs.csv"

    def optima(self, figure: str) -> Path:
        """The table of a figure's optima."""
        return self.results / figure / "optima.csv"

    def sensitivities(self) -> list[Path]:
        """The tables of what set-ups see that are here, the recorded ones last."""
        return [
            *sorted(self.results.glob("*/sensitivity.csv")),
            *sorted(self.results.glob("recorded/*/*/sensitivity.csv")),
        ]

    def probe_values(self, probe: str) -> Path:
        """The table of what a probe measured."""
        return self.results / probe / "values.csv"

    def slopes(self, probe: str) -> Path:
        """The table of a probe's slopes."""
        return self.results / f"{probe}.csv"


@contextmanager
def _of_corpus(corpus: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"config.yaml: `corpora.{corpus}`: {error}") from None


def digest(*parts: object) -> str:
    """Tells values apart that JSON can hold, and settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=asdict).encode()).hexdigest()[:16]


def one_of(name: str, known: Collection[str], section: str) -> str:
    """The name, which a section of the config has to list. Raises UserError that says which names are near."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
        raise UserError(f"`{section}` has no {name!r}: {hint}")
    return name
