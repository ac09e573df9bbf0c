"""Train a smaller UNet on its teacher's outputs and features (BK-SDM, arXiv:2305.15798, eq. 1-4).

Two UNets see the same noisy latents z_t = alpha_t x + sigma_t eps: the teacher, frozen, and the student, which
prepare_unet_small.py cut out of it. With f_k the pairs of features that the student's compression.json names:

    L = w_task |o_s - o|^2 + alpha w_kd |o_s - o_T|^2 + w_feat sum_k |f_k^s - f_k^T|^2 / |f_k^T|^2

o_s is the student's output, o_T the teacher's, o what a right model says: the noise eps (or v). alpha goes linearly
from --kd_alpha_start to --kd_alpha_end over the run. Where widths differ, a learned 1x1 projection P_k f_k^s is
compared.

    accelerate launch train_student_kd.py --student_model out/tiny
    accelerate launch --multi_gpu --num_processes 8 train_student_kd.py --student_model out/sd_small --data_dir coco \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed_precision bf16

Run the same command with --resume_from_checkpoint latest to go on after a stop. Writes
<output_dir>/[<run_name>/]checkpoint-N/ and final/, a whole pipeline folder with the averaged student in it.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env, set_seed
from tqdm.auto import tqdm

from common import arguments
from common.arguments import weight
from common.checkpoint import (
    FinalFolder,
    check_same_run,
    find_checkpoint,
    load_checkpoint,
    make_folder,
    refuse_other_run,
    save_checkpoint,
)
from common.compression import students
from common.conditioning import encode_empty_prompt, encode_images, encode_prompts, is_sdxl, predict
from common.contract import TINY_SD, read_distillation, write_distillation
from common.data import build_dataloader, load_dataset_from_args
from common.diffusion import NoiseSchedule
from common.ema import EMA, copy_tensors
from common.errors import UsageError
from common.hooks import FeatureTap, register_checkpoint_hooks
from common.judging.evaluation import Evaluation, add_evaluation_arguments, better, check_evaluation
from common.judging.previews import log_images, sample_images
from common.outputs import write_model_card
from common.pipelines import check_compatible, load_pipeline, read_pipeline_config, same_weights
from common.randomness import sample_generator
from common.run import StopSignal
from common.schedulers import ddim_scheduler, student_timesteps

BEST = "best.json"  # in a checkpoint: {"metric", "value", "step"} of the best evaluation so far


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_data_arguments(parser)
    add = parser.add_argument_group("method").add_argument
    add(
        "--student_model",
        help="student pipeline: a folder that prepare_unet_small.py or this script wrote (default: "
        "sd_small of the teacher, written to <output_dir>/student)",
    )
    add(
        "--task_weight",
        type=weight,
        help="weight of the error against the noise in the data (default: 1; 0 with "
        "--random_latents, and for a teacher whose guidance is baked in)",
    )
    add("--kd_weight", type=weight, default=1.0, help="weight of the error against the teacher's output")
    add("--feature_weight", type=weight, default=1.0, help="weight of the features' error; 0 reads no features")
    add("--kd_alpha_start", type=weight, default=1.0, help="alpha, a factor of --kd_weight, at the first step")
    add("--kd_alpha_end", type=weight, default=0.5, help="alpha at the last step: linear in between")
    add("--caption_dropout_start", type=share, default=0.0, help="share of captions emptied at the first step")
    add(
        "--caption_dropout_end",
        type=share,
        help="share of captions emptied at the last step: linear in between (default: as at the start)",
    )
    add("--snr_gamma", type=arguments.positive_float, help="Min-SNR weighting of both output errors, such as 5")
    add(
        "--prediction_type",
        choices=("epsilon", "v_prediction"),
        help="what the student is to predict (default: what it does, which is as its teacher)",
    )
    add(
        "--chain_schedule",
        type=arguments.positive_int,
        nargs="+",
        help="lengths of the diffusion chain, such as 1000 500 250: equal shares of the run train on the timesteps of "
        "ever shorter chains, and the last one's are the output's (default: all timesteps)",
    )
    add("--random_latents", action="store_true", help="captions only: z ~ N(0, I) in place of noisy images")
    add("--teacher_cpu_offload", action="store_true", help="keep the teacher's UNet in the CPU's memory between uses")
    arguments.add_optimization_arguments(parser, learning_rate=5e-4, train_batch_size=32, max_train_steps=500)
    arguments.add_checkpoint_arguments(parser, output_dir="outputs/student_kd")
    arguments.add_validation_arguments(parser)
    add_evaluation_arguments(parser)
    arguments.add_runtime_arguments(parser)
    return parser.parse_args(argv)


def share(text):
    return 1.0 if float(text) == 1 else arguments.fraction(text)


def kd_loss(output, teacher_output, target, pairs, sample_weights, task_weight, kd_weight, feature_weight):
    """w_task |o_s - o|^2 + w_kd |o_s - o_T|^2 + w_feat sum_k |f_k^s - f_k^T|^2 / |f_k^T|^2: (loss, its three terms).

    output, teacher_output, target: o_s, o_T and o, (B, C, H, W), of one prediction type; kd_weight: alpha w_kd; target
    None: no task term. pairs: list of (f_k^s, f_k^T), (B, C_k, H_k, W_k) each; an error is relative to its own
    sample's teacher feature, or large features would dominate. sample_weights (B,): of the output errors, Min-SNR's or
    ones. Means over samples, in fp32; the terms are scalars without their weights.
    """
    task = output.new_zeros(()) if target is None else (output - target).square().mean(dim=(1, 2, 3))
    kd = (output - teacher_output).square().mean(dim=(1, 2, 3))
    features = output.new_zeros(())
    for student_feature, teacher_feature in pairs:
        student_feature, teacher_feature = student_feature.float().flatten(1), teacher_feature.float().flatten(1)
        error = (student_feature - teacher_feature).square().sum(dim=1)
        features = features + (error / teacher_feature.square().sum(dim=1).clamp(min=1e-12)).mean()
    task, kd = (sample_weights * task).mean(), (sample_weights * kd).mean()
    return task_weight * task + kd_weight * kd + feature_weight * features, (task, kd, features)


def min_snr_weights(schedule, timesteps, gamma):
    """Min-SNR weights (B,) of an error in the schedule's prediction type (Hang et al., 2303.09556); None: ones.

    min(SNR, gamma) of an error in x0, which is min(SNR, gamma) / SNR of one in eps and / (SNR + 1) of one in v.
    """
    if gamma is None:
        return torch.ones(len(timesteps), device=timesteps.device)
    snr = schedule.snr(timesteps).flatten()
    return snr.clamp(max=gamma) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[schedule.prediction_type]


def ramp(start, end, step, max_train_steps):
    """Linear from start at the first step (0) to end at the last one."""
    return start + (end - start) * step / max(max_train_steps - 1, 1)


def chain_index(step, max_train_steps, chains):
    """Which of so many chains `step` trains on: equal shares of the run."""
    return min(step * chains // max_train_steps, chains - 1)


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work."""
    if args.random_latents and args.task_weight:
        raise UsageError(
            f"--task_weight {args.task_weight:g}: --random_latents has no images, so no noise in them to "
            "predict: leave it out."
        )
    if args.task_weight == 0 and args.kd_weight * max(args.kd_alpha_start, args.kd_alpha_end) == 0:
        raise UsageError("--task_weight and --kd_weight (times its alpha) are both 0: nothing trains the output.")
    chain = args.chain_schedule or []
    if any(later >= earlier for earlier, later in zip(chain[:-1], chain[1:])):
        raise UsageError(f"--chain_schedule {' '.join(map(str, chain))}: every chain must be shorter than the last.")
    if chain and chain[0] > 1000:
        raise UsageError(f"--chain_schedule {chain[0]} is more than the model's 1000 timesteps.")
    # What `accelerate launch` was told reaches a script through the environment.
    cuda = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if args.use_8bit_adam and not cuda:
        raise UsageError("--use_8bit_adam needs a CUDA GPU: leave it out.")
    mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision == "fp16" and not cuda:
        raise UsageError("--mixed_precision fp16, here or at accelerate launch, needs a CUDA GPU: use bf16 or no.")


