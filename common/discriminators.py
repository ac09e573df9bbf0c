"""Discriminators of train_add.py: frozen networks that give features, and the small trained heads that judge them.

Features are lists of (B, C, H, W) in fp32, one for each depth. The networks are frozen, but gradients flow through
them to what they look at: that is how the student learns.
"""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import nn
from torch.nn.functional import interpolate
from transformers import AutoConfig, Dinov2Model

from common.conditioning import decode_latents, predict
from common.diffusion import NoiseSchedule
from common.errors import ModelError
from common.hooks import FeatureTap
from common.pipelines import load_whole

R1_SIGMA = 0.01  # of the noise that R1 by finite differences adds to the features


class UNetFeatures:
    """What the encoder half of a frozen UNet, down blocks and mid block, makes of noisy latents and captions."""

    width = 0  # of an image embedding: it gives none

    def __init__(self, unet):
        self.unet = unet
        self.names = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
        self.channels = [*unet.config.block_out_channels]
        if unet.mid_block is not None:  # the smaller BK-SDM UNets have none
            self.names.append("mid_block")
            self.channels.append(unet.config.block_out_channels[-1])

    def __call__(self, z, timesteps, conditioning):
        """Features of z (B, C, H, W) at timesteps, long (B,). The decoder half is not computed."""

        def stop(module, inputs, output):
            raise _Reached

        with FeatureTap(self.unet, self.names) as tap:
            handle = self.unet.get_submodule(self.names[-1]).register_forward_hook(stop)
            try:
                predict(self.unet, z, timesteps, conditioning)
            except _Reached:
                pass
            finally:
                handle.remove()
        return [tap.features[name].float() for name in self.names]


class _Reached(Exception):
    """The last features are there."""


class Dinov2Features:
    """What a frozen DINOv2 makes of images: the patch tokens at four depths, as maps, and the last CLS embedding.

    Raises ModelError, in one sentence naming --feature_model_name_or_path, where there is no DINOv2 at the path.
    """

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in DINOv2's image processor
    depths = 4

    def __init__(self, path, resolution, device, dtype):
        where = f"--feature_model_name_or_path {path}"
        self.model = load_whole(Dinov2Model, path, where, dtype=dtype)
        self.model.to(device).requires_grad_(False)
        config = self.model.config
        self.patch, self.resolution, self.width = config.patch_size, resolution, config.hidden_size
        layers = config.num_hidden_layers
        self.layers = sorted({max(round(layers * (i + 1) / self.depths), 1) for i in range(self.depths)})
        self.channels = [config.hidden_size] * len(self.layers)

    @staticmethod
    def check(path, resolution):
        """Read its config alone, before anything is loaded."""
        where = f"--feature_model_name_or_path {path}"
        try:
            config = AutoConfig.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ModelError(f"{where}: there is no model ({str(error).splitlines()[0]})") from None
        if config.model_type != "dinov2":
            raise ModelError(f"{where}: it is a {config.model_type}, not a dinov2.")
        if resolution % config.patch_size:
            raise ModelError(
                f"--feature_resolution {resolution} is not a multiple of {config.patch_size}, the "
                "patches of --feature_model_name_or_path."
            )

    def __call__(self, pixels):
        """(features, CLS embedding (B, D)) of pixels (B, 3, H, W) in [-1, 1], resized to the network's resolution."""
        size, places = (self.resolution, self.resolution), self.resolution // self.patch
        mean, std = (pixels.new_tensor(x).view(3, 1, 1) for x in (self.mean, self.std))
        pixels = interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
        output = self.model(((pixels + 1) / 2 - mean).div(std).to(self.model.dtype), output_hidden_states=True)
        tokens = [output.hidden_states[layer][:, 1:].float() for layer in self.layers]
        maps = [x.transpose(1, 2).unflatten(2, (places, places)) for x in tokens]
        return maps, output.last_hidden_state[:, 0].float()


