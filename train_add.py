"""Distil a teacher into a 1 to 4 step student that a discriminator takes for data (ADD, arXiv:2311.17042, eq. 1).

From a timestep s of the student's own schedule the student jumps to clean latents. A discriminator D compares them
with those of real images, and the teacher says where its own samples would be:

    z_s = alpha_s x + sigma_s eps               pure noise at the last training timestep: there sampling starts
    x^  = x0 by the student's output at (z_s, s), one pass
    L   = -E[D(x^)] + lambda E[c(t) |x^ - sg(x_psi)|^2]                                          student, eq. (1)-(4)
    L_D = E[max(0, 1 - D(x))] + E[max(0, 1 + D(x^))] + gamma / 2 E|grad D(x)|^2                  hinge and R1, eq. (3)

x_psi is the guided teacher's x0 at (alpha_t x^ + sigma_t eps', t), with c(t) = alpha_t (--distill_target score), or
its sample from z_s in --num_ddim_steps (sample, c = 1). D is small trained heads on the features of a frozen network:
of the teacher's own encoder, looking at re-noised latents (--discriminator unet; LADD, arXiv:2403.12015), or of
DINOv2, looking at decoded images (--discriminator dinov2, the paper's).

    accelerate launch train_add.py
    accelerate launch --multi_gpu --num_processes 8 train_add.py --data_dir coco \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed_precision bf16 \\
        --discriminator dinov2 --feature_model_name_or_path facebook/dinov2-small

Run the same command with --resume_from_checkpoint latest to go on after a stop. Writes
<output_dir>/[<run_name>/]checkpoint-N/ and final/: a whole pipeline folder or, with --lora_rank, a LoRA.
"""

