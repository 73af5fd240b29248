"""Rewards by CLIP: CLIPScore, PickScore, HPSv2, LAION's aesthetic predictor, CLIP-IQA's prompts, and RALI."""

import os
import re
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iqareward.functional._chunks import constant, free_threads, rows_at_once
from iqareward.functional.resize import resize_levels, smooth_resize, to_levels
from iqareward.rewards.core import ImageReward
from iqareward.rewards.loading import LazyModel
from iqareward.rewards.options import name_with
from iqareward.rewards.threads import ProcessLock, mark, take_over
from iqareward.types import Bounds
from iqareward.weight_files import (
    Shape,
    WeightFile,
    check_values,
    checkpoint_folder,
    listed,
    open_weights,
    read_json,
    weight_file,
)

CLIP_B32 = "openai/clip-vit-base-patch32"
CLIP_B16 = "openai/clip-vit-base-patch16"
CLIP_L14 = "openai/clip-vit-large-patch14"
CLIP_H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE = "yuvalkirstain/PickScore_v1"
RALI = "ByteDance/Q-Insight/RALI"
HPSV2 = "xswu/HPSv2"
HPSV2_FILE = "HPS_v2.1_compressed.pt"
LAION_FILE = "sac+logos+ava1-l14-linearMSE.pth"
LAION_URL = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
_LAION_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"

_RALI_PARTS = (
    "scorer.pca_scale",
    "scorer.pca_components",
    "scorer.prototypes",
    "scorer.proto_scores",
    "scorer.logit_scale",
)
_BICUBIC = 3  # Pillow's number
# Working memory without and with a graph, for each pixel that the published networks see, counted by
# tests/test_memory.py and benchmarks.meter; and that of a pixel of an image that is resized for them.
_BYTES_PER_PIXEL = {
    "clipscore": (96, 640),
    "pickscore": (384, 8960),
    "hpsv2": (384, 8960),
    "laion_aesthetic": (384, 7680),
    "clipiqa": (256, 2304),
    "rali": (896, 17408),  # that of ViT-L/14, of 577 tokens in place of 257
}
_RESIZED_BYTES, _SEEN_PIXELS = 72, 224 * 224
_PROCESSOR_FILES = ("*.json", "*.txt")
_MAX_TEXTS = 4096  # prompts whose features are kept: 16 MiB with CLIP ViT-H
# The keys of open_clip, by those of transformers. Its attention has queries, keys and values in one matrix, and it
# multiplies projections from the other side.
_OPEN_CLIP = (
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("visual_projection.weight", "visual.proj"),
    ("text_projection.weight", "text_projection"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
)
_FUSED = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)$")


