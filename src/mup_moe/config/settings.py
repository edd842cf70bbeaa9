"""The settings of config.yaml as frozen values that validate themselves.

Defaults are in config.yaml, not here. A `neutral` value is not a default: it is what a request means that predates the
setting. `config.load` checks types when YAML is read. Ranges and relations are checked here, so that they always hold,
even on a machine without pydantic.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from mup_moe.config.architecture import Architecture
from mup_moe.config.cell import ARCHITECTURES, AXES, NAME, Cell, GroupRate, LearningRate, check_range, grid
from mup_moe.config.kinds import KINDS
from mup_moe.config.optimizers import OPTIMIZERS
from mup_moe.config.roles import RoleTable
from mup_moe.parametrization import GROUPS, Parametrization, control, parse_table

DROPLESS = "dropless"
# Names in results/ other than the files of figures and probes.
RESERVED = {"benchmarks", "cells", "claims", "data", "logs", "optima", "paper", "plan", "recorded", "report", "runs"}
RESERVED |= {"table1", "table2", "verdicts"}
RESULT_NAME = re.compile(r"[a-z0-9]+([-_][a-z0-9]+)*")


@dataclass(frozen=True)
class _Range:
    """The range of a number, in addition to the type of its field: `Annotated[int, _at_least(1)]`."""

    least: float
    most: float
    words: str

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError for a number outside the range; null, and a word instead of a number, are allowed."""
        # Written so that NaN is rejected too.
        if value not in (None, DROPLESS, "auto") and not self.least <= value <= self.most:
            raise ValueError(f"`{name}` is {value} but must {self.words}")


def _at_least(least: float, most: float = 2**53) -> _Range:
    return _Range(least, most, f"be at least {least} and at most {most}")


# Far beyond any real sweep, but tight enough that nothing computed from a setting overflows; float32 holds the numbers.
_POSITIVE = _Range(1e-37, 1e37, "be positive: 1e-37 to 1e+37")
_FINITE = _Range(-1e37, 1e37, "be finite")
_FRACTION = _Range(math.ulp(0.0), math.nextafter(1.0, 0.0), "be between 0 and 1")
_MOST_CELLS = 100_000
_MOST_ENTRIES = 2**50  # in one tensor
_LONGEST_NAME = 100  # for names that also name files


