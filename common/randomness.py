"""Randomness: everything random derives from (seed, optimizer step, index in the global batch) and a named stream.

So resume restores nothing, and processes, workers and micro-batches change nothing.
"""

import numpy as np
import torch
from accelerate.utils import set_seed

STREAMS = {  # independent uses of one sample; a number, once used, is never given to another
    "noise": 0,  # what training draws: noise, timesteps, scales
    "augmentation": 1,  # crop, flip, which caption
    "order": 2,  # of the data, by epoch
    "crop": 3,  # of --loss lpips
    "evaluation": 4,  # the noise that evaluation during training starts from
    "perturbation": 5,  # of features, for R1 by finite differences
    "discriminator": 6,  # the noise that a discriminator looks through
    "calibration": 7,  # of pruning: what a pipeline is sampled from to be calibrated, and directions of Taylor terms
    "report": 8,  # the noise that a report's images start from
    "particles": 9,  # what images and volumes start as that scores are distilled into
    "refresh": 10,  # which steps' roll-outs are made anew
    "buckets": 11,  # of aspect ratios: which one a step has, and the order in each
}


def sample_generator(seed, step, index, stream="noise"):
    """CPU generator of one sample: (seed, optimizer step, index in the GLOBAL batch), whatever the rank."""
    number = STREAMS[stream]
    state = np.random.SeedSequence([seed, step, index] + [number] * (number != 0)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def seed_all(seed):
    """Seed the global generators, for what is initialised at random; numpy's takes 32 bits."""
    set_seed(seed % 2**32)
