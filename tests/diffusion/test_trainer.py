"""The loop as a whole: it learns what it is told to, resumes exactly, and does the same on two processes as on one."""

import json
import re
import socket
import sys
import threading
import warnings
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.utils import LoggerType
from PIL import Image

from iqareward.diffusion import DiffusionNFT, DirectRewardGradient, RolloutConfig, TrainConfig, add_lora
from iqareward.diffusion.checkpoint import load_state, trained_weights
from iqareward.diffusion.pairs import InputOrder
from iqareward.rewards.metric import NoReference
from iqareward.schedules import Schedule, constant
from tests.diffusion.tiny import pixel_policy
from tests.diffusion.train_tiny import contrast, experience_of, one_of_two, overflow, trainer
from tests.gpu import on_devices
from tests.rewards.counting import Brightness
from tests.tolerances import FORMULA_FP32

EXACT = {"rtol": 0.0, "atol": 0.0}


def weights_of(run) -> dict[str, torch.Tensor]:
    """What the run trained."""
    return trained_weights(run.policy.model)


def test_history_has_a_line_per_update(tmp_path):
    """Numbers of losses, rewards, weights; validations before the first update and after the last; grids on disk."""
    run = trainer(tmp_path)
    history = run.train(3, save_every=2, validate_every=2)
    assert [line["update"] for line in history] == [0, 1, 2, 3]
    for line in history[1:]:
        shares = {"rl_share", "sft_share", "has_signal"}
        assert {"rl_loss", "sft_loss", "kl", "grad_norm", "reward", "difficulty"} | shares <= line.keys()
        assert all(torch.tensor(value).isfinite() for name, value in line.items() if name not in ("update", "alarms"))
    assert ["validation/psnr" in line for line in history] == [True, False, True, True]
    with Image.open(tmp_path / "samples-000003.png") as grid:
        assert grid.width > 4 * 256
    assert load_state(tmp_path / "checkpoint.pt")["updates"] == 3
    assert [json.loads(line) for line in run.history_file.read_text().splitlines()] == history


def test_two_processes_do_what_one_does(tmp_path):
    """The same inputs, shared, end in the same weights up to rounding; both skip a NaN loss, and name a NaN pixel."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    folder = tmp_path / "two"
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ranks = mp.start_processes(one_of_two, (folder, shared), nprocs=2, join=False, start_method="forkserver")
    one = trainer(tmp_path / "one")
    overflow(one)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        one.train(2, save_every=1, validate_every=2)
    overflown, broken = (one.order.ids(update)[-1] for update in range(2))
    assert f"skipped, because the loss of inputs [{overflown}]" in one.history[1]["alarms"]
    assert f"left out 1 inputs whose pixels are not all finite: [{broken}]" in one.history[2]["alarms"]
    while not ranks.join(300):
        pass
    found = torch.load(folder / "final.pt", weights_only=True)
    for name, weight in weights_of(one).items():
        # AdamW's first steps are +-1e-3 whatever the gradient's size: rounding shows where the gradient is near 0.
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=2e-5)
    both = load_state(folder / "checkpoint.pt")["history"]
    for line, expected in zip(both, one.history, strict=True):
        assert line.keys() == expected.keys()
        for name, value in expected.items():
            wanted = value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True)
            assert line[name] == wanted, name


def test_rows_at_once_and_overlap_change_nothing(tmp_path):
    """Neither the number of rows per pass nor scoring in another thread changes the step."""
    runs = []
    for size, overlap in ((None, False), (3, True)):
        optimization = TrainConfig(learning_rate=1e-3, inputs_per_update=4, rows_at_once=size)
        run = trainer(tmp_path / str(size), train_config=optimization, overlap=overlap, validation=None)
        run.train(1)
        runs.append(run)
    for name, weight in weights_of(runs[0]).items():
        torch.testing.assert_close(weights_of(runs[1])[name], weight, rtol=1e-3, atol=2e-5)
    assert runs[0].history[1]["reward"] == pytest.approx(runs[1].history[1]["reward"], rel=1e-5)


@on_devices
def test_overlap_scores_on_a_thread_and_a_stream_of_its_own(tmp_path, device):
    """Not on the sampler's stream, behind which kernels of another thread would queue; an error stops the update."""
    seen = []

    class Watched(Brightness):
        def __call__(self, images, *arguments, **keywords):
            seen.append((threading.current_thread(), torch.cuda.current_stream() if images.is_cuda else None))
            if len(seen) > 2:
                raise ArithmeticError("as told")
            return super().__call__(images)

    options = {"accelerator": Accelerator(cpu=device == "cpu"), "validation": None, "memory": None}
    run = trainer(tmp_path, reward=Watched(), overlap=True, **options)
    experience = experience_of(run)
    images = run.policy.decode(experience.trajectory.sample, {}).clamp(0, 1)
    torch.testing.assert_close(experience.rewards[0], images.mean((1, 2, 3)), **FORMULA_FP32)
    assert len(set(seen)) == 1
    assert seen[0][0] is not threading.current_thread()
    assert device == "cpu" or seen[0][1] != torch.cuda.current_stream()
    with pytest.raises(ArithmeticError, match="as told"):
        experience_of(run, 1)


