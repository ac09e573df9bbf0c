"""What prepare_cache.py computes once: latents, prompt embeddings, teacher roll-outs, in shards that are read by row.

A cache is a folder: cache.json, which says what it was made of and, once it is complete, which shards there are; and
safetensors files of at most SHARD rows each, of samples or of roll-outs, with the captions of its rows:
 - samples:   latents (n, 1 or 2, C, h, w): scaled, fp32, as they are and, with --random_flip, mirrored; of buckets
              a shard has one shape, and index (n,) says which samples they are;
              first (n + 1,) and captions: the texts of sample i are captions[first[i]:first[i + 1]];
              time_ids (n, 6): SDXL's original size, crop corner and target size
 - roll-outs: z, target (n, C, h, w), timesteps, ends, caption, sample (n,), guidance_scale (n,), time_ids and, where
              asked for, states (n, K - 1, C, h, w): the teacher's own between them
 - captions:  prompt_embeds (m, L, D), pooled_prompt_embeds (m, P) of SDXL, text (bytes,), text_ends (m,)
and unconditional.safetensors: what guidance compares with. Rows have checksums beside them, so that a damaged one is
noticed where it is read, and a large cache opens at once. They are read by offset, not mapped: pages that are mapped
count as memory of the run.
"""

import hashlib
import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from common.conditioning import Conditioning, conditioning_of
from common.errors import DataError, first_line
from common.identity import data_of, fingerprint
from common.randomness import sample_generator

INDEX, UNCONDITIONAL = "cache.json", "unconditional.safetensors"
FORMAT = 1  # of the files; another one is refused
SHARD = 1024  # rows
CHECKED = ("latents", "z", "target", "states", "prompt_embeds", "pooled_prompt_embeds")  # that have checksums
NUMPY = {"I64": np.int64, "I32": np.int32, "F32": np.float32}  # of small tensors
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Flags that say which samples there are, and how they are cut: a run takes them from its cache where it has none.
DATA_FLAGS = (
    "data_dir", "dataset_name", "image_column", "caption_column", "caption_template", "center_crop", "resolution",
    "max_train_samples", "aspect_ratio_buckets",
)  # fmt: skip


# What a cache is made of


# Flags that decide a roll-out, beside its teacher and its data.
ROLLED_OUT_BY = ("num_ddim_steps", "num_inference_steps", "timestep_probs", "target", "teacher_steps", "solver")
HASHED = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "teacher", "scheduler")


def made_of(args, folder, dtype):
    """{what: value} that decides the rows of a cache of samples, of flags and of files alone.

    folder: where the pipeline's files lie; dtype: of the encoders, a torch.dtype.
    """
    found = {"format": FORMAT, "dtype": str(dtype).removeprefix("torch."), "variant": args.variant}
    for part in ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"):
        if (Path(folder) / part).is_dir():
            found[part] = fingerprint(Path(folder) / part)
    found |= {name: getattr(args, name) for name in DATA_FLAGS if name not in ("data_dir", "dataset_name")}
    if args.dataset_name == "shapes":
        found |= {"seed": args.seed, "center_crop": False}  # rendered by the seed, and nothing of them is cut
    return {**found, "data": data_of(args)}


def made_by(args, folder, dtype, teacher, **method):
    """The same of a cache of roll-outs: of a teacher (contract.read_teacher), and of how it rolls out, by `method`."""
    return {
        **made_of(args, folder, dtype),
        "teacher": fingerprint(Path(folder) / "unet"),
        "scheduler": fingerprint(Path(folder) / "scheduler"),
        "guidance_scale": teacher["guidance_scale"],
        **method,
    }


def check_same(flag, folder, index, wanted):
    """Raise DataError, which names what differs, unless a cache was made of what is `wanted`, of the names it has.

    Data that have gone since are no fault: the cache stands for them.
    """
    places, found = {index["flags"]["data_dir"], index["flags"]["dataset_name"]}, []
    for name, value in json.loads(json.dumps(wanted)).items():
        cached = index["made_of"].get(name, index.get(name))
        if cached == value or (name == "data" and value in places):
            continue
        hashed = name in HASHED or value is None or name == "data"
        found.append(f"another {name}" if hashed else f"{name} {cached}, not {value}")
    if found:
        raise DataError(f"{flag} {folder} was made with {', '.join(found)}: make another one for this run.")


