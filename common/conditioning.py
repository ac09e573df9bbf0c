"""Conditioning: encode prompts as the stock pipeline does, predict with one UNet forward, guide in one batched one.

The pipeline's own `encode_prompt` encodes, so that training and stock inference see the same embeddings. Latents are
scaled, (B, C, H / f, W / f), in fp32.
"""

from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLPipeline

MAX_PIXELS = 2**20  # that a VAE has at once: one image of 1024 x 1024, four of 512 x 512


@dataclass
class Conditioning:
    """What the UNet gets beside latents and timesteps: (B, L, D), and for SDXL (B, P) and (B, 6)."""

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    def to(self, *args, **options):
        return Conditioning(*(None if x is None else x.to(*args, **options) for x in self._tensors()))

    def expand(self, batch_size):
        """One row repeated to a batch."""
        return Conditioning(*(None if x is None else x.expand(batch_size, *x.shape[1:]) for x in self._tensors()))

    def where(self, mask, other):
        """This, with the rows of `other` where mask (B,) is true."""
        pairs = zip(self._tensors(), other._tensors())
        return Conditioning(
            *(None if a is None else torch.where(mask.view(-1, *[1] * (a.dim() - 1)), b, a) for a, b in pairs)
        )

    def rows(self, order):
        """These rows: order is long (B,)."""
        return Conditioning(*(None if x is None else x[order] for x in self._tensors()))

    def cat(self, other):
        pairs = zip(self._tensors(), other._tensors())
        return Conditioning(*(None if a is None else torch.cat([a, b]) for a, b in pairs))

    def _tensors(self):
        return (self.prompt_embeds, self.pooled_prompt_embeds, self.time_ids)


def is_sdxl(pipeline):
    return isinstance(pipeline, StableDiffusionXLPipeline)


@torch.no_grad()
def encode_prompts(pipeline, captions, resolution, time_ids=None):
    """Conditioning of a list of captions, by the pipeline's own encode_prompt, without guidance; of each one once.

    time_ids: SDXL's (B, 6), of images with a size and crop of their own.
    """
    device, distinct = pipeline.unet.device, list(dict.fromkeys(captions))
    if not is_sdxl(pipeline):
        found = Conditioning(pipeline.encode_prompt(distinct, device, 1, do_classifier_free_guidance=False)[0])
    else:
        # One by one on a CPU, whose products of few rows, the pooled ones, depend on how many there are.
        parts = [[caption] for caption in distinct] if device.type == "cpu" else [distinct]
        found = [pipeline.encode_prompt(part, device=device, do_classifier_free_guidance=False) for part in parts]
        found = Conditioning(*(torch.cat([encoded[place] for encoded in found]) for place in (0, 2)))
    if len(distinct) < len(captions):
        numbers = {caption: number for number, caption in enumerate(distinct)}
        found = found.rows(torch.tensor([numbers[caption] for caption in captions]).to(device, non_blocking=True))
    return _with_time_ids(found, resolution, time_ids)


@torch.no_grad()
def encode_empty_prompt(pipeline, resolution):
    """The unconditional row (B = 1) that the stock pipeline guides with: SDXL base uses zeros, the others ''."""
    device = pipeline.unet.device
    if not is_sdxl(pipeline):
        return Conditioning(pipeline.encode_prompt([""], device, 1, do_classifier_free_guidance=True)[1])
    _, embeds, _, pooled = pipeline.encode_prompt([""], device=device, do_classifier_free_guidance=True)
    return _with_time_ids(Conditioning(embeds, pooled), resolution)


def _with_time_ids(conditioning, resolution, time_ids=None):
    """With SDXL's micro-conditioning: original size, crop corner, target size; by default nothing was cut off."""
    pooled = conditioning.pooled_prompt_embeds
    if pooled is None:
        return conditioning
    if time_ids is None:
        time_ids = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]]).expand(len(pooled), 6)
    time_ids = time_ids.to(pooled.device, non_blocking=True).to(pooled.dtype)
    return Conditioning(conditioning.prompt_embeds, pooled, time_ids)


