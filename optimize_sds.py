"""Optimise images or volumes until a teacher's score likes them: score distillation (DreamFusion, arXiv:2209.14988).

Nothing learns to generate: what is trained are the images themselves (--target image), or volumes seen from cameras on
a sphere (--target volume). With x(theta) the latents of an image, or of a rendered view:

    z_t = alpha_t x + sigma_t eps
    dL/dtheta = E[w(t) d(z_t) dx/dtheta]          no gradient through the UNet; d is, by --loss,

    sds     eps_u + g (eps_c - eps_u) - eps       DreamFusion, eq. (3), guided
    csd     eps_c - eps_u                         the classifier's score alone, arXiv:2310.19415, eq. (7)
    nfsd    d_D + g (eps_c - eps_u)               without the noise's share, arXiv:2310.17590, eq. (9)
    vsd     eps_u + g (eps_c - eps_u) - eps_psi   ProlificDreamer, arXiv:2305.16213, eq. (9)

eps_c and eps_u are the teacher's given the prompt and without; eps_psi is what a LoRA of the teacher, trained beside
on z_t of the images as they are, says of the noise.

    accelerate launch optimize_sds.py --prompt "a large red circle on a white background" --output_dir out/sds
    accelerate launch optimize_sds.py --target volume --prompt "a large red circle on a white background"
    accelerate launch optimize_sds.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --mixed_precision fp16 --loss vsd --prompt "a photo of a hamburger" --num_images 4 --max_train_steps 2000

Run the same command with --resume_from_checkpoint latest to go on after a stop. Writes
<output_dir>/[<run_name>/]checkpoint-N/ and final/: pictures, for volumes a turntable and point clouds, and
results.json. It is the one script here whose output is no pipeline.
"""

import json
import os

import torch
from safetensors.torch import save_file

from common import arguments
from common.checkpoint import FinalFolder
from common.conditioning import (
    decode_latents,
    encode_empty_prompt,
    encode_images,
    encode_images_with_gradient,
    encode_prompts,
    predict,
)
from common.contract import comes_from_tiny_sd, read_teacher
from common.diffusion import NoiseSchedule
from common.ema import EMA
from common.errors import UsageError
from common.frozen import load_frozen
from common.judging import results
from common.judging.previews import image_diversity, image_grid
from common.loader import GlobalBatchSampler
from common.lora import add_lora, trainable, without_adapters
from common.optimization import adamw, clip, learning_rate_at, set_learning_rate, update
from common.particles import angles_of, look, make_student, pictures, save_volumes, show
from common.pipelines import latent_shape, set_up
from common.randomness import sample_generator
from common.run import open_run, run_script
from common.sampling import asked_prompts, check_held_out, default_batch_size, slug
from common.settle import settle
from common.volumes import VIEWS, view_of

