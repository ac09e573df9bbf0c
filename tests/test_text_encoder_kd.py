"""train_text_encoder_kd.py: its loss, what the student keeps, what it carries over, its output."""

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, random_pipeline, read_json, run_in_process
from contract import assert_contract
from diffusers import DDIMScheduler, LCMScheduler
from launching import (
    QUICK,
    SHAPES,
    assert_same_checkpoints,
    error_of,
    fork_and_wait,
    images_in_memory,
    own_guidance,
    quick,
    stock_images,
)
from safetensors.torch import load_file

import train_text_encoder_kd
from common.conditioning import encode_prompts, predict
from common.contract import TINY_SD, write_distillation
from common.diffusion import NoiseSchedule
from common.errors import CheckpointError
from common.pipelines import load_pipeline
from common.schedulers import student_scheduler
from common.shapes import caption_of, training_scene
from common.text_encoders import (
    TextStates,
    fit_projection,
    kept_layers,
    most_important,
    shrink_text_encoder,
    student_in_place,
    tokenize,
    with_student,
)
from train_text_encoder_kd import draw, text_encoder_loss

SCRIPT = ROOT / "train_text_encoder_kd.py"
SMALL = ["--num_hidden_layers", 1, "--intermediate_size", 32, "--hidden_size", 16, "--through_unet"]
PROMPTS = ["a small red circle on a white background", ""]
assert_same = partial(assert_same_checkpoints, name="student")


