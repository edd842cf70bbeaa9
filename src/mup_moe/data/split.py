"""Which split a document belongs to: a function of its text alone."""

import hashlib


def text_digest(text: str) -> bytes:
    """The SHA-256 of a document's UTF-8 bytes, 32 bytes."""
    return hashlib.sha256(text.encode()).digest()


def in_validation(digest: bytes, fraction: float) -> bool:
    """Whether the document with this digest is held out; true for about `fraction` of all digests.

    Equal texts fall on the same side, wherever and however often they occur.
    """
    return _unit(digest[:8]) < fraction


def in_sample(digest: bytes, fraction: float) -> bool:
    """Whether a document is in a sample of about `fraction`, independently of `in_validation`."""
    return _unit(digest[8:16]) < fraction


def _unit(eight_bytes: bytes) -> float:
    return int.from_bytes(eight_bytes) / 2**64
