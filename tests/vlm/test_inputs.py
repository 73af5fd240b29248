"""Pixels, positions and prompts are those of the models' own processors."""

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from iqareward.rewards.vlm.inputs import digit_ids, family_of, next_ids, patchify, render, smart_size, tokenize
from iqareward.rewards.vlm.network import Network, geometry_of, run_tower
from iqareward.rewards.vlm.presets import Q_INSIGHT, Q_REALIGN, VISUALQUALITY_R1, ZERO_SHOT_LEVELS
from tests.gpu import needs_cuda
from tests.tolerances import EXACT, FORMULA_FP32, NETWORK_BATCH
from tests.vlm import tiny

SIZES = [(64, 96), (56, 56), (90, 31), (37, 150), (200, 120)]
PILLOW = {
    "llava_onevision": LlavaOnevisionImageProcessorPil,
    "internvl": GotOcr2ImageProcessorPil,
    **dict.fromkeys(tiny.QWEN, Qwen2VLImageProcessorPil),
}


def pillow(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow before 13 rounds another way")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pixels_are_those_of_the_pillow_processor(family, size) -> None:
    """Any size, resized, padded and tiled or not: the vision tower reads what the library's Pillow code makes."""
    model, processor = tiny.pair(family)
    batch = tiny.images(2, *size)
    inputs = family_of(model, processor).images(batch)
    assert inputs is not None
    library = PILLOW[family](**{k: v for k, v in processor.image_processor.to_dict().items() if "type" not in k})
    expected = library([pillow(image) for image in batch], return_tensors="pt")
    torch.testing.assert_close(inputs.keywords["pixel_values"], expected["pixel_values"], **FORMULA_FP32)
    if "image_grid_thw" in expected:
        assert inputs.keywords["image_grid_thw"].tolist() == expected["image_grid_thw"].tolist()
    if "image_sizes" in expected:
        assert [list(found) for found in inputs.keywords["image_sizes"]] == expected["image_sizes"].tolist()


@pytest.mark.parametrize("patch", [14, 16])
def test_patches_are_the_librarys(patch) -> None:
    """Given the same pixels, rows and their order are equal to the last bit."""
    side = 2 * patch
    pixels = torch.randn(3, 3, 2 * side, 5 * side, generator=torch.Generator().manual_seed(0))
    library = tiny.Qwen2VLImageProcessor(patch_size=patch, do_resize=False, do_rescale=False, do_normalize=False)
    expected = library(list(pixels), return_tensors="pt")["pixel_values"]
    found = patchify(pixels, patch_size=patch, merge_size=2, temporal_size=2)
    torch.testing.assert_close(found, expected, **EXACT)


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([28, 32]), st.sampled_from([3136, 65536]))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_smart_size_is_the_librarys(height, width, factor, smallest) -> None:
    """Every size and both families' limits; what the library refuses is None."""
    limits = {"factor": factor, "min_pixels": smallest, "max_pixels": 1_000_000}
    if max(height, width) > 200 * min(height, width):
        assert smart_size(height, width, **limits) is None
    else:
        assert smart_size(height, width, **limits) == smart_resize(height, width, **limits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("size", [(64, 96), (130, 60)])
def test_forward_is_the_models_own(family, size, attention) -> None:
    """Tokens, positions and the vision tower's inputs: logits are those of the processor's inputs in a plain call."""
    model, processor = tiny.pair(family)
    if attention == "eager":
        model = tiny.model(family, processor.tokenizer)
        model.set_attn_implementation("eager")
    assert_forward_is_the_models_own(model, processor, tiny.images(2, *size))


@pytest.mark.parametrize(
    ("kind", "sliding"),
    [(kind, length) for kind in ("Qwen2Config", "Qwen3Config") for length in (None, 20)] + [("LlamaConfig", None)],
)
def test_forward_with_other_language_models(kind, sliding) -> None:
    """InternVL comes with three of them; in some, layers attend to a window only."""
    processor = tiny.processor("internvl")
    windows = {"use_sliding_window": True, "sliding_window": sliding, "max_window_layers": 1} if sliding else {}
    model = tiny.model("internvl", processor.tokenizer, language=getattr(tiny.transformers, kind), **windows)
    assert_forward_is_the_models_own(model, processor, tiny.images(2))


def assert_forward_is_the_models_own(model, processor, batch: Tensor) -> None:
    network = Network(model, processor)
    text = render(processor, ZERO_SHOT_LEVELS, ZERO_SHOT_LEVELS.question, ZERO_SHOT_LEVELS.stem)
    prompt = tokenize(processor, text, network.family.around)
    with torch.no_grad():
        features = network.features(batch)
        assert features is not None
        found = network.logits(features, prompt)
        own = processor(text=[text] * 2, images=[pillow(image) for image in batch], return_tensors="pt")
        inputs = network.family.images(batch)
        assert inputs is not None
        expected = model(**{**own, **_tensors(inputs.keywords)}).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    layout = network.layout(prompt, features.tokens.shape[1], features.grid, None)
    assert layout.ids[0].tolist() == own["input_ids"][0].tolist()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gpu_graph_of_a_warm_call(family) -> None:
    """Nothing in a call depends on values, so that a CUDA graph of it serves other images of the size."""
    processor = tiny.pair(family)[1]
    network = Network(tiny.model(family, processor.tokenizer).cuda(), processor)
    prompt = tokenize(processor, render(processor, ZERO_SHOT_LEVELS, ZERO_SHOT_LEVELS.question), network.family.around)

    def score(batch: Tensor) -> Tensor:
        features = network.features(batch)
        assert features is not None
        return network.logits(features, prompt)

    images, others = tiny.images(2).cuda(), tiny.images(2, seed=1).cuda()
    with torch.inference_mode():
        expected = score(others)
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            score(images)
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                found = score(images)
        torch.cuda.current_stream().wait_stream(side)
        images.copy_(others)
        graph.replay()
        torch.testing.assert_close(found, expected, **NETWORK_BATCH)


def _tensors(keywords: dict) -> dict:
    """Our pixels in the processor's inputs: the two resize differently, which is tested elsewhere."""
    return {key: torch.tensor(value) if isinstance(value, list) else value for key, value in keywords.items()}


@pytest.mark.parametrize("family", tiny.QWEN)
@pytest.mark.parametrize("size", [(64, 96), (130, 60), (56, 56)])
def test_positions_are_the_models_own(family, size) -> None:
    """M-RoPE positions equal those that the model computes from `mm_token_type_ids`, which we spare it."""
    model, processor = tiny.pair(family)
    network = Network(model, processor)
    inputs = network.family.images(tiny.images(1, *size))
    assert inputs is not None
    prompt = tokenize(processor, render(processor, Q_INSIGHT, Q_INSIGHT.question))
    tokens = inputs.grid[0] * inputs.grid[1]
    layout = network.layout(prompt, tokens, inputs.grid, None)
    kinds = (layout.ids == processor.image_token_id).int()
    expected, deltas = model.model.get_rope_index(layout.ids, kinds, inputs.keywords["image_grid_thw"])
    assert layout.positions.tolist() == expected.tolist()
    assert layout.end == layout.ids.shape[1] + int(deltas[0, 0])


@pytest.mark.parametrize("size", [(4, 4), (8, 4), (6, 10), (2, 14), (10, 8)])
@pytest.mark.parametrize("family", tiny.QWEN)
def test_a_batch_at_once_is_image_by_image(family, size) -> None:
    """The tower that attends to a whole batch, or all its windows, at once gives the library's features."""
    tower = tiny.pair(family)[0].model.visual
    values = 3 * 2 * tower.config.patch_size**2
    patches = torch.randn(3 * size[0] * size[1], values, generator=torch.Generator().manual_seed(0))
    expected = tower(patches, grid_thw=torch.tensor([[1, *size]] * 3))
    geometry = geometry_of(tower, size[0] // 2, size[1] // 2)
    if geometry.windows is not None:
        assert (geometry.windows.filled is None) == (size[0] % 4 == size[1] % 4 == 0)
    tokens, *deep = run_tower(tower, patches, 3, geometry)
    torch.testing.assert_close(tokens.flatten(0, 1), expected.pooler_output, **NETWORK_BATCH)
    for found, layer in zip(deep, getattr(expected, "deepstack_features", []), strict=True):
        torch.testing.assert_close(found.flatten(0, 1), layer, **NETWORK_BATCH)


def test_prompts_character_for_character() -> None:
    """What the published scorers' models read, under their families' chat templates."""
    rate = (
        "What is your overall rating on the quality of this picture? The rating should be a float between 1 and 5, "
        "rounded to two decimal places, with 1 representing very poor quality and 5 representing excellent quality."
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    qwen = tiny.processor("qwen2_5_vl")
    assert render(qwen, VISUALQUALITY_R1, VISUALQUALITY_R1.question, VISUALQUALITY_R1.answer_prefix) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\nPicture 1: {image}You are doing the image quality assessment task. Here is the question: "
        f"{rate} Please only output the final answer with only one score in <answer> </answer> tags.<|im_end|>\n"
        "<|im_start|>assistant\n<answer>"
    )
    assert render(qwen, VISUALQUALITY_R1, VISUALQUALITY_R1.thinking_question) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\nPicture 1: {image}You are doing the image quality assessment task. Here is the question: "
        f"{rate} First output the thinking process in <think> </think> tags and then output the final answer with only "
        "one score in <answer> </answer> tags.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(qwen, Q_INSIGHT, Q_INSIGHT.question, Q_INSIGHT.answer_prefix) == (
        "<|im_start|>system\nA conversation between User and Assistant. The user asks a question, and the Assistant "
        "solves it. The assistant first thinks about the reasoning process in the mind and then provides the user with "
        "the answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
        "tags, respectively, i.e., <think> reasoning process here </think><answer> answer here </answer><|im_end|>\n"
        f"<|im_start|>user\n{rate} Return the final answer in JSON format with the following keys: "
        f'"rating": The score.{image}<|im_end|>\n<|im_start|>assistant\n<answer>{{"rating": '
    )
    assert render(tiny.processor("qwen3_5"), Q_REALIGN["quality"], Q_REALIGN["quality"].question, "Yes") == (
        f"<|im_start|>user\n{image}How would you rate the quality of this image?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nYes"
    )


def test_a_word_is_one_token_where_it_stands() -> None:
    """With its space behind a stem, or alone behind a stem that ends with the space."""
    made = tiny.processor("qwen2_5_vl", words=(" good", " Good", "Good", "Bad"))
    vocabulary = made.tokenizer.get_vocab()
    assert next_ids(made, "The quality is", [" good"]) == (vocabulary["Ġgood"],)
    assert next_ids(made, "The quality is", [" Good"]) == (vocabulary["ĠGood"],)
    assert next_ids(made, "The quality is ", ["Good", "Bad"]) == (vocabulary["Good"], vocabulary["Bad"])
    with pytest.raises(ValueError, match="'ood' to be one token"):
        next_ids(made, "The quality is G", ["ood"])


def test_tokens_that_cannot_be_read_are_refused() -> None:
    """A level of several tokens, two levels of one token, joined digits, and a prompt without its image."""
    plain = tiny.processor("qwen2_5_vl")
    with pytest.raises(ValueError, match="' superb' to be one token"):
        next_ids(plain, "The quality is", [" good", " superb"])
    with pytest.raises(ValueError, match="different tokens"):
        next_ids(plain, "The quality is", [" good", " good"])
    joined = tiny.processor("qwen2_5_vl", words=("98",))
    joined.tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(False, use_regex=False)
    with pytest.raises(ValueError, match="digit by digit"):
        digit_ids(joined, "<answer>")
    with pytest.raises(ValueError, match="one image placeholder"):
        tokenize(plain, "no image here")
    assert len(digit_ids(plain, "<answer>")[0]) == 10


def test_unsupported_families_and_strange_pairs_are_refused() -> None:
    """The error lists what is supported, or says that model and processor do not match."""
    model, processor = tiny.pair("qwen2_5_vl")
    other = type("Model", (), {"config": type("Config", (), {"model_type": "idefics3"})})
    with pytest.raises(ValueError, match="qwen2_5_vl, qwen3_vl, qwen3_5, llava_onevision, internvl"):
        family_of(other, processor)
    with pytest.raises(TypeError, match="merge_and_unload"):
        Network(torch.nn.Sequential(model), processor)
    with pytest.raises(ValueError, match="one checkpoint"):
        Network(model, tiny.processor("internvl"))
    scaled = tiny.model("internvl", processor.tokenizer, language=tiny.transformers.GraniteConfig)
    with pytest.raises(ValueError, match=r"language model of type .* got 'granite'"):
        Network(scaled, tiny.processor("internvl"))
    spread = tiny.model("qwen2_5_vl", processor.tokenizer)
    spread.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match="on one device, got one spread over 0, 1"):
        Network(spread, processor)
    nearest = tiny.processor("qwen2_5_vl")
    nearest.image_processor.resample = 0
    with pytest.raises(ValueError, match="bicubic"):
        family_of(model, nearest)


def test_whole_levels_survive() -> None:
    """The test images are what they claim: rounding to 8 bits does not move them."""
    levels = tiny.images(1) * 255
    np.testing.assert_allclose(levels, levels.round(), atol=1e-4)