@pytest.fixture(scope="module")
def uninterrupted(pipelines, tmp_path_factory):
    """Six steps of everything at once (fewer layers, narrower MLP and hidden size, through the UNet), batch 4."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    more = ["--checkpointing_steps", 3, "--export", "fp16"]
    run_in_process(train_text_encoder_kd, *quick(pipelines, folder, *SMALL, *more, steps=6))
    return folder


# The method


def test_loss_is_the_equation():
    hidden, teacher_hidden = torch.randn(2, 3, 5, 8)
    pooled, teacher_pooled = torch.randn(2, 3, 8)
    output, teacher_output = torch.randn(2, 3, 4, 2, 2)
    mse = torch.nn.functional.mse_loss
    errors = mse(hidden, teacher_hidden), mse(pooled, teacher_pooled), mse(output, teacher_output)
    plain = text_encoder_loss(hidden, pooled, None, teacher_hidden, teacher_pooled, None)
    assert plain.keys() == {"loss", "hidden_loss", "pooled_loss"}
    torch.testing.assert_close(plain["loss"], errors[0] + 0.5 * errors[1])
    through = text_encoder_loss(hidden, pooled, output, teacher_hidden, teacher_pooled, teacher_output, 0.25, 3.0)
    torch.testing.assert_close(through["loss"], errors[0] + 0.25 * errors[1] + 3 * errors[2])
    torch.testing.assert_close(through["unet_loss"], errors[2])


@pytest.mark.parametrize(
    "layers, kept",
    [
        ((3, 1), [0]),
        ((3, 2), [0, 2]),
        ((12, 6), [0, 2, 4, 7, 9, 11]),
        ((4, 4), [0, 1, 2, 3]),
        ((12, 6, True), [0, 2, 5, 8, 10, 11]),
        ((2, 2, True), [0, 1]),
    ],
)
def test_kept_layers_are_evenly_spaced(layers, kept):
    assert kept_layers(*layers) == kept


def test_kept_layers_never_repeat():
    for count in range(1, 34):
        for layers in range(1, count + 1):
            kept = kept_layers(count, layers)
            assert len(set(kept)) == layers and kept == sorted(kept) and kept[0] == 0 and kept[-1] < count


@pytest.mark.parametrize("kind, name", [("sd", "text_encoder"), ("sdxl", "text_encoder"), ("sdxl", "text_encoder_2")])
@torch.no_grad()
def test_with_nothing_removed_student_is_teacher(kind, name):
    """Zero loss against what the stock pipeline itself feeds its UNet."""
    pipeline = random_pipeline(kind)
    teacher, sdxl = getattr(pipeline, name), kind == "sdxl"
    encoder = shrink_text_encoder(teacher, 2, 64, 32, penultimate=sdxl)
    states = TextStates(encoder, sdxl)  # one caption at a time, as encode_prompts takes SDXL's on a CPU
    parts = zip(*(states(tokenize(pipeline.tokenizer, [prompt])) for prompt in PROMPTS))
    hidden, pooled = (torch.cat(part) for part in parts)
    stock = encode_prompts(pipeline, PROMPTS, 32)
    mine = with_student(stock, hidden, pooled, name)
    assert torch.equal(mine.prompt_embeds, stock.prompt_embeds)
    assert not sdxl or torch.equal(mine.pooled_prompt_embeds, stock.pooled_prompt_embeds)
    teacher_states = TextStates(teacher, sdxl)(tokenize(pipeline.tokenizer, PROMPTS))
    hidden, pooled = states(tokenize(pipeline.tokenizer, PROMPTS))
    assert text_encoder_loss(hidden, pooled, None, *teacher_states, None)["loss"] == 0


def test_a_narrower_mlp_keeps_the_most_important_neurons():
    teacher = random_pipeline("sd").text_encoder
    student = shrink_text_encoder(teacher, 2, 24, 32)
    for old, new in zip(teacher.encoder.layers, student.encoder.layers):
        importance = old.mlp.fc1.weight.abs().sum(1) + old.mlp.fc2.weight.abs().sum(0)
        kept = sorted(importance.argsort(descending=True)[:24].tolist())
        assert torch.equal(new.mlp.fc1.weight, old.mlp.fc1.weight[kept])
        assert torch.equal(new.mlp.fc2.weight, old.mlp.fc2.weight[:, kept])
        assert torch.equal(new.self_attn.q_proj.weight, old.self_attn.q_proj.weight)


def test_the_projection_is_the_least_squares_one():
    hidden, linear = torch.randn(4, 9, 6), torch.nn.Linear(6, 10)
    fitted = fit_projection(hidden, linear(hidden), ridge=0)
    torch.testing.assert_close(fitted.weight, linear.weight)
    torch.testing.assert_close(fitted.bias, linear.bias)
    normed = torch.nn.functional.layer_norm(torch.randn(4, 9, 6), (6,))  # its channels sum to zero
    fitted = fit_projection(normed, normed @ linear.weight.T)
    assert fitted.weight.abs().max() < 2 and (fitted(normed) - normed @ linear.weight.T).abs().max() < 0.01


@torch.no_grad()
def test_a_narrower_student_starts_nearer_than_by_naive_slicing(monkeypatch):
    pipeline = load_pipeline(TINY_SD)
    captions = [caption_of(training_scene(0, index)[0]) for index in range(32)]
    input_ids = tokenize(pipeline.tokenizer, captions)
    teacher = TextStates(pipeline.text_encoder)(input_ids)

    def loss():
        encoder = shrink_text_encoder(pipeline.text_encoder, 3, 192, 72)
        projection = fit_projection(TextStates(encoder)(input_ids)[0], teacher[0])
        student = TextStates(encoder, projection=projection)
        return text_encoder_loss(*student(input_ids), None, *teacher, None)["loss"].item()

    aligned = loss()
    naive = lambda importance, count: most_important(-torch.arange(importance.shape[-1]).expand_as(importance), count)  # noqa: E731, E501
    monkeypatch.setattr("common.text_encoders.most_important", naive)
    assert aligned < loss()


@pytest.mark.parametrize("kind, name", [("sd", "text_encoder"), ("sdxl", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_through_unet_reaches_the_encoder_and_not_the_unet(pipelines, kind, name):
    pipeline, sdxl = load_pipeline(pipelines(kind)), kind == "sdxl"
    encoder = shrink_text_encoder(getattr(pipeline, name), 2, 32, 32, penultimate=sdxl)
    student, teacher = TextStates(encoder, sdxl), encode_prompts(pipeline, PROMPTS, 32)
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 600])
    hidden, pooled = student(tokenize(pipeline.tokenizer, PROMPTS))
    output = predict(pipeline.unet, z, t, with_student(teacher, hidden, pooled, name))
    target = predict(pipeline.unet, z, t, teacher)
    text_encoder_loss(hidden, pooled, output, hidden, pooled, target, 0.5, 1.0)["loss"].backward()
    first = getattr(encoder, "text_model", encoder).encoder.layers[0]
    assert first.mlp.fc1.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in pipeline.unet.parameters())


def test_randomness_belongs_to_the_sample():
    schedule = NoiseSchedule(random_pipeline("sd").scheduler)
    args = SimpleNamespace(seed=0, caption_dropout=0.25, through_unet=True)
    dropped, noise, timesteps = draw(args, 7, range(1000), (4, 2, 2), schedule, "cpu")
    assert abs(sum(dropped) / 1000 - 0.25) < 0.04 and noise.shape == (1000, 4, 2, 2)
    assert timesteps.min() < 520 and 500 <= timesteps.min() and 980 < timesteps.max() <= 999
    again = draw(args, 7, range(500, 510), (4, 2, 2), schedule, "cpu")
    assert again[0] == dropped[500:510] and torch.equal(again[1], noise[500:510])
    without = draw(SimpleNamespace(**{**vars(args), "through_unet": False}), 7, range(1000), None, schedule, "cpu")
    assert without == (dropped, None, None)


# Training


@pytest.mark.parametrize(
    "kind, more",
    [
        ("v", ["--intermediate_size", 32, "--mixed_precision", "bf16"]),
        ("sdxl", ["--intermediate_size", 32, "--through_unet", "--unet_weight", 2]),
        ("sdxl", ["--text_encoder", "text_encoder_2", "--intermediate_size", 32]),
    ],
)
def test_every_kind_of_model_trains_and_keeps_the_contract(pipelines, tmp_path, kind, more):
    run_in_process(
        train_text_encoder_kd,
        *quick(
            pipelines,
            tmp_path,
            *more,
            "--gradient_checkpointing",
            "--validation_prompts",
            "a ring",
            "--validation_steps",
            2,
            "--num_validation_images",
            1,
            kind=kind,
        ),
    )
    contract = read_json(tmp_path / "final/distillation.json")
    assert contract == {
        "method": "text_encoder_kd",
        "parent": pipelines(kind),
        "revision": None,
        "variant": None,
        "steps": None,
        "timesteps": None,
        "guidance": "cfg",
        "guidance_scale": own_guidance(kind),
        "target": None,
    }
    pipeline, teacher = load_pipeline(tmp_path / "final"), load_pipeline(pipelines(kind))
    assert isinstance(pipeline.scheduler, DDIMScheduler) and pipeline.scheduler.config.timestep_spacing == "trailing"
    assert_contract(pipeline, pipeline.scheduler, contract, 4)
    assert (tmp_path / "samples/step-2.png").is_file()
    student = "text_encoder_2" if "text_encoder_2" in more else "text_encoder"
    for name, module in teacher.components.items():
        if isinstance(module, torch.nn.Module):
            mine, stored = module.state_dict(), getattr(pipeline, name).state_dict()
            same = all(mine[key].shape == stored[key].shape and torch.equal(mine[key], stored[key]) for key in mine)
            assert same == (name != student), name


def test_captions_alone_are_enough(pipelines, tmp_path):
    (tmp_path / "captions.json").write_text('[{"text": "a small red circle"}, {"text": "a large blue ring"}]')
    run_in_process(train_text_encoder_kd, *quick(pipelines, tmp_path, data=["--data_dir", tmp_path / "captions.json"]))
    assert (tmp_path / "final/model_index.json").is_file()


def test_a_few_step_teacher_keeps_its_scheduler_and_contract(pipelines, tmp_path):
    pipeline = load_pipeline(pipelines())
    pipeline.scheduler = student_scheduler(pipeline.scheduler, "x0", 4)
    pipeline.save_pretrained(tmp_path / "teacher")
    carried = {
        "steps": 4,
        "timesteps": [999, 749, 499, 249],
        "guidance": "baked",
        "guidance_scale": 1.0,
        "target": "x0",
    }
    write_distillation(tmp_path / "teacher", method="add", parent="x", **carried)
    more = ["--pretrained_model_name_or_path", tmp_path / "teacher", "--run_name", "run"]
    run_in_process(train_text_encoder_kd, *quick(pipelines, tmp_path, *more, steps=1))
    contract = read_json(tmp_path / "run/final/distillation.json")
    origin = {"parent": str(tmp_path / "teacher"), "revision": None, "variant": None}
    assert contract == {"method": "text_encoder_kd", **origin, **carried}
    student = load_pipeline(tmp_path / "run/final")
    assert isinstance(student.scheduler, LCMScheduler) and student.text_encoder.config.num_hidden_layers == 1
    assert_contract(student, student.scheduler, contract, 4)


def test_every_trained_weight_moves(uninterrupted):
    before, after = (load_file(uninterrupted / f"checkpoint-{n}" / "student.safetensors") for n in (3, 6))
    # Keys have no bias that matters: it shifts all the logits of a query alike.
    still = [name for name in before if torch.equal(before[name], after[name]) and "k_proj.bias" not in name]
    assert "projection.weight" in before and not still


def test_gradient_checkpointing_and_validation_change_nothing(pipelines, uninterrupted, tmp_path):
    more = ["--gradient_checkpointing", "--validation_prompts", "a red ring", "--validation_steps", 1]
    more += ["--num_validation_images", 1]
    run_in_process(train_text_encoder_kd, *quick(pipelines, tmp_path, *SMALL, *more, steps=3))
    assert_same(tmp_path / "checkpoint-3", uninterrupted / "checkpoint-3")


def test_two_processes_are_one(pipelines, uninterrupted, tmp_path):
    """Each fits the projection for itself."""
    fork_and_wait(tmp_path, SCRIPT, *quick(pipelines, tmp_path, *SMALL, "--batch_size", 2, steps=3), processes=2)
    assert_same(tmp_path / "checkpoint-3", uninterrupted / "checkpoint-3", atol=2e-5, rtol=1e-3)


def test_another_student_is_refused_on_resume(pipelines, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "checkpoint-3", tmp_path / "checkpoint-3")
    for change in (["--intermediate_size", 16], ["--caption_dropout", 0.2], ["--pooled_weight", 1]):
        resumed = quick(pipelines, tmp_path, *SMALL, *change, "--resume_from_checkpoint", "latest")
        with pytest.raises(CheckpointError, match=change[0].strip("-")):
            run_in_process(train_text_encoder_kd, *resumed)


# The output


def test_final_in_stock_diffusers_is_the_student_in_memory(pipelines, uninterrupted, tmp_path):
    """A narrower hidden size among the rest: the UNet's own projection drives it."""
    stock = stock_images(uninterrupted / "final", 4, tmp_path)
    pipeline = load_pipeline(pipelines())
    encoder = shrink_text_encoder(pipeline.text_encoder, 1, 32, 16)
    student = TextStates(encoder, projection=torch.nn.Linear(16, 32)).eval()
    student.load_state_dict(load_file(uninterrupted / "checkpoint-6" / "student_ema.safetensors"))
    own = pipeline.scheduler
    pipeline.scheduler = DDIMScheduler.from_pretrained(uninterrupted / "final" / "scheduler")
    base = images_in_memory(pipeline, 4)
    with student_in_place(pipeline, "text_encoder", student):
        torch.testing.assert_close(stock, images_in_memory(pipeline, 4), atol=1e-6, rtol=0)
    assert torch.equal(base, images_in_memory(pipeline, 4)) and (stock - base).abs().max() > 1e-4
    assert type(own) is not DDIMScheduler


