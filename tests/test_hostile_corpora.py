"""Hostile corpora: each ends in tokens or in one sentence, within bounded memory."""

import codecs
import gzip
import importlib
import io
import json
import math
import os
import pickle
import random
import re
import socket
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import wave
import zipfile
from collections.abc import Callable
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


# ---------------------------------------------------------------- paths that are not files


def make(kind: str, path: Path) -> Path:
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            # The address of a socket must be short; its file remains when the socket is closed.
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
def test_a_path_that_is_not_a_file_is_refused_by_name_and_skipped_by_a_glob(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path / "odd.txt")
    with pytest.raises(UserError, match=r"`files` lists .*odd\.txt") as error:
        read(text_corpus(path))
    assert sentence(error)
    (tmp_path / "a.txt").write_text("text")
    assert read(text_corpus(tmp_path / "*.txt"))[0] == ["text"]
    with pytest.raises(UserError, match=r"`tokenizer_files` lists .* is not a file"):
        tokenizer.gpt2((str(path), str(path)))


def test_folders_that_contain_themselves_are_searched_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("text")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to("b")
    for pattern in ("**/*.txt", "**/**/*.txt", "*/*.txt", "a/again/a/again/**/*.txt"):
        assert read(text_corpus(tmp_path / pattern))[0] == ["text"], pattern


@pytest.mark.parametrize(
    "pattern", ["x" * 300, "x" * 300 + "*", "a\0b", "~nobody-of-this-name/x", "a/" * 3000 + "*", "**"]
)
def test_an_impossible_path_is_refused(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_the_name_of_a_file_is_never_interpreted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(b"one\n" * 3000 + b"\n" + b"two\n" * 3000)
    assert read(text_corpus(name))[0] == read(text_corpus("*"))[0]
    tokenize(text_corpus("*.txt", validation_fraction=0.5), tmp_path / "out", 1)
    assert len(Tokens.open(tmp_path / "out").train) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", name])
    damaged = name.removesuffix(".txt") + ".json"
    Path(damaged).write_text("no JSON")
    with pytest.raises(UserError, match=r"\.json.*, line 1, is not a JSON object") as error:
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
    """Draws a file with a few bytes changed, removed or inserted, or with its end cut off."""
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


# In its own process, since Arrow is known to abort on damaged files.
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


def test_bytes_that_are_not_text_after_much_text_end_in_tokens(tmp_path: Path) -> None:
    odd = b"\0" * 40_000 + b"\n\n" + bytes(range(256)) * 400 + b"\n\n" + b"\xff" * 30_000
    (tmp_path / "a.txt").write_bytes(b"word " * 20_000 + odd)
    (tmp_path / "b.txt").write_text("word " * 100_000, encoding="utf-16")
    write_jsonl(tmp_path / "c.jsonl")
    (tmp_path / "d.txt").write_text("")
    manifest = tokenize(text_corpus(tmp_path / "*.*"), tmp_path / "out", 1)
    assert manifest["repaired"] > 0
    assert len(Tokens.open(tmp_path / "out", verify=True).train) > 60_000


# ---------------------------------------------------------------- encodings

CYRILLIC = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива. " * 40  # noqa: RUF001
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 40
CHINESE = "道可道,非常道。名可名,非常名。无名天地之始,有名万物之母。" * 40
ENGLISH = "Happy families are all alike; every unhappy family is unhappy in its own way. " * 40
MARKS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("encoding", MARKS)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.json.gz"])
def test_a_file_with_a_byte_order_mark_is_decoded_by_it(encoding: str, name: str, tmp_path: Path) -> None:
    text = "first 😀 é\n\n" + CYRILLIC + CHINESE
    written = json.dumps({"text": text}, ensure_ascii=False) + "\r\n" if "json" in name else text.replace("\n", "\r\n")
    data = MARKS[encoding] + written.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found, tally = read(text_corpus(tmp_path / name))
    assert "".join(found) == text
    assert tally == Tally()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.just("\n"), min_size=1, max_size=30),
    st.integers(0, 12),
    st.sampled_from(["utf-8", *MARKS]),
)
def test_text_is_read_wherever_the_sample_of_its_beginning_ends(
    tmp_path: Path, text: str, size: int, encoding: str
) -> None:
    mark = MARKS[encoding] if encoding != "utf-8" else b""
    (tmp_path / "a.txt").write_bytes(mark + ("\x41" + text).encode(encoding))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_SAMPLE_BYTES", 8 + size)  # a mark and more
        found, tally = read(text_corpus(tmp_path / "a.txt"))
    assert "".join(found) == "A" + text
    assert tally == Tally()