import argparse
import itertools
import os
import shutil
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env, set_seed
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from torch.nn.utils import clip_grad_norm_
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
    decode_latents,
    encode_empty_prompt,
    encode_images,
    encode_prompts,
    is_sdxl,
    predict,
    predict_guided,
)
from common.contract import read_distillation, write_distillation
from common.data import build_dataloader, load_dataset_from_args
from common.diffusion import NoiseSchedule, ddim_rollout
from common.discriminators import (
    Dinov2Features,
    Heads,
    UNetFeatures,
    head_condition,
    judge,
    swapped_captions,
    text_condition,
)
from common.ema import EMA
from common.errors import UsageError
from common.hooks import register_checkpoint_hooks
from common.judging.previews import image_diversity, log_images, sample_images
from common.outputs import write_model_card
from common.pipelines import check_compatible, check_same_inputs, load_pipeline, read_pipeline_config, same_weights
from common.randomness import sample_generator
from common.run import StopSignal
from common.schedulers import saved_scheduler, student_scheduler, student_timesteps


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_data_arguments(parser)
    add = parser.add_argument_group("student").add_argument
    add(
        "--num_student_steps",
        type=arguments.positive_int,
        default=4,
        help="timesteps that the student jumps from; it samples in so many steps, or fewer",
    )
    add(
        "--timestep_probs",
        type=arguments.positive_float,
        nargs="+",
        help="how often each of these timesteps is drawn, noisiest first, such as 0.4 0.2 0.2 0.2: one step is the "
        "hardest to learn (default: all alike)",
    )
    add(
        "--student_model",
        help="pipeline whose UNet the student starts as, such as a stage of train_progressive.py "
        "(default: the teacher)",
    )
    add("--lora_rank", type=arguments.positive_int, help="train adapters of this rank (default: the whole UNet)")
    add("--lora_alpha", type=arguments.positive_float, help="of a LoRA: its scale is alpha / rank (default: 32)")
    add("--lora_targets", nargs="+", help="of a LoRA: UNet layers to adapt (default: to_q to_k to_v to_out.0)")
    add = parser.add_argument_group("distillation").add_argument
    add(
        "--lambda_distill",
        type=arguments.weight,
        default=2.5,
        help="weight of the teacher's term (0: none); docs/add.md has what higher ones do",
    )
    add(
        "--distill_target",
        choices=("score", "sample"),
        default="score",
        help="teacher's x0 of the re-noised student, or its sample from the student's input",
    )
    add(
        "--distill_timesteps",
        type=arguments.natural,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="of --distill_target score: the student is re-noised to one of these, uniformly (default: 20 979)",
    )
    add("--num_ddim_steps", type=arguments.positive_int, help="of --distill_target sample: teacher steps (default: 8)")
    add(
        "--cache_rollouts",
        type=arguments.positive_int,
        help="of --distill_target sample: keep the teacher's samples of so many optimizer steps, and cycle over "
        "their data (default: never)",
    )
    add("--guidance_scale", type=float, help="teacher's guidance (default: what it was saved with, else 7.5)")
    add = parser.add_argument_group("discriminator").add_argument
    add(
        "--discriminator",
        choices=("unet", "dinov2"),
        default="unet",
        help="what it looks with: the teacher's encoder at re-noised latents, or DINOv2 at images",
    )
    add("--feature_model_name_or_path", help="of dinov2: folder or hub id (default: facebook/dinov2-small)")
    add("--feature_resolution", type=arguments.positive_int, help="of dinov2: pixels per side it sees (default: 224)")
    add(
        "--discriminator_timesteps",
        type=arguments.natural,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="of unet: latents are re-noised to one of these, uniformly (default: 20 979)",
    )
    add(
        "--discriminator_start_step",
        type=arguments.natural,
        default=0,
        help="the student learns from the teacher alone until this step; --max_train_steps: to the end",
    )
    add(
        "--discriminator_updates",
        type=arguments.positive_int,
        default=1,
        help="its updates for each of the student's, each with a batch of its own",
    )
    add(
        "--discriminator_learning_rate",
        type=arguments.positive_float,
        default=1e-3,
        help="its peak learning rate; --lr_scheduler and the warm-up begin where it starts",
    )
    add(
        "--mismatched_captions",
        action="store_true",
        help="real images with a neighbour's caption are half of what the discriminator learns to reject",
    )
    add("--r1_gamma", type=arguments.weight, default=1e-5, help="weight of R1; 0: none")
    add(
        "--r1_form",
        choices=("autograd", "finite_difference"),
        default="autograd",
        help="R1 by a second backward, or by the scores of perturbed features",
    )
    add(
        "--max_skipped_updates",
        type=arguments.positive_int,
        default=20,
        help="an update whose gradient is not finite is skipped; so many in a row end the run",
    )
    arguments.add_optimization_arguments(parser, learning_rate=1e-4, train_batch_size=32, max_train_steps=500)
    arguments.add_checkpoint_arguments(parser, output_dir="outputs/add")
    arguments.add_validation_arguments(parser)
    arguments.add_runtime_arguments(parser)
    # The student starts from what works: without a warm-up Adam's first steps, all of full length, would spoil it.
    parser.set_defaults(lr_warmup_steps=20)
    return parser.parse_args(argv)


def discriminator_loss(real_scores, fake_scores, mismatched_scores=None, differ=None):
    """Hinge: E[max(0, 1 - D(x, c))] + E[max(0, 1 + D(x^, c))]. Scores are lists of (B, places), one a head. Scalar.

    With mismatched_scores, of real images under other captions, the second term is half of that and half of
    E[max(0, 1 + D(x, c'))], in which the samples count whose captions differ (B,) (GAN-CLS, arXiv:1605.05396).
    """
    accepted = torch.stack([(1 - scores).relu().mean() for scores in real_scores]).mean()
    rejected = torch.stack([(1 + scores).relu().mean() for scores in fake_scores]).mean()
    if mismatched_scores is not None:
        other = torch.stack([((1 + scores).relu() * differ[:, None]).mean() for scores in mismatched_scores]).mean()
        rejected = (rejected + other) / 2
    return accepted + rejected


def adversarial_loss(fake_scores):
    """-E[D(x^)], over a list of scores (B, places), one a head. Scalar."""
    return -torch.stack([scores.mean() for scores in fake_scores]).mean()


