"""optimize_sds.py: its losses and their gradients, volumes and their files, runs that are killed, split, judged."""

import functools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, read_json, run_in_process
from launching import QUICK, assert_every_flag_has_help, error_of, fork_and_wait, kill_9_while_saving, start_from
from PIL import Image
from safetensors.torch import load_file

import optimize_sds
from common.checkpoint import checkpoints_in
from common.conditioning import encode_empty_prompt, encode_images, encode_prompts, predict_guided
from common.contract import write_distillation
from common.diffusion import NoiseSchedule
from common.lora import add_lora
from common.pipelines import load_pipeline
from common.volumes import BLOB, RADIUS, Volumes, camera_rays, compositing_weights, dense_points, view_of, write_ply
from optimize_sds import (
    csd,
    distillation_loss,
    draw,
    nfsd,
    pixel_gradient,
    sds,
    teach,
    timestep_range,
    timestep_weights,
    vsd,
)

PROMPTS = ["a small red circle on a white background", "a large blue ring on a gray background"]
VARIANTS = {
    "image": ["--loss", "vsd", "--num_images", 2, "--lora_rank", 2, "--anneal_timesteps", "sqrt"],
    "volume": ["--target", "volume", "--grid_size", 8, "--samples_per_ray", 8, "--render_size", 16],
}
SPLIT = dict(atol=2e-5, rtol=1e-3)  # the order of a sum, through Adam


def flags(pipelines, folder, *more, steps=4, kind="sd"):
    model = ["--pretrained_model_name_or_path", pipelines(kind), "--prompt", *PROMPTS, "--output_dir", folder]
    return [*QUICK, *model, "--max_steps", steps, "--checkpointing_steps", 2, *more]


def asked(loss):
    return SimpleNamespace(loss=loss, lora_rank=2, lora_alpha=4.0, lora_targets=["to_q", "to_v"])


@pytest.fixture(scope="module")
def loaded(pipelines):
    """`loaded(kind)`: a random pipeline, loaded once."""
    return functools.cache(lambda kind: load_pipeline(pipelines(kind)))


@pytest.fixture
def scene(loaded):
    """`scene(kind)`: a random teacher, its schedule, latents, noise, timesteps and conditionings of two samples."""

    def get(kind):
        pipeline = loaded(kind)
        generator = torch.Generator().manual_seed(0)
        x, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
        empty = encode_empty_prompt(pipeline, 32)
        return SimpleNamespace(
            pipeline=pipeline,
            schedule=NoiseSchedule(pipeline.scheduler),
            x=x.requires_grad_(),
            noise=noise,
            timesteps=torch.tensor([700, 100]),
            given=encode_prompts(pipeline, PROMPTS, 32),
            empty=empty,
            negative=encode_prompts(pipeline, ["a ring"], 32).expand(2),
        )

    return get


def direction_of(s, loss, guidance_scale):
    z = s.schedule.add_noise(s.x, s.noise, s.timesteps)
    conditionings = s.given, s.empty.expand(2), s.negative
    unet = s.pipeline.unet
    return teach(asked(loss), unet, s.schedule, z, s.timesteps, s.noise, *conditionings, guidance_scale)


# The losses


@pytest.mark.parametrize("kind", ["sd", "v", "sdxl"])
@pytest.mark.parametrize("guidance_scale", [1, 7.5])
def test_the_gradient_of_sds_is_weighted_and_never_the_unets(scene, kind, guidance_scale):
    """w(t) (eps^ - eps), for noise and v predictions alike, though the UNet's input depends on x."""
    s = scene(kind)
    s.pipeline.unet.requires_grad_(True)
    weights = timestep_weights(s.schedule, s.timesteps, "sigma2")
    distillation_loss(s.x, weights * direction_of(s, "sds", guidance_scale)).backward()
    z = s.schedule.add_noise(s.x, s.noise, s.timesteps)
    with torch.no_grad():
        output = predict_guided(s.pipeline.unet, z, s.timesteps, s.given, s.empty, guidance_scale)
    expected = s.schedule.sigma(s.timesteps) ** 2 * (s.schedule.to_epsilon(output, z, s.timesteps) - s.noise)
    torch.testing.assert_close(2 * s.x.grad, expected, atol=1e-5, rtol=1e-4)  # the loss is a mean of two
    assert expected.abs().mean() > 0.1 and all(p.grad is None for p in s.pipeline.unet.parameters())
    s.pipeline.unet.requires_grad_(False)


