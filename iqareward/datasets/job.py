"""Score whole data sets on Ray: each shard becomes one parquet file, so that a job goes on wherever it was killed."""

import io
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

import iqareward
from iqareward.atomic import atomic_write, remove_parts
from iqareward.datasets.columns import IMAGE_COLUMNS, PROBLEM, Columns, load_rewards
from iqareward.datasets.reading import Kept, read
from iqareward.datasets.samples import Sample, SampleScorer, Scored, is_of_the_device
from iqareward.datasets.shards import Shard, find_shards
from iqareward.datasets.stores import filesystem, is_local, patiently, url
from iqareward.optional import require
from iqareward.types import Reward

MOST_FAILED = 10  # shards; after that it is not the shards
_ATTEMPTS = 3  # to read a shard from a store that fails
_MOST_STARTS = 4  # of a shard
_MOST_BLOCKS = 10_000  # pieces of work that Ray Data keeps track of
_LISTERS = 32  # threads that read the footers of results
_MANIFEST = "_iqareward.json"  # readers of parquet folders leave out names with an underscore
_PART = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}\.parquet")
_SHARD, _ROW, _FACTS = "shard", "row", b"iqareward"


@dataclass
class Facts:
    """What was found in a shard, or in several.

    Attributes:
        rows: number of rows.
        incomplete: rows without every score.
        scores: reward -> number, sum and sum of squares of its scores.
        error: why the shard could not be scored; empty if it was.
        is_fatal: whether others will fail as well.
        example: the first reason why a score is missing.
    """

    rows: int = 0
    incomplete: int = 0
    scores: dict[str, tuple[int, float, float]] = field(default_factory=dict[str, tuple[int, float, float]])
    error: str = ""
    is_fatal: bool = False
    example: str = ""

    def add(self, other: "Facts") -> None:
        """Count another shard."""
        self.rows, self.incomplete = self.rows + other.rows, self.incomplete + other.incomplete
        self.example = self.example or other.example
        for name, found in other.scores.items():
            mine = self.scores.get(name, (0, 0.0, 0.0))
            self.scores[name] = (mine[0] + found[0], mine[1] + found[1], mine[2] + found[2])


class Progress(NamedTuple):
    """How far a job is.

    Attributes:
        shards: number of shards in all.
        done: shards that are scored, those of earlier runs included.
        resumed: shards that earlier runs have scored.
        rows: rows that this run has scored.
        incomplete: rows of this run without every score.
        failed: shards that could not be scored.
        seconds: since the run began.
    """

    shards: int
    done: int
    resumed: int
    rows: int
    incomplete: int
    failed: int
    seconds: float


@dataclass(frozen=True)
class DatasetReport:
    """What a job found, that of earlier runs included.

    Attributes:
        output: folder of the results.
        shards: number of shards.
        resumed: how many of them earlier runs had scored.
        rows: number of rows.
        incomplete: rows without every score; the column `problem` says why.
        failed: shard -> why it could not be scored. A further run tries again.
        scored: reward -> number of scores.
        means: reward -> mean; NaN if there is no score.
        stds: reward -> standard deviation, divided by n - 1; NaN if there are fewer than two scores.
        example: one of the reasons why a score is missing.
        seconds: what this run took, with the start of its processes.
    """

    output: str
    shards: int
    resumed: int
    rows: int
    incomplete: int
    failed: dict[str, str]
    scored: dict[str, int]
    means: dict[str, float]
    stds: dict[str, float]
    example: str
    seconds: float


