"""INT8 and FP8 weights: quantize a pipeline, say what was covered, find the layers that mind most.

Weight-only: a weight is kept as INT8, or as a float of 8 bits, with a scale for each output channel (of a convolution:
and kernel position), and turned back at every call. Files and memory shrink to half of FP16's; time does not. Linear
layers, convolutions and text encoders' embeddings are covered, by torchao; what remains is in DTYPE. FP8 leaves
convolutions alone, as torchao's float8 does; and where the GPU multiplies float8, activations can be float8 too.
bitsandbytes covers linear layers alone.
"""

from copy import deepcopy
from importlib.metadata import version
from tempfile import TemporaryDirectory

import diffusers
import torch
import transformers
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8Tensor,
    Float8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    PerAxis,
    PerRow,
    quantize_,
)
from tqdm.auto import tqdm
from transformers.quantizers.auto import AutoHfQuantizer

from common.compression.calibration import output_of
from common.compression.quantized_folders import COMPONENTS, FLOAT8_PRODUCTS, lacks_float8_products
from common.errors import UsageError

BACKENDS = ("torchao", "bitsandbytes")
# Of what is not INT8, scales included. SDXL's VAE overflows in FP16; and it is what diffusers loads the rest of a
# torchao model in by itself, so that the parts of a pipeline agree even where the reader names no dtype.
DTYPE = torch.bfloat16
INT8 = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
FP8 = Float8WeightOnlyConfig(set_inductor_config=False)  # e4m3: 4 bits of exponent, 3 of mantissa; a scale per row
FP8_PRODUCTS = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
TORCHAO = (IntxUnpackedToInt8Tensor, Float8Tensor)
EDGES = ("conv_in", "conv_out", "quant_conv", "post_quant_conv", "x_embedder")  # small, and errors there spread


def layers_of(module, skip=(), kind="int8"):
    """Names of the layers of a model that are quantized: all of the kinds that can be, but edges and `skip`."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d) if kind == "int8" else (torch.nn.Linear,)
    if isinstance(module, transformers.PreTrainedModel):
        kinds += (torch.nn.Embedding,)
    layers = {name: layer for name, layer in module.named_modules(remove_duplicate=False) if isinstance(layer, kinds)}
    weights = [id(layer.weight) for layer in layers.values()]
    return [
        name
        for name, layer in layers.items()
        if name.rpartition(".")[2] not in EDGES
        and name not in ("proj_out", *skip)  # a transformer's last layer; the UNets' have longer names
        and weights.count(id(layer.weight)) == 1  # tied ones would be stored twice
    ]


@torch.no_grad()
def quantize_pipeline(pipeline, backend="torchao", skip=(), kind="int8", activations=False):
    """Give the models of a pipeline weights of `kind`, "int8" or "fp8", in place, from what they are; the rest: DTYPE.

    backend: of int8; skip: layers to leave, such as "unet.mid_block.resnets.0.conv1"; activations: of fp8, whether
    linear layers multiply in float8. Saved, the pipeline opens by stock `DiffusionPipeline.from_pretrained(folder,
    dtype=DTYPE)`. Raises UsageError where the hardware is not there.
    """
    check_backend(backend)
    if activations:
        check_float8_products()
    for component in COMPONENTS:
        module = getattr(pipeline, component, None)
        if module is None:
            continue
        left = [name.removeprefix(f"{component}.") for name in skip if name.startswith(f"{component}.")]
        if kind == "int8" and backend == "bitsandbytes":
            module = _by_bitsandbytes(module, left)
        else:
            module = quantize_model(module, left, kind=kind, activations=activations)
        pipeline.register_modules(**{component: module})  # in the index a pruned model's class is its own


def check_backend(backend):
    """UsageError where the backend of --int8_backend can't run here."""
    if backend == "bitsandbytes" and not torch.cuda.is_available():
        raise UsageError("--int8_backend bitsandbytes needs a CUDA GPU: use torchao.")


def check_float8_products():
    """UsageError where --fp8_activations can't run here."""
    if lacking := lacks_float8_products():
        raise UsageError(f"--fp8_activations needs {lacking}: leave it out, and the weights alone become FP8.")


def quantize_model(module, skip=(), dtype=DTYPE, kind="int8", activations=False):
    """A model with INT8 or FP8 weights by torchao, in place, registered so that saving and stock loading know."""
    names = set(layers_of(module, skip, kind))
    if kind == "int8":
        quantize_(module, INT8, filter_fn=lambda layer, name: name in names)
        torch.nn.Module.to(module, dtype)  # after it: scales come from the weights as they were; diffusers' own warns
    else:
        torch.nn.Module.to(module, dtype)  # before it: a float8 weight stays for the dtype that it was made from
        multiplied = {name for name in names if activations and multiplies_float8(module.get_submodule(name))}
        quantize_(module, FP8_PRODUCTS, filter_fn=lambda layer, name: name in multiplied)
        quantize_(module, FP8, filter_fn=lambda layer, name: name in names - multiplied)
    written = INT8 if kind == "int8" else FP8_PRODUCTS if activations else FP8
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding)
    left = [name for name, layer in module.named_modules() if isinstance(layer, kinds) and name not in names]
    if isinstance(module, transformers.PreTrainedModel):
        config = transformers.TorchAoConfig(written, modules_to_not_convert=left, include_input_output_embeddings=True)
        module.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
        module.hf_quantizer.validate_environment()
        module.config.quantization_config = config
        return module
    config = diffusers.TorchAoConfig(written, modules_to_not_convert=left)
    module.hf_quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=True)
    module.hf_quantizer.validate_environment()  # sets what save_pretrained asks for
    module.register_to_config(quantization_config=config)
    module.is_quantized = True
    return module


