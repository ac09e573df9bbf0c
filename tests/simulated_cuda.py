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
a run, and as the pretence can't be taken back. That process needs g++, for a preloaded library of a few lines,
and Linux.
"""

import contextlib
import functools
import importlib
import json
import linecache
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent

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


# Asked from a test's process


def simulate(jobs, folder, timeout=1200):
    """Run every job on the simulated device; returns a dict of its name to its report.

    jobs: dict of a name to {"script": module name, "runs": command lines, each a list} or to {"code": Python source}.
    A report holds `error` (a traceback, or None), `syncs` and `uploads` (lists of sites, see Journal), and `steps`,
    the syncs and uploads of each interval between two optimizer steps, as {"syncs": ..., "uploads": ...}.
    folder: for the compiled library, the jobs and the reports.
    """
    folder = Path(folder)
    todo, done = folder / "jobs.json", folder / "reports.jsonl"
    todo.write_text(json.dumps(jobs, default=str))
    done.write_text("")
    # No flag of a launcher, and no GPU even where there is one.
    dropped = ("ACCELERATE_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    environment.update(
        LD_PRELOAD=" ".join([str(build_shim(folder)), os.environ.get("LD_PRELOAD", "")]).strip(),
        CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")  # fmt: skip
    process = subprocess.run(
        [sys.executable, __file__, str(todo), str(done)], cwd=ROOT, env=environment, text=True, timeout=timeout,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    reports = {report["job"]: report for report in map(json.loads, done.read_text().splitlines())}
    died = f"the process ended with {process.returncode} before this job did:\n{process.stdout[-4000:]}"
    return {name: reports.get(name, {"error": died, "syncs": [], "uploads": [], "steps": []}) for name in jobs}


def build_shim(folder):
    """The library to preload, compiled into `folder`."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("the simulated CUDA device needs g++ to compile a few lines of C++: install it")
    source, library = folder / "shim.cpp", folder / "shim.so"
    if not library.exists():
        source.write_text(SHIM)
        subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


# What is noted while a job runs


class Journal:
    """Counts events by site: the kind of event and the innermost line of the project that led to it.

    As a report has it, a site is {"kind", "file", "line", "function", "code", "through", "count"}: `code` is the
    line's text, `through` the innermost file of another library between that line and torch, or None. Where no line of
    the project leads to an event, file, line, function and code are None.
    """

    def __init__(self):
        self.errors, self.counts, self.marks = [], {"syncs": Counter(), "uploads": Counter()}, []

    def note(self, what, kind):
        self.counts[what][(kind, *self._site())] += 1

    def mark_step(self):
        self.marks.append({what: counter.copy() for what, counter in self.counts.items()})

    def report(self):
        steps = [
            {what: self._sites(after[what] - before[what]) for what in before}
            for before, after in zip(self.marks, self.marks[1:])
        ]
        return {**{what: self._sites(counter) for what, counter in self.counts.items()}, "steps": steps}

    @staticmethod
    def _site():
        frame, through = sys._getframe(2), None
        while frame is not None:
            owner, file = owner_of(frame.f_code.co_filename)
            if owner == "project":
                return file, frame.f_lineno, frame.f_code.co_name, through
            through = through or (file if owner == "library" else None)
            frame = frame.f_back
        return None, None, None, through

    @staticmethod
    def _sites(counter):
        def described(kind, file, line, function, through):
            code = linecache.getline(str(ROOT / file), line).strip() if file else None
            return dict(kind=kind, file=file, line=line, function=function, code=code, through=through)

        return [{**described(*site), "count": count} for site, count in counter.most_common()]


@functools.cache
def owner_of(filename):
    """Whose source file it is, "project", "library" or None, and its path within that."""
    path = Path(filename)
    if "site-packages" in path.parts:
        inner = path.parts[path.parts.index("site-packages") + 1 :]
        return None if inner[0] == "torch" else "library", "/".join(inner)
    ours = path.is_relative_to(ROOT) and path.parent != ROOT / "tests"
    return ("project", str(path.relative_to(ROOT))) if ours else (None, None)


journal = Journal()