def score_dataset(
    data: Any,
    rewards: str | Reward | Sequence[str | Reward],
    output: str | Path,
    *,
    images: str = IMAGE_COLUMNS,
    references: str | None = None,
    inputs: str | None = None,
    prompts: str | None = None,
    keep: Sequence[str] | None = None,
    num_gpus: float = 0.0,
    num_cpus: float = 1.0,
    actors: int | None = None,
    batch_size: int = 32,
    address: str | None = None,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> DatasetReport:
    """Score a data set on Ray, here or on a cluster, into a folder of parquet files; run it again to resume.

    The results have the columns `shard` (the file of the data set), `row` (the row there), the columns to keep, one
    per reward (null = not scored) and `problem` (why scores are missing, else empty). A row is written once, whatever
    dies meanwhile.

    Args:
        data: paths, globs or URLs of parquet files, WebDataset archives (.tar, .tar.gz), folders of these or of
            images, folders of Hugging Face's `save_to_disk`; or a `datasets.Dataset`. URLs are those of fsspec, such as
            `s3://` or `hf://`, and need its package for that store.
        rewards: names or sums of the catalogue, or rewards; one or several.
        output: folder or URL for the results.
        images: column, or suffix in an archive, of the images; names with `;` between them are tried in this order.
        references: the same of the references; None = there are none.
        inputs: the same of the degraded images; None = there are none.
        prompts: the same of texts; None = there are none.
        keep: columns to copy into the results; None = all that are flat and no binary content.
        num_gpus: GPUs of a process; a fraction lets several share one, 0 = CPU.
        num_cpus: CPUs of a process; as many threads decode.
        actors: number of processes; None = as many as the cluster has room for when the job starts.
        batch_size: maximum number of images in a batch; fewer if they exceed 512 MiB.
        address: Ray cluster, such as "auto"; None = the one that this process is connected to, else a local one.
        overwrite: remove earlier results first.
        on_progress: called whenever a shard is done.

    Returns:
        Counts, means, and the shards that failed.

    Raises:
        ValueError: a reward, column or path is wrong, or `output` has results of another job.
        OSError: results cannot be written.
        RuntimeError: more than 10 shards failed; what is scored stays.

    Example:
        >>> import tempfile
        >>> import pandas
        >>> report = score_dataset("s3://bucket/laion/*.tar", ["quick", "niqe"], "s3://bucket/scores")  # doctest: +SKIP
        >>> good = pandas.read_parquet("s3://bucket/scores", filters=[("quick", ">", 0.5)])  # doctest: +SKIP
    """
    require("ray.data", extra="data", purpose="score_dataset")
    columns = Columns(images, references, inputs, prompts)
    loaded = load_rewards(rewards, "cuda" if num_gpus else "cpu")
    columns.check(list(loaded.values()))
    if both := {*loaded} & {_SHARD, _ROW}:
        raise ValueError(f"{sorted(both)} are columns of the results. Give the reward another name.")
    place = url(*filesystem(str(output).rstrip("/")))
    shards = find_shards(data, place)
    work = _Work(place, loaded, columns, None if keep is None else list(keep), batch_size, num_gpus, num_cpus)
    with _prepared(work, shards, overwrite) as known:
        total, failed = Facts(), dict[str, str]()
        for facts in known.values():
            total.add(facts)
        todo = [shard for shard in shards if shard.name not in known]
        rows, started = total.rows, time.monotonic()
        with _connected(address) if todo else nullcontext():
            for place, facts in _run(work, todo, actors):
                if facts.is_fatal:
                    raise OSError(f"{todo[place].path}: {facts.error}")
                if facts.error:
                    failed[_label(todo[place])] = facts.error
                total.add(facts)
                known |= {} if facts.error else {todo[place].name: facts}
                if len(failed) > MOST_FAILED:
                    raise RuntimeError(f"{len(failed)} shards failed, the last one because of: {facts.error}")
                if on_progress is not None:
                    seconds, resumed = time.monotonic() - started, len(shards) - len(todo)
                    on_progress(
                        Progress(
                            len(shards), len(known), resumed, total.rows - rows, total.incomplete, len(failed), seconds
                        )
                    )
    counts = {name: total.scores.get(name, (0, 0.0, 0.0)) for name in loaded}
    return DatasetReport(
        work.output, len(shards), len(shards) - len(todo), total.rows, total.incomplete, failed,
        {name: count for name, (count, _, _) in counts.items()},
        {name: added / count if count else math.nan for name, (count, added, _) in counts.items()},
        {name: _std(*found) for name, found in counts.items()}, total.example, time.monotonic() - started,
    )  # fmt: skip


def _std(count: int, added: float, squares: float) -> float:
    return math.sqrt(max(squares - added * added / count, 0.0) / (count - 1)) if count > 1 else math.nan


def _label(shard: Shard) -> str:
    return f"{shard.path} [{shard.start}:{shard.stop}]" if shard.stop else shard.path


@dataclass(frozen=True)
class _Work:
    """What every process needs to know."""

    output: str
    rewards: Mapping[str, Reward]
    columns: Columns
    keep: list[str] | None
    batch_size: int
    num_gpus: float
    num_cpus: float

    def manifest(self) -> dict[str, Any]:
        """What must be the same in all runs that write to one folder."""
        return {
            "iqareward": iqareward.__version__,
            "rewards": list(self.rewards),
            "columns": asdict(self.columns),
            "keep": self.keep,
        }


@contextmanager
def _prepared(work: _Work, shards: Sequence[Shard], overwrite: bool) -> Generator[dict[str, Facts]]:
    """The shards that are scored already, in a folder that nobody else writes to within the block.

    Raises:
        ValueError: the folder has results of another job, or another run writes there.
    """
    fs, folder = filesystem(work.output)
    if fs.exists(folder) and not fs.isdir(folder):
        raise ValueError(f"{work.output} is a file. Name a folder for the results.")
    with ExitStack() as stack:
        if is_local(fs):
            Path(folder).mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(Path(folder) / "_lock", timeout=0))
            except Timeout as error:
                raise ValueError(f"another run writes to {work.output}. Wait for its end.") from error
            remove_parts(Path(folder))
        fs.invalidate_cache()
        paths = fs.ls(folder, detail=False) if fs.exists(folder) else []  # stores have no empty folders
        present = {name for path in paths if _PART.fullmatch(name := path.rpartition("/")[2])}
        manifest = f"{folder}/{_MANIFEST}"
        if overwrite:
            stale = present
        else:
            _agree(work, fs.cat_file(manifest) if fs.exists(manifest) else None, shards, present)
            stale = present - {f"{shard.name}.parquet" for shard in shards}  # of files that have changed
        for name in stale:
            fs.rm_file(f"{folder}/{name}")
        _write(fs, manifest, json.dumps(work.manifest(), indent=1).encode())
        with ThreadPoolExecutor(_LISTERS) as pool:
            paths = [f"{folder}/{name}" for name in sorted(present - stale)]
            found = list(pool.map(lambda path: _facts_of(fs, path), paths))
        yield {
            path.rpartition("/")[2].removesuffix(".parquet"): facts
            for path, facts in zip(paths, found, strict=True)
            if facts is not None
        }


