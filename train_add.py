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
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed_precision fp16 \\
        --discriminator dinov2 --feature_model_name_or_path facebook/dinov2-small

Run the same command with --resume_from_checkpoint latest to go on after a stop. Writes
<output_dir>/[<run_name>/]checkpoint-N/ and final/: a whole pipeline folder or, with --lora_rank, a LoRA.
"""

import argparse
import copy

import torch

from common import arguments
from common.arguments import ByModel
from common.cache import ROLLED_OUT_BY, Rollouts
from common.conditioning import conditioning_of, latents_of, predict, predict_guided, unconditional_of
from common.contract import make_contract, read_teacher, takes_guidance
from common.data import load_dataset_from_args
from common.diffusion import NoiseSchedule, ddim_rollout
from common.discriminators import Dinov2Features, judge, make_heads, make_sight, scores_for_student, see
from common.ema import EMA
from common.engines import prepare, prepare_beside
from common.errors import UsageError
from common.frozen import load_frozen
from common.judging.previews import preview_counts
from common.loader import build_dataloader
from common.lora import student_unet, trainable
from common.optimization import adamw, clip, learning_rate_at, set_learning_rate, update
from common.outputs import export, save_student
from common.pipelines import check_compatible, check_same_inputs, load_pipeline, set_up
from common.preflight import preflight
from common.randomness import sample_generator
from common.run import open_run, run_script
from common.schedulers import shorter_schedules, student_scheduler, student_timesteps
from common.settle import check_rollouts, settle
from common.single_file import pipeline_folder


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_data_arguments(parser)
    between = {"type": arguments.natural, "nargs": 2, "metavar": ("MIN", "MAX")}
    add = parser.add_argument_group("student").add_argument
    arguments.add_few_step_arguments(add)
    add("--student_model", help="pipeline whose UNet it starts as, of another distillation (default: the teacher)")
    add = parser.add_argument_group("distillation").add_argument
    add("--lambda_distill", type=arguments.weight, default=2.5, help="weight of the teacher's term; 0: none")
    add(
        "--distill_target",
        choices=("score", "sample"),
        default="score",
        help="teacher's x0 of the re-noised student, or its sample from the student's input",
    )
    add("--distill_timesteps", **between, help="of score: re-noise to one of these, uniformly (default: 20 979)")
    add("--num_ddim_steps", type=arguments.positive_int, help="of sample: teacher steps (default: 8)")
    arguments.add_teacher_step_arguments(add)
    kept = "of sample: keep the teacher's samples of so many steps in memory and cycle over them (default: never)"
    arguments.add_rollout_arguments(add, in_memory=kept)
    add(
        "--guidance_scale",
        type=arguments.weight,
        help="teacher's guidance (default: as saved, else 7.5, or 5 of SDXL)",
    )
    add = parser.add_argument_group("discriminator").add_argument
    add(
        "--discriminator",
        choices=("unet", "dinov2"),
        default="unet",
        help="what it looks with: the teacher's encoder at re-noised latents, or DINOv2 at images",
    )
    add("--feature_model_name_or_path", help="of dinov2: folder or hub id (default: facebook/dinov2-small)")
    add("--feature_resolution", type=arguments.positive_int, help="of dinov2: pixels per side it sees (default: 224)")
    add("--discriminator_timesteps", **between, help="of unet: re-noise to one of these, uniformly (default: 20 979)")
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
    arguments.add_lora_arguments(parser)
    arguments.add_optimization_arguments(
        parser, learning_rate=ByModel(1e-4, 1e-5, lora=1e-4), train_batch_size=ByModel(32, 4), max_train_steps=500
    )
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


def student_terms(args, x_student, target, fake_scores):
    """{"loss": L, and its two terms} of eq. (1), scalars; a term that is not there is 0.

    x_student: x^ (B, C, H, W); target: what `teach` says, or None; fake_scores: D(x^), a list of (B, places), or None.
    """
    nothing = x_student.new_zeros(())
    distillation = nothing if target is None else distillation_loss(x_student, *target)
    adversarial = nothing if fake_scores is None else adversarial_loss(fake_scores)
    loss = adversarial + args.lambda_distill * distillation
    return {"loss": loss, "distillation": distillation, "adversarial": adversarial}


def discriminator_terms(args, heads, seen, number, positions):
    """(L_D, {its terms and the mean scores}), scalars, of what the discriminator has Seen for its update `number`."""
    r1_form, noise = args.r1_form if args.r1_gamma else None, None
    if r1_form == "finite_difference":
        noise = perturbation(args, number, positions, seen.real)
    fake = [x.detach() for x in seen.fake]
    real_scores, fake_scores, mismatched_scores, r1 = judge(
        heads, seen.real, fake, seen.condition, r1_form, noise, seen.mismatched, seen.other_condition
    )
    hinge = discriminator_loss(real_scores, fake_scores, mismatched_scores, seen.differ)
    terms = {"discriminator": hinge, "r1": r1}
    terms |= {"d_real": -adversarial_loss(real_scores), "d_fake": -adversarial_loss(fake_scores)}
    if mismatched_scores is not None:
        terms["d_mismatched"] = -adversarial_loss(mismatched_scores)
    return hinge + args.r1_gamma / 2 * r1, terms


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work; fill in the defaults that belong to other flags."""
    sampled, images = args.distill_target == "sample", args.discriminator == "dinov2"
    for name, default, of, there in (
        ("distill_timesteps", (20, 979), "--distill_target score", not sampled),
        ("num_ddim_steps", 8, "--distill_target sample", sampled),
        ("cache_rollouts", 0, "--distill_target sample", sampled),
        ("rollout_cache", None, "--distill_target sample", sampled),
        ("discriminator_timesteps", (20, 979), "--discriminator unet", not images),
        ("feature_model_name_or_path", "facebook/dinov2-small", "--discriminator dinov2", images),
        ("feature_resolution", 224, "--discriminator dinov2", images),
    ):
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not there:
            raise UsageError(f"--{name} is about {of}: add that, or leave --{name} out.")
    for name in ("distill_timesteps", "discriminator_timesteps"):
        low, high = getattr(args, name)
        if not low <= high < 1000:
            raise UsageError(f"--{name} {low} {high} is no range of the model's timesteps, 0 to 999.")
    if args.lambda_distill == 0 and args.discriminator_start_step > 0:
        raise UsageError("--lambda_distill 0: until --discriminator_start_step there would be nothing to learn.")
    if args.lambda_distill == 0 and (args.cache_rollouts or args.rollout_cache):
        raise UsageError("--cache_rollouts, --rollout_cache: --lambda_distill 0 never asks what the teacher says.")
    if args.cache_rollouts and args.rollout_cache:
        raise UsageError("--cache_rollouts keeps what --rollout_cache has already: leave one of them out.")
    if args.student_model and args.lora_rank:
        raise UsageError(
            "--student_model is about the whole UNet, and --lora_rank trains adapters on the teacher's: leave one out."
        )


