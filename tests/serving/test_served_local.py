"""One network behind the protocol and in process: the same scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra vlm")

from PIL import Image

from iqareward.rewards.vlm.presets import Q_INSIGHT, Q_REALIGN, VISUALQUALITY_R1, LevelPreset, Ratings
from iqareward.rewards.vlm.rewards import LevelReward, RatingReward
from iqareward.serving import judges
from tests.tolerances import NETWORK_BATCH
from tests.vlm import chat_double, tiny

ONE_DECIMAL = Ratings(1, 5, decimals=1)
PRESETS = {
    "q_realign": Q_REALIGN["quality"],
    "visualquality_r1": replace(VISUALQUALITY_R1, ratings=ONE_DECIMAL),
    "q_insight": replace(Q_INSIGHT, ratings=ONE_DECIMAL),
}
SIDES = {"qwen2_5_vl": (56, 84), "qwen3_vl": (64, 96)}  # that the processors do not resize


def _serving(family: str):
    """A distribution as a server computes it: the request's own messages, the library's processor, a plain forward."""
    model, processor = tiny.pair(family)

    def distribution(request: dict, answer: str, image: np.ndarray) -> dict[str, float]:
        messages = [_in_parts(message) for message in request["messages"]]
        messages[-1]["content"][-1]["text"] = answer
        text = processor.tokenizer.apply_chat_template(
            messages,
            chat_template=processor.chat_template,
            tokenize=False,
            continue_final_message=True,
            **request["chat_template_kwargs"],
        )
        inputs = processor(text=[text], images=[Image.fromarray(image)], return_tensors="pt")
        with torch.no_grad():
            probabilities = model(**inputs).logits[0, -1].double().softmax(-1).tolist()
        return {processor.tokenizer.decode([index]): p for index, p in enumerate(probabilities)}

    return distribution


def _in_parts(message: dict) -> dict:
    """As vLLM hands messages to templates of vision models."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {
        "role": message["role"],
        "content": [{"type": "image"} if part["type"] == "image_url" else dict(part) for part in parts],
    }


@pytest.mark.parametrize("family", SIDES)
@pytest.mark.parametrize("name", PRESETS)
def test_served_equals_local(double, make, monkeypatch, family, name) -> None:
    """Prompt, pixels, tokens and arithmetic all agree; every token is listed, as a random network spreads its mass."""
    monkeypatch.setattr(judges, "TOP_LOGPROBS", 1000)
    monkeypatch.setattr(chat_double, "MAX_LOGPROBS", 1000)
    preset, images = PRESETS[name], tiny.images(3, *SIDES[family])
    double.distribution = _serving(family)
    served = make(preset, scale="mos", min_mass=1e-12)(images)
    pair = tiny.pair(family)
    if isinstance(preset, LevelPreset):
        local = LevelReward(pair, preset, scale="mos")
    else:
        local = RatingReward(pair, preset, scale="mos", min_digit_mass=0.0)
    torch.testing.assert_close(served, local(images), **NETWORK_BATCH)