def test_a_distillation_loss_counts_how_large_the_gradient_is():
    x, gradient = torch.randn(2, 4, 8, 8), torch.ones(2, 4, 8, 8)
    torch.testing.assert_close(distillation_loss(x, gradient), torch.tensor(4 * 8 * 8 / 2))


def test_csd_is_the_guidance_of_sds(scene):
    s = scene("sd")
    torch.testing.assert_close(
        direction_of(s, "csd", 1.0), direction_of(s, "sds", 3.0) - direction_of(s, "sds", 2.0), atol=1e-5, rtol=1e-4
    )
    c, u = torch.randn(2, 2, 4, 8, 8)
    assert torch.equal(csd(c, u), c - u)


def test_nfsd_has_no_noise_of_its_own(scene):
    c, u, negative = torch.randn(3, 2, 4, 8, 8)
    found = nfsd(c, u, negative, torch.tensor([200, 199]), 1000, 7.5)
    torch.testing.assert_close(found[0], u[0] - negative[0] + 7.5 * (c[0] - u[0]))
    torch.testing.assert_close(found[1], u[1] + 7.5 * (c[1] - u[1]))
    s = scene("sd")
    above, below = direction_of(s, "nfsd", 1.0) - direction_of(s, "csd", 1.0)
    ours = direction_of(s, "sds", 0.0) + s.noise  # eps_u
    assert not torch.allclose(above, ours[0], atol=1e-3)
    torch.testing.assert_close(below, ours[1], atol=1e-5, rtol=1e-4)


def test_vsd_with_a_new_lora_is_guidance_beyond_one(scene):
    """The LoRA says then what the teacher says given the prompt; and as it learns the images, something else."""
    s = scene("sd")
    expected = 6.5 * direction_of(s, "csd", 1.0)
    add_lora(s.pipeline.unet, asked("vsd"))
    torch.testing.assert_close(direction_of(s, "vsd", 7.5), expected, atol=1e-4, rtol=1e-4)
    for name, parameter in s.pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data)
    assert not torch.allclose(direction_of(s, "vsd", 7.5), expected, atol=1e-2)
    s.pipeline.unet.delete_adapters("default")
    c, u, own = torch.randn(3, 2, 4, 8, 8)
    torch.testing.assert_close(vsd(c, u, own, 3.0) + own, sds(c, u, 0 * own, 3.0))


