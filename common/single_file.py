"""Single files: a pipeline in one .safetensors of the original layout is converted to a folder once, and read from it.

SD1.x, SD2.x and SDXL, offline: assets/single_file has their configs and CLIP's tokenizer. Any other size of these
models needs its configs in a folder beside the file (model-config/ for model.safetensors), as export.py writes it. The
folder is kept where the hub's downloads are (HF_HOME), under a name that a changed file changes.
"""

import gzip
import hashlib
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from common.checkpoint import FinalFolder
from common.compression.quantized_folders import is_packed
from common.compression.students import empty_unet
from common.errors import ModelError, first_line
from common.original_layout import UNET, VAE, kind_of, original_tensors, strip

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "single_file"
_KINDS = {  # by a name that only a file of this kind has
    "sdxl": "conditioner.embedders.1.model.token_embedding.weight",
    "sd2": "cond_stage_model.model.token_embedding.weight",
    "sd1": "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
}
_WIDE = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_header(path):
    """({name: (shape, dtype)}, metadata) of a safetensors file; nothing for one that can't be read."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}, file.metadata() or {}
    except (OSError, SafetensorError):
        return {}, {}


def pipeline_folder(path, flag="--pretrained_model_name_or_path"):
    """The folder of the pipeline in the single file `path`, converted once; any other path comes back as it is.

    Raises ModelError, one sentence naming `flag`, for a .safetensors file that holds no pipeline that is known.
    """
    if path is None or Path(path).suffix != ".safetensors" or not Path(path).is_file() or is_packed(path):
        return path  # a packed one is nunchaku's, which common/pipelines.py reads or refuses
    path, where = Path(path).absolute(), f"{flag} {path}"
    tensors, metadata = read_header(path)
    kind = kind_of_file(tensors, where)
    configs = read_configs(path, kind, tensors)
    needed = check_tensors(tensors, configs, where)
    told = [path.stat().st_size, path.stat().st_mtime_ns, sorted(tensors), metadata, configs]
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]
    folder = Path(HF_HOME) / "single_files" / f"{path.stem}-{key}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # of several processes one converts
            if not folder.is_dir():
                print(f"{path.name}: {kind.upper()} in one file; its folder, made once, is {folder}.", flush=True)
                convert(path, {tensors[name][1] for name in needed}, configs, folder)
    except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{where}: it can't be converted ({first_line(error)}).") from None
    return str(folder)


def kind_of_file(tensors, where):
    """ "sd1", "sd2" or "sdxl", of the names in a file. Raises ModelError, which says what the file is instead."""
    if not tensors:
        raise ModelError(f"{where}: it is no safetensors file, or a damaged one.")
    if any(".lora_" in name or "lora." in name for name in tensors):
        raise ModelError(f"{where}: it is a LoRA, not a pipeline: give it as --lora_path, beside the model it is for.")
    if not any(name.startswith(f"{UNET}input_blocks.") for name in tensors):
        raise ModelError(
            f"{where}: it has no UNet in the original layout ({UNET}input_blocks.), so it is no single file of "
            "SD1.x, SD2.x or SDXL: give the folder of a diffusers pipeline."
        )
    if "edm_mean" in tensors:
        raise ModelError(f"{where}: it was trained for EDM's schedule, which these methods do not know.")
    if not any(name.startswith(VAE) for name in tensors):
        raise ModelError(
            f"{where}: it has no VAE ({VAE}), only a UNet: give a file, or a folder, of the whole pipeline."
        )
    for kind, name in _KINDS.items():
        if name in tensors:
            return kind
    raise ModelError(f"{where}: it has no text encoder of SD1.x, SD2.x or SDXL: give a file of the whole pipeline.")


def read_configs(path, kind, tensors):
    """{file: its JSON} of the pipeline in a file: of <stem>-config/ beside it, or of its kind as it was published."""
    beside = path.with_name(f"{path.stem}-config")
    if beside.is_dir():
        return {str(file.relative_to(beside)): json.loads(file.read_text()) for file in sorted(beside.rglob("*.json"))}
    configs = json.loads((ASSETS / f"{kind}.json").read_text())
    scheduler = configs["scheduler/scheduler_config.json"]
    if "v_pred" in tensors or (kind == "sd2" and predicts_v(path)):
        scheduler["prediction_type"] = "v_prediction"
        if kind == "sd2":
            configs["unet/config.json"]["sample_size"] = 96
    if "ztsnr" in tensors:
        scheduler.update(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return configs


def predicts_v(path):
    """Whether an SD2.x file predicts v, which only its weights tell: one bias of those that do is spread widely."""
    name = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    with safe_open(path, "pt") as file:
        return name in file.keys() and file.get_tensor(name).float().std(correction=0).item() > 0.09


def empty_parts(configs):
    """{component: model without memory for its weights} of the configs of a pipeline."""
    with torch.device("meta"):
        parts = {"unet": empty_unet(configs["unet/config.json"])}
        parts["vae"] = AutoencoderKL.from_config(configs["vae/config.json"])
        parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**configs["text_encoder/config.json"]))
        if "text_encoder_2/config.json" in configs:
            config = CLIPTextConfig(**configs["text_encoder_2/config.json"])
            parts["text_encoder_2"] = CLIPTextModelWithProjection(config)
    return parts


def check_tensors(tensors, configs, where):
    """The names of the tensors of models of these configs. ModelError unless a file has every one, in its shape."""
    needed = original_tensors(empty_parts(configs))
    for name, tensor in needed.items():
        if name not in tensors:
            raise ModelError(f"{where}: it lacks {name}: {_OTHER}")
        found = tensors[name][0]
        if [size for size in found if size != 1] != [size for size in tensor.shape if size != 1]:
            sizes = ("x".join(map(str, shape)) for shape in (found, tensor.shape))
            raise ModelError(f"{where}: its {name} is {' and not '.join(sizes)}: {_OTHER}")
    return list(needed)


_OTHER = (
    "it is none of the models as published, and a smaller or wider one needs its configs beside it, "
    "in a folder <name>-config/ (as export.py writes it); or give the folder of a diffusers pipeline."
)


def convert(path, dtypes, configs, folder):
    """Write the pipeline in the single file `path` to `folder`, in the widest of the dtypes that it has it in."""
    dtype = next((wide for name, wide in _WIDE.items() if name in dtypes), torch.float32)
    kind = StableDiffusionXLPipeline if "text_encoder_2/config.json" in configs else StableDiffusionPipeline
    with FinalFolder(folder) as final:
        write_configs(configs, final)
        pipeline = kind.from_single_file(str(path), config=str(final), local_files_only=True, dtype=dtype)
        for file in final.rglob("*.json"):
            if file.name == "config.json":  # written anew with the weights
                file.unlink()
        pipeline.save_pretrained(final)
        scheduler = final / "scheduler" / "scheduler_config.json"
        scheduler.write_text(json.dumps(configs["scheduler/scheduler_config.json"], indent=2) + "\n")


def write_configs(configs, folder):
    """The files of `read_configs` in a folder; a tokenizer of the published models is CLIP's own, and made here."""
    for name, content in configs.items():
        if name.startswith("tokenizer") and not name.endswith(".json"):
            clip_tokenizer(**content).save_pretrained(folder / name)
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def clip_tokenizer(pad_token):
    """The tokenizer of SD1.x, SD2.x and SDXL: OpenAI's byte-pair merges."""
    merges = gzip.decompress((ASSETS / "clip_merges.txt.gz").read_bytes()).decode().split("\n")
    symbols = list(bytes_to_unicode().values())
    vocab = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *(merge.replace(" ", "") for merge in merges)]
    ids = {token: i for i, token in enumerate([*vocab, "<|startoftext|>", "<|endoftext|>"])}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    return CLIPTokenizer(vocab=ids, merges=pairs, model_max_length=77, pad_token=pad_token)


