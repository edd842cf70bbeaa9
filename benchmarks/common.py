"""What the benchmarks share: variants of a training step, each in a process of its own, timed in turn.

python benchmarks/common.py [PRESET] > request.json

prints the training request that the benchmarks start from, for machines without pydantic: their
scripts take it as `--request request.json`.
"""

import argparse
import datetime
import functools
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from mup_moe import provenance  # noqa: E402
from mup_moe.config.learning_rate import LearningRate  # noqa: E402
from mup_moe.files import UserError  # noqa: E402
from mup_moe.training.device import keep_freed_pages, precision_on, step_on  # noqa: E402
from mup_moe.training.request import TrainingRequest  # noqa: E402
from mup_moe.training.trainer import BLOCK_STEPS, Trainer  # noqa: E402

VOCABULARY = 1024
# Replicas of a stack where the device takes as many as there are: the learning rates of a curve.
CURVE = 9
OURS, PEER = "mup-moe", "transformers"
PROVENANCE = ("torch", "transformers", "cpu", "gpu", "threads", "date")
WARM_UP_STEPS = 3
TURN_SECONDS, _LEAST_TURNS = 0.3, 3
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
# None of a stack diverges, which would make it smaller while it is timed.
_SLOWEST_RATE, _RATES = 2.0**-10, 9
# More than any measurement takes: what ends a run is its clock.
_STEPS = 100_000


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to take the steps of one shape.

    system: whose code (`OURS`, `PEER`). precision: float32, bfloat16 (autocast), or bfloat16-weights
    (no float32 copy of the weights). step: eager, compiled or graph. allocator: stock, or kept (malloc
    keeps the pages that are freed). experts_implementation, attention: as transformers names them.
    """

    system: str
    architecture: str
    width: int
    experts: int
    precision: str
    step: str
    allocator: str = "kept"
    granularity: int = 1
    replicas: int = 1
    experts_implementation: str = ""
    attention: str = ""
    device: str = "cpu"

    def request(self, base: TrainingRequest) -> TrainingRequest:
        """The training request of this shape."""
        cell = replace(
            base.cell,
            architecture=self.architecture,
            width=self.width,
            experts=self.experts,
            granularity=self.granularity,
        )
        # transformers reads its precision from the variant; nothing else trains in bfloat16-weights.
        precision = self.precision.removesuffix("-weights")
        training = replace(base.training, steps=_STEPS, precision=precision)
        return TrainingRequest(cell, base.model, training, base.parametrization)

    def __str__(self) -> str:
        parts = [self.system, self.architecture, f"width {self.width}"]
        parts += [f"{self.experts} experts"] * (self.architecture == "moe")
        parts += [f"granularity {self.granularity}"] * (self.granularity > 1)
        parts += [f"{self.replicas} replicas"] * (self.replicas > 1)
        parts += [self.precision, self.step, self.experts_implementation, self.attention, f"{self.allocator} allocator"]
        return ", ".join(part for part in parts if part)


def default_variant(base: TrainingRequest, device: str, **shape: Any) -> Variant:
    """How the pipeline trains a shape when nothing is asked for."""
    there, training = torch.device(device), replace(base.training, precision="auto")
    how = {"precision": precision_on(there, training), "step": step_on(there, "auto")}
    return Variant(system=OURS, device=device, **{"architecture": "moe", "experts": base.cell.experts} | how | shape)


def read_request(path: Path | None, preset: str | None = None) -> TrainingRequest:
    """The request in a file, or that of figure 1's muP MoE in config.yaml and a preset."""
    if path is not None:
        return TrainingRequest.from_json(path.read_text(encoding="utf-8"))
    # These need pydantic, which a GPU machine may lack.
    from mup_moe.config.load import DEFAULT_PRESET, overlay, read_document, read_preset, validate
    from mup_moe.parametrization import parse_table

    over = read_preset(ROOT / "presets", preset or DEFAULT_PRESET)
    config = validate(overlay(read_document(ROOT / "config.yaml"), over))
    cell = next(cell for cell in config.figures["figure1"].cells() if cell.parametrization == "mup")
    setup = config.setups[cell.setup]
    rules = parse_table(config.parametrizations)[cell.parametrization]
    return TrainingRequest(cell, setup.model, setup.training, rules)


