"""Distil classifier-free guidance into one forward pass (Meng et al., arXiv:2210.03142, section 3.1: stage one).

The teacher's guided output takes two passes of its UNet, the student's takes one. With o the output of a UNet in the
model's own prediction type, given the caption (c) or the empty one (u), and g the guidance scale (1 + w in the paper):

    z_t = alpha_t x + sigma_t eps        t uniform over all timesteps; pure noise at the last: there sampling starts
    o*  = o_u + g (o_c - o_u)            teacher, guided (Ho & Salimans, arXiv:2207.12598, eq. 6)
    L   = |o_s - o*|^2                   student, one pass, given the caption

--guidance fixed bakes one g into the weights: of the whole UNet, or of a LoRA (--lora_rank), whose teacher is the
student with its adapters switched off. --guidance embed makes g an input of the UNet, drawn per sample.

    accelerate launch train_guided.py
    accelerate launch --multi_gpu --num_processes 8 train_guided.py --guidance embed --data_dir coco \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed_precision bf16

Run the same command with --resume_from_checkpoint latest to go on after a stop. Writes
<output_dir>/[<run_name>/]checkpoint-N/ and final/, a whole pipeline folder or, with --lora_rank, a LoRA.
"""

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
from common.arguments import UsageError
from common.checkpoint import (
    FinalFolder,
    StopSignal,
    check_same_run,
    find_checkpoint,
    load_checkpoint,
    make_folder,
    planned_steps,
    refuse_other_run,
    save_checkpoint,
)
from common.data import build_dataloader, load_dataset_from_args, sample_generator
from common.diffusion import NoiseSchedule, ddim_scheduler
from common.ema import EMA
from common.hooks import register_checkpoint_hooks
from common.models import (
    encode_empty_prompt,
    encode_images,
    encode_prompts,
    guidance_embedding,
    is_sdxl,
    load_pipeline,
    predict,
    read_distillation,
    read_pipeline_config,
    same_weights,
    with_guidance_input,
)
from common.sampling import saved_scheduler
from common.validation import log_images, sample_images, write_distillation, write_model_card

SAMPLING_STEPS = 50  # of the saved scheduler and of validation, unless the teacher is for another number of steps


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_data_arguments(parser)
    add = parser.add_argument_group("method").add_argument
    add("--guidance", choices=("fixed", "embed"), default="fixed",
        help="bake one guidance scale into the weights, or make the scale an input of the UNet")  # fmt: skip
    add("--guidance_scale", type=float,
        help="the scale that is baked in; with --guidance embed, the one recorded for sampling (default: what the "
             "teacher was saved with, else 7.5)")  # fmt: skip
    add("--guidance_min", type=float, help="smallest scale of --guidance embed (default: 1, which is no guidance)")
    add("--guidance_max", type=float, help="largest scale of --guidance embed (default: 8)")
    add("--lora_rank", type=arguments.positive_int,
        help="train adapters of this rank, with --guidance fixed (default: train the whole UNet)")  # fmt: skip
    add("--lora_alpha", type=arguments.positive_float, help="scale of the adapters is alpha / rank (default: 32)")
    add("--lora_targets", nargs="+", help="UNet layers to adapt (default: to_q to_k to_v to_out.0)")
    arguments.add_optimization_arguments(parser, learning_rate=1e-4, train_batch_size=32, max_train_steps=500)
    arguments.add_checkpoint_arguments(parser, output_dir="outputs/guided")
    arguments.add_validation_arguments(parser)
    arguments.add_runtime_arguments(parser)
    return parser.parse_args(argv)