def read_index(folder, flag, kind):
    """cache.json of a complete cache of a kind, "samples" or "rollouts". Raises DataError, which names `flag`."""
    where = f"{flag} {folder}"
    try:
        index = json.loads((Path(folder) / INDEX).read_text())
        index["kind"], index["made_of"], index["flags"]
    except FileNotFoundError:
        raise DataError(f"{where}: there is no cache; prepare_cache.py makes one.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: {INDEX} can't be read ({type(error).__name__}: {first_line(error)}).") from None
    if index["made_of"].get("format") != FORMAT:
        raise DataError(f"{where}: it has another format than this version writes: make it again.")
    if index["kind"] != kind:
        other = "--rollout_cache" if index["kind"] == "rollouts" else "--cache_dir"
        raise DataError(f"{where}: it holds {index['kind']}, which {other} reads.")
    if not index.get("shards"):
        raise DataError(f"{where}: it is not complete: run the same prepare_cache.py again, which goes on.")
    for file, _, size in index["shards"]:
        path = Path(folder) / file
        if not path.is_file() or path.stat().st_size != size:
            how = f"has {path.stat().st_size} bytes instead of {size}" if path.is_file() else "is missing"
            raise DataError(f"{where}: {file} {how}: prepare_cache.py, as it was run, makes it again.")
    return index


def take_flags(args, index, flag):
    """Fill in the data's flags that the run leaves open. Raises DataError where it has others."""
    for name, value in index["flags"].items():
        own = getattr(args, name)
        default = "a photo of a {label}" if name == "caption_template" else None
        place = name in ("data_dir", "dataset_name")
        if own in (None, False, default) and not (place and (args.data_dir or args.dataset_name)):
            setattr(args, name, value)
    if args.dataset_name == "shapes" and args.seed != index["made_of"].get("seed"):
        raise DataError(f"{flag}: its shapes are rendered by --seed {index['made_of']['seed']}, not {args.seed}.")


# Reading


class Rows:
    """The rows of a cache's shards, read one by one. Raises DataError where one is not what was written.

    index: of read_index. `size` rows of samples or roll-outs; `unconditional`, the one row of Conditioning.
    """

    def __init__(self, folder, index, flag):
        self.folder, self.shards, self.flag = Path(folder), index["shards"], flag
        self.ends = np.cumsum([rows for _, rows, _ in self.shards])
        self.size, self._tables = int(self.ends[-1]), {}
        file = load_file(Path(folder) / UNCONDITIONAL)
        self.unconditional = Conditioning(*(file.get(name) for name in ("prompt_embeds", "pooled_prompt_embeds")))

    def place(self, index):
        """(shard, row in it) of sample or roll-out `index`."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, index - (int(self.ends[shard - 1]) if shard else 0)

    def table(self, shard):
        """{name: array} of a shard's small tensors."""
        return self._table(shard)[1]

    def row(self, name, shard, row, variant=None):
        """A row of a tensor that has checksums; of several variants one."""
        header, small = self._table(shard)
        entry, sums = header[name], small[f"{name}.crc32"]
        shape = entry["shape"][1:]
        if variant is not None:
            shape, row = entry["shape"][2:], row * entry["shape"][1] + variant
        dtype = DTYPES[entry["dtype"]]
        size = int(np.prod(shape)) * dtype.itemsize
        content = self._read(shard, entry["data_offsets"][0] + row * size, size)
        if zlib.crc32(content) != int(sums.reshape(-1)[row]):
            raise self._damaged(shard, f"the checksum of {name}, row {row}, is wrong")
        return torch.frombuffer(content, dtype=dtype).view(shape)

    def caption(self, shard, row):
        """{"caption", "prompt_embeds", "pooled_prompt_embeds" of SDXL} of a row of captions."""
        header, small = self._table(shard)
        first, last = (int(small["text_ends"][i]) if i >= 0 else 0 for i in (row - 1, row))
        text = self._read(shard, header["text"]["data_offsets"][0] + first, last - first)
        embeds = [name for name in ("prompt_embeds", "pooled_prompt_embeds") if name in header]
        return {"caption": text.decode(errors="replace"), **{name: self.row(name, shard, row) for name in embeds}}

    def _table(self, shard):
        """(header, small tensors) of a shard: where its tensors lie in the file, and those that are read whole."""
        if shard not in self._tables:
            small = {}
            try:
                with open(self.folder / self.shards[shard][0], "rb") as file:
                    length = int.from_bytes(file.read(8), "little")
                    header = json.loads(file.read(length))
                    header.pop("__metadata__", None)
                    for name, entry in header.items():
                        entry["data_offsets"] = [8 + length + offset for offset in entry["data_offsets"]]
                        if name not in CHECKED and name != "text":
                            first, last = entry["data_offsets"]
                            file.seek(first)
                            values = np.frombuffer(file.read(last - first), NUMPY[entry["dtype"]])
                            small[name] = values.reshape(entry["shape"])
            except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError) as error:
                raise self._damaged(shard, f"{type(error).__name__}: {first_line(error)}") from None
            self._tables[shard] = header, small
        return self._tables[shard]

    def _read(self, shard, offset, size):
        content = bytearray(size)
        with open(self.folder / self.shards[shard][0], "rb", buffering=0) as file:
            file.seek(offset)
            if file.readinto(content) != size:
                raise self._damaged(shard, "it is too short")
        return content

    def _damaged(self, shard, how):
        return DataError(
            f"{self.flag} {self.folder}: {self.shards[shard][0]} is damaged ({how}): prepare_cache.py, as it was run, "
            "makes it again."
        )


