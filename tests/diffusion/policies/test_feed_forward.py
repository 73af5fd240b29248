"""Networks that restore in one pass: any size, any scale, half precision, published checkpoints."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from iqareward.diffusion.batches import Batch
from iqareward.diffusion.noise import Noise
from iqareward.diffusion.policies.core import evaluating
from iqareward.diffusion.policies.feed_forward import FeedForwardPolicy
from tests.tolerances import EXACT


def seeded(build) -> nn.Module:
    """The module that `build` makes, with weights that do not depend on what ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def upscaler(scale: int) -> nn.Module:
    """A convolution and a pixel shuffle."""
    return seeded(lambda: nn.Sequential(nn.Conv2d(3, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale)))


def swinir():
    """SwinIR x4 in windows of 4."""
    from spandrel.architectures.SwinIR import SwinIR

    sizes = {"img_size": 8, "window_size": 4, "embed_dim": 12, "depths": [2], "num_heads": [2], "mlp_ratio": 2}
    return SwinIR(**sizes, upscale=4, upsampler="pixelshuffledirect")


def hat():
    """HAT x2."""
    from spandrel.architectures.HAT import HAT

    sizes = {"img_size": 16, "window_size": 4, "embed_dim": 12, "depths": [2], "num_heads": [2], "mlp_ratio": 2}
    return HAT(**sizes, squeeze_factor=4, upscale=2)


def nafnet():
    """NAFNet with two levels."""
    from spandrel.architectures.NAFNet import NAFNet

    return NAFNet(width=8, enc_blk_nums=[1], middle_blk_num=1, dec_blk_nums=[1])


def scunet():
    """SCUNet with a block in each stage."""
    from spandrel.architectures.SCUNet import SCUNet

    return SCUNet(config=[1] * 7, dim=64)


ARCHITECTURES = [(swinir, 4), (hat, 2), (nafnet, 1), (scunet, 1)]


def restored(policy: FeedForwardPolicy, degraded: torch.Tensor) -> torch.Tensor:
    """What validation shows."""
    noise = Noise(tuple(range(len(degraded))))
    condition = policy.condition(Batch(noise.ids, degraded), noise)
    (step,) = policy.schedule(condition, policy.num_steps)
    with torch.no_grad(), evaluating(policy):
        transition = policy.step(policy.start(condition, noise), step, condition, eta=policy.eta)
    return policy.decode(transition.mean, condition)


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize(("multiple", "minimum"), [(1, 1), (8, 1), (8, 24), (1, 40)])
def test_any_size_and_scale(scale, multiple, minimum):
    """Away from the padded edges the answer is that of the network; its size is that of the input, times the scale."""
    network, degraded = upscaler(scale), torch.rand(2, 3, 13, 18, generator=torch.Generator().manual_seed(0))
    images = restored(FeedForwardPolicy(network, multiple=multiple, minimum=minimum), degraded)
    assert images.shape == (2, 3, 13 * scale, 18 * scale)
    inside = (..., slice(0, 12 * scale), slice(0, 17 * scale))
    torch.testing.assert_close(images[inside], network(degraded)[inside].detach(), rtol=0, atol=1e-6)


def test_the_network_sees_the_sides_that_it_needs():
    """Both are multiples of what is asked and not smaller than the least, for an image smaller than its padding too."""
    seen = []

    class Recording(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, images):
            seen.append(tuple(images.shape[-2:]))
            return images * self.gain

    policy = FeedForwardPolicy(Recording(), multiple=8, minimum=20)
    for height, width in ((5, 7), (24, 33), (20, 20)):
        degraded = torch.rand(1, 3, height, width)
        torch.testing.assert_close(restored(policy, degraded), degraded, **EXACT)
    assert seen == [(24, 24), (24, 40), (24, 24)]


def test_noise_of_exploration():
    """A rollout step is a Gaussian of standard deviation eta around the answer, and differentiable."""
    policy, degraded = FeedForwardPolicy(upscaler(2)), torch.rand(1, 3, 8, 8)
    condition = policy.condition(Batch((0,), degraded), Noise((0,)))
    (step,) = policy.schedule(condition, 1)
    transition = policy.step(policy.start(condition, Noise((0,))), step, condition, eta=0.05)
    assert transition.std == 0.05
    torch.testing.assert_close(transition.mean, policy.model(degraded), **EXACT)
    transition.log_prob(transition.mean.detach() + 0.05).sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in policy.model.parameters())


