"""train_flash_lora.py: its loss, its draws, its teacher, what it trains and keeps, and what it refuses."""

import copy
import json
import shlex
import shutil
from functools import partial
from types import SimpleNamespace

import launching
import pytest
import torch
from conftest import ROOT, launch, random_pipeline, read_json, run_in_process, save_random_vgg16
from contract import assert_contract
from diffusers import UNet2DConditionModel
from launching import assert_same_checkpoints, checkpoint_tensors, error_of
from safetensors.torch import load_file

import train_flash_lora
from common.checkpoint import checkpoints_in, save_checkpoint
from common.conditioning import encode_empty_prompt, encode_prompts, predict, predict_guided
from common.diffusion import NoiseSchedule, ddim_rollout
from common.errors import CheckpointError
from common.judging import metrics
from common.lora import add_lora, settle_lora
from common.pipelines import load_pipeline
from common.schedulers import student_scheduler
from train_flash_lora import draw, flash_loss, teach

SCRIPT = ROOT / "train_flash_lora.py"
weights = partial(checkpoint_tensors, name="student")
assert_same = partial(assert_same_checkpoints, name="student")


def quick(pipelines, folder, *more, **options):
    return launching.quick(pipelines, folder, "--num_ddim_steps", 2, *more, **options)


@pytest.fixture(scope="module")
def trained(pipelines, tmp_path_factory):
    """A run of four steps that keeps its two newest checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    kept = ["--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    run_in_process(train_flash_lora, *quick(pipelines, folder, *kept, steps=4))
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
def test_the_teacher_is_a_frozen_copy_bit_for_bit(kind):
    """What `teach` says of a UNet with adapters is what it says of the one without; afterwards they are on again."""
    pipeline = random_pipeline(kind)
    unet, frozen = pipeline.unet.requires_grad_(False), copy.deepcopy(pipeline.unet)
    add_lora(unet, SimpleNamespace(lora_rank=4, lora_alpha=32.0, lora_targets=["to_q", "to_k", "to_v", "to_out.0"]))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    conditioning = encode_prompts(pipeline, ["a small red circle on a white background", ""], 32)
    schedule, z = NoiseSchedule(pipeline.scheduler), torch.randn(2, 4, 8, 8)
    t, ends = torch.tensor([999, 249]), torch.tensor([249, -1])
    args = SimpleNamespace(num_ddim_steps=2, teacher_steps="even", solver="ddim")
    given = (conditioning, encode_empty_prompt(pipeline, 32), 4.0)
    taught = teach(args, unet, schedule, z, t, ends, *given)
    assert torch.equal(taught, teach(args, frozen, schedule, z, t, ends, *given)) and not taught.requires_grad
    with torch.no_grad():
        assert not torch.equal(predict(unet, z, t, conditioning), predict(frozen, z, t, conditioning))


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
    more = ["--target", target, "--loss", loss, "--gradient_checkpointing"]
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path, *more, kind=kind))
    final = tmp_path / "lora" / "final"
    contract = read_json(final / "distillation.json")
    assert contract["target"] == target and contract["steps"] == 4 and contract["timesteps"] == [999, 749, 499, 249]
    pipeline = load_pipeline(pipelines(kind))
    pipeline.load_lora_weights(final)
    saved = student_scheduler(pipeline.scheduler, target, 4).__class__.from_pretrained(final, subfolder="scheduler")
    assert_contract(pipeline, saved, contract, 4)


def test_lpips_on_crops_trains_and_resumes_bit_for_bit(pipelines, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "LPIPS_CROP", 4)
    save_random_vgg16(tmp_path / "vgg16.safetensors")
    lpips = ["--loss", "lpips", "--lpips_trunk_path", tmp_path / "vgg16.safetensors", "--checkpointing_steps", 1]
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path / "a", *lpips))
    one, two = (weights(tmp_path / "a/lora" / f"checkpoint-{n}") for n in (1, 2))
    assert all(value.isfinite().all() for value in two.values())
    assert not torch.equal(*(tensors[next(name for name in one if "lora_B" in name)] for tensors in (one, two)))
    shutil.copytree(tmp_path / "a/lora/checkpoint-1", tmp_path / "b/lora/checkpoint-1")
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path / "b", *lpips, "--resume_from_checkpoint", "latest"))
    assert_same(tmp_path / "b/lora/checkpoint-2", tmp_path / "a/lora/checkpoint-2")


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


def test_every_trained_weight_moves_and_the_newest_checkpoints_stay(trained):
    assert [step for step, _ in checkpoints_in(trained)] == [3, 4]
    before, after = (load_file(trained / f"checkpoint-{n}" / "student.safetensors") for n in (3, 4))
    assert len(before) > 10
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_failing_save_leaves_the_older_checkpoint(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "state.json").write_text("{}")

    class Failing:
        is_main_process = True
        wait_for_everyone = staticmethod(lambda: None)

        @staticmethod
        def save_state(folder):
            raise OSError("no space left on device")

    with pytest.raises(CheckpointError, match="checkpoint-6 can't be written into .*no space left on device"):
        save_checkpoint(Failing, tmp_path, 6, Failing.save_state, {}, total_limit=1)
    assert [step for step, _ in checkpoints_in(tmp_path)] == [3] and not list(tmp_path.glob(".*.tmp"))


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


def test_copied_out_it_trains(pipelines, tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    launch(tmp_path / "train_flash_lora.py", *quick(pipelines, tmp_path / "out"), cwd=tmp_path)
    assert (tmp_path / "out" / "lora" / "final" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.gpu
def test_compiled_on_a_gpu_keeps_the_names(pipelines, trained, tmp_path, gpu):
    run_in_process(train_flash_lora, *quick(pipelines, tmp_path, "--torch_compile"))
    compiled = load_file(tmp_path / "lora/checkpoint-2/student.safetensors")
    assert compiled.keys() == load_file(trained / "checkpoint-3" / "student.safetensors").keys()
    assert all(value.isfinite().all() for value in compiled.values())


# The output


def test_final_folder_and_checkpoint_size(trained):
    final = trained / "final"
    names = {path.name for path in final.iterdir()}
    beside = {"scheduler", "distillation.json", "README.md", "comfyui_workflow.json"}
    assert names == {"pytorch_lora_weights.safetensors", *beside}
    card = (final / "README.md").read_text()
    assert "load_lora_weights" in card and "rank 4, alpha 32" in card
    assert "flash: 2 DDIM steps, guided at 7.5, in one" in card and "x0, huber" in card
    size = sum(path.stat().st_size for path in (trained / "checkpoint-4").rglob("*"))
    lora = (trained / "checkpoint-4" / "student.safetensors").stat().st_size
    # Weights, average and two Adam moments, beside small files: no base model.
    assert size < 4 * lora + 200_000, (size, lora)
    names = {path.name for path in (trained / "checkpoint-4").iterdir()}
    assert names == {"student.safetensors", "student_ema.safetensors", "optimizer.bin", "state.json"}  # one pickle


def test_sd15_checkpoint_stays_under_100_mb():
    """LoRA, its average and AdamW's two moments of the recipe, in fp32; on the meta device, so nothing is computed."""
    recipe = (ROOT / "recipes" / "sd15_flash_lora.sh").read_text().replace("\\\n", " ")
    words = shlex.split(recipe.split(" train_flash_lora.py ")[1])
    args = train_flash_lora.parse_args(
        [word for word in words if not word.startswith("$")]
    )  # without "$@" and the like
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)  # SD1.5's config
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    settle_lora(args)
    add_lora(unet.requires_grad_(False), args)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert trained == 797_184 and 4 * 4 * trained < 100e6


