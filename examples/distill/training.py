"""Train the network of `QuickReward` to order images as the teacher's scores do."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iqareward.atomic import atomic_write
from iqareward.image_files import read_image
from iqareward.rewards.quick import QuickNetwork
from iqareward.weight_files import WeightFile

_MEAN, _STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's
_SAVE_EVERY = 100  # updates
_STEEPNESS = 8.0  # of the teacher's preference for one of two images, by the difference of their targets
_ADDED_NOISE = (1.0, 12.0)  # of 255, of noisy copies
_MARGIN, _LARGEST_MARGIN = 0.1, 0.3  # of ratings, by which 1/255 of noise must lower one, and noise of any level
_KNOWN_WEIGHT = 2.0  # of that rule beside what the teacher says


@dataclass(frozen=True)
class Settings:
    """How long and on what; an update takes a second or two on one core."""

    steps: int = 1500
    groups: int = 8  # in an update
    members: int = 6  # of each group
    noisy: int = 2  # of those, shown once more with noise
    crop: int = 224  # longest side of what is cut from an image
    learning_rate: float = 5e-4
    seed: int = 0


@dataclass(frozen=True)
class Group:
    """The images that belong to one input, with the teacher's scores `[n]`, NaN = none."""

    name: str
    files: Sequence[Path]
    scores: np.ndarray


