"""Reads tables such as runs.csv, and arranges the losses of a figure as curves."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
import pandas as pd

from mup_moe.analysis.curve import ABSENT, Curve
from mup_moe.analysis.figure_spec import FigureSpec
from mup_moe.config.cell import AXES, Cell
from mup_moe.files import UserError, cannot_be_read

Row = TypeVar("Row")


def read_table(path: Path, columns: Mapping[str, type]) -> pd.DataFrame:
    """Reads a CSV that must have `columns`, each with its type: str, int, float or bool. Raises UserError.

    Other columns are text. Text is read literally, since a name may be "null", "007" or "1e5"; an empty field is "". An
    empty float field is NaN.
    """
    types = defaultdict(lambda: str, columns)
    missing = {name: ["", "nan"] for name, type_ in columns.items() if type_ is float}
    try:
        table = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=missing)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: make it first by naming it as a Snakemake target") from None
    except OSError as error:
        raise cannot_be_read(path, error) from None
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason}): delete it and run the same command again") from None
    absent = [column for column in columns if column not in table.columns]
    if absent:
        raise UserError(f"{path} lacks the column `{absent[0]}`: delete it and run the same command again")
    return table


def read_rows(path: Path, kind: Callable[..., Row]) -> list[Row]:
    """Reads a CSV as rows of a kind: a NamedTuple with the columns as fields. Raises UserError."""
    types = get_type_hints(kind)
    table = read_table(path, types)[list(types)]
    return [kind(*row) for row in table.itertuples(index=False, name=None)]


def read_runs(path: Path) -> pd.DataFrame:
    """Reads runs.csv, indexed by cell id. Raises UserError."""
    columns = {"cell": str, "status": str, "train_loss": float, "valid_loss": float}
    return read_table(path, columns).drop_duplicates("cell").set_index("cell")


def lacks(cell: Cell) -> UserError:
    """Returns the error for a figure's runs.csv that has no row for one of its cells."""
    return UserError(
        f"the runs lack cell {cell.id}, which the figure draws: delete its runs.csv and run the same command again"
    )


def figure_curves(runs: pd.DataFrame, spec: FigureSpec) -> dict[Any, dict[int, Curve]]:
    """Returns panel value -> curve value (ascending) -> curve; diverged cells are NaN.

    Cells that `runs` lacks are ABSENT if the config leaves out foreign cells. Otherwise they raise UserError.
    """
    figure = spec.figure
    ids = [cell.id for cell in figure.cells()]
    absent = next((cell for cell in figure.cells() if cell.id not in runs.index), None)
    if absent is not None and spec.analysis.foreign_cells == "stop":
        raise lacks(absent)
    chosen = runs.reindex(ids)
    losses = chosen[spec.analysis.loss].where(chosen["status"] == "finished").to_numpy(dtype=float)
    losses = np.where(chosen["status"].isna(), ABSENT, losses)
    # The cells are the product of the axes, so the losses are an array with one dimension per axis.
    # After dropping the learning rates of groups of roles that are not tuned, all but four axes have length one.
    array = losses.reshape([len(figure.axes.values(axis)) for axis in AXES])
    if not figure.tunes:
        array = array.take([0], axis=AXES.index("learning_rate_of"))
    order = [AXES.index(axis) for axis in (figure.panel, figure.curve, "seed", figure.rate)]
    losses_PCSR = np.moveaxis(array, order, range(4)).reshape([array.shape[axis] for axis in order])

    log2_rates = sorted(spec.log2_rates)
    ascending = [spec.log2_rates[rate] for rate in log2_rates]
    values = getattr(figure.axes, figure.curve)
    return {
        panel: {
            value: Curve(np.array(log2_rates), losses_PCSR[p, values.index(value)][:, ascending])
            for value in spec.values
        }
        for p, panel in enumerate(spec.panels)
    }
