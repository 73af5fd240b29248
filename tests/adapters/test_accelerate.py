"""Scores of a validation loop with accelerate: every sample counts once, and the grid shows what was scored."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import iqareward
from iqareward.functional import psnr
from tests.adapters.validation_set import REWARDS, expected_figures, restored_of, validation_set

accelerate = pytest.importorskip("accelerate")

from iqareward.adapters.accelerate import ValidationScores  # noqa: E402


class Tracker(accelerate.tracking.GeneralTracker):
    """Remembers what it was given."""

    name, requires_logging_directory = "remember", False

    def __init__(self) -> None:
        super().__init__()
        self.values: list[tuple[dict[str, Any], int]] = []
        self.images: list[tuple[np.ndarray, int]] = []

    @property
    def tracker(self) -> None:
        return None

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.values.append((values, step))

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.images.append((values["samples"][0], step))


def validated(accelerator: Any, loader: Any, scores: ValidationScores, step: int) -> dict[str, float]:
    for degraded, clean in loader:
        scores.update(restored_of(degraded), references=clean, inputs=degraded)
    return scores.log(step)


def test_figures_and_grid(tmp_path: Path) -> None:
    """What is logged is the mean of the plain scores, by thirds too; a second validation starts anew."""
    accelerator = accelerate.Accelerator(cpu=True, log_with=(tracker := Tracker()))
    accelerator.init_trackers("run")
    loader = accelerator.prepare(DataLoader(TensorDataset(*validation_set()), batch_size=4))
    scores = ValidationScores(accelerator, REWARDS, num_images=3, folder=tmp_path / "grids")
    expected = expected_figures("validation")
    for step in (10, 20):
        assert validated(accelerator, loader, scores, step) == pytest.approx(expected, rel=1e-6)
    assert [step for _, step in tracker.values] == [10, 20]
    grid, step = tracker.images[1]
    assert step == 20
    with Image.open(tmp_path / "grids" / "00000020.png") as written:
        assert np.array_equal(np.asarray(written), grid)
    # the ground truth is drawn pixel by pixel, eight times as large: the first sample stands somewhere in the last line
    clean = (validation_set()[1][0] * 255).round().byte().permute(1, 2, 0).numpy().repeat(8, 0).repeat(8, 1)
    line = grid[-clean.shape[0] - 100 :]
    rows, columns = np.where((line[..., 0] == clean[0, 0, 0]) & (line[..., 1] == clean[0, 0, 1]))
    found = [(row, column) for row, column in zip(rows, columns) if row + 256 <= len(line)]
    assert any(np.array_equal(line[row : row + 256, column : column + 256], clean) for row, column in found)


def test_no_scores_of_another_kind() -> None:
    """Without inputs there are no thirds; without any score the mean is NaN; nothing to log is an error."""
    accelerator = accelerate.Accelerator(cpu=True)
    scores = ValidationScores(accelerator, {"psnr": "psnr"}, num_images=0, value_range=(-1, 1))
    with pytest.raises(ValueError, match="at least one update"):
        scores.log(0)
    _, clean = validation_set()
    scores.update(1.8 * clean - 1, references=2 * clean - 1)
    expected = psnr(0.9 * clean, clean).mean()
    assert scores.log(0) == pytest.approx({"validation/psnr": float(expected), "validation/psnr/unscored": 0}, rel=1e-5)
    with pytest.warns(iqareward.rewards.UnscoredWarning):
        scores.update(torch.full_like(clean, torch.nan), references=clean)
    found = scores.log(1)
    assert np.isnan(found["validation/psnr"])
    assert found["validation/psnr/unscored"] == len(clean)
    with pytest.raises(ValueError, match="psnr expected `references`"):
        scores.update(clean)
    uneven = SimpleNamespace(is_main_process=True, num_processes=2, even_batches=False)
    with pytest.raises(ValueError, match="even_batches=True"):
        ValidationScores(uneven, REWARDS)
    with pytest.raises(TypeError, match="mapping of names"):
        ValidationScores(accelerator, ["ssim"])


def test_enlarged_inputs_are_compared() -> None:
    """Inputs may be smaller than the images: the grid scores what a user without a model would see."""
    accelerator = accelerate.Accelerator(cpu=True, log_with=(tracker := Tracker()))
    accelerator.init_trackers("run")
    degraded, clean = validation_set()
    scores = ValidationScores(accelerator, REWARDS, num_images=2)
    small: Tensor = degraded.nan_to_num()[..., ::2, ::2]
    scores.update(list(clean), references=list(clean), inputs=list(small))
    assert scores.log(0)["validation/psnr/hard"] > 90
    assert len(tracker.images) == 1


def of_process(rank: int, folder: str) -> None:
    """One of two processes of a run."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # accelerate wants them, and does not use them
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    accelerator = accelerate.Accelerator(cpu=True)
    try:
        loader = accelerator.prepare(DataLoader(TensorDataset(*validation_set()), batch_size=4))
        scores = ValidationScores(accelerator, REWARDS, folder=folder)
        found = [validated(accelerator, loader, scores, step) for step in (0, 1)]
        torch.save([accelerator.num_processes, *found], Path(folder) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """The last batch is uneven, and its repeated samples are not counted."""
    mp.start_processes(of_process, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    for rank in range(2):
        number, *found = torch.load(tmp_path / f"{rank}.pt")
        assert number == 2
        for each in found:
            assert each == pytest.approx(expected_figures("validation"), rel=1e-6)
    assert {path.name for path in tmp_path.glob("*.png")} == {"00000000.png", "00000001.png"}
