"""What a GPU that is lent for minutes has to tell, in the order of its worth, in one process.

python benchmarks/look.py --jobs results/gpu/gpu.jsonl --out FOLDER [--results results] [--seconds 270]
                          [--stacks 27x64 27x256 9x64 1x64 27x512 27x128] [--steps eager compiled graph]

Writes a line of JSON to FOLDER/look.jsonl as soon as a number is known, and the kernels of some stacks to
FOLDER/kernels-*.csv. The models are those of a list of jobs (`mup_moe export-jobs`), and their tokens
those that it trains on; --stacks names replicas and width. A part that fails costs no other part, and a
part that needs more seconds than are left is left out. Exit status: 0; 1 if a part failed; 2 if no
step can be compiled or captured, which ends the visit early; 3 if the GPU itself failed.

Lines: `part` and `at` (seconds since the start) with, by part,
facts: versions, device, memory; precision and step as the pipeline chooses them.
smoke: a small stack for a few steps, in a step mode and precision: `same_bits` of two runs, the
    largest difference of losses to the CPU's in float32 (nats), the step mode that was used.
rates: of copies (TB/s, bytes read and written) and matrix products (TFLOP/s) of random numbers.
attention: milliseconds forward and backward of a backend, and whether twice gives the same bits.
stack: building, first step (with compilation) and capture in seconds, the median step and the graph
    alone in milliseconds, memory, tokens/s and TFLOP/s over all replicas; `bytes` by `stack_bytes`.
kernels: launches and busy milliseconds of a step.
"""

import argparse
import csv
import gc
import json
import signal
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import ROOT, seconds_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from mup_moe import provenance
from mup_moe.data.tokens import Tokens
from mup_moe.files import UserError
from mup_moe.model.inventory import ModelShape
from mup_moe.model.metrics import METRICS
from mup_moe.ops.device import claim_device, keep_compiled_code_apart, keep_freed_pages, step_on
from mup_moe.ops.offsite.job_list import ListedJob, read_jobs
from mup_moe.training.device import is_lost_device, precision_on
from mup_moe.training.memory import stack_bytes
from mup_moe.training.request import TrainingRequest
from mup_moe.training.trainer import BLOCK_STEPS, Trainer

STACKS = ("27x64", "27x256", "9x64", "1x64", "27x512", "27x128")
PROFILED = ("27x64", "1x64", "27x256")
# A part's seconds at most, in a look of SHORT_LOOK seconds or less, and what it needs to be begun; generous, for they
# only bound a fault.
SHORT_LOOK = 300
LIMITS = {"facts": 30, "smoke": 120, "rates": 30, "attention": 30, "stack": 110, "kernels": 30}
NEEDS = {"stack": 40}
_SMOKE_STEPS, _SMOKE_NATS = 12, 0.1
_MOST_STEPS = 10_000
_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION)
# Sizes that fill a GPU, or hardly touch a CPU.
_COPIED = {"cuda": 2**30, "cpu": 2**22}
_MATRIX = {"cuda": 8192, "cpu": 256}
_SEQUENCES = {"cuda": 27 * 64, "cpu": 2}


class _OverError(BaseException):
    """A part has taken more than its share of the time; nothing on the way is to take it for a failure of its own."""


