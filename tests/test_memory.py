"""Memory on a device is bounded in bytes: pieces, peaks of large batches, and results that do not depend on either."""

import diffusers
import pytest
import torch
from accelerate import Accelerator

import iqareward
from benchmarks.meter import Meter, clip_reward
from iqareward import FullReference, NoReference
from iqareward.difficulty import rmse
from iqareward.diffusion import (
    DDIM,
    Autoencoder,
    Batch,
    ClippedPolicyGradient,
    ControlNetPolicy,
    Degradation,
    FixedPrompt,
    RolloutConfig,
    TrainConfig,
    add_lora,
)
from iqareward.diffusion.learner import Learner
from iqareward.diffusion.rollouts import collect, compare, reference_distances
from iqareward.diffusion.updates import Updates
from iqareward.functional import haarpsi
from iqareward.functional.resize import pillow_resize
from iqareward.functional.statistics import STATISTICS
from iqareward.rewards.cvvdp import CVVDPReward
from iqareward.rewards.owl2.rewards import QAlignReward
from iqareward.rewards.perceptual import BACKBONES, DISTSReward, LPIPSReward, STLPIPSReward
from iqareward.rewards.quick import QuickReward
from iqareward.weighting import LossWeights
from tests.diffusion.tiny import pixel_policy, seeded
from tests.gpu import fake_gpu
from tests.owl2 import owl2_tiny
from tests.rewards.quick_weights import quick_weights
from tests.tolerances import EXACT, NETWORK_BATCH

pytestmark = fake_gpu  # whose constants would stay in caches for a real one
BUDGET = 4 * 2**30


class Counting:
    """A metric that remembers the sizes of the batches it was called with."""

    def __init__(self):
        self.sizes = []

    def __call__(self, images, references=None):
        self.sizes.append(len(images))
        return images.square().mean((1, 2, 3)) - (0 if references is None else references.mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("count", "shape", "options", "sizes"),
    [
        (40, (512, 512), {}, [16, 16, 8]),
        (3, (4096, 4096), {}, [1, 1, 1]),
        (200, (16, 16), {}, [83, 83, 34]),  # small images count as 224x224, to which many networks enlarge them
        (40, (256, 1024), {"bytes_per_pixel": 2048}, [8] * 5),
        (40, (512, 512), {"bytes_per_pixel": 128}, [40]),
        (40, (512, 512), {"bytes_per_pixel": 1023.5}, [16, 16, 8]),  # measured bytes divided by pixels
        (40, (512, 512), {"batch_size": 30}, [30, 10]),
    ],
)
@pytest.mark.parametrize("form", [FullReference, NoReference])
def test_pieces_follow_from_bytes(form, count, shape, options, sizes):
    """A metric on a device is called with as many images as fit the budget, or with `batch_size`."""
    metric = Counting()
    reward = form(metric, higher_is_better=True, name="counting", **options)
    reward(torch.rand(1, 3, 16, 16), references=torch.rand(1, 3, 16, 16))
    metric.sizes.clear()
    with Meter():
        images = torch.rand(count, 3, *shape, device="cuda")
        assert reward(images, references=images).shape == (count,)
    assert metric.sizes == sizes


