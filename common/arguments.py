"""The shared argument groups: names, defaults and help of every flag that more than one script has."""

import argparse
import math
import os
import sys

from accelerate.tracking import get_available_trackers

from common.checkpoint import CheckpointError
from common.data import DataError
from common.models import TINY_SD, ModelError, comes_from_tiny_sd


class UsageError(ValueError):
    """A combination of arguments that can't work, in one sentence."""


# Arguments that may differ between a run and its continuation: where, how long, how fast, how much is shown.
# What decides the global batch is compared as one number.
FREE_ON_RESUME = {
    "output_dir", "run_name", "overwrite_output_dir", "max_train_steps", "resume_from_checkpoint",
    "checkpointing_steps", "checkpoints_total_limit", "train_batch_size", "gradient_accumulation_steps",
    "dataloader_num_workers", "validation_prompts", "validation_steps", "num_validation_images", "report_to",
    "export", "gradient_checkpointing", "torch_compile", "allow_tf32", "eval_steps", "teacher_cpu_offload",
    "max_skipped_updates",
}  # fmt: skip


def make_parser(docstring):
    return argparse.ArgumentParser(
        description=docstring, formatter_class=_HelpFormatter, allow_abbrev=False, argument_default=None
    )


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows each default behind its help, and keeps the docstring's lines."""

    def _get_help_string(self, action):
        if action.default in (None, False, argparse.SUPPRESS) or not action.option_strings:
            return action.help
        return f"{action.help} (default: %(default)s)"


