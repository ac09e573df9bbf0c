"""train_flash_lora.py: its loss, its promises about resume, accumulation and processes, and its output."""

import copy
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
import torchvision
from conftest import ROOT, environment, launch, launch_command, random_pipeline, read_json, run_in_process
from contract import assert_contract
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import train_flash_lora
from common.arguments import run_script
from common.checkpoint import CheckpointError, checkpoints_in, save_checkpoint
from common.diffusion import NoiseSchedule, ddim_rollout, student_scheduler
from common.models import encode_empty_prompt, encode_prompts, load_pipeline, predict, predict_guided
from train_flash_lora import decoded_lpips, draw, flash_loss

SCRIPT = ROOT / "train_flash_lora.py"
QUICK = ["--num_ddim_steps", 2, "--train_batch_size", 4, "--report_to", "none", "--dataset_name", "shapes"]
# Adam divides by the gradient's size: with its usual epsilon a rounding error in a tiny gradient would count in full.
QUICK += ["--resolution", 32, "--adam_epsilon", 1e-4]


def quick(pipelines, folder, *more, kind="sd", steps=2):
    model = ["--pretrained_model_name_or_path", pipelines(kind)]
    return [*QUICK, *model, "--output_dir", folder, "--max_steps", steps, *more]


def weights(folder):
    """All tensors of a checkpoint: LoRA, EMA and optimizer state."""
    tensors = {**load_file(folder / "lora.safetensors")}
    tensors.update({f"ema.{k}": v for k, v in load_file(folder / "lora_ema.safetensors").items()})
    state = torch.load(folder / "optimizer.bin", weights_only=True)["state"]
    tensors.update({f"optimizer.{i}.{k}": torch.as_tensor(v) for i, s in state.items() for k, v in s.items()})
    return tensors