def teacher_contract(args):
    """The teacher's distillation.json, which is the student's too: how it is guided, and at which timesteps."""
    contract = read_distillation(args.pretrained_model_name_or_path)
    if contract["guidance"] == "embedded":
        raise UsageError(
            "the teacher takes its guidance scale as an input; this script distils an unconditional or "
            "cfg one: start from the model it was made of."
        )
    if contract.get("timesteps") and args.chain_schedule:
        raise UsageError("--chain_schedule: the teacher has timesteps of its own, for few steps, and no others.")
    return contract


def check_student(args):
    """Refuse, from its files alone, a student that can't learn from the teacher; returns its manifest."""
    manifest = read_manifest(args.student_model)
    check_compatible(args.student_model, "--student_model", args.pretrained_model_name_or_path, args.revision)
    if args.feature_weight and not manifest["feature_pairs"]:
        raise UsageError(f"--feature_weight: {args.student_model} names no feature_pairs: set it to 0.")
    return manifest


def prepare_student(folder, args):
    """The default student: sd_small of the teacher, as a pipeline folder beside the run."""
    pipeline = load_pipeline(args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant)
    pipeline.unet, manifest = students.build_student(pipeline.unet, variant="sd_small")
    students.save_untrained(folder, pipeline, manifest, args.pretrained_model_name_or_path)
    counts = manifest["parameters"]
    print(
        f"No --student_model: sd_small of the teacher, {counts['student']:,} of {counts['teacher']:,} parameters, "
        f"is in {folder}.",
        flush=True,
    )


