"""The kinds of figures. A new one needs an entry in KINDS and a module of the same name with `draw`.

Uses only the standard library, so that a Snakefile can import it.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The files that a kind of figure reads, and its text in the report; the module `mup_moe.figures.KIND` draws it.

    That module has `draw(config, name, results) -> Figure`, which is called within `style.drawing_style`.

    reads: files in the results folder. {name} is the figure's own name. {figure} stands for one file per figure that it
    shows, {reference} for one per figure with a `reference`, and {cell} for one per cell.
    category: the heading in the report, where headings are sorted. {heading} is that of a figure's subject (HEADINGS).
    axes: the axes that may have several values, besides panel, curve, learning_rate and seed.
    caption: what to look for in the figure, as reStructuredText in the report; a long one is in
    workflow/report/figure.rst instead.
    of: the section of the config with entries of this kind.
    table: whether the command with the kind's name makes a table of a figure, RESULTS/NAME/KIND.csv, .md and .html.
    """

    reads: tuple[str, ...]
    category: str
    axes: tuple[str, ...] = ()
    caption: str = ""
    of: Literal["figures", "compositions", "trends", "comparisons", "probes", "claims"] = "figures"
    table: bool = False


# Headings by a figure's subject: the axis of its curves, or "dense" if all models are dense.
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
The contribution of each group of roles to transfer. A row *without* a group leaves that group as under SP; a row with
*only* a group leaves everything else as under SP. Look at the rows that lack what a claim is about: if such a row is in
both gray bands, as the rule itself is, this sweep cannot tell whether the rule is right for that group.
"""
SENSITIVITY = """
What this set-up can see: the nats that it loses when one group of roles is trained with another learning rate. Look for
lines that stay below the dotted one: a sweep of this set-up shows nothing about their roles.
"""
TREND = """
The drift of the best learning rate over widths against the number of training steps, with a line per base width.
Transfer is a statement about a limit: check whether the drift approaches 0 with more steps and from a wider base.
"""
COMPARISON = """
Rules side by side, on the same seeds: how the best learning rate moves over the axis, what the base's best learning
rate costs at the far end, and how the loss there differs from that of the first rule. Look for intervals that exclude
0.
"""
CONTRIBUTIONS = """
What an MoE layer adds to the residual stream at initialization, and how the first training steps change it through the
tensors of one role, for the same tokens. Above: its size over the axis. Below: its slope by step (log₂ on log₂). Check
which rules keep all sizes constant, and compare with the dotted lines, which are predictions.
"""

VERDICTS = """
Every test of every claim: drifts of the best learning rate, what transferring it costs (excess), and for Lemma B.1 the
slopes minus their predictions. A best learning rate that should stay passes inside the gray bands; one that should
move (C1, C5, and SP in C6) passes outside. Look at the controls: each is wrong in what its claim is about, so it has to
fail. If one passes, this sweep cannot tell.
"""

KINDS = {
    "verdicts": Kind(reads=("claims/tests.csv",), category="1 Claims", caption=VERDICTS, of="claims"),
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
