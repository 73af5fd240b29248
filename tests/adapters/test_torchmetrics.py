"""Rewards as metrics: the mean of the plain scores, whoever computes it and over however many processes."""

import itertools
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import iqareward
from iqareward.rewards import RankInGroup, UnscoredWarning

torchmetrics = pytest.importorskip("torchmetrics")

from iqareward.adapters.torchmetrics import RewardMetric  # noqa: E402

NAMES = ["ssim", "psnr", "niqe", "quick", "0.7*ssim + 0.3*psnr"]
CUTS = ((0, 3, 4), (4, 5))  # batches of two processes: uneven in size and number


def mean(scores: Tensor) -> Tensor:
    return scores.double().nanmean().float()


def small_pairs() -> tuple[Tensor, Tensor]:
    """Six images, the second without a score, and their references."""
    rng = torch.Generator().manual_seed(0)
    references = torch.rand(6, 3, 32, 32, generator=rng)
    images = (references + 0.1 * torch.randn(references.shape, generator=rng)).clamp(0, 1)
    images[1, 0, 0, 0] = torch.nan
    return images, references


@pytest.mark.parametrize("name", NAMES)
def test_mean_of_the_plain_scores(name, photographs, degraded_photographs) -> None:
    """Over uneven batches; `forward` gives the mean of its batch; a broken image is counted and not averaged."""
    images = torch.cat([degraded_photographs, photographs])
    images[2, 0, 0, 0] = torch.nan
    references = torch.cat([photographs, photographs])
    expected = iqareward.load(name)(images, references=references)
    metric = RewardMetric(name)
    metric.update(images[:5], references[:5])
    torch.testing.assert_close(metric(images[5:], references=references[5:]), mean(expected[5:]))
    torch.testing.assert_close(metric.compute(), mean(expected))
    assert metric.compute().dtype == torch.float32
    assert metric.count_unscored() == 1
    metric.reset()
    metric.update(images[:2], references[:2])
    torch.testing.assert_close(metric.compute(), mean(expected[:2]))
    assert metric.count_unscored() == 0


def test_facts() -> None:
    """Higher is better, and whether there is a gradient is the reward's own answer, which `forward` keeps."""
    images, references = small_pairs()
    plain, differentiable = RewardMetric("ssim"), RewardMetric(iqareward.load("ssim", differentiable=True))
    assert (plain.higher_is_better, plain.is_differentiable, differentiable.is_differentiable) == (True, False, True)
    assert (plain.plot_lower_bound, plain.plot_upper_bound) == (-1.0, 1.0)
    images.requires_grad_()
    assert not plain(images, references).requires_grad
    differentiable(images, references).backward()
    assert images.grad.isfinite().all()
    assert [bool(row.any()) for row in images.grad] == [True, False, True, True, True, True]
    assert not differentiable.total.requires_grad


def test_nothing_scored_is_nan() -> None:
    """Never 0; and the count says why."""
    metric = RewardMetric("psnr")
    images = torch.full((2, 3, 16, 16), torch.nan)
    with pytest.warns(UnscoredWarning):
        metric.update(images, torch.zeros(2, 3, 16, 16))
    assert metric.compute().isnan()
    assert metric.count_unscored() == 2


def test_collection_keeps_rewards_apart() -> None:
    """Two rewards that scored nothing in the first batch have equal sums, and must not share them from then on."""
    images, references = small_pairs()
    metrics = torchmetrics.MetricCollection({"ssim": RewardMetric("ssim"), "psnr": RewardMetric("psnr")})
    with pytest.warns(UnscoredWarning):
        metrics.update(torch.full_like(images, torch.nan), references=references)
    metrics.update(images, references=references)
    for name, value in metrics.compute().items():
        torch.testing.assert_close(value, mean(iqareward.load(name)(images, references=references)))
    assert {name: metric.count_unscored() for name, metric in metrics.items()} == {"ssim": 7, "psnr": 7}
    clone = metrics.clone(prefix="val/")
    assert set(clone(images, references=references)) == {"val/ssim", "val/psnr"}


def test_in_a_model() -> None:
    """No weights or sums in the model's state, copies go on counting, and a bfloat16 model leaves sums alone."""
    images, references = small_pairs()
    model = nn.Module()
    model.quality = RewardMetric("quick")
    model.quality.update(images)
    before = model.quality.compute()
    assert model.state_dict() == {}
    model.to(torch.bfloat16)
    assert model.quality.total.dtype == torch.float64
    copy = pickle.loads(pickle.dumps(model.quality))
    copy.update(images)
    torch.testing.assert_close(copy.compute(), before)
    assert (copy.count_unscored(), model.quality.count_unscored()) == (2, 1)
    model.quality.reset()
    assert model.quality.total.dtype == torch.float64
    saved = RewardMetric("psnr")
    saved.persistent(True)
    saved.update(images, references)
    restored = RewardMetric("psnr")
    restored.persistent(True)
    restored.load_state_dict(saved.state_dict())
    assert set(saved.state_dict()) == {"total", "counts", "unequal"}
    assert restored.count_unscored() == 1
    assert torch.equal(restored.total, saved.total)


def test_other_columns_and_ranges() -> None:
    """Inputs and tasks reach a reward that needs them; pixels may be in [-1, 1] or integers."""
    images, references = small_pairs()
    images = images.nan_to_num()
    expected = mean(iqareward.load("psnr")(images, references=references))
    metric = RewardMetric("psnr", value_range=(-1, 1))
    metric.update(2 * images - 1, 2 * references - 1)
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-5, atol=0.0)
    gain = RewardMetric(iqareward.InputFidelity(iqareward.load("psnr")))
    gain.update(images, inputs=references)
    torch.testing.assert_close(gain.compute(), expected)
    metric = RewardMetric("psnr")
    metric.update((255 * images).byte(), (255 * images).byte())
    assert metric.compute() > 90


def test_errors() -> None:
    """A missing reference, and a reward that no mean can be made of."""
    with pytest.raises(ValueError, match="references"):
        RewardMetric("ssim").update(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"RewardMetric got reward 'rank\(ssim\)', which needs `ids`"):
        RewardMetric(RankInGroup(iqareward.load("ssim")))


def of_process(rank: int, folder: str) -> None:
    """One of two processes with its own batches."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        images, references = small_pairs()
        metric = RewardMetric("ssim")
        bounds = CUTS[rank]
        for start, stop in itertools.pairwise(bounds):
            metric.update(images[start:stop], references[start:stop])
        found = [metric.compute(), metric.compute(), torch.tensor(metric.count_unscored())]
        metric.update(images[5:] if rank else images[:0], references[5:] if rank else references[:0])
        torch.save([*found, metric.compute()], Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path) -> None:
    """Also once more after the sums were gathered: nothing is counted twice."""
    mp.start_processes(of_process, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    images, references = small_pairs()
    scores = iqareward.load("ssim")(images, references=references)
    for rank in range(2):
        first, again, unscored, at_last = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(first, mean(scores[:5]))
        assert torch.equal(first, again)
        assert unscored == 1
        torch.testing.assert_close(at_last, mean(scores))
