"""prepare_cache.py and what reads it: the run without a cache bit for bit, and other runs' caches refused."""

import importlib
import json
import shutil
import signal
import time

import pytest
import torch
from conftest import fork, launch, run_in_process
from launching import SHAPES, SMALL, assert_same, copied, error_of, flags, fork_and_wait, preparing, quick, start_from
from safetensors.torch import load_file, save_file

import prepare_cache
from common.cache import INDEX, CachedDataset, Rows, read_index
from common.data import load_dataset_from_args

CACHED = [
    ("train_flash_lora", "sd"),
    ("train_lcm", "v"),
    ("train_guided", "sdxl"),
    ("train_progressive", "sd"),
    ("train_add", "sdxl"),
    ("train_student_kd", "v"),
    ("prune_and_quantize", "sd"),
]


# Samples


@pytest.mark.parametrize(
    "name, kind", [pytest.param(*case, marks=pytest.mark.xdist_group(case[0])) for case in CACHED]
)
def test_training_from_a_cache_is_training_without_one(pipelines, pictures, caches, tmp_path, name, kind):
    """Weights, averages and optimizer after two epochs; without the data, which the cache stands for; resumed too."""
    script = importlib.import_module(name)
    lora = ["--lora_rank", 2] if name in ("train_lcm", "train_guided") else []
    data = ["--data_dir", pictures, "--center_crop", "--random_flip"]
    run_in_process(script, *flags(pipelines, name, tmp_path / "plain", *lora, data=data, kind=kind))
    cached = ["--cache_dir", caches(kind), "--random_flip"]
    run_in_process(script, *flags(pipelines, name, tmp_path / "cached", *lora, data=cached, kind=kind))
    assert_same(name, tmp_path / "plain", tmp_path / "cached")
    start_from(name, tmp_path / "plain", tmp_path / "resumed")
    resumed = flags(pipelines, name, tmp_path / "resumed", *lora, data=[*data, *cached[:2]], kind=kind)
    run_in_process(script, *resumed, "--resume_from_checkpoint", "latest")
    assert_same(name, tmp_path / "plain", tmp_path / "resumed")