def _agree(work: _Work, manifest: bytes | None, shards: Sequence[Shard], present: set[str]) -> None:
    """Refuse to go on with the results of another job."""
    otherwise = "Choose another folder, or overwrite them."
    before: Any = None
    if manifest is not None:
        try:
            before = json.loads(manifest)
        except ValueError:
            raise ValueError(
                f"{work.output}/{_MANIFEST} is damaged, so its results are not known. {otherwise}"
            ) from None
    if not isinstance(before, dict):
        if present:
            raise ValueError(f"{work.output} has parquet files of another program. {otherwise}")
        return
    for key, mine in work.manifest().items():
        if before.get(key) != mine:  # pyright: ignore
            raise ValueError(
                f"{work.output} has results with {key} {before.get(key)}, now it would be {mine}. {otherwise}"  # pyright: ignore
            )
    places = {shard.place for shard in shards}
    if unknown := [name for name in present if name.partition("-")[0] not in places]:
        raise ValueError(
            f"{work.output} has {len(unknown)} results of data that is not named now, or is gone. Name it too, or: "
            f"{otherwise}"
        )


def _facts_of(fs: Any, path: str) -> Facts | None:
    """What a result says of itself; None if it cannot be read, so that it is made again."""
    pq = require("pyarrow.parquet", extra="data", purpose="score_dataset")
    try:
        with fs.open(path, "rb") as file:
            return Facts(**json.loads(pq.ParquetFile(file).schema_arrow.metadata[_FACTS]))
    except Exception:  # whatever a store or a parser raises
        return None


def _write(fs: Any, path: str, content: bytes) -> None:
    """A reader finds the whole file or none: object stores do that by themselves."""
    if is_local(fs):
        with atomic_write(path) as file:
            file.write(content)
    else:
        fs.pipe_file(path, content)


@contextmanager
def _connected(address: str | None) -> Generator[None]:
    """A connection to Ray: the caller's, a cluster, or a local one that ends with the block."""
    ray = require("ray", extra="data", purpose="score_dataset")
    if ray.is_initialized():
        yield
        return
    # Ray gives its workers a niceness of 15, which leaves them 3 % of a core that another program uses.
    for variable, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}.items():
        os.environ.setdefault(variable, value)
    options = {"address": "local", "include_dashboard": False} if address is None else {"address": address}
    ray.init(**options, log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def _run(work: _Work, shards: Sequence[Shard], actors: int | None) -> Iterator[tuple[int, Facts]]:
    """The place of each shard and what was found there, in the order in which they end."""
    if not shards:
        return
    ray = require("ray", extra="data", purpose="score_dataset")
    data = require("ray.data", extra="data", purpose="score_dataset")
    context = data.DataContext.get_current()
    before = context.enable_progress_bars, context.print_on_execution_start
    context.enable_progress_bars = context.print_on_execution_start = False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that there are no bars, which are those of its own
    try:
        most = min(actors or _room(ray.cluster_resources(), work.num_cpus, work.num_gpus), len(shards))
        places = data.from_items(list(range(len(shards))), override_num_blocks=min(len(shards), _MOST_BLOCKS))
        starts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_starts_counter()).remote()
        done = places.map_batches(
            _ShardScorer,
            fn_constructor_args=(work, ray.put(list(shards)), starts),
            batch_size=1,
            compute=data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=most),
            num_cpus=work.num_cpus,
            num_gpus=work.num_gpus or None,
        )
        for block in done.iter_batches(batch_size=None, prefetch_batches=0):
            for place, facts in zip(block["place"], block["facts"], strict=True):
                yield int(place), Facts(**json.loads(str(facts)))
    finally:
        logger.setLevel(level)
        context.enable_progress_bars, context.print_on_execution_start = before