def test_overlap_wants_a_whole_reward(tmp_path):
    """A function is enough without, and refused in words with it."""

    def brightness(images, references):
        return images.mean((1, 2, 3))

    trainer(tmp_path, reward=brightness)
    with pytest.raises(TypeError, match=r"with overlap=True, a reward with `name`.*got function.*FullReference"):
        trainer(tmp_path, reward=brightness, overlap=True)


def test_mixed_precision_and_trackers(tmp_path):
    """In bf16 it trains to finite numbers, fp32 outside of the network; a tracker gets the figures of every update."""
    pytest.importorskip("tensorboard")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", log_with="tensorboard", project_dir=tmp_path / "logs")
    run = trainer(tmp_path, accelerator=accelerator)
    history = run.train(2)
    accelerator.end_training()
    assert all(
        torch.tensor([line["rl_loss"], line["sft_loss"], line["grad_norm"]]).isfinite().all() for line in history[1:]
    )
    assert all(weight.dtype == torch.float32 for weight in run.policy.model.parameters())
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_hosted_trackers_get_the_figures_through_accelerate(tmp_path, monkeypatch, tracker):
    """With a stand-in for the package, which is not installed here: a call per update, and per grid if it takes one."""
    stand_in = ModuleType(tracker)
    stand_in.Image = lambda pixels: pixels.shape
    calls = []
    hosted = SimpleNamespace(
        log=lambda values, step=None, **_: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    stand_in.init = lambda project, **_: calls.append(project) or hosted
    monkeypatch.setitem(sys.modules, tracker, stand_in)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType(tracker)])
    run = trainer(tmp_path, accelerator=Accelerator(cpu=True, log_with=tracker))
    history = run.train(2, validate_every=2)
    run.accelerator.end_training()
    assert calls[0] == "iqareward"
    assert calls[-1] == "end"
    steps = [step for step, _ in calls[1:-1]]
    assert steps == sorted(steps), "W&B drops what comes with an earlier step"
    grids = [(step, values["samples"][0][2]) for step, values in calls[1:-1] if "samples" in values]
    assert grids == ([(0, 3), (2, 3)] if tracker == "wandb" else [])
    numbers = [call for call in calls[1:-1] if "samples" not in call[1]]
    assert [step for step, _ in numbers] == [0, 1, 2]
    for line, (_, values) in zip(history, numbers, strict=True):
        assert values == {name: value for name, value in line.items() if name != "alarms"}
    assert "validation/psnr" in numbers[2][1]


def test_kl_is_zero_in_the_first_update_and_not_after(tmp_path):
    """Against the frozen copy of a whole model, and against a LoRA model with its first adapters."""
    for name, policy in (("whole", pixel_policy()), ("lora", pixel_policy())):
        optimization = TrainConfig(learning_rate=1e-3, inputs_per_update=4, kl_beta=0.1)
        run = trainer(tmp_path / name, train_config=optimization, validation=None)
        if name == "lora":
            policy.model = add_lora(policy.model, rank=2)
            run = type(run)(
                policy,
                run.rewards,
                run.pairs,
                output_dir=tmp_path / name,
                train_config=optimization,
                rollout_config=run.rollout_config,
                accelerator=run.accelerator,
                show_progress=False,
            )
        history = run.train(2)
        assert history[1]["kl"] == 0
        assert history[2]["kl"] > 0
        assert ("lora" in next(iter(weights_of(run)))) == (name == "lora")


def test_sft_alone_approaches_the_ground_truth_and_rl_alone_the_reward(tmp_path):
    """With a share of 0 the SFT loss falls; with a share of 1 the reward, contrast, rises."""
    for share, name, better in ((0.0, "sft_loss", -1), (1.0, "reward", 1)):
        run = trainer(
            tmp_path / name,
            weighter=Schedule(partial(constant, share=share)),
            train_config=TrainConfig(learning_rate=3e-3, inputs_per_update=8),
            rollout_config=RolloutConfig(group_size=4, num_steps=3),
            policy=pixel_policy("sample"),
            validation=None,
            memory=None,
        )
        values = torch.tensor([line[name] for line in run.train(16)[1:]])
        assert better * (values[-4:].mean() - values[:4].mean()) > 0, (name, values)


