"""The image experiment runs, every arm end to end and resumable, and its statistics are right."""

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks.restoration import analysis, report, tables, world
from benchmarks.restoration.__main__ import main, ordered
from benchmarks.restoration.arms import MAIN, arms
from benchmarks.restoration.judges import artefacts
from benchmarks.restoration.rewards import mirrored
from benchmarks.restoration.run import run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_quick_run_is_complete_resumes_and_is_reported(tmp_path, monkeypatch):
    """Every arm has finite figures; a lost result is made again, the same; the report has every table and figure."""
    folder = str(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["restoration", "--quick", "--folder", folder])
    main()
    lost = tmp_path / "run/results/0-adaptive.json"
    first = json.loads(lost.read_text())
    lost.unlink()  # its checkpoint is still there
    again = run(world.Job(world.QUICK, 0, "adaptive", tmp_path / "run"))
    assert (again["test"], again["history"]) == (first["test"], first["history"])
    results = analysis.load(tmp_path / "run")
    assert {row["arm"] for row in results} == {*arms(1), *MAIN}
    assert all(
        np.isfinite(row[place][name]).all()
        for row in results
        for place in ("test", "photographs")
        for name in row[place]
    )
    options = ("--results", str(tmp_path / "tables"), "--figures", str(tmp_path / "figures"))
    monkeypatch.setattr(sys, "argv", ["report", folder, *options])
    report.main()
    assert len(list((tmp_path / "figures").glob("restoration_*.png"))) == 5
    record = json.loads(next((tmp_path / "tables").glob("*.json")).read_text())
    assert {"main", "distances", "rewards", "cost"} <= {row["table"] for row in record["rows"]}


def test_arms_differ_but_share_their_start(tmp_path):
    """SFT alone and RL alone end in different models; both began at the frozen one."""
    test = {arm: run(world.Job(world.QUICK, 0, arm, tmp_path))["test"] for arm in ("frozen", "sft", "rl")}
    assert test["sft"]["rmse"] != test["rl"]["rmse"]
    assert test["sft"]["severity"] == test["rl"]["severity"]
    for arm in ("sft", "rl"):
        np.testing.assert_allclose(test[arm]["rmse"], test["frozen"]["rmse"], rtol=0.2)


def test_a_cut_leaves_whole_seeds():
    """Main arms of five seeds first, seed by seed; then the rest; every job once."""
    jobs = list(ordered(6))
    assert [arm for _, arm in jobs[: 2 * len(MAIN)]] == [*MAIN, *MAIN]
    assert {seed for seed, _ in jobs[: 5 * len(MAIN)]} == {0, 1, 2, 3, 4}
    assert {arm for _, arm in jobs} == {*arms(1), *MAIN}
    assert len(jobs) == len(set(jobs))


def test_data_sets_share_no_scene_and_take_turns():
    """Training and test differ; a row is damaged by its own task only."""
    train, test = (world.pairs(world.QUICK, purpose, 0) for purpose in (world.TRAIN, world.TEST))
    assert not (train.references[:, None] == test.references[None]).flatten(2).all(2).any()
    for number, damage in enumerate(world.TASKS.values()):
        rows = list(range(number, len(test), 3))
        again = damage(test.references[rows], test.severity[rows], rows, seed=world.TEST)
        torch.testing.assert_close(test.degraded[rows], again, rtol=0, atol=0)


def test_mirrored_copies_have_no_seams_and_enough_pixels():
    """96 pixels or more; the image itself is the first copy; neighbouring copies meet in equal pixels."""
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    copies = mirrored(image)
    assert copies.shape == (1, 3, 96, 96)
    assert copies[..., :32, :32].equal(image)
    assert copies[..., 31].equal(copies[..., 32])
    assert copies[..., 63, :].equal(copies[..., 64, :])


def test_artefacts_grow_with_their_strength():
    """The change to an image is larger where the strength is, kind by kind."""
    images = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)) / 2 + 0.25
    changed, strength = artefacts(images, ("grain", "grid"), seed=1)
    size = (changed - images).abs().mean((1, 2, 3))
    for kind in range(2):
        ranks = [values[kind::2].argsort().argsort().float() for values in (size, strength)]
        assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.9


def test_terciles_go_from_easy_to_hard():
    """Nine inputs in three groups of three, by error."""
    found = analysis.terciles([0.9, 0.1, 0.5, 0.2, 0.6, 0.8, 0.3, 0.4, 0.7])
    assert [sorted(group.tolist()) for group in found] == [[1, 3, 6], [2, 4, 7], [0, 5, 8]]


def test_interval_holds_the_mean_and_shrinks():
    """Around the true mean; narrower with more seeds; none for one seed; an outlier moves it little."""
    values = np.random.default_rng(0).normal(0.3, 0.1, (200, 3))
    many, few = analysis.interval(values), analysis.interval(values[:8])
    assert many.low < 0.3 < many.high
    assert few.high - few.low > many.high - many.low
    assert np.isnan(analysis.interval(values[:1]).low)
    assert analysis.interval(np.vstack([values, [[99.0] * 3]])).value == pytest.approx(many.value, abs=0.01)


def table_of(points):
    """arm -> (RMSE, quality), the same in every tercile and task; four seeds of different levels."""
    names = [name for name in analysis.MEASURES if name not in ("rmse", "held_out")]
    return {
        (seed, arm): dict.fromkeys(names, np.zeros((3, 3)))
        | {"rmse": np.full((3, 3), error), "held_out": np.full((3, 3), quality + seed)}
        for seed in range(4)
        for arm, (error, quality) in points.items()
    }


def test_differences_are_paired_by_seed():
    """A constant gain of 0.1 over very different seeds has an interval of no width, and all seeds agree."""
    found = analysis.difference(table_of({"a": (1, 0.0), "b": (1, 0.1)}), "b", "a", "held_out", "hard")
    assert found == pytest.approx((0.1, 0.1, 0.1, 4))
    percent = analysis.difference(table_of({"a": (2, 0), "b": (3, 0)}), "b", "a", "rmse", "all", relative=True)
    assert percent.value == pytest.approx(50)


def test_distance_from_the_front():
    """Zero on the line between two shares, the height above it elsewhere; the best share at most as wrong counts."""
    front = dict(zip(analysis.FRONT, [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (6, 5)], strict=True))
    cases = {
        "between": ((2.5, 1.5), 0.0),
        "above": ((2.5, 1.9), 0.4),
        "beyond": ((7, 4), -1.0),
        "faithful": ((0.5, 1), 1.0),
    }
    table = table_of(front | {name: point for name, (point, _) in cases.items()})
    for name, (_, expected) in cases.items():
        for aggregate in (False, True):
            found = analysis.above_front(table, name, "held_out", aggregate=aggregate)
            assert found.value == pytest.approx(expected, abs=1e-9)
            assert found.low == pytest.approx(found.high, abs=1e-9)


def test_primary_outcome_needs_both_halves():
    """Better on hard inputs counts only within one percent of RMSE on easy ones."""
    points = {"base": (1, 0), "rl": (1.005, 1), "adaptive": (1.02, 1), "reversed": (1, -1)}
    rows = tables.weightings(table_of(points), tuple(points), "base")
    primary = {row["arm"]: bool(row["primary"]) for row in rows}
    assert primary == {"rl": True, "adaptive": False, "reversed": False}