def distillation_loss(x_student, x_teacher, weights):
    """E[c(t) |x^ - sg(x_psi)|^2] of clean latents (B, C, H, W) and c(t), weights (B,); |.|^2 is the mean square."""
    return (weights * (x_student - x_teacher.detach()).square().mean(dim=(1, 2, 3))).mean()


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work; fill in the defaults that belong to other flags."""
    if args.num_student_steps > 1000:
        raise UsageError(f"--num_student_steps {args.num_student_steps} is more than the model's 1000 timesteps.")
    if args.timestep_probs is not None and len(args.timestep_probs) != args.num_student_steps:
        raise UsageError(
            f"--timestep_probs has {len(args.timestep_probs)} numbers; the student has "
            f"--num_student_steps {args.num_student_steps}."
        )
    if args.guidance_scale is not None and args.guidance_scale < 0:
        raise UsageError(f"--guidance_scale {args.guidance_scale} is negative.")
    sampled, seen, lora = args.distill_target == "sample", args.discriminator == "dinov2", bool(args.lora_rank)
    for name, default, of, there in (
        ("distill_timesteps", (20, 979), "--distill_target score", not sampled),
        ("num_ddim_steps", 8, "--distill_target sample", sampled),
        ("cache_rollouts", 0, "--distill_target sample", sampled),
        ("discriminator_timesteps", (20, 979), "--discriminator unet", not seen),
        ("feature_model_name_or_path", "facebook/dinov2-small", "--discriminator dinov2", seen),
        ("feature_resolution", 224, "--discriminator dinov2", seen),
        ("lora_alpha", 32.0, "--lora_rank", lora),
        ("lora_targets", ["to_q", "to_k", "to_v", "to_out.0"], "--lora_rank", lora),
    ):
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not there:
            raise UsageError(f"--{name} is about {of}: add that, or leave --{name} out.")
    for name in ("distill_timesteps", "discriminator_timesteps"):
        low, high = getattr(args, name)
        if not low <= high < 1000:
            raise UsageError(f"--{name} {low} {high} is no range of the model's timesteps, 0 to 999.")
    if args.lambda_distill == 0:
        if args.discriminator_start_step > 0:
            raise UsageError("--lambda_distill 0: until --discriminator_start_step there would be nothing to learn.")
        if args.cache_rollouts:
            raise UsageError("--cache_rollouts keeps what the teacher says, and --lambda_distill 0 never asks it.")
    if args.mismatched_captions and args.train_batch_size % 2:
        raise UsageError(
            f"--mismatched_captions swaps the captions of neighbours: --train_batch_size "
            f"{args.train_batch_size} is odd."
        )
    if args.student_model and args.lora_rank:
        raise UsageError(
            "--student_model is about the whole UNet, and --lora_rank trains adapters on the teacher's: leave one out."
        )
    # What `accelerate launch` was told reaches a script through the environment.
    cuda = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if args.use_8bit_adam and not cuda:
        raise UsageError("--use_8bit_adam needs a CUDA GPU: leave it out.")
    mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision == "fp16" and not cuda:
        raise UsageError("--mixed_precision fp16, here or at accelerate launch, needs a CUDA GPU: use bf16 or no.")


def teacher_guidance(args):
    """The guidance scale of the teacher: the flag, else what the pipeline was saved with, else 7.5."""
    for path, whose in ((args.pretrained_model_name_or_path, "teacher"), (args.student_model, "student")):
        if path and read_distillation(path)["guidance"] == "embedded":
            raise UsageError(
                f"{path}: the {whose} takes its guidance scale as an input; this script knows an "
                "unconditional, cfg or baked one: start from the model it was made of."
            )
    distillation = read_distillation(args.pretrained_model_name_or_path)
    if distillation.get("timesteps"):
        raise UsageError(
            f"the teacher is for {len(distillation['timesteps'])} steps, at timesteps of its own, and "
            "knows no others: give it as --student_model, and the model it was made of as "
            "--pretrained_model_name_or_path."
        )
    if distillation["guidance"] == "baked":
        if args.guidance_scale not in (None, 1):
            raise UsageError(f"--guidance_scale {args.guidance_scale}: the teacher has its guidance baked in already.")
        return 1.0
    return distillation["guidance_scale"] if args.guidance_scale is None else args.guidance_scale


def draw(args, step, positions, latents):
    """Per-sample randomness of the student by global position: indices into its timesteps (B,), timesteps to re-noise
    to for the teacher (B,), and noise like latents for the student's input and the teacher's. All are drawn whatever
    the options. A cached step comes again with the same."""
    slots, distill, noise = [], [], []
    low, high = args.distill_timesteps
    probs = torch.tensor(args.timestep_probs or [1.0] * args.num_student_steps)
    for position in positions:
        generator = sample_generator(args.seed, step, position)
        slots.append(torch.multinomial(probs, 1, generator=generator)[0])
        distill.append(torch.randint(low, high + 1, (), generator=generator))
        noise.append(torch.randn((2, *latents.shape[1:]), generator=generator))
    times = [torch.stack(drawn).to(latents.device) for drawn in (slots, distill)]
    return *times, *torch.stack(noise, dim=1).to(latents.device)


def draw_judged(args, update, positions, latents):
    """The same of the discriminator: timesteps to re-noise to (B,), and noise like latents for its fakes and its real
    latents. Of its update's number, so that it sees a cached step anew."""
    timesteps, noise = [], []
    low, high = args.discriminator_timesteps
    for position in positions:
        generator = sample_generator(args.seed, update, position, stream=6)
        timesteps.append(torch.randint(low, high + 1, (), generator=generator))
        noise.append(torch.randn((2, *latents.shape[1:]), generator=generator))
    return torch.stack(timesteps).to(latents.device), *torch.stack(noise, dim=1).to(latents.device)


