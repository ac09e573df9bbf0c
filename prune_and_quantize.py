"""Prune a pipeline, let it recover, export it in FP16, INT8 or FP8: a pipeline in, a smaller one out, with a report.

    structured   channels inside resnets, feed-forwards, CLIP's MLPs and the VAE go, with their GroupNorm's groups
    heads        attention heads go
    magnitude    the smallest weights become zero, which makes neither files nor passes smaller
    width        the whole UNet becomes narrower, which a stock config can say (as prepare_unet_small.py does)

What the layers write to keeps its width (but for `width`), so LoRAs for the original still fit or can be converted.
Which channels go: those of least L1 or L2 norm; by --importance taylor of the second-order term of the distillation
loss with a gate on each; by reconstruction those that the others can stand in for, one after the other. What stays
stands in for what goes by least squares on calibration captions. --sensitivity measures what each layer's loss does
to the output, and cuts where it does least, down to --target_bytes, say.

Recovery is the distillation of train_student_kd.py: the UNet learns from the pipeline that it was cut out of,

    L = w_task |o_s - o|^2 + w_kd |o_s - o_T|^2 + w_feat sum_k |f_k^s - f_k^T|^2 / |f_k^T|^2

for --finetune_steps updates, after each of --iterative rounds that prune a part each.

    python prune_and_quantize.py --unet_prune_ratio 0.3 --text_encoder_prune_ratio 0.25 --vae_prune_ratio 0.2 \\
        --export int8 --output_dir out/small
    accelerate launch prune_and_quantize.py --sensitivity --target_bytes 60% --iterative 3 --finetune_steps 500 \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --data_dir coco

Rates that are safe, and aggressive ones, as they are passed on: attention 0.3 to 0.4, 0.5 to 0.6; feed-forward 0.4 to
0.5, 0.6 to 0.7; convolutions 0.5 to 0.6, 0.7 to 0.8. docs/prune_and_quantize.md has measured ones.

Run the same command with --resume_from_checkpoint latest to go on after a stop. Writes
<output_dir>/[<run_name>/]checkpoint-N/ while it recovers, final/, final-fp16/, final-int8/ or final-fp8/, report.json,
report.md, grid.png, and with --sensitivity sensitivity.png.
"""

from pathlib import Path

import torch

from common import arguments, shapes
from common.arguments import ByModel
from common.compression import channels, lora_check, planning, quantization, students
from common.compression.captions import SPLIT, calibration_captions, judged_captions
from common.compression.distillation import kd_loss, make_student
from common.compression.lora_check import check_loras, lora_files, rows_of
from common.compression.manifest import MANIFEST, read_manifest
from common.compression.pruning import calibrate, few_of, prune_round, replay
from common.compression.report import layers_kept, write_report
from common.conditioning import (
    conditioning_of,
    encode_empty_prompt,
    encode_prompts,
    guidance_embedding,
    latents_of,
    predict,
    unconditional_of,
)
from common.contract import make_contract, read_distillation, read_teacher
from common.data import load_dataset_from_args
from common.diffusion import NoiseSchedule
from common.ema import EMA
from common.engines import prepare, whole
from common.errors import UsageError
from common.frozen import load_frozen
from common.judging.previews import preview
from common.judging.results import print_table
from common.loader import build_dataloader
from common.lora import trainable
from common.optimization import adamw, become_average, clip, learning_rate_at, set_learning_rate, update
from common.outputs import export, save_student
from common.pipelines import default_guidance, load_pipeline, set_up
from common.preflight import preflight
from common.randomness import sample_generator
from common.run import open_run, run_script
from common.settle import settle