def check_models(args):
    """Refuse, from config files alone, a --student_model or a DINOv2 that does not fit the teacher or the flags.

    And batches that it would have no use for, whose size may depend on the model.
    """
    if args.mismatched_captions and args.train_batch_size % 2:
        raise UsageError(
            f"--mismatched_captions swaps the captions of neighbours: --train_batch_size {args.train_batch_size} "
            "is odd."
        )
    path = args.student_model = pipeline_folder(args.student_model, "--student_model")
    if path:
        check_compatible(path, "--student_model", args.pretrained_model_name_or_path, args.revision)
        if takes_guidance(path):
            raise UsageError(
                f"--student_model {path}: its guidance scale is an input of its UNet, which this script can't use: "
                "start from the model it was made of."
            )
    if args.discriminator == "dinov2":
        Dinov2Features.check(args.feature_model_name_or_path, args.feature_resolution)


def own_unet(args, pipeline):
    """The UNet that is trained, now the pipeline's. Never the teacher's own: the discriminator looks with that one."""
    if args.student_model:
        source = load_pipeline(args.student_model, flag="--student_model")
        check_same_inputs(source, pipeline, f"--student_model {args.student_model}")
        pipeline.unet = source.unet.to(pipeline.unet.device).requires_grad_(True)
        return pipeline.unet
    if args.lora_rank:
        pipeline.unet = copy.deepcopy(pipeline.unet)
    return student_unet(args, pipeline)


def draw(args, step, positions, latents):
    """Per-sample randomness of the student by global position: on the CPU, indices into its timesteps, timesteps to
    re-noise to for the teacher, (B,), and noise like latents for the student's input and for the teacher's.

    All are drawn whatever the options. A cached step comes again with the same.
    """
    slots, distill, noise = [], [], []
    low, high = args.distill_timesteps
    probs = torch.tensor(args.timestep_probs or [1.0] * args.num_inference_steps)
    for position in positions:
        generator = sample_generator(args.seed, step, position)
        slots.append(torch.multinomial(probs, 1, generator=generator)[0])
        distill.append(torch.randint(low, high + 1, (), generator=generator))
        noise.append(torch.randn((2, *latents.shape[1:]), generator=generator))
    distill, noise = (
        x.to(latents.device, non_blocking=True) for x in (torch.stack(distill), torch.stack(noise, dim=1))
    )
    return torch.stack(slots), distill, *noise


