"""LevelReward keeps the contract for every supported family and reads the level words as documented."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import iqareward
from benchmarks.meter import Meter
from iqareward.rewards import core
from iqareward.rewards.vlm import inputs
from iqareward.rewards.vlm.network import Network
from iqareward.rewards.vlm.presets import Q_REALIGN, ZERO_SHOT_LEVELS
from iqareward.rewards.vlm.rewards import LevelReward, QReAlignReward, zero_shot_level_reward
from iqareward.testing import check_reward
from tests.gpu import fake_gpu
from tests.tolerances import EXACT, FORMULA_FP32, HALF_NETWORK, NETWORK_BATCH
from tests.vlm import tiny


def reward(family: str, **options) -> LevelReward:
    return LevelReward(options.pop("model", None) or tiny.pair(family), **options)


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_contract(family, differentiable) -> None:
    """The public check of everything that a reward promises."""
    # a model of its own: once used, some of transformers' models carry hooks that cannot be pickled
    model, processor = tiny.model(family, tiny.pair(family)[1].tokenizer), tiny.pair(family)[1]
    made = reward(family, model=(model, processor), differentiable=differentiable, batch_size=2)
    check_reward(made, tiny.images(3, 56, 64))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_mixed_sizes_keep_their_order(family) -> None:
    """A list of three sizes scores as its images do alone, whatever the micro-batch."""
    images = [*tiny.images(2), *tiny.images(2, 60, 40, seed=1), *tiny.images(1, 56, 112, seed=2)]
    shuffled = [images[i] for i in (2, 0, 4, 3, 1)]
    alone = torch.cat([reward(family)(image[None]) for image in shuffled])
    assert len(set(alone.tolist())) == 5
    for size in (1, 2, 8):
        torch.testing.assert_close(reward(family, batch_size=size)(shuffled), alone, **NETWORK_BATCH)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_score_is_the_expected_level(family) -> None:
    """Against fp64 arithmetic on logits of a plain call of the model."""
    model, processor = tiny.pair(family)
    made, images = reward(family, scale="mos"), tiny.images(2)
    network = Network(model, processor)
    inputs = network.family.images(images)
    assert inputs is not None
    text = made.prompt
    own = processor(text=[text] * 2, images=list(images), do_rescale=False, return_tensors="pt")
    own.update({k: torch.tensor(v) if isinstance(v, list) else v for k, v in inputs.keywords.items()})
    ids = [processor.tokenizer(text + word)["input_ids"][-1] for word in ZERO_SHOT_LEVELS.levels]
    logits = model(**own).logits[:, -1].double()
    p = logits[:, ids].softmax(-1)
    levels = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    mean = (p * levels).sum(-1)
    found = made.distribution(images)
    torch.testing.assert_close(made(images).double(), mean, **NETWORK_BATCH)
    torch.testing.assert_close(found.mean, made(images), **FORMULA_FP32)
    torch.testing.assert_close(found.probabilities.double(), p, **NETWORK_BATCH)
    std = (p * (levels - mean[:, None]) ** 2).sum(-1).sqrt()
    torch.testing.assert_close(found.std.double(), std, **NETWORK_BATCH)
    torch.testing.assert_close(made.mass(images).double(), logits.softmax(-1)[:, ids].sum(-1), **NETWORK_BATCH)
    torch.testing.assert_close(reward(family)(images), (made(images) - 1) / 4, **FORMULA_FP32)


@pytest.mark.parametrize("size", [(56, 64), (75, 61)])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradient_is_that_of_finite_differences(family, size, monkeypatch) -> None:
    """In fp64, along a random direction in the pixels, with and without a resize; rounding to levels is left out."""
    made = reward(family, model=tiny.pair(family, torch.float64), differentiable=True)
    images = tiny.images(2, *size).double().requires_grad_()

    def smooth(levels: Tensor, target: tuple[int, int]) -> Tensor:
        from iqareward.functional.resize import bicubic_coefficients

        weights = [torch.tensor(bicubic_coefficients(n, m) / 2.0**22) for n, m in zip(levels.shape[-2:], target)]
        return weights[0].T @ levels @ weights[1]

    monkeypatch.setattr(inputs, "to_levels", lambda images: images * 255)
    monkeypatch.setattr(inputs, "resize_levels", smooth)
    monkeypatch.setattr(core, "clean", lambda batches, *_: (batches, torch.ones(1, 2, dtype=torch.bool)))
    made(images).sum().backward()
    assert images.grad is not None
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = 1e-3

    def score(sign: int) -> float:
        logits = made.logits(images.detach() + sign * step * direction).double()
        return float((logits.softmax(-1) @ torch.tensor(ZERO_SHOT_LEVELS.worth, dtype=torch.float64)).sum())

    expected = (score(1) - score(-1)) / (2 * step)
    assert abs(expected) > 5e-3
    # logits are read in float32, whose last digit over two steps is 3e-5
    assert float((images.grad * direction).sum()) == pytest.approx(expected, rel=2e-3, abs=1e-4)


def test_gradients_reach_original_pixels_and_no_weight() -> None:
    """A differentiable reward pulls on the pixels of images of two sizes that are resized; weights stay frozen."""
    made = reward("qwen2_5_vl", differentiable=True)
    images = [image.requires_grad_() for image in (tiny.images(1)[0], tiny.images(1, 70, 33, seed=1)[0])]
    with torch.no_grad():  # the caller's mode does not matter
        scores = made(images)
    scores.sum().backward()
    for image in images:
        assert image.grad is not None
        assert image.grad.shape == image.shape
        assert (image.grad != 0).float().mean() > 0.9
    assert not any(parameter.requires_grad for parameter in made.model.parameters())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loads_from_a_folder_and_recomputes_layers(tmp_path, family) -> None:
    """A checkpoint scores as the model it was saved from; recomputing layers changes neither scores nor gradients."""
    model, processor = tiny.pair(family)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images = tiny.images(2).requires_grad_()
    loaded, plain = reward(family, model=tmp_path, differentiable=True), reward(family, differentiable=True)
    assert len(pickle.dumps(loaded)) < 5000
    torch.testing.assert_close(loaded(images), plain(images), **EXACT)
    (found,) = torch.autograd.grad(loaded(images).sum(), images)
    (expected,) = torch.autograd.grad(plain(images).sum(), images)
    torch.testing.assert_close(found, expected, **FORMULA_FP32)
    kept = _kept_bytes(loaded, images)
    assert kept < _kept_bytes(plain, images)
    loaded.offload()
    loaded.onload()
    torch.testing.assert_close(loaded.to("cpu")(images), plain(images), **EXACT)
    assert len(pickle.dumps(loaded)) < 5000


@fake_gpu
@pytest.mark.parametrize(("family", "saved"), [("qwen2_5_vl", 5 * 9), ("qwen3_vl", 5 * 9), ("internvl", 5 * 5)])
def test_loaded_models_have_fused_norms(tmp_path, family, saved) -> None:
    """One kernel in place of six, and close in bfloat16; a model that is given stays as it is."""
    processor = tiny.pair(family)[1]
    given, images = tiny.model(family, processor.tokenizer, torch.bfloat16), tiny.images(2)
    kinds = [type(module) for module in given.modules()]
    given.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    rewards = [reward(family, model=(given, processor)), reward(family, model=tmp_path, dtype=torch.bfloat16)]
    torch.testing.assert_close(rewards[1](images), rewards[0](images), **HALF_NETWORK)
    assert [type(module) for module in given.modules()] == kinds
    kernels = []
    for made in rewards:
        with Meter() as meter:
            made.to("cuda")
            there = torch.rand(images.shape, device="cuda")
            meter.second(lambda made=made, there=there: made(there))
        kernels.append(meter.kernels)
    assert kernels[0] - kernels[1] >= saved


def _kept_bytes(made: LevelReward, images: Tensor) -> int:
    """What autograd keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made(images)
    return sum(kept.values())


