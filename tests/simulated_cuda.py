"""A simulated CUDA device, so that a machine without a GPU notices what only a GPU would refuse.

A tensor on it says `cuda:0` of itself, and dispatches, autocasts and differentiates as one there; its values lie in an
ordinary CPU tensor, and CPU kernels compute on them. So the scripts run as they are, --mixed_precision fp16 with its
GradScaler and fused AdamW included, and what a CPU run can't show becomes an error or a number:

- an operation that mixes host and device tensors where CUDA refuses that, and a draw on the device from a generator of
  the CPU, raise DeviceError. It is reported even where a library swallows it;
- `syncs` counts where the host waits for the device to read a value: item(), tolist(), copies to the CPU, and outputs
  whose shape depends on values (nonzero(), boolean masks). `uploads` counts the blocking copies to the device, which
  CUDA waits for too.

It knows nothing of speed, memory, streams, several GPUs, or CUDA's own kernels: where those lack a dtype, or round
differently, only a GPU tells. Generators of the device (torch.Generator("cuda")) don't exist on it.

`simulate(jobs, folder)` runs jobs one after the other in ONE other process, as loading the libraries costs more than
a run, and as the pretence can't be taken back. It needs Linux and g++: a library of a few lines is preloaded.
"""

import contextlib
import functools
import importlib
import json
import linecache
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from conftest import ROOT, environment, run_in_process
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

# In a build with CUDA, libtorch's autograd asks which accelerator there is and then waits on its streams. These two
# answers, found before libtorch's own because the library is preloaded, say that there is none.
SHIM = """
#include <optional>
namespace c10 { enum class DeviceType : signed char { CPU }; }
namespace at::accelerator {
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) { return std::nullopt; }
__attribute__((visibility("default"))) bool isAccelerator(c10::DeviceType) { return false; }
}
"""


def simulate(jobs, folder, timeout=1200):
    """Run every job on the simulated device; returns a dict of its name to its report. `folder`: an empty one.

    jobs: dict of a name to {"script": module name, "runs": command lines, each a list} or to {"code": Python source}.
    A report holds `error` (a traceback, or None), `syncs` and `uploads` (lists of sites, see Journal), and `steps`:
    {"syncs": ..., "uploads": ...} of each interval between two optimizer steps.
    """
    folder = Path(folder)
    todo, done, shim = folder / "jobs.json", folder / "reports.jsonl", build_shim(folder)
    todo.write_text(json.dumps(jobs, default=str))
    done.write_text("")
    preloaded = f"{shim} {os.environ.get('LD_PRELOAD', '')}".strip()
    more = {"LD_PRELOAD": preloaded, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "false"}  # no real GPU
    process = subprocess.run(
        [sys.executable, __file__, todo, done], cwd=ROOT, env={**environment(), **more}, text=True, timeout=timeout,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    reports = {report["job"]: report for report in map(json.loads, done.read_text().splitlines())}
    died = f"the process ended with {process.returncode} before this job did:\n{process.stdout[-4000:]}"
    return {name: reports.get(name, {"error": died, "syncs": [], "uploads": [], "steps": []}) for name in jobs}


def build_shim(folder):
    """The library to preload, compiled into `folder`."""
    if shutil.which("g++") is None:
        raise RuntimeError("the simulated CUDA device needs g++ to compile a few lines of C++: install it")
    (folder / "shim.cpp").write_text(SHIM)
    subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", "-o", "shim.so", "shim.cpp"], cwd=folder, check=True)
    return folder / "shim.so"


class Journal:
    """Counts events by site: the kind of event, and the innermost line of the project that led to it.

    In a report a site is {"kind", "file", "line", "function", "code", "count"}, where `code` is the line's text; file,
    line, function and code are None of an event that no line of the project leads to.
    """

    def __init__(self):
        self.errors, self.steps, self.counts = [], [], {"syncs": Counter(), "uploads": Counter()}

    def note(self, what, kind):
        frame = sys._getframe(1)
        while frame is not None and project_file(frame.f_code.co_filename) is None:
            frame = frame.f_back
        site = (project_file(frame.f_code.co_filename), frame.f_lineno, frame.f_code.co_name) if frame else [None] * 3
        self.counts[what][(kind, *site)] += 1

    def mark_step(self):
        self.steps.append({what: counter.copy() for what, counter in self.counts.items()})

    def report(self):
        pairs = zip(self.steps, self.steps[1:])
        steps = [{what: sites(after[what] - before[what]) for what in before} for before, after in pairs]
        return {**{what: sites(counter) for what, counter in self.counts.items()}, "steps": steps}


def sites(counter):
    def code(file, line):
        return linecache.getline(str(ROOT / file), line).strip() if file else None

    fields = ("kind", "file", "line", "function", "code", "count")
    return [dict(zip(fields, (*site, code(*site[1:3]), count))) for site, count in counter.most_common()]


@functools.cache
def project_file(filename):
    """The path within the project of one of its source files; None of a test's or a library's."""
    path = Path(filename)
    ours = path.is_relative_to(ROOT) and path.parent != ROOT / "tests" and "site-packages" not in path.parts
    return str(path.relative_to(ROOT)) if ours else None


journal = Journal()


# The device


CUDA = torch.device("cuda", 0)
SEQUENCES = (list, tuple)


class Event:
    """A mark on the device's own clock, which is the host's here."""

    def __init__(self, enable_timing=False):
        self.time = None

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1000 * (other.time - self.time)


class DeviceError(RuntimeError):
    """What CUDA would refuse."""


def refuse(message):
    journal.errors.append("".join(traceback.format_stack(limit=12)) + message)
    raise DeviceError(message)


class DeviceTensor(torch.Tensor):
    """A tensor on the simulated device; `host` is the CPU tensor with its values, never one that requires grad."""

    @staticmethod
    def __new__(cls, host):
        self = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, host.stride(), host.storage_offset(), dtype=host.dtype, layout=host.layout, device=CUDA
        )
        self.host = host
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return dispatch(operator, args, kwargs or {})

    def numpy(self, **_):
        refuse("numpy() of a device tensor: copy it to the CPU first")

    def tolist(self):
        return self.cpu().tolist()

    # The wrapper has no memory of its own; who asks for it, as savers do, means that of the values.
    data_ptr = property(lambda self: self.host.data_ptr)
    untyped_storage = property(lambda self: self.host.untyped_storage)

    def set_data(self, value):
        if not isinstance(value, DeviceTensor):
            refuse(".data of a device tensor set to a host tensor")
        torch.Tensor.data.__set__(self, value)
        self.host = value.host

    data = property(lambda self: self.detach(), set_data)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = DeviceTensor(self.host.clone())
            copy = torch.nn.Parameter(copy) if isinstance(self, torch.nn.Parameter) else copy
            memo[id(self)] = copy.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return self.host.clone().__reduce_ex__(protocol)  # a file made here is read as one of a CPU


