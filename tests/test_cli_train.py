"""`iqareward train` on a few small pictures: what it writes, that a killed run goes on, what it says of mistakes."""

import json
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("diffusers", reason="training needs the extra diffusers")
pytest.importorskip("accelerate", reason="training needs the extra diffusers")

from iqareward.cli import app
from iqareward.cli.train import EXAMPLE
from iqareward.cli.train_config import HeldOut, Supervised, TrainConfig, read_config
from iqareward.cli.train_data import split
from iqareward.diffusion.checkpoint import load_state
from iqareward.diffusion.data.degradations import Degradation
from iqareward.diffusion.data.textures import synthetic_images
from iqareward.diffusion.experience import Sampling
from iqareward.diffusion.learner import Optimization
from iqareward.diffusion.restorer import load_restorer
from tests.tolerances import EXACT

SETTINGS = """
folder = "photos"
reward = "haarpsi"
output = "{output}"
model = "tiny"
size = 16
crops = 2
updates = {updates}
save_every = 1
sft.updates = 3
sft.batch_size = 4
sampling.group_size = 2
sampling.num_steps = 2
optimization.inputs_per_update = 4
validation.images = 2
validation.judges = ["psnr"]
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


def test_a_run_leaves_what_it_promises(folder: Path) -> None:
    """A checkpoint, a history, grids of held-out images and the model, all of them named at the end."""
    said = train(settings())
    lines = [json.loads(line) for line in Path("run/history.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [0, 1, 2]
    assert {"reward", "difficulty", "rl_share", "sft_share", "validation/psnr"} <= lines[-1].keys()
    with Image.open("run/samples-000002.png") as grid:
        assert grid.size == (2 * 16, 3 * 16)
    learnt = load_state(Path("run/checkpoint.pt"))["learner"]["model"]
    for name, weight in weights("run").items():
        torch.testing.assert_close(weight, learnt[name], **EXACT)
    assert not torch.equal(load_restorer("run/sft").model.conv_in.weight, weights("run")["conv_in.weight"])
    for promised in ("run/model", "run/history.jsonl", "run/checkpoint.pt", "psnr, held-out images"):
        assert promised in said


def test_no_held_out_file_is_trained_on() -> None:
    """Files, not crops, are parted, and all of them are used."""
    data = split(read_config(settings()))
    train_files, held_out_files = ({place // 2 for place in part.ids} for part in data)
    assert not train_files & held_out_files
    assert len(train_files) == 4
    assert len(held_out_files) == len(data.held_out) == 2
    assert len(data.train) == 8


def test_a_killed_run_goes_on_where_it_was(folder: Path) -> None:
    """Killed without warning amid RL, then resumed, it ends with the numbers of a run that nothing has happened to."""
    file = settings("killed", updates=10_000)
    program = "import sys; from iqareward.cli import app; app(['train', '--config', sys.argv[1]])"
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program, str(file)], stderr=subprocess.DEVNULL)
    checkpoint, deadline = Path("killed/checkpoint.pt"), time.monotonic() + 300
    try:
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None, "the run ended by itself"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    updates = load_state(checkpoint)["updates"] + 2
    train(settings("killed", updates), "--resume")
    train(settings("unbroken", updates))
    assert Path("killed/history.jsonl").read_text() == Path("unbroken/history.jsonl").read_text()
    for name, weight in weights("unbroken").items():
        torch.testing.assert_close(weights("killed")[name], weight, **EXACT)


def test_stopped_during_sft_it_begins_sft_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control-C is answered with what to do, and the resumed run is the unbroken one."""
    with monkeypatch.context() as patch:
        patch.setattr("iqareward.cli.train.save_restorer", stop)
        assert "--resume" in train(settings("stopped"), code=130)
    train(settings("stopped"), "--resume")
    train(settings("unbroken"))
    for name, weight in weights("unbroken").items():
        torch.testing.assert_close(weights("stopped")[name], weight, **EXACT)


def stop(*arguments: object) -> None:
    """A person presses Control-C."""
    raise KeyboardInterrupt


def test_a_model_from_a_folder_is_trained_on(folder: Path) -> None:
    """The model of one run starts another, without SFT; the best one by a judge is kept; policy gradient works too."""
    train(settings())
    more = """
validation.stop_on = "psnr"
objective = "policy_gradient"
trackers = ["tensorboard"]
"""
    text = settings("second", more=more).read_text().replace('"tiny"', '"run/model"')
    Path("train.toml").write_text(text)
    train(Path("train.toml"))
    assert not Path("second/sft").exists()
    assert Path("second/best.safetensors").exists()
    assert list(Path("second/logs").rglob("events.out.tfevents.*"))


