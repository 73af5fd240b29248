"""Clients of other code bases work when `examples/dialect_server.py` stands in front of the server."""

import asyncio
import base64
import collections
import datetime
import io
import json
import os
import pickle
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import iqareward
from examples import dialect_server
from examples.dialect_server import loads_plain, translator
from iqareward.serving.backend import Served, ServedFacts
from iqareward.serving.replica import Scored
from iqareward.serving.requests import ServiceError, Settings
from tests.serving.in_process import answering, application, post, run, send, served
from tests.serving.picture_files import encoded, picture


def in_front_of(rewards: dict[str, Served], **options) -> FastAPI:
    """The example before a server in this process."""
    server = application(rewards, Settings(**{"jpeg": "always"} | options))
    return translator(httpx2.AsyncClient(transport=httpx2.ASGITransport(server), base_url="http://server"))


@pytest.fixture(scope="module")
def app():
    return in_front_of({name: served(iqareward.load(name)) for name in ("piqe", "ssim")})


@pytest.fixture(scope="module")
def only_piqe():
    return in_front_of({"piqe": served(iqareward.load("piqe"))})


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

    facts = ServedFacts(False, True, (None, None), reward="r")
    app, image = in_front_of({"r": Served(facts, look, answering(look).rest)}), base64.b64encode(encoded()).decode()
    body = {"image": [image] * len(prompts), "prompt": prompts}
    for form in ({"ensure_ascii": True}, {"ensure_ascii": False, "indent": 1}):
        response = post(app, "/flow_factory/compute", content=json.dumps(body, **form).encode())
        assert response.status_code == 200, response.text
    assert seen == prompts * 2


@pytest.mark.parametrize(
    "body",
    [
        b'{"image":[' + b"1," * 2**19 + b"1]}",
        b'{"image":[' + b'"",' * 2**19 + b"0]}",
        b'{"image":' + b"[" * 2**19 + b"]" * 2**19 + b"}",
    ],
    ids=["numbers", "texts", "depth"],
)
def test_flow_factory_large_json(only_piqe, body):
    """Much JSON that is not images is refused, without an error for every part of it."""
    response = post(only_piqe, "/flow_factory/compute", content=body)
    assert response.status_code in (400, 422)
    assert len(response.content) < 1000


def test_lossy_images():
    """Unless the server takes JPEG, PNG is scored and JPEG is refused."""
    app = in_front_of({"piqe": served(iqareward.load("piqe"))}, jpeg="never")
    for kind, status in (("JPEG", 415), ("PNG", 200)):
        response = post(app, "/flow_grpo", content=pickle.dumps({"images": [encoded(None, kind)]}))
        assert response.status_code == status
        assert ("lossy_image" in str(pickle.loads(response.content))) == (status == 415)


def test_the_token_is_passed_on():
    """As a bearer token, and as the password of a URL; without it nothing that was sent is read."""
    app = in_front_of({"piqe": served(iqareward.load("piqe"))}, token="secret")
    content = pickle.dumps({"images": [encoded()]})
    basic = "Basic " + base64.b64encode(b"anyone:secret").decode()
    for authorization, status in (("Bearer secret", 200), (basic, 200), ("Bearer wrong", 401)):
        response = post(app, "/flow_grpo", content=content, headers={"authorization": authorization})
        assert response.status_code == status
    assert post(app, "/flow_grpo", content=b"no pickle").status_code == 401


def test_a_server_that_does_not_answer():
    """It is an error 503 in the dialect's own form."""
    app = translator(httpx2.AsyncClient(base_url="http://127.0.0.1:1"))
    response = post(app, "/flow_grpo", content=pickle.dumps({"images": [encoded()]}))
    assert response.status_code == 503
    assert "unavailable" in pickle.loads(response.content)["error"]


def test_bodies_are_bounded(only_piqe):
    """A body without a length, and one above the limit, are refused before they are read."""

    async def endless():
        yield b"x"
        raise AssertionError("the body was read")

    assert post(only_piqe, "/flow_grpo", content=endless()).status_code == 411
    headers = {"content-length": str(2**40)}
    assert post(only_piqe, "/flow_grpo", content=endless(), headers=headers).status_code == 413


