"""The server as a cluster runs it, behind Ray's proxies, on a cluster of one node."""

import httpx2
import pytest
import torch

import iqareward
from iqareward.rewards.remote import RemoteReward
from iqareward.rewards.wire import encode_request
from iqareward.serving.application import Deployment
from iqareward.serving.run import deploy, local_ray
from iqareward.serving.settings import Settings
from tests.serving.in_process import SAFETENSORS, error_of, free_port
from tests.serving.ray_quietly import ray

pytestmark = pytest.mark.slow


def test_scores_and_errors_through_the_proxies():
    """The same bits as here, the same errors, and Ray's own health check, which load balancers of clusters ask."""
    port = free_port()
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with local_ray(num_cpus=2, object_store_memory=200 * 2**20, log_to_driver=False):
        deploy(
            {"piqe": iqareward.load("piqe")},
            Deployment(replicas=1, num_cpus=0.5),
            Settings(deadline=120.0),
            host="127.0.0.1",
            port=port,
            everywhere=True,
        )
        url = f"http://127.0.0.1:{port}"
        with RemoteReward(url, "piqe", batch_size=2) as remote:
            assert torch.equal(remote(images), iqareward.load("piqe")(images))
        with httpx2.Client(base_url=url, timeout=120) as client:
            content = encode_request(images, rewards=["ssim"])
            assert error_of(client.post("/v1/score", content=content, headers=SAFETENSORS)) == (404, "unknown_reward")
            assert client.get("/-/healthz").status_code == 200
        assert ray.serve.status().proxies