class SimulatedCuda(TorchDispatchMode):
    """Within this context `device="cuda"` is the simulated device: operations without any tensor of it pass here."""

    _should_skip_dynamo = classmethod(lambda cls: False)  # else each call is guarded against torch.compile, slowly

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return dispatch(operator, args, kwargs or {})


# Where CUDA takes host tensors beside device tensors: in copies, and in elementwise operations as numbers, of no
# dimension. In indexing as indices, and as the number that is put.
COPIES = {"_to_copy", "copy_", "_foreach_copy_"}
TAKES_NUMBERS = {"fill", "fill_", "masked_fill", "masked_fill_", "_foreach_mul_", "_foreach_mul", "_foreach_div_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
RESHAPED_IN_PLACE = {"as_strided_", "resize_", "set_", "squeeze_", "t_", "transpose_", "unsqueeze_"}

# What CUDA's kernels do and the CPU's don't: softmax of a half in fp32, which autocast asks for.
LIKE_CUDA = {
    "_softmax": lambda x, dim, fp32: torch._softmax(x.float() if fp32 else x, dim, False),
    "_softmax_backward_data": lambda d, y, dim, dtype: torch._softmax_backward_data(d, y, dim, y.dtype).to(dtype),
}


def is_device(x):
    return isinstance(x, DeviceTensor)


def unwrap(x):
    return x.host if is_device(x) else x


def leaves(values):
    """Arguments of an operation with its lists of tensors opened."""
    return [y for x in values for y in (x if isinstance(x, SEQUENCES) else (x,))]


def map_leaves(function, x):
    return type(x)([map_leaves(function, y) for y in x]) if isinstance(x, SEQUENCES) else function(x)


@functools.cache
def traits(operator):
    """An operation's name, whether it is elementwise, and whether its result must be read for its value or shape."""
    reads = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operator.tags)
    return operator._schema.name.removeprefix("aten::"), torch.Tag.pointwise in operator.tags, bool(reads)


def dispatch(operator, args, kwargs):
    """One operation, below autograd and autocast: checked and counted, then done by the CPU on the values."""
    flat = leaves((*args, *kwargs.values()) if kwargs else args)
    mine, asked = [x for x in flat if isinstance(x, DeviceTensor)], kwargs.get("device")
    on_device = bool(mine) if asked is None else torch.device(asked).type == "cuda"
    if not on_device and not mine:
        return operator(*args, **kwargs)
    name, elementwise, reads = traits(operator)
    if name in RESHAPED_IN_PLACE:
        raise NotImplementedError(f"{name} on the simulated device: the wrapper's shape would not follow")
    if on_device and kwargs.get("generator") is not None:
        refuse(f"{name} on the device draws from a generator of the CPU")
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    if 0 < len(mine) < len(tensors) and name not in COPIES:
        check_mixing(name, elementwise, args, tensors)
    count(name, reads, args, kwargs, on_device)

    def wrap(x):
        if id(x) in known:  # written in place
            return known[id(x)]
        return DeviceTensor(x) if on_device and isinstance(x, torch.Tensor) else x

    known = {id(unwrap(x)): x for x in tensors}
    host_kwargs = {key: map_leaves(unwrap, x) for key, x in kwargs.items()}
    if asked is not None:
        host_kwargs["device"] = torch.device("cpu")
    return map_leaves(wrap, LIKE_CUDA.get(name, operator)(*map_leaves(unwrap, args), **host_kwargs))


