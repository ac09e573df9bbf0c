"""Data: captioned images from folders, shards, tables or rendered shapes, in an order that only the seed decides.

The formats of --data_dir are those of common/data_formats.py, or shards as a stream of common/streams.py.
--dataset_name is a `datasets` hub id, a local folder, or "shapes".

Nothing about a sample depends on rank, worker or micro-batch: which one is read follows from (seed, sample count),
its flip, crop and choice of caption from (seed, optimizer step, index in the global batch); see common/loader.py.
"""

import argparse
import io
import logging
import re

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from common.buckets import assign, bucket_shapes, to_shape
from common.cache import CachedDataset, RolloutDataset
from common.class_files import LabelledImages
from common.data_formats import IMAGE_COLUMNS, find_image, load_named, read_data_dir, too_many
from common.errors import DataError, UnreachableDataError
from common.images import ImageError, open_image
from common.randomness import sample_generator
from common.shapes import IMAGE_SIZE, caption_of, training_sample, training_scene
from common.shard_index import content_of_stream, is_stream, shards_of
from common.streams import ShardReader
from common.texts import CAPTION_COLUMNS, NO_CAPTION, Notes, captions_of

logger = logging.getLogger(__name__)


def to_square(image, resolution, crop_x, crop_y, flip):
    """PIL image -> float32 (3, resolution, resolution) in [-1, 1].

    The largest square is cut out at (crop_x, crop_y), fractions of the room there is, and resized with antialiasing:
    the crop of a resized shortest side, without ever holding the resized long side of a panorama.
    """
    side = min(image.size)
    left, top = (round(fraction * (length - side)) for fraction, length in zip((crop_x, crop_y), image.size))
    image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    return pixels_of(image, flip)


def pixels_of(image, flip):
    """float32 (3, H, W) in [-1, 1] of an RGB image, mirrored by `flip`."""
    if flip:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def square_time_ids(size, resolution, crop_x, crop_y):
    """SDXL's micro-conditioning of `to_square`, float32 (6,): original height and width, the crop's top and left.

    size: (width, height). The corner is in pixels of the resized image, as SDXL was trained; then the target size.
    """
    width, height = size
    scale = resolution / min(size)
    left, top = (round(fraction * (length - min(size))) * scale for fraction, length in zip((crop_x, crop_y), size))
    return torch.tensor([height, width, round(top), round(left), resolution, resolution], dtype=torch.float32)


class CaptionedImages(torch.utils.data.Dataset):
    """Base of the datasets with `size` samples; a subclass has `name`, `image_file` and `captions` of an index.

    dataset[index, step, position] -> {"pixel_values": float32 (3, R, R) in [-1, 1] and "time_ids": SDXL's, float32
    (6,) (where images are needed), "caption": str, "index", "position", "step": int}. An image that can't be decoded
    is logged once, counted in `unreadable` and replaced by the next index; too many of them raise DataError.
    """

    def __init__(self, args, size, needs_images, source):
        if size == 0:
            raise DataError(f"{source} has no usable samples.")
        self.size, self.needs_images, self.source = size, needs_images, source
        self.seed, self.resolution = args.seed, args.resolution
        self.center_crop, self.random_flip = args.center_crop, args.random_flip
        self.shapes = self.buckets = None  # with --aspect_ratio_buckets: (height, width), and each sample's number
        # In shared memory, so that the workers of a loader count together.
        self.unreadable = torch.zeros(size, dtype=torch.bool).share_memory_()

    def __len__(self):
        return self.size

    def __getitem__(self, key):
        index, step, position = key
        # All four are drawn whatever the options: a flag never changes what another one draws.
        draws = torch.rand(4, generator=sample_generator(self.seed, step, position, stream="augmentation")).tolist()
        sample = {"position": position, "step": step}
        if self.needs_images:
            index, image = self.first_readable(index)
            crop = (0.5, 0.5) if self.center_crop else draws[:2]
            flip = self.random_flip and draws[2] < 0.5
            if self.buckets:
                shape = self.shapes[self.buckets[key[0]]]
                image, sample["time_ids"] = to_shape(image, shape, *crop)
                sample["pixel_values"] = pixels_of(image, flip)
            else:
                sample["pixel_values"] = to_square(image, self.resolution, *crop, flip)
                sample["time_ids"] = square_time_ids(image.size, self.resolution, *crop)
        sample["index"], captions = index, self.captions(index)
        sample["caption"] = captions[int(draws[3] * len(captions))]
        return sample

    def first_readable(self, index):
        """(index, RGB image) of the first readable sample from `index` on."""
        return self._first(index, lambda index: open_image(self.image_file(index)))

    def _first(self, index, read):
        """(index, read(index)) of the first sample from `index` on that can be read."""
        while True:
            if not self.unreadable[index]:
                try:
                    return index, read(index)
                except UnreachableDataError:
                    raise
                except (ImageError, DataError, OSError) as error:
                    self.unreadable[index] = True
                    logger.warning("skipping an unreadable image, %s: %s", self.name(index), error)
            bad = int(self.unreadable.sum())
            if too_many(bad, self.size):
                raise DataError(
                    f"{bad} of {self.size} images of {self.source} can't be read, e.g. {self.name(index)}."
                )
            index = (index + 1) % self.size


