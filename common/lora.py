"""LoRAs: adapters on a UNet, saved with their alpha, loaded back, merged."""

import contextlib
import functools
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import Conv2d, Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open

from common.compression.quantization import layers_of, quantize_weights
from common.contract import file_metadata
from common.engines import named_parameters
from common.errors import UsageError, first_line
from common.pipelines import load_unet, with_guidance_input

WEIGHTS = "pytorch_lora_weights.safetensors"
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)  # of files that are no LoRA
FACTOR = re.compile(r"(?:\.lora_linear_layer|\.lora|_lora)\.(down|up)(?:\.weight)?$|\.lora_(A|B)\.weight$")
_PREFIXES = re.compile(r"^(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.)+")
_PEFT_FIELDS = set(LoraConfig.__dataclass_fields__)


def settle_lora(args):
    """The defaults of --lora_alpha and --lora_targets; refuses them where no LoRA is trained."""
    if not args.lora_rank and (args.lora_alpha or args.lora_targets or getattr(args, "quantize_frozen", None)):
        raise UsageError(
            "--lora_alpha, --lora_targets and --quantize_frozen are about a LoRA: add --lora_rank or leave them out."
        )
    args.lora_alpha = args.lora_alpha or 32.0
    args.lora_targets = args.lora_targets or ["to_q", "to_k", "to_v", "to_out.0"]


def add_lora(unet, args):
    """Add the adapters of --lora_rank, --lora_alpha and --lora_targets to a frozen UNet, trainable, in fp32.

    Raises UsageError where a target is no layer of the UNet, or one that can't be adapted.
    """
    names = [name for name, _ in unet.named_modules()]
    for target in args.lora_targets:  # peft ignores one that matches nothing beside one that does
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise UsageError(f"--lora_targets {target}: the UNet has no layer of that name.")
    try:
        unet.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=args.lora_targets))
    except ValueError as error:
        raise UsageError(f"--lora_targets: {first_line(error)}.") from None
    cast_training_params(unet, dtype=torch.float32)
    fold_wide_adapters(unet)


def fold_wide_adapters(unet):
    """Where an adapter costs more than its layer, let the layer compute with W + s B A instead of W, then s B A.

    Which is so where the rank is a large part of the width, as on small models: forward, and twice backward, an
    adapter's products are those of A and B; folded, one more product of the layer's size makes the gradient of its
    weight. In fp32 alone: rounded to half precision, a sum would lose what is small in it.
    """
    for layer in unet.modules():
        if not isinstance(layer, Linear | Conv2d):
            continue
        weight = layer.get_base_layer().weight
        if type(weight.data) is not torch.Tensor:  # a quantized one
            continue
        adapter = layer.lora_A["default"].weight.numel() + layer.lora_B["default"].weight.numel()
        if weight.dtype == torch.float32 and 3 * adapter > weight.numel():
            layer.forward = functools.partial(_folded, layer, layer.forward)


def _folded(layer, forward, x, *args, **kwargs):
    if layer.disable_adapters or layer.merged:
        return forward(x, *args, **kwargs)
    base, (down, up) = layer.get_base_layer(), (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    factors = base.weight.flatten(1), up.flatten(1), down.flatten(1)  # a convolution's up is 1x1
    weight = torch.addmm(*factors, alpha=layer.scaling["default"]).view_as(base.weight)
    if isinstance(layer, Linear):
        return F.linear(x, weight, base.bias)
    return F.conv2d(x, weight, base.bias, base.stride, base.padding, base.dilation)


def student_unet(args, pipeline, embedded=False):
    """The UNet that is trained, now the pipeline's: with --lora_rank the teacher's own, given adapters; else a copy.

    The copy is in fp32, from the weights as they are stored: the teacher's may be rounded. embedded: it takes its
    guidance scale as an input.
    """
    teacher = pipeline.unet
    if args.lora_rank:
        if args.quantize_frozen:
            quantize_weights(teacher, layers_to_quantize(teacher, args))
        add_lora(teacher, args)
        return teacher
    unet = with_guidance_input(load_unet(args)) if embedded else load_unet(args)
    pipeline.unet = unet.to(teacher.device).requires_grad_(True)
    return unet


def layers_to_quantize(unet, args):
    """Names of a UNet's layers that --quantize_frozen rounds: all but adapted convolutions, as peft wants them."""
    ends = tuple(f".{target}" for target in args.lora_targets)
    layers = dict(unet.named_modules())
    return [
        name
        for name in layers_of(unet)
        if not (isinstance(layers[name], torch.nn.Conv2d) and f".{name}".endswith(ends))
    ]


@contextlib.contextmanager
def without_adapters(unet):
    """Within the context a UNet with adapters is the one that it was; one without them is left alone."""
    adapted = bool(getattr(unet, "peft_config", None))
    if adapted:
        unet.disable_adapters()
    try:
        yield
    finally:
        if adapted:
            unet.enable_adapters()  # and on they stay, through the backward


def trainable(module):
    """{name: parameter} of what is trained of a module."""
    return {name: p for name, p in named_parameters(module).items() if p.requires_grad}


def save_lora(folder, pipeline):
    """The adapter of the pipeline's UNet as stock diffusers loads it: all of its tensors, and its alpha.

    The keys stay peft's. Converted ones come in two styles, of which the loader reads the first one's alone; and
    without the adapter's metadata it would forget alpha, and scale by 1.
    """
    unet = pipeline.unet
    type(pipeline).save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )


