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
    that it shows, {reference} for those that have a `reference`, {cell} for each of their cells, {width} for each
    width of a probe.
    caption, category: what to look for, and the heading, in the report; its headings are sorted. Both may speak of
    the {name}, the caption is reStructuredText, and {subject} is a figure's `Subject`.
    of: the section of the config whose entries are of this kind.
    """

    reads: tuple[str, ...]
    caption: str
    category: str
    of: Literal["figures", "compositions", "probes"] = "figures"


@dataclass(frozen=True)
class Subject:
    """What a figure is about, for its caption and heading."""

    heading: str
    curves: str
    look: str


_MANY = """Look at whether the optima stay on the dotted line, which marks the base model's. Over the number of
experts the paper says that they do; over granularity, more and smaller experts at the same compute,
that they do not, since no rule of its table follows granularity."""
# By the curves' axis; of dense models alone, "dense".
SUBJECTS = {
    "width": Subject(
        "2 Learning-rate transfer over widths",
        "width",
        """Look at where the optima lie. If they stay on the dotted line, the base width's best learning rate
transfers; if they move to the left of it, it is too large for the wider models. Compare the panels: SP
should drift, simpleP and μP should not. simpleP and μP differ in the router alone, and these curves can
hardly tell them apart: the coordinate check and Lemma B.1 can.""",
    ),
    "experts": Subject("3 Experts and granularity", "number of experts or granularity", _MANY),
    "granularity": Subject("3 Experts and granularity", "granularity", _MANY),
    "dense": Subject(
        "4 Dense models",
        "width of a dense model",
        """The same question without experts: look at whether the optima leave the dotted line under SP and
stay near it under μP. A slight shift upwards under μP is what the paper saw too.""",
    ),
}

_TRANSFER = """**{name}**: loss against learning rate, a curve per
{subject.curves},
with its optimum marked and the optima joined by a line. A bar through an optimum is its interval.

{subject.look}

The line under each panel's name holds the drift, and the regret at the far end of the axis. Marks in the grey
strip are runs that diverged, lie above the scale, or are missing since they were left out (`?`). A hollow diamond is a
best learning rate at the end of what was measured or converged, so that the true one may lie beyond it. Hollow
circles, where there are any, are published losses."""
_TRANSFER_READS = ("{figure}/runs.csv", "{figure}/optima.csv", "{reference}/reference.csv")
_PROBE_READS = ("{name}/w{width}.csv", "{name}.csv")

KINDS = {
    "transfer": Kind(reads=_TRANSFER_READS, caption=_TRANSFER, category="{subject.heading}"),
    "composition": Kind(reads=_TRANSFER_READS, caption=_TRANSFER, category="{subject.heading}", of="compositions"),
    "activations": Kind(
        reads=_PROBE_READS,
        caption="""The coordinate check: how the size of each activation depends on width, over the first training
steps. Look for lines that are flat: an activation whose slope on width (log₂ on log₂) stays near 0 keeps its size
however wide the model. Under SP slopes should rise within a few steps, above all those of the router's and
the output's logits; under μP none should. An activation that shrinks at initialisation and then holds is
no fault: output weights start small.""",
        category="5 Coordinate check",
        of="probes",
    ),
    "covariance": Kind(
        reads=_PROBE_READS,
        caption="""Lemma B.1 measured: the inner product of an expert's output and the gradient that it receives, and
the router's logits, against width, over the first training steps. Look at the slope of the inner product
(log₂ on log₂): near \N{MINUS SIGN}1/2 at step 0, where expert and gradient are independent, and near 0 once a few steps
have aligned them. That is the size of gradient for which a router is an output weight, and the reason why
μP and simpleP treat it differently. Then compare the router's logits across the panels: the loss curves
cannot tell these rules apart, this can.""",
        category="6 Lemma B.1",
        of="probes",
    ),
}
