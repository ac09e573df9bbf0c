"""Compute once what every step would compute again: latents, prompt embeddings, and a teacher's roll-outs.

Two kinds of cache. Of samples: the latents of every image, as it is cut, and the embeddings of every caption, which
any training script reads with --cache_dir; its batches and losses are those of a run without. Of roll-outs
(--rollouts): where a teacher takes the noisy latents of so many samples, which train_flash_lora.py,
train_progressive.py, train_add.py, train_lcm.py and train_student_kd.py read with --rollout_cache:

    z_t = alpha_t x + sigma_t eps        pure noise where t is the last training timestep: there sampling starts
    z*  = DDIM_K(z_t : t -> end)         teacher, guided; t of the student's N steps, end as --target says

    python prepare_cache.py --cache_dir out/cache
    python prepare_cache.py --rollouts 2048 --num_ddim_steps 8 --cache_dir out/rollouts
    accelerate launch --multi_gpu --num_processes 8 prepare_cache.py --data_dir coco --center_crop \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed_precision bf16

    python prepare_cache.py --write_index --data_dir 's3://bucket/{00000..01023}.tar'

The last writes no cache, but the index by which .tar shards are read as a stream (docs/data.md).

All processes write, a shard each. Stopped or killed it goes on by the same command, which also mends what is damaged.
"""

import argparse
import itertools
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from common import arguments
from common.cache import (
    DATA_FLAGS,
    INDEX,
    ROLLED_OUT_BY,
    SHARD,
    UNCONDITIONAL,
    check_same,
    key_of,
    made_by,
    made_of,
    rows_are_there,
    write_index,
    write_rows,
)
from common.checkpoint import lock_folder
from common.conditioning import encode_empty_prompt, encode_images, encode_prompts, predict_guided
from common.contract import read_teacher
from common.data import read_data
from common.diffusion import NoiseSchedule, ddim_rollout
from common.engines import open_accelerator
from common.errors import DataError, UsageError
from common.loader import collate, order_of
from common.pipelines import keep_vae_right, load_pipeline, local_folder
from common.randomness import sample_generator
from common.remote import is_url
from common.run import on_main_process, run_script
from common.schedulers import student_scheduler, student_timesteps
from common.settle import compute_dtype_of, settle
from common.shard_index import write_index_of
from common.stopping import STOPPED

STRETCHES = 32  # samples of a stream that roll-outs take together, as a batch of training would
ENDLESS = 4096  # how many of endless shapes a cache of samples holds, where --max_train_samples doesn't say


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    add = parser.add_argument_group("cache").add_argument
    add("--cache_dir", dest="folder", default="outputs/cache", help="where it is written")
    add("--overwrite_cache", action="store_true", help="discard another cache that the folder holds")
    add("--batch_size", type=arguments.positive_int, default=32, help="samples at once, per process")
    add(
        "--write_index",
        action="store_true",
        help="instead of a cache, write the index of --data_dir's .tar shards by which a stream of them is read",
    )
    arguments.add_model_arguments(parser)
    arguments.add_data_arguments(parser, cached=False)
    add = parser.add_argument_group("roll-outs").add_argument
    add("--rollouts", type=arguments.positive_int, help="how many roll-outs of the teacher (default: cache samples)")
    add("--num_ddim_steps", type=arguments.positive_int, help="K: teacher steps per student step (default: 8)")
    arguments.add_teacher_step_arguments(add)
    arguments.add_few_step_arguments(add)
    add(
        "--guidance_scale",
        type=arguments.weight,
        help="teacher's guidance (default: as saved, else 7.5, or 5 of SDXL)",
    )
    add("--target", choices=("x0", "next"), default="x0", help="the teacher's clean latents, or at the next timestep")
    add("--keep_states", action="store_true", help="also write the K - 1 latents between")
    add = parser.add_argument_group("runtime").add_argument
    add("--seed", type=arguments.seed, default=0, help="everything random derives from it")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="as training will have it (default: accelerate's)")
    add("--ddp_timeout", type=arguments.positive_int, default=86400, help="seconds that processes wait for each other")
    return parser.parse_args(argv)


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work; fill in the defaults that belong to other flags."""
    if not args.rollouts and (args.num_ddim_steps or args.guidance_scale is not None or args.keep_states):
        raise UsageError("--num_ddim_steps, --guidance_scale and --keep_states are about --rollouts: say how many.")
    args.num_ddim_steps = args.num_ddim_steps or 8


def check_data(args):
    """Refuse what a cache of samples can't hold; say how many of endless shapes it has."""
    if args.rollouts and args.aspect_ratio_buckets:
        raise UsageError("--aspect_ratio_buckets: roll-outs are of squares: leave it out.")
    if args.rollouts:
        return
    if args.dataset_name == "shapes":
        args.max_train_samples = args.max_train_samples or ENDLESS
        args.random_flip = False  # which shapes ignore
    elif not args.center_crop:
        raise UsageError(
            "--center_crop: a cache holds one crop of an image: add the flag; training then takes it too."
        )


