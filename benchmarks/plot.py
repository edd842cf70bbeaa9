"""Draws all benchmarks in one figure: python benchmarks/plot.py [--folder benchmarks].

Reads the CSVs that exist in the folder, and those of a GPU in its gpu/, and writes benchmarks.png into the folder.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from mup_moe.figures.plotting import Axes, FuncFormatter, LogLocator, NullFormatter, NullLocator  # noqa: E402
from mup_moe.figures.plotting import pyplot as plt  # noqa: E402

OURS, PEER, ALIKE, LEAST = "#0072B2", "#D55E00", "#E69F00", "#999999"
COMPILED = "#009E73"
TIMES = "\N{MULTIPLICATION SIGN}"
MARKERS = {"width": "o", "batch_size": "v", "experts": "s", "granularity": "^", "replicas": "D"}
PEER_NAME = {"moe": "Mixtral", "dense": "Llama"}


def _by_two(axes: Axes, values: pd.Series, label: str) -> None:
    """Makes the horizontal axis logarithmic, with the values as ticks."""
    ticks = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(ticks[0] / 1.4, ticks[-1] * 1.4)
    axes.set_xlabel(label)


def read(path: Path) -> pd.DataFrame:
    """Reads the table of a benchmark. Empty fields become NaN; the names of figures stay text."""
    return pd.read_csv(path, dtype={"figure": str}, keep_default_na=False, na_values=[""])  # noqa: TID251


def with_all_instructions(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows measured with all of the machine's instructions, which come first in the table."""
    if "instructions" not in table:
        return table
    return table[table["instructions"].isin(table["instructions"].iloc[:1])]