def test_through_the_decoder_pixels_are_drawn_to_the_teachers_picture(scene):
    """y - D(x0), as an error in the teacher's noise: for sds x - sigma / alpha d is its own x0."""
    s = scene("sd")
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    x = encode_images(s.pipeline.vae, pixels)
    z = s.schedule.add_noise(x, s.noise, s.timesteps)
    conditionings = s.given, s.empty.expand(2), s.negative
    d = teach(asked("sds"), s.pipeline.unet, s.schedule, z, s.timesteps, s.noise, *conditionings, 2.0)
    found = pixel_gradient(pixels, x, d, s.timesteps, s.schedule, s.pipeline.vae)
    with torch.no_grad():
        output = predict_guided(s.pipeline.unet, z, s.timesteps, s.given, s.empty, 2.0)
        x0 = s.schedule.to_x0(output, z, s.timesteps)
        decoded = s.pipeline.vae.decode(x0 / s.pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    ratio = s.schedule.alpha(s.timesteps) / s.schedule.sigma(s.timesteps)
    torch.testing.assert_close(found, ratio * (pixels - decoded), atol=1e-4, rtol=1e-3)


def test_weights_and_timesteps(loaded):
    schedule = NoiseSchedule(loaded("sd").scheduler)
    t = torch.tensor([20, 979])
    sigma, alpha = schedule.sigma(t), schedule.alpha(t)
    assert torch.equal(timestep_weights(schedule, t, "one"), torch.ones(2, 1, 1, 1))
    torch.testing.assert_close(timestep_weights(schedule, t, "sigma2"), sigma**2)
    torch.testing.assert_close(timestep_weights(schedule, t, "x0"), sigma / alpha)
    args = SimpleNamespace(min_timestep=0.02, max_timestep=0.98, max_train_steps=100, anneal_timesteps="none")
    assert timestep_range(args, 99, schedule) == (20, 980)
    args.anneal_timesteps = "linear"
    assert [timestep_range(args, step, schedule)[1] for step in (0, 50, 99)] == [980, 500, 30]
    args.anneal_timesteps = "sqrt"
    assert [timestep_range(args, step, schedule)[1] for step in (0, 25, 81)] == [980, 500, 116]


def test_draws_are_the_samples_own():
    args = SimpleNamespace(seed=3)
    whole = draw(args, 7, range(500), (1, 2, 2), 20, 60, 999)
    for a, b in zip(whole, draw(args, 7, range(100, 110), (1, 2, 2), 20, 60, 999)):
        places = slice(100, 110)
        assert torch.equal(a[places] if len(a) == 500 else a[:, places], b)
    timesteps, noise, cameras = whole
    assert timesteps[0].min() == 20 and timesteps[0].max() == 60 and timesteps[1].max() > 950
    assert not torch.equal(noise[0], noise[1]) and cameras.min() >= 0 and cameras.max() < 1


# Volumes


def ball(radius=0.5, size=33, color=(1.0, -1.0, -1.0)):
    """A Volumes of one opaque ball on a black background, in the middle, of one colour."""
    line = torch.linspace(-1, 1, size)
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    distance = (x**2 + y**2 + z**2).sqrt()
    inside = torch.where(distance < radius, 1e3, -1e3) - BLOB * (1 - 2 * distance)
    grid = torch.stack([inside, *(torch.full_like(x, 9 * c) for c in color)])[None]
    return Volumes(grid, num_samples=96, learns_background=False)


def looked_at(volumes, azimuth=0.0, elevation=0.0, size=31, background=-1.0):
    pixels, opacity = volumes(
        torch.tensor([0]), torch.tensor([azimuth]), torch.tensor([elevation]), size, torch.full((1, 3), background)
    )
    return pixels[0], opacity[0]


@pytest.mark.parametrize("azimuth, elevation", [(0.0, 0.0), (90.0, 30.0), (-135.0, -80.0)])
def test_a_ball_has_its_colour_and_size_from_everywhere(azimuth, elevation):
    with torch.no_grad():
        pixels, opacity = looked_at(ball(), azimuth, elevation)
    torch.testing.assert_close(pixels[:, 15, 15], torch.tensor([1.0, -1.0, -1.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([-1.0, -1.0, -1.0]))
    seen = (opacity > 0.5).sum().item() / 31**2
    half = np.tan(np.deg2rad(20))
    expected = np.pi * (0.5 / (RADIUS**2 - 0.5**2) ** 0.5 / half) ** 2 / 4
    assert abs(seen - expected) < 0.2 * expected and opacity.max() <= 1 + 1e-5


def test_nothing_is_the_background():
    empty = Volumes(torch.full((1, 4, 5, 5, 5), -1e3), num_samples=8, learns_background=False)
    for background in (-1.0, 0.25):
        pixels, opacity = looked_at(empty, background=background)
        assert opacity.abs().max() < 1e-6 and (pixels - background).abs().max() < 1e-5
    learned = Volumes(torch.full((1, 4, 5, 5, 5), -1e3), num_samples=8)
    learned.background.data[:] = torch.tensor([9.0, 0.0, -9.0])
    with torch.no_grad():
        torch.testing.assert_close(looked_at(learned)[0][:, 0, 0], torch.tensor([1.0, 0.0, -1.0]))


def test_what_is_near_hides_what_is_far():
    weights = compositing_weights(torch.tensor([[0.0, 2.0, 1.0], [1e4, 5.0, 0.0]]), 0.5)
    first = 1 - np.exp(-1.0)
    expected = torch.tensor([[0, first, np.exp(-1.0) * (1 - np.exp(-0.5))], [1, 0, 0]], dtype=torch.float32)
    torch.testing.assert_close(weights, expected)
    random = compositing_weights(torch.rand(50, 40) * 100, 0.1)
    assert random.min() >= 0 and random.sum(dim=-1).max() <= 1 + 1e-5


def test_cameras_look_at_the_origin_with_up_above():
    azimuths, elevations = torch.tensor([0.0, 90.0, 200.0]), torch.tensor([0.0, 0.0, 40.0])
    origins, directions = camera_rays(azimuths, elevations, 9)
    torch.testing.assert_close(origins.norm(dim=1), torch.full((3,), RADIUS))
    torch.testing.assert_close(directions[:, 4, 4], -origins / RADIUS, atol=1e-5, rtol=0)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(3, 9, 9))
    torch.testing.assert_close(origins[:2], RADIUS * torch.tensor([[0.0, 0, 1], [1, 0, 0]]), atol=1e-5, rtol=0)
    assert (directions[:, 0, 4, 1] > directions[:, 8, 4, 1]).all()  # the first row is the upper one
    assert directions[0, 4, 0, 0] < 0 < directions[0, 4, 8, 0]  # and from the front, +x is on the right
    views = view_of(torch.tensor([0.0, 359.0, 100.0, -100.0, 180.0, 0.0]), torch.tensor([0.0, 10, 0, 0, 0, 80]))
    assert views.tolist() == [0, 0, 1, 1, 2, 3]


def test_a_gradient_reaches_grid_and_background():
    volumes = Volumes(0.1 * torch.randn(2, 4, 6, 6, 6), num_samples=8)
    looked_at(volumes)[0].square().sum().backward()
    assert volumes.grid.grad[0].abs().sum(dim=(1, 2, 3)).min() > 0 and volumes.background.grad[0].abs().min() > 0
    assert not volumes.grid.grad[1].any() and not volumes.background.grad[1].any()  # which nobody looked at


def read_ply(path):
    """(places, colours) of a binary PLY of our own, read by its header alone."""
    header, _, body = path.read_bytes().partition(b"end_header\n")
    lines = header.decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    kinds = {"float": "<f4", "uchar": "u1"}
    fields = [(line.split()[2], kinds[line.split()[1]]) for line in lines if line.startswith("property")]
    vertices = np.frombuffer(body, dtype=fields)
    assert f"element vertex {len(vertices)}" in lines
    return [np.stack([vertices[name] for name in names], axis=1) for names in ("xyz", ("red", "green", "blue"))]


def test_the_points_of_a_ball_parse_back(tmp_path):
    write_ply(tmp_path / "ball.ply", *dense_points(ball(), 0, size=32))
    places, colors = read_ply(tmp_path / "ball.ply")
    expected = 4 / 3 * np.pi * (0.5 / (2 / 31)) ** 3
    assert abs(len(places) - expected) < 0.2 * expected
    assert np.linalg.norm(places, axis=1).max() < 0.6 and (colors == [255, 0, 0]).all()
    write_ply(tmp_path / "none.ply", torch.empty(0, 3), torch.empty(0, 3, dtype=torch.uint8))
    assert len(read_ply(tmp_path / "none.ply")[0]) == 0


# Runs


@pytest.fixture(scope="module")
def uninterrupted(pipelines, tmp_path_factory):
    """`uninterrupted(variant)`: the folder of four steps in one go, with a checkpoint after the second."""
    made = {}

    def get(variant):
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp(variant)
            run_in_process(optimize_sds, *flags(pipelines, made[variant], *VARIANTS[variant], "--validation_steps", 3))
        return made[variant]

    return get


def assert_same(a, b, **tolerance):
    """All that a checkpoint holds: what is optimised, its average, the LoRA, both optimizers."""
    files = sorted(file.name for file in a.iterdir() if file.name != "state.json")
    assert files == sorted(file.name for file in b.iterdir() if file.name != "state.json") and len(files) >= 3
    for name in files:
        if name.endswith(".bin"):
            states = (torch.load(folder / name, weights_only=True)["state"] for folder in (a, b))
            ours, theirs = ({f"{i}.{k}": v for i, s in state.items() for k, v in s.items()} for state in states)
        else:
            ours, theirs = load_file(a / name), load_file(b / name)
        assert ours.keys() == theirs.keys() and ours
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], **(tolerance or dict(atol=0, rtol=0)), msg=key)


