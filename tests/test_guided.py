"""train_guided.py: its loss, its draws, what a step computes, what it trains, its output and what it refuses."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import read_json, run_in_process
from contract import assert_contract
from diffusers import DDIMScheduler, UNet2DConditionModel
from launching import assert_same_checkpoints, error_of, images_in_memory, own_guidance, quick
from safetensors.torch import load_file

import inference
import train_guided
from common import shapes
from common.conditioning import (
    encode_empty_prompt,
    encode_images,
    encode_prompts,
    guidance_embedding,
    predict,
    predict_guided,
)
from common.contract import TINY_SD
from common.diffusion import NoiseSchedule
from common.outputs import open_output
from common.pipelines import load_pipeline, with_guidance_input
from common.schedulers import ddim_scheduler
from train_guided import draw, guided_loss

EMBED = ["--guidance", "embed"]
VARIANTS = {"fixed": ("v", ["--guidance_scale", 3]), "embed": ("sdxl", EMBED), "lora": ("sd", ["--lora_rank", 4])}
PROMPTS = ["a small red circle on a white background", "a large blue ring on a gray background"]


@pytest.fixture(scope="module")
def uninterrupted(pipelines, tmp_path_factory):
    """Four steps in one go with the scale an input, with a checkpoint every second."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_in_process(train_guided, *quick(pipelines, folder, *EMBED, "--checkpointing_steps", 2, steps=4))
    return folder


@pytest.fixture(scope="module")
def trained(pipelines, tmp_path_factory):
    """`trained(variant)`: a run of two large steps: its folder and what guided_loss and predict were called with."""
    made = {}

    def get(variant):
        if variant not in made:
            folder, losses, forwards = tmp_path_factory.mktemp(variant), [], []
            kind, more = VARIANTS[variant]
            more = [*more, "--learning_rate", 1e-2, "--gradient_checkpointing", "--export", "fp16"]
            more += ["--validation_prompts", "a ring", "--validation_steps", 2, "--num_validation_images", 1]

            def spy_loss(*arguments):
                losses.append([x.detach().clone() for x in arguments])
                return guided_loss(*arguments)

            def spy_predict(unet, *arguments):
                output = predict(unet, *arguments)
                forwards.append((arguments, output.detach().clone()))
                return output

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train_guided, "guided_loss", spy_loss)
                patch.setattr(train_guided, "predict", spy_predict)
                run_in_process(train_guided, *quick(pipelines, folder, *more, kind=kind))
            made[variant] = SimpleNamespace(folder=folder, losses=losses, forwards=forwards, kind=kind)
        return made[variant]

    return get


def embedding(pipeline, scale, unet, count=2):
    return guidance_embedding(pipeline, torch.full((count,), scale), unet)


# The method


def test_guided_loss_is_the_distance_from_two_pass_guidance(pipelines):
    ones = torch.ones(2, 4, 8, 8)
    assert guided_loss(5 * ones, 3 * ones, ones, torch.tensor([1.0, 4.0])) == ((5 - 3) ** 2 + (5 - 9) ** 2) / 2
    pipeline = load_pipeline(pipelines("v"))
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 249])
    given, empty = encode_prompts(pipeline, PROMPTS, 32), encode_empty_prompt(pipeline, 32)
    with torch.no_grad():
        guided = predict_guided(pipeline.unet, z, t, given, empty, 4.0)
        outputs = predict(pipeline.unet, z, t, given), predict(pipeline.unet, z, t, empty.expand(2))
    assert guided_loss(guided, *outputs, torch.tensor([4.0, 4.0])) < 1e-10
    assert guided_loss(outputs[0], *outputs, torch.tensor([1.0, 1.0])) < 1e-10


def test_draws_are_the_samples_own():
    args, latents = SimpleNamespace(seed=0, guidance_min=2.0, guidance_max=4.0), torch.zeros(1, 1, 2, 2)
    noise, timesteps, scales = draw(args, 7, range(4000), latents, range(1000))
    assert timesteps.min() == 0 and timesteps.max() == 999 and len(timesteps.unique()) > 950
    torch.testing.assert_close(timesteps.float().mean() / 1000, torch.tensor(0.5), atol=0.02, rtol=0)
    assert 2 <= scales.min() < 2.01 and 3.99 < scales.max() <= 4 and len(scales.unique()) > 3900
    for whole, part in zip((noise, timesteps, scales), draw(args, 7, range(1000, 1010), latents, range(1000))):
        assert torch.equal(whole[1000:1010], part)
    assert set(draw(args, 7, range(50), latents, [999, 499])[1].tolist()) == {999, 499}


