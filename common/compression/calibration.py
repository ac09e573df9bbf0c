"""Calibration: what the channels of a pipeline's models do while it samples, and pruning that makes use of it.

The pipeline is sampled once on calibration captions, and the inputs of each model are kept. Replayed, they tell

    importance    the second-order Taylor term of the distillation loss |o - o_T|^2 at the teacher, where the first is
                  zero: with a gate g_u on the channels of unit u, |do/dg_u|^2 = E_r (d<o, r>/dg_u)^2, r ~ N(0, I)
                  or what the next layers' outputs lose where units go one after the other and the rest stands in
    compensation  the units that stay stand in for those that go: with the least-squares x_gone ~ A x_kept + b the
                  weights that read them become W_kept + W_gone A, and their bias grows by W_gone b
    sensitivity   the relative error |o - o_T| / |o_T| where one group alone is pruned
"""

from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from common.compression.channels import choose, cost_of_unit, groups_of, units_kept

POSITIONS = 4096  # of one forward that the least squares are taken over: more hardly change them
RIDGE = 1e-3  # of the least squares, relative to the channels' mean square
TURNS = 64  # in which the units of a group go, at most: so many at a time
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # at which sensitivity is measured


def halves(model):
    """{prefix: module} of what is called by itself: of a VAE its two halves, else the model."""
    if hasattr(model, "decoder") and hasattr(model, "encoder"):
        return {"encoder.": model.encoder, "decoder.": model.decoder}
    return {"": model}


