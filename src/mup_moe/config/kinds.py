"""The kinds of figures. A new one is a line of KINDS and a module of its name, which has `draw`.

Standard library only, so that a Snakefile can import it.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a kind of figure reads, and what the report says of it; the module `mup_moe.figures.KIND` draws it.

    That module has `draw(config, name, results) -> Figure`, called within `style.drawing_style`.

    reads: files in the folder of results. {name} is the figure's own name; {figure} means one file for each figure
    that it shows, {reference} for those that have a `reference`, {cell} for each of their cells.
    category: the heading in the report; they are sorted. {heading} is that of a figure's subject (HEADINGS).
    axes: what may have several values, besides panel, curve, learning_rate and seed.
    caption: what to look for, in the report, as reStructuredText; a long one is in workflow/report/figure.rst instead.
    of: the section of the config whose entries are of this kind.
    table: whether the command of the kind's name makes a table of a figure, RESULTS/NAME/KIND.csv, .md and .html.
    """

    reads: tuple[str, ...]
    category: str
    axes: tuple[str, ...] = ()
    caption: str = ""
    of: Literal["figures", "compositions", "trends", "comparisons", "probes", "claims"] = "figures"
    table: bool = False


# By what a figure is about: the curves' axis, or models that are all dense.
HEADINGS = {
    "width": "2 Learning-rate transfer over widths",
    "experts": "3 Experts and granularity",
    "granularity": "3 Experts and granularity",
    "dense": "4 Dense models",
}
_TRANSFER_READS = ("{figure}/runs.csv", "{figure}/optima.csv", "{reference}/reference.csv")
_PROBE_READS = ("{name}/values.csv", "{name}.csv")

ATTRIBUTION = """
What each group of roles contributes to transfer. A row *without* a group leaves it as under SP, a row *only* with it
leaves everything else so. Look at the rows that lack what a claim is about: where such a row lies in both grey bands,
as the rule itself does, this sweep cannot tell whether the rule is right there.
"""
SENSITIVITY = """
What this set-up sees: the nats that it loses when one group of roles is trained with another learning rate. Look for
lines that stay below the dotted one: of their roles a sweep of this set-up says nothing.
"""
TREND = """
The drift of the best learning rate over widths, against the steps of training, a line per base width. Transfer is a
statement about a limit: look at whether the drift comes closer to 0 with more steps and from a wider base.
"""
COMPARISON = """
Rules side by side, on the same seeds: how the best learning rate moves over the axis, what keeping that of the base
costs at its far end, and how the loss there differs from that of the first rule. Look for intervals that exclude 0.
"""
CONTRIBUTIONS = """
What an MoE layer adds to the residual stream at initialisation, and what the first steps of training change in it
through the tensors of one role, for the same tokens. Above its size over the axis; below its slope by step (log₂ on
log₂). Look at which of the rules keep all of it, and at the dotted lines, which are predicted.
"""

CLAIMS = """
Every test of every claim: drifts of the best learning rate, what transferring it costs (excess), and for Lemma B.1 the
slopes minus their predictions. A test passes in the grey bands, or, for SP, outside of them. Look at the controls: each
is wrong in what its claim is about, so it has to fail. Where one passes, this sweep cannot tell.
"""

KINDS = {
    "claims": Kind(reads=("{name}/tests.csv",), category="1 Claims", caption=CLAIMS, of="claims"),
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
    "trend": Kind(reads=("{figure}/optima.csv",), category="{heading}", caption=TREND, of="trends"),
    "composition": Kind(reads=_TRANSFER_READS, category="{heading}", of="compositions"),
    "comparison": Kind(
        reads=("{name}/comparison.csv",),
        category="{heading}",
        caption=COMPARISON,
        of="comparisons",
        table=True,
    ),
    "activations": Kind(reads=_PROBE_READS, category="5 Coordinate check", of="probes"),
    "covariance": Kind(reads=_PROBE_READS, category="6 Lemma B.1", of="probes"),
    "contributions": Kind(reads=_PROBE_READS, category="3 Experts and granularity", caption=CONTRIBUTIONS, of="probes"),
}
