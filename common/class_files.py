"""Class-label sets as their authors ship them: MNIST's IDX files, which other sets have too, and CIFAR's binaries.

    train-images-idx3-ubyte[.gz] with train-labels-idx1-ubyte[.gz], and t10k-*     gray, any size
    data_batch_1.bin to data_batch_5.bin and test_batch.bin, batches.meta.txt      CIFAR-10
    train.bin and test.bin, fine_label_names.txt                                   CIFAR-100, by its fine labels

The training files of a folder are read; a test file is read where it is given itself. A class is named by its line of
a labels.txt beside the files, of CIFAR by the list of names that comes with it, and otherwise by its number. The
Python version of CIFAR is a pickle, which could run anything: it is refused by name and never opened.
"""

import gzip
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import DataError, first_line
from common.texts import read_text

IDX_IMAGES = re.compile(r"(.*)images([-.])idx3-ubyte(\.gz)?", re.IGNORECASE)
IDX_MAGIC = {3: b"\0\0\x08\x03", 1: b"\0\0\x08\x01"}  # unsigned bytes, in so many dimensions
CIFAR = re.compile(r"(data_batch_\d|test_batch|train|test)(\.bin)?")
CIFAR_SIDE, LARGEST = 32, 2**31  # pixels; bytes of one file


@dataclass
class LabelledImages:
    """What class-label files hold: uint8 (N, H, W, 1 or 3), class numbers (N,), their names or None, and the files."""

    images: np.ndarray
    labels: np.ndarray
    names: list | None
    files: list


def idx_files(folder, files, single):
    """The IDX files of images: those for training where there are any, an unpacked one rather than its .gz."""
    found = [file for file in files if IDX_IMAGES.fullmatch(file.name)]
    found = [file for file in found if file.suffix != ".gz" or file.with_suffix("") not in found]
    return [file for file in found if "train" in file.name.lower()] or found


def read_idx(found):
    """The LabelledImages of an IDX file of images and the labels beside it. Raises DataError, naming a file."""
    if len(found) > 1:
        raise DataError(f"{found[0].parent} holds {len(found)} sets of IDX images: give one itself, e.g. {found[0]}.")
    images, (first, separator, _) = found[0], IDX_IMAGES.fullmatch(found[0].name).groups()
    beside = [images.with_name(f"{first}labels{separator}idx1-ubyte{end}") for end in ("", ".gz")]
    labels = next((file for file in beside if file.is_file()), None)
    if labels is None:
        raise DataError(f"{images} has no file of labels beside it: {beside[0].name} or {beside[1].name}.")
    pixels, classes = _read_idx_file(images, 3), _read_idx_file(labels, 1)
    if len(pixels) != len(classes):
        raise DataError(f"{labels} has {len(classes)} labels, and {images.name} {len(pixels)} images.")
    return LabelledImages(pixels[..., None], classes, _names(labels, classes), [images, labels])


def _read_idx_file(path, dimensions):
    """uint8 of an IDX file: its sizes in 32 bits each after a magic number, then the bytes."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else open(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != IDX_MAGIC[dimensions]:
                what = "images (three dimensions)" if dimensions == 3 else "labels (one dimension)"
                raise DataError(f"{path} is no IDX file of {what}: it begins with {header[:4].hex() or 'nothing'}.")
            sizes = [int(size) for size in np.frombuffer(header, ">u4", offset=4)]
            if math.prod(sizes) > LARGEST:
                raise DataError(f"{path} says that it holds {' x '.join(map(str, sizes))} bytes: more than 2 GiB.")
            content = file.read(math.prod(sizes) + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is cut or damaged ({first_line(error)}).") from None
    if len(content) != math.prod(sizes):
        more = "more" if len(content) > math.prod(sizes) else f"{len(content)}"
        raise DataError(f"{path} is cut or damaged: its header says {math.prod(sizes)} bytes, and there are {more}.")
    return np.frombuffer(content, np.uint8).reshape(sizes)


def cifar_files(folder, files, single):
    """CIFAR's binaries, those for training where there are any; where there are none, the pickles to refuse."""
    found = [file for file in files if CIFAR.fullmatch(file.name) and _is_cifar(file)]
    found = [file for file in found if file.suffix] or found
    return [file for file in found if not file.name.startswith("test")] or found


def _is_cifar(file):
    """train.bin and the like may be anything: the list of CIFAR-100's names, or its folder's name, tells."""
    if "batch" in file.name:
        return True
    return file.with_name("fine_label_names.txt").is_file() if file.suffix else file.with_name("meta").is_file()


def read_cifar(found):
    """The LabelledImages of CIFAR's binary files, one after another. Raises DataError, naming a file."""
    if not found[0].suffix:
        raise DataError(
            f"{found[0]} looks like the Python version of CIFAR, a pickle, which is never opened: take the binary "
            "version (cifar-10-binary.tar.gz, cifar-100-binary.tar.gz)."
        )
    fine = "batch" not in found[0].name  # a coarse label, then the fine one
    record, parts = 1 + fine + 3 * CIFAR_SIDE**2, []
    for file in found:
        size = file.stat().st_size
        if size == 0 or size % record:
            raise DataError(f"{file} is cut or no file of CIFAR: {size} bytes are no multiple of {record}.")
        parts.append(np.fromfile(file, np.uint8).reshape(-1, record))
    content = np.concatenate(parts)
    labels, images = content[:, int(fine)], content[:, 1 + fine :].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE)
    names = "fine_label_names.txt" if fine else "batches.meta.txt"
    return LabelledImages(images.transpose(0, 2, 3, 1), labels, _names(found[0], labels, names), found)


def _names(file, labels, shipped=None):
    """The classes' names, of labels.txt or of the list that a set is shipped with; None where there is neither."""
    for name in filter(None, ("labels.txt", shipped)):
        path = Path(file).with_name(name)
        if path.is_file():
            names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
            if len(labels) and labels.max() >= len(names):
                raise DataError(f"{path} names {len(names)} classes, and {file} has a label {labels.max()}.")
            return names
    return None
