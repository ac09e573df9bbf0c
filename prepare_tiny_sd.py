"""Train a small pipeline from nothing, and its judges: the embedded default, or a teacher on your own pictures.

The embedded default, assets/tiny-sd with tiny-clip and tiny-reader, learns from scenes rendered on the fly
(common/shapes.py). With --data_dir or --dataset_name the same parts learn from a user's own small captioned pictures,
MNIST and CIFAR-10 among them, and <output_dir>/ gets teacher/, clip/ and reader/. On one GPU or a CPU:

    reader   a convolutional classifier of every attribute of a scene; of one's own pictures, of their captions, where
             these are classes (at most 1000 distinct ones, of 5 pictures each)
    vision   of shapes: tiny-clip's vision tower alone learns to read attributes, which contrast teaches it slowly
    clip     a CLIPModel, by contrast; of shapes also against captions with one attribute changed, or objects swapped
    vae      AutoencoderKL: pixels to four channels of latents at a quarter of the size; not with --vae_path
    unet     the text encoder and the UNet, together, epsilon-prediction with min-SNR weights
    decoder  the VAE's decoder alone goes on, on slightly noisy latents: the latents stay as the UNet knows them
    pipeline writes the pipeline, with the guidance scale that is best by its judges
    report   the figures of docs/tiny-sd.md

    python prepare_tiny_sd.py                                     # everything; run again to resume
    accelerate launch --num_processes 2 prepare_tiny_sd.py --parts unet
    python prepare_tiny_sd.py --data_dir mnist --resolution 32 --output_dir out/mnist
"""

import common  # noqa: F401  first: it silences what importing diffusers would say

# isort: split
import argparse
import functools
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from common import arguments, shapes
from common.contract import read_distillation, write_distillation
from common.errors import DataError, UsageError
from common.identity import check_same, identity_of
from common.judging.metrics import (
    ClipJudge,
    SceneReader,
    frechet_distance,
    judge_images,
    scene_accuracy,
    shapes_real_features,
)
from common.part_training import averaged_weights, train_part
from common.pipelines import load_pipeline, load_whole
from common.randomness import sample_generator
from common.run import on_main_process, run_script
from common.small_models import VAE_WIDTHS, WIDTHS, build_tokenizer, small_pipeline, to_image
from common.teacher_data import SCENES, Pictures
from common.teacher_objectives import (
    ClipObjective,
    DecoderObjective,
    ReaderObjective,
    UNetObjective,
    VaeObjective,
    VisionObjective,
)

