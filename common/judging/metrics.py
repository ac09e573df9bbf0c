"""Judges of generated images: CLIP score, R-precision and Fréchet distance by a CLIP, readers of scenes and classes.

Pixels are float (B, 3, H, W) in [-1, 1], as generated; every judge clamps and resizes them itself. Whatever a judge
returns is on the CPU.
"""

import functools
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, CLIPModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from common import shapes
from common.conditioning import decode_latents
from common.errors import UsageError, first_line
from common.randomness import sample_generator
from common.shapes import ATTRIBUTES, SECOND_OBJECT

BATCH = 64  # images or captions per forward
_CLIP = "torch.nn.functional.interpolate, bicubic, antialias, the shortest side; then the middle square"
RESIZING = {  # how each judge brings images to its size, with which library: for what results.json says
    "clip": _CLIP,
    "preference": _CLIP,
    "reader": "torch.nn.functional.interpolate, area",
    "inception": "torch_fidelity, bilinear as TensorFlow 1 has it, to 299 pixels",
    "lpips": "none",
}


class SceneReader(nn.Module):
    """Reads every attribute of a rendered scene. Pixels (B, 3, 32, 32) in [-1, 1] to logits per attribute.

    With `captions`, distinct ones, it is a class reader: its one attribute, "caption", is which of them is shown.
    """

    def __init__(self, width=32, captions=None, size=shapes.IMAGE_SIZE):
        super().__init__()
        self.config = {"width": width} if captions is None else {"width": width, "captions": captions, "size": size}
        self.captions, self.size = captions, size
        layers, channels = [], 3
        for out, stride in ((width, 1), (2 * width, 2), (3 * width, 2), (3 * width, 1), (3 * width, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1), nn.GroupNorm(8, out), nn.SiLU()]
            channels = out
        side = -(-size // 8)  # after three strides of 2
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side**2, 256), nn.SiLU())
        attributes = ATTRIBUTES if captions is None else {"caption": len(captions)}
        self.heads = nn.ModuleDict({name: nn.Linear(256, classes) for name, classes in attributes.items()})

    def forward(self, pixel_values):
        features = self.features(pixel_values)
        return {name: head(features) for name, head in self.heads.items()}

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps(self.config) + "\n")
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, Path(folder) / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder):
        reader = cls(**json.loads((Path(folder) / "config.json").read_text()))
        reader.load_state_dict({k: v.float() for k, v in load_file(Path(folder) / "model.safetensors").items()})
        reader.path = str(folder)
        return reader.eval().requires_grad_(False)


def scenes_right(logits, scenes):
    """Whether every attribute that a scene has was read right: bool (B,). `scenes`: long (B, 8)."""
    right = torch.stack([logits[name].argmax(-1) == scenes[:, i] for i, name in enumerate(ATTRIBUTES)], dim=1)
    right[:, SECOND_OBJECT] |= (scenes[:, 1] == 0)[:, None]
    return right.all(dim=1)


def scene_accuracy(reader, pixels, captions):
    """Whether every attribute that each caption names was read right in its image: bool (B,).

    `reader`: a SceneReader; `pixels` (B, 3, H, W) in [-1, 1]; `captions`: B shapes captions.
    Raises ValueError for a caption that is not a shapes caption, or another number of captions than of images.
    """
    check_pixels(pixels, captions)
    scenes = [shapes.scene_of(caption) for caption in captions]
    if None in scenes:
        raise ValueError(f"Scene accuracy needs shapes captions, which this is not: {captions[scenes.index(None)]!r}")
    return scenes_right(_read(reader, pixels), torch.tensor(scenes))


def class_accuracy(reader, pixels, captions):
    """The same of a class reader: whether each image is read as its own caption, of all that the reader knows."""
    check_pixels(pixels, captions)
    if unknown := set(captions) - set(reader.captions):
        raise ValueError(f"Class accuracy needs captions that the reader knows, which this is not: {min(unknown)!r}")
    numbers = torch.tensor([reader.captions.index(caption) for caption in captions])
    return _read(reader, pixels)["caption"].argmax(-1) == numbers


def read_back(reader, pixels, captions):
    """{"scene_accuracy" or "class_accuracy": bool (B,)}, by the kind of the reader; see the two above."""
    accuracy = scene_accuracy if getattr(reader, "captions", None) is None else class_accuracy
    return {accuracy.__name__: accuracy(reader, pixels, captions)}


