"""Shared inputs of the tests: bundled photographs, seeded noise, and the folder of reference figures."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Folder of reference figures beside the checkout; they are not ours to distribute."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
    if not folder.is_dir():
        pytest.skip("the reference figures are not distributed with the repository (no ../shared/fixtures)")
    return folder