GUIDANCE = {"sds": 100.0, "csd": 1.0, "nfsd": 7.5, "vsd": 7.5}  # the papers'
TINY_GUIDANCE = {**GUIDANCE, "sds": 7.5}  # measured: docs/sds.md
NEGATIVE = "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, low-resolution, gloomy"
VIEWS_PER_VOLUME = 4  # of the default batch


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    arguments.add_model_arguments(parser).add_argument(
        "--resolution", type=arguments.positive_int, help="pixels per side that the teacher sees (default: its own)"
    )
    arguments.add_prompt_arguments(parser, "for tiny-sd a large red circle")
    add = parser.add_argument_group("what is optimised").add_argument
    add("--target", choices=("image", "volume"), default="image", help="images, or volumes seen from all around")
    add("--num_images", "--num_particles", type=arguments.positive_int, default=1, help="images, or volumes, a prompt")
    add(
        "--parameterization",
        choices=("latent", "pixels"),
        help="of image: latents, or pixels, whose gradient goes through the VAE's encoder (default: latent)",
    )
    add("--grid_size", type=arguments.positive_int, help="of volume: grid points per side (default: 32)")
    add("--samples_per_ray", type=arguments.positive_int, help="of volume (default: 48)")
    add(
        "--render_size",
        type=arguments.positive_int,
        help="of volume: pixels per side, enlarged to --resolution (default: --resolution, 128 at most)",
    )
    between = {"type": float, "nargs": 2, "metavar": ("MIN", "MAX")}
    add("--azimuths", **between, help="of volume: degrees, 0 the front, 90 the right (default: -180 180)")
    add("--elevations", **between, help="of volume: degrees, 90 from above (default: -10 30)")
    add(
        "--background",
        choices=("learned", "random", "white", "gray", "black"),
        help="of volume: a colour that each learns, drawn for each view, or given (default: learned)",
    )
    add("--opacity_weight", type=arguments.weight, help="of volume: penalty on the mean opacity (default: 0)")
    add(
        "--pixel_gradient",
        choices=("decoder", "encoder"),
        help="of pixels and volume: pulled to the decoded clean latents that d stands for (HiFA, 2305.18766), or "
        "d back through the VAE's encoder (default: decoder)",
    )
    add("--view_prompts", action="store_true", help="of volume: ', front view', ... by the camera behind the prompt")
    add = parser.add_argument_group("score distillation").add_argument
    add("--loss", choices=tuple(GUIDANCE), default="sds", help="see above")
    add("--guidance_scale", type=arguments.weight, help="g (default: of sds 100, for tiny-sd 7.5; of the others 7.5)")
    add("--negative_prompt", help="of nfsd: what marks a bad score (default: the paper's; '' for tiny-sd)")
    add(
        "--weighting",
        choices=("sigma2", "one", "x0"),
        default="sigma2",
        help="w(t): sigma_t^2 (DreamFusion's), 1, or sigma_t / alpha_t, with which d is an error in clean latents",
    )
    add("--min_timestep", type=arguments.fraction, default=0.02, help="share of the timesteps, of those drawn")
    add("--max_timestep", type=arguments.fraction, default=0.98, help="the same")
    add(
        "--anneal_timesteps",
        choices=("none", "linear", "sqrt"),
        default="linear",
        help="the highest timestep drawn falls from --max_timestep to --min_timestep over the run",
    )
    add("--lora_rank", type=arguments.positive_int, help="of vsd: rank of the LoRA that learns eps_psi (default: 16)")
    add("--lora_alpha", type=arguments.positive_float, help="of vsd: its scale is alpha / rank (default: 32)")
    add("--lora_targets", nargs="+", help="of vsd: UNet layers to adapt (default: to_q to_k to_v to_out.0)")
    add("--score_learning_rate", type=arguments.positive_float, help="of vsd: of the LoRA (default: 1e-3)")
    arguments.add_optimization_arguments(parser, learning_rate=0.1, train_batch_size=None, max_train_steps=150)
    arguments.add_checkpoint_arguments(parser, output_dir="outputs/sds")
    add = parser.add_argument_group("progress and judging").add_argument
    add("--validation_steps", type=arguments.positive_int, default=50, help="show the images every so many steps")
    arguments.add_logging_arguments(add)
    add("--clip_model", help="CLIP that judges the end: folder, hub id or 'none' (default: tiny-clip for shapes)")
    arguments.add_runtime_arguments(parser)
    # A score's size grows with guidance, and Adam is free of it: a clip in reach would make images depend on others.
    parser.set_defaults(lr_scheduler="linear", ema_decay=0.9, max_grad_norm=1e6)
    return parser.parse_args(argv)


def sds(conditional, unconditional, noise, guidance_scale):
    """eps_u + g (eps_c - eps_u) - eps: the guided teacher's noise less the one that was added (arXiv:2209.14988).

    As every d here: of scores eps (B, C, H, W) to (B, C, H, W), in fp32.
    """
    return unconditional + guidance_scale * (conditional - unconditional) - noise


def csd(conditional, unconditional):
    """eps_c - eps_u: the implicit classifier's score alone (arXiv:2310.19415, eq. 7)."""
    return conditional - unconditional


