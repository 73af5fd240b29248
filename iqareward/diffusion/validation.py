"""Measure a policy on held-out images with rewards that it is not trained on."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from iqareward.atomic import atomic_write
from iqareward.diffusion.batches import Batch, batches
from iqareward.diffusion.conditions import check_condition
from iqareward.diffusion.finite import finite_mean
from iqareward.diffusion.noise import Noise
from iqareward.diffusion.pairs import Pairs
from iqareward.diffusion.policies.core import Policy, evaluating
from iqareward.diffusion.rollouts import images_of, rollout, scored, scored_alone
from iqareward.functional.psnr import psnr
from iqareward.functional.statistics import seam_strength
from iqareward.groups import gather_rows
from iqareward.monitor import HackingMonitor
from iqareward.rewards.core import refuse_groups
from iqareward.types import Reward

COLUMNS = 8  # images on a grid
MIN_SIDE, MAX_SIDE = 256, 512  # pixels of the longer side of an image on a grid
GAP, CAPTION, LINE = 12, 28, 21  # pixels between images, for the text below one, and for each further line of it


@dataclass
class Validation:
    """A fixed set of held-out inputs and everything that is measured on their restorations.

    Args:
        pairs: The held-out inputs, all of which are read at once and kept on the CPU.
        rewards: Scores by name, higher is better, called as the training reward is; not the training reward.
        num_steps: Sampling steps; those of the sampler that the policy ships with, if not given.
        eta: Noise of each step; that of the sampler that the policy ships with, if not given.
        monitor: Compares the training reward with these rewards and with image statistics, to detect reward hacking.
        stop_on: Name of the reward that decides which model is best and when to stop.
        patience: Validations without a new best before training stops; never if not given.
        inputs_at_once: Inputs sampled together.

    Raises:
        ValueError: `stop_on` is not among `rewards`; an image has a pixel that is not finite; or there is a monitor and
            the inputs differ in size or lack ground truth.

    Example:
        >>> import iqareward
        >>> from iqareward.diffusion import SyntheticPairs, build_restorer
        >>> validation = Validation(SyntheticPairs(2, size=16), {"ssim": iqareward.load("ssim")}, num_steps=2)
        >>> validation(build_restorer((8, 16)), {"gmsd": iqareward.load("gmsd")}, [1.0], seed=0)["scores"]["ssim"].shape
        torch.Size([2])
    """

    pairs: Pairs
    rewards: Mapping[str, Callable[..., Tensor]]
    num_steps: int | None = None
    eta: float | None = None
    monitor: HackingMonitor | None = None
    stop_on: str | None = None
    patience: int | None = None
    inputs_at_once: int = 16
    batches: list[Batch] = field(init=False, repr=False)
    best: float = field(default=float("-inf"), init=False)
    since_best: int = field(default=0, init=False)
    first: dict[str, Any] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.rewards, Mapping) and all(map(callable, self.rewards.values()))):
            raise TypeError(
                "Validation expected `rewards` as a mapping of names to rewards, such as "
                f"{{'ssim': iqareward.load('ssim')}}, got {self.rewards!r}."
            )
        if self.stop_on is not None and self.stop_on not in self.rewards:
            raise ValueError(f"Validation expected `stop_on` among {list(self.rewards)}, got {self.stop_on!r}.")
        for reward in self.rewards.values():
            refuse_groups("Validation", reward)
        self.batches = batches(self.pairs, range(len(self.pairs)))
        bad = [each for part in self.batches for each, good in zip(part.ids, part.usable.tolist()) if not good]
        if bad:
            raise ValueError(f"Validation expected finite pixels, got others in the inputs {bad}. Leave them out.")
        if self.monitor is not None and (len(self.batches) > 1 or self.batches[0].references is None):
            raise ValueError(
                "Validation with a monitor expected inputs of one size with ground truth, got other ones. Crop them, "
                "or leave the monitor out."
            )

    @property
    def stopped(self) -> bool:
        """Whether the reward `stop_on` has not improved for too long."""
        return self.patience is not None and self.since_best >= self.patience

    @torch.no_grad()
    def restore(self, policy: Policy, batch: Batch, *, seed: int) -> Tensor:
        """The restorations `[B, 3, H, W]` of some inputs on the CPU, by the sampler that the policy ships with."""
        device, restored = next(policy.model.parameters()).device, []
        with evaluating(policy):
            for start in range(0, len(batch), self.inputs_at_once):
                part = batch.select(slice(start, start + self.inputs_at_once)).to(device)
                noise = Noise(part.ids, seed=seed, device=device)
                condition = check_condition(
                    policy.condition(part, noise.of(0)), len(part), caller=type(policy).__name__
                )
                sample = rollout(policy, condition, noise, num_steps=self.num_steps, eta=self.eta).sample
                restored.append(images_of(policy, sample, condition).cpu())
        return torch.cat(restored)

    def __call__(
        self,
        policy: Policy,
        rewards: Mapping[str, Callable[..., Tensor]],
        weights: Sequence[float],
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> dict[str, Any]:
        """Restore and score every input; with several processes each does its share and all get the whole.

        Args:
            policy: The model.
            rewards: The training rewards, measured beside the others; of a `RankInGroup` the reward inside.
            weights: Their weights in the sum, "reward".
            seed: Seed of the first noise.
            rank: Number of this process.
            world: Number of processes.

        Returns:
            `{"images": list of [3, H, W], "scores": {name: [V]}, "alarms": (sentences), "best": bool}`, all in the
            order of the inputs' ids; "best" says whether `stop_on` is better than ever before. `grid` draws it.
        """
        device = next(policy.model.parameters()).device
        places: list[int] = []
        images: list[Tensor] = []
        rows: list[Tensor] = []
        for batch in self.batches:
            bounds = [len(batch) * each // world for each in range(world + 1)]
            own = batch.select(slice(bounds[rank], bounds[rank + 1]))
            restored = self.restore(policy, own, seed=seed) if len(own) else _nothing_of(batch)
            scores = self._scores(rewards, weights, restored, own) if len(own) else torch.zeros(0, self._width(rewards))
            if world > 1:
                restored = _gathered(restored, bounds, self.inputs_at_once, device)
                (table,), _ = gather_rows(scores.to(device))
                scores = table.cpu()
            places += batch.ids
            images += restored.unbind()
            rows.append(scores)
        order = sorted(range(len(places)), key=places.__getitem__)
        images, table = [images[place] for place in order], torch.cat(rows)[order]
        names = ["reward", *([] if len(rewards) == 1 else [f"reward/{name}" for name in rewards]), *self.rewards]
        found = dict(zip(names, table.unbind(1), strict=True))
        alarms = [f"{name} scored no held-out image" for name, values in found.items() if values.isnan().all()]
        if self.monitor is not None and not found["reward"].isnan().all():
            whole, references = torch.stack(images), self.batches[0].references
            assert references is not None, "checked when it was built"
            if self.monitor.calibrated:
                alarms += self.monitor.update(whole, references, found["reward"]).alarms
            else:
                self.monitor.calibrate(whole, references, found["reward"])
        best = self.stop_on is not None and self._compare(finite_mean(found[self.stop_on]))
        if self.first is None:
            self.first = self._first_grid(images, found["reward"], rewards, weights)
        return {"images": images, "scores": found, "alarms": tuple(alarms), "best": best}

    def _width(self, rewards: Mapping[str, Any]) -> int:
        return 1 + (len(rewards) if len(rewards) > 1 else 0) + len(self.rewards)

    def _scores(
        self, rewards: Mapping[str, Callable[..., Tensor]], weights: Sequence[float], images: Tensor, batch: Batch
    ) -> Tensor:
        """`[B, columns]` on the CPU: the training reward, its parts if there are several, and the held-out rewards."""
        total, parts = _training_reward(rewards, weights, images, batch)
        held_out = [scored(reward, images, batch)().cpu() for reward in self.rewards.values()]
        return torch.stack([total, *(parts if len(parts) > 1 else []), *held_out], 1)

    def _shown(self) -> list[Batch]:
        """The first inputs, one by one."""
        single = [part.select(slice(row, row + 1)) for part in self.batches for row in range(len(part))]
        return sorted(single, key=lambda each: each.ids)[:COLUMNS]

    def _first_grid(
        self, images: list[Tensor], scores: Tensor, rewards: Mapping[str, Any], weights: Sequence[float]
    ) -> dict[str, Any]:
        """What all later grids show as well, in 8 bits because every checkpoint has it."""
        found: dict[str, list[float]] = {"degraded": [], "references": []}
        for batch, image in zip(self._shown(), images):
            enlarged = in_size_of(batch.degraded, image)
            found["degraded"].append(float(_training_reward(rewards, weights, enlarged, batch)[0]))
            if batch.references is not None:
                found["references"].append(float(_training_reward(rewards, weights, batch.references, batch)[0]))
        shown = [_in_8_bits(image) for image in images[:COLUMNS]]
        return found | {"images": shown, "rewards": scores[:COLUMNS].tolist()}

    def grid(self, images: Sequence[Tensor], rewards: Tensor, *, update: int) -> Image.Image:
        """The first eight inputs as an RGB image: degraded, restored at first and now, and the ground truth."""
        if self.first is None:
            raise ValueError("Validation.grid expected an earlier validation, got none. Call the validation first.")
        inputs, images = self._shown(), list(images[:COLUMNS])
        rows: dict[str, list[Tensor]] = {"degraded": [batch.degraded[0] for batch in inputs]}
        found: dict[str, list[float]] = {"degraded": self.first["degraded"]}
        if any(not torch.equal(_in_8_bits(now), at_first) for now, at_first in zip(images, self.first["images"])):
            before = "restored\nat the start"
            rows[before] = [image.float() / 255 for image in self.first["images"]]
            found[before] = self.first["rewards"]
        now = f"restored\nupdate {update}"
        rows[now], found[now] = images, rewards[:COLUMNS].tolist()
        captions: dict[str, list[str]] = {}
        for label, shown in rows.items():
            captions[label] = []
            for image, score, batch, last in zip(shown, found[label], inputs, images, strict=True):
                text = f"reward {score:z.4g}"
                if batch.references is not None:
                    decibels = psnr(in_size_of(image[None], last), batch.references)
                    text = f"PSNR {float(decibels):.2f} dB   {text}"
                captions[label].append(text)
        if all(batch.references is not None for batch in inputs):
            rows["ground truth"] = [batch.references[0] for batch in inputs if batch.references is not None]
            captions["ground truth"] = [f"reward {score:z.4g}" for score in self.first["references"]]
        return image_grid(rows, captions, columns=COLUMNS)

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


def _training_reward(
    rewards: Mapping[str, Callable[..., Tensor]], weights: Sequence[float], images: Tensor, batch: Batch
) -> tuple[Tensor, list[Tensor]]:
    """The weighted sum `[B]` of the rewards, and each of them, on the CPU."""
    parts = [scored_alone(reward, images, batch).cpu() for reward in rewards.values()]
    total = sum((weight * part for weight, part in zip(weights, parts, strict=True)), torch.zeros_like(parts[0]))
    return total, parts


def image_grid(
    rows: Mapping[str, Sequence[Tensor] | Tensor],
    captions: Mapping[str, Sequence[str]] | None = None,
    *,
    columns: int = 8,
) -> Image.Image:
    """Images side by side, one line per entry of `rows`, with its name in front and a caption under each image.

    The images of a column are drawn in one size, that of the largest: smaller ones are enlarged without smoothing, and
    so are all if the longer side is below 256 pixels; above 512 they are reduced to that.
    """
    captions = captions or {}
    shown = {label: list(images[:columns]) for label, images in rows.items()}
    sizes = [
        _size_on_grid([images[place] for images in shown.values()]) for place in range(max(map(len, shown.values())))
    ]
    drawn = {
        label: [_drawn(image, size) for image, size in zip(images, sizes, strict=False)]
        for label, images in shown.items()
    }
    width, height = max(size[0] for size in sizes), max(size[1] for size in sizes)
    font, small = ImageFont.load_default(size=20), ImageFont.load_default(size=16)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = GAP + math.ceil(max(ruler.multiline_textbbox((0, 0), label, font=font)[2] for label in rows)) + GAP
    texts = [text for row in captions.values() for text in row[:columns]]
    wide = [math.ceil(ruler.multiline_textbbox((0, 0), text, font=small)[2]) for text in texts]
    cell = GAP + max([width, *wide])
    below = CAPTION + LINE * max((text.count("\n") for text in texts), default=0) if texts else 0
    line = GAP + height + below
    size = left + cell * max(map(len, drawn.values())), line * len(drawn) + GAP
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    for row, (label, images) in enumerate(drawn.items()):
        top = GAP + row * line
        pen.multiline_text((GAP, top + height / 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            grid.paste(image, (left + column * cell, top))
        for column, text in enumerate(captions.get(label, ())[:columns]):
            middle = (left + column * cell, top + height + below / 2)
            pen.multiline_text(middle, text, fill="black", font=small, anchor="lm")
    return grid


def _in_8_bits(images: Tensor) -> Tensor:
    return images.float().nan_to_num(0.0).clamp(0, 1).mul(255).round().byte()


def in_size_of(images: Tensor, like: Tensor) -> Tensor:
    """Images `[B, 3, h, w]` enlarged to the size of `like` `[3, H, W]`, as a user without a model would."""
    if images.shape[-2:] == like.shape[-2:]:
        return images
    return nn.functional.interpolate(images, size=like.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)


def _size_on_grid(images: Sequence[Tensor]) -> tuple[int, int]:
    """(width, height) in which a column is drawn."""
    height, width = max((tuple(image.shape[-2:]) for image in images), key=max)
    longer = max(height, width)
    factor = math.ceil(MIN_SIDE / longer) if longer < MIN_SIDE else min(1.0, MAX_SIDE / longer)
    return max(round(width * factor), 1), max(round(height * factor), 1)


def _drawn(image: Tensor, size: tuple[int, int]) -> Image.Image:
    """An image `[3, H, W]` in a size to look at."""
    drawn = Image.fromarray(_in_8_bits(image).permute(1, 2, 0).contiguous().numpy())
    larger = size[0] > drawn.width
    return drawn.resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)


def _nothing_of(batch: Batch) -> Tensor:
    like = batch.degraded if batch.references is None else batch.references
    return like[:0]


def _gathered(images: Tensor, bounds: Sequence[int], at_once: int, device: torch.device) -> Tensor:
    """The images of all processes on the CPU, in order, with a few of each on the device at a time."""
    shares = [stop - start for start, stop in itertools.pairwise(bounds)]
    blocks: list[tuple[Tensor, ...]] = []
    for start in range(0, max(shares), at_once):
        (rows,), _ = gather_rows(images[start : start + at_once].to(device))
        blocks.append(rows.cpu().split([min(max(share - start, 0), at_once) for share in shares]))
    return torch.cat([block for of_process in zip(*blocks, strict=True) for block in of_process])


def save_grid(grid: Image.Image, path: Path, trackers: Sequence[Any], *, step: int) -> None:
    """Write a grid as a PNG, and give it to those trackers of accelerate that take images, as "samples"."""
    with atomic_write(path) as file:
        grid.save(file, format="PNG")
    log_grid(grid, trackers, step=step)


def log_grid(grid: Image.Image, trackers: Sequence[Any], *, step: int) -> None:
    """Give a grid to those trackers of accelerate that take images, as "samples"."""
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
        encode: Latents of images, e.g. `policy.autoencoder.encode`.
        decode: Images of latents, e.g. `policy.autoencoder.decode`.
        images: `[B, 3, H, W]` ground truth in [0, 1].
        reward: Scores each image; called with `references=images`.
        tile: Side of a tile in pixels, for tiled decoding; None = unknown.

    Returns:
        A named tuple of three `[B]` tensors: `scores` after the autoencoder, `reference_scores` of the images
        themselves, and `seams`, the `iqareward.functional.statistics.seam_strength` of the decoded images.

    Example:
        >>> import iqareward
        >>> photos = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> report = decoder_ceiling(lambda x: x, lambda x: 0.5 * x, photos, iqareward.load("ssim"))
        >>> bool((report.scores < report.reference_scores).all())
        True
    """
    decoded = decode(encode(images)).float().clamp(0, 1)
    scores, reference_scores = reward(decoded, references=images), reward(images, references=images)
    return CeilingReport(scores, reference_scores, seam_strength(decoded, period=tile))
