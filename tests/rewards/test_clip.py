"""Rewards by CLIP: parity with transformers and with the published layouts, prompts, loading, and gradients."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import iqareward
from iqareward import check_reward
from iqareward.rewards import (
    CATALOG,
    CLIPIQAReward,
    CLIPScoreReward,
    HPSv2Reward,
    LAIONAestheticReward,
    PickScoreReward,
    RALIReward,
)
from tests.rewards import clip_tiny
from tests.rewards.clip_tiny import NAMES, SIDE, reward
from tests.rewards.pictures import textures
from tests.tolerances import HALF_NETWORK, NETWORK_BATCH, OTHER_PACKAGE

transformers = pytest.importorskip("transformers", reason="the extra `vlm` is not installed")

KODAK = Path(__file__).resolve().parents[3] / "shared" / "data" / "kodak24"
PROMPTS = ["the cat", "a dog, 2 trees.", "the cat"]


def images(height: int = 40, width: int = 56) -> Tensor:
    return torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0))


def as_pil(batch: Tensor) -> list[Image.Image]:
    levels = (batch.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    return [Image.fromarray(picture) for picture in levels]


def unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


class Theirs:
    """A tiny checkpoint in the hands of transformers, with pixels made by Pillow and numpy."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.folder = clip_tiny.checkpoint(folder, **options)
        self.model = transformers.CLIPModel.from_pretrained(self.folder).eval()
        self.processor = transformers.CLIPImageProcessor.from_pretrained(self.folder)
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(self.folder)

    def pixels(self, batch: Tensor) -> Tensor:
        rows = []
        for picture in as_pil(batch):
            short = min(picture.size)
            size = tuple(int(SIDE * side / short) for side in picture.size)
            resized = picture.resize(size, Image.Resampling.BICUBIC)
            left, top = ((side - SIDE) // 2 for side in size)
            cut = np.array(resized.crop((left, top, left + SIDE, top + SIDE)))
            rows.append(torch.from_numpy(cut).permute(2, 0, 1) / 255)
        mean, std = (torch.tensor(row).view(3, 1, 1) for row in (self.processor.image_mean, self.processor.image_std))
        return (torch.stack(rows) - mean) / std

    @torch.no_grad()
    def cosines(self, batch: Tensor, prompts: list[str]) -> Tensor:
        """[image, prompt]."""
        found = self.model(**self.texts(prompts), pixel_values=self.pixels(batch))
        return found.logits_per_image / self.model.logit_scale.exp()

    def texts(self, prompts: list[str]) -> dict[str, Tensor]:
        return self.tokenizer(prompts, padding=True, truncation=True, max_length=clip_tiny.CONTEXT, return_tensors="pt")


@pytest.mark.parametrize("size", [(40, 56), (57, 33), (32, 32), (20, 31)])
def test_clipscore_and_pickscore_are_those_of_transformers(tmp_path, size):
    """The paper's formula and the authors' example, on pixels of Pillow, for sizes above and below the model's."""
    theirs, batch = Theirs(tmp_path), images(*size)
    prefixed = theirs.cosines(batch, [f"A photo depicts {prompt}" for prompt in PROMPTS]).diag()
    scores = CLIPScoreReward(weights=tmp_path)(batch, prompts=PROMPTS)
    torch.testing.assert_close(scores, 2.5 * prefixed.clamp(min=0), **OTHER_PACKAGE)
    cosines = theirs.cosines(batch, PROMPTS).diag()
    scores = CLIPScoreReward(weights=tmp_path, prefix="", scale=1.0)(batch, prompts=PROMPTS)
    torch.testing.assert_close(scores, cosines.clamp(min=0), **OTHER_PACKAGE)
    scores = PickScoreReward(weights=tmp_path)(batch, prompts=PROMPTS)
    torch.testing.assert_close(scores, theirs.model.logit_scale.exp().detach() * cosines, **OTHER_PACKAGE)


@pytest.mark.skipif(not KODAK.is_dir(), reason="the Kodak pictures are not in ../shared/data")
def test_photographs_agree_with_the_image_processor(tmp_path):
    """On real photographs the processor of transformers, which resizes bytes, gives nearly the same pixels."""
    theirs = Theirs(tmp_path)
    pictures = [Image.open(file) for file in sorted(KODAK.glob("*.png"))[:6]]
    batch = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 for picture in pictures]
    prompts = ["the cat"] * len(batch)
    with torch.no_grad():
        pixels = theirs.processor(pictures, return_tensors="pt").pixel_values
        expected = theirs.model(**theirs.texts(prompts[:1]), pixel_values=pixels).logits_per_image[:, 0]
    scores = PickScoreReward(weights=tmp_path)(batch, prompts=prompts)
    torch.testing.assert_close(scores, expected, rtol=2e-3, atol=2e-2)  # of a logit scale of 14


