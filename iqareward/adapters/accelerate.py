"""Scores of a validation set in a training loop of your own that uses accelerate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from iqareward.adapters._core import UNIT, ValueRange
from iqareward.adapters._quality import Quality, write_grid
from iqareward.diffusion.validation import log_grid
from iqareward.images import ImageLike
from iqareward.rewards.specs import Spec
from iqareward.types import Reward

__all__ = ["ValidationScores"]


@final
class ValidationScores:
    """Score the restorations of a validation loop by several rewards, and log means and a grid of images.

    With several processes every sample of a prepared loader counts once, also those that accelerate repeats to fill
    the last batch. For each reward the log has its mean over the images that were scored (NaN if none was), the number
    that were not as `.../unscored`, and, where there are inputs and ground truth, the means over the third of the
    inputs with the lowest PSNR as `.../hard` and that with the highest as `.../easy`. The grid shows the first images
    of the main process, each with its scores: degraded, restored, and ground truth.

    Args:
        accelerator: Gathers the scores, and logs to its trackers.
        rewards: Names for the log -> a name or sum of the catalogue, or any reward that scores each image on its own.
        prefix: Of all names in the log.
        num_images: Images of the grid; 0 = no grid.
        folder: Where grids are written as PNG as well; None = nowhere.
        value_range: (black, white) of floating-point pixels.

    Raises:
        TypeError: `rewards` is not a mapping.
        ValueError: `num_images` is negative; or there are several processes, and the accelerator leaves their last
            batches uneven, which its gathering of metrics does not allow.

    Example:
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(cpu=True)
        >>> clean = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> loader = accelerator.prepare(torch.utils.data.DataLoader(clean, batch_size=4))
        >>> scores = ValidationScores(accelerator, {"ssim": "ssim", "psnr": "psnr"})
        >>> for batch in loader:
        ...     scores.update(0.9 * batch, references=batch)
        >>> sorted(scores.log(step=100))
        ['validation/psnr', 'validation/psnr/unscored', 'validation/ssim', 'validation/ssim/unscored']
    """

    def __init__(
        self,
        accelerator: Any,
        rewards: Mapping[str, Spec | Reward],
        *,
        prefix: str = "validation",
        num_images: int = 8,
        folder: Path | str | None = None,
        value_range: ValueRange = UNIT,
    ) -> None:
        self.accelerator, self.prefix, self.folder = accelerator, prefix, folder
        shown = num_images if accelerator.is_main_process else min(num_images, 0)
        self._quality = Quality(rewards, who="ValidationScores", num_images=shown, value_range=value_range)
        if accelerator.num_processes > 1 and not accelerator.even_batches:
            raise ValueError(
                "ValidationScores expected an accelerator with even_batches=True on several processes, got False. "
                "Samples that are repeated to fill the last batch are left out of the scores."
            )
        self._rows: list[Tensor] = []

    def update(
        self,
        images: ImageLike,
        *,
        references: ImageLike | None = None,
        inputs: ImageLike | None = None,
        prompts: Sequence[str] | None = None,
    ) -> None:
        """Score a batch: once for each batch of a loader that accelerate has prepared, with all of its rows.

        Args:
            images: The restorations, `[B, 3, H, W]` in `value_range`, or whatever `iqareward.to_images` reads.
            references: The ground truth, one for each image.
            inputs: The degraded images, one for each image; they may be smaller.
            prompts: One text for each image.

        Raises:
            ValueError: A reward needs a column that is missing, or columns do not match.
        """
        rows, columns = self._quality.score(images, references, inputs, prompts)
        counted = self.accelerator.gather_for_metrics(rows.to(self.accelerator.device)).cpu()
        self._quality.keep(rows, columns, min(len(rows), len(counted)))  # the rows of the main process come first
        self._rows.append(counted)

    def log(self, step: int) -> dict[str, float]:
        """Log the figures and the grid of all batches since the last call, and start anew.

        Args:
            step: Number of updates so far. With several processes all must call it.

        Returns:
            The figures, the same on all processes.

        Raises:
            ValueError: There was no batch.
        """
        if not self._rows:
            raise ValueError("ValidationScores.log expected at least one update before, got none.")
        found = self._quality.summary(torch.cat(self._rows), prefix=self.prefix)
        self.accelerator.log(found, step=step)
        grid = self._quality.grid() if self.accelerator.is_main_process else None
        if grid is not None:
            log_grid(grid, self.accelerator.trackers, step=step)
            if self.folder is not None:
                write_grid(grid, self.folder, step)
        self._rows = []
        self._quality.forget()
        return found
