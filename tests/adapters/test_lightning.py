"""Scores of the validations of a run of Lightning: every sample counts once, and nothing before training is logged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.adapters.validation_set import REWARDS, expected_figures, restored_of, validation_set

lightning = pytest.importorskip("lightning.pytorch", reason="the development group has lightning")
torchmetrics = pytest.importorskip("torchmetrics")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: E402

from iqareward.adapters.lightning import quality_callback  # noqa: E402
from iqareward.adapters.torchmetrics import RewardMetric  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning 2.6 with torch 2.15
]


class Model(lightning.LightningModule):
    """One weight, whose value does not change the restorations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.quality = torchmetrics.MetricCollection({name: RewardMetric(name) for name in REWARDS}, prefix="metric/")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.weight - 1).square().sum()

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        degraded, clean = batch
        restored = restored_of(degraded)
        if dataloader_idx == 0:
            self.quality.update(restored, references=clean)
        return restored

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.quality.compute())
        self.quality.reset()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def restore(module: Any, batch: Any, outputs: Any) -> dict[str, Any]:
    return {"images": outputs, "references": batch[1], "inputs": batch[0]}


def loader(rows: int = 11) -> Any:
    return DataLoader(TensorDataset(*(column[:rows] for column in validation_set())), batch_size=2)


def trainer_in(folder: Path, callback: Any, **options: Any) -> Any:
    defaults = {
        "accelerator": "cpu", "devices": 1, "default_root_dir": folder, "max_epochs": 2, "logger": CSVLogger(folder),
        "limit_train_batches": 2, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False,
    }  # fmt: skip
    callbacks = [callback, *options.pop("callbacks", ())]
    return lightning.Trainer(**defaults | options, callbacks=callbacks)


def figures(trainer: Any, prefix: str) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}


def test_training(tmp_path: Path) -> None:
    """Each validation is logged with its step, the sanity check is not; checkpoints can monitor a figure."""
    logged: list[tuple[int, set[str]]] = []

    class Logger(CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            logged.append((step, set(metrics)))

    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="val/ssim", mode="max", filename="best")
    callback = quality_callback(REWARDS, restore, folder=tmp_path / "grids", num_images=3)
    trainer = trainer_in(
        tmp_path, callback, logger=Logger(tmp_path), callbacks=[checkpoint], enable_checkpointing=True,
        num_sanity_val_steps=2,
    )  # fmt: skip
    trainer.fit(Model(), loader(), loader())
    expected = expected_figures("val")
    assert figures(trainer, "val/") == pytest.approx(expected, rel=1e-6)
    assert figures(trainer, "metric/") == pytest.approx(
        {f"metric/{n}": expected[f"val/{n}"] for n in REWARDS}, rel=1e-6
    )
    assert [step for step, names in logged if "val/ssim" in names] == [1, 3]
    assert sorted(path.name for path in (tmp_path / "grids").iterdir()) == ["00000002.png", "00000004.png"]
    assert float(checkpoint.best_model_score) == pytest.approx(expected["val/ssim"], rel=1e-6)
    assert set(torch.load(checkpoint.best_model_path, weights_only=False)["state_dict"]) == {"weight"}


def test_loggers_of_images_and_several_loaders(tmp_path: Path) -> None:
    """TensorBoard gets the grid; further loaders get names of their own."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = trainer_in(tmp_path, quality_callback(REWARDS, restore), logger=TensorBoardLogger(tmp_path, "run", ""))
    trainer.validate(Model(), [loader(), loader(3)], verbose=False)
    expected = expected_figures("val")
    found = figures(trainer, "val/")
    assert {name.removesuffix("/dataloader_idx_0"): value for name, value in found.items() if name[-1] == "0"} == (
        pytest.approx(expected, rel=1e-6)
    )
    assert found["val/ssim/unscored/dataloader_idx_1"] == 0
    read = events.EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0})
    read.Reload()
    assert read.Tags()["images"] == ["val/images"]


def test_errors(tmp_path: Path) -> None:
    """A missing reference stops the run in the sanity check, and so does a function that returns something else."""
    cases = [
        (lambda module, batch, outputs: {"images": outputs}, ValueError, "needs|expected `references`"),
        (lambda module, batch, outputs: outputs, TypeError, "expected `restore` to return"),
        (lambda module, batch, outputs: {"images": outputs, "target": 1}, TypeError, "got .'images', 'target'."),
    ]
    for function, error, message in cases:
        with pytest.raises(error, match=message):
            trainer_in(tmp_path, quality_callback(REWARDS, function)).fit(Model(), loader(), loader())
    with pytest.raises(TypeError, match="restore"):
        quality_callback(REWARDS, "images")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Eleven samples on two processes: one is repeated by the sampler, and counts once."""
    callback = quality_callback(REWARDS, restore, folder=tmp_path / "grids", num_images=3)
    trainer = trainer_in(tmp_path, callback, devices=2, strategy="ddp_spawn", max_epochs=1)
    trainer.fit(Model(), loader(), loader())
    assert figures(trainer, "val/") == pytest.approx(expected_figures("val"), rel=1e-6)
    assert len(list((tmp_path / "grids").iterdir())) == 1