def test_clipiqa_is_a_softmax_over_two_prompts(tmp_path):
    """At the model's size it is transformers' softmax, else with its positions; several pairs are averaged."""
    theirs, batch = Theirs(tmp_path), images(40, 56)
    sides = ["Good photo.", "Sharp photo."], ["Bad photo.", "Blurry photo."]
    pairs = []
    for pair in zip(*sides, strict=True):
        logits = theirs.cosines(batch, list(pair)) * theirs.model.logit_scale.exp().detach()
        pairs.append(logits.softmax(1)[:, 0])
        scores = CLIPIQAReward(positive=pair[0], negative=pair[1], weights=tmp_path, resize=True)(batch)
        torch.testing.assert_close(scores, pairs[-1], **OTHER_PACKAGE)
    scores = CLIPIQAReward(positive=sides[0], negative=sides[1], weights=tmp_path, resize=True)(batch)
    torch.testing.assert_close(scores, torch.stack(pairs).mean(0), **OTHER_PACKAGE)

    mean, std = (torch.tensor(row).view(3, 1, 1) for row in (theirs.processor.image_mean, theirs.processor.image_std))
    pixels = ((batch * 255).round() / 255 - mean) / std
    with torch.no_grad():
        texts = theirs.texts(["Good photo.", "Bad photo."])
        logits = theirs.model(**texts, pixel_values=pixels, interpolate_pos_encoding=True).logits_per_image
    torch.testing.assert_close(CLIPIQAReward(weights=tmp_path)(batch), logits.softmax(1)[:, 0], **OTHER_PACKAGE)


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_clipiqa_scores_no_image_below_a_patch(tmp_path):
    """The model has no position for it."""
    base = clip_tiny.checkpoint(tmp_path)
    assert CLIPIQAReward(weights=base)(images(7, 40)).isnan().all()
    assert CLIPIQAReward(weights=base)(images(8, 40)).isfinite().all()
    assert CLIPIQAReward(weights=base, resize=True)(images(7, 40)).isfinite().all()


@pytest.mark.parametrize("size", [(40, 56), (57, 33), (32, 32), (32, 20), (1, 9)])
def test_hpsv2_is_the_authors_protocol(tmp_path, size):
    """Weights in the layout of open_clip; the longer side resized as tensors are, padded with black, no scale."""
    theirs, batch = Theirs(tmp_path, act="gelu"), images(*size)
    hps = HPSv2Reward(weights=clip_tiny.hpsv2_file(tmp_path), base=tmp_path)
    rows, columns = (max(1, round(side * SIDE / max(size))) for side in size)
    resized = nn.functional.interpolate(
        (batch * 255).round() / 255, (rows, columns), mode="bicubic", antialias=True, align_corners=False
    )
    top, left = (SIDE - rows) // 2, (SIDE - columns) // 2
    padded = torch.zeros(3, 3, SIDE, SIDE)
    padded[..., top : top + rows, left : left + columns] = resized
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in (theirs.processor.image_mean, theirs.processor.image_std))
    with torch.no_grad():
        found = theirs.model(**theirs.texts(PROMPTS), pixel_values=(padded - mean) / std)
    expected = (found.image_embeds * found.text_embeds).sum(1)
    torch.testing.assert_close(hps(batch, prompts=PROMPTS), expected, **OTHER_PACKAGE)


def test_the_aesthetic_head_is_the_published_one(tmp_path):
    """Five linear layers with dropout between, on unit features of the image."""
    theirs, batch = Theirs(tmp_path), images()
    with torch.no_grad():
        features = theirs.model.visual_projection(theirs.model.vision_model(theirs.pixels(batch)).pooler_output)
        expected = clip_tiny.laion_layers()(unit(features)).squeeze(1)
    scores = LAIONAestheticReward(weights=clip_tiny.laion_file(tmp_path), base=tmp_path)(batch)
    torch.testing.assert_close(scores, expected, **OTHER_PACKAGE)


