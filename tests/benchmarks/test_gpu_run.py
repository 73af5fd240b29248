"""The runner of `benchmarks/gpu`: whatever a step does costs that step only, and every stage runs on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import iqareward
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.suite import gpu_tests, pytest_on
from benchmarks.gpu.targets import targets

ROOT = Path(iqareward.__file__).parents[1]

FAKE = """
import json, os, signal, sys, time

STAGES = {"first": (60, "fake:first"), "second": (60, "fake:second"), "third": (60, "nowhere:run")}


def targets(results):
    row = {"name": "speed", "value": 2, "better": "higher"}
    return [row | {"target": 1, "ok": True}, row | {"target": 3, "ok": False}]


def mended():
    return os.environ.get("MENDED")


def fails():
    if not mended():
        raise ValueError("wrong")
    return {"x": 5}


def hangs():
    if not mended():
        time.sleep(600)


def ends(code):
    def work():
        if not mended():
            os.kill(os.getpid(), code) if code else sys.exit("left")
    return work


def talks():
    sys.stdout.buffer.write(bytes(range(256)) * 99)
    return {"odd": object, ("no", "key"): 1}


def first(clock):
    def counted():
        with open(os.environ["COUNT"], "a") as file:
            file.write("x")
        return {"x": 1}

    clock.step("good", counted, predicted={"x": 2})
    clock.step("raises", fails)
    clock.step("hangs", hangs, most=2)
    clock.step("exits", ends(0))
    clock.step("is killed", ends(signal.SIGKILL))
    clock.step("talks", talks)
    clock.step("finds no time", lambda: 1, need=1 if mended() else 1000)
    clock.step("after", lambda: [1, float("nan")])


def second(clock):
    clock.step("before", lambda: None)
    if not mended():
        raise RuntimeError("between steps")
    clock.step("after", lambda: None)
"""


def run(out: Path, *options: str, cwd: Path = ROOT, **environment: str) -> tuple[dict[str, Any], str]:
    """The results of a run, and what it printed."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "gpu" / "run.py"), "--out", str(out), *options]
    env = os.environ | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=True)
    return json.loads((out / "results.json").read_text()), done.stdout


def failures(results: dict[str, Any]) -> dict[str, str]:
    """What went wrong, by stage and step."""
    return {
        f"{stage}: {key}": value if isinstance(value, str) else value["FAILED"]
        for stage, rows in results.items()
        if isinstance(rows, dict) and not stage.startswith("_")
        for key, value in rows.items()
        if (isinstance(value, str) and value.startswith(("KILLED", "DIED", "skipped")))
        or (isinstance(value, dict) and "FAILED" in value)
    }


def test_what_a_step_does_costs_that_step_only(tmp_path: Path) -> None:
    """A step that raises, hangs, exits, is killed or prints rubbish is named; `--again` does those and no others."""
    (tmp_path / "fake.py").write_text(FAKE)
    count = tmp_path / "count"
    environment = {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))), "COUNT": str(count)}
    options = ("--module", "fake", "--seconds", "300")
    results, printed = run(tmp_path / "one", *options, cwd=tmp_path, **environment)

    wrong = failures(results)
    assert wrong.pop("first: raises") == "ValueError: wrong"
    assert wrong.pop("first: hangs").startswith("KILLED")
    assert wrong.pop("first: exits") == "SystemExit: left"
    assert wrong.pop("first: is killed") == "DIED with exit code -9"
    assert wrong.pop("first: talks").startswith("TypeError")
    assert wrong.pop("first: finds no time").startswith("skipped")
    assert wrong.pop("second: stage") == "RuntimeError: between steps"
    assert wrong.pop("third: imports").startswith("ModuleNotFoundError")
    assert not wrong
    assert results["first"]["good"] == {"x": 1, "predicted": {"x": 2}}
    assert results["first"]["after"][0] == 1
    assert results["_done"] == list(dict.fromkeys(results["_done"])) == ["first", "second", "third"]
    assert printed.index("raises") < printed.index("good") < printed.index("x=1 (predicted 2)")
    assert printed.splitlines()[-2:] == ["ok: speed: 2 >= 1", "MISSED: speed: 2 >= 3"]
    assert "in hangs\n" in (tmp_path / "one" / "run.log").read_text(errors="replace")  # the stack of the hung step

    before = ("--again", "--before", str(tmp_path / "one" / "results.json"))
    results, _ = run(tmp_path / "two", *options, *before, cwd=tmp_path, MENDED="1", **environment)
    assert list(failures(results)) == ["first: talks", "third: imports"]
    assert results["first"]["raises"] == {"x": 5}
    assert results["second"] | {"seconds": 0, "left_gib": 0} == {
        "before": "done", "after": "done", "seconds": 0, "left_gib": 0,
    }  # fmt: skip
    assert count.read_text() == "x"


