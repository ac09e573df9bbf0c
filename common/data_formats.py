"""The formats of training data: what --data_dir and --dataset_name hold, read into lists of samples or into tables.

`read_data_dir` takes the first of these that --data_dir holds and that is usable, and says what it passed over:
 1. COCO           annotations/captions_*.json (the train files if there are any), images in <suffix>/,
                   images/<suffix>/, images/ or ./
 2. webdataset     *.tar shards with pairs of image and .txt or .json; only headers and captions are read at load time
                   (as a stream, by an index, not even these: common/shard_index.py)
 3. parquet        *.parquet tables with an image and a caption column
 4. imagefolder    metadata.jsonl, .csv or .parquet, here, in train/ or in the folders of the images, with columns for
                   the file's name and the caption
 5. captions       captions.json: [{"text": "a cat", "file_name": "1.jpg"}], file_name only where images are needed
 6. class labels   MNIST's IDX files and CIFAR's binaries: common/class_files.py
 7. pairs          images with a .txt (or .caption) beside each, in any subfolder
A .tar, .parquet, .json, .jsonl or .csv file may also be given itself. Hidden files are ignored, links are followed; of
shards and tables those named train are used where there are any. A sample without a caption has the empty one. A
sample is (path, offset, length, captions): an image file, offset and length None, or a part of a shard. No image is
opened here.
"""

import os
import re
import tarfile
import unicodedata
from pathlib import Path

from common.class_files import cifar_files, idx_files, read_cifar, read_idx
from common.errors import DataError, first_line
from common.images import IMAGE_EXTENSIONS
from common.shards import read_tar
from common.texts import CAPTION_COLUMNS, Notes, captions_of, parse_json, read_records, read_text, record_captions

ACCEPTED = (
    "COCO annotations/captions_*.json, webdataset .tar shards, .parquet files, metadata.jsonl or metadata.csv, "
    "captions.json, MNIST's IDX files, CIFAR's binary files, or images with .txt captions beside them"
)
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values")
FILE_COLUMNS = ("file_name", "image", "filename", "image_path", "img_path", "path", "file")
TABLES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".tar")  # what may hold captions
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
UNREADABLE_SHARE, UNREADABLE_MIN = 0.05, 3  # more than the share, and at least so many: the run stops


class Unusable(DataError):
    """Files of a known format that are no training data: what lies beside them may be."""


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


def find_image(root, bases, name):
    """(path, whether it exists) of an image that a table names, under the first of `bases` that has it.

    Windows' separators, and the composed or decomposed form of its letters that the file's name has, are found too.
    """
    if not isinstance(name, str):
        raise DataError(f"{name!r}, in the column of image files, is no path.")
    other = name.replace("\\", "/")
    spellings = [name, other, *(unicodedata.normalize(form, other) for form in ("NFC", "NFD"))]
    first = inside(root, bases[0], name)
    for spelling in dict.fromkeys(spellings):
        for base in bases:
            path = inside(root, base, spelling)
            if os.path.isfile(path):
                return path, True
    return first, False


def files_in(folder):
    """The files in a folder and in those below it, links followed, hidden ones left out: a sorted list of paths."""
    found, seen = [], set()

    def fail(error):  # os.walk would pass over a folder that it can't list
        raise error

    for where, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [Path(where) / name for name in names if name[0] != "."]
    return sorted(found)


def read_data_dir(args, needs_images):
    """(content, source, folder): what --data_dir holds, how errors name it, and the folder that image paths stay in.

    The content is a list of samples, a datasets.Dataset where it is parquet, or the LabelledImages of
    common/class_files.py. Raises DataError where there is
    nothing usable or a file is broken.
    """
    path = Path(os.path.abspath(os.path.expanduser(args.data_dir)))
    source, single = f"--data_dir {path}", path.is_file()
    folder = path.parent if single else path
    if not path.exists():
        raise DataError(f"{source} does not exist.")
    files = [path] if single else files_in(folder)
    if not files:
        raise DataError(f"{source} is empty.")
    notes, refused = Notes(), []

    def there(samples, missing):
        """The samples whose images exist; the others are counted."""
        if needs_images and missing:
            notes.add("images don't exist and are left out", missing[0], len(missing))
            left_out = set(missing)
            samples = [sample for sample in samples if sample[0] not in left_out]
            if not samples:
                raise Unusable(
                    f"{source} has no usable samples: none of its {len(missing)} images exists, e.g. {missing[0]}."
                )
        return samples

    images = [file for file in files if file.suffix.lower()[1:] in IMAGE_EXTENSIONS]
    kinds = (
        (_coco_files, lambda found: there(*_read_coco(folder, found, notes))),
        (_shards, lambda found: _read_tars(found, args.caption_column, notes)),
        (_tables, lambda found: _load_parquet(found, source, args, needs_images)),
        (_metadata_files, lambda found: there(*_read_rows(folder, found, images, args, needs_images, notes))),
        (idx_files, read_idx),
        (cifar_files, read_cifar),
        (_captioned, lambda found: _read_pairs(images, found, source, notes)),
    )
    for find, read in kinds:
        found = find(folder, files, single)
        if not found:
            continue
        try:
            content = read(found)
        except Unusable as error:
            refused.append(str(error))
            continue
        for reason in refused:
            notes.add(f"set of a known format is not used ({reason.rstrip('.')})", source)
        _say_passed_over(files, {*found, *images}, folder, notes)
        notes.say()
        return content, source, folder
    if refused:
        raise DataError(" ".join(refused))
    if images:
        refused.append(f"None of the {len(images)} images of {source} has a .txt caption beside it.")
    tables = [file for file in files if file.suffix.lower() in TABLES]
    listed = ", ".join(str(file.relative_to(folder)) for file in (tables or files)[:3])
    what = "tables" if tables else "files"
    refused.append(f"{source} holds none of {ACCEPTED}; found {len(tables or files)} {what}: {listed}.")
    raise DataError(" ".join(refused))


