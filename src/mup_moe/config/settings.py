"""The settings that config.yaml holds, as frozen values that refuse to be wrong.

No field has a default here: defaults live in config.yaml. A `neutral` value is not a default, but what
a request means that is older than the setting. Types are checked where YAML enters (`config.load`),
ranges and relations here, so that they hold on every path.
"""

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

from mup_moe.config.cell import AXES, NAME, Cell, check_range, grid
from mup_moe.config.learning_rate import LearningRate

DROPLESS = "dropless"
# What results/ holds beside the figures' and probes' own files.
RESERVED = {"benchmarks", "cells", "claims", "data", "logs", "optima", "paper", "plan", "recorded", "report", "runs"}
RESERVED |= {"table1", "table2"}
RESULT_NAME = re.compile(r"[a-z0-9]+([-_][a-z0-9]+)*")


class _Section:
    """Tells pydantic, where YAML enters, to convert nothing and to know every key."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True, "extra": "forbid"}


def neutral(value: Any) -> Any:
    """A field whose setting is newer than some results.

    At this value everything is as before the setting existed: it is left out of a request's identity, so that
    the results from before stay.
    """
    return field(default=value, metadata={"neutral": value})


def without_neutral(settings: Any) -> dict[str, Any]:
    """Settings as plain data, by name, without those at their neutral value; equal for equal settings."""
    ours = {of_field.name: of_field.metadata for of_field in fields(settings)}
    return {
        name: value
        for name, value in asdict(settings).items()
        if "neutral" not in ours[name] or ours[name]["neutral"] != value
    }


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


# Far beyond any sweep, so that nothing computed from a setting overflows.
_MOST_CELLS = 100_000
_MOST_ENTRIES = 2**50  # of a tensor
_LONGEST_NAME = 100  # of what is a file's name too
_SMALLEST, _LARGEST = 1e-37, 1e37  # float32 holds them


def _at_least(settings: Any, minimum: float, *names: str, most: int = 2**53) -> None:
    for name in names:
        value = getattr(settings, name)
        # Written so that NaN fails too.
        _require(minimum <= value <= most, f"`{name}` is {value} but must be at least {minimum} and at most {most}")


def _positive(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _require(
            _SMALLEST <= value <= _LARGEST,
            f"`{name}` is {value} but must be positive: {_SMALLEST} to {_LARGEST}",
        )


def _check_name(key: str, name: str, pattern: re.Pattern[str], words: str) -> None:
    _require(
        bool(pattern.fullmatch(name)) and len(name) <= _LONGEST_NAME,
        f"`{key}.{name}`: a name is lower-case letters and digits, words joined by {words},"
        f" at most {_LONGEST_NAME} characters",
    )


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
            _at_least(self, 257, "vocabulary", most=2**24)  # 256 bytes and the end of text
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
        _at_least(self, 1, "base_width", "base_experts", "top_k", most=2**20)
        _at_least(self, 1, "sequence", most=2**24)
        _at_least(self, 1, "blocks", "ffn_ratio", most=2**12)
        _require(
            (self.heads is None) != (self.head_size is None),
            "give either `heads` or `head_size`, and null for the other",
        )
        _at_least(self, 1, "heads" if self.heads is not None else "head_size", most=2**20)
        if self.capacity_factor != DROPLESS:
            _positive(self, "capacity_factor")
        _at_least(self, 0, "balance_loss", "z_loss")
        _positive(self, "init_scale", "embedding_multiplier", "logit_multiplier")

    def check(self, cell: Cell) -> None:
        """Raises ValueError, with a sentence, for a cell that this model cannot be built for."""
        widths = {"width": cell.width, "base_width": self.base_width}
        for key, width in widths.items():
            divisor = self.heads or self.head_size or 1
            name = "heads" if self.heads else "head_size"
            _require(width % divisor == 0, f"`{key}` {width} is not divisible by `{name}` {divisor}")
        size = self.ffn_ratio * cell.width
        _require(
            size % cell.granularity == 0,
            f"`granularity` {cell.granularity} does not divide the expert size {size} at width {cell.width} and"
            f" `ffn_ratio` {self.ffn_ratio}",
        )
        if cell.architecture == "moe":
            _require(self.top_k <= cell.experts, f"`top_k` {self.top_k} is more than `experts` {cell.experts}")
            _require(
                self.top_k <= self.base_experts, f"`top_k` {self.top_k} is more than `base_experts` {self.base_experts}"
            )
        # A dense layer is as large as top_k.
        counts = {"experts": cell.experts, "base_experts": self.base_experts, "top_k": self.top_k}
        (wide, width), (many, experts) = (max(of.items(), key=lambda item: item[1]) for of in (widths, counts))
        _require(
            experts * self.ffn_ratio * width**2 <= _MOST_ENTRIES,
            f"`{wide}` {width}, `{many}` {experts} and `ffn_ratio` {self.ffn_ratio} make a tensor of more than"
            f" {_MOST_ENTRIES} entries",
        )


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
        _at_least(self, 1, "steps", "final_loss_steps", most=2**31)
        _at_least(self, 1, "batch_size", "validation_batches", most=2**20)
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
        for axis in AXES:
            values = getattr(self, axis)
            _require(len(values) > 0, f"`{axis}` is empty: list at least one value")
            for value in values:
                check_range(axis, value)
            often, times = Counter(values).most_common(1)[0]
            _require(times == 1, f"`{axis}` lists {often} more than once")

    @property
    def size(self) -> int:
        """The number of their combinations."""
        return math.prod(len(getattr(self, axis)) for axis in AXES)


CurveAxis = Literal["width", "experts", "granularity"]
PanelAxis = Literal["parametrization", "architecture", "width", "experts", "granularity"]


@dataclass(frozen=True, kw_only=True)
class FigureSettings(_Section):
    """A figure of loss against learning rate: panels, curves in a panel, and its cells' axes."""

    setup: str
    panel: PanelAxis
    curve: CurveAxis
    axes: AxesSettings
    reference: str | None = None  # a CSV of published losses to lay over the curves

    def __post_init__(self) -> None:
        _require(self.panel != self.curve, f"`panel` and `curve` are both {self.curve}")
        for axis in AXES:
            values = getattr(self.axes, axis)
            free = axis in (self.panel, self.curve, "learning_rate", "seed")
            _require(free or len(values) == 1, f"`{axis}` has {len(values)} values but is neither panel nor curve")

    def cells(self) -> list[Cell]:
        """All cells of the figure, panels outermost, in the order of the config."""
        return list(grid(self.setup, {axis: getattr(self.axes, axis) for axis in AXES}))


