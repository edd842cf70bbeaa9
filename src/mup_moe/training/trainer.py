"""The training loop: R cells of one shape, step by step, resumable at any step.

Axes: R replicas, B sequences, S positions, T steps, M metrics.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mup_moe.config.settings import TrainingSettings
from mup_moe.model.scaling import initialize
from mup_moe.model.shape import ModelShape
from mup_moe.model.transformer import Losses, Transformer, model_size
from mup_moe.model.weight import weights_of
from mup_moe.training.batches import Batches
from mup_moe.training.optimizer import ReplicaAdamW, schedule
from mup_moe.training.request import TrainingRequest

METRICS = ("train_loss", "balance_loss", "z_loss", "gradient_norm", "dropped_fraction", "max_expert_load")

# Divergence is looked for this often; which step it is found at does not depend on it.
_POLL_STEPS = 20


@dataclass(frozen=True)
class Outcome:
    """How one cell ended.

    status: "finished" or "diverged". history_TM: a row of `METRICS` per step, up to the step that
    diverged. train_loss: mean cross-entropy (nats) of the last `final_loss_steps`; valid_loss: of
    the fixed validation batches; both None for a diverged cell.
    """

    status: str
    history_TM: np.ndarray
    train_loss: float | None
    valid_loss: float | None


class Trainer:
    """Trains cells that differ in parametrization, learning rate and seed only.

    Args:
        requests: one per replica; ValueError where they disagree on anything else.
        train, valid: flat token files. vocabulary: their number of ids.
        device: where tensors live. The same request, tokens, device and thread count give the same
            bits, however often the run is interrupted.

    """

    def __init__(
        self,
        requests: Sequence[TrainingRequest],
        train: np.ndarray,
        valid: np.ndarray,
        vocabulary: int,
        device: torch.device,
    ) -> None:
        first = requests[0]
        shape = ModelShape.of(first.cell, first.model, vocabulary)
        for request in requests:
            same = (request.model, request.training, ModelShape.of(request.cell, request.model, vocabulary))
            if same != (first.model, first.training, shape):
                raise ValueError(
                    f"{request.cell.id} and {first.cell.id} cannot be trained in lockstep: their shapes differ"
                )
        self.requests = tuple(requests)
        self.settings = first.training
        self.device = device
        self.size = model_size(shape, first.model)
        self.step = 0
        self._train = Batches(train, self.settings.batch_size, first.model.sequence)
        self._valid = Batches(valid, self.settings.batch_size, first.model.sequence)
        self._divergence_loss = math.log(vocabulary) + self.settings.divergence_margin
        self._divergence_steps = math.ceil(self.settings.divergence_span * self.settings.steps)

        self.model = Transformer(shape, first.model, len(requests)).to(device)
        base = ModelShape.base_of(first.cell, first.model, vocabulary)
        factors = initialize(self.model, base, [(r.parametrization, r.cell.seed) for r in requests])
        rates = [request.cell.learning_rate for request in requests]
        self._optimizer = ReplicaAdamW(self.model, factors, rates, self.settings)
        self._history_TRM = torch.zeros(self.settings.steps, len(requests), len(METRICS), device=device)
        self.precision = precision_on(device, self.settings)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one replica sees in a step."""
        return self.settings.batch_size * self.requests[0].model.sequence

    def run(self, until: int | None = None, after_step: Callable[["Trainer"], None] | None = None) -> None:
        """Trains up to step `until` (the last by default), or until every replica has diverged.

        `after_step` is called between steps, when `state` is whole; what it raises ends the run.
        """
        last = self.settings.steps if until is None else min(until, self.settings.steps)
        while self.step < last:
            if self.step % _POLL_STEPS == 0 and all(s is not None for s in self._diverged_steps()):
                break
            self._train_step()
            self.step += 1
            if after_step is not None:
                after_step(self)

    def _train_step(self) -> None:
        losses = self.losses(*self.training_batch(self.step))
        self.model.objective(losses).backward()
        norms_R = self._optimizer.step(self.step)
        metrics_MR = torch.stack(
            [
                losses.cross_entropy_R,
                losses.balance_R,
                losses.z_R,
                norms_R,
                losses.dropped_R,
                losses.max_load_R,
            ]
        )
        self._history_TRM[self.step] = metrics_MR.detach().T

    def training_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets [R, B, S] of a step, each replica's by its own seed."""
        return self._batch([self._train.training(request.cell.seed, step) for request in self.requests])

    def losses(self, inputs_RBS: Tensor, targets_RBS: Tensor) -> Losses:
        """The model's losses on a batch, in the precision of the training."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.model.losses(inputs_RBS, targets_RBS)

    def _batch(self, per_replica: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        inputs, targets = zip(*per_replica, strict=True)
        return torch.stack(inputs).to(self.device), torch.stack(targets).to(self.device)

    def _diverged_steps(self) -> list[int | None]:
        """For each replica, the step at which it had diverged, if it has.

        That is the first with a loss or gradient that is not finite, or the last of a span of steps
        on end whose loss is `divergence_margin` above a uniform prediction's.
        """
        history_TRM = self._history_TRM[: self.step]
        loss_TR = history_TRM[:, :, METRICS.index("train_loss")]
        norm_TR = history_TRM[:, :, METRICS.index("gradient_norm")]
        above_TR = loss_TR > self._divergence_loss
        count_TR = above_TR.cumsum(0)
        # Steps on end: those so far, less those before the last one that was not above.
        on_end_TR = count_TR - (count_TR * ~above_TR).cummax(0).values if self.step else count_TR
        bad_TR = ~loss_TR.isfinite() | ~norm_TR.isfinite() | (on_end_TR >= self._divergence_steps)
        columns = bad_TR.T.tolist()
        return [column.index(True) if True in column else None for column in columns]

    @torch.no_grad()
    def _validate(self) -> list[float]:
        count = self.settings.validation_batches
        total_R = torch.zeros(len(self.requests), dtype=torch.float64, device=self.device)
        for index in range(count):
            batch = self._valid.fixed(index, count)
            losses = self.losses(*self._batch([batch] * len(self.requests)))
            total_R += losses.cross_entropy_R.double()
        return [total / count for total in total_R.tolist()]

    def outcomes(self) -> list[Outcome]:
        """How each cell ended. To be called once `run` has come to its end."""
        diverged = self._diverged_steps()
        unfinished = self.step < self.settings.steps and any(step is None for step in diverged)
        assert not unfinished, f"{self.step} of {self.settings.steps} steps are trained"
        valid = self._validate() if None in diverged else [math.nan] * len(self.requests)
        history_RTM = self._history_TRM[: self.step].cpu().numpy().transpose(1, 0, 2)
        return [self._outcome(*replica) for replica in zip(history_RTM, diverged, valid, strict=True)]

    def _outcome(self, history_TM: np.ndarray, diverged: int | None, valid_loss: float) -> Outcome:
        if diverged is not None:
            return Outcome("diverged", history_TM[: diverged + 1], None, None)
        final_T = history_TM[-self.settings.final_loss_steps :, METRICS.index("train_loss")]
        train_loss = float(final_T.mean(dtype=np.float64))
        if train_loss > self._divergence_loss or not math.isfinite(valid_loss):
            return Outcome("diverged", history_TM, None, None)
        return Outcome("finished", history_TM, train_loss, valid_loss)

    def state(self) -> dict[str, Tensor]:
        """Everything that `load_state` needs beside the step: parameters, moments, history."""
        parameters = {f"parameter/{name}": weight.value.detach() for name, weight in weights_of(self.model).items()}
        return parameters | self._optimizer.state() | {"history": self._history_TRM[: self.step]}

    def load_state(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Continues from `state` as it was after `step` steps, to the bit."""
        with torch.no_grad():
            for name, weight in weights_of(self.model).items():
                weight.value.copy_(state[f"parameter/{name}"])
        if step > 0:
            self._optimizer.load_state(state, step)
        self._history_TRM[:step] = state["history"].to(self.device)
        self.step = step


def precision_on(device: torch.device, settings: TrainingSettings) -> str:
    """What `precision` comes to on a device: float32 or bfloat16."""
    if settings.precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return settings.precision


def learning_rate(request: TrainingRequest, step: int) -> float:
    """The global learning rate of a step (from 0)."""
    return request.cell.learning_rate * schedule(step, request.training)
