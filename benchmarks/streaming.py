"""How soon a stream of webdataset shards gives its first batch, from any step on, and how fast it goes on.

    python benchmarks/streaming.py
    python benchmarks/streaming.py --shards 64 --samples 2000

Writes so many synthetic shards into --work_dir, of one small picture each and its caption, and an index. Then, as a
run that resumes does, opens them anew at --positions random steps: the seconds until its first global batch is there,
and the bytes of the shards that were read for it. Then the samples per second of --steps steps that follow, beside
those of the same number of samples at random. Once more with the counts alone, as other tools' indexes have them. In
this one process; prints one JSON line. Files lie in the system's memory here: a disk or a network adds its own time.
"""

import io
import json
import statistics
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

from common import arguments, streams  # noqa: E402
from common.data import load_dataset_from_args  # noqa: E402
from common.loader import GlobalBatchSampler  # noqa: E402
from common.shard_index import INDEX, write_index_of  # noqa: E402


class Counted(io.FileIO):
    """A file that counts the bytes that are read of it."""

    total = 0

    def readinto(self, buffer):
        count = super().readinto(buffer)
        Counted.total += count
        return count


def write_synthetic(folder, shards, samples):
    """Shards of samples of about 8 kB; those of one number of samples are copies of one file."""
    folder.mkdir(parents=True)
    pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture, content = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels.numpy()).save(picture, "JPEG", quality=95)
    with tarfile.open(fileobj=content, mode="w") as tar:
        for number in range(samples):
            for name, file in (("jpg", picture.getvalue()), ("txt", f"caption {number}".encode())):
                member = tarfile.TarInfo(f"{number:09d}.{name}")
                member.size = len(file)
                tar.addfile(member, io.BytesIO(file))
    for number in tqdm(range(shards), desc="shards"):
        (folder / f"{number:05d}.tar").write_bytes(content.getvalue())


def flags_of(folder, **more):
    own = {"data_dir": str(folder), "dataset_name": None, "streaming": True, "shard_index": None, "resolution": 64}
    own |= {"center_crop": True, "random_flip": False, "max_train_samples": None, "seed": 0}
    return SimpleNamespace(**own, caption_column=None, **more)


def resume(folder, batch_size, step, steps):
    """(seconds and bytes until the first batch of a data set that is opened anew, samples per second after it)."""
    began, Counted.total = time.perf_counter(), 0
    dataset = load_dataset_from_args(flags_of(folder))
    sampler = iter(GlobalBatchSampler(dataset.size, batch_size, 1, 0, 1, step, 10**9, 0, counts=dataset.counts))
    [dataset[key] for key in next(sampler)]
    first, read = time.perf_counter() - began, Counted.total
    began = time.perf_counter()
    for _ in range(steps):
        [dataset[key] for key in next(sampler)]
    speed = steps * batch_size / (time.perf_counter() - began) if steps else None
    return first, read, speed


def random_speed(folder, batch_size, steps):
    """Samples per second of single samples of no order."""
    dataset = load_dataset_from_args(flags_of(folder))
    order = torch.randint(dataset.size, (steps * batch_size,), generator=torch.Generator().manual_seed(1)).tolist()
    began = time.perf_counter()
    for position, index in enumerate(order):
        dataset[index, 0, position]
    return len(order) / (time.perf_counter() - began)


def measured(folder, args):
    """{what: number} of the shards with the index that lies there."""
    size = args.shards * args.samples
    steps = torch.randint(size // args.batch_size, (args.positions,), generator=torch.Generator().manual_seed(2))
    found = [resume(folder, args.batch_size, step, 0) for step in tqdm(steps.tolist(), desc="positions")]
    seconds = [one[0] for one in found]
    return {
        "seconds_to_first_batch": statistics.median(seconds),
        "slowest": max(seconds),
        "megabytes_read": statistics.median(one[1] for one in found) / 1e6,
        "samples_per_second": resume(folder, args.batch_size, 7, args.steps)[2],
        "at_random": random_speed(folder, args.batch_size, args.steps),
    }


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    add = parser.add_argument
    add("--work_dir", default="outputs/synthetic_shards", help="where the shards are written")
    add("--shards", type=arguments.positive_int, default=1024, help="how many")
    add("--samples", type=arguments.positive_int, default=100, help="in each")
    add("--batch_size", type=arguments.positive_int, default=64, help="of the global batch")
    add("--positions", type=arguments.positive_int, default=20, help="steps that a run resumes at")
    add("--steps", type=arguments.positive_int, default=40, help="that follow")
    return parser.parse_args(argv)


def main(args):
    torch.set_num_threads(1)
    folder = Path(args.work_dir) / f"{args.shards}x{args.samples}"
    if not folder.is_dir():
        write_synthetic(folder, args.shards, args.samples)
    streams.open_file = lambda path: io.BufferedReader(Counted(path))  # of shards alone
    began = time.perf_counter()
    write_index_of(str(folder), None)
    found = {"samples": args.shards * args.samples, "seconds_to_count": time.perf_counter() - began}
    found["gigabytes"] = sum(file.stat().st_size for file in folder.glob("*.tar")) / 1e9
    found["index_megabytes"] = (folder / INDEX).stat().st_size / 1e6
    found["with_offsets"] = measured(folder, args)
    index = json.loads((folder / INDEX).read_text())
    for entry in index["shardlist"]:
        del entry["starts"], entry["every"]
    (folder / INDEX).write_text(json.dumps(index))
    found["counts_alone"] = measured(folder, args)
    print(json.dumps(found))


if __name__ == "__main__":
    main(parse_args())
