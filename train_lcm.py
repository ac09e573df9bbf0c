"""Distil a teacher into a student that jumps from any timestep to the clean latents (LCM, arXiv:2310.04378, alg. 1).

f(z, t) says where the teacher's path through z at t ends. So it has to say the same at both ends of one teacher step,
which goes from a timestep t of a grid to the next one, s:

    z_t = alpha_t x + sigma_t eps        pure noise where t is the last training timestep: there sampling starts
    z_s = DDIM_1(z_t : t -> s)           teacher, guided
    f(z, t) = c_skip(t) z + c_out(t) x0  x0 by the model's output at (z, t), one pass; f(z, 0) = z                 (1)
    f(z, t) = DDIM_1(z : t -> e)         with --num_phases P: e is where the phase of t ends; f(z, e) = z          (2)
    L   = d(f(z_t, t), f-(z_s, s))       student, and f-: its slow average, with a LoRA the student itself         (3)

Of P phases (PCM, arXiv:2405.18407) the student samples each in one step, without fresh noise.

    accelerate launch train_lcm.py --lora_rank 64
    accelerate launch --multi_gpu --num_processes 8 train_lcm.py --data_dir coco --lora_rank 64 \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed_precision fp16

Run the same command with --resume_from_checkpoint latest to go on after a stop. Writes
<output_dir>/[<run_name>/]checkpoint-N/ and final/: a LoRA, or a whole pipeline whose guidance scale is an input.
"""

import copy

import torch

from common import arguments
from common.arguments import ByModel
from common.cache import Rollouts
from common.conditioning import (
    conditioning_of,
    guidance_embedding,
    latents_of,
    predict,
    predict_guided,
    unconditional_of,
)
from common.contract import make_contract, read_teacher
from common.data import load_dataset_from_args
from common.diffusion import NoiseSchedule, consistency_function, phase_grid, pointwise_distance
from common.ema import EMA, follow
from common.engines import prepare, reshard, shard_frozen
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
from common.schedulers import student_scheduler, student_timesteps
from common.settle import check_rollouts, settle

# benchmarks/precision.py: a third of what is to be learned, or more; in fp16 a tenth of that.
COARSE = (
    "in bf16 a prediction of the noise is too coarse for how little two neighbouring points of a path differ: "
    "--mixed_precision fp16 has a tenth of its error."
)


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_data_arguments(parser)
    add = parser.add_argument_group("method").add_argument
    add("--num_inference_steps", type=arguments.step_count, help="N: steps to sample in (default: 4, or --num_phases)")
    add("--num_phases", type=arguments.step_count, default=1, help="P: phases of the timesteps; 1 is LCM")
    add(
        "--guidance_scale",
        type=arguments.weight,
        help="teacher's guidance (default: as saved, else 7.5, or 5 of SDXL)",
    )
    add("--guidance_min", type=arguments.weight, help="least a full UNet learns (default: half the scale, at least 1)")
    add("--guidance_max", type=arguments.weight, help="most a full UNet learns (default: twice the scale; LCM has 16)")
    add("--loss", choices=("l2", "huber"), default="huber", help="distance d")
    add("--target_ema_decay", type=arguments.fraction, help="of a full UNet's target network (default: 0.95)")
    add(
        "--num_ddim_steps",
        "--num_ddim_timesteps",
        type=arguments.step_count,
        default=50,
        help="steps of the teacher's DDIM schedule over all timesteps, 1000 / 50 = 20 apart: must divide 1000",
    )
    arguments.add_rollout_arguments(add)
    arguments.add_lora_arguments(parser)
    arguments.add_optimization_arguments(
        parser, learning_rate=ByModel(1e-4, 1e-5, lora=1e-4), train_batch_size=ByModel(32, 4), max_train_steps=500
    )
    arguments.add_checkpoint_arguments(parser, output_dir="outputs/lcm")
    arguments.add_validation_arguments(parser)
    arguments.add_runtime_arguments(parser)
    return parser.parse_args(argv)


