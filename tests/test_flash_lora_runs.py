"""train_flash_lora.py from start to end: its promises about resume, accumulation and processes, and its output."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import launching
import pytest
import torch
from conftest import ROOT, environment, launch, launch_command, read_json, run_in_process, save_random_vgg16
from contract import assert_contract
from launching import assert_same_checkpoints, checkpoint_tensors, images_in_memory, kill_9_after, kill_9_while_saving
from peft import LoraConfig
from safetensors.torch import load_file

import train_flash_lora
from common.checkpoint import checkpoints_in, save_checkpoint
from common.diffusion import ddim_rollout
from common.errors import CheckpointError
from common.pipelines import load_pipeline
from common.schedulers import student_scheduler

SCRIPT = ROOT / "train_flash_lora.py"
weights = partial(checkpoint_tensors, name="lora")
assert_same = partial(assert_same_checkpoints, name="lora")


def quick(pipelines, folder, *more, **options):
    return launching.quick(pipelines, folder, "--num_ddim_steps", 2, *more, **options)


@pytest.fixture(scope="module")
def uninterrupted(pipelines, tmp_path_factory):
    """Six steps in one go, global batch 4, with a checkpoint every third."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_in_process(train_flash_lora, *quick(pipelines, folder, "--checkpointing_steps", 3, steps=6))
    return folder / "lora"


# Training


@pytest.mark.parametrize("kind, target, loss", [("v", "next", "l2"), ("sdxl", "x0", "huber")])
def test_every_kind_of_model_trains_and_keeps_the_contract(pipelines, tmp_path, kind, target, loss):
    run_in_process(
        train_flash_lora,
        *quick(
            pipelines,
            tmp_path,
            "--target",
            target,
            "--loss",
            loss,
            "--gradient_checkpointing",
            "--export",
            "fp16",
            "--validation_prompts",
            "a ring",
            "--validation_steps",
            2,
            "--num_validation_images",
            1,
            kind=kind,
        ),
    )
    final = tmp_path / "lora" / "final"
    contract = read_json(final / "distillation.json")
    assert contract["target"] == target and contract["steps"] == 4 and contract["timesteps"] == [999, 749, 499, 249]
    pipeline = load_pipeline(pipelines(kind))
    pipeline.load_lora_weights(final)
    saved = student_scheduler(pipeline.scheduler, target, 4).__class__.from_pretrained(final, subfolder="scheduler")
    assert_contract(pipeline, saved, contract, 4)
    assert (tmp_path / "lora" / "samples" / "step-2.png").is_file()
    exported = load_pipeline(tmp_path / "lora" / "final-fp16", dtype=torch.float16)
    pipeline.fuse_lora()
    name = next(k for k in exported.unet.state_dict() if "to_q.weight" in k)
    fused = pipeline.unet.state_dict()[name.replace("to_q.weight", "to_q.base_layer.weight")]
    torch.testing.assert_close(exported.unet.state_dict()[name], fused.half())


def test_lpips_on_crops_trains_and_resumes_bit_for_bit(pipelines, tmp_path, monkeypatch):
    monkeypatch.setattr(train_flash_lora, "LPIPS_CROP", 4)
    save_random_vgg16(tmp_path / "vgg16.safetensors")
    lpips = ["--loss", "lpips", "--lpips_trunk_path", tmp_path / "vgg16.safetensors", "--checkpointing_steps", 1]
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path / "a", *lpips))
    one, two = (weights(tmp_path / "a/lora" / f"checkpoint-{n}") for n in (1, 2))
    assert all(value.isfinite().all() for value in two.values())
    assert not torch.equal(*(tensors[next(name for name in one if "lora_B" in name)] for tensors in (one, two)))
    shutil.copytree(tmp_path / "a/lora/checkpoint-1", tmp_path / "b/lora/checkpoint-1")
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path / "b", *lpips, "--resume_from_checkpoint", "latest"))
    assert_same(tmp_path / "b/lora/checkpoint-2", tmp_path / "a/lora/checkpoint-2")


def test_bf16_trains_fp32_weights(pipelines, uninterrupted, tmp_path):
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path, "--mixed_precision", "bf16", steps=3))
    mine, full = weights(tmp_path / "lora/checkpoint-3"), weights(uninterrupted / "checkpoint-3")
    assert mine.keys() == full.keys()
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in mine.values())
    assert any(not torch.equal(mine[name], full[name]) for name in mine)


