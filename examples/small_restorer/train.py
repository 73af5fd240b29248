"""Train the small restorer on photographs: crops with their damage are stored, then learned from.

    python -m examples.small_restorer.train --photos PHOTOS... --output weights --minutes 4 --device cuda

Four minutes of an H100 see a million crops; a processor core needs half a day for them. OUTPUT gets
`converged.safetensors`, and `early.safetensors` after a twentieth of the time. It needs `pip install . --group demo`.
"""

import argparse
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from examples.distill.pictures import crop_of
from examples.small_restorer.restorer import build
from examples.small_restorer.tasks import InTurns
from iqareward.image_files import find_images

SIDE, SEVERITIES = 128, (0.2, 1.0)
RATE, WARM_UP, AVERAGE = 1e-3, 200, 0.999
EARLY = 0.05  # of the time


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m examples.small_restorer.train", description=__doc__, formatter_class=style
    )
    parser.add_argument("--photos", type=Path, nargs="+", required=True, help="photographs, or folders of them")
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--count", type=int, default=24_000, help="number of crops")
    parser.add_argument("--batch", type=int, default=64, help="crops in an update")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training, after the crops are cut")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that cut crops")
    parser.add_argument("--seed", type=int, default=0)
    options, console, started = parser.parse_args(), Console(stderr=True), time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    crops = cut([*find_images(options.photos).files], options.count, options.workers, options.seed)
    console.print(f"{len(crops.references)} crops after {time.perf_counter() - started:.0f} s")
    updates, loss = learn(crops, options, console)
    console.print(json.dumps({"updates": updates, "batch": options.batch, "loss": loss}), soft_wrap=True)


class Crops(NamedTuple):
    """`[N, 3, S, S]` in bytes."""

    degraded: Tensor
    references: Tensor


def cut(photos: list[Path], count: int, workers: int, seed: int) -> Crops:
    """Crop i is of photograph i modulo their number and has task i modulo 5, whatever the number of workers."""
    # each worker opens photographs of its own, because opening takes longer than cutting
    shares = [[row for row in range(count) if row % len(photos) % workers == worker] for worker in range(workers)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        jobs = [pool.submit(_cut, photos, rows, seed) for rows in shares if rows]
        parts = [job.result() for job in jobs]
    order = torch.tensor([row for rows in shares for row in rows]).argsort()
    return Crops(*(torch.from_numpy(np.concatenate(each))[order] for each in zip(*parts, strict=True)))


def _cut(photos: list[Path], rows: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    torch.set_num_threads(1)
    found = np.empty((2, len(rows), 3, SIDE, SIDE), np.uint8)
    for place, row in enumerate(rows):
        draws = np.random.default_rng([seed, row])
        clean = crop_of(photos[row % len(photos)], SIDE, draws)[None]
        severity = torch.tensor([draws.uniform(*SEVERITIES)], dtype=torch.float32)
        for store, image in zip(found, (InTurns()(clean, severity, [row], seed=seed), clean), strict=True):
            store[place] = image[0].mul(255).round().byte().numpy()
    return found[0], found[1]


def learn(crops: Crops, options: argparse.Namespace, console: Console) -> tuple[int, float]:
    """Train for the given time, store both weights, and return the number of updates and the last mean loss."""
    device, seconds = torch.device(options.device), 60 * options.minutes
    torch.manual_seed(options.seed)
    policy = build(seed=options.seed).to(device)
    policy.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    crops = Crops(*(each.to(device) for each in crops))
    weights = list(policy.model.parameters())
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    losses, update, early, start, told = torch.zeros((), device=device), 0, False, time.perf_counter(), 0.0
    while (share := (time.perf_counter() - start) / seconds) < 1:
        rate = RATE * min(1.0, (update + 1) / WARM_UP) * (1 + math.cos(math.pi * share)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(crops.references), (options.batch,), device=device)
        degraded, clean = turned(*(2 * (each[rows].float() / 255) - 1 for each in crops))
        times = policy.process.draw_times(torch.rand(options.batch, device=device))
        latents = policy.process.add_noise(clean, torch.randn_like(clean), times, anchor=degraded)
        with torch.autocast(device.type, torch.bfloat16):
            answer = policy.predict(latents, times, {"latents": degraded})
        loss = (answer.float() - clean).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        update += 1
        decay = min(AVERAGE, update / (update + 10))
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - decay)
        losses = 0.99 * losses + 0.01 * loss.detach()
        if device.type == "cuda" and update % 20 == 0:
            torch.cuda.synchronize()  # so that the clock sees what is done, not what waits
        if not early and share >= EARLY:
            early = True
            store(average, policy.model, options.output / "early.safetensors")
            console.print(f"early: {update} updates")
        if share - told > 0.1:
            told = share
            console.print(f"{share:.0%}  {update} updates  loss {float(losses) / (1 - 0.99**update):.5f}")
    store(average, policy.model, options.output / "converged.safetensors")
    return update, float(losses) / (1 - 0.99**update)


def turned(*images: Tensor) -> list[Tensor]:
    """The batches, all turned and mirrored alike, in one of eight ways."""
    turns, mirrored = (int(torch.randint(limit, ())) for limit in (4, 2))
    images = tuple(torch.rot90(each, turns, (2, 3)) for each in images)
    return [each.flip(3) if mirrored else each for each in images]


def store(average: list[Tensor], model: torch.nn.Module, file: Path) -> None:
    """Write weights in half precision."""
    names = [name for name, _ in model.named_parameters()]
    save_file({name: each.half().contiguous().cpu() for name, each in zip(names, average, strict=True)}, file)


if __name__ == "__main__":
    main()