@pytest.mark.parametrize("kind", ["sd", "v", "sdxl"])
def test_at_the_start_the_student_says_what_the_teacher_says_whatever_the_scale(pipelines, kind):
    pipeline = load_pipeline(pipelines(kind))
    student = with_guidance_input(pipeline.unet)
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 249])
    given = encode_prompts(pipeline, PROMPTS, 32)
    with torch.no_grad():
        teachers = predict(pipeline.unet, z, t, given)
        for scale in (1.0, 3.0, 7.5):
            assert torch.equal(predict(student, z, t, given, embedding(pipeline, scale, student)), teachers)


@torch.no_grad()
def test_after_training_the_student_is_nearer_to_two_pass_guidance(tmp_path):
    """On captions, images and noise of no training sample; at the start its error is that of no guidance."""
    more = [*EMBED, "--guidance_scale", 4, "--guidance_min", 3, "--guidance_max", 5]
    more += ["--learning_rate", 1e-4, "--ema_decay", 0.8]
    with torch.enable_grad():
        run_in_process(train_guided, *quick(lambda kind: TINY_SD, tmp_path, *more, "--train_batch_size", 8, steps=30))
    teacher, student = load_pipeline(TINY_SD), load_pipeline(tmp_path / "final")
    images = [torch.from_numpy(shapes.held_out_sample(i)[0]) for i in range(32)]
    pixels = torch.stack(images).permute(0, 3, 1, 2) / 127.5 - 1
    generator = torch.Generator().manual_seed(1)
    noise, t = torch.randn(32, 4, 8, 8, generator=generator), torch.randint(1000, (32,), generator=generator)
    z = NoiseSchedule(teacher.scheduler).add_noise(encode_images(teacher.vae, pixels), noise, t)
    given, empty = encode_prompts(teacher, shapes.held_out_captions()[:32], 32), encode_empty_prompt(teacher, 32)
    start = predict(teacher.unet, z, t, given)
    for scale in (3.0, 4.0, 5.0):
        guided = predict_guided(teacher.unet, z, t, given, empty, scale)
        output = predict(student.unet, z, t, given, embedding(student, scale, student.unet, 32))
        assert (output - guided).square().mean() < 0.8 * (start - guided).square().mean(), scale