@pytest.mark.parametrize("dialect", ["/flow_grpo/piqe", "/verl_omni/piqe"])
def test_exploits_are_refused(app, dialect, tmp_path):
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

    app = in_front_of({"r": answering(fail)})
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


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
PLAIN = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


class Call:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def exploits(marker: Path) -> dict[str, bytes]:
    """Payloads that would leave a file behind, in every way that a pickle can name or call something."""
    command = f"touch {marker}"
    os_system, path, touch = b"cposix\nsystem\n", str(marker).encode(), command.encode()
    return {
        "os.system": pickle.dumps(Call(os.system, command)),
        "os.system, protocol 0": pickle.dumps(Call(os.system, command), 0),
        "subprocess": pickle.dumps(Call(subprocess.check_call, ["touch", str(marker)])),
        "builtins.eval": pickle.dumps(Call(eval, f"open({str(marker)!r}, 'w')")),
        "builtins.exec, nested": pickle.dumps({"images": [b"", Call(exec, f"open({str(marker)!r}, 'w')")]}),
        "hidden behind a legal document": pickle.dumps({"images": [b"x"]})[:-1]
        + b"0" + os_system + b"(V" + touch + b"\ntR.",
        "global": os_system + b"(S'touch " + path + b"'\ntR.",
        "inst": b"(S'touch " + path + b"'\niposix\nsystem\n.",
        "obj": b"(" + os_system + b"S'touch " + path + b"'\no.",
        "newobj": b"\x80\x02" + os_system + b"(U\x01xt\x81.",
        "stack global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c"
        + bytes([len(touch)]) + touch + b"\x85R.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent id": b"\x80\x02U\x01xQ.",
        "persistent id, text": b"Px\n.",
        "build": b"\x80\x02}}b.",
        "numpy array": pickle.dumps({"images": np.zeros(2)}),
        "numpy scalar": pickle.dumps(np.float32(1)),
        "torch tensor": pickle.dumps(torch.zeros(2)),
        "set": pickle.dumps({1, 2}),
        "bytearray": pickle.dumps(bytearray(b"x"), 5),
        "out-of-band buffer": b"\x80\x05\x97.",
        "date": pickle.dumps(datetime.date(2026, 1, 1)),
        "ordered dictionary": pickle.dumps(collections.OrderedDict(a=1)),
        "decimal": pickle.dumps(Decimal(1)),
    }  # fmt: skip


@pytest.mark.parametrize("name", exploits(Path("x")))
def test_exploits_are_blocked(name, tmp_path):
    """Nothing is imported, called or built, and the error names the opcode."""
    marker = tmp_path / "exploited"
    with pytest.raises(ValueError, match=r"expected plain data, got the opcode [A-Z_0-9]+\."):
        loads_plain(exploits(marker)[name])
    assert not marker.exists()


def test_the_exploits_are_real(tmp_path):
    """The payloads that name a function do leave the file behind when Python's own unpickler reads them."""
    for name in ("os.system", "os.system, protocol 0", "builtins.eval", "hidden behind a legal document", "global",
                 "inst", "stack global"):  # fmt: skip
        marker = tmp_path / name.replace(" ", "_").replace(",", "")
        subprocess.run(["python3", "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"],
                       input=exploits(marker)[name], check=True)  # fmt: skip
        assert marker.exists(), name


@settings(max_examples=200, deadline=None)
@given(PLAIN, st.integers(3, 5))
def test_plain_data_survives(document, protocol):
    """What the dialects send comes back as it was, from every protocol of Python 3 clients."""
    assert loads_plain(pickle.dumps(document, protocol)) == document


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.builds(lambda d, i, b: d[:i] + b + d[i + 1 :], PLAIN.map(pickle.dumps),
                                           st.integers(0, 100), st.binary(max_size=3)))  # fmt: skip
