"""A cell's result vouches for itself; what is damaged or foreign never becomes another number."""

import contextlib
import errno
import fcntl
import io
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT, config_of, read_tries, run_step, told_by, write_result
from mup_moe import sweep as sweeps
from mup_moe.analysis.aggregate import foreign_cells, run_rows
from mup_moe.analysis.collect import join_tables
from mup_moe.analysis.runs import read_table
from mup_moe.config.cell import Cell
from mup_moe.data import work
from mup_moe.data.corpus import SPLITS
from mup_moe.data.tokens import Tokens
from mup_moe.files import UserError, claim_folder, hold_folder, is_held, read_json, settle_times
from mup_moe.ops import checkpoint
from mup_moe.ops.cell_folder import HISTORY, SUMMARY, DamagedResultError, Result, keep_all, read_result
from mup_moe.ops.checkpoint import CHECKPOINT, Checkpoint
from mup_moe.ops.heartbeat import note_try
from mup_moe.training.request import fingerprint_of
from mup_moe.training.version import VERSION, VERSION_OF_CODE
from test_analysis import summary_of

CELLS = [Cell.parse(f"small_moe_mup_w{width}_e8_g1_lr2^-6_s0") for width in (32, 64, 128)]
FILES = [Path(name) for name in (SUMMARY, HISTORY, f".kept/{SUMMARY}", f".kept/{HISTORY}")]
KEPT = FILES[2:]
SHOWN = config_of(CELLS)
REQUESTS = {cell: sweeps.Sweep(SHOWN).request(cell).digest for cell in CELLS}


def test_a_try_is_told_after_one_that_was_cut_short(tmp_path):
    note_try(tmp_path, "began", 0)
    path = tmp_path / "tries.jsonl"
    with path.open("a") as file:
        file.write('{"event": "fini')
    note_try(tmp_path, "began", 7)
    note_try(tmp_path, "finished", 9)
    assert [(line["event"], line["step"]) for line in read_tries(tmp_path)] == [
        ("began", 0),
        ("began", 7),
        ("finished", 9),
    ]


def test_a_folder_without_locks_is_refused(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    for hold in (hold_folder, lambda folder: claim_folder(folder).__enter__()):
        with pytest.raises(UserError, match="on a file system without file locks"):
            hold(tmp_path)


@pytest.fixture
def few_files():
    """A process that may open a few files more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) + 8, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_files")
def test_any_number_of_cells_is_written_in_one_go_with_few_files_open(tmp_path):
    folders = [tmp_path / str(number) for number in range(60)]
    keep_all({Result(folder): ([["step"], [0]], {"id": folder.name}) for folder in folders})
    checkpoint.save({folder: Checkpoint(1, 0.0, "owner", {"x": torch.ones(1)}) for folder in folders})
    for folder in folders:
        assert read_result(folder / ".kept")["id"] == folder.name
        assert checkpoint.load(folder / CHECKPOINT).step == 1
    assert not list(tmp_path.rglob("*.part"))


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    """The process has as many files open as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # No number is free below the limit.
    handle = os.open(os.devnull, os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (handle, hard))
    os.close(handle)
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for handle in taken:
            os.close(handle)


READERS = {
    "JSON": lambda folder: read_json(folder / "a.json"),
    "a table": lambda folder: read_table(folder / "runs.csv", {"cell": str}),
    "a table to collect": lambda folder: join_tables([folder / "runs.csv"], folder / "out.csv"),
    "a result": lambda folder: read_result(folder / "cell" / ".kept"),
    "whether a cell is done": lambda folder: Result(folder / "cell").is_of("f"),
    "whose work it is": lambda folder: work.begin(folder / "work", "mine"),
    "work": lambda folder: work.Stage(folder / "work", "s", ("a",)),
}


@pytest.mark.parametrize("kind", READERS)
def test_what_cannot_be_read_for_want_of_open_files_is_neither_called_damaged_nor_changed(tmp_path, kind):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "runs.csv").write_text("cell\na\n")
    keep_all({Result(tmp_path / "cell"): ([["step"], [0]], {"id": "cell", "fingerprint": "f"})})
    work.begin(tmp_path / "work", "mine")
    with contextlib.closing(work.Stage(tmp_path / "work", "s", ("a",))) as stage:
        stage.append("a", b"12")
        stage.commit({}, now=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with (
        no_more_files(),
        pytest.raises(UserError, match=r"cannot be read \(Too many open files\): raise .*ulimit -n") as error,
    ):
        READERS[kind](tmp_path)
    assert not isinstance(error.value, DamagedResultError)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    READERS[kind](tmp_path)


@pytest.mark.parametrize("read", [read_json, lambda path: read_table(path, {"cell": str})])
def test_only_content_that_is_wrong_is_to_be_deleted(tmp_path, read):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder cannot be read \(Is a directory\): make it a file that you can read"):
        read(tmp_path / "folder")
    (tmp_path / "wrong").write_text('cell\n"\n')
    with pytest.raises(
        UserError, match=r"^.*wrong is damaged \(.*\): delete it and run the same command again$"
    ) as error:
        read(tmp_path / "wrong")
    assert str(error.value).isprintable()
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "absent")


