"""Data: randomness per sample."""

import numpy as np
import torch


def sample_generator(seed, step, index):
    """CPU generator of one sample: (seed, optimizer step, index in the GLOBAL batch), whatever the rank."""
    state = np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))
