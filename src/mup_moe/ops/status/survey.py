"""Where each cell of a sweep stands, by the files in its folder. Needs no torch."""

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

# How a command begins the sentence by which it ends.
_SPEAKER = "mup-moe: "


class State(StrEnum):
    """Where a cell stands.

    DONE, DIVERGED: it has a result. RUNNING: its process gives signs of life. SILENT: its process was
    killed, or hangs. FAILED: its last try ended without a result, for a reason that is known.
    INTERRUPTED: it has a checkpoint and no process. OUTDATED: its result is of another config, version or
    corpus, or damaged, and it will be trained again. WAITING: none of these.
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

    job: of the workflow, which names its log. step: done of `steps`, or that from which the cell goes on. result: the
    summary of a cell that has one. heartbeat: of one that runs or has fallen silent; age: of that, in seconds by our
    clock. reason: of one that failed, in a sentence.
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
    """Where cells stand, each once, shown by a figure or not. now: seconds since the epoch."""
    digests = {corpus: _tokens_digest(sweep.tokens(corpus)) for corpus in sweep.config.corpora}
    for cell in dict.fromkeys(cells):
        # Of all figures, as the workflow has them: which cells share a job depends on which figures show them.
        job, tokens = sweep.job_of.get(cell, cell.id), digests[sweep.corpus(cell)]
        yield _cell_status(sweep.request(cell), job, tokens, sweep.cells / cell.id, now)


def _cell_status(request: TrainingRequest, job: str, tokens: str | None, folder: Path, now: float) -> CellStatus:
    steps = request.training.steps
    if folder.exists() and not os.access(folder, os.R_OK | os.X_OK):
        reason = f"{folder} cannot be read: ask its owner to permit it"
        return CellStatus(request.cell, job, State.FAILED, 0, steps, reason=reason)
    # First: who is done shows a result before the heartbeat goes.
    beat = Heartbeat.read(folder)
    kept = Result(folder).kept_files[1]
    summary = _summary(kept.parent)
    # Tokens that are not there yet will be made as they were: a result is taken to be of them.
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
    """What a kept result says, whosever it is; nothing where there is none that is whole and can be read."""
    try:
        return read_result(kept)
    except UserError:
        return {}


def _saved_step(folder: Path, fingerprint: str) -> int:
    """The step of the latest checkpoint of this run, on whatever device, by what its header says; or 0."""
    steps = [0]
    for name in (CHECKPOINT, PREVIOUS):
        # One that is absent or damaged, training leaves aside.
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
    """Where a corpus stands, in words: what was left out of it, or, if nobody works on it, why its last try failed."""
    folder = results / "data" / corpus
    held = is_held(folder)
    if (folder / WORK).exists():
        state = "being tokenized" if held else "half tokenized, by nobody now"
    elif _tokens_digest(folder) is not None:
        said = remark_of(folder)
        state = f"tokenized: {said}" if said else "tokenized"
    else:
        state = "damaged" if (folder / MANIFEST).exists() else "not tokenized yet"
    log = results / "logs" / "tokenize" / f"{corpus}.log"
    reason = None if held or (folder / MANIFEST).exists() else _last_words(log)
    return state if reason is None else f"{state}; its last try failed: {cut(reason)} ({log})"


def _last_words(log: Path) -> str | None:
    """The sentence by which a command ended, if its log ends with one."""
    with suppress(OSError):
        *_, last = log.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        return last.removeprefix(_SPEAKER) if last.startswith(_SPEAKER) else None
    return None
