"""Clients for bench_serving, in a process of their own: threads that score one image at a time, each waiting for it.

    python -m benchmarks._serving_load --kind ours --url http://127.0.0.1:8000 --concurrency 8 --seconds 10

Several `--url` are dealt out to the threads.

Prints one line of JSON: images answered, seconds, processor time of the clients (warm-up included), and
latencies in milliseconds.
"""

import argparse
import io
import json
import pickle
import threading
import time
from collections.abc import Callable, Sequence

import httpx2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks._serving_judge import pictures
from iqareward.serving.client import RemoteReward


def flask_client(url: str) -> Callable[[Tensor], float]:
    """What flow_grpo's client does with an image: 8 bits, JPEG with Pillow's defaults, pickled there and back."""
    client = httpx2.Client(timeout=600)

    def score(image: Tensor) -> float:
        stream = io.BytesIO()
        levels = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(levels.numpy())).save(stream, format="JPEG")
        response = client.post(url, content=pickle.dumps({"images": [stream.getvalue()]}))
        return pickle.loads(response.content)["outputs"][0]

    return score


def our_client(remote: RemoteReward) -> Callable[[Tensor], float]:
    """The same image through `RemoteReward`, its pixels as they are."""
    return lambda image: remote(image[None]).item()


def load(
    clients: Sequence[Callable[[Tensor], float]], images: Tensor, seconds: float, warm_up: float
) -> tuple[list[float], float]:
    """Every client in a thread of its own, until the time is over; latencies of what is answered after the warm-up.

    The clients go on asking for a moment after the end, so that what is counted was answered under full load: with
    batches that take seconds, a count until the last answer would mostly measure how a server runs empty.

    Args:
        clients: score one image.
        images: dealt out in turn.
        seconds: that are counted.
        warm_up: seconds before them.

    Returns:
        Milliseconds per answer, and the seconds that were counted.
    """
    latencies: list[float] = []
    start = time.perf_counter() + warm_up
    stopped = threading.Event()

    def work(client: Callable[[Tensor], float], turn: int) -> None:
        while not stopped.is_set():
            asked = time.perf_counter()
            client(images[turn % len(images)])
            answered = time.perf_counter()
            if start <= answered < start + seconds:
                latencies.append(1e3 * (answered - asked))
            turn += 1

    threads = [threading.Thread(target=work, args=(client, index)) for index, client in enumerate(clients)]
    for thread in threads:
        thread.start()
    time.sleep(warm_up + seconds)
    stopped.set()
    for thread in threads:
        thread.join()
    return latencies, seconds


def main() -> None:
    """Warm up, load, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=("ours", "flask"), required=True)
    parser.add_argument("--url", action="append", required=True)
    parser.add_argument("--concurrency", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--warm-up", type=float, required=True)
    parser.add_argument("--side", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = pictures(options.side)
    if options.kind == "flask":
        clients = [flask_client(options.url[turn % len(options.url)]) for turn in range(options.concurrency)]
    else:
        remote = RemoteReward(options.url, "judge", max_in_flight=options.concurrency, timeout=600)
        clients = [our_client(remote)] * options.concurrency
    before = time.process_time()
    latencies, seconds = load(clients, images, options.seconds, options.warm_up)
    found = {"images": len(latencies), "seconds": seconds, "cpu_seconds": time.process_time() - before}
    print(json.dumps(found | {"latencies": latencies}), flush=True)


if __name__ == "__main__":
    main()
