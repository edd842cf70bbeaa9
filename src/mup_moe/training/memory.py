"""How many cells a process trains at once, and about how much memory it takes; needs no torch."""

from collections.abc import Iterable

from mup_moe.config.optimizers import OPTIMIZERS
from mup_moe.config.settings import ModelSettings
from mup_moe.files import UserError
from mup_moe.model.inventory import ModelShape, model_size
from mup_moe.training.request import TrainingRequest

# A CPU gains by sharing each operator's overhead, up to about so many replicas, and loses once a stack
# has more parameters than its caches take (docs/decisions.md).
_CPU_REPLICAS, _CPU_PARAMETERS = 6, 16_000_000
# Of a process with torch, with the pages that malloc keeps, or with CUDA; and of the Snakemake around it.
_CPU_PROCESS_MB, _GPU_PROCESS_MB = 1300, 6000
# A parameter's gradient and temporaries; what a checkpoint takes while it is written, in its own size.
_STEP_BYTES, _SAVING = 12, 3
# Of an activation, forward and backward; a token has some dozens of them per unit of width.
_ACTIVATION_BYTES, _ACTIVATIONS_PER_WIDTH = 8, 40
_SLACK = 1.25


def replicas_on(device_type: str, wanted: str, parameters: int) -> int | None:
    """What `replicas` comes to on a device: how many cells at most are trained at once, None for all.

    parameters: of one cell. Raises UserError for what is no number.
    """
    if wanted == "auto":
        most = max(1, min(_CPU_REPLICAS, _CPU_PARAMETERS // parameters))
        return None if device_type == "cuda" else most
    if not wanted.isascii() or not wanted.isdigit() or int(wanted) == 0:
        raise UserError(f"--replicas is {wanted!r}: give a number from 1, or auto")
    return int(wanted)


def replicas_of(shape: ModelShape, model: ModelSettings, device_type: str, wanted: str) -> int | None:
    """As `replicas_on`, for models of a shape."""
    if shape.hub is not None:
        return 1  # a model of transformers has no axis for more
    return replicas_on(device_type, wanted, model_size(shape, model).parameters)


def by_shape(requests: Iterable[TrainingRequest], vocabulary: int) -> dict[ModelShape, list[TrainingRequest]]:
    """Cells that can be trained at once, for their models are of one shape."""
    shapes: dict[ModelShape, list[TrainingRequest]] = {}
    # Seeds apart, so that one that is added later makes a stack of its own.
    for request in sorted(requests, key=lambda request: request.cell.seed):
        shapes.setdefault(request.shape(vocabulary), []).append(request)
    return shapes


def memory_mb(
    requests: Iterable[TrainingRequest], vocabulary: int, device_type: str, wanted: str, checkpoints: bool = True
) -> int:
    """The main memory, in MB, that a job of these cells asks for: a generous estimate, not a bound.

    device_type: "cuda" where the models are in a GPU's own memory; "auto": whichever takes more. checkpoints: whether
    it saves what it trains.
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
    """About what so many replicas of a cell hold while they train: parameters, the optimizer's state, activations."""
    training, model = request.training, request.model
    tokens = training.batch_size * model.sequence
    per_token = 2 * shape.vocabulary + model.blocks * (
        _ACTIVATIONS_PER_WIDTH * shape.width + shape.heads * model.sequence
    )
    per_parameter = OPTIMIZERS[training.optimizer].bytes_per_parameter + _STEP_BYTES
    return replicas * (per_parameter * model_size(shape, model).parameters + _ACTIVATION_BYTES * tokens * per_token)