def test_eight_threads_get_the_same_numbers() -> None:
    """The first calls, which load and prepare, come from eight threads at once, with two sizes of image."""
    for family in ("qwen2_5_vl", "llava_onevision"):
        batches = [tiny.images(2), tiny.images(2, 60, 40)] * 8
        expected = [reward(family)(batch) for batch in batches[:2]]
        made = reward(family)
        with ThreadPoolExecutor(max_workers=8) as pool:
            for index, scores in enumerate(pool.map(made, batches)):
                torch.testing.assert_close(scores, expected[index % 2], **EXACT)


def test_offload_and_onload() -> None:
    """While offloaded a call is an error, not a slow surprise; afterwards scores are what they were."""
    made, images = reward("qwen3_vl"), tiny.images(2)
    expected = made(images)
    made.offload()
    with pytest.raises(RuntimeError, match="onload"):
        made(images)
    made.onload()
    torch.testing.assert_close(made(images), expected, **EXACT)
    torch.testing.assert_close(made.to("cpu")(images), expected, **EXACT)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_half_precision_network(family) -> None:
    """bfloat16 weights score near float32 ones, and still answer in float32."""
    tok = tiny.pair(family)[1].tokenizer
    half = reward(family, model=(tiny.model(family, tok), tiny.pair(family)[1]), dtype=torch.bfloat16)
    scores = half(tiny.images(3))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(family)(tiny.images(3)), **HALF_NETWORK)


