"""A chat server with a known next-token distribution, over real HTTP on 127.0.0.1, and the faults that servers have."""

import base64
import collections
import functools
import hashlib
import io
import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

VOCABULARY = [*"0123456789", ".", "<", " ", " excellent", " good", " fair", " poor", " bad", "The", "\n", "Yes", "No"]
LEVELS = [" excellent", " good", " fair", " poor", " bad"]
MAX_LOGPROBS = 20
SLOW_SECONDS = 60.0


@functools.cache
def next_token(answer: str, brightness: float) -> dict[str, float]:
    """Probability of every token after a begun answer, for an image of this mean: seeded by the answer alone."""
    seed = int.from_bytes(hashlib.sha256(answer.encode()).digest()[:4], "little")
    rng = np.random.default_rng(seed)
    slopes = dict(zip(VOCABULARY, rng.normal(size=(len(VOCABULARY), 2)), strict=True))
    if answer.endswith("is"):
        likely = {level: 4.0 - 3 * rank * brightness for rank, level in enumerate(reversed(LEVELS))}
    elif answer[-1:].isdigit():
        likely = {".": 6.0}
    else:
        likely = dict.fromkeys("0123456789", 3.0)
    logits = {}
    for token, (offset, slope) in slopes.items():
        logits[token] = likely.get(token, -4.0) + 0.5 * offset + slope * brightness
    total = math.fsum(math.exp(logit) for logit in logits.values())
    return {token: math.exp(logit) / total for token, logit in logits.items()}


def of_brightness(request: dict, answer: str, image: np.ndarray) -> dict[str, float]:
    """`next_token` of an image's mean."""
    return next_token(answer, float(image.mean()) / 255)


class Double:
    """What the server was asked, and how it should misbehave."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.images: list[np.ndarray] = []
        self.connections = self.in_flight = self.most_in_flight = 0
        self.faults: collections.deque[str] = collections.deque()  # one is used up by each request
        self.always: str | None = None
        self.seconds = 0.0  # of work for each request
        self.lock = threading.Lock()
        self.distribution = of_brightness  # of (request, answer so far, image)

    def fault(self) -> str | None:
        with self.lock:
            return self.faults.popleft() if self.faults else self.always


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    double: Double

    def setup(self) -> None:
        with self.double.lock:
            self.double.connections += 1
        super().setup()

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        double = self.double
        with double.lock:
            double.in_flight += 1
            double.most_in_flight = max(double.most_in_flight, double.in_flight)
        try:
            request = json.loads(body)
            with double.lock:
                double.requests.append(request)
                double.headers.append(dict(self.headers))
            time.sleep(double.seconds)
            self._answer(request, double.fault())
        finally:
            with double.lock:
                double.in_flight -= 1

    def _answer(self, request: dict, fault: str | None) -> None:
        if fault is not None and fault.isdigit():
            headers = {"Retry-After": "0.05"} if fault == "429" else {}
            error = {"message": "asked to fail", "type": "ServerError", "param": None, "code": int(fault)}
            self._send(int(fault), json.dumps({"error": error}).encode(), headers)
        elif fault == "429 for an hour":
            self._send(429, b"{}", {"Retry-After": "3600"})
        elif fault == "cut":
            self.close_connection = True
            self.connection.close()
        elif fault == "slow":
            time.sleep(SLOW_SECONDS)
            self._send(200, b"{}")
        elif fault == "malformed":
            self._send(200, b'{"choices": [')
        elif fault == "huge":
            self._send(200, b" " * (65 << 20))
        else:
            problem = violations(request)
            if problem:
                self._send(400, json.dumps({"error": problem}).encode())
            else:
                self._send(200, json.dumps(self._completion(request, fault)).encode())

    def _completion(self, request: dict, fault: str | None) -> dict:
        image = decode_image(request)
        with self.double.lock:
            self.double.images.append(image)
        last = request["messages"][-1]
        answer = last["content"] if last["role"] == "assistant" else ""
        content = []
        for _ in range(request["max_tokens"]):
            found = self.double.distribution(request, answer, image)
            ranked = sorted(found.items(), key=lambda item: -item[1])[: request["top_logprobs"]]
            entries = [_entry(token, math.log(probability)) for token, probability in ranked]
            if fault == "no alternatives":
                content.append(_entry(*ranked[0]) | {"top_logprobs": []})
            elif fault == "impossible":
                content.append(_entry(ranked[0][0], 3.0) | {"top_logprobs": [_entry(ranked[0][0], 3.0)]})
            else:
                content.append(entries[0] | {"top_logprobs": entries})
            answer += ranked[0][0]
        logprobs = None if fault == "no logprobs" else {"content": content}
        return {"choices": [{"index": 0, "message": {"role": "assistant"}, "logprobs": logprobs}]}

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        try:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):  # the client gave up
            self.close_connection = True


def _entry(token: str, logprob: float) -> dict:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def decode_image(request: dict) -> np.ndarray:
    """`[H, W, 3]` uint8 of a request's only image, decoded by Pillow."""
    user = next(message for message in request["messages"] if message["role"] == "user")
    (url,) = [part["image_url"]["url"] for part in user["content"] if part["type"] == "image_url"]
    head, _, encoded = url.partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def violations(request: dict) -> str | None:
    """What vLLM would refuse, or would answer about another prompt than the caller meant."""
    continued = request["continue_final_message"]
    if continued == request["add_generation_prompt"]:
        return "exactly one of continue_final_message and add_generation_prompt"
    if continued != (request["messages"][-1]["role"] == "assistant"):
        return "continue_final_message goes with a final assistant message"
    if not request["logprobs"] or not 0 < request["top_logprobs"] <= MAX_LOGPROBS:
        return f"top_logprobs up to {MAX_LOGPROBS}"
    if request["temperature"] != 0 or request["repetition_penalty"] != 1:
        return "probabilities would be those of a changed distribution"
    return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients that give up are part of the tests
            super().handle_error(request, client_address)


@contextmanager
def serve() -> Iterator[Double]:
    """A running double; its address is `.url`."""
    handler = type("Handler", (_Handler,), {})
    server = _Server(("127.0.0.1", 0), handler)
    double = handler.double = Double(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield double
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
