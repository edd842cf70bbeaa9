"""Corpora that nobody means well: each ends in tokens or in one sentence, within bounded memory."""

import gzip
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ROOT
from mup_moe.data import c4, text_files, tokenizer
from mup_moe.data.documents import Tally
from mup_moe.data.tokenize import tokenize
from mup_moe.data.tokens import Tokens
from mup_moe.files import UserError
from test_data import corpus, read, text_corpus, write_jsonl

MB = 2**20


def sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert text.isprintable()
    return text


# ---------------------------------------------------------------- what is no file


def make(kind: str, path: Path) -> Path:
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            # Its address is short, and it stays when the socket is closed.
            with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as opened:
                opened.bind(f"{folder}/s")
                Path(f"{folder}/s").rename(path)
        case "folder":
            path.mkdir()
        case "a link to itself":
            path.symlink_to(path.name)
        case "two links to each other":
            path.symlink_to("other.txt")
            (path.parent / "other.txt").symlink_to(path.name)
        case "a link to nothing":
            path.symlink_to("nothing")
        case "a link to a device":
            path.symlink_to("/dev/zero")
    return path


KINDS = ["fifo", "socket", "folder", "a link to itself", "two links to each other", "a link to nothing"]
KINDS += ["a link to a device"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused_by_name_and_skipped_by_a_glob(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path / "odd.txt")
    with pytest.raises(UserError, match=r"`files` lists .*odd\.txt") as error:
        read(text_corpus(path))
    assert sentence(error)
    (tmp_path / "a.txt").write_text("text")
    assert read(text_corpus(tmp_path / "*.txt"))[0] == ["text"]
    with pytest.raises(UserError, match=r"`tokenizer_files` .* is no file"):
        tokenizer.gpt2((str(path), str(path)))


def test_folders_that_hold_themselves_are_searched_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("text")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to("b")
    for pattern in ("**/*.txt", "**/**/*.txt", "*/*.txt", "a/again/a/again/**/*.txt"):
        assert read(text_corpus(tmp_path / pattern))[0] == ["text"], pattern


@pytest.mark.parametrize(
    "pattern", ["x" * 300, "x" * 300 + "*", "a\0b", "~nobody-of-this-name/x", "a/" * 3000 + "*", "**"]
)
def test_a_path_that_cannot_be_is_refused(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="`files` lists") as error:
        read(text_corpus(pattern))
    assert sentence(error)


# ---------------------------------------------------------------- names

NAMES = [
    "$(touch pwned).txt",
    "; touch pwned;.txt",
    "`touch pwned`.txt",
    'it\'s "quoted".txt',
    "a\nb.txt",
    "{wildcards.corpus}{}.txt",
    "-rf.txt",
    "--help.txt",
    " .txt",
    "[a]*?.txt",
    "é🏳️‍🌈.txt",
    os.fsdecode(b"\xff\xfe.txt"),
    "&|<>!#%\\.txt",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_files_name_is_nothing_but_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(b"one\n" * 3000 + b"\n" + b"two\n" * 3000)
    assert read(text_corpus(name))[0] == read(text_corpus("*"))[0]
    tokenize(text_corpus("*.txt", validation_fraction=0.5), tmp_path / "out", 1)
    assert len(Tokens.open(tmp_path / "out").train) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", name])
    damaged = name.removesuffix(".txt") + ".json"
    Path(damaged).write_text("no JSON")
    with pytest.raises(UserError, match=r"\.json.*, line 1, is no JSON object") as error:
        read(text_corpus(damaged))
    assert sentence(error)


# ---------------------------------------------------------------- bytes


def parquet(**options: str | bool) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": range(50), "text": [f"text {i % 7} é" * 3 for i in range(50)]}), buffer, **options)
    return buffer.getvalue()


LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in ["one", "two \ud800", "\0", "", "é"] * 3)
WHOLE = {
    ".txt": LINES,
    ".txt.gz": gzip.compress(LINES, mtime=0),
    ".jsonl": LINES,
    ".json.gz": gzip.compress(LINES, mtime=0),
}


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with a few bytes changed, taken out or put in, or something else altogether."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.sampled_from([0, 1, 1, 1, 20, 10**9]))] = draw(st.binary(max_size=3))
    return bytes(data)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(WHOLE)).flatmap(lambda e: st.tuples(st.just(e), damaged(WHOLE[e]) | st.binary(max_size=50)))
)
def test_any_bytes_are_documents_or_refused(tmp_path: Path, file: tuple[str, bytes]) -> None:
    path = tmp_path / f"a{file[0]}"
    path.write_bytes(file[1])
    try:
        found, _ = read(text_corpus(path))
    except UserError as error:
        said = str(error)
    else:
        said = f"{path}"
        assert all(text.strip() and text.encode() for text in found)
    assert str(path) in said
    assert said.isprintable()


# A process of its own: Arrow is known to abort on damaged files.
DAMAGED_PARQUET = """
import random, sys
from pathlib import Path
from mup_moe.data.text_files import read_file
from mup_moe.files import UserError
path, wholes = Path(sys.argv[1]), [Path(name).read_bytes() for name in sys.argv[2:]]
generator = random.Random(0)
refused = 0
for _ in range(500):
    data = bytearray(generator.choice(wholes))
    for _ in range(generator.choice([1, 1, 2, 5])):
        place = generator.randrange(len(data))
        data[place : place + generator.choice([0, 1, 1, 20])] = generator.randbytes(generator.choice([0, 1, 1, 8]))
    path.write_bytes(data)
    try:
        list(read_file(path))
    except UserError as error:
        assert str(path) in str(error) and str(error).isprintable(), error
        refused += 1
print(refused)
"""


