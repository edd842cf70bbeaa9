"""How much of a sweep is done and how long the rest will take, told while it runs."""

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm


def line(done: int, total: int, elapsed: float) -> str:
    """One line of progress: a bar, cells done, time spent and left."""
    text: str = tqdm.format_meter(done, total, elapsed, prefix="cells", unit="cell", ncols=78, ascii=True)
    return text


def report_progress(outputs: Sequence[Path], every_seconds: float = 15.0) -> None:
    """Prints a line to stderr whenever more of `outputs` are made, at most every so often.

    Runs beside the caller, in a thread that dies with it. Outputs that exist already are to be made
    again, and count once they are new.
    """
    before = [_stamp(path) for path in outputs]

    def watch() -> None:
        start, told = time.monotonic(), 0
        while told < len(outputs):
            time.sleep(every_seconds)
            now = [_stamp(path) for path in outputs]
            done = sum(new is not None and new != old for old, new in zip(before, now, strict=True))
            if done > told:
                print(line(done, len(outputs), time.monotonic() - start), file=sys.stderr, flush=True)
                told = done

    if outputs:
        threading.Thread(target=watch, name="progress", daemon=True).start()


def _stamp(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
