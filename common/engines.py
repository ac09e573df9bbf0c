"""What spreads a run over its processes: DDP, or the two engines that shard what is trained, FSDP2 and ZeRO-2.

DDP keeps weights, gradients, optimizer and average whole on every process. FSDP2 cuts all four into as many parts as
there are processes, and gathers the weights of a block while it runs. DeepSpeed's ZeRO-2 keeps weights and average
whole and cuts the rest. Frozen models are whole on every process, whatever the engine. All three are accelerate's.
"""

import contextlib
import copy
import os
from datetime import timedelta
from functools import partial

import accelerate.utils.other
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names, fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from common.errors import UsageError

NAMES = {"fsdp2": "FSDP2", "zero2": "DeepSpeed"}
ALONE = (
    "accelerate launch --cpu starts one process, whatever --num_processes and the configuration say. Leave --cpu out: "
    "without a GPU the scripts take the CPU."
)
BUCKET = 10**8  # elements of gradients, at most, that DeepSpeed collects before it sends them, in memory of their own
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
# What FSDP2 gathers at once: the parts of a UNet and of a CLIP text model that most of their weights are in.
BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")
if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
    # Wherever a model is saved accelerate imports deepspeed, for two seconds, to see whether it is an engine of its.
    accelerate.utils.other.is_deepspeed_available = lambda: False

# Opening


def launched_engine():
    """("ddp", "fsdp2" or "zero2", whether what is sharded lies in the CPU's memory): what accelerate launch asked for.

    From the environment, through which it tells a script: nothing is initialised.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "fsdp2", parse_flag_from_env("FSDP_OFFLOAD_PARAMS")
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return "zero2", os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") == "cpu"
    return "ddp", False


def check_engine(args, mixed_precision, unsharded=None):
    """UsageError where the engine that accelerate launch asked for can't run this script with these flags.

    unsharded: why what the script trains is never sharded, as the beginning of a sentence, or None where it may be.
    """
    engine, offloaded = launched_engine()
    ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
    if parse_flag_from_env("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ and not ranks & os.environ.keys():
        print(f"warning: {ALONE}", flush=True)
    if engine == "ddp":
        return
    if getattr(args, "lora_rank", None) and not unsharded:
        unsharded = "a LoRA has a few megabytes of gradients and optimizer, and nothing else would be sharded"
    name, instead = NAMES[engine], "launch it with accelerate_configs/multi_gpu.yaml"
    if unsharded:
        raise UsageError(f"{name}: {unsharded}: {instead}.")
    if engine == "fsdp2" and os.environ.get("FSDP_VERSION") != "2":
        raise UsageError("FSDP: version 2 alone is taken here: set fsdp_version: 2, as accelerate_configs/fsdp2.yaml.")
    if engine == "fsdp2" and os.environ.get("FSDP_AUTO_WRAP_POLICY") == "SIZE_BASED_WRAP":
        raise UsageError("fsdp_auto_wrap_policy: take TRANSFORMER_BASED_WRAP, as accelerate_configs/fsdp2.yaml.")
    if engine == "fsdp2" and offloaded:
        raise UsageError("fsdp_offload_params: use accelerate_configs/deepspeed_zero2_offload.yaml instead.")
    if engine == "zero2" and os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none").lower() != "none":
        raise UsageError("DeepSpeed: no configuration file of its own is taken: use accelerate_configs/.")
    if engine == "zero2" and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") != "2":
        raise UsageError("DeepSpeed: ZeRO's stage 2 alone is taken here; for more, accelerate_configs/fsdp2.yaml.")
    if mixed_precision == "fp16":
        raise UsageError(f"{name} runs here with --mixed_precision bf16 or no, not fp16.")
    for flag in ("use_8bit_adam", "torch_compile", *["channels_last"] * (engine == "fsdp2")):
        if getattr(args, flag, False):
            raise UsageError(f"--{flag} is not for {name}: leave it out, or {instead}.")
    if engine == "zero2" and getattr(args, "method", None) == "magnitude":
        raise UsageError(f"--method magnitude masks gradients, which DeepSpeed keeps to itself: {instead}.")


def open_accelerator(args, kwargs_handlers=(), **options):
    """accelerate's, its processes joined: by --mixed_precision, and --ddp_timeout for each other."""
    no_gpu = None if torch.accelerator.is_available() else True  # told so, accelerate joins several processes by gloo
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout))
    engine, _ = launched_engine()
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if no_gpu and engine != "ddp" and "LOCAL_RANK" in os.environ:
        # accelerate takes FSDP and DeepSpeed for engines of GPUs alone. Both run on CPUs, once it is told that the
        # processes, which it has joined, are of that kind.
        PartialState(cpu=True, **timeout.to_kwargs())
        kind = DistributedType.MULTI_GPU if engine == "fsdp2" else DistributedType.DEEPSPEED
        PartialState._shared_state["distributed_type"] = kind
        no_gpu = None
        if engine == "zero2":
            import deepspeed

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # is compiled at first use: gloo will do
    # DeepSpeed would round the weights themselves: under "no" they stay in fp32, and autocast rounds, as elsewhere.
    options["mixed_precision"] = "no" if engine == "zero2" else args.mixed_precision
    accelerator = Accelerator(cpu=no_gpu, kwargs_handlers=[timeout, *kwargs_handlers], **options)
    if accelerator.distributed_type == DistributedType.FSDP and precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        rounded = precision == "bf16"
        accelerator.autocast = partial(torch.autocast, accelerator.device.type, torch.bfloat16, enabled=rounded)
    return accelerator


