"""The token files of a corpus, as training reads them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mup_moe.data.corpus import SPLITS
from mup_moe.files import UserError, file_digest, read_json

TokenArray: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32]
MANIFEST = "manifest.json"
END_OF_TEXT = "<|endoftext|>"


def dtype_for(vocabulary: int) -> "np.dtype[Any]":
    """Returns the type of a token on disk: the smaller little-endian unsigned integer that fits the vocabulary."""
    return np.dtype("<u2" if vocabulary <= 2**16 else "<u4")


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """A tokenized corpus. Each document's tokens are followed by `end_of_text`."""

    train: TokenArray  # tokens of the training documents, shape (tokens,), read-only, memory-mapped
    valid: TokenArray  # tokens of the held-out documents, in the same form
    vocabulary: int
    end_of_text: int
    digests: dict[str, str]  # SHA-256 of each split's file, in hexadecimal, from the manifest

    @property
    def digest(self) -> str:
        """Identifies a corpus: the first characters of both splits' digests."""
        return "-".join(self.digests[split][:16] for split in SPLITS)

    @classmethod
    def open(cls, folder: Path, verify: bool = False) -> Self:
        """Maps the token files that `mup_moe tokenize` wrote into `folder`.

        Always checks sizes against the manifest; `verify` also checks every byte. Raises UserError if files
        are missing or damaged.
        """
        manifest = read_json(folder / MANIFEST)
        try:
            vocabulary, end_of_text = int(manifest["vocabulary"]), int(manifest["end_of_text"])
            dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
            lengths = {split: int(manifest["splits"][split]["tokens"]) for split in SPLITS}
            digests = {split: str(manifest["splits"][split]["tokens_sha256"]) for split in SPLITS}
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(folder / MANIFEST, f"{type(error).__name__}: {error}") from error
        if dtype != dtype_for(vocabulary):
            raise _damaged(folder / MANIFEST, f"dtype {dtype.name} does not match a vocabulary of {vocabulary}")
        arrays = {}
        for split in SPLITS:
            path = folder / f"{split}.bin"
            if not path.is_file():
                raise UserError(f"{path} does not exist: make it first by naming it as a Snakemake target")
            expected, size = lengths[split] * dtype.itemsize, path.stat().st_size
            if size != expected or size == 0:
                raise _damaged(path, f"{size} bytes instead of the manifest's {expected}")
            if verify and file_digest(path) != digests[split]:
                raise _damaged(path, "its SHA-256 does not match the manifest")
            arrays[split] = np.memmap(path, dtype=dtype, mode="r")
        return cls(**arrays, vocabulary=vocabulary, end_of_text=end_of_text, digests=digests)


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged ({reason}): delete its folder and tokenize the corpus again")