@pytest.mark.parametrize("size", [(40, 56), (57, 33)])
def test_rali_is_the_authors_formula(tmp_path, size):
    """A softmax over cosines to prototypes in the whitened space, written as the paper's words have it."""
    folder = clip_tiny.rali_folder(tmp_path)
    theirs, batch = Theirs(folder / "best"), images(*size)
    stored = torch.load(folder / "ckpt.pt", weights_only=True)["state_dict"]
    part = {key.removeprefix("scorer."): value.double() for key, value in stored.items() if "scorer." in key}
    with torch.no_grad():
        pooled = theirs.model.vision_model(pixel_values=theirs.pixels(batch)).pooler_output
        features = theirs.model.visual_projection(pooled).double()
    whitened = (features - torch.from_numpy(np.load(folder / "pca_mean.npy"))) / part["pca_scale"]
    cosines = unit(whitened @ part["pca_components"].T) @ unit(part["prototypes"]).T
    expected = (4 * cosines).exp() @ part["proto_scores"] / (4 * cosines).exp().sum(1)
    torch.testing.assert_close(RALIReward(weights=folder)(batch), expected.float(), **NETWORK_BATCH)
    assert expected.std() > 1e-4


def test_rali_without_its_mean(tmp_path):
    """The message says how to write the file; one of another shape, and tensors that RALI has not, are refused."""
    folder = clip_tiny.rali_folder(tmp_path)
    mean = folder / "pca_mean.npy"
    mean.rename(tmp_path / "moved.npy")
    with pytest.raises(FileNotFoundError, match=r"joblib.load\('pca.pkl'\).mean_"):
        RALIReward(weights=folder)(images())
    torch.testing.assert_close(
        RALIReward(weights=folder, pca_mean=tmp_path / "moved.npy")(images()).isnan().sum(), torch.tensor(0)
    )
    np.save(mean, np.zeros(23))
    with pytest.raises(ValueError, match=r"shape \[24\], got \[23\]"):
        RALIReward(weights=folder)(images())
    mean.write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="cannot be read"):
        RALIReward(weights=folder)(images())
    stored = torch.load(folder / "ckpt.pt", weights_only=True)["state_dict"]
    torch.save({"state_dict": stored | {"scorer.bias": torch.zeros(1)}}, folder / "ckpt.pt")
    with pytest.raises(ValueError, match=r"holds scorer\.bias"):
        RALIReward(weights=folder, pca_mean=tmp_path / "moved.npy")(images())
    torch.save(
        {"state_dict": {key: value for key, value in stored.items() if "proto_scores" not in key}}, folder / "ckpt.pt"
    )
    with pytest.raises(ValueError, match=r"lacks scorer\.proto_scores"):
        RALIReward(weights=folder, pca_mean=tmp_path / "moved.npy")(images())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("differentiable", [False, True])
def test_every_reward_keeps_the_contract(name, differentiable, tmp_path):
    """The public check passes: batches, broken images, threads, pickling, missing prompts, gradients."""
    batch = textures(4, 48)
    check_reward(reward(name, tmp_path, differentiable=differentiable), batch)


@pytest.mark.parametrize("name", NAMES)
def test_facts_of_the_table(name, tmp_path):
    """What the catalogue says of a reward is what it says of itself, without loading anything."""
    entry, found = CATALOG[name], iqareward.load(name)
    assert found.name == name
    assert found.bounds == entry.bounds
    assert iqareward.load(name, differentiable=True).differentiable
    copy = pickle.loads(pickle.dumps(reward(name, tmp_path)))
    assert copy(images(), prompts=PROMPTS).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_pixels(name, tmp_path):
    """At the original size, the same in pieces as in one, and zero nowhere but outside of what is scored."""
    grads = []
    for batch_size in (3, 1):
        batch = images(SIDE, SIDE).requires_grad_()
        reward(name, tmp_path, differentiable=True, batch_size=batch_size)(batch, prompts=PROMPTS).sum().backward()
        assert batch.grad is not None
        grads.append(batch.grad)
    assert grads[0].isfinite().all()
    assert grads[0].abs().amax() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5 * float(grads[0].abs().amax()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, dtype, tmp_path):
    """Weights in half the bits score close to float32, in float32."""
    half = reward(name, tmp_path, dtype=dtype)(images(), prompts=PROMPTS)
    assert half.dtype == torch.float32
    whole = reward(name, tmp_path)(images(), prompts=PROMPTS)
    scale = 15 if name in ("pickscore", "clipiqa") else 1  # of the temperature
    torch.testing.assert_close(half, whole, rtol=HALF_NETWORK["rtol"], atol=scale * HALF_NETWORK["atol"])


