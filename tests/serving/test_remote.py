"""A remote reward is the local one, bit for bit, and every way in which a server can fail ends in a clear error."""

import asyncio
import json
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import iqareward
from iqareward.rewards.core import ImageReward, UnscoredWarning
from iqareward.serving import wire
from iqareward.serving.client import TOKEN_VARIABLE, RemoteError, RemoteFacts, RemoteReward
from tests.rewards.counting import Brightness, Together, flat
from tests.rewards.http_double import Double, drops, says, slow, unused_url
from tests.tolerances import EXACT

FREE = RemoteFacts(needs_references=False, needs_prompts=False, bounds=(0.0, 1.0))
BUSY = wire.encode_error("busy", "try again later")


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


class ToInput(ImageReward):
    """How far the mean of an image is from that of its degraded input."""

    name, bounds, needs_inputs = "to_input", (-1.0, 0.0), True

    def score_batch(self, images: Tensor, *, inputs: Tensor) -> Tensor:
        return -(images.mean((1, 2, 3)) - inputs.mean((1, 2, 3))).abs()


def remote(urls: Any, **options: Any) -> RemoteReward:
    return RemoteReward(urls, "brightness", **{"facts": FREE, "timeout": 20.0} | options)


@pytest.mark.parametrize("name", ["ssim", "piqe", "0.7*haarpsi + 0.3*psnr[10, 50]"])
def test_keeps_the_contract(name: str, photographs: Tensor, degraded_photographs: Tensor) -> None:
    """`check_reward` finds nothing wrong with a reward that is somewhere else."""
    with Double([iqareward.load(name)]) as double, RemoteReward(double.url, name) as reward:
        iqareward.check_reward(reward, degraded_photographs, photographs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_bit_identical(dtype: torch.dtype, photographs: Tensor) -> None:
    """Photographs (which travel as bytes), noise (which does not), mixed sizes and chunks score as they do here."""
    local = iqareward.load("ssim")
    rng = torch.Generator().manual_seed(0)
    noisy = photographs + 0.02 * torch.randn(photographs.shape, generator=rng)
    images = [*photographs.to(dtype), *noisy.to(dtype), noisy[0, :, :100].to(dtype)]
    references = [image.flip(-1) for image in images]
    with Double([local]) as double, RemoteReward(double.url, "ssim", batch_size=4) as reward:
        for batch in ((images, references), (noisy.to(dtype), noisy.flip(-1).to(dtype))):
            torch.testing.assert_close(reward(*batch), local(*batch), **EXACT)
        if dtype == torch.float32:
            assert min(double.sizes) < 2 * 4 * 3 * 192 * 192 + 2000 < max(double.sizes)


def test_images_references_and_prompts_stay_together() -> None:
    """Chunks that finish in any order keep each row's columns and the order of the rows."""
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    prompts = [str(i) for i in range(50)]
    script = [slow(0.1), slow(0.05), slow(0.01)]
    with Double([Together()], script=script) as double, RemoteReward(double.url, "together", batch_size=7) as reward:
        images = flat(*values.tolist())
        scores = reward(images, references=1 - images, prompts=prompts)
        again = asyncio.run(reward.ascore(images, references=1 - images, prompts=prompts))
    expected = values + 10 * (1 - values) + 100 * torch.arange(50.0)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(again, scores, **EXACT)


def test_facts_are_asked_once_and_travel_in_a_pickle() -> None:
    """Nothing is sent before a fact is needed; then one request serves the object and its copies."""
    with Double([Together()]) as double:
        reward = RemoteReward(double.url, "together")
        assert double.connections == 0
        assert (reward.needs_references, reward.needs_prompts, reward.bounds) == (True, True, (None, None))
        reward.close()
        double.facts_body = b"{}"
        copy = pickle.loads(pickle.dumps(reward))
        assert copy.needs_prompts
        with pytest.raises(ValueError, match="references"):
            copy(flat(0.5), prompts=["1"])


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{}", b'{"rewards": 3}', b'{"rewards": {"brightness": {}}}',
        b'{"rewards": {"brightness": {"needs_references": false, "needs_prompts": false, "bounds": [1]}}}',
        b'{"rewards": {"brightness": {"needs_references": false, "needs_prompts": false, "bounds": ["a", {}]}}}',
    ],
)  # fmt: skip
def test_facts_that_make_no_sense_are_an_error(body: bytes) -> None:
    """A server that is none of ours is noticed before anything is scored."""
    with Double([Brightness()]) as double, remote(double.url, facts=None) as reward:
        double.facts_body = body
        with pytest.raises(RemoteError) as caught:
            reward(flat(0.5))
        assert caught.value.code == "malformed_answer"


