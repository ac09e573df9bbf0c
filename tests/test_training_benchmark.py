"""benchmarks/training.py: what it times, which ratios it prints, what it tells a peer, and what it refuses."""

import argparse
import json
import os
import subprocess
import sys
import tarfile

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from conftest import ROOT, read_json, run_in_process

from benchmarks import peer, timed_steps, training
from common.data import load_dataset_from_args
from common.errors import ModelError, UsageError, UserError
from common.shapes import caption_of, training_sample

TOY = """
import argparse, json, sys, time, torch
from accelerate import Accelerator
parser = argparse.ArgumentParser()
for name in ("pretrained_model_name_or_path", "data_dir", "dataset_name", "report_to", "output_dir"):
    parser.add_argument("--" + name)
for name in ("resolution", "batch_size", "max_steps"):
    parser.add_argument("--" + name, type=int)
parser.add_argument("--overwrite_output_dir", action="store_true")
parser.add_argument("--pause", type=float, default=0.0)
parser.add_argument("--fail", action="store_true")
args = parser.parse_args()
assert args.fail is False, "it fails, as told"
time.sleep(0.5)  # start-up
accelerator = Accelerator(gradient_accumulation_steps=2)
models = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
model, other, optimizer, second = accelerator.prepare(*models, *(torch.optim.SGD(m.parameters()) for m in models))
for step in range(args.max_steps + 2):
    for _ in range(2):
        with accelerator.accumulate(model, other):
            time.sleep(args.pause / 2)
            accelerator.backward((model(torch.ones(1)) + other(torch.ones(1))).sum())
            optimizer.step(), second.step(), second.step(), optimizer.zero_grad(), second.zero_grad()
raise SystemExit("it was not ended")
"""
QUICK = ("--rounds", 1, "--steps", 4, "--warmup", 2, "--threads", 1)


@pytest.fixture
def toy(tmp_path):
    """A script that trains two numbers, with two optimizers and two micro-batches to a step."""
    (tmp_path / "toy.py").write_text(TOY)
    return str(tmp_path / "toy.py")


def notes(speed):
    return {
        "samples_per_second": speed,
        "seconds_per_step": 8 / speed,
        "peak_resident_bytes": 100 + speed,
        "peak_gpu_bytes": None,
        "peak_gpu_reserved_bytes": None,
        "flops": 24e12,
    }


def test_ratios_are_taken_within_a_round():
    sets = {"a": [], "b": ["--x"], "them": None}
    speeds = {"a": (2, 20, 4), "b": (4, 60, 4), "them": (1, 5, 8)}
    found = {(number, name): notes(speed) for name, of in speeds.items() for number, speed in enumerate(of)}
    del found[2, "them"]  # --time_limit came
    first, second, them = training.summary(found, sets, peak_tflops=10)
    assert first["ratio"] == first["ratio_max"] == 1 and first["seconds_per_step"] == 2
    assert (second["ratio_min"], second["ratio"], second["ratio_max"]) == (1, 2, 3)
    assert (second["ratio_low"], second["ratio_high"]) == (1.5, 2.5)
    assert second["against_peer"] == 8 and first["against_peer"] == 3 and "against_peer" not in them
    assert them["ratio"] == pytest.approx((0.5 + 0.25) / 2) and len(them["rounds"]) == 2
    assert second["peak_resident_bytes"] == 160 and "peak_gpu_bytes" not in second
    assert first["tflops"] == 12 and first["share_of_peak"] == 1.2


def test_a_compiled_set_has_the_operations_of_the_same_flags_without_it():
    sets = {"a": ["--x"], "b": ["--torch_compile", "--x"], "c": ["--torch_compile"]}
    found = {(0, name): {**notes(8), "flops": None if name != "a" else 24e12} for name in sets}
    tflops = [row.get("tflops") for row in training.summary(found, sets, peak_tflops=10)]
    assert tflops == [24, 24, None]


def test_sets_of_flags_are_read_as_they_are_meant(pipelines):
    flags = ["--script", "train_lcm.py", "--compare", "", "--torch_compile", "--rollout_cache 'a b'", "--rounds", "2"]
    args = training.parse_args([*flags, "--peer_flags", "--allow_tf32", "--", "--lora_rank", "4"])
    training.check_arguments(args)
    assert args.compare == [[], ["--torch_compile"], ["--rollout_cache", "a b"]] and args.rounds == 2
    assert args.peer_flags == ["--allow_tf32"] and args.rest == ["--lora_rank", "4"]
    args.compare.append([])
    assert list(training.named(args)) == [
        "train_lcm.py",
        "--torch_compile",
        "--rollout_cache 'a b'",
        "train_lcm.py (2)",
    ]


