"""The prompts of the mPLUG-Owl2 scorers as token ids: no tokenizer, so no tokenizer version can change a score.

Ids are those of the LLaMA sentencepiece vocabulary with BOS (1). The hub variant's image prompts are what the scorers'
own code produced under transformers 4.36; the paper's variant and the video prompts are put together from the same
pieces and were not run through a tokenizer. Later tokenizers may drop BOS or split the text after the image
differently, which moves scores.
"""

from typing import Literal, NamedTuple

Task = Literal["quality", "aesthetics"]
Variant = Literal["hub", "paper"]

# " excellent", " good", " fair", " poor", " bad": one vocabulary piece each
LEVEL_IDS = (15129, 1781, 6534, 6460, 4319)

_IMAGE, _VIDEO = 1967, 4863  # " image", " video"

_WORDS: dict[str, tuple[int, ...]] = {"quality": (11029,), "aesthetics": (263, 342, 9188, 1199)}
_USER = (1, 3148, 1001, 29901)  # BOS "USER:"
_HOW = (1128, 723, 366, 6554, 278)  # " How would you rate the"
_THIS = (310, 445, _IMAGE, 29973)  # " of this image?"
_NEWLINE = (13,)
_LONE_SPACE = (29871,)  # sentencepiece puts a space before every chunk; before a newline it is a token of its own
_ASSISTANT_AFTER_NEWLINE = (22933, 9047, 13566, 29901)  # "ASSISTANT:"
_ASSISTANT_AFTER_SPACE = (319, 1799, 9047, 13566, 29901)  # " ASSISTANT:"
_THE = (450,)  # " The"
_OF_THE_IMAGE_IS = (310, 278, _IMAGE, 338)  # " of the image is"


class Prompt(NamedTuple):
    """Token ids before and after the image."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


def prompt_ids(task: Task, *, variant: Variant = "hub", video: bool = False) -> Prompt:
    """Token ids of the question about an image (or video), ending where the level word is predicted.

    Args:
        task: what is asked about.
        variant: `"hub"` is `USER: How would you rate the quality of this image?\\n<image>\\nASSISTANT: The quality of
            the image is`, which published scores and the model cards use. `"paper"` is the evaluation script's: a space
            instead of the newline before ASSISTANT and, for aesthetics, the image before the question.
        video: say "video" instead of "image".

    Example:
        >>> prompt_ids("quality").suffix
        (29871, 13, 22933, 9047, 13566, 29901, 450, 11029, 310, 278, 1967, 338)

    References:
        Wu et al., "Q-Align: Teaching LMMs for Visual Scoring via Discrete Text-Defined Levels", 2024,
        https://arxiv.org/abs/2312.17090
    """
    if task not in _WORDS:
        raise ValueError(f'expected task "quality" or "aesthetics", got {task!r}.')
    word = _WORDS[task]
    question = (*_HOW, *word, *_THIS)
    answer = (*_THE, *word, *_OF_THE_IMAGE_IS)
    if variant == "hub":
        prompt = Prompt((*_USER, *question, *_NEWLINE), (*_LONE_SPACE, *_NEWLINE, *_ASSISTANT_AFTER_NEWLINE, *answer))
    elif variant == "paper" and task == "quality":
        prompt = Prompt((*_USER, *question, *_NEWLINE), (*_LONE_SPACE, *_ASSISTANT_AFTER_SPACE, *answer))
    elif variant == "paper":
        prompt = Prompt((*_USER, *_LONE_SPACE), (*question, *_ASSISTANT_AFTER_SPACE, *answer))
    else:
        raise ValueError(f'expected variant "hub" or "paper", got {variant!r}.')
    return Prompt(*(_say_video(ids) for ids in prompt)) if video else prompt


def _say_video(ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(_VIDEO if token == _IMAGE else token for token in ids)