def positive_int(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def natural(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def positive_float(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def weight(text):
    return 0.0 if float(text) == 0 else positive_float(text)


def fraction(text):
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def add_model_arguments(parser):
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--pretrained_model_name_or_path", help="teacher pipeline: folder or hub id (default: the embedded tiny-sd)")
    add("--revision", help="revision of the hub id")
    add("--variant", help="file variant of the pipeline, such as fp16")
    return group


def add_data_arguments(parser):
    group = parser.add_argument_group("data (with no model and no data given: rendered shapes)")
    add = group.add_argument
    add("--data_dir", help="COCO, imagefolder, webdataset .tar, parquet, captions.json, or images with .txt captions")
    add("--dataset_name", help="hub id or folder of a `datasets` set, or 'shapes' for rendered shapes")
    add("--image_column", help="image column (default: the first that looks like one)")
    add("--caption_column", help="caption column (default: the first that looks like one)")
    add("--caption_template", default="a photo of a {label}", help="caption of a class-label set")
    add("--resolution", type=positive_int, help="pixels per side (default: the model's own)")
    add("--center_crop", action="store_true", help="crop the middle instead of a random part")
    add("--random_flip", action="store_true", help="mirror half of the images")
    add("--max_train_samples", type=positive_int, help="use only the first so many samples")
    add("--dataloader_num_workers", type=natural, default=0, help="processes that load images, per rank")
    return group


def add_optimization_arguments(parser, *, learning_rate, train_batch_size, max_train_steps):
    """max_train_steps: the flag's default; None where a script has other flags for the length, and no such one."""
    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--train_batch_size", "--batch_size", type=positive_int, default=train_batch_size,
        help="samples per process and micro-batch")  # fmt: skip
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="micro-batches per optimizer step")
    if max_train_steps is not None:
        add("--max_train_steps", "--max_steps", type=positive_int, default=max_train_steps,
            help="optimizer steps in all")  # fmt: skip
    add("--learning_rate", type=positive_float, default=learning_rate, help="peak learning rate")
    add("--lr_scheduler", choices=("constant", "linear", "cosine", "one_cycle"), default="constant",
        help="after the warm-up: constant, or down to 0 at --max_train_steps; one_cycle: up from 1/25 along a cosine "
             "for the warm-up, then down to 1/250000 along another")  # fmt: skip
    add("--lr_warmup_steps", type=natural, default=0,
        help="steps of linear warm-up (one_cycle: of its rise, 0 being 30 %% of the run)")  # fmt: skip
    add("--adam_beta1", type=fraction, default=0.9, help="AdamW")
    add("--adam_beta2", type=fraction, default=0.999, help="AdamW")
    add("--adam_weight_decay", type=fraction, default=0.0, help="AdamW")
    add("--adam_epsilon", type=positive_float, default=1e-8, help="AdamW")
    add("--max_grad_norm", type=positive_float, default=1.0, help="gradient norm is clipped to this")
    add("--use_8bit_adam", action="store_true", help="bitsandbytes' AdamW8bit: saves memory (CUDA)")
    add("--ema_decay", type=fraction, default=0.999, help="average of the weights, which final/ holds")
    return group


def add_checkpoint_arguments(parser, *, output_dir):
    group = parser.add_argument_group("checkpoints")
    add = group.add_argument
    add("--output_dir", default=output_dir, help="where runs are written")
    add("--run_name", help="sub-folder of --output_dir for this run")
    add("--checkpointing_steps", type=positive_int, default=500, help="save checkpoint-N every so many steps")
    add("--checkpoints_total_limit", type=positive_int, help="keep only the newest so many (default: all)")
    add("--resume_from_checkpoint", help="'latest', checkpoint-N or a path")
    add("--overwrite_output_dir", action="store_true", help="discard the run that the folder holds")
    return group


def add_validation_arguments(parser):
    group = parser.add_argument_group("validation and logging")
    add = group.add_argument
    add("--validation_prompts", nargs="+", help="prompts sampled during training (default: none)")
    add("--validation_steps", type=positive_int, default=100, help="sample every so many steps")
    add("--num_validation_images", type=positive_int, default=4, help="images per prompt")
    add("--report_to", default="tensorboard", help="tracker: tensorboard, wandb, ..., all, or none")
    return group


def add_runtime_arguments(parser):
    group = parser.add_argument_group("runtime")
    add = group.add_argument
    add("--seed", type=natural, default=0, help="everything random derives from it")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's configuration")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--torch_compile", action="store_true", help="compile the UNet")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later")
    add("--export", choices=("fp16",), help="also write final-fp16/, a whole pipeline with the student in it")
    return group


def use_embedded_default(args):
    """With no model and no data: tiny-sd and shapes, said in one line. With a foreign model alone: UsageError."""
    no_data = args.data_dir is None and args.dataset_name is None
    if args.pretrained_model_name_or_path is None:
        if not no_data and args.dataset_name != "shapes":
            print(f"No --pretrained_model_name_or_path: the teacher is the embedded {TINY_SD.name}.", flush=True)
        args.pretrained_model_name_or_path = str(TINY_SD)
        if no_data:
            args.dataset_name = "shapes"
            if int(os.environ.get("RANK", 0)) == 0:
                print("No model and no data given: using the embedded assets/tiny-sd and rendered shapes.", flush=True)
    elif no_data and comes_from_tiny_sd(args.pretrained_model_name_or_path):
        args.dataset_name = "shapes"
        if int(os.environ.get("RANK", 0)) == 0:
            print("No data given, and the model was made from tiny-sd: using rendered shapes.", flush=True)
    elif no_data:
        raise UsageError(
            "--pretrained_model_name_or_path is given but no data: add --data_dir or --dataset_name "
            "(--dataset_name shapes asks for rendered shapes)."
        )


def check_tracker(args):
    """UsageError where --report_to names a tracker that isn't installed: accelerate would find out much later."""
    available = [str(tracker.value) for tracker in get_available_trackers()]
    if args.report_to not in ("none", "all", *available):
        raise UsageError(
            f"--report_to {args.report_to}: not installed; there is {', '.join(available)}, all and none."
        )


def learning_rate_at(step, args):
    """The learning rate of optimizer step `step` (from 0): of the step alone, so that resume restores nothing.

    one_cycle is torch's OneCycleLR (its defaults: cosine, 30 % rise, from 1/25, to 1/250000), momentum left alone.
    """
    if args.lr_scheduler == "one_cycle":
        last, peak = args.max_train_steps - 1, (args.lr_warmup_steps or 0.3 * args.max_train_steps) - 1
        if step < peak:
            low, done = args.learning_rate / 25, 1 - step / peak
        else:
            low, done = args.learning_rate / 250000, (step - peak) / max(last - peak, 1)
        return low + (args.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * done))
    if step < args.lr_warmup_steps:
        return args.learning_rate * (step + 1) / args.lr_warmup_steps
    done = (step - args.lr_warmup_steps) / max(args.max_train_steps - args.lr_warmup_steps, 1)
    if args.lr_scheduler == "linear":
        return args.learning_rate * (1 - done)
    if args.lr_scheduler == "cosine":
        return args.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return args.learning_rate


def resume_identity(args):
    """The arguments that a continuation must share with its run. tiny-sd is the same wherever the checkout lies."""
    shared = {name: value for name, value in sorted(vars(args).items()) if name not in FREE_ON_RESUME}
    return {name: "assets/tiny-sd" if value == str(TINY_SD) else value for name, value in shared.items()}


def run_script(main, args):
    """Run main(args); a user's mistake becomes one sentence on stderr and exit status 2."""
    try:
        main(args)
    except (UsageError, ModelError, DataError, CheckpointError) as error:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" (process {rank})"  # broken images, say, may be only in its share
        print(f"error: {error}{where}", file=sys.stderr, flush=True)
        sys.exit(2)
