"""pyiqa's metrics as rewards: its figures on ordinary images, and none of its failures on the others."""

import importlib.util
import logging
import pickle
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iqareward import load, to_images
from iqareward.functional import piqe
from iqareward.rewards import pyiqa as ours
from iqareward.rewards.pyiqa import MIN_SIDE, NO_GRADIENT, REFUSED, PyIQAReward, pyiqa_configs, pyiqa_facts
from iqareward.testing import check_reward
from tests.rewards.pictures import TRAPS, traps
from tests.tolerances import EXACT, NETWORK_BATCH, OTHER_PACKAGE

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("pyiqa") is None, reason="the extra `pyiqa` is not installed"),
    # pyiqa reads a file of its own without closing it
    pytest.mark.filterwarnings("ignore:unclosed file .*default_dataset_configs:ResourceWarning"),
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in.*default_dataset_configs:pytest.PytestUnraisableExceptionWarning"
    ),
]

METRICS = [name for name in pyiqa_configs() if name not in REFUSED] if importlib.util.find_spec("pyiqa") else []
QUICK = ["psnr", "psnry", "ssim", "gmsd", "fsim", "nlpd", "piqe", "entropy"]
# MAD, the fourteenth metric that needs no weights, takes seconds per image
TAKES_LONGER = ["ssimc", "ms_ssim", "cw_ssim", "vif", "vsi"]


def textures(count: int, side: int, seed: int = 0) -> Tensor:
    """Smooth colour patches `[count, 3, side, side]`."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, max(2, side // 8), max(2, side // 8), generator=rng)
    return nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)


def noisy(images: Tensor, strength: float = 0.03) -> Tensor:
    rng = torch.Generator().manual_seed(7)
    return (images + strength * torch.randn(images.shape, generator=rng)).clamp(0, 1)


def seeded_weights(metric: str, file: Path, wrap: Callable[[dict], dict] = dict) -> Path:
    """Save weights for a metric whose network can be built without any, in the layout that pyiqa reads."""
    import pyiqa

    weights = pyiqa.create_metric(metric, device="cpu", pretrained=False).net.state_dict()
    rng = torch.Generator().manual_seed(0)
    for name, value in weights.items():
        if value.is_floating_point() and name.endswith("weight") and value.ndim > 1:
            value.copy_(torch.randn(value.shape, generator=rng) / value[0].numel() ** 0.5)
    torch.save(wrap(weights), file)
    return file


class Metric(nn.Module):
    """Stands in for pyiqa's metric object: the same attributes around any network."""

    def __init__(self, network: Callable[..., Any], metric: str) -> None:
        super().__init__()
        self.net = Network(network)
        self.metric_mode = "FR" if pyiqa_facts(metric).needs_references else "NR"
        self.lower_better = not pyiqa_facts(metric).higher_is_better


class Network(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *batch: Tensor) -> Any:
        return self.function(*batch)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PyIQAReward]:
    """`pretend(network, metric)` gives a reward whose pyiqa metric runs `network`."""

    def build(network: Callable[..., Any], metric: str = "cnniqa", **options: Any) -> PyIQAReward:
        package = SimpleNamespace(create_metric=lambda name, **_: Metric(network, name))
        monkeypatch.setattr(ours, "require", lambda *_, **__: package)
        return PyIQAReward(metric, **options)

    return build


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


# ---- ordinary images


@pytest.mark.parametrize("metric", [*QUICK, *TAKES_LONGER])
def test_figures(metric: str) -> None:
    """On ordinary float32 images a score is pyiqa's own, up to the sign."""
    import pyiqa

    references = textures(2, 176 if metric == "ms_ssim" else 80)
    images = noisy(references)
    arguments = (images, references) if pyiqa_facts(metric).needs_references else (images,)
    values = pyiqa.create_metric(metric, device="cpu")(*arguments).float().flatten()
    expected = values if pyiqa_facts(metric).higher_is_better else -values
    torch.testing.assert_close(PyIQAReward(metric)(images, references=references), expected, **OTHER_PACKAGE)


