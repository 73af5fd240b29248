"""The drawings of the page, placed and captioned."""

# ruff: noqa: RUF001  typographic signs are meant

from functools import partial
from html import escape

from iqareward.demo.embed import drawing, picture
from iqareward.demo.experiment import NUM_SAMPLES, Experiment
from iqareward.demo.experiment import samples as pick_samples
from iqareward.demo.panels import draw_curves, draw_share, draw_weights
from iqareward.demo.photographs import DETAIL_SIDE, detail
from iqareward.demo.wording import label


def curves(experiment: Experiment) -> str:
    """A panel per reward."""
    figures = []
    for reward in experiment.scores:
        title = label(reward).title
        draw = partial(draw_curves, experiment=experiment, reward=reward)
        image = drawing(draw, (2.75, 2.1), f"{title} against the level of damage", narrow=(1.95, 1.8))
        figures.append(f"<figure><h3>{escape(title)}</h3>{image}</figure>")
    return "".join(figures)


def series_key(experiment: Experiment) -> str:
    """The degradations in their colours."""
    keys = [
        f'<span class="key" style="color: var(--series{index})">{escape(degradation.name)}</span>'
        for index, degradation in enumerate(experiment.degradations)
    ]
    return ", ".join(keys)


def samples(experiment: Experiment) -> str:
    """Some samples from easy to hard, each with its two weights stacked as a bar."""
    figures = []
    for sample in pick_samples(experiment, NUM_SAMPLES):
        bar = f'<div class="bar" style="--w-rl: {sample.rl:.4f}; --w-sft: {sample.sft:.4f}"><i></i><i></i></div>'
        image = picture(detail(sample.picture, sample.focus, DETAIL_SIDE), sample.title)
        text = f"<b>SFT {sample.sft:.2f}</b>{escape(sample.title)}<br>error {255 * sample.difficulty:.1f}"
        figures.append(f"<figure>{bar}{image}<figcaption>{text}</figcaption></figure>")
    return "".join(figures)


def weights(experiment: Experiment) -> str:
    """Both weights against difficulty."""
    draw = partial(draw_weights, experiment=experiment)
    return drawing(draw, (9.4, 3.6), "RL and SFT weight against difficulty", narrow=(3.9, 3.6))


def handover(experiment: Experiment) -> str:
    """A panel per factor on the errors."""
    figures = []
    for factor, weights in experiment.handover.items():
        rl, sft = (f"{float(row.mean()):.2f}" for row in (weights.rl, weights.sft))
        image = drawing(
            partial(draw_share, weights=weights), (2.4, 1.8), f"errors times {factor:g}: RL {rl}, SFT {sft}"
        )
        figures.append(f"<figure><h3>errors × {factor:g}</h3><b>SFT {sft}</b>{image}</figure>")
    return "".join(figures)
