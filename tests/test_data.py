"""Documents, split, tokenizer and token files, on their own and through the command."""

import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import tokenize_command
from faults.inject import injector
from mup_moe.config.settings import CorpusSettings
from mup_moe.data import documents, python_source, text_files, tokenizer, work
from mup_moe.data.corpus import BYTES, remark_of, tokenizer_paths, vocabulary_of
from mup_moe.data.documents import Place, Tally, in_sample, in_validation, open_source, read_batches, text_digest
from mup_moe.data.tokenize import WORK, tokenize
from mup_moe.data.tokens import Tokens, dtype_for
from mup_moe.files import UserError, claim_folder

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
OUTPUTS = ["manifest.json", "tokenizer.json", "train.bin", "valid.bin"]
LOCK = ".lock"

needs_gpt2 = pytest.mark.skipif(not (SHARED / "gpt2").is_dir(), reason="GPT-2's vocabulary is not in shared/data/gpt2")
needs_shakespeare = pytest.mark.skipif(
    not (SHARED / "tinyshakespeare.txt").is_file(), reason="shared/data/tinyshakespeare.txt is absent"
)

# Everything that str can hold except lone surrogates, which are not Unicode text.
texts = st.text(st.characters(exclude_categories=["Cs"]))
odd_texts = st.one_of(
    texts,
    st.text("\x00\r\n\t \u00a0\u200d\u2028\ufeff\ufffde\u0301🏳️‍🌈👩🏽‍🚀\U0010ffff'sd0"),
    st.lists(st.sampled_from(["<|endoftext|>", "<|", "|>", " ", "\n\n", "end", "Ġ", "Ċ"])).map("".join),
)


def corpus(**changes: Any) -> CorpusSettings:
    fields = {"source": "text", "tokenizer": "bpe", "vocabulary": 300, "validation_fraction": 0.3, "files": ("*",)}
    return CorpusSettings(**{**fields, **changes})


def text_corpus(*files: Path | str, **changes: Any) -> CorpusSettings:
    return corpus(files=tuple(map(str, files)), **changes)


def read(config: CorpusSettings) -> tuple[list[str], Tally]:
    source = open_source(config, None)
    batches = list(read_batches(source, Place(), config.validation_fraction, config.max_bytes))
    assert batches[-1].after is not None
    return [document.text for batch in batches for document in batch.documents], batches[-1].after.tally


def write_jsonl(path: Path, count: int = 60) -> Path:
    words = ["router", "sends", "each", "token", "of", "the", "text", "to", "some", "expert", "by", "its", "gates"]
    lines = (" ".join(words[(i * k) % len(words)] for k in range(40)) + f" {i} é ✓" for i in range(count))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


# ---------------------------------------------------------------- plain text


def test_a_plain_file_is_cut_at_blank_lines_into_passages_that_add_up_to_it(tmp_path: Path) -> None:
    text = "".join(f"paragraph {i} " + "word " * 50 + "\n\n" for i in range(100))
    path = tmp_path / "a.txt"
    path.write_text(text)
    found, tally = read(text_corpus(path))
    assert "".join(found) == text
    assert len(found) > 5
    assert all(document.startswith("paragraph") and document.endswith("\n\n") for document in found)
    assert tally == Tally()


@given(st.text("ab \n\u2028\x00", max_size=200), st.integers(1, 20))
def test_passages_joined_are_the_text_and_bounded(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "PASSAGE_CHARACTERS", size)
        found = list(text_files.passages(io.StringIO(text, newline="")))
    assert "".join(found) == text
    assert all(0 < len(passage) < 5 * size for passage in found)


def test_one_huge_line_comes_in_bounded_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(map(str, range(100_000))))
    found, _ = read(text_corpus(path))
    assert "".join(found) == path.read_text()
    assert max(map(len, found)) < 5 * text_files.PASSAGE_CHARACTERS


def test_a_huge_record_comes_in_bounded_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 10)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "abcdefghijklmnopqrstuvwxyz"}))
    assert read(text_corpus(path)) == (["abcdefghij", "klmnopqrst", "uvwxyz"], Tally(cut=1))
    path.write_text(json.dumps({"text": "a" * 10}))
    assert read(text_corpus(path)) == (["a" * 10], Tally())
    path.write_text(json.dumps({"text": "\ud800" * 20 + " " * 20}) + "\n" + json.dumps({"text": " " * 20}))
    assert read(text_corpus(path)) == (["\ufffd" * 10] * 2, Tally(empty=1, repaired=1, cut=1))


def test_bytes_that_are_not_unicode_are_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 ok")
    (tmp_path / "b.txt").write_bytes("plain \ufffd".encode())
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "x\xff"}\n{"text": "half \\ud800"}\n{"text": "whole \\ud83d\\ude00"}')
    found, tally = read(text_corpus(tmp_path / "*"))
    assert found == ["caf\ufffd ok", "plain \ufffd", "x\ufffd", "half \ufffd", "whole 😀"]
    assert tally == Tally(repaired=3)


def test_blank_files_and_records_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text(" \n\t\n")
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n\n{"url": "u"}\n{"text": null}\n{"text": 5}\n{"text": "x"}\n')
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(b""))
    found, tally = read(text_corpus(tmp_path / "*"))
    assert found == ["x"]
    assert tally == Tally(empty=2, without_text=3)