def guided_loss(output, conditional, unconditional, guidance_scales):
    """|o_s - (o_u + g (o_c - o_u))|^2: the distance of the student's one output from the teacher's guided one. Scalar.

    output: the student's, given the caption; conditional, unconditional: the teacher's, given the caption and the
    empty one; all (B, C, H, W) fp32, of one prediction type. guidance_scales (B,). The mean over all elements.
    """
    guided = unconditional + guidance_scales.view(-1, 1, 1, 1) * (conditional - unconditional)
    return (output - guided).square().mean()


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work; fill in the defaults that belong to other flags."""
    if args.guidance_scale is not None and args.guidance_scale < 0:
        raise UsageError(f"--guidance_scale {args.guidance_scale} is negative.")
    if args.guidance == "embed" and args.lora_rank:
        raise UsageError("--lora_rank: --guidance embed gives the UNet a new input, which a LoRA can't hold: leave it "
                         "out or use --guidance fixed.")  # fmt: skip
    if not args.lora_rank and (args.lora_alpha or args.lora_targets):
        raise UsageError("--lora_alpha and --lora_targets are about a LoRA: add --lora_rank or leave them out.")
    args.lora_alpha = args.lora_alpha or 32.0
    args.lora_targets = args.lora_targets or ["to_q", "to_k", "to_v", "to_out.0"]
    if args.guidance == "fixed" and (args.guidance_min, args.guidance_max) != (None, None):
        raise UsageError("--guidance_min and --guidance_max are about --guidance embed: add it or leave them out.")
    args.guidance_min = 1.0 if args.guidance_min is None else args.guidance_min
    args.guidance_max = 8.0 if args.guidance_max is None else args.guidance_max
    if not 0 <= args.guidance_min < args.guidance_max < float("inf"):
        raise UsageError(f"--guidance_min {args.guidance_min:g} and --guidance_max {args.guidance_max:g} are no range "
                         "of scales: 0 or more, and the first the smaller one.")  # fmt: skip
    # What `accelerate launch` was told reaches a script through the environment.
    cuda = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if args.use_8bit_adam and not cuda:
        raise UsageError("--use_8bit_adam needs a CUDA GPU: leave it out.")
    mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision == "fp16" and not cuda:
        raise UsageError("--mixed_precision fp16, here or at accelerate launch, needs a CUDA GPU: use bf16 or no.")


def teacher_contract(args):
    """The teacher's distillation.json, with the guidance scale of the flag in it where there is one."""
    path = args.pretrained_model_name_or_path
    contract = read_distillation(path)
    already = {"baked": "baked into its weights", "embedded": "an input of its UNet"}.get(contract["guidance"])
    config = UNet2DConditionModel.load_config(path, subfolder="unet", revision=args.revision)
    if config.get("time_cond_proj_dim") is not None:  # from elsewhere, without distillation.json
        already = "an input of its UNet"
    if already:
        raise UsageError(f"--pretrained_model_name_or_path {path}: the teacher's guidance is {already} already, so "
                         "there is nothing to distil.")  # fmt: skip
    scale = contract["guidance_scale"] if args.guidance_scale is None else args.guidance_scale
    if args.guidance == "fixed" and scale == 1:
        raise UsageError("--guidance_scale 1 is no guidance, so there is nothing to distil: use another scale.")
    if args.guidance == "embed" and not args.guidance_min <= scale <= args.guidance_max:
        raise UsageError(f"--guidance_scale {scale:g}, recorded for sampling, is not between --guidance_min "
                         f"{args.guidance_min:g} and --guidance_max {args.guidance_max:g}.")  # fmt: skip
    return {**contract, "guidance_scale": scale}


def draw(args, step, positions, latents, chain):
    """Per-sample randomness by global position: noise like latents, timesteps out of chain and guidance scales, (B,).

    All are drawn whatever the options, so that none changes what another one draws.
    """
    noise, timesteps, scales = [], [], []
    for position in positions:
        generator = sample_generator(args.seed, step, position)
        place, share = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        timesteps.append(chain[int(place * len(chain))])
        scales.append(args.guidance_min + share * (args.guidance_max - args.guidance_min))
        noise.append(torch.randn(latents.shape[1:], generator=generator))
    device = latents.device
    return torch.stack(noise).to(device), torch.tensor(timesteps, device=device), torch.tensor(scales, device=device)


