"""The pictures of the page with their scores: a strip per photograph and degradation, chosen without any script."""

from html import escape

from iqareward.demo.embed import picture
from iqareward.demo.experiment import Experiment
from iqareward.demo.photographs import DETAIL_SIDE, detail
from iqareward.demo.wording import label, signed


def choices(experiment: Experiment) -> str:
    """CSS that shows the strip of the chosen photograph and degradation, and marks the chosen labels."""
    photos, damages = range(len(experiment.photographs)), range(len(experiment.degradations))
    rules = [
        f"#photo{p}:checked ~ #damage{d}:checked ~ .photo{p}.damage{d} {{ display: grid; }}"
        for p in photos
        for d in damages
    ]
    for name in [f"photo{p}" for p in photos] + [f"damage{d}" for d in damages]:
        own_label = f'~ .tabs label[for="{name}"]'
        rules.append(
            f"#{name}:checked {own_label} {{ background: var(--ink); border-color: var(--ink); color: var(--paper); }}"
        )
        rules.append(f"#{name}:focus-visible {own_label} {{ outline: 2px solid var(--rl); outline-offset: 2px; }}")
    return "\n".join(rules)


def explorer(experiment: Experiment) -> str:
    """Radio buttons, and the strips that they choose from."""
    photos = [photograph.name for photograph in experiment.photographs]
    damages = [degradation.name for degradation in experiment.degradations]
    inputs = _inputs("photo", photos) + _inputs("damage", damages)
    tabs = f'<div class="tabs">{_labels("photo", photos)}{_labels("damage", damages)}</div>'
    strips = [_strip(experiment, p, d) for p in range(len(photos)) for d in range(len(damages))]
    return f'<div class="explorer">{inputs}{tabs}{"".join(strips)}</div>'


def _inputs(group: str, names: list[str]) -> str:
    return "".join(
        f'<input class="choice" type="radio" name="{group}" id="{group}{index}"{"" if index else " checked"}>'
        for index in range(len(names))
    )


def _labels(group: str, names: list[str]) -> str:
    labels = [f'<label for="{group}{index}">{escape(name)}</label>' for index, name in enumerate(names)]
    return f"<div>{''.join(labels)}</div>"


def _strip(experiment: Experiment, p: int, d: int) -> str:
    """A photograph under one degradation: original and damaged versions side by side."""
    photograph, degradation = experiment.photographs[p], experiment.degradations[d]
    figures = []
    for level, pixels in enumerate(experiment.pictures[p][d]):
        setting = degradation.written(level)
        alt = f"{photograph.name}, {degradation.name} {setting}"
        image = picture(detail(pixels, photograph.focus, DETAIL_SIDE), alt)
        rows = [
            _score_row(reward.name, experiment.scores[reward.name][p, d].tolist(), level, reward.needs_references)
            for reward in experiment.rewards
        ]
        figures.append(
            f"<figure>{image}<figcaption><b>{escape(setting)}</b><dl>{''.join(rows)}</dl></figcaption></figure>"
        )
    return f'<div class="strip photo{p} damage{d}">{"".join(figures)}</div>'


def _score_row(reward: str, scores: list[float], level: int, with_original: bool) -> str:
    title, decimals = label(reward)
    rose = level > 0 and scores[level] > scores[level - 1]
    mark = '<span class="up" title="rose although the damage grew">▲</span> ' if rose else ""
    kind = "" if with_original else ' class="alone"'
    return f"<dt{kind}>{escape(title)}</dt><dd{kind}>{mark}{signed(scores[level], decimals)}</dd>"
