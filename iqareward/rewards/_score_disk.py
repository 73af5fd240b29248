"""Scores on disk: eight bytes under a hash, in a SQLite file that may be damaged, full, locked or someone else's."""

import hashlib
import sqlite3
import struct
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TypeVar, final

from iqareward.rewards._per_process import fork_waits_for

T = TypeVar("T")

_SCORE = struct.Struct("<f")
_ROW_BYTES = 105  # a row with its place in the index takes 69 to 102
_BUSY_SECONDS = 10.0  # how long to wait for another process that writes
# SQLite keeps its own record of which files this process has locked, and a fork in the middle would copy it
_OPEN = threading.RLock()
fork_waits_for(_OPEN)


@final
class ScoreDisk:
    """A bounded table of scores in a directory, shared by threads and processes.

    Nothing but bytes with the right checksum is taken for a score; every other row is a miss. When the file cannot be
    read it is not used any more, and when it cannot be written, only read; a warning says so once. It is never deleted.

    Args:
        directory: made if it does not exist.
        max_bytes: of the table; the scores stored first are dropped first.
    """

    def __init__(self, directory: Path | str, max_bytes: int) -> None:
        self._path = Path(directory) / "scores.sqlite3"
        self._max_rows = max(1, max_bytes // _ROW_BYTES)
        self._usable = {"read", "write"}

    def get(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        """What is known of the keys."""
        return self._use("read", partial(_read, keys)) or {}

    def put(self, scores: Mapping[bytes, float]) -> None:
        """Keep scores, all of them or none."""
        self._use("write", partial(_write, scores, self._max_rows))

    def _use(self, purpose: str, action: Callable[[sqlite3.Connection], T]) -> T | None:
        """A connection for each use, so that none is shared by threads or inherited by a forked child."""
        with _OPEN:
            if purpose not in self._usable:
                return None
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level="IMMEDIATE")
                with closing(connection):
                    connection.text_factory = bytes  # a damaged row may be text that is none
                    connection.execute("PRAGMA trusted_schema = OFF")
                    connection.execute("PRAGMA synchronous = OFF")  # fast; a crash of the machine may damage the file
                    connection.execute(
                        "CREATE TABLE IF NOT EXISTS scores "
                        "(place INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, value BLOB NOT NULL)"
                    )
                    return action(connection)
            except Exception as error:  # SQLite raises anything for damaged files
                self._usable -= {"read", "write"} if purpose == "read" else {"write"}
                reason = f"{type(error).__name__}: {error}"
        use = "does not use it any more" if purpose == "read" else "adds no more scores to it"
        warnings.warn(
            f"Cached cannot {purpose} {self._path} ({reason}), and {use} in this process. Scores are computed and "
            "returned as usual. If the file is damaged, delete it; otherwise free space on the disk, change the "
            "permissions, or choose another `directory`.",
            RuntimeWarning,
            stacklevel=5,  # whoever calls Cached
        )
        return None


def _read(keys: Sequence[bytes], connection: sqlite3.Connection) -> dict[bytes, float]:
    found: dict[bytes, float] = {}
    connection.execute("BEGIN")  # locks the file once instead of for each key
    for key in keys:
        row = connection.execute("SELECT value FROM scores WHERE key = ?", (key,)).fetchone()
        value = row[0] if row else None
        if isinstance(value, bytes) and value == _sealed(key, value[: _SCORE.size]):
            found[key] = _SCORE.unpack_from(value)[0]
    return found


def _write(scores: Mapping[bytes, float], max_rows: int, connection: sqlite3.Connection) -> None:
    rows = [(key, _sealed(key, _SCORE.pack(score))) for key, score in scores.items()]
    with connection:
        connection.executemany("INSERT OR REPLACE INTO scores (key, value) VALUES (?, ?)", rows)
        connection.execute("DELETE FROM scores WHERE place <= (SELECT max(place) FROM scores) - ?", (max_rows,))


def _sealed(key: bytes, score: bytes) -> bytes:
    """A score and its checksum."""
    return score + hashlib.blake2b(key + score, digest_size=4).digest()