LORA_PROMPTS = 8  # that a LoRA of --lora_dir is tried on


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_data_arguments(parser)
    add = parser.add_argument_group("pruning").add_argument
    add("--method", choices=tuple(planning.OF_METHOD), default="structured", help="what goes: see above")
    for name, of in (
        ("unet", "the UNet's layers (default, where no ratio is given at all: 0.3)"),
        ("transformer", "the transformer's of FLUX, SD3 and PixArt (0.3)"),
        ("text_encoder", "CLIP text encoders' (0.25); T5 is left whole"),
        ("vae", "the VAE's (0.2)"),
    ):
        add(f"--{name}_prune_ratio", type=arguments.fraction, help=f"share that goes inside each of {of}")
    for kind in channels.KINDS:
        of = kind.replace("conv", "convolutional").replace("_", "-")
        add(f"--{kind}_ratio", type=arguments.fraction, help=f"of the {of} layers of the UNet or transformer instead")
    importance = ("l1", "l2", "taylor", "reconstruction")
    add("--importance", choices=importance, default="taylor", help="what says which channels matter")
    add("--no_compensation", action="store_true", help="do not let what stays stand in for what goes")
    add("--sensitivity", action="store_true", help="cut where the output suffers least: as much as the ratios in all")
    add("--target_parameters", type=arguments.amount, help="--sensitivity, down to so many: 60%%, 500M")
    add("--target_bytes", type=arguments.amount, help="the same in bytes of the smallest --export: 60%%, 1GB")
    add("--pattern", choices=("unstructured", "2:4"), default="unstructured", help="of --method magnitude")
    add(
        "--calibration_prompts", help="file of captions to calibrate by (default: the data's, else prompts/coco20.txt)"
    )
    add("--num_calibration_prompts", type=arguments.positive_int, default=8, help="how many of them")
    add("--calibration_steps", type=arguments.positive_int, default=10, help="sampling steps to calibrate by")
    add = parser.add_argument_group("recovery").add_argument
    add("--iterative", type=arguments.positive_int, default=1, help="rounds that prune a part each, and recover")
    add("--finetune_steps", type=arguments.natural, default=0, help="optimizer steps of recovery after each round")
    add(
        "--task_weight",
        type=arguments.weight,
        help="weight of the error against the noise in the data (default: 1; 0 where guidance is baked in)",
    )
    add("--kd_weight", type=arguments.weight, default=1.0, help="weight of the error against the original's output")
    add("--feature_weight", type=arguments.weight, default=1.0, help="weight of the features' error")
    arguments.add_optimization_arguments(
        parser, learning_rate=ByModel(2e-4, 2e-5), train_batch_size=ByModel(32, 4), max_train_steps=None
    )
    arguments.add_checkpoint_arguments(parser, output_dir="outputs/pruned")
    arguments.add_validation_arguments(parser)
    add = parser.add_argument_group("report").add_argument
    add(
        "--num_eval_images",
        type=arguments.natural,
        default=200,
        help="captions to judge by; 0: count and measure alone",
    )
    add("--eval_inference_steps", type=arguments.step_count, default=25, help="steps per image")
    add("--clip_model", help="CLIP that judges (default with shapes: tiny-clip, else none)")
    add("--lora_dir", help="LoRAs for the original: check each on the output, in lora_compatibility_report.json")
    arguments.add_runtime_arguments(parser)
    add = parser.add_argument_group("INT8 and FP8").add_argument
    add("--precision", dest="export", choices=arguments.EXPORTS, nargs="+", help="--export, by another name")
    add(
        "--int8_backend",
        choices=quantization.BACKENDS,
        default="torchao",
        help="bitsandbytes needs a GPU, and leaves convolutions alone",
    )
    add(
        "--int8_skip",
        type=arguments.natural,
        default=0,
        help="layers of the UNet or transformer to leave as they are: those whose rounding changes its output most",
    )
    add(
        "--fp8_activations",
        action="store_true",
        help="--export fp8 that also multiplies in float8: on GPUs of compute capability 8.9 or later alone",
    )
    # Every round starts from what works: without a warm-up Adam's first steps, all of full length, would spoil it.
    parser.set_defaults(lr_scheduler="linear", lr_warmup_steps=20, ema_decay=0.99)
    return parser.parse_args(argv)


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work; settle how many optimizer steps there are in all."""
    if args.iterative > 1 and not args.finetune_steps:
        raise UsageError(f"--iterative {args.iterative}: its rounds need --finetune_steps to recover between them.")
    if args.iterative > 1 and args.method == "width":
        raise UsageError("--iterative: --method width makes the UNet narrower in one round.")
    if args.target_bytes and args.target_parameters:
        raise UsageError("--target_bytes and --target_parameters both say how much goes: give one of them.")
    args.sensitivity = args.sensitivity or bool(args.target_bytes or args.target_parameters)
    if args.sensitivity and args.method not in ("structured", "heads"):
        raise UsageError(f"--sensitivity and targets are about --method structured and heads, not {args.method}.")
    if args.importance == "reconstruction" and args.no_compensation:
        raise UsageError("--importance reconstruction is about what can be stood in for: leave out --no_compensation.")
    if args.pattern == "2:4" and args.method != "magnitude":
        raise UsageError("--pattern 2:4 is about --method magnitude.")
    if "int8" in (args.export or ()):
        quantization.check_backend(args.int8_backend)
    elif args.int8_skip or args.int8_backend != "torchao":
        raise UsageError("--int8_skip and --int8_backend are about --export int8: add it or leave them out.")
    if args.fp8_activations and "fp8" not in (args.export or ()):
        raise UsageError("--fp8_activations is about --export fp8: add it or leave it out.")
    if args.fp8_activations:
        quantization.check_float8_products()
    if args.lora_dir:
        lora_files(args.lora_dir)
    total = args.iterative * args.finetune_steps
    args.max_train_steps = min(args.max_train_steps or total, total)


def check_parent(args, models):
    """Refuse a pipeline that this can't prune or recover; returns its compression.json, {} where it has none."""
    path = args.pretrained_model_name_or_path
    manifest = read_manifest(path) if (Path(path) / MANIFEST).is_file() else {}
    if args.finetune_steps and "unet" not in models:
        raise UsageError("--finetune_steps: a pipeline without a UNet is pruned and quantized here, but not trained.")
    if "PixArt" in type(models.get("transformer")).__name__:  # its pipelines take 1 for a model of one step
        for name in ("calibration_steps", "eval_inference_steps"):
            if getattr(args, name) == 1:
                raise UsageError(f"--{name} 1: PixArt's pipelines need 2 steps or more.")
    if args.lora_dir and "unet" not in models:
        raise UsageError("--lora_dir: LoRAs are checked on pipelines with a UNet, which this one has not.")
    if args.method == "width" and "unet" not in models:
        raise UsageError(f"--method width: {path} has no UNet.")
    if args.method == "width" and (manifest.get("keep") or manifest.get("pruned")):
        raise UsageError(f"--method width: {path} was made narrower or pruned before: start from what it was made of.")
    return manifest


