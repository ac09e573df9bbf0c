"""Data from anywhere: what is right is read right, what is not is refused by name or left out and said."""

import csv
import gzip
import io
import json
import os
import re
import shutil
import unicodedata

import datasets
import numpy as np
import pytest
from launching import each
from PIL import Image
from test_data import image_bytes, load, write, write_coco, write_tar

from common import remote, shard_index, streams
from common.errors import DataError

PNG = image_bytes()


def rows_of(captions, column="text", name="file_name"):
    return [{name: f"{number}.png", column: caption} for number, caption in enumerate(captions)]


def jsonl(folder, rows, name="metadata.jsonl"):
    pictures(folder, len(rows))
    return write(folder / name, "\n".join(json.dumps(row) for row in rows))


def pictures(folder, count):
    for number in range(count):
        write(folder / f"{number}.png", PNG)


def pairs(folder, captions=("a", "b")):
    pictures(folder, len(captions))
    for number, caption in enumerate(captions):
        write(folder / f"{number}.txt", caption)


def shard(folder, members=None, name="0.tar"):
    folder.mkdir(exist_ok=True)
    write_tar(folder / name, members or {"a.png": PNG, "a.txt": b"a", "b.png": PNG, "b.txt": b"b"})
    return folder / name


def table(folder, rows, name="metadata.csv", **options):
    pictures(folder, len(rows))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return write(folder / name, text.getvalue())


def parquet(folder, rows, name="a.parquet"):
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / name)


def linked(folder):
    pairs(folder / "here", ["a"])
    pairs(folder.parent / "away", ["b"])
    (folder / "more").symlink_to(folder.parent / "away")


def loop(folder):
    pairs(folder)
    (folder / "again").symlink_to(folder)


def img2dataset(folder):
    """What img2dataset --output_format files writes."""
    for number in range(2):
        write(folder / f"00000/{number}.jpg", PNG)
        write(folder / f"00000/{number}.txt", "ab"[number])
        write(folder / f"00000/{number}.json", json.dumps({"caption": "ab"[number], "status": "success"}))
    parquet(folder, [{"url": "http://example.org", "caption": "c", "key": "0", "status": "success"}], "00000.parquet")
    write(folder / "00000_stats.json", "{}")


def decomposed(folder):
    write(folder / unicodedata.normalize("NFD", "café.png"), PNG)
    write(folder / "metadata.jsonl", json.dumps({"file_name": unicodedata.normalize("NFC", "café.png"), "text": "a"}))


def cut(file, share=0.6):
    os.truncate(file, int(file.stat().st_size * share))


def cut_at_header(folder):
    file = shard(folder, {f"{n}.{kind}": content for n in "abcd" for kind, content in (("png", PNG), ("txt", b"a"))})
    os.truncate(file, 2 * (1024 + 512 + 512) + 256)  # a.png and b.png are a block of header and one or two of bytes


def index_of(folder, count, size=None):
    """webdataset's index of 0.tar, which says that it has so many samples."""
    entries = [{"url": "0.tar", "nsamples": count, **({"filesize": size} if size else {})}]
    write(folder / "index.json", json.dumps({"__kind__": "wids-shard-index-v1", "shardlist": entries}))


