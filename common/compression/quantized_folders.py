"""Which folders hold quantized weights, from config files and headers alone, and where they are refused."""

import contextlib
import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open

from common.errors import ModelError

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")


def quantization_of(path, revision=None):
    """How the weights of a pipeline, model folder or file are quantized: "INT8 (torchao)", "4-bit (svdquant)", None.

    svdquant is nunchaku's, whose files say so in their headers, or have .qweight and .wscales for tensors.
    """
    configs = [_config(path, part, revision) for part in (None, *COMPONENTS)]
    files = [*Path(path).glob("*.safetensors"), *Path(path).glob("*/*.safetensors")]
    for file in [Path(path)] if Path(path).is_file() else files:
        with contextlib.suppress(SafetensorError, OSError, ValueError), safe_open(file, "pt") as tensors:
            packed = any(key.endswith((".qweight", ".wscales")) for key in tensors.keys())
            configs.append({"quantization_config": {"method": "svdquant"} if packed else None})
            declared = (tensors.metadata() or {}).get("quantization_config", "null")
            configs.append({"quantization_config": json.loads(declared)})
    for config in configs:
        declared = config.get("quantization_config")
        if declared:
            method = declared.get("quant_method") or declared.get("method") or "unnamed"
            words = json.dumps(declared).lower()
            four = any(word in words for word in ("svdquant", "int4", "fp4", "awq", "gptq", '"load_in_4bit": true'))
            return f"{'4-bit' if four else 'INT8' if 'int8' in words or '8bit' in words else 'quantized'} ({method})"
    return None


def _config(path, part, revision):
    """config.json of a component of a pipeline, or of `path` itself; {} where there is none that can be read."""
    try:
        if Path(path).exists():
            return json.loads((Path(path) / (part or "") / "config.json").read_text())
        return UNet2DConditionModel.load_config(path, subfolder=part, revision=revision)  # reads any config.json
    except (OSError, ValueError):
        return {}


def refuse_quantized(path, revision=None, flag="--pretrained_model_name_or_path"):
    """Raise ModelError, naming `flag`, where weights are quantized: they can't be trained, pruned or quantized."""
    found = quantization_of(path, revision)
    if found and found.startswith("4-bit"):
        raise ModelError(
            f"{flag} {path}: its weights are packed, {found}, and can't be pruned or trained: start from the FP16 or "
            "BF16 model that it was made from, and quantize what comes of it."
        )
    if found:
        raise ModelError(
            f"{flag} {path}: its weights are quantized, {found}, and can't be pruned or trained: start from the "
            "unquantized pipeline that it was made from (final/ beside final-int8/)."
        )


def saved_dtype(path, revision=None):
    """The dtype in which a quantized pipeline's unquantized rest was saved, which its text encoder's config names."""
    name = _config(path, "text_encoder", revision).get("dtype") or "bfloat16"
    return getattr(torch, name)