def check_mixing(name, elementwise, args, tensors):
    """Refuse what CUDA refuses of host and device tensors in one operation."""
    if name in INDEXING:
        fine = is_device(args[0]) and all(is_device(x) or x.dim() == 0 for x in args[2:3])  # indices from anywhere
    else:
        fine = (elementwise or name in TAKES_NUMBERS) and all(is_device(x) or x.dim() == 0 for x in tensors)
    if not fine:
        sides = [f"{'device' if is_device(x) else 'host'} {str(x.dtype)[6:]}{list(x.shape)}" for x in tensors]
        refuse(f"{name} mixes host and device tensors: {', '.join(sides[:8])}")


def count(name, reads, args, kwargs, on_device):
    """Note an operation that makes the host wait for the device."""
    if name in COPIES:
        targets = [on_device] if name == "_to_copy" else map(is_device, leaves(args[:1]))
        for source, to_device in zip(leaves(args[:1] if name == "_to_copy" else args[1:2]), targets):
            if is_device(source) != to_device and not (kwargs.get("non_blocking") or True in args[2:]):
                journal.note(*(("uploads", "to device") if to_device else ("syncs", "to cpu")))
    elif name in INDEXING:
        # A mask's positions are counted first, unless one number of the host is to fill them.
        fills = name != "index" and not is_device(args[2]) and args[2].numel() == 1
        for index in (x for x in args[1] if x is not None):
            if not is_device(index):
                journal.note("uploads", "index")
            elif index.dtype in (torch.bool, torch.uint8) and not fills:
                journal.note("syncs", "mask")
    elif reads and kwargs.get("output_size") is None:
        journal.note("syncs", "item" if name == "_local_scalar_dense" else name)


# The process that simulates


def pretend():
    """Make torch say that there is one CUDA GPU, and take away what would reach for a real one. For good."""
    torch._C._ensureCUDADeviceGuardSet()  # a guard that does nothing where there is no GPU
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda"): made on the host, then dispatched
    properties = type("Properties", (), dict(major=8, minor=0, total_memory=80 << 30, name="simulated"))
    answers = dict(
        is_available=True, is_initialized=True, device_count=1, current_device=0, is_bf16_supported=True,
        get_device_capability=(8, 0), get_device_name="simulated", get_device_properties=properties,
        is_current_stream_capturing=False, max_memory_allocated=0, get_rng_state=torch.get_rng_state(),
        get_rng_state_all=[], _lazy_init=None, set_device=None, synchronize=None, empty_cache=None, manual_seed=None,
        manual_seed_all=None, set_rng_state=None, set_rng_state_all=None, reset_peak_memory_stats=None)  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    torch.cuda.graphs.is_current_stream_capturing = torch.cuda.is_current_stream_capturing
    torch.cuda.device, torch.cuda.Event = contextlib.nullcontext, Event
    torch.accelerator.is_available = torch.cuda.is_available
    for kernel in ("flash", "mem_efficient", "cudnn"):  # CUDA's fused attention: left is the one of plain operations
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(False)
    # Module.to would put new parameters in the place of those whose class changes; on CUDA it keeps them.
    torch.__future__.set_swap_module_params_on_conversion(True)
    # A loader pins memory in a thread that asks the driver.
    init = torch.utils.data.DataLoader.__init__
    torch.utils.data.DataLoader.__init__ = lambda *args, **kwargs: init(*args, **{**kwargs, "pin_memory": False})
    register_optimizer_step_post_hook(lambda *_: journal.mark_step())


def serve(todo, done):
    """Run the jobs of one file and append each one's report to another as it ends."""
    global journal
    jobs = json.loads(Path(todo).read_text())
    # Imported first, as some libraries look for a GPU when they are.
    modules = {job["script"]: importlib.import_module(job["script"]) for job in jobs.values() if "script" in job}
    torch.set_num_threads(1)
    pretend()
    for name, job in jobs.items():
        journal, error = Journal(), None
        try:
            # Backward in this thread, not in one of the device's: its operations have the caller's line above them.
            with SimulatedCuda(), torch.autograd.set_multithreading_enabled(False):
                for command_line in job.get("runs", ()):
                    sys.argv[1:] = map(str, command_line)  # a model card has it
                    run_in_process(modules[job["script"]], *command_line)
                exec(job.get("code", ""), {"torch": torch})
        except (Exception, SystemExit):
            error = traceback.format_exc()
        error = error or "\n\n".join(journal.errors) or None  # or what a library has swallowed
        with open(done, "a") as file:
            file.write(json.dumps({"job": name, "error": error, **journal.report()}) + "\n")


if __name__ == "__main__":
    serve(*sys.argv[1:])
