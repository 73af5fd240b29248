"""How rewards and numbers are written, on the page and in the terminal alike."""

# ruff: noqa: RUF001  typographic signs are meant

from typing import NamedTuple


class Label(NamedTuple):
    """How a reward is shown: its title, and the decimals of its scores."""

    title: str
    decimals: int


LABELS = {
    "psnr": Label("PSNR", 1),
    "ssim": Label("SSIM", 3),
    "ms_ssim": Label("MS-SSIM", 3),
    "gmsd": Label("GMSD", 3),
    "haarpsi": Label("HaarPSI", 3),
    "piqe": Label("PIQE", 1),
    "niqe": Label("NIQE", 2),
}


def label(reward: str) -> Label:
    """The reward's label; an unknown name is shown as it is.

    Example:
        >>> label("ms_ssim").title, label("mine").title
        ('MS-SSIM', 'mine')
    """
    return LABELS.get(reward, Label(reward, 3))


def signed(value: float | None, decimals: int = 2) -> str:
    """A number with a true minus sign and no negative zero; an en dash where there is none.

    Example:
        >>> signed(-0.9666), signed(-0.001), signed(None)
        ('−0.97', '0.00', '–')
    """
    if value is None or value != value:
        return "–"
    text = f"{value:.{decimals}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def spelled(count: int) -> str:
    """A count as people write it in a sentence: small ones in words.

    Example:
        >>> spelled(4), spelled(84)
        ('four', '84')
    """
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return words[count] if count < len(words) else str(count)


def percent(share: float) -> str:
    """A share in [0, 1] in whole per cent.

    Example:
        >>> percent(0.0875)
        '9%'
    """
    return f"{100 * share:.0f}%"
