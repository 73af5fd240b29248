"""How well does each reward keep the order of quality? Spearman's correlation, on photographs with known damage.

    python -m benchmarks.correlation                                # four photographs, four kinds of damage
    python -m benchmarks.correlation --clean DIR --taesd DIR         # and small faults that rewards pay for
    python -m benchmarks.correlation --quick                         # smoke run

On the photographs -1 is perfect: the score falls at every level of damage. `iqareward agree` compares with people.
`--clean` takes clean photographs, such as the 24 of Kodak, and counts those whose score without a reference rises when
light noise is added; with `--taesd`, also those that score higher after TAESD has encoded and decoded them. Every
reward of the catalogue that can be built here is measured, and the others are named, as is what was left out. The last
line of standard output is one JSON document.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from benchmarks._harness import document, finish
from benchmarks._photographs import DAMAGES, PHOTOGRAPHS, damaged, load_photograph, score
from benchmarks.fit_niqe import fit_photos
from iqareward.agreement import spearman
from iqareward.functional.niqe import fit_natural_model, niqe
from iqareward.image_files import find_images
from iqareward.images import to_images
from iqareward.rewards.catalog import CATALOG, load
from iqareward.types import Reward

PACKAGES = ["scikit-image", "piq", "torchvision", "diffusers"]
NOISE = (0, 1, 2, 3, 4, 6, 8, 12)  # standard deviations, of 255
CROP = 256  # side of the middle of a photograph that the autoencoder sees

RoundTrip = Callable[[Tensor], Tensor]
"""Images `[B, 3, H, W]` in [0, 1] to their encoded and decoded selves."""


def buildable(names: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """Names of rewards that can score here, and why the others cannot."""
    usable, missing = [], {}
    probe = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    for name in names or CATALOG:
        try:
            reward = load(name)
            if reward.needs_prompts:
                missing[name] = "compares an image with its prompt"
                continue
            reward(probe, references=probe.flip(-1))
        except (OSError, ImportError) as error:  # no network for weights, or no extra
            missing[name] = str(error).splitlines()[0][:200]
        else:
            usable.append(name)
    return usable, missing


def held_out(reward: Reward, photograph: str) -> Reward:
    """NIQE with a natural model that was fitted without this photograph; any other reward as it is."""
    if reward.name != "niqe":
        return reward
    model = fit_natural_model([photo for name, photo in fit_photos().items() if name != photograph])
    return replace(reward, metric=partial(niqe, model=model))


def on_photographs(names: list[str], *, quick: bool, console: Console) -> list[dict[str, Any]]:
    """A row per reward: mean correlation with the level of damage, overall and per kind; how often it is fooled."""
    side, levels = (192, 3) if quick else (384, 5)
    photographs = PHOTOGRAPHS[:1] if quick else PHOTOGRAPHS
    scores: dict[str, list[Tensor]] = {}
    for seed, photograph in enumerate(track(photographs, "photographs", console=console, transient=True)):
        photo = load_photograph(photograph, side)
        versions = torch.stack([damaged(photo, kind, levels, seed=seed) for kind in DAMAGES])
        for name, found in score([held_out(load(name), photograph) for name in names], versions).items():
            scores.setdefault(name, []).append(found)
    rows = []
    for name, found in scores.items():
        table = torch.tensor([[spearman(line, range(levels + 1)) for line in photo] for photo in found])
        above = torch.stack([photo[:, 1:] > photo[:, :1] for photo in found])
        row = {"set": "photographs", "reward": name, "spearman": finite(table.mean())}
        row |= {kind: finite(mean) for kind, mean in zip(DAMAGES, table.mean(0))}
        rows.append(row | {"above_original": float(above.float().mean()), "damaged": above.numel()})
    return rows


def finite(value: Tensor) -> float | None:
    """The number, or None for NaN, which JSON does not have."""
    return None if value.isnan() else float(value)


def on_clean(files: list[Path], rewards: list[Reward], console: Console) -> list[dict[str, Any]]:
    """A row per reward: on how many photographs each strength of noise raises its score, and by how much on average."""
    scores: dict[str, list[list[float]]] = {reward.name: [] for reward in rewards}
    for place, file in enumerate(track(files, "light noise", console=console, transient=True)):
        image = to_images(file, value_range=(0, 1))
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(place))
        noisy = [(image + sigma / 255 * noise).clamp(0, 1) for sigma in NOISE]
        for reward in rewards:
            scores[reward.name].append([reward(one).item() for one in noisy])
    rows = []
    for name, values in scores.items():
        found = torch.tensor(values)
        gains = found - found[:, :1]
        rows.append({
            "set": "light noise", "reward": name, "images": len(files),
            "spearman": float(torch.tensor([spearman(line, NOISE) for line in found]).nanmean()),
            "sigma": list(NOISE[1:]), "raised": (gains > 0).sum(0).tolist()[1:], "gain": gains.mean(0).tolist()[1:],
        })  # fmt: skip
    return rows


def on_round_trip(
    files: list[Path], rewards: list[Reward], round_trip: RoundTrip, console: Console
) -> list[dict[str, Any]]:
    """A row per reward: how many photographs score higher after an autoencoder, and by how much all do on average."""
    gains: dict[str, list[float]] = {reward.name: [] for reward in rewards}
    for file in track(files, "round trip", console=console, transient=True):
        image = to_images(file, value_range=(0, 1))
        top, left = ((side - CROP) // 2 for side in image.shape[2:])
        image = image[..., top : top + CROP, left : left + CROP]
        decoded = round_trip(image)
        for reward in rewards:
            gains[reward.name].append((reward(decoded) - reward(image)).item())
    return [
        {"set": "round trip", "reward": name, "images": len(files), "spearman": None,
         "raised": sum(gain > 0 for gain in values), "gain": float(torch.tensor(values).mean())}
        for name, values in gains.items()
    ]  # fmt: skip


def taesd(folder: Path) -> RoundTrip:
    """TAESD from `taesd_encoder.safetensors` and `taesd_decoder.safetensors` of https://github.com/madebyollin/taesd."""
    from diffusers import AutoencoderTiny

    network: Any = AutoencoderTiny().eval()
    network.encoder.layers.load_state_dict(load_file(folder / "taesd_encoder.safetensors"))
    decoder = load_file(folder / "taesd_decoder.safetensors")  # its layer 0, a clamp, stands outside in diffusers
    shifted = {f"{int(key.partition('.')[0]) - 1}.{key.partition('.')[2]}": value for key, value in decoder.items()}
    network.decoder.layers.load_state_dict(shifted)

    @torch.no_grad()
    def round_trip(images: Tensor) -> Tensor:
        return ((network.decode(network.encode(2 * images - 1).latents).sample + 1) / 2).clamp(0, 1)

    return round_trip


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """A table per image set, best first."""
    for name in dict.fromkeys(row["set"] for row in rows):
        table = Table(title=f"Spearman's correlation, {name}", title_justify="left")
        table.add_column("reward")
        table.add_column("correlation", justify="right")
        here = [row for row in rows if row["set"] == name]
        if raised := "raised" in here[0]:
            table.add_column(f"photographs raised, of {here[0]['images']}")
        for row in sorted(here, key=lambda row: -abs(row["spearman"] or 0)):
            found = "-" if row["spearman"] is None else f"{row['spearman']:+.3f}"
            table.add_row(row["reward"], found, *([str(row["raised"])] if raised else []))
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", help="names of `iqareward list` or pyiqa:<metric>; default: all")
    parser.add_argument("--clean", type=Path, metavar="DIR", help="folder of clean photographs, for light noise")
    parser.add_argument("--taesd", type=Path, metavar="DIR", help="folder of TAESD's weights; needs --clean")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the document here")
    options, console = parser.parse_args(), Console(stderr=True)
    torch.set_num_threads(1)
    names, missing = buildable(options.rewards or (["psnr", "piqe"] if options.quick else None))
    rows = on_photographs(names, quick=options.quick, console=console)
    blind = [reward for reward in map(load, names) if not reward.needs_references]
    files = list(find_images([options.clean]).files) if options.clean and options.clean.is_dir() else []
    if files:
        rows += on_clean(files, blind, console)
    else:
        missing["light noise"] = f"no photographs in --clean {options.clean}"
    if files and options.taesd and options.taesd.is_dir():
        rows += on_round_trip(files, blind, taesd(options.taesd), console)
    else:
        missing["round trip"] = f"needs --clean, and TAESD's weights in --taesd {options.taesd}"
    show(rows, console)
    finish(document("correlation", rows, [], PACKAGES) | {"missing": missing}, options.json)


if __name__ == "__main__":
    main()
