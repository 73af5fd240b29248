"""The page: every sentence with a number in it is written from the summary, so it stays true when numbers change."""

# ruff: noqa: RUF001  typographic signs are meant

from html import escape
from importlib import resources
from string import Template
from typing import Any

from iqareward.demo import plots, strips
from iqareward.demo.experiment import Experiment
from iqareward.demo.palette import DAY, NIGHT
from iqareward.demo.table import correlation_table
from iqareward.demo.training import Training
from iqareward.demo.training_section import section
from iqareward.demo.wording import label, signed, spelled


def render(experiment: Experiment, summary: dict[str, Any], training: Training) -> str:
    """The report as one HTML document without outside resources.

    Args:
        experiment: gives pictures and curves.
        summary: of `summarise`, with `environment` and `training`; gives every figure in the text.
        training: gives restored pictures and curves.
    """
    template = resources.files("iqareward.demo").joinpath("report.html").read_text(encoding="utf-8")
    with_original = {reward.name: reward.needs_references for reward in experiment.rewards}
    return Template(template).substitute(
        day=DAY.css(),
        night=NIGHT.css(),
        columns=experiment.num_levels + 1,
        choices=strips.choices(experiment),
        lede=_lede(summary, with_original),
        explorer=strips.explorer(experiment),
        table=correlation_table(summary, with_original),
        series_key=plots.series_key(experiment),
        curves=plots.curves(experiment),
        damaged=summary["settings"]["damaged"],
        mode=_mode(experiment),
        samples=plots.samples(experiment),
        weights=plots.weights(experiment),
        difficulty_note=_difficulty_note(summary),
        handover=plots.handover(experiment),
        training=section(training, summary["training"]),
        notes="".join(f"<li>{note}</li>" for note in _notes(summary)),
        made=_made(summary["environment"], summary["settings"]["seed"]),
        credits="; ".join(escape(photograph.credit) for photograph in experiment.photographs),
    )


def _lede(summary: dict[str, Any], with_original: dict[str, bool]) -> str:
    settings, correlations = summary["settings"], summary["rank_correlation"]
    photographs, ways = spelled(len(settings["photographs"])), spelled(len(settings["degradations"]))
    sentences = [
        f"{spelled(len(with_original)).capitalize()} rewards score {photographs} photographs, each damaged in {ways} "
        f"ways at {spelled(settings['levels'])} strengths."
    ]
    means = [correlations[name]["mean"] for name, sees in with_original.items() if sees]
    if means and None not in means:
        low, high = signed(min(means)), signed(max(means))
        span = low if low == high else f"{low} to {high}"
        sentences.append(f"Those that compare with the original reach a rank correlation of {span}; −1 is perfect.")
    alone = [name for name, sees in with_original.items() if not sees]
    if alone:
        reached = " and ".join(f"{label(name).title} reaches {signed(correlations[name]['mean'])}" for name in alone)
        counts = " and ".join(str(summary["mistakes"][name]["above_original"]) for name in alone)
        they = "they prefer" if len(alone) > 1 else "it prefers"
        sentences.append(
            f"From the picture alone, {reached}; {they} a damaged picture to its own original in {counts} of "
            f"{settings['damaged']} cases."
        )
    return " ".join(sentences)


def _mode(experiment: Experiment) -> str:
    """What the weighter's mode, which is the default of the library, does to RL."""
    if bool((experiment.weights.rl == 1).all()):
        return (
            "RL keeps its full weight and SFT joins it; <code>mode='convex'</code> would take from RL what SFT gains."
        )
    return "What SFT gains, RL gives up; <code>mode='additive'</code> would leave RL its full weight."


def _difficulty_note(summary: dict[str, Any]) -> str:
    means = summary["difficulty"]["mean_by_degradation"].items()
    listed = ", ".join(f"{escape(name)} {255 * value:.1f}" for name, value in means if value is not None)
    return (
        f"Mean error by damage, in steps of 1/255: {listed}. RMSE is one choice of difficulty; with another distance "
        "the samples are ordered otherwise."
    )


def _notes(summary: dict[str, Any]) -> list[str]:
    """What a careful reader should hold against the page."""
    settings, mistakes = summary["settings"], summary["mistakes"]
    notes = [
        "ρ is measured against levels of damage that we chose, not against human opinion. It says whether a reward "
        "keeps the order of one kind of damage on one photograph, not whether it weighs blur against noise as we do.",
        f"{spelled(len(settings['photographs'])).capitalize()} photographs are few, and each “worst” rests on one.",
        "In the first half the damaged pictures stand in for the outputs of a model, and the handover multiplies their "
        "errors instead of waiting for a model to reduce them.",
        "The trained model is tiny, its scenes are synthetic, there is one seed and no arm to compare with: it shows "
        "how the parts work together, not that adaptive weighting is better than a constant.",
        "Rewards that compare with the original know the answer, so doing well here is the least to expect. They can "
        "only be used where a ground truth exists.",
    ]
    if "piqe" in mistakes:
        notes.append(
            "PIQE changes in steps. Its gradient is zero everywhere: a reward, not a loss. And it has a floor at which "
            f"different pictures are tied, {mistakes['piqe']['at_lowest_score']} of {settings['damaged']} here. Light "
            "noise raises it on most photographs, so it must not be the only reward."
        )
    if "niqe" in mistakes:
        notes.append(
            "NIQE measures the distance to the statistics of clean photographs. Those in the package come from five "
            "photographs, these among them; here each is judged by the statistics of the other four."
        )
    missing = {label(name).title: row["not_scored"] for name, row in mistakes.items() if row["not_scored"]}
    if missing:
        listed = ", ".join(f"{escape(name)} {count}" for name, count in missing.items())
        notes.append(f"Damaged pictures that got no score, for example because they are too small: {listed}.")
    return notes


def _made(environment: dict[str, Any], seed: int) -> str:
    """How the page came about."""
    packages = ", ".join(f"{name} {escape(version)}" for name, version in environment["versions"].items())
    return (
        f"Made by <code>iqareward demo</code>, which damaged and scored in {environment['seconds']:g} seconds on "
        f"one thread of {escape(environment['processor'])} ({escape(environment['system'])}); seed {seed}. Versions: "
        f"{packages}. The numbers as data: <code>results.json</code> and <code>scores.csv</code> beside this page."
    )
