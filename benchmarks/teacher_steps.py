"""How far a teacher's few-step targets are from where its path really ends, by the timestep it starts from.

    python benchmarks/teacher_steps.py

From each of the student's timesteps the guided teacher goes to the clean latents in K steps and in --reference steps
of DDIM; printed is the relative RMS of the difference, over --samples renders of shapes. In "proportional" K is
that from the last timestep, and fewer from the others (--teacher_steps of train_flash_lora.py): the last column is the
mean number of passes. The two solvers make as many passes at equal K.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

from common import arguments  # noqa: E402
from common.conditioning import encode_empty_prompt, encode_images, encode_prompts, predict_guided  # noqa: E402
from common.contract import TINY_SD, read_distillation  # noqa: E402
from common.diffusion import NoiseSchedule, ddim_rollout, teacher_timesteps  # noqa: E402
from common.pipelines import load_pipeline  # noqa: E402
from common.randomness import sample_generator  # noqa: E402
from common.run import run_script  # noqa: E402
from common.shapes import caption_of, training_sample  # noqa: E402
from common.small_models import to_pixels  # noqa: E402


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", default=str(TINY_SD), help="teacher pipeline of 64-pixel shapes")
    add("--guidance_scale", type=arguments.weight, help="default: as it was saved, else 7.5")
    add("--timesteps", type=int, nargs="+", default=[999, 749, 499, 249], help="the student's")
    add("--num_ddim_steps", type=int, nargs="+", default=[4, 8, 16, 32], help="K")
    add("--reference", type=int, default=125, help="steps that are taken for the path itself")
    add("--samples", type=int, default=32, help="captions")
    return parser.parse_args(argv)


@torch.no_grad()
def main(args):
    pipeline = load_pipeline(args.pretrained_model_name_or_path)
    schedule = NoiseSchedule(pipeline.scheduler)
    guidance_scale = args.guidance_scale or read_distillation(args.pretrained_model_name_or_path)["guidance_scale"]
    images, scenes = zip(*(training_sample(0, index) for index in range(args.samples)))
    text = encode_prompts(pipeline, [caption_of(scene) for scene in scenes], 64)
    empty, latents = encode_empty_prompt(pipeline, 64), encode_images(pipeline.vae, to_pixels(images))
    noise = torch.stack(
        [torch.randn(latents.shape[1:], generator=sample_generator(0, 0, i)) for i in range(len(latents))]
    )

    def guided(z, timesteps, rows):
        return predict_guided(
            pipeline.unet, z, timesteps, text if rows is None else text.rows(rows), empty, guidance_scale
        )

    ways = [
        (solver, spread, k)
        for solver in ("ddim", "dpmsolver++")
        for k in args.num_ddim_steps
        for spread in (False, True)
    ]
    ways = [way for way in ways if not (way[1] and way[0] != "ddim")]
    found = {way: [] for way in ways}
    for start in tqdm(args.timesteps, desc="timesteps"):
        times = torch.full((len(latents),), start)
        z, ends = schedule.noisy_input(latents, noise, times), torch.full_like(times, -1)
        path = ddim_rollout(guided, schedule, z, times, ends, args.reference)
        for solver, spread, k in ways:
            end = ddim_rollout(guided, schedule, z, times, ends, k, spread, solver)
            found[solver, spread, k].append(float((end - path).square().mean().sqrt() / path.square().mean().sqrt()))
    heads = [*map(str, args.timesteps), "passes"]
    print("| solver | steps | " + " | ".join(heads) + " |\n|---|---|" + "---|" * len(heads))
    starts = torch.tensor(args.timesteps)
    for (solver, spread, k), errors in found.items():
        counted = schedule.num_train_timesteps if spread else None
        grid = teacher_timesteps(starts, torch.full_like(starts, -1), k, counted)
        passes = float((grid.diff(dim=0) < 0).sum(0).float().mean())
        kind = f"{k}, {'proportional' if spread else 'even'}"
        print(f"| {solver} | {kind} | " + " | ".join(f"{error:.3f}" for error in errors) + f" | {passes:.2f} |")


if __name__ == "__main__":
    run_script(main, parse_args())
