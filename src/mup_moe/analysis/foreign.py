"""Which cells of a table cannot be compared with the rest, and which can but were trained elsewhere."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mup_moe.data.tokens import Tokens
from mup_moe.files import UserError
from mup_moe.training.version import VERSION

# What cells of one set-up must share, and what is said of those that do not.
SHARED = {"tokens_digest": "on other tokens", "version": "by another version", "precision": "in another precision"}
# What they may differ in, as it changes rounding only: what is said of a mixture, and of each part of it.
VARYING = {"device": ("devices", "on {}"), "torch": ("versions of torch", "with torch {}")}
_SHOWN = 3


def foreign_cells(
    requests: Mapping[str, str], summaries: Mapping[str, Mapping[str, Any]], tokens: Path | None
) -> dict[str, str]:
    """Which cells do not belong in one table with the rest: id -> why.

    requests: id -> the training request's digest by the config. summaries: id -> summary. tokens: the
    folder of the corpus by the config, if that is known.

    A cell of another request is foreign. Of the rest, those of one set-up must agree in tokens, version
    and precision. Where they do not, one group that agrees is at home and the others are foreign: the
    group on the tokens in that folder if there is one, then the one by this version, then the
    largest, then the first named. So nothing is foreign in a set that is alike throughout, whatever
    version made it; and what is deleted and trained anew joins the group at home, if it has its precision.

    Cells from different devices and different versions of torch and Python are not foreign to each other:
    these change rounding only. `mixtures` says where devices or versions of torch differ.
    """
    reasons = {}
    of_setup: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for name, summary in summaries.items():
        if summary["request"] != requests[name]:
            reasons[name] = "made under another config"
        else:
            groups = of_setup.setdefault(summary["cell"]["setup"], {})
            groups.setdefault(tuple(str(summary[key]) for key in SHARED), []).append(name)
    for groups in of_setup.values():
        home = _home(groups, tokens) if len(groups) > 1 else next(iter(groups))
        for group, names in groups.items():
            how = [told for told, ours, homes in zip(SHARED.values(), group, home, strict=True) if ours != homes]
            if how:
                reasons |= dict.fromkeys(names, f"trained {' and '.join(how)}")
    return {name: reasons[name] for name in summaries if name in reasons}


def mixtures(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each set-up whose cells differ in what `VARYING` names.

    rows: as of runs.csv.
    """
    of_setup: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        of_setup.setdefault(row["setup"], []).append(row)
    sentences = []
    for setup, alike in of_setup.items():
        differing = [key for key in VARYING if len({row[key] for row in alike}) > 1]
        if differing:
            several = " and ".join(f"several {VARYING[key][0]}" for key in differing)
            how = {row["cell"]: " ".join(VARYING[key][1].format(row[key]) for key in differing) for row in alike}
            sentences.append(f"cells of {setup} were trained on {several}: {told_by_reason(how)}")
    return sentences


def told_by_reason(reasons: Mapping[str, str]) -> str:
    """Cells by what is said of each, as a part of a sentence."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{len(names)} {reason} ({shortened(names)})" for reason, names in by_reason.items())


def shortened(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def _home(groups: Mapping[tuple[str, ...], list[str]], tokens: Path | None) -> tuple[str, ...]:
    today = _digest_of(tokens)
    return max(groups, key=lambda group: (group[0] == today, group[1] == str(VERSION), len(groups[group])))


def _digest_of(tokens: Path | None) -> str | None:
    """The digest of the tokens in a folder; None where there are none to train on."""
    try:
        return Tokens.open(tokens).digest if tokens is not None else None
    except UserError:
        return None
