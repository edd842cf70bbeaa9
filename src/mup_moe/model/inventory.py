"""A model's sizes, and its tensors with all that parametrizations and parameter counts need; needs no torch.

A tensor's name is its path in the model. The name seeds the tensor's initial values and identifies it in checkpoints.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Self

from mup_moe.config.architecture import Architecture
from mup_moe.config.cell import Cell
from mup_moe.config.roles import RoleEntry, RoleTable
from mup_moe.config.settings import ModelSettings
from mup_moe.parametrization import ROLES

# Roles that are looked up or multiplied elementwise, without a matrix product.
_NO_MATMUL = ("embedding", "norm")
# Initial values of the tensors of a norm.
_NORM_FILLS = {"layernorm": {"gain": 1.0, "bias": 0.0}, "rmsnorm": {"gain": 1.0}}


@dataclass(frozen=True)
class HubShape:
    """A transformers model: its type, the fields of its config as JSON, and its role table."""

    model_type: str
    fields: str
    roles: RoleTable


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Every number that a rule of the parametrization table may refer to, and the vocabulary size.

    `total_experts`, `active_experts` (per token) and `expert_size` include granularity, unlike the axis
    `experts` and the setting `top_k`. The feed-forward layer of a dense model has the total size of the
    experts that a token passes through in the MoE.
    """

    dense: bool
    width: int
    head_size: int
    total_experts: int
    active_experts: int
    granularity: int
    expert_size: int
    vocabulary: int
    hub: HubShape | None = None  # for a model from transformers

    @classmethod
    def of(cls, cell: Cell, settings: ModelSettings, vocabulary: int, architecture: Architecture | None = None) -> Self:
        """Returns the shape of a cell (granularity as in the paper: G times the experts, 1/G the size, G * top_k).

        architecture: the entry of `architectures` that the cell names, unless the architecture is one of ours.
        """
        settings.check(cell, architecture)
        if architecture is not None:
            fields = architecture.fields_of(cell, settings, vocabulary)
            hub = HubShape(architecture.model_type, json.dumps(fields, sort_keys=True), architecture.roles)
            sizes = architecture.roles.sizes_of(fields)
            return cls(dense=False, granularity=cell.granularity, vocabulary=vocabulary, hub=hub, **sizes)
        dense = cell.architecture == "dense"
        return cls(
            dense=dense,
            width=cell.width,
            head_size=settings.head_size or cell.width // (settings.heads or 1),
            total_experts=1 if dense else cell.experts * cell.granularity,
            active_experts=1 if dense else settings.active_experts(cell.experts) * cell.granularity,
            granularity=cell.granularity,
            expert_size=settings.ffn_ratio * cell.width * (settings.top_k if dense else 1) // cell.granularity,
            vocabulary=vocabulary,
        )

    @classmethod
    def base_of(
        cls, cell: Cell, settings: ModelSettings, vocabulary: int, architecture: Architecture | None = None
    ) -> Self:
        """Returns the shape at which all factors are 1: base width, base experts, granularity 1."""
        return cls.of(settings.base_cell(cell), settings, vocabulary, architecture)

    @property
    def heads(self) -> int:
        """The number of attention heads."""
        return self.width // self.head_size


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of one replica. Raises ValueError for a role that is not in `ROLES`."""

    role: str
    shape: tuple[int, ...]
    fan_in: int  # entries that one output sums over
    fan_out: int  # outputs that one input feeds
    into_residual: bool = False  # whether the output is added to the residual stream
    active: float = 1.0  # the share of the tensor that multiplies one token
    fill: float | None = None  # the constant initial value, instead of random numbers (norms)
    alike: bool = False  # whether all slices along the leading axis start from the same numbers

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"the role {self.role!r} is unknown: use one of {', '.join(ROLES)}, or add it to `ROLES`")

    @classmethod
    def by(cls, entry: RoleEntry, name: str, shape: tuple[int, ...], active: float = 1.0) -> Self:
        """Returns a tensor described by an entry of a role table.

        active: the share of the experts that a token uses. Raises ValueError if the entry's axes do not fit the shape.
        """
        if len(entry.axes) != len(shape):
            raise ValueError(
                f"`{name}` has the shape {shape}, but `{entry.pattern}` describes {len(entry.axes)} axes"
                f" ({' '.join(entry.axes)})"
            )
        if 0 in shape:
            raise ValueError(f"`{name}` has the shape {shape}, which holds no entries: remove this parameter")
        fans = {
            fan: math.prod(n for axis, n in zip(entry.axes, shape, strict=True) if axis == fan) for fan in ("in", "out")
        }
        return cls(
            role=entry.role,
            shape=shape,
            fan_in=fans["in"],
            fan_out=fans["out"],
            into_residual=entry.into_residual,
            active=active if "expert" in entry.axes else 1.0,
            fill=entry.fill,
        )

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)


Tensors = Mapping[str, TensorSpec]


def tensors_of(shape: ModelShape, settings: ModelSettings) -> Tensors:
    """Returns all tensors of a model, in the order of its modules."""
    if shape.hub is not None:
        # transformers itself must make the model to list its tensors: only this branch needs torch.
        from mup_moe.model.hub import hub_tensors

        return hub_tensors(shape, shape.hub)
    width, vocabulary = shape.width, shape.vocabulary
    # A lookup reads a single row, so its fan_in is 1.
    tensors = {"token": TensorSpec(role="embedding", shape=(vocabulary, width), fan_in=1, fan_out=width)}
    if settings.positions == "learned":
        sequence = settings.sequence
        tensors["position"] = TensorSpec(role="embedding", shape=(sequence, width), fan_in=1, fan_out=width)
    parts = {
        "attention_norm": norm_tensors(shape, settings),
        "attention": attention_tensors(shape),
        "feed_forward_norm": norm_tensors(shape, settings),
        "feed_forward": feed_forward_tensors(shape, settings) if shape.dense else moe_tensors(shape, settings),
    }
    for block in range(settings.blocks):
        for part, of_part in parts.items():
            tensors |= _within(f"blocks.{block}.{part}", of_part)
    if settings.final_norm:
        tensors |= _within("final_norm", norm_tensors(shape, settings))
    return tensors | {"unembedding": _matrix("unembedding", width, vocabulary)}


def norm_tensors(shape: ModelShape, settings: ModelSettings) -> Tensors:
    """Returns the tensors of a norm over the width."""
    return {
        name: TensorSpec(role="norm", shape=(shape.width,), fan_in=1, fan_out=1, fill=fill)
        for name, fill in _NORM_FILLS[settings.norm].items()
    }


def attention_tensors(shape: ModelShape) -> Tensors:
    """Returns the tensors of attention; queries, keys and values share one matrix."""
    width = shape.width
    return {
        "qkv": _matrix("attention", width, 3 * width),
        "out": _matrix("attention", width, width, into_residual=True),
    }


def feed_forward_tensors(shape: ModelShape, settings: ModelSettings) -> Tensors:
    """The tensors of a dense feed-forward layer."""
    width, size = shape.width, shape.expert_size
    up = dict.fromkeys(_into_hidden(settings), _matrix("feed_forward", width, size))
    return up | {"down": _matrix("feed_forward", size, width, into_residual=True)}


def moe_tensors(shape: ModelShape, settings: ModelSettings) -> Tensors:
    """Returns the tensors of a mixture of experts: a router, and experts stacked along the leading axis."""
    width, size, experts = shape.width, shape.expert_size, shape.total_experts
    active = shape.active_experts / experts
    # With `expert_fan_in: width` an expert's fan_in is what it would be at granularity 1.
    down_fan_in = size if settings.expert_fan_in == "own" else size * shape.granularity
    alike = settings.experts_start_alike
    up = TensorSpec(
        role="expert_up", shape=(experts, width, size), fan_in=width, fan_out=size, active=active, alike=alike
    )
    down = TensorSpec(
        role="expert_down",
        shape=(experts, size, width),
        fan_in=down_fan_in,
        fan_out=width,
        active=active,
        into_residual=True,
        alike=alike,
    )
    return {"router": _matrix("router", width, experts)} | dict.fromkeys(_into_hidden(settings), up) | {"down": down}


def _into_hidden(settings: ModelSettings) -> tuple[str, ...]:
    """Names the matrices between a layer's input and its hidden units."""
    return ("up", "gate") if settings.gated else ("up",)