def draw_judged(args, number, positions, latents):
    """The same of the discriminator: timesteps to re-noise to (B,), and noise like latents for its fakes and its real
    latents. Of its update's number, so that it sees a cached step anew.
    """
    timesteps, noise = [], []
    low, high = args.discriminator_timesteps
    for position in positions:
        generator = sample_generator(args.seed, number, position, stream="discriminator")
        timesteps.append(torch.randint(low, high + 1, (), generator=generator))
        noise.append(torch.randn((2, *latents.shape[1:]), generator=generator))
    timesteps, noise = (
        x.to(latents.device, non_blocking=True) for x in (torch.stack(timesteps), torch.stack(noise, dim=1))
    )
    return timesteps, *noise


def perturbation(args, number, positions, features):
    """Noise like features (a list of (B, C, H, W)) for r1_finite_difference, by global position."""
    noise = []
    for position in positions:
        generator = sample_generator(args.seed, number, position, stream="perturbation")
        noise.append([torch.randn(x.shape[1:], generator=generator) for x in features])
    return [torch.stack(drawn).to(x.device, non_blocking=True) for drawn, x in zip(zip(*noise), features)]


@torch.no_grad()
def teach(args, guided, schedule, conditioning, z, timesteps, x_student, distill_timesteps, noise):
    """(x_psi (B, C, H, W), c(t) (B,)): what the guided teacher makes of the student, and how much it counts, eq. (4).

    guided(z, timesteps, conditioning): the teacher's output. score: its x0 of x^, x_student, re-noised to
    distill_timesteps (B,) by noise. sample: where --num_ddim_steps of it take the student's own input z, from
    timesteps, (B,) on the CPU, to the end.
    """
    if args.distill_target == "sample":

        def moved(z, timesteps, rows):
            return guided(z, timesteps, conditioning if rows is None else conditioning.rows(rows))

        ends, steps = torch.full_like(timesteps, -1), (args.num_ddim_steps, args.teacher_steps == "proportional")
        sample = ddim_rollout(moved, schedule, z, timesteps, ends, *steps, args.solver)
        return sample, torch.ones(len(z), device=z.device)
    z = schedule.add_noise(x_student, noise, distill_timesteps)
    x_teacher = schedule.to_x0(guided(z, distill_timesteps, conditioning), z, distill_timesteps)
    return x_teacher, schedule.alpha(distill_timesteps).flatten()


