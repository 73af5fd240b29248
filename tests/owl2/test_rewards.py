"""Both rewards keep the contract and read the network out as documented."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from iqareward.rewards.owl2.rewards import DeQAReward, QAlignReward
from iqareward.testing import check_reward
from tests.gpu import needs_cuda, no_waits
from tests.owl2.owl2_tiny import SMALL, TINY, golden, reference_images, seeded_model
from tests.owl2.test_loading import CONFIG, write_checkpoint
from tests.tolerances import EXACT, FORMULA_FP32, HALF_NETWORK, NETWORK_BATCH

BOTH = ("quality", "aesthetics")


def _images(count: int, height: int = 40, width: int = 64, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def _small(**options) -> QAlignReward:
    return QAlignReward(seeded_model(SMALL), batch_size=options.pop("batch_size", 2), **options)


@pytest.mark.parametrize(
    "reward",
    [
        pytest.param(lambda: _small(), id="qalign"),
        pytest.param(lambda: _small(task=BOTH, scale="mos"), id="both tasks"),
        pytest.param(lambda: _small(differentiable=True), id="differentiable"),
        pytest.param(lambda: DeQAReward(seeded_model(SMALL), scale="flow_grpo", batch_size=2), id="deqa"),
    ],
)
def test_contract(reward) -> None:
    """Shapes, bounds, independence of batch, order, thread and mode, pickling, isolation of broken images."""
    check_reward(reward(), _images(3))


@pytest.mark.parametrize("task", ["quality", "aesthetics"])
def test_scores_of_reference_images_are_the_published_codes(task) -> None:
    """From images in [0, 1] of three sizes to [1, 5], through the public door."""
    reward = QAlignReward(seeded_model(TINY), task=task, scale="mos")
    scores = reward(reference_images())
    torch.testing.assert_close(scores, torch.tensor(golden()[f"score_{task}"]), rtol=0.0, atol=2e-5)


def test_scales_are_affine_of_each_other() -> None:
    """unit = (mos - 1) / 4 and flow_grpo = mos / 5."""
    model, images = seeded_model(SMALL), _images(3)
    mos = DeQAReward(model, scale="mos")(images)
    torch.testing.assert_close(DeQAReward(model)(images), (mos - 1) / 4, **FORMULA_FP32)
    torch.testing.assert_close(DeQAReward(model, scale="flow_grpo")(images), mos / 5, **FORMULA_FP32)


def test_distribution_is_that_of_the_logits() -> None:
    """Probabilities sum to one; mean and deviation are those of a fp64 calculation."""
    reward = DeQAReward(seeded_model(SMALL), scale="mos")
    images = _images(3)
    images[1, 0, 0, 0] = torch.nan
    found = reward.distribution(images)
    p = reward.logits(images).double().softmax(-1)
    levels = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    mean = (p * levels).sum(-1)
    std = (p * (levels - mean[:, None]) ** 2).sum(-1).sqrt()
    torch.testing.assert_close(found.probabilities.double(), p, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(found.mean.double(), mean, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(found.std.double(), std, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(found.mean, reward(images), equal_nan=True, **EXACT)


def test_both_tasks_share_one_pass_and_average() -> None:
    """Per-task scores equal those of single-task rewards; the score is their mean; logits gain a dimension."""
    model, images = seeded_model(SMALL), _images(3)
    both = QAlignReward(model, task=BOTH)
    singles = torch.stack([QAlignReward(model, task=task)(images) for task in BOTH], dim=1)
    torch.testing.assert_close(both.scores_per_task(images), singles, **NETWORK_BATCH)
    torch.testing.assert_close(both(images), singles.mean(1), **NETWORK_BATCH)
    assert both.logits(images).shape == (3, 2, 5)
    assert QAlignReward(model).logits(images).shape == (3, 5)


def test_mixed_sizes_share_batches_and_keep_their_order() -> None:
    """A list of three sizes scores as its images do alone, whatever the micro-batch."""
    images = [*_images(2), *_images(2, 90, 30, seed=1), *_images(1, 56, 56, seed=2)]
    shuffled = [images[i] for i in (2, 0, 4, 3, 1)]
    alone = torch.cat([_small()(image[None]) for image in shuffled])
    for size in (1, 2, 3, 8):
        torch.testing.assert_close(_small(batch_size=size)(shuffled), alone, **NETWORK_BATCH)


def test_eight_threads_get_the_same_numbers() -> None:
    """The first calls, which load and prepare, come from eight threads at once."""
    expected = _small()(_images(4))
    reward = _small()
    with ThreadPoolExecutor(max_workers=8) as pool:
        for scores in pool.map(reward, [_images(4)] * 8):
            torch.testing.assert_close(scores, expected, **EXACT)


def test_gradients_reach_original_pixels_and_no_weight() -> None:
    """A differentiable reward pulls on every pixel of images of two sizes; weights stay frozen."""
    reward = _small(differentiable=True)
    images = [image.requires_grad_() for image in (_images(1)[0], _images(1, 70, 33, seed=1)[0])]
    with torch.no_grad():  # the caller's mode does not matter
        scores = reward(images)
    scores.sum().backward()
    for image in images:
        assert image.grad is not None
        assert image.grad.shape == image.shape
        assert (image.grad != 0).float().mean() > 0.9
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())


def test_loads_lazily_from_a_folder_and_pickles_before(tmp_path) -> None:
    """A reward of a checkpoint is a small pickle, before and after use; the copy loads its own weights."""
    write_checkpoint(tmp_path, seeded_model(CONFIG).state_dict(), kind="safetensors shards")
    # The level ids lie outside this network's small vocabulary; the error comes at the first call, not before.
    reward = QAlignReward(tmp_path)
    assert len(pickle.dumps(reward)) < 5000
    assert pickle.loads(pickle.dumps(reward)).name == reward.name
    assert reward.model.config == CONFIG
    assert len(pickle.dumps(reward)) < 5000


def test_offload_and_onload() -> None:
    """While offloaded a call is an error, not a slow surprise; afterwards scores are what they were."""
    reward = _small()
    expected = reward(_images(2))
    reward.offload()
    with pytest.raises(RuntimeError, match="onload"):
        reward(_images(2))
    reward.onload()
    torch.testing.assert_close(reward(_images(2)), expected, **EXACT)
    torch.testing.assert_close(reward.to("cpu")(_images(2)), expected, **EXACT)


def test_half_precision_network() -> None:
    """bfloat16 weights score near float32 ones, and still answer in float32."""
    images = _images(3)
    expected = _small()(images)
    scores = _small(dtype=torch.bfloat16)(images)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, **HALF_NETWORK)


@pytest.mark.parametrize(
    ("device", "compiled", "backend"),
    [
        pytest.param("cpu", True, "inductor", marks=pytest.mark.slow),
        ("cpu", True, "eager"),
        pytest.param("cuda", "graph", "inductor", marks=[pytest.mark.gpu, needs_cuda]),
        pytest.param("cuda", True, "inductor", marks=[pytest.mark.gpu, needs_cuda]),
    ],
)
def test_graphs_and_compiled_layers_score_as_eager_ones(device, compiled, backend, monkeypatch) -> None:
    """Sizes in turn share their memory, eight threads share a graph, weights move and come back, and nothing waits."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()  # other tests may have compiled the same
    # on a CPU each size costs the compiler half a minute: there sizes take turns without it
    batch_size = 4 if device == "cuda" else 1 if backend == "inductor" else 2
    eager = _small(device=device, batch_size=batch_size, task=BOTH)
    reward = _small(device=device, batch_size=batch_size, task=BOTH, compiled=compiled)
    images = _images(6).to(device)
    expected = eager(images)
    for count in (1, 4, 2, 6, 3, 1):
        torch.testing.assert_close(reward(images[:count]), expected[:count], **NETWORK_BATCH)
    with no_waits():
        scores = reward(images)
    torch.testing.assert_close(scores, expected, **NETWORK_BATCH)
    parts = [images[:count] for count in (1, 4, 2, 3)] * 4
    with ThreadPoolExecutor(max_workers=8) as pool:
        for scores in pool.map(reward, parts):
            torch.testing.assert_close(scores, expected[: len(scores)], **NETWORK_BATCH)
    reward.offload()
    reward.onload()
    torch.testing.assert_close(reward(images), expected, **NETWORK_BATCH)