def test_compiled_is_the_plain_run_under_the_same_names(pipelines, uninterrupted, tmp_path, compiled):
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path, "--torch_compile", steps=3))
    assert len(compiled) == 1
    assert_same(tmp_path / "lora" / "checkpoint-3", uninterrupted / "checkpoint-3", atol=2e-5, rtol=1e-3)


def test_every_trained_weight_moves(uninterrupted):
    before, after = (load_file(uninterrupted / f"checkpoint-{n}" / "lora.safetensors") for n in (3, 6))
    assert len(before) > 10
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_accumulation_is_the_large_batch(pipelines, uninterrupted, tmp_path):
    arguments = quick(pipelines, tmp_path, "--gradient_accumulation_steps", 4, "--batch_size", 1, steps=3)
    run_in_process(train_flash_lora, *arguments)
    assert_same(tmp_path / "lora" / "checkpoint-3", uninterrupted / "checkpoint-3", atol=2e-5, rtol=1e-3)


def test_cached_rollouts_are_the_same_targets_again(pipelines, tmp_path, monkeypatch):
    """A cycle of two steps computes two roll-outs, not six; a resumed run computes them again, alike."""
    computed = []

    def spy(*arguments):
        computed.append(1)
        return ddim_rollout(*arguments)

    monkeypatch.setattr(train_flash_lora, "ddim_rollout", spy)
    cached = ["--cache_rollouts", 2, "--checkpointing_steps", 3]
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path / "a", *cached, steps=6))
    assert len(computed) == 2
    shutil.copytree(tmp_path / "a/lora/checkpoint-3", tmp_path / "b/lora/checkpoint-3")
    resumed = quick(pipelines, tmp_path / "b", *cached, "--resume_from_checkpoint", "latest", steps=6)
    run_in_process(train_flash_lora, *resumed)
    assert_same(tmp_path / "b/lora/checkpoint-6", tmp_path / "a/lora/checkpoint-6")


def test_two_processes_are_one(pipelines, uninterrupted, tmp_path):
    launch(SCRIPT, *quick(pipelines, tmp_path, "--batch_size", 2, steps=3), processes=2)
    assert_same(tmp_path / "lora" / "checkpoint-3", uninterrupted / "checkpoint-3", atol=2e-5, rtol=1e-3)


def test_resume_is_the_uninterrupted_run_bit_for_bit(pipelines, uninterrupted, tmp_path):
    """From another folder's copy of checkpoint-3: what counts is on the disk."""
    shutil.copytree(uninterrupted / "checkpoint-3", tmp_path / "lora" / "checkpoint-3")
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path, "--resume_from_checkpoint", "latest", steps=6))
    assert_same(tmp_path / "lora" / "checkpoint-6", uninterrupted / "checkpoint-6")


@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9_and_resume_bit_for_bit(pipelines, uninterrupted, tmp_path, processes):
    arguments = quick(pipelines, tmp_path, "--batch_size", 4 // processes, "--checkpointing_steps", 3)
    checkpoint = tmp_path / "lora" / "checkpoint-3"
    kill_9_after(checkpoint, SCRIPT, *arguments, "--max_steps", 100000, processes=processes)
    launch(SCRIPT, *arguments, "--max_steps", 6, "--resume_from_checkpoint", "latest", processes=processes)
    resumed = tmp_path / "lora" / "checkpoint-6"
    if processes == 1:
        assert_same(resumed, uninterrupted / "checkpoint-6")
    else:
        whole = tmp_path / "whole"
        launch(SCRIPT, *quick(pipelines, whole, "--batch_size", 2, steps=6), processes=2)
        assert_same(resumed, whole / "lora" / "checkpoint-6")


def test_sigterm_saves_and_leaves_no_final(pipelines, tmp_path):
    command = launch_command(SCRIPT, *quick(pipelines, tmp_path, "--checkpointing_steps", 100000, steps=100000))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    for line in process.stdout:  # the progress bar's: a step is done
        if "loss=" in line:
            break
    os.killpg(process.pid, signal.SIGTERM)
    output = process.stdout.read()  # to its end: the launcher goes at once, the script after its save
    process.wait()
    found = checkpoints_in(tmp_path / "lora")
    assert len(found) == 1 and f"Stopped by a signal after step {found[0][0]};" in output, output[-2000:]
    assert "Traceback" not in output and not (tmp_path / "lora" / "final").exists(), output[-2000:]


def test_kill_9_while_saving_and_resume_bit_for_bit(pipelines, uninterrupted, tmp_path):
    arguments = quick(pipelines, tmp_path, "--checkpointing_steps", 3, steps=6)
    kill_9_while_saving(tmp_path, ".checkpoint-6.tmp", SCRIPT, *arguments)
    folder = tmp_path / "lora"
    assert [step for step, _ in checkpoints_in(folder)] == [3]
    torn = {path.name for path in (folder / ".checkpoint-6.tmp").iterdir()}
    assert "lora.safetensors" in torn and "optimizer.bin" not in torn
    run_in_process(train_flash_lora, *arguments, "--resume_from_checkpoint", "latest")
    assert_same(folder / "checkpoint-6", uninterrupted / "checkpoint-6")
    assert not list(folder.glob(".*.tmp"))


def test_a_torn_save_is_ignored_and_removed(pipelines, uninterrupted, tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(uninterrupted / "checkpoint-3", folder / "checkpoint-3")
    shutil.copytree(uninterrupted / "checkpoint-6", folder / ".checkpoint-6.tmp")
    (folder / ".checkpoint-6.tmp" / "state.json").unlink()
    shutil.copytree(folder / ".checkpoint-6.tmp", folder / "checkpoint-9")  # visible, but without its last file
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path, "--resume_from_checkpoint", "latest", steps=4))
    assert not list(folder.glob(".*.tmp")) and (folder / "checkpoint-4").is_dir()