Measure = Literal["activations", "covariance"]


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(_Section):
    """What is measured inside of models over their first steps, against width.

    `activations` is the coordinate check (Tensor Programs V), `covariance` that of Lemma B.1.
    """

    setup: str
    measure: Measure
    steps: tuple[int, ...]  # measured after so many training steps
    axes: AxesSettings

    def __post_init__(self) -> None:
        _require(
            len(self.steps) > 0 and self.steps == tuple(sorted(set(self.steps))) and self.steps[0] >= 0,
            f"`steps` {list(self.steps)} must ascend from 0 or later",
        )
        _require(len(self.axes.width) >= 2, "`axes.width` needs two widths or more: a slope is measured over them")
        for axis in ("architecture", "experts", "granularity", "learning_rate"):
            _require(len(getattr(self.axes, axis)) == 1, f"`axes.{axis}` of a probe has one value")
        _require(
            self.measure != "covariance" or self.steps[0] == 0,
            "`steps` of measure covariance must begin with 0: changes are measured from there",
        )
        _require(
            self.measure != "covariance" or self.axes.architecture == ("moe",),
            "`measure` covariance is that of experts: set `axes.architecture` to [moe]",
        )

    def cells(self) -> list[Cell]:
        """The models that are measured, in the order of the config."""
        return list(grid(self.setup, {axis: getattr(self.axes, axis) for axis in AXES}))


@dataclass(frozen=True, kw_only=True)
class DriftTest(_Section):
    """What a claim says of the drift of the best learning rate in one panel of a figure."""

    figure: str
    panel: str
    expect: Literal["keeps", "moves", "falls"]


