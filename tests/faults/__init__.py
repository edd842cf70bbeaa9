"""Faults injected into real processes with real files."""

import pytest

# This must come before the first import of these modules.
pytest.register_assert_rewrite("faults.commands", "faults.curve")