def _say_passed_over(files, used, folder, notes):
    """Note the tables and shards that were not read; a .json of an image's name belongs to the image."""
    named = {file.with_suffix("") for file in used}
    rest = [f for f in files if f.suffix.lower() in TABLES and f not in used and f.with_suffix("") not in named]
    if any(file.suffix.lower() == ".tar" for file in used):  # what says how many samples the shards have
        rest = [f for f in rest if f.name != "index.json" and not f.name.endswith("_stats.json")]
    if rest:
        notes.add("files that may hold captions are passed over", rest[0].relative_to(folder), len(rest))


# What is there


def train_first(found, folder):
    return [f for f in found if re.search(r"(^|[/_.-])train", f.relative_to(folder).as_posix())] or found


def _coco_files(folder, files, single):
    found = [f for f in files if f.parent == folder / "annotations" and re.fullmatch(r"captions_.*\.json", f.name)]
    training = [file for file in found if file.name.startswith("captions_train")]
    return [] if single else training or found


def _shards(folder, files, single):
    return train_first([file for file in files if file.suffix.lower() == ".tar"], folder)


def _tables(folder, files, single):
    found = [file for file in files if file.suffix.lower() == ".parquet" and file.name.lower() not in METADATA]
    return train_first(found, folder)


def _metadata_files(folder, files, single):
    """The tables of file names and captions: the one given, else that here, or in train/, or all; or captions.json."""
    found = [file for file in files if file.name.lower() in METADATA]
    if single:
        return found or [file for file in files if file.suffix.lower() in (".json", ".jsonl", ".csv", ".tsv")]
    here = [file for file in found if file.parent == folder]
    in_train = [file for file in found if file.parent == folder / "train"]
    return (
        here[:1]
        or in_train[:1]
        or train_first(found, folder)
        or [file for file in files if file.parent == folder and file.name.lower() == "captions.json"]
    )


def _captioned(folder, files, single):
    return [file for file in files if file.suffix.lower() in (".txt", ".caption")]


# Reading it


def _read_coco(folder, annotations, notes):
    """(samples, paths of missing images) of COCO caption files. Any number may be missing: a part of COCO will do."""
    samples, missing = [], []
    for path in annotations:
        content, captions = parse_json(read_text(path), path), {}
        try:
            for annotation in content["annotations"]:
                captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
            images = [(image["id"], image["file_name"]) for image in content["images"]]
        except (KeyError, TypeError) as error:
            raise Unusable(
                f"{path} is no file of COCO captions ({type(error).__name__}: {first_line(error)})."
            ) from None
        split = path.stem.removeprefix("captions_")
        places = (folder / split, folder / "images" / split, folder / "images", folder)
        for number, name in images:
            if number in captions:
                image, exists = find_image(folder, places, name)
                missing += [] if exists else [image]
                samples.append((image, None, None, captions_of(captions[number], f"{path}, image {number}", notes)))
    return samples, missing


def _read_tars(shards, column, notes):
    """Samples of webdataset shards: where each image lies in its shard, and its captions. No image is read."""
    samples = []
    for shard in shards:
        try:
            samples += read_tar(shard, column, notes)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(f"{shard} can't be read as a .tar ({first_line(error)}).") from None
    if not samples:
        raise Unusable(f"No pair of an image and a caption is in its {len(shards)} .tar files, e.g. {shards[0]}.")
    return samples