def test_a_prompt_is_read_once(tmp_path):
    """The text model runs once for each prompt, whatever the number of images and calls, and again after a move."""
    scorer = PickScoreReward(weights=clip_tiny.checkpoint(tmp_path), batch_size=2)
    read: list[int] = []
    scorer.model.text_projection.register_forward_hook(lambda module, texts, found: read.append(len(found)))
    first = scorer(images().repeat(3, 1, 1, 1), prompts=PROMPTS * 3)
    assert sum(read) == 2
    again = scorer(images(), prompts=PROMPTS)
    assert sum(read) == 2
    torch.testing.assert_close(first[:3], again, **NETWORK_BATCH)
    scorer.offload()
    scorer.onload()
    scorer(images(), prompts=PROMPTS)
    assert sum(read) == 4


@pytest.mark.parametrize("eos", [None, 2, 5])
def test_texts_do_not_depend_on_their_neighbours(eos, tmp_path):
    """Beside a longer prompt, and whatever end of text an old configuration names, the feature is that at the end."""
    base = clip_tiny.checkpoint(tmp_path, eos=eos)
    expected = Theirs(clip_tiny.checkpoint(tmp_path / "new")).cosines(images(), PROMPTS).diag()
    long = "the quick brown fox and so on, for ever"
    alone = CLIPScoreReward(weights=base, prefix="", scale=1.0)(images()[:1], prompts=PROMPTS[:1])
    beside = CLIPScoreReward(weights=base, prefix="", scale=1.0)(images(), prompts=[PROMPTS[0], long, "x"])
    torch.testing.assert_close(beside[:1], alone, **NETWORK_BATCH)
    torch.testing.assert_close(alone, expected[:1].clamp(min=0), **OTHER_PACKAGE)


def test_long_prompts_are_cut(tmp_path):
    """After as many tokens as the model has positions, the last of which ends the text."""
    scorer = PickScoreReward(weights=clip_tiny.checkpoint(tmp_path))
    long = ["abcdefghij" + end for end in ("", " klm", " xyz and more")]
    scores = scorer(images()[:1].expand(3, -1, -1, -1), prompts=long)
    torch.testing.assert_close(scores, scores[:1].expand(3), **NETWORK_BATCH)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (None, ValueError, "expected `prompts`, one per image"),
        ("the cat", TypeError, "`prompts` as a list"),
        (["the cat"], ValueError, r"one prompt per image \(3\), got 1"),
        (["the cat", None, "a dog"], TypeError, "`prompts` as texts, got NoneType"),
    ],
)
@pytest.mark.parametrize("name", ["clipscore", "pickscore", "hpsv2"])
def test_wrong_prompts(name, prompts, error, message, tmp_path):
    """One text for each image is expected."""
    with pytest.raises(error, match=message):
        reward(name, tmp_path)(images(), prompts=prompts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CLIPScoreReward(scale=0), "`scale` > 0, got 0"),
        (lambda: CLIPIQAReward(positive=[], negative=[]), "got 0 and 0"),
        (lambda: CLIPIQAReward(positive=["a", "b"], negative="c"), "got 2 and 1"),
    ],
)
def test_wrong_options(make, message):
    """They are refused before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("clipscore", "openai/clip-vit-base-patch32"),
        ("pickscore", "yuvalkirstain/PickScore_v1"),
        ("hpsv2", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        ("laion_aesthetic", "openai/clip-vit-large-patch14"),
        ("clipiqa", "openai/clip-vit-base-patch16"),
    ],
)
def test_without_a_network(name, hub_id, monkeypatch, tmp_path):
    """The error names the weights, the command that gets them, and the other way."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=rf"{hub_id}.*hf download {hub_id}.*pass the folder"):
        iqareward.load(name)(images(), prompts=PROMPTS)


