"""Image statistics move as what they describe does; tile seams and the decoder's ceiling are found."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import iqareward
from iqareward.diffusion import decoder_ceiling, synthetic_images
from iqareward.diffusion.validation import seam_strength
from iqareward.functional.filters import blur_valid, gaussian_taps
from iqareward.monitor import STATISTICS
from tests.diffusion.tiny import policy_of
from tests.tolerances import EXACT


@pytest.fixture(scope="module")
def scenes():
    """Eight synthetic scenes."""
    return synthetic_images(range(8), size=32)


def noisy(images):
    """With noise of 10 % added."""
    return (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


CHANGES = {
    "saturation_share": lambda images: (3 * images - 1).clamp(0, 1),
    "colorfulness": lambda images: (images + 0.5 * (images - images.mean(1, keepdim=True))).clamp(0, 1),
    "dark_fraction": lambda images: images**4,
    "edge_density": noisy,
    "high_frequency_share": noisy,
}


@pytest.mark.parametrize("name", STATISTICS)
def test_each_statistic_rises_with_what_it_describes(name, scenes):
    """For every scene; and it is one finite fp32 number per image."""
    before, after = STATISTICS[name](scenes), STATISTICS[name](CHANGES[name](scenes))
    assert before.shape == (8,)
    assert before.dtype == torch.float32
    assert (after >= before).all()
    assert (after > before).sum() >= 6


@pytest.mark.parametrize("name", STATISTICS)
def test_images_do_not_touch_each_other(name, scenes):
    """A broken image is NaN alone; every other one has the value it has alone."""
    broken = scenes.clone()
    broken[3, 1, 4, 5] = torch.nan
    values = STATISTICS[name](broken)
    assert values[3].isnan()
    for row in (0, 7):
        torch.testing.assert_close(values[row], STATISTICS[name](scenes[row : row + 1])[0], rtol=1e-5, atol=1e-6)


def test_digits_do_not_depend_on_threads(monkeypatch):
    """A crowded machine leaves fewer of torch's threads from call to call, and a log repeats bit for bit."""
    images = torch.rand(1, 3, 1024, 1030, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    monkeypatch.setattr(time, "thread_time", time.perf_counter)  # cores are free, even if they are not

    def values(count):
        torch.set_num_threads(count)
        return torch.stack([statistic(images) for statistic in STATISTICS.values()])

    try:
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:  # which have learnt nothing else before
            expected = one.submit(values, 1).result()
            for count in (2, 3, 4):
                torch.testing.assert_close(other.submit(values, count).result(), expected, **EXACT)
    finally:
        torch.set_num_threads(before)


def test_blur_lowers_edges_and_high_frequencies(scenes):
    """The two that noise raises."""
    blurred = blur_valid(scenes, gaussian_taps(5, 1.0))
    for name in ("edge_density", "high_frequency_share"):
        assert (STATISTICS[name](blurred) < STATISTICS[name](scenes[..., 2:-2, 2:-2])).all()


def test_seams_are_found_at_their_place_only(scenes):
    """Tiles of 8 pixels with brightness of their own: seen with their period and offset, not with another."""
    tiles = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(1)).repeat_interleave(8, 2)
    tiled = (
        0.3 * tiles.repeat_interleave(8, 3) + 0.7 * blur_valid(scenes.repeat(1, 1, 2, 2), [1.0])[..., :32, :32]
    ).clamp(0, 1)
    assert (seam_strength(tiled, period=8) > seam_strength(scenes, period=8)).all()
    assert (seam_strength(tiled, period=8) > 1.2 * seam_strength(tiled, period=8, offset=3)).all()
    torch.testing.assert_close(seam_strength(torch.full((1, 3, 16, 16), 0.4), period=4), torch.ones(1))
    with pytest.raises(ValueError, match="period"):
        seam_strength(scenes, period=32)


def test_a_blurring_decoder_has_a_ceiling(scenes):
    """Its ground truth scores below the ground truth itself, and an exact one's does not."""
    reward = iqareward.load("ssim")

    def blur(latents):
        return torch.nn.functional.avg_pool2d(latents, 3, 1, 1)

    report = decoder_ceiling(lambda images: images, blur, scenes, reward)
    assert (report.scores < report.reference_scores - 0.02).all()
    assert report.seams.tolist() == [1.0] * 8
    exact = decoder_ceiling(lambda images: 2 * images - 1, lambda latents: (latents + 1) / 2, scenes, reward, tile=8)
    torch.testing.assert_close(exact.scores, exact.reference_scores, rtol=0.0, atol=1e-5)


def test_tile_seams_show_in_the_ceiling(scenes):
    """A decoder that shifts the brightness of every other tile: the report says so, where a whole one gets 1."""
    even = torch.arange(32).div(8, rounding_mode="floor") % 2

    def tiled(latents):
        return latents + 0.2 * (even[:, None] ^ even[None])

    report = decoder_ceiling(lambda images: 0.8 * images, tiled, scenes, iqareward.load("ssim"), tile=8)
    whole = decoder_ceiling(
        lambda images: 0.8 * images, lambda latents: latents, scenes, iqareward.load("ssim"), tile=8
    )
    assert (report.seams > 1.5 * whole.seams).all()


@pytest.mark.parametrize("kind", ["controlnet", "flow"])
def test_latent_policies_have_a_ceiling(kind, scenes):
    """The policies' own encoder and decoder are what it takes; an untrained autoencoder keeps little."""
    policy = policy_of(kind)
    report = decoder_ceiling(policy.encode, policy.decode, scenes, iqareward.load("ssim"))
    assert (report.scores < report.reference_scores).all()
