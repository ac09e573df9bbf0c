"""Hooks: what a checkpoint holds, and taps that read a module's features."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.ema import copy_tensors
from common.errors import CheckpointError, first_line


def register_checkpoint_hooks(accelerator, trained, emas):
    """Make save_state / load_state write and read only the trained weights and their averages, as safetensors.

    trained: dict of name to dict of parameters; emas: dict of name to EMA, of those that have one. Frozen models are
    never saved, so a LoRA's checkpoint is megabytes. An EMA's update count is in the run's state.
    """

    def save(models, weights, folder):
        weights.clear()  # accelerate would write the whole model, frozen base included
        if accelerator.is_main_process:
            for name, parameters in trained.items():
                tensors = {key: p.detach().contiguous() for key, p in parameters.items()}
                save_file(tensors, Path(folder) / f"{name}.safetensors")
            for name, ema in emas.items():
                shadow = {key: value.contiguous() for key, value in ema.shadow.items()}
                save_file(shadow, Path(folder) / f"{name}_ema.safetensors")

    def load(models, folder):
        models.clear()
        try:
            for name, parameters in trained.items():
                copy_tensors(load_file(Path(folder) / f"{name}.safetensors"), parameters)
            for name, ema in emas.items():
                copy_tensors(load_file(Path(folder) / f"{name}_ema.safetensors"), ema.shadow)
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} holds other weights than this run trains: {first_line(error)}.") from None

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


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
