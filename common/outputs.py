"""Outputs: a student as a pipeline folder or a LoRA, with its contract and model card, exported, and reopened.

Nothing is called done before it was reopened from disk and compared with what is in memory.
"""

import json
import re
import shlex
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open

from common.checkpoint import FinalFolder
from common.compression import pruned_models
from common.compression.manifest import MANIFEST, write_manifest
from common.compression.quantization import DTYPE, covered_notes, quantize_pipeline, stored_tensors
from common.contract import CONTRACT, STEPS, parent_source, read_distillation, write_distillation
from common.engines import whole
from common.lora import WEIGHTS, is_hub_id, merge_lora, save_lora
from common.pipelines import load_pipeline
from common.schedulers import saved_scheduler
from common.workflows import WORKFLOW, elsewhere, files_of, settings_of, workflow, write_workflow

_OUTPUT = re.compile(r"final(-\w+)?|best")  # what runs call that which is for use


def save_student(run, parts, scheduler, contract, title, notes, name="final", source=None, manifest=None):
    """<run>/<name>/: the student with its scheduler, distillation.json and model card, by the main process.

    parts: {component: module} of what was trained, holding the weights that are to be saved; a UNet with adapters
    is saved as a LoRA. The other components come from disk, not rounded: from `source`, a folder, or else the teacher
    that the contract names. notes: {name: value}, of the card; manifest: compression.json of a smaller student.
    """
    parts = {component: whole(run, module, device="cpu") for component, module in parts.items()}
    if run.accelerator.is_main_process:
        folder = (run.folder / name).absolute()
        load = {} if source else {"revision": contract["revision"], "variant": contract["variant"]}
        pipeline = load_pipeline(source or contract["parent"], **load)
        pipeline.register_modules(**parts)
        pipeline.scheduler, lora = scheduler, bool(getattr(parts.get("unet"), "peft_config", None))
        with FinalFolder(folder) as final:
            if lora:
                save_lora(final, pipeline)
                scheduler.save_pretrained(final / "scheduler")
            else:
                pipeline.save_pretrained(final)
            write_distillation(final, **contract)
            if manifest:
                write_manifest(final, manifest)
            elif not lora:
                carry_manifest([source or contract["parent"]], final)
            settings = None if is_pruned(pipeline) else settings_of(contract)  # a pruned one no other tool reads
            if settings:
                names = files_of(folder, contract["parent"], lora)
                write_workflow(final / WORKFLOW, workflow(settings, run.args.resolution, scheduler.config, **names))
                notes = {**notes, "elsewhere": elsewhere(settings, folder, lora)}
            usage = usage_of(contract, folder, scheduler if lora else None, pruned=is_pruned(pipeline))
            if contract["steps"]:
                notes = {**notes, "steps": f"{contract['steps']}, at timesteps {contract['timesteps']}"}
            if lora:
                config, targets = pipeline.unet.peft_config["default"], ", ".join(run.args.lora_targets)
                notes = {**notes, "LoRA": f"rank {config.r}, alpha {config.lora_alpha:g}, on {targets}"}
            notes = {**notes, "optimizer steps": run.step}
            write_model_card(final, title, contract["parent"], usage, notes, lora)
            reopen(final, pipeline, lora)
    run.accelerator.wait_for_everyone()


def export(run, name="final", backend="torchao", skip=(), activations=False):
    """<run>/final-<kind>/ of each kind of --export, fp16, int8 or fp8: final/ as a whole pipeline, a LoRA merged.

    backend, skip: of quantize_pipeline, for int8; activations: for fp8.
    """
    for kind in (run.args.export or ()) if run.accelerator.is_main_process else ():
        final = (run.folder / name).absolute()
        notes = {"made from": f"`{final}`, whose card says how it was trained"}
        if (final / WEIGHTS).is_file():
            notes["LoRA"] = "merged into the weights: no adapter is needed"
        options = {"backend": backend, "skip": skip} if kind == "int8" else {}
        options |= {"activations": activations} if kind == "fp8" else {}
        export_pipeline(open_output(final), final, run.folder / f"{name}-{kind}", kind, notes, **options)
    run.accelerator.wait_for_everyone()


