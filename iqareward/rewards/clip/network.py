"""A CLIP model with what belongs to it: pixels in, features out, and the features of prompts."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iqareward.functional._chunks import constant, free_threads
from iqareward.functional.resize import resize_levels, smooth_resize, to_levels
from iqareward.rewards.threads import ProcessLock, mark, take_over

_MAX_TEXTS = 4096  # prompts whose features are kept: 16 MiB with CLIP ViT-H


class Network(nn.Module):
    """A CLIP model with what belongs to it: the pixels that it expects, its tokenizer, and a head.

    Args:
        model: A `CLIPModel` of transformers.
        colors: The mean and the standard deviation of the pixels that it expects.
        tokenizer: None if it has no text model.
        head: From unit features of images to something else.
    """

    def __init__(
        self,
        model: Any,
        colors: tuple[tuple[float, ...], tuple[float, ...]],
        tokenizer: Any = None,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.head = model, tokenizer, head or nn.Identity()
        self._colors, self._side = colors, int(model.config.vision_config.image_size)

    def cropped(self, images: Tensor) -> Tensor:
        """Clean images with their shorter side resized as Pillow does, the middle cut out, and normalised."""
        side, (height, width) = self._side, images.shape[2:]
        short = min(height, width)
        rows, columns = side * height // short, side * width // short
        with free_threads(images.device):
            levels = resize_levels(to_levels(images), (rows, columns), middle=side)
        return self.normalized(levels / 255)

    def padded(self, images: Tensor) -> Tensor:
        """Clean images with their longer side resized as torchvision resizes tensors, padded with black to a square."""
        side, size = self._side, images.shape[2:]
        rows, columns = (max(1, round(each * (side / max(size)))) for each in size)
        with free_threads(images.device):
            resized = smooth_resize(to_levels(images) / 255, (rows, columns))
        top, left = (side - rows) // 2, (side - columns) // 2
        return self.normalized(F.pad(resized, (left, side - columns - left, top, side - rows - top)))

    def normalized(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] in units of the model's colours."""
        mean, std = (constant(row, pixels.dtype, pixels.device).view(3, 1, 1) for row in self._colors)
        return (pixels - mean) / std

    def image_features(self, pixels: Tensor) -> Tensor:
        """Unit features of normalised pixels, `[b, width]` float32."""
        return F.normalize(self.projected(pixels), dim=1)

    def projected(self, pixels: Tensor) -> Tensor:
        """Features of normalised pixels, `[b, width]` float32."""
        resized = tuple(pixels.shape[2:]) != (self._side, self._side)
        hidden = self.model.vision_model(pixel_values=pixels, interpolate_pos_encoding=resized).pooler_output
        return self.model.visual_projection(hidden).float()

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit features of prompts, `[b, width]` float32."""
        limit = int(self.model.config.text_config.max_position_embeddings)
        rows: list[list[int]] = self.tokenizer(list(prompts), truncation=True, max_length=limit).input_ids
        # All texts are as long as the longest possible one, so that none depends on its neighbours; what follows its
        # end is not attended to. transformers looks for the end by `eos_token_id` of a configuration, which is wrong in
        # older checkpoints.
        padded = torch.tensor([row + [row[-1]] * (limit - len(row)) for row in rows])
        # the first end counts, as in transformers and open_clip, if a prompt holds the token of the end itself
        ends = F.one_hot(torch.tensor([row.index(row[-1]) for row in rows]), limit)
        device = self.model.text_projection.weight.device
        ids, ends = (values.to(device, non_blocking=True) for values in (padded, ends))
        hidden = self.model.text_model(input_ids=ids).last_hidden_state
        last = torch.where(ends[..., None] > 0, hidden, 0).sum(1)
        return F.normalize(self.model.text_projection(last).float(), dim=1)


class Prototypes(nn.Module):
    """From features of CLIP to a mean of the scores of prototypes, weighted by a softmax of cosines."""

    def __init__(self, mean: Tensor, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        for key, value in {"mean": mean, **parts}.items():
            self.register_buffer(key, value.float())

    def forward(self, features: Tensor) -> Tensor:
        parts: dict[str, Tensor] = dict(self.named_buffers())
        whitened = (features - parts["mean"]) / parts["pca_scale"].abs()
        places = F.normalize(whitened @ parts["pca_components"].T, dim=1)
        cosines = places @ F.normalize(parts["prototypes"], dim=1).T
        return (cosines * parts["logit_scale"].clamp_min(1e-6)).softmax(1) @ parts["proto_scores"]


@final
class Texts:
    """The features of the latest prompts, computed once for each; safe for any thread and stream."""

    def __init__(self, name: str, network: Network) -> None:
        self._name, self._network, self._lock = name, network, ProcessLock()
        self._known = OrderedDict[str, tuple[Tensor, Any]]()

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """`[b, width]` float32."""
        wanted = list(dict.fromkeys(checked_prompt(self._name, prompt) for prompt in prompts))
        with self._lock, torch.no_grad():
            if missing := [prompt for prompt in wanted if prompt not in self._known]:
                features = self._network.text_features(missing)
                rows = [row.clone() for row in features.unbind(0)]  # a row that stays must not keep the others
                made = mark(features.device)
                self._known |= {prompt: (row, made) for prompt, row in zip(missing, rows, strict=True)}
            found = {prompt: self._known[prompt] for prompt in wanted}
            for prompt in wanted:
                self._known.move_to_end(prompt)
            while len(self._known) > _MAX_TEXTS:
                self._known.popitem(last=False)
        for row, made in found.values():
            take_over(made, [row])
        return torch.stack([found[prompt][0] for prompt in prompts])


def checked_prompt(name: str, prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise TypeError(f"{name} expected `prompts` as texts, got {type(prompt).__name__}.")
    return prompt
