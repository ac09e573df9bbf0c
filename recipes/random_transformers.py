"""Small pipelines of FLUX, SD3 and PixArt with random weights, to try what is done to the real ones on any laptop.

    python recipes/random_transformers.py --output_dir outputs/random        # outputs/random/flux, sd3, pixart

Classes and parts are those of the published ones: transformer, CLIP and T5 text encoders, VAE, scheduler.
"""

import argparse
import string
from pathlib import Path

import diffusers
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TOKENIZER = Path(__file__).resolve().parent.parent / "assets" / "tiny-sd" / "tokenizer"
KINDS = ("flux", "sd3", "pixart")
SIZES = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4}
PICTURE = {"in_channels": 4, "out_channels": 4}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/random", help="where a folder for each kind is written")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="which (default: all)")
    return parser.parse_args(argv)


def clip(cls, tokenizer):
    """A CLIP text encoder with a width and a projection of 32."""
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    positions = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    return cls(CLIPTextConfig(**tokens, **sizes, **positions, projection_dim=32))


def t5(width):
    """(T5's encoder, of that width, and a tokenizer that knows the letters)."""
    letters = [(letter, -1.0) for letter in ("\u2581", *string.ascii_lowercase)]
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)
    sizes = {"vocab_size": len(tokenizer), "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(d_model=width, **sizes)), tokenizer


def random_transformer_pipeline(kind):
    """A pipeline of FLUX, SD3 or PixArt, the same at every call; its transformer is two layers deep."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    text, t5_tokenizer = t5(64 if kind == "sd3" else 16)
    widths = (8, 8, 8, 16) if kind == "pixart" else (8, 16, 16)
    vae = diffusers.AutoencoderKL(
        latent_channels=2 if kind == "flux" else 4,
        norm_num_groups=8,
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        shift_factor=0.1,
    )
    if kind == "flux":
        told = {"joint_attention_dim": 16, "pooled_projection_dim": 32, "axes_dims_rope": (2, 2, 4)}
        return diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=clip(CLIPTextModel, tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=text,
            tokenizer_2=t5_tokenizer,
            transformer=diffusers.FluxTransformer2DModel(**SIZES, **told, in_channels=8, num_single_layers=2),
        )
    if kind == "pixart":
        told = {"cross_attention_dim": 32, "caption_channels": 16}
        return diffusers.PixArtAlphaPipeline(
            tokenizer=t5_tokenizer,
            text_encoder=text,
            vae=vae,  # 32 is a size that its pipeline knows, of the published ones
            transformer=diffusers.PixArtTransformer2DModel(**SIZES, **PICTURE, **told, sample_size=32),
            scheduler=diffusers.DPMSolverMultistepScheduler(),
        )
    told = {"joint_attention_dim": 64, "pooled_projection_dim": 64, "caption_projection_dim": 32}
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(**SIZES, **PICTURE, **told, sample_size=8, pos_embed_max_size=8),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=text,
        tokenizer_3=t5_tokenizer,
    )


def main(args):
    for kind in args.kinds:
        pipeline = random_transformer_pipeline(kind)
        pipeline.save_pretrained(Path(args.output_dir) / kind)
        count = sum(p.numel() for p in pipeline.transformer.parameters())
        print(f"{Path(args.output_dir) / kind}: a {type(pipeline).__name__}, {count:,} parameters in its transformer.")


if __name__ == "__main__":
    main(parse_args())
