"""The promises of the house, held for every training script: what a method computes is in its own test file.

A killed, stopped or split run is the uninterrupted one; a broken loss costs an update, never a run's weights; every
output opens whole, by the code on its own card; a user's mistake is one sentence.
"""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, environment, launch_command, read_json, run_in_process
from diffusers import DiffusionPipeline
from launching import (
    SCRIPTS,
    SHAPES,
    SPLIT,
    assert_every_flag_has_help,
    assert_same,
    checkpoint_tensors,
    error_of,
    every_script,
    flags,
    fork_and_wait,
    inside,
    kill_9_while_saving,
    quick,
    start_from,
    wait_for,
)
from safetensors.torch import load_file

import common.run
import common.stopping
from common.checkpoint import checkpoints_in
from common.errors import UsageError
from common.lora import WEIGHTS, add_lora
from common.outputs import open_output, save_student
from common.pipelines import load_pipeline
from common.schedulers import student_scheduler
from common.stopping import STOPPED, StopSignal

LORA = {
    "train_flash_lora": SCRIPTS["train_flash_lora"],
    "train_lcm": [],
    "train_guided": [],
    "train_progressive": ["--start_steps", 2, "--end_steps", 1, "--steps_per_stage", 1],
    "train_add": SCRIPTS["train_add"],
}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FEED_FORWARD = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
EVERYTHING = [*FEED_FORWARD, "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out", "linear_1"]

# Killed, stopped, split


@every_script
def test_kill_9_while_saving_and_resume_bit_for_bit(pipelines, uninterrupted, tmp_path, name):
    """The killed run had written the weights of its fourth step, but not its optimizer."""
    arguments = flags(pipelines, name, tmp_path / "run")
    kill_9_while_saving(tmp_path, ".checkpoint-4.tmp", ROOT / f"{name}.py", *arguments)
    run = inside(name, tmp_path / "run")
    assert [step for step, _ in checkpoints_in(run)] == [2]
    run_in_process(importlib.import_module(name), *arguments, "--resume_from_checkpoint", "latest")
    assert_same(name, tmp_path / "run", uninterrupted(name))
    assert (run / "final").is_dir() and not list(run.glob(".*.tmp"))


@every_script
def test_two_processes_are_one(pipelines, uninterrupted, tmp_path, name):
    start_from(name, uninterrupted(name), tmp_path)
    arguments = flags(pipelines, name, tmp_path, "--batch_size", 2, "--resume_from_checkpoint", "latest")
    said = fork_and_wait(tmp_path, ROOT / f"{name}.py", *arguments, processes=2)
    assert_same(name, tmp_path, uninterrupted(name), **SPLIT)
    assert said.count("Resuming from") == said.count("Done: ") == 1
    assert (inside(name, tmp_path) / "final").is_dir()


@every_script
def test_a_signal_between_micro_batches_saves_the_last_complete_step(
    pipelines, uninterrupted, tmp_path, monkeypatch, name
):
    """Four accumulated micro-batches are the large batch, and half of them are dropped without a trace."""
    asked, requested = [], StopSignal.requested

    def spy(stop):
        asked.append(stop)
        if len(asked) == 7:  # before the third micro-batch of the second step
            os.kill(os.getpid(), signal.SIGTERM)
        return requested(stop)

    monkeypatch.setattr(StopSignal, "requested", spy)
    module = importlib.import_module(name)
    split = ["--gradient_accumulation_steps", 4, "--batch_size", 1]
    if name == "train_add":
        split = ["--gradient_accumulation_steps", 2, "--batch_size", 2]
        asked += [None] * 3  # before the second micro-batch of the second step
    with pytest.raises(SystemExit) as stopped:
        run_in_process(module, *flags(pipelines, name, tmp_path, *split))
    assert stopped.value.code == STOPPED
    run = inside(name, tmp_path)
    assert [step for step, _ in checkpoints_in(run)] == [1] and not (run / "final").exists()
    run_in_process(module, *flags(pipelines, name, tmp_path, *split, "--resume_from_checkpoint", "latest"))
    assert_same(name, tmp_path, uninterrupted(name), **SPLIT)


