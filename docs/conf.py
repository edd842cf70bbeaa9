"""Configuration of the documentation site: `make docs`.

The source folder is the root of the repository, so that the pages' relative links work on the site as they do where
the repository is hosted. The environment variable REPOSITORY_URL names that host's page of the repository, for links
to files that are not pages; without it, the site offers such files as downloads.
"""

import os
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.util import logging

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

import mup_moe  # noqa: E402

REPOSITORY = os.environ.get("REPOSITORY_URL", "").rstrip("/")
# Made by `python docs/report.py`; the site also builds without it.
REPORT = ROOT / "docs/_build/report.html"

project = "mup-moe"
author = "the mup-moe developers"
project_copyright = author
release = mup_moe.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "reference/README.md",
    "results/recorded/*/claims.md",
]
exclude_patterns = [".*", "build", "dist", "docs/_build", "src", "tests", "results/[!r]*"]

html_theme = "furo"
html_title = f"mup-moe {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
# Without a root page of its own, the site would begin in a list of files.
html_extra_path = ["_site", *([str(REPORT)] if REPORT.exists() else [])]
html_theme_options = {"top_of_page_buttons": ["view"]}
if REPOSITORY:
    html_theme_options["source_view_link"] = f"{REPOSITORY}/blob/HEAD/{{filename}}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
# Types of other projects, whose indexes a build without a network cannot read, and of modules that are not public.
nitpick_ignore_regex = [("py:.*", r"(torch|pandas|collections|pathlib|typing|mup_moe\.[a-z.]+)\..*")]

linkcheck_timeout = 30
linkcheck_retries = 2
linkcheck_anchors = False


def add_toctrees(_app, docname, source):
    """Makes hidden toctrees of the index's lists and of the links to claims, so that the pages stay plain Markdown."""
    if docname == "docs/recorded":
        claims = re.findall(r"\(((?:\.\./)*results/recorded/([^/]+)/claims)\.md\)", source[0])
        source[0] += toctree("", [(f"Claims: {sweep}", page) for page, sweep in dict.fromkeys(claims)])
    if docname == root_doc:
        parts = re.split(r"^(?=## )", source[0], flags=re.M)
        for number, part in enumerate(parts):
            pages = re.findall(r"^- \[(.+?)\]\((.+?)\.md\)", part, re.M)
            if pages:
                parts[number] += toctree(part.partition("\n")[0].removeprefix("## "), pages)
        source[0] = "".join(parts)


def toctree(caption, pages):
    """A hidden toctree of (title, page) under a caption."""
    options = ":hidden:\n" + (f":caption: {caption}\n" if caption else "")
    entries = "\n".join(f"{title} <{page}>" for title, page in pages)
    return f"\n```{{toctree}}\n{options}\n{entries}\n```\n\n"


def add_report(_app, docname, source):
    """Links the report from the index, if there is one."""
    if docname == root_doc and REPORT.exists():
        entry = '- <a href="../report.html">Report</a>: figures, tables and claims of the default sweep in one file.\n'
        source[0] = re.sub(r"(^- \[Recorded sweeps\].*\n)", rf"\1{entry}", source[0], flags=re.M)


def name_claims(_app, docname, source):
    """Says in the title of a claims page which sweep it is of, for the search."""
    if docname.endswith("/claims"):
        source[0] = re.sub(r"\A# .*", f"# Claims of the sweep {docname.split('/')[-2]}", source[0])


def leave_out_badges(_app, docname, source):
    """Badges are pictures of other hosts, which a site that works without a network does not have."""
    if docname == "README":
        source[0] = re.sub(r"^\[!\[.*\n", "", source[0], flags=re.M)


def enlarge_images(_app, doctree):
    """An image with a width is linked to its file in full size by Sphinx (`html_scaled_image_link`)."""
    for image in doctree.findall(nodes.image):
        image.setdefault("width", "100%")


def link_files(app, doctree):
    """Links files and folders that are not pages to the repository's host.

    Where the host is not known, a file is a download, and of a folder only the name is shown.
    """
    links = [*doctree.findall(addnodes.download_reference), *doctree.findall(addnodes.pending_xref)]
    for link in links:
        path = Path(app.env.relfn2path(link["reftarget"], app.env.docname)[1])
        # A page's `reftarget` is its name in the domain `doc`, which may also be that of a folder.
        is_folder = link.get("reftype") == "myst" and not link.get("refdomain") and path.is_dir()
        if not is_folder and not (REPOSITORY and isinstance(link, addnodes.download_reference)):
            continue
        url = f"{REPOSITORY}/{'tree' if is_folder else 'blob'}/HEAD/{path.relative_to(ROOT).as_posix()}"
        link.replace_self(nodes.reference("", "", *link.children, refuri=url) if REPOSITORY else link.children)


def list_parameters(_app, _what, _name, _object, _options, lines):
    """Makes a list of a docstring's paragraph about parameters, which reads `name: text. other, another: text.`."""
    paragraphs = " ".join(line or "\n" for line in lines).split("\n")
    for number, paragraph in enumerate(paragraphs):
        start, *parts = re.split(r"(?:^|(?<=\. ))([a-z_]+(?:, [a-z_]+)*): ", paragraph.strip())
        if parts and not start:
            pairs = zip(parts[::2], parts[1::2], strict=True)
            points = "\n".join(f"* **{names}**: {text.strip()}" for names, text in pairs)
            paragraphs[number] = re.sub(r"(?<=\.) Raises ", "\n\nRaises ", points)
    lines[:] = [*"\n\n".join(paragraph.strip() for paragraph in paragraphs).splitlines(), ""]


def mathml(translator, node, as_block):
    """Formulas as MathML, which browsers draw without scripts or fonts of another host."""
    try:
        formula = tex2mathml(node.astext(), as_block=as_block)
    except MathError as error:
        logging.getLogger(__name__).warning("formula: %s", error, location=node)
        formula = ""
    translator.body.append(f'<div class="math">{formula}</div>' if as_block else formula)
    raise nodes.SkipNode


html_math_renderer = "mathml"


def setup(app):
    """Registers the functions above."""
    for function in (add_report, add_toctrees, name_claims, leave_out_badges):
        app.connect("source-read", function)
    app.connect("autodoc-process-docstring", list_parameters)
    app.connect("doctree-read", enlarge_images, priority=100)
    app.connect("doctree-read", link_files, priority=100)
    app.add_html_math_renderer(
        "mathml",
        (lambda translator, node: mathml(translator, node, False), None),
        (lambda translator, node: mathml(translator, node, True), None),
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
