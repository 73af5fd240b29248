"""Let the reward clients of other code bases use `iqareward serve`: only their URL changes.

    iqareward serve qalign --jpeg always
    python examples/dialect_server.py --server http://127.0.0.1:8000 --port 8001

| code base | URL | what it sends |
|---|---|---|
| flow_grpo, DiffusionNFT and children | `/flow_grpo/REWARD` | a pickle of image files; `ref_images` are references |
| verl-omni, deepgen_rl | `/verl_omni/REWARD` | the same |
| Flow-Factory | `/flow_factory/REWARD` | JSON of base64 image files; the first condition image is the reference |
| cosmos-rl, Sana | `/cosmos/REWARD/api/reward/...` | a line of JSON and a numpy file to `enqueue`; scores from `pull` |

`/REWARD` may be left out if the server has one; cosmos-rl may name several. A token goes into the URL,
`http://anyone:TOKEN@host:8001/...`, or where the client has a setting for it, and is passed on. Python's unpickler,
which runs whatever a pickle says, is never used: `loads_plain` reads pickles as data; numpy files hold only numbers.

These clients know no "not scored", and average what they get: an image without a score is an error here, never a
number. It is 422, also where a reward fails, because flow_grpo sends what gets a 500 a thousand times. `pull` answers
200 without `scores`: cosmos-rl repeats every other status for an hour, and one of Sana's readers makes zeros of it.
"""

import argparse
import asyncio
import binascii
import hmac
import io
import math
import pickle
import pickletools
import uuid
from typing import Annotated, Any, NamedTuple
from urllib.parse import parse_qs

import httpx2
import numpy as np
import pydantic
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from iqareward.serving.listener import BoundedConnection
from iqareward.serving.wire import CONTENT_TYPE, encode_request

MAX_BODY_BYTES = 256 * 2**20
BODY_SECONDS = 120  # for a client to send a body
BODIES_AT_ONCE = 4
MAX_OPCODES = 100_000  # 1024 images with references, prompts and GenEval's metadata have 67,000
MAX_QUEUED_BYTES = 2 * 2**30  # of bodies that wait to be scored; more are sent again (429)
MAX_JOBS = 1024  # whose scores are kept; the oldest scores make room
JOB_SECONDS = 3600.0  # from `enqueue` to the last `pull`
BUSY_SECONDS = 1.0  # until a server that is busy or gone is asked again
PULL_SECONDS = 4.0  # for which `pull` waits for scores; the oldest client hangs up after 5
_MAX_LINE_BYTES, _MAX_FORM_BYTES, _MAX_NPY_HEADER = 2**20, 2**12, 2**10


class Refused(Exception):
    """A request that is answered with this status and text."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class FileCall(NamedTuple):
    """What the dialects that send image files have in common."""

    images: list[bytes]
    references: list[bytes]
    prompts: list[str] | None


_Texts = Annotated[list[str], pydantic.Field(min_length=1, max_length=1024, fail_fast=True)]


class FlowFactoryBody(pydantic.BaseModel):
    """The JSON of Flow-Factory's client; fields that no reward reads are ignored."""

    image: _Texts
    prompt: _Texts | None = None
    condition_images: Annotated[list[_Texts], pydantic.Field(max_length=1024, fail_fast=True)] | None = None


class CosmosLine(pydantic.BaseModel):
    """The line of JSON of cosmos-rl's client; weights are the client's own business."""

    reward_fn: Annotated[dict[Annotated[str, pydantic.Field(max_length=200)], float], pydantic.Field(min_length=1)]
    prompts: _Texts | None = None
    media_type: str = "latent"  # as its own service takes it


class Job(NamedTuple):
    """A request whose scores are fetched later, with the same token."""

    scores: asyncio.Task[dict[str, list[float]]]
    token: str
    expires: float


class Jobs:
    """The requests whose scores are fetched later, and what may be held of them."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}  # the oldest first
        self.queued_bytes = 0

    def reserve(self, nbytes: int) -> None:
        """Make room for a body and its scores, or refuse it."""
        now = asyncio.get_running_loop().time()
        for name, job in list(self.jobs.items()):
            if job.expires >= now and len(self.jobs) < MAX_JOBS:
                break
            if job.scores.done():
                del self.jobs[name]
        if len(self.jobs) >= MAX_JOBS or self.queued_bytes + nbytes > MAX_QUEUED_BYTES:
            raise Refused(429, "overloaded: too many images wait to be scored; send this again later.")
        self.queued_bytes += nbytes

    def release(self, nbytes: int) -> None:
        """The body is no longer held."""
        self.queued_bytes -= nbytes

    def start(self, work: Any, nbytes: int, token: str) -> str:
        """Score a reserved body; the name of the job."""
        task, name = asyncio.ensure_future(asyncio.wait_for(work, JOB_SECONDS)), uuid.uuid4().hex

        def ended(_: Any) -> None:
            self.release(nbytes)
            if not task.cancelled():
                task.exception()  # is looked at, even if nobody fetches it

        task.add_done_callback(ended)
        self.jobs[name] = Job(task, token, asyncio.get_running_loop().time() + JOB_SECONDS)
        return name

    async def scores(self, name: str, token: str) -> dict[str, list[float]]:
        """The scores of a job by the client's names of its rewards, after a wait; TimeoutError: not yet."""
        job = self.jobs.get(name)
        same = job is not None and hmac.compare_digest(job.token.encode(), token.encode())
        if job is None or not same or job.expires < asyncio.get_running_loop().time():
            raise Refused(404, "unknown_uuid: no such request here; this server was restarted, or an hour has passed.")
        await asyncio.wait({job.scores}, timeout=PULL_SECONDS)
        if not job.scores.done():
            raise TimeoutError
        error = job.scores.exception()
        if error is not None and not isinstance(error, Refused):
            raise Refused(500, f"{type(error).__name__}: {error!s:.200}") from error
        return job.scores.result()


