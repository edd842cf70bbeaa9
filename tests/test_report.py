"""Snakemake's report, made from placeholder results and from the recorded ones: what it contains."""

import base64
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from conftest import CONFIG, ROOT, read_config, snakemake
from mup_moe.analysis.markup import markdown_table, markdown_text
from mup_moe.analysis.names import MINUS
from mup_moe.analysis.pages import figure_page, rows_page, table_page
from mup_moe.config.kinds import BEYOND, KINDS
from mup_moe.figures.shown import category_of

pytestmark = pytest.mark.workflow

IN_PARTS = {part for parts in CONFIG.compositions.values() for part in parts}
DRAWN = [name for name in [*CONFIG.figures, *CONFIG.compositions] if name not in IN_PARTS]
HEADINGS = (
    "1 Claims",
    "2 Learning-rate transfer over widths",
    "3 Experts and granularity",
    "4 Dense models",
    "5 Coordinate check",
    "6 Lemma B.1",
)
BEYOND_THE_PAPER = {
    "architectures": {"figure5", "figure5a", "figure5b", "figure5-control", "check-mixtral", "check-qwen3-moe"},
    "granularity": {"figure6", "figure6-experts", "granularity-rows", "expert_rate", "contributions"}
    | {"coordinate_check_granularity"},
    "switch": {"limit"},
}
# Markup of Markdown, reStructuredText, HTML and Jinja.
HOSTILE = "|a| *b `c :d:`e`\n\n.. raw:: f_ {{ g }} {% h <i>j</table> \\k"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium to open pages in")


class Resources(HTMLParser):
    """Collects what a browser would load to show a page; `data:` and inline scripts load nothing."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "embed"):
            self.found.append(attributes.get("src"))
        if tag == "link":
            self.found.append(attributes.get("href"))


def write_placeholders(folder: Path) -> None:
    """Writes a placeholder for every result that a report may contain."""
    results = folder / "results"
    table = markdown_table(["claim", "cells"], [[markdown_text(HOSTILE), "10"], ["b", "9"], ["", "8.5 k"]])
    tables = {f"{name}/{figure.kind}" for name, figure in CONFIG.figures.items() if KINDS[figure.kind].table}
    for name in {*tables, "claims", "table1", "table2", "plan"}:
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / f"{name}.html").write_text(table_page(Path(name).name, table))
    for name in ["optima", "claims/tests", *(f"{probe}/slopes" for probe in CONFIG.probes)]:
        (results / name).parent.mkdir(exist_ok=True)
        (results / f"{name}.html").write_text(rows_page(Path(name).name, ["claim", "panel"], [[HOSTILE, HOSTILE]] * 9))
    for index, name in enumerate([*DRAWN, *CONFIG.probes, "verdicts"]):
        Image.new("RGB", (40, 30), (index, 2, 3)).save(results / f"{name}.png")
        (results / f"{name}.pdf").write_bytes(b"%PDF-1.4 " + name.encode())
        (results / f"{name}.html").write_text(figure_page(name, (results / f"{name}.png").read_bytes()))


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The report of the whole paper, made outside the repository."""
    folder = tmp_path_factory.mktemp("report")
    write_placeholders(folder)
    done = snakemake(folder, "-s", ROOT / "Snakefile", "--report", "results/report.html")
    assert done.returncode == 0, done.stdout
    return folder / "results/report.html"


def held(report: Path, name: str):
    """Returns a variable of the report's page."""
    found = re.search(
        rf'<script id="{name.replace("_", "-")}">\s*var {name} = (.*?);\n\s*</script>', report.read_text(), re.S
    )
    return json.loads(found[1])


def content(entry) -> bytes:
    """Returns the file that an entry of the report's results contains."""
    return base64.b64decode(entry["data_uri"].partition(";base64,")[2])


def test_the_report_is_one_file_with_every_figure_in_it(report):
    results = held(report, "results")
    for name in DRAWN:
        for suffix in ("html", "pdf"):
            path = f"results/{name}.{suffix}"
            assert content(results[path]) == (report.parent / f"{name}.{suffix}").read_bytes()
        png = base64.b64encode((report.parent / f"{name}.png").read_bytes())
        assert png in content(results[f"results/{name}.html"])
    assert not any(Path(path).stem in IN_PARTS for path in results)
    assert all(entry["data_uri"].startswith("data:") for entry in results.values())


