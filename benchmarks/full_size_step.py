"""Optimizer steps of a training script on a full-size SD1.5 with random weights: memory, checkpoint size.

    python benchmarks/full_size_step.py --resolution 64
    python benchmarks/full_size_step.py --script train_student_kd.py --resolution 64      # into its sd_tiny
    python benchmarks/full_size_step.py --script prune_and_quantize.py --resolution 256   # and INT8, without training

Writes the pipeline (4.3 GB; its sd_tiny beside it) into --work_dir, trains --max_steps steps in a fresh process and
prints its peak resident memory, the seconds with start-up, and the checkpoint's size as one JSON line; of pruning, the
sizes of the UNet's files in the place of the checkpoint's.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.shared import sd15_folder  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", default="outputs/full_size")
    scripts = ("train_flash_lora.py", "train_student_kd.py", "prune_and_quantize.py")
    parser.add_argument("--script", choices=scripts, default=scripts[0])
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--max_steps", type=int, default=1)
    parser.add_argument("rest", nargs="*", help="further arguments of the script, after --")
    args = parser.parse_args()
    work = Path(args.work_dir)
    pipeline, student, run = sd15_folder(work), work / "sd15_tiny", work / f"run_{Path(args.script).stem}"
    environment, more = {**os.environ, "HF_HUB_OFFLINE": "1"}, []
    if args.script == "train_student_kd.py":
        more = ["--student_model", str(student)]
        if not (student / "model_index.json").is_file():
            prepare = [
                sys.executable,
                str(ROOT / "prepare_unet_small.py"),
                "--student_variant",
                "sd_tiny",
                "--pretrained_model_name_or_path",
                str(pipeline),
                "--output_dir",
                str(student),
            ]
            subprocess.run(prepare, check=True, env=environment)
    prunes = args.script == "prune_and_quantize.py"
    if prunes:
        more = ["--num_calibration_prompts", "1", "--calibration_steps", "2", "--num_eval_images", "0"]
        more += ["--export", "int8"]
    command = [
        sys.executable,
        str(ROOT / args.script),
        "--pretrained_model_name_or_path",
        str(pipeline),
        *more,
        "--dataset_name",
        "shapes",
        "--resolution",
        str(args.resolution),
        "--batch_size",
        "1",
        "--max_steps",
        str(args.max_steps),
        "--output_dir",
        str(run),
        "--overwrite_output_dir",
        "--report_to",
        "none",
        *args.rest,
    ]
    began = time.time()
    process = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(process.pid, 0)  # its own peak, not that of whatever was waited for before
    if status:
        sys.exit(f"{args.script} ended with {os.waitstatus_to_exitcode(status)}")
    written = {"final": run / "final/unet", "final-int8": run / "final-int8/unet"} if prunes else {}
    written = written or {"checkpoint": next(run.rglob(f"checkpoint-{args.max_steps}"))}
    print(
        json.dumps(
            {
                "command": command[1:],
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "peak_resident_gb": usage.ru_maxrss * 1024 / 1e9,
                "seconds_with_start": time.time() - began,
                **{
                    f"{name}_mb": sum(file.stat().st_size for file in folder.rglob("*")) / 1e6
                    for name, folder in written.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()