class Student(torch.nn.Module):
    """The student UNet with the 1x1 projections of its features that are of other widths: what is trained, in one."""

    def __init__(self, unet, projections):
        super().__init__()
        self.unet, self.projections = unet, torch.nn.ModuleDict(projections)

    def forward(self, *inputs, **options):
        return self.unet(*inputs, **options)

    def features(self, tap, names):
        """The tapped features, projected, in fp32."""
        found = (tap.features[name].float() for name in names)
        keys = (name.replace(".", "_") for name in names)
        return [self.projections[key](f) if key in self.projections else f for key, f in zip(keys, found)]


@torch.no_grad()
def build_projections(tap, teacher_tap, pairs, args):
    """{name: 1x1 convolution} of the pairs of other widths, after a forward of both UNets. Raises UsageError.

    They start at zero: a random one would pull the student away from what it took over from its teacher.
    """
    projections = {}
    for name, teacher_name in pairs:
        own, theirs = tap.features[name].shape, teacher_tap.features[teacher_name].shape
        if own[2:] != theirs[2:]:
            raise UsageError(
                f"{Path(args.student_model) / MANIFEST}: the feature pair {name}, "
                f"{teacher_name} is of different sizes, {own[2:]} and {theirs[2:]}."
            )
        if own[1] != theirs[1]:
            projection = torch.nn.Conv2d(own[1], theirs[1], 1)
            torch.nn.init.zeros_(projection.weight)
            torch.nn.init.zeros_(projection.bias)
            projections[name.replace(".", "_")] = projection
    return projections


def draw(args, step, positions, shape, chain, dropout):
    """Per-sample randomness by global position: noise (B, *shape), timesteps of the chain (B,), emptied captions (B,).

    All are drawn whatever the options, so that none changes what another one draws.
    """
    noise, timesteps, dropped = [], [], []
    for position in positions:
        generator = sample_generator(args.seed, step, position)
        place, chance = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        timesteps.append(chain[int(place * len(chain))])
        dropped.append(chance < dropout)
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(noise), torch.tensor(timesteps), torch.tensor(dropped)


