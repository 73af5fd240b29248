"""Our formulas, our rewards and five libraries, all on the device; gradients; memory of the networks of features."""

import warnings
from functools import partial

import torch
from torch import Tensor

from benchmarks.bench_classical import NO_REFERENCE, OURS, PEERS
from benchmarks.gpu.device import DEVICE, Row, gap, ms, peak_gib, waits
from benchmarks.gpu.parity import features
from benchmarks.gpu.run import Clock
from iqareward import load


def run(clock: Clock) -> None:
    settings = ((192, 2),) if clock.tiny else ((512, 32), (256, 32), (512, 8), (1024, 8))
    for size, batch in settings:
        pair = clock.prepare(f"images {size} b{batch}", partial(pictures, size, batch))
        for name in OURS if pair else ():
            clock.step(f"{name} {size} b{batch}", partial(against_peers, name, *pair), need=1.5)
        for name in ("ssim", "ms_ssim", "psnr", "gmsd", "haarpsi") if pair and (size, batch) == settings[0] else ():
            clock.step(f"{name} gradient {size} b{batch}", partial(gradient_speed, name, *pair))
    for size, batch in ((64, 2),) if clock.tiny else ((512, 32), (512, 128)):
        for name in ("dists", "lpips vgg", "lpips alex"):
            clock.step(f"{name} {size} b{batch}", partial(features_speed, name, size, batch), need=4)


def pictures(size: int, batch: int) -> tuple[Tensor, Tensor]:
    """Noisy images and their references."""
    rng = torch.Generator(DEVICE).manual_seed(0)
    coarse = torch.rand(batch, 3, size // 8, size // 8, generator=rng, device=DEVICE)
    true = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    return (true + 0.05 * torch.randn(true.shape, generator=rng, device=DEVICE)).clamp(0, 1), true


@torch.no_grad()
def against_peers(name: str, x: Tensor, true: Tensor) -> Row:
    """Milliseconds of our formula, of our reward, and of every other library."""
    ours = partial(OURS[name], *((x,) if name in NO_REFERENCE else (x, true)))
    expected, found = ours(), {"iqareward": ms(ours, most=0.5), "peak_gib": peak_gib(ours)}
    if name != "ssim_rgb":
        reward = partial(load(name), x, references=true)
        found |= {"reward": ms(reward, most=0.5), "waits": waits(reward)}
    for peer in PEERS[name]:
        if peer.library in ("pyiqa", "scikit-image"):
            continue  # on the CPU only as they are called there
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with DEVICE:  # modules are built there; not longer, since this mode slows every call
                    metric = peer.make()
                scores = torch.as_tensor(metric(*ours.args)).reshape(-1)
                found[peer.library] = ms(partial(metric, *ours.args), most=0.5, warm=1)
            if peer.same and len(scores) == len(x):
                found[f"{peer.library} gap"] = gap(scores.abs(), expected.abs())
        except Exception as error:
            found[peer.library] = f"{type(error).__name__}: {str(error)[:120]}"
    return found


def gradient_speed(name: str, x: Tensor, true: Tensor) -> Row:
    """Scores and their gradient to the pixels."""
    reward, leaf = load(name, differentiable=True), x.clone().requires_grad_()

    def call() -> None:
        leaf.grad = None
        reward(leaf, references=true).sum().backward()

    return {"ms": ms(call, most=0.6), "peak_gib": peak_gib(call)}


def features_speed(name: str, size: int, batch: int) -> Row:
    """LPIPS or DISTS with seeded weights: milliseconds, memory, waits."""
    x, true = pictures(size, batch)
    call = partial(features(name).to(DEVICE), x, references=true)
    return {"ms": ms(call, most=1.0), "peak_gib": peak_gib(call), "waits": waits(call)}
