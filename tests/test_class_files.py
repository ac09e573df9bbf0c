"""common/class_files.py: MNIST's IDX files and CIFAR's binaries as data, whole and broken, and sets of `datasets`."""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import captions_of, load, make_args

from common.data import load_dataset_from_args
from common.errors import DataError
from common.identity import fingerprint
from common.judging.image_sets import real_dataset


def idx(content):
    """An IDX file's bytes of a uint8 array."""
    content = np.asarray(content, np.uint8)
    return struct.pack(f">HBB{content.ndim}I", 0, 8, content.ndim, *content.shape) + content.tobytes()


def write_idx(folder, part="train", count=30, size=28, classes=3, separator="-", packed=False, seed=0):
    """`count` images (N, size, size) of noise under a bright bar, whose place is the class; and the class numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = np.arange(count) % classes
    images = np.random.default_rng(seed).integers(0, 60, (count, size, size), dtype=np.uint8)
    for image, label in zip(images, labels):
        image[size * label // classes : size * (label + 1) // classes] += 180
    for what, content in ((f"images{separator}idx3", images), (f"labels{separator}idx1", labels)):
        data = idx(content)
        name = f"{part}-{what}-ubyte{'.gz' * packed}"
        (folder / name).write_bytes(gzip.compress(data) if packed else data)
    return images, labels


@pytest.mark.parametrize("separator, packed", [("-", False), ("-", True), (".", False)])
def test_idx_files(tmp_path, separator, packed):
    write_idx(tmp_path, "t10k", 4, separator=separator, packed=packed, seed=1)
    images, labels = write_idx(tmp_path, separator=separator, packed=packed)
    dataset = load(tmp_path, resolution=28)
    assert len(dataset) == 30 and captions_of(dataset) == [f"a photo of a {label}" for label in labels]
    expected = torch.from_numpy(images[7]).expand(3, 28, 28).float() / 127.5 - 1
    assert torch.equal(dataset[7, 0, 0]["pixel_values"], expected)
    (tmp_path / "labels.txt").write_text("bag\nboot\n\nankle boot\n")
    assert captions_of(load(tmp_path, caption_template="{label}", max_train_samples=3)) == [
        "bag",
        "boot",
        "ankle boot",
    ]
    test_file = next(tmp_path.glob("t10k-images*"))
    assert captions_of(load(test_file, needs_images=False))[:2] == ["a photo of a bag", "a photo of a boot"]
    assert len(load(test_file)) == 4


def test_an_unpacked_file_goes_before_its_gz_and_another_content_is_another_set(tmp_path):
    write_idx(tmp_path, packed=True)
    images, _ = write_idx(tmp_path, seed=5)
    dataset = load(tmp_path, resolution=28)
    assert torch.equal(dataset[0, 0, 0]["pixel_values"][0], torch.from_numpy(images[0]).float() / 127.5 - 1)
    assert real_dataset(dataset, 2).identity["files"]
    before = fingerprint(tmp_path)
    write_idx(tmp_path, seed=6)  # as large as before
    assert fingerprint(tmp_path) != before


def cifar(count, fine, seed=0):
    records = np.random.default_rng(seed).integers(0, 256, (count, 1 + fine + 3072), dtype=np.uint8)
    records[:, 0], records[:, int(fine)] = 9, np.arange(count) % 3
    return records


def test_cifar_binaries(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n\n")
    batches = [cifar(4, False, seed) for seed in range(3)]
    for name, batch in zip(("data_batch_1", "data_batch_2", "test_batch"), batches):
        (folder / f"{name}.bin").write_bytes(batch.tobytes())
    dataset = load(tmp_path, resolution=32)
    names = ["a photo of a airplane", "a photo of a automobile", "a photo of a bird"]
    assert captions_of(dataset) == [*names, names[0]] * 2
    expected = torch.from_numpy(batches[1][2, 1:].reshape(3, 32, 32)).float() / 127.5 - 1
    assert torch.equal(dataset[6, 0, 0]["pixel_values"], expected)
    assert len(load(folder / "test_batch.bin")) == 4

    hundred = tmp_path / "100"
    hundred.mkdir()
    (hundred / "train.bin").write_bytes(cifar(3, True).tobytes())
    with pytest.raises(DataError, match="holds none of COCO"):  # a train.bin may be anything
        load(hundred)
    (hundred / "fine_label_names.txt").write_text("apple\naquarium_fish\nbaby\n")
    assert captions_of(load(hundred)) == [f"a photo of a {name}" for name in ("apple", "aquarium_fish", "baby")]


def truncate(path, count=7):
    path.write_bytes(path.read_bytes()[:-count])


def rename(folder):
    for file in list(folder.glob("train-*")):
        (folder / file.name.replace("train", "train-letters")).write_bytes(file.read_bytes())


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
BROKEN = {
    "cut images": (lambda f: truncate(f / IMAGES), f"{IMAGES} is cut or damaged: its header says 23520 bytes"),
    "longer labels": (lambda f: (f / LABELS).open("ab").write(b"1"), f"{LABELS} is cut or damaged.*there are more"),
    "no header": (lambda f: (f / IMAGES).write_bytes(b"\0\0"), f"{IMAGES} is no IDX file of images"),
    "wrong magic": (lambda f: (f / LABELS).write_bytes(idx(np.zeros((2, 2)))), "no IDX file of labels.*00000802"),
    "other count": (lambda f: (f / LABELS).write_bytes(idx([1, 2])), f"{LABELS} has 2 labels, and {IMAGES} 30 images"),
    "no labels": (lambda f: (f / LABELS).unlink(), f"{IMAGES} has no file of labels beside it: {LABELS} or "),
    "cut gz": (
        lambda f: (f / IMAGES).write_bytes(gzip.compress((f / IMAGES).read_bytes())[:-9]),
        f"{IMAGES} is cut or damaged",
    ),
    "damaged gz": (lambda f: (f / IMAGES).write_bytes(b"\x1f\x8b" + bytes(50)), f"{IMAGES} is cut or damaged"),
    "huge": (lambda f: (f / IMAGES).write_bytes(b"\0\0\x08\x03" + b"\xff" * 12), "more than 2 GiB"),
    "two sets": (rename, "holds 2 sets of IDX images: give one itself"),
    "few names": (lambda f: (f / "labels.txt").write_text("a\nb\n"), r"labels.txt names 2 classes, and .* a label 2"),
    "pickle": (
        lambda f: [file.unlink() for file in f.iterdir()] and (f / "data_batch_1").write_bytes(pickle.dumps({})),
        "data_batch_1 looks like the Python version of CIFAR, a pickle, which is never opened: take the binary",
    ),
    "cut CIFAR": (
        lambda f: [file.unlink() for file in f.iterdir()] and (f / "data_batch_1.bin").write_bytes(bytes(3072)),
        "data_batch_1.bin is cut or no file of CIFAR: 3072 bytes are no multiple of 3073",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_sentence_that_names_them(tmp_path, name):
    write_idx(tmp_path)
    spoil, said = BROKEN[name]
    spoil(tmp_path)
    with pytest.raises(DataError, match=said) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_of_class_folders_by_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for number, name in enumerate(("boot", "cat")):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 100 + number).save(tmp_path / "set" / name / "1.png")
    dataset = load_dataset_from_args(make_args(dataset_name=str(tmp_path / "set")))
    assert captions_of(dataset) == ["a photo of a boot", "a photo of a cat"]
