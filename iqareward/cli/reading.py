"""Read image files ahead, so that the next batch is decoded while one is scored."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from iqareward.cli.files import find_reference
from iqareward.images import to_images

READERS = 4  # threads that decode files; decoding releases the interpreter lock


class Loaded(NamedTuple):
    """A file as read: its image and its reference, or why not."""

    path: Path
    image: Tensor | None
    reference: Tensor | None
    problem: str


def read_ahead(
    files: Mapping[Path, Path], reference: Path | None, *, device: str, batch_size: int
) -> Iterator[list[Loaded]]:
    """Batches of files, the next one being decoded while the caller scores this one.

    Args:
        files: file -> path relative to its folder, as `find_images` gives them.
        reference: folder of references with the same relative paths; None = none are needed.
        device: where the pixels go.
        batch_size: files per batch.
    """

    def read(item: tuple[Path, Path]) -> Loaded:
        return _read(*item, reference, device)

    with ThreadPoolExecutor(READERS) as pool:
        items = iter(files.items())
        pending = [pool.submit(read, item) for item in islice(items, batch_size)]
        while pending:
            upcoming = [pool.submit(read, item) for item in islice(items, batch_size)]
            yield [future.result() for future in pending]
            pending = upcoming


def _read(path: Path, relative: Path, folder: Path | None, device: str) -> Loaded:
    try:
        image = pixels(path, device)
        reference = None
        if folder is not None:
            reference = pixels(find_reference(folder, relative), device)
            if reference.shape != image.shape:
                sizes = (f"{tensor.shape[2]}x{tensor.shape[1]}" for tensor in (image, reference))
                raise ValueError("it is {}, its reference {}".format(*sizes))
    except UnidentifiedImageError:
        return Loaded(path, None, None, "not an image that Pillow can read")
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        return Loaded(path, None, None, str(error))  # SyntaxError: what Pillow raises for some broken PNGs
    return Loaded(path, image, reference, "")


def pixels(path: Path, device: str) -> Tensor:
    """`[3, H, W]` in [0, 1]."""
    return to_images(path, value_range=(0, 1), device=device)[0]
