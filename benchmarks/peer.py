"""Somebody else's training script, for benchmarks/training.py: the images it reads and the flags it is told."""

import io
import json
import shlex
import tarfile

from PIL import Image

from common.errors import UsageError
from common.shapes import IMAGE_SIZE, caption_of, training_sample

# By the names of diffusers' examples that read webdataset shards. They need at least one worker.
TEMPLATE = (
    "--pretrained_teacher_model {model} --train_shards_path_or_url {shard} --max_train_samples {samples} "
    "--dataloader_num_workers 1 --resolution {resolution} --train_batch_size {batch_size} --max_train_steps {steps} "
    "--output_dir {output_dir} --seed 0"
)
SHUFFLED = 1000  # samples that they hold to shuffle; diffusers' code fails where webdataset 1.0 ends a shard
CLAIMED = 1024  # pixels per side by the records: some scripts pass over what was smaller


def write_shard(path, count, resolution):
    """A webdataset .tar of `count` rendered shapes: 0000.png, its caption 0000.txt and a record, 0000.json."""
    resampling = Image.Resampling.BICUBIC if resolution % IMAGE_SIZE else Image.Resampling.NEAREST
    with tarfile.open(path, "w") as tar:
        for index in range(count):
            pixels, scene = training_sample(0, index)
            image, caption = io.BytesIO(), caption_of(scene)
            Image.fromarray(pixels).resize((resolution, resolution), resampling).save(image, "png")
            record = {"original_width": CLAIMED, "original_height": CLAIMED, "pwatermark": 0.0, "caption": caption}
            members = {"png": image.getvalue(), "txt": caption.encode(), "json": json.dumps(record).encode()}
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{index:08d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def command(args, shard, output_dir):
    """The peer and its flags: --peer_template, filled in, then --peer_flags. Raises UsageError of a bad template."""
    shared = {
        "model": args.pretrained_model_name_or_path,
        "shard": shard,
        "samples": args.peer_samples,
        "resolution": args.resolution,
        "batch_size": args.batch_size,
        "steps": args.steps,
        "output_dir": output_dir,
    }
    try:
        told = [word.format(**shared) for word in args.peer_template]
    except (KeyError, IndexError, ValueError) as error:
        known = ", ".join(f"{{{name}}}" for name in shared)
        raise UsageError(f"--peer_template {shlex.join(args.peer_template)}: {error} is none of {known}.") from None
    return [args.peer_script, *told, *args.peer_flags]