def test_final_and_checkpoint_hold_what_they_should(uninterrupted):
    config = read_json(uninterrupted / "final/unet/config.json")
    assert (config["encoder_hid_dim"], config["encoder_hid_dim_type"]) == (16, "text_proj")
    unet, exported = (load_pipeline(uninterrupted / name).unet for name in ("final", "final-fp16"))
    assert torch.equal(exported.encoder_hid_proj.weight, unet.encoder_hid_proj.weight.half().float())
    before, after = (
        sum(p.numel() for p in m.parameters())
        for m in (random_pipeline("sd").text_encoder, load_pipeline(uninterrupted / "final").text_encoder)
    )
    card = (uninterrupted / "final/README.md").read_text()
    assert f"{before:,} -> {after + 16 * 32 + 32:,}" in card and "num_hidden_layers 2 -> 1" in card
    names = {path.name for path in (uninterrupted / "checkpoint-6").iterdir()}
    assert names == {"student.safetensors", "student_ema.safetensors", "optimizer.bin", "state.json"}


# Mistakes

MISTAKES = [
    (["--num_hidden_layers", "3"], "--num_hidden_layers 3 is more than the teacher's 2"),
    (["--intermediate_size", "65"], "--intermediate_size 65 is more than the teacher's 64"),
    (["--hidden_size", "15"], "--hidden_size 15 is not divisible by the teacher's 2 attention heads"),
    (["--text_encoder", "text_encoder_2"], "--text_encoder text_encoder_2"),
    (["--unet_weight", "2"], "--unet_weight"),
    (["--center_crop"], "--center_crop"),
    (["--image_column", "x"], "--image_column"),
    (["sdxl", "--hidden_size", "16"], "--hidden_size"),
    (["sdxl", "--num_hidden_layers", "1"], "--num_hidden_layers 1: SDXL"),
    (["sdxl", "--pooled_weight", "0"], "--pooled_weight 0: SDXL"),
]


