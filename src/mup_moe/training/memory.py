"""Determines how many cells a process trains at once and estimates its memory. Needs no torch."""

from collections.abc import Iterable

from mup_moe.config.optimizers import OPTIMIZERS
from mup_moe.config.settings import ModelSettings
from mup_moe.files import UserError
from mup_moe.model.inventory import ModelShape, model_size
from mup_moe.training.request import TrainingRequest

# On a CPU, sharing each operator's overhead saves time up to about this many replicas, and a stack costs time once it
# has more parameters than fit in the caches (docs/decisions.md).
_CPU_REPLICAS, _CPU_PARAMETERS = 6, 16_000_000
# Baseline memory of one process (torch and retained malloc pages, or the CUDA context) plus its Snakemake wrapper.
_CPU_PROCESS_MB, _GPU_PROCESS_MB = 1300, 6000
# Bytes per parameter for its gradient and temporaries; memory for writing a checkpoint, in multiples of its size.
_STEP_BYTES, _SAVING = 12, 3
# Bytes per activation, forward and backward; each token has some dozens of activations per unit of width.
_ACTIVATION_BYTES, _ACTIVATIONS_PER_WIDTH = 8, 40
_SLACK = 1.25


def replicas_on(device_type: str, wanted: str, parameters: int) -> int | None:
    """Resolves `replicas` on a device to the most cells that are trained at once; None: all.

    parameters: of one cell. Raises UserError if `wanted` is neither "auto" nor a positive number.
    """
    if wanted == "auto":
        most = max(1, min(_CPU_REPLICAS, _CPU_PARAMETERS // parameters))
        return None if device_type == "cuda" else most
    if not wanted.isascii() or not wanted.isdigit() or int(wanted) == 0:
        raise UserError(f"--replicas is {wanted!r}: give a positive integer, or auto")
    return int(wanted)


def replicas_of(shape: ModelShape, model: ModelSettings, device_type: str, wanted: str) -> int | None:
    """Does the same as `replicas_on`, for models of a shape."""
    if shape.hub is not None:
        return 1  # models of transformers have no replica axis
    return replicas_on(device_type, wanted, model_size(shape, model).parameters)


def by_shape(requests: Iterable[TrainingRequest], vocabulary: int) -> dict[ModelShape, list[TrainingRequest]]:
    """Groups cells by the shape of their models; cells of one shape can be trained at once."""
    shapes: dict[ModelShape, list[TrainingRequest]] = {}
    # Sort by seed, so that a seed that is added later forms its own stack.
    for request in sorted(requests, key=lambda request: request.cell.seed):
        shapes.setdefault(request.shape(vocabulary), []).append(request)
    return shapes


def memory_mb(
    requests: Iterable[TrainingRequest], vocabulary: int, device_type: str, wanted: str, checkpoints: bool = True
) -> int:
    """Returns the main memory, in MB, that a job of these cells requests: a generous estimate, not a bound.

    device_type: "cuda" if the models are in a GPU's own memory; "auto": the device that needs more. checkpoints:
    whether the job writes checkpoints.
    """
    shapes = by_shape(requests, vocabulary)
    devices = ("cpu", "cuda") if device_type == "auto" else (device_type,)
    saving = _SAVING if checkpoints else 0
    return max(_stack_mb(shape, alike, device, wanted, saving) for shape, alike in shapes.items() for device in devices)


def _stack_mb(shape: ModelShape, cells: list[TrainingRequest], device_type: str, wanted: str, saving: int) -> int:
    model = cells[0].model
    parameters = model_size(shape, model).parameters
    saved = saving * OPTIMIZERS[cells[0].training.optimizer].bytes_per_parameter * parameters
    if device_type == "cuda":
        return _GPU_PROCESS_MB + round(_SLACK * saved / 1e6)
    replicas = min(len(cells), replicas_of(shape, model, device_type, wanted) or len(cells))
    return _CPU_PROCESS_MB + round(_SLACK * (stack_bytes(shape, cells[0], replicas) + saved) / 1e6)


def stack_bytes(shape: ModelShape, request: TrainingRequest, replicas: int) -> int:
    """Estimates the bytes of a number of replicas in training: parameters, optimizer state and activations."""
    training, model = request.training, request.model
    tokens = training.batch_size * model.sequence
    per_token = 2 * shape.vocabulary + model.blocks * (
        _ACTIVATIONS_PER_WIDTH * shape.width + shape.heads * model.sequence
    )
    per_parameter = OPTIMIZERS[training.optimizer].bytes_per_parameter + _STEP_BYTES
    return replicas * (per_parameter * model_size(shape, model).parameters + _ACTIVATION_BYTES * tokens * per_token)
