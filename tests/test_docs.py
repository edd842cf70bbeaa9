"""The documentation: the site builds, links lead somewhere, and commands and badges name what exists."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from packaging.requirements import Requirement

from conftest import ROOT
from mup_moe.__main__ import COMMANDS

INDEX = "docs/index.md"
# The repository's own pages on its host, which a link reaches from the page that shows README.md.
HOST = "../../"


def tracked() -> list[str]:
    """The files of the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=False, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is not a clone, so its pages are not known", allow_module_level=True)
    return sorted({name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()})


FILES = frozenset(tracked())
FOLDERS = frozenset(str(folder) for name in FILES for folder in Path(name).parents)
PAGES = sorted(name for name in FILES if name.endswith(".md"))
# What people write; the rest is tables that the pipeline makes.
WRITTEN = [name for name in PAGES if not name.startswith("results/")]


def tokens_of(page: str) -> Iterator[Token]:
    """The tokens of a page, those within lines included."""
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse((ROOT / page).read_text()):
        yield token
        yield from token.children or ()


def links_of(page: str) -> Iterator[str]:
    """The targets of a page's links and images, also of those in HTML."""
    for token in tokens_of(page):
        if token.type in ("html_block", "html_inline"):
            yield from re.findall(r"""(?:href|src)=["']([^"']+)""", token.content)
        elif found := token.attrs.get("href") or token.attrs.get("src"):
            yield unquote(str(found))


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading: lower case, without punctuation, a hyphen for each space."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@cache
def anchors_of(page: str) -> frozenset[str]:
    """The anchors of a page: those of its headings, numbered where they repeat, and those in HTML."""
    anchors: set[str] = set()
    is_heading = False
    for token in tokens_of(page):
        if token.type in ("html_block", "html_inline"):
            anchors.update(re.findall(r"""(?:id|name)=["']([^"']+)""", token.content))
        elif token.type == "inline" and is_heading:
            texts = (child.content for child in token.children or () if child.type in ("text", "code_inline"))
            plain = slug("".join(texts))
            names = (f"{plain}-{number}" if number else plain for number in range(len(anchors) + 1))
            anchors.add(next(name for name in names if name not in anchors))
        is_heading = token.type == "heading_open"
    return frozenset(anchors)


def resolve(page: str, path: str) -> str:
    """The path in the repository that a relative link of a page leads to; the page itself for an empty one."""
    if not path:
        return page
    target = (ROOT / page).parent.joinpath(path).resolve()
    return str(target.relative_to(ROOT)) if target.is_relative_to(ROOT) else path


def is_external(link: str) -> bool:
    return re.match(r"[a-z]+:", link) is not None


def test_anchors_are_those_of_github():
    assert slug("C5-authors: inconclusive") == "c5-authors-inconclusive"
    assert slug("What `μP` is, and *is not* (2/3)") == "what-μp-is-and-is-not-23"
    assert "c7-inconclusive" in anchors_of("results/recorded/default/claims.md")
    assert "sum-of-squares" not in anchors_of("README.md")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in links_of(page):
        if is_external(link):
            continue
        path, _, anchor = link.partition("#")
        if page == "README.md" and path.startswith(HOST):
            workflow = re.fullmatch(rf"{HOST}actions/workflows/([\w.-]+?)(/badge\.svg)?", path)
            assert workflow, f"{page} links {link}"
            assert f".github/workflows/{workflow[1]}" in FILES, f"{page} links {link}"
            continue
        target = resolve(page, path)
        assert target in FILES or target in FOLDERS, f"{page} links {link}, which is not in the repository"
        if anchor and target.endswith(".md"):
            assert anchor in anchors_of(target), f"{page} links {link}, but {target} has no such heading"
        elif anchor:
            assert re.fullmatch(r"L\d+(-L\d+)?", anchor), f"{page} links {link}"


def test_every_page_is_reachable_from_the_index():
    reached, left = set(), [INDEX]
    while left:
        page = left.pop()
        if page not in reached:
            reached.add(page)
            targets = [resolve(page, link.partition("#")[0]) for link in links_of(page) if not is_external(link)]
            left += [target for target in targets if target in PAGES]
    claims = {name for name in PAGES if name.endswith("/claims.md")}
    assert {*WRITTEN, *claims} - reached == set()