def test_images_too_long_for_the_model_are_not_scored() -> None:
    """A strip that the model's own processor refuses gets NaN; its neighbours do not notice."""
    images = [tiny.images(1)[0], tiny.images(1, 1, 300)[0]]
    scores = reward("qwen2_5_vl")(images)
    assert scores.isnan().tolist() == [False, True]
    torch.testing.assert_close(scores[:1], reward("qwen2_5_vl")(images[:1]), **EXACT)


def test_presets_choose_question_words_and_worth() -> None:
    """Other words and worths are other scores; bounds and names follow."""
    yes = replace(ZERO_SHOT_LEVELS, levels=(" good", " bad"), worth=(1.0, 0.5))
    made = reward("qwen2_5_vl", preset=yes, scale="mos", name="halves")
    assert made.bounds == (3.0, 5.0)
    assert made.name == "halves"
    assert made.logits(tiny.images(2)).shape == (2, 2)
    aesthetics = QReAlignReward("mini", "aesthetics", weights=tiny.pair("qwen3_5"))
    assert aesthetics.name == "qrealign_aesthetics"
    assert aesthetics.prompt.endswith("</think>\n\nThe aesthetics of the image is")
    quality = QReAlignReward("mini", weights=tiny.pair("qwen3_5"))
    assert (quality(tiny.images(2)) != aesthetics(tiny.images(2))).all()
    assert quality.preset == Q_REALIGN["quality"]
    assert zero_shot_level_reward(tiny.pair("internvl")).preset == ZERO_SHOT_LEVELS


def test_bad_options_are_refused() -> None:
    """Each error says what was expected; a wrong level word is found when the model is loaded."""
    with pytest.raises(ValueError, match="unit"):
        LevelReward("owner/name", scale="percent")
    with pytest.raises(ValueError, match="batch_size"):
        LevelReward("owner/name", batch_size=0)
    with pytest.raises(ValueError, match="pair"):
        LevelReward((1, 2, 3))
    with pytest.raises(ValueError, match="mini"):
        QReAlignReward("huge")
    with pytest.raises(ValueError, match="no such folder"):
        LevelReward("nothing-here")(tiny.images(1))
    split = replace(ZERO_SHOT_LEVELS, levels=(" good", " dreadful"), worth=(1.0, 0.0))
    with pytest.raises(ValueError, match="' dreadful' to be one token"):
        reward("qwen2_5_vl", preset=split)(tiny.images(1))


