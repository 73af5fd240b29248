"""A scripted agent that calls tools in TRL's own tool loop: byte tokens, Qwen's chat template, and one layer."""

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
import trl
from datasets import Dataset
from PIL import Image
from torch import Tensor

VISION = ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")
SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>", *VISION)
SCRIPT = (
    '<tool_call>\n{"name": "brightened", "arguments": {"factor": 1.5}}\n</tool_call><|im_end|>',
    "done<|im_end|>",
)


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (level,) * 3)


def brightened(factor: float) -> list:
    """Makes the image brighter.

    Args:
        factor: of the pixel values.
    """
    return [{"type": "image", "image": grey(int(80 * factor))}, {"type": "text", "text": "brighter"}]


class Darkroom:
    """An environment of TRL: its tools change an image that the model never sees."""

    def reset(self, level: int, **columns: Any) -> None:
        self.image = grey(level)

    def brightened(self, factor: float) -> str:
        """Makes the image brighter.

        Args:
            factor: of the pixel values.
        """
        self.image = self.image.point(lambda value: int(value * factor))
        return "brighter"


class Script:
    """Says the lines of `SCRIPT` in turn, whatever it is asked."""

    turn = 0

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        line = torch.tensor(self.tokenizer(SCRIPT[self.turn % 2], add_special_tokens=False)["input_ids"])
        self.turn += 1
        return torch.cat([input_ids, line.expand(len(input_ids), -1)], 1)


class Reader(Script, transformers.LlamaForCausalLM):
    """A model of text."""


class Viewer(Script, transformers.Qwen3VLForConditionalGeneration):
    """A model of text and images."""


TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def reader() -> tuple[Any, Any]:
    """A text model, and its tokenizer."""
    tokenizer = _tokenizer("qwen3")
    ends = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    return Reader(
        transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, **TEXT, **ends)
    ), tokenizer


def viewer() -> tuple[Any, Any]:
    """A vision-language model, and its processor; an image of 32x32 pixels is four tokens."""
    tokenizer = _tokenizer("qwen3_vl")
    start, image, video, end = (SPECIAL.index(token) for token in VISION)
    rotation = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {**TEXT, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 4096, "rope_scaling": rotation}
    eye = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen3VLConfig(
        text_config={**text, "vocab_size": len(tokenizer), "pad_token_id": 0},
        vision_config={**eye, "patch_size": 8, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32}
    processor = transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=8, size=size),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(patch_size=8),
        chat_template=tokenizer.chat_template,
    )
    return Viewer(config), processor


def _tokenizer(template: str) -> Any:
    """Bytes, and the chat template of TRL that has this name."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={token: i for i, token in enumerate((*SPECIAL, *alphabet))}, merges=[])
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens(list(SPECIAL))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<|im_end|>")
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    return tokenizer


def build(
    trainer: type,
    folder: Path,
    reward: Any,
    columns: dict[str, Any] | None = None,
    *,
    agent: Any = reader,
    **tools: Any,
) -> Any:
    """A GRPO trainer of the scripted agent; `tools` are the trainer's `tools` or `environment_factory`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processing = agent()
    model.tokenizer = getattr(processing, "tokenizer", processing)
    sizes = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 512, "max_steps": 1}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    args = trl.GRPOConfig(str(folder), use_cpu=True, bf16=False, **sizes, **quiet)
    question = [{"role": "user", "content": "restore"}]
    rows = Dataset.from_dict({"prompt": [question] * 2, "level": [80, 80]} | (columns or {}))
    return trainer(model, [reward], args, train_dataset=rows, processing_class=processing, **tools)
