"""What tests of several scripts share: short runs, killed runs, checkpoints compared, mistakes, stock diffusers."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import fork, run_main
from safetensors.torch import load_file

from common.run import run_script

QUICK = ["--train_batch_size", 4, "--report_to", "none", "--logging_steps", 1, "--resolution", 32]
QUICK += ["--checkpoints_total_limit", 99]
# Adam divides by the gradient's size: with its usual epsilon a rounding error in a tiny gradient would count in full.
QUICK += ["--adam_epsilon", 1e-4]
SHAPES = ["--dataset_name", "shapes"]
SPLIT = dict(atol=2e-5, rtol=1e-3)  # the order of a sum, through Adam


def quick(pipelines, folder, *more, kind="sd", steps=2, data=SHAPES):
    """Flags of a short run of any training script on a random pipeline."""
    model = ["--pretrained_model_name_or_path", pipelines(kind)]
    return [*QUICK, *data, *model, "--output_dir", folder, "--max_steps", steps, *more]


def quick_student(pipelines, student, folder, *more, **options):
    """Flags of a short run of train_student_kd.py."""
    return quick(pipelines, folder, "--student_model", student, *more, **options)


def own_guidance(kind):
    """The scale that a random pipeline of a kind is guided at where none is given: its stock class's."""
    return 5.0 if kind == "sdxl" else 7.5


def see_with(dinov2):
    """Flags of a discriminator that looks with the small random DINOv2."""
    return ["--discriminator", "dinov2", "--feature_model_name_or_path", dinov2, "--feature_resolution", 28]


SMALL = ["--resolution", 32, "--batch_size", 4]


def preparing(pipelines, pictures, folder, kind="sd"):
    model = ["--pretrained_model_name_or_path", pipelines(kind), "--data_dir", pictures]
    return [*model, *SMALL, "--center_crop", "--random_flip", "--cache_dir", folder]


def copied(cache, folder):
    shutil.copytree(cache, folder)
    return folder


# Every script

QUICK_CALIBRATION = ["--num_calibration_prompts", 2, "--calibration_steps", 2]
SCRIPTS = {  # four optimizer steps of each, on a random pipeline
    "train_flash_lora": ["--num_ddim_steps", 2, "--num_inference_steps", 2],
    "train_lcm": ["--lora_rank", 4],
    "train_guided": [],
    "train_progressive": ["--start_steps", 4, "--end_steps", 1, "--steps_per_stage", 2],
    "train_add": ["--num_inference_steps", 2],
    "train_student_kd": [],
    "train_text_encoder_kd": [],
    "prune_and_quantize": ["--iterative", 2, "--finetune_steps", 2, "--num_eval_images", 0, *QUICK_CALIBRATION],
}

# The tests of one script share its uninterrupted run, so they share a worker.
every_script = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in SCRIPTS]
)


def each(cases, what, happens):
    """A test for each of the cases, each a line of docs/reliability.md; `what` has a place for its name."""
    faults = [pytest.param(case, marks=pytest.mark.fault(what.format(case), happens)) for case in cases]
    return pytest.mark.parametrize("case", faults)


def flags(pipelines, name, folder, *more, steps=4, **options):
    """Flags of a short run of a script; of progressive, whose stages say how long it is, --max_steps is a cap."""
    return quick(pipelines, folder, *SCRIPTS[name], "--checkpointing_steps", 2, *more, steps=steps, **options)


def inside(name, folder):
    return folder / "lora" if name == "train_flash_lora" else folder


# Checkpoints


def checkpoint_tensors(folder, name):
    """All tensors of a checkpoint: what is trained (<name>.safetensors), its EMA and optimizer state."""
    tensors = {**load_file(folder / f"{name}.safetensors")}
    tensors.update({f"ema.{k}": v for k, v in load_file(folder / f"{name}_ema.safetensors").items()})
    state = torch.load(folder / "optimizer.bin", weights_only=True)["state"]
    tensors.update({f"optimizer.{i}.{k}": torch.as_tensor(v) for i, s in state.items() for k, v in s.items()})
    return tensors


