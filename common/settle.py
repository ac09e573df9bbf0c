"""Settling the arguments: fill in what shared flags leave open, refuse what can't work, before anything loads."""

import os
from pathlib import Path

import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import parse_flag_from_env

from common.contract import TINY_SD, comes_from_tiny_sd
from common.errors import UsageError
from common.hub import check_hub
from common.lora import settle_lora
from common.model_files import check_weights
from common.pipelines import read_pipeline_config, resolution_of
from common.single_file import pipeline_folder


def settle(args, transformers=False, needs_data=True):
    """Settle what the shared flags leave open (model, data, resolution, LoRA); refuse what can't work.

    From flags and config files alone. transformers: whether pipelines without a UNet are taken too; needs_data:
    whether a model of one's own needs data of one's own. Raises UsageError and ModelError.
    """
    check_hardware(args)
    check_tracker(args)
    if hasattr(args, "lora_rank"):
        settle_lora(args)
    if getattr(args, "timestep_probs", None) and len(args.timestep_probs) != args.num_inference_steps:
        raise UsageError(
            f"--timestep_probs has {len(args.timestep_probs)} numbers; the student has "
            f"--num_inference_steps {args.num_inference_steps}."
        )
    for name in ("lpips_trunk_path", "inception_path"):
        file = getattr(args, name, None)
        if file not in (None, "download") and not Path(file).is_file():
            raise UsageError(f"--{name} {file}: there is no such file ('download' fetches the weights).")
    args.pretrained_model_name_or_path = pipeline_folder(args.pretrained_model_name_or_path)
    use_embedded_default(args, needs_data)
    path = Path(args.pretrained_model_name_or_path)
    if path.is_dir():  # what is written names it, and is read from elsewhere
        args.pretrained_model_name_or_path = str(path.absolute())
    teacher = args.pretrained_model_name_or_path
    _, native_resolution, factor = read_pipeline_config(teacher, args.revision, transformers=transformers)
    check_weights(teacher, args.variant, f"--pretrained_model_name_or_path {teacher}")
    args.resolution = resolution_of(args, native_resolution, f"--pretrained_model_name_or_path {teacher}")
    if args.resolution % factor:
        raise UsageError(f"--resolution {args.resolution} is not a multiple of {factor}, the VAE's factor.")
    check_hub(args)  # the last: it makes a repository


def check_hardware(args):
    """UsageError where a flag needs a CUDA GPU and there is none, but for --dry_run, which says what it would take."""
    if getattr(args, "dry_run", False):
        return
    # What `accelerate launch` was told reaches a script through the environment.
    cuda = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if args.use_8bit_adam and not cuda:
        raise UsageError("--use_8bit_adam needs a CUDA GPU: leave it out.")
    mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision == "fp16" and not cuda:
        raise UsageError("--mixed_precision fp16, here or at accelerate launch, needs a CUDA GPU: use bf16 or no.")


def check_tracker(args):
    """UsageError where --report_to names a tracker that isn't installed: accelerate would find out much later."""
    available = [str(tracker.value) for tracker in get_available_trackers()]
    if args.report_to not in ("none", "all", *available):
        raise UsageError(
            f"--report_to {args.report_to}: not installed; there is {', '.join(available)}, all and none."
        )


def use_embedded_default(args, needs_data=True):
    """With no model and no data: tiny-sd and shapes, said in one line. With a foreign model alone: UsageError."""
    takes_data, said = hasattr(args, "data_dir"), None
    no_data = takes_data and args.data_dir is None and args.dataset_name is None
    if args.pretrained_model_name_or_path is None:
        args.pretrained_model_name_or_path = str(TINY_SD)
        if no_data:
            args.dataset_name = "shapes"
            said = "No model and no data given: using the embedded assets/tiny-sd and rendered shapes."
        elif not takes_data or args.dataset_name != "shapes":
            said = f"No --pretrained_model_name_or_path: the teacher is the embedded {TINY_SD.name}."
    elif no_data and comes_from_tiny_sd(args.pretrained_model_name_or_path):
        args.dataset_name = "shapes"
        said = "No data given, and the model was made from tiny-sd: using rendered shapes."
    elif no_data and needs_data:
        raise UsageError(
            "--pretrained_model_name_or_path is given but no data: add --data_dir or --dataset_name "
            "(--dataset_name shapes asks for rendered shapes)."
        )
    if said and int(os.environ.get("RANK", 0)) == 0:
        print(said, flush=True)
