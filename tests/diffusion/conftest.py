"""What the tests of the reference loop share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def own_accelerate_state() -> Iterator[None]:
    """accelerate keeps device and precision for the whole process; here each test has its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