@pytest.mark.parametrize("end", [b"\x00", b"\xd8", b"\x00\xd8a\x00"])
def test_utf16_that_is_cut_off_or_has_half_a_pair_is_repaired_and_counted(end: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(ENGLISH.encode("utf-16") + end)
    found, tally = read(text_corpus(tmp_path / "a.txt"))
    assert "".join(found).removesuffix("a") == ENGLISH + "\ufffd"
    assert tally == Tally(repaired=1)


def packed(module: str) -> bytes:
    return bytes(importlib.import_module(module).compress(ENGLISH.encode()))


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("word/document.xml", ENGLISH)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            member = tarfile.TarInfo("a.txt")
            member.size = len(ENGLISH) * 1000
            tar.addfile(member, io.BytesIO(ENGLISH.encode() * 1000))
    return buffer.getvalue()


def database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE texts (text)")
    return connection.serialize()


def sound(width: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(8000)
        file.writeframes(bytes(128 + round(100 * math.sin(i / 5)) for i in range(8000)))
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
NOT_TEXT: dict[str, Callable[[], bytes]] = {
    **{
        f"{name} in {encoding}": (lambda text=text, encoding=encoding: text.encode(encoding))
        for name, text in (("English", ENGLISH), ("Russian", CYRILLIC), ("Chinese", CHINESE))
        for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
    },
    "Russian in UTF-16 without a space": lambda: CYRILLIC.replace(" ", "").encode("utf-16-le"),
    "cp1251": lambda: CYRILLIC.encode("cp1251"),
    "cp1251, short": lambda: "Привет".encode("cp1251"),
    "KOI8-R": lambda: CYRILLIC.encode("koi8-r"),
    "Shift-JIS": lambda: JAPANESE.encode("shift-jis"),
    "EUC-JP": lambda: JAPANESE.encode("euc-jp"),
    "GBK": lambda: CHINESE.encode("gbk"),
    "EBCDIC": lambda: ENGLISH.encode("cp500"),
    "ISO-2022-JP": lambda: JAPANESE.encode("iso2022_jp"),
    "ISO-2022-JP, within English": lambda: (ENGLISH + "日本" + ENGLISH).encode("iso2022_jp"),
    "ISO-2022-KR": lambda: "모든 행복한 가정은 서로 닮았다. ".encode("iso2022_kr"),
    "HZ": lambda: ("道可道, 非常道 ~ 1\n" * 9999).encode("hz"),
    "RTF": lambda: b"{\\rtf1\\ansi\\deff0 {\\fonttbl {\\f0 Times;}}\n\\f0\\fs24 " + ENGLISH.encode() + b"}",
    "PDF after a line": lambda: b"\r\n%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\n" + ENGLISH.encode(),
    "PDF after a mark": lambda: codecs.BOM_UTF8 + b"%PDF-1.4\n1 0 obj\nendobj\n" + ENGLISH.encode(),
    "LZ4": lambda: pa.compress(ENGLISH.encode(), "lz4", asbytes=True),
    "PDF": lambda: b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\n" + ENGLISH.encode(),
    "docx": lambda: archive("zip"),
    "tar": lambda: archive("tar"),
    "gzip": lambda: packed("gzip"),
    "bzip2": lambda: packed("bz2"),
    "xz": lambda: packed("lzma"),
    "zstd": lambda: pa.compress(ENGLISH.encode(), "zstd", asbytes=True),
    "Parquet": parquet,
    "SQLite": database,
    "pickle": lambda: pickle.dumps([ENGLISH] * 3),
    "PNG": lambda: (ROOT / "benchmarks" / "benchmarks.png").read_bytes(),
    "ELF": lambda: Path(sys.executable).resolve().read_bytes()[: 2**17],
    "sound of 8 bits": lambda: sound(1),
    "sound of 16 bits": lambda: sound(2),
    "random bytes without NUL": lambda: random.Random(0).randbytes(9999).replace(b"\0", b""),
}


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.txt.gz", "x.csv"])
@pytest.mark.parametrize("kind", NOT_TEXT)
def test_a_file_that_is_not_text_is_refused_by_name(kind: str, name: str, tmp_path: Path) -> None:
    data = NOT_TEXT[kind]()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(UserError, match=rf"{re.escape(name)} is .*: .*, or leave it out$") as error:
        read(text_corpus(tmp_path / name))
    assert sentence(error)


@pytest.mark.parametrize(
    ("data", "expected", "repaired"),
    [
        (b"", "", 0),
        (b"\xef\xbb\xbf", "", 0),
        (b"one\rtwo\r\nthree", "one\ntwo\nthree", 0),
        (b"naive caf\xe9 " * 300, "naive caf\ufffd " * 300, 1),
        ("Straße, Gärten, öde Hügel ".encode("latin-1") * 99, "Stra\ufffde, G\ufffdrten, \ufffdde H\ufffdgel " * 99, 1),
        (b"text" * 99 + b"\xff\xfe\x80\x1a", "text" * 99 + "\ufffd\ufffd\ufffd\x1a", 1),
        (b"\x1b[31mred\x1b[0m a\bb\f" * 99, "\x1b[31mred\x1b[0m a\bb\f" * 99, 0),
        (b'{\n "a": 1\n}', '{\n "a": 1\n}', 0),
        (b"%PDF is a format", "%PDF is a format", 0),
        (b"\x1b(B\x1b[m and $B", "\x1b(B\x1b[m and $B", 0),
        (b'(format t "~{ab~} ~{~a~^, ~}~%" list)', '(format t "~{ab~} ~{~a~^, ~}~%" list)', 0),
        (b"~/x ~{name} ~{}", "~/x ~{name} ~{}", 0),
        ("é \x1b$B is an escape".encode(), "é \x1b$B is an escape", 0),
    ],
    ids=ascii,
)
def test_text_with_stray_bytes_is_read(data: bytes, expected: str, repaired: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    found, tally = read(text_corpus(tmp_path / "a.txt"))
    assert ("".join(found), tally) == (expected, Tally(repaired=repaired))


@pytest.mark.parametrize("name", ["x.txt", "x.json.gz", "x.parquet"])
def test_a_git_lfs_pointer_is_refused_with_the_command_that_fetches_the_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer, not the file: run `git lfs pull`$"):
        read(text_corpus(tmp_path / name))


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_git_lfs_pointer_is_not_a_tokenizer(name: str, tmp_path: Path) -> None:
    tokenizer.train_bpe([ENGLISH], len(ENGLISH), 300).model.save(str(tmp_path))
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer, not the file: run `git lfs pull`$"):
        tokenizer.gpt2((str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_lines_joined_from_files_with_byte_order_marks_are_read(encoding: str, tmp_path: Path) -> None:
    parts = [json.dumps({"text": text}) + "\n" for text in ("one", "two \ufeff")]
    (tmp_path / "a.jsonl").write_bytes(b"".join(part.encode(encoding) for part in [*parts, "", "\n"]))
    assert read(text_corpus(tmp_path / "a.jsonl")) == (["one", "two \ufeff"], Tally())


def test_utf16_appended_to_much_utf8_is_repaired_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(ENGLISH.encode() * 50 + b"\n\n" + "more".encode("utf-16-le"))
    found, tally = read(text_corpus(tmp_path / "a.txt"))
    assert "".join(found) == ENGLISH * 50 + "\n\nm\ufffdo\ufffdr\ufffde\ufffd"
    assert tally == Tally(repaired=1)


# ---------------------------------------------------------------- bombs

# VmHWM is that of this process alone; the peak of getrusage starts from that of its parent.
READ = """
import sys
from mup_moe.data.documents import Place, open_source, read_batches
from mup_moe.config.settings import CorpusSettings
from mup_moe.files import UserError
import pyarrow.parquet
import pydantic
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
settings, before, size, said = pydantic.TypeAdapter(CorpusSettings).validate_json(sys.argv[1]), peak(), 0, ""
try:
    for batch in read_batches(open_source(settings, None), Place(), 0.1, settings.max_bytes):
        size += sum(len(document.text.encode()) for document in batch.documents)
except UserError as error:
    said = str(error)
print(peak() - before, size, said, sep="|")
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


def read_apart(path: Path, max_bytes: int | None = None) -> tuple[int, int, str]:
    """Reads a file in its own process; returns the memory it takes, the bytes of its documents, and its error."""
    settings = {"source": "text", "tokenizer": "bpe", "vocabulary": 300, "validation_fraction": 0.1}
    peak, size, said = run(READ, json.dumps(settings | {"files": [str(path)], "max_bytes": max_bytes})).split("|")
    return int(peak), int(size), said.strip()


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of about a MB or less that unpack to between 60 MiB and 100 GB."""
    folder = tmp_path_factory.mktemp("bombs")
    same = gzip.compress(b"a" * (64 * MB)) * 16
    for name in ("a.txt.gz", "a.json.gz"):
        (folder / name).write_bytes(same)
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
def test_an_endless_line_is_refused_in_bounded_memory(bombs: Path) -> None:
    for max_bytes in (None, 2 * MB):
        peak, size, said = read_apart(bombs / "a.json.gz", max_bytes)
        assert said.endswith(
            "a.json.gz, line 1, is longer than 67,108,864 characters: split it, or provide it as plain text"
        )
        assert size == 0
        assert peak < 320 * MB


def test_a_record_that_is_too_long_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_c4_is_requested_by_name_and_runs_no_code_of_its_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*arguments: object, **options: object) -> datasets.IterableDataset:
        asked.append((arguments, options))
        return datasets.IterableDataset.from_generator(lambda: iter([{"text": "a", "url": "u"}]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read(corpus(source="c4", files=(), max_bytes=10))[0] == ["a"]
    assert asked == [(("allenai/c4", "en"), {"split": "train", "streaming": True})]
    assert "trust" not in Path(c4.__file__).read_text()


def test_a_folder_with_c4s_name_is_not_mistaken_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "allenai" / "c4").mkdir(parents=True)
    with pytest.raises(UserError, match=r"allenai/c4 has the name of the hub's C4 and hides it: rename it, or list"):
        c4.Stream()
