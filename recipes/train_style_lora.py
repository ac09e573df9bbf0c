"""Fine-tune a LoRA on images of one style: the plain diffusion loss, no teacher.

For a LoRA to test compressed models with (docs/loras.md), on any pipeline; --recolor gives the embedded renders a
style that no caption speaks of:

    L = |o(z_t, t, caption) - target|^2        target: the noise or v, whichever the model predicts

    accelerate launch recipes/train_style_lora.py
    accelerate launch recipes/train_style_lora.py --data_dir paintings --recolor none \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed_precision bf16

Run the same command with --resume_from_checkpoint latest to go on after a stop. Writes
<output_dir>/[<run_name>/]checkpoint-N/ and final/, which `pipe.load_lora_weights` opens.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import arguments
from common.conditioning import encode_images, encode_prompts, predict
from common.contract import STEPS, make_contract, read_teacher
from common.data import load_dataset_from_args
from common.diffusion import NoiseSchedule
from common.ema import EMA
from common.errors import UsageError
from common.frozen import load_frozen
from common.judging.previews import preview
from common.loader import build_dataloader
from common.lora import student_unet, trainable
from common.optimization import adamw, clip, learning_rate_at, set_learning_rate, update
from common.outputs import export, save_student
from common.pipelines import set_up
from common.preflight import preflight
from common.randomness import sample_generator
from common.run import open_run, run_script
from common.schedulers import ddim_scheduler
from common.settle import settle

TINT = (1.0, 0.75, 0.45)  # what sepia multiplies gray by


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    arguments.add_model_arguments(parser)
    arguments.add_data_arguments(parser, cached=False)
    add = parser.add_argument_group("method").add_argument
    add(
        "--recolor",
        choices=("inverted", "sepia", "none"),
        default="inverted",
        help="what is done to the images' colours first; none: the images have a style of their own",
    )
    arguments.add_lora_arguments(parser, lora_rank=8)
    arguments.add_optimization_arguments(parser, learning_rate=2e-3, train_batch_size=32, max_train_steps=300)
    arguments.add_checkpoint_arguments(parser, output_dir="outputs/style_lora")
    arguments.add_validation_arguments(parser)
    arguments.add_runtime_arguments(parser)
    return parser.parse_args(argv)


def recolored(pixels, recolor):
    """Images (B, 3, H, W) in [-1, 1] in the style's colours."""
    if recolor == "inverted":
        return -pixels
    if recolor == "sepia":
        gray = (pixels.mean(1, keepdim=True) + 1) / 2
        return 2 * gray * torch.tensor(TINT, device=pixels.device).view(1, 3, 1, 1) - 1
    return pixels


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work."""
    if args.recolor == "none" and args.data_dir is None and args.dataset_name in (None, "shapes"):
        raise UsageError("--recolor none: rendered shapes have no style of their own; give --data_dir or a --recolor.")


def draw(args, step, positions, latents, num_train_timesteps):
    """Per-sample randomness by global position: noise like latents, and timesteps (B,)."""
    noise, timesteps = [], []
    for position in positions:
        generator = sample_generator(args.seed, step, position)
        timesteps.append(torch.randint(num_train_timesteps, (), generator=generator))
        noise.append(torch.randn(latents.shape[1:], generator=generator))
    return torch.stack(noise).to(latents.device), torch.stack(timesteps).to(latents.device)


def main(args):
    check_arguments(args)
    settle(args)
    saved = read_teacher(args, guidance=("cfg",))
    dataset = load_dataset_from_args(args)
    watch = preflight(args, dataset)
    run = open_run(args, watch)
    accelerator = run.accelerator

    # 1 frozen models, in the compute dtype
    pipeline = load_frozen(args, run)
    schedule = NoiseSchedule(pipeline.scheduler, run.device)
    scheduler = ddim_scheduler(pipeline.scheduler, STEPS)
    contract = make_contract(args, "style_lora", None, guidance="cfg", guidance_scale=saved["guidance_scale"])

    # 2 trained, in fp32
    unet = student_unet(args, pipeline)
    set_up(unet, args)
    parameters = trainable(unet)
    ema = EMA(parameters, args.ema_decay)

    # 3 optimizer, resume, data
    student, optimizer = accelerator.prepare(unet, adamw(parameters, args))
    run.register({"student": parameters}, {"student": ema})
    loader = iter(build_dataloader(dataset, args, accelerator, run.step))

    while run.step < args.max_train_steps:
        learning_rate = set_learning_rate(optimizer, learning_rate_at(run.step, args))
        for batch in run.batches(loader):
            with accelerator.accumulate(student):
                conditioning = encode_prompts(pipeline, batch["captions"], args.resolution)
                latents = encode_images(pipeline.vae, recolored(batch["pixel_values"], args.recolor))
                noise, timesteps = draw(args, batch["step"], batch["positions"], latents, schedule.num_train_timesteps)
                z = schedule.noisy_input(latents, noise, timesteps)
                run.phase("student")
                with accelerator.autocast():
                    output = predict(student, z, timesteps, conditioning)
                loss = (output - schedule.target(latents, noise, timesteps)).square().mean()
                accelerator.backward(loss)
                run.add(loss=loss)
                clip(run, optimizer, parameters)
                update(run, optimizer, parameters, ema)
        run.count(lr=learning_rate)
        if run.validates():
            with ema.applied(parameters):
                preview(run, pipeline, scheduler, contract)
        run.save()

    notes = {"method": "diffusion loss on images of one style", "colours": args.recolor}
    with ema.applied(parameters):
        save_student(run, {"unet": unet}, scheduler, contract, "Style LoRA", notes)
    export(run)
    run.end()


if __name__ == "__main__":
    run_script(main, parse_args())
