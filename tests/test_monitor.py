"""The monitor is silent while all is well and alarms when a reward is hacked; each statistic does what it says."""

import itertools
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
from iqareward.functional.statistics import STATISTICS, seam_strength
from iqareward.monitor import HackingMonitor
from iqareward.rewards.core import UnscoredWarning
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


@pytest.mark.parametrize(
    "values",
    [torch.zeros(16, 1), torch.zeros(16, 3), torch.zeros(3), torch.tensor(1.0), [0.0] * 15 + [None], None],
    ids=["column", "channels", "other number", "scalar", "None in a list", "nothing"],
)
def test_one_number_per_image_is_asked_of_everything(values):
    """A held-out reward, a statistic and training rewards of another shape are named, never pooled or broadcast."""
    expected = "HackingMonitor expected (odd as )?one (number|value) per image"
    with pytest.raises((ValueError, TypeError), match=expected):
        HackingMonitor({"odd": lambda images, **_: values}).calibrate(TRUTH, TRUTH, LOW)
    with pytest.raises((ValueError, TypeError), match=expected):
        HackingMonitor({}, statistics={"odd": lambda images: values}).calibrate(TRUTH)
    with pytest.raises(ValueError, match=r"one value per image .* of the references"):
        HackingMonitor({}).calibrate(TRUTH, TRUTH[:1])


def test_lists_and_arrays_are_numbers_too():
    """As adapters return them."""
    found = HackingMonitor({"a": lambda images, **_: images.mean((1, 2, 3)).tolist()}, statistics={})
    found.calibrate(TRUTH, rewards=LOW.tolist())
    expected = TRUTH.mean((1, 2, 3)) - 0.1
    other = HackingMonitor({"a": lambda images, **_: expected.numpy()}, statistics={})
    other.calibrate(TRUTH)
    torch.testing.assert_close(found.state_dict()["before"]["a"] - 0.1, other.state_dict()["before"]["a"])


@pytest.mark.parametrize(("scale", "shift"), [(2.0, -1.0), (255.0, 0.0)])
def test_images_of_another_range_are_not_described(scale, shift):
    """Like rewards, statistics give NaN for them and say why; an overshoot of decoders is clamped as for rewards."""
    watched = HackingMonitor({})
    with pytest.warns(UnscoredWarning, match=r"described no image of this batch: .* outside"):
        watched.calibrate(TRUTH * scale + shift)
    assert all(values.isnan().all() for values in watched.state_dict()["before"].values())
    overshoot, clamped = HackingMonitor({}), HackingMonitor({})
    overshoot.calibrate(TRUTH * 1.2 - 0.1)
    clamped.calibrate((TRUTH * 1.2 - 0.1).clamp(0, 1))
    assert overshoot.state_dict()["before"].keys() == STATISTICS.keys()
    for name, values in overshoot.state_dict()["before"].items():
        torch.testing.assert_close(values, clamped.state_dict()["before"][name], rtol=0, atol=0)


def test_an_alarm_quotes_the_images_that_it_compared():
    """A hard image that had no score before RL must not make a fall look like a rise, or larger than it was."""
    before, after = torch.linspace(20, 21, 16), torch.linspace(19, 20, 16)
    before[0], after[0] = torch.nan, 900.0
    watched = HackingMonitor({"psnr": psnr}, statistics={}, patience=1)
    watched.add_values({"psnr": before})
    watched.step()
    watched.add_values({"psnr": after})
    assert watched.step().alarms == ("psnr fell from 20.5 to 19.5",)


@pytest.fixture(scope="module")
def scenes():
    """Eight synthetic scenes."""
    return synthetic_images(range(8), size=32)


