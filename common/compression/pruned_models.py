"""Models whose layers were pruned to widths of their own, which no stock config can express.

Needs nothing but diffusers and transformers: a copy of this file lies beside the weights of every model saved by it,
so that `from_pretrained(..., trust_remote_code=True)` opens it where this repository is not. `config.pruned` is
{layer: its sizes}: [out, in] of a linear layer or convolution, [groups, channels] of a group normalisation, [heads] of
an attention; the layers it does not name are those of the stock class.
"""

import inspect
import shutil
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FluxTransformer2DModel,
    ModelMixin,  # noqa: F401  diffusers looks in this file for the base of what it loads
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import register_to_config
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,  # noqa: F401, I001  likewise
)

NAME = "pruned_models"  # of this file without its ending, wherever a copy lies: model_index.json says it
sys.modules.setdefault(NAME, sys.modules[__name__])


def resize(model, sizes):
    """Give the layers of `model` that `sizes` names new weights of those sizes, which are to be loaded; in place."""
    for name, size in sizes.items():
        layer = model.get_submodule(name)
        if hasattr(layer, "heads"):  # an attention of diffusers: the layers in it are named by themselves
            inner = layer.inner_dim // layer.heads * size[0]
            for attribute in ("inner_dim", "inner_kv_dim"):
                if hasattr(layer, attribute):
                    setattr(layer, attribute, inner)
            layer.heads = size[0]
            continue
        if isinstance(layer, torch.nn.Linear):
            new = torch.nn.Linear(size[1], size[0], layer.bias is not None)
        elif isinstance(layer, torch.nn.Conv2d):
            same = {option: getattr(layer, option) for option in ("kernel_size", "stride", "padding", "dilation")}
            new = torch.nn.Conv2d(size[1], size[0], bias=layer.bias is not None, **same)
        else:
            new = torch.nn.GroupNorm(*size, layer.eps, layer.affine)
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).register_module(child, new.to(layer.weight.device, layer.weight.dtype))


def keep_this_file(folder):
    """A copy of this file beside the weights in `folder`."""
    copy = Path(folder) / f"{NAME}.py"
    if not copy.exists():
        shutil.copyfile(__file__, copy)


def _pruned(stock):
    """The class Pruned<stock> of a diffusers model: the stock model, resized as its argument `pruned` says."""
    initialise = stock.__init__.__wrapped__  # without what registers the arguments in the config

    def __init__(self, pruned=None, **config):
        initialise(self, **config)
        resize(self, pruned or {})

    def save_pretrained(self, save_directory, *args, **kwargs):
        stock.save_pretrained(self, save_directory, *args, **kwargs)
        keep_this_file(save_directory)

    # Which entries of a config are arguments is read from the signature.
    signature = inspect.signature(initialise)
    pruned = inspect.Parameter("pruned", inspect.Parameter.KEYWORD_ONLY, default=None)
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), pruned])
    body = {"__init__": register_to_config(__init__), "save_pretrained": save_pretrained, "__module__": NAME}
    return type(f"Pruned{stock.__name__}", (stock,), body)


def _pruned_text_encoder(stock):
    """The class Pruned<stock> of a CLIP text encoder, resized as `config.pruned` says."""

    def __init__(self, config):
        stock.__init__(self, config)
        resize(self, getattr(config, "pruned", {}))

    def save_pretrained(self, save_directory, *args, **kwargs):
        stock.save_pretrained(self, save_directory, *args, **kwargs)
        keep_this_file(save_directory)

    return type(
        f"Pruned{stock.__name__}",
        (stock,),
        {"__init__": __init__, "save_pretrained": save_pretrained, "__module__": NAME},
    )


PrunedUNet2DConditionModel = _pruned(UNet2DConditionModel)
PrunedAutoencoderKL = _pruned(AutoencoderKL)
PrunedFluxTransformer2DModel = _pruned(FluxTransformer2DModel)
PrunedSD3Transformer2DModel = _pruned(SD3Transformer2DModel)
PrunedPixArtTransformer2DModel = _pruned(PixArtTransformer2DModel)
PrunedCLIPTextModel = _pruned_text_encoder(CLIPTextModel)
PrunedCLIPTextModelWithProjection = _pruned_text_encoder(CLIPTextModelWithProjection)
