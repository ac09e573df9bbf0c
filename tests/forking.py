"""Processes that need not load the libraries: forked from a server that has done it once, for seconds less in each.

A script that is started so runs as by `python script.py`, in a process of its own and with the repository's modules
still to load: the server has loaded others' libraries alone, and computed nothing. `python forking.py` is the server.
"""

import atexit
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time

LIBRARIES = """
import accelerate, diffusers, peft, tensorboard, torch, torchao, torchvision, transformers
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL, AutoPipelineForText2Image, DDIMScheduler, DiffusionPipeline, LCMScheduler, StableDiffusionPipeline,
    StableDiffusionXLPipeline, UNet2DConditionModel)
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
"""


class Forked:
    """A script in one process or several, which find each other over gloo. As subprocess.Popen: pid is the first's.

    joined: whether one process too is told of a world, as a launcher of several tells it.
    """

    def __init__(self, script, arguments, environment, cwd, output, processes=1, joined=False):
        environments = [environment]
        if processes > 1 or joined:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            world = {**environment, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environments = [{**world, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(processes)]
        job = {"argv": [str(script), *map(str, arguments)], "cwd": str(cwd), "output": str(output)}
        self.pids = [ask({**job, "environment": each}) for each in environments]
        self.pid, self.returncode, self._codes = self.pids[0], None, {}

    def poll(self):
        """The first exit status that is not 0, or 0, once all have ended; negative of one that a signal ended."""
        for pid in self.pids:
            if pid not in self._codes and (code := ask({"poll": pid})) is not None:
                self._codes[pid] = code
        if len(self._codes) == len(self.pids):
            self.returncode = next((code for code in self._codes.values() if code), 0)
        return self.returncode

    def wait(self, timeout=600):
        """Those that wait for one which has failed are killed after a while, as a launcher does."""
        deadline, grace = time.time() + timeout, None
        while self.poll() is None:
            if grace is None and any(self._codes.values()):
                grace = time.time() + 10
            if grace is not None and time.time() > grace:
                self.kill()
            if time.time() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired(self.pids, timeout)
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number):
        for pid in self.pids:
            if pid not in self._codes:
                os.kill(pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


@functools.cache
def server(owner):
    """The server of this process, started when first asked for; it ends with it."""
    from conftest import environment

    process = subprocess.Popen(
        [sys.executable, __file__], env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    atexit.register(process.stdin.close)
    return process


def ask(job):
    process = server(os.getpid())
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def serve():
    """Fork a process for each job of stdin, one JSON a line, and say its number; or say how one has ended."""
    exec(LIBRARIES, {})
    while line := sys.stdin.readline():
        job = json.loads(line)
        if "poll" in job:
            pid, status = os.waitpid(job["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return become(job)
        print(json.dumps(answer), flush=True)


def become(job):
    for file, mode, numbers in ((os.devnull, os.O_RDONLY, [0]), (job["output"], os.O_WRONLY | os.O_APPEND, [1, 2])):
        opened = os.open(file, mode)
        for number in numbers:
            os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    sys.argv[:], sys.path[0] = job["argv"], os.path.dirname(job["argv"][0])
    runpy.run_path(job["argv"][0], run_name="__main__")


if __name__ == "__main__":
    serve()
