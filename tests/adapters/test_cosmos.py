"""cosmos-rl: a float for one image, a list for a group, and pixels whose range is stated."""

import numpy as np
import pytest
import torch
from PIL import Image

import iqareward
from iqareward.adapters import cosmos
from iqareward.adapters.cosmos import reward_function
from iqareward.types import Reward
from tests.adapters.doubles import cosmos as double
from tests.adapters.doubles.pages import blocks, execute
from tests.tolerances import NETWORK_BATCH

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
REFERENCE = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_one_image_and_a_group() -> None:
    """The function answers a float or a list, as it was asked; a reward itself fails for both."""
    fn = reward_function("ssim", value_range=(0, 1), use_reference=True)
    expected = iqareward.load("ssim")(IMAGES, references=REFERENCE.expand_as(IMAGES))
    one = double.compute_rewards([(fn, 2.0)], IMAGES[0], REFERENCE)
    assert one == pytest.approx(2 * expected[0].item(), rel=1e-4)
    group = double.compute_rewards([(fn, 0.5), fn], list(IMAGES), REFERENCE)
    torch.testing.assert_close(torch.tensor(group), 1.5 * expected, **NETWORK_BATCH)
    naive = iqareward.load("piqe")
    with pytest.raises(ValueError, match=r"expected `images` of shape \[B, 3, H, W\]"):
        double.compute_rewards([naive], IMAGES[0])
    with pytest.raises(AssertionError):  # a tensor is not a list
        double.compute_rewards([naive], list(IMAGES))


def test_pixels() -> None:
    """Integers and PIL images need no range; floats without one are refused rather than guessed."""
    array = (IMAGES[0].movedim(0, -1).numpy() * 255).astype(np.uint8)
    fn = reward_function("piqe")
    assert fn(array) == fn(Image.fromarray(array)) == fn(torch.from_numpy(array).movedim(-1, 0))
    with pytest.raises(ValueError, match="expected `value_range`"):
        fn(IMAGES[0])


@pytest.mark.filterwarnings("ignore::iqareward.rewards.scoring.UnscoredWarning")
def test_unscored_images() -> None:
    """An image without a score stops training, or counts as told; a lone image has no mean to take."""
    broken = IMAGES.clone()
    broken[1] = torch.nan
    with pytest.raises(ValueError, match=r"piqe could not score images \[1\] of 3"):
        double.compute_rewards([reward_function("piqe", value_range=(0, 1))], list(broken))
    fn = reward_function("piqe", value_range=(0, 1), on_nan="worst")
    scores = double.compute_rewards([fn], list(broken))
    assert scores[1] == min(scores[0], scores[2])
    with pytest.raises(ValueError, match=r"\[0\] of 1"):
        fn(broken[1])
    with pytest.raises(ValueError, match="compares with references"):
        reward_function("ssim")


def test_what_the_docstring_says_to_write(qalign: Reward) -> None:
    """The line of the module docstring gives what the launcher takes."""
    scope: dict = {}
    (code,) = blocks(cosmos)
    execute(code, scope)
    image = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))
    assert double.compute_rewards(scope["reward_fns"], image) == qalign(image[None]).item()