def stock_contract(args):
    """The contract of a pipeline without a UNet: it is sampled as its stock class does by default."""
    path = args.pretrained_model_name_or_path
    ordinary = {"steps": None, "timesteps": None, "target": None, **read_distillation(path)}
    return {**ordinary, "guidance_scale": default_guidance(path, args.revision)}


def draw(args, step, positions, shape, timesteps):
    """Per-sample randomness by global position: noise (B, *shape) and one of the timesteps each, (B,)."""
    noise, drawn = [], []
    for position in positions:
        generator = sample_generator(args.seed, step, position)
        drawn.append(timesteps[torch.randint(len(timesteps), (), generator=generator)])
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(noise), torch.tensor(drawn)


@torch.no_grad()
def teach(teacher, tap, z, timesteps, conditioning, timestep_cond):
    """(o_T (B, C, H, W), its features by name): one forward of what was pruned, as it was."""
    return predict(teacher, z, timesteps, conditioning, timestep_cond), tap.features


def make_manifest(args, run, parent, models, planned, pipeline):
    """compression.json of the pruned pipeline; parent: that of the one it was made from, models: its, without weights.

    What is kept of each group is in the numbers of the model that was pruned first.
    """
    kept = dict(parent.get("pruned") or {})
    for component in planned:
        if args.method in ("structured", "heads"):
            groups = channels.groups_of(models[component])
            for units in run.state["rounds"]:
                kept[component] = channels.record(groups, units[component], kept.get(component))
    manifest = {
        "parent": args.pretrained_model_name_or_path,
        "variant": parent.get("variant"),
        "block_map": parent.get("block_map"),
        "keep": run.state.get("keep") or parent.get("keep"),
        "pruned": kept,
        "feature_pairs": [],
    }
    if "unet" in models:
        manifest["feature_pairs"] = students.feature_pairs(models["unet"], models["unet"], None, 0)
        manifest["block_out_channels"] = list(pipeline.unet.config.block_out_channels)
        manifest.update(students.costs(models["unet"].config, pipeline.unet.config))
    return manifest


def card_notes(args, run, planned, pipeline):
    """What the card says of the pruned pipeline."""
    notes = {"method": f"{args.method} pruning, importance {args.importance}"}
    for component in planned:
        before, after = run.state["parameters"][component], channels.count(getattr(pipeline, component))
        notes[component] = f"{after:,} of {before:,} parameters"
    if args.finetune_steps:
        notes["recovery"] = f"{args.iterative} x {args.finetune_steps} updates of distillation"
    return notes


