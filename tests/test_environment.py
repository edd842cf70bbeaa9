"""A job has the environment of its Snakemake, whatever the machine, the user and the working folder hold."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import ROOT, TARGET, make_project, smoke, snakemake

pytestmark = pytest.mark.workflow

# Names that a user's file may have: a module of ours, of a package, of Python, or one that Python runs by itself.
MODULES = ["pydantic", "torch", "pandas", "numpy", "yaml", "tokenizers", "matplotlib", "seaborn", "tqdm"]
MODULES += ["mup_moe", "snakemake", "json", "argparse", "importlib", "random", "sitecustomize", "usercustomize"]
PACKAGES = sysconfig.get_path("purelib")
# A user id without a name, as in a container, and how `getpwuid` fails there.
NAMELESS = """
import pwd
def getpwuid(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")
pwd.getpwuid = getpwuid
"""


def write_modules(folder: Path, without: Collection[str] = ()) -> Path:
    """Writes files to a working folder that have names of modules and leave a mark when they are imported."""
    folder.mkdir(exist_ok=True)
    for name in set(MODULES) - set(without):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'imported')!r}, 'a').write({name!r})\n1 / 0\n")
    return folder


def write_bare_python(folder: Path) -> Path:
    """Makes an interpreter without any packages, which is only called python3."""
    venv.create(folder, symlinks=True)
    target = (folder / "bin/python3").resolve()
    for path in (folder / "bin").glob("python*"):
        path.unlink()
    (folder / "bin/python3").symlink_to(target)
    return folder / "bin/python3"


@dataclass(frozen=True)
class Run:
    """A finished workflow on an unfamiliar machine."""

    checkout: Path
    folder: Path
    done: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    world = tmp_path_factory.mktemp("world")
    checkout = make_project(world / "checkout")
    folder = write_modules(world / "work")
    write_modules(checkout)
    shutil.move(checkout / "smoke.txt", folder)
    (world / "start/relative").mkdir(parents=True)
    (world / "start/relative/sitecustomize.py").write_text(NAMELESS)
    (world / "bin").mkdir()
    (world / "bin/python").write_text("#!/bin/sh\nexit 127\n")
    (world / "bin/python").chmod(0o755)
    command = [write_bare_python(world / "bare"), "-P", "-m", "snakemake", "--snakefile", checkout / "Snakefile"]
    command += ["--directory", folder, "--configfile", checkout / "smoke.yaml", "--cores", "2", TARGET]
    environment = {
        "PATH": f"{world / 'bin'}:/usr/bin:/bin",
        "HOME": "/dev/null",  # below which nobody can create anything
        "PYTHONPATH": f":relative:{PACKAGES}:.",
    }
    done = subprocess.run(
        command,
        cwd=world / "start",
        env=environment,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Run(checkout, folder, done)


def test_a_workflow_works_without_home_name_activation_or_python(run):
    assert run.done.returncode == 0, run.done.stdout
    assert (run.folder / TARGET).stat().st_size > 0


def test_nothing_from_the_working_folder_or_the_checkout_is_imported(run):
    assert not (run.folder / "imported").exists()
    assert not (run.checkout / "imported").exists()


@pytest.mark.parametrize("path", ["{src}", "{src}:", ":{src}:.", "{src}:{folder}"])
@pytest.mark.parametrize("command", ["status", "tokenize", "train", "figure", "plan"])
def test_a_command_imports_nothing_from_the_folder_that_it_is_called_in(tmp_path, command, path):
    # Python itself imports some before our code runs.
    write_modules(tmp_path, without=["importlib", "mup_moe", "sitecustomize", "usercustomize"])
    done = subprocess.run(
        [sys.executable, "-m", "mup_moe", command, "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path.format(src=ROOT / "src", folder=tmp_path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "imported").exists()


def test_a_job_imports_nothing_from_a_working_folder_that_is_in_pythonpath(tmp_path, monkeypatch):
    project = make_project(tmp_path / "project")
    # Snakemake itself may import the others.
    write_modules(project, without=set(MODULES) - {"torch", "tokenizers"})
    monkeypatch.setenv("PYTHONPATH", str(project))
    done = smoke(project, "results/data/smoke/manifest.json")
    assert done.returncode == 0, done.stdout
    assert not (project / "imported").exists()


def test_a_users_own_cache_of_compiled_code_is_kept(tmp_path, monkeypatch):
    project = make_project(tmp_path / "project")
    for given, used in [("/fast/cache", "/fast/cache"), ("", f"{project}/.snakemake/torch")]:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
        (project / "Snakefile").write_text(
            f"{(ROOT / 'Snakefile').read_text()}\nprint('cache:', os.environ['TORCHINDUCTOR_CACHE_DIR'])\n"
        )
        assert f"cache: {used}\n" in snakemake(project, "-n", "results/table1.csv").stdout


# ---------------------------------------------------------------- other usages


@pytest.mark.parametrize(
    "usage",
    [
        'module mup:\n    snakefile: "{checkout}/Snakefile"\n    config: config\nuse rule * from mup\n',
        'module mup:\n    snakefile: "{checkout}/Snakefile"\nuse rule * from mup as mup_*\n',
        'include: "{checkout}/Snakefile"\n',
    ],
)
def test_use_as_a_module_ends_in_one_sentence(tmp_path, usage):
    (tmp_path / "Snakefile").write_text(usage.format(checkout=ROOT))
    done = snakemake(tmp_path, "-n", "--workflow-profile", "none")
    assert done.returncode != 0
    assert "mup-moe is not a module for other workflows" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_module_in_the_folder_of_the_checkout_ends_in_that_sentence(tmp_path):
    project = make_project(tmp_path / "project")
    (project / "Mine.smk").write_text('module mup:\n    snakefile: "Snakefile"\nuse rule * from mup as mup_*\n')
    done = snakemake(project, "-n", "--snakefile", "Mine.smk")
    assert done.returncode != 0
    assert "mup-moe is not a module for other workflows" in done.stdout


def test_the_snakefile_may_be_named_by_any_path(tmp_path):
    project = make_project(tmp_path / "project")
    (project / "workflow/deep").mkdir()
    for folder, path in [(tmp_path, "project/Snakefile"), (project / "workflow", "deep/../../Snakefile")]:
        done = snakemake(folder, "results/table1.csv", "--cores", "2", "--snakefile", path, "--directory", tmp_path)
        assert done.returncode == 0, done.stdout
        (tmp_path / "results/table1.csv").unlink()


@pytest.mark.parametrize(("name", "elsewhere"), [("{x} {{y}}", False), ("a:b", False), ("<x>", True)])
def test_a_checkout_in_a_folder_that_cannot_be_used_is_refused(tmp_path, name, elsewhere):
    checkout = make_project(tmp_path / name)
    (tmp_path / "work").mkdir()
    shutil.copy2(checkout / "smoke.txt", tmp_path / "work")
    directory = tmp_path / "work" if elsewhere else checkout
    done = snakemake(checkout, "-n", TARGET, "--configfile", "smoke.yaml", "--directory", directory)
    assert done.returncode != 0
    sentence = f"the path of the checkout, {checkout}, contains {{}}, <> or a colon, which does not work"
    assert f"{sentence}: rename that folder" in done.stdout
    assert "Traceback" not in done.stdout


CONDA = r"""#!/usr/bin/env {python}
# The parts of conda that Snakemake uses. An environment is made from the given file and nothing else.
import json, re, sys, venv
from importlib import metadata
from pathlib import Path
import yaml
arguments = sys.argv[1:]
if arguments[0] == "--version":
    print("conda 25.1.1")
elif arguments[0] == "info":
    print(json.dumps(dict(conda_prefix={prefix!r}, platform="linux-64")))
elif arguments[0] == "config":
    print(json.dumps(dict(get=dict(channel_priority="strict"))))
elif arguments[0] != "clean":
    assert arguments[:2] == ["env", "create"], arguments
    file, prefix = (Path(arguments[arguments.index(name) + 1]) for name in ("--file", "--prefix"))
    assert sorted(path.name for path in file.parent.iterdir() if path.suffix != ".yaml") == [], "no other file is there"
    environment = yaml.safe_load(file.read_text())
    [pip] = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    for line in pip:
        name, version = line.split("==")
        assert metadata.version(name).partition("+")[0] == version, line
    venv.create(prefix, symlinks=True)
    [packages] = prefix.glob("lib/python*/site-packages")
    (packages / "all.pth").write_text({packages!r} + f"\nimport sys; open('used', 'w').write(sys.prefix)\n")
    (prefix / "conda-meta").mkdir()
"""


@pytest.fixture
def conda(tmp_path: Path) -> Path:
    """A folder for PATH with a minimal conda."""
    prefix = tmp_path / "conda"
    (prefix / "bin").mkdir(parents=True)
    text = CONDA.replace("{python}", f"-S {sys.executable}")
    for name, value in (("prefix", str(prefix)), ("packages", PACKAGES)):
        text = text.replace(f"{{{name}!r}}", repr(value))
    (prefix / "bin/conda").write_text(text)
    (prefix / "bin/conda").chmod(0o755)
    (prefix / "bin/activate").write_text('export PATH="$1/bin:$PATH" CONDA_PREFIX="$1"\n')
    return prefix / "bin"


def test_jobs_run_in_the_environment_that_conda_makes_from_the_file_alone(tmp_path, conda, monkeypatch):
    project = make_project(tmp_path / "project")
    monkeypatch.setenv("PATH", f"{conda}:{os.environ['PATH']}")
    done = snakemake(project, "--sdm", "conda", "--configfile", "smoke.yaml", "--cores", "2", "results/figure1.pdf")
    assert done.returncode == 0, done.stdout
    assert (project / "results/figure1.pdf").stat().st_size > 0
    [environment] = (project / ".snakemake/conda").glob("*_")
    assert (project / "used").read_text() == str(environment)
