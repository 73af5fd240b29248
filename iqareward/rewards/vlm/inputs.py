"""The inputs of vision-language models: pixels as their own processors make them, and prompts as token ids."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iqareward.functional.resize import resize_levels, to_levels
from iqareward.rewards.vlm.presets import LevelPreset, RatingPreset

Pair = tuple[int, int]  # height and width, or rows and columns

_BICUBIC = 3  # Pillow's number
_MAX_ASPECT = 200  # beyond it the processors of the Qwen family refuse an image
_DECIMALS = ("1.0", "2.57", "4.98")  # enough to notice a tokenizer that joins digits or the point


class ImageInputs(NamedTuple):
    """Arguments of a model's `get_image_features`, and the rows and columns of tokens where positions have M-RoPE."""

    keywords: dict[str, Any]
    grid: Pair | None


class _Family(NamedTuple):
    """How a model family sees images.

    Attributes:
        images: From clean images `[B, 3, H, W]` to the vision tower's inputs; None for a shape that it does not take.
        around: Token ids before and after the image's tokens that the chat template leaves to the processor.
    """

    images: Callable[[Tensor], ImageInputs | None]
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


def family_of(model: Any, processor: Any) -> _Family:
    """How images become inputs of this model; sizes, limits and colours are those of its processor.

    All families resize as Pillow does, as these models were trained. The processors of transformers 5 resize by
    torchvision instead, up to 2 of 255 levels apart.

    Raises:
        ValueError: the model's family is not supported, or its processor resizes in another way.
    """
    check_family(model.config.model_type)
    source = processor.image_processor
    if int(source.resample) != _BICUBIC:
        raise ValueError(f"expected an image processor with bicubic resampling (3), got {source.resample}.")
    return _FAMILIES[model.config.model_type](processor, source)


def check_family(model_type: str) -> None:
    """Refuse a model of another family."""
    if model_type not in _FAMILIES:
        raise ValueError(
            f"expected a model of a supported family ({', '.join(_FAMILIES)}), got {model_type!r}. "
            "Serve it with vLLM or SGLang and use ServedVLMReward."
        )


@dataclass(frozen=True)
class _Colors:
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalize(self, levels: Tensor) -> Tensor:
        """Levels 0..255 `[B, 3, H, W]` in units of `std` around `mean`; numbers stay on the host."""
        channels = [(levels[:, i] / 255 - self.mean[i]) / self.std[i] for i in range(3)]
        return torch.stack(channels, dim=1)