def engine_of(accelerator):
    """ "ddp", "fsdp2" or "zero2": what an accelerator runs by."""
    kinds = {DistributedType.FSDP: "fsdp2", DistributedType.DEEPSPEED: "zero2"}
    return kinds.get(accelerator.distributed_type, "ddp")


# What is trained


def prepare(run, module, optimizer):
    """(the module as its engine runs it, its optimizer): accelerate's prepare, of the one model of a run.

    Under FSDP2 the module's parameters are other ones afterwards, of which every process has a part.
    """
    accelerator, args = run.accelerator, run.args
    if run.engine != "ddp":
        run.skeletons.append((module, _skeleton(module)))
    if run.engine == "fsdp2":
        _wrap_blocks(accelerator, module)
    if run.engine == "zero2":
        config = accelerator.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        config["gradient_accumulation_steps"] = args.gradient_accumulation_steps
        config["gradient_clipping"] = args.max_grad_norm
        size = sum(p.numel() for p in module.parameters() if p.requires_grad)
        config["zero_optimization"]["reduce_bucket_size"] = min(BUCKET, size)
        config["zero_force_ds_cpu_optimizer"] = False  # torch's own is as fast there, and nothing is to be compiled
    student, optimizer = accelerator.prepare(module, optimizer)
    if run.engine == "zero2":
        accelerator.deepspeed_engine_wrapped = StepLater(student)
    run.optimizers["student"] = optimizer
    return student, optimizer


def prepare_beside(run, name, module, optimizer):
    """The same of a second model, a small one: whole on every process, whatever engine has the first.

    The optimizer is the plain one: what it trains is fp32, and fp16's loss scaling not for it.
    """
    if run.engine == "ddp":
        module, wrapped = run.accelerator.prepare(module, optimizer)
        optimizer = wrapped.optimizer
    else:  # accelerate's engines take one model
        module = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
    run.optimizers[name] = optimizer
    return module, optimizer


class StepLater:
    """DeepSpeed's engine for accelerator.backward, without the step that accelerate takes there: `update` takes it."""

    def __init__(self, engine):
        self.engine = engine

    def backward(self, loss, sync_gradients=True):
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss)


def step_deepspeed(run):
    """Let DeepSpeed clip and step, or skip where the gradient is not finite. Its norm, on the device."""
    engine = run.accelerator.deepspeed_engine_wrapped.engine
    engine.step()
    return torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32, device=run.device)


def shard_frozen(run, module):
    """Under FSDP2 cut a frozen module as the trained one of its shape is, so that it can follow it part by part."""
    if run.engine == "fsdp2":
        _wrap_blocks(run.accelerator, module)
        fsdp2_prepare_model(run.accelerator, module)