def test_a_failing_save_leaves_the_older_checkpoint(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "checkpoint-3", tmp_path / "checkpoint-3")

    class Failing:
        is_main_process = True
        wait_for_everyone = staticmethod(lambda: None)

        @staticmethod
        def save_state(folder):
            (tmp_path / os.path.basename(folder) / "lora.safetensors").write_text("half")
            raise OSError("no space left on device")

    with pytest.raises(OSError):
        save_checkpoint(Failing, tmp_path, 6, {}, 4, 6, total_limit=1)
    assert [step for step, _ in checkpoints_in(tmp_path)] == [3]


def test_retention_keeps_the_newest(pipelines, tmp_path):
    arguments = quick(pipelines, tmp_path, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2, steps=4)
    run_in_process(train_flash_lora, *arguments)
    assert [step for step, _ in checkpoints_in(tmp_path / "lora")] == [3, 4]


def test_validation_leaves_training_bit_identical(pipelines, uninterrupted, tmp_path):
    run_in_process(
        train_flash_lora,
        *quick(
            pipelines,
            tmp_path,
            "--validation_prompts",
            "a red ring",
            "--validation_steps",
            1,
            "--num_validation_images",
            1,
            "--report_to",
            "tensorboard",
            steps=3,
        ),
    )
    assert_same(tmp_path / "lora" / "checkpoint-3", uninterrupted / "checkpoint-3")
    assert list((tmp_path / "lora" / "logs").rglob("events*"))


def test_a_longer_run_continues_and_another_run_is_refused(pipelines, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "checkpoint-3", tmp_path / "lora" / "checkpoint-3")
    with pytest.raises(CheckpointError, match="already holds a run"):
        run_in_process(train_flash_lora, *quick(pipelines, tmp_path, steps=6))
    for change in (["--seed", 1], ["--num_ddim_steps", 3], ["--batch_size", 2], ["--target", "next"]):
        with pytest.raises(CheckpointError, match=change[0].strip("-").replace("batch_size", "global batch size")):
            arguments = quick(pipelines, tmp_path, "--resume_from_checkpoint", "latest", *change)
            run_in_process(train_flash_lora, *arguments)
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path, "--overwrite_output_dir", steps=1))
    assert [step for step, _ in checkpoints_in(tmp_path / "lora")] == [1]


@pytest.mark.parametrize("lr_scheduler", ["linear", "constant"])
def test_another_length_of_a_schedule_is_said(pipelines, tmp_path, capsys, lr_scheduler):
    schedule = ["--lr_scheduler", lr_scheduler]
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path, *schedule, steps=1))
    state = tmp_path / "lora/checkpoint-1/state.json"
    assert read_json(state)["max_train_steps"] == 1 and "warning" not in capsys.readouterr().out
    schedule += ["--resume_from_checkpoint", "latest"]
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path, *schedule, steps=2))
    said = "warning: --lr_scheduler linear was planned for 1 steps and now ends at 2"
    assert capsys.readouterr().out.count(said) == (lr_scheduler == "linear")
    state = tmp_path / "lora/checkpoint-2/state.json"
    older = {key: value for key, value in read_json(state).items() if key != "max_train_steps"}
    state.write_text(json.dumps(older))  # as written before the length was: it resumes, without a warning
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path, *schedule, steps=3))
    assert (tmp_path / "lora/checkpoint-3").is_dir() and "warning" not in capsys.readouterr().out