class _CLIPReward(ImageReward):
    """A reward by the features of a CLIP model, which is loaded at the first call."""

    resize: bool = True

    def __init__(
        self,
        name: str,
        load: Callable[[torch.device], nn.Module],
        differentiable: bool,
        device: torch.device | str | None,
        batch_size: int | None,
    ) -> None:
        self.name, self.differentiable, self.batch_size = name, differentiable, batch_size
        self.bytes_per_pixel = _BYTES_PER_PIXEL[name.partition("(")[0]][differentiable]
        self.model_loader = LazyModel(load, device, name=name)

    @property
    def model(self) -> Any:
        """The `CLIPModel` of transformers; loads it if need be."""
        network: Any = self._loader.get()
        return network.model

    def _rows_at_once(self, size: Sequence[int], device: torch.device) -> int:
        if self.batch_size is not None or not self.resize:
            return super()._rows_at_once(size, device)
        share = min(1.0, _SEEN_PIXELS / (size[0] * size[1]))  # of the pixels that the network sees
        return rows_at_once(size, device, bytes_per_pixel=_RESIZED_BYTES + share * self.bytes_per_pixel)

    def _network(self, images: Tensor) -> "Network":
        network: Any = self._loader.ready(images)
        return network

    def _texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit features of prompts, `[b, width]` float32."""
        texts: _Texts = self._loader.derived("texts", partial(_Texts, self.name))
        return texts(prompts)


class _PromptReward(_CLIPReward):
    """A reward by the cosine between the features of an image and of its prompt."""

    needs_prompts = True

    @abstractmethod
    def _scaled(self, cosines: Tensor, network: "Network") -> Tensor:
        """Scores of cosines `[b]`."""

    def _prepared(self, images: Tensor, network: "Network") -> Tensor:
        return network.cropped(images)

    def score_batch(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """One score for each image and its prompt."""
        network = self._network(images)
        features = network.image_features(self._prepared(images, network))
        return self._scaled((features * self._texts(prompts)).sum(1), network)


@final
class CLIPScoreReward(_PromptReward):
    """CLIPScore: how well an image shows what its prompt says, 2.5 max(cosine, 0) by CLIP ViT-B/32.

    The image is resized to 224 pixels on its shorter side and its middle is scored; an image far from square loses the
    rest. Prompts are cut after 77 tokens. Most scores lie in [0, 1]. Needs the extra `vlm`.

    Args:
        weights: Hub id or folder of a CLIP checkpoint of transformers; None = openai/clip-vit-base-patch32, as in the
            paper.
        prefix: Put before each prompt, as in the paper; trainers leave it away (`""`).
        scale: The factor; with 1 the score is the cosine where it is positive, and torchmetrics prints that of 100.
        dtype: The dtype of the weights; scores are float32.
        differentiable: keep the graph from scores to pixels.
        device: where the weights live; None = the GPU of the first images, else the current CUDA device if there is
            one, else the CPU.
        batch_size: images per run of the network; None = as many as fit the budget of memory.

    Raises:
        ValueError: `scale` is not positive.
        ImportError: at the first call, if transformers is not installed.
        OSError: at the first call, if the weights cannot be downloaded.

    Example:
        >>> CLIPScoreReward(prefix="", scale=1.0).bounds  # nothing is loaded yet
        (0.0, 1.0)

    References:
        Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", 2021,
        https://arxiv.org/abs/2104.08718
    """

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        prefix: str = "A photo depicts ",
        scale: float = 2.5,
        dtype: torch.dtype = torch.float32,
        differentiable: bool = False,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
    ) -> None:
        if not scale > 0:
            raise ValueError(f"CLIPScoreReward expected `scale` > 0, got {scale}.")
        self.prefix, self.scale = prefix, scale
        self.bounds: Bounds = (0.0, float(scale))
        name = name_with(self, "clipscore", weights=weights, prefix=prefix, scale=scale, dtype=dtype)
        load = partial(_load, name, weights or CLIP_B32, dtype)
        super().__init__(name, load, differentiable, device, batch_size)

    def _texts(self, prompts: Sequence[str]) -> Tensor:
        return super()._texts([self.prefix + _checked(self.name, prompt) for prompt in prompts])

    def _scaled(self, cosines: Tensor, network: "Network") -> Tensor:
        return (self.scale * cosines).clamp(0, self.scale)


@final
class PickScoreReward(_PromptReward):
    """PickScore: which image people would pick for a prompt; 100 times a cosine, most often 16 to 26.

    Compare scores of one prompt only. The image is resized to 224 pixels on its shorter side and its middle is scored;
    prompts are cut after 77 tokens. Trainers that divide by 26 get what `iqareward.load("pickscore[0, 26]")` gives.
    Needs the extra `vlm`.

    Args:
        weights: Hub id or folder; None = yuvalkirstain/PickScore_v1.
        dtype: The dtype of the weights; scores are float32.
        differentiable: keep the graph from scores to pixels.
        device: where the weights live; None = the GPU of the first images, else the current CUDA device if there is
            one, else the CPU.
        batch_size: images per run of the network; None = as many as fit the budget of memory.

    Raises:
        ImportError: at the first call, if transformers is not installed.
        OSError: at the first call, if the weights cannot be downloaded.

    Example:
        >>> PickScoreReward().needs_prompts  # nothing is loaded yet
        True

    References:
        Kirstain et al., "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation", 2023,
        https://arxiv.org/abs/2305.01569
    """

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        differentiable: bool = False,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
    ) -> None:
        name = name_with(self, "pickscore", weights=weights, dtype=dtype)
        load = partial(_load, name, weights or PICKSCORE, dtype)
        super().__init__(name, load, differentiable, device, batch_size)

    def _scaled(self, cosines: Tensor, network: "Network") -> Tensor:
        return network.model.logit_scale.exp() * cosines


@final
class HPSv2Reward(_PromptReward):
    """HPSv2.1: how people would rank an image among those of its prompt; a cosine, most often 0.15 to 0.35.

    Papers print 100 times the score. Compare scores of one prompt only. As published, the whole image is scored,
    resized to 224 pixels on its longer side and padded with black to a square; prompts are cut after 77 tokens. The
    authors' code runs in half precision on a GPU, which moves the fourth decimal. Needs the extra `vlm`.

    Args:
        weights: Hub id of a repository with `HPS_v2.1_compressed.pt`, a folder with it, or a file in the layout of
            open_clip (version 2.0 has the same); None = xswu/HPSv2.
        base: Hub id or folder with the configuration and the tokenizer of the CLIP ViT-H/14 that it was made of; None =
            laion/CLIP-ViT-H-14-laion2B-s32B-b79K, without its weights.
        dtype: The dtype of the weights; scores are float32.
        differentiable: keep the graph from scores to pixels.
        device: where the weights live; None = the GPU of the first images, else the current CUDA device if there is
            one, else the CPU.
        batch_size: images per run of the network; None = as many as fit the budget of memory.

    Raises:
        ImportError: at the first call, if transformers is not installed.
        OSError: at the first call, if the weights cannot be downloaded.

    Example:
        >>> HPSv2Reward(weights="HPS_v2.1_compressed.pt").bounds  # nothing is loaded yet
        (-1.0, 1.0)

    References:
        Wu et al., "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image
        Synthesis", 2023, https://arxiv.org/abs/2306.09341
    """

    bounds: Bounds = (-1.0, 1.0)

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        base: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        differentiable: bool = False,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
    ) -> None:
        name = name_with(self, "hpsv2", weights=weights, base=base, dtype=dtype)
        load = partial(_load, name, base or CLIP_H14, dtype, open_clip=weights or HPSV2)
        super().__init__(name, load, differentiable, device, batch_size)

    def _prepared(self, images: Tensor, network: "Network") -> Tensor:
        return network.padded(images)

    def _scaled(self, cosines: Tensor, network: "Network") -> Tensor:
        return cosines.clamp(-1, 1)  # rounding errors


@final
class LAIONAestheticReward(_CLIPReward):
    """LAION's aesthetic predictor, version 2: how much people like the look of an image, about 1 to 10.

    Five linear layers on the unit features of CLIP ViT-L/14. Of the English images of LAION-5B a quarter score 5 or
    more, one in two hundred 6. The image is resized to 224 pixels on its shorter side and its middle is scored, so that
    fine distortions hardly count. Needs the extra `vlm`.

    Args:
        weights: The file `sac+logos+ava1-l14-linearMSE.pth` of the authors' repository, or a file, a folder or a hub id
            with one of the same layout; None = from torch's cache, or downloaded.
        base: Hub id or folder of CLIP ViT-L/14; None = openai/clip-vit-large-patch14.
        dtype: The dtype of the weights of CLIP; scores are float32.
        differentiable: keep the graph from scores to pixels.
        device: where the weights live; None = the GPU of the first images, else the current CUDA device if there is
            one, else the CPU.
        batch_size: images per run of the network; None = as many as fit the budget of memory.

    Raises:
        ImportError: at the first call, if transformers is not installed.
        OSError: at the first call, if weights cannot be downloaded.

    Example:
        >>> LAIONAestheticReward().needs_prompts  # nothing is loaded yet
        False

    References:
        Schuhmann et al., "LAION-5B: An open large-scale dataset for training next generation image-text models", 2022,
        https://arxiv.org/abs/2210.08402
        Schuhmann, "CLIP+MLP Aesthetic Score Predictor", 2022,
        https://github.com/christophschuhmann/improved-aesthetic-predictor
    """

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        base: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        differentiable: bool = False,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
    ) -> None:
        name = name_with(self, "laion_aesthetic", weights=weights, base=base, dtype=dtype)
        load = partial(_load_laion, name, base or CLIP_L14, weights, dtype)
        super().__init__(name, load, differentiable, device, batch_size)

    def score_batch(self, images: Tensor) -> Tensor:
        """One score for each image."""
        network = self._network(images)
        return network.head(network.image_features(network.cropped(images))).squeeze(1)


@final
class CLIPIQAReward(_CLIPReward):
    """CLIP-IQA's antonym prompts on a vision transformer: how much nearer an image is to "Good photo." than to "Bad".

    The score is the probability of the first prompt of a pair, and the mean over pairs if there are several. Other
    prompts ask for other attributes: "Sharp photo." and "Blurry photo.". As in the paper, an image is not resized; its
    positions are interpolated. The paper's figures are those of CLIP's ResNet-50 without positions, which transformers
    does not have, so these scores are not comparable with them. Needs the extra `vlm`.

    Args:
        positive: The prompt of a high score, or one for each pair.
        negative: Its antonym, or one for each pair.
        weights: Hub id or folder of a CLIP checkpoint of transformers; None = openai/clip-vit-base-patch16.
        resize: Score the middle of the image at 224 pixels instead, as torchmetrics does with these weights.
        dtype: The dtype of the weights; scores are float32.
        differentiable: keep the graph from scores to pixels.
        device: where the weights live; None = the GPU of the first images, else the current CUDA device if there is
            one, else the CPU.
        batch_size: images per run of the network; None = as many as fit the budget of memory.

    Raises:
        ValueError: not as many positive as negative prompts, or none.
        ImportError: at the first call, if transformers is not installed.
        OSError: at the first call, if the weights cannot be downloaded.

    Example:
        >>> CLIPIQAReward(positive=["Sharp photo.", "Clean photo."], negative=["Blurry photo.", "Noisy photo."]).bounds
        (0.0, 1.0)

    References:
        Wang et al., "Exploring CLIP for Assessing the Look and Feel of Images", 2023, https://arxiv.org/abs/2207.12396
    """

    bounds: Bounds = (0.0, 1.0)

    def __init__(
        self,
        *,
        positive: str | Sequence[str] = "Good photo.",
        negative: str | Sequence[str] = "Bad photo.",
        weights: str | Path | None = None,
        resize: bool = False,
        dtype: torch.dtype = torch.float32,
        differentiable: bool = False,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
    ) -> None:
        sides = [[side] if isinstance(side, str) else list(side) for side in (positive, negative)]
        if not sides[0] or len(sides[0]) != len(sides[1]):
            raise ValueError(
                "CLIPIQAReward expected as many `positive` as `negative` prompts, at least one, got "
                f"{len(sides[0])} and {len(sides[1])}."
            )
        self.prompts, self.resize = sides[0] + sides[1], resize
        texts = {"positive": positive, "negative": negative}
        name = name_with(self, "clipiqa", **texts, weights=weights, resize=resize, dtype=dtype)
        load = partial(_load, name, weights or CLIP_B16, dtype)
        super().__init__(name, load, differentiable, device, batch_size)

    def score_batch(self, images: Tensor) -> Tensor:
        """One score for each image."""
        network = self._network(images)
        if min(images.shape[2:]) < network.model.config.vision_config.patch_size and not self.resize:
            return images.new_full((images.shape[0],), torch.nan)
        pixels = network.cropped(images) if self.resize else network.normalized(to_levels(images) / 255)
        features = network.image_features(pixels)
        cosines = features @ self._texts(self.prompts).T
        good, bad = (network.model.logit_scale.exp() * cosines).chunk(2, dim=1)
        return (good - bad).sigmoid().mean(1)  # what softmax over the pair gives


@final
class RALIReward(_CLIPReward):
    """RALI: quality by where an image lies among prototypes whose quality Q-Insight put into words.

    A CLIP of 0.3 B parameters with about the accuracy of Q-Insight in the paper. The score is the mean of the
    prototypes' scores, weighted by how near they are: on the scale of the weights, whose bounds are not published. The
    image is resized to the side of its CLIP (336 pixels) and its middle is scored. Needs the extra `vlm`.

    A part of the published weights, the mean of a principal component analysis, is only in a pickle of scikit-learn,
    which this package does not open. Write it to a file once, in an environment with scikit-learn and joblib:
    `python -c "import joblib, numpy; numpy.save('pca_mean.npy', joblib.load('pca.pkl').mean_)"`.

    Args:
        weights: The published folder (hub id and folder in it), or a folder with `ckpt.pt`, and the configuration of
            its CLIP in `best`.
        pca_mean: The mean; None = `pca_mean.npy` beside `ckpt.pt`.
        dtype: The dtype of the weights of CLIP; scores are float32.
        differentiable: keep the graph from scores to pixels.
        device: where the weights live; None = the GPU of the first images, else the current CUDA device if there is
            one, else the CPU.
        batch_size: images per run of the network; None = as many as fit the budget of memory.

    Raises:
        ImportError: at the first call, if transformers is not installed.
        OSError: at the first call, if weights cannot be downloaded, or the mean is missing.

    Example:
        >>> RALIReward(pca_mean="pca_mean.npy").needs_prompts  # nothing is loaded yet
        False

    References:
        Zhao et al., "Reasoning as Representation: Rethinking Visual Reinforcement Learning in Image Quality
        Assessment", 2026, https://arxiv.org/abs/2510.11369
    """

    def __init__(
        self,
        *,
        weights: str | Path = RALI,
        pca_mean: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        differentiable: bool = False,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
    ) -> None:
        name = name_with(self, "rali", weights=weights, pca_mean=pca_mean, dtype=dtype)
        super().__init__(name, partial(_load_rali, name, weights, pca_mean, dtype), differentiable, device, batch_size)

    def score_batch(self, images: Tensor) -> Tensor:
        """One score for each image."""
        network = self._network(images)
        return network.head(network.projected(network.cropped(images)))


class _Prototypes(nn.Module):
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


@final
class _Texts:
    """The features of the latest prompts, computed once for each; safe for any thread and stream."""

    def __init__(self, name: str, network: Network) -> None:
        self._name, self._network, self._lock = name, network, ProcessLock()
        self._known = OrderedDict[str, tuple[Tensor, Any]]()

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """`[b, width]` float32."""
        wanted = list(dict.fromkeys(_checked(self._name, prompt) for prompt in prompts))
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


def _checked(name: str, prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise TypeError(f"{name} expected `prompts` as texts, got {type(prompt).__name__}.")
    return prompt


def _load(
    name: str,
    source: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    open_clip: str | Path | None = None,
) -> Network:
    """A CLIP model with its tokenizer, with the weights of `source` or those of a file in the layout of open_clip."""
    only = None if open_clip is None else _PROCESSOR_FILES
    folder = checkpoint_folder(source, also=_PROCESSOR_FILES, only=only)
    model = _empty(name, folder)
    if open_clip is None:
        tensors = _stored(folder, _shapes(model))
    else:
        file = weight_file(open_clip, name=HPSV2_FILE, inner="state_dict")
        tensors = _from_open_clip(file, _shapes(model))
    _fill(model, tensors, dtype)
    return Network(model, _colors(name, folder, model), _tokenizer(name, folder, model)).to(device)


def _load_laion(
    name: str, source: str | Path, weights: str | Path | None, dtype: torch.dtype, device: torch.device
) -> Network:
    """The image tower of a CLIP model with the aesthetic head."""
    folder = checkpoint_folder(source, also=_PROCESSOR_FILES)
    model = _empty(name, folder)
    del model.text_model, model.text_projection
    _fill(model, _stored(folder, _shapes(model)), dtype)
    widths = (int(model.config.projection_dim), 1024, 128, 64, 16, 1)
    layers = {}
    # the numbers that the authors' layers have, with layers of dropout between the first four
    for number, ins, outs in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        layers[f"layers.{number}"] = (outs, ins)
    file = weight_file(_laion_head() if weights is None else weights)
    shapes = {f"{layer}.{part}": size for layer, (outs, ins) in layers.items()
              for part, size in (("weight", (outs, ins)), ("bias", (outs,)))}  # fmt: skip
    found = file.take(shapes)
    head = nn.Sequential()
    for layer, (outs, ins) in layers.items():
        linear = nn.Linear(ins, outs, device="meta")
        linear.load_state_dict({part: found[f"{layer}.{part}"].float() for part in ("weight", "bias")}, assign=True)
        head.append(linear)
    return Network(model, _colors(name, folder, model), head=head).to(device)


def _load_rali(
    name: str, source: str | Path, pca_mean: str | Path | None, dtype: torch.dtype, device: torch.device
) -> Network:
    """The image tower of RALI's CLIP with its prototypes."""
    if isinstance(source, Path) or os.path.isdir(source):
        folder = Path(source)
        base = folder / "best"
    else:
        repository, inner = "/".join(source.split("/")[:2]), "/".join(source.split("/")[2:])
        folder = checkpoint_folder(repository, inner=inner, only=["ckpt.pt", "pca.pkl"])
        base = checkpoint_folder(repository, inner=f"{inner}/best", only=_PROCESSOR_FILES)
    mean_file = folder / "pca_mean.npy" if pca_mean is None else Path(pca_mean)
    if not mean_file.is_file():
        raise FileNotFoundError(
            f"{name} needs {mean_file}, the mean in {folder / 'pca.pkl'}, a pickle of scikit-learn that is not opened "
            'here. If you trust it, write the mean where scikit-learn and joblib are installed: python -c "import '
            "joblib, numpy; numpy.save('pca_mean.npy', joblib.load('pca.pkl').mean_)\", and pass pca_mean=<its path>."
        )
    file, model = WeightFile(folder / "ckpt.pt", inner="state_dict"), _empty(name, base)
    known = {*(f"clip.{key}" for key in _shapes(model)), *_RALI_PARTS}
    if unknown := {key for key in file.keys() - known if not key.endswith(".position_ids")}:
        raise ValueError(f"{file.path} holds {listed(unknown)}, which RALI has not.")
    del model.text_model, model.text_projection
    tensors = file.take({f"clip.{key}": shape for key, shape in _shapes(model).items()})
    _fill(model, {key.removeprefix("clip."): value for key, value in tensors.items()}, dtype)
    width, headers = int(model.config.projection_dim), file.headers()
    values = headers["scorer.pca_components"][0][0] if "scorer.pca_components" in headers else 0
    count = headers["scorer.prototypes"][0][0] if "scorer.prototypes" in headers else 0
    sizes = ((width,), (values, width), (count, values), (count,), ())
    parts = file.take(dict(zip(_RALI_PARTS, sizes, strict=True)))
    mean = _mean(mean_file, width)
    head = _Prototypes(mean, {key.removeprefix("scorer."): value for key, value in parts.items()})
    return Network(model, _colors(name, base, model), head=head).to(device)


