"""Measure a policy on held-out images with rewards that it is not trained on."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from iqareward.atomic import atomic_write
from iqareward.diffusion.finite import finite_inputs, finite_mean
from iqareward.diffusion.policies import Policy
from iqareward.diffusion.rollouts import checked_scores, images_of, rollout
from iqareward.functional._checks import check_images
from iqareward.functional.color import luma
from iqareward.functional.psnr import psnr
from iqareward.groups import gather_rows
from iqareward.monitor import HackingMonitor
from iqareward.types import Reward

COLUMNS = 8  # images on a grid
MIN_SIDE, MAX_SIDE = 256, 512  # pixels of the longer side of an image on a grid
GAP, CAPTION = 12, 28  # pixels between images, and for the text below one


@dataclass
class Validation:
    """A fixed set of held-out inputs and everything that is measured on their restorations.

    Args:
        degraded: `[V, 3, H, W]` in [0, 1].
        references: `[V, 3, H, W]` ground truth in [0, 1].
        rewards: Maps names to `reward(images, references=...) -> [V]`, higher is better; not the training reward.
        num_steps: Sampling steps; the sampler is deterministic (eta = 0) and the first noise always the same.
        monitor: Compares the training reward with these rewards and with image statistics, to detect reward hacking.
        stop_on: Name of the reward that decides which model is best and when to stop.
        patience: Validations without a new best before training stops; never if not given.
        inputs_at_once: Inputs sampled together.

    Raises:
        ValueError: `stop_on` is not among `rewards`, or an image has a pixel that is not finite.

    Example:
        >>> import iqareward
        >>> from iqareward.diffusion import build_restorer
        >>> rewards = {"ssim": iqareward.load("ssim")}
        >>> validation = Validation(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16), rewards, num_steps=2)
        >>> validation(build_restorer((8, 16)), iqareward.load("gmsd"), seed=0)["scores"]["ssim"].shape
        torch.Size([2])
    """

    degraded: Tensor
    references: Tensor
    rewards: Mapping[str, Callable[..., Tensor]]
    num_steps: int = 10
    monitor: HackingMonitor | None = None
    stop_on: str | None = None
    patience: int | None = None
    inputs_at_once: int = 16
    best: float = field(default=float("-inf"), init=False)
    since_best: int = field(default=0, init=False)
    first: dict[str, Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.stop_on is not None and self.stop_on not in self.rewards:
            raise ValueError(f"Validation expected `stop_on` among {list(self.rewards)}, got {self.stop_on!r}.")
        bad = (~finite_inputs(self.degraded, self.references)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"Validation expected finite pixels, got others in the inputs {bad}. Leave them out.")

    @property
    def stopped(self) -> bool:
        """Whether the reward `stop_on` has not improved for too long."""
        return self.patience is not None and self.since_best >= self.patience

    @torch.no_grad()
    def restore(self, policy: Policy, *, seed: int, inputs: slice = slice(None)) -> Tensor:
        """The restorations `[V, 3, H, W]` of these inputs on the CPU."""
        device = next(policy.model.parameters()).device
        restored = []
        for ids in torch.arange(len(self.degraded))[inputs].split(self.inputs_at_once):
            degraded = self.degraded[ids].to(device)
            options: dict[str, Any] = {"group_size": 1, "num_steps": self.num_steps, "eta": 0.0, "seed": seed}
            sample = rollout(policy, degraded, ids=ids.tolist(), **options).sample
            restored.append(images_of(policy, sample).cpu())
        return torch.cat(restored)

    def __call__(self, policy: Policy, reward: Reward, *, seed: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
        """Restore and score every input; with several processes each does its share and all get the whole.

        Args:
            policy: The model.
            reward: The training reward, measured beside the others.
            seed: Seed of the first noise.
            rank: Number of this process.
            world: Number of processes.

        Returns:
            `{"images": [V, 3, H, W], "scores": {name: [V]}, "alarms": (sentences), "best": bool}`; the training reward
            is "reward", and "best" says whether `stop_on` is better than ever before. `grid` draws it.
        """
        count = len(self.degraded)
        mine = slice(count * rank // world, count * (rank + 1) // world)
        images, references = self.restore(policy, seed=seed, inputs=mine), self.references[mine]
        named: dict[str, Callable[..., Tensor]] = {"reward": reward, **self.rewards}
        columns: list[Tensor] = []
        for name, each in named.items():
            answer = each(images, references=references)
            columns.append(checked_scores(answer, name=getattr(each, "name", name), count=len(images)).cpu())
        own = torch.stack(columns, 1)
        device = next(policy.model.parameters()).device
        (rows,), _ = gather_rows(own.to(device))
        scores = dict(zip(named, rows.cpu().unbind(1), strict=True))
        if world > 1:
            images = self._gather(images, [count * (r + 1) // world - count * r // world for r in range(world)], device)
        alarms = [f"{name} scored no held-out image" for name, found in scores.items() if found.isnan().all()]
        if self.monitor is not None and not scores["reward"].isnan().all():
            if self.monitor.calibrated:
                alarms += self.monitor.update(images, self.references, scores["reward"]).alarms
            else:
                self.monitor.calibrate(images, self.references, scores["reward"])
        best = self.stop_on is not None and self._compare(finite_mean(scores[self.stop_on]))
        if self.first is None:
            self.first = self._first_grid(images, scores["reward"], reward)
        return {"images": images, "scores": scores, "alarms": tuple(alarms), "best": best}

    def _gather(self, images: Tensor, shares: Sequence[int], device: torch.device) -> Tensor:
        """The images of all processes on the CPU, in order, with a few of each on the device at a time."""
        blocks: list[tuple[Tensor, ...]] = []
        size = self.inputs_at_once
        for start in range(0, max(shares), size):
            (rows,), _ = gather_rows(images[start : start + size].to(device))
            blocks.append(rows.cpu().split([min(max(share - start, 0), size) for share in shares]))
        return torch.cat([block for of_process in zip(*blocks, strict=True) for block in of_process])

    def _first_grid(self, images: Tensor, rewards: Tensor, reward: Reward) -> dict[str, Tensor]:
        """What all later grids show as well, in 8 bits because every checkpoint has it."""
        references, found = self.references[:COLUMNS], {}
        for name, shown in (("degraded", self.degraded[:COLUMNS].cpu()), ("references", references)):
            answer = reward(shown, references=references)
            found[name] = checked_scores(answer, name=getattr(reward, "name", name), count=len(shown)).cpu()
        return found | {"images": _in_8_bits(images[:COLUMNS]), "rewards": rewards[:COLUMNS]}

    def grid(self, images: Tensor, rewards: Tensor, *, update: int) -> Image.Image:
        """The first eight inputs as an RGB image: degraded, restored at first and now, and the ground truth."""
        if self.first is None:
            raise ValueError("Validation.grid expected an earlier validation, got none. Call the validation first.")
        images, references = images[:COLUMNS], self.references[:COLUMNS]
        rows = {"degraded": self.degraded[:COLUMNS].cpu()}
        found = {"degraded": self.first["degraded"]}
        if not torch.equal(_in_8_bits(images), self.first["images"]):
            before = "restored\nat the start"
            rows[before], found[before] = self.first["images"].float() / 255, self.first["rewards"]
        now = f"restored\nupdate {update}"
        rows[now], found[now] = images, rewards[:COLUMNS]
        captions = {
            label: [
                f"PSNR {decibels:.2f} dB   reward {score:z.4g}"
                for decibels, score in zip(psnr(shown, references).tolist(), found[label].tolist(), strict=True)
            ]
            for label, shown in rows.items()
        }
        captions["ground truth"] = [f"reward {score:z.4g}" for score in self.first["references"].tolist()]
        return image_grid(rows | {"ground truth": references}, captions, columns=COLUMNS)

    def _compare(self, value: float) -> bool:
        """Whether `value` is the best so far; NaN, where nothing was scored, counts neither way."""
        better = value > self.best
        if not math.isnan(value):
            self.best, self.since_best = (value, 0) if better else (self.best, self.since_best + 1)
        return better

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, the monitor, and what grids show of the first validation."""
        monitor = None if self.monitor is None else self.monitor.state_dict()
        return {"best": self.best, "since_best": self.since_best, "monitor": monitor, "first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken."""
        self.best, self.since_best, self.first = state["best"], state["since_best"], state["first"]
        if self.monitor is not None and state["monitor"] is not None:
            self.monitor.load_state_dict(state["monitor"])


def image_grid(
    rows: Mapping[str, Tensor], captions: Mapping[str, Sequence[str]] | None = None, *, columns: int = 8
) -> Image.Image:
    """Images side by side, one line per entry of `rows`, with its name in front and a caption under each image.

    Images whose longer side is below 256 pixels are enlarged by a whole factor without smoothing; those above 512 are
    reduced to that.
    """
    captions = captions or {}
    drawn = {label: [_drawn(image) for image in images[:columns]] for label, images in rows.items()}
    width, height = next(images[0].size for images in drawn.values())
    font, small = ImageFont.load_default(size=20), ImageFont.load_default(size=16)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = GAP + math.ceil(max(ruler.multiline_textbbox((0, 0), label, font=font)[2] for label in rows)) + GAP
    texts = [text for row in captions.values() for text in row[:columns]]
    cell = GAP + max([width, *(math.ceil(ruler.textlength(text, font=small)) for text in texts)])
    line = GAP + height + (CAPTION if texts else 0)
    size = left + cell * max(map(len, drawn.values())), line * len(drawn) + GAP
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    for row, (label, images) in enumerate(drawn.items()):
        top = GAP + row * line
        pen.multiline_text((GAP, top + height / 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            grid.paste(image, (left + column * cell, top))
        for column, text in enumerate(captions.get(label, ())[:columns]):
            pen.text((left + column * cell, top + height + CAPTION / 2), text, fill="black", font=small, anchor="lm")
    return grid


def _in_8_bits(images: Tensor) -> Tensor:
    return images.float().nan_to_num(0.0).clamp(0, 1).mul(255).round().byte()


def _drawn(image: Tensor) -> Image.Image:
    """An image `[3, H, W]` in a size to look at."""
    drawn = Image.fromarray(_in_8_bits(image).permute(1, 2, 0).contiguous().numpy())
    longer = max(drawn.size)
    if longer < MIN_SIDE:
        factor = math.ceil(MIN_SIDE / longer)
        return drawn.resize((drawn.width * factor, drawn.height * factor), Image.Resampling.NEAREST)
    drawn.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return drawn


def save_grid(grid: Image.Image, path: Path, trackers: Sequence[Any], *, step: int) -> None:
    """Write a grid as a PNG, and give it to those trackers of accelerate that take images, as "samples"."""
    with atomic_write(path) as file:
        grid.save(file, format="PNG")
    pixels = np.asarray(grid)
    for tracker in trackers:
        if not hasattr(tracker, "log_images"):
            continue
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": pixels[None]}, step=step, dataformats="NHWC")
        else:  # these two of accelerate take one image, all others a list
            tracker.log_images({"samples": pixels if tracker.name in ("aim", "clearml") else [pixels]}, step=step)


class CeilingReport(NamedTuple):
    """Per image `[B]`: reward after the autoencoder, reward of the image itself, visibility of tile borders."""

    scores: Tensor
    reference_scores: Tensor
    seams: Tensor


@torch.no_grad()
def decoder_ceiling(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    images: Tensor,
    reward: Reward,
    *,
    tile: int | None = None,
) -> CeilingReport:
    """The highest reward a policy can reach: that of the ground truth after it has been encoded and decoded.

    A reward above it is a sign that the policy invents what the reward prefers. With tiled encoding or decoding also
    check `seams`: some rewards punish them, some do not see them.

    Args:
        encode: `policy.encode`.
        decode: `policy.decode`.
        images: `[B, 3, H, W]` ground truth in [0, 1].
        reward: Scores each image; called with `references=images`.
        tile: Side of a tile in pixels, for tiled decoding; without it `seams` is 1.

    Returns:
        A named tuple of three `[B]` tensors: `scores` after the autoencoder, `reference_scores` of the images
        themselves, and `seams`, how much larger luma jumps are across tile borders than elsewhere.

    Example:
        >>> import iqareward
        >>> photos = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> report = decoder_ceiling(lambda x: x, lambda x: 0.5 * x, photos, iqareward.load("ssim"))
        >>> bool((report.scores < report.reference_scores).all())
        True
    """
    decoded = decode(encode(images)).float().clamp(0, 1)
    scores, reference_scores = reward(decoded, references=images), reward(images, references=images)
    seams = torch.ones_like(scores) if tile is None else seam_strength(decoded, period=tile)
    return CeilingReport(scores, reference_scores, seams)


def seam_strength(images: Tensor, *, period: int, offset: int = 0) -> Tensor:
    """How much larger luma jumps are across tile borders than elsewhere, `[B]` fp32: 1 = no seams, NaN = not finite.

    The borders are `period` pixels apart, the first at `offset`, or at `period` if that is 0.
    """
    images = check_images("seam_strength", images, min_side=2)
    plane, sums, counts = luma(images), [], []
    if not 2 <= period < min(images.shape[2:]):
        raise ValueError(f"seam_strength expected 2 <= period < sides of {list(images.shape)}, got {period}.")
    for dim in (1, 2):
        jumps = plane.diff(dim=dim).abs().mean(3 - dim)
        border = torch.arange(1, jumps.shape[1] + 1, device=images.device) % period == offset % period
        for mask in (border, ~border):
            sums.append((jumps * mask).sum(1))
            counts.append(mask.sum())
    at_borders = (sums[0] + sums[2]) / (counts[0] + counts[2])
    elsewhere = (sums[1] + sums[3]) / (counts[1] + counts[3])
    flat = (at_borders == 0) & (elsewhere == 0)
    return torch.where(flat, 1.0, at_borders / elsewhere)