def perturbation(args, update, positions, features):
    """Noise like features (a list of (B, C, H, W)) for r1_finite_difference, by global position."""
    noise = []
    for position in positions:
        generator = sample_generator(args.seed, update, position, stream=5)
        noise.append([torch.randn(x.shape[1:], generator=generator) for x in features])
    return [torch.stack(drawn).to(x.device) for drawn, x in zip(zip(*noise), features)]


def save_final(folder, args, pipeline, scheduler, timesteps, step_counts, guidance_scale, step):
    """final/: the whole pipeline with the student in it, or the LoRA with its alpha and scheduler; contract, card."""
    base, name = args.pretrained_model_name_or_path, type(scheduler).__name__
    notes = {
        "method": f"adversarial diffusion distillation, {args.discriminator} discriminator, teacher guided at "
        f"{guidance_scale:g}",
        "steps": f"{', '.join(map(str, step_counts))}; {args.num_student_steps} are at timesteps {timesteps}",
        "distillation": f"{args.distill_target}, weight {args.lambda_distill:g}",
    }
    imports, load = "DiffusionPipeline", 'pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")'
    with FinalFolder(Path(folder) / "final") as final:
        if args.lora_rank:
            unet = pipeline.unet
            # Without the adapter metadata a reload would forget alpha and scale the LoRA by 1.
            type(pipeline).save_lora_weights(
                final,
                unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
                unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
            )
            scheduler.save_pretrained(final / "scheduler")
            notes["LoRA"] = f"rank {args.lora_rank}, alpha {args.lora_alpha:g}, on {', '.join(args.lora_targets)}"
            imports += f", {name}"
            load = f"""pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.load_lora_weights("path/to/this/folder")
pipe.scheduler = {name}.from_pretrained("path/to/this/folder", subfolder="scheduler")"""
        else:
            whole = load_pipeline(base, revision=args.revision, variant=args.variant)  # the other parts not rounded
            whole.unet, whole.scheduler = pipeline.unet, scheduler
            whole.save_pretrained(final)
        write_distillation(
            final,
            method="add",
            parent=base,
            steps=args.num_student_steps,
            timesteps=timesteps,
            guidance="baked",
            guidance_scale=1.0,
            target="x0",
        )
        write_model_card(
            final,
            "Adversarially distilled student",
            base,
            lora=bool(args.lora_rank),
            usage=f"""
from diffusers import {imports}

{load}
image = pipe("a prompt", num_inference_steps={args.num_student_steps}, guidance_scale=1).images[0]""",
            notes={**notes, "optimizer steps": step},
        )


def export_fp16(folder, args):
    """final-fp16/: the whole pipeline in half precision, a LoRA fused in; reloaded and compared."""
    final = Path(folder) / "final"
    if args.lora_rank:
        pipeline = load_pipeline(args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant)
        pipeline.load_lora_weights(final)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        pipeline.scheduler = saved_scheduler(final)
    else:
        pipeline = load_pipeline(final)
    pipeline.to(dtype=torch.float16)
    with FinalFolder(Path(folder) / "final-fp16") as export:
        pipeline.save_pretrained(export)
        for name in ("distillation.json", "README.md"):
            shutil.copy(final / name, export)
        if not same_weights(pipeline.unet, load_pipeline(export, torch.float16).unet):
            raise RuntimeError("the exported pipeline reloads with another UNet")