def test_the_claims_come_first_and_figures_under_the_papers_headings(report):
    categories = held(report, "categories")
    headings = sorted(categories)
    assert headings[: len(HEADINGS)] == list(HEADINGS)
    of_heading = {
        heading: {Path(path).stem for paths in categories[heading].values() for path in paths} for heading in HEADINGS
    }
    assert of_heading == {
        HEADINGS[0]: {"claims", "tests", "optima", "verdicts"},
        HEADINGS[1]: {"figure1", "figure4", "attribution", "attribution4", "sensitivity"},
        HEADINGS[2]: {"figure2"},
        HEADINGS[3]: {"figure3"},
        HEADINGS[4]: {"coordinate_check", "slopes"},
        HEADINGS[5]: {"lemma_b1", "lemma_b1_slopes", "slopes"},
    }
    assert BEYOND not in categories


@pytest.mark.parametrize("preset", ["architectures", "granularity", "switch"])
def test_what_the_paper_does_not_have_comes_after_it(preset):
    config = read_config(ROOT / "config.yaml", ROOT / f"presets/{preset}.yaml")
    beyond = {name for name in config.kinds if category_of(config, name) == BEYOND}
    assert BEYOND_THE_PAPER.get(preset, set()) <= beyond
    assert not beyond.intersection(DRAWN)
    assert max(HEADINGS) < BEYOND


def test_a_figure_is_shown_before_its_pdf_is_offered(report):
    results = held(report, "results")
    for name in DRAWN:
        labels = {suffix: results[f"results/{name}.{suffix}"]["labels"] for suffix in ("html", "pdf")}
        assert {label["result"] for label in labels.values()} == {name}
        # The viewer turns the formats into a toggle and shows the one that sorts first.
        assert labels["html"]["format"] < labels["pdf"]["format"]


def test_captions_say_what_to_look_for(report):
    results = held(report, "results")
    for entry in results.values():
        assert re.search(r"\blook\b", entry["caption"], re.IGNORECASE), entry["name"]
        assert "system-message" not in entry["caption"]
        assert "{" not in entry["caption"]
    captions = {name: results[f"results/{name}.html"]["caption"] for name in DRAWN}
    assert "dense" in captions["figure3"]
    assert "granularity" in captions["figure2"]
    assert "SP" in captions["figure1"]


def test_the_front_page_asks_the_question_and_shows_the_claims(report):
    front = held(report, "workflow_desc")
    assert "Does the best learning rate" in front
    assert html.unescape(front).count(" ".join(HOSTILE.split())) == 1
    assert "system-message" not in front


def test_captions_and_the_front_page_run_no_script(report):
    texts = [held(report, "workflow_desc"), *(entry["caption"] for entry in held(report, "results").values())]
    texts += [path.read_text() for path in sorted((ROOT / "workflow/report").glob("*.rst"))]
    for text in texts:
        assert not re.search(r"<script|<img|\son\w+\s*=|javascript:", text, re.IGNORECASE), text


def test_nothing_is_loaded_from_a_network(report):
    pages = [content(entry).decode() for path, entry in held(report, "results").items() if path.endswith(".html")]
    for page in [report.read_text(), held(report, "workflow_desc"), *pages]:
        parser = Resources()
        parser.feed(page)
        assert not [source for source in parser.found if source and not source.startswith("data:")]
    for page in pages:
        assert not re.search(r"https?:|url\(|@import", page)


def test_a_table_sorts_by_values_and_repeats_what_a_blank_first_cell_stands_for():
    rows = [["a", "12 k", f"{MINUS}0.10 [{MINUS}0.2, 0.0]"], ["", "900.0", "--"], ["<b>", "1.5 MB", "+3.00 [1.0, inf]"]]
    table = markdown_table(["x", "y", "z"], [[markdown_text(cell) for cell in row] for row in rows])
    page = table_page("t", table).partition("<tbody>")[2]
    assert re.findall('data-order="(.*?)"', page) == ["12000", "-0.1", "900", "-1e+300", "1500000", "3"]
    assert re.findall('data-search="(.*?)"', page) == ["12000", "-0.1", "900", "", "1500000", "3"]
    assert [html.unescape(cell) for cell in re.findall("<td.*?>(.*?)</td>", page)[::3]] == ["a", "a", "<b>"]