@pytest.mark.parametrize("metric", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in TAKES_LONGER)])
def test_contract(metric: str) -> None:
    """Metrics that need no weights keep the whole contract of a reward, with gradients where there are any."""
    references = textures(3, max(48, MIN_SIDE.get(metric, 1)))
    images, degraded = noisy(references), noisy(references, 0.2)
    reward = PyIQAReward(metric, differentiable=metric not in NO_GRADIENT)
    check_reward(reward, images, references, degraded=None if metric == "entropy" else degraded)


@pytest.mark.parametrize("metric", ["wadiqam_nr", "wadiqam_fr"])
def test_learned_contract(metric: str, tmp_path: Path) -> None:
    """Networks with seeded weights keep the contract too."""
    weights = seeded_weights(metric, tmp_path / "weights.pth", lambda state: {"params": state})
    references = textures(3, 34)
    check_reward(PyIQAReward(metric, weights=weights, differentiable=True), noisy(references), references)


def test_learned_figures(tmp_path: Path) -> None:
    """A network with seeded weights gives pyiqa's own figure, also normalised."""
    import pyiqa

    weights = seeded_weights("wadiqam_fr", tmp_path / "wadiqam.pth", lambda state: {"params": state})
    references = textures(1, 48)
    images = noisy(references)
    built = pyiqa.create_metric("wadiqam_fr", device="cpu", pretrained_model_path=str(weights))
    expected = built(images, references).detach().flatten()
    scores = PyIQAReward("wadiqam_fr", weights=weights)(images, references=references)
    torch.testing.assert_close(scores, expected, **NETWORK_BATCH)
    scores = PyIQAReward("wadiqam_fr", weights=weights, normalize=True)(images, references=references)
    torch.testing.assert_close(scores, ((expected + 1) / 1.1).clamp(0, 1), **NETWORK_BATCH)


def test_every_metric_that_pyiqa_names() -> None:
    """Each of them is a reward with the mode and direction of pyiqa's configuration, or refused with the reason."""
    import pyiqa

    assert set(pyiqa_configs()) == set(pyiqa.list_models())
    for name in METRICS:
        reward = PyIQAReward(name)
        assert reward.needs_references == (pyiqa_configs()[name]["metric_mode"] == "FR"), name
        low, high = pyiqa_facts(name).usual
        assert low < high


@pytest.mark.parametrize(
    ("config", "usual"),
    [
        ({"metric_mode": "NR", "score_range": "~0, ~50"}, (0.0, 50.0)),
        ({"metric_mode": "FR", "lower_better": True, "score_range": "0, ~1"}, (-1.0, 0.0)),
        ({"metric_mode": "NR", "score_range": "0, ~"}, (0.0, 2.0)),
        ({"metric_mode": "NR", "score_range": "good: 1, bad: 0"}, None),
        ({"metric_mode": "NR"}, None),
    ],
)
def test_a_metric_of_a_later_version(
    config: dict[str, Any], usual: tuple | None, monkeypatch: pytest.MonkeyPatch, pretend: Callable[..., PyIQAReward]
) -> None:
    """A metric that is new in pyiqa is a reward as its configuration says, by its class and in the catalogue."""
    monkeypatch.setitem(pyiqa_configs(), "brand_new", config)
    reward = pretend(lambda *batch: brightness(batch[0]), "brand_new")
    images = textures(2, 48)
    sign = -1 if config.get("lower_better") else 1
    assert reward.needs_references == (config["metric_mode"] == "FR")
    torch.testing.assert_close(reward(images, references=images), sign * brightness(images), **EXACT)
    assert load("pyiqa:brand-new").name == "pyiqa:brand_new"
    assert pyiqa_facts("brand_new").usual == usual
    ends = "low, high" if usual is None else f"{usual[0]:g}, {usual[1]:g}"
    with pytest.raises(ValueError, match=rf"Write 'pyiqa:brand_new\[{ends}\] \+ ssim'"):
        load("pyiqa:brand_new + ssim")
    if usual is None:
        with pytest.raises(ValueError, match="states no range"):
            PyIQAReward("brand_new", normalize=True)


