"""Held-out images: grids that are large enough to see and labelled, and the ceiling that a decoder sets."""

import numpy as np
import pytest
import torch
from PIL import Image

import iqareward
from iqareward.diffusion import StoredPairs, Validation, decoder_ceiling, synthetic_images
from iqareward.diffusion.validation import image_grid, save_grid
from iqareward.functional.statistics import seam_strength
from iqareward.rewards.metric import NoReference
from tests.diffusion.tiny import pixel_policy, policy_of
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


@pytest.mark.parametrize("rewards", [["ssim"], {"ssim": "ssim"}, iqareward.load("ssim")])
def test_rewards_come_by_name(rewards):
    """Names alone are not loaded here."""
    photographs = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(TypeError, match=r"Validation expected `rewards` as a mapping of names to rewards.*load"):
        Validation(StoredPairs(photographs, photographs), rewards)


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
    reward = {"contrast": NoReference(contrast, name="contrast", higher_is_better=True)}
    validation, resumed = (Validation(StoredPairs(degraded, references), {}, num_steps=2) for _ in range(2))
    with pytest.raises(ValueError, match="Call the validation first"):
        validation.grid(degraded, torch.zeros(3), update=0)
    found = validation(pixel_policy(), reward, [1.0], seed=0)
    first = validation.grid(found["images"], found["scores"]["reward"], update=0)
    resumed.load_state_dict(validation.state_dict())
    grids = []
    for one in (validation, resumed):
        found = one(pixel_policy(), reward, [1.0], seed=1)
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


@pytest.fixture(scope="module")
def scenes():
    """Eight synthetic scenes."""
    return synthetic_images(range(8), size=32)


def test_a_blurring_decoder_has_a_ceiling(scenes):
    """Its ground truth scores below the ground truth itself, and an exact one's does not."""
    reward = iqareward.load("ssim")

    def blur(latents):
        return torch.nn.functional.avg_pool2d(latents, 3, 1, 1)

    report = decoder_ceiling(lambda images: images, blur, scenes, reward)
    assert (report.scores < report.reference_scores - 0.02).all()
    torch.testing.assert_close(report.seams, seam_strength(blur(scenes)))
    exact = decoder_ceiling(lambda images: 2 * images - 1, lambda latents: (latents + 1) / 2, scenes, reward, tile=8)
    torch.testing.assert_close(exact.scores, exact.reference_scores, rtol=0.0, atol=1e-5)


def test_tile_seams_show_in_the_ceiling(scenes):
    """A decoder that shifts the brightness of every other tile: the report says so, given their size or not."""
    even = torch.arange(32).div(8, rounding_mode="floor") % 2

    def tiled(latents):
        return latents + 0.2 * (even[:, None] ^ even[None])

    report = decoder_ceiling(lambda images: 0.8 * images, tiled, scenes, iqareward.load("ssim"), tile=8)
    whole = decoder_ceiling(
        lambda images: 0.8 * images, lambda latents: latents, scenes, iqareward.load("ssim"), tile=8
    )
    assert (report.seams > whole.seams + 0.3).all()
    unknown = decoder_ceiling(lambda images: 0.8 * images, tiled, scenes, iqareward.load("ssim"))
    assert (unknown.seams > 0.5).all()


@pytest.mark.parametrize("kind", ["controlnet", "flow"])
def test_latent_policies_have_a_ceiling(kind, scenes):
    """The policies' own encoder and decoder are what it takes; an untrained autoencoder keeps little."""
    policy = policy_of(kind)
    condition = {"latents": None}
    report = decoder_ceiling(
        lambda images: policy.encode(images, condition),
        lambda latents: policy.decode(latents, condition),
        scenes,
        iqareward.load("ssim"),
    )
    assert (report.scores < report.reference_scores).all()