# The output

STOCK = """
import sys, torch
from diffusers import DiffusionPipeline, LCMScheduler
base, final, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, safety_checker=None)
pipe.set_progress_bar_config(disable=True)
def images(): return pipe(["a red ring"], num_inference_steps=4, guidance_scale=1, height=32, width=32,
                          generator=torch.Generator().manual_seed(0), output_type="pt").images
pipe.scheduler = LCMScheduler.from_pretrained(final, subfolder="scheduler")
base = images()
pipe.load_lora_weights(final)
torch.save({"base": base, "student": images()}, out)
"""


def test_final_in_stock_diffusers_is_the_student_in_memory(pipelines, uninterrupted, tmp_path):
    subprocess.run(
        [sys.executable, "-c", STOCK, pipelines(), uninterrupted / "final", tmp_path / "images.pt"],
        check=True,
        cwd=tmp_path,
    )
    stock = torch.load(tmp_path / "images.pt", weights_only=True)
    pipeline = load_pipeline(pipelines())
    pipeline.unet.add_adapter(LoraConfig(r=4, lora_alpha=32, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    ema = load_file(uninterrupted / "checkpoint-6" / "lora_ema.safetensors")
    pipeline.unet.load_state_dict({**pipeline.unet.state_dict(), **ema})
    pipeline.scheduler = student_scheduler(pipeline.scheduler, "x0", 4)
    mine = images_in_memory(pipeline, 4, guidance_scale=1)
    torch.testing.assert_close(stock["student"], mine, atol=1e-6, rtol=0)
    assert (stock["student"] - stock["base"]).abs().max() > 1e-3


def test_final_folder_and_checkpoint_size(uninterrupted):
    final = uninterrupted / "final"
    names = {path.name for path in final.iterdir()}
    assert names == {"pytorch_lora_weights.safetensors", "scheduler", "distillation.json", "README.md"}
    card = (final / "README.md").read_text()
    assert "load_lora_weights" in card and "rank 4, alpha 32" in card
    size = sum(path.stat().st_size for path in (uninterrupted / "checkpoint-6").rglob("*"))
    lora = (uninterrupted / "checkpoint-6" / "lora.safetensors").stat().st_size
    # Weights, average and two Adam moments, beside small files: no base model.
    assert size < 4 * lora + 200_000, (size, lora)
    names = {path.name for path in (uninterrupted / "checkpoint-6").iterdir()}
    assert names == {"lora.safetensors", "lora_ema.safetensors", "optimizer.bin", "state.json"}  # one pickle, needed


def test_copied_out_it_trains(pipelines, tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    launch(tmp_path / "train_flash_lora.py", *quick(pipelines, tmp_path / "out"), cwd=tmp_path)
    assert (tmp_path / "out" / "lora" / "final" / "pytorch_lora_weights.safetensors").is_file()


# On a GPU


@pytest.mark.gpu
def test_fp16_trains_and_resumes(pipelines, tmp_path, gpu):
    fp16 = ["--mixed_precision", "fp16"]
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path, *fp16))
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path, *fp16, "--resume_from_checkpoint", "latest", steps=4))
    for step in (2, 4):
        tensors = weights(tmp_path / "lora" / f"checkpoint-{step}")
        assert all(value.isfinite().all() for value in tensors.values())
        assert all(value.dtype == torch.float32 for name, value in tensors.items() if "lora" in name)


@pytest.mark.gpu
def test_8bit_adam_trains(pipelines, tmp_path, gpu):
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path, "--use_8bit_adam"))
    assert all(value.isfinite().all() for value in load_file(tmp_path / "lora/checkpoint-2/lora.safetensors").values())


@pytest.mark.gpu
def test_compiled_on_a_gpu_keeps_the_names(pipelines, uninterrupted, tmp_path, gpu):
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path, "--torch_compile"))
    compiled = load_file(tmp_path / "lora/checkpoint-2/lora.safetensors")
    assert compiled.keys() == load_file(uninterrupted / "checkpoint-3" / "lora.safetensors").keys()
    assert all(value.isfinite().all() for value in compiled.values())
