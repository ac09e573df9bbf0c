"""How much memory a training step takes: found out beforehand on the meta device, and measured while it runs.

A step is run on tensors without memory, forward and backward, and every tensor that it makes is counted from where it
is made to where nothing holds it any longer: what autograd keeps (less with --gradient_checkpointing, whose second
forward is run too), the temporary tensors beside it, the gradients. So it holds for any network, batch and size.
"""

import contextlib
import ctypes
import os
import weakref
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from common.engines import BUCKET

# On the CPU glibc's malloc takes tensors below 32 MB (its largest M_MMAP_THRESHOLD) out of one heap, which keeps the
# gaps between those that live long, and gives nothing back: beside what they hold at the peak so much of it again.
# Measured on three scripts, see docs/memory.md; told by the environment to map smaller ones, it keeps next to nothing.
HEAP_SHARE, HEAP_LIMIT = 0.7, 2**25
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
# Code of libraries that is read in as the first step runs, and what they keep: measured likewise.
LIBRARIES = 40e6
# Of the rows of an Estimate, what an engine cuts into as many parts as there are processes; where it offloads, all of
# that is in the CPU's memory.
SHARDED = {
    "ddp": (),
    "fsdp2": ("trained weights", "their average", "target network", "optimizer states", "gradients"),
    "zero2": ("master weights", "optimizer states", "gradients"),
}


# Beforehand


class _FusedAttention(torch.autograd.Function):
    """What flash attention, on CPU and GPU alike, allocates and keeps: no matrix of scores."""

    @staticmethod
    def forward(context, query, key, value):
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        context.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    def backward(context, gradient):
        return tuple(torch.empty_like(x) for x in context.saved_tensors[:3])


class AsOnDevice(TorchFunctionMode):
    """Within it functions on meta tensors allocate what they would on a device, under autocast to a dtype or none.

    The meta device has no autocast of its own, and takes attention apart. Products and convolutions are in the low
    dtype, whose casts of trained weights are kept as autocast keeps them; normalisations in fp32 on CUDA alone.
    """

    PRODUCTS = {F.linear, F.conv2d, torch.matmul, torch.Tensor.matmul, torch.bmm, torch.baddbmm}
    WIDENED = {F.group_norm, F.layer_norm, F.softmax, torch.Tensor.softmax}

    def __init__(self, device, dtype):
        super().__init__()
        self.device, self.dtype = device, None if dtype == torch.float32 else dtype
        self.autocast, self.casts = False, {}  # whether it is on; id of a weight to its cast

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            args, kwargs = [*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)][:3], {}
            return _FusedAttention.apply(*self.lowered(args))
        if function in self.PRODUCTS:
            args, kwargs = self.lowered((args, kwargs))
        elif function in self.WIDENED and self.device == "cuda" and self.autocast:
            args, kwargs = tree_map(lambda x: x.float() if is_floating(x) else x, (args, kwargs))
        return function(*args, **kwargs)

    def lowered(self, given):
        return tree_map(self.cast, given) if self.autocast else given

    def cast(self, x):
        if not is_floating(x) or x.dtype == self.dtype:
            return x
        if not (x.requires_grad and x.is_leaf and torch.is_grad_enabled()):
            return x.to(self.dtype)
        if id(x) not in self.casts:
            self.casts[id(x)] = x.to(self.dtype)
        return self.casts[id(x)]

    @contextlib.contextmanager
    def autocasting(self):
        """Where a script has accelerator.autocast()."""
        self.autocast = self.dtype is not None
        try:
            yield
        finally:
            self.autocast = False
            self.casts.clear()

    def contexts(self):
        """For torch.utils.checkpoint: of the first forward, and of the second, which the backward runs."""
        return nullcontext(), self.again(self.autocast)

    @contextlib.contextmanager
    def again(self, autocast):
        with self, self.autocasting() if autocast else nullcontext():
            yield


