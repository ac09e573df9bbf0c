"""Samples of webdataset shards as a stream: in an order that is arithmetic alone, each read on from the last one.

An epoch is the shards, permuted by (seed, epoch), one after the other: N samples in a row. The row is cut into F = 8 B
lanes of N div F samples, or one more, where B is the global batch. Eight batches take one sample of every lane: the
first of them of the lanes 0, 8, 16 ..., the next of 1, 9, 17 .... So each batch is spread over all shards, every
sample comes once an epoch, however uneven the shards are, and no process has less to do than another; and each place
in the global batch reads eight places of the row, in sequence. Micro-batches go to the workers of a loader in turns:
with 1, 2, 4 or 8 of them a lane is always one worker's, and no byte is read twice.
"""

import functools
import os
import tarfile
from collections import OrderedDict

import numpy as np
import torch

from common.errors import DataError, UnreachableDataError, first_line
from common.images import ImageError
from common.randomness import sample_generator
from common.remote import is_url, open_file, persistently
from common.shards import sample_captions, samples_of
from common.texts import decode

LANES = 8  # for each place in the global batch
OPEN = 128  # files at once, per process
NEAR = 8  # samples that a file is read on for, rather than opened again
PLACES = 2**18  # that are remembered


def stream_order(seed, counts, global_batch):
    """index_of(count), as loader.order_of: which of all samples is the so many-th, of shards of `counts` samples."""
    counts = np.asarray(counts, dtype=np.int64)
    firsts = np.cumsum(counts) - counts
    size = int(counts.sum())
    turns = min(LANES, size // global_batch) or 1  # batches that take one sample of every lane
    lanes = min(turns * global_batch, size)
    length, longer = divmod(size, lanes)
    full, part = divmod(longer, global_batch)  # in so many turns, and for so many positions of the next, one more

    @functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
    def permuted(epoch):
        generator = sample_generator(seed, epoch, 0, stream="order")
        order = torch.randperm(len(counts), generator=generator).numpy()
        return order, np.cumsum(counts[order])

    def index_of(count):
        epoch, place = divmod(count, size)
        row, place = divmod(place, lanes)
        turn, position = divmod(place, global_batch)
        lane = position * turns + turn
        before = full * position + min(position, part) + min(turn, full + (position < part))  # longer lanes
        place = lane * length + before + row
        order, ends = permuted(epoch)
        which = int(np.searchsorted(ends, place, side="right"))
        shard = order[which]
        return int(firsts[shard] + place - (ends[which] - counts[shard]))

    return index_of


class ShardReader:
    """Reads any sample of shards, by few bytes where the ones before it in its shard were read last.

    shards: of shard_index.shards_of; column: --caption_column. What is open belongs to one process: a worker of a
    loader opens its own.
    """

    def __init__(self, shards, column):
        self.shards, self.column = shards, column
        self._forget()

    def _forget(self):
        self.process, self.last = os.getpid(), (None, None)
        self.files = OrderedDict()  # (shard, place of the sample that follows) to an open file
        self.places = OrderedDict()  # (shard, place) to a byte, from which on that is the first whole sample
        self.ends = {}  # shard to how many samples it turned out to have

    def __getstate__(self):
        return {"shards": self.shards, "column": self.column}

    def __setstate__(self, state):
        self.__init__(**state)

    def image(self, shard, place):
        """The bytes of the image of the place-th sample of a shard. Raises ImageError or DataError, where its captions
        can't be read either, and UnreachableDataError."""
        return self._sample(shard, place, True)[0]

    def captions(self, shard, place):
        """Its captions, a list of str; no image is read."""
        return self._sample(shard, place, False)[1]

    def _sample(self, shard, place, with_image):
        """(bytes of the image or None, captions); the last one is kept, whose captions are asked for after it."""
        if self.process != os.getpid():
            self._forget()
        last, found = self.last
        if last != (shard, place) or (with_image and found[0] is None):
            path = self.shards[shard].path
            try:
                found = persistently(path, lambda: self._read(shard, place, with_image))
            except (FileNotFoundError, PermissionError) as error:
                if not is_url(path):
                    raise
                raise UnreachableDataError(f"{path} can't be read ({first_line(error)}).") from None
            self.last = (shard, place), found
        return found

    def _read(self, shard, place, with_image):
        path, offset, at = self.shards[shard].path, *self._start(shard, place)
        if place >= self.ends.get(shard, place + 1):
            raise ImageError(f"its shard has {self.ends[shard]} whole samples")
        file = self._file(shard, place)  # not among `files` while it is read: what fails is opened anew
        file.seek(offset)
        sample = None
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for one in samples_of(tar, place - at, with_image):
                    tar.members.clear()  # it keeps every header
                    if not one.whole:
                        continue
                    if at == place:
                        sample = one
                        break
                    at += 1
                    if at % self.shards[shard].every == 0:
                        self._note(shard, at, one.end)
        except (tarfile.TarError, EOFError) as error:
            raise ImageError(f"its shard can't be read as a .tar at byte {offset} ({first_line(error)})") from None
        if sample is None:
            self.ends[shard] = at
            raise ImageError(f"its shard has {at} whole samples")
        self._note(shard, place, sample.offset)
        self._note(shard, place + 1, sample.end)
        self._keep(shard, place + 1, file)
        return self._content(path, sample, with_image)

    def _content(self, path, sample, with_image):
        member, image = sample.images[0]
        plain = record = None
        for extension, text, content in sample.texts:
            where = f"{path}:{text.name}"
            if len(content) < text.size:
                raise ImageError("its shard is cut in it")
            if extension == "json":
                record = where, decode(content, where)
            else:
                plain = where, decode(content, where)
        if with_image and len(image) < member.size:
            raise ImageError("its shard is cut in it")
        captions = sample_captions(plain, record, self.column)
        if captions is None:
            raise DataError(f"{record[0]} has no caption")
        return image, captions

    def _start(self, shard, place):
        """(byte, which sample begins there) of the nearest known place before a sample."""
        every, starts = self.shards[shard].every, self.shards[shard].starts
        near = range(place, max(place - NEAR, -1), -1)
        marks = range(place - place % every, 0, -every)
        for at in [*near, *(marks if starts is None else ())]:
            if (shard, at) in self.places:
                return self.places[shard, at], at
        if starts is None:
            return 0, 0
        return int(starts[place // every]), place - place % every

    def _note(self, shard, place, offset):
        self.places[shard, place] = offset
        self.places.move_to_end((shard, place))
        if len(self.places) > PLACES:
            self.places.popitem(last=False)

    def _file(self, shard, place):
        """An open file of a shard, that which was read last before `place` where there is one."""
        for at in range(place, max(place - NEAR, -1), -1):
            if file := self.files.pop((shard, at), None):
                return file
        return open_file(self.shards[shard].path)

    def _keep(self, shard, place, file):
        if place >= self.shards[shard].count:
            file.close()
            return
        self.files[shard, place] = file
        if len(self.files) > OPEN:
            self.files.popitem(last=False)[1].close()
