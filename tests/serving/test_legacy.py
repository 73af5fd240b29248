"""Clients of other code bases, rebuilt from what they send, work when only their URL changes."""

import asyncio
import base64
import dataclasses
import io
import json
import os
import pickle

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image

import iqareward
from iqareward.serving.dispatch import Facts, Scored
from iqareward.serving.errors import ServiceError
from iqareward.serving.plain_pickle import loads_plain
from iqareward.serving.settings import Settings
from tests.serving.in_process import answering, application, post, run, send, served
from tests.serving.picture_files import encoded, picture
from tests.serving.test_plain_pickle import exploits


@pytest.fixture(scope="module")
def app():
    return application({name: served(iqareward.load(name)) for name in ("piqe", "ssim")})


@pytest.fixture(scope="module")
def only_piqe():
    return application({"piqe": served(iqareward.load("piqe"))})


def local(files: list[bytes]) -> list[float]:
    """PIQE of what is in the files, here."""
    pixels = [iqareward.to_images(Image.open(io.BytesIO(file)))[0] for file in files]
    return iqareward.load("piqe")(pixels).tolist()


async def flow_grpo(app, images: np.ndarray, batch: int, kind: str) -> list[float]:
    """The client: batches of JPEG files in a pickle, and `outputs` of the answer, whatever its status."""
    outputs: list[float] = []
    for rows in np.array_split(images, np.ceil(len(images) / batch)):
        files = [encoded(Image.fromarray(row), kind) for row in rows]
        response = await send(app, "POST", "/flow_grpo", content=pickle.dumps({"images": files}))
        outputs += pickle.loads(response.content)["outputs"]
    return outputs


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_flow_grpo(only_piqe, kind):
    """Seventy images in batches of 64; with PNG in place of JPEG, the pixels that were generated are scored."""
    images = np.stack([np.asarray(picture(seed, (16, 16))) for seed in range(70)])
    scores = run(flow_grpo(only_piqe, images, 64, kind))
    assert scores == local([encoded(Image.fromarray(row), kind) for row in images])
    original = iqareward.load("piqe")(iqareward.to_images(images)).tolist()
    assert (scores == original) == (kind == "PNG")


def test_edit_r1(app):
    """A child of flow_grpo that sends references too, and reads `scores`."""
    files, references = [encoded(picture(s)) for s in (1, 2)], [encoded(picture(s)) for s in (3, 4)]
    body = {"ref_images": references, "images": files, "prompts": ["a", "b"], "metadatas": [{"x": 1}, {}]}
    response = post(app, "/flow_grpo/ssim", content=pickle.dumps(body))
    images, truths = (iqareward.to_images([picture(s) for s in seeds]) for seeds in ((1, 2), (3, 4)))
    assert pickle.loads(response.content)["scores"] == iqareward.load("ssim")(images, references=truths).tolist()


def test_verl_omni(app):
    """One image per request, many at once, `scores` in the answer."""

    async def compute_score(seed: int) -> float:
        body = {"images": [encoded(picture(seed), "JPEG")], "prompts": ["a cat"], "metadata": {}}
        response = await send(app, "POST", "/verl_omni/piqe", content=pickle.dumps(body))
        return pickle.loads(response.content)["scores"][0]

    async def scenario() -> list[float]:
        return list(await asyncio.gather(*(compute_score(seed) for seed in range(8))))

    assert run(scenario()) == local([encoded(picture(seed), "JPEG") for seed in range(8)])


def test_flow_factory(app):
    """The health check, then PNG in JSON, `rewards` in the answer; condition images serve as references."""
    assert run(send(app, "GET", "/flow_factory/piqe/health")).json() == {"status": "ok"}
    pictures, conditions = [picture(0), picture(1)], [picture(2), picture(3)]
    body = {
        "prompt": ["a", "b"],
        "image": [base64.b64encode(encoded(image)).decode() for image in pictures],
        "video": None,
        "condition_images": [[base64.b64encode(encoded(image)).decode()] for image in conditions],
        "condition_videos": None,
    }
    images, truths = iqareward.to_images(pictures), iqareward.to_images(conditions)
    for name, expected in (
        ("piqe", iqareward.load("piqe")(images)),
        ("ssim", iqareward.load("ssim")(images, references=truths)),
    ):
        response = post(app, f"/flow_factory/{name}/compute", json=body)
        assert response.status_code == 200
        assert response.json() == {"rewards": expected.tolist()}


def test_flow_factory_prompts():
    """Prompts arrive as they are, be they short, long or escaped."""
    prompts, seen = ["a", "b" * 1000, 'c "d" \\ \n' * 100, "\u00fc" * 1000, "\0", "\u00fc"], []

    async def look(call) -> Scored:
        seen.extend(call.prompts)
        return Scored(torch.zeros(len(call)))

    served = dataclasses.replace(answering(look), facts=Facts("r", False, True, (None, None)), max_images=99)
    app, image = application({"r": served}), base64.b64encode(encoded()).decode()
    body = {"image": [image] * len(prompts), "prompt": prompts}
    for form in ({"ensure_ascii": True}, {"ensure_ascii": False, "indent": 1}):
        response = post(app, "/flow_factory/compute", content=json.dumps(body, **form).encode())
        assert response.json() == {"rewards": [0.0] * len(prompts)}
    assert seen == prompts * 2


