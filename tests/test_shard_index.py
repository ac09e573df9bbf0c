"""Which shards there are: indexes of all kinds, URLs and networks that fail, patterns, and what can't be a stream."""

import http.server
import json
import threading
from pathlib import Path

import pytest
import torch
from conftest import run_in_process
from launching import error_of
from sharding import UNEVEN, check, picture, stream, wids, write_shards
from test_data import make_args, write

import prepare_cache
from common import remote, shard_index
from common.data import load_dataset_from_args
from common.errors import DataError, UnreachableDataError
from common.loader import build_dataloader
from common.shard_index import INDEX, KIND

pytestmark = pytest.mark.usefixtures("apart")

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