def assert_same(a, b, **tolerance):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and len(a) > 10
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")
        else:
            assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def uninterrupted(pipelines, tmp_path_factory):
    """Six steps in one go, global batch 4, with a checkpoint every third."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_in_process(train_flash_lora, *quick(pipelines, folder, "--checkpointing_steps", 3, steps=6))
    return folder / "lora"


# The method


def test_flash_loss_is_zero_for_the_teachers_own_step():
    schedule = NoiseSchedule(random_pipeline("v").scheduler)
    z, output = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t, end = torch.tensor([999, 499, 249]), torch.tensor([-1, 249, -1])
    target = schedule.ddim_step(output, z, t, end)
    for loss in ("l2", "huber"):
        assert flash_loss(output, z, t, target, end, schedule, loss) == 0
        assert flash_loss(output + 0.1, z, t, target, end, schedule, loss) > 0
    lpips = lambda a, b: (a - b).abs().mean(dim=(1, 2, 3))  # noqa: E731
    assert flash_loss(output, z, t, target, end, schedule, "lpips", lpips=lpips) < 1e-4


def test_flash_loss_is_the_weighted_distance_of_clean_latents():
    schedule = NoiseSchedule(random_pipeline("sd").scheduler)
    z, output, target = (torch.randn(2, 4, 8, 8) for _ in range(3))
    t, end = torch.tensor([749, 249]), torch.tensor([-1, -1])
    error = ((schedule.to_x0(output, z, t) - target) ** 2).mean(dim=(1, 2, 3))
    snr = (schedule.alpha(t) / schedule.sigma(t)).flatten() ** 2
    torch.testing.assert_close(flash_loss(output, z, t, target, end, schedule), error.mean())
    torch.testing.assert_close(flash_loss(output, z, t, target, end, schedule, "l2", "snr"), (snr * error).mean())
    expected = (snr.clamp(min=1) * error).mean()
    torch.testing.assert_close(flash_loss(output, z, t, target, end, schedule, "l2", "truncated_snr"), expected)


def test_lpips_compares_the_same_random_crop_per_sample(monkeypatch):
    monkeypatch.setattr(train_flash_lora, "LPIPS_CROP", 4)
    vae, sizes = random_pipeline("sd").vae.requires_grad_(False), []

    def network(a, b):
        sizes.append(tuple(a.shape))
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    x0, target = torch.randn(4, 4, 8, 8, requires_grad=True), torch.randn(4, 4, 8, 8)
    distance = decoded_lpips(network, vae, x0, target, 0, 7, [0, 1, 2, 3])
    assert distance.shape == (4,) and sizes == [(4, 3, 16, 16)]
    distance.sum().backward()
    crops = (x0.grad != 0).any(dim=1).flatten(1)
    assert crops.sum(dim=1).tolist() == [16] * 4 and len(crops.unique(dim=0)) > 1
    assert decoded_lpips(network, vae, x0, x0, 0, 7, [0, 1, 2, 3]).abs().max() == 0
    other_rank = decoded_lpips(network, vae, x0[2:], target[2:], 0, 7, [2, 3])
    torch.testing.assert_close(other_rank, distance[2:])
    monkeypatch.setattr(train_flash_lora, "LPIPS_CROP", 32)
    decoded_lpips(network, vae, x0, target, 0, 7, [0, 1, 2, 3])
    assert sizes[-1] == (4, 3, 32, 32)


@pytest.mark.parametrize(
    "probs, shares", [(None, (0.25, 0.25, 0.25, 0.25)), ([4.0, 2.0, 1.0, 1.0], (0.5, 0.25, 0.125, 0.125))]
)
def test_timesteps_are_drawn_as_often_as_asked(probs, shares):
    args = SimpleNamespace(seed=0, timestep_probs=probs, num_inference_steps=4)
    noise, slots = draw(args, 7, range(2000), torch.zeros(2000, 1, 2, 2))
    torch.testing.assert_close(slots.bincount(minlength=4) / 2000, torch.tensor(shares), atol=0.04, rtol=0)
    again, same = draw(args, 7, range(1000, 1010), torch.zeros(10, 1, 2, 2))
    assert torch.equal(again, noise[1000:1010]) and torch.equal(same, slots[1000:1010])


@pytest.mark.parametrize("kind", ["sd", "v", "sdxl"])
def test_teacher_with_adapters_off_is_a_frozen_copy_bit_for_bit(kind):
    pipeline = random_pipeline(kind)
    frozen = copy.deepcopy(pipeline.unet)
    pipeline.unet.add_adapter(LoraConfig(r=4, lora_alpha=32, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 249])
    conditioning = encode_prompts(pipeline, ["a small red circle on a white background", ""], 32)
    unconditional = encode_empty_prompt(pipeline, 32)
    with torch.no_grad():
        pipeline.unet.disable_adapters()
        off = predict_guided(pipeline.unet, z, t, conditioning, unconditional, 4.0)
        pipeline.unet.enable_adapters()
        on = predict(pipeline.unet, z, t, conditioning)
        assert torch.equal(off, predict_guided(frozen, z, t, conditioning, unconditional, 4.0))
        assert not torch.equal(on, predict(frozen, z, t, conditioning))


def test_guidance_in_one_batch_is_two_calls():
    pipeline = random_pipeline("sd")
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 249])
    conditioning = encode_prompts(pipeline, ["a small red circle on a white background"] * 2, 32)
    empty = encode_empty_prompt(pipeline, 32)
    with torch.no_grad():
        given, without = predict(pipeline.unet, z, t, conditioning), predict(pipeline.unet, z, t, empty.expand(2))
        both = predict_guided(pipeline.unet, z, t, conditioning, empty, 4.0)
    torch.testing.assert_close(both, without + 4 * (given - without), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sd", "v", "sdxl"])
@pytest.mark.parametrize("target", ["x0", "next"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_contract_of_sampling(kind, target, steps):
    pipeline = random_pipeline(kind)
    pipeline.set_progress_bar_config(disable=True)
    scheduler = student_scheduler(pipeline.scheduler, target, steps)
    assert_contract(pipeline, scheduler, {"guidance": "baked", "guidance_scale": 1.0, "target": target}, steps)


def test_contract_of_a_guided_teacher():
    pipeline = random_pipeline("sd")
    pipeline.set_progress_bar_config(disable=True)
    scheduler = student_scheduler(pipeline.scheduler, "next", 4)
    assert_contract(pipeline, scheduler, {"guidance": "cfg", "guidance_scale": 3.0, "target": "next"}, 4)


# Training


@pytest.mark.parametrize("kind, target, loss", [("v", "next", "l2"), ("sdxl", "x0", "huber")])
def test_every_kind_of_model_trains_and_keeps_the_contract(pipelines, tmp_path, kind, target, loss):
    run_in_process(
        train_flash_lora, *quick(pipelines, tmp_path, "--target", target, "--loss", loss, "--gradient_checkpointing",
                                 "--export", "fp16", "--validation_prompts", "a ring", "--validation_steps", 2,
                                 "--num_validation_images", 1, kind=kind))  # fmt: skip
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
    torch.manual_seed(0)
    trunk = torchvision.models.vgg16(weights=None).features
    save_file({f"features.{k}": v for k, v in trunk.state_dict().items()}, tmp_path / "vgg16.safetensors")
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


def test_compiled_is_the_plain_run_under_the_same_names(pipelines, uninterrupted, tmp_path, monkeypatch):
    """Traced and differentiated by torch.compile, without Inductor, which takes minutes to generate its CPU code."""
    compiled, compile = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: compiled.append(compile(m, backend="aot_eager")))
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
    command = launch_command(SCRIPT, *arguments, "--max_steps", 100000, processes=processes)
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    wait_for(lambda: (tmp_path / "lora" / "checkpoint-3" / "state.json").is_file(), process)
    # torch's launcher gives each worker a session of its own, so killing the launcher's group would spare them.
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)
    process.wait()
    for _, later in checkpoints_in(tmp_path / "lora")[1:]:
        shutil.rmtree(later)  # it may have got further before the signal
    launch(SCRIPT, *arguments, "--max_steps", 6, "--resume_from_checkpoint", "latest", processes=processes)
    resumed = tmp_path / "lora" / "checkpoint-6"
    if processes == 1:
        assert_same(resumed, uninterrupted / "checkpoint-6")
    else:
        whole = tmp_path / "whole"
        launch(SCRIPT, *quick(pipelines, whole, "--batch_size", 2, steps=6), processes=2)
        assert_same(resumed, whole / "lora" / "checkpoint-6")


def wait_for(condition, process, seconds=240):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended by itself with {process.returncode}"
        assert time.time() < deadline, "the run did not get there in time"
        time.sleep(0.2)


def test_sigterm_saves_and_leaves_no_final(pipelines, tmp_path):
    command = launch_command(SCRIPT, *quick(pipelines, tmp_path, "--checkpointing_steps", 100000, steps=100000))
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    for line in process.stdout:  # the progress bar's: a step is done
        if "loss=" in line:
            break
    os.killpg(process.pid, signal.SIGTERM)
    output = process.stdout.read()  # to its end: the launcher goes at once, the script after its save
    process.wait()
    found = checkpoints_in(tmp_path / "lora")
    assert len(found) == 1 and f"Stopped by a signal after step {found[0][0]};" in output, output[-2000:]
    assert "Traceback" not in output and not (tmp_path / "lora" / "final").exists(), output[-2000:]


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


def test_kill_9_while_saving_and_resume_bit_for_bit(pipelines, uninterrupted, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED_WHILE_SAVING)
    arguments = quick(pipelines, tmp_path, "--checkpointing_steps", 3, steps=6)
    result = launch(tmp_path / "killed.py", SCRIPT, ".checkpoint-6.tmp", *arguments, check=False)
    folder = tmp_path / "lora"
    assert result.returncode != 0 and "SIGKILL" in result.stdout, result.stdout[-2000:]
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
        train_flash_lora, *quick(pipelines, tmp_path, "--validation_prompts", "a red ring", "--validation_steps", 1,
                                 "--num_validation_images", 1, "--report_to", "tensorboard", steps=3))  # fmt: skip
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
    subprocess.run([sys.executable, "-c", STOCK, pipelines(), uninterrupted / "final", tmp_path / "images.pt"],
                   check=True, cwd=tmp_path)  # fmt: skip
    stock = torch.load(tmp_path / "images.pt", weights_only=True)
    pipeline = load_pipeline(pipelines())
    pipeline.unet.add_adapter(LoraConfig(r=4, lora_alpha=32, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    ema = load_file(uninterrupted / "checkpoint-6" / "lora_ema.safetensors")
    pipeline.unet.load_state_dict({**pipeline.unet.state_dict(), **ema})
    pipeline.scheduler = student_scheduler(pipeline.scheduler, "x0", 4)
    mine = pipeline(["a red ring"], num_inference_steps=4, guidance_scale=1, height=32, width=32, output_type="pt",
                    generator=torch.Generator().manual_seed(0)).images  # fmt: skip
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


def test_sd15_checkpoint_stays_under_100_mb():
    """LoRA, its average and AdamW's two moments of the recipe, in fp32; on the meta device, so nothing is computed."""
    recipe = (ROOT / "recipes" / "sd15_flash_lora.sh").read_text().replace("\\\n", " ")
    args = train_flash_lora.parse_args(shlex.split(recipe.split(" train_flash_lora.py ")[1])[:-1])  # without "$@"
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)  # SD1.5's config
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=args.lora_targets))
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert trained == 797_184 and 4 * 4 * trained < 100e6


