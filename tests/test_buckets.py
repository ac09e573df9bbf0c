"""Aspect-ratio buckets: which shape a step has and which samples, and training on them with and without a cache."""

import importlib
from collections import Counter

import pytest
import torch
from conftest import launch, run_in_process
from launching import SHAPES, assert_same, error_of, flags, preparing, start_from
from PIL import Image

import prepare_cache
from common.buckets import bucket_order, bucket_shapes, nearest, to_shape
from common.data import load_dataset_from_args
from common.loader import GlobalBatchSampler


def test_shapes_have_about_as_many_pixels():
    for resolution, step in ((512, 64), (1024, 64), (64, 8), (32, 8)):
        shapes = bucket_shapes(resolution)
        assert shapes[0] == (resolution, resolution) and len(shapes) == len(set(shapes)) > 2
        assert {(width, height) for height, width in shapes} == set(shapes)
        for height, width in shapes:
            assert height % step == width % step == 0 and max(height / width, width / height) <= 2
            assert 0.6 * resolution**2 < height * width <= resolution**2
    assert bucket_shapes(512)[nearest(bucket_shapes(512), (640, 480))] == (448, 576)


@pytest.mark.parametrize("global_batch", [1, 4, 6])
def test_every_sample_once_a_permutation_and_one_shape_a_step(global_batch):
    numbers = [0] * 13 + [1] * 5 + [2] * 2 + [1] * 2
    index_of = bucket_order(3, numbers, global_batch)
    order = [index_of(count) for count in range(20 * len(numbers))]
    order = order[: len(order) // global_batch * global_batch]
    for first in range(0, len(order), global_batch):
        assert len({numbers[index] for index in order[first : first + global_batch]}) == 1
    for bucket in set(numbers):
        size, own = numbers.count(bucket), [index for index in order if numbers[index] == bucket]
        for first in range(0, len(own) - size + 1, size):
            assert len(set(own[first : first + size])) == size
    counts = Counter(order)
    assert max(counts.values()) - min(counts.values()) <= 1 + global_batch / 2
    assert [bucket_order(3, numbers, global_batch)(count) for count in range(99)] == order[:99]
    assert [bucket_order(4, numbers, global_batch)(count) for count in range(99)] != order[:99]


def test_processes_share_the_global_batch():
    numbers = [0] * 9 + [1] * 7

    def read(batch, accumulation, processes, start):
        steps = {}
        for rank in range(processes):
            sampler = GlobalBatchSampler(16, batch, accumulation, rank, processes, start, 12, 0, buckets=numbers)
            for keys in sampler:
                for index, step, position in keys:
                    steps[step, position] = index
        return steps

    whole = read(4, 1, 1, 0)
    assert read(2, 1, 2, 0) == read(1, 2, 2, 0) == read(1, 4, 1, 0) == whole
    assert read(2, 1, 2, 7) == {key: index for key, index in whole.items() if key[0] >= 7}


def test_an_image_is_cut_to_its_shape():
    image = Image.new("RGB", (100, 60))
    image.paste((255, 0, 0), (0, 0, 50, 60))
    cut, ids = to_shape(image, (32, 48), 1.0, 0.5)
    assert cut.size == (48, 32) and ids.tolist() == [60, 100, 0, round(10 / 1.875), 32, 48]
    assert cut.getpixel((0, 16)) == (255, 0, 0) and cut.getpixel((47, 16)) == (0, 0, 0)


CASES = [("train_flash_lora", "sdxl"), ("train_student_kd", "sd"), ("train_add", "v"), ("prune_and_quantize", "sd")]


@pytest.mark.parametrize("name, kind", [pytest.param(*case, marks=pytest.mark.xdist_group(case[0])) for case in CASES])
def test_buckets_train_resume_and_are_cached(pipelines, pictures, tmp_path, name, kind):
    script, cache = importlib.import_module(name), tmp_path / "cache"
    data = ["--data_dir", pictures, "--center_crop", "--random_flip", "--aspect_ratio_buckets"]
    run_in_process(script, *flags(pipelines, name, tmp_path / "plain", data=data, kind=kind))
    run_in_process(prepare_cache, *preparing(pipelines, pictures, cache, kind), "--aspect_ratio_buckets")
    assert len(list(cache.glob("shard-*.safetensors"))) > 2
    cached = ["--cache_dir", cache, "--random_flip"]
    run_in_process(script, *flags(pipelines, name, tmp_path / "cached", data=cached, kind=kind))
    assert_same(name, tmp_path / "plain", tmp_path / "cached")
    start_from(name, tmp_path / "plain", tmp_path / "resumed")
    resumed = flags(pipelines, name, tmp_path / "resumed", data=cached, kind=kind)
    run_in_process(script, *resumed, "--resume_from_checkpoint", "latest")
    assert_same(name, tmp_path / "plain", tmp_path / "resumed")


def test_two_processes_have_the_shape_of_one(pipelines, pictures, tmp_path):
    import train_guided

    data = ["--data_dir", pictures, "--aspect_ratio_buckets"]
    run_in_process(train_guided, *flags(pipelines, "train_guided", tmp_path / "one", data=data, kind="sdxl"))
    line = flags(pipelines, "train_guided", tmp_path / "two", "--batch_size", 2, data=data, kind="sdxl")
    launch("train_guided.py", *line, processes=2)
    assert_same("train_guided", tmp_path / "one", tmp_path / "two", atol=1e-5, rtol=1e-3)


def test_samples_know_their_size(pipelines, pictures):
    args = prepare_cache.parse_args([str(word) for word in preparing(pipelines, pictures, "unused")])
    args.aspect_ratio_buckets = True
    dataset = load_dataset_from_args(args)
    for index in range(len(dataset)):
        sample = dataset[index, 0, 0]
        assert sample["pixel_values"].shape[1:] == dataset.shapes[dataset.buckets[index]]
        assert sample["time_ids"][4:].tolist() == list(sample["pixel_values"].shape[1:])
        assert torch.isfinite(sample["pixel_values"]).all()


def test_what_has_no_shapes_is_refused(pipelines, pictures, tmp_path, capsys):
    import train_guided

    line = flags(pipelines, "train_guided", tmp_path, "--aspect_ratio_buckets", data=SHAPES)
    assert "rendered shapes are squares" in error_of(train_guided, line, capsys)
    line = [*preparing(pipelines, pictures, tmp_path / "cache"), "--rollouts", 2, "--aspect_ratio_buckets"]
    assert "roll-outs are of squares" in error_of(prepare_cache, line, capsys)
