"""Ray Serve, imported once: its own outdated use of pydantic, which warns at import, is no concern of these tests."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import ray
    import ray.serve
    import ray.serve.exceptions

__all__ = ["ray"]