class _Section:
    """Base of all sections: pydantic converts nothing and rejects unknown keys; ranges are checked everywhere."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True, "extra": "forbid"}

    def __post_init__(self) -> None:
        for of_field in fields(self):  # type: ignore[arg-type]  # of its dataclasses
            for limit in getattr(of_field.type, "__metadata__", ()):
                limit.check(of_field.name, getattr(self, of_field.name))


def neutral(value: Any) -> Any:
    """Declares a field for a setting that is newer than some results.

    At this value everything is as before the setting existed. The value is left out of a request's identity, so that
    earlier results stay valid.
    """
    metadata = {"neutral": value}
    return field(default_factory=dict, metadata=metadata) if value == {} else field(default=value, metadata=metadata)


def without_neutral(settings: Any) -> dict[str, Any]:
    """Returns settings as plain data, by name, without those at their neutral value; equal for equal settings."""
    ours = {of_field.name: of_field.metadata for of_field in fields(settings)}
    return {
        name: value
        for name, value in asdict(settings).items()
        if "neutral" not in ours[name] or ours[name]["neutral"] != value
    }


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _require_listed(section: str, known: Collection[str], key: str, name: str, verb: str = "names") -> None:
    _require(name in known, f"`{key}` {verb} {name!r}, which `{section}` does not list: correct the name, or add it")


def _check_name(key: str, name: str, pattern: re.Pattern[str], words: str) -> None:
    _require(
        bool(pattern.fullmatch(name)) and len(name) <= _LONGEST_NAME,
        f"`{key}.{name}`: a name must be lower-case letters and digits, in words joined by {words},"
        f" at most {_LONGEST_NAME} characters",
    )


@dataclass(frozen=True, kw_only=True)
class CorpusSettings(_Section):
    """The source of the documents, and how they become tokens."""

    source: Literal["python", "text", "c4"]
    tokenizer: Literal["bpe", "gpt2"]
    validation_fraction: Annotated[float, _FRACTION]
    vocabulary: Annotated[int | None, _at_least(257, 2**24)] = None  # 256 bytes and the end-of-text token
    tokenizer_files: tuple[str, str] | None = None
    files: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    max_bytes: Annotated[int | None, _at_least(1)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer == "bpe":
            _require(self.vocabulary is not None, "tokenizer bpe needs `vocabulary`: set it")
        else:
            _require(self.vocabulary is None, "tokenizer gpt2 has a fixed `vocabulary`: remove it")
        _require(
            self.tokenizer == "gpt2" or self.tokenizer_files is None,
            "`tokenizer_files` is only for tokenizer gpt2: remove it",
        )
        _require(self.source != "text" or bool(self.files), "source text needs `files`: list them")
        _require(self.source != "python" or not self.files, "`files` is not for source python: remove it")
        _require(
            self.source != "c4" or bool(self.files) or self.max_bytes is not None,
            "source c4 without local shards in `files` needs `max_bytes`: set it, since the whole corpus is 800 GB",
        )
        _require(self.source == "python" or not self.packages, "`packages` is only for source python: remove it")


@dataclass(frozen=True, kw_only=True)
class ModelSettings(_Section):
    """The model of a set-up, except for the axes of its cells."""

    base_width: Annotated[int, _at_least(1, 2**20)]
    base_experts: Annotated[int, _at_least(1, 2**20)]
    blocks: Annotated[int, _at_least(1, 2**12)]
    heads: Annotated[int | None, _at_least(1, 2**20)]
    head_size: Annotated[int | None, _at_least(1, 2**20)]
    sequence: Annotated[int, _at_least(1, 2**24)]
    ffn_ratio: Annotated[int, _at_least(1, 2**12)]
    top_k: Annotated[int, _at_least(1, 2**20)]
    capacity_factor: Annotated[float | Literal["dropless"], _POSITIVE]
    activation: Literal["relu", "gelu", "silu"]
    renormalize_gates: bool
    final_norm: bool
    balance_loss: Annotated[float, _at_least(0)]
    z_loss: Annotated[float, _at_least(0)]
    init: Literal["fan_in", "constant"]
    init_scale: Annotated[float, _POSITIVE]
    embedding_multiplier: Annotated[float, _POSITIVE]
    logit_multiplier: Annotated[float, _POSITIVE]
    scale_residual_init: bool
    expert_fan_in: Literal["own", "width"]
    gated: bool = neutral(False)
    norm: Literal["layernorm", "rmsnorm"] = neutral("layernorm")
    positions: Literal["learned", "rotary"] = neutral("learned")
    gates: Literal["softmax", "sigmoid", "sqrt"] = neutral("softmax")
    balance_loss_times_top_k: bool = neutral(False)
    experts_start_alike: bool = neutral(False)
    fixed_sparsity: bool = neutral(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            (self.heads is None) != (self.head_size is None),
            "give either `heads` or `head_size`, and null for the other",
        )
        _require(
            self.gates != "sqrt" or self.renormalize_gates,
            "`gates` sqrt normalizes over the chosen experts only: set `renormalize_gates` to true",
        )

    def active_experts(self, experts: int) -> int:
        """Returns how many of `experts` experts a token uses at granularity 1."""
        return self.top_k * experts // self.base_experts if self.fixed_sparsity else self.top_k

    def base_cell(self, cell: Cell) -> Cell:
        """Returns the cell at which all factors are 1: base width, base experts, granularity 1."""
        experts = 1 if cell.architecture == "dense" else self.base_experts
        return replace(cell, width=self.base_width, experts=experts, granularity=1)

    def check(self, cell: Cell, architecture: Architecture | None = None) -> None:
        """Raises ValueError, with a sentence, for a cell for which this model cannot be built.

        architecture: the entry of `architectures` that the cell names, unless the architecture is one of ours.
        """
        if architecture is not None:
            architecture.check(cell, self)
            return
        _require(
            cell.architecture in ARCHITECTURES, f"`architectures` does not list {cell.architecture!r}: add an entry"
        )
        widths = {"width": cell.width, "base_width": self.base_width}
        for key, width in widths.items():
            divisor = self.heads or self.head_size or 1
            name = "heads" if self.heads else "head_size"
            _require(width % divisor == 0, f"`{key}` {width} is not divisible by `{name}` {divisor}")
            head_size = self.head_size or width // divisor
            _require(
                self.positions != "rotary" or head_size % 2 == 0,
                f"`positions` rotary needs an even head size, but it is {head_size} at `{key}` {width}:"
                f" change `{name}`",
            )
        size = self.ffn_ratio * cell.width
        _require(
            size % cell.granularity == 0,
            f"`granularity` {cell.granularity} does not divide the expert size {size} at width {cell.width} and"
            f" `ffn_ratio` {self.ffn_ratio}",
        )
        if cell.architecture == "moe":
            for key, experts in {"experts": cell.experts, "base_experts": self.base_experts}.items():
                _require(
                    self.active_experts(experts) <= experts, f"`top_k` {self.top_k} is more than `{key}` {experts}"
                )
            _require(
                not self.fixed_sparsity or self.top_k * cell.experts % self.base_experts == 0,
                f"`fixed_sparsity` needs a whole number of experts per token, but `top_k` {self.top_k} times `experts`"
                f" {cell.experts} is not divisible by `base_experts` {self.base_experts}",
            )
        # A dense layer is as large as top_k experts.
        counts = {"experts": cell.experts, "base_experts": self.base_experts, "top_k": self.top_k}
        (wide, width), (many, experts) = (max(of.items(), key=lambda item: item[1]) for of in (widths, counts))
        _require(
            experts * self.ffn_ratio * width**2 <= _MOST_ENTRIES,
            f"`{wide}` {width}, `{many}` {experts} and `ffn_ratio` {self.ffn_ratio} make a tensor of more than"
            f" {_MOST_ENTRIES} entries: reduce them",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(_Section):
    """How each cell of a set-up is trained."""

    steps: Annotated[int, _at_least(1, 2**31)]
    batch_size: Annotated[int, _at_least(1, 2**20)]
    warmup_steps: Annotated[int, _at_least(0)]
    final_lr_fraction: Annotated[float, _at_least(0, 1)]
    adam_betas: tuple[float, float]
    adam_eps: Annotated[float, _POSITIVE]
    weight_decay: Annotated[float, _at_least(0)]
    clip_norm: Annotated[float | None, _POSITIVE]
    final_loss_steps: Annotated[int, _at_least(1, 2**31)]
    validation_batches: Annotated[int, _at_least(1, 2**20)]
    divergence_margin: Annotated[float, _POSITIVE]
    divergence_span: Annotated[float, _POSITIVE]
    precision: Literal["auto", "float32", "bfloat16"]
    optimizer: str = neutral("adamw")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("warmup_steps", "final_loss_steps"):
            part = getattr(self, name)
            _require(part <= self.steps, f"`{name}` {part} is more than `steps` {self.steps}")
        for beta in self.adam_betas:
            _require(0 <= beta < 1, f"`adam_betas` has {beta} but must have values in [0, 1)")
        known = ", ".join(OPTIMIZERS)
        _require(self.optimizer in OPTIMIZERS, f"`optimizer` is {self.optimizer!r} but must be one of {known}")


@dataclass(frozen=True, kw_only=True)
class SetupSettings(_Section):
    """What all cells of a sweep share."""

    corpus: str
    model: ModelSettings
    training: TrainingSettings

    @property
    def tokens_per_step(self) -> int:
        """The number of tokens of one step of one cell."""
        return self.training.batch_size * self.model.sequence

    @property
    def tokens_per_run(self) -> int:
        """The number of tokens on which one cell is trained."""
        return self.training.steps * self.tokens_per_step


@dataclass(frozen=True, kw_only=True)
class AxesSettings(_Section):
    """The values of each axis of `Cell`; a figure's cells are their product."""

    architecture: tuple[str, ...]
    parametrization: tuple[str, ...]
    width: tuple[int, ...]
    experts: tuple[int, ...]
    granularity: tuple[int, ...]
    learning_rate: tuple[LearningRate, ...]
    seed: tuple[int, ...]
    # Group of roles -> factors on its learning rate, tried for one group at a time, in addition to no factor.
    learning_rate_of: Mapping[str, tuple[LearningRate, ...]] = neutral({})

    def __post_init__(self) -> None:
        for group in self.learning_rate_of:
            _require(group in GROUPS, f"`learning_rate_of` has {group!r} but the groups are {', '.join(GROUPS)}")
        for axis in AXES:
            values = self.values(axis)
            _require(len(values) > 0, f"`{axis}` is empty: list at least one value")
            for value in values:
                check_range(axis, value)
            often, times = Counter(values).most_common(1)[0]
            _require(times == 1, f"`{axis}` lists {often} more than once")

    def values(self, axis: str) -> tuple[Any, ...]:
        """Returns the values of an axis as they appear in `Cell`."""
        if axis != "learning_rate_of":
            return tuple(getattr(self, axis))
        rates = self.learning_rate_of.items()
        # A cell that names no group has factor 1 already.
        return ("", *(str(GroupRate(group, by)) for group, factors in rates for by in factors if float(by) != 1))

    @property
    def size(self) -> int:
        """The number of combinations of values."""
        return math.prod(len(self.values(axis)) for axis in AXES)