class Look:
    """The parts, each of which writes its lines."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self._options = options
        self._device = device
        self._kind = device.type
        self._start = time.monotonic()
        self._jobs = read_jobs(options.jobs)
        self._tokens: dict[str, Tokens] = {}
        options.out.mkdir(parents=True, exist_ok=True)
        self._file = (options.out / "look.jsonl").open("w", encoding="utf-8")
        self.status = 0

    def tell(self, part: str, **what: Any) -> None:
        """Writes a line."""
        line = json.dumps({"part": part, "at": round(time.monotonic() - self._start, 1)} | what)
        for file in (self._file, sys.stdout):
            print(line, file=file, flush=True)

    def run(self) -> int:
        """All parts; the exit status."""
        self._part("facts", "", self._facts)
        steps = self._options.steps or (["eager", "compiled", "graph"] if self._kind == "cuda" else ["eager"])
        for step in steps:
            for precision in ("float32", "bfloat16"):
                whole = self._part("smoke", f"{step} {precision}", lambda s=step, p=precision: self._smoke(s, p))
                if not whole and step != "eager":
                    self.tell("end", reason=f"a step cannot be {step} in {precision}: fix that first")
                    return 2
        self._part("rates", "", self._rates)
        for number, stack in enumerate(self._options.stacks):
            self._part("stack", stack, lambda s=stack: self._stack(s))
            if number == 0:
                # Not before: it tries what the pipeline does not use.
                self._part("attention", "", self._attention)
        return self.status

    def _part(self, name: str, which: str, work: Callable[[], None]) -> bool:
        """Runs a part within its limit and the time that is left; whether it did not fail, but for want of time."""
        left = self._options.seconds - (time.monotonic() - self._start)
        if left < NEEDS.get(name, 1) * (self._kind == "cuda" or left <= 0):
            self.tell(name, which=which, left_out=f"{left:.0f} s left")
            return True
        try:
            # A longer look is on a slower machine.
            limit = LIMITS[name] * max(1.0, self._options.seconds / SHORT_LOOK)
            with _at_most(min(limit, left)):
                work()
            return True
        except _OverError as error:
            self.tell(name, which=which, failed=str(error))
            self.status = 1
            return True
        except Exception as error:
            reason = " ".join(str(error).split())
            self.tell(name, which=which, failed=f"{type(error).__name__}: {reason[:1500]}", where=_where(error))
            self.status = 1
            if self._kind == "cuda" and is_lost_device(error) and name != "smoke":
                self.tell("end", reason="the GPU failed")
                raise SystemExit(3) from error
            return False

    def _facts(self) -> None:
        told: dict[str, Any] = {"versions": provenance.versions("numpy", "triton") | {"torch": torch.__version__}}
        told["machine"] = provenance.machine()
        training = replace(self._jobs[0].requests[0].training, precision="auto")
        told |= {"precision": precision_on(self._device, training), "step": step_on(self._device, "auto")}
        if self._kind == "cuda":
            properties = torch.cuda.get_device_properties(self._device)
            told |= {"gpu": properties.name, "gpu_gb": round(properties.total_memory / 2**30, 1)}
            told |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        self.tell("facts", **told)

    def _smoke(self, step: str, precision: str) -> None:
        small = _small(self._jobs[0].requests[0])
        runs, seconds, used = [], 0.0, step
        for device, mode, its_precision in (
            (self._device, step, precision),
            (self._device, step, precision),
            (torch.device("cpu"), "eager", "float32"),
        ):
            requests = [
                replace(
                    small,
                    cell=replace(small.cell, seed=seed),
                    training=replace(small.training, precision=its_precision),
                )
                for seed in (0, 1)
            ]
            trainer = self._trainer(self._jobs[0], requests, mode, device)
            taken = seconds_of(lambda trainer=trainer: trainer.run(_SMOKE_STEPS), device.type)
            if not runs:
                seconds, used = taken, trainer.step_mode
            state = trainer.states()[0]
            runs.append(torch.stack([state[f"history/{name}"] for name in METRICS], 1))
        first, _, cpu = (history_TM[:, METRICS.index("train_loss")] for history_TM in runs)
        apart = float((first - cpu).abs().max())
        same = bool(torch.equal(runs[0], runs[1]))
        how = {"step": step, "used": used, "precision": precision, "seconds": round(seconds, 2)}
        self.tell("smoke", **how, same_bits=same, nats_to_cpu=apart)
        assert torch.isfinite(first).all(), "a loss is not finite"
        assert apart < _SMOKE_NATS, f"the losses are {apart:.3f} nats from the CPU's"

    def _rates(self) -> None:
        entries, size = _COPIED[self._kind] // 4, _MATRIX[self._kind]
        a, b = (torch.randn(entries, device=self._device) for _ in range(2))
        seconds = self._median(lambda: b.copy_(a))
        self.tell("rates", copy_tb_s=round(8 * entries / seconds / 1e12, 3))
        for dtype in (torch.bfloat16, torch.float32):
            x, y = (torch.randn(size, size, device=self._device, dtype=dtype) for _ in range(2))
            rate = 2 * size**3 / self._median(lambda x=x, y=y: x @ y) / 1e12
            self.tell("rates", dtype=str(dtype).removeprefix("torch."), matmul_tflop_s=round(rate, 2))

    def _attention(self) -> None:
        request = self._jobs[0].requests[0]
        heads, length = request.model.heads or 4, request.model.sequence
        for size in (16, 32, 64, 128):
            shape = (_SEQUENCES[self._kind], heads, length, size)
            q, k, v = (torch.randn(shape, device=self._device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
            for backend in _BACKENDS:

                def gradients(q=q, k=k, v=v, backend=backend) -> tuple[torch.Tensor, ...]:
                    with sdpa_kernel(backend):
                        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
                    return torch.autograd.grad(out, (q, k, v), out)

                try:
                    same = all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))
                    what = {"ms": round(1e3 * self._median(gradients), 3), "same_bits": same}
                except RuntimeError as error:
                    if is_lost_device(error):
                        raise
                    what = {"refused": " ".join(str(error).split())[:200]}
                self.tell("attention", backend=backend.name, head_size=size, **what)

    def _stack(self, name: str) -> None:
        replicas, width = (int(part) for part in name.split("x"))
        job, requests = self._requests(replicas, width)
        gc.collect()  # of the stack before
        if self._kind == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        trainer = self._trainer(job, requests, step_on(self._device, "auto"), self._device, falls_back=True)
        told: dict[str, Any] = {"which": name, "replicas": replicas, "width": width}
        told["build_s"] = round(time.perf_counter() - start, 2)
        told["first_step_s"] = round(self._seconds(lambda: trainer.run(1)), 2)
        told["to_graph_s"] = round(self._seconds(lambda: trainer.run(5)), 2)
        trainer.run(BLOCK_STEPS)
        blocks = [self._seconds(lambda: trainer.run(trainer.step + BLOCK_STEPS)) for _ in range(self._options.blocks)]
        seconds = statistics.median(blocks) / BLOCK_STEPS
        tokens = len(requests) * trainer.tokens_per_step
        told |= {"step_ms": round(1e3 * seconds, 3), "device_ms": self._device_ms(trainer)}
        told |= {"tokens_per_second": round(tokens / seconds), "used": trainer.step_mode}
        told["tflop_s"] = round(tokens * trainer.size.flops_per_token / seconds / 1e12, 2)
        told |= {"replicas_left": trainer.model.replicas, "precision": trainer.precision}
        if self._kind == "cuda":
            told["memory_gb"] = round(torch.cuda.max_memory_allocated(self._device) / 1e9, 2)
        shape = ModelShape.of(requests[0].cell, requests[0].model, self._open(job).vocabulary)
        self.tell("stack", **told, bytes=stack_bytes(shape, requests[0], replicas))
        if name in self._options.profiled:
            self._part("kernels", name, lambda: self._kernels(trainer, name))

    def _device_ms(self, trainer: Trainer) -> float | None:
        """Milliseconds of the graph alone: what a step takes longer is the host's."""
        graph = trainer._stack._graph
        if graph is None:
            return None
        trainer._stack._position_1.zero_()  # it reads windows that are there, as good as any
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(BLOCK_STEPS):
            graph.replay()
        end.record()
        end.synchronize()
        return round(begin.elapsed_time(end) / BLOCK_STEPS, 3)

    def _kernels(self, trainer: Trainer, name: str) -> None:
        cuda = self._kind == "cuda"
        activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
        launches: Counter[str] = Counter()
        busy: Counter[str] = Counter()
        steps = 3
        trainer._stack._position_1.zero_()
        with torch.profiler.profile(activities=[activity]) as seen:
            for _ in range(steps):
                trainer._stack._take_step()
            if cuda:
                torch.cuda.synchronize(self._device)
        for event in seen.key_averages():
            launches[event.key] = event.count
            busy[event.key] = event.self_device_time_total if cuda else event.self_cpu_time_total
        with (self._options.out / f"kernels-{name}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["kernel", "launches", "ms"])
            rows.writerows(
                [key[:200], round(launches[key] / steps, 1), round(us / steps / 1e3, 4)]
                for key, us in busy.most_common()
            )
        self.tell(
            "kernels",
            which=name,
            launches=round(launches.total() / steps),
            busy_ms=round(busy.total() / steps / 1e3, 3),
        )

    def _requests(self, replicas: int, width: int) -> tuple[ListedJob, list[TrainingRequest]]:
        """The first of the list's jobs that has so many cells of that width: muP's where that is a part of it."""
        for job in self._jobs:
            alike = [request for request in job.requests if request.cell.width == width]
            if len(alike) > replicas:
                alike = [request for request in alike if request.cell.parametrization == "mup"] or alike
            if len(alike) >= replicas:
                # The middle of the learning rates, which converge.
                first = (len(alike) - replicas) // 2
                return job, alike[first : first + replicas]
        raise UserError(f"the list has no job with {replicas} cells of width {width}")

    def _trainer(
        self,
        job: ListedJob,
        requests: Sequence[TrainingRequest],
        step: str,
        device: torch.device,
        falls_back: bool = False,
    ) -> Trainer:
        tokens = self._open(job)
        # The clock ends what is timed, never the cells' own steps.
        requests = [replace(r, training=replace(r.training, steps=_MOST_STEPS)) for r in requests]
        return Trainer(requests, tokens.train, tokens.valid, tokens.vocabulary, device, step, falls_back)

    def _open(self, job: ListedJob) -> Tokens:
        if job.corpus not in self._tokens:
            self._tokens[job.corpus] = Tokens.open(self._options.results / "data" / job.corpus)
        return self._tokens[job.corpus]

    def _seconds(self, work: Callable[[], Any]) -> float:
        return seconds_of(work, self._kind)

    def _median(self, work: Callable[[], Any]) -> float:
        work()
        if self._kind == "cuda":
            torch.cuda.synchronize(self._device)
        return statistics.median(self._seconds(work) for _ in range(7))


def _small(request: TrainingRequest) -> TrainingRequest:
    """A model of the same kind that a CPU trains in a moment."""
    model = replace(request.model, base_width=32, blocks=2, sequence=min(64, request.model.sequence))
    training = replace(request.training, batch_size=8)
    return replace(request, model=model, training=training, cell=replace(request.cell, width=32))


def _where(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-3000:].replace(str(ROOT), "")


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises in the block once it has taken so long, as soon as Python runs again."""

    def over(*_: object) -> None:
        raise _OverError(f"it took more than {seconds:.0f} s")

    # Parts lie within parts: what is left of the outer one's time counts on.
    (outer, again), begun = signal.setitimer(signal.ITIMER_REAL, 0), time.monotonic()
    before = signal.signal(signal.SIGALRM, over)
    try:
        # Again and again: what is raised while garbage is collected is lost.
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 1.0)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        left = max(outer - (time.monotonic() - begun), 0.001) if outer else 0
        signal.setitimer(signal.ITIMER_REAL, left, again)


def main() -> int:
    """Looks at the device; the exit status."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--jobs", type=Path, required=True, help="a list of export-jobs")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--results", type=Path, default=Path("results"), help="has data/")
    options.add_argument("--seconds", type=float, default=270)
    options.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    options.add_argument("--steps", nargs="*", choices=["eager", "compiled", "graph"], help="of the smoke test")
    options.add_argument("--stacks", nargs="*", default=STACKS, metavar="REPLICASxWIDTH")
    options.add_argument("--profiled", nargs="*", default=PROFILED, metavar="REPLICASxWIDTH")
    options.add_argument("--blocks", type=int, default=5, help=f"of {BLOCK_STEPS} steps that a stack is timed for")
    options.add_argument("--threads", type=int, default=4)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_pages()
    keep_compiled_code_apart()  # in the cache that training finds next
    try:
        with claim_device(arguments.device) as device:
            return Look(arguments, device).run()
    except UserError as error:
        print(f"look: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