@pytest.mark.usefixtures("few_files")
def test_too_many_open_files_end_in_a_sentence_that_names_the_limit(tmp_path):
    def claim_many() -> None:
        with contextlib.ExitStack() as held:
            for number in range(60):
                held.enter_context(claim_folder(tmp_path / str(number)))

    with pytest.raises(UserError, match=r"Too many open files\): raise .*ulimit -n"):
        claim_many()


def test_a_folder_that_somebody_only_looks_at_is_waited_for_however_long_that_takes(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("mup_moe.files._HELD", [])
    with (tmp_path / ".lock").open("wb") as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)

        def sleep(seconds):
            waits.append(seconds)
            if len(waits) == 1000:
                fcntl.flock(looked_at, fcntl.LOCK_UN)

        monkeypatch.setattr("time.sleep", sleep)
        hold_folder(tmp_path)
    assert len(waits) == 1000
    assert is_held(tmp_path)
    with pytest.raises(UserError, match="another run is working in"):
        hold_folder(tmp_path)
    assert len(waits) == 1000


def test_files_of_tomorrow_are_settled_in_their_order_but_for_those_of_elsewhere(tmp_path):
    home, elsewhere = tmp_path / "home", tmp_path / "text"
    home.mkdir()
    paths = [home / "a", home / "b", home / "old", elsewhere]
    now = time.time()
    for path, age in zip(paths, (-200_000, -100_000, 300, -100_000), strict=True):
        path.touch()
        os.utime(path, (now - age, now - age))
    assert settle_times([*paths, home / "absent"], within=home) == [elsewhere]
    b, a = (path.stat().st_mtime_ns for path in (home / "b", home / "a"))
    assert (home / "old").stat().st_mtime_ns < b < a <= time.time_ns()
    assert elsewhere.stat().st_mtime > now + 50


class Sweep:
    """Three results and the table made of them."""

    def __init__(self, folder: Path) -> None:
        self.results = folder / "cells"
        for loss, cell in enumerate(CELLS, start=3):
            write_result(self.results / cell.id, summary_of(cell, loss + 1 / 3, request=REQUESTS[cell]))
        self.victim = self.results / CELLS[1].id
        self.whole = {name: (self.victim / name).read_bytes() for name in FILES}
        self.table = folder / "figure1/runs.csv"
        self.status, self.told = self.aggregate()
        self.undisturbed = self.table.read_bytes()

    def aggregate(self) -> tuple[int, list[str]]:
        """The command's exit status and what it says."""
        self.table.unlink(missing_ok=True)
        with contextlib.redirect_stderr(io.StringIO()) as told:
            status = run_step("aggregate", "figure1", config=SHOWN, results=self.results.parent)
        return status, told_by(told.getvalue())

    @contextlib.contextmanager
    def damaged(self, damage: dict[Path, bytes | None]) -> Iterator[None]:
        """The victim with these files in place of its own; None: without that file."""
        try:
            for name, content in damage.items():
                (self.victim / name).unlink() if content is None else (self.victim / name).write_bytes(content)
            yield
        finally:
            for name, content in self.whole.items():
                (self.victim / name).write_bytes(content)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    made = Sweep(tmp_path_factory.mktemp("sweep"))
    assert (made.status, made.told) == (0, [])
    return made


