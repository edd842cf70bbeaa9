"""A fault inside of a process: read from FAULT (JSON) as Python starts, for this folder is first on PYTHONPATH.

does: a signal's name, or a function of this module. at: "step" (before one is taken), "file" (before an operation
on a file under `folder`) or "never". It strikes at the `number`-th of them, `after` so many seconds, and in the first
process alone that gets there, which leaves the file `once`. set: attributes of modules, by name.
"""

import importlib.machinery
import itertools
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

TOLD = json.loads(os.environ.get("FAULT", "{}"))
OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}


def hang(_stack):
    """The process sleeps on, and hears of nothing; its threads take a millisecond for whatever they wait for."""
    wait = threading.Event.wait
    threading.Event.wait = lambda event, seconds=None: wait(event, seconds and 0.001)
    time.sleep(10**6)


def later(clock):
    """A clock that is a day ahead of another."""
    return lambda: clock() + 86_400


def suspend(_stack):
    """The process is stopped until it is told to continue, a day later by its clocks."""
    os.kill(os.getpid(), signal.SIGSTOP)
    for name in ("time", "monotonic", "perf_counter"):
        setattr(time, name, later(getattr(time, name)))
    # Whoever looks at a clock every second sees it before the next step.
    time.sleep(3)


def lose_gpu(_stack):
    """What torch raises when the GPU is no longer there."""
    import torch

    raise torch.AcceleratorError("CUDA error: unspecified launch failure\nSearch for `cudaErrorLaunchFailure'")


def fill_gpu(stack):
    """What torch raises when a stack of more than two is too large; of itself, this does not pass."""
    import torch

    Path(TOLD["once"]).unlink()
    if len(stack._seed_of_R) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def fill_memory(_stack):
    """From here on the machine gives the process no more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + TOLD["leave"]
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def forbid_writing(_stack):
    """The folders of the cells take no more files."""
    for path in Path(TOLD["folder"]).iterdir():
        path.chmod(0o555)


def turn_back_clock(_stack):
    """It is yesterday."""
    Path(os.environ["FAKETIME_TIMESTAMP_FILE"]).write_text("-1d")


def strike(stack=None):
    """Does it, unless it was done before."""
    try:
        os.close(os.open(TOLD["once"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    number = getattr(signal, TOLD["does"], None)
    if number is None:
        globals()[TOLD["does"]](stack)
    elif TOLD["after"]:
        timer = threading.Timer(TOLD["after"], os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()
    else:
        os.kill(os.getpid(), number)


def before_steps(module):
    """Counts the steps of this process."""
    advance, count = module.Stack.advance, itertools.count(1)

    def counted(stack):
        if next(count) >= TOLD["number"]:
            strike(stack)
        advance(stack)

    module.Stack.advance = counted


def before_operations():
    """Counts what this process does with files of the folder."""
    count = itertools.count(1)

    def counted(event, arguments):
        if event not in OPERATIONS or not isinstance(arguments[0], str | os.PathLike):
            return
        if (
            Path(arguments[0]).resolve().is_relative_to(Path(TOLD["folder"]).resolve())
            and next(count) == TOLD["number"]
        ):
            strike()

    sys.addaudithook(counted)


class Changes(importlib.machinery.PathFinder):
    """Finds modules as ever, and changes those that are told as they come."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        changes = {
            key.rpartition(".")[2]: value for key, value in TOLD["set"].items() if key.rpartition(".")[0] == name
        }
        counts_steps = name == "mup_moe.training.stack" and TOLD["at"] == "step"
        if spec is None or not (changes or counts_steps):
            return spec
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            vars(module).update(changes)
            if counts_steps:
                before_steps(module)

        spec.loader.exec_module = exec_module
        return spec


if TOLD:
    sys.meta_path.insert(0, Changes)
    if TOLD["at"] == "file":
        before_operations()
