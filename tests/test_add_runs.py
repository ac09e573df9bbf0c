"""train_add.py from start to end: what each update moves, its guard, splits of a batch, what its student samples."""

import shutil

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, read_json, run_in_process
from contract import assert_contract
from diffusers import UNet2DConditionModel
from launching import checkpoint_tensors, error_of, fork_and_wait, quick, see_with
from PIL import Image
from safetensors.torch import load_file
from transformers import Dinov2Model

import inference
import train_add
from common.diffusion import NoiseSchedule
from common.discriminators import UNetFeatures
from common.pipelines import load_pipeline, same_weights
from common.schedulers import saved_scheduler

SCRIPT = ROOT / "train_add.py"
# Far enough that what two runs have in common is not that they hardly moved.
# An epsilon above what rounding does to a gradient of about 0, which Adam would else make a step of.
FAR = ["--lr_warmup_steps", 0, "--learning_rate", 1e-2, "--r1_gamma", 1, "--adam_epsilon", 1e-3]
CLOSE = {"atol": 2e-5, "rtol": 1e-3}


@pytest.fixture(scope="module")
def uninterrupted(pipelines, tmp_path_factory):
    """Four steps in one go, two updates of the discriminator each, global batch 4, a checkpoint after every one."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    more = ["--discriminator_updates", 2, "--checkpointing_steps", 1]
    run_in_process(train_add, *quick(pipelines, folder, *FAR, *more, steps=4))
    return folder


def tensors_of(checkpoint):
    """All tensors of a checkpoint: both networks, both optimizers and the average."""
    tensors = checkpoint_tensors(checkpoint, "student")
    tensors.update({f"heads.{k}": v for k, v in load_file(checkpoint / "discriminator.safetensors").items()})
    state = torch.load(checkpoint / "optimizer_1.bin", weights_only=True)["state"]
    tensors.update({f"heads.{i}.{k}": torch.as_tensor(v) for i, s in state.items() for k, v in s.items()})
    return tensors


def skipped(checkpoint):
    """{network: [updates skipped in all, in a row]}."""
    return read_json(checkpoint / "state.json")["state"]["skipped"]


def assert_same(a, b, **tolerance):
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys()
    for key in a:
        if tolerance:
            torch.testing.assert_close(a[key], b[key], **tolerance, msg=lambda m, key=key: f"{key}: {m}")
        else:
            assert torch.equal(a[key], b[key]), key


# Training


@pytest.mark.parametrize(
    "kind, flags",
    [
        ("v", ["--lora_rank", 4, "--distill_target", "sample", "--num_ddim_steps", 2, "--cache_rollouts", 1]),
        ("sdxl", ["--r1_form", "finite_difference", "--num_student_steps", 2]),
        ("sd", ["--discriminator", "dinov2", "--lambda_distill", 0]),
    ],
)
def test_every_kind_trains_and_keeps_the_contract(pipelines, dinov2, tmp_path, monkeypatch, kind, flags):
    more = ["--gradient_checkpointing", *(see_with(dinov2) if "dinov2" in flags else [])]
    more += ["--validation_prompts", "a ring", "--validation_steps", 2, "--num_validation_images", 2]
    lines = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, **_: lines.append(values))
    run_in_process(train_add, *quick(pipelines, tmp_path, *flags, *more, kind=kind))
    counts = [1, 2] if "--num_student_steps" in flags else [1, 2, 4]
    assert [f"diversity_{n}_steps" for n in counts] == [name for line in lines for name in line if "diversity" in name]
    final, lora = tmp_path / "final", "--lora_rank" in flags
    contract, steps = read_json(final / "distillation.json"), 2 if "--num_student_steps" in flags else 4
    assert contract["method"] == "add" and contract["parent"] == pipelines(kind)
    assert (contract["guidance"], contract["target"], contract["steps"]) == ("baked", "x0", steps)
    pipeline = load_pipeline(pipelines(kind) if lora else final)
    if lora:
        pipeline.load_lora_weights(final)
        pipeline.scheduler = saved_scheduler(final)
    saved = pipeline.scheduler
    for count in counts:
        assert_contract(pipeline, saved, contract, count)
    assert (tmp_path / "samples" / "step-2.png").is_file()
    assert f"{', '.join(map(str, counts))} steps" in (final / "README.md").read_text()


def test_what_each_update_moves(pipelines, tmp_path, monkeypatch):
    """The student's backward gives the heads no gradient, the heads' changes none of the student's; the rest rests."""
    made, seen = {}, []

    def keep(name):
        original = getattr(train_add, name)
        monkeypatch.setattr(train_add, name, lambda *arguments: made.setdefault(name, original(*arguments)))

    keep("make_sight"), keep("make_heads"), keep("own_unet")
    backward, clip = Accelerator.backward, train_add.clip

    def spy_backward(self, loss, **options):
        backward(self, loss, **options)
        seen.append(("backward", [p.grad for p in made["make_heads"].parameters()]))
        made["gradients"] = [p.grad.clone() for p in made["own_unet"].parameters()]

    def spy_clip(run, optimizer, parameters, name="student"):
        if name == "discriminator":
            assert len(parameters) == len(list(made["make_heads"].parameters()))
            seen.append(("heads", [p.grad for p in made["own_unet"].parameters()]))  # already stepped and cleared
        else:
            gradients = zip(parameters.values(), made["gradients"], strict=True)
            seen.append(("student", [torch.equal(p.grad, g) for p, g in gradients]))
        return clip(run, optimizer, parameters, name)

    monkeypatch.setattr(Accelerator, "backward", spy_backward)
    monkeypatch.setattr(train_add, "clip", spy_clip)
    more = ["--discriminator_start_step", 1, "--checkpointing_steps", 1]
    run_in_process(train_add, *quick(pipelines, tmp_path, *more, steps=2))
    assert [what for what, _ in seen] == ["backward", "student", "backward", "student", "heads"]
    for what, values in seen:
        assert all(values) if what == "student" else all(value is None for value in values), what
    for step, trained in ((1, False), (2, True)):
        state = torch.load(tmp_path / f"checkpoint-{step}/optimizer_1.bin", weights_only=True)["state"]
        assert bool(state) == trained  # the discriminator starts with the second step
    assert same_weights(made["make_sight"].network.unet, load_pipeline(pipelines()).unet)


