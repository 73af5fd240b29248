"""The smallest restoration agent: a language model of a few words, each an operation on an image, and its trainers."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from iqareward.images import to_images

WORDS = ("<pad>", "<eos>", "restore", "brighten", "darken", "blur", "nothing")
OPERATIONS = {
    "brighten": lambda image: image * 1.25,
    "darken": lambda image: image * 0.8,
    "blur": lambda image: nn.functional.avg_pool2d(image, 3, 1, 1, count_include_pad=False),
}
SEEN: list[tuple[list[Tensor | None], list[Image.Image]]] = []
"""Every batch that `apply_operations` worked on: the images it made, and their ground truth."""


def apply_operations(completions: list[str], degraded: list[Image.Image], **columns: Any) -> list[Tensor | None]:
    """The degraded images after the operations that their completions name; None where none is named."""
    restored = [_run(text, image) for text, image in zip(completions, degraded, strict=True)]
    SEEN.append((restored, columns["clean"]))
    return restored


def _run(text: str, degraded: Image.Image) -> Tensor | None:
    operations = [OPERATIONS[word] for word in text.split() if word in OPERATIONS]
    image = to_images(degraded)
    for operation in operations:
        image = operation(image).clamp(0, 1)
    return image[0] if operations else None


def photographs(count: int, side: int = 16) -> Tensor:
    """`[count, 3, side, side]` smooth images in the middle of the range."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return 0.25 + 0.5 * nn.functional.interpolate(coarse, size=side, mode="bilinear")


def as_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((255 * image).round().byte().movedim(0, -1).numpy())


def data_set(count: int = 4):
    """Prompts, darkened images and their ground truth."""
    from datasets import Dataset

    clean = photographs(count)
    columns = {"clean": [as_pil(image) for image in clean], "degraded": [as_pil(image * 0.64) for image in clean]}
    answers = [" ".join(["brighten"] * (1 + row % 2)) for row in range(count)]
    return Dataset.from_dict({"prompt": ["restore"] * count, "answer": answers, **columns})


def build(
    trainer: type, folder: Path, reward_funcs: list[Any], *, steps: int = 2, data: Any = None, **options: Any
) -> Any:
    """A trainer of TRL on a causal language model of one layer with seeded random weights, on the CPU."""
    import tokenizers
    import transformers
    import trl

    words = tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    processing = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    settings = trl.GRPOConfig if issubclass(trainer, trl.GRPOTrainer) else trl.RLOOConfig
    batch = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 2}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    plain = {"use_cpu": True, "bf16": False, "beta": 0.0}  # a reference model would be loaded by its name
    args = settings(str(folder), max_steps=steps, **{**plain, **batch, **quiet, **options})
    data = data_set() if data is None else data
    return trainer(model, reward_funcs, args, train_dataset=data, processing_class=processing)