def noisy(images):
    """With noise of 10 % added."""
    return (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def checkerboard(cell, side):
    """`[side, side]` of +0.5 and -0.5."""
    cells = torch.arange(side) // cell
    return ((cells[:, None] + cells) % 2) - 0.5


CHANGES = {
    "saturation_share": lambda images: (3 * images - 1).clamp(0, 1),
    "colorfulness": lambda images: (images + 0.5 * (images - images.mean(1, keepdim=True))).clamp(0, 1),
    "dark_fraction": lambda images: images**4,
    "edge_density": noisy,
    "high_frequency_share": noisy,
    "periodic_grid": lambda images: images + 4 / 255 * checkerboard(2, 32),
    "seams": lambda images: images + 0.3 * checkerboard(16, 32),
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
        ("periodic_grid", torch.full((64, 64), 0.3), 0.0),
        ("periodic_grid", torch.linspace(0, 1, 64).expand(64, 64), 0.0),
        ("periodic_grid", torch.linspace(0, 1, 64).square().expand(64, 64), 0.0),  # curved alike everywhere
        ("seams", torch.full((64, 64), 0.3), 0.0),
        ("seams", torch.linspace(0, 1, 65).square()[1:].expand(64, 64), 0.0),
    ],
)
def test_statistics_by_hand(name, image, expected):
    """Grey images whose value can be checked on paper."""
    found = STATISTICS[name](image.expand(1, 3, *image.shape))
    torch.testing.assert_close(
        found, torch.tensor([expected]), rtol=1e-4, atol=2e-3 if name in ("seams", "periodic_grid") else 1e-6
    )


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


def grey(planes):
    """Images of which every channel is the plane."""
    return planes[:, None].repeat(1, 3, 1, 1)


def textured(side, count=4):
    """Random planes with the spectrum of photographs, in 8 bits."""
    chance = torch.Generator().manual_seed(2)
    frequency = torch.hypot(*torch.meshgrid(torch.fft.fftfreq(side), torch.fft.rfftfreq(side), indexing="ij"))
    waves = torch.fft.rfft2(torch.randn(count, side, side, generator=chance)) / (frequency + 1 / side) ** 1.6
    planes = torch.fft.irfft2(waves, s=(side, side))
    return ((0.5 + 0.12 * planes / planes.std((1, 2), keepdim=True)).clamp(0, 1) * 255).round() / 255