class FileDataset(CaptionedImages):
    """Samples of image files and tar members: a list of (path, offset, length, captions), offset None for a file."""

    def __init__(self, args, samples, needs_images, source):
        self.samples = samples[: args.max_train_samples]
        super().__init__(args, len(self.samples), needs_images, source)

    def name(self, index):
        path, offset, _, _ = self.samples[index]
        return path if offset is None else f"{path} at byte {offset}"

    def image_file(self, index):
        path, offset, length, _ = self.samples[index]
        if offset is None:
            return path
        with open(path, "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(length))

    def captions(self, index):
        return self.samples[index][3]


class StreamDataset(CaptionedImages):
    """Samples of webdataset shards, read on from one another where their order has them so (common/streams.py).

    counts: the samples of each shard, which their order follows; content: a short hash of which shards these are.
    """

    def __init__(self, args, needs_images, source):
        shards, left, self.counts = shards_of(args), args.max_train_samples, []
        for shard in shards:
            self.counts.append(shard.count if left is None else min(shard.count, left))
            left = left and left - self.counts[-1]
        self.ends, self.content = np.cumsum(self.counts), content_of_stream(args, shards)
        self.reader = ShardReader(shards, args.caption_column)
        super().__init__(args, int(self.ends[-1]), needs_images, source)
        blind = [shard.path for shard in shards if shard.starts is None]
        if blind:
            notes = Notes()
            notes.add("shards have no offsets in an index: places are found by their headers", blind[0], len(blind))
            notes.say()

    def __getitem__(self, key):
        index, step, position = key
        if not self.needs_images:  # else what can't be read is passed over with its image
            index, _ = self._first(index, self.captions)
        return super().__getitem__((index, step, position))

    def place(self, index):
        """(shard, which of its samples) of a sample."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, int(index - self.ends[shard] + self.counts[shard])

    def name(self, index):
        shard, place = self.place(index)
        return f"sample {place} of {self.reader.shards[shard].path}"

    def image_file(self, index):
        return io.BytesIO(self.reader.image(*self.place(index)))

    def captions(self, index):
        return self.reader.captions(*self.place(index))


class TableDataset(CaptionedImages):
    """Samples of a datasets.Dataset; with `folder`, image paths in the table must stay inside that folder."""

    def __init__(self, args, table, needs_images, source, folder=None):
        from datasets import ClassLabel, Image, Value  # here, because the import takes seconds and few runs need it

        def holds_image(feature):
            binary = isinstance(feature, Value) and "binary" in feature.dtype
            return isinstance(feature, Image) or binary or (isinstance(feature, dict) and "bytes" in feature)

        def holds_caption(feature):
            inner = getattr(feature, "feature", feature)  # of a list of captions
            return isinstance(inner, ClassLabel) or (isinstance(inner, Value) and re.search("string|int", inner.dtype))

        features = table.features
        known = [*CAPTION_COLUMNS, *(name for name in features if isinstance(features[name], ClassLabel)), "label"]
        column = _find_column(features, "--caption_column", args.caption_column, known, holds_caption, source)
        self.caption_column, feature = column, features[column]
        self.class_names = getattr(getattr(feature, "feature", feature), "names", None)
        self.caption_template, self.folder = _caption_template(args), folder
        if args.max_train_samples is not None:
            table = table.select(range(min(args.max_train_samples, len(table))))
        # A view for each column, so that a caption is read without its image.
        self.caption_table = table.select_columns([self.caption_column])
        if needs_images:
            known = [*IMAGE_COLUMNS, *(name for name in features if isinstance(features[name], Image))]
            self.image_column = _find_column(features, "--image_column", args.image_column, known, holds_image, source)
            self.image_table = table.select_columns([self.image_column])
            if isinstance(features[self.image_column], Image):
                self.image_table = self.image_table.cast_column(self.image_column, Image(decode=False))
        super().__init__(args, len(table), needs_images, source)
        notes = Notes()
        for index, count in self._empty_captions():
            notes.add(NO_CAPTION, self.name(index), count)
        notes.say()

    def _empty_captions(self):
        """(a row of them, count) of each part of the table that has texts or lists without a caption in them."""
        import pyarrow.compute as compute

        feature, start = self.caption_table.features[self.caption_column], 0
        for chunk in self.caption_table.data.column(self.caption_column).iterchunks():
            if getattr(feature, "feature", None) is not None:
                lengths = compute.list_value_length(chunk)
            elif self.class_names is None and "string" in feature.dtype:
                lengths = compute.utf8_length(compute.utf8_trim_whitespace(chunk))
            else:
                return
            empty = compute.equal(compute.fill_null(lengths, 0), 0)
            if count := compute.sum(empty).as_py():
                yield start + compute.index(empty, True).as_py(), count
            start += len(chunk)

    def name(self, index):
        return f"row {index} of {self.source}"

    def image_file(self, index):
        cell = self.image_table[index][self.image_column]
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if content is not None:
            return io.BytesIO(content)
        if path is None:
            raise ImageError("it has no image")
        return path if self.folder is None else find_image(self.folder, [self.folder], path)[0]

    def captions(self, index):
        values = self.caption_table[index][self.caption_column]
        values = values if isinstance(values, list) else [values]
        return captions_of([self._caption(value) for value in values], self.name(index))

    def _caption(self, value):
        if isinstance(value, str):
            return value
        if value is None or value < 0:  # `datasets` writes -1 where a label is unknown
            return ""
        return self.caption_template.replace("{label}", self.class_names[value] if self.class_names else str(value))


class LabelledDataset(CaptionedImages):
    """Samples of class_files.LabelledImages, which lie in memory: an image and its class's caption."""

    def __init__(self, args, content, needs_images, source):
        kept = slice(args.max_train_samples)
        self.images, self.labels, self.files = content.images[kept], content.labels[kept], content.files
        self.class_names, self.caption_template = content.names, _caption_template(args)
        super().__init__(args, len(self.images), needs_images, source)

    def first_readable(self, index):
        image = self.images[index]
        return index, Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")

    def captions(self, index):
        label = int(self.labels[index])
        return [self.caption_template.replace("{label}", self.class_names[label] if self.class_names else str(label))]


class ShapesDataset(torch.utils.data.Dataset):
    """Rendered shapes: endless (`size` None) unless --max_train_samples ends it.

    --random_flip is ignored (a mirrored "left of" would be a lie), and there is nothing to crop.
    """

    def __init__(self, args, needs_images=True):
        self.size, self.seed = args.max_train_samples, args.seed
        self.needs_images, self.resolution = needs_images, args.resolution

    def __getitem__(self, key):
        index, step, position = key
        sample = {"position": position, "step": step}
        if not self.needs_images:
            scene, _ = training_scene(self.seed, index)
        else:
            image, scene = training_sample(self.seed, index)
            pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1
            if self.resolution % IMAGE_SIZE == 0:
                factor = self.resolution // IMAGE_SIZE
                pixels = pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
            else:
                size = (self.resolution, self.resolution)
                pixels = F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0].clamp(-1, 1)
            sample["pixel_values"] = pixels
        sample["index"], sample["caption"] = index, caption_of(scene)
        return sample

    def captions(self, index):
        return [caption_of(training_scene(self.seed, index)[0])]


