"""Speed and memory of tokenizing C4's format, compared with `datasets.map` with the same tokenizer.

python benchmarks/tokenization.py [--tokenizer-files vocab.json merges.txt] [--megabytes 16 64]
                              [--rounds 2] [--out benchmarks/tokenization.csv]

The text is source code of the Python standard library and of some packages, in shards like those of C4. The methods
take turns, each in its own process, and the table has the medians over the rounds, so that a noisy machine disturbs all
alike. Times exclude imports and go from compressed shards to tokens on disk; for `datasets.map alone` the shards are
already converted to Arrow. Memory is the peak of the proportional set size, summed over the processes of a method and
sampled every 20 ms. Without --tokenizer-files, a BPE with vocabulary 8192 is trained on the text.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from mup_moe import provenance  # noqa: E402
from mup_moe.config.settings import CorpusSettings  # noqa: E402
from mup_moe.data import python_source, tokenizer  # noqa: E402
from mup_moe.data.tokenize import tokenize  # noqa: E402
from mup_moe.files import write_csv  # noqa: E402

COLUMNS = [
    *("method", "text_mb", "vocabulary", "tokens", "tokens_per_second", "ratio_to_map", "peak_mb"),
    *("cores", "cpu", "python", "tokenizers", "datasets"),
]
OURS, LOAD_AND_MAP, MAP = "mup_moe tokenize", "load_dataset and map", "datasets.map alone"
DOCUMENT_CHARACTERS = 2200  # C4's mean
SHARD_BYTES = 8_000_000


def write_shards(folder: Path, size: int) -> int:
    """Writes shards with C4's names and fields and about `size` bytes of text. Returns the exact number of bytes."""
    folder.mkdir(parents=True)
    texts = (
        text for path in python_source.find(("numpy", "pandas", "scipy")) for text in python_source.read_file(path)
    )
    pieces = [
        text[start : start + DOCUMENT_CHARACTERS].encode(errors="replace").decode()
        for text in texts
        for start in range(0, len(text), DOCUMENT_CHARACTERS)
    ]
    source = cycle(pieces)
    total = 0
    for shard in range(max(1, round(size / SHARD_BYTES))):
        written = 0
        with gzip.open(folder / f"c4-train.{shard:05}-of-01024.json.gz", "wt", compresslevel=6) as file:
            while written < min(size, SHARD_BYTES):
                text = next(source)
                record = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org/"}
                file.write(json.dumps(record) + "\n")
                written += len(text.encode())
        total += written
    return total


def run_ours(shards: Path, files: tuple[str, str], folder: Path, cores: int) -> dict[str, Any]:
    """Returns tokens and seconds of our tokenizer."""
    settings = CorpusSettings(
        source="c4",
        files=(f"{shards}/*.json.gz",),
        tokenizer="gpt2",
        tokenizer_files=files,
        validation_fraction=0.01,
    )
    start = time.perf_counter()
    manifest = tokenize(settings, folder, cores)
    seconds = time.perf_counter() - start
    return {"tokens": sum(split["tokens"] for split in manifest["splits"].values()), "seconds": {OURS: seconds}}


def run_map(shards: Path, files: tuple[str, str], folder: Path, cores: int) -> dict[str, Any]:
    """Returns tokens and seconds of `datasets`, with one process per core and one thread per process."""
    import datasets

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    made = tokenizer.gpt2(files)
    end_of_text = made.token_to_id("<|endoftext|>")

    def encode(texts: list[str]) -> dict[str, list[list[int]]]:
        return {"ids": [[*encoding.ids, end_of_text] for encoding in made.encode_batch_fast(texts)]}

    names = sorted(str(path) for path in shards.iterdir())
    features = datasets.Features({"ids": datasets.List(datasets.Value("uint16"))})
    start = time.perf_counter()
    table = datasets.load_dataset("json", data_files=names, split="train", cache_dir=str(folder), num_proc=cores)
    loaded = time.perf_counter()
    ids = table.map(
        encode,
        batched=True,
        num_proc=cores,
        input_columns="text",
        remove_columns=table.column_names,
        features=features,
    )
    end = time.perf_counter()
    tokens = sum(len(row) for batch in ids.iter(1000) for row in batch["ids"])
    return {"tokens": tokens, "seconds": {LOAD_AND_MAP: end - start, MAP: end - loaded}}


