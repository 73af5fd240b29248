"""Scores on disk: four bytes under a hash, through diskcache but without its pickles and files."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from iqareward.optional import require

_SCORE = struct.Struct("<f")


@final
class ScoreDisk:
    """A bounded table of scores in a directory, shared by threads and processes.

    diskcache unpickles what it finds, and deletes files that its table names, so whoever can write to the directory
    could run code or delete files (CVE-2025-69872). Here nothing but four raw bytes is ever read; everything else is a
    miss.

    Args:
        directory: made if it does not exist.
        max_bytes: of the table; the scores stored first are dropped first.
    """

    def __init__(self, directory: Path | str, max_bytes: int) -> None:
        diskcache: Any = require("diskcache", extra="cache", purpose="Cached with a directory")

        class RawBytesOnly(diskcache.Disk):
            def get(self, key: Any, raw: Any) -> bytes:
                return bytes(key)

            def store(self, value: bytes, read: bool, key: Any = None) -> tuple[int, int, None, bytes]:
                return 0, diskcache.core.MODE_RAW, None, value

            def fetch(self, mode: int, filename: Any, value: Any, read: bool) -> bytes:
                if mode != diskcache.core.MODE_RAW or type(value) is not bytes or len(value) != _SCORE.size:
                    raise OSError("not a score")  # which diskcache takes for a miss
                return value

            def remove(self, file_path: Any) -> None:
                """There are no files."""

        self._cache = diskcache.Cache(
            str(directory), disk=RawBytesOnly, size_limit=max_bytes, eviction_policy="least-recently-stored"
        )

    def get(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        """What is known of the keys."""
        found = {key: self._cache.get(key, retry=True) for key in keys}
        return {key: _SCORE.unpack(value)[0] for key, value in found.items() if value is not None}

    def put(self, scores: Mapping[bytes, float]) -> None:
        """Keep scores, all of them or none."""
        with self._cache.transact(retry=True):
            for key, score in scores.items():
                self._cache.set(key, _SCORE.pack(score), retry=True)

    def close(self) -> None:
        """End the connection of this thread."""
        self._cache.close()
