"""Plug every kind of restoration model into the loop and report what happens.

    python -m benchmarks.policies                       # check all kinds, and write the table of the documentation
    python -m benchmarks.policies --kinds swinir ir_sde # check some of them, and print their rows

The kinds are the files of `examples/policies`, built with tiny networks of random weights.
"""

import argparse
import ast
import functools
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from torch import Tensor

from iqareward.diffusion import (
    ClippedPolicyGradient,
    DifficultyAdaptiveTrainer,
    DiffusionNFT,
    DirectRewardGradient,
    GroupDPO,
    Noise,
    RolloutConfig,
    TrainConfig,
    Validation,
    rollout,
)
from iqareward.diffusion.conditions import repeat
from iqareward.diffusion.policies.core import evaluating
from iqareward.diffusion.rollouts import replay
from iqareward.functional.psnr import psnr
from iqareward.rewards.metric import FullReference, NoReference
from tests.diffusion.policies.kinds import KINDS, inputs, parity, policy_of

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs/reference/policies.md"
BEGIN, END = "<!-- table: python -m benchmarks.policies -->", "<!-- end of table -->"
NUM_STEPS, GROUP_SIZE, NUM_INPUTS = 3, 2, 4


def contrast(images: Tensor) -> Tensor:
    """Standard deviation of the pixels."""
    return images.flatten(1).std(1)


REWARD = NoReference(contrast, name="contrast", higher_is_better=True, differentiable=True)
# DiffusionNFT learns from the forward process, which models without noise have not.
OBJECTIVES: dict[str, Callable[[], Any]] = {
    "policy gradient": ClippedPolicyGradient,
    "reward gradient": functools.partial(DirectRewardGradient, REWARD),
    "group DPO": GroupDPO,
    "DiffusionNFT": DiffusionNFT,
}


class Inputs:
    """A data set of a kind's inputs with ground truth and captions."""

    def __init__(self, kind: str, count: int, *, first: int = 0) -> None:
        self.batch = inputs(kind, count, first=first)

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch: Any = self.batch
        return {"lq": batch.degraded[index], "gt": batch.references[index], "prompt": batch.prompts[index]}


def source(kind: str) -> str:
    """The file that a user of this kind writes."""
    return (ROOT / "examples" / "policies" / f"{kind}.py").read_text(encoding="utf-8")