CurveAxis = Literal["width", "experts", "granularity"]
PanelAxis = Literal["parametrization", "architecture", "width", "experts", "granularity"]


@dataclass(frozen=True, kw_only=True)
class CellsSettings(_Section):
    """Cells of one set-up."""

    setup: str
    axes: AxesSettings

    def cells(self) -> list[Cell]:
        """Returns the product of the axes, the first axis outermost, in the order of the config."""
        return list(grid(self.setup, {axis: self.axes.values(axis) for axis in AXES}))


@dataclass(frozen=True, kw_only=True)
class FigureSettings(CellsSettings):
    """A figure: its kind, its panels and the curves in each."""

    panel: PanelAxis
    curve: CurveAxis
    reference: str | None = None  # a CSV of published losses to overlay on the curves
    kind: str = neutral("transfer")
    tunes: str = neutral("")  # tune this group's learning rate at one global rate; "": tune the global rate

    def __post_init__(self) -> None:
        known = [kind for kind in KINDS if KINDS[kind].of == "figures"]
        _require(self.kind in known, f"`kind` is {self.kind!r} but must be one of {', '.join(known)}")
        _require(self.panel != self.curve, f"`panel` and `curve` are both {self.curve}")
        for axis in AXES:
            values = self.axes.values(axis)
            free = axis in (self.panel, self.curve, self.rate, "seed", *KINDS[self.kind].axes)
            _require(free or len(values) == 1, f"`{axis}` has {len(values)} values but is neither panel nor curve")
        _require(not self.tunes or self.kind == "transfer", f"`tunes` is only for kind transfer, not for {self.kind}")
        _require(
            not self.tunes or self.reference is None,
            "`reference` has global learning rates, which `tunes` does not vary: remove one of the two",
        )
        _require(
            not self.tunes
            or (tuple(self.axes.learning_rate_of) == (self.tunes,) and len(self.axes.values(self.rate)) > 1),
            f"`tunes` is {self.tunes!r}: give `axes.learning_rate_of` factors for it, and for no other group",
        )

    @property
    def rate(self) -> str:
        """The axis of the tuned learning rate."""
        return "learning_rate_of" if self.tunes else "learning_rate"