# The device


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
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            layout=host.layout, device=torch.device("cuda", 0))  # fmt: skip
        self.host = host
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return dispatch(operator, args, kwargs or {})

    def __repr__(self, **_):
        return f"DeviceTensor({self.host!r})"

    def numpy(self, **_):
        refuse("numpy() of a device tensor: copy it to the CPU first")

    def tolist(self):
        return self.cpu().tolist()

    # The wrapper has no memory of its own; who compares or shares memory, as savers do, means that of the values.

    def data_ptr(self):
        return self.host.data_ptr()

    def untyped_storage(self):
        return self.host.untyped_storage()

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        if not isinstance(value, DeviceTensor):
            refuse(".data of a device tensor set to a host tensor")
        torch.Tensor.data.__set__(self, value)
        self.host = value.host

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = DeviceTensor(self.host.clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, False) if is_parameter else copy
            memo[id(self)].requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return self.host.clone().__reduce_ex__(protocol)  # a file made here is read as one of a CPU


class SimulatedCuda(TorchDispatchMode):
    """Within this context `device="cuda"` is the simulated device: operations without any tensor of it pass here."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return dispatch(operator, args, kwargs or {})

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # or torch guards each call against its compiler, which no script uses here and which takes time


# Where CUDA takes a host tensor beside device tensors: copies, any; elementwise operations, one of no dimension, which
# is read as a number. Indexing is `check_index`'s.
COPIES = {"_to_copy", "copy_", "_foreach_copy_"}
TAKES_NUMBERS = {"fill", "fill_", "masked_fill", "masked_fill_", "_foreach_mul_", "_foreach_mul", "_foreach_div_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
RESHAPED_IN_PLACE = {"as_strided_", "resize_", "set_", "squeeze_", "t_", "transpose_", "unsqueeze_"}


def half_softmax(x, dim, half_to_float):
    return torch._softmax(x.float() if half_to_float else x, dim, False)


def half_softmax_backward(grad, output, dim, input_dtype):
    return torch._softmax_backward_data(grad, output, dim, output.dtype).to(input_dtype)


# What CUDA's kernels do and the CPU's don't: softmax of a half in fp32, as autocast asks for.
LIKE_CUDA = {"_softmax": half_softmax, "_softmax_backward_data": half_softmax_backward}


def is_device(x):
    return isinstance(x, DeviceTensor)


def unwrap(x):
    return x.host if isinstance(x, DeviceTensor) else x


def leaves(values):
    """Arguments of an operation with its lists of tensors opened."""
    flat = []
    for x in values:
        if isinstance(x, list | tuple):
            flat.extend(x)
        else:
            flat.append(x)
    return flat


def map_leaves(function, x):
    return type(x)([map_leaves(function, y) for y in x]) if isinstance(x, list | tuple) else function(x)


def dispatch(operator, args, kwargs):
    """One operation, below autograd and autocast: checked and counted, then done by the CPU on the values."""
    flat = leaves((*args, *kwargs.values()) if kwargs else args)
    mine, asked = [x for x in flat if isinstance(x, DeviceTensor)], kwargs.get("device")
    on_device = bool(mine) if asked is None else torch.device(asked).type == "cuda"
    if not on_device and not mine:
        return operator(*args, **kwargs)
    name = operator._schema.name.removeprefix("aten::")
    if name in RESHAPED_IN_PLACE:
        raise NotImplementedError(f"{name} on the simulated device: the wrapper's shape would not follow")
    if on_device and any(isinstance(x, torch.Generator) for x in flat):
        refuse(f"{name} on the device draws from a generator of the CPU")
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    if len(mine) < len(tensors):
        check_mixing(operator, name, args, tensors)
    count(operator, name, args, kwargs, on_device)

    def wrap(x):
        if id(x) in known:  # written in place
            return known[id(x)]
        return DeviceTensor(x) if on_device and isinstance(x, torch.Tensor) else x

    known = {id(unwrap(x)): x for x in tensors}
    host_kwargs = {key: map_leaves(unwrap, x) for key, x in kwargs.items()}
    if asked is not None:
        host_kwargs["device"] = torch.device("cpu")
    return map_leaves(wrap, LIKE_CUDA.get(name, operator)(*map_leaves(unwrap, args), **host_kwargs))


def check_mixing(operator, name, args, tensors):
    """Refuse what CUDA refuses of host and device tensors in one operation."""
    hosts = [x for x in tensors if not is_device(x)]
    if len(hosts) == len(tensors) or name in COPIES:
        return
    if name in INDEXING:
        given, value = (
            args[0],
            args[2:3],
        )  # the indices may lie on either side where the indexed tensor is the device's
        fine = is_device(given) and all(is_device(x) or x.dim() == 0 for x in value)
    else:
        numbers = torch.Tag.pointwise in operator.tags or name in TAKES_NUMBERS
        fine = numbers and all(x.dim() == 0 for x in hosts)
    if not fine:
        sides = [f"{'device' if is_device(x) else 'host'} {str(x.dtype)[6:]}{list(x.shape)}" for x in tensors]
        refuse(f"{name} mixes host and device tensors: {', '.join(sides[:8])}")


def count(operator, name, args, kwargs, on_device):
    """Note an operation that makes the host wait for the device."""
    if name in COPIES:
        if kwargs.get("non_blocking") or True in args[2:]:
            return
        sources, targets = leaves(args[:1] if name == "_to_copy" else args[1:2]), leaves(args[:1])
        for source, target in zip(sources, targets):
            to_device = on_device if name == "_to_copy" else is_device(target)
            if is_device(source) != to_device:
                journal.note(*(("uploads", "to device") if to_device else ("syncs", "to cpu")))
    elif name in INDEXING:
        indices = [x for x in args[1] if x is not None]
        # A mask's positions are counted first, unless one number of the host is to fill them.
        fills = name != "index" and not is_device(args[2]) and args[2].numel() == 1
        for index in indices:
            if not is_device(index):
                journal.note("uploads", "index")
            elif index.dtype in (torch.bool, torch.uint8) and not fills:
                journal.note("syncs", "mask")
    elif torch.Tag.data_dependent_output in operator.tags:
        journal.note("syncs", "item" if name == "_local_scalar_dense" else name)
    elif torch.Tag.dynamic_output_shape in operator.tags and kwargs.get("output_size") is None:
        journal.note("syncs", name)


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
    torch.cuda.device = contextlib.nullcontext
    torch.accelerator.is_available = torch.cuda.is_available
    for kernel in ("flash", "mem_efficient", "cudnn"):  # CUDA's fused attention: left is the one of plain operations
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(False)
    # Module.to would put new parameters in the place of those whose class changes; on CUDA it keeps them.
    torch.__future__.set_swap_module_params_on_conversion(True)
    loader_init = torch.utils.data.DataLoader.__init__
    torch.utils.data.DataLoader.__init__ = lambda self, *args, **kwargs: loader_init(
        self, *args, **{**kwargs, "pin_memory": False}
    )  # pinning is done by a thread that asks the driver
    register_optimizer_step_post_hook(lambda *_: journal.mark_step())


def run_script(module, command_line):
    """A script's main, with accelerate's process-wide state as new; the signals' handlers are put back afterwards."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    sys.argv = [f"{module.__name__}.py", *map(str, command_line)]
    try:
        module.main(module.parse_args(sys.argv[1:]))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def serve(todo, done):
    """Run the jobs of one file and append each one's report to another as it ends."""
    global journal
    jobs = json.loads(Path(todo).read_text())
    sys.path.insert(0, str(ROOT))
    import diffusers  # noqa: F401  # libraries that look for a GPU when they are imported look before the pretence

    modules = {job["script"]: importlib.import_module(job["script"]) for job in jobs.values() if "script" in job}
    torch.set_num_threads(1)
    pretend()
    for name, job in jobs.items():
        journal, error = Journal(), None
        try:
            # Backward in this thread, not in one of the device's: its operations have the caller's line above them.
            with SimulatedCuda(), torch.autograd.set_multithreading_enabled(False):
                for command_line in job.get("runs", ()):
                    run_script(modules[job["script"]], command_line)
                exec(job.get("code", ""), {"torch": torch})
        except (Exception, SystemExit):
            error = traceback.format_exc()
        error = error or "\n\n".join(journal.errors) or None
        with open(done, "a") as file:
            file.write(json.dumps({"job": name, "error": error, **journal.report()}) + "\n")


if __name__ == "__main__":
    serve(*sys.argv[1:])
