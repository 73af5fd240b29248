"""Who imports whom, what `import iqareward` costs, and calls that a library must not make."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import iqareward

PACKAGE = Path(iqareward.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = {
    "types": 0, "images": 0, "image_files": 0, "groups": 0, "optional": 0, "_gradients": 0,
    "weight_files": 0, "atomic": 0, "seeds": 0,
    "functional": 1, "agreement": 1, "difficulty": 1, "advantages": 1, "weighting": 1, "schedules": 1,
    "rewards": 2,
    "testing": 3, "monitor": 3, "rated": 3,
    "diffusion": 4, "serving": 4, "datasets": 4,
    "adapters": 5,
    "cli": 6, "__main__": 7,
}  # fmt: skip
HEAVY = {
    "transformers", "diffusers", "trl", "pyiqa", "ray", "accelerate", "peft", "torchao", "torchvision",
    "piq", "lpips", "DISTS_pytorch", "skimage", "scipy", "matplotlib", "httpx2",
}  # fmt: skip
FORBIDDEN = {
    r"\.squeeze\(\)": "squeeze without a dimension loses the batch axis at B = 1",
    r"pickle\.loads?\((?!pickle\.dumps)": "unpickling foreign bytes runs foreign code",
    r"weights_only=False": "loading foreign weights must not run foreign code",
    r"trust_remote_code=True": "a hub must not run code here",
    r"torch\.(cuda\.)?manual_seed": "the caller owns the seed",
    r"\.cuda\(\)": "the caller owns the device",
    r"empty_cache\(": "the caller owns the memory",
}


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


# what turns scores into training signals: single files that may use each other
SIGNALS = {"difficulty", "advantages", "weighting", "schedules"}


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def breaches(rule: Callable[[Path], Iterator[str]]) -> list[str]:
    """What a rule finds wrong in each file of the package."""
    return [f"{name_of(file)}: {wrong}" for file in FILES for wrong in rule(file)]


def test_imports_point_down() -> None:
    """A file imports only from lower layers and its own room; layer 0 and the training signals are one room each."""

    def upward(file: Path) -> Iterator[str]:
        if room(file) == "__init__":
            return
        ours = LAYERS[room(file)]
        for module in imported_modules(ast.parse(file.read_text())):
            parts = module.split(".")
            if parts[0] != "iqareward" or len(parts) == 1:
                continue
            theirs = LAYERS[parts[1]]
            neighbours = parts[1] == room(file) or theirs == ours == 0 or {parts[1], room(file)} <= SIGNALS
            if theirs >= ours and not neighbours:
                yield f"imports {module}"

    assert breaches(upward) == []


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    """No module imports an optional package when it is imported itself."""

    def heavy(file: Path) -> Iterator[str]:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                loaded = {module.split(".")[0] for module in imported_modules(ast.Module([node], []))}
                yield from (f"imports {package} at module level" for package in sorted(loaded & HEAVY))

    assert breaches(heavy) == []


def test_import_is_instant_and_light() -> None:
    """`import iqareward` takes under 100 ms of processor time, and loads no torch, numpy or optional package."""
    script = (
        "import sys, time; start = time.process_time(); import iqareward; seconds = time.process_time() - start;"
        f"print(seconds, *({HEAVY | {'torch', 'numpy', 'PIL', 'typer', 'rich'}} & set(sys.modules)))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(5)
    ]
    assert all(len(run) == 1 for run in runs), f"loaded: {runs[0][1:]}"
    assert min(float(run[0]) for run in runs) < 0.1


def test_public_names() -> None:
    """Every name of the stub resolves, `dir` shows it, and an unknown name is an AttributeError."""
    assert iqareward.__all__
    for name in iqareward.__all__:
        assert getattr(iqareward, name) is not None
    assert set(iqareward.__all__) <= set(dir(iqareward))
    with pytest.raises(AttributeError, match="no_such_name"):
        iqareward.no_such_name  # noqa: B018


def test_forbidden_calls() -> None:
    """Nothing in the package does what a library must not do."""

    def forbidden(file: Path) -> Iterator[str]:
        code = "\n".join(line.split("  # ")[0] for line in file.read_text().splitlines())
        for pattern, reason in FORBIDDEN.items():
            if name_of(file) == "serving/replica.py" and "empty_cache" in pattern:
                continue  # its process is its own, and gives its memory back
            if re.search(pattern, code):
                yield f"{pattern}: {reason}"

    assert breaches(forbidden) == []
