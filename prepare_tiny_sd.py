"""Train the embedded default from nothing: assets/tiny-sd and its judges tiny-clip and tiny-reader.

Every part learns from scenes rendered on the fly (common/shapes.py), on one GPU or a CPU:

    reader   tiny-reader, a convolutional classifier of every attribute of a scene
    vision   tiny-clip's vision tower alone learns to read attributes: contrast alone teaches it shapes slowly
    clip     tiny-clip, a CLIPModel; each image sees hard negatives (one attribute changed, colours or objects swapped)
    vae      AutoencoderKL: 32x32 pixels to 4x8x8 latents
    unet     the text encoder and the UNet, together, epsilon-prediction with min-SNR weights
    decoder  the VAE's decoder alone goes on, on slightly noisy latents: the latents stay as the UNet knows them
    pipeline writes assets/tiny-sd and measures its best guidance scale
    report   every figure of docs/tiny-sd.md

    python prepare_tiny_sd.py                                     # everything; run again to resume
    accelerate launch --num_processes 2 prepare_tiny_sd.py --parts unet
"""

import common  # noqa: F401  first: it silences what importing diffusers would say

# isort: split
import argparse
import functools
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common import shapes
from common.contract import read_distillation, write_distillation
from common.judging.metrics import ClipJudge, SceneReader, judge_images, scene_accuracy, shapes_real_features
from common.pipelines import load_pipeline
from common.randomness import sample_generator