def draw(args, step, positions, latents):
    """Per-sample randomness by global position: noise like latents; on the CPU, indices into the timesteps (B,)."""
    noise, slots = [], []
    probs = torch.tensor(args.timestep_probs or [1.0] * args.num_inference_steps)
    for position in positions:
        generator = sample_generator(args.seed, step, position)
        slots.append(torch.multinomial(probs, 1, generator=generator)[0])
        noise.append(torch.randn(latents.shape[1:], generator=generator))
    return torch.stack(noise).to(latents.device, non_blocking=True), torch.stack(slots)


def captions_of(pipeline, args, texts):
    """{name: tensor} of a shard's distinct captions: their embeddings, as they are computed, and they themselves."""
    parts = [texts[first : first + args.batch_size] for first in range(0, len(texts), args.batch_size)]
    found = [encode_prompts(pipeline, part, args.resolution) for part in parts]
    encoded = [text.encode(errors="replace") for text in texts]
    tensors = {
        "prompt_embeds": torch.cat([conditioning.prompt_embeds.cpu() for conditioning in found]),
        "text": torch.frombuffer(bytearray(b"".join(encoded) or b" "), dtype=torch.uint8),
        "text_ends": torch.tensor(list(itertools.accumulate(map(len, encoded)))),
    }
    if found[0].pooled_prompt_embeds is not None:
        tensors["pooled_prompt_embeds"] = torch.cat([c.pooled_prompt_embeds.cpu() for c in found])
    return tensors


def sample_rows(args, pipeline, dataset, batches):
    """{name: tensor} of a shard of samples."""
    latents, time_ids, texts, captions, first = [], [], {}, [], [0]
    for batch in batches:
        pixels = batch["pixel_values"]
        variants = [encode_images(pipeline.vae, pixels)]
        if args.random_flip:
            variants.append(encode_images(pipeline.vae, pixels.flip(-1)))
        latents.append(torch.stack(variants, dim=1).cpu())
        time_ids.append(time_ids_of(args, batch))
        for index in batch["indices"]:
            captions += [texts.setdefault(caption, len(texts)) for caption in dataset.captions(index)]
            first.append(len(captions))
    return {
        "latents": torch.cat(latents),
        "time_ids": torch.cat(time_ids),
        "captions": torch.tensor(captions, dtype=torch.int32),
        "first": torch.tensor(first),
        **captions_of(pipeline, args, list(texts)),
    }


