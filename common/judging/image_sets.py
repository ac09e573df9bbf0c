"""Sets of images: folders of them, the real ones that a Fréchet distance is taken to, and work shared by processes.

Features of real images are kept in safetensors files whose key says which images, how many and what network.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from common import shapes
from common.data import to_square
from common.data_formats import files_in
from common.errors import UsageError
from common.images import IMAGE_EXTENSIONS, ImageError, open_image
from common.judging import metrics


@dataclass
class RealImages:
    """`count` real images: `read(index)` -> (3, R, R) in [-1, 1]; `identity`, for json, says which they are."""

    identity: dict
    count: int
    read: object


def image_files(folder):
    """The image files right in a folder, by name, with numbers in names taken as numbers: 2.png before 10.png."""

    def natural_order(file):
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name)]

    images = [file for file in files_in(folder) if file.suffix.lower()[1:] in IMAGE_EXTENSIONS]
    files = [file for file in images if file.parent == Path(folder)]
    if len(files) < len(images):
        below = next(file for file in images if file.parent != Path(folder))
        print(f"{folder}: {len(images) - len(files)} images in its folders are not taken, e.g. {below}.", flush=True)
    return sorted(files, key=natural_order)


def open_file(file):
    """images.open_image of a file that must be one. Raises UsageError, naming the file."""
    try:
        return open_image(file)
    except ImageError as error:
        raise UsageError(f"{file} can't be read as an image ({error}).") from None


def to_pixels(images, resolution):
    """PIL images, cut to their middle squares, as pixels (B, 3, R, R) in [-1, 1]; those of that size as they are."""
    return torch.stack([to_square(image, resolution, 0.5, 0.5, False) for image in images])


def real_shapes(count=None, split="all"):
    """The first `count` (default: all) RealImages of a split of the held-out shapes: shapes.reference_sample."""
    indices = shapes.held_out_indices(split)
    count = count or len(indices)
    _check_count(f"the held-out shapes ({split})", count, len(indices))

    def read(index):
        return to_pixels([Image.fromarray(shapes.reference_sample(indices[index])[0])], shapes.IMAGE_SIZE)[0]

    identity = {"set": "held-out shapes", "seed": 1}  # of all: as features of them were kept before there were splits
    return RealImages(identity if split == "all" else {**identity, "split": split}, count, read)


def real_folder(folder, resolution, count=None):
    """The RealImages of --real_dir: the first `count` images of a folder, or all. Raises UsageError."""
    if not Path(folder).is_dir():
        raise UsageError(f"--real_dir {folder}: there is no such folder.")
    files = image_files(folder)
    count = count or len(files)
    _check_count(f"--real_dir {folder}", count, len(files))
    identity = {"files": _files_fingerprint(files[:count]), "resolution": resolution}
    return RealImages(identity, count, lambda index: to_pixels([open_file(files[index])], resolution)[0])


def real_dataset(dataset, count):
    """The RealImages of a data set of common/data.py with center_crop: its first `count`. Raises UsageError."""
    _check_count(dataset.source, count, dataset.size)
    identity = {"source": dataset.source, "resolution": dataset.resolution}
    if hasattr(dataset, "samples"):
        samples = dataset.samples[:count]
        identity["files"] = _files_fingerprint(sample[0] for sample in samples)
        identity["parts"] = hashlib.sha256(repr([sample[1:3] for sample in samples]).encode()).hexdigest()[:16]
    elif hasattr(dataset, "content"):
        identity["shards"] = dataset.content
    elif hasattr(dataset, "files"):
        identity["files"] = _files_fingerprint(dataset.files)
    else:
        identity["table"] = dataset.image_table._fingerprint  # `datasets` changes it with the content
    return RealImages(identity, count, lambda index: dataset[index, 0, index]["pixel_values"])


def _check_count(where, count, size):
    if max(count, 2) > size:
        raise UsageError(f"{where}: {max(count, 2)} real images are needed, and there are {size}.")


def _files_fingerprint(files):
    """A short hash of paths, sizes and times of files: another content has another one."""
    digest = hashlib.sha256()
    for file in files:
        stat = os.stat(file)
        digest.update(f"{os.path.abspath(file)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def sharded(accelerator, count, batch_size, work, description):
    """{name: a tensor of `count` rows} of `work(indices) -> {name: tensor (b, ...)}`, batches split over processes.

    A batch holds the same indices whatever the number of processes, so that its arithmetic is the same too. Every
    process gets the result.
    """
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    mine = range(accelerator.process_index, len(batches), accelerator.num_processes)
    bar = tqdm(mine, desc=description, unit="batch", disable=not accelerator.is_main_process)
    parts = gather_object([(number, work(batches[number])) for number in bar])
    parts = [part for _, part in sorted(parts, key=lambda part: part[0])]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def real_features(accelerator, folder, real, network, features_of, description):
    """Features (N, D) of RealImages, on the main process (elsewhere perhaps None): the kept ones where there are.

    `network` identifies, for json, what `features_of(pixels (b, 3, R, R)) -> (b, D)` computes with.
    """
    key = {"images": real.identity, "count": real.count, "network": network}
    kept = read_features(folder, key) if accelerator.is_main_process else None
    if broadcast_object_list([kept is not None])[0]:
        print(f"Real images: kept {description} features of {real.count}, {feature_file(folder, key)}.", flush=True)
        return kept

    def work(indices):
        return {"features": features_of(torch.stack([real.read(index) for index in indices]))}

    features = sharded(accelerator, real.count, metrics.BATCH, work, f"real images, {description}")["features"]
    if accelerator.is_main_process:
        write_features(folder, key, features)
    return features


def feature_file(folder, key):
    """Where features of real images are kept: `key` is a dict of all that they depend on."""
    return Path(folder) / (hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16] + ".safetensors")


def read_features(folder, key):
    """The kept features (N, D) of real images, or None where there are none of this very key."""
    try:
        with safe_open(feature_file(folder, key), "pt") as file:
            kept = (file.metadata() or {}).get("key") == json.dumps(key, sort_keys=True)
            return file.get_tensor("features") if kept else None
    except (OSError, SafetensorError):
        return None


def write_features(folder, key, features):
    """Keep features (N, D) of real images under their key, in one go."""
    file = feature_file(folder, key)
    hidden = file.with_name(f".{file.name}.{os.getpid()}")
    save_file({"features": features.contiguous()}, hidden, metadata={"key": json.dumps(key, sort_keys=True)})
    os.replace(hidden, file)
