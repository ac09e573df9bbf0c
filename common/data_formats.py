"""The formats of training data: what --data_dir and --dataset_name hold, read into lists of samples or into tables.

`read_data_dir` recognises what --data_dir holds, in this order:
 1. COCO           annotations/captions_*.json (the train files if there are any), images in <suffix>/, images/ or ./
 2. webdataset     *.tar shards with pairs of image and .txt or .json; only headers and captions are read at load time
 3. parquet        *.parquet tables with an image and a caption column
 4. imagefolder    metadata.jsonl or metadata.csv (here or in train/) with file_name and caption columns
 5. captions       captions.json: [{"text": "a cat", "file_name": "1.jpg"}], file_name only where images are needed
 6. pairs          images with a .txt caption beside each, in any subfolder
A .tar, .parquet or .json file may also be given itself. Hidden files are ignored; of shards and tables those named
train are used where there are any. A sample is (path, offset, length, captions): an image file, offset and length
None, or a part of a shard. No image is opened here.
"""

import csv
import io
import json
import logging
import os
import re
import tarfile
from pathlib import Path

from common.errors import DataError

logger = logging.getLogger(__name__)

ACCEPTED = (
    "COCO annotations/captions_*.json, webdataset .tar shards, .parquet files, metadata.jsonl or metadata.csv, "
    "captions.json, or images with .txt captions beside them"
)
IMAGE_EXTENSIONS = {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"}
FILE_COLUMNS = ("file_name", "image")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "txt")
UNREADABLE_SHARE, UNREADABLE_MIN = 0.05, 3  # more than the share, and at least so many: the run stops
# What the readers raise on broken files.
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, tarfile.TarError, csv.Error)


def too_many(bad, total):
    return bad == total or (bad >= UNREADABLE_MIN and bad > UNREADABLE_SHARE * total)


def inside(root, base, name):
    """The path `base/name`, or DataError where it leaves `root`.

    Judged by the text alone: a symbolic link in the folder is its owner's choice, a ".." in a metadata file is not.
    """
    path = os.path.abspath(os.path.join(base, name))
    if not Path(path).is_relative_to(root):
        raise DataError(f"The image path {name!r} leads outside of --data_dir {root}.")
    return path


def _read_text(path):
    return Path(path).read_text(encoding="utf-8-sig", errors="replace").strip()


def _row_captions(row, asked, where):
    """The captions (a list of str) of one record of a metadata file. Raises DataError where it has none."""
    row = row if isinstance(row, dict) else {"text": row}
    column = next((name for name in ((asked,) if asked else CAPTION_COLUMNS) if name in row), None)
    if column is None:
        wanted = f"--caption_column {asked!r}" if asked else f"caption column ({', '.join(CAPTION_COLUMNS)})"
        raise DataError(f"{where} has no {wanted}; it has {', '.join(map(str, row))}.")
    captions = row[column] if isinstance(row[column], list) else [row[column]]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise DataError(f"The caption column {column!r} of {where} holds no text.")
    return captions


def _read_coco(folder, annotations):
    """(samples, paths of missing images) of COCO caption files. Any number may be missing: a part of COCO will do."""
    samples, missing = [], []
    training = [path for path in annotations if path.name.startswith("captions_train")]
    for path in training or annotations:
        content = json.loads(_read_text(path))
        captions = {}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
        places = (folder / path.stem.removeprefix("captions_"), folder / "images", folder)
        for image in content["images"]:
            if image["id"] in captions:
                candidates = [inside(folder, place, image["file_name"]) for place in places]
                found = next(filter(os.path.isfile, candidates), None)
                missing += [] if found else [candidates[0]]
                samples.append((found or candidates[0], None, None, captions[image["id"]]))
    return samples, missing


def _read_tars(shards, caption_column):
    """Samples of webdataset shards: where each image lies in its shard, and its captions. No image is read."""
    samples, incomplete = [], []
    for shard in shards:
        images, captions = {}, {}
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key, extension = f"{folder}/{stem}", extension.lower()
                if not member.isfile():
                    continue
                if extension in IMAGE_EXTENSIONS:
                    images.setdefault(key, (str(shard), member.offset_data, member.size))
                elif extension in ("txt", "caption"):
                    captions[key] = [tar.extractfile(member).read().decode("utf-8", "replace").strip()]
                elif extension == "json" and key not in captions:
                    row = json.loads(tar.extractfile(member).read())
                    # A .json beside a .txt is often mere metadata: only one with a caption counts.
                    if isinstance(row, dict) and any(name in row for name in (caption_column, *CAPTION_COLUMNS)):
                        captions[key] = _row_captions(row, caption_column, f"{shard}:{member.name}")
        samples += [(*image, captions[key]) for key, image in images.items() if key in captions]
        incomplete += [f"{shard}:{key.strip('/')}" for key in images.keys() ^ captions.keys()]
    if incomplete:
        logger.warning("%d keys lack an image or a caption, e.g. %s", len(incomplete), min(incomplete))
    return samples


