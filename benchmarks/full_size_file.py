"""A single file of full size, with random weights, to a folder: seconds and memory of --pretrained_model_name_or_path.

    python benchmarks/full_size_file.py --kind sd1      # or sd2, sdxl

Writes the file (2.1 to 6.9 GB in FP16, the original layout, no configs beside it) into --work_dir, converts it as
every script does, in a fresh process, opens the folder and prints one JSON line. Both are deleted afterwards.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def write_file(kind, path):
    """A file of random weights by the original names of the published model."""
    from common import single_file
    from common.original_layout import original_tensors

    parts = single_file.empty_parts(json.loads((single_file.ASSETS / f"{kind}.json").read_text()))
    save_file({name: torch.randn(t.shape).mul_(0.02).half() for name, t in original_tensors(parts).items()}, path)


def convert(path, queue):
    """In a process of its own: the figures of a conversion."""
    from common.pipelines import load_pipeline
    from common.single_file import pipeline_folder

    start = time.perf_counter()
    folder = pipeline_folder(path)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipeline = load_pipeline(folder, torch.float16)
    queue.put({"seconds": round(seconds, 1), "peak_bytes": peak, "pipeline": type(pipeline).__name__})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("sd1", "sd2", "sdxl"), default="sd1", help="which published model")
    parser.add_argument("--work_dir", default="outputs/full_size_file", help="where the file and the folder go")
    args = parser.parse_args()
    work = Path(args.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HOME"] = str(work.absolute() / "home")  # before anything of the hub is imported
    spawn, path = multiprocessing.get_context("spawn"), work / f"{args.kind}.safetensors"
    try:
        writer = spawn.Process(target=write_file, args=(args.kind, path))
        writer.start(), writer.join()
        queue = spawn.Queue()
        reader = spawn.Process(target=convert, args=(str(path), queue))
        reader.start()
        print(json.dumps({"kind": args.kind, "file_bytes": path.stat().st_size, **queue.get()}), flush=True)
        reader.join()
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
