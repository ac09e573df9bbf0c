"""Pipelines: read one from its config files alone, load and freeze it, and compare two.

UNet pipelines of Stable Diffusion 1.x and 2.x (one text encoder) and of SDXL (two, with a pooled embedding and time
ids), from a folder or a hub id; safetensors only. Those of FLUX, SD3 and PixArt, whose denoiser is a transformer, are
for the scripts that only compress.
"""

import importlib
import inspect
import json
import logging
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FluxPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError

from common.compression import pruned_models
from common.compression.quantized_folders import (
    check_runs_here,
    is_packed,
    quantization_of,
    refuse_packed,
    refuse_quantized,
    saved_dtype,
    unquantized_of,
)
from common.conditioning import is_sdxl
from common.contract import CONTRACT, read_distillation
from common.diffusion import NoiseSchedule
from common.errors import ModelError, first_line
from common.model_files import (
    UNUSED,
    check_inputs,
    check_parts,
    check_place,
    check_weights,
    native_size,
    parts_of,
    weights_in,
)

PIPELINES = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
}
TRANSFORMER_PIPELINES = {
    "FluxPipeline": FluxPipeline,
    "StableDiffusion3Pipeline": StableDiffusion3Pipeline,
    "PixArtAlphaPipeline": PixArtAlphaPipeline,
    "PixArtSigmaPipeline": PixArtSigmaPipeline,
}


class _OnceFilter(logging.Filter):
    """Lets the pipelines' warning about a truncated caption pass once, not for every batch of a run."""

    said = False

    def filter(self, record):
        truncated = "truncated because CLIP" in record.getMessage()
        said, self.said = self.said, self.said or truncated
        return not (truncated and said)


for _pipeline_class in PIPELINES.values():
    logging.getLogger(_pipeline_class.__module__).addFilter(_OnceFilter())


def read_pipeline_config(
    path, revision=None, flag="--pretrained_model_name_or_path", transformers=False, quantized=False
):
    """(pipeline class, native resolution, VAE factor) of a folder or hub id, from names and config files alone.

    The native resolution is the UNet's sample_size times the VAE's factor; None where it has none. Raises ModelError,
    one sentence naming `flag`, where there is no pipeline of a known class, a part is absent, its UNet asks for other
    inputs, or its scheduler has no NoiseSchedule: before gigabytes are loaded. transformers: whether
    TRANSFORMER_PIPELINES are taken too; quantized: whether weights may be quantized, as only sampling takes them.
    """
    known = {**PIPELINES, **TRANSFORMER_PIPELINES} if transformers else PIPELINES
    where = f"{flag} {path}"
    if quantized and is_packed(path):  # nunchaku's transformer, which goes into the pipeline that it was made from
        check_runs_here(path, revision, where)
        path, revision = unquantized_of(path), None
    refuse_packed(path, where)
    check_place(path, where)
    if quantized:
        check_runs_here(path, revision, where)
    else:
        refuse_quantized(path, revision, flag)
    try:
        index = DiffusionPipeline.load_config(path, revision=revision)
        name = index["_class_name"]
        if name not in known:
            raise ModelError(f"{where}: it is a {name}; this script takes {' or '.join(known)}.")
        if Path(path).is_dir():
            check_parts(path, index, where)
        part = "unet" if name in PIPELINES else "transformer"
        denoiser = UNet2DConditionModel.load_config(path, subfolder=part, revision=revision)
        vae = AutoencoderKL.load_config(path, subfolder="vae", revision=revision)
        scheduler_class = getattr(diffusers, index["scheduler"][-1])
    except (OSError, KeyError, AttributeError, TypeError, json.JSONDecodeError) as error:
        raise ModelError(f"{where}: its config files can't be read ({first_line(error)})") from None
    try:
        scheduler = scheduler_class.from_pretrained(path, subfolder="scheduler", revision=revision)
        if name in PIPELINES:
            NoiseSchedule(scheduler)
    except (OSError, ValueError, ImportError, NotImplementedError) as error:
        # No file; an unknown prediction type or betas; a scheduler that needs scipy, say; one without a schedule.
        raise ModelError(f"{where}: {first_line(error)}.") from None
    factor, size = 2 ** (len(vae["block_out_channels"]) - 1), native_size(denoiser, part, where)
    if name in PIPELINES:
        check_inputs(name, denoiser, vae, where)
        return known[name], size and size * factor, factor
    # FLUX's config has no size of its own; transformers work on patches of 2 x 2 latents.
    return known[name], (size or 128) * factor, 2 * factor


