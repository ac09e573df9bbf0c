"""Data: every format of --data_dir and --dataset_name, broken images, and an order that only the seed decides."""

import csv
import io
import json
import logging
import os
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from common.data import ShapesDataset, load_dataset_from_args
from common.errors import DataError
from common.loader import GlobalBatchSampler, build_dataloader, collate
from common.randomness import STREAMS, sample_generator
from common.shapes import caption_of, training_sample

RED, GREEN = (255, 0, 0), (0, 255, 0)


def make_args(**changes):
    defaults = {
        "data_dir": None,
        "dataset_name": None,
        "resolution": 16,
        "center_crop": True,
        "random_flip": False,
        "seed": 0,
        "image_column": None,
        "caption_column": None,
        "caption_template": "a photo of a {label}",
        "max_train_samples": None,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 4,
        "dataloader_num_workers": 0,
    }
    return SimpleNamespace(**{**defaults, **changes})


def load(path, needs_images=True, **changes):
    return load_dataset_from_args(make_args(data_dir=str(path), **changes), needs_images)


def image_bytes(color=RED, size=(20, 24), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, "PNG")
    return file.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def noise_image(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def write_coco(root, json_name, image_folder):
    content = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in (7, 9)],
        "annotations": [
            {"image_id": 7, "caption": "one "},
            {"image_id": 9, "caption": "nine"},
            {"image_id": 7, "caption": "uno"},
        ],
    }
    write(root / "annotations" / json_name, json.dumps(content))
    for i in (7, 9):
        write(root / image_folder / f"{i}.png", image_bytes())


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def captions_of(dataset):
    return [dataset[i, 0, i]["caption"] for i in range(dataset.size)]


def check_red(sample, resolution=16):
    pixels = sample["pixel_values"]
    assert pixels.shape == (3, resolution, resolution) and pixels.dtype == torch.float32
    assert torch.equal(pixels.amax((1, 2)), torch.tensor([1.0, -1, -1]))
    assert torch.equal(pixels.amin((1, 2)), torch.tensor([1.0, -1, -1]))


@pytest.mark.parametrize("image_folder", ["train2017", "images", "."])
def test_coco(tmp_path, image_folder):
    write_coco(tmp_path, "captions_train2017.json", image_folder)
    write(tmp_path / "annotations" / "captions_val2017.json", "never read")
    dataset = load(tmp_path)
    assert dataset.size == 2
    check_red(dataset[0, 0, 5])
    assert {dataset[0, step, 0]["caption"] for step in range(20)} == {"one", "uno"}
    assert dataset[1, 0, 0]["caption"] == "nine"
    assert set(dataset[0, 0, 5]) == {"pixel_values", "time_ids", "caption", "index", "position", "step"}
    assert load(tmp_path, max_train_samples=1).size == 1


def test_coco_takes_other_splits_and_leaves_out_what_is_missing(tmp_path, caplog):
    write_coco(tmp_path, "captions_val2017.json", "val2017")
    (tmp_path / "val2017" / "7.png").unlink()
    assert captions_of(load(tmp_path)) == ["nine"]
    assert "7.png" in caplog.text
    (tmp_path / "val2017" / "9.png").unlink()
    with pytest.raises(DataError, match="none of its 2 images exists"):
        load(tmp_path)
    assert load(tmp_path, needs_images=False).size == 2


def test_webdataset(tmp_path, caplog):
    write_tar(
        tmp_path / "train-0.tar",
        {"a/1.png": image_bytes(), "a/1.txt": b"first", "a/1.json": b'{"width": 3}', "lonely.png": image_bytes()},
    )
    write_tar(tmp_path / "train-1.tar", {"2.json": b'{"caption": "second"}', "2.PNG": image_bytes()})
    write_tar(tmp_path / "test-0.tar", {"3.png": image_bytes(), "3.txt": b"never read"})
    dataset = load(tmp_path)
    assert captions_of(dataset) == ["first", "second"]
    assert "lonely" in caplog.text
    check_red(dataset[0, 0, 0])
    check_red(dataset[1, 0, 0])
    assert captions_of(load(tmp_path / "train-1.tar")) == ["second"]
    write(tmp_path / "train-2.tar", b"not a tar file" * 100)
    with pytest.raises(DataError, match="can't be read"):
        load(tmp_path)


