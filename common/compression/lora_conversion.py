"""LoRAs on compressed models: what was made for the original is renamed and sliced as compression.json says.

A LoRA adds B A alpha / rank to a weight; A is (rank, inputs, ...), B (outputs, rank, ...). A layer that moved up in a
model that lost blocks has another name there; one that lost outputs or inputs loses those rows of B and columns of A.
That is exact: the compressed model with the converted LoRA has the weights of the original with the LoRA, compressed.
"""

import contextlib
import re
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from common.compression.manifest import MANIFEST, read_manifest
from common.compression.students import source_of
from common.contract import read_distillation
from common.errors import UsageError, first_line
from common.lora import FACTOR, LOAD_ERRORS, check_lora_path, load_lora, lora_file, lora_tensors
from common.lora_formats import in_words, read_named

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_NUMBERED = re.compile(r"(input_blocks|middle_block|output_blocks)[._]\d")
_NOT_PLAIN = re.compile(r"dora_scale|lora_magnitude_vector|hada_|lokr_|lora_mid|oft_|lora_embedding|\.bias$|\.diff")


class Layer(NamedTuple):
    """The LoRA of one layer: down is A (rank, inputs, ...), up is B (outputs, rank, ...)."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def parameters(self):
        return self.down.numel() + self.up.numel()


# Reading


def read_lora(pipeline, path, flag="--lora_path", moved=False):
    """{"<component>.<module>": Layer} of a LoRA with the keys of diffusers, peft, kohya or ComfyUI.

    moved: whether the pipeline's UNet lost blocks, so that numbers of blocks of the original code, by which ComfyUI
    and kohya's SDXL name layers, are not those of its own. Raises UsageError.
    """
    where = f"{flag} {path}"
    check_lora_path(path, flag)
    try:
        check_plain(path, where, moved)
        named = layers_by_name(pipeline, path)
        if named:
            return named
        tensors, alphas, metadata = lora_tensors(pipeline, str(path))
    except UsageError:
        raise
    except LOAD_ERRORS as error:
        raise UsageError(f"{where}: it is no LoRA that can be read ({first_line(error)}).") from None
    return layers_of(pipeline, tensors, alphas or {}, metadata or {}, where)


def layers_by_name(pipeline, path):
    """{"<component>.<module>": Layer} of a file or folder with kohya's or ComfyUI's names of this pipeline's layers.

    Else None, as for a hub id, or a file that can't be read.
    """
    if not Path(path).exists():
        return None
    models = {name: getattr(pipeline, name) for name in COMPONENTS if getattr(pipeline, name, None) is not None}
    try:
        with safe_open(lora_file(path), "pt") as opened:
            named = read_named(models, {key: opened.get_tensor(key) for key in opened.keys()})
    except (OSError, SafetensorError):
        return None
    return named and {name: Layer(*parts) for name, parts in named.items()}


def check_plain(path, where, moved=False):
    """UsageError where a file holds more than two factors for each layer; a hub id is not looked into.

    And where it numbers blocks as the original code does, and they have `moved`.
    """
    if Path(path).exists():
        with safe_open(lora_file(path), "pt") as opened:
            strange = next((key for key in opened.keys() if _NOT_PLAIN.search(key)), None)
            numbered = next((key for key in opened.keys() if _NUMBERED.search(key)), None)
        if numbered and moved:
            raise UsageError(
                f"{where}: it names layers by the original code's blocks ({numbered}), which this model has lost some "
                "of: export.py --format diffusers, with the model it was made for, gives it names that fit."
            )
        if strange:
            raise UsageError(f"{where}: it is no plain LoRA (it has {strange}), which is all that can be converted.")


def layers_of(pipeline, tensors, alphas, metadata, where):
    """The Layers of a state dict, whatever the style of its keys. Raises UsageError, a sentence that starts `where`.

    Alpha is the network's, or that of peft's metadata, or else the rank: what diffusers takes.
    """
    factors, found = {"down": {}, "up": {}}, {}
    alphas = {layer_name(pipeline, FACTOR.sub("", key.removesuffix(".alpha"))): a for key, a in alphas.items()}
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            alphas[layer_name(pipeline, key.removesuffix(".alpha"))] = float(tensor)
            continue
        match = FACTOR.search(key)
        name = layer_name(pipeline, key[: match.start()]) if match else ""
        if not name.startswith(tuple(f"{component}." for component in COMPONENTS)):
            raise UsageError(f"{where}: it is no LoRA for a UNet or text encoder (it has {key}).")
        factors["down" if match[1] == "down" or match[2] == "A" else "up"][name] = tensor
    if not factors["down"] or factors["down"].keys() != factors["up"].keys():
        odd = next(iter(factors["down"].keys() ^ factors["up"].keys()), "any layer")
        raise UsageError(f"{where}: it lacks one of the two factors of {odd}.")
    for name, down in factors["down"].items():
        component, _, module = name.partition(".")
        settings = {k.removeprefix(f"{component}."): v for k, v in metadata.items() if k.startswith(f"{component}.")}
        alpha, rank = alphas.get(name, down.shape[0]), down.shape[0]
        if name not in alphas and "lora_alpha" in settings:
            patterns = settings.get("alpha_pattern") or {}
            alpha = patterns.get(get_pattern_key(patterns, module), settings["lora_alpha"])
            alpha *= rank**0.5 if settings.get("use_rslora") else 1
        found[name] = Layer(down, factors["up"][name], alpha)
    return found


def layer_name(pipeline, key):
    """ "<component>.<module>" of a key without its factor: what the pipeline's own models call the layer."""
    key = key.replace(".processor.", ".")
    component, _, module = key.partition(".")
    if hasattr(pipeline.unet, component):  # of the time when a LoRA was for a UNet alone
        component, module = "unet", key
    if component == "unet":
        return re.sub(r"(attn\d)\.to_out$", r"\1.to_out.0", f"unet.{module}")
    module = re.sub(r"self_attn\.to_(q|k|v|out)$", r"self_attn.\1_proj", module)
    if not hasattr(getattr(pipeline, component, None), "text_model"):  # transformers 5 has one level fewer
        module = module.removeprefix("text_model.")
    return f"{component}.{module}"


