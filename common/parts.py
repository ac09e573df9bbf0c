"""Tensors in files by parts: what every process has of a model or optimizer that is cut, written by itself.

<name>.safetensors holds tensors whole, <name>-<rank>-of-<processes>.safetensors the parts of one process: each a range
of the flattened tensor, whose place the file's header says. Reading takes any range out of either, so that what so
many processes wrote is read by any other number of them, cut in any other way or not at all.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.engines import local, part_of

PLACES = "offsets"  # in a file's header: {name: where its range begins in the flattened tensor}


def save_parts(folder, name, parts, rank, processes):
    """Write this process's parts, {name: (offset, tensor, which may be cut)}."""
    tensors = {key: local(tensor.detach()).reshape(-1).contiguous() for key, (_, tensor) in parts.items()}
    places = {PLACES: json.dumps({key: offset for key, (offset, _) in parts.items()})}
    save_file(tensors, Path(folder) / f"{name}-{rank:05d}-of-{processes:05d}.safetensors", metadata=places)


class Parts:
    """`with Parts(folder, name) as parts:` reads what was written of a name, whole or by parts.

    Raises FileNotFoundError where there is nothing, or not all of it.
    """

    def __init__(self, folder, name):
        whole, cut = Path(folder) / f"{name}.safetensors", sorted(Path(folder).glob(f"{name}-*-of-*.safetensors"))
        self.paths = [whole] if whole.is_file() else cut
        if not self.paths:
            raise FileNotFoundError(f"there is no {whole.name}")
        if cut and not whole.is_file() and len(cut) != int(cut[0].stem.rpartition("-")[2]):
            raise FileNotFoundError(f"{len(cut)} of {cut[0].stem.rpartition('-')[2]} parts of {name} are there")

    def __enter__(self):
        self.files = [safe_open(path, "pt") for path in self.paths]
        self.ranges = {}  # name to [(offset, numel, file)]
        for file in self.files:
            places = json.loads((file.metadata() or {}).get(PLACES, "{}"))
            for key in file.keys():
                numel = torch.Size(file.get_slice(key).get_shape()).numel()
                self.ranges.setdefault(key, []).append((places.get(key, 0), numel, file))
        return self

    def __exit__(self, *_):
        self.files, self.ranges = [], {}

    def keys(self):
        return self.ranges.keys()

    def numel(self, key):
        return sum(numel for _, numel, _ in self.ranges[key])

    def read(self, key, offset, numel):
        """The range of a flattened tensor, 1-D. Raises KeyError where it isn't there."""
        found, filled = None, 0
        for start, length, file in self.ranges[key]:
            low, high = max(offset, start), min(offset + numel, start + length)
            if low < high or numel == 0:
                values = file.get_tensor(key).reshape(-1)
                found = values.new_empty(numel) if found is None else found
                if numel == 0:
                    return found
                found[low - offset : high - offset] = values[low - start : high - start]
                filled += high - low
        if filled != numel:
            raise KeyError(f"{key}: {filled} of {numel} numbers are there")
        return found

    def fill(self, key, parameter, target=None):
        """Copy a parameter's part, or the whole of it, into `target`: itself, or an average of the same shape."""
        target = local(parameter.detach()) if target is None else target
        if self.numel(key) != parameter.numel():
            raise RuntimeError(f"{key} has {self.numel(key):,} numbers, not {parameter.numel():,}")
        values = self.read(key, *part_of(parameter))
        target.copy_(values.view(target.shape).to(target.dtype))
