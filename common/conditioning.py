"""Conditioning: encode prompts as the stock pipeline does, predict with one UNet forward, guide in one batched one.

The pipeline's own `encode_prompt` encodes, so that training and stock inference see the same embeddings. Latents are
scaled, (B, C, H / f, W / f), in fp32.
"""

from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLPipeline


@dataclass
class Conditioning:
    """What the UNet gets beside latents and timesteps: (B, L, D), and for SDXL (B, P) and (B, 6)."""

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    def to(self, *args):
        return Conditioning(*(None if x is None else x.to(*args) for x in self._tensors()))

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
def encode_prompts(pipeline, captions, resolution):
    """Conditioning of a list of captions, by the pipeline's own encode_prompt, without guidance."""
    device = pipeline.unet.device
    if not is_sdxl(pipeline):
        embeds = pipeline.encode_prompt(captions, device, 1, do_classifier_free_guidance=False)[0]
        return Conditioning(embeds)
    embeds, _, pooled, _ = pipeline.encode_prompt(captions, device=device, do_classifier_free_guidance=False)
    return Conditioning(embeds, pooled, _time_ids(pooled, len(captions), resolution))


@torch.no_grad()
def encode_empty_prompt(pipeline, resolution):
    """The unconditional row (B = 1) that the stock pipeline guides with: SDXL base uses zeros, the others ''."""
    device = pipeline.unet.device
    if not is_sdxl(pipeline):
        return Conditioning(pipeline.encode_prompt([""], device, 1, do_classifier_free_guidance=True)[1])
    _, embeds, _, pooled = pipeline.encode_prompt([""], device=device, do_classifier_free_guidance=True)
    return Conditioning(embeds, pooled, _time_ids(pooled, 1, resolution))


def _time_ids(pooled, batch_size, resolution):
    """SDXL's micro-conditioning: original size, crop corner (0, 0), target size."""
    ids = torch.tensor(
        [resolution, resolution, 0, 0, resolution, resolution], device=pooled.device, dtype=pooled.dtype
    )
    return ids.expand(batch_size, 6)


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
    """Scaled latents (B, C, H / f, W / f), fp32, of pixels in [-1, 1]: the posterior's mean, so nothing is drawn."""
    return encode_images_with_gradient(vae, pixel_values)


def encode_images_with_gradient(vae, pixel_values):
    """encode_images, for pixels that are optimised."""
    latents = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist.mode()
    shift = vae.config.get("shift_factor") or 0.0
    return (latents.float() - shift) * vae.config.scaling_factor


def decode_latents(vae, latents):
    """Pixels (B, 3, H, W) in about [-1, 1], fp32, of scaled latents."""
    shift = vae.config.get("shift_factor") or 0.0
    return vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype), return_dict=False)[0].float()
