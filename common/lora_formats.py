"""LoRAs for other tools: kohya's names, which every tool knows, ComfyUI's own, and diffusers' again.

    kohya      lora_unet_down_blocks_0_attentions_0_..., lora_te_...; SDXL's UNet by the original code's blocks
    comfyui    diffusion_model.input_blocks.1.1..., the original code's names as they are
    diffusers  unet.down_blocks.0.attentions.0..., alpha in the file's metadata

A layer of the first two has its own alpha beside its factors, lora_down (A) and lora_up (B): what is added to a
weight is B A alpha / rank.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.original_layout import kind_of, original_modules

FORMATS = ("kohya", "comfyui", "diffusers")
_PARTS = re.compile(r"(.+)\.(lora_(?:up|down|A|B)\.weight|alpha)$")
READERS = {
    "kohya": "ComfyUI, A1111, Forge, stable-diffusion.cpp, diffusers",
    "comfyui": "ComfyUI",
    "diffusers": "diffusers",
}
_BASE = {  # what kohya and the model specification call a base model
    "sd1": ("sd_v1", "stable-diffusion-v1"),
    "sd2": ("sd_v2", "stable-diffusion-v2-512"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}


def names_of(models, style):
    """{"<component>.<module>": its name in a style} of every layer with weights.

    models: {component: model}; style: "kohya", "comfyui", or "kohya-diffusers", kohya's with diffusers' blocks in
    SDXL too, as other trainers write it.
    """
    found, sdxl = {}, kind_of(models) == "sdxl"
    for module, original in original_modules(models["unet"]).items():
        kohya = original if sdxl and style == "kohya" else module
        found[f"unet.{module}"] = f"diffusion_model.{original}" if style == "comfyui" else underscored("unet", kohya)
    prefixes = {"text_encoder": "te1" if sdxl else "te", "text_encoder_2": "te2"}
    for component in models.keys() & prefixes.keys():
        for name, _ in models[component].named_parameters():
            if name.endswith(".weight") and ".lora_" not in name:
                module = name.removesuffix(".weight").replace(".base_layer", "")
                old = f"text_model.{module.removeprefix('text_model.')}"  # transformers' names when kohya's were made
                found[f"{component}.{module}"] = underscored(prefixes[component], old)
    return found


def underscored(prefix, name):
    return f"lora_{prefix}_{name.replace('.', '_')}"


def read_named(models, tensors):
    """{"<component>.<module>": (down, up, alpha)} of tensors by kohya's or ComfyUI's names, each with its own alpha.

    None where a name is in neither style, or of a layer that these models have not. Stock diffusers gives all layers
    of such a file one alpha.
    """
    known = {}
    for style in ("kohya", "kohya-diffusers", "comfyui"):
        known.update({name: layer for layer, name in names_of(models, style).items()})
    kinds = {"lora_down.weight": 0, "lora_A.weight": 0, "lora_up.weight": 1, "lora_B.weight": 1, "alpha": 2}
    found = {}
    for key, tensor in tensors.items():
        match = _PARTS.match(key)
        if not match or match[1] not in known:
            return None
        found.setdefault(known[match[1]], [None, None, None])[kinds[match[2]]] = tensor
    if any(down is None or up is None for down, up, _ in found.values()):
        return None
    return {n: (down, up, float(len(down) if alpha is None else alpha)) for n, (down, up, alpha) in found.items()}


def write_lora(path, layers, models, style, metadata):
    """One .safetensors file of {"<component>.<module>": Layer} in the style "kohya" or "comfyui"."""
    names, tensors = names_of(models, style), {}
    for name, layer in layers.items():
        tensors[f"{names[name]}.lora_down.weight"] = layer.down.contiguous()
        tensors[f"{names[name]}.lora_up.weight"] = layer.up.contiguous()
        tensors[f"{names[name]}.alpha"] = torch.tensor(float(layer.alpha))
    save_file(tensors, path, metadata={"format": "pt", **metadata})


def describe(layers, models, title, base_model):
    """The metadata, all strings, by which other tools list a LoRA: kohya's ss_*, and the model specification's."""
    ranks, alphas = ({f(layer) for layer in layers.values()} for f in (lambda x: len(x.down), lambda x: x.alpha))
    version, architecture = _BASE[kind_of(models)]
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": version,
        "ss_v2": str(version == "sd_v2"),
        "ss_sd_model_name": Path(base_model).name,
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
    }


def carried(contract, scheduler):
    """Metadata by which this repository knows how a file is sampled: its distillation.json, its scheduler's config."""
    return {"distillation": json.dumps(contract), "scheduler": json.dumps(dict(scheduler))}


def in_words(layers):
    """ "rank 4, alpha 32" of {name: Layer}, or from the least to the greatest of each."""
    ranks, alphas = ([f(layer) for layer in layers.values()] for f in (lambda x: len(x.down), lambda x: x.alpha))
    spans = (" to ".join(f"{x:g}" for x in sorted({min(numbers), max(numbers)})) for numbers in (ranks, alphas))
    return "rank {}, alpha {}".format(*spans)


def same_layers(a, b):
    """Whether two {"<component>.<module>": Layer} are the same, alpha and factors."""

    def equal(x, y):
        return x.alpha == y.alpha and torch.equal(x.down, y.down) and torch.equal(x.up, y.up)

    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
