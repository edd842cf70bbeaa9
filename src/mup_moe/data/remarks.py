"""What the reading of a corpus left out or changed, in words.

Standard library only, so that a Snakefile can import it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mup_moe.files import UserError, read_json


def remark_of(folder: Path) -> str | None:
    """What of a tokenized corpus was skipped, changed or not read; None for nothing, and without a sound manifest."""
    try:
        return "; ".join(_parts(read_json(folder / "manifest.json"))) or None
    except (UserError, AttributeError, KeyError, TypeError, ValueError):
        return None


def _parts(manifest: Mapping[str, Any]) -> Iterator[str]:
    if manifest["source"] == "python":
        return  # no text of the user's: its empty files and its end are meant
    skipped = manifest["skipped"]
    documents = sum(split["documents"] for split in manifest["splits"].values())
    # Manifests of earlier versions do not count records.
    records = manifest.get("records", documents + sum(skipped.values()))
    counts = {
        "had no `text` and {were} skipped": skipped["without_text"],
        "held nothing but white space and {were} skipped": skipped["empty"],
        "held NUL or what is not Unicode, replaced by U+FFFD": manifest["repaired"],
        "{were} too long for one document and cut into several": manifest.get("cut", 0),
    }
    for what, count in counts.items():
        if count:
            yield f"{count:,} of {records:,} records {what.format(were='was' if count == 1 else 'were')}"
    most = manifest["settings"]["max_bytes"]
    size = sum(split["bytes"] for split in manifest["splits"].values())
    if most is not None and size >= most:
        yield f"reading ended at `max_bytes`, after {size:,} bytes"
