"""Describes the figures of a config: their kinds, the files that drawing them reads, and their place in the report.

Uses only the standard library and the config, so that a Snakefile can import it. A figure here is anything that is
drawn: one of the config's figures, compositions, trends, comparisons or probes.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from mup_moe.analysis.figure_spec import FigureSpec
from mup_moe.config.cell import ARCHITECTURES
from mup_moe.config.kinds import BEYOND, HEADINGS, KINDS
from mup_moe.config.settings import Config, SlopeTest
from mup_moe.files import UserError


def all_names(config: Config) -> list[str]:
    """Returns the names of everything that can be drawn."""
    return list(config.kinds)


def drawn_in_paper(config: Config) -> list[str]:
    """Returns what the whole paper draws; a figure in a composition or a trend is drawn only as part of that."""
    parts = {part for parts in (config.compositions | config.trends).values() for part in parts}
    return [name for name in all_names(config) if name not in parts]


def kind_of(config: Config, name: str) -> str:
    """Returns the kind of a figure: a key of KINDS. Raises UserError if the config has no such figure."""
    if name not in config.kinds:
        raise UserError(f"the config has no figure {name!r}: choose from {', '.join(all_names(config))}")
    return config.kinds[name]


def files_of(config: Config, name: str) -> list[str]:
    """Returns the files in the results folder that drawing a figure reads."""
    parts = _parts(config, name)
    each: dict[str, Callable[[], Iterable[Any]]] = {
        "figure": lambda: parts,
        "reference": lambda: [part for part in parts if config.figures[part].reference is not None],
        "cell": lambda: dict.fromkeys(cell.id for part in parts for cell in config.figures[part].cells()),
        "name": lambda: [name],
    }
    found = []
    for pattern in KINDS[kind_of(config, name)].reads:
        words = [word for word in each if f"{{{word}}}" in pattern]
        values = each[words[0]]() if words else [None]
        found += [pattern.format_map({"name": name} | dict.fromkeys(words, value)) for value in values]
    return found


def inputs_of_table(config: Config, name: str) -> list[str]:
    """Returns the files in the results folder from which the table of a figure's kind is made."""
    return [f"{part}/{table}.csv" for part in _parts(config, name) for table in ("runs", "optima")]


def settings_of(config: Config, name: str) -> str:
    """Returns everything that a figure depends on besides those files and the code, as JSON."""
    probe = config.probes.get(name)
    figures = {part: FigureSpec.of(config, part).settings for part in _parts(config, name)}
    claims = config.claims
    margins = (claims.drift_margin, claims.excess_margin, claims.slope_margin)
    parts: dict[str, Any] = {
        "kind": kind_of(config, name),
        "figures": figures,
        "probe": probe and asdict(probe),
        "margins": margins,
    }
    if name in config.comparisons:
        parts["rules"] = {title: asdict(rule) for title, rule in config.comparisons[name].items()}
    if probe:
        parts["slopes"] = [asdict(slope) for slope in predicted(config, name)]
    return json.dumps(parts)


def predicted(config: Config, probe: str) -> list[SlopeTest]:
    """Returns the slope tests that the claims have for a probe."""
    return [slope for claim in config.claims.table.values() for slope in claim.slopes if slope.probe == probe]


def caption_of(config: Config, name: str) -> tuple[str, str | None, str]:
    """Returns the parts of a figure's caption in the report: its kind, its subject and the caption text."""
    kind, figure = kind_of(config, name), config.figures.get(name)
    caption = KINDS[kind].caption
    if figure and figure.tunes:
        caption += (
            f"The learning rate here is that of the {figure.tunes} only, as a factor on the value from their rule."
        )
    return kind, _subject(config, name), caption


def category_of(config: Config, name: str) -> str:
    """Returns the heading under which the report lists a figure."""
    if _is_beyond_the_paper(config, name):
        return BEYOND
    subject = _subject(config, name)
    return KINDS[kind_of(config, name)].category.format(name=name, heading=subject and HEADINGS[subject])


def _is_beyond_the_paper(config: Config, name: str) -> bool:
    """Whether a figure is about another architecture, an axis of ours, one role's learning rate, or rules compared."""
    parts, probe = _parts(config, name), config.probes.get(name)
    compared = {part for title in (*config.comparisons, *config.trends) for part in config.parts[title]}
    # A figure that a claim rests on stays where its claim is, also if a trend or a comparison shows it again.
    compared -= set(config.claims.figures)
    shown = [config.figures[part] for part in parts]
    built = {name for entry in ([probe] if probe else shown) for name in entry.axes.architecture}
    return (
        not compared.isdisjoint(parts)
        or any(figure.tunes for figure in shown)
        or (probe is not None and probe.over != "width")
        or not built.issubset(ARCHITECTURES)
    )


def _parts(config: Config, name: str) -> tuple[str, ...]:
    """Returns the figures of the config that a figure shows: itself, a composition's parts, or none."""
    section = KINDS[kind_of(config, name)].of
    return () if section in ("probes", "claims") else config.parts.get(name, (name,))


def _subject(config: Config, name: str) -> str | None:
    """Returns the subject of a figure, or of a composition's first part: a key of HEADINGS; None for a probe."""
    for part in _parts(config, name)[:1]:
        figure = config.figures[part]
        return "dense" if figure.axes.architecture == ("dense",) else figure.curve
    return None