def _mean(file: Path, width: int) -> Tensor:
    try:
        mean = torch.from_numpy(np.load(file, allow_pickle=False))
    except Exception as error:  # a damaged file makes numpy raise anything
        raise ValueError(f"{file} cannot be read as an array of numpy: {type(error).__name__}: {error}") from error
    if tuple(mean.shape) != (width,):
        raise ValueError(f"{file} expected a mean of shape [{width}], got {list(mean.shape)}.")
    check_values(file, {"mean": mean})
    return mean


def _laion_head() -> Path:
    """The published head: from torch's cache, or downloaded into it."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / LAION_FILE
    try:
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(LAION_URL, str(file), hash_prefix=_LAION_SHA256, progress=False)
    except (OSError, RuntimeError) as error:  # the latter where the file does not have the published hash
        raise OSError(
            f"laion_aesthetic needs {LAION_FILE}, which is not in torch's cache and could not be downloaded ({error}). "
            f"Download {LAION_URL} elsewhere and put it at {file}, or pass weights='<path of the file>'."
        ) from error
    return file


def _empty(name: str, folder: Path) -> Any:
    """A CLIP model of a folder's configuration, without weights."""
    from iqareward.rewards.vlm.checkpoints import require_transformers

    transformers = require_transformers(name)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "clip":
        raise ValueError(f"{folder / 'config.json'} expected a model of type 'clip', got {config.get('model_type')!r}.")
    try:
        with torch.device("meta"):
            return transformers.CLIPModel(transformers.CLIPConfig.from_dict(config))
    except Exception as error:  # transformers raises anything for numbers that contradict each other
        raise ValueError(f"{name} cannot use {folder / 'config.json'}: {type(error).__name__}: {error}") from error


