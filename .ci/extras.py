"""Install the core and every extra of pyproject.toml, each alone in a fresh environment, and use what it is for.

    python .ci/extras.py                                  # everything, with PyTorch as pip finds it (8 GB each)
    python .ci/extras.py --only core serve --keep
    python .ci/extras.py --first torch==2.13.0+cpu torchvision==0.28.0+cpu   # installed before the package

Prints one line per environment: time to install, size on disk, `pip check`, `iqareward doctor` and the use. Any failure
gives exit code 1. Needs nothing but the standard library, and the network for pip.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = """
import torch, iqareward
images = torch.rand(2, 3, 256, 256)
noisy = (images + 0.1 * torch.randn_like(images)).clamp(0, 1)
"""
# one program per extra: what it is for, without weights from a network
USES = {
    "core": f"""{IMAGES}
assert iqareward.load("0.5*ssim + 0.5*niqe[0, 20]")(noisy, references=images).isfinite().all()
""",
    "perceptual": f"""{IMAGES}
assert iqareward.load("fsim")(noisy, references=images).isfinite().all()
iqareward.load("lpips")
""",
    "pyiqa": f"""{IMAGES}
assert iqareward.load("pyiqa:gmsd")(noisy, references=images).isfinite().all()
""",
    "vlm": """
import iqareward
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel
iqareward.load("qrealign")
iqareward.load("clipscore")
""",
    "quant": """
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
layer = torch.nn.Sequential(torch.nn.Linear(64, 64))
quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
layer(torch.rand(2, 64))
""",
    "diffusers": """
import accelerate, peft
from diffusers import UNet2DModel
from iqareward.diffusion import PixelPolicy, UpscalePolicy
""",
    "restorers": """
from safetensors.torch import save_file
from spandrel.architectures.SwinIR import SwinIR
from iqareward.diffusion import FeedForwardPolicy
sizes = {"img_size": 8, "window_size": 4, "embed_dim": 12, "depths": [2], "num_heads": [2], "mlp_ratio": 2}
network = SwinIR(**sizes, upscale=4, upsampler="pixelshuffledirect")
save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, "swinir.safetensors")
FeedForwardPolicy.from_checkpoint("swinir.safetensors")
""",
    "trl": """
from trl import GRPOTrainer
from iqareward.adapters.trl import TRLReward
TRLReward("piqe", images="image")
""",
    "serve": """
import ray.serve
from iqareward import RemoteReward, ServedVLMReward
import iqareward.serving.run
""",
}


def folder_size(folder: Path) -> int:
    """Bytes on disk, hard links counted once."""
    files = {(stat.st_dev, stat.st_ino): stat.st_blocks * 512 for stat in (path.lstat() for path in folder.rglob("*"))}
    return sum(files.values())


def try_out(extra: str, first: list[str], keep: bool) -> bool:
    """Install `extra` in an environment of its own, use it, and print a line about it."""
    folder = Path(tempfile.mkdtemp(prefix=f"iqareward-{extra}-"))
    venv.create(folder / "env", with_pip=True)
    python, problems = str(folder / "env" / "bin" / "python"), []
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}

    def run(label: str, *command: str) -> str:
        done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
        if done.returncode:
            problems.append(f"{label} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    start = time.monotonic()
    if first:
        run("pip install " + " ".join(first), python, "-m", "pip", "install", "--quiet", *first)
    target = str(ROOT) if extra == "core" else f"{ROOT}[{extra}]"
    run("pip install", python, "-m", "pip", "install", "--quiet", target)
    seconds = time.monotonic() - start
    size = folder_size(folder / "env")
    run("pip check", python, "-m", "pip", "check")
    names = [name for name in USES if name not in ("core", "pyiqa")] if extra == "all" else [extra]
    for name in names:
        run(f"use of {name}", python, "-c", USES[name])
    run("iqareward doctor", str(folder / "env" / "bin" / "iqareward"), "doctor")
    torch = run("import torch", python, "-c", "import torch; print(torch.__version__)").strip()
    print(
        f"| `{extra}` | {torch} | {seconds:.0f} s | {size / 1e9:.1f} GB | {'; '.join(problems) or 'ok'} |", flush=True
    )
    if not keep:
        shutil.rmtree(folder)
    return not problems


def main() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = ["core", *declared]
    if missing := set(names) - set(USES) - {"all"}:
        raise SystemExit(f"USES in {__file__} has no line for the extras {sorted(missing)}: write what each is for")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--first", nargs="+", default=[], help="what pip installs before the package, e.g. a CPU build")
    parser.add_argument("--keep", action="store_true", help="leave the environments in the temporary folder")
    options = parser.parse_args()
    print(f"Python {sys.version.split()[0]}\n| extra | torch | time | on disk | |\n|---|---|---|---|---|")
    results = [try_out(name, options.first, options.keep) for name in options.only]
    raise SystemExit(not all(results))


if __name__ == "__main__":
    main()
