"""The monitor in the loops of others: it sees what it should, reaches their logs, and leaves the run as it is."""

# ruff: noqa: NPY002  samplers of others use the global state

import json
import os
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import iqareward
from iqareward.adapters.monitor import PeriodicMonitor, monitor_callback
from iqareward.adapters.trl import TRLReward
from iqareward.monitor import HackingMonitor
from tests.adapters.restoration_agent import SEEN, apply_operations, build, photographs
from tests.tolerances import EXACT

TRUTH = photographs(8)


class Painter(torch.nn.Module):
    """A model with dropout, a part that stays in evaluation mode, and images that get darker as it trains."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.weights = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
        self.frozen = torch.nn.Dropout(0.5).eval()
        self.seen: list[tuple[bool, bool]] = []

    def sample(self, step: int) -> torch.Tensor:
        """Draws from every source of random numbers, as samplers do."""
        self.seen.append((any(module.training for module in self.modules()), torch.is_grad_enabled()))
        _ = torch.rand(3), np.random.rand(3), random.random()
        return TRUTH * (1 - 0.02 * step)


def trained(*, watch: bool) -> tuple[list[torch.Tensor], list[dict[str, float]], Painter]:
    """Ten updates, each with noise, dropout and shuffling; the weights after each, and what was logged."""
    painter, weights, logged = Painter(), [], []
    step = 0
    monitor = HackingMonitor(["psnr"], reward=lambda images, **_: -images.mean((1, 2, 3)), patience=1)
    watched = PeriodicMonitor(
        monitor, lambda: painter.sample(step), every=4, models=[painter], references=TRUTH, prompts=["dark"] * 8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        for step in range(11):
            if step:
                painter.zero_grad()
                inputs = torch.rand(4, 4) + random.random() + np.random.rand()
                painter.weights(inputs).square().sum().backward()
                with torch.no_grad():
                    for parameter in painter.parameters():
                        parameter -= 0.1 * parameter.grad
            weights.append(torch.cat([parameter.detach().flatten() for parameter in painter.parameters()]))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                logged.append(watched.step(step) if watch else {})
    return weights, logged, painter


def test_a_watched_run_is_the_same_run() -> None:
    """Weights after every update are those without the monitor; it looks before the first update and at intervals."""
    plain, _, _ = trained(watch=False)
    weights, logged, painter = trained(watch=True)
    torch.testing.assert_close(weights, plain, **EXACT)
    assert [step for step, found in enumerate(logged) if found] == [0, 4, 8]
    assert painter.seen == [(False, False)] * 3  # evaluation mode and no graph while sampling
    assert painter.training
    assert painter.weights[1].training
    assert not painter.frozen.training


def test_logged_numbers_are_those_of_the_rewards() -> None:
    """Flat floats: the means of direct calls, their changes, and the alarm of a reward that likes it dark."""
    _, logged, _ = trained(watch=True)
    for step in (0, 4, 8):
        images = TRUTH * (1 - 0.02 * step)
        expected = iqareward.load("psnr")(images, references=TRUTH)
        assert logged[step]["monitor/psnr"] == pytest.approx(expected.mean().item(), rel=1e-5)
        assert logged[step]["monitor/reward"] == pytest.approx(-images.mean().item(), rel=1e-5)
        assert json.loads(json.dumps(logged[step])) == logged[step]
    assert logged[0]["monitor/alarms"] == 0
    assert logged[8]["monitor/alarms"] >= 1
    assert logged[8]["monitor/change/psnr"] < 0


def test_alarms_warn() -> None:
    """The sentence names the step and the measure."""
    step = 0
    monitor = HackingMonitor(["psnr"], reward=lambda images, **_: -images.mean((1, 2, 3)), statistics={}, patience=1)
    watched = PeriodicMonitor(monitor, lambda: TRUTH * (1 - 0.1 * step), every=1, references=TRUTH)
    _ = watched.step(0)
    step = 1
    with pytest.warns(UserWarning, match=r"step 1: psnr fell from .* while the reward rose"):
        _ = watched.step(1)
    late = PeriodicMonitor(HackingMonitor([]), lambda: TRUTH, every=4)
    assert [bool(late.step(number)) for number in (3, 4, 5, 8)] == [True, True, False, True]
    with pytest.raises(ValueError, match="every >= 1"):
        PeriodicMonitor(monitor, list, every=0)
    for sample, models in ((TRUTH, ()), (list, torch.nn.Sequential())):
        with pytest.raises(TypeError, match="`sample` as a function that returns images and `models` as a list"):
            PeriodicMonitor(monitor, sample, every=1, models=models)


def test_modes_and_random_numbers_return_after_an_error() -> None:
    """A sampler that fails does not leave the model in evaluation mode."""
    painter = Painter()

    def fails():
        _ = torch.rand(1), random.random()
        raise RuntimeError("out of memory")

    watched = PeriodicMonitor(HackingMonitor([]), fails, every=1, models=[painter])
    state, numbers = torch.get_rng_state(), random.getstate()
    with pytest.raises(RuntimeError, match="out of memory"):
        watched.step(0)
    assert painter.training
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == numbers


class Wandb:
    """Keeps what is logged, and refuses what is no number, as its charts do."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict]] = []

    def log(self, values: dict, step: int) -> None:
        assert all(isinstance(value, (int, float, np.floating)) for value in values.values())
        self.lines.append((step, values))


