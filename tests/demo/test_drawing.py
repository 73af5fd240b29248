"""Colours that can be read, and labels that do not touch."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iqareward.demo.palette import DAY, NIGHT, Palette
from iqareward.demo.panels import spread


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("palette", [DAY, NIGHT], ids=["day", "night"])
def test_text_can_be_read(palette: Palette) -> None:
    """Every colour used for text has the contrast of 4.5 with the page that WCAG 2 asks for."""
    for colour in (palette.ink, palette.muted, palette.rl, *palette.series):
        lighter, darker = sorted((luminance(colour), luminance(palette.paper)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, colour


def test_a_drawing_can_change_its_colours() -> None:
    """No colour of the day stands for two things, so that each has one colour of the night."""
    assert len(set(DAY.colours())) == len(DAY.colours())


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_labels_move_apart_in_order(places: list[float]) -> None:
    """Neighbours end at least a gap apart, nobody overtakes, and the middle of the group stays."""
    gap = 0.1
    moved = spread(places, gap)
    order = sorted(range(len(places)), key=places.__getitem__)
    for lower, upper in itertools.pairwise(order):
        assert moved[upper] - moved[lower] >= gap - 1e-3
    assert sum(moved) == pytest.approx(sum(places), abs=1e-9)


def test_labels_with_room_stay_where_they_are() -> None:
    """Nothing moves that does not have to."""
    assert spread([0.9, 0.1, 0.5], 0.1) == [0.9, 0.1, 0.5]