def test_a_stopped_script_has_an_exit_status_of_its_own(pipelines, tmp_path):
    arguments = flags(pipelines, "train_guided", tmp_path, "--checkpointing_steps", 100000, steps=100000)
    command = [sys.executable, str(ROOT / "train_guided.py"), *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = ""
    while "grad_norm" not in said:  # the bar's figures: a step is done
        said += process.stdout.read(80)
    process.send_signal(signal.SIGTERM)
    said += process.communicate(timeout=120)[0]
    assert process.returncode == STOPPED and "Stopped by a signal after step" in said
    assert len(checkpoints_in(tmp_path)) == 1


@pytest.mark.parametrize("name", ["train_flash_lora", "train_guided"])
def test_a_time_limit_saves_and_leaves(pipelines, tmp_path, monkeypatch, name):
    """With the status, and the file, that a queue repeats a job by; the file goes as the run goes on."""
    ages = iter([10, 20, 30, 40, 51])
    monkeypatch.setattr(common.stopping, "age", lambda: next(ages, 100))
    module, limit = importlib.import_module(name), ["--must_save_by", 1, "--checkpointing_steps", 100]
    with pytest.raises(SystemExit) as stopped:
        run_in_process(module, *flags(pipelines, name, tmp_path, *limit, steps=100))
    run = inside(name, tmp_path)
    last = checkpoints_in(run)[-1][0]
    assert stopped.value.code == STOPPED and 1 <= last < 5
    assert f"Stopped by --must_save_by after step {last};" in (run / "stopped").read_text()
    monkeypatch.undo()
    more = ["--checkpointing_steps", 100, "--resume_from_checkpoint", "latest"]
    run_in_process(module, *flags(pipelines, name, tmp_path, *more, steps=last + 1))
    assert not (run / "stopped").exists() and checkpoints_in(run)[-1][0] == last + 1


def test_a_launcher_that_is_killed_leaves_a_checkpoint_and_no_orphan(pipelines, tmp_path):
    import psutil

    arguments = flags(pipelines, "train_guided", tmp_path, "--checkpointing_steps", 3, steps=100000)
    process = subprocess.Popen(
        launch_command(ROOT / "train_guided.py", *arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for((tmp_path / "checkpoint-3" / "state.json").is_file, process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()  # what `kill PID`, docker stop or the end of a pod send, to the launcher alone
    process.wait()
    gone, alive = psutil.wait_procs(family, timeout=60)
    assert family and not alive
    last, folder = checkpoints_in(tmp_path)[-1]
    assert last % 3 or last > 3  # the step that it had come to, not only the last that was due
    assert read_json(folder / "state.json")["step"] == last


def test_a_process_that_does_not_see_the_checkpoint_refuses_with_the_others(tmp_path, monkeypatch):
    """On node-local disks one rank would resume and the other start anew."""
    monkeypatch.setattr(common.run, "broadcast_object_list", lambda objects: objects)
    monkeypatch.setattr(common.run, "gather_object", lambda objects: [*objects, False])
    process = SimpleNamespace(num_processes=2, is_main_process=True, wait_for_everyone=lambda: None)
    with pytest.raises(common.run.CheckpointError, match="process 1 does not see .*share"):
        common.run.check_shared(process, tmp_path, None)
    assert not list(tmp_path.iterdir())


def test_what_the_main_process_refuses_every_process_refuses(monkeypatch):
    def refuse():
        raise UsageError("no")

    sent = []
    monkeypatch.setattr(common.run, "broadcast_object_list", lambda objects: sent.append(list(objects)))
    with pytest.raises(UsageError, match="no"):
        common.run.on_main_process(SimpleNamespace(is_main_process=True), refuse)
    monkeypatch.setattr(common.run, "broadcast_object_list", lambda objects: objects.__setitem__(slice(None), sent[0]))
    with pytest.raises(UsageError, match="no"):
        common.run.on_main_process(SimpleNamespace(is_main_process=False), refuse)


# Precision, broken losses


@every_script
def test_bf16_trains_fp32_weights_and_one_broken_loss_costs_one_update(pipelines, tmp_path, monkeypatch, name):
    backward, losses = Accelerator.backward, []

    def spoilt(accelerator, loss, **options):
        losses.append(loss)
        return backward(accelerator, loss * (float("nan") if len(losses) == 2 else 1), **options)

    monkeypatch.setattr(Accelerator, "backward", spoilt)
    arguments = flags(pipelines, name, tmp_path, "--checkpointing_steps", 1, "--mixed_precision", "bf16", steps=3)
    run_in_process(importlib.import_module(name), *arguments)
    run = inside(name, tmp_path)
    one, two, three = (checkpoint_tensors(run / f"checkpoint-{n}", "student") for n in (1, 2, 3))
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in three.values())
    if name != "train_progressive":  # there a stage ends at the second step, and what it averaged is handed on
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(two[key], three[key]) for key in two if not key.startswith("optimizer"))
    state = read_json(run / "checkpoint-3" / "state.json")["state"]
    assert state["skipped"]["student"] == [1, 0] and len(losses) == 3


@every_script
def test_a_run_that_has_lost_itself_ends_with_a_sentence_and_no_output(pipelines, tmp_path, capsys, name):
    """A learning rate that throws the weights out of every range: the losses after it are not finite."""
    module = importlib.import_module(name)
    lost = ["--learning_rate", "1e30", "--lr_warmup_steps", 0, "--checkpointing_steps", 1]
    lost += ["--checkpoints_total_limit", 1]
    error = error_of(module, flags(pipelines, name, tmp_path, *lost), capsys)
    assert "error: " in error and "finite" in error and "Traceback" not in error
    run = inside(name, tmp_path)
    assert not (run / "final").exists() and checkpoints_in(run)
    for _, checkpoint in checkpoints_in(run):
        tensors = load_file(checkpoint / "student.safetensors")
        assert all(value.isfinite().all() for value in tensors.values())
    assert checkpoints_in(run)[0][0] == 1  # the last whose update was taken made no room for those after it


def test_too_many_skipped_updates_in_a_row_end_a_run(pipelines, tmp_path, capsys, monkeypatch):
    import train_guided

    backward = Accelerator.backward
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss: backward(self, loss * float("inf")))
    arguments = flags(pipelines, "train_guided", tmp_path, "--max_skipped_updates", 3, steps=50)
    error = error_of(train_guided, arguments, capsys)
    assert "3 updates of the student in a row" in error and "checkpoint-3" in error
    assert [step for step, _ in checkpoints_in(tmp_path)] == [2, 3]


# Of the two whose features come out of traced graphs, train_student_kd.py's own file compares six steps.
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in SCRIPTS if "student" not in n and "prune" not in n],
)
def test_compiled_is_the_plain_run_under_the_same_names(pipelines, uninterrupted, tmp_path, compiled, name):
    more = ["--torch_compile", "--gradient_checkpointing"]
    run_in_process(importlib.import_module(name), *flags(pipelines, name, tmp_path, *more, steps=2))
    assert compiled
    assert_same(name, tmp_path, uninterrupted(name), step=2, **SPLIT)


