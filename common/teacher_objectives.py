"""What each part of a small teacher, and each of its judges, is trained to do: objectives for common/part_training.py.

All learn from a source of common/teacher_data.py, rendered scenes or pictures, with the networks of
common/small_models.py. An objective is a module whose forward(seed, step, indices, device) is the loss, a scalar, of
the training samples `indices`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import shapes
from common.judging.metrics import SceneReader
from common.randomness import sample_generator
from common.small_models import (
    VAE_WIDTHS,
    WIDTHS,
    build_clip,
    build_text_encoder,
    build_unet,
    build_vae,
    tokenize,
    train_scheduler,
)
from common.teacher_data import SCENES


class ReaderObjective(nn.Module):
    """Cross-entropy of every attribute; of shapes, the second object's only where there is one."""

    def __init__(self, source=SCENES):
        super().__init__()
        self.model = SceneReader(captions=source.classes, size=min(source.size, shapes.IMAGE_SIZE))
        self.source = source

    def forward(self, seed, step, indices, device):
        pixels, _, labels = self.source.samples(seed, indices)
        if pixels.shape[-1] > self.model.size:
            pixels = F.interpolate(pixels, (self.model.size, self.model.size), mode="area")
        # Generated images are never quite clean: a judge must not trip over a little noise or blur.
        size = pixels.shape[1:]
        noise = torch.stack([torch.randn(size, generator=sample_generator(seed, 0, int(i))) for i in indices])
        return attribute_loss(self.model((pixels + 0.05 * noise).to(device)), labels.to(device))


class ClipObjective(nn.Module):
    """Contrastive loss: each image against all captions of the batch and hard negatives of each; and back.

    Of pictures, whose captions may be classes, there are no hard negatives, and captions alike are not told apart.
    Linear heads read the attributes from the vision tower while training; they are not kept.
    """

    NEGATIVES = 7

    def __init__(self, tokenizer, weights=None, source=SCENES):
        super().__init__()
        self.model = build_clip(tokenizer, source.size)
        self.heads = nn.ModuleDict({name: nn.Linear(128, classes) for name, classes in source.attributes.items()})
        self.tokenizer, self.source = tokenizer, source
        if weights is not None:
            self.load_state_dict({k: v for k, v in weights.items() if not k.startswith("patch_heads.")})

    def forward(self, seed, step, indices, device):
        pixels, captions, labels = self.source.samples(seed, indices)
        alike, negatives = torch.zeros(len(captions), len(captions), dtype=torch.bool), []
        if self.source is SCENES:
            for scene, index in zip(labels.tolist(), indices):
                rng = np.random.default_rng([seed, 1, int(index)])
                negatives += shapes.hard_negatives(tuple(scene), rng, self.NEGATIVES)
        else:
            alike = torch.tensor([[a == b for b in captions] for a in captions]) & ~torch.eye(len(captions)).bool()
        pooled = self.model.vision_model(pixel_values=pixels.to(device)).pooler_output
        texts = self.model.get_text_features(tokenize(self.tokenizer, captions + negatives).to(device)).pooler_output
        images = F.normalize(self.model.visual_projection(pooled), dim=-1)
        logits = self.model.logit_scale.exp() * images @ F.normalize(texts, dim=-1).T  # (B, B + about B * NEGATIVES)
        logits = logits.masked_fill(F.pad(alike, (0, len(negatives))).to(device), -torch.inf)
        target = torch.arange(len(captions), device=device)
        loss = F.cross_entropy(logits, target) + 0.5 * F.cross_entropy(logits[:, : len(captions)].T, target)
        if not self.heads:
            return loss
        return loss + attribute_loss({name: head(pooled) for name, head in self.heads.items()}, labels.to(device))


