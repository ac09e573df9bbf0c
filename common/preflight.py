"""Before a run: what it trains and on what, and how much memory it will take, from flags and config files alone.

Every training script calls `preflight` between its refusals and `open_run`. Its networks are made on the meta device,
as the script makes them later, and one step is run on them (common/memory.py). --dry_run ends there.
"""

import os
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env

from common.engines import BLOCKS, NAMES, launched_engine
from common.errors import UserError, first_line
from common.memory import SHARDED, Sharding, Watch, bytes_of, in_words
from common.pipelines import compute_dtype
from common.trial import make_networks, memory_of

LARGE = 4e9  # bytes of an average that a GPU may want to be rid of, or of what it might share with others


def preflight(args, dataset, guidance_scale=None, subfolder="", **method):
    """Print what the run will do and what memory it takes; with --dry_run end here. Returns the Watch of its memory.

    guidance_scale: of a guided teacher, which sees two rows a sample but for 1; dataset: None where there is none;
    subfolder: as of open_run. method: what is special about this script's networks, see trial.make_networks.
    """
    kind, precision, processes = where_it_runs(args)
    expected = None
    if int(os.environ.get("RANK", 0)) == 0:
        rows, expected, trained = describe(args, dataset, guidance_scale, kind, precision, processes, method)
        rows.append(("writes", written(args, subfolder, trained)))
        width = max(len(name) for name, _ in rows)
        print(
            "\n".join(["Before it runs:", *(f"  {name:{width}}  {said}".rstrip() for name, said in rows)]), flush=True
        )
    if args.dry_run:
        raise SystemExit(0)
    return Watch(expected, kind)


def where_it_runs(args):
    """("cpu" or "cuda", precision, processes) that accelerate will give the run. Nothing is initialised."""
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    cuda = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    asked = args.dry_run and (precision == "fp16" or args.use_8bit_adam)  # which there are on a GPU alone
    return "cuda" if cuda or asked else "cpu", precision, int(os.environ.get("WORLD_SIZE", 1))


def launched_sharding():
    """The Sharding that accelerate launch asked for, through the environment."""
    engine, offloads = launched_engine()
    blocks = ()
    if engine == "fsdp2" and os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "TRANSFORMER_BASED_WRAP":
        named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
        blocks = BLOCKS if named is None else tuple(name.strip() for name in named.split(","))
    return Sharding(engine, offloads, blocks)


def describe(args, dataset, guidance_scale, kind, precision, processes, method):
    """([(name, what is said of it)], the Estimate or None, the network that is trained or None)."""
    guidance = "" if guidance_scale is None else f", guided at {guidance_scale:g}"
    rows = [
        ("model", f"{args.pretrained_model_name_or_path}, {args.resolution} pixels{guidance}"),
        *(batches(args, dataset, processes) if args.max_train_steps else ()),
        ("precision", f"{precision}; what is trained is float32"),
    ]
    if getattr(args, "lora_rank", None):
        rows.append(("LoRA", f"rank {args.lora_rank}, alpha {args.lora_alpha:g}, on {' '.join(args.lora_targets)}"))
    expected, trained, sharding = None, None, launched_sharding()
    if sharding.engine != "ddp":
        shared = ", ".join(name for name in SHARDED[sharding.engine] if name != "target network")
        where = ", in the CPU's memory" * sharding.offloads
        rows.append((NAMES[sharding.engine], f"shares among {processes} processes: {shared}{where}"))
    asked = processes, 1 if guidance_scale in (None, 1) else 2, getattr(dataset, "needs_images", False), sharding
    try:
        networks = make_networks(args, compute_dtype(precision), **method)
        rows += weights(networks)
        trained = networks.trained
        if trained is not None:
            expected = memory_of(args, networks, kind, compute_dtype(precision), *asked)
            rows += [("peak memory", f"{in_words(expected.total)} on {kind}, each process (estimated)")]
            rows += expected.shown()
            average = expected.rows["their average"]
            if average > LARGE and kind == "cuda" and not args.offload_ema:
                rows.append(("advice", f"--offload_ema keeps {in_words(average)} of average in the CPU's memory"))
            saved = saved_by_sharding(args, networks, expected, processes)
            if sharding.engine == "ddp" and saved > LARGE:
                said = f"takes about {in_words(saved)} less of each process: what is trained is shared among them"
                rows.append(("advice", f"accelerate_configs/fsdp2.yaml, in bf16, {said}"))
        if trained is not None and args.dry_run and kind == "cpu":
            half = torch.bfloat16
            there = memory_of(args, make_networks(args, half, **method), "cuda", half, *asked)
            rows.append(
                ("on a GPU", f"{in_words(there.total)} with --mixed_precision bf16, and what CUDA itself takes")
            )
    except UserError:
        raise
    except Exception as error:  # whatever a model that nobody tried does on the meta device: the run may go on
        rows.append(
            ("peak memory", f"not known, as this model can't be tried without its weights: {first_line(error)}")
        )
    return rows, expected, trained


def saved_by_sharding(args, networks, expected, processes):
    """Bytes that FSDP2 would take less than an Estimate under DDP; 0 of a LoRA."""
    if getattr(args, "lora_rank", None):
        return 0
    heads = 0 if networks.heads is None else 4 * bytes_of(networks.heads)  # with their gradients and moments
    return round((sum(expected.rows[name] for name in SHARDED["fsdp2"]) - heads) * (1 - 1 / processes))


def batches(args, dataset, processes):
    """Rows on samples and steps."""
    size, steps = getattr(dataset, "size", None), args.max_train_steps
    batch = args.train_batch_size * processes * args.gradient_accumulation_steps
    split = f"{args.train_batch_size} x {processes} processes x {args.gradient_accumulation_steps} accumulated"
    epochs = f"{steps * batch / size:.3g} epochs of {size:,}" if size else "of data without an end"
    rate = f"{args.learning_rate:g}, {args.lr_scheduler}, after {args.lr_warmup_steps} steps of warm-up"
    shards = getattr(dataset, "counts", None)
    return [
        *([("stream", f"{len(shards):,} shards of {size:,} samples, {dataset.source}")] if shards else ()),
        ("global batch", f"{batch} = {split}"),
        ("optimizer steps", f"{steps:,}, {steps * batch:,} samples, {epochs}"),
        ("learning rate", rate),
    ]


def weights(networks):
    """Rows on the parameters of every network, trained or frozen, with their dtype."""
    rows = []
    for name, module in [*networks.held().items(), ("discriminator", networks.heads)]:
        parts = {True: [], False: []}
        for parameter in module.parameters() if module else ():
            parts[parameter.requires_grad].append(parameter)
        for trained, parameters in parts.items():
            if parameters:
                what = f"adapters of the {name}" if trained and parts[False] else name
                dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
                said = f"{what}, {sum(p.numel() for p in parameters):,} parameters, {dtypes}"
                rows.append(("trained" if trained else "frozen", said))
    return sorted(rows, key=lambda row: row[0], reverse=True)


def written(args, subfolder, trained):
    """What the run writes, and where."""
    folder = Path(args.output_dir) / (args.run_name or "") / subfolder
    if trained is None:
        return f"{folder}/final/"
    size = in_words(4 * bytes_of(trained, trained=True))  # the weights, their average and Adam's two moments
    return f"{folder}/: checkpoint-N every {args.checkpointing_steps} steps, about {size} each, and final/"
