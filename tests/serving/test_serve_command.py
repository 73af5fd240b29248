"""`iqareward serve`: what is typed, what is warned of, and one run from start to SIGTERM."""

import contextlib
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from typer.testing import CliRunner

import iqareward
from iqareward.cli import app
from iqareward.serving import run as server
from iqareward.serving.client import RemoteReward
from iqareward.serving.listener import Address
from iqareward.serving.requests import Settings
from iqareward.serving.run import APP_NAME, Deployment, application, from_config, front, load_rewards, most_replicas
from tests.serving import ray_quietly  # noqa: F401  # imports Ray without its warnings
from tests.serving.in_process import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def deployed(monkeypatch) -> dict:
    """What would have been deployed, and on which Ray."""
    seen: dict = {}

    @contextlib.contextmanager
    def on(address=None, **options):
        seen["address"] = address
        yield

    def deploy(rewards, deployment, settings, **options):
        seen.update(rewards=list(rewards), deployment=deployment, settings=settings, **options)

    monkeypatch.setattr(Address, "bind", lambda address: socket.socket())  # whatever else listens here
    monkeypatch.setattr(server, "local_ray", on)
    monkeypatch.setattr(server, "cluster_ray", on)
    monkeypatch.setattr(server, "deploy", deploy)
    monkeypatch.setattr(server, "wait_for_stop", lambda: seen.update(waited=True))
    monkeypatch.delenv("IQAREWARD_TOKEN", raising=False)
    return seen


def typed(*arguments: str):
    return CliRunner().invoke(app, ["serve", *arguments])


def test_defaults(deployed):
    """Without options: this machine only, scaled by load, no JPEG, no warning."""
    result = typed("piqe", "0.7*ssim + 0.3*haarpsi")
    assert result.exit_code == 0
    assert "warning" not in result.output
    assert "piqe, 0.7*ssim + 0.3*haarpsi: http://127.0.0.1:8000\n" in result.output
    assert deployed["rewards"] == ["piqe", "0.7*ssim + 0.3*haarpsi"]
    assert deployed["deployment"] == Deployment()
    assert deployed["settings"] == Settings()
    assert (deployed["host"], deployed["everywhere"], deployed["waited"]) == ("127.0.0.1", False, True)


