"""distillation.json, the contract of an output: what it was made of, and at which steps and guidance it is sampled.

{method, parent, revision, variant, steps, timesteps, guidance, guidance_scale, target}; guidance is "cfg" (two passes
at guidance_scale), "baked" (one pass, scale 1) or "embedded" (one pass, the scale an input). A pipeline without the
file is an ordinary teacher: "cfg".
"""

import functools
import json
from pathlib import Path

from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open

from common.errors import ModelError, UsageError, first_line

TINY_SD = Path(__file__).resolve().parent.parent / "assets" / "tiny-sd"
CONTRACT = "distillation.json"
STEPS = 50  # that an output is sampled in which is for no number of steps of its own
_ALREADY = {
    "baked": "its guidance is baked into its weights already",
    "embedded": "its guidance scale is an input of its UNet already",
}


def read_distillation(path):
    """The distillation.json beside a pipeline or LoRA, or in one file's header; without one an ordinary teacher.

    Raises ModelError where it is there and can't be read.
    """
    file = Path(path) / CONTRACT
    carried = file_metadata(path).get("distillation")
    if not file.is_file() and carried is None:
        return {"guidance": "cfg", "guidance_scale": ordinary_guidance(str(path))}
    try:
        contract = json.loads(carried or file.read_text())
        return {**contract, "guidance": contract["guidance"], "guidance_scale": float(contract["guidance_scale"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} can't be read ({type(error).__name__}: {first_line(error)}).") from None


@functools.lru_cache
def ordinary_guidance(path):
    """The guidance scale of an ordinary teacher: 5 of SDXL's class, as its stock pipeline has it, else 7.5."""
    try:
        folder = Path(path)
        if not folder.suffix and (not folder.exists() or (folder / "model_index.json").is_file()):
            return 5.0 if DiffusionPipeline.load_config(path)["_class_name"].startswith("StableDiffusionXL") else 7.5
    except (OSError, ValueError, KeyError):  # no pipeline, or none that is here
        pass
    return 7.5


def file_metadata(path):
    """{name: text} in the header of one .safetensors file; {} for anything else, and for one that can't be read."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def make_contract(args, method, target, steps=None, timesteps=None, guidance="baked", guidance_scale=1.0):
    """The contract of a student of --pretrained_model_name_or_path; see the top of this file."""
    origin = {"parent": args.pretrained_model_name_or_path, "revision": args.revision, "variant": args.variant}
    sampling = {"steps": steps, "timesteps": timesteps, "guidance": guidance, "guidance_scale": guidance_scale}
    return {"method": method, **origin, **sampling, "target": target}


def write_distillation(folder, **contract):
    (Path(folder) / CONTRACT).write_text(json.dumps(contract, indent=2) + "\n")


def read_teacher(args, guidance=("cfg", "baked"), few_steps=False, hint=""):
    """The contract of --pretrained_model_name_or_path as a teacher, its guidance_scale the one to train with.

    guidance: the kinds that the script can use; few_steps: whether it keeps to a few-step teacher's own timesteps, and
    hint: what else is said of one where it does not. The scale is --guidance_scale where the script has the flag and
    it is given, else what was saved, else its class's (ordinary_guidance); 1 where guidance is baked in. From files
    alone. Raises UsageError.
    """
    path = args.pretrained_model_name_or_path
    where, contract = f"--pretrained_model_name_or_path {path}", read_distillation(path)
    contract = {"steps": None, "timesteps": None, "target": None, **contract}
    given = getattr(args, "guidance_scale", None)
    if takes_guidance(path, args.revision):
        contract["guidance"] = "embedded"
    kind = contract["guidance"]
    if kind not in guidance:
        raise UsageError(
            f"{where}: {_ALREADY[kind]}, which this script can't use: start from the model it was made of."
        )
    if contract["timesteps"] and not few_steps:
        raise UsageError(
            f"{where}: it is for {len(contract['timesteps'])} steps, at timesteps of its own, and knows "
            f"no others: start from the model it was made of{hint}."
        )
    if kind == "baked" and given not in (None, 1):
        raise UsageError(f"--guidance_scale {given:g}: {_ALREADY[kind]}: leave the flag out.")
    if kind == "baked":
        return {**contract, "guidance_scale": 1.0}
    return contract if given is None else {**contract, "guidance_scale": given}


def takes_guidance(path, revision=None):
    """Whether a pipeline's UNet has its guidance scale as an input, whoever made it. From config files alone."""
    unet = UNet2DConditionModel.load_config(path, subfolder="unet", revision=revision)
    return unet.get("time_cond_proj_dim") is not None


def comes_from_tiny_sd(path):
    """Whether a pipeline is the embedded tiny-sd, or was made from it at some remove."""
    ancestors = [path]
    while (parent := read_distillation(ancestors[-1]).get("parent")) and parent not in ancestors:
        ancestors.append(parent)
    return any(is_tiny_sd(ancestor) for ancestor in ancestors)


def is_tiny_sd(path):
    """Whether a path is assets/tiny-sd of this checkout or of another one (segmind/tiny-sd, on the hub, is not)."""
    return Path(path).parts[-2:] == TINY_SD.parts[-2:]


def pipeline_source(args, contract=None, of=None):
    """{"path", "revision", "variant"}, for load_pipeline, of the pipeline that an output of `contract` goes with.

    By --pretrained_model_name_or_path, --revision and --variant where they are given, else what the contract of the
    folder `of` recorded, else the embedded tiny-sd. Raises UsageError where what was recorded is not here.
    """
    if args.pretrained_model_name_or_path or not contract:
        path = args.pretrained_model_name_or_path or str(TINY_SD)
        return {"path": path, "revision": args.revision, "variant": args.variant}
    parent = parent_source(contract, of)
    return {**parent, **{name: getattr(args, name) for name in ("revision", "variant") if getattr(args, name)}}


def parent_source(contract, of):
    """The source of the pipeline that the output in folder `of` was made from; tiny-sd is this checkout's."""
    parent = str(contract.get("parent"))
    if not Path(parent).exists() and is_tiny_sd(parent):
        parent = str(TINY_SD)
    if not Path(parent).exists() and (Path(parent).is_absolute() or parent.count("/") != 1):
        raise UsageError(f"{of} was made from {parent}, which is not here: give --pretrained_model_name_or_path.")
    return {"path": parent, "revision": contract.get("revision"), "variant": contract.get("variant")}


def sampling_guidance(contract, given, flag, outside=False):
    """(guidance_scale of the pipeline call, where it comes from) for weights with this contract.

    given: the value of `flag`, or None; outside: a LoRA that came without a contract. Raises UsageError.
    """
    if outside:
        scale = 1.0 if given is None else given
        return scale, f"{scale:g}, from {flag}" if given is not None else "1, the default for an outside LoRA"
    if contract["guidance"] == "baked":
        if given is not None and given > 1:
            raise UsageError(f"{flag} {given:g}: these weights have guidance baked in and would be guided twice.")
        return 1.0, "baked into the weights, so guidance_scale 1 and one UNet pass a step"
    scale = contract.get("guidance_scale", 7.5) if given is None else given
    kind = "an input of the model, one pass a step" if contract["guidance"] == "embedded" else "classifier-free"
    return scale, f"{scale:g} ({kind}), " + ("as saved, or 7.5" if given is None else f"from {flag}")
