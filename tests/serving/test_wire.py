"""The wire format: nothing is lost on the way, and no body whatever gets past its one error."""

import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import iqareward
from iqareward.serving import wire
from iqareward.serving.wire import Limits, ScoreAnswer, WireError, decode_request, encode_request

RNG = np.random.default_rng(0)
FUZZ = {"deadline": None, "derandomize": True, "database": None}


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(RNG.random(shape, dtype=np.float32)).to(dtype)


def body_of(tensors: dict[str, Tensor] | None = None, **fields: Any) -> bytes:
    metadata = {"version": 1, "rewards": ["ssim"]} | fields
    tensors = {"images": noise(2, 3, 2, 2)} if tensors is None else tensors
    return safetensors.torch.save(tensors, {"iqareward": json.dumps(metadata)})


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def survives(body: bytes) -> bool:
    """Whether a body is a request; anything but an answer or a WireError fails the test by itself."""
    try:
        request = decode_request(body)
    except WireError as error:
        assert error.status in (400, 413, 422)
        assert error.code
        return False
    assert len(request.images) >= 1
    assert request.rewards
    return True


@settings(max_examples=200, **FUZZ)
@given(
    dtype=st.sampled_from([torch.uint8, torch.float16, torch.float32]),
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
    as_batch=st.booleans(),
    with_references=st.booleans(),
    prompts=st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_is_bit_identical(
    dtype: torch.dtype,
    shapes: list[tuple[int, int]],
    as_batch: bool,
    with_references: bool,
    prompts: str | None,
    seed: int,
) -> None:
    """Any bit pattern of any accepted dtype, NaN payloads and -0.0 included, arrives as it was sent."""
    rng = np.random.default_rng(seed)
    size = torch.empty(0, dtype=dtype).element_size()

    def image(shape: tuple[int, int]) -> Tensor:
        return torch.frombuffer(bytearray(rng.bytes(3 * shape[0] * shape[1] * size)), dtype=dtype).view(3, *shape)

    def column() -> Any:
        return torch.stack([image(shapes[0]) for _ in shapes]) if as_batch else [image(shape) for shape in shapes]

    images, references = column(), column() if with_references else None
    texts = None if prompts is None else [prompts] * len(shapes)
    request = decode_request(encode_request(images, references, texts, rewards=["a", "b"], deadline=2.5))
    assert (request.rewards, request.deadline) == (("a", "b"), 2.5)
    assert request.prompts == (None if texts is None else tuple(texts))
    assert (request.references is None) is (references is None)
    for sent, got in ((images, request.images), (references, request.references)):
        assert isinstance(got, Tensor) is isinstance(sent, Tensor)
        assert all(same_bits(a, b) for a, b in zip(sent or [], got or [], strict=True)) if not as_batch else True
        if as_batch and sent is not None:
            assert same_bits(sent, got)


def test_floats_from_files_travel_as_bytes_and_arrive_exactly() -> None:
    """All 256 levels as `to_images` makes them shrink to uint8, and come back as the same float32 bits."""
    levels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    floats = iqareward.to_images(levels)
    request = decode_request(encode_request(floats, rewards=["ssim"]))
    assert isinstance(request.images, Tensor)
    assert request.images.dtype == torch.uint8
    received = wire.as_floats(request.images)
    assert isinstance(received, Tensor)
    assert same_bits(received, floats)
    negative_zero = torch.where(floats == 0, -0.0, floats)
    received = decode_request(encode_request(negative_zero, rewards=["ssim"])).images
    assert isinstance(received, Tensor)
    assert same_bits(received, negative_zero)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_floats_travel_as_the_float32_that_rewards_compute_in(dtype: torch.dtype) -> None:
    """bfloat16 and float64 become float32, which is what a local reward makes of them too."""
    images = noise(1, 3, 4, 4).to(dtype)
    received = decode_request(encode_request(images, rewards=["ssim"])).images
    assert isinstance(received, Tensor)
    assert same_bits(received, images.float())


def test_images_may_share_memory_and_have_any_layout() -> None:
    """The same image twice, views and channels-last images are sent by value."""
    image = noise(3, 4, 6)
    views = [image, image, image.flip(-1), image.transpose(1, 2)]
    request = decode_request(encode_request(views, rewards=["ssim"]))
    assert all(same_bits(sent.contiguous(), got) for sent, got in zip(views, request.images, strict=True))
    batch = noise(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    mixed = decode_request(encode_request(batch, list(batch), rewards=["ssim"]))  # a batch beside a list
    assert mixed.references is not None
    assert all(torch.equal(a, b) for a, b in zip(mixed.images, mixed.references, strict=True))


def test_integers_other_than_bytes_are_refused_at_the_sender() -> None:
    """An integer image whose range is unclear is a TypeError before anything is sent."""
    with pytest.raises(TypeError, match="to_images"):
        encode_request(torch.zeros(1, 3, 4, 4, dtype=torch.int32), rewards=["ssim"])


PIXELS = {"dtype": "U8", "shape": [1, 3, 1, 1], "data_offsets": [0, 3]}
META = {"iqareward": json.dumps({"version": 1, "rewards": ["ssim"]})}
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
HOSTILE = {
    "malformed_body": [
        b"", b"\0" * 7, b"\xff" * 64, raw(b"\xff\xfe{}"), raw([]), raw(b'{"images": NaN}'), raw(DEEP),
        raw(b'{"images": 1, "images": 2}'), raw(b"[" + b"9" * 5000 + b"]"), pickle.dumps({"images": []}),
        raw({"__metadata__": META, "images": 3}), raw({"__metadata__": META, "images": PIXELS}),
        raw({"__metadata__": META, "images": PIXELS}, b"1234"),
        raw({"__metadata__": META, "images": PIXELS | {"data_offsets": [3, 0]}}, b"123"),
        raw({"__metadata__": META, "images": PIXELS | {"data_offsets": [0, 2**70]}}, b"123"),
        raw({"__metadata__": META, "images": PIXELS | {"shape": [True, 3, 1, 1]}}, b"123"),
        raw({"__metadata__": META, "images": PIXELS, "references": PIXELS}, b"123"),
        raw({"__metadata__": META, "images": PIXELS | {"shape": [-1, 3, -1, 1]}}, b"123"),
        raw({"__metadata__": 1}), raw({"__metadata__": {"iqareward": {}}}),
    ],
    "malformed_metadata": [
        raw({"images": PIXELS}, b"123"), body_of(prompts=["a", "\ud800"]),
        raw({"__metadata__": {"iqareward": "["}}), raw({"__metadata__": {"iqareward": "[]"}}),
        raw({"__metadata__": {"iqareward": "[" * 90_000}}),
    ],
    "unsupported_version": [body_of(version=2), body_of(version=True), body_of(version=None)],
    "unknown_field": [body_of(prompt=["a cat"])],
    "bad_rewards": [body_of(rewards=[]), body_of(rewards="ssim"), body_of(rewards=["a", "a"]), body_of(rewards=[1])],
    "bad_prompts": [body_of(prompts=["one"]), body_of(prompts="ab")],
    "bad_deadline": [body_of(deadline=d) for d in (0, -1, "3", True, 1e12, 10**400)],
    "unknown_tensor": [body_of({"images": noise(1, 3, 2, 2), "image.1": noise(3, 2, 2)})],
    "bad_tensors": [
        body_of({"images": noise(1, 3, 2, 2), "images.0": noise(3, 2, 2)}),
        body_of({"images.0": noise(3, 2, 2), "images.2": noise(3, 2, 2)}),
    ],
    "no_images": [body_of({"references": noise(1, 3, 2, 2)}), body_of({})],
    "bad_references": [
        body_of({"images": noise(2, 3, 2, 2), "references": noise(1, 3, 2, 2)}),
        body_of({"images": noise(1, 3, 2, 2), "references.0": noise(3, 2, 2)}),
    ],
    "bad_dtype": [body_of({"images": noise(1, 3, 2, 2, dtype=torch.float64)})],
    "bad_shape": [
        body_of({"images": noise(1, 4, 2, 2)}), body_of({"images": noise(3, 2, 2)}),
        body_of({"images": noise(0, 3, 2, 2)}), body_of({"images": noise(1, 3, 0, 2)}),
    ],
    "bad_inputs": [body_of({"images": noise(2, 3, 2, 2), "inputs": noise(1, 3, 1, 1)})],
    "body_too_large": [body_of({"images": noise(40, 3, 60, 60)})],
    "header_too_large": [body_of(prompts=["x" * 1_100_000])],
    "too_many_images": [
        body_of({"images": noise(33, 3, 1, 1)}), body_of({f"images.{i}": noise(3, 1, 1) for i in range(33)}),
    ],
    "too_many_pixels": [body_of({"images.0": noise(3, 2, 2), "images.1": noise(3, 101, 100)})],
}  # fmt: skip
LIMITS = Limits(max_bytes=1_700_000, max_images=32, max_pixels=10_000)


@pytest.mark.parametrize(("code", "body"), [(code, body) for code, bodies in HOSTILE.items() for body in bodies])
def test_every_bad_body_has_its_code(code: str, body: bytes) -> None:
    """A hostile or careless body is refused for the right reason."""
    with pytest.raises(WireError) as caught:
        decode_request(body, LIMITS)
    assert caught.value.code == code
    assert pickle.loads(pickle.dumps(caught.value)).code == code  # it crosses processes


def test_the_image_at_fault_is_named() -> None:
    """An error about one image of several carries its position."""
    with pytest.raises(WireError) as caught:
        decode_request(body_of({"images.0": noise(3, 2, 2), "images.1": noise(4, 2, 2)}))
    assert caught.value.index == 1


@settings(max_examples=500, **FUZZ)
@given(st.binary(max_size=200))
def test_fuzz_any_bytes(body: bytes) -> None:
    """Arbitrary bytes, with and without a true length before them, are a WireError and never a request."""
    assert not survives(body)
    assert not survives(raw(body, body[:9]))


VALID = {
    "batch": encode_request(noise(2, 3, 2, 2), noise(2, 3, 2, 2), ["a", "b"], rewards=["ssim"], deadline=3),
    "list": encode_request([noise(3, 1, 2), noise(3, 2, 1)], rewards=["ssim", "psnr"]),
}


@settings(max_examples=500, **FUZZ)
@given(
    st.sampled_from(sorted(VALID)), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_fuzz_mutated_bodies(form: str, changes: list[tuple[float, int]]) -> None:
    """A valid body with bytes changed is a request or a WireError; with a byte more or less it is never a request."""
    body = bytearray(VALID[form])
    for where, value in changes:
        body[int(where * (len(body) - 1))] = value
    survives(bytes(body))  # asserts by itself: either may come, nothing else
    place = int(changes[0][0] * (len(body) - 1))
    assert not survives(bytes(body[:place] + bytes([changes[0][1]]) + body[place:]))
    assert not survives(bytes(body[:place] + body[place + 1 :]))


@pytest.mark.parametrize("form", sorted(VALID))
def test_fuzz_truncated_bodies(form: str) -> None:
    """No proper prefix of a valid body is a request."""
    body = VALID[form]
    assert survives(body)
    assert not any(survives(body[:length]) for length in range(len(body)))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(
    ["U8", "F16", "F32", "images", "ssim"]
)  # fmt: skip
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner))
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["U8", "F16", "F32", "F64"]) | SCALARS,
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, -1, 2**64]), max_size=5) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), max_size=3) | JSON,
    },
)
FIELDS = {"version": st.just(1) | JSON, "rewards": st.just(["ssim"]) | JSON, "prompts": JSON, "deadline": JSON}


