"""What half precision does to the small difference that a consistency model learns from.

    python benchmarks/precision.py

At timesteps of train_lcm.py's grid of 50, on --samples renders of shapes: how far the ends of the path from a point
and from its neighbour, one guided teacher step on, lie apart by the teacher itself (what LCM's loss is made of), and
what the same UNet in bf16 and in fp16 says otherwise than in fp32. All are the root mean square over clean latents.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from common import arguments  # noqa: E402
from common.conditioning import encode_empty_prompt, encode_images, encode_prompts, predict, predict_guided  # noqa: E402
from common.contract import TINY_SD, read_distillation  # noqa: E402
from common.diffusion import NoiseSchedule  # noqa: E402
from common.pipelines import load_pipeline  # noqa: E402
from common.randomness import sample_generator  # noqa: E402
from common.run import run_script  # noqa: E402
from common.shapes import caption_of, training_sample  # noqa: E402
from common.small_models import to_pixels  # noqa: E402


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    add = parser.add_argument
    add("--timesteps", type=int, nargs="+", default=[979, 739, 499, 259], help="of the grid")
    add("--samples", type=int, default=32, help="captions")
    return parser.parse_args(argv)


@torch.no_grad()
def main(args):
    pipeline = load_pipeline(TINY_SD)
    schedule, scale = NoiseSchedule(pipeline.scheduler), read_distillation(TINY_SD)["guidance_scale"]
    images, scenes = zip(*(training_sample(0, index) for index in range(args.samples)))
    text = encode_prompts(pipeline, [caption_of(scene) for scene in scenes], 64)
    empty, latents = encode_empty_prompt(pipeline, 64), encode_images(pipeline.vae, to_pixels(images))
    noise = [torch.randn(latents.shape[1:], generator=sample_generator(0, 0, i)) for i in range(args.samples)]
    halves = {dtype: load_pipeline(TINY_SD, dtype).unet for dtype in (torch.bfloat16, torch.float16)}

    def ends(unet, z, times, dtype=torch.float32):
        return schedule.to_x0(predict(unet, z, times, text.to(dtype)), z, times)

    print("| timestep | between neighbours | bf16 | fp16 |\n|---|---|---|---|")
    for timestep in args.timesteps:
        times = torch.full((args.samples,), timestep)
        z = schedule.add_noise(latents, torch.stack(noise), times)
        output = predict_guided(pipeline.unet, z, times, text, empty, scale)
        z_next = schedule.ddim_step(output, z, times, times - 20)
        own = ends(pipeline.unet, z, times)
        found = [own - ends(pipeline.unet, z_next, times - 20)]
        for dtype, unet in halves.items():
            found.append(own - ends(unet, z, times, dtype))
        print(f"| {timestep} | " + " | ".join(f"{error.square().mean().sqrt():.4f}" for error in found) + " |")


if __name__ == "__main__":
    run_script(main, parse_args())
