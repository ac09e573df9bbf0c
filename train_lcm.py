"""Distil a teacher into a student that jumps from any timestep to the clean latents (LCM, arXiv:2310.04378, alg. 1).

f(z, t) says where the teacher's path through z at t ends. So it has to say the same at both ends of one teacher step,
which goes from a timestep t of a grid to the next one, s:

    z_t = alpha_t x + sigma_t eps           pure noise where t is the last training timestep: there sampling starts
    z_s = DDIM_1(z_t : t -> s)              teacher, guided
    f(z, t) = c_skip(t) z + c_out(t) x0     x0 by the model's output at (z, t), one pass; f(z, 0) = z          (1)
    L   = d(f(z_t, t), f-(z_s, s))          student, and f-: its slow average, with a LoRA the student itself  (2)

--num_phases P (PCM, arXiv:2405.18407) cuts the timesteps into P phases. The path then ends at its phase's edge e:

    f(z, t) = DDIM_1(z : t -> e)            f(z, e) = z                                                        (3)

and the student samples in P steps, one for each phase, without fresh noise.

    accelerate launch train_lcm.py --lora_rank 64
    accelerate launch --multi_gpu --num_processes 8 train_lcm.py --data_dir coco --lora_rank 64 \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed_precision bf16

Run the same command with --resume_from_checkpoint latest to go on after a stop. Writes
<output_dir>/[<run_name>/]checkpoint-N/ and final/: with --lora_rank a LoRA, which `pipe.load_lora_weights` opens, else
a whole pipeline folder with the averaged student in it, which takes its guidance scale as an input.
"""

import copy
import os
import shutil
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env, set_seed
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
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
from common.diffusion import NoiseSchedule, teacher_timesteps
from common.ema import EMA
from common.errors import UsageError
from common.hooks import register_checkpoint_hooks
from common.judging.previews import log_images, sample_images
from common.outputs import write_model_card
from common.pipelines import load_pipeline, read_pipeline_config, same_weights, with_guidance_input
from common.randomness import sample_generator
from common.run import StopSignal
from common.schedulers import saved_scheduler, student_scheduler, student_timesteps


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_data_arguments(parser)
    add = parser.add_argument_group("method").add_argument
    add(
        "--num_ddim_timesteps",
        type=arguments.positive_int,
        default=50,
        help="timesteps of the grid that the teacher steps along, 1000 / 50 = 20 apart: divides 1000",
    )
    add(
        "--num_inference_steps",
        type=arguments.positive_int,
        help="N: steps to sample with, as recorded with the output (default: 4, or --num_phases)",
    )
    add("--num_phases", type=arguments.positive_int, default=1, help="P: phases of the timesteps; 1 is LCM")
    add(
        "--guidance_scale",
        type=float,
        help="teacher's guidance; a full UNet learns a range of scales, and this one is recorded for sampling "
        "(default: what the teacher was saved with, else 7.5)",
    )
    add(
        "--guidance_min",
        type=float,
        help="smallest scale that a full UNet learns (default: half of --guidance_scale, but at least 1)",
    )
    add(
        "--guidance_max",
        type=float,
        help="largest scale that a full UNet learns (default: twice --guidance_scale, so 3.75 to 15 where it is 7.5; "
        "LCM has 4 to 16)",
    )
    add("--loss", choices=("l2", "huber"), default="huber", help="distance d")
    add(
        "--target_ema_decay",
        type=arguments.fraction,
        help="of the target network, an average of the full UNet that is being trained (default: 0.95)",
    )
    add(
        "--lora_rank",
        type=arguments.positive_int,
        help="train adapters of this rank, for one guidance scale (default: train the whole UNet)",
    )
    add("--lora_alpha", type=arguments.positive_float, help="scale of the adapters is alpha / rank (default: 32)")
    add("--lora_targets", nargs="+", help="UNet layers to adapt (default: to_q to_k to_v to_out.0)")
    arguments.add_optimization_arguments(parser, learning_rate=1e-4, train_batch_size=32, max_train_steps=500)
    arguments.add_checkpoint_arguments(parser, output_dir="outputs/lcm")
    arguments.add_validation_arguments(parser)
    arguments.add_runtime_arguments(parser)
    return parser.parse_args(argv)


