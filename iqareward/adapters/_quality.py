"""Scores of the restorations of a validation set, collected batch by batch: means, thirds, and images to look at.

What Lightning and accelerate share; each of them gathers the rows of all processes in its own way.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from PIL import Image
from torch import Tensor

from iqareward.adapters._core import UNIT, Scorer, ValueRange
from iqareward.atomic import atomic_write
from iqareward.diffusion.validation import image_grid, in_size_of
from iqareward.functional.psnr import psnr
from iqareward.images import ImageLike, to_images
from iqareward.rewards.specs import Spec
from iqareward.types import Images, Reward

__all__ = ["Quality", "write_grid"]


class _Shown(NamedTuple):
    """One image of the grid, with what belongs to it, each a batch of one on the CPU."""

    images: Tensor
    references: Tensor | None
    inputs: Tensor | None
    prompts: Sequence[str] | None
    scores: Tensor


@final
class Quality:
    """Scores batches by several rewards, and keeps the first images.

    Args:
        rewards: Names for the log -> a name or sum of the catalogue, or any reward that scores each image on its own.
        who: The caller's name, for error messages.
        num_images: Images of the grid.
        value_range: (black, white) of floating-point pixels.
    """

    def __init__(
        self, rewards: Mapping[str, Spec | Reward], *, who: str, num_images: int, value_range: ValueRange = UNIT
    ) -> None:
        if not isinstance(rewards, Mapping) or not rewards:
            raise TypeError(
                f"{who} expected `rewards` as a mapping of names to rewards, such as {{'ssim': 'ssim'}}, "
                f"got {rewards!r}."
            )
        if num_images < 0:
            raise ValueError(f"{who} expected num_images >= 0, got {num_images}.")
        sources: dict[str, Any] = {"references": True, "inputs": True, "prompts": True}
        self.scorers = {
            name: Scorer(reward, who=who, sources=sources, on_nan="nan", policies=("nan",))
            for name, reward in rewards.items()
        }
        self.num_images, self.value_range = num_images, value_range
        self._shown: list[_Shown] = []

    @property
    def width(self) -> int:
        """Columns of the rows of a batch."""
        return len(self.scorers) + 1

    def score(
        self,
        images: ImageLike,
        references: ImageLike | None = None,
        inputs: ImageLike | None = None,
        prompts: Sequence[str] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """`[B, width]`: the scores by every reward and how easy each input is, on the CPU; and the columns as read.

        How easy an input is says its own PSNR, enlarged to the size of the ground truth; NaN without either of them.
        """
        columns: dict[str, Any] = {"images": images, "references": references, "inputs": inputs}
        for name, column in columns.items():
            columns[name] = None if column is None else to_images(column, value_range=self.value_range)
        columns["prompts"] = prompts
        return self._rows(columns), columns

    @torch.no_grad()
    def _rows(self, columns: Mapping[str, Any]) -> Tensor:
        found = [scorer(**columns).float().cpu() for scorer in self.scorers.values()]
        return torch.stack([*found, _ease(columns["references"], columns["inputs"], len(found[0]))], 1)

    def keep(self, rows: Tensor, columns: Mapping[str, Any], num_rows: int) -> None:
        """Take images of a batch, of its first `num_rows`, for the grid while there is room."""
        for row in range(min(num_rows, self.num_images - len(self._shown))):
            one = {name: None if column is None else column[row : row + 1] for name, column in columns.items()}
            images = {name: _single(one[name]) for name in ("images", "references", "inputs")}
            self._shown.append(_Shown(**images, prompts=one["prompts"], scores=rows[row]))  # pyright: ignore

    def forget(self) -> None:
        """Start anew."""
        self._shown = []

    def summary(self, rows: Tensor, *, prefix: str) -> dict[str, float]:
        """Figures for the log, from the rows of all batches and processes.

        Of each reward, the mean over the images that have a score, NaN if none has; the number of the others; and the
        mean of the third of the inputs that is hardest and of that which is easiest.
        """
        ease = rows[:, -1]
        order = ease.argsort(stable=True)[: int(ease.isfinite().sum())]  # NaN is sorted to the end
        third = len(order) // 3
        found: dict[str, float] = {}
        for name, scores in zip(self.scorers, rows.double().unbind(1)[:-1], strict=True):
            found[f"{prefix}/{name}"] = float(scores.nanmean())
            found[f"{prefix}/{name}/unscored"] = float(scores.isnan().sum())
            if third:
                found[f"{prefix}/{name}/hard"] = float(scores[order[:third]].nanmean())
                found[f"{prefix}/{name}/easy"] = float(scores[order[-third:]].nanmean())
        return found

    def grid(self) -> Image.Image | None:
        """The kept images in columns: degraded, restored and ground truth, where there are such, with their scores."""
        shown = self._shown
        if not shown:
            return None
        lines: dict[str, list[Tensor]] = {"restored": [each.images[0] for each in shown]}
        scores: dict[str, list[Tensor]] = {"restored": [each.scores for each in shown]}
        if all(each.inputs is not None for each in shown):
            lines = {"degraded": [each.inputs[0] for each in shown if each.inputs is not None], **lines}
            enlarged = [in_size_of(each.inputs, each.images[0]) for each in shown if each.inputs is not None]
            scores["degraded"] = [self._of(each, images) for each, images in zip(shown, enlarged, strict=True)]
        if all(each.references is not None for each in shown):
            lines["ground truth"] = [each.references[0] for each in shown if each.references is not None]
            scores["ground truth"] = [self._of(each, each.references) for each in shown]
        captions = {label: [self._caption(each) for each in scores[label]] for label in lines}
        return image_grid(lines, captions, columns=len(shown))

    def _of(self, shown: _Shown, images: Any) -> Tensor:
        columns = {name: getattr(shown, name) for name in ("references", "inputs", "prompts")}
        return self._rows({"images": images, **columns})[0]

    def _caption(self, scores: Tensor) -> str:
        shown = [f"{score:z.4g}" if score == score else "not scored" for score in scores[:-1].tolist()]
        return "\n".join(f"{name} {score}" for name, score in zip(self.scorers, shown, strict=True))


def _ease(references: Images | None, inputs: Images | None, size: int) -> Tensor:
    if references is None or inputs is None:
        return torch.full((size,), torch.nan)
    found = []
    for degraded, clean in zip(inputs, references, strict=True):
        found.append(psnr(in_size_of(degraded[None], clean), clean[None].to(degraded.device)).cpu())
    return torch.cat(found)


def _single(column: Any) -> Tensor | None:
    if column is None:
        return None
    return torch.stack(list(column)).detach().cpu()


def write_grid(grid: Image.Image, folder: Path | str, step: int) -> None:
    """Write a grid as `<step>.png`."""
    path = Path(folder) / f"{step:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        grid.save(file, format="PNG")
