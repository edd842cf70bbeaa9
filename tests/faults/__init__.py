"""Faults injected into real processes with real files."""

import pytest

# Before the first import of these modules.
pytest.register_assert_rewrite("faults.commands", "faults.curve")