def test_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "table"
    folder.mkdir()
    write(tmp_path / "outside.png", image_bytes())
    write(folder / "inside.png", image_bytes())
    cells = [
        {"bytes": image_bytes(), "path": None},
        {"bytes": None, "path": "inside.png"},
        {"bytes": None, "path": "../outside.png"},
    ]
    table = datasets.Dataset.from_dict({"image": cells, "prompt": ["one", "two", "three"]})
    table.to_parquet(folder / "a.parquet")
    dataset = load(folder)
    assert captions_of(load(folder, needs_images=False)) == ["one", "two", "three"]
    check_red(dataset[0, 0, 0])
    check_red(dataset[1, 0, 0])
    assert dataset[2, 0, 0]["caption"] == "one" and int(dataset.unreadable.sum()) == 1  # ../outside.png is not read
    assert load(folder / "a.parquet").size == 3
    with pytest.raises(DataError, match="no usable --caption_column 'words'; it has image, prompt"):
        load(folder, caption_column="words")
    with pytest.raises(DataError, match="no usable --image_column 'prompt'"):
        load(folder, image_column="prompt")

    binary = tmp_path / "binary"
    binary.mkdir()
    datasets.Dataset.from_dict({"jpg": [image_bytes()], "text": [["a", "b"]]}).to_parquet(binary / "a.parquet")
    dataset = load(binary)
    check_red(dataset[0, 0, 0])
    assert {dataset[0, step, 0]["caption"] for step in range(20)} == {"a", "b"}
    datasets.Dataset.from_dict({"jpg": [], "text": []}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="none.parquet"):
        load(tmp_path / "none.parquet")
    write(binary / "b.parquet", b"broken")
    with pytest.raises(DataError, match="parquet files that can't be read"):
        load(binary)