def test_a_metric_of_another_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric that takes neither one image nor a pair is refused."""
    monkeypatch.setitem(pyiqa_configs(), "of_sets", {"metric_mode": "SET"})
    with pytest.raises(ValueError, match="mode FR or NR, got 'of_sets' of mode 'SET'"):
        PyIQAReward("of_sets")


def test_a_gradient_that_is_cut_inside(pretend: Callable[..., PyIQAReward]) -> None:
    """A metric whose scores carry no graph is refused where a gradient was asked for."""
    reward = pretend(lambda images: brightness(images.detach()), differentiable=True)
    with pytest.raises(ValueError, match="pyiqa cuts the graph inside"):
        reward(textures(2, 48).requires_grad_())


def test_another_version_cannot_turn_the_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pyiqa that disagrees about the direction of a metric is an error, not a reward for damage."""
    turned = SimpleNamespace(create_metric=lambda *_, **__: Metric(brightness, "cnniqa"))
    monkeypatch.setattr(ours, "require", lambda *_, **__: turned)
    with pytest.raises(RuntimeError, match=r"Install pyiqa==0\.1\.16"):
        PyIQAReward("niqe")(textures(1, 96))


@pytest.mark.parametrize("metric", METRICS)
def test_normalized(metric: str) -> None:
    """Normalising is monotone in the metric's direction, stays in [0, 1] and keeps NaN."""
    facts = pyiqa_facts(metric)
    values = torch.tensor([-1e6, -50.0, -3.0, -1.0, 0.0, 0.05, 0.3, 0.9, 1.5, 4.0, 9.0, 60.0, 90.0, 1e6])
    unit = facts.normalized(values)
    assert bool(((unit >= 0) & (unit <= 1)).all())
    steps = unit.diff() if facts.higher_is_better else -unit.diff()
    assert bool((steps >= 0).all())
    assert unit.max() - unit.min() > 0.9
    assert facts.normalized(torch.tensor(torch.nan)).isnan()


def test_normalized_distance() -> None:
    """A metric without an upper limit is at 1/2 where the table says, and at 1 for identical images."""
    torch.testing.assert_close(pyiqa_facts("mad").normalized(torch.tensor([0.0, 50.0])), torch.tensor([1.0, 0.5]))
    reward = PyIQAReward("gmsd", normalize=True)
    images = noisy(textures(1, 48))
    assert reward.bounds == (0.0, 1.0)
    torch.testing.assert_close(reward(images, references=images), torch.ones(1))


# ---- images that pyiqa fails on


def test_half_precision_that_touches_one() -> None:
    """Half-precision images with white pixels are scored; pyiqa's range check fails on them."""
    references = textures(2, 48)
    references[:, :, :4] = 1.0
    for dtype in (torch.bfloat16, torch.float16):
        scores = PyIQAReward("ssim")(noisy(references).to(dtype), references=references.to(dtype))
        assert scores.isfinite().all()
        assert scores.dtype == torch.float32


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1.0 + 3e-6])
def test_one_bad_pixel(poison: float) -> None:
    """A broken pixel costs one image its score, a small overshoot none."""
    references = textures(3, 48)
    images = noisy(references)
    expected = PyIQAReward("gmsd")(images, references=references)
    images[1, 0, 5, 5] = poison
    scores = PyIQAReward("gmsd")(images, references=references)
    torch.testing.assert_close(scores[[0, 2]], expected[[0, 2]], **EXACT)
    assert scores[1].isfinite() == (poison == 1.0 + 3e-6)


@pytest.fixture
def niqe(tmp_path: Path) -> PyIQAReward:
    """NIQE with made-up statistics of pristine images."""
    io = pytest.importorskip("scipy.io")
    io.savemat(
        tmp_path / "niqe.mat", {"mu_prisparam": torch.ones(1, 36).numpy(), "cov_prisparam": torch.eye(36).numpy()}
    )
    return PyIQAReward("niqe", weights=tmp_path / "niqe.mat", batch_size=3)


