"""The optimizers that `training.optimizer` may name; needs no torch."""

from dataclasses import dataclass

_ENTRY_BYTES = 4  # parameters and what is kept beside them are float32


@dataclass(frozen=True)
class OptimizerEntry:
    """What is known of an optimizer where there is no torch."""

    state: tuple[str, ...]  # names of the tensors that it keeps beside each parameter, each as large as that
    made_by: str  # "module:name" of what makes it, called as `ReplicaOptimizer` is

    @property
    def bytes_per_parameter(self) -> int:
        """Of a parameter and its state, as a checkpoint holds them."""
        return _ENTRY_BYTES * (1 + len(self.state))


OPTIMIZERS = {
    "adamw": OptimizerEntry(state=("exp_avg", "exp_avg_sq"), made_by="mup_moe.training.adamw:adamw_for"),
}