PARTS = ("reader", "vision", "clip", "vae", "unet", "decoder", "pipeline", "report")
MAX_TOKENS = 20


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--output_dir", default="assets")
    parser.add_argument("--work_dir", default="outputs/tiny_sd", help="checkpoints and sample grids")
    parser.add_argument("--reader_steps", type=int, default=2000)
    parser.add_argument("--vision_steps", type=int, default=2500)
    parser.add_argument("--clip_steps", type=int, default=1500)
    parser.add_argument("--vae_steps", type=int, default=4250)
    parser.add_argument("--unet_steps", type=int, default=4200)
    parser.add_argument("--decoder_steps", type=int, default=1000)
    parser.add_argument("--latents", type=int, default=32768, help="training scenes encoded for the UNet")
    parser.add_argument("--guidance_captions", type=int, default=300, help="choose guidance on so many captions")
    parser.add_argument("--report_captions", type=int, default=2000, help="judge this many held-out captions")
    parser.add_argument("--checkpointing_steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build_tokenizer():
    """A real CLIPTokenizer whose merges make one token of every word of the captions; others are spelled out."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    vocab = symbols + [symbol + "</w>" for symbol in symbols]
    words = {word for scene in shapes.held_out_scenes() for word in shapes.caption_of(scene).split()}
    ranks = {}  # of merges: a pair of pieces to its priority
    for word in sorted(words):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            # As BPE does: the earliest known merge first. Where none applies, the first pair becomes a new one.
            pair = min(zip(pieces, pieces[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
            if pair not in ranks:
                ranks[pair] = len(ranks)
                vocab.append("".join(pair))
            at = next(i for i in range(len(pieces)) if tuple(pieces[i : i + 2]) == pair)
            pieces[at : at + 2] = ["".join(pair)]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(vocab)}
    return CLIPTokenizer(vocab=ids, merges=list(ranks), model_max_length=MAX_TOKENS)


def tokenize(tokenizer, captions):
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def rendered(seed, indices):
    """Renders as pixels (B, 3, 32, 32) in [-1, 1] and their scenes (a list of tuples)."""
    images, scenes = zip(*(shapes.training_sample(seed, int(index)) for index in indices))
    return to_pixels(images), list(scenes)


def to_pixels(images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_image(pixels, columns=8, scale=4):
    """A contact sheet (PIL) of pixels (B, 3, H, W) in [-1, 1]."""
    images = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = [np.concatenate(list(images[i : i + columns]), axis=1) for i in range(0, len(images), columns)]
    sheet = Image.fromarray(np.concatenate(rows, axis=0))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.NEAREST)


class ReaderObjective(nn.Module):
    """Cross-entropy of every attribute; the second object's only where there is one."""

    def __init__(self):
        super().__init__()
        self.model = SceneReader()

    def forward(self, seed, step, indices, device):
        pixels, scenes = rendered(seed, indices)
        # Generated images are never quite clean: a judge must not trip over a little noise or blur.
        noise = torch.stack([torch.randn(3, 32, 32, generator=sample_generator(seed, 0, int(i))) for i in indices])
        return attribute_loss(self.model((pixels + 0.05 * noise).to(device)), scenes, device)


class ClipObjective(nn.Module):
    """Contrastive loss: each image against all captions of the batch and hard negatives of each; and back.

    Linear heads read the attributes from the vision tower while training; they are not kept.
    """

    NEGATIVES = 7

    def __init__(self, tokenizer, weights=None):
        super().__init__()
        text = dict(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        vision = dict(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=shapes.IMAGE_SIZE,
            patch_size=4,
        )
        self.model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))
        self.heads = nn.ModuleDict({name: nn.Linear(128, classes) for name, classes in shapes.ATTRIBUTES.items()})
        self.tokenizer = tokenizer
        if weights is not None:
            self.load_state_dict({k: v for k, v in weights.items() if not k.startswith("patch_heads.")})

    def forward(self, seed, step, indices, device):
        pixels, scenes = rendered(seed, indices)
        captions = [shapes.caption_of(scene) for scene in scenes]
        for scene, index in zip(scenes, indices):
            captions += shapes.hard_negatives(scene, np.random.default_rng([seed, 1, int(index)]), self.NEGATIVES)
        pooled = self.model.vision_model(pixel_values=pixels.to(device)).pooler_output
        texts = self.model.get_text_features(tokenize(self.tokenizer, captions).to(device)).pooler_output
        images = F.normalize(self.model.visual_projection(pooled), dim=-1)
        logits = self.model.logit_scale.exp() * images @ F.normalize(texts, dim=-1).T  # (B, B + about B * NEGATIVES)
        target = torch.arange(len(scenes), device=device)
        loss = F.cross_entropy(logits, target) + 0.5 * F.cross_entropy(logits[:, : len(scenes)].T, target)
        return loss + attribute_loss({name: head(pooled) for name, head in self.heads.items()}, scenes, device)


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
        pixels, scenes = rendered(seed, indices)
        pixels, labels = pixels.to(device), torch.tensor(scenes, device=device)
        outputs = self.model.vision_model(pixel_values=pixels)
        pooled, patches = outputs.pooler_output, outputs.last_hidden_state[:, 1:]
        objects = (pixels - pixels[:, :, :1, :1]).abs().amax(1, keepdim=True).gt(0.02).float()
        covered = F.avg_pool2d(objects, 4).flatten(1) > 0.2
        # Two objects keep to their halves, the upper and lower one ("above") or the left and right one.
        relation, patch = labels[:, 1:2], torch.arange(64, device=device)
        second = torch.where(relation == 1, patch // 8 >= 4, patch % 8 >= 4) & (relation > 0)
        loss = attribute_loss({name: head(pooled) for name, head in self.heads.items()}, scenes, device)
        for position, head in enumerate(self.patch_heads.values(), start=2):
            label = torch.where(second, labels[:, position + 3, None], labels[:, position, None])
            loss = loss + F.cross_entropy(head(patches[covered]), label[covered])
        return loss


def attribute_loss(logits, scenes, device):
    """Cross-entropy of every attribute, summed; the second object's only where there is one."""
    scenes = torch.tensor(scenes, device=device)
    alone, losses = (scenes[:, 1] == 0).float(), []
    for position, name in enumerate(shapes.ATTRIBUTES):
        loss = F.cross_entropy(logits[name], scenes[:, position], reduction="none")
        losses.append(loss * (1 - alone) if position >= shapes.SECOND_OBJECT.start else loss)
    return torch.stack(losses).sum(0).mean()


class VaeObjective(nn.Module):
    """L1 + MSE, + 1e-6 KL; most pixels are background, so an object's weigh more, and a small object's most.

    Without that, small crosses come back as diamonds.
    """

    NOISE = None  # the posterior's own

    def __init__(self):
        super().__init__()
        model = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=8,
            block_out_channels=(32, 64, 96),
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            sample_size=shapes.IMAGE_SIZE,
        )
        self.model = model.to(memory_format=torch.channels_last)

    def forward(self, seed, step, indices, device):
        pixels = rendered(seed, indices)[0].to(device)
        objects = (pixels - pixels[:, :, :1, :1]).abs().amax(1, keepdim=True).gt(0.02).float()
        objects = F.max_pool2d(objects, 3, stride=1, padding=1)
        weight = 1 + 4 * objects / F.avg_pool2d(objects, 15, stride=1, padding=7).clamp(min=0.1)
        posterior = self.model.encode(pixels).latent_dist
        noise = torch.stack([torch.randn(4, 8, 8, generator=sample_generator(seed, 0, int(i))) for i in indices])
        decoded = self.model.decode(posterior.mean + (self.NOISE or posterior.std) * noise.to(device)).sample
        error = (decoded - pixels).abs()
        return (weight * (error + error**2)).mean() + 1e-6 * posterior.kl().mean()


