"""The HTTP face: right scores, and for everything else an error that a program can read."""

import asyncio
import json
from dataclasses import replace

import httpx2
import pytest
import torch
from torch import Tensor

import iqareward
from iqareward.rewards.calls import Call
from iqareward.rewards.core import ImageReward
from iqareward.serving.app import Shared
from iqareward.serving.replica import Scored
from iqareward.serving.requests import ServiceError, Settings
from iqareward.serving.wire import Limits, decode_answer, encode_request
from tests.serving.in_process import (
    SAFETENSORS,
    answering,
    application,
    error_of,
    get,
    post,
    run,
    send,
    served,
)
from tests.serving.judges import Fragile, Slow

SUM = "0.7*ssim + 0.3*haarpsi"


@pytest.fixture(scope="module")
def pairs() -> tuple[Tensor, Tensor]:
    """Nine images and their references, more than one call of a reward holds."""
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(9, 3, 32, 40, generator=rng)
    return images, (images + 0.1 * torch.randn(images.shape, generator=rng)).clamp(0, 1)


@pytest.fixture(scope="module")
def app():
    return application({name: served(iqareward.load(name)) for name in ("ssim", "piqe", SUM)})


def body(images=None, **options) -> bytes:
    options.setdefault("rewards", ["piqe"])
    return encode_request(torch.full((1, 3, 32, 32), 0.5) if images is None else images, **options)


def test_scores_are_those_of_the_reward(app, pairs):
    """Several rewards in one request, split into calls: every score has the bits of the local one."""
    images, references = pairs
    names = ["ssim", "piqe", SUM]
    response = post(app, content=encode_request(images, references, rewards=names), headers=SAFETENSORS)
    answer = decode_answer(response.content)
    assert response.status_code == 200
    for name in names:
        assert torch.equal(answer.scores[name], iqareward.load(name)(images, references=references))
    assert set(answer.components) == {SUM}
    for part, scores in answer.components[SUM].items():
        assert torch.equal(scores, iqareward.load(part)(images, references=references))
    assert set(answer.timings) == {"read", "score", "total"}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
def test_mixed_sizes_in_every_dtype(app, dtype):
    """A list of different sizes keeps its order, whatever its pixels travel as."""
    rng = torch.Generator().manual_seed(1)
    pixels = [torch.rand(3, 16 + 3 * i, 30, generator=rng) for i in range(6)]
    sent = [(image * 255).to(dtype) if dtype == torch.uint8 else image.to(dtype) for image in pixels]
    local = [image.float() / 255 if dtype == torch.uint8 else image.float() for image in sent]
    answer = decode_answer(post(app, content=body(sent), headers=SAFETENSORS).content)
    assert torch.equal(answer.scores["piqe"], iqareward.load("piqe")(local))


def test_poisoned_image_costs_only_its_own_score(app, pairs):
    """An image that cannot be scored is null in the answer, and its neighbours keep their scores."""
    images = pairs[0].clone()
    images[3, 0, 0, 0] = torch.nan
    response = post(app, content=body(images), headers=SAFETENSORS)
    scores = response.json()["scores"]["piqe"]
    assert [score is None for score in scores] == [index == 3 for index in range(9)]
    expected = iqareward.load("piqe")(images)
    assert torch.equal(decode_answer(response.content).scores["piqe"].nan_to_num(7), expected.nan_to_num(7))


def test_what_is_served(app):
    """Clients learn names, needs, bounds and limits before they send anything."""
    facts = get(app, "/v1/rewards").json()
    assert set(facts["rewards"]) == {"ssim", "piqe", SUM}
    assert facts["rewards"]["ssim"] == {
        "reward": "ssim", "needs_references": True, "needs_inputs": False, "needs_prompts": False,
        "bounds": [-1.0, 1.0], "asleep": False,
    }  # fmt: skip
    assert facts["limits"]["max_images"] == 1024
    assert get(app, "/metrics").text == "iqareward_images 3\n"


def test_health_tells_which_reward_is_down():
    """Healthy only if every reward can be scored."""
    rewards = {"a": answering(_never), "b": answering(_never)}
    assert get(application(rewards), "/healthz").status_code == 200
    response = get(application(rewards, b="no process"), "/healthz")
    assert response.status_code == 503
    assert response.json() == {"status": "degraded", "rewards": {"a": "ok", "b": "no process"}}


