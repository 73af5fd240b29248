"""Rewards; what is needed to write one of your own can be imported from here, the rest from `iqareward`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
