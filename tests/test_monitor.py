"""The monitor is silent while all is well and speaks when a reward is hacked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqareward.diffusion import synthetic_images
from iqareward.functional.psnr import psnr
from iqareward.functional.ssim import ssim
from iqareward.monitor import HackingMonitor

JUDGES = {"psnr": psnr, "ssim": ssim}
TRUTH = synthetic_images(range(16), size=24)
BLURRED = torch.nn.functional.avg_pool2d(TRUTH, 3, 1, 1, count_include_pad=False)
LOW = torch.linspace(0, 1, 16)
properties = settings(deadline=None, max_examples=25, derandomize=True)


def monitor(**options) -> HackingMonitor:
    """Calibrated on blurred restorations."""
    found = HackingMonitor(JUDGES, **options)
    found.calibrate(BLURRED, TRUTH, LOW)
    return found


def noise(strength, seed=0):
    """Restorations with noise, which a judge of sharpness might like."""
    added = torch.randn(TRUTH.shape, generator=torch.Generator().manual_seed(seed))
    return (BLURRED + strength * added).clamp(0, 1)


@properties
@given(gain=st.floats(0.0, 5.0), mix=st.floats(0.0, 1.0))
def test_silent_while_restorations_approach_the_truth(gain, mix):
    """Whatever the reward does: better by every judge and nearer in every statistic is no hack."""
    watching = monitor(patience=1)
    assert watching.update(torch.lerp(BLURRED, TRUTH, mix), TRUTH, LOW + gain).alarms == ()


def test_silent_when_nothing_changes():
    """The same images and rewards."""
    report = monitor(patience=1).update(BLURRED, TRUTH, LOW)
    assert report.alarms == ()
    assert all(change == 0 for change in report.changes.values())


def test_noise_that_pleases_the_reward_is_caught():
    """The reward rises, fidelity falls, high frequencies leave those of the truth: each gets its sentence."""
    alarms = monitor(patience=1).update(noise(0.2), TRUTH, LOW + 1).alarms
    told = {alarm.split()[0] for alarm in alarms}
    assert {"psnr", "ssim", "high_frequency_share"} <= told
    assert all("while the reward rose from 0.5 to 1.5" in alarm for alarm in alarms)


def test_a_reward_that_falls_too_is_no_hack():
    """Bad restorations with a bad reward are a bad run."""
    assert monitor(patience=1).update(noise(0.2), TRUTH, LOW - 1).alarms == ()


def test_one_look_is_not_enough():
    """With patience 2 the second look in a row alarms; a good look in between starts again."""
    watching = monitor()
    looks = [noise(0.2), BLURRED, noise(0.2), noise(0.3)]
    assert [bool(watching.update(images, TRUTH, LOW + 1).alarms) for images in looks] == [False, False, False, True]
    assert len(watching.history) == 4


@properties
@given(seed=st.integers(0, 1000))
def test_order_of_the_inputs_does_not_matter(seed):
    """Permuted everywhere, it finds the same."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    other = HackingMonitor(JUDGES, patience=1)
    other.calibrate(BLURRED[order], TRUTH[order], LOW[order])
    found = other.update(noise(0.1)[order], TRUTH[order], LOW[order] + 1)
    expected = monitor(patience=1).update(noise(0.1), TRUTH, LOW + 1)
    assert found.changes == pytest.approx(expected.changes, rel=1e-3, abs=1e-4)
    assert len(found.alarms) == len(expected.alarms)


def test_unscored_inputs_take_no_part():
    """NaN rows are left out; with fewer than four scored inputs nothing alarms."""
    rewards, few = (LOW + 1).clone(), torch.full((16,), torch.nan)
    rewards[2] = torch.nan
    few[:3] = 9.0
    assert monitor(patience=1).update(noise(0.2), TRUTH, rewards).alarms
    assert monitor(patience=1).update(noise(0.2), TRUTH, few).alarms == ()


def test_state_round_trip(tmp_path):
    """Saved, loaded without running code, and continued, it says the same."""
    first, second = monitor(), HackingMonitor(JUDGES)
    first.update(noise(0.2), TRUTH, LOW + 1)
    torch.save(first.state_dict(), tmp_path / "monitor.pt")
    second.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
    assert second.calibrated
    assert second.update(noise(0.2), TRUTH, LOW + 1) == first.update(noise(0.2), TRUTH, LOW + 1)
    with pytest.raises(ValueError, match="same judges"):
        HackingMonitor({"psnr": psnr}).load_state_dict(first.state_dict())


def test_misuse_is_explained():
    """Not calibrated, other inputs, options without sense."""
    with pytest.raises(RuntimeError, match="calibrate"):
        HackingMonitor(JUDGES).update(BLURRED, TRUTH, LOW)
    with pytest.raises(ValueError, match="16 inputs"):
        monitor().update(BLURRED[:3], TRUTH[:3], LOW[:3])
    with pytest.raises(ValueError, match="patience"):
        HackingMonitor(JUDGES, patience=0)
