"""C4 (allenai/c4, English) streamed from the Hugging Face hub."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mup_moe.files import UserError

_C4 = Path("allenai/c4")
_PATIENCE = (1, 4, 16, 64, 256, 600, 600, 600, 600, 600)
"""Seconds to wait before each new attempt at the same record: almost an hour in all, in case the hub is down."""


class Stream:
    """The texts of C4's train stream, in its order, from the beginning or from a `position`.

    The validation split also comes from this stream, by hash, as for every other source. Creating it
    and iterating over it raise UserError if the hub remains unreachable.
    """

    def __init__(self, position: Any = None) -> None:
        import datasets

        if _C4.is_dir():  # `datasets` would prefer the folder to the hub
            raise UserError(
                f"the folder {_C4.absolute()} has the name of the hub's C4 and hides it:"
                " rename it, or list its shards in the corpus's `files`"
            )
        # The hub's libraries raise whatever their current HTTP client raises.
        try:
            stream = datasets.load_dataset(str(_C4), "en", split="train", streaming=True)
            self._stream = stream.select_columns(["text"])
        except Exception as error:
            raise _out_of_reach(error) from error
        self._position = position
        self._moved = False

    def __iter__(self) -> Iterator[str | None]:
        failures = 0
        while True:
            if self._position is not None:
                self._stream.load_state_dict(self._position)
            try:
                for record in self._stream:
                    self._moved = True
                    failures = 0
                    yield record["text"]
            except Exception as error:
                if failures == len(_PATIENCE):
                    raise _out_of_reach(error) from error
                time.sleep(_PATIENCE[failures])
                failures += 1
                self._position = self.position()
                self._moved = False
            else:
                return

    def position(self) -> Any:
        """Returns the state of `datasets` after the last record, as JSON-compatible data.

        Resuming from it reads the interrupted shard again from its beginning, but no earlier shard.
        """
        # Before its first record, the stream does not report the position that it was given.
        return self._stream.state_dict() if self._moved else self._position


def _out_of_reach(error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"C4 cannot be read from the Hugging Face hub ({reason}): try again later,"
        " or list local shards (en/c4-train.*.json.gz) in the corpus's `files`"
    )
