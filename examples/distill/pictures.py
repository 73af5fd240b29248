"""Make images to distil a reward on: crops of photographs, degraded and restored in many ways, with their originals.

    python -m examples.distill.pictures --photos PHOTOS --output pictures

The folder gets `images/<crop>/<kind>-<level>.png` and `references/<crop>.png`. `--decoders` names a folder with weights
of TAESD (`taesd_encoder.safetensors` and so on), whose round trips are added. It needs `pip install . --group demo`.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from skimage import filters, restoration
from torch import Tensor
from torch.nn import functional as F

from iqareward import diffusion
from iqareward.image_files import find_images, read_image

_BLIND = diffusion.RealESRGANDegradation(scale=1)
_SHORT_SIDES = (400, 1400)  # of the photograph before it is cropped: at full size many are soft
_CODECS = ("taesd", "taesd3", "taef1")
_TRAINING_CODECS = _CODECS[:2]
Draws = np.random.Generator
Codec = Callable[[Tensor], Tensor]


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m examples.distill.pictures", description=__doc__, formatter_class=style)
    parser.add_argument("--photos", type=Path, nargs="+", required=True, help="photographs, or folders of them")
    parser.add_argument("--output", type=Path, required=True, help="folder for the images")
    parser.add_argument("--crops", type=int, default=800, help="number of crops")
    parser.add_argument("--size", type=int, default=160, help="side of a crop in pixels")
    parser.add_argument("--decoders", type=Path, help="folder with weights of TAESD, TAESD3 and TAEF1")
    parser.add_argument("--test", action="store_true", help="also what is kept out of the training: other restorers")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    photos = list(find_images(options.photos).files)
    codecs = {} if options.decoders is None else load_codecs(options.decoders, _CODECS)
    for number in track(range(options.crops), description="crops"):
        reference_file = options.output / "references" / f"{number:05}.png"
        if reference_file.is_file():  # written last, so that a run goes on where it stopped
            continue
        draws = np.random.default_rng([options.seed, number])
        crop = crop_of(photos[number % len(photos)], options.size, draws)
        folder = options.output / "images" / reference_file.stem
        folder.mkdir(parents=True, exist_ok=True)
        reference_file.parent.mkdir(parents=True, exist_ok=True)
        for name, image in variants(crop, number, draws, codecs, test=options.test, seed=options.seed):
            _save(image, folder / f"{name}.png")
        _save(crop, reference_file)


def crop_of(photo: Path, size: int, draws: Draws) -> Tensor:
    """A random crop `[3, size, size]` of a photograph that is scaled by a random factor, the livelier one of two."""
    whole = _photo(photo)
    if min(whole.size) < size:
        raise ValueError(f"{photo} is {whole.width} x {whole.height}; expected sides of {size} pixels or more.")
    side = max(size, math.exp(draws.uniform(*np.log(_SHORT_SIDES))))
    whole = _reduced(whole, side)
    pixels = torch.from_numpy(np.array(whole)).movedim(-1, 0).float() / 255
    crops: list[Tensor] = []
    for _ in range(2):
        top, left = (int(draws.integers(0, length - size + 1)) for length in pixels.shape[1:])
        crops.append(pixels[:, top : top + size, left : left + size])
    crop = max(crops, key=lambda each: float(each.diff(dim=1).abs().mean() + each.diff(dim=2).abs().mean()))
    return crop.flip(2) if draws.random() < 0.5 else crop


@lru_cache(maxsize=64)
def _photo(file: Path) -> Image.Image:
    """No larger than is needed: opening the same photographs again takes more time than all the rest."""
    return _reduced(Image.fromarray(read_image(file)).convert("RGB"), _SHORT_SIDES[1])


def _reduced(photo: Image.Image, side: float) -> Image.Image:
    """With this length of the short side, or as it is if it is smaller."""
    factor = min(1.0, side / min(photo.size))
    shape = round(photo.width * factor), round(photo.height * factor)
    return photo.resize(shape, Image.Resampling.LANCZOS, reducing_gap=3)


def variants(
    clean: Tensor, number: int, draws: Draws, codecs: dict[str, Codec], *, test: bool, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Degraded and restored images of one crop `[3, H, W]`, by kind and level; with `test` of more kinds."""

    def blind(severity: float, version: int) -> Tensor:
        return _BLIND(clean[None], torch.tensor([severity]), [16 * number + version], seed=seed)[0]

    yield "clean-0", clean
    light = draws.uniform(1.5, 6)
    yield f"light_noise-{light:.1f}", noisy(clean, light, draws)
    blurred = draws.uniform(0.4, 3)
    yield f"blur-{blurred:.1f}", gaussian(clean, blurred)
    simple = [
        ("noise", noisy, draws.uniform(6, 30)), ("jpeg", compressed, draws.uniform(10, 90)),
        ("ringing", ringing, draws.uniform(0.5, 2.5)), ("bicubic", lower, draws.uniform(1.5, 4)),
    ]  # fmt: skip
    for place in range(4) if test else draws.permutation(4)[:2]:
        kind, change, level = simple[place]
        yield f"{kind}-{level:.1f}", change(clean, level, draws)
    severities = [draws.uniform(*span) for span in ((0.0, 0.3), (0.2, 0.6), (0.4, 1.0))]
    degraded = [blind(severity, version) for version, severity in enumerate(severities)]
    for severity, image in zip(severities, degraded, strict=True):
        yield f"blind-{severity:.2f}", image
    amount = math.exp(draws.uniform(math.log(0.3), math.log(4)))
    yield f"sharpened-{amount:.1f}", sharpened(clean, amount, draws)
    soft = gaussian(clean, draws.uniform(0.5, 1.5)) if draws.random() < 0.5 else degraded[int(draws.integers(2))]
    yield f"blind_sharpened-{amount:.1f}", sharpened(soft, amount, draws)
    for codec in [*codecs] if test else [each for each in _TRAINING_CODECS if each in codecs]:
        if test or codec == _TRAINING_CODECS[number // 2 % len(_TRAINING_CODECS)]:
            yield f"{codec}-0", codecs[codec](clean)
    level = draws.uniform(5, 25)
    grainy = noisy(clean, level, draws) if draws.random() < 0.5 else degraded[int(draws.integers(1, 3))]
    ways = {"median": median, "tv": total_variation, "nlm": non_local_means}
    for way in ways if test else [list(ways)[int(draws.integers(3))]]:
        yield f"{way}-{level:.1f}", ways[way](grainy, level)
        yield f"{way}_of_clean-{level:.1f}", ways[way](clean, level)
    if test:
        yield f"lanczos-{4}", lower(clean, 4, draws, mode="lanczos")
        yield f"wiener-{blurred:.1f}", deblurred(gaussian(clean, blurred), blurred, "wiener")
        yield f"richardson_lucy-{blurred:.1f}", deblurred(gaussian(clean, blurred), blurred, "richardson_lucy")


def noisy(image: Tensor, level: float, draws: Draws) -> Tensor:
    """With Gaussian noise of `level` / 255, in a third of the images the same in all colours."""
    channels = 1 if draws.random() < 1 / 3 else 3
    pattern = torch.from_numpy(draws.standard_normal((channels, *image.shape[1:]), dtype=np.float32))
    return image + pattern * (level / 255)


def gaussian(image: Tensor, sigma: float) -> Tensor:
    """Blurred with a standard deviation in pixels."""
    size = 2 * math.ceil(3 * sigma) + 1
    return diffusion.blind.convolved(image[None], diffusion.blind.gaussian_kernel(size, sigma, sigma, 0.0))[0]


def compressed(image: Tensor, level: float, draws: Draws) -> Tensor:
    """A JPEG file of quality 100 - `level`."""
    return diffusion.degradations.jpeg(image[None], torch.tensor([100 - level]))[0]


def ringing(image: Tensor, level: float, draws: Draws) -> Tensor:
    """Through an ideal low-pass filter with a cutoff at pi - `level`, whose edges echo."""
    return diffusion.blind.convolved(image[None], diffusion.blind.sinc_kernel(21, math.pi - 0.75 * level))[0]


def lower(image: Tensor, factor: float, draws: Draws, *, mode: str = "bicubic") -> Tensor:
    """Made smaller by `factor` and enlarged again."""
    small = [max(1, round(side / factor)) for side in image.shape[1:]]
    if mode == "lanczos":
        whole = Image.fromarray(_bytes(image))
        again = whole.resize((small[1], small[0]), Image.Resampling.LANCZOS).resize(
            whole.size, Image.Resampling.LANCZOS
        )
        return torch.from_numpy(np.array(again)).movedim(-1, 0).float() / 255
    reduced = F.interpolate(image[None], small, mode="bicubic", antialias=True)
    return F.interpolate(reduced, image.shape[1:], mode="bicubic")[0]


def sharpened(image: Tensor, amount: float, draws: Draws) -> Tensor:
    """Unsharp mask: `amount` times what a blur takes away is added."""
    return image + amount * (image - gaussian(image, draws.uniform(0.7, 2.5)))


def median(image: Tensor, level: float) -> Tensor:
    """Median over 3 x 3 pixels, or 5 x 5 for a level above 15."""
    size = 3 if level < 15 else 5
    return torch.from_numpy(np.stack([filters.median(each, np.ones((size, size))) for each in image.numpy()]))


def total_variation(image: Tensor, level: float) -> Tensor:
    """Chambolle's denoising by total variation."""
    restored = restoration.denoise_tv_chambolle(image.clamp(0, 1).numpy(), weight=level / 150, channel_axis=0)
    return torch.from_numpy(restored).float()


def non_local_means(image: Tensor, level: float) -> Tensor:
    """Denoised by non-local means."""
    restored = restoration.denoise_nl_means(
        image.clamp(0, 1).numpy(), patch_size=5, patch_distance=4, h=0.8 * level / 255, sigma=level / 255,
        fast_mode=True, channel_axis=0,
    )  # fmt: skip
    return torch.from_numpy(restored).float()


def deblurred(image: Tensor, sigma: float, way: str) -> Tensor:
    """Deconvolved with the Gaussian that blurred it."""
    size = 2 * math.ceil(3 * sigma) + 1
    kernel = diffusion.blind.gaussian_kernel(size, sigma, sigma, 0.0).numpy()
    planes = image.clamp(0, 1).numpy()
    if way == "wiener":
        return torch.from_numpy(np.stack([restoration.wiener(each, kernel, 0.01) for each in planes])).float()
    return torch.from_numpy(
        np.stack([restoration.richardson_lucy(each, kernel, num_iter=15) for each in planes])
    ).float()


def load_codecs(folder: Path, names: tuple[str, ...]) -> dict[str, Codec]:
    """The round trips through small autoencoders whose weights are in the folder."""
    from diffusers import AutoencoderTiny  # noqa: PLC0415 - heavy
    from safetensors.torch import load_file  # noqa: PLC0415

    found: dict[str, Codec] = {}
    for name in names:
        channels = 4 if name == "taesd" else 16
        network = AutoencoderTiny(latent_channels=channels).requires_grad_(False).eval()
        # diffusers keeps the decoder's first layer, which has no weights, outside of its list
        for part, shift in (("encoder", 0), ("decoder", 1)):
            keys = load_file(folder / f"{name}_{part}.safetensors")
            split = {key: key.split(".", 1) for key in keys}
            getattr(network, part).layers.load_state_dict(
                {f"{int(split[key][0]) - shift}.{split[key][1]}": value.float() for key, value in keys.items()}
            )
        found[name] = _RoundTrip(network)
    return found


class _RoundTrip:
    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    def __call__(self, image: Tensor) -> Tensor:
        latents = self.network.encode(2 * image[None] - 1).latents
        return (self.network.decode(latents).sample[0] + 1) / 2


def _bytes(image: Tensor) -> np.ndarray:
    return (image.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()


def _save(image: Tensor, file: Path) -> None:
    Image.fromarray(_bytes(image)).save(file, compress_level=1)


if __name__ == "__main__":
    main()
