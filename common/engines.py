"""What spreads a run over its processes: DDP, or the two engines that shard what is trained, FSDP2 and ZeRO-2.

DDP keeps weights, gradients, optimizer and average whole on every process. FSDP2 cuts all four into as many parts as
there are processes, and gathers the weights of a block while it runs. DeepSpeed's ZeRO-2 keeps the weights whole and
cuts the rest.
"""

import os

from accelerate.utils import parse_flag_from_env


def launched_engine():
    """("ddp", "fsdp2" or "zero2", whether what is sharded lies in the CPU's memory): what accelerate launch asked for.

    From the environment, through which it tells a script: nothing is initialised.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "fsdp2", parse_flag_from_env("FSDP_OFFLOAD_PARAMS")
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return "zero2", os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") == "cpu"
    return "ddp", False
