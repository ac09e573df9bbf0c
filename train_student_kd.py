"""Train a smaller UNet on its teacher's outputs and features (BK-SDM, arXiv:2305.15798, eq. 1-4).

Two UNets see the same noisy latents z_t = alpha_t x + sigma_t eps: the teacher, frozen, and the student, which
prepare_unet_small.py cut out of it. With f_k the pairs of features that the student's compression.json names:

    L = w_task |o_s - o|^2 + alpha w_kd |o_s - o_T|^2 + w_feat sum_k |f_k^s - f_k^T|^2 / |f_k^T|^2

o_s is the student's output, o_T the teacher's, o what a right model says: the noise eps (or v). alpha goes linearly
from --kd_alpha_start to --kd_alpha_end over the run. Where widths differ, a learned 1x1 projection P_k f_k^s is
compared.

    accelerate launch train_student_kd.py --student_model out/tiny
    accelerate launch --multi_gpu --num_processes 8 train_student_kd.py --student_model out/sd_small --data_dir coco \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed_precision bf16

Run the same command with --resume_from_checkpoint latest to go on after a stop. Writes
<output_dir>/[<run_name>/]checkpoint-N/ and final/, a whole pipeline folder with the averaged student in it.
"""

from functools import partial

import torch
from accelerate.utils import broadcast_object_list

from common import arguments
from common.arguments import ByModel, weight
from common.compression import students
from common.compression.distillation import kd_loss, make_student
from common.compression.manifest import read_manifest
from common.conditioning import conditioning_of, encode_empty_prompt, latents_of, predict, unconditional_of
from common.contract import TINY_SD, make_contract, parent_source, read_distillation, read_teacher
from common.data import load_dataset_from_args
from common.diffusion import NoiseSchedule, min_snr_weights
from common.ema import EMA
from common.engines import made_whole, prepare
from common.errors import UsageError
from common.frozen import ENCODERS, load_frozen, put_away
from common.judging.evaluation import Evaluation, better, check_evaluation
from common.judging.previews import preview
from common.loader import build_dataloader
from common.lora import trainable
from common.optimization import adamw, clip, learning_rate_at, set_learning_rate, update
from common.outputs import export, save_student
from common.pipelines import (
    check_compatible,
    keep_vae_right,
    latent_shape,
    load_pipeline,
    load_unet,
    same_weights,
    set_up,
)
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
        "--student_model",
        help="student pipeline: a folder that prepare_unet_small.py or this script wrote (default: "
        "sd_small of the teacher, written to <output_dir>/student)",
    )
    add(
        "--task_weight",
        type=weight,
        help="weight of the error against the noise in the data (default: 1; 0 with "
        "--random_latents, and for a teacher whose guidance is baked in)",
    )
    add("--kd_weight", type=weight, default=1.0, help="weight of the error against the teacher's output")
    add("--feature_weight", type=weight, default=1.0, help="weight of the features' error; 0 reads no features")
    add("--kd_alpha_start", type=weight, default=1.0, help="alpha, a factor of --kd_weight, at the first step")
    add("--kd_alpha_end", type=weight, default=0.5, help="alpha at the last step: linear in between")
    add("--caption_dropout_start", type=share, default=0.0, help="share of captions emptied at the first step")
    add(
        "--caption_dropout_end",
        type=share,
        help="share of captions emptied at the last step: linear in between (default: as at the start)",
    )
    add("--snr_gamma", type=arguments.positive_float, help="Min-SNR weighting of both output errors, such as 5")
    add(
        "--prediction_type",
        choices=("epsilon", "v_prediction"),
        help="what the student is to predict (default: what it does, which is as its teacher)",
    )
    add(
        "--chain_schedule",
        type=arguments.positive_int,
        nargs="+",
        help="lengths of the diffusion chain, such as 1000 500 250: equal shares of the run train on the timesteps of "
        "ever shorter chains, and the last one's are the output's (default: all timesteps)",
    )
    arguments.add_rollout_arguments(add)
    add("--random_latents", action="store_true", help="captions only: z ~ N(0, I) in place of noisy images")
    add("--teacher_cpu_offload", action="store_true", help="keep the teacher's UNet in the CPU's memory between uses")
    arguments.add_optimization_arguments(
        parser, learning_rate=ByModel(5e-4, 5e-5), train_batch_size=ByModel(32, 4), max_train_steps=500
    )
    arguments.add_checkpoint_arguments(parser, output_dir="outputs/student_kd")
    arguments.add_validation_arguments(parser)
    arguments.add_evaluation_arguments(parser)
    arguments.add_runtime_arguments(parser)
    return parser.parse_args(argv)


