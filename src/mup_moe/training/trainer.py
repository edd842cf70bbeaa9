"""The training loop: R cells of one shape in lockstep, block by block, resumable at any step.

Axes: R replicas, T steps, M metrics; K steps of a block, U distinct seeds, B sequences, S positions.
"""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mup_moe.model.inventory import model_size
from mup_moe.model.metrics import METRICS
from mup_moe.model.replicas import ReplicaModel
from mup_moe.training.batches import Batches
from mup_moe.training.device import precision_on
from mup_moe.training.optimizer import schedule
from mup_moe.training.request import TrainingRequest
from mup_moe.training.stack import Stack

# A block of steps is issued to the device at once. Divergence is checked between blocks; the step at which it is
# detected does not depend on the block length.
BLOCK_STEPS = 20

# The metric columns of old checkpoints, which do not name them.
_UNNAMED = ("train_loss", "balance_loss", "z_loss", "gradient_norm", "dropped_fraction", "max_expert_load")
_LOSS, _NORM = METRICS.index("train_loss"), METRICS.index("gradient_norm")


@dataclass(frozen=True)
class Outcome:
    """How one cell ended; the losses are mean cross-entropies in nats, None for a diverged cell."""

    status: str  # "finished" or "diverged"
    history_TM: np.ndarray  # a row of `METRICS` per step, up to the step that diverged
    train_loss: float | None  # of the last `final_loss_steps`
    valid_loss: float | None  # of the fixed validation batches