METHODS = {"ours": run_ours, "map": run_map}


def measure(method: str, shards: Path, files: tuple[str, str], cores: int) -> dict[str, Any]:
    """Runs a method in its own process. Returns its result and its peak memory in MB."""
    with tempfile.TemporaryDirectory(dir=shards.parent) as folder:
        command = [sys.executable, __file__, "--method", method, "--shards", str(shards), "--cores", str(cores)]
        with (Path(folder) / "result.json").open("w+") as result:
            process = psutil.Popen(
                [*command, "--work", f"{folder}/work", "--tokenizer-files", *files],
                stdout=result,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "HF_HOME": f"{folder}/hub", "HF_HUB_OFFLINE": "1"},
            )
            peak = 0
            while process.poll() is None:
                peak = max(peak, memory(process))
                time.sleep(0.02)
            if process.returncode:
                raise SystemExit(f"{' '.join(command)} failed")
            result.seek(0)
            return {**json.load(result), "peak_mb": peak / 1e6}


def memory(process: psutil.Process) -> int:
    """Returns the bytes held by a process and its children, counting shared pages once."""
    total = 0
    try:
        for part in [process, *process.children(recursive=True)]:
            with_shares = part.memory_full_info()
            total += getattr(with_shares, "pss", with_shares.rss)
    except psutil.Error:
        pass  # a process has just ended
    return total


def main() -> None:
    """Measures each method at each size and writes a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer-files", nargs=2, metavar=("VOCAB", "MERGES"))
    parser.add_argument("--megabytes", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "tokenization.csv")
    for name in ("--method", "--shards", "--work"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.method:
        run = METHODS[arguments.method]
        files = tuple(arguments.tokenizer_files)
        print(json.dumps(run(Path(arguments.shards), files, Path(arguments.work), arguments.cores)))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments, Path(folder))


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Measures in a temporary folder, and prints and writes the rows."""
    texts = {size: write_shards(folder / str(size) / "en", size * 1_000_000) for size in arguments.megabytes}
    files = arguments.tokenizer_files or train(folder)
    vocabulary = len(json.loads(Path(files[0]).read_text(encoding="utf-8")))
    versions, machine = provenance.versions("tokenizers", "datasets"), provenance.machine()
    rows = []
    for size, text_bytes in texts.items():
        seconds, peaks, tokens = defaultdict(list), defaultdict(list), set()
        for _ in range(arguments.rounds):
            for method in METHODS:
                measured = measure(method, folder / str(size) / "en", files, arguments.cores)
                tokens.add(measured["tokens"])
                for name, value in measured["seconds"].items():
                    seconds[name].append(value)
                    peaks[name].append(measured["peak_mb"])
        (count,) = tokens  # the methods must agree
        rates = {name: count / statistics.median(values) for name, values in seconds.items()}
        for name, rate in rates.items():
            peak = statistics.median(peaks[name])
            rows.append(
                [
                    *(name, round(text_bytes / 1e6), vocabulary, count, round(rate), round(rate / rates[MAP], 2)),
                    *(round(peak), arguments.cores, machine["cpu"]),
                    *(versions["python"], versions["tokenizers"], versions["datasets"]),
                ]
            )
            print(f"{name}, {text_bytes / 1e6:.0f} MB of text: {rate:,.0f} tokens/s, at most {peak:.0f} MB")
    write_csv(arguments.out, COLUMNS, rows)


def train(folder: Path) -> list[str]:
    """Trains a BPE with vocabulary 8192. Returns its files, in GPT-2's format."""
    pieces = [text for path in python_source.find(()) for text in python_source.read_file(path)]
    tokenizer.train_bpe(pieces, sum(map(len, pieces)), 8192).model.save(str(folder))
    return [str(folder / name) for name in ("vocab.json", "merges.txt")]


if __name__ == "__main__":
    main()