def nfsd(conditional, unconditional, negative, timesteps, num_train_timesteps, guidance_scale):
    """d_D + g (eps_c - eps_u); d_D is eps_u at low noise, t < T / 5, where it holds little noise, and eps_u - eps_neg
    above, where the noise cancels out (arXiv:2310.17590, eq. 8 and 9). timesteps (B,).
    """
    low = (timesteps < num_train_timesteps / 5).view(-1, 1, 1, 1)
    domain = torch.where(low, unconditional, unconditional - negative)
    return domain + guidance_scale * (conditional - unconditional)


def vsd(conditional, unconditional, own, guidance_scale):
    """eps_u + g (eps_c - eps_u) - eps_psi: the guided teacher's score less the images' (arXiv:2305.16213, eq. 9)."""
    return unconditional + guidance_scale * (conditional - unconditional) - own


def timestep_weights(schedule, timesteps, weighting):
    """w(t) of timesteps (B,), shaped (B, 1, 1, 1)."""
    sigma, alpha = schedule.sigma(timesteps), schedule.alpha(timesteps)
    return {"sigma2": sigma**2, "one": torch.ones_like(sigma), "x0": sigma / alpha}[weighting]


def distillation_loss(x, gradient):
    """0.5 |x - sg(x - g)|^2, the mean over B samples: a scalar whose gradient in x is g / B. Both (B, C, H, W)."""
    return 0.5 * (x - (x - gradient).detach()).square().sum(dim=(1, 2, 3)).mean()


def score_loss(output, x, noise, timesteps, schedule):
    """|o_psi - o|^2 of the LoRA's output at x's z_t, the mean: it learns how x is noised (arXiv:2305.16213, eq. 8)."""
    return (output - schedule.target(x, noise, timesteps)).square().mean()


def timestep_range(args, step, schedule):
    """(lowest, highest) timestep that is drawn at optimizer step `step`."""
    low, high = (round(share * schedule.num_train_timesteps) for share in (args.min_timestep, args.max_timestep))
    done = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[args.anneal_timesteps]
    fallen = (step / args.max_train_steps) ** done if done else 0.0
    return low, max(round(high - (high - low) * fallen), low)


