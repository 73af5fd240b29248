"""RatingReward is the mean of all answers that may be written, and the published protocol is at hand."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.meter import Meter
from iqareward.rewards import CATALOG, ImageReward
from iqareward.rewards.vlm import rewards
from iqareward.rewards.vlm.answers import DigitReadout, GumbelNoise
from iqareward.rewards.vlm.inputs import tokenize
from iqareward.rewards.vlm.network import Network
from iqareward.rewards.vlm.presets import Q_INSIGHT, VISUALQUALITY_R1, Ratings
from iqareward.rewards.vlm.rewards import (
    LevelReward,
    QInsightReward,
    QReAlignReward,
    RatingReward,
    VisualQualityR1Reward,
)
from iqareward.testing import check_reward
from tests.gpu import fake_gpu
from tests.tolerances import EXACT, FORMULA_FP32, NETWORK_BATCH
from tests.vlm import tiny

SHORT = replace(VISUALQUALITY_R1, question="Rate this picture.", ratings=Ratings(1, 5, decimals=1))
RECURRENT = "qwen3_5"


def reward(family: str, preset=SHORT, **options: Any) -> RatingReward:
    source = options.pop("model", None) or tiny.pair(family)
    return RatingReward(source, preset, min_digit_mass=options.pop("min_digit_mass", 0.0), **options)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_contract(family) -> None:
    """The public check of everything that a reward promises."""
    model, processor = tiny.model(family, tiny.pair(family)[1].tokenizer), tiny.pair(family)[1]
    differentiable = family != RECURRENT
    made = reward(family, model=(model, processor), differentiable=differentiable, batch_size=2)
    check_reward(made, tiny.images(3, 56, 64))


def answers(ratings: Ratings) -> list[str]:
    """All of them, written out."""
    unit = 10**ratings.decimals
    return [f"{number / unit:.{ratings.decimals}f}" for number in range(ratings.low * unit, ratings.high * unit + 1)]


def enumerated(family: str, image: Tensor, preset, made: RatingReward) -> tuple[float, float]:
    """Mean over every answer, and digit mass, from plain calls of the model on the whole text of each answer."""
    model, processor = tiny.pair(family)
    inputs = Network(model, processor).family.images(image[None])
    assert inputs is not None
    written = answers(preset.ratings)
    characters = {character: processor.tokenizer(character)["input_ids"][0] for character in "0123456789."}
    own = processor(text=[made.prompt], images=[image], do_rescale=False, return_tensors="pt")
    own.update({k: torch.tensor(v) if isinstance(v, list) else v for k, v in inputs.keywords.items()})
    length = own["input_ids"].shape[1]
    tails = torch.tensor([[characters[c] for c in answer] for answer in written])
    rows = {key: torch.cat([value] * len(written)) for key, value in own.items()}
    rows["input_ids"] = torch.cat([rows["input_ids"], tails], dim=1)
    rows["attention_mask"] = torch.ones_like(rows["input_ids"])
    if "mm_token_type_ids" in rows:
        rows["mm_token_type_ids"] = torch.nn.functional.pad(rows["mm_token_type_ids"], (0, tails.shape[1]))
    with torch.no_grad():
        logits = model(**rows).logits[:, length - 1 :].double()
    mean = total = 0.0
    for row, answer in enumerate(written):
        probability = 1.0
        for place, character in enumerate(answer):
            allowed = sorted({other[place] for other in written if other[:place] == answer[:place]})
            p = logits[row, place, [characters[c] for c in allowed]].softmax(-1)
            probability *= float(p[allowed.index(character)])
        mean, total = mean + probability * float(answer), total + probability
    assert total == pytest.approx(1.0)
    first = sorted({answer[0] for answer in written})
    return mean, float(logits[0, 0].softmax(-1)[[characters[c] for c in first]].sum())


@pytest.mark.parametrize(
    ("family", "decimals"),
    [*((family, 1) for family in tiny.FAMILIES), ("qwen2_5_vl", 2), ("qwen3_vl", 2), (RECURRENT, 2)],
)
def test_rating_is_the_mean_of_all_answers(family, decimals) -> None:
    """41 answers with one decimal, or 401 with two, each scored alone by the model: the same mean and digit mass."""
    preset = replace(SHORT, ratings=Ratings(1, 5, decimals=decimals))
    made, image = reward(family, preset, scale="mos"), tiny.images(1, 56, 64)[0]
    mean, mass = enumerated(family, image, preset, made)
    found = made.reading(image[None])
    torch.testing.assert_close(found.ratings, torch.tensor([mean]), **NETWORK_BATCH)
    torch.testing.assert_close(found.digit_mass, torch.tensor([mass]), **NETWORK_BATCH)
    torch.testing.assert_close(made(image[None]), found.ratings, **EXACT)
    torch.testing.assert_close(reward(family, preset)(image[None]), (found.ratings - 1) / 4, **FORMULA_FP32)


def test_other_ranges() -> None:
    """Ratings from 0 to 9 have ten first digits, and nine of them have decimals."""
    preset = replace(SHORT, ratings=Ratings(0, 9, decimals=1))
    made, image = reward("internvl", preset, scale="mos"), tiny.images(1)[0]
    assert made.bounds == (0.0, 9.0)
    mean, _ = enumerated("internvl", image, preset, made)
    torch.testing.assert_close(made(image[None]), torch.tensor([mean]), **NETWORK_BATCH)


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family != RECURRENT])
def test_side_by_side_and_step_by_step_agree(family, monkeypatch) -> None:
    """One pass with all branches, or one step for each digit over a repeated cache: the same ratings."""
    images = tiny.images(2)
    together = reward(family, VISUALQUALITY_R1)(images)
    monkeypatch.setattr(Network, "shares_branches", False)
    torch.testing.assert_close(reward(family, VISUALQUALITY_R1)(images), together, **NETWORK_BATCH)


def test_branches_see_their_ancestors_only() -> None:
    """The tree of two decimals: 4 open digits with their points, 40 beginnings; depth is the number of ancestors."""
    branches = DigitReadout(Ratings(1, 5, decimals=2), tuple(range(10)), point=10).branches
    assert len(branches.ids) == 4 * 2 + 40
    assert len(branches.read) == 4 + 40
    visible = branches.visible(3)
    for index, parent in enumerate(branches.parents):
        ancestors = {index}
        while parent >= 0:
            ancestors.add(parent)
            parent = branches.parents[parent]
        assert visible[3 + index].nonzero().flatten().tolist() == [0, 1, 2, *sorted(3 + i for i in ancestors)]
        assert branches.depths[index] == len(ancestors) - 1
    assert visible[:3].tolist() == torch.ones(3, 3 + 48).bool().tril().tolist()
    assert isinstance(hash(branches), int)


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_a_model_that_would_not_write_a_digit_is_not_scored() -> None:
    """Below the threshold the score is NaN, image by image, while the reading stays to be looked at."""
    images = tiny.images(4)
    mass = reward("qwen2_5_vl").reading(images).digit_mass
    middle = float(mass.median())
    scores = reward("qwen2_5_vl", min_digit_mass=middle)(images)
    assert scores.isnan().tolist() == (mass < middle).tolist()
    assert 0 < scores.isnan().sum() < 4
    assert RatingReward(tiny.pair("qwen2_5_vl"), SHORT)(images).isnan().all()  # by default more likely than not
    assert reward("qwen2_5_vl").reading(images).ratings.isfinite().all()


def test_gradient_is_that_of_a_step_along_it() -> None:
    """In fp64, for whole steps of one level up and down in single pixels of an image that is not resized."""
    made = reward("qwen2_5_vl", model=tiny.pair("qwen2_5_vl", torch.float64), differentiable=True, scale="mos")
    images = tiny.images(1, 56, 56).requires_grad_()
    made(images).sum().backward()
    assert images.grad is not None
    gradient = images.grad.flatten()
    step = torch.zeros_like(gradient)
    step[gradient.abs().topk(20).indices] = 1 / 255
    step = (step * gradient.sign()).view_as(images)
    change = made(images.detach() + step) - made(images.detach() - step)
    expected = 2 * (images.grad * step).sum()
    torch.testing.assert_close(change[0].detach(), expected, rtol=0.02, atol=0.0)


def test_mixed_sizes_and_threads() -> None:
    """Lists of several sizes keep their order; eight threads that come first get the same numbers."""
    for family in ("qwen2_5_vl", RECURRENT):
        images = [*tiny.images(2), *tiny.images(2, 60, 40, seed=1)]
        shuffled = [images[i] for i in (2, 0, 3, 1)]
        alone = torch.cat([reward(family)(image[None]) for image in shuffled])
        made = reward(family, batch_size=2)
        with ThreadPoolExecutor(max_workers=8) as pool:
            for scores in pool.map(made, [shuffled] * 8):
                torch.testing.assert_close(scores, alone, **NETWORK_BATCH)


@fake_gpu
@pytest.mark.parametrize("kind", ["level", "rating"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_warm_calls_do_not_wait_for_the_device(family, kind) -> None:
    """No number is read back, no constant is copied, and a batch needs as many attention calls as one image."""
    model = tiny.model(family, tiny.pair(family)[1].tokenizer), tiny.pair(family)[1]
    made = LevelReward(model) if kind == "level" else reward(family, model=model)
    made(tiny.images(1))  # looks at its scores, as every first call does
    attention = []
    for count in (1, 4):
        with Meter() as meter:
            made.to("cuda")
            images = torch.rand(count, 3, 64, 96, device="cuda")
            meter.second(lambda images=images: made(images))
        assert [*map(str, meter.waits + meter.host_constants)] == []
        attention.append(sum(found["kernels"] for name, found in meter.by_operator.items() if "attention" in name))
    assert attention[0] == attention[1]


def test_offload_and_onload() -> None:
    """While offloaded a call is an error; afterwards scores are what they were."""
    made, images = reward("internvl"), tiny.images(2)
    expected = made(images)
    made.offload()
    with pytest.raises(RuntimeError, match="onload"):
        made(images)
    made.onload()
    torch.testing.assert_close(made.to("cpu")(images), expected, **EXACT)


BRIEF = replace(SHORT, sampling=replace(SHORT.sampling, max_new_tokens=6))


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generation_is_what_the_model_writes(family) -> None:
    """Greedy: each token is the most probable one of a plain call on the text so far; garbage is NaN and is kept."""
    made, images = reward(family, BRIEF, mode="generate"), tiny.images(2)
    found = made.answers(images)
    model, processor = tiny.pair(family)
    network = Network(model, processor)
    prompt = tokenize(processor, made.prompt, network.family.around)
    with torch.no_grad():
        features = network.features(images)
        assert features is not None
        texts = [[], []]
        for row in range(2):
            written: tuple[int, ...] = ()
            while len(written) < 6 and (not written or written[-1] != processor.tokenizer.eos_token_id):
                longer = prompt._replace(after=(*prompt.after, *written))
                written += (int(network.logits(features, longer)[row].argmax()),)
            texts[row] = processor.tokenizer.decode(written, skip_special_tokens=True)
    assert found.texts == texts
    assert found.ratings.isnan().all()
    assert made(images).isnan().all()
    assert made.bounds == (0.0, 1.0)


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_written_ratings_are_ordinary_tensors_in_inference_mode() -> None:
    """As the scores of every reward are, so that a loss may use them."""
    made, images = reward("internvl", BRIEF, mode="generate"), tiny.images(1)
    with torch.inference_mode():
        scores, ratings = made(images), made.answers(images).ratings
    assert not scores.is_inference()
    assert not ratings.is_inference()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_sampled_answers_depend_on_seed_and_image_alone(family) -> None:
    """The same alone, in a batch, in another order, in threads; and another seed writes something else."""
    images = tiny.images(3)
    made = reward(family, BRIEF, mode="generate", seed=1)
    texts = made.answers(images).texts
    assert made.answers(images.flip(0)).texts == texts[::-1]
    assert [made.answers(image[None]).texts[0] for image in images] == texts
    with ThreadPoolExecutor(max_workers=4) as pool:
        assert all(found.texts == texts for found in pool.map(made.answers, [images] * 4))
    assert reward(family, BRIEF, mode="generate", seed=2).answers(images).texts != texts
    assert reward(family, BRIEF, mode="generate").answers(images).texts != texts


def test_noise_makes_fair_draws() -> None:
    """The largest logit after the noise is distributed as the softmax."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    sampler = GumbelNoise(seed=0)
    draws = torch.cat([sampler(torch.zeros(1, 1), logits).argmax(-1) for _ in range(20_000)])
    frequencies = draws.bincount(minlength=4) / len(draws)
    torch.testing.assert_close(frequencies, logits[0].softmax(-1), rtol=0.0, atol=0.015)  # 4 standard deviations


