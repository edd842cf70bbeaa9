"""Snakemake's report, made from placeholder results: what it contains, not what the results say."""

import base64
import html
import json
import os
import re
import shutil
import signal
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from conftest import CONFIG, ROOT, snakemake
from mup_moe.analysis.markup import html_page, markdown_table, markdown_text
from mup_moe.config.kinds import KINDS

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
# Markup of Markdown, reStructuredText, HTML and Jinja.
HOSTILE = "|a| *b `c :d:`e`\n\n.. raw:: f_ {{ g }} {% h <i>j</table> \\k"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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
    results.mkdir()
    names = [*DRAWN, *CONFIG.probes, "claims", "table1", "table2", "plan"]
    tables = [f"{name}/{figure.kind}" for name, figure in CONFIG.figures.items() if KINDS[figure.kind].table]
    for table in tables:
        (results / table).parent.mkdir()
        (results / f"{table}.html").write_text(html_page(table, ""))
    for index, name in enumerate(names):
        Image.new("RGB", (40, 30), (index, 2, 3)).save(results / f"{name}.png")
        (results / f"{name}.pdf").write_bytes(b"%PDF-1.4 " + name.encode())
        (results / f"{name}.html").write_text(html_page(name, markdown_table(["claim"], [[markdown_text(HOSTILE)]])))
        (results / f"{name}.csv").write_text("claim\n")


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


def test_the_report_is_one_file_with_every_figure_in_it(report):
    results = held(report, "results")
    for name in DRAWN:
        for suffix in ("png", "pdf"):
            path = f"results/{name}.{suffix}"
            data = base64.b64decode(results[path]["data_uri"].partition(";base64,")[2])
            assert data == (report.parent / f"{name}.{suffix}").read_bytes()
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
        HEADINGS[0]: {"claims"},
        HEADINGS[1]: {"figure1", "figure4", "attribution", "attribution4", "sensitivity"},
        HEADINGS[2]: {"figure2"},
        HEADINGS[3]: {"figure3"},
        HEADINGS[4]: {"coordinate_check"},
        HEADINGS[5]: {"lemma_b1", "lemma_b1_slopes"},
    }


def test_a_figure_is_shown_before_its_pdf_is_offered(report):
    results = held(report, "results")
    for name in DRAWN:
        labels = {suffix: results[f"results/{name}.{suffix}"]["labels"] for suffix in ("png", "pdf")}
        assert {label["result"] for label in labels.values()} == {name}
        # The viewer turns the formats into a toggle and shows the one that sorts first.
        assert labels["png"]["format"] < labels["pdf"]["format"]


def test_captions_say_what_to_look_for(report):
    results = held(report, "results")
    for entry in results.values():
        assert re.search(r"\blook\b", entry["caption"], re.IGNORECASE), entry["name"]
        assert "system-message" not in entry["caption"]
        assert "{" not in entry["caption"]
    captions = {name: results[f"results/{name}.png"]["caption"] for name in DRAWN}
    assert "dense" in captions["figure3"]
    assert "granularity" in captions["figure2"]
    assert "SP" in captions["figure1"]


def test_the_front_page_asks_the_question_and_shows_the_claims(report):
    front = held(report, "workflow_desc")
    assert "Does the best learning rate" in front
    assert html.unescape(front).count(" ".join(HOSTILE.split())) == 1
    assert "system-message" not in front


def test_nothing_is_loaded_from_the_network(report):
    parser = Resources()
    parser.feed(report.read_text())
    parser.feed(held(report, "workflow_desc"))
    assert not [source for source in parser.found if source and not source.startswith("data:")]


@pytest.mark.skipif(BROWSER is None, reason="no chromium to open the report in")
def test_a_browser_opens_the_report_from_the_file(report, tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path}"]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom"]
    said, dumped = tmp_path / "stderr.txt", tmp_path / "page.html"
    with said.open("w") as errors, dumped.open("w") as page:
        browser = subprocess.Popen(
            [BROWSER, *flags, report.as_uri()], stdout=page, stderr=errors, start_new_session=True
        )
        try:
            status = browser.wait(timeout=1800)
        except subprocess.TimeoutExpired:
            # Headless Chromium hangs occasionally, whatever the page.
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
            pytest.skip("chromium did not answer within half an hour")
    assert status == 0, said.read_text()
    assert not re.findall(r".*CONSOLE.*(?:Error|Uncaught|ERR_).*", said.read_text())
    text = dumped.read_text()
    page = text[text.index('<div id="app">') : text.index('<script id="workflow-desc">')]
    assert "Does the best learning rate" in page
    assert "1 Claims" in page
