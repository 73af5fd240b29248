"""Import optional packages where they are used, with an error that says how to install them."""

import importlib
import logging
from types import ModuleType
from typing import Any

# Who warns, as diffusers imports what it needs for quantised models, of packages that are not used here.
_WARNING = ("bitsandbytes.backends.cpu.ops", "diffusers.quantizers.torchao.torchao_quantizer", "torch.utils._pytree")


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import `module`, or raise an ImportError that names the extra that brings it.

    Args:
        module: dotted module name.
        extra: the extra of this package that installs it.
        purpose: what needs it, for the message, e.g. `"LPIPSReward"`.

    Raises:
        ImportError: it is not installed, or it is installed and fails to import (the cause is chained).

    Example:
        >>> require("json", extra="serve", purpose="this example").__name__
        'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if missing.split(".")[0] != module.split(".")[0]:
            raise ImportError(
                f"{purpose} needs `{module}`, which is installed but misses its own dependency `{missing}`. "
                f'Run: pip install {missing}   (or: pip install "iqareward[{extra}]")'
            ) from error
        raise ImportError(f'{purpose} needs `{module}`. Run: pip install "iqareward[{extra}]"') from error


def require_diffusers(purpose: str) -> Any:
    """The package `diffusers`, with its models imported without the warnings of packages for quantised ones."""
    loggers = [logging.getLogger(name) for name in _WARNING]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        require("diffusers.models.unets.unet_2d", extra="diffusers", purpose=purpose)
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
    return importlib.import_module("diffusers")
