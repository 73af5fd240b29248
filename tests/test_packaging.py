"""What is published installs into an empty environment and works there: wheel and sdist, data files, types, version."""

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

import iqareward

ROOT = Path(iqareward.__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sdist, and the wheel that was built from it; offline, with the installed build backend."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return folder


def test_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    """Every file of the package that git would keep, the typed marker among them; no tests, examples or reports."""
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = ROOT / "iqareward"
    wanted = {
        str(file.relative_to(ROOT))
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".pyc"
    }
    assert names == wanted
    assert "iqareward/py.typed" in names
    licences = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", *(file.name for file in package.rglob("*LICENSE*"))}  # ours, and those of data
    reports = {name for name in names if name.endswith(".html")} - {"iqareward/serving/page.html"}
    assert not reports
    assert not any("demo" in name or "examples" in name for name in names)


def test_sdist_can_be_tested(built: Path) -> None:
    """The sources hold tests, benchmarks, docs and licence, so that a packager can run the suite."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "Makefile", "constraints.txt", "tests/conftest.py", "docs/index.md"} <= names
    assert {"benchmarks/bench_classical.py", "examples/demo/report.html"} <= names


def test_every_binary_file_has_a_licence(built: Path) -> None:
    """Each binary file of the sources has a line on the page of licences, and each line has a file."""
    page = (ROOT / "docs" / "reference" / "shipped-files.md").read_text()
    patterns = set(re.findall(r"^\| `([^`]+)` \|", page, re.M))
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        contents = {name.partition("/")[2]: archive.extractfile(name) for name in archive.getnames()}
        binary = {name for name, file in contents.items() if file is not None and b"\0" in file.read()}
    assert {name for name in binary if not any(fnmatch(name, pattern) for pattern in patterns)} == set()
    assert {pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in contents)} == set()


def test_wheel_works_in_an_empty_environment(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed beside its dependencies, outside the checkout, it imports from there, lists, loads data and scores."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # may name the checkout
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, *install], check=True, capture_output=True, timeout=600)
    # the dependencies are gigabytes: those of this environment are borrowed, without the checkout that it points to
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    borrowed = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    (site / "borrowed.pth").write_text(f"{borrowed}\n")  # a .pth inside the borrowed folder is not followed
    script = (
        "import iqareward, torch; print(iqareward.__file__); print(iqareward.__version__);"
        "x = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0));"
        "print(iqareward.load('niqe')(x).isfinite().all().item())"
    )
    done = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    file, version, scored = done.stdout.splitlines()
    assert Path(file).is_relative_to(site)
    assert version == iqareward.__version__
    assert scored == "True"
    listed = [tmp_path / "env" / "bin" / "iqareward", "list", "--json"]
    agreed = [listed[0], "agree", "qualisr"]
    assert "qalign" in subprocess.run(agreed, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert "niqe" in subprocess.run(listed, check=True, capture_output=True, text=True, cwd=tmp_path).stdout


def test_one_version(built: Path) -> None:
    """The version stands in one place; files that repeat it agree."""
    assert re.search(rf"^version: {re.escape(iqareward.__version__)}$", (ROOT / "CITATION.cff").read_text(), re.M)
    (wheel,) = built.glob("*.whl")
    assert wheel.name.startswith(f"iqareward-{iqareward.__version__}-")
    assert importlib.metadata.version("iqareward") == iqareward.__version__
