"""R cells of one shape, stacked on one device, and the step that takes them all further.

A step reads and writes tensors on the device only, and never waits for a number: so one source runs
eagerly, compiled, or replayed as a CUDA graph. What it needs comes, and what it measured leaves, in
blocks of steps.

Axes: R replicas, U distinct seeds, B sequences, S positions, K steps of a block, M metrics.
"""

import gc
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import functional_call

from mup_moe.config.settings import STEPS
from mup_moe.files import UserError
from mup_moe.model.build import build
from mup_moe.model.initialize import initialize
from mup_moe.model.inventory import ModelShape
from mup_moe.model.layers import weights_of
from mup_moe.model.metrics import METRICS
from mup_moe.training.device import allow_nondeterministic, indexed, is_lost_device, is_out_of_memory
from mup_moe.training.optimizer import optimizer_of
from mup_moe.training.request import TrainingRequest

T = TypeVar("T")

# Steps whose kernels are issued one by one before the graph is captured: torch asks for a few, and
# the compiler works in the first. They are steps of the run like any other.
_BEFORE_CAPTURE = 3
# What is tried where a step cannot be taken in a mode.
_NEXT_MODE = {"graph": "compiled", "compiled": "eager"}
_DONE_AS = {"graph": "captured as a CUDA graph", "compiled": "compiled", "eager": "issued operator by operator"}
_REMEDY = {"graph": "report this", "compiled": "install a C++ compiler (g++) if there is none"}
# As g++ and clang++ say it.
_MISSING_HEADER = re.compile(r"fatal error: '?(?P<header>[\w./+-]+)'?(?:: No such file|\s+file not found)")
# From here on torch's compiler says how to see more of its own code.
_HINTS = "Set TORCHDYNAMO_VERBOSE"
_MOST_OF_A_REASON = 300
_COMPILATIONS = 64
# Choosing among kernels by their speed takes seconds a kernel, and another choice would round otherwise.
_INDUCTOR: dict[str, Any] = {"triton.autotune_pointwise": False}


