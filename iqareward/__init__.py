"""Image-quality rewards and difficulty-adaptive weighting for training diffusion models with reinforcement learning.

Everything that most users need is a name of this package. The names stand in `__init__.pyi` and are imported when they
are first used, so that `import iqareward` is instant and does not load torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
