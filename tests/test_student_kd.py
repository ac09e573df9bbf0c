"""train_student_kd.py: its loss and schedules, what one step computes, and what it refuses."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import random_pipeline, read_json, run_in_process
from contract import assert_contract
from diffusers import DDIMScheduler, UNet2DConditionModel
from launching import error_of, quick_student

import train_student_kd
from common.compression import distillation, students
from common.conditioning import Conditioning, conditioning_of, encode_empty_prompt, encode_prompts, predict
from common.diffusion import NoiseSchedule, min_snr_weights
from common.errors import UsageError
from common.hooks import FeatureTap
from common.optimization import learning_rate_at
from common.pipelines import load_pipeline
from common.schedulers import ddim_scheduler, student_timesteps
from train_student_kd import chain_index, draw, kd_loss, noisy_pair, ramp, student_scheduler

# The method


def test_kd_loss_has_known_values():
    ones, twos = torch.ones(2, 4, 8, 8), torch.full((2, 4, 8, 8), 2.0)
    features = [(ones, twos), (torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 100.0))]
    loss, (task, kd, feature) = kd_loss(ones, 3 * ones, 0 * ones, features, torch.tensor([1.0, 0.5]), 1, 0.5, 0.1)
    assert (task, kd, feature) == (0.75, 3.0, 1.25)  # 1 and 4 times 0.75; 1/4, and 1 however large the features are
    torch.testing.assert_close(loss, torch.tensor(0.75 + 0.5 * 3 + 0.1 * 1.25))
    loss, (task, _, feature) = kd_loss(ones, 3 * ones, None, [], torch.ones(2), 0, 1, 1)
    assert loss == 4 and task == 0 and feature == 0
    half = [(ones.half() * 300, twos.half() * 300)]  # whose squares are beyond half precision
    assert kd_loss(ones, ones, None, half, torch.ones(2), 0, 1, 1)[0] == 0.25


def test_kd_loss_is_a_mean_over_samples():
    torch.manual_seed(0)
    output, teacher, target = (torch.randn(4, 4, 8, 8) for _ in range(3))
    a, b, sample_weights = torch.randn(4, 6, 4, 4), torch.randn(4, 6, 4, 4), torch.rand(4)

    def loss(part):
        return kd_loss(output[part], teacher[part], target[part], [(a[part], b[part])], sample_weights[part], 1, 1, 1)

    whole, halves = loss(slice(None)), [loss(slice(0, 2)), loss(slice(2, 4))]
    torch.testing.assert_close(whole[0], (halves[0][0] + halves[1][0]) / 2)
    exact = kd_loss(teacher, teacher, target, [(b, b)], sample_weights, 0, 1, 1)
    assert exact[0] == 0


@pytest.mark.parametrize("kind, target", [("sd", "epsilon"), ("v", "v_prediction")])
def test_min_snr_is_the_weight_of_an_error_in_x0(kind, target):
    schedule = NoiseSchedule(random_pipeline(kind).scheduler)
    t, z = torch.tensor([0, 100, 500, 999]), torch.randn(4, 4, 8, 8)
    outputs = torch.randn(2, 4, 4, 8, 8).unbind()
    own, x0 = (
        (a - b).square().mean(dim=(1, 2, 3))
        for a, b in (outputs, [schedule.to_x0(output, z, t) for output in outputs])
    )
    snr = schedule.snr(t).flatten()
    torch.testing.assert_close(min_snr_weights(schedule, t, 5) * own, snr.clamp(max=5) * x0, rtol=1e-3, atol=1e-6)
    assert min_snr_weights(schedule, t, None).tolist() == [1, 1, 1, 1]


def test_schedules_at_their_ends_and_middle():
    assert [ramp(1.0, 0.5, step, 101) for step in (0, 50, 100)] == [1.0, 0.75, 0.5]
    assert [ramp(0.0, 0.2, step, 101) for step in (0, 50, 100)] == [0.0, 0.1, 0.2]
    assert ramp(1.0, 0.5, 0, 1) == 1.0
    assert [chain_index(step, 9, 3) for step in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [chain_index(step, 4, 3) for step in range(4)] == [0, 0, 1, 2] and chain_index(0, 1, 3) == 0


@pytest.mark.parametrize("steps, warmup", [(10, 0), (50, 0), (50, 5), (7, 3)])
def test_one_cycle_is_torchs(steps, warmup):
    args = SimpleNamespace(lr_scheduler="one_cycle", lr_warmup_steps=warmup, learning_rate=1e-3, max_train_steps=steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-3, total_steps=steps, pct_start=warmup / steps if warmup else 0.3
    )
    for step in range(steps):
        assert learning_rate_at(step, args) == pytest.approx(torchs.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        if step < steps - 1:
            torchs.step()


def test_draws_are_the_samples_own():
    args = SimpleNamespace(seed=0)
    chain = student_timesteps(ddim_scheduler(random_pipeline("sd").scheduler, 250), 250)
    noise, timesteps, dropped = draw(args, 7, range(2000), (1, 2, 2), chain, 0.3)
    assert set(timesteps.tolist()) <= set(chain) and len(set(timesteps.tolist())) > 240
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.04)
    again = draw(args, 7, range(1000, 1010), (1, 2, 2), chain, 0.3)
    for whole, part in zip((noise, timesteps, dropped), again):
        assert torch.equal(whole[1000:1010], part)
    other, _, more = draw(args, 7, range(2000), (1, 2, 2), chain[:10], 0.6)
    assert torch.equal(other, noise) and bool((more | ~dropped).all())  # a flag changes its own draws alone


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_an_emptied_caption_is_its_samples_alone(kind):
    pipeline = random_pipeline(kind)
    given, empty = encode_prompts(pipeline, ["a red ring", "a blue ring"], 32), encode_empty_prompt(pipeline, 32)
    mixed = given.where(torch.tensor([False, True]), empty)
    assert torch.equal(mixed.prompt_embeds[0], given.prompt_embeds[0])
    assert torch.equal(mixed.prompt_embeds[1], empty.prompt_embeds[0])
    if kind == "sdxl":
        assert torch.equal(mixed.pooled_prompt_embeds[1], empty.pooled_prompt_embeds[0])
        assert torch.equal(mixed.pooled_prompt_embeds[0], given.pooled_prompt_embeds[0])
    else:
        assert isinstance(mixed, Conditioning) and mixed.pooled_prompt_embeds is None


def test_without_a_task_sampling_starts_from_what_the_teacher_knows():
    schedule = NoiseSchedule(random_pipeline("sd").scheduler)
    x, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([999, 500])
    z, target = noisy_pair(SimpleNamespace(task_weight=0.5), schedule, x, noise, t)
    assert torch.equal(z, schedule.add_noise(x, noise, t)) and torch.equal(target, noise)
    pure, none = noisy_pair(SimpleNamespace(task_weight=0.0), schedule, x, noise, t)
    assert none is None and torch.equal(pure[0], noise[0]) and torch.equal(pure[1], z[1])


# What a step computes


def spy_losses(monkeypatch):
    """The terms of every loss that is computed from here on: a list of (loss, task, kd, feature)."""
    seen = []

    def spy(*arguments):
        loss, terms = kd_loss(*arguments)
        seen.append([x.item() for x in (loss, *terms)])
        return loss, terms

    monkeypatch.setattr(train_student_kd, "kd_loss", spy)
    return seen


def test_both_unets_are_asked_the_same_and_their_outputs_compared(pipelines, students, tmp_path, monkeypatch):
    """One forward of each a micro-batch, the teacher's without a graph; half of the captions are emptied."""
    asked, lost, probed = [], [], []

    def spy_predict(unet, z, timesteps, conditioning):
        output = predict(unet, z, timesteps, conditioning)
        asked.append((z, timesteps, conditioning.prompt_embeds, output))
        return output

    def spy_loss(*arguments):
        lost.append(arguments)
        return kd_loss(*arguments)

    monkeypatch.setattr(train_student_kd, "predict", spy_predict)
    monkeypatch.setattr(train_student_kd, "kd_loss", spy_loss)
    monkeypatch.setattr(distillation, "predict", lambda *given: probed.append(given) or predict(*given))
    more = ["--caption_dropout_start", 0.5, "--caption_dropout_end", 1, "--kd_alpha_end", 0.25, "--kd_weight", 3]
    more += ["--task_weight", 2, "--feature_weight", 0.5, "--gradient_accumulation_steps", 2, "--batch_size", 2]
    run_in_process(train_student_kd, *quick_student(pipelines, students("sd", "sd_small", (8, 16)), tmp_path, *more))
    assert len(asked) == 8 and len(lost) == 4 and len(probed) == 2
    empty = encode_empty_prompt(load_pipeline(pipelines()), 32).prompt_embeds[0]
    for number, (teacher, student, arguments) in enumerate(zip(asked[::2], asked[1::2], lost)):
        step, part = divmod(number, 2)
        assert all(torch.equal(a, b) for a, b in zip(teacher[:3], student[:3]))
        output, teacher_output, target, pairs, sample_weights, *weights = arguments
        assert torch.equal(output, student[3]) and torch.equal(teacher_output, teacher[3])
        assert output.requires_grad and not teacher_output.requires_grad
        positions = range(2 * part, 2 * part + 2)
        noise, timesteps, dropped = draw(
            SimpleNamespace(seed=0), step, positions, (4, 8, 8), range(999, -1, -1), (0.5, 1)[step]
        )
        assert torch.equal(target, noise) and torch.equal(student[1], timesteps)
        assert [torch.equal(embeds, empty) for embeds in student[2]] == dropped.tolist()
        assert sample_weights.tolist() == [1, 1] and weights == [2, 3 * (1, 0.25)[step], 0.5]
        assert len(pairs) == 4 and all(own.shape == theirs.shape for own, theirs in pairs)
        if step == 0:  # projections start at zero
            assert all(bool((own == 0).all()) for own, _ in pairs)


