"""Hooks: what a checkpoint holds, and taps that read a module's features."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from common.engines import is_cut, optimizer_states, part_of, refresh_deepspeed
from common.errors import CheckpointError, first_line
from common.parts import Parts, save_parts

WHOLE_OPTIMIZER = "optimizer.bin"  # accelerate's, of DDP, beside which there is none in parts


def register_checkpoint_hooks(accelerator, trained, emas):
    """Make save_state / load_state write and read only the trained weights and their averages, as safetensors.

    trained: dict of name to dict of parameters; emas: dict of name to EMA, of those that have one. Frozen models are
    never saved, so a LoRA's checkpoint is megabytes. An EMA's update count is in the run's state.
    """

    def save(models, weights, folder):
        weights.clear()  # accelerate would write the whole model, frozen base included
        save_weights(accelerator, folder, trained, emas)

    def load(models, folder):
        models.clear()
        load_weights(folder, trained, emas)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_weights(accelerator, folder, trained, emas):
    """What is trained, and its averages: whole by the main process; of what is cut, every process its part."""
    for name, parameters in trained.items():
        averages = {f"{name}_ema": emas[name].shadow} if name in emas else {}
        for file, tensors in {name: parameters, **averages}.items():
            if any(isinstance(p, DTensor) for p in parameters.values()):
                places = {key: (part_of(p)[0], tensors[key]) for key, p in parameters.items()}
                save_parts(folder, file, places, accelerator.process_index, accelerator.num_processes)
            elif accelerator.is_main_process:
                whole = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
                save_file(whole, Path(folder) / f"{file}.safetensors")


def load_weights(folder, trained, emas):
    """The same, from files that hold them whole or in parts. Raises CheckpointError."""
    try:
        for name, parameters in trained.items():
            averages = {f"{name}_ema": emas[name].shadow} if name in emas else {}
            for file, targets in {name: {}, **averages}.items():
                with Parts(folder, file) as parts:
                    if parts.keys() != parameters.keys():
                        differing = sorted(parts.keys() ^ parameters.keys())
                        raise KeyError(f"names differ, such as {differing[0]}")
                    for key, parameter in parameters.items():
                        parts.fill(key, parameter, targets.get(key))
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds other weights than this run trains: {first_line(error)}.") from None


def save_cut(run, folder):
    """What accelerator.save_state does under DDP, of a run whose engine shards: every process writes what it has."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_weights(run.accelerator, folder, run.trained, run.averages)
    main = run.accelerator.is_main_process
    for number, which in enumerate(run.optimizers):
        parts = {}
        for name, offset, moments, state in optimizer_states(run, which):
            parts.update({f"{moment}.{name}": (offset, value) for moment, value in moments.items()})
            if main:
                parts["step"] = 0, state["step"].cpu()
        if is_cut(run, which):
            place = run.accelerator.process_index, run.accelerator.num_processes
            save_parts(folder, optimizer_file(number), parts, *place)
        elif main:
            save_parts(folder, optimizer_file(number), parts, 0, 1)


@torch.no_grad()
def load_cut(run, folder):
    """What accelerator.load_state does under DDP, where the engine of the run or of its checkpoint shards."""
    load_weights(folder, run.trained, run.averages)
    refresh_deepspeed(run)
    for number, which in enumerate(run.optimizers):
        states, file = optimizer_states(run, which), Path(folder) / f"{optimizer_file(number)}.bin"
        if file.is_file():  # accelerate's, of DDP
            saved = torch.load(file, map_location="cpu", weights_only=True)["state"]
            whole = dict(zip(run.trained[which], (saved[index] for index in sorted(saved))))
            for name, offset, moments, state in states if saved else ():  # none: begun anew
                for moment, value in moments.items():
                    part = whole[name][moment].flatten()[offset : offset + value.numel()]
                    value.copy_(part.view(value.shape))
                state["step"].copy_(whole[name]["step"])
            continue
        with Parts(folder, optimizer_file(number)) as parts:
            for name, offset, moments, state in states:
                for moment, value in moments.items():
                    value.copy_(parts.read(f"{moment}.{name}", offset, value.numel()).view(value.shape))
                state["step"].copy_(parts.read("step", 0, 1)[0])


def optimizer_file(number):
    """As accelerate names them."""
    return f"optimizer_{number}" if number else "optimizer"


class FeatureTap:
    """Keeps the last output of named submodules: `with FeatureTap(unet, names) as tap: ...; tap.features[name]`.

    Hooks sit on the unwrapped module, so names never carry DDP's or torch.compile's prefixes. A tuple output (a down
    block's) is represented by its first element. Raises KeyError for a name the module doesn't have.
    """

    def __init__(self, module, names):
        modules = dict(module.named_modules())
        missing = [name for name in names if name not in modules]
        if missing:
            raise KeyError(f"no submodule named {missing[0]} to read features from")
        self.features = {}
        self._handles = [modules[name].register_forward_hook(self._keep(name)) for name in names]

    def _keep(self, name):
        def hook(module, inputs, output):
            self.features[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        for handle in self._handles:
            handle.remove()
