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
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed_precision fp16

Run the same command with --resume_from_checkpoint latest to go on after a stop. Writes
<output_dir>/[<run_name>/]lora/checkpoint-N/ and final/, which `pipe.load_lora_weights` opens.
"""

from functools import partial

import torch

from common import arguments
from common.arguments import ByModel
from common.cache import ROLLED_OUT_BY, Rollouts
from common.conditioning import conditioning_of, latents_of, predict, predict_guided, unconditional_of
from common.contract import make_contract, read_teacher
from common.data import load_dataset_from_args
from common.diffusion import NoiseSchedule, ddim_rollout, pointwise_distance
from common.ema import EMA
from common.engines import prepare
from common.errors import UsageError
from common.frozen import load_frozen
from common.judging.metrics import decoded_lpips, load_lpips
from common.judging.previews import preview
from common.loader import build_dataloader
from common.lora import student_unet, trainable, without_adapters
from common.optimization import adamw, clip, learning_rate_at, set_learning_rate, update
from common.outputs import export, save_student
from common.pipelines import set_up
from common.preflight import preflight
from common.randomness import sample_generator
from common.run import open_run, run_script
from common.schedulers import student_scheduler, student_timesteps
from common.settle import check_rollouts, settle


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_data_arguments(parser)
    add = parser.add_argument_group("method").add_argument
    add("--num_ddim_steps", type=arguments.positive_int, default=8, help="K: teacher steps per student step")
    arguments.add_teacher_step_arguments(add)
    arguments.add_few_step_arguments(add)
    add(
        "--guidance_scale",
        type=arguments.weight,
        help="teacher's guidance (default: as saved, else 7.5, or 5 of SDXL)",
    )
    add("--target", choices=("x0", "next"), default="x0", help="the teacher's clean latents, or at the next timestep")
    add("--loss", choices=("l2", "huber", "lpips"), default="huber", help="distance d; lpips compares decoded crops")
    add("--loss_weighting", choices=("none", "snr", "truncated_snr"), default="none", help="of a timestep's x0 error")
    add("--lpips_trunk_path", help=f"{arguments.LPIPS_HELP} (default: download)")
    arguments.add_rollout_arguments(
        add,
        in_memory="keep the teacher's roll-outs of so many steps in memory and cycle over them: a step costs one "
        "student pass (default: 64 for the embedded default without --rollout_cache, else 0: never)",
    )
    arguments.add_lora_arguments(parser, lora_rank=4)
    arguments.add_optimization_arguments(
        parser, learning_rate=ByModel(1e-3, 1e-4), train_batch_size=ByModel(32, 4), max_train_steps=500
    )
    arguments.add_checkpoint_arguments(parser, output_dir="outputs/flash_lora")
    arguments.add_validation_arguments(parser)
    arguments.add_runtime_arguments(parser)
    return parser.parse_args(argv)


def flash_loss(output, z, timesteps, target, end_timesteps, schedule, loss="l2", loss_weighting="none", lpips=None):
    """d(DDIM_1(z_t : t -> end), z*): the distance of the student's one step from the teacher's K. Scalar.

    output: student's model output at (z, timesteps), (B, C, H, W); target: the teacher's latents z* at end_timesteps.
    l2 and huber are pointwise_distance's means; lpips compares the clean latents that the two steps stand for through
    `lpips(x0, x0) -> (B,)`. In fp32 throughout.
    """
    prediction = schedule.ddim_step(output, z, timesteps, end_timesteps)
    if loss == "lpips":
        x0 = schedule.to_x0(output, z, timesteps)
        distance = lpips(x0, schedule.x0_of_step(target, z, timesteps, end_timesteps))
    else:
        distance = pointwise_distance(prediction - target, loss).mean(dim=(1, 2, 3))
    if loss_weighting != "none":
        snr = schedule.snr(timesteps).flatten()
        distance = distance * (snr if loss_weighting == "snr" else snr.clamp(min=1))
    return distance.mean()


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work; fill in the defaults that belong to other flags."""
    if args.loss_weighting != "none" and args.target == "next":
        raise UsageError("--loss_weighting weights errors in x0, which --target next does not compare: use 'none'.")
    if args.lpips_trunk_path and args.loss != "lpips":
        raise UsageError("--lpips_trunk_path is given but --loss is not lpips.")
    if args.cache_rollouts and args.rollout_cache:
        raise UsageError("--cache_rollouts keeps what --rollout_cache has already: leave one of them out.")
    if args.cache_rollouts is None:
        args.cache_rollouts = 64 if args.pretrained_model_name_or_path is None and not args.rollout_cache else 0


def draw(args, step, positions, latents):
    """Per-sample randomness by global position: noise like latents; on the CPU, indices into the timesteps (B,)."""
    noise, slots = [], []
    probs = torch.tensor(args.timestep_probs or [1.0] * args.num_inference_steps)
    for position in positions:
        generator = sample_generator(args.seed, step, position)
        slots.append(torch.multinomial(probs, 1, generator=generator)[0])
        noise.append(torch.randn(latents.shape[1:], generator=generator))
    return torch.stack(noise).to(latents.device, non_blocking=True), torch.stack(slots)


