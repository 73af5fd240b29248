"""Reference loop: difficulty-adaptive reinforcement learning for restoration models in diffusers.

Everything a user needs is a name of this package. Names are imported when they are first used; `__init__.pyi` lists
them with the file each is in.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
