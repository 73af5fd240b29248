"""Qwen2.5-VL networks with seeded random weights, and a processor whose prompts are about as long as the real ones."""

import json
from typing import Any

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from iqareward.rewards.vlm.presets import VISUALQUALITY_R1, ZERO_SHOT_LEVELS

_SPECIAL = {
    "image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}  # fmt: skip
_OTHER_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{% for part in message.content %}{% if part.type == 'image' %}"
    "{% if add_vision_id %}Picture 1: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# All texts that are tokenised, so that a learned vocabulary holds their words whole, as the real one does.
_TEXTS = [
    VISUALQUALITY_R1.question,
    VISUALQUALITY_R1.thinking_question,
    f"{ZERO_SHOT_LEVELS.question} {ZERO_SHOT_LEVELS.stem}",
    *(f"is{level}" for level in ZERO_SHOT_LEVELS.levels),
    "system You are a helpful assistant. user Picture assistant",
]


def random_pair(config: Any, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """A frozen model in eval mode, made where it will run, and its processor."""
    processor = make_processor()
    for name, token in _SPECIAL.items():
        setattr(config, f"{name}_token_id", processor.tokenizer.convert_tokens_to_ids(token))
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config = transformers.GenerationConfig(pad_token_id=processor.tokenizer.pad_token_id)
    return model.requires_grad_(False).eval(), processor


def make_processor() -> Any:
    """The family's image processor, and a byte-level tokenizer that was trained on the prompts."""
    learned = ByteLevelBPETokenizer()
    spaced = " ".join(" ".join(text) if text.isdigit() else text for text in _TEXTS)
    learned.train_from_iterator([spaced] * 4, vocab_size=4096, min_frequency=2, show_progress=False)
    vocabulary, merges = learned.get_vocab(), _merges(learned)
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": [*_SPECIAL.values(), *_OTHER_SPECIAL]})
    tokenizer.pad_token = tokenizer.eos_token = "<|endoftext|>"
    tokenizer.padding_side = "left"
    images = Qwen2VLImageProcessor(patch_size=14, size={"shortest_edge": 4 * 28**2, "longest_edge": 16384 * 28**2})
    return transformers.Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=_TEMPLATE)


def _merges(learned: ByteLevelBPETokenizer) -> Any:
    return [tuple(pair) for pair in json.loads(learned._tokenizer.to_str())["model"]["merges"]]


def qwen_config(*, share: int = 1, layers: int = 28, depth: int = 32, vocabulary: int = 152064) -> Any:
    """Qwen2.5-VL-7B's configuration, or one with `1 / share` of its widths and heads of the same size."""
    full = sorted({depth * quarter // 4 - 1 for quarter in range(1, 5)})
    text = {
        "hidden_size": 3584 // share, "intermediate_size": 18944 // share, "num_hidden_layers": layers,
        "num_attention_heads": 28 // share, "num_key_value_heads": max(1, 4 // share), "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    vision = {
        "hidden_size": 1280 // share, "intermediate_size": 3420 // share // 4 * 4, "depth": depth,
        "num_heads": 16 // share, "out_hidden_size": 3584 // share, "patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": full,
    }  # fmt: skip
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