Measure = Literal["activations", "covariance", "contributions"]


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(CellsSettings):
    """A measurement inside models over their first steps, against an axis.

    `activations` is the coordinate check (Tensor Programs V). `covariance` measures the covariance of Lemma B.1.
    `contributions` measures what each role of an MoE layer adds to its output.
    """

    measure: Measure
    steps: tuple[int, ...]  # the numbers of training steps after which to measure
    over: CurveAxis = neutral("width")

    def __post_init__(self) -> None:
        _require(
            len(self.steps) > 0 and self.steps == tuple(sorted(set(self.steps))) and self.steps[0] >= 0,
            f"`steps` {list(self.steps)} must ascend from 0 or later",
        )
        over = self.over
        _require(
            len(self.axes.values(over)) >= 2,
            f"`axes.{over}` needs at least two values, since slopes are over this axis",
        )
        for axis in ("architecture", "width", "experts", "granularity", "learning_rate", "learning_rate_of"):
            _require(axis == over or len(self.axes.values(axis)) == 1, f"`axes.{axis}` of a probe must have one value")
        _require(
            self.measure == "activations" or self.steps[0] == 0,
            f"`steps` of measure {self.measure} must begin with 0, since changes are measured from there",
        )
        _require(
            self.measure != "covariance" or over == "width",
            f"`over` is {over}, but `measure` covariance tests Lemma B.1, which is about width: set it to width",
        )
        _require(
            self.measure == "activations" or self.axes.architecture == ("moe",),
            f"`measure` {self.measure} needs experts: set `axes.architecture` to [moe]",
        )


