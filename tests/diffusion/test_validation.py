"""Grids of held-out images: large enough to see, labelled, and given to the trackers that take images."""

import numpy as np
import pytest
import torch
from PIL import Image

from iqareward.diffusion import Validation
from iqareward.diffusion.validation import image_grid, save_grid
from iqareward.rewards.metric import NoReference
from tests.diffusion.tiny import pixel_policy
from tests.diffusion.train_tiny import contrast
from tests.tolerances import EXACT


def pixels_of(grid):
    """`[H, W, 3]` in 0..255."""
    return torch.from_numpy(np.asarray(grid).copy())


def test_small_images_keep_their_pixels():
    """Each is a square of one colour, at least 256 / 20 pixels wide, and nothing is between them."""
    images = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    grid = pixels_of(image_grid({"restored": images}))
    enlarged = (images * 255).round().byte().repeat_interleave(13, 2).repeat_interleave(13, 3).movedim(1, -1)
    left = int((grid == enlarged[0, 0, 0]).all(2).nonzero()[0, 1])
    right = int((grid == enlarged[1, 0, 0]).all(2).nonzero()[0, 1])
    assert right - left > 260
    for start, image in zip((left, right), enlarged, strict=True):
        torch.testing.assert_close(grid[12 : 12 + 260, start : start + 260], image, **EXACT)


@pytest.mark.parametrize("size", [(2000, 1000), (64, 3000), (1, 1), (512, 300)])
def test_the_size_is_bounded(size):
    """Whatever the size of the images, one of them takes 256 to 512 pixels on its longer side."""
    grid = image_grid({"degraded": torch.zeros(1, 3, *size), "restored": torch.zeros(1, 3, *size)})
    black = (pixels_of(grid) == 0).all(2)
    black[:, : grid.width // 4] = False  # the labels
    height, width = int(black.any(1).sum()) // 2, int(black.any(0).sum())
    assert 256 <= max(height, width) <= 512


def test_labels_and_captions_are_drawn():
    """Before each row and under each image; a long caption makes room for itself."""
    rows = {"degraded": torch.ones(2, 3, 64, 64), "restored": torch.ones(2, 3, 64, 64)}
    bare, full = image_grid(rows), image_grid(rows, {"restored": ["PSNR 30 dB", "reward " + "9" * 60]})
    assert full.width > bare.width
    assert full.height > bare.height
    dark = (pixels_of(full) < 128).all(2)
    top, bottom = dark[: full.height // 2], dark[full.height // 2 :]
    for half in (top, bottom):
        assert half[:, : full.width // 4].any()
    assert not top[:, full.width // 4 :].any()
    assert bottom[:, full.width // 4 :].any()


def test_a_grid_shows_the_first_restorations_too():
    """Not while they are the present ones; kept with the state, so that a resumed run shows the same grid."""
    degraded, references = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reward = NoReference(contrast, name="contrast", higher_is_better=True)
    validation, resumed = (Validation(degraded, references, {}, num_steps=2) for _ in range(2))
    with pytest.raises(ValueError, match="Call the validation first"):
        validation.grid(degraded, torch.zeros(3), update=0)
    found = validation(pixel_policy(), reward, seed=0)
    first = validation.grid(found["images"], found["scores"]["reward"], update=0)
    resumed.load_state_dict(validation.state_dict())
    grids = []
    for one in (validation, resumed):
        found = one(pixel_policy(), reward, seed=1)
        grids.append(one.grid(found["images"], found["scores"]["reward"], update=5))
    assert first.height / 3 == pytest.approx(grids[0].height / 4, rel=0.02)
    torch.testing.assert_close(*map(pixels_of, grids), **EXACT)


class Tracker:
    """Takes images as the tracker of this name in accelerate does."""

    def __init__(self, name):
        self.name, self.logged = name, []

    def log_images(self, values, step=None, **options):
        self.logged.append((values, step, options))


def test_trackers_get_the_grid_in_their_own_form(tmp_path):
    """A batch for TensorBoard, one array for Aim and ClearML, a list for the others; who takes none is left out."""
    names = ("tensorboard", "wandb", "swanlab", "aim", "clearml")
    trackers = {name: Tracker(name) for name in names}
    grid = Image.new("RGB", (5, 4), "red")
    save_grid(grid, tmp_path / "grid.png", [*trackers.values(), object()], step=7)
    with Image.open(tmp_path / "grid.png") as saved:
        assert saved.tobytes() == grid.tobytes()
    for name, tracker in trackers.items():
        ((values, step, options),) = tracker.logged
        assert (list(values), step) == (["samples"], 7)
        image = values["samples"] if name in ("aim", "clearml") else values["samples"][0]
        assert image.shape == (4, 5, 3)
        assert options == ({"dataformats": "NHWC"} if name == "tensorboard" else {})
        if name in ("wandb", "swanlab"):
            assert isinstance(values["samples"], list)
