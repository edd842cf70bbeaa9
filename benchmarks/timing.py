"""Times variants of a training step, each in its own process, in turns."""

import functools
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from common import seconds_of
from variants import OURS, PEER, VOCABULARY, Model, Variant, build_ours, token_stream

from mup_moe.files import UserError
from mup_moe.model.products import multiply
from mup_moe.ops.device import keep_freed_pages
from mup_moe.training.request import TrainingRequest
from mup_moe.training.trainer import BLOCK_STEPS

WARM_UP_STEPS = 3
TURN_SECONDS, _LEAST_TURNS = 0.3, 3
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True, kw_only=True)
class _Started:
    """What a worker reports about its model after its first steps."""

    tokens_per_step: int
    parameters: int
    active_parameters: int
    flops_per_token: int
    step_seconds: float
    compile_seconds: float


def _serve(connection: Connection, variant: Variant, request: str, threads: int, cache: str) -> None:
    """Runs a worker: builds the model, then takes as many steps as requested and answers with the seconds."""
    # A failure is sent to the parent as a reason, instead of being printed among the results.
    try:
        _prepare(variant, threads, cache)
        model = _build(variant, TrainingRequest.from_json(request))
        seconds = [seconds_of(functools.partial(model.run, 1), variant.device) for _ in range(WARM_UP_STEPS + 4)]
        step_seconds = statistics.median(seconds[-WARM_UP_STEPS:])
        # The graph is captured in the fourth step; any extra time of the first steps is preparation.
        compile_seconds = 0.0 if variant.step == "eager" else sum(seconds) - len(seconds) * step_seconds
        sizes = {name: getattr(model, name) for name in _SIZES}
        connection.send(_Started(**sizes, step_seconds=step_seconds, compile_seconds=compile_seconds))
        while steps := connection.recv():
            connection.send(seconds_of(functools.partial(model.run, steps), variant.device))
        connection.send(_peak_bytes(variant.device))
    except (EOFError, KeyboardInterrupt):
        pass  # the parent is gone
    except Exception as error:
        connection.send(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


_SIZES = ("tokens_per_step", "parameters", "active_parameters", "flops_per_token")


def _prepare(variant: Variant, threads: int, cache: str) -> None:
    torch.set_num_threads(threads)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    # Discard what compilers print.
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    if variant.allocator == "kept":
        keep_freed_pages()
    if variant.device == "cuda":
        torch.cuda.init()


def _build(variant: Variant, base: TrainingRequest) -> Model:
    if variant.system == OURS:
        return build_ours(variant, base)
    from peers import build_peer  # not every benchmark needs transformers

    return build_peer(variant, variant.request(base), token_stream(), VOCABULARY)


def _peak_bytes(device: str) -> int:
    """Returns the peak memory of a worker: of its tensors on a GPU, of the process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(eq=False)
class Measured:
    """A variant's sizes and speed.

    compile_seconds: the extra time of the first steps, with nothing cached.
    cached_compile_seconds: the same with a filled compiler cache on disk (0 if not compiled).
    rates: tokens/s over all replicas, one per turn. matmul_rates: the machine's matmul rate in the variant's precision
    right after each turn, GFLOP/s. memory_bytes: peak memory.
    """

    variant: Variant
    sizes: _Started
    compile_seconds: float
    cached_compile_seconds: float
    rates: list[float] = field(default_factory=list)
    matmul_rates: list[float] = field(default_factory=list)
    memory_bytes: int = 0

    @property
    def rate(self) -> float:
        """Tokens/s, as the median over the turns."""
        return statistics.median(self.rates)

    @property
    def gflops(self) -> float:
        """Training FLOPs per second, GFLOP/s."""
        return self.rate * self.sizes.flops_per_token / 1e9

    @property
    def matmul_gflops(self) -> float:
        """The machine's matmul rate, GFLOP/s, as the median over the turns."""
        return statistics.median(self.matmul_rates)

    @property
    def fraction_of_matmul(self) -> float:
        """The share of the matmul rate that training reaches, as the median over the turns."""
        flops = self.sizes.flops_per_token / 1e9
        return statistics.median(rate * flops / peak for rate, peak in zip(self.rates, self.matmul_rates, strict=True))

    def rate_over(self, steps: int) -> float:
        """Returns the tokens/s of a run of this many steps, including compilation with nothing cached."""
        return statistics.median(self._rates_over(steps))

    def ratio(self, other: "Measured", steps: int | None = None) -> float:
        """Returns how many times as fast as `other` this variant is, as the median over the turns.

        steps: of a run that includes compilation; None compares without compilation.
        """
        mine, theirs = (r.rates if steps is None else r._rates_over(steps) for r in (self, other))
        return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))

    def _rates_over(self, steps: int) -> list[float]:
        tokens = steps * self.sizes.tokens_per_step
        return [tokens / (self.compile_seconds + tokens / rate) for rate in self.rates]


