"""From a question to token ids: rendered once by the model's own chat template, and checked."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from iqareward.rewards.vlm.presets import LevelPreset, RatingPreset

_DECIMALS = ("1.0", "2.57", "4.98")  # enough to notice a tokenizer that joins digits or the point


class Prompt(NamedTuple):
    """A prompt around one image.

    Attributes:
        text: as rendered, with the image as one placeholder.
        before: token ids before the image.
        after: token ids after the image, up to the position that is read.
    """

    text: str
    before: tuple[int, ...]
    after: tuple[int, ...]


def render(processor: Any, preset: LevelPreset | RatingPreset, question: str, answer: str = "") -> str:
    """The text that the model continues, one placeholder for the image.

    Args:
        processor: of the model; it knows the chat template.
        preset: system prompt, order of image and text, options of the template (one that it does not know is ignored).
        question: what the user says beside the image.
        answer: how the model's answer begins.
    """
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content if preset.image_first else content[::-1]}]
    if preset.system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": preset.system}]})
    # The tokenizer hands every option to the template; the processor warns about those that a template does not use.
    text = processor.tokenizer.apply_chat_template(
        messages,
        chat_template=processor.chat_template,
        tokenize=False,
        add_generation_prompt=True,
        **preset.template,
    )
    return text + answer


def tokenize(processor: Any, text: str, around: tuple[Sequence[int], Sequence[int]] = ((), ())) -> Prompt:
    """Token ids before and after the image of a rendered prompt.

    Args:
        processor: of the model.
        text: with one placeholder.
        around: ids that stand between the text and the image's tokens, before and after them.

    Raises:
        ValueError: there is not exactly one placeholder.
    """
    ids, image = _ids(processor, text), processor.image_token_id
    if ids.count(image) != 1:
        raise ValueError(
            f"expected one image placeholder {processor.image_token!r}, got {ids.count(image)} in {text!r}. "
            "Does the checkpoint's chat template know images?"
        )
    split = ids.index(image)
    return Prompt(text, (*ids[:split], *around[0]), (*around[1], *ids[split + 1 :]))


def next_ids(processor: Any, text: str, words: Sequence[str]) -> tuple[int, ...]:
    """The token that each word adds to a text.

    A text may end with a space, for words without one: tokenizers would join the two, so there the word alone counts,
    as the models that are asked like this were trained.

    Raises:
        ValueError: a word is more than one token there, or changes the tokens before it, or two words share one.
    """
    before = _ids(processor, text)
    found = []
    for word in words:
        ids = [*before, *_ids(processor, word)] if text.endswith(" ") else _ids(processor, text + word)
        if ids[: len(before)] != before or len(ids) != len(before) + 1:
            raise ValueError(
                f"expected {word!r} to be one token after {text[-20:]!r}, got {_shown(processor, ids, before)}. "
                "Choose other level words, or a stem that ends (or words that begin) with the space between them."
            )
        found.append(ids[-1])
    if len(set(found)) != len(found):
        raise ValueError(f"expected {list(words)} to be different tokens, got {found}.")
    return tuple(found)


def digit_ids(processor: Any, text: str) -> tuple[tuple[int, ...], int]:
    """Token ids of 0 to 9 and of the decimal point, as they continue a text.

    Raises:
        ValueError: the tokenizer does not write numbers digit by digit.
    """
    digits = next_ids(processor, text, "0123456789")
    (point,) = next_ids(processor, text + "4", ".")
    before = _ids(processor, text)
    for number in _DECIMALS:
        expected = [point if character == "." else digits[int(character)] for character in number]
        if _ids(processor, text + number) != [*before, *expected]:
            raise ValueError(
                f"expected a tokenizer that writes {number} digit by digit, got "
                f"{_shown(processor, _ids(processor, text + number), before)}. RatingReward cannot read this model."
            )
    return digits, point


def _ids(processor: Any, text: str) -> list[int]:
    # the template has written all special tokens already
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def _shown(processor: Any, ids: list[int], before: list[int]) -> list[str]:
    same = next((i for i, pair in enumerate(zip(ids, before, strict=False)) if pair[0] != pair[1]), len(before))
    return processor.tokenizer.convert_ids_to_tokens(ids[same:])
