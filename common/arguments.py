"""The flags that more than one script has: names, defaults, types and help. What they decide is decided elsewhere."""

import argparse
import re
from typing import NamedTuple

EXPORTS = ("fp16", "int8", "fp8")
LPIPS_HELP = "LPIPS: torchvision's VGG-16 weights, a file or 'download'"


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


class ByModel(NamedTuple):
    """A default that settle.settle decides on: of small models, such as tiny-sd, of others, of a LoRA on those."""

    small: float
    large: float
    lora: float | None = None

    def __str__(self):
        lora = "" if self.lora is None else f", {self.lora:g} for a LoRA"
        return f"{self.small:g} for tiny-sd and the like, else {self.large:g}{lora}"


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


def seed(text):
    value = natural(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is more than 63 bits")
    return value


def positive_float(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def weight(text):
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


def step_count(text):
    value = positive_int(text)
    if value > 1000:
        raise argparse.ArgumentTypeError(f"{text} is more than the model's 1000 timesteps")
    return value


def fraction(text):
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def amount(text):
    """("share", s) of a percentage such as 60%, or ("count", n) of a number such as 600M or 1.2GB."""
    found = re.fullmatch(r"([0-9.]+)\s*(%|[KMG]?B?)", text.strip(), re.IGNORECASE)
    try:
        value = float(found[1])
    except (TypeError, ValueError):
        value = 0.0
    if value <= 0 or (found[2] == "%" and value > 100):
        raise argparse.ArgumentTypeError(
            f"{text} is neither a percentage up to 100%, such as 60%, nor a size like 600M"
        )
    if found[2] == "%":
        return "share", value / 100
    return "count", value * 1000 ** " KMG".index(found[2].upper().rstrip("B") or " ")


def add_model_arguments(parser):
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--pretrained_model_name_or_path", help="teacher pipeline: folder, file or hub id (default: tiny-sd)")
    add("--revision", help="revision of the hub id")
    add("--variant", help="file variant of the pipeline, such as fp16")
    return group


def add_data_arguments(parser, *, cached=True):
    """cached: whether the script reads a cache of samples."""
    group = parser.add_argument_group("data (with no model and no data given: rendered shapes)")
    add = group.add_argument
    add(
        "--data_dir",
        help="COCO, imagefolder, webdataset .tar, parquet, captions.json, or images with .txt captions; or shards by "
        "URL or pattern, such as s3://bucket/{00000..01023}.tar",
    )
    add("--dataset_name", help="hub id or folder of a `datasets` set, or 'shapes' for rendered shapes")
    add(
        "--streaming",
        action="store_true",
        help="read a folder's .tar shards as a stream, by an index, as those of URLs and patterns always are: nothing "
        "else is read before the first step",
    )
    add("--shard_index", help="path or URL of that index (default: index.json beside the shards)")
    add("--image_column", help="image column (default: the first that looks like one)")
    add("--caption_column", help="caption column (default: the first that looks like one)")
    add("--caption_template", default="a photo of a {label}", help="caption of a class-label set")
    add("--resolution", type=positive_int, help="pixels per side (default: the model's own)")
    add("--center_crop", action="store_true", help="crop the middle instead of a random part")
    add(
        "--aspect_ratio_buckets",
        action="store_true",
        help="cut images to the nearest of several shapes of about --resolution^2 pixels, not to squares",
    )
    add("--random_flip", action="store_true", help="mirror half of the images")
    add("--max_train_samples", type=positive_int, help="use only the first so many samples")
    if cached:
        add(
            "--cache_dir",
            help="read what prepare_cache.py wrote here, latents and prompt embeddings of which data too",
        )
    add("--dataloader_num_workers", type=natural, default=ByModel(0, 4), help="processes that load images, per rank")
    return group


def add_few_step_arguments(add):
    """The schedule of a student that jumps between a few timesteps; `add` is a group's add_argument."""
    add("--num_inference_steps", "--num_student_steps", type=step_count, default=4, help="N: steps of its schedule")
    add(
        "--timestep_probs",
        type=positive_float,
        nargs="+",
        help="how often each of its timesteps is drawn, noisiest first, such as 0.4 0.2 0.2 0.2: the first step has "
        "the most to learn (default: all alike)",
    )


def add_teacher_step_arguments(add):
    """How a teacher rolls out; `add` is a group's add_argument."""
    add(
        "--teacher_steps",
        choices=("even", "proportional"),
        default="even",
        help="K from every timestep; or K from the last one, and fewer from others, in proportion to the timestep",
    )
    add("--solver", choices=("ddim", "dpmsolver++"), default="ddim", help="of the teacher: first order, or second")


def add_rollout_arguments(add, *, in_memory=None):
    """What a method does not ask its teacher again; `add` is a group's add_argument.

    in_memory: help of --cache_rollouts, of a method that can keep roll-outs in memory.
    """
    add("--rollout_cache", help="read the teacher's roll-outs that prepare_cache.py --rollouts wrote into this folder")
    if in_memory:
        add("--cache_rollouts", type=natural, help=in_memory)
    add(
        "--rollout_refresh",
        type=fraction,
        default=0.0,
        help="of roll-outs that are kept: share of the steps that asks the teacher anew, for new samples",
    )


def add_lora_arguments(parser, *, lora_rank=None):
    """lora_rank: the flag's default; None where a script trains the whole UNet unless it is given."""
    group = parser.add_argument_group("LoRA")
    add = group.add_argument
    whole = "" if lora_rank else " (default: train the whole UNet)"
    add("--lora_rank", type=positive_int, default=lora_rank, help=f"rank of the adapters{whole}")
    add("--lora_alpha", type=positive_float, help="scale of the adapters is alpha / rank (default: 32)")
    add("--lora_targets", nargs="+", help="UNet layers to adapt (default: to_q to_k to_v to_out.0)")
    add(
        "--quantize_frozen",
        choices=("int8",),
        help="keep the UNet's own weights, frozen beneath the adapters, in INT8: less memory, more time",
    )
    return group


def add_optimization_arguments(parser, *, learning_rate, train_batch_size, max_train_steps):
    """max_train_steps: the flag's default; None where stages make up the run, of which it is then a cap."""
    total, end = "optimizer steps in all", "at --max_train_steps"
    if max_train_steps is None:
        total, end = "end the run after so many optimizer steps (default: all stages)", "at the end of a stage"
    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add(
        "--train_batch_size",
        "--batch_size",
        type=positive_int,
        default=train_batch_size,
        help="samples per process and micro-batch",
    )
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="micro-batches per optimizer step")
    add("--max_train_steps", "--max_steps", type=positive_int, default=max_train_steps, help=total)
    add("--learning_rate", type=positive_float, default=learning_rate, help="peak learning rate")
    add(
        "--lr_scheduler",
        choices=("constant", "linear", "cosine", "one_cycle"),
        default="constant",
        help=f"after the warm-up: constant, or down to 0 {end}; one_cycle: up from 1/25 along a cosine "
        "for the warm-up, then down to 1/250000 along another",
    )
    add(
        "--lr_warmup_steps",
        type=natural,
        default=0,
        help="steps of linear warm-up (one_cycle: of its rise, 0 being 30 %% of the run)",
    )
    add("--adam_beta1", type=fraction, default=0.9, help="AdamW")
    add("--adam_beta2", type=fraction, default=0.999, help="AdamW")
    add("--adam_weight_decay", type=fraction, default=0.0, help="AdamW")
    add("--adam_epsilon", type=positive_float, default=1e-8, help="AdamW")
    add("--max_grad_norm", type=positive_float, default=1.0, help="gradient norm is clipped to this")
    add("--use_8bit_adam", action="store_true", help="bitsandbytes' AdamW8bit: saves memory (CUDA)")
    add("--ema_decay", type=fraction, default=0.999, help="average of the weights, which final/ holds")
    add("--offload_ema", action="store_true", help="keep the average in the CPU's memory: less on the GPU, slower")
    add(
        "--max_skipped_updates",
        type=positive_int,
        default=20,
        help="an update whose gradient is not finite is skipped; so many in a row end the run",
    )
    return group


def add_checkpoint_arguments(parser, *, output_dir):
    group = parser.add_argument_group("checkpoints")
    add = group.add_argument
    add("--output_dir", default=output_dir, help="where runs are written")
    add("--run_name", help="sub-folder of --output_dir for this run")
    add("--checkpointing_steps", type=positive_int, default=500, help="save checkpoint-N every so many steps")
    add(
        "--must_save_by",
        type=positive_float,
        metavar="MINUTES",
        help="a cluster's limit: save, and end with status 75 and a file 'stopped', before so many minutes from the "
        "start are over (default: no limit)",
    )
    add("--checkpoints_total_limit", type=positive_int, default=3, help="keep only the newest so many")
    add("--resume_from_checkpoint", help="'latest', checkpoint-N or a path")
    add("--overwrite_output_dir", action="store_true", help="discard the run that the folder holds")
    add("--push_to_hub", action="store_true", help="at the end upload final/ to the model hub")
    add("--hub_model_id", help="repository there, owner/name (default: yours, named as the run)")
    return group


def add_validation_arguments(parser):
    group = parser.add_argument_group("validation and logging")
    add = group.add_argument
    add("--validation_prompts", nargs="+", help="prompts sampled during training (default: none)")
    add("--validation_steps", type=positive_int, default=100, help="sample every so many steps")
    add("--num_validation_images", type=positive_int, default=4, help="images per prompt")
    add_logging_arguments(add)
    add("--dry_run", action="store_true", help="only say what would be done, and what memory it takes: nothing loads")
    return group


def add_logging_arguments(add):
    add("--report_to", default="tensorboard", help="tracker: tensorboard, wandb, ..., all, or none")
    add("--logging_steps", type=positive_int, default=10, help="report every so many steps, and at the first and last")
    add(
        "--profile_steps",
        type=positive_int,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="write torch's profiler trace of these steps into the run's folder, for chrome://tracing",
    )


def add_evaluation_arguments(parser):
    group = parser.add_argument_group("evaluation during training")
    add = group.add_argument
    add(
        "--eval_steps",
        type=positive_int,
        help="judge the averaged student every so many steps, and keep the best one in best/ (default: never)",
    )
    add(
        "--eval_data_dir",
        help="held-out images with captions, in any format of --data_dir (default with shapes: held-out renders)",
    )
    add("--num_eval_images", type=positive_int, default=200, help="captions to judge by")
    add("--eval_inference_steps", type=positive_int, default=25, help="DDIM steps per image")
    add("--clip_model", help="CLIP for CLIP score and Fréchet distance (default with shapes: tiny-clip, else none)")
    add("--inception_path", help="torch-fidelity's Inception weights, for FID (default: no FID)")
    add("--lpips_trunk_path", help=f"{LPIPS_HELP} (default: no LPIPS)")
    return group


def add_held_out_split(add):
    add(
        "--held_out_split",
        choices=("choose", "judge", "all"),
        default="all",
        help="which held-out captions of shapes: 500 to choose checkpoints and flags by, 1,500 to judge what was "
        "chosen, or all 2,000",
    )


def add_prompt_arguments(parser, default):
    """default: in words, what is taken where none of them is given; for sampling.asked_prompts."""
    group = parser.add_argument_group("prompts")
    add = group.add_mutually_exclusive_group().add_argument
    add("--prompt", nargs="+", help=f"one or more prompts (default: {default})")
    add("--prompts_file", help="a text file with one prompt a line, or captions.json ([{'text': ...}, ...])")
    add("--held_out_captions", type=positive_int, help="the first so many held-out captions of shapes")
    add_held_out_split(group.add_argument)
    return group


def add_preference_model(add):
    add(
        "--preference_model",
        help="model of people's preferences, a CLIPModel such as yuvalkirstain/PickScore_v1: folder or hub id "
        "(default: none)",
    )


def add_device_arguments(parser):
    """Where a pipeline is sampled, in how little memory: for sampling.settle_device and sampling.place."""
    group = parser.add_argument_group("runtime")
    add = group.add_argument
    add("--device", help="default: cuda where there is one, else cpu")
    add("--attention_slicing", action="store_true", help="attention in slices: less memory, slower")
    add("--vae_slicing", action="store_true", help="decode one image at a time")
    add("--vae_tiling", action="store_true", help="decode in tiles: for large images")
    add("--cpu_offload", action="store_true", help="keep on the GPU only the model that runs (CUDA)")
    return group


def add_runtime_arguments(parser):
    group = parser.add_argument_group("runtime")
    add = group.add_argument
    add("--seed", type=seed, default=0, help="everything random derives from it")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's configuration")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--torch_compile", action="store_true", help="compile the UNet")
    add("--channels_last", action="store_true", help="UNets in the memory format that convolutions often prefer")
    add("--allow_tf32", action="store_true", help="TF32 in matrix products and convolutions, on Ampere and later")
    add(
        "--ddp_timeout",
        type=positive_int,
        default=7200,
        help="seconds that processes wait for each other, such as for the main one's validation, before they give up",
    )
    add(
        "--export",
        choices=EXPORTS,
        nargs="+",
        help="also write final-fp16/, final-int8/ (half its size), final-fp8/ (half of linear layers), whole "
        "pipelines with the student in them",
    )
    return group