def translator(server: httpx2.AsyncClient) -> FastAPI:
    """The application, in front of the reward server that the client is connected to."""
    api = FastAPI(title="iqareward for clients of other code bases", docs_url=None, redoc_url=None)
    places = asyncio.Semaphore(BODIES_AT_ONCE)

    async def admitted(request: Request) -> tuple[dict[str, str], dict[str, Any]]:
        """The token to pass on, and the rewards that the server has; refused without the right token."""
        headers = {"authorization": token} if (token := _token_of(request)) else {}
        return headers, _json_of(await server.get("/v1/rewards", headers=headers))["rewards"]

    async def answered(request: Request, reward: str | None, read: Any) -> tuple[int, dict[str, Any]]:
        try:
            headers, rewards = await admitted(request)
            name = _chosen(reward, rewards)
            async with places:
                call = await asyncio.to_thread(read, await _body(request))
                references = call.references if rewards[name]["needs_references"] else []
                files = [("images", (f"{i}", image)) for i, image in enumerate(call.images)]
                files += [("references", (f"{i}", image)) for i, image in enumerate(references)]
                fields = {"reward": name} | ({} if call.prompts is None else {"prompts": call.prompts})
                found = _json_of(await server.post("/v1/score", files=files, data=fields, headers=headers))
            scores = found["scores"][name]
            _check_scored(scores)
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
        except httpx2.HTTPError as error:
            state = type(error).__name__
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @api.exception_handler(Refused)
    async def refused(_: Request, error: Any) -> Response:
        return JSONResponse({"error": error.message}, error.status)

    @api.exception_handler(httpx2.HTTPError)
    async def unavailable(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": f"unavailable: no reward server ({type(error).__name__})."}, 503)

    for step in ("", "/{reward:path}"):
        api.post(f"/flow_factory{step}/compute")(flow_factory)
        api.get(f"/flow_factory{step}/health")(health)
        api.post(f"/flow_grpo{step}")(pickled)
        api.post(f"/verl_omni{step}")(pickled)
    _add_cosmos_routes(api, server, admitted, places)
    return api


def _add_cosmos_routes(api: FastAPI, server: httpx2.AsyncClient, admitted: Any, places: asyncio.Semaphore) -> None:
    """`ping`, `enqueue` and `pull`; what is wrong with a request that was read is told by `pull`, without `scores`."""
    jobs = Jobs()

    async def work(body: bytes, reward: str | None, headers: dict[str, str], rewards: Any) -> dict[str, list[float]]:
        """Scores by the client's names; a busy or restarting server is asked again until the job expires."""
        async with places:
            names, content = await asyncio.to_thread(_from_npy, body, reward, rewards)
            while True:
                try:
                    response = await server.post(
                        "/v1/score", content=content, headers=headers | {"content-type": CONTENT_TYPE}
                    )
                    if response.status_code not in (429, 503):
                        break
                except httpx2.TransportError:
                    pass
                await asyncio.sleep(BUSY_SECONDS)
        scores = _json_of(response)["scores"]
        for row in scores.values():
            _check_scored(row)
        return {name: scores[known] for name, known in names.items()}

    async def ping(request: Request, reward: str | None = None) -> Response:
        _, rewards = await admitted(request)
        names = [_chosen(reward, rewards)] if reward else sorted(rewards)
        return JSONResponse({"message": "Ping request received", "rewards": names})

    async def enqueue(request: Request, reward: str | None = None) -> Response:
        headers, rewards = await admitted(request)
        nbytes = _length(request, MAX_BODY_BYTES)
        jobs.reserve(nbytes)
        try:
            body = await _body(request)
        except BaseException:
            jobs.release(nbytes)
            raise
        return JSONResponse({"uuid": jobs.start(work(body, reward, headers, rewards), nbytes, _token_of(request))})

    async def pull(request: Request, reward: str | None = None) -> Response:
        form = parse_qs((await _body(request, _MAX_FORM_BYTES)).decode(errors="replace"))
        (name, *_), (kind, *_) = form.get("uuid", [""]), form.get("type", [""])
        try:
            scores = await jobs.scores(name, _token_of(request))
            if kind and kind not in scores:
                raise Refused(404, f"unknown_reward: expected one of {sorted(scores)} as `type`, got {kind!r:.100}.")
        except TimeoutError:
            return JSONResponse({"message": "pending: no scores yet; ask again."}, 400)
        except Refused as error:
            return JSONResponse({"error": error.message})
        return JSONResponse({"scores": {kind: scores[kind]} if kind else scores, "type": kind})

    for step in ("", "/{reward:path}"):
        for name, handler in (("ping", ping), ("enqueue", enqueue), ("pull", pull)):
            api.post(f"/cosmos{step}/api/reward/{name}")(handler)


def _token_of(request: Request) -> str:
    token = request.headers.get("authorization", "").strip()
    return token if " " in token else ""  # cosmos-rl without a token sends `Bearer `


def _json_of(response: httpx2.Response) -> Any:
    """The server's answer; a 500 becomes a 422."""
    document = response.json()
    if response.status_code != 200:
        error = document["error"]
        status = 422 if response.status_code == 500 else response.status_code
        raise Refused(status, f"{error['code']}: {error['message']}")
    return document


def _check_scored(scores: list[float | None]) -> None:
    if missing := [index for index, score in enumerate(scores) if score is None]:
        raise Refused(422, f"not_scored: no score for images {missing[:20]}: too small, or not finite.")


def _chosen(name: str | None, rewards: dict[str, Any]) -> str:
    """The reward that the path names, or the only one that there is."""
    name = (name or "").strip("/")  # deepgen_rl ends its URLs with a slash
    if not name and len(rewards) == 1:
        return next(iter(rewards))
    if name not in rewards:
        raise Refused(404, f"unknown_reward: expected one of {sorted(rewards)}, got {name!r:.100}.")
    return name


def _length(request: Request, most: int) -> int:
    length = request.headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()):
        raise Refused(411, "length_required: expected a Content-Length header.")
    if int(length[:20]) > most:
        raise Refused(413, f"body_too_large: expected at most {most} bytes, got {length:.20}.")
    return int(length)


