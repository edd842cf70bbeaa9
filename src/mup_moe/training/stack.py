"""R cells of one shape, stacked on one device, and the step that takes them all further.

A step reads and writes tensors on the device only, and never waits for a number: so one source runs
eagerly, compiled, or replayed as a CUDA graph. What it needs comes, and what it measured leaves, in
blocks of steps.

Axes: R replicas, U distinct seeds, B sequences, S positions, K steps of a block, M metrics.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mup_moe.config.settings import STEPS
from mup_moe.model.scaling import initialize
from mup_moe.model.shape import ModelShape
from mup_moe.model.transformer import Losses, Transformer
from mup_moe.model.weight import weights_of
from mup_moe.training.optimizer import ReplicaAdamW
from mup_moe.training.request import TrainingRequest

METRICS = ("train_loss", "balance_loss", "z_loss", "gradient_norm", "dropped_fraction", "max_expert_load")

# Steps whose kernels are issued one by one before the graph is captured: torch asks for a few, and
# the compiler works in the first. They are steps of the run like any other.
_BEFORE_CAPTURE = 3
_COMPILATIONS = 64


class Stack:
    """Models, optimizer and step of cells that differ in parametrization, learning rate and seed only.

    Args:
        requests: one per replica. shape: that of all of them. device: where the tensors live; for
            "graph" the current one. precision: "float32" or "bfloat16" (autocast).
        step_mode: "eager", "compiled" (torch.compile), or "graph" (compiled, replayed as one CUDA graph).
        seeds: U of them, those of all requests and maybe more, in the order of the blocks.
        block_steps: K, the steps that `load_block` takes at most.

    """

    def __init__(
        self,
        requests: Sequence[TrainingRequest],
        shape: ModelShape,
        device: torch.device,
        precision: str,
        step_mode: str,
        seeds: Sequence[int],
        block_steps: int,
    ) -> None:
        assert step_mode in STEPS, step_mode
        first = requests[0]
        self.model = Transformer(shape, first.model, len(requests)).to(device)
        base = ModelShape.base_of(first.cell, first.model, shape.vocabulary)
        factors = initialize(self.model, base, [(r.parametrization, r.cell.seed) for r in requests])
        rates = [request.cell.learning_rate for request in requests]
        self._optimizer = ReplicaAdamW(self.model, factors, rates, first.training)
        self._precision = precision
        self._compiled: Callable[[Tensor], Losses] | None = None
        if step_mode != "eager":
            # One compilation for each number of replicas and pattern of multipliers that a process meets.
            torch._dynamo.config.recompile_limit = _COMPILATIONS
            self._compiled = torch.compile(self.losses, fullgraph=True, dynamic=False)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._side: torch.cuda.Stream | None = None
        if step_mode == "graph":
            assert torch.cuda.current_device() == device.index, "what is captured is on the current device"
            self._side = torch.cuda.Stream()
        self._issued = 0

        window = (first.training.batch_size, first.model.sequence + 1)
        self._seed_of_R = torch.tensor([seeds.index(r.cell.seed) for r in requests], device=device)
        self._windows_KUBS = torch.zeros(block_steps, len(seeds), *window, dtype=torch.int64, device=device)
        self._factor_K = torch.zeros(block_steps, device=device)
        self._metrics_KRM = torch.zeros(block_steps, len(requests), len(METRICS), device=device)
        self._position_1 = torch.zeros(1, dtype=torch.int64, device=device)

    def losses(self, windows_RBS: Tensor) -> Losses:
        """The model's losses on windows of S + 1 tokens, in the precision of the training."""
        inputs, targets = windows_RBS[..., :-1].contiguous(), windows_RBS[..., 1:].contiguous()
        with torch.autocast(windows_RBS.device.type, torch.bfloat16, enabled=self._precision == "bfloat16"):
            return self.model.losses(inputs, targets)

    def load_block(self, windows_KUBS: Tensor, factor_K: Tensor, position: int) -> None:
        """Brings the windows of each of the seeds, and the schedule, of up to K steps; the next is `position`."""
        self._windows_KUBS[: len(windows_KUBS)].copy_(windows_KUBS)
        self._factor_K[: len(factor_K)].copy_(factor_K)
        self._position_1.fill_(position)

    def advance(self) -> None:
        """Takes the next step of the block."""
        if self._side is None:
            self._step()
            return
        if self._graph is None and self._issued < _BEFORE_CAPTURE:
            # On a stream of their own, as torch asks: what they set up must not be tied to the default one.
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                self._step()
            torch.cuda.current_stream().wait_stream(self._side)
            self._issued += 1
            return
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with _telling_of_memory(), torch.cuda.graph(graph, stream=self._side):
                self._step()
            self._graph = graph
        self._graph.replay()

    def metrics(self, first: int, last: int) -> Tensor:
        """`METRICS` of the block's steps from `first` to before `last`, the next, on the CPU; waits for them."""
        assert int(self._position_1) == last, f"the device has taken {int(self._position_1)} of {last} steps"
        return self._metrics_KRM[first:last].cpu()

    def _step(self) -> None:
        windows_RBS = self._windows_KUBS.index_select(0, self._position_1)[0].index_select(0, self._seed_of_R)
        losses = (self._compiled or self.losses)(windows_RBS)
        self.model.objective(losses).backward()
        norms_R = self._optimizer.step(self._factor_K.index_select(0, self._position_1))
        metrics_RM = torch.stack(
            [
                losses.cross_entropy_R.detach(),
                losses.balance_R.detach(),
                losses.z_R.detach(),
                norms_R,
                losses.dropped_R,
                losses.max_load_R,
            ],
            dim=1,
        )
        self._metrics_KRM.index_copy_(0, self._position_1, metrics_RM[None])
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


@contextmanager
def _telling_of_memory() -> Iterator[None]:
    """Out of memory in a capture ends the capture, whose own error would hide it."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, torch.OutOfMemoryError):
            cause = cause.__context__
        raise (cause or error) from None
