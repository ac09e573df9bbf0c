"""Write LoRAs and pipelines as the tools that people use read them: ComfyUI, A1111, Forge, stable-diffusion.cpp.

    kohya        a LoRA, as kohya's trainer writes it: what every tool reads
    comfyui      a LoRA by the original code's own names
    diffusers    a LoRA of either of these, or of any folder, as stock diffusers loads it, with every alpha
    single_file  a whole pipeline in one .safetensors of the original layout (a LoRA merged)
    sd_cpp       the same for BK-SDM-Tiny, whose blocks stable-diffusion.cpp counts as if none were gone

    python export.py --lora_path outputs/flash_lora/lora/final --format kohya --output_dir out/kohya
    python export.py --pretrained_model_name_or_path out/kd/final --format single_file --output_dir out/file

It says which tools read what it wrote. In --output_dir:

    <name>.safetensors   the weights (diffusers: a folder <name>/)
    <name>.json          of a few-step output, a ComfyUI workflow with its sampler, scheduler, steps and CFG
    <name>.md            the same settings in words, for A1111 and Forge; where it comes from
    <name>-config/       of a pipeline: its configs and tokenizer, for StableDiffusionPipeline.from_single_file, and
                         for --pretrained_model_name_or_path <name>.safetensors, which every script here takes
"""

import os
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

