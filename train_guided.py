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

import torch

from common import arguments
from common.arguments import ByModel
from common.conditioning import conditioning_of, guidance_embedding, latents_of, predict, unconditional_of
from common.contract import STEPS, make_contract, read_teacher
from common.data import load_dataset_from_args
from common.diffusion import NoiseSchedule
from common.ema import EMA
from common.engines import prepare
from common.errors import UsageError
from common.frozen import load_frozen
from common.judging.previews import preview
from common.loader import build_dataloader
from common.lora import student_unet, trainable, without_adapters
from common.optimization import adamw, clip, learning_rate_at, set_learning_rate, update
from common.outputs import export, save_student
from common.pipelines import set_up
from common.preflight import preflight
from common.randomness import sample_generator
from common.run import open_run, run_script
from common.schedulers import ddim_scheduler
from common.settle import settle


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_data_arguments(parser)
    add = parser.add_argument_group("method").add_argument
    add("--guidance", choices=("fixed", "embed"), default="fixed", help="bake one scale in, or make it an input")
    add(
        "--guidance_scale",
        type=arguments.weight,
        help="what is baked in or, of embed, recorded for sampling (default: the teacher's, else 7.5, or 5 of SDXL)",
    )
    add("--guidance_min", type=arguments.weight, help="smallest scale of --guidance embed (default: 1, which is none)")
    add("--guidance_max", type=arguments.weight, help="largest scale of --guidance embed (default: 8)")
    arguments.add_lora_arguments(parser)
    arguments.add_optimization_arguments(
        parser, learning_rate=ByModel(1e-4, 1e-5, lora=1e-4), train_batch_size=ByModel(32, 4), max_train_steps=500
    )
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
    if args.guidance == "embed" and args.lora_rank:
        raise UsageError("--lora_rank: --guidance embed gives the UNet a new input, which a LoRA can't hold.")
    if args.guidance == "fixed" and (args.guidance_min, args.guidance_max) != (None, None):
        raise UsageError("--guidance_min and --guidance_max are about --guidance embed: add it or leave them out.")
    args.guidance_min = 1.0 if args.guidance_min is None else args.guidance_min
    args.guidance_max = 8.0 if args.guidance_max is None else args.guidance_max
    if args.guidance_min >= args.guidance_max:
        raise UsageError(f"--guidance_min {args.guidance_min:g} is not below --guidance_max {args.guidance_max:g}.")


def check_scale(args, scale):
    """Refuse a scale that there is nothing to learn from, or that would be recorded without being learned."""
    if args.guidance == "fixed" and scale == 1:
        raise UsageError("--guidance_scale 1 is no guidance, so there is nothing to distil: use another scale.")
    if args.guidance == "embed" and not args.guidance_min <= scale <= args.guidance_max:
        raise UsageError(f"--guidance_scale {scale:g} is to be between --guidance_min and --guidance_max.")


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
    drawn = torch.stack(noise), torch.tensor(timesteps), torch.tensor(scales)
    return tuple(x.to(latents.device, non_blocking=True) for x in drawn)


@torch.no_grad()
def teach(teacher, z, timesteps, conditioning, unconditional):
    """(o_u, o_c), each (B, C, H, W): the teacher given the empty caption and given the captions, in one forward."""
    both = unconditional.expand(len(z)).cat(conditioning)
    with without_adapters(teacher):
        return predict(teacher, torch.cat([z, z]), torch.cat([timesteps, timesteps]), both).chunk(2)


def main(args):
    check_arguments(args)
    settle(args)
    from_contract = read_teacher(args, guidance=("cfg",), few_steps=True)
    guidance_scale, embedded = from_contract["guidance_scale"], args.guidance == "embed"
    check_scale(args, guidance_scale)
    dataset = load_dataset_from_args(args)
    watch = preflight(args, dataset, guidance_scale, embedded=embedded)
    run = open_run(args, watch)
    accelerator = run.accelerator

    # 1 frozen models, in the compute dtype
    pipeline = load_frozen(args, run)
    teacher = pipeline.unet
    schedule = NoiseSchedule(pipeline.scheduler, run.device)
    steps, chain = from_contract["steps"], from_contract["timesteps"]
    kind, scale = ("embedded", guidance_scale) if embedded else ("baked", 1.0)
    contract = make_contract(args, "guided", "next", steps, chain, kind, scale)
    chain = chain or range(schedule.num_train_timesteps)  # a few-step teacher knows no others than its own
    scheduler = ddim_scheduler(pipeline.scheduler, steps or STEPS)
    unconditional = unconditional_of(pipeline, dataset, args.resolution)

    # 2 trained, in fp32
    unet = student_unet(args, pipeline, embedded)
    set_up(unet, args, teacher)

    # 3 optimizer, resume, data
    student, optimizer = prepare(run, unet, adamw(trainable(unet), args))
    parameters = trainable(unet)
    ema = EMA(parameters, args.ema_decay, args.offload_ema)
    run.register({"student": parameters}, {"student": ema})
    loader = iter(build_dataloader(dataset, args, accelerator, run.step))

    while run.step < args.max_train_steps:
        learning_rate = set_learning_rate(optimizer, learning_rate_at(run.step, args))
        for batch in run.batches(loader):
            with accelerator.accumulate(student):
                conditioning = conditioning_of(pipeline, batch, args.resolution)
                latents = latents_of(pipeline, batch)
                noise, timesteps, scales = draw(args, batch["step"], batch["positions"], latents, chain)
                z = schedule.noisy_input(latents, noise, timesteps)
                scales = scales if embedded else torch.full_like(scales, guidance_scale)
                timestep_cond = guidance_embedding(pipeline, scales, unet) if embedded else None
                run.phase("teacher")
                with accelerator.autocast():
                    without, given = teach(teacher, z, timesteps, conditioning, unconditional)

                run.phase("student")
                with accelerator.autocast():
                    output = predict(student, z, timesteps, conditioning, timestep_cond)
                loss = guided_loss(output, given, without, scales)
                accelerator.backward(loss)
                run.add(loss=loss)
                clip(run, optimizer, parameters)
                update(run, optimizer, parameters, ema)
        run.count(lr=learning_rate)
        if run.validates():
            with ema.applied(parameters):
                preview(run, pipeline, scheduler, contract)
        run.save()

    scales = f"scales {args.guidance_min:g} to {args.guidance_max:g}, an input of the UNet"
    notes = {"method": "classifier-free guidance in one pass", "guidance": scales if embedded else guidance_scale}
    with ema.applied(parameters):
        save_student(run, {"unet": unet}, scheduler, contract, "Guided student", notes)
    export(run)
    run.end()


if __name__ == "__main__":
    run_script(main, parse_args())
