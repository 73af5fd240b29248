"""A real server on Ray and what goes wrong around it: every request is answered once, rightly or with an error."""

import itertools
import os
import pickle
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx2
import psutil
import pytest
import torch
from torch import Tensor

import iqareward
from iqareward.serving.client import RemoteError, RemoteReward
from iqareward.serving.requests import Settings
from iqareward.serving.run import Deployment, deploy, local_ray
from iqareward.serving.wire import Limits, encode_request
from tests.serving.in_process import SAFETENSORS, error_of, free_port
from tests.serving.judges import FAILS, IS_SLOW, Moody, means
from tests.serving.picture_files import encoded
from tests.serving.ray_quietly import ray

TOKEN = "for the tests"
MAX_BYTES = 2**23
LARGE = 700  # side of images above the 4 MiB that Ray takes in a message by default
pytestmark = [
    pytest.mark.slow,
]


class Server(NamedTuple):
    """A running server."""

    url: str
    pids: Path  # a file for each process of the reward `moody`

    def client(self, token: str | None = TOKEN) -> httpx2.Client:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=120)

    def slow_batches(self) -> list[str]:
        """Begins and ends of slow batches, of all processes."""
        return [line for file in self.pids.iterdir() for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """Two rewards, two processes each, one front; and nothing of it left afterwards."""
    folder, port = tmp_path_factory.mktemp("pids"), free_port()
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    deployment = Deployment(replicas=2, num_cpus=0.5, front_replicas=1, token_env="IQAREWARD_TOKEN")
    settings = Settings(limits=Limits(max_bytes=MAX_BYTES), deadline=120.0)
    rewards = {"ssim": iqareward.load("ssim"), "moody": Moody(str(folder))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IQAREWARD_TOKEN", TOKEN)
        with local_ray(num_cpus=2, object_store_memory=200 * 2**20, log_to_driver=False):
            deploy(rewards, deployment, settings, host="127.0.0.1", port=port, everywhere=False)
            yield Server(f"http://127.0.0.1:{port}", folder)
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    _, alive = psutil.wait_procs(left, timeout=60)
    assert alive == []


def flat(values: Tensor, width: int = 8) -> Tensor:
    """Uniform images, so that the mean says which one it was."""
    return values[:, None, None, None].expand(-1, 3, 8, width).contiguous()


def body(value: float = 0.5, width: int = 8, **options) -> bytes:
    return encode_request(flat(torch.tensor([value]), width), rewards=["moody"], **options)


def post(client: httpx2.Client, content: bytes, path: str = "/v1/score", **headers: str) -> httpx2.Response:
    return client.post(path, content=content, headers=SAFETENSORS | headers)


def test_remote_scores_are_local_scores(server):
    """A batch in pieces, then the same images one by one from eight threads: the bits of the local reward."""
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(40, 3, 24, 32, generator=rng)
    references = (images + 0.1 * torch.randn(images.shape, generator=rng)).clamp(0, 1)
    local = iqareward.load("ssim")(images, references=references)
    with RemoteReward(server.url, "ssim", batch_size=16) as remote:
        assert torch.equal(remote(images, references=references), local)
        with ThreadPoolExecutor(8) as threads:
            rows = list(threads.map(lambda i: remote(images[i : i + 1], references=references[i : i + 1]), range(40)))
    assert torch.equal(torch.cat(rows), local)


def test_as_much_of_the_cores_as_other_processes_get(server):
    """Processes of a Ray of our own are not nicer than their parent: beside a trainer they would starve."""
    children = psutil.Process().children(recursive=True)
    workers = {child.name(): child.nice() for child in children if child.name().startswith("ray::")}
    assert len(workers) >= 2
    assert set(workers.values()) == {psutil.Process().nice()}


def test_token(server):
    """No token, a wrong one and a right one, in headers and in a URL."""
    for token in (None, "wrong"):
        with server.client(token) as client:
            assert error_of(post(client, body())) == (401, "unauthorized")
    with server.client() as client:
        assert post(client, body()).json()["scores"] == {"moody": [0.5]}
        assert client.get("/healthz").json()["rewards"] == {"ssim": "ok", "moody": "ok"}
    url = server.url.replace("http://", f"http://anyone:{TOKEN.replace(' ', '%20')}@")
    files = {"images": encoded(), "references": encoded()}
    response = httpx2.post(f"{url}/v1/score", files=files, data={"reward": "ssim"}, timeout=120)
    assert response.json()["scores"] == {"ssim": [1.0]}


def test_bad_bodies(server):
    """Oversize and malformed bodies get their errors through the real proxy, and the server lives on."""
    with server.client() as client:
        assert error_of(post(client, b"x" * (MAX_BYTES + 1))) == (413, "body_too_large")
        assert error_of(post(client, b"x" * MAX_BYTES)) == (400, "malformed_body")
        assert error_of(post(client, b"")) == (400, "malformed_body")
        assert error_of(client.post("/v1/score", content=iter([b"x"]), headers=SAFETENSORS)) == (411, "length_required")
        assert error_of(post(client, pickle.dumps({"images": [encoded()]}))) == (400, "malformed_body")
        assert post(client, body()).status_code == 200


def test_poisoned_images_in_a_batch(server):
    """Among images that arrive together, NaN costs one its score and a failure one its answer; nothing else changes."""
    values = torch.linspace(0.1, 0.9, 24)
    bodies = [body(value.item()) for value in values]
    bodies[5] = body(0.5, FAILS)
    bodies[9] = encode_request(flat(torch.tensor([torch.nan])), rewards=["moody"])
    with server.client() as client, ThreadPoolExecutor(24) as threads:
        responses = list(threads.map(lambda content: post(client, content), bodies))
    assert error_of(responses.pop(5)) == (500, "reward_failed")
    assert responses.pop(8).json()["scores"]["moody"] == [None]
    expected = [mean.item() for index, mean in enumerate(flat(values).mean((1, 2, 3))) if index not in (5, 9)]
    assert [response.json()["scores"]["moody"][0] for response in responses] == expected


def test_slow_reward_meets_its_deadline(server):
    """The client's deadline is kept while the reward is still busy, and the next request is served."""
    with server.client() as client:
        before = server.slow_batches().count("end")
        assert error_of(post(client, body(width=IS_SLOW, deadline=0.4))) == (504, "deadline_exceeded")
        assert server.slow_batches().count("end") == before
        assert post(client, body(0.25)).json()["scores"]["moody"] == [0.25]


@pytest.mark.parametrize("sent", ["half of the body", "all of it"])
def test_client_that_dies(server, sent):
    """A client that is killed while it sends, or while it waits, leaves nothing behind that holds up others."""
    content = body(width=IS_SLOW)
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += f"Content-Type: {SAFETENSORS['content-type']}\r\nContent-Length: {len(content)}\r\n\r\n"
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    before = server.slow_batches().count("begin")
    for _ in range(8):
        with socket.create_connection(address) as connection:
            connection.sendall(head.encode() + (content if sent == "all of it" else content[: len(content) // 2]))
            time.sleep(0.1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closes with a reset
    with server.client() as client:
        assert post(client, body(0.75)).json()["scores"]["moody"] == [0.75]
    # of the eight slow batches, those that nobody waits for are not run
    assert server.slow_batches().count("begin") - before < 8


def load(remote: RemoteReward, threads: int, go_on: Callable[[int], bool]) -> Counter[str]:
    """Threads score images one by one for as long as `go_on(number answered)` says so; what became of the images.

    Every fourth image is a large one.
    """
    values = torch.linspace(0.05, 0.95, 400)
    outcomes: Counter[str] = Counter()
    indices, lock, stop = itertools.cycle(range(400)), threading.Lock(), threading.Event()
    give_up = time.monotonic() + 600

    def work() -> None:
        while not stop.is_set():
            with lock:
                index = next(indices)
            image = flat(values[index : index + 1])
            if index % 4 == 0:
                image = values[index].expand(1, 3, LARGE, LARGE).contiguous()
            try:
                outcome = "right" if torch.equal(remote(image), means(image)) else "wrong"
            except RemoteError as error:
                outcome = f"error {error.status}"
            with lock:
                outcomes[outcome] += 1
                if not go_on(outcomes.total()) or time.monotonic() > give_up:
                    stop.set()

    with ThreadPoolExecutor(threads) as pool:
        for thread in [pool.submit(work) for _ in range(threads)]:
            thread.result()
    return outcomes


def test_process_killed_under_load(server):
    """While 16 threads score 2000 images, 500 of them of 6 MB, both processes are killed: each gets its own score."""
    known = {int(file.name) for file in server.pids.iterdir()}
    victims = [pid for pid in known if psutil.pid_exists(pid)]
    killed_at: list[int] = []

    def kill(answered: int) -> bool:
        # the second when the first has been replaced: with none left for long, requests would rightly fail
        replaced = any(int(file.name) not in known for file in server.pids.iterdir())
        if len(killed_at) < 2 and (replaced if killed_at else answered >= 200):
            os.kill(victims[len(killed_at)], signal.SIGKILL)
            killed_at.append(answered)
        return len(killed_at) < 2 or answered < max(2000, killed_at[-1] + 500)

    with RemoteReward(server.url, "moody", max_in_flight=16, timeout=300) as remote:
        outcomes = load(remote, 16, kill)
    assert outcomes == {"right": outcomes.total()}
    assert outcomes.total() >= 2000
    assert len(killed_at) == len(victims) == 2
    assert not any(psutil.pid_exists(pid) for pid in victims)
    until = time.monotonic() + 120
    while (status := ray.serve.status().applications["iqareward"].status) != "RUNNING" and time.monotonic() < until:
        time.sleep(0.5)
    assert status == "RUNNING"


def test_every_process_sleeps(server):
    """All processes of a reward give their device back, also one that is started meanwhile, and all take it again."""

    def last(pid: int) -> str:
        return (server.pids / str(pid)).read_text().splitlines()[-1]

    def asleep() -> bool:
        try:
            return remote(image).item() != 0.5
        except RemoteError as error:
            return error.code == "asleep"

    image = flat(torch.tensor([0.5]))
    until = time.monotonic() + 240
    while len(awake := alive(server)) != 2 or running() != 2:  # a test before may have killed one
        assert time.monotonic() < until
        time.sleep(0.1)
    with RemoteReward(server.url, "moody") as remote:
        remote.offload()
        assert [last(pid) for pid in awake] == ["offloaded"] * 2
        assert all(asleep() for _ in range(20))
        os.kill(awake[0], signal.SIGKILL)
        until = time.monotonic() + 240
        for number in (1, 2):  # until it is missed, and until it is replaced
            while running() != number:
                assert time.monotonic() < until
                time.sleep(0.1)
        assert all(asleep() for _ in range(20))
        with server.client() as client:
            assert client.get("/v1/rewards").json()["rewards"]["moody"]["asleep"]
            assert client.get("/healthz").json()["rewards"] == {"ssim": "ok", "moody": "asleep"}
        remote.onload()
        assert [last(pid) for pid in alive(server)] == ["loaded"] * 2
        assert not any(asleep() for _ in range(20))


def alive(server) -> list[int]:
    """The processes of `moody` that exist."""
    return [pid for file in server.pids.iterdir() if psutil.pid_exists(pid := int(file.name))]


def running() -> int:
    """How many processes of `moody` run, as Ray Serve sees it."""
    details = ray.serve.status().applications["iqareward"].deployments["reward-moody"]
    return details.replica_states.get("RUNNING", 0)


def test_front_killed_under_load(server):
    """The process that speaks HTTP is killed: it comes back, and a client loses nothing."""
    (front,) = [child for child in psutil.Process().children(recursive=True) if ":front" in " ".join(child.cmdline())]

    def kill(answered: int) -> bool:
        if answered == 100:
            front.kill()
        return answered < 400

    with RemoteReward(server.url, "moody", max_in_flight=8, timeout=300) as remote:
        outcomes = load(remote, 8, kill)
    assert outcomes == {"right": outcomes.total()}
    assert not front.is_running()


def test_metrics(server):
    """Ray's figures of the node, with ours among them, through the same port and behind the same token."""
    until = time.monotonic() + 120
    with server.client() as client:
        while "iqareward_images" not in (text := client.get("/metrics").text) and time.monotonic() < until:
            time.sleep(0.5)
    assert 'reward="moody"' in text
    assert "iqareward_batch_size_bucket" in text