def main(args):
    check_arguments(args)
    settle(args)
    from_contract = read_teacher(args, hint=", and give this one as --student_model")
    guidance_scale = from_contract["guidance_scale"]
    check_models(args)
    check_rollouts(args, from_contract, **{name: getattr(args, name, "x0") for name in ROLLED_OUT_BY})
    dataset = load_dataset_from_args(args)
    watch = preflight(args, dataset, guidance_scale, own_teacher=True, student=args.student_model)
    run = open_run(args, watch)
    accelerator, start, updates = run.accelerator, args.discriminator_start_step, args.discriminator_updates
    if start >= args.max_train_steps:
        accelerator.print(f"--discriminator_start_step {start}: the student learns from the teacher alone.")

    # 1 frozen models, in the compute dtype
    real = args.discriminator == "dinov2" or not args.cache_dir  # images that are to be encoded, or decoded
    pipeline = load_frozen(args, run, needs=["vae"] * real)
    teacher = pipeline.unet
    schedule = NoiseSchedule(pipeline.scheduler, run.device)
    steps = args.num_inference_steps
    scheduler = student_scheduler(pipeline.scheduler, "x0", steps)
    contract = make_contract(args, "add", "x0", steps, student_timesteps(scheduler, steps))
    student_times = torch.tensor(contract["timesteps"])
    step_counts = shorter_schedules(scheduler, steps)
    unconditional = unconditional_of(pipeline, dataset, args.resolution)

    def guided(z, timesteps, conditioning):
        return predict_guided(teacher, z, timesteps, conditioning, unconditional, guidance_scale)

    sight = make_sight(args, run, pipeline, schedule)

    # 2 trained, in fp32
    unet = own_unet(args, pipeline)
    set_up(unet, args)
    plain_heads = make_heads(sight, unconditional).to(run.device)
    head_parameters = trainable(plain_heads)

    # 3 optimizer, resume, data
    own = {"learning_rate": args.discriminator_learning_rate, "max_train_steps": args.max_train_steps - start}
    head_args = argparse.Namespace(**{**vars(args), **own, "use_8bit_adam": False})  # they are small
    student, optimizer = prepare(run, unet, adamw(trainable(unet), args))
    parameters = trainable(unet)
    ema = EMA(parameters, args.ema_decay, args.offload_ema)
    heads, head_optimizer = prepare_beside(run, "discriminator", plain_heads, adamw(head_parameters, head_args))
    accumulated = [student, heads] if run.engine == "ddp" else [student]
    run.register({"student": parameters, "discriminator": head_parameters}, {"student": ema})
    loader = iter(build_dataloader(dataset, args, accelerator, run.step, args.cache_rollouts, updates))
    rollouts = Rollouts(pipeline, args.resolution, args.cache_rollouts * updates)
    names = ["discriminator", "r1", "d_real", "d_fake"] + ["d_mismatched"] * args.mismatched_captions

    while run.step < args.max_train_steps:
        rates = {"lr": set_learning_rate(optimizer, learning_rate_at(run.step, args))}
        run.add(**dict.fromkeys(names, 0.0))  # what is logged until the discriminator starts
        adversarial = run.step >= start
        if adversarial:
            head_rate = learning_rate_at(run.step - start, head_args)
            rates["discriminator_lr"] = set_learning_rate(head_optimizer, head_rate)
        for place, batch in enumerate(run.batches(loader, updates)):
            update_number, micro_batch = divmod(place, args.gradient_accumulation_steps)
            trains_student = update_number == updates - 1  # the student shares the last update's batch
            if not (adversarial or trains_student):
                continue
            with accelerator.accumulate(*accumulated):
                # draw
                latents, rollout = latents_of(pipeline, batch), rollouts.of(batch, micro_batch)
                slots, distill_timesteps, noise, new_noise = draw(args, batch["step"], batch["positions"], latents)
                if rollout is None:
                    conditioning = conditioning_of(pipeline, batch, args.resolution)
                    timesteps = student_times[slots].to(run.device, non_blocking=True)
                    z = schedule.noisy_input(latents, noise, timesteps)
                else:
                    conditioning, z, timesteps, _, sample = rollout

                # student
                run.phase("student")
                with torch.set_grad_enabled(trains_student), accelerator.autocast():
                    output = predict(student if trains_student else unet, z, timesteps, conditioning)
                x_student = schedule.to_x0(output, z, timesteps)

                # teach
                run.phase("teacher")
                target = None
                if trains_student and rollout is not None:
                    target = sample, torch.ones(len(z), device=run.device)
                elif trains_student and args.lambda_distill:
                    asked = conditioning, z, student_times[slots], x_student, distill_timesteps, new_noise
                    with accelerator.autocast():
                        target = teach(args, guided, schedule, *asked)
                    rollouts.keep(batch, micro_batch, (conditioning, z, timesteps, timesteps, target[0]))

                # judge
                run.phase("student")
                if adversarial:
                    number = run.step * updates + update_number
                    drawn = draw_judged(args, number, batch["positions"], latents)
                    captions = batch["captions"] if args.mismatched_captions else None
                    pure = timesteps == schedule.num_train_timesteps - 1
                    seen = see(sight, *drawn, latents, x_student, conditioning, pure, captions)
                if trains_student:
                    fake_scores = scores_for_student(plain_heads, seen) if adversarial else None
                    terms = student_terms(args, x_student, target, fake_scores)
                    accelerator.backward(terms["loss"])
                    run.add(**terms)
                if adversarial:
                    loss, terms = discriminator_terms(args, heads, seen, number, batch["positions"])
                    (loss / args.gradient_accumulation_steps).backward()
                    run.add(**{name: value / updates for name, value in terms.items()})

                # step both
                if trains_student:
                    clip(run, optimizer, parameters)
                    update(run, optimizer, parameters, ema)
                if adversarial:
                    clip(run, head_optimizer, head_parameters, "discriminator")
                    update(run, head_optimizer, head_parameters, name="discriminator")
        run.count(("distillation", "d_real", "d_fake", "skipped"), **rates)
        if run.validates():
            with ema.applied(parameters):
                preview_counts(run, pipeline, scheduler, step_counts)
        run.save()

    notes = {"method": f"ADD, {args.discriminator} discriminator, teacher guided at {guidance_scale:g}"}
    notes["distillation"] = f"{args.distill_target}, weight {args.lambda_distill:g}"
    notes["sampled in"] = f"{', '.join(map(str, step_counts))} steps"
    with ema.applied(parameters):
        save_student(run, {"unet": unet}, scheduler, contract, "Adversarially distilled student", notes)
    export(run)
    run.end()


if __name__ == "__main__":
    run_script(main, parse_args())
