"""Which folders and files hold quantized weights, by names, configs and headers alone; where that is refused."""

import contextlib
import importlib.util
import json
import os
import re
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open

from common.errors import ModelError

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
FLOAT8_PRODUCTS = "a CUDA GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell)"
# SVDQuant: what its tensors and files are called, and what nunchaku's published ones were made from.
PACKED = (".qweight", ".wscales", ".proj_down", ".lora_down", ".smooth_factor", ".smooth")
_PACKED_NAME = re.compile(r"svdq[-_](int4|fp4|nvfp4)|nunchaku", re.IGNORECASE)
_SIGNS = {  # words of a quantization_config, the first that fit
    "4-bit": ("svdquant", "nunchaku", "int4", "fp4", "awq", "gptq", '"load_in_4bit": true'),
    "FP8": ("float8", "fp8"),
    "INT8": ("int8", "8bit"),
}
MADE_FROM = {
    "flux.1-kontext-dev": "black-forest-labs/FLUX.1-Kontext-dev",
    "flux.1-krea-dev": "black-forest-labs/FLUX.1-Krea-dev",
    "flux.1-canny-dev": "black-forest-labs/FLUX.1-Canny-dev",
    "flux.1-depth-dev": "black-forest-labs/FLUX.1-Depth-dev",
    "flux.1-fill-dev": "black-forest-labs/FLUX.1-Fill-dev",
    "flux.1-schnell": "black-forest-labs/FLUX.1-schnell",
    "flux.1-dev": "black-forest-labs/FLUX.1-dev",
    "sdxl-turbo": "stabilityai/sdxl-turbo",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}


def quantization_of(path, revision=None):
    """How the weights of a pipeline, model folder or file are quantized: "INT8 (torchao)", "4-bit (svdquant)", None.

    FP8 is torchao's float8. svdquant is nunchaku's, see `is_packed`; diffusers has a form of it, "nunchaku_lite".
    """
    declared = _declared(path, revision)
    if declared:
        method = declared.get("quant_method") or declared.get("method") or "unnamed"
        words = json.dumps(declared).lower()
        for said, known in _SIGNS.items():
            if any(word in words for word in known):
                return f"{said} ({method})"
        return f"quantized ({method})"
    return None


def _declared(path, revision=None):
    """The quantization_config that names, config.json of a component or a file's header declare; {} for none."""
    if not Path(path).exists() and _PACKED_NAME.search(str(path)):
        return {"method": "svdquant"}
    found = [_config(path, part, revision).get("quantization_config") for part in (None, *COMPONENTS)]
    files = [*Path(path).glob("*.safetensors"), *Path(path).glob("*/*.safetensors")]
    for file in [Path(path)] if Path(path).is_file() else files:
        with contextlib.suppress(SafetensorError, OSError, ValueError), safe_open(file, "pt") as tensors:
            declared = json.loads((tensors.metadata() or {}).get("quantization_config", "null"))
            packed = sum(any(key.endswith(end) for key in tensors.keys()) for end in PACKED[:2])
            found.append(declared or ({"method": "svdquant"} if packed else None))
    return next((declared for declared in found if isinstance(declared, dict) and declared), {})


def _config(path, part, revision):
    """config.json of a component of a pipeline, or of `path` itself; {} where there is none that can be read."""
    try:
        if Path(path).exists():
            return json.loads((Path(path) / (part or "") / "config.json").read_text())
        return UNet2DConditionModel.load_config(path, subfolder=part, revision=revision)  # reads any config.json
    except (OSError, ValueError):
        return {}


def is_packed(path):
    """Whether `path` is nunchaku's SVDQuant: a file whose header says so or that has .qweight and .wscales for
    tensors, a folder of such files, or what is not here and has such a name."""
    return _declared(path).get("method") == "svdquant" if Path(path).exists() else bool(_PACKED_NAME.search(str(path)))


