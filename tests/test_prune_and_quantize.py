"""prune_and_quantize.py as a script: every method, what its outputs are to other scripts and to stock diffusers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import environment, read_json, run_in_process
from launching import SHAPES, assert_same_checkpoints, error_of, images_in_memory, quick
from random_transformers import random_transformer_pipeline
from safetensors import safe_open
from safetensors.torch import load_file
from test_pruning import TRANSFORMERS

import prune_and_quantize
from common.compression import channels, pruned_models, pruning, quantization
from common.compression.quantized_folders import quantization_of
from common.outputs import open_output
from common.pipelines import load_pipeline, same_weights

FEW = ["--num_calibration_prompts", 2, "--calibration_steps", 2, "--eval_inference_steps", 2, "--num_eval_images", 0]
MODELS = ("unet", "text_encoder", "vae")
RATIOS = ["--unet_prune_ratio", 0.4, "--text_encoder_prune_ratio", 0.3, "--vae_prune_ratio", 0.3]


def flags(model, folder, *more, data=SHAPES):
    """Flags of a short run on the pipeline in the folder `model`."""
    return quick(lambda _: str(model), folder, *FEW, *more, data=data)


def prune(model, folder, *more, **options):
    """Run the script on a pipeline; the folder of its run."""
    run_in_process(prune_and_quantize, *flags(model, folder, *more, **options))
    return folder


@pytest.fixture(scope="module")
def original(pipelines):
    """The folder of the random pipeline that is pruned here: its first block has no attention."""
    return Path(pipelines("plain-sd"))


@pytest.fixture(scope="module")
def uneven(original, tmp_path_factory):
    """The folder of a run whose layers have lost unequal shares, by the sensitivity of each; in INT8 too."""
    target = ["--target_parameters", "70%", "--attention_ratio", 0.5, "--export", "int8", "--num_eval_images", 2]
    return prune(original, tmp_path_factory.mktemp("uneven"), *RATIOS, *target, "--calibration_steps", 1)


def files_of(folder):
    return {component: next((folder / component).glob("*.safetensors")) for component in MODELS}


def kept_of(folder):
    """{component: {group name: units kept}}, in the numbers of the pipeline that was pruned first."""
    pruned = read_json(folder / "compression.json")["pruned"]
    return {c: {name: entry["kept"] for name, entry in groups.items()} for c, groups in pruned.items()}


def assert_kept(folder, parent, before=None):
    """The rows of every pruned layer are those of the parent that the manifest names; readers may be compensated.

    before: kept_of the parent, where it was pruned too.
    """
    compared = 0
    for component, groups in read_json(folder / "compression.json")["pruned"].items():
        own, theirs = (load_file(files_of(path)[component]) for path in (folder, Path(parent)))
        readers = {name for entry in groups.values() for name, axis, _ in entry["spans"] if axis == 1}
        for name, entry in groups.items():
            had = before[component][name] if before else list(range(entry["units"]))
            local = torch.tensor([had.index(unit) for unit in entry["kept"]])
            assert entry["kept"] == sorted(set(entry["kept"]))
            for layer, axis, offset in entry["spans"]:
                if axis == 1 or layer in readers:
                    continue
                part = offset // entry["units"]  # of a GEGLU's two: channels of a unit, or 0
                rows = part * len(had) + local[:, None] * entry["width"] + torch.arange(entry["width"])
                first, rows = part * len(local), rows.flatten()
                found = own[f"{layer}.weight"][first : first + len(rows)]
                assert torch.equal(found, theirs[f"{layer}.weight"][rows]), layer
                compared += len(local) < len(had)
    assert compared > 10


def test_ratios_of_zero_change_nothing(original, tmp_path):
    zero = [word for flag in RATIOS[::2] for word in (flag, 0)]
    final = prune(original, tmp_path, *zero) / "final"
    theirs, own = (read_json(folder / "model_index.json") for folder in (original, final))
    assert {name: own[name] for name in MODELS} == {name: theirs[name] for name in MODELS}
    assert torch.equal(images_in_memory(load_pipeline(final), 2), images_in_memory(load_pipeline(original), 2))
    assert not list(final.rglob("pruned_models.py")) and "trust_remote_code" not in (final / "README.md").read_text()


# What went


def test_the_report_is_what_lies_on_the_disk(original, uneven):
    """Parameters and bytes counted from the files; the budget is reached, and little more than that."""
    report = read_json(uneven / "report.json")
    folders = {original.name: original, "final": uneven / "final", "int8": uneven / "final-int8"}
    counted = {}
    for (name, folder), row in zip(folders.items(), report["rows"], strict=True):
        sizes = {c: file.stat().st_size for c, file in files_of(folder).items()}
        assert row["bytes"] == sum(sizes.values())
        counted[name] = {}
        for component, file in files_of(folder).items() if name != "int8" else ():
            with safe_open(file, "pt") as tensors:
                shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]
            counted[name][component] = sum(int(torch.tensor(shape).prod()) for shape in shapes)
        if name != "int8":
            assert row["parameters"] == sum(counted[name].values())
        for component, part in report["components"][row["configuration"]].items():
            assert part["bytes"] == sizes[component] and part["macs"] > 0
            assert part["parameters"] == counted["final" if name == "int8" else name][component]
    before, after = (sum(counted[name].values()) for name in (original.name, "final"))
    assert 0.62 * before < after <= 0.7 * before
    assert report["rows"][1]["parameters_left"] == pytest.approx(after / before)
    assert report["rows"][0]["difference"] == 0 < report["rows"][1]["difference"]
    kept = kept_of(uneven / "final")
    assert {c: {n: layer["kept"] for n, layer in layers.items()} for c, layers in report["layers"].items()} == {
        c: {name: len(units) for name, units in groups.items()} for c, groups in kept.items()
    }
    shares = {
        len(units) / layer["units"]
        for c in MODELS
        for (layer, units) in zip(report["layers"][c].values(), kept[c].values())
    }
    assert len(shares) > 3  # not one ratio for all
    assert set(report["sensitivity"]) == set(MODELS)
    markdown = (uneven / "report.md").read_text()
    assert f"| final | {after:,} |" in markdown and "## What went of the text_encoder" in markdown
    assert all((uneven / name).stat().st_size > 1000 for name in ("sensitivity.png", "grid.png"))
    assert_kept(uneven / "final", original)


@pytest.mark.parametrize("target, export, left", [("60%", [], 0.6 * 62463), ("80K", ["--export", "fp16"], 40_000)])
def test_a_target_in_bytes(original, tmp_path, target, export, left):
    """A share of what is pruned, or bytes of the smallest output: of FP16, two each."""
    more = ["--vae_prune_ratio", 0.5, "--importance", "l2", "--no_compensation"]
    prune(original, tmp_path, *more, "--target_bytes", target, *export)
    found = channels.count(load_pipeline(tmp_path / "final").vae)
    assert 0.9 * left < found <= left
    if export:
        assert sum(tensor.nbytes for tensor in load_file(files_of(tmp_path / "final-fp16")["vae"]).values()) <= 80_000


# Rounds, methods


def test_rounds_by_sensitivity_resume_bit_for_bit_inside_and_between(original, tmp_path, monkeypatch):
    """Two rounds of two updates, ended after the first, second and third: by heads, of the text encoder too."""
    rounds = ["--method", "heads", "--unet_prune_ratio", 0.5, "--text_encoder_prune_ratio", 0.5, "--importance", "l1"]
    rounds += ["--sensitivity", "--iterative", 2, "--finetune_steps", 2, "--calibration_steps", 1]
    monkeypatch.setattr(pruning, "plot_sensitivity", lambda *_: None)  # which takes a second
    whole = prune(original, tmp_path / "whole", *rounds, "--max_train_steps", 4)
    for steps in (1, 2, 3, 4):
        more = ["--max_train_steps", steps, "--resume_from_checkpoint", "latest"]
        stopped = prune(original, tmp_path / "stopped", *rounds, *more)
        assert (stopped / "final").exists() == (steps == 4)
    assert_same_checkpoints(stopped / "checkpoint-4", whole / "checkpoint-4", "student")
    for component, file in files_of(whole / "final").items():
        assert same_tensors(file, files_of(stopped / "final")[component])
    one, two = (read_json(run / "checkpoint-4" / "state.json")["state"]["rounds"] for run in (whole, stopped))
    assert one == two and len(one) == 2 and all(any(kept["unet"].values()) for kept in one)
    layers = read_json(whole / "report.json")["layers"]
    kept = [layer["kept"] / layer["units"] for c in ("unet", "text_encoder") for layer in layers[c].values()]
    heads = [layer["kind"] == "attention" for c in ("unet", "text_encoder") for layer in layers[c].values()]
    assert all(share == (0.5 if of_heads else 1) for share, of_heads in zip(kept, heads)) and any(heads)


def same_tensors(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_width_is_of_the_stock_class(original, tmp_path, capsys):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    final = prune(original, tmp_path, "--method", "width", "--unet_prune_ratio", 0.5, "--finetune_steps", 1) / "final"
    stock = StableDiffusionPipeline.from_pretrained(final, dtype=torch.float32)
    assert type(stock.unet) is UNet2DConditionModel and list(stock.unet.config.block_out_channels) == [8, 16]
    assert torch.equal(images_in_memory(stock, 2), images_in_memory(load_pipeline(final), 2))
    manifest = read_json(final / "compression.json")
    assert manifest["keep"] and manifest["block_out_channels"] == [8, 16] and not manifest["pruned"]
    again = flags(final, tmp_path / "again", "--method", "width", "--unet_prune_ratio", 0.5)
    assert "was made narrower or pruned before" in error_of(prune_and_quantize, again, capsys)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_what_is_zero_stays_zero_through_recovery(original, tmp_path, pattern):
    ratios = ["--unet_prune_ratio", 0.6, "--text_encoder_prune_ratio", 0.6]
    more = ["--method", "magnitude", "--pattern", pattern, "--finetune_steps", 2]
    final = prune(original, tmp_path, *ratios, *more) / "final"
    pipeline, before = load_pipeline(final), load_pipeline(original)
    for component in ("unet", "text_encoder"):
        expected = getattr(before, component)
        channels.zero_smallest(expected, 0.6, pattern)
        weights = channels.prunable_weights(getattr(pipeline, component))
        for name, weight in channels.prunable_weights(expected).items():
            assert (weights[name][weight == 0] == 0).all(), name
            fours = weights[name].flatten(1)
            if pattern == "2:4" and fours.shape[1] % 4 == 0:
                assert ((fours.reshape(-1, 4) != 0).sum(1) <= 2).all()
    assert not same_weights(pipeline.unet, before.unet)
    shares = read_json(tmp_path / "report.json")["sparsity"]
    wanted = 0.5 if pattern == "2:4" else 0.6
    assert all(abs(share - wanted) < 0.02 for share in shares["text_encoder"].values())
    assert "of the weights of" in (tmp_path / "report.md").read_text()
    assert channels.count(pipeline.unet) == channels.count(before.unet)


# Other scripts on a pruned pipeline


def test_pruned_distilled_pruned_again_and_exported(original, uneven, tmp_path):
    """What is kept stays in the numbers of the pipeline that was pruned first."""
    import train_student_kd

    student = ["--student_model", uneven / "final"]
    run_in_process(train_student_kd, *quick(lambda _: str(original), tmp_path / "kd", *student, steps=1))
    distilled = tmp_path / "kd" / "final"
    assert kept_of(distilled) == kept_of(uneven / "final")
    again = ["--unet_prune_ratio", 0.3, "--vae_prune_ratio", 0.3, "--importance", "l1", "--export", "int8"]
    again = prune(distilled, tmp_path / "again", *again)
    kept, before = kept_of(again / "final"), kept_of(distilled)
    assert all(set(units) <= set(before[c][name]) for c in kept for name, units in kept[c].items())
    assert sum(map(len, kept["unet"].values())) < sum(map(len, before["unet"].values()))
    assert kept["text_encoder"] == before["text_encoder"]
    assert_kept(again / "final", distilled, before)
    assert same_tensors(files_of(again / "final")["text_encoder"], files_of(uneven / "final")["text_encoder"])
    assert kept_of(again / "final-int8") == kept and quantization_of(again / "final-int8") == "INT8 (torchao)"
    images = images_in_memory(load_pipeline(again / "final-int8"), 2)
    assert torch.equal(images, images_in_memory(load_pipeline(again / "final-int8"), 2))
    assert (images.float() - images_in_memory(load_pipeline(again / "final"), 2)).abs().mean() < 0.02


DOWNSTREAM = {
    "train_flash_lora": ["--num_ddim_steps", 2, "--num_inference_steps", 2],
    "train_lcm": [],
    "train_guided": [],
    "train_progressive": ["--start_steps", 2, "--end_steps", 1, "--steps_per_stage", 1],
}


@pytest.fixture(scope="module")
def distilled(uneven, tmp_path_factory):
    """{script: final/ of one step of it on a pruned pipeline}."""
    import importlib

    found = {}
    for name, more in DOWNSTREAM.items():
        folder = tmp_path_factory.mktemp(name)
        arguments = quick(lambda _: str(uneven / "final"), folder, *more, steps=1)
        run_in_process(importlib.import_module(name), *arguments)
        found[name] = folder / ("lora/final" if name == "train_flash_lora" else "final")
    return found


def test_other_scripts_train_what_was_pruned(uneven, distilled):
    pruned = load_pipeline(uneven / "final").unet
    for name, final in distilled.items():
        assert "trust_remote_code=True" in (final / "README.md").read_text(), name
        if name == "train_flash_lora":
            continue
        unet = load_pipeline(final).unet
        assert type(unet) is type(pruned) and dict(unet.config)["pruned"] == dict(pruned.config)["pruned"]
        assert (unet.config.time_cond_proj_dim is not None) == (name == "train_lcm"), name
        assert not same_weights(unet, pruned)
        assert (
            read_json(final / "compression.json")["pruned"] == read_json(uneven / "final/compression.json")["pruned"]
        )


# FLUX, SD3 and PixArt


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """{kind: (folder of the random pipeline, of the run that pruned it)}; FLUX's with images, PixArt's unevenly."""
    made = {}
    for kind in TRANSFORMERS:
        folder = tmp_path_factory.mktemp(kind)
        random_transformer_pipeline(kind).save_pretrained(folder / "pipeline")
        more = ["--transformer_prune_ratio", 0.5, "--precision", "fp16", "int8", "fp8"]  # --export, as a seed has it
        more += {"flux": ["--num_eval_images", 2], "sd3": ["--attention_ratio", 0.5], "pixart": ["--sensitivity"]}[
            kind
        ]
        made[kind] = folder / "pipeline", prune(folder / "pipeline", folder / "run", *more, data=[])
    return made


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_pipelines_without_a_unet(transformers, kind):
    folder, run = transformers[kind]
    parent, final, small = (load_pipeline(path) for path in (folder, run / "final", run / "final-int8"))
    assert type(final.transformer).__name__ == f"Pruned{type(parent.transformer).__name__}"
    report = read_json(run / "report.json")
    kinds, layers = {"feed_forward"}, report["layers"]["transformer"].values()
    if kind == "sd3":
        kinds.add("attention")
    assert {layer["kind"] for layer in layers if layer["kept"] < layer["units"]} == kinds
    halves = [layer["kept"] * 2 == layer["units"] for layer in layers if layer["kind"] in kinds]
    assert all(halves) or kind == "pixart"
    assert (run / "sensitivity.png").exists() == (kind == "pixart") == bool(report["sensitivity"])
    rows = {row["configuration"]: row for row in report["rows"]}
    assert [rows[f"final-{export}"]["dtype"] for export in ("fp16", "int8", "fp8")] == ["fp16", "int8", "fp8"]
    sizes = [quantization.bytes_of(load_pipeline(run / f"final-{export}").transformer) for export in ("int8", "fp8")]
    assert max(sizes) < 0.65 * quantization.bytes_of(load_pipeline(run / "final-fp16", torch.float16).transformer)
    counts = quantization.coverage(load_pipeline(run / "final-fp8").transformer)
    assert {kind for kind, dtype in counts if dtype == torch.float8_e4m3fn} == {"Linear"}
    assert sum(n for (_, dtype), n in counts.items() if dtype == torch.float8_e4m3fn) > 0.7 * sum(counts.values())
    for name, part in final.components.items():
        if isinstance(part, torch.nn.Module) and name != "transformer":
            assert same_weights(part, getattr(parent, name)), name
    assert channels.count(final.transformer) < channels.count(parent.transformer)
    assert final.transformer.dtype == torch.float32 and small.transformer.dtype == torch.bfloat16
    whole = {"flux": "text_encoder, text_encoder_2, vae", "pixart": "text_encoder, vae"}
    whole = whole.get(kind, "text_encoder, text_encoder_2, text_encoder_3, vae")
    said = [line for line in (run / "report.md").read_text().splitlines() if line.startswith("Left whole: ")]
    assert [sorted(line[12:-1].split(", ")) for line in said] == [whole.split(", ")]
    assert (run / "grid.png").exists() == (kind == "flux")


def test_they_are_sampled_and_judged_by_the_other_scripts(transformers, tmp_path):
    """As their classes are by default: SD3 beside its own INT8 and FP8, pruned, by evaluate.py."""
    import evaluate

    folder, run = transformers["sd3"]
    models = [folder, run / "final-int8", run / "final-fp8"]
    more = ["--dataset_name", "shapes", "--num_images", 2, "--steps", 2, "--resolution", 32]
    more += ["--num_real_images", 2, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out"]
    run_in_process(evaluate, "--models", *models, *more)
    rows = read_json(tmp_path / "out" / "results.json")["configurations"]
    assert [row["guidance_scale"] for row in rows] == [7.0] * 3 and [row["model"] for row in rows] == list(
        map(str, models)
    )
    assert rows[0]["unet_parameters"] == channels.count(load_pipeline(folder).transformer) > rows[1]["unet_parameters"]
    assert (
        rows[1]["unet_parameters"] == rows[2]["unet_parameters"]
        and rows[2]["bytes_on_disk"] < rows[0]["bytes_on_disk"]
    )


# Opened again

FRESH = """
import json, sys, torch
torch.set_num_threads(1)
import diffusers
def sample(pipe, out):
    images = pipe(["a red ring"], num_inference_steps=2, guidance_scale=3, height=32, width=32,
                  generator=torch.Generator().manual_seed(0), output_type="pt").images
    torch.save(images, out)
