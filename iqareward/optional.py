"""Import optional packages where they are used, with an error that says how to install them."""

import importlib
from types import ModuleType


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