def test_periodic_grid_is_its_definition():
    """One frequency after another, with a sum over every block, in float64."""
    plane = textured(64, 1)[0].double() + 4 / 255 * checkerboard(2, 64)
    inner = plane[1:-1, 1:-1]
    edges = 4 * inner - plane[:-2, 1:-1] - plane[2:, 1:-1] - plane[1:-1, :-2] - plane[1:-1, 2:]
    best = 0.0
    for size in (5, 6, 7, 8):
        count = 62 // size
        for row, column in itertools.product(range(size), repeat=2):
            angle = 2 * torch.pi / size * (row * torch.arange(size)[:, None] + column * torch.arange(size)).double()
            wave = torch.polar(torch.ones_like(angle), -angle)
            total = 0
            for top, left in itertools.product(range(0, count * size, size), repeat=2):
                value = (edges[top : top + size, left : left + size] * wave).sum()
                total += value / (value.abs() + 1e-3)
            share = (float(abs(total)) ** 2 / count**2 - 1) / (count**2 - 1)
            best = max(best, share if row or column else 0.0)
    assert 0.3 < best < 0.95
    found = STATISTICS["periodic_grid"](grey(plane[None]))
    torch.testing.assert_close(found, torch.tensor([best**0.5], dtype=torch.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("period", [2, 3, 4, 7, 8, 10, 16, 28, 32])
def test_faint_grids_of_any_period_stand_out(period):
    """Lines of two grey levels in a texture, whatever their place; and the texture alone does not have it."""
    planes, lines = textured(256), (torch.arange(256) + 5) % period == 0
    grid = (lines[:, None] | lines).float()
    found = STATISTICS["periodic_grid"](grey((planes + 3 / 255 * grid).clamp(0, 1)))
    assert (found > STATISTICS["periodic_grid"](grey(planes)) + 0.1).all()
    assert (STATISTICS["periodic_grid"](grey(planes)) < 0.5).all()


def test_a_grid_counts_by_its_area():
    """A strong one on half of the image is half and what agrees by chance, and contrast does not matter."""
    planes = textured(512, 2)
    planes[..., :256] += 0.3 * checkerboard(2, 512)[:, :256]
    found = STATISTICS["periodic_grid"](grey(planes))
    torch.testing.assert_close(found, torch.full((2,), 0.55), rtol=0, atol=0.1)
    torch.testing.assert_close(STATISTICS["periodic_grid"](grey(0.5 * planes)), found, rtol=0, atol=0.02)


def test_a_period_that_drifts_is_no_grid():
    """Fences and cloth in photographs: as regular within a block, but never a whole number of pixels everywhere."""
    place = torch.arange(256.0)
    bars = 0.2 * torch.sin(2 * torch.pi * (place / 8 + (place / 256).square() * 4))
    found = STATISTICS["periodic_grid"](grey((textured(256) + bars).clamp(0, 1)))
    assert (found < 0.5).all()
    even = 0.2 * torch.sin(2 * torch.pi * place / 8)
    assert (STATISTICS["periodic_grid"](grey((textured(256) + even).clamp(0, 1))) > 0.9).all()


def test_seams_are_their_definition():
    """Line after line and segment after segment, in float64; period and offset choose lines, none the strongest."""
    plane = textured(96, 1)[0].double()
    plane[:, 40:] += 3 / 255
    votes = [[], []]
    for turn, side in enumerate((plane, plane.T)):
        means = torch.stack([side[top : top + 12].mean(0) for top in range(0, 96, 12)])
        for line in range(10, 87):  # between the columns line - 1 and line

            def jump(at, row):
                step = row[at - 2 : at + 2].diff()
                return float((step[1] - (step[0] + step[2]) / 2).abs())

            vote = []
            for row in means:
                own = jump(line, row)
                near = sum(jump(line + away, row) for away in range(-8, 9) if abs(away) > 1) / 14
                vote.append((own - near) / (own + near + 1e-4))
            votes[turn].append(sum(vote) / 8)
    image = grey(plane[None])
    torch.testing.assert_close(
        seam_strength(image), torch.tensor([max(votes[0] + votes[1])], dtype=torch.float64), rtol=1e-3, atol=1e-4
    )
    chosen = [side[line - 10] for side in votes for line in (16, 40, 64)]
    found = seam_strength(image, period=24, offset=16)
    torch.testing.assert_close(found, torch.tensor([sum(chosen) / 6], dtype=torch.float64), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("levels", [2, 4, 8])
def test_tiles_of_other_brightness_have_seams(levels):
    """Where the tile is known, two levels are enough in a texture; what lies elsewhere does not count."""
    planes = textured(256)
    tiled = grey((planes + levels / 255 * checkerboard(64, 256)).clamp(0, 1))
    assert (seam_strength(tiled, period=64) > seam_strength(grey(planes), period=64) + 0.05 * levels**0.5).all()
    assert (seam_strength(tiled, period=64, offset=32) < 0.1).all()
    if levels == 8:
        assert (seam_strength(tiled) > seam_strength(grey(planes)) + 0.1).all()


def test_seams_need_a_border_inside():
    """One that is too near to the edges, or a period of one pixel, is refused."""
    images = grey(textured(64))
    with pytest.raises(ValueError, match="border of period 64"):
        seam_strength(images, period=64)
    with pytest.raises(ValueError, match="period >= 2"):
        seam_strength(images, period=1)


def test_blur_lowers_edges_and_high_frequencies(scenes):
    """The two that noise raises."""
    blurred = blur_valid(scenes, gaussian_taps(5, 1.0))
    for name in ("edge_density", "high_frequency_share"):
        assert (STATISTICS[name](blurred) < STATISTICS[name](scenes[..., 2:-2, 2:-2])).all()


@pytest.mark.parametrize("wrong", ["psnr", None, [psnr], {"psnr": 3}])
def test_measures_come_by_name(wrong) -> None:
    """One name, nothing, or functions without names are refused when the monitor is made."""
    with pytest.raises(TypeError, match="HackingMonitor expected `held_out` as names of rewards"):
        HackingMonitor(wrong)
    with pytest.raises(TypeError, match="HackingMonitor expected `statistics` as a mapping"):
        HackingMonitor({}, statistics=wrong)
    with pytest.raises(ValueError, match="unknown reward 'psnrr'"):
        HackingMonitor(["psnrr"])
    with pytest.raises(ValueError, match="a name of its own"):
        HackingMonitor({"seams": psnr})
    with pytest.raises(TypeError, match="HackingMonitor expected `reward` as a name or a reward, got 3"):
        HackingMonitor({}, reward=3)
    with pytest.raises(ValueError, match="trained reward 'ssim' in `held_out`; it cannot check itself"):
        HackingMonitor(["psnr", "ssim"], reward="ssim")


def test_names_are_loaded():
    """A name is the reward of the catalogue, in a list and in a mapping, and for the training reward."""
    watching = HackingMonitor(["psnr", "0.5*ssim + 0.5*gmsd[-0.35, 0]"], reward="1*psnr", patience=1)
    named = HackingMonitor({"fidelity": "psnr"}, statistics={})
    for each in (watching, named):
        each.calibrate(BLURRED, TRUTH, None if each is watching else LOW)
        each.update(noise(0.1), TRUTH, None if each is watching else LOW + 1)
    expected = float(psnr(noise(0.1), TRUTH).mean())
    assert named.history[0].means["fidelity"] == pytest.approx(expected, rel=1e-5)
    assert watching.history[0].means["psnr"] == watching.history[0].means["reward"] == pytest.approx(expected, rel=1e-5)
    assert "0.5*ssim + 0.5*gmsd[-0.35, 0]" in watching.history[0].changes


def test_batches_are_one_look():
    """Added in batches of any size, as PIL images or lists of other types, the inputs are compared as a whole."""
    whole, parts = monitor(patience=1), HackingMonitor(JUDGES, patience=1)
    for images, gain in ((BLURRED, 0), (noise(0.2), 1)):
        for rows in (slice(0, 3), slice(3, 16)):
            parts.add(images[rows], TRUTH[rows], (LOW[rows] + gain).numpy())
        report = parts.step()
    expected = whole.update(noise(0.2), TRUTH, LOW + 1)
    assert report.alarmed == expected.alarmed
    assert report.changes == pytest.approx(expected.changes, rel=1e-4)
    with pytest.raises(ValueError, match="got no images"):
        parts.step()
    parts.add(BLURRED[:3], TRUTH[:3], LOW[:3])
    parts.add(BLURRED[3:], TRUTH[3:])
    with pytest.raises(ValueError, match="with every batch"):
        parts.step()


def test_flat_numbers_for_a_logger():
    """Means, changes and the number of alarms under one prefix; what has no value is left out."""
    report = monitor(patience=1).update(noise(0.2), TRUTH, LOW + 1)
    logged = report.log("watch/")
    assert logged["watch/psnr"] == report.means["psnr"]
    assert logged["watch/change/psnr"] == report.changes["psnr"] < 0
    assert logged["watch/alarms"] == len(report.alarms) == len(report.alarmed) > 0
    assert all(isinstance(value, float) for value in logged.values())
    silent = HackingMonitor({}, statistics={})
    silent.calibrate(BLURRED, rewards=torch.full((16,), torch.nan))
    assert silent.update(BLURRED, rewards=torch.full((16,), torch.nan)).log() == {"monitor/alarms": 0.0}


def test_without_ground_truth_drift_alarms():
    """Either way, significantly; other samples of the same kind do not."""
    chance = torch.Generator().manual_seed(1)
    texture = 0.4 + 0.2 * torch.rand(2, 32, 3, 24, 24, generator=chance)
    for change, alarmed in ((1.0, set()), (0.5, {"colorfulness", "edge_density"}), (1.5, {"colorfulness"})):
        watching = HackingMonitor({}, patience=1)
        watching.calibrate(texture[0], rewards=torch.zeros(32))
        report = watching.update(0.5 + change * (texture[1] - 0.5), rewards=torch.ones(32))
        assert alarmed <= set(report.alarmed)
        assert bool(report.alarms) == bool(alarmed)
    assert "colorfulness moved from" in report.alarms[0]


def test_scatter_around_the_truth_is_no_drift():
    """Where the model before RL already has the statistic of the ground truth, chance can only lead away from it."""
    chance = torch.Generator().manual_seed(0)
    clean = torch.randn(64, generator=chance)
    for shift, alarmed in ((0.0, ()), (1.0, ("contrast",))):
        watching = HackingMonitor({}, statistics={"contrast": psnr}, patience=1)
        watching.add_values({"reward": torch.zeros(64), "contrast": clean}, {"contrast": clean})
        watching.step()
        scattered = clean + 0.5 * torch.randn(64, generator=chance) + shift
        watching.add_values({"reward": torch.ones(64), "contrast": scattered})
        assert watching.step().alarmed == alarmed
    with pytest.raises(ValueError, match="one value per image"):
        watching.add_values({"brightness": clean})


def test_without_rewards_nothing_has_to_rise():
    """Then a fall is an alarm by itself, and no sentence speaks of a reward."""
    watching = HackingMonitor(JUDGES, patience=1)
    watching.calibrate(BLURRED, TRUTH)
    report = watching.update(noise(0.2), TRUTH)
    assert {"psnr", "ssim"} <= set(report.alarmed)
    assert not any("while" in alarm for alarm in report.alarms)