said = {}
for name, folder in json.loads(sys.argv[1]).items():
    code = open(folder + "/README.md").read().split("```python\\n")[1].split("```")[0]
    names = {}
    exec(code.replace("num_inference_steps=50", "num_inference_steps=2, height=32, width=32"), names)
    sample(names["pipe"], name + ".pt")
    if name not in ("final", "int8"):
        continue
    options = {"dtype": names["pipe"].dtype}
    try:
        diffusers.DiffusionPipeline.from_pretrained(folder, **options)
    except ValueError as error:
        said[name] = str(error)
    import pruned_models
    index = json.load(open(folder + "/model_index.json"))
    classes = {part: getattr(pruned_models, entry[1]) for part, entry in index.items()
               if isinstance(entry, list) and entry[0] == "pruned_models"}
    parts = {part: cls.from_pretrained(folder, subfolder=part, **options) for part, cls in classes.items()}
    sample(diffusers.StableDiffusionPipeline.from_pretrained(folder, **parts, **options), name + "-imported.pt")
assert not [name for name in sys.modules if name.split(".")[0] == "common"]
json.dump(said, open("said.json", "w"))
"""


def test_a_fresh_process_gives_the_images_of_memory_exactly(uneven, transformers, distilled, tmp_path):
    """In another folder, without this repository, by the code on the cards: pruned_models.py beside the weights.

    Or by a copy of that file, with which no code that came with the weights need be trusted.
    """
    folders = {"final": uneven / "final", "int8": uneven / "final-int8", "lora": distilled["train_flash_lora"]}
    for kind, (_, run) in transformers.items():
        folders.update({kind: run / "final-int8", f"{kind}-fp8": run / "final-fp8"})
    shutil.copy(pruned_models.__file__, tmp_path)
    jobs = json.dumps({name: str(folder) for name, folder in folders.items()})
    clean = {**environment(), "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", FRESH, jobs], check=True, cwd=tmp_path, env=clean)
    for name, folder in folders.items():
        images = images_in_memory(open_output(folder), 2)
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        if name == "lora":  # merged here, an adapter there
            torch.testing.assert_close(found, images, atol=1e-4, rtol=0)
        else:
            assert torch.equal(found, images), name
        assert images.float().std() > 0.02, name
        if name in ("final", "int8"):
            assert torch.equal(torch.load(tmp_path / f"{name}-imported.pt", weights_only=True), images), name
    said = read_json(tmp_path / "said.json")
    assert set(said) == {"final", "int8"} and all("trust_remote_code=True" in text for text in said.values())
    assert type(load_pipeline(uneven / "final").unet) is pruned_models.PrunedUNet2DConditionModel
