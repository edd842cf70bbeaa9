"""Places in the model that can be looked at."""

from torch import nn


class Tap(nn.Identity):
    """A named place where a forward hook finds a tensor; without one it does nothing."""
