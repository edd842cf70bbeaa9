"""What was tried and what became of it, and the report on it."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from mup_moe.data.tokenize import WORK
from mup_moe.provenance import machine, versions

# What a command has finished once it is there; all else is work in progress.
FINISHED = {"history.csv", "summary.json", "manifest.json", "tokenizer.json", "train.bin", "valid.bin"}
FINISHED |= {"runs.csv", "optima.csv"}

# What is expected of the project.
GOES_ON = "goes on from its checkpoint, to the same bytes"
SAME_BYTES = "run again, ends with the same bytes"
ONE_SENTENCE = "one sentence; run again without the fault, ends with the same bytes"


def finished_files(folder: Path) -> dict[Path, bytes]:
    """The finished files under a folder, with what they hold."""
    found = {}
    for path in folder.rglob("*"):
        if path.name in FINISHED and not {WORK, ".snakemake"} & set(path.parts):
            # What a kill has left alive may be at work there.
            with suppress(FileNotFoundError):
                found[path] = path.read_bytes()
    return found


@dataclass
class Trial:
    """One test's faults. `lost`: bytes of what was finished when a fault struck, and is not there any more."""

    strikes: int = 0
    _finished: dict[Path, bytes] = field(default_factory=dict)

    def keeps(self, folder: Path) -> None:
        """What is finished under the folder now is to be there in the end, byte for byte."""
        self._finished = finished_files(folder) | self._finished

    def struck(self, folder: Path) -> None:
        """Counts a fault, which left the folder as it is now."""
        self.strikes += 1
        self.keeps(folder)

    @property
    def lost(self) -> int:
        return sum(
            len(content)
            for path, content in self._finished.items()
            if not path.exists() or path.read_bytes() != content
        )


@dataclass
class Row:
    """A line of the report."""

    expected: str
    tried: int = 0
    survived: int = 0
    lost: int = 0


class Ledger:
    """The trials of a session."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._rows: dict[tuple[str, str], Row] = {}

    @contextmanager
    def trial(self, fault: str, where: str, expected: str) -> Iterator[Trial]:
        """Faults of one kind at one place: they are survived if the block ends well and nothing was lost."""
        row = self._rows.setdefault((fault, where), Row(expected))
        trial, survived = Trial(), False
        try:
            yield trial
            assert trial.strikes, "no fault struck"
            assert trial.lost == 0, f"{trial.lost} bytes of finished work were lost"
            survived = True
        finally:
            row.tried += max(trial.strikes, 1)
            row.survived += trial.strikes if survived else 0
            row.lost += trial.lost

    def report(self, rounds: int, skipped: Iterable[str]) -> str:
        """All of it as Markdown. skipped: why tests were."""
        made_by = versions("torch", "numpy", "safetensors", "tokenizers", "snakemake")
        on = machine()
        lines = [
            "# Faults, injected",
            "",
            f"Made by `pytest tests/faults --fault-rounds {rounds} --fault-report docs/faults.md`: real processes and",
            "real files, struck at random moments. Finished work is every result, token file and table that was whole",
            "when a fault struck: its bytes are lost if they are not there, as they were, in the end. The same bytes",
            "are those of a run that nothing disturbed, seconds of training apart.",
            "",
            "| fault | where it strikes | tried | survived | bytes lost | expected |",
            "|---|---|---:|---:|---:|---|",
        ]
        told = ""
        faults = [fault for fault, _ in self._rows]
        # Those of one fault together, in the order of their trials.
        for (fault, where), row in sorted(self._rows.items(), key=lambda item: faults.index(item[0][0])):
            name, told = (fault, fault) if fault != told else ("", told)
            lines.append(f"| {name} | {where} | {row.tried} | {row.survived} | {row.lost} | {row.expected} |")
        tried, survived, lost = (
            sum(getattr(row, key) for row in self._rows.values()) for key in ("tried", "survived", "lost")
        )
        lines += [f"| **all** | | **{tried}** | **{survived}** | **{lost}** | |", ""]
        lines += [f"Not tried here: {reason}.  " for reason in sorted(skipped)]
        lines += [
            f"On {time.strftime('%Y-%m-%d')}, {rounds} rounds of the suite in a row, seed {self.seed}"
            f" (`--fault-seed`), on {on['cores']} cores of {on['cpu']} ({on['system']} {on['architecture']}), with"
            f" {', '.join(f'{name} {version}' for name, version in made_by.items())}.",
            "",
        ]
        return "\n".join(lines)
