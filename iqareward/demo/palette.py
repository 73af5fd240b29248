"""One palette for pages and figures, by day and by night; chosen so that colour-blind readers can tell it apart."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Palette:
    """Colours by what they mean.

    Attributes:
        paper: the page.
        card: surfaces on the page.
        ink: text.
        muted: secondary text, axes.
        line: rules and grid.
        good: the score falls with damage.
        bad: the score rises with damage.
        rl: reinforcement learning.
        sft: supervised fine-tuning.
        series0: the first degradation, and so on.
    """

    paper: str
    card: str
    ink: str
    muted: str
    line: str
    good: str
    bad: str
    rl: str
    sft: str
    series0: str
    series1: str
    series2: str
    series3: str

    @property
    def series(self) -> tuple[str, str, str, str]:
        """One colour per degradation."""
        return self.series0, self.series1, self.series2, self.series3

    def colours(self) -> tuple[str, ...]:
        """All of them, in the same order for every palette."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def css(self) -> str:
        """The palette as CSS custom properties."""
        return " ".join(f"--{field.name}: {getattr(self, field.name)};" for field in fields(self))


# Series: Okabe and Ito, "Color Universal Design" (2008), https://jfly.uni-koeln.de/color/, darkened by day and
# lightened by night until text in these colours has a contrast of 4.5 with the paper. Figures add a marker to each.
DAY = Palette(
    paper="#fbfaf8",
    card="#ffffff",
    ink="#1c1b1a",
    muted="#66625d",
    line="#e3dfd9",
    good="#2f7fb8",
    bad="#d9661f",
    rl="#4a3fb0",
    sft="#e9a93c",
    series0="#0068a6",
    series1="#b84c00",
    series2="#007a58",
    series3="#a34d82",
)
NIGHT = Palette(
    paper="#151517",
    card="#1d1d20",
    ink="#ece9e4",
    muted="#a19c95",
    line="#34343a",
    good="#4e9fd6",
    bad="#e07f3c",
    rl="#9a8ff5",
    sft="#d9a441",
    series0="#56b4e9",
    series1="#f08a4b",
    series2="#2dc79b",
    series3="#e59cc7",
)
MARKERS = ("o", "s", "^", "D")
