"""Determines the state of each cell of a sweep from the files in its folder. Needs no torch."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from mup_moe.config.cell import Cell
from mup_moe.config.document import cut
from mup_moe.data.corpus import remark_of
from mup_moe.data.tokenize import WORK
from mup_moe.data.tokens import MANIFEST, Tokens
from mup_moe.files import UserError, is_held
from mup_moe.ops.cell_folder import Result, read_result
from mup_moe.ops.checkpoint import CHECKPOINT, PREVIOUS, DamagedCheckpointError, read_header
from mup_moe.ops.heartbeat import Failure, Heartbeat
from mup_moe.sweep import Sweep
from mup_moe.training.request import TrainingRequest

# The prefix of the error message with which a command ends.
_PREFIX = "mup-moe: "


class State(StrEnum):
    """The state of a cell.

    DONE, DIVERGED: it has a result. RUNNING: its process sends heartbeats. SILENT: its process was
    killed or hangs. FAILED: its last attempt ended without a result, for a known reason.
    INTERRUPTED: it has a checkpoint but no process. OUTDATED: its result is damaged or from another config,
    version or corpus, and it will be retrained. WAITING: none of these.
    """

    DONE = "done"
    DIVERGED = "diverged"
    RUNNING = "running"
    SILENT = "silent"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    OUTDATED = "outdated"
    WAITING = "waiting"


@dataclass(frozen=True)
class CellStatus:
    """A cell of the sweep.

    job: the workflow's job, which names the log. step: steps done, of `steps`, or the step from which the cell
    resumes. result: the summary of a cell that has a result. heartbeat: of a running or silent cell; age: of the
    heartbeat, in seconds by this host's clock. reason: why a failed cell failed, as a sentence.
    """

    cell: Cell
    job: str
    state: State
    step: int
    steps: int
    result: Mapping[str, Any] | None = None
    heartbeat: Heartbeat | None = None
    age: float | None = None
    reason: str | None = None


def survey(sweep: Sweep, cells: Collection[Cell], now: float) -> Iterator[CellStatus]:
    """Yields the status of each cell once, whether a figure shows it or not. now: seconds since the epoch."""
    digests = {corpus: _tokens_digest(sweep.tokens(corpus)) for corpus in sweep.config.corpora}
    for cell in dict.fromkeys(cells):
        # Use the jobs of all figures, as the workflow does: which cells share a job depends on the figures.
        job, tokens = sweep.job_of.get(cell, cell.id), digests[sweep.corpus(cell)]
        yield _cell_status(sweep.request(cell), job, tokens, sweep.cells / cell.id, now)


def _cell_status(request: TrainingRequest, job: str, tokens: str | None, folder: Path, now: float) -> CellStatus:
    steps = request.training.steps
    if folder.exists() and not os.access(folder, os.R_OK | os.X_OK):
        reason = f"{folder} cannot be read: ask its owner for read permission"
        return CellStatus(request.cell, job, State.FAILED, 0, steps, reason=reason)
    # Read the heartbeat first: a cell publishes its result before it deletes its heartbeat.
    beat = Heartbeat.read(folder)
    kept = Result(folder).kept_files[1]
    summary = _summary(kept.parent)
    # If the tokens do not exist yet, assume that they will be the same as those of the result.
    fingerprint = request.fingerprint(tokens or str(summary.get("tokens_digest")))
    if summary.get("fingerprint") == fingerprint:
        state = State.DIVERGED if summary.get("status") == "diverged" else State.DONE
        return CellStatus(request.cell, job, state, steps, steps, result=summary)
    saved = min(_saved_step(folder, fingerprint), steps)
    if beat is not None:
        age = now - beat.time
        if beat.is_alive(age):
            step = min(beat.step, steps)
            return CellStatus(request.cell, job, State.RUNNING, step, steps, heartbeat=beat, age=age)
        return CellStatus(request.cell, job, State.SILENT, saved, steps, heartbeat=beat, age=max(age, 0.0))
    failure = Failure.read(folder)
    if failure is not None:
        reason = " ".join(str(failure.reason).split())
        return CellStatus(request.cell, job, State.FAILED, saved, steps, reason=reason)
    state = State.INTERRUPTED if saved else State.OUTDATED if kept.exists() else State.WAITING
    return CellStatus(request.cell, job, state, saved, steps)


def _summary(kept: Path) -> dict[str, Any]:
    """Returns the summary of a kept result of any run; empty if there is none that is complete and readable."""
    try:
        return read_result(kept)
    except UserError:
        return {}


def _saved_step(folder: Path, fingerprint: str) -> int:
    """Returns the step in the header of this run's latest checkpoint, from any device; 0 if there is none."""
    steps = [0]
    for name in (CHECKPOINT, PREVIOUS):
        # Training ignores absent or damaged checkpoints.
        with suppress(DamagedCheckpointError):
            header = read_header(folder / name)
            if header.fingerprint.startswith(f"{fingerprint}/"):
                steps.append(header.step)
    return max(steps)


def _tokens_digest(folder: Path) -> str | None:
    try:
        return Tokens.open(folder).digest
    except (UserError, OSError):
        return None


def corpus_state(corpus: str, results: Path) -> str:
    """Describes the state of a corpus: what was left out, or why the last attempt failed if no process holds it."""
    folder = results / "data" / corpus
    held = is_held(folder)
    if (folder / WORK).exists():
        state = "being tokenized" if held else "partly tokenized, by no running process"
    elif _tokens_digest(folder) is not None:
        remark = remark_of(folder)
        state = f"tokenized: {remark}" if remark else "tokenized"
    else:
        state = "damaged" if (folder / MANIFEST).exists() else "not tokenized yet"
    log = results / "logs" / "tokenize" / f"{corpus}.log"
    reason = None if held or (folder / MANIFEST).exists() else _final_error(log)
    return state if reason is None else f"{state}; the last attempt failed: {cut(reason)} ({log})"


def _final_error(log: Path) -> str | None:
    """Returns the error message with which a command ended, if its log ends with one."""
    with suppress(OSError):
        *_, last = log.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        return last.removeprefix(_PREFIX) if last.startswith(_PREFIX) else None
    return None