class CountingNetwork(torch.nn.Module):
    """A network that remembers the sizes of the batches it was called with."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, images, references):
        self.sizes.append(len(images))
        return (images - references).square().mean((1, 2, 3))


@pytest.mark.parametrize("images_on", ["cpu", "cuda"])
@pytest.mark.parametrize("device", ["cuda", None])
@pytest.mark.parametrize("form", [LPIPSReward, DISTSReward])
def test_pieces_fit_the_device_of_the_network(form, device, images_on):
    """Images on the CPU reach a network on a GPU in pieces for the GPU; a network of no device yet follows them."""
    network = CountingNetwork()
    with Meter():
        reward = form(model=network, device=device)
        images = torch.rand(4, 3, 512, 512, device=images_on)
        assert reward(images, references=images).shape == (4,)
    assert network.sizes == ([4] if "cuda" in (device, images_on) else [1, 1, 1, 1])


@pytest.fixture
def weighty(tmp_path):
    """Makes LPIPS or DISTS over seeded weights, or ST-LPIPS and cvvdp over their own."""
    models = pytest.importorskip("torchvision.models", reason="the extra `perceptual` is not installed")

    def make(name, **options):
        if name == "cvvdp":
            return CVVDPReward(**options)
        if name == "quick":
            return QuickReward(quick_weights(tmp_path), **options)
        if name.startswith("stlpips"):
            pytest.importorskip("stlpips_pytorch", reason="the extra `perceptual` is not installed")
            return STLPIPSReward("vgg" if name == "stlpips_vgg" else "alex", **options)
        net = "vgg" if name == "dists" else name.removeprefix("lpips_")
        with torch.device("meta"):
            whole = getattr(models, BACKBONES[net].function)(weights=None).state_dict()
        rng = torch.Generator().manual_seed(0)
        weights = {
            name: torch.randn(weight.shape, generator=rng) * (2 / max(1, weight[0].numel())) ** 0.5
            for name, weight in whole.items()
            if name.startswith("features.")
        }
        torch.save(weights, tmp_path / name)
        options |= {"weights": tmp_path / name}
        return DISTSReward(**options) if name == "dists" else LPIPSReward(net, **options)

    return make


FORMULAS = ("psnr", "ssim", "ms_ssim", "gmsd", "haarpsi")
NETWORKS = ("lpips_alex", "lpips_squeeze", "lpips_vgg", "stlpips", "stlpips_vgg", "dists", "cvvdp", "quick")


@pytest.mark.parametrize("name", [*FORMULAS, "piqe", "niqe", "brisque", *NETWORKS])
def test_scoring_stays_below_the_budget(name, weighty):
    """128 images of 512x512 in one call."""
    reward = weighty(name) if name in NETWORKS else iqareward.load(name)
    small = torch.rand(1, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    reward(small, references=small)
    with Meter() as meter:
        images, references = torch.rand(2, 128, 3, 512, 512, device="cuda")
        if name in NETWORKS:
            reward.to("cuda")
        meter.reset()
        reward(images, references=references)
        assert meter.peak_bytes < BUDGET


@pytest.mark.parametrize("name", [*FORMULAS, *NETWORKS])
def test_gradients_stay_below_the_budget(name, weighty):
    """Scores and gradients of 16 images of 512x512 by a network, 192 by a formula; the gradient is one more copy."""
    make = weighty if name in NETWORKS else iqareward.load
    reward = make(name, differentiable=True)
    small = torch.rand(1, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    reward(small, references=small)
    with Meter() as meter:
        shape = (16 if name in NETWORKS else 192, 3, 512, 512)
        images, references = torch.rand(shape, device="cuda", requires_grad=True), torch.rand(shape, device="cuda")
        if name in NETWORKS:
            reward.to("cuda")
        meter.reset()
        reward(images, references=references).sum().backward()
        assert meter.peak_bytes < BUDGET + 2 * images.nbytes
    assert images.grad.shape == images.shape


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["clipscore", "clipiqa"])
def test_clip_stays_below_the_budget(name, grad):
    """The smaller networks of the published sizes, images of 512x512, with and without their gradient."""
    pytest.importorskip("transformers", reason="the extra `vlm` is not installed")
    with Meter() as meter:
        reward = clip_reward(name, "cuda", differentiable=grad)
        images = torch.rand(16 if grad else 128, 3, 512, 512, device="cuda", requires_grad=grad)
        prompts = ["a cat"] * len(images)
        reward(images[:1].detach(), prompts=prompts[:1])
        meter.reset()
        scores = reward(images, prompts=prompts)
        if grad:
            scores.sum().backward()
        assert meter.peak_bytes < BUDGET + 2 * images.nbytes


@pytest.mark.parametrize("name", NETWORKS)
def test_scoring_in_pieces_changes_nothing(name, weighty):
    """Scores and gradients are those of the whole batch, although pieces are computed again for the gradient."""
    pairs = torch.rand(2, 5, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    results = []
    for options in ({"batch_size": 5}, {"batch_size": 2}):
        images = pairs[0].clone().requires_grad_()
        scores = weighty(name, differentiable=True, **options)(images, references=pairs[1])
        (scores * torch.arange(1.0, 6.0)).sum().backward()
        results.append((scores.detach(), images.grad))
    torch.testing.assert_close(results[1], results[0], **NETWORK_BATCH)


def test_a_batch_size_recomputes_for_the_gradient():
    """With a gradient and more images than `batch_size` each piece is scored again in the backward pass, alone."""
    metric = Counting()
    options = {"higher_is_better": True, "name": "counting", "differentiable": True}
    reward = NoReference(metric, **options, batch_size=2)
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = reward(images)
    assert metric.sizes == [2, 2, 1]
    scores.sum().backward()
    assert sorted(metric.sizes[3:]) == [1, 2, 2]
    whole = images.detach().clone().requires_grad_()
    NoReference(metric, **options)(whole).sum().backward()
    torch.testing.assert_close(images.grad, whole.grad, **EXACT)


def vae(channels, groups):
    """An autoencoder of diffusers with seeded weights."""
    count = len(channels)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * count, "up_block_types": ("UpDecoderBlock2D",) * count}
    shape = {"block_out_channels": channels, "norm_num_groups": groups, "layers_per_block": 2, "latent_channels": 4}
    return seeded(lambda: diffusers.AutoencoderKL(**blocks, **shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rollouts_are_decoded_within_the_budget(dtype):
    """24 rollouts of 512x512 by an autoencoder of Stable Diffusion's size: 4 GiB in place of 9 or 18."""
    with torch.device("meta"):  # before the meter, which would count every weight's initialisation
        model = vae((128, 256, 512, 512), 32)
    with Meter() as meter:
        autoencoder = Autoencoder(model.to(dtype).to_empty(device="cuda"))
        latents = torch.rand(24, 4, 64, 64, device="cuda")
        meter.reset()
        images = autoencoder.decode(latents)
        assert meter.peak_bytes < BUDGET + 2 * images.nbytes
        meter.reset()
        assert autoencoder.encode(images).shape == latents.shape
        assert meter.peak_bytes < BUDGET
        latents = latents[:2].requires_grad_()
        meter.reset()
        autoencoder.decode(latents).sum().backward()
        most = 7.5 * 2**30 * dtype.itemsize / 4  # of one image
        assert meter.peak_bytes < most