def _starts_counter() -> type:
    """An actor for how often each shard was begun: Ray repeats without end what kills its process.

    A class of a function is sent whole, so that its process need not import this module, and with it PyTorch.
    """

    class Starts:
        def __init__(self) -> None:
            self._counts: dict[int, int] = {}

        def count(self, place: int) -> int:
            self._counts[place] = self._counts.get(place, 0) + 1
            return self._counts[place]

    return Starts


def _room(resources: Mapping[str, float], num_cpus: float, num_gpus: float) -> int:
    """How many processes the cluster has room for.

    Raises:
        ValueError: not one.
    """
    fits = [int(resources.get("CPU", 0) / num_cpus)] if num_cpus else []
    fits += [int(resources.get("GPU", 0) / num_gpus)] if num_gpus else []
    if not min(fits, default=1):
        raise ValueError(
            f"expected room for a process with {num_cpus:g} CPUs and {num_gpus:g} GPUs, but Ray has "
            f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs."
        )
    return min(fits, default=1)


class _ShardScorer:
    """A process of the pool: it reads, scores and writes one shard after another."""

    def __init__(self, work: _Work, shards: Any, starts: Any) -> None:
        self._ray = require("ray", extra="data", purpose="score_dataset")
        self._work, self._shards, self._starts = work, self._ray.get(shards), starts
        self._scorer = SampleScorer(
            list(work.rewards.values()),
            device="cuda" if work.num_gpus else "cpu",
            batch_size=work.batch_size,
            decoders=max(2, math.ceil(work.num_cpus)),
            stops_if_store_fails=True,
        )

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        places = [int(place) for place in batch["item"]]
        return {
            "place": places,
            "facts": [json.dumps(asdict(self._result(place))) for place in places],
        }

    def _result(self, place: int) -> Facts:
        if self._ray.get(self._starts.count.remote(place)) > _MOST_STARTS:
            return Facts(error=f"{_MOST_STARTS} processes died while they scored it; Ray's log says why")
        shard = self._shards[place]
        try:
            content, facts = patiently(partial(self._scored, shard))
        except Exception as error:  # of the store, the data or a reward: the job goes on with other shards
            if is_of_the_device(error):
                os._exit(1)  # no other shard could be scored in this process; Ray starts another
            return Facts(error=f"{type(error).__name__}: {error}")
        fs, folder = filesystem(self._work.output)
        try:
            fs.makedirs(folder, exist_ok=True)
            _write(fs, f"{folder}/{shard.name}.parquet", content)
        except Exception as error:  # a full disk, or a store without permission
            return Facts(error=f"its results cannot be written: {error}", is_fatal=True)
        return facts

    def _scored(self, shard: Shard) -> tuple[bytes, Facts]:
        """The result of a shard as a parquet file."""
        rows, kept = list[int](), Kept()

        def samples() -> Iterator[Sample]:
            for row, sample in read(shard, self._work.columns, self._work.keep, kept):
                rows.append(row)
                yield sample

        results = [each for batch in self._scorer.score(samples()) for each in batch]
        return _parquet(self._work, shard, rows, kept.columns(), results)


def _parquet(
    work: _Work,
    shard: Shard,
    rows: list[int],
    kept: Mapping[str, Any],
    results: list[Scored],
) -> tuple[bytes, Facts]:
    pa = require("pyarrow", extra="data", purpose="score_dataset")
    pq = require("pyarrow.parquet", extra="data", purpose="score_dataset")
    own = [_SHARD, _ROW, *work.rewards, PROBLEM]
    if both := [name for name in kept if name in own]:
        raise ValueError(f"{shard.path} has columns named {both} like the results. Name the ones to keep: keep=[...]")
    problems = [problem for _, problem in results]
    path = shard.path.encode("utf-8", "backslashreplace").decode()  # names of files may be no text
    facts = Facts(len(rows), sum(map(bool, problems)), example=next(filter(None, problems), ""))
    table = {
        _SHARD: pa.array([path] * len(rows), pa.string()).dictionary_encode(),
        _ROW: pa.array(rows, pa.int64()),
    }
    table |= kept
    for place, name in enumerate(work.rewards):
        found = [values[place] for values, _ in results]
        table[name] = pa.array([None if math.isnan(score) else score for score in found], pa.float32())
        valid = [score for score in found if not math.isnan(score)]
        facts.scores[name] = (len(valid), math.fsum(valid), math.fsum(score * score for score in valid))
    table[PROBLEM] = pa.array(problems, pa.string())
    result = pa.table(table).replace_schema_metadata({_FACTS: json.dumps(asdict(facts))})
    stream = io.BytesIO()
    pq.write_table(result, stream, compression="zstd")
    return stream.getvalue(), facts
