"""Distil K guided DDIM steps of a teacher into ONE step of a LoRA student (Flash Diffusion, arXiv:2406.02347, eq. 3).

The teacher is the student with its adapters switched off, so one UNet is in memory. From a timestep t of the student's
own N-step schedule the teacher takes K DDIM steps with classifier-free guidance; the student gets there in one forward
without guidance:

    z_t = alpha_t x + sigma_t eps        pure noise where t is the last training timestep: there sampling starts
    z*  = DDIM_K(z_t : t -> end)         teacher, guided; end is the clean latents (--target x0) or the next student
    z^  = DDIM_1(z_t : t -> end)         timestep (--target next); student, one pass
    L   = d(z^, z*)

    accelerate launch train_flash_lora.py --num_ddim_steps 8
    accelerate launch --multi_gpu --num_processes 8 train_flash_lora.py --data_dir coco \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed_precision bf16

Run the same command with --resume_from_checkpoint latest to go on after a stop. Writes
<output_dir>/[<run_name>/]lora/checkpoint-N/ and final/, which `pipe.load_lora_weights` opens.
"""

import json
import os
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env, set_seed
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
from common.diffusion import NoiseSchedule, ddim_rollout, student_scheduler, student_timesteps
from common.ema import EMA
from common.hooks import register_checkpoint_hooks
from common.metrics import load_lpips
from common.models import (
    decode_latents,
    encode_empty_prompt,
    encode_images,
    encode_prompts,
    is_sdxl,
    load_pipeline,
    predict,
    predict_guided,
    read_distillation,
    read_pipeline_config,
    same_weights,
)
from common.validation import log_images, sample_images, write_distillation, write_model_card