class CachedDataset(torch.utils.data.Dataset):
    """Samples of a cache, the same that the data's own dataset gives, encoded: dataset[index, step, position].

    -> {"latents": fp32 (C, h, w) (where images are needed), "prompt_embeds": (L, D), "time_ids": (6,), ...}, with the
    flip and the caption that (seed, step, position) draws.
    """

    def __init__(self, args, needs_images=True):
        index = read_index(args.cache_dir, "--cache_dir", "samples")
        self.rows = Rows(args.cache_dir, index, "--cache_dir")
        self.size, self.unconditional = self.rows.size, self.rows.unconditional
        self.seed, self.needs_images, self.random_flip = args.seed, needs_images, args.random_flip and index["flipped"]
        self.source, self.buckets, self._row_of = f"--cache_dir {args.cache_dir}", None, range(self.size)
        self.counts = index.get("counts")  # of a stream, in whose order they are read
        if index.get("buckets"):  # rows lie by bucket
            samples = np.concatenate([self.rows.table(shard)["index"] for shard in range(len(index["shards"]))])
            self._row_of = np.argsort(samples)
            self.buckets = np.repeat(index["buckets"], [rows for _, rows, _ in index["shards"]])[self._row_of].tolist()

    def __getitem__(self, key):
        index, step, position = key
        index = int(self._row_of[index])
        draws = torch.rand(4, generator=sample_generator(self.seed, step, position, stream="augmentation")).tolist()
        shard, row = self.rows.place(index)
        small = self.rows.table(shard)
        captions = small["captions"][small["first"][row] : small["first"][row + 1]]
        sample = {"position": position, "step": step, "time_ids": torch.from_numpy(small["time_ids"][row].copy())}
        if self.needs_images:
            sample["latents"] = self.rows.row("latents", shard, row, int(self.random_flip and draws[2] < 0.5))
        return {**sample, **self.rows.caption(shard, int(captions[int(draws[3] * len(captions))]))}

    def captions(self, index):
        shard, row = self.rows.place(int(self._row_of[index]))
        small = self.rows.table(shard)
        numbers = small["captions"][small["first"][row] : small["first"][row + 1]]
        return [self.rows.caption(shard, int(number))["caption"] for number in numbers]