def test_options(deployed, monkeypatch):
    """Every option arrives, a cluster is not waited for, and the token itself goes nowhere."""
    monkeypatch.setenv("SECRET", "hush")
    result = typed(
        "piqe", "--host", "0.0.0.0", "--port", "9000", "--address", "auto", "--replicas", "3", "--num-gpus", "0.5",
        "--num-cpus", "2", "--max-batch", "64", "--max-wait-ms", "2", "--max-body-mib", "8", "--max-images", "100",
        "--deadline", "30", "--jpeg", "always", "--token-env", "SECRET",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert deployed["deployment"] == Deployment(
        replicas=3, num_gpus=0.5, num_cpus=2.0, max_batch=64, max_wait_ms=2.0, token_env="SECRET"
    )
    settings = deployed["settings"]
    assert (settings.limits.max_bytes, settings.limits.max_images) == (8 * 2**20, 100)
    assert (settings.deadline, settings.jpeg, settings.token) == (30.0, "always", None)
    assert (deployed["port"], deployed["address"], deployed["everywhere"]) == (9000, "auto", True)
    assert "waited" not in deployed
    assert "hush" not in result.output + repr(deployed)
    assert "not encrypted" in result.output
    assert "anyone" not in result.output


def test_an_open_door_is_warned_of(deployed):
    """Listening beyond this machine without a token is said loudly."""
    assert "anyone who can reach 0.0.0.0:8000 can use this server" in typed("piqe", "--host", "0.0.0.0").output


def test_an_ipv6_address_has_brackets(deployed):
    """The address that is printed can be used as it is."""
    assert "http://[::1]:8000" in typed("piqe", "--host", "::1").output


def test_a_taken_port_starts_no_ray(monkeypatch):
    """A port that is taken is refused at once, and not after Ray has started."""
    monkeypatch.setattr(server, "local_ray", lambda: pytest.fail("Ray was started"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = typed("piqe", "--port", str(taken.getsockname()[1]))
    assert result.exit_code == 2
    assert "cannot listen at 127.0.0.1" in result.output


def test_bodies_beyond_the_default_memory(deployed):
    """The memory of a front grows with what a body may be, so that the largest is let in."""
    assert typed("piqe", "--max-body-mib", "4096").exit_code == 0
    assert deployed["settings"].limits.max_bytes == 2**32
    assert deployed["settings"].max_inflight_bytes == 2**33


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nique"], "unknown reward 'nique'"),
        (["piqe", "piqe"], "each once"),
        (["piqe", "--replicas", "many"], "--replicas"),
        (["piqe", "--replicas", "0"], "--replicas"),
        (["piqe", "--jpeg", "maybe"], "jpeg"),
        (["piqe", "--port", "65536"], "--port"),
        (["piqe", "--port", "0"], "--port"),
    ],
)
def test_what_is_mistyped(deployed, arguments, message):
    """Exit code 2 and one line that says what was expected; nothing is started."""
    result = typed(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert deployed == {}


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.0.2.1", False), ("judge.example", False)],
)  # fmt: skip
def test_addresses_that_only_this_machine_can_reach(deployed, host, loopback):
    """They need no warning."""
    assert ("warning" in typed("piqe", "--host", host).output) != loopback


def test_the_application_of_a_config_file():
    """`args` of a Serve config build the same application as the command line; a misspelt one is an error."""
    built = from_config({
        "rewards": ["piqe", "ssim"],
        "deployment": {"replicas": 2, "max_batch": 8},
        "settings": {"deadline": 5.0, "limits": {"max_images": 10}},
    })  # fmt: skip
    names = {part._bound_deployment.name for part in built._bound_deployment.init_args}
    assert names == {"reward-piqe", "reward-ssim"}
    assert {part._bound_deployment.num_replicas for part in built._bound_deployment.init_args} == {2}
    rewards = ["piqe", {"name": "ssim", "color": "y"}, {"ssim": 0.7, "psnr": {"weight": 0.3, "range": [10, 50]}}]
    assert list(load_rewards(rewards, 0)) == ["piqe", "ssim(color=y)", "0.7*ssim + 0.3*psnr[10, 50]"]
    assert len(from_config({"rewards": rewards})._bound_deployment.init_args) == 3
    named = load_rewards({"quality": {"name": "lpips", "weights": "/private/file.pth"}}, 0)
    assert (list(named), named["quality"].name) == (["quality"], "lpips(weights=/private/file.pth)")
    for wrong in ({"setting": {}}, {"settings": {"dead_line": 5.0}}, {"deployment": {"replicas": "many"}}):
        with pytest.raises(ValueError, match=r"setting|dead_line|replicas"):
            from_config({"rewards": ["piqe"]} | wrong)
    with pytest.raises(ValueError, match="max_pixels"):
        from_config({
            "rewards": ["piqe"],
            "settings": {"max_inflight_bytes": 2**33, "limits": {"max_bytes": 2**32, "max_pixels": 2**30}},
        })  # fmt: skip
    with pytest.raises(ValueError, match="environment variable"):
        application(load_rewards(["piqe"], 0), Deployment(), Settings(token="in a message"))


@pytest.mark.parametrize(
    ("options", "num_rewards", "room"),
    [
        ({"num_cpus": 1.0}, 2, 2),
        ({"num_cpus": 0.5}, 1, 8),
        ({"num_cpus": 4.0}, 2, None),
        ({"num_gpus": 0.5, "num_cpus": 0.0}, 2, 1),
        ({"num_gpus": 1.0}, 2, None),
        ({"replicas": 3, "num_cpus": 1.0}, 2, None),
        ({"replicas": 2, "num_cpus": 1.0}, 2, 2),
        ({"num_gpus": 0.0, "num_cpus": 0.0}, 3, 8),
    ],
)
def test_room(options, num_rewards, room):
    """On one machine, rewards that do not fit are an error at once and not a wait for ever."""
    available = {"CPU": 4.0, "GPU": 1.0}
    if room is not None:
        assert most_replicas(num_rewards, Deployment(**options), available) == room
        return
    with pytest.raises(ValueError, match="do not fit"):
        most_replicas(num_rewards, Deployment(**options), available)


def test_the_manifest_of_the_documentation():
    """The arguments in the KubeRay manifest build an application, under the name that the front looks for."""
    page = (ROOT / "docs" / "how-to" / "serve-rewards.md").read_text()
    manifest = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    (served,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    assert served["name"] == APP_NAME
    module, _, function = served["import_path"].partition(":")
    assert getattr(importlib.import_module(module), function) is from_config
    built = from_config(served["args"])
    assert [part._bound_deployment.name for part in built._bound_deployment.init_args] == ["reward-qalign"]


def test_a_front_without_its_token_does_not_start(monkeypatch):
    """Where the server was told to ask for a token and finds none, it fails rather than stand open."""
    monkeypatch.delenv("IQAREWARD_TOKEN", raising=False)
    with pytest.raises(RuntimeError, match="IQAREWARD_TOKEN"):
        front({}, {}, Deployment(token_env="IQAREWARD_TOKEN"), Settings())


@pytest.mark.parametrize("text", ["", " \n", "schl\u00fcssel", "a\nb"])
def test_what_is_no_token(deployed, monkeypatch, text):
    """An empty variable does not leave the server open, and a token that no header carries is refused at the start."""
    monkeypatch.setenv("IQAREWARD_TOKEN", text)
    result = typed("piqe")
    assert result.exit_code == 2
    assert "$IQAREWARD_TOKEN expected a token of printable ASCII characters" in " ".join(result.output.split())
    assert not deployed
    with pytest.raises(ValueError, match="expected a token"):
        front({}, {}, Deployment(token_env="IQAREWARD_TOKEN"), Settings())


@pytest.mark.slow
def test_a_run_from_start_to_sigterm():
    """The command serves until SIGTERM, exits with 0 and leaves no process behind."""
    port = free_port()
    command = [
        sys.executable,
        "-c",
        "from iqareward.cli import app; app()",
        "serve",
        "piqe",
        "--port",
        str(port),
        "--replicas",
        "1",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    watchdog = threading.Timer(300, process.kill)  # so that a server that never starts is a failure, not a hang
    watchdog.start()
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any(re.search(rf"piqe: http://127\.0\.0\.1:{port}$", line) for line in lines)
        images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with RemoteReward(f"http://127.0.0.1:{port}", "piqe") as remote:
            assert torch.equal(remote(images), iqareward.load("piqe")(images))
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(120) == 0
        _, alive = psutil.wait_procs(family, timeout=60)
        assert alive == []
    finally:
        watchdog.cancel()
        process.kill()
        process.stderr.close()
