"""Tiny random vision-language models of every supported family, with tokenizers and processors made on the spot."""

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("transformers", reason="needs the extra vlm")

import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from iqareward.rewards.vlm.presets import HPSV3_QUESTION

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
FAMILIES = (*QWEN, "llava_onevision", "internvl")
WORDS = (" excellent", " good", " fair", " poor", " bad", "answer", "Picture", " quality")
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>", "<image>", "<video>", "<img>", "</img>", "<IMG_CONTEXT>",
)  # fmt: skip

_IMAGE = {
    "llava_onevision": "<image>",
    "internvl": "<IMG_CONTEXT>\n",
    **dict.fromkeys(QWEN, "{% if add_vision_id %}Picture 1: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"),
}
_GENERATION = {
    # as small models of that family do: thinking is open unless it is disabled
    "qwen3_5": "<|im_start|>assistant\n<think>\n{% if enable_thinking is false %}\n\n</think>\n\n{% endif %}",
}
_NAMED = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}  # fmt: skip
_SYSTEM = dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")


def chat_template(family: str) -> str:
    """A template of the family's shape."""
    system = _SYSTEM.get(family, "")
    return (
        f"{{% if messages[0].role != 'system' %}}{system}{{% endif %}}"
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% for part in message.content %}"
        f"{{% if part.type == 'image' %}}{_IMAGE[family]}{{% else %}}{{{{ part.text }}}}{{% endif %}}"
        "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}" + _GENERATION.get(family, "<|im_start|>assistant\n") + "{% endif %}"
    )


def tokenizer(words: tuple[str, ...] = WORDS, **named: str) -> Any:
    """Byte-level BPE of the Qwen kind that knows single bytes, `words`, and special tokens, some of them by name."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary, merges = {token: index for index, token in enumerate(alphabet)}, []
    for word in words:
        pieces = list(word.replace(" ", "Ġ"))
        for end in range(1, len(pieces)):
            pair, joined = ("".join(pieces[:end]), pieces[end]), "".join(pieces[: end + 1])
            if joined not in vocabulary:
                vocabulary[joined] = len(vocabulary)
                merges.append(pair)
    tokens = {f"special_{i}": token for i, token in enumerate(SPECIAL)} | named
    return transformers.Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, pad_token="<|endoftext|>", extra_special_tokens=tokens
    )


def processor(family: str, words: tuple[str, ...] = WORDS) -> Any:
    """The family's processor for tiny images."""
    names = _NAMED if family == "internvl" else {}
    tok, template = tokenizer(words, **names), chat_template(family)
    if family == "llava_onevision":
        pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
        images = LlavaOnevisionImageProcessor(size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints)
        return transformers.LlavaOnevisionProcessor(
            images, tok, LlavaOnevisionVideoProcessor(), num_image_tokens=4, vision_feature_select_strategy="full",
            chat_template=template,
        )  # fmt: skip
    if family == "internvl":
        images = GotOcr2ImageProcessor(size={"height": 28, "width": 28}, max_patches=4, crop_to_patches=True)
        return transformers.InternVLProcessor(
            images, tok, InternVLVideoProcessor(), image_seq_length=1, chat_template=template
        )
    patch = 14 if family in ("qwen2_vl", "qwen2_5_vl") else 16
    limits = {"shortest_edge": (2 * patch) ** 2, "longest_edge": 36 * patch**2}
    colours = {} if patch == 14 else {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = Qwen2VLImageProcessor(patch_size=patch, size=limits, **colours)
    if family == "qwen2_vl":
        return transformers.Qwen2VLProcessor(images, tok, Qwen2VLVideoProcessor(), chat_template=template)
    if family == "qwen2_5_vl":
        return transformers.Qwen2_5_VLProcessor(images, tok, Qwen2VLVideoProcessor(), chat_template=template)
    return transformers.Qwen3VLProcessor(images, tok, Qwen3VLVideoProcessor(), chat_template=template)


def _text(tok: Any, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0} | more.pop("rope", {})
    return {
        "vocab_size": len(tok), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope,
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": tok.eos_token_id,
    } | more  # fmt: skip


def config(family: str, tok: Any, language: Any = transformers.Qwen2Config, **more: Any) -> Any:
    """A configuration with two layers of everything; LLaVA-OneVision and InternVL take a `language` model's."""
    ids = {name: tok.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    ids |= {"vision_end": tok.convert_tokens_to_ids("<|vision_end|>")}
    qwen = {
        "image_token_id": ids["image_pad"], "video_token_id": ids["video_pad"],
        "vision_start_token_id": ids["vision_start"], "vision_end_token_id": ids["vision_end"],
        "tie_word_embeddings": False,
    }  # fmt: skip
    tower = {"hidden_size": 16, "intermediate_size": 24, "depth": 2, "num_heads": 2, "out_hidden_size": 32}
    if family == "qwen2_vl":
        tower = {"embed_dim": 16, "hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
        text = _text(tok, rope={"mrope_section": [1, 1, 2]})
        return transformers.Qwen2VLConfig(text_config=text, vision_config=tower, **qwen)
    if family == "qwen2_5_vl":
        text = _text(tok, rope={"mrope_section": [1, 1, 2]})
        # windows of two tokens a side, so that some images have ragged ones
        tower |= {"window_size": 56, "fullatt_block_indexes": [1]}
        return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **qwen)
    if family == "qwen3_vl":
        text = _text(tok, head_dim=8, rope={"mrope_section": [2, 1, 1], "mrope_interleaved": True})
        tower |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        return transformers.Qwen3VLConfig(text_config=text, vision_config=tower, **qwen)
    if family == "qwen3_5":
        rope = {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 1.0}
        text = _text(
            tok, head_dim=8, rope=rope, layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        )  # fmt: skip
        tower |= {"num_position_embeddings": 16}
        return transformers.Qwen3_5Config(text_config=text, vision_config=tower, **qwen)
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = language(**_text(tok, **more))
    if family == "llava_onevision":
        return transformers.LlavaOnevisionConfig(
            text_config=text,
            vision_config=transformers.SiglipVisionConfig(**tower, image_size=28, patch_size=14),
            image_token_id=tok.convert_tokens_to_ids("<image>"), video_token_id=tok.convert_tokens_to_ids("<video>"),
            image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]],
            vision_feature_select_strategy="full", tie_word_embeddings=False,
        )  # fmt: skip
    return transformers.InternVLConfig(
        text_config=text,
        vision_config=transformers.InternVLVisionConfig(**tower, image_size=(28, 28), patch_size=(14, 14)),
        image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=1, tie_word_embeddings=False,
    )  # fmt: skip


