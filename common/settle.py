"""Settling the arguments: fill in what shared flags leave open, refuse what can't work, before anything loads."""

import os
from pathlib import Path

import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import parse_flag_from_env

from common.arguments import ByModel
from common.cache import check_same, made_by, made_of, read_index, take_flags
from common.contract import TINY_SD, comes_from_tiny_sd
from common.engines import check_engine
from common.errors import DataError, UsageError
from common.hub import check_hub
from common.lora import settle_lora
from common.model_files import check_weights
from common.pipelines import compute_dtype, local_folder, read_pipeline_config, resolution_of
from common.single_file import pipeline_folder

LARGE = 256  # pixels per side of a model's images, from which on it is none for a laptop


def settle(args, transformers=False, needs_data=True, unsharded=None):
    """Settle what the shared flags leave open (model, data, resolution, LoRA); refuse what can't work.

    From flags and config files alone. transformers: whether pipelines without a UNet are taken too; needs_data:
    whether a model of one's own needs data of one's own; unsharded: of check_engine. Raises UsageError and ModelError.
    """
    check_hardware(args)
    if hasattr(args, "train_batch_size"):
        check_engine(args, args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION"), unsharded)
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
    take_data_of_caches(args)
    args.pretrained_model_name_or_path = pipeline_folder(args.pretrained_model_name_or_path)
    use_embedded_default(args, needs_data)
    path = Path(args.pretrained_model_name_or_path)
    if path.is_dir():  # what is written names it, and is read from elsewhere
        args.pretrained_model_name_or_path = str(path.absolute())
    teacher = args.pretrained_model_name_or_path
    _, native_resolution, factor = read_pipeline_config(teacher, args.revision, transformers=transformers)
    check_weights(teacher, args.variant, f"--pretrained_model_name_or_path {teacher}")
    args.resolution = resolution_of(args, native_resolution, f"--pretrained_model_name_or_path {teacher}")
    settle_by_model(args, native_resolution or args.resolution)
    if args.resolution % factor:
        raise UsageError(f"--resolution {args.resolution} is not a multiple of {factor}, the VAE's factor.")
    if getattr(args, "aspect_ratio_buckets", False) and args.dataset_name == "shapes":
        raise UsageError("--aspect_ratio_buckets: rendered shapes are squares: leave it out.")
    check_samples(args)
    if hasattr(args, "push_to_hub"):
        check_hub(args)  # the last: it makes a repository


def settle_by_model(args, native_resolution):
    """Defaults whose right value depends on the model, by how large its images are."""
    for name, value in vars(args).items():
        if isinstance(value, ByModel):
            large = value.large if value.lora is None or not args.lora_rank else value.lora
            setattr(args, name, value.small if native_resolution < LARGE else large)


def take_data_of_caches(args):
    """What data there are, and how they are cut, from a cache where the run's flags leave it open."""
    for flag, kind in (("cache_dir", "samples"), ("rollout_cache", "rollouts")):
        if folder := getattr(args, flag, None):
            index = read_index(folder, f"--{flag}", kind)
            take_flags(args, index, f"--{flag} {folder}")
            if int(os.environ.get("RANK", 0)) == 0:
                what = index["flags"]["data_dir"] or index["flags"]["dataset_name"]
                print(f"--{flag} {folder}: {index['count']:,} {kind} of {what}.", flush=True)


def check_samples(args):
    """DataError unless --cache_dir, where one is given, holds what this run would encode itself."""
    if not getattr(args, "cache_dir", None):
        return
    index = read_index(args.cache_dir, "--cache_dir", "samples")
    check_same("--cache_dir", args.cache_dir, index, made_of(args, local_folder(args), compute_dtype_of(args)))
    if args.random_flip and not index["flipped"] and args.dataset_name != "shapes":
        raise DataError(f"--cache_dir {args.cache_dir} has no mirrored images: make it with --random_flip.")


def check_rollouts(args, teacher, **method):
    """DataError unless --rollout_cache, where one is given, holds what this run's teacher would do.

    teacher: of contract.read_teacher; method: {name: value} of how the method rolls out, where that is not in args.
    """
    if args.rollout_refresh and not (args.rollout_cache or getattr(args, "cache_rollouts", None)):
        raise UsageError("--rollout_refresh is about roll-outs that are kept: add --rollout_cache.")
    if not args.rollout_cache:
        return
    index = read_index(args.rollout_cache, "--rollout_cache", "rollouts")
    wanted = made_by(args, local_folder(args), compute_dtype_of(args), teacher, **method)
    check_same("--rollout_cache", args.rollout_cache, index, wanted)


def compute_dtype_of(args):
    """The dtype that frozen networks compute in, by --mixed_precision here or at accelerate launch."""
    return compute_dtype(args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION"))


def check_hardware(args):
    """UsageError where a flag needs a CUDA GPU and there is none, but for --dry_run, which says what it would take."""
    if getattr(args, "dry_run", False):
        return
    # What `accelerate launch` was told reaches a script through the environment.
    cuda = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if getattr(args, "use_8bit_adam", False) and not cuda:
        raise UsageError("--use_8bit_adam needs a CUDA GPU: leave it out.")
    mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision == "fp16" and not cuda:
        raise UsageError("--mixed_precision fp16, here or at accelerate launch, needs a CUDA GPU: use bf16 or no.")


def check_tracker(args):
    """UsageError where --report_to names a tracker that isn't installed: accelerate would find out much later."""
    if not hasattr(args, "report_to"):
        return
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
