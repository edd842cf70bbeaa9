"""The coordinate check of a model of your own (Tensor Programs V, section D.1 and figure 5)."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mup_moe.analysis.names import signed
from mup_moe.analysis.slopes import Slope, columns_over, slopes
from mup_moe.config.roles import QUANTITIES, RoleTable
from mup_moe.files import UserError
from mup_moe.library.plan import parametrize
from mup_moe.library.tables import roles_of, rules_of
from mup_moe.model.hub import observed, tensor_of
from mup_moe.parametrization import Parametrization

Loss = Callable[[nn.Module, Any], Tensor]


class CoordinateCheck:
    """What a coordinate check measured.

    values: a row per width, seed, step, quantity and block, with the mean absolute entry. slopes: of log2 of the
    values on log2 of the width, with Student's interval; under a rule that transfers none grows. Before the first
    step, logits of the router and of the output fall with slope -1/2 under muP.
    """

    def __init__(self, values: pd.DataFrame, confidence: float) -> None:
        self.values = values
        self.slopes: list[Slope] = list(slopes(values, confidence))

    def table(self) -> pd.DataFrame:
        """The slopes: a row per rules, quantity, block and step."""
        return pd.DataFrame(self.slopes)

    def save(self, path: str | Path) -> None:
        """Draws the values over the widths, a line per step: writes PATH.pdf and PATH.png."""
        # Only here is drawing needed.
        from mup_moe.figures.activations import draw_activations
        from mup_moe.figures.style import drawing_style, save

        with drawing_style():
            save(draw_activations(self.values, self.slopes), Path(path))

    def __str__(self) -> str:
        """The slopes after the last step."""
        last = self.values["step"].max()
        rows = [slope for slope in self.slopes if slope.step == last]
        width = max(len(_place(slope)) for slope in rows)
        lines = [
            f"{_place(slope).ljust(width)}  {signed(slope.slope)}"
            + (" no interval" if math.isnan(slope.low) else f" [{signed(slope.low)}, {signed(slope.high)}]")
            for slope in rows
        ]
        return "\n".join([f"slopes over widths after {last} steps", *lines])


def _place(slope: Slope) -> str:
    return f"{slope.parametrization}: {slope.quantity}" + (f", block {slope.block}" if slope.block else "")


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean cross-entropy of a model that predicts each next token of tokens [B, S].

    The model gives logits [B, S, V], or has them in its output's `logits`, as models of transformers do.
    """
    output = model(tokens)
    logits: Tensor = getattr(output, "logits", output)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def coordinate_check(
    make_model: Callable[[int], nn.Module],
    widths: Sequence[int],
    batches: Sequence[Any],
    rules: str | Mapping[str, Any] | Parametrization = "mup",
    roles: str | Mapping[str, Any] | RoleTable | None = None,
    *,
    lr: float = 2**-6,
    seeds: Sequence[int] = (0, 1, 2),
    loss: Loss = next_token_loss,
    base_width: int | None = None,
    confidence: float = 0.95,
    **more: Any,
) -> CoordinateCheck:
    """Trains models of several widths for a few steps, and measures the size of their activations.

    make_model: gives the model of a width. batches: one for each step; what is measured is always the first one, so
    that the model alone changes. rules, roles, more: as of `parametrize`. lr: Adam's, at `base_width` (None:
    the least). loss: of a model on a batch, in place of the cross-entropy of the next token.

    Raises UserError for fewer than two widths, and where the role table observes nothing, or two modules as one.
    """
    widths, seeds, batches = sorted(set(map(int, widths))), sorted(set(map(int, seeds))), list(batches)
    if len(widths) < 2 or widths[0] < 1 or not batches or not seeds:
        raise UserError("a coordinate check needs two widths or more, a seed, and a batch for each step")
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence!r} but must lie between 0 and 1")
    row = rules_of(rules)
    base = make_model(widths[0] if base_width is None else base_width)
    table = roles_of(roles, getattr(getattr(base, "config", None), "model_type", None))
    rows: list[tuple[Any, ...]] = []
    for width, seed in itertools.product(widths, seeds):
        with torch.random.fork_rng():
            # Of dropout, say.
            torch.manual_seed(seed)
            model = make_model(width)
            plan = parametrize(model, base, row, table, **more)
            plan.initialize_(seed)
            optimizer = torch.optim.AdamW(plan.groups(lr=lr))
            for step in range(len(batches) + 1):
                sizes = _sizes(model, table, partial(loss, model, batches[0]))
                rows += [(row.name, width, seed, step, *key, value) for key, value in sizes.items()]
                if step < len(batches):
                    loss(model, batches[step]).backward()
                    optimizer.step()
                    optimizer.zero_grad()
    values = pd.DataFrame(rows, columns=columns_over("width"))
    order = pd.Categorical(values["quantity"], QUANTITIES, ordered=True)
    return CoordinateCheck(values.iloc[order.argsort(kind="stable")].reset_index(drop=True), confidence)


def _sizes(model: nn.Module, table: RoleTable, run: Callable[[], object]) -> dict[tuple[str, str], float]:
    """The mean absolute entry of each output that the role table names, by quantity and block."""
    found: dict[tuple[str, str], float] = {}

    def keep(key: tuple[str, str]) -> Callable[..., None]:
        def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found[key] = float(tensor_of(output).detach().float().abs().mean())

        return see

    modules = [(module, (quantity, block)) for module, quantity, block in observed(model, table)]
    for key, count in Counter(key for _, key in modules).items():
        if count > 1:
            raise UserError(f"roles {table.name!r} observe {count} modules as {' '.join(key)}: name one of them")
    handles = [module.register_forward_hook(keep(key)) for module, key in modules]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise UserError(f"roles {table.name!r} observe no module of the model: give `observe` patterns")
    return found
