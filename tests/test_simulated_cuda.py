"""Every training script on the simulated CUDA device of simulated_cuda.py: what a CPU run alone would let pass.

Needs g++. It is a test of its own that the simulation fails where CUDA would.
"""

from collections import Counter

import pytest
from conftest import ROOT
from launching import SHAPES
from safetensors.torch import load_file
from simulated_cuda import simulate

# Of each script every shape and both precisions: script, kind of pipeline, precision, flags.
CASES = {
    "flash": ("train_flash_lora", "sd", "fp16", ["--num_ddim_steps", 2]),
    "flash-cached": ("train_flash_lora", "v", "fp16", ["--num_ddim_steps", 2, "--cache_rollouts", 1]),
    "flash-next": ("train_flash_lora", "sdxl", "bf16", ["--num_ddim_steps", 2, "--target", "next"]),
    "guided-lora": ("train_guided", "sd", "fp16", ["--lora_rank", 4]),
    "guided": ("train_guided", "v", "bf16", ["--gradient_checkpointing"]),
    "guided-embed": ("train_guided", "sdxl", "fp16", ["--guidance", "embed"]),
    "lcm-lora": ("train_lcm", "sd", "bf16", ["--lora_rank", 4]),
    "lcm": ("train_lcm", "v", "fp16", []),
    "lcm-phases": ("train_lcm", "sdxl", "fp16", ["--num_phases", 2, "--gradient_checkpointing"]),
    "progressive": ("train_progressive", "sd", "bf16", []),
    "progressive-x": ("train_progressive", "v", "fp16", ["--loss_space", "x", "--gradient_checkpointing"]),
    "progressive-lora": ("train_progressive", "sdxl", "fp16", ["--lora_rank", 4]),
    "add": ("train_add", "sd", "fp16", []),
    "add-lora": (
        "train_add", "v", "bf16",
        ["--lora_rank", 4, "--distill_target", "sample", "--num_ddim_steps", 2, "--cache_rollouts", 1]),
    "add-mismatched": (
        "train_add", "sdxl", "fp16", ["--r1_form", "finite_difference", "--mismatched_captions", "--r1_gamma", 1]),
    "student": ("train_student_kd", "sd", "fp16", ["--snr_gamma", 5, "--caption_dropout_start", 0.5]),
    "student-offload": ("train_student_kd", "v", "bf16", ["--teacher_cpu_offload", "--gradient_checkpointing"]),
    "student-latents": ("train_student_kd", "sdxl", "fp16", ["--random_latents"]),
    "text-encoder": ("train_text_encoder_kd", "sd", "bf16", []),
    "text-encoder-unet": ("train_text_encoder_kd", "v", "fp16", ["--through_unet", "--hidden_size", 16]),
    "text-encoder-2": (
        "train_text_encoder_kd", "sdxl", "fp16", ["--text_encoder", "text_encoder_2", "--through_unet"]),
}  # fmt: skip
# Script, kind of pipeline, precision, flags, and blocking copies to the device a step: the captions' token ids, which
# the pipeline encodes, SDXL's twice.
STEADY = {
    "steady-fp16": ("train_flash_lora", "sd", "fp16", ["--num_ddim_steps", 2], 1),
    "steady-bf16": ("train_flash_lora", "sdxl", "bf16", ["--num_ddim_steps", 2], 2),
    "steady-lcm": ("train_lcm", "sd", "bf16", ["--lora_rank", 4], 1),
    "steady-guided": ("train_guided", "sd", "fp16", [], 1),
    "steady-progressive": (
        "train_progressive", "sd", "bf16", ["--start_steps", 4, "--end_steps", 1, "--steps_per_stage", 4], 1),
    "steady-add": ("train_add", "sd", "bf16", [], 1),
    "steady-student": ("train_student_kd", "sd", "bf16", [], 1),
    "steady-text": ("train_text_encoder_kd", "sd", "fp16", [], 0),
}  # fmt: skip
# Python source, and what its error says.
REFUSED = {
    "a host tensor": ("torch.ones(2, device='cuda') + torch.ones(2)", "add mixes host and device tensors"),
    "a host weight": ("torch.ones(2, 2) @ torch.ones(2, 2, device='cuda')", "mm mixes host and device tensors"),
    "a host number, stacked": (
        "torch.stack([torch.zeros(()), torch.zeros((), device='cuda')])", "stack mixes host and device tensors"),
    "a device index of a host tensor": (
        "torch.ones(2)[torch.zeros(1, dtype=torch.long, device='cuda')]", "index mixes host and device tensors"),
    "a host generator": (
        "torch.randn(2, device='cuda', generator=torch.Generator())", "randn on the device draws from a generator"),
    "a host generator, in place": (
        "torch.ones(2, device='cuda').uniform_(generator=torch.Generator())", "uniform_ on the device draws from"),
    "numpy": ("torch.ones(2, device='cuda').numpy()", "numpy() of a device tensor"),
    "swallowed": ("try: torch.ones(2, device='cuda') + torch.ones(2)\nexcept RuntimeError: pass", "add mixes"),
    "in backward": ("""
class Mixing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, grad): return grad * torch.ones(2)
Mixing.apply(torch.ones(2, device='cuda', requires_grad=True)).sum().backward()""", "mul mixes host and device"),
}  # fmt: skip
ALLOWED = """
x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device="cuda", requires_grad=True)
assert x.is_cuda and x.device == torch.device("cuda", 0) and x.grad is None
for dtype in (torch.float16, torch.bfloat16):
    with torch.autocast("cuda", dtype=dtype):  # CUDA's lists: on a CPU softmax would stay in half precision
        product = x @ x
        assert product.dtype == dtype and product.softmax(-1).dtype == torch.float32
        torch.nn.functional.cross_entropy(product, x.detach().softmax(-1)).backward()
assert x.grad.is_cuda and x.grad.dtype == torch.float32 and bool(x.grad.isfinite().all())
x = x.detach()
assert (x * torch.tensor(2.0)).is_cuda and x[torch.tensor([0])].is_cuda  # a number, and an index, of the host
layer = torch.nn.Linear(2, 2)
weight = layer.weight
assert layer.to("cuda").weight is weight and weight.is_cuda and isinstance(weight, torch.nn.Parameter)
row = x[0]
row += 1  # a view
assert not row.cpu().is_cuda and torch.equal(x.cpu(), torch.tensor([[2.0, 3.0], [3.0, 4.0]]))
"""
# Python source, and the syncs it makes.
COUNTED = {
    "item": ("torch.ones((), device='cuda').item()", {"item": 1}),
    "if": ("if torch.ones((), device='cuda') > 0: pass", {"item": 1}),
    "tolist": ("torch.ones(3, device='cuda').tolist()", {"to cpu": 1}),
    "copies": ("x = torch.ones(3, device='cuda'); x.cpu(); x.to('cpu'); torch.empty(3).copy_(x)", {"to cpu": 3}),
    "values in shapes": ("x = torch.ones(3, device='cuda'); x[x > 0]; x.nonzero()", {"mask": 1, "nonzero": 1}),
    "equal": ("x = torch.ones(3, device='cuda'); torch.equal(x, x)", {"equal": 1}),
    "none": ("x = torch.ones(3, device='cuda'); x[x > 0] = 0.0; x.clamp_(max=1).sum().to('cuda').shape[0:]", {}),
}