def test_the_end_of_the_run_ends_what_hangs(tmp_path: Path) -> None:
    """A run keeps its time although a step would have more, and says which stages did not come."""
    (tmp_path / "fake.py").write_text(FAKE.replace("most=2", "most=500"))
    environment = {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))), "COUNT": str(tmp_path / "count")}
    results, _ = run(tmp_path, "--module", "fake", "--seconds", "8", cwd=tmp_path, **environment)
    wrong = failures(results)
    assert any(why.startswith("KILLED") for why in wrong.values())
    assert wrong["third: stage"].startswith("skipped")


def test_unknown_stages_are_refused(tmp_path: Path) -> None:
    """The names that there are stand in the message."""
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(tmp_path, "--stages", "canary", "nothing")
    assert "canary, tests, parity" in caught.value.stderr


def test_gpu_tests_are_found_and_a_broken_file_fails_alone(tmp_path: Path) -> None:
    """Every file that carries the mark is taken, others are not imported, and outcomes are told apart."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu: needs a GPU\n")
    mark = "import pytest\n@pytest.mark.{}\n".format("gpu")  # this file has no GPU test
    files = {
        "test_good.py": mark + "@pytest.mark.parametrize('x', [1, 2])\ndef test_it(x): assert x == 1\n",
        "test_skipped.py": mark + "@pytest.mark.skip\ndef test_it(): pass\n",
        "sub/test_broken.py": "import not_there\n" + mark + "def test_it(): pass\n",
        "test_other.py": "raise SystemExit\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = gpu_tests(tmp_path)
    assert [Path(file).name for file in found] == ["test_broken.py", "test_good.py", "test_skipped.py"]
    outcome = pytest_on(found, 120, tmp_path / "log", root=tmp_path)
    assert (outcome["passed"], outcome["skipped"]) == (1, 1)
    failed = sorted(line.split(" - ")[0] for line in outcome["failed"])
    assert failed == ["sub/test_broken.py", "test_good.py::test_it[2]"]
    assert outcome["FAILED"].startswith("exit code 1, 2 failed, 1 passed")
    assert "FAILED" not in pytest_on(found[2:], 120, tmp_path / "log", root=tmp_path)
    (tmp_path / "test_slow.py").write_text("import time\n" + mark + "def test_it(): time.sleep(600)\n")
    outcome = pytest_on([str(tmp_path / "test_slow.py")], 1, tmp_path / "log", root=tmp_path)
    assert outcome["FAILED"].startswith("out of time")
    assert outcome["exit"] < 0
    assert "sleeping" in " ".join(gpu_tests(ROOT / "tests"))
    assert "test_devices" in " ".join(gpu_tests(ROOT / "tests"))


def test_targets_say_what_was_reached() -> None:
    """Values from the committed first run on an H100: its speed-up was reached, its single image was not."""
    results = json.loads((ROOT / "benchmarks" / "results" / "gpu_h100_2026-11-26.json").read_text())
    found = {row["name"]: (row["value"], row["ok"]) for row in targets(results)}
    assert found["Q-Align, batch 32, times the authors' protocol"] == (pytest.approx(266.96 / 17.04, abs=2e-3), True)
    assert found["Q-Align, one image, ms"] == (pytest.approx(36.105), False)
    assert found["ssim_rgb 512 b32, times piqa"] == (pytest.approx(0.543, abs=1e-3), False)
    assert found["GPU tests that failed"][1] is False
    assert targets({}) == []


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu(tmp_path: Path) -> None:
    """The dry run measures every step that needs no GPU, so that no code rots until one comes."""
    results, printed = run(tmp_path, "--tiny", "--seconds", "1800", OMP_NUM_THREADS="1")
    assert failures(results) == {}
    assert results["_done"] == list(STAGES)
    assert all(len(results[stage]) > 2 for stage in STAGES)
    assert "[targets]" in printed
    assert results["hardware"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")