def resolution_of(args, native, where):
    """--resolution, or else the native one. Raises ModelError where there is neither."""
    if not args.resolution and native is None:
        raise ModelError(f"{where}: unet/config.json has no sample_size: give --resolution.")
    return args.resolution or native


def component_class(path, name, revision=None):
    """The class of a pipeline's component where its folder (or hub id) says that it is a pruned one, else None.

    Of this repository's own file, never of the copy that lies beside the weights. Raises ModelError where it has no
    such class.
    """
    entry = DiffusionPipeline.load_config(path, revision=revision).get(name)
    if not isinstance(entry, list | tuple) or entry[0] != pruned_models.NAME:
        return None
    kind = str(entry[1])
    found = getattr(pruned_models, kind, None) if kind.startswith("Pruned") else None
    if found is None:
        raise ModelError(f"{path}: its {name} is a {kind}, which this version of the repository does not know.")
    return found


def load_whole(kind, path, where, subfolder="", **options):
    """A model in eval mode, every tensor of which comes from its safetensors files.

    kind: its class; path, or subfolder of it: where it lies. Raises ModelError, which names the folder and a tensor,
    where some are missing or too many: a library would fill in random ones, or leave some out.
    """
    name = f"{subfolder}/" if subfolder else "the model"
    options |= {"use_safetensors": True, "output_loading_info": True}
    try:
        module, info = kind.from_pretrained(path, subfolder=subfolder, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelError(f"{where}: {name} does not load ({first_line(error)}).") from None
    problems = {"lacks": "missing", "has another shape of": "mismatched", "has no place for": "unexpected"}
    for problem, field in problems.items():
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(f"{field}_keys") or ())
        keys = [key for key in keys if not key.endswith("position_ids")]  # of older files, and made anew
        if keys:
            files = ", ".join(file.name for file in weights_in(Path(path) / subfolder, options.get("variant")))
            said = f"{name} {problem} {len(keys)} tensors, e.g. {keys[0]} ({files or 'its weights'})"
            raise ModelError(f"{where}: {said}.")
    return module.eval()


def load_parts(path, where, without=(), **options):
    """{name: model} of all models of a pipeline's folder but those `without`, each of which is whole."""
    index, parts = DiffusionPipeline.load_config(path), {}
    for name in [name for name in parts_of(index) if name not in without]:
        entry, kind = index[name], component_class(path, name)
        if kind is None and entry[0] in ("diffusers", "transformers"):
            kind = getattr(importlib.import_module(entry[0]), entry[1], None)
        if kind is None:
            raise ModelError(f"{where}: model_index.json names a {entry[1]} of {entry[0]}, which is not known.")
        if issubclass(kind, torch.nn.Module):
            variant = options.get("variant") if weights_in(Path(path) / name, options.get("variant")) else None
            parts[name] = load_whole(kind, path, where, name, **{**options, "variant": variant})
    return parts


