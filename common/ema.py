"""Exponential moving average of the trainable weights."""

import contextlib

import torch
from torch.distributed.tensor import DTensor

from common.engines import full, local

CHUNK = 2**24  # elements averaged at once: what their differences take beside the weights


class EMA:
    """fp32 average of named parameters, decay warmed up as min(decay, (1 + n) / (10 + n)) at update n.

    `parameters`: dict of name to parameter, the trained ones only, in fp32. The same dict must be given to every call:
    a missing or additional name raises KeyError, never averages silently in part. offload: in the CPU's memory.
    Of parameters that FSDP2 has cut, every process averages its part.
    """

    def __init__(self, parameters, decay=0.999, offload=False):
        self.decay = decay
        self.shadow = {name: local(p.detach()).float().clone() for name, p in parameters.items()}
        if offload:
            self.shadow = {name: p.cpu() for name, p in self.shadow.items()}
        device = next(iter(self.shadow.values())).device if self.shadow else "cpu"
        self._updates = torch.zeros((), device=device)  # on the device: whether an update counts is known there

    @property
    def updates(self):
        return int(self._updates)

    @updates.setter
    def updates(self, count):
        self._updates.fill_(count)

    @torch.no_grad()
    def step(self, parameters, taken=True):
        """Average the parameters; taken: a bool, or one on the device: where it is false nothing changes."""
        self._check(parameters)
        device = self._updates.device
        taken = torch.as_tensor(taken).to(device).float()
        self._updates += taken
        weight = (9 / (10 + self._updates)).clamp(min=1 - self.decay) * taken  # 1 - min(decay, (1 + n) / (10 + n))
        for names in self._chunks():
            shadows = [self.shadow[name] for name in names]
            values = [local(parameters[name].detach()).to(device) for name in names]
            differences = torch._foreach_sub(values, shadows)
            torch._foreach_mul_(differences, weight)
            torch._foreach_add_(shadows, differences)

    @contextlib.contextmanager
    def applied(self, parameters):
        """Within the context the parameters are the average itself, no copy of it; afterwards themselves again.

        Parameters that are cut change places with it, as FSDP2 knows them by their memory.
        """
        self._check(parameters)
        own = {name: p.data for name, p in parameters.items() if not isinstance(p, DTensor)}
        cut = [name for name in parameters if name not in own]
        self._exchange(parameters, cut)
        try:
            for name in own:
                parameters[name].data = self.shadow[name].to(own[name].device, own[name].dtype)
            yield
        finally:
            self._exchange(parameters, cut)
            for name in own:
                parameters[name].data = own[name]

    @torch.no_grad()
    def _exchange(self, parameters, names):
        for name in names:
            part, shadow = local(parameters[name].detach()), self.shadow[name]
            own = part.clone()
            part.copy_(shadow)
            shadow.copy_(own)

    def _chunks(self):
        names, size = [], 0
        for name, shadow in self.shadow.items():
            names.append(name)
            size += shadow.numel()
            if size >= CHUNK:
                yield names
                names, size = [], 0
        if names:
            yield names

    def _check(self, parameters):
        if parameters.keys() != self.shadow.keys():
            names = sorted(parameters.keys() ^ self.shadow.keys())
            raise KeyError(f"the EMA and the parameters differ in {len(names)} names, such as {names[0]}")


@torch.no_grad()
def follow(target, parameters, decay):
    """target = decay target + (1 - decay) parameters, for dicts of the same names; without EMA's warm-up."""
    targets, values = ([local(tensors[name].detach()) for name in parameters] for tensors in (target, parameters))
    torch._foreach_lerp_(targets, values, 1 - decay)


@torch.no_grad()
def copy_tensors(values, targets):
    """Copy a dict of tensors into another of the same names, in place. Raises KeyError where names differ.

    Those of one of them may be cut, or both alike. Every process must call it.
    """
    if values.keys() != targets.keys():
        raise KeyError(f"names differ, such as {sorted(values.keys() ^ targets.keys())[0]}")
    for name, target in targets.items():
        value = values[name]
        local(target).copy_(local(value) if isinstance(target, DTensor) else full(value))
