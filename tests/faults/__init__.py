"""Faults, injected into real processes with real files."""

import pytest

# Before anybody imports it.
pytest.register_assert_rewrite("faults.commands", "faults.curve")
