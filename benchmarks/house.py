"""Size of the package: lines, files, public names, own files that a task loads, and the time of `import iqareward`.

Counts this checkout or others, also older ones. What cannot run there is reported as not run, with the reason.

    python -m benchmarks.house
    python -m benchmarks.house --tree ../older-worktree --tree . --json benchmarks/results/house_cpu_2026-11-27.json
"""

import argparse
import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

Row = dict[str, Any]
IMPORT_RUNS = 5
SURFACE = ("functional", "rewards", "diffusion", "schedules", "monitor", "diffusion/monitor", "testing")


def rooms(tree: Path) -> list[Row]:
    """Files, lines and docstring lines of every room of the package, and of what stands around it."""
    package = tree / "iqareward"
    found: dict[str, list[Path]] = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).parts[:-1]
        room = "/".join(parts[:2] if parts[:1] == ("rewards",) else parts[:1])
        found.setdefault(f"iqareward/{room}".rstrip("/"), []).append(file)
    rows = [_room(name, files) for name, files in found.items()]
    rows.append(_room("package", [file for files in found.values() for file in files]))
    around = {name: sorted((tree / name).rglob("*.py")) for name in ("examples", "tests", "benchmarks")}
    return rows + [_room(name, files) for name, files in around.items() if files]


def _room(name: str, files: list[Path]) -> Row:
    lines = sum(len(file.read_text().splitlines()) for file in files)
    docstrings = sum(_docstring_lines(ast.parse(file.read_text())) for file in files)
    return {"room": name, "files": len(files), "lines": lines, "docstring_lines": docstrings}