class RolloutDataset(torch.utils.data.Dataset):
    """Records of a cache of teacher roll-outs: dataset[index, step, position].

    -> {"z", "target": fp32 (C, h, w), "timesteps", "ends": long (), "prompt_embeds", ...}. data: the data's own
    dataset, or None. needs_images: a sample also has the image of `data` that it began from. --rollout_refresh: so
    large a share of the steps gets samples of `data` alone, for which the teacher is asked anew.
    """

    def __init__(self, args, data=None, needs_images=False):
        index = read_index(args.rollout_cache, "--rollout_cache", "rollouts")
        self.rows = Rows(args.rollout_cache, index, "--rollout_cache")
        self.size, self.unconditional = self.rows.size, self.rows.unconditional
        self.seed, self.refresh = args.seed, args.rollout_refresh
        self.data, self.needs_images, self.source = data, needs_images, f"--rollout_cache {args.rollout_cache}"

    def __getitem__(self, key):
        index, step, position = key
        shard, row = self.rows.place(index)
        small, sample = self.rows.table(shard), {"position": position, "step": step}
        anew = self.refresh and refreshed(self.seed, step, self.refresh)
        if anew or self.needs_images:
            sample = self.data[int(small["sample"][row]), step, position]
        if anew:
            return sample
        return {
            **{
                name: value
                for name, value in sample.items()
                if name in ("position", "step", "pixel_values", "latents")
            },
            "z": self.rows.row("z", shard, row).float(),
            "target": self.rows.row("target", shard, row).float(),
            "timesteps": torch.tensor(int(small["timesteps"][row])),
            "ends": torch.tensor(int(small["ends"][row])),
            "time_ids": torch.from_numpy(small["time_ids"][row].copy()),
            **self.rows.caption(shard, int(small["caption"][row])),
        }


def refreshed(seed, step, share):
    """Whether the roll-outs of a step are made anew, by --rollout_refresh: of (seed, step) alone."""
    return torch.rand((), generator=sample_generator(seed, step, 0, stream="refresh")).item() < share


class Rollouts:
    """Where a step's roll-outs come from if not from the teacher: the batch, or memory, where so many steps are kept.

    A roll-out is (conditioning, z, timesteps, ends, target). Those in memory lie on the CPU.
    """

    def __init__(self, pipeline, resolution, steps=0):
        self.pipeline, self.resolution, self.steps = pipeline, resolution, steps
        self.kept = {}  # (place in the cycle, micro-batch) to (step, roll-out)

    def of(self, batch, micro_batch=0):
        """The roll-out of a batch, on the device, or None: the teacher is to be asked, and `keep` told."""
        device = self.pipeline.unet.device
        if "target" in batch:
            tensors = [batch[name].to(device, non_blocking=True) for name in ("z", "timesteps", "ends", "target")]
            return conditioning_of(self.pipeline, batch, self.resolution), *tensors
        step, rollout = self.kept.get(self._key(batch, micro_batch), (None, None))
        return tuple(x.to(device, non_blocking=True) for x in rollout) if step == batch["step"] else None

    def keep(self, batch, micro_batch, rollout):
        if self.steps:
            self.kept[self._key(batch, micro_batch)] = batch["step"], tuple(x.to("cpu") for x in rollout)
        return rollout

    def _key(self, batch, micro_batch):
        return batch["step"] % (self.steps or 1), micro_batch


# Writing


def write_rows(folder, name, tensors, key):
    """A shard, visible once it is whole, with the checksums of its rows. key: of `key_of`, which it was made under."""
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    sums = {f"{name}.crc32": torch.tensor(_checksums(name, tensors[name])) for name in CHECKED if name in tensors}
    temporary = Path(folder) / f".{name}.tmp"
    save_file({**tensors, **sums}, temporary, metadata={"key": key})
    temporary.chmod(0o644)  # others may train from it, whom save_file would shut out
    os.replace(temporary, Path(folder) / name)


def rows_are_there(folder, name, key):
    """Whether a shard is there that was written whole, under the same key, and is undamaged."""
    try:
        with safe_open(Path(folder) / name, "pt") as file:
            checked = [tensor for tensor in CHECKED if tensor in file.keys()]
            return (file.metadata() or {}).get("key") == key and all(
                _checksums(tensor, file.get_tensor(tensor)) == file.get_tensor(f"{tensor}.crc32").tolist()
                for tensor in checked
            )
    except (OSError, ValueError, SafetensorError):
        return False


def _checksums(name, tensor):
    """Of each row; of latents, of each variant."""
    rows = tensor.flatten(0, 1) if name == "latents" else tensor
    return [zlib.crc32(row.contiguous().view(-1).view(torch.uint8).numpy().data) for row in rows]


def key_of(made):
    """A short hash of what a cache is made of."""
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


def write_index(folder, index):
    temporary = Path(folder) / f".{INDEX}.tmp"
    temporary.write_text(json.dumps(index, indent=1) + "\n")
    os.replace(temporary, Path(folder) / INDEX)