@pytest.mark.parametrize("path", ["/healthz", "/v1/rewards", "/metrics", "/openapi.json"])
def test_head(app, path):
    """Load balancers that ask with HEAD get the status of GET; a path without GET has neither."""
    assert run(send(app, "HEAD", path)).status_code == 200
    assert run(send(app, "HEAD", "/v1/score")).status_code == 405


class ToInput(ImageReward):
    """How far the mean of an image is from that of its degraded input."""

    name, bounds, needs_inputs = "to_input", (-1.0, 0.0), True

    def score_batch(self, images: Tensor, *, inputs: Tensor) -> Tensor:
        return -(images.mean((1, 2, 3)) - inputs.mean((1, 2, 3))).abs()


def test_inputs_arrive_with_their_images(pairs):
    """A reward that needs the degraded images gets each with its image, whatever their size; without, it is 422."""
    images, inputs = pairs[0], pairs[1][..., ::2, ::2].contiguous()
    app = application({"to_input": served(ToInput()), "piqe": served(iqareward.load("piqe"))})
    assert get(app, "/v1/rewards").json()["rewards"]["to_input"]["needs_inputs"]
    names = ["to_input", "piqe"]
    answer = decode_answer(post(app, content=body(images, inputs=inputs, rewards=names), headers=SAFETENSORS).content)
    assert torch.equal(answer.scores["to_input"], ToInput()(images, inputs=inputs))
    assert torch.equal(answer.scores["piqe"], iqareward.load("piqe")(images))
    response = post(app, content=body(images, rewards=names), headers=SAFETENSORS)
    assert error_of(response) == (422, "missing_inputs")