def lcm_loss(output, z, timesteps, target_output, z_next, next_timesteps, schedule, edges=None, loss="huber"):
    """d(f(z_t, t), f-(z_s, s)), eq. (3): the distance of where two points of one path end, as two models say. Scalar.

    output: student's model output at (z, timesteps), (B, C, H, W); target_output: the target network's at (z_next,
    next_timesteps), where one teacher step leads; it gets no gradient. Timesteps and edges (B,), -1 the clean end.
    l2 and huber are pointwise_distance's means. In fp32 throughout.
    """
    prediction = consistency_function(output, z, timesteps, schedule, edges)
    target = consistency_function(target_output, z_next, next_timesteps, schedule, edges).detach()
    return pointwise_distance(prediction - target, loss).mean()


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work; fill in the defaults that belong to other flags."""
    steps, phases, given = args.num_ddim_steps, args.num_phases, args.num_inference_steps
    if 1000 % steps:
        raise UsageError(f"--num_ddim_steps {steps} does not divide the 1000 timesteps: use 20, 25, 40 or 50, say.")
    if phases > 1 and given not in (None, phases):
        raise UsageError(f"--num_inference_steps {given}: --num_phases {phases} takes one per phase: leave it out.")
    args.num_inference_steps = given or (phases if phases > 1 else 4)
    if args.num_inference_steps > steps:
        name = "--num_phases" if phases > 1 else "--num_inference_steps"
        raise UsageError(f"{name} {args.num_inference_steps} is more than --num_ddim_steps {steps}, what is trained.")
    if args.lora_rank and args.target_ema_decay is not None:
        raise UsageError("--target_ema_decay is about a full UNet, not a LoRA: leave it out, or --lora_rank.")
    if args.rollout_cache and phases > 1:
        raise UsageError("--rollout_cache is for --num_phases 1.")
    args.target_ema_decay = 0.95 if args.target_ema_decay is None else args.target_ema_decay


def settle_range(args, teacher):
    """Whether the student takes its guidance scale as an input; fills in the range of scales that it then learns."""
    scale, low, high = teacher["guidance_scale"], args.guidance_min, args.guidance_max
    if args.lora_rank or teacher["guidance"] == "baked":
        if (low, high) != (None, None):
            raise UsageError("--guidance_min, --guidance_max: a LoRA or a baked teacher has one scale: drop them.")
        return False
    low, high = max(scale / 2, 1.0) if low is None else low, 2 * scale if high is None else high
    if not low <= scale <= high:
        raise UsageError(f"--guidance_scale {scale:g} is not from --guidance_min {low:g} to --guidance_max {high:g}.")
    args.guidance_min, args.guidance_max = low, high
    return True


def draw(args, step, positions, latents, num_steps):
    """Per-sample randomness by global position: noise like latents; teacher steps and shares of the range, (B,)."""
    noise, slots, shares = [], [], []
    for position in positions:
        generator = sample_generator(args.seed, step, position)
        slots.append(torch.randint(num_steps, (), generator=generator))
        shares.append(torch.rand((), generator=generator))
        noise.append(torch.randn(latents.shape[1:], generator=generator))
    return tuple(torch.stack(drawn).to(latents.device, non_blocking=True) for drawn in (noise, slots, shares))


@torch.no_grad()
def teach(teacher, schedule, z, timesteps, ends, conditioning, unconditional, guidance_scale):
    """z_s (B, C, H, W): where one guided DDIM step of the teacher takes z, from timesteps to ends (B,)."""
    with without_adapters(teacher):
        output = predict_guided(teacher, z, timesteps, conditioning, unconditional, guidance_scale)
    return schedule.ddim_step(output, z, timesteps, ends)


def main(args):
    check_arguments(args)
    settle(args)
    from_contract = read_teacher(args)
    guidance_scale, embedded = from_contract["guidance_scale"], settle_range(args, from_contract)
    low, high = args.guidance_min, args.guidance_max
    if args.rollout_cache and embedded:
        raise UsageError("--rollout_cache holds one guidance scale, and this student learns a range: add --lora_rank.")
    one_step = {"target": "next", "num_inference_steps": args.num_ddim_steps, "timestep_probs": None}
    check_rollouts(args, from_contract, **one_step)
    dataset = load_dataset_from_args(args, needs_images=not args.rollout_cache)
    watch = preflight(args, dataset, guidance_scale, embedded=embedded, target=not args.lora_rank)
    run = open_run(args, watch)
    accelerator = run.accelerator

    # 1 frozen models, in the compute dtype
    pipeline = load_frozen(args, run)
    teacher = pipeline.unet
    schedule = NoiseSchedule(pipeline.scheduler, run.device)
    steps = args.num_inference_steps
    if run.dtype == torch.bfloat16 and schedule.prediction_type == "epsilon":
        accelerator.print(f"warning: {COARSE}")
    target = "next" if args.num_phases > 1 else "x0"
    scheduler = student_scheduler(pipeline.scheduler, target, steps, args.num_ddim_steps)
    kind, scale = ("embedded", guidance_scale) if embedded else ("baked", 1.0)
    contract = make_contract(args, "lcm", target, steps, student_timesteps(scheduler, steps), kind, scale)
    student_times = torch.tensor([*contract["timesteps"], -1], device=run.device)
    grid = phase_grid(student_times if args.num_phases > 1 else student_times[[0, -1]], args.num_ddim_steps)
    unconditional = unconditional_of(pipeline, dataset, args.resolution)

    # 2 trained, in fp32
    unet = student_unet(args, pipeline, embedded)
    target_unet = unet if args.lora_rank else copy.deepcopy(unet).requires_grad_(False)
    set_up(unet, args, teacher, target_unet)

    # 3 optimizer, resume, data
    student, optimizer = prepare(run, unet, adamw(trainable(unet), args))
    if not args.lora_rank:
        shard_frozen(run, target_unet)
    parameters = trainable(unet)
    ema = EMA(parameters, args.ema_decay, args.offload_ema)
    slow = {} if args.lora_rank else {"target": dict(target_unet.named_parameters())}
    run.register({"student": parameters, **slow}, {"student": ema})
    loader = iter(build_dataloader(dataset, args, accelerator, run.step))
    rollouts = Rollouts(pipeline, args.resolution)

    while run.step < args.max_train_steps:
        learning_rate = set_learning_rate(optimizer, learning_rate_at(run.step, args))
        for batch in run.batches(loader):
            with accelerator.accumulate(student):
                rollout, edges, timestep_cond = rollouts.of(batch), None, None
                if rollout is None:
                    conditioning = conditioning_of(pipeline, batch, args.resolution)
                    latents = latents_of(pipeline, batch)
                    noise, slots, shares = draw(args, batch["step"], batch["positions"], latents, len(grid[0]))
                    timesteps, ends, edges = (times[slots] for times in grid)
                    z = schedule.noisy_input(latents, noise, timesteps)
                    scales = low + (high - low) * shares if embedded else guidance_scale
                    timestep_cond = guidance_embedding(pipeline, scales, unet) if embedded else None
                    run.phase("teacher")
                    with accelerator.autocast():
                        z_next = teach(teacher, schedule, z, timesteps, ends, conditioning, unconditional, scales)
                    rollout = conditioning, z, timesteps, ends, z_next
                conditioning, z, timesteps, ends, z_next = rollout
                run.phase("teacher")
                with torch.no_grad(), accelerator.autocast():
                    # At the clean end f is z_s whatever the output, so any timestep will do.
                    target_output = predict(target_unet, z_next, ends.clamp(min=0), conditioning, timestep_cond)

                run.phase("student")
                with accelerator.autocast():
                    output = predict(student, z, timesteps, conditioning, timestep_cond)
                edges = edges if args.num_phases > 1 else None
                loss = lcm_loss(output, z, timesteps, target_output, z_next, ends, schedule, edges, args.loss)
                accelerator.backward(loss)
                run.add(loss=loss)
                clip(run, optimizer, parameters)
                update(run, optimizer, parameters, ema)
        if slow:
            follow(slow["target"], parameters, args.target_ema_decay)
            reshard(target_unet)
        run.count(lr=learning_rate)
        if run.validates():
            with ema.applied(parameters):
                preview(run, pipeline, scheduler, contract)
        run.save()

    scales = f"{low:g} to {high:g}, an input of the UNet" if embedded else f"{guidance_scale:g}"
    notes = {"method": f"latent consistency, phases: {args.num_phases}, guided at {scales}"}
    notes["grid, loss"] = f"{args.num_ddim_steps} timesteps, {args.loss}"
    with ema.applied(parameters):
        save_student(run, {"unet": unet}, scheduler, contract, "Latent consistency model", notes)
    export(run)
    run.end()


if __name__ == "__main__":
    run_script(main, parse_args())
