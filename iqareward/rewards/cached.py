"""Remember scores, so that repeated images are not scored again."""

import hashlib
import os
import sqlite3
import struct
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

import iqareward
from iqareward.rewards.calls import Call
from iqareward.rewards.core import BaseReward, Wrapper, numbers, refuse_groups
from iqareward.rewards.loading import LazyModel, tensors_of
from iqareward.rewards.threads import PerProcess, fork_waits_for
from iqareward.types import Images, Reward, Scores

T = TypeVar("T")

_SCORE = struct.Struct("<f")
_ROW_BYTES = 105  # a row with its place in the index takes 69 to 102
_BUSY_SECONDS = 10.0  # how long to wait for another process that writes
# SQLite keeps its own record of which files this process has locked, and a fork in the middle would copy it
_OPEN = threading.RLock()
fork_waits_for(_OPEN)


@final
class _ScoreDisk:
    """A bounded table of scores in a directory, shared by threads and processes.

    Nothing but bytes with the right checksum is taken for a score; every other row is a miss. When the file cannot be
    read it is not used any more, and when it cannot be written, only read; a warning says so once. It is never deleted.

    Args:
        directory: made if it does not exist.
        max_bytes: How large the table may grow before its oldest scores are dropped.
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


_DIGEST_BYTES = 20


@final
class Cached(Wrapper):
    """Cache the scores of a reward by pixels, references, inputs, prompts and tasks.

    This pays for repeated images and a reward that costs more than hashing them (about a millisecond for
    512 x 512 pixels). The pixels are hashed on the host, so images on a GPU are copied and waited for. Scores are
    those of the first time, bit for bit; NaN is computed again.

    Args:
        reward: Any reward that is not differentiable.
        max_entries: The most scores to keep in memory; the least recently used are dropped.
        directory: A folder that keeps scores for other runs and processes. If it cannot be used, for example because
            the disk is full, a warning says so once, and scores are computed.
        max_bytes: The largest size of the directory.
        version: Part of the key, with the reward's options, such as `weights`, and this library's version. Change it
            when your own code changes: the directory sees names of functions only. It sees the name, size and time of a
            file of weights, or of the files in their folder, and the values of a network that is given as an object.
        cache_nan: Keep NaN too. Off by default, because a server that was down may be up again.

    Raises:
        ValueError: The reward is differentiable (a stored score has no graph) or compares images with each other, or a
            limit is below 1.

    Example:
        >>> import torch, iqareward
        >>> reward = iqareward.Cached(iqareward.load("ssim"))
        >>> images, clean = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> first, again = reward(images, references=clean), reward(images, references=clean)
        >>> torch.equal(first, again), reward.hits, reward.misses
        (True, 2, 2)
    """

    def __init__(
        self,
        reward: Reward,
        *,
        max_entries: int = 100_000,
        directory: Path | str | None = None,
        max_bytes: int = 2**30,
        version: str = "",
        cache_nan: bool = False,
    ) -> None:
        super().__init__(reward)
        refuse_groups("Cached", reward)
        if reward.differentiable:
            raise ValueError(f"Cached expected a reward without gradients, got {reward.name} with differentiable=True.")
        numbers("Cached", max_entries=max_entries, max_bytes=max_bytes)
        if max_entries < 1 or max_bytes < 1:
            raise ValueError(f"Cached expected max_entries and max_bytes >= 1, got {max_entries} and {max_bytes}.")
        described = None if directory is None else _described(reward)
        self._prefix = repr((iqareward.__version__, reward.name, described, version)).encode()
        self._store = PerProcess(partial(_Store, max_entries, directory, max_bytes, cache_nan))

    def score_call(self, call: Call) -> Scores:
        call.check(self.name)
        keys = list(self._keys(call))
        store = self._store.get()
        known = store.get(keys)
        new = {key: row for row, key in reversed(list(enumerate(keys))) if key not in known}  # the first of each
        if new:
            rows = sorted(new.values())
            scores = call.rows(rows).score(self.reward).tolist()
            fresh = {keys[row]: score for row, score in zip(rows, scores, strict=True)}
            store.put(fresh)
            known |= fresh
        return torch.tensor([known[key] for key in keys], dtype=torch.float32, device=call.device)

    @property
    def hits(self) -> int:
        """Images answered from the cache of this process so far."""
        return self._store.get().hits

    @property
    def misses(self) -> int:
        """Images looked up in vain; of several equal ones in a call, each counts."""
        return self._store.get().misses

    def close(self) -> None:
        """Forget what is in memory; a later call starts again."""
        self._store.get().forget()

    def _keys(self, call: Call) -> Iterator[bytes]:
        """A hash for each row."""
        columns = [_on_host(column) for column in (call.images, call.references, call.inputs) if column is not None]
        for row in range(len(call)):
            digest = hashlib.blake2b(self._prefix, digest_size=_DIGEST_BYTES)
            for column in columns:
                pixels = column[row]
                digest.update(repr(tuple(pixels.shape)).encode())
                digest.update(pixels.numpy().data)
            for name, column in call.labels.items():
                digest.update(repr((name, column[row])).encode())
            yield digest.digest()


@final
class _Store:
    """Scores by key, in memory and perhaps on disk."""

    def __init__(self, max_entries: int, directory: Path | str | None, max_bytes: int, keep_nan: bool) -> None:
        self._lock = threading.Lock()
        self._memory: OrderedDict[bytes, float] = OrderedDict()
        self._max_entries, self._keep_nan = max_entries, keep_nan
        self._disk = None if directory is None else _ScoreDisk(directory, max_bytes)
        self.hits = self.misses = 0

    def get(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        with self._lock:
            found = {key: self._memory[key] for key in keys if key in self._memory}
            for key in found:
                self._memory.move_to_end(key)
        if self._disk is not None and len(found) < len(keys):
            stored = self._kept(self._disk.get([key for key in keys if key not in found]))
            self._remember(stored)
            found |= stored
        with self._lock:
            hits = sum(key in found for key in keys)
            self.hits, self.misses = self.hits + hits, self.misses + len(keys) - hits
        return found

    def put(self, scores: Mapping[bytes, float]) -> None:
        kept = self._kept(scores)
        self._remember(kept)
        if self._disk is not None and kept:
            self._disk.put(kept)

    def forget(self) -> None:
        with self._lock:
            self._memory.clear()

    def _kept(self, scores: Mapping[bytes, float]) -> dict[bytes, float]:
        """Without NaN unless asked: those on the disk may be another run's."""
        return {key: score for key, score in scores.items() if self._keep_nan or score == score}

    def _remember(self, scores: Mapping[bytes, float]) -> None:
        with self._lock:
            self._memory.update(scores)
            while len(self._memory) > self._max_entries:
                self._memory.popitem(last=False)