def _read_rows(root, path, args, needs_images):
    """(samples, paths of missing images) of metadata.jsonl, metadata.csv or captions.json."""
    text = _read_text(path)
    if path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(text)))
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    else:
        rows = json.loads(text)
        if not isinstance(rows, list):
            raise DataError(f'{path} is not a list of captions like [{{"text": "a cat"}}].')
    samples, missing = [], []
    for row in rows:
        captions, image = _row_captions(row, args.caption_column, path), None
        if needs_images:
            columns = (args.image_column,) if args.image_column else FILE_COLUMNS
            image = next((row[name] for name in columns if isinstance(row, dict) and row.get(name)), None)
            if image is None and path.suffix == ".json":
                raise DataError(f"{path} holds captions without images, and this method trains on images.")
            if image is None:
                columns, present = " or ".join(columns), ", ".join(map(str, row))
                raise DataError(f"{path} has no column {columns} with a path; it has {present}.")
            image = inside(root, path.parent, image)
            missing += [] if os.path.isfile(image) else [image]
        samples.append((image, None, None, captions))
    if missing and too_many(len(missing), len(rows)):
        raise DataError(f"{len(missing)} of the {len(rows)} images that {path} names don't exist, e.g. {missing[0]}.")
    return samples, missing


def read_data_dir(args, needs_images):
    """(content, source, folder): what --data_dir holds, how errors name it, and the folder that image paths stay in.

    The content is a list of samples, or a datasets.Dataset where it is parquet. Raises DataError where there is
    nothing usable, and READ_ERRORS where a file is broken.
    """
    path = Path(os.path.abspath(os.path.expanduser(args.data_dir)))
    source, single = f"--data_dir {path}", path.is_file()
    folder = path.parent if single else path
    if not path.exists():
        raise DataError(f"{source} does not exist.")
    walked = [path] if single else [Path(where) / name for where, _, names in os.walk(path) for name in names]
    files = sorted(file for file in walked if not any(part[0] == "." for part in file.relative_to(folder).parts))
    if not files:
        raise DataError(f"{source} is empty.")

    def ending(suffix):
        found = [file for file in files if file.suffix.lower() == suffix]
        return [f for f in found if re.search(r"(^|[/_.-])train", f.relative_to(folder).as_posix())] or found

    coco = sorted((folder / "annotations").glob("captions_*.json")) if not single else []
    rows = [folder / name for name in ("metadata.jsonl", "metadata.csv", "train/metadata.jsonl", "train/metadata.csv")]
    rows = (
        [path] if single and path.suffix == ".json" else [f for f in (*rows, folder / "captions.json") if f in files]
    )
    images = [] if single else [file for file in files if file.suffix.lower()[1:] in IMAGE_EXTENSIONS]
    missing = []
    if coco:
        samples, missing = _read_coco(folder, coco)
    elif shards := ending(".tar"):
        samples = _read_tars(shards, args.caption_column)
    elif tables := ending(".parquet"):
        return _load_parquet(tables, source), source, folder
    elif rows:
        samples, missing = _read_rows(folder, rows[0], args, needs_images)
    elif images:
        captioned = [file for file in images if file.with_suffix(".txt").is_file()]
        samples = [(str(file), None, None, [_read_text(file.with_suffix(".txt"))]) for file in captioned]
        bare = [str(file) for file in images if not file.with_suffix(".txt").is_file()]
        if bare:
            logger.warning("%d images have no .txt caption beside them and are left out, e.g. %s", len(bare), bare[0])
        if not samples:
            raise DataError(f"None of the {len(images)} images of {source} has a .txt caption beside it.")
    else:
        found = ", ".join(str(file.relative_to(folder)) for file in files[:3])
        raise DataError(f"{source} holds none of {ACCEPTED}; found {len(files)} files: {found}.")
    if needs_images and missing:
        logger.warning("%d images don't exist and are left out, e.g. %s", len(missing), missing[0])
        left_out = set(missing)
        samples = [sample for sample in samples if sample[0] not in left_out]
        if not samples:
            raise DataError(f"{source} has no usable samples: none of its {len(missing)} images exists.")
    return samples, source, folder


def _load_parquet(tables, source):
    import datasets

    try:
        return datasets.load_dataset("parquet", data_files=[str(file) for file in tables], split="train")
    except Exception as error:  # pyarrow's, datasets' own, or the file system's
        raise DataError(f"{source} has parquet files that can't be read ({first_line(error)}).") from error


def load_named(name):
    """The train split of a hub id, or of a local folder (written by save_to_disk, or any that `datasets` reads)."""
    import datasets

    try:
        saved = any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))
        table = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as error:  # the network's, the hub's, pyarrow's or the file system's: the user sees a sentence
        raise DataError(f"--dataset_name {name} can't be loaded ({first_line(error)}).") from error
    if isinstance(table, dict):
        if "train" not in table and len(table) != 1:
            raise DataError(f"--dataset_name {name} has no train split; it has {', '.join(table)}.")
        table = table["train"] if "train" in table else next(iter(table.values()))
    return table


def first_line(error):
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
