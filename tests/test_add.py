"""train_add.py: its losses and discriminators, and mistakes."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from launching import error_of, quick, see_with
from PIL import Image

import train_add
from common.conditioning import encode_prompts, predict
from common.contract import write_distillation
from common.discriminators import (
    R1_SIGMA,
    Dinov2Features,
    Heads,
    UNetFeatures,
    judge,
    r1_finite_difference,
    r1_penalty,
    text_condition,
)
from common.hooks import FeatureTap
from common.judging.previews import image_diversity
from common.pipelines import load_pipeline, with_guidance_input
from train_add import adversarial_loss, discriminator_loss, distillation_loss, draw, draw_judged

PROMPTS = ["a small red circle on a white background", "a large blue ring on a gray background"]


# The losses


def test_hinge_signs():
    """The discriminator wants real above 1 and fake below -1, and no more; the student wants fake up."""
    high, low = [torch.full((2, 3), 2.0)], [torch.full((2, 3), -2.0)]
    assert discriminator_loss(high, low) == 0 and discriminator_loss(low, high) == 6
    assert discriminator_loss([torch.zeros(2, 3)], [torch.zeros(2, 3)]) == 2
    # Real images under other captions are half of what is rejected, where the captions do differ.
    differ = torch.tensor([True, False])
    assert discriminator_loss(high, low, low, differ) == 0 and discriminator_loss(high, high, low, differ) == 1.5
    assert discriminator_loss(high, low, high, differ) == 0.75 and discriminator_loss(high, low, high, ~differ) == 0.75
    assert adversarial_loss(high) == -2 and adversarial_loss(low) == 2
    # Each head counts alike, however many places it judges.
    assert adversarial_loss([torch.zeros(2, 64), torch.ones(2, 4)]) == -0.5


def test_distillation_loss_is_weighted_and_leaves_the_teacher():
    x, target = torch.zeros(2, 4, 8, 8, requires_grad=True), torch.ones(2, 4, 8, 8, requires_grad=True)
    loss = distillation_loss(x, target * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), torch.tensor([1.0, 0.5]))
    assert loss == (1 + 0.5 * 9) / 2
    loss.backward()
    assert target.grad is None and (x.grad < 0).all()


def test_r1_is_the_gradient_of_a_quadratic():
    """D(x) = sum of a x^2 has the gradient 2 a x; finite differences come to it within their noise."""
    x, a = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(), 0.7
    expected = (2 * a * x).square().flatten(1).sum(1).mean()
    score = lambda x: [(a * x.square()).flatten(1)]  # noqa: E731
    torch.testing.assert_close(r1_penalty(score(x), [x]), expected)
    two = r1_penalty([*score(x), *score(x)], [x])  # both heads look at x here
    torch.testing.assert_close(two, 4 * expected)
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack(
        [
            r1_finite_difference(score(x), score(x + R1_SIGMA * torch.randn(x.shape, generator=generator)))
            for _ in range(2000)
        ]
    )
    assert abs(draws.mean() / expected - 1) < 0.1
    r1_penalty(score(x), [x]).backward()  # it can be trained on
    torch.testing.assert_close(x.grad, 8 * a**2 * x.detach() / 2)


@pytest.mark.parametrize(
    "probs, shares", [(None, (0.25, 0.25, 0.25, 0.25)), ([4.0, 2.0, 1.0, 1.0], (0.5, 0.25, 0.125, 0.125))]
)
def test_draws_follow_from_the_position_and_differ_per_sample(probs, shares):
    args = SimpleNamespace(
        seed=0,
        num_inference_steps=4,
        timestep_probs=probs,
        distill_timesteps=(20, 979),
        discriminator_timesteps=(100, 500),
    )
    drawn = draw(args, 7, range(2000), torch.zeros(2000, 1, 2, 2))
    slots, distill, *noise = drawn
    torch.testing.assert_close(slots.bincount(minlength=4) / 2000, torch.tensor(shares), atol=0.04, rtol=0)
    assert distill.min() < 40 and distill.max() > 960
    judgement = draw_judged(args, 7, range(2000), torch.zeros(2000, 1, 2, 2))
    judged, *more_noise = judgement
    assert len(judged.unique()) > 300 and judged.min() >= 100 and judged.max() <= 500
    noise += more_noise
    assert len(noise) == 4 and all(not torch.equal(a, b) for a, b in zip(noise, noise[1:]))
    again = [
        *draw(args, 7, range(1000, 1010), torch.zeros(10, 1, 2, 2)),
        *draw_judged(args, 7, range(1000, 1010), torch.zeros(10, 1, 2, 2)),
    ]
    for mine, all_of_them in zip(again, [*drawn, *judgement], strict=True):
        assert torch.equal(mine, all_of_them[1000:1010])


def test_image_diversity():
    black, white = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "white")
    assert image_diversity([[black, black], [white, white]]) == 0
    assert image_diversity([[black, white]]) == 1
    assert image_diversity([[black], [white]]) is None


# The discriminators


@pytest.mark.parametrize("kind, variant", [("sd", None), ("sdxl", None), ("sd", "sd_small")])
def test_unet_features_are_those_of_a_whole_forward(pipelines, students, kind, variant):
    pipeline = load_pipeline(students(kind, variant) if variant else pipelines(kind))
    assert (pipeline.unet.mid_block is None) == (variant == "sd_small")
    conditioning = encode_prompts(pipeline, PROMPTS, 32)
    z, t = torch.randn(2, 4, 8, 8, requires_grad=True), torch.tensor([999, 20])
    looks = UNetFeatures(pipeline.unet)
    features = looks(z, t, conditioning)
    with FeatureTap(pipeline.unet, looks.names) as tap:
        predict(pipeline.unet, z, t, conditioning)
    for name, mine, channels in zip(looks.names, features, looks.channels, strict=True):
        assert torch.equal(mine, tap.features[name]) and mine.shape[1] == channels
    sum(x.sum() for x in features).backward()  # to what it looks at, and not to itself
    assert z.grad.abs().sum() > 0 and all(p.grad is None for p in pipeline.unet.parameters())


def test_dinov2_looks_as_its_processor_prepares(dinov2):
    looks = Dinov2Features(dinov2, 28, "cpu", torch.float32)
    pixels = (torch.rand(2, 3, 28, 28) * 2 - 1).requires_grad_()
    features, cls = looks(pixels)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (looks.mean, looks.std))
    with torch.no_grad():
        whole = looks.model((pixels + 1) / 2 / std - mean / std, output_hidden_states=True)
    assert [x.shape for x in features] == [(2, 16, 2, 2)] * 4 and cls.shape == (2, looks.width)
    for layer, mine in zip((1, 2, 3, 4), features):
        torch.testing.assert_close(mine.flatten(2).mT, whole.hidden_states[layer][:, 1:], atol=1e-5, rtol=1e-4)
    sum(x.sum() for x in features).backward()
    assert pixels.grad.abs().sum() > 0 and all(p.grad is None for p in looks.model.parameters())
    assert looks(torch.zeros(1, 3, 50, 40))[0][0].shape == (1, 16, 2, 2)  # any size


def test_conditioning_changes_the_scores(pipelines):
    """Through the heads alone too: the same features, another caption."""
    pipeline = load_pipeline(pipelines())
    conditioning = encode_prompts(pipeline, PROMPTS, 32)
    features = UNetFeatures(pipeline.unet)(torch.randn(2, 4, 8, 8), torch.tensor([100, 100]), conditioning)
    condition = text_condition(conditioning)
    heads = Heads([x.shape[1] for x in features], condition.shape[1])
    for mine, others in zip(heads(features, condition), heads(features, condition.flip(0))):
        assert mine.shape == others.shape and not torch.allclose(mine, others)


@pytest.mark.parametrize("r1_form", [None, "autograd", "finite_difference"])
@pytest.mark.parametrize("with_mismatched", [False, True])
def test_judge_scores_each_part_with_its_own_condition(r1_form, with_mismatched):
    """One forward of the heads is as good as one for each part; R1 is of the real ones."""
    heads = Heads([6, 8], 5)
    real, fake, mismatched, noise = ([torch.randn(2, 6, 4, 4), torch.randn(2, 8, 2, 2)] for _ in range(4))
    condition, other = torch.randn(2, 5), torch.randn(2, 5)
    extra = (mismatched, other) if with_mismatched else (None, None)
    *scores, r1 = judge(heads, real, fake, condition, r1_form, noise, *extra)
    wanted = [heads(real, condition), heads(fake, condition), heads(mismatched, other) if with_mismatched else None]
    for mine, theirs in zip(scores, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        for a, b in zip(mine or [], theirs or [], strict=True):
            torch.testing.assert_close(a, b)
    leaves = [x.clone().requires_grad_() for x in real]
    expected = {
        None: torch.zeros(()),
        "autograd": r1_penalty(heads(leaves, condition), leaves),
        "finite_difference": r1_finite_difference(
            wanted[0], heads([x + R1_SIGMA * n for x, n in zip(real, noise)], condition)
        ),
    }[r1_form]
    torch.testing.assert_close(r1, expected, rtol=1e-3, atol=1e-6)


def test_heads_learn_to_tell_real_from_fake():
    torch.manual_seed(0)
    heads, condition = Heads([6], 5), torch.randn(8, 5)
    real, fake = [torch.randn(8, 6, 4, 4)], [torch.randn(8, 6, 4, 4)]
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        real_scores, fake_scores, _, _ = judge(heads, real, fake, condition)
        discriminator_loss(real_scores, fake_scores).backward()
        optimizer.step()
    assert real_scores[0].mean() > 0.8 and fake_scores[0].mean() < -0.8


# Mistakes

MISTAKES = [
    (["--student_model", "no/such/folder"], "--student_model no/such/folder: there is no such folder"),
    (["--student_model", "{embedded}"], "its guidance scale is an input of its UNet"),
    (["--student_model", "x", "--lora_rank", "4"], "--student_model"),
    (["--distill_timesteps", "500", "20"], "--distill_timesteps 500 20"),
    (["--discriminator_timesteps", "0", "1000"], "--discriminator_timesteps 0 1000"),
    (["--cache_rollouts", "4"], "--cache_rollouts is about --distill_target sample"),
    (["--cache_rollouts", "4", "--distill_target", "sample", "--lambda_distill", "0"], "--cache_rollouts"),
    (["--num_ddim_steps", "4"], "--num_ddim_steps is about --distill_target sample"),
    (["--distill_target", "sample", "--distill_timesteps", "2", "5"], "--distill_timesteps is about"),
    (["--feature_resolution", "28"], "--feature_resolution is about --discriminator dinov2"),
    (["--discriminator", "dinov2", "--discriminator_timesteps", "2", "5"], "--discriminator_timesteps is about"),
    (["--mismatched_captions", "--train_batch_size", "3"], "--mismatched_captions"),
    (["--lambda_distill", "0", "--discriminator_start_step", "5"], "--lambda_distill 0"),
    (["--discriminator", "dinov2", "--feature_model_name_or_path", "./no/dino"], "--feature_model_name_or_path"),
    (
        ["--discriminator", "dinov2", "--feature_model_name_or_path", "{dinov2}", "--feature_resolution", "30"],
        "--feature_resolution 30",
    ),
    (["--timestep_probs", "0.5", "0.5"], "--timestep_probs has 2 numbers"),
]


@pytest.fixture(scope="module")
def embedded(pipelines, tmp_path_factory):
    """The folder of a pipeline from elsewhere whose UNet takes its guidance scale as an input."""
    folder, pipeline = tmp_path_factory.mktemp("embedded") / "pipeline", load_pipeline(pipelines())
    pipeline.unet = with_guidance_input(pipeline.unet)
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("wrong, said", MISTAKES, ids=[" ".join(wrong) for wrong, _ in MISTAKES])
def test_mistakes_are_one_sentence(pipelines, dinov2, embedded, tmp_path, capsys, wrong, said):
    wrong = [word.format(dinov2=dinov2, embedded=embedded) for word in wrong]
    error = error_of(train_add, quick(pipelines, tmp_path, *wrong), capsys)
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_students_and_features_that_do_not_load_or_fit(pipelines, dinov2, tmp_path, capsys):
    """Known once the weights are read; still one sentence."""
    torn = shutil.copytree(pipelines(), tmp_path / "torn")
    (torn / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    reader = load_pipeline(pipelines())
    next(reader.text_encoder.parameters()).data += 1
    reader.save_pretrained(tmp_path / "reader")
    blind = shutil.copytree(dinov2, tmp_path / "blind")
    (blind / "model.safetensors").unlink()
    for flags, said in (
        (["--student_model", torn], f"error: --student_model {torn}: unet/ does not load"),
        (["--student_model", pipelines("v")], "its noise schedule or prediction type is not the teacher's"),
        (["--student_model", tmp_path / "reader"], "its text_encoder is not the teacher's"),
        (see_with(blind), f"error: --feature_model_name_or_path {blind}: the model does not load"),
    ):
        error = error_of(train_add, quick(pipelines, tmp_path / "out", *flags, "--overwrite_output_dir"), capsys)
        assert said in error and error.count("error: ") == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    "contract, flags, said",
    [
        ({"guidance": "embedded"}, [], "its guidance scale is an input of its UNet already"),
        ({"guidance": "baked", "timesteps": [999, 499]}, [], "for 2 steps"),
        ({"guidance": "baked", "timesteps": [999, 499]}, [], "and give this one as --student_model"),
        ({"guidance": "baked"}, ["--guidance_scale", 3], "--guidance_scale 3"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(pipelines, tmp_path, capsys, contract, flags, said):
    teacher = shutil.copytree(pipelines(), tmp_path / "teacher")
    write_distillation(teacher, guidance_scale=1.0, **contract)
    error = error_of(train_add, quick(lambda kind: teacher, tmp_path / "out", *flags), capsys)
    assert said in error and error.startswith("error: ") and error.count("\n") == 1