def test_half_precision():
    """The network runs in the dtype of its weights; answers and losses are fp32."""
    policy, degraded = FeedForwardPolicy(upscaler(2).to(torch.bfloat16)), torch.rand(1, 3, 8, 8)
    images = restored(policy, degraded)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, upscaler(2)(degraded).detach(), rtol=0, atol=2e-2)
    condition = policy.condition(Batch((0,), degraded), Noise((0,)))
    loss = policy.sft_loss(torch.rand(1, 3, 16, 16), condition, Noise((0,)))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("l1", lambda d: d.abs()),
        ("mse", lambda d: d**2),
        ("charbonnier", lambda d: (d**2 + 1e-6).sqrt()),
        (lambda images, references: (images - references).pow(4).mean((1, 2, 3)), lambda d: d**4),
    ],
)
def test_the_supervised_loss_is_chosen(loss, expected):
    """By name or as a function; one number per image."""
    policy, degraded = FeedForwardPolicy(upscaler(1), loss=loss), torch.rand(3, 3, 8, 8)
    condition = policy.condition(Batch((0, 1, 2), degraded), Noise((0, 1, 2)))
    references = torch.rand(3, 3, 8, 8)
    losses = policy.sft_loss(references, condition, Noise((0, 1, 2)))
    torch.testing.assert_close(losses, expected(policy.model(degraded) - references).mean((1, 2, 3)))


def test_an_unknown_loss_is_refused():
    """With the names that there are."""
    with pytest.raises(ValueError, match=r"among \['l1', 'mse', 'charbonnier'\] or a function, got 'l2'"):
        FeedForwardPolicy(upscaler(1), loss="l2")


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # SwinIR as it was published
@pytest.mark.parametrize(("build", "scale"), ARCHITECTURES)
@pytest.mark.parametrize("layout", ["safetensors", "basicsr"])
def test_published_architectures_are_loaded(tmp_path, build, scale, layout):
    """SwinIR, HAT, NAFNet, SCUNet: what the checkpoint restores is what the network itself restores, and it trains."""
    network = seeded(build)
    if layout == "basicsr":
        path = tmp_path / "model.pth"
        torch.save({"params": {}, "params_ema": network.state_dict()}, path)
    else:
        path = tmp_path / "model.safetensors"
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, path)
    policy = FeedForwardPolicy.from_checkpoint(path)
    degraded = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(restored(policy, degraded), network(degraded), rtol=0, atol=1e-6)
    assert restored(policy, degraded[..., :37, :41]).shape == (1, 3, 37 * scale, 41 * scale)
    assert all(weight.requires_grad for weight in policy.model.parameters())


def test_a_network_that_needs_more_than_a_call_is_refused(tmp_path):
    """An FDnCNN takes a map of noise levels beside the image, an FBCNN answers with more than the image."""
    from spandrel.architectures.DnCNN import DnCNN
    from spandrel.architectures.FBCNN import FBCNN

    networks = {
        "DnCNN": lambda: DnCNN(in_nc=4, out_nc=3, nc=8, nb=5, act_mode="BR", mode="FDnCNN"),
        "FBCNN": lambda: FBCNN(nc=[8, 8, 8, 8], nb=4),
    }
    for name, build in networks.items():
        torch.save(seeded(build).state_dict(), tmp_path / "model.pth")
        with pytest.raises(ValueError, match=rf"the {name} of .*model\.pth does not by itself"):
            FeedForwardPolicy.from_checkpoint(tmp_path / "model.pth")


def test_other_files_are_refused(tmp_path):
    """Unknown networks, NaN, damaged files, lists and files that would run code are ValueErrors that name the file."""
    weights = seeded(nafnet).state_dict()
    torch.save({**weights, "intro.bias": torch.full_like(weights["intro.bias"], torch.nan)}, tmp_path / "nan.pth")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    (tmp_path / "damaged.safetensors").write_bytes(b"{")
    messages = {
        "nan.pth": r"NaN or infinite values in intro\.bias",
        "linear.pth": "spandrel recognises",
        "list.pth": "spandrel recognises",
        "module.pth": "cannot be read as weights",
        "damaged.safetensors": "cannot be read as weights",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=f"{tmp_path / name}.*{message}"):
            FeedForwardPolicy.from_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        FeedForwardPolicy.from_checkpoint(tmp_path / "missing.pth")


def test_spandrel_is_needed_for_checkpoints_only():
    """Without it the policy works, and loading says what to install."""
    program = (
        "import sys; sys.modules['spandrel'] = None\n"
        "import torch\n"
        "from iqareward.diffusion.policies.feed_forward import FeedForwardPolicy\n"
        "FeedForwardPolicy(torch.nn.Conv2d(3, 3, 1))\n"
        "FeedForwardPolicy.from_checkpoint('model.pth')\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert "iqareward[restorers]" in ran.stderr
