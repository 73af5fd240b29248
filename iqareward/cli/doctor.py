"""What will work on this machine, what will not, and the command that mends it."""

import functools
import importlib
import importlib.metadata as metadata
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import iqareward
from iqareward.rewards.backbones import BACKBONES
from iqareward.rewards.catalog import CATALOG

TORCHVISION = "torchvision:"
COLOURS = {"ok": "green", "missing": "yellow", "old": "yellow", "broken": "red", "note": "blue"}


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        part: the section.
        name: what was looked at.
        state: "ok", "missing", "old", "broken" or "note".
        detail: version, place or reason.
        fix: the command or step that mends it; "" = nothing to do.
    """

    part: str
    name: str
    state: str
    detail: str = ""
    fix: str = ""


def diagnose() -> list[Finding]:
    """Everything found: packages, extras, devices, and whether each reward can be used. Imports every package."""
    packages = list(_packages())
    broken = {finding.part: finding for finding in reversed(packages) if finding.state != "ok"}
    return [*packages, *_devices(), *_rewards(broken)]


def _packages() -> Iterator[Finding]:
    """The core's requirements, then those of each extra."""
    found = metadata.distribution("iqareward")
    requirements = [Requirement(text) for text in found.requires or ()]
    extras = [extra for extra in found.metadata.get_all("Provides-Extra") or () if extra != "all"]
    yield Finding("core", "python", "ok", platform.python_version())
    for requirement in requirements:
        if requirement.marker is None:
            yield _package("core", requirement, "pip install --upgrade iqareward")
    for extra in extras:
        for requirement in requirements:
            marker = requirement.marker
            if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
                yield _package(f"extra {extra}", requirement, f'pip install "iqareward[{extra}]"')


def _package(part: str, requirement: Requirement, fix: str) -> Finding:
    name = requirement.name
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(part, name, "missing", f"needs {requirement.specifier}", fix)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(part, name, "old", f"{version}, needs {requirement.specifier}", f"{fix} --upgrade")
    problem = _import_problem(name)
    if problem:
        return Finding(part, name, "broken", f"{version}: {problem}", f"pip install --force-reinstall {name}")
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


def _rewards(broken: dict[str, Finding]) -> Iterator[Finding]:
    """Whether each reward of the catalogue can be used now."""
    for name, entry in CATALOG.items():
        lack = broken.get(f"extra {entry.extra}") or broken.get("core")
        if lack is not None:
            yield Finding("rewards", name, "missing", f"{lack.name} is {lack.state}", lack.fix)
        elif entry.weights and (missing := missing_weights(entry.weights)):
            yield Finding("rewards", name, "note", "weights are downloaded at the first call", missing)
        else:
            yield Finding("rewards", name, "ok", "weights are here" if entry.weights else "")


def missing_weights(weights: str) -> str:
    """How to get weights that are not in the cache, for machines that cannot download; "" if they are."""
    if weights.startswith(TORCHVISION):
        models = importlib.import_module("torchvision.models")
        url = getattr(models, BACKBONES[weights.removeprefix(TORCHVISION)].weights).IMAGENET1K_V1.url
        file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
        return "" if file.is_file() else f"offline: put {url} at {file}"
    from huggingface_hub import try_to_load_from_cache

    known = ("model.safetensors.index.json", "pytorch_model.bin.index.json", "model.safetensors", "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(weights, file), str) for file in known):
        return ""
    return f"offline: run `hf download {weights}` where there is a network, and copy the cache"


def show(findings: list[Finding], console: Console) -> None:
    """One table per section, and a line that sums it up."""
    console.print(f"[bold]iqareward {iqareward.__version__}[/] on {platform.platform()}", highlight=False)
    for part in dict.fromkeys(finding.part.split()[0] for finding in findings):
        table = Table(title=part, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
        for column in ("state", "name", "detail", "fix"):
            table.add_column(column, overflow="fold")
        for finding in findings:
            if finding.part.split()[0] == part:
                name = f"{finding.part.removeprefix('extra ')}: {finding.name}" if part == "extra" else finding.name
                state = f"[{COLOURS[finding.state]}]{finding.state}[/]"
                table.add_row(state, *(escape(text) for text in (name, finding.detail, finding.fix)))
        console.print(table)
    usable = [finding for finding in findings if finding.part == "rewards"]
    ready = sum(finding.state == "ok" for finding in usable)
    console.print(f"{ready} of {len(usable)} rewards work here now.", highlight=False)
