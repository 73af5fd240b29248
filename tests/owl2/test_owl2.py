"""The network reproduces the authors' code, under the published parameter names."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.meter import Meter
from iqareward.rewards.owl2.checkpoints import read_config
from iqareward.rewards.owl2.network import Layout, Owl2, Owl2Config
from iqareward.rewards.owl2.preprocess import LEVEL_IDS, PROMPTS, preprocess
from iqareward.rewards.owl2.rewards import QAlignReward
from tests.gpu import fake_gpu
from tests.owl2.owl2_tiny import SMALL, TINY, golden, reference_images, seeded_model
from tests.tolerances import NETWORK_BATCH

# The authors' code runs eager attention and no shared prefix: other summation orders in fp32, through some ten layers.
REFERENCE = {"rtol": 0.0, "atol": 1e-4}
REFERENCE_SCORE = {"rtol": 0.0, "atol": 2e-5}


@pytest.fixture(scope="module")
def model() -> Owl2:
    """The network of the reference figures."""
    return seeded_model(TINY)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """The reference images, preprocessed."""
    return torch.cat([preprocess(image[None], 448) for image in reference_images()])


@pytest.fixture(scope="module")
def rows(model, pixels) -> Tensor:
    """Image rows of the reference images."""
    with torch.no_grad():
        return model.encode_images(pixels)


def test_names_and_shapes_are_published(model) -> None:
    """Parameter names and shapes of the tiny model equal the authors' state dict."""
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == golden()["keys"]


def test_full_size_has_the_862_published_tensors() -> None:
    """Defaults are q-future/one-align: 862 tensors, 8,204,550,144 values, checked without allocating them."""
    with torch.device("meta"):
        state = Owl2(Owl2Config()).state_dict()
    assert len(state) == 862
    assert sum(value.numel() for value in state.values()) == 8_204_550_144
    for key, shape in {
        "model.embed_tokens.weight": (32000, 4096),
        "lm_head.weight": (32000, 4096),
        "model.layers.31.self_attn.v_proj.multiway.1.weight": (4096, 4096),
        "model.layers.0.post_attention_layernorm.multiway.0.weight": (4096,),
        "model.layers.7.mlp.down_proj.weight": (4096, 11008),
        "model.vision_model.embeddings.position_embedding": (1, 1025, 1024),
        "model.vision_model.embeddings.patch_embed.weight": (1024, 3, 14, 14),
        "model.vision_model.encoder.layers.23.self_attn.query_key_value.bias": (3072,),
        "model.visual_abstractor.encoder.layers.5.crossattention.attention.k_pos_embed": (1025, 1024),
        "model.visual_abstractor.encoder.layers.0.crossattention.output.mlp.ffn_ln.weight": (2816,),
        "model.visual_abstractor.visual_fc.weight": (4096, 1024),
    }.items():
        assert tuple(state[key].shape) == shape


def test_pixels_and_features_match_the_reference(pixels, rows) -> None:
    """Preprocessed pixels and the rows that replace the image token."""
    expected = golden()
    sample = torch.tensor(expected["pixels_every_112th_row_and_column"])
    torch.testing.assert_close(pixels[..., ::112, ::112], sample, rtol=0.0, atol=0.0)
    sample = torch.tensor(expected["features_every_16th_row_and_column"])
    torch.testing.assert_close(rows[:, ::16, ::16], sample, **REFERENCE)


@pytest.mark.parametrize("task", ["quality", "aesthetics"])
def test_logits_and_scores_match_the_reference(model, rows, task) -> None:
    """Level logits, their scores on [1, 5], and the first vocabulary ids at the last position."""
    expected = golden()
    with torch.no_grad():
        logits = model.level_logits(rows, model.prepare_prompt(*PROMPTS[task], LEVEL_IDS))
        others = model.level_logits(rows, model.prepare_prompt(*PROMPTS[task], tuple(range(8))))
    torch.testing.assert_close(logits, torch.tensor(expected[f"logits_{task}"]), **REFERENCE)
    torch.testing.assert_close(others, torch.tensor(expected[f"first_vocabulary_logits_{task}"]), **REFERENCE)
    scores = logits.softmax(-1) @ torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    torch.testing.assert_close(scores, torch.tensor(expected[f"score_{task}"]), **REFERENCE_SCORE)


def test_all_features_match_the_fixture(fixtures_dir, rows) -> None:
    """Every feature, where the full figures are at hand."""
    import numpy as np

    expected = torch.from_numpy(np.load(fixtures_dir / "mplug_owl2_tiny.npz")["feats"])
    torch.testing.assert_close(rows, expected, **REFERENCE)


def test_one_clip_matches_the_reference(model, rows) -> None:
    """The rows of two images in place of one image token, in a prompt that says "video" for "image"."""
    video = [tuple(4863 if token == 1967 else token for token in ids) for ids in PROMPTS["quality"]]
    with torch.no_grad():
        state = model.prepare_prompt(*video, LEVEL_IDS)
        logits = model.level_logits(torch.cat([rows[1], rows[0]])[None], state)
    torch.testing.assert_close(logits, torch.tensor(golden()["video_logits"]), **REFERENCE)


