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
    category: the heading in the report; they are sorted. {heading} is that of a figure's subject (HEADINGS).
    caption: what to look for, in the report, as reStructuredText; a long one is in workflow/report/figure.rst instead.
    of: the section of the config whose entries are of this kind.
    """

    reads: tuple[str, ...]
    category: str
    caption: str = ""
    of: Literal["figures", "compositions", "probes"] = "figures"


# By what a figure is about: the curves' axis, or models that are all dense.
HEADINGS = {
    "width": "2 Learning-rate transfer over widths",
    "experts": "3 Experts and granularity",
    "granularity": "3 Experts and granularity",
    "dense": "4 Dense models",
}
_TRANSFER_READS = ("{figure}/runs.csv", "{figure}/optima.csv", "{reference}/reference.csv")
_PROBE_READS = ("{name}/w{width}.csv", "{name}.csv")

KINDS = {
    "transfer": Kind(reads=_TRANSFER_READS, category="{heading}"),
    "composition": Kind(reads=_TRANSFER_READS, category="{heading}", of="compositions"),
    "activations": Kind(reads=_PROBE_READS, category="5 Coordinate check", of="probes"),
    "covariance": Kind(reads=_PROBE_READS, category="6 Lemma B.1", of="probes"),
}
