"""Writes Snakemake's report of recorded results, without training: python docs/report.py OUT.html.

Takes results/recorded/default, and adds what the other records have beyond the paper. With --record NAME it takes that
record alone, with its own claims.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from mup_moe import __main__ as cli  # noqa: E402
from mup_moe.analysis.collect import join_tables  # noqa: E402
from mup_moe.analysis.pages import figure_page, table_page, write_rows_page  # noqa: E402

RECORDED = ROOT / "results/recorded"
BEYOND = ("architectures", "granularity")


def main() -> None:
    """Lays the records out as a folder of results and has Snakemake report on it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the HTML file to write")
    known = sorted(path.parent.name for path in RECORDED.glob("*/provenance.json"))
    parser.add_argument("--record", choices=known, help="the only record to take, a folder of results/recorded")
    arguments = parser.parse_args()
    records = [arguments.record] if arguments.record else ["default", *BEYOND]
    out = arguments.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        for record in records:
            shutil.copytree(RECORDED / record, results, dirs_exist_ok=True, copy_function=copy_new)
        join_tables([path for record in records for path in optima_of(RECORDED / record)], results / "optima.csv")
        make_pages(results)
        given = copy_config(records, Path(folder))
        if not (results / "table1.html").exists():  # comes along with every figure, and follows from the config
            config = ["--config", str(ROOT / "config.yaml"), *(str(Path(folder) / name) for name in given)]
            if status := cli.main(["table1", "--results", str(results), *config]):
                sys.exit(status)
        targets = [path.relative_to(folder) for path in sorted(results.rglob("*")) if path.suffix in (".html", ".pdf")]
        command = [sys.executable, "-m", "snakemake", *targets, "--snakefile", ROOT / "Snakefile"]
        # Without lockstep a single rule trains all cells, so that the diagram of the workflow stays small.
        command += ["--configfile", *given, "--config", "execution={lockstep: []}", "--report", out]
        done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)  # noqa: S603
    # A record lacks what Snakemake keeps of the jobs, so that each file has a warning.
    said = [line for line in done.stderr.splitlines() if not line.startswith("Missing metadata")]
    sys.exit("\n".join(said) if done.returncode else 0)


def copy_new(source: str, target: str) -> None:
    """Copies a file that another record does not have."""
    if not Path(target).exists():
        shutil.copyfile(source, target)


def optima_of(record: Path) -> list[Path]:
    """Returns the tables of a record's best learning rates: one of all figures, or one per figure."""
    of_all = record / "optima.csv"
    return [of_all] if of_all.exists() else sorted(record.glob("*/optima.csv"))


def make_pages(results: Path) -> None:
    """Makes the pages that records leave out: they follow from the other files."""
    for path in results.rglob("*.md"):
        path.with_suffix(".html").write_text(table_page(path.stem, path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in results.glob("*.png"):
        path.with_suffix(".html").write_text(figure_page(path.stem, path.read_bytes()), encoding="utf-8")
    tables = {results / "claims/tests.csv": "claims/tests.html"}
    tables |= {
        path.parent.with_suffix(".csv"): f"{path.parent.name}/slopes.html" for path in results.glob("*/values.json")
    }
    for table, name in tables.items():
        if table.exists():
            with table.open(encoding="utf-8", newline="") as file:
                columns, *rows = csv.reader(file)
            write_rows_page(results / name, columns, rows)


def copy_config(records: Sequence[str], folder: Path) -> list[str]:
    """Copies the config files of the records into a folder, claims of the first one only; returns their names."""
    given: list[str] = []
    for record in records:
        names = json.loads((RECORDED / record / "provenance.json").read_text(encoding="utf-8"))["config"]
        for name in names if record == records[0] else names[1:]:
            document = yaml.safe_load((RECORDED / record / name).read_text(encoding="utf-8"))
            if record != records[0]:
                document.pop("claims", None)
            given.append(f"{len(given)}-{name}")
            (folder / given[-1]).write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    return given


if __name__ == "__main__":
    main()