def test_the_teachers_x0_of_the_student_renoised(pipelines, tmp_path, monkeypatch):
    """The score target, from what the run itself drew: x_psi at (alpha_t x^ + sigma_t eps', t), weighted alpha_t."""
    seen = {}

    def spy(name):
        original = getattr(train_add, name)

        def called(*arguments, **options):
            result = original(*arguments, **options)
            seen[name] = {**dict(enumerate(arguments)), **options}, result
            return result

        monkeypatch.setattr(train_add, name, called)

    spy("draw"), spy("predict_guided"), spy("distillation_loss")
    run_in_process(train_add, *quick(pipelines, tmp_path, "--guidance_scale", 3, steps=1))
    _, (_, t, _, noise) = seen["draw"]
    asked, output = seen["predict_guided"]
    x_student, x_teacher, weights = seen["distillation_loss"][0].values()
    z, guidance_scale = asked[1], asked[5]
    schedule = NoiseSchedule(load_pipeline(pipelines()).scheduler)
    assert guidance_scale == 3 and torch.equal(asked[2], t) and len(t.unique()) > 1
    torch.testing.assert_close(z, schedule.alpha(t) * x_student + schedule.sigma(t) * noise)
    torch.testing.assert_close(x_teacher, schedule.to_x0(output, z, t))
    assert torch.equal(weights, schedule.alpha(t).flatten()) and x_student.requires_grad