def save_configs(pipeline, folder):
    """The configs and tokenizers of a pipeline in a folder, without its weights: what reads its single file needs."""
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            if hasattr(part, "save_config"):
                part.save_config(folder / name)
            else:
                part.config.save_pretrained(folder / name)
        elif part is not None:
            part.save_pretrained(folder / name)


# Who reads what

COMFYUI_SDXL = (
    (0, 0, 2, 2, 10, 10),
    (0, 0, 2, 2, 4, 4),
    (0, 0, 1, 1, 2, 2),
    (0, 2, 5),
    (0, 2, 6),
)  # transformers' depths
EVERY_TOOL = ("ComfyUI", "A1111", "Forge", "stable-diffusion.cpp")


def readers_of(parts, spread=False):
    """The tools that read a single file of these models, beside diffusers with its configs: a list of names.

    By their sources: ComfyUI takes a UNet of any number of layers if it is 320 wide at first and (SDXL) its
    transformers are as deep as those of a model it knows (SDXL, SSD-1B, Vega, KOALA); A1111 and Forge the models as
    published; stable-diffusion.cpp these and BK-SDM-Tiny with `spread` blocks. All need the VAE and the text encoders
    as published.
    """
    kind = kind_of(parts)
    theirs = empty_parts(json.loads((ASSETS / f"{kind}.json").read_text()))
    same = {name: shapes_of(part) == shapes_of(theirs[name]) for name, part in parts.items()}
    unet, published = parts["unet"], theirs["unet"].config
    others = all(same[name] for name in same if name != "unet")
    if all(same.values()) and not spread:
        return list(EVERY_TOOL)
    alike = ("cross_attention_dim", "addition_embed_type", "projection_class_embeddings_input_dim", "in_channels")
    known = others and all(unet.config[name] == published[name] for name in alike)
    widths = list(unet.config.block_out_channels)
    if not known or widths != list(published.block_out_channels)[: len(widths)]:
        return []
    if spread:
        return ["stable-diffusion.cpp"]
    depths = tuple(
        len(block.attentions[j].transformer_blocks) if hasattr(block, "attentions") else 0
        for block in unet.down_blocks
        for j in range(len(block.resnets))
    )
    return ["ComfyUI"] if kind != "sdxl" or depths in COMFYUI_SDXL else []


def is_tiny(unet):
    """Whether a UNet has BK-SDM-Tiny's blocks: three levels of one layer, and none in the middle."""
    config = unet.config
    return len(config.down_block_types) == 3 and config.layers_per_block == 1 and config.mid_block_type is None


def shapes_of(module):
    return {name: tuple(tensor.shape) for name, tensor in strip(module.state_dict()).items()}
