"""A script run with a fault in it: `python faulty.py FAULT script.py flags`, FAULT a JSON object.

{"kill_at": n, "within": folder, "after_ms": m}: killed, as by kill -9, m milliseconds after its n-th operation on
files of the folder; at its end it says how many there were. {"limit": bytes}: no file can grow beyond, as on a full
disk. {"clock": true}: the clock jumps back at every look. {"tracker": true}: the tracker fails from the second step.
"""

import json
import os
import runpy
import signal
import sys
import threading
import time

fault = json.loads(sys.argv[1])
count = 0


def watch(event, arguments):
    """Count what changes files; rmtree works on names within folders, which count too."""
    global count
    if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        return
    path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else ""
    writes = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    if writes and (path.startswith(fault["within"]) or not os.path.isabs(path)):
        count += 1
        if count == fault["kill_at"]:
            kill = threading.Timer(fault["after_ms"] / 1000, os.kill, (os.getpid(), signal.SIGKILL))
            kill.daemon = True
            kill.start()


def break_tracker():
    from accelerate import Accelerator

    log, calls = Accelerator.log, []

    def broken(accelerator, *arguments, **options):
        calls.append(1)
        if len(calls) > 1:
            raise ConnectionError("the tracker's server is gone")
        return log(accelerator, *arguments, **options)

    Accelerator.log = broken


if "kill_at" in fault:
    sys.addaudithook(watch)
if "limit" in fault:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (fault["limit"], fault["limit"]))
if "clock" in fault:
    now, looks = time.time, []
    time.time = lambda: now() - 3600 * len(looks.append(1) or looks)
if "tracker" in fault:
    break_tracker()
sys.argv[:] = sys.argv[2:]
sys.path[0] = os.path.dirname(sys.argv[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(f"file operations: {count}", flush=True)