class DecoderObjective(VaeObjective):
    """The same, with the encoder as it is and noise of a tenth of the latents' spread: what a UNet leaves."""

    NOISE = 0.2

    def __init__(self, weights):
        super().__init__()
        self.load_state_dict(weights)
        self.model.encoder.requires_grad_(False)
        self.model.quant_conv.requires_grad_(False)


class UNetObjective(nn.Module):
    """Epsilon-prediction on the VAE's latents, min-SNR-5 weights, 10 % empty captions; trains the text encoder too."""

    def __init__(self, tokenizer, latents=None):
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=96,
                intermediate_size=384,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=2,
            block_out_channels=(48, 96, 96),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=96,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        self.tokenizer = tokenizer
        self.latents = latents  # (M, 4, 8, 8), scaled, of training scenes 0 to M - 1
        self.scheduler = train_scheduler()

    def forward(self, seed, step, indices, device):
        scenes = [int(index) % len(self.latents) for index in indices]
        captions, noise, timesteps = [], [], []
        for scene, index in zip(scenes, indices):
            generator = sample_generator(seed, 0, int(index))
            noise.append(torch.randn(4, 8, 8, generator=generator))
            timesteps.append(torch.randint(1000, (), generator=generator))
            dropped = torch.rand((), generator=generator) < 0.1
            captions.append("" if dropped else shapes.caption_of(shapes.training_scene(seed, scene)[0]))
        latents = self.latents[scenes].to(device)
        noise, timesteps = torch.stack(noise).to(device), torch.stack(timesteps).to(device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        prompt_embeds = self.text_encoder(tokenize(self.tokenizer, captions).to(device))[0]
        prediction = self.unet(noisy, timesteps, prompt_embeds).sample
        alphas = self.scheduler.alphas_cumprod.to(device)[timesteps]
        snr = alphas / (1 - alphas)
        weight = snr.clamp(max=5) / snr
        return (weight * (prediction - noise).pow(2).mean(dim=(1, 2, 3))).mean()


def train_scheduler():
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def learning_rate(step, steps, peak, warmup=200):
    """Linear warm-up, then cosine to zero."""
    return peak * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_part(name, objective, steps, batch_size, peak, args, accelerator, sample=None):
    """Train one part to `steps` (resuming its last checkpoint) and leave it with its EMA weights."""
    folder = Path(args.work_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    device = accelerator.device
    objective.to(device)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    ema = {key: value.detach().clone() for key, value in objective.state_dict().items()}
    step, checkpoint = 0, folder / "checkpoint"
    if (checkpoint / "state.json").is_file():
        step = json.loads((checkpoint / "state.json").read_text())["step"]
        objective.load_state_dict(load_file(checkpoint / "weights.safetensors"))
        ema = {k: v.to(device) for k, v in load_file(checkpoint / "ema.safetensors").items()}
        optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
        accelerator.print(f"{name}: resuming at step {step} of {steps}")
    model = accelerator.prepare(objective) if step < steps else objective
    share = batch_size // accelerator.num_processes
    bar = tqdm(total=steps, initial=step, desc=name, disable=not accelerator.is_main_process, mininterval=10)
    seed, losses = args.seed + PARTS.index(name), []
    while step < steps:
        first = step * batch_size + accelerator.process_index * share
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = model(seed, step, range(first, first + share), device)
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in objective.state_dict().items():
                ema[key].lerp_(value, 1 - decay) if value.is_floating_point() else ema[key].copy_(value)
        losses.append(loss.detach())
        bar.update()
        if step % args.checkpointing_steps == 0 or step == steps:
            average, losses = torch.stack(losses).mean().item(), []
            bar.set_postfix(loss=f"{average:.4f}")
            if accelerator.is_main_process:
                print(f"{name} step {step} loss {average:.5f}", flush=True)
                save_part(checkpoint, step, objective, ema, optimizer)
                if sample is not None:
                    weights = {k: v.clone() for k, v in objective.state_dict().items()}
                    objective.load_state_dict(ema)
                    with torch.no_grad():
                        sample(objective).save(folder / f"sample-{step}.png")
                    objective.load_state_dict(weights)
            accelerator.wait_for_everyone()
    objective.load_state_dict(ema)
    return objective.eval()


def save_part(checkpoint, step, objective, ema, optimizer):
    temporary = checkpoint.with_name(".checkpoint.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file({k: v.contiguous() for k, v in objective.state_dict().items()}, temporary / "weights.safetensors")
    save_file({k: v.contiguous() for k, v in ema.items()}, temporary / "ema.safetensors")
    torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
    (temporary / "state.json").write_text(json.dumps({"step": step}))
    older = checkpoint.with_name(".checkpoint.old")
    shutil.rmtree(older, ignore_errors=True)
    if checkpoint.exists():
        os.replace(checkpoint, older)
    os.replace(temporary, checkpoint)


def sample_vae(objective):
    pixels = to_pixels([shapes.held_out_sample(i)[0] for i in range(32)]).to(next(objective.parameters()).device)
    decoded = objective.model(pixels).sample
    return to_image(torch.stack([pixels, decoded], dim=1).flatten(0, 1), columns=16)


def sample_unet(objective, vae):
    pipeline = build_pipeline(objective, vae)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        shapes.held_out_captions(24),
        num_inference_steps=25,
        guidance_scale=4.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    return to_image(images * 2 - 1)


def build_pipeline(objective, vae):
    scheduler = DDIMScheduler.from_config(
        train_scheduler().config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=objective.text_encoder,
        tokenizer=objective.tokenizer,
        unet=objective.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_vae(args, device, part="vae"):
    """The VAE as `part` left it, frozen, with the scaling factor that gives its latents unit standard deviation."""
    objective = VaeObjective()
    objective.load_state_dict(load_file(Path(args.work_dir) / part / "checkpoint/ema.safetensors"))
    vae = objective.model.to(device).eval().requires_grad_(False)
    pixels = rendered(args.seed, range(min(1000, args.latents)))[0]
    with torch.no_grad():
        latents = torch.cat([vae.encode(part.to(device)).latent_dist.mean for part in pixels.split(100)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae


@torch.no_grad()
def cached_latents(args, vae, accelerator, seed):
    """Scaled latents (M, 4, 8, 8) of training scenes 0 to M - 1: encoded once, kept in the work folder."""
    # The scaling factor tells one VAE from another.
    file = Path(args.work_dir) / f"latents-{seed}-{args.latents}-{vae.config.scaling_factor}.safetensors"
    if accelerator.is_main_process and not file.is_file():
        parts = []
        for start in tqdm(range(0, args.latents, 64), desc="latents"):
            pixels = rendered(seed, range(start, min(start + 64, args.latents)))[0].to(accelerator.device)
            parts.append(vae.encode(pixels).latent_dist.mean.cpu() * vae.config.scaling_factor)
        save_file({"latents": torch.cat(parts).contiguous()}, file)
    accelerator.wait_for_everyone()
    return load_file(file)["latents"]


@torch.no_grad()
def teacher_images(pipeline, captions, steps, guidance_scale, accelerator, batch_size=100):
    """Pixels (N, 3, 32, 32) in [-1, 1] of N captions, image i from noise seeded by i; shared by the processes."""
    pipeline.set_progress_bar_config(disable=True)
    share = -(-len(captions) // accelerator.num_processes)
    mine = range(len(captions))[accelerator.process_index * share :][:share]
    parts = []
    for start in tqdm(
        range(0, share, batch_size),
        desc=f"{steps} steps, w = {guidance_scale:g}",
        disable=not accelerator.is_main_process,
    ):
        indices = mine[start : start + batch_size]
        images = pipeline(
            [captions[i] for i in indices],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[sample_generator(0, i, 0) for i in indices],
            output_type="pt",
        ).images
        parts.append(images.to(accelerator.device) * 2 - 1)
    return accelerator.gather(torch.cat(parts)).cpu()


def write_pipeline(args, accelerator, tokenizer):
    """assets/tiny-sd, and beside it the guidance scale that reads best on training captions, by tiny-reader."""
    objective, vae = UNetObjective(tokenizer), load_vae(args, accelerator.device, "decoder")
    objective.load_state_dict(load_file(Path(args.work_dir) / "unet/checkpoint/ema.safetensors"))
    folder = Path(args.output_dir) / "tiny-sd"
    pipeline = build_pipeline(objective.eval(), vae).to(dtype=torch.float16)
    if accelerator.is_main_process:
        pipeline.save_pretrained(folder)
        # transformers loads what the config says, diffusers fp32 unless told otherwise: so they load alike.
        config = folder / "text_encoder" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    accelerator.wait_for_everyone()
    pipeline.to(accelerator.device, torch.float32)
    reader = SceneReader.from_pretrained(Path(args.output_dir) / "tiny-reader")
    captions = [shapes.caption_of(shapes.training_scene(args.seed + 100, i)[0]) for i in range(args.guidance_captions)]
    found = {}
    for guidance_scale in (1.5, 2.0, 3.0, 4.0, 6.0):
        pixels = teacher_images(pipeline, captions, 50, guidance_scale, accelerator)
        found[guidance_scale] = scene_accuracy(reader, pixels, captions).float().mean().item()
        accelerator.print(f"guidance scale {guidance_scale:g}: scene accuracy {found[guidance_scale]:.3f}", flush=True)
    if accelerator.is_main_process:
        best = max(found, key=found.get)
        write_distillation(
            folder,
            method="prepare_tiny_sd",
            parent=None,
            steps=None,
            timesteps=None,
            guidance="cfg",
            guidance_scale=best,
            target=None,
        )
        (Path(args.work_dir) / "guidance.json").write_text(json.dumps(found) + "\n")


def report(args, accelerator):
    """Every figure of docs/tiny-sd.md, on the held-out captions, with 95 % bootstrap intervals: report.json."""
    output = Path(args.output_dir)
    reader, judge = SceneReader.from_pretrained(output / "tiny-reader"), ClipJudge(output / "tiny-clip")
    pipeline = load_pipeline(output / "tiny-sd").to(accelerator.device)
    guidance_scale = read_distillation(output / "tiny-sd")["guidance_scale"]
    count = args.report_captions
    captions = shapes.held_out_captions(count)
    images = teacher_images(pipeline, captions, 50, guidance_scale, accelerator)
    if not accelerator.is_main_process:
        return
    renders = to_pixels([shapes.held_out_sample(i)[0] for i in range(count)])
    with torch.no_grad():
        decoded = torch.cat([pipeline.vae(part.to(accelerator.device)).sample.cpu() for part in renders.split(100)])
    real_features = shapes_real_features(judge, count)
    rows = {
        "real renders": judge_images(renders, captions, judge, reader, real_features),
        "VAE reconstructions": judge_images(decoded, captions, judge, reader, real_features),
        f"teacher, 50 DDIM steps, w = {guidance_scale:g}": judge_images(
            images, captions, judge, reader, real_features
        ),
    }
    psnr = (10 * torch.log10(4 / (decoded.clamp(-1, 1) - renders).pow(2).mean(dim=(1, 2, 3)))).mean().item()
    print(f"VAE reconstructions: PSNR {psnr:.1f} dB")
    print("| | scene accuracy | R-precision | CLIP score | Fréchet (tiny-clip) |\n|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [
            f"{row[key][0]:.3f} [{row[key][1]:.3f}, {row[key][2]:.3f}]" for key in ("scene_accuracy", "r_precision")
        ]
        print(f"| {name} | {' | '.join(cells)} | {row['clip_score'][0]:.1f} | {row['frechet']:.2f} |")
        del row["per_image"]
    (Path(args.work_dir) / "report.json").write_text(json.dumps({"psnr": psnr, **rows}, indent=1) + "\n")
    to_image(images[:48], columns=12).save(Path(args.work_dir) / "contact_sheet.png")


def main():
    args = parse_args()
    accelerator = Accelerator(cpu=None if torch.accelerator.is_available() else True)
    output, tokenizer = Path(args.output_dir), build_tokenizer()
    torch.manual_seed(args.seed)
    if "reader" in args.parts:
        reader = train_part("reader", ReaderObjective(), args.reader_steps, 64, 1e-3, args, accelerator)
        reader.model.save_pretrained(output / "tiny-reader")
    if "vision" in args.parts:
        train_part("vision", VisionObjective(tokenizer), args.vision_steps, 64, 1e-3, args, accelerator)
    if "clip" in args.parts:
        vision = load_file(Path(args.work_dir) / "vision/checkpoint/ema.safetensors")
        objective = ClipObjective(tokenizer, vision)
        clip = train_part("clip", objective, args.clip_steps, 32, 5e-4, args, accelerator)
        clip.model.half().save_pretrained(output / "tiny-clip")
        tokenizer.save_pretrained(output / "tiny-clip")
    if "vae" in args.parts:
        train_part("vae", VaeObjective(), args.vae_steps, 16, 1.5e-3, args, accelerator, sample_vae)
    if "unet" in args.parts:
        vae = load_vae(args, accelerator.device)
        latents = cached_latents(args, vae, accelerator, args.seed + PARTS.index("unet"))
        sample = functools.partial(sample_unet, vae=vae)
        train_part("unet", UNetObjective(tokenizer, latents), args.unet_steps, 64, 1e-3, args, accelerator, sample)
    if "decoder" in args.parts:
        objective = DecoderObjective(load_file(Path(args.work_dir) / "vae/checkpoint/ema.safetensors"))
        train_part("decoder", objective, args.decoder_steps, 16, 1e-3, args, accelerator, sample_vae)
    if "pipeline" in args.parts:
        write_pipeline(args, accelerator, tokenizer)
    if "report" in args.parts:
        report(args, accelerator)


if __name__ == "__main__":
    main()