def share(text):
    return 1.0 if float(text) == 1 else arguments.fraction(text)


def ramp(start, end, step, max_train_steps):
    """Linear from start at the first step (0) to end at the last one."""
    return start + (end - start) * step / max(max_train_steps - 1, 1)


def chain_index(step, max_train_steps, chains):
    """Which of so many chains `step` trains on: equal shares of the run."""
    return min(step * chains // max_train_steps, chains - 1)


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work; fill in the defaults that belong to other flags."""
    if args.caption_dropout_end is None:
        args.caption_dropout_end = args.caption_dropout_start
    if args.random_latents and args.rollout_cache:
        raise UsageError("--random_latents takes noise, and --rollout_cache the teacher's samples: leave one out.")
    if args.random_latents and args.task_weight:
        raise UsageError(
            "--task_weight: --random_latents has no images, so no noise in them to predict: leave it out."
        )
    chain = args.chain_schedule or []
    if any(later >= earlier for earlier, later in zip(chain[:-1], chain[1:])):
        raise UsageError(f"--chain_schedule {' '.join(map(str, chain))}: every chain must be shorter than the last.")
    if chain and chain[0] > 1000:
        raise UsageError(f"--chain_schedule {chain[0]} is more than the model's 1000 timesteps.")
    if args.student_model and args.pretrained_model_name_or_path is None:
        # The teacher that the student was cut out of, as it was taken then.
        origin = {**read_distillation(args.student_model), "parent": read_manifest(args.student_model).get("parent")}
        source = parent_source(origin, args.student_model) if origin["parent"] else {"path": str(TINY_SD)}
        if source["path"] != str(TINY_SD):
            args.pretrained_model_name_or_path = source["path"]
            args.revision, args.variant = args.revision or source["revision"], args.variant or source["variant"]


def settle_weights(args, from_contract):
    """The task's weight where the flag leaves it open; refuses what would train nothing, or what the teacher isn't."""
    if args.task_weight is None:
        args.task_weight = 0.0 if args.random_latents or from_contract["guidance"] == "baked" else 1.0
    if args.task_weight == 0 and args.kd_weight * max(args.kd_alpha_start, args.kd_alpha_end) == 0:
        raise UsageError("--task_weight and --kd_weight (times its alpha) are both 0: nothing trains the output.")
    if from_contract["timesteps"] and args.chain_schedule:
        raise UsageError("--chain_schedule: the teacher has timesteps of its own, for few steps, and no others.")


def check_student(args):
    """Refuse, from its files alone, a student that can't learn from the teacher; returns its manifest.

    With no --student_model, a teacher that sd_small can't be cut out of.
    """
    if not args.student_model:
        return students.read_student_config(args.pretrained_model_name_or_path, args.revision, "sd_small")
    manifest = read_manifest(args.student_model)
    check_compatible(args.student_model, "--student_model", args.pretrained_model_name_or_path, args.revision)
    if args.feature_weight and not manifest["feature_pairs"]:
        raise UsageError(f"--feature_weight: {args.student_model} names no feature_pairs: set it to 0.")
    return manifest


def prepare_student(folder, args):
    """The default student: sd_small of the teacher, as a pipeline folder beside the run."""
    origin = {"revision": args.revision, "variant": args.variant}
    pipeline = load_pipeline(args.pretrained_model_name_or_path, **origin)
    pipeline.unet, manifest = students.build_student(pipeline.unet, variant="sd_small")
    students.save_untrained(folder, pipeline, manifest, args.pretrained_model_name_or_path, **origin)
    counts = manifest["parameters"]
    said = f"sd_small of the teacher, {counts['student']:,} of {counts['teacher']:,} parameters, is in {folder}."
    print(f"No --student_model: {said}", flush=True)


def find_student(args, run):
    """The manifest of the student, which is made first, by the main process, where none was given."""
    if not args.student_model:
        folder = run.folder / "student"
        if run.accelerator.is_main_process and not (run.checkpoint and folder.is_dir()):
            prepare_student(folder, args)
        run.accelerator.wait_for_everyone()
        args.student_model = str(folder)
    return check_student(args)


def load_pair(args, run):
    """(student's pipeline, teacher's, whether one text encoding serves both): what is alike is in memory once.

    The student's UNet is in fp32, everything else frozen in the compute dtype.
    """
    teacher = load_frozen(args, run, needs=ENCODERS)
    pipeline = load_pipeline(args.student_model, run.dtype, flag="--student_model")
    keep_vae_right(pipeline)
    pipeline.unet = load_unet(args, args.student_model)
    pipeline.to(run.device)
    texts = [name for name in pipeline.components if name.startswith("text_encoder")]
    one_text = all(same_weights(getattr(pipeline, name), getattr(teacher, name)) for name in texts)
    if (args.cache_dir or args.rollout_cache) and not one_text:
        raise UsageError(
            f"--student_model {args.student_model}: its text encoder is not the teacher's, whose embeddings a cache "
            "holds: leave out --cache_dir and --rollout_cache."
        )
    shared = ["vae", *(texts if one_text else [])]
    teacher.register_modules(**{name: getattr(pipeline, name) for name in shared})
    put_away(pipeline, args), put_away(teacher, args)
    return pipeline, teacher, one_text


def student_scheduler(args, scheduler, teacher_schedule):
    """(the scheduler of the output's noise schedule, timesteps of each chain): --prediction_type, --chain_schedule.

    Raises UsageError where a chain has no such timesteps, or where the student could not learn at some of them.
    """
    if args.prediction_type:
        scheduler = type(scheduler).from_config(scheduler.config, prediction_type=args.prediction_type)
    lengths = args.chain_schedule or [teacher_schedule.num_train_timesteps]
    if lengths[0] > teacher_schedule.num_train_timesteps:
        whole = teacher_schedule.num_train_timesteps
        raise UsageError(f"--chain_schedule {lengths[0]}: the teacher has {whole} timesteps and no more.")
    try:
        chains = [student_timesteps(ddim_scheduler(scheduler, length), length) for length in lengths]
    except ValueError as error:
        raise UsageError(f"--chain_schedule: {error}.") from None
    try:
        schedule = NoiseSchedule(scheduler)
    except ValueError as error:
        raise UsageError(f"--prediction_type {args.prediction_type}: {error}; use v_prediction.") from None
    ours = schedule.alpha(torch.arange(schedule.num_train_timesteps))
    theirs = teacher_schedule.alpha(torch.arange(teacher_schedule.num_train_timesteps)).cpu()
    if not torch.equal(ours, theirs):
        raise UsageError(f"--student_model {args.student_model}: its noise schedule is not the teacher's.")
    return scheduler, chains


def draw(args, step, positions, shape, chain, dropout):
    """Per-sample randomness by global position: noise (B, *shape), timesteps of the chain (B,), emptied captions (B,).

    All are drawn whatever the options, so that none changes what another one draws.
    """
    noise, timesteps, dropped = [], [], []
    for position in positions:
        generator = sample_generator(args.seed, step, position)
        place, chance = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        timesteps.append(chain[int(place * len(chain))])
        dropped.append(chance < dropout)
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(noise), torch.tensor(timesteps), torch.tensor(dropped)


def noisy_pair(args, schedule, latents, noise, timesteps):
    """(z_t, o or None): the noisy latents (B, C, H, W), and what a right model says of them where that is learned."""
    if args.task_weight:
        return schedule.add_noise(latents, noise, timesteps), schedule.target(latents, noise, timesteps)
    return schedule.noisy_input(latents, noise, timesteps), None  # the teacher knows what to do where sampling starts


@torch.no_grad()
def teach(args, teacher, tap, z, timesteps, conditioning):
    """(o_T (B, C, H, W), its features by name): one forward of the teacher, which may be kept off the device."""
    if args.teacher_cpu_offload:
        teacher.to(z.device)
    output = predict(teacher, z, timesteps, conditioning)
    if args.teacher_cpu_offload:
        teacher.to("cpu")
    return output, tap.features


def card_notes(args, manifest, unet, figures=None, count=None):
    """What the card says of the student, and of the figures of `count` images where it was judged."""
    blocks, widths = manifest.get("variant") or "narrower", manifest.get("block_out_channels")
    return {
        "method": "knowledge distillation of the UNet (BK-SDM)",
        "UNet": f"{blocks}, widths {widths}, {sum(p.numel() for p in unet.parameters()):,} parameters",
        "weights of task, KD, features": f"{args.task_weight:g}, {args.kd_weight:g}, {args.feature_weight:g}",
        **{f"{name}, {count} images": f"{value:.4f}" for name, value in (figures or {}).items()},
    }


def judge(args, run, evaluation, pipeline, teacher, samplers, contract):
    """{metric: value} of the student that `pipeline` holds where it is the best so far, else None. On every rank.

    samplers: schedulers of student and teacher. The teacher's images, for LPIPS, are drawn the first time.
    """
    steps, scale = contract["steps"] or args.eval_inference_steps, contract["guidance_scale"]
    with run.accelerator.autocast():
        if args.lpips_trunk_path and evaluation.teacher_images is None:
            teacher.unet.to(run.device)
            evaluation.teacher_images = evaluation.images(run.accelerator, teacher, samplers[1], steps, scale)
            teacher.unet.to("cpu" if args.teacher_cpu_offload else run.device)
        with made_whole(run, pipeline, everywhere=True):
            images = evaluation.images(run.accelerator, pipeline, samplers[0], steps, scale)
    known, found = run.state.get("best"), [None, None]
    if run.accelerator.is_main_process:
        figures = evaluation.report(run.accelerator, images, run.step)
        found = [better(known, figures, run.step, evaluation.judges), figures]
    run.state["best"], figures = broadcast_object_list(found)
    return figures if run.state["best"] != known else None


def main(args):
    check_arguments(args)
    settle(args)
    from_contract = read_teacher(args, few_steps=True)
    settle_weights(args, from_contract)
    check_evaluation(args)
    check_student(args)
    check_rollouts(args, from_contract, target="x0")
    dataset = load_dataset_from_args(args, needs_images=not (args.random_latents or args.rollout_cache))
    ramps = {"--kd_alpha_end": args.kd_alpha_start != args.kd_alpha_end}
    ramps["--caption_dropout_end"] = args.caption_dropout_start != args.caption_dropout_end
    ramps["--chain_schedule"] = len(args.chain_schedule or []) > 1
    variant = None if args.student_model else "sd_small"
    watch = preflight(args, dataset, student=args.student_model, variant=variant)
    run = open_run(args, watch, follows_length=[flag for flag, changes in ramps.items() if changes])
    accelerator = run.accelerator
    manifest = find_student(args, run)

    # 1 frozen models, in the compute dtype
    pipeline, teacher, one_text = load_pair(args, run)
    unet = pipeline.unet
    teacher_schedule = NoiseSchedule(teacher.scheduler, run.device)
    scheduler, chains = student_scheduler(args, pipeline.scheduler, teacher_schedule)
    carried = {key: from_contract[key] for key in ("target", "steps", "timesteps", "guidance", "guidance_scale")}
    few_steps = bool(carried["timesteps"])  # the teacher knows no others
    if few_steps:
        chains = [carried["timesteps"]]
    elif args.chain_schedule:  # what the student was trained for at the end is how it is sampled
        steps = args.chain_schedule[-1]
        scheduler = ddim_scheduler(scheduler, steps)
        carried.update(target="next", steps=steps, timesteps=chains[-1])
    contract = make_contract(args, "student_kd", **carried)
    schedule = NoiseSchedule(scheduler, run.device)
    unconditional = unconditional_of(pipeline, dataset, args.resolution)
    teacher_unconditional = unconditional if one_text else encode_empty_prompt(teacher, args.resolution)
    # Samples during training: by the scheduler of the output where it is for few steps, else by trailing DDIM.
    sampler = scheduler if contract["steps"] else ddim_scheduler(scheduler, args.eval_inference_steps)
    teacher_steps = contract["steps"] or args.eval_inference_steps
    teacher_sampler = teacher.scheduler if few_steps else ddim_scheduler(teacher.scheduler, teacher_steps)
    shown = {**contract, "steps": contract["steps"] or args.eval_inference_steps}

    # 2 trained, in fp32
    pairs = manifest["feature_pairs"] if args.feature_weight else []
    empty = unconditional, teacher_unconditional
    plain, tap, teacher_tap = make_student(args, run, pipeline, teacher, empty, pairs, args.student_model)
    set_up(unet, args, teacher.unet)

    # 3 optimizer, resume, data
    student, optimizer = prepare(run, plain, adamw(trainable(plain), args))
    parameters = trainable(plain)
    ema = EMA(parameters, args.ema_decay, args.offload_ema)
    run.register({"student": parameters}, {"student": ema})
    loader = iter(build_dataloader(dataset, args, accelerator, run.step))
    evaluation = Evaluation(args, accelerator) if args.eval_steps else None
    shape = latent_shape(pipeline, args.resolution)
    kept = {"source": args.student_model, "manifest": manifest}
    save = partial(save_student, run, {"unet": unet}, scheduler, contract, "Smaller student", **kept)

    while run.step < args.max_train_steps:
        learning_rate = set_learning_rate(optimizer, learning_rate_at(run.step, args))
        alpha = ramp(args.kd_alpha_start, args.kd_alpha_end, run.step, args.max_train_steps)
        dropout = ramp(args.caption_dropout_start, args.caption_dropout_end, run.step, args.max_train_steps)
        chain = chains[chain_index(run.step, args.max_train_steps, len(chains))]
        for batch in run.batches(loader):
            with accelerator.accumulate(student):
                if not args.random_latents:
                    latents = latents_of(pipeline, batch)
                    shape = latents.shape[1:]
                drawn = draw(args, batch["step"], batch["positions"], shape, chain, dropout)
                noise, timesteps, dropped = (x.to(run.device, non_blocking=True) for x in drawn)
                conditioning = conditioning_of(pipeline, batch, args.resolution)
                conditioning = teacher_conditioning = conditioning.where(dropped, unconditional)
                if not one_text:
                    teacher_conditioning = conditioning_of(teacher, batch, args.resolution)
                    teacher_conditioning = teacher_conditioning.where(dropped, teacher_unconditional)
                z, target = noise, None  # --random_latents: alpha x + sigma eps is N(0, I) where x is
                if not args.random_latents:
                    z, target = noisy_pair(args, schedule, latents, noise, timesteps)
                run.phase("teacher")
                with accelerator.autocast():
                    said, features = teach(args, teacher.unet, teacher_tap, z, timesteps, teacher_conditioning)
                teacher_output = teacher_schedule.convert(said, z, timesteps, schedule.prediction_type)

                run.phase("student")
                with accelerator.autocast():
                    output = predict(student, z, timesteps, conditioning)
                own = plain.features(tap, [name for name, _ in pairs])
                compared = list(zip(own, (features[name] for _, name in pairs)))
                weights = min_snr_weights(schedule, timesteps, args.snr_gamma)
                loss, terms = kd_loss(
                    output,
                    teacher_output,
                    target,
                    compared,
                    weights,
                    args.task_weight,
                    alpha * args.kd_weight,
                    args.feature_weight,
                )
                accelerator.backward(loss)
                run.add(loss=loss, loss_task=terms[0], loss_kd=terms[1], loss_feature=terms[2])
                clip(run, optimizer, parameters)
                update(run, optimizer, parameters, ema)
        run.count(lr=learning_rate, kd_alpha=alpha, caption_dropout=dropout, chain_length=len(chain))
        if run.validates():
            with ema.applied(parameters):
                preview(run, pipeline, sampler, shown)
        if args.eval_steps and run.step % args.eval_steps == 0:
            with ema.applied(parameters):
                best = judge(args, run, evaluation, pipeline, teacher, (sampler, teacher_sampler), contract)
                if best:
                    save(card_notes(args, manifest, unet, best, evaluation.count), "best")
        run.save()

    with ema.applied(parameters):
        save(card_notes(args, manifest, unet), "final")
    export(run)
    run.end()


if __name__ == "__main__":
    run_script(main, parse_args())