def _docstring_lines(module: ast.Module) -> int:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    count = 0
    for node in ast.walk(module):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            count += (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
    return count


def public_names(tree: Path) -> list[Row]:
    """Names at the top, names that a user imports, and all names without an underscore in modules without one."""
    package = tree / "iqareward"
    top = _run(tree, "top")
    rows = [{"names": "iqareward.__all__", **top}]
    surface = set(top.get("list", []))
    modules = [package / name for name in SURFACE] + sorted((package / "adapters").glob("[!_]*.py"))
    for module in modules:
        file = module if module.suffix else module.with_suffix(".py")
        source = file if file.exists() else module / "__init__.py"
        if source.exists():
            surface |= _exported(source)
    rows.append({"names": "what users import", "count": len(surface), "list": sorted(surface)})
    public = [
        name
        for file in package.rglob("*.py")
        if not any(part.startswith("_") and part != "__init__.py" for part in file.relative_to(package).parts)
        for name in _defined(ast.parse(file.read_text()))
    ]
    rows.append({"names": "without underscore, whole package", "count": len(public)})
    return rows


def _exported(file: Path) -> set[str]:
    """`__all__`, else what a package re-exports as itself and what a module defines."""
    stub = file.with_suffix(".pyi")
    module = ast.parse((stub if stub.exists() else file).read_text())
    for node in module.body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "__all__"
            and isinstance(node.value, ast.List)
        ):
            return set(ast.literal_eval(node.value))
    imports = [alias for node in module.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    again = {alias.name for alias in imports if alias.name == alias.asname}
    return again | set(_defined(module))


def _defined(module: ast.Module) -> list[str]:
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [node.name for node in module.body if isinstance(node, kinds) and not node.name.startswith("_")]


# What follows runs in a fresh process each, with the tree to be counted first on the path.


def _find(room: str, *names: str) -> Any:
    """The first of these names that a room defines, in whatever file: names and places differ between commits."""
    import iqareward

    package = Path(iqareward.__file__).parent
    for name in names:
        for file in sorted((package / room).rglob("*.py")):
            text = file.read_text()
            if (f"class {name}" in text or f"def {name}(" in text) and name in _defined(ast.parse(text)):
                parts = file.relative_to(package.parent).with_suffix("").parts
                module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                return getattr(importlib.import_module(module), name)
    raise ImportError(f"iqareward/{room} defines none of {', '.join(names)}")


def _call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call with those options that the function knows."""
    known = inspect.signature(function).parameters
    return function(*arguments, **{name: value for name, value in options.items() if name in known})


def ssim() -> None:
    """`load("ssim")` and one call"""
    import torch

    from iqareward import load

    load("ssim")(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))


def qalign() -> None:
    """`QAlignReward` and one call, with a tiny random network"""
    import torch

    from iqareward import QAlignReward

    vision = {"vision_hidden": 16, "vision_ffn": 24, "vision_layers": 2, "vision_heads": 2, "image_size": 56}
    abstractor = {"abstractor_hidden": 16, "abstractor_ffn": 24, "abstractor_layers": 2, "abstractor_heads": 2}
    decoder = {"num_queries": 4, "hidden": 32, "ffn": 48, "layers": 2, "heads": 4, "kv_heads": 2}
    network = _find("rewards", "Owl2")(_find("rewards", "Owl2Config")(**vision, **abstractor, **decoder))
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    QAlignReward(network, device="cpu")(torch.zeros(1, 3, 16, 16))


def remote() -> None:
    """`RemoteReward`, which has not asked its server yet"""
    from iqareward import RemoteReward

    RemoteReward("http://127.0.0.1:8000", "ssim")


def trainer() -> None:
    """One update of the reference loop, with a tiny UNet and PSNR as the reward"""
    import diffusers
    import torch
    from accelerate import Accelerator

    from iqareward import load
    from iqareward.diffusion import DDIM, DifficultyAdaptiveTrainer, PixelPolicy

    class Pairs:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            image = torch.full((3, 16, 16), 0.1 * index)
            return {"lq": image, "gt": image + 0.1}

        def batch(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:  # what earlier commits read
            images = torch.stack([self[index]["lq"] for index in ids])
            return images, images + 0.1

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    channels = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    policy = PixelPolicy(diffusers.UNet2DModel(16, 6, 3, **channels, **blocks), DDIM(scheduler))
    rollouts = _call(_find("diffusion", "RolloutConfig", "Sampling"), group_size=2, num_steps=3, inputs_at_once=2)
    training = _call(_find("diffusion", "TrainConfig", "Optimization"), inputs_per_update=2)
    with tempfile.TemporaryDirectory() as folder:
        run = _call(
            DifficultyAdaptiveTrainer, policy, load("psnr"), Pairs(), output_dir=folder, show_progress=False,
            accelerator=Accelerator(cpu=True), sampling=rollouts, optimization=training,
            rollouts=rollouts, training=training, rollout_config=rollouts, train_config=training,
        )  # fmt: skip
        run.train(1)


SUBJECTS: dict[str, Callable[[], None]] = {"ssim": ssim, "qalign": qalign, "remote": remote, "trainer": trainer}


def _measure(subject: str) -> Row:
    """Body of the fresh process."""
    if subject == "import":
        begin = time.process_time()
        importlib.import_module("iqareward")
        return {"milliseconds": 1e3 * (time.process_time() - begin)}
    if subject == "top":
        names = sorted(importlib.import_module("iqareward").__all__)
        return {"count": len(names), "list": names}
    SUBJECTS[subject]()
    package = Path(sys.modules["iqareward"].__file__ or "").parent
    loaded = {getattr(module, "__file__", None) for module in sys.modules.values()}
    ran: set[str | None] = set()

    def note(frame: FrameType, *event: object) -> None:
        ran.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    SUBJECTS[subject]()  # once more, now that nothing is left to import
    sys.setprofile(None)
    row: Row = {}
    for name, files in (("loaded", loaded), ("ran", ran)):
        row[name] = sorted(
            str(Path(file).relative_to(package)) for file in files if file and file.startswith(f"{package}/")
        )
    return {"files_loaded": len(row["loaded"]), "files_ran": len(row["ran"]), **row}


def _run(tree: Path, subject: str) -> Row:
    """Measure in a fresh process; what fails is not run, with the reason."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    # -P keeps this folder, whose files have the names of other packages, from the path
    command = [sys.executable, "-P", __file__, "--subject", subject]
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode:
        return {"not_run": run.stderr.strip().splitlines()[-1]}
    return json.loads(run.stdout.splitlines()[-1])


def measure(tree: Path) -> list[Row]:
    """All rows of a checkout, in the order of the report."""
    described = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=7"]
    commit = subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip() or str(tree)
    rows = rooms(tree) + public_names(tree)
    rows += [{"task": inspect.getdoc(call), **_run(tree, name)} for name, call in SUBJECTS.items()]
    times = [_run(tree, "import") for _ in range(IMPORT_RUNS)]
    rows.append(min(times, key=lambda row: row.get("milliseconds", float("inf"))))
    return [{"commit": commit, **row} for row in rows]


def report(rows: list[Row]) -> str:
    """A table in Markdown with a column for each checkout."""
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    table: dict[str, dict[str, str]] = {}
    for row in sorted(rows, key=_order):
        what, value = _cell(row)
        table.setdefault(what, {})[row["commit"]] = value
    lines = [["", *commits], ["---", *["--:"] * len(commits)]]
    lines += [[what, *(values.get(commit, "") for commit in commits)] for what, values in table.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _order(row: Row) -> tuple[int, str]:
    """Rooms of the package by name, then the rest as it was measured."""
    room = row.get("room", "")
    return (0, room) if room.startswith("iqareward") else (1 if room else 2, "")


def _cell(row: Row) -> tuple[str, str]:
    if "room" in row:
        share = row["docstring_lines"] / max(row["lines"], 1)
        return f"{row['room']}: lines, files, docstrings", f"{row['lines']:,} in {row['files']}, {share:.0%}"
    if "names" in row:
        what, keys = f"public names: {row['names']}", ("count",)
    elif "task" in row:
        what, keys = f"own files loaded, run: {row['task']}", ("files_loaded", "files_ran")
    else:
        what, keys = "`import iqareward`, processor time in ms", ("milliseconds",)
    return what, f"not run: {row['not_run']}" if "not_run" in row else ", ".join(f"{row[key]:.3g}" for key in keys)


def main() -> None:
    """Count the checkouts, print the table and, as the last line, the JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, action="append", help="root of a checkout to count; may be repeated")
    parser.add_argument("--json", type=Path, help="also write the document to this file, and the table beside it")
    parser.add_argument("--subject", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.subject:
        print(json.dumps(_measure(options.subject)))
        return
    from benchmarks._harness import document, finish

    trees = options.tree or [Path(__file__).parents[1]]
    rows = [row for tree in trees for row in measure(tree.resolve())]
    print(report(rows), end="\n\n")
    record = document("house", rows, [], ["diffusers", "accelerate"])
    if options.json:
        caption = f"`python -m benchmarks.house`, {record['hardware']}, {record['date']}."
        options.json.with_suffix(".md").write_text(f"# Size of the package\n\n{report(rows)}\n\n{caption}\n")
    finish(record, options.json)


if __name__ == "__main__":
    main()