LPIPS_CROP = 32  # latents per side that --loss lpips decodes: 256 pixels, as a whole image would need too much memory


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_data_arguments(parser)
    add = parser.add_argument_group("method").add_argument
    add("--num_ddim_steps", type=arguments.positive_int, default=8, help="K: teacher DDIM steps per student step")
    add("--num_inference_steps", type=arguments.positive_int, default=4, help="N: steps of the student's schedule")
    add("--guidance_scale", type=float, help="teacher's guidance (default: what it was saved with, else 7.5)")
    add("--target", choices=("x0", "next"), default="x0",
        help="the teacher's clean latents (for LCM), or its latents at the next student timestep (DDIM)")  # fmt: skip
    add("--loss", choices=("l2", "huber", "lpips"), default="huber",
        help="distance d; lpips compares decoded crops")  # fmt: skip
    add("--timestep_probs", type=arguments.positive_float, nargs="+",
        help="how often each of the N student timesteps is drawn, noisiest first, such as 0.4 0.2 0.2 0.2: the first "
             "step has the most to learn (default: all alike)")  # fmt: skip
    add("--loss_weighting", choices=("none", "snr", "truncated_snr"), default="none",
        help="weight of a timestep's error in x0: 1, SNR, or max(SNR, 1)")  # fmt: skip
    add("--lpips_trunk_path", help="VGG-16 weights for --loss lpips (default: torchvision's download)")
    add("--cache_rollouts", type=arguments.natural,
        help="compute the teacher's roll-outs of so many optimizer steps, keep them in memory, and cycle over them: "
             "a step then costs one student pass (default: 64 for the embedded default, else 0: never)")  # fmt: skip
    add("--lora_rank", type=arguments.positive_int, default=4, help="rank of the adapters")
    add("--lora_alpha", type=arguments.positive_float, default=32, help="scale of the adapters is alpha / rank")
    add("--lora_targets", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0"], help="UNet layers to adapt")
    arguments.add_optimization_arguments(parser, learning_rate=1e-3, train_batch_size=32, max_train_steps=500)
    arguments.add_checkpoint_arguments(parser, output_dir="outputs/flash_lora")
    arguments.add_validation_arguments(parser)
    arguments.add_runtime_arguments(parser)
    return parser.parse_args(argv)


def flash_loss(output, z, timesteps, target, end_timesteps, schedule, loss="l2", loss_weighting="none", lpips=None):
    """d(DDIM_1(z_t : t -> end), z*): the distance of the student's one step from the teacher's K. Scalar.

    output: student's model output at (z, timesteps), (B, C, H, W); target: the teacher's latents z* at end_timesteps.
    l2 is the mean square; huber is sqrt(d^2 + c^2) - c with c = 1e-3; lpips compares the clean latents that the two
    steps stand for through `lpips(x0, x0) -> (B,)`. In fp32 throughout.
    """
    prediction = schedule.ddim_step(output, z, timesteps, end_timesteps)
    if loss == "lpips":
        x0 = schedule.to_x0(output, z, timesteps)
        distance = lpips(x0, schedule.x0_of_step(target, z, timesteps, end_timesteps))
    else:
        error = prediction - target
        distance = error**2 if loss == "l2" else torch.sqrt(error**2 + 1e-3**2) - 1e-3
        distance = distance.mean(dim=(1, 2, 3))
    if loss_weighting != "none":
        snr = schedule.snr(timesteps).flatten()
        distance = distance * (snr if loss_weighting == "snr" else snr.clamp(min=1))
    return distance.mean()


def decoded_lpips(network, vae, x0, target, seed, step, positions):
    """LPIPS (B,) of two clean latents (B, C, H, W), decoded; of larger ones a random crop, the same of both.

    A crop is drawn from its sample's own generator by global position, so it is the same on any rank and on resume.
    """
    height, width = (min(LPIPS_CROP, size) for size in x0.shape[-2:])
    crops, target_crops = [], []
    for position, z, z_target in zip(positions, x0, target):
        generator = sample_generator(seed, step, position, stream=3)
        y = torch.randint(z.shape[-2] - height + 1, (), generator=generator).item()
        x = torch.randint(z.shape[-1] - width + 1, (), generator=generator).item()
        crops.append(z[:, y : y + height, x : x + width])
        target_crops.append(z_target[:, y : y + height, x : x + width])
    with torch.no_grad():
        target_pixels = decode_latents(vae, torch.stack(target_crops))
    return network(decode_latents(vae, torch.stack(crops)), target_pixels).flatten()


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work."""
    if args.loss_weighting != "none" and args.target == "next":
        raise UsageError("--loss_weighting weights errors in x0, which --target next does not compare: use 'none'.")
    if args.lpips_trunk_path and args.loss != "lpips":
        raise UsageError("--lpips_trunk_path is given but --loss is not lpips.")
    if args.lpips_trunk_path and not Path(args.lpips_trunk_path).is_file():
        raise UsageError(f"--lpips_trunk_path {args.lpips_trunk_path}: there is no such file.")
    if args.guidance_scale is not None and args.guidance_scale < 0:
        raise UsageError(f"--guidance_scale {args.guidance_scale} is negative.")
    if args.num_inference_steps > 1000:
        raise UsageError(f"--num_inference_steps {args.num_inference_steps} is more than the model's 1000 timesteps.")
    if args.timestep_probs is not None and len(args.timestep_probs) != args.num_inference_steps:
        raise UsageError(f"--timestep_probs has {len(args.timestep_probs)} numbers; the student has "
                         f"--num_inference_steps {args.num_inference_steps}.")  # fmt: skip
    # What `accelerate launch` was told reaches a script through the environment.
    cuda = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if args.use_8bit_adam and not cuda:
        raise UsageError("--use_8bit_adam needs a CUDA GPU: leave it out.")
    mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision == "fp16" and not cuda:
        raise UsageError("--mixed_precision fp16, here or at accelerate launch, needs a CUDA GPU: use bf16 or no.")


def teacher_guidance(args):
    """The guidance scale of the teacher: the flag, else what the pipeline was saved with, else 7.5."""
    distillation = read_distillation(args.pretrained_model_name_or_path)
    if distillation["guidance"] == "embedded":
        raise UsageError("the teacher takes its guidance scale as an input; this script distils an unconditional or "
                         "cfg one: start from the model it was made of.")  # fmt: skip
    if distillation["guidance"] == "baked":
        if args.guidance_scale not in (None, 1):
            raise UsageError(f"--guidance_scale {args.guidance_scale}: the teacher has its guidance baked in already.")
        return 1.0
    return distillation["guidance_scale"] if args.guidance_scale is None else args.guidance_scale


def draw(args, step, positions, latents):
    """Per-sample randomness by global position: noise like latents, and indices into the student's timesteps (B,)."""
    noise, slots = [], []
    probs = torch.tensor(args.timestep_probs or [1.0] * args.num_inference_steps)
    for position in positions:
        generator = sample_generator(args.seed, step, position)
        slots.append(torch.multinomial(probs, 1, generator=generator)[0])
        noise.append(torch.randn(latents.shape[1:], generator=generator))
    return torch.stack(noise).to(latents.device), torch.stack(slots).to(latents.device)


def save_final(folder, args, pipeline, scheduler, timesteps, guidance_scale, step):
    """final/: the LoRA with its alpha, the scheduler it was trained for, distillation.json, model card."""
    with FinalFolder(Path(folder) / "final") as final:
        unet = pipeline.unet
        # Without the adapter metadata a reload would forget alpha and scale the LoRA by 1.
        type(pipeline).save_lora_weights(
            final, unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict())  # fmt: skip
        scheduler.save_pretrained(final / "scheduler")
        write_distillation(
            final, method="flash_lora", parent=args.pretrained_model_name_or_path, steps=args.num_inference_steps,
            timesteps=timesteps, guidance="baked", guidance_scale=1.0, target=args.target)  # fmt: skip
        name = type(scheduler).__name__
        write_model_card(
            final, "Few-step LoRA", args.pretrained_model_name_or_path, lora=True,
            usage=f"""
from diffusers import DiffusionPipeline, {name}

pipe = DiffusionPipeline.from_pretrained("{args.pretrained_model_name_or_path}")
pipe.load_lora_weights("path/to/this/folder")
pipe.scheduler = {name}.from_pretrained("path/to/this/folder", subfolder="scheduler")
image = pipe("a prompt", num_inference_steps={args.num_inference_steps}, guidance_scale=1).images[0]""",
            notes={
                "method": f"flash LoRA: {args.num_ddim_steps} guided DDIM steps (scale {guidance_scale:g}) in one",
                "steps": f"{args.num_inference_steps}, at timesteps {timesteps}",
                "target, loss": f"{args.target}, {args.loss}",
                "LoRA": f"rank {args.lora_rank}, alpha {args.lora_alpha:g}, on {', '.join(args.lora_targets)}",
                "optimizer steps": step,
            })  # fmt: skip


def export_fp16(folder, args):
    """final-fp16/: a whole pipeline with the LoRA fused in, for those who want no adapter; reloaded and compared."""
    pipeline = load_pipeline(args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant)
    final = Path(folder) / "final"
    pipeline.load_lora_weights(final)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    distillation = json.loads((final / "distillation.json").read_text())
    scheduler_class = student_scheduler(pipeline.scheduler, args.target, args.num_inference_steps).__class__
    pipeline.scheduler = scheduler_class.from_pretrained(final, subfolder="scheduler")
    pipeline.to(dtype=torch.float16)
    with FinalFolder(Path(folder) / "final-fp16") as export:
        pipeline.save_pretrained(export)
        write_distillation(export, **distillation)
        (export / "README.md").write_text((final / "README.md").read_text())
        if not same_weights(pipeline.unet, load_pipeline(export, torch.float16).unet):
            raise RuntimeError("the exported pipeline reloads with another UNet")


def main(args):
    check_arguments(args)
    arguments.check_tracker(args)
    if args.cache_rollouts is None:
        args.cache_rollouts = 64 if args.pretrained_model_name_or_path is None else 0
    arguments.use_embedded_default(args)
    guidance_scale = teacher_guidance(args)
    _, native_resolution, factor = read_pipeline_config(args.pretrained_model_name_or_path, args.revision)
    args.resolution = args.resolution or native_resolution
    if args.resolution % factor:
        raise UsageError(f"--resolution {args.resolution} is not a multiple of {factor}, the VAE's factor.")
    dataset = load_dataset_from_args(args)
    folder = Path(args.output_dir) / (args.run_name or "") / "lora"
    no_gpu = None if torch.accelerator.is_available() else True  # told so, accelerate joins several processes by gloo
    accelerator = Accelerator(
        cpu=no_gpu, gradient_accumulation_steps=args.gradient_accumulation_steps, mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to, project_dir=folder)  # fmt: skip
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UsageError("train_flash_lora.py runs under DDP only: its UNet is student and teacher by turns, and a "
                         "LoRA has little to shard; launch it with accelerate_configs/multi_gpu.yaml.")  # fmt: skip
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
    unet, vae = pipeline.unet, pipeline.vae
    if is_sdxl(pipeline) and dtype == torch.float16:
        vae.to(dtype=torch.float32)  # SDXL's VAE overflows in half precision
    schedule = NoiseSchedule(pipeline.scheduler, accelerator.device)
    scheduler = student_scheduler(pipeline.scheduler, args.target, args.num_inference_steps)
    timesteps_list = student_timesteps(scheduler, args.num_inference_steps)
    student_times = torch.tensor([*timesteps_list, -1], device=accelerator.device)
    unconditional = encode_empty_prompt(pipeline, args.resolution)

    # 2 trainable models, in fp32
    names = [name for name, _ in unet.named_modules()]
    for target in args.lora_targets:  # peft ignores one that matches nothing beside one that does
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise UsageError(f"--lora_targets {target}: the UNet has no layer of that name.")
    try:
        unet.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=args.lora_targets))
    except ValueError as error:
        raise UsageError(f"--lora_targets: {str(error).splitlines()[0]}") from None
    cast_training_params(unet, dtype=torch.float32)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.torch_compile:
        unet.compile()  # in place: parameter names stay those of the plain module
    parameters = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    ema = EMA(parameters, args.ema_decay)
    lpips = None
    if args.loss == "lpips":
        try:
            lpips = load_lpips(args.lpips_trunk_path).to(accelerator.device)
        except (ValueError, OSError) as error:
            raise UsageError(f"--loss lpips: {error}") from None

    # 3 optimizer
    optimizer_class = partial(torch.optim.AdamW, fused=True)
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as optimizer_class
    optimizer = optimizer_class(
        parameters.values(), lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay, eps=args.adam_epsilon)  # fmt: skip

    # 4 prepare, register, resume
    student, optimizer = accelerator.prepare(unet, optimizer)
    register_checkpoint_hooks(accelerator, {"lora": parameters}, {"lora": ema})
    if checkpoint:
        load_checkpoint(accelerator, checkpoint)
        ema.updates = step

    # 5 data, from the step on that comes next; never prepared, its order depends on the global batch alone
    dataloader = iter(build_dataloader(dataset, args, accelerator, step, cycle_steps=args.cache_rollouts))
    rollouts = {}  # (step within the cycle, micro-batch) to (z, timesteps, end_timesteps, target), on the CPU

    # 6 trackers
    if accelerator.log_with:
        config = {key: value if isinstance(value, int | float) else str(value) for key, value in vars(args).items()}
        accelerator.init_trackers("logs", config)

    def validate():
        if accelerator.is_main_process:
            with ema.applied(parameters), accelerator.autocast():
                rows = sample_images(
                    pipeline, args.validation_prompts, scheduler, args.num_inference_steps, 1.0, args.resolution,
                    args.seed, args.num_validation_images)  # fmt: skip
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
        for micro_batch in range(args.gradient_accumulation_steps):
            batch = next(dataloader)
            with accelerator.accumulate(student):
                conditioning = encode_prompts(pipeline, batch["captions"], args.resolution)
                key = (batch["step"], micro_batch)
                if key in rollouts:
                    z, timesteps, end_timesteps, target = (x.to(accelerator.device) for x in rollouts[key])
                else:
                    latents = encode_images(vae, batch["pixel_values"])
                    noise, slots = draw(args, batch["step"], batch["positions"], latents)
                    timesteps = student_times[slots]
                    end_timesteps = student_times[slots + 1 if args.target == "next" else torch.full_like(slots, -1)]
                    z = schedule.add_noise(latents, noise, timesteps)
                    pure = (timesteps == schedule.num_train_timesteps - 1).view(-1, 1, 1, 1)
                    z = torch.where(pure, noise, z)
                    with torch.no_grad(), accelerator.autocast():
                        unet.disable_adapters()
                        target = ddim_rollout(
                            lambda z, t: predict_guided(unet, z, t, conditioning, unconditional, guidance_scale),
                            schedule, z, timesteps, end_timesteps, args.num_ddim_steps)  # fmt: skip
                        unet.enable_adapters()  # and on they stay, through the backward
                    if args.cache_rollouts:
                        rollouts[key] = tuple(x.cpu() for x in (z, timesteps, end_timesteps, target))

                with accelerator.autocast():
                    output = predict(student, z, timesteps, conditioning)
                loss = flash_loss(
                    output, z, timesteps, target, end_timesteps, schedule, args.loss, args.loss_weighting,
                    lambda a, b: decoded_lpips(lpips, vae, a, b, args.seed, step, batch["positions"]))  # fmt: skip
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
            save_final(folder, args, pipeline, scheduler, timesteps_list, guidance_scale, step)
        if args.export:
            export_fp16(folder, args)
        print(f"Done: {folder / 'final'}", flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    args = parse_args()
    arguments.run_script(main, args)
