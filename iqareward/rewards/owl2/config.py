"""Sizes of an mPLUG-Owl2 network, and their reading from a published config.json."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# Fields of a published config.json that this implementation has only one answer for: (section, key, answer).
_FIXED: tuple[tuple[str, str, Any], ...] = (
    ("", "model_type", "mplug_owl2"),
    ("", "hidden_act", "silu"),
    ("", "rope_scaling", None),
    ("", "attention_bias", False),
    ("", "mlp_bias", False),
    ("", "tie_word_embeddings", False),
    ("", "quantization_config", None),
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

_LARGEST = 2**20  # rows or columns of any matrix, several times what the largest published models have
_MOST_LAYERS = 1000


@dataclass(frozen=True)
class Owl2Config:
    """Sizes of the network; the defaults are those of q-future/one-align (8.2 billion parameters).

    Raises:
        ValueError: a size is not a whole number in the bounds of real networks, or two sizes contradict each other.

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
        _check("Owl2Config", asdict(self), {})

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image, without the class token."""
        return self.grid**2

    @classmethod
    def from_hub_dict(cls, config: Mapping[str, Any], *, source: str = "config.json") -> "Owl2Config":
        """The configuration that a published config.json describes; fields it leaves out have their defaults.

        Args:
            config: the content of the file.
            source: its path, for error messages.

        Raises:
            ValueError: a field asks for something that this implementation does not do, or for an impossible size.
        """
        visual = _section(config, "visual_config", source)
        sections = {
            "": config,
            "visual_model": _section(visual, "visual_model", source),
            "visual_abstractor": _section(visual, "visual_abstractor", source),
        }
        for section, key, answer in _FIXED:
            found = sections[section].get(key, answer)
            if found != answer:
                where = _where(section, key)
                raise ValueError(f"{source} says {where} = {found!r}; mPLUG-Owl2 here supports only {answer!r}.")
        sizes = {name: sections[part][key] for name, part, key in _FIELDS if sections[part].get(key) is not None}
        sizes.setdefault("kv_heads", sizes.get("heads", cls.heads))
        _check(source, asdict(cls()) | sizes, {name: _where(part, key) for name, part, key in _FIELDS})
        found = cls(**sizes)
        _check_redundant(sections["visual_abstractor"], found, source)
        return found


def _section(config: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{source} expected an object as {key}, got {found!r:.100}.")
    return found


def _where(section: str, key: str) -> str:
    return f"visual_config.{section}.{key}" if section else key


def _check(source: str, sizes: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Refuse sizes that no network has, under the names that `source` has for them."""
    for name, value in sizes.items():
        shown = names.get(name, name)
        if name in ("rope_theta", "rms_eps"):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
                raise ValueError(f"{source} expected a positive number as {shown}, got {value!r:.100}.")
            continue
        most = _MOST_LAYERS if name.endswith("layers") else _LARGEST
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{source} expected a whole number from 1 to {most} as {shown}, got {value!r:.100}.")
    for width, parts, factor in (
        ("image_size", "patch_size", 1),
        ("vision_hidden", "vision_heads", 1),
        ("abstractor_hidden", "abstractor_heads", 1),
        ("hidden", "heads", 2),  # rotary positions turn pairs of channels of each head
        ("heads", "kv_heads", 1),
    ):
        if sizes[width] % (factor * sizes[parts]):
            twice = "twice " if factor == 2 else ""
            raise ValueError(
                f"{source} expected {names.get(width, width)} divisible by {twice}{names.get(parts, parts)}, "
                f"got {sizes[width]} and {sizes[parts]}."
            )
    if sizes["abstractor_hidden"] != sizes["vision_hidden"]:
        raise ValueError(
            f"{source} expected {names.get('abstractor_hidden', 'abstractor_hidden')} equal to "
            f"{names.get('vision_hidden', 'vision_hidden')} (their rows are attended together), "
            f"got {sizes['abstractor_hidden']} and {sizes['vision_hidden']}."
        )
    if sizes["abstractor_hidden"] % 4:
        raise ValueError(
            f"{source} expected {names.get('abstractor_hidden', 'abstractor_hidden')} divisible by 4 (sine and cosine "
            f"of two coordinates), got {sizes['abstractor_hidden']}."
        )


def _check_redundant(abstractor: Mapping[str, Any], config: Owl2Config, source: str) -> None:
    """Fields that repeat another size must agree with it."""
    for key, expected in (("encoder_hidden_size", config.vision_hidden), ("grid_size", config.grid)):
        found = abstractor.get(key) or expected
        if found != expected:
            raise ValueError(
                f"{source} says visual_config.visual_abstractor.{key} = {found!r:.100}, which contradicts {expected} "
                "from visual_config.visual_model."
            )