def merge_lora(pipeline, path):
    """The LoRA at `path` in the weights of the pipeline's UNet, as if they had been trained so."""
    load_adapter(pipeline, path, "default")
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()


def read_file(pipeline, path):
    """(tensors, metadata) of a LoRA of a file or folder, with the keys of diffusers or kohya; (None, None): a hub id.

    peft's own names, those of a UNet alone and those under diffusion_model. get diffusers' prefix; a file of peft's
    own has its alpha in the adapter_config.json beside it. Raises ValueError for keys that no rule here knows.
    """
    if not Path(path).exists():
        return None, None
    file, metadata, tensors = lora_file(path), None, {}
    with safe_open(file, "pt") as opened:
        declared = (opened.metadata() or {}).get("lora_adapter_metadata")
        metadata = json.loads(declared) if declared else None
        for key in opened.keys():
            plain = _PREFIXES.sub("", key)
            first = plain.partition(".")[0]
            if first in ("input_blocks", "middle_block", "output_blocks"):
                raise ValueError(
                    f"it has names of the original Stable Diffusion code ({key}), and not all of this UNet's layers: "
                    "give the model it was made for"
                )
            tensors[f"unet.{plain}" if hasattr(pipeline.unet, first) else plain] = opened.get_tensor(key)
    config = file.with_name("adapter_config.json")
    if metadata is None and config.is_file():
        fields = {key: value for key, value in json.loads(config.read_text()).items() if key in _PEFT_FIELDS}
        metadata = {f"unet.{key}": value for key, value in fields.items()}
    return tensors, metadata


def lora_file(path):
    """The weights of a LoRA: the file itself, or of a folder the one with diffusers' or peft's name, or its first."""
    path = Path(path)
    if path.is_file():
        return path
    files = [path / name for name in (WEIGHTS, "adapter_model.safetensors") if (path / name).is_file()]
    return (files or sorted(path.glob("*.safetensors")))[0]


def lora_tensors(pipeline, path):
    """(tensors, alphas, metadata) of a LoRA as diffusers loads them: the keys of diffusers, or None for alphas."""
    tensors, metadata = read_file(pipeline, path)
    options = {"use_safetensors": True, "unet_config": pipeline.unet.config, "return_lora_metadata": True}
    found, alphas, recorded = pipeline.lora_state_dict(path if tensors is None else tensors, **options)
    return found, alphas, metadata or recorded


def load_adapter(pipeline, path, name):
    """Put the LoRA at `path` on the pipeline as adapter `name`; one that is for the UNet alone, on the UNet alone."""
    tensors, alphas, metadata = lora_tensors(pipeline, path)
    if all(key.startswith("unet.") for key in tensors):  # else diffusers says that it misses those of a text encoder
        pipeline.load_lora_into_unet(tensors, alphas, pipeline.unet, name, metadata=metadata, _pipeline=pipeline)
    else:
        pipeline.load_lora_weights(path, adapter_name=name, use_safetensors=True)
    layers = {FACTOR.sub("", key) for key in tensors if key.startswith("unet.") and FACTOR.search(key)}
    adapted = [m for m in pipeline.unet.modules() if isinstance(m, BaseTunerLayer) and name in m.lora_A]
    if adapted and len(adapted) < len(layers):
        lost = len(layers) - len(adapted)
        print(f"LoRA: {lost} of its {len(layers)} adapters of the UNet found no place in this one.", flush=True)


def check_lora_path(path, flag="--lora_path"):
    """Whether the LoRA says how it is sampled (distillation.json, or as much in its header); UsageError: no LoRA."""
    where, folder = f"{flag} {path}", Path(path)
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")) or folder.name.startswith("checkpoint-"):
            finals = [str(f) for f in (folder / "final", folder.parent / "final") if f.is_dir()]
            hint = f" (did you mean {finals[0]}?)" if finals else ""
            raise UsageError(f"{where}: the folder holds no LoRA to load{hint}.")
        if not (folder / "distillation.json").is_file():
            return False
        for name in (WEIGHTS, "scheduler/scheduler_config.json"):
            if not (folder / name).is_file():
                raise UsageError(f"{where}: {name} is missing beside distillation.json.")
        return True
    if folder.is_file():
        if folder.suffix != ".safetensors":
            raise UsageError(f"{where}: only .safetensors files are loaded.")
        return "distillation" in file_metadata(path)
    elif not is_hub_id(path):
        raise UsageError(f"{where}: there is no such file or folder, and it is not a hub id (owner/name) either.")
    return False


def is_hub_id(path):
    """Whether it reads as owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) is not None


def load_lora(pipeline, path, scale=1.0, fuse=False, flag="--lora_path"):
    """The LoRA as an adapter (or fused), its rank and alpha said aloud: an alpha that got lost shows here."""
    try:
        load_adapter(pipeline, path, "student")
    except LOAD_ERRORS as error:
        raise UsageError(f"{flag} {path}: it does not load on this pipeline ({first_line(error)}).") from None
    config = getattr(pipeline.unet, "peft_config", {}).get("student")
    if config is None:
        raise UsageError(f"{flag} {path}: it has no weights for this pipeline's UNet.")
    print(f"LoRA: rank {config.r}, alpha {config.lora_alpha:g}, --lora_scale {scale:g}.", flush=True)
    pipeline.set_adapters(["student"], [scale])
    if fuse:
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