@torch.no_grad()
def _read(reader, pixels):
    """Logits per attribute of pixels of any size, on the CPU."""
    device, size, parts = next(reader.parameters()).device, getattr(reader, "size", shapes.IMAGE_SIZE), []
    for part in pixels.split(BATCH):
        part = part.to(device).float().clamp(-1, 1)
        if part.shape[-2:] != (size, size):
            part = F.interpolate(part, (size, size), mode="area")
        parts.append({name: values.cpu() for name, values in reader(part).items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def check_pixels(pixels, captions=None):
    """Raises ValueError unless `pixels` is float (B, 3, H, W), B > 0, with as many `captions` when they are given."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or len(pixels) == 0 or not pixels.is_floating_point():
        raise ValueError(f"Pixels must be float (B, 3, H, W) in [-1, 1], got {pixels.dtype} {tuple(pixels.shape)}")
    if captions is not None and len(captions) != len(pixels):
        raise ValueError(f"Every image needs one caption, got {len(pixels)} images and {len(captions)} captions")


def bootstrap_interval(values, samples=1000, level=0.95, seed=0):
    """Mean of per-sample `values` (N,) and its percentile bootstrap interval: floats (mean, low, high).

    The same seed resamples the same positions, whatever the values. Raises ValueError unless `values` is
    one-dimensional, finite and not empty.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"A bootstrap interval needs one row of finite values, got shape {values.shape}")
    chosen = np.random.default_rng(seed).integers(len(values), size=(samples, len(values)), dtype=np.int32)
    low, high = np.quantile(values[chosen].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


class ClipJudge:
    """A frozen fp32 CLIPModel with its tokenizer, from a local folder or a hub id.

    Images are resized (bicubic, shortest edge, then the centre) to the vision tower's size and normalised as the
    folder's image processor says; a local folder without one, as assets/tiny-clip, takes pixels in [-1, 1] as they
    are. Text features are kept by caption, since the same captions judge many models.
    Raises ValueError, naming the path, where no complete CLIPModel in safetensors with a tokenizer is there.
    """

    def __init__(self, path, device="cpu"):
        self.path, problem = str(path), f"No CLIP judge at {str(path)!r}: "
        try:
            model_type = AutoConfig.from_pretrained(path).model_type
            # As of transformers 5 a checkpoint loads in its saved dtype, here fp16.
            self.model, loading = CLIPModel.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.mean, self.std = normalisation(path)
        except Exception as error:  # whatever a file can have wrong: OSError, ValueError, SafetensorError and others
            raise ValueError(problem + "a folder or hub id with a CLIPModel in safetensors is needed.") from error
        # transformers fills whatever is missing with random weights, and makes up a tokenizer of two tokens.
        if model_type != "clip" or loading["missing_keys"]:
            raise ValueError(problem + f"this is no complete CLIPModel (model type {model_type!r}).")
        if not 2 < len(self.tokenizer) <= self.model.config.text_config.vocab_size:
            raise ValueError(problem + f"its tokenizer, of {len(self.tokenizer)} tokens, is not the model's.")
        self.device = torch.device(device)
        self.model.to(self.device).eval().requires_grad_(False)
        self.rows, self.table = {}, torch.empty(0, self.model.config.projection_dim)  # row of a caption, all features

    def preprocess(self, pixels):
        """Pixels (B, 3, H, W) in [-1, 1] to what the vision tower takes: (B, 3, S, S), normalised."""
        size, (height, width) = self.model.config.vision_config.image_size, pixels.shape[-2:]
        pixels = pixels.to(self.device).float()
        if (height, width) != (size, size):
            scale = size / min(height, width)
            height, width = max(size, round(height * scale)), max(size, round(width * scale))
            pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
            top, left = (height - size) // 2, (width - size) // 2
            pixels = pixels[..., top : top + size, left : left + size]
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (self.mean, self.std))
        return ((pixels.clamp(-1, 1) + 1) / 2 - mean) / std

    @torch.no_grad()
    def pooled_features(self, pixels):
        """Unnormalised pooled output of the vision tower, for the Fréchet distance: (B, hidden).

        Raises ValueError unless `pixels` is float (B, 3, H, W).
        """
        check_pixels(pixels)
        parts = [self.model.vision_model(self.preprocess(part)).pooler_output for part in pixels.split(BATCH)]
        return torch.cat(parts).cpu()

    @torch.no_grad()
    def project(self, pooled):
        """Normalised image features (B, D) of pooled features (B, hidden)."""
        return F.normalize(self.model.visual_projection(pooled.to(self.device)), dim=-1).cpu()

    def image_features(self, pixels):
        """Normalised image features: (B, D). Raises ValueError unless `pixels` is float (B, 3, H, W)."""
        return self.project(self.pooled_features(pixels))

    @torch.no_grad()
    def text_features(self, captions):
        """Normalised text features: (B, D). A caption is encoded once in the judge's life."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.rows]
        length, parts = self.model.config.text_config.max_position_embeddings, [self.table]
        for start in range(0, len(new), BATCH):
            tokens = self.tokenizer(
                new[start : start + BATCH],
                padding="max_length",
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
            # CLIP's text tower is causal and pools at the end-of-text token: the padding behind it needs no mask.
            output = self.model.get_text_features(tokens.input_ids.to(self.device))
            parts.append(F.normalize(output.pooler_output, dim=-1).cpu())
        self.table = torch.cat(parts)
        self.rows.update({caption: len(self.rows) + i for i, caption in enumerate(new)})
        return self.table[[self.rows[caption] for caption in captions]]


def normalisation(path):
    """Mean and std (of pixels in [0, 1]) that the CLIP at `path` was trained with."""
    files = [Path(path) / name for name in ("preprocessor_config.json", "processor_config.json")]
    if Path(path).is_dir() and not any(file.is_file() for file in files):
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    processor, _ = ImageProcessingMixin.get_image_processor_dict(path)
    return processor.get("image_mean", OPENAI_CLIP_MEAN), processor.get("image_std", OPENAI_CLIP_STD)


def clip_scores(image_features, text_features):
    """100 * max(0, cosine) of each pair of features (B, D), (B, D): (B,).

    Hessel et al. (2021) with the customary weight of 100 (torchmetrics' too) in place of their 2.5.
    Raises ValueError where the shapes differ.
    """
    if image_features.shape != text_features.shape:
        raise ValueError(f"Pairs of features needed, got {image_features.shape} and {text_features.shape}")
    return 100 * F.cosine_similarity(image_features, text_features, dim=-1).clamp(min=0)


def preference_scores(judge, pooled, captions):
    """exp(logit_scale) * cosine of images, by a preference model's pooled features (B, hidden), and captions: (B,).

    The score of Kirstain et al. (2023), PickScore; `judge`: a ClipJudge. It is not clipped, as clip_scores are.
    Raises ValueError for another number of captions than of images.
    """
    if len(pooled) != len(captions):
        raise ValueError(f"Every image needs one caption, got {len(pooled)} images and {len(captions)} captions")
    cosines = F.cosine_similarity(judge.project(pooled), judge.text_features(captions), dim=-1)
    return judge.model.logit_scale.exp().cpu() * cosines


@functools.cache
def shapes_distractors(caption, index, count=99, seed=0):
    """`count` other captions for the R-precision of shapes caption `index`: a tuple, drawn from (seed, index).

    Up to half are hard negatives, swapped colours and swapped objects first (there are 32 at most); the others are
    held-out captions. Raises ValueError where `caption` is not a shapes caption.
    """
    scene = shapes.scene_of(caption)
    if scene is None:
        raise ValueError(f"Not a shapes caption: {caption!r}")
    rng = np.random.default_rng([seed, index])
    hard = shapes.hard_negatives(scene, rng, sum(ATTRIBUTES.values()))  # more than there are: all of them, shuffled
    # A swap changes two attributes or more, every other hard negative one.
    hard.sort(key=lambda other: sum(a != b for a, b in zip(shapes.scene_of(other), scene)) == 1)
    distractors = dict.fromkeys(hard[: count // 2])
    held_out = shapes.held_out_captions()
    for position in rng.permutation(len(held_out)):
        if len(distractors) >= count:
            break
        if held_out[position] != shapes.caption_of(scene):
            distractors[held_out[position]] = None
    return tuple(distractors)


def caption_distractors(captions, index, count=99, seed=0):
    """The other distinct captions of the set, for the R-precision of captions[index]: a list, `count` at most.

    Where there are more than `count`, they are drawn from (seed, index).
    """
    others = [caption for caption in dict.fromkeys(captions) if caption != captions[index]]
    if len(others) > count:
        chosen = np.random.default_rng([seed, index]).permutation(len(others))[:count]
        others = [others[position] for position in chosen]
    return others


def r_precision(judge, image_features, captions):
    """Whether each image is closer to its own caption than to any distractor (a tie is wrong): bool (B,).

    `judge`: a ClipJudge, or whatever has its text_features; `image_features` (B, D), normalised. The distractors are
    shapes_distractors where every caption is a shapes caption, otherwise caption_distractors.
    Raises ValueError for another number of captions than of images, or a caption without any distractor.
    """
    if len(image_features) != len(captions):
        raise ValueError(f"Every image needs one caption, got {len(image_features)} images, {len(captions)} captions")
    if all(shapes.scene_of(caption) for caption in captions):
        distractors = [shapes_distractors(caption, index) for index, caption in enumerate(captions)]
    else:
        distractors = [caption_distractors(captions, index) for index in range(len(captions))]
    if not all(distractors):
        raise ValueError("R-precision compares captions: it needs two distinct ones at least")
    judge.text_features([*captions, *(other for others in distractors for other in others)])  # in full batches, kept
    right = []
    for image, caption, others in zip(image_features, captions, distractors):
        # Not a matrix product, whose rows may round differently: equal features must give equal cosines.
        cosines = (judge.text_features([caption, *others]) * image).sum(dim=-1)
        right.append(bool(cosines[0] > cosines[1:].max()))
    return torch.tensor(right)


def frechet_distance(real_features, fake_features):
    """Fréchet distance between Gaussians fitted to features (N, D) and (M, D), by torchmetrics, in float64: a float.

    It may be called FID with Inception's features only. It depends on N and M (smaller sets are further apart), so
    compare equal numbers only. Raises ValueError unless N > 1, M > 1 and D is the same.
    """
    # Imported where it is used: torchmetrics takes seconds to import, and training needs none of it.
    from torchmetrics.image.fid import FrechetInceptionDistance

    shapes_of_both = f"got {tuple(real_features.shape)} and {tuple(fake_features.shape)}"
    if real_features.ndim != 2 or real_features.shape[1:] != fake_features.shape[1:]:
        raise ValueError(f"The Fréchet distance needs features (N, D) and (M, D), {shapes_of_both}")
    if min(len(real_features), len(fake_features)) < 2:
        raise ValueError(f"The Fréchet distance needs more than one image on each side, {shapes_of_both}")
    network = nn.Identity()  # the features are there already
    network.num_features = real_features.shape[1]
    metric = FrechetInceptionDistance(feature=network, sync_on_compute=False)  # one process may hold all features
    metric.update(real_features.detach().cpu().double(), real=True)
    metric.update(fake_features.detach().cpu().double(), real=False)
    return metric.compute().item()


def shapes_real_features(clip_judge, count=None, split="all"):
    """Pooled features (N, hidden) of the first `count` (default: all) real images of a split of the held-out shapes:
    shapes.reference_sample."""
    indices, parts = shapes.held_out_indices(split)[:count], []
    for start in range(0, len(indices), BATCH):
        images = [shapes.reference_sample(index)[0] for index in indices[start : start + BATCH]]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(clip_judge.pooled_features(pixels))
    return torch.cat(parts)


LPIPS_CROP = 32  # latents per side that decoded_lpips decodes: 256 pixels; a whole image would need too much memory


def load_inception(path=None):
    """The Inception-v3 of FID: a frozen module, uint8 images (B, 3, H, W) to features (B, 2048), by torchmetrics.

    `path`: torch-fidelity's weights as .safetensors or .pth (tensors only), or "download".
    Raises UsageError, naming the flag, where the file doesn't hold them or the download fails.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        if path == "download":
            weights = torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, map_location="cpu", weights_only=True)
        else:
            weights = read_tensors(path)
        held = io.BytesIO()  # torch-fidelity would unpickle whatever the file holds: it gets only what was read here
        torch.save(dict(weights), held)
        held.seek(0)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], held)
    except Exception as error:  # whatever a file or the network can have wrong
        said = f"can't be fetched ({first_line(error)}): give a file" if path == "download" else "does not hold them"
        raise UsageError(f"--inception_path {path}: torch-fidelity's Inception weights: it {said}.") from error
    return network.eval().requires_grad_(False)