def reshard(module):
    """Let a module that FSDP2 cut gather its weights anew in its next forward: after one without gradients it would
    use those that it has."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _wrap_blocks(accelerator, module):
    """Tell accelerate what of this module is gathered at once, unless the configuration does."""
    plugin, there = accelerator.state.fsdp_plugin, {type(part).__name__ for part in module.modules()}
    if os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP") is None:
        plugin.transformer_cls_names_to_wrap = [name for name in BLOCKS if name in there]


def _skeleton(module):
    """A copy of a module with its buffers, whose parameters have no memory, and which nothing looks into."""
    empty = partial(torch.empty_like, device="meta")
    memo = {id(p): torch.nn.Parameter(empty(p), p.requires_grad) for p in module.parameters()}
    skeleton = copy.deepcopy(module, memo)
    for part in skeleton.modules():
        part._forward_hooks.clear()  # taps of features
    return skeleton


# Parts and wholes


def named_parameters(module):
    """{name: parameter} of a module, by the names that they had before accelerate wrapped what is in it."""
    return fsdp2_canonicalize_names(dict(module.named_parameters()))


def local(tensor):
    """What of a tensor is on this process: its part, where it is cut, else itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor):
    """The whole of a tensor, on every process. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(parameter):
    """(offset, numel) of the range of a flattened parameter that this process has: all of it where it is not cut."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.numel()
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    chunk = -(-rows // mesh.size())
    first = min(mesh.get_local_rank() * chunk, rows)
    return first * (parameter.numel() // rows), local(parameter).numel()


def is_cut(run, name):
    """Whether each process has a part of the optimizer of `name`, of run.optimizers."""
    return run.engine != "ddp" and name == "student"


def optimizer_states(run, which):
    """[(name, offset, {moment: this process's part, to be changed in place}, the optimizer's own state)].

    AdamW's moments of what this process has of the parameters of run.trained[which], whether it has stepped or not.
    """
    optimizer, found = run.optimizers[which], []
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    for name, parameter in run.trained[which].items():
        if run.engine == "zero2" and is_cut(run, which):
            place = parameter._hp_mapping  # what of it this process updates
            if place is None:
                continue
            state = _state_of(optimizer.optimizer, optimizer.single_partition_of_fp32_groups[place.param_group_index])
            within = place.hp_fragment_address.start, place.hp_fragment_address.numel
            offset, moments = place.lp_fragment_address.start, {key: state[key].narrow(0, *within) for key in MOMENTS}
        else:
            state = _state_of(optimizer, parameter)
            offset = part_of(parameter)[0]
            moments = {key: local(state[key].detach()) for key in MOMENTS}
        found.append((name, offset, moments, state))
    return found


def _state_of(optimizer, parameter):
    """An optimizer's state of a parameter: that of its beginning, where it has not stepped yet."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state.update({key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS})
    return state


def refresh_deepspeed(run):
    """Let DeepSpeed take over weights that were changed in place: it updates a copy of its own."""
    if run.engine == "zero2":
        run.optimizers["student"].optimizer.refresh_fp32_params()


def forget(run, optimizer):
    """Let an optimizer begin anew."""
    if run.engine == "zero2":  # which has its moments' memory in other places too
        for state in optimizer.optimizer.optimizer.state.values():
            for key in (*MOMENTS, "step"):
                state[key].zero_()
    else:
        optimizer.state.clear()


@torch.no_grad()
def whole(run, module, everywhere=False, device=None, dtype=None):
    """A plain copy of a module that an engine runs, or of a part of it: on the main process, or everywhere, else None.

    Every process must call it. Under DDP, and of a module that no engine has, the module itself.
    """
    found = [skeleton for root, skeleton in run.skeletons for part in root.modules() if part is module]
    if not found:
        return module
    root, skeleton = next(pair for pair in run.skeletons if pair[1] is found[0])
    reshard(root)
    (place,) = fsdp2_canonicalize_names({name: part for name, part in root.named_modules() if part is module})
    kept = everywhere or run.accelerator.is_main_process
    copied = copy.deepcopy(skeleton.get_submodule(place)) if kept else None
    for name, parameter in named_parameters(module).items():
        value = full(parameter)
        if kept:
            owner, _, leaf = name.rpartition(".")
            value = value.detach().to(device or value.device, dtype or value.dtype, copy=True)
            setattr(copied.get_submodule(owner), leaf, torch.nn.Parameter(value, parameter.requires_grad))
    return copied


@contextlib.contextmanager
def made_whole(run, pipeline, everywhere=False):
    """Within the context a pipeline's parts are whole, in the compute dtype, on the main process, or everywhere.

    Every process must enter it.
    """
    cut = {}
    if run.engine == "fsdp2":
        trained = [part for root, _ in run.skeletons for part in root.modules()]
        for name, part in pipeline.components.items():
            if any(part is other for other in trained):
                cut[name] = part
                setattr(pipeline, name, whole(run, part, everywhere, run.device, run.dtype) or part)
    try:
        yield
    finally:
        for name, part in cut.items():
            setattr(pipeline, name, part)