def token_stream(vocabulary: int = VOCABULARY) -> np.ndarray:
    """Token ids to train on. Which ones makes no difference but to the router: skewed as in text."""
    return (np.random.default_rng(0).zipf(1.3, 200_000) % vocabulary).astype(np.uint16)


@dataclass(frozen=True)
class Model:
    """What is timed: `run` takes so many steps, and returns when they are done.

    Sizes count as `model_size` does; tokens_per_step is over all replicas, flops_per_token of one.
    """

    run: Callable[[int], None]
    tokens_per_step: int
    parameters: int
    active_parameters: int
    flops_per_token: int


def trainer_of(variant: Variant, base: TrainingRequest) -> Trainer:
    """A stack of our own, trained as `mup_moe train` does."""
    device = torch.device(variant.device)
    if variant.device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    tokens = token_stream()
    request = variant.request(base)
    requests = [
        replace(request, cell=replace(request.cell, learning_rate=LearningRate(_SLOWEST_RATE * 2 ** (i / 4)), seed=s))
        for s, i in (divmod(replica, _RATES) for replica in range(variant.replicas))
    ]
    return Trainer(requests, tokens, tokens, VOCABULARY, device, variant.step)


def build_ours(variant: Variant, base: TrainingRequest) -> Model:
    """What is timed of such a stack."""
    trainer = trainer_of(variant, base)
    size = trainer.size
    return Model(
        run=lambda steps: trainer.run(trainer.step + steps),
        tokens_per_step=trainer.tokens_per_step * variant.replicas,
        parameters=size.parameters,
        active_parameters=size.active_parameters,
        flops_per_token=size.flops_per_token,
    )


@dataclass(frozen=True, kw_only=True)
class _Started:
    """What a worker says of its model once it has taken its first steps."""

    tokens_per_step: int
    parameters: int
    active_parameters: int
    flops_per_token: int
    step_seconds: float
    compile_seconds: float


def _serve(connection: Connection, variant: Variant, request: str, threads: int, cache: str) -> None:
    """A worker: builds the model, then takes as many steps as it is told and answers with the seconds."""
    # A failure is told to the parent as a reason, not as text between the results.
    try:
        _prepare(variant, threads, cache)
        model = _build(variant, TrainingRequest.from_json(request))
        seconds = [seconds_of(functools.partial(model.run, 1), variant.device) for _ in range(WARM_UP_STEPS + 4)]
        step_seconds = statistics.median(seconds[-WARM_UP_STEPS:])
        # The graph is captured in the fourth step; whatever the first ones take longer is preparation.
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
    # What a compiler prints is no result.
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


