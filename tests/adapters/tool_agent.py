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

SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>")
SCRIPT = (
    '<tool_call>\n{"name": "brighten", "arguments": {"factor": 1.5}}\n</tool_call><|im_end|>',
    "done<|im_end|>",
)


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (level,) * 3)


class Darkroom:
    """An environment of TRL: its tools change an image that the model never sees."""

    def reset(self, level: int, **columns: Any) -> None:
        self.image = grey(level)

    def brighten(self, factor: float) -> str:
        """Makes the image brighter.

        Args:
            factor: of the pixel values.
        """
        self.image = self.image.point(lambda value: int(value * factor))
        return "brighter"


class Scripted(transformers.LlamaForCausalLM):
    """Says the lines of `SCRIPT` in turn, whatever it is asked."""

    turn = 0

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        line = torch.tensor(self.tokenizer(SCRIPT[self.turn % 2], add_special_tokens=False)["input_ids"])
        self.turn += 1
        return torch.cat([input_ids, line.expand(len(input_ids), -1)], 1)


def build(trainer: type, folder: Path, reward: Any, columns: dict[str, Any] | None = None, **tools: Any) -> Any:
    """A GRPO trainer of the scripted agent; `tools` are the trainer's `tools` or `environment_factory`."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={token: i for i, token in enumerate((*SPECIAL, *alphabet))}, merges=[])
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens(list(SPECIAL))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<|im_end|>")
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4096, bos_token_id=2, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    agent = Scripted(config)
    agent.tokenizer = tokenizer
    sizes = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 512, "max_steps": 1}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    args = trl.GRPOConfig(str(folder), use_cpu=True, bf16=False, **sizes, **quiet)
    rows = Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": "restore"}]] * 2, "level": [80, 80]} | (columns or {})
    )
    return trainer(agent, [reward], args, train_dataset=rows, processing_class=tokenizer, **tools)
