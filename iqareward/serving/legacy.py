"""The reward-server dialects of other code bases: their clients work when only their URL changes.

- `/flow_grpo`: flow_grpo and its children. A pickle `{"images": [file, ...], ...}`, answered by a pickle
  `{"outputs": [...], "scores": [...]}`.
- `/verl_omni`: verl-omni. A pickle `{"images": [file], "prompts": [text], "metadata": {}}`, answered likewise.
- `/flow_factory/compute` and `/flow_factory/health`: Flow-Factory. JSON `{"image": [base64 PNG], "prompt": [...]}`,
  answered by `{"rewards": [...]}`.

Each takes the name of a reward as one more step of the path, before `compute` or `health`; without it, the server must
have one reward. Pickles are read by `plain_pickle.loads_plain`, which cannot run code. Pictures are cut out of JSON
before it is parsed, because Python's parser holds up all other threads until it is done.

These clients know no "not scored", and average what they get: an image without a score is an error here (422), never a
number. A reward that fails is 422 too, because flow_grpo sends what gets a 500 a thousand times.
"""

import asyncio
import binascii
import math
import pickle
import re
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from iqareward.serving import openapi
from iqareward.serving.dispatch import Service, answer, chosen, time_limit, unknown_reward
from iqareward.serving.errors import ServiceError
from iqareward.serving.memory import Reservation
from iqareward.serving.pictures import decode_pairs
from iqareward.serving.plain_pickle import loads_plain
from iqareward.serving.presence import read_body, while_connected
from iqareward.serving.settings import Settings
from iqareward.serving.wire import ScoreRequest, WireError, read_json

MAX_JSON_BYTES = 2**19  # without the pictures
LONG_TEXT = 256  # bytes; longer texts are pictures or long prompts
BASE64_PIECE = 2**20  # characters that are decoded at once
_TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)  # without backtracking


class LegacyCall(NamedTuple):
    """What the dialects have in common."""

    images: list[bytes]
    references: list[bytes] | None
    prompts: list[str] | None


def add_legacy_routes(api: FastAPI, service: Service, settings: Settings) -> None:
    """Add the routes of all dialects to the application."""

    async def pickled(request: Request, reward: str | None = None) -> Response:
        status, document = await _scored(request, reward, service, settings, _from_pickle)
        return Response(pickle.dumps(document), status, media_type="application/octet-stream")

    async def flow_factory(request: Request, reward: str | None = None) -> Response:
        status, document = await _scored(request, reward, service, settings, _from_json)
        return JSONResponse({"rewards": document["scores"]} if status == 200 else document, status)

    async def health(reward: str | None = None) -> Response:
        state = (await service.health()).get(_chosen(reward, service))
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    pickles: dict[str, Any] = {"responses": openapi.PICKLE_RESPONSES, "openapi_extra": openapi.PICKLE_BODY}
    json: dict[str, Any] = {"responses": openapi.FLOW_FACTORY_RESPONSES, "openapi_extra": openapi.FLOW_FACTORY_BODY}
    states: dict[str, Any] = {"responses": openapi.FLOW_FACTORY_HEALTH}
    for step in ("", "/{reward}"):
        api.post(f"/flow_grpo{step}", summary="flow_grpo's dialect", **pickles)(pickled)
        api.post(f"/verl_omni{step}", summary="verl-omni's dialect", **pickles)(pickled)
        api.post(f"/flow_factory{step}/compute", summary="Flow-Factory's dialect", **json)(flow_factory)
        api.get(f"/flow_factory{step}/health", summary="What Flow-Factory asks first", **states)(health)


async def _scored(
    request: Request, reward: str | None, service: Service, settings: Settings, read: Callable[[bytes], LegacyCall]
) -> tuple[int, dict[str, Any]]:
    """Status and document of the answer."""
    try:
        async with time_limit(settings.deadline):
            body = await read_body(request)
            name, memory = _chosen(reward, service), request.scope["iqareward.memory"]
            decoded = await asyncio.to_thread(lambda: _decoded(read(body), name, service, settings, memory))
            result = await while_connected(request, answer(chosen(service, decoded), decoded))
        scores = result.scores[name].tolist()
        missing = [index for index, score in enumerate(scores) if math.isnan(score)]
        if missing:
            raise ServiceError(422, "not_scored", f"no score for the images {missing[:20]}: too small, or not finite.")
    except (ServiceError, WireError) as error:
        return 422 if error.status == 500 else error.status, {"error": f"{error.code}: {error.message}"}
    return 200, {"scores": scores, "outputs": scores}


