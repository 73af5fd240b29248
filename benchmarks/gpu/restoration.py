"""The experiment on photographs on a GPU, as a list of stages of its own, because it takes a run's whole time.

    python benchmarks/gpu/run.py --module benchmarks.gpu.restoration --out OUT --commit COMMIT

Where the package stlpips_pytorch is missing, STLPIPS_WEIGHTS names its file `alex_shift_tolerant.pth`.
It goes on from the committed results and writes a file of the same name in OUT; copy that to benchmarks/results.
"""

import os
import shutil
import sys
from subprocess import run as run_command
from typing import Any

from benchmarks._harness import FOLDER
from benchmarks.gpu.run import ROOT, Clock
from benchmarks.restoration.__main__ import FILES, load

STAGES = {"restoration": (520, "benchmarks.gpu.restoration:run")}
LAST_RUN = 45  # seconds of the runs that are under way when the time is over
TINY = ["--quick", "--seeds", "1", "--study", "main", "--arms", "frozen", "rl"]


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """There are none."""
    return []


def run(clock: Clock) -> None:
    """Run what the results file lacks, with as many processes as there are processors."""
    file = clock.out / FILES["gpu"]
    if (FOLDER / file.name).exists() and not file.exists() and not clock.tiny:
        shutil.copy(FOLDER / file.name, file)

    def work() -> dict[str, Any]:
        minutes = max(clock.left() - LAST_RUN, 1) / 60
        options = ["--device", "cuda", "--workers", str(max((os.cpu_count() or 2) - 1, 1)), "--minutes", str(minutes)]
        options = [*TINY, "--workers", "1"] if clock.tiny else options
        if weights := os.environ.get("STLPIPS_WEIGHTS"):
            options += ["--stlpips", weights]
        command = [sys.executable, "-m", "benchmarks.restoration", "--scale", "gpu", "--results", str(file), *options]
        before = len(load(file))
        run_command(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return {"runs_before": before, "runs": len(load(file))}

    clock.step("runs", work, need=60, most=clock.left())
