"""`iqareward doctor` tells the truth about packages, weights and rewards."""

import fcntl
import importlib
import importlib.metadata
import json
import os
import pty
import shlex
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from typer.testing import CliRunner

from iqareward.cli import app
from iqareward.cli.doctor import Finding, diagnose
from iqareward.rewards.catalog import CATALOG

doctor = importlib.import_module("iqareward.cli.doctor")  # the command of this name hides the module


@pytest.fixture(autouse=True)
def imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing every extra takes half a minute; one test imports for real."""
    monkeypatch.setattr(doctor, "_import_problem", lambda distribution: "")


@contextmanager
def pty_of(columns: int) -> Iterator[tuple[int, int]]:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    try:
        yield leader, follower
    finally:
        os.close(leader)


def read_all(leader: int) -> str:
    data = b""
    try:
        while block := os.read(leader, 4096):
            data += block
    except OSError:  # what Linux raises at the end
        pass
    return data.decode()


def states(findings: list[Finding], part: str) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings if finding.part == part}


def test_every_reward_and_requirement_has_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All rewards, all extras but `all`; with empty caches those with weights say how to get them."""
    from torchvision.models import AlexNet_Weights

    tmp_path = tmp_path / "a folder's name"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    findings = diagnose()
    rewards = states(findings, "rewards")
    assert set(rewards) == set(CATALOG)
    assert rewards["ssim"] == "ok"
    lpips = next(finding for finding in findings if finding.name == "lpips" and finding.part == "rewards")
    assert lpips.state == "note"
    (file,) = {text for text in shlex.split(lpips.fix) if text.startswith(str(tmp_path))}
    url = AlexNet_Weights.IMAGENET1K_V1.url
    assert lpips.fix.endswith(f" {url}")
    assert Path(file) == tmp_path / "checkpoints" / url.rsplit("/", 1)[-1]
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
    found = doctor._package("core", Requirement("brokenpackage>=0.5"), "", doctor._import_problem)
    assert found.state == "broken"
    assert found.detail == "1.0: RuntimeError: built for another torch"
    assert doctor._package("core", Requirement("rich>=1"), "", doctor._import_problem).state == "ok"


def test_command_prints_and_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON on request; exit code 1 exactly when something is broken or too old."""
    findings = [Finding("core", "torch", "ok", "2.15"), Finding("rewards", "[x]", "missing", "no [y]", "pip install z")]
    monkeypatch.setattr(doctor, "diagnose", lambda: findings)
    good = CliRunner().invoke(app, ["doctor", "--json"])
    assert good.exit_code == 0
    assert json.loads(good.stdout)[1]["fix"] == "pip install z"
    findings.append(Finding("core", "numpy", "broken", "no"))
    bad = CliRunner().invoke(app, ["doctor"])
    assert bad.exit_code == 1
    assert "[x]" in bad.stdout
    assert "0 of 1 rewards" in bad.stdout


@pytest.mark.parametrize("columns", ["40", "80"])
def test_commands_can_be_copied(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    """At any width each command is one line of its own, with its brackets; neighbours share one."""
    pip, curl = (
        'pip install "iqareward[vlm]" --upgrade',
        f"curl --create-dirs -Lo /{'long/' * 20}x.pth https://a.org/x.pth",
    )
    findings = [
        Finding("extra vlm", "transformers", "old", "4.0, needs >=5", pip),
        Finding("rewards", "qrealign", "missing", "transformers is old", pip),
        Finding("rewards", "qinsight", "missing", "transformers is old", pip),
        Finding("rewards", "lpips", "note", "weights are downloaded at the first call", curl),
    ]
    monkeypatch.setattr(doctor, "diagnose", lambda: findings)
    lines = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": columns}).stdout.splitlines()
    assert [line.strip() for line in lines].count(pip) == 2
    assert [line.strip() for line in lines].count(curl) == 1


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = importlib.metadata.version

    def version(name: str) -> str:
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions(name)

    monkeypatch.setattr(doctor.metadata, "version", version)


@pytest.mark.parametrize("columns", ["30", "80", "400"])
def test_list_is_one_line_per_name(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    """In a pipe of any width: name, what works here or the extra, references, gradient, range, sign."""
    without("transformers", monkeypatch)
    _, *lines = CliRunner().invoke(app, ["list"], env={"COLUMNS": columns}).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(CATALOG)
    rows = {line.split()[0]: line.split()[1:6] for line in lines}
    assert rows["psnr"] == ["yes", "refs", "grad", "10..50", "-"]
    assert rows["niqe"] == ["yes", "-", "-", "-12..0", "negated"]
    assert rows["qrealign_lite"][0] == "[vlm]"
    assert all(entry.summary in line for line, entry in zip(lines, CATALOG.values(), strict=True))


def test_list_says_what_works_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """JSON has range, direction, and the same verdict as `doctor`, without importing the extras."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    without("transformers", monkeypatch)
    verdicts = {finding.name: finding for finding in diagnose() if finding.part == "rewards"}
    monkeypatch.setattr(importlib, "import_module", None)
    rows = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)
    assert {name: row["state"] for name, row in rows.items()} == {name: row.state for name, row in verdicts.items()}
    assert (rows["qrealign"]["works_here"], rows["qrealign"]["fix"]) == (False, 'pip install "iqareward[vlm]"')
    assert (rows["lpips"]["works_here"], rows["lpips"]["state"]) == (True, "note")
    assert (rows["niqe"]["bounds"], rows["niqe"]["usual"]) == ([None, 0.0], [-12.0, 0.0])
    assert rows["niqe"]["higher_is_better"] is False


def test_list_of_pyiqa(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyiqa's names are listed with what is known of them, also where pyiqa is missing."""
    without("pyiqa", monkeypatch)
    rows = {
        line.split()[0]: line.split()[1:6] for line in CliRunner().invoke(app, ["list", "--pyiqa"]).stdout.splitlines()
    }
    assert rows["pyiqa:musiq"] == ["[pyiqa]", "-", "grad", "0..100", "-"]
    assert rows["pyiqa:lpips-vgg+"] == ["[pyiqa]", "refs", "grad", "-1..0", "negated"]
    monkeypatch.undo()
    rows = json.loads(CliRunner().invoke(app, ["list", "--pyiqa", "--json"]).stdout)
    assert rows["pyiqa:musiq"]["licence"] == "PolyForm Noncommercial"
    assert (rows["pyiqa:musiq"]["state"], rows["pyiqa:vif"]["state"]) == ("note", "ok")  # its cache is its own


def test_list_on_a_terminal_is_cut_at_its_width() -> None:
    """On a terminal of 80 columns no line of `list` is longer, and each name still has one."""
    with pty_of(80) as (leader, follower):
        environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
        command = [sys.executable, "-m", "iqareward", "list"]
        child = subprocess.Popen(command, stdout=follower, stderr=follower, env=environment)
        os.close(follower)
        text = read_all(leader)
        assert child.wait() == 0
    lines = text.replace("\r", "").splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1 : 1 + len(CATALOG)]] == list(CATALOG)