def test_encoders_are_not_loaded_beside_a_cache_but_for_samples(pipelines, caches, tmp_path, monkeypatch):
    import train_guided

    loaded, load = [], train_guided.load_frozen
    monkeypatch.setattr(train_guided, "load_frozen", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    arguments = flags(pipelines, "train_guided", tmp_path / "a", data=["--cache_dir", caches()], steps=2)
    run_in_process(train_guided, *arguments)
    assert loaded[0].vae is None and loaded[0].text_encoder is None and loaded[0].vae_scale_factor == 4
    arguments[arguments.index(tmp_path / "a")] = tmp_path / "b"
    run_in_process(train_guided, *arguments, "--validation_prompts", "a ring", "--validation_steps", 1)
    assert (tmp_path / "b/samples/step-2.png").is_file() and loaded[1].vae is not None


def test_every_caption_and_the_mirrored_image_are_there(pipelines, pictures, caches):
    from PIL import Image

    args = prepare_cache.parse_args([str(word) for word in preparing(pipelines, pictures, "unused")])
    args.cache_dir, args.rollout_cache = str(caches()), None
    cached = CachedDataset(args)
    assert cached.size == 11 and cached.captions(3) == ["picture 3", "another word for it"]
    assert cached.captions(4) == ["picture 5"]  # in the place of the broken one
    args.cache_dir = None
    plain = load_dataset_from_args(args)
    for step in range(3):
        for index in (0, 3, 4, 10):
            ours, theirs = cached[index, step, 7], plain[index, step, 7]
            assert ours["caption"] == theirs["caption"] and torch.equal(ours["time_ids"], theirs["time_ids"])
    with Image.open(pictures / "01.png") as image:
        width, height = image.size
    side = min(width, height)
    corner = [round((length - side) / 2) * 32 / side for length in (height, width)]
    assert cached[1, 0, 0]["time_ids"].tolist() == pytest.approx([height, width, *corner, 32, 32], abs=0.5)


def test_shapes_are_cached_by_their_seed(pipelines, tmp_path, capsys):
    """The first so many: a run takes their number, and another seed renders others."""
    import train_guided

    folder, model = tmp_path / "cache", ["--pretrained_model_name_or_path", pipelines(), *SHAPES]
    run_in_process(prepare_cache, *model, *SMALL, "--cache_dir", folder, "--max_train_samples", 8)
    run = ["--cache_dir", folder]
    run_in_process(train_guided, *quick(pipelines, tmp_path / "run", data=run, steps=1))
    error = error_of(train_guided, quick(pipelines, tmp_path / "other", "--seed", 1, data=run, steps=1), capsys)
    assert "rendered by --seed 0, not 1" in error


# Roll-outs


@pytest.mark.parametrize("teacher_steps, solver", [("even", "ddim"), ("proportional", "dpmsolver++")])
def test_rollouts_are_what_the_teacher_does(pipelines, pictures, tmp_path, teacher_steps, solver):
    """A record's z, taken by the teacher from t to its end, is its target; with its states between."""
    from common.conditioning import encode_empty_prompt, encode_prompts, predict_guided
    from common.diffusion import NoiseSchedule, ddim_rollout
    from common.pipelines import load_pipeline

    folder = tmp_path / "rollouts"
    line = [*preparing(pipelines, pictures, folder, "v"), "--rollouts", 9, "--num_ddim_steps", 3, "--keep_states"]
    run_in_process(prepare_cache, *line, "--teacher_steps", teacher_steps, "--solver", solver)
    rows = Rows(folder, read_index(folder, "--rollout_cache", "rollouts"), "--rollout_cache")
    pipeline = load_pipeline(pipelines("v"))
    schedule, empty = NoiseSchedule(pipeline.scheduler), encode_empty_prompt(pipeline, 32)
    small = rows.table(0)
    assert rows.size == 9 and set(small["timesteps"]) <= {999, 749, 499, 249} and set(small["ends"]) == {-1}
    for row in range(rows.size):
        text = encode_prompts(pipeline, [rows.caption(0, int(small["caption"][row]))["caption"]], 32)
        times, states = torch.tensor([int(small["timesteps"][row])]), []

        def guided(z, t, rows, text=text):
            return predict_guided(pipeline.unet, z, t, text, empty, 7.5)

        z = rows.row("z", 0, row)[None]
        with torch.no_grad():
            steps = 3, teacher_steps == "proportional", solver, states
            end = ddim_rollout(guided, schedule, z, times, torch.tensor([-1]), *steps)
        torch.testing.assert_close(end[0], rows.row("target", 0, row), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.cat(states), rows.row("states", 0, row), atol=1e-4, rtol=1e-4)


READS_ROLLOUTS = {  # what each asks of the roll-outs, and of itself
    "train_flash_lora": ([], []),
    "train_student_kd": ([], []),
    "train_add": ([], ["--distill_target", "sample", "--num_ddim_steps", 2]),
    "train_lcm": (["--target", "next", "--num_inference_steps", 50], ["--lora_rank", 2]),
    "train_progressive": (["--target", "next"], []),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in READS_ROLLOUTS])