def layer_shapes(pipeline):
    """{"<component>.<module>": shape of its weight} of every layer that a LoRA can be for."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: tuple(module.weight.shape) for name, module in modules_of(pipeline) if isinstance(module, kinds)}


def modules_of(pipeline):
    """("<component>.<module>", module) of everything in the models that a LoRA can be for."""
    for component in COMPONENTS:
        if getattr(pipeline, component, None) is not None:
            for name, module in getattr(pipeline, component).named_modules():
                yield f"{component}.{name}", module


# Converting


def convert_lora(layers, shapes, manifest):
    """({name: Layer} that fit a compressed model, report) of a LoRA for its original: pure.

    layers: {"<component>.<module of the original>": Layer}; shapes: layer_shapes of the compressed model; manifest:
    its compression.json ({}: it is the original). report: fitting (count of layers as they were), converted and
    dropped ([{layer, why}, ...]), coverage {layers, parameters}: what share arrives. One layer of a wrong shape gives
    away that the LoRA is for another UNet or text encoder, and then none of that component's arrives.
    """
    renamed, gone = targets_of(shapes, manifest), gone_channels(manifest)
    arrived, why, strangers, dropped = {}, {}, {}, {}
    for name, layer in layers.items():
        component = name.partition(".")[0]
        if not any(other.startswith(f"{component}.") for other in shapes):
            dropped[name] = f"the pipeline has no {component}"
        elif component == "unet" and manifest.get("block_map") == {} and manifest.get("variant"):
            dropped[name] = "the UNet was started from random weights: no layer of it came from the original"
        elif name not in renamed:
            dropped[name] = "no layer of the model came from it"
            if component != "unet":  # of which none is removed one by one, so that the others may have moved
                strangers.setdefault(component, f"it has no {name.partition('.')[2]}")
        else:
            for target in renamed[name]:
                try:
                    arrived[target], changes = fit(layer, name, target, shapes[target], manifest, gone)
                    why[target] = "; ".join(changes)
                except ValueError as error:
                    strangers.setdefault(component, f"{name.partition('.')[2]} {error}")
    for component, reason in strangers.items():
        arrived = {target: layer for target, layer in arrived.items() if target.partition(".")[0] != component}
        reason = f"the LoRA was made for another {component}: {reason}"
        dropped.update({name: reason for name in layers if name.partition(".")[0] == component})
    total = sum(layer.parameters for layer in layers.values())
    report = {
        "fitting": sum(not why[target] for target in arrived),
        "converted": [{"layer": target, "why": why[target]} for target in arrived if why[target]],
        "dropped": [{"layer": name, "why": reason} for name, reason in dropped.items()],
        "coverage": {
            "layers": 1 - len(dropped) / len(layers),
            "parameters": sum(layer.parameters for layer in arrived.values()) / total,
        },
    }
    return arrived, report


def targets_of(shapes, manifest):
    """{layer of the original: [layers of the compressed model that came from it]}."""
    found, sources = {}, manifest.get("block_map") or {}
    for name in shapes:
        component, _, module = name.partition(".")
        original = f"unet.{source_of(module, sources)}" if component == "unet" else name
        found.setdefault(original, []).append(name)
    return found


def gone_channels(manifest):
    """{("<component>.<module>", axis): set of the channels that pruning took, before it}."""
    gone = {}
    for component, groups in (manifest.get("pruned") or {}).items():
        for group in groups.values():
            units, width = set(range(group["units"])) - set(group["kept"]), group["width"]
            for module, axis, offset in group["spans"]:
                taken = gone.setdefault((f"{component}.{module}", axis), set())
                taken.update(offset + unit * width + i for unit in units for i in range(width))
    return gone


def fit(layer, name, target, shape, manifest, gone):
    """(Layer of the model's layer `target`, [what was changed]); ValueError where it does not fit that `shape`."""
    changes = [] if name == target else [f"was {name.partition('.')[2]}"]
    rows, scale = kept_channels(target, 0, layer.up.shape[0], manifest, gone)
    columns, _ = kept_channels(target, 1, layer.down.shape[1], manifest, gone)
    sizes = (
        (layer.up.shape[0] if rows is None else len(rows)),
        (layer.down.shape[1] if columns is None else len(columns)),
    )
    if (*sizes, *layer.down.shape[2:]) != tuple(shape) or layer.down.shape[0] != layer.up.shape[1]:
        ours, theirs = ("x".join(map(str, size)) for size in (shape, (*sizes, *layer.down.shape[2:])))
        raise ValueError(f"is {ours} here, and {theirs} in the LoRA")
    down, up = layer.down, layer.up
    if rows is not None:
        changes.append(f"{len(rows)} of {len(up)} outputs")
        up = up[rows] * scale
    if columns is not None:
        changes.append(f"{len(columns)} of {down.shape[1]} inputs")
        down = down[:, columns]
    return Layer(down, up, layer.alpha), changes


def kept_channels(target, axis, size, manifest, gone):
    """(which of the original's `size` channels a layer has left, long; None: all; what its values were scaled by).

    Widths were sliced first, then groups pruned. Raises ValueError where the original's layer had another size.
    """
    component, _, module = target.partition(".")
    keep, scale, kept = manifest.get("keep") or {}, 1.0, list(range(size))
    names = keep.get("layers", {}).get(module, (None, None))[axis] if component == "unet" else None
    if names is not None:
        parts = [keep.get("sizes", {}).get(name, size // len(names)) for name in names]
        starts = [sum(parts[:i]) for i in range(len(parts))]
        if len(set(names)) > 1 and "sizes" not in keep:
            raise ValueError("reads two parts, whose widths an older compression.json does not say: prepare it again")
        if sum(parts) != size or any(keep["indices"][name][-1] >= part for name, part in zip(names, parts)):
            raise ValueError(f"had {sum(parts)} channels in the original, and {size} in the LoRA")
        kept = [start + index for name, start in zip(names, starts) for index in keep["indices"][name]]
        if axis == 0 and module.endswith(".to_q"):  # slice_widths keeps the scale of the softmax
            scale = (len(kept) / size) ** 0.5
    taken = gone.get((target, axis), ())
    if taken and max(taken) >= len(kept):
        raise ValueError(f"had more than {max(taken)} channels in the original, and {len(kept)} in the LoRA")
    left = [channel for position, channel in enumerate(kept) if position not in taken]
    return (None, 1.0) if len(left) == size else (torch.tensor(left), scale)


def manifest_for(path, model, flag="--lora_path"):
    """The manifest by which the LoRA at `path` is converted to the pipeline `model`; None: it is loaded as it is.

    A LoRA whose distillation.json names a compressed parent knows that one's names and widths already. Raises
    UsageError where the parent was compressed in a way that `model` was not.
    """
    manifest = manifest_of(model)
    parent = str(read_distillation(path).get("parent"))
    known = manifest_of(parent) or {}
    if manifest is None or Path(parent).resolve() == Path(model).resolve():
        return None
    left = {key: manifest.get(key) for key in ("block_map", "keep", "pruned", "variant")}
    for key in ("block_map", "keep", "pruned"):
        if known.get(key) and known[key] != left[key]:
            raise UsageError(
                f"{flag} {path}: it was made for {parent}, which was compressed in another way than {model}."
            )
        left[key] = None if known.get(key) else left[key]
    return left if any(left[key] for key in ("block_map", "keep", "pruned")) or not known else None


def manifest_of(folder):
    """compression.json of a pipeline, or None where it has none."""
    return read_manifest(folder) if (Path(folder) / MANIFEST).is_file() else None


def converted(pipeline, path, manifest, flag="--lora_path"):
    """(Layers that fit the pipeline, report) of the LoRA at `path`. Raises UsageError where none fits."""
    moved = any(name != source for name, source in (manifest.get("block_map") or {}).items())
    layers, report = convert_lora(read_lora(pipeline, path, flag, moved), layer_shapes(pipeline), manifest)
    if not layers:
        raise UsageError(f"{flag} {path}: none of its layers fits this model ({report['dropped'][0]['why']}).")
    return layers, report


def summary(report):
    """What became of a LoRA, in a line or two."""
    moved, dropped = len(report["converted"]), report["dropped"]
    arrived = report["fitting"] + moved
    said = f"{arrived} layers of the LoRA are used, {report['fitting']} as they are and {moved} converted"
    if not dropped:
        return f"{said}; none is dropped."
    reasons = {why: sum(entry["why"] == why for entry in dropped) for why in (entry["why"] for entry in dropped)}
    why = "; ".join(f"{count} because {reason}" for reason, count in reasons.items())
    return (
        f"{said}; {len(dropped)} are DROPPED, {why}. {report['coverage']['parameters']:.0%} of its parameters arrive."
    )


# Loading


def lora_config(layers):
    """peft's LoraConfig of {module: Layer}, each with a rank and an alpha of its own."""
    first = next(iter(layers.values()))
    return LoraConfig(
        r=len(first.down),
        lora_alpha=first.alpha,
        target_modules=list(layers),
        rank_pattern={f"^{re.escape(module)}": len(layer.down) for module, layer in layers.items()},
        alpha_pattern={f"^{re.escape(module)}": layer.alpha for module, layer in layers.items()},
        inference_mode=True,
    )


def attach(pipeline, layers, name):
    """Put {"<component>.<module>": Layer} on the pipeline as adapter `name`, frozen, in the dtype of its models."""
    for component in COMPONENTS:
        own = {key.removeprefix(f"{component}."): x for key, x in layers.items() if key.startswith(f"{component}.")}
        if not own:
            continue
        model = getattr(pipeline, component)
        with plain_weights([model.get_submodule(module) for module in own]):
            model.add_adapter(lora_config(own), name)
        state = {f"{module}.lora_A.weight": layer.down for module, layer in own.items()}
        state |= {f"{module}.lora_B.weight": layer.up for module, layer in own.items()}
        set_peft_model_state_dict(model, state, adapter_name=name)
        for key, parameter in model.named_parameters():
            if ".lora_" in key and f".{name}." in key:
                parameter.requires_grad_(False).data = parameter.data.to(model.device, model.dtype)
        model.eval()


@contextlib.contextmanager
def plain_weights(layers):
    """Within the context torchao's weights look like others, without memory: peft takes any for a linear layer's."""
    quantized = [(layer, layer.weight) for layer in layers if is_quantized(layer)]
    for layer, weight in quantized:
        stand_in = torch.zeros((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
        layer.weight = torch.nn.Parameter(stand_in, requires_grad=False)
    try:
        yield
    finally:
        for layer, weight in quantized:
            layer.weight = weight


def load_converted(pipeline, path, model, scale=1.0, fuse=False, flag="--lora_path"):
    """load_lora, on the pipeline of folder or hub id `model`: where that is compressed, converted, and it says how."""
    manifest = manifest_for(path, model, flag)
    quantized = any(is_quantized(module) for _, module in modules_of(pipeline))
    if manifest is None and not quantized and not layers_by_name(pipeline, path):
        load_lora(pipeline, path, scale, flag=flag)
    else:
        layers, report = converted(pipeline, path, manifest or {}, flag)
        print(f"LoRA: {in_words(layers)}, --lora_scale {scale:g}. {summary(report)}", flush=True)
        attach(pipeline, layers, "student")
        pipeline.set_adapters(["student"], [scale])
    if fuse:
        count = dequantize_adapted(pipeline)
        if count:
            print(f"--fuse_lora: the {count} quantized layers with a LoRA are no longer quantized.", flush=True)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()


def dequantize_adapted(pipeline):
    """Give the layers with an adapter that torchao quantized plain weights; how many there were.

    An adapter runs beside a quantized layer, but can't be added to its weight.
    """
    quantized = [layer for layer in adapted_layers(pipeline) if is_quantized(layer)]
    for layer in quantized:
        layer.weight = torch.nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    return len(quantized)


def adapted_layers(pipeline):
    """The layers of a pipeline that have an adapter, without it."""
    return [module.get_base_layer() for _, module in modules_of(pipeline) if isinstance(module, BaseTunerLayer)]


def is_quantized(layer):
    """Whether torchao quantized a layer's weight."""
    return type(getattr(layer, "weight", None)).__module__.startswith("torchao.")
