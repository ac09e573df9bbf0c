"""What the files of a pipeline must be, found out from their names and configs before anything loads.

A function whose name begins with `check` raises ModelError: one sentence, that names the flag, the file and the key.
"""

import re
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache

from common.compression.quantized_folders import is_packed, unquantized_of
from common.errors import ModelError

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts that no method needs: one may be absent
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
CONFIGS = {"scheduler": ("scheduler_config.json",)}  # of a part that is no model
_VARIANT = re.compile(r"model\.([^.]+?)(?:-\d+-of-\d+)?\.safetensors$")
TOKENIZER = ("tokenizer.json", "vocab.json", "spiece.model", "sentencepiece.bpe.model")


def check_place(path, where):
    """`path` is the folder of a pipeline, or reads as a hub id."""
    folder = Path(path)
    if folder.suffix in PICKLES and folder.is_file():
        raise ModelError(f"{where}: it is a pickle, which is never opened: take the model's .safetensors files.")
    if folder.is_file():
        raise ModelError(
            f"{where}: it is one file, and the folder of a pipeline is needed here; --pretrained_model_name_or_path "
            "takes a .safetensors file of SD1.x, SD2.x or SDXL too."
        )
    if folder.exists() and not (folder / "model_index.json").is_file():
        finals = [str(final) for final in (folder / "final", folder / "lora" / "final") if final.is_dir()]
        hint = f" (did you mean {finals[0]}?)" if finals else ""
        raise ModelError(f"{where}: the folder has no model_index.json, so it is not a diffusers pipeline{hint}.")
    if not folder.exists() and (str(path).startswith((".", "/", "~")) or str(path).count("/") != 1):
        raise ModelError(f"{where}: there is no such folder, and it is not a hub id (owner/name) either.")


def parts_of(index):
    """Names of the parts that a model_index.json names and that methods need."""
    named = [name for name, entry in index.items() if isinstance(entry, list | tuple) and entry[1] is not None]
    return [name for name in named if not name.startswith("_") and name not in UNUSED]


def check_parts(folder, index, where):
    """Every part that model_index.json names, and that is needed, has its config in the folder."""
    for name in parts_of(index):
        files = TOKENIZER if name.startswith("tokenizer") else CONFIGS.get(name, ("config.json",))
        if not (Path(folder) / name).is_dir():
            raise ModelError(f"{where}: model_index.json names a {name}, and there is no folder {name}/.")
        if not any((Path(folder) / name / file).is_file() for file in files):
            raise ModelError(f"{where}: {name}/ has no {files[0]}.")


def check_weights(path, variant, where):
    """Every model in the folder of a pipeline has safetensors weights, of the variant or else of none."""
    for config in sorted(Path(path).glob("*/config.json")):
        folder = config.parent
        if folder.name in UNUSED or weights_in(folder, variant) or weights_in(folder):
            continue
        variants = sorted({match[1] for file in folder.glob("*.safetensors") if (match := _VARIANT.search(file.name))})
        if variants:
            raise ModelError(f"{where}: the weights in {folder.name}/ are of a variant: add --variant {variants[0]}.")
        pickled = [file.name for file in folder.iterdir() if file.suffix in PICKLES]
        said = f", only {pickled[0]}, a pickle, which is never opened" if pickled else ""
        raise ModelError(f"{where}: {folder.name}/ has no .safetensors weights{said}.")


def check_inputs(name, unet, vae, where):
    """The UNet's config asks for what the methods give it: noisy latents, timesteps and text.

    name: of the pipeline's class; unet, vae: configs.
    """
    latents, xl = vae.get("latent_channels", 4), "XL" in name
    said = f"{where}: unet/config.json has"
    channels = unet.get("in_channels", 4)
    if channels != latents:
        raise ModelError(
            f"{said} in_channels {channels}, and the VAE's latents have {latents}: a UNet that is given an "
            "image or a mask beside them, as for inpainting, is not what these methods train."
        )
    known = {"addition_embed_type": ["text_time" if xl else None], "encoder_hid_dim_type": [None, "text_proj"]}
    for key in ("addition_embed_type", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds"):
        if unet.get(key) not in known.get(key, [None]):
            raise ModelError(f"{said} {key} {unet.get(key)!r}, an input that a {name} is not given.")


def native_size(config, part, where):
    """sample_size, the latents' pixels per side: of a config that has it as a list too; None where it has none."""
    size = config.get("sample_size")
    if isinstance(size, list | tuple):
        if len(set(size)) != 1:
            raise ModelError(f"{where}: {part}/config.json has sample_size {list(size)}; only squares are trained.")
        size = size[0]
    if size is not None and not isinstance(size, int):
        raise ModelError(f"{where}: {part}/config.json has sample_size {size!r}, which is no number.")
    return size


def weights_in(folder, variant=None):
    """The weight files of one variant, or of none, in the folder of one model: a list."""
    name = "(diffusion_pytorch_)?model" + (rf"\.{re.escape(variant)}" if variant else "")
    files = Path(folder).glob("*.safetensors")
    return [file for file in files if re.fullmatch(rf"{name}(-\d+-of-\d+)?\.safetensors", file.name)]


def weight_files(source, component):
    """The weight files of a component of the pipeline that `source` (path, and revision, variant) names: a list.

    As they are loaded: of the variant where the component has it, else of none.
    """
    path = source["path"]
    if is_packed(path):  # nunchaku's file is the transformer; the rest is of the model that it was made from
        if component == "transformer":
            owner, name, file = ([*str(path).split("/", 2), "", ""])[:3]
            here = path if Path(path).is_file() else try_to_load_from_cache(f"{owner}/{name}", file)
            return [Path(here)] if here else []
        path, source = unquantized_of(path), {}
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(path, revision=source.get("revision"), local_files_only=True))
    return weights_in(folder / component, source.get("variant")) or weights_in(folder / component)