PARTS = ("reader", "vision", "clip", "vae", "unet", "decoder", "pipeline", "report")
# By what the figures of a work folder are decided: run again with others of these, its checkpoints are not resumed.
IDENTITY = ("data_dir", "dataset_name", "image_column", "caption_column", "caption_template", "resolution", "latents")
IDENTITY += ("max_train_samples", "vae_path", "block_out_channels", "layers_per_block", "vae_block_out_channels")
IDENTITY += ("seed",)
REAL_PICTURES = 2000  # training pictures that guidance is chosen by, at most
PICTURES_ONLY = ("image_column", "caption_column", "resolution", "max_train_samples", "eval_data_dir", "vae_path")


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    add = parser.add_argument_group("pictures of one's own (default: rendered shapes)").add_argument
    add("--data_dir", help="captioned pictures in any format of training: a folder, or one file of MNIST or CIFAR-10")
    add("--dataset_name", help="hub id or folder of a `datasets` set, or 'shapes'")
    add("--eval_data_dir", help="held-out pictures that the report judges by (default: those trained on)")
    add("--image_column", help="image column (default: the first that looks like one)")
    add("--caption_column", help="caption column (default: the first that looks like one)")
    add("--caption_template", default="a photo of a {label}", help="caption of a class-label set")
    add("--resolution", type=arguments.positive_int, help="pixels per side, a multiple of 8 (default: 32)")
    add("--max_train_samples", type=arguments.positive_int, help="use only the first so many pictures")
    add("--vae_path", help="use this AutoencoderKL, a folder or hub id, instead of training one")
    add = parser.add_argument_group("training").add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="which parts to train or write")
    add("--reader_steps", type=arguments.positive_int, default=2000, help="updates of 64")
    add("--vision_steps", type=arguments.positive_int, default=2500, help="updates of 64")
    add("--clip_steps", type=arguments.positive_int, default=1500, help="updates of 32")
    add("--vae_steps", type=arguments.positive_int, default=4250, help="updates of 16")
    add("--unet_steps", type=arguments.positive_int, default=4200, help="updates of 64")
    add("--decoder_steps", type=arguments.positive_int, default=1000, help="updates of 16")
    add(
        "--block_out_channels",
        type=arguments.positive_int,
        nargs=3,
        default=list(WIDTHS),
        help="widths of the UNet's stages, multiples of 8",
    )
    add("--layers_per_block", type=arguments.positive_int, default=2, help="of the UNet; SD1.5 has 2")
    add(
        "--vae_block_out_channels",
        type=arguments.positive_int,
        nargs=3,
        default=list(VAE_WIDTHS),
        help="widths of the VAE's stages, multiples of 8",
    )
    add("--latents", type=arguments.positive_int, default=32768, help="training images encoded for the UNet, at most")
    add("--guidance_captions", type=arguments.positive_int, default=300, help="choose guidance on so many captions")
    add("--report_captions", type=arguments.positive_int, default=2000, help="judge so many held-out captions")
    add("--checkpointing_steps", type=arguments.positive_int, default=250, help="save every so many updates")
    add("--seed", type=arguments.seed, default=0, help="everything random derives from it")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", help="where the models go (default: assets; of one's own pictures outputs/teacher)")
    add("--work_dir", help="checkpoints, sample grids (default: outputs/tiny_sd; of one's own <output_dir>/work)")
    return parser.parse_args(argv)


def check_arguments(args):
    """Refuse, before anything loads, what can't work; settle the folders and the names in them."""
    own = args.data_dir is not None or args.dataset_name not in (None, "shapes")
    given = next((name for name in PICTURES_ONLY if getattr(args, name) is not None), None)
    if not own and given:
        raise UsageError(f"--{given} is about pictures of one's own: add --data_dir or --dataset_name.")
    args.output_dir = args.output_dir or ("outputs/teacher" if own else "assets")
    args.work_dir = args.work_dir or (str(Path(args.output_dir) / "work") if own else "outputs/tiny_sd")
    if own:
        args.resolution = args.resolution or shapes.IMAGE_SIZE
        if args.resolution % 8 or args.resolution < 16:
            raise UsageError(
                f"--resolution {args.resolution} is no multiple of 8 from 16 on, as stock pipelines need it: take 32 "
                "for the 28 pixels of MNIST."
            )
    for name in ("block_out_channels", "vae_block_out_channels"):
        if any(width % 8 for width in getattr(args, name)):
            raise UsageError(f"--{name} {' '.join(map(str, getattr(args, name)))}: multiples of 8 only.")
    args.parts = [part for part in PARTS if part in args.parts]
    left_out = {"vision"} if own else set()
    left_out |= {"vae", "decoder"} if args.vae_path else set()
    needs = {"clip": {"vision"}, "unet": {"vae"}, "decoder": {"vae"}, "pipeline": {"clip", "unet", "decoder"}}
    for part, needed in needs.items():
        for other in needed - left_out - set(args.parts) if part in args.parts else ():
            if not (Path(args.work_dir) / other / "checkpoint").is_dir():
                raise UsageError(f"--parts {part}: {other} comes before it, and {args.work_dir} has none.")
    args.parts = [part for part in args.parts if part not in left_out]
    names = ("teacher", "clip", "reader") if own else ("tiny-sd", "tiny-clip", "tiny-reader")
    return own, dict(zip(("pipeline", "clip", "reader"), (Path(args.output_dir) / name for name in names)))


def sample_vae(objective):
    pixels = objective.source.held_out(32)[0].to(next(objective.parameters()).device)
    decoded = objective.model(pixels).sample
    return to_image(torch.stack([pixels, decoded], dim=1).flatten(0, 1), columns=16)


def sample_unet(objective, vae):
    pipeline = build_pipeline(objective, vae)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        objective.source.held_out(24)[1],
        num_inference_steps=25,
        guidance_scale=4.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    return to_image(images * 2 - 1)


def build_pipeline(objective, vae):
    return small_pipeline(vae, objective.text_encoder, objective.tokenizer, objective.unet)


def given_vae(args):
    """The AutoencoderKL of --vae_path, frozen, with the scaling factor that it has. Raises ModelError, UsageError."""
    where = f"--vae_path {args.vae_path}"
    inside = (Path(args.vae_path) / "vae").is_dir()  # of a whole pipeline
    vae = load_whole(AutoencoderKL, args.vae_path, where, "vae" if inside else "").float().requires_grad_(False)
    if args.resolution % vae_factor(vae):
        raise UsageError(f"{where}: --resolution {args.resolution} is no multiple of its factor, {vae_factor(vae)}.")
    return vae


def unet_shape(args):
    return {"widths": args.block_out_channels, "layers": args.layers_per_block}


def vae_factor(vae):
    return 2 ** (len(vae.config.block_out_channels) - 1)


def trained_vae(args, device, source, part="vae"):
    """The VAE as `part` left it, frozen, with the scaling factor that gives its latents unit standard deviation."""
    objective = VaeObjective(source, args.vae_block_out_channels)
    objective.load_state_dict(averaged_weights(args, part))
    vae = objective.model.to(device).eval().requires_grad_(False)
    pixels = source.samples(args.seed, range(min(1000, args.latents)))[0]
    with torch.no_grad():
        latents = torch.cat([vae.encode(part.to(device)).latent_dist.mean for part in pixels.split(100)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae


@torch.no_grad()
def cached_latents(args, vae, accelerator, source, seed):
    """Scaled latents (M, C, h, w) and labels (M, attributes) of training samples, once encoded and kept."""
    # The scaling factor tells one VAE from another.
    file = Path(args.work_dir) / f"latents-{seed}-{args.latents}-{vae.config.scaling_factor}.safetensors"
    if accelerator.is_main_process and not (file.is_file() and "labels" in load_file(file)):
        kept, latents, labels = source.kept(args.latents), [], []
        for start in tqdm(range(0, len(kept), 64), desc="latents"):
            pixels, _, found = source.read(seed, kept[start : start + 64])
            latents.append(
                vae.encode(pixels.to(accelerator.device)).latent_dist.mean.cpu() * vae.config.scaling_factor
            )
            labels.append(found)
        save_file({"latents": torch.cat(latents).contiguous(), "labels": torch.cat(labels)}, file)
    accelerator.wait_for_everyone()
    return load_file(file)


@torch.no_grad()
def teacher_images(pipeline, captions, steps, guidance_scale, accelerator, batch_size=100):
    """Pixels (N, 3, R, R) in [-1, 1] of N captions, image i from noise seeded by i; shared by the processes."""
    pipeline.set_progress_bar_config(disable=True)
    share = -(-len(captions) // accelerator.num_processes)
    mine = range(len(captions))[accelerator.process_index * share :][:share]
    parts = []
    for start in tqdm(
        range(0, share, batch_size),
        desc=f"{steps} steps, w = {guidance_scale:g}",
        disable=not accelerator.is_main_process,
    ):
        indices = mine[start : start + batch_size]
        images = pipeline(
            [captions[i] for i in indices],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[sample_generator(0, i, 0) for i in indices],
            output_type="pt",
        ).images
        parts.append(images.to(accelerator.device) * 2 - 1)
    return accelerator.gather(torch.cat(parts)).cpu()


def write_pipeline(args, accelerator, tokenizer, vae, folders, source):
    """The pipeline, and beside it the guidance scale that is best on training captions.

    Of shapes, the one with the best scene accuracy by tiny-reader; of pictures the least Fréchet distance to them, on
    the features of the CLIP that was trained on them.
    """
    weights, folder = averaged_weights(args, "unet"), folders["pipeline"]
    vae = vae or trained_vae(args, accelerator.device, source, "decoder")
    size = vae.config.latent_channels, *[source.size // vae_factor(vae)] * 2
    objective = UNetObjective(tokenizer, torch.empty(1, *size), source=source, **unet_shape(args))
    objective.load_state_dict(weights)
    pipeline = build_pipeline(objective.eval(), vae).to(dtype=torch.float16)
    if accelerator.is_main_process:
        pipeline.save_pretrained(folder)
        # transformers loads what the config says, diffusers fp32 unless told otherwise: so they load alike.
        config = folder / "text_encoder" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    accelerator.wait_for_everyone()
    pipeline.to(accelerator.device, torch.float32)
    count, scales, found = args.guidance_captions, (1.0, 1.5, 2.0, 3.0, 4.0), {}
    if source is SCENES:
        scales, reader = (1.5, 2.0, 3.0, 4.0, 6.0), SceneReader.from_pretrained(folders["reader"])
        captions = [shapes.caption_of(shapes.training_scene(args.seed + 100, i)[0]) for i in range(count)]
    else:
        judge = ClipJudge(folders["clip"])
        captions = source.read(0, source.kept(count))[1]
        real = judge.pooled_features(source.read(0, source.kept(REAL_PICTURES))[0])
    for scale in scales:
        pixels = teacher_images(pipeline, captions, 50, scale, accelerator)
        if source is SCENES:
            figure, found[scale] = "scene accuracy", scene_accuracy(reader, pixels, captions).float().mean().item()
        else:
            figure, found[scale] = "Fréchet (clip)", frechet_distance(real, judge.pooled_features(pixels))
        accelerator.print(f"guidance scale {scale:g}: {figure} {found[scale]:.3f}", flush=True)
    if accelerator.is_main_process:
        best = max(found, key=found.get) if source is SCENES else min(found, key=found.get)
        sampling = {"steps": None, "timesteps": None, "guidance": "cfg", "guidance_scale": best}
        write_distillation(folder, method="prepare_tiny_sd", parent=None, **sampling, target=None)
        (Path(args.work_dir) / "guidance.json").write_text(json.dumps(found) + "\n")


def report(args, accelerator, folders, source, held_out):
    """The figures of docs/tiny-sd.md, on held-out captions, with 95 % bootstrap intervals: report.json."""
    judge = ClipJudge(folders["clip"])
    reader = SceneReader.from_pretrained(folders["reader"]) if source.attributes else None
    pipeline = load_pipeline(folders["pipeline"]).to(accelerator.device)
    guidance_scale = read_distillation(folders["pipeline"])["guidance_scale"]
    real, captions = held_out.held_out(args.report_captions)
    images = teacher_images(pipeline, captions, 50, guidance_scale, accelerator)
    if not accelerator.is_main_process:
        return
    with torch.no_grad():
        decoded = torch.cat([pipeline.vae(part.to(accelerator.device)).sample.cpu() for part in real.split(100)])
    shown = {
        "real renders" if source is SCENES else "real pictures": real,
        "VAE reconstructions": decoded,
        f"teacher, 50 DDIM steps, w = {guidance_scale:g}": images,
    }
    features = shapes_real_features(judge, len(real)) if source is SCENES else judge.pooled_features(real)
    if source.classes and not set(captions) <= set(source.classes):
        reader = None
    rows = {name: judge_images(pixels, captions, judge, reader, features) for name, pixels in shown.items()}
    psnr = (10 * torch.log10(4 / (decoded.clamp(-1, 1) - real).pow(2).mean(dim=(1, 2, 3)))).mean().item()
    print(f"VAE reconstructions: PSNR {psnr:.1f} dB")
    figures = {"scene_accuracy": "scene accuracy", "class_accuracy": "class accuracy", "r_precision": "R-precision"}
    figures = {name: head for name, head in figures.items() if any(name in row for row in rows.values())}
    heads = [*figures.values(), "CLIP score", f"Fréchet ({folders['clip'].name})"]
    print(f"| | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}")
    for name, row in rows.items():
        cells = [f"{row[key][0]:.3f} [{row[key][1]:.3f}, {row[key][2]:.3f}]" for key in figures]
        cells += [f"{row['clip_score'][0]:.1f}", f"{row['frechet']:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")
        del row["per_image"]
    (Path(args.work_dir) / "report.json").write_text(json.dumps({"psnr": psnr, **rows}, indent=1) + "\n")
    to_image(images[:48], columns=12).save(Path(args.work_dir) / "contact_sheet.png")


def eval_pictures(args):
    """The Pictures of --eval_data_dir. Raises UsageError."""
    try:
        return Pictures(argparse.Namespace(**{**vars(args), "max_train_samples": None}), args.eval_data_dir)
    except DataError as error:
        raise UsageError(str(error).replace("--data_dir", "--eval_data_dir")) from None


def check_work_dir(args):
    """CheckpointError where the work folder was begun with other data, or flags that change what its parts are."""
    identity = identity_of(argparse.Namespace(**{name: getattr(args, name) for name in IDENTITY}))
    file = Path(args.work_dir) / "run.json"
    if file.is_file():
        check_same(args.work_dir, json.loads(file.read_text()), identity)
        return
    Path(args.work_dir).mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(identity, indent=1) + "\n")


def main(args):
    own, folders = check_arguments(args)
    source = Pictures(args, args.data_dir, args.dataset_name) if own else SCENES
    held_out = eval_pictures(args) if args.eval_data_dir else source
    vae = given_vae(args) if args.vae_path else None
    accelerator = Accelerator(cpu=None if torch.accelerator.is_available() else True)
    if vae is not None:
        vae.to(accelerator.device)
    on_main_process(accelerator, lambda: check_work_dir(args))
    tokenizer = build_tokenizer(source.captions if own else None)
    torch.manual_seed(args.seed)

    def train(part, objective, batch_size, peak, sample=None):
        steps, seed = getattr(args, f"{part}_steps"), args.seed + PARTS.index(part)
        return train_part(part, objective, steps, batch_size, peak, seed, args, accelerator, sample)

    if "reader" in args.parts and source.attributes:
        train("reader", ReaderObjective(source), 64, 1e-3).model.save_pretrained(folders["reader"])
    elif "reader" in args.parts:
        accelerator.print("No reader: the captions are no classes, of which each has pictures enough.")
    if "vision" in args.parts:
        train("vision", VisionObjective(tokenizer), 64, 1e-3)
    if "clip" in args.parts:
        objective = ClipObjective(tokenizer, None if own else averaged_weights(args, "vision"), source)
        train("clip", objective, 32, 5e-4).model.half().save_pretrained(folders["clip"])
        tokenizer.save_pretrained(folders["clip"])
    if "vae" in args.parts:
        train("vae", VaeObjective(source, args.vae_block_out_channels), 16, 1.5e-3, sample_vae)
    if "unet" in args.parts:
        encoder = vae or trained_vae(args, accelerator.device, source)
        cached = cached_latents(args, encoder, accelerator, source, args.seed + PARTS.index("unet"))
        objective = UNetObjective(tokenizer, **cached, source=source, **unet_shape(args))
        train("unet", objective, 64, 1e-3, functools.partial(sample_unet, vae=encoder))
    if "decoder" in args.parts:
        train(
            "decoder",
            DecoderObjective(averaged_weights(args, "vae"), source, args.vae_block_out_channels),
            16,
            1e-3,
            sample_vae,
        )
    if "pipeline" in args.parts:
        write_pipeline(args, accelerator, tokenizer, vae, folders, source)
    if "report" in args.parts:
        report(args, accelerator, folders, source, held_out)


if __name__ == "__main__":
    run_script(main, parse_args())