READ = {  # what is there: (how it is made, the captions that are read, what is said)
    "UTF-16 captions (Notepad)": (lambda d: (pairs(d, ["a"]), write(d / "0.txt", "é".encode("utf-16"))), ["é"], ""),
    "a byte order mark": (lambda d: (pairs(d, ["a"]), write(d / "0.txt", b"\xef\xbb\xbfa")), ["a"], ""),
    "CRLF line ends in a csv": (lambda d: table(d, rows_of("ab"), lineterminator="\r\n"), ["a", "b"], ""),
    "a csv with semicolons": (lambda d: table(d, rows_of("ab"), delimiter=";"), ["a", "b"], ""),
    "a csv with quoted commas": (lambda d: table(d, rows_of(["a, b", "c"])), ["a, b", "c"], ""),
    "spaces after commas": (
        lambda d: (pictures(d, 1), write(d / "metadata.csv", 'file_name, text\n0.png, "a, b"\n')), ["a, b"], ""),
    "Windows paths": (
        lambda d: (write(d / "b/0.png", PNG), write(d / "metadata.csv", "file_name,text\nb\\0.png,a\n")), ["a"], ""),
    "a null caption in jsonl": (lambda d: jsonl(d, rows_of(["a", None])), ["a", ""], "line 2"),
    "an empty caption file": (lambda d: pairs(d, ["a", ""]), ["a", ""], "1.txt"),
    "a null caption in a shard": (
        lambda d: shard(d, {"a.png": PNG, "a.json": b'{"caption": null}', "b.png": PNG, "b.txt": b"b"}),
        ["", "b"], "0.tar:a.json"),
    "a null caption beside another in COCO": (
        lambda d: (write_coco(d, "captions_val2017.json", "val2017"), add_null(d)), ["one", "nine"], ""),
    "an image without a caption": (lambda d: (pairs(d, ["a"]), write(d / "lonely.png", PNG)), ["a"], "lonely.png"),
    "a caption without an image": (lambda d: (pairs(d, ["a"]), write(d / "lonely.txt", "b")), ["a"], "lonely.txt"),
    "a key without a caption in a shard": (
        lambda d: shard(d, {"a.png": PNG, "a.txt": b"a", "lonely.png": PNG}), ["a"], "0.tar:lonely"),
    "a doubled key in a shard": (
        lambda d: shard(d, {"a.png": PNG, "a.jpg": PNG, "a.txt": b"a"}), ["a"], "two images in one shard"),
    "equal keys in two shards": (lambda d: (shard(d), shard(d, name="1.tar")), ["a", "b", "a", "b"], ""),
    "a shard cut in an image": (lambda d: cut(shard(d), 0.17), None, "cut or damaged"),
    "a shard cut at a header": (cut_at_header, None, "cut or damaged"),
    "a shard without its end mark": (lambda d: os.truncate(shard(d), 4 * 1024), None, "may be cut"),
    "a link to another folder": (linked, ["a", "b"], ""),
    "a link back up": (loop, ["a", "b"], ""),
    "what img2dataset writes as files": (img2dataset, ["a", "b"], "00000.parquet has no column of images"),
    "a .tar left beside a good set": (
        lambda d: (jsonl(d, rows_of(["a"])), shard(d, {"0.png": PNG}, "images.tar")), ["a"], "images.tar"),
    "a table of something else beside pairs": (
        lambda d: (pairs(d, ["a"]), write(d / "metadata.csv", "id,score\n0,7\n")), ["a"], "has no caption column"),
    "other annotations in COCO's place, beside pairs": (
        lambda d: (pairs(d, ["a"]), write(d / "annotations/captions_x.json", "[]")), ["a"], "no file of COCO"),
    "images that metadata does not name": (
        lambda d: (jsonl(d, rows_of(["a"])), write(d / "stray.png", PNG)), ["a"], "stray.png"),
    "COCO in images/train2017/": (
        lambda d: write_coco(d, "captions_train2017.json", "images/train2017"), ["one", "nine"], ""),
    "a parquet set in [brackets]": (
        lambda d: parquet(d / "[art] *", [{"image": {"bytes": PNG, "path": None}, "text": "a"}]), ["a"], ""),
    "metadata in the folders of the images": (
        lambda d: (jsonl(d / "one", rows_of(["a"])), jsonl(d / "two", rows_of(["b"]))), ["a", "b"], ""),
    "metadata.parquet of an imagefolder": (
        lambda d: (pictures(d, 2), parquet(d, rows_of("ab"), "metadata.parquet")), ["a", "b"], ""),
    "another name of the image column": (lambda d: jsonl(d, rows_of(["a"], name="filename")), ["a"], ""),
    "file names in NFD, metadata in NFC": (decomposed, ["a"], ""),
    "spaces and emoji in names": (lambda d: (write(d / "a 🎨.png", PNG), write(d / "a 🎨.txt", "a")), ["a"], ""),
    "endings in upper case": (lambda d: (write(d / "A.PNG", PNG), write(d / "A.TXT", "a")), ["a"], ""),
    "captions as .caption": (lambda d: (pictures(d, 1), write(d / "0.caption", "a")), ["a"], ""),
    "a .json of metadata beside a .txt": (
        lambda d: shard(d, {"a.png": PNG, "a.json": b"{broken", "a.txt": b"a"}), ["a"], ""),
    "captions of several lines": (lambda d: pairs(d, ["a\nb"]), ["a\nb"], ""),
}  # fmt: skip