@pytest.mark.parametrize(
    "body",
    [
        b'{"image":[' + b"1," * 2**19 + b"1]}",
        b'{"image":["' + b'\\"' * 2**19 + b'"]}',
        b'{"image":[' + b'"",' * 2**19 + b"0]}",
    ],
    ids=["numbers", "escapes", "texts"],
)
def test_flow_factory_large_json(only_piqe, body):
    """Much JSON that is not pictures is refused before it is parsed; parsing it would hold up all other requests."""
    response = post(only_piqe, "/flow_factory/compute", content=body)
    assert (response.status_code, "beside the pictures" in response.json()["error"]) == (413, True)


def test_lossless_switch():
    """With `jpeg="never"` the dialects take PNG and refuse JPEG."""
    app = application({"piqe": served(iqareward.load("piqe"))}, Settings(jpeg="never"))
    for kind, status in (("JPEG", 415), ("PNG", 200)):
        response = post(app, "/flow_grpo", content=pickle.dumps({"images": [encoded(None, kind)]}))
        assert response.status_code == status
        assert ("lossy_picture" in str(pickle.loads(response.content))) == (status == 415)


@pytest.mark.parametrize("dialect", ["/flow_grpo/piqe", "/verl_omni/piqe"])
def test_exploits_are_blocked(app, dialect, tmp_path):
    """Every payload gets a 400 and runs nothing in the server."""
    for name, payload in exploits(tmp_path / "exploited").items():
        response = post(app, dialect, content=payload)
        assert response.status_code == 400, name
        assert pickle.loads(response.content)["error"].startswith("refused_pickle"), name
    assert os.listdir(tmp_path) == []


def test_unscored_images_are_an_error_and_never_a_number(app):
    """A picture that is too small for the reward fails the request, because these clients would average NaN."""
    files = [encoded(), encoded(picture(0, (8, 8)))]
    response = post(app, "/flow_grpo/piqe", content=pickle.dumps({"images": files}))
    assert response.status_code == 422
    assert "[1]" in pickle.loads(response.content)["error"]


def test_no_error_is_status_500():
    """flow_grpo repeats a request a thousand times on 500 and on no other status."""

    async def fail(call) -> Scored:
        raise ServiceError(500, "reward_failed", "broken")

    app = application({"r": answering(fail)})
    assert post(app, "/flow_grpo", content=pickle.dumps({"images": [encoded()]})).status_code == 422
    body = {"image": [base64.b64encode(encoded()).decode()]}
    response = post(app, "/flow_factory/compute", json=body)
    assert response.status_code == 422
    assert response.json() == {"error": "reward_failed: broken"}


@pytest.mark.parametrize(
    ("path", "options", "status"),
    [
        ("/flow_grpo", {"content": pickle.dumps({"images": [encoded()]})}, 404),  # two rewards: which one?
        ("/flow_grpo/nope", {"content": pickle.dumps({"images": [encoded()]})}, 404),
        ("/flow_grpo/piqe", {"content": pickle.dumps([1])}, 422),
        ("/flow_grpo/piqe", {"content": pickle.dumps({"images": "x"})}, 422),
        ("/flow_grpo/piqe", {"content": pickle.dumps({"images": []})}, 422),
        ("/flow_grpo/piqe", {"content": pickle.dumps({"images": [b"x"]})}, 415),
        ("/flow_grpo/ssim", {"content": pickle.dumps({"images": [encoded()]})}, 422),
        ("/flow_grpo/piqe", {"content": b""}, 400),
        ("/flow_factory/piqe/compute", {"json": {"image": ["*"]}}, 422),
        ("/flow_factory/piqe/compute", {"json": {"image": [1]}}, 422),
        ("/flow_factory/piqe/compute", {"json": []}, 422),
        ("/flow_factory/piqe/compute", {"content": b"{"}, 400),
        ("/flow_factory/ssim/compute", {"json": {"image": ["eA=="], "condition_images": [[]]}}, 422),
    ],
)
def test_bad_requests(app, path, options, status):
    """Errors have a status and a text in the dialect's own form."""
    response: httpx2.Response = post(app, path, **options)
    assert response.status_code == status
    document = response.json() if "factory" in path else pickle.loads(response.content)
    assert isinstance(document["error"], str)


def test_scores_are_plain_floats(only_piqe):
    """The answer is a pickle of lists and floats, which the careful clients can read without any class."""
    document = loads_plain(post(only_piqe, "/verl_omni", content=pickle.dumps({"images": [encoded()]})).content)
    assert document["scores"] == document["outputs"]
    assert torch.tensor(document["scores"]).shape == (1,)