class Trainer:
    """Trains cells that differ only in parametrization, learning rate and seed.

    requests: one per replica; raises ValueError if they differ in anything else. train, valid: flat token files.
    vocabulary: their number of token ids. device: where the tensors are. step_mode, may_fall_back: how steps are issued
    (`Stack`).

    The same requests, tokens, device, step mode and thread count give the same bits, however often the run is
    interrupted; on a GPU, as far as torch's kernels are deterministic. Diverged replicas are removed from the stack and
    cost no more time. If steps are compiled, they are removed once they are more than half of the stack.
    """

    def __init__(
        self,
        requests: Sequence[TrainingRequest],
        train: np.ndarray,
        valid: np.ndarray,
        vocabulary: int,
        device: torch.device,
        step_mode: str = "eager",
        may_fall_back: bool = False,
    ) -> None:
        first = requests[0]
        self._shape = first.shape(vocabulary)
        for request in requests:
            same = (request.model, request.training, request.shape(vocabulary))
            if same != (first.model, first.training, self._shape):
                raise ValueError(
                    f"{request.cell.id} and {first.cell.id} cannot be trained in lockstep: their shapes differ"
                )
        self.requests = tuple(requests)
        self.settings = first.training
        self.device = device
        self.precision = precision_on(device, self.settings)
        self.size = model_size(self._shape, first.model)
        self.step = 0
        self.ended: dict[int, Outcome] = {}  # of replicas that are no longer in the stack, by their index
        self.step_mode = step_mode  # as requested, or the mode it fell back to
        self._may_fall_back = may_fall_back
        # A compiled step is recompiled for each number of replicas, so remove replicas only by more than half at once.
        self._least_share_to_shed = 0.0 if step_mode == "eager" else 0.5
        self._train = Batches(train, self.settings.batch_size, first.model.sequence)
        self._valid = Batches(valid, self.settings.batch_size, first.model.sequence)
        self._divergence_loss = math.log(vocabulary) + self.settings.divergence_margin
        self._divergence_steps = math.ceil(self.settings.divergence_span * self.settings.steps)
        self._history_TRM = torch.zeros(self.settings.steps, len(requests), len(METRICS))
        self._seeds = list(dict.fromkeys(request.cell.seed for request in requests))
        self._build_stack(range(len(requests)))

    def _build_stack(self, replicas: Sequence[int]) -> None:
        self._active = list(replicas)
        requests = [self.requests[replica] for replica in replicas]
        self._stack = Stack(
            requests,
            self._shape,
            self.device,
            precision=self.precision,
            step_mode=self.step_mode,
            seeds=self._seeds,
            block_steps=BLOCK_STEPS,
            may_fall_back=self._may_fall_back,
        )
        self._seen = self.step  # the history is complete before this step
        self._loaded: int | None = None  # the first step of the block in the stack

    @property
    def model(self) -> ReplicaModel:
        """The models of the replicas in the stack."""
        return self._stack.model

    @property
    def tokens_per_step(self) -> int:
        """The tokens that one replica sees per step."""
        return self.settings.batch_size * self.requests[0].model.sequence

    def run(self, until: int | None = None, after_step: Callable[["Trainer"], None] | None = None) -> None:
        """Trains up to step `until` (the last by default), or until every replica has diverged.

        `after_step` is called between steps, when `states` is consistent; an exception from it aborts the run. On a
        GPU, it is called when a step has been issued, up to a block before the step is done.
        """
        last = self.settings.steps if until is None else min(until, self.settings.steps)
        while self.step < last:
            first = self.step - self.step % BLOCK_STEPS
            if self._loaded != first:
                # Draw the block while the device still works on the previous one.
                block = self._draw_block(first)
                if self.step == first and not self._shed():
                    break
                self._stack.load_block(*block, self.step - first)
                self._loaded = first
            self._stack.advance()
            self.step_mode = self._stack.step_mode
            self.step += 1
            if after_step is not None:
                after_step(self)
        self._collect()

    def _draw_block(self, first: int) -> tuple[Tensor, Tensor]:
        steps = range(first, min(first + BLOCK_STEPS, self.settings.steps))
        # Include the seeds of removed replicas, since the stack may change before it gets the block.
        windows_K = [torch.stack([self._train.training(seed, step) for seed in self._seeds]) for step in steps]
        return torch.stack(windows_K), torch.tensor([schedule(step, self.settings) for step in steps])

    def _collect(self) -> None:
        """Fetches the metrics of the steps since the last call."""
        if self._loaded is not None and self._seen < self.step:
            block = slice(self._seen, self.step)
            metrics_TRM = self._stack.metrics(self._seen - self._loaded, self.step - self._loaded)
            self._history_TRM[block, self._active] = metrics_TRM
        self._seen = self.step

    def _shed(self) -> bool:
        """Removes diverged replicas from the stack; returns False if none is left."""
        self._collect()
        diverged = self._diverged_steps()
        left = [replica for replica in self._active if diverged[replica] is None]
        gone = len(self._active) - len(left)
        if left and gone > self._least_share_to_shed * len(self._active):
            states = [
                {name: tensor.clone() for name, tensor in self._stack.state(self._active.index(replica)).items()}
                for replica in left
            ]
            for replica in set(self._active) - set(left):
                self.ended[replica] = self._outcome(replica, diverged[replica], math.nan)
            # Free the old stack before building the new one, because it may fill the memory.
            del self._stack
            gc.collect()
            self._build_stack(left)
            self._stack.load_state(self.step, states)
        return bool(left)

    def training_batch(self, step: int) -> Tensor:
        """Returns the windows [R, B, S + 1] of a step, drawn with each replica's seed."""
        seeds = (self.requests[replica].cell.seed for replica in self._active)
        return torch.stack([self._train.training(seed, step) for seed in seeds]).to(self.device)

    def losses(self, windows_RBS: Tensor) -> dict[str, Tensor]:
        """Returns the losses of the stack's models on windows, in the training precision, each [R]."""
        return self._stack.losses(windows_RBS)

    def _diverged_steps(self) -> list[int | None]:
        """Returns, for each replica, the step at which it has diverged, or None.

        That is the first step with a loss or gradient norm that is not finite, or the last step of a span of
        consecutive steps whose loss is more than `divergence_margin` above that of a uniform prediction.
        """
        history_TRM = self._history_TRM[: self.step].numpy()
        loss_TR, norm_TR = history_TRM[:, :, _LOSS], history_TRM[:, :, _NORM]
        above_TR = loss_TR > self._divergence_loss
        count_TR = above_TR.cumsum(0)
        # Consecutive steps above the limit: the count so far minus the count at the last step that was not above it.
        consecutive_TR = count_TR - np.maximum.accumulate(count_TR * ~above_TR)
        bad_TR = ~np.isfinite(loss_TR) | ~np.isfinite(norm_TR) | (consecutive_TR >= self._divergence_steps)
        if not bad_TR.any():
            return [None] * len(self.requests)
        return [int(bad_T.argmax()) if bad_T.any() else None for bad_T in bad_TR.T]

    @torch.no_grad()
    def _validate(self, places: range) -> list[float]:
        """Returns the validation losses of the replicas at these positions in the stack."""
        count = self.settings.validation_batches
        total_R = torch.zeros(len(places), dtype=torch.float64, device=self.device)
        try:
            for index in range(count):
                windows_BS = self._valid.fixed(index, count).to(self.device)
                windows_RBS = windows_BS.expand(len(places), -1, -1)
                total_R += self._stack.losses(windows_RBS, places)["train_loss"].double()
            return (total_R / count).tolist()
        except torch.OutOfMemoryError:
            if len(places) == 1:
                raise
        # Validate in halves, so that trained cells are not lost because they do not fit together.
        half = len(places) // 2
        return self._validate(places[:half]) + self._validate(places[half:])

    def outcomes(self) -> list[Outcome]:
        """Returns how each cell ended. Call it only after `run` has finished."""
        diverged = self._diverged_steps()
        running = [replica for replica in self._active if diverged[replica] is None]
        assert not running or self.step == self.settings.steps, f"{self.step} of {self.settings.steps} steps"
        self._stack.release()
        losses = self._validate(range(len(self._active))) if running else [math.nan] * len(self._active)
        valid = dict(zip(self._active, losses, strict=True))
        return [
            self.ended.get(replica) or self._outcome(replica, diverged[replica], valid.get(replica, math.nan))
            for replica in range(len(self.requests))
        ]

    def _outcome(self, replica: int, diverged: int | None, valid_loss: float) -> Outcome:
        history_TM = self._history_TRM[: self.step, replica].numpy().copy()
        if diverged is not None:
            return Outcome("diverged", history_TM[: diverged + 1], None, None)
        final_T = history_TM[-self.settings.final_loss_steps :, _LOSS]
        train_loss = float(final_T.mean(dtype=np.float64))
        if train_loss > self._divergence_loss or not math.isfinite(valid_loss):
            return Outcome("diverged", history_TM, None, None)
        return Outcome("finished", history_TM, train_loss, valid_loss)

    def states(self) -> dict[int, dict[str, Tensor]]:
        """Returns everything that a step changes, as tensors by name, for each replica in the stack by its index."""
        self._collect()
        history_RMT = self._history_TRM[: self.step].permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
        names = [f"history/{name}" for name in METRICS]
        return {
            replica: self._stack.state(place) | dict(zip(names, history_RMT[replica], strict=True))
            for place, replica in enumerate(self._active)
        }

    def load_states(self, step: int, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Resumes bitwise from one state per request after `step` steps."""
        self._stack.load_state(step, states)
        for replica, state in enumerate(states):
            if "history" in state:
                columns = zip(_UNNAMED, state["history"].unbind(1), strict=True)
                state = {f"history/{name}": history_T for name, history_T in columns}
            for m, name in enumerate(METRICS):
                # A checkpoint lacks metrics that were added after it was written.
                self._history_TRM[:step, replica, m] = state.get(f"history/{name}", math.nan)
        self.step = self._seen = step
        self._loaded = None


def learning_rate(request: TrainingRequest, step: int) -> float:
    """Returns the global learning rate of a step (from 0)."""
    return request.cell.learning_rate * schedule(step, request.training)
