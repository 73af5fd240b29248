"""Let the reward clients of other code bases use `iqareward serve`: only their URL changes.

    iqareward serve qalign --jpeg always
    python examples/legacy_server.py --server http://127.0.0.1:8000 --port 8001

| code base | URL | what it sends |
|---|---|---|
| flow_grpo, DiffusionNFT and children | `/flow_grpo/REWARD` | a pickle of image files; `ref_images` are references |
| verl-omni | `/verl_omni/REWARD` | the same, one image each |
| Flow-Factory | `/flow_factory/REWARD` | JSON of base64 image files; the first condition image is the reference |

`/REWARD` may be left out if the server has one. A token goes into the URL, `http://anyone:TOKEN@host:8001/...`, and is
passed on. Python's unpickler, which runs whatever a pickle says, is never used: `loads_plain` reads them as data.

These clients know no "not scored", and average what they get: an image without a score is an error here (422), never a
number. A reward that fails is 422 too, because flow_grpo sends what gets a 500 a thousand times.
"""

import argparse
import asyncio
import binascii
import pickle
import pickletools
from typing import Annotated, Any, NamedTuple

import httpx2
import pydantic
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from iqareward.serving.listener import BoundedConnection

MAX_BODY_BYTES = 256 * 2**20
BODIES_AT_ONCE = 4
MAX_OPCODES = 100_000  # 1024 images with references, prompts and GenEval's metadata have 67,000


class Refused(Exception):
    """A request that is answered with this status and text."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class LegacyCall(NamedTuple):
    """What the dialects have in common."""

    images: list[bytes]
    references: list[bytes]
    prompts: list[str] | None


_Texts = Annotated[list[str], pydantic.Field(min_length=1, max_length=1024, fail_fast=True)]


class FlowFactoryBody(pydantic.BaseModel):
    """The JSON of Flow-Factory's client; fields that no reward reads are ignored."""

    image: _Texts
    prompt: _Texts | None = None
    condition_images: Annotated[list[_Texts], pydantic.Field(max_length=1024, fail_fast=True)] | None = None


def translator(server: httpx2.AsyncClient) -> FastAPI:
    """The application, in front of the reward server that the client is connected to."""
    api = FastAPI(title="iqareward for clients of other code bases", docs_url=None, redoc_url=None)
    places = asyncio.Semaphore(BODIES_AT_ONCE)

    async def answered(request: Request, reward: str | None, read: Any) -> tuple[int, dict[str, Any]]:
        headers = {"authorization": request.headers["authorization"]} if "authorization" in request.headers else {}
        try:
            rewards = _json_of(await server.get("/v1/rewards", headers=headers))["rewards"]  # or no such token
            name = _chosen(reward, rewards)
            async with places:
                call = await asyncio.to_thread(read, await _body(request))
                references = call.references if rewards[name]["needs_references"] else []
                files = [("images", (f"{i}", image)) for i, image in enumerate(call.images)]
                files += [("references", (f"{i}", image)) for i, image in enumerate(references)]
                fields = {"reward": name} | ({} if call.prompts is None else {"prompts": call.prompts})
                found = _json_of(await server.post("/v1/score", files=files, data=fields, headers=headers))
            scores = found["scores"][name]
            if missing := [index for index, score in enumerate(scores) if score is None]:
                raise Refused(422, f"not_scored: no score for images {missing[:20]}: too small, or not finite.")
        except Refused as error:
            return error.status, {"error": error.message}
        except httpx2.HTTPError as error:
            return 503, {"error": f"unavailable: the reward server does not answer ({type(error).__name__})."}
        return 200, {"scores": scores, "outputs": scores}

    async def pickled(request: Request, reward: str | None = None) -> Response:
        status, document = await answered(request, reward, _from_pickle)
        return Response(pickle.dumps(document), status, media_type="application/octet-stream")

    async def flow_factory(request: Request, reward: str | None = None) -> Response:
        status, document = await answered(request, reward, _from_json)
        return JSONResponse({"rewards": document["scores"]} if status == 200 else document, status)

    async def health(reward: str | None = None) -> Response:
        try:
            states = (await server.get("/healthz")).json()["rewards"]
            state = states[_chosen(reward, states)]
        except Refused as error:
            return JSONResponse({"error": error.message}, error.status)
        except httpx2.HTTPError as error:
            state = type(error).__name__
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    for step in ("", "/{reward:path}"):
        api.post(f"/flow_factory{step}/compute")(flow_factory)
        api.get(f"/flow_factory{step}/health")(health)
        api.post(f"/flow_grpo{step}")(pickled)
        api.post(f"/verl_omni{step}")(pickled)
    return api


def _json_of(response: httpx2.Response) -> Any:
    """The server's answer; a 500 becomes a 422."""
    document = response.json()
    if response.status_code != 200:
        error = document["error"]
        status = 422 if response.status_code == 500 else response.status_code
        raise Refused(status, f"{error['code']}: {error['message']}")
    return document