def test_the_index_lists_every_page_once():
    listed = [resolve(INDEX, link) for link in links_of(INDEX) if link.endswith(".md")]
    assert sorted(listed) == sorted({*WRITTEN} - {INDEX})


def commands_of(page: str) -> Iterator[list[str]]:
    """The commands in a page's blocks and spans of code, as words."""
    for token in tokens_of(page):
        if token.type == "code_inline" or (token.type == "fence" and token.info in ("sh", "bash")):
            for line in token.content.replace("\\\n", " ").splitlines():
                for command in re.split(r"&&|\|\||[;|]", re.sub(r"(^|\s)#.*", "", line)):
                    words = command.split()
                    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                        del words[0]
                    if words:
                        yield words


@pytest.mark.parametrize("page", WRITTEN)
def test_commands_exist(page):
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    # The changelog names what earlier versions had.
    for words in commands_of(page) if page != "CHANGELOG.md" else ():
        if words[0] == "make":
            goals = {word for word in words[1:] if "=" not in word and not word.startswith("-") and word != "..."}
            assert goals <= targets, f"{page}: {' '.join(words)}"
        if words[:3] == ["python", "-m", "mup_moe"] and words[3:] and not words[3].startswith("-"):
            assert words[3] in COMMANDS, f"{page}: {' '.join(words)}"


def test_all_targets_of_the_makefile_are_explained():
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)", makefile, re.M)
    explained = set(re.findall(r"^# make ([\w-]+) ", makefile, re.M))
    assert explained >= set(phony.split()) - {"lint", "lock"}


def test_the_page_of_recorded_sweeps_is_complete():
    page = (ROOT / "docs/recorded.md").read_text()
    shown = {resolve("docs/recorded.md", link) for link in links_of("docs/recorded.md")}
    recorded = {name for name in FILES if re.fullmatch(r"results/recorded/[\w-]+/([\w-]+\.png|claims\.md)", name)}
    assert recorded <= shown
    for path in sorted((ROOT / "results/recorded").glob("*/provenance.json")):
        provenance = json.loads(path.read_text())
        name = path.parent.name
        assert f"| [{name}](#{name}) | {provenance['cells']:,} | {len(provenance['seeds'])} |" in page


def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-E", "-q", "-W", "--keep-going", "-n", "-c", "docs"]
    places = ["-d", tmp_path / "doctrees", "-b", "html", ROOT, tmp_path / "html"]
    done = subprocess.run([*command, *places], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "html"
    assert "docs/index.html" in (site / "index.html").read_text()
    assert re.search(r'\W"?drift"?:', (site / "searchindex.js").read_text())
    # Lazily loaded names have their docstrings, formulas need no script, and figures open in full size.
    assert "undecayed" in (site / "docs/api.html").read_text()
    assert "<math " in (site / "docs/theory.html").read_text()
    assert re.search(r'<a [^>]*href="_images/figure1\.png"><img', (site / "README.html").read_text())
    for page in {*site.rglob("*.html")} - {site / "report.html"}:
        assert not re.search(r'<(?:script|link|img)[^>]* (?:src|href)="https?:', page.read_text()), page


# The face of the repository.

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_public_ci_runs_the_same_as_ours():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step and not step["run"].startswith("git config")]
    assert commands == [".ci/run", "make docs", "make docs-links"]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)


def test_badges_say_what_the_project_says():
    badges = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("[![")]
    said = dict(re.findall(r"img\.shields\.io/badge/(\w+)-(\S+)-\w+\)", "\n".join(badges)))
    requirements = map(Requirement, PROJECT["optional-dependencies"]["pipeline"])
    (snakemake,) = (requirement.specifier for requirement in requirements if requirement.name == "snakemake")
    assert unquote(said.pop("python")) == PROJECT["requires-python"].replace(">=", "≥")
    assert unquote(said.pop("snakemake")).replace("≥", ">=") in str(snakemake).split(",")
    assert said.pop("license") == PROJECT["license"] == CITATION["license"]
    assert said.pop("arXiv") in CITATION["references"][0]["url"]
    assert not said
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