def matmul_gflops(device: str, precision: str) -> float:
    """Returns the rate (GFLOP/s) of one product of square matrices with the faster library."""
    size = MATMUL_SIZE[device]
    a = torch.ones(size, size, dtype=getattr(torch, precision), device=device)
    multiply(a[:64], a)  # warm-up
    return 2 * size**3 / seconds_of(lambda: multiply(a, a), device) / 1e9


# Workers are forked from a process that has only done imports.
_CONTEXT = multiprocessing.get_context("forkserver")


class _Worker:
    """A process that holds one variant."""

    def __init__(self, variant: Variant, request: str, threads: int, cache: str, turn_seconds: float) -> None:
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, variant, request, threads, cache), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.started: _Started = self._answer()
        except UserError:
            self._process.join()
            raise
        self.turn_steps = min(BLOCK_STEPS, max(1, round(turn_seconds / self.started.step_seconds)))

    def turn(self) -> float:
        """Takes one turn of steps. Returns the tokens/s."""
        self._connection.send(self.turn_steps)
        return self.turn_steps * self.started.tokens_per_step / self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise UserError("its process died, possibly out of memory") from None
        if isinstance(answer, str):
            raise UserError(answer)
        return answer

    def close(self) -> int:
        """Ends the process. Returns its peak memory in bytes."""
        self._connection.send(0)
        peak: int = self._answer()
        self._process.join()
        return peak

    def stop(self) -> None:
        """Terminates the process, whatever it is doing."""
        self._connection.close()
        self._process.terminate()
        self._process.join()


def _preload(variants: Sequence[Variant]) -> list[str]:
    """Returns the modules that workers find already imported, to start faster."""
    peers = ["transformers.models.mixtral.modeling_mixtral", "transformers.models.llama.modeling_llama"]
    return ["torch", *(peers if any(variant.system == PEER for variant in variants) else [])]


def measure(variants: Sequence[Variant], request: TrainingRequest, *, threads: int, seconds: float) -> list[Measured]:
    """Times the variants in turns, for about `seconds` each; one that fails is reported and left out.

    Compiled variants are started twice, to measure what the compiler's cache on disk saves.
    """
    _CONTEXT.set_forkserver_preload(_preload(variants))
    torch.set_num_threads(threads)  # for the matmul rate, which is measured here
    measured: dict[_Worker, Measured] = {}
    turns = max(_LEAST_TURNS, round(seconds / TURN_SECONDS))
    turn_seconds = min(TURN_SECONDS, seconds / turns)
    cold: dict[Variant, tuple[str, float]] = {}
    with ExitStack() as stack:

        def start(variant: Variant, cache: str) -> _Worker:
            worker = _Worker(variant, request.to_json(), threads, cache, turn_seconds)
            stack.callback(worker.stop)
            return worker

        for variant in variants:
            # The compiled code does not depend on the allocator.
            code = replace(variant, allocator="stock")
            try:
                if variant.step != "eager" and code not in cold:
                    cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-"))
                    worker = start(variant, cache)
                    cold[code] = cache, worker.started.compile_seconds
                    worker.close()
                cache, compile_seconds = cold.get(code, (tempfile.gettempdir(), 0.0))
                worker = start(variant, cache)
            except UserError as error:
                print(f"{variant}: left out: {error}", file=sys.stderr, flush=True)
                continue
            measured[worker] = Measured(variant, worker.started, compile_seconds, worker.started.compile_seconds)
        for _ in range(turns):
            for worker, result in measured.items():
                result.rates.append(worker.turn())
                precision = result.variant.precision.removesuffix("-weights")
                result.matmul_rates.append(matmul_gflops(result.variant.device, precision))
        for worker, result in measured.items():
            result.memory_bytes = worker.close()
    return list(measured.values())
