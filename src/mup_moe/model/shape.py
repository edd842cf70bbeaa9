"""The sizes of a cell's model, and of the base model that its factors are relative to."""

from dataclasses import dataclass, replace
from typing import Self

from mup_moe.config.cell import Cell
from mup_moe.config.settings import ModelSettings


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Every number that a rule of the parametrization table may refer to, and the vocabulary.

    `total_experts`, `active_experts` (of a token) and `expert_size` include granularity, unlike the axis
    `experts` and the setting `top_k`. A dense
    model is one feed-forward layer of the size that an MoE's token is routed through.
    """

    dense: bool
    width: int
    head_size: int
    total_experts: int
    active_experts: int
    granularity: int
    expert_size: int
    vocabulary: int

    @classmethod
    def of(cls, cell: Cell, settings: ModelSettings, vocabulary: int) -> Self:
        """The shape of a cell (paper, granularity: G times the experts, 1/G the size, G * top_k)."""
        settings.check(cell)
        dense = cell.architecture == "dense"
        return cls(
            dense=dense,
            width=cell.width,
            head_size=settings.head_size or cell.width // (settings.heads or 1),
            total_experts=1 if dense else cell.experts * cell.granularity,
            active_experts=1 if dense else settings.top_k * cell.granularity,
            granularity=cell.granularity,
            expert_size=settings.ffn_ratio * cell.width * (settings.top_k if dense else 1) // cell.granularity,
            vocabulary=vocabulary,
        )

    @classmethod
    def base_of(cls, cell: Cell, settings: ModelSettings, vocabulary: int) -> Self:
        """The shape at which all factors are 1: base width, base experts, granularity 1."""
        experts = 1 if cell.architecture == "dense" else settings.base_experts
        base = replace(cell, width=settings.base_width, experts=experts, granularity=1)
        return cls.of(base, settings, vocabulary)

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.width // self.head_size