def test_line_ends_and_the_byte_order_mark_are_normalized(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes("\ufeffone\r\ntwo\rthree\n".encode())
    assert read(text_corpus(tmp_path / "a.md"))[0] == ["one\ntwo\nthree\n"]


def test_all_formats_are_read_through_gzip_or_not(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "c.jsonl").write_text('{"text": "lines", "url": "u"}\n')
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(b'{"text": "like c4", "timestamp": "t", "url": "u"}\n'))
    table = {"id": [1, 2], "text": pa.array([b"column \xff", None], pa.binary())}
    pq.write_table(pa.table(table), tmp_path / "e [1].parquet")
    pq.write_table(pa.table({"text": pa.array(["a", "b"], pa.large_string())}), tmp_path / "f.parquet")
    found, tally = read(text_corpus(tmp_path / "*"))
    assert found == ["plain", "packed", "lines", "like c4", "column \ufffd", "a", "b"]
    assert tally == Tally(without_text=1, repaired=1)


def test_reading_ends_with_the_document_that_reaches_max_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "éé"}\n' * 9)
    assert len(read(text_corpus(path, max_bytes=8))[0]) == 2
    assert len(read(text_corpus(path, max_bytes=9))[0]) == 3


@given(st.lists(st.lists(st.none() | st.text("ab ", max_size=30), max_size=8), max_size=4), st.integers(1, 200))
def test_reading_resumes_from_every_place_with_the_same_documents(records: list[list[str | None]], size: int) -> None:
    def source(position: Any) -> text_files.Files:
        return text_files.Files(
            [Path(str(i)) for i in range(len(records))], lambda path: iter(records[int(path.name)]), position
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BATCH_CHARACTERS", size)
        patch.setattr(documents, "MAX_CHARACTERS", 7)
        whole = list(read_batches(source(None), Place(), 0.5))
        assert whole[-1].after is not None
        for number, batch in enumerate(whole):
            if batch.after is None:
                continue
            place = Place.from_json(json.loads(json.dumps(asdict(batch.after))))
            rest = list(read_batches(source(place.position), place, 0.5))
            found = [document for part in (*whole[: number + 1], *rest) for document in part.documents]
            assert found == [document for part in whole for document in part.documents]
            assert (rest or whole)[-1].after == whole[-1].after


# ---------------------------------------------------------------- globs


def test_matches_are_sorted_and_none_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["b/x.txt", "a/y.txt", "B.txt", "a/.hidden.txt", ".git/z.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "again.txt").symlink_to("b/x.txt")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "self.txt").symlink_to("self.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "a"))
    assert read(text_corpus("**/*.txt"))[0] == ["B.txt", "a/y.txt", "b/x.txt"]
    assert read(text_corpus("b/x.txt", "**/*.txt"))[0] == ["b/x.txt", "B.txt", "a/y.txt"]
    assert read(text_corpus("~/y.txt", "a/.h*"))[0] == ["a/y.txt", "a/.hidden.txt"]
    assert read(text_corpus("b/../a/*.txt"))[0] == ["a/y.txt"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("nothing/*.txt", None, "the glob .*nothing/.*matches no file"),
        ("missing.txt", None, r"missing\.txt, which is not a file"),
        ("", None, "the folder"),
        ("x**y/*.txt", None, r"x\*\*y"),
        ("a.json.gz", gzip.compress(Random(0).randbytes(9999), mtime=0)[:-1000], r"a\.json\.gz cannot be read"),
        ("a.json.gz", b"no gzip at all", r"a\.json\.gz cannot be read"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "cut', r"a\.jsonl, line 2, is not a JSON object"),
        ("a.json", b'[{"text": "a"}]', r"a\.json, line 1, is not a JSON object"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1, is not a JSON object"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet cannot be read"),
        ("a.zip", b"PK", r"a\.zip is compressed"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz cannot be read .*: remove \.gz from its name if"),
        ("a.txt", gzip.compress(b"text", mtime=0), r"a\.txt is compressed with gzip: end its name in \.gz"),
        ("a.txt.gz", gzip.compress(gzip.compress(b"text", mtime=0), mtime=0), r"a\.txt\.gz is compressed with gzip"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), r"a\.parquet\.gz is a Parquet file inside gzip: unpack it"),
        ("a.json", b'{\n  "text": "a"\n}', r"a\.json, line 1, is not a JSON object"),
    ],
)
def test_an_unreadable_file_ends_in_a_sentence_that_names_it(
    tmp_path: Path, name: str, content: bytes | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read(text_corpus(f"{tmp_path}/{name}"))


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"txt": ["a"]}, "has no column `text`"),
        ({"text": [1]}, "has a column `text` of type int64: give one of type string"),
        ({"text": [["a"]]}, "has a column `text` of type list"),
        ({"text": [{"a": "a"}]}, "has a column `text` of type struct"),
        ({"text": [True]}, "has a column `text` of type bool"),
        ({"text": [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"]}, "is not text, or not in UTF-8"),
    ],
)
def test_a_parquet_file_without_a_text_column_is_refused(tmp_path: Path, table: dict[str, Any], sentence: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a\.parquet {sentence}"):
        read(text_corpus(tmp_path / "a.parquet"))


# ---------------------------------------------------------------- python source


def test_the_standard_library_is_read_without_tests_or_its_own_path() -> None:
    paths = [path.as_posix() for path in python_source.find(())]
    assert any(path.endswith("/json/decoder.py") for path in paths)
    assert not any("/test/" in path or "_sysconfigdata" in path or "site-packages" in path for path in paths)
    assert paths == sorted(paths)


def test_packages_follow_the_standard_library() -> None:
    config = corpus(source="python", files=(), packages=("tqdm",))
    found, _ = read(config)
    own = [Path(file.locate()).read_text() for file in metadata.files("tqdm") or [] if file.name == "std.py"]
    assert own[0] in found
    assert found.index(own[0]) > len(python_source.find(())) * 0.9
    assert read(config)[0] == found


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(UserError, match="`packages` lists 'no-such-package'"):
        read(corpus(source="python", files=(), packages=("no-such-package",)))


# ---------------------------------------------------------------- C4 from the hub


def flaky_stream(records: list[str], breaks: dict[int, int]) -> Any:
    """Makes a real stream of `datasets`; its connection breaks before some records, as many times as given."""
    from datasets import IterableDataset

    def generate(positions: list[int]) -> Iterator[dict[str, str]]:
        for position in positions:
            if breaks.get(position, 0) > 0:
                breaks[position] -= 1
                raise ConnectionError("connection reset")
            yield {"text": records[position], "url": "u"}

    return IterableDataset.from_generator(generate, gen_kwargs={"positions": list(range(len(records)))})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Any], None]:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)

    def install(answer: Any) -> None:
        def load_dataset(*_: Any, **__: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    monkeypatch.setattr("time.sleep", lambda _: None)
    return install


def test_c4_resumes_where_the_connection_broke(hub: Callable[[Any], None]) -> None:
    hub(flaky_stream(["a", "b", "c"], {0: 2, 2: 4}))
    assert read(corpus(source="c4", files=(), max_bytes=100))[0] == ["a", "b", "c"]


@pytest.mark.parametrize("answer", [lambda: flaky_stream(["a", "b"], {1: 99}), lambda: ConnectionError("no network")])
def test_the_error_for_an_unreachable_c4_suggests_local_shards(
    hub: Callable[[Any], None], answer: Callable[[], Any]
) -> None:
    hub(answer())
    with pytest.raises(UserError, match="try again later, or list local shards"):
        read(corpus(source="c4", files=(), max_bytes=100))


# ---------------------------------------------------------------- split


@given(texts, st.floats(0.001, 0.999))
def test_the_split_depends_only_on_the_text(text: str, fraction: float) -> None:
    first = in_validation(text_digest(text), fraction)
    assert in_validation(text_digest(str(text.encode(), "utf-8")), fraction) == first
    assert text_digest(text) == hashlib.sha256(text.encode()).digest()


def test_fractions_are_met_and_the_sample_is_independent_of_the_split() -> None:
    digests = [text_digest(str(i)) for i in range(20_000)]
    held = [digest for digest in digests if in_validation(digest, 0.1)]
    assert len(held) == pytest.approx(2000, rel=0.1)
    assert sum(in_sample(digest, 0.5) for digest in held) == pytest.approx(1000, rel=0.1)


def test_order_and_repetition_move_no_document_across_the_split(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "b.jsonl").write_text("\n".join([*reversed(lines), *lines]))
    splits = []
    for name in ("a", "b"):
        tokenize(text_corpus(tmp_path / f"{name}.jsonl", tokenizer="bpe"), tmp_path / name, 1)
        tokens, bpe = Tokens.open(tmp_path / name), tokenizer.load(tmp_path / name / "tokenizer.json")
        splits.append(
            [
                set(bpe.decode(list(part), skip_special_tokens=False).split("<|endoftext|>"))
                for part in (tokens.train, tokens.valid)
            ]
        )
    assert splits[0] == splits[1]
    assert splits[0][0] & splits[0][1] == {""}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"text": "a"}\n', "split is empty, because .* none of the 1 documents"),
        ('{"text": "a"}\n' * 50, "split is empty, because .* none of the 50 documents"),
        ('{"text": " "}\n{"url": ""}\n', r"has no text \(1 documents were empty, 1 records had no `text`\)"),
    ],
)
def test_an_empty_split_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=sentence):
        tokenize(text_corpus(tmp_path / "a.jsonl"), tmp_path / "out", 1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [LOCK, WORK]


# ---------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bpe")
    sources = [path.read_text() for path in sorted((ROOT / "src").rglob("*.py"))]
    trained = tokenizer.train_bpe(sources, sum(map(len, sources)), 512)
    (folder / "tokenizer.json").write_text(trained.to_str())
    return tokenizer.load(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return tokenizer.gpt2((str(SHARED / "gpt2" / "vocab.json"), str(SHARED / "gpt2" / "merges.txt")))


@given(odd_texts)
def test_bpe_round_trip(bpe: Any, text: str) -> None:
    ids = bpe.encode(text).ids
    assert bpe.decode(ids, skip_special_tokens=False) == text
    assert bpe.token_to_id("<|endoftext|>") not in ids


@needs_gpt2
@given(odd_texts)
def test_gpt2_round_trip(gpt2: Any, text: str) -> None:
    ids = gpt2.encode(text).ids
    assert gpt2.decode(ids, skip_special_tokens=False) == text
    assert 50256 not in ids


@needs_gpt2
def test_gpt2_is_the_published_one(gpt2: Any) -> None:
    assert gpt2.get_vocab_size() == 50257
    assert gpt2.encode("Hello world, it's <|endoftext|>").ids[:6] == [15496, 995, 11, 340, 338, 1279]


def test_bpe_has_the_bytes_after_the_end_of_text(bpe: Any) -> None:
    assert bpe.get_vocab_size() == 512
    assert bpe.token_to_id("<|endoftext|>") == 0
    assert sorted(bpe.encode("\x00").ids + bpe.encode("é").ids)[0] >= 1


def test_bpe_of_a_long_unbroken_run_is_trained_in_time() -> None:
    text = "".join(chr(97 + digit % 26) for digit in np.random.default_rng(0).integers(0, 26, 300_000))
    assert "".join(tokenizer._without_long_words(text + " " * 5000)) == text + " " * 5000
    assert tokenizer.train_bpe([text], len(text), 400).get_vocab_size() == 400


def test_bpe_is_trained_on_a_sample_of_a_large_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "TRAINING_BYTES", 1000)
    found = [f"document {i:09}" for i in range(200)]
    sample = list(tokenizer._sample(found, sum(map(len, found))))
    assert 500 < sum(map(len, sample)) < 2000
    assert sample == list(tokenizer._sample(found, sum(map(len, found))))


def test_unusable_tokenizer_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(sorted(BYTES))}))
    with pytest.raises(UserError, match=r"`tokenizer_files` lists .*absent\.txt, which is not a file"):
        tokenizer.gpt2((str(tmp_path / "vocab.json"), str(tmp_path / "absent.txt")))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"`tokenizer_files` .*vocab\.json and .*empty\.txt cannot be read \(line 1"):
        tokenizer.gpt2((str(tmp_path / "vocab.json"), str(tmp_path / "empty.txt")))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=r"lacks <\|endoftext\|>"):
        tokenizer.gpt2((str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_tokenizer_files_are_read_with_any_byte_order_mark_and_line_ends(
    tmp_path: Path, encoding: str, end: str
) -> None:
    tokens = ["<|endoftext|>", "a", "b", "ab", "Ġ", *sorted(BYTES - {"a", "b", "Ġ"})]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    files = tmp_path / "vocab.json", tmp_path / "merges.txt"
    for path, lines in zip(
        files, ([json.dumps(vocabulary, ensure_ascii=False)], ["#version: 0.2", "a b", ""]), strict=True
    ):
        path.write_bytes("".join(line + end for line in lines).encode(encoding))
    config = corpus(tokenizer="gpt2", vocabulary=None, tokenizer_files=tuple(map(str, files)))
    assert vocabulary_of(config) == 258
    assert tokenizer.gpt2(config.tokenizer_files).encode("ab ba").ids == [3, 4, 2, 1]
    files[1].write_bytes(files[1].read_bytes() + "a b ab".encode(encoding))
    with pytest.raises(UserError, match="line 3 of the merges does not have two tokens"):
        tokenizer.gpt2(config.tokenizer_files)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/vocab.json", "~/vocab.json"])
def test_an_unknown_home_folder_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31)
    with pytest.raises(
        UserError, match=rf"^{name} is in a home folder that is not known on this machine: give the full path$"
    ):
        tokenizer_paths((name, name))


def test_the_error_for_an_unreachable_gpt2_suggests_tokenizer_files(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable:
        @staticmethod
        def from_pretrained(name: str) -> None:
            raise Exception(f"{name}: no network")

    monkeypatch.setattr(tokenizer, "Tokenizer", Unreachable)
    with pytest.raises(UserError, match="as the corpus's `tokenizer_files`"):
        tokenizer.gpt2(None)


# ---------------------------------------------------------------- the command


def run_command(
    config: CorpusSettings, out: Path, threads: int = 1, **environment: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        tokenize_command(asdict(config), out, threads),
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> tuple[CorpusSettings, Path]:
    folder = tmp_path_factory.mktemp("corpus")
    config = text_corpus(write_jsonl(folder / "a.jsonl", 400), vocabulary=320, validation_fraction=0.1)
    finished = run_command(config, folder / "out")
    assert finished.returncode == 0, finished.stderr
    return config, folder / "out"


def test_the_files_depend_on_neither_threads_nor_locale_nor_hash_seed(
    tokenized: tuple[CorpusSettings, Path], tmp_path: Path
) -> None:
    config, first = tokenized
    finished = run_command(config, tmp_path / "out", 2, LC_ALL="C", PYTHONHASHSEED="7", PYTHONUTF8="0")
    assert finished.returncode == 0, finished.stderr
    assert sorted(path.name for path in first.iterdir()) == [LOCK, *OUTPUTS]
    for name in OUTPUTS:
        assert (first / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_tokens_are_the_documents_each_with_an_end_of_text(tokenized: tuple[CorpusSettings, Path]) -> None:
    config, folder = tokenized
    tokens = Tokens.open(folder, verify=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    bpe = tokenizer.load(folder / "tokenizer.json")
    found, _ = read(config)
    for split, part, held in (("train", tokens.train, False), ("valid", tokens.valid, True)):
        expected = [text for text in found if in_validation(text_digest(text), 0.1) == held]
        ids = [i for text in expected for i in [*bpe.encode(text).ids, tokens.end_of_text]]
        assert part.tolist() == ids
        entry = manifest["splits"][split]
        assert (entry["documents"], entry["tokens"]) == (len(expected), len(ids))
        assert entry["bytes"] == sum(len(text.encode()) for text in expected)
    assert tokens.vocabulary == manifest["vocabulary"] == 320
    assert tokens.train.dtype == np.uint16
    assert not tokens.train.flags.writeable
    assert manifest["source"] == "text"
    assert manifest["settings"]["files"] == list(config.files)


def test_a_text_too_small_for_the_vocabulary_records_the_size_it_reached(tmp_path: Path) -> None:
    manifest = tokenize(text_corpus(write_jsonl(tmp_path / "a.jsonl"), vocabulary=60_000), tmp_path / "out", 1)
    assert 257 < manifest["vocabulary"] < 1000
    assert Tokens.open(tmp_path / "out").vocabulary == manifest["vocabulary"]


@needs_gpt2
@needs_shakespeare
def test_shakespeare_with_the_gpt2_tokenizer(tmp_path: Path) -> None:
    manifest = tokenize(
        CorpusSettings(
            source="text",
            files=(str(SHARED / "tinyshakespeare.txt"),),
            tokenizer="gpt2",
            tokenizer_files=(str(SHARED / "gpt2" / "vocab.json"), str(SHARED / "gpt2" / "merges.txt")),
            validation_fraction=0.02,
        ),
        tmp_path / "out",
        2,
    )
    train, valid = manifest["splits"]["train"], manifest["splits"]["valid"]
    assert train["bytes"] + valid["bytes"] == (SHARED / "tinyshakespeare.txt").stat().st_size
    # nanoGPT counts 338,025 tokens; ours differ by the ends of documents and the tokens at their borders.
    assert train["tokens"] + valid["tokens"] == pytest.approx(
        338_025, abs=2 * (train["documents"] + valid["documents"])
    )
    assert valid["documents"] >= 5
    assert (manifest["vocabulary"], manifest["end_of_text"]) == (50257, 50256)


def test_leftovers_of_a_killed_run_are_removed_and_the_old_manifest_is_removed_before_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    config = text_corpus(write_jsonl(tmp_path / "a.jsonl"))
    tokenize(config, out, 1)
    (out / ".train.bin.k1ll3d.part").write_bytes(b"half")
    (out / ".notes.part").write_bytes(b"somebody else's")
    monkeypatch.setattr("mup_moe.data.tokenize.write_json", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        tokenize(config, out, 1)
    assert sorted(path.name for path in out.iterdir()) == [LOCK, ".notes.part", WORK, *OUTPUTS[1:]]
    with pytest.raises(UserError, match=r"manifest\.json does not exist"):
        Tokens.open(out)


def test_an_error_is_one_line_and_leaves_the_old_files(tokenized: tuple[CorpusSettings, Path]) -> None:
    _, folder = tokenized
    before = (folder / "manifest.json").read_bytes()
    finished = run_command(text_corpus("/nowhere/*.txt"), folder)
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith("mup-moe: `files` lists the glob /nowhere/*.txt")
    assert "Traceback" not in finished.stderr
    assert (folder / "manifest.json").read_bytes() == before


def write_odd(path: Path) -> Path:
    """Writes records of every kind: whole, without text, blank, with bytes that are not Unicode, too long."""
    lines = [json.dumps({"text": f"{i} " * 50}).encode() for i in range(90)]
    lines += [b'{"content": "a"}'] * 6 + [b'{"text": " "}'] * 2 + [b'{"text": "\xff\\u0000"}']
    lines += [json.dumps({"text": "a " * documents.MAX_CHARACTERS}).encode()]
    path.write_bytes(b"\n".join(lines))
    return path


SAID = (
    "6 of 100 records had no `text` and were skipped; 2 of 100 records had only white space and were skipped;"
    " 1 of 100 records had NUL or invalid Unicode, replaced by U+FFFD;"
    " 1 of 100 records was too long for one document and cut into several"
)


def test_skipped_repaired_and_cut_records_are_reported_in_one_line_on_both_streams(tmp_path: Path) -> None:
    finished = run_command(text_corpus(write_odd(tmp_path / "a.jsonl")), tmp_path / "mine")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"corpus mine: {SAID}\n"
    assert finished.stderr.splitlines()[-1] == f"corpus mine: {SAID}"


def test_if_both_streams_are_one_the_report_appears_once(tmp_path: Path) -> None:
    config = asdict(text_corpus(write_odd(tmp_path / "a.jsonl")))
    finished = subprocess.run(
        tokenize_command(config, tmp_path / "mine"),
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    assert finished.stdout.count(SAID) == 1


def test_if_nothing_was_skipped_nothing_is_reported(tmp_path: Path) -> None:
    finished = run_command(text_corpus(write_jsonl(tmp_path / "a.jsonl")), tmp_path / "out")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == ""
    assert "records" not in finished.stderr
    assert remark_of(tmp_path / "out") is None
    assert remark_of(tmp_path / "nowhere") is None


def test_the_end_of_reading_at_max_bytes_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i:04}"}) + "\n" for i in range(1000)))
    tokenize(text_corpus(path, max_bytes=2000), tmp_path / "out", 1)
    assert remark_of(tmp_path / "out") == "reading stopped at `max_bytes`, after 2,000 bytes"
    tokenize(text_corpus(path, max_bytes=5000), tmp_path / "out", 1)
    assert remark_of(tmp_path / "out") is None


def test_a_manifest_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    manifest = tokenize(text_corpus(write_odd(tmp_path / "a.jsonl")), tmp_path / "out", 1)
    digest = Tokens.open(tmp_path / "out").digest
    earlier = {key: value for key, value in manifest.items() if key not in ("records", "cut")}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(earlier))
    assert (remark_of(tmp_path / "out") or "").startswith("6 of 101 records had no `text`")  # it also counted pieces
    assert Tokens.open(tmp_path / "out", verify=True).digest == digest


def test_zero_threads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--threads is 0"):
        tokenize(corpus(), tmp_path, 0)


# ---------------------------------------------------------------- C4's shards, and runs that are killed


def sentences(count: int, seed: int = 0) -> list[str]:
    words = ["router", "sends", "each", "token", "of", "the", "text", "to", "some", "expert", "é", "✓", "gates", "\n"]
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(words, 50)) + f" {i}" for i in range(count)]


def write_shard(folder: Path, number: int, lines: list[bytes]) -> Path:
    """Writes a shard with C4's name and compression."""
    path = folder / "en" / f"c4-train.{number:05}-of-01024.json.gz"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(b"".join(line + b"\n" for line in lines)))
    return path


def c4_lines(texts: list[str]) -> list[bytes]:
    """Returns records with C4's fields."""
    fields = [
        {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"https://e.org/{text[-4:]}"} for text in texts
    ]
    return [json.dumps(record).encode() for record in fields]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three shards, and a small tokenizer in GPT-2's two files."""
    folder = tmp_path_factory.mktemp("c4")
    for number in range(3):
        write_shard(folder, number, c4_lines(sentences(600, number)))
    tokenizer.train_bpe(sentences(300), 50_000, 400).model.save(str(folder))
    return folder


def shard_corpus(folder: Path, kind: str = "gpt2", **changes: Any) -> CorpusSettings:
    own = {
        "gpt2": {"vocabulary": None, "tokenizer_files": (str(folder / "vocab.json"), str(folder / "merges.txt"))},
        "bpe": {"vocabulary": 400},
    }[kind]
    fields = {"source": "c4", "files": (str(folder / "en" / "c4-train.*.json.gz"),), "tokenizer": kind}
    return corpus(**{**fields, **own, "validation_fraction": 0.1, **changes})


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes batches small and commits each of them."""
    monkeypatch.setattr(documents, "BATCH_CHARACTERS", 2**14)
    monkeypatch.setattr(work, "COMMIT_SECONDS", 0)


# The same in another process: see faults/hooks/sitecustomize.py.
EAGER = {"mup_moe.data.documents.BATCH_CHARACTERS": 2**13, "mup_moe.data.work.COMMIT_SECONDS": 0}


def outputs(folder: Path, names: list[str] | None = None) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names or OUTPUTS}


def test_c4_shards_are_read_in_order_and_their_defects_are_counted(tmp_path: Path) -> None:
    lines = c4_lines(["one", "two", "three"])
    write_shard(tmp_path, 1, [lines[2], b'{"timestamp": "t", "url": "u"}', b'{"text": null, "url": "u"}'])
    write_shard(tmp_path, 0, [lines[0], lines[1].replace(b"two", b"tw\xff")])
    found, tally = read(text_corpus(tmp_path / "en" / "c4-train.*-of-01024.json.gz", source="c4"))
    assert found == ["one", "tw\ufffd", "three"]
    assert tally == Tally(repaired=1, without_text=2)


@pytest.mark.usefixtures("eager")
def test_a_truncated_shard_is_named_and_can_be_replaced(shards: Path, tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path, number, c4_lines(sentences(600, number)))
    cut = tmp_path / "en" / "c4-train.00001-of-01024.json.gz"
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    config = shard_corpus(shards, files=(str(tmp_path / "en" / "*"),))
    with pytest.raises(UserError, match=r"c4-train\.00001-of-01024\.json\.gz cannot be read .*: download it again"):
        tokenize(config, tmp_path / "out", 1)
    assert not any((tmp_path / "out" / name).exists() for name in OUTPUTS)
    cut.write_bytes(whole)
    tokenize(config, tmp_path / "out", 1)
    tokenize(config, tmp_path / "fresh", 1)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "fresh")


class Served:
    """C4 on the hub: shards streamed by `datasets` over a connection that breaks before some records."""

    def __init__(self, folder: Path, breaks: dict[int, int]) -> None:
        from datasets.load import load_dataset

        files = sorted(str(path) for path in (folder / "en").iterdir())
        self._stream = load_dataset("json", data_files=files, split="train", streaming=True)
        self._breaks = breaks
        self.served = 0
        self.states: list[Any] = []

    def select_columns(self, columns: list[str]) -> "Served":
        self._stream = self._stream.select_columns(columns)
        return self

    def state_dict(self) -> Any:
        return self._stream.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.states.append(state)
        self._stream.load_state_dict(state)

    def __iter__(self) -> Iterator[Any]:
        records = iter(self._stream)
        while True:
            if self._breaks.get(self.served, 0) > 0:
                self._breaks[self.served] -= 1
                raise ConnectionError("connection reset")
            if (record := next(records, None)) is None:
                return
            self.served += 1
            yield record


@pytest.mark.usefixtures("eager")
def test_a_stream_that_breaks_gives_the_tokens_of_the_shards(
    shards: Path, tmp_path: Path, hub: Callable[[Any], None]
) -> None:
    local = tokenize(shard_corpus(shards), tmp_path / "local", 1)
    stream = Served(shards, {0: 1, 700: 3, 701: 1, 1300: 2})
    hub(stream)
    streamed = tokenize(shard_corpus(shards, files=(), max_bytes=10**9), tmp_path / "streamed", 1)
    assert stream.served == 1800
    assert len(stream.states) == 6  # all but the break at the beginning, where there is no state yet
    assert streamed["splits"] == local["splits"]
    assert outputs(tmp_path / "streamed", OUTPUTS[1:]) == outputs(tmp_path / "local", OUTPUTS[1:])


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_a_run_that_lost_the_hub_resumes_where_it_was(
    shards: Path, tmp_path: Path, hub: Callable[[Any], None], kind: str
) -> None:
    local = tokenize(shard_corpus(shards, kind), tmp_path / "local", 1)
    config = shard_corpus(shards, kind, files=(), max_bytes=10**9)
    served = []
    for breaks in ({500: 99}, {0: 99}, {900: 99}, {}):
        stream = Served(shards, breaks)
        hub(stream)
        if breaks:
            with pytest.raises(UserError, match="try again later"):
                tokenize(config, tmp_path / "streamed", 1)
        else:
            assert tokenize(config, tmp_path / "streamed", 1)["splits"] == local["splits"]
        served.append(stream.served)
    # At most the batch that was being gathered and those in the encoder are read twice.
    lost = sum(served) - 1800
    assert served[:3] == [500, 0, 900]
    assert 0 <= lost < 2 * 4 * 2**14 / 250
    assert outputs(tmp_path / "streamed", OUTPUTS[1:]) == outputs(tmp_path / "local", OUTPUTS[1:])


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(shards: Path, tmp_path: Path, kind: str) -> None:
    config, out = shard_corpus(shards, kind), tmp_path / "out"
    assert run_command(config, tmp_path / "whole", 2).returncode == 0
    generator, inject = np.random.default_rng(0), injector(tmp_path)
    kills = continued = 0
    done = None
    while done is None or done.returncode != 0:
        # Work without an owner was finished and was being removed.
        begun = committed(out) if (out / WORK / "owner.json").exists() else 0
        # As Snakemake does before it reruns a job.
        for name in OUTPUTS:
            (out / name).unlink(missing_ok=True)
        # Kill before one of its operations on files, and no longer after several kills.
        number, at = int(generator.integers(1, 200)), "file" if kills < 6 else "never"
        fault = inject("SIGKILL", at=at, number=number, folder=str(out), set=EAGER)
        done = run_command(config, out, 2, **fault)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        if begun and done.returncode == 0:
            assert "continuing after" in done.stderr
        continued += "continuing after" in done.stderr
        kills += done.returncode != 0
        assert committed(out) >= begun or (out / "manifest.json").exists()
    assert outputs(out) == outputs(tmp_path / "whole")
    assert sorted(path.name for path in out.iterdir()) == [LOCK, *OUTPUTS]
    assert kills > 1
    assert continued > 1


def test_a_run_killed_while_its_work_is_removed_makes_the_same_bytes_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = shard_corpus(shards), tmp_path / "out"
    tokenize(config, tmp_path / "whole", 1)

    def remove_some(folder: Path) -> None:
        (folder / "train.bin").unlink()
        pytest.fail("killed")

    with monkeypatch.context() as patch:
        patch.setattr("mup_moe.data.work.shutil.rmtree", remove_some)
        with pytest.raises(pytest.fail.Exception, match="killed"):
            tokenize(config, out, 1)
    assert outputs(out) == outputs(tmp_path / "whole")
    # As Snakemake does before it reruns a job.
    for name in OUTPUTS:
        (out / name).unlink()
    tokenize(config, out, 1)
    assert outputs(out) == outputs(tmp_path / "whole")
    assert not (out / WORK).exists()


def committed(out: Path) -> int:
    """Returns the bytes of text in the committed work of both stages."""
    total = 0
    for name in ("reading", "encoding"):
        with contextlib.suppress(FileNotFoundError):
            note = json.loads((out / WORK / f"{name}.json").read_text())["note"]
            total += Place.from_json(note).bytes
    return total


def interrupt(monkeypatch: pytest.MonkeyPatch, config: CorpusSettings, out: Path, name: str = "write_text") -> None:
    """Tokenizes until the tokens are made, and stops when they are about to be published."""
    with monkeypatch.context() as patch:
        patch.setattr(f"mup_moe.data.tokenize.{name}", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            tokenize(config, out, 1)


def test_finished_text_is_neither_read_nor_encoded_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shard_corpus(shards)
    tokenize(config, tmp_path / "whole", 1)
    interrupt(monkeypatch, config, tmp_path / "out", "write_json")
    for name in OUTPUTS:
        (tmp_path / "out" / name).unlink(missing_ok=True)
    monkeypatch.setattr("mup_moe.data.tokenize.open_source", lambda *_: pytest.fail("read again"))
    tokenize(config, tmp_path / "out", 1)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


@pytest.mark.parametrize("change", ["settings", "text", "damage", "record"])
def test_foreign_or_damaged_work_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], change: str
) -> None:
    config, out = text_corpus(write_jsonl(tmp_path / "a.jsonl")), tmp_path / "out"
    interrupt(monkeypatch, config, out, "_copy")
    if change == "settings":
        config = text_corpus(tmp_path / "a.jsonl", validation_fraction=0.4)
    elif change == "text":
        write_jsonl(tmp_path / "a.jsonl", 80)
    elif change == "damage":
        (out / WORK / "train.bin").write_bytes(b"short")
    else:
        (out / WORK / "encoding.json").write_text("{")
    capfd.readouterr()
    tokenize(config, out, 1)
    assert ("starting from the beginning" in capfd.readouterr().err) == (change in ("settings", "text"))
    tokenize(config, tmp_path / "fresh", 1)
    assert outputs(out) == outputs(tmp_path / "fresh")


def test_a_run_waits_for_another_and_takes_its_result(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = shard_corpus(shards), tmp_path / "out"
    interrupt(monkeypatch, config, out, "_copy")
    with claim_folder(out):
        process = subprocess.Popen(
            tokenize_command(asdict(config), out),
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        assert process.stderr.readline().startswith("config: ")
        assert "waiting for it" in process.stderr.readline()
        work.remove(out / WORK)
        (out / "manifest.json").write_text('{"made by": "the other"}')
    assert process.wait() == 0
    process.stderr.close()
    assert (out / "manifest.json").read_text() == '{"made by": "the other"}'


def test_a_stage_opens_with_what_it_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "COMMIT_SECONDS", math.inf)
    with contextlib.closing(work.Stage(tmp_path, "s", ("a", "b"))) as stage:
        stage.append("a", b"12")
        stage.commit({"n": 1}, now=True)
        stage.append("a", b"lost")
        stage.append("b", b"lost")
        stage.commit({"n": 2})  # too early
    for _ in range(2):
        with contextlib.closing(work.Stage(tmp_path, "s", ("a", "b"))) as stage:
            assert stage.note == {"n": 1}
            assert ((tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()) == (b"12", b"")
            stage.append("b", b"3")
            stage.commit({"n": 1}, now=True)
            stage.append("a", b"lost")
        assert (tmp_path / "b").read_bytes() == b"3"
        (tmp_path / "b").write_bytes(b"3")
        stage = work.Stage(tmp_path, "s", ("a", "b"))
        assert (tmp_path / "a").read_bytes() == b"12"
        (tmp_path / "s.json").write_text('{"note": {"n": 1}, "lengths": {"a": 2, "b": 0}}')
    (tmp_path / "a").unlink()
    assert work.Stage(tmp_path, "s", ("a", "b")).note is None


# ---------------------------------------------------------------- token files


@given(st.integers(257, 2**20))
def test_every_token_fits_its_type(vocabulary: int) -> None:
    assert dtype_for(vocabulary).newbyteorder("=").type(vocabulary - 1) == vocabulary - 1
    assert dtype_for(vocabulary).itemsize == (2 if vocabulary <= 65536 else 4)


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def truncate(folder: Path) -> None:
    data = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(data[:-2])


def remove_tokens(folder: Path) -> None:
    (folder / "valid.bin").unlink()


def change_type(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "dtype": "uint32"}))


def forget_splits(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"vocabulary": 300, "end_of_text": 0, "dtype": "uint16"}')


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate, r"train\.bin is damaged \(\d+ bytes instead of"),
        (remove_tokens, r"valid\.bin does not exist"),
        (change_type, r"manifest\.json is damaged"),
        (forget_splits, r"manifest\.json is damaged"),
    ],
)
def test_damaged_token_files_are_refused(
    tokenized: tuple[CorpusSettings, Path], tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    folder = copy(tokenized[1], tmp_path / "out")
    damage(folder)
    with pytest.raises(UserError, match=sentence):
        Tokens.open(folder)


def test_a_flipped_bit_is_found_on_request(tokenized: tuple[CorpusSettings, Path], tmp_path: Path) -> None:
    folder = copy(tokenized[1], tmp_path / "out")
    data = bytearray((folder / "train.bin").read_bytes())
    data[100] ^= 1
    (folder / "train.bin").write_bytes(data)
    Tokens.open(folder)
    with pytest.raises(UserError, match="its SHA-256 does not match the manifest"):
        Tokens.open(folder, verify=True)


def test_training_reads_tokens_without_the_text_libraries() -> None:
    heavy = ["tokenizers", "datasets", "pandas", "pyarrow", "pydantic"]
    code = f"import sys, mup_moe.data.tokens; print([m for m in {heavy} if m in sys.modules])"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout == "[]\n"