@dataclass
class Sight:
    """What looks at clean latents for the heads: a frozen network, and what brings latents before it."""

    network: UNetFeatures | Dinov2Features
    schedule: NoiseSchedule
    vae: AutoencoderKL
    accelerator: Accelerator

    def look(self, x, noise, timesteps, conditioning):
        """(features, CLS embedding or None) of clean latents x (B, C, H, W): re-noised to timesteps (B,), or decoded.

        Real latents are decoded as the student's are, so that the VAE's traces tell nothing.
        """
        if isinstance(self.network, UNetFeatures):
            with self.accelerator.autocast():
                return self.network(self.schedule.add_noise(x, noise, timesteps), timesteps, conditioning), None
        pixels = decode_latents(self.vae, x)  # SDXL's VAE, in fp32, must stay so
        with self.accelerator.autocast():
            return self.network(pixels)


def make_sight(args, run, pipeline, schedule):
    """The Sight of --discriminator: with the UNet that the pipeline now holds, or with DINOv2."""
    if args.discriminator == "unet":
        network = UNetFeatures(pipeline.unet)
    else:
        network = Dinov2Features(args.feature_model_name_or_path, args.feature_resolution, run.device, run.dtype)
    if args.gradient_checkpointing:  # the student's gradient also runs through what is looked with
        (pipeline.unet if args.discriminator == "unet" else pipeline.vae).enable_gradient_checkpointing()
    return Sight(network, schedule, pipeline.vae, run.accelerator)