@pytest.mark.parametrize(
    ("content", "headers", "expected"),
    [
        (b"", SAFETENSORS, (400, "malformed_body")),
        (b"\x00" * 100, SAFETENSORS, (400, "malformed_body")),
        (b"{}", {"content-type": "application/json"}, (415, "unsupported_content_type")),
        (b"{}", {}, (415, "unsupported_content_type")),
        (body(rewards=["nope"]), SAFETENSORS, (404, "unknown_reward")),
        (body(rewards=["piqe(batch_size=1)"]), SAFETENSORS, (404, "unknown_reward")),
        (body(rewards=["lpips(weights=/etc/passwd)"]), SAFETENSORS, (404, "unknown_reward")),
        (body(rewards=["0.5*piqe"]), SAFETENSORS, (404, "unknown_reward")),
        (body(rewards=["ssim"]), SAFETENSORS, (422, "missing_references")),
        (body(torch.rand(1, 3, 4, 4)).replace(b"F32", b"I32"), SAFETENSORS, (422, "bad_dtype")),
        (body(torch.zeros(1025, 3, 1, 1)), SAFETENSORS, (413, "too_many_images")),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",  # bytes differ between processes
)
def test_bad_requests(app, content, headers, expected):
    """Every bad body has its status and its code; options and sums are the server's, never a client's."""
    assert error_of(post(app, content=content, headers=headers)) == expected


def test_prompts_are_asked_for():
    """A reward that reads prompts is not called without."""
    told = answering(_zeros)
    app = application({"reader": replace(told, facts=replace(told.facts, needs_prompts=True))})
    assert error_of(post(app, content=body(rewards=["reader"]), headers=SAFETENSORS)) == (422, "missing_prompts")
    response = post(app, content=body(rewards=["reader"], prompts=["a cat"]), headers=SAFETENSORS)
    assert response.status_code == 200


def test_unknown_paths_and_methods(app):
    """What FastAPI refuses has our form too."""
    assert error_of(get(app, "/nope")) == (404, "not_found")
    assert error_of(get(app, "/v1/score")) == (405, "method_not_allowed")


def test_size_is_checked_before_the_body_is_read():
    """A body that is too large, of unknown size or compressed is refused without a byte of it being asked for."""
    app = application({"piqe": answering(_never)}, Settings(limits=Limits(max_bytes=1000)))
    for headers, status in (
        ([(b"content-length", b"1001")], 413),
        ([(b"transfer-encoding", b"chunked")], 411),
        ([(b"content-length", b"9" * 5000)], 413),
        ([(b"content-length", b"-1")], 411),
        ([(b"content-length", b"9"), (b"content-encoding", b"gzip")], 415),
    ):
        scope = {"type": "http", "method": "POST", "path": "/v1/score", "headers": headers, "query_string": b""}
        sent: list[dict] = []

        async def receive():
            raise AssertionError("the body was read")

        async def keep(message, sent=sent):
            sent.append(message)

        run(app(scope, receive, keep))
        assert sent[0]["status"] == status
        assert "error" in json.loads(sent[1]["body"])


@pytest.mark.parametrize("limit", ["max_inflight_bytes", "max_inflight_requests"])
def test_requests_in_flight_are_bounded(limit):
    """When the server holds as much as it may, the next request is told when to come back, and later served."""

    async def scenario() -> None:
        entered, release = asyncio.Semaphore(0), asyncio.Event()

        async def wait(call: Call) -> Scored:
            entered.release()
            await release.wait()
            return await _zeros(call)

        def sent():
            return send(app, "POST", "/v1/score", content=content, headers=SAFETENSORS)

        content = body(rewards=["r"])
        room = {"max_inflight_bytes": 2 * len(content) + 10, "max_inflight_requests": 2}[limit]
        app = application({"r": answering(wait)}, Settings(limits=Limits(max_bytes=len(content)), **{limit: room}))
        held = [asyncio.create_task(sent()) for _ in range(2)]
        for _ in held:
            await entered.acquire()
        refused = await sent()
        assert error_of(refused) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        release.set()
        assert [(await task).status_code for task in held] == [200, 200]
        assert (await sent()).status_code == 200

    run(scenario())


def test_limits_that_keep_the_largest_request_out():
    """A server that could never hold the largest request that it promises to take does not start."""
    with pytest.raises(ValueError, match="twice"):
        Settings(limits=Limits(max_bytes=2**30), max_inflight_bytes=2**30)


def test_work_for_a_client_that_hangs_up_is_cancelled():
    """When the connection ends before the answer, the reward is told at once, and nothing is sent."""
    cancelled = asyncio.Event()

    async def forever(call: Call) -> Scored:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return await _zeros(call)

    content = body(rewards=["r"])
    kind = SAFETENSORS["content-type"].encode()
    headers = [(b"content-length", str(len(content)).encode()), (b"content-type", kind)]
    scope = {"type": "http", "method": "POST", "path": "/v1/score", "headers": headers, "query_string": b""}
    messages = iter([{"type": "http.request", "body": content, "more_body": False}, {"type": "http.disconnect"}])
    sent: list[dict] = []

    async def receive():
        await asyncio.sleep(0.02)
        return next(messages)

    async def keep(message):
        sent.append(message)

    async def scenario() -> None:
        async with asyncio.timeout(60):
            await application({"r": answering(forever)})(scope, receive, keep)

    run(scenario())
    assert cancelled.is_set()
    assert sent[0]["status"] == 400  # to nobody


@pytest.mark.parametrize("by", ["server", "client"])
def test_deadline(by):
    """A reward that is too slow is given up at the earlier of the two deadlines, and its work is cancelled."""
    cancelled = []

    async def forever(call: Call) -> Scored:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(len(call))
            raise
        raise AssertionError

    app = application({"r": answering(forever)}, Settings(deadline=0.2 if by == "server" else 60))
    deadline = 60.0 if by == "server" else 0.2
    response = post(app, content=body(rewards=["r"], deadline=deadline), headers=SAFETENSORS)
    assert error_of(response) == (504, "deadline_exceeded")
    assert cancelled == [1]


def test_slow_body_is_given_up():
    """A client that sends its body too slowly is given up too."""
    app = application({"r": answering(_never)}, Settings(deadline=0.1))

    async def trickle():
        yield b"x"
        await asyncio.sleep(30)

    headers = SAFETENSORS | {"content-length": "1000"}
    assert error_of(post(app, content=trickle(), headers=headers)) == (504, "deadline_exceeded")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ServiceError(429, "overloaded", "full", retry_after=2), (429, "overloaded")),
        (ServiceError(503, "unavailable", "gone", retry_after=2), (503, "unavailable")),
    ],
)
def test_errors_from_behind_keep_their_status(error, expected):
    """What the processes of a reward report reaches the client, with the time after which to retry."""

    async def fail(call: Call) -> Scored:
        raise error

    response = post(application({"r": answering(fail)}), content=body(rewards=["r"]), headers=SAFETENSORS)
    assert error_of(response) == expected
    assert response.headers["retry-after"] == "2"


