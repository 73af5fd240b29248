"""Compare no-reference rewards with full-reference ones on restored images, and try to fool and to hack them.

    python -m examples.distill.experiment --weights judge.safetensors --pictures test --photos kodak24 --output out.json

`test` is what `examples.distill.pictures --test` made of photographs that no network was trained on. Scores are
kept beside OUTPUT, and those that are there are not computed again.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

import iqareward
from iqareward.agreement import agreement
from iqareward.atomic import write_text
from iqareward.image_files import find_images, read_image
from iqareward.rewards import QuickReward
from iqareward.types import Reward

from .pictures import gaussian, noisy, sharpened
from .report import kind_and_level

_BATCH = 8
Load = Callable[..., Reward]
_UNSEEN = ("clean", "lanczos", "wiener", "richardson_lucy", "taef1")  # made by nothing that training images show


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m examples.distill.experiment", description=__doc__, formatter_class=style
    )
    parser.add_argument("--pictures", type=Path, required=True, help="folder that examples.distill.pictures made")
    parser.add_argument("--photos", type=Path, required=True, help="folder of clean photographs")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--rewards", nargs="+", default=["niqe", "piqe", "brisque"])
    parser.add_argument("--targets", nargs="+", default=["haarpsi", "mdsi", "gmsd", "vsi", "ssim", "stlpips"])
    parser.add_argument("--weights", type=Path, required=True, help="file of examples.distill, compared as `quick`")
    parser.add_argument("--steps", type=int, default=50, help="of gradient ascent")
    options = parser.parse_args()
    rewards, load = ["quick", *options.rewards], partial(_load, options.weights)
    results: dict[str, Any] = {"rewards": rewards, "targets": options.targets}
    scores = options.output.with_suffix(".scores.json")
    results["agreement"] = agree(options.pictures, rewards, options.targets, scores, load)
    results["fooled"] = fooled(options.photos, rewards, load)
    results["hacked"] = hacked(options.pictures, "quick", options.targets, options.steps, load)
    write_text(options.output, json.dumps(results, indent=1))
    for name, part in results.items():
        Console().print(name, part)


def agree(pictures: Path, rewards: Sequence[str], targets: Sequence[str], kept: Path, load: Load) -> dict[str, Any]:
    """Pair accuracy within inputs and Spearman of every reward with every target, with intervals over inputs."""
    files = find_images([pictures / "images"]).files
    names = [relative.parent.name for relative in files.values()]
    scores = _scored(list(files), names, pictures / "references", [*rewards, *targets], kept, load)
    found: dict[str, Any] = {"images": len(files), "inputs": len(set(names))}
    kinds = [kind_and_level(file.stem)[0] for file in files]
    unseen = np.isin(kinds, _UNSEEN)
    for target in targets:
        compared = agreement({name: scores[name] for name in rewards}, scores[target], names, baseline=rewards[0])
        found[target] = {
            metric.name: {
                "pairs": metric.pair_accuracy, "spearman": metric.spearman,
                "pairs less those of " + rewards[0]: metric.differences.get("pair_accuracy"),
            }
            for metric in compared.metrics
        }  # fmt: skip
        some = {name: scores[name][unseen] for name in rewards}
        for metric in agreement(some, scores[target][unseen], np.array(names)[unseen].tolist()).metrics:
            found[target][metric.name]["pairs of unseen kinds"] = metric.pair_accuracy
    # of each kind the share of images whose score is below that of the clean image
    found["below clean"] = {name: _below_clean(scores[name], names, kinds) for name in [*rewards, *targets]}
    return found


def fooled(photos: Path, rewards: Sequence[str], load: Load) -> dict[str, Any]:
    """The number of photographs whose score falls by light noise, also after a blur, and by sharpening."""
    changes: dict[tuple[float, str], Callable[[Tensor, np.random.Generator], Tensor]] = {
        **{(blur, f"noise {level}/255"): partial(_noise, level) for blur in (0, 1, 2, 4) for level in (2, 3, 6)},
        **{(0, f"unsharp mask {amount}"): partial(_unsharp, amount) for amount in (1, 2, 4)},
    }
    judges = {name: load(name) for name in rewards}
    names = {change: f"{change[1]} after a blur of {change[0]}" if change[0] else change[1] for change in changes}
    falls: dict[str, dict[str, list[bool]]] = {name: {judge: [] for judge in judges} for name in names.values()}
    files = list(find_images([photos]).files)
    for number, file in enumerate(track(files, "fooling", console=Console(stderr=True))):
        clean = _image(file)
        starts = {blur: gaussian(clean, blur) if blur else clean for blur in {change[0] for change in changes}}
        before = {
            blur: {name: _score(judge, image) for name, judge in judges.items()} for blur, image in starts.items()
        }
        for change, make in changes.items():
            image = make(starts[change[0]], np.random.default_rng(number))
            for name, judge in judges.items():
                falls[names[change]][name].append(_score(judge, image) < before[change[0]][name])
    return {
        change: {name: f"{sum(rows)} of {len(rows)}" for name, rows in by_name.items()}
        for change, by_name in falls.items()
    }


def _score(judge: Reward, image: Tensor) -> float:
    """Of the image as a file of eight bits has it."""
    return judge((image[None].clamp(0, 1) * 255).round() / 255).item()


def hacked(
    pictures: Path, name: str, targets: Sequence[str], steps: int, load: Load, *, rate: float = 1 / 255
) -> dict[str, Any]:
    """Scores before and after gradient ascent on pixels (Adam) from degraded images, by this reward alone."""
    reward = load(name, differentiable=True)
    starts = [file for file in find_images([pictures / "images"]).files if file.stem.startswith("blind-")]
    starts = starts[1 :: max(1, len(starts) // 8)][:8]  # spread over inputs and severities
    images = torch.stack([_image(file) for file in starts])
    references = torch.stack([_image(pictures / "references" / f"{file.parent.name}.png") for file in starts])
    pixels = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([pixels], rate)
    history: list[dict[str, float]] = []
    judges = {each: load(each) for each in targets}
    for step in track(range(steps + 1), "hacking", console=Console(stderr=True)):
        if step % 10 == 0:
            with torch.no_grad():
                scores = {each: judge(pixels.clamp(0, 1), references=references) for each, judge in judges.items()}
                scores[name] = reward(pixels.clamp(0, 1)).detach()
            history.append({"step": step} | {each: value.mean().item() for each, value in scores.items()})
        optimizer.zero_grad()
        (-reward(pixels.clamp(0, 1)).sum()).backward()
        optimizer.step()
        pixels.data.clamp_(0, 1)
    return {"images": [str(file.relative_to(pictures)) for file in starts], "mean scores": history}


def _load(weights: Path, name: str, **options: Any) -> Reward:
    return QuickReward(weights, **options) if name == "quick" else iqareward.load(name, **options)


def _scored(
    files: Sequence[Path], names: Sequence[str], references: Path, rewards: Sequence[str], kept: Path, load: Load
) -> dict[str, np.ndarray]:
    found: dict[str, list[float]] = json.loads(kept.read_text()) if kept.is_file() else {}
    judges = {name: load(name) for name in rewards if len(found.get(name, [])) != len(files)}
    rows: dict[str, list[Tensor]] = {name: [] for name in judges}
    for begin in track(range(0, len(files) if judges else 0, _BATCH), "scoring", console=Console(stderr=True)):
        images = [_image(file) for file in files[begin : begin + _BATCH]]
        others = [_image(references / f"{name}.png") for name in names[begin : begin + _BATCH]]
        for name, judge in judges.items():
            rows[name].append(judge(images, references=others if judge.needs_references else None))
    found |= {name: torch.cat(parts).tolist() for name, parts in rows.items()}
    write_text(kept, json.dumps(found))
    return {name: np.array(found[name]) for name in rewards}


def _below_clean(scores: np.ndarray, names: Sequence[str], kinds: Sequence[str]) -> dict[str, float]:
    clean = {name: scores[place] for place, name in enumerate(names) if kinds[place] == "clean"}
    found: dict[str, list[float]] = {}
    for name, kind, score in zip(names, kinds, scores, strict=True):
        if kind != "clean":
            found.setdefault(kind, []).append(float(score < clean[name]))
    return {kind: round(float(np.mean(rows)), 2) for kind, rows in sorted(found.items())}


def _image(file: Path) -> Tensor:
    return iqareward.to_images(read_image(file), value_range=(0, 1))[0]


def _noise(sigma: float, image: Tensor, draws: np.random.Generator) -> Tensor:
    return noisy(image, sigma, draws)


def _unsharp(amount: float, image: Tensor, draws: np.random.Generator) -> Tensor:
    return sharpened(image, amount, draws)


if __name__ == "__main__":
    main()