def _shapes(model: nn.Module) -> dict[str, Shape]:
    return {key: value.shape for key, value in model.state_dict().items()}


def _stored(folder: Path, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The weights of a folder in the layout of transformers."""
    tensors = dict[str, Tensor]()
    for file in open_weights(folder):
        tensors |= file.take({key: shape for key, shape in shapes.items() if key in file.keys()})  # noqa: SIM118
    if lost := shapes.keys() - tensors.keys():
        raise ValueError(f"{folder} lacks weights of the CLIP model that its config.json describes: {listed(lost)}.")
    return tensors


def _from_open_clip(file: WeightFile, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The weights of a file in the layout of open_clip, by the names and in the shapes of transformers."""
    tensors = dict[str, Tensor]()
    for key, shape in shapes.items():
        source, part = key, _FUSED.search(key)
        for ours, theirs in _OPEN_CLIP:
            source = source.replace(ours, theirs)
        if part:
            whole = file.tensor(_FUSED.sub(r"attn.in_proj_\2", source), (3 * shape[0], *shape[1:]))
            tensors[key] = whole.chunk(3)["qkv".index(part[1])].clone()
        elif source.endswith(("visual.proj", "text_projection")):
            tensors[key] = file.tensor(source, shape[::-1]).T.contiguous()
        else:
            tensors[key] = file.tensor(source, shape).clone()
    check_values(file.path, tensors)
    return tensors


def _fill(model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    # the temperature stays in float32: in bfloat16 it would be 98.9 instead of 100
    kept = {key: value.to(torch.float32 if key == "logit_scale" else dtype) for key, value in tensors.items()}
    model.load_state_dict(kept, assign=True)
    for tower in (getattr(model, "text_model", None), model.vision_model):
        if tower is not None:  # a table of numbers that no file has
            embeddings = tower.embeddings
            embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]


def _colors(name: str, folder: Path, model: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels, by the folder's image processor or else OpenAI's."""
    from transformers import CLIPImageProcessor

    has_own = _any_file(folder, ("preprocessor_config.json", "processor_config.json"))
    processor: Any = CLIPImageProcessor.from_pretrained(folder) if has_own else CLIPImageProcessor()
    side, crop, size = int(model.config.vision_config.image_size), processor.crop_size, processor.size
    as_expected = {"height": side, "width": side} == dict(crop) and size["shortest_edge"] == side
    if has_own and not (as_expected and int(processor.resample) == _BICUBIC):
        raise ValueError(
            f"{name} expected a processor that resizes the shorter side to {side} pixels by bicubic interpolation and "
            f"cuts out the middle, got {folder} with size {dict(size)}, crop {dict(crop)} and resampling "
            f"{processor.resample}."
        )
    return tuple(map(float, processor.image_mean)), tuple(map(float, processor.image_std))


def _tokenizer(name: str, folder: Path, model: Any) -> Any:
    """The tokenizer of a folder, which ends each text with one token."""
    from transformers import CLIPTokenizer

    if not _any_file(folder, ("tokenizer.json", "vocab.json")):  # transformers would make an empty one
        raise FileNotFoundError(f"{folder} expected tokenizer.json, or vocab.json and merges.txt, got neither.")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    if len(tokenizer) > model.config.text_config.vocab_size:
        raise ValueError(
            f"{name} got {folder} with a tokenizer of {len(tokenizer)} tokens, expected at most the "
            f"{model.config.text_config.vocab_size} of the model."
        )
    return tokenizer


def _any_file(folder: Path, names: Iterable[str]) -> bool:
    return any((folder / name).is_file() for name in names)
