"""Clients for bench_serving, in a process of their own: threads that score one image at a time, each waiting for it.

    python -m benchmarks._serving_load --kind ours --url http://127.0.0.1:8000 --concurrency 8 --seconds 10

Several `--url` are dealt out to the threads.

Prints one line of JSON: images answered, seconds, processor time of the clients, and the latencies in milliseconds.
"""

import argparse
import io
import json
import pickle
import threading
import time
from collections.abc import Callable

import httpx2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks._serving_judge import pictures
from iqareward.rewards.remote import RemoteReward


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


def load(clients: list[Callable[[Tensor], float]], images: Tensor, seconds: float) -> tuple[list[float], float]:
    """Latencies in ms of every image that was asked for in `seconds`, and how long it took to the last answer."""
    latencies: list[float] = []
    start = time.perf_counter()

    def work(client: Callable[[Tensor], float], first: int) -> None:
        turn, asked = first, start
        while asked < start + seconds:
            asked = time.perf_counter()
            client(images[turn % len(images)])
            latencies.append(1e3 * (time.perf_counter() - asked))
            turn += 1

    threads = [threading.Thread(target=work, args=(client, index)) for index, client in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies, time.perf_counter() - start


def main() -> None:
    """Warm up, load, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=("ours", "flask"), required=True)
    parser.add_argument("--url", action="append", required=True)
    parser.add_argument("--concurrency", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--side", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = pictures(options.side)
    if options.kind == "flask":
        clients = [flask_client(options.url[turn % len(options.url)]) for turn in range(options.concurrency)]
    else:
        remote = RemoteReward(options.url, "judge", max_in_flight=options.concurrency, timeout=600)
        clients = [our_client(remote)] * options.concurrency
    load(clients, images, min(1.0, options.seconds))
    before = time.process_time()
    latencies, seconds = load(clients, images, options.seconds)
    used = time.process_time() - before
    found = {"images": len(latencies), "seconds": seconds, "cpu_seconds": used, "latencies": latencies}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