def test_a_video_autoencoder_stays_below_the_budget():
    """24 images of 512x512 by the autoencoder of Qwen-Image, whose convolutions see frames of padding."""
    with torch.device("meta"):
        model = seeded(diffusers.AutoencoderKLQwenImage)
    with Meter() as meter:
        autoencoder = Autoencoder(model.to(torch.bfloat16).to_empty(device="cuda"))
        latents = torch.rand(24, 16, 64, 64, device="cuda")
        meter.reset()
        images = autoencoder.decode(latents)
        assert meter.peak_bytes < BUDGET + 2 * images.nbytes
        meter.reset()
        assert autoencoder.encode(images).shape == latents.shape
        assert meter.peak_bytes < BUDGET


def test_decoding_in_pieces_changes_nothing():
    """Pixels, latents and gradients are those of all rows at once, also when fewer fit."""
    model = vae((8, 8, 8, 8), 4)
    images = torch.rand(6, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model.encode(2 * images - 1).latent_dist.mode() * model.config.scaling_factor
    autoencoder = Autoencoder(model)
    latents = autoencoder.encode(images)
    torch.testing.assert_close(latents, whole, **NETWORK_BATCH)
    results = []
    for decode in (lambda rows: (model.decode(rows / model.config.scaling_factor).sample + 1) / 2, autoencoder.decode):
        rows = latents.clone().requires_grad_()
        pixels = decode(rows)
        pixels.square().sum().backward()
        results.append((pixels.detach(), rows.grad))
    torch.testing.assert_close(results[1], results[0], **NETWORK_BATCH)


@pytest.mark.parametrize("name", [*STATISTICS, "haarpsi", "pillow_resize", "Degradation"])
def test_functions_stay_below_the_budget(name):
    """400 images of 512x512 in one call."""
    functions = {
        **STATISTICS,
        "haarpsi": lambda images: haarpsi(images, images),
        "pillow_resize": lambda images: pillow_resize(images, (448, 448)),
        "Degradation": lambda images: Degradation(("blur",))(images, images[:, 0, 0, 0], list(range(400))),
    }
    with Meter(read=2.0) as meter:
        images = torch.rand(400, 3, 512, 512, device="cuda")
        meter.reset()
        result = functions[name](images)
        assert meter.peak_bytes < BUDGET + 2 * result.nbytes


def test_large_photographs_are_preprocessed_within_the_budget():
    """12 photographs of 8 megapixels for Q-Align, in one batch of the network."""
    network = owl2_tiny.seeded_model(owl2_tiny.TINY)
    with Meter() as meter:
        reward = QAlignReward(network, device="cuda")
        images = torch.rand(12, 3, 2448, 3264, device="cuda")
        meter.reset()
        assert reward(images).shape == (12,)
        assert meter.peak_bytes < BUDGET


def stable_diffusion(networks, trained, guidance_scale=1.0):
    """A ControlNet in float32, or adapters in float32, beside frozen networks of Stable Diffusion 1.5 in bfloat16."""
    unet, control, autoencoder = networks
    unet, autoencoder = (part.to(torch.bfloat16).to_empty(device="cuda") for part in (unet, autoencoder))
    control = control.to_empty(device="cuda")
    if trained == "unet":
        unet = add_lora(unet, rank=16, targets=["to_q", "to_k", "to_v", "to_out.0"])
        control = control.to(torch.bfloat16)
    process = DDIM.from_scheduler(diffusers.DDIMScheduler(beta_schedule="scaled_linear"))
    prompts = FixedPrompt({"prompt": torch.randn(1, 77, 768, device="cuda")})
    options = {"train": trained, "guidance_scale": guidance_scale}
    return ControlNetPolicy(control, unet, Autoencoder(autoencoder), process, prompts, prompts, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")  # fake scores are what the meter says
@pytest.mark.parametrize(("trained", "guidance_scale"), [("controlnet", 4.0), ("unet", 1.0)])
def test_an_update_by_default_options_fits_a_gpu_of_24_gib(trained, guidance_scale, monkeypatch):
    """Weights included: 64 rollouts of 512x512 by Stable Diffusion 1.5's size, then a step of the optimiser."""
    monkeypatch.setattr(Accelerator, "device", torch.device("cuda", 0))
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        control = diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        networks = unet, control, vae((128, 256, 512, 512), 32)
    with Meter(read=1.0) as meter:
        policy = stable_diffusion(networks, trained, guidance_scale)
        learner = Learner(policy, ClippedPolicyGradient(), TrainConfig(), Accelerator(cpu=True))

        def sampled(count, config):
            images, references = torch.rand(2, count, 3, 512, 512, device="cuda")
            batch = Batch(tuple(range(count)), images, references)
            distance = reference_distances(rmse)
            return collect(policy, [iqareward.load("ssim")], batch, config, seed=0, distance=distance)

        everything = sampled(8, RolloutConfig(num_steps=1))
        assert len(everything.distances) == 64
        # learning takes the same memory for each piece of 4 rollouts or inputs, so one of each will do
        config = RolloutConfig(group_size=1, num_steps=2, window=range(1))
        experience = compare([sampled(4, config)], config, weights=[1.0], std_floor=0.0)
        record = learner.learn(experience, LossWeights(*torch.ones(2, 4, device="cuda")), update=0, seed=0)
        assert record["skipped"] == 0
    assert meter.peak_bytes < 24 * 2**30


def test_gradients_are_averaged_in_buckets(monkeypatch):
    """Over two processes, each gradient once, in messages of at most 128 MiB beyond the gradients themselves."""
    monkeypatch.setattr(Accelerator, "device", torch.device("cuda", 0))
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: None)
    sent = []

    def reduce(accelerator, tensor, reduction):
        if reduction == "mean":
            sent.append(tensor.nbytes)
        return tensor.clone()

    monkeypatch.setattr(Accelerator, "reduce", reduce)
    with Meter(read=1.0) as meter:
        policy = pixel_policy()
        policy.model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, device="cuda") for _ in range(16)))
        updates = Updates(policy, Accelerator(cpu=True), torch.optim.SGD, max_grad_norm=float("inf"))
        updates.backward(policy.model(torch.rand(4, 2048, device="cuda")).square().sum())
        meter.reset()
        updates.step(torch.zeros(1, device="cuda"), update=1)
    assert sum(sent) == sum(weight.nbytes for weight in updates.weights)
    assert max(sent) <= 2**27
    assert len(sent) == 3
    assert meter.peak_bytes < 3 * 2**27