def lines(kind: str) -> int:
    """Lines of code of that file, imports included, without docstrings, comments and empty lines."""
    tree, used = ast.parse(source(kind)), set[int]()
    docstrings = {
        node.body[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and node not in docstrings:
            last: Any = node.body[0].lineno - 1 if isinstance(node, ast.ClassDef | ast.FunctionDef) else node.end_lineno
            used |= {line for line in range(node.lineno, last + 1) if source(kind).splitlines()[line - 1].strip()}
    return len(used - {line for node in docstrings for line in range(node.lineno, (node.end_lineno or 0) + 1)})


def hacks(kind: str) -> int:
    """Private names of other code that the file uses."""
    names = [node.attr for node in ast.walk(ast.parse(source(kind))) if isinstance(node, ast.Attribute)]
    names += [
        name.name
        for node in ast.walk(ast.parse(source(kind)))
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    ]
    return sum(name.startswith("_") and not name.endswith("__") for name in names)


def ratio_error(kind: str) -> float:
    """The largest distance from 1 of the importance ratios of rollouts, replayed with the same weights."""
    policy, batch = policy_of(kind), inputs(kind)
    noise = Noise.of_groups(batch.ids, GROUP_SIZE, seed=1, device="cpu")
    with torch.no_grad(), evaluating(policy):
        condition = repeat(policy.condition(batch, Noise(batch.ids)), GROUP_SIZE)
        path = rollout(policy, condition, noise, num_steps=NUM_STEPS, eta=policy.exploration)
        again = [replay(policy, path, index, condition).log_prob(path.latents[index + 1]) for index in path.stochastic]
    if not again:
        raise ValueError(f"The rollouts of {kind} draw no noise.")
    before = path.log_probs[list(path.stochastic)]
    return float((torch.stack(again) - before).exp().sub(1).abs().max())


def trainer(
    kind: str, folder: Path | str, *, objective: Any = None, validation: Validation | None = None, **options: Any
) -> DifficultyAdaptiveTrainer:
    """A run of a kind's policy with rollouts of a few steps."""
    config = {"inputs_per_update": NUM_INPUTS, "rows_at_once": 4, "learning_rate": 1e-3} | options
    return DifficultyAdaptiveTrainer(
        policy_of(kind),
        REWARD,
        Inputs(kind, 2 * NUM_INPUTS),
        output_dir=folder,
        objective=objective or ClippedPolicyGradient(),
        rollout_config=RolloutConfig(group_size=GROUP_SIZE, num_steps=NUM_STEPS),
        train_config=TrainConfig(**config),
        validation=validation,
        accelerator=Accelerator(cpu=True),
        show_progress=False,
    )


def weights_of(run: DifficultyAdaptiveTrainer) -> list[Tensor]:
    """What the run trains."""
    return [weight.detach().clone() for weight in run.policy.model.parameters() if weight.requires_grad]


def difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The largest difference between two lists of weights."""
    return max(float((one - other).abs().max()) for one, other in zip(first, second, strict=True))


def objectives_of(kind: str) -> list[str]:
    """Names of the objectives that learn from this kind."""
    return [name for name in OBJECTIVES if KINDS[kind].adds_noise or name != "DiffusionNFT"]


def trains(kind: str, objective: str, folder: Path) -> bool:
    """Whether two updates have finite gradients that are not zero, SFT losses that differ, and weights that move."""
    run = trainer(kind, folder, objective=OBJECTIVES[objective]())
    before = weights_of(run)
    _, *records = run.train(2)
    norms = torch.tensor([record["grad_norm"] for record in records])
    moved = len({record["sft_loss"] for record in records}) == 2  # rl_loss may be 0 up to rounding, the mean advantage
    finite = bool((norms > 0).all() and norms.isfinite().all()) and not any(record["skipped"] for record in records)
    return finite and moved and difference(before, weights_of(run)) > 0


def resumes(kind: str, folder: Path) -> float:
    """The largest difference between the weights of a run and of one that stopped half-way and was resumed."""
    whole = trainer(kind, folder / "whole")
    whole.train(2)
    trainer(kind, folder / "parts").train(1, save_every=1)
    resumed = trainer(kind, folder / "parts")
    resumed.train(2, resume=True)
    return difference(weights_of(whole), weights_of(resumed))


def draws_grid(kind: str, folder: Path) -> bool:
    """Whether validation writes a grid of restored images."""
    held_out = Validation(Inputs(kind, 2, first=100), {"psnr": FullReference(psnr, higher_is_better=True)}, NUM_STEPS)
    trainer(kind, folder, validation=held_out).train(0)
    return any(path.stat().st_size > 0 for path in folder.glob("samples-*.png"))


def plain_gradient_descent(weights: Sequence[Tensor]) -> torch.optim.Optimizer:
    """An optimiser that does not blow up the rounding errors of gradients that should be zero."""
    return torch.optim.SGD(weights, lr=0.1)


# As many rows in a pass as a process has inputs: the masks of dropout depend on which inputs share a pass.
SHARED: dict[str, Any] = {"optimizer": plain_gradient_descent, "rows_at_once": NUM_INPUTS // 2}


def two_processes(kinds: Sequence[str], folder: Path) -> dict[str, float]:
    """For each kind the largest difference between the weights of one process and of two that share the inputs.

    After two updates. The same two processes train all kinds, since starting them takes longer than training.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ranks = mp.start_processes(
        train, (kinds, folder / "two", 2, shared), nprocs=2, join=False, start_method="forkserver"
    )
    alone = {kind: trainer(kind, folder / "one" / kind, **SHARED) for kind in kinds}
    for run in alone.values():
        run.train(2)
    while not ranks.join(600):
        pass
    return {
        kind: difference(weights_of(run), torch.load(folder / "two" / kind / "final.pt", weights_only=True))
        for kind, run in alone.items()
    }


def train(rank: int, kinds: Sequence[str], folder: Path, updates: int, environment: dict[str, str]) -> None:
    """What each process of `two_processes` does."""
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for kind in kinds:
        run = trainer(kind, folder / kind, **SHARED)
        run.train(updates)
        if run.accelerator.is_main_process:
            torch.save(weights_of(run), folder / kind / "final.pt")
    Accelerator(cpu=True).end_training()


def figure(value: float) -> str:
    """A difference in few characters."""
    return "0" if value == 0 else f"{value:.0e}"


def row(kind: str, folder: Path) -> str:
    """A row of the table, from runs."""
    learned = [name for name in objectives_of(kind) if trains(kind, name, folder / name)]
    cells = [
        f"`{kind}.py`",
        KINDS[kind].models,
        str(lines(kind)),
        str(hacks(kind)),
        figure(parity(kind)),
        figure(ratio_error(kind)),
        ", ".join(learned),
        figure(resumes(kind, folder / "resume")),
        "yes" if draws_grid(kind, folder / "grid") else "no",
        figure(two_processes([kind], folder)[kind]),
    ]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| file | kind | lines | private names | parity | ratio - 1 | objectives that train | resume | grid "
    "| two processes |\n|---|---|---|---|---|---|---|---|---|---|"
)


def provenance() -> str:
    """What the table was measured with."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft", "spandrel"))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return (
        f"`python -m benchmarks.policies`, commit {commit.stdout.strip()}, {datetime.now(UTC):%Y-%m-%d}, on a CPU with "
        f"Python {sys.version.split()[0]}, {versions}."
    )


def main() -> None:
    """Check the kinds; write the table if they are all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    rows = []
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(kind, Path(folder)))
        print(rows[-1], flush=True)
    if options.kinds == list(KINDS):
        before, _, rest = TABLE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        TABLE.write_text(
            f"{before}{BEGIN}\n{HEADER}\n" + "\n".join(rows) + f"\n\n{provenance()}\n{END}{after}", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