@dataclass(frozen=True, kw_only=True)
class SlopeTest(_Section):
    """What a claim says of a quantity's slope (log2 on log2 of width) at one step of a probe."""

    probe: str
    parametrization: str
    quantity: str
    step: int
    slope: float

    def __post_init__(self) -> None:
        _require(abs(self.slope) <= _LARGEST, f"`slope` is {self.slope} but must be finite")


@dataclass(frozen=True, kw_only=True)
class ClaimSettings(_Section):
    """A claim of the paper in our words, and the tests whose verdicts make its own."""

    says: str
    decided_by: str  # what would decide it, where a sweep does not
    drifts: tuple[DriftTest, ...] = ()
    slopes: tuple[SlopeTest, ...] = ()

    def __post_init__(self) -> None:
        _require(bool(self.drifts or self.slopes), "a claim without `drifts` or `slopes` tests nothing")


@dataclass(frozen=True, kw_only=True)
class ClaimsSettings(_Section):
    """The criteria of all claims, fixed before the runs."""

    drift_margin: float  # octaves of learning rate per octave of the axis
    slope_margin: float
    refuting_tokens: int  # a cell's, from which on a sweep can speak against a claim
    refuting_octaves: float  # of the axis, likewise
    table: dict[str, ClaimSettings]

    def __post_init__(self) -> None:
        _positive(self, "drift_margin", "slope_margin")
        _at_least(self, 0, "refuting_tokens", "refuting_octaves")


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings(_Section):
    """Which cells are compared, and how a curve's optimum and its uncertainty are estimated."""

    loss: Literal["train_loss", "valid_loss"]
    fit_points: int
    confidence: float
    resamples: int
    foreign_cells: Literal["stop", "leave_out"]

    def __post_init__(self) -> None:
        _at_least(self, 3, "fit_points")
        _at_least(self, 100, "resamples", most=10**6)
        _require(0 < self.confidence < 1, f"`confidence` is {self.confidence} but must lie between 0 and 1")


# Each cell of a job is a lock, and most systems let a process have 1,024 files open.
MOST_CELLS_PER_JOB = 500
# How the steps of training are issued to the device.
STEPS = ("eager", "compiled", "graph")


@dataclass(frozen=True, kw_only=True)
class ExecutionSettings(_Section):
    """How cells are run; nothing here may change a result beyond rounding."""

    device: Literal["auto", "cpu", "cuda"]
    threads: int
    lockstep: tuple[Literal["learning_rate", "seed", "parametrization"], ...]
    replicas: int | Literal["auto"]
    cells_per_job: int
    step: Literal["auto", "eager", "compiled", "graph"]
    checkpoint_seconds: float
    hang_seconds: float

    def __post_init__(self) -> None:
        _at_least(self, 1, "threads", most=2**12)
        _require(self.replicas == "auto" or self.replicas >= 1, f"`replicas` is {self.replicas} but must be at least 1")
        _require(len(set(self.lockstep)) == len(self.lockstep), "`lockstep` lists an axis more than once")
        _require(
            1 <= self.cells_per_job <= MOST_CELLS_PER_JOB,
            f"`cells_per_job` is {self.cells_per_job} but must be from 1 to {MOST_CELLS_PER_JOB}",
        )
        _require(
            self.cells_per_job == 1 or bool(self.lockstep), "`cells_per_job` is for cells in lockstep: list its axes"
        )
        _require(self.step != "graph" or self.device != "cpu", "`step` graph is for GPUs: set `device` to auto or cuda")
        _positive(self, "checkpoint_seconds", "hang_seconds")