def evaluation(sample, dataloader, accelerator, wandb, global_step: int, reward_fn, executor, monitor) -> None:
    """`eval` of flow_grpo's training scripts: images of each batch of test prompts, rewards from the executor, the
    gathered means to wandb. The lines of the documentation are marked."""
    all_rewards: dict[str, list] = {}
    for prompts, metadata in dataloader:
        images = sample(prompts)
        rewards = executor.submit(reward_fn, images, prompts, metadata, only_strict=False)
        rewards, _ = rewards.result()
        monitor.add(images, rewards=rewards["avg"], prompts=prompts)  # documented
        for key, value in rewards.items():
            gathered = accelerator.gather(torch.as_tensor(value, device=accelerator.device)).cpu().numpy()
            all_rewards.setdefault(key, []).append(gathered)
    report = monitor.step(gather=True)  # documented
    if accelerator.is_main_process:
        means = {f"eval_reward_{key}": np.mean(np.concatenate(value)) for key, value in all_rewards.items()}
        wandb.log({**means, **report.log()}, step=global_step)  # documented


def darkness(images, prompts, metadata, only_strict: bool):
    """A reward of flow_grpo, as an array."""
    return {"avg": (-images.float().mean((1, 2, 3))).numpy()}, {}


def flow_grpo_run(prompts: list[int], accelerator) -> tuple[Wandb, HackingMonitor]:
    """Three evaluations of a model that gets darker, in half precision, in batches of three prompts."""
    wandb, monitor = Wandb(), HackingMonitor(["piqe"], patience=1)
    noise = torch.rand(16, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    batches = [prompts[start : start + 3] for start in range(0, len(prompts), 3)]
    dataloader = [(batch, [{} for _ in batch]) for batch in batches]
    with ThreadPoolExecutor(8) as executor, torch.no_grad():
        for update in (0, 10, 20):

            def sample(batch, update=update):
                return (noise[batch] * (1 - update / 40)).half()

            evaluation(sample, dataloader, accelerator, wandb, update, darkness, executor, monitor)
    return wandb, monitor


ALONE = SimpleNamespace(gather=lambda rows: rows, device="cpu", is_main_process=True)


@pytest.mark.trainer("Flow-GRPO", "74db691, 94e23ee", "caller", "reader", "threads")
def test_evaluation_of_flow_grpo() -> None:
    """Its wandb gets the monitor's numbers beside its own, at its steps; the first evaluation is the baseline."""
    wandb, monitor = flow_grpo_run(list(range(16)), ALONE)
    assert [step for step, _ in wandb.lines] == [0, 10, 20]
    for _, line in wandb.lines:
        assert line["monitor/reward"] == pytest.approx(line["eval_reward_avg"], rel=1e-3)
    assert "monitor/change/colorfulness" not in wandb.lines[0][1]
    assert wandb.lines[2][1]["monitor/change/colorfulness"] < wandb.lines[1][1]["monitor/change/colorfulness"] < 0
    assert "colorfulness" in monitor.history[-1].alarmed  # without ground truth the drift itself


def work(rank: int, folder: str) -> None:
    """One of two processes with unequal shares of the prompts; the monitor of the main process is written down."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:

        def gather(rows):
            parts: list = [None, None]
            dist.all_gather_object(parts, rows)
            return torch.cat(parts)

        accelerator = SimpleNamespace(gather=gather, device="cpu", is_main_process=rank == 0)
        wandb, monitor = flow_grpo_run(list(range(9)) if rank == 0 else list(range(9, 16)), accelerator)
        calls: list[int] = []
        alone = PeriodicMonitor(HackingMonitor([]), lambda: calls.append(rank) or TRUTH, every=1)
        logged = alone.step(0)
        shares = HackingMonitor(["psnr"])
        own = slice(0, 3) if rank == 0 else slice(3, 8)
        PeriodicMonitor(shares, lambda: 0.9 * TRUTH[own], every=1, references=TRUTH[own], gather=True).step(0)
        values = shares.state_dict()["before"]["psnr"].tolist()
        found = [wandb.lines, [report.log() for report in monitor.history], calls, bool(logged), values]
        Path(folder, f"{rank}.json").write_text(json.dumps(found, default=float))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.trainer("Flow-GRPO", "74db691, 94e23ee", "caller", "reader", "processes")
def test_processes_are_one(tmp_path) -> None:
    """Gathered, both know what one process with all prompts knows; only the main one logs, or samples if told alone."""
    mp.start_processes(work, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    (main, reports, calls, logged, values), (silent, others, idle, nothing, same) = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)
    )
    wandb, monitor = flow_grpo_run(list(range(16)), ALONE)
    assert (calls, logged) == ([0], True)
    assert (silent, idle, nothing) == ([], [], False)
    assert reports == others
    assert values == same == pytest.approx(iqareward.load("psnr")(0.9 * TRUTH, references=TRUTH).tolist(), rel=1e-5)
    for (step, line), (expected_step, expected) in zip(main, wandb.lines, strict=True):
        assert step == expected_step
        assert line == pytest.approx(expected, rel=1e-4)
    for found, expected in zip(reports, monitor.history, strict=True):
        assert found == pytest.approx(expected.log(), rel=1e-3)


trl = pytest.importorskip("trl")
TRL = pytest.mark.trainer("TRL", "1.16.0", "run")
quiet = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")


def watched_trainer(folder, monitor: HackingMonitor, *, watch: bool = True, stop: bool = False, **options):
    """A real GRPO trainer, and the modes of its model while the monitor samples."""
    reward = TRLReward("ssim", apply_operations, references="clean", name="restored")
    trainer = build(trl.GRPOTrainer, folder, [reward], **options)
    modes: list[bool] = []

    def sample() -> torch.Tensor:
        modes.append(trainer.model.training)
        _ = torch.rand(5)
        ids = trainer.processing_class(["restore"], return_tensors="pt").input_ids
        first = trainer.model(ids).logits[0, -1].softmax(0)[3]  # how much it wants to brighten
        return TRUTH * (0.64 + 0.36 * first.item() - 0.05 * len(modes))

    if watch:
        watched = PeriodicMonitor(monitor, sample, every=2, references=TRUTH)
        trainer.add_callback(monitor_callback(trainer, watched, stop=stop))
    return trainer, modes


def records(trainer, key: str) -> list[dict]:
    times = ("step_time", "profiling/")
    found = [record for record in trainer.state.log_history if key in record]
    return [{name: value for name, value in record.items() if not name.startswith(times)} for record in found]


@quiet
@TRL
def test_trl_logs_the_monitor_and_trains_as_without(tmp_path) -> None:
    """Before the first step and every second one, beside TRL's own records, which do not change; reporters get both."""
    import transformers

    class Reporter(transformers.TrainerCallback):
        seen: list[dict] = []  # noqa: RUF012

        def on_log(self, args, state, control, logs=None, **_):
            self.seen.append(dict(logs))

    monitor = HackingMonitor(["psnr"], reward="ssim", patience=2)
    trainer, modes = watched_trainer(tmp_path, monitor, steps=4)
    ids = trainer.processing_class(["restore"], return_tensors="pt").input_ids
    chance = trainer.model(ids).logits[0, -1].softmax(0)[3].item()  # of brightening, which four steps hardly move
    trainer.add_callback(Reporter)
    trainer.train()
    found = records(trainer, "monitor/psnr")
    assert [record["step"] for record in found] == [0, 2, 4]
    for record, darker in zip(found, (0.05, 0.1, 0.15), strict=True):
        brightened = TRUTH * (0.64 + 0.36 * chance - darker)
        expected = iqareward.load("psnr")(brightened, references=TRUTH).mean().item()
        assert record["monitor/psnr"] == pytest.approx(expected, abs=0.05)
    assert modes == [False] * 3
    assert trainer.model.training
    assert sum("monitor/psnr" in logs for logs in Reporter.seen) == 3
    SEEN.clear()
    plain, _ = watched_trainer(tmp_path, monitor, watch=False, steps=4)
    plain.train()
    assert records(trainer, "rewards/restored/mean") == records(plain, "rewards/restored/mean")
    assert len(records(plain, "rewards/restored/mean")) == 4


@quiet
@TRL
def test_an_alarm_ends_a_run_of_trl(tmp_path) -> None:
    """Where asked to, after the look that finds it; the sentence is a warning."""
    monitor = HackingMonitor(["psnr"], reward=lambda images, **_: -images.mean((1, 2, 3)), statistics={}, patience=1)
    trainer, _ = watched_trainer(tmp_path, monitor, stop=True, steps=6)
    with pytest.warns(UserWarning, match="step 2: psnr fell"):
        trainer.train()
    assert trainer.state.global_step == 2


@quiet
@TRL
def test_a_resumed_run_of_trl_keeps_its_baseline(tmp_path) -> None:
    """The model before RL is that of the first start, and no step counts twice; without the file the user is told."""
    first = HackingMonitor(["psnr"], reward="ssim")
    trainer, _ = watched_trainer(tmp_path, first, steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    second = HackingMonitor(["psnr"], reward="ssim")
    resumed, modes = watched_trainer(tmp_path, second, steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [record["step"] for record in records(resumed, "monitor/psnr")] == [0, 2, 4]
    baseline = records(trainer, "monitor/psnr")[0]["monitor/psnr"]
    assert second.state_dict()["before"]["psnr"].mean().item() == pytest.approx(baseline, rel=1e-5)
    assert len(modes) == 1
    assert all("monitor/change/psnr" in record for record in records(resumed, "monitor/psnr")[-2:])
    (tmp_path / "checkpoint-2" / "hacking_monitor.pt").unlink()
    third, _ = watched_trainer(tmp_path, HackingMonitor(["psnr"], reward="ssim"), steps=3)
    with pytest.warns(UserWarning, match="compares with the resumed model"):
        third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