def main(args):
    check_arguments(args)
    settle(args, transformers=True, needs_data=bool(args.finetune_steps))
    if args.dataset_name == "shapes":
        shapes.check_count("--num_eval_images", args.num_eval_images, SPLIT)
    teacher_path, origin = args.pretrained_model_name_or_path, {"revision": args.revision, "variant": args.variant}
    models = planning.empty_models(teacher_path, args.revision)
    parent = check_parent(args, models)
    planned = planning.plan_ratios(args, models)
    budget = planning.plan_budget(args, models, planned)
    if "unet" in models:
        from_contract = read_teacher(args, guidance=("cfg", "baked", "embedded"), few_steps=True)
    else:
        from_contract = stock_contract(args)
    if args.task_weight is None:
        args.task_weight = 0.0 if from_contract["guidance"] == "baked" else 1.0
    dataset = None
    if args.data_dir or args.dataset_name:
        dataset = load_dataset_from_args(args, needs_images=bool(args.finetune_steps))
    captions = calibration_captions(args, dataset)
    watch = preflight(args, dataset, trains="pruned" if args.finetune_steps else None)
    run = open_run(args, watch, staged=True)
    accelerator = run.accelerator

    # 1 frozen models: what is pruned, in fp32, and what it learns from, in the compute dtype
    pipeline = load_pipeline(teacher_path, **origin).to(run.device)
    keys = ("target", "steps", "timesteps", "guidance", "guidance_scale")
    contract = make_contract(args, "prune", **{key: from_contract[key] for key in keys})
    run.state.setdefault("rounds", [])
    run.state["parameters"] = {c: channels.count(model) for c, model in models.items()}
    run.state["units"] = {c: {g.name: g.units for g in channels.groups_of(model)} for c, model in models.items()}
    for number, kept in enumerate(run.state["rounds"]):
        replay(args, run, pipeline, planned, kept, number)
    if args.finetune_steps:
        teacher = load_frozen(args, run)
        schedule = NoiseSchedule(pipeline.scheduler, run.device)
        teacher_unconditional = unconditional_of(teacher, dataset, args.resolution)
        loader = iter(build_dataloader(dataset, args, accelerator, run.step))
        timesteps_known = from_contract["timesteps"] or range(schedule.num_train_timesteps)
        shown = {**contract, "steps": contract["steps"] or args.eval_inference_steps}
        one_text = not any(component.startswith("text_encoder") for component in planned)

    for number in range(args.iterative):
        end = args.finetune_steps * (number + 1)
        if number == len(run.state["rounds"]):
            prune_round(args, run, pipeline, planned, budget, captions, contract)
        elif number + 1 < len(run.state["rounds"]):
            continue  # a resumed run's, which it has cut again
        others = {c: dict(getattr(pipeline, c).named_parameters()) for c in planned if c != "unet"}
        if not args.finetune_steps:
            run.register(others, {})
            break

        # 2 trained, in fp32
        accelerator.free_memory()
        unet, empty = pipeline.unet, (encode_empty_prompt(pipeline, args.resolution), teacher_unconditional)
        pairs = students.feature_pairs(unet, teacher.unet, None, 0) if args.feature_weight else []
        plain, tap, teacher_tap = make_student(args, run, pipeline, teacher, empty, pairs, teacher_path)
        set_up(unet, args, teacher.unet)

        # 3 optimizer, resume
        student, optimizer = prepare(run, plain, adamw(trainable(plain), args))
        parameters = trainable(plain)
        ema = EMA(parameters, args.ema_decay, args.offload_ema)
        run.register({"student": parameters, **others}, {"student": ema})
        zeros = {name: p == 0 for name, p in parameters.items()} if args.method == "magnitude" else {}

        while run.step < min(end, args.max_train_steps):
            inside = run.step - end + args.finetune_steps
            run.bar.set_description(f"round {number + 1} of {args.iterative}", refresh=False)
            learning_rate = set_learning_rate(optimizer, learning_rate_at(inside, args, args.finetune_steps))
            for batch in run.batches(loader):
                with accelerator.accumulate(student):
                    conditioning = teacher_conditioning = conditioning_of(teacher, batch, args.resolution)
                    if not one_text:
                        own = batch["captions"], args.resolution, batch.get("time_ids")
                        conditioning = encode_prompts(pipeline, *own)
                    latents = latents_of(teacher, batch)
                    drawn = draw(args, batch["step"], batch["positions"], latents.shape[1:], timesteps_known)
                    noise, timesteps = (x.to(run.device, non_blocking=True) for x in drawn)
                    z, target = schedule.noisy_input(latents, noise, timesteps), None
                    if args.task_weight:
                        z = schedule.add_noise(latents, noise, timesteps)
                        target = schedule.target(latents, noise, timesteps)
                    scale = None
                    if contract["guidance"] == "embedded":
                        scales = torch.full((len(z),), contract["guidance_scale"])
                        scale = guidance_embedding(pipeline, scales, unet)
                    run.phase("teacher")
                    with accelerator.autocast():
                        said, features = teach(teacher.unet, teacher_tap, z, timesteps, teacher_conditioning, scale)

                    run.phase("student")
                    with accelerator.autocast():
                        output = predict(student, z, timesteps, conditioning, scale)
                    own = plain.features(tap, [name for name, _ in pairs])
                    compared = list(zip(own, (features[name] for _, name in pairs)))
                    weights = args.task_weight, args.kd_weight, args.feature_weight
                    ones = torch.ones(len(z), device=run.device)
                    loss, terms = kd_loss(output, said, target, compared, ones, *weights)
                    accelerator.backward(loss)
                    run.add(loss=loss, loss_task=terms[0], loss_kd=terms[1], loss_feature=terms[2])
                    for name, zero in zeros.items():
                        parameters[name].grad.masked_fill_(zero, 0.0)
                    clip(run, optimizer, parameters)
                    update(run, optimizer, parameters, ema)
            run.count(lr=learning_rate)
            if run.validates():
                with ema.applied(parameters):
                    preview(run, pipeline, pipeline.scheduler, shown)
            run.save(now=run.step == end)

        if run.step < end:
            where = f"in round {number + 1} of {args.iterative}"
            goes_on = "--resume_from_checkpoint latest, with a larger number or without it, goes on to final/."
            return run.end(f"Ended by --max_train_steps {where}: {goes_on}", done=False)
        become_average(run, parameters, ema)  # it is the round's result, and what the next one prunes
        pipeline.unet = whole(run, unet, everywhere=True).requires_grad_(False)
        run.skeletons.clear()
        tap.close(), teacher_tap.close()

    manifest = make_manifest(args, run, parent, models, planned, pipeline)
    notes = card_notes(args, run, planned, pipeline)
    parts = {c: getattr(pipeline, c) for c in [*planned, *["unet"] * bool(args.finetune_steps)]}
    save_student(run, parts, pipeline.scheduler, contract, "Pruned pipeline", notes, manifest=manifest)
    skip = layers_left(args, pipeline, captions, contract)
    export(run, backend=args.int8_backend, skip=skip, activations=args.fp8_activations)
    report(args, run, dataset, planned, contract, manifest, pipeline)
    run.end()


