"""Small models to train from nothing: a StableDiffusionPipeline of SD1.5's structure at small widths, and a CLIP.

And what sees them trained: a tokenizer of one's own captions, pixels and contact sheets.
"""

from collections import Counter

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common import shapes

MAX_TOKENS, MAX_WORDS = 20, 10000
WIDTHS, VAE_WIDTHS = (48, 96, 96), (32, 64, 96)  # of the stages


def build_tokenizer(captions=None):
    """A real CLIPTokenizer whose merges make one token of every word of the captions; others are spelled out.

    captions: default, those of the shapes. Of more than MAX_WORDS the most frequent ones count. The context is as long
    as the longest caption needs, from MAX_TOKENS to SD1.5's 77 tokens.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    vocab = symbols + [symbol + "</w>" for symbol in symbols] + ["<|startoftext|>", "<|endoftext|>"]
    plain = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[]).backend_tokenizer
    words, longest = Counter(), 0
    for caption in shapes.held_out_captions() if captions is None else captions:
        found = [word for word, _ in plain.pre_tokenizer.pre_tokenize_str(plain.normalizer.normalize_str(caption))]
        words.update(found)
        longest = max(longest, len(found))
    vocab, ranks = vocab[:-2], {}  # of merges: a pair of pieces to its priority
    for word in sorted(word for word, _ in words.most_common(MAX_WORDS)):
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
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocab))}  # two pairs may make the same piece
    return CLIPTokenizer(vocab=ids, merges=list(ranks), model_max_length=min(max(longest + 2, MAX_TOKENS), 77))


def tokenize(tokenizer, captions):
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def build_text_encoder(tokenizer):
    return CLIPTextModel(
        CLIPTextConfig(hidden_size=96, intermediate_size=384, num_hidden_layers=3, **_text(tokenizer))
    )


def build_clip(tokenizer, size=shapes.IMAGE_SIZE):
    """A CLIPModel for images of `size` pixels, a multiple of 4, in patches of 4, or of 8 where they are large."""
    text = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, **_text(tokenizer))
    vision = dict(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=size,
        patch_size=8 if size > 32 and size % 8 == 0 else 4,
    )
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def _text(tokenizer):
    return dict(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_vae(size=shapes.IMAGE_SIZE, widths=VAE_WIDTHS):
    """An AutoencoderKL of factor 4."""
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        block_out_channels=tuple(widths),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        sample_size=size,
    )
    return model.to(memory_format=torch.channels_last)


def build_unet(latent_shape, widths=WIDTHS, layers_per_block=2):
    """A UNet for latents of (channels, height, width)."""
    channels, size, _ = latent_shape
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=layers_per_block,
        block_out_channels=tuple(widths),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def train_scheduler():
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def small_pipeline(vae, text_encoder, tokenizer, unet):
    scheduler = DDIMScheduler.from_config(
        train_scheduler().config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def to_pixels(images):
    """uint8 images (H, W, 3), a list of arrays, as pixels (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_image(pixels, columns=8, scale=4):
    """A contact sheet (PIL) of pixels (B, 3, H, W) in [-1, 1]; a last row that is not full is left out."""
    images = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    columns = min(columns, len(images))
    starts = range(0, len(images) - columns + 1, columns)
    rows = [np.concatenate(list(images[i : i + columns]), axis=1) for i in starts]
    sheet = Image.fromarray(np.concatenate(rows, axis=0))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.NEAREST)
