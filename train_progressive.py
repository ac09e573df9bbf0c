"""Halve the steps of a teacher again and again: progressive distillation (Salimans & Ho, arXiv:2202.00512).

A stage makes a student of N / 2 steps out of a teacher of N. From a timestep t of the student's own trailing schedule
the teacher takes two DDIM steps, through the mid-point m to the student's next timestep s; the student learns to get
there in one. With z_t = alpha_t x + sigma_t eps (pure noise at the last training timestep, where sampling starts):

    z_s = DDIM(DDIM(z_t : t -> m) : m -> s)                                        teacher, two steps
    x~  = (z_s - (sigma_s / sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)    eq. (8): DDIM(z_t, x~) = z_s
    L   = |v^ - v~|^2 = |x^ - x~|^2 / sigma_t^2    or, --loss_space x,    max(SNR, 1) |x^ - x~|^2      eq. (9), (10)

The student, which starts as its teacher, is the next stage's teacher. Classifier-free guidance goes into the first
halving, and no later one; a teacher that has its guidance inside (train_guided.py) is never guided again.

    accelerate launch train_progressive.py --start_steps 32 --end_steps 4
    accelerate launch --multi_gpu --num_processes 8 train_progressive.py --data_dir coco --start_steps 512 \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed_precision bf16 \\
        --steps_per_stage 50000 --last_stages_steps 100000 --learning_rate 1e-4

Run the same command with --resume_from_checkpoint latest to go on after a stop, in whatever stage. Writes
<output_dir>/[<run_name>/]checkpoint-N/, a stage-<steps>/ after each stage and final/: whole pipelines, or LoRAs.
"""

import argparse
import json
import os
import shutil
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env, set_seed
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from tqdm.auto import tqdm

