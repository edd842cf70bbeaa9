"""Entries of the config that extend another entry of their section with `like`."""

from collections.abc import Mapping
from typing import Any

# Far beyond any real config.
_LONGEST_CHAIN = 100
# The part of a section in which values replace inherited ones entirely, since a tensor has only one role.
_REPLACING = {"roles": "tensors"}


def without_like(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an entry without its `like`."""
    return {key: value for key, value in entry.items() if key != "like"}


def lineage(section: str, table: Mapping[str, Any], name: str) -> list[Any]:
    """Returns the entry with this name, preceded by those that it extends. Raises ValueError naming the key."""
    names = [name]
    while isinstance(own := table[names[-1]], Mapping) and "like" in own:
        key, parent = f"`{section}.{names[-1]}.like`", own["like"]
        if not isinstance(parent, str) or parent not in table or parent in names:
            raise ValueError(f"{key} is {parent!r} but must name another entry, without a cycle")
        if len(names) > _LONGEST_CHAIN:
            raise ValueError(f"{key} continues a chain of more than {_LONGEST_CHAIN} entries: shorten it")
        names.append(parent)
    return [table[of_one] for of_one in reversed(names)]


def overlay(*documents: Mapping[str, Any]) -> dict[str, Any]:
    """Merges documents key by key; later ones win."""
    merged: dict[str, Any] = {}
    for document in documents:
        for key, value in document.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = overlay(merged[key], value) if both else value
    return merged


def inherited(section: str, table: Mapping[str, Any], name: str) -> Any:
    """Returns an entry merged with those that it extends. Raises ValueError naming the key."""
    merged, *rest = lineage(section, table, name)
    if not isinstance(merged, Mapping):
        return merged
    for own in map(without_like, rest):
        merged = overlay(_without_replaced(merged, own, _REPLACING.get(section, "")), own)
    return dict(merged)


def _without_replaced(entry: Mapping[str, Any], by: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    old, new = entry.get(part), by.get(part)
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return entry
    return {**entry, part: {key: value for key, value in old.items() if key not in new}}
