"""What is to be pruned of a pipeline: decided from flags and config files, before any model loads."""

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

from common.compression.channels import COMPONENTS, KINDS, cost_of_unit, count, groups_of, units_kept
from common.compression.quantization import layers_of
from common.errors import UsageError
from common.pipelines import component_class

# What goes of each component where no ratio is given.
DEFAULTS = {"unet": 0.3, "transformer": 0.3, "text_encoder": 0.25, "vae": 0.2}
OF_METHOD = {"structured": ("conv", "feed_forward"), "heads": ("attention",), "magnitude": KINDS, "width": ("conv",)}


def empty_models(path, revision=None):
    """{component: model without memory for its weights} of a pipeline's COMPONENTS, from its config files alone."""
    index, found = DiffusionPipeline.load_config(path, revision=revision), {}
    options = {"revision": revision}
    for name in COMPONENTS:
        library, kind = index.get(name) or (None, None)
        if kind is None:
            continue
        stock = transformers if library == "transformers" else diffusers
        cls = component_class(path, name, revision) or getattr(stock, kind)
        with torch.device("meta"):
            if issubclass(cls, transformers.PreTrainedModel):
                found[name] = cls(cls.config_class.from_pretrained(path, subfolder=name, **options))
            else:
                found[name] = cls.from_config(cls.load_config(path, subfolder=name, **options))
    return found


def flag_of(component):
    return f"--{component.removesuffix('_2')}_prune_ratio"


def plan_ratios(args, models):
    """{component: {kind: ratio}} of what is to go, by the flags; models: of `empty_models`. Raises UsageError.

    --attention_ratio, --feed_forward_ratio and --conv_ratio are of the UNet or transformer, and go before its own;
    where nothing at all is given, DEFAULTS are taken.
    """
    where = args.pretrained_model_name_or_path
    ratios = {name: getattr(args, f"{name}_prune_ratio") for name in DEFAULTS}
    by_kind = {kind: getattr(args, f"{kind}_ratio") for kind in KINDS}
    denoiser, given = "unet" if "unet" in models else "transformer", [r for r in ratios.values() if r is not None]
    if args.method not in ("structured", "heads"):
        for kind in [kind for kind, ratio in by_kind.items() if ratio is not None]:
            raise UsageError(f"--{kind}_ratio is about --method structured and heads, not {args.method}.")
    for name, ratio in ratios.items():
        if ratio is not None and name not in models:
            raise UsageError(f"{flag_of(name)}: {where} has no {name}.")
        if ratio and args.method == "width" and name != "unet":
            raise UsageError(f"{flag_of(name)}: --method width makes the UNet alone narrower.")
    if not given and all(ratio is None for ratio in by_kind.values()):
        ratios = DEFAULTS if args.method != "width" else {"unet": DEFAULTS["unet"]}
    planned = {}
    for component, model in models.items():
        name = component.removesuffix("_2")
        kinds = {kind: ratios.get(name) or 0.0 for kind in OF_METHOD[args.method]}
        if component == denoiser:
            kinds.update({kind: ratio for kind, ratio in by_kind.items() if ratio is not None})
        groups = [group for group in groups_of(model) if kinds.get(group.kind)]
        if ratios.get(name) and not groups and given and component != "text_encoder_2":
            kind = " or ".join(OF_METHOD[args.method]).replace("_", "-")
            raise UsageError(f"{flag_of(name)}: the {component} of {where} has no {kind} layers that can be pruned.")
        if groups:
            planned[component] = {kind: ratio for kind, ratio in kinds.items() if ratio}
        for group in groups:
            if args.method in ("structured", "heads") and round(group.units * (1 - kinds[group.kind])) < 1:
                flag = flag_of(name)
                if component == denoiser and by_kind.get(group.kind) is not None:
                    flag = f"--{group.kind}_ratio"
                ratio = kinds[group.kind]
                raise UsageError(f"{flag} {ratio:g} leaves nothing of {group.name}, which has {group.units} units.")
    return planned


def planned_cut(models, planned):
    """How many parameters go of each component, {component: n}, where every group loses the ratio of its kind."""
    return {
        component: sum(
            cost_of_unit(models[component], group)
            * (group.units - units_kept(group, planned[component].get(group.kind, 0)))
            for group in groups_of(models[component])
        )
        for component in planned
    }


def plan_budget(args, models, planned):
    """How many parameters go in all, {component: n} or {"all": n} of all planned components. Raises UsageError."""
    if not (args.target_bytes or args.target_parameters):
        return planned_cut(models, planned)
    total = sum(count(models[component]) for component in planned)
    linear = sum(
        models[component].get_submodule(name).weight.numel()
        for component in planned
        for name in layers_of(models[component], kind="fp8")
    )
    sizes = {"fp16": 2, "int8": 1, "fp8": 2 - linear / max(total, 1)}
    return {"all": target_cut(args, models, planned, min((sizes[kind] for kind in args.export or ()), default=4))}


def target_cut(args, models, planned, bytes_per_parameter):
    """How many parameters go of all planned components together, by --target_parameters or --target_bytes.

    Raises UsageError where they are as small already, or where that is more than can go.
    """
    flag = "--target_bytes" if args.target_bytes else "--target_parameters"
    kind, value = args.target_bytes or args.target_parameters
    total = sum(p.numel() for component in planned for p in models[component].parameters())
    if kind == "share":
        left = value * total
    else:
        left = value / bytes_per_parameter if args.target_bytes else value
    if left >= total:
        raise UsageError(f"{flag}: {' and '.join(planned)} have {total:,} parameters, which is no more than that.")
    most = {c: {kind: 0.8 for kind in kinds} for c, kinds in planned.items()}
    if total - left > (least := sum(planned_cut(models, most).values())):
        raise UsageError(f"{flag}: of {total:,} parameters in {' and '.join(planned)} at most {least:,} can go.")
    return int(total - left)


def narrower(config, ratio):
    """block_out_channels of a UNet with this config that is about 1 - ratio times as wide: as many of every group."""
    widths = config["block_out_channels"]
    group = min(widths) // config["norm_num_groups"]
    return [width * max(round(group * (1 - ratio)), 1) // group for width in widths]
