"""What tests of shards share: shards whose samples say their number, read as a stream."""

import io
import json

import numpy as np
from PIL import Image
from test_data import load, write, write_tar

from common.shard_index import INDEX, KIND

UNEVEN = (7, 40, 33, 1, 64, 20)  # samples of the shards of `shards`


def picture(number, size=(20, 24)):
    file = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 0)).save(file, "PNG")
    return file.getvalue()


def noise(number):
    """A picture of some 12 kB that says its number in its first pixel."""
    pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
    pixels[0, 0] = number % 256, number // 256, 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_shards(folder, counts=UNEVEN, image=picture):
    """Shards 000.tar, ... of so many samples, numbered from 0 on; sample n has the caption "n"."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        members = {}
        for _ in range(count):
            members |= {f"{number:05d}.png": image(number), f"{number:05d}.txt": str(number).encode()}
            number += 1
        write_tar(folder / f"{shard:03d}.tar", members)
    return folder


def stream(place, needs_images=True, **changes):
    return load(place, needs_images, **{"streaming": True, "shard_index": None, **changes})


def check(dataset, indices, numbers=None):
    """The samples at `indices` are those of these numbers, by caption and by picture."""
    for index, number in zip(indices, numbers or indices):
        sample = dataset[index, 0, 0]
        assert sample["caption"] == str(number) and sample["index"] == index
        red, green, _ = ((sample["pixel_values"][:, 0, 0] + 1) * 127.5).round().int().tolist()
        assert green * 256 + red == number
        assert dataset.captions(index) == [str(number)]
    assert not dataset.unreadable.any()


def wids(folder, entries, **more):
    index = {"__kind__": KIND, "wids_version": 1, "shardlist": entries, **more}
    return write(folder / INDEX, json.dumps(index))