@torch.no_grad()
def quantize_weights(module, names):
    """INT8 weights of the layers of these names, where a model is only computed with: in place, the rest as it is."""
    names = set(names)
    quantize_(module, INT8, filter_fn=lambda layer, name: name in names)
    module.requires_grad_(False)


def multiplies_float8(layer):
    """Whether torch's float8 product takes a layer: it asks for multiples of 16 on both sides."""
    return isinstance(layer, torch.nn.Linear) and all(size % 16 == 0 for size in layer.weight.shape)


def _by_bitsandbytes(module, skip):
    """The module with INT8 linear layers on the GPU, by way of a folder: bitsandbytes quantizes what is loaded."""
    library = transformers if isinstance(module, transformers.PreTrainedModel) else diffusers
    config = library.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(skip) or None)
    with TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        return type(module).from_pretrained(folder, dtype=DTYPE, quantization_config=config, use_safetensors=True)


# What was covered


def stored_dtype(parameter):
    """The dtype that a parameter is kept in: of a quantized one that of its numbers of 8 bits."""
    return parameter.qdata.dtype if isinstance(parameter, TORCHAO) else parameter.dtype


def coverage(module):
    """{(kind of layer, dtype): parameters} of a model, such as {("Conv2d", torch.int8): 587964160, ...}."""
    counts, seen = {}, set()
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                key = type(layer).__name__, stored_dtype(parameter)
                counts[key] = counts.get(key, 0) + parameter.numel()
    return counts


def covered(module):
    """The share, 0 to 1, of a model's parameters that are kept in 8 bits."""
    counts = coverage(module)
    return sum(n for (_, dtype), n in counts.items() if dtype.itemsize == 1) / sum(counts.values())


def covered_notes(pipeline, backend="torchao", kind="int8", activations=False):
    """{name: value}, of a model card, of a quantized pipeline: the share of each component in 8 bits, and bytes."""
    models = {name: getattr(pipeline, name, None) for name in COMPONENTS}
    models = {name: module for name, module in models.items() if module is not None}
    shares = ", ".join(f"{name} {100 * covered(module):.1f} %" for name, module in models.items())
    size = sum(bytes_of(module) for module in models.values())
    convolutions = any(isinstance(layer, torch.nn.Conv2d) for module in models.values() for layer in module.modules())
    left = {"convolutions": f"{DTYPE}: torchao has float8 for linear layers alone"} if convolutions else {}
    if activations:
        left["linear layers"] = f"multiply in float8, which needs {FLOAT8_PRODUCTS}"
    needs = f"by {backend} {version(backend)}, which opening them needs"
    return {
        f"{kind.upper()} weights": f"{needs}; of the parameters {shares}",
        **(left if kind == "fp8" else {}),
        "the rest": f"{DTYPE}, the dtype to open it in",
        "bytes of the weights": f"{size:,}",
    }


def stored_tensors(module):
    """The state dict as it is written: a quantized weight as its numbers of 8 bits, scales and zero points."""
    state = {name: value.detach() for name, value in module.state_dict().items()}
    if any(isinstance(value, TORCHAO) for value in state.values()):
        state, _ = flatten_tensor_state_dict(state)
    return state


def bytes_of(module):
    """Bytes of a model's tensors as they are written."""
    return sum(value.numel() * value.element_size() for value in stored_tensors(module).values())


# What minds most


@torch.no_grad()
def sensitivity(module, calls):
    """{layer: relative error of the model's output where that layer alone has INT8 weights}, in the model's order.

    calls: recorded [(args, kwargs)] of its forward; the error is over all of them together.
    """
    expected = [output_of(module, call) for call in calls]
    size, found = sum(output.float().square().sum() for output in expected), {}
    for name in tqdm(layers_of(module), desc="sensitivity", leave=False):
        layer = module.get_submodule(name)
        weight, rounded = layer.weight, deepcopy(layer)
        quantize_(rounded, INT8, filter_fn=lambda *_: True)
        layer.weight = torch.nn.Parameter(rounded.weight.dequantize(), requires_grad=weight.requires_grad)
        errors = [(output_of(module, call) - e).float().square().sum() for call, e in zip(calls, expected)]
        layer.weight = weight
        found[name] = (sum(errors) / size).sqrt().item()
    return found


def worst(errors, count):
    """The `count` layers of the largest errors, the worst first."""
    return sorted(errors, key=errors.get, reverse=True)[:count]