def test_files_that_do_not_fit(tmp_path):
    """Missing weights, other models, and other layouts are refused with the name of the file."""
    base = clip_tiny.checkpoint(tmp_path / "base", act="gelu") if (tmp_path / "base").mkdir() is None else None
    file = clip_tiny.hpsv2_file(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors lacks token_embedding"):
        HPSv2Reward(weights=base, base=base)(images(), prompts=PROMPTS)
    assert HPSv2Reward(weights=tmp_path, base=base)(images(), prompts=PROMPTS).isfinite().all()  # a folder with it

    stored = torch.load(file, weights_only=True)
    fused = stored["state_dict"].pop("transformer.resblocks.1.attn.in_proj_weight")
    torch.save(stored, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"less\.pt lacks transformer\.resblocks\.1\.attn\.in_proj_weight"):
        HPSv2Reward(weights=tmp_path / "less.pt", base=base)(images(), prompts=PROMPTS)
    stored["state_dict"]["transformer.resblocks.1.attn.in_proj_weight"] = fused * torch.nan
    torch.save(stored, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match=r"nan\.pt has NaN"):
        HPSv2Reward(weights=tmp_path / "nan.pt", base=base)(images(), prompts=PROMPTS)

    torch.save({"layers.0.weight": torch.ones(2, 2)}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=r"head\.pth has layers\.0\.weight of shape \[2, 2\], expected \[1024, 24\]"):
        LAIONAestheticReward(weights=tmp_path / "head.pth", base=base)(images())

    (base / "tokenizer.json").rename(base / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json"):
        PickScoreReward(weights=base)(images(), prompts=PROMPTS)
    (base / "elsewhere").rename(base / "tokenizer.json")
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace('"model_type": "clip",', '"model_type": "siglip",'))
    with pytest.raises(ValueError, match="expected a model of type 'clip', got 'siglip'"):
        PickScoreReward(weights=base)(images(), prompts=PROMPTS)
    (base / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ValueError, match="lacks weights of the CLIP model"):
        PickScoreReward(weights=base)(images(), prompts=PROMPTS)
    (base / "config.json").write_text(config)
    transformers.CLIPImageProcessor(size={"shortest_edge": 40}).save_pretrained(base)
    with pytest.raises(ValueError, match="resizes the shorter side to 32 pixels"):
        PickScoreReward(weights=base)(images(), prompts=PROMPTS)


def test_scores_on_the_model_side(tmp_path):
    """Broken images have none, and the others are theirs."""
    batch = images()
    expected = PickScoreReward(weights=clip_tiny.checkpoint(tmp_path))(batch, prompts=PROMPTS)
    batch[1, 0, 0, 0] = torch.nan
    scores = PickScoreReward(weights=tmp_path)(batch, prompts=PROMPTS)
    assert scores.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(scores[[0, 2]], expected[[0, 2]], **NETWORK_BATCH)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "clipiqa"])  # it does not resize
def test_a_strip_is_scored_like_its_middle(tmp_path, name):
    """What is cut away takes no memory: a strip of 40,000 pixels would be 1,280,000 pixels wide."""
    scorer = reward(name, tmp_path)
    strip = torch.rand(1, 3, 1, 40_000, generator=torch.Generator().manual_seed(0))
    prompts = ["the cat"] if scorer.needs_prompts else None
    scores = scorer(strip, prompts=prompts)
    if name == "hpsv2":  # it scores the whole strip
        assert scores.isfinite().all()
    else:
        torch.testing.assert_close(scores, scorer(strip[..., 19_800:20_200], prompts=prompts), rtol=0, atol=0)


@pytest.mark.parametrize("prompt", ["", "a<|endoftext|>dog", "<|endoftext|>", "<|startoftext|>a", "a" * 10_000])
def test_odd_prompts_are_read_as_in_transformers(tmp_path, prompt):
    """Nothing, the tokenizer's own tokens, and a text without end."""
    theirs, batch = Theirs(tmp_path), images()[:1]
    scores = PickScoreReward(weights=tmp_path)(batch, prompts=[prompt])
    expected = theirs.model.logit_scale.exp().detach() * theirs.cosines(batch, [prompt])[0]
    torch.testing.assert_close(scores, expected, **OTHER_PACKAGE)