def rollout_rows(args, accelerator, pipeline, schedule, times, unconditional, guidance_scale, batches):
    """{name: tensor} of a shard of roll-outs. In fp16 where the teacher is in half precision: z before it goes on."""
    half = pipeline.unet.dtype in (torch.float16, torch.bfloat16)
    stored = torch.float16 if half else torch.float32
    rows, texts = [], {}
    for batch in batches:
        conditioning = encode_prompts(pipeline, batch["captions"], args.resolution, batch.get("time_ids"))
        latents = encode_images(pipeline.vae, batch["pixel_values"])
        noise, slots = draw(args, 0, batch["positions"], latents)
        timesteps = times[slots]
        ends = times[slots + 1] if args.target == "next" else torch.full_like(slots, -1)
        z = schedule.noisy_input(latents, noise, timesteps.to(latents.device, non_blocking=True)).to(stored).float()

        def guided(z, timesteps, rows, conditioning=conditioning):
            given = conditioning if rows is None else conditioning.rows(rows)
            return predict_guided(pipeline.unet, z, timesteps, given, unconditional, guidance_scale)

        states = [] if args.keep_states else None
        steps = args.num_ddim_steps, args.teacher_steps == "proportional", args.solver
        with accelerator.autocast():
            target = ddim_rollout(guided, schedule, z, timesteps, ends, *steps, states)
        numbers = [texts.setdefault(caption, len(texts)) for caption in batch["captions"]]
        row = {
            "z": z.to(stored).cpu(),
            "target": target.to(stored).cpu(),
            "timesteps": timesteps,
            "ends": ends,
            "caption": torch.tensor(numbers, dtype=torch.int32),
            "sample": torch.tensor(batch["indices"]),
            "guidance_scale": torch.full((len(z),), float(guidance_scale)),
            "time_ids": time_ids_of(args, batch),
        }
        if states:
            row["states"] = torch.stack(states, dim=1).to(stored).cpu()
        rows.append(row)
    found = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return {**found, **captions_of(pipeline, args, list(texts))}


def time_ids_of(args, batch):
    """SDXL's, (B, 6): those of the images, or of ones that nothing was cut off."""
    whole = torch.tensor([[args.resolution, args.resolution, 0, 0, args.resolution, args.resolution]])
    return batch.get("time_ids", whole.float().expand(len(batch["positions"]), 6))


def open_folder(args, index):
    """Make the folder, or find in it what is to be gone on with. Raises CheckpointError and DataError."""
    folder = Path(args.folder)
    lock_folder(folder)
    if (folder / INDEX).is_file():
        try:
            known = json.loads((folder / INDEX).read_text())
            wanted = {name: index[name] for name in ("kind", "count", "flipped", "states")}
            check_same("--cache_dir", folder, known, {**index["made_of"], **wanted})
        except (DataError, ValueError, KeyError, TypeError) as error:
            if not args.overwrite_cache:
                said = str(error).partition(": make another")[0]
                raise DataError(f"{said}: give another --cache_dir, or --overwrite_cache to discard it.") from None
            for path in [folder / UNCONDITIONAL, *folder.glob("shard-*.safetensors")]:
                path.unlink(missing_ok=True)
    write_index(folder, index)  # without shards: it is not complete


def what_it_is(args, dataset, teacher):
    """cache.json but for its shards."""
    of = args, local_folder(args), compute_dtype_of(args)
    method = {name: getattr(args, name) for name in ROLLED_OUT_BY}
    flags = {name: getattr(args, name) for name in DATA_FLAGS}
    flags |= {name: getattr(args, name) for name in ("streaming", "shard_index")}
    for name in ("data_dir", "shard_index"):
        if flags[name] and not is_url(flags[name]):
            flags[name] = str(Path(flags[name]).expanduser().absolute())
    stream = {"counts": dataset.counts} if hasattr(dataset, "counts") and not args.rollouts else {}
    return {
        "kind": "rollouts" if args.rollouts else "samples",
        "count": args.rollouts or dataset.size,
        "flipped": bool(args.random_flip and not args.rollouts),
        "states": args.keep_states,
        "flags": flags,
        "made_of": made_by(*of, teacher, **method) if args.rollouts else made_of(*of),
        **stream,
    }


