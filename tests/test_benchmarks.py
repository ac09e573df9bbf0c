"""benchmarks/inference.py: what it counts, which ratios it prints, and what it refuses."""

import pytest
import torch
from conftest import read_json, run_in_process

from benchmarks import inference
from common.compression import channels
from common.errors import ModelError, UsageError
from common.pipelines import load_pipeline

QUICK = ("--device", "cpu", "--threads", "1")
TINY = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}


def test_ratios_are_taken_within_a_round():
    seconds = [[1.0, 0.5], [10.0, 6.0], [2.0, 1.4]]  # the second round is slow for both
    first, second = inference.summary(seconds, [100, 40])
    assert first["time_ratio"] == first["time_ratio_max"] == first["macs_ratio"] == 1
    assert second["macs_ratio"] == 0.4 and second["seconds"] == [0.5, 6.0, 1.4] and second["seconds_median"] == 1.4
    names = ("time_ratio_min", "time_ratio_low", "time_ratio", "time_ratio_high", "time_ratio_max")
    assert [second[name] for name in names] == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7])


def test_calls_take_turns_after_a_warm_up():
    called = []
    calls = [lambda: called.append("a"), lambda: called.append("b")]
    assert [len(taken) for taken in inference.interleaved(calls, 3, "cpu")] == [2, 2, 2]
    assert "".join(called) == "abababab"


def test_pipelines_against_the_first(pipelines, tmp_path, capsys):
    original, pruned = pipelines(), tmp_path / "pruned"
    pipeline = load_pipeline(original)
    kept = {group.name: [0, 1] for group in channels.groups_of(pipeline.unet) if group.kind == "conv"}
    before = channels.count(pipeline.unet)
    channels.prune(pipeline.unet, kept)
    gone = before - channels.count(pipeline.unet)
    pipeline.register_modules(unet=pipeline.unet)  # its class is another
    pipeline.save_pretrained(pruned)
    output = tmp_path / "times.json"
    flags = (*QUICK, "--cpu_time", "--rounds", 3, "--steps", 2, "--batch_size", 2, "--output", output)
    run_in_process(inference, "--models", original, pruned, *flags)
    report = read_json(output)
    first, second = report["rows"]
    assert str(pruned) in capsys.readouterr().out and report["resolution"] == 32 and report["threads"] == 1
    assert first["parameters"] - second["parameters"] == gone > 0
    assert 0 < second["macs"] < first["macs"] and second["macs_ratio"] == second["macs"] / first["macs"]
    assert all(len(row["seconds"]) == 3 and min(row["seconds"]) > 0 for row in report["rows"])


def test_every_combination_of_steps_and_dtype(pipelines, tmp_path):
    output, model = tmp_path / "times.json", pipelines()
    flags = (*QUICK, "--rounds", 2, "--steps", 1, 2, "--dtype", "fp32", "bf16", "--output", output)
    run_in_process(inference, "--models", model, *flags)
    report = read_json(output)
    rows = {row["configuration"]: row for row in report["rows"]}
    assert list(rows) == [f"{model}, {steps} steps, {dtype}" for dtype in ("fp32", "bf16") for steps in (1, 2)]
    first, second, _, last = rows.values()
    assert last["macs"] == second["macs"] > first["macs"] and last["steps"] == 2 and last["dtype"] == "bf16"
    assert output.with_suffix(".png").stat().st_size > 1000 and report["date"] and report["hardware"]["cpu"]


def test_compiled_and_not(tmp_path, monkeypatch, compiled):
    monkeypatch.setitem(inference.ARCHITECTURES, "sd15", TINY)
    output = tmp_path / "times.json"
    flags = (*QUICK, "--resolution", 64, "--rounds", 1, "--ratio", 0.5, "--torch_compile", "--output", output)
    run_in_process(inference, "--architecture", "sd15", *flags)
    plain, fast, pruned, pruned_fast = read_json(output)["rows"]
    assert [row["configuration"] for row in (plain, fast)] == ["sd15", "sd15, compiled"] and len(compiled) == 2
    assert fast["macs"] == plain["macs"] > pruned["macs"] == pruned_fast["macs"]  # those of the model
    assert output.with_suffix(".png").is_file()


def test_an_architecture_pruned_before_it_has_weights(tmp_path, monkeypatch):
    monkeypatch.setitem(inference.ARCHITECTURES, "sd15", TINY)
    output = tmp_path / "times.json"
    flags = (*QUICK, "--resolution", 64, "--rounds", 1, "--output", output)
    run_in_process(inference, "--architecture", "sd15", "--ratio", 0.25, 0.5, *flags)
    first, quarter, half = read_json(output)["rows"]
    assert first["parameters"] > quarter["parameters"] > half["parameters"]
    assert 1 > quarter["macs_ratio"] > half["macs_ratio"] > 0.4
    unet = inference.build_unet("sd15", 0.5, torch.float32, "cpu")
    assert unet.down_blocks[0].resnets[0].conv1.out_channels == 16 and unet.conv_in.out_channels == 32
    assert channels.count(unet) == half["parameters"]
    assert all(p.isfinite().all() and p.std() > 0 for p in unet.parameters())


@pytest.mark.parametrize(
    "flags, error, said",
    [
        (["--models", "nowhere/at/all"], ModelError, "--models nowhere/at/all"),
        (["--models", "PIPELINE", "--ratio", "0.5"], UsageError, "--ratio"),
        (["--models", "PIPELINE", "--resolution", "30"], UsageError, "--resolution 30"),
        (["--architecture", "sd15", "--steps", "2"], UsageError, "--steps"),
        (["--architecture", "sd15", "--resolution", "60"], UsageError, "--resolution 60"),
        (["--architecture", "sd15", "--dtype", "fp16"], UsageError, "--dtype fp16"),
        (["--architecture", "sd15", "--cpu_time", "--threads", "2"], UsageError, "--cpu_time"),
        (["--architecture", "sd15", "--output", "no/such/folder.json"], UsageError, "--output"),
    ],
)
def test_mistakes_before_anything_loads(flags, error, said, pipelines, monkeypatch):
    for name in ("load_pipeline", "build_unet"):
        monkeypatch.setattr(inference, name, lambda *_, **__: pytest.fail("loaded"))
    flags = [pipelines() if flag == "PIPELINE" else flag for flag in flags]
    with pytest.raises(error, match=said):
        run_in_process(inference, *flags, "--device", "cpu")