def test_shared_prefix_changes_nothing() -> None:
    """Caching the text before the image gives what running it with every image gives."""
    model = seeded_model(SMALL)
    prompt = PROMPTS["quality"]
    image_rows = torch.randn(2, 5, SMALL.hidden, generator=torch.Generator().manual_seed(0))
    state = model.prepare_prompt(*prompt, LEVEL_IDS)
    with torch.no_grad():
        embed = model.model.embed_tokens
        before, after = (embed(torch.tensor(ids))[:, None].expand(-1, 2, -1) for ids in prompt)
        rows = torch.cat([before, image_rows.transpose(0, 1), after])
        start = len(prompt.prefix)
        layout = Layout.build(SMALL, rows, image=(start, start + 5), past=0)
        for layer in model.model.layers:
            rows = layer(rows, layout)
        whole = model.lm_head(model.model.norm(rows))[-1][:, LEVEL_IDS]
        torch.testing.assert_close(model.level_logits(image_rows, state), whole, **NETWORK_BATCH)


def test_several_prompts_equal_one_at_a_time() -> None:
    """Prompts that share the vision tower score as they do alone."""
    model = seeded_model(SMALL)
    states = tuple(model.prepare_prompt(*PROMPTS[task], LEVEL_IDS) for task in ("quality", "aesthetics"))
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        both = model(pixels, states)
        alone = torch.cat([model(pixels, (state,)) for state in states], dim=1)
    assert both.shape == (3, 2, 5)
    torch.testing.assert_close(both, alone, **NETWORK_BATCH)


def test_gradient_equals_finite_differences() -> None:
    """Checkpointed backward through all three parts, in float64, against central differences along a direction."""
    model = seeded_model(SMALL).double()
    state = model.prepare_prompt(*PROMPTS["quality"], LEVEL_IDS)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(1, 3, 56, 56, generator=generator, dtype=torch.float64)
    direction = torch.randn(1, 3, 56, 56, generator=generator, dtype=torch.float64)

    def score(values: Tensor) -> Tensor:
        return model(values, (state,)).softmax(-1)[..., 0].sum()

    leaf = pixels.clone().requires_grad_()
    score(leaf).backward()
    with torch.no_grad():
        numeric = (score(pixels + 1e-5 * direction) - score(pixels - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((leaf.grad * direction).sum(), numeric, rtol=1e-5, atol=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


@fake_gpu
@pytest.mark.parametrize(("stack", "kernels"), [("layers", 29), ("vision_layers", 11), ("abstractor_layers", 20)])
def test_launches_of_a_layer(stack, kernels) -> None:
    """What one layer more launches on a GPU, where a single image is bound by launches."""
    found = []
    with Meter() as meter:
        for count in (2, 3):
            with torch.device("cuda"):
                model = Owl2(replace(SMALL, kv_heads=4, **{stack: count}))
            reward = QAlignReward(model.to(torch.bfloat16))
            images = torch.rand(2, 3, 56, 56, device="cuda")
            meter.second(lambda reward=reward, images=images: reward(images))
            found.append(meter.kernels)
    assert found[1] - found[0] <= kernels


def _config(folder: Path, content: dict[str, Any]) -> Owl2Config:
    (folder / "config.json").write_text(json.dumps(content))
    return read_config(folder / "config.json")


def test_config_from_a_published_file(tmp_path) -> None:
    """Fields of a config.json are mapped; what is left out has the published default."""
    config = _config(
        tmp_path,
        {
            "model_type": "mplug_owl2",
            "hidden_size": 64,
            "num_attention_heads": 8,
            "num_hidden_layers": 3,
            "visual_config": {
                "visual_model": {"hidden_size": 32, "num_attention_heads": 4, "image_size": 56},
                "visual_abstractor": {"hidden_size": 32, "num_attention_heads": 4, "grid_size": 4},
            },
        },
    )
    assert (config.hidden, config.heads, config.kv_heads, config.layers) == (64, 8, 8, 3)
    assert (config.vision_hidden, config.image_size, config.abstractor_hidden) == (32, 56, 32)
    assert config.abstractor_ffn == 2816
    assert _config(tmp_path, {}) == Owl2Config()


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"attention_bias": True},
        {"model_type": "llama"},
        {"visual_config": {"visual_model": {"hidden_act": "gelu"}}},
        {"visual_config": {"visual_abstractor": {"encoder_hidden_size": 768}}},
    ],
)
def test_unsupported_configs_are_refused(tmp_path, config) -> None:
    """A config.json that asks for another architecture is an error that names the field."""
    with pytest.raises(ValueError, match=r"config\.json says"):
        _config(tmp_path, config)
