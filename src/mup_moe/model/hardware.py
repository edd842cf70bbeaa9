"""Where two kinds of device want different code for the same numbers."""

import torch


def prefers_dense(device: torch.device) -> bool:
    """Whether elementwise work on whole tensors beats sorting, scattering and slicing.

    True everywhere but on a CPU: a GPU pays for launches and for writes in no fixed order, and hardly
    for arithmetic (docs/decisions.md).
    """
    return device.type != "cpu"