def _chosen(name: str | None, rewards: dict[str, Any]) -> str:
    """The reward that the path names, or the only one that there is."""
    if name is None and len(rewards) == 1:
        return next(iter(rewards))
    if name not in rewards:
        raise Refused(404, f"unknown_reward: expected one of {sorted(rewards)} in the path, got {name!r:.100}.")
    return name


async def _body(request: Request) -> bytes:
    length = request.headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()):
        raise Refused(411, "length_required: expected a Content-Length header.")
    if int(length[:20]) > MAX_BODY_BYTES:
        raise Refused(413, f"body_too_large: expected at most {MAX_BODY_BYTES} bytes, got {length:.20}.")
    return await request.body()


def _from_pickle(body: bytes) -> LegacyCall:
    try:
        fields = loads_plain(body)
    except ValueError as error:
        raise Refused(400, f"refused_pickle: {error}") from None
    if not isinstance(fields, dict):
        raise Refused(422, f"bad_request: expected a dictionary, got {type(fields).__name__}.")
    columns = [fields.get("images"), fields.get("ref_images") or []]
    for name, files in zip(("images", "ref_images"), columns, strict=True):
        if not isinstance(files, list) or not all(isinstance(file, bytes) for file in files):
            raise Refused(422, f"bad_request: expected `{name}` as a list of the bytes of image files.")
    images, references = columns
    if not images:
        raise Refused(422, "bad_request: expected at least one image.")
    prompts = fields.get("prompts")
    # flow_grpo's children send other things there, which no reward reads
    texts = isinstance(prompts, list | tuple) and all(isinstance(text, str) for text in prompts)
    return LegacyCall(images, references, list(prompts) if texts and len(prompts) == len(images) else None)


def _from_json(body: bytes) -> LegacyCall:
    try:
        given = FlowFactoryBody.model_validate_json(body)
        images = [binascii.a2b_base64(text, strict_mode=True) for text in given.image]
        references = [binascii.a2b_base64(row[0], strict_mode=True) for row in given.condition_images or []]
    except pydantic.ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
        status = 400 if found["type"] == "json_invalid" else 422
        raise Refused(status, f"bad_request: {'.'.join(map(str, found['loc']))}: {found['msg']}") from None
    except ValueError:  # not ASCII, not base64
        raise Refused(422, "bad_request: expected the images as base64.") from None
    prompts = given.prompt if given.prompt is not None and len(given.prompt) == len(images) else None
    return LegacyCall(images, references, prompts)


_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
}  # fmt: skip
# How many items these take from the stack to put them into a collection; None = all down to the last mark.
_COLLECTED = {
    "APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None, "TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3,
}  # fmt: skip


def loads_plain(body: bytes) -> Any:
    """The plain data in a pickle: None, bool, int, float, str, bytes, and list, tuple and dict of them.

    A pickle is a program for a small stack machine. Python's machine can import and call anything, and it hashes
    whatever a program uses as a dictionary key, which takes 2^n steps for n nested tuples. This one knows only the
    opcodes that build plain data, takes nothing but texts as keys, and stops after `MAX_OPCODES`.

    Args:
        body: a pickle of protocol 3 or newer (in 2, bytes are written as a call).

    Raises:
        ValueError: anything but plain data (the first opcode at fault is named), too much of it, or no pickle.

    Example:
        >>> loads_plain(pickle.dumps({"images": [b"pixels"], "only_strict": True}))
        {'images': [b'pixels'], 'only_strict': True}
        >>> loads_plain(pickle.dumps(print))
        Traceback (most recent call last):
        ValueError: expected plain data, got the opcode STACK_GLOBAL.
    """
    try:
        return _run(body)
    except (IndexError, KeyError) as error:  # an empty stack; nothing in the memo
        raise ValueError(f"expected a pickle of plain data ({type(error).__name__}: {error}).") from None


def _run(body: bytes) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # what lay on the stack at each mark
    memo: dict[int, Any] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(body)):
        if count == MAX_OPCODES:
            raise ValueError(f"expected a pickle of at most {MAX_OPCODES} opcodes.")
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _COLLECTED:
            number = _COLLECTED[name]
            if number is None:
                items, stack = stack, below.pop()
            else:
                items = [stack.pop() for _ in range(number)][::-1]
            _collect(name, items, stack)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"expected plain data, got the opcode {name}.")
    raise ValueError("expected a pickle, got one that ends early.")


def _collect(name: str, items: list[Any], stack: list[Any]) -> None:
    """Put items into the collection on top of the stack, or into a new tuple."""
    if name.startswith("TUPLE"):
        stack.append(tuple(items))
    elif name.startswith("APPEND"):
        if type(stack[-1]) is not list:
            raise ValueError("expected a list to append to.")
        stack[-1].extend(items)
    else:
        target = stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("expected a dictionary, keys and values.")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:
                raise ValueError("expected dictionaries whose keys are texts, each once.")
            target[key] = value


def main() -> None:
    """Listen until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="address of `iqareward serve`")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8001, help="port to listen at")
    options = parser.parse_args()
    server = httpx2.AsyncClient(base_url=options.server, timeout=600, trust_env=False)
    uvicorn.run(translator(server), host=options.host, port=options.port, http=BoundedConnection, ws="none")


if __name__ == "__main__":
    main()
