"""A data set of encoded photographs on Ray Data against the plain loops that a user would write.

    python -m benchmarks.bench_datasets             # the figures of the docs; ten minutes on 2 cores
    python -m benchmarks.bench_datasets --quick     # smoke run

Arms, taken in turns, all over the same parquet files and with one thread of torch for each process:

- `loop`: as many processes as cores, each over its share of the files: read, decode with Pillow, stack, score in
  batches of 32, keep the numbers in a list. Files are shared out beforehand, so nobody waits for anybody.
- `ray`: `score_dataset` with as many processes, which also keeps keys and writes the results.

Rates of `ray` are from the first shard that ends to the last, without the start of processes; `startup` is the time
until that first shard, or in a loop until the weights are loaded. The last line is JSON.
"""

import argparse
import io
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

import iqareward
from benchmarks._harness import document, finish, target
from benchmarks._photographs import PHOTOGRAPHS, load_photograph
from iqareward.datasets import score_dataset

BATCH = 32


def photographs(count: int, side: int) -> list[bytes]:
    """Crops of photographs as JPEG files of quality 92, no two the same."""
    rng = np.random.default_rng(0)
    sources = [(load_photograph(name).movedim(0, -1).numpy() * 255).astype(np.uint8) for name in PHOTOGRAPHS]
    found = []
    for index in range(count):
        source = sources[index % len(sources)]
        reps = [-(-side // length) + 1 for length in source.shape[:2]]
        tiled = np.tile(source, (*reps, 1))
        top, left = (int(rng.integers(0, length)) for length in source.shape[:2])
        content = io.BytesIO()
        Image.fromarray(tiled[top : top + side, left : left + side]).save(content, "JPEG", quality=92)
        found.append(content.getvalue())
    return found


def write(folder: Path, images: list[bytes], files: int) -> list[Path]:
    paths = []
    for index in range(files):
        part = images[index::files]
        table = pa.table({"image": [{"bytes": each, "path": None} for each in part], "id": list(range(len(part)))})
        paths.append(folder / f"{index:03}.parquet")
        pq.write_table(table, paths[-1], row_group_size=64)
    return paths


def plain(paths: list[Path], rewards: list[str], barrier: Any, results: Any) -> None:
    """What a user writes: one process over some of the files."""
    torch.set_num_threads(1)
    judges = [iqareward.load(name) for name in rewards]
    for judge in judges:
        judge(torch.rand(2, 3, 64, 64))  # loads weights
    barrier.wait()
    start, count = time.monotonic(), 0
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(BATCH, columns=["image"]):
            arrays = [
                np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in batch.column(0).to_pylist()
            ]
            images = torch.from_numpy(np.stack(arrays)).movedim(-1, 1).contiguous().float() / 255
            for judge in judges:
                count += len(judge(images).tolist())
    results.put((start, time.monotonic(), count // len(judges)))


def run_plain(paths: list[Path], rewards: list[str], processes: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    begin = time.monotonic()
    started = [
        context.Process(target=plain, args=(paths[rank::processes], rewards, barrier, results))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    found = [results.get() for _ in started]
    for process in started:
        process.join()
    first, last, count = min(f[0] for f in found), max(f[1] for f in found), sum(f[2] for f in found)
    return {"rate": count / (last - first), "startup": first - begin, "seconds": last - begin}


def run_ray(paths: list[Path], rewards: list[str], processes: int, output: Path) -> dict[str, float]:
    seen: list[tuple[float, int]] = []
    begin = time.monotonic()
    report = score_dataset(
        [str(path) for path in paths], rewards, output, actors=processes, batch_size=BATCH,
        on_progress=lambda progress: seen.append((time.monotonic(), progress.rows)),
    )  # fmt: skip
    assert not report.failed
    assert not report.incomplete
    (first, before), (last, rows) = seen[0], seen[-1]
    return {
        "rate": (rows - before) / (last - first),
        "startup": first - begin,
        "seconds": time.monotonic() - begin,
        "bytes per row": sum(file.stat().st_size for file in output.glob("*.parquet")) / rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    count, rounds = (96, 1) if options.quick else (options.images, options.rounds)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side, rewards in ((256, ["quick"]), (512, ["quick"]), (512, ["quick", "niqe"])):
            images = photographs(count if side == 256 else count // 4, side)
            place = Path(folder, f"{side}-{len(rewards)}")
            place.mkdir()
            paths = write(place, images, files=min(32, len(images) // 8))
            found: dict[str, list[dict[str, float]]] = {"loop": [], "ray": []}
            for turn in range(rounds):
                found["loop"].append(run_plain(paths, rewards, options.processes))
                found["ray"].append(run_ray(paths, rewards, options.processes, place / f"out{turn}"))
            median = {
                arm: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                for arm, runs in found.items()
            }
            rows.append({
                "side": side, "rewards": rewards, "images": len(images), "processes": options.processes,
                "bytes per image": sum(map(len, images)) / len(images), **median,
                "ratio": median["ray"]["rate"] / median["loop"]["rate"],
            })  # fmt: skip
            print(rows[-1], flush=True)
    targets = [target(f"{row['side']} px, {' + '.join(row['rewards'])}", row["ratio"], 0.9) for row in rows]
    finish(document("datasets", rows, targets, ["ray", "pyarrow", "pillow"]), options.json)


if __name__ == "__main__":
    main()