def save_pipeline(folder, args, average, manifest, scheduler, contract, notes):
    """final/ or best/: the student's pipeline with the averaged UNet in it, distillation.json, manifest, card."""
    pipeline = load_pipeline(args.student_model, flag="--student_model")  # the other parts as they were, not rounded
    weights = {name[len("unet.") :]: value for name, value in average.items() if name.startswith("unet.")}
    copy_tensors(weights, dict(pipeline.unet.named_parameters()))
    pipeline.scheduler = scheduler
    with FinalFolder(folder) as final:
        pipeline.save_pretrained(final)
        write_manifest(final, manifest)
        write_distillation(final, **contract)
        steps = f"num_inference_steps={contract['steps']}, " if contract["steps"] else ""
        write_model_card(
            final,
            "Smaller student",
            args.pretrained_model_name_or_path,
            usage=f"""
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
image = pipe("a prompt", {steps}guidance_scale={contract["guidance_scale"]:g}).images[0]""",
            notes={
                "method": "knowledge distillation of the UNet (BK-SDM)",
                "UNet": f"{manifest.get('variant') or 'narrower'}, widths {manifest.get('block_out_channels')}, "
                f"{sum(value.numel() for value in weights.values()):,} parameters",
                "weights of task, KD, features": f"{args.task_weight:g}, {args.kd_weight:g}, {args.feature_weight:g}",
                **notes,
            },
        )


def export_fp16(folder, args):
    """final-fp16/: the same pipeline in half precision; reloaded and compared."""
    final = Path(folder) / "final"
    pipeline = load_pipeline(final, torch.float16)
    with FinalFolder(Path(folder) / "final-fp16") as export:
        pipeline.save_pretrained(export)
        for name in ("distillation.json", MANIFEST, "README.md"):
            shutil.copy(final / name, export)
        if not same_weights(pipeline.unet, load_pipeline(export, torch.float16).unet):
            raise RuntimeError("the exported pipeline reloads with another UNet")


