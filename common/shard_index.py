"""Which shards of a webdataset there are and how many samples each has: an index, read, found or made.

The index is webdataset's own (wids), index.json beside the shards or --shard_index:

    {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [{"url": "00000.tar", "nsamples": 1000}, ...]}

To each shard ours adds "filesize", and "starts", the bytes at which the samples 0, 32, 64 ... of it begin, 32 being
"every": so a place in a shard is found by a seek. Without them it is found by the headers that come before. Where
there is no index, img2dataset's 00000_stats.json count too; else shards of this machine are counted then and there.
"""

import contextlib
import functools
import hashlib
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm

from common.data_formats import files_in, train_first
from common.errors import DataError, UnreachableDataError, first_line
from common.remote import (
    expand,
    is_pattern,
    is_url,
    is_web,
    join,
    matching,
    open_file,
    parent_of,
    persistently,
    read_file,
    write_file,
)
from common.shards import whole_samples
from common.texts import Notes

INDEX, KIND = "index.json", "wids-shard-index-v1"
EVERY = 32  # samples between two starts
THREADS = 8


class Shard(NamedTuple):
    path: str  # or URL
    count: int  # its samples
    size: int | None = None  # bytes, where they are known
    every: int = EVERY
    starts: np.ndarray | None = None  # byte of the first header of each every-th sample


def is_stream(args):
    """Whether --data_dir is read as a stream: a URL, a pattern of .tar files or, by --streaming, a folder of them."""
    place = args.data_dir or ""
    tars = is_pattern(os.path.expanduser(place)) and place.lower().endswith(".tar")
    return is_url(place) or tars or bool(getattr(args, "streaming", False))


def shards_of(args):
    """[Shard, ...] of --data_dir in their order, counted. Raises DataError where they can't be, or there are none."""
    return _shards(args.data_dir, getattr(args, "shard_index", None))


def content_of_stream(args, shards=None):
    """A short hash of which shards there are, how large and of how many samples; shards: of shards_of, if at hand."""
    place = _place(args.data_dir)
    folder = f"{_folder(place).rstrip('/')}/"
    told = [(shard.path.removeprefix(folder), shard.count, shard.size) for shard in shards or shards_of(args)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _shards(data_dir, shard_index):
    return (_remote_shards if is_url(data_dir) else _find_shards)(data_dir, shard_index)


def _find_shards(data_dir, shard_index):
    place = _place(data_dir)
    where, folder = index_place(data_dir, shard_index), _folder(place)
    index = read_index(where, folder)
    if index is None and shard_index:
        raise DataError(f"--shard_index {shard_index}: there is no such file.")
    paths = _list(place, None if index is None else list(index))
    if index is not None:
        shards, unfit = _counts_of(paths, index)
        if not unfit:
            return shards
        if shard_index or is_url(place):
            raise DataError(f"{where} does not fit --data_dir: {unfit}; write it anew: {_command(data_dir)}.")
        _say_once(f"{where} is not used: {unfit}.")
        where = None  # it is somebody's: ours goes elsewhere
    if counted := _stats(paths):
        return counted
    if is_url(place):
        raise DataError(
            f"--data_dir {data_dir}: nothing says how many samples its shards have, neither {where} nor img2dataset's "
            f"_stats.json files. Write an index, once: {_command(data_dir)}."
        )
    return _made_here(paths, where if os.path.isdir(place) and paths == _tars(place) else None, folder)


@functools.cache
def _say_once(said):
    if int(os.environ.get("RANK", 0)) == 0:
        print(said, flush=True)


_remote_shards = functools.lru_cache(maxsize=8)(_find_shards)  # asked for by data, identity and caches


def _command(data_dir):
    where = " --shard_index FILE" if is_web(data_dir) else ""
    return f"python prepare_cache.py --write_index --data_dir '{data_dir}'{where}"


# Where they lie


def _place(data_dir):
    return data_dir if is_url(data_dir) else os.path.abspath(os.path.expanduser(data_dir))


def _is_tar(place):
    return place.partition("?")[0].lower().endswith(".tar")


def _folder(place):
    """The folder that an index of a --data_dir lies in."""
    return place if not (_is_tar(place) or is_pattern(place)) else parent_of(place)


def index_place(data_dir, shard_index):
    """The path or URL of the index of a --data_dir."""
    return _place(shard_index) if shard_index else join(_folder(_place(data_dir)), INDEX)


def _tars(folder):
    return [str(file) for file in files_in(Path(folder)) if file.suffix.lower() == ".tar"]


def _list(place, indexed):
    """The paths of the shards that a place names; of a URL of a folder those `indexed`, a list of URLs or None."""
    source = f"--data_dir {place}"
    if is_pattern(place):
        words = expand(place)
        paths = [path for word in words for path in (matching(word) if is_pattern(word) else [word])]
    elif _is_tar(place):
        paths = [place]
    elif is_url(place):
        paths = indexed or matching(join(place, "*.tar"))
        for path in paths:
            if ".." in path.split("/") or not (is_web(path) or path.startswith(f"{place.partition('://')[0]}://")):
                raise DataError(f"{source}: its index names the shard {path}, which leads outside of it.")
    elif not os.path.exists(place):
        raise DataError(f"{source} does not exist.")
    else:
        paths = [str(path) for path in train_first([Path(path) for path in _tars(place)], Path(place))]
    if not paths:
        of = "no .tar shards are there" if is_url(place) or is_pattern(place) else "it holds no .tar shards"
        raise DataError(f"{source}: {of}; other formats are read without --streaming.")
    missing = [path for path in paths if not is_url(path) and not os.path.isfile(path)]
    if missing:
        raise DataError(f"{source}: {len(missing)} of its {len(paths)} shards are not there, e.g. {missing[0]}.")
    return paths


# An index that is there


def read_index(where, folder):
    """{path: Shard} of an index, whose shards lie in `folder`; None where there is no file. Raises DataError."""
    content = read_file(where)
    if content is None:
        return None
    try:
        index = json.loads(content)
        if index["__kind__"] != KIND:
            raise ValueError(f"its __kind__ is {index['__kind__']}")
        shards = [_shard(entry, folder) for entry in index["shardlist"]]
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where} is no index of shards ({type(error).__name__}: {first_line(error)}): name one by --shard_index, "
            "which prepare_cache.py --write_index writes."
        ) from None
    return {shard.path: shard for shard in shards}


