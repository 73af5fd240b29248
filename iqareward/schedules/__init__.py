"""Other ways to weigh RL against SFT, with the call and the result of `AdaptiveWeighter`: controls and published ones.

A formula is a function; `Schedule` makes it a weighter, with its options bound by `functools.partial`:

    weighter = Schedule(partial(cosine, peak=0.9, valley=0.05, warmup_steps=100, decay_steps=1000))

Some take a difficulty, some a pass rate: `signal` says which.
"""

from iqareward.schedules.controllers import GradientNoise, NoiseAware, TargetTracking, gradient_noise
from iqareward.schedules.formulas import constant, cosine, gate, logistic_success, soft_gate, softmax_batch
from iqareward.schedules.schedule import Schedule, Weighter, check_signal

__all__ = [
    "GradientNoise",
    "NoiseAware",
    "Schedule",
    "TargetTracking",
    "Weighter",
    "check_signal",
    "constant",
    "cosine",
    "gate",
    "gradient_noise",
    "logistic_success",
    "soft_gate",
    "softmax_batch",
]
