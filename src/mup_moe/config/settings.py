"""The settings that config.yaml holds, as frozen values that refuse to be wrong.

No field has a default here: defaults live in config.yaml. Types are checked where YAML enters
(`config.load`), ranges and relations here, so that they hold on every path.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from mup_moe.config.cell import AXES, NAME, Cell, grid
from mup_moe.config.learning_rate import LearningRate

DROPLESS = "dropless"
# Folders under results/ beside those of the figures.
RESERVED = {"benchmarks", "cells", "data", "logs", "recorded"}


class _Section:
    """Tells pydantic, where YAML enters, to convert nothing and to know every key."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True, "extra": "forbid"}


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _at_least(settings: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _require(minimum <= value < float("inf"), f"`{name}` is {value} but must be at least {minimum} and finite")


def _positive(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        # Written so that NaN fails too.
        _require(0 < value < float("inf"), f"`{name}` is {value} but must be positive and finite")


@dataclass(frozen=True, kw_only=True)
class CorpusSettings(_Section):
    """Where documents come from and how they become tokens."""

    source: Literal["python", "text", "c4"]
    tokenizer: Literal["bpe", "gpt2"]
    validation_fraction: float
    vocabulary: int | None = None
    tokenizer_files: tuple[str, str] | None = None
    files: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        _require(
            0 < self.validation_fraction < 1,
            f"`validation_fraction` is {self.validation_fraction} but must lie between 0 and 1",
        )
        if self.max_bytes is not None:
            _at_least(self, 1, "max_bytes")
        if self.tokenizer == "bpe":
            _require(self.vocabulary is not None, "`vocabulary` is needed by tokenizer bpe")
            _at_least(self, 257, "vocabulary")  # 256 bytes and the end of text
        else:
            _require(self.vocabulary is None, "`vocabulary` is fixed by tokenizer gpt2: remove it")
        _require(
            self.tokenizer == "gpt2" or self.tokenizer_files is None, "`tokenizer_files` belongs to tokenizer gpt2"
        )
        _require(self.source != "text" or bool(self.files), "`files` is needed by source text")
        _require(self.source != "python" or not self.files, "`files` has no meaning for source python")
        _require(
            self.source != "c4" or bool(self.files) or self.max_bytes is not None,
            "`max_bytes` is needed by source c4 without local shards in `files`: the whole corpus is 800 GB",
        )
        _require(self.source == "python" or not self.packages, "`packages` has a meaning for source python only")


@dataclass(frozen=True, kw_only=True)
class ModelSettings(_Section):
    """The model of a set-up, but for what its cells vary (paper, section 4 of our notes)."""

    base_width: int
    base_experts: int
    blocks: int
    heads: int | None
    head_size: int | None
    sequence: int
    ffn_ratio: int
    top_k: int
    capacity_factor: float | Literal["dropless"]
    activation: Literal["relu", "gelu", "silu"]
    renormalize_gates: bool
    final_norm: bool
    balance_loss: float
    z_loss: float
    init: Literal["fan_in", "constant"]
    init_scale: float
    embedding_multiplier: float
    logit_multiplier: float
    scale_residual_init: bool
    expert_fan_in: Literal["own", "width"]

    def __post_init__(self) -> None:
        _at_least(self, 1, "base_width", "base_experts", "blocks", "sequence", "ffn_ratio", "top_k")
        _require(
            (self.heads is None) != (self.head_size is None),
            "give either `heads` or `head_size`, and null for the other",
        )
        _at_least(self, 1, "heads" if self.heads is not None else "head_size")
        if self.capacity_factor != DROPLESS:
            _positive(self, "capacity_factor")
        _at_least(self, 0, "balance_loss", "z_loss")
        _positive(self, "init_scale", "embedding_multiplier", "logit_multiplier")

    def check(self, cell: Cell) -> None:
        """Raises ValueError, with a sentence, for a cell that this model cannot be built for."""
        for width in {cell.width, self.base_width}:
            divisor = self.heads or self.head_size or 1
            name = "heads" if self.heads else "head_size"
            _require(width % divisor == 0, f"`width` {width} is not divisible by `{name}` {divisor}")
        size = self.ffn_ratio * cell.width
        _require(
            size % cell.granularity == 0,
            f"`granularity` {cell.granularity} does not divide the expert size {size} at width {cell.width}",
        )
        if cell.architecture == "moe":
            _require(self.top_k <= cell.experts, f"`top_k` {self.top_k} is more than `experts` {cell.experts}")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(_Section):
    """How each cell of a set-up is trained."""

    steps: int
    batch_size: int
    warmup_steps: int
    final_lr_fraction: float
    adam_betas: tuple[float, float]
    adam_eps: float
    weight_decay: float
    clip_norm: float | None
    final_loss_steps: int
    validation_batches: int
    divergence_margin: float
    divergence_span: float
    precision: Literal["auto", "float32", "bfloat16"]

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "batch_size", "final_loss_steps", "validation_batches")
        _at_least(self, 0, "warmup_steps", "weight_decay", "final_lr_fraction")
        _require(
            self.warmup_steps <= self.steps, f"`warmup_steps` {self.warmup_steps} is more than `steps` {self.steps}"
        )
        _require(
            self.final_loss_steps <= self.steps,
            f"`final_loss_steps` {self.final_loss_steps} is more than `steps` {self.steps}",
        )
        _require(self.final_lr_fraction <= 1, f"`final_lr_fraction` is {self.final_lr_fraction} but must be at most 1")
        for beta in self.adam_betas:
            _require(0 <= beta < 1, f"`adam_betas` has {beta}, which must lie in [0, 1)")
        _positive(self, "adam_eps", "divergence_margin", "divergence_span")
        if self.clip_norm is not None:
            _positive(self, "clip_norm")


@dataclass(frozen=True, kw_only=True)
class SetupSettings(_Section):
    """What all cells of a sweep share."""

    corpus: str
    model: ModelSettings
    training: TrainingSettings


@dataclass(frozen=True, kw_only=True)
class AxesSettings(_Section):
    """The values of each axis of `Cell`; a figure's cells are their product."""

    architecture: tuple[Literal["moe", "dense"], ...]
    parametrization: tuple[str, ...]
    width: tuple[int, ...]
    experts: tuple[int, ...]
    granularity: tuple[int, ...]
    learning_rate: tuple[LearningRate, ...]
    seed: tuple[int, ...]

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            _require(len(values) > 0, f"`{field.name}` is empty: list at least one value")
            repeated = [value for value in values if values.count(value) > 1]
            _require(not repeated, f"`{field.name}` lists {repeated[0] if repeated else ''} more than once")


CurveAxis = Literal["width", "experts", "granularity"]
PanelAxis = Literal["parametrization", "architecture", "width", "experts", "granularity"]


@dataclass(frozen=True, kw_only=True)
class FigureSettings(_Section):
    """A figure of loss against learning rate: panels, curves in a panel, and its cells' axes."""

    setup: str
    panel: PanelAxis
    curve: CurveAxis
    axes: AxesSettings

    def __post_init__(self) -> None:
        _require(self.panel != self.curve, f"`panel` and `curve` are both {self.curve}")
        for axis in AXES:
            values = getattr(self.axes, axis)
            free = axis in (self.panel, self.curve, "learning_rate", "seed")
            _require(free or len(values) == 1, f"`{axis}` has {len(values)} values but is neither panel nor curve")

    def cells(self) -> list[Cell]:
        """All cells of the figure, panels outermost, in the order of the config."""
        return list(grid(self.setup, {axis: getattr(self.axes, axis) for axis in AXES}))


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings(_Section):
    """How a curve's optimum and its uncertainty are estimated."""

    loss: Literal["train_loss", "valid_loss"]
    fit_points: int
    confidence: float
    resamples: int

    def __post_init__(self) -> None:
        _at_least(self, 3, "fit_points")
        _at_least(self, 100, "resamples")
        _require(0 < self.confidence < 1, f"`confidence` is {self.confidence} but must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class ExecutionSettings(_Section):
    """How cells are run; nothing here may change a result beyond rounding."""

    device: Literal["auto", "cpu", "cuda"]
    threads: int
    checkpoint_seconds: float

    def __post_init__(self) -> None:
        _at_least(self, 1, "threads")
        _positive(self, "checkpoint_seconds")


@dataclass(frozen=True, kw_only=True)
class Config(_Section):
    """The whole of config.yaml."""

    parametrizations: dict[str, dict[str, Any]]
    corpora: dict[str, CorpusSettings]
    setups: dict[str, SetupSettings]
    figures: dict[str, FigureSettings]
    analysis: AnalysisSettings
    execution: ExecutionSettings

    def __post_init__(self) -> None:
        for section in ("parametrizations", "corpora", "setups", "figures"):
            for name in getattr(self, section):
                _require(
                    bool(NAME.fullmatch(name)),
                    f"`{section}.{name}`: a name is lower-case letters and digits, words joined by '-'",
                )
        _require(bool(self.figures), "`figures` is empty: name at least one")
        for name in RESERVED & set(self.figures):
            raise ValueError(f"`figures.{name}`: results/{name} is a folder of the workflow's own; choose another name")
        for name, setup in self.setups.items():
            _require(
                setup.corpus in self.corpora,
                f"`setups.{name}.corpus` is {setup.corpus!r}, which `corpora` does not list",
            )
        for name, figure in self.figures.items():
            self._check_figure(name, figure)

    def _check_figure(self, name: str, figure: FigureSettings) -> None:
        key = f"figures.{name}"
        _require(figure.setup in self.setups, f"`{key}.setup` is {figure.setup!r}, which `setups` does not list")
        for parametrization in figure.axes.parametrization:
            _require(
                parametrization in self.parametrizations,
                f"`{key}.axes.parametrization` names {parametrization!r}, which `parametrizations` does not list",
            )
        model = self.setups[figure.setup].model
        if figure.curve == "width":
            _require(
                model.base_width in figure.axes.width,
                f"`{key}.axes.width` lacks the base width {model.base_width}, from which transfer is measured",
            )
        try:
            for cell in figure.cells():
                model.check(cell)
        except ValueError as error:
            raise ValueError(f"`{key}.axes`: {error}") from None