def seconds_of(work: Callable[[], Any], device: str = "cpu") -> float:
    """How long a piece of work takes, until the device is done."""
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak_bytes(device: str) -> int:
    """The most memory that a worker has held: its tensors' on a GPU, its own on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(eq=False)
class Measured:
    """A variant's sizes and speed.

    compile_seconds: what the first steps took longer than others, with nothing cached;
    cached_compile_seconds: the same once the compiler's cache on disk is filled (0 if not compiled).
    rates: tokens/s, one for each turn, over all replicas. matmul_rates: the machine's matmul rate in the
    variant's precision right after each turn, GFLOP/s. memory_bytes: the most it held.
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
        """Tokens/s, the median of the turns."""
        return statistics.median(self.rates)

    @property
    def gflops(self) -> float:
        """Training FLOPs done, GFLOP/s."""
        return self.rate * self.sizes.flops_per_token / 1e9

    @property
    def matmul_gflops(self) -> float:
        """The machine's matmul rate, GFLOP/s, the median of the turns."""
        return statistics.median(self.matmul_rates)

    @property
    def fraction_of_matmul(self) -> float:
        """The share of that rate which training reaches, turn by turn, in the median."""
        flops = self.sizes.flops_per_token / 1e9
        return statistics.median(rate * flops / peak for rate, peak in zip(self.rates, self.matmul_rates, strict=True))

    def rate_over(self, steps: int) -> float:
        """Tokens/s of so many steps, compilation with nothing cached counted in."""
        return statistics.median(self._rates_over(steps))

    def ratio(self, other: "Measured", steps: int | None = None) -> float:
        """How many times as fast as `other`, turn by turn, in the median; over a run of `steps` or beyond it."""
        mine, theirs = (r.rates if steps is None else r._rates_over(steps) for r in (self, other))
        return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))

    def _rates_over(self, steps: int) -> list[float]:
        tokens = steps * self.sizes.tokens_per_step
        return [tokens / (self.compile_seconds + tokens / rate) for rate in self.rates]


def matmul_gflops(device: str, precision: str) -> float:
    """The rate (GFLOP/s) of one product of square matrices."""
    size = MATMUL_SIZE[device]
    a = torch.ones(size, size, dtype=getattr(torch, precision), device=device)
    seconds_of(lambda: torch.mm(a[:64], a), device)  # what a first product sets up
    return 2 * size**3 / seconds_of(lambda: torch.mm(a, a), device) / 1e9


# A fork of a process that has done nothing but imports.
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
        """Takes a turn of steps; tokens/s."""
        self._connection.send(self.turn_steps)
        return self.turn_steps * self.started.tokens_per_step / self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise UserError("its process died, maybe for want of memory") from None
        if isinstance(answer, str):
            raise UserError(answer)
        return answer

    def close(self) -> int:
        """Ends the process; the most memory that it held, bytes."""
        self._connection.send(0)
        peak: int = self._answer()
        self._process.join()
        return peak

    def stop(self) -> None:
        """Ends the process whatever it is at."""
        self._connection.close()
        self._process.terminate()
        self._process.join()


def _preload(variants: Sequence[Variant]) -> list[str]:
    """What workers find imported: the seconds of a start are not what is measured."""
    peers = ["transformers.models.mixtral.modeling_mixtral", "transformers.models.llama.modeling_llama"]
    return ["torch", *(peers if any(variant.system == PEER for variant in variants) else [])]


def measure(variants: Sequence[Variant], request: TrainingRequest, *, threads: int, seconds: float) -> list[Measured]:
    """Variants timed turn by turn, about `seconds` of each; one that fails is told and left out.

    Compiled ones are started twice, to learn what the compiler's cache on disk saves.
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
            # The environment is nothing to the compiler.
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
                print(f"{variant}: left out, {error}", file=sys.stderr, flush=True)
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


def machine_row(device: str, threads: int) -> list[Any]:
    """The values of `PROVENANCE`."""
    versions = provenance.versions("transformers")
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return [torch.__version__, versions["transformers"], provenance.machine()["cpu"], gpu, threads, today]


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks of training have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--request", type=Path, help="a training request as JSON, in place of config.yaml")
    made.add_argument("--out", type=Path, help=f"default: benchmarks/{name}.csv, on a GPU benchmarks/gpu/{name}.csv")
    return made


def out_path(arguments: argparse.Namespace, name: str) -> Path:
    """Where the rows go."""
    if arguments.out is not None:
        return Path(arguments.out)
    folder = ROOT / "benchmarks"
    return (folder / "gpu" if arguments.device == "cuda" else folder) / f"{name}.csv"


@contextmanager
def told(what: str) -> Iterator[None]:
    """Says on standard error what takes its time."""
    start = time.perf_counter()
    print(f"{what} ...", file=sys.stderr, flush=True)
    yield
    print(f"{what}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(read_request(None, *sys.argv[1:2]).to_json())
