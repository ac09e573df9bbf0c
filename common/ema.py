"""Exponential moving average of the trainable weights."""

import contextlib

import torch


class EMA:
    """fp32 average of named parameters, decay warmed up as min(decay, (1 + n) / (10 + n)) at update n.

    `parameters`: dict of name to parameter, the trained ones only. The same dict must be given to every call: a
    missing or additional name raises KeyError, never averages silently in part.
    """

    def __init__(self, parameters, decay=0.999):
        self.decay = decay
        self.updates = 0
        self.shadow = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, parameters):
        self._check(parameters)
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in parameters.items():
            self.shadow[name].lerp_(parameter.detach().float(), 1 - decay)

    @contextlib.contextmanager
    def applied(self, parameters):
        """Within the context the parameters hold the average; afterwards their own values again, bit for bit."""
        self._check(parameters)
        own = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            copy_tensors(self.shadow, parameters)
            yield
        finally:
            copy_tensors(own, parameters)

    def _check(self, parameters):
        if parameters.keys() != self.shadow.keys():
            names = sorted(parameters.keys() ^ self.shadow.keys())
            raise KeyError(f"the EMA and the parameters differ in {len(names)} names, such as {names[0]}")


@torch.no_grad()
def follow(target, parameters, decay):
    """target = decay target + (1 - decay) parameters, for dicts of the same names; without EMA's warm-up."""
    for name, parameter in parameters.items():
        target[name].lerp_(parameter, 1 - decay)


@torch.no_grad()
def copy_tensors(values, targets):
    """Copy a dict of tensors into another of the same names, in place. Raises KeyError where names differ."""
    if values.keys() != targets.keys():
        raise KeyError(f"names differ, such as {sorted(values.keys() ^ targets.keys())[0]}")
    for name, target in targets.items():
        target.copy_(values[name].to(target.dtype))