@pytest.mark.parametrize("variant", VARIANTS)
def test_kill_9_while_saving_and_resume_bit_for_bit(pipelines, uninterrupted, tmp_path, variant):
    arguments = flags(pipelines, tmp_path / "run", *VARIANTS[variant])
    kill_9_while_saving(tmp_path, ".checkpoint-4.tmp", ROOT / "optimize_sds.py", *arguments)
    assert [step for step, _ in checkpoints_in(tmp_path / "run")] == [2]
    run_in_process(optimize_sds, *arguments, "--resume_from_checkpoint", "latest")
    assert_same(tmp_path / "run" / "checkpoint-4", uninterrupted(variant) / "checkpoint-4")
    for name in ("grid.png", f"{variant}.safetensors"):
        theirs = (uninterrupted(variant) / "final" / name).read_bytes()
        assert (tmp_path / "run" / "final" / name).read_bytes() == theirs


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_are_one(pipelines, uninterrupted, tmp_path, variant):
    start_from("optimize_sds", uninterrupted(variant), tmp_path)
    more = [*VARIANTS[variant], "--batch_size", 2, "--resume_from_checkpoint", "latest"]
    fork_and_wait(tmp_path, ROOT / "optimize_sds.py", *flags(pipelines, tmp_path, *more), processes=2)
    assert_same(tmp_path / "checkpoint-4", uninterrupted(variant) / "checkpoint-4", **SPLIT)
    assert (tmp_path / "final" / "results.json").is_file()


