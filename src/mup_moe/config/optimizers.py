"""The optimizers that `training.optimizer` may name; needs no torch."""

from dataclasses import dataclass

_ENTRY_BYTES = 4  # parameters and optimizer state are float32


@dataclass(frozen=True)
class OptimizerEntry:
    """What is known of an optimizer without torch."""

    state: tuple[str, ...]  # names of the tensors that it keeps per parameter, each as large as the parameter
    made_by: str  # "module:name" of its factory, called like `ReplicaOptimizer`

    @property
    def bytes_per_parameter(self) -> int:
        """The bytes per parameter entry and its state in a checkpoint."""
        return _ENTRY_BYTES * (1 + len(self.state))


OPTIMIZERS = {
    "adamw": OptimizerEntry(state=("exp_avg", "exp_avg_sq"), made_by="mup_moe.training.adamw:adamw_for"),
}
