"""Fit the maps to [0, 1] that ship with the package, and compare kinds of map on photographs outside the fit.

    python -m benchmarks.fit_calibration --photos DIR --held-out DIR                        # tables only
    python -m benchmarks.fit_calibration --photos DIR --held-out DIR --qualisr DIR --write  # also replace the file
    python -m benchmarks.fit_calibration --photos DIR --only NAME --write                   # replace one reward's map

Every photograph is reduced to a short side of 512 pixels and gives seeded crops of 256x256. Each crop is scored in the
`VERSIONS` below: degraded from hardly to severely, and restored by means that occur in practice. Rewards that need no
reference also score the undamaged crop. The 10th and 90th percentile of these scores become 0.1 and 0.9 of a
`LogisticMap`: calibrated rewards spread alike over the same images, and for four images in five the map is at least a
third as steep as where it is steepest.

Needs scikit-image for the denoiser. `lpips_vgg` and `stlpips_vgg`, whose weights are fetched from a network, are fitted
to the scores of 120 super-resolved images that QualiSR publishes (github.com/msu-video-group/QualiSR-Lab, BSD-3).
"""

import argparse
import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import skimage.restoration
import torch
from torch import Tensor

import iqareward
from benchmarks._harness import document, finish
from iqareward.atomic import write_text
from iqareward.diffusion.blind import RealESRGANDegradation
from iqareward.diffusion.degradations import add_noise, jpeg
from iqareward.functional.resize import pillow_resize
from iqareward.image_files import read_image
from iqareward.rewards.calibrations import FILE
from iqareward.rewards.catalog import CATALOG, Entry
from iqareward.rewards.combine import AffineMap, CDFMap, LogisticMap, ScoreMap
from iqareward.types import Bounds, Reward

SIDE, SHORT_SIDE, SEED = 256, 512, 0
# What a policy is given, what it returns at the start, and what it returns in the end.
VERSIONS = {
    "Real-ESRGAN second order, same size, severity": (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9),
    "Real-ESRGAN second order x4 + bicubic enlargement, severity": (0.0, 0.2, 0.4),
    "bicubic reduction and enlargement, factor": (2, 4),
    "Gaussian noise + non-local means, sigma/255": (10, 25, 50),
    "JPEG, quality": (90, 70, 50, 30, 10),
}
# Columns of QualiSR's fr.csv, which are distances.
PUBLISHED = {"lpips_vgg": "lpips-vgg_gt", "stlpips_vgg": "stlpips-vgg_gt"}
NO_WEIGHTS = "its weights could not be had where the others were fitted, and its authors print no spread of its scores"
SHARES = (0.1, 0.9)


def photos(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))


def crops(folder: Path, per_photo: int) -> Tensor:
    """`[N, 3, 256, 256]`: seeded crops of each photograph, in multiples of 1/255."""
    generator, found = torch.Generator().manual_seed(SEED), list[Tensor]()
    for path in photos(folder):
        pixels = iqareward.to_images(read_image(path)[None])
        height, width = pixels.shape[2:]
        by = min(1.0, SHORT_SIDE / min(height, width))
        pixels = pillow_resize(pixels, (round(height * by), round(width * by)))
        for _ in range(per_photo):
            top, left = (int(torch.randint(side - SIDE + 1, (), generator=generator)) for side in pixels.shape[2:])
            found.append(pixels[0, :, top : top + SIDE, left : left + SIDE])
    return torch.stack(found)