@pytest.mark.filterwarnings("ignore:cov.*degrees of freedom")  # NIQE finds no patch in a black image
def test_flat_image_in_a_niqe_batch(niqe: PyIQAReward, caplog: pytest.LogCaptureFixture) -> None:
    """A black image, on which NIQE's linear algebra fails, loses its own score, and the log says so once."""
    images = noisy(textures(3, 192))
    expected = niqe(images)
    assert expected.isfinite().all()
    images[1] = 0.0
    for _ in range(2):
        scores = niqe(images)
        assert scores[1].isnan()
        torch.testing.assert_close(scores[[0, 2]], expected[[0, 2]], **NETWORK_BATCH)
    assert [record.message for record in caplog.records if "answers NaN" in record.message][1:] == []
    assert "192 x 192" in caplog.text


@pytest.mark.parametrize("metric", ["cw_ssim", "vif", "vsi"])
def test_flat_reference(metric: str) -> None:
    """Where a formula is 0/0 on a flat reference, the score is NaN instead of 1,000,000, 0 or 1."""
    references = textures(2, 64)
    images = noisy(references)
    expected = PyIQAReward(metric)(images, references=references)
    references[1], images[1] = 0.0, 1.0
    scores = PyIQAReward(metric)(images, references=references)
    assert scores[1].isnan()
    torch.testing.assert_close(scores[0], expected[0], **NETWORK_BATCH)


BEST = {"psnr": 80.0, "psnry": 80.0, "gmsd": 0.0, "nlpd": 0.0, **dict.fromkeys(("ssim", "fsim", "cw_ssim", "vif"), 1.0)}


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
@pytest.mark.parametrize("kind", TRAPS)
@pytest.mark.parametrize("metric", [*QUICK, "cw_ssim", "vif"])
def test_traps(metric: str, kind: str) -> None:
    """On nearly flat, striped and text pictures a score is the float64 figure, whatever the batch."""
    references = traps(64)[kind]
    images = noisy(references)
    images[2] = references[2]
    reward = PyIQAReward(metric)
    together = reward(images, references=references)
    alone = [reward(images[i : i + 1], references=references[i : i + 1]) for i in range(3)]
    # VIF divides sums of float32 logarithms: 1.001e-5 on an AMD EPYC, where a batch of one takes other kernels
    batched = 2e-5 if metric == "vif" else 1e-5
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=batched, equal_nan=True)
    if metric in BEST:
        torch.testing.assert_close(together[2], torch.tensor(BEST[metric]), rtol=1e-6, atol=0)
    if metric in ("cw_ssim", "vif"):  # they have no value on some stripes, and VIF's own filters are float32
        assert ((together <= 1) | together.isnan()).all()
        return
    network = reward.model.net.double()  # pyright: ignore
    pair = (images, references) if pyiqa_facts(metric).needs_references else (images,)
    values = torch.as_tensor(network(*(side.double() for side in pair))).double().flatten()
    expected = values if pyiqa_facts(metric).higher_is_better else -values
    # pyiqa's PIQE thresholds float32 variances: 0.01 of its 100 points on nearly flat pictures
    atol = 2e-2 if metric == "piqe" else 2e-5
    torch.testing.assert_close(together.double(), expected, rtol=1e-5, atol=atol)


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
@pytest.mark.parametrize("metric", ["psnr", "ssim", "fsim", "gmsd", "nlpd", "piqe", "entropy"])
def test_black_and_white(metric: str) -> None:
    """Black and white images get a finite score or NaN, and never a better one than an ordinary image."""
    references = textures(1, 48)
    ordinary = PyIQAReward(metric)(noisy(references), references=references)
    for colour in (0.0, 0.5, 1.0):
        score = PyIQAReward(metric)(torch.full_like(references, colour), references=references)
        assert score.isnan() or score < ordinary


@pytest.mark.parametrize("metric", ["ssim", "cw_ssim", "vif", "mad", "ms_ssim", "piqe"])
def test_small_images(metric: str) -> None:
    """Below the smallest side the score is NaN, beside larger images that are scored."""
    side = MIN_SIDE[metric]
    rng = torch.Generator().manual_seed(0)
    sizes = [(side, side), (side - 1, side)]
    references = [torch.rand(3, *size, generator=rng) for size in sizes]
    scores = PyIQAReward(metric)([noisy(image) for image in references], references=references)
    assert scores.isnan().tolist() == [False, True]


