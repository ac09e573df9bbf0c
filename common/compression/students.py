"""Smaller UNets, initialised from a larger one.

Two cuts, which combine: blocks are removed (BK-SDM, arXiv:2305.15798), then the rest is made narrower. Everything that
is decided can be expressed by the UNet's config, so the result loads anywhere with stock diffusers.

Narrower: of every g contiguous channels k are kept, where g is the UNet's smallest GroupNorm group: then no
surviving channel changes its group. All layers that write to one residual stream share one keep-index; a stream
starts at conv_in and at each conv_shortcut. Kept are the channels with the largest sum of absolute weights over the
layers that write them (counting those that read them too starts tiny-sd's student farther from its teacher).
"""

import re
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from common.checkpoint import FinalFolder
from common.compression.manifest import write_manifest
from common.compression.pruned_models import PrunedUNet2DConditionModel
from common.contract import read_distillation, write_distillation
from common.errors import ModelError
from common.outputs import reopen, usage_of, write_model_card

VARIANTS = ("sd_base", "sd_small", "sd_tiny")
_PART = re.compile(r"((?:down_blocks|up_blocks)\.(\d+))\.(resnets|attentions)\.(\d+)(?:\.transformer_blocks\.(\d+))?")
_MID_LAYER = re.compile(r"(mid_block\.attentions\.\d+)\.transformer_blocks\.(\d+)")


def save_untrained(folder, pipeline, manifest, parent, revision=None, variant=None):
    """The folder of an untrained student: the whole pipeline, its manifest, distillation.json and model card.

    parent, revision, variant: of the teacher pipeline, whose guidance, timesteps and steps are the student's too.
    """
    origin = {"parent": parent, "revision": revision, "variant": variant}
    folder = Path(folder).absolute()
    with FinalFolder(folder) as student:
        pipeline.save_pretrained(student)
        write_manifest(student, {**manifest, "parent": parent})  # whose variant is of the blocks, not of the files
        contract = {"steps": None, "timesteps": None, "target": None, **read_distillation(parent), **origin}
        write_distillation(student, **{**contract, "method": "prepare_unet_small"})
        counts = manifest["parameters"]
        write_model_card(
            student,
            "Smaller student, to be trained by train_student_kd.py",
            parent,
            usage_of(contract, folder),
            {
                "blocks": manifest["variant"],
                "block_out_channels": manifest["block_out_channels"],
                "UNet parameters": f"{counts['student']:,} of {counts['teacher']:,}",
            },
        )
        reopen(student, pipeline)


def build_student(teacher, variant=None, block_out_channels=None):
    """(student UNet in the teacher's dtype, manifest), initialised from the teacher; see student_config for the cuts.

    Manifest: variant, block_out_channels, block_map {student module: teacher module}, feature_pairs [[student module,
    teacher module], ...] whose outputs have one resolution, keep (see slice_widths; None where no width changed),
    parameters and macs {teacher, student} (multiply-accumulates of one forward at the native size, batch 1).
    Raises ModelError.
    """
    config = dict(teacher.config)
    student, keep = empty_unet(student_config(config, variant)), None
    sources = block_sources(student, config, variant)
    state, shift = teacher.state_dict(), stages_dropped(variant)
    copied = {name: state[source_of(name, sources)].clone() for name in student.state_dict()}
    student.load_state_dict(copied, assign=True)
    if block_out_channels is not None and list(block_out_channels) != list(student.config.block_out_channels):
        student, keep = slice_widths(student, block_out_channels)
    return student.eval(), {
        "variant": variant,
        "block_out_channels": list(student.config.block_out_channels),
        "block_map": sources,
        "feature_pairs": feature_pairs(student, teacher, sources, shift),
        "keep": keep,
        **costs(config, student.config),
    }


def empty_unet(config):
    """A UNet of this config without memory for its weights (on the meta device)."""
    kind = PrunedUNet2DConditionModel if dict(config).get("pruned") else UNet2DConditionModel
    with torch.device("meta"):
        return kind.from_config({k: v for k, v in dict(config).items() if not k.startswith("_")})


