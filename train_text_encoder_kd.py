"""Distil a pipeline's CLIP text encoder into a smaller one: fewer layers, a narrower MLP, or a narrower hidden size.

The student starts from the teacher's weights and learns from captions alone. h are the hidden states that the stock
pipeline feeds the UNet (at every padded position, as it passes no mask), p the pooled output:

    L = |h_S - h_T|^2 + w_p |p_S - p_T|^2 + w_u |eps(z, t, h_S) - eps(z, t, h_T)|^2         means over all elements

The last term (--through_unet) is measured through the frozen UNet eps, where not every direction of h counts alike; as
there are no images, z is pure noise and t from the noisier half, where that is what the UNet sees. A narrower hidden
size learns a projection back to the width of the UNet's cross-attention, which final/ holds as the stock UNet's own
`encoder_hid_proj`.

    accelerate launch train_text_encoder_kd.py --num_hidden_layers 1
    accelerate launch --multi_gpu --num_processes 8 train_text_encoder_kd.py --data_dir captions.json \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed_precision bf16

Run the same command with --resume_from_checkpoint latest to go on after a stop. Writes
<output_dir>/[<run_name>/]checkpoint-N/ and final/, a whole pipeline that stock diffusers opens.
"""

import contextlib
import os
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env, set_seed
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from tqdm.auto import tqdm
from transformers import CLIPTextConfig

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
from common.conditioning import Conditioning, encode_prompts, is_sdxl, predict
from common.contract import read_distillation, write_distillation
from common.data import build_dataloader, load_dataset_from_args
from common.diffusion import NoiseSchedule
from common.ema import EMA
from common.errors import UsageError
from common.hooks import register_checkpoint_hooks
from common.judging.previews import log_images, sample_images
from common.outputs import write_model_card
from common.pipelines import load_pipeline, read_pipeline_config, same_weights
from common.randomness import sample_generator
from common.run import StopSignal
from common.schedulers import ddim_scheduler
from common.text_encoders import fit_projection, kept_layers, shrink_text_encoder

SIZES = ("num_hidden_layers", "intermediate_size", "hidden_size")
FIT_CAPTIONS = 256  # that the projection of a narrower hidden size is first fitted on
VALIDATION_STEPS = 25  # of a teacher that was not trained for a number of steps


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_data_arguments(parser)
    add = parser.add_argument_group("method").add_argument
    add(
        "--text_encoder",
        choices=("text_encoder", "text_encoder_2"),
        default="text_encoder",
        help="which of SDXL's two encoders is made smaller",
    )
    add(
        "--num_hidden_layers",
        type=arguments.positive_int,
        help="layers of the student (default: half of the teacher's, or all where a width is given)",
    )
    add("--intermediate_size", type=arguments.positive_int, help="MLP width of the student (default: the teacher's)")
    add(
        "--hidden_size",
        type=arguments.positive_int,
        help="hidden size of the student, projected back for the UNet (default: the teacher's)",
    )
    add("--pooled_weight", type=float, default=0.5, help="w_p, weight of the pooled output's error")
    add("--through_unet", action="store_true", help="add the error measured through the frozen UNet's output")
    add("--unet_weight", type=arguments.positive_float, help="w_u, weight of --through_unet (default: 10)")
    add(
        "--caption_dropout",
        type=arguments.fraction,
        default=0.1,
        help="share of captions replaced by the empty one, which classifier-free guidance encodes",
    )
    arguments.add_optimization_arguments(parser, learning_rate=1e-3, train_batch_size=64, max_train_steps=2000)
    arguments.add_checkpoint_arguments(parser, output_dir="outputs/text_encoder_kd")
    arguments.add_validation_arguments(parser)
    arguments.add_runtime_arguments(parser)
    return parser.parse_args(argv)


