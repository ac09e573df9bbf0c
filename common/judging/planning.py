"""What evaluate.py judges, on which captions and against which real images: decided before any model loads.

From flags and small files alone; every function raises UsageError where the flags don't fit what they name.
"""

from dataclasses import dataclass, field
from pathlib import Path

from common import shapes
from common.compression.quantized_folders import is_packed
from common.contract import comes_from_tiny_sd, file_metadata, pipeline_source, read_distillation, sampling_guidance
from common.data import read_data
from common.errors import UsageError
from common.judging.image_sets import image_files, open_file, real_dataset, real_folder, real_shapes
from common.lora import check_lora_path, is_hub_id, lora_file
from common.model_files import weight_files
from common.pipelines import contract_of, read_pipeline_config, resolution_of
from common.sampling import read_prompts_file
from common.single_file import pipeline_folder

NUM_IMAGES = 200  # unless the flag, a folder or the captions say otherwise


@dataclass
class Model:
    """One thing that is judged: a pipeline, a LoRA or a folder of images."""

    path: str
    kind: str  # "pipeline", "lora" or "images"
    resolution: int
    pipeline: dict | None = None  # source of what is loaded
    contract: dict = field(default_factory=dict)  # distillation.json
    steps: list = field(default_factory=list)
    guidance_scale: float | None = None
    files: list = field(default_factory=list)  # of a folder of images


def plan_models(args):
    """The Models, the reference first; prints what each is sampled with. Raises UsageError."""
    args.pretrained_model_name_or_path = pipeline_folder(args.pretrained_model_name_or_path)
    asked = list(dict.fromkeys(args.models))
    reference = args.reference or asked[0]
    models = [plan_model(path, args) for path in dict.fromkeys([reference, *asked])]
    first = models[0]
    if first.kind == "images" and args.reference_steps:
        raise UsageError(f"--reference_steps is about a pipeline, and {reference} is a folder of images.")
    if first.kind != "images":
        most = args.reference_steps or max(first.steps)
        first.steps = list(dict.fromkeys([most, *(first.steps if reference in asked else [])]))
    if args.guidance_scale is not None and all(model.guidance_scale != args.guidance_scale for model in models):
        raise UsageError(f"--guidance_scale {args.guidance_scale:g}: no model takes it.")
    counts = {len(model.files): model.path for model in models if model.kind == "images"}
    if args.num_images:
        counts.setdefault(args.num_images, "--num_images")
    if len(counts) > 1:
        said = ", ".join(f"{count} ({where})" for count, where in counts.items())
        raise UsageError(f"The numbers of images differ: {said}; figures of unequal numbers can't be compared.")
    args.num_images = next(iter(counts), None)
    sizes = {model.resolution: model.path for model in models}
    if args.lpips_trunk_path and len(sizes) > 1:
        said = ", ".join(f"{size} ({path})" for size, path in sizes.items())
        raise UsageError(f"LPIPS compares images of one size, and these are of {said} pixels: give --resolution.")
    if args.lpips_trunk_path and sum(len(model.steps) or 1 for model in models) == 1:
        raise UsageError("--lpips_trunk_path: LPIPS compares two outputs: name a second model or --reference.")
    return models


def plan_model(path, args, flag="--models"):
    """The Model of a folder, file or hub id. Raises UsageError, in a sentence that begins with `flag` and the path."""
    where, folder = f"{flag} {path}", Path(path)
    carries = "distillation" in file_metadata(path)  # a LoRA in one file, as export.py writes it
    if carries or not (folder / "model_index.json").is_file() and any(folder.glob("*.safetensors")):
        if not check_lora_path(path, flag):
            raise UsageError(
                f"{where}: a LoRA without distillation.json does not say how it is sampled; inference.py "
                "--lora_path takes it."
            )
        contract = read_distillation(path)
        source = pipeline_source(args, contract, path)
        return plan_sampling(Model(path, "lora", native_size(source, args, flag), source, contract), args)
    if folder.is_file():
        path = pipeline_folder(path, flag)
        folder = Path(path)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        files = image_files(folder)
        if not files:
            finals = [str(f) for f in (folder / "final", folder / "lora" / "final") if f.is_dir()]
            hint = f" (did you mean {finals[0]}?)" if finals else ""
            raise UsageError(f"{where}: the folder holds no pipeline, no LoRA and no image{hint}.")
        if len(files) == 1:
            raise UsageError(f"{where}: the folder holds one image, and statistics need two at least.")
        return Model(path, "images", args.resolution or min(open_file(files[0]).size), files=files)
    if not folder.exists() and not is_hub_id(path) and not is_packed(path):
        raise UsageError(f"{where}: there is no such folder, and it is not a hub id (owner/name) either.")
    source = {"path": path, "revision": args.revision, "variant": args.variant}
    size = native_size(source, args, flag, transformers=True)
    return plan_sampling(Model(path, "pipeline", size, source, contract_of(path, args.revision, flag)), args)