def test_written_ratings_are_parsed_and_keep_their_order(monkeypatch) -> None:
    """The last answer counts; no answer, no number or one out of range is NaN; a broken image has no text."""
    written = {1.0: "<answer>1.5</answer>", 2.0: "<answer>x</answer> <answer>4.25</answer>", 3.0: "3", 4.0: "<answer>9"}

    def write(network: Network, images: Tensor, *rest: Any) -> list[str]:
        return [written.get(round(float(image[0, 0, 0]) * 255), "for a broken image") for image in images]

    monkeypatch.setattr(rewards, "write", write)
    images = [torch.full((3, 56 + 8 * (i % 2), 56), i / 255) for i in (1, 2, 3, 4)]
    images.append(torch.full((3, 56, 56), 1 / 255))
    images[-1][0, 0, 1] = torch.nan
    found = reward("qwen2_5_vl", mode="generate", scale="mos").answers(images)
    assert found.texts == [*written.values(), ""]
    torch.testing.assert_close(found.ratings, torch.tensor([1.5, 4.25, *[torch.nan] * 3]), equal_nan=True, **EXACT)
    empty = reward("qwen2_5_vl", mode="generate")(torch.zeros(0, 3, 8, 8))
    assert empty.shape == (0,)


@pytest.mark.parametrize("kind", [QReAlignReward, VisualQualityR1Reward, QInsightReward])
def test_published_scorers_are_classes(kind) -> None:
    """They can be recognised, and pickled before their weights are loaded."""
    made = kind(scale="mos")
    assert type(pickle.loads(pickle.dumps(made))) is kind
    assert isinstance(made, ImageReward)
    assert made.bounds == (1.0, 5.0)
    assert made.name.removesuffix("(scale=mos)") in CATALOG


