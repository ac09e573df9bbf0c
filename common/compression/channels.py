"""Channels: groups of them that can go together, how much each matters, and removing them.

A group is the inside of one layer: a resnet's inner channels, a feed-forward's, an attention's heads. What it writes
to, the residual stream, keeps its width, so that the layers around it and LoRAs for them still fit. Channels go by
units: a whole group of a GroupNorm, so that the survivors' normalisation is unchanged exactly; a head; one channel of
a feed-forward. Works on Stable Diffusion's UNets and VAEs, CLIP text encoders, and the transformers of FLUX, SD3 and
PixArt: by the kinds of their layers.
"""

from dataclasses import dataclass

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention

from common.compression import pruned_models

KINDS = ("conv", "feed_forward", "attention")
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "vae")
MULTIPLE = 8  # of channels that a feed-forward keeps: what matrix units like


@dataclass
class Group:
    """Units of `width` channels, removed together. spans: (module, axis of its weight, offset of unit 0 in it)."""

    name: str
    kind: str
    units: int
    width: int
    spans: list

    def channels(self, units, offset=0):
        """The channels (len(units) * width,) of these units, in an axis where unit 0 starts at `offset`."""
        units = torch.as_tensor(units)
        return (offset + units[:, None] * self.width + torch.arange(self.width)).flatten()


