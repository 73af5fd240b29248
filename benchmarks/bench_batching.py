"""What many callers cost: images per second of MicroBatched from threads and coroutines against one big batch.

    python -m benchmarks.bench_batching             # some minutes
    python -m benchmarks.bench_batching --quick     # smoke run

Every way of calling scores the same images: `one batch` in one call of the reward; `8 threads, direct` image by image
without batching; the others through `MicroBatched`, from threads or coroutines that send their next images when they
have the scores of the last. All are timed in turn; figures are medians. The share is that of `one batch`. The last
line of standard output is one JSON document.
"""

import argparse
import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import iqareward
from benchmarks._harness import document, finish, medians, target
from benchmarks.bench_qalign import TINY, random_model
from iqareward import MicroBatched
from iqareward.rewards.owl2.network import Owl2Config
from iqareward.rewards.owl2.rewards import QAlignReward
from iqareward.types import Images, Reward, Scores

NUM_CALLERS = 8
PROMISED_SHARE = 0.9
# a few hundred million multiplications per image: a network, but one that two processor cores can run in a loop
SMALL = Owl2Config(
    **dict.fromkeys(("vision_hidden", "abstractor_hidden", "hidden"), 128),
    **dict.fromkeys(("vision_ffn", "abstractor_ffn", "ffn"), 256),
    **dict.fromkeys(("vision_layers", "abstractor_layers", "layers"), 2),
    **dict.fromkeys(("vision_heads", "abstractor_heads", "heads", "kv_heads"), 4),
)


class Counted:
    """A reward that counts its calls."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.num_calls, self.num_images = reward, 0, 0
        self.name, self.bounds, self.differentiable = reward.name, reward.bounds, False
        self.needs_references, self.needs_prompts = reward.needs_references, reward.needs_prompts

    def __call__(self, images: Images, references: Images | None = None, **ignored: Any) -> Scores:
        self.num_calls += 1
        self.num_images += len(images)
        return self.reward(images, references=references)


def rewards(quick: bool, device: torch.device) -> dict[str, Reward]:
    """A network and two classical metrics, one of them so cheap that every microsecond of a caller shows."""
    model = random_model(TINY if quick else SMALL, device, torch.float32)
    return {"owl2": QAlignReward(model), "niqe": iqareward.load("niqe"), "ssim": iqareward.load("ssim")}


def shares(images: Tensor, size: int) -> list[list[Tensor]]:
    """The images of each caller, in calls of `size`."""
    return [list(rows.split(size)) for rows in images.chunk(NUM_CALLERS)]


def from_threads(reward: Reward, images: Tensor, pool: ThreadPoolExecutor, size: int) -> None:
    """Each thread sends its calls one after the other."""

    def caller(calls: list[Tensor]) -> None:
        for batch in calls:
            reward(batch, references=batch)

    list(pool.map(caller, shares(images, size)))


def from_coroutines(reward: MicroBatched, images: Tensor) -> None:
    """The same on one event loop."""

    async def caller(calls: list[Tensor]) -> None:
        for image in calls:
            await reward.ascore(image, references=image)

    async def all_callers() -> None:
        await asyncio.gather(*(caller(calls) for calls in shares(images, 1)))

    asyncio.run(all_callers())


def measure(name: str, reward: Reward, images: Tensor, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each way of calling."""
    with ThreadPoolExecutor(NUM_CALLERS) as pool:
        counted = {calling: Counted(reward) for calling in ("threads", "threads, calls of 4", "coroutines")}
        batched = {calling: MicroBatched(counts) for calling, counts in counted.items()}
        calls: dict[str, Callable[[], object]] = {
            "one batch": lambda: reward(images, references=images),
            f"{NUM_CALLERS} threads, direct": partial(from_threads, reward, images, pool, 1),
            f"{NUM_CALLERS} threads": partial(from_threads, batched["threads"], images, pool, 1),
            f"{NUM_CALLERS} threads, calls of 4": partial(
                from_threads, batched["threads, calls of 4"], images, pool, 4
            ),
            f"{NUM_CALLERS} coroutines": partial(from_coroutines, batched["coroutines"], images),
        }
        seconds = medians(calls, rounds=rounds, slow=60.0)
        for calling, found in seconds.items():
            counts = counted.get(calling.removeprefix(f"{NUM_CALLERS} "))
            yield {
                "reward": name,
                "calling": calling,
                "images_per_s": round(len(images) / found, 2),
                "share": round(seconds["one batch"] / found, 3),
                "images_per_batch": None if counts is None else round(counts.num_images / counts.num_calls, 1),
            }
        for reward_of_one in batched.values():
            reward_of_one.close()


def main() -> None:
    """Measure, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count, side = (16, 96) if options.quick else (128, 256)
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    rows = [
        row
        for name, reward in rewards(options.quick, device).items()
        for row in measure(name, reward, images[:64] if name == "owl2" else images, 1 if options.quick else 5)
    ]
    table = Table("reward", "calling", "images/s", "share", "images per batch")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(stderr=True).print(table)
    targets = [
        target(f"{row['reward']} from {NUM_CALLERS} threads, share of one batch", row["share"], PROMISED_SHARE)
        for row in rows
        if row["calling"] == f"{NUM_CALLERS} threads"
    ]
    finish(document("batching", rows, targets, []), options.out)


if __name__ == "__main__":
    main()