def _read_rows(root, paths, images, args, needs_images, notes):
    """(samples, paths of missing images) of tables that name image files and their captions."""
    columns, samples, missing = (args.image_column,) if args.image_column else FILE_COLUMNS, [], []
    for path in paths:
        records = _parquet_records(path) if path.suffix.lower() == ".parquet" else read_records(path)
        for where, record in records:
            try:
                captions, image = record_captions(record, args.caption_column, where, notes), None
                if needs_images:
                    image, exists = find_image(root, (path.parent,), _named_image(record, columns, args, where))
                    missing += [] if exists else [image]
            except DataError as error:
                if samples:
                    raise
                raise Unusable(str(error)) from None  # the first row: the table is one of something else
            samples.append((image, None, None, captions))
    if missing and too_many(len(missing), len(samples)):
        raise DataError(
            f"{len(missing)} of the {len(samples)} images that {paths[0]} names don't exist, e.g. {missing[0]}."
        )
    if needs_images:
        named = {sample[0] for sample in samples}
        around = [image for image in images if any(image.is_relative_to(path.parent) for path in paths)]
        strangers = [image for image in around if str(image) not in named]
        if strangers:
            notes.add(f"images are not named in {paths[0].name} and are left out", strangers[0], len(strangers))
    return samples, missing


def _named_image(record, columns, args, where):
    """The path of a record's image, of the first of `columns` that has one."""
    present = record if isinstance(record, dict) else {}
    named = [name for name in columns if present.get(name)]
    if not named and present.keys() <= {args.caption_column, *CAPTION_COLUMNS}:
        raise DataError(f"{where} holds captions without images, and this method trains on images.")
    if not named:
        wanted, has = " or ".join(columns[:2]), ", ".join(map(str, present))
        raise DataError(f"{where} has no column {wanted} with a path; it has {has} (see --image_column).")
    return present[named[0]]


def _parquet_records(path):
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path).to_pylist()
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


def _read_pairs(images, captioned, source, notes):
    """Samples of images with a caption file beside each."""
    beside = {file.with_suffix(""): file for file in captioned}
    samples = [
        (str(image), None, None, captions_of(read_text(beside[key]), beside[key], notes))
        for image in images
        if (key := image.with_suffix("")) in beside
    ]
    if not samples and images:
        raise Unusable(f"None of the {len(images)} images of {source} has a .txt caption beside it.")
    if not samples:
        raise Unusable(f"{source} has {len(captioned)} text files and no image, e.g. {captioned[0].name}.")
    stems = {image.with_suffix("") for image in images}
    bare = [image for image in images if image.with_suffix("") not in beside]
    lonely = [file for file in captioned if file.with_suffix("") not in stems]
    if bare:
        notes.add("images have no .txt caption beside them and are left out", bare[0], len(bare))
    if lonely:
        notes.add("text files have no image beside them", lonely[0], len(lonely))
    return samples


def _load_parquet(tables, source, args, needs_images):
    import datasets
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(tables[0])
    except Exception as error:  # pyarrow's, or the file system's
        raise DataError(f"{tables[0]} can't be read as parquet ({first_line(error)}).") from None
    known = (args.image_column,) if args.image_column else IMAGE_COLUMNS
    pictured = any(name in known or pyarrow.types.is_struct(schema.field(name).type) for name in schema.names)
    if needs_images and not pictured and not args.image_column:
        raise Unusable(f"{tables[0]} has no column of images; it has {', '.join(schema.names)}.")
    try:
        # Escaped: `datasets` takes the [ and * of a path for a pattern.
        names = [re.sub(r"([*?[])", r"[\1]", str(file)) for file in tables]
        return datasets.load_dataset("parquet", data_files=names, split="train")
    except Exception as error:
        raise _not_loaded(f"{source} has parquet files that can't be read", error) from error


def load_named(name):
    """The train split of a hub id, or of a local folder (written by save_to_disk, or any that `datasets` reads)."""
    import datasets

    try:
        saved = any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))
        table = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as error:  # the network's, the hub's, pyarrow's or the file system's: the user sees a sentence
        raise _not_loaded(f"--dataset_name {name} can't be loaded", error) from error
    if isinstance(table, dict):
        if "train" not in table and len(table) != 1:
            raise DataError(f"--dataset_name {name} has no train split; it has {', '.join(table)}.")
        table = table["train"] if "train" in table else next(iter(table.values()))
    return table


def _not_loaded(what, error):
    """The DataError of what `datasets` raised: the data's fault, or that of the cache, into which it writes a copy."""
    import datasets

    cache, cause = datasets.config.HF_DATASETS_CACHE, error
    while cause is not None:
        if isinstance(cause, OSError) and cause.filename and Path(cause.filename).is_relative_to(Path(cache).parent):
            return DataError(
                f"The cache of `datasets`, {cache}, can't be written ({cause.strerror}): set HF_DATASETS_CACHE to a "
                "folder that can."
            )
        cause = cause.__cause__ or cause.__context__
    return DataError(f"{what} ({type(error).__name__}: {first_line(error)}).")