def conditioning_of(pipeline, batch, resolution):
    """Conditioning of a training batch: its captions encoded, or the embeddings that it has of them from a cache."""
    if "prompt_embeds" not in batch:
        return encode_prompts(pipeline, batch["captions"], resolution, batch.get("time_ids"))
    names = ("prompt_embeds", "pooled_prompt_embeds")
    device = pipeline.unet.device
    found = (batch[name].to(device, non_blocking=True) if name in batch else None for name in names)
    return _with_time_ids(Conditioning(*found), resolution, batch.get("time_ids"))


def unconditional_of(pipeline, dataset, resolution):
    """encode_empty_prompt, or what the dataset, where it is a cache, has of it."""
    cached = getattr(dataset, "unconditional", None)
    if cached is None:
        return encode_empty_prompt(pipeline, resolution)
    return _with_time_ids(cached.to(pipeline.unet.device), resolution)


def latents_of(pipeline, batch):
    """Scaled latents of a training batch, fp32: its images encoded, or those that it has of them from a cache.

    Of roll-outs without images those where they end.
    """
    if "pixel_values" in batch:
        return encode_images(pipeline.vae, batch["pixel_values"])
    return batch["latents" if "latents" in batch else "target"].to(pipeline.unet.device, non_blocking=True)


def predict(unet, z, timesteps, conditioning, timestep_cond=None):
    """One UNet forward. z (B, C, H, W) fp32, timesteps long (B,). Returns the model output in fp32."""
    dtype = conditioning.prompt_embeds.dtype
    added = None
    if conditioning.pooled_prompt_embeds is not None:
        added = {"text_embeds": conditioning.pooled_prompt_embeds, "time_ids": conditioning.time_ids}
    output = unet(
        z.to(dtype),
        timesteps,
        encoder_hidden_states=conditioning.prompt_embeds,
        added_cond_kwargs=added,
        timestep_cond=timestep_cond,
        return_dict=False,
    )[0]
    return output.float()


def predict_guided(unet, z, timesteps, conditioning, unconditional, guidance_scale):
    """Classifier-free guidance, eps_u + w (eps_c - eps_u), in ONE batched forward. `unconditional` has one row.

    guidance_scale: one number, or a tensor (B,) with one for each sample.
    """
    if isinstance(guidance_scale, torch.Tensor):
        guidance_scale = guidance_scale.view(-1, 1, 1, 1)
    elif guidance_scale == 1:
        return predict(unet, z, timesteps, conditioning)
    both = unconditional.expand(len(z)).cat(conditioning)
    output = predict(unet, torch.cat([z, z]), torch.cat([timesteps, timesteps]), both)
    without, given = output.chunk(2)
    return without + guidance_scale * (given - without)


def guidance_embedding(pipeline, guidance_scales, unet):
    """What the stock pipeline gives such a UNet for guidance scales (B,): a sinusoid of 1000 (w - 1), (B, dim)."""
    dim = unet.config.time_cond_proj_dim
    return pipeline.get_guidance_scale_embedding(guidance_scales.cpu() - 1, dim).to(unet.device)


@torch.no_grad()
def encode_images(vae, pixel_values):
    """Scaled latents (B, C, H / f, W / f), fp32, of pixels in [-1, 1]: the posterior's mean, so nothing is drawn.

    In chunks, of large images one by one; on a CPU always: a sample's latents are then the same in any batch.
    """
    device = vae.device
    chunk = 1 if device.type == "cpu" else max(1, MAX_PIXELS // pixel_values[0, 0].numel())
    # Moved first, and cast there: half as much to do for the CPU, and pinned memory is copied in the background.
    pixel_values = pixel_values.to(device, non_blocking=True)
    return torch.cat([encode_images_with_gradient(vae, pixels) for pixels in pixel_values.split(chunk)])


def encode_images_with_gradient(vae, pixel_values):
    """encode_images, for pixels that are optimised."""
    latents = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist.mode()
    shift = vae.config.get("shift_factor") or 0.0
    return (latents.float() - shift) * vae.config.scaling_factor


def decode_latents(vae, latents):
    """Pixels (B, 3, H, W) in about [-1, 1], fp32, of scaled latents; large images one by one."""
    shift = vae.config.get("shift_factor") or 0.0
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    chunk = max(1, MAX_PIXELS // (latents[0, 0].numel() * factor**2))
    latents = (latents / vae.config.scaling_factor + shift).to(vae.dtype)
    return torch.cat([vae.decode(part, return_dict=False)[0].float() for part in latents.split(chunk)])
