"""The page that lists every scorer says what the catalogue and the presets say."""

import re
from pathlib import Path

import pytest

import iqareward
from iqareward.rewards.catalog import CATALOG
from iqareward.rewards.vlm import presets

PAGE = Path(iqareward.__file__).parents[1] / "docs" / "reference" / "scorers.md"


def _rows() -> dict[str, dict[str, str]]:
    """Each table row by the first name in its first cell, with its cells by their headers."""
    found: dict[str, dict[str, str]] = {}
    header: list[str] = []
    for line in PAGE.read_text().splitlines():
        if not line.startswith("|"):
            header = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not header:
            header = cells
        elif name := re.match(r"`([^`]+)`", cells[0]):
            found[name[1]] = dict(zip(header, cells, strict=True))
    return found


@pytest.mark.parametrize("name", CATALOG)
def test_catalogue_rows(name) -> None:
    """Range, reference, gradient, licence and extra of every name of the catalogue."""
    row, entry, reward = _rows()[name], CATALOG[name], iqareward.load(name)
    if "range" in row:
        assert row["range"] == ", ".join("None" if bound is None else f"{bound:g}" for bound in reward.bounds)
        assert (row["reference"] == "yes") == entry.needs_references
    else:
        assert reward.bounds == (0.0, 1.0)
        assert not entry.needs_references
    assert (row["gradient"] == "yes") == entry.differentiable
    assert row["extra"].strip("`") == entry.extra
    assert row.get("licence", "Apache-2.0") == entry.licence


def test_rows_of_the_presets() -> None:
    """Hub ids and licences are those of the presets."""
    rows = _rows()
    for name, hub_id, preset in (
        ("qrealign", presets.Q_REALIGN_MODELS["mini"], presets.Q_REALIGN["quality"]),
        ("qrealign_lite", presets.Q_REALIGN_MODELS["lite"], presets.Q_REALIGN["quality"]),
        ("qrealign_pro", presets.Q_REALIGN_MODELS["pro"], presets.Q_REALIGN["aesthetics"]),
        ("visualquality_r1", presets.VISUALQUALITY_R1_MODEL, presets.VISUALQUALITY_R1),
        ("qinsight", presets.Q_INSIGHT_MODEL, presets.Q_INSIGHT),
    ):
        assert f"`{hub_id}`" in rows[name]["hub id"]
        assert rows[name]["licence"] == preset.licence
