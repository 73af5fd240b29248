"""`iqareward doctor` tells the truth about packages, weights and rewards."""

import importlib
import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from rich.console import Console
from typer.testing import CliRunner

from iqareward.cli import app
from iqareward.cli.doctor import Finding, diagnose, show
from iqareward.rewards.catalog import CATALOG

doctor = importlib.import_module("iqareward.cli.doctor")  # the command of this name hides the module


@pytest.fixture(autouse=True)
def imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing every extra takes half a minute; one test imports for real."""
    monkeypatch.setattr(doctor, "_import_problem", lambda distribution: "")


def states(findings: list[Finding], part: str) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings if finding.part == part}


def test_every_reward_and_requirement_has_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All rewards, all extras but `all`; with empty caches those with weights say how to get them."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    findings = diagnose()
    rewards = states(findings, "rewards")
    assert set(rewards) == set(CATALOG)
    assert rewards["ssim"] == "ok"
    lpips = next(finding for finding in findings if finding.name == "lpips" and finding.part == "rewards")
    assert lpips.state == "note"
    assert str(tmp_path / "checkpoints" / "alexnet") in lpips.fix
    extras = set(importlib.metadata.metadata("iqareward").get_all("Provides-Extra")) - {"all"}
    assert {finding.part for finding in findings} == {"core", "devices", "rewards"} | {
        f"extra {name}" for name in extras
    }


def test_weights_in_the_cache_are_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file at its place in torch's cache makes the reward ready."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    assert states(diagnose(), "rewards")["lpips"] == "ok"


def test_missing_and_old_packages_name_their_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing extra costs its rewards and nothing else; an old version asks for an upgrade."""
    versions = importlib.metadata.version

    def version(name: str) -> str:
        if name == "piq":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.0.1" if name == "torchao" else versions(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    findings = diagnose()
    rows = {(finding.part, finding.name): finding for finding in findings}
    assert rows["extra perceptual", "piq"].fix == 'pip install "iqareward[perceptual]"'
    assert rows["rewards", "fsim"].state == "missing"
    assert rows["rewards", "fsim"].fix == 'pip install "iqareward[perceptual]"'
    assert rows["extra quant", "torchao"].state == "old"
    assert rows["rewards", "ssim"].state == "ok"


def test_broken_packages_are_imported_to_find_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package that is installed and fails to import is broken, with the first line of its error."""
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "brokenpackage.py").write_text("raise RuntimeError('built for another torch\\nsecond line')")
    facts = tmp_path / "brokenpackage-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: brokenpackage\nVersion: 1.0\n")
    (facts / "top_level.txt").write_text("brokenpackage\n")
    found = doctor._package("core", Requirement("brokenpackage>=0.5"), "pip install brokenpackage")
    assert found.state == "broken"
    assert found.detail == "1.0: RuntimeError: built for another torch"
    assert doctor._package("core", Requirement("rich>=1"), "").state == "ok"


def test_command_prints_and_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON on request; exit code 1 exactly when something is broken or too old."""
    findings = [Finding("core", "torch", "ok", "2.15"), Finding("rewards", "[x]", "missing", "no [y]", "pip install z")]
    monkeypatch.setattr(doctor, "diagnose", lambda: findings)
    good = CliRunner().invoke(app, ["doctor", "--json"])
    assert good.exit_code == 0
    assert json.loads(good.stdout)[1]["fix"] == "pip install z"
    with Console(width=100).capture() as _:
        show(findings, Console())
    findings.append(Finding("core", "numpy", "broken", "no"))
    bad = CliRunner().invoke(app, ["doctor"])
    assert bad.exit_code == 1
    assert "[x]" in bad.stdout
    assert "0 of 1 rewards" in bad.stdout