def test_size_that_only_the_network_knows(pretend: Callable[..., PyIQAReward]) -> None:
    """A network that raises at some size answers NaN there, if it can score an ordinary image."""

    def picky(images: Tensor) -> Tensor:
        if images.shape[2] < 40:
            raise RuntimeError("Kernel size can't be greater than actual input size")
        return brightness(images)

    images = [textures(1, side)[0] for side in (48, 32, 64)]
    assert pretend(picky)(images).isnan().tolist() == [False, True, False]


def test_assertion_on_one_image(pretend: Callable[..., PyIQAReward]) -> None:
    """An assertion about one image (BRISQUE on black) does not cost the others their scores."""

    def picky(images: Tensor) -> Tensor:
        assert bool((images.amax((1, 2, 3)) > 0).all()), "black"
        return brightness(images)

    images = textures(4, 16)
    images[2] = 0.0
    scores = pretend(picky, batch_size=4)(images)
    assert scores.isnan().tolist() == [False, False, True, False]
    torch.testing.assert_close(scores[:2], brightness(images[:2]), **EXACT)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error"), AssertionError("broken"), torch.OutOfMemoryError("full")]
)
def test_failure_that_is_not_the_images_fault(error: Exception, pretend: Callable[..., PyIQAReward]) -> None:
    """A metric that fails on every image raises, so that training does not go on with NaN."""

    def broken(images: Tensor) -> Tensor:
        raise error

    with pytest.raises(type(error), match=str(error)):
        pretend(broken)(textures(2, 16))


def test_out_of_memory_is_not_a_property_of_images(pretend: Callable[..., PyIQAReward]) -> None:
    """Running out of memory raises even if a smaller image would have fitted."""

    def large(images: Tensor) -> Tensor:
        if images.shape[0] > 1:
            raise torch.OutOfMemoryError("full")
        return brightness(images)

    with pytest.raises(torch.OutOfMemoryError):
        pretend(large, batch_size=2)(textures(2, 16))


