"""Models: load a pipeline, freeze it, encode prompts, and predict with guidance in one batched forward.

One family of shapes is handled: UNet pipelines of Stable Diffusion 1.x and 2.x (one text encoder) and of SDXL (two,
with a pooled embedding and time ids). The pipeline's own `encode_prompt` encodes, so that training and stock
inference see the same embeddings.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from common.diffusion import NoiseSchedule

TINY_SD = Path(__file__).resolve().parent.parent / "assets" / "tiny-sd"


class ModelError(ValueError):
    """A model that can't be used, in one sentence."""


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
        return Conditioning(*(
            None if a is None else torch.where(mask.view(-1, *[1] * (a.dim() - 1)), b, a) for a, b in pairs
        ))  # fmt: skip

    def rows(self, order):
        """These rows: order is long (B,)."""
        return Conditioning(*(None if x is None else x[order] for x in self._tensors()))

    def cat(self, other):
        pairs = zip(self._tensors(), other._tensors())
        return Conditioning(*(None if a is None else torch.cat([a, b]) for a, b in pairs))

    def _tensors(self):
        return (self.prompt_embeds, self.pooled_prompt_embeds, self.time_ids)


PIPELINES = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
}


class _OnceFilter(logging.Filter):
    """Lets the pipelines' warning about a truncated caption pass once, not for every batch of a run."""

    said = False

    def filter(self, record):
        truncated = "truncated because CLIP" in record.getMessage()
        said, self.said = self.said, self.said or truncated
        return not (truncated and said)


for _pipeline_class in PIPELINES.values():
    logging.getLogger(_pipeline_class.__module__).addFilter(_OnceFilter())


def read_pipeline_config(path, revision=None, flag="--pretrained_model_name_or_path"):
    """(pipeline class, native resolution, VAE factor) of a folder or hub id, from its config files alone.

    The native resolution is the UNet's sample_size times the VAE's factor. Raises ModelError, one sentence naming
    `flag`, where there is no pipeline of a known class or its scheduler has no NoiseSchedule: before gigabytes are
    loaded.
    """
    where = f"{flag} {path}"
    folder = Path(path)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ModelError(f"{where}: the folder has no model_index.json, so it is not a diffusers pipeline.")
    if not folder.exists() and (str(path).startswith((".", "/", "~")) or str(path).count("/") != 1):
        raise ModelError(f"{where}: there is no such folder, and it is not a hub id (owner/name) either.")
    try:
        index = DiffusionPipeline.load_config(path, revision=revision)
        name = index["_class_name"]
        if name not in PIPELINES:
            raise ModelError(f"{where}: it is a {name}; this script takes {' or '.join(PIPELINES)}.")
        unet = UNet2DConditionModel.load_config(path, subfolder="unet", revision=revision)
        vae = AutoencoderKL.load_config(path, subfolder="vae", revision=revision)
        scheduler_class = getattr(diffusers, index["scheduler"][-1])
    except (OSError, KeyError, AttributeError, TypeError, json.JSONDecodeError) as error:
        raise ModelError(f"{where}: its config files can't be read ({_first(error)})") from None
    try:
        NoiseSchedule(scheduler_class.from_pretrained(path, subfolder="scheduler", revision=revision))
    except (OSError, ValueError, ImportError, NotImplementedError) as error:
        # No file; an unknown prediction type or betas; a scheduler that needs scipy, say; one without a schedule.
        raise ModelError(f"{where}: {_first(error)}.") from None
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return PIPELINES[name], unet["sample_size"] * factor, factor