def save_final(folder, args, pipeline, scheduler, contract, guidance_scale, step):
    """final/: the whole pipeline with the student in it, or the LoRA with its alpha and scheduler; contract, card."""
    base, name = args.pretrained_model_name_or_path, type(scheduler).__name__
    scales = f"scale {guidance_scale:g}"
    if args.guidance == "embed":
        scales = f"scales {args.guidance_min:g} to {args.guidance_max:g}, an input of the UNet"
    notes = {"method": f"guided distillation: classifier-free guidance in one pass ({scales})"}
    sampling = (
        f"num_inference_steps={contract['steps'] or SAMPLING_STEPS}, guidance_scale={contract['guidance_scale']:g}"
    )
    imports, load = "DiffusionPipeline", 'pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")'
    with FinalFolder(Path(folder) / "final") as final:
        if args.lora_rank:
            unet = pipeline.unet
            # Without the adapter metadata a reload would forget alpha and scale the LoRA by 1.
            type(pipeline).save_lora_weights(
                final, unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
                unet_lora_adapter_metadata=unet.peft_config["default"].to_dict())  # fmt: skip
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
        write_model_card(
            final, "Guided student", base, lora=bool(args.lora_rank),
            usage=f"""
from diffusers import {imports}

{load}
image = pipe("a prompt", {sampling}).images[0]""",
            notes={**notes, "sampling": "one UNet pass a step", "optimizer steps": step})  # fmt: skip


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
    contract = teacher_contract(args)
    guidance_scale, baked = contract["guidance_scale"], args.guidance == "fixed"
    args.resolution = args.resolution or native_resolution
    if args.resolution % factor:
        raise UsageError(f"--resolution {args.resolution} is not a multiple of {factor}, the VAE's factor.")
    dataset = load_dataset_from_args(args)
    folder = Path(args.output_dir) / (args.run_name or "")
    no_gpu = None if torch.accelerator.is_available() else True  # told so, accelerate joins several processes by gloo
    accelerator = Accelerator(
        cpu=no_gpu, gradient_accumulation_steps=args.gradient_accumulation_steps, mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to, project_dir=folder)  # fmt: skip
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UsageError("train_guided.py runs under DDP only: its average and checkpoints need whole weights on "
                         "every GPU; launch it with accelerate_configs/multi_gpu.yaml.")  # fmt: skip
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
    contract = {
        "method": "guided", "parent": args.pretrained_model_name_or_path, "steps": contract.get("steps"),
        "timesteps": contract.get("timesteps"), "guidance": "baked" if baked else "embedded",
        "guidance_scale": 1.0 if baked else guidance_scale, "target": "next",
    }  # fmt: skip
    chain = contract["timesteps"] or range(schedule.num_train_timesteps)  # a few-step teacher knows no others
    sampling_steps = contract["steps"] or SAMPLING_STEPS
    scheduler = ddim_scheduler(pipeline.scheduler, sampling_steps)
    unconditional = encode_empty_prompt(pipeline, args.resolution)

    # 2 trainable models, in fp32
    if args.lora_rank:
        unet = teacher  # with its adapters off
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
            args.pretrained_model_name_or_path, subfolder="unet", revision=args.revision, variant=args.variant,
            torch_dtype=torch.float32, use_safetensors=True)  # fmt: skip
        if args.guidance == "embed":
            unet = with_guidance_input(unet)
        pipeline.unet = unet.to(accelerator.device).requires_grad_(True)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.torch_compile:
        unet.compile()  # in place: parameter names stay those of the plain module
        if not args.lora_rank:
            teacher.compile()
    parameters = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    ema = EMA(parameters, args.ema_decay)

    # 3 optimizer
    optimizer_class = partial(torch.optim.AdamW, fused=True)
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as optimizer_class
    optimizer = optimizer_class(
        parameters.values(), lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay, eps=args.adam_epsilon)  # fmt: skip

    # 4 prepare, register, resume
    student, optimizer = accelerator.prepare(unet, optimizer)
    register_checkpoint_hooks(accelerator, {"student": parameters}, {"student": ema})
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
                    pipeline, args.validation_prompts, scheduler, sampling_steps, contract["guidance_scale"],
                    args.resolution, args.seed, args.num_validation_images)  # fmt: skip
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
                noise, timesteps, scales = draw(args, batch["step"], batch["positions"], latents, chain)
                scales = torch.full_like(scales, guidance_scale) if baked else scales
                z = schedule.add_noise(latents, noise, timesteps)
                pure = (timesteps == schedule.num_train_timesteps - 1).view(-1, 1, 1, 1)
                z = torch.where(pure, noise, z)
                both = unconditional.expand(len(z)).cat(conditioning)
                with torch.no_grad(), accelerator.autocast():
                    if args.lora_rank:
                        unet.disable_adapters()
                    outputs = predict(teacher, torch.cat([z, z]), torch.cat([timesteps, timesteps]), both)
                    if args.lora_rank:
                        unet.enable_adapters()  # and on they stay, through the backward
                unconditional_output, conditional_output = outputs.chunk(2)

                timestep_cond = None
                if args.guidance == "embed":
                    timestep_cond = guidance_embedding(pipeline, scales, unet.config.time_cond_proj_dim).to(z.device)
                with accelerator.autocast():
                    output = predict(student, z, timesteps, conditioning, timestep_cond)
                loss = guided_loss(output, conditional_output, unconditional_output, scales)
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
