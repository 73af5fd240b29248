"""The count of what processes send each other."""

import pytest

from benchmarks import communication
from tests.benchmarks.quick import quick_run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_gradients_are_sent_once_and_rows_are_few():
    """A ring of two sends each gradient once, 4 bytes a weight; rewards and ids are 12 bytes a rollout, and a count."""
    rows = [row for row in quick_run(communication)["rows"] if row["when"] == "an update"]
    sent = {row["part"]: (row["calls"], row["bytes_sent"]) for row in rows}
    assert sent["gradients"] == (1, 4 * rows[0]["weights"])
    own = communication.INPUTS * communication.GROUP // communication.PROCESSES
    assert sent["rewards and ids"] == (3, 12 * own + 8)
    assert set(sent) == {"gradients", "rewards and ids", "figures and the norm", "passes and counts of the learner"}
