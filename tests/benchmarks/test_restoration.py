"""The image experiment runs, every arm end to end and resumable, and its statistics are right."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.restoration import analysis, world
from benchmarks.restoration.arms import arms
from benchmarks.restoration.run import Job, run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_quick_run_is_complete_and_resumes(tmp_path):
    """Every arm of the protocol has finite figures for every tercile; a second run reads them and says the same."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.restoration", "--quick", "--folder", str(tmp_path)]

    def document():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    first = document()
    names = {*arms(1), "frozen", "sft, all compute"}
    assert {row["arm"] for row in first["summary"]} == names
    assert all(np.isfinite(row[measure]) for row in first["summary"] for measure in analysis.MEASURES)
    assert len(first["rows"]) == 3 * (len(names) - 1)
    assert {"theme", "hardware", "date", "commit", "versions", "rows", "targets"} <= first.keys()
    (tmp_path / "results" / "super-resolution-0-adaptive.json").unlink()  # its checkpoint is still there
    assert document()["summary"] == first["summary"]


def test_arms_differ_but_share_their_start(tmp_path):
    """SFT alone and RL alone end in different models; both began at the frozen one."""
    test = {arm: run(Job(world.QUICK, "denoising", 0, arm, tmp_path, "cpu"))["test"] for arm in ("frozen", "sft", "rl")}
    assert test["sft"]["rmse"] != test["rl"]["rmse"]
    assert test["sft"]["severity"] == test["rl"]["severity"]
    for arm in ("sft", "rl"):
        np.testing.assert_allclose(test[arm]["rmse"], test["frozen"]["rmse"], rtol=0.2)


def test_terciles_go_from_easy_to_hard():
    """Nine inputs in three groups of three, by error."""
    found = analysis.terciles([0.9, 0.1, 0.5, 0.2, 0.6, 0.8, 0.3, 0.4, 0.7])
    assert [sorted(group.tolist()) for group in found] == [[1, 3, 6], [2, 4, 7], [0, 5, 8]]


def test_interval_holds_the_mean_and_shrinks():
    """Around the true mean; narrower with more seeds; none for one seed."""
    values = np.random.default_rng(0).normal(0.3, 0.1, 200)
    mean, low, high = analysis.interval(values)
    few = analysis.interval(values[:8])
    assert low < 0.3 < high
    assert mean == pytest.approx(values.mean())
    assert few[2] - few[1] > high - low
    assert np.isnan(analysis.interval([1.0])[1])


def test_differences_are_paired_by_seed():
    """A constant gain of 0.1 over very different seeds has an interval of no width."""
    rows = [
        {"task": "t", "arm": arm, "seed": seed, "tercile": "hard"}
        | dict.fromkeys(analysis.MEASURES, 10.0 * seed + gain)
        for seed in range(4)
        for arm, gain in (("sft", 0.0), ("rl", 0.1))
    ]
    (line,) = analysis.against(rows, "sft")
    assert [line["reward"][name] for name in ("mean", "low", "high", "iqm")] == pytest.approx([0.1] * 4)
    assert line["seeds"] == 4
