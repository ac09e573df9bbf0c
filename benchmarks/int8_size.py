"""Bytes, coverage and memory of SD1.5 in fp16 and with INT8 and FP8 weights, component by component.

    python benchmarks/int8_size.py                  # SD1.5's architecture with random weights, and BK-SDM-Tiny's UNet
    python benchmarks/int8_size.py --no_memory      # bytes and coverage alone, which need no weights: seconds
    python benchmarks/int8_size.py --errors         # of tiny-sd's outputs, by the dtype of what is not INT8
    python benchmarks/int8_size.py --transformers   # bytes and coverage of FLUX.1-dev's, SD3's and PixArt-Sigma's

Peak memory is the resident set of a fresh process that loads the component from disk and runs it once, at a quarter of
the native side; "before" is that process with everything imported and nothing loaded. One JSON line per component.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

from common import shapes  # noqa: E402
from common.compression import quantization  # noqa: E402
from common.conditioning import encode_prompts  # noqa: E402
from common.contract import TINY_SD  # noqa: E402
from common.pipelines import load_pipeline  # noqa: E402

BLOCKS = {  # BK-SDM-Tiny: one layer per block, no middle, the deepest stage gone
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    "mid_block_type": None,
    "layers_per_block": 1,
}


TRANSFORMERS = {  # as their config.json has them
    "FLUX.1-dev": (FluxTransformer2DModel, {"guidance_embeds": True}),
    "SD3-medium": (
        SD3Transformer2DModel,
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    ),
    "PixArt-Sigma": (
        PixArtTransformer2DModel,
        {"attention_bias": True, "caption_channels": 4096, "use_additional_conditions": False},
    ),
}


def build(name):
    """A component of SD1.5's architecture; under a device context, on that device."""
    if name in TRANSFORMERS:
        cls, config = TRANSFORMERS[name]
        return cls(**config)
    if name == "vae":
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
        )
    if name == "text_encoder":
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        )
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, **(BLOCKS if name == "unet, BK-Tiny" else {}))


def counted(name, dtype):
    """{parameters, fp16_bytes, int8_bytes, covered, int8, not_int8, the same of fp8} of a component, on meta."""
    with torch.device("meta"):
        module, floats = (torch.nn.Module.to(build(name), dtype) for _ in range(2))
        quantization.quantize_model(floats, kind="fp8")
    before = quantization.bytes_of(module)
    quantization.quantize_model(module)
    after = quantization.coverage(module)
    return {
        "parameters": sum(after.values()),
        "fp16_bytes": before,
        "int8_bytes": quantization.bytes_of(module),
        "covered": quantization.covered(module),
        "int8": {kind: n for (kind, kept), n in after.items() if kept == torch.int8},
        "not_int8": {kind: n for (kind, kept), n in after.items() if kept != torch.int8},
        "fp8_bytes": quantization.bytes_of(floats),
        "fp8_covered": quantization.covered(floats),
    }


def write(name, kind, folder):
    """The component with random weights in `folder`, in fp16 or INT8."""
    with torch.device("meta"):
        module = build(name)
    module = torch.nn.Module.to(module, torch.float16).to_empty(device="cpu")
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.normal_(std=0.02)
        else:
            tensor.data.copy_(torch.arange(tensor.numel()).view_as(tensor))  # position ids
    if kind == "int8":
        quantization.quantize_model(module)
    module.save_pretrained(folder)


@torch.no_grad()
def errors():
    """Relative errors of tiny-sd's UNet, text encoder and decoder to FP32, in each dtype with and without INT8."""
    captions, generator = shapes.held_out_captions(16), torch.Generator().manual_seed(0)
    z, t = torch.randn(16, 4, 8, 8, generator=generator), torch.linspace(20, 999, 16).long()
    expected = None
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for int8 in (False, True):
            pipeline = load_pipeline(TINY_SD)
            for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
                if int8:
                    quantization.quantize_model(module, dtype=dtype)
                torch.nn.Module.to(module, dtype)
            text = encode_prompts(pipeline, captions, 32).prompt_embeds
            shared = text if expected is None else expected["text_encoder"]
            outputs = {
                "unet": pipeline.unet(z.to(dtype), t, shared.to(dtype)).sample.float(),
                "text_encoder": text.float(),
                "decoder": pipeline.vae.decode(z.to(dtype)).sample.float(),
            }
            expected = expected or outputs
            row = {name: ((outputs[name] - e).norm() / e.norm()).item() for name, e in expected.items()}
            print(json.dumps({"dtype": str(dtype), "int8": int8, **row}), flush=True)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def load_and_run(name, kind, folder, found):
    """Puts into `found` the peak resident bytes before and after the component was loaded and run once."""
    torch.set_num_threads(1)
    dtype = torch.float16 if kind == "fp16" else quantization.DTYPE
    before = peak()
    classes = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    module = classes.get(name, UNet2DConditionModel).from_pretrained(folder, dtype=dtype, use_safetensors=True)
    if name == "vae":
        module.decode(torch.randn(1, 4, 16, 16, dtype=dtype))
    elif name == "text_encoder":
        module(torch.zeros(1, 77, dtype=torch.long))
    else:
        module(torch.randn(1, 4, 16, 16, dtype=dtype), 500, torch.randn(1, 77, 768, dtype=dtype))
    found.put((before, peak()))


def in_fresh_process(work, *arguments):
    """What `work` puts into a queue, if anything, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    process = context.Process(target=work, args=(*arguments, *([found] if work is load_and_run else [])))
    process.start()
    result = found.get(timeout=1200) if work is load_and_run else None
    process.join()
    if process.exitcode:
        sys.exit(f"{work.__name__}{arguments} ended with {process.exitcode}")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no_memory", action="store_true", help="write and load no weights")
    parser.add_argument("--errors", action="store_true", help="errors by dtype alone, of tiny-sd")
    parser.add_argument("--transformers", action="store_true", help="of FLUX, SD3 and PixArt, without weights")
    args = parser.parse_args()
    if args.errors:
        return errors()
    names = TRANSFORMERS if args.transformers else ("unet", "unet, BK-Tiny", "text_encoder", "vae")
    args.no_memory = args.no_memory or args.transformers
    for name in names:
        row = {"component": name, **counted(name, torch.float16)}
        for kind in ("fp16", "int8") if not args.no_memory else ():
            with tempfile.TemporaryDirectory() as folder:
                in_fresh_process(write, name, kind, folder)
                row[f"{kind}_file"] = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
                row[f"{kind}_before"], row[f"{kind}_peak"] = in_fresh_process(load_and_run, name, kind, folder)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