def main(args):
    check_arguments(args)
    arguments.check_tracker(args)
    if args.student_model and args.pretrained_model_name_or_path is None:
        parent = read_manifest(args.student_model).get("parent")
        if parent is not None and Path(parent).resolve() != TINY_SD:
            args.pretrained_model_name_or_path = parent  # the teacher that the student was cut out of
    arguments.use_embedded_default(args)
    contract = teacher_contract(args)
    if args.caption_dropout_end is None:
        args.caption_dropout_end = args.caption_dropout_start
    if args.task_weight is None:
        args.task_weight = 0.0 if args.random_latents or contract["guidance"] == "baked" else 1.0
        check_arguments(args)
    check_evaluation(args)
    _, native_resolution, factor = read_pipeline_config(args.pretrained_model_name_or_path, args.revision)
    args.resolution = args.resolution or native_resolution
    if args.resolution % factor:
        raise UsageError(f"--resolution {args.resolution} is not a multiple of {factor}, the VAE's factor.")
    if args.student_model:
        manifest = check_student(args)
    dataset = load_dataset_from_args(args, needs_images=not args.random_latents)
    folder = Path(args.output_dir) / (args.run_name or "")
    no_gpu = None if torch.accelerator.is_available() else True  # told so, accelerate joins several processes by gloo
    accelerator = Accelerator(
        cpu=no_gpu,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=folder,
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UsageError(
            "train_student_kd.py runs under DDP only: its average, checkpoints and features need whole "
            "weights on every GPU; launch it with accelerate_configs/multi_gpu.yaml."
        )
    global_batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    identity = {**arguments.resume_identity(args), "mixed_precision": accelerator.mixed_precision}

    # Where: refuse another run's folder, find the checkpoint to resume, on every rank alike, before models load.
    checkpoint = find_checkpoint(folder, args.resume_from_checkpoint)
    refuse_other_run(folder, checkpoint, args.overwrite_output_dir)
    step = check_same_run(checkpoint, identity, global_batch_size) if checkpoint else 0
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        make_folder(folder, checkpoint)
        if not checkpoint:
            shutil.rmtree(folder / "best", ignore_errors=True)
        if not args.student_model and not (checkpoint and (folder / "student").is_dir()):
            prepare_student(folder / "student", args)
    accelerator.wait_for_everyone()
    if not args.student_model:
        args.student_model = str(folder / "student")
        manifest = check_student(args)
    if args.resume_from_checkpoint:
        accelerator.print(
            f"Resuming from {checkpoint}." if checkpoint else f"No checkpoint in {folder}: a fresh start."
        )
    planned = planned_steps(checkpoint) if checkpoint else None
    changing = [
        flag
        for flag, changes in (
            (f"--lr_scheduler {args.lr_scheduler}", args.lr_scheduler != "constant"),
            ("--kd_alpha_end", args.kd_alpha_start != args.kd_alpha_end),
            ("--caption_dropout_end", args.caption_dropout_start != args.caption_dropout_end),
            ("--chain_schedule", len(args.chain_schedule or []) > 1),
        )
        if changes
    ]
    if changing and planned not in (None, args.max_train_steps):
        accelerator.print(
            f"warning: {', '.join(changing)} was planned for {planned} steps and now ends at {args.max_train_steps}: "
            f"from step {step} on everything is that of the new length."
        )
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    stop = StopSignal()
    set_seed(args.seed)

    # 1 frozen models, in the compute dtype
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    teacher_pipeline = load_pipeline(args.pretrained_model_name_or_path, dtype, args.revision, args.variant)
    pipeline = load_pipeline(args.student_model, flag="--student_model")
    for name, part in pipeline.components.items():
        if name != "unet" and isinstance(part, torch.nn.Module):
            # SDXL's VAE overflows in half precision.
            part.to(dtype=torch.float32 if name == "vae" and is_sdxl(pipeline) and dtype == torch.float16 else dtype)
    teacher, unet, vae = teacher_pipeline.unet, pipeline.unet, pipeline.vae
    texts = [name for name in pipeline.components if name.startswith("text_encoder")]
    one_text = all(same_weights(getattr(pipeline, name), getattr(teacher_pipeline, name)) for name in texts)
    shared = ["vae", *(texts if one_text else [])]  # in memory once
    teacher_pipeline.register_modules(**{name: getattr(pipeline, name) for name in shared})
    pipeline.to(accelerator.device)
    teacher_pipeline.to(accelerator.device)

    def teacher_to(device):
        if args.teacher_cpu_offload:
            teacher.to(device)

    teacher_schedule = NoiseSchedule(teacher_pipeline.scheduler, accelerator.device)
    scheduler = pipeline.scheduler
    if args.prediction_type:
        scheduler = type(scheduler).from_config(scheduler.config, prediction_type=args.prediction_type)
    lengths = args.chain_schedule or [teacher_schedule.num_train_timesteps]
    try:
        chains = [student_timesteps(ddim_scheduler(scheduler, length), length) for length in lengths]
    except ValueError as error:
        raise UsageError(f"--chain_schedule: {error}.") from None
    contract = {
        "method": "student_kd",
        "parent": args.pretrained_model_name_or_path,
        "steps": contract.get("steps"),
        "timesteps": contract.get("timesteps"),
        "guidance": contract["guidance"],
        "guidance_scale": contract["guidance_scale"],
        "target": contract.get("target"),
    }
    few_steps = bool(contract["timesteps"])  # the teacher knows no others
    if few_steps:
        chains = [contract["timesteps"]]
    elif args.chain_schedule:  # what the student was trained for at the end is how it is sampled
        scheduler = ddim_scheduler(scheduler, lengths[-1])
        contract.update(steps=lengths[-1], timesteps=chains[-1], target="next")
    schedule = NoiseSchedule(scheduler, accelerator.device)
    every = torch.arange(teacher_schedule.num_train_timesteps, device=accelerator.device)
    ours = schedule.alpha(torch.arange(schedule.num_train_timesteps, device=accelerator.device))
    if not torch.equal(ours, teacher_schedule.alpha(every)):
        raise UsageError(f"--student_model {args.student_model}: its noise schedule is not the teacher's.")
    if schedule.prediction_type == "epsilon" and ours.min() == 0:
        raise UsageError(
            "--prediction_type epsilon says nothing of the image at the zero terminal SNR that the "
            "teacher's scheduler has: use v_prediction."
        )
    unconditional = encode_empty_prompt(pipeline, args.resolution)
    teacher_unconditional = unconditional if one_text else encode_empty_prompt(teacher_pipeline, args.resolution)
    shape = (unet.config.in_channels, args.resolution // factor, args.resolution // factor)

    # 2 trainable models, in fp32
    pairs = manifest["feature_pairs"] if args.feature_weight else []
    names, teacher_names = [name for name, _ in pairs], [name for _, name in pairs]
    try:  # on the plain modules, before anything wraps them
        tap, teacher_tap = FeatureTap(unet, names), FeatureTap(teacher, teacher_names)
    except KeyError as error:
        file = Path(args.student_model) / MANIFEST
        raise UsageError(f"{file}: feature_pairs: {error.args[0]}.") from None
    with torch.no_grad(), accelerator.autocast():
        probe = torch.zeros(1, *shape, device=accelerator.device), every[:1]
        predict(unet, *probe, unconditional)
        predict(teacher, *probe, teacher_unconditional)
    teacher_to("cpu")
    student = Student(unet, build_projections(tap, teacher_tap, pairs, args)).to(accelerator.device)
    unet.requires_grad_(True)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.torch_compile:
        unet.compile()  # in place: parameter names stay those of the plain module
        teacher.compile()
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    ema = EMA(parameters, args.ema_decay)

    # 3 optimizer
    optimizer_class = partial(torch.optim.AdamW, fused=True)
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as optimizer_class
    optimizer = optimizer_class(
        parameters.values(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )

    # 4 prepare, register, resume
    plain = student
    student, optimizer = accelerator.prepare(student, optimizer)
    register_checkpoint_hooks(accelerator, {"student": parameters}, {"student": ema})
    best = None
    accelerator.register_save_state_pre_hook(
        lambda models, weights, where: (
            (Path(where) / BEST).write_text(json.dumps(best)) if accelerator.is_main_process else None
        )
    )
    if checkpoint:
        load_checkpoint(accelerator, checkpoint)
        ema.updates = step
        best = json.loads((checkpoint / BEST).read_text())

    # 5 data, from the step on that comes next; never prepared, its order depends on the global batch alone
    dataloader = iter(build_dataloader(dataset, args, accelerator, step))
    evaluation = Evaluation(args, accelerator) if args.eval_steps else None

    # 6 trackers
    if accelerator.log_with:
        config = {key: value if isinstance(value, int | float) else str(value) for key, value in vars(args).items()}
        accelerator.init_trackers("logs", config)

    # Samples during training: by the scheduler of the output where it is for few steps, else by trailing DDIM.
    sampling_steps = contract["steps"] or args.eval_inference_steps
    sampler = scheduler if contract["steps"] else ddim_scheduler(scheduler, sampling_steps)
    teacher_sampler = teacher_pipeline.scheduler
    teacher_sampler = teacher_sampler if few_steps else ddim_scheduler(teacher_sampler, sampling_steps)
    guidance_scale = contract["guidance_scale"]

    def validate():
        if accelerator.is_main_process:
            with ema.applied(parameters), accelerator.autocast():
                rows = sample_images(
                    pipeline,
                    args.validation_prompts,
                    sampler,
                    sampling_steps,
                    guidance_scale,
                    args.resolution,
                    args.seed,
                    args.num_validation_images,
                )
            log_images(accelerator, folder, rows, args.validation_prompts, step)
        accelerator.wait_for_everyone()

    def evaluate():
        """Judge the averaged student; keep it in best/ where it is the best so far."""
        nonlocal best
        with accelerator.autocast():
            if args.lpips_trunk_path and evaluation.teacher_images is None:
                teacher_to(accelerator.device)
                evaluation.teacher_images = evaluation.images(
                    accelerator, teacher_pipeline, teacher_sampler, sampling_steps, guidance_scale
                )
                teacher_to("cpu")
            with ema.applied(parameters):
                images = evaluation.images(accelerator, pipeline, sampler, sampling_steps, guidance_scale)
        if accelerator.is_main_process:
            figures = evaluation.report(accelerator, images, step)
            known, best = best, better(best, figures, step)
            if best != known:
                notes = {f"{name}, {evaluation.count} images": f"{value:.4f}" for name, value in figures.items()}
                notes["optimizer steps"] = step
                save_pipeline(folder / "best", args, ema.shadow, manifest, scheduler, contract, notes)
        accelerator.wait_for_everyone()

    def save():
        save_checkpoint(
            accelerator, folder, step, identity, global_batch_size, args.max_train_steps, args.checkpoints_total_limit
        )

    bar = tqdm(total=args.max_train_steps, initial=step, desc="steps", disable=not accelerator.is_local_main_process)
    while step < args.max_train_steps:
        learning_rate = arguments.learning_rate_at(step, args)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        alpha = ramp(args.kd_alpha_start, args.kd_alpha_end, step, args.max_train_steps)
        dropout = ramp(args.caption_dropout_start, args.caption_dropout_end, step, args.max_train_steps)
        chain = chains[chain_index(step, args.max_train_steps, len(chains))]
        step_losses = torch.zeros(4, device=accelerator.device)
        for _ in range(args.gradient_accumulation_steps):
            batch = next(dataloader)
            with accelerator.accumulate(student):
                drawn = draw(args, batch["step"], batch["positions"], shape, chain, dropout)
                noise, timesteps, dropped = (x.to(accelerator.device) for x in drawn)
                conditioning = encode_prompts(pipeline, batch["captions"], args.resolution)
                conditioning = conditioning.where(dropped, unconditional)
                teacher_conditioning = conditioning
                teacher_to(accelerator.device)
                if not one_text:
                    teacher_conditioning = encode_prompts(teacher_pipeline, batch["captions"], args.resolution)
                    teacher_conditioning = teacher_conditioning.where(dropped, teacher_unconditional)
                z, target = noise, None  # --random_latents: alpha x + sigma eps is N(0, I) where x is
                if not args.random_latents:
                    latents = encode_images(vae, batch["pixel_values"])
                    z = schedule.add_noise(latents, noise, timesteps)
                    target = schedule.target(latents, noise, timesteps) if args.task_weight else None
                    if target is None:  # sampling starts from pure noise, and the teacher knows what to do there
                        pure = (timesteps == schedule.num_train_timesteps - 1).view(-1, 1, 1, 1)
                        z = torch.where(pure, noise, z)
                with torch.no_grad(), accelerator.autocast():
                    teacher_output = predict(teacher, z, timesteps, teacher_conditioning)
                teacher_to("cpu")
                teacher_output = teacher_schedule.convert(teacher_output, z, timesteps, schedule.prediction_type)

                with accelerator.autocast():
                    output = predict(student, z, timesteps, conditioning)
                teacher_features = [teacher_tap.features[name] for name in teacher_names]
                loss, terms = kd_loss(
                    output,
                    teacher_output,
                    target,
                    list(zip(plain.features(tap, names), teacher_features)),
                    min_snr_weights(schedule, timesteps, args.snr_gamma),
                    args.task_weight,
                    alpha * args.kd_weight,
                    args.feature_weight,
                )
                accelerator.backward(loss)
                step_losses += torch.stack([loss, *terms]).detach() / args.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    without = [name for name, p in parameters.items() if p.grad is None]
                    if without:
                        raise RuntimeError(
                            f"{len(without)} trainable parameters got no gradient, such as {without[0]}"
                        )
                    grad_norm = accelerator.clip_grad_norm_(parameters.values(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        ema.step(parameters)
        step += 1
        bar.update()

        losses = accelerator.reduce(step_losses, reduction="mean").tolist()
        logs = dict(zip(("loss", "loss_task", "loss_kd", "loss_feature"), losses), grad_norm=grad_norm.item())
        bar.set_postfix(loss=f"{logs['loss']:.4f}", grad_norm=f"{logs['grad_norm']:.2f}")
        state = {"lr": learning_rate, "kd_alpha": alpha, "caption_dropout": dropout, "chain_length": len(chain)}
        accelerator.log({**logs, **state}, step=step)
        if args.validation_prompts and step % args.validation_steps == 0:
            validate()
        if args.eval_steps and step % args.eval_steps == 0:
            evaluate()
        if stop.requested(accelerator) and step < args.max_train_steps:
            save()
            accelerator.print(f"Stopped by a signal after step {step}; --resume_from_checkpoint latest goes on.")
            accelerator.end_training()
            return
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            save()
    bar.close()

    if accelerator.is_main_process:
        save_pipeline(folder / "final", args, ema.shadow, manifest, scheduler, contract, {"optimizer steps": step})
        if args.export:
            export_fp16(folder, args)
        print(f"Done: {folder / 'final'}", flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    args = parse_args()
    arguments.run_script(main, args)