@pytest.mark.parametrize("objective", [DiffusionNFT(num_terms=1), "gradient"])
def test_other_objectives_raise_the_reward(tmp_path, objective):
    """DiffusionNFT, and DRaFT with a single rollout per input, which has no spread and needs none."""
    reward = NoReference(contrast, name="contrast", higher_is_better=True, differentiable=True)
    group_size = 1 if objective == "gradient" else 4
    run = trainer(
        tmp_path,
        objective=DirectRewardGradient(reward) if objective == "gradient" else objective,
        weighter=Schedule(partial(constant, share=1.0)),
        train_config=TrainConfig(learning_rate=3e-3, inputs_per_update=8),
        rollout_config=RolloutConfig(group_size=group_size, num_steps=3),
        policy=pixel_policy("sample"),
        validation=None,
        memory=None,
    )
    history = run.train(12)[1:]
    assert history[0]["reward"] < 0.4  # 0.5 is all there is
    assert all(line["rl_share"] == 1 for line in history)
    assert history[-1]["reward"] > 1.2 * history[0]["reward"]


def test_validation_stops_a_run_that_gets_worse(tmp_path):
    """Once the held-out reward has had no new best for `patience` validations; the best weights are kept."""
    run = trainer(tmp_path)
    assert run.validation is not None
    run.validation.stop_on, run.validation.patience = "psnr", 2
    run.validation.rewards = {"psnr": lambda images, references: torch.full((len(images),), -float(run.updates))}
    history = run.train(50, validate_every=1)
    assert len(history) == 3
    assert (tmp_path / "best.safetensors").exists()


def test_input_order_visits_all_inputs_once_per_epoch():
    """Any number of processes see the same batches."""
    order = InputOrder(10, 4, seed=3)
    assert len(set(order.ids(0) + order.ids(1))) == 8
    assert order.ids(2) != order.ids(0)
    assert order.ids(5, rank=0, world=2) + order.ids(5, rank=1, world=2) == order.ids(5)
    halves = InputOrder(10, 8, seed=3, minibatches=2)
    one, first, second = halves.ids(1), halves.ids(1, rank=0, world=2), halves.ids(1, rank=1, world=2)
    assert one == InputOrder(10, 8, seed=3).ids(1)
    assert first[:2] + second[:2] + first[2:] + second[2:] == one, "both have half of each minibatch"
    with pytest.raises(ValueError, match="batch_size"):
        InputOrder(3, 4, seed=0)


def test_options_that_cannot_work_are_refused(tmp_path):
    """Unknown words and sizes that do not divide."""
    with pytest.raises(ValueError, match="balanced"):
        TrainConfig(sft_scale="auto")
    with pytest.raises(ValueError, match="rising order"):
        RolloutConfig(reward_steps=(3, 1))


NAN, INF = float("nan"), float("inf")
OUT_OF_RANGE = {
    "learning_rate": (0.0, -1e-3, NAN, INF),
    "weight_decay": (-1.0, NAN, INF),
    "max_grad_norm": (0.0, -1.0, NAN),
    "inputs_per_update": (0, -1, 1.5),
    "rows_at_once": (0, -1, 1.5),
    "minibatches": (0, 1.5),
    "epochs": (0, 1.5),
    "kl_beta": (-0.1, NAN, INF),
    "sft_scale": (-1.0, NAN, INF),
    "balance_every": (0, NAN),
    "std_floor": (-1.0, NAN),
    "ema_decay": (-0.1, 1.0, 2.0, NAN),
    "max_failed_updates": (0, 1.5, NAN),
    "group_size": (0, NAN),
    "num_steps": (0, 2.5),
    "eta": (-1.0, NAN, INF),
    "inputs_at_once": (0, -2),
    "reward_steps": ((3, 1), (1, 10), (-1,)),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_each_option_has_a_range(name, value):
    """A value outside of it is refused with the option's name and what came."""
    owner = TrainConfig if name in TrainConfig.__dataclass_fields__ else RolloutConfig
    with pytest.raises(ValueError, match=rf"{owner.__name__} expected {name} .*got {re.escape(repr(value))}"):
        owner(**{name: value})
