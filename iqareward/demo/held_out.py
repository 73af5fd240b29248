"""Fair judges: the model of NIQE in the package was fitted on photographs that the demo shows."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from iqareward.demo.photographs import load_photograph
from iqareward.functional.natural_model import fit_natural_model
from iqareward.functional.niqe import niqe
from iqareward.rewards.metric import NoReference
from iqareward.types import Reward

FITTED_ON = ("astronaut", "coffee", "chelsea", "camera", "rocket")
"""Photographs of the packaged model (benchmarks/fit_niqe.py); they would look more natural to it than any other."""


def held_out(rewards: Sequence[Reward], photograph: str) -> tuple[Reward, ...]:
    """The same rewards, but NIQE with a model of those photographs of the packaged one that are not `photograph`.

    Args:
        rewards: any, with or without NIQE.
        photograph: name of the one to be judged.
    """
    return tuple(
        _without(reward, photograph) if isinstance(reward, NoReference) and reward.name == "niqe" else reward
        for reward in rewards
    )


def _without(reward: NoReference, photograph: str) -> Any:
    others = [load_photograph(name) for name in FITTED_ON if name != photograph]
    return replace(reward, metric=partial(niqe, model=fit_natural_model(others)))
