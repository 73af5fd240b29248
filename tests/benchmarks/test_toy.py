"""The benchmarks of the training signals: the toy experiment with its own weightings, and the overhead per step."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_overhead
from benchmarks.toy import __main__ as toy
from benchmarks.toy.controllers import GradientNoise, NoiseAware, RunningAnchor, TargetTracking, gradient_noise
from tests.benchmarks.quick import quick_run
from tests.tolerances import FORMULA_FP32

ROOT = Path(__file__).resolve().parents[2]


def difficulties(seed: int, num_rows: int = 256) -> torch.Tensor:
    """Log-normal distances with a spread of 0.8."""
    return torch.exp(0.8 * torch.randn(num_rows, generator=torch.Generator().manual_seed(seed)) - 2.5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("benchmark", [toy, bench_overhead])
def test_quick_run_ends_in_its_document(benchmark):
    """The smoke run's last line is one JSON document with rows and targets."""
    pytest.importorskip("matplotlib")
    document = quick_run(benchmark)
    assert {"theme", "hardware", "date", "commit", "versions", "rows", "targets"} <= set(document)
    assert document["rows"]


def test_default_beats_the_tuned_constant_in_every_committed_run():
    """The whole interval of PSNR and of mean RMSE gained over the front of fixed shares is positive, as claimed."""
    runs = sorted((ROOT / "benchmarks" / "results").glob("toy_weighting_*.json"))
    assert len(runs) >= 6
    for path in runs:
        rows = {row["arm"]: row for row in json.loads(path.read_text())["rows"]}
        for gain in ("gain psnr", "gain rmse"):
            assert rows["adaptive"][gain][1] > 0, f"{path.name}: {gain}"


def test_running_anchor_keeps_half_on_a_stationary_stream():
    """The mean weight stays near one half when the difficulty does not change, and the spread is that of the stream."""
    weighter, means = RunningAnchor("convex"), []
    weighter.calibrate(difficulties(0))
    for step in range(300):
        rows = difficulties(1000 + step, 4)
        means.append(weighter(rows).rl.mean())
        weighter.update(rows)
    assert torch.stack(means[100:]).mean().item() == pytest.approx(0.5, abs=0.05)
    assert weighter.variance.sqrt().item() == pytest.approx(0.8, rel=0.2)


def test_target_tracking_holds_its_share():
    """Whatever the level of difficulty, the mean share settles at the target; an empty step moves nothing."""
    weighter = TargetTracking(centre=0.0, target=0.3, eta=0.1)
    for _ in range(400):
        weighter.update(difficulties(0))
    assert weighter(difficulties(0)).rl.mean().item() == pytest.approx(0.3, abs=0.01)
    before = weighter.state_dict()["centre"]
    weighter.update(torch.full((4,), torch.nan))
    assert weighter.state_dict()["centre"] == before


def test_gradient_noise_is_unbiased():
    """Over many draws the estimates average to the true variances and squared distance."""
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(2000):
        rl = torch.tensor([1.0, 0.0, 0.0]) + 0.5 * torch.randn(4, 3, generator=generator)
        sft = torch.tensor([0.0, 3.0, 0.0]) + 0.2 * torch.randn(4, 3, generator=generator)
        estimates.append(torch.stack(list(gradient_noise(rl, sft))))
    torch.testing.assert_close(torch.stack(estimates).mean(0), torch.tensor([0.75, 0.12, 10.0]), rtol=0.03, atol=0.0)


def test_noise_share_minimises_the_error_of_the_mixture():
    """The share it settles at is the best mixture, and one observation moves it by at most max_step."""
    noise = GradientNoise(torch.tensor(3.0), torch.tensor(0.5), torch.tensor(1.0))
    weighter, careful = NoiseAware(ema=0.0, max_step=1.0), NoiseAware(max_step=0.1)
    weighter.observe(noise)
    careful.observe(noise)
    torch.testing.assert_close(weighter(torch.zeros(1)).sft, torch.tensor([3 / 4.5]), **FORMULA_FP32)
    torch.testing.assert_close(careful(torch.zeros(1)).sft, torch.tensor([0.6]), **FORMULA_FP32)
