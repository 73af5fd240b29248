"""Sizes of an mPLUG-Owl2 network, and their reading from a published config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Fields of a published config.json that this implementation has only one answer for: (section, key, answer).
_FIXED: tuple[tuple[str, str, Any], ...] = (
    ("", "model_type", "mplug_owl2"),
    ("", "hidden_act", "silu"),
    ("", "rope_scaling", None),
    ("", "attention_bias", False),
    ("", "mlp_bias", False),
    ("", "tie_word_embeddings", False),
    ("visual_model", "hidden_act", "quick_gelu"),
    ("visual_model", "num_channels", 3),
    ("visual_model", "layer_norm_eps", 1e-6),
    ("visual_abstractor", "layer_norm_eps", 1e-6),
)

_FIELDS: tuple[tuple[str, str, str], ...] = (
    ("vision_hidden", "visual_model", "hidden_size"),
    ("vision_ffn", "visual_model", "intermediate_size"),
    ("vision_layers", "visual_model", "num_hidden_layers"),
    ("vision_heads", "visual_model", "num_attention_heads"),
    ("image_size", "visual_model", "image_size"),
    ("patch_size", "visual_model", "patch_size"),
    ("abstractor_hidden", "visual_abstractor", "hidden_size"),
    ("abstractor_ffn", "visual_abstractor", "intermediate_size"),
    ("abstractor_layers", "visual_abstractor", "num_hidden_layers"),
    ("abstractor_heads", "visual_abstractor", "num_attention_heads"),
    ("num_queries", "visual_abstractor", "num_learnable_queries"),
    ("hidden", "", "hidden_size"),
    ("ffn", "", "intermediate_size"),
    ("layers", "", "num_hidden_layers"),
    ("heads", "", "num_attention_heads"),
    ("kv_heads", "", "num_key_value_heads"),
    ("vocab", "", "vocab_size"),
    ("rope_theta", "", "rope_theta"),
    ("rms_eps", "", "rms_norm_eps"),
)


@dataclass(frozen=True)
class Owl2Config:
    """Sizes of the network; the defaults are those of q-future/one-align (8.2 billion parameters).

    Example:
        >>> Owl2Config().num_patches
        1024

    References:
        Ye et al., "mPLUG-Owl2: Revolutionizing Multi-modal Large Language Model with Modality Collaboration", 2024,
        https://arxiv.org/abs/2311.04257
    """

    vision_hidden: int = 1024
    vision_ffn: int = 4096
    vision_layers: int = 24
    vision_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    abstractor_hidden: int = 1024
    abstractor_ffn: int = 2816
    abstractor_layers: int = 6
    abstractor_heads: int = 16
    num_queries: int = 64
    hidden: int = 4096
    ffn: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    vocab: int = 32000
    rope_theta: float = 10000.0
    rms_eps: float = 1e-6

    def __post_init__(self) -> None:
        for width, parts in (
            ("image_size", "patch_size"),
            ("vision_hidden", "vision_heads"),
            ("abstractor_hidden", "abstractor_heads"),
            ("hidden", "heads"),
            ("heads", "kv_heads"),
        ):
            if getattr(self, width) % getattr(self, parts):
                raise ValueError(
                    f"Owl2Config expected `{width}` divisible by `{parts}`, "
                    f"got {getattr(self, width)} and {getattr(self, parts)}."
                )

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image, without the class token."""
        return self.grid**2

    @classmethod
    def from_hub_dict(cls, config: Mapping[str, Any]) -> "Owl2Config":
        """The configuration that a published config.json describes; fields it leaves out have their defaults.

        Raises:
            ValueError: a field asks for something that this implementation does not do.
        """
        visual = config.get("visual_config") or {}
        sections = {
            "": config,
            "visual_model": visual.get("visual_model") or {},
            "visual_abstractor": visual.get("visual_abstractor") or {},
        }
        for section, key, answer in _FIXED:
            found = sections[section].get(key, answer)
            if found != answer:
                where = f"visual_config.{section}.{key}" if section else key
                raise ValueError(f"config.json says {where} = {found!r}; mPLUG-Owl2 here supports only {answer!r}.")
        sizes = {name: sections[part][key] for name, part, key in _FIELDS if sections[part].get(key) is not None}
        sizes.setdefault("kv_heads", sizes.get("heads", cls.heads))
        found = cls(**sizes)
        _check_redundant(sections["visual_abstractor"], found)
        return found


def _check_redundant(abstractor: Mapping[str, Any], config: Owl2Config) -> None:
    """Fields that repeat another size must agree with it."""
    for key, expected in (("encoder_hidden_size", config.vision_hidden), ("grid_size", config.grid)):
        found = abstractor.get(key) or expected
        if found != expected:
            raise ValueError(
                f"config.json says visual_config.visual_abstractor.{key} = {found}, which contradicts {expected} "
                "from visual_config.visual_model."
            )