@pytest.mark.gpu
@every_script
def test_fp16_trains_and_resumes(pipelines, tmp_path, gpu, name):
    module, fp16 = importlib.import_module(name), ["--mixed_precision", "fp16"]
    run_in_process(module, *flags(pipelines, name, tmp_path, *fp16, steps=2))
    run_in_process(module, *flags(pipelines, name, tmp_path, *fp16, "--resume_from_checkpoint", "latest"))
    for step in (2, 4):
        tensors = checkpoint_tensors(inside(name, tmp_path) / f"checkpoint-{step}", "student")
        assert all(value.isfinite().all() for value in tensors.values())


# Outputs

RUN_CARDS = """
import json, sys, torch
torch.set_num_threads(1)  # as in the tests' own process
found = {}
for folder in sys.argv[1:]:
    code = open(folder + "/README.md").read().split("```python\\n")[1].split("```")[0]
    names = {}
    torch.manual_seed(0)
    exec(code, names)
    names["image"].save(folder + "/card.png")
"""


@every_script
def test_the_code_on_every_card_runs_as_it_stands(pipelines, uninterrupted, tmp_path, name):
    """In a fresh process, outside the repository: the images are those of the output reopened here."""
    from PIL import Image

    run = inside(name, uninterrupted(name))
    outputs = [run / "final", run / "final-fp16", run / "final-int8", *run.glob("stage-*")]
    outputs += [path for path in (run / "student",) if path.is_dir()]
    (tmp_path / "cards.py").write_text(RUN_CARDS)
    fork_and_wait(tmp_path, tmp_path / "cards.py", *outputs, cwd=tmp_path)
    for output in outputs:
        image = np.asarray(Image.open(output / "card.png"), dtype=float)
        (output / "card.png").unlink()
        assert image.std() > 1  # not black
        card, contract = (output / "README.md").read_text(), read_json(output / "distillation.json")
        assert contract["parent"] in card and f"guidance_scale={contract['guidance_scale']:g}" in card
        dtype = {"final-fp16": "float16", "final-int8": "bfloat16"}.get(output.name, "float32")
        assert f"dtype=torch.{dtype}" in card
        if output.name in ("final", "final-int8"):
            pipeline = open_output(output)
            torch.manual_seed(0)
            call = {"num_inference_steps": contract["steps"] or 50, "guidance_scale": contract["guidance_scale"]}
            own = np.asarray(pipeline("a prompt", **call).images[0], dtype=float)
            assert np.abs(own - image).max() <= 3  # of 255: a merged LoRA rounds otherwise than an adapter