from common import arguments, lora_formats
from common.checkpoint import FinalFolder
from common.compression.lora_conversion import load_converted, lora_config, read_lora
from common.compression.planning import empty_models
from common.compression.pruned_models import NAME as PRUNED
from common.compression.quantized_folders import refuse_quantized
from common.contract import pipeline_source, read_distillation, takes_guidance, write_distillation
from common.errors import UsageError
from common.lora import WEIGHTS, check_lora_path
from common.original_layout import original_tensors
from common.pipelines import load_pipeline, read_pipeline_config
from common.run import run_script
from common.schedulers import saved_scheduler
from common.single_file import is_tiny, pipeline_folder, read_header, readers_of, save_configs
from common.workflows import files_of, in_words, name_of, settings_of, workflow, write_workflow

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    add = parser.add_argument_group("what").add_argument
    add("--lora_path", help="LoRA: a final/ folder of this repository, or any folder or .safetensors file")
    add("--pretrained_model_name_or_path", help="pipeline: folder, file or hub id; with a LoRA, what it goes on")
    add("--revision", help="revision of the hub id")
    add("--variant", help="file variant of the pipeline, such as fp16")
    formats = (*lora_formats.FORMATS, "single_file", "sd_cpp")
    add("--format", choices=formats, help="see above (default: kohya for a LoRA, single_file for a pipeline)")
    add("--dtype", choices=tuple(DTYPES), help="of the weights (default: fp16 of a pipeline, as it is of a LoRA)")
    add = parser.add_argument_group("where").add_argument
    add("--output_dir", default="outputs/export", help="folder for the files, such as ComfyUI/models/loras")
    add("--name", help="of the files (default: of the run or folder that is exported)")
    add("--overwrite", action="store_true", help="replace files of that name")
    return parser.parse_args(argv)


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work; fill in what other flags decide."""
    if not args.lora_path and not args.pretrained_model_name_or_path:
        raise UsageError("Nothing to export: give --lora_path or --pretrained_model_name_or_path.")
    args.format = args.format or ("kohya" if args.lora_path else "single_file")
    if args.format in lora_formats.FORMATS and not args.lora_path:
        raise UsageError(f"--format {args.format} is of a LoRA: add --lora_path, or take single_file.")
    args.pretrained_model_name_or_path = pipeline_folder(args.pretrained_model_name_or_path)
    args.name = args.name or name_of(args.lora_path or args.pretrained_model_name_or_path)
    if Path(args.name).name != args.name:
        raise UsageError(f"--name {args.name}: it is a name, and --output_dir says where.")
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir {folder} is a file, not a folder.")
    args.target = folder / (args.name if args.format == "diffusers" else f"{args.name}.safetensors")
    args.configs = folder / f"{args.name}-config"
    written = [args.target] + [args.configs] * (args.format not in lora_formats.FORMATS)
    there = [place for place in written if place.exists()]
    if there and not args.overwrite:
        raise UsageError(f"{there[0]} is there already: give another --name, or --overwrite.")


def read_source(args):
    """(source of the pipeline, contract of what is exported), from flags and config files alone."""
    if not args.lora_path:
        source = pipeline_source(args)
        contract = read_distillation(source["path"])
    else:
        ours = check_lora_path(args.lora_path)
        contract = read_distillation(args.lora_path) if ours else {}
        source = pipeline_source(args, contract, args.lora_path)
    read_pipeline_config(source["path"], source["revision"])
    return source, contract


def check_layout(args, models, source):
    """UsageError where no tool, nor diffusers, reads a single file of these models ({component: without weights})."""
    where = f"{args.pretrained_model_name_or_path or source['path']}: --format {args.format}:"
    pruned = [name for name, model in models.items() if type(model).__module__ == PRUNED]
    if pruned:
        raise UsageError(
            f"{where} the layers of its {pruned[0]} were pruned to widths of their own, which no tool reads: the "
            "folder itself is what opens, in diffusers; --method width and prepare_unet_small.py make what can be "
            "exported."
        )
    if takes_guidance(source["path"], source["revision"]):
        raise UsageError(f"{where} its guidance scale is an input of the UNet, which the original layout has not.")
    if args.format == "sd_cpp" and not is_tiny(models["unet"]):
        raise UsageError(f"{where} its UNet has not BK-SDM-Tiny's blocks: --format single_file is for all others.")


def write_file(path, write):
    """`write(file)` to a hidden file beside `path`, which then takes its place."""
    hidden = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(hidden)
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)


def write_diffusers_lora(folder, layers, models):
    """pytorch_lora_weights.safetensors of {"<component>.<module>": Layer}, with every alpha, as diffusers loads it."""
    kind, arguments = StableDiffusionXLPipeline if "text_encoder_2" in models else StableDiffusionPipeline, {}
    for component in models:
        own = {name.removeprefix(f"{component}."): x for name, x in layers.items() if name.startswith(f"{component}.")}
        if own:
            state = {f"{module}.lora_A.weight": layer.down.contiguous() for module, layer in own.items()}
            state |= {f"{module}.lora_B.weight": layer.up.contiguous() for module, layer in own.items()}
            arguments[f"{component}_lora_layers"] = state
            arguments[f"{component}_lora_adapter_metadata"] = lora_config(own).to_dict()
    kind.save_lora_weights(folder, **arguments)


def export_lora(args, source, contract):
    """Write the LoRA; returns ({what: text} for the page beside it, the config of its scheduler)."""
    models = empty_models(source["path"], source["revision"])
    kind = read_pipeline_config(source["path"], source["revision"])[0]
    layers = read_lora(SimpleNamespace(**models, lora_state_dict=kind.lora_state_dict), args.lora_path)
    if args.dtype:
        dtype = DTYPES[args.dtype]
        layers = {name: x._replace(down=x.down.to(dtype), up=x.up.to(dtype)) for name, x in layers.items()}
    scheduler = saved_scheduler(args.lora_path) if contract else None
    if args.format == "diffusers":
        with FinalFolder(args.target) as folder:
            write_diffusers_lora(folder, layers, models)
            if contract:
                write_distillation(folder, **contract)
                scheduler.save_pretrained(folder / "scheduler")
        written = args.target / WEIGHTS
    else:
        metadata = lora_formats.describe(layers, models, args.name, source["path"])
        if contract:
            metadata |= lora_formats.carried(contract, scheduler.config)
        write_file(args.target, lambda file: lora_formats.write_lora(file, layers, models, args.format, metadata))
        written = args.target
    arrived = read_lora(SimpleNamespace(**models, lora_state_dict=kind.lora_state_dict), written)
    if not lora_formats.same_layers(layers, arrived):
        raise RuntimeError(f"{written} was read back, and is not the LoRA that was written")
    told = {
        "made from": f"the LoRA `{args.lora_path}`, for `{source['path']}`",
        "LoRA": f"{len(layers)} layers, {lora_formats.in_words(layers)}",
        "read by": lora_formats.READERS[args.format],
    }
    return told, scheduler.config if scheduler else {}


def export_pipeline(args, source, contract):
    """Write the pipeline, its LoRA merged; returns ({what: text} for the page beside it, its scheduler's config)."""
    refuse_quantized(source["path"], source["revision"])
    check_layout(args, empty_models(source["path"], source["revision"]), source)
    pipeline = load_pipeline(**source)
    if args.lora_path:
        load_converted(pipeline, args.lora_path, source["path"], fuse=True)
        if contract:
            pipeline.scheduler = saved_scheduler(args.lora_path)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    dtype = DTYPES[args.dtype or "fp16"]
    original = original_tensors(parts, spread=args.format == "sd_cpp")
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in original.items()}
    write_file(args.target, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    found = read_header(args.target)[0]
    if {name: shape for name, (shape, _) in found.items()} != {n: tuple(t.shape) for n, t in tensors.items()}:
        raise RuntimeError(f"{args.target} was read back, and is not what was written")
    with FinalFolder(args.configs) as configs:
        save_configs(pipeline, configs)
        if contract.get("method"):
            write_distillation(configs, **contract)
    readers = readers_of(parts, args.format == "sd_cpp")
    kind = type(pipeline).__name__
    told = {
        "made from": f"`{source['path']}`" + (f" with the LoRA `{args.lora_path}` merged" if args.lora_path else ""),
        "weights": f"{args.dtype or 'fp16'}, {args.target.stat().st_size / 1e6:.0f} MB",
        "read by": ", ".join([*readers, f'diffusers: {kind}.from_single_file(file, config="{args.configs.name}")']),
    }
    return told, pipeline.scheduler.config


def write_page(args, source, contract, told, scheduler):
    """<name>.md (of a folder its README.md) and, of a few-step output, <name>.json: how it is used elsewhere."""
    settings, folder = settings_of(contract), Path(args.output_dir)
    page = [f"# {args.name}", "", "| | |", "|---|---|", *(f"| {what} | {text} |" for what, text in told.items()), ""]
    if settings and args.format != "diffusers":
        names = files_of(args.target, source["path"], args.format in lora_formats.FORMATS)
        resolution = read_pipeline_config(source["path"], source["revision"])[1] or 512
        content = workflow(settings, resolution, scheduler, **names)
        write_file(folder / f"{args.name}.json", lambda file: write_workflow(file, content))
        page += [
            f"It is for {contract['steps']} steps. A1111, Forge: {in_words(settings)}. ComfyUI: load "
            f"`{args.name}.json`, which says the same, and choose your checkpoint.",
            "",
        ]
    place = args.target / "README.md" if args.format == "diffusers" else folder / f"{args.name}.md"
    write_file(place, lambda file: file.write_text("\n".join(page)))


def main(args):
    check_arguments(args)
    source, contract = read_source(args)
    write = export_lora if args.format in lora_formats.FORMATS else export_pipeline
    told, scheduler = write(args, source, contract)
    write_page(args, source, contract, told, scheduler)
    print("\n".join(f"{what}: {text}" for what, text in told.items()))
    print(f"Done: {args.target}", flush=True)


if __name__ == "__main__":
    run_script(main, parse_args())