# What a step computes


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_error_is_that_of_no_guidance_and_the_teacher_stays(pipelines, trained, variant):
    run = trained(variant)
    output, conditional, unconditional, scales = run.losses[0]
    torch.testing.assert_close(output, conditional, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(run.losses[1][0], run.losses[1][1], atol=1e-3)  # and then it learns
    assert (conditional - unconditional).abs().max() > 1e-3
    pipeline = load_pipeline(pipelines(run.kind))
    given_scales = [arguments[3] for arguments, output in run.forwards if len(output) == 4]
    if variant == "embed":
        assert len(scales.unique()) == 4 and 1 <= scales.min() and scales.max() <= 8
        assert torch.equal(given_scales[0], pipeline.get_guidance_scale_embedding(scales - 1, 256))
    else:
        assert scales.tolist() == [3.0 if variant == "fixed" else 7.5] * 4 and given_scales == [None, None]
    doubled = [(arguments, output) for arguments, output in run.forwards if len(output) == 8]
    assert len(doubled) == 2
    for arguments, output in doubled:  # of the second step too: the student's step has not moved the teacher
        with torch.no_grad():
            assert torch.equal(predict(pipeline.unet, *arguments), output)


def test_a_few_step_teachers_timesteps_are_the_students(pipelines, tmp_path, monkeypatch):
    teacher = tmp_path / "teacher"
    shutil.copytree(pipelines(), teacher)
    contract = {
        "method": "x",
        "parent": "y",
        "revision": "z",
        "variant": "fp16",
        "steps": 2,
        "timesteps": [999, 499],
        "guidance": "cfg",
        "guidance_scale": 4.0,
        "target": "next",
    }
    (teacher / "distillation.json").write_text(json.dumps(contract))
    seen = []

    def spy(*arguments):
        seen.append(draw(*arguments))
        return seen[-1]

    monkeypatch.setattr(train_guided, "draw", spy)
    arguments = quick(pipelines, tmp_path / "out", steps=2)
    arguments[arguments.index(pipelines())] = teacher
    run_in_process(train_guided, *arguments)
    assert {t for _, timesteps, _ in seen for t in timesteps.tolist()} == {999, 499}
    own = read_json(tmp_path / "out/final/distillation.json")
    made = {"method": "guided", "parent": str(teacher), "revision": None, "variant": None}
    assert own == {**contract, **made, "guidance": "baked", "guidance_scale": 1.0}
    pipeline = load_pipeline(tmp_path / "out/final")
    assert_contract(pipeline, pipeline.scheduler, own, 2)


# Training


def test_an_embedded_scale_is_trained_and_resumes_bit_for_bit(pipelines, uninterrupted, tmp_path):
    before, after = (load_file(uninterrupted / f"checkpoint-{n}" / "student.safetensors") for n in (2, 4))
    assert "time_embedding.cond_proj.weight" in before
    assert all(not torch.equal(before[name], after[name]) for name in before)
    shutil.copytree(uninterrupted / "checkpoint-2", tmp_path / "checkpoint-2")
    run_in_process(train_guided, *quick(pipelines, tmp_path, *EMBED, "--resume_from_checkpoint", "latest", steps=4))
    assert_same_checkpoints(tmp_path / "checkpoint-4", uninterrupted / "checkpoint-4", "student")


def test_bf16_rounds_nothing_that_is_saved(pipelines, tmp_path):
    run_in_process(train_guided, *quick(pipelines, tmp_path, *EMBED, "--mixed_precision", "bf16"))
    final = load_file(tmp_path / "final/unet/diffusion_pytorch_model.safetensors")
    assert all(value.dtype == torch.float32 for value in final.values())
    text = load_file(tmp_path / "final/text_encoder/model.safetensors")
    stored = load_pipeline(pipelines()).text_encoder.state_dict()
    assert all(torch.equal(stored[name], value) for name, value in text.items())


# The output


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_keeps_the_contract_in_one_pass_a_step(pipelines, trained, variant):
    run = trained(variant)
    pipeline, contract = open_output(run.folder / "final"), read_json(run.folder / "final/distillation.json")
    assert contract == {
        "method": "guided",
        "parent": pipelines(run.kind),
        "revision": None,
        "variant": None,
        "steps": None,
        "timesteps": None,
        "guidance": "embedded" if variant == "embed" else "baked",
        "guidance_scale": own_guidance(run.kind) if variant == "embed" else 1.0,
        "target": "next",
    }
    assert type(pipeline.scheduler) is DDIMScheduler and pipeline.scheduler.config.timestep_spacing == "trailing"
    scales, saved = (3.0, own_guidance(run.kind)) if variant == "embed" else (1.0,), pipeline.scheduler
    for steps in (1, 4, 8, 50):
        for scale in scales:
            scheduler = saved if steps == 50 else ddim_scheduler(saved, steps)
            assert_contract(pipeline, scheduler, {**contract, "guidance_scale": scale}, steps)
    batches = []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    for scale in scales:
        images_in_memory(pipeline, 3, scale)
    hook.remove()
    assert batches == [1, 1, 1] * len(scales)
    assert (run.folder / "samples" / "step-2.png").is_file()
    exported = load_pipeline(run.folder / "final-fp16", dtype=torch.float16)
    for name, value in pipeline.unet.state_dict().items():
        assert torch.equal(exported.unet.state_dict()[name], value.half()), name
    assert read_json(run.folder / "final-fp16/distillation.json") == contract


@pytest.mark.parametrize("kind", ["sd", "v", "sdxl"])
@torch.no_grad()
def test_contract_of_an_embedded_scale(pipelines, kind):
    """Where the layer that reads the scale is not near zero, as that of a new student is."""
    pipeline = load_pipeline(pipelines(kind))
    pipeline.unet = with_guidance_input(pipeline.unet)
    pipeline.unet.time_embedding.cond_proj.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    scheduler = ddim_scheduler(pipeline.scheduler, 4)
    for scale in (3.0, 7.5):
        contract = {"guidance": "embedded", "guidance_scale": scale, "target": "next"}
        assert_contract(pipeline, scheduler, contract, 4)
    with pytest.raises(AssertionError, match="roll-outs differ"):  # the scale is read at all
        assert_contract(pipeline, scheduler, {**contract, "guidance": "baked"}, 4)


@pytest.mark.parametrize("variant, scale", [("fixed", 1.0), ("embed", 5.0), ("lora", 1.0)])
def test_inference_samples_it_as_trained(trained, tmp_path, monkeypatch, variant, scale):
    final = trained(variant).folder / "final"  # before the spy, which must not see the training
    batches, forward = [], UNet2DConditionModel.forward

    def spy(unet, sample, *arguments, **options):
        batches.append((len(sample), options["timestep_cond"] is not None))
        return forward(unet, sample, *arguments, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    run_in_process(
        inference,
        "--lora_path" if variant == "lora" else "--pretrained_model_name_or_path",
        final,
        "--prompt",
        "a red ring",
        "--steps",
        2,
        "--clip_model",
        "none",
        "--reader",
        "none",
        "--output_dir",
        tmp_path,
    )
    found = read_json(tmp_path / "results.json")["configurations"]
    assert [(row["steps"], row["guidance_scale"], row["timesteps"]) for row in found] == [(2, scale, [999, 499])]
    assert set(batches) == {(1, variant == "embed")}


def test_final_folders(uninterrupted, trained):
    names = {path.name for path in (uninterrupted / "final").iterdir()}
    assert names == {
        "model_index.json",
        "unet",
        "vae",
        "text_encoder",
        "tokenizer",
        "scheduler",
        "distillation.json",
        "README.md",
    }
    card = (uninterrupted / "final/README.md").read_text()
    assert "num_inference_steps=50, guidance_scale=7.5" in card and "scales 1 to 8, an input" in card
    lora = trained("lora").folder / "final"
    names = {path.name for path in lora.iterdir()}
    assert names == {"pytorch_lora_weights.safetensors", "scheduler", "distillation.json", "README.md"}
    card = (lora / "README.md").read_text()
    assert "load_lora_weights" in card and "rank 4, alpha 32" in card and "guidance_scale=1)" in card


# Mistakes

MISTAKES = [
    (["--pretrained_model_name_or_path", "{baked}"], "baked into its weights already"),
    (["--guidance_scale", "1"], "--guidance_scale 1 is no guidance"),
    (["--guidance", "embed", "--lora_rank", "4"], "--lora_rank"),
    (["--lora_alpha", "4"], "add --lora_rank"),
    (["--guidance_max", "4"], "--guidance_max are about --guidance embed"),
    (["--guidance", "embed", "--guidance_min", "9"], "--guidance_min 9"),
    (["--guidance", "embed", "--guidance_max", "4"], "--guidance_scale 7.5"),
]


@pytest.mark.parametrize("wrong, said", MISTAKES, ids=[" ".join(wrong) for wrong, _ in MISTAKES])
def test_mistakes_are_one_sentence(pipelines, tmp_path, capsys, wrong, said):
    baked = tmp_path / "baked"
    shutil.copytree(pipelines(), baked)
    (baked / "distillation.json").write_text(json.dumps({"guidance": "baked", "guidance_scale": 1.0}))
    wrong = [word.format(baked=baked) for word in wrong]
    error = error_of(train_guided, quick(pipelines, tmp_path / "out", *wrong), capsys)
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("flag", ["--guidance_scale", "--guidance_min", "--guidance_max"])
def test_scales_are_numbers_from_0_on(capsys, flag):
    with pytest.raises(SystemExit):
        train_guided.parse_args([flag, "-1"])
    assert f"argument {flag}: -1 is not a number from 0 on" in capsys.readouterr().err
