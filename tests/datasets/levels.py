"""Flat images whose level says which row they are, in every kind of data set, and a reward that reads the level."""

import io
import os
import signal
import tarfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from iqareward.types import Images

SIDE = 32


class Level:
    """The level of each flat image; `folder` gets a file for each process, `deadly` is a level that kills it."""

    bounds = (0.0, None)
    needs_references = needs_prompts = differentiable = False

    def __init__(self, seconds: float = 0.0, folder: str = "", deadly: int = -1, name: str = "level") -> None:
        self.seconds, self.folder, self.deadly, self.name = seconds, folder, deadly, name

    def __call__(self, images: Images, references: Any = None, prompts: Any = None, **ignored: Any) -> Tensor:
        if self.folder:
            Path(self.folder, str(os.getpid())).touch()
        time.sleep(self.seconds)
        levels = torch.stack([(image * 255).mean().round() for image in images])
        if self.deadly in levels.tolist():
            os.kill(os.getpid(), signal.SIGKILL)
        return levels


def png(level: int, size: int = SIDE) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), level, dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


def parquet(path: Path, levels: Iterable[int], *, group: int = 10, **columns: Any) -> Path:
    """A file with Hugging Face's images and an unsigned id, in row groups of `group`."""
    table = {"image": [{"bytes": png(level), "path": None} for level in levels]}
    ids = pa.array(list(levels), pa.uint8())
    pq.write_table(pa.table({**table, "id": ids, **columns}), path, row_group_size=group)
    return path


def tar(path: Path, files: Mapping[str, bytes] | Iterable[tuple[str, bytes]], mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items() if isinstance(files, Mapping) else files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def folder(path: Path, levels: Iterable[int]) -> Path:
    path.mkdir()
    for level in levels:
        (path / f"{level:03}.png").write_bytes(png(level))
    return path