@dataclass(frozen=True, kw_only=True)
class Config(_Section):
    """The whole of config.yaml."""

    parametrizations: dict[str, dict[str, Any]]
    corpora: dict[str, CorpusSettings]
    setups: dict[str, SetupSettings]
    figures: dict[str, FigureSettings]
    compositions: dict[str, tuple[str, ...]]
    probes: dict[str, ProbeSettings]
    claims: ClaimsSettings
    analysis: AnalysisSettings
    execution: ExecutionSettings
    preset: str  # laid over the rest before it is validated; kept as the name of what runs

    def __post_init__(self) -> None:
        for section in ("parametrizations", "corpora", "setups"):
            for name in getattr(self, section):
                _check_name(section, name, NAME, "'-'")
        self._check_result_names()
        for name, setup in self.setups.items():
            _require(
                setup.corpus in self.corpora,
                f"`setups.{name}.corpus` is {setup.corpus!r}, which `corpora` does not list",
            )
        self._check_cell_count()
        for name, figure in self.figures.items():
            self._check_figure(name, figure)
        for name, parts in self.compositions.items():
            for part in parts:
                _require(part in self.figures, f"`compositions.{name}` names {part!r}, which `figures` does not list")
            _require(bool(parts), f"`compositions.{name}` is empty: list figures")
            _require(len(set(parts)) == len(parts), f"`compositions.{name}` lists a figure more than once")
        for name, probe in self.probes.items():
            self._check_cells(f"probes.{name}", probe)
            steps = self.setups[probe.setup].training.steps
            _require(
                probe.steps[-1] <= steps,
                f"`probes.{name}.steps` goes to {probe.steps[-1]}, but the set-up {probe.setup} trains {steps} steps",
            )
        for name, claim in self.claims.table.items():
            self._check_claim(f"claims.table.{name}", claim)

    def _check_cell_count(self) -> None:
        sizes = {f"figures.{name}": figure.axes.size for name, figure in self.figures.items()}
        sizes |= {f"probes.{name}": probe.axes.size for name, probe in self.probes.items()}
        cells, largest = sum(sizes.values()), max(sizes, key=sizes.__getitem__)
        _require(cells <= _MOST_CELLS, f"`{largest}.axes` make it {cells} cells in all, more than {_MOST_CELLS}")

    def _check_result_names(self) -> None:
        _require(bool(self.figures), "`figures` is empty: name at least one")
        owner: dict[str, str] = dict.fromkeys(RESERVED, "the workflow")
        for section in ("figures", "compositions", "probes"):
            for name in getattr(self, section):
                _check_name(section, name, RESULT_NAME, "'-' or '_'")
                _require(
                    name not in owner, f"`{section}.{name}`: results/{name} belongs to {owner.get(name)}; rename it"
                )
                owner[name] = f"`{section}`"

    def _check_figure(self, name: str, figure: FigureSettings) -> None:
        self._check_cells(f"figures.{name}", figure)
        model = self.setups[figure.setup].model
        _require(
            figure.curve != "width" or model.base_width in figure.axes.width,
            f"`figures.{name}.axes.width` lacks the base width {model.base_width}, from which transfer is measured:"
            " add it, or change `base_width` of the set-up",
        )

    def _check_cells(self, key: str, result: FigureSettings | ProbeSettings) -> None:
        _require(result.setup in self.setups, f"`{key}.setup` is {result.setup!r}, which `setups` does not list")
        for parametrization in result.axes.parametrization:
            _require(
                parametrization in self.parametrizations,
                f"`{key}.axes.parametrization` names {parametrization!r}, which `parametrizations` does not list",
            )
        try:
            for cell in result.cells():
                self.setups[result.setup].model.check(cell)
        except ValueError as error:
            raise ValueError(f"`{key}.axes`: {error}") from None

    def _check_claim(self, key: str, claim: ClaimSettings) -> None:
        # A panel or step that is not measured leaves the claim open; a name that nothing has is a mistake.
        for drift in claim.drifts:
            _require(
                drift.figure in self.figures, f"`{key}.drifts` names {drift.figure!r}, which `figures` does not list"
            )
            _require(
                self.figures[drift.figure].panel != "parametrization" or drift.panel in self.parametrizations,
                f"`{key}.drifts` names panel {drift.panel!r}, which `parametrizations` does not list",
            )
        for slope in claim.slopes:
            _require(slope.probe in self.probes, f"`{key}.slopes` names {slope.probe!r}, which `probes` does not list")
            _require(
                slope.parametrization in self.parametrizations,
                f"`{key}.slopes` names {slope.parametrization!r}, which `parametrizations` does not list",
            )