# Mistakes

MISTAKES = [
    (["--loss_weighting", "snr", "--target", "next"], "--loss_weighting"),
    (["--timestep_probs", "0.5", "0.5"], "--timestep_probs has 2 numbers"),
    (["--lpips_trunk_path", "nowhere.pth"], "--lpips_trunk_path is given but --loss is not lpips"),
    (["--loss", "lpips", "--lpips_trunk_path", "nowhere.pth"], "--lpips_trunk_path nowhere.pth: there is no such"),
    (["--pretrained_model_name_or_path", "{baked}", "--guidance_scale", "3"], "--guidance_scale 3: its guidance is"),
]


@pytest.mark.parametrize("wrong, said", MISTAKES, ids=[" ".join(wrong) for wrong, _ in MISTAKES])
def test_mistakes_are_one_sentence(pipelines, tmp_path, capsys, wrong, said):
    baked = tmp_path / "baked"
    shutil.copytree(pipelines(), baked)
    (baked / "distillation.json").write_text(json.dumps({"guidance": "baked", "guidance_scale": 1.0}))
    wrong = [word.format(baked=baked) for word in wrong]
    error = error_of(train_flash_lora, quick(pipelines, tmp_path / "out", *wrong), capsys)
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_fp16_at_the_launch_without_a_gpu_is_one_sentence(pipelines, tmp_path, capsys, monkeypatch):
    """`accelerate launch --mixed_precision fp16` reaches the script through the environment alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    error = error_of(train_flash_lora, quick(pipelines, tmp_path), capsys)
    assert error.startswith("error: --mixed_precision fp16") and error.count("\n") == 1


REFUSED = [
    "--max_steps 0",
    "--learning_rate -1",
    "--seed -1",
    "--guidance_scale -1",
    "--num_inference_steps 2000",
    "--x",
]


@pytest.mark.parametrize("wrong", REFUSED)
def test_argparse_refuses(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        train_flash_lora.parse_args(wrong.split())
    assert stop.value.code == 2 and "error" in capsys.readouterr().err
