"""The experiment on photographs runs, goes on after a kill, and its statistics are right."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator

import iqareward
from benchmarks.restoration import groups, report, world
from benchmarks.restoration.__main__ import FILES, load, main, save
from benchmarks.restoration.analysis import Study, above_front, difference, interquartile_mean
from benchmarks.restoration.arms import (
    EARLY,
    FRONT,
    MAIN,
    UNTRAINED,
    VARIANTS,
    WEIGHTERS,
    LearningProgress,
    Relative,
    above,
    inverse_power,
    jobs,
)  # fmt: skip
from benchmarks.restoration.run import GRADIENT_STEPS
from examples.small_restorer.tasks import TASKS
from iqareward.diffusion import DifficultyAdaptiveTrainer, DirectRewardGradient, RolloutConfig, TrainConfig
from iqareward.schedules import check_signal

ROOT = Path(__file__).parents[2]
PICTURES, SEEDS = 24, 5
SEVERITY = np.linspace(0.3, 1, PICTURES)[:, None] * np.linspace(0.5, 1.5, len(TASKS))


def rows_of(arms: dict[str, tuple[float, float] | Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]], noise=0.0):
    """Runs whose RMSE is severity times, and whose quality is, what an arm says; `noise` differs from seed to seed."""
    found = []
    for arm, effect in arms.items():
        for seed in range(1 if arm in UNTRAINED else SEEDS):
            rng = np.random.default_rng([seed, 1])
            error, quality = effect(SEVERITY) if callable(effect) else effect
            shift = noise * rng.standard_normal() + seed  # alike for all arms of a seed: pairing takes it away
            own = noise * np.random.default_rng([seed, len(arm), 2]).standard_normal(SEVERITY.shape)
            test = {
                "rmse": (SEVERITY * error).ravel().tolist(),
                "stlpips": (quality + shift + own).ravel().tolist(),
                "haarpsi": (quality + np.zeros_like(SEVERITY)).ravel().tolist(),
            }
            job = {"start": "converged", "reward": "haarpsi", "arm": arm, "seed": seed}
            found.append({**job, "seconds": 1.0, "history": {}, "test": test})
    return found


def test_a_planted_effect_is_found_where_it_was_planted():
    """A gain on hard inputs only, over seeds of very different levels, with noise; nothing on the others."""

    def better(severity):
        hard = severity.argsort(0).argsort(0) >= 2 * PICTURES // 3
        return np.ones_like(severity), 0.1 * hard

    study = Study(rows_of({"frozen": (1, 0), "rl": (1, 0), "adaptive": better}, noise=0.02))
    hard = difference(study, "adaptive", "rl", "stlpips", "hard")
    assert hard.low < 0.1 < hard.high
    assert hard.value == pytest.approx(0.1, abs=0.02)
    assert hard.sign == 1
    for tercile in ("easy", "middle"):
        assert difference(study, "adaptive", "rl", "stlpips", tercile).sign == 0


def test_differences_in_percent_and_terciles():
    """Twice the error is 100 percent more in every tercile; terciles have eight pictures of each task, easy to hard."""
    study = Study(rows_of({"frozen": (1, 0), "rl": (1, 0), "sft": (2, 0)}))
    assert difference(study, "sft", "rl", "rmse", "hard", relative=True) == pytest.approx((100, 100, 100))
    assert [int(study.mask(name).sum()) for name in ("easy", "middle", "hard", "all")] == [40, 40, 40, 120]
    means = [study.mean("frozen", "rmse", name) for name in ("easy", "middle", "hard")]
    assert means == sorted(means)
    assert study.mean("rl", "psnr") == pytest.approx(float(-20 * np.log10(SEVERITY).mean()))


def test_a_change_in_one_task_counts_unless_it_is_trimmed():
    """One of five tasks falls by .5, the others rise by .1: the mean is -.02, the middle half sees the rise alone."""

    def uneven(severity):
        return np.ones_like(severity), np.where(np.arange(len(TASKS)) == 4, -0.5, 0.1) + np.zeros_like(severity)

    study = Study(rows_of({"frozen": (1, 0), "rl": (1, 0), "sft": uneven}))
    assert difference(study, "sft", "rl", "haarpsi") == pytest.approx((-0.02,) * 3)
    assert difference(study, "sft", "rl", "haarpsi", trimmed=True).value == pytest.approx(0.1)
    for place, task in enumerate(TASKS):
        expected = -0.5 if place == 4 else 0.1
        assert difference(study, "sft", "rl", "haarpsi", task=task) == pytest.approx((expected,) * 3)
    doubled = Study(rows_of({"frozen": (1, 0), "rl": (1, 0), "sft": (2, 0)}))
    assert difference(doubled, "sft", "frozen", "rmse", relative=True, task="jpeg") == pytest.approx((100,) * 3)


def test_equal_compute_counts_what_the_gradient_goes_through():
    """The network is called with gradient as often in the last steps of the sampler as `evaluations` says."""
    bench = world.Bench.__new__(world.Bench)
    bench.scale, bench.device = world.QUICK, "cpu"
    policy, pairs = bench.start("converged"), world.training(world.QUICK)
    calls = []
    policy.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    objective = DirectRewardGradient(iqareward.load("haarpsi", differentiable=True), checkpointed=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DifficultyAdaptiveTrainer(
            policy,
            objective.reward,
            pairs,
            output_dir=folder,
            weighter=WEIGHTERS["rl"](),
            objective=objective,
            rollout_config=RolloutConfig(1, num_steps=policy.num_steps),
            train_config=TrainConfig(inputs_per_update=4, minibatches=1, epochs=1, rows_at_once=None),
            accelerator=Accelerator(cpu=True),
            show_progress=False,
        )
        trainer.train(1)
    rollouts, learning = calls.count(False), calls.count(True)
    assert learning == GRADIENT_STEPS + 1  # and once for the SFT loss
    assert rollouts % policy.num_steps == 0


def test_distance_from_the_front():
    """Zero on the line between two shares, the height above it elsewhere; the best share at most as wrong counts."""
    front = dict(zip(FRONT, [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (6, 5), (7, 6)], strict=True))
    cases = {
        "adaptive": ((2.5, 1.5), 0.0),  # between
        "reversed": ((2.5, 1.9), 0.4),  # above
        "inverse error": ((8, 5), -1.0),  # below the end
        "inverse square": ((0.5, 1), 1.0),  # more faithful than every constant
    }
    study = Study(rows_of({"frozen": (1, 0)} | front | {name: point for name, (point, _) in cases.items()}))
    for name, (_, expected) in cases.items():
        for where in (("all", "all"), ("hard", "easy")):
            found = above_front(study, name, "stlpips", where=where)
            assert found == pytest.approx((expected,) * 3, abs=1e-9)
    assert above_front(study, "reversed", "haarpsi", "psnr").value > 0.3


def test_interquartile_mean_ignores_outliers():
    """Of eight values, the middle four count."""
    assert interquartile_mean(np.array([-99.0, 0, 1, 2, 3, 4, 5, 1e9])) == 2.5


def test_tables_name_every_arm_and_figures_are_drawn(tmp_path):
    """From runs alone; an arm that has none is left out; a weighting above the front in both places meets the rule."""
    arms = {"frozen": (1, 0.2), "sft, all compute": (1, 0.1)}
    arms |= dict(zip(FRONT, [(1 + 0.1 * place, 0.1 * place) for place in range(len(FRONT))], strict=True))
    rows = rows_of(arms | {"adaptive": (1.05, 0.5)})
    for row in rows:
        row["test"] |= dict.fromkeys(("cvvdp", "ssim", "quick", "niqe"), row["test"]["haarpsi"])
        row["history"] = {name: [0.5] * 6 for name in ("update", "reward", "difficulty", "rl_share", "sft_share")}
    rows[0]["strip"] = world.strip(torch.rand(120, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    document = {"rows": rows, "theme": "restoration"}
    assert report.absolute(document, "converged").count("\n| ") == len({row["arm"] for row in rows})
    assert "| **yes** |" in next(
        line for line in report.distances(document, "converged").splitlines() if "adap" in line
    )
    assert "| adaptive |" in report.weightings(document, "converged")
    assert (
        report.constants(document, "converged").count("| **+0.5000 [+0.5000, +0.5000]**") == 4
    )  # less sft, which is 0
    assert "0.50, 0.50" in report.hand_over(document, "converged")
    assert "| haarpsi | adaptive | 5 |" in report.rewards(document)
    assert "| rewards | 0 of 48 |" in report.progress(document)
    for name, draw in report.FIGURES.items():
        assert f"../assets/photographs_{name}.png" in report.images(document)
        draw(document).savefig(tmp_path / "figure.png", dpi=30)


def test_a_cut_leaves_whole_seeds():
    """Every trained arm of a seed comes before the next seed; what is not trained comes once; no job twice."""
    found = list(jobs("main", 5))
    trained = len(MAIN) - len(UNTRAINED)
    assert len(found) == len(set(found)) == len(UNTRAINED) + 5 * trained
    assert [job.arm for job in found[: len(MAIN)]] == list(MAIN)
    assert {job.seed for job in found[len(MAIN) : len(MAIN) + trained]} == {1}
    assert {job.arm for job in jobs("early", 1)} == set(EARLY)
    assert {job.seed for job in jobs("rewards", 5)} == {0, 1}
    assert {VARIANTS[job.arm].arm for job in jobs("variants", 5)} == {"fixed 0.5", "adaptive", "rl"}
    assert {*MAIN, *EARLY} <= {*UNTRAINED, "sft, all compute", "learning progress", *WEIGHTERS}


def test_inputs_have_their_task_and_the_same_picture_for_all_tasks():
    """Row 5 p + t is picture p with task t; severities are spread evenly within each task; all pixels are used once."""
    pairs = world.test(world.QUICK)
    assert len(pairs) == 15
    assert pairs.references[0].equal(pairs.references[4])
    assert not pairs.references[4].equal(pairs.references[5])
    values = world.severities(24)
    torch.testing.assert_close(values.sort(0).values[:, 3], torch.linspace(0.3, 1, 24))
    training = world.training(world.QUICK)
    assert training.degraded.shape == (40, 3, 32, 32)
    again = list(TASKS.values())[2](training.references[7:8], torch.tensor([0.5]), [7], seed=world.TRAIN)
    assert again.shape == training.degraded[7:8].shape


def test_groups_differ_more_in_patches_than_in_whole_images():
    """Damage that moves within an image leaves the whole alike and the quarters different; no damage, no spread."""
    references = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = references[:, None].repeat(1, 4, 1, 1, 1)
    assert groups.spread(iqareward.load("haarpsi"), images, references, 1) == pytest.approx(
        {"score": 1, "headroom": 0, "within": 0, "between": 0, "best": 0}, abs=1e-5
    )
    for copy, (top, left) in enumerate([(0, 0), (0, 32), (32, 0), (32, 32)]):
        images[:, copy, :, top : top + 32, left : left + 32] = 0.5
    whole, quarters = (groups.spread(iqareward.load("haarpsi"), images, references, times) for times in (0, 1))
    assert quarters["within"] > 5 * whole["within"]
    assert quarters["best"] > 0.1


def test_quarters_keep_pictures_together():
    """Rows 4 i to 4 i + 3 are the quarters of image i, and together they are its pixels; so the task is i // 4 % 5."""
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    parts = world.quarters(images)
    assert parts.shape == (8, 3, 2, 3)
    assert parts[4].equal(images[1, :, :2, :3])
    assert parts[7].equal(images[1, :, 2:, 3:])
    assert parts[4:].flatten().sort().values.equal(images[1].flatten())