def pixel_gradient(pixels, x, direction, timesteps, schedule, vae):
    """alpha / sigma (y - D(x - sigma / alpha d)): d as an error in pixels y, of which x are the latents (B, C, H, W).

    x - sigma / alpha d are the clean latents that d stands for, of sds the teacher's own x0; D decodes. The way back
    through the encoder leads to pixels whose latents are right, and which are not (docs/sds.md).
    """
    ratio = schedule.sigma(timesteps) / schedule.alpha(timesteps)
    with torch.no_grad():
        target = decode_latents(vae, x - ratio * direction).clamp(-1, 1)
    return (pixels - target) / ratio


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work; fill in the defaults that belong to other flags."""
    check_held_out(args)
    volume, learned = args.target == "volume", args.loss == "vsd"
    pixels = volume or args.parameterization == "pixels"
    for name, default, of, there in (
        ("parameterization", "latent", "--target image", not volume),
        ("grid_size", 32, "--target volume", volume),
        ("samples_per_ray", 48, "--target volume", volume),
        ("render_size", None, "--target volume", volume),
        ("azimuths", (-180.0, 180.0), "--target volume", volume),
        ("elevations", (-10.0, 30.0), "--target volume", volume),
        ("background", "learned", "--target volume", volume),
        ("opacity_weight", 0.0, "--target volume", volume),
        ("view_prompts", False, "--target volume", volume),
        ("pixel_gradient", "decoder", "pixels: --parameterization pixels or --target volume", pixels),
        ("lora_rank", 16, "--loss vsd", learned),
        ("lora_alpha", None, "--loss vsd", learned),
        ("lora_targets", None, "--loss vsd", learned),
        ("score_learning_rate", 1e-3, "--loss vsd", learned),
        ("negative_prompt", None, "--loss nfsd", args.loss == "nfsd"),
        ("guidance_scale", None, "a loss that has one: sds, nfsd or vsd", args.loss != "csd"),
    ):
        if getattr(args, name) is None or getattr(args, name) is False:
            setattr(args, name, default)
        elif not there:
            raise UsageError(f"--{name} is about {of}: add that, or leave --{name} out.")
    if args.min_timestep > args.max_timestep:
        raise UsageError(f"--min_timestep {args.min_timestep:g} is above --max_timestep {args.max_timestep:g}.")
    for name in ("azimuths", "elevations"):
        low, high = getattr(args, name)
        if not -180 <= low <= high <= 180:
            raise UsageError(f"--{name} {low:g} {high:g} is no range of degrees.")
    for name in ("export", "push_to_hub"):
        if getattr(args, name):
            raise UsageError(f"--{name} is about pipelines, and what is optimised here is none: leave it out.")


def read_prompts(args):
    """The prompts of whichever flag gives them, in args.prompt; the other flags are then as if they were not given.

    A continuation may give the same ones in another way.
    """
    prompts = asked_prompts(args)
    if prompts is None and not comes_from_tiny_sd(args.pretrained_model_name_or_path):
        raise UsageError("--prompt, or --prompts_file, says what to optimise: give one.")
    args.prompt = args.validation_prompts = prompts or ["a large red circle on a white background"]
    args.prompts_file = args.held_out_captions = args.held_out_split = None


def settle_method(args):
    """The guidance scale; fills in what follows the model and how many images there are. Raises UsageError."""
    tiny = comes_from_tiny_sd(args.pretrained_model_name_or_path)
    teacher = read_teacher(args, ("cfg", "baked") if args.loss in ("sds", "vsd") else ("cfg",))
    if args.negative_prompt is None:
        args.negative_prompt = NEGATIVE if args.loss == "nfsd" and not tiny else ""
    args.render_size = args.render_size or min(args.resolution, 128)
    if args.render_size > args.resolution:
        raise UsageError(f"--render_size {args.render_size} is more than the --resolution of {args.resolution}.")
    if args.train_batch_size is None:  # all of them in a step, as far as they fit
        processes = int(os.environ.get("WORLD_SIZE", 1))
        samples = len(args.prompt) * args.num_images * (VIEWS_PER_VOLUME if args.target == "volume" else 1)
        args.train_batch_size = min(-(-samples // processes), default_batch_size(args.resolution))
    if teacher["guidance"] == "baked" or args.guidance_scale is not None:
        return teacher["guidance_scale"]
    return (TINY_GUIDANCE if tiny else GUIDANCE)[args.loss]


def draw(args, step, positions, shape, low, high, last):
    """Per-sample randomness by global position: timesteps (2, B), of the teacher from low to high and of a LoRA up to
    last; noise of `shape` for both (2, B, ...); and five numbers from 0 to 1 for the camera and background (B, 5).

    All are drawn whatever the options.
    """
    timesteps, noise, cameras = [], [], []
    for position in positions:
        generator = sample_generator(args.seed, step, position)
        spans = ((low, high), (0, last))
        timesteps.append(torch.stack([torch.randint(a, b + 1, (), generator=generator) for a, b in spans]))
        noise.append(torch.randn((2, *shape), generator=generator))
        cameras.append(torch.rand(5, generator=generator))
    return torch.stack(timesteps, dim=1), torch.stack(noise, dim=1), torch.stack(cameras)


def scores(unet, schedule, z, timesteps, conditionings):
    """What the UNet says is the noise in z, (B, C, H, W) given each of the conditionings, in one batched forward."""
    count, every = len(conditionings), conditionings[0]
    for other in conditionings[1:]:
        every = every.cat(other)
    z, timesteps = z.repeat(count, 1, 1, 1), timesteps.repeat(count)
    return schedule.to_epsilon(predict(unet, z, timesteps, every), z, timesteps).chunk(count)


@torch.no_grad()
def teach(args, teacher, schedule, z, timesteps, noise, given, empty, negative, guidance_scale):
    """d (B, C, H, W) of --loss at (z, timesteps), z holding noise; the conditionings have B rows."""
    asked = [given] if guidance_scale == 1 and args.loss in ("sds", "vsd") else [given, empty]
    with without_adapters(teacher):
        found = scores(teacher, schedule, z, timesteps, asked + [negative] * (args.loss == "nfsd"))
    conditional, unconditional = found[0], found[len(asked) - 1]
    if args.loss == "csd":
        return csd(conditional, unconditional)
    if args.loss == "nfsd":
        last = schedule.num_train_timesteps
        return nfsd(conditional, unconditional, found[-1], timesteps, last, guidance_scale)
    if args.loss == "vsd":
        (own,) = scores(teacher, schedule, z, timesteps, [given])
        return vsd(conditional, unconditional, own, guidance_scale)
    return sds(conditional, unconditional, noise, guidance_scale)


def save_final(run, pipeline, student, judges, guidance_scale):
    """final/: pictures, of volumes turntable and point clouds, the parameters, results.json. Returns its figures."""
    args, figures = run.args, {}
    if run.accelerator.is_main_process:
        rows = pictures(args, pipeline, student)
        names = [f"{i:04d}_{slug(p)[:40]}_{j}" for i, p in enumerate(args.prompt) for j in range(args.num_images)]
        captions = [prompt for prompt in args.prompt for _ in range(args.num_images)]
        images = [image for row in rows for image in row]
        with FinalFolder(run.folder / "final") as final:
            (final / "images").mkdir()
            for name, image in zip(names, images):
                image.save(final / "images" / f"{name}.png")
            image_grid(rows, args.prompt).save(final / "grid.png")
            tensors = {name: p.detach().cpu().contiguous() for name, p in student.named_parameters()}
            save_file(tensors, final / f"{args.target}.safetensors")
            if args.target == "volume":
                save_volumes(args, pipeline, student, names, final)
            figures = {**results.judged(images, captions, *judges, None), "diversity": image_diversity(rows)}
            report = {**results.circumstances(str(run.device)), "settings": vars(args)}
            report |= {"guidance_scale": guidance_scale, "steps": run.step, "images": names, **figures}
            (final / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    run.accelerator.wait_for_everyone()
    return figures


def main(args):
    check_arguments(args)
    settle(args, unsharded="images or a volume are optimized, which are small")
    read_prompts(args)
    guidance_scale = settle_method(args)
    judges = results.load_judges(args.clip_model, None, args.prompt, "cpu")
    run = open_run(args, follows_length=["--anneal_timesteps"] * (args.anneal_timesteps != "none"))
    accelerator, volume, learned = run.accelerator, args.target == "volume", args.loss == "vsd"

    # 1 frozen models, in the compute dtype
    pipeline = load_frozen(args, run)
    teacher, vae = pipeline.unet, pipeline.vae
    schedule = NoiseSchedule(pipeline.scheduler, run.device)
    shape, last = latent_shape(pipeline, args.resolution), schedule.num_train_timesteps - 1
    seen = [f"{prompt}, {view}" for view in VIEWS for prompt in args.prompt] if args.view_prompts else args.prompt
    conditioning = encode_prompts(pipeline, seen, args.resolution)
    empty = encode_empty_prompt(pipeline, args.resolution)
    negative = encode_prompts(pipeline, [args.negative_prompt], args.resolution)
    latent = not volume and args.parameterization == "latent"
    if not latent:  # what a gradient goes through, or is taken from
        vae.to(torch.float32)
    encode = encode_images_with_gradient if args.pixel_gradient == "encoder" else encode_images

    # 2 trained, in fp32
    images = make_student(args, pipeline).to(run.device)
    parameters = trainable(images)
    ema = EMA(parameters, args.ema_decay, args.offload_ema)
    count = len(args.prompt) * args.num_images
    if learned:
        add_lora(teacher, args)
        score_parameters = trainable(teacher)
    set_up(teacher, args)

    # 3 optimizer, resume, data
    student, optimizer = accelerator.prepare(images, adamw(parameters, args))
    optimizer = optimizer.optimizer  # no network in half precision is between the loss and what is optimised
    trained, networks = {"student": parameters}, [student]
    if learned:
        own_adamw = adamw(score_parameters, args, args.score_learning_rate)
        score, score_optimizer = accelerator.prepare(teacher, own_adamw)
        trained["score"], networks = score_parameters, [student, score]
    run.register(trained, {"student": ema})
    share = args.gradient_accumulation_steps, accelerator.process_index, accelerator.num_processes
    sampler = GlobalBatchSampler(count, args.train_batch_size, *share, run.step, args.max_train_steps, args.seed)
    loader = iter(sampler)  # a sample is an image, or a view of a volume: each comes as often as the others

    while run.step < args.max_train_steps:
        learning_rate = set_learning_rate(optimizer, learning_rate_at(run.step, args))
        low, high = timestep_range(args, run.step, schedule)
        for samples in run.batches(loader):
            with accelerator.accumulate(*networks):
                places, _, positions = zip(*samples)
                indices = torch.tensor(places, device=run.device)
                drawn = draw(args, run.step, positions, shape, low, high, last)
                timesteps, noise, cameras = (x.to(run.device) for x in drawn)
                rows = indices // args.num_images

                # look
                opacity = torch.zeros((), device=run.device)
                if volume:
                    angles = angles_of(args, cameras)
                    made, opacity = look(args, student, indices, *angles, cameras[:, 2:])
                    rows = rows + view_of(*angles) * len(args.prompt) * args.view_prompts
                else:
                    made = student(indices)
                x = made if latent else encode(vae, made)

                # teach
                run.phase("teacher")
                given, others = conditioning.rows(rows), (side.expand(len(samples)) for side in (empty, negative))
                z = schedule.add_noise(x.detach(), noise[0], timesteps[0])
                with accelerator.autocast():
                    direction = teach(
                        args, teacher, schedule, z, timesteps[0], noise[0], given, *others, guidance_scale
                    )
                run.phase("student")
                if args.pixel_gradient == "decoder" and not latent:
                    direction = pixel_gradient(made.detach(), x.detach(), direction, timesteps[0], schedule, vae)
                else:
                    made = x
                gradient = timestep_weights(schedule, timesteps[0], args.weighting) * direction
                loss = distillation_loss(made, gradient)
                # Times the images: each has then its own gradient, whatever others are in the batch.
                (count * (loss + args.opacity_weight * opacity.mean()) / args.gradient_accumulation_steps).backward()
                run.add(loss=loss, **({"opacity": opacity.mean()} if volume else {}))
                clip(run, optimizer, parameters)
                update(run, optimizer, parameters, ema)

                # what the images' own noise looks like
                if learned:
                    z = schedule.add_noise(x.detach(), noise[1], timesteps[1])
                    with accelerator.autocast():
                        output = predict(score, z, timesteps[1], given)
                    loss = score_loss(output, x.detach(), noise[1], timesteps[1], schedule)
                    accelerator.backward(loss)
                    run.add(score_loss=loss)
                    clip(run, score_optimizer, score_parameters, "score")
                    update(run, score_optimizer, score_parameters, name="score")
        run.count(lr=learning_rate, highest_timestep=high)
        if run.validates():
            with ema.applied(parameters):
                show(run, pipeline, images)
        run.save()

    with ema.applied(parameters):
        figures = save_final(run, pipeline, images, judges, guidance_scale)
    run.end(*[f"{name}: {figures[name][0]:.3f}" for name in ("scene_accuracy", "clip_score") if name in figures])


if __name__ == "__main__":
    run_script(main, parse_args())