def test_accumulated_micro_batches_are_one(pipelines, uninterrupted, tmp_path):
    start_from("optimize_sds", uninterrupted("image"), tmp_path)
    split = ["--gradient_accumulation_steps", 4, "--batch_size", 1, "--resume_from_checkpoint", "latest"]
    run_in_process(optimize_sds, *flags(pipelines, tmp_path, *VARIANTS["image"], *split))
    assert_same(tmp_path / "checkpoint-4", uninterrupted("image") / "checkpoint-4", **SPLIT)


def test_what_is_written(uninterrupted):
    final = uninterrupted("image") / "final"
    report = read_json(final / "results.json")
    assert len(report["images"]) == 4 and report["diversity"] > 0 and report["guidance_scale"] == 7.5
    assert report["settings"]["prompt"] == PROMPTS and 0 <= report["scene_accuracy"][0] <= 1
    for name in report["images"]:
        assert Image.open(final / "images" / f"{name}.png").size == (32, 32)
    assert load_file(final / "image.safetensors")["values"].shape == (4, 4, 8, 8)
    assert not (final / "model_index.json").exists()
    assert (uninterrupted("image") / "samples" / "step-3.png").is_file()
    final = uninterrupted("volume") / "final"
    assert load_file(final / "volume.safetensors")["grid"].shape == (2, 4, 8, 8, 8)
    assert Image.open(final / "turntable.gif").n_frames > 20
    assert len(list((final / "points").glob("*.ply"))) == 2
    assert all(len(a) == len(b) for a, b in map(read_ply, (final / "points").glob("*.ply")))


def test_an_image_is_optimised_as_if_it_were_alone(pipelines, tmp_path):
    """Another prompt beside it, or a batch that comes to it only now and then, changes no scale of its gradient."""
    found = {}
    for name, prompts in (("alone", PROMPTS[:1]), ("both", PROMPTS)):
        folder = tmp_path / name
        more = ["--prompt", *prompts, "--batch_size", 2 * len(prompts), "--anneal_timesteps", "none"]
        more += ["--min_timestep", 0.5, "--max_timestep", 0.5, "--learning_rate", 1e-2]
        run_in_process(optimize_sds, *flags(pipelines, folder, *more, steps=1))
        state = torch.load(folder / "checkpoint-1" / "optimizer.bin", weights_only=True)["state"][0]
        found[name] = state["exp_avg"][0].norm()
    assert 0.5 < found["both"] / found["alone"] < 2


@pytest.mark.parametrize("gradient", ["decoder", "encoder"])
def test_pixels_are_drawn_to_what_the_teacher_sees(pipelines, tmp_path, gradient):
    more = ["--parameterization", "pixels", "--pixel_gradient", gradient, "--loss", "nfsd", "--prompt", *PROMPTS]
    run_in_process(optimize_sds, *flags(pipelines, tmp_path, *more, steps=1, kind="v"))
    values = load_file(tmp_path / "checkpoint-1" / "student.safetensors")["values"]
    assert values.shape == (2, 3, 32, 32) and values.isfinite().all()
    assert read_json(tmp_path / "final" / "results.json")["guidance_scale"] == 7.5


def test_views_have_prompts_of_their_own(pipelines, loaded, tmp_path, monkeypatch):
    encoded, encode = [], optimize_sds.encode_prompts
    monkeypatch.setattr(
        optimize_sds, "encode_prompts", lambda p, texts, r: encoded.append(texts) or encode(p, texts, r)
    )
    rows, pick = [], optimize_sds.teach
    monkeypatch.setattr(optimize_sds, "teach", lambda *a: rows.append(a[6].prompt_embeds) or pick(*a))
    more = [*VARIANTS["volume"], "--view_prompts", "--azimuths", 180, 180, "--background", "random"]
    run_in_process(optimize_sds, *flags(pipelines, tmp_path, *more, steps=1))
    assert encoded[0][:3] == [f"{PROMPTS[0]}, front view", f"{PROMPTS[1]}, front view", f"{PROMPTS[0]}, side view"]
    back = encode(loaded("sd"), [f"{prompt}, back view" for prompt in PROMPTS], 32).prompt_embeds
    assert all(any(torch.allclose(row, other, atol=1e-5) for other in back) for row in rows[0])


