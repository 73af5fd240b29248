"""TRL's trainers in two processes: logs, weights and advantages are those of all completions, wherever they are."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.adapters import restoration_run
from tests.adapters.restoration_agent import SEEN
from tests.tolerances import EXACT

pytestmark = pytest.mark.trainer("TRL", "1.16.0", "run", "reader", "processes", "weights")
STEPS, ROWS = 2, 6  # rows per process: three prompts of four completions, the second of which is in both


def work(rank: int, folder: str) -> None:
    """One of two processes of each trainer."""
    import warnings

    import trl

    warnings.filterwarnings("ignore", ".* is deprecated and will be removed in v6", FutureWarning)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # looked for by accelerate, not used
    timeout = timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timeout)
    try:
        for trainer in (trl.GRPOTrainer, trl.RLOOTrainer):
            SEEN.clear()
            place = Path(folder) / trainer.__name__
            options = {"per_device_train_batch_size": ROWS, "learning_rate": 0.01, "max_grad_norm": 0.0}
            records, advantages, trained = restoration_run.run(trainer, place, steps=STEPS, targets="answer", **options)
            weights = [weight.detach() for weight in trained.accelerator.unwrap_model(trained.model).parameters()]
            torch.save((records, advantages, restoration_run.seen(), weights), place / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_two_processes(tmp_path) -> None:
    """The first process logs means over all images, and both learn as one from advantages among all completions."""
    pytest.importorskip("trl")
    mp.start_processes(work, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    for name, scale in (("GRPOTrainer", "group"), ("RLOOTrainer", "none")):
        both = [torch.load(tmp_path / name / f"{rank}.pt", weights_only=False) for rank in range(2)]
        missing = []
        for step in range(STEPS):
            (images, truths), more = (images[step] for _, _, images, _ in both)
            restored, clean = [*images, *more[0]], [*truths, *more[1]]
            log, wanted = restoration_run.expected(restored, clean, scale)
            record = both[0][0][step]
            assert {name: record[name] for name in log} == pytest.approx(log, rel=1e-5)
            whole = torch.cat([advantages[step][0] for _, advantages, _, _ in both])
            if scale == "group":
                torch.testing.assert_close(whole, wanted, rtol=1e-3, atol=1e-4)
            else:
                assert torch.equal(whole.sign(), wanted.sign())
            missing += [[image is None for image in images[step][0]] for _, _, images, _ in both]
        assert len({sum(row) for row in missing}) > 1  # the processes scored different numbers of images
        for one, other in zip(both[0][3], both[1][3], strict=True):
            torch.testing.assert_close(one, other, **EXACT)  # the gradient is the mean of both