def load_pipeline(path, dtype=torch.float32, revision=None, variant=None, flag="--pretrained_model_name_or_path"):
    """A frozen SD1.x / SD2.x / SDXL pipeline in eval mode, from a folder or a hub id; safetensors only.

    Raises ModelError (one sentence naming `flag`) where there is no such pipeline.
    """
    pipeline_class, _, _ = read_pipeline_config(path, revision, flag)
    extras = {}
    if pipeline_class is StableDiffusionPipeline:
        extras = {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipeline = pipeline_class.from_pretrained(
            path, torch_dtype=dtype, revision=revision, variant=variant, use_safetensors=True, **extras
        )
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(f"{flag} {path}: the pipeline does not load ({_first(error)})") from None
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_compatible(path, flag, teacher_path, teacher_revision=None):
    """Raise ModelError unless the student pipeline at `path` (of `flag`) has the teacher's latents and text width.

    From config files alone.
    """
    kinds = []
    for where, revision, name in ((path, None, flag),
                                  (teacher_path, teacher_revision, "--pretrained_model_name_or_path")):  # fmt: skip
        pipeline_class, _, factor = read_pipeline_config(where, revision, name)
        unet = UNet2DConditionModel.load_config(where, subfolder="unet", revision=revision)
        vae = AutoencoderKL.load_config(where, subfolder="vae", revision=revision)
        kinds.append({
            "pipeline class": pipeline_class.__name__, "VAE factor": factor,
            "latent channels": vae.get("latent_channels"), "latents' scale": vae.get("scaling_factor"),
            "latents' shift": vae.get("shift_factor"), "UNet's input channels": unet["in_channels"],
            "UNet's output channels": unet["out_channels"],
            "text width": unet.get("encoder_hid_dim") or unet["cross_attention_dim"],
        })  # fmt: skip
    for what, value in kinds[0].items():
        if value != kinds[1][what]:
            raise ModelError(f"{flag} {path}: its {what}, {value}, is not the teacher's, {kinds[1][what]}.")


def check_same_inputs(student, teacher, name):
    """Raise ModelError, of `name`, unless a pipeline has the other's noise schedule, prediction and text encoders."""
    ours, theirs = (NoiseSchedule(pipeline.scheduler) for pipeline in (student, teacher))
    every = torch.arange(theirs.num_train_timesteps)
    if ours.prediction_type != theirs.prediction_type or not torch.equal(ours.alpha(every), theirs.alpha(every)):
        raise ModelError(f"{name}: its noise schedule or prediction type is not the teacher's.")
    for part in ("text_encoder", "text_encoder_2"):
        encoder = getattr(teacher, part, None)
        if encoder and not same_weights(getattr(student, part).to(encoder.device, encoder.dtype), encoder):
            raise ModelError(f"{name}: its {part} is not the teacher's, which reads the captions of both.")


def same_weights(a, b):
    """Whether two modules have the same parameters and buffers, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[name].shape == b[name].shape and torch.equal(a[name], b[name]) for name in a)


def _first(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def is_sdxl(pipeline):
    return isinstance(pipeline, StableDiffusionXLPipeline)


def read_distillation(path):
    """The distillation.json beside a pipeline or LoRA; without the file (or for a hub id) an ordinary teacher."""
    file = Path(path) / "distillation.json"
    if not file.is_file():
        return {"guidance": "cfg", "guidance_scale": 7.5}
    try:
        contract = json.loads(file.read_text())
        return {**contract, "guidance": contract["guidance"], "guidance_scale": float(contract["guidance_scale"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} can't be read: {_first(error)}.") from None


def comes_from_tiny_sd(path):
    """Whether a pipeline is the embedded tiny-sd, or was made from it at some remove."""
    ancestors = [path]
    while (parent := read_distillation(ancestors[-1]).get("parent")) and parent not in ancestors:
        ancestors.append(parent)
    return any(is_tiny_sd(ancestor) for ancestor in ancestors)


def is_tiny_sd(path):
    """Whether a path is assets/tiny-sd of this checkout or of another one (segmind/tiny-sd, on the hub, is not)."""
    return Path(path).parts[-2:] == TINY_SD.parts[-2:]


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
        z.to(dtype), timesteps, encoder_hidden_states=conditioning.prompt_embeds, added_cond_kwargs=added,
        timestep_cond=timestep_cond, return_dict=False)[0]  # fmt: skip
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


@torch.no_grad()
def with_guidance_input(unet, embedding_dim=256):
    """A copy of a UNet that takes the guidance scale as an input (Meng et al. 2023): `timestep_cond` of `predict`.

    The new layer, cond_proj, is zero, so the copy says what the UNet says whatever the scale. A UNet that has the
    input already is returned as it is.
    """
    if unet.config.time_cond_proj_dim is not None:
        return unet
    copy = UNet2DConditionModel.from_config({**unet.config, "time_cond_proj_dim": embedding_dim})
    missing, unexpected = copy.load_state_dict(unet.state_dict(), strict=False)
    assert missing == ["time_embedding.cond_proj.weight"] and not unexpected, (missing, unexpected)
    copy.time_embedding.cond_proj.weight.zero_()  # torch's own initialisation is random
    return copy.to(unet.device, unet.dtype).requires_grad_(False).eval()


def guidance_embedding(pipeline, guidance_scale, embedding_dim):
    """What the stock pipeline gives such a UNet for guidance scales (B,): a sinusoid of 1000 (w - 1), (B, dim)."""
    return pipeline.get_guidance_scale_embedding(guidance_scale.cpu() - 1, embedding_dim)


@torch.no_grad()
def encode_images(vae, pixel_values):
    """Scaled latents (B, C, H / f, W / f), fp32, of pixels in [-1, 1]: the posterior's mean, so nothing is drawn."""
    latents = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist.mode()
    shift = vae.config.get("shift_factor") or 0.0
    return (latents.float() - shift) * vae.config.scaling_factor


def decode_latents(vae, latents):
    """Pixels (B, 3, H, W) in about [-1, 1], fp32, of scaled latents."""
    shift = vae.config.get("shift_factor") or 0.0
    return vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype), return_dict=False)[0].float()