# Mistakes


MISTAKES = {
    "a flag of volumes": (["--grid_size", 8], "--grid_size is about --target volume"),
    "a flag of images": (["--target", "volume", "--parameterization", "pixels"], "--parameterization is about"),
    "a flag of vsd": (["--lora_rank", 4], "--lora_rank is about --loss vsd"),
    "a flag of pixels": (["--pixel_gradient", "encoder"], "--pixel_gradient is about pixels"),
    "guidance for csd": (["--loss", "csd", "--guidance_scale", 3], "--guidance_scale is about a loss"),
    "a negative prompt": (["--negative_prompt", "ugly"], "--negative_prompt is about --loss nfsd"),
    "export": (["--export", "fp16"], "--export is about pipelines"),
    "timesteps": (["--min_timestep", 0.5, "--max_timestep", 0.2], "--min_timestep 0.5 is above --max_timestep 0.2"),
    "angles": (["--target", "volume", "--azimuths", 20, 10], "--azimuths 20 10 is no range"),
    "a render too large": (["--target", "volume", "--render_size", 64], "--render_size 64 is more than"),
    "no such layer": (["--loss", "vsd", "--lora_targets", "to_x"], "--lora_targets to_x"),
    "no such judge": (["--clip_model", "nowhere"], "--clip_model"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_sentence(pipelines, tmp_path, capsys, case):
    more, said = MISTAKES[case]
    error = error_of(optimize_sds, flags(pipelines, tmp_path, *more), capsys)
    error = error[error.index("error: ") :]
    assert said in error and error.count("\n") == 1 and not list(tmp_path.glob("checkpoint-*"))


def test_a_model_of_ones_own_needs_a_prompt(pipelines, tmp_path, capsys):
    model = ["--pretrained_model_name_or_path", pipelines("sd"), "--output_dir", tmp_path]
    assert "--prompt, or --prompts_file, says" in error_of(optimize_sds, model, capsys)
    (tmp_path / "prompts.txt").write_text("\n\n")
    empty = [*model, "--prompts_file", tmp_path / "prompts.txt"]
    assert "has no prompt in it" in error_of(optimize_sds, empty, capsys)
    assert "there are 2000 held-out captions" in error_of(optimize_sds, [*model, "--held_out_captions", 2001], capsys)


def test_teachers_without_a_score_are_refused(pipelines, tmp_path, capsys):
    """A few-step student knows its own timesteps alone; where guidance is baked in there is no eps_u."""
    teacher = tmp_path / "teacher"
    shutil.copytree(pipelines("sd"), teacher)
    few = {"steps": 2, "timesteps": [999, 499], "target": "x0"}
    for contract, more, said in (
        (few, [], "timesteps of its own"),
        ({"steps": None, "timesteps": None}, ["--loss", "csd"], "baked into its weights already"),
    ):
        write_distillation(teacher, method="x", guidance="baked", guidance_scale=1.0, **contract)
        arguments = flags(pipelines, tmp_path / "run", "--pretrained_model_name_or_path", teacher, steps=1)
        assert said in error_of(optimize_sds, [*arguments, *more], capsys)
    run_in_process(optimize_sds, *arguments)
    assert read_json(tmp_path / "run" / "final" / "results.json")["guidance_scale"] == 1.0


def test_prompts_given_in_another_way_are_the_same_run(pipelines, uninterrupted, tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps([{"text": prompt} for prompt in PROMPTS]))
    start_from("optimize_sds", uninterrupted("volume"), tmp_path / "run", "checkpoint-4")
    arguments = flags(pipelines, tmp_path / "run", *VARIANTS["volume"], "--resume_from_checkpoint", "latest")
    place = arguments.index("--prompt")
    arguments[place : place + 3] = ["--prompts_file", tmp_path / "prompts.json"]
    run_in_process(optimize_sds, *arguments)
    assert (tmp_path / "run" / "final" / "grid.png").is_file()


def test_every_flag_has_help(monkeypatch):
    assert_every_flag_has_help(optimize_sds, monkeypatch)