def _caption_template(args):
    template = args.caption_template or "a photo of a {label}"
    if "{label}" not in template:
        raise DataError(f"--caption_template {template!r} has no {{label}}.")
    return template


def _find_column(features, flag, asked, known, fits, source):
    """The column that the flag asks for, or else the first known one, that fits. Raises DataError if there is none."""
    column = next((name for name in ([asked] if asked else known) if name in features and fits(features[name])), None)
    if column is None:
        wanted = f"usable {flag} {asked!r}" if asked else f"column that would do for {flag}"
        raise DataError(f"{source} has no {wanted}; it has {', '.join(features)}.")
    return column


def load_dataset_from_args(args, needs_images=True):
    """The training data of a script's arguments: those of read_data or, of --cache_dir, --rollout_cache, cached."""
    if getattr(args, "rollout_cache", None):
        # The images themselves are read where a method wants them too, or asks the teacher anew.
        data = None
        if needs_images or args.rollout_refresh:
            data = load_dataset_from_args(argparse.Namespace(**{**vars(args), "rollout_cache": None}))
        return RolloutDataset(args, data, needs_images)
    return CachedDataset(args, needs_images) if getattr(args, "cache_dir", None) else read_data(args, needs_images)


def read_data(args, needs_images=True):
    """The data of --data_dir or --dataset_name: a map-style dataset with `size` samples (None: endless).

    Raises DataError where the flags contradict each other or the data is missing, of no known format, or unusable.
    """
    if args.data_dir is None and args.dataset_name is None:
        raise DataError("Give --data_dir or --dataset_name (--dataset_name shapes asks for rendered shapes).")
    if args.data_dir is not None and args.dataset_name is not None:
        raise DataError("Give --data_dir or --dataset_name, not both.")
    if args.max_train_samples is not None and args.max_train_samples < 1:
        raise DataError(f"--max_train_samples {args.max_train_samples} leaves no samples.")
    check_stream(args)
    if args.dataset_name == "shapes":
        return ShapesDataset(args, needs_images)
    dataset = _read(args, needs_images)
    if getattr(args, "aspect_ratio_buckets", False) and needs_images:
        dataset.shapes = bucket_shapes(args.resolution)
        dataset.buckets = assign(dataset, dataset.shapes)
    return dataset


