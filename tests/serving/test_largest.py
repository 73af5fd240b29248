"""The largest requests that `/v1/rewards` allows, in both forms, and through a real Ray in each of its forms."""

from collections.abc import Iterator

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from iqareward.serving.client import RemoteError, RemoteReward
from iqareward.serving.requests import Settings
from iqareward.serving.run import Deployment, deploy, local_ray
from iqareward.serving.wire import Limits, decode_answer, encode_request
from tests.serving.in_process import SAFETENSORS, error_of, free_port
from tests.serving.judges import Corner
from tests.serving.picture_files import encoded
from tests.serving.ray_quietly import ray

pytestmark = pytest.mark.slow

SIDE = 512
PIXEL_BYTES = 3 * SIDE * SIDE
FORMS = {
    "one machine": (False, "1"),
    "behind proxies": (True, "1"),
    "behind proxies, through Ray's object store": (True, "0"),
}


@pytest.fixture(scope="module", params=FORMS)
def url(request) -> Iterator[str]:
    """A server with the limits of `iqareward serve`."""
    everywhere, grpc = FORMS[request.param]
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_SERVE_USE_GRPC_BY_DEFAULT", grpc)
        with local_ray(num_cpus=2, object_store_memory=200 * 2**20, log_to_driver=False):
            deploy(
                {"corner": Corner()},
                Deployment(replicas=1, num_cpus=0.5, front_replicas=1),
                Settings(),
                host="127.0.0.1",
                port=port,
                everywhere=everywhere,
            )
            assert ray.is_initialized()
            yield f"http://127.0.0.1:{port}"


# Proxies pass bodies on unread, and rewards get the same call from a form.
on_one_machine = pytest.mark.parametrize("url", ["one machine"], indirect=True)


def levels(count: int) -> Tensor:
    """A value of uint8 for each image."""
    return torch.arange(count) % 251 + 1


def pixels(count: int) -> Tensor:
    """Uniform images of 512 x 512 that differ from each other, as uint8."""
    return levels(count).to(torch.uint8)[:, None, None, None].expand(-1, 3, SIDE, SIDE).contiguous()


def files(count: int) -> list[bytes]:
    """The same as PNG files that are as large as their pixels."""
    return [
        encoded(Image.fromarray(np.full((SIDE, SIDE, 3), level, np.uint8)), compress_level=0)
        for level in levels(count).tolist()
    ]


def expected(count: int) -> Tensor:
    return levels(count).float() / 255


def fitting(overhead: int, *, per_image: int = PIXEL_BYTES) -> int:
    """How many images fit into the largest body."""
    return (Limits().max_bytes - overhead) // per_image


def test_safetensors(url):
    """As many images as fit into one body."""
    count = fitting(10_000)
    content = encode_request(pixels(count), rewards=["corner"])
    assert len(content) > 0.99 * Limits().max_bytes
    response = httpx2.post(f"{url}/v1/score", content=content, headers=SAFETENSORS, timeout=300)
    assert response.status_code == 200, response.text
    assert torch.equal(decode_answer(response.content).scores["corner"], expected(count))


@pytest.mark.parametrize("side", [1200, 2560, 4720])
def test_one_image(url, side):
    """A single float32 image cannot be split; the largest takes a body of its own."""
    image = torch.full((1, 3, side, side), 0.3)
    image[0, :, -1, -1] = 0.7
    with RemoteReward(url, "corner", timeout=300) as remote:
        assert remote(image).tolist() == [image[0, 0, -1, -1].item()]


def test_more_than_one_body(url):
    """A batch above the limit is sent in several requests."""
    image = torch.rand(3, 1500, 1500, generator=torch.Generator().manual_seed(0))
    images = [image + index for index in range(12)]  # 27 MB each, as float32
    with RemoteReward(url, "corner", timeout=300) as remote:
        assert torch.equal(remote(images), torch.stack([row[0, -1, -1] for row in images]))


def test_an_image_that_no_body_holds(url):
    """The error says that it is too large, and not that the server is gone."""
    image = torch.full((3, 4800, 4800), 0.3)
    with RemoteReward(url, "corner", timeout=300) as remote, pytest.raises(RemoteError) as caught:
        remote([image])
    assert (caught.value.status, caught.value.code) == (413, "body_too_large")


@pytest.mark.parametrize("url", ["behind proxies"], indirect=True)
def test_errors_and_health_through_the_proxies(url):
    """The same errors as without, and Ray's own health check, which load balancers of clusters ask."""
    with httpx2.Client(base_url=url, timeout=120) as client:
        content = encode_request(torch.rand(1, 3, 8, 8), rewards=["ssim"])
        assert error_of(client.post("/v1/score", content=content, headers=SAFETENSORS)) == (404, "unknown_reward")
        assert client.get("/-/healthz").status_code == 200
    assert ray.serve.status().proxies


@on_one_machine
def test_form(url):
    """PNG files in a form, as curl sends them."""
    content = files(fitting(200_000, per_image=PIXEL_BYTES + 1300))
    parts = [("images", (f"{index}.png", file)) for index, file in enumerate(content)]
    response = httpx2.post(f"{url}/v1/score", files=parts, data={"reward": "corner"}, timeout=300)
    assert response.status_code == 200, response.text
    assert torch.equal(decode_answer(response.content).scores["corner"], expected(len(content)))


def test_pictures_that_grow(url):
    """Small files whose pixels fill the limit are scored; with more pixels they are refused."""
    black = encoded(Image.new("RGB", (4096, 4096)))  # 48 MiB
    for count, status in ((5, 200), (6, 413)):
        parts = [("images", (f"{index}.png", black)) for index in range(count)]
        response = httpx2.post(f"{url}/v1/score", files=parts, data={"reward": "corner"}, timeout=300)
        assert response.status_code == status, response.text
    assert error_of(response) == (413, "too_many_pixels")