@torch.no_grad()
def record_inputs(pipeline, components, prompts, generators, batch_size, **call):
    """{component: {prefix: [(args, kwargs) of each forward]}} while the pipeline samples `prompts`, by batches.

    The images are encoded again, for the VAE's encoder. generators: of each prompt's noise; call: further arguments.
    """
    found, handles = {}, []
    for component in components:
        for prefix, module in halves(getattr(pipeline, component)).items():
            calls = found.setdefault(component, {}).setdefault(prefix, [])

            def keep(module, args, kwargs, calls=calls):
                calls.append((args, kwargs))

            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        for start in tqdm(range(0, len(prompts), batch_size), desc="sampling to calibrate", leave=False):
            batch = slice(start, start + batch_size)
            images = pipeline(prompts[batch], generator=generators[batch], output_type="pt", **call).images
            pipeline.vae.encode((2 * images - 1).to(pipeline.vae.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return found


def output_of(module, call):
    """What a module puts out for a recorded call, (B, N): of a text encoder also the layer that SDXL reads."""
    args, kwargs = call
    output = module(*args, **kwargs)
    first = output if torch.is_tensor(output) else output[0]
    if kwargs.get("output_hidden_states"):
        return torch.cat([first.flatten(1), output.hidden_states[-2].flatten(1)], dim=1)
    return first.flatten(1)


def readers(group):
    """(module, offset) of the layers that read a group's channels."""
    return [(name, offset) for name, axis, offset in group.spans if axis == 1]


def channels_last(x, layer):
    """What a convolution or linear layer reads, as (B, positions, C)."""
    x = x.movedim(1, -1) if isinstance(layer, torch.nn.Conv2d) else x
    return x.reshape(x.shape[0], -1, x.shape[-1])


@contextmanager
def reading(model, groups, see):
    """Within the context see(name, layer, x) is called with what each reader of these groups reads, and may change
    it: what it returns is read instead."""
    handles = []
    for name in dict.fromkeys(name for group in groups for name, _ in readers(group)):

        def hook(layer, args, name=name):
            changed = see(name, layer, args[0])
            return args if changed is None else (changed, *args[1:])

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def taylor(model, calls, generator):
    """{group name: importance (units,)} of a model's groups, from its recorded calls; see the top of this file."""
    scores = {group.name: torch.zeros(group.units) for group in groups_of(model)}
    for prefix, module in halves(model).items():
        groups, read = [group for group in groups_of(model) if group.name.startswith(prefix)], {}

        def see(name, layer, x, read=read):
            read[name] = x if x.requires_grad else x.detach().requires_grad_()
            return read[name]

        for call in tqdm(calls[prefix], desc="importance", leave=False):
            with torch.enable_grad(), reading(model, groups, see):
                output = output_of(module, call)
                direction = torch.randn(output.shape, generator=generator).to(output) / output.shape[1] ** 0.5
                slopes = torch.autograd.grad(output, list(read.values()), direction, allow_unused=True)
            gates = {}  # name of a reader: d<o, r>/dg of its channels (B, C)
            for (name, x), slope in zip(read.items(), slopes):
                if slope is not None:
                    product = (x.detach().float() * slope.float()).to(x)
                    gates[name] = channels_last(product, model.get_submodule(name)).float().sum(1).cpu()
            for group in groups:
                found = [
                    gates[name].narrow(1, offset, group.units * group.width)
                    for name, offset in readers(group)
                    if name in gates
                ]
                if found:
                    by_unit = sum(found).unflatten(1, (group.units, group.width)).sum(2)
                    scores[group.name] += by_unit.square().sum(0)
            read.clear()
    return scores


class Moments:
    """Sums of what the readers of groups read, from recorded calls: mean and second moment of their channels.

    of[name]: (mean (C,), second moment (C, C)) of reader `name`, in fp64 on the CPU.
    """

    def __init__(self, model, calls):
        sums, self.of = {}, {}

        def see(name, layer, x):
            rows = channels_last(x.detach(), layer).flatten(0, 1).float()
            rows = rows[:: max(len(rows) // POSITIONS, 1)]
            count, total, product = sums.get(name, (0, 0, 0))
            sums[name] = count + len(rows), total + rows.sum(0), product + rows.T @ rows

        groups = groups_of(model)
        with torch.no_grad(), reading(model, groups, see):
            for prefix, module in halves(model).items():
                for call in tqdm(calls[prefix], desc="calibration", leave=False):
                    output_of(module, call)
        for name, (count, total, product) in sums.items():
            self.of[name] = (total / count).double().cpu(), (product / count).double().cpu()


def centred(layer, mean, moment):
    """What least squares on a layer's inputs are of: around their mean, for which a bias makes up where it has one."""
    return moment if layer.bias is None else moment - mean[:, None] * mean[None]


def ridge(moment):
    """A little of the channels' mean square on the diagonal, so that it can be inverted."""
    return RIDGE * (moment.diagonal().mean() + 1e-12) * torch.eye(len(moment), dtype=torch.float64)


def stand_in(layer, mean, moment, kept, gone):
    """(weight, bias) of a layer whose channels `kept` stand in for `gone`, whose columns become zero; in its dtype.

    mean (C,), moment (C, C): of what it reads; kept, gone: indices into C. Channels that are zero, or that are read
    with zero weights, change nothing. Without a bias the least squares are of x itself, else around its mean.
    """
    weight = layer.weight.detach().double().cpu().clone()
    bias = None if layer.bias is None else layer.bias.detach().double().cpu().clone()
    moment = centred(layer, mean, moment)
    inner = moment[kept][:, kept]
    solved = torch.linalg.solve(inner + ridge(inner), moment[kept][:, gone]).T  # A (gone, kept)
    weight[:, kept] += torch.einsum("og...,gk->ok...", weight[:, gone], solved)
    if bias is not None:
        rest = mean[gone] - solved @ mean[kept]
        bias += torch.einsum("og...,g->o", weight[:, gone], rest)
        bias = bias.to(layer.bias)
    weight[:, gone] = 0
    return weight.to(layer.weight), bias


def reconstruction(model, group, moments):
    """Importance (units,) of a group: the later a unit goes, the higher.

    One after the other those go whose going costs least, in squares of what the layers W that read the group put out,
    while the rest stands in. With P the inverse of the second moment of what is left, unit u costs
    tr(W_u P_uu^-1 W_u'), and then W becomes W - W_u P_uu^-1 P_u and P becomes P - P_u' P_uu^-1 P_u: the surgeon's
    formulas (Hassibi & Stork 1993), a block at a time. moments: Moments of the model.
    """
    units, width = group.units, group.width
    weights, inverses = [], []
    for name, offset in readers(group):
        layer, span = model.get_submodule(name), slice(offset, offset + units * width)
        weight = layer.weight.detach().double().cpu()[:, span]
        weights.append(weight.movedim(1, -1).reshape(-1, units * width))  # what each output and tap reads of a channel
        moment = centred(layer, *moments.of[name])[span, span]
        inverses.append(torch.linalg.inv(moment + ridge(moment)))
    left, score = torch.ones(units, dtype=torch.bool), torch.zeros(units)
    while left.any():
        costs = torch.zeros(units, dtype=torch.float64)
        for weight, inverse in zip(weights, inverses):
            blocks = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            by_unit = weight.view(-1, units, width)
            costs += torch.einsum("ouv,uvw,ouw->u", by_unit, torch.linalg.inv(blocks), by_unit)
        costs[~left] = float("inf")
        going = costs.argsort()[: min(-(-units // TURNS), int(left.sum()))]
        score[going] = torch.arange(len(going), dtype=torch.float) + (units - left.sum())
        left[going] = False
        gone = group.channels(going)
        for weight, inverse in zip(weights, inverses):
            solved = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
            weight -= weight[:, gone] @ solved
            inverse -= inverse[:, gone] @ solved
            weight[:, gone], inverse[gone], inverse[:, gone] = 0, 0, 0
            inverse[gone, gone] = 1  # of its own, so that the blocks of what has gone can be inverted too
    return score


@contextmanager
def without(model, group, kept, moments=None):
    """Within the context a model is as if it had no units of `group` but those kept; moments: with compensation."""
    originals = {}
    for name, offset in readers(group):
        layer = model.get_submodule(name)
        originals[name] = layer.weight.data, None if layer.bias is None else layer.bias.data
        _apply(layer, group, offset, kept, moments and moments.of.get(name))
    try:
        yield
    finally:
        for name, (weight, bias) in originals.items():
            layer = model.get_submodule(name)
            layer.weight.data = weight
            if bias is not None:
                layer.bias.data = bias


@torch.no_grad()
def compensate(model, kept, moments):
    """Let the units of {group name: units kept} that stay stand in for those that go, which are read no more: in
    place, before `prune` removes them."""
    for group in groups_of(model):
        if len(kept.get(group.name, range(group.units))) < group.units:
            for name, offset in readers(group):
                _apply(model.get_submodule(name), group, offset, kept[group.name], moments.of.get(name))


def _apply(layer, group, offset, kept, moments):
    gone = group.channels(sorted(set(range(group.units)) - set(kept)), offset)
    if moments is None:
        weight = layer.weight.data.clone()
        weight[:, gone.to(weight.device)] = 0
        layer.weight.data = weight
        return
    weight, bias = stand_in(layer, *moments, group.channels(kept, offset), gone)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias


@torch.no_grad()
def sensitivity(model, calls, scores, moments=None):
    """{group name: {ratio: relative output error}} where that group alone loses so much of it, by these scores.

    At each of RATIOS; scores: of the groups that may be cut; moments: with compensation.
    """
    found = {}
    for prefix, module in halves(model).items():
        groups = [group for group in groups_of(model) if group.name.startswith(prefix) and group.name in scores]
        whole = [output_of(module, call).float() for call in calls[prefix]]
        for group in tqdm(groups, desc="sensitivity", leave=False):
            counts = {group.units}  # tried; ratios that come to the same are tried once
            for ratio in RATIOS:
                count = units_kept(group, ratio)
                if count in counts:
                    continue
                counts.add(count)
                with without(model, group, choose(scores[group.name], count), moments):
                    errors = [
                        ((output_of(module, call).float() - o).norm() / o.norm()).item()
                        for call, o in zip(calls[prefix], whole)
                    ]
                found.setdefault(group.name, {})[ratio] = sum(errors) / len(errors)
    return found


def allocate(models, errors, removed):
    """{component: {group name: ratio}} that take `removed` parameters away at the least sum of squared errors.

    models: {component: model}; errors: {component: {group name: {ratio: error}}} of `sensitivity`. Greedy: the next
    cut is the one whose error grows least for each parameter that goes. (Errors of several groups add in squares, as
    far as they are independent.)
    """
    steps = {}  # (component, group name): [(ratio, error^2, parameters gone)], growing
    for component, model in models.items():
        for group in groups_of(model):
            unit, curve = cost_of_unit(model, group), errors[component].get(group.name, {})
            steps[component, group.name] = [
                (ratio, curve[ratio] ** 2, unit * (group.units - units_kept(group, ratio))) for ratio in sorted(curve)
            ]
    taken, at, gone = {component: {} for component in models}, {}, 0
    while gone < removed:
        best = None
        for key, curve in steps.items():
            _, error, before = at.get(key, (0, 0.0, 0))
            for step in curve:  # also past a step that takes nothing
                if step[2] > before:
                    price = max(step[1] - error, 0.0) / (step[2] - before)
                    if best is None or price < best[0]:
                        best = price, key, step, step[2] - before
        if best is None:
            break
        _, key, step, more = best
        at[key], gone = step, gone + more
        taken[key[0]][key[1]] = step[0]
    return taken


@torch.no_grad()
def macs(model, calls):
    """Multiply-accumulates of a model for one sample: its recorded calls, each half's first."""
    total = 0
    for prefix, module in halves(model).items():
        if calls[prefix]:
            with FlopCounterMode(display=False) as counter:
                output = output_of(module, calls[prefix][0])
            total += counter.get_total_flops() // 2 // len(output)
    return total
