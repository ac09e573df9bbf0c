"""train_flash_lora.py: its loss, its draws, the contract of sampling, and what it refuses."""

import copy
import shlex
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, launch, random_pipeline
from contract import assert_contract
from diffusers import UNet2DConditionModel
from launching import SHAPES, assert_every_flag_has_help, error_of, quick
from peft import LoraConfig

import train_flash_lora
from common.conditioning import encode_empty_prompt, encode_prompts, predict, predict_guided
from common.diffusion import NoiseSchedule
from common.schedulers import student_scheduler
from train_flash_lora import decoded_lpips, draw, flash_loss

SCRIPT = ROOT / "train_flash_lora.py"

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


# The recipe


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
    data = [] if "--data_dir" in wrong else SHAPES
    error = error_of(train_flash_lora, quick(pipelines, tmp_path / "out", *wrong, data=data), capsys)
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
    error = error_of(train_flash_lora, quick(pipelines, tmp_path, *flag), capsys)
    assert error.startswith("error: --mixed_precision fp16") and error.count("\n") == 1


def test_a_model_without_data_is_refused(pipelines, tmp_path):
    result = launch(SCRIPT, "--pretrained_model_name_or_path", pipelines(), "--output_dir", tmp_path, check=False)
    assert result.returncode != 0 and "--dataset_name shapes" in result.stdout
    assert "Traceback" not in result.stdout.split("error:")[0]  # what follows is the launcher's own


@pytest.mark.parametrize("wrong", [["--max_steps", "0"], ["--learning_rate", "-1"], ["--seed", "-1"], ["--x"]])
def test_argparse_refuses(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        train_flash_lora.parse_args(wrong)
    assert stop.value.code == 2 and "error" in capsys.readouterr().err


def test_every_flag_has_help(monkeypatch):
    assert_every_flag_has_help(train_flash_lora, monkeypatch)
