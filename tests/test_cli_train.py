"""`iqareward train` on a few small pictures: what it writes, that a killed run goes on, what it says of mistakes."""

import contextlib
import io
import json
import multiprocessing.forkserver
import re
import subprocess
import sys
import time
import tomllib
from dataclasses import fields
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

pytest.importorskip("diffusers", reason="training needs the extra diffusers")
pytest.importorskip("accelerate", reason="training needs the extra diffusers")

from iqareward.cli import app
from iqareward.cli.train import EXAMPLE
from iqareward.cli.train_config import RunConfig, SFTConfig, ValidationConfig, make_data, make_on, read_config
from iqareward.cli.train_data import split
from iqareward.diffusion import (
    Degradation,
    FaceDegradation,
    FolderPairs,
    GroupDPO,
    RolloutConfig,
    TrainConfig,
    load_restorer,
    synthetic_images,
)
from iqareward.diffusion.checkpoint import load_state
from tests.tolerances import EXACT

SETTINGS = """
data = {{ source = "photos", size = 16, crops = 2 }}
policy = {{ name = "tiny", num_steps = 2 }}
reward = "haarpsi"
objective = "DiffusionNFT"
output = "{output}"
updates = {updates}
save_every = 1
sft.updates = 3
sft.batch_size = 4
rollout.group_size = 2
rollout.num_steps = 2
train.inputs_per_update = 4
validation.images = 2
validation.rewards = ["psnr"]
validation.every = 2
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six pictures of 24 pixels in `photos`, in a folder that the command runs in."""
    monkeypatch.chdir(tmp_path)
    for number, image in enumerate(synthetic_images(range(6), size=24)):
        path = tmp_path / "photos" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy()).save(path)
    return tmp_path


def settings(output: str = "run", updates: int = 2, more: str = "") -> Path:
    """A file of settings; keys of `more` are added."""
    Path("train.toml").write_text(SETTINGS.format(output=output, updates=updates) + more)
    return Path("train.toml")


def train(file: Path, *options: str, code: int = 0) -> str:
    """What the command says on standard error; it must end with `code`."""
    result = CliRunner().invoke(app, ["train", "--config", str(file), *options])
    assert result.exit_code == code, result.output
    return result.stderr


def weights(output: str) -> dict[str, torch.Tensor]:
    """Of the trained model."""
    return dict(load_restorer(f"{output}/model").model.named_parameters())


def test_settings_that_are_not_there() -> None:
    """The error names the file and has no number of the system's."""
    assert train(Path("nowhere.toml"), code=2) == "error: nowhere.toml: No such file or directory\n"