def unquantized_of(path):
    """The hub id of the model that nunchaku's quantized one was made from, by name, header or card; None: unknown."""
    path = Path(path)
    said = [path.name, path.parent.name]
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        with contextlib.suppress(SafetensorError, OSError), safe_open(file, "pt") as tensors:
            said += [file.name, json.dumps(tensors.metadata() or {})]
    for words in said:
        for name, model in MADE_FROM.items():
            if name in words.lower():
                return model
    for card in (path / "README.md", path.parent / "README.md"):
        if card.is_file() and (named := re.search(r"^base_model:[\s-]*(\S+/\S+)", card.read_text(), re.MULTILINE)):
            return named[1]
    return None


def refuse_packed(path, where):
    """Raise ModelError where nunchaku packed the weights in 4 bits: nothing can be cut or trained there."""
    if is_packed(path):
        raise ModelError(packed_words(path, "svdquant", where))


def packed_words(path, method, where):
    """What is said of packed weights that were to be pruned or trained, with the model to take instead."""
    model = unquantized_of(path)
    instead = f"the unquantized model, {model}" if model else "the FP16 or BF16 model that it was made from"
    return (
        f"{where}: its weights are packed in 4 bits ({method}), so nothing of it can be cut or trained: start from "
        f"{instead}, and quantize what comes of it."
    )


def refuse_quantized(path, revision=None, flag="--pretrained_model_name_or_path"):
    """Raise ModelError, naming `flag`, where weights are quantized: they can't be trained, pruned or quantized."""
    found = quantization_of(path, revision)
    if found and found.startswith("4-bit"):
        raise ModelError(packed_words(path, found.partition("(")[2].rstrip(")"), f"{flag} {path}"))
    if found:
        raise ModelError(
            f"{flag} {path}: its weights are quantized, {found}, and can't be pruned or trained: start from the "
            f"unquantized pipeline that it was made from (final/ beside final-{found.split()[0].lower()}/)."
        )


def saved_dtype(path, revision=None):
    """The dtype in which a quantized pipeline's unquantized rest was saved, which its text encoder's config names."""
    name = _config(path, "text_encoder", revision).get("dtype") or "bfloat16"
    return getattr(torch, name)


# What it takes to sample them


def capability():
    """(major, minor) of the CUDA GPU that is used; (0, 0) where there is none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def lacks_float8_products():
    """What multiplying in float8 needs and this machine has not, in words; "" where it has."""
    found = capability()
    if found >= (8, 9):
        return ""
    return f"{FLOAT8_PRODUCTS}, and " + (f"this one has {found[0]}.{found[1]}" if any(found) else "there is none here")


def check_runs_here(path, revision, where):
    """Raise ModelError, which names what is missing, where quantized weights can't be sampled on this machine."""
    declared = _declared(path, revision)
    method, words, found = declared.get("quant_method") or declared.get("method"), json.dumps(declared), capability()
    missing, lite = [], method == "nunchaku_lite"
    if "Float8DynamicActivation" in words:
        missing = [lacking] if (lacking := lacks_float8_products()) else []
    elif lite or method == "svdquant":
        package = "kernels" if lite else "nunchaku"
        if importlib.util.find_spec(package) is None:
            # PyPI's package of that name is another one.
            missing.append("the package kernels" if lite else "nunchaku's package, from its GitHub releases")
        if lite and os.environ.get("DIFFUSERS_TRUST_REMOTE_KERNELS", "").lower() not in ("1", "true", "yes", "on"):
            missing.append("DIFFUSERS_TRUST_REMOTE_KERNELS=true, for diffusers runs code from the hub for it")
        needed, name = ((10, 0), "10.0 (Blackwell)") if _four_bit_floats(path, words) else ((7, 5), "7.5 (Turing)")
        if found < needed or found[0] == 9:
            missing.append(f"a CUDA GPU of compute capability {name} or later, but Hopper")
        if not lite and unquantized_of(path) is None:
            missing.append("a name that says what it was made from, such as svdq-int4_r32-flux.1-dev.safetensors")
    if missing:
        found = quantization_of(path, revision)
        raise ModelError(f"{where}: its weights are {found}: to run them takes {'; and '.join(missing)}.")


def _four_bit_floats(path, words):
    """Whether packed weights are floats (NVFP4), which Blackwell alone multiplies, and not INT4."""
    return "fp4" in words.lower() or "fp4" in Path(path).name.lower()
