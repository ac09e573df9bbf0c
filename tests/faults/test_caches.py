"""Caches that are broken: refused by name, and made again by the command that made them."""

import json

import pytest
import torch
from conftest import run_in_process
from launching import copied, each, error_of, preparing, quick
from safetensors.torch import load_file

import prepare_cache
from common.cache import INDEX


def truncated(folder):
    shard = folder / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def missing(folder):
    (folder / "shard-00000.safetensors").unlink()


def unfinished(folder):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "shards": None}))


def no_json(folder):
    (folder / INDEX).write_text("{")


BROKEN = {
    "truncated": (truncated, "shard-00000.safetensors has"),
    "without one of its files": (missing, "shard-00000.safetensors is missing"),
    "not complete": (unfinished, "it is not complete"),
    "without a readable index": (no_json, "cache.json can't be read"),
}


@each(BROKEN, "a cache is {}", "refused by name, before anything loads; prepare_cache.py makes it again")
def test_a_broken_cache_is_one_sentence_and_is_mended(pipelines, pictures, caches, tmp_path, capsys, case):
    import train_guided

    damage, said = BROKEN[case]
    folder = copied(caches(), tmp_path / "cache")
    whole = {name: value.clone() for name, value in load_file(folder / "shard-00000.safetensors").items()}
    damage(folder)
    line = quick(pipelines, tmp_path / "run", data=["--cache_dir", folder], steps=1)
    error = error_of(train_guided, line, capsys)
    assert error.startswith(f"error: --cache_dir {folder}: ") and said in error and error.count("\n") == 1
    again = preparing(pipelines, pictures, folder)
    run_in_process(prepare_cache, *again, *["--overwrite_cache"] * (case == "without a readable index"))
    mended = load_file(folder / "shard-00000.safetensors")
    assert mended.keys() == whole.keys() and all(torch.equal(mended[name], whole[name]) for name in whole)


@pytest.mark.fault("a bit of a cache flips", "named where it is read; prepare_cache.py makes that shard again")
def test_a_flipped_bit_is_found_where_it_is_read(pipelines, pictures, caches, tmp_path, capsys):
    import train_guided

    folder = copied(caches(), tmp_path / "cache")
    shard = folder / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    length = int.from_bytes(content[:8], "little")
    first, last = json.loads(content[8 : 8 + length])["latents"]["data_offsets"]
    for offset in range(first, last, (last - first) // 22):  # of every row
        content[8 + length + offset] ^= 1
    shard.write_bytes(content)
    line = quick(pipelines, tmp_path / "run", data=["--cache_dir", folder], steps=1)
    error = error_of(train_guided, line, capsys)
    error = error[error.index("error: ") :]
    assert "shard-00000.safetensors is damaged (the checksum of latents" in error and error.count("\n") == 1
    run_in_process(prepare_cache, *preparing(pipelines, pictures, folder))
    run_in_process(train_guided, *line, "--overwrite_output_dir")