def _chosen(name: str | None, service: Service) -> str:
    """The reward that the path names, or the only one that there is."""
    if name is None and len(service.rewards) == 1:
        return next(iter(service.rewards))
    if name is None or name not in service.rewards:
        raise unknown_reward(name, service)
    return name


def _decoded(call: LegacyCall, name: str, service: Service, settings: Settings, memory: Reservation) -> ScoreRequest:
    # what is not looked at is not decoded
    references = call.references if service.rewards[name].facts.needs_references else None
    lossy = settings.jpeg != "never"
    images, truths = decode_pairs(call.images, references or [], settings.limits, memory, allow_lossy=lossy)
    return ScoreRequest((name,), images, truths, None if call.prompts is None else tuple(call.prompts))


def _from_pickle(body: bytes) -> LegacyCall:
    try:
        fields = loads_plain(body)
    except ValueError as error:
        raise ServiceError(400, "refused_pickle", str(error)) from None
    if not isinstance(fields, dict):
        raise ServiceError(422, "bad_request", f"expected a dictionary, got {type(fields).__name__}.")
    images, references = _files(fields, "images"), _files(fields, "ref_images")
    return LegacyCall(images, references or None, _prompts(fields.get("prompts"), len(images)))


def _files(fields: dict[str, Any], name: str) -> list[bytes]:
    files = fields.get(name, [])
    if not isinstance(files, list) or not all(isinstance(file, bytes) for file in files):
        raise ServiceError(422, "bad_request", f"expected `{name}` as a list of the bytes of picture files.")
    return files


def _from_json(body: bytes) -> LegacyCall:
    rest, texts = _without_long_texts(body)
    fields = read_json(rest, "malformed_body")
    if not isinstance(fields, dict) or not isinstance(fields.get("image"), list):
        raise ServiceError(422, "bad_request", "expected an object with `image`, a list of base64 pictures.")
    conditions = fields.get("condition_images") or []
    if not isinstance(conditions, list) or not all(isinstance(row, list) and row for row in conditions):
        raise ServiceError(422, "bad_request", "expected `condition_images` as a list of lists of base64 pictures.")
    images = [_from_base64(text, texts, index) for index, text in enumerate(fields["image"])]
    references = [_from_base64(row[0], texts, index) for index, row in enumerate(conditions)]
    prompts = _prompts(fields.get("prompt"), len(images))
    if prompts is not None:
        prompts = [read_json(b'"%b"' % texts[text], "malformed_body") if text in texts else text for text in prompts]
    return LegacyCall(images, references or None, prompts)


def _without_long_texts(body: bytes) -> tuple[bytes, dict[str, memoryview]]:
    """The JSON with a name in the place of each long text that has no escapes, and these texts by their names."""
    rest: list[bytes] = []
    texts: dict[str, memoryview] = {}
    position, size, mark = 0, 0, secrets.token_hex(8)
    while position < len(body):
        start = body.find(b'"', position)
        end = body.find(b'"', start + 1)
        stand_in = b""
        if start < 0 or end < 0:
            start = end = len(body)
        elif end - start > LONG_TEXT and body.find(b"\\", start, end) < 0:
            name = f"{mark}-{len(texts)}"
            texts[name] = memoryview(body)[start + 1 : end]
            end, stand_in = end + 1, f'"{name}"'.encode()
        else:
            text = _TEXT.match(body, start, start + MAX_JSON_BYTES)
            start = end = text.end() if text else len(body)
        size += start - position + len(stand_in)
        if size > MAX_JSON_BYTES:
            raise ServiceError(413, "body_too_large", f"expected at most {MAX_JSON_BYTES} bytes beside the pictures.")
        rest += (body[position:start], stand_in)
        position = end
    return b"".join(rest), texts


def _from_base64(text: object, texts: dict[str, memoryview], index: int) -> bytes:
    try:
        if not isinstance(text, str):
            raise TypeError
        whole = texts.get(text, text)
        pieces = (whole[start : start + BASE64_PIECE] for start in range(0, len(whole), BASE64_PIECE))
        return b"".join([binascii.a2b_base64(piece, strict_mode=True) for piece in pieces])
    except (TypeError, ValueError):  # not a text; not ASCII, not base64
        raise ServiceError(422, "bad_request", "expected the picture as base64.", index=index) from None


def _prompts(prompts: object, count: int) -> list[str] | None:
    """Prompts if they are one text per image. flow_grpo's children send other things there, which no reward reads."""
    if isinstance(prompts, list | tuple) and len(prompts) == count and all(isinstance(text, str) for text in prompts):
        return list(prompts)
    return None
