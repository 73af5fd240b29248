"""The published protocol of VisualQuality-R1, rebuilt from public parts: Pillow, the processor, cached sampling."""

from typing import Any

import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from iqareward.rewards.vlm.presets import VISUALQUALITY_R1


def published_texts(model: Any, processor: Any, pictures: list[Image.Image], question: str, tokens: int) -> list[str]:
    """What the model writes about a batch of pictures, each answer `tokens` long.

    Random weights would never end an answer, and a trained model ends it after a length of its own; so the length is
    set, and everything else is as in the authors' README.
    """
    factor = processor.image_processor.patch_size * processor.image_processor.merge_size
    resized = []
    for picture in pictures:
        height, width = smart_resize(picture.height, picture.width, factor)
        resized.append(picture.resize((width, height)))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, add_vision_id=True)
    inputs = processor(text=[text] * len(resized), images=resized, padding=True, return_tensors="pt").to(model.device)
    sampling = VISUALQUALITY_R1.sampling
    with torch.no_grad():
        written = model.generate(
            **inputs,
            do_sample=True,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            use_cache=True,
        )
    return processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