def short_run(pipelines, kind, precision, folder):
    """Flags of a run of any script."""
    line = ["--pretrained_model_name_or_path", pipelines(kind), "--output_dir", folder, *SHAPES, "--resolution", 32]
    return [*line, "--train_batch_size", 2, "--report_to", "none", "--mixed_precision", precision]


def scripts_job(pipelines, case, folder):
    """Two steps and a validation; then the same run resumed for a third step, and for SDXL an export."""
    script, kind, precision, flags = CASES[case]
    line = [*short_run(pipelines, kind, precision, folder), *flags]
    line += ["--validation_prompts", "a ring", "--validation_steps", 2, "--num_validation_images", 1]
    export = ["--export", "fp16"] if kind == "sdxl" else []
    if script == "train_progressive":  # 4 -> 2 -> 1 steps; resumed within the second stage
        line += ["--start_steps", 4, "--end_steps", 1, "--steps_per_stage", 2, "--checkpointing_steps", 3]
        runs = line, [*line, *export, "--resume_from_checkpoint", "checkpoint-3"]
    else:
        resumed = ["--max_steps", 3, "--resume_from_checkpoint", "latest"]
        runs = [*line, "--max_steps", 2], [*line, *export, *resumed]
    return {"script": script, "runs": runs}


def steady_job(pipelines, case, folder):
    """Four steps with nothing between them."""
    script, kind, precision, flags, _ = STEADY[case]
    return {"script": script, "runs": [[*short_run(pipelines, kind, precision, folder), *flags, "--max_steps", 4]]}


def batch_of(name):
    """Which of two processes runs a job: half of the scripts each."""
    return int(name in CASES and CASES[name][0] in ("train_add", "train_progressive", "train_student_kd"))