@dataclass(frozen=True, kw_only=True)
class Controls(_Section):
    """Rows that are wrong in what a claim is about, each in a panel of a figure over the same values."""

    figure: str
    panels: tuple[str, ...]

    def __post_init__(self) -> None:
        _require(
            bool(self.panels), "`panels` of `controls` is empty: name rows that are wrong in what the claim is about"
        )


@dataclass(frozen=True, kw_only=True)
class DriftTest(_Section):
    """What a claim predicts for the drift of the best learning rate in one panel of a figure.

    Controls distinguish a panel that keeps its best learning rate from one where nothing can move it. Without controls,
    such a test replicates nothing.
    """

    figure: str
    panel: str
    expect: Literal["keeps", "moves", "falls", "drifts"]
    controls: Controls | None = None
    drift: Annotated[float | None, _FINITE] = None  # octaves per octave, for a test that `drifts`

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.expect == "keeps" or self.controls is None, "`controls` are only for `expect` keeps: remove them")
        _require(
            (self.expect == "drifts") == (self.drift is not None),
            "`drift` is the expected drift of a test with `expect` drifts: give it there, and only there",
        )


@dataclass(frozen=True, kw_only=True)
class SlopeTest(_Section):
    """What a claim predicts for a quantity's slope (log2 on log2 of the probe's axis) at one step of a probe."""

    probe: str
    parametrization: str
    quantity: str
    step: int
    slope: Annotated[float, _FINITE]


@dataclass(frozen=True, kw_only=True)
class ClaimSettings(_Section):
    """A claim of the paper in our words, and the tests that determine its verdict."""

    says: str
    decided_by: str  # what would decide the claim if this sweep does not
    drifts: tuple[DriftTest, ...] = ()
    slopes: tuple[SlopeTest, ...] = ()

    def __post_init__(self) -> None:
        _require(bool(self.drifts or self.slopes), "a claim without `drifts` or `slopes` tests nothing: add a test")