@every_script
def test_outputs_and_their_export_hold_the_average(uninterrupted, name):
    run = inside(name, uninterrupted(name))
    average = load_file(run / "checkpoint-4" / "student_ema.safetensors")
    exported = load_pipeline(run / "final-fp16", torch.float16)
    small = load_pipeline(run / "final-int8")
    for part, module in open_output(run / "final").components.items():
        if isinstance(module, torch.nn.Module):
            tensors, integers = getattr(exported, part).state_dict(), getattr(small, part).state_dict()
            for key, value in module.state_dict().items():
                assert torch.equal(tensors[key], value.to(tensors[key].dtype)), (part, key)
                rounded = integers[key].dequantize() if hasattr(integers[key], "qdata") else integers[key]
                step = value.abs().max() / 127  # of the integers, of the whole layer's at most
                assert (rounded.float() - value).abs().max() <= 1.5 * step, (part, key)
    if (run / "final" / WEIGHTS).is_file():
        saved = load_file(run / "final" / WEIGHTS)
        found = {key.removeprefix("unet."): value for key, value in saved.items()}
        expected = {key.replace(".default.", "."): value for key, value in average.items()}
    else:
        found = {
            key: value for file in (run / "final").rglob("*.safetensors") for key, value in load_file(file).items()
        }
        expected = {key.removeprefix("unet.").removeprefix("encoder."): value for key, value in average.items()}
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert (run / "samples" / "step-3.png").is_file()
    own, contract = read_json(run / "final" / "distillation.json"), read_json(run / "final-fp16/distillation.json")
    assert own == contract and {"parent", "revision", "variant", "steps", "guidance"} <= own.keys()


