"""What a run is, by which a continuation is told from another run: its arguments, and of files what they hold.

Where data and models lie may differ between the jobs of one run; what they are may not.
"""

import hashlib
import json
import os
from pathlib import Path

from common.contract import TINY_SD
from common.data_formats import files_in
from common.errors import CheckpointError, DataError
from common.remote import is_url
from common.shard_index import INDEX, content_of_stream, is_stream

# Arguments that may differ between a run and its continuation: where, how long, how fast, how much is shown.
# What decides the global batch is compared as one number.
FREE_ON_RESUME = {
    "output_dir",
    "run_name",
    "overwrite_output_dir",
    "max_train_steps",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "must_save_by",
    "train_batch_size",
    "gradient_accumulation_steps",
    "dataloader_num_workers",
    "validation_prompts",
    "validation_steps",
    "num_validation_images",
    "report_to",
    "logging_steps",
    "profile_steps",
    "cache_dir",
    "offload_ema",
    "dry_run",
    "export",
    "gradient_checkpointing",
    "torch_compile",
    "channels_last",
    "allow_tf32",
    "teacher_cpu_offload",
    "lora_dir",
    "int8_backend",
    "int8_skip",
    "fp8_activations",
    "max_skipped_updates",
    "ddp_timeout",
    "push_to_hub",
    "hub_model_id",
    "shard_index",
}
# What judges a run from without; a continuation with another judge compares anew from there on.
JUDGES = (
    "eval_data_dir",
    "num_eval_images",
    "eval_inference_steps",
    "clip_model",
    "inception_path",
    "lpips_trunk_path",
)
# Arguments that may name a file or folder.
PLACES = {
    "data_dir",
    "dataset_name",
    "pretrained_model_name_or_path",
    "student_model",
    "feature_model_name_or_path",
    "calibration_prompts",
    "vae_path",
    "rollout_cache",
    *JUDGES,
}
# Of these, bytes too: MNIST's files, which have no ending, are as large as Fashion-MNIST's.
SAMPLED = (".safetensors", ".json", ".pth", ".parquet", ".tar", ".gz", ".bin", "")
CHUNK, CHUNKS = 2**16, 64


def identity_of(args):
    """{name: value} of the arguments that a continuation must share with its run; of a place {"path", "content"}."""
    free = {*FREE_ON_RESUME, "eval_steps", *(JUDGES if hasattr(args, "eval_steps") else ())}
    found = {name: _place(name, value) for name, value in sorted(vars(args).items()) if name not in free}
    found.pop("streaming", None)
    if getattr(args, "data_dir", None) and is_stream(args):
        found["streaming"] = True  # in the same order by its folder, pattern or URL
        place, content = args.data_dir, data_of(args)
        if content != place:
            found["data_dir"] = {"path": place if is_url(place) else os.path.abspath(place), "content": content}
    return found


def judges_of(args):
    """The same of what judges a run during training."""
    return {name: _place(name, getattr(args, name)) for name in JUDGES}


def _place(name, value):
    if name not in PLACES or not isinstance(value, str) or value == "shapes" or not os.path.exists(value):
        return value
    # tiny-sd is the same wherever the checkout lies.
    path = "assets/tiny-sd" if value == str(TINY_SD) else os.path.abspath(value)
    return {"path": path, "content": content_of(value)}


def content_of(place):
    """The fingerprint of what lies at a place, or the place itself where nothing does: a name on the hub, say."""
    return fingerprint(place) if place != "shapes" and os.path.exists(place) else place


def data_of(args):
    """The same of a run's data; of a stream its index says what lies there, for nobody reads all of that first."""
    if args.data_dir and is_stream(args):
        try:
            return content_of_stream(args)
        except (DataError, OSError):  # gone, or out of reach: a cache may stand for it
            return args.data_dir
    return content_of(args.data_dir or args.dataset_name)


def fingerprint(path):
    """A short hash of what a file or folder holds: names, sizes and, of weights and tables, samples of the bytes."""
    root, digest = Path(path), hashlib.sha256()
    for file in [root] if root.is_file() else files_in(root):
        # A link to nowhere; what only people read; how shards are counted, which may be written later.
        if not file.is_file() or file.suffix == ".md" or file.name == INDEX:
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root).as_posix()} {size}\n".encode(errors="surrogateescape"))
        if file.suffix.lower() in SAMPLED:
            with open(file, "rb") as opened:
                for start in range(0, size, max(size // CHUNKS, CHUNK)):
                    opened.seek(start)
                    digest.update(opened.read(CHUNK))
    return digest.hexdigest()[:16]


def check_same(checkpoint, saved, current):
    """Refuse to resume `checkpoint` where an argument that changes the maths has changed: CheckpointError.

    saved, current: {name: value} of identity_of and more. Returns sentences on what lies elsewhere now.
    """
    current, moved, changed = json.loads(json.dumps(current)), [], []
    for name in sorted(saved.keys() | current.keys()):
        before, now = saved.get(name), current.get(name)
        places = [value for value in (before, now) if isinstance(value, dict) and "content" in value]
        if len(places) == 2 and before["content"] == now["content"]:
            if before["path"] != now["path"]:
                moved.append(f"--{name}: {now['path']} is what was {before['path']}.")
            continue
        was, is_now = (value["path"] if value in places else value for value in (before, now))
        if was == is_now and len(places) == 2:
            changed.append(f"{name} {was} holds something else now")
        elif was != is_now:
            other = ", which holds something else" if len(places) == 2 else ""
            changed.append(f"{name} was {was}, now {is_now}{other}")
    if changed:
        raise CheckpointError(f"{checkpoint} belongs to a run with other arguments: {'; '.join(changed)}.")
    return moved