@pytest.mark.parametrize("wrong, said", MISTAKES, ids=[" ".join(wrong) for wrong, _ in MISTAKES])
def test_mistakes_are_one_sentence_before_anything_loads(pipelines, tmp_path, capsys, monkeypatch, wrong, said):
    monkeypatch.setattr(train_text_encoder_kd, "load_frozen", None)
    kind, wrong = ("sdxl", wrong[1:]) if wrong[0] == "sdxl" else ("sd", wrong)
    assert_one_sentence(quick(pipelines, tmp_path / "out", *wrong, kind=kind), said, capsys)


def test_a_projected_unet_and_embedded_guidance_are_refused(uninterrupted, tmp_path, capsys):
    flags = [*QUICK, *SHAPES, "--output_dir", tmp_path / "out", "--pretrained_model_name_or_path"]
    said = "has a projection of text states already"
    assert_one_sentence([*flags, uninterrupted / "final", "--hidden_size", 8], said, capsys)
    shutil.copytree(uninterrupted / "final", tmp_path / "embedded")
    write_distillation(tmp_path / "embedded", guidance="embedded", guidance_scale=4.0)
    assert_one_sentence([*flags, tmp_path / "embedded", "--through_unet"], "--through_unet", capsys)


def assert_one_sentence(words, said, capsys):
    error = error_of(train_text_encoder_kd, words, capsys)
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error
