"""Halve the steps of a teacher again and again: progressive distillation (Salimans & Ho, arXiv:2202.00512).

A stage makes a student of N / 2 steps out of a teacher of N. From a timestep t of the student's own trailing schedule
the teacher takes two DDIM steps, through the mid-point m to the student's next timestep s; the student learns to get
there in one. With z_t = alpha_t x + sigma_t eps (pure noise at the last training timestep, where sampling starts):

    z_s = DDIM(DDIM(z_t : t -> m) : m -> s)                                        teacher, two steps
    x~  = (z_s - (sigma_s / sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)    eq. (8): DDIM(z_t, x~) = z_s
    L   = |v^ - v~|^2 = |x^ - x~|^2 / sigma_t^2    or, --loss_space x,    max(SNR, 1) |x^ - x~|^2      eq. (9), (10)

--stages names the students' steps where they are no halvings: a student of M steps then learns from K = N / M, rounded
but two at least, DDIM steps of its teacher of N, on the timesteps of K M steps; K = 2 and M = N / 2 are the above.

The student, which starts as its teacher, is the next stage's teacher. Classifier-free guidance goes into the first
halving, and no later one; a teacher that has its guidance inside (train_guided.py) is never guided again.

    accelerate launch train_progressive.py --start_steps 32 --end_steps 4
    accelerate launch train_progressive.py --start_steps 1000 --stages 500 250 125 64 32 16 8
    accelerate launch --multi_gpu --num_processes 8 train_progressive.py --data_dir coco --start_steps 512 \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed_precision fp16 \\
        --steps_per_stage 50000 --last_stages_steps 100000 --learning_rate 1e-4

Run the same command with --resume_from_checkpoint latest to go on after a stop, in whatever stage. Writes
<output_dir>/[<run_name>/]checkpoint-N/, a stage-<steps>/ after each stage and final/: whole pipelines, or LoRAs.
"""

import argparse

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
from common.diffusion import NoiseSchedule
from common.ema import EMA, copy_tensors
from common.engines import forget, prepare
from common.errors import CheckpointError, UsageError
from common.frozen import ENCODERS, load_frozen
from common.judging.previews import preview
from common.loader import build_dataloader
from common.lora import add_lora, student_unet, trainable, without_adapters
from common.optimization import adamw, become_average, clip, learning_rate_at, set_learning_rate, update
from common.outputs import export, save_student
from common.pipelines import latent_shape, load_unet, set_up
from common.preflight import preflight
from common.randomness import sample_generator
from common.run import open_run, run_script
from common.schedulers import ddim_scheduler, student_timesteps
from common.settle import check_rollouts, settle


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_data_arguments(parser)
    add = parser.add_argument_group("method").add_argument
    add(
        "--start_steps",
        type=arguments.step_count,
        default=64,
        help="steps of the first teacher: those of the last student times a power of two",
    )
    add(
        "--num_inference_steps",
        "--end_steps",
        type=arguments.step_count,
        help="steps of the last student (default: 4)",
    )
    add(
        "--stages",
        type=arguments.step_count,
        nargs="+",
        help="steps of the students, one stage each, where they are no halvings (default: halve down to --end_steps)",
    )
    add("--steps_per_stage", type=arguments.positive_int, default=200, help="optimizer steps of a stage")
    add(
        "--last_stages_steps",
        type=arguments.positive_int,
        nargs="+",
        help="optimizer steps of each of the last two stages, which have the most to learn; several numbers: one for "
        "each of the last stages (default: --steps_per_stage)",
    )
    add(
        "--guidance_scale",
        type=arguments.weight,
        help="teacher's guidance in the first halving (default: as saved, else 7.5, or 5 of SDXL)",
    )
    add(
        "--guidance_min",
        type=arguments.weight,
        help="of a teacher that takes its guidance scale as an input: least scale drawn (default: 1)",
    )
    add("--guidance_max", type=arguments.weight, help="of such a teacher: largest scale drawn (default: 8)")
    add("--loss_space", choices=("v", "x"), default="v", help="error in v, or in x0 with weight max(SNR, 1)")
    arguments.add_rollout_arguments(add)
    arguments.add_lora_arguments(parser)
    arguments.add_optimization_arguments(
        parser, learning_rate=ByModel(1e-4, 1e-5, lora=1e-4), train_batch_size=ByModel(32, 4), max_train_steps=None
    )
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


