"""Particles: what scores are distilled into, images or volumes; made from noise, looked at, written.

`args` are those of optimize_sds.py. A particle has its place among the prompts' images: place // --num_images is the
prompt's.
"""

import torch

from common.conditioning import decode_latents
from common.judging.previews import image_grid, log_images
from common.pipelines import latent_shape
from common.randomness import sample_generator
from common.sampling import default_batch_size
from common.volumes import Volumes, dense_points, write_ply

TURNS = 36  # frames of a turntable


class Images(torch.nn.Module):
    """N images, each a parameter of its own: latents, or pixels before the tanh. noise: what they start as."""

    def __init__(self, noise, pixels):
        super().__init__()
        self.values, self.pixels = torch.nn.Parameter(noise), pixels

    def forward(self, indices):
        """Latents (B, C, H / f, W / f), or pixels (B, 3, H, W) in [-1, 1], of images indices (B,)."""
        values = self.values[indices]
        return torch.tanh(values) if self.pixels else values


def make_student(args, pipeline):
    """What is optimised: Images, or Volumes, each from its own noise, by its place among the prompts' images."""
    if args.target == "volume":
        shape, size = (4, *[args.grid_size] * 3), 0.1
    elif args.parameterization == "pixels":
        shape, size = (3, args.resolution, args.resolution), 0.5
    else:
        shape, size = latent_shape(pipeline, args.resolution), 1.0
    generators = (
        sample_generator(args.seed, 0, place, stream="particles")
        for place in range(len(args.prompt) * args.num_images)
    )
    noise = size * torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    if args.target == "volume":
        return Volumes(noise, args.samples_per_ray, args.background == "learned")
    return Images(noise, args.parameterization == "pixels")


def angles_of(args, drawn):
    """Azimuths and elevations (B,), in degrees, of cameras drawn from 0 to 1 (B, 2 or more)."""
    spans = zip((args.azimuths, args.elevations), drawn.T)
    return [low + (high - low) * share for (low, high), share in spans]


def look(args, student, indices, azimuths, elevations, drawn=None):
    """(pixels (B, 3, R, R) at --resolution, opacity (B,)) of volumes indices (B,) from cameras (B,), in degrees.

    drawn: (B, 3) from 0 to 1, of a random background (default: white).
    """
    given = {"white": 1.0, "gray": 0.0, "black": -1.0, "random": 1.0}.get(args.background, 0.0)
    background = torch.full((len(indices), 3), given, device=indices.device)
    if args.background == "random" and drawn is not None:
        background = 2 * drawn - 1
    pixels, opacity = student(indices, azimuths, elevations, args.render_size, background)
    if args.render_size != args.resolution:
        pixels = torch.nn.functional.interpolate(pixels, (args.resolution,) * 2, mode="bilinear", align_corners=False)
    return pixels, opacity.mean(dim=(1, 2))


@torch.no_grad()
def pictures(args, pipeline, student, azimuth=0.0, elevation=0.0):
    """What there is, as PIL images: a list for each prompt. Volumes as seen from there."""
    count = len(args.prompt) * args.num_images
    made, places = [], torch.arange(count, device=pipeline.device)
    for indices in places.split(default_batch_size(args.resolution)):
        if args.target == "volume":
            angles = torch.tensor([[azimuth], [elevation]], device=indices.device).expand(2, len(indices))
            pixels = look(args, student, indices, *angles)[0]
        else:
            pixels = student(indices)
            pixels = pixels if student.pixels else decode_latents(pipeline.vae, pixels)
        made += pipeline.image_processor.postprocess(pixels, output_type="pil")
    return [made[start : start + args.num_images] for start in range(0, len(made), args.num_images)]


def show(run, pipeline, student):
    """samples/step-N.png and the trackers' picture, by the main process."""
    if run.accelerator.is_main_process:
        rows = pictures(run.args, pipeline, student)
        log_images(run.accelerator, run.folder, rows, run.args.prompt, run.step)
    run.accelerator.wait_for_everyone()


def save_volumes(args, pipeline, student, names, folder):
    """turntable.gif of all volumes, and <name>.ply of each: its dense points, coloured."""
    middle, frames = sum(args.elevations) / 2, []
    for turn in range(TURNS):
        frames.append(image_grid(pictures(args, pipeline, student, 360 / TURNS * turn, middle), args.prompt))
    frames[0].save(folder / "turntable.gif", save_all=True, append_images=frames[1:], duration=80, loop=0)
    (folder / "points").mkdir()
    for index, name in enumerate(names):
        write_ply(folder / "points" / f"{name}.ply", *dense_points(student, index))