def text_encoder_loss(
    hidden,
    pooled,
    teacher_hidden,
    teacher_pooled,
    pooled_weight=0.5,
    output=None,
    teacher_output=None,
    unet_weight=0.0,
):
    """The equation on top: dict of the scalars "loss" and, unweighted, "hidden_loss", "pooled_loss" and "unet_loss".

    hidden: (B, L, D) as the UNet's cross-attention gets them; pooled: (B, P); output: the UNet's (B, C, H, W), given
    these and, teacher_output, the teacher's, or None for both. In fp32 throughout.
    """
    losses = {
        "hidden_loss": ((hidden.float() - teacher_hidden.float()) ** 2).mean(),
        "pooled_loss": ((pooled.float() - teacher_pooled.float()) ** 2).mean(),
    }
    loss = losses["hidden_loss"] + pooled_weight * losses["pooled_loss"]
    if output is not None:
        losses["unet_loss"] = ((output.float() - teacher_output.float()) ** 2).mean()
        loss = loss + unet_weight * losses["unet_loss"]
    return {"loss": loss, **losses}


class TextStates(torch.nn.Module):
    """input_ids (B, L) -> hidden states (B, L, D) as the UNet's cross-attention gets them, pooled output (B, P).

    With `penultimate` (SDXL) the states before the last layer, as its pipeline takes them.
    """

    def __init__(self, encoder, penultimate=False, projection=None):
        super().__init__()
        self.encoder, self.penultimate, self.projection = encoder, penultimate, projection

    def forward(self, input_ids):
        output = self.encoder(input_ids, output_hidden_states=self.penultimate)
        hidden = output.hidden_states[-2] if self.penultimate else output.last_hidden_state
        pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
        if self.projection is not None:  # an SD pipeline's pooled output is the states at the end of the text
            hidden, pooled = self.projection(hidden), self.projection(pooled)
        return hidden, pooled


def tokenize(tokenizer, captions):
    """Token ids (B, L), padded and truncated to the model's length as stock pipelines do."""
    return tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def with_student(conditioning, hidden, pooled, name):
    """The teacher's Conditioning with the states of encoder `name` replaced by the student's."""
    embeds, width = conditioning.prompt_embeds, hidden.shape[-1]
    hidden = hidden.to(embeds.dtype)
    if conditioning.pooled_prompt_embeds is None:
        return Conditioning(hidden)
    if name == "text_encoder":  # the first half of SDXL's states; its pooled output is the second encoder's
        embeds = torch.cat([hidden, embeds[..., width:]], dim=-1)
        return Conditioning(embeds, conditioning.pooled_prompt_embeds, conditioning.time_ids)
    embeds = torch.cat([embeds[..., :-width], hidden], dim=-1)
    return Conditioning(embeds, pooled.to(embeds.dtype), conditioning.time_ids)


