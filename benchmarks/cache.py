"""How fast a cache of samples opens and is read, and what it takes in memory.

    python benchmarks/cache.py --records 1000000 --latent_side 2 --text 1 8
    python benchmarks/cache.py --records 20000 --latent_side 64 --text 77 768

Writes so many synthetic records into --work_dir, of SD1.5's size by default, opens them as a training script does and
reads --reads of them at random, in this one process. Prints one JSON line. What the system keeps of files in memory
that is free is not counted: the process does not hold it.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

from common.cache import FORMAT, SHARD, UNCONDITIONAL, Rows, read_index, write_index, write_rows  # noqa: E402


def write_synthetic(folder, records, latent_side=2, text=(1, 8)):
    """A cache of so many records, (4, side, side) latents and one caption each; the same content in every shard."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    rows = {
        "latents": torch.randn(SHARD, 1, 4, latent_side, latent_side, generator=generator),
        "prompt_embeds": torch.randn(SHARD, *text, generator=generator).half(),
        "time_ids": torch.zeros(SHARD, 6),
        "captions": torch.arange(SHARD, dtype=torch.int32),
        "first": torch.arange(SHARD + 1),
        "text": torch.full((SHARD,), ord("x"), dtype=torch.uint8),
        "text_ends": torch.arange(1, SHARD + 1),
    }
    save_file({"prompt_embeds": rows["prompt_embeds"][:1]}, folder / UNCONDITIONAL)
    shards, last = [], None
    for first in tqdm(range(0, records, SHARD), desc="shards"):
        count, name = min(SHARD, records - first), f"shard-{first // SHARD:05d}.safetensors"
        if last is None or count < SHARD:
            of_all = ("text", "first")
            write_rows(folder, name, {n: x if n in of_all else x[:count] for n, x in rows.items()}, "synthetic")
            last = (folder / name).read_bytes()
        else:
            (folder / name).write_bytes(last)
        shards.append((name, count, len(last)))
    made = {"format": FORMAT}
    index = {"kind": "samples", "count": records, "flipped": False, "flags": {}, "made_of": made, "shards": shards}
    write_index(folder, index)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", default="outputs/synthetic_cache")
    parser.add_argument("--records", type=int, default=20000)
    parser.add_argument("--latent_side", type=int, default=64)
    parser.add_argument("--text", type=int, nargs=2, default=(77, 768), help="tokens and width of an embedding")
    parser.add_argument("--reads", type=int, default=5000)
    args = parser.parse_args()
    folder = Path(args.work_dir) / f"{args.records}-{args.latent_side}-{args.text[0]}x{args.text[1]}"
    if not folder.is_dir():
        write_synthetic(folder, args.records, args.latent_side, args.text)
    began = time.perf_counter()
    rows = Rows(folder, read_index(folder, "--cache_dir", "samples"), "--cache_dir")
    opened = time.perf_counter() - began
    order = torch.randint(rows.size, (args.reads,), generator=torch.Generator().manual_seed(0)).tolist()
    began = time.perf_counter()
    for index in tqdm(order, desc="reads"):
        shard, row = rows.place(index)
        rows.row("latents", shard, row, 0)
        rows.caption(shard, int(rows.table(shard)["captions"][row]))
    read = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"records": rows.size, "seconds_to_open": opened, "records_per_second": len(order) / read}
    print(json.dumps({**found, "peak_resident_gb": peak / 1e9, "bytes": sum(size for *_, size in rows.shards)}))


if __name__ == "__main__":
    main()
