"""A cell's result is checked by its digest: damaged or foreign results never change a number."""

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

from conftest import ROOT, config_of, lines_after_config, read_tries, run_step, write_result
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


def test_a_try_is_recorded_after_a_line_that_was_cut_short(tmp_path):
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
    """Lets the process open only a few files more than it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) + 8, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_files")
def test_any_number_of_cells_is_written_together_with_few_files_open(tmp_path):
    folders = [tmp_path / str(number) for number in range(60)]
    keep_all({Result(folder): ([["step"], [0]], {"id": folder.name}) for folder in folders})
    checkpoint.save({folder: Checkpoint(1, 0.0, "owner", {"x": torch.ones(1)}) for folder in folders})
    for folder in folders:
        assert read_result(folder / ".kept")["id"] == folder.name
        assert checkpoint.load(folder / CHECKPOINT).step == 1
    assert not list(tmp_path.rglob("*.part"))


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    """Opens as many files as the process may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Lower the limit to the next free descriptor.
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
    "the owner of work": lambda folder: work.begin(folder / "work", "mine"),
    "work": lambda folder: work.Stage(folder / "work", "s", ("a",)),
}


@pytest.mark.parametrize("kind", READERS)
def test_files_that_cannot_be_opened_for_lack_of_descriptors_are_neither_called_damaged_nor_changed(tmp_path, kind):
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
def test_only_a_file_with_wrong_content_is_to_be_deleted(tmp_path, read):
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


def test_a_folder_under_a_shared_lock_is_waited_for_however_long_that_takes(tmp_path, monkeypatch):
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


def test_future_times_of_files_are_corrected_in_order_except_outside_the_folder(tmp_path):
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
    """Three results and the table made from them."""

    def __init__(self, folder: Path) -> None:
        self.results = folder / "cells"
        for loss, cell in enumerate(CELLS, start=3):
            write_result(self.results / cell.id, summary_of(cell, loss + 1 / 3, request=REQUESTS[cell]))
        self.victim = self.results / CELLS[1].id
        self.whole = {name: (self.victim / name).read_bytes() for name in FILES}
        self.table = folder / "figure1/runs.csv"
        self.status, self.messages = self.aggregate()
        self.undisturbed = self.table.read_bytes()

    def aggregate(self) -> tuple[int, list[str]]:
        """Runs the command; returns its exit status and messages."""
        self.table.unlink(missing_ok=True)
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            status = run_step("aggregate", "figure1", config=SHOWN, results=self.results.parent)
        return status, lines_after_config(errors.getvalue())

    @contextlib.contextmanager
    def damaged(self, damage: dict[Path, bytes | None]) -> Iterator[None]:
        """Replaces files of the victim, or removes them (None), and restores them afterwards."""
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
    assert (made.status, made.messages) == (0, [])
    return made


def disturbed(content: bytes, place: float, bit: int | None) -> bytes:
    """Returns the content with a bit flipped at a relative place, or cut off there."""
    at = int(place * len(content))
    return content[:at] if bit is None else content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


places = st.tuples(st.floats(0, 1, exclude_max=True), st.one_of(st.none(), st.integers(0, 7)))


@settings(max_examples=300)
@given(damage=st.dictionaries(st.sampled_from(FILES), st.one_of(st.none(), places), min_size=1))
def test_a_flipped_bit_or_a_cut_gives_the_same_table_or_one_sentence(sweep, damage):
    changed = {name: how and disturbed(sweep.whole[name], *how) for name, how in damage.items()}
    with sweep.damaged(changed):
        status, reported = sweep.aggregate()
        if status == 0:
            assert sweep.table.read_bytes() == sweep.undisturbed
        else:
            assert not sweep.table.exists()
            assert not set(damage).isdisjoint(KEPT)
            (sentence,) = reported
            assert sentence.startswith("mup-moe: ")
            assert sweep.victim.name in sentence
            assert "delete their folders" in sentence
        # A restored file stays restored, and the message appears only once.
        if status == 0 and reported:
            assert "restored from its kept copy" in reported[0]
            assert sweep.aggregate() == (0, [])


@pytest.mark.parametrize("name", FILES, ids=str)
def test_a_changed_digit_is_noticed(sweep, name):
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
def test_a_result_that_no_copy_can_restore_is_named(sweep, damage):
    with sweep.damaged({FILES[0]: damage, FILES[2]: damage}):
        status, (reported,) = sweep.aggregate()
    assert status == 1
    assert sweep.victim.name in reported
    assert "1 of 3 results in " in reported
    assert " are damaged: " in reported


