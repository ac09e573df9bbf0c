"""Shards of webdataset: a .tar in which the files of one sample share a key and lie beside each other.

A file's key is its path up to the first dot of its name, the rest is its kind. A sample is whole that has an image and
something to read its captions from: a .txt, .caption or .json. Hidden files, links and folders are passed over.
"""

import os
import tarfile
from typing import NamedTuple

from common.errors import DataError
from common.images import IMAGE_EXTENSIONS
from common.texts import CAPTION_COLUMNS, captions_of, decode, parse_json, record_captions

TEXT_EXTENSIONS = ("txt", "caption", "json")
TWO_IMAGES = "keys have two images in one shard, of which the first is used"
INCOMPLETE = "keys lack an image or a caption"
CHUNK = 2**20


def members_of(tar):
    """(key, extension, tarfile.TarInfo) of each file of an open tar from where it stands, until it ends or is cut."""
    while True:
        try:
            member = tar.next()
        except tarfile.ReadError:  # cut within a member
            return
        if member is None:
            return
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if member.isfile() and not base.startswith("."):
            yield f"{folder}/{stem}".strip("/"), extension.lower(), member


def sample_captions(plain, record, column, notes=None):
    """The captions of one sample, a list of str, or None: `plain` and `record` are the (where, text) of a .txt and a
    .json, or None. The .json counts where there is no .txt, beside which it is often mere metadata.

    column: --caption_column. Raises DataError where a text can't be read.
    """
    if plain:
        where, text = plain
        return captions_of(text, where, notes)
    if record:
        where, text = record
        content = parse_json(text, where)
        if isinstance(content, dict) and any(name in content for name in (column, *CAPTION_COLUMNS)):
            return record_captions(content, column, where, notes)
    return None


def refuse_compressed(file, shard):
    if file.read(2) == b"\x1f\x8b":
        raise DataError(f"{shard} is compressed: unpack it (gunzip), so that any image in it can be read at once.")
    file.seek(0)


def note_its_end(tar, size, shard, notes):
    """Note where a tar that was read to its end, of `size` bytes, ends too early."""
    end = tar.offset
    tar.fileobj.seek(end)
    if end > size or any(tar.fileobj.read(CHUNK)):
        notes.add("shards are cut or damaged and lose what follows", f"{shard}, at byte {min(end, size)}")
    elif end == size:
        notes.add("shards have no end mark and may be cut", f"{shard}, at byte {size}")


def is_inside(member, size):
    return member.offset_data + member.size <= size


# A whole shard, whose samples need not lie together


def read_tar(shard, column, notes):
    """[(path, offset, length, captions)] of a local shard: where each image lies in it. No image is read."""
    images, texts, size = {}, {}, os.path.getsize(shard)
    with open(shard, "rb") as file:
        refuse_compressed(file, shard)
    with tarfile.open(shard, "r:") as tar:
        for key, extension, member in members_of(tar):
            if extension in IMAGE_EXTENSIONS and key in images:
                notes.add(TWO_IMAGES, f"{shard}:{member.name}")
            elif extension in IMAGE_EXTENSIONS:
                images[key] = member
            elif extension in TEXT_EXTENSIONS:
                try:
                    text = decode(tar.extractfile(member).read(), f"{shard}:{member.name}")
                except tarfile.ReadError:
                    break
                texts.setdefault(key, {})[extension == "json"] = (f"{shard}:{member.name}", text)
        note_its_end(tar, size, shard, notes)
    found = {}
    for key, of in texts.items():
        captions = sample_captions(of.get(False), of.get(True) if key in images else None, column, notes)
        if captions is not None:
            found[key] = captions
    incomplete = sorted(images.keys() ^ found.keys())
    if incomplete:
        notes.add(INCOMPLETE, f"{shard}:{incomplete[0]}", len(incomplete))
    whole = {key: member for key, member in images.items() if key in found and is_inside(member, size)}
    return [(str(shard), member.offset_data, member.size, found[key]) for key, member in whole.items()]


# Sample by sample


class Sample(NamedTuple):
    """The files of one key that follow each other in a shard, and what they hold, where it was read."""

    key: str
    offset: int  # of its first header
    end: int  # of the header that follows it
    images: list  # of (TarInfo, content or None)
    texts: list  # of (extension, TarInfo, content or None)

    @property
    def whole(self):
        return bool(self.images and self.texts)


def samples_of(tar, skip=None, images=True):
    """Each Sample of an open tar from where it stands, whole or not.

    After `skip` whole ones the contents are read (None: never), those of images only if `images`; in the order in
    which they lie, so that a file that comes over a network is read once.
    """
    key, offset, end, pictures, texts, done = None, 0, 0, [], [], 0

    def content(member):
        tar.fileobj.seek(member.offset_data)
        return tar.fileobj.read(member.size)

    for own, extension, member in members_of(tar):
        if own != key:
            if pictures or texts:
                yield Sample(key, offset, member.offset, pictures, texts)
                done += bool(pictures and texts)
            key, offset, pictures, texts = own, member.offset, [], []
        reads = skip is not None and done >= skip
        if extension in IMAGE_EXTENSIONS:
            pictures.append((member, content(member) if reads and images and not pictures else None))
        elif extension in TEXT_EXTENSIONS:
            texts.append((extension, member, content(member) if reads else None))
    end = tar.offset
    if pictures or texts:
        yield Sample(key, offset, end, pictures, texts)


def whole_samples(file, shard, notes):
    """[offset of the first header of each whole sample] of an open shard, and its size in bytes: headers are read."""
    refuse_compressed(file, shard)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    found, seen = [], set()
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for sample in samples_of(tar):
            tar.members.clear()  # it keeps every header
            if len(sample.images) > 1:
                notes.add(TWO_IMAGES, f"{shard}:{sample.images[1][0].name}")
            if not sample.whole:
                notes.add(INCOMPLETE, f"{shard}:{sample.key}")
                if sample.key in seen:
                    raise DataError(
                        f"{shard}: the files of {sample.key} do not lie beside each other, as in a webdataset; sort "
                        "them by name (tar --sort=name)."
                    )
            elif all(is_inside(member, size) for member in (sample.images[0][0], *(text[1] for text in sample.texts))):
                found.append(sample.offset)
            if len(seen) < 1000:  # which tell how a shard is laid out
                seen.add(sample.key)
        note_its_end(tar, size, shard, notes)
    return found, size
