"""Batches as a pure function of (seed, step), the same for every learning rate and width.

Axes: B sequences, S positions. A window of S + 1 tokens holds S inputs and their targets, shifted by one.
"""

import numpy as np
import torch
from torch import Tensor

from mup_moe.files import UserError


class Batches:
    """Batches of windows from a flat token file.

    tokens: all token ids of the split in order, [T]. batch_size: B. sequence: S. Raises UserError if the split
    is shorter than one window of S + 1 tokens.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, sequence: int) -> None:
        if len(tokens) < sequence + 1:
            raise UserError(
                f"the split has {len(tokens)} tokens, fewer than one window of {sequence + 1}:"
                " add text to the corpus or lower `sequence`"
            )
        self._tokens = tokens
        self._batch_size = batch_size
        self._sequence = sequence
        self._starts = len(tokens) - sequence

    def training(self, seed: int, step: int) -> Tensor:
        """Returns the windows [B, S + 1] of a step, drawn uniformly with replacement."""
        generator = np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64)))
        return self._windows(generator.integers(self._starts, size=self._batch_size))

    def fixed(self, index: int, count: int) -> Tensor:
        """Returns the windows [B, S + 1] of the `index`-th of `count` batches, spread evenly over the split."""
        windows = np.arange(index * self._batch_size, (index + 1) * self._batch_size)
        return self._windows(windows * (self._starts - 1) // max(count * self._batch_size - 1, 1))

    def _windows(self, starts: np.ndarray) -> Tensor:
        return torch.from_numpy(self._tokens[starts[:, None] + np.arange(self._sequence + 1)].astype(np.int64))