def layers_left(args, pipeline, captions, contract):
    """Names of the --int8_skip layers whose INT8 weights do most to the output of the UNet or transformer."""
    if not args.int8_skip:
        return []
    denoiser = "unet" if hasattr(pipeline, "unet") else "transformer"
    calls = calibrate(args, pipeline, [denoiser], captions, contract)[denoiser][""]
    errors = quantization.sensitivity(getattr(pipeline, denoiser), few_of(calls))
    return [f"{denoiser}.{layer}" for layer in quantization.worst(errors, args.int8_skip)]


def report(args, run, dataset, planned, contract, manifest, pipeline):
    """report.json, report.md and grid.png beside final/: the original, final/ and its export, by the main process."""
    if run.accelerator.is_main_process:
        written = ["final", *(f"final-{kind}" for kind in args.export or ())]
        sources = [{"path": args.pretrained_model_name_or_path, "revision": args.revision, "variant": args.variant}]
        sources += [{"path": str(run.folder / name)} for name in written]
        sparse = args.method == "magnitude"
        told = {
            "title": f"{args.method.capitalize()} pruning of {args.pretrained_model_name_or_path}",
            "arguments": vars(args),
            "held_out_split": SPLIT if args.dataset_name == "shapes" else None,
            "layers": {c: layers_kept(entry) for c, entry in manifest["pruned"].items()},
            "sensitivity": run.state.get("errors", {}),
            "sparsity": {c: channels.sparsity(getattr(pipeline, c)) for c in planned} if sparse else {},
            "untouched": {c: channels.untouched(getattr(pipeline, c)) for c in planned},
        }
        captions = judged_captions(args, dataset)
        write_report(run, sources, captions, contract, list(planned), told)
        if args.lora_dir:
            smallest, original = load_pipeline(**sources[-1]), load_pipeline(**sources[0])
            steps = contract["steps"] or args.eval_inference_steps
            found = check_loras(
                smallest.to(run.device),
                args.lora_dir,
                manifest,
                captions[:LORA_PROMPTS] or ["a photo"],
                steps,
                contract["guidance_scale"],
                args.resolution,
                args.seed,
                original.to(run.device),
                run.folder,
            )
            print_table(rows_of(found), lora_check.TABLE)
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    run_script(main, parse_args())
