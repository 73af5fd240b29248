"""No warm call copies between host and device, which makes the host wait: metered without a GPU, tried on one."""

import pytest
import torch
from torch import nn

import iqareward
from benchmarks.meter import Meter
from iqareward.diffusion.data.jpeg import jpeg
from iqareward.diffusion.monitor import STATISTICS
from iqareward.rewards.calibration import CDFMap
from iqareward.rewards.lpips_dists import DISTSReward, LPIPSReward
from iqareward.rewards.mllm.preprocess import preprocess
from tests.diffusion import tiny
from tests.gpu import no_waits
from tests.tolerances import NETWORK_BATCH

faked = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="constants of a fake GPU would stay in caches for the real one, which is tested below",
)
REWARDS = ("psnr", "ssim", "ms_ssim", "gmsd", "haarpsi", "piqe")


def assert_never_waits(meter: Meter, call):
    """A warm call neither waits for the device nor sends a constant there."""
    meter.second(call)
    assert [*map(str, meter.waits + meter.host_constants)] == []


@pytest.fixture
def perceptual(tmp_path):
    """Makes LPIPS or DISTS over seeded weights that keep the size of activations."""
    models = pytest.importorskip("torchvision.models", reason="the extra `perceptual` is not installed")

    def reward(kind):
        with torch.device("meta"):
            whole = (models.vgg16 if kind == "dists" else models.alexnet)(weights=None).state_dict()
        rng = torch.Generator().manual_seed(0)
        backbone = {
            name: torch.randn(weight.shape, generator=rng) * (2 / weight[0].numel()) ** 0.5
            for name, weight in whole.items()
            if name.startswith("features.")
        }
        torch.save(backbone, tmp_path / kind)
        return DISTSReward(weights=tmp_path / kind) if kind == "dists" else LPIPSReward("alex", weights=tmp_path / kind)

    return reward


@faked
@pytest.mark.parametrize("name", REWARDS)
def test_rewards_copy_nothing(name):
    """The checks and marks of the contract included; only the first call of all looks at its scores."""
    reward = iqareward.load(name)
    images = torch.rand(1, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    reward(images, references=images)
    with Meter() as meter:
        images = torch.rand(2, 3, 192, 192, device="cuda")
        assert_never_waits(meter, lambda: reward(images, references=images))


@faked
@pytest.mark.parametrize("kind", ["lpips", "dists"])
def test_feature_distances_copy_nothing(kind, perceptual):
    """The networks hold their constants as buffers, which move with them."""
    reward = perceptual(kind)
    images = torch.rand(1, 3, 64, 64)
    reward(images, references=images)
    with Meter() as meter:
        images = torch.rand(2, 3, 64, 64, device="cuda")
        reward.to("cuda")
        assert_never_waits(meter, lambda: reward(images, references=images))


@faked
@pytest.mark.parametrize("name", [*STATISTICS, "jpeg", "calibration", "preprocess"])
def test_functions_copy_nothing(name):
    """Constants are on the device from the first call on."""
    quantiles = CDFMap((0.0, 0.5, 1.0), (0.0, 0.2, 1.0))
    functions = {
        **STATISTICS,
        "jpeg": lambda images: jpeg(images, images[:, 0, 0, 0]),
        "calibration": lambda images: quantiles(images[:, 0, 0, 0]),
        "preprocess": lambda images: preprocess(images, 28),
    }
    with Meter() as meter:
        images = torch.rand(2, 3, 40, 64, device="cuda")
        assert_never_waits(meter, lambda: functions[name](images))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [*REWARDS, "lpips", "dists"])
def test_gpu_scores_are_those_of_the_cpu(name, exact_convolutions, perceptual):
    """On a real one: no wait, and the same scores."""
    images = torch.rand(2, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    reward = iqareward.load(name) if name in REWARDS else perceptual(name)
    expected = reward(images, references=images.flip(-1))
    if name not in REWARDS:
        reward.to("cuda")
    there = images.cuda(), images.flip(-1).cuda()
    reward(there[0], references=there[1])
    with no_waits():
        scores = reward(there[0], references=there[1])
    torch.testing.assert_close(scores.cpu(), expected, **NETWORK_BATCH)


@faked
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_policies_copy_nothing(kind):
    """A denoising step, and the noising and its inverse, with a prompt that was encoded on the CPU."""
    policy = tiny.policy_of(kind)
    with Meter() as meter:
        for part in vars(policy).values():
            if isinstance(part, nn.Module):
                part.to("cuda")
        if hasattr(policy, "autoencoder"):
            policy.autoencoder.vae.to("cuda")
        latents = torch.zeros(2, *policy.latent_shape(tiny.images(1)), device="cuda")
        times = torch.zeros(2, dtype=torch.long, device="cuda")
        condition = policy.condition(torch.rand(2, *tiny.images(1).shape[1:], device="cuda"))

        def step():
            noisy = policy.process.add_noise(latents, latents, times)
            answer = policy.predict(noisy, times, condition)
            policy.process.clean(answer, noisy, times)
            policy.decode(latents)

        assert_never_waits(meter, step)