def test_rollouts_train_without_the_teacher_and_resume(pipelines, pictures, caches, tmp_path, monkeypatch, name):
    script = importlib.import_module(name)
    asked, own = READS_ROLLOUTS[name]
    steps = ["--num_inference_steps", 2] if name in ("train_flash_lora", "train_add", "train_progressive") else []
    folder = caches("sd", "--rollouts", 10, "--num_ddim_steps", 1 if name == "train_lcm" else 2, *steps, *asked)
    if name != "train_student_kd":
        monkeypatch.setattr(script, "teach", None)  # none is asked
    more = [*own, "--rollout_cache", folder]
    line = flags(pipelines, name, tmp_path / "run", *more, data=[], steps=2 if name == "train_progressive" else 4)
    run_in_process(script, *line)
    if name != "train_progressive":
        start_from(name, tmp_path / "run", tmp_path / "resumed")
        resumed = flags(pipelines, name, tmp_path / "resumed", *more, data=[])
        run_in_process(script, *resumed, "--resume_from_checkpoint", "latest")
        assert_same(name, tmp_path / "run", tmp_path / "resumed")


def test_some_rollouts_are_made_anew(pipelines, pictures, caches, tmp_path, monkeypatch):
    """By --rollout_refresh a share of the steps asks the teacher: the same steps in a resumed run."""
    import train_flash_lora

    folder = caches("sd", "--rollouts", 10, "--num_ddim_steps", 2, "--num_inference_steps", 2)
    asked, teach = [], train_flash_lora.teach
    monkeypatch.setattr(train_flash_lora, "teach", lambda *a: asked.append(1) or teach(*a))
    for cached in (["--rollout_cache", folder], [*SHAPES, "--cache_rollouts", 2]):
        asked.clear()
        run = tmp_path / cached[0].strip("-")
        more = ["--rollout_refresh", 0.5]
        line = flags(pipelines, "train_flash_lora", run / "a", *more, data=cached, steps=8)
        run_in_process(train_flash_lora, *line)
        assert 2 < len(asked) < 8
        start_from("train_flash_lora", run / "a", run / "b", checkpoint="checkpoint-4")
        resumed = flags(pipelines, "train_flash_lora", run / "b", *more, data=cached, steps=8)
        run_in_process(train_flash_lora, *resumed, "--resume_from_checkpoint", "latest")
        assert_same("train_flash_lora", run / "a", run / "b", step=8)


def test_images_are_not_read_for_rollouts_in_memory(pipelines, tmp_path, monkeypatch):
    import train_flash_lora
    from common.data import ShapesDataset

    read, get = [], ShapesDataset.__getitem__
    monkeypatch.setattr(ShapesDataset, "__getitem__", lambda self, key: read.append(key) or get(self, key))
    run_in_process(train_flash_lora, *flags(pipelines, "train_flash_lora", tmp_path, "--cache_rollouts", 2, steps=6))
    assert len(read) == 2 * 4


# What is refused


