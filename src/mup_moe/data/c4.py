"""C4 (allenai/c4, English) streamed from the Hugging Face hub."""

import time
from collections.abc import Iterator

from mup_moe.files import UserError

_PATIENCE = (1, 4, 16, 64)
"""Seconds to wait before each new attempt at the same record."""


def read() -> Iterator[str | None]:
    """The texts of C4's train stream, in its order.

    The validation split is cut from this stream too, by hash, as for every other source. Raises
    UserError when the hub stays out of reach.
    """
    import datasets

    # The hub's libraries raise whatever their HTTP client of the day raises.
    try:
        stream = datasets.load_dataset("allenai/c4", "en", split="train", streaming=True).select_columns(["text"])
    except Exception as error:
        raise _out_of_reach(error) from error
    failures = 0
    while True:
        try:
            for record in stream:
                failures = 0
                yield record["text"]
        except Exception as error:
            if failures == len(_PATIENCE):
                raise _out_of_reach(error) from error
            time.sleep(_PATIENCE[failures])
            failures += 1
            stream.load_state_dict(stream.state_dict())
        else:
            return


def _out_of_reach(error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"C4 cannot be read from the Hugging Face hub ({reason}): try again later,"
        " or list local shards (en/c4-train.*.json.gz) in the corpus's `files`"
    )