def test_a_command_has_the_flags_of_all_then_those_of_the_set(pipelines):
    args = training.parse_args(["--script", "train_lcm.py", "--resolution", "32", "--", "--lora_rank", "4"])
    training.check_arguments(args)
    command = training.command_of(args, ["--batch_size=3"], "out")
    assert command[0].endswith("train_lcm.py") and command[-3:] == ["--lora_rank", "4", "--batch_size=3"]
    assert command[command.index("--dataset_name") + 1] == "shapes"
    assert training.batch_size_of(command, 16) == 3 and training.batch_size_of(command[:-1], 1) == 16
    for flags in (["--data_dir=coco"], ["--cache_dir", "cache"]):  # either says what data there is
        assert "--dataset_name" not in training.command_of(args, flags, "out")


def test_steps_of_the_first_optimizer_count_until_a_later_stage_brings_another(monkeypatch, tmp_path):
    for name in ("__init__", "step"):  # put back afterwards
        monkeypatch.setattr(AcceleratedOptimizer, name, getattr(AcceleratedOptimizer, name))
    wanted = argparse.Namespace(notes=tmp_path / "notes.json", steps=3, warmup=1, cpu_time=False, flops=True)
    noted = timed_steps.Noted(wanted)
    timed_steps.watch(noted)
    accelerator = Accelerator(cpu=True)

    def prepared():
        model = torch.nn.Linear(2, 3)
        return model, accelerator.prepare(torch.optim.SGD(model.parameters()))

    (model, student), (_, other) = prepared(), prepared()
    other.step()
    assert not noted.ends
    student.step(), other.step()
    assert len(noted.ends) == 1
    _, next_stage = prepared()
    student.step()
    assert len(noted.ends) == 1
    next_stage.step(), next_stage.step()
    written = read_json(wanted.notes)
    assert len(written["ends"]) == 3 and written["accumulation"] == 1 and written["peak_resident_bytes"] > 1e8
    with pytest.raises(SystemExit, match="0"):
        model(torch.ones(5, 2))
        next_stage.step()
    assert read_json(wanted.notes)["flops"] == 2 * 5 * 2 * 3


def test_seconds_per_step_leave_out_the_start_and_the_first_steps():
    assert timed_steps.seconds_per_step([100.0, 110.0, 111.0, 114.0], 2) == 2


def test_a_script_and_a_peer_in_turns(toy, pipelines, tmp_path, capsys):
    reads = "import sys, tarfile; names = tarfile.open(sys.argv[sys.argv.index('--data_dir') + 1]).getnames()\n"
    (tmp_path / "theirs.py").write_text(reads + "assert len(names) == 3 * 5 and '00000004.png' in names" + TOY)
    template = "--pretrained_model_name_or_path {model} --data_dir {shard} --batch_size {batch_size}"
    output = tmp_path / "figures.json"
    flags = (
        "--script",
        toy,
        "--pretrained_model_name_or_path",
        pipelines(),
        "--batch_size",
        2,
        "--work_dir",
        tmp_path,
    )
    theirs = ("--peer_script", tmp_path / "theirs.py", "--peer_samples", 5, "--peer_flags", "--pause 0.2")
    told = ("--peer_template", f"{template} --max_steps {{steps}}", "--output", output)
    run_in_process(training, *flags, *QUICK, *theirs, *told, "--", "--pause", 0.05)
    report = read_json(output)
    ours, peers = report["rows"]
    assert 0.05 < ours["seconds_per_step"] < peers["seconds_per_step"] < 0.5 and peers["seconds_per_step"] > 0.2
    assert ours["rounds"][0]["batch"] == 4 and len(ours["rounds"][0]["ends"]) == 4
    assert ours["samples_per_second"] == pytest.approx(4 / ours["seconds_per_step"])
    assert ours["against_peer"] == pytest.approx(1 / peers["ratio"]) and ours["against_peer"] > 1
    assert "peer: theirs.py" in capsys.readouterr().out and output.with_suffix(".png").is_file()
    assert report["hardware"]["cores"] > 0 and report["date"] and "torch" in report["versions"]
    assert {path.name for path in tmp_path.iterdir()} == {"toy.py", "theirs.py", "figures.json", "figures.png"}


