"""R cells of one shape, stacked on one device, and the step that advances all of them.

A step only reads and writes tensors on the device and never waits for a value, so the same code runs eagerly,
compiled, or replayed as a CUDA graph. Inputs and metrics are transferred in blocks of steps.

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

# Steps whose kernels are issued one by one before the graph is captured: torch requires a few, and the first one
# compiles. They are ordinary steps of the run.
_BEFORE_CAPTURE = 3
# The mode to try if a step cannot run in a mode.
_NEXT_MODE = {"graph": "compiled", "compiled": "eager"}
_DONE_AS = {"graph": "captured as a CUDA graph", "compiled": "compiled", "eager": "issued operator by operator"}
_REMEDY = {"graph": "report this", "compiled": "install a C++ compiler (g++) if there is none"}
# As in the messages of g++ and clang++.
_MISSING_HEADER = re.compile(r"fatal error: '?(?P<header>[\w./+-]+)'?(?:: No such file|\s+file not found)")
# From this text on, an error of torch's compiler only says how to debug the compiler.
_HINTS = "Set TORCHDYNAMO_VERBOSE"
_MOST_OF_A_REASON = 300
_COMPILATIONS = 64
# Autotuning takes seconds per kernel, and a different choice of kernel would round differently.
_INDUCTOR: dict[str, Any] = {"triton.autotune_pointwise": False}


class Stack:
    """Models, optimizer and step of cells that differ only in parametrization, learning rate and seed.

    requests: one per replica. shape: the shape of all of them. device: where the tensors are; for "graph", it must be
    the current device. precision: "float32" or "bfloat16" (autocast). step_mode: "eager", "compiled" (torch.compile),
    or "graph" (compiled and replayed as one CUDA graph). seeds: U seeds, including those of all requests, in the order
    used in the blocks. block_steps: K, the most steps that `load_block` takes. may_fall_back: if a step cannot be
    captured, compile it, and if it cannot be compiled, run it eagerly, with a message on stderr; otherwise raise
    UserError.
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
        # Routing in transformers' models has token-dependent shapes, so their steps cannot be compiled as a whole.
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
        """Returns the model's losses on windows of S + 1 tokens, in the training precision, each [R].

        places: the stack positions of the replicas that the windows belong to; None: all replicas.
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
        """Loads each seed's windows and the schedule for up to K steps; the next step is `position`."""
        self._windows_KUBS[: len(windows_KUBS)].copy_(windows_KUBS)
        self._factor_K[: len(factor_K)].copy_(factor_K)
        self._position_1.fill_(position)

    def advance(self) -> None:
        """Takes the next step of the block; `may_fall_back` decides what happens if the step mode fails."""
        while True:
            try:
                self._take_step()
                return
            except Exception as error:
                self._fall_back(error)

    def _fall_back(self, error: Exception) -> None:
        """Switches to the next mode after an error of the compiler or the capture; raises any other error."""
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
        # During a capture, other errors look like a lost GPU too.
        if failed == "compiled" and is_lost_device(error):
            raise error
        if is_out_of_memory(error):
            raise torch.OutOfMemoryError(str(error)) from error
        reason = " ".join(str(error).partition(_HINTS)[0].split())[:_MOST_OF_A_REASON]
        what = f"a step cannot be {_DONE_AS[failed]} here ({type(error).__name__}: {reason})"
        if not self._may_fall_back:
            missing = _MISSING_HEADER.search(str(error))
            remedy = f"install the package that provides {missing['header']}" if missing else _REMEDY[failed]
            raise UserError(f"{what}: {remedy}, or set `execution.step` to auto") from error
        # Only gradients have changed so far, because neither compiling nor capturing runs anything.
        self.step_mode = _NEXT_MODE[failed]
        print(f"{what}: it is {_DONE_AS[self.step_mode]} instead", file=sys.stderr, flush=True)
        self._optimizer.clear_gradients()
        self._optimizer.use(self._compile)
        self._compiled = self._compile(self.losses)

    def _compile(self, function: Callable[..., T]) -> Callable[..., T] | None:
        """Returns the compiled function; None if the step mode calls it as it is."""
        if self.step_mode == "eager":
            # Do not return the function itself: a stack that holds its own method is a reference cycle and stays alive.
            return None
        # There is one compilation for each number of replicas and pattern of multipliers in a process.
        torch._dynamo.config.recompile_limit = _COMPILATIONS
        compiled: Callable[..., T] = torch.compile(function, fullgraph=True, dynamic=False, options=_INDUCTOR)
        return compiled

    def _take_step(self) -> None:
        if self._side is None:
            self._step()
        elif self.step_mode != "graph" or self._issued < _BEFORE_CAPTURE:
            # torch requires a side stream, so that the state set up here is not tied to the default stream.
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
            # torch does not restore the stream and the pool after a failed capture.
            torch.cuda.set_stream(before)
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise
        return graph

    def release(self) -> None:
        """Frees what only steps need, mainly a captured graph's memory. The next step sets it up again."""
        self._graph = None
        self._issued = 0
        self._optimizer.clear_gradients()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
            gc.collect()
            # A failure to free memory must not lose trained cells.
            with suppress(RuntimeError):
                torch.cuda.empty_cache()

    def metrics(self, first: int, last: int) -> Tensor:
        """Waits for the block's steps `first` to `last`, the latter excluded; returns their `METRICS` on the CPU."""
        assert int(self._position_1) == last, f"the device has taken {int(self._position_1)} of {last} steps"
        return self._metrics_KRM[first:last].cpu()

    def _step(self) -> None:
        windows_RBS = self._windows_KUBS.index_select(0, self._position_1)[0].index_select(0, self._seed_of_R)
        losses = (self._compiled or self.losses)(windows_RBS)
        self.model.objective(losses).backward()
        norms_R = self._optimizer.step(self._factor_K.index_select(0, self._position_1))
        metrics = losses | {"gradient_norm": norms_R}
        metrics_RM = torch.stack([metrics[name].detach() for name in METRICS], dim=1)
        # Use `where` rather than an index, because a scatter takes several launches on a GPU.
        torch.where(self._row_K11 == self._position_1, metrics_RM, self._metrics_KRM, out=self._metrics_KRM)
        self._position_1 += 1

    def state(self, replica: int) -> dict[str, Tensor]:
        """Returns everything except metrics that a step of one replica changes, by name; the tensors are views."""
        return {name: tensor[replica] for name, tensor in self._state().items()}

    def load_state(self, steps: int, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Resumes bitwise from each replica's `state` after `steps` steps."""
        with torch.no_grad():
            for name, tensor in self._state().items():
                for replica, state in enumerate(states):
                    tensor[replica].copy_(state[name])
        self._optimizer.set_steps(steps)

    def _state(self) -> dict[str, Tensor]:
        parameters = {f"parameter/{name}": weight.value.detach() for name, weight in weights_of(self.model).items()}
        return parameters | self._optimizer.state()
