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

import common  # noqa: F401  first: it silences what importing diffusers would say

# isort: split
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig

from common import arguments
from common.arguments import ByModel
from common.conditioning import encode_prompts, is_sdxl, predict
from common.contract import STEPS, make_contract, read_teacher
from common.data import load_dataset_from_args
from common.diffusion import NoiseSchedule
from common.ema import EMA
from common.engines import prepare, whole
from common.errors import UsageError, first_line
from common.frozen import load_frozen
from common.judging.previews import preview
from common.loader import build_dataloader
from common.lora import trainable
from common.optimization import adamw, clip, learning_rate_at, set_learning_rate, update
from common.outputs import export, save_student
from common.pipelines import latent_shape, load_unet, load_whole, set_up
from common.preflight import preflight
from common.randomness import sample_generator
from common.run import open_run, run_script
from common.schedulers import ddim_scheduler
from common.settle import settle
from common.text_encoders import (
    TextStates,
    fit_projection,
    kept_layers,
    set_projection,
    shrink_text_encoder,
    student_in_place,
    tokenize,
    with_student,
)

SIZES = ("num_hidden_layers", "intermediate_size", "hidden_size")
FIT_CAPTIONS = 256  # that the projection of a narrower hidden size is first fitted on


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_data_arguments(parser, cached=False)  # what it trains makes the embeddings anew
    add = parser.add_argument_group("method").add_argument
    encoders = ("text_encoder", "text_encoder_2")
    add("--text_encoder", choices=encoders, default="text_encoder", help="which of SDXL's two is made smaller")
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
    add("--pooled_weight", type=arguments.weight, default=0.5, help="w_p, weight of the pooled output's error")
    add("--through_unet", action="store_true", help="add the error measured through the frozen UNet's output")
    add("--unet_weight", type=arguments.positive_float, help="w_u, weight of --through_unet (default: 10)")
    add(
        "--caption_dropout",
        type=arguments.fraction,
        default=0.1,
        help="share of captions replaced by the empty one, which classifier-free guidance encodes",
    )
    arguments.add_optimization_arguments(
        parser, learning_rate=ByModel(1e-3, 1e-4), train_batch_size=ByModel(64, 4), max_train_steps=2000
    )
    arguments.add_checkpoint_arguments(parser, output_dir="outputs/text_encoder_kd")
    arguments.add_validation_arguments(parser)
    arguments.add_runtime_arguments(parser)
    return parser.parse_args(argv)


def text_encoder_loss(
    hidden, pooled, output, teacher_hidden, teacher_pooled, teacher_output, pooled_weight=0.5, unet_weight=0.0
):
    """The equation on top: dict of the scalars "loss" and, unweighted, "hidden_loss", "pooled_loss" and "unet_loss".

    hidden: (B, L, D) as the UNet's cross-attention gets them; pooled: (B, P); output: the UNet's (B, C, H, W), given
    these and, teacher_output, the teacher's, or None for both: no such term. In fp32 throughout.
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


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work; fill in the defaults that belong to other flags."""
    for name in ("image_column", "center_crop", "random_flip"):
        if getattr(args, name):
            raise UsageError(f"--{name} is about images, and this script reads captions only: leave it out.")
    if args.unet_weight is not None and not args.through_unet:
        raise UsageError("--unet_weight is given but --through_unet is not.")
    args.unet_weight = args.unet_weight or 10.0  # on tiny-sd its gradient is then about the hidden states'


def read_encoder_config(args):
    """(config of the text encoder that is made smaller, whether its pipeline is SDXL's), from config files alone.

    UsageError where it is not there, or not one that this script handles.
    """
    path, name = args.pretrained_model_name_or_path, args.text_encoder
    where, index = (
        f"--pretrained_model_name_or_path {path}",
        DiffusionPipeline.load_config(path, revision=args.revision),
    )
    sdxl = index["_class_name"] == "StableDiffusionXLPipeline"
    if name == "text_encoder_2" and not sdxl:
        raise UsageError(f"--text_encoder text_encoder_2: {path} has one text encoder only.")
    kind = (index.get(name) or [None, None])[-1]
    if str(kind).startswith("Pruned"):
        raise UsageError(f"{where}: its {name} was pruned, layer by layer: make it smaller first, and prune it then.")
    if kind not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise UsageError(f"{where}: its {name} is {kind}, not a CLIP text model.")
    try:
        config = CLIPTextConfig.from_pretrained(path, subfolder=name, revision=args.revision)
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: {name}/config.json can't be read ({first_line(error)}).") from None
    if getattr(config, "use_attention_mask", False):
        raise UsageError(f"{where}: its {name} masks the padding, which this script does not handle.")
    return config, sdxl


