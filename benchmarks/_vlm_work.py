"""How much work the expected rating of one image is, and how fast this device can work."""

from typing import Any


def image_tokens(config: Any, side: int) -> int:
    """Tokens of a square image after the vision tower."""
    vision = config.vision_config
    factor = vision.patch_size * vision.spatial_merge_size
    return round(side / factor) ** 2


def tflop_per_image(config: Any, side: int, *, text_tokens: int, read: int) -> tuple[float, float, float]:
    """Multiply and add counted apart, matmuls and attention only: vision tower, decoder, head.

    Args:
        config: of a Qwen2.5-VL.
        side: of a square image in pixels.
        text_tokens: of the prompt and of the branches of the answer.
        read: positions whose logits are computed.
    """
    vision, text = config.vision_config, config.text_config
    merged = image_tokens(config, side)
    merge = vision.spatial_merge_size**2
    patches, width = merged * merge, vision.hidden_size
    window = (vision.window_size // vision.patch_size) ** 2
    whole = len(vision.fullatt_block_indexes)
    layer = 2 * patches * (4 * width**2 + 3 * width * vision.intermediate_size)
    attention = 4 * patches * width * (whole * patches + (vision.depth - whole) * window)
    embed = 2 * patches * 2 * 3 * vision.patch_size**2 * width
    merger = 2 * merged * (merge * width) * (merge * width + vision.out_hidden_size)
    tower = vision.depth * layer + attention + embed + merger

    tokens, hidden = merged + text_tokens, text.hidden_size
    keys = hidden * text.num_key_value_heads // text.num_attention_heads
    row = 2 * (2 * hidden**2 + 2 * hidden * keys + 3 * hidden * text.intermediate_size)
    decoder = text.num_hidden_layers * (tokens * row + 2 * tokens**2 * hidden)  # half of the square is visible
    head = 2 * read * hidden * text.vocab_size
    return tower / 1e12, decoder / 1e12, head / 1e12