def assert_same_checkpoints(a, b, name, **tolerance):
    """Bit for bit, or within assert_close's `tolerance` where one is given."""
    a, b = checkpoint_tensors(a, name), checkpoint_tensors(b, name)
    assert a.keys() == b.keys() and len(a) > 10
    for key in a:
        if tolerance:
            torch.testing.assert_close(a[key], b[key], **tolerance, msg=lambda m, key=key: f"{key}: {m}")
        else:
            assert torch.equal(a[key], b[key]), key


def start_from(name, run, folder, checkpoint="checkpoint-2"):
    """A folder in which a run can be resumed from an earlier checkpoint of another one."""
    for part in (checkpoint, "student"):
        if (inside(name, run) / part).is_dir():
            shutil.copytree(inside(name, run) / part, inside(name, folder) / part)


def assert_same(name, a, b, step=4, **tolerance):
    a, b = (inside(name, folder) / f"checkpoint-{step}" for folder in (a, b))
    assert_same_checkpoints(a, b, "student", **tolerance)


# Killed runs


def wait_for(condition, process, seconds=240):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended by itself with {process.returncode}"
        assert time.time() < deadline, "the run did not get there in time"
        time.sleep(0.2)


KILLED_WHILE_SAVING = """
import os, runpy, signal, sys
import accelerate.accelerator
script, killed_at = sys.argv[1:3]
save = accelerate.accelerator.save_accelerator_state  # runs after the hook that writes the weights
def torn(folder, *arguments, **options):
    if str(folder).endswith(killed_at):
        os.kill(os.getpid(), signal.SIGKILL)
    return save(folder, *arguments, **options)
accelerate.accelerator.save_accelerator_state = torn
sys.argv[1:] = sys.argv[3:]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""


def kill_9_while_saving(tmp_path, checkpoint, script, *arguments):
    """Start a script that kills itself between the two halves of `checkpoint`, the name of its folder."""
    (tmp_path / "killed.py").write_text(KILLED_WHILE_SAVING)
    command = [tmp_path / "killed.py", script, checkpoint, *arguments]
    process = fork(*command, output=tmp_path / "killed.txt")
    assert process.wait() == -signal.SIGKILL, (tmp_path / "killed.txt").read_text()[-2000:]


def fork_and_wait(tmp_path, script, *arguments, **options):
    """Start a script that must succeed; returns what it said."""
    process = fork(script, *arguments, output=tmp_path / "said.txt", **options)
    code, said = process.wait(), (tmp_path / "said.txt").read_text()
    assert code == 0, said[-4000:]
    return said


# Flags and mistakes


def error_of(module, words, capsys):
    """What a script says that a user's mistake ends: all of stderr, with exit status 2."""
    args = module.parse_args([str(word) for word in words])
    capsys.readouterr()  # the bars of the fixture that saved the pipeline
    with pytest.raises(SystemExit) as stop:
        run_script(lambda args: run_main(module, args), args)
    assert stop.value.code == 2
    return capsys.readouterr().err


def assert_every_flag_has_help(module, monkeypatch):
    """--help is the documentation."""
    parsers, original = [], module.arguments.make_parser
    monkeypatch.setattr(module.arguments, "make_parser", lambda text: parsers.append(original(text)) or parsers[-1])
    args = module.parse_args([])
    assert all(action.help for action in parsers[0]._actions)
    parsers[0].format_help()
    json.dumps(vars(args))


# Stock diffusers

STOCK = """
import sys, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)  # as in the tests' own process: two threads round differently, by up to 5e-6
final, steps, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(final)
images = pipe(["a red ring"], num_inference_steps=int(steps), guidance_scale=3, height=32, width=32,
              generator=torch.Generator().manual_seed(0), output_type="pt").images
torch.save(images, out)
"""


def stock_images(final, steps, tmp_path):
    """What stock diffusers, in a process without this repository, makes of a folder that holds a pipeline."""
    command = [sys.executable, "-c", STOCK, final, str(steps), tmp_path / "images.pt"]
    subprocess.run(command, check=True, cwd=tmp_path)
    return torch.load(tmp_path / "images.pt", weights_only=True)


def images_in_memory(pipeline, steps, guidance_scale=3):
    """The images of `stock_images`, by a pipeline in this process."""
    return pipeline(
        ["a red ring"],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        height=32,
        width=32,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