def model(family: str, tok: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A seeded model whose output depends on the pixels visibly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for the vectors, which keep the library's own initial values
        made = transformers.AutoModelForImageTextToText.from_config(config(family, tok, **options))
    rng = torch.Generator().manual_seed(0)
    weights = 0.2 if family == "llava_onevision" else 0.3  # its tower has no norm at the end
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                scale = 1.0 if "embed" in name else weights
                parameter.copy_(scale * torch.randn(parameter.shape, generator=rng))
    return made.to(dtype).requires_grad_(False).eval()


@cache
def pair(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model and processor of a family, made once."""
    made = processor(family)
    return model(family, made.tokenizer, dtype), made


# so that the instruction is some hundreds of tokens rather than thousands of bytes
HPSV3_WORDS = (*WORDS, *sorted(set(re.findall(r" ?[A-Za-z]+", HPSV3_QUESTION)) - set(WORDS)))


class HPSv3Files(NamedTuple):
    """A tiny HPSv3: the folder of its base, its weights, and the library's model and the head with those weights."""

    base: Path
    weights: Path
    model: Any
    head: dict[str, Tensor]


def hpsv3_files(folder: Path) -> HPSv3Files:
    """Laid out as published: names of before transformers 4.52, the reward token's row behind the vocabulary."""
    base, weights = folder / "base", folder / "hub" / "HPSv3.safetensors"
    weights.parent.mkdir()
    words = processor("qwen2_vl", HPSV3_WORDS)
    config("qwen2_vl", words.tokenizer).save_pretrained(base)
    words.save_pretrained(base)
    words.tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    made, rng = model("qwen2_vl", words.tokenizer), torch.Generator().manual_seed(1)
    shapes = {"0": (1024, 32), "3": (16, 1024), "5": (2, 16)}
    head = {f"{key}.weight": torch.randn(shape, generator=rng) / shape[1] ** 0.5 for key, shape in shapes.items()}
    head |= {f"{key}.bias": torch.randn(shape[0], generator=rng) / 4 for key, shape in shapes.items()}
    stored = {
        key.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value.clone()
        for key, value in made.state_dict().items()
    }
    save_file(stored | {f"rm_head.{key}": value for key, value in head.items()}, weights)
    return HPSv3Files(base, weights, made, head)


def images(count: int, height: int = 64, width: int = 96, seed: int = 0) -> Tensor:
    """`[count, 3, height, width]` of whole levels, so that rounding to 8 bits changes nothing."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(40, 216, (count, 3, height, width), generator=rng).float() / 255
