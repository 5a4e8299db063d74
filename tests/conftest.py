"""Fixtures shared by all rooms."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(20261121)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of the public data; the test is skipped where it is absent."""
    folder = os.environ.get("BRAINFM_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("BRAINFM_TEST_DATA is not set to the folder of the public test data")
    return Path(folder)