def main(args):
    check_arguments(args)
    arguments.check_tracker(args)
    arguments.use_embedded_default(args)
    _, native_resolution, factor = read_pipeline_config(args.pretrained_model_name_or_path, args.revision)
    guidance_scale = teacher_guidance(args)
    if args.student_model:
        check_compatible(args.student_model, "--student_model", args.pretrained_model_name_or_path, args.revision)
    if args.discriminator == "dinov2":
        Dinov2Features.check(args.feature_model_name_or_path, args.feature_resolution)
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
            "train_add.py runs under DDP only: FSDP and DeepSpeed hold one trained model, and here the "
            "discriminator is another; launch it with accelerate_configs/multi_gpu.yaml."
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
    accelerator.wait_for_everyone()
    if args.resume_from_checkpoint:
        accelerator.print(
            f"Resuming from {checkpoint}." if checkpoint else f"No checkpoint in {folder}: a fresh start."
        )
    planned = planned_steps(checkpoint) if checkpoint else None
    if args.lr_scheduler != "constant" and planned not in (None, args.max_train_steps):
        accelerator.print(
            f"warning: --lr_scheduler {args.lr_scheduler} was planned for {planned} steps and now ends at "
            f"{args.max_train_steps}: from step {step} on the learning rate is that of the new length."
        )
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    stop = StopSignal()
    set_seed(args.seed)  # the initialisation of heads and LoRA; nothing after it draws a global random number

    # 1 frozen models, in the compute dtype
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipeline = load_pipeline(args.pretrained_model_name_or_path, dtype, args.revision, args.variant)
    pipeline.to(accelerator.device)
    teacher, vae = pipeline.unet, pipeline.vae
    if is_sdxl(pipeline) and dtype == torch.float16:
        vae.to(dtype=torch.float32)  # SDXL's VAE overflows in half precision
    schedule = NoiseSchedule(pipeline.scheduler, accelerator.device)
    scheduler = student_scheduler(pipeline.scheduler, "x0", args.num_student_steps)
    timesteps_list = student_timesteps(scheduler, args.num_student_steps)
    student_times = torch.tensor(timesteps_list, device=accelerator.device)
    # It re-noises, so that it also samples in fewer steps, where these are among its own.
    step_counts = [
        count
        for count in range(1, args.num_student_steps + 1)
        if set(student_timesteps(scheduler, count)) <= set(timesteps_list)
    ]
    unconditional = encode_empty_prompt(pipeline, args.resolution)
    condition_dim = text_condition(unconditional).shape[1]
    if args.discriminator == "unet":
        looks = UNetFeatures(teacher)
    else:
        looks = Dinov2Features(args.feature_model_name_or_path, args.feature_resolution, accelerator.device, dtype)
        condition_dim += looks.width

    # 2 trainable models, in fp32. The student is a UNet of its own, as the discriminator looks with the teacher's too.
    student_dtype = dtype if args.lora_rank else torch.float32
    if args.student_model:
        source = load_pipeline(args.student_model, student_dtype, flag="--student_model")
        check_same_inputs(source, pipeline, f"--student_model {args.student_model}")
    else:
        source = load_pipeline(args.pretrained_model_name_or_path, student_dtype, args.revision, args.variant)
    unet = source.unet
    del source
    if args.lora_rank:
        names = [name for name, _ in unet.named_modules()]
        for target in args.lora_targets:  # peft ignores one that matches nothing beside one that does
            if not any(f".{name}".endswith(f".{target}") for name in names):
                raise UsageError(f"--lora_targets {target}: the UNet has no layer of that name.")
        try:
            config = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=args.lora_targets)
            unet.add_adapter(config)
        except ValueError as error:
            raise UsageError(f"--lora_targets: {str(error).splitlines()[0]}") from None
        cast_training_params(unet, dtype=torch.float32)
    else:
        unet.requires_grad_(True)
    pipeline.unet = unet.to(accelerator.device)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()  # its gradient also runs through what the discriminator looks with
        (teacher if args.discriminator == "unet" else vae).enable_gradient_checkpointing()
    if args.torch_compile:
        unet.compile()  # in place: parameter names stay those of the plain module
    parameters = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    ema = EMA(parameters, args.ema_decay)
    plain_heads = Heads(looks.channels, condition_dim).to(accelerator.device)
    head_parameters = dict(plain_heads.named_parameters())

    # 3 optimizers
    optimizer_class = partial(torch.optim.AdamW, fused=True)
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as optimizer_class
    adam = {
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    optimizer = optimizer_class(parameters.values(), lr=args.learning_rate, **adam)
    head_optimizer = torch.optim.AdamW(
        head_parameters.values(), lr=args.discriminator_learning_rate, fused=True, **adam
    )

    # 4 prepare, register, resume
    student, heads, optimizer, head_optimizer = accelerator.prepare(unet, plain_heads, optimizer, head_optimizer)
    skipped = {name: torch.zeros(2, dtype=torch.long) for name in ("student", "discriminator")}  # in all, in a row
    trained = {"student": parameters, "discriminator": head_parameters, "skipped_updates": skipped}
    register_checkpoint_hooks(accelerator, trained, {"student": ema})
    if checkpoint:
        load_checkpoint(accelerator, checkpoint)
        ema.updates = step - skipped["student"][0].item()

    # 5 data, from the step on that comes next; never prepared, its order depends on the global batch alone. A step has
    # a batch for every update of the discriminator, the last of which the student shares.
    updates = args.discriminator_updates
    batches = argparse.Namespace(**{**vars(args), "max_train_steps": args.max_train_steps * updates})
    dataloader = iter(build_dataloader(dataset, batches, accelerator, step * updates, args.cache_rollouts * updates))
    rollouts = {}  # (data step, micro-batch) to the teacher's samples, on the CPU

    # 6 trackers
    if accelerator.log_with:
        config = {key: value if isinstance(value, int | float) else str(value) for key, value in vars(args).items()}
        accelerator.init_trackers("logs", config)

    def validate():
        if accelerator.is_main_process:
            rows, labels = [], []
            with ema.applied(parameters), accelerator.autocast():
                for steps in step_counts:
                    rows += sample_images(
                        pipeline,
                        args.validation_prompts,
                        scheduler,
                        steps,
                        1.0,
                        args.resolution,
                        args.seed,
                        args.num_validation_images,
                    )
                    labels += [f"{steps}: {prompt}" for prompt in args.validation_prompts]
            log_images(accelerator, folder, rows, labels, step)
            for steps, start in zip(step_counts, range(0, len(rows), len(args.validation_prompts))):
                diversity = image_diversity(rows[start : start + len(args.validation_prompts)])
                if diversity is not None:
                    accelerator.log({f"diversity_{steps}_steps": diversity}, step=step)
        accelerator.wait_for_everyone()

    def save():
        save_checkpoint(
            accelerator, folder, step, identity, global_batch_size, args.max_train_steps, args.checkpoints_total_limit
        )

    def look(x, noise, timesteps, conditioning):
        """The discriminator's features of clean latents x and, with DINOv2, the CLS embedding. Real latents are
        decoded as the student's are, so that the VAE's traces tell nothing."""
        if args.discriminator == "unet":
            with accelerator.autocast():
                return looks(schedule.add_noise(x, noise, timesteps), timesteps, conditioning), None
        pixels = decode_latents(vae, x)  # SDXL's VAE, in fp32, must stay so
        with accelerator.autocast():
            return looks(pixels)

    def teach(x_student, z, timesteps, noise, distill_timesteps, conditioning, key):
        """The teacher's x_psi and its weights c(t): its x0 of the student's x^, re-noised, or its sample from the
        student's input z, which the cache knows by key."""

        def guided(z, timesteps):
            return predict_guided(teacher, z, timesteps, conditioning, unconditional, guidance_scale)

        with torch.no_grad(), accelerator.autocast():
            if args.distill_target == "score":
                z = schedule.add_noise(x_student, noise, distill_timesteps)
                x_teacher = schedule.to_x0(guided(z, distill_timesteps), z, distill_timesteps)
                return x_teacher, schedule.alpha(distill_timesteps).flatten()
            if key in rollouts:
                x_teacher = rollouts[key].to(accelerator.device)
            else:
                end = torch.full_like(timesteps, -1)
                x_teacher = ddim_rollout(guided, schedule, z, timesteps, end, args.num_ddim_steps)
                if args.cache_rollouts:
                    rollouts[key] = x_teacher.cpu()
            return x_teacher, torch.ones(len(z), device=accelerator.device)

    def update(optimizer, parameters, skipped):
        """Clip and step, or skip and count where the gradient is not finite. Returns the gradient's norm."""
        without = [name for name, p in parameters.items() if p.grad is None]
        if without:
            raise RuntimeError(f"{len(without)} trainable parameters got no gradient, such as {without[0]}")
        grad_norm = clip_grad_norm_(parameters.values(), args.max_grad_norm)
        finite = bool(grad_norm.isfinite())  # of the gradients of all ranks, so all decide alike
        if finite or getattr(optimizer, "scaler", None) is not None:  # a scaler skips itself, and lowers its scale
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        skipped += torch.tensor([not finite, not finite])
        skipped[1] *= not finite
        return grad_norm

    head_schedule = argparse.Namespace(
        **{
            **vars(args),
            "learning_rate": args.discriminator_learning_rate,
            "max_train_steps": args.max_train_steps - args.discriminator_start_step,
        }
    )
    if args.discriminator_start_step >= args.max_train_steps:
        accelerator.print(
            f"--discriminator_start_step {args.discriminator_start_step} is not before the end, step "
            f"{args.max_train_steps}: the student learns from the teacher alone."
        )
    bar = tqdm(total=args.max_train_steps, initial=step, desc="steps", disable=not accelerator.is_local_main_process)
    while step < args.max_train_steps:
        rates = {"lr": arguments.learning_rate_at(step, args)}
        for group in optimizer.param_groups:
            group["lr"] = rates["lr"]
        adversarial = step >= args.discriminator_start_step
        if adversarial:
            rates["discriminator_lr"] = arguments.learning_rate_at(step - args.discriminator_start_step, head_schedule)
            for group in head_optimizer.param_groups:
                group["lr"] = rates["discriminator_lr"]
        names = ["distillation", "adversarial", "discriminator", "r1", "d_real", "d_fake"]
        terms = dict.fromkeys(names + ["d_mismatched"] * args.mismatched_captions, 0.0)
        for update_number, micro_batch in itertools.product(
            range(1, updates + 1), range(args.gradient_accumulation_steps)
        ):
            batch = next(dataloader)
            trains_student = update_number == updates
            if not (adversarial or trains_student):
                continue
            with accelerator.accumulate(student, heads):
                conditioning = encode_prompts(pipeline, batch["captions"], args.resolution)
                latents = encode_images(vae, batch["pixel_values"])
                positions, judged = batch["positions"], step * updates + update_number - 1
                slots, distill_timesteps, noise, teacher_noise = draw(args, batch["step"], positions, latents)
                timesteps = student_times[slots]
                z = schedule.add_noise(latents, noise, timesteps)
                pure = timesteps == schedule.num_train_timesteps - 1
                z = torch.where(pure.view(-1, 1, 1, 1), noise, z)
                with torch.set_grad_enabled(trains_student), accelerator.autocast():
                    output = predict(student if trains_student else unet, z, timesteps, conditioning)
                x_student = schedule.to_x0(output, z, timesteps)

                mismatched = other_condition = differ = None
                if adversarial:
                    judged_timesteps, fake_noise, real_noise = draw_judged(args, judged, positions, latents)
                    with torch.no_grad():
                        real, image_embedding = look(latents, real_noise, judged_timesteps, conditioning)
                    condition = head_condition(conditioning, image_embedding, pure)
                    with torch.set_grad_enabled(trains_student):
                        fake, _ = look(x_student, fake_noise, judged_timesteps, conditioning)
                    if args.mismatched_captions:
                        neighbours, differ = swapped_captions(batch["captions"], accelerator.device)
                        other = conditioning.rows(neighbours)
                        other_condition = head_condition(other, image_embedding, pure)
                        mismatched = real  # DINOv2 reads no captions; the UNet reads them itself
                        if args.discriminator == "unet":
                            with torch.no_grad():
                                mismatched, _ = look(latents, real_noise, judged_timesteps, other)

                if trains_student:
                    loss = torch.zeros((), device=accelerator.device)
                    if args.lambda_distill:
                        key = (batch["step"], micro_batch)
                        x_teacher, weights = teach(
                            x_student, z, timesteps, teacher_noise, distill_timesteps, conditioning, key
                        )
                        distillation = distillation_loss(x_student, x_teacher, weights)
                        loss = loss + args.lambda_distill * distillation
                        terms["distillation"] += distillation.detach() / args.gradient_accumulation_steps
                    if adversarial:
                        plain_heads.requires_grad_(False)  # and past DDP: the student's step leaves it untouched
                        scored = adversarial_loss(plain_heads(fake, condition))
                        plain_heads.requires_grad_(True)
                        loss = loss + scored
                        terms["adversarial"] += scored.detach() / args.gradient_accumulation_steps
                    accelerator.backward(loss)
                if adversarial:
                    r1_form, noise = args.r1_form if args.r1_gamma else None, None
                    if r1_form == "finite_difference":
                        noise = perturbation(args, judged, positions, real)
                    fake = [x.detach() for x in fake]
                    real_scores, fake_scores, mismatched_scores, r1 = judge(
                        heads, real, fake, condition, r1_form, noise, mismatched, other_condition
                    )
                    hinge = discriminator_loss(real_scores, fake_scores, mismatched_scores, differ)
                    # The heads are fp32, so that fp16's loss scaling, which accelerator.backward does, is not theirs.
                    ((hinge + args.r1_gamma / 2 * r1) / args.gradient_accumulation_steps).backward()
                    shown = {
                        "discriminator": hinge,
                        "r1": r1,
                        "d_real": -adversarial_loss(real_scores),
                        "d_fake": -adversarial_loss(fake_scores),
                    }
                    if mismatched_scores is not None:
                        shown["d_mismatched"] = -adversarial_loss(mismatched_scores)
                    for name, value in shown.items():
                        terms[name] += value.detach() / (args.gradient_accumulation_steps * updates)
                if accelerator.sync_gradients:
                    if trains_student:
                        accelerator.unscale_gradients(optimizer)
                        grad_norm = update(optimizer, parameters, skipped["student"])
                        if not skipped["student"][1]:
                            ema.step(parameters)
                    if adversarial:
                        head_grad_norm = update(head_optimizer.optimizer, head_parameters, skipped["discriminator"])
        step += 1
        bar.update()

        values = torch.stack([torch.as_tensor(value, device=accelerator.device) for value in terms.values()])
        logs = dict(zip(terms, accelerator.reduce(values.float(), reduction="mean").tolist()))
        logs["loss"] = logs["adversarial"] + args.lambda_distill * logs["distillation"]
        logs["grad_norm"], logs["skipped"] = grad_norm.item(), sum(count[0].item() for count in skipped.values())
        if adversarial:
            logs["discriminator_grad_norm"] = head_grad_norm.item()
        bar.set_postfix({name: f"{logs[name]:.3f}" for name in ("distillation", "d_real", "d_fake", "skipped")})
        accelerator.log({**logs, **rates}, step=step)
        if args.validation_prompts and step % args.validation_steps == 0:
            validate()
        for name, (_, in_a_row) in skipped.items():
            if in_a_row >= args.max_skipped_updates:
                # Each network is what its last finite update left. No other checkpoint makes room for this one.
                save_checkpoint(accelerator, folder, step, identity, global_batch_size, args.max_train_steps)
                raise UsageError(
                    f"{in_a_row} updates of the {name} in a row had no finite gradient, up to step "
                    f"{step}; checkpoint-{step} keeps what came before them. Start again in another "
                    "--run_name, with a lower learning rate for it or with bf16 instead of fp16; or, "
                    "where the data of these steps are broken, resume."
                )
        if stop.requested(accelerator) and step < args.max_train_steps:
            save()
            accelerator.print(f"Stopped by a signal after step {step}; --resume_from_checkpoint latest goes on.")
            accelerator.end_training()
            return
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            save()
    bar.close()

    if accelerator.is_main_process:
        with ema.applied(parameters):
            save_final(folder, args, pipeline, scheduler, timesteps_list, step_counts, guidance_scale, step)
        if args.export:
            export_fp16(folder, args)
        print(f"Done: {folder / 'final'}", flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    args = parse_args()
    arguments.run_script(main, args)
