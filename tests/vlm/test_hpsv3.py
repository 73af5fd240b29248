"""HPSv3Reward gives what transformers' own Qwen2-VL and a head give, from a file in the published layout."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import iqareward
from iqareward.rewards import HPSv3Reward
from iqareward.rewards.vlm.presets import HPSV3_QUESTION
from iqareward.testing import check_reward
from tests.tolerances import EXACT, NETWORK_BATCH
from tests.vlm import tiny

TOKEN = "<|Reward|>"
PROMPTS = ["a quality cat", "two dogs, a good picture of them in the rain", "x"]
# 256 tokens of 28 x 28 pixels: the size that every image gets, so that these are not resized
WHOLE = [(448, 448), (224, 896)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tiny.HPSv3Files:
    return tiny.hpsv3_files(tmp_path_factory.mktemp("hpsv3"))


def reward(files: tiny.HPSv3Files, **options) -> HPSv3Reward:
    return HPSv3Reward(**{"weights": files.weights, "base": files.base, **options})


def reference(files: tiny.HPSv3Files, image: Tensor, prompt: str) -> Tensor:
    """`[2]` by the library: its processor, towers and language model, token positions, and the head as published."""
    processor = tiny.processor("qwen2_vl", tiny.HPSV3_WORDS)
    processor.tokenizer.add_tokens([TOKEN], special_tokens=True)
    levels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    content = [{"type": "image"}, {"type": "text", "text": HPSV3_QUESTION.format(text_prompt=prompt)}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 2**24}  # of the published base
    inputs = processor(text=[text], images=[Image.fromarray(levels)], return_tensors="pt")
    core, ids = files.model.model, inputs["input_ids"]
    seen = torch.cat(core.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output)
    words = core.language_model.embed_tokens(ids)
    words = words.masked_scatter((ids == processor.image_token_id)[..., None].expand_as(words), seen)
    hidden = core.language_model(inputs_embeds=words).last_hidden_state
    place = (ids[0] == processor.tokenizer.convert_tokens_to_ids(TOKEN)).nonzero()
    assert place.shape == (1, 1)
    found = hidden[0, place[0, 0]]
    for key in ("0", "3", "5"):
        found = torch.nn.functional.linear(found, files.head[f"{key}.weight"], files.head[f"{key}.bias"])
        found = found if key == "5" else found.relu()
    return found


@pytest.mark.parametrize("size", WHOLE)
def test_parity_with_transformers(files, size) -> None:
    """Means and deviations of prompts of three lengths in one batch are the library's one by one."""
    images = tiny.images(3, *size)
    mu, sigma = reward(files).reading(images, PROMPTS)
    expected = torch.stack([reference(files, *pair) for pair in zip(images, PROMPTS, strict=True)])
    torch.testing.assert_close(torch.stack([mu, sigma.log()], dim=1), expected, **NETWORK_BATCH)
    assert mu.std() > 1e-3
    torch.testing.assert_close(reward(files, scale="raw")(images, prompts=PROMPTS), mu, **EXACT)
    unit = torch.sigmoid((mu - 8.3) / 3.1)
    torch.testing.assert_close(reward(files)(images, prompts=PROMPTS), unit, **EXACT)