def stages_dropped(variant):
    return 1 if variant == "sd_tiny" else 0


def student_config(config, variant=None, block_out_channels=None):
    """The config (a dict) of the student of a UNet with this config. Raises ModelError.

    sd_base: one layer per block instead of two (in the up blocks two instead of three), and transformers of more than
    one layer half as deep (SDXL). sd_small: sd_base without the middle block. sd_tiny: sd_small without the deepest
    stage. block_out_channels: the widths of the stages that are left.
    """
    config = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    if config.get("pruned"):
        raise ModelError("the UNet's layers were pruned to widths of their own: start from what it was made of.")
    if variant is not None:
        if not isinstance(config["layers_per_block"], int):
            raise ModelError("the UNet has another number of layers in each block: it can't lose one everywhere.")
        config["layers_per_block"] = 1
        if config.get("reverse_transformer_layers_per_block") is not None:
            raise ModelError("the UNet's up blocks have transformers of their own depths: not supported.")
        depth = config.get("transformer_layers_per_block", 1)
        halved = [-(-d // 2) for d in (depth if isinstance(depth, list | tuple) else [depth])]
        config["transformer_layers_per_block"] = halved if isinstance(depth, list | tuple) else halved[0]
    if variant in ("sd_small", "sd_tiny"):
        config["mid_block_type"] = None
    if variant == "sd_tiny":
        stages = len(config["down_block_types"])
        if stages < 2 or "Attn" not in config["down_block_types"][-2]:
            raise ModelError(f"sd_tiny drops the deepest of {stages} stages, and none with attention would stay.")
        if config["block_out_channels"][-1] != config["block_out_channels"][-2]:
            raise ModelError("sd_tiny drops the deepest stage, but the one above it is narrower: nothing fits.")
        for key, value in config.items():
            if isinstance(value, list | tuple) and len(value) == stages and key != "up_block_types":
                config[key] = list(value[:-1])
        config["up_block_types"] = list(config["up_block_types"][1:])
    if block_out_channels is not None:
        widths, wanted = list(config["block_out_channels"]), list(block_out_channels)
        check_widths(config, widths, wanted)
        config["block_out_channels"] = wanted
        if config.get("time_embedding_dim") is not None:
            raise ModelError("the UNet has a time_embedding_dim of its own: its widths can't be changed here.")
    return config


def read_student_config(path, revision, variant):
    """student_config of the UNet of a pipeline folder or hub id, from its config file alone. Raises ModelError."""
    config = UNet2DConditionModel.load_config(path, subfolder="unet", revision=revision)
    return student_config(empty_unet(config).config, variant)


def check_widths(config, widths, wanted):
    """Raise ModelError unless every wanted width keeps a whole number of channels of each group and head."""
    if len(wanted) != len(widths):
        raise ModelError(f"{len(wanted)} widths are given for {len(widths)} stages ({widths}).")
    group = min(widths) // config["norm_num_groups"]
    heads = config.get("num_attention_heads") or config["attention_head_dim"]
    heads = list(heads) if isinstance(heads, list | tuple) else [heads] * len(widths)
    attentions = ["Attn" in kind for kind in config["down_block_types"]]
    attentions[-1] = attentions[-1] or config.get("mid_block_type") is not None
    for width, new, head, attends in zip(widths, wanted, heads, attentions):
        fits = [width * k // group for k in range(1, group + 1)]
        fits = [w for w in fits if not attends or w % head == 0]
        if new not in fits:
            raise ModelError(f"a width of {width} can become {', '.join(map(str, fits))}, not {new}.")

    if len(set(zip(widths, wanted))) != len(set(widths)):
        raise ModelError(f"stages of one width must stay of one width: {widths} can't become {wanted}.")


def scaled_widths(widths, ratio):
    """block_out_channels times a ratio in (0, 1]: a list of ints, rounded; student_config says whether they fit."""
    return [round(width * ratio) for width in widths]


def block_sources(student, config, variant):
    """{student module name: teacher module name} of every resnet, transformer and sampler that is left.

    Of the two layers of a down block the first stays, of the three of an up block the first and the last, because the
    last one's skip connection is from the stage above.
    """
    shift, last = stages_dropped(variant), config["layers_per_block"]
    depths = config.get("transformer_layers_per_block", 1)
    stages = len(config["down_block_types"])
    depths = list(depths) if isinstance(depths, list | tuple) else [depths] * stages
    sources = {}

    def chosen(layer, teacher_depth, student_depth):
        """Evenly spaced, the first and the last included."""
        return layer if student_depth == 1 else round(layer * (teacher_depth - 1) / (student_depth - 1))

    for name, _ in student.named_modules():
        if part := _PART.fullmatch(name):
            block, index, kind, layer, deep = part.groups()
            up = block.startswith("up_blocks")
            index, layer = int(index) + (shift if up else 0), int(layer)
            source = f"{block.split('.')[0]}.{index}.{kind}.{last if up and layer and variant else layer}"
            if deep is not None:
                depth = depths[stages - 1 - index if up else index]
                layers = len(student.get_submodule(name.rpartition(".")[0]))
                source += f".transformer_blocks.{chosen(int(deep), depth, layers)}"
            sources[name] = source
        elif part := _MID_LAYER.fullmatch(name):
            layers = len(student.get_submodule(name.rpartition(".")[0]))
            sources[name] = f"{part[1]}.transformer_blocks.{chosen(int(part[2]), depths[-1], layers)}"
        elif re.fullmatch(r"up_blocks\.\d+\.upsamplers", name):
            sources[name] = f"up_blocks.{int(name.split('.')[1]) + shift}.upsamplers"
        elif name == "mid_block" or re.fullmatch(r"down_blocks\.\d+\.downsamplers", name):
            sources[name] = name
    return sources


def source_of(name, sources):
    """The teacher's name of a student's parameter or module: by its longest mapped prefix, else the same name."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in sources:
            return ".".join([sources[prefix], *parts[length:]])
    return name


def feature_pairs(student, teacher, sources, shift):
    """[[student module, teacher module], ...] that put out features of one resolution, in forward order."""
    pairs = []
    for i, block in enumerate(student.down_blocks):
        if (block.downsamplers is None) == (teacher.down_blocks[i].downsamplers is None):
            pairs.append([f"down_blocks.{i}"] * 2)
        else:  # the deepest stage that is left no longer downsamples: what comes before is compared
            kind = "attentions" if getattr(block, "attentions", None) else "resnets"
            last = len(getattr(teacher.down_blocks[i], kind)) - 1
            pairs.append([f"down_blocks.{i}.{kind}.0", f"down_blocks.{i}.{kind}.{last}"])
    if student.mid_block is not None and teacher.mid_block is not None:
        pairs.append(["mid_block"] * 2)
    return pairs + [[f"up_blocks.{i}", f"up_blocks.{i + shift}"] for i in range(len(student.up_blocks))]


def costs(teacher_config, student_config):
    """{"parameters": {"teacher": n, "student": n}, "macs": {...}} from the configs alone."""
    found = {"parameters": {}, "macs": {}}
    for name, config in (("teacher", teacher_config), ("student", student_config)):
        found["parameters"][name], found["macs"][name] = cost(config)
    return found


@torch.no_grad()
def cost(config):
    """(parameters, multiply-accumulates of one forward at the config's sample_size, batch 1) of a UNet config."""
    unet, added = empty_unet(config), None
    with torch.device("meta"):
        if unet.config.addition_embed_type == "text_time":
            pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            added = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
        size = unet.config.sample_size
        inputs = torch.zeros(1, unet.config.in_channels, size, size), torch.zeros(1)
        text = torch.zeros(1, 77, unet.config.cross_attention_dim)
        with FlopCounterMode(display=False) as counter:
            unet(*inputs, encoder_hidden_states=text, added_cond_kwargs=added)
    return sum(p.numel() for p in unet.parameters()), counter.get_total_flops() // 2


@torch.no_grad()
def slice_widths(unet, block_out_channels):
    """(narrower UNet, keep): the channels of `unet` that are worth most, at the widths `block_out_channels`.

    keep: {"indices": {name: kept channels, ascending}, "sizes": {name: how many there were}, "layers": {module: [names
    of its rows, names of its columns]}}. A layer that reads or writes a concatenation names its parts in order; None
    means all. Raises ModelError.
    """
    config = student_config(unet.config, None, block_out_channels)
    layers, sizes = channel_graph(unet, config["block_out_channels"])
    modules, state = dict(unet.named_modules()), unet.state_dict()

    scores = {name: torch.zeros(old) for name, (old, _, _) in sizes.items()}
    for layer, (rows, _) in layers.items():
        weight = modules[layer].weight.float().abs()
        if weight.dim() > 1 and rows is not None:  # norms have no say: their weights are all near 1
            for name, part in zip(rows, weight.flatten(1).sum(1).split([sizes[name][0] for name in rows])):
                scores[name] += part
    indices = {name: choose(scores[name], new, kind) for name, (_, new, kind) in sizes.items()}

    def index(names):
        """Kept positions in the concatenation of these."""
        offset, found = 0, []
        for name in names:
            found.append(indices[name] + offset)
            offset += sizes[name][0]
        return torch.cat(found)

    student, sliced = empty_unet(config), {}
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        rows, columns = layers.get(layer, (None, None))
        if rows is not None:
            value = value[index(rows)]
        if columns is not None and kind == "weight":
            value = value[:, index(columns)]
        if layer.endswith(".to_q"):  # a softmax is scaled by the size of a head: the logits keep the teacher's scale
            old, new, _ = sizes[rows[0]]
            value = value * (new / old) ** 0.5
        sliced[name] = value
    student.load_state_dict(sliced, assign=True)
    return student, {
        "indices": {name: kept.tolist() for name, kept in indices.items()},
        "sizes": {name: old for name, (old, _, _) in sizes.items()},
        "layers": {layer: list(names) for layer, names in layers.items()},
    }


def choose(scores, new, kind):
    """The `new` positions of scores (old,) to keep, ascending. `kind` says what must stay together:

    ("groups", n): as many of each of n contiguous groups; "free": any; "frequencies": those of the sinusoidal time
    embedding of width `new`, [cosines, sines] of frequencies 10000^(-i / half), which are in the wider one too.
    """
    old = len(scores)
    if kind == "free":
        return scores.topk(new).indices.sort().values
    if kind == "frequencies":
        half = torch.arange(new // 2, dtype=torch.float64) * (old // 2) / (new // 2)
        return torch.cat([half.round().long(), half.round().long() + old // 2])
    groups = kind[1]
    best = scores.view(groups, old // groups).topk(new // groups, dim=1).indices.sort(dim=1).values
    return (best + torch.arange(groups)[:, None] * (old // groups)).flatten()


def channel_graph(unet, block_out_channels):
    """Which channels each layer writes and reads: ({module: (rows, columns)}, {name: (old size, new size, kind)}).

    rows and columns: lists of names whose concatenation the layer writes or reads; None: all, as they are.
    Raises ModelError for a UNet with layers that are not known here.
    """
    config = unet.config
    for option in ("class_embed_type", "encoder_hid_dim_type", "dual_cross_attention", "only_cross_attention"):
        if config.get(option):
            raise ModelError(f"the UNet has {option} {config[option]}: its widths can't be changed here.")
    if config.resnet_time_scale_shift != "default" or config.attention_type != "default":
        raise ModelError("the UNet has other resnets or attentions than Stable Diffusion's: not supported.")
    widths, new_widths = list(config.block_out_channels), list(block_out_channels)
    group = min(widths) // config.norm_num_groups
    layers, sizes = {}, {}

    def stream(name, old, new):
        sizes[name] = (old, new, ("groups", old // group))
        return name

    def resnet(name, inputs, new):
        module = unet.get_submodule(name)
        inner = stream(f"{name}.inner", module.out_channels, new)
        if module.conv_shortcut is None:
            (output,) = inputs
        else:
            output = stream(name, module.out_channels, new)
            layers[f"{name}.conv_shortcut"] = ([output], inputs)
        layers[f"{name}.norm1"] = (inputs, None)
        layers[f"{name}.conv1"] = ([inner], inputs)
        layers[f"{name}.time_emb_proj"] = ([inner], ["time"])
        layers[f"{name}.norm2"] = ([inner], None)
        layers[f"{name}.conv2"] = ([output], [inner])
        return output

    def transformer(name, outer, new):
        module = unet.get_submodule(name)
        hidden, old = f"{name}.hidden", sizes[outer][0]
        sizes[hidden] = (old, new, "free")
        layers[f"{name}.norm"], layers[f"{name}.proj_in"] = ([outer], None), ([hidden], [outer])
        layers[f"{name}.proj_out"] = ([outer], [hidden])
        for i, block in enumerate(module.transformer_blocks):
            prefix = f"{name}.transformer_blocks.{i}"
            for norm in ("norm1", "norm2", "norm3"):
                layers[f"{prefix}.{norm}"] = ([hidden], None)
            for attention, source in (("attn1", [hidden]), ("attn2", None)):
                keys, values = f"{prefix}.{attention}.keys", f"{prefix}.{attention}.values"
                sizes[keys] = sizes[values] = (old, new, ("groups", block.attn1.heads))
                layers[f"{prefix}.{attention}.to_q"] = ([keys], [hidden])
                layers[f"{prefix}.{attention}.to_k"] = ([keys], source)
                layers[f"{prefix}.{attention}.to_v"] = ([values], source)
                layers[f"{prefix}.{attention}.to_out.0"] = ([hidden], [values])
            feed_forward = f"{prefix}.feed_forward"
            sizes[feed_forward] = (4 * old, 4 * new, "free")
            layers[f"{prefix}.ff.net.0.proj"] = ([feed_forward] * 2, [hidden])  # GEGLU: values, then their gates
            layers[f"{prefix}.ff.net.2"] = ([hidden], [feed_forward])

    old, new = widths[0], new_widths[0]
    sizes["time.frequencies"] = (old, new, "frequencies")
    for name in ("time.hidden", "time") + (("time.added",) if unet.config.addition_embed_type else ()):
        sizes[name] = (4 * old, 4 * new, "free")
    layers["time_embedding.linear_1"] = (["time.hidden"], ["time.frequencies"])
    layers["time_embedding.linear_2"] = (["time"], ["time.hidden"])
    if config.time_cond_proj_dim:
        layers["time_embedding.cond_proj"] = (["time.frequencies"], None)
    if config.addition_embed_type:
        layers["add_embedding.linear_1"] = (["time.added"], None)
        layers["add_embedding.linear_2"] = (["time"], ["time.added"])

    current = stream("conv_in", old, new)
    layers["conv_in"] = ([current], None)
    skips = [current]
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            current = resnet(f"down_blocks.{i}.resnets.{j}", [current], new_widths[i])
            if getattr(block, "attentions", None):
                transformer(f"down_blocks.{i}.attentions.{j}", current, new_widths[i])
            skips.append(current)
        if block.downsamplers is not None:
            layers[f"down_blocks.{i}.downsamplers.0.conv"] = ([current], [current])
            skips.append(current)
    if unet.mid_block is not None:
        current = resnet("mid_block.resnets.0", [current], new_widths[-1])
        for j in range(len(unet.mid_block.attentions)):
            transformer(f"mid_block.attentions.{j}", current, new_widths[-1])
            current = resnet(f"mid_block.resnets.{j + 1}", [current], new_widths[-1])
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            current = resnet(f"up_blocks.{i}.resnets.{j}", [current, skips.pop()], new_widths[-1 - i])
            if getattr(block, "attentions", None):
                transformer(f"up_blocks.{i}.attentions.{j}", current, new_widths[-1 - i])
        if block.upsamplers is not None:
            layers[f"up_blocks.{i}.upsamplers.0.conv"] = ([current], [current])
    layers["conv_norm_out"], layers["conv_out"] = ([current], None), (None, [current])
    return layers, sizes
