"""A reward that is scored by a server: the client of `iqareward serve`."""

import asyncio
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, final
from urllib.parse import quote

import torch

from iqareward.rewards.calls import Call
from iqareward.rewards.core import BaseReward
from iqareward.serving.http_client import HttpClient, RemoteError
from iqareward.serving.wire import CONTENT_TYPE, MAX_DEADLINE, WireError, decode_answer, encode_request, read_json
from iqareward.types import Bounds, Images, Reward, Scores

TOKEN_VARIABLE = "IQAREWARD_TOKEN"
_MAX_REQUEST_BYTES = 64 * 2**20  # of images and references; a server takes 256 MiB unless it is told otherwise
_TOO_LARGE = 413
_REFUSED = {
    401,
    403,
    404,
    409,
}  # the client is set up wrongly, or has not woken the reward: no policy turns that into NaN


@dataclass(frozen=True)
class RemoteFacts:
    """What must be known of a reward before it can be asked."""

    needs_references: bool
    needs_prompts: bool
    bounds: Bounds

    @classmethod
    def of(cls, reward: Reward) -> "RemoteFacts":
        """The facts of a local reward."""
        return cls(reward.needs_references, reward.needs_prompts, reward.bounds)


@final
class RemoteReward(BaseReward):
    """A reward on a server, called like any other; scores are bit-identical to those of the same reward here.

    Pixels travel without loss (`iqareward.serving.wire`), in requests of `batch_size` images, `max_in_flight` of them
    at a time for all threads and coroutines of this process together. A lost request is sent again, to another server
    if there is one; a server that is busy is asked again later; never after `timeout`. What the server refuses is not
    repeated.

    The contract over HTTP, for servers and clients in other languages:

    - `POST /v1/score`, body `application/x-safetensors`: images, references, reward names, prompts and deadline as
      `wire.py` says. 200: `{"scores": {name: [number or null]}, "components": {...}, "timings": {...}}`.
    - `GET /v1/rewards`: `{"rewards": {name: {"needs_references", "needs_prompts", "bounds", "asleep"}}}`.
    - `POST /v1/rewards/{name}/sleep` and `.../wake`: the processes of the reward give their device back, or take it
      again. 200 when all have done so; scoring a reward that sleeps is error 409.
    - errors: `{"error": {"code", "message", "index"?}}` with status 400 (malformed), 401 (token), 404 (reward), 413
      (too large), 422 (cannot be scored), 429 and 503 (busy, see Retry-After), 500 (the reward failed), 504 (deadline).
    - `Authorization: Bearer` with the token in the environment variable `IQAREWARD_TOKEN`, if it is set.

    Args:
        urls: base address of the server, e.g. `"http://judge:8000"`, or several that serve the same.
        name: of the reward there.
        timeout: seconds for a whole call, waiting and retries included.
        max_in_flight: requests at the same time.
        batch_size: images per request, fewer if they take more than 64 MiB; a server that finds that too large gets
            halves.
        on_error: `"raise"`, or `"nan"`: images that the server could not score are NaN, with a RuntimeWarning. A wrong
            token or name, and bad arguments, are raised in any case.
        attempts: how often a request may be lost on the way.
        hedge_after: seconds after which an unanswered request is sent to a second server too; None = never.
        facts: what the reward needs; default: asked of the server when first needed.

    Raises:
        ImportError: httpx2 is missing (extra `serve`).
        ValueError: a URL without http(s), or a bound that is not positive.
        RemoteError: no scores, and `on_error` is `"raise"` (at a call).

    Example:
        >>> reward = RemoteReward("http://127.0.0.1:8000", "ssim", facts=RemoteFacts(True, False, (-1.0, 1.0)))
        >>> reward.name, reward.needs_references  # nothing has been sent yet
        ('ssim', True)
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        name: str,
        *,
        timeout: float = 120.0,
        max_in_flight: int = 8,
        batch_size: int = 32,
        on_error: Literal["raise", "nan"] = "raise",
        attempts: int = 4,
        hedge_after: float | None = None,
        facts: RemoteFacts | None = None,
    ) -> None:
        if not timeout > 0 or batch_size < 1:
            raise ValueError(f"RemoteReward expected timeout > 0 and batch_size >= 1, got {timeout} and {batch_size}.")
        if on_error not in ("raise", "nan"):
            raise ValueError(f'RemoteReward expected `on_error` "raise" or "nan", got {on_error!r}.')
        self.name, self.timeout, self.batch_size, self.on_error = name, timeout, batch_size, on_error
        self.max_in_flight = max_in_flight
        self._facts = facts
        self._client = HttpClient(
            [urls] if isinstance(urls, str) else list(urls),
            purpose="RemoteReward",
            max_in_flight=max_in_flight,
            attempts=attempts,
            hedge_after=hedge_after,
            token_variable=TOKEN_VARIABLE,
        )

    def score_call(self, call: Call) -> Scores:
        call.check(self.name)
        if not len(call):
            return _none(call)
        sent, lost = _on_cpu(call), list[RemoteError]()
        return self._watched(sent, lost, self._client.run(self._asked(sent, lost))).to(call.device)

    async def ascore(
        self,
        images: Images,
        references: Images | None = None,
        *,
        inputs: Images | None = None,
        prompts: Sequence[str] | None = None,
        **ignored: Any,
    ) -> Scores:
        """The same without blocking the event loop; cancelling it cancels its requests."""
        if self._facts is None:
            self._facts = await self._client.arun(self._ask())
        call = self._call(images, references, inputs, prompts).check(self.name)
        if not len(call):
            return _none(call)
        sent, lost = _on_cpu(call), list[RemoteError]()
        return self._watched(sent, lost, await self._client.arun(self._asked(sent, lost))).to(call.device)

    @property
    def needs_references(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the reward compares with references; the first look asks the server."""
        return self.facts.needs_references

    @property
    def needs_prompts(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the reward reads prompts; the first look asks the server."""
        return self.facts.needs_prompts

    @property
    def bounds(self) -> Bounds:  # pyright: ignore[reportIncompatibleVariableOverride]
        """(low, high) of the scores; the first look asks the server."""
        return self.facts.bounds

    @property
    def facts(self) -> RemoteFacts:
        """All three, asked once and pickled along."""
        if self._facts is None:
            self._facts = self._client.run(self._ask())
        return self._facts

    def offload(self) -> None:
        """Let every server give the reward's device back, after the calls that came before; until `onload` calls fail.

        It is the server's reward that sleeps, so the calls of every other client fail as well.

        Raises:
            RemoteError: a server did not do it.
        """
        self._rest("sleep")

    def onload(self) -> None:
        """Let every server load the reward onto its device again.

        Raises:
            RemoteError: a server did not do it.
        """
        self._rest("wake")

    def _rest(self, step: str) -> None:
        async def one(client: HttpClient) -> None:
            deadline = asyncio.get_running_loop().time() + self.timeout
            await client.request("POST", f"/v1/rewards/{quote(self.name, safe='')}/{step}", deadline=deadline)

        for url in self._client.urls:  # each of them: the client chooses one by turns
            client = HttpClient([url], purpose="RemoteReward", token_variable=TOKEN_VARIABLE)
            try:
                client.run(one(client))
            finally:
                client.close()

    def close(self) -> None:
        """End the connections of this process; a later call opens new ones."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _ask(self) -> RemoteFacts:
        deadline = asyncio.get_running_loop().time() + self.timeout
        return _facts_of(self.name, await self._client.request("GET", "/v1/rewards", deadline=deadline))

    def _watched(self, call: Call, lost: list[RemoteError], scores: Scores) -> Scores:
        """The scores, with a warning if there are none and no lost request has said so."""
        if not lost:
            reason = "the server has no score for these images; its log may say why"
            self._watch.look(self.name, scores, call.images, call.references, otherwise=reason)
        return scores

    async def _asked(self, call: Call, lost: list[RemoteError]) -> Scores:
        """Scores of all pieces, or the first error, with the others cancelled; `lost` gets errors that became NaN."""
        deadline = asyncio.get_running_loop().time() + self.timeout
        slots = asyncio.Semaphore(self.max_in_flight)  # no more bodies in memory than can be on the way

        async def one(piece: Call) -> Scores:
            async with slots:
                return await self._score_piece(piece, deadline, lost)

        pieces = call.pieces(self.batch_size, _MAX_REQUEST_BYTES)
        tasks = [asyncio.ensure_future(one(piece)) for piece in pieces]
        try:
            return torch.cat(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _score_piece(self, piece: Call, deadline: float, lost: list[RemoteError]) -> Scores:
        try:
            return await self._request(piece, deadline)
        except RemoteError as error:
            if error.status == _TOO_LARGE and len(piece) > 1:
                halves = piece.pieces((len(piece) + 1) // 2)
                return torch.cat([await self._score_piece(half, deadline, lost) for half in halves])
            if self.on_error == "raise" or error.status in _REFUSED:
                raise
            lost.append(error)
            warnings.warn(f"{self.name}: {len(piece)} images are not scored: {error}", RuntimeWarning, stacklevel=2)
            return torch.full((len(piece),), torch.nan)

    async def _request(self, piece: Call, deadline: float) -> Scores:
        loop = asyncio.get_running_loop()
        left = min(max(deadline - loop.time(), 1e-3), MAX_DEADLINE)
        body = await loop.run_in_executor(None, _encoded, piece, self.name, left)
        answer = await self._client.request(
            "POST", "/v1/score", deadline=deadline, content=body, headers={"Content-Type": CONTENT_TYPE}
        )
        try:
            scores = decode_answer(answer).scores.get(self.name)
        except WireError as error:
            raise RemoteError("malformed_answer", str(error)) from None
        if scores is None or len(scores) != len(piece):
            got = "none" if scores is None else len(scores)
            raise RemoteError("malformed_answer", f"expected {len(piece)} scores of {self.name}, got {got}.")
        return scores


def _encoded(piece: Call, name: str, deadline: float) -> bytes:
    return encode_request(piece.images, piece.references, piece.prompts, rewards=[name], deadline=deadline)


def _facts_of(name: str, body: bytes) -> RemoteFacts:
    try:
        rewards = read_json(body, "malformed_answer")["rewards"]
        if name not in rewards:
            raise RemoteError("unknown_reward", f"the server has {sorted(rewards)}, not {name!r}.", 404)
        facts = rewards[name]
        low, high = (None if bound is None else float(bound) for bound in facts["bounds"])
        return RemoteFacts(bool(facts["needs_references"]), bool(facts["needs_prompts"]), (low, high))
    except (WireError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise RemoteError("malformed_answer", f"no facts of {name} in /v1/rewards: {error}") from None


def _on_cpu(call: Call) -> Call:
    """Here and not while encoding, so that the copy comes after the work that the caller has queued on its stream."""
    moved = {}
    for column in ("images", "references"):
        images = getattr(call, column)
        moved[column] = images.cpu() if isinstance(images, torch.Tensor) else images and [row.cpu() for row in images]
    return Call(moved["images"], moved["references"], prompts=call.prompts)


def _none(call: Call) -> Scores:
    return torch.zeros(0, device=call.device)