def test_grey_images() -> None:
    """One-channel images, which several metrics fail on or score as zero, are refused at the door."""
    with pytest.raises(ValueError, match=r"expected `images` of shape \[B, 3, H, W\]"):
        PyIQAReward("entropy")(torch.rand(2, 1, 48, 48, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("size", [(100, 100), (50, 70), (96, 128)])
def test_piqe_at_any_size(size: tuple[int, int]) -> None:
    """PIQE is right at sizes that are no multiple of 16, where pyiqa alone is up to 16 points off."""
    images = noisy(textures(2, 128), 0.05)[..., : size[0], : size[1]]
    torch.testing.assert_close(PyIQAReward("piqe")(images), -piqe(images), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "shape", [(2,), (2, 1), (2, 1, 1), (2, 1, 1, 1), "float64", "tuple"], ids=lambda shape: str(shape)
)
def test_output_shapes(shape: Any, pretend: Callable[..., PyIQAReward]) -> None:
    """Whatever shape or dtype a metric returns, scores are [B] float32."""

    def odd(images: Tensor) -> Any:
        values = brightness(images)
        if shape == "tuple":
            return values, images
        return values.double() if shape == "float64" else values.reshape(shape)

    images = textures(2, 16)
    scores = pretend(odd, batch_size=2)(images)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, brightness(images), **EXACT)


def test_single_number(pretend: Callable[..., PyIQAReward]) -> None:
    """A metric that answers with one number, even for a batch, is asked about each image alone."""
    images = textures(2, 16)
    scores = pretend(lambda images: images.mean(), batch_size=2)(images)
    torch.testing.assert_close(scores, brightness(images), **OTHER_PACKAGE)


def test_wrong_number_of_numbers(pretend: Callable[..., PyIQAReward]) -> None:
    """Outputs that are no scores are an error."""
    with pytest.raises(RuntimeError, match=r"expected one number per image from pyiqa \(2\), got shape \[2, 3\]"):
        pretend(lambda images: images.mean((2, 3)), batch_size=2)(textures(2, 16))


def test_metrics_of_one_image(pretend: Callable[..., PyIQAReward]) -> None:
    """Metrics that assert a batch of one get one image at a time, whatever `batch_size` says."""

    def single(images: Tensor) -> Tensor:
        assert images.shape[0] == 1
        return images.mean()

    images = textures(3, 16)
    torch.testing.assert_close(pretend(single, "qalign", batch_size=8)(images), brightness(images))


# ---- the process around


def test_ieee_precision() -> None:
    """`fp32_precision = "ieee"`, which transformers sets to switch TF32 off, does not disturb scoring."""
    references = textures(1, 48)
    images = noisy(references)
    expected = PyIQAReward("ssim")(images, references=references)
    settings = (torch.backends, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        scores = PyIQAReward("ssim")(images, references=references)
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
    torch.testing.assert_close(scores, expected, **EXACT)


def test_flags_of_other_threads() -> None:
    """The process's cudnn flags stay as the trainer set them while a metric runs."""
    seen = []
    reward = PyIQAReward("gmsd")
    reward.model.net.register_forward_hook(
        lambda *_: seen.append((torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic))
    )
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        reward(textures(1, 48), references=textures(1, 48, seed=1))
    finally:
        torch.backends.cudnn.benchmark = before
    assert seen == [(True, False)]


def test_piqe_from_threads() -> None:
    """PIQE, which keeps results on itself while it runs, gives every thread its own image's score."""
    batches = [noisy(textures(1, 64, seed), 0.01 * seed) for seed in range(12)]
    reward = PyIQAReward("piqe")
    expected = [reward(batch) for batch in batches]
    with ThreadPoolExecutor(6) as pool:
        for scores, right in zip(pool.map(reward, batches * 4), expected * 4, strict=True):
            torch.testing.assert_close(scores, right, **EXACT)


def test_one_call_at_a_time(pretend: Callable[..., PyIQAReward]) -> None:
    """No two threads are inside one metric object at once."""
    inside, most = [0], [0]

    def counting(images: Tensor) -> Tensor:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        values = torch.linalg.svdvals(images.flatten(1)[:, :10000].reshape(-1, 100, 100)).sum(1)  # releases the GIL
        inside[0] -= 1
        return values

    reward = pretend(counting)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(reward, [textures(1, 64, seed) for seed in range(24)]))
    assert most == [1]


def test_default_dtype_and_device() -> None:
    """A foreign default device changes nothing; a foreign default dtype, which would change scores, is refused."""
    references = textures(1, 48)
    images = noisy(references)
    expected = PyIQAReward("ssim")(images, references=references)
    with torch.device("meta"):
        torch.testing.assert_close(PyIQAReward("ssim")(images, references=references), expected, **EXACT)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.raises(RuntimeError, match="expected float32 as torch's default dtype"):
            PyIQAReward("ssim")(images, references=references)
    finally:
        torch.set_default_dtype(torch.float32)


def test_random_state() -> None:
    """Building a network and scoring leave the trainer's random numbers alone."""
    state = torch.get_rng_state()
    PyIQAReward("wadiqam_nr", pretrained=False)(textures(1, 40))
    torch.testing.assert_close(torch.get_rng_state(), state, **EXACT)


def test_gradient_on_flat_images() -> None:
    """Where FSIM's gradient is NaN, on a constant pair, the image gets none and the others keep theirs."""
    references = textures(2, 48)
    images = noisy(references)
    images[1], references[1] = 0.5, 0.5
    images.requires_grad_()
    scores = PyIQAReward("fsim", differentiable=True, batch_size=2)(images, references=references)
    (gradient,) = torch.autograd.grad(scores.nan_to_num().sum(), images)
    assert gradient.isfinite().all()
    assert gradient[0].abs().max() > 0


def test_pickled_after_use() -> None:
    """A used reward can be sent to a worker and scores the same there."""
    reward = PyIQAReward("ssim")
    references = textures(1, 48)
    images = noisy(references)
    scores = reward(images, references=references)
    copy = pickle.loads(pickle.dumps(reward))
    torch.testing.assert_close(copy(images, references=references), scores, **EXACT)


# ---- what is refused, and what is missing


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        ("musiqq", {}, "near names: musiq"),
        ("fid", {}, "compares two sets of images"),
        ("inception_score", {}, "rates a set of images"),
        ("clipscore", {}, "agreement with a caption"),
        ("fgresq_pair", {}, "use 'fgresq'"),
        ("maclip", {"device": "cpu"}, "runs on CUDA only"),
        ("ssim", {"as_loss": True}, r"got \['as_loss'\], which it sets itself"),
        *((metric, {"differentiable": True}, "expected differentiable=False") for metric in NO_GRADIENT),
    ],
)
def test_refused_before_loading(metric: str, options: dict[str, Any], message: str) -> None:
    """What cannot work is refused in words when the reward is made."""
    with pytest.raises(ValueError, match=message):
        PyIQAReward(metric, **options)


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        ("maclip", {}, "runs on CUDA only"),
        (
            "ssim",
            {"no_such_option": 1},
            "'no_such_option'.*It has channels, color_space, .*; every metric has normalize",
        ),
    ],
)
def test_refused_at_first_use(metric: str, options: dict[str, Any], message: str) -> None:
    """What only the metric's own constructor knows is refused in words at the first call."""
    with pytest.raises(ValueError, match=message):
        PyIQAReward(metric, **options)(textures(1, 48), references=textures(1, 48))