def shown_cells(page: str) -> list[str]:
    return [html.unescape(cell) for cell in re.findall("<t[dh].*?>(.*?)</t[dh]>", page.partition("<table>")[2])]


def test_rows_of_a_csv_file_are_shown_as_they_are_with_numbers_rounded():
    page = rows_page("t", ["a_b", "c", "d"], [[HOSTILE, "-0.0001", "True"], ["x", "nan", "12"]])
    assert shown_cells(page) == ["a b", "c", "d", " ".join(HOSTILE.split()), "0.000", "yes", "x", "", "12"]


@pytest.mark.parametrize("name", ["nan", "1e5", "1-0", "true", ""])
def test_names_that_read_like_other_values_are_shown_as_they_are(name):
    rows = [["figure1", "sp", "0.5"], [name, name, "1.5"]]
    assert shown_cells(rows_page("t", ["figure", "panel", "loss"], rows))[6:] == [name, name, "1.500"]


def opened(page: Path, folder: Path) -> str:
    """Returns what a browser makes of a page, and fails where that writes an error to its console."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}"]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom"]
    said, dumped = folder / "stderr.txt", folder / "page.html"
    with said.open("w") as errors, dumped.open("w") as out:
        browser = subprocess.Popen([BROWSER, *flags, page.as_uri()], stdout=out, stderr=errors, start_new_session=True)
        try:
            status = browser.wait(timeout=1800)
        except subprocess.TimeoutExpired:
            # Headless Chromium hangs occasionally, whatever the page.
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
            pytest.skip("chromium did not answer within half an hour")
    assert status == 0, said.read_text()
    assert not re.findall(r".*CONSOLE.*(?:Error|Uncaught|ERR_).*", said.read_text())
    return dumped.read_text()


@needs_browser
def test_a_browser_opens_the_report_from_the_file(report, tmp_path):
    text = opened(report, tmp_path)
    page = text[text.index('<div id="app">') : text.index('<script id="workflow-desc">')]
    assert "Does the best learning rate" in page
    assert "1 Claims" in page


@needs_browser
def test_a_browser_makes_tables_that_sort_and_filter(report, tmp_path):
    # The report shows a page in a frame, by its data: address. An error within it would reach the console.
    frame = tmp_path / "frame.html"
    frame.write_text(f"<iframe src='{held(report, 'results')['results/optima.html']['data_uri']}'></iframe>")
    opened(frame, tmp_path)
    text = opened(report.parent / "optima.html", tmp_path)
    table = text[text.index("<body") :]
    assert "dt-orderable-asc" in table
    assert 'type="search"' in table
    assert table.count("</th>") == table.count("dtcc-button_dropdown")


def test_a_report_of_the_records_needs_no_training(tmp_path):
    out = tmp_path / "new/report.html"
    done = subprocess.run([sys.executable, ROOT / "docs/report.py", out], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    categories, results = held(out, "categories"), held(out, "results")
    beyond = {Path(path).stem for paths in categories[BEYOND].values() for path in paths}
    assert {"figure5", "figure6", "expert_rate", "comparison"} <= beyond
    assert {*DRAWN, "plan", "table1", "optima", "tests"} <= {Path(path).stem for path in results}
    assert "**C7**" not in held(out, "workflow_desc")
    assert "<strong>C7</strong>" in held(out, "workflow_desc")
    assert "figure5b" in content(results["results/optima.html"]).decode()


@pytest.mark.parametrize("where", ["pyproject.toml", "itables.toml"])
def test_pages_of_tables_take_no_settings_of_itables(tmp_path, where):
    (tmp_path / where).write_text("[tool.itables] broken")
    code = "from mup_moe.analysis.pages import rows_page; print(len(rows_page('t', ['a'], [['b']])))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "ITABLES_CONFIG": str(tmp_path / "missing.toml")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100_000
