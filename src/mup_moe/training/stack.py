"""R cells of one shape, stacked on one device, and the step that takes them all further.

A step reads and writes tensors on the device only, and never waits for a number: so one source runs
eagerly, compiled, or replayed as a CUDA graph. What it needs comes, and what it measured leaves, in
blocks of steps.

Axes: R replicas, U distinct seeds, B sequences, S positions, K steps of a block, M metrics.
"""

from collections.abc import Callable, Mapping, Sequence

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
        requests: one per replica. shape: that of all of them. device: where the tensors live.
        precision: "float32" or "bfloat16" (autocast).
        step: "eager", "compiled" (torch.compile), or "graph" (compiled, then replayed as one CUDA graph).
        block_steps: K, the steps that `load_block` takes at most.

    """

    def __init__(
        self,
        requests: Sequence[TrainingRequest],
        shape: ModelShape,
        device: torch.device,
        precision: str,
        step: str,
        block_steps: int,
    ) -> None:
        assert step in STEPS, step
        first = requests[0]
        self.model = Transformer(shape, first.model, len(requests)).to(device)
        base = ModelShape.base_of(first.cell, first.model, shape.vocabulary)
        factors = initialize(self.model, base, [(r.parametrization, r.cell.seed) for r in requests])
        rates = [request.cell.learning_rate for request in requests]
        self._optimizer = ReplicaAdamW(self.model, factors, rates, first.training)
        self._precision = precision
        self._losses: Callable[[Tensor], Losses] = self.losses
        if step != "eager":
            # One compilation for each number of replicas and pattern of multipliers that a process meets.
            torch._dynamo.config.recompile_limit = _COMPILATIONS
            self._losses = torch.compile(self.losses, fullgraph=True, dynamic=False)
        self._captures = step == "graph"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._issued = 0

        self.seeds = list(dict.fromkeys(request.cell.seed for request in requests))
        window = (first.training.batch_size, first.model.sequence + 1)
        self._seed_of_R = torch.tensor([self.seeds.index(r.cell.seed) for r in requests], device=device)
        self._windows_KUBS = torch.zeros(block_steps, len(self.seeds), *window, dtype=torch.int64, device=device)
        self._factor_K = torch.zeros(block_steps, device=device)
        self._metrics_KRM = torch.zeros(block_steps, len(requests), len(METRICS), device=device)
        self._position_1 = torch.zeros(1, dtype=torch.int64, device=device)

    def losses(self, windows_RBS: Tensor) -> Losses:
        """The model's losses on windows of S + 1 tokens, in the precision of the training."""
        inputs, targets = windows_RBS[..., :-1].contiguous(), windows_RBS[..., 1:].contiguous()
        with torch.autocast(windows_RBS.device.type, torch.bfloat16, enabled=self._precision == "bfloat16"):
            return self.model.losses(inputs, targets)

    def load_block(self, windows_KUBS: Tensor, factor_K: Tensor, position: int) -> None:
        """Brings the windows of each of `seeds`, and the schedule, of up to K steps; the next is `position`."""
        self._windows_KUBS[: len(windows_KUBS)].copy_(windows_KUBS)
        self._factor_K[: len(factor_K)].copy_(factor_K)
        self._position_1.fill_(position)

    def advance(self) -> None:
        """Takes the next step of the block."""
        if self._captures and self._graph is None:
            self._issue_or_capture()
        elif self._graph is not None:
            self._graph.replay()
        else:
            self._step()

    def metrics(self, first: int, last: int) -> Tensor:
        """`METRICS` of the block's steps from `first` to before `last`, on the CPU; waits for them."""
        return self._metrics_KRM[first:last].cpu()

    def _step(self) -> None:
        windows_RBS = self._windows_KUBS.index_select(0, self._position_1)[0].index_select(0, self._seed_of_R)
        losses = self._losses(windows_RBS)
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

    def _issue_or_capture(self) -> None:
        if self._issued < _BEFORE_CAPTURE:
            # A stream of their own, as torch asks: what they set up must not be tied to the default one.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._step()
            torch.cuda.current_stream().wait_stream(side)
            self._issued += 1
            return
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()
        self._graph.replay()

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
