"""What holds on every device: the same code runs on the CPU here and on a GPU where there is one."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import iqareward
from iqareward import MicroBatched, Overlapped, QAlignReward, Reward
from iqareward.diffusion import ClippedPolicyGradient, DirectRewardGradient
from iqareward.diffusion.checkpoint import trained_weights
from iqareward.functional import gmsd
from iqareward.rewards.catalog import CATALOG
from iqareward.rewards.cvvdp import CVVDPReward
from iqareward.rewards.metric import FullReference
from iqareward.rewards.owl2.rewards import DeQAReward
from iqareward.rewards.perceptual import DISTSReward, LPIPSReward, STLPIPSReward
from iqareward.rewards.quick import QuickReward
from iqareward.rewards.vlm.hpsv3 import HPSv3Reward
from iqareward.rewards.vlm.rewards import LevelReward, RatingReward
from tests.diffusion import tiny as policies
from tests.diffusion.train_tiny import trainer
from tests.gpu import no_waits, on_devices
from tests.owl2.owl2_tiny import SMALL, seeded_model
from tests.rewards import clip_tiny
from tests.rewards.pictures import noisy, textures
from tests.rewards.quick_weights import quick_weights
from tests.tolerances import EXACT, HALF_NETWORK, NETWORK_BATCH
from tests.vlm import tiny as vlm
from tests.vlm.test_rating import SHORT

FORMULAS = [name for name, entry in CATALOG.items() if not entry.weights]
FOREIGN = [name for name in FORMULAS if CATALOG[name].extra]  # piq's code is not ours to keep from waiting
OTHERS = [
    "quick", "lpips", "lpips_vgg", "stlpips", "cvvdp", "dists", "qalign", "deqa", "hpsv3", *clip_tiny.NAMES, "sum",
    "calibrated",
]  # fmt: skip
PROMPTS = ["the cat", "a dog", "the cat"]
VLMS = [*(f"level {family}" for family in vlm.FAMILIES), *(f"rating {family}" for family in vlm.FAMILIES)]
NO_GRADIENT = {name for name in FORMULAS if not CATALOG[name].differentiable} | {"rating qwen3_5"}


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Reward]:
    """Makes the reward of a name on a device; learned ones have seeded weights, the same in every reward."""

    def backbone(name: str) -> Path:
        models = pytest.importorskip("torchvision.models", reason="the extra `perceptual` is not installed")
        file = tmp_path / name
        if not file.exists():
            with torch.device("meta"):
                shapes = getattr(models, name)(weights=None).state_dict()
            rng = torch.Generator().manual_seed(0)
            weights = {
                key: torch.randn(value.shape, generator=rng) * (2 / value[0].numel()) ** 0.5  # keeps sizes of maps
                for key, value in shapes.items()
                if key.startswith("features.")
            }
            torch.save(weights, file)
        return file

    def build(name: str, device: str = "cpu", **options: Any) -> Reward:
        kind, _, family = name.partition(" ")
        if family:
            model = vlm.model(family, vlm.pair(family)[1].tokenizer), vlm.pair(family)[1]
            options |= {"device": device, "batch_size": 2}
            if kind == "level":
                return LevelReward(model, **options)
            return RatingReward(model, SHORT, min_digit_mass=0.0, **options)
        match name:
            case "lpips" | "lpips_vgg":
                net = "vgg" if name == "lpips_vgg" else "alex"
                weights = backbone("vgg16" if net == "vgg" else "alexnet")
                return LPIPSReward(net, weights=weights, device=device, **options)
            case "quick":
                return QuickReward(quick_weights(tmp_path), device=device, **options)
            case "stlpips":
                pytest.importorskip("stlpips_pytorch", reason="the extra `perceptual` is not installed")
                return STLPIPSReward(device=device, **options)
            case "cvvdp":
                return CVVDPReward(device=device, **options)
            case "dists":
                return DISTSReward(weights=backbone("vgg16"), device=device, **options)
            case "qalign":
                return QAlignReward(seeded_model(SMALL), device=device, batch_size=2, **options)
            case "deqa":
                return DeQAReward(seeded_model(SMALL), device=device, batch_size=2, **options)
            case _ if name in clip_tiny.NAMES:
                return clip_tiny.reward(name, tmp_path, device=device, **options)
            case "hpsv3":
                if not (folder := tmp_path / "hpsv3").exists():
                    folder.mkdir()
                    vlm.hpsv3_files(folder)
                files = {"weights": folder / "hub", "base": folder / "base"}
                return HPSv3Reward(device=device, batch_size=2, **files, **options)
            case "sum":
                parts = build("qalign", device, **options), build("ssim", **options)
                return iqareward.WeightedSum(zip((0.7, 0.3), parts, strict=True))
            case "calibrated":
                return iqareward.Calibrated(build("qalign", device, **options), iqareward.AffineMap(0.2, 0.8))
            case _:
                if CATALOG[name].extra == "perceptual":
                    pytest.importorskip("piq", reason="the extra `perceptual` is not installed")
                return iqareward.load(name, **options)

    return build


def pair(name: str, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Three images and their references, as large as the most demanding formulas want, small for networks."""
    references = textures(3, 168 if name in FORMULAS else 64)
    return noisy(references).to(device), references.to(device)


