"""Read image files ahead, so that the next batch is decoded while one is scored."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from iqareward.image_files import References, UnreadableImageError, open_image
from iqareward.images import to_images

READERS = 4  # threads that decode files; decoding releases the interpreter lock
BATCH_BYTES = 512 * 2**20  # of decoded images and references; the next batch takes as much again while one is scored
BYTES_PER_PIXEL = 12  # float32 RGB


class Loaded(NamedTuple):
    """A file as read: its image and its reference; or why one of them is missing, or its size does not fit."""

    path: Path
    image: Tensor | None
    reference: Tensor | None
    problem: str


class _Job(NamedTuple):
    path: Path
    reference: Path | None
    problem: str


def read_ahead(
    files: Mapping[Path, Path],
    references: References | None,
    *,
    device: str,
    batch_size: int,
    batch_bytes: int = BATCH_BYTES,
) -> Iterator[list[Loaded]]:
    """Batches of files, the next one being decoded while the caller scores this one.

    Args:
        files: file -> path relative to its folder, as `find_images` gives them.
        references: where the references are; None = none are needed.
        device: where the pixels go.
        batch_size: maximum number of files in a batch.
        batch_bytes: maximum size of a batch, decoded as float32 RGB, references included. A single larger image is a
            batch of its own.
    """
    batches = _batches(files, references, batch_size, batch_bytes)
    with ThreadPoolExecutor(READERS) as pool:

        def start() -> list[Future[Loaded]]:
            return [pool.submit(_read, job, device) for job in next(batches, [])]

        pending = start()
        while pending:
            batch = [future.result() for future in pending]
            pending = start()  # only now, so that no more than two batches are in memory
            yield batch


def _batches(
    files: Mapping[Path, Path], references: References | None, batch_size: int, batch_bytes: int
) -> Iterator[list[_Job]]:
    """Cut by the sizes in the files' headers; a file without one takes no room, and reading it tells why."""
    batch: list[_Job] = []
    room = batch_bytes
    for path, relative in files.items():
        try:
            job = _Job(path, references and references.find(relative), "")
        except (OSError, ValueError) as error:  # no reference
            job = _Job(path, None, f"not compared: {error}")
        needed = sum(_decoded_bytes(file) for file in (job.path, job.reference) if file is not None)
        if batch and (len(batch) == batch_size or needed > room):
            yield batch
            batch, room = [], batch_bytes
        batch.append(job)
        room -= needed
    if batch:
        yield batch


def _decoded_bytes(path: Path) -> int:
    try:
        with open_image(path) as image:
            return BYTES_PER_PIXEL * image.width * image.height
    except UnreadableImageError:
        return 0


def _read(job: _Job, device: str) -> Loaded:
    try:
        image = _pixels(job.path, device)
    except ValueError as error:
        reason = error.reason if isinstance(error, UnreadableImageError) else error
        return Loaded(job.path, None, None, f"not read: {reason}")
    if job.reference is None:
        return Loaded(job.path, image, None, job.problem)
    try:
        reference = _pixels(job.reference, device)
        if image.shape != reference.shape:
            sizes = (f"{tensor.shape[2]}x{tensor.shape[1]}" for tensor in (image, reference))
            raise ValueError("it is {}, its reference {}".format(*sizes))
    except ValueError as error:
        return Loaded(job.path, image, None, f"not compared: {error}")
    return Loaded(job.path, image, reference, "")


def _pixels(path: Path, device: str) -> Tensor:
    """`[3, H, W]` in [0, 1]."""
    return to_images(path, value_range=(0, 1), device=device)[0]