@pytest.mark.parametrize("layout", ["metadata.jsonl", "metadata.csv", "train/metadata.jsonl"])
def test_imagefolder(tmp_path, layout):
    metadata = tmp_path / layout
    rows = [{"file_name": "sub/1.png", "text": "one, with\u2028a comma"}, {"file_name": "2.png", "text": "two"}]
    for row in rows:
        write(metadata.parent / row["file_name"], image_bytes())
    if metadata.suffix == ".csv":
        with open(metadata, "w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        write(metadata, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    dataset = load(tmp_path)
    assert captions_of(dataset) == ["one, with\u2028a comma", "two"]
    check_red(dataset[0, 0, 0])
    with pytest.raises(DataError, match="no --caption_column 'title'; it has file_name, text"):
        load(tmp_path, caption_column="title")
    with pytest.raises(DataError, match="no column picture with a path; it has file_name, text"):
        load(tmp_path, image_column="picture")


def test_imagefolder_paths(tmp_path):
    write(tmp_path / "secret.png", image_bytes())
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        write(tmp_path / "data" / "metadata.jsonl", json.dumps({"file_name": name, "text": "x"}))
        with pytest.raises(DataError, match="leads outside of --data_dir"):
            load(tmp_path / "data")
    write(tmp_path / "data" / "metadata.jsonl", json.dumps({"file_name": "none.png", "text": "x"}))
    with pytest.raises(DataError, match="1 of the 1 images .* e.g. .*none.png"):
        load(tmp_path / "data")
    write(tmp_path / "data" / "metadata.jsonl", json.dumps({"file_name": "none.png", "rating": 3}))
    with pytest.raises(DataError, match="no caption column .*it has file_name, rating"):
        load(tmp_path / "data")
    write(tmp_path / "data" / "metadata.jsonl", "{broken")
    with pytest.raises(DataError, match="metadata.jsonl, line 1 is no JSON that can be read"):
        load(tmp_path / "data")


def test_captions_json(tmp_path):
    path = write(tmp_path / "captions.json", json.dumps([{"text": "a cat"}, {"text": "a dog"}]))
    for where in (tmp_path, path):
        dataset = load(where, needs_images=False)
        assert captions_of(dataset) == ["a cat", "a dog"]
        assert "pixel_values" not in dataset[0, 0, 0]
        with pytest.raises(DataError, match="captions without images"):
            load(where)
    write(path, json.dumps([{"text": "a cat", "image": "cat.png"}]))
    write(tmp_path / "cat.png", image_bytes())
    check_red(load(tmp_path)[0, 0, 0])
    for content in ("{}", "[]", "[", '[{"text": 3}]', '["a", {"b": 1}]'):
        write(path, content)
        with pytest.raises(DataError, match=str(tmp_path)):
            load(path, needs_images=False)


def test_pairs(tmp_path, caplog):
    write(tmp_path / "a.png", image_bytes())
    write(tmp_path / "b" / "c.png", image_bytes(255, mode="L"))
    with pytest.raises(DataError, match="None of the 2 images"):
        load(tmp_path)
    write(tmp_path / "b" / "c.txt", b"\xef\xbb\xbfa caption\n")
    dataset = load(tmp_path)
    assert captions_of(dataset) == ["a caption"]
    assert "1 images have no .txt" in caplog.text and "a.png" in caplog.text
    assert torch.equal(dataset[0, 0, 0]["pixel_values"], torch.ones(3, 16, 16))  # gray becomes RGB


def test_wrong_paths_and_flags(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is empty"):
        load(tmp_path)
    write(tmp_path / "notes.md", "hello")
    with pytest.raises(DataError, match=r"holds none of COCO.*found 1 files: notes.md"):
        load(tmp_path)
    with pytest.raises(DataError, match="--dataset_name shapes asks"):
        load_dataset_from_args(make_args())
    with pytest.raises(DataError, match="not both"):
        load(tmp_path, dataset_name="shapes")
    with pytest.raises(DataError, match="--max_train_samples 0"):
        load_dataset_from_args(make_args(dataset_name="shapes", max_train_samples=0))
    with pytest.raises(DataError, match=r"--dataset_name .*nowhere can't be loaded"):
        load_dataset_from_args(make_args(dataset_name=str(tmp_path / "nowhere")))


def test_saved_dataset_with_class_labels(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"img": [Image.new("L", (8, 8), 255)] * 3, "label": [1, 0, -1]}
    table = datasets.Dataset.from_dict(rows, features)
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "split")
    dataset = load_dataset_from_args(make_args(dataset_name=str(tmp_path / "split")))
    assert captions_of(dataset) == ["a photo of a dog", "a photo of a cat", ""]
    assert torch.equal(dataset[0, 0, 0]["pixel_values"], torch.ones(3, 16, 16))
    args = make_args(dataset_name=str(tmp_path / "split"), caption_template="the {label}", max_train_samples=1)
    assert captions_of(load_dataset_from_args(args, needs_images=False)) == ["the dog"]
    with pytest.raises(DataError, match="--caption_template 'none'"):
        load_dataset_from_args(make_args(dataset_name=str(tmp_path / "split"), caption_template="none"))

    datasets.Dataset.from_dict({"label": [3, 4]}).save_to_disk(tmp_path / "numbers")
    args = make_args(dataset_name=str(tmp_path / "numbers"))
    assert captions_of(load_dataset_from_args(args, needs_images=False)) == ["a photo of a 3", "a photo of a 4"]
    with pytest.raises(DataError, match="no column that would do for --image_column; it has label"):
        load_dataset_from_args(args)
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(tmp_path / "strange")
    with pytest.raises(DataError, match="no train split; it has a, b"):
        load_dataset_from_args(make_args(dataset_name=str(tmp_path / "strange")))
    table.select([]).save_to_disk(tmp_path / "empty")
    with pytest.raises(DataError, match=r"--dataset_name .*/empty "):
        load_dataset_from_args(make_args(dataset_name=str(tmp_path / "empty")))


def test_unreadable_images(tmp_path, caplog):
    for i in range(4):
        write(tmp_path / f"{i}.png", image_bytes())
        write(tmp_path / f"{i}.txt", f"caption {i}")
    noise = io.BytesIO()
    noise_image(64, 64).save(noise, "PNG")
    write(tmp_path / "1.png", noise.getvalue()[:2000])  # truncated
    write(tmp_path / "2.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # EPS is not opened
    dataset = load(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert dataset[1, 0, 0]["caption"] == "caption 3"
        assert dataset[1, 1, 0]["caption"] == "caption 3"
    assert len(caplog.records) == 2 and "1.png" in caplog.text and "2.png" in caplog.text  # each is named once
    assert int(dataset.unreadable.sum()) == 2
    write(tmp_path / "3.png", b"")
    with pytest.raises(DataError, match=r"3 of 4 images of .* can't be read, e.g. .*3.png"):
        dataset[3, 0, 0]


def test_huge_and_all_unreadable(tmp_path, monkeypatch):
    monkeypatch.setattr("common.images.MAX_PIXELS", 100)
    write(tmp_path / "a.png", image_bytes())
    write(tmp_path / "a.txt", "a")
    with pytest.raises(DataError, match="1 of 1 images"):
        load(tmp_path)[0, 0, 0]


def test_error_of_a_worker_is_one_sentence(tmp_path):
    write(tmp_path / "a.png", b"")
    write(tmp_path / "a.txt", "a")
    accelerator = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    loader = build_dataloader(load(tmp_path), make_args(dataloader_num_workers=1), accelerator, 0)
    with pytest.raises(DataError) as caught:
        next(iter(loader))
    assert str(caught.value).startswith("1 of 1 images") and "\n" not in str(caught.value)


def test_a_run_that_ends_in_an_error_does_not_wait_for_its_workers(tmp_path):
    noise_image(48, 16).save(tmp_path / "a.png")
    write(tmp_path / "a.txt", "a")
    script = """
import sys, types, torch
from common.data import load_dataset_from_args
from common.loader import build_dataloader
from test_data import make_args
args = make_args(data_dir=sys.argv[1], dataloader_num_workers=1)
accelerator = types.SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
batches = iter(build_dataloader(load_dataset_from_args(args), args, accelerator, 0))
next(batches)
raise RuntimeError("the trainer fails")
"""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    ended = subprocess.run(
        [sys.executable, "-c", script, tmp_path], env=env, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1 and ended.stderr.strip().endswith("RuntimeError: the trainer fails")


def test_augmentation(tmp_path):
    noise_image(48, 16).save(tmp_path / "a.png")
    write(tmp_path / "a.txt", "a")
    dataset = load(tmp_path, center_crop=False, random_flip=True)
    pixels = [dataset[0, step, 0]["pixel_values"] for step in range(8)]
    assert len({p.numpy().tobytes() for p in pixels}) > 4
    assert torch.equal(pixels[3], load(tmp_path, center_crop=False, random_flip=True)[0, 3, 0]["pixel_values"])
    whole = torch.from_numpy(np.array(noise_image(48, 16))).permute(2, 0, 1) / 127.5 - 1
    center = whole[:, :, 16:32]
    assert torch.equal(load(tmp_path)[0, 0, 0]["pixel_values"], center)
    flipped = {load(tmp_path, random_flip=True)[0, step, 0]["pixel_values"].numpy().tobytes() for step in range(16)}
    assert flipped == {center.numpy().tobytes(), center.flip(2).numpy().tobytes()}


def test_exif_and_16_bit_gray(tmp_path):
    image = Image.new("RGB", (32, 16), RED)
    image.paste(GREEN, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: green on top
    image.save(tmp_path / "a.png", exif=exif)
    write(tmp_path / "a.txt", "a")
    Image.fromarray(np.full((16, 16), 0x8000, np.uint16)).save(tmp_path / "b.png")
    write(tmp_path / "b.txt", "b")
    dataset = load(tmp_path)
    pixels = dataset[0, 0, 0]["pixel_values"]
    assert (pixels[:, 0].mean(1) == torch.tensor([-1.0, 1, -1])).all()
    assert (pixels[:, -1].mean(1) == torch.tensor([1.0, -1, -1])).all()
    assert torch.all(dataset[1, 0, 0]["pixel_values"] == torch.tensor(128.0) / 127.5 - 1)


@pytest.mark.parametrize("resolution", [32, 64, 48])
def test_shapes(resolution):
    dataset = load_dataset_from_args(make_args(dataset_name="shapes", resolution=resolution, seed=5))
    assert isinstance(dataset, ShapesDataset) and dataset.size is None
    image, scene = training_sample(5, 10**6)
    sample = dataset[10**6, 3, 2]
    assert sample["caption"] == caption_of(scene) and sample["pixel_values"].shape == (3, resolution, resolution)
    if resolution != 48:
        shrunk = sample["pixel_values"][:, :: resolution // 32, :: resolution // 32]
        assert torch.equal(shrunk, torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1)
    captions = load_dataset_from_args(make_args(dataset_name="shapes", seed=5), needs_images=False)
    assert captions[10**6, 3, 2] == {"position": 2, "step": 3, "index": 10**6, "caption": sample["caption"]}
    assert load_dataset_from_args(make_args(dataset_name="shapes", max_train_samples=9)).size == 9


def run_sampler(size, batch_size, accumulation, processes, start=0, stop=7, seed=3):
    """{(step, position): index}, and the keys in the order in which process 0 reads them."""
    ranks = [
        list(GlobalBatchSampler(size, batch_size, accumulation, rank, processes, start, stop, seed))
        for rank in range(processes)
    ]
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)
    return {
        (step, position): index for batches in ranks for batch in batches for index, step, position in batch
    }, ranks


@pytest.mark.parametrize("size", [13, 3, None])
def test_layout_of_the_global_batch_changes_nothing(size):
    reference, ranks = run_sampler(size, 8, 1, 1)
    assert list(reference) == [(step, position) for step in range(7) for position in range(8)]
    for layout in ((4, 1, 2), (1, 8, 1), (2, 2, 2), (1, 4, 2)):
        assert run_sampler(size, *layout)[0] == reference
    # Micro-batch by micro-batch, the ranks together read consecutive positions.
    _, ranks = run_sampler(size, 2, 2, 2)
    assert [[key[2] for key in batch] for batch in ranks[1][:2]] == [[2, 3], [6, 7]]
    tail = run_sampler(size, 4, 1, 2, start=3)[0]
    assert tail == {key: index for key, index in reference.items() if key[0] >= 3}
    assert len(GlobalBatchSampler(size, 4, 3, 0, 2, 3, 7, 0)) == 12


def test_epochs_are_permutations():
    indices = list(run_sampler(13, 8, 1, 1, stop=13)[0].values())
    epochs = [indices[start : start + 13] for start in range(0, 104, 13)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert indices != list(run_sampler(13, 8, 1, 1, stop=13, seed=4)[0].values())
    assert list(run_sampler(None, 8, 1, 1)[0].values()) == list(range(56))


def test_dataloaders_of_two_ranks_read_what_one_reads(tmp_path):
    for i in range(5):
        noise_image(24 + i, 16).save(tmp_path / f"{i}.png")
        write(tmp_path / f"{i}.txt", f"caption {i}")

    def batches(processes, rank, start=0, **changes):
        args = make_args(data_dir=str(tmp_path), center_crop=False, random_flip=True, **changes)
        accelerator = SimpleNamespace(process_index=rank, num_processes=processes, device=torch.device("cpu"))
        return list(build_dataloader(load_dataset_from_args(args), args, accelerator, start))

    state = torch.random.get_rng_state()
    alone = batches(1, 0, train_batch_size=4)
    resumed = batches(1, 0, start=2, train_batch_size=4, dataloader_num_workers=1)
    pair = [batches(2, rank) for rank in range(2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [batch["step"] for batch in alone] == [0, 1, 2, 3] and alone[0]["positions"] == [0, 1, 2, 3]
    for batch, first, second in zip(alone, *pair, strict=True):
        assert torch.equal(batch["pixel_values"], torch.cat([first["pixel_values"], second["pixel_values"]]))
        assert batch["captions"] == first["captions"] + second["captions"]
    for batch, again in zip(alone[2:], resumed, strict=True):
        assert torch.equal(batch["pixel_values"], again["pixel_values"]) and batch["captions"] == again["captions"]


def test_collate_without_images():
    samples = [{"caption": "a", "position": 4, "step": 2}, {"caption": "b", "position": 5, "step": 2}]
    assert collate(samples) == {"captions": ["a", "b"], "positions": [4, 5], "step": 2}


def test_sample_generator_streams():
    """The numbers of the streams are those of every run that there ever was: a resumed one draws as it did."""
    for name, number in STREAMS.items():
        key = [1, 2, 3] if name == "noise" else [1, 2, 3, number]
        state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
        expected = torch.rand(3, generator=torch.Generator().manual_seed(int(state)))
        assert torch.equal(torch.rand(3, generator=sample_generator(1, 2, 3, name)), expected)
    numbers = {"noise": 0, "augmentation": 1, "order": 2, "crop": 3, "evaluation": 4}
    assert {**STREAMS, **numbers} == STREAMS and len(set(STREAMS.values())) == len(STREAMS)
    assert torch.equal(sample_generator(1, 2, 3).get_state(), sample_generator(1, 2, 3, "noise").get_state())
    with pytest.raises(KeyError, match="crops"):
        sample_generator(1, 2, 3, "crops")