from common import arguments
from common.checkpoint import (
    FinalFolder,
    check_same_run,
    find_checkpoint,
    load_checkpoint,
    make_folder,
    refuse_other_run,
    save_checkpoint,
)
from common.conditioning import (
    encode_empty_prompt,
    encode_images,
    encode_prompts,
    guidance_embedding,
    is_sdxl,
    predict,
    predict_guided,
)
from common.contract import read_distillation, write_distillation
from common.data import build_dataloader, load_dataset_from_args
from common.diffusion import NoiseSchedule
from common.ema import EMA, copy_tensors
from common.errors import UsageError
from common.hooks import register_checkpoint_hooks
from common.judging.previews import log_images, sample_images
from common.outputs import write_model_card
from common.pipelines import load_pipeline, read_pipeline_config, same_weights
from common.randomness import sample_generator
from common.run import StopSignal
from common.schedulers import ddim_scheduler, student_timesteps


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_data_arguments(parser)
    add = parser.add_argument_group("method").add_argument
    add(
        "--start_steps",
        type=arguments.positive_int,
        default=64,
        help="steps of the first teacher: --end_steps times a power of two, at most 1000",
    )
    add("--end_steps", type=arguments.positive_int, default=4, help="steps of the last student")
    add("--steps_per_stage", type=arguments.positive_int, default=200, help="optimizer steps of a stage")
    add(
        "--last_stages_steps",
        type=arguments.positive_int,
        nargs="+",
        help="optimizer steps of each of the last two "
        "stages, which have the most to learn; several numbers: one for each of the last stages "
        "(default: --steps_per_stage)",
    )
    add(
        "--guidance_scale",
        type=float,
        help="teacher's guidance in the first halving (default: what it was saved with, else 7.5)",
    )
    add(
        "--guidance_min",
        type=float,
        default=1.0,
        help="with a teacher that takes its guidance scale as an input: least scale drawn",
    )
    add("--guidance_max", type=float, default=8.0, help="with such a teacher: largest scale drawn")
    add(
        "--loss_space",
        choices=("v", "x"),
        default="v",
        help="the error is taken in v, or in x0 with weight max(SNR, 1)",
    )
    add("--lora_rank", type=arguments.positive_int, help="train a LoRA of this rank (default: the whole UNet)")
    add("--lora_alpha", type=arguments.positive_float, default=32, help="scale of the adapters is alpha / rank")
    add("--lora_targets", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0"], help="UNet layers to adapt")
    arguments.add_optimization_arguments(parser, learning_rate=1e-4, train_batch_size=32, max_train_steps=None)
    arguments.add_checkpoint_arguments(parser, output_dir="outputs/progressive")
    arguments.add_validation_arguments(parser)
    arguments.add_runtime_arguments(parser)
    # Every stage starts from what works: without a warm-up Adam's first steps, all of full length, would spoil it.
    parser.set_defaults(lr_scheduler="linear", lr_warmup_steps=20, ema_decay=0.99)
    return parser.parse_args(argv)


def progressive_loss(output, z, timesteps, z_next, next_timesteps, schedule, loss_space="v"):
    """Distance of the student's one DDIM step from the teacher's two, as an error in v or x0 (eq. 8-10). Scalar.

    output: student's model output at (z, timesteps), (B, C, H, W); z_next: the teacher's latents at next_timesteps
    (-1: the clean end, where x~ is z_next itself). A v error is an x0 error over sigma_t^2, so "v" weights x0 errors
    with SNR + 1; "x" with max(SNR, 1), the truncated SNR. In fp32 throughout.
    """
    error = schedule.to_x0(output, z, timesteps) - schedule.x0_of_step(z_next, z, timesteps, next_timesteps)
    snr = schedule.snr(timesteps).flatten()
    weights = snr + 1 if loss_space == "v" else snr.clamp(min=1)
    return (weights * error.square().mean(dim=(1, 2, 3))).mean()


def student_steps(start_steps, end_steps):
    """Step counts of the students, stage by stage: [start / 2, ..., end]. Raises UsageError."""
    found = [end_steps]
    while 2 * found[0] < start_steps:
        found.insert(0, 2 * found[0])
    if 2 * found[0] != start_steps:
        raise UsageError(
            f"--start_steps {start_steps} is not --end_steps {end_steps} times a power of two: every "
            "stage halves the steps."
        )
    return found


def stage_grid(scheduler, teacher_steps, device="cpu"):
    """(timesteps, mid-points, next timesteps) of a student with half of the teacher's steps: long (N / 2,) each.

    The student's are those of the scheduler that will be saved with it; -1 is the clean end.
    """
    timesteps = student_timesteps(ddim_scheduler(scheduler, teacher_steps // 2), teacher_steps // 2)
    between = student_timesteps(ddim_scheduler(scheduler, teacher_steps), teacher_steps)[1::2]
    return [torch.tensor(times, device=device) for times in (timesteps, between, [*timesteps[1:], -1])]


def stage_lengths(args, stages):
    """Optimizer steps of every stage, a list as long as stages. Raises UsageError."""
    last = args.last_stages_steps or [args.steps_per_stage]
    if len(last) == 1:
        last = last * min(2, stages)
    if len(last) > stages:
        raise UsageError(
            f"--last_stages_steps has {len(last)} numbers; from --start_steps {args.start_steps} to "
            f"--end_steps {args.end_steps} there are {stages} stages."
        )
    return [args.steps_per_stage] * (stages - len(last)) + last


def stage_at(step, lengths):
    """(stage, step within it) of optimizer step `step`; (number of stages, 0) after the last one."""
    stage = 0
    while stage < len(lengths) and step >= lengths[stage]:
        step -= lengths[stage]
        stage += 1
    return stage, step


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work; returns the students' step counts and optimizer steps."""
    if args.start_steps > 1000:
        raise UsageError(f"--start_steps {args.start_steps} is more than the model's 1000 timesteps.")
    if args.start_steps <= args.end_steps:
        raise UsageError(f"--start_steps {args.start_steps} is not more than --end_steps {args.end_steps}.")
    if args.guidance_scale is not None and args.guidance_scale < 0:
        raise UsageError(f"--guidance_scale {args.guidance_scale} is negative.")
    if not 0 <= args.guidance_min <= args.guidance_max:
        raise UsageError(f"--guidance_min {args.guidance_min:g} is not in [0, --guidance_max {args.guidance_max:g}].")
    # What `accelerate launch` was told reaches a script through the environment.
    cuda = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if args.use_8bit_adam and not cuda:
        raise UsageError("--use_8bit_adam needs a CUDA GPU: leave it out.")
    mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision == "fp16" and not cuda:
        raise UsageError("--mixed_precision fp16, here or at accelerate launch, needs a CUDA GPU: use bf16 or no.")
    students = student_steps(args.start_steps, args.end_steps)
    return students, stage_lengths(args, len(students))


def teacher_contract(args):
    """The teacher's distillation.json, with guidance_scale as it is guided in the first stage. Raises UsageError."""
    contract = read_distillation(args.pretrained_model_name_or_path)
    if contract.get("target") == "x0":
        raise UsageError(
            "the teacher predicts and re-noises; this script halves the steps of a deterministic "
            "sampler: start from the model it was made of."
        )
    if contract.get("steps") not in (None, args.start_steps):
        raise UsageError(
            f"--start_steps {args.start_steps}: the teacher was made for {contract['steps']} steps, so "
            f"start with {contract['steps']}."
        )
    if contract["guidance"] == "baked" and args.guidance_scale not in (None, 1):
        raise UsageError(f"--guidance_scale {args.guidance_scale}: the teacher has its guidance baked in already.")
    if contract["guidance"] == "embedded" and args.guidance_scale is not None:
        raise UsageError(
            "--guidance_scale: the teacher takes its guidance scale as an input; --guidance_min and "
            "--guidance_max say which scales are drawn."
        )
    if args.guidance_scale is not None:
        contract["guidance_scale"] = args.guidance_scale
    return contract


def draw(args, step, positions, latents, num_timesteps):
    """Per-sample randomness by global position: noise like latents, indices into the student's timesteps (B,), and
    guidance scales (B,). All are drawn whatever the options, so that none changes what another one draws."""
    noise, slots, scales = [], [], []
    for position in positions:
        generator = sample_generator(args.seed, step, position)
        slots.append(torch.randint(num_timesteps, (), generator=generator))
        place = torch.rand((), generator=generator)
        scales.append(args.guidance_min + (args.guidance_max - args.guidance_min) * place)
        noise.append(torch.randn(latents.shape[1:], generator=generator))
    return torch.stack(noise).to(latents.device), torch.stack(slots).to(latents.device), torch.stack(scales)


def save_student(folder, args, average, scheduler, contract, step):
    """stage-<steps>/ or final/: the averaged student as a pipeline or LoRA, scheduler, distillation.json, card."""
    parent = args.pretrained_model_name_or_path
    pipeline = load_pipeline(parent, revision=args.revision, variant=args.variant)  # the other parts not rounded
    unet, name = pipeline.unet, type(scheduler).__name__
    if args.lora_rank:
        unet.add_adapter(lora_config(args))
    copy_tensors(average, {key: p for key, p in unet.named_parameters() if key in average})
    pipeline.scheduler = scheduler
    with FinalFolder(folder) as final:
        load = 'pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")'
        if args.lora_rank:
            # Without the adapter metadata a reload would forget alpha and scale the LoRA by 1.
            type(pipeline).save_lora_weights(
                final,
                unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
                unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
            )
            scheduler.save_pretrained(final / "scheduler")
            load = f"""pipe = DiffusionPipeline.from_pretrained("{parent}")
pipe.load_lora_weights("path/to/this/folder")
pipe.scheduler = {name}.from_pretrained("path/to/this/folder", subfolder="scheduler")"""
        else:
            pipeline.save_pretrained(final)
        write_distillation(final, **contract)
        imports = f"DiffusionPipeline, {name}" if args.lora_rank else "DiffusionPipeline"
        call = f"num_inference_steps={contract['steps']}, guidance_scale={contract['guidance_scale']:g}"
        write_model_card(
            final,
            "Few-step LoRA" if args.lora_rank else "Few-step student",
            parent,
            lora=bool(args.lora_rank),
            usage=f"""
from diffusers import {imports}

{load}
image = pipe("a prompt", {call}).images[0]""",
            notes={
                "method": f"progressive distillation from {args.start_steps} steps, loss in {args.loss_space}",
                "steps": f"{contract['steps']}, at timesteps {contract['timesteps']}",
                "optimizer steps": step,
            },
        )


def lora_config(args):
    return LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=args.lora_targets)


def merged_teacher(args, lora, dtype, device):
    """The frozen UNet of a later stage's teacher: the first teacher's with the LoRA, a dict of tensors as the student
    names them, merged into its weights in fp32, so that it costs no more than the first."""
    unet = UNet2DConditionModel.from_pretrained(
        args.pretrained_model_name_or_path,
        subfolder="unet",
        revision=args.revision,
        variant=args.variant,
        torch_dtype=torch.float32,
        use_safetensors=True,
    )
    unet.add_adapter(lora_config(args))
    copy_tensors(lora, {name: p for name, p in unet.named_parameters() if name in lora})
    unet.fuse_lora()
    unet.unload_lora()
    if args.torch_compile:
        unet.compile()
    return unet.requires_grad_(False).eval().to(device, dtype)


def export_fp16(folder, args):
    """final-fp16/: final/ as a whole pipeline in half precision, a LoRA fused in; reloaded and compared."""
    final = Path(folder) / "final"
    pipeline = load_pipeline(args.pretrained_model_name_or_path if args.lora_rank else final, revision=args.revision)
    if args.lora_rank:
        pipeline.load_lora_weights(final)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        steps = json.loads((final / "distillation.json").read_text())["steps"]
        pipeline.scheduler = ddim_scheduler(pipeline.scheduler, steps)
    pipeline.to(dtype=torch.float16)
    with FinalFolder(Path(folder) / "final-fp16") as export:
        pipeline.save_pretrained(export)
        for name in ("distillation.json", "README.md"):
            shutil.copy(final / name, export)
        if not same_weights(pipeline.unet, load_pipeline(export, torch.float16).unet):
            raise RuntimeError("the exported pipeline reloads with another UNet")


def main(args):
    students, lengths = check_arguments(args)
    args.max_train_steps = sum(lengths)
    arguments.check_tracker(args)
    arguments.use_embedded_default(args)
    contract = teacher_contract(args)
    embedded = contract["guidance"] == "embedded"
    first_guidance_scale = contract["guidance_scale"] if contract["guidance"] == "cfg" else 1.0
    # From the first student on guidance is inside the weights.
    contract = {
        "method": "progressive",
        "parent": args.pretrained_model_name_or_path,
        "target": "next",
        "guidance": "embedded" if embedded else "baked",
        "guidance_scale": contract["guidance_scale"] if embedded else 1.0,
    }
    _, native_resolution, factor = read_pipeline_config(args.pretrained_model_name_or_path, args.revision)
    args.resolution = args.resolution or native_resolution
    if args.resolution % factor:
        raise UsageError(f"--resolution {args.resolution} is not a multiple of {factor}, the VAE's factor.")
    dataset = load_dataset_from_args(args)
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
            "train_progressive.py runs under DDP only: its average, checkpoints and next teacher need "
            "whole weights on every GPU; launch it with accelerate_configs/multi_gpu.yaml."
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
            for stale in folder.glob("stage-*"):
                shutil.rmtree(stale)
    accelerator.wait_for_everyone()
    if args.resume_from_checkpoint:
        accelerator.print(
            f"Resuming from {checkpoint}." if checkpoint else f"No checkpoint in {folder}: a fresh start."
        )
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    stop = StopSignal()
    set_seed(args.seed)  # the LoRA's initialisation; nothing after it draws a global random number

    # 1 frozen models, in the compute dtype
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipeline = load_pipeline(args.pretrained_model_name_or_path, dtype, args.revision, args.variant)
    teacher, vae = pipeline.unet, pipeline.vae
    if is_sdxl(pipeline) and dtype == torch.float16:
        vae.to(dtype=torch.float32)  # SDXL's VAE overflows in half precision
    schedule = NoiseSchedule(pipeline.scheduler, accelerator.device)
    unet = load_pipeline(args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant).unet

    # 2 trainable models, in fp32. A stage's result becomes the next teacher parameter by parameter, or, a LoRA, merged
    # into the first teacher; checkpoints then hold the LoRA alone.
    if args.lora_rank:
        names = [name for name, _ in unet.named_modules()]
        for target in args.lora_targets:  # peft ignores one that matches nothing beside one that does
            if not any(f".{name}".endswith(f".{target}") for name in names):
                raise UsageError(f"--lora_targets {target}: the UNet has no layer of that name.")
        try:
            unet.add_adapter(lora_config(args))
        except ValueError as error:
            raise UsageError(f"--lora_targets: {str(error).splitlines()[0]}") from None
    else:
        unet.requires_grad_(True)
    pipeline.unet = unet
    pipeline.to(accelerator.device)
    teacher.to(accelerator.device)
    unconditional = encode_empty_prompt(pipeline, args.resolution)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.torch_compile:
        unet.compile()  # in place: parameter names stay those of the plain module
        teacher.compile()
    parameters = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    if args.lora_rank:
        teacher_parameters = {name: p.detach().clone() for name, p in parameters.items()}
    else:
        teacher_parameters = dict(teacher.named_parameters())
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
    student, optimizer = accelerator.prepare(unet, optimizer)
    register_checkpoint_hooks(accelerator, {"student": parameters, "teacher": teacher_parameters}, {"student": ema})
    stage, inside = stage_at(step, lengths)
    if checkpoint:
        load_checkpoint(accelerator, checkpoint)
        ema.updates = inside
        if args.lora_rank and stage > 0:
            teacher = merged_teacher(args, teacher_parameters, dtype, accelerator.device)

    # 5 data, from the step on that comes next; never prepared, its order depends on the global batch alone
    dataloader = iter(build_dataloader(dataset, args, accelerator, step))

    # 6 trackers
    if accelerator.log_with:
        config = {key: value if isinstance(value, int | float) else str(value) for key, value in vars(args).items()}
        accelerator.init_trackers("logs", config)

    def validate(num_steps):
        if accelerator.is_main_process:
            with ema.applied(parameters), accelerator.autocast():
                rows = sample_images(
                    pipeline,
                    args.validation_prompts,
                    ddim_scheduler(pipeline.scheduler, num_steps),
                    num_steps,
                    contract["guidance_scale"],
                    args.resolution,
                    args.seed,
                    args.num_validation_images,
                )
            log_images(accelerator, folder, rows, args.validation_prompts, step)
        accelerator.wait_for_everyone()

    def save():
        save_checkpoint(
            accelerator, folder, step, identity, global_batch_size, args.max_train_steps, args.checkpoints_total_limit
        )

    def finish_stage():
        """Save the stage's student, and make it the next stage's teacher and start."""
        nonlocal teacher
        if accelerator.is_main_process:
            scheduler = ddim_scheduler(pipeline.scheduler, students[stage])
            times = {"steps": students[stage], "timesteps": student_timesteps(scheduler, students[stage])}
            save_student(folder / f"stage-{students[stage]}", args, ema.shadow, scheduler, {**contract, **times}, step)
        copy_tensors(ema.shadow, teacher_parameters)
        copy_tensors(ema.shadow, parameters)
        if args.lora_rank and stage + 1 < len(students):
            teacher = None  # frees its memory first
            teacher = merged_teacher(args, teacher_parameters, dtype, accelerator.device)
        ema.updates = 0
        optimizer.state.clear()
        accelerator.wait_for_everyone()

    bar = tqdm(total=args.max_train_steps, initial=step, desc="steps", disable=not accelerator.is_local_main_process)
    while stage < len(students):
        num_steps = students[stage]
        bar.set_description(f"{2 * num_steps} -> {num_steps} steps")
        grid = stage_grid(pipeline.scheduler, 2 * num_steps, accelerator.device)
        guidance_scale = first_guidance_scale if stage == 0 else 1.0
        annealed = argparse.Namespace(**{**vars(args), "max_train_steps": lengths[stage]})
        while inside < lengths[stage]:
            learning_rate = arguments.learning_rate_at(inside, annealed)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            step_loss = torch.zeros((), device=accelerator.device)
            for _ in range(args.gradient_accumulation_steps):
                batch = next(dataloader)
                with accelerator.accumulate(student):
                    conditioning = encode_prompts(pipeline, batch["captions"], args.resolution)
                    if num_steps > 1:
                        latents = encode_images(vae, batch["pixel_values"])
                    else:  # from pure noise alone, whatever the images
                        shape = len(batch["captions"]), unet.config.in_channels, *[args.resolution // factor] * 2
                        latents = torch.zeros(shape, device=accelerator.device)
                    noise, slots, scales = draw(args, batch["step"], batch["positions"], latents, num_steps)
                    timesteps, mid_timesteps, next_timesteps = (times[slots] for times in grid)
                    timestep_cond = None
                    if embedded:
                        timestep_cond = guidance_embedding(pipeline, scales, unet.config.time_cond_proj_dim)
                        timestep_cond = timestep_cond.to(latents.device, dtype)
                    z = schedule.add_noise(latents, noise, timesteps)
                    pure = (timesteps == schedule.num_train_timesteps - 1).view(-1, 1, 1, 1)
                    z = torch.where(pure, noise, z)

                    def teach(z, timesteps, next_timesteps):
                        if guidance_scale != 1:
                            output = predict_guided(teacher, z, timesteps, conditioning, unconditional, guidance_scale)
                        else:
                            output = predict(teacher, z, timesteps, conditioning, timestep_cond)
                        return schedule.ddim_step(output, z, timesteps, next_timesteps)

                    with torch.no_grad(), accelerator.autocast():
                        z_mid = teach(z, timesteps, mid_timesteps)
                        z_next = teach(z_mid, mid_timesteps, next_timesteps)

                    with accelerator.autocast():
                        output = predict(student, z, timesteps, conditioning, timestep_cond)
                    loss = progressive_loss(output, z, timesteps, z_next, next_timesteps, schedule, args.loss_space)
                    accelerator.backward(loss)
                    step_loss += loss.detach() / args.gradient_accumulation_steps
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
            step, inside = step + 1, inside + 1
            bar.update()

            logs = {"loss": accelerator.reduce(step_loss, reduction="mean").item(), "grad_norm": grad_norm.item()}
            bar.set_postfix(loss=f"{logs['loss']:.4f}", grad_norm=f"{logs['grad_norm']:.2f}")
            accelerator.log({**logs, "lr": learning_rate, "student_steps": num_steps}, step=step)
            if args.validation_prompts and step % args.validation_steps == 0:
                validate(num_steps)
            if inside == lengths[stage]:
                finish_stage()
                save()
            elif stop.requested(accelerator):
                save()
                accelerator.print(f"Stopped by a signal after step {step}; --resume_from_checkpoint latest goes on.")
                accelerator.end_training()
                return
            elif step % args.checkpointing_steps == 0:
                save()
        stage, inside = stage + 1, 0
    bar.close()

    if accelerator.is_main_process:
        with FinalFolder(folder / "final") as final:
            shutil.copytree(folder / f"stage-{args.end_steps}", final, dirs_exist_ok=True)
        if args.export:
            export_fp16(folder, args)
        stages = " ".join(str(folder / f"stage-{num_steps}") for num_steps in students)
        counts = " ".join(map(str, [args.start_steps, *students]))
        print(
            f"Done: {folder / 'final'}. Quality against steps: python evaluate.py --trained_steps --steps {counts} "
            f"--models {args.pretrained_model_name_or_path} {stages}",
            flush=True,
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    args = parse_args()
    arguments.run_script(main, args)
