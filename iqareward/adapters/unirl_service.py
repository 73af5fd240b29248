"""A scorer for UniRL's reward service.

- Read: Tencent-Hunyuan/UniRL 1a7b501 (2026-06), `unirl-reward-service`. Its class is subclassed, when it is importable.
- Range: PIL images.
- References: the first of two turns (`references: history`, source then result), or a key of each item's metadata.
- Failure: `on_nan: nan`, the mark that the service asks for: the trainer then stops the step; raise, mean, worst or a
  number on request.

Write a module, and name it under `SCORER_MODULES["iqareward"]` in `reward_service/scorers/registry.py`; the `params` of
the service's YAML are the arguments of `IQAScorer`: `reward`, `references`, `device`, `on_nan`.

```python
from reward_service.scorers.registry import register
from iqareward.adapters.unirl_service import IQAScorer

register("iqareward", IQAScorer)
```
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from iqareward.adapters._values import OnNan, check_on_nan, column, find_reward, framework, score, settle

HISTORY = "history"
HOME = "https://github.com/Tencent-Hunyuan/UniRL"


@cache
def _scorer() -> type:
    base = framework("reward_service.scorers.base", who="IQAScorer", home=HOME).BaseScorer

    class IQAScorer(base):
        """Each item's score as its sub-metric `score`; NaN for an item without one, as the service asks."""

        name = "iqareward"
        sub_metric_names = ("score",)

        def __init__(
            self, reward: Any, references: str | None = None, device: str | None = None, on_nan: OnNan = "nan"
        ) -> None:
            check_on_nan(on_nan, allowed=("raise", "mean", "worst", "nan"), who="IQAScorer")
            self.references = references
            self.on_nan: OnNan = on_nan
            self.judge = find_reward(reward, who="IQAScorer", references=references, device=device)

        def score(self, items: Sequence[Any]) -> list[dict[str, float]]:
            scores = torch.full((len(items),), torch.nan)
            rows = [row for row, item in enumerate(items) if item.history[-1][1] is not None]
            if rows:
                found = [items[row] for row in rows]
                scores[rows] = score(
                    self.judge,
                    [item.history[-1][1] for item in found],
                    value_range=None,
                    references=_turns(self.references, found),
                    prompts=[item.history[-1][0] for item in found],
                    on_nan="nan",
                ).cpu()
            settled = settle(scores, self.on_nan, name=self.judge.name).tolist()
            return [{"score": value} for value in settled]

    IQAScorer.__qualname__ = "IQAScorer"
    return IQAScorer


def __getattr__(name: str) -> type:
    if name != "IQAScorer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _scorer()


def _turns(source: str | None, items: Sequence[Any]) -> Any:
    """The references of items of the service: the image of the first of two turns, or a key of their metadata."""
    if source is None:
        return None
    if source != HISTORY:
        return column(source, [item.metadata for item in items], who="IQAScorer")
    if any(len(item.history) < 2 or item.history[0][1] is None for item in items):
        raise ValueError("IQAScorer expected two turns, source and result (references: history), got items without.")
    return [item.history[0][1] for item in items]