@pytest.mark.parametrize(("size", "given"), [((300, 500), (364, 588)), ((97, 40), (700, 308))])
def test_every_image_gets_about_256_tokens(files, size, given) -> None:
    """Images are resized as Pillow does it to about 200,704 pixels, larger and smaller ones."""
    image = tiny.images(1, *size)
    levels = (image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    resized = Image.fromarray(levels).resize(given[::-1], Image.Resampling.BICUBIC)
    whole = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    score = reward(files, scale="raw")(image, prompts=PROMPTS[:1])
    torch.testing.assert_close(score[0], reference(files, whole, PROMPTS[0])[0], **NETWORK_BATCH)


@pytest.mark.parametrize("differentiable", [False, True])
def test_contract(files, differentiable) -> None:
    """The public check of everything that a reward promises."""
    made = reward(files, differentiable=differentiable, batch_size=2)
    check_reward(made, tiny.images(3, 56, 64))


def test_single_as_in_a_batch(files) -> None:
    """Images of three sizes and prompts of three lengths score as each does alone, whatever the micro-batch."""
    images = [tiny.images(1)[0], tiny.images(1, 60, 40, seed=1)[0], tiny.images(1, seed=2)[0]]
    alone = torch.cat([reward(files)(image[None], prompts=[text]) for image, text in zip(images, PROMPTS, strict=True)])
    for size in (1, 2, 8):
        torch.testing.assert_close(reward(files, batch_size=size)(images, prompts=PROMPTS), alone, **NETWORK_BATCH)


def test_the_prompt_matters_and_the_tail_does_not(files) -> None:
    """Another prompt gives another score; what is read ends at the reward token, which stands behind the prompt."""
    image, made = tiny.images(1), reward(files)
    scores = [made(image, prompts=[text]).item() for text in PROMPTS]
    assert len(set(scores)) == 3
    head, tail = made.prompt.split("{text_prompt}")
    assert head.count("<|image_pad|>") == 1
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert head.startswith(f"{system}<|im_start|>user\n<|vision_start|>")
    ask = "Please provide the overall ratings of this image: <|Reward|>"
    assert tail == f"\n\n\n\n{ask}\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"


def test_instruction_character_for_character(files) -> None:
    """Spaces at the ends of lines are what the published model was trained on."""
    lines = reward(files).prompt.split("<|vision_end|>")[1].split("\n")
    assert lines[0] == ""
    assert lines[1].endswith("with 0 being the worst and 10 being the best. ")
    assert [line for line in lines if line.startswith("**")] == ["**Visual Quality:**  ", "**Text Alignment:**  "]
    assert [line.split("**")[1] for line in lines if line.startswith("- ")] == [
        "Reasonableness:", "Clarity:", "Detail Richness:", "Aesthetic and Creativity:", "Safety:", "Subject Relevance",
        "Style Relevance:", "Contextual Consistency", "Attribute Fidelity", "Semantic Coherence",
    ]  # fmt: skip
    assert [line for line in lines if line.endswith("the lowest possible. ")] == [lines[9]]


@pytest.mark.parametrize("text", [f"a cat {TOKEN}", "a <|image_pad|>"])
def test_prompts_cannot_hold_marks(files, text) -> None:
    """A prompt that would be read as an image or as the place of the score is refused."""
    with pytest.raises(ValueError, match="hpsv3 expected prompts without"):
        reward(files)(tiny.images(1), prompts=[text])


def test_the_layout_of_today(files, tmp_path) -> None:
    """Names of today's transformers beside configuration and processor, as merged checkpoints have them."""
    stored = {key: value.clone() for key, value in files.model.state_dict().items()}
    save_file(stored | {f"rm_head.{key}": value for key, value in files.head.items()}, tmp_path / "model.safetensors")
    for file in files.base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    images = tiny.images(2)
    merged = HPSv3Reward(weights=tmp_path, base=None)
    torch.testing.assert_close(merged(images, prompts=PROMPTS[:2]), reward(files)(images, prompts=PROMPTS[:2]), **EXACT)
    folder = reward(files, weights=str(files.weights.parent))
    torch.testing.assert_close(folder(images, prompts=PROMPTS[:2]), merged(images, prompts=PROMPTS[:2]), **EXACT)


def without(key: str):
    return lambda stored: stored.pop(key)


def replaced(key: str, *shape: int):
    return lambda stored: stored.update({key: torch.ones(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("rm_head.5.bias"), "lacking rm_head.5.bias"),
        (without("model.layers.1.mlp.up_proj.weight"), "lacking language_model.layers.1.mlp.up_proj.weight"),
        (replaced("visual.blocks.2.norm1.bias", 16), "beyond them visual.blocks.2.norm1.bias"),
        (replaced("value_head.weight", 2), "holds value_head.weight"),
        (replaced("rm_head.0.weight", 1024, 31), r"rm_head.0.weight of shape \[1024, 31\]"),
        (replaced("model.embed_tokens.weight", 12, 32), r"embed_tokens.weight of shape \[12, 32\]"),
        (lambda stored: stored["rm_head.3.weight"].fill_(torch.nan), "rm_head.3.weight|3.weight"),
    ],
)
def test_wrong_weights(files, tmp_path, change, message) -> None:
    """Every tensor of the file must be one of HPSv3's, of its shape and finite, and none may lack."""
    stored = load_file(files.weights)
    change(stored)
    save_file(stored, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=message):
        reward(files, weights=tmp_path / "HPSv3.safetensors")(tiny.images(1), prompts=["a"])


def test_wrong_base(files, tmp_path) -> None:
    """Another family, or no configuration at all."""
    tiny.config("qwen2_5_vl", tiny.tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="qwen2_vl"):
        reward(files, base=tmp_path)(tiny.images(1), prompts=["a"])
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        reward(files, base=None)(tiny.images(1), prompts=["a"])
    with pytest.raises(ValueError, match='"unit" or "raw"'):
        HPSv3Reward(scale="mos")  # pyright: ignore[reportArgumentType]


def test_pickled_and_by_name(files) -> None:
    """A copy of a used reward builds its own network; the catalogue's reward is the published one, unloaded."""
    images, made = tiny.images(2), reward(files)
    scores = made(images, prompts=PROMPTS[:2])
    copy = pickle.loads(pickle.dumps(made))
    torch.testing.assert_close(copy(images, prompts=PROMPTS[:2]), scores, **EXACT)
    loaded = iqareward.load("hpsv3(scale=raw)")
    assert (loaded.name, loaded.bounds, loaded.needs_prompts) == ("hpsv3(scale=raw)", (None, None), True)
    assert (iqareward.load("hpsv3").name, iqareward.load("hpsv3").bounds) == ("hpsv3", (0.0, 1.0))
    with pytest.raises(ValueError, match="prompts"):
        made(images)
