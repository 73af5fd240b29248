"""Tiny CLIP checkpoints with seeded weights, in the layouts of transformers and of open_clip."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'"
SIDE = 32
CONTEXT = 12


def tokenizer() -> Any:
    """It knows letters, alone and at the end of a word, and one merge."""
    import transformers

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "th", "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer({word: number for number, word in enumerate(words)}, [("t", "h")])


def model(act: str = "quick_gelu", patch: int = 8, eos: int | None = None) -> Any:
    """A `CLIPModel` with large weights, so that features differ, and a common direction, so that no cosine is cut."""
    import transformers

    size = len(tokenizer())
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": act, "projection_dim": 24}
    text = {
        "hidden_size": 32, "intermediate_size": 128, "vocab_size": size, "max_position_embeddings": CONTEXT,
        "bos_token_id": size - 2, "eos_token_id": size - 1 if eos is None else eos, "pad_token_id": size - 1,
    }  # fmt: skip
    vision = {"hidden_size": 48, "intermediate_size": 192, "image_size": SIDE, "patch_size": patch}
    config = transformers.CLIPConfig(text_config=text | layers, vision_config=vision | layers, projection_dim=24)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = transformers.CLIPModel(config).eval()
        for value in net.parameters():
            if value.ndim > 1:
                torch.nn.init.normal_(value, std=0.15)
        common = torch.randn(24)
    pairs = (
        (net.vision_model.post_layernorm, net.visual_projection),
        (net.text_model.final_layer_norm, net.text_projection),
    )
    for norm, projection in pairs:
        norm.bias.data = torch.linalg.pinv(projection.weight.detach()) @ common
    return net


def checkpoint(folder: Path, **options: Any) -> Path:
    """A folder as the hub has them: weights, configuration, tokenizer, and image processor."""
    import transformers

    if not (folder / "config.json").exists():
        model(**options).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
        transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


def in_open_clip(net: Any) -> dict[str, Tensor]:
    """The weights of a `CLIPModel` as open_clip would store them."""
    ours, theirs = net.state_dict(), {}
    for side, start in (("text_model", ""), ("vision_model", "visual.")):
        for layer in range(2):
            here, there = f"{side}.encoder.layers.{layer}.", f"{start}transformer.resblocks.{layer}."
            for part in ("weight", "bias"):
                fused = [ours[f"{here}self_attn.{letter}_proj.{part}"] for letter in "qkv"]
                theirs[f"{there}attn.in_proj_{part}"] = torch.cat(fused)
                theirs[f"{there}attn.out_proj.{part}"] = ours[f"{here}self_attn.out_proj.{part}"]
                theirs[f"{there}ln_1.{part}"] = ours[f"{here}layer_norm1.{part}"]
                theirs[f"{there}ln_2.{part}"] = ours[f"{here}layer_norm2.{part}"]
                theirs[f"{there}mlp.c_fc.{part}"] = ours[f"{here}mlp.fc1.{part}"]
                theirs[f"{there}mlp.c_proj.{part}"] = ours[f"{here}mlp.fc2.{part}"]
    for part in ("weight", "bias"):
        theirs[f"ln_final.{part}"] = ours[f"text_model.final_layer_norm.{part}"]
        theirs[f"visual.ln_pre.{part}"] = ours[f"vision_model.pre_layrnorm.{part}"]
        theirs[f"visual.ln_post.{part}"] = ours[f"vision_model.post_layernorm.{part}"]
    theirs["token_embedding.weight"] = ours["text_model.embeddings.token_embedding.weight"]
    theirs["positional_embedding"] = ours["text_model.embeddings.position_embedding.weight"]
    theirs["text_projection"] = ours["text_projection.weight"].T
    theirs["visual.class_embedding"] = ours["vision_model.embeddings.class_embedding"]
    theirs["visual.conv1.weight"] = ours["vision_model.embeddings.patch_embedding.weight"]
    theirs["visual.positional_embedding"] = ours["vision_model.embeddings.position_embedding.weight"]
    theirs["visual.proj"] = ours["visual_projection.weight"].T
    theirs["logit_scale"] = ours["logit_scale"]
    return theirs


def hpsv2_file(folder: Path) -> Path:
    """A file in the layout of HPSv2's."""
    file = folder / "HPS_v2.1_compressed.pt"
    if not file.exists():
        torch.save({"epoch": 1, "state_dict": in_open_clip(model(act="gelu"))}, file)
    return file


def laion_layers() -> torch.nn.Sequential:
    """The authors' layers on features of width 24."""
    from torch.nn import Dropout, Linear, Sequential

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        layers = Linear(24, 1024), Dropout(0.2), Linear(1024, 128), Dropout(0.2), Linear(128, 64), Dropout(0.1)
        return Sequential(*layers, Linear(64, 16), Linear(16, 1)).eval()


def laion_file(folder: Path) -> Path:
    """A file in the layout of the authors' head."""
    file = folder / "sac+logos+ava1-l14-linearMSE.pth"
    if not file.exists():
        torch.save({f"layers.{key}": value for key, value in laion_layers().state_dict().items()}, file)
    return file


def rali_folder(folder: Path) -> Path:
    """A folder in the layout of RALI's, with the mean of its analysis as a file of numpy."""
    file = folder / "ckpt.pt"
    if not file.exists():
        net = model()
        checkpoint(folder / "best")
        rng = torch.Generator().manual_seed(6)
        parts = {
            "pca_scale": 0.5 + torch.rand(24, generator=rng),
            "pca_components": torch.randn(8, 24, generator=rng),
            "prototypes": torch.randn(5, 8, generator=rng),
            "proto_scores": torch.rand(5, generator=rng),
            "logit_scale": torch.tensor(4.0),
        }
        stored = {f"clip.{key}": value for key, value in net.state_dict().items()}
        stored |= {"clip.vision_model.embeddings.position_ids": torch.arange(17)[None]}  # older releases store them
        torch.save({"epoch": 1, "state_dict": stored | {f"scorer.{key}": value for key, value in parts.items()}}, file)
        np.save(folder / "pca_mean.npy", 3 * torch.randn(24, generator=rng).double().numpy())
    return folder


NAMES = ("clipscore", "pickscore", "hpsv2", "laion_aesthetic", "clipiqa", "rali")


def reward(name: str, folder: Path, **options: Any) -> Any:
    """The reward of that name with tiny weights, which are put into the folder."""
    from iqareward import rewards

    folder = folder / name
    folder.mkdir(exist_ok=True)
    if name == "hpsv2":
        base = checkpoint(folder, act="gelu")
        return rewards.HPSv2Reward(weights=hpsv2_file(folder), base=base, **options)
    if name == "rali":
        return rewards.RALIReward(weights=rali_folder(folder), **options)
    base = checkpoint(folder)
    if name == "laion_aesthetic":
        return rewards.LAIONAestheticReward(weights=laion_file(folder), base=base, **options)
    kinds = {
        "clipscore": rewards.CLIPScoreReward, "pickscore": rewards.PickScoreReward, "clipiqa": rewards.CLIPIQAReward,
    }  # fmt: skip
    return kinds[name](weights=base, **options)