def best(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Returns the row with the largest value at each width."""
    return rows.loc[rows.groupby("width")[column].idxmax()].sort_values("width")


def peers(rows: pd.DataFrame, allocator: str) -> pd.DataFrame:
    """Returns the fastest peer at each width, among those that keep float32 weights."""
    fit = (rows["system"] == "transformers") & ~rows["precision"].str.endswith("-weights")
    return best(rows[fit & (rows["allocator"] == allocator)], "tokens_per_second")


def draw_rates(axes: Axes, table: pd.DataFrame, architecture: str) -> None:
    """Draws tokens/s against width."""
    rows = table[table["architecture"] == architecture]
    default = rows[rows["default"] == "yes"].sort_values("width")
    compiled = rows[(rows["system"] == "mup-moe") & (rows["step"] != "eager") & (rows["default"] == "no")]
    lines = [(default, OURS, "o-", "ours, as the pipeline trains")]
    if len(compiled):
        lines.append((best(compiled, "tokens_per_second"), COMPILED, "v--", "ours, compiled"))
    name = PEER_NAME[architecture]
    lines.append((peers(rows, "stock"), PEER, "s-", f"{name}, its best"))
    lines.append((peers(rows, "kept"), ALIKE, "s:", f"{name}, its best, our allocator"))
    for line, color, style, label in lines:
        axes.plot(line["width"], line["tokens_per_second"] / 1e3, style, color=color, label=label, ms=5)
    for _, row in default.iterrows():
        axes.annotate(
            f"{row['ratio']:.2f}{TIMES}",
            (row["width"], row["tokens_per_second"] / 1e3),
            (8, 5),
            textcoords="offset points",
            ha="center",
            color=OURS,
            fontsize=9,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 1.35)
    _by_two(axes, rows["width"], "width")
    axes.set_ylabel("thousand tokens/s")
    axes.set_title(f"Training step, {'MoE' if architecture == 'moe' else 'dense'} ({TIMES} of {name}'s best)")
    axes.legend(loc="lower left")


def draw_ratios(axes: Axes, table: pd.DataFrame) -> None:
    """Draws how many times as fast as the best peer we are, with the goals."""
    every = table[(table["architecture"] == "moe") & (table["system"] == "mup-moe")]
    rows = with_all_instructions(every)
    default = rows[rows["default"] == "yes"].sort_values("width")
    run = best(rows, "ratio_of_run")
    lines = [
        (default, "ratio", OURS, "o-", "ours as the pipeline trains"),
        (default, "ratio_same_allocator", ALIKE, "s:", "the same, Mixtral with our allocator"),
        (run, "ratio_of_run", COMPILED, "v--", "a run at its best, compilation counted"),
    ]
    if len(fewer := every[(every["default"] == "yes") & ~every.index.isin(rows.index)].sort_values("width")):
        name = f"{fewer['instructions'].iloc[0]} alone ({fewer['precision'].iloc[0]})"
        lines.append((fewer, "ratio", PEER, "^-", f"ours and Mixtral, {name}"))
    for line, column, color, style, label in lines:
        axes.plot(line["width"], line[column], style, color=color, label=label, ms=5)
    goals = run.dropna(subset="goal_ratio_of_run")
    if len(goals):
        axes.plot(
            goals["width"], goals["goal_ratio_of_run"], "_", color="black", ms=18, mew=2, label="goal of such a run"
        )
    axes.axhline(1, color=LEAST, lw=1)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.45)
    _by_two(axes, rows["width"], "width")
    axes.set_ylabel("tokens/s, times Mixtral's")
    axes.set_title("MoE step against Mixtral's best")
    axes.legend(loc="upper left")


def draw_fractions(axes: Axes, table: pd.DataFrame) -> None:
    """Draws the share of the matmul rate that training FLOPs reach."""
    for architecture, style in (("moe", "-"), ("dense", "--")):
        rows = table[table["architecture"] == architecture]
        if rows.empty:
            continue
        default = rows[rows["default"] == "yes"].sort_values("width")
        for line, color, name in ((default, OURS, "ours"), (peers(rows, "stock"), PEER, PEER_NAME[architecture])):
            kind = "MoE" if architecture == "moe" else "dense"
            precisions = "/".join(line["precision"].unique())
            label = f"{name}, {kind} ({precisions})"
            axes.plot(line["width"], line["fraction_of_matmul"] * 100, "o" + style, color=color, label=label, ms=5)
    axes.set_ylim(0, max(100, axes.get_ylim()[1]) * 1.25)
    axes.axhline(100, color=LEAST, lw=1)
    _by_two(axes, table["width"], "width")
    axes.set_ylabel("% of the matmul rate in its own precision")
    axes.set_title("Training FLOPs against one matmul's")
    axes.legend(loc="upper left")


def draw_sweep(axes: Axes, table: pd.DataFrame) -> None:
    """Draws the seconds of a curve: solo, in one process and stacked."""
    names = {
        "solo": "a process\nper cell",
        "process": "one process,\none by one",
        "stacked": "one process,\nin lockstep",
    }
    places = range(len(table))
    axes.bar(places, table["training_seconds"], color=OURS, label="training", width=0.6)
    rest = table["wall_seconds"] - table["training_seconds"]
    axes.bar(places, rest, bottom=table["training_seconds"], color=LEAST, label="starts and files", width=0.6)
    for place, (_, row) in zip(places, table.iterrows(), strict=True):
        text = f"{row['wall_seconds']:.0f} s, {row['ratio_to_solo']:.2f}{TIMES}"
        axes.annotate(text, (place, row["wall_seconds"]), (0, 4), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(list(places), [names[mode] for mode in table["mode"]])
    axes.set_ylim(0, table["wall_seconds"].max() * 1.3)
    axes.set_ylabel("seconds")
    first = table.iloc[0]
    axes.set_title(f"{first['cells']} learning rates, width {first['width']}, {first['steps']} steps ({TIMES} of solo)")
    axes.legend(loc="upper right")


def draw_growth(axes: Axes, table: pd.DataFrame) -> None:
    """Draws measured over predicted tokens/s along each axis, relative to its base."""
    rows = table[table["axis"] != "replicas"]
    for (axis, architecture), line in rows.groupby(["axis", "architecture"], sort=False):
        # The base is the value whose prediction is exact.
        base = line.loc[(line["of_prediction"] - 1).abs().idxmin(), "value"]
        style = MARKERS[axis] + ("-" if architecture == "moe" else "--")
        label = f"{axis} (1 is {base})" + (", dense" if architecture == "dense" else "")
        axes.plot(line["value"] / base, line["of_prediction"], style, label=label, ms=5)
    axes.axhline(1, color=LEAST, lw=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{TIMES}"))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.35)
    axes.set_xlabel("size, times the base's")
    axes.set_ylabel("measured / predicted tokens/s")
    axes.set_title("Growth against what FLOPs predict")
    axes.legend(loc="upper left")


def draw_replicas(axes: Axes, table: pd.DataFrame) -> None:
    """Draws tokens/s of a stack against its replicas, and its memory."""
    rows = table[table["axis"] == "replicas"]
    for architecture, line in rows.groupby("architecture", sort=False):
        moe = architecture == "moe"
        label = f"{'MoE' if moe else 'dense'}, width {line['width'].iloc[0]}"
        axes.plot(line["value"], line["tokens_per_second"] / 1e3, "o-" if moe else "o--", color=OURS, label=label, ms=5)
    memory = axes.twinx()
    moe = rows[rows["architecture"] == "moe"]
    memory.plot(moe["value"], moe["memory_mb"] / 1024, "D:", color=ALIKE, ms=4)
    axes.plot([], [], "D:", color=ALIKE, ms=4, label="memory of the MoE stack")
    memory.set_ylabel("GiB", color=ALIKE)
    memory.set_ylim(0, moe["memory_mb"].max() / 1024 * 1.6)
    _by_two(axes, rows["value"], "replicas in lockstep")
    axes.set_ylim(0, rows["tokens_per_second"].max() / 1e3 * 1.35)
    axes.set_ylabel("thousand tokens/s, all replicas")
    axes.set_title("Replicas in one stack")
    axes.legend(loc="upper left")


def draw_pipeline(axes: Axes, table: pd.DataFrame) -> None:
    """Draws how the seconds of a figure are spent."""
    row = table.iloc[-1]
    over = row["training_part_seconds"] - row["training_seconds_over_cores"]
    parts = [
        (row["training_seconds_over_cores"], OURS, f"training over {row['cores']} cores"),
        (over, PEER, f"overhead, {row['overhead']:.1%} (goal: under {row['goal_overhead']:.0%})"),
        (row["tokenize_seconds"], LEAST, "tokenizing, once"),
    ]
    bottom = 0.0
    for seconds, color, label in parts:
        axes.bar(0, seconds, bottom=bottom, color=color, label=f"{label}: {seconds:.0f} s", width=0.5)
        bottom += seconds
    goal = f"goal without tokenizing: {row['goal_seconds']} s"
    axes.axhline(row["goal_seconds"], color="black", lw=1.5, ls="--", label=goal)
    axes.set_xlim(-0.6, 0.6)
    axes.set_xticks([])
    axes.set_ylim(0, max(bottom, row["goal_seconds"]) * 1.55)
    axes.set_ylabel("seconds")
    axes.set_title(f"{row['figure']}: {row['cells']} cells in {row['jobs']} jobs, {row['wall_seconds']:.0f} s")
    axes.legend(loc="upper left")


def machine(tables: dict[str, pd.DataFrame]) -> str:
    """Returns the device, versions and date of the measurements as text."""
    rows = pd.concat([table for table in tables.values() if "date" in table], ignore_index=True)
    row = rows.iloc[0]
    device = (
        row["gpu"]
        if isinstance(row["gpu"], str)
        else f"{row['cpu']}, {row['threads']} thread{'' if row['threads'] == 1 else 's'}"
    )
    return f"{device}; torch {row['torch']}, transformers {row['transformers']}; {rows['date'].max()}"


Draw = Callable[[Axes, pd.DataFrame], None]
PANELS: list[tuple[str, Draw]] = [
    ("step", lambda axes, table: draw_rates(axes, with_all_instructions(table), "moe")),
    ("step", draw_ratios),
    ("step", lambda axes, table: draw_rates(axes, with_all_instructions(table), "dense")),
    ("step", lambda axes, table: draw_fractions(axes, with_all_instructions(table))),
    ("sweep", draw_sweep),
    ("pipeline", draw_pipeline),
    ("growth", draw_growth),
    ("growth", draw_replicas),
]


def main() -> None:
    """Draws the panels whose CSV exists: two rows for the CPU, two more for a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks")
    arguments = parser.parse_args()
    folders = [folder for folder in (arguments.folder, arguments.folder / "gpu") if any(folder.glob("*.csv"))]
    plt.rcParams.update({"font.size": 9, "legend.fontsize": 8, "legend.frameon": False, "axes.titlesize": 10})
    plt.rcParams.update({"axes.spines.top": False, "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True})
    figure = plt.figure(figsize=(17, 7.6 * len(folders)), layout="constrained")
    parts = figure.subfigures(len(folders), 1, squeeze=False, hspace=0.04)
    for part, folder in zip(parts.flatten(), folders, strict=True):
        tables = {path.stem: read(path) for path in folder.glob("*.csv")}
        panels = [(name, draw) for name, draw in PANELS if name in tables]
        part.suptitle(machine(tables), fontsize=11, fontweight="bold")
        grid = part.subplots(2, 4).flatten()
        for axes, (name, draw) in zip(grid, panels, strict=False):
            draw(axes, tables[name])
            axes.yaxis.set_minor_formatter(NullFormatter())
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
    figure.savefig(arguments.folder / "benchmarks.png", dpi=130)


if __name__ == "__main__":
    main()
