"""A list of jobs as a file: everything that another machine needs besides the tokens."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mup_moe.files import UserError, atomic_write
from mup_moe.ops.cell_folder import Result
from mup_moe.training.request import TrainingRequest


@dataclass(frozen=True)
class ListedJob:
    """Cells that share a process.

    figure: the first figure that shows them. corpus: the name of the folder of their tokens. tokens: the digest of
    these tokens.
    """

    name: str
    figure: str
    corpus: str
    tokens: str
    requests: tuple[TrainingRequest, ...]

    def left(self, results: Path) -> "ListedJob":
        """Returns the job without the cells that already have a result of this version and these tokens."""

        def is_done(request: TrainingRequest) -> bool:
            return Result(results / "cells" / request.cell.id).is_of(request.fingerprint(self.tokens))

        return replace(self, requests=tuple(request for request in self.requests if not is_done(request)))


def write_jobs(path: Path, jobs: Iterable[ListedJob]) -> None:
    """Writes one line of JSON per job, atomically."""
    with atomic_write(path, "w") as file:
        for job in jobs:
            fields = {"job": job.name, "figure": job.figure, "corpus": job.corpus, "tokens": job.tokens}
            file.write(json.dumps(fields | {"requests": [request.to_json() for request in job.requests]}) + "\n")


def read_jobs(path: Path) -> list[ListedJob]:
    """Reads a list that `write_jobs` wrote. Raises UserError for any other file."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [
            ListedJob(
                name=str(line["job"]),
                figure=str(line["figure"]),
                corpus=str(line["corpus"]),
                tokens=str(line["tokens"]),
                requests=tuple(map(TrainingRequest.from_json, line["requests"])),
            )
            for line in lines
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a list of jobs ({error}): export it again with `mup_moe export-jobs`") from None


def chosen_jobs(jobs: Sequence[ListedJob], names: Sequence[str]) -> list[ListedJob]:
    """Returns the jobs with these names, or all jobs if no names are given. Raises UserError for an unknown name."""
    unknown = set(names) - {job.name for job in jobs}
    if unknown:
        raise UserError(f"the list has no job {min(unknown)!r}: choose from {', '.join(job.name for job in jobs)}")
    return [job for job in jobs if not names or job.name in names]
