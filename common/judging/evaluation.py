"""Evaluation during training: a model generates for fixed captions, and the judges of metrics.py score it.

No image is written, and training is not disturbed: image i starts from the noise of (seed, i), and no global random
number is drawn. Every process generates its share; the main one judges.
"""

import argparse
from pathlib import Path

import torch

from common import shapes
from common.conditioning import decode_latents
from common.data import read_data
from common.errors import DataError, UsageError
from common.frozen import gathered
from common.identity import judges_of
from common.judging import metrics
from common.judging.image_sets import real_dataset, real_shapes, sharded
from common.judging.results import load_judges
from common.randomness import sample_generator

BATCH = 16  # images per forward
SPLIT = "choose"  # of the held-out shapes: the best checkpoint is chosen here, and must not be judged on the same ones
# What decides the best, the first that was measured; 1: higher is better. The reader judges shapes without a CLIP too.
METRICS = {"fid": -1, "frechet_clip": -1, "lpips_teacher": -1, "clip_score": 1, "scene_accuracy": 1}


class Evaluation:
    """Captions, references and judges, loaded once. Raises UsageError where one that was asked for does not load.

    args: --eval_data_dir (None: the held-out shapes to choose by), --num_eval_images, --clip_model (None: tiny-clip
    for shapes, else none), --inception_path and --lpips_trunk_path (None: no FID, no LPIPS), resolution and seed.
    Only the main process holds judges and references.
    """

    def __init__(self, args, accelerator):
        self.seed, self.resolution, self.count = args.seed, args.resolution, args.num_eval_images
        self.clip = self.inception = self.lpips = self.reader = self.teacher_images = None
        self.references = {}
        if args.eval_data_dir is None:
            self.captions, real = shapes.held_out_captions(self.count, SPLIT), real_shapes(self.count, SPLIT)
        else:
            held_out = {
                "data_dir": args.eval_data_dir,
                "dataset_name": None,
                "max_train_samples": self.count,
                "center_crop": True,
                "random_flip": False,
                "aspect_ratio_buckets": False,
                "streaming": False,
                "shard_index": None,
            }
            try:
                dataset = read_data(argparse.Namespace(**{**vars(args), **held_out}))
            except DataError as error:
                raise UsageError(str(error).replace("--data_dir", "--eval_data_dir")) from None
            self.captions = [dataset.captions(index)[0] for index in range(len(dataset))]
            real = real_dataset(dataset, len(dataset))
        self.count = len(self.captions)
        if not accelerator.is_main_process:
            return
        self.judges = {**judges_of(args), "held_out_split": SPLIT if args.eval_data_dir is None else None}
        self.clip, self.reader = load_judges(args.clip_model, None, self.captions, accelerator.device)
        if args.inception_path:
            self.inception = metrics.load_inception(args.inception_path).to(accelerator.device)
        if args.lpips_trunk_path:
            self.lpips = metrics.load_lpips(args.lpips_trunk_path).to(accelerator.device)
        batches = [range(start, min(start + BATCH, self.count)) for start in range(0, self.count, BATCH)]
        for name, features in self._networks():
            parts = [features(torch.stack([real.read(index) for index in batch])) for batch in batches]
            self.references[name] = torch.cat(parts)

    def _networks(self):
        """(metric, pixels to features) of the feature networks there are: only Inception's distance is called FID."""
        found = []
        if self.inception is not None:
            found.append(("fid", lambda pixels: metrics.inception_features(self.inception, pixels)))
        if self.clip is not None:
            found.append(("frechet_clip", self.clip.pooled_features))
        return found

    def images(self, accelerator, pipeline, scheduler, num_inference_steps, guidance_scale):
        """Pixels (N, 3, R, R) in [-1, 1] of all captions on the CPU of every process. Every rank must call it."""

        def generate(batch):
            latents = pipeline(
                [self.captions[index] for index in batch],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                height=self.resolution,
                width=self.resolution,
                generator=[sample_generator(self.seed, index, 0, stream="evaluation") for index in batch],
                output_type="latent",
            ).images
            with torch.autocast(latents.device.type, enabled=False):  # SDXL's VAE overflows in half precision
                pixels = decode_latents(pipeline.vae, latents)
            return {"pixels": ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()}

        own_scheduler, pipeline.scheduler = pipeline.scheduler, scheduler
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), gathered(pipeline):
                pixels = sharded(accelerator, self.count, BATCH, generate, "evaluation")["pixels"]
        finally:
            pipeline.scheduler = own_scheduler
        return pixels.float() / 127.5 - 1

    def report(self, accelerator, pixels, step):
        """judge, printed in one line and given to the trackers as eval_<metric>. Main process."""
        figures = self.judge(pixels)
        accelerator.log({f"eval_{name}": value for name, value in figures.items()}, step=step)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        print(f"Evaluation at step {step}: {shown}.", flush=True)
        return figures

    def judge(self, pixels):
        """{metric: float} of images of all captions; with a LPIPS, `teacher_images` must be there. Main process."""
        figures = {}
        for name, features in self._networks():
            found = features(pixels)
            figures[name] = metrics.frechet_distance(self.references[name], found)
            if name == "frechet_clip":
                judged = metrics.clip_figures(self.clip, found, self.captions)
                figures.update({metric: values.float().mean().item() for metric, values in judged.items()})
        if self.reader is not None:
            read = metrics.read_back(self.reader, pixels, self.captions)
            figures.update({name: right.float().mean().item() for name, right in read.items()})
        if self.lpips is not None:
            device, distances = next(self.lpips.parameters()).device, []
            for part, other in zip(pixels.split(BATCH), self.teacher_images.split(BATCH)):
                with torch.no_grad():
                    distances.append(self.lpips(part.to(device), other.to(device)).flatten().cpu())
            figures["lpips_teacher"] = torch.cat(distances).mean().item()
        return figures


def check_evaluation(args):
    """Refuse, before anything is loaded, an evaluation that can't work or would have nothing to say."""
    if args.eval_steps is None:
        return
    drawn = args.dataset_name == "shapes"
    if args.eval_data_dir is None and not drawn:
        raise UsageError("--eval_steps needs --eval_data_dir: images with captions that are not trained on.")
    if args.num_eval_images < 2:
        raise UsageError("--num_eval_images 1 is not enough: a Fréchet distance needs two images.")
    if args.eval_data_dir is None:
        shapes.check_count("--num_eval_images", args.num_eval_images, SPLIT)
    if args.eval_data_dir is not None and not Path(args.eval_data_dir).exists():
        raise UsageError(f"--eval_data_dir {args.eval_data_dir}: there is no such file.")
    shapes_clip = args.clip_model is None and args.eval_data_dir is None  # tiny-clip judges by default
    clip = shapes_clip or args.clip_model not in (None, "none")
    if not (clip or args.inception_path or args.lpips_trunk_path):
        raise UsageError("--eval_steps has no judge: give --clip_model, --inception_path or --lpips_trunk_path.")


def better(best, figures, step, judges=None):
    """`best` ({"metric", "value", "step", "judges"} or None), or these figures of `step` where they are better.

    The first of METRICS that was measured decides; where none was, nothing is better. A run resumed with other
    `judges` (identity.judges_of) starts to compare anew.
    """
    metric = next((name for name in METRICS if name in figures), None)
    if metric is None:
        return best
    value = figures[metric]
    comparable = best is not None and (best["metric"], best.get("judges", judges)) == (metric, judges)
    if comparable and METRICS[metric] * (value - best["value"]) <= 0:
        return best
    return {"metric": metric, "value": value, "step": step, "judges": judges}