def versions(images: Tensor) -> dict[str, Tensor]:
    """Name -> each image in one of the `VERSIONS`."""
    ids = range(len(images))
    same, smaller, plain, noise, quality = VERSIONS.items()

    def severity(level: float) -> Tensor:
        return torch.full((len(images),), level)

    def enlarged(small: Tensor) -> Tensor:
        return pillow_resize(small, (SIDE, SIDE))

    made = {
        f"{same[0]} {level:g}": RealESRGANDegradation(scale=1)(images, severity(level), ids, seed=SEED)
        for level in same[1]
    }
    for level in smaller[1]:
        made[f"{smaller[0]} {level:g}"] = enlarged(
            RealESRGANDegradation(scale=4)(images, severity(level), ids, seed=SEED)
        )
    for factor in plain[1]:
        made[f"{plain[0]} {factor}"] = enlarged(pillow_resize(images, (SIDE // factor, SIDE // factor)))
    for sigma in noise[1]:
        noisy = add_noise(images, severity(sigma), list(ids), seed=SEED).clamp(0, 1)
        made[f"{noise[0]} {sigma}"] = torch.stack([denoised(image, sigma / 255) for image in noisy])
    for level in quality[1]:
        made[f"{quality[0]} {level}"] = jpeg(images, severity(level))
    return made


def denoised(image: Tensor, sigma: float) -> Tensor:
    pixels = image.permute(1, 2, 0).numpy()
    clean = skimage.restoration.denoise_nl_means(
        pixels, patch_size=5, patch_distance=6, h=0.8 * sigma, sigma=sigma, fast_mode=True, channel_axis=2
    )
    return torch.from_numpy(np.ascontiguousarray(clean, dtype=np.float32)).permute(2, 0, 1).clamp(0, 1)


def score(reward: Reward, images: Tensor, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Version -> `[N]` scores; the undamaged images are one more version for rewards without a reference."""
    if reward.needs_references:
        return {version: reward(rows, references=images) for version, rows in made.items()}
    return {"undamaged": reward(images)} | {version: reward(rows) for version, rows in made.items()}


def published_scores(folder: Path, column: str) -> Tensor:
    with (folder / "fr.csv").open() as file:
        return torch.tensor([-float(row[column]) for row in csv.DictReader(file)])


def logistic(scores: Tensor) -> LogisticMap:
    """The map that ships: the 10th and 90th percentile become 0.1 and 0.9."""
    scores = scores[scores.isfinite()].double()
    low, high = scores.quantile(torch.tensor(SHARES, dtype=torch.float64)).tolist()
    return LogisticMap(round((low + high) / 2, 6), round((high - low) / (2 * math.log(9)), 6))  # logit(0.9) = ln 9


MAPS: dict[str, Callable[[Tensor], ScoreMap]] = {
    "logistic, deciles (ships)": logistic,
    "LogisticMap.fit, quartiles": LogisticMap.fit,
    "AffineMap.fit": AffineMap.fit,
    "CDFMap.fit": CDFMap.fit,
}


def compare(name: str, fitted: Tensor, held_out: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """For each kind of map, what it does to the held-out images.

    `flat` is the share of images where the slope is exactly 0, `weak` where it is less than a tenth of the mean slope
    of the images, and `best` is the mean slope of the best twentieth of them, relative to that mean too.
    """
    rows, scores = list[dict[str, Any]](), torch.cat(list(held_out.values()))
    scores = scores[scores.isfinite()].double()
    best = scores >= scores.quantile(0.95)
    for kind, fit in MAPS.items():
        at = scores.clone().requires_grad_()
        (slope,) = torch.autograd.grad(fit(fitted)(at).sum(), at)
        slope = slope / slope.mean()
        share = {"flat": slope == 0, "weak": slope < 0.1}
        row = {key: float(found.double().mean()) for key, found in share.items()}
        rows.append({"reward": name, "map": kind, **row, "best": float(slope[best].mean())})
    return rows


def held_out_levels(score_map: ScoreMap, held_out: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean calibrated score of each version."""
    return {version: round(float(score_map(scores).nanmean()), 3) for version, scores in held_out.items()}


def write(maps: Mapping[str, LogisticMap], runs: Sequence[Mapping[str, Any]], *, add: bool) -> None:
    """Replace the file in the package, or the maps of `maps` in it, with how each was made."""
    old: dict[str, Any] = json.loads(FILE.read_text())
    if not add:
        old |= {"maps": {}, "runs": []}
    fields = old["maps"] | {name: {"map": "logistic", **asdict(each)} for name, each in maps.items()}
    for run in old["runs"]:
        run["rewards"] = [name for name in run["rewards"] if name not in maps]
    bare = [name for name, entry in CATALOG.items() if name not in fields and leaves_unit(entry.bounds)]
    none = {name: old["none"].get(name, NO_WEIGHTS) for name in bare}
    kept = [run for run in [*old["runs"], *runs] if run["rewards"]]
    write_text(FILE, json.dumps({"maps": fields, "none": none, "runs": kept}, indent=1) + "\n")


def is_here(entry: Entry) -> bool:
    """Whether it has no weights, or such as this package brings."""
    return entry.weights in ("", "package:iqareward")


def leaves_unit(bounds: Bounds) -> bool:
    return None in bounds or not -1 <= bounds[0] < bounds[1] <= 1  # pyright: ignore[reportOperatorIssue]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs to fit to")
    parser.add_argument("--held-out", type=Path, help="folder of photographs that take no part in the fit")
    parser.add_argument("--qualisr", type=Path, help="folder with fr.csv of QualiSR")
    parser.add_argument("--crops", type=int, default=2, help="of each photograph")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="specs of rewards, in place of the formulas")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    options = parser.parse_args()
    specs: list[str] = options.only or [
        *(name for name, entry in CATALOG.items() if is_here(entry) and (not entry.extra or leaves_unit(entry.bounds))),
        "psnr(color=y)",
    ]
    images = crops(options.photos, options.crops)
    made = versions(images)
    others = crops(options.held_out, 1) if options.held_out else images[:0]
    made_of_others = versions(others) if options.held_out else {}
    maps, rows = dict[str, LogisticMap](), list[dict[str, Any]]()
    num_images = len(images) * (1 + sum(map(len, VERSIONS.values())))
    for spec in specs:
        reward = iqareward.load(spec)
        fitted = torch.cat(list(score(reward, images, made).values()))
        maps[reward.name] = logistic(fitted)
        print(reward.name, maps[reward.name], f"{int(fitted.isfinite().sum())} scores", flush=True)
        if options.held_out:
            scores = score(reward, others, made_of_others)
            rows += compare(reward.name, fitted[fitted.isfinite()], scores)
            rows[-len(MAPS)]["levels"] = held_out_levels(maps[reward.name], scores)
            for row in rows[-len(MAPS) :]:
                print("   ", *(f"{key} {each:.2f}" if isinstance(each, float) else each for key, each in row.items()))
    dated = {
        "date": date.today().isoformat(),
        "versions": {"iqareward": iqareward.__version__, "torch": torch.__version__},
    }
    command = "python -m benchmarks.fit_calibration"
    runs: list[dict[str, Any]] = [{
        "rewards": list(maps),
        "command": " ".join([command, "--photos DIR", *(["--only", *maps] if options.only else [])]),
        "photographs": sorted(path.name for path in photos(options.photos)),
        "crops": f"{options.crops} of {SIDE}x{SIDE} from each, short side reduced to {SHORT_SIDE}, seed {SEED}",
        "degradations": {kind: list(steps) for kind, steps in VERSIONS.items()},
        "images": num_images,
        **dated,
    }]  # fmt: skip
    if options.qualisr:
        for name, column in PUBLISHED.items():
            maps[name] = logistic(published_scores(options.qualisr, column))
        runs.append({
            "rewards": list(PUBLISHED),
            "command": f"{command} --qualisr DIR",
            "source": "github.com/msu-video-group/QualiSR-Lab (BSD-3), super-resolution by PASD, SUPIR and RealESRGAN",
            "images": 120,
            **dated,
        })  # fmt: skip
    if options.write:
        write(maps, runs, add=bool(options.only))
    finish(document("calibration", rows, [], ["scikit-image", "piq"]), options.output)


if __name__ == "__main__":
    main()