def compute_dtype(mixed_precision):
    """The dtype of what is frozen, by accelerate's name of a mixed precision."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision, torch.float32)


def local_folder(args):
    """The folder that the files of --pretrained_model_name_or_path lie in; those of a hub id are downloaded."""
    path = args.pretrained_model_name_or_path
    if Path(path).is_dir():
        return path
    return DiffusionPipeline.download(path, revision=args.revision, variant=args.variant, use_safetensors=True)


def load_pipeline(
    path, dtype=torch.float32, revision=None, variant=None, flag="--pretrained_model_name_or_path", without=()
):
    """A frozen pipeline in eval mode, from a folder or a hub id; safetensors only. without: parts that are left out.

    A quantized one comes in the dtype that the rest of it was saved in, whatever `dtype` says. Raises ModelError (one
    sentence naming `flag`) where there is no such pipeline.
    """
    where = f"{flag} {path}"
    pipeline_class, _, _ = read_pipeline_config(path, revision, flag, transformers=True, quantized=True)
    if is_packed(path):
        return freeze(load_nunchaku(path, pipeline_class, where))
    check_weights(path, variant, where)
    if found := quantization_of(path, revision):
        dtype = saved_dtype(path, revision)
        print(f"{path}: {found} weights, the rest in {dtype}, as saved.", flush=True)
    options = {"dtype": dtype, "use_safetensors": True}
    try:
        folder = path
        if not Path(path).is_dir():
            folder = pipeline_class.download(path, revision=revision, variant=variant, use_safetensors=True)
        parts = load_parts(folder, where, without, variant=variant, **options)
        parts.update({name: None for name in UNUSED if not (Path(folder) / name).is_dir()})
        parts.update(dict.fromkeys(without))
        if pipeline_class is StableDiffusionPipeline:
            parts.update(safety_checker=None, requires_safety_checker=False)
        known = inspect.signature(pipeline_class).parameters
        parts = {name: part for name, part in parts.items() if name in known}
        pipeline = pipeline_class.from_pretrained(folder, **parts, **options)
        if pipeline.vae is None:  # diffusers takes 8 then
            pipeline.vae_scale_factor = read_pipeline_config(path, revision, flag)[2]
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(f"{where}: the pipeline does not load ({first_line(error)})") from None
    check_tokenizers(pipeline, where)
    return freeze(pipeline)


def load_nunchaku(path, pipeline_class, where):
    """The pipeline that nunchaku's packed transformer was made from, in bfloat16, with that transformer in it."""
    try:
        from nunchaku import NunchakuFluxTransformer2dModel

        options = {"dtype": torch.bfloat16, "use_safetensors": True}
        transformer = NunchakuFluxTransformer2dModel.from_pretrained(str(path))
        return pipeline_class.from_pretrained(unquantized_of(path), transformer=transformer, **options)
    except ImportError:  # what PyPI has under that name is another package
        raise ModelError(f"{where}: the package nunchaku that is installed is not MIT HAN Lab's.") from None
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AssertionError, SafetensorError) as error:
        raise ModelError(f"{where}: nunchaku does not load it ({first_line(error)}).") from None


def freeze(pipeline):
    """The pipeline, its models in eval mode and without gradients, and without a bar of its own."""
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_tokenizers(pipeline, where):
    """ModelError where a tokenizer makes more of a caption than its text encoder has embeddings or positions for."""
    for name, tokenizer in pipeline.components.items():
        encoder = pipeline.components.get(name.replace("tokenizer", "text_encoder"))
        if not name.startswith("tokenizer") or tokenizer is None or encoder is None:
            continue
        embedded = encoder.get_input_embeddings().num_embeddings
        if len(tokenizer) > embedded:
            raise ModelError(f"{where}: {name}/ has {len(tokenizer)} tokens, and its text encoder embeds {embedded}.")
        positions = getattr(encoder.config, "max_position_embeddings", None)
        if positions is not None and tokenizer.model_max_length > positions:
            raise ModelError(
                f"{where}: {name}/tokenizer_config.json has no model_max_length, or one of more than the {positions} "
                "tokens that its text encoder reads."
            )


def default_guidance(path, revision=None, flag="--pretrained_model_name_or_path"):
    """The guidance scale that a stock pipeline samples with where none is given."""
    pipeline_class, _, _ = read_pipeline_config(path, revision, flag, transformers=True, quantized=True)
    return float(inspect.signature(pipeline_class.__call__).parameters["guidance_scale"].default)


def contract_of(path, revision=None, flag="--pretrained_model_name_or_path"):
    """read_distillation of a pipeline that is sampled; FLUX, SD3 and PixArt are guided as their classes are."""
    contract = read_distillation(path)
    if (Path(path) / CONTRACT).is_file():
        return contract
    pipeline_class, _, _ = read_pipeline_config(path, revision, flag, transformers=True, quantized=True)
    if pipeline_class in TRANSFORMER_PIPELINES.values():
        contract["guidance_scale"] = default_guidance(path, revision, flag)
    if pipeline_class is FluxPipeline:
        contract["guidance"] = "embedded"
    return contract


def keep_vae_right(pipeline):
    """SDXL's VAE overflows in half precision: in fp16 it stays in fp32."""
    if is_sdxl(pipeline) and pipeline.vae is not None and pipeline.vae.dtype == torch.float16:
        pipeline.vae.to(dtype=torch.float32)