def test_copied_out_it_trains(pipelines, tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    launch(tmp_path / "train_flash_lora.py", *quick(pipelines, tmp_path / "out"), cwd=tmp_path)
    assert (tmp_path / "out" / "lora" / "final" / "pytorch_lora_weights.safetensors").is_file()


# Mistakes

MISTAKES = [
    (["--pretrained_model_name_or_path", "no/such/folder"], "--pretrained_model_name_or_path no/such/folder"),
    (["--pretrained_model_name_or_path", "{tmp}"], "model_index.json"),
    (["--loss_weighting", "snr", "--target", "next"], "--loss_weighting"),
    (["--timestep_probs", "0.5", "0.5"], "--timestep_probs has 2 numbers"),
    (["--lpips_trunk_path", "nowhere.pth"], "--lpips_trunk_path"),
    (["--loss", "lpips", "--lpips_trunk_path", "nowhere.pth"], "nowhere.pth"),
    (["--guidance_scale", "-1"], "--guidance_scale"),
    (["--num_inference_steps", "2000"], "--num_inference_steps"),
    (["--report_to", "no_such_tracker"], "--report_to"),
    (["--lora_targets", "no_such_layer"], "--lora_targets"),
    (["--resume_from_checkpoint", "checkpoint-7"], "checkpoint-7"),
    (["--data_dir", "nowhere"], "nowhere"),
    (["--output_dir", "{file}"], "--output_dir"),
    (["--resolution", "30"], "--resolution"),
]


@pytest.mark.parametrize("wrong, said", MISTAKES, ids=[" ".join(wrong) for wrong, _ in MISTAKES])
def test_mistakes_are_one_sentence(pipelines, tmp_path, capsys, wrong, said):
    (tmp_path / "file").write_text("")
    wrong = [word.format(tmp=tmp_path, file=tmp_path / "file") for word in wrong]
    arguments = quick(pipelines, tmp_path / "out")
    if "--data_dir" in wrong:
        arguments.remove("--dataset_name")
        arguments.remove("shapes")
    capsys.readouterr()  # the bars of the fixture that saved the pipeline
    with pytest.raises(SystemExit) as stop:
        run_script(run_in_process_with, train_flash_lora.parse_args([str(word) for word in [*arguments, *wrong]]))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("error: ") == 1 and "Traceback" not in error
    assert error.startswith("error: ") or said == "--lora_targets"  # that one needs the UNet: a bar stands before it


@pytest.mark.parametrize("from_launch", [False, True])
def test_fp16_without_a_gpu_is_one_sentence(pipelines, tmp_path, capsys, monkeypatch, from_launch):
    """`accelerate launch --mixed_precision fp16` reaches the script through the environment alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flag = ["--mixed_precision", "fp16"]
    if from_launch:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
        flag = []
    arguments = [str(word) for word in quick(pipelines, tmp_path, *flag)]
    capsys.readouterr()  # the bars of the fixture that saved the pipeline
    with pytest.raises(SystemExit):
        run_script(run_in_process_with, train_flash_lora.parse_args(arguments))
    error = capsys.readouterr().err
    assert error.startswith("error: --mixed_precision fp16") and error.count("\n") == 1


def run_in_process_with(args):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    train_flash_lora.main(args)


# On a GPU


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")  # conftest.py keeps every other test on the CPU


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


def test_a_model_without_data_is_refused(pipelines, tmp_path):
    result = launch(SCRIPT, "--pretrained_model_name_or_path", pipelines(), "--output_dir", tmp_path, check=False)
    assert result.returncode != 0 and "--dataset_name shapes" in result.stdout
    assert "Traceback" not in result.stdout.split("error:")[0]  # what follows is the launcher's own


@pytest.mark.parametrize("wrong", [["--max_steps", "0"], ["--learning_rate", "-1"], ["--seed", "-1"], ["--x"]])
def test_argparse_refuses(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        train_flash_lora.parse_args(wrong)
    assert stop.value.code == 2 and "error" in capsys.readouterr().err


def test_every_flag_has_help():
    """Every flag has help text: --help is the documentation."""
    parser_actions = []
    original = train_flash_lora.arguments.make_parser

    def spy(docstring):
        parser = original(docstring)
        parser_actions.append(parser)
        return parser

    train_flash_lora.arguments.make_parser = spy
    try:
        args = train_flash_lora.parse_args([])
    finally:
        train_flash_lora.arguments.make_parser = original
    assert all(action.help for action in parser_actions[0]._actions)
    json.dumps(vars(args))