def main(args):
    if args.write_index:
        if args.data_dir is None:
            raise UsageError("--write_index counts the .tar shards of --data_dir: say where they are.")
        if int(os.environ.get("RANK", 0)) == 0:
            write_index_of(args.data_dir, args.shard_index)
        return
    check_arguments(args)
    settle(args)
    teacher = read_teacher(args) if args.rollouts else None
    check_data(args)
    flip = {"random_flip": bool(args.random_flip and args.rollouts)}  # of samples both are written
    dataset = read_data(argparse.Namespace(**{**vars(args), **flip}))
    index = what_it_is(args, dataset, teacher)
    accelerator = open_accelerator(args)
    on_main_process(accelerator, lambda: open_folder(args, index))

    pipeline = load_pipeline(args.pretrained_model_name_or_path, compute_dtype_of(args), args.revision, args.variant)
    keep_vae_right(pipeline)
    pipeline.to(accelerator.device)
    unconditional = encode_empty_prompt(pipeline, args.resolution)
    if args.rollouts:
        schedule = NoiseSchedule(pipeline.scheduler, accelerator.device)
        scheduler = student_scheduler(pipeline.scheduler, args.target, args.num_inference_steps)
        times = torch.tensor([*student_timesteps(scheduler, args.num_inference_steps), -1])
        rows_of = partial(
            rollout_rows, args, accelerator, pipeline, schedule, times, unconditional, teacher["guidance_scale"]
        )
        index_of = order_of(dataset, STRETCHES)
    else:
        rows_of, index_of = partial(sample_rows, args, pipeline, dataset), int

    folder, key, count = Path(args.folder), key_of({**index, "flags": None}), index["count"]
    buckets = getattr(dataset, "buckets", None) or [0] * count
    shards = shards_of(buckets)
    own = shards[accelerator.process_index :: accelerator.num_processes]
    total = sum(len(numbers) for _, numbers in own)
    bar = tqdm(total=total, desc=index["kind"], disable=not accelerator.is_local_main_process)
    for name, numbers in own:
        if rows_are_there(folder, name, key):
            bar.update(len(numbers))
            continue
        batches = [numbers[i : i + args.batch_size] for i in range(0, len(numbers), args.batch_size)]
        keys = [[(index_of(number), 0, number) for number in batch] for batch in batches]
        workers = {"num_workers": args.dataloader_num_workers, "pin_memory": accelerator.device.type == "cuda"}
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=keys, collate_fn=collate, **workers)
        with torch.no_grad():
            rows = rows_of(told(loader, bar))
        if args.aspect_ratio_buckets:
            rows["index"] = torch.tensor(numbers)
        write_rows(folder, name, rows, key)
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        empty = {
            "prompt_embeds": unconditional.prompt_embeds,
            "pooled_prompt_embeds": unconditional.pooled_prompt_embeds,
        }
        save_file({n: x.cpu().contiguous() for n, x in empty.items() if x is not None}, folder / UNCONDITIONAL)
        (folder / UNCONDITIONAL).chmod(0o644)
        files = [(name, len(numbers), (folder / name).stat().st_size) for name, numbers in shards]
        of = {"buckets": [buckets[numbers[0]] for _, numbers in shards]} if args.aspect_ratio_buckets else {}
        write_index(folder, {**index, **of, "shards": files})
        size = sum(size for _, _, size in files)
        print(f"Done: {folder}, {count} {index['kind']}, {size / 1e6:.1f} MB", flush=True)
    accelerator.end_training()


def shards_of(buckets):
    """[(file, the samples or roll-outs in it), ...]: of one bucket each, of which every one has a number."""
    order, shards = sorted(range(len(buckets)), key=buckets.__getitem__), []
    for _, group in itertools.groupby(order, key=buckets.__getitem__):
        group = list(group)
        shards += [group[first : first + SHARD] for first in range(0, len(group), SHARD)]
    return [(f"shard-{number:05d}.safetensors", shard) for number, shard in enumerate(shards)]


def told(batches, bar):
    for batch in batches:
        yield batch
        bar.update(len(batch["positions"]))


if __name__ == "__main__":
    try:
        run_script(main, parse_args())
    except KeyboardInterrupt:
        print("Stopped; the same command goes on.", file=sys.stderr)
        sys.exit(STOPPED)