def check_student(args, guidance):
    """Fill in the student's sizes; UsageError where such a student can't be made of this teacher.

    guidance: the teacher's kind of it.
    """
    teacher, sdxl = read_encoder_config(args)
    whole, least = args.intermediate_size is None and args.hidden_size is None, 2 if sdxl else 1
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
        path = args.pretrained_model_name_or_path
        unet = UNet2DConditionModel.load_config(path, subfolder="unet", revision=args.revision)
        if unet.get("encoder_hid_dim") is not None:
            raise UsageError(
                f"--hidden_size: the UNet of {path} has a projection of text states already; start from "
                "the model it was made of."
            )
    if sdxl and args.pooled_weight == 0:
        raise UsageError("--pooled_weight 0: SDXL's last layer learns from the pooled output alone.")
    if args.through_unet and guidance == "embedded":
        raise UsageError(
            "--through_unet: this UNet takes its guidance scale as an input, which is not sampled here; "
            "leave the flag out."
        )


def draw(args, step, positions, shape, schedule, device):
    """Per-sample randomness by global position: which captions are dropped (list of bool), noise, timesteps (B,).

    noise (B, *shape) is the UNet's input, timesteps are of the noisier half of the schedule: None where nothing goes
    through the UNet.
    """
    dropped, noise, timesteps = [], [], []
    for position in positions:
        generator = sample_generator(args.seed, step, position)
        dropped.append(torch.rand((), generator=generator).item() < args.caption_dropout)
        if args.through_unet:
            steps = schedule.num_train_timesteps
            timesteps.append(torch.randint(steps // 2, steps, (), generator=generator))
            noise.append(torch.randn(shape, generator=generator))
    if not args.through_unet:
        return dropped, None, None
    return dropped, *(torch.stack(x).to(device, non_blocking=True) for x in (noise, timesteps))


@torch.no_grad()
def teach(teacher, unet, input_ids, z, timesteps, conditioning):
    """(h_T (B, L, D), p_T (B, P), eps(z, t, h_T) (B, C, H, W)), the last one None where conditioning, its h_T, is."""
    hidden, pooled = teacher(input_ids)
    return hidden, pooled, None if conditioning is None else predict(unet, z, timesteps, conditioning)


def make_student(args, run, teacher, tokenizer, dataset):
    """The student, TextStates in fp32 on the run's device, of the teacher's weights as they are stored."""
    path, origin = args.pretrained_model_name_or_path, {"revision": args.revision, "variant": args.variant}
    where = f"--pretrained_model_name_or_path {path}"
    source = load_whole(type(teacher.encoder), path, where, args.text_encoder, dtype=torch.float32, **origin)
    sizes, sdxl = [getattr(args, size) for size in SIZES], teacher.penultimate
    student = TextStates(shrink_text_encoder(source, *sizes, penultimate=sdxl), sdxl)
    if args.hidden_size < source.config.hidden_size:
        captions = [dataset[i, 0, i]["caption"] for i in range(min(dataset.size or FIT_CAPTIONS, FIT_CAPTIONS))]
        input_ids = tokenize(tokenizer, ["", *captions])  # the same on every rank
        with torch.no_grad():
            student.projection = fit_projection(student(input_ids)[0], TextStates(source)(input_ids)[0])
    run.accelerator.print(
        f"{args.text_encoder}: {teacher.count():,} -> {student.count():,} parameters, layers "
        f"{kept_layers(source.config.num_hidden_layers, args.num_hidden_layers, sdxl)} of the teacher's; "
        f"captions are cut at {tokenizer.model_max_length} tokens."
    )
    return student.to(run.device).train()  # transformers checkpoints gradients in this mode only; there is no drop-out


def parts_of(args, student):
    """{component: module} of the output that is not the teacher's: the encoder, and the UNet that projects for it."""
    parts = {args.text_encoder: student.encoder}
    if student.projection is not None:
        parts["unet"] = set_projection(load_unet(args), student.projection)
    return parts


def main(args):
    check_arguments(args)
    settle(args)
    from_contract = read_teacher(args, guidance=("cfg", "baked", "embedded"), few_steps=True)
    check_student(args, from_contract["guidance"])
    dataset = load_dataset_from_args(args, needs_images=False)
    watch = preflight(args, dataset, trains="text_encoder")
    run = open_run(args, watch)
    accelerator = run.accelerator

    # 1 frozen models, in the compute dtype
    pipeline = load_frozen(args, run)
    unet, name = pipeline.unet, args.text_encoder
    teacher = TextStates(getattr(pipeline, name), penultimate=is_sdxl(pipeline))
    tokenizer = pipeline.tokenizer if name == "text_encoder" else pipeline.tokenizer_2
    schedule = NoiseSchedule(pipeline.scheduler, run.device)
    shape = latent_shape(pipeline, args.resolution)
    carried = {key: from_contract[key] for key in ("target", "steps", "timesteps", "guidance", "guidance_scale")}
    contract = make_contract(args, "text_encoder_kd", **carried)
    scheduler = pipeline.scheduler  # of a few-step teacher: it was trained for this one
    if not contract["steps"]:
        scheduler = ddim_scheduler(scheduler, STEPS)

    # 2 trained, in fp32
    encoder = make_student(args, run, teacher, tokenizer, dataset)
    set_up(encoder, args)
    if args.through_unet:
        set_up(unet, args)

    # 3 optimizer, resume, data
    student, optimizer = prepare(run, encoder, adamw(trainable(encoder), args))
    parameters = trainable(encoder)
    ema = EMA(parameters, args.ema_decay, args.offload_ema)
    run.register({"student": parameters}, {"student": ema})
    loader = iter(build_dataloader(dataset, args, accelerator, run.step))

    while run.step < args.max_train_steps:
        learning_rate = set_learning_rate(optimizer, learning_rate_at(run.step, args))
        for batch in run.batches(loader):
            with accelerator.accumulate(student):
                dropped, z, timesteps = draw(args, batch["step"], batch["positions"], shape, schedule, run.device)
                captions = ["" if drop else caption for drop, caption in zip(dropped, batch["captions"])]
                input_ids = tokenize(tokenizer, captions).to(run.device, non_blocking=True)
                conditioning = encode_prompts(pipeline, captions, args.resolution) if args.through_unet else None
                run.phase("teacher")
                with accelerator.autocast():
                    target = teach(teacher, unet, input_ids, z, timesteps, conditioning)

                run.phase("student")
                with accelerator.autocast():
                    hidden, pooled = student(input_ids)
                    output = None
                    if args.through_unet:
                        output = predict(unet, z, timesteps, with_student(conditioning, hidden, pooled, name))
                losses = text_encoder_loss(hidden, pooled, output, *target, args.pooled_weight, args.unet_weight)
                accelerator.backward(losses["loss"])
                run.add(**losses)
                clip(run, optimizer, parameters)
                update(run, optimizer, parameters, ema)
        run.count(lr=learning_rate)
        if run.validates():
            with ema.applied(parameters), student_in_place(pipeline, name, whole(run, encoder, everywhere=True)):
                preview(run, pipeline, scheduler, contract)
        run.save()

    through = f", through the UNet (weight {args.unet_weight:g})" if args.through_unet else ""
    before, after = teacher.encoder.config, encoder.encoder.config
    notes = {
        "method": f"knowledge distillation of {name}",
        f"{name} parameters": f"{teacher.count():,} -> {encoder.count():,}, projection included",
        "sizes": ", ".join(f"{size} {getattr(before, size)} -> {getattr(after, size)}" for size in SIZES),
        "loss": f"hidden states, pooled output (weight {args.pooled_weight:g}){through}",
    }
    with ema.applied(parameters):
        parts = parts_of(args, whole(run, encoder, everywhere=True))
        save_student(run, parts, scheduler, contract, "Pipeline with a smaller text encoder", notes)
    export(run)
    run.end()


if __name__ == "__main__":
    run_script(main, parse_args())
