"""Rewards by CLIP: CLIPScore, PickScore, HPSv2, LAION's aesthetic predictor, CLIP-IQA's prompts, and RALI."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from iqareward.functional._chunks import rows_at_once
from iqareward.functional.resize import to_levels
from iqareward.rewards.clip.checkpoints import (
    CLIP_B16,
    CLIP_B32,
    CLIP_H14,
    CLIP_L14,
    HPSV2,
    PICKSCORE,
    RALI,
    load_clip,
    load_laion,
    load_rali,
)
from iqareward.rewards.clip.network import Network, Texts, checked_prompt
from iqareward.rewards.core import ImageReward
from iqareward.rewards.loading import LazyModel
from iqareward.rewards.options import name_with
from iqareward.types import Bounds

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

    def _network(self, images: Tensor) -> Network:
        network: Any = self._loader.ready(images)
        return network

    def _texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit features of prompts, `[b, width]` float32."""
        texts: Texts = self._loader.derived("texts", partial(Texts, self.name))
        return texts(prompts)


class _PromptReward(_CLIPReward):
    """A reward by the cosine between the features of an image and of its prompt."""

    needs_prompts = True

    @abstractmethod
    def _scaled(self, cosines: Tensor, network: Network) -> Tensor:
        """Scores of cosines `[b]`."""

    def _prepared(self, images: Tensor, network: Network) -> Tensor:
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
        load = partial(load_clip, name, weights or CLIP_B32, dtype)
        super().__init__(name, load, differentiable, device, batch_size)

    def _texts(self, prompts: Sequence[str]) -> Tensor:
        return super()._texts([self.prefix + checked_prompt(self.name, prompt) for prompt in prompts])

    def _scaled(self, cosines: Tensor, network: Network) -> Tensor:
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
        load = partial(load_clip, name, weights or PICKSCORE, dtype)
        super().__init__(name, load, differentiable, device, batch_size)

    def _scaled(self, cosines: Tensor, network: Network) -> Tensor:
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
        load = partial(load_clip, name, base or CLIP_H14, dtype, open_clip=weights or HPSV2)
        super().__init__(name, load, differentiable, device, batch_size)

    def _prepared(self, images: Tensor, network: Network) -> Tensor:
        return network.padded(images)

    def _scaled(self, cosines: Tensor, network: Network) -> Tensor:
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
        load = partial(load_laion, name, base or CLIP_L14, weights, dtype)
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
        load = partial(load_clip, name, weights or CLIP_B16, dtype)
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
        super().__init__(name, partial(load_rali, name, weights, pca_mean, dtype), differentiable, device, batch_size)

    def score_batch(self, images: Tensor) -> Tensor:
        """One score for each image."""
        network = self._network(images)
        return network.head(network.projected(network.cropped(images)))