@pytest.mark.parametrize(
    ("metric", "module", "package"), [("qalign", "icecream", "icecream"), ("clipiqa", "pkg_resources", "setuptools<81")]
)
def test_undeclared_requirement(metric: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that pyiqa imports without requiring them are named, with the package that brings them."""

    def create_metric(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    monkeypatch.setattr(ours, "require", lambda *_, **__: SimpleNamespace(create_metric=create_metric))
    with pytest.raises(ImportError, match=f"needs `{module}`.*pip install .?{package}"):
        PyIQAReward(metric)(textures(1, 48))


@pytest.mark.parametrize("metric", ["musiq", "brisque"])
def test_offline(metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the error says where weights are looked for and how to bring them."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    with pytest.raises(OSError, match=r"could not be downloaded.* copy its caches here: .*pyiqa.*weights='<file>'"):
        PyIQAReward(metric)(textures(1, 48))


class Bomb:
    """Pickles as code that writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


def test_weights_that_hold_code(tmp_path: Path) -> None:
    """A weight file with code in it is refused unread, although pyiqa would run it."""
    torch.save({"params": Bomb(tmp_path / "executed")}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb\.pth cannot be read as weights"):
        PyIQAReward("musiq", weights=tmp_path / "bomb.pth")(textures(1, 48))
    assert not (tmp_path / "executed").exists()


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    """A file of another layout, or for a metric that reads none, is an error in words."""
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    for metric, message in (("musiq", "laid out as"), ("psnr", "no file option"), ("ssim", "does not have")):
        with pytest.raises(ValueError, match=message):
            PyIQAReward(metric, weights=tmp_path / "other.pth")(textures(1, 48), references=textures(1, 48))
    with pytest.raises(FileNotFoundError):
        PyIQAReward("musiq", weights=tmp_path / "nowhere.pth")(textures(1, 48))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.fill_(torch.inf), "NaN or infinite"),
        (lambda weight: weight.to(torch.int8), "int8"),
        (lambda weight: "a string", "laid out as"),
        (lambda weight: [weight], "laid out as"),
    ],
)
def test_damaged_weights(tmp_path: Path, change: Callable[[Tensor], Any], message: str) -> None:
    """Weights that pyiqa would take as they are, or fail on in its own way, are errors that name the file."""
    path = seeded_weights("wadiqam_fr", tmp_path / "wadiqam.pth", lambda state: {"params": state})
    state = torch.load(path)
    name = next(key for key in state["params"] if key.endswith("weight"))
    state["params"][name] = change(state["params"][name])
    torch.save(state, path)
    with pytest.raises(ValueError, match=message) as caught:
        PyIQAReward("wadiqam_fr", weights=path)(textures(1, 48), references=textures(1, 48))
    assert "wadiqam.pth" in str(caught.value)
    assert name in str(caught.value) or message == "laid out as"


PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "weights" / "stlpips"
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason="the published weights are not distributed with the repository (no ../shared/data)"
)


@needs_published
def test_published_weights() -> None:
    """ST-LPIPS with its authors' file passes the checks and gives their figure for their example."""
    image, reference = (to_images(PUBLISHED / name) for name in ("ex_p0.png", "ex_ref.png"))
    score = PyIQAReward("stlpips", weights=PUBLISHED / "alex_shift_tolerant.pth")(image, references=reference)
    torch.testing.assert_close(score, torch.tensor([-0.7777555]), **OTHER_PACKAGE)


@needs_published
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("net.slice4.11.weight", None, "lacks"),
        ("net.slice1.0.bias", None, "lacks"),
        ("lin3.model.1.weight", None, "lacks"),
        ("scaling_layer.shift", lambda value: value.fill_(torch.nan), "NaN or infinite"),
        ("scaling_layer.shift", lambda value: value.to(torch.int8), "int8"),
        ("net.slice2.4.filt", lambda value: value.to(torch.int8), "int8"),
    ],
)
def test_damaged_published_weights(tmp_path: Path, name: str, change: Callable | None, message: str) -> None:
    """pyiqa would leave a layer of the trunk or of the heads untrained, and take a buffer as it is."""
    state = torch.load(PUBLISHED / "alex_shift_tolerant.pth", map_location="cpu")
    value = state.pop(name)
    if change is not None:
        state[name] = change(value)
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match=message) as caught:
        PyIQAReward("stlpips", weights=tmp_path / "damaged.pth")(textures(1, 64), references=textures(1, 64))
    assert "damaged.pth" in str(caught.value)
    assert name in str(caught.value)


class Parts(nn.Module):
    """A backbone with a normalisation, heads, and a constant: what pyiqa's networks consist of."""

    def __init__(self, pretrained_model_path: str | None = None) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head0, self.head1 = nn.Linear(4, 1), nn.Linear(4, 1)
        self.heads = nn.ModuleList([self.head0, self.head1])
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head0(self.trunk(images).mean((2, 3)))


@pytest.mark.parametrize(
    ("dropped", "missing"),
    [
        (("trunk", "heads", "mean"), None),
        (("head", "mean", "trunk.1.num_batches"), None),
        (("head0", "head1"), None),
        (("trunk", "heads", "head1"), "head1.weight"),
        (("head", "trunk.0"), "trunk.0.weight"),
        (("trunk.1.running_mean",), "trunk.1.running_mean"),
    ],
)
def test_files_of_a_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dropped: tuple[str, ...], missing: str | None
) -> None:
    """A file may hold heads without a backbone or the reverse, under either name, but no layer of a series alone."""
    metric = Metric(brightness, "cnniqa")
    metric.net = Parts()
    monkeypatch.setattr(ours, "require", lambda *_, **__: SimpleNamespace(create_metric=lambda *_, **__: metric))
    state = {name: value for name, value in metric.net.state_dict().items() if not name.startswith(dropped)}
    torch.save({"params": state}, tmp_path / "part.pth")
    reward = PyIQAReward("cnniqa", weights=tmp_path / "part.pth")
    if missing is None:
        assert reward(textures(1, 48)).isfinite().all()
        return
    with pytest.raises(ValueError, match=r"part\.pth lacks .*" + missing.replace(".", r"\.")):
        reward(textures(1, 48))


def test_licence_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """The first use in a process logs the licence, and later ones do not repeat it."""
    ours._say_licence.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            PyIQAReward("psnr")(textures(1, 48), references=textures(1, 48))
    assert sum("PolyForm Noncommercial" in record.message for record in caplog.records) == 1


def test_device() -> None:
    """`to` returns the reward; offloading and onloading keep it working."""
    reward = PyIQAReward("gmsd").to("cpu")
    references = textures(1, 48)
    scores = reward(noisy(references), references=references)
    reward.offload()
    reward.onload()
    torch.testing.assert_close(reward(noisy(references), references=references), scores, **EXACT)