def boundary_scalings(timesteps):
    """c_skip and c_out of timesteps (B,), shaped (B, 1, 1, 1): LCMScheduler's, 1 and 0 at the clean end.

    c_skip = d^2 / ((s t)^2 + d^2), c_out = s t / sqrt((s t)^2 + d^2), with d = 0.5 and s = 10.
    """
    scaled = 10 * timesteps.clamp(min=0).float().view(-1, 1, 1, 1)
    return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()


def consistency_function(output, z, timesteps, schedule, edges=None):
    """f(z, t), (B, C, H, W): where the path through z at timesteps (B,) ends, by the model output there. In fp32.

    Without `edges` it ends at the clean latents, eq. (1); with them, at the timesteps `edges` (B,), eq. (3). At its
    end a path has arrived: f(z, t) = z whatever the output.
    """
    if edges is None:
        c_skip, c_out = boundary_scalings(timesteps)
        return c_skip * z + c_out * schedule.to_x0(output, z, timesteps)
    return torch.where((timesteps > edges).view(-1, 1, 1, 1), schedule.ddim_step(output, z, timesteps, edges), z)


def lcm_loss(output, z, timesteps, target_output, z_next, next_timesteps, schedule, edges=None, loss="huber"):
    """d(f(z_t, t), f-(z_s, s)), eq. (2): the distance of where two points of one path end, as two models say. Scalar.

    output: student's model output at (z, timesteps), (B, C, H, W); target_output: the target network's at (z_next,
    next_timesteps), where one teacher step leads; it gets no gradient. Timesteps and edges (B,), -1 the clean end.
    l2 is the mean square; huber is the mean of sqrt(d^2 + c^2) - c with c = 1e-3. In fp32 throughout.
    """
    prediction = consistency_function(output, z, timesteps, schedule, edges)
    target = consistency_function(target_output, z_next, next_timesteps, schedule, edges).detach()
    error = prediction - target
    distance = error**2 if loss == "l2" else torch.sqrt(error**2 + 1e-3**2) - 1e-3
    return distance.mean()


def phase_grid(edges, num_ddim_timesteps):
    """The teacher's steps, as three long tensors (M,): from which timestep, to which, and the end of their phase.

    edges: long (P + 1,), the first timestep of each phase, which is where the one before ends, and -1. Every phase has
    as many steps, M in all: num_ddim_timesteps, or as near below it as P allows.
    """
    count = num_ddim_timesteps // (len(edges) - 1)
    grid = teacher_timesteps(edges[:-1], edges[1:], count)
    return grid[:-1].T.flatten(), grid[1:].T.flatten(), edges[1:].repeat_interleave(count)