class VisionObjective(ClipObjective):
    """The vision tower alone: every attribute from the pooled output, and an object's own from each patch it covers.

    The patches' loss makes the tower look at a patch's neighbours, which is where shapes are; the rest follows.
    """

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.model.requires_grad_(False)
        self.model.vision_model.requires_grad_(True)
        names = list(shapes.ATTRIBUTES)[2:5]
        self.patch_heads = nn.ModuleDict({name: nn.Linear(128, shapes.ATTRIBUTES[name]) for name in names})

    def forward(self, seed, step, indices, device):
        pixels, _, labels = self.source.samples(seed, indices)
        pixels, labels = pixels.to(device), labels.to(device)
        outputs = self.model.vision_model(pixel_values=pixels)
        pooled, patches = outputs.pooler_output, outputs.last_hidden_state[:, 1:]
        objects = (pixels - pixels[:, :, :1, :1]).abs().amax(1, keepdim=True).gt(0.02).float()
        covered = F.avg_pool2d(objects, 4).flatten(1) > 0.2
        # Two objects keep to their halves, the upper and lower one ("above") or the left and right one.
        relation, patch = labels[:, 1:2], torch.arange(64, device=device)
        second = torch.where(relation == 1, patch // 8 >= 4, patch % 8 >= 4) & (relation > 0)
        loss = attribute_loss({name: head(pooled) for name, head in self.heads.items()}, labels)
        for position, head in enumerate(self.patch_heads.values(), start=2):
            label = torch.where(second, labels[:, position + 3, None], labels[:, position, None])
            loss = loss + F.cross_entropy(head(patches[covered]), label[covered])
        return loss


def attribute_loss(logits, labels):
    """Cross-entropy of every attribute, labels (B, attributes), summed; a second object's only where there is one."""
    losses = []
    for position, values in enumerate(logits.values()):
        loss = F.cross_entropy(values, labels[:, position], reduction="none")
        second = position >= shapes.SECOND_OBJECT.start
        losses.append(loss * (1 - (labels[:, 1] == 0).float()) if second else loss)
    return torch.stack(losses).sum(0).mean()


class VaeObjective(nn.Module):
    """L1 + MSE, weighted by the source, + 1e-6 KL."""

    NOISE = None  # the posterior's own

    def __init__(self, source=SCENES, widths=VAE_WIDTHS):
        super().__init__()
        self.model, self.source = build_vae(source.size, widths), source

    def forward(self, seed, step, indices, device):
        pixels = self.source.samples(seed, indices)[0].to(device)
        weight = self.source.pixel_weights(pixels)
        posterior = self.model.encode(pixels).latent_dist
        size = posterior.mean.shape[1:]
        noise = torch.stack([torch.randn(size, generator=sample_generator(seed, 0, int(i))) for i in indices])
        decoded = self.model.decode(posterior.mean + (self.NOISE or posterior.std) * noise.to(device)).sample
        error = (decoded - pixels).abs()
        return (weight * (error + error**2)).mean() + 1e-6 * posterior.kl().mean()


class DecoderObjective(VaeObjective):
    """The same, with the encoder as it is and noise of a tenth of the latents' spread: what a UNet leaves."""

    NOISE = 0.2

    def __init__(self, weights, source=SCENES, widths=VAE_WIDTHS):
        super().__init__(source, widths)
        self.load_state_dict(weights)
        self.model.encoder.requires_grad_(False)
        self.model.quant_conv.requires_grad_(False)


class UNetObjective(nn.Module):
    """Epsilon-prediction on the VAE's latents, min-SNR-5 weights, 10 % empty captions; trains the text encoder too."""

    def __init__(self, tokenizer, latents=None, labels=None, source=SCENES, widths=WIDTHS, layers=2):
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer)
        self.unet = build_unet((4, 8, 8) if latents is None else latents.shape[1:], widths, layers)
        self.tokenizer, self.source = tokenizer, source
        self.latents, self.labels = latents, labels  # (M, C, h, w), scaled, and (M, attributes) of training samples
        self.scheduler = train_scheduler()

    def forward(self, seed, step, indices, device):
        chosen = [self.source.order(seed, index, len(self.latents)) for index in indices]
        captions, noise, timesteps = [], [], []
        for place, index in zip(chosen, indices):
            generator = sample_generator(seed, 0, int(index))
            noise.append(torch.randn(self.latents.shape[1:], generator=generator))
            timesteps.append(torch.randint(1000, (), generator=generator))
            dropped = torch.rand((), generator=generator) < 0.1
            captions.append("" if dropped else self.source.caption_of(self.labels[place]))
        latents = self.latents[chosen].to(device)
        noise, timesteps = torch.stack(noise).to(device), torch.stack(timesteps).to(device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        prompt_embeds = self.text_encoder(tokenize(self.tokenizer, captions).to(device))[0]
        prediction = self.unet(noisy, timesteps, prompt_embeds).sample
        alphas = self.scheduler.alphas_cumprod.to(device)[timesteps]
        snr = alphas / (1 - alphas)
        weight = snr.clamp(max=5) / snr
        return (weight * (prediction - noise).pow(2).mean(dim=(1, 2, 3))).mean()