class ProjectionHead(nn.Module):
    """Scores (B, H W) of features (B, C, H, W) and a condition (B, D), at every place (Miyato, arXiv:1802.05637).

    score = w.h + <P condition, h> / sqrt(width), with h of two small convolutions.
    """

    def __init__(self, channels, condition_dim, width=64):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(1, channels),
            nn.Conv2d(channels, width, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.score = nn.Conv2d(width, 1, 1)
        self.project = nn.Linear(condition_dim, width)

    def forward(self, features, condition):
        hidden = self.body(features)
        match = (self.project(condition)[:, :, None, None] * hidden).sum(1, keepdim=True)
        return (self.score(hidden) + match / math.sqrt(hidden.shape[1])).flatten(1)


class Heads(nn.Module):
    """A ProjectionHead for each depth; gives the list of their scores. In fp32 whatever autocast says."""

    def __init__(self, channels, condition_dim):
        super().__init__()
        self.heads = nn.ModuleList(ProjectionHead(count, condition_dim) for count in channels)

    def forward(self, features, condition):
        with torch.autocast(condition.device.type, enabled=False):
            return [head(x, condition) for head, x in zip(self.heads, features, strict=True)]


def make_heads(sight, unconditional):
    """The Heads of what the sight sees, conditioned on captions (of which one is given) and on its image embedding."""
    return Heads(sight.network.channels, text_condition(unconditional).shape[1] + sight.network.width)


def text_condition(conditioning):
    """(B, D) of a caption: its pooled embedding where there is one (SDXL), else the mean of its tokens' embeddings."""
    pooled = conditioning.pooled_prompt_embeds
    return (conditioning.prompt_embeds.mean(dim=1) if pooled is None else pooled).float()


def head_condition(conditioning, image_embedding, pure):
    """What the discriminator's heads are conditioned on (B, D): the caption and, with DINOv2, the real image's CLS
    embedding, but not where the student started from pure noise (B,), which says nothing of the image."""
    text = text_condition(conditioning)
    if image_embedding is None:
        return text
    return torch.cat([text, image_embedding * ~pure[:, None]], dim=1)


def swapped_captions(captions, device):
    """Indices (B,) that give positions 2 i and 2 i + 1 each other's caption, and where these differ (B,).

    The two share a micro-batch however a batch is split."""
    neighbours = torch.arange(len(captions), device=device) ^ 1
    differ = [captions[i] != captions[i ^ 1] for i in range(len(captions))]
    return neighbours, torch.tensor(differ, device=device)


@dataclass
class Seen:
    """What the heads see of a micro-batch: features, lists of (B, C, H, W), and conditions (B, D)."""

    real: list
    fake: list  # with its gradient, where the student has one
    condition: torch.Tensor
    mismatched: list | None = None  # real, under the captions of neighbours
    other_condition: torch.Tensor | None = None
    differ: torch.Tensor | None = None  # (B,): where the two captions are not the same


def see(sight, timesteps, fake_noise, real_noise, real, fake, conditioning, pure, captions=None):
    """What is Seen of real and fake clean latents (B, C, H, W), re-noised to timesteps (B,) by noise of their own.

    pure (B,): where the student started from pure noise. With captions, a list, real latents are also seen under the
    caption of a neighbour. Only fake ones keep a gradient.
    """
    with torch.no_grad():
        features, image_embedding = sight.look(real, real_noise, timesteps, conditioning)
    with torch.set_grad_enabled(fake.requires_grad):
        fake_features, _ = sight.look(fake, fake_noise, timesteps, conditioning)
    seen = Seen(features, fake_features, head_condition(conditioning, image_embedding, pure))
    if captions:
        neighbours, seen.differ = swapped_captions(captions, real.device)
        other = conditioning.rows(neighbours)
        seen.other_condition = head_condition(other, image_embedding, pure)
        seen.mismatched = features  # DINOv2 reads no captions; the UNet reads them itself
        if isinstance(sight.network, UNetFeatures):
            with torch.no_grad():
                seen.mismatched, _ = sight.look(real, real_noise, timesteps, other)
    return seen


def scores_for_student(plain_heads, seen):
    """D(x^), a list of (B, places), whose backward leaves the heads untouched: frozen, and not through DDP."""
    plain_heads.requires_grad_(False)
    scores = plain_heads(seen.fake, seen.condition)
    plain_heads.requires_grad_(True)
    return scores


def r1_penalty(scores, features):
    """E|grad D(x)|^2 with respect to the features that the heads saw, summed over heads, by autograd. Scalar."""
    gradients = torch.autograd.grad([x.sum() for x in scores], features, create_graph=True)
    return torch.stack([gradient.square().flatten(1).sum(1) for gradient in gradients]).sum(0).mean()


def r1_finite_difference(scores, perturbed_scores, sigma=R1_SIGMA):
    """The same to first order, without a second backward: E[(D(x + sigma n) - D(x))^2] / sigma^2 with n ~ N(0, I)."""
    return torch.stack([(b - a).sum(1).square() for a, b in zip(scores, perturbed_scores)]).sum(0).mean() / sigma**2


def judge(heads, real, fake, condition, r1_form=None, noise=None, mismatched=None, other_condition=None):
    """(scores of real, of fake, of mismatched or None, R1) in ONE forward of the heads, which is what DDP can follow.

    real, fake, mismatched: features, lists of (B, C, H, W) without gradient; condition of the first two and
    other_condition of the last (B, D); scores are lists of (B, places); R1 by "autograd", by "finite_difference" with
    noise like real, or, without a form, 0.
    """
    parts, conditions = [real, fake], [condition, condition]
    if mismatched is not None:
        parts.append(mismatched)
        conditions.append(other_condition)
    if r1_form == "finite_difference":
        parts.append([x + R1_SIGMA * n for x, n in zip(real, noise)])
        conditions.append(condition)
    elif r1_form == "autograd":
        parts[0] = [x.detach().requires_grad_() for x in real]
    scores = heads([torch.cat(depth) for depth in zip(*parts)], torch.cat(conditions))
    real_scores, fake_scores, *more = zip(*(x.chunk(len(parts)) for x in scores))
    mismatched_scores = None if mismatched is None else more.pop(0)
    r1 = condition.new_zeros(())
    if r1_form == "autograd":
        r1 = r1_penalty(real_scores, parts[0])
    elif r1_form == "finite_difference":
        r1 = r1_finite_difference(real_scores, more[0])
    return real_scores, fake_scores, mismatched_scores, r1