@dataclass(frozen=True, kw_only=True)
class ClaimsSettings(_Section):
    """The criteria of all claims, fixed before the runs."""

    drift_margin: Annotated[float, _POSITIVE]  # octaves of learning rate per octave of the axis
    excess_margin: Annotated[float, _POSITIVE]  # nats per token at the far end of the axis
    slope_margin: Annotated[float, _POSITIVE]
    refuting_tokens: Annotated[int, _at_least(0)]  # the least tokens per cell for a sweep to refute a claim
    refuting_octaves: Annotated[float, _at_least(0)]  # the least octaves of the axis for that
    table: dict[str, ClaimSettings]

    @property
    def figures(self) -> list[str]:
        """The figures that the tests of all claims rest on, including their controls."""
        drifts = [drift for claim in self.table.values() for drift in claim.drifts]
        controls = [drift.controls.figure for drift in drifts if drift.controls]
        return list(dict.fromkeys([*(drift.figure for drift in drifts), *controls]))


@dataclass(frozen=True, kw_only=True)
class ComparedRule(_Section):
    """A rule of a comparison: a panel of a figure, and where the rule comes from."""

    figure: str
    panel: str
    source: str


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings(_Section):
    """Which cells are compared, and how a curve's optimum and its uncertainty are estimated."""

    loss: Literal["train_loss", "valid_loss"]
    fit_points: Annotated[int, _at_least(3)]
    confidence: Annotated[float, _FRACTION]
    resamples: Annotated[int, _at_least(100, 10**6)]
    foreign_cells: Literal["stop", "leave_out"]


# A job holds a lock file per cell, and most systems limit a process to 1,024 open files.
MOST_CELLS_PER_JOB = 500
# How the steps of training are issued to the device.
STEPS = ("eager", "compiled", "graph")


@dataclass(frozen=True, kw_only=True)
class ExecutionSettings(_Section):
    """How cells are run; no setting here may change a result beyond rounding."""

    device: Literal["auto", "cpu", "cuda"]
    threads: Annotated[int, _at_least(1, 2**12)]
    lockstep: tuple[Literal["learning_rate", "seed", "parametrization", "learning_rate_of"], ...]
    replicas: Annotated[int | Literal["auto"], _at_least(1)]
    cells_per_job: Annotated[int, _at_least(1, MOST_CELLS_PER_JOB)]
    step: Literal["auto", "eager", "compiled", "graph"]
    checkpoint_seconds: Annotated[float, _POSITIVE]
    hang_seconds: Annotated[float, _POSITIVE]

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(len(set(self.lockstep)) == len(self.lockstep), "`lockstep` lists an axis more than once")
        _require(
            self.cells_per_job == 1 or bool(self.lockstep),
            "`cells_per_job` is only for cells in lockstep: list axes in it",
        )
        _require(self.step != "graph" or self.device != "cpu", "`step` graph needs a GPU: set `device` to auto or cuda")