@pytest.mark.parametrize("kind", ["plain-sd", "plain-sdxl", "sd"])
@pytest.mark.parametrize("targets", [ATTENTION, FEED_FORWARD, EVERYTHING], ids=["attention", "feed-forward", "all"])
def test_every_adapter_of_a_lora_reloads_in_stock_diffusers(pipelines, tmp_path, kind, targets):
    pipeline = load_pipeline(pipelines(kind))
    args = SimpleNamespace(lora_rank=2, lora_alpha=16.0, lora_targets=targets, resolution=32)
    add_lora(pipeline.unet, args)
    trained = {key: p for key, p in pipeline.unet.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trained.values():
            p.normal_(std=0.2, generator=generator)
    accelerator = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    run = SimpleNamespace(accelerator=accelerator, folder=tmp_path, args=args, step=1, skeletons=[])
    contract = {
        "parent": pipelines(kind),
        "revision": None,
        "variant": None,
        "steps": 2,
        "timesteps": [999, 499],
        "guidance": "baked",
        "guidance_scale": 1.0,
        "target": "x0",
    }
    scheduler = student_scheduler(pipeline.scheduler, "x0", 2)
    save_student(run, {"unet": pipeline.unet}, scheduler, contract, "A LoRA", {})

    stock = DiffusionPipeline.from_pretrained(pipelines(kind), dtype=torch.float32)
    plain = images(stock)
    stock.load_lora_weights(tmp_path / "final")
    arrived = {key for key, _ in stock.unet.named_parameters() if ".lora_" in key}
    assert len(arrived) == len(trained) > (10 if targets is ATTENTION else 30)
    for module in pipeline.unet.modules():
        vars(module).pop(
            "forward", None
        )  # wide adapters, which training folds (tests/test_speed.py), as stock has them
    torch.testing.assert_close(images(stock), images(pipeline), atol=1e-6, rtol=0)
    assert (images(stock) - plain).abs().max() > 1e-2


def images(pipeline):
    return pipeline(
        "a ring", num_inference_steps=2, guidance_scale=1, output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images


@pytest.mark.parametrize("kind", ["plain-sd", "plain-sdxl"])
@pytest.mark.parametrize("name", LORA)
def test_every_lora_script_saves_all_that_it_trained(pipelines, tmp_path, name, kind):
    lora = ["--lora_rank", 2, "--lora_targets", *EVERYTHING]
    run_in_process(importlib.import_module(name), *quick(pipelines, tmp_path, *LORA[name], *lora, kind=kind, steps=1))
    final = inside(name, tmp_path) / "final"
    trained = load_file(inside(name, tmp_path) / "checkpoint-1" / "student.safetensors")
    stock = DiffusionPipeline.from_pretrained(pipelines(kind), dtype=torch.float32)
    stock.load_lora_weights(final)
    assert len([key for key, _ in stock.unet.named_parameters() if ".lora_" in key]) == len(trained)
    card = (final / "README.md").read_text()
    assert "rank 2, alpha 32, on to_q, to_k" in card


def test_an_output_that_was_not_written_whole_is_not_called_done(pipelines, tmp_path, monkeypatch):
    """What the old converter did to the keys: two styles, of which a loader takes one."""
    import common.outputs
    import train_guided

    def in_part(folder, pipeline):
        from safetensors.torch import save_file

        save_lora(folder, pipeline)
        tensors = load_file(folder / WEIGHTS)
        del tensors[sorted(tensors)[0]]
        save_file(tensors, folder / WEIGHTS, metadata=metadata)

    save_lora, metadata = common.outputs.save_lora, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 32.0})}
    monkeypatch.setattr(common.outputs, "save_lora", in_part)
    with pytest.raises(RuntimeError, match="was written without what is in memory"):
        run_in_process(train_guided, *quick(pipelines, tmp_path, "--lora_rank", 2, steps=1))
    assert not (tmp_path / "final").exists()
    metadata.clear()
    monkeypatch.setattr(common.outputs, "save_lora", lambda *given: in_part(*given))
    with pytest.raises(RuntimeError, match="alpha"):
        run_in_process(train_guided, *quick(pipelines, tmp_path / "b", "--lora_rank", 2, steps=1))


@every_script
def test_what_training_took_is_recorded_and_read_back(pipelines, tmp_path, name):
    """A pipeline whose files are all of one variant: training, its export, the contract and its card go on with it."""
    model = tmp_path / "model"
    DiffusionPipeline.from_pretrained(pipelines(), dtype=torch.float32).save_pretrained(model, variant="fp16")
    arguments = flags(pipelines, name, tmp_path / "run", "--variant", "fp16", "--export", "fp16", steps=4)
    arguments[arguments.index(pipelines())] = model
    run_in_process(importlib.import_module(name), *arguments)
    final = inside(name, tmp_path / "run") / "final"
    contract = read_json(final / "distillation.json")
    assert (contract["parent"], contract["variant"]) == (str(model), "fp16")
    if (final / WEIGHTS).is_file():
        assert 'variant="fp16"' in (final / "README.md").read_text()
        assert open_output(final).unet is not None


# Before it runs