def disturbed(content: bytes, place: float, bit: int | None) -> bytes:
    """The content with a bit flipped at a relative place, or cut off there."""
    at = int(place * len(content))
    return content[:at] if bit is None else content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


places = st.tuples(st.floats(0, 1, exclude_max=True), st.one_of(st.none(), st.integers(0, 7)))


@settings(max_examples=300)
@given(damage=st.dictionaries(st.sampled_from(FILES), st.one_of(st.none(), places), min_size=1))
def test_a_flipped_bit_or_a_cut_gives_the_same_table_or_one_sentence(sweep, damage):
    changed = {name: how and disturbed(sweep.whole[name], *how) for name, how in damage.items()}
    with sweep.damaged(changed):
        status, told = sweep.aggregate()
        if status == 0:
            assert sweep.table.read_bytes() == sweep.undisturbed
        else:
            assert not sweep.table.exists()
            assert not set(damage).isdisjoint(KEPT)
            (sentence,) = told
            assert sentence.startswith("mup-moe: ")
            assert sweep.victim.name in sentence
            assert "delete their folders" in sentence
        # What is mended stays so, and is said once.
        if status == 0 and told:
            assert "restored from its kept copy" in told[0]
            assert sweep.aggregate() == (0, [])


@pytest.mark.parametrize("name", FILES, ids=str)
def test_a_digit_that_changed_is_noticed(sweep, name):
    content = sweep.whole[name]
    digit = content.index(b"4.") if name.name == SUMMARY else content.rindex(b"4.5")
    other = content[:digit] + b"9" + content[digit + 1 :]
    with sweep.damaged({name: other}):
        with pytest.raises(DamagedResultError, match="was altered after it was written"):
            read_result((sweep.victim / name).parent)
        assert Result(sweep.victim).is_of("f" * 8) == (name not in KEPT)
        assert sweep.aggregate()[0] == 0
        assert sweep.table.read_bytes() == sweep.undisturbed


@pytest.mark.parametrize("damage", [b"{", b"[]", b"", b'{"cell": {}}', b"\xff", None])
def test_what_no_copy_can_mend_is_named(sweep, damage):
    with sweep.damaged({FILES[0]: damage, FILES[2]: damage}):
        status, (told,) = sweep.aggregate()
    assert status == 1
    assert sweep.victim.name in told
    assert "1 of 3 results damaged" in told


def test_a_summary_of_an_earlier_version_is_not_trusted(sweep):
    summary = json.loads(sweep.whole[FILES[0]])
    assert list(summary)[-1] == "summary_sha256"
    del summary["summary_sha256"]
    old = json.dumps(summary).encode()
    with sweep.damaged({FILES[0]: old, FILES[2]: old}):
        status, (told,) = sweep.aggregate()
    assert status == 1
    assert "has no digest" in told


def test_a_copy_that_another_config_made_mends_nothing(sweep, tmp_path):
    write_result(tmp_path / sweep.victim.name, summary_of(CELLS[1], 9.0, request="another"))
    other = {name: (tmp_path / sweep.victim.name / name).read_bytes() for name in KEPT}
    with sweep.damaged({FILES[0]: b"{", **other}):
        status, (told,) = sweep.aggregate()
    assert status == 1
    assert "is not JSON" in told


def test_another_cells_result_is_refused(sweep):
    other = {name: (sweep.results / CELLS[0].id / name).read_bytes() for name in FILES}
    with sweep.damaged(other):
        status, (told,) = sweep.aggregate()
    assert status == 1
    assert f"it holds cell {CELLS[0].id}" in told


def test_only_what_is_whole_is_brought_home(sweep, tmp_path):
    folder = tmp_path / sweep.victim.name
    history, summary = sweep.whole[FILES[1]], sweep.whole[FILES[0]]
    for files in ((history + b"1,4.5\n", summary), (history, summary.replace(b"4.3", b"3.3"))):
        with pytest.raises(UserError, match="was altered after it was written"):
            Result(folder).adopt(*files)
        assert not folder.exists()
    assert Result(folder).adopt(history, summary)
    assert read_result(folder) == read_result(sweep.victim)


def test_results_are_read_without_torch():
    code = "import sys, mup_moe.analysis.aggregate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "src")}).returncode == 0