@dataclass(frozen=True)
class _PatchGrid:
    """Qwen2-VL to Qwen3.5: one grid of patches of about the image's size.

    Images whose sides are multiples of `patch_size * merge_size` within the pixel limits are not resized at all.
    """

    patch_size: int
    merge_size: int
    temporal_size: int
    min_pixels: int
    max_pixels: int
    colors: _Colors

    def __call__(self, images: Tensor) -> ImageInputs | None:
        factor, limits = self.patch_size * self.merge_size, (self.min_pixels, self.max_pixels)
        size = smart_size(*images.shape[-2:], factor=factor, min_pixels=limits[0], max_pixels=limits[1])
        if size is None:
            return None
        pixels = self.colors.normalize(resize_levels(to_levels(images), size))
        rows = patchify(
            pixels, patch_size=self.patch_size, merge_size=self.merge_size, temporal_size=self.temporal_size
        )
        grid = [1, size[0] // self.patch_size, size[1] // self.patch_size]
        shapes = torch.tensor([grid] * images.shape[0])  # on the host: the vision tower reads numbers out of it
        merged = (grid[1] // self.merge_size, grid[2] // self.merge_size)
        return ImageInputs({"pixel_values": rows, "image_grid_thw": shapes}, merged)


def smart_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> Pair | None:
    """The size that the Qwen family gives an image: multiples of `factor`, and a number of pixels within the limits.

    Returns:
        (height, width); None for an image more than 200 times as long as wide, which the models do not take.
    """
    if max(height, width) > _MAX_ASPECT * min(height, width):
        return None
    # round() takes halves to the even neighbour, as the models' processors do
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
    return rows * factor, columns * factor


def patchify(pixels: Tensor, *, patch_size: int, merge_size: int, temporal_size: int) -> Tensor:
    """Cut normalised images `[B, 3, H, W]` into the rows that the vision tower reads, image after image.

    Patches that become one token stand together, in blocks of `merge_size x merge_size`. A still image is
    `temporal_size` equal frames.
    """
    batch, channels, height, width = pixels.shape
    side = patch_size * merge_size
    blocks = pixels.reshape(
        batch, channels, height // side, merge_size, patch_size, width // side, merge_size, patch_size
    )
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)  # batch, block row, block column, row, column, channel, patch
    frames = blocks[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, temporal_size, -1, -1)
    return frames.reshape(-1, channels * temporal_size * patch_size**2)


@dataclass(frozen=True)
class _FittedTiles:
    """LLaVA-OneVision: fitted into the best canvas, padded with black, cut into tiles, with a thumbnail before them."""

    tile: Pair
    canvases: tuple[Pair, ...]
    colors: _Colors

    def __call__(self, images: Tensor) -> ImageInputs:
        levels = to_levels(images)
        size: Pair = (images.shape[-2], images.shape[-1])
        canvas = self._best_canvas(size)
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        tight = 0 if canvas[0] / size[0] <= canvas[1] / size[1] else 1  # the side that fills the canvas
        fitted = [min(math.ceil(side * scale), limit) for side, limit in zip(size, canvas, strict=True)]
        fitted[tight] = canvas[tight]
        top, left = (canvas[0] - fitted[0]) // 2, (canvas[1] - fitted[1]) // 2
        padding = (left, canvas[1] - fitted[1] - left, top, canvas[0] - fitted[0] - top)
        padded = F.pad(resize_levels(levels, (fitted[0], fitted[1])), padding)
        tiles = torch.cat([resize_levels(levels, self.tile)[:, None], _cut(padded, self.tile)], dim=1)
        pixels = self.colors.normalize(tiles.flatten(0, 1)).unflatten(0, tiles.shape[:2])
        return ImageInputs({"pixel_values": pixels, "image_sizes": [size] * images.shape[0]}, None)

    def _best_canvas(self, size: Pair) -> Pair:
        """The canvas that keeps most of an image's pixels when it is fitted inside, then the one with least waste."""

        def merit(canvas: Pair) -> tuple[int, int]:
            scale = min(canvas[0] / size[0], canvas[1] / size[1])
            kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
            return kept, kept - canvas[0] * canvas[1]

        return max(self.canvases, key=merit)  # the first of equals


@dataclass(frozen=True)
class _StretchedTiles:
    """InternVL: stretched to the grid of tiles of the nearest aspect ratio, then a thumbnail."""

    tile: Pair
    min_tiles: int
    max_tiles: int
    colors: _Colors

    def __call__(self, images: Tensor) -> ImageInputs:
        levels = to_levels(images)
        rows, columns = self._best_grid((images.shape[-2], images.shape[-1]))
        tiles = _cut(resize_levels(levels, (rows * self.tile[0], columns * self.tile[1])), self.tile)
        if rows * columns > 1:
            tiles = torch.cat([tiles, resize_levels(levels, self.tile)[:, None]], dim=1)
        return ImageInputs({"pixel_values": self.colors.normalize(tiles.flatten(0, 1))}, None)

    def _best_grid(self, size: Pair) -> Pair:
        """Of equally near grids it is the largest that asks for at most twice the image's pixels."""
        aspect, area = size[1] / size[0], size[0] * size[1]
        sides = range(1, self.max_tiles + 1)
        grids = [(rows, columns) for columns in sides for rows in sides]
        grids = [grid for grid in grids if self.min_tiles <= grid[0] * grid[1] <= self.max_tiles]
        best, nearest = (1, 1), math.inf
        for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
            distance = abs(aspect - columns / rows)
            worth_it = area > 0.5 * self.tile[0] * self.tile[1] * columns * rows
            if distance < nearest or (distance == nearest and worth_it):
                best, nearest = (rows, columns), distance
        return best


def _cut(levels: Tensor, tile: Pair) -> Tensor:
    """`[B, 3, r*h, c*w]` as `[B, r*c, 3, h, w]`, row by row."""
    rows, columns = levels.shape[2] // tile[0], levels.shape[3] // tile[1]
    tiles = levels.unflatten(3, (columns, tile[1])).unflatten(2, (rows, tile[0]))
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def _patch_grid(processor: Any, source: Any) -> _Family:
    limits = source.size["shortest_edge"], source.size["longest_edge"]
    return _Family(
        _PatchGrid(source.patch_size, source.merge_size, source.temporal_patch_size, *limits, _colors(source))
    )


def _fitted_tiles(processor: Any, source: Any) -> _Family:
    canvases = tuple((height, width) for height, width in source.image_grid_pinpoints)
    return _Family(_FittedTiles(_tile(source), canvases, _colors(source)))


def _stretched_tiles(processor: Any, source: Any) -> _Family:
    images = _StretchedTiles(_tile(source), source.min_patches, source.max_patches, _colors(source))
    return _Family(images, ((processor.start_image_token_id,), (processor.end_image_token_id,)))


def _colors(source: Any) -> _Colors:
    return _Colors(tuple(source.image_mean), tuple(source.image_std))


def _tile(source: Any) -> Pair:
    return source.size["height"], source.size["width"]


# by `model_type` of the configuration
_FAMILIES: dict[str, Callable[[Any, Any], _Family]] = {
    "qwen2_vl": _patch_grid,
    "qwen2_5_vl": _patch_grid,
    "qwen3_vl": _patch_grid,
    "qwen3_5": _patch_grid,
    "llava_onevision": _fitted_tiles,
    "internvl": _stretched_tiles,
}


class Prompt(NamedTuple):
    """Token ids before the image, and after it up to the position that is read."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def render(processor: Any, preset: LevelPreset | RatingPreset | None, question: str, answer: str = "") -> str:
    """The text that the model continues by its own chat template, with one placeholder for the image.

    Without a preset the image comes first and the rest is left to the template.
    """
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content if preset is None or preset.image_first else content[::-1]}]
    if preset is not None and preset.system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": preset.system}]})
    # The tokenizer hands every option to the template; the processor warns about those that a template does not use.
    text = processor.tokenizer.apply_chat_template(
        messages,
        chat_template=processor.chat_template,
        tokenize=False,
        add_generation_prompt=True,
        **({} if preset is None else preset.template),
    )
    return text + answer


def tokenize(processor: Any, text: str, around: tuple[Sequence[int], Sequence[int]] = ((), ())) -> Prompt:
    """A rendered prompt as token ids; those of `around` stand directly before and after the image's tokens.

    Raises:
        ValueError: there is not exactly one placeholder.
    """
    ids, image = _ids(processor, text), processor.image_token_id
    if ids.count(image) != 1:
        raise ValueError(
            f"expected one image placeholder {processor.image_token!r}, got {ids.count(image)} in {text!r}. "
            "Does the checkpoint's chat template know images?"
        )
    split = ids.index(image)
    return Prompt((*ids[:split], *around[0]), (*around[1], *ids[split + 1 :]))


def next_ids(processor: Any, text: str, words: Sequence[str]) -> tuple[int, ...]:
    """The token that each word adds to a text.

    A text may end with a space, for words without one: tokenizers would join the two, so there the word alone counts,
    as the models that are asked like this were trained.

    Raises:
        ValueError: a word is more than one token there, or changes the tokens before it, or two words share one.
    """
    before = _ids(processor, text)
    found = []
    for word in words:
        ids = [*before, *_ids(processor, word)] if text.endswith(" ") else _ids(processor, text + word)
        if ids[: len(before)] != before or len(ids) != len(before) + 1:
            raise ValueError(
                f"expected {word!r} to be one token after {text[-20:]!r}, got {_shown(processor, ids, before)}. "
                "Choose other level words, or a stem that ends (or words that begin) with the space between them."
            )
        found.append(ids[-1])
    if len(set(found)) != len(found):
        raise ValueError(f"expected {list(words)} to be different tokens, got {found}.")
    return tuple(found)


def digit_ids(processor: Any, text: str) -> tuple[tuple[int, ...], int]:
    """Token ids of 0 to 9 and of the decimal point, as they continue a text.

    Raises:
        ValueError: the tokenizer does not write numbers digit by digit.
    """
    digits = next_ids(processor, text, "0123456789")
    (point,) = next_ids(processor, text + "4", ".")
    before = _ids(processor, text)
    for number in _DECIMALS:
        expected = [point if character == "." else digits[int(character)] for character in number]
        if _ids(processor, text + number) != [*before, *expected]:
            raise ValueError(
                f"expected a tokenizer that writes {number} digit by digit, got "
                f"{_shown(processor, _ids(processor, text + number), before)}. RatingReward cannot read this model."
            )
    return digits, point


def _ids(processor: Any, text: str) -> list[int]:
    # the template has written all special tokens already
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def _shown(processor: Any, ids: list[int], before: list[int]) -> list[str]:
    same = next((i for i, pair in enumerate(zip(ids, before, strict=False)) if pair[0] != pair[1]), len(before))
    return processor.tokenizer.convert_ids_to_tokens(ids[same:])
