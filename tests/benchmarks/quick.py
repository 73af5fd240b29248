"""A benchmark's command in the process of the tests, which has imported what a new one would import for seconds."""

import contextlib
import io
import json
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import torch


def quick_run(benchmark: ModuleType, *options: str) -> dict[str, Any]:
    """The document in the last line that `--quick` and these options print."""
    threads = torch.get_num_threads()
    try:
        with (
            mock.patch.object(sys, "argv", [benchmark.__name__, "--quick", *options]),
            contextlib.redirect_stdout(io.StringIO()) as printed,
        ):
            benchmark.main()
    finally:
        torch.set_num_threads(threads)
    return json.loads(printed.getvalue().splitlines()[-1])
