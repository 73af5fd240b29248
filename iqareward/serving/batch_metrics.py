"""Figures of the batches that a process scores, for Prometheus, through Ray."""

from typing import Any, final

from iqareward.optional import require

SIZES = [1, 2, 4, 8, 16, 32, 64, 128]
SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]


@final
class BatchMetrics:
    """An observer for `RewardReplica`: `iqareward_images`, `iqareward_batch_size`, `iqareward_batch_seconds` by reward.

    To be made inside a process of Ray Serve.
    """

    def __init__(self) -> None:
        metrics: Any = require("ray.serve.metrics", extra="serve", purpose="the reward server")
        tags = ("reward",)
        self._images = metrics.Counter("iqareward_images", "Images scored.", tag_keys=tags)
        self._sizes = metrics.Histogram("iqareward_batch_size", "Images per batch.", boundaries=SIZES, tag_keys=tags)
        self._seconds = metrics.Histogram(
            "iqareward_batch_seconds", "Seconds to score a batch.", boundaries=SECONDS, tag_keys=tags
        )

    def __call__(self, reward: str, num_images: int, seconds: float) -> None:
        """Count one batch."""
        tags = {"reward": reward}
        self._images.inc(num_images, tags)
        self._sizes.observe(num_images, tags)
        self._seconds.observe(seconds, tags)
