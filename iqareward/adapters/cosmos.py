"""Rewards for cosmos-rl, for one image or a whole group.

- Read: nvidia-cosmos/cosmos-rl 89f2e5b (2026-07), in maintenance mode. It calls
  `fn(to_be_evaluated, reference, prompt=, data_packer=, config=, tokenizer=)`, and asserts a float for one image, a
  list for a group (`group_reward_calculation`).
- Range: whatever the data packer makes. Integers and PIL images as they are; floats need `value_range`.
- References: the `reference` of the prompt; one for the whole group.
- Failure: `on_nan="raise"`; a number on request, "mean" and "worst" in groups only.
- Weights per sample: there is no hook for them.

```python
from iqareward.adapters.cosmos import reward_function

reward_fns = [(reward_function("qalign", value_range=(0, 1)), 1.0)]  # for the launcher
```
"""

from collections.abc import Callable
from typing import Any

import torch

from iqareward.adapters._values import OnNan, ValueRange, check_on_nan, find_reward, score
from iqareward.types import Reward


def reward_function(
    reward: str | Reward,
    *,
    value_range: ValueRange | None = None,
    use_reference: bool = False,
    on_nan: OnNan = "raise",
    device: torch.device | str | None = None,
) -> Callable[..., float | list[float]]:
    """A plain function for `reward_fns`: a float for one image, a list for a list of them.

    Args:
        reward: name or sum of the catalogue, or a reward.
        value_range: (black, white) of floating-point images and references; None refuses floats.
        use_reference: whether `reference` is an image (path, PIL image, array or tensor) to compare with.
        on_nan: what an image without a score becomes: "raise" (default: training stops), "mean" or "worst" of its
            group, a number.
        device: for weights of rewards that are loaded by name.

    Returns:
        The function.

    Example:
        >>> fn = reward_function("ssim", value_range=(0, 1), use_reference=True)
        >>> image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> fn(image, image), fn([image, image], image)
        (1.0, [1.0, 1.0])
    """
    check_on_nan(on_nan, allowed=("raise", "mean", "worst"), who="reward_function")
    judge = find_reward(reward, who="reward_function", references=use_reference or None, device=device)

    def fn(to_be_evaluated: Any, reference: Any = None, prompt: Any = "", **ignored: Any) -> float | list[float]:
        group = isinstance(to_be_evaluated, list | tuple)
        images = list(to_be_evaluated) if group else [to_be_evaluated]
        references = [reference] * len(images) if use_reference else None
        scores = score(
            judge,
            images,
            value_range=value_range,
            references=references,
            prompts=[prompt] * len(images),
            on_nan=on_nan,
        ).tolist()
        return scores if group else scores[0]

    return fn
