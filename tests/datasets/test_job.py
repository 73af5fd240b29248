"""Data sets on a cluster of two nodes: whatever dies meanwhile, each row is in the results once, with its score."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow.dataset
import pyarrow.parquet
import pytest

from iqareward.datasets import score_dataset
from iqareward.datasets import shards as shards_module
from tests.datasets.levels import Level, folder, parquet, png, tar

pytest.importorskip("ray.data", reason="needs the extra data")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),  # it sets old names of its own options
]
ROWS = {"a.parquet": 60, "b.parquet": 60, "c.tar": 40, "images": 30}


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, "SHARD_ROWS", 10)
        yield


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of this machine; the second has the resource `second`, so that a test can tell them apart."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_health_check_period_ms", "500")  # a dead node is noticed after seconds
        head = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        # its handlers at exit hold clients that crash a forked process of Python 3.13, which drops them
        made = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        try:
            made.add_node(num_cpus=1, object_store_memory=80 * 2**20)
            ray.init(address=made.address, log_to_driver=False)
            made.wait_for_nodes()
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


@pytest.fixture
def data(tmp_path: Path) -> list[Path]:
    """190 rows in four forms, 13 of them damaged; the level of a row is its number."""
    parquet(tmp_path / "a.parquet", range(60))
    damaged = [{"bytes": png(row) if row % 5 else b"damaged", "path": None} for row in range(60)]
    path = parquet(tmp_path / "b.parquet", range(60), group=7)
    table = pyarrow.parquet.read_table(path).set_column(0, "image", pyarrow.array(damaged))
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    whole = tar(tmp_path / "c.tar", {f"{row:03}.png": png(row) for row in range(41)})
    whole.write_bytes(whole.read_bytes()[: -10240 - 300])  # within the last of the files
    folder(tmp_path / "images", range(30))
    return [tmp_path / name for name in ROWS]


def check(output: Path, *, missing: Counter | None = None) -> None:
    """Every row is there once, with its score, or with a reason where its image is damaged."""
    rows = pyarrow.dataset.dataset(output, format="parquet").to_table().to_pylist()
    found = Counter((Path(row["shard"]).name, row["row"]) for row in rows)
    assert set(found.values()) == {1}
    expected = {(name, row) for name, count in ROWS.items() for row in range(count)} | {("c.tar", 40)}
    assert set(found) == expected - (missing or Counter()).keys()
    for row in rows:
        name = Path(row["shard"]).name
        damaged = (name == "b.parquet" and row["row"] % 5 == 0) or (name, row["row"]) == ("c.tar", 40)
        assert (row["level"] is None) == damaged
        assert bool(row["problem"]) == damaged
        assert damaged or row["level"] == row["row"]


def test_every_kind_of_data_set(cluster, data, tmp_path):
    """Scores equal those in process, keys are copied, and a second run finds everything done."""
    seen = []
    report = score_dataset(data, [Level(), Level(name="other")], tmp_path / "out", on_progress=seen.append)
    check(tmp_path / "out")
    assert (report.rows, report.incomplete, report.failed) == (191, 13, {})
    assert report.scored == {"level": 178, "other": 178}
    assert [progress.done for progress in seen] == list(range(1, report.shards + 1))
    assert seen[-1].rows == 191
    table = pyarrow.dataset.dataset(tmp_path / "out", format="parquet").to_table()
    assert {"shard", "row", "level", "other", "problem"} <= {*table.column_names}
    again = score_dataset(data, [Level(), Level(name="other")], tmp_path / "out")
    assert (again.resumed, again.rows, again.means) == (report.shards, 191, report.means)


def test_processes_that_are_killed(cluster, data, tmp_path):
    """Each process is killed once while it scores; the others and its successor do the rest."""
    (tmp_path / "pids").mkdir()
    killed, over = set(), threading.Event()

    def kill() -> None:
        while not over.wait(0.3):
            for file in (tmp_path / "pids").iterdir():
                if len(killed) < 3 and file.name not in killed:
                    killed.add(file.name)
                    os.kill(int(file.name), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        report = score_dataset(data, Level(0.2, str(tmp_path / "pids")), tmp_path / "out")
    finally:
        over.set()
        killer.join()
    assert len(killed) == 3
    assert report.failed == {}
    check(tmp_path / "out")


def test_an_image_that_kills_its_process(cluster, data, tmp_path):
    """Its shard is named after four processes have died, and all others are scored."""
    parquet(tmp_path / "deadly.parquet", [200])
    report = score_dataset([*data, tmp_path / "deadly.parquet"], Level(deadly=200), tmp_path / "out")
    ((shard, reason),) = report.failed.items()
    assert "deadly.parquet" in shard
    assert reason.startswith("4 processes died")
    check(tmp_path / "out")


def test_a_node_that_is_lost(cluster, data, tmp_path):
    """What was scored there is scored again elsewhere."""
    (tmp_path / "pids").mkdir()
    node = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    cluster.wait_for_nodes()

    def lose() -> None:
        while len(list((tmp_path / "pids").iterdir())) < 3:
            time.sleep(0.1)
        cluster.remove_node(node, allow_graceful=False)

    loser = threading.Thread(target=lose)
    loser.start()
    report = score_dataset(data, Level(0.3, str(tmp_path / "pids")), tmp_path / "out", actors=3)
    loser.join()
    assert report.failed == {}
    check(tmp_path / "out")


def test_a_killed_command_is_resumed(data, tmp_path):
    """What was scored stays as it is, the rest follows, and nothing is in the results twice."""
    arguments = [*map(str, data), "--reward", "quick", "--output", str(tmp_path / "out"), "--actors", "1"]
    program = (
        "from iqareward.datasets import shards\nshards.SHARD_ROWS = 10\n"
        "from iqareward.cli import app\nimport sys\napp(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "score", *arguments]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts: list[Path] = []
    while len(parts) < 3 and first.poll() is None:
        time.sleep(0.05)
        parts = list((tmp_path / "out").glob("*.parquet"))
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    before = {part: part.stat().st_mtime_ns for part in parts}
    parts[0].write_bytes(parts[0].read_bytes()[:100])  # as a store without atomic writes may leave it
    second = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert second.returncode == 1, second.stderr  # damaged images are in the data
    assert "178 of 191 images have every score. " in second.stderr.replace("\n", " ")
    assert all(part.stat().st_mtime_ns == before[part] for part in parts[1:])
    rows = pyarrow.dataset.dataset(tmp_path / "out", format="parquet").to_table().to_pylist()
    assert len(rows) == len({(row["shard"], row["row"]) for row in rows}) == 191


def test_a_full_disk(cluster, data, tmp_path):
    """The job ends at once and says why; with room again it goes on, and no part is half a file."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "none", str(disk)], check=False).returncode
    ):
        pytest.skip("no permission to mount a small disk")
    try:
        with pytest.raises(OSError, match=r"cannot be written.*No space left"):
            score_dataset(data, Level(), disk / "out")
        assert not list((disk / "out").glob("*.part"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert score_dataset(data, Level(), disk / "out").failed == {}
        check(disk / "out")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_data_that_changes(cluster, tmp_path):
    """A changed file is scored again, its old results go; other inputs, rewards or programs are refused."""
    one, two = parquet(tmp_path / "one.parquet", range(10)), parquet(tmp_path / "two.parquet", range(10))
    output = tmp_path / "out"
    score_dataset([one, two], Level(), output)
    parquet(one, range(50, 75))
    report = score_dataset([one, two], Level(), output)
    assert (report.shards, report.resumed, report.rows) == (4, 1, 35)
    rows = pyarrow.dataset.dataset(output, format="parquet").to_table().to_pylist()
    assert sorted(row["level"] for row in rows if row["shard"] == str(one)) == list(range(50, 75))
    with pytest.raises(ValueError, match="3 results of data that is not named now"):
        score_dataset([two], Level(), output)
    with pytest.raises(ValueError, match=r"rewards \['level'\], now"):
        score_dataset([one, two], Level(name="other"), output)
    assert score_dataset([two], Level(name="other"), output, overwrite=True).rows == 10
    (tmp_path / "foreign").mkdir()
    parquet(tmp_path / "foreign" / f"{'0' * 16}-{'0' * 16}.parquet", range(1))
    with pytest.raises(ValueError, match="of another program"):
        score_dataset([two], Level(), tmp_path / "foreign")


def test_shards_that_fail(cluster, tmp_path):
    """One is reported and tried again by the next run; many stop the job."""
    good, bad = parquet(tmp_path / "good.parquet", range(10)), tar(tmp_path / "bad.tar", {"a.txt": b"text"})
    report = score_dataset([good, bad], Level(), tmp_path / "out")
    assert report.rows == 10
    assert "expected images named" in report.failed[str(bad)]
    tar(bad, {"a.png": png(7)})
    again = score_dataset([good, bad], Level(), tmp_path / "out")
    assert (again.failed, again.rows, again.resumed) == ({}, 11, 1)
    many = [tar(tmp_path / f"{i}.tar", {"a.txt": b"text"}) for i in range(12)]
    with pytest.raises(RuntimeError, match=r"11 shards failed.*expected images named"):
        score_dataset(many, Level(), tmp_path / "none")


def test_a_store_for_results(cluster, tmp_path):
    """Ray's processes do not share fsspec's memory, so a file URL stands for a store here."""
    path = parquet(tmp_path / "one.parquet", range(10))
    report = score_dataset(f"file://{path}", Level(), f"file://{tmp_path}/out")
    assert report.rows == 10
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 1


def test_no_room(cluster, tmp_path):
    """A process that the cluster has no room for would be waited for without end."""
    path = parquet(tmp_path / "one.parquet", range(10))
    with pytest.raises(
        ValueError, match=r"room for a process with 1 CPUs and 0\.5 GPUs, but Ray has 2 CPUs and 0 GPUs"
    ):
        score_dataset(path, Level(), tmp_path / "out", num_gpus=0.5)
