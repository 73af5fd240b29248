"""Find out which packages, devices and rewards work on this machine: `iqareward doctor` and `iqareward list`."""

import functools
import importlib
import importlib.metadata as metadata
import os
import platform
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import groupby
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants, try_to_load_from_cache
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.text import Text

import iqareward
from iqareward.cli.text import printable
from iqareward.rewards.catalog import CATALOG, Entry, pyiqa_entries
from iqareward.rewards.clip.checkpoints import HPSV2, HPSV2_FILE
from iqareward.rewards.perceptual import BACKBONES, cached_file
from iqareward.rewards.pyiqa import NEEDS_CUDA, NO_WEIGHTS
from iqareward.rewards.specs import PYIQA_PREFIX

LEGEND = """
here   yes; download: the first call fetches the weights;
       [vlm]: pip install "iqareward[vlm]"
refs   it compares with references
grad   differentiable=True can be asked for
range  of most photographs; higher is better
sign   negated: minus the published metric

Sums: "0.7*qalign + 0.3*psnr"; scores that leave [-1, 1] are calibrated, or take
a range: "0.7*ssim + 0.3*lpips[-1, 0]". More names: iqareward list --pyiqa"""
_COLUMNS = ("name", "here", "refs", "grad", "range", "sign", "a score says", "licence")
_COLOURS = {"ok": "green", "missing": "yellow", "old": "yellow", "broken": "red", "note": "blue"}
_TORCHVISION = "torchvision:"


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        part: "core", "extra ...", "devices" or "rewards".
        name: package, device or reward.
        state: "ok", "missing", "old", "broken" or "note".
        detail: version or reason.
        fix: command that installs what is missing or downloads the weights; "" = nothing to do.
    """

    part: str
    name: str
    state: str
    detail: str = ""
    fix: str = ""


def diagnose() -> list[Finding]:
    """Check packages, extras and devices, and whether each reward can be used. Imports every package."""
    packages = list(_packages(_import_problem))
    return [*packages, *_devices(), *_rewards(CATALOG, packages)]


def list_rewards(*, pyiqa: bool) -> dict[str, dict[str, Any]]:
    """What is known of each reward of the catalogue, or of pyiqa's, and whether it works here; none is loaded."""
    entries = pyiqa_entries() if pyiqa else CATALOG
    rows: dict[str, dict[str, Any]] = {}
    for found in _rewards(entries, list(_packages(lambda name: ""))):
        row = entries[found.name]._asdict()
        del row["build"]
        here = {"works_here": found.state != "missing", "state": found.state, "detail": found.detail, "fix": found.fix}
        rows[found.name] = row | here
    return rows


