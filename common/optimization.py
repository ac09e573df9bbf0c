"""Optimization: AdamW, the learning rate of a step, and an update that is clipped and then taken, or skipped.

An update whose gradient is not finite is skipped and counted, with its average: one broken batch, or one overflow of
fp16, costs one update and no weights. `Run.count` ends a run that skips too many in a row. The optimizer itself looks
whether to skip, on the device, so that no step waits for it.
"""

import math
from functools import partial

import torch
from torch.distributed.tensor import DTensor

from common.ema import copy_tensors
from common.engines import local, refresh_deepspeed, step_deepspeed


def learning_rate_at(step, args, length=None):
    """The learning rate of optimizer step `step` (from 0): of the step alone, so that resume restores nothing.

    length: of the run, or of the stage that `step` counts in (default: --max_train_steps).
    one_cycle is torch's OneCycleLR (its defaults: cosine, 30 % rise, from 1/25, to 1/250000), momentum left alone.
    """
    length = length or args.max_train_steps
    if args.lr_scheduler == "one_cycle":
        last, peak = length - 1, (args.lr_warmup_steps or 0.3 * length) - 1
        if step < peak:
            low, done = args.learning_rate / 25, 1 - step / peak
        else:
            low, done = args.learning_rate / 250000, (step - peak) / max(last - peak, 1)
        return low + (args.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * done))
    if step < args.lr_warmup_steps:
        return args.learning_rate * (step + 1) / args.lr_warmup_steps
    done = (step - args.lr_warmup_steps) / max(length - args.lr_warmup_steps, 1)
    if args.lr_scheduler == "linear":
        return args.learning_rate * (1 - done)
    if args.lr_scheduler == "cosine":
        return args.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return args.learning_rate


def set_learning_rate(optimizer, learning_rate):
    """Set it for the next update, and return it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    return learning_rate


def adamw(parameters, args, learning_rate=None):
    """AdamW, or with --use_8bit_adam bitsandbytes' AdamW8bit, of {name: parameter}."""
    optimizer_class = partial(torch.optim.AdamW, fused=True)
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as optimizer_class
    return optimizer_class(
        parameters.values(),
        lr=learning_rate or args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def clip(run, optimizer, parameters, name="student"):
    """After the last micro-batch: clip the gradients of {name: parameter} to --max_grad_norm; before it, nothing.

    The norm is in run.norms, as grad_norm (of the student) or <name>_grad_norm. Raises RuntimeError where a parameter
    got no gradient: it would never learn.
    """
    run.phase("optimizer")
    if not run.accelerator.sync_gradients or (run.engine == "zero2" and name == "student"):  # which clips as it steps
        return
    without = [key for key, p in parameters.items() if p.grad is None]
    if without:
        raise RuntimeError(f"{len(without)} trainable parameters got no gradient, such as {without[0]}")
    if getattr(optimizer, "scaler", None) is not None:
        run.accelerator.unscale_gradients(optimizer)
    norm = scale_to_norm([p.grad for p in parameters.values()], run.args.max_grad_norm)
    run.norms["grad_norm" if name == "student" else f"{name}_grad_norm"] = norm


@torch.no_grad()
def scale_to_norm(gradients, max_norm):
    """Their norm, a scalar, after which they are scaled in place so that it is max_norm at most.

    It is summed in float64: the sum is then the same however they are cut, and with it a whole run.
    """
    parts = [local(gradient) for gradient in gradients]
    squares = torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float64)).square().sum()
    if isinstance(gradients[0], DTensor):
        torch.distributed.all_reduce(squares, group=gradients[0].device_mesh.get_group())
    norm = squares.sqrt().float()
    torch._foreach_mul_(parts, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def update(run, optimizer, parameters, ema=None, name="student"):
    """After the last micro-batch: take the update, and average {name: parameter}, or neither; before it, nothing.

    Skipped where the norm that `clip` found is not finite. It is the norm of all processes' gradients, so that all
    decide alike.
    """
    if not run.accelerator.sync_gradients:
        return
    key = "grad_norm" if name == "student" else f"{name}_grad_norm"
    steps_itself = run.engine == "zero2" and name == "student"
    if steps_itself:
        run.norms[key] = step_deepspeed(run)
    broken = ~run.norms[key].isfinite()
    if not steps_itself:
        _step(optimizer, broken)
    optimizer.zero_grad(set_to_none=True)
    counts = run.skipped.get(name)
    in_all, in_a_row = torch.zeros(2, dtype=torch.long, device=broken.device) if counts is None else counts
    run.skipped[name] = torch.stack([in_all + broken, (in_a_row + 1) * broken])
    if ema is not None:
        ema.step(parameters, ~broken)


def become_average(run, parameters, ema):
    """{name: parameter} of a stage's student become their average: its result, and the next one's start."""
    copy_tensors(ema.shadow, parameters)
    refresh_deepspeed(run)


def _step(optimizer, broken):
    """The optimizer's step, or none where `broken`, a bool on the device."""
    plain = getattr(optimizer, "optimizer", optimizer)
    if getattr(optimizer, "scaler", None) is not None:  # a scaler skips itself, and lowers its scale
        optimizer.step()
    elif isinstance(plain, torch.optim.AdamW):  # fused: where this is 1 it leaves everything as it is
        plain.grad_scale, plain.found_inf = None, broken.float()
        optimizer.step()
    elif not broken:  # bitsandbytes' knows no such thing
        optimizer.step()
