"""The begun answer survives the chat templates of real models, rendered as vLLM and as SGLang render it."""

import importlib.util
from pathlib import Path

import pytest

from iqareward.rewards.vlm.presets import Q_INSIGHT, Q_REALIGN, VISUALQUALITY_R1, ZERO_SHOT_LEVELS, LevelPreset

PRESETS = {
    "levels": ZERO_SHOT_LEVELS,
    "q_realign": Q_REALIGN["aesthetics"],
    "visualquality_r1": VISUALQUALITY_R1,
    "q_insight": Q_INSIGHT,
}
MODELS = ("qwen2_5_vl", "qwen3_vl", "qwen3_5_nothink", "qwen3_5_think", "gemma3")
# Their templates trim messages, and Q-Insight's begun answer ends in a space; see RatingPreset.answer_prefix.
LOST_SPACE = {("qwen3_5_nothink", "q_insight"), ("qwen3_5_think", "q_insight"), ("gemma3", "q_insight")}


def _template(model: str) -> str:
    """The model's template, of which TRL brings a copy."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("trl is not installed")
    return (Path(spec.origin).parent / "chat_templates" / f"{model}.jinja").read_text()


def _render(template: str, preset, answer: str, *, parts: bool) -> tuple[str, str]:
    """As vLLM renders (the template writes the begun answer) and as SGLang does (it is put behind the prompt)."""
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    content = [{"type": "image"}, {"type": "text", "text": preset.question}]
    messages: list[dict] = [{"role": "user", "content": content if preset.image_first else content[::-1]}]
    if preset.system is not None:
        messages.insert(0, {"role": "system", "content": preset.system})
    begun = [{"type": "text", "text": answer}] if parts else answer
    ((vllm,), _) = chat.render_jinja_template(
        [[*messages, {"role": "assistant", "content": begun}]],
        chat_template=template,
        continue_final_message=True,
        **preset.template,
    )
    ((sglang,), _) = chat.render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, **preset.template
    )
    return vllm, sglang + answer


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", PRESETS)
def test_both_servers_read_the_same_prompt(model, name) -> None:
    """Whether vLLM hands the answer to the template as a string or in parts, as templates of vision models need it."""
    preset, template = PRESETS[name], _template(model)
    begun = preset.stem if isinstance(preset, LevelPreset) else preset.answer_prefix
    branch = [] if isinstance(preset, LevelPreset) else [f"{begun}4."]
    for answer in (begun, *branch):
        for parts in (False, True):
            vllm, sglang = _render(template, preset, answer, parts=parts)
            lost = (model, name) in LOST_SPACE and answer == begun
            assert vllm == (sglang.rstrip() if lost else sglang)