@on_devices
@pytest.mark.parametrize("name", [*FORMULAS, *OTHERS, *VLMS])
def test_scores(name, device, build, exact_convolutions):
    """They are those of single images on the CPU, stay on the device, and a broken image has none."""
    images, references = pair(name)
    alone = build(name)
    rows = zip(images, references, PROMPTS, strict=True)
    expected = torch.cat([alone(a[None], references=b[None], prompts=[c]) for a, b, c in rows])
    expected[1] = torch.nan
    images[1, 0, 0, 0] = torch.nan
    there, truth = images.to(device), references.to(device)
    reward = build(name, device)
    reward(there, references=truth, prompts=PROMPTS)
    with contextlib.nullcontext() if name in FOREIGN else no_waits():
        scores = reward(there, references=truth, prompts=PROMPTS)
    assert scores.device.type == device
    torch.testing.assert_close(scores.cpu(), expected, equal_nan=True, **NETWORK_BATCH)


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["qalign", "deqa", *VLMS])
def test_half_precision(name, dtype, device, build):
    """Weights in half the bits score close to float32, in float32."""
    images, _ = pair(name)
    scores = build(name, device, dtype=dtype)(images.to(device))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.cpu(), build(name)(images), **HALF_NETWORK)


@on_devices
@pytest.mark.parametrize("name", [name for name in [*FORMULAS, *OTHERS, *VLMS] if name not in NO_GRADIENT])
def test_gradients(name, device, build, exact_convolutions):
    """They are those of single images on the CPU."""
    images, references = pair(name)
    alone = build(name, differentiable=True)
    rows = []
    for image, reference, prompt in zip(images, references, PROMPTS, strict=True):
        row = image[None].requires_grad_()
        alone(row, references=reference[None], prompts=[prompt]).sum().backward()
        rows.append(row.grad)
    expected = torch.cat(rows)
    there = images.to(device).requires_grad_()
    reward = build(name, device, differentiable=True)
    reward(there, references=references.to(device), prompts=PROMPTS).sum().backward()
    # as a whole, because rounding takes another branch of some ReLU now and then
    gap = torch.linalg.vector_norm(there.grad.cpu() - expected) / torch.linalg.vector_norm(expected)
    torch.testing.assert_close(gap, torch.tensor(0.0), rtol=0.0, atol=1e-3)


@on_devices
@pytest.mark.parametrize(
    "name", ["quick", "lpips", "stlpips", "dists", "qalign", "deqa", *clip_tiny.NAMES[:4], *VLMS[:2]]
)
def test_offload_and_onload(name, device, build):
    """Scores come back bit for bit, and on a GPU the memory of the weights is free meanwhile."""
    images, references = pair(name, device)
    reward = build(name, device)
    before = reward(images, references=references, prompts=PROMPTS)
    for _ in range(2):
        reward.offload()
        gc.collect()
        asleep = torch.cuda.memory_allocated() if device == "cuda" else 0
        reward.onload()
        after = reward(images, references=references, prompts=PROMPTS)
        torch.testing.assert_close(after, before, **EXACT)
        assert device == "cpu" or asleep < torch.cuda.memory_allocated()