@dataclass(frozen=True, kw_only=True)
class Config(_Section):
    """The whole of config.yaml."""

    parametrizations: dict[str, dict[str, Any]]
    corpora: dict[str, CorpusSettings]
    setups: dict[str, SetupSettings]
    figures: dict[str, FigureSettings]
    compositions: dict[str, tuple[str, ...]]  # figures drawn as one
    trends: dict[str, tuple[str, ...]]  # figures with drifts drawn as one
    comparisons: dict[str, dict[str, ComparedRule]]  # rules side by side, by title
    probes: dict[str, ProbeSettings]
    claims: ClaimsSettings
    analysis: AnalysisSettings
    execution: ExecutionSettings
    preset: str  # merged into the config before validation; kept as the name of the run's preset
    roles: dict[str, dict[str, Any]] = neutral({})  # the role tables of architectures
    architectures: dict[str, dict[str, Any]] = neutral({})

    def __post_init__(self) -> None:
        for section in ("parametrizations", "roles", "architectures", "corpora", "setups"):
            for name in getattr(self, section):
                _check_name(section, name, NAME, "'-'")
        for name, table in self.roles.items():
            RoleTable.parse(name, table)
        for name in self.built:
            _require(name not in ARCHITECTURES, f"`architectures.{name}` has the name of a built-in one: rename it")
        self._check_result_names()
        for name, setup in self.setups.items():
            _require_listed("corpora", self.corpora, f"setups.{name}.corpus", setup.corpus, "is")
        self._check_cell_count()
        for name, figure in self.figures.items():
            self._check_figure(name, figure)
        for section in ("compositions", "trends"):
            for name, parts in getattr(self, section).items():
                self._check_parts(f"{section}.{name}", parts)
        for name, parts in self.trends.items():
            tuned = {self.figures[part].tunes for part in parts}
            _require(
                len(tuned) == 1, f"`trends.{name}` has figures with different `tunes`: list figures that tune the same"
            )
        for name, rules in self.comparisons.items():
            self._check_comparison(f"comparisons.{name}", rules)
        for name, probe in self.probes.items():
            self._check_cells(f"probes.{name}", probe)
            steps = self.setups[probe.setup].training.steps
            _require(
                probe.steps[-1] <= steps,
                f"`probes.{name}.steps` goes up to {probe.steps[-1]}, but the set-up {probe.setup} only trains"
                f" {steps} steps",
            )
        for name, claim in self.claims.table.items():
            self._check_claim(f"claims.table.{name}", claim)

    @cached_property
    def rows(self) -> dict[str, Parametrization]:
        """The rows of the table. Raises ValueError naming the key."""
        return parse_table(self.parametrizations)

    @cached_property
    def built(self) -> dict[str, Architecture]:
        """The architectures of the config, other than our own. Raises ValueError naming the key."""
        return {name: Architecture.parse(name, entry, self.roles) for name, entry in self.architectures.items()}

    def architecture(self, cell: Cell) -> Architecture | None:
        """Returns the entry of a cell's architecture; None if it is one of ours, or unknown."""
        return self.built.get(cell.architecture)

    @property
    def kinds(self) -> dict[str, str]:
        """The kind (a key of KINDS) of everything that can be drawn, by name."""
        return {
            **{name: figure.kind for name, figure in self.figures.items()},
            **dict.fromkeys(self.compositions, "composition"),
            **dict.fromkeys(self.trends, "trend"),
            **dict.fromkeys(self.comparisons, "comparison"),
            **{name: probe.measure for name, probe in self.probes.items()},
            **({"verdicts": "verdicts"} if self.claims.table else {}),
        }

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The figures of each composition, trend and comparison."""
        compared = {
            name: tuple(dict.fromkeys(rule.figure for rule in rules.values()))
            for name, rules in self.comparisons.items()
        }
        return self.compositions | self.trends | compared

    def _check_parts(self, key: str, parts: tuple[str, ...]) -> None:
        for part in parts:
            _require_listed("figures", self.figures, key, part)
            kind = self.figures[part].kind
            _require(kind == "transfer", f"`{key}` names {part!r} of kind {kind}: name figures of kind transfer")
        _require(bool(parts), f"`{key}` is empty: list figures")
        _require(len(set(parts)) == len(parts), f"`{key}` lists a figure more than once")

    def _check_comparison(self, key: str, rules: dict[str, ComparedRule]) -> None:
        for title, rule in rules.items():
            self._check_panel(f"{key}.{title}", rule.figure, rule.panel)
            figure = self.figures[rule.figure]
            base, values = self.base_of(rule.figure), figure.axes.values(figure.curve)
            _require(
                len(values) > 1 and base == min(values),
                f"`{key}.{title}` names {rule.figure!r}, but there `axes.{figure.curve}` must have the base {base} as"
                " its smallest value, and larger ones",
            )
            panels = [str(panel) for panel in figure.axes.values(figure.panel)]
            _require(
                rule.panel in panels, f"`{key}.{title}` names {rule.panel!r}, which is not a panel of {rule.figure!r}"
            )
        parts = tuple(dict.fromkeys(rule.figure for rule in rules.values()))
        self._check_parts(key, parts)
        for first, other in itertools.pairwise(parts):
            ours, its = self._compared_by(first), self._compared_by(other)
            for what, value in ours.items():
                _require(
                    its[what] == value,
                    f"`{key}` compares {first!r} with {other!r}, which has another `{what}`: make them the same",
                )

    def base_of(self, figure: str) -> int:
        """Returns the value of a figure's curve axis at which the parametrizations of its set-up agree."""
        model = self.setups[self.figures[figure].setup].model
        bases = {"width": model.base_width, "experts": model.base_experts, "granularity": 1}
        return bases[self.figures[figure].curve]

    def _compared_by(self, name: str) -> dict[str, Any]:
        """Returns what figures must have in common for their rules to be compared."""
        figure = self.figures[name]
        setup = self.setups[figure.setup]
        same = [axis for axis in AXES if axis not in (figure.panel, figure.rate)]
        return {
            "curve": figure.curve,
            "tunes": figure.tunes,
            **{f"axes.{axis}": set(figure.axes.values(axis)) for axis in same},
            "corpus": setup.corpus,
            "training": setup.training,
            "base_width": setup.model.base_width,
            "base_experts": setup.model.base_experts,
        }

    def _check_cell_count(self) -> None:
        sizes = {f"figures.{name}": figure.axes.size for name, figure in self.figures.items()}
        sizes |= {f"probes.{name}": probe.axes.size for name, probe in self.probes.items()}
        cells, largest = sum(sizes.values()), max(sizes, key=sizes.__getitem__)
        _require(
            cells <= _MOST_CELLS,
            f"`{largest}.axes` has the most of {cells} cells in all, which are more than {_MOST_CELLS}: shorten it",
        )

    def _check_result_names(self) -> None:
        _require(bool(self.figures), "`figures` is empty: add at least one")
        owner: dict[str, str] = dict.fromkeys(RESERVED, "the workflow")
        for section in ("figures", "compositions", "trends", "comparisons", "probes"):
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
            figure.curve != "width" or figure.kind == "sensitivity" or model.base_width in figure.axes.width,
            f"`figures.{name}.axes.width` lacks the base width {model.base_width}, from which transfer is measured:"
            " add it, or change `base_width` of the set-up",
        )

    def _check_cells(self, key: str, result: CellsSettings) -> None:
        _require_listed("setups", self.setups, f"{key}.setup", result.setup, "is")
        for parametrization in result.axes.parametrization:
            self._check_rule(f"{key}.axes.parametrization", parametrization)
        try:
            for cell in result.cells():
                self.setups[result.setup].model.check(cell, self.architecture(cell))
        except ValueError as error:
            raise ValueError(f"`{key}.axes`: {error}") from None

    def _check_controls(self, key: str, figure: str, controls: Controls) -> None:
        for panel in controls.panels:
            self._check_panel(key, controls.figure, panel)
        ours, theirs = self.figures[figure], self.figures[controls.figure]
        for name in ("setup", "curve", "tunes"):
            _require(
                getattr(ours, name) == getattr(theirs, name),
                f"`{key}` names {controls.figure!r}, which has another `{name}` than {figure!r}: use the same, since"
                " controls are compared with the panel that they belong to",
            )

    def _check_panel(self, key: str, figure: str, panel: str) -> None:
        _require_listed("figures", self.figures, key, figure)
        if self.figures[figure].panel == "parametrization":
            self._check_rule(key, panel, "names panel")

    def _check_rule(self, key: str, name: str, verb: str = "names") -> None:
        if name not in self.parametrizations:
            made = control(self.rows, name)
            _require_listed("parametrizations", [made.name] if made else [], key, name, verb)

    def _check_claim(self, key: str, claim: ClaimSettings) -> None:
        # A panel or step that is not measured leaves the claim open, but an unknown name is a mistake.
        for drift in claim.drifts:
            self._check_panel(f"{key}.drifts", drift.figure, drift.panel)
            if drift.controls:
                self._check_controls(f"{key}.drifts.controls", drift.figure, drift.controls)
        for slope in claim.slopes:
            _require_listed("probes", self.probes, f"{key}.slopes", slope.probe)
            _require_listed("parametrizations", self.parametrizations, f"{key}.slopes", slope.parametrization)
