"""Measures a GPU that is available for minutes only, most valuable results first, in one process.

python benchmarks/look.py --jobs results/gpu/gpu.jsonl --out FOLDER [--results results] [--seconds 270]
                          [--stacks 27x64 27x256 9x64 1x64 27x512 27x128] [--steps eager compiled graph]

Writes each number as a line of JSON to FOLDER/look.jsonl as soon as it is known, and the kernels of some stacks to
FOLDER/kernels-*.csv. Models and tokens are those of a list of jobs (`mup_moe export-jobs`); --stacks gives replicas and
width. A part that fails does not affect the others, and a part that needs more seconds than are left is left out.
Exit status: 0; 1 if a part failed; 2 if a step cannot be compiled or captured, which ends the visit early; 3 if the GPU
itself failed.

Every line has `part` and `at` (seconds since the start) and, depending on the part:
facts: versions, device, memory; precision and step mode as the pipeline chooses them.
smoke: a small stack, trained for a few steps in a step mode and precision: `same_bits` of two runs, the largest
    difference (nats) between its losses and the CPU's in float32, and the step mode that was used.
rates: of copies (TB/s, bytes read plus written) and of matrix products (TFLOP/s), with random numbers.
attention: milliseconds of a backend, forward plus backward, and whether two runs give the same bits.
stack: seconds to build, to take the first step (with compilation) and to capture the graph; milliseconds of the median
    step and of the graph alone; memory, tokens/s and TFLOP/s over all replicas; `bytes` as estimated by `stack_bytes`.
kernels: launches and busy milliseconds per step.
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
# Maximum seconds of each part in a look of at most SHORT_LOOK seconds, and the seconds that must be left to start it.
# They are generous because they only limit the damage of a fault.
SHORT_LOOK = 300
LIMITS = {"facts": 30, "smoke": 120, "rates": 30, "attention": 30, "stack": 110, "kernels": 30}
NEEDS = {"stack": 40}
_SMOKE_STEPS, _SMOKE_NATS = 12, 0.1
_MOST_STEPS = 10_000
_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION)
# Sizes that fill a GPU, or are quick on a CPU.
_COPIED = {"cuda": 2**30, "cpu": 2**22}
_MATRIX = {"cuda": 8192, "cpu": 256}
_SEQUENCES = {"cuda": 27 * 64, "cpu": 2}


class _OverError(BaseException):
    """A part took more than its share of the time. A BaseException, so that no other handler catches it."""


class Look:
    """All parts of a look; each writes its own lines."""

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

    def report(self, part: str, **what: Any) -> None:
        """Writes a line to the file and to standard output."""
        line = json.dumps({"part": part, "at": round(time.monotonic() - self._start, 1)} | what)
        for file in (self._file, sys.stdout):
            print(line, file=file, flush=True)

    def run(self) -> int:
        """Runs all parts. Returns the exit status."""
        self._part("facts", "", self._facts)
        steps = self._options.steps or (["eager", "compiled", "graph"] if self._kind == "cuda" else ["eager"])
        for step in steps:
            for precision in ("float32", "bfloat16"):
                whole = self._part("smoke", f"{step} {precision}", lambda s=step, p=precision: self._smoke(s, p))
                if not whole and step != "eager":
                    self.report("end", reason=f"a step cannot be {step} in {precision}: fix that and look again")
                    return 2
        self._part("rates", "", self._rates)
        for number, stack in enumerate(self._options.stacks):
            self._part("stack", stack, lambda s=stack: self._stack(s))
            if number == 0:
                # Not earlier, because it tries backends that the pipeline does not use.
                self._part("attention", "", self._attention)
        return self.status

    def _part(self, name: str, which: str, work: Callable[[], None]) -> bool:
        """Runs a part within its limit and the time that is left.

        Returns whether it succeeded; running out of time counts as success.
        """
        left = self._options.seconds - (time.monotonic() - self._start)
        if left < NEEDS.get(name, 1) * (self._kind == "cuda" or left <= 0):
            self.report(name, which=which, left_out=f"{left:.0f} s left")
            return True
        try:
            # Longer looks are for slower machines.
            limit = LIMITS[name] * max(1.0, self._options.seconds / SHORT_LOOK)
            with _at_most(min(limit, left)):
                work()
            return True
        except _OverError as error:
            self.report(name, which=which, failed=str(error))
            self.status = 1
            return True
        except Exception as error:
            reason = " ".join(str(error).split())
            self.report(name, which=which, failed=f"{type(error).__name__}: {reason[:1500]}", where=_where(error))
            self.status = 1
            if self._kind == "cuda" and is_lost_device(error) and name != "smoke":
                self.report("end", reason="the GPU failed")
                raise SystemExit(3) from error
            return False

    def _facts(self) -> None:
        facts: dict[str, Any] = {"versions": provenance.versions("numpy", "triton") | {"torch": torch.__version__}}
        facts["machine"] = provenance.machine()
        training = replace(self._jobs[0].requests[0].training, precision="auto")
        facts |= {"precision": precision_on(self._device, training), "step": step_on(self._device, "auto")}
        if self._kind == "cuda":
            properties = torch.cuda.get_device_properties(self._device)
            facts |= {"gpu": properties.name, "gpu_gb": round(properties.total_memory / 2**30, 1)}
            facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        self.report("facts", **facts)

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
        self.report("smoke", **how, same_bits=same, nats_to_cpu=apart)
        assert torch.isfinite(first).all(), "a loss is not finite"
        assert apart < _SMOKE_NATS, f"the losses are {apart:.3f} nats from the CPU's"

    def _rates(self) -> None:
        entries, size = _COPIED[self._kind] // 4, _MATRIX[self._kind]
        a, b = (torch.randn(entries, device=self._device) for _ in range(2))
        seconds = self._median(lambda: b.copy_(a))
        self.report("rates", copy_tb_s=round(8 * entries / seconds / 1e12, 3))
        for dtype in (torch.bfloat16, torch.float32):
            x, y = (torch.randn(size, size, device=self._device, dtype=dtype) for _ in range(2))
            rate = 2 * size**3 / self._median(lambda x=x, y=y: x @ y) / 1e12
            self.report("rates", dtype=str(dtype).removeprefix("torch."), matmul_tflop_s=round(rate, 2))

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
                self.report("attention", backend=backend.name, head_size=size, **what)

    def _stack(self, name: str) -> None:
        replicas, width = (int(part) for part in name.split("x"))
        job, requests = self._requests(replicas, width)
        gc.collect()  # frees the previous stack
        if self._kind == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        trainer = self._trainer(job, requests, step_on(self._device, "auto"), self._device, falls_back=True)
        row: dict[str, Any] = {"which": name, "replicas": replicas, "width": width}
        row["build_s"] = round(time.perf_counter() - start, 2)
        row["first_step_s"] = round(self._seconds(lambda: trainer.run(1)), 2)
        row["to_graph_s"] = round(self._seconds(lambda: trainer.run(5)), 2)
        trainer.run(BLOCK_STEPS)
        blocks = [self._seconds(lambda: trainer.run(trainer.step + BLOCK_STEPS)) for _ in range(self._options.blocks)]
        seconds = statistics.median(blocks) / BLOCK_STEPS
        tokens = len(requests) * trainer.tokens_per_step
        row |= {"step_ms": round(1e3 * seconds, 3), "device_ms": self._device_ms(trainer)}
        row |= {"tokens_per_second": round(tokens / seconds), "used": trainer.step_mode}
        row["tflop_s"] = round(tokens * trainer.size.flops_per_token / seconds / 1e12, 2)
        row |= {"replicas_left": trainer.model.replicas, "precision": trainer.precision}
        if self._kind == "cuda":
            row["memory_gb"] = round(torch.cuda.max_memory_allocated(self._device) / 1e9, 2)
        shape = ModelShape.of(requests[0].cell, requests[0].model, self._open(job).vocabulary)
        self.report("stack", **row, bytes=stack_bytes(shape, requests[0], replicas))
        if name in self._options.profiled:
            self._part("kernels", name, lambda: self._kernels(trainer, name))

    def _device_ms(self, trainer: Trainer) -> float | None:
        """Returns the milliseconds of the graph alone; the rest of a step is time of the host."""
        graph = trainer._stack._graph
        if graph is None:
            return None
        trainer._stack._position_1.zero_()  # so that the graph reads existing windows; which ones does not matter
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
        self.report(
            "kernels",
            which=name,
            launches=round(launches.total() / steps),
            busy_ms=round(busy.total() / steps / 1e3, 3),
        )

    def _requests(self, replicas: int, width: int) -> tuple[ListedJob, list[TrainingRequest]]:
        """Returns the first job in the list with enough cells of a width, and these cells.

        Of a job with more cells than that, muP's are taken if it has any. Raises UserError if no job has enough.
        """
        for job in self._jobs:
            alike = [request for request in job.requests if request.cell.width == width]
            if len(alike) > replicas:
                alike = [request for request in alike if request.cell.parametrization == "mup"] or alike
            if len(alike) >= replicas:
                # The middle learning rates, because they converge.
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
        # So many steps that the clock ends the measurement and never the cells.
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
    """Returns a request for a model of the same kind that a CPU trains in a moment."""
    model = replace(request.model, base_width=32, blocks=2, sequence=min(64, request.model.sequence))
    training = replace(request.training, batch_size=8)
    return replace(request, model=model, training=training, cell=replace(request.cell, width=32))


def _where(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-3000:].replace(str(ROOT), "")


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises _OverError in the block once it has taken this long, as soon as Python code runs again."""

    def over(*_: object) -> None:
        raise _OverError(f"it took more than {seconds:.0f} s")

    # Parts can be nested, and the time of the outer one keeps running.
    (outer, again), begun = signal.setitimer(signal.ITIMER_REAL, 0), time.monotonic()
    before = signal.signal(signal.SIGALRM, over)
    try:
        # Repeated, because an exception raised during garbage collection is lost.
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 1.0)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        left = max(outer - (time.monotonic() - begun), 0.001) if outer else 0
        signal.setitimer(signal.ITIMER_REAL, left, again)


def main() -> int:
    """Measures the device. Returns the exit status."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--jobs", type=Path, required=True, help="a list made by export-jobs")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--results", type=Path, default=Path("results"), help="folder with data/")
    options.add_argument("--seconds", type=float, default=270)
    options.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    options.add_argument("--steps", nargs="*", choices=["eager", "compiled", "graph"], help="for the smoke test")
    options.add_argument("--stacks", nargs="*", default=STACKS, metavar="REPLICASxWIDTH")
    options.add_argument("--profiled", nargs="*", default=PROFILED, metavar="REPLICASxWIDTH")
    options.add_argument("--blocks", type=int, default=5, help=f"of {BLOCK_STEPS} steps, timed for each stack")
    options.add_argument("--threads", type=int, default=4)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_pages()
    keep_compiled_code_apart()  # in the cache that training will use next
    try:
        with claim_device(arguments.device) as device:
            return Look(arguments, device).run()
    except UserError as error:
        print(f"look: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