def image_to_image(pipeline):
    """The pipeline that starts from an image, of the same parts."""
    kind = StableDiffusionXLImg2ImgPipeline if is_sdxl(pipeline) else StableDiffusionImg2ImgPipeline
    arguments = {**pipeline.config, **pipeline.components}  # from_pipe would cast, which quantized models refuse
    pipeline = kind(**{name: arguments[name] for name in inspect.signature(kind).parameters if name in arguments})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_unet(args, student_model=None):
    """A UNet to be trained, of --pretrained_model_name_or_path or a student: in fp32, from the weights as stored."""
    origin = {} if student_model else {"revision": args.revision, "variant": args.variant}
    path = student_model or args.pretrained_model_name_or_path
    where = f"{'--student_model' if student_model else '--pretrained_model_name_or_path'} {path}"
    kind = component_class(path, "unet", origin.get("revision")) or UNet2DConditionModel
    return load_whole(kind, path, where, "unet", dtype=torch.float32, **origin)


def set_up(module, args, *more):
    """Gradient checkpointing, memory format and compilation of a network that is trained; of `more` the last two.

    In place, so that parameter names stay those of the plain module.
    """
    if args.channels_last:
        for network in {module, *more}:
            network.to(memory_format=torch.channels_last)
    if args.gradient_checkpointing:
        module.enable_gradient_checkpointing()
    if args.torch_compile:
        for network in {module, *more}:
            network.compile()


def latent_shape(pipeline, resolution):
    """(C, H, W) of the latents of square images."""
    side = resolution // pipeline.vae_scale_factor
    return pipeline.unet.config.in_channels, side, side


def check_compatible(path, flag, teacher_path, teacher_revision=None):
    """Raise ModelError unless the student pipeline at `path` (of `flag`) has the teacher's latents and text width.

    From config files alone.
    """
    kinds = []
    for where, revision, name in (
        (path, None, flag),
        (teacher_path, teacher_revision, "--pretrained_model_name_or_path"),
    ):
        pipeline_class, _, factor = read_pipeline_config(where, revision, name)
        unet = UNet2DConditionModel.load_config(where, subfolder="unet", revision=revision)
        vae = AutoencoderKL.load_config(where, subfolder="vae", revision=revision)
        kinds.append(
            {
                "pipeline class": pipeline_class.__name__,
                "VAE factor": factor,
                "latent channels": vae.get("latent_channels"),
                "latents' scale": vae.get("scaling_factor"),
                "latents' shift": vae.get("shift_factor"),
                "UNet's input channels": unet["in_channels"],
                "UNet's output channels": unet["out_channels"],
                "text width": unet.get("encoder_hid_dim") or unet["cross_attention_dim"],
            }
        )
    for what, value in kinds[0].items():
        if value != kinds[1][what]:
            raise ModelError(f"{flag} {path}: its {what}, {value}, is not the teacher's, {kinds[1][what]}.")


def check_same_inputs(student, teacher, name):
    """Raise ModelError, of `name`, unless a pipeline has the other's noise schedule, prediction and text encoders."""
    ours, theirs = (NoiseSchedule(pipeline.scheduler) for pipeline in (student, teacher))
    every = torch.arange(theirs.num_train_timesteps)
    if ours.prediction_type != theirs.prediction_type or not torch.equal(ours.alpha(every), theirs.alpha(every)):
        raise ModelError(f"{name}: its noise schedule or prediction type is not the teacher's.")
    for part in ("text_encoder", "text_encoder_2"):
        encoder = getattr(teacher, part, None)
        if encoder and not same_weights(getattr(student, part).to(encoder.device, encoder.dtype), encoder):
            raise ModelError(f"{name}: its {part} is not the teacher's, which reads the captions of both.")


def same_weights(a, b):
    """Whether two modules have the same parameters and buffers, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[name].shape == b[name].shape and torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def with_guidance_input(unet, embedding_dim=256):
    """A copy of a UNet that takes the guidance scale as an input (Meng et al. 2023): `timestep_cond` of `predict`.

    The new layer, cond_proj, is zero, so the copy says what the UNet says whatever the scale. A UNet that has the
    input already is returned as it is.
    """
    if unet.config.time_cond_proj_dim is not None:
        return unet
    copy = type(unet).from_config({**unet.config, "time_cond_proj_dim": embedding_dim})
    missing, unexpected = copy.load_state_dict(unet.state_dict(), strict=False)
    assert missing == ["time_embedding.cond_proj.weight"] and not unexpected, (missing, unexpected)
    copy.time_embedding.cond_proj.weight.zero_()  # torch's own initialisation is random
    return copy.to(unet.device, unet.dtype).requires_grad_(False).eval()
