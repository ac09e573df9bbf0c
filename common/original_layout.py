"""The original layout of Stable Diffusion (CompVis, Stability's SGM): one file, its own names. What other tools read.

    model.diffusion_model.             the UNet: input_blocks, middle_block, output_blocks, counted through all levels
    first_stage_model.                 the VAE, whose decoder counts its levels from the other end
    cond_stage_model.                  the text encoder: CLIP's own names, or OpenCLIP's for SD2.x
    conditioner.embedders.0. and .1.   the two of SDXL, CLIP's and OpenCLIP's

Everything here is names and small changes of shape, from and to the state dicts of diffusers and transformers.
"""

import re

import torch

UNET, VAE = "model.diffusion_model.", "first_stage_model."
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}


def kind_of(parts):
    """ "sd1", "sd2" or "sdxl": what {component: model} is in its structure."""
    if "text_encoder_2" in parts:
        return "sdxl"
    return "sd2" if parts["unet"].config.use_linear_projection else "sd1"


# Names


def unet_blocks(names, spread=False):
    """{diffusers' name of a part of a UNet: its original one}: resnets, attentions, samplers, and both ends.

    names: of its parameters or modules, which say how many blocks there are. The original counts blocks through all
    levels; spread: three a level even where a level has fewer, as stable-diffusion.cpp expects of BK-SDM-Tiny.
    """
    found, parts = dict(_UNET_ENDS), {re.sub(r"^((?:down|up)_blocks\.\d+\.\w+\.\d+).*", r"\1", name) for name in names}

    def many(prefix):
        return sum(re.fullmatch(rf"{prefix}\.\d+", part) is not None for part in parts)

    number = 0
    for level in range(len({part.split(".")[1] for part in parts if part.startswith("down_blocks.")})):
        prefix = f"down_blocks.{level}"
        number = 3 * level if spread else number
        for j in range(many(rf"{prefix}\.resnets")):
            number += 1
            found[f"{prefix}.resnets.{j}"] = f"input_blocks.{number}.0"
            found[f"{prefix}.attentions.{j}"] = f"input_blocks.{number}.1"
        number = 3 * level + 3 if spread else number + 1
        found[f"{prefix}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
    number = 0
    for level in range(len({part.split(".")[1] for part in parts if part.startswith("up_blocks.")})):
        prefix = f"up_blocks.{level}"
        number = 3 * level if spread else number
        for j in range(many(rf"{prefix}\.resnets")):
            found[f"{prefix}.resnets.{j}"] = f"output_blocks.{number}.0"
            found[f"{prefix}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        last, place = 3 * level + 2 if spread else number - 1, 2 if f"{prefix}.attentions.0" in parts else 1
        if spread and level == 0:
            place = 1
        found[f"{prefix}.upsamplers.0.conv"] = f"output_blocks.{last}.{place}.conv"
    return found


def unet_name(name, blocks):
    """The original name of a UNet's parameter or module, by `unet_blocks`."""
    start = max((part for part in blocks if f"{name}.".startswith(f"{part}.")), key=len)
    rest = name[len(start) :]
    if ".resnets." in f".{start}":
        rest = re.sub(r"^\.(\w+)", lambda match: f".{_RESNET[match[1]]}", rest)
    return blocks[start] + rest


def vae_name(name, levels):
    """The original name of a VAE's parameter; levels: of resolution."""
    name = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.", name)
    name = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", name)
    up = re.match(r"decoder\.up_blocks\.(\d+)\.(?:resnets|upsamplers\.0)\.", name)
    if up:
        kind = "block" if ".resnets." in up[0] else "upsample"
        name = f"decoder.up.{levels - 1 - int(up[1])}.{kind}.{name[up.end() :]}"
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    attention = re.match(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)$", name)
    if attention:
        name = f"{attention[1]}.mid.attn_1.{_VAE_ATTENTION[attention[2]]}.{attention[3]}"
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def original_modules(unet):
    """{diffusers' name of a layer of a UNet: its original one}, of every layer with weights."""
    parameters = [name for name, _ in unet.named_parameters() if name.endswith(".weight") and ".lora_" not in name]
    names = [name.removesuffix(".weight").removesuffix(".base_layer") for name in parameters]
    blocks = unet_blocks(names)
    return {name: unet_name(name, blocks) for name in names}


# Tensors


def unet_tensors(state_dict, spread=False):
    """A UNet's state dict by original names."""
    blocks = unet_blocks(state_dict, spread)
    return {UNET + unet_name(name, blocks): tensor for name, tensor in state_dict.items()}


def vae_tensors(state_dict):
    """A VAE's state dict by original names; its attention was made of convolutions of one pixel."""
    levels = len({name.split(".")[2] for name in state_dict if name.startswith("decoder.up_blocks.")})
    found = {}
    for name, tensor in state_dict.items():
        linear = ".attentions." in name and tensor.dim() == 2
        found[VAE + vae_name(name, levels)] = tensor[:, :, None, None] if linear else tensor
    return found


def clip_tensors(state_dict, prefix):
    """A CLIP text encoder's state dict by transformers' names of old, all under text_model., behind `prefix`."""
    names = {name: f"text_model.{name.removeprefix('text_model.')}" for name in state_dict}
    return {f"{prefix}transformer.{names[name]}": tensor for name, tensor in state_dict.items()}


def open_clip_tensors(state_dict, prefix):
    """A CLIP text encoder's state dict by OpenCLIP's names, behind `prefix`: q, k and v of a layer are one matrix."""
    found, joined = {}, {}
    for name, tensor in state_dict.items():
        plain = name.removeprefix("text_model.")
        layer = re.match(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", plain)
        if plain in _OPEN_CLIP_ENDS:
            found[_OPEN_CLIP_ENDS[plain]] = tensor.T if plain == "text_projection.weight" else tensor
        elif layer and layer[2] in _OPEN_CLIP_LAYER:
            found[f"transformer.resblocks.{layer[1]}.{_OPEN_CLIP_LAYER[layer[2]]}.{layer[3]}"] = tensor
        else:
            where = f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"
            joined.setdefault(where, {})[re.search("[qkv](?=_proj)", layer[2])[0]] = tensor
    found.update({where: torch.cat([parts[x] for x in "qkv"]) for where, parts in joined.items()})
    return {f"{prefix}model.{name}": tensor for name, tensor in found.items()}


def original_tensors(parts, spread=False):
    """{original name: tensor} of a whole pipeline; parts: {component: module}, of SD1.x, SD2.x or SDXL."""
    states = {name: strip(module.state_dict()) for name, module in parts.items()}
    found = {**unet_tensors(states["unet"], spread), **vae_tensors(states["vae"])}
    kind = kind_of(parts)
    if kind == "sdxl":
        found.update(clip_tensors(states["text_encoder"], "conditioner.embedders.0."))
        found.update(open_clip_tensors(states["text_encoder_2"], "conditioner.embedders.1."))
    else:
        text_tensors = open_clip_tensors if kind == "sd2" else clip_tensors
        found.update(text_tensors(states["text_encoder"], "cond_stage_model."))
    return found


def strip(state_dict):
    """A state dict without what transformers makes anew."""
    return {name: tensor for name, tensor in state_dict.items() if not name.endswith("position_ids")}