@every_script
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_dry_run_says_what_would_be_done_and_leaves_no_trace(pipelines, tmp_path, monkeypatch, capsys, name, kind):
    """From config files alone: no weights load, nothing is written."""

    def loaded(*_, **__):
        raise AssertionError("weights were loaded")

    module, arguments = importlib.import_module(name), flags(pipelines, name, tmp_path / "out", "--dry_run", kind=kind)
    for place in ("safetensors.torch.load_file", "torch.load", "common.pipelines.load_whole", f"{name}.open_run"):
        monkeypatch.setattr(place, loaded)
    with pytest.raises(SystemExit) as ended:
        run_in_process(module, *arguments)
    assert ended.value.code == 0 and not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    rows = [
        "model",
        "global batch",
        "optimizer steps",
        "learning rate",
        "precision",
        "trained",
        "frozen",
        "peak memory",
    ]
    rows += ["  frozen weights", "  trained weights", "  optimizer states", "  activations", "on a GPU", "writes"]
    for row in rows:
        assert f"\n  {row}" in said, said
    assert "4 = 4 x 1 processes x 1 accumulated" in said and f"{inside(name, tmp_path / 'out')}/" in said


# Mistakes

MISTAKES = [
    (["--pretrained_model_name_or_path", "no/such/folder"], "--pretrained_model_name_or_path no/such/folder"),
    (["--resolution", "30"], "--resolution 30"),
    (["--report_to", "no_such_tracker"], "--report_to no_such_tracker"),
    (["--data_dir", "nowhere"], "nowhere does not exist"),
    (["--data_dir", "nowhere", "--dataset_name", "shapes"], "not both"),
    (["--resume_from_checkpoint", "checkpoint-7"], "--resume_from_checkpoint checkpoint-7"),
    (["--mixed_precision", "fp16"], "--mixed_precision fp16"),
    (["--use_8bit_adam"], "--use_8bit_adam"),
    (["--output_dir", "{file}"], "--output_dir"),
]
LORA_MISTAKES = [
    (["--lora_rank", "4", "--lora_targets", "no_such_layer"], "--lora_targets no_such_layer"),
    (["--pretrained_model_name_or_path", "{embedded}"], "guidance scale is an input of its UNet"),
    (["--pretrained_model_name_or_path", "{elsewhere}"], "guidance scale is an input of its UNet"),
    (["--pretrained_model_name_or_path", "{few}"], "it is for 2 steps, at timesteps of its own"),
    (["--pretrained_model_name_or_path", "{broken}"], "distillation.json can't be read"),
]
NOT_REFUSED = {
    ("train_progressive", "{embedded}"),
    ("train_progressive", "{elsewhere}"),
    ("train_guided", "{few}"),
    ("train_progressive", "{few}"),
}


@every_script
@pytest.mark.parametrize("wrong, said", MISTAKES, ids=[" ".join(wrong) for wrong, _ in MISTAKES])
def test_mistakes_are_one_sentence(pipelines, tmp_path, capsys, name, wrong, said):
    (tmp_path / "file").write_text("")
    wrong = [word.format(file=tmp_path / "file") for word in wrong]
    data = [] if "--data_dir" in wrong else SHAPES
    module = importlib.import_module(name)
    error = error_of(module, flags(pipelines, name, tmp_path / "out", *wrong, data=data), capsys)
    assert error.startswith("error: ") and said in error, error
    assert error.count("error: ") == 1 and error.count("\n") == 1 and error.count("can't be read") <= 1


LORA_CASES = [
    (name, wrong, said) for name in LORA for wrong, said in LORA_MISTAKES if (name, wrong[-1]) not in NOT_REFUSED
]