# ---------------------------------------------------------------- foreign cells


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of today's tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    for split in SPLITS:
        (folder / f"{split}.bin").write_bytes(b"\0\0")
    splits = {split: {"tokens": 1, "tokens_sha256": "5" * 64} for split in SPLITS}
    manifest = {"vocabulary": 9, "end_of_text": 0, "dtype": "uint16", "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_result_from_before_versions_is_of_the_version_whose_numbers_its_code_has(tmp_path):
    (code,), folder = VERSION_OF_CODE, tmp_path / CELLS[0].id
    made_of = {"request": "r", "tokens_digest": "t", "fingerprint": "of the digest of the code"}
    old = {name: value for name, value in summary_of(CELLS[0], 3.5, **made_of).items() if name != "version"}
    write_result(folder, old | {"code": code})
    kept = (folder / "summary.json").read_bytes()
    assert read_result(folder)["version"] == VERSION_OF_CODE[code]
    assert Result(folder).is_of(fingerprint_of("r", "t", VERSION_OF_CODE[code]))
    (row,) = run_rows([(CELLS[0].id, "r")], tmp_path)
    assert row["fingerprint"] == fingerprint_of("r", "t", VERSION_OF_CODE[code])
    assert (folder / "summary.json").read_bytes() == kept
    # Of any other code nobody knows.
    write_result(folder, old | {"code": "another"})
    assert read_result(folder)["fingerprint"] == "of the digest of the code"
    assert foreign_cells({"a": "r", "b": "r"}, {"a": told_of(version=None), "b": told_of(version=VERSION)}, None) == {
        "a": "trained by another version"
    }


def told_of(tokens="t", version=0, precision="float32", request="r"):
    """What decides whether a cell is foreign."""
    made = {"request": request, "tokens_digest": tokens, "version": version, "precision": precision}
    return {"cell": {"setup": "small"}} | made


def foreign_of(told, corpus=None):
    return foreign_cells(dict.fromkeys(told, "r"), told, corpus)


def test_the_group_at_home_is_of_todays_tokens_then_of_this_version_then_the_largest(corpus):
    told = {"a": told_of(), "b": told_of(precision="bfloat16"), "c": told_of(precision="bfloat16")}
    assert foreign_of(told, corpus) == {"a": "trained in another precision"}
    told["d"] = told_of(version=VERSION)
    assert set(foreign_of(told, corpus)) == {"a", "b", "c"}
    told["e"] = told_of(tokens=Tokens.open(corpus).digest)
    foreign = foreign_of(told, corpus)
    assert set(foreign) == {"a", "b", "c", "d"}
    assert foreign["b"] == "trained on other tokens and in another precision"
    # Where there are no tokens, nothing is said of them.
    assert set(foreign_of(told, corpus / "nowhere")) == {"a", "b", "c", "e"}


def test_set_ups_are_not_compared_with_each_other():
    told = {"a": told_of(), "b": told_of(precision="bfloat16") | {"cell": {"setup": "medium"}}}
    assert foreign_of(told) == {}


@given(
    st.lists(st.tuples(st.sampled_from("rs"), st.booleans(), st.booleans()), max_size=9),
)
def test_what_is_alike_is_not_foreign_and_what_is_deleted_and_trained_anew_comes_home(corpus, ways):
    today = {"tokens": Tokens.open(corpus).digest, "version": VERSION}
    told = {
        str(number): told_of(request=request, tokens=today["tokens"] if tokens else "t", version=VERSION if new else 0)
        for number, (request, tokens, new) in enumerate(ways)
    }
    foreign = foreign_of(told, corpus)
    assert {name for name, of_cell in told.items() if of_cell["request"] != "r"} <= set(foreign)
    kept = [of_cell for name, of_cell in told.items() if name not in foreign]
    assert all(of_cell == kept[0] for of_cell in kept)
    assert bool(kept) == any(request == "r" for request, *_ in ways)
    # By what it names, the command is satisfied in the end: no cell is named a second time.
    named = set()
    while foreign:
        assert named.isdisjoint(foreign)
        named |= set(foreign)
        told |= dict.fromkeys(foreign, told_of(**today))
        foreign = foreign_of(told, corpus)
