"""Read CLIP models in the layouts of transformers and of open_clip, their tokenizers, and the heads put on them."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iqareward.rewards.clip.network import Network, Prototypes
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
_PROCESSOR_FILES = ("*.json", "*.txt")
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


def load_clip(
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


def load_laion(
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


def load_rali(
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
    head = Prototypes(mean, {key.removeprefix("scorer."): value for key, value in parts.items()})
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
            f"laion_aesthetic needs {LAION_FILE}, which is not in torch's cache and could not be downloaded. Download "
            f"{LAION_URL} elsewhere and put it at {file}, or pass weights='<path of the file>'. The reason: {error}"
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