def test_any_bytes(body):
    """Random bytes and damaged pickles give plain data or a ValueError, and nothing else."""
    try:
        document = loads_plain(body)
    except ValueError:
        return
    assert isinstance(document, type(None) | bool | int | float | str | bytes | list | tuple | dict)


def test_a_thousand_images_with_everything():
    """1024 images with references, prompts and GenEval's metadata pass, whoever shares texts with whom."""
    thing = {"class": "bench", "count": 1, "color": "red"}
    metadata = {"tag": "two_object", "include": [thing, thing], "exclude": [], "prompt": "a bench", "seed": 2**40}
    body = {
        "images": [b"%d" % i for i in range(1024)],
        "ref_images": [b"%d reference" % i for i in range(1024)],
        "prompts": tuple(f"prompt {i}" for i in range(1024)),
        "metadatas": [json.loads(json.dumps(metadata)) for _ in range(1024)],
        "only_strict": True,
    }
    for protocol in (3, 4, 5):
        assert loads_plain(pickle.dumps(body, protocol)) == body


PAIRS = b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60))  # 60 tuples, each of the one before, twice
COLLIDING = b"".join(b"\x8a\x0c" + (i * sys.hash_info.modulus).to_bytes(12, "little") + b"N" for i in range(1, 25_000))
BOMBS = {
    "key that is hashed in 2^60 steps": (b"\x80\x04)\x94" + PAIRS + b"}h\x3cNs.", "keys are texts"),
    "keys with one hash": (b"\x80\x04}(" + COLLIDING + b"u.", "keys are texts"),
    "key that comes twice": (b"\x80\x04}(\x8c\x01aN\x8c\x01aNu.", "each once"),
    "marks without end": (b"\x80\x02]" + b"(" * 200_000 + b".", "at most 100000 opcodes"),
    "bytes that are not there": (b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"x.", "remain"),
    "text that is not there": (b"\x80\x04\x8d" + (2**60).to_bytes(8, "little") + b"x.", "remain"),
    "integer of a kilobyte": (pickle.dumps(2**8192), "LONG4"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name):
    """Small bodies that ask for much memory or time are refused at once."""
    body, message = BOMBS[name]
    with pytest.raises(ValueError, match=message):
        loads_plain(body)


def test_large_files():
    """Bytes that are read in pieces come back whole, whatever their length is."""
    body = [bytes(range(256)) * 2**14 + bytes(rest) for rest in (0, 1, 2**20 - 1)]
    assert loads_plain(pickle.dumps(body)) == body


def test_large_numbers_in_the_memo_cost_nothing():
    """Python's machine makes room for as many entries as the number says."""
    assert loads_plain(b"\x80\x02]r\xff\xff\xff\xff.") == []


@pytest.mark.parametrize(
    "nesting", [b"]" * 40_000 + b"a" * 39_999, b"N" + b"\x85" * 90_000, b"]\x94" + b"h\0a" * 40_000]
)
def test_deep_nesting(nesting):
    """Lists and tuples in one another, and a list in itself, are built and freed without recursion."""
    assert len(loads_plain(b"\x80\x04" + nesting + b".")) >= 1


def npy(array: np.ndarray, **line) -> bytes:
    """A body of cosmos-rl."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return json.dumps({"reward_fn": {"piqe": 1.0}, "media_type": "image"} | line).encode() + b"\n" + stream.getvalue()


async def fetched(app: FastAPI, body: bytes, path: str = "/cosmos", **form: str) -> tuple[int, dict]:
    """The answer of `pull` after `enqueue`, on one event loop."""
    response = await send(app, "POST", f"{path}/api/reward/enqueue", content=body)
    assert response.status_code == 200, response.text
    form = {"uuid": response.json()["uuid"]} | form
    response = await send(app, "POST", f"{path}/api/reward/pull", data=form)
    return response.status_code, response.json()


PIXELS = np.stack([np.asarray(picture(seed)) for seed in (1, 2)])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", [np.uint8, np.float16, np.float32])
def test_cosmos_pixels_arrive_without_loss(app, kind, order):
    """As uint8, and as floats in [0, 1], in both orders of memory."""
    pixels = PIXELS if kind is np.uint8 else (PIXELS / np.float32(255)).astype(kind)
    _, answer = run(fetched(app, npy(np.asarray(pixels, order=order), prompts=["a", "b"]), type="piqe"))
    images = iqareward.to_images(pixels.astype(np.float32) if kind is np.float16 else pixels, value_range=(0, 1))
    assert answer == {"scores": {"piqe": iqareward.load("piqe")(images).tolist()}, "type": "piqe"}


def test_cosmos_without_a_type(app):
    """A client that names no reward gets all; `ping` lists those that the server has."""
    _, answer = run(fetched(app, npy(PIXELS)))
    assert set(answer["scores"]) == {"piqe"}
    response = post(app, "/cosmos/api/reward/ping", data={"info_data": "{}"})
    assert response.json() == {"message": "Ping request received", "rewards": ["piqe", "ssim"]}
    assert post(app, "/cosmos/ssim/api/reward/ping", data={}).json()["rewards"] == ["ssim"]
    unknown = post(app, "/cosmos/nope/api/reward/ping", data={})
    assert (unknown.status_code, unknown.json()["error"]) == (
        404, "unknown_reward: expected one of ['piqe', 'ssim'], got 'nope'."
    )  # fmt: skip


def headed(header: bytes, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """A body whose numpy file has this header."""
    line = b'{"reward_fn": {"piqe": 1}, "media_type": "image"}\n'
    size = len(header).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return line + b"\x93NUMPY" + version + size + header + data


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"{}\n",
        b"[1]\n" + npy(PIXELS).partition(b"\n")[2],
        b"x" * 2**20 + b"\n",
        npy(PIXELS, media_type="video"),
        npy(PIXELS, media_type=None),
        npy(PIXELS, reward_fn={}),
        npy(PIXELS, reward_fn={"x" * 300: 1.0}),
        npy(PIXELS, reward_fn={"nope": 1.0}),
        npy(PIXELS, prompts=["only one"]),
        npy(PIXELS)[:-1],
        npy(PIXELS) + b"x",
        npy(PIXELS[0]),
        npy(PIXELS.transpose(0, 3, 1, 2)),
        npy(PIXELS[:0]),
        npy(PIXELS.astype(np.int64)),
        npy(PIXELS.astype(">f4")),
        npy(np.array([{"a": 1}], dtype=object)),
        headed(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1000000, 1000000, 3)}"),
        headed(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, -1, -1, 3)}", b"xxx"),
        headed(b"{'descr': '|u1', 'fortran_order': False, 'shape': " + b"(" * 500 + b")" * 500 + b"}"),
        headed(b"x" * 2000),
        headed(b"__import__('os').system('true')"),
        headed(b"{}", version=b"\x03\x00"),
    ],
)
def test_cosmos_bad_bodies(app, body):
    """What cannot be scored is an answer without scores, which every client of this dialect takes for an error."""
    status, answer = run(fetched(app, body, type="piqe"))
    assert (status, set(answer)) == (200, {"error"})
    assert len(answer["error"]) < 500


def test_cosmos_never_unpickles(app, tmp_path):
    """A numpy file of objects is a pickle; none of it is run."""
    marker = tmp_path / "exploited"
    for exploit in (Call(os.system, f"touch {marker}"), Call(eval, f"open({str(marker)!r}, 'w')")):
        _, answer = run(fetched(app, npy(np.array([exploit], dtype=object)), type="piqe"))
        assert set(answer) == {"error"}
    assert os.listdir(tmp_path) == []


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 200))
def test_cosmos_any_bytes(app, noise, position):
    """Random bytes, and damaged bodies, get scores or an error, and no other answer."""
    whole = npy(PIXELS[:, :16, :16])
    for body in (noise, headed(noise), whole[:position] + noise[:3] + whole[position + 3 :]):
        status, answer = run(fetched(app, body, type="piqe"))
        assert status == 200
        assert ("scores" in answer) != ("error" in answer)


def test_cosmos_bounds(app, monkeypatch):
    """Bodies are bounded one by one and together, the number of jobs too, and scores are kept for a time."""
    path = "/cosmos/api/reward"

    async def endless():
        yield b"x"
        raise AssertionError("the body was read")

    headers = {"content-length": str(2**40)}
    assert post(app, f"{path}/enqueue", content=endless()).status_code == 411
    assert post(app, f"{path}/enqueue", content=endless(), headers=headers).status_code == 413
    assert post(app, f"{path}/pull", content=b"x" * 2**13).status_code == 413
    body = npy(PIXELS)
    with monkeypatch.context() as patch:
        patch.setattr(dialect_server, "MAX_QUEUED_BYTES", len(body) - 1)
        assert post(app, f"{path}/enqueue", content=body).status_code == 429

    async def one_after_another() -> list[str]:
        fresh = in_front_of({"piqe": served(iqareward.load("piqe"))})
        monkeypatch.setattr(dialect_server, "MAX_JOBS", 2)
        answers = []
        names = [(await send(fresh, "POST", f"{path}/enqueue", content=body)).json()["uuid"] for _ in range(2)]
        answers.append((await send(fresh, "POST", f"{path}/enqueue", content=body)).status_code)  # none is scored yet
        for name in names:
            await send(fresh, "POST", f"{path}/pull", data={"uuid": name})
        names.append((await send(fresh, "POST", f"{path}/enqueue", content=body)).json()["uuid"])
        answers += [(await send(fresh, "POST", f"{path}/pull", data={"uuid": name})).json() for name in names]
        monkeypatch.setattr(dialect_server, "JOB_SECONDS", -1.0)
        answers.append((await fetched(fresh, body))[1])
        return answers

    full, dropped, *kept, expired = run(one_after_another())
    assert full == 429
    assert all(set(answer) == {"scores", "type"} for answer in kept)
    assert "unknown_uuid" in dropped["error"]
    assert "unknown_uuid" in expired["error"]


def test_cosmos_jobs_end_with_their_time(monkeypatch):
    """A job that a server never answers is given up, and its bytes are free again."""
    body = npy(PIXELS, reward_fn={"r": 1.0})
    monkeypatch.setattr(dialect_server, "MAX_QUEUED_BYTES", len(body))
    monkeypatch.setattr(dialect_server, "PULL_SECONDS", 0.0)

    async def never(call) -> Scored:
        await asyncio.sleep(100)
        raise AssertionError

    async def scenario() -> list[int]:
        app, path = in_front_of({"r": answering(never)}), "/cosmos/api/reward"
        first = await send(app, "POST", f"{path}/enqueue", content=body)
        pulled = await send(app, "POST", f"{path}/pull", data={"uuid": first.json()["uuid"]})
        full = await send(app, "POST", f"{path}/enqueue", content=body)
        monkeypatch.setattr(dialect_server, "JOB_SECONDS", 0.0)
        app = in_front_of({"r": answering(never)})
        ended = []
        for _ in range(2):
            ended.append(await send(app, "POST", f"{path}/enqueue", content=body))
            await asyncio.sleep(0.01)
        return [response.status_code for response in (first, pulled, full, *ended)]

    assert run(scenario()) == [200, 400, 429, 200, 200]


def test_slow_bodies_are_given_up(only_piqe, monkeypatch):
    """A client that sends nothing more holds a place for a bounded time."""
    monkeypatch.setattr(dialect_server, "BODY_SECONDS", 0.01)

    async def slow():
        yield b"x"
        await asyncio.sleep(5)

    for path in ("/flow_grpo", "/cosmos/api/reward/enqueue"):
        assert post(only_piqe, path, content=slow(), headers={"content-length": "100"}).status_code == 408


def test_a_slash_at_the_end(app, only_piqe):
    """deepgen_rl puts one behind every address."""
    body = pickle.dumps({"images": [encoded()], "prompts": ["a"], "metadata": {}})
    for served_by, path in ((app, "/verl_omni/piqe/"), (only_piqe, "/verl_omni/")):
        assert post(served_by, path, content=body).status_code == 200