def test_a_failing_piece_fails_the_request_and_names_the_image():
    """Nothing is answered in part, the other pieces are cancelled, and the index counts in the whole request."""
    cancelled = []

    async def fail_third(call: Call) -> Scored:
        if call.images[0, 0, 0, 0] == 8:  # rows 8 and 9 are the third piece
            raise ServiceError(422, "refused", "no", index=1)
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(len(call))
            raise
        raise AssertionError

    images = torch.arange(10.0)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    response = post(application({"r": answering(fail_third)}), content=body(images, rewards=["r"]), headers=SAFETENSORS)
    assert error_of(response) == (422, "refused")
    assert response.json()["error"]["index"] == 9
    assert cancelled == [4, 4]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("not this one"), 422), (RuntimeError("broken"), 500), (KeyError("x"), 500)]
)
def test_a_reward_that_raises_fails_only_the_request_at_fault(error, status):
    """Requests in one batch: the one with the image at fault gets the error, the others their scores."""
    app = application({"fragile": served(Fragile(error))})

    async def scenario() -> list[httpx2.Response]:
        good, bad = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 3, 8, 8)
        bodies = [encode_request(images, rewards=["fragile"]) for images in (good, bad, good, good)]
        sends = [send(app, "POST", "/v1/score", content=content, headers=SAFETENSORS) for content in bodies]
        return list(await asyncio.gather(*sends))

    responses = run(scenario())
    assert [response.status_code for response in responses] == [200, status, 200, 200]
    assert [response.json()["scores"]["fragile"] for response in responses if response.status_code == 200] == [
        [0.5]
    ] * 3


def test_concurrent_single_images_share_batches(pairs):
    """Sixteen clients with one image each are scored in a few batches, each with its own score."""
    images = torch.cat([pairs[0], pairs[1]])[:16]
    slow = Slow(0.3)  # long enough for the others to arrive, on a busy machine too
    served_slow = served(slow)
    app = application({"slow": served_slow})
    replica = served_slow.score.__closure__[0].cell_contents

    async def scenario() -> list[float]:
        bodies = [encode_request(image[None], rewards=["slow"]) for image in images]
        sends = [send(app, "POST", "/v1/score", content=content, headers=SAFETENSORS) for content in bodies]
        return [response.json()["scores"]["slow"][0] for response in await asyncio.gather(*sends)]

    assert run(scenario()) == [image.mean().item() for image in images]
    _, parts = replica.statistics()
    batches, scored = parts["slow"]
    assert scored == 16
    assert batches <= 6


class Asked:
    """Counts how often it is asked, and waits until it may answer."""

    def __init__(self) -> None:
        self.times, self.may_answer, self.error = 0, asyncio.Event(), None

    async def __call__(self) -> int:
        self.times += 1
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        return self.times


def test_one_question_for_all():
    """Whoever asks while a question is under way, or soon after, gets its answer; later it is asked anew."""

    async def scenario() -> None:
        asked = Asked()
        shared = Shared(asked, seconds=3600)
        waiting = [asyncio.ensure_future(shared()) for _ in range(50)]
        await asyncio.sleep(0)
        waiting.pop().cancel()  # a client that leaves
        asked.may_answer.set()
        assert await asyncio.gather(*waiting) == [1] * 49
        assert await shared() == 1
        shared.forget()
        assert await shared() == 2
        shared.seconds = 0.0
        await asyncio.sleep(0.01)
        assert await shared() == 3

    asyncio.run(scenario())


def test_errors_and_patience_of_questions():
    """An error reaches all who ask, an answer that does not come is an error 503, and both are asked for anew."""

    async def scenario() -> None:
        asked = Asked()
        shared = Shared(asked, seconds=0.0, patience=0.05)
        for _ in range(2):
            with pytest.raises(ServiceError) as raised:
                await shared()
            assert raised.value.status == 503
        assert asked.times == 1
        asked.error = RuntimeError("lost")
        asked.may_answer.set()
        with pytest.raises(RuntimeError, match="lost"):
            await shared()
        asked.error = None
        await asyncio.sleep(0.01)
        assert await shared() == 2

    asyncio.run(scenario())


async def _zeros(call: Call) -> Scored:
    return Scored(torch.zeros(len(call)))


async def _never(call: Call) -> Scored:
    raise AssertionError("the reward was called")