def test_a_summary_of_an_earlier_version_is_not_trusted(sweep):
    summary = json.loads(sweep.whole[FILES[0]])
    assert list(summary)[-1] == "summary_sha256"
    del summary["summary_sha256"]
    old = json.dumps(summary).encode()
    with sweep.damaged({FILES[0]: old, FILES[2]: old}):
        status, (reported,) = sweep.aggregate()
    assert status == 1
    assert "has no digest" in reported


def test_a_copy_that_another_config_made_restores_nothing(sweep, tmp_path):
    write_result(tmp_path / sweep.victim.name, summary_of(CELLS[1], 9.0, request="another"))
    other = {name: (tmp_path / sweep.victim.name / name).read_bytes() for name in KEPT}
    with sweep.damaged({FILES[0]: b"{", **other}):
        status, (reported,) = sweep.aggregate()
    assert status == 1
    assert "is not JSON" in reported


def test_another_cells_result_is_refused(sweep):
    other = {name: (sweep.results / CELLS[0].id / name).read_bytes() for name in FILES}
    with sweep.damaged(other):
        status, (reported,) = sweep.aggregate()
    assert status == 1
    assert f"it holds cell {CELLS[0].id}" in reported


def test_only_whole_results_are_imported(sweep, tmp_path):
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
    """The folder of the current tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    for split in SPLITS:
        (folder / f"{split}.bin").write_bytes(b"\0\0")
    splits = {split: {"tokens": 1, "tokens_sha256": "5" * 64} for split in SPLITS}
    manifest = {"vocabulary": 9, "end_of_text": 0, "dtype": "uint16", "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_result_from_before_versions_gets_the_version_with_the_same_numbers(tmp_path):
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
    # The version of any other code is unknown.
    write_result(folder, old | {"code": "another"})
    assert read_result(folder)["fingerprint"] == "of the digest of the code"
    assert foreign_cells({"a": "r", "b": "r"}, {"a": made_by(version=None), "b": made_by(version=VERSION)}, None) == {
        "a": "trained by another version"
    }


def made_by(tokens="t", version=0, precision="float32", request="r"):
    """Returns the values that decide whether a cell is foreign."""
    made = {"request": request, "tokens_digest": tokens, "version": version, "precision": precision}
    return {"cell": {"setup": "small"}} | made


def foreign_of(reported, corpus=None):
    return foreign_cells(dict.fromkeys(reported, "r"), reported, corpus)


def test_the_home_group_has_the_current_tokens_then_this_version_then_the_most_cells(corpus):
    reported = {"a": made_by(), "b": made_by(precision="bfloat16"), "c": made_by(precision="bfloat16")}
    assert foreign_of(reported, corpus) == {"a": "trained in another precision"}
    reported["d"] = made_by(version=VERSION)
    assert set(foreign_of(reported, corpus)) == {"a", "b", "c"}
    reported["e"] = made_by(tokens=Tokens.open(corpus).digest)
    foreign = foreign_of(reported, corpus)
    assert set(foreign) == {"a", "b", "c", "d"}
    assert foreign["b"] == "trained on other tokens and in another precision"
    # Without tokens, cells are not compared by them.
    assert set(foreign_of(reported, corpus / "nowhere")) == {"a", "b", "c", "e"}


def test_set_ups_are_not_compared_with_each_other():
    reported = {"a": made_by(), "b": made_by(precision="bfloat16") | {"cell": {"setup": "medium"}}}
    assert foreign_of(reported) == {}


@given(
    st.lists(st.tuples(st.sampled_from("rs"), st.booleans(), st.booleans()), max_size=9),
)
def test_equal_cells_are_not_foreign_and_retrained_cells_join_them(corpus, ways):
    today = {"tokens": Tokens.open(corpus).digest, "version": VERSION}
    reported = {
        str(number): made_by(request=request, tokens=today["tokens"] if tokens else "t", version=VERSION if new else 0)
        for number, (request, tokens, new) in enumerate(ways)
    }
    foreign = foreign_of(reported, corpus)
    assert {name for name, of_cell in reported.items() if of_cell["request"] != "r"} <= set(foreign)
    kept = [of_cell for name, of_cell in reported.items() if name not in foreign]
    assert all(of_cell == kept[0] for of_cell in kept)
    assert bool(kept) == any(request == "r" for request, *_ in ways)
    # Retraining the named cells satisfies the command in the end: no cell is named twice.
    named = set()
    while foreign:
        assert named.isdisjoint(foreign)
        named |= set(foreign)
        reported |= dict.fromkeys(foreign, made_by(**today))
        foreign = foreign_of(reported, corpus)