def test_the_discriminator_looks_at_timesteps_of_its_own(pipelines, tmp_path, monkeypatch):
    """Real, fake and mismatched latents of a sample at the same one, which differ from sample to sample."""
    looked, drawn, original_draw, original = [], [], train_add.draw_judged, UNetFeatures.__call__

    def draw_judged(*arguments):
        drawn.append(original_draw(*arguments)[0])
        return original_draw(*arguments)

    def look(self, z, timesteps, conditioning):
        looked.append(timesteps)
        return original(self, z, timesteps, conditioning)

    monkeypatch.setattr(train_add, "draw_judged", draw_judged)
    monkeypatch.setattr(UNetFeatures, "__call__", look)
    run_in_process(train_add, *quick(pipelines, tmp_path, "--mismatched_captions"))
    assert len(drawn) == 2 and all(len(t.unique()) > 1 for t in drawn) and not torch.equal(*drawn)
    assert len(looked) == 6 and all(torch.equal(t, drawn[i // 3]) for i, t in enumerate(looked))


def test_what_dinov2_looks_with_rests(pipelines, dinov2, tmp_path, monkeypatch):
    made = {}
    for name in ("make_sight", "load_frozen"):
        original = getattr(train_add, name)
        keep = lambda *given, name=name, original=original, **more: made.setdefault(name, original(*given, **more))  # noqa: E731
        monkeypatch.setattr(train_add, name, keep)
    run_in_process(train_add, *quick(pipelines, tmp_path, *FAR, *see_with(dinov2)))
    assert same_weights(made["make_sight"].network.model, Dinov2Model.from_pretrained(dinov2))
    for part in ("vae", "text_encoder"):
        assert same_weights(getattr(made["load_frozen"], part), getattr(load_pipeline(pipelines()), part))


def test_cached_rollouts_are_the_same_targets_again(pipelines, tmp_path, monkeypatch):
    """Steps 3 and 4 have the data and targets of 1 and 2, and the discriminator new noise; resume asks anew."""
    targets, calls, judged = [], [], []
    originals = train_add.distillation_loss, train_add.ddim_rollout, train_add.draw_judged

    def loss(x_student, x_teacher, weights):
        targets.append(x_teacher)
        return originals[0](x_student, x_teacher, weights)

    def draw_judged(*arguments):
        judged.append(originals[2](*arguments))
        return judged[-1]

    monkeypatch.setattr(train_add, "distillation_loss", loss)
    monkeypatch.setattr(train_add, "ddim_rollout", lambda *arguments: calls.append(0) or originals[1](*arguments))
    monkeypatch.setattr(train_add, "draw_judged", draw_judged)
    more = ["--distill_target", "sample", "--num_ddim_steps", 2, "--cache_rollouts", 2, "--checkpointing_steps", 1]
    more += ["--discriminator_updates", 2, "--gradient_accumulation_steps", 2, "--batch_size", 2, *FAR]
    run_in_process(train_add, *quick(pipelines, tmp_path / "run", *more, steps=4))
    assert len(targets) == 8 and len(calls) == 4
    assert all(torch.equal(a, b) for a, b in zip(targets[:4], targets[4:]))
    assert len({times.tolist()[0] for times, *_ in judged}) > 8  # of 16: 2 updates of 2 micro-batches in 4 steps
    shutil.copytree(tmp_path / "run/checkpoint-3", tmp_path / "resumed/checkpoint-3")
    resume = ["--resume_from_checkpoint", "latest"]
    run_in_process(train_add, *quick(pipelines, tmp_path / "resumed", *more, *resume, steps=4))
    assert_same(tmp_path / "resumed/checkpoint-4", tmp_path / "run/checkpoint-4")


def test_the_discriminators_learning_rate_starts_with_it(pipelines, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, **_: lines.append(values))
    more = ["--discriminator_start_step", 2, "--lr_scheduler", "linear", "--lr_warmup_steps", 1]
    run_in_process(train_add, *quick(pipelines, tmp_path, *more, "--learning_rate", 0.5, steps=5))
    assert [line["lr"] for line in lines] == pytest.approx([0.5, 0.5, 0.375, 0.25, 0.125])
    assert [line.get("discriminator_lr") for line in lines] == [None, None, *map(pytest.approx, (1e-3, 1e-3, 5e-4))]


def test_an_update_that_is_not_finite_is_skipped_and_counted(pipelines, tmp_path, monkeypatch, capsys):
    """A batch of NaN: neither network, neither optimizer and not the average move, and training goes on."""
    original, calls = train_add.latents_of, []

    def broken(pipeline, batch):
        calls.append(None)
        return original(pipeline, batch) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(train_add, "latents_of", broken)
    run_in_process(train_add, *quick(pipelines, tmp_path / "run", "--checkpointing_steps", 1, steps=3))
    before, after, later = (tensors_of(tmp_path / f"run/checkpoint-{n}") for n in (1, 2, 3))
    for key in before:
        assert torch.equal(before[key], after[key]), key
    for step, counts in ((1, [0, 0]), (2, [1, 1]), (3, [1, 0])):
        assert skipped(tmp_path / f"run/checkpoint-{step}") == {"student": counts, "discriminator": counts}
    assert all(value.isfinite().all() for value in later.values())
    # The average's warm-up counts its own updates, so a resumed run goes on as the whole one did.
    monkeypatch.setattr(train_add, "latents_of", original)
    shutil.copytree(tmp_path / "run/checkpoint-2", tmp_path / "resumed/checkpoint-2")
    more = ["--resume_from_checkpoint", "latest"]
    run_in_process(train_add, *quick(pipelines, tmp_path / "resumed", *more, steps=3))
    assert_same(tmp_path / "resumed/checkpoint-3", tmp_path / "run/checkpoint-3")
    assert skipped(tmp_path / "resumed/checkpoint-3") == skipped(tmp_path / "run/checkpoint-3")


def test_too_many_skipped_in_a_row_end_the_run(pipelines, tmp_path, monkeypatch, capsys):
    """And keep what came before them, beside the older checkpoint; past the broken batches, a resume goes on."""
    original, calls = train_add.latents_of, []

    def broken(pipeline, batch):
        calls.append(None)
        return original(pipeline, batch) * (float("nan") if len(calls) > 2 else 1)

    monkeypatch.setattr(train_add, "latents_of", broken)
    more = ["--checkpointing_steps", 2, "--checkpoints_total_limit", 1, "--max_skipped_updates", 2]
    error = error_of(train_add, quick(pipelines, tmp_path, *more, steps=5), capsys)
    assert "error: 2 updates of the student in a row had no finite gradient, up to step 4; checkpoint-4 keeps" in error
    assert not (tmp_path / "final").exists()
    before, after = (tensors_of(tmp_path / f"checkpoint-{n}") for n in (2, 4))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert skipped(tmp_path / "checkpoint-4")["student"] == [2, 2]
    monkeypatch.setattr(train_add, "latents_of", original)
    run_in_process(train_add, *quick(pipelines, tmp_path, *more, "--resume_from_checkpoint", "latest", steps=5))
    assert skipped(tmp_path / "checkpoint-5") == {"student": [2, 0], "discriminator": [2, 0]}


def test_image_conditioning_is_left_out_at_pure_noise(pipelines, dinov2, tmp_path, monkeypatch):
    conditions, times = [], []
    original, original_predict = train_add.judge, train_add.predict

    def spy(heads, real, fake, condition, *arguments):
        conditions.append(condition)
        return original(heads, real, fake, condition, *arguments)

    def spy_predict(unet, z, timesteps, *arguments):
        times.append(timesteps)
        return original_predict(unet, z, timesteps, *arguments)

    monkeypatch.setattr(train_add, "judge", spy)
    monkeypatch.setattr(train_add, "predict", spy_predict)
    run_in_process(train_add, *quick(pipelines, tmp_path, *see_with(dinov2), "--train_batch_size", 8, steps=1))
    image = conditions[0][:, -16:]
    assert torch.equal((image == 0).all(dim=1), times[0] == 999) and (times[0] == 999).any() and (times[0] < 999).any()


def test_accumulation_is_the_large_batch(pipelines, uninterrupted, tmp_path):
    more = [*FAR, "--discriminator_updates", 2]
    split = ["--gradient_accumulation_steps", 4, "--batch_size", 1]
    run_in_process(train_add, *quick(pipelines, tmp_path / "split", *more, *split))
    assert_same(tmp_path / "split/checkpoint-2", uninterrupted / "checkpoint-2", **CLOSE)
    with pytest.raises(AssertionError):  # the tolerance tells one step from the next
        assert_same(uninterrupted / "checkpoint-1", uninterrupted / "checkpoint-2", **CLOSE)
    more += ["--r1_form", "finite_difference"]
    run_in_process(train_add, *quick(pipelines, tmp_path / "finite", *more))
    run_in_process(train_add, *quick(pipelines, tmp_path / "finite_split", *more, *split))
    assert_same(tmp_path / "finite_split/checkpoint-2", tmp_path / "finite/checkpoint-2", **CLOSE)


@pytest.mark.parametrize("discriminator", ["unet", "dinov2"])
def test_mismatched_captions_are_the_same_however_the_batch_is_split(pipelines, dinov2, tmp_path, discriminator):
    more = ["--mismatched_captions", *FAR, *(see_with(dinov2) if discriminator == "dinov2" else [])]
    run_in_process(train_add, *quick(pipelines, tmp_path / "whole", *more))
    split = ["--gradient_accumulation_steps", 2, "--batch_size", 2]
    run_in_process(train_add, *quick(pipelines, tmp_path / "split", *more, *split))
    assert_same(tmp_path / "whole/checkpoint-2", tmp_path / "split/checkpoint-2", **CLOSE)
    run_in_process(train_add, *quick(pipelines, tmp_path / "without", *more[1:]))
    heads = [load_file(tmp_path / run / "checkpoint-2/discriminator.safetensors") for run in ("whole", "without")]
    assert not torch.equal(*(torch.cat([x.flatten() for x in tensors.values()]) for tensors in heads))


def test_two_processes_are_one(pipelines, uninterrupted, tmp_path):
    """Up to the order of a sum; the heads' gradients too, which DDP averages with R1's double backward in them."""
    more = [*FAR, "--discriminator_updates", 2, "--checkpointing_steps", 2, "--batch_size", 2]
    fork_and_wait(tmp_path, SCRIPT, *quick(pipelines, tmp_path, *more, steps=4), processes=2)
    assert_same(tmp_path / "checkpoint-4", uninterrupted / "checkpoint-4", **CLOSE)
    shutil.rmtree(tmp_path / "checkpoint-4")
    run_in_process(
        train_add, *quick(pipelines, tmp_path, *more[:-1], 4, "--resume_from_checkpoint", "latest", steps=4)
    )
    assert_same(tmp_path / "checkpoint-4", uninterrupted / "checkpoint-4", **CLOSE)


def test_resume_is_bit_for_bit_with_both_networks(pipelines, uninterrupted, tmp_path):
    """Discriminator and its optimizer too, with two updates a step."""
    shutil.copytree(uninterrupted / "checkpoint-2", tmp_path / "checkpoint-2")
    more = [*FAR, "--discriminator_updates", 2, "--resume_from_checkpoint", "latest"]
    run_in_process(train_add, *quick(pipelines, tmp_path, *more, steps=4))
    assert_same(tmp_path / "checkpoint-4", uninterrupted / "checkpoint-4")


def test_a_student_model_is_the_start(pipelines, uninterrupted, tmp_path):
    """A step of no length leaves what it started as."""
    start = uninterrupted / "final"
    more = ["--student_model", start, "--learning_rate", 1e-30]
    run_in_process(train_add, *quick(pipelines, tmp_path, *more, steps=1))
    assert same_weights(load_pipeline(tmp_path / "final").unet, load_pipeline(start).unet)
    assert not same_weights(load_pipeline(start).unet, load_pipeline(pipelines()).unet)


# The output


def test_image_to_image_in_two_steps(uninterrupted, tmp_path, monkeypatch):
    """As SD-Turbo does: two steps at strength 0.5 are one pass, at the second timestep, from the image."""
    times, original = [], UNet2DConditionModel.forward

    def forward(self, sample, timestep, *arguments, **more):
        times.append(int(timestep))
        return original(self, sample, timestep, *arguments, **more)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    made = []
    for color in ("red", "blue"):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{color}.png")
        run_in_process(
            inference,
            "--pretrained_model_name_or_path",
            uninterrupted / "final",
            "--steps",
            2,
            "--strength",
            0.5,
            "--init_image",
            tmp_path / f"{color}.png",
            "--prompt",
            "a ring",
            "--outdir",
            tmp_path / color,
            "--clip_model",
            "none",
            "--device",
            "cpu",
        )
        made += [Image.open(path).tobytes() for path in (tmp_path / color / "images").rglob("*.png")]
    assert set(times) == {499} and len(made) == 2 and made[0] != made[1]