def groups_of(model):
    """The Groups of a model, in its order. What stands in none is never pruned."""
    groups, modules = [], dict(model.named_modules())

    def add(name, kind, channels, width, rows, columns):
        if channels // width > 1:
            spans = [(f"{name}.{layer}".lstrip("."), 0, offset) for layer, offset in rows]
            groups.append(Group(name, kind, channels // width, width, [*spans, *((n, 1, o) for n, o in columns)]))

    for name, module in modules.items():
        if isinstance(module, ResnetBlock2D) and isinstance(module.norm2, torch.nn.GroupNorm):
            channels, norm = module.conv1.out_channels, module.norm2
            rows = [("conv1", 0), ("norm2", 0)]
            if module.time_emb_proj is not None:  # scale_shift: scales, then shifts
                rows += [("time_emb_proj", k * channels) for k in range(module.time_emb_proj.out_features // channels)]
            add(name, "conv", channels, channels // norm.num_groups, rows, [(f"{name}.conv2", 0)])
        elif isinstance(module, FeedForward):
            inner = module.net[2].in_features
            rows = [("net.0.proj", k * inner) for k in range(module.net[0].proj.out_features // inner)]  # GEGLU: two
            add(name, "feed_forward", inner, 1, rows, [(f"{name}.net.2", 0)])
        elif isinstance(module, CLIPMLP):
            add(name, "feed_forward", module.fc1.out_features, 1, [("fc1", 0)], [(f"{name}.fc2", 0)])
        elif isinstance(module, CLIPAttention):
            rows = [(layer, 0) for layer in ("q_proj", "k_proj", "v_proj")]
            add(name, "attention", module.q_proj.out_features, module.head_dim, rows, [(f"{name}.out_proj", 0)])
        elif isinstance(module, FluxSingleTransformerBlock):
            inner, attention = module.proj_mlp.out_features, module.attn.inner_dim
            add(name, "feed_forward", inner, 1, [("proj_mlp", 0)], [(f"{name}.proj_out", attention)])
        elif hasattr(module, "heads") and hasattr(module, "to_q"):
            inner = module.to_q.out_features
            if module.to_k.out_features != inner:
                continue  # fewer heads of keys than of queries
            names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
            rows = [(layer, 0) for layer in names if getattr(module, layer, None) is not None]
            columns = [(f"{name}.to_out.0", 0)] if getattr(module, "to_out", None) is not None else []
            if not columns:  # FLUX's single blocks, which read heads and feed-forward at once
                columns = [(f"{name.rpartition('.')[0]}.proj_out", 0)]
            if getattr(module, "to_add_out", None) is not None:
                columns.append((f"{name}.to_add_out", 0))
            add(name, "attention", inner, inner // module.heads, rows, columns)
    return groups


def magnitude(model, group, order=1):
    """Importance (units,) of a group's units: the sum of |w|^order of all weights that would go with each."""
    scores = torch.zeros(group.units)
    for name, axis, offset in group.spans:
        weight = model.get_submodule(name).weight.detach().float().cpu()
        if weight.dim() > 1:  # of norms all are near 1
            part = weight.narrow(axis, offset, group.units * group.width).transpose(0, axis)
            scores += part.reshape(group.units, -1).abs().pow(order).sum(1)
    return scores


def units_kept(group, ratio, units=None):
    """How many units stay where `ratio` of `units`, all by default, is to go, rounded; one at least."""
    units = units or group.units
    kept = round(units * (1 - ratio))
    if group.width == 1 and units >= 8 * MULTIPLE and ratio:
        kept = round(kept / MULTIPLE) * MULTIPLE
    return max(min(kept, group.units), 1)


def count(model):
    """Its parameters."""
    return sum(p.numel() for p in model.parameters())


def choose(scores, count):
    """The `count` units of the highest scores, ascending: a list."""
    return scores.topk(count).indices.sort().values.tolist()


def cost_of_unit(model, group):
    """Parameters that go with each unit of a group."""
    per_channel = 0
    for name, axis, _ in group.spans:
        layer = model.get_submodule(name)
        per_channel += layer.weight.numel() // layer.weight.shape[axis]
        per_channel += axis == 0 and layer.bias is not None
    return per_channel * group.width


@torch.no_grad()
def prune(model, kept):
    """Remove from `model`, in place, all units of {group name: units kept, ascending} that are not kept.

    Its class becomes that of pruned_models, with the new sizes in its config; a CLIP text encoder whose layers all
    have one width still is of the stock class.
    """
    groups = [group for group in groups_of(model) if len(kept.get(group.name, range(group.units))) < group.units]
    keep, sizes = {}, {}  # keep: {(module, axis): mask of the channels that stay}
    for group in groups:
        gone = sorted(set(range(group.units)) - set(kept[group.name]))
        for name, axis, offset in group.spans:
            mask = keep.setdefault((name, axis), torch.ones(model.get_submodule(name).weight.shape[axis], dtype=bool))
            mask[group.channels(gone, offset)] = False
        if group.kind == "attention" and hasattr(model.get_submodule(group.name), "heads"):
            sizes[group.name] = [len(kept[group.name])]
    tensors = {}
    for (name, axis), mask in keep.items():
        layer, indices = model.get_submodule(name), mask.nonzero().flatten()
        weight, bias = tensors.get(name, (layer.weight, layer.bias))
        weight = weight.index_select(axis, indices.to(weight.device))
        bias = bias if bias is None or axis == 1 else bias[indices.to(bias.device)]
        tensors[name] = weight, bias
        if isinstance(layer, torch.nn.GroupNorm):
            sizes[name] = [layer.num_groups * len(indices) // len(mask), len(indices)]
        else:
            sizes[name] = [weight.shape[0], weight.shape[1]]
    trained = {name: model.get_submodule(name).weight.requires_grad for name in tensors}
    pruned_models.resize(model, sizes)
    for name, (weight, bias) in tensors.items():
        layer = model.get_submodule(name).requires_grad_(trained[name])
        layer.weight.data = weight.contiguous()
        if bias is not None:
            layer.bias.data = bias.contiguous()
    _declare(model, sizes)


def _declare(model, sizes):
    """Give a model whose layers were resized the class and the config that open it again."""
    if not sizes:
        return
    config = {**(getattr(model.config, "pruned", None) or {}), **sizes}
    widths = {module.fc1.out_features for module in model.modules() if isinstance(module, CLIPMLP)}
    if len(widths) == 1 and all(name.endswith((".fc1", ".fc2")) for name in config):
        model.config.intermediate_size = widths.pop()
        if hasattr(model.config, "pruned"):  # of layers that differed before
            model.__class__ = type(model).__base__
            del model.config.pruned
        return
    if not type(model).__name__.startswith("Pruned"):
        model.__class__ = getattr(pruned_models, f"Pruned{type(model).__name__}")
    if hasattr(model, "register_to_config"):
        model.register_to_config(pruned=config)
    else:
        model.config.pruned = config


def record(groups, kept, before=None):
    """The manifest's entry of a component: what is kept of each group, in the numbers of the original model.

    before: the entry so far, of a model that was pruned already.
    """
    if before is None:
        before = {
            group.name: {
                "kind": group.kind,
                "units": group.units,
                "width": group.width,
                "kept": list(range(group.units)),
                "spans": [list(span) for span in group.spans],
            }
            for group in groups
        }
    return {
        name: {**entry, "kept": [entry["kept"][unit] for unit in kept.get(name, range(len(entry["kept"])))]}
        for name, entry in before.items()
    }


def untouched(model):
    """Names of the linear layers and convolutions that no group reaches: critical ones, left alone."""
    reached = {name for group in groups_of(model) for name, _, _ in group.spans}
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and name not in reached]


# Unstructured: weights that become zero. Neither files nor passes become smaller.


def prunable_weights(model):
    """{module name: weight} of the linear layers and convolutions that a group reaches."""
    names = dict.fromkeys(name for group in groups_of(model) for name, _, _ in group.spans)
    found = {name: model.get_submodule(name).weight for name in names}
    return {name: weight for name, weight in found.items() if weight.dim() > 1}


@torch.no_grad()
def zero_smallest(model, ratio, pattern="unstructured"):
    """Set the smallest weights of every prunable layer of a model to zero, in place.

    pattern: "unstructured", `ratio` of each layer; or "2:4", the two smallest of every four inputs in a row, which
    NVIDIA's sparse matrix units can use, of layers whose inputs come in fours.
    """
    for weight in prunable_weights(model).values():
        rows = weight.data.flatten(1)
        if pattern == "2:4" and rows.shape[1] % 4 == 0:
            fours = rows.reshape(-1, 4)
            rows = fours.scatter(1, fours.abs().topk(2, dim=1, largest=False).indices, 0.0)
        elif pattern == "unstructured" and round(ratio * rows.numel()):
            threshold = rows.abs().flatten().kthvalue(round(ratio * rows.numel())).values
            rows = torch.where(rows.abs() <= threshold, torch.zeros_like(rows), rows)
        weight.data = rows.reshape(weight.shape).contiguous()


def sparsity(model):
    """{module name: share of its weights that are zero} of the prunable layers."""
    return {name: (weight == 0).double().mean().item() for name, weight in prunable_weights(model).items()}