def _shard(entry, folder):
    url, count = entry["url"], int(entry["nsamples"])
    size, every, starts = entry.get("filesize"), int(entry.get("every", EVERY)), entry.get("starts")
    if starts is not None:
        starts = np.array(starts, dtype=np.int64)
    if count < 0 or every < 1 or (starts is not None and len(starts) != -(-count // every)):
        raise ValueError(f"what it says of {url} can't be")
    path = url if is_url(url) else join(folder, url)
    return Shard(path if is_url(path) else os.path.abspath(path), count, size and int(size), every, starts)


def _counts_of(paths, index):
    """([Shard, ...] of these paths by an index, or why it does not fit them, in words, or None).

    An index that was written from another place, or of a copy, names shards of other folders: the file's name counts,
    where no two are alike.
    """
    names = {path.rpartition("/")[2]: shard for path, shard in index.items()}
    names, shards = names if len(names) == len(index) else {}, []
    for path in paths:
        shard = index.get(path) or names.get(path.rpartition("/")[2])
        if shard is None:
            return None, f"{path} is not in it"
        size = None if is_url(path) else os.path.getsize(path)
        if None not in (size, shard.size) and size != shard.size:
            return None, f"{path} has {size} bytes, not {shard.size}"
        shards.append(shard._replace(path=path))
    return shards, None


def _stats(paths):
    """[Shard, ...] by img2dataset's 00000_stats.json beside each, or None."""

    def of(path):
        try:
            return Shard(path, int(json.loads(read_file(f"{path.removesuffix('.tar')}_stats.json"))["successes"]))
        except (TypeError, ValueError, KeyError):  # TypeError: there is none
            return None

    if of(paths[0]) is None:
        return None
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(of, paths))
    return None if None in found else found


# Making one


def make_index(paths, threads=THREADS):
    """[Shard, ...] of shards whose headers are read, in so many threads at once. Raises DataError."""

    def of(path):
        notes = Notes()

        def read():
            with open_file(path) as file:
                return whole_samples(file, path, notes)

        try:
            offsets, size = persistently(path, read)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"{path} can't be read as a .tar ({first_line(error)}).") from None
        return Shard(path, len(offsets), size, EVERY, np.array(offsets[::EVERY], dtype=np.int64)), notes

    shards, notes = [], Notes()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for shard, said in tqdm(pool.map(of, paths), desc="shards", total=len(paths), disable=len(paths) < 8):
                shards.append(shard)
                for what, count in said.counts.items():
                    notes.add(what, said.examples[what], count)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    notes.say()
    if not sum(shard.count for shard in shards):
        raise DataError(f"No pair of an image and a caption is in {len(paths)} .tar files, e.g. {paths[0]}.")
    return shards


def write_index(shards, where, folder):
    """Write shards, whose paths or URLs are said as they lie in `folder`, as an index."""
    folder, entries = f"{folder.rstrip('/')}/", []
    for shard in shards:
        entry = {"url": shard.path.removeprefix(folder), "nsamples": shard.count, "filesize": shard.size}
        entries.append({**entry, "every": shard.every, "starts": shard.starts.tolist()})
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    head = f'"__kind__": "{KIND}", "wids_version": 1'
    write_file(where, f'{{{head}, "shardlist": [\n{lines}\n]}}\n'.encode())


def write_index_of(data_dir, shard_index):
    """prepare_cache.py --write_index: count the shards of --data_dir, and write and say it. Raises DataError."""
    place, where = _place(data_dir), index_place(data_dir, shard_index)
    shards = make_index(_list(place, None))
    try:
        write_index(shards, where, _folder(place))
    except (OSError, UnreachableDataError) as error:
        raise DataError(f"{where} can't be written ({first_line(error)}): name a place by --shard_index.") from None
    _remote_shards.cache_clear()
    print(f"Written: {where}, {len(shards):,} shards of {sum(shard.count for shard in shards):,} samples.", flush=True)


def _made_here(paths, where, folder):
    """[Shard, ...] of local shards that nothing counts: counted once, by one of the processes, and kept.

    where: the index beside the shards, if it may lie there; else, or where that can't be written, a file in HF_HOME.
    """
    told = [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths]
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]
    kept = Path(HF_HOME) / "shard_indexes" / f"{Path(folder).name}-{key}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_name(f".{kept.name}.lock")):  # of several processes one counts
        places = [place for place in (where, str(kept)) if place]
        for place in places:
            if index := read_index(place, folder):
                shards, unfit = _counts_of(paths, index)
                if not unfit:
                    return shards
        print(f"Counting the samples of the {len(paths):,} .tar in {folder}, once.", flush=True)
        shards = make_index(paths)
        for place in places:
            with contextlib.suppress(OSError):  # a folder that can't be written
                write_index(shards, place, folder)
                break
    return shards
