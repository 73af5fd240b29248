"""The stages of a run in order of value: seconds of 530 on an H100, and the function that measures."""

from benchmarks.gpu.targets import targets

STAGES = {
    "canary": (20, "benchmarks.gpu.device:canary"), "tests": (160, "benchmarks.gpu.suite:run"),
    "parity": (25, "benchmarks.gpu.parity:run"), "qalign": (60, "benchmarks.gpu.mllm:qalign"),
    "classical": (45, "benchmarks.gpu.classical:run"), "vlm": (60, "benchmarks.gpu.mllm:vlm"),
    "train": (90, "benchmarks.gpu.train:run"), "compile": (40, "benchmarks.gpu.mllm:compiled"),
}  # fmt: skip

__all__ = ["STAGES", "targets"]