def test_a_cache_of_something_else_is_refused_by_what_differs(pipelines, pictures, caches, tmp_path, capsys):
    import train_flash_lora

    changed = copied(pictures, tmp_path / "pictures")
    (changed / "00.png").write_bytes((changed / "01.png").read_bytes())
    other = tmp_path / "model"
    shutil.copytree(pipelines(), other)
    weights = load_file(other / "vae/diffusion_pytorch_model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, other / "vae/diffusion_pytorch_model.safetensors")
    teacher = tmp_path / "teacher"
    shutil.copytree(pipelines(), teacher)
    weights = load_file(teacher / "unet/diffusion_pytorch_model.safetensors")
    save_file({n: value + 1 for n, value in weights.items()}, teacher / "unet/diffusion_pytorch_model.safetensors")
    samples = ["--cache_dir", caches()]
    rollouts = ["--rollout_cache", caches("sd", "--rollouts", 10, "--num_ddim_steps", 2, "--num_inference_steps", 2)]
    for more, said in (
        ([*samples, "--pretrained_model_name_or_path", other], "another vae"),
        ([*samples, "--data_dir", changed], "another data"),
        ([*samples, "--mixed_precision", "bf16"], "dtype float32, not bfloat16"),
        ([*samples, "--resolution", 64], "resolution 32, not 64"),
        ([*rollouts, "--pretrained_model_name_or_path", teacher], "another teacher"),
        ([*rollouts, "--num_ddim_steps", 4], "num_ddim_steps 2, not 4"),
        ([*rollouts, "--guidance_scale", 3], "guidance_scale 7.5, not 3.0"),
        ([*rollouts, "--cache_rollouts", 2], "leave one of them out"),
        (["--cache_dir", rollouts[1]], "it holds rollouts, which --rollout_cache reads"),
        (["--rollout_cache", samples[1]], "it holds samples, which --cache_dir reads"),
        (["--cache_dir", tmp_path / "nowhere"], "there is no cache"),
        ([*SHAPES, "--rollout_refresh", 0.5, "--cache_rollouts", 0], "--rollout_refresh is about"),
    ):
        line = flags(pipelines, "train_flash_lora", tmp_path / "run", *more, data=[])
        error = error_of(train_flash_lora, line, capsys)
        assert said in error and error.count("\n") == 1, error
    more = "--max_train_samples", 5
    error = error_of(prepare_cache, [*preparing(pipelines, pictures, caches()), *more], capsys)
    assert "--overwrite_cache" in error and error.count("\n") == 1
    line = preparing(pipelines, pictures, caches())
    line.remove("--random_flip")
    assert "flipped True, not False" in error_of(prepare_cache, line, capsys)
    line = preparing(pipelines, pictures, tmp_path / "new")
    line.remove("--center_crop")
    assert "--center_crop" in error_of(prepare_cache, line, capsys)


# Processes


def test_killed_while_writing_it_goes_on_and_two_processes_write_the_same(pipelines, tmp_path, monkeypatch):
    """Of 2,100 shapes three shards: by one process, by one that is killed after the first, and by two."""
    model = ["--pretrained_model_name_or_path", pipelines(), *SHAPES, "--resolution", 32, "--batch_size", 64]
    line = [*model, "--max_train_samples", 2100, "--cache_dir"]
    killed = tmp_path / "killed"
    process = fork("prepare_cache.py", *line, killed, output=tmp_path / "said.txt")
    while not (killed / "shard-00000.safetensors").is_file():
        assert process.poll() is None, (tmp_path / "said.txt").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not json.loads((killed / INDEX).read_text()).get("shards")
    first = (killed / "shard-00000.safetensors").stat().st_mtime_ns
    fork_and_wait(tmp_path, "prepare_cache.py", *line, killed)
    assert (killed / "shard-00000.safetensors").stat().st_mtime_ns == first
    launch("prepare_cache.py", *line, tmp_path / "two", processes=2)
    for name in ("cache.json", *(f"shard-0000{number}.safetensors" for number in range(3))):
        assert (killed / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.xdist_group("train_guided")
def test_two_processes_read_what_one_wrote(pipelines, caches, tmp_path):
    line = ["--cache_dir", caches(), "--batch_size", 2]
    launch("train_guided.py", *flags(pipelines, "train_guided", tmp_path / "two", data=line), processes=2)
    import train_guided

    line = flags(pipelines, "train_guided", tmp_path / "one", data=[*line[:2], "--batch_size", 4])
    run_in_process(train_guided, *line)
    assert_same("train_guided", tmp_path / "one", tmp_path / "two", atol=1e-5, rtol=1e-3)


# Size


def test_a_million_records_open_at_once_and_stay_small(tmp_path):
    """Opening looks at the shards' sizes alone, and reading leaves nothing behind but their small tables."""
    import resource

    from benchmarks.cache import write_synthetic

    folder = write_synthetic(tmp_path / "cache", 1_000_000)
    began = time.perf_counter()
    rows = Rows(folder, read_index(folder, "--cache_dir", "samples"), "--cache_dir")
    assert rows.size == 1_000_000 and time.perf_counter() - began < 60
    generator = torch.Generator().manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in torch.randint(rows.size, (3000,), generator=generator).tolist():
        shard, row = rows.place(index)
        assert rows.row("latents", shard, row, 0).shape == (4, 2, 2)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6 < 0.5  # GB