def native_size(source, args, flag, transformers=False):
    """Pixels per side that a pipeline is sampled at; transformers: whether it may be one of FLUX, SD3 or PixArt."""
    options = {"flag": flag, "transformers": transformers, "quantized": True}
    _, size, factor = read_pipeline_config(source["path"], source["revision"], **options)
    size = resolution_of(args, size, f"{flag} {source['path']}")
    if size % factor:
        raise UsageError(f"--resolution {size} is not a multiple of {factor}, the factor of {source['path']}.")
    return size


def bytes_on_disk(model, parts):
    """Bytes of the weight files of a pipeline's models `parts` (names), and of the LoRA on it."""
    files = [file for name in parts for file in weight_files(model.pipeline, name)]
    if model.kind == "lora":
        files.append(lora_file(model.path))
    return sum(file.stat().st_size for file in files)


def plan_sampling(model, args):
    """Steps and guidance of a pipeline or LoRA: as saved, unless a flag says otherwise."""
    given = None if model.contract["guidance"] == "baked" else args.guidance_scale
    model.guidance_scale, why = sampling_guidance(model.contract, given, "--guidance_scale")
    trained = model.contract.get("steps")
    bound = trained and model.contract.get("target") == "next"  # one that re-noises (x0) takes other counts too
    asked = None if args.trained_steps and bound else args.steps
    model.steps = list(dict.fromkeys(asked or [trained or 50]))
    print(f"{model.path}: guidance {why}.", flush=True)
    return model


def sources_of(models, paths):
    """What results.weights_of takes, of the Models at these paths: pipelines, LoRAs with theirs, folders of images."""
    sources = []
    for model in models:
        if model.path in paths:
            sources += [model.pipeline] if model.pipeline else []
            sources += [{"path": model.path}] if model.kind == "lora" else []
            sources += [{"path": model.path, "images": model.files}] if model.kind == "images" else []
    return [source for number, source in enumerate(sources) if source not in sources[:number]]


def plan_captions(args, models):
    """(captions or None, their data set or None, whether they are the held-out ones of shapes). Raises UsageError."""
    pipelines = [model.pipeline["path"] for model in models if model.kind != "images"]
    drawn = args.dataset_name == "shapes" or any(comes_from_tiny_sd(model.path) for model in models if model.pipeline)
    data = args.data_dir or args.dataset_name not in (None, "shapes")
    if args.held_out_split != "all" and (args.prompts_file or data or not (drawn or pipelines)):
        raise UsageError(f"--held_out_split {args.held_out_split} is about the held-out captions of shapes alone.")
    if args.prompts_file:
        return read_prompts_file(args.prompts_file), None, False
    if data:
        args.center_crop, args.random_flip, args.max_train_samples = True, False, None
        args.resolution, asked = models[0].resolution, args.resolution
        dataset = read_data(args)
        args.resolution = asked
        wanted = min(dataset.size, args.num_images or NUM_IMAGES)
        return [dataset.captions(index)[0] for index in range(wanted)], dataset, False
    if drawn:
        if args.held_out_split != "all":  # of all there may be several images of each
            shapes.check_count("--num_images", args.num_images or 0, args.held_out_split)
        captions = shapes.held_out_captions(split=args.held_out_split)
        named = f"(--held_out_split {args.held_out_split})"
        print(f"Captions: held-out ones of shapes, of {len(captions)} {named}.", flush=True)
        return captions, None, True
    if pipelines:
        raise UsageError(
            f"{pipelines[0]} needs captions: add --prompts_file, --data_dir or --dataset_name "
            "(--dataset_name shapes asks for shapes)."
        )
    return None, None, False


def check_captions(captions, models, num_images):
    """UsageError where the captions can't be those of a folder's images: as many for each, in the same order."""
    folder = next((model.path for model in models if model.kind == "images"), None)
    if captions is None or folder is None or num_images % len(captions) == 0:
        return
    said = f"{folder} has {num_images} images, and there are {len(captions)} captions"
    if len(captions) < num_images:
        raise UsageError(f"--models {said}: an image without its caption shifts all the others; mend either of them.")
    print(f"Note: {said}: the first {num_images} are taken for its.", flush=True)


def plan_real_images(args, dataset, drawn, resolution):
    """The RealImages that the Fréchet distances are taken to, or None. Raises UsageError."""
    if args.real_dir:
        return real_folder(args.real_dir, resolution, args.num_real_images)
    if dataset is not None:
        return real_dataset(dataset, args.num_real_images or min(dataset.size, args.num_images))
    if drawn:
        return real_shapes(args.num_real_images, args.held_out_split)
    for flag in ("inception_path", "num_real_images"):
        if getattr(args, flag):
            raise UsageError(f"--{flag}: there are no real images: add --data_dir, --dataset_name or --real_dir.")
