"""Writes Snakemake's report of recorded results, without training: python docs/report.py OUT.html.

Takes results/recorded/default, and adds what the other records have beyond the paper. With --record NAME it takes that
record alone, with its own claims.
"""

import argparse
import csv
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
from mup_moe.analysis.pages import figure_page, rows_page, table_page  # noqa: E402

RECORDED = ROOT / "results/recorded"
BEYOND = ("architectures", "granularity")


def main() -> None:
    """Lays the records out as a folder of results and has Snakemake report on it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the HTML file to write")
    parser.add_argument("--record", help="the only record to take, a folder of results/recorded")
    arguments = parser.parse_args()
    records = [arguments.record] if arguments.record else ["default", *BEYOND]
    out = arguments.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        for record in records:
            add(RECORDED / record, results)
        make_pages(results)
        given = lay_config(records, Path(folder))
        if not (results / "table1.html").exists():  # comes along with every figure, and follows from the config
            cli.main(["table1", "--results", str(results), "--config", str(ROOT / "config.yaml"), *map(str, given)])
        targets = [path.relative_to(folder) for path in sorted(results.rglob("*")) if path.suffix in (".html", ".pdf")]
        command = [sys.executable, "-m", "snakemake", *targets, "--snakefile", ROOT / "Snakefile"]
        # Without lockstep a single rule trains all cells, so that the diagram of the workflow stays small.
        command += ["--configfile", *given, "--config", "execution={lockstep: []}", "--report", out]
        done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)  # noqa: S603
    # A record lacks what Snakemake keeps of the jobs, so that each file has a warning.
    said = [line for line in done.stderr.splitlines() if not line.startswith("Missing metadata")]
    sys.exit("\n".join(said) if done.returncode else 0)


def add(record: Path, results: Path) -> None:
    """Copies what the results do not have yet, and appends the record's best learning rates."""
    for path in sorted(record.rglob("*")):
        target = results / path.relative_to(record)
        if path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    optima = results / "optima.csv"
    for path in sorted(record.glob("*/optima.csv")):
        head, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if not optima.exists():
            optima.write_text(head, encoding="utf-8")
        elif not optima.read_text(encoding="utf-8").startswith(head):
            raise ValueError(f"{path} has different columns from earlier tables: record both with the same version")
        with optima.open("a", encoding="utf-8") as file:
            file.writelines(rows)


def make_pages(results: Path) -> None:
    """Makes the pages that records leave out: they follow from the other files."""
    for path in results.rglob("*.md"):
        path.with_suffix(".html").write_text(table_page(path.stem, path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in results.glob("*.png"):
        path.with_suffix(".html").write_text(figure_page(path.stem, path.read_bytes()), encoding="utf-8")
    tables = {results / "optima.csv": "optima.html", results / "claims/tests.csv": "claims/tests.html"}
    tables |= {
        path.parent.with_suffix(".csv"): f"{path.parent.name}/slopes.html" for path in results.glob("*/values.json")
    }
    for table, name in tables.items():
        if table.exists():
            with table.open(encoding="utf-8", newline="") as file:
                columns, *rows = csv.reader(file)
            (results / name).write_text(rows_page(Path(name).stem, columns, rows), encoding="utf-8")


def lay_config(records: Sequence[str], folder: Path) -> list[Path]:
    """Copies the config files of the records into a folder. Where there are several, the claims are the first one's."""
    given = []
    for record in records:
        names = yaml.safe_load((RECORDED / record / "provenance.json").read_text(encoding="utf-8"))["config"]
        for name in names if record == records[0] else names[1:]:
            document = yaml.safe_load((RECORDED / record / name).read_text(encoding="utf-8"))
            if record != records[0]:
                document.pop("claims", None)
            given.append(folder / f"{len(given)}-{name}")
            given[-1].write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    return given


if __name__ == "__main__":
    main()