MISTAKES = {
    "no TOML": ("folder =", "no TOML"),
    "too deep": (f"folder = {'[' * 5000}", "no TOML"),
    "unknown key": ("foldr = 'x'", "unknown key `foldr`; did you mean `folder`?"),
    "unknown key in a table": ("sampling.groupsize = 3", "did you mean `sampling.group_size`?"),
    "type": ("seed = 'one'", "`seed` expected an integer, got 'one'"),
    "type in a table": ("optimization.max_grad_norm = true", "`optimization.max_grad_norm` expected a number"),
    "list": ("degradation.tasks = 'blur'", "`degradation.tasks` expected a list of strings"),
    "window": ("sampling.window = [1]", "`sampling.window` expected [first, end]"),
    "table": ("degradation = 1", "`degradation` expected a table"),
    "value in a table": ("degradation.max_noise = 0", "table `degradation`: Degradation expected max_noise >= 2"),
    "word": ("optimization.sft_scale = 'auto'", "table `optimization`"),
    "objective": ("objective = 'ppo'", "expected objective as one of"),
    "judge": ("validation.stop_on = 'ssim'", "expected stop_on among the judges ['psnr']"),
    "tracker": ("trackers = ['paper']", "`trackers` expected names out of"),
    "both damages": ("degraded_folder = 'photos'\ndegradation.max_sigma = 1", "Remove one"),
}
CHANGES = {
    "missing key": ('reward = "haarpsi"\n', "", "missing key `reward`"),
    "reward": ('"haarpsi"', '"harpsi"', "did you mean haarpsi"),
    "blind reward": ('"haarpsi"', '"niqe"', "`reward`: niqe gives no score for crops of 16 pixels"),
    "folder": ('"photos"', '"fotos"', "expected a folder of images, got fotos"),
    "model": ('"tiny"', '"huge"', "expected model as one of"),
    "size of the images": ("size = 16", "size = 32", "24x24, smaller than `size` 32"),
    "size for the model": ("size = 16", "size = 18", "`size` expected a multiple of 4"),
    "too few images": ("validation.images = 2", "validation.images = 6", "without the 6 of `validation.images` give 0"),
    "too few crops": ("sft.batch_size = 4", "sft.batch_size = 9", "`sft.batch_size` need 9 crops"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake: str) -> None:
    """A key that is wrong: exit code 2, one sentence that names it, and nothing is begun."""
    line, sentence = MISTAKES[mistake]
    said = train(settings(more=line), code=2)
    assert sentence in " ".join(said.split())
    assert not Path("run/sft").exists()


@pytest.mark.parametrize("mistake", CHANGES)
def test_settings_that_do_not_fit_are_named(mistake: str) -> None:
    """The same for keys that do not fit the images, the model or each other."""
    before, after, sentence = CHANGES[mistake]
    file = settings()
    file.write_text(file.read_text().replace(before, after))
    assert sentence in " ".join(train(file, code=2).split())
    assert not Path("run/sft").exists()


def test_runs_are_not_mixed_up(folder: Path) -> None:
    """A folder with a run is not written over, and a resumed run may be longer but not another one."""
    train(settings(updates=1))
    assert "Go on with --resume" in train(settings(updates=1), code=2)
    said = " ".join(train(settings(updates=1, more="seed = 3\noptimization.kl_beta = 0.5"), "--resume", code=2).split())
    assert "`seed` was 0, is 3; `optimization.kl_beta` was 0.0, is 0.5" in said
    train(settings(updates=2, more="resume = true"))
    assert len(Path("run/history.jsonl").read_text().splitlines()) == 3


def test_a_run_that_has_to_stop_says_why(folder: Path) -> None:
    """A learning rate that breaks the weights: exit code 1, one sentence, and the checkpoint from before."""
    said = train(settings(more="optimization.learning_rate = 1e30"), code=1)
    assert "made weights that are not finite" in " ".join(said.split())
    assert load_state(Path("run/checkpoint.pt"))["updates"] == 0
    assert not Path("run/model").exists()


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
    text = result.stdout.replace("# degraded_folder", "degraded_folder")
    uncommented = "\n".join(line.removeprefix("# ") if " = " in line else line for line in text.splitlines())
    found = tomllib.loads(uncommented)
    tables = {
        "degradation": Degradation,
        "sft": Supervised,
        "sampling": Sampling,
        "optimization": Optimization,
        "validation": HeldOut,
    }
    for name, table in tables.items():
        assert found.pop(name).keys() == {item.name for item in fields(table)}, name
    assert found.keys() == {item.name for item in fields(TrainConfig)} - set(tables)


def test_without_a_file_it_says_where_to_begin() -> None:
    """No `--config` is an error that names `--example`."""
    result = CliRunner().invoke(app, ["train"])
    assert result.exit_code == 2
    assert "--example" in result.stderr