def check_stream(args):
    """DataError where flags of a stream can't go with others."""
    streamed = is_stream(args)
    if not streamed and getattr(args, "shard_index", None):
        raise DataError("--shard_index is of .tar shards that are read as a stream: add --streaming, or leave it out.")
    if streamed and args.data_dir is None:
        raise DataError("--streaming reads the .tar shards of --data_dir: give that, or leave it out.")
    if streamed and getattr(args, "aspect_ratio_buckets", False):
        raise DataError(
            "--aspect_ratio_buckets needs the size of every image beforehand, which a stream does not tell: leave it "
            "out, or make a cache of the shards, unpacked."
        )


def _read(args, needs_images):
    if args.dataset_name is not None:
        return TableDataset(args, load_named(args.dataset_name), needs_images, f"--dataset_name {args.dataset_name}")
    if is_stream(args):
        return StreamDataset(args, needs_images, f"--data_dir {args.data_dir}")
    try:
        content, source, folder = read_data_dir(args, needs_images)
    except OSError as error:
        raise DataError(f"--data_dir {args.data_dir} can't be read ({error.strerror}: {error.filename}).") from None
    if isinstance(content, list):
        return FileDataset(args, content, needs_images, source)
    if isinstance(content, LabelledImages):
        return LabelledDataset(args, content, needs_images, source)
    return TableDataset(args, content, needs_images, source, folder)