def run(code: str, *arguments: str | Path) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_damaged_parquet_files_are_documents_or_refused(tmp_path: Path) -> None:
    wholes = []
    for compression in ("snappy", "zstd", "none"):
        wholes.append(tmp_path / f"{compression}.parquet")
        wholes[-1].write_bytes(parquet(compression=compression, use_dictionary=compression == "zstd"))
    assert int(run(DAMAGED_PARQUET, tmp_path / "a.parquet", *wholes)) > 100


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array(["a", "b", None]).dictionary_encode(), ["a", "b"]),
        (pa.nulls(3), []),
        (pa.array([], pa.string()), []),
    ],
)
def test_a_column_of_any_kind_of_text_is_read(tmp_path: Path, values: pa.Array, expected: list[str]) -> None:
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    assert read(text_corpus(tmp_path / "a.parquet"))[0] == expected


def test_bytes_that_are_no_text_end_in_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\0" * 40_000 + b"\n\n" + bytes(range(256)) * 400 + b"\n\n" + b"\xff" * 30_000)
    (tmp_path / "b.txt").write_text("word " * 100_000, encoding="utf-16")
    write_jsonl(tmp_path / "c.jsonl")
    (tmp_path / "d.txt").write_text("")
    manifest = tokenize(text_corpus(tmp_path / "*.*"), tmp_path / "out", 1)
    assert manifest["repaired"] > 0
    assert len(Tokens.open(tmp_path / "out", verify=True).train) > 60_000


# ---------------------------------------------------------------- bombs

# VmHWM is of this process alone; what getrusage tells begins with its parent's.
READ = """
import sys
from mup_moe.data.documents import Place, open_source, read_batches
from mup_moe.data.tokenize import parse_corpus
from mup_moe.files import UserError
import pyarrow.parquet
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
settings, before, size, said = parse_corpus(sys.argv[1]), peak(), 0, ""
try:
    for batch in read_batches(open_source(settings, None), Place(), 0.1, settings.max_bytes):
        size += sum(len(document.text.encode()) for document in batch.documents)
except UserError as error:
    said = str(error)
print(peak() - before, size, said, sep="|")
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")


def read_apart(path: Path, max_bytes: int | None = None) -> tuple[int, int, str]:
    """Reads a file in its own process: the memory that takes, the bytes of its documents, what it is refused with."""
    settings = {"source": "text", "tokenizer": "bpe", "vocabulary": 300, "validation_fraction": 0.1}
    peak, size, said = run(READ, json.dumps(settings | {"files": [str(path)], "max_bytes": max_bytes})).split("|")
    return int(peak), int(size), said.strip()


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a MB or less that unpack to a GiB and more."""
    folder = tmp_path_factory.mktemp("bombs")
    zeros = gzip.compress(bytes(64 * MB)) * 16
    for name in ("a.txt.gz", "a.json.gz"):
        (folder / name).write_bytes(zeros)
    one = gzip.compress(b'{"text": "') + gzip.compress(b"a" * (60 * MB)) + gzip.compress(b'"}\n')
    (folder / "record.json.gz").write_bytes(one)
    many = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["a" * MB]))
    pq.write_table(pa.table({"text": many}), folder / "many.parquet")
    return folder


@needs_proc
def test_a_bomb_of_text_is_read_in_little_memory(bombs: Path) -> None:
    peak, size, said = read_apart(bombs / "a.txt.gz")
    assert (size, said) == (2**30, "")
    assert peak < 64 * MB


@needs_proc
@pytest.mark.parametrize("name", ["a.txt.gz", "many.parquet", "record.json.gz"])
def test_a_bomb_is_unpacked_no_further_than_max_bytes(bombs: Path, name: str) -> None:
    peak, size, said = read_apart(bombs / name, 2 * MB)
    assert said == ""
    assert 2 * MB <= size <= 3 * MB
    assert peak < 320 * MB


@needs_proc
def test_a_line_without_end_is_refused_in_bounded_memory(bombs: Path) -> None:
    for max_bytes in (None, 2 * MB):
        peak, size, said = read_apart(bombs / "a.json.gz", max_bytes)
        assert said.endswith(
            "a.json.gz, line 1, is longer than 67,108,864 characters: cut it into several, or give it as plain text"
        )
        assert size == 0
        assert peak < 320 * MB


def test_a_record_without_end_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "RECORD_CHARACTERS", 1000)
    pq.write_table(pa.table({"text": ["a" * 9000]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "a" * 990}))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "a" * 900}))
    for name, place in (("a.parquet", "has a record that"), ("a.jsonl", "line 2,")):
        with pytest.raises(UserError, match=rf"{name}.* {place} is longer than 1,000 characters") as error:
            read(text_corpus(tmp_path / name))
        assert sentence(error)
    assert read(text_corpus(tmp_path / "b.jsonl")) == (["a" * 900], Tally())


# ---------------------------------------------------------------- the hub


def test_c4_is_asked_for_by_name_and_runs_no_code_of_its_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*arguments: object, **options: object) -> datasets.IterableDataset:
        asked.append((arguments, options))
        return datasets.IterableDataset.from_generator(lambda: iter([{"text": "a", "url": "u"}]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read(corpus(source="c4", files=(), max_bytes=10))[0] == ["a"]
    assert asked == [(("allenai/c4", "en"), {"split": "train", "streaming": True})]
    assert "trust" not in Path(c4.__file__).read_text()
