"""Numbers in the prose of the pages: read from the recorded tables, and found in the text.

A page states a result in a sentence. The test has that sentence with `{}` in place of each number, and computes the
numbers from a recorded table: the filled sentence has to be in the page. Numbers that look like results and that no
such sentence covers are found by `uncovered`.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import pandas as pd

from conftest import ROOT
from mup_moe.analysis.names import MINUS, estimated

# A decimal number, or a whole one with a unit of results. Not versions (0.6.0), arXiv ids, or 1e-8 and 2^-5.
NUMBER = re.compile(
    r"(?<![\w.])(?!\d{4}\.\d{5}|\d+\.\d+\.\d)[-+±]?"
    r"(?:\d[\d,]*\.\d+(?!\w)|\d+(?= (?:nats|octaves|times|%|min|s)(?!\w)))"
)
LITERAL = re.compile(r"`[^`]*`|!\[[^]]*\]\([^)]*\)|\]\([^)]*\)|<[^>]*>")
ENDS = re.compile(r"(?<=[.:;!?|]) ")


def plain(text: str) -> str:
    """On one line, with hyphens for minus signs."""
    return " ".join(text.replace(MINUS, "-").split())


class Sentence(NamedTuple):
    """A sentence or row of a page, or a piece of one: `{}` for each number, and the numbers as they are written."""

    template: str
    numbers: tuple[str, ...]

    @property
    def filled(self) -> str:
        """The words that have to be in the page."""
        return plain(self.template.format(*self.numbers))


def says(template: str, *numbers: str) -> Sentence:
    """A sentence that states results; one string per `{}`."""
    assert template.count("{}") == len(numbers), (template, numbers)
    assert not NUMBER.search(template), f"a number in a template is not from the record: {template}"
    return Sentence(template, numbers)


# ------------------------------------------------------------------ pages


@cache
def blocks_of(page: str) -> tuple[str, ...]:
    """Paragraphs, list items, and rows of tables of a page: without fenced code and `**`, on one line each."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    text = re.sub(r"^(\s*)(- |\d\. )", r"\n\n\1\2", text, flags=re.M)
    text = re.sub(r"^(\s*\|.*)$", r"\n\1\n", text, flags=re.M)
    return tuple(plain(block) for block in re.split(r"\n\s*\n", text) if block.strip())


@cache
def text_of(page: str) -> str:
    """All of a page on one line, as `says` finds sentences in it."""
    return "\n".join(blocks_of(page)).replace("**", "")


def states(page: str, words: str) -> bool:
    """Whether the words are in the page, in one paragraph, list item or row."""
    return words in text_of(page)


def uncovered(page: str, covered: Iterable[str], tables: Iterable[str] = ()) -> Iterator[str]:
    """The pieces of a page with a number that is in none of the covered words.

    Left out: paragraphs that begin with **Predicted, along with a table below, and tables whose header begins with one
    of `tables`.
    """
    covered = list(covered)
    skipping = False
    for block in blocks_of(page):
        row = block.startswith("|")
        predicted = block.startswith("**Predicted")
        skipping = predicted or (row and (skipping or block.startswith(tuple(tables))))
        if skipping:
            continue
        block = block.replace("**", "")
        known = [
            range(found.start(), found.end()) for words in covered for found in re.finditer(re.escape(words), block)
        ]
        words_alone = LITERAL.sub(lambda match: " " * len(match[0]), block)
        for number in NUMBER.finditer(words_alone):
            if not any(number.start() in span for span in known):
                start = max([0, *(end.end() for end in ENDS.finditer(block, 0, number.start()))])
                stop = next((end.start() for end in ENDS.finditer(block, number.end())), len(block))
                yield f"{number[0]} in: {block[start:stop]}"


# ------------------------------------------------------------------ the record


@cache
def table(path: str) -> pd.DataFrame:
    """A CSV file of results/recorded, or of benchmarks where it is not there."""
    recorded = ROOT / "results/recorded" / path
    return pd.read_csv(recorded if recorded.exists() else ROOT / "benchmarks" / path)


def rows(path: str, **where: Any) -> pd.DataFrame:
    """The rows of a table with these values in these columns, in its order; there has to be one."""
    found = table(path)
    for column, value in where.items():
        found = found[found[column] == value]
    assert len(found), f"{path} has no row with {where}"
    return found


def one(path: str, column: str, **where: Any) -> float:
    """The one value that a column has in these rows."""
    (value,) = rows(path, **where)[column].unique()
    return float(value)


