"""The comparison of docs/how-to/own-judge.md works with models of transformers as `PairsInGroup` calls it."""

import re
from pathlib import Path

import pytest
import torch

from iqareward.rewards import PairsInGroup
from tests.vlm import tiny

PAGE = Path(__file__).parents[2] / "docs/how-to/own-judge.md"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"])
def test_two_pictures_in_one_prompt(family: str) -> None:
    """Both pictures and their order reach the model; of two equal ones neither wins once both orders are asked for."""
    (block,) = re.findall(r"```python\n([^`]*\nclass Comparison:[^`]*)```", PAGE.read_text())
    names = {"torch": torch}
    exec(block, names)
    judge = names["Comparison"](*tiny.pair(family))
    first, second = tiny.images(2, 56, 56)
    with torch.no_grad():
        answers = judge.compare([first, second, first], [second, first, first])
    assert answers.unique().numel() == 3
    reward = PairsInGroup(judge.compare, name="comparison")
    scores = reward([first, second, first, first], ids=[0, 0, 1, 1])
    wins = (answers[0] + 1 - answers[1]) / 2
    torch.testing.assert_close(scores, torch.stack([wins, 1 - wins, *torch.full((2,), 0.5)]), rtol=1e-4, atol=1e-5)