def student_steps(start_steps, end_steps, stages=None):
    """Step counts of the students, stage by stage: `stages`, or [start / 2, ..., end]. Raises UsageError."""
    if stages:
        for teacher, student in zip([start_steps, *stages], stages):
            if 3 * student > 2 * teacher:
                raise UsageError(
                    f"--stages: from {teacher} steps to {student} is no stage: a student has two thirds of its "
                    "teacher's steps at most."
                )
            if teacher_steps_in_one(teacher, student) * student > 1000:
                raise UsageError(
                    f"--stages: from {teacher} steps to {student} the teacher would take "
                    f"{teacher_steps_in_one(teacher, student) * student}, and the model has 1000 timesteps."
                )
        return list(stages)
    found = [end_steps]
    while 2 * found[0] < start_steps:
        found.insert(0, 2 * found[0])
    if 2 * found[0] != start_steps:
        raise UsageError(
            f"--start_steps {start_steps} is not --end_steps {end_steps} times a power of two: every "
            "stage halves the steps; --stages names other ones."
        )
    return found


def teacher_steps_in_one(teacher_steps, steps):
    """K: how many steps a teacher of `teacher_steps` takes where a student of `steps` takes one."""
    return max(2, round(teacher_steps / steps))


def stage_grid(scheduler, teacher_steps, steps=None, device="cpu"):
    """(timesteps, the K - 1 between, next timesteps) of a student of `steps` (default: half of the teacher's).

    Long (steps,) each. The student's are those of the scheduler that will be saved with it; -1 is the clean end. Those
    between are of the schedule of K steps for each of the student's: where the teacher has another number, its steps
    are as near to its own in length as K allows, and some begin between two of its own timesteps.
    """
    steps = steps or teacher_steps // 2
    each = teacher_steps_in_one(teacher_steps, steps)
    timesteps = student_timesteps(ddim_scheduler(scheduler, steps), steps)
    fine = student_timesteps(ddim_scheduler(scheduler, each * steps), each * steps)
    between = [fine[place::each] for place in range(1, each)]
    return [torch.tensor(times, device=device) for times in (timesteps, *between, [*timesteps[1:], -1])]


