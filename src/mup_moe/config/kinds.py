"""The kinds of figures. To add one, add a line to KINDS and a module of its name that has `draw`.

Imports the standard library only, so that a Snakefile can import it.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a kind of figure reads, and its place and caption in the report; the module `mup_moe.figures.KIND` draws it.

    That module has `draw(config, name, results) -> Figure`, called within `style.drawing_style`.

    reads: files in the results folder. {name} is the figure's own name; {figure} stands for one file per figure that
    it shows, {reference} for one per figure with a `reference`, {cell} for one per cell.
    category: the heading in the report, which sorts them. {heading} is that of the figure's subject (HEADINGS).
    axes: the axes that may have several values, besides panel, curve, learning_rate and seed.
    caption: what to look for, as reStructuredText for the report; long ones are in workflow/report/figure.rst instead.
    of: the section of the config whose entries have this kind.
    table: whether the command of the kind's name makes a table of a figure, RESULTS/NAME/KIND.csv, .md and .html.
    """

    reads: tuple[str, ...]
    category: str
    axes: tuple[str, ...] = ()
    caption: str = ""
    of: Literal["figures", "compositions", "trends", "comparisons", "probes"] = "figures"
    table: bool = False


# By the subject of a figure: the axis of its curves, or "dense" if all its models are.
HEADINGS = {
    "width": "2 Learning-rate transfer over widths",
    "experts": "3 Experts and granularity",
    "granularity": "3 Experts and granularity",
    "dense": "4 Dense models",
}
BEYOND = "8 Beyond the paper"
_TRANSFER_READS = ("{figure}/runs.csv", "{figure}/optima.csv", "{reference}/reference.csv")
_PROBE_READS = ("{name}/values.csv", "{name}.csv")

ATTRIBUTION = """
How much each group of roles contributes to transfer. A row *without* a group leaves that group as under SP; a row
*only* with a group leaves everything else as under SP. Look at the rows that lack what a claim is about. If such a row
is inside both gray bands, as the rule itself is, this sweep cannot tell whether the rule is right there.
"""
SENSITIVITY = """
How sensitive this set-up is: the loss in nats when one group of roles is trained at a different learning rate. Look for
lines that stay below the dotted one. A sweep with this set-up says nothing about their roles.
"""
TREND = """
The drift of the best learning rate over widths against the number of training steps, one line per base width. Transfer
is a statement about a limit: look at whether the drift approaches 0 with more steps and a wider base.
"""
COMPARISON = """
Rules compared on the same seeds: how far the best learning rate moves over the axis, what keeping the base model's rate
costs at the far end, and how the loss there differs from that of the first rule. Look for intervals that exclude 0.
"""
CONTRIBUTIONS = """
What an MoE layer adds to the residual stream at initialization, and how the first training steps change it through the
tensors of one role, for the same tokens. The upper panels show its size over the axis; the lower ones its slope by step
(log₂ on log₂). Look at which rules keep every contribution constant, and at the dotted lines, which are predictions.
"""

KINDS = {
    "transfer": Kind(reads=_TRANSFER_READS, category="{heading}"),
    "attribution": Kind(
        reads=("{figure}/attribution.csv",),
        category="{heading}",
        caption=ATTRIBUTION,
        table=True,
    ),
    "sensitivity": Kind(
        reads=("{figure}/sensitivity.csv",),
        category="{heading}",
        axes=("learning_rate_of",),
        caption=SENSITIVITY,
        table=True,
    ),
    "trend": Kind(reads=("{figure}/optima.csv",), category=BEYOND, caption=TREND, of="trends"),
    "composition": Kind(reads=_TRANSFER_READS, category="{heading}", of="compositions"),
    "comparison": Kind(
        reads=("{name}/comparison.csv",),
        category=BEYOND,
        caption=COMPARISON,
        of="comparisons",
        table=True,
    ),
    "activations": Kind(reads=_PROBE_READS, category="5 Coordinate check", of="probes"),
    "covariance": Kind(reads=_PROBE_READS, category="6 Lemma B.1", of="probes"),
    "contributions": Kind(reads=_PROBE_READS, category=BEYOND, caption=CONTRIBUTIONS, of="probes"),
}