def export_pipeline(pipeline, source, folder, kind, notes, backend="torchao", skip=(), activations=False):
    """`folder`: a pipeline in `kind`, of --export, with its own card, and `source`'s contract and manifest.

    pipeline: in fp32, rounded here, in place; notes: {name: value}, of the card; the rest: of quantize_pipeline.
    """
    folder, contract = Path(folder).absolute(), read_distillation(source)
    if kind in ("int8", "fp8"):
        quantize_pipeline(pipeline, backend, skip, kind, activations)
        title, dtype = f"The same with {kind.upper()} weights", DTYPE
        notes = {**notes, **covered_notes(pipeline, backend, kind, activations)}
    else:
        title, dtype = "The same in half precision", torch.float16
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                torch.nn.Module.to(module, dtype)  # diffusers' own warns of layers to keep in fp32, even of none
    with FinalFolder(folder) as exported:
        pipeline.save_pretrained(exported)
        if (Path(source) / CONTRACT).is_file():
            shutil.copy(Path(source) / CONTRACT, exported)
        carry_manifest([source, contract.get("parent", source)], exported)  # of a merged LoRA: its pipeline's
        usage = usage_of(contract, folder, dtype=dtype, pruned=is_pruned(pipeline))
        write_model_card(exported, title, contract.get("parent", source), usage, notes)
        reopen(exported, pipeline)


def carry_manifest(sources, folder):
    """Copy the first compression.json that the folders `sources` have, if any: what was cut before stays cut."""
    found = [Path(source) / MANIFEST for source in sources if (Path(source) / MANIFEST).is_file()]
    if found:
        shutil.copy(found[0], folder)


def find_outputs(folder):
    """Paths, sorted, of the outputs anywhere in a folder: pipelines, and LoRAs with their contract; no checkpoints."""
    found = []
    for path in sorted(Path(folder).rglob("*/")):
        named = _OUTPUT.fullmatch(path.name) and not any(part.startswith("checkpoint-") for part in path.parts)
        pipeline = (path / "model_index.json").is_file()
        if named and (pipeline or ((path / WEIGHTS).is_file() and (path / CONTRACT).is_file())):
            found.append(str(path))
    return found


def open_output(folder):
    """The pipeline in fp32 of an output of this repository, a LoRA merged into the one it was made from."""
    if not (Path(folder) / WEIGHTS).is_file():
        return load_pipeline(folder)
    pipeline = load_pipeline(**parent_source(read_distillation(folder), folder))
    merge_lora(pipeline, folder)
    pipeline.scheduler = saved_scheduler(folder)
    return pipeline


def reopen(folder, pipeline, lora=False):
    """Raise RuntimeError unless `folder` holds what is in memory: every tensor, scheduler and a LoRA's alpha.

    From the files alone: names, shapes and dtypes of what the pipeline's models hold, without loading them.
    """
    if lora:
        expected = {f"unet.{name}": value for name, value in get_peft_model_state_dict(pipeline.unet).items()}
        with safe_open(folder / WEIGHTS, "pt") as file:
            config = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        alpha = pipeline.unet.peft_config["default"].lora_alpha
        if config.get("unet.lora_alpha") != alpha:
            raise RuntimeError(f"{folder / WEIGHTS} was written without the LoRA's alpha, {alpha}")
        _compare(folder / WEIGHTS, {WEIGHTS: folder / WEIGHTS}, expected)
    else:
        for name, module in pipeline.components.items():
            if isinstance(module, torch.nn.Module):
                files = {file.name: file for file in (folder / name).glob("*.safetensors")}
                _compare(folder / name, files, stored_tensors(module))
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    if scheduler["_class_name"] != type(pipeline.scheduler).__name__:
        raise RuntimeError(f"{folder} holds a {scheduler['_class_name']}, not a {type(pipeline.scheduler).__name__}")
    read_distillation(folder)


