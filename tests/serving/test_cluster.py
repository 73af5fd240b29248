"""The reward server on a real Ray cluster of two nodes on this machine, which loses one of them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
import torch
import yaml

import iqareward
from benchmarks.bench_cluster import node_lost, rolling_restart, two_nodes, wait_until
from iqareward.serving.client import RemoteReward
from tests.serving import ray_quietly  # noqa: F401  # imports Ray without its warnings
from tests.serving.in_process import free_port

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "for the tests"
pytestmark = pytest.mark.slow


class Nodes(NamedTuple):
    """Two nodes, the port of their proxies, and that of the dashboard, which takes what KubeRay sends."""

    cluster: Any
    port: int
    dashboard: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """For all tests: each deploys its own version of the application."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IQAREWARD_TOKEN", TOKEN)
        port, dashboard = free_port(), free_port()
        with two_nodes(dashboard) as cluster:
            yield Nodes(cluster, port, dashboard)


def serve_ssim(nodes: Nodes, *options: str) -> subprocess.CompletedProcess[str]:
    """What somebody types, on a machine of the cluster."""
    command = [sys.executable, "-c", "from iqareward.cli import app; app()", "serve", "ssim"]
    command += ["--address", nodes.cluster.address, "--num-cpus", "0.25", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ, timeout=300, check=False)


def scores_are_local(url: str) -> bool:
    """Whether a batch that is split among the processes has the bits of the local reward."""
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(40, 3, 24, 32, generator=rng)
    references = (images + 0.1 * torch.randn(images.shape, generator=rng)).clamp(0, 1)
    with RemoteReward(url, "ssim", batch_size=4) as remote:
        return torch.equal(remote(images, references=references), iqareward.load("ssim")(images, references=references))


def test_the_command(nodes):
    """It deploys to the cluster and returns; what does not fit, and proxies that listen elsewhere, are errors."""
    port = ("--port", str(nodes.port))
    done = serve_ssim(nodes, *port, "--replicas", "2")
    assert done.returncode == 0, done.stderr
    assert f"ssim: {nodes.url}\n" in done.stderr
    assert scores_are_local(nodes.url)
    full = serve_ssim(nodes, *port, "--replicas", "1", "--num-cpus", "3", "--start-timeout", "15")
    assert full.returncode == 2
    said = " ".join(full.stderr.split())
    assert "1 of ssim" in said
    assert "Each takes 3 CPU of one node; 0 of 2 nodes have as much" in said
    elsewhere = serve_ssim(nodes, "--port", str(free_port()))
    assert elsewhere.returncode == 2
    assert "Ray Serve runs on this cluster already" in elsewhere.stderr


def test_the_manifest(nodes):
    """The `serveConfigV2` of the documentation, sent as KubeRay sends it; the nodes here have no real GPU."""
    page = (ROOT / "docs" / "how-to" / "serve-rewards.md").read_text()
    manifest = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    (served,) = config["applications"]
    served["args"]["rewards"] = ["ssim"]
    served["args"]["deployment"] |= {"num_gpus": 0, "num_cpus": 0.25}
    config["http_options"]["port"] = nodes.port
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    # a local Ray of an earlier test has turned on Ray's own tokens for this process, and with it for its clusters
    headers = get_auth_headers_if_auth_enabled({})
    with httpx2.Client(base_url=f"http://127.0.0.1:{nodes.dashboard}", timeout=120, headers=headers) as dashboard:
        answer = dashboard.put("/api/serve/applications/", json=config)
        assert answer.status_code == 200, answer.text

        def state() -> str:
            application = dashboard.get("/api/serve/applications/").json()["applications"]["iqareward"]
            assert application["status"] != "DEPLOY_FAILED", application["message"]
            return application["status"]

        wait_until(lambda: state() == "RUNNING")
    assert httpx2.post(f"{nodes.url}/v1/score", timeout=60).status_code == 401
    assert scores_are_local(nodes.url)


def test_a_node_is_lost_under_load(nodes, tmp_path):
    """Clients on connections to both nodes get all their scores, and a node that joins takes its share."""
    found = node_lost(nodes.cluster, nodes.port, tmp_path, replicas=2, images=100)
    assert (found["lost"], found["wrong"], found["nodes"]) == (0, 0, 2)
    assert found["sent"] >= 300


def test_a_new_version_under_load(nodes, tmp_path):
    """Every answer is that of the old version or of the new one."""
    found = rolling_restart(nodes.port, tmp_path, replicas=1, images=100)
    assert (found["lost"], found["wrong"]) == (0, 0)
    assert min(found["by_version"].values()) > 0