async def _body(request: Request, most: int = MAX_BODY_BYTES) -> bytes:
    _length(request, most)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.body()
    except TimeoutError:
        raise Refused(408, f"too_slow: expected the body within {BODY_SECONDS} seconds.") from None


def _from_pickle(body: bytes) -> FileCall:
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
    return FileCall(images, references, list(prompts) if texts and len(prompts) == len(images) else None)


def _from_json(body: bytes) -> FileCall:
    try:
        given = FlowFactoryBody.model_validate_json(body)
        images = [binascii.a2b_base64(text, strict_mode=True) for text in given.image]
        references = [binascii.a2b_base64(row[0], strict_mode=True) for row in given.condition_images or []]
    except pydantic.ValidationError as error:
        raise _bad_json(error) from None
    except ValueError:  # not ASCII, not base64
        raise Refused(422, "bad_request: expected the images as base64.") from None
    prompts = given.prompt if given.prompt is not None and len(given.prompt) == len(images) else None
    return FileCall(images, references, prompts)


def _bad_json(error: pydantic.ValidationError) -> Refused:
    found = error.errors(include_url=False, include_input=False)[0]
    status = 400 if found["type"] == "json_invalid" else 422
    return Refused(status, f"bad_request: {'.'.join(map(str, found['loc']))}: {found['msg']}")


def _from_npy(body: bytes, reward: str | None, rewards: dict[str, Any]) -> tuple[dict[str, str], bytes]:
    """The server's reward for each of the client's names, and the request for the server."""
    end = body.find(b"\n", 0, _MAX_LINE_BYTES)
    if end < 0:
        raise Refused(400, "bad_request: expected a line of JSON, then a numpy file.")
    try:
        line = CosmosLine.model_validate_json(body[:end])
    except pydantic.ValidationError as error:
        raise _bad_json(error) from None
    if line.media_type != "image":
        raise Refused(422, f"bad_request: expected `media_type` image, got {line.media_type!r:.40}.")
    names = {name: _chosen(reward or name, rewards) for name in line.reward_fn}
    images = torch.from_numpy(_npy_images(body, end + 1))
    return names, encode_request(images, prompts=line.prompts, rewards=sorted(set(names.values())))


def _npy_images(body: bytes, start: int) -> np.ndarray:
    """`[B, 3, H, W]` of a numpy file `[B, H, W, 3]`; the header is read as literals, and nothing is unpickled."""
    header = io.BytesIO(body[start : start + _MAX_NPY_HEADER])
    try:
        version = np.lib.format.read_magic(header)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(header, max_header_size=_MAX_NPY_HEADER)
    except Exception as error:
        raise Refused(422, f"bad_request: expected a numpy file ({type(error).__name__}).") from None
    start += header.tell()
    if dtype not in (np.uint8, np.float16, np.float32) or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise Refused(
            422, f"bad_request: expected uint8 or floats in [0, 1] of [B, H, W, 3], got {dtype} {shape!r:.80}."
        )
    if math.prod(shape) * dtype.itemsize != len(body) - start:
        raise Refused(422, "bad_request: the numpy file is not as long as its header says.")
    pixels = np.frombuffer(body, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
    return np.array(pixels.transpose(0, 3, 1, 2), order="C")  # always a copy


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