def _compare(where, files, expected):
    """Raise RuntimeError unless these safetensors files hold the tensors of a state dict: names, shapes, dtypes."""
    found = {}
    for path in files.values():
        with safe_open(path, "pt") as file:
            found.update({name: file.get_slice(name) for name in file.keys()})
    # transformers leaves out what it makes anew; tied weights are stored once.
    stored = {value.data_ptr() for name, value in expected.items() if name in found}
    absent = [name for name in expected if name not in found and not name.endswith("position_ids")]
    missing = [name for name in absent if expected[name].data_ptr() not in stored]
    dtypes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8"}
    dtypes[torch.float8_e4m3fn] = "F8_E4M3"
    wrong = [
        name
        for name, value in expected.items()
        if name in found
        and (
            list(value.shape) != found[name].get_shape()
            or dtypes.get(value.dtype) not in (None, found[name].get_dtype())
        )
    ]
    if missing or wrong or found.keys() - expected.keys():
        name = [*missing, *wrong, *(found.keys() - expected.keys())][0]
        raise RuntimeError(f"{where} was written without what is in memory: {name} differs or is missing")


def is_pruned(pipeline):
    """Whether a part of a pipeline is of a class whose code lies beside its weights."""
    return any(type(part).__module__ == pruned_models.NAME for part in pipeline.components.values())


def usage_of(contract, folder, lora_scheduler=None, dtype=torch.float32, pruned=False):
    """Code, for the card, that makes an image with the output in `folder`: as it is sampled, whatever the machine.

    It names a dtype: transformers keeps the one that was saved and diffusers does not, so that without it parts of
    one pipeline may differ. lora_scheduler: of a LoRA, which goes on the pipeline that the contract names. pruned: see
    is_pruned.
    """
    name = type(lora_scheduler).__name__
    where = [f'"{folder}"']
    if lora_scheduler is not None:
        where = [f'"{contract["parent"]}"']
        where += [f'{key}="{contract[key]}"' for key in ("revision", "variant") if contract.get(key)]
    steps = contract.get("steps") or STEPS
    lines = [
        "import torch",
        f"from diffusers import DiffusionPipeline{'' if lora_scheduler is None else f', {name}'}",
        "",
    ]
    where.append(f"dtype={dtype}")
    if pruned:
        lines.append("# pruned_models.py, beside the weights, is the code of the pruned parts.")
        where.append("trust_remote_code=True")
    lines.append(f"pipe = DiffusionPipeline.from_pretrained({', '.join(where)})")
    if lora_scheduler is not None:
        lines += [
            f'pipe.load_lora_weights("{folder}")',
            f'pipe.scheduler = {name}.from_pretrained("{folder}", subfolder="scheduler")',
        ]
    call = f"num_inference_steps={steps}, guidance_scale={contract['guidance_scale']:g}"
    return "\n".join([*lines, f'image = pipe("a prompt", {call}).images[0]'])


def write_model_card(folder, title, base_model, usage, notes, lora=False):
    """README.md of an output: base model, code, notes ({name: value}), command line, versions."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft")
    lines = [
        "---",
        *([f"base_model: {base_model}"] if is_hub_id(base_model) else ()),  # the hub takes nothing else
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "tags: [diffusers, text-to-image, distillation" + (", lora]" if lora else "]"),
        "---",
        "",
        f"# {title}",
        "",
        "```python",
        usage.strip(),
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in {"base model": f"`{base_model}`", **notes}.items()),
        "",
        "Made by:",
        "",
        "```",
        shlex.join(["accelerate", "launch", *sys.argv]),
        "```",
        "",
        "with " + ", ".join(f"{name} {version(name)}" for name in packages) + ".",
        "",
    ]
    (Path(folder) / "README.md").write_text("\n".join(lines))