class Stack:
    """Models, optimizer and step of cells that differ in parametrization, learning rate and seed only.

    requests: one per replica. shape: that of all of them. device: where the tensors live; for "graph" the current
    one. precision: "float32" or "bfloat16" (autocast). step_mode: "eager", "compiled" (torch.compile), or "graph"
    (compiled, replayed as one CUDA graph). seeds: U of them, those of all requests and maybe more, in the order of
    the blocks. block_steps: K, the steps that `load_block` takes at most. may_fall_back: a step that cannot be
    captured is compiled, and one that cannot be compiled is eager, which is said on stderr; otherwise UserError is
    raised.
    """

    def __init__(
        self,
        requests: Sequence[TrainingRequest],
        shape: ModelShape,
        device: torch.device,
        *,
        precision: str,
        step_mode: str,
        seeds: Sequence[int],
        block_steps: int,
        may_fall_back: bool = False,
    ) -> None:
        assert step_mode in STEPS, step_mode
        first = requests[0]
        device = indexed(device)
        with device:
            self.model = build(shape, first.model, len(requests))
        base = first.base(shape.vocabulary)
        factors = initialize(self.model, base, [(r.rules, r.cell.seed) for r in requests])
        rates = [request.cell.learning_rate for request in requests]
        # transformers' models route by shapes that depend on the tokens: no compiler takes such a step whole.
        self.step_mode = "eager" if shape.hub else step_mode
        self._may_fall_back = may_fall_back
        self._optimizer = optimizer_of(first.training)(self.model, factors, rates, first.training)
        self._optimizer.use(self._compile)
        self._compiled = self._compile(self.losses)
        self._precision = precision
        self._graph: torch.cuda.CUDAGraph | None = None
        self._side = torch.cuda.Stream(device) if self.step_mode == "graph" else None
        self._issued = 0

        window = (first.training.batch_size, first.model.sequence + 1)
        self._seed_of_R = torch.tensor([seeds.index(r.cell.seed) for r in requests], device=device)
        self._windows_KUBS = torch.zeros(block_steps, len(seeds), *window, dtype=torch.int64, device=device)
        self._factor_K = torch.zeros(block_steps, device=device)
        self._metrics_KRM = torch.zeros(block_steps, len(requests), len(METRICS), device=device)
        self._row_K11 = torch.arange(block_steps, device=device)[:, None, None]
        self._position_1 = torch.zeros(1, dtype=torch.int64, device=device)

    def losses(self, windows_RBS: Tensor, places: range | None = None) -> dict[str, Tensor]:
        """The model's losses on windows of S + 1 tokens, in the precision of the training, each [R].

        places: of the replicas whose windows those are; None: of all.
        """
        inputs, targets = windows_RBS[..., :-1].contiguous(), windows_RBS[..., 1:].contiguous()
        with torch.autocast(windows_RBS.device.type, torch.bfloat16, enabled=self._precision == "bfloat16"):
            losses: dict[str, Tensor]
            if places is None or len(places) == self.model.replicas:
                losses = self.model(inputs, targets)
            else:
                whole = (*self.model.named_parameters(), *self.model.named_buffers())
                part = {name: tensor[places.start : places.stop] for name, tensor in whole}
                losses = functional_call(self.model, part, (inputs, targets))
            return losses

    def load_block(self, windows_KUBS: Tensor, factor_K: Tensor, position: int) -> None:
        """Brings the windows of each of the seeds, and the schedule, of up to K steps; the next is `position`."""
        self._windows_KUBS[: len(windows_KUBS)].copy_(windows_KUBS)
        self._factor_K[: len(factor_K)].copy_(factor_K)
        self._position_1.fill_(position)

    def advance(self) -> None:
        """Takes the next step of the block; `may_fall_back` says what happens where the step mode fails."""
        while True:
            try:
                self._take_step()
                return
            except Exception as error:
                self._fall_back(error)

    def _fall_back(self, error: Exception) -> None:
        """Goes over to the next mode after an error of the compiler, or of the capture; raises any other."""
        if self._issued == 0 and allow_nondeterministic(error):
            print(f"results will differ in their last bits from run to run: {error}", file=sys.stderr, flush=True)
            self._optimizer.clear_gradients()
            return
        if self.step_mode != "eager" and self._issued == 0:
            failed = "compiled"
        elif self.step_mode == "graph" and self._issued >= _BEFORE_CAPTURE and self._graph is None:
            failed = "graph"
        else:
            raise error
        # In a capture, whatever else is wrong looks like a lost GPU.
        if failed == "compiled" and is_lost_device(error):
            raise error
        if is_out_of_memory(error):
            raise torch.OutOfMemoryError(str(error)) from error
        reason = " ".join(str(error).partition(_HINTS)[0].split())[:_MOST_OF_A_REASON]
        what = f"a step cannot be {_DONE_AS[failed]} here ({type(error).__name__}: {reason})"
        if not self._may_fall_back:
            missing = _MISSING_HEADER.search(str(error))
            remedy = f"install the package that has the header {missing['header']}" if missing else _REMEDY[failed]
            raise UserError(f"{what}: {remedy}, or set `execution.step` to auto") from error
        # Nothing has changed yet but gradients: neither a compiler nor a capture runs anything.
        self.step_mode = _NEXT_MODE[failed]
        print(f"{what}: it is {_DONE_AS[self.step_mode]} instead", file=sys.stderr, flush=True)
        self._optimizer.clear_gradients()
        self._optimizer.use(self._compile)
        self._compiled = self._compile(self.losses)

    def _compile(self, function: Callable[..., T]) -> Callable[..., T] | None:
        """The function compiled; None where the step mode has it called as it is."""
        if self.step_mode == "eager":
            # Not the function itself: a stack that held a method of its own would outlive its last user.
            return None
        # One compilation for each number of replicas and pattern of multipliers that a process meets.
        torch._dynamo.config.recompile_limit = _COMPILATIONS
        compiled: Callable[..., T] = torch.compile(function, fullgraph=True, dynamic=False, options=_INDUCTOR)
        return compiled

    def _take_step(self) -> None:
        if self._side is None:
            self._step()
        elif self.step_mode != "graph" or self._issued < _BEFORE_CAPTURE:
            # On a stream of their own, as torch asks: what they set up must not be tied to the default one.
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                self._step()
            torch.cuda.current_stream().wait_stream(self._side)
        else:
            if self._graph is None:
                self._graph = self._capture(self._side)
            self._graph.replay()
        self._issued += 1

    def _capture(self, side: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        graph, pool, before = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=side):
                self._step()
        except Exception:
            # torch leaves both as they were within the capture.
            torch.cuda.set_stream(before)
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise
        return graph

    def release(self) -> None:
        """Gives back what only a step needs, a captured graph's memory above all. The next step prepares it again."""
        self._graph = None
        self._issued = 0
        self._optimizer.clear_gradients()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
            gc.collect()
            # What is trained is not to be lost for what cannot be given back.
            with suppress(RuntimeError):
                torch.cuda.empty_cache()

    def metrics(self, first: int, last: int) -> Tensor:
        """`METRICS` of the block's steps from `first` to before `last`, the next, on the CPU; waits for them."""
        assert int(self._position_1) == last, f"the device has taken {int(self._position_1)} of {last} steps"
        return self._metrics_KRM[first:last].cpu()

    def _step(self) -> None:
        windows_RBS = self._windows_KUBS.index_select(0, self._position_1)[0].index_select(0, self._seed_of_R)
        losses = (self._compiled or self.losses)(windows_RBS)
        self.model.objective(losses).backward()
        norms_R = self._optimizer.step(self._factor_K.index_select(0, self._position_1))
        metrics = losses | {"gradient_norm": norms_R}
        metrics_RM = torch.stack([metrics[name].detach() for name in METRICS], dim=1)
        # Not by an index: a scatter of a GPU is several launches.
        torch.where(self._row_K11 == self._position_1, metrics_RM, self._metrics_KRM, out=self._metrics_KRM)
        self._position_1 += 1

    def state(self, replica: int) -> dict[str, Tensor]:
        """All that changes with a step of one replica, metrics apart, by name; the tensors are views."""
        return {name: tensor[replica] for name, tensor in self._state().items()}

    def load_state(self, steps: int, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Continues from each replica's `state` as it was after `steps` steps, to the bit."""
        with torch.no_grad():
            for name, tensor in self._state().items():
                for replica, state in enumerate(states):
                    tensor[replica].copy_(state[name])
        self._optimizer.set_steps(steps)

    def _state(self) -> dict[str, Tensor]:
        parameters = {f"parameter/{name}": weight.value.detach() for name, weight in weights_of(self.model).items()}
        return parameters | self._optimizer.state()