def test_a_run_leaves_what_it_promises(folder: Path) -> None:
    """A checkpoint, a history, grids of held-out images and the model, all of them named at the end."""
    said = train(settings())
    lines = [json.loads(line) for line in Path("run/history.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [0, 1, 2]
    assert {"reward", "difficulty", "rl_share", "sft_share", "validation/psnr"} <= lines[-1].keys()
    with Image.open("run/samples-000002.png") as grid:
        assert min(grid.size) > 2 * 256
    sft = [json.loads(line) for line in Path("run/history-sft.jsonl").read_text().splitlines()]
    assert [line["update"] for line in sft] == [1, 2, 3]
    assert all(line["sft_loss"] > 0 for line in sft)
    learnt = load_state(Path("run/checkpoint.pt"))["learner"]["model"]
    for name, weight in weights("run").items():
        torch.testing.assert_close(weight, learnt[name], **EXACT)
    assert not torch.equal(load_restorer("run/sft").model.conv_in.weight, weights("run")["conv_in.weight"])
    for promised in ("run/model", "run/history.jsonl", "run/checkpoint.pt", "psnr, held-out images"):
        assert promised in said


def test_no_held_out_file_is_trained_on() -> None:
    """Files, not crops, are parted, and all of them are used."""
    config = read_config(settings())
    data = split(config, make_data(config.data, "data", seed=0))
    train_files, held_out_files = ({place // 2 for place in part.ids} for part in data)
    assert not train_files & held_out_files
    assert len(train_files) == 4
    assert len(held_out_files) == len(data.held_out) == 2
    assert len(data.train) == 8


def run_command(file: str) -> None:
    """In a process of its own."""
    app(["train", "--config", file])


def kill_when(lines: int, history: Path, process: subprocess.Popen[bytes] | BaseProcess) -> None:
    """Kill the command once a history has so many lines."""
    deadline = time.monotonic() + 600
    try:
        while not history.exists() or len(history.read_text().splitlines()) < lines:
            code = process.poll() if isinstance(process, subprocess.Popen) else process.exitcode
            assert code is None, "the run ended by itself"
            assert time.monotonic() < deadline, "no line in time"
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait() if isinstance(process, subprocess.Popen) else process.join()


def test_a_killed_run_goes_on_where_it_was(folder: Path) -> None:
    """Killed amid RL, it has shown every update; resumed it ends with the numbers of a run that was never killed."""
    file = settings("killed", updates=10_000)
    file.write_text(file.read_text().replace("save_every = 1", "save_every = 2"))
    program = "import sys; from iqareward.cli import app; app(['train', '--config', sys.argv[1]])"
    with Path("said.txt").open("w") as stderr:
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program, str(file)], stderr=stderr)
    kill_when(4, Path("killed/history.jsonl"), process)
    said = Path("said.txt").read_text()
    assert "RL 1/10000  " in said
    assert not [word for word in ("torchao", "pytree", "kernels") if word in said], "a warning of another package"
    updates = load_state(Path("killed/checkpoint.pt"))["updates"] + 2
    assert updates > 2
    train(settings("killed", updates), "--resume")
    train(settings("unbroken", updates))
    assert Path("killed/history.jsonl").read_text() == Path("unbroken/history.jsonl").read_text()
    torch.testing.assert_close(weights("killed"), weights("unbroken"), **EXACT)


def test_killed_during_sft_it_can_begin_anew(folder: Path) -> None:
    """Nothing is in the way of a run with other settings, and its history of SFT is its own."""
    file = settings()
    file.write_text(file.read_text().replace("sft.updates = 3", "sft.updates = 100000"))
    with contextlib.chdir(Path(__file__).parents[1]):  # where its server finds these tests, not a package of that name
        multiprocessing.forkserver.ensure_running()
    process = multiprocessing.get_context("forkserver").Process(target=run_command, args=(str(file),))
    process.start()
    kill_when(5, Path("run/history-sft.jsonl"), process)
    train(settings(updates=1))
    assert len(Path("run/history-sft.jsonl").read_text().splitlines()) == 3


def test_stopped_during_sft_it_begins_sft_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control-C is answered with what to do, and the resumed run is the unbroken one."""
    with monkeypatch.context() as patch:
        patch.setattr("iqareward.cli.train.save_policy", stop)
        assert "--resume" in train(settings("stopped"), code=130)
    train(settings("stopped"), "--resume")
    train(settings("unbroken"))
    torch.testing.assert_close(weights("stopped"), weights("unbroken"), **EXACT)


def stop(*arguments: object, **options: object) -> None:
    """A person presses Control-C."""
    raise KeyboardInterrupt


def test_a_model_from_a_folder_is_trained_on(folder: Path) -> None:
    """The model of one run starts another, without SFT; the best one by a reward is kept; policy gradient works too."""
    train(settings())
    more = """
validation.stop_on = "psnr"
trackers = ["tensorboard"]
"""
    text = settings("second", more=more).read_text()
    text = text.replace('{ name = "tiny", num_steps = 2 }', '"run/model"').replace(
        "DiffusionNFT", "ClippedPolicyGradient"
    )
    text = text.replace("sft.updates = 3\n", "")
    Path("train.toml").write_text(text)
    train(Path("train.toml"))
    assert not Path("second/sft.safetensors").exists()
    assert Path("second/best.safetensors").exists()
    assert list(Path("second/logs").rglob("events.out.tfevents.*"))


MISTAKES = {
    "no TOML": ("folder =", "is not TOML"),
    "too deep": (f"folder = {'[' * 5000}", "is not TOML"),
    "unknown key": ("dta = 'x'", "unknown key `dta`; did you mean `data`?"),
    "unknown key in a table": ("rollout.groupsize = 3", "did you mean `rollout.group_size`?"),
    "known keys": ("sft.epochs = 3", "Known are updates, batch_size, learning_rate"),
    "type": ("seed = 'one'", "`seed` expected a valid integer, got 'one'"),
    "type in a table": ("train.max_grad_norm = true", "`train.max_grad_norm` expected a valid number"),
    "list": ("rollout.reward_steps = 1", "`rollout.reward_steps` expected a valid list"),
    "window": ("rollout.window = [1]", "`rollout.window` expected [first, end]"),
    "table": ("weighter = 1", "`weighter` expected a name or a table"),
    "plain table": ("memory = 1", "`memory` expected a table"),
    "value in a table": ("weighter.steepness = -1", "key `weighter`: AdaptiveWeighter expected steepness"),
    "word": ("train.sft_scale = 'auto'", "key `train`"),
    "two types": ("train.sft_scale = true", "`train.sft_scale` expected a valid number or a valid string"),
    "stop on": ("validation.stop_on = 'ssim'", "expected stop_on among the rewards ['psnr']"),
    "tracker": ("trackers = ['paper']", "`trackers` expected names out of"),
    "option of a formula": ("weighter = {name = 'cosine', peek = 1}", "did you mean `weighter.peak`?"),
    "missing option": ("weighter = {name = 'constant'}", "missing key `weighter.share`"),
    "option of an optimiser": ("train.optimizer = {name = 'AdamW', rate = 1}", "Known are lr, betas"),
    "optimiser": ("train.optimizer = 'torch.optim.Adamm'", "`train.optimizer` names torch.optim.Adamm, which cannot"),
    "schedule": ("train.lr_schedule = 'cosin'", "Did you mean cosine?"),
    "pass rate": ("weighter = 'gate'", "key `weighter` expected a weighter whose `signal` is"),
    "metric": ("metric = 'nowhere.py:metric'", "`metric` expected a Python file, got nowhere.py"),
    "reward weights": ("reward_weights = {other = 1}", "`reward_weights` expected names of ['reward']"),
}
CHANGES = {
    "missing key": ('reward = "haarpsi"\n', "", "missing key `reward`"),
    "reward": ('"haarpsi"', '"harpsi"', "`reward.reward`: unknown reward 'harpsi'; did you mean haarpsi"),
    "blind reward": ('"haarpsi"', '"niqe"', "`reward.reward`: niqe gives no score for images of 16 x 16 pixels"),
    "unknown option": ('"haarpsi"', '{name = "ssim", colour = 1}', "does not have: colour. It has batch_size, color"),
    "value of an option": ('"haarpsi"', '{name = "ssim", color = 3}', "as option 'color', got 3"),
    "two names": ('"haarpsi"', '{haarpsi = 0.5, x = "ssim"}', "`reward.haarpsi` expected a name of `iqareward list`"),
    "option of a reward": ('"haarpsi"', '{name = "QualityGain", gama = 1}', "did you mean `reward.gamma`?"),
    "objective": ('"DiffusionNFT"', '"ppo"', "`objective` expected one of ClippedPolicyGradient, DiffusionNFT"),
    "option": ('"DiffusionNFT"', '{name = "GroupDPO", pairs = 1}', "`objective.pairs` expected 'sum' or 'all', got 1"),
    "folder": ('"photos"', '"fotos"', "expected a folder of images, got fotos"),
    "option of data": ("crops", "crop", "did you mean `data.crops`?"),
    "policy": ('"tiny"', '"huge"', "`policy` expected one of tiny, small, base, PixelPolicy, "),
    "option of a policy": (
        "num_steps = 2 }",
        "lora_rank = 2 }",
        "unknown key `policy.lora_rank`; Known are layers, scale, seed",
    ),
    "scale": ("size = 16", "size = 16, degradation = 'RealESRGANDegradation'", "`policy.scale` expected 4"),
    "size of the images": ("size = 16", "size = 32", "at least 32 x 32, got photos/0.png of 24 x 24"),
    "size for the model": ("size = 16", "size = 18", "`data.size` expected a multiple of 4"),
    "too few images": ("validation.images = 2", "validation.images = 6", "without the 6 of `validation.images` give 0"),
    "too few crops": ("sft.batch_size = 4", "sft.batch_size = 9", "`sft.batch_size` need 9 inputs"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake: str) -> None:
    """A key that is wrong: exit code 2, one sentence that names it, and nothing is begun."""
    line, sentence = MISTAKES[mistake]
    said = train(settings(more=line), code=2)
    assert sentence in " ".join(said.split())
    assert not Path("run").exists()


@pytest.mark.parametrize("mistake", CHANGES)
def test_settings_that_do_not_fit_are_named(mistake: str) -> None:
    """The same for keys that do not fit the images, the model or each other."""
    before, after, sentence = CHANGES[mistake]
    file = settings()
    file.write_text(file.read_text().replace(before, after))
    assert sentence in " ".join(train(file, code=2).split())
    assert not Path("run").exists()


def out_of_memory(*arguments: object, **options: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")


def no_server(*arguments: object, **options: object) -> None:
    raise ConnectionError("no answer from the tracker's server")


FAILURES = {
    "memory for SFT": (
        "iqareward.cli.train.supervised",
        out_of_memory,
        "lower sft.rows_at_once or data.size and start again",
        1,
    ),
    "memory for the model": ("iqareward.cli.train.make_policy", out_of_memory, "out of memory. Lower", 1),
    "tracker": ("accelerate.Accelerator.init_trackers", no_server, "no answer from the tracker", 2),
    "interrupted": ("iqareward.cli.train.supervised", stop, "Stopped", 130),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_start_leaves_the_folder_as_it_was(
    failure: str, existed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails before the first update: no file is left, so that the same command works afterwards."""
    name, fails, sentence, code = FAILURES[failure]
    if existed:
        Path("run").mkdir()
        Path("run/notes.txt").write_text("mine")
    monkeypatch.setattr(name, fails)
    assert sentence in " ".join(train(settings(more='trackers = ["tensorboard"]'), code=code).split())
    assert Path("run").exists() == existed
    if existed:
        assert [item.name for item in Path("run").iterdir()] == ["notes.txt"]


def test_a_model_folder_without_weights_leaves_nothing() -> None:
    """Put right, the same file works."""
    Path("empty").mkdir()
    file = settings()
    file.write_text(file.read_text().replace('{ name = "tiny", num_steps = 2 }', '"empty"'))
    assert "empty" in train(file, code=2)
    assert not Path("run").exists()
    train(settings(updates=1))


def test_what_sft_has_done_outlives_a_failure_of_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh start is told to resume; what concerns RL alone may be mended, what SFT was made with may not."""
    with monkeypatch.context() as patch:
        patch.setattr("iqareward.diffusion.trainer.DifficultyAdaptiveTrainer.calibrate", out_of_memory)
        assert "go on with --resume" in " ".join(train(settings(), code=1).split())
    assert "holds a run that has done its SFT. Go on with --resume" in " ".join(train(settings(), code=2).split())
    assert "`seed` was 0, is 3" in " ".join(train(settings(more="seed = 3"), "--resume", code=2).split())
    before = Path("run/history-sft.jsonl").stat().st_mtime_ns
    train(settings(updates=1, more="train.rows_at_once = 2"), "--resume")
    assert Path("run/history-sft.jsonl").stat().st_mtime_ns == before


def test_files_that_cannot_be_used_are_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncated, empty, too small or a decompression bomb: the run goes on with the others only."""
    whole = Path("photos/0.png").read_bytes()
    Path("photos/a-truncated.png").write_bytes(whole[: len(whole) // 2])
    Path("photos/b-empty.jpg").touch()
    Image.new("RGB", (15, 40)).save("photos/c-narrow.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    Image.new("RGB", (150, 150)).save("photos/d-bomb.png")
    said = train(settings(updates=1))
    assert "4 of 10 images left out, because they cannot be used:" in said
    for name in ("a-truncated.png", "b-empty.jpg", "c-narrow.png", "d-bomb.png"):
        assert f"photos/{name}" in said
    assert "8 inputs to train on, 2 held out" in said


def test_without_a_terminal_there_are_plain_lines() -> None:
    """The first and the last update of SFT and RL, with what matters and without control characters."""
    said = train(settings(updates=1))
    assert "SFT 1/3  sft_loss " in said
    assert "SFT 3/3  " in said
    line = next(line for line in said.splitlines() if line.startswith("RL 1/1  "))
    for word in ("rl_loss", "sft_loss", "reward", "scored 100%", "skipped 0", "s each", "left"):
        assert f"  {word}" in line or f"{word}  " in line or line.endswith(word)
    assert not {"\x1b", "\r"} & set(said)


def test_trackers_get_losses_of_both_phases_and_the_grids() -> None:
    """In the order of their steps, SFT first, as trackers want it; the last grid is the picture of the last file."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(settings(more='trackers = ["tensorboard"]'))
    events = EventAccumulator("run/logs/iqareward").Reload()
    steps = {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert steps["sft/loss"] == [1, 2, 3]
    assert steps["validation/psnr"] == [3, 5]
    assert steps["reward"] == steps["sft_loss"] == [4, 5]
    first, last = events.Images("samples")
    assert (first.step, last.step) == (3, 5)
    with Image.open("run/samples-000002.png") as grid, Image.open(io.BytesIO(last.encoded_image_string)) as shown:
        assert shown.tobytes() == grid.tobytes()


def test_runs_are_not_mixed_up(folder: Path) -> None:
    """A folder with a run is not written over, and a resumed run may be longer but not another one."""
    train(settings(updates=1))
    assert "Go on with --resume" in train(settings(updates=1), code=2)
    said = " ".join(train(settings(updates=1, more="seed = 3\ntrain.kl_beta = 0.5"), "--resume", code=2).split())
    assert "`seed` was 0, is 3; `train.kl_beta` was 0.0, is 0.5" in said
    train(settings(updates=2, more="resume = true\ntrain.rows_at_once = 2\nrollout.inputs_at_once = 3"))
    assert len(Path("run/history.jsonl").read_text().splitlines()) == 3


def test_a_run_that_has_to_stop_says_why(folder: Path) -> None:
    """A learning rate that breaks the weights: exit code 1, one sentence, and the checkpoint from before."""
    said = train(settings(more="train.learning_rate = 1e30"), code=1)
    assert "made weights that are not finite" in " ".join(said.split())
    assert load_state(Path("run/checkpoint.pt"))["updates"] == 0
    assert not Path("run/model").exists()
    train(settings(updates=1, more="train.learning_rate = 1e-4"), "--resume")
    assert len(Path("run/history.jsonl").read_text().splitlines()) == 2


def test_a_tracker_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not left out without a word, as accelerate does."""
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    assert "pip install wandb" in train(settings(more="trackers = ['wandb']"), code=2)


def test_the_example_has_every_key() -> None:
    """It is printed, can be read as it is, and names each key of each table, those that are commented out included."""
    result = CliRunner().invoke(app, ["train", "--example"])
    assert result.exit_code == 0
    assert result.stdout == EXAMPLE.read_text()
    Path("example.toml").write_text(result.stdout)
    read_config(Path("example.toml"))
    uncommented = "\n".join(
        line.removeprefix("# ") if re.match(r"# [a-z_]+ = ", line) else line for line in result.stdout.splitlines()
    )
    found = tomllib.loads(uncommented)
    tables = {
        "data": FolderPairs,
        "sft": SFTConfig,
        "rollout": RolloutConfig,
        "train": TrainConfig,
        "validation": ValidationConfig,
    }
    for name, table in tables.items():
        assert found[name].keys() == {item.name for item in fields(table)}, name
    assert found["data"]["degradation"].keys() == {"name", *(item.name for item in fields(Degradation))}
    assert found.keys() == {item.name for item in fields(RunConfig)}


OWN = """
import torch
from torch.utils.data import Dataset

from iqareward.diffusion import FeedForwardPolicy, synthetic_images


class Photos(Dataset):
    def __init__(self, count, truth):
        self.count, self.truth = count, truth

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = synthetic_images([index], size=16)[0]
        item = {"lq": (image + 0.1 * torch.randn_like(image)).clamp(0, 1), "task": "denoise"}
        return item | ({"gt": image} if self.truth else {})


def data(count: int = 6, truth: bool = True):
    return Photos(count, truth)


def policy(channels: int = 4, loss="l1"):
    layers = torch.nn.Conv2d(3, channels, 3, padding=1), torch.nn.Conv2d(channels, 3, 3, padding=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in layers:
            layer.reset_parameters()
    return FeedForwardPolicy(torch.nn.Sequential(*layers), loss=loss)


def brightness(images, **others):
    return images.mean((1, 2, 3))


def bright():
    return brightness


def weighter(share: float):
    from iqareward.schedules import Schedule, constant
    from functools import partial

    return Schedule(partial(constant, share=share))


def squared(images, references):
    return (images - references).square().flatten(1).mean(1)
"""
RUN = """
output = "run"
updates = 1
rollout = { group_size = 2, num_steps = 2 }
validation = { images = 2, rewards = ["psnr"] }
"""


def history(text: str, *options: str, file: str = "own.py") -> list[dict[str, float]]:
    """The lines of a run with Python of one's own."""
    Path(file).write_text(OWN)
    Path("train.toml").write_text(RUN + text.replace("own.py", file))
    train(Path("train.toml"), *options)
    return [json.loads(line) for line in Path("run/history.jsonl").read_text().splitlines()]


def test_an_objective_that_does_not_fit_the_policy_is_refused_before_sft(folder: Path) -> None:
    """And not after hours of it."""
    Path("own.py").write_text(OWN)
    text = 'policy = "own.py:policy"\ndata = "own.py:data"\nreward = "own.py:bright"\nobjective = "DiffusionNFT"\n'
    Path("train.toml").write_text(
        RUN + text + "sft = { updates = 1000000, batch_size = 4 }\ntrain.inputs_per_update = 4\n"
    )
    assert "key `objective` expected another one than DiffusionNFT" in " ".join(
        train(Path("train.toml"), code=2).split()
    )


def test_a_small_model_enlarges(folder: Path) -> None:
    """With the scale of the data as an option of the policy; the trained model keeps it."""
    text = settings(updates=1).read_text().replace('name = "tiny"', 'name = "tiny", scale = 4')
    text = text.replace("size = 16", "size = 16, degradation = 'RealESRGANDegradation'")
    Path("train.toml").write_text(text)
    train(Path("train.toml"))
    assert load_restorer("run/model").scale == 4


def test_python_files_give_policy_data_reward_and_loss(folder: Path) -> None:
    """Functions of a file are called with the options of the table; the run resumes; workers read the data set."""
    text = """
policy = { name = "own.py:policy", channels = 6, loss = "own.py:squared", exploration = 0.1 }
data = { name = "own.py:data", count = 8 }
reward = "own.py:bright"
weighter = { name = "own.py:weighter", share = 0.5 }
metric = "haarpsi"
train.inputs_per_update = 4
num_workers = 1
"""
    (_, first) = history(text, file="own_parts.py")
    assert first["sft_share"] == 0.5
    assert 0 < first["reward"] < 1
    written = load_file("run/model/model.safetensors")
    assert written["0.weight"].shape == (6, 3, 3, 3)
    learnt = load_state(Path("run/checkpoint.pt"))["learner"]["model"]
    torch.testing.assert_close(written, learnt, **EXACT)


def test_without_ground_truth_there_is_no_sft() -> None:
    """Difficulty comes from the quality of the degraded images; a reward of ground truth is refused by its key."""
    text = """
policy = "own.py:policy"
data = { name = "own.py:data", truth = false }
reward = { name = "QualityGain", quality = "piqe[-100, 0]", fidelity = "haarpsi" }
input_quality = "piqe"
train.inputs_per_update = 2
"""
    Path("own_blind.py").write_text(OWN)
    Path("train.toml").write_text(RUN + text.replace("own.py", "own_blind.py"))
    said = train(Path("train.toml"), code=2)
    assert "`validation.rewards.psnr`: psnr compares with ground truth" in " ".join(said.split())
    text = RUN.replace('"psnr"', '"piqe"') + text.replace("own.py", "own_blind.py")
    Path("train.toml").write_text(text)
    train(Path("train.toml"))
    line = json.loads(Path("run/history.jsonl").read_text().splitlines()[-1])
    assert line["sft_loss"] == 0
    assert line["difficulty"] > 0


def test_two_rewards_with_weights_and_options() -> None:
    """Each is in the history by its name, beside their weighted sum."""
    more = """
[reward]
sharp = { name = "haarpsi", differentiable = true }
gain = { name = "QualityGain", quality = { name = "piqe[-100, 0]" }, fidelity = "ssim[0, 1]", gamma = 0.5 }
task = { name = "ByTask", rewards = { deblur = "ssim", photo = "haarpsi" } }
rank = { name = "RankInGroup", reward = "ssim", margin = 0.001 }

[reward_weights]
gain = 3.0
"""
    file = settings(updates=1, more=more)
    text = file.read_text().replace("size = 16", 'size = 16, task = "photo"')
    file.write_text(text.replace('reward = "haarpsi"\n', ""))
    train(file)
    line = json.loads(Path("run/history.jsonl").read_text().splitlines()[-1])
    assert line["reward/task"] == pytest.approx(line["reward/sharp"], rel=1e-5)
    total = 2 * line["reward/sharp"] + line["reward/rank"] + 3 * line["reward/gain"]
    assert line["reward"] == pytest.approx(total, rel=1e-5)
    assert line["reward/rank"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ('{ name = "ssim", color = "y" }', {"reward": "ssim(color=y)"}),
        ('"ssim(color=y)"', {"reward": "ssim(color=y)"}),
        (
            "{ haarpsi = 0.7, psnr = { weight = 0.3, range = [10, 50] } }",
            {"reward": "0.7*haarpsi + 0.3*psnr[10, 50]"},
        ),
        ('{ ssim = { color = "y" } }', {"reward": "ssim(color=y)"}),
        (
            '[{ name = "ssim", weight = 0.5 }, { name = "ssim", weight = 0.5, color = "y" }]',
            {"reward": "0.5*ssim + 0.5*ssim(color=y)"},
        ),
        ('["ssim", "haarpsi"]', {"ssim": "ssim", "haarpsi": "haarpsi"}),
        (
            '{ a = "ssim", b = { name = "ssim", color = "y" }, c = { name = "RankInGroup", reward = { ssim = 0.5 } } }',
            {"a": "ssim", "b": "ssim(color=y)", "c": "rank(0.5*ssim)"},
        ),
    ],
)
def test_forms_of_a_reward(spec: str, names: dict[str, str]) -> None:
    """Text, tables of options, sums and several rewards by name are read as they look."""
    file = settings()
    file.write_text(file.read_text().replace('reward = "haarpsi"', f"reward = {spec}"))
    config = read_config(file)
    built = {key: make_on(torch.device("cpu"), call, key).name for key, call in config.reward.items()}
    assert built == names


def test_everything_that_has_a_name_is_built() -> None:
    """Optimiser, schedule, weighting, degradation, objective and memory become the objects that Python would build."""
    more = """
weighter = { name = "gate", threshold = 0.25, pass_distance = 0.05 }
memory = { length = 4 }
train.optimizer = { name = "SGD", lr = 0.1, momentum = 0.9 }
train.lr_schedule = { name = "cosine", num_warmup_steps = 3 }
rollout.window = [0, 1]
sft.optimizer = "torch.optim.Adam"
"""
    file = settings(more=more)
    text = file.read_text().replace("crops = 2", 'crops = 2, degradation = {name = "FaceDegradation", factor = [1, 2]}')
    file.write_text(text.replace('"DiffusionNFT"', '{name = "GroupDPO", beta = 10, pairs = "all"}'))
    config = read_config(file)
    weights = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = config.train.optimizer(weights)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert type(config.sft.optimizer(weights)) is torch.optim.Adam
    assert config.rollout.window == range(1)
    assert config.objective() == GroupDPO(beta=10.0, pairs="all")
    assert config.memory(8).length == 4
    assert config.data.keywords["degradation"] == FaceDegradation(factor=(1.0, 2.0))
    assert config.weighter.pass_distance == 0.05
    assert config.weighter(pass_rate=torch.tensor([0.25, 0.5])).sft.tolist() == [1.0, 0.0]


def test_a_schedule_ends_with_the_run() -> None:
    """A cosine without a length falls to 0 with the last update."""
    train(settings(more='train.lr_schedule = "cosine"'))
    groups = load_state(Path("run/checkpoint.pt"))["learner"]["updates"]["optimizer"]["param_groups"]
    assert groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_without_a_file_it_says_where_to_begin() -> None:
    """No `--config` is an error that names `--example`."""
    result = CliRunner().invoke(app, ["train"])
    assert result.exit_code == 2
    assert "--example" in result.stderr