def optima(sweep: str, figure: str) -> str:
    """Where a sweep has the optima of a figure: all in one file, or a file for each figure."""
    own = f"{sweep}/{figure}/optima.csv"
    return own if (ROOT / "results/recorded" / own).exists() else f"{sweep}/optima.csv"


def drift(sweep: str, figure: str, panel: str) -> str:
    """The drift of a panel, in octaves per octave: "−1.01"."""
    return estimated(one(optima(sweep, figure), "drift", figure=figure, panel=panel))


def bounded_drift(sweep: str, figure: str, panel: str) -> str:
    """The drift of a panel with its interval: "−1.01 [−1.19, −0.83]"."""
    return bounded(rows(optima(sweep, figure), figure=figure, panel=panel), "drift", "drift_low", "drift_high")


def regret(sweep: str, figure: str, panel: str) -> float:
    """What the base's best learning rate costs at the far end of the axis, in nats."""
    return float(rows(optima(sweep, figure), figure=figure, panel=panel)["regret"].iloc[-1])


def judged(sweep: str, panel: str, column: str = "excess", **where: Any) -> list[float]:
    """What tests of claims found for a panel: a value per test that has one, without repetition."""
    found = rows(f"{sweep}/claims/tests.csv", panel=panel, **where)[column].dropna()
    return list(dict.fromkeys(map(float, found)))


def attributed(sweep: str, figure: str, panel: str, column: str) -> float:
    """A number of a row of an attribution."""
    return one(f"{sweep}/{figure}/attribution.csv", column, panel=panel)


def sensitivity(folder: str, group: str, octaves: int) -> float:
    """Returns the nats lost where a group's learning rate is this many octaves off."""
    found = rows(f"{folder}/sensitivity.csv", group=group, log2_factor=octaves)
    return float(found["lost"].iloc[0])


def slopes(path: str, column: str = "slope", **where: Any) -> list[float]:
    """The slopes of a probe."""
    return [float(value) for value in rows(path, **where)[column].dropna()]


def bounded_slope(path: str, quantity: str, block: int, step: int) -> str:
    """A slope of Lemma B.1 with its interval."""
    return bounded(rows(path, parametrization="mup", quantity=quantity, block=block, step=step), "slope", "low", "high")


# ------------------------------------------------------------------ how numbers are written


def bounded(found: pd.DataFrame, *columns: str) -> str:
    """An estimate and its interval: "−1.01 [−1.19, −0.83]"."""
    value, low, high = (estimated(float(found[column].iloc[0])) for column in columns)
    return f"{value} [{low}, {high}]"


def signed_all(values: Iterable[float]) -> list[str]:
    """Numbers with their signs and two decimals."""
    return [estimated(value) for value in values]


def nats(value: float, decimals: int = 2) -> str:
    """A number without its sign."""
    return f"{abs(value):.{decimals}f}"


def ends(values: Iterable[float], decimals: int = 2) -> tuple[str, str]:
    """The least and the greatest, without signs, for "0.20 to 0.24"."""
    ordered = sorted(map(abs, values))
    return nats(ordered[0], decimals), nats(ordered[-1], decimals)


def signed_ends(values: Iterable[float]) -> tuple[str, str]:
    """The least and the greatest, with signs."""
    ordered = sorted(values)
    return estimated(ordered[0]), estimated(ordered[-1])


# ------------------------------------------------------------------ benchmarks


def ratios(architecture: str, instructions: str, column: str = "ratio", decimals: int = 1) -> list[str]:
    """Of benchmarks/step.csv: our default's tokens/s over the best stock peer's, a number per width.

    `column` is ratio_same_allocator where the peer gets our allocator too.
    """
    found = rows("step.csv", system="mup-moe", default="yes", architecture=architecture, instructions=instructions)
    return [f"{value:.{decimals}f}" for value in found.sort_values("width")[column]]


def ratios_to(system: str, architecture: str, instructions: str, decimals: int = 1, **where: Any) -> list[str]:
    """Of benchmarks/step.csv: our default's tokens/s over those of the best of some variants of a peer."""
    ours = rows("step.csv", system="mup-moe", default="yes", architecture=architecture, instructions=instructions)
    peer = rows("step.csv", system=system, architecture=architecture, instructions=instructions, **where)
    speed = "tokens_per_second"
    quotient = ours.set_index("width")[speed] / peer.groupby("width")[speed].max()
    return [f"{value:.{decimals}f}" for value in quotient.sort_index()]


def duration(seconds: float) -> str:
    """Seconds as "3 min 28 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def percent(value: float, decimals: int = 0) -> str:
    """A share, as the number before "%"."""
    return f"{100 * value:.{decimals}f}"