def stage_lengths(args, stages):
    """Optimizer steps of every stage, a list as long as stages. Raises UsageError."""
    last = args.last_stages_steps or [args.steps_per_stage]
    if len(last) == 1:
        last = last * min(2, stages)
    if len(last) > stages:
        raise UsageError(
            f"--last_stages_steps has {len(last)} numbers; from --start_steps {args.start_steps} to "
            f"--end_steps {args.num_inference_steps} there are {stages} stages."
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
    """Refuse, before anything is loaded, what can't work; settle how many optimizer steps there are in all."""
    if args.stages and args.num_inference_steps not in (None, args.stages[-1]):
        raise UsageError(f"--end_steps {args.num_inference_steps}: --stages end at {args.stages[-1]}.")
    args.num_inference_steps = args.stages[-1] if args.stages else args.num_inference_steps or 4
    start, end = args.start_steps, args.num_inference_steps
    if start <= end:
        raise UsageError(f"--start_steps {start} is not more than --end_steps {end}.")
    total = sum(stage_lengths(args, len(student_steps(start, end, args.stages))))
    args.max_train_steps = min(args.max_train_steps or total, total)


def check_teacher(args, teacher):
    """Refuse a teacher that can't be halved so; fill in the scales that are drawn for one that takes them as input."""
    where = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    if teacher["target"] == "x0":
        raise UsageError(
            f"{where}: it predicts and re-noises; this script halves the steps of a deterministic sampler: start from "
            "the model it was made of."
        )
    if teacher["steps"] not in (None, args.start_steps):
        raise UsageError(f"{where}: it was made for {teacher['steps']} steps: add --start_steps {teacher['steps']}.")
    embedded = teacher["guidance"] == "embedded"
    if embedded and args.guidance_scale is not None:
        raise UsageError(
            "--guidance_scale: this teacher takes its scale as an input: --guidance_min and --guidance_max say which "
            "scales are drawn."
        )
    if not embedded and (args.guidance_min, args.guidance_max) != (None, None):
        raise UsageError(
            "--guidance_min and --guidance_max are about a teacher that takes its guidance scale as an input, which "
            "this one does not: leave them out."
        )
    args.guidance_min = 1.0 if args.guidance_min is None else args.guidance_min
    args.guidance_max = 8.0 if args.guidance_max is None else args.guidance_max
    if args.guidance_min > args.guidance_max:
        raise UsageError(f"--guidance_min {args.guidance_min:g} is above --guidance_max {args.guidance_max:g}.")


def draw(args, step, positions, latents, num_timesteps):
    """Per-sample randomness by global position: noise like latents, indices into the student's timesteps, scales (B,).

    All are drawn whatever the options, so that none changes what another one draws.
    """
    noise, slots, scales = [], [], []
    for position in positions:
        generator = sample_generator(args.seed, step, position)
        slots.append(torch.randint(num_timesteps, (), generator=generator))
        place = torch.rand((), generator=generator)
        scales.append(args.guidance_min + (args.guidance_max - args.guidance_min) * place)
        noise.append(torch.randn(latents.shape[1:], generator=generator))
    return tuple(torch.stack(drawn).to(latents.device, non_blocking=True) for drawn in (noise, slots, scales))


@torch.no_grad()
def teach(teacher, schedule, z, times, conditioning, unconditional, guidance_scale, timestep_cond=None):
    """z_s (B, C, H, W): where the teacher's DDIM steps, two or more, take z.

    times: timesteps, those between and next timesteps, each (B,). timestep_cond (B, dim): of a teacher that takes its
    guidance scale as an input, which is not guided otherwise.
    """
    with without_adapters(teacher):
        for now, after in zip(times[:-1], times[1:]):
            if guidance_scale == 1:
                output = predict(teacher, z, now, conditioning, timestep_cond)
            else:
                output = predict_guided(teacher, z, now, conditioning, unconditional, guidance_scale)
            z = schedule.ddim_step(output, z, now, after)
    return z


def merged_teacher(args, run, lora):
    """The frozen UNet of a later stage's teacher: the first teacher's with a LoRA, {name: tensor}, merged into it.

    In fp32, and then in the compute dtype: it costs no more than the first.
    """
    unet = load_unet(args)
    add_lora(unet, args)
    copy_tensors(lora, trainable(unet))
    unet.fuse_lora()
    unet.unload_lora()
    if args.torch_compile:
        unet.compile()
    return unet.requires_grad_(False).to(run.device, run.dtype)


def halving(args, students):
    """{name: value} of the roll-outs that the first stage's teacher makes. Raises UsageError where it has no such."""
    if args.rollout_cache and (args.guidance_min, args.guidance_max) != (1.0, 8.0):
        raise UsageError("--rollout_cache holds one guidance scale: leave out --guidance_min and --guidance_max.")
    one_step = {"target": "next", "num_inference_steps": students[0], "timestep_probs": None, "solver": "ddim"}
    return {**one_step, "num_ddim_steps": teacher_steps_in_one(args.start_steps, students[0])}


def check_stage(run, lengths):
    """CheckpointError where a run resumes at the end of a stage whose student wasn't handed on: Run.count ended it."""
    stage, _ = stage_at(run.step, lengths)
    if run.state.setdefault("stages", 0) != stage:
        raise CheckpointError(
            f"{run.checkpoint} is of the end of a stage whose last updates were all skipped, which is no teacher for "
            "the next one: resume from an older checkpoint."
        )


def card(args):
    """(title, notes) of a student's model card."""
    notes = {"method": f"progressive distillation from {args.start_steps} steps, loss in {args.loss_space}"}
    return "Few-step LoRA" if args.lora_rank else "Few-step student", notes


def capped(run, students, lengths):
    """What is said at the end of a run that --max_train_steps ends before the last stage has."""
    stage, inside = stage_at(run.step, lengths)
    return (
        f"Ended by --max_train_steps after step {run.step} of {sum(lengths)}, {inside} of them in the stage of "
        f"{students[stage]} steps: --resume_from_checkpoint latest, with a larger number or without it, goes on to "
        "final/."
    )


def evaluation(args, run, students):
    """The command that draws quality against steps: of the first teacher, the stages that are here, and final/."""
    here = [steps for steps in students[:-1] if (run.folder / f"stage-{steps}").is_dir()]
    counts = " ".join(map(str, [args.start_steps, *here, students[-1]]))
    folders = " ".join(str(run.folder / name) for name in [*(f"stage-{steps}" for steps in here), "final"])
    models = f"{args.pretrained_model_name_or_path} {folders}"
    return f"python evaluate.py --trained_steps --steps {counts} --models {models}"


def main(args):
    check_arguments(args)
    settle(args)
    from_contract = read_teacher(args, guidance=("cfg", "baked", "embedded"), few_steps=True)
    check_teacher(args, from_contract)
    guidance_scale, embedded = from_contract["guidance_scale"], from_contract["guidance"] == "embedded"
    students = student_steps(args.start_steps, args.num_inference_steps, args.stages)
    lengths = stage_lengths(args, len(students))
    dataset = first = load_dataset_from_args(argparse.Namespace(**{**vars(args), "rollout_cache": None}))
    check_rollouts(args, from_contract, **halving(args, students))
    if args.rollout_cache:  # of the first stage, whose teacher is the one that was there before
        first = load_dataset_from_args(args, needs_images=False)
    watch = preflight(args, dataset, guidance_scale, own_teacher=len(students) > 1)
    run = open_run(args, watch, staged=True)
    accelerator = run.accelerator

    # 1 frozen models, in the compute dtype; from the first student on guidance is inside the weights
    pipeline = load_frozen(args, run, needs=() if args.cache_dir else ENCODERS)
    teacher = pipeline.unet
    schedule = NoiseSchedule(pipeline.scheduler, run.device)
    teachers = [args.start_steps, *students[:-1]]
    grids = [stage_grid(pipeline.scheduler, *stage, run.device) for stage in zip(teachers, students)]
    schedulers = [ddim_scheduler(pipeline.scheduler, steps) for steps in students]
    kind, scale = ("embedded", guidance_scale) if embedded else ("baked", 1.0)
    contracts = [
        make_contract(args, "progressive", "next", steps, student_timesteps(scheduler, steps), kind, scale)
        for scheduler, steps in zip(schedulers, students)
    ]
    unconditional = unconditional_of(pipeline, dataset, args.resolution)

    # 2 trained, in fp32; teacher_parameters, what a student hands on to the next stage's teacher: all, or its LoRA
    unet = student_unet(args, pipeline)
    set_up(unet, args, teacher)

    # 3 optimizer, resume, data
    student, optimizer = prepare(run, unet, adamw(trainable(unet), args))
    parameters = trainable(unet)
    if args.lora_rank:
        teacher_parameters = {name: p.detach().clone() for name, p in parameters.items()}
    else:
        teacher_parameters = dict(teacher.named_parameters())
    ema = EMA(parameters, args.ema_decay, args.offload_ema)
    run.register({"student": parameters, "teacher": teacher_parameters}, {"student": ema})
    check_stage(run, lengths)
    rollouts = Rollouts(pipeline, args.resolution)
    of_stage, merged = None, 0  # the stages of the data and, of a LoRA, of the teacher that is in memory

    while run.step < args.max_train_steps:
        stage, inside = stage_at(run.step, lengths)
        steps, ends = students[stage], inside + 1 == lengths[stage]
        guidance = 1.0 if embedded or stage > 0 else guidance_scale
        if args.lora_rank and merged != stage:
            teacher = None  # frees its memory first
            teacher, merged = merged_teacher(args, run, teacher_parameters), stage
        if of_stage != stage:
            of_stage, data = stage, first if stage == 0 else dataset
            loader = iter(build_dataloader(data, args, accelerator, run.step))
        run.bar.set_description(f"{teachers[stage]} -> {steps} steps", refresh=False)
        learning_rate = set_learning_rate(optimizer, learning_rate_at(inside, args, lengths[stage]))
        for batch in run.batches(loader):
            with accelerator.accumulate(student):
                rollout, timestep_cond = rollouts.of(batch), None
                if rollout is None:
                    conditioning = conditioning_of(pipeline, batch, args.resolution)
                    if steps > 1:
                        latents = latents_of(pipeline, batch)
                    else:  # from pure noise alone, whatever the images
                        shape = len(batch["captions"]), *latent_shape(pipeline, args.resolution)
                        latents = torch.zeros(shape, device=run.device)
                    noise, slots, scales = draw(args, batch["step"], batch["positions"], latents, steps)
                    times = [grid[slots] for grid in grids[stage]]
                    z = schedule.noisy_input(latents, noise, times[0])
                    timestep_cond = guidance_embedding(pipeline, scales, unet) if embedded else None
                    run.phase("teacher")
                    with accelerator.autocast():
                        given = conditioning, unconditional, guidance, timestep_cond
                        z_next = teach(teacher, schedule, z, times, *given)
                    rollout = conditioning, z, times[0], times[-1], z_next
                conditioning, z, timesteps, next_timesteps, z_next = rollout

                run.phase("student")
                with accelerator.autocast():
                    output = predict(student, z, timesteps, conditioning, timestep_cond)
                loss = progressive_loss(output, z, timesteps, z_next, next_timesteps, schedule, args.loss_space)
                accelerator.backward(loss)
                run.add(loss=loss)
                clip(run, optimizer, parameters)
                update(run, optimizer, parameters, ema)
        run.count(lr=learning_rate, student_steps=steps)
        if run.validates():
            with ema.applied(parameters):
                preview(run, pipeline, schedulers[stage], contracts[stage])
        if ends:  # the average is the stage's result, the next stage's teacher and its start
            run.check_finite()
            become_average(run, parameters, ema)
            copy_tensors(parameters, teacher_parameters)
            save_student(run, {"unet": unet}, schedulers[stage], contracts[stage], *card(args), name=f"stage-{steps}")
            ema.updates = 0
            forget(run, optimizer)
            run.state["stages"] = stage + 1
        run.save(now=ends)

    if run.step < sum(lengths):
        return run.end(capped(run, students, lengths), done=False)
    save_student(run, {"unet": unet}, schedulers[-1], contracts[-1], *card(args))
    export(run)
    run.end(f"\nQuality against steps: {evaluation(args, run, students)}")


if __name__ == "__main__":
    run_script(main, parse_args())