@contextlib.contextmanager
def student_in_place(pipeline, name, student):
    """Within the context `pipeline` is the student's: its encoder, and where it is narrower its projection."""
    unet, teacher, projection = pipeline.unet, getattr(pipeline, name), student.projection
    setattr(pipeline, name, student.encoder)
    if projection is not None:
        unet.encoder_hid_proj = projection
        unet.register_to_config(encoder_hid_dim=projection.in_features, encoder_hid_dim_type="text_proj")
    try:
        yield
    finally:
        setattr(pipeline, name, teacher)
        if projection is not None:
            unet.encoder_hid_proj = None
            unet.register_to_config(encoder_hid_dim=None, encoder_hid_dim_type=None)


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work."""
    for name in ("image_column", "center_crop", "random_flip"):
        if getattr(args, name):
            raise UsageError(f"--{name} is about images, and this script reads captions only: leave it out.")
    if not 0 <= args.pooled_weight < float("inf"):
        raise UsageError(f"--pooled_weight {args.pooled_weight} is not a number from 0 on.")
    if args.unet_weight is not None and not args.through_unet:
        raise UsageError("--unet_weight is given but --through_unet is not.")
    # What `accelerate launch` was told reaches a script through the environment.
    cuda = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if args.use_8bit_adam and not cuda:
        raise UsageError("--use_8bit_adam needs a CUDA GPU: leave it out.")
    mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision == "fp16" and not cuda:
        raise UsageError("--mixed_precision fp16, here or at accelerate launch, needs a CUDA GPU: use bf16 or no.")


def check_student(args, sdxl):
    """Fill in the student's sizes from the teacher's config files; returns the teacher's distillation.json.

    UsageError where such a student can't be made of this teacher.
    """
    path, name = args.pretrained_model_name_or_path, args.text_encoder
    if name == "text_encoder_2" and not sdxl:
        raise UsageError(f"--text_encoder text_encoder_2: {path} has one text encoder only.")
    kind = (DiffusionPipeline.load_config(path, revision=args.revision).get(name) or [None, None])[-1]
    if kind not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise UsageError(f"--pretrained_model_name_or_path {path}: its {name} is {kind}, not a CLIP text model.")
    try:
        teacher = CLIPTextConfig.from_pretrained(path, subfolder=name, revision=args.revision)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--pretrained_model_name_or_path {path}: {name}/config.json can't be read ({str(error).splitlines()[0]})."
        ) from None
    if getattr(teacher, "use_attention_mask", False):
        raise UsageError(
            f"--pretrained_model_name_or_path {path}: its {name} masks the padding, which this script does not handle."
        )
    whole = args.intermediate_size is None and args.hidden_size is None
    least = 2 if sdxl else 1
    if args.num_hidden_layers is None:
        args.num_hidden_layers = max(teacher.num_hidden_layers // 2, least) if whole else teacher.num_hidden_layers
    args.intermediate_size = args.intermediate_size or teacher.intermediate_size
    args.hidden_size = args.hidden_size or teacher.hidden_size
    for size in SIZES:
        if getattr(args, size) > getattr(teacher, size):
            raise UsageError(f"--{size} {getattr(args, size)} is more than the teacher's {getattr(teacher, size)}.")
    if args.num_hidden_layers < least:
        raise UsageError(
            f"--num_hidden_layers {args.num_hidden_layers}: SDXL's UNet gets the states before the last "
            "layer, so at least 2 are needed."
        )
    if args.hidden_size % teacher.num_attention_heads:
        raise UsageError(
            f"--hidden_size {args.hidden_size} is not divisible by the teacher's "
            f"{teacher.num_attention_heads} attention heads."
        )
    if args.hidden_size < teacher.hidden_size:
        if sdxl:
            raise UsageError("--hidden_size is for pipelines with one text encoder: SDXL's two are read side by side.")
        unet = UNet2DConditionModel.load_config(path, subfolder="unet", revision=args.revision)
        if unet.get("encoder_hid_dim") is not None:
            raise UsageError(
                f"--hidden_size: the UNet of {path} has a projection of text states already; start from "
                "the model it was made of."
            )
    if sdxl and args.pooled_weight == 0:
        raise UsageError("--pooled_weight 0: SDXL's last layer learns from the pooled output alone.")
    contract = read_distillation(path)
    if args.through_unet and contract["guidance"] == "embedded":
        raise UsageError(
            "--through_unet: this UNet takes its guidance scale as an input, which is not sampled here; "
            "leave the flag out."
        )
    return contract


def draw(args, step, positions, shape, schedule):
    """Per-sample randomness by global position: which captions are dropped (list of bool), noise, timesteps (B,).

    Timesteps are those of the noisier half of the schedule; noise (B, *shape) is the UNet's input.
    """
    dropped, noise, timesteps = [], [], []
    for position in positions:
        generator = sample_generator(args.seed, step, position)
        dropped.append(torch.rand((), generator=generator).item() < args.caption_dropout)
        if args.through_unet:
            steps = schedule.num_train_timesteps
            timesteps.append(torch.randint(steps // 2, steps, (), generator=generator))
            noise.append(torch.randn(shape, generator=generator))
    return dropped, noise and torch.stack(noise), timesteps and torch.stack(timesteps)


def output_scheduler(scheduler, contract):
    """What samples the student: trailing DDIM, or the scheduler that a few-step teacher was trained for."""
    if contract.get("steps"):
        return scheduler
    scheduler = ddim_scheduler(scheduler, VALIDATION_STEPS)
    scheduler.register_to_config(steps_offset=1)  # trailing timesteps have none; stock pipelines complain of 0
    return scheduler


def count(*modules):
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


def save_final(folder, args, student, contract, step):
    """final/: a whole pipeline in fp32 with the averaged student in it, distillation.json, model card."""
    pipeline = load_pipeline(args.pretrained_model_name_or_path, torch.float32, args.revision, args.variant)
    teacher = getattr(pipeline, args.text_encoder)
    before, after = count(teacher), count(student.encoder, student.projection)
    with FinalFolder(Path(folder) / "final") as final, student_in_place(pipeline, args.text_encoder, student):
        pipeline.scheduler = output_scheduler(pipeline.scheduler, contract)
        pipeline.save_pretrained(final)
        carried = {name: contract.get(name) for name in ("steps", "timesteps", "guidance", "guidance_scale", "target")}
        write_distillation(final, method="text_encoder_kd", parent=args.pretrained_model_name_or_path, **carried)
        steps = f"num_inference_steps={contract['steps']}, " if contract.get("steps") else ""
        changed = ", ".join(
            f"{name} {getattr(teacher.config, name)} -> {getattr(student.encoder.config, name)}" for name in SIZES
        )
        through = f", through the UNet (weight {args.unet_weight:g})" if args.through_unet else ""
        write_model_card(
            final,
            "Pipeline with a smaller text encoder",
            args.pretrained_model_name_or_path,
            usage=f"""
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
image = pipe("a prompt", {steps}guidance_scale={contract["guidance_scale"]:g}).images[0]""",
            notes={
                "method": f"knowledge distillation of {args.text_encoder}",
                f"{args.text_encoder} parameters": f"{before:,} -> {after:,}, projection included",
                "sizes": changed,
                "loss": f"hidden states, pooled output (weight {args.pooled_weight:g}){through}",
                "optimizer steps": step,
            },
        )


def export_fp16(folder):
    """final-fp16/: final/ in half precision; reloaded and compared."""
    final = Path(folder) / "final"
    pipeline = load_pipeline(final, torch.float16)
    with FinalFolder(Path(folder) / "final-fp16") as export:
        pipeline.save_pretrained(export)
        for name in ("distillation.json", "README.md"):
            (export / name).write_text((final / name).read_text())
        again = load_pipeline(export, torch.float16).components
        for component, module in pipeline.components.items():
            if isinstance(module, torch.nn.Module) and not same_weights(module, again[component]):
                raise RuntimeError(f"the exported pipeline reloads with another {component}")


def main(args):
    check_arguments(args)
    arguments.check_tracker(args)
    arguments.use_embedded_default(args)
    pipeline_class, native_resolution, factor = read_pipeline_config(args.pretrained_model_name_or_path, args.revision)
    contract = check_student(args, pipeline_class is StableDiffusionXLPipeline)
    args.unet_weight = args.unet_weight or 10.0  # on tiny-sd its gradient is then about the hidden states'
    args.resolution = args.resolution or native_resolution
    if args.resolution % factor:
        raise UsageError(f"--resolution {args.resolution} is not a multiple of {factor}, the VAE's factor.")
    dataset = load_dataset_from_args(args, needs_images=False)
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
            "train_text_encoder_kd.py runs under DDP only: a text encoder has little to shard; launch it "
            "with accelerate_configs/multi_gpu.yaml."
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
    set_seed(args.seed)  # nothing after it draws a global random number

    # 1 frozen models, in the compute dtype
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipeline = load_pipeline(args.pretrained_model_name_or_path, dtype, args.revision, args.variant)
    pipeline.to(accelerator.device)
    unet, vae, sdxl = pipeline.unet, pipeline.vae, is_sdxl(pipeline)
    if sdxl and dtype == torch.float16:
        vae.to(dtype=torch.float32)  # SDXL's VAE overflows in half precision
    teacher = TextStates(getattr(pipeline, args.text_encoder), penultimate=sdxl)
    tokenizer = pipeline.tokenizer if args.text_encoder == "text_encoder" else pipeline.tokenizer_2
    schedule = NoiseSchedule(pipeline.scheduler, accelerator.device)
    latent_shape = (unet.config.in_channels, args.resolution // factor, args.resolution // factor)

    # 2 trainable models, in fp32, from the teacher's weights as they are stored
    source = type(teacher.encoder).from_pretrained(
        args.pretrained_model_name_or_path,
        subfolder=args.text_encoder,
        revision=args.revision,
        variant=args.variant,
        dtype=torch.float32,
        use_safetensors=True,
    )
    encoder = shrink_text_encoder(
        source, args.num_hidden_layers, args.intermediate_size, args.hidden_size, penultimate=sdxl
    )
    projection = None
    if args.hidden_size < source.config.hidden_size:
        captions = [dataset[i, 0, i]["caption"] for i in range(min(dataset.size or FIT_CAPTIONS, FIT_CAPTIONS))]
        input_ids = tokenize(tokenizer, ["", *captions])  # the same on every rank
        with torch.no_grad():
            projection = fit_projection(TextStates(encoder)(input_ids)[0], TextStates(source)(input_ids)[0])
    accelerator.print(
        f"{args.text_encoder}: {count(source):,} -> {count(encoder, projection):,} parameters, layers "
        f"{kept_layers(source.config.num_hidden_layers, args.num_hidden_layers, sdxl)} of the teacher's; "
        f"captions are cut at {tokenizer.model_max_length} tokens."
    )
    student = TextStates(encoder, sdxl, projection).to(accelerator.device)
    student.train()  # transformers checkpoints gradients in this mode only; there is no drop-out
    if args.gradient_checkpointing:
        encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        unet.enable_gradient_checkpointing()
    if args.torch_compile:
        student.compile()  # in place: parameter names stay those of the plain module
        if args.through_unet:
            unet.compile()
    parameters = dict(student.named_parameters())
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
    plain_student = student
    student, optimizer = accelerator.prepare(student, optimizer)
    register_checkpoint_hooks(accelerator, {"text_encoder": parameters}, {"text_encoder": ema})
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
            scheduler = output_scheduler(pipeline.scheduler, contract)
            steps = contract.get("steps") or VALIDATION_STEPS
            in_place = student_in_place(pipeline, args.text_encoder, plain_student)
            with ema.applied(parameters), in_place, accelerator.autocast():
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
        step_losses = {}
        for _ in range(args.gradient_accumulation_steps):
            batch = next(dataloader)
            with accelerator.accumulate(student):
                dropped, z, timesteps = draw(args, batch["step"], batch["positions"], latent_shape, schedule)
                captions = ["" if drop else caption for drop, caption in zip(dropped, batch["captions"])]
                input_ids = tokenize(tokenizer, captions).to(accelerator.device)
                with torch.no_grad(), accelerator.autocast():
                    teacher_hidden, teacher_pooled = teacher(input_ids)
                with accelerator.autocast():
                    hidden, pooled = student(input_ids)
                output = teacher_output = None
                if args.through_unet:
                    z, timesteps = z.to(accelerator.device), timesteps.to(accelerator.device)
                    conditioning = encode_prompts(pipeline, captions, args.resolution)
                    with torch.no_grad(), accelerator.autocast():
                        teacher_output = predict(unet, z, timesteps, conditioning)
                    conditioning = with_student(conditioning, hidden, pooled, args.text_encoder)
                    with accelerator.autocast():
                        output = predict(unet, z, timesteps, conditioning)
                losses = text_encoder_loss(
                    hidden,
                    pooled,
                    teacher_hidden,
                    teacher_pooled,
                    args.pooled_weight,
                    output,
                    teacher_output,
                    args.unet_weight,
                )
                accelerator.backward(losses["loss"])
                for name, value in losses.items():
                    share = value.detach() / args.gradient_accumulation_steps
                    step_losses[name] = step_losses.get(name, 0) + share
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

        logs = {name: accelerator.reduce(x, reduction="mean").item() for name, x in step_losses.items()}
        bar.set_postfix(loss=f"{logs['loss']:.4f}", grad_norm=f"{grad_norm.item():.2f}")
        accelerator.log({**logs, "grad_norm": grad_norm.item(), "lr": learning_rate}, step=step)
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
            save_final(folder, args, plain_student, contract, step)
        if args.export:
            export_fp16(folder)
        print(f"Done: {folder / 'final'}", flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    args = parse_args()
    arguments.run_script(main, args)