@torch.no_grad()
def inception_features(network, pixels):
    """Features (B, D) by load_inception's network, of pixels (B, 3, H, W) in [-1, 1] taken as 8-bit images."""
    check_pixels(pixels)
    device = next(network.parameters()).device
    images = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return torch.cat([network(part.to(device)).float().cpu() for part in images.split(BATCH)])


def read_tensors(path):
    """State dict of a .safetensors file, or of any other that torch.load opens with tensors only."""
    if str(path).endswith(".safetensors"):
        return load_file(path)
    return torch.load(path, weights_only=True, map_location="cpu")


def fingerprint(module):
    """A short hash of a module's weights and buffers: networks of the same features have the same."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def clip_figures(judge, pooled, captions):
    """{metric: (B,)} of a ClipJudge's pooled features (B, hidden) of images, one caption each.

    "clip_score", and "r_precision" where there are two distinct captions at least, or captions of shapes.
    """
    features = judge.project(pooled)
    figures = {"clip_score": clip_scores(features, judge.text_features(captions))}
    if len(set(captions)) > 1 or shapes.scene_of(captions[0]):
        figures["r_precision"] = r_precision(judge, features, captions)
    return figures


def judge_images(pixels, captions, clip_judge, reader=None, real_features=None):
    """One row of a report, on images (B, 3, H, W) in [-1, 1] and their B captions: a dict that json can write.

    "clip_score", "r_precision" (with two distinct captions, or shapes captions), what read_back says (with a reader):
    [mean, low, high]. "frechet" (with real_features (N, hidden)): a float. "per_image": {metric: list of B values}.
    Raises ValueError as the metrics do.
    """
    check_pixels(pixels, captions)
    pooled = clip_judge.pooled_features(pixels)
    per_image = clip_figures(clip_judge, pooled, captions)
    if reader is not None:
        per_image.update(read_back(reader, pixels, captions))
    row = {name: list(bootstrap_interval(values)) for name, values in per_image.items()}
    if real_features is not None:
        row["frechet"] = frechet_distance(real_features, pooled)
    row["per_image"] = {name: values.tolist() for name, values in per_image.items()}
    return row


def load_lpips(trunk_path):
    """LPIPS (Zhang et al., 2018) with the VGG-16 trunk: a frozen module, pixels (B, 3, H, W) twice to (B, 1, 1, 1).

    The lpips package carries its linear heads but not the trunk: it is read from `trunk_path`, torchvision's VGG-16
    weights as .safetensors or .pth (tensors only), or with "download" fetched by torchvision.
    Raises UsageError, naming the flag, where the file doesn't hold them or the download fails.
    """
    import lpips

    download = trunk_path == "download"
    try:
        network = lpips.LPIPS(net="vgg", pnet_rand=not download, verbose=False)
        trunk, weights = network.net, {} if download else read_tensors(trunk_path)
        for part in () if download else (trunk.slice1, trunk.slice2, trunk.slice3, trunk.slice4, trunk.slice5):
            for index, layer in part.named_children():  # lpips keeps torchvision's layer numbers as names
                layer.load_state_dict({name: weights[f"features.{index}.{name}"] for name in layer.state_dict()})
    except Exception as error:  # whatever a file or the network can have wrong
        said = f"can't be fetched ({first_line(error)}): give a file" if download else "does not hold them"
        raise UsageError(f"--lpips_trunk_path {trunk_path}: torchvision's VGG-16 weights: it {said}.") from error
    return network.eval().requires_grad_(False)


def decoded_lpips(network, vae, seed, step, positions, x0, target):
    """LPIPS (B,) of two clean latents (B, C, H, W), decoded; of larger ones a random crop, the same of both.

    A crop is drawn from its sample's own generator by global position, so it is the same on any rank and on resume.
    """
    height, width = (min(LPIPS_CROP, size) for size in x0.shape[-2:])
    crops, target_crops = [], []
    for position, z, z_target in zip(positions, x0, target):
        generator = sample_generator(seed, step, position, stream="crop")
        y = torch.randint(z.shape[-2] - height + 1, (), generator=generator).item()
        x = torch.randint(z.shape[-1] - width + 1, (), generator=generator).item()
        crops.append(z[:, y : y + height, x : x + width])
        target_crops.append(z_target[:, y : y + height, x : x + width])
    with torch.no_grad():
        target_pixels = decode_latents(vae, torch.stack(target_crops))
    return network(decode_latents(vae, torch.stack(crops)), target_pixels).flatten()