def quantiles(scores: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The share of the scores `among` that are lower, where equal ones count half: the targets of the network."""
    ordered = np.sort(among)
    return (np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")) / (2 * len(ordered))


def start(backbone: Path | None, seed: int) -> QuickNetwork:
    """The network before its training, with the first blocks of torchvision's MobileNetV2 if a file of it is given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the layers' own initialisation takes no generator
        network = QuickNetwork()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
    nn.init.zeros_(network.rater.weight)
    if backbone is not None:
        found = _folded(WeightFile(backbone), network)
        network.load_state_dict(found, strict=False)
    return network


def train(
    network: nn.Module,
    groups: Sequence[Group],
    targets: Mapping[str, np.ndarray],
    settings: Settings,
    *,
    device: torch.device,
    checkpoint: Path,
    progress: Callable[[Iterator[int], int], Iterator[int]],
) -> list[float]:
    """Train on groups whose targets `[n]` are given by name; goes on from the checkpoint of the same settings.

    Returns:
        The loss of every update since the start or the checkpoint.
    """
    network.to(device).train()
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1, cycle_momentum=False
    )
    done = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["settings"] != asdict(settings):
            raise ValueError(f"{checkpoint} is of a run with {state['settings']}. Delete it or go on with those.")
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done = state["step"]
    losses: list[float] = []
    with ThreadPoolExecutor(1) as reader:  # the next images are decoded while the network works
        pending = reader.submit(_batch, groups, targets, settings, done)
        for step in progress(iter(range(done, settings.steps)), settings.steps - done):
            images, wanted, numbers, copies = pending.result()
            pending = reader.submit(_batch, groups, targets, settings, step + 1)
            ratings = _ratings(network, images, device)
            loss = _loss(ratings[: len(wanted)], wanted.to(device), numbers.to(device))
            if copies:
                loss = loss + _KNOWN_WEIGHT * _known(ratings, len(wanted), copies)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if (step + 1) % _SAVE_EVERY == 0:
                state: dict[str, Any] = {
                    "settings": asdict(settings), "step": step + 1, "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                }  # fmt: skip
                with atomic_write(checkpoint) as file:
                    torch.save(state, file)
    return losses


def _ratings(network: nn.Module, images: Sequence[Tensor], device: torch.device) -> Tensor:
    """`[B]`, one run of the network per size."""
    sizes = {image.shape: None for image in images}
    rows: dict[int, Tensor] = {}
    for size in sizes:
        places = [place for place, image in enumerate(images) if image.shape == size]
        batch = torch.stack([images[place] for place in places]).to(device, memory_format=torch.channels_last)
        rows |= dict(zip(places, network(batch.float() / 255), strict=True))
    return torch.stack([rows[place] for place in range(len(images))])


def _loss(ratings: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
    """Each image by itself, and the pairs of a group, which count by how far the teacher tells them apart."""
    alone = F.binary_cross_entropy_with_logits(ratings, targets)
    gaps = targets[:, None] - targets
    weights = gaps.abs() * (groups[:, None] == groups)
    preferred = torch.sigmoid(_STEEPNESS * gaps)
    pairs = F.binary_cross_entropy_with_logits(ratings[:, None] - ratings, preferred, reduction="none")
    return alone + (weights * pairs).sum() / weights.sum().clamp(min=1e-6)


def _known(ratings: Tensor, begin: int, copies: Sequence[tuple[int, float]]) -> Tensor:
    """Noisy copies, which follow from `begin` on, must be rated below their originals, whatever the teacher says.

    Noise that knows nothing of an image brings it no nearer to the truth, but most metrics take noise on a blurred
    image for detail.
    """
    originals = ratings[[place for place, _ in copies]]
    margins = ratings.new_tensor([min(_MARGIN * level, _LARGEST_MARGIN) for _, level in copies])
    return F.relu(ratings[begin:] - originals + margins).mean()


def _batch(
    groups: Sequence[Group], targets: Mapping[str, np.ndarray], settings: Settings, step: int
) -> tuple[list[Tensor], Tensor, Tensor, list[tuple[int, float]]]:
    """One update, which follows from its number.

    Returns:
        Images `[3, H, W]` uint8, targets and numbers of groups of all but the last, which are noisy copies, and of each
        of these the place of its original and the level of the noise.
    """
    draws = np.random.default_rng([settings.seed, step])
    images: list[Tensor] = []
    wanted: list[float] = []
    numbers: list[int] = []
    originals: list[int] = []
    # groups of one image come in larger numbers
    while len(images) < settings.groups * settings.members:
        number = int(draws.integers(len(groups)))
        group, scores = groups[number], targets[groups[number].name]
        view = draws.random(4)  # the same crop and flips for the whole group
        originals.extend(range(len(images), len(images) + min(settings.noisy, len(group.files), settings.members)))
        for place in draws.permutation(len(group.files))[: settings.members]:
            images.append(_view(group.files[place], settings.crop, view))
            wanted.append(float(scores[place]))
            numbers.append(number)
    levels = np.exp(draws.uniform(*np.log(_ADDED_NOISE), len(originals)))
    images.extend(_noisy(images[place], level, draws) for place, level in zip(originals, levels, strict=True))
    copies = list(zip(originals, levels.tolist(), strict=True))
    return images, torch.tensor(wanted), torch.tensor(numbers), copies


def _noisy(image: Tensor, level: float, draws: np.random.Generator) -> Tensor:
    """An image `[3, H, W]` uint8 with Gaussian noise of `level` / 255, of luma alone in a third of the calls."""
    shape = (1 if draws.random() < 1 / 3 else 3, *image.shape[1:])
    pattern = torch.from_numpy(draws.standard_normal(shape, dtype=np.float32))
    return (image + level * pattern).round().clamp(0, 255).byte()


def _view(file: Path, side: int, draws: np.ndarray) -> Tensor:
    pixels = read_image(file)
    if pixels.dtype != np.uint8:
        pixels = (pixels // 257).astype(np.uint8)
    pixels = pixels[..., :3] if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    for axis in range(2):
        begin = int(draws[axis] * (max(0, pixels.shape[axis] - side) + 1))
        pixels = pixels.take(range(begin, min(begin + side, pixels.shape[axis])), axis)
        if draws[2 + axis] < 0.5:
            pixels = np.flip(pixels, axis)
    return torch.from_numpy(pixels.copy()).movedim(-1, 0)


def _folded(file: WeightFile, network: QuickNetwork) -> dict[str, Tensor]:
    """Torchvision's weights under our names, with batch normalisation and ImageNet's pixel scale folded in."""
    pairs = [("stem", "0.0", "0.1")]
    block = 0
    for stage in range(len(network.stages)):
        for place in range(len(network.stages[stage])):
            block += 1
            name, there = f"stages.{stage}.{place}", f"{block}.conv"
            layers = ["filter", "narrow"] if block == 1 else ["widen", "filter", "narrow"]
            for k, layer in enumerate(layers):
                last = layer == "narrow"
                conv, norm = (f"{there}.{k}", f"{there}.{k + 1}") if last else (f"{there}.{k}.0", f"{there}.{k}.1")
                pairs.append((f"{name}.{layer}", conv, norm))
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    found: dict[str, Tensor] = {}
    for ours, conv, norm in pairs:
        width = shapes[f"{ours}.bias"]
        facts = {f"features.{norm}.{fact}": width for fact in ("weight", "bias", "running_mean", "running_var")}
        taken = file.take({f"features.{conv}.weight": shapes[f"{ours}.weight"], **facts})
        weight, gain, shift, mean, variance = taken.values()
        scale = gain / (variance + 1e-5).sqrt()
        found[f"{ours}.weight"], found[f"{ours}.bias"] = weight * scale.view(-1, 1, 1, 1), shift - mean * scale
    # the network sees 4 x - 2, MobileNetV2 was trained on (x - mean) / std
    weight = found["stem.weight"]
    found["stem.bias"] = found["stem.bias"] + (weight * ((0.5 - _MEAN) / _STD).view(1, 3, 1, 1)).sum((1, 2, 3))
    found["stem.weight"] = weight / (4 * _STD).view(1, 3, 1, 1)
    return found
