"""Rewards; the most used ones are names of `iqareward`, further ones and what is needed to write one are names here."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