@torch.no_grad()
def teach(args, teacher, schedule, z, timesteps, ends, conditioning, unconditional, guidance_scale):
    """z* (B, C, H, W): where K guided steps of the teacher take z, from timesteps to ends, (B,) on the CPU."""

    def guided(z, timesteps, rows):
        given = conditioning if rows is None else conditioning.rows(rows)
        return predict_guided(teacher, z, timesteps, given, unconditional, guidance_scale)

    steps = args.num_ddim_steps, args.teacher_steps == "proportional", args.solver
    with without_adapters(teacher):
        return ddim_rollout(guided, schedule, z, timesteps, ends, *steps)


def main(args):
    check_arguments(args)
    settle(args)
    from_contract = read_teacher(args)
    guidance_scale = from_contract["guidance_scale"]
    check_rollouts(args, from_contract, **{name: getattr(args, name) for name in ROLLED_OUT_BY})
    dataset = load_dataset_from_args(args, needs_images=not args.rollout_cache)
    watch = preflight(args, dataset, guidance_scale, subfolder="lora")
    run = open_run(args, watch, subfolder="lora")
    accelerator = run.accelerator

    # 1 frozen models, in the compute dtype
    pipeline = load_frozen(args, run, needs=["vae"] * (args.loss == "lpips"))
    teacher, vae = pipeline.unet, pipeline.vae
    schedule = NoiseSchedule(pipeline.scheduler, run.device)
    steps = args.num_inference_steps
    scheduler = student_scheduler(pipeline.scheduler, args.target, steps)
    contract = make_contract(args, "flash_lora", args.target, steps, student_timesteps(scheduler, steps))
    student_times = torch.tensor([*contract["timesteps"], -1])
    unconditional = unconditional_of(pipeline, dataset, args.resolution)
    lpips = load_lpips(args.lpips_trunk_path or "download").to(run.device) if args.loss == "lpips" else None

    # 2 trained, in fp32
    unet = student_unet(args, pipeline)
    set_up(unet, args, teacher)

    # 3 optimizer, resume, data
    student, optimizer = prepare(run, unet, adamw(trainable(unet), args))
    parameters = trainable(unet)
    ema = EMA(parameters, args.ema_decay, args.offload_ema)
    run.register({"student": parameters}, {"student": ema})
    cycle = {"cycle_steps": args.cache_rollouts, "read_again": not args.cache_rollouts}
    loader = iter(build_dataloader(dataset, args, accelerator, run.step, **cycle))
    rollouts = Rollouts(pipeline, args.resolution, args.cache_rollouts)

    while run.step < args.max_train_steps:
        learning_rate = set_learning_rate(optimizer, learning_rate_at(run.step, args))
        for micro_batch, batch in enumerate(run.batches(loader)):
            with accelerator.accumulate(student):
                rollout = rollouts.of(batch, micro_batch)
                if rollout is None:
                    conditioning = conditioning_of(pipeline, batch, args.resolution)
                    latents = latents_of(pipeline, batch)
                    noise, slots = draw(args, batch["step"], batch["positions"], latents)
                    ends = student_times[slots + 1 if args.target == "next" else torch.full_like(slots, -1)]
                    places = student_times[slots], ends
                    timesteps, ends = (x.to(run.device, non_blocking=True) for x in places)
                    z = schedule.noisy_input(latents, noise, timesteps)
                    run.phase("teacher")
                    with accelerator.autocast():
                        given = conditioning, unconditional, guidance_scale
                        target = teach(args, teacher, schedule, z, *places, *given)
                    rollout = rollouts.keep(batch, micro_batch, (conditioning, z, timesteps, ends, target))
                conditioning, z, timesteps, ends, target = rollout

                run.phase("student")
                with accelerator.autocast():
                    output = predict(student, z, timesteps, conditioning)
                distance = partial(decoded_lpips, lpips, vae, args.seed, run.step, batch["positions"])
                loss = flash_loss(
                    output, z, timesteps, target, ends, schedule, args.loss, args.loss_weighting, distance
                )
                accelerator.backward(loss)
                run.add(loss=loss)
                clip(run, optimizer, parameters)
                update(run, optimizer, parameters, ema)
        run.count(lr=learning_rate)
        if run.validates():
            with ema.applied(parameters):
                preview(run, pipeline, scheduler, contract)
        run.save()

    notes = {"method": f"flash: {args.num_ddim_steps} DDIM steps, guided at {guidance_scale:g}, in one"}
    notes["target, loss"] = f"{args.target}, {args.loss}"
    with ema.applied(parameters):
        save_student(run, {"unet": unet}, scheduler, contract, "Few-step LoRA", notes)
    export(run)
    run.end()


if __name__ == "__main__":
    run_script(main, parse_args())
