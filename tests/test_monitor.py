"""The monitor is silent while all is well and alarms when a reward is hacked; each statistic does what it says."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqareward.diffusion import synthetic_images
from iqareward.functional.filters import blur_valid, gaussian_taps
from iqareward.functional.psnr import psnr
from iqareward.functional.ssim import ssim
from iqareward.monitor import STATISTICS, HackingMonitor
from tests.tolerances import EXACT

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
    with pytest.raises(ValueError, match="same held-out rewards"):
        HackingMonitor({"psnr": psnr}).load_state_dict(first.state_dict())


def test_misuse_is_explained():
    """Not calibrated, other inputs, options without sense."""
    with pytest.raises(RuntimeError, match="calibrate"):
        HackingMonitor(JUDGES).update(BLURRED, TRUTH, LOW)
    with pytest.raises(ValueError, match="16 inputs"):
        monitor().update(BLURRED[:3], TRUTH[:3], LOW[:3])
    with pytest.raises(ValueError, match="patience"):
        HackingMonitor(JUDGES, patience=0)


@pytest.fixture(scope="module")
def scenes():
    """Eight synthetic scenes."""
    return synthetic_images(range(8), size=32)


def noisy(images):
    """With noise of 10 % added."""
    return (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


CHANGES = {
    "saturation_share": lambda images: (3 * images - 1).clamp(0, 1),
    "colorfulness": lambda images: (images + 0.5 * (images - images.mean(1, keepdim=True))).clamp(0, 1),
    "dark_fraction": lambda images: images**4,
    "edge_density": noisy,
    "high_frequency_share": noisy,
}


@pytest.mark.parametrize("name", STATISTICS)
def test_each_statistic_rises_with_what_it_describes(name, scenes):
    """For every scene; and it is one finite fp32 number per image."""
    before, after = STATISTICS[name](scenes), STATISTICS[name](CHANGES[name](scenes))
    assert before.shape == (8,)
    assert before.dtype == torch.float32
    assert (after >= before).all()
    assert (after > before).sum() >= 6


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("saturation_share", torch.ones(8, 8), 1.0),
        ("colorfulness", torch.full((8, 8), 0.3), 0.0),
        ("dark_fraction", torch.zeros(8, 8), 1.0),
        ("edge_density", torch.linspace(0, 0.7, 8).expand(8, 8), 0.1),
        ("high_frequency_share", torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(4, 4), 1.0),
        ("high_frequency_share", torch.full((8, 8), 0.3), 0.0),
    ],
)
def test_statistics_by_hand(name, image, expected):
    """Grey images whose value can be checked on paper."""
    found = STATISTICS[name](image.expand(1, 3, 8, 8))
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", STATISTICS)
def test_images_do_not_touch_each_other(name, scenes):
    """A broken image is NaN alone; every other one has the value it has alone."""
    broken = scenes.clone()
    broken[3, 1, 4, 5] = torch.nan
    values = STATISTICS[name](broken)
    assert values[3].isnan()
    for row in (0, 7):
        torch.testing.assert_close(values[row], STATISTICS[name](scenes[row : row + 1])[0], rtol=1e-5, atol=1e-6)


def test_digits_do_not_depend_on_threads(monkeypatch):
    """A crowded machine leaves fewer of torch's threads from call to call, and a log repeats bit for bit."""
    images = torch.rand(1, 3, 1024, 1030, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    monkeypatch.setattr(time, "thread_time", time.perf_counter)  # cores are free, even if they are not

    def values(count):
        torch.set_num_threads(count)
        return torch.stack([statistic(images) for statistic in STATISTICS.values()])

    try:
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:  # which have learnt nothing else before
            expected = one.submit(values, 1).result()
            for count in (2, 3, 4):
                torch.testing.assert_close(other.submit(values, count).result(), expected, **EXACT)
    finally:
        torch.set_num_threads(before)


def test_blur_lowers_edges_and_high_frequencies(scenes):
    """The two that noise raises."""
    blurred = blur_valid(scenes, gaussian_taps(5, 1.0))
    for name in ("edge_density", "high_frequency_share"):
        assert (STATISTICS[name](blurred) < STATISTICS[name](scenes[..., 2:-2, 2:-2])).all()


@pytest.mark.parametrize("wrong", [["psnr"], None, {"psnr": "psnr"}])
def test_measures_come_by_name(wrong) -> None:
    """A list, nothing, or a name in place of a reward is refused when the monitor is made."""
    with pytest.raises(TypeError, match="HackingMonitor expected `held_out` as a mapping of names to functions"):
        HackingMonitor(wrong)
    with pytest.raises(TypeError, match="HackingMonitor expected `statistics` as a mapping"):
        HackingMonitor({}, statistics=wrong)
