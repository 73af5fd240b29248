"""The JPEG experiment measures what it says."""

import numpy as np
import pytest
import torch

from benchmarks.jpeg_transport import TRANSPORTS, kendall, measure, rollouts


def test_kendall_is_the_share_of_ordered_pairs() -> None:
    """The same order is 1, the opposite -1, one swap of neighbours among four costs a third."""
    values = np.array([0.1, 0.2, 0.3, 0.4])
    assert kendall(values, values**3) == pytest.approx(1)
    assert kendall(values, -values) == pytest.approx(-1)
    assert kendall(values, values[[0, 2, 1, 3]]) == pytest.approx(2 / 3)


def test_png_keeps_eight_bits_and_jpeg_does_not() -> None:
    """PNG is off by half a level at most; JPEG at quality 75 by far more."""
    photograph = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = rollouts(photograph, torch.Generator().manual_seed(1))
    error = {name: (send(images) - images).abs().max().item() for name, send in TRANSPORTS.items()}
    assert error["png"] <= 0.5 / 255 + 1e-6
    assert error["jpeg 75"] > 10 / 255


def test_quick_figures() -> None:
    """One group per photograph: PNG keeps PIQE's order better than JPEG at quality 75."""
    tau = {(row["reward"], row["transport"]): row["tau"] for row in measure(1)}
    assert tau["piqe", "png"] > tau["piqe", "jpeg 75"]
    assert tau["ssim", "png"] > 0.9