def test_an_unknown_reward_is_named() -> None:
    """A name that the server does not have is an error that lists what it has, whatever the policy."""
    with Double([Together()]) as double, remote(double.url, facts=None, on_error="nan") as reward:
        with pytest.raises(RemoteError, match="together") as caught:
            reward(flat(0.5))
        assert (caught.value.code, caught.value.status) == ("unknown_reward", 404)


FAULTS: dict[str, list[Any]] = {
    "429": [says(429, BUSY, Retry_After="0")] * 5,
    "503": [says(503, BUSY)] * 2,
    "502 of a proxy": [says(502, b"<html>bad gateway</html>")],
    "500 of a proxy": [says(500, b"Internal Server Error")],
    "dropped": [drops, drops],
    "cut short": [says(200, b'{"scores"', Content_Length="1000", Connection="close")],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_pass_is_tried_again(fault: str) -> None:
    """A busy server and a lost request end in the right score."""
    with Double([Brightness()], script=FAULTS[fault]) as double, remote(double.url, timeout=60) as reward:
        torch.testing.assert_close(reward(flat(0.25, 0.5)), torch.tensor([0.25, 0.5]), **EXACT)
        assert not double.script
        assert len(double.sizes) == len(FAULTS[fault]) + 1


PERMANENT: dict[str, tuple[Any, str]] = {
    "malformed": (says(200, b"not json"), "malformed_answer"),
    "not scores": (says(200, b'{"scores": {"brightness": ["0.5"]}}'), "malformed_answer"),
    "wrong count": (says(200, b'{"scores": {"brightness": [0.5, 0.5]}}'), "malformed_answer"),
    "another reward": (says(200, b'{"scores": {"ssim": [0.5]}}'), "malformed_answer"),
    "garbled encoding": (says(200, b"plain", Content_Encoding="gzip"), "malformed_answer"),
    "reward failed": (says(500, wire.encode_error("reward_failed", "boom")), "reward_failed"),
    "refused": (says(422, wire.encode_error("refused_by_reward", "no", 0)), "refused_by_reward"),
    "too large": (says(413, wire.encode_error("too_many_pixels", "no", 0)), "too_many_pixels"),
    "redirected": (says(302, b"", Location="http://127.0.0.1:1/"), "http_302"),
    "nested": (says(400, b'{"error":' * 50_000), "http_400"),
}


@pytest.mark.parametrize("fault", PERMANENT)
def test_what_cannot_pass_is_not_tried_again(fault: str) -> None:
    """An answer that would come again is an error after one request, or NaN with a warning by policy."""
    step, code = PERMANENT[fault]
    with Double([Brightness()], script=[step, step]) as double:
        with remote(double.url) as reward, pytest.raises(RemoteError) as caught:
            reward(flat(0.5))
        assert caught.value.code == code
        assert pickle.loads(pickle.dumps(caught.value)).code == code
        assert len(double.sizes) == 1
        with remote(double.url, on_error="nan") as reward, pytest.warns(RuntimeWarning, match=code):
            assert reward(flat(0.5)).isnan().all()


def test_nan_by_policy_touches_only_the_chunk() -> None:
    """With `on_error="nan"`, images of other requests keep their scores."""
    failing = says(500, wire.encode_error("reward_failed", "boom"))
    options = {"on_error": "nan", "batch_size": 2, "max_in_flight": 1}
    with (
        Double([Brightness()], script=[Double.score, failing]) as double,
        remote(double.url, **options) as reward,
        pytest.warns(RuntimeWarning, match="2 of 5 images are not scored"),
    ):
        scores = reward(flat(0.125, 0.25, 0.5, 0.75 - 0.125, 0.875))
    assert scores.isnan().tolist() == [False, False, True, True, False]


def test_a_request_that_is_too_large_is_halved() -> None:
    """A server's limit on images is found by halving; every image is scored once."""
    limits = wire.Limits(max_images=3)

    def limited(double: Double, body: bytes) -> Any:
        try:
            wire.decode_request(body, limits)
        except wire.WireError as error:
            return error.status, wire.encode_error(error.code, error.message), {}
        return double.score(body)

    values = [i / 16 for i in range(11)]
    with Double([Brightness()], script=[limited] * 50) as double, remote(double.url) as reward:
        torch.testing.assert_close(reward(flat(*values)), torch.tensor(values), **EXACT)
        assert sum(len(request.images) for request in double.requests) == 11


def test_large_images_travel_in_small_requests() -> None:
    """Bytes bound a request as well as images do, so that no server needs to refuse it first."""
    values = torch.arange(11) / 100 + 0.001  # no v / 255, which would travel as one byte each
    images = values[:, None, None, None].expand(-1, 3, 1000, 1000).contiguous()  # 12 MB each
    mixed = [*images[:4], images[4, :, :10], *images[5:]]
    with Double([Brightness()]) as double, remote(double.url) as reward:
        for batch in (images, mixed):
            torch.testing.assert_close(reward(batch), torch.stack([image.mean() for image in batch]))
        assert max(double.sizes) < 65 * 2**20
        assert len(double.sizes) == 5


def test_inputs_travel_with_their_images(degraded_photographs: Tensor, photographs: Tensor) -> None:
    """A reward of the degraded image that was restored gets it, smaller than the image, in pieces and in a list."""
    images, inputs = degraded_photographs, photographs[..., ::2, ::2]
    local = ToInput()
    with Double([local]) as double, RemoteReward(double.url, "to_input", batch_size=3) as reward:
        assert reward.needs_inputs
        for sent in (inputs, [*inputs]):
            torch.testing.assert_close(reward(images, inputs=sent), local(images, inputs=sent), **EXACT)
        with pytest.raises(ValueError, match="inputs"):
            reward(images)


def test_the_deadline_is_total() -> None:
    """Slow answers, busy answers and queues all end by `timeout`, with the last failure in the message."""
    for script in ([slow(60)], [says(429, BUSY, Retry_After="60")] * 9, [slow(6)] * 40):
        with Double([Brightness()], script=script) as double:
            options = {"timeout": 0.5, "batch_size": 1, "max_in_flight": 2}
            with remote(double.url, **options) as reward:
                start = time.monotonic()
                with pytest.raises(RemoteError) as caught:
                    reward(flat(*[0.5] * 20))
                assert time.monotonic() - start < 50  # a minute and more without a deadline
                assert caught.value.code in ("deadline_exceeded", "busy")
            assert all(request.deadline and request.deadline <= 0.5 for request in double.requests)


def test_nobody_listens() -> None:
    """A dead address is tried again until the timeout, and then an error that says so."""
    with remote(unused_url(), timeout=1.0) as reward, pytest.raises(RemoteError, match="unreachable"):
        reward(flat(0.5))


def test_a_server_that_restarts_is_waited_for() -> None:
    """A lone server that is gone for a while, as while it restarts, costs time and no scores."""
    url = unused_url()
    doubles: list[Double] = []

    def restart() -> None:
        doubles.append(Double([Brightness()], port=int(url.rpartition(":")[2])).__enter__())

    with remote(url, timeout=60) as reward:
        later = threading.Timer(2.0, restart)
        later.start()
        assert reward(flat(0.5)).tolist() == [0.5]
    later.join()
    doubles[0].__exit__(None, None, None)


def test_failover() -> None:
    """With one of three servers dead and one that drops everything, all scores are right."""
    with Double([Brightness()], script=[drops] * 50) as bad, Double([Brightness()]) as good:
        with remote([unused_url(), bad.url, good.url], batch_size=1) as reward:
            values = [i / 64 for i in range(40)]
            torch.testing.assert_close(reward(flat(*values)), torch.tensor(values), **EXACT)
        assert len(bad.sizes) < 40  # it rests after a failure


def test_concurrency_is_bounded_and_connections_are_kept() -> None:
    """Threads and coroutines share `max_in_flight`, and a second round opens no new connection."""
    with Double([Brightness(seconds=0.02)]) as double, remote(double.url, batch_size=1, max_in_flight=3) as reward:

        def call(value: float) -> list[float]:
            return reward(flat(value, value)).tolist()

        with ThreadPoolExecutor(8) as pool:
            for _ in range(2):
                assert list(pool.map(call, [0.5] * 8)) == [[0.5, 0.5]] * 8
        assert double.most_inside <= 3
        assert double.connections <= 3
        assert len(double.sizes) == 32


def test_cancelling_frees_the_slot() -> None:
    """A coroutine that is cancelled gives its place back, and the next one is served."""

    async def scenario(reward: RemoteReward) -> list[float]:
        task = asyncio.create_task(reward.ascore(flat(0.25)))
        while not double.sizes:  # until the request is under way
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return (await reward.ascore(flat(0.5))).tolist()

    with Double([Brightness()], script=[slow(60)]) as double, remote(double.url, max_in_flight=1) as reward:
        start = time.monotonic()
        assert asyncio.run(scenario(reward)) == [0.5]
        assert time.monotonic() - start < 30  # far from both: the machine may be busy


@pytest.mark.parametrize("text", ["", "\n", "schl\u00fcssel", "a\x07b"])
def test_what_is_no_token(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A variable that is empty, or holds what no header carries, is an error where the reward is made."""
    monkeypatch.setenv(TOKEN_VARIABLE, text)
    with pytest.raises(ValueError, match=f"{TOKEN_VARIABLE} expected a token of printable ASCII"):
        RemoteReward("http://127.0.0.1:1", "r")


def test_the_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the token the server refuses, whatever the policy; with it all is well; no pickle or repr holds it."""
    with Double([Brightness()], token="s3cret") as double:
        with remote(double.url, on_error="nan") as reward, pytest.raises(RemoteError, match="unauthorized"):
            reward(flat(0.5))
        monkeypatch.setenv(TOKEN_VARIABLE, "s3cret\n")
        with remote(double.url) as reward:
            assert reward(flat(0.5)).tolist() == [0.5]
            assert b"s3cret" not in pickle.dumps(reward)
            assert "s3cret" not in repr(vars(reward))


def in_child(reward: RemoteReward, results: Any) -> None:
    torch.set_num_threads(1)
    results.put(reward(flat(0.125, 0.25)).tolist())
    reward.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # the point of the test
def test_works_in_worker_processes(method: str) -> None:
    """A child opens its own connections, after a fork too."""
    context = multiprocessing.get_context(method)
    with Double([Brightness()]) as double, remote(double.url) as reward:
        assert reward(flat(0.5)).tolist() == [0.5]
        results = context.Queue()
        child = context.Process(target=in_child, args=(reward, results))
        child.start()
        assert results.get(timeout=300) == [0.125, 0.25]
        child.join(60)
        assert child.exitcode == 0
        assert reward(flat(0.5)).tolist() == [0.5]


def test_offload_reaches_every_server() -> None:
    """Each of several servers sleeps and wakes, whichever would have been asked next; no thread is left."""
    reward = Brightness()
    reward.name = "vlm(org/model) + 1"
    path = "/v1/rewards/vlm%28org%2Fmodel%29%20%2B%201"
    with Double([reward]) as one, Double([reward]) as two:
        with RemoteReward([one.url, two.url], reward.name, facts=FREE) as far:
            far.offload()
            far.onload()
            assert one.rests == two.rests == [f"{path}/sleep", f"{path}/wake"]
        assert not [thread for thread in threading.enumerate() if thread.name == "iqareward-http"]
        asleep = says(409, wire.encode_error("asleep", "wake it"))
        one.script = [asleep] * 2
        with remote(one.url, on_error="nan") as far, pytest.raises(RemoteError, match="wake it"):
            far(flat(0.5))
        assert len(one.sizes) == 1
    with remote(unused_url(), timeout=1.0) as far, pytest.raises(RemoteError, match="unreachable"):
        far.offload()


def test_nothing_is_left_behind() -> None:
    """Closing ends the thread; a call after that opens a new connection; forgetting to close does not hang at exit."""

    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "iqareward-http"]

    with Double([Brightness()]) as double:
        reward = remote(double.url)
        reward(flat(0.5))
        assert len(threads()) == 1
        reward.close()
        assert not threads()
        assert reward(flat(0.5)).tolist() == [0.5]
        reward.close()
        script = (
            "from iqareward.serving.client import RemoteFacts, RemoteReward\n"
            "from tests.rewards.counting import flat\n"
            f"reward = RemoteReward({double.url!r}, 'brightness', facts=RemoteFacts(False, False, (None, None)))\n"
            "print(reward(flat(0.5)).item())"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.5\n", "")


def test_the_interpreter_exits_during_a_call() -> None:
    """A process ends at once although a daemon thread waits for an answer; the thread is not woken for it."""
    with Double([Brightness()], script=[slow(60)]) as double:
        script = (
            "import os, threading\n"
            "from iqareward.serving.client import RemoteFacts, RemoteReward\n"
            "from tests.rewards.counting import flat\n"
            f"reward = RemoteReward({double.url!r}, 'brightness', facts=RemoteFacts(False, False, (None, None)))\n"
            "def call():\n"
            "    try:\n"
            "        reward(flat(0.5))\n"
            "    finally:\n"
            "        os.write(1, b'woken')\n"
            "threading.Thread(target=call, daemon=True).start()\n"
            "input()"
        )
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with subprocess.Popen([sys.executable, "-c", script], text=True, **pipes) as process:
            while not double.sizes and process.poll() is None:
                time.sleep(0.01)
            output = process.communicate("\n", timeout=300)
    assert (process.returncode, *output) == (0, "", "")


@pytest.mark.parametrize(
    "options",
    [{"timeout": 0}, {"batch_size": 0}, {"on_error": "zero"}, {"max_in_flight": 0}, {"urls": "judge"}],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    """A ValueError before anything is sent."""
    with pytest.raises(ValueError, match="RemoteReward expected"):
        remote(**{"urls": "http://127.0.0.1:1"} | options)


def test_no_images_are_not_sent() -> None:
    """No image gives no score, without a request."""
    reward = remote(unused_url())
    assert reward(torch.zeros(0, 3, 8, 8)).shape == (0,)
    assert asyncio.run(reward.ascore([])).shape == (0,)


def test_facts_match_what_a_server_tells() -> None:
    """Facts that are given are those that would be asked for."""
    local = iqareward.load("ssim")
    with Double([local]) as double, RemoteReward(double.url, "ssim") as reward:
        assert reward.facts == RemoteFacts.of(local)
        assert json.loads(double.facts()[1])["rewards"]["ssim"]["needs_references"] is True


def test_a_batch_without_scores_is_reported_once() -> None:
    """The server answers null for every image; the client has the pixels, and says once what is wrong with them."""
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with (
        Double([iqareward.load("psnr")]) as double,
        RemoteReward(double.url, "psnr", batch_size=2) as reward,
        pytest.warns(UnscoredWarning) as caught,
    ):
        scores = [reward(images, references=images), asyncio.run(reward.ascore(images, references=images))]
    assert torch.stack(scores).isnan().all()
    mine = [str(warning.message) for warning in caught if "5 of 5 images" in str(warning.message)]
    assert len(mine) == 1
    assert "value_range=(-1, 1)" in mine[0]


def test_a_lost_request_is_reported_as_such() -> None:
    """Where requests were lost, the warning about them is the only one."""
    with (
        remote(unused_url(), on_error="nan", timeout=1.0) as reward,
        pytest.warns(RuntimeWarning, match="not scored") as caught,
    ):
        assert reward(flat(0.1, 0.2)).isnan().all()
    assert len(caught) == 1


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux has these options")
def test_connections_notice_a_machine_that_is_gone() -> None:
    """One that loses its power closes no connection: the kernel is told to ask, and to give up within 30 seconds."""
    with Double([Brightness()]) as double, remote(double.url) as reward:
        reward(flat(0.5))
        found = []
        for name in os.listdir("/proc/self/fd"):
            try:
                connection = socket.socket(fileno=os.dup(int(name)))
            except OSError:  # not a socket
                continue
            with connection:
                try:
                    peer = connection.getpeername()
                except OSError:  # not connected
                    continue
                if isinstance(peer, tuple) and peer[1] == int(double.url.rpartition(":")[2]):
                    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
                    found.append([connection.getsockopt(socket.IPPROTO_TCP, option) for option in options])
                    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert found
    for idle, interval, count, silent in found:
        assert idle + interval * count <= 30
        assert silent <= 30_000