def _matrix(role: str, fan_in: int, fan_out: int, *, into_residual: bool = False) -> TensorSpec:
    return TensorSpec(role=role, shape=(fan_in, fan_out), fan_in=fan_in, fan_out=fan_out, into_residual=into_residual)


def _within(path: str, tensors: Tensors) -> Tensors:
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class ModelSize:
    """The parameters of one replica and the FLOPs of training it."""

    parameters: int
    active_parameters: int  # those that one token uses
    flops_per_token: int  # in training


@cache
def model_size(shape: ModelShape, settings: ModelSettings) -> ModelSize:
    """Returns the size of a model of this shape.

    Training takes, per token, 6 FLOPs per active matrix entry plus 12 * blocks * width * sequence FLOPs for attention
    (PaLM, appendix B; the causal half is not discounted).
    """
    tensors = tensors_of(shape, settings).values()
    matmul = sum(tensor.size * tensor.active for tensor in tensors if tensor.role not in _NO_MATMUL)
    return ModelSize(
        parameters=sum(tensor.size for tensor in tensors),
        active_parameters=round(sum(tensor.size * tensor.active for tensor in tensors)),
        flops_per_token=round(6 * matmul + 12 * settings.blocks * shape.width * settings.sequence),
    )


def size_of(
    cell: Cell, settings: ModelSettings, vocabulary: int, architecture: Architecture | None = None
) -> ModelSize:
    """Returns the size of a cell's model."""
    return model_size(ModelShape.of(cell, settings, vocabulary, architecture), settings)