def test_a_set_that_fails(toy, pipelines, tmp_path, capsys):
    flags = ["--script", toy, "--compare", "--fail", "--fail ", "--pretrained_model_name_or_path", pipelines()]
    flags += [*QUICK, "--work_dir", tmp_path]
    with pytest.raises(UserError, match="toy.py as '--fail' ended with 1:\n(.*\n)*.*it fails, as told"):
        run_in_process(training, *flags)
    with pytest.raises(UsageError, match="nothing was measured"):
        run_in_process(training, *flags, "--time_limit", 1e-9)
    assert "--time_limit" in capsys.readouterr().out
    with pytest.raises(UsageError, match="nothing was measured"):
        run_in_process(training, *flags[:3], *flags[4:], "--keep_going")  # one set
    assert "--fail: left out" in capsys.readouterr().out


def test_the_shard_is_read_by_our_own_scripts(tmp_path):
    path = tmp_path / "shapes-000000.tar"
    peer.write_shard(path, 3, 64)
    from train_lcm import parse_args

    args = parse_args(["--data_dir", str(path), "--resolution", "64"])
    dataset = load_dataset_from_args(args)
    pixels, scene = training_sample(0, 2)
    sample = dataset[2, 0, 0]
    assert len(dataset) == 3 and sample["caption"] == caption_of(scene)
    assert torch.equal(sample["pixel_values"][:, ::2, ::2], torch.tensor(pixels).permute(2, 0, 1).float() / 127.5 - 1)
    with tarfile.open(path) as tar:
        record = json.load(tar.extractfile("00000002.json"))
    assert record["original_width"] >= 1024 and record["pwatermark"] <= 0.5  # what diffusers' filter asks for


def test_tokenizers_are_cut_to_what_the_text_encoder_takes(monkeypatch):
    from transformers import PreTrainedTokenizerBase

    from common.small_models import build_tokenizer

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", PreTrainedTokenizerBase.__call__)
    tokenizer = build_tokenizer()
    timed_steps.cut_prompts()
    asked = {"padding": "max_length", "return_tensors": "pt"}
    assert tokenizer(["a"], max_length=77, **asked).input_ids.shape == (1, tokenizer.model_max_length)
    assert tokenizer(["a"], max_length=9, **asked).input_ids.shape == (1, 9)


def test_autocast_can_be_put_off(monkeypatch):
    monkeypatch.setattr(torch, "autocast", torch.autocast)
    timed_steps.no_autocast()
    with torch.autocast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    "flags, error, said",
    [
        (["--script", "nowhere.py"], UsageError, "--script nowhere.py"),
        (["--peer_script", "nowhere.py"], UsageError, "--peer_script nowhere.py"),
        (["--peer_script", "train_lcm.py", "--peer_template", "--x {y}"], UsageError, "--peer_template"),
        (["--steps", "3", "--warmup", "3"], UsageError, "--warmup 3"),
        (["--cpu_time", "--threads", "2"], UsageError, "--cpu_time"),
        (["--compare", "--run_name 'a"], UsageError, "--compare"),
        (["--output", "no/such/folder.json"], UsageError, "--output"),
        (["--resolution", "30"], UsageError, "--resolution 30"),
        (["--pretrained_model_name_or_path", "nowhere/at/all"], ModelError, "nowhere/at/all"),
    ],
)
def test_mistakes_before_anything_runs(flags, error, said, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "run_steps", lambda *_, **__: pytest.fail("ran"))
    monkeypatch.chdir(ROOT)
    script = [] if "--script" in flags else ["--script", "train_lcm.py"]
    with pytest.raises(error, match=said):
        run_in_process(training, *script, *flags, "--work_dir", tmp_path / "work")


@pytest.mark.parametrize(
    "words, variables, said",
    [
        ([], {}, "gpu.sh: torch finds no GPU here"),
        (["fast"], {}, "gpu.sh: fast: it takes variables"),
        ([], {"DRY": "1", "STEPS": "few"}, "gpu.sh: STEPS=few"),
        ([], {"DRY": "1", "SCRIPTS": "train_all.py"}, "gpu.sh: SCRIPTS: there is no train_all.py"),
    ],
)
def test_gpu_sh_refuses_in_one_sentence(words, variables, said, tmp_path):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "OUTPUT_DIR": str(tmp_path), **variables}
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(said) and done.stderr.count("\n") == 1