def test_layers_of_a_kind_share_one_compilation(monkeypatch) -> None:
    """Vision tower, abstractor and decoder are compiled once each for a batch size, however many layers they have."""
    from torch._dynamo.utils import counters

    # what is counted comes before the backend, of which the usual one, tested above, takes a minute for this
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()  # other tests may have compiled the same
    deep = replace(SMALL, vision_layers=3, abstractor_layers=3, layers=4)
    reward = QAlignReward(seeded_model(deep), batch_size=4, compiled=True)
    for count, kinds in ((2, 3), (4, 3), (3, 0)):  # three images are padded to four
        before = counters["stats"]["unique_graphs"]
        reward(_images(count))
        assert counters["stats"]["unique_graphs"] - before == kinds


def test_a_cuda_graph_needs_cuda() -> None:
    """`compiled="graph"` elsewhere is an error that says what to use, not a slow surprise."""
    reward = _small(compiled="graph", device="cpu")
    with pytest.raises(ValueError, match=r"CUDA device.*compiled=True"):
        reward(_images(1))


def test_bad_options_are_refused() -> None:
    """Each error says what was expected."""
    with pytest.raises(ValueError, match="aesthetics"):
        QAlignReward(task="beauty")
    with pytest.raises(ValueError, match="different tasks"):
        QAlignReward(task=("quality", "quality"))
    with pytest.raises(ValueError, match="unit"):
        QAlignReward(scale="percent")
    with pytest.raises(ValueError, match="at most one"):
        DeQAReward(differentiable=True, compiled=True)
    with pytest.raises(ValueError, match='True or "graph"'):
        DeQAReward(compiled="graphs")
    with pytest.raises(ValueError, match="batch_size"):
        DeQAReward(batch_size=0)