def test_weights_relative_to_the_start():
    """Half SFT at the median, four times less at twice that error for the square; RL for the worst only."""
    errors = torch.tensor([0.05, 0.1, 0.2, torch.nan])
    square, worst = Relative(partial(inverse_power, power=2.0)), Relative(above, 0.7)
    for weighter in (square, worst):
        check_signal("test", weighter)
        weighter.calibrate(errors)
    weights = square(errors)
    torch.testing.assert_close(weights.sft, torch.tensor([2.0, 0.5, 0.125, 0.5]))
    assert weights.rl.tolist() == [1, 1, 1, 0]
    assert worst(errors).rl.tolist() == [0, 0, 1, 0]
    assert worst(errors).taking_part.tolist() == [False, False, True, False]


def test_learning_progress_goes_to_the_task_whose_error_falls():
    """SFT where errors fall by two percent per update, RL where they stay, and RL again once they have stopped."""
    before, ids = torch.full((10,), 0.1), list(range(10))
    weighter, error = LearningProgress(before, ids=lambda update: ids), before.clone()
    for _ in range(20):
        error[0::5] *= 0.98
        weighter.update(error)
    assert weighter(error).sft[0] > 0.9
    torch.testing.assert_close(weighter(error).rl[1:5], torch.ones(4))
    for _ in range(100):
        weighter.update(error)
    assert weighter(error).sft[0] < 0.1