_NOT_WHAT_IT_COMPUTES = {"batch_size", "_watch"}


def _described(value: Any) -> Any:
    """What a reward computes with, as values whose `repr` is the same in every process."""
    if isinstance(value, BaseReward):
        state = {key: each for key, each in value.__getstate__().items() if key not in _NOT_WHAT_IT_COMPUTES}
        return type(value).__qualname__, _described(state)
    if isinstance(value, LazyModel):
        return _described(value.build)
    if isinstance(value, partial):
        return _described((value.func, value.args, value.keywords))
    if isinstance(value, Mapping):
        return sorted((str(key), _described(each)) for key, each in value.items())
    if isinstance(value, tuple | list):
        return [_described(each) for each in value]
    if isinstance(value, Tensor):
        return hashlib.blake2b(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__qualname__, _described(vars(value))
    if isinstance(value, nn.Module):
        return type(value).__qualname__, [_described(tensor) for tensor in tensors_of(value)]
    if isinstance(value, str | Path):
        return str(value), _written(value)
    if isinstance(value, int | float | torch.dtype | NoneType):
        return str(value)
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _written(path: str | Path) -> Any:
    """Size and time of a file or of those in a folder: weights may be written anew in place. Else nothing."""
    try:
        if os.path.isdir(path):
            return sorted((each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in os.scandir(path))
        return os.stat(path).st_size, os.stat(path).st_mtime_ns
    except (OSError, ValueError):  # no path, or none that a file can have
        return None


def _on_host(images: Images) -> Sequence[Tensor]:
    """Rows as the float32 that rewards compute in, so that the same pixels have one key in every dtype and layout."""
    if isinstance(images, Tensor):
        return images.detach().cpu().float().contiguous().unbind(0)
    return [image.detach().cpu().float().contiguous() for image in images]