@torch.no_grad()
def follow(target, parameters, decay):
    """target = decay target + (1 - decay) parameters, for dicts of the same names; without EMA's warm-up."""
    for name, parameter in parameters.items():
        target[name].lerp_(parameter, 1 - decay)


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work; fill in the defaults that belong to other flags."""
    if 1000 % args.num_ddim_timesteps:
        raise UsageError(
            f"--num_ddim_timesteps {args.num_ddim_timesteps} does not divide the model's 1000 timesteps: "
            "use 20, 25, 40, 50 or 100, say."
        )
    if args.num_phases > 1 and args.num_inference_steps not in (None, args.num_phases):
        raise UsageError(
            f"--num_inference_steps {args.num_inference_steps}: with --num_phases {args.num_phases} the "
            "student takes one step per phase: leave it out."
        )
    for name in ("num_phases", "num_inference_steps"):
        if (getattr(args, name) or 0) > args.num_ddim_timesteps:
            raise UsageError(
                f"--{name} {getattr(args, name)} is more than --num_ddim_timesteps "
                f"{args.num_ddim_timesteps}, the timesteps that are trained."
            )
    if args.guidance_scale is not None and args.guidance_scale < 0:
        raise UsageError(f"--guidance_scale {args.guidance_scale} is negative.")
    if not args.lora_rank and (args.lora_alpha or args.lora_targets):
        raise UsageError("--lora_alpha and --lora_targets are about a LoRA: add --lora_rank or leave them out.")
    if args.lora_rank and (args.guidance_min, args.guidance_max, args.target_ema_decay) != (None, None, None):
        raise UsageError(
            "--guidance_min, --guidance_max and --target_ema_decay are about a full UNet: leave them out "
            "with --lora_rank."
        )
    args.num_inference_steps = args.num_inference_steps or (args.num_phases if args.num_phases > 1 else 4)
    args.lora_alpha = args.lora_alpha or 32.0
    args.lora_targets = args.lora_targets or ["to_q", "to_k", "to_v", "to_out.0"]
    args.target_ema_decay = 0.95 if args.target_ema_decay is None else args.target_ema_decay
    # What `accelerate launch` was told reaches a script through the environment.
    cuda = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if args.use_8bit_adam and not cuda:
        raise UsageError("--use_8bit_adam needs a CUDA GPU: leave it out.")
    mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision == "fp16" and not cuda:
        raise UsageError("--mixed_precision fp16, here or at accelerate launch, needs a CUDA GPU: use bf16 or no.")


def teacher_guidance(args):
    """(the teacher's guidance scale, whether the student takes its own as an input); fills in the range to train.

    The scale is the flag's, else what the pipeline was saved with, else 7.5; 1 where guidance is baked in.
    """
    path = args.pretrained_model_name_or_path
    distillation = read_distillation(path)
    config = UNet2DConditionModel.load_config(path, subfolder="unet", revision=args.revision)
    # A UNet from elsewhere may have the input without distillation.json.
    if distillation["guidance"] == "embedded" or config.get("time_cond_proj_dim") is not None:
        raise UsageError(
            "the teacher takes its guidance scale as an input; this script distils an unconditional or "
            "cfg one: start from the model it was made of."
        )
    if distillation.get("timesteps"):
        raise UsageError(
            f"the teacher is for {len(distillation['timesteps'])} steps, at timesteps of its own, and "
            "knows no others: start from the model it was made of."
        )
    if distillation["guidance"] == "baked":
        if args.guidance_scale not in (None, 1):
            raise UsageError(f"--guidance_scale {args.guidance_scale}: the teacher has its guidance baked in already.")
        if (args.guidance_min, args.guidance_max) != (None, None):
            raise UsageError("--guidance_min, --guidance_max: the teacher has its guidance baked in already.")
        return 1.0, False
    scale = distillation["guidance_scale"] if args.guidance_scale is None else args.guidance_scale
    if args.lora_rank:
        return scale, False
    args.guidance_min = max(scale / 2, 1.0) if args.guidance_min is None else args.guidance_min
    args.guidance_max = 2 * scale if args.guidance_max is None else args.guidance_max
    if not 0 <= args.guidance_min <= scale <= args.guidance_max < float("inf"):
        raise UsageError(
            f"--guidance_scale {scale:g}, recorded for sampling, is not between --guidance_min "
            f"{args.guidance_min:g} and --guidance_max {args.guidance_max:g}."
        )
    return scale, True


def draw(args, step, positions, latents, num_steps):
    """Per-sample randomness by global position: noise like latents, indices of teacher steps (B,), shares (B,).

    A share, in [0, 1), is how far into its range the guidance scale lies; drawn whatever the options, as all is.
    """
    noise, slots, shares = [], [], []
    for position in positions:
        generator = sample_generator(args.seed, step, position)
        slots.append(torch.randint(num_steps, (), generator=generator))
        shares.append(torch.rand((), generator=generator))
        noise.append(torch.randn(latents.shape[1:], generator=generator))
    return tuple(torch.stack(drawn).to(latents.device) for drawn in (noise, slots, shares))


def save_final(folder, args, pipeline, scheduler, contract, guidance_scale, step):
    """final/: the whole pipeline with the student in it, or the LoRA with its alpha and scheduler; contract, card."""
    base, name = args.pretrained_model_name_or_path, type(scheduler).__name__
    phases = f" in {args.num_phases} phases" if args.num_phases > 1 else ""
    scales = f"scale {guidance_scale:g}"
    if contract["guidance"] == "embedded":
        scales = f"scales {args.guidance_min:g} to {args.guidance_max:g}, an input of the UNet"
    notes = {"method": f"latent consistency distillation{phases}, guided ({scales})"}
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
        write_distillation(final, **contract)
        sampling = f"num_inference_steps={contract['steps']}, guidance_scale={contract['guidance_scale']:g}"
        write_model_card(
            final,
            "Latent consistency model",
            base,
            lora=bool(args.lora_rank),
            usage=f"""
from diffusers import {imports}

{load}
image = pipe("a prompt", {sampling}).images[0]""",
            notes={
                **notes,
                "steps": f"{contract['steps']}, at timesteps {contract['timesteps']}",
                "grid, loss": f"{args.num_ddim_timesteps} timesteps, {args.loss}",
                "optimizer steps": step,
            },
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
    guidance_scale, embedded = teacher_guidance(args)
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
            "train_lcm.py runs under DDP only: its averages and checkpoints need whole weights on every "
            "GPU; launch it with accelerate_configs/multi_gpu.yaml."
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
    set_seed(args.seed)  # the LoRA's initialisation; nothing after it draws a global random number

    # 1 frozen models, in the compute dtype
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipeline = load_pipeline(args.pretrained_model_name_or_path, dtype, args.revision, args.variant)
    pipeline.to(accelerator.device)
    teacher, vae = pipeline.unet, pipeline.vae
    if is_sdxl(pipeline) and dtype == torch.float16:
        vae.to(dtype=torch.float32)  # SDXL's VAE overflows in half precision
    schedule = NoiseSchedule(pipeline.scheduler, accelerator.device)
    phased, steps = args.num_phases > 1, args.num_inference_steps
    scheduler = student_scheduler(pipeline.scheduler, "next" if phased else "x0", steps)
    if not phased:  # LCMScheduler takes its timesteps from a grid: from ours, whatever the step count
        scheduler = type(scheduler).from_config(scheduler.config, original_inference_steps=args.num_ddim_timesteps)
    student_times = torch.tensor([*student_timesteps(scheduler, args.num_phases), -1], device=accelerator.device)
    grid = phase_grid(student_times, args.num_ddim_timesteps)
    contract = {
        "method": "lcm",
        "parent": args.pretrained_model_name_or_path,
        "steps": steps,
        "timesteps": student_timesteps(scheduler, steps),
        "guidance": "embedded" if embedded else "baked",
        "guidance_scale": guidance_scale if embedded else 1.0,
        "target": "next" if phased else "x0",
    }
    unconditional = encode_empty_prompt(pipeline, args.resolution)

    # 2 trainable models, in fp32
    if args.lora_rank:
        unet = target_unet = teacher  # with its adapters off, and with them on
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
    else:  # from the weights as they are stored: the teacher's may be rounded
        unet = UNet2DConditionModel.from_pretrained(
            args.pretrained_model_name_or_path,
            subfolder="unet",
            revision=args.revision,
            variant=args.variant,
            torch_dtype=torch.float32,
            use_safetensors=True,
        )
        if embedded:
            unet = with_guidance_input(unet)
        pipeline.unet = unet.to(accelerator.device).requires_grad_(True)
        target_unet = copy.deepcopy(unet).requires_grad_(False)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.torch_compile:
        for network in {unet, target_unet, teacher}:
            network.compile()  # in place: parameter names stay those of the plain module
    parameters = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    trained = {"student": parameters}
    if not args.lora_rank:
        trained["target"] = dict(target_unet.named_parameters())
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
    register_checkpoint_hooks(accelerator, trained, {"student": ema})
    if checkpoint:
        load_checkpoint(accelerator, checkpoint)
        ema.updates = step

    # 5 data, from the step on that comes next; never prepared, its order depends on the global batch alone
    dataloader = iter(build_dataloader(dataset, args, accelerator, step))

    # 6 trackers
    if accelerator.log_with:
        config = {key: value if isinstance(value, int | float) else str(value) for key, value in vars(args).items()}
        accelerator.init_trackers("logs", config)

    def validate():
        if accelerator.is_main_process:
            with ema.applied(parameters), accelerator.autocast():
                rows = sample_images(
                    pipeline,
                    args.validation_prompts,
                    scheduler,
                    steps,
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

    bar = tqdm(total=args.max_train_steps, initial=step, desc="steps", disable=not accelerator.is_local_main_process)
    while step < args.max_train_steps:
        learning_rate = arguments.learning_rate_at(step, args)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        step_loss = torch.zeros((), device=accelerator.device)
        for _ in range(args.gradient_accumulation_steps):
            batch = next(dataloader)
            with accelerator.accumulate(student):
                conditioning = encode_prompts(pipeline, batch["captions"], args.resolution)
                latents = encode_images(vae, batch["pixel_values"])
                noise, slots, shares = draw(args, batch["step"], batch["positions"], latents, len(grid[0]))
                timesteps, next_timesteps, edges = (times[slots] for times in grid)
                z = schedule.add_noise(latents, noise, timesteps)
                pure = (timesteps == schedule.num_train_timesteps - 1).view(-1, 1, 1, 1)
                z = torch.where(pure, noise, z)
                scales, timestep_cond = guidance_scale, None
                if embedded:
                    scales = args.guidance_min + (args.guidance_max - args.guidance_min) * shares
                    timestep_cond = guidance_embedding(pipeline, scales, unet.config.time_cond_proj_dim).to(z.device)
                with torch.no_grad(), accelerator.autocast():
                    if args.lora_rank:
                        unet.disable_adapters()
                    output = predict_guided(teacher, z, timesteps, conditioning, unconditional, scales)
                    if args.lora_rank:
                        unet.enable_adapters()  # and on they stay, through the backward
                    z_next = schedule.ddim_step(output, z, timesteps, next_timesteps)
                    # At the clean end f is z_next whatever the output, so any timestep will do.
                    at = next_timesteps.clamp(min=0)
                    target_output = predict(target_unet, z_next, at, conditioning, timestep_cond)

                with accelerator.autocast():
                    output = predict(student, z, timesteps, conditioning, timestep_cond)
                loss = lcm_loss(
                    output,
                    z,
                    timesteps,
                    target_output,
                    z_next,
                    next_timesteps,
                    schedule,
                    edges if phased else None,
                    args.loss,
                )
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
        if "target" in trained:
            follow(trained["target"], parameters, args.target_ema_decay)
        step += 1
        bar.update()

        logs = {"loss": accelerator.reduce(step_loss, reduction="mean").item(), "grad_norm": grad_norm.item()}
        bar.set_postfix(loss=f"{logs['loss']:.4f}", grad_norm=f"{logs['grad_norm']:.2f}")
        accelerator.log({**logs, "lr": learning_rate}, step=step)
        if args.validation_prompts and step % args.validation_steps == 0:
            validate()
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
            save_final(folder, args, pipeline, scheduler, contract, guidance_scale, step)
        if args.export:
            export_fp16(folder, args)
        print(f"Done: {folder / 'final'}", flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    args = parse_args()
    arguments.run_script(main, args)