def test_a_checkpoint_without_its_head_is_refused(tmp_path) -> None:
    """Weights that are missing would be drawn at random by the library, and score plausibly."""
    model, processor = tiny.pair("qwen2_5_vl")
    state = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights of its model: lm_head\.weight"):
        LevelReward(tmp_path)(tiny.images(1))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_saved_models_load(tmp_path, family) -> None:
    """No check of files refuses what transformers itself wrote, whatever the family, also in shards."""
    model, processor = tiny.pair(family)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    processor.save_pretrained(tmp_path)
    expected = LevelReward((model, processor))(tiny.images(2))
    torch.testing.assert_close(LevelReward(tmp_path)(tiny.images(2)), expected, **NETWORK_BATCH)


HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state[HEAD].fill_(torch.nan), r"safetensors has NaN or infinite values in lm_head\.weight"),
        (lambda state: state[HEAD].zero_(), r"nothing but zeros in lm_head\.weight"),
        (
            lambda state: state.update({HEAD: state[HEAD].to(torch.int8)}),
            r"safetensors has lm_head\.weight as torch\.int8",
        ),
        (
            lambda state: state.update({"model.layers.0.lora_A.weight": torch.ones(1)}),
            r"adapter that is not merged: .*lora_A",
        ),
        (lambda state: state.update({HEAD: state[HEAD][1:].clone()}), r"cannot load .*|lacks weights .*lm_head"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, change, message) -> None:
    """Weights that transformers would take as they are, or replace, or leave out."""
    model, processor = tiny.pair("qwen2_5_vl")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = {key: value.clone() for key, value in load_file(file).items()}
    change(state)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        LevelReward(tmp_path)(tiny.images(1))


def test_weights_that_play_no_part_are_named(tmp_path) -> None:
    """A value head that an RL trainer left behind does not keep a checkpoint from scoring."""
    model, processor = tiny.pair("qwen2_5_vl")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"v_head.bias": torch.ones(1)}, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"v_head\.bias"):
        scores = LevelReward(tmp_path)(tiny.images(1))
    torch.testing.assert_close(scores, LevelReward((model, processor))(tiny.images(1)), **NETWORK_BATCH)


@pytest.mark.parametrize("value", [10**6, 10**9, 0, -1, True, "2", 2.5, [2]])
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_absurd_sizes_are_refused(tmp_path, key, value) -> None:
    """Sizes that the weights cannot have are found before transformers builds them."""
    model, processor = tiny.pair("qwen2_5_vl")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["text_config"][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json says text_config\.{key} = "):
        LevelReward(tmp_path)(tiny.images(1))


def test_damaged_files_are_refused(tmp_path) -> None:
    """A truncated or contradictory file of the folder is a ValueError, or the library's error that names it."""
    model, processor = tiny.pair("qwen2_5_vl")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for name in (
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
    ):
        path = tmp_path / name
        if not path.is_file():
            continue
        whole = path.read_bytes()
        for damaged in (b"", whole[: len(whole) // 2], b"[]", b"\xff\xfe" + whole):
            path.unlink()
            path.write_bytes(damaged)
            with pytest.raises((ValueError, OSError)):
                LevelReward(tmp_path)(tiny.images(1))
        path.write_bytes(whole)
    assert LevelReward(tmp_path)(tiny.images(1)).isfinite().all()


def test_without_transformers_the_error_names_the_extra(monkeypatch) -> None:
    """The reward can be built, and says what to install when it has to load."""
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    made = LevelReward("owner/name")
    with pytest.raises(ImportError, match=r"iqareward\[vlm\]"):
        made(tiny.images(1))


def test_old_transformers_are_refused(monkeypatch) -> None:
    """Earlier versions take other arguments: better said than found out."""
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "version", lambda package: "5.2.0")
    with pytest.raises(ImportError, match=r"(?s)transformers>=5\.7.*upgrade"):
        reward("qwen2_5_vl")(tiny.images(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda preset: iqareward.LevelReward("owner/name", preset),
        lambda preset: iqareward.RatingReward("owner/name", preset),
        lambda preset: iqareward.ServedVLMReward("http://127.0.0.1:1/v1", "name", preset),
    ],
)
def test_a_name_is_not_a_preset(make) -> None:
    """What is not a preset is refused when the reward is made."""
    with pytest.raises(TypeError, match=r"Preset.*got str.*iqareward\.rewards"):
        make("q_insight")
