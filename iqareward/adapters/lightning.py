"""Scores of a validation set in a run of Lightning."""

import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from iqareward.adapters._core import UNIT, ValueRange, framework
from iqareward.adapters._quality import Quality, write_grid
from iqareward.groups import gather_rows
from iqareward.rewards.specs import Spec
from iqareward.types import Reward

__all__ = ["quality_callback"]  # its class, QualityCallback, is made on access

_HOME = "https://lightning.ai (pip install lightning)"
_COLUMNS = {"images", "references", "inputs", "prompts"}


def quality_callback(
    rewards: Mapping[str, Spec | Reward],
    restore: Callable[[Any, Any, Any], Mapping[str, Any]],
    *,
    prefix: str = "val",
    num_images: int = 8,
    folder: Path | str | None = None,
    value_range: ValueRange = UNIT,
) -> Any:
    """A callback of Lightning that scores the restorations of every validation, and logs means and a grid of images.

    With several processes every sample counts once, also those that the distributed sampler repeats to fill the last
    batch. For each reward the log has its mean over the images that were scored (NaN if none was), the number that were
    not as `.../unscored`, and, where there are inputs and ground truth, the means over the third of the inputs with the
    lowest PSNR as `.../hard` and that with the highest as `.../easy`. Checkpoints and early stopping may monitor any
    of them. The grid shows the first images of the main process, each with its scores: degraded, restored, and ground
    truth; it goes to loggers of TensorBoard and W&B and into `folder`.

    The batches of the sanity check before training are scored, so that a missing column is an error at once, and not
    logged. Figures of further validation loaders end in `/dataloader_idx_<number>`.

    Args:
        rewards: Names for the log -> a name or sum of the catalogue, or any reward that scores each image on its own.
        restore: `restore(module, batch, outputs) -> {"images": ..., "references": ..., "inputs": ..., "prompts": ...}`:
            the restorations of a batch, one for each of its samples, and what else there is. `outputs` is what
            `validation_step` returned, for modules that restore there.
        prefix: Of all names in the log.
        num_images: Images of the grid; 0 = no grid.
        folder: Where grids are written as PNG; None = nowhere.
        value_range: (black, white) of floating-point pixels.

    Returns:
        A `lightning.pytorch.Callback` for `Trainer(callbacks=[...])`.

    Raises:
        ImportError: There is no Lightning.
        TypeError: `rewards` is not a mapping, or `restore` cannot be called; in a validation: it returned something
            else.
        ValueError: `num_images` is negative; in a validation: a reward needs a column that is missing.
    """
    return _callback_class()(rewards, restore, prefix, num_images, folder, value_range)


def _callback_class() -> Any:
    return _made_of(framework("lightning.pytorch", who="quality_callback", home=_HOME))


@cache
def _made_of(lightning: ModuleType) -> type:
    class QualityCallback(lightning.Callback):
        """See `quality_callback`."""

        def __init__(
            self, rewards: Any, restore: Any, prefix: str, num_images: int, folder: Any, value_range: Any
        ) -> None:
            if not callable(restore):
                raise TypeError(f"quality_callback expected `restore` as a function, got {type(restore).__name__}.")
            self.restore, self.prefix, self.folder = restore, prefix, folder
            self._quality = Quality(rewards, who="quality_callback", num_images=num_images, value_range=value_range)
            self._rows: dict[int, list[Tensor]] = {}
            self._seen: dict[int, int] = {}

        def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self._rows, self._seen = {}, {}
            self._quality.forget()

        def on_validation_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            restored = self.restore(pl_module, batch, outputs)
            if not isinstance(restored, Mapping) or "images" not in restored or not restored.keys() <= _COLUMNS:
                got = sorted(restored) if isinstance(restored, Mapping) else type(restored).__name__
                raise TypeError(
                    "quality_callback expected `restore` to return {'images': ..., 'references': ..., 'inputs': ..., "
                    f"'prompts': ...}}, of which only images are needed, got {got}."
                )
            rows, columns = self._quality.score(**restored)
            start = self._seen.get(dataloader_idx, 0)
            self._seen[dataloader_idx] = start + len(rows)
            own = min(len(rows), _num_samples(_loaders(trainer)[dataloader_idx]) - start)
            if trainer.is_global_zero:
                self._quality.keep(rows, columns, own)
            self._rows.setdefault(dataloader_idx, []).append(rows[: max(own, 0)])

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.sanity_checking:
                return
            num_loaders = len(_loaders(trainer))
            for loader in range(num_loaders):
                rows = torch.cat([torch.zeros(0, self._quality.width), *self._rows.get(loader, ())])
                (rows,), _ = gather_rows(rows.to(pl_module.device))
                found = self._quality.summary(rows.cpu(), prefix=self.prefix)
                suffix = f"/dataloader_idx_{loader}" if num_loaders > 1 else ""
                # equal on all processes; without sync_dist Lightning warns that they might not be
                named = {name + suffix: value for name, value in found.items()}
                pl_module.log_dict(named, sync_dist=True, add_dataloader_idx=False)
            grid = self._quality.grid() if trainer.is_global_zero else None
            if grid is None:
                return
            step = trainer.global_step
            if self.folder is not None:
                write_grid(grid, self.folder, step)
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image(f"{self.prefix}/images", [grid], step=step)
                elif hasattr(logger.experiment, "add_image"):
                    logger.experiment.add_image(f"{self.prefix}/images", np.asarray(grid), step, dataformats="HWC")

    QualityCallback.__qualname__ = "QualityCallback"  # pickled by name
    return QualityCallback


def _loaders(trainer: Any) -> list[Any]:
    combined = framework("lightning.pytorch.utilities.combined_loader", who="quality_callback", home=_HOME)
    return combined.CombinedLoader(trainer.val_dataloaders, "sequential").flattened


def _num_samples(loader: Any) -> int:
    """The samples of this process that are no repetitions, which come last."""
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None) or getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return sys.maxsize
    # sample i of this process is sample `i * replicas + rank` of the data, followed by repetitions of the first
    return len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # pyright: ignore[reportArgumentType]


def __getattr__(name: str) -> type:
    if name != "QualityCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _callback_class()
