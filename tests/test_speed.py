"""What makes a run faster or smaller leaves what it computes as it was; and what a run says of its time."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import run_in_process
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from launching import SHAPES, assert_same, error_of, flags, quick
from safetensors.torch import load_file

import train_flash_lora
import train_guided
import train_lcm
from common.arguments import ByModel
from common.conditioning import encode_prompts
from common.contract import read_distillation
from common.diffusion import NoiseSchedule, ddim_rollout, teacher_timesteps
from common.ema import EMA
from common.lora import add_lora, student_unet, trainable, without_adapters
from common.pipelines import load_pipeline
from common.timing import PHASES

WIDE = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "conv2", "downsamplers.0.conv", "proj_in"]


# What is said


@pytest.fixture
def logged(monkeypatch):
    """What a run gives its trackers: [(step, values)]."""
    lines = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step=None, **_: lines.append((step, values)))
    return lines


def test_every_report_says_where_the_time_went(pipelines, tmp_path, logged):
    run_in_process(train_guided, *flags(pipelines, "train_guided", tmp_path, steps=3))
    assert [step for step, _ in logged] == [1, 2, 3]
    for step, values in logged:
        seconds = [values[f"seconds_{phase}"] for phase in PHASES]
        assert all(taken > 0 for taken in seconds)
        assert values["samples_per_second"] == pytest.approx(4 / sum(seconds))
        assert values["seconds_left"] == pytest.approx((3 - step) * sum(seconds))
        assert values["peak_memory_gb"] > 0.1


def test_a_report_is_the_mean_of_the_steps_since_the_last_one(pipelines, tmp_path, logged):
    """After the first step, every --logging_steps and after the last one."""
    line = flags(pipelines, "train_guided", tmp_path / "each", steps=7)
    run_in_process(train_guided, *line)
    losses = [values["loss"] for _, values in logged]
    logged.clear()
    run_in_process(train_guided, *flags(pipelines, "train_guided", tmp_path / "few", "--logging_steps", 3, steps=7))
    assert [step for step, _ in logged] == [1, 3, 6, 7]
    means = [losses[0], sum(losses[1:3]) / 2, sum(losses[3:6]) / 3, losses[6]]
    assert [values["loss"] for _, values in logged] == pytest.approx(means, rel=1e-5)
    assert_same("train_guided", tmp_path / "each", tmp_path / "few", step=6)


def test_a_profile_is_written(pipelines, tmp_path):
    run_in_process(train_guided, *flags(pipelines, "train_guided", tmp_path, "--profile_steps", 2, 3))
    trace = json.loads((tmp_path / "profile-2-3.json").read_text())
    assert len(trace["traceEvents"]) > 1000


# Averages


def test_an_average_counts_what_is_taken_and_is_lent_not_copied():
    weights = {"a": torch.nn.Parameter(torch.ones(3)), "b": torch.nn.Parameter(torch.zeros(2, 2))}
    ema, plain = EMA(weights, 0.9), EMA(weights, 0.9)
    for step in range(5):
        weights["a"].data.fill_(step)
        taken = torch.tensor(step != 2)
        ema.step(weights, taken)
        if step != 2:
            plain.step(weights)
        assert torch.equal(ema.shadow["a"], plain.shadow["a"]) and ema.updates == plain.updates
    assert plain.updates == 4
    own = weights["a"].data
    with ema.applied(weights):
        assert weights["a"].data_ptr() == ema.shadow["a"].data_ptr()
    assert weights["a"].data is not ema.shadow["a"] and weights["a"].data_ptr() == own.data_ptr()


def test_an_average_in_the_cpus_memory_is_the_same(pipelines, tmp_path):
    run_in_process(train_guided, *flags(pipelines, "train_guided", tmp_path / "a"))
    run_in_process(train_guided, *flags(pipelines, "train_guided", tmp_path / "b", "--offload_ema"))
    assert_same("train_guided", tmp_path / "a", tmp_path / "b")


# Adapters


def forward(unet):
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(1))
    return unet(z, torch.tensor([999, 5]), text).sample


def test_wide_adapters_are_folded_into_their_layers():
    from conftest import random_pipeline

    unet = random_pipeline("sd").unet.requires_grad_(False)
    plain = forward(unet)
    add_lora(unet, SimpleNamespace(lora_rank=8, lora_alpha=8.0, lora_targets=WIDE))
    for number, parameter in enumerate(trainable(unet).values()):
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(number))
    folded = [module for module in unet.modules() if "forward" in vars(module)]
    assert len(folded) > 20
    output = forward(unet)
    output.square().mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in trainable(unet).items()}
    with without_adapters(unet):
        assert torch.equal(forward(unet), plain)
    for module in folded:
        del module.forward
    for parameter in trainable(unet).values():
        parameter.grad = None
    expected = forward(unet)
    expected.square().mean().backward()
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    assert (output - plain).abs().max() > 0.1
    for name, parameter in trainable(unet).items():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3)


def test_narrow_adapters_and_half_precision_are_left_alone():
    from conftest import random_pipeline

    for rank, dtype in ((1, torch.float32), (8, torch.bfloat16)):
        unet = random_pipeline("sd").unet.requires_grad_(False).to(dtype)
        add_lora(unet, SimpleNamespace(lora_rank=rank, lora_alpha=8.0, lora_targets=["conv1", "conv2"]))
        assert not [module for module in unet.modules() if "forward" in vars(module)]


def test_a_lora_on_int8_weights_trains_and_is_saved_as_any(pipelines, tmp_path):
    """Of all layers but adapted convolutions; the teacher, its adapters off, is the rounded one."""
    lora = ["--lora_rank", 2, "--lora_targets", "to_q", "conv1"]
    line = flags(pipelines, "train_flash_lora", tmp_path / "a", *lora)
    run_in_process(train_flash_lora, *line)
    line[line.index(tmp_path / "a")] = tmp_path / "b"
    run_in_process(train_flash_lora, *line, "--quantize_frozen", "int8")
    a, b = (load_file(tmp_path / name / "lora/final/pytorch_lora_weights.safetensors") for name in "ab")
    assert a.keys() == b.keys() and any(not torch.equal(a[name], b[name]) for name in a)
    pipeline = load_pipeline(pipelines())
    before = sum(p.numel() for p in pipeline.unet.parameters())
    args = SimpleNamespace(lora_rank=2, lora_alpha=8.0, lora_targets=["to_q", "conv1"], quantize_frozen="int8")
    unet = student_unet(args, pipeline)
    kinds = {name: type(parameter.data).__name__ for name, parameter in unet.named_parameters()}
    rounded = [name for name, kind in kinds.items() if kind != "Tensor"]
    assert sum(unet.get_parameter(name).numel() for name in rounded) > before / 4
    assert any("conv2" in name for name in rounded) and not any("conv1" in name for name in rounded)
    assert (forward(unet) - forward(load_pipeline(pipelines()).unet)).abs().max() < 0.1


def test_int8_is_about_a_lora(pipelines, tmp_path, capsys):
    line = flags(pipelines, "train_guided", tmp_path, "--quantize_frozen", "int8")
    assert "--quantize_frozen" in error_of(train_guided, line, capsys)


def test_channels_last_is_within_rounding(pipelines, tmp_path):
    for name, more in (("a", []), ("b", ["--channels_last"])):
        run_in_process(train_lcm, *flags(pipelines, "train_lcm", tmp_path / name, *more))
    assert_same("train_lcm", tmp_path / "a", tmp_path / "b", atol=1e-4, rtol=1e-2)


# The teacher


def trailing(kind, **more):
    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
    }
    return kind(**schedule, timestep_spacing="trailing", **more)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_second_order_solver_is_diffusers(prediction_type):
    scheduler = trailing(
        DPMSolverMultistepScheduler, prediction_type=prediction_type, final_sigmas_type="zero", solver_order=2
    )
    schedule = NoiseSchedule(trailing(DDIMScheduler, prediction_type=prediction_type))
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def model(z, timesteps, rows=None):
        return z.tanh() * (0.5 + timesteps.view(-1, 1, 1, 1) / 1000)

    scheduler.set_timesteps(8)
    expected = z
    for t in scheduler.timesteps:
        expected = scheduler.step(model(expected, t.expand(2)), t, expected).prev_sample
    times = torch.tensor([999, 999])
    found = ddim_rollout(model, schedule, z, times, torch.full_like(times, -1), 8, solver="dpmsolver++")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    first_order = ddim_rollout(model, schedule, z, times, torch.full_like(times, -1), 8)
    assert (first_order - expected).abs().max() > 1e-3


def test_steps_in_proportion_to_the_timestep():
    starts = torch.tensor([999, 749, 499, 249, 3])
    grid = teacher_timesteps(starts, torch.full_like(starts, -1), 16, proportional_to=1000)
    assert ((grid.diff(dim=0) < 0).sum(0)).tolist() == [16, 12, 8, 4, 1]
    assert torch.equal(grid[0], starts) and set(grid[-1].tolist()) == {-1}
    assert grid[:, 3].tolist() == [249] * 13 + [187, 124, 61, -1]


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++"])
def test_only_samples_that_move_are_computed(solver):
    """A batch in proportion is every sample by itself, and no pass has a sample that stays."""
    schedule, seen = NoiseSchedule(trailing(DDIMScheduler)), []

    def model(z, timesteps, rows=None):
        seen.append(len(z))
        return z.tanh() * (0.5 + timesteps.view(-1, 1, 1, 1) / 1000)

    starts = torch.tensor([249, 999, 499])
    ends = torch.full_like(starts, -1)
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    together = ddim_rollout(model, schedule, z, starts, ends, 8, True, solver)
    assert seen == [1] * 4 + [2] * 2 + [3] * 2
    for row in range(3):
        k = (2, 8, 4)[row]
        alone = ddim_rollout(model, schedule, z[row : row + 1], starts[row : row + 1], ends[:1], k, solver=solver)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_a_caption_is_encoded_once(pipelines, monkeypatch):
    for kind in ("sd", "sdxl"):
        pipeline, asked = load_pipeline(pipelines(kind)), []
        encode = type(pipeline).encode_prompt

        def spy(self, prompt, *given, asked=asked, encode=encode, **more):
            asked.extend(prompt)
            return encode(self, prompt, *given, **more)

        monkeypatch.setattr(type(pipeline), "encode_prompt", spy)
        found = encode_prompts(pipeline, ["a ring", "a cross", "a ring"], 32)
        assert asked == ["a ring", "a cross"]
        assert torch.equal(found.prompt_embeds[0], found.prompt_embeds[2])
        assert not torch.equal(found.prompt_embeds[0], found.prompt_embeds[1])


# Defaults


def test_defaults_are_those_of_the_model(pipelines, tmp_path, monkeypatch):
    """By the size of its images, from config files alone."""
    import common.settle as settling

    def settled(module, native, *more):
        monkeypatch.setattr(settling, "read_pipeline_config", lambda *_, **__: (None, native, 8))
        monkeypatch.setattr(settling, "check_weights", lambda *_: None)
        line = ["--pretrained_model_name_or_path", pipelines(), *SHAPES, *more]
        args = module.parse_args(line)
        settling.settle(args)
        return args.learning_rate, args.train_batch_size, args.dataloader_num_workers

    assert settled(train_flash_lora, 32) == (1e-3, 32, 0)
    assert settled(train_flash_lora, 512) == (1e-4, 4, 4)
    assert settled(train_lcm, 512) == (1e-5, 4, 4)
    assert settled(train_lcm, 1024, "--lora_rank", "4") == (1e-4, 4, 4)
    assert settled(train_flash_lora, 512, "--learning_rate", "0.5", "--batch_size", "3") == (0.5, 3, 4)
    assert str(ByModel(1e-3, 1e-4)) == "0.001 for tiny-sd and the like, else 0.0001"


def test_an_sdxl_teacher_is_guided_at_its_own_scale(pipelines):
    assert read_distillation(pipelines("sdxl"))["guidance_scale"] == 5
    assert read_distillation(pipelines("sd"))["guidance_scale"] == 7.5


PRECISIONS = {"bf16": True, "no": False}


@pytest.mark.parametrize("case", PRECISIONS)
def test_bf16_is_warned_of(pipelines, tmp_path, capsys, case):
    line = quick(pipelines, tmp_path, "--lora_rank", 2, "--mixed_precision", case, steps=1)
    run_in_process(train_lcm, *line)
    assert ("in bf16 a prediction of the noise is too coarse" in capsys.readouterr().out) == PRECISIONS[case]
