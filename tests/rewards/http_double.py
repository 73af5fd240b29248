"""A small HTTP server in a thread that scores truthfully, unless the test tells it how to misbehave next."""

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from iqareward.serving import wire
from iqareward.types import Reward

Answer = tuple[int, bytes, dict[str, str]]
Step = Callable[["Double", bytes], Answer | None]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients that give up are part of the tests
            super().handle_error(request, client_address)


class Double:
    """Serves rewards on 127.0.0.1; `script` holds what happens to the next requests to /v1/score, truth after that."""

    def __init__(
        self, rewards: Sequence[Reward], *, script: Sequence[Step] = (), token: str | None = None, port: int = 0
    ) -> None:
        self.rewards = {reward.name: reward for reward in rewards}
        self.script, self.token = list(script), token
        self.facts_body: bytes | None = None
        self.requests: list[wire.ScoreRequest] = []
        self.sizes: list[int] = []
        self.rests: list[str] = []  # paths of requests to sleep or wake
        self.connections = 0
        self.inside = self.most_inside = 0
        self._lock = threading.Lock()
        self.server = _Server(("127.0.0.1", port), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def score(self, body: bytes) -> Answer:
        """The true answer."""
        try:
            request = wire.decode_request(body)
        except wire.WireError as error:
            return error.status, wire.encode_error(error.code, error.message, error.index), {}
        self.requests.append(request)
        columns = {
            name: wire.as_floats(column) for name in wire.COLUMNS if (column := getattr(request, name)) is not None
        }
        scores = {name: self.rewards[name](**columns, prompts=request.prompts) for name in request.rewards}
        return 200, wire.encode_answer(wire.ScoreAnswer(scores)), {}

    def facts(self) -> Answer:
        """What is served."""
        facts = {
            name: {
                "needs_references": reward.needs_references,
                "needs_inputs": getattr(reward, "needs_inputs", False),
                "needs_prompts": reward.needs_prompts,
                "bounds": reward.bounds,
            }
            for name, reward in self.rewards.items()
        }
        return 200, json.dumps({"rewards": facts}).encode() if self.facts_body is None else self.facts_body, {}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                double.connections += 1

            def log_message(self, *arguments: Any) -> None:
                pass

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except ConnectionError:
                    self.close_connection = True  # a client that gave up

            def do_GET(self) -> None:
                self.answer(double.facts() if self.path == "/v1/rewards" else (404, b"", {}))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if double.token and self.headers.get("Authorization") != f"Bearer {double.token}":
                    self.answer((401, wire.encode_error("unauthorized", "wrong token"), {}))
                    return
                if self.path != "/v1/score":
                    double.rests.append(self.path)
                    self.answer((200, b"{}", {}))
                    return
                with double._lock:
                    double.sizes.append(len(body))
                    double.inside += 1
                    double.most_inside = max(double.most_inside, double.inside)
                    step = double.script.pop(0) if double.script else Double.score
                try:
                    answer = step(double, body)
                finally:
                    with double._lock:
                        double.inside -= 1
                if answer is None:  # drop the connection without a word
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                else:
                    self.answer(answer)

            def answer(self, answer: Answer) -> None:
                status, body, headers = answer
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        return Handler


def says(status: int, body: bytes = b"", **headers: str) -> Step:
    """Answer this, whatever the request is."""
    return lambda double, request: (status, body, {name.replace("_", "-"): value for name, value in headers.items()})


def drops(double: Double, body: bytes) -> None:
    """Close the connection instead of answering."""


def slow(seconds: float) -> Step:
    """The truth, late."""

    def step(double: Double, body: bytes) -> Answer:
        time.sleep(seconds)
        return double.score(body)

    return step


def unused_url() -> str:
    """Where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
