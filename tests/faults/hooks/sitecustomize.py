"""Injects a fault into a process: Python imports this module at startup, since this folder is first on PYTHONPATH.

The fault is read from FAULT (JSON). does: the name of a signal or of a function of this module. at: "step" (before a
training step), "file" (before an operation on a file under `folder`) or "never". The fault strikes at the `number`-th
of these, after a delay of `after` seconds, and only in the first process that gets there, which leaves the file
`once`. set: attributes of modules to replace, by their full names.
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

FAULT = json.loads(os.environ.get("FAULT", "{}"))
OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}


def hang(_stack):
    """Lets the process sleep forever; waits of its other threads last a millisecond."""
    wait = threading.Event.wait
    threading.Event.wait = lambda event, seconds=None: wait(event, seconds and 0.001)
    time.sleep(10**6)


def later(clock):
    """Returns a clock that is a day ahead of another."""
    return lambda: clock() + 86_400


def suspend(_stack):
    """Stops the process until SIGCONT; it then continues a day later by its clocks."""
    os.kill(os.getpid(), signal.SIGSTOP)
    for name in ("time", "monotonic", "perf_counter"):
        setattr(time, name, later(getattr(time, name)))
    # A thread that checks a clock every second notices the jump before the next step.
    time.sleep(3)


def lose_gpu(_stack):
    """Raises the error that torch raises when the GPU has disappeared."""
    import torch

    raise torch.AcceleratorError("CUDA error: unspecified launch failure\nSearch for `cudaErrorLaunchFailure'")


def fill_gpu(stack):
    """Raises torch's out-of-memory error for every stack of more than two cells, not just once."""
    import torch

    Path(FAULT["once"]).unlink()
    if len(stack._seed_of_R) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def fill_memory(_stack):
    """Limits the process to the memory that it has now, plus `leave` bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + FAULT["leave"]
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def forbid_writing(_stack):
    """Makes the folders of the cells read-only."""
    for path in Path(FAULT["folder"]).iterdir():
        path.chmod(0o555)


def turn_back_clock(_stack):
    """Turns the clock back by a day."""
    Path(os.environ["FAKETIME_TIMESTAMP_FILE"]).write_text("-1d")


def strike(stack=None):
    """Strikes, unless the fault has struck before."""
    try:
        os.close(os.open(FAULT["once"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    number = getattr(signal, FAULT["does"], None)
    if number is None:
        globals()[FAULT["does"]](stack)
    elif FAULT["after"]:
        timer = threading.Timer(FAULT["after"], os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()
    else:
        os.kill(os.getpid(), number)


def before_steps(module):
    """Counts the steps of this process, and strikes before the right one."""
    advance, count = module.Stack.advance, itertools.count(1)

    def counted(stack):
        if next(count) >= FAULT["number"]:
            strike(stack)
        advance(stack)

    module.Stack.advance = counted


def before_operations():
    """Counts the operations of this process on files of the folder, and strikes before the right one."""
    count = itertools.count(1)

    def counted(event, arguments):
        if event not in OPERATIONS or not isinstance(arguments[0], str | os.PathLike):
            return
        if (
            Path(arguments[0]).resolve().is_relative_to(Path(FAULT["folder"]).resolve())
            and next(count) == FAULT["number"]
        ):
            strike()

    sys.addaudithook(counted)


class Changes(importlib.machinery.PathFinder):
    """Finds modules as usual, and changes those named in `set` when they are imported."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        changes = {
            key.rpartition(".")[2]: value for key, value in FAULT["set"].items() if key.rpartition(".")[0] == name
        }
        counts_steps = name == "mup_moe.training.stack" and FAULT["at"] == "step"
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


if FAULT:
    sys.meta_path.insert(0, Changes)
    if FAULT["at"] == "file":
        before_operations()
