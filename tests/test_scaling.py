"""What a step sends, measured by two counts that know nothing of each other; what fits where, and scaling on paper."""

import json
import socket

import pytest
import torch
from conftest import ROOT, run_in_process
from launching import fork_and_wait, quick

from benchmarks import communication, counted_bytes, memory_table
from common.errors import UsageError
from common.memory import Estimate

# Measured

ONLY_LINUX = pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="the kernel is asked what sockets have sent")


@ONLY_LINUX
def test_the_kernel_counts_what_a_socket_sends():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        before = counted_bytes.bytes_sent()
        client.sendall(bytes(12_345))
        with accepted:
            assert accepted.recv(12_345, socket.MSG_WAITALL)
        assert counted_bytes.bytes_sent() - before == 12_345


@ONLY_LINUX
@pytest.mark.parametrize("script, more", [("train_lcm", ["--lora_rank", 4]), ("train_guided", [])])
def test_a_step_sends_the_gradients_of_what_is_trained_and_nothing_else(pipelines, tmp_path, script, more):
    """A LoRA, and a whole UNet: no frozen weight, no buffer; beside them whether to stop, and the report of a step."""
    counted = ["--notes", tmp_path / "notes.json", "--steps", 4, ROOT / f"{script}.py"]
    run = quick(pipelines, tmp_path / "run", "--batch_size", 1, "--logging_steps", 4, *more, steps=6)
    fork_and_wait(tmp_path, ROOT / "benchmarks/counted_bytes.py", *counted, *run, processes=2)
    notes = json.loads((tmp_path / "notes.json").read_text())
    _, quiet, reports = notes["steps"]
    assert notes["engine"] == "ddp" and [step["reports"] for step in notes["steps"]] == [False, False, True]
    assert {name for name, _, _ in quiet["collectives"]} == {"all_reduce"}
    sizes = [torch.Size(shape).numel() for _, shape, count in quiet["collectives"] for _ in range(count)]
    # Of all of them the last one says whether any process was told to stop.
    assert sum(sizes[:-1]) == notes["trained"] > 1000 and sizes[-1] <= 2
    assert 0 < quiet["sent"] - 4 * notes["trained"] < 5000  # gloo's headers
    assert 0 < reports["sent"] - quiet["sent"] < 1000


# On paper


def test_bytes_of_a_ring():
    assert communication.bytes_sent("ddp", 2, 100) == 400  # as measured: each sends its gradients once
    assert communication.bytes_sent("ddp", 8, 100) == communication.bytes_sent("zero2", 8, 100) == 2 * 7 / 8 * 400
    assert communication.bytes_sent("fsdp2", 8, 100) == 7 / 8 * (200 + 200 + 400)
    assert communication.bytes_sent("fsdp2", 8, 100, target=100) == 7 / 8 * 1000
    assert communication.bytes_sent("ddp", 1, 100) == 0


def test_the_slowest_link_counts_and_what_hides_costs_nothing():
    args = communication.parse_args(["--node_gigabytes", "300", "--link_share", "0.5"])
    assert communication.rate(args) == communication.rate(args, 99_999) == 150e9
    assert communication.rate(args, 100) == 6.25e9
    assert communication.efficiency(2, 1, hides=1) == (2 / 3, 1)
    assert communication.efficiency(2, 2, hides=1) == (1 / 2, 2 / 3)


@pytest.mark.parametrize("flags, said", [([], "--script"), (["--script", "no.py"], "--script no.py")])
def test_mistakes(flags, said):
    with pytest.raises(UsageError, match=said):
        run_in_process(communication, *flags)


# What fits


def test_the_smallest_card_has_room_for_cuda_too():
    assert [memory_table.card_for(count) for count in (0, 6.6e9, 6.7e9, 75e9, 75.3e9)] == [8, 8, 16, 80, None]
    found = {("DDP", on): Estimate({"activations": count}, 0) for on, count in ((False, 8e9), (True, 90e9))}
    assert memory_table.cell(found, "DDP") == "8.0 (16) / 90.0 (none)" and memory_table.cell(found, "FSDP2") == "-"


def test_a_script_says_itself_what_is_estimated(tmp_path):
    """Its own flags and defaults, on configs alone."""
    memory_table.write_model("sd1", tmp_path / "model")
    flags = ["--pretrained_model_name_or_path", str(tmp_path / "model"), "--dataset_name", "shapes"]
    flags += ["--resolution", "512", "--output_dir", str(tmp_path / "run")]
    args, dataset, scale, method = memory_table.asked_by("train_lcm.py", flags)
    assert (scale, method) == (7.5, {"embedded": True, "target": True}) and dataset.needs_images
    assert not (tmp_path / "run").exists() and args.lora_rank is None
    assert memory_table.asked_by("train_lcm.py", [*flags, "--lora_rank", "4"])[3]["target"] is False


def test_every_training_script_is_in_the_table():
    scripts = {path.name for path in ROOT.glob("train_*.py")} | {"prune_and_quantize.py"}
    assert {*memory_table.LORA, *memory_table.WHOLE} == scripts