@settings(max_examples=200, **FUZZ)
@given(
    st.dictionaries(st.sampled_from(["images", "references", "images.0", "images.1", "x"]), ENTRIES | JSON, max_size=4),
    st.fixed_dictionaries({}, optional=FIELDS) | JSON,
    st.binary(max_size=40),
)
def test_fuzz_headers(entries: dict[str, Any], fields: Any, data: bytes) -> None:
    """A header of the right form with anything in it gives nothing but WireError; so does it as an answer."""
    survives(raw(entries | {"__metadata__": {"iqareward": json.dumps(fields)}}, data))
    for body in (json.dumps(fields).encode(), json.dumps({"scores": fields, "components": entries}).encode(), data):
        try:
            wire.decode_answer(body)
        except WireError as error:
            assert error.code == "malformed_answer"


def test_scores_survive_json() -> None:
    """Any float32 score comes back bit for bit, NaN as null as NaN."""
    bits = torch.from_numpy(RNG.integers(0, 2**32, 5000, dtype=np.uint32)).view(torch.float32)
    scores = torch.where(bits.isfinite(), bits, torch.nan)
    sent = ScoreAnswer({"sum": scores}, {"sum": {"part": scores[:3]}}, {"score": 0.25})
    body = wire.encode_answer(sent)
    assert b"NaN" not in body
    got = wire.decode_answer(body)
    torch.testing.assert_close(got.scores["sum"], scores, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got.components["sum"]["part"], scores[:3], rtol=0, atol=0, equal_nan=True)
    assert got.timings == {"score": 0.25}
    assert math.isnan(wire.decode_answer(b'{"scores": {"a": [null]}}').scores["a"].item())


def test_errors_are_json() -> None:
    """An error names its code, and the image at fault where there is one."""
    assert json.loads(wire.encode_error("bad_shape", "why", 2)) == {
        "error": {"code": "bad_shape", "message": "why", "index": 2}
    }
    assert "index" not in json.loads(wire.encode_error("busy", "why"))["error"]
