"""The coordinate check for your own model (Tensor Programs V, section D.1 and figure 5)."""

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
    """The results of a coordinate check: the sizes of activations and their slopes over the width.

    Under a rule that transfers, no activation grows with the width. Under muP, the router logits and output logits fall
    with slope -1/2 before the first step. Printing the object shows the slopes after the last step.

    values: a table with a row per width, seed, step, quantity and block, with the mean absolute entry as `value`.
    slopes: the slopes of log2 of the values on log2 of the width, with Student's intervals.
    """

    def __init__(self, values: pd.DataFrame, confidence: float) -> None:
        self.values = values
        self.slopes: list[Slope] = list(slopes(values, confidence))

    def table(self) -> pd.DataFrame:
        """Returns the slopes as a table with a row per quantity, block and step."""
        return pd.DataFrame(self.slopes)

    def save(self, path: str | Path) -> None:
        """Draws the values over the widths, with a line per step, and writes PATH.pdf and PATH.png."""
        # Only this method needs the drawing packages.
        from mup_moe.figures.activations import draw_activations
        from mup_moe.figures.style import drawing_style, save

        with drawing_style():
            save(draw_activations(self.values, self.slopes), Path(path))

    def __str__(self) -> str:
        """Formats the slopes after the last step."""
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
    """Returns the mean cross-entropy, in nats, of predicting each next token of `tokens` [B, S].

    The model must return logits [B, S, V], or an output that has them as `logits`, as transformers models do.
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
    """Trains models of several widths for a few steps and measures the size of their activations.

    The role table says which activations to observe (Tensor Programs V, section D.1 and figure 5). They are measured
    before the first step and after every step, always on the first batch, so that only the model changes.

    make_model: returns the model of a given width. widths: at least two widths. batches: one batch per training step.
    rules, roles: as for `parametrize`. lr: Adam's learning rate at `base_width`. seeds: each seed trains one model per
    width. loss: returns the loss of a model on a batch, by default the cross-entropy of the next token. base_width: the
    width of the base model, by default the smallest width. confidence: the level of the slopes' intervals. more:
    further keyword arguments of `parametrize`, such as `sizes`.

    Raises UserError if there are fewer than two widths, or no seed or batch; if the role table observes no module, or
    several modules as the same quantity and block; and as `parametrize` does.
    """
    widths, seeds, batches = sorted(set(map(int, widths))), sorted(set(map(int, seeds))), list(batches)
    if len(widths) < 2 or widths[0] < 1 or not batches or not seeds:
        raise UserError("a coordinate check needs at least two positive widths, one seed, and a batch for each step")
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence!r} but must be between 0 and 1")
    row = rules_of(rules)
    base = make_model(widths[0] if base_width is None else base_width)
    table = roles_of(roles, getattr(getattr(base, "config", None), "model_type", None))
    rows: list[tuple[Any, ...]] = []
    for width, seed in itertools.product(widths, seeds):
        with torch.random.fork_rng():
            # Seeds dropout, for example.
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
    """Returns the mean absolute entry of each output that the role table observes, by quantity and block."""
    found: dict[tuple[str, str], float] = {}

    def keep(key: tuple[str, str]) -> Callable[..., None]:
        def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found[key] = float(tensor_of(output).detach().float().abs().mean())

        return see

    modules = [(module, (quantity, block)) for module, quantity, block in observed(model, table)]
    for key, count in Counter(key for _, key in modules).items():
        if count > 1:
            raise UserError(
                f"the role table {table.name!r} observes {count} modules as {' '.join(key)}: make the pattern in its"
                " `observe` match only one"
            )
    handles = [module.register_forward_hook(keep(key)) for module, key in modules]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise UserError(f"the role table {table.name!r} observes no module of the model: add patterns to its `observe`")
    return found