@on_devices
@pytest.mark.parametrize("wrapper", [MicroBatched, Overlapped])
def test_wrappers(wrapper, device, build):
    """Scores computed in another thread are those of the caller's own."""
    images, references = pair("qalign", device)
    reward = build("qalign", device)
    expected = reward(images, references=references)
    torch.testing.assert_close(wrapper(reward)(images, references=references), expected, **NETWORK_BATCH)


@pytest.fixture
def accelerator(device: str, request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    """accelerate on that device; it keeps device and precision for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=device == "cpu", mixed_precision=getattr(request, "param", "no"))
    AcceleratorState._reset_state(reset_partial_state=True)


@on_devices
@pytest.mark.parametrize("accelerator", ["no", "bf16"], indirect=True)
@pytest.mark.parametrize("kind", policies.KINDS)
@pytest.mark.parametrize("objective", [ClippedPolicyGradient, DirectRewardGradient])
def test_updates(kind, objective, device, accelerator, tmp_path):
    """An update of every policy changes its weights to finite ones, frozen parts in bfloat16 under mixed precision."""
    reward = FullReference(gmsd, higher_is_better=False, differentiable=objective is DirectRewardGradient)
    policy = policies.policy_of(kind)
    if accelerator.mixed_precision == "bf16":
        for part in vars(policy).values():
            if isinstance(part, nn.Module) and part is not policy.model:
                part.to(torch.bfloat16)
        if hasattr(policy, "autoencoder"):
            policy.autoencoder.vae.to(torch.bfloat16)
    run = trainer(
        tmp_path,
        policy=policy,
        reward=reward,
        objective=objective(reward) if objective is DirectRewardGradient else objective(),
        validation=None,
        accelerator=accelerator,
    )
    before = {name: weight.detach().clone() for name, weight in run.policy.model.named_parameters()}
    line = run.train(1)[1]
    assert line["skipped"] == 0
    after = dict(run.policy.model.named_parameters())
    assert all(weight.device.type == device and bool(weight.isfinite().all()) for weight in after.values())
    assert any(not torch.equal(weight, before[name]) for name, weight in after.items())


@on_devices
def test_resuming(device, accelerator, tmp_path):
    """Two updates, a checkpoint and a third in a new trainer end where three updates end, bit for bit on the CPU."""
    whole, first, second = (tmp_path / name for name in ("whole", "parts", "parts"))
    reward = FullReference(gmsd, higher_is_better=False)
    run = trainer(whole, reward=reward, accelerator=accelerator)
    run.train(3)
    trainer(first, reward=reward, accelerator=accelerator).train(2, save_every=1)
    resumed = trainer(second, reward=reward, accelerator=accelerator)
    resumed.train(3, resume=True)
    tolerance = EXACT if device == "cpu" else {"rtol": 0.0, "atol": 1e-5}  # 1.1e-6 was measured on an H100
    for name, weight in trained_weights(run.policy.model).items():
        torch.testing.assert_close(trained_weights(resumed.policy.model)[name], weight, **tolerance)


@on_devices
def test_overlap(device, accelerator, build, tmp_path):
    """Scoring beside sampling ends in the weights of scoring after it."""
    runs = []
    for overlap in (False, True):
        options = {"reward": FullReference(gmsd, higher_is_better=False), "validation": None}
        run = trainer(tmp_path / str(overlap), overlap=overlap, accelerator=accelerator, **options)
        run.train(1)
        runs.append(trained_weights(run.policy.model))
    for name, weight in runs[0].items():
        torch.testing.assert_close(runs[1][name], weight, rtol=0.0, atol=0.0 if device == "cpu" else 1e-5)
