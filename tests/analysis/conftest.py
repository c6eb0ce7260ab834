"""The reference adapters, if they are at hand."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference adapters; what needs it is skipped where it is not."""
    root = os.environ.get("MSPLORA_TEST_DATA")
    if not root:
        pytest.skip("MSPLORA_TEST_DATA is not set")
    return Path(root) / "reference"
