"""When jobs will be done, and how people say it."""

import heapq
from collections.abc import Iterable, Sequence


def makespan(running: Sequence[float], waiting: Iterable[float], processes: int) -> float:
    """Seconds until all jobs are done. running, waiting: the seconds that each still takes.

    Whenever a process is free, the longest job that waits begins, as the widest does under Snakemake. At
    least as many processes run as there are running jobs.
    """
    ends = [*running, *[0.0] * (processes - len(running))]
    heapq.heapify(ends)
    for seconds in sorted(waiting, reverse=True):
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends, default=0.0)


def duration(seconds: float) -> str:
    """Seconds as people say them: about."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