def list_lines(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A header and a line per reward, in columns."""
    cells: list[tuple[str, ...]] = [_COLUMNS]
    for name, row in rows.items():
        usual = "" if row["usual"] is None else "{:g}..{:g}".format(*row["usual"])
        missing = f"[{row['extra'] or 'core'}]" if row["fix"] else row["detail"]
        cells.append((
            name,
            {"ok": "yes", "note": "download"}.get(row["state"], missing),
            "refs" if row["needs_references"] else "-",
            "grad" if row["differentiable"] else "-",
            usual,
            "-" if row["higher_is_better"] else "negated",
            row["summary"],
            row["licence"],
        ))  # fmt: skip
    yield from aligned(cells)


def aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """A line per row, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for texts in rows:
        yield "  ".join(f"{text:{width}}" for text, width in zip(texts, widths, strict=True)).rstrip()


def _packages(problem: Callable[[str], str]) -> Iterator[Finding]:
    """The core's requirements, then those of each extra; `problem` says why an installed one is broken."""
    found = metadata.distribution("iqareward")
    requirements = [Requirement(text) for text in found.requires or ()]
    extras = [extra for extra in found.metadata.get_all("Provides-Extra") or () if extra != "all"]
    yield Finding("core", "python", "ok", platform.python_version())
    for requirement in requirements:
        if requirement.marker is None:
            yield _package("core", requirement, "pip install --upgrade iqareward", problem)
    for extra in extras:
        for requirement in requirements:
            marker = requirement.marker
            if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
                yield _package(f"extra {extra}", requirement, f'pip install "iqareward[{extra}]"', problem)


def _package(part: str, requirement: Requirement, fix: str, problem: Callable[[str], str]) -> Finding:
    name = requirement.name
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(part, name, "missing", f"needs {requirement.specifier}", fix)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(part, name, "old", f"{version}, needs {requirement.specifier}", f"{fix} --upgrade")
    if reason := problem(name):
        return Finding(part, name, "broken", f"{version}: {reason}", f"pip install --force-reinstall {name}")
    return Finding(part, name, "ok", version)


@functools.cache
def _import_problem(distribution: str) -> str:
    """Why an installed package cannot be imported, e.g. built for another torch; "" if it can."""
    wanted = canonicalize_name(distribution)
    owned = metadata.packages_distributions().items()
    modules = [module for module, owners in owned if wanted in map(canonicalize_name, owners) and module[0] != "_"]
    module = next(
        (name for name in modules if canonicalize_name(name) == wanted), min(modules, key=len, default=wanted)
    )
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a broken installation raises is the finding
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def _devices() -> Iterator[Finding]:
    yield Finding("devices", "cpu", "ok", f"{torch.get_num_threads()} of {os.cpu_count()} threads, float32")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            half = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16: pass dtype=torch.float16"
            yield Finding(
                "devices", f"cuda:{index}", "ok", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {half}"
            )
    elif torch.version.cuda is None:
        yield Finding("devices", "cuda", "note", "this torch is built without CUDA")
    else:
        yield Finding("devices", "cuda", "note", f"torch has CUDA {torch.version.cuda} and finds no device or driver")


def _rewards(entries: Mapping[str, Entry], packages: Sequence[Finding]) -> Iterator[Finding]:
    """Whether each reward can be used now."""
    lacks = {finding.part: finding for finding in reversed(packages) if finding.state != "ok"}
    for name, entry in entries.items():
        lack = lacks.get("core") or lacks.get(f"extra {entry.extra}")
        if lack is not None:
            yield Finding("rewards", name, "missing", f"{lack.name} is {lack.state}", lack.fix)
        elif name.removeprefix(PYIQA_PREFIX) in NEEDS_CUDA and not torch.cuda.is_available():
            yield Finding("rewards", name, "missing", "needs CUDA")
        elif entry.weights == "pyiqa" and name.removeprefix(PYIQA_PREFIX) not in NO_WEIGHTS:
            yield Finding("rewards", name, "note", "pyiqa downloads weights at the first call, if it has not yet")
        elif fetch := _fetch_weights(entry.weights):
            yield Finding("rewards", name, "note", "weights are downloaded at the first call", fetch)
        else:
            yield Finding("rewards", name, "ok", "weights are here" if entry.weights not in ("", "pyiqa") else "")


def _fetch_weights(weights: str) -> str:
    """The command that downloads weights; "" if they are here, there are none, or pyiqa alone knows which."""
    if weights in ("", "pyiqa") or weights.startswith("package:"):
        return ""
    if weights.startswith(_TORCHVISION):
        net = weights.removeprefix(_TORCHVISION)
        file = cached_file(net)
        return "" if file.is_file() else f"curl --create-dirs -Lo {shlex.quote(str(file))} {BACKBONES[net].url}"
    known = ("model.safetensors.index.json", "pytorch_model.bin.index.json", "model.safetensors", "pytorch_model.bin")
    if weights == HPSV2:  # its repository has files of 8 GB beside
        known = (HPSV2_FILE,)
    if any(isinstance(try_to_load_from_cache(weights, file), str) for file in known):
        return ""
    return f"hf download {weights}" + (f" {HPSV2_FILE}" if weights == HPSV2 else "")


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print a section per part and a line per finding, with commands on lines of their own to copy."""

    def line(*texts: str | tuple[str, str]) -> None:
        console.print(Text.assemble(*texts), soft_wrap=True)

    line((f"iqareward {iqareward.__version__}", "bold"), f" on {platform.platform()}")
    for part, group in groupby(findings, lambda finding: finding.part.split()[0]):
        line((part, "bold"))
        section = list(group)
        names = [" ".join([*finding.part.split()[1:], finding.name]) for finding in section]
        width = max(map(len, names))
        for index, (finding, name) in enumerate(zip(section, names, strict=True)):
            colour = _COLOURS[finding.state]
            line("  ", (f"{finding.state:8}", colour), printable(f"{name:{width}}  {finding.detail}").rstrip())
            if finding.fix and (index + 1 == len(section) or section[index + 1].fix != finding.fix):
                line("      ", printable(finding.fix))  # once for neighbours that need the same
    rewards = [finding.state for finding in findings if finding.part == "rewards"]
    line(f"{rewards.count('ok')} of {len(rewards)} rewards work here now.")
    if "note" in rewards:
        line(
            f"{rewards.count('note')} more download their weights at the first call. For a machine without a network, "
            f"run their commands elsewhere and copy {constants.HF_HUB_CACHE} and {torch.hub.get_dir()}."
        )
