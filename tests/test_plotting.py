"""Figures look the same whatever a user has set for matplotlib."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from conftest import CONFIG, ROOT
from mup_moe.analysis.slopes import Slope, read_values, slopes
from mup_moe.files import write_csv
from test_figure import compose, make_request, over

# Settings that change a figure, or stop its drawing, if they take effect.
DISTURBING = """
backend: TkAgg
text.usetex: True
axes.formatter.use_locale: True
font.family: serif
font.size: 20
savefig.bbox: tight
savefig.transparent: True
savefig.dpi: 50
figure.facecolor: red
axes.prop_cycle: cycler("color", ["red"])
lines.antialiased: False
path.sketch: 5, 50, 20
pdf.compression: 0
"""
NOT_UTF8 = "font.family: é\n".encode("latin-1")
MEASURED = "parametrization,width,seed,step,quantity,block,value\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with what every figure is drawn from, and the config of them all."""
    folder = tmp_path_factory.mktemp("inputs")
    axes = replace(CONFIG.probes["lemma_b1"].axes, width=(8, 16, 32))
    probes = {
        measure: replace(CONFIG.probes["lemma_b1"], measure=measure, axes=axes)
        for measure in ("activations", "covariance")
    }
    for probe in probes:
        (folder / probe).mkdir()
        values = folder / probe / "values.csv"
        models = [(width, seed, step) for width in axes.width for seed in (0, 1) for step in (0, 2)]
        rows = [f"mup,{width},{seed},{step},logits,,{(seed + 1) / width}\n" for width, seed, step in models]
        values.write_text(MEASURED + "".join(rows))
        write_csv(folder / f"{probe}.csv", Slope._fields, slopes(read_values(values), 0.9))
    requests = {"f": make_request(("sp", "mup"), (32, 64)), "g": over("experts", (2, 8), 8)}
    config = compose(folder, requests)
    (folder / "config.json").write_text(json.dumps(asdict(replace(config, probes=probes))))
    return folder


def drawn(inputs, folder, **environment):
    """Draws every figure in a process with this working folder; returns name -> bytes."""
    out = folder / "out"
    shutil.copytree(inputs, out)
    shutil.copy(ROOT / "benchmarks" / "sweep.csv", out)
    commands = [
        ["figure", name, "--config", str(out / "config.json"), "--results", str(out)]
        for name in ("f", "both", "activations", "covariance")
    ]
    code = (
        "import json, runpy, sys; from mup_moe.__main__ import main\n"
        "for command in json.loads(sys.argv[1]): assert main(command) == 0\n"
        "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    plot = [str(ROOT / "benchmarks" / "plot.py"), "--folder", str(out)]
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("MPL", "MATPLOTLIB"))}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands), *plot],
        cwd=folder,
        env=ours | environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".pdf", ".png")}


@pytest.fixture(scope="module")
def plain(inputs, tmp_path_factory):
    """The figures without any settings."""
    folder = tmp_path_factory.mktemp("plain")
    figures = drawn(inputs, folder / "work", HOME=str(folder))
    assert len(figures) == 2 * 4 + 1
    return figures


@pytest.mark.parametrize(
    ("backend", "named", "in_working_folder", "in_home"),
    [
        ("module://matplotlib_inline.backend_inline", "file", None, None),
        ("nonsense", "folder", None, DISTURBING.encode()),
        ("TkAgg", "missing", DISTURBING.encode(), None),
        ("", None, NOT_UTF8, NOT_UTF8),
        ("svg", None, None, NOT_UTF8),
    ],
)
def test_figures_are_the_same_whatever_the_settings_of_matplotlib(
    inputs, plain, tmp_path, backend, named, in_working_folder, in_home
):
    work, home = tmp_path / "work", tmp_path / ".config" / "matplotlib"
    work.mkdir()
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "matplotlibrc").write_text(DISTURBING)
    paths = {"file": tmp_path / "given" / "matplotlibrc", "folder": tmp_path / "given", "missing": tmp_path / "absent"}
    if in_working_folder:
        (work / "matplotlibrc").write_bytes(in_working_folder)
    if in_home:
        (home / "stylelib").mkdir(parents=True)
        for name in ("matplotlibrc", "stylelib/default.mplstyle", "stylelib/mine.mplstyle"):
            (home / name).write_bytes(in_home)
    settings = {"MPLBACKEND": backend} | ({"MATPLOTLIBRC": str(paths[named])} if named else {})
    assert drawn(inputs, work, HOME=str(tmp_path), **settings) == plain


def test_figures_are_the_same_if_matplotlib_has_no_folder_to_write_to(inputs, plain, tmp_path):
    (tmp_path / "file").touch()
    assert drawn(inputs, tmp_path / "work", MPLCONFIGDIR=str(tmp_path / "file")) == plain