def test_results_come_back_as_they_were_written(tmp_path):
    """One run per line, in valid JSON; a file that does not exist has no runs."""
    file = tmp_path / "results.json"
    assert load(file) == []
    rows = rows_of({"frozen": (1, 0), "rl": (1, 1)})
    save(file, rows, world.QUICK, "cpu")
    assert load(file) == rows
    assert json.loads(file.read_text())["scale"]["name"] == "quick"


def wait_until_gone(group: int) -> None:
    """Until nothing of a process group runs; fails after a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not any(is_running(process, group) for process in psutil.process_iter()):
            return
        time.sleep(0.1)
    pytest.fail("the workers of a killed run are still there")


def is_running(process: psutil.Process, group: int) -> bool:
    """Whether a process is of the group, and not only waiting to be collected."""
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False


@pytest.mark.filterwarnings("ignore")
def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    """What was finished stays as it is, the rest is done, and every figure is finite; arms share their start."""
    file, environment = tmp_path / "results.json", {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["--quick", "--study", "main", "--seeds", "1", "--workers", "1", "--results", str(file)]
    options += ["--arms", "frozen", "rl", "learning progress"]
    command = [sys.executable, "-m", "benchmarks.restoration", *options]
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not load(file) and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        running.kill()
        running.wait()
        wait_until_gone(running.pid)  # its workers, too
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    before = load(file)
    assert 1 <= len(before) < 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    main(options)
    rows = load(file)
    assert rows[: len(before)] == before
    assert [row["arm"] for row in rows] == ["frozen", "rl", "learning progress"]
    assert all(np.isfinite(values).all() for row in rows for values in row["test"].values())
    frozen, rl = (row["test"]["rmse"] for row in rows[:2])
    assert frozen != rl
    np.testing.assert_allclose(frozen, rl, rtol=0.5)


@pytest.mark.slow
def test_the_stage_for_a_gpu_runs_on_a_cpu(tmp_path):
    """Its runs are in a file of their own beside the results of the stage."""
    command = [sys.executable, "-W", "ignore", "benchmarks/gpu/run.py", "--module", "benchmarks.gpu.restoration"]
    command += ["--tiny", "--out", str(tmp_path), "--seconds", "500"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=True)
    assert json.loads((tmp_path / "results.json").read_text())["restoration"]["runs"] == {"runs_before": 0, "runs": 2}
    assert [row["arm"] for row in load(tmp_path / FILES["gpu"])] == ["frozen", "rl"]