def test_published_scorers() -> None:
    """Names, prompts and bounds; the prefix of an answer ends where the first digit is read."""
    quality = VisualQualityR1Reward(weights=tiny.pair("qwen2_5_vl"))
    assert (quality.name, quality.bounds) == ("visualquality_r1", (0.0, 1.0))
    assert quality.prompt.endswith("<|im_start|>assistant\n<answer>")
    insight = QInsightReward("mos", weights=tiny.pair("qwen2_5_vl"))
    assert (insight.name, insight.bounds) == ("qinsight(scale=mos)", (1.0, 5.0))
    assert insight.prompt.endswith('The score.<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n'
                                   '<|im_start|>assistant\n<answer>{"rating": ')  # fmt: skip
    assert (insight.reading(tiny.images(2)).ratings != quality.reading(tiny.images(2)).ratings).all()
    thinking = reward("qwen2_5_vl", VISUALQUALITY_R1, mode="generate", thinking=True)
    assert thinking.prompt.endswith("in <answer> </answer> tags.<|im_end|>\n<|im_start|>assistant\n")
    assert "<think>" in thinking.prompt
    assert reward("qwen2_5_vl", Q_INSIGHT, mode="generate").prompt.endswith("assistant\n")


def test_bad_options_are_refused() -> None:
    """Each error says what was expected."""
    with pytest.raises(ValueError, match="unit"):
        reward("qwen2_5_vl", scale="percent")
    with pytest.raises(ValueError, match="generate"):
        reward("qwen2_5_vl", mode="write")
    with pytest.raises(ValueError, match="nothing is written"):
        reward("qwen2_5_vl", seed=1)
    with pytest.raises(ValueError, match="no gradient"):
        reward("qwen2_5_vl", mode="generate", differentiable=True)
    with pytest.raises(ValueError, match="overwrite their state"):
        reward(RECURRENT, differentiable=True)(tiny.images(1))


@pytest.mark.hub
@pytest.mark.skipif("IQAREWARD_VLM_WEIGHTS" not in os.environ, reason="set IQAREWARD_VLM_WEIGHTS=1 (36 GB)")
@pytest.mark.parametrize("kind", [QReAlignReward, VisualQualityR1Reward, QInsightReward])
def test_published_weights(kind, photographs, degraded_photographs) -> None:
    """The models mean to answer as they are read, and find degraded photographs worse."""
    made = kind(scale="mos")
    mass = made.mass(photographs) if kind is QReAlignReward else made.reading(photographs).digit_mass
    assert (mass > 0.5).all(), f"{made.name} goes on with a legal token with probability {mass.tolist()} only"
    assert (made(photographs) > made(degraded_photographs)).all()
