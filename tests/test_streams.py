"""Shards as a stream: every sample once however they are split, few bytes read, and runs of them."""

import io
import json
import re
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_in_process
from launching import assert_same, error_of, flags, fork_and_wait, kill_9_while_saving, preparing, quick, start_from
from sharding import UNEVEN, check, noise, picture, stream, wids, write_shards
from test_data import load, make_args, write_tar
from test_data import run_sampler as sampled

import prepare_cache
import train_guided
from benchmarks import streaming
from common import shard_index, streams
from common.data import load_dataset_from_args
from common.loader import GlobalBatchSampler, build_dataloader
from common.preflight import batches
from common.shard_index import INDEX, KIND
from common.streams import LANES, ShardReader, stream_order

pytestmark = pytest.mark.usefixtures("apart")


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