@pytest.mark.parametrize("kind", ["sd", "v", "sdxl"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(pipelines, students, tmp_path, monkeypatch, kind):
    seen = spy_losses(monkeypatch)
    more = ["--caption_dropout_start", 0.5, "--learning_rate", 1e-12]
    run_in_process(train_student_kd, *quick_student(pipelines, students(kind), tmp_path, *more, kind=kind, steps=1))
    loss, task, kd, feature = seen[0]
    assert kd == 0 and feature == 0 and loss == task > 0


def test_a_teacher_of_epsilon_teaches_v(pipelines, students, tmp_path, monkeypatch):
    """The same UNet read as v is wrong at first; the teacher's output, converted, is what it is compared with."""
    seen = spy_losses(monkeypatch)
    more = ["--prediction_type", "v_prediction", "--snr_gamma", 5]
    run_in_process(train_student_kd, *quick_student(pipelines, students("sd"), tmp_path, *more))
    assert seen[0][2] > 0 and seen[0][3] == 0
    pipeline = load_pipeline(tmp_path / "final")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    contract = read_json(tmp_path / "final/distillation.json")
    assert_contract(pipeline, ddim_scheduler(pipeline.scheduler, 4), contract, 4)
    # What such a student learns: converted back, the teacher's epsilon.
    teacher, schedule = (NoiseSchedule(random_pipeline(kind).scheduler) for kind in ("sd", "v"))
    t, z, epsilon = torch.tensor([1, 500, 999]), torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    v = teacher.convert(epsilon, z, t, "v_prediction")
    torch.testing.assert_close(schedule.to_epsilon(v, z, t), epsilon, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(schedule.to_x0(v, z, t), teacher.to_x0(epsilon, z, t), atol=1e-3, rtol=1e-4)
    assert torch.equal(teacher.convert(epsilon, z, t, "epsilon"), epsilon)


def test_random_latents_need_captions_only(pipelines, students, tmp_path, monkeypatch):
    seen = spy_losses(monkeypatch)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/captions.json").write_text(json.dumps([{"text": "a red ring"}, {"text": "a blue cross"}]))
    run_in_process(
        train_student_kd,
        *quick_student(
            pipelines,
            students("sd", "sd_small"),
            tmp_path / "out",
            "--random_latents",
            data=["--data_dir", tmp_path / "data"],
            steps=1,
        ),
    )
    assert seen[0][1] == 0 and seen[0][2] > 0 and (tmp_path / "out/final").is_dir()


def test_a_few_step_teachers_timesteps_are_the_students(pipelines, students, tmp_path, monkeypatch):
    """Its guidance is baked in: no error against the noise, no guidance of the student, no other timesteps."""
    teacher = tmp_path / "teacher"
    shutil.copytree(pipelines(), teacher)
    contract = {
        "method": "x",
        "parent": "y",
        "steps": 2,
        "timesteps": [999, 499],
        "guidance": "baked",
        "guidance_scale": 1.0,
        "target": "next",
    }
    (teacher / "distillation.json").write_text(json.dumps(contract))
    seen, drawn = spy_losses(monkeypatch), []

    def spy(*arguments):
        found = draw(*arguments)
        drawn.extend(found[1].tolist())
        return found

    monkeypatch.setattr(train_student_kd, "draw", spy)
    arguments = quick_student(pipelines, students("sd", "sd_small"), tmp_path / "out", steps=3)
    arguments[arguments.index(pipelines())] = teacher
    run_in_process(train_student_kd, *arguments)
    assert set(drawn) == {999, 499} and all(task == 0 for _, task, _, _ in seen)
    own = read_json(tmp_path / "out/final/distillation.json")
    origin = {"parent": str(teacher), "revision": None, "variant": None}
    assert own == {**contract, "method": "student_kd", **origin}
    with pytest.raises(UsageError, match="--chain_schedule: the teacher has timesteps of its own"):
        run_in_process(train_student_kd, *arguments, "--chain_schedule", 500)


def test_a_student_with_its_own_text_encoder_gets_its_own_embeddings(pipelines, students, tmp_path, monkeypatch):
    student = tmp_path / "student"
    shutil.copytree(students("sd", "sd_small"), student)
    pipeline = load_pipeline(student)
    for parameter in pipeline.text_encoder.parameters():
        parameter.mul_(1.1)
    pipeline.text_encoder.save_pretrained(student / "text_encoder")
    used = []

    def spy(pipeline, *arguments):
        used.append(id(pipeline.text_encoder))
        return conditioning_of(pipeline, *arguments)

    monkeypatch.setattr(train_student_kd, "conditioning_of", spy)
    run_in_process(train_student_kd, *quick_student(pipelines, student, tmp_path / "two", steps=1))
    run_in_process(train_student_kd, *quick_student(pipelines, students("sd", "sd_small"), tmp_path / "one", steps=1))
    assert len(used) == 3 and len(set(used[:2])) == 2
    for flag in ("--cache_dir", "--rollout_cache"):  # whose embeddings are the teacher's, some anew or not
        args = SimpleNamespace(**{"cache_dir": None, "rollout_cache": None, flag[2:]: "cache"}, rollout_refresh=0.5)
        with pytest.raises(UsageError, match="its text encoder is not the teacher's"):
            monkeypatch.setattr(train_student_kd, "load_frozen", lambda *_, **__: load_pipeline(pipelines()))
            run = SimpleNamespace(dtype=torch.float32, device="cpu")
            args.student_model, args.pretrained_model_name_or_path = student, pipelines()
            train_student_kd.load_pair(args, run)
    saved = load_pipeline(tmp_path / "two/final").text_encoder.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in pipeline.text_encoder.state_dict().items())


def test_sd_tiny_of_sd15_has_features_of_equal_sizes():
    """The pairs of the full-size student, on the meta device: its last stage no longer downsamples."""
    with torch.device("meta"):
        teacher = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        student, manifest = students.build_student(teacher, "sd_tiny")
        inputs = torch.zeros(1, 4, 8, 8), torch.zeros(1)
        shapes = []
        for unet, names in zip((student, teacher), zip(*manifest["feature_pairs"])):
            with FeatureTap(unet.to("meta"), names) as tap:
                unet(*inputs, encoder_hidden_states=torch.zeros(1, 77, 768))
            shapes.append([tap.features[name].shape for name in names])
    assert shapes[0] == shapes[1] and len(shapes[0]) == 6


# Mistakes

MISTAKES = [
    (["--student_model", "nowhere"], "compression.json"),
    (["--student_model", "{plain}"], "compression.json"),
    (["--student_model", "{broken}"], "compression.json"),
    (["--student_model", "{pairs}"], "names no feature_pairs"),
    (["--student_model", "{latents}"], "its latents' scale"),
    (["--student_model", "{text}"], "its text width"),
    (["--student_model", "{betas}"], "its noise schedule"),
    (["--student_model", "{names}"], "no_such_block"),
    (["--student_model", "{sizes}"], "of different sizes"),
    (["--pretrained_model_name_or_path", "{embedded}"], "guidance scale is an input of its UNet"),
    (["--task_weight", "0", "--kd_weight", "0"], "--task_weight"),
    (["--random_latents", "--task_weight", "1"], "--random_latents"),
    (["--random_latents", "--kd_weight", "0"], "--kd_weight"),
    (["--chain_schedule", "500", "1000"], "--chain_schedule 500 1000"),
    (["--chain_schedule", "2000", "1000"], "--chain_schedule 2000"),
    (["--eval_steps", "1", "--num_eval_images", "1"], "--num_eval_images"),
    (["--eval_steps", "1", "--lpips_trunk_path", "nowhere.pth"], "--lpips_trunk_path nowhere.pth"),
    (["--eval_steps", "1", "--inception_path", "{tmp}"], "--inception_path"),
    (["--eval_steps", "10", "--clip_model", "none"], "--eval_steps has no judge"),
    (["--eval_steps", "1", "--clip_model", "{tmp}"], "No CLIP judge"),
    (["--eval_steps", "1", "--eval_data_dir", "nowhere"], "--eval_data_dir nowhere"),
    (["--eval_steps", "1", "--eval_data_dir", "{plain}"], "--eval_steps has no judge"),
    (["--eval_steps", "1", "--eval_data_dir", "{plain}", "--clip_model", "{tmp}"], "--eval_data_dir"),
]
# What the weights or a judge must be loaded for; all else is said from flags and small files alone.
LOADED = ("its noise schedule", "no_such_block", "of different sizes", "No CLIP judge")
LOADED += ("--eval_data_dir",)  # a folder that is there, whose images can't be read


def broken_models(teacher, student, folder):
    """{name: folder} of a teacher that can't be used, and of students that can't learn from the random pipeline."""
    made = {}

    def copy(name, file, source=student, **changes):
        made[name] = folder / name
        shutil.copytree(source, made[name])
        (made[name] / file).write_text(json.dumps({**read_json(made[name] / file), **changes}))

    copy("plain", "compression.json")
    (made["plain"] / "compression.json").unlink()
    copy("broken", "compression.json")
    (made["broken"] / "compression.json").write_text("{")
    copy("pairs", "compression.json", feature_pairs=[])
    copy("latents", "vae/config.json", scaling_factor=0.1)
    copy("text", "unet/config.json", cross_attention_dim=48)
    copy("betas", "scheduler/scheduler_config.json", beta_end=0.02)
    copy("names", "compression.json", feature_pairs=[["no_such_block", "mid_block"]])
    copy("sizes", "compression.json", feature_pairs=[["down_blocks.0", "up_blocks.1"]])
    copy("embedded", "unet/config.json", teacher, time_cond_proj_dim=256)
    return made


@pytest.mark.parametrize("wrong, said", MISTAKES, ids=[" ".join(wrong) for wrong, _ in MISTAKES])
def test_mistakes_are_one_sentence(pipelines, students, tmp_path, capsys, wrong, said):
    student = students("sd", "sd_small")
    made = broken_models(pipelines(), student, tmp_path)
    wrong = [word.format(tmp=tmp_path, **made) for word in wrong]
    error = error_of(train_student_kd, quick_student(pipelines, student, tmp_path / "out", *wrong), capsys)
    bars, sentence, more = error.partition("error: ")
    assert said in sentence + more and more.count("\n") == 1 and "Traceback" not in error, error
    assert said in LOADED or (bars == "" and not (tmp_path / "out").exists())


def test_a_scheduler_that_the_student_cannot_learn_with_is_refused():
    """At zero terminal SNR there is no image in z, and epsilon says nothing of it."""
    args = SimpleNamespace(student_model="here", prediction_type="epsilon", chain_schedule=None)
    zero = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    with pytest.raises(UsageError, match="--prediction_type epsilon"):
        student_scheduler(args, zero, NoiseSchedule(zero))
    args.prediction_type, args.chain_schedule = None, [1000, 300]
    scheduler, chains = student_scheduler(args, zero, NoiseSchedule(zero))
    assert scheduler.config.prediction_type == "v_prediction" and [len(chain) for chain in chains] == [1000, 300]
    short = DDIMScheduler(num_train_timesteps=500)
    with pytest.raises(UsageError, match="--chain_schedule 1000: the teacher has 500 timesteps"):
        student_scheduler(args, short, NoiseSchedule(short))
    with pytest.raises(UsageError, match="--student_model here: its noise schedule"):
        student_scheduler(args, DDIMScheduler(), NoiseSchedule(zero))
