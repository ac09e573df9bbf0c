"""Shards as a stream: every sample once however they are split, few bytes read, URLs, indexes, and runs of them."""

import http.server
import io
import json
import re
import shutil
import tarfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_in_process
from launching import assert_same, error_of, flags, fork_and_wait, kill_9_while_saving, preparing, quick, start_from
from PIL import Image
from test_data import load, make_args, write, write_tar
from test_data import run_sampler as sampled

import prepare_cache
import train_guided
from benchmarks import streaming
from common import remote, shard_index, streams
from common.data import load_dataset_from_args
from common.errors import DataError, UnreachableDataError
from common.loader import GlobalBatchSampler, build_dataloader
from common.preflight import batches
from common.shard_index import INDEX, KIND
from common.streams import LANES, ShardReader, stream_order

UNEVEN = (7, 40, 33, 1, 64, 20)  # samples of the shards of `shards`


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Indexes that can't lie beside their shards stay in the test; nothing waits for a network."""
    monkeypatch.setattr(shard_index, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(remote, "WAITS", (0, 0, 0))
    shard_index._remote_shards.cache_clear()


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


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards") / "made")


@pytest.fixture
def shards(made, tmp_path):
    """165 samples in six shards, without an index."""
    return Path(shutil.copytree(made, tmp_path / "shards"))


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


# The order


def test_64_nodes_share_1024_uneven_shards():
    """Every sample once an epoch, no rank with less, each a different part of few shards, whatever it begins at."""
    counts = np.random.default_rng(0).integers(0, 40, 1024)
    size, batch, ranks = int(counts.sum()), 4, 64
    steps = -(-size // (batch * ranks))
    keys = [
        list(GlobalBatchSampler(size, batch, 1, rank, ranks, 0, steps, 0, counts=counts.tolist()))
        for rank in range(ranks)
    ]
    assert {len(own) for own in keys} == {steps} and {len(micro) for own in keys for micro in own} == {batch}
    read = sorted((step * batch * ranks + position, i) for own in keys for b in own for i, step, position in b)
    assert sorted(index for _, index in read[:size]) == list(range(size))
    assert len({int(np.searchsorted(counts.cumsum(), i, side="right")) for _, i in read[: batch * ranks]}) > 200
    beyond = [index for _, index in read[size:]]  # of the next epoch, which the last step reaches into
    index_of = stream_order(0, counts, batch * ranks)
    assert beyond == [index_of(count) for count in range(size, steps * batch * ranks)]
    second = [index_of(count) for count in range(size, 2 * size)]
    assert sorted(second) == list(range(size)) and second != [index for _, index in read[:size]]
    ends = np.cumsum(counts)
    for own in keys[::21]:  # in each lane the next sample is the one that follows, or the first of a shard
        lanes = [
            [own[step][p][0] for step in range(first, steps - 1, LANES)] for p in range(batch) for first in (0, 1)
        ]
        for lane in lanes:
            steady = [b == a + 1 or b in (0, *ends) for a, b in zip(lane, lane[1:])]
            assert all(steady), lane
    for rank in (0, 17, 63):
        tail = list(GlobalBatchSampler(size, batch, 1, rank, ranks, 50, steps, 0, counts=counts.tolist()))
        assert tail == keys[rank][50:]


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_lane_belongs_to_one_worker(workers, accumulation):
    """Micro-batches go to the workers in turns."""
    batch, owner, size = 5, {}, 100_000
    for number, micro in enumerate(GlobalBatchSampler(size, batch, accumulation, 1, 2, 0, 40, 0, counts=[size])):
        for _, step, position in micro:
            lane = (step * batch * 2 * accumulation + position) % (LANES * batch * 2 * accumulation)
            assert owner.setdefault(lane, number % workers) == number % workers


@pytest.mark.parametrize("counts", [(7, 40, 33, 0, 1), (3,), (1, 1)])
def test_layout_of_the_global_batch_changes_nothing(counts, monkeypatch):
    init = GlobalBatchSampler.__init__
    monkeypatch.setattr(GlobalBatchSampler, "__init__", lambda *a, **k: init(*a, **k, counts=list(counts)))
    size = sum(counts)
    reference, _ = sampled(size, 8, 1, 1)
    for layout in ((4, 1, 2), (1, 8, 1), (2, 2, 2)):
        assert sampled(size, *layout)[0] == reference
    read = list(reference.values())
    assert all(sorted(read[n : n + size]) == list(range(size)) for n in range(0, len(read) - size, size))
    assert sampled(size, 4, 1, 2, start=3)[0] == {key: index for key, index in reference.items() if key[0] >= 3}


# Reading


def test_a_folder_is_counted_once_and_read_as_it_lies(shards, capsys):
    dataset = stream(shards)
    assert dataset.size == sum(UNEVEN) and dataset.counts == list(UNEVEN)
    check(dataset, [0, 6, 7, 8, 46, 47, 80, 81, 164, 144, 145, 12, 11])
    assert "Counting the samples of the 6 .tar" in capsys.readouterr().out
    index = json.loads((shards / INDEX).read_text())
    assert index["__kind__"] == KIND and [entry["nsamples"] for entry in index["shardlist"]] == list(UNEVEN)
    check(stream(shards, max_train_samples=50), [49, 0])
    assert stream(shards, max_train_samples=50).counts == [7, 40, 3, 0, 0, 0] and not capsys.readouterr().out
    assert load(shards).size == sum(UNEVEN)  # the index disturbs nobody
    args = make_args(learning_rate=1.0, lr_scheduler="constant", lr_warmup_steps=0)
    assert batches(args, dataset, 1)[0] == ("stream", f"6 shards of 165 samples, --data_dir {shards}")


def test_an_index_that_can_t_lie_beside_its_shards(shards, tmp_path, monkeypatch, capsys):
    write_file = shard_index.write_file

    def refuse(place, content):
        if place == str(shards / INDEX):
            raise PermissionError(13, "Permission denied", place)
        write_file(place, content)

    monkeypatch.setattr(shard_index, "write_file", refuse)
    check(stream(shards), [3])
    assert not (shards / INDEX).exists() and len(list((tmp_path / "hf/shard_indexes").glob("*.json"))) == 1
    capsys.readouterr()
    check(stream(shards), [3])
    assert not capsys.readouterr().out  # it is found again
    write_shards(shards, (30, *UNEVEN[1:]))
    check(stream(shards), [30])
    assert "Counting" in capsys.readouterr().out


@pytest.mark.parametrize("pattern", ["{000..005}.tar", "*.tar", "{000,001,002,003}.tar", "00{0..1}.tar", "003.tar"])
def test_patterns(shards, pattern):
    for where in (shards, f"file://{shards}"):
        if where == shards:
            assert not (shards / INDEX).exists()
        else:
            shard_index.write_index_of(str(shards), None)
        dataset = stream(f"{where}/{pattern}", streaming=pattern == "003.tar")
        first = 80 if pattern == "003.tar" else 0
        check(dataset, range(min(dataset.size, 12)), range(first, first + 12))


class Counted(io.FileIO):
    """A file that counts the bytes that are read of it."""

    read_bytes, opened = Counter(), Counter()

    def __init__(self, path):
        super().__init__(path)
        self.opened[path] += 1

    def readinto(self, buffer):
        count = super().readinto(buffer)
        self.read_bytes[self.name] += count
        return count


def test_a_run_goes_on_from_any_step_by_a_few_bytes(tmp_path, monkeypatch):
    """The files of the batch's own samples and no others; and each sample's bytes once from there on."""
    folder = write_shards(tmp_path / "data", (100, 130, 90, 80), noise)
    dataset = stream(folder)
    sizes = {str(path): path.stat().st_size for path in folder.glob("*.tar")}
    monkeypatch.setattr(streams, "open_file", lambda path: io.BufferedReader(Counted(path), 1024))
    batch, sample = 4, sum(sizes.values()) / 400
    for start in (0, 1, 37, 73, 99, 250):
        Counted.read_bytes.clear(), Counted.opened.clear()
        fresh = stream(folder)
        micros = list(GlobalBatchSampler(400, batch, 1, 0, 1, start, start + 24, 0, counts=dataset.counts))
        for key in micros[0]:
            fresh[key]
        own = Counter(fresh.reader.shards[fresh.place(index)[0]].path for index, _, _ in micros[0])
        assert Counted.opened == own and sum(own.values()) == batch
        headers = 32 * (1024 + 2 * 1024)  # at most, with what is read around each
        assert sum(Counted.read_bytes.values()) < batch * (1.2 * sample + headers) < sum(sizes.values()) / 8
        for micro in micros[1:LANES]:
            for key in micro:
                fresh[key]
        Counted.read_bytes.clear(), Counted.opened.clear()
        for micro in micros[LANES:]:
            for key in micro:
                fresh[key]
        assert sum(Counted.read_bytes.values()) < 16 * batch * 1.2 * sample + 3 * LANES * batch * headers / 8


def test_a_reader_holds_few_files(shards, monkeypatch):
    monkeypatch.setattr(streams, "OPEN", 3)
    dataset = stream(shards)
    check(dataset, [0, 50, 90, 20, 150, 1, 51, 91, 21, 151])
    assert len(dataset.reader.files) == 3
    check(dataset, [6])  # the last of its shard
    assert (0, 7) not in dataset.reader.files


def test_captions_alone(shards, monkeypatch):
    """No image is opened, none of their bytes are read; a sample without a caption is passed over."""
    members = {f"{n}.png": b"no image at all" * 3000 for n in range(40)} | {f"{n}.txt": b"ok" for n in range(40)}
    write_tar(shards / "000.tar", dict(sorted(members.items())))
    dataset = stream(shards, needs_images=False)
    monkeypatch.setattr(streams, "open_file", lambda path: io.BufferedReader(Counted(path), 1024))
    Counted.read_bytes.clear()
    assert [dataset[index, 0, 0]["caption"] for index in range(40)] == ["ok"] * 40
    assert Counted.read_bytes[str(shards / "000.tar")] < 40 * 6000
    assert "pixel_values" not in dataset[0, 0, 0]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_workers_read_what_one_process_reads(shards):
    """Also where the main process has read of the same files before they are forked."""

    def read(**changes):
        args = make_args(data_dir=str(shards), streaming=True, shard_index=None, max_train_steps=30, **changes)
        process = type("Process", (), {"process_index": 0, "num_processes": 1, "device": torch.device("cpu")})
        dataset = load_dataset_from_args(args)
        assert dataset.captions(33) == ["33"]
        return list(build_dataloader(dataset, args, process, 0))

    alone = read()
    for workers in (2, 3):
        for batch, other in zip(alone, read(dataloader_num_workers=workers), strict=True):
            assert batch["captions"] == other["captions"] and batch["indices"] == other["indices"]
            assert torch.equal(batch["pixel_values"], other["pixel_values"])


def test_a_stream_is_what_is_judged_against(shards):
    from common.judging.image_sets import real_dataset

    real = real_dataset(stream(f"{shards}/*.tar"), 5)
    assert real.identity["shards"] == stream(shards).content
    assert real.identity != real_dataset(stream(f"{shards}/00[12].tar"), 5).identity


def test_what_lies_between_the_samples(tmp_path):
    """Other files of a key, keys without an image or a caption, hidden ones, sub-folders, JSON with and without."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_tar(
        folder / "0.tar",
        {
            "a/0.jpg": picture(0), "a/0.cls": b"7", "a/0.json": b'{"width": 3}', "a/0.txt": b"0",
            "a/lonely.png": picture(9), "a/._1.png": b"mac", "a/1.JSON": b'{"caption": "1"}', "a/1.PNG": picture(1),
            "words.txt": b"none", "b/1.jpg": picture(2), "b/1.caption": b"2", "b/1.seg.png": picture(8),
            "b/2.png": picture(3), "b/2.txt": "3\ufeff".encode("utf-16"), "empty.png": picture(4), "empty.txt": b"",
        },
    )  # fmt: skip
    dataset = stream(folder)
    assert dataset.size == 5
    assert [dataset.captions(n)[0].strip("\ufeff") for n in (4, 0, 1, 2, 3)] == ["", "0", "1", "2", "3"]
    wids(folder, [{"url": "0.tar", "nsamples": 5}])  # without offsets, the same are counted
    dataset = stream(folder)
    assert [dataset.captions(n)[0].strip("\ufeff") for n in (3, 0, 4, 2, 1)] == ["3", "0", "", "2", "1"]


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names(tmp_path, layout):
    """Which have headers of their own before them."""
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data/0.tar", "w", format=layout) as tar:
        for number in range(70):
            for kind, content in (("png", picture(number)), ("txt", str(number).encode())):
                member = tarfile.TarInfo(f"{'é' * 90}{number:03d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    check(stream(tmp_path / "data"), [40, 64, 0, 1, 69, 33, 32, 31])


# Indexes


def test_indexes_of_others(shards, caplog, capsys):
    """wids's, with paths as they were where it was written; then img2dataset's counts, without an index."""
    wids(shards, [{"url": f"elsewhere/{n:03d}.tar", "nsamples": count} for n, count in enumerate(UNEVEN)], name="x")
    dataset = stream(shards)
    check(dataset, [164, 7, 8, 120, 46, 9, 10])
    assert "6 shards have no offsets in an index" in caplog.text and "Counting" not in capsys.readouterr().out
    (shards / INDEX).unlink()
    for number, count in enumerate(UNEVEN):
        write(shards / f"{number:03d}_stats.json", json.dumps({"count": count + 9, "successes": count}))
    check(stream(f"file://{shards}/{{000..005}}.tar"), [164, 7, 8, 120, 46, 9, 10])
    check(stream(shards), [100])
    assert not (shards / INDEX).exists()


def test_counts_that_are_wrong(shards, caplog):
    """Too many: what isn't there is passed over like a picture that can't be read. Too few: the rest is not read."""
    counts = [8, 40, 30, 1, 64, 20]
    wids(shards, [{"url": f"{n:03d}.tar", "nsamples": count} for n, count in enumerate(counts)])
    dataset = stream(shards)
    assert dataset[7, 0, 0]["caption"] == "7" == dataset[8, 0, 0]["caption"]
    assert int(dataset.unreadable.sum()) == 1 and "sample 7 of" in caplog.text
    assert "its shard has 7 whole samples" in caplog.text
    assert dataset[77, 0, 0]["caption"] == "76" and dataset[78, 0, 0]["caption"] == "80"
    wids(shards, [{"url": f"{n:03d}.tar", "nsamples": count * 2} for n, count in enumerate(UNEVEN)])
    dataset = stream(shards, max_train_samples=80)
    with pytest.raises(DataError, match=r"of 80 images of --data_dir .* can't be read, e.g. sample \d+ of .*\.tar"):
        for index in range(80):
            dataset[index, 0, 0]


def test_an_index_that_no_longer_fits(shards, capsys):
    stream(shards)
    capsys.readouterr()
    write_shards(shards, (30, *UNEVEN[1:]))
    check(stream(shards), [30, 0])
    said = capsys.readouterr().out
    assert "index.json is not used" in said and "000.tar has" in said and "Counting" in said
    other = write(shards / "other.json", (shards / INDEX).read_text())
    with pytest.raises(DataError, match=r"other.json does not fit --data_dir: .*000.tar has \d+ bytes, not"):
        stream(shards, shard_index=str(other))
    with pytest.raises(DataError, match="--shard_index nowhere.json: there is no such file"):
        stream(shards, shard_index="nowhere.json")


@pytest.mark.parametrize(
    "content",
    ["[]", "{", "{}", '{"__kind__": "other"}', '{"shards": []}', "é", f'{{"__kind__": "{KIND}", "shardlist": [3]}}'],
)
def test_no_index_at_all(shards, content):
    write(shards / INDEX, content)
    with pytest.raises(DataError, match=r"index.json is no index of shards \(.*\): name one by --shard_index"):
        stream(shards)


@pytest.mark.parametrize(
    "entry",
    [
        {"nsamples": -1}, {"nsamples": 40, "starts": [0]}, {"nsamples": 40, "every": 0}, {"nsamples": "many"},
        {"nsamples": 9, "starts": "0"}, {"nsamples": None},
    ],
)  # fmt: skip
def test_an_index_of_nonsense(shards, entry):
    wids(shards, [{"url": "000.tar", **entry}])
    with pytest.raises(DataError, match="index.json is no index of shards"):
        stream(shards)


def test_prepare_cache_writes_the_index(shards, tmp_path, capsys):
    """Of a folder, of URLs, elsewhere; past a shard that is cut, of which whole samples alone count."""
    whole = (shards / "001.tar").read_bytes()
    (shards / "001.tar").write_bytes(whole[: len(whole) // 2 + 700])
    run_in_process(prepare_cache, "--write_index", "--data_dir", f"file://{shards}/{{000..005}}.tar")
    index = json.loads((shards / INDEX).read_text())
    counts = [entry["nsamples"] for entry in index["shardlist"]]
    assert 15 < counts[1] < 25 and [*counts[:1], *counts[2:]] == [*UNEVEN[:1], *UNEVEN[2:]]
    said = f"Written: file://{shards}/index.json, 6 shards of {sum(counts)} samples."
    assert said in capsys.readouterr().out
    dataset = stream(f"file://{shards}")
    check(dataset, [*range(7), *range(7, 7 + counts[1]), 7 + counts[1]], [*range(7 + counts[1]), 47])
    elsewhere = tmp_path / "elsewhere.json"
    run_in_process(prepare_cache, "--write_index", "--data_dir", shards / "00[04].tar", "--shard_index", elsewhere)
    check(stream(shards / "00[04].tar", shard_index=str(elsewhere)), [7], [81])
    error = error_of(prepare_cache, ["--write_index"], capsys)
    assert "--write_index counts the .tar shards of --data_dir" in error
    error = error_of(prepare_cache, ["--write_index", "--data_dir", shards, "--shard_index", "/dev/null/x"], capsys)
    assert "/dev/null/x can't be written" in error and "--shard_index" in error


# URLs


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A web server that gives parts of files, and now and then fails."""

    failures, asked, ranges = 0, [], True

    def do_GET(self):
        file, part = Path(self.directory) / self.path.lstrip("/"), self.headers.get("Range")
        self.asked.append((self.path, part))
        if type(self).failures:
            type(self).failures -= 1
            return self.send_error(503)
        if not file.is_file():
            return self.send_error(404)
        content = file.read_bytes()
        if part is None or not self.ranges:
            return self._answer(200, content)
        first, last = map(int, part.removeprefix("bytes=").split("-"))
        if first >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        piece = content[first : last + 1]
        self._answer(206, piece, f"bytes {first}-{first + len(piece) - 1}/{len(content)}")

    def _answer(self, code, content, part=None):
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        if part:
            self.send_header("Content-Range", part)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def web(shards, monkeypatch):
    """The URL of a web server that has the shards."""
    monkeypatch.setattr(Ranges, "failures", 0)
    monkeypatch.setattr(Ranges, "asked", [])
    monkeypatch.setattr(Ranges, "ranges", True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Ranges(*a, directory=str(shards)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_web_server(web, shards, tmp_path, monkeypatch, capsys):
    place = f"{web}/{{000..005}}.tar"
    with pytest.raises(DataError, match="nothing says how many samples .* --write_index .* --shard_index FILE"):
        stream(place)
    with pytest.raises(DataError, match="a web server lists no files; name them"):
        stream(web)
    error = error_of(prepare_cache, ["--write_index", "--data_dir", place], capsys)
    assert "index.json can't be written" in error and "by --shard_index" in error
    run_in_process(prepare_cache, "--write_index", "--data_dir", place, "--shard_index", tmp_path / "i.json")
    dataset = stream(place, shard_index=str(tmp_path / "i.json"))
    Ranges.asked.clear()
    check(dataset, range(7, 40))
    assert len(Ranges.asked) == 1  # a shard of this size is one block
    shard_index.write_index_of(str(shards), None)
    check(stream(web), [164, 3])  # by the index that lies there
    for name in [f"{number:03d}.tar" for number in range(6)]:
        (shards / name).rename(shards / f"{name}.gone")
    with pytest.raises(UnreachableDataError, match=r"http.*/004.tar can't be read \(.*404"):
        stream(web)[100, 0, 0]


def test_a_network_that_fails(web, shards, monkeypatch):
    """It is tried again; a URL that goes on failing ends the run in a sentence, no sample is called broken for it."""
    shard_index.write_index_of(str(shards), None)
    dataset = stream(web)
    Ranges.failures = 3
    check(dataset, [90])
    Ranges.failures = 4
    with pytest.raises(UnreachableDataError, match=r"http.*/001.tar can't be read, tried 4 times \(HTTPError: HTTP E"):
        dataset[30, 0, 0]
    assert not dataset.unreadable.any()
    check(dataset, [30, 31])
    Ranges.ranges = False
    with pytest.raises(UnreachableDataError, match="its server gives no parts of files"):
        dataset[81 + 40, 0, 0]


def test_a_failing_network_is_one_sentence_from_a_worker(web, shards):
    shard_index.write_index_of(str(shards), None)
    args = make_args(data_dir=web, streaming=False, shard_index=None, dataloader_num_workers=1)
    process = type("Process", (), {"process_index": 0, "num_processes": 1, "device": torch.device("cpu")})
    dataset = load_dataset_from_args(args)
    Ranges.failures = 99
    with pytest.raises(UnreachableDataError) as caught:
        next(iter(build_dataloader(dataset, args, process, 0)))
    assert str(caught.value).startswith("http") and "\n" not in str(caught.value)


def test_a_file_system_of_fsspec(shards):
    """Whose files know of no two places at once: memory's are one object."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/shards", recursive=True)
    try:
        shard_index.write_index_of("memory://shards", None)
        check(stream("memory://shards"), [0, 90, 1, 91, 150, 92])
        check(stream("memory://shards/*.tar"), [0, 90])
        with pytest.raises(UnreachableDataError, match="no://where/index.json can't be opened .*no"):
            stream("no://where")
        memory.rm("/shards/003.tar")
        with pytest.raises(UnreachableDataError, match="memory.*003.tar can't be read"):
            stream("memory://shards")[80, 0, 0]
        memory.pipe("/outside/index.json", json.dumps(
            {"__kind__": KIND, "shardlist": [{"url": "file:///etc/x.tar", "nsamples": 3}]}).encode())  # fmt: skip
        with pytest.raises(DataError, match="names the shard file:///etc/x.tar, which leads outside"):
            stream("memory://outside")
    finally:
        memory.rm("/", recursive=True)


def test_braces():
    assert remote.expand("s3://b/{00..02}/{a,b}.tar") == [
        f"s3://b/{number}/{letter}.tar" for number in ("00", "01", "02") for letter in "ab"
    ]
    assert remote.expand("x{8..11}.tar") == ["x8.tar", "x9.tar", "x10.tar", "x11.tar"]
    assert remote.expand("plain.tar") == ["plain.tar"]
    for wrong in ("x{1..}.tar", "x{3..1}.tar", "x{a}.tar"):
        with pytest.raises(DataError, match="is neither {first..last} nor {one,other}"):
            remote.expand(wrong)


# Mistakes


def test_flags_that_do_not_go_together(shards, tmp_path):
    write(tmp_path / "plain/a.png", picture(0))
    write(tmp_path / "plain/a.txt", b"a")
    with pytest.raises(DataError, match="holds no .tar shards; other formats are read without --streaming"):
        stream(tmp_path / "plain")
    with pytest.raises(DataError, match="no .tar shards are there"):
        stream(tmp_path / "plain/*.tar")
    with pytest.raises(DataError, match="1 of its 2 shards are not there, e.g. .*006.tar"):
        stream(shards / "{005,006}.tar")
    with pytest.raises(DataError, match="nowhere does not exist"):
        stream(tmp_path / "nowhere")
    with pytest.raises(DataError, match="--aspect_ratio_buckets needs the size of every image"):
        stream(shards, aspect_ratio_buckets=True)
    with pytest.raises(DataError, match="--shard_index is of .tar shards that are read as a stream: add --streaming"):
        stream(shards, streaming=False, shard_index="x.json")
    with pytest.raises(DataError, match="--streaming reads the .tar shards of --data_dir"):
        load_dataset_from_args(make_args(dataset_name="shapes", streaming=True))


# Runs


def data_of(shards):
    return ["--data_dir", shards, "--streaming", "--random_flip"]


@pytest.fixture(scope="session")
def streamed(pipelines, made, tmp_path_factory):
    """(shards, folder): four steps of train_guided.py from a stream, in one go."""
    folder = tmp_path_factory.mktemp("streamed")
    shards = Path(shutil.copytree(made, folder / "shards"))
    shard_index.write_index_of(str(shards), None)
    run_in_process(train_guided, *flags(pipelines, "train_guided", folder / "run", data=data_of(shards)))
    return shards, folder / "run"


def test_a_killed_run_goes_on_bit_for_bit(pipelines, streamed, tmp_path):
    shards, whole = streamed
    arguments = flags(pipelines, "train_guided", tmp_path / "run", data=data_of(shards))
    kill_9_while_saving(tmp_path, ".checkpoint-4.tmp", ROOT / "train_guided.py", *arguments)
    run_in_process(train_guided, *arguments, "--resume_from_checkpoint", "latest", "--dataloader_num_workers", 2)
    assert_same("train_guided", tmp_path / "run", whole)


def test_two_processes_are_one(pipelines, streamed, tmp_path):
    shards, whole = streamed
    arguments = flags(pipelines, "train_guided", tmp_path / "run", "--batch_size", 2, data=data_of(f"file://{shards}"))
    arguments.remove("--streaming")
    fork_and_wait(tmp_path, ROOT / "train_guided.py", *arguments, processes=2)
    assert_same("train_guided", tmp_path / "run", whole, rtol=0, atol=1e-5)


def test_a_run_is_of_its_shards(pipelines, streamed, tmp_path, capsys):
    """The same ones in another place are, by URL or pattern too; others are not."""
    shards, whole = streamed
    start_from("train_guided", whole, tmp_path / "run")
    moved = Path(shutil.copytree(shards, tmp_path / "moved"))
    more = ["--resume_from_checkpoint", "latest"]
    pattern = ["--data_dir", f"file://{moved}/{{000..005}}.tar", "--random_flip"]
    arguments = flags(pipelines, "train_guided", tmp_path / "run", *more, data=pattern)
    run_in_process(train_guided, *arguments)
    assert f"{moved}/{{000..005}}.tar is what was {shards}" in capsys.readouterr().out
    assert_same("train_guided", tmp_path / "run", whole)
    write_shards(moved, (30, *UNEVEN[1:]))
    arguments = flags(pipelines, "train_guided", tmp_path / "run", *more, data=data_of(moved))
    error = error_of(train_guided, arguments, capsys)
    assert re.search(rf"data_dir was file://{moved}/.*, now {moved}, which holds something else", error)


def test_a_cache_of_a_stream_is_the_stream(pipelines, streamed, tmp_path):
    """Batch for batch; the cache knows of the flag."""
    shards, _ = streamed
    plain = flags(pipelines, "train_guided", tmp_path / "plain", data=[*data_of(shards), "--center_crop"])
    run_in_process(train_guided, *plain)
    run_in_process(prepare_cache, *preparing(pipelines, shards, tmp_path / "cache"), "--streaming")
    cached = ["--cache_dir", tmp_path / "cache", "--random_flip"]
    run_in_process(train_guided, *flags(pipelines, "train_guided", tmp_path / "cached", data=cached))
    assert_same("train_guided", tmp_path / "plain", tmp_path / "cached")


def test_roll_outs_of_a_stream(pipelines, streamed, tmp_path):
    import train_flash_lora

    line = [*preparing(pipelines, streamed[0], tmp_path / "rollouts"), "--rollouts", 9, "--num_ddim_steps", 1]
    run_in_process(prepare_cache, *line, "--streaming", "--random_flip")
    rollouts = ["--rollout_cache", tmp_path / "rollouts", "--num_ddim_steps", 1]
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path / "run", data=rollouts, steps=1))
    assert (tmp_path / "run/lora/final").is_dir()


def test_the_benchmark_measures_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(streams, "open_file", streams.open_file)  # which it replaces
    small = ["--shards", 3, "--samples", 70, "--batch_size", 4, "--positions", 2, "--steps", 2, "--work_dir", tmp_path]
    streaming.main(streaming.parse_args([str(word) for word in small]))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["samples"] == 210 and found["counts_alone"]["at_random"] > 0
    assert 0 < found["with_offsets"]["megabytes_read"] < found["gigabytes"] * 1000


def test_the_reader_travels_without_its_files(shards):
    import pickle

    dataset = stream(shards)
    check(dataset, [3])
    again = pickle.loads(pickle.dumps(dataset.reader))
    assert isinstance(again, ShardReader) and not again.files and again.captions(0, 4) == ["4"]