def is_floating(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made within it that are still held: `now`, and `peak`, the most there were.

    Of the peak: `gradients` of the parameters given, and `small`, tensors below HEAP_LIMIT. sends: a gradient is
    gone as soon as it is there, into what stands for all gradients all the time.
    """

    def __init__(self, parameters=(), sends=False):
        super().__init__()
        self.sends = sends
        self.now = self.peak = self.gradients = self.small = 0
        self._storages, self._gradients, self._small = weakref.WeakValueDictionary(), 0, 0
        self._hooks = [p.register_post_accumulate_grad_hook(self._accumulated) for p in parameters]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in storages_of((args, kwargs)):  # a weight, say, was there before
            self._storages.setdefault(storage._cdata, storage)
        made = function(*args, **(kwargs or {}))
        for storage in storages_of(made):
            if storage._cdata not in self._storages:  # else a view, or one that was written to
                self._note(storage, storage.nbytes())
        return made

    def _note(self, storage, size):
        self._storages[storage._cdata] = storage
        weakref.finalize(storage, self._free, size)
        self.now += size
        self._small += size * (size < HEAP_LIMIT)
        if self.now > self.peak:
            self.peak, self.gradients, self.small = self.now, self._gradients, self._small

    def _free(self, size):
        self.now -= size
        self._small -= size * (size < HEAP_LIMIT)

    def _accumulated(self, parameter):
        if self.sends:
            parameter.grad = None
        else:
            self._gradients += parameter.grad.nbytes

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*error)


def storages_of(values):
    return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def bytes_of(module, trained=None):
    """Of the parameters and buffers of a module; with `trained`, of the parameters that are, or are not."""
    if trained is not None:
        return sum(p.nbytes for p in module.parameters() if p.requires_grad is trained)
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


@dataclass(frozen=True)
class Sharding:
    """What is told of the engine, see common/engines.py, as far as memory depends on it."""

    engine: str = "ddp"
    offloads: bool = False  # what is sharded is in the CPU's memory
    blocks: tuple = ()  # names of classes: FSDP2 gathers a block at once

    def gathered(self, module):
        """Trained parameters of FSDP2's root, of its largest block, and those that are whole at once, at most.

        A block is gathered as it is entered and let go as it is left; the root, which has what is in no block, stays.
        So whole are the root, a block, those around it, and one more, which is fetched meanwhile.
        """
        sizes = []

        def visit(part):  # (parameters that the block around it has of it, those that blocks inside hold at once)
            below = [visit(child) for child in part.children()]
            own = sum(p.numel() for p in part.parameters(recurse=False) if p.requires_grad)
            own, inside = own + sum(left for left, _ in below), max((held for _, held in below), default=0)
            if part is not module and type(part).__name__ not in self.blocks:
                return own, inside
            sizes.append(own)
            return 0, own + inside

        _, held = visit(module)
        return sizes[-1], max(sizes), held + max(sizes[:-1], default=0)


DDP = Sharding()


@dataclass
class Estimate:
    """Bytes at the moment of a step when they are most: {name: bytes}, and of "activations" the largest forward
    without gradients. offloaded: bytes in the CPU's memory instead of a GPU's."""

    rows: dict
    without_gradients: int
    offloaded: int = 0

    @property
    def total(self):
        return sum(self.rows.values())

    def shown(self):
        """[(name, what is said)] of the rows that there are."""
        said = [(f"  {name}", in_words(count)) for name, count in self.rows.items() if count]
        largest = f", of which the largest forward without gradients takes {in_words(self.without_gradients)}"
        said = [(name, text + largest * (name == "  activations")) for name, text in said]
        return said + [("in the CPU's memory", in_words(self.offloaded))] * bool(self.offloaded)


def estimate(
    args, live, without_gradients, frozen, trained, heads, target, kind, processes, sharding=DDP, gathered=(0, 0)
):
    """The Estimate of a step that `live` has counted.

    frozen, trained, heads: bytes of weights, in fp32 but for the frozen ones; target: see Networks; gathered: bytes of
    weights and of gradients that FSDP2 has gathered.
    """
    moments = (2 * trained if not args.use_8bit_adam else trained // 2) + 2 * heads
    # Of DDP, whose buckets what was accumulated without being sent is copied into.
    copies = 2 if sharding.engine == "ddp" and processes > 1 and args.gradient_accumulation_steps > 1 else 1
    heap = 0 if "MALLOC_MMAP_THRESHOLD_" in os.environ else HEAP_SHARE * live.small
    zero2 = sharding.engine == "zero2"
    rows = {
        "frozen weights": frozen,
        "trained weights": trained + heads,
        "gathered weights": gathered[0],
        "their average": trained,
        "target network": trained if target else 0,
        "master weights": zero2 * trained * (1 + sharding.offloads),  # offloaded, they go back by way of a copy
        "optimizer states": moments,
        "gradients": copies * (trained + heads) if live.sends else live.gradients,
        "gathered gradients": gathered[1],
        "reduce bucket": zero2 * min(4 * BUCKET, trained),
        "activations": live.peak - live.gradients,
        "malloc, libraries": round(heap + LIBRARIES) if kind == "cpu" else 0,
    }
    alone = {"trained weights": heads, "optimizer states": 2 * heads, "gradients": heads}  # whole on every process
    for name in SHARDED[sharding.engine]:
        kept = alone.get(name, 0)
        rows[name] = round((rows[name] - kept) / processes) + kept
    away = set(SHARDED[sharding.engine] if sharding.offloads else ())
    away |= {"their average"} if getattr(args, "offload_ema", False) else set()
    away = away if kind == "cuda" else set()  # else it is the same memory
    offloaded = sum(rows[name] for name in away)
    return Estimate(rows | dict.fromkeys(away, 0), without_gradients, offloaded)


def in_words(count):
    """A number of bytes."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


# While it runs


def keep_freed_memory():
    """Let malloc keep what a step on a CPU has freed for the next step, as giving it back and forth costs some time.

    The peak stays what it is. Of glibc, unless the environment has settings of its own.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):  # another library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, HEAP_LIMIT)  # to which it comes by itself; set, it would else stay lower
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class Watch:
    """What a run takes, from before its models load on, beside what it was expected to take, an Estimate or None.

    kind: "cuda", where the peak is that of torch's tensors, or "cpu": of the process's resident memory, from which is
    taken off what there was before, of libraries and the interpreter.
    """

    def __init__(self, expected, kind):
        self.expected, self.kind, self.peak = expected, kind, None
        if kind == "cpu":
            with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak so far is forgotten: of an earlier run in this process, say
            self.before = resident("VmRSS")

    def note(self):
        """After an optimizer step: the peak so far. What comes after the last one, such as an export, is no step."""
        if self.kind == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
        elif self.before is not None:
            self.peak = resident("VmHWM") - self.before

    def said(self):
        """A sentence on both, or None where one of them is not known."""
        if self.expected is None or not self.peak:
            return None
        error = self.expected.total / self.peak - 1
        how = "" if self.kind == "cuda" else ", resident, beyond what there was before the models"
        peak, expected = in_words(self.peak), in_words(self.expected.total)
        return f"Peak memory {peak}, estimated {expected} ({100 * error:+.0f} %){how}."


def resident(name):
    """Bytes of VmRSS, this process's resident memory, or VmHWM, its peak; None where there is no /proc."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