def add_null(folder):
    file = folder / "annotations/captions_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["caption"] != "uno"]
    content["annotations"].append({"image_id": 9, "caption": None})
    file.write_text(json.dumps(content))


REFUSED = {  # what is wrong: (how it is made, words of the sentence)
    "captions in cp1252": (lambda d: (pairs(d), write(d / "1.txt", "café".encode("cp1252"))), "1.txt is neither"),
    "captions in cp932": (lambda d: (pairs(d), write(d / "1.txt", "赤い".encode("cp932"))), "1.txt is neither"),
    "a caption with zero bytes": (lambda d: (pairs(d), write(d / "1.txt", b"a\0b")), "1.txt is not UTF-8"),
    "an unquoted comma in a csv": (
        lambda d: (pictures(d, 1), write(d / "metadata.csv", "file_name,text\n0.png,a cat, a mat\n")),
        r"metadata.csv, line 2 has 3 cells and the header 2"),
    "a quote in a csv that is never closed": (
        lambda d: (pictures(d, 1), write(d / "metadata.csv", 'file_name,text\n0.png,"a\n')), "metadata.csv, line 2"),
    "a column named twice": (lambda d: write(d / "metadata.csv", "text,text\na,b\n"), "names a column twice"),
    "a broken line of jsonl": (
        lambda d: (pictures(d, 2), write(d / "metadata.jsonl", '{"file_name": "0.png", "text": "a"}\n{"file_name"')),
        "metadata.jsonl, line 2 is no JSON"),
    "a caption that is a number": (lambda d: jsonl(d, rows_of(["a", 7])), "line 2, text: a caption there is no text"),
    "no caption column": (lambda d: jsonl(d, rows_of(["a"], column="words")), "line 1 has no caption column"),
    "no image column": (lambda d: jsonl(d, rows_of(["a"], name="picture")), "it has picture, text"),
    "an image column of another name in captions.json": (
        lambda d: write(d / "captions.json", '[{"picture": "1.png", "caption": "a"}]'), "it has picture, caption"),
    "images that do not exist": (lambda d: write(d / "metadata.jsonl", json.dumps(rows_of("a")[0])), "e.g. .*0.png"),
    "COCO without its images": (
        lambda d: (write_coco(d, "captions_val2017.json", "val2017"), shutil.rmtree(d / "val2017")),
        "none of its 2 images exists, e.g. .*val2017/7.png"),
    "COCO annotations without captions": (
        lambda d: write(d / "annotations/captions_val2017.json", '{"images": [], "annotations": [{"image_id": 1}]}'),
        "captions_val2017.json is no file of COCO"),
    "an image path that leads outside": (
        lambda d: write(d / "metadata.jsonl", '{"file_name": "../../etc/passwd", "text": "a"}'), "leads outside of"),
    "an empty shard among others": (lambda d: (shard(d), write(d / "1.tar", b"")), "1.tar can't be read"),
    "a shard that is no tar": (lambda d: (shard(d), write(d / "1.tar", b"no" * 900)), "1.tar can't be read"),
    "a compressed shard": (lambda d: write(d / "0.tar", gzip.compress(b"x" * 2000)), "0.tar is compressed"),
    "broken JSON in a shard": (
        lambda d: (shard(d), shard(d, {"c.png": PNG, "c.json": b"{bad"}, "1.tar")), "1.tar:c.json is no JSON"),
    "shards without captions": (lambda d: shard(d, {"a.png": PNG}), "No pair of an image and a caption is in its 1"),
    "a broken parquet file": (lambda d: write(d / "a.parquet", b"no table"), "a.parquet can't be read"),
    "a parquet without images": (lambda d: parquet(d, [{"text": "a"}]), "a.parquet has no column of images; it has"),
    "captions under another name (captions.csv)": (
        lambda d: (pictures(d, 1), write(d / "captions.csv", "image,caption\n0.png,a\n")), "captions.csv"),
    "metadata under another name": (
        lambda d: (pictures(d, 1), write(d / "metadata1000.jsonl", "{}")), "metadata1000.jsonl"),
    "images alone": (lambda d: pictures(d, 2), "None of the 2 images"),
    "an empty folder": (lambda d: d.mkdir(), "is empty"),
    "a folder of other things": (lambda d: write(d / "notes.md", ""), "found 1 files: notes.md"),
    "hidden files alone": (lambda d: write(d / ".a/0.png", PNG), "is empty"),
    "a table of no rows": (lambda d: write(d / "metadata.jsonl", "\n"), "no usable samples"),
}  # fmt: skip
STREAMS = {  # .tar shards with --streaming, what is wrong: (how it is made, words of the sentence)
    "an empty shard among others": (lambda d: (shard(d), write(d / "1.tar", b"")), "1.tar can't be read"),
    "a shard that is no tar": (lambda d: (shard(d), write(d / "1.tar", b"no" * 900)), "1.tar can't be read"),
    "a compressed shard": (lambda d: write(d / "0.tar", gzip.compress(b"x" * 2000)), "0.tar is compressed"),
    "shards without captions": (lambda d: shard(d, {"a.png": PNG}), "No pair of an image and a caption is in 1"),
    "shards whose images come before all captions": (
        lambda d: shard(d, {"a.png": PNG, "b.png": PNG, "a.txt": b"a", "b.txt": b"b"}),
        "0.tar: the files of a do not lie beside each other"),
    "no shards": (pairs, "holds no .tar shards; other formats are read without --streaming"),
    "an index.json of something else": (
        lambda d: (shard(d), write(d / "index.json", '{"version": 2, "shards": []}')),
        "index.json is no index of shards"),
}  # fmt: skip
LEFT_OUT = {  # the same, where the rest is read: (how it is made, the captions that are read, what is said)
    "a shard cut in an image": (lambda d: cut(shard(d), 0.17), ["a"], "cut or damaged"),
    "a shard cut at a header": (cut_at_header, ["a", "a"], "cut or damaged"),
    "a sample with broken JSON": (
        lambda d: shard(d, {"a.png": PNG, "a.json": b"{bad", "b.png": PNG, "b.txt": b"b"}),
        ["b", "b"], "0.tar:a.json is no JSON"),
    "a sample whose .json has no caption": (
        lambda d: shard(d, {"a.png": PNG, "a.json": b"{}", "b.png": PNG, "b.txt": b"b"}),
        ["b", "b"], "0.tar:a.json has no caption"),
    "a caption in cp1252": (
        lambda d: shard(d, {"a.png": PNG, "a.txt": "é".encode("cp1252"), "b.png": PNG, "b.txt": b"b"}),
        ["b", "b"], "a.txt is neither UTF-8 nor UTF-16"),
    "an index that counts too many": (
        lambda d: (shard(d), index_of(d, 3)), ["a", "b", "a"], "sample 2 of .*0.tar: its shard has 2 whole samples"),
    "an index of other shards than these": (
        lambda d: (shard(d), index_of(d, 7, size=99)),
        ["a", "b"], "index.json is not used: .*0.tar has .* bytes, not 99"),
}  # fmt: skip
PICTURES = {  # what lies beside nine good ones: how it is made
    "an image of no bytes": b"",
    "a cut image": PNG[: len(PNG) // 2],
    "a PostScript file called .png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "a web page called .png": b"<!DOCTYPE html><html>404</html>",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(shard_index, "HF_HOME", str(tmp_path / "cache"))


@each(READ, "{}", "read right; whatever is left out is said")
def test_what_is_right_is_read_and_what_is_left_out_is_said(tmp_path, caplog, case):
    make, captions, said = READ[case]
    make(tmp_path / "data")
    dataset = load(tmp_path / "data")
    found = [dataset.captions(index)[0] for index in range(dataset.size)]
    check = [dataset[index, 0, index]["pixel_values"] for index in range(dataset.size)]
    assert len(check) == dataset.size and not dataset.unreadable.any()
    if captions is None:  # a part of what there was
        assert 1 <= len(found) <= 4 and set(found) <= {"a", "b"}
    else:
        assert found == captions
    assert said in caplog.text
    if not said:
        assert not caplog.records


@each(REFUSED, "{}", "refused in a sentence that names the file, and the line in it")
def test_what_is_wrong_is_refused_by_name(tmp_path, case):
    make, words = REFUSED[case]
    make(tmp_path / "data")
    with pytest.raises(DataError) as error:
        load(tmp_path / "data")
    said = str(error.value)
    assert re.search(words, said) and "\n" not in said and "data" in said, said


@each(STREAMS, "{}, with --streaming", "refused in a sentence that names the shard or file")
def test_shards_that_can_t_be_a_stream_are_refused_by_name(tmp_path, case):
    make, words = STREAMS[case]
    make(tmp_path / "data")
    with pytest.raises(DataError) as error:
        load(tmp_path / "data", streaming=True)
    said = str(error.value)
    assert re.search(words, said) and "\n" not in said and "data" in said, said


@each(LEFT_OUT, "{}, with --streaming", "the rest is read; what is left out is said, and too much of it ends the run")
def test_a_stream_goes_on_past_what_is_broken(tmp_path, caplog, capsys, case):
    make, captions, said = LEFT_OUT[case]
    make(tmp_path / "data")
    dataset = load(tmp_path / "data", streaming=True)
    assert [dataset[index, 0, index]["caption"] for index in range(dataset.size)] == captions
    assert re.search(said, caplog.text + capsys.readouterr().out)


@pytest.mark.fault("a URL of shards that fails for a while", "read again; where it goes on, one sentence ends the run")
def test_a_url_that_fails(tmp_path, monkeypatch):
    shard(tmp_path / "data")
    load(tmp_path / "data", streaming=True)  # writes the index
    dataset, failures, opened = load(f"file://{tmp_path}/data"), [], streams.open_file

    def fail(path):
        if failures:
            raise failures.pop()
        return opened(path)

    monkeypatch.setattr(streams, "open_file", fail)
    monkeypatch.setattr(remote, "WAITS", (0, 0))
    failures += [ConnectionResetError("reset"), TimeoutError("late")]
    assert dataset[0, 0, 0]["caption"] == "a"
    failures += [ConnectionResetError("reset")] * 3
    with pytest.raises(DataError, match="data/0.tar can't be read, tried 3 times .ConnectionResetError: reset"):
        load(f"file://{tmp_path}/data")[1, 0, 0]


@each(PICTURES, "{} among good ones", "left out, counted and named once; the next one stands in")
def test_a_broken_picture_is_left_out_and_named(tmp_path, caplog, case):
    pairs(tmp_path / "data", [str(number) for number in range(10)])
    write(tmp_path / "data/3.png", PICTURES[case])
    dataset = load(tmp_path / "data")
    assert [sample["caption"] for sample in (dataset[3, 0, 0], dataset[3, 1, 0])] == ["4", "4"]
    assert caplog.text.count("skipping an unreadable image") == 1 and "3.png" in caplog.text


@pytest.mark.fault("a cache of `datasets` that can't be written", "said as that, with the variable to set")
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    from pathlib import Path

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/dev/null/cache"))
    parquet(tmp_path / "data", [{"image": {"bytes": PNG, "path": None}, "text": "a"}])
    with pytest.raises(DataError, match="The cache of `datasets`, /dev/null/cache, can't be written"):
        load(tmp_path / "data")


@pytest.mark.fault("a picture that is transparent, of 16 or 32 bits, CMYK", "the same in training and judging")
def test_pictures_of_every_mode_train(tmp_path):
    modes = {"a.png": Image.new("RGBA", (16, 16), (9, 9, 9, 0)), "b.tif": Image.new("I", (16, 16), 65535)}
    modes["c.tif"] = Image.fromarray(np.ones((16, 16), np.float32))
    modes["d.jpg"] = Image.new("CMYK", (16, 16))
    for name, image in modes.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        image.save(tmp_path / "data" / name)
        write(tmp_path / "data" / f"{name[0]}.txt", "white")
    dataset = load(tmp_path / "data")
    assert all(float(dataset[number, 0, 0]["pixel_values"].min()) > 0.98 for number in range(4))
