"""Every reward on the CPU and on the device: scores, gradients, batch invariance, waits.

As figures; the GPU tests say what is wrong.
"""

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import iqareward
from benchmarks.gpu.device import DEVICE, Row, equal, gap, patched, waits
from benchmarks.gpu.run import Clock
from benchmarks.latency import seeded_backbone
from iqareward.rewards.catalog import CATALOG
from iqareward.rewards.perceptual import DISTSReward, LPIPSReward
from tests.owl2.owl2_tiny import SMALL, seeded_model

FORMULAS = [name for name, entry in CATALOG.items() if not entry.weights and not entry.extra]
PIQ = [name for name, entry in CATALOG.items() if not entry.weights and entry.extra == "piq"]
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava_onevision", "internvl")

Pair = tuple[Tensor, Tensor]
Make = Callable[[], Any]


def run(clock: Clock) -> None:
    pair = degraded(3, 176, 208) if clock.tiny else degraded(6, 320, 448)
    small = degraded(3, 64, 96) if clock.tiny else pair
    # a dry run takes some of each kind: the steps are the same for all
    names = ("ssim", "haarpsi", "niqe") if clock.tiny else FORMULAS
    families = FAMILIES[:1] if clock.tiny else FAMILIES
    backbones = ("lpips alex",) if clock.tiny else ("lpips alex", "lpips vgg", "dists")
    formulas: dict[str, Make] = {name: partial(iqareward.load, name) for name in names}
    networks: dict[str, Make] = {
        "qalign fp32": owl, "qalign bf16": partial(owl, dtype=torch.bfloat16),
        "qalign fp16": partial(owl, dtype=torch.float16), "qalign int8": partial(owl, quant="int8"),
        "deqa fp32": partial(owl, "DeQAReward"),
        **{name: partial(features, name) for name in backbones},
        **{f"vlm {family}": partial(vlm, iqareward.LevelReward, family) for family in families},
        "rating qwen2_5_vl": rating,
    }  # fmt: skip
    gradients: dict[str, tuple[Make, Pair]] = {
        name: (partial(iqareward.load, name, differentiable=True), pair)
        for name in names
        if CATALOG[name].differentiable
    }
    gradients["qalign"] = partial(owl, differentiable=True), small
    gradients["lpips"] = partial(features, "lpips alex", differentiable=True), small
    for name, make in formulas.items():
        clock.step(name, partial(compare, make, pair))
    for name, make in networks.items():
        clock.step(name, partial(compare, make, small), need=2)
    for name, (make, images) in gradients.items():
        clock.step(f"{name} gradient", partial(gradient, make, images))
    for name in PIQ[:1] if clock.tiny else PIQ:  # other people's arithmetic, so last
        clock.step(name, partial(compare, partial(iqareward.load, name), pair))


def degraded(count: int, height: int, width: int) -> Pair:
    """Images on the CPU, one of them flat and one with a NaN, and their references."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, height // 8, width // 8, generator=rng)
    references = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    images = (references + 0.08 * torch.randn(references.shape, generator=rng)).clamp(0, 1)
    images[-2] = 0.5
    images[-1, 0, 0, 0] = torch.nan
    return images, references


def compare(make: Make, pair: Pair) -> Row:
    """A reward on both devices, and on the second one in other ways that must give the same."""
    expected = placed(make(), torch.device("cpu"))(pair[0], references=pair[1])
    moved, (images, references) = placed(make(), DEVICE), (half.to(DEVICE) for half in pair)

    def score(rows: Any = slice(None), dtype: torch.dtype = torch.float32) -> Tensor:
        return moved(images[rows].to(dtype), references=references[rows].to(dtype))

    found = score()
    both = expected.isfinite() & found.cpu().isfinite()
    off, scale = (found.cpu() - expected).abs()[both], expected.abs()[both].clamp(min=1e-6)
    alone = torch.cat([score(slice(i, i + 1)) for i in range(len(images))])
    mixed = moved([images[0], images[1][..., :-8]], references=[references[0], references[1][..., :-8]])
    with patched(torch.backends.cudnn, "allow_tf32", False):
        exact = score().cpu()
    row: Row = {
        "device_kept": found.device == images.device,
        "nan_alike": equal(found.cpu().isnan().int(), expected.isnan().int()),
        "max_abs": float(off.max()),
        "max_rel": float((off / scale).max()),
        "max_abs_without_tf32": float((exact - expected).abs()[both].max()),
        "repeatable": equal(score(), found),
        "batch_invariant": equal(alone, found),
        "batch_max_abs": gap(alone, found),
        "mixed_gap": gap(mixed[0], found[0]),
        "waits": waits(score),
    }
    for dtype in (torch.bfloat16, torch.float16):  # such images are those numbers, and computed in float32
        cast = moved(images.to(dtype).float(), references=references.to(dtype).float())
        row[f"{dtype} images, gap"] = gap(score(dtype=dtype), cast)
    return row


def gradient(make: Make, pair: Pair) -> Row:
    """Error of the gradient to the pixels, relative to its norm.

    Without the flat image: rounding decides which of the equal pixels in a window is its maximum.
    """
    grads = []
    for device, tf32 in ((torch.device("cpu"), True), (DEVICE, True), (DEVICE, False)):
        leaf, references = pair[0][:-2].to(device, copy=True).requires_grad_(), pair[1][:-2].to(device)
        with patched(torch.backends.cudnn, "allow_tf32", tf32):
            placed(make(), device)(leaf, references=references).sum().backward()
        grads.append(leaf.grad.cpu())
    off = [float((grads[0] - grad).norm() / grads[0].norm().clamp(min=1e-12)) for grad in grads[1:]]
    return {"grad_rel": off[0], "grad_rel_without_tf32": off[1], "finite": bool(grads[1].isfinite().all())}


def placed(reward: Any, device: torch.device) -> Any:
    return reward.to(device) if hasattr(reward, "to") else reward


def owl(cls: str = "QAlignReward", **options: Any) -> Any:
    return getattr(iqareward, cls)(seeded_model(SMALL), batch_size=4, **options)


@cache
def backbone(net: str) -> Path:
    return seeded_backbone(net, Path(tempfile.gettempdir()))


def features(name: str, **options: Any) -> Any:
    """LPIPS or DISTS on a backbone with seeded weights."""
    net = name.removeprefix("lpips ")
    if name == "dists":
        return DISTSReward(weights=backbone("vgg"), **options)
    return LPIPSReward(net, weights=backbone(net), **options)


def vlm(reward: Callable[..., Any], family: str, *arguments: Any, **options: Any) -> Any:
    """A reward on a tiny model of a family, made anew, since it is moved."""
    from tests.vlm import tiny

    processor = tiny.pair(family)[1]
    return reward((tiny.model(family, processor.tokenizer), processor), *arguments, batch_size=4, **options)


def rating() -> Any:
    from tests.vlm.test_rating import SHORT

    return vlm(iqareward.RatingReward, "qwen2_5_vl", SHORT, min_digit_mass=0.0)