@pytest.mark.parametrize("name, wrong, said", LORA_CASES, ids=[f"{name} {wrong[-1]}" for name, wrong, _ in LORA_CASES])
def test_mistakes_about_loras_and_teachers_are_one_sentence(pipelines, tmp_path, capsys, name, wrong, said):
    made = {kind: tmp_path / kind for kind in ("embedded", "elsewhere", "few", "broken")}
    contracts = {
        "embedded": {"guidance": "embedded", "guidance_scale": 7.5},
        "few": {"guidance": "baked", "guidance_scale": 1.0, "steps": 2, "timesteps": [999, 499], "target": "next"},
        "broken": {"guidance": "cfg"},
    }
    for kind, folder in made.items():
        if "{" + kind + "}" in wrong:
            shutil.copytree(pipelines(), folder)
            if kind in contracts:
                (folder / "distillation.json").write_text(json.dumps(contracts[kind]))
    if made["elsewhere"].is_dir():
        config = made["elsewhere"] / "unet" / "config.json"
        config.write_text(json.dumps({**read_json(config), "time_cond_proj_dim": 256}))
    wrong = [word.format(**made) for word in wrong]
    error = error_of(importlib.import_module(name), flags(pipelines, name, tmp_path / "out", *wrong), capsys)
    error = error[error.index("error: ") :]  # the layers of a UNet are known once it has loaded, with a bar
    assert said in error and error.count("\n") == 1 and "Traceback" not in error, error
    assert not list(inside(name, tmp_path / "out").glob("checkpoint-*"))


def test_a_second_run_in_the_same_folder_is_refused_and_foreign_folders_stay(pipelines, tmp_path, capsys):
    import train_guided

    arguments = flags(pipelines, "train_guided", tmp_path, steps=2)
    run_in_process(train_guided, *arguments)
    foreign = [tmp_path / name for name in ("finals_thesis", "checkpoint-photos", "final_draft")]
    for folder in foreign:
        folder.mkdir()
    assert "--overwrite_output_dir" in error_of(train_guided, arguments, capsys)
    run_in_process(train_guided, *arguments, "--overwrite_output_dir")
    run_in_process(train_guided, *arguments, "--resume_from_checkpoint", "latest")
    assert all(folder.is_dir() for folder in foreign)
    changed = [*arguments, "--resume_from_checkpoint", "latest", "--guidance_scale", 3]
    assert "guidance_scale was None, now 3.0" in error_of(train_guided, changed, capsys)


@pytest.mark.parametrize("torn", ["student.safetensors", "student_ema.safetensors", "optimizer.bin", "state.json"])
def test_a_torn_checkpoint_is_one_sentence(pipelines, uninterrupted, tmp_path, capsys, torn):
    import train_guided

    start_from("train_guided", uninterrupted("train_guided"), tmp_path)
    file = tmp_path / "checkpoint-2" / torn
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    arguments = flags(pipelines, "train_guided", tmp_path, "--resume_from_checkpoint", "latest")
    error = error_of(train_guided, arguments, capsys)
    error = error[error.index("error: ") :]
    assert "checkpoint-2" in error and error.count("\n") == 1
    assert (tmp_path / "checkpoint-2").is_dir()  # nothing is removed that a person might mend


@every_script
def test_tf32_is_governed_by_one_flag(pipelines, tmp_path, monkeypatch, name):
    """Both switches: of matrix products and of cuDNN's convolutions, which run TF32 unless told not to."""

    def ended(*_):
        raise KeyboardInterrupt

    for flag, wanted in ((["--allow_tf32"], True), ([], False)):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(common.run, "seed_all", ended)
            run_in_process(importlib.import_module(name), *flags(pipelines, name, tmp_path, *flag))
        assert torch.backends.cuda.matmul.allow_tf32 is wanted and torch.backends.cudnn.allow_tf32 is wanted


@every_script
def test_every_flag_has_help(monkeypatch, name):
    assert_every_flag_has_help(importlib.import_module(name), monkeypatch)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short_and_reads_in_the_order_of_the_house(name):
    import ast

    text = (ROOT / f"{name}.py").read_text()
    tree = ast.parse(text)
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert main.end_lineno - main.lineno + 1 <= 130 and text.count("\n") <= 450
    body = text[text.index("def main(args):") :]
    order = """check_arguments(args)|settle(args|read_teacher(args|load_dataset_from_args(args|preflight(args
        |open_run(args|# 1 frozen|# 2 trained|# 3 optimizer|run.register(|while run.step|set_learning_rate(
        |accelerator.accumulate(|run.count(|save_student|export(run|run.end("""
    order = [words.strip() for words in order.split("|")]
    assert not [words for words in order if words not in body]
    assert (
        body.index("load_dataset_from_args(args") < body.index("preflight(args") < body.index("open_run(args, watch")
    )
    assert not re.search(r"fmt: (skip|off)", text)