def parameters(names):
    """Jobs as a test's parameters. Those of one process go to one of pytest's workers, or two would run it."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(f"simulated_cuda_{batch_of(name)}")) for name in names]


def total(sites, *fields):
    """How many events there were of each combination of these fields."""
    counts = Counter()
    for site in sites:
        counts[tuple(site[field] for field in fields)] += site["count"]
    return counts


@pytest.fixture(scope="session")
def reports(pipelines, tmp_path_factory):
    """`reports(name)`: a job's report and the folder of its run, if it has one. A batch runs when first asked for."""
    made = {}

    def get(name):
        batch = batch_of(name)
        if batch not in made:
            folder = tmp_path_factory.mktemp("simulated")
            jobs = {case: scripts_job(pipelines, case, folder / case) for case in CASES if batch_of(case) == batch}
            if batch == 0:
                jobs.update({case: steady_job(pipelines, case, folder / case) for case in STEADY})
                jobs.update({case: {"code": code} for case, (code, _) in {**REFUSED, **COUNTED}.items()})
                jobs["allowed"] = {"code": ALLOWED}
            made[batch] = folder, simulate(jobs, folder)
        folder, done = made[batch]
        return done[name], folder / name

    return get


# The scripts


def test_every_script_meets_every_shape_and_precision():
    for path in ROOT.glob("train_*.py"):
        mine = [case for case in CASES.values() if case[0] == path.stem]
        assert {kind for _, kind, _, _ in mine} == {"sd", "v", "sdxl"}, path.name
        assert {precision for _, _, precision, _ in mine} == {"fp16", "bf16"}, path.name


@pytest.mark.parametrize("case", parameters(CASES))
def test_trains_validates_resumes_and_exports(reports, case):
    report, folder = reports(case)
    assert report["error"] is None, report["error"]
    steps = (3, 4) if CASES[case][0] == "train_progressive" else (2, 3)
    written = {path.name for path in folder.rglob("*")}
    assert {"final", "step-2.png", *(f"checkpoint-{step}" for step in steps)} <= written
    assert ("final-fp16" in written) == (CASES[case][1] == "sdxl")
    weights = [path for path in folder.rglob("*.safetensors") if {"final", "final-fp16"} & set(path.parts)]
    assert weights and all(x.isfinite().all() for path in weights for x in load_file(path).values())


@pytest.mark.parametrize("case", parameters(STEADY))
def test_a_step_waits_for_the_device_only_to_report(reports, case):
    """A wait leaves the GPU idle until the host has caught up. A new one in the loop must be worth it, and stand here.

    Run.count reads what is logged, in one go, after the first step; the next report is due after the last one. Nothing
    else waits: not the roll-out, whose timesteps are known on the CPU, nor the clipping, the update or the GradScaler
    of fp16, as the fused AdamW skips a step on the device. Blocking copies to the device wait as well.
    """
    report, _ = reports(case)
    assert report["error"] is None, report["error"]
    optimizers = 2 if STEADY[case][0] == "train_add" else 1
    assert len(report["steps"]) == 4 * optimizers - 1  # from each update of four steps to the next
    syncs, uploads = ([site for step in report["steps"] for site in step[what]] for what in ("syncs", "uploads"))
    assert total(syncs, "function", "kind") == {("count", "to cpu"): 1}, syncs
    assert total(uploads, "kind")["to device",] == 3 * STEADY[case][4] == sum(total(uploads, "kind").values()), uploads


# The simulation


@pytest.mark.parametrize("case", parameters(REFUSED))
def test_what_cuda_refuses_is_an_error(reports, case):
    report, _ = reports(case)
    assert REFUSED[case][1] in (report["error"] or "no error at all")


@pytest.mark.parametrize("case", parameters(["allowed"]))
def test_what_cuda_does_works(reports, case):
    report, _ = reports(case)
    assert report["error"] is None, report["error"]


@pytest.mark.parametrize("case", parameters(COUNTED))
def test_waiting_for_the_device_is_counted(reports, case):
    report, _ = reports(case)
    assert report["error"] is None, report["error"]
    assert total(report["syncs"], "kind") == {(kind,): count for kind, count in COUNTED[case][1].items()}


def test_a_dead_process_and_a_missing_compiler_are_told(tmp_path, monkeypatch):
    report = simulate({"dies": {"code": "import os; print('last words', flush=True); os._exit(3)"}}, tmp_path)["dies"]
    assert "ended with 3" in report["error"] and "last words" in report["error"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="needs g"):
        simulate({}, tmp_path)
