"""The reward that bench_serving serves: Q-Align on a small mPLUG-Owl2 with seeded weights, built where it is used.

    python -m benchmarks._serving_judge --config wide --threads 1 --batch 32 --seconds 10 --side 512

scores batches when it reads a line, after it has said that it is ready, and prints one line of JSON: images, seconds.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_qalign import MEDIUM, TINY, random_model
from iqareward.rewards.owl2.rewards import QAlignReward
from iqareward.types import Images, Scores

# `wide` has few tokens and large matrices: an image alone waits for the weights to be read; a batch reads them once.
# So does a 7B on a GPU. `medium` has the tokens of the real network; one image is enough work for a CPU.
CONFIGS = {
    "wide": dataclasses.replace(
        MEDIUM, hidden=2048, ffn=5504, heads=16, kv_heads=16, layers=4, num_queries=1, image_size=56, vision_layers=2
    ),
    "medium": MEDIUM,
    "tiny": dataclasses.replace(TINY, image_size=56, num_queries=4),
}


PICTURES = 64


def pictures(side: int) -> Tensor:
    """`[PICTURES, 3, side, side]` in [0, 1], multiples of 1/255: smooth with grain, which no codec can make vanish."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(PICTURES, 3, 16, 16, generator=rng)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    return ((smooth + 0.03 * torch.randn(smooth.shape, generator=rng)).clamp(0, 1) * 255).floor() / 255


class Judge:
    """Scores with a network of one of `CONFIGS`, on so many threads, in whichever process it is called."""

    name, bounds = "judge", (0.0, 1.0)
    needs_references = needs_prompts = differentiable = False

    def __init__(self, config: str, threads: int, batch_size: int) -> None:
        self.config, self.threads, self.batch_size = config, threads, batch_size
        self._reward: QAlignReward | None = None

    def __call__(
        self, images: Images, references: Any = None, prompts: Sequence[str] | None = None, **ignored: Any
    ) -> Scores:
        """Build at the first call, then score."""
        if self._reward is None:
            torch.set_num_threads(self.threads)
            model = random_model(CONFIGS[self.config], torch.device("cpu"), torch.float32)
            self._reward = QAlignReward(model, batch_size=self.batch_size)
        return self._reward(images)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reward": None}


class Idle:
    """A reward that does nothing."""

    name, bounds = "judge", (0.0, 1.0)
    needs_references = needs_prompts = differentiable = False

    def __call__(
        self, images: Images, references: Any = None, prompts: Sequence[str] | None = None, **ignored: Any
    ) -> Scores:
        """Zeros."""
        return torch.zeros(len(images))


def score_batches(judge: Judge, images: Tensor, seconds: float) -> dict[str, Any]:
    """One whole batch after the other."""
    start, count = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        judge(images)
        count += len(images)
    return {"images": count, "seconds": time.perf_counter() - start, "latencies": []}


def main() -> None:
    """Warm up, wait for a line, score."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--side", type=int, required=True)
    options = parser.parse_args()
    judge, images = Judge(options.config, options.threads, options.batch), pictures(options.side)[: options.batch]
    judge(images)
    print("ready", flush=True)
    input()
    print(json.dumps(score_batches(judge, images, options.seconds)), flush=True)


if __name__ == "__main__":
    main()
