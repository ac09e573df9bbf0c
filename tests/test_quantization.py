"""INT8 and FP8 weights: what they cover and cost, that they come back exactly, and what is refused."""

import contextlib
import importlib.machinery
import json
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
from conftest import environment, random_pipeline, run_in_process, save_random_lora
from launching import SHAPES, error_of, images_in_memory, quick
from random_transformers import random_transformer_pipeline
from safetensors import safe_open
from safetensors.torch import save_file

import inference
from common.compression import channels, quantization, quantized_folders
from common.compression.manifest import write_manifest
from common.compression.pruning import create_pruned_pipeline
from common.compression.quantized_folders import (
    is_packed,
    quantization_of,
    refuse_packed,
    refuse_quantized,
    saved_dtype,
    unquantized_of,
)
from common.contract import TINY_SD, write_distillation
from common.errors import ModelError, UsageError
from common.model_files import weight_files
from common.outputs import export_pipeline, open_output
from common.pipelines import image_to_image, load_pipeline

MODELS = ("unet", "text_encoder", "vae")
CONTRACT = {"parent": "p", "revision": None, "variant": None, "steps": None, "guidance": "cfg", "guidance_scale": 3.0}


def inputs(unet, batch=4):
    """Arguments of a UNet's forward: (z, t, text) and keywords."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(batch, 20, unet.config.cross_attention_dim, generator=generator)
    z, t = torch.randn(batch, 4, 8, 8, generator=generator), torch.linspace(20, 999, batch).long()
    return (z.to(unet.dtype), t, text.to(unet.dtype)), {"return_dict": False}


@torch.no_grad()
def relative_error(unet, expected, calls):
    error = sum((unet(*args, **kwargs)[0].float() - e).square().sum() for (args, kwargs), e in zip(calls, expected))
    return (error / sum(e.square().sum() for e in expected)).sqrt().item()


STOCK = """
import json, sys, torch
torch.set_num_threads(1)
from diffusers import DiffusionPipeline
for folder, out, options in json.loads(sys.argv[1]):
    options = {"dtype": torch.bfloat16, **options} if options.pop("dtype", True) else options
    pipe = DiffusionPipeline.from_pretrained(folder, **options)
    images = pipe(["a red ring"], num_inference_steps=2, guidance_scale=3, height=32, width=32,
                  generator=torch.Generator().manual_seed(0), output_type="pt").images
    torch.save(images, out)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{name: (folder, images in memory)} of quantized pipelines: tiny-sd, SDXL's shape, tiny-sd pruned, and in FP8."""
    found = {}
    for name in ("tiny-sd", "sdxl", "pruned", "fp8"):
        pipeline = random_pipeline("sdxl") if name == "sdxl" else load_pipeline(TINY_SD)
        for model in MODELS if name == "pruned" else ():
            module = getattr(pipeline, model)
            halves = {group.name: list(range(0, group.units, 2)) for group in channels.groups_of(module)[::2]}
            channels.prune(module, halves)
        quantization.quantize_pipeline(pipeline, kind="fp8" if name == "fp8" else "int8")
        pipeline.set_progress_bar_config(disable=True)
        folder = tmp_path_factory.mktemp(name) / "pipeline"
        pipeline.save_pretrained(folder)
        found[name] = folder, images_in_memory(pipeline, 2)
    return found


def test_a_fresh_process_gives_the_images_of_memory_exactly(saved, tmp_path):
    """By stock diffusers, outside the repository; a pruned one by the file beside its weights, which it must trust."""
    jobs = [[str(saved[name][0]), str(tmp_path / f"{name}.pt"), {}] for name in ("tiny-sd", "sdxl", "fp8")]
    jobs += [[str(saved["pruned"][0]), str(tmp_path / "pruned.pt"), {"trust_remote_code": True}]]
    jobs += [[str(saved["tiny-sd"][0]), str(tmp_path / "plain.pt"), {"dtype": False}]]  # that names no dtype
    command = [sys.executable, "-c", STOCK, json.dumps(jobs)]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment())
    for name, (_, images) in saved.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.pt", weights_only=True), images), name
        assert images.float().std() > 0.05
    assert torch.equal(torch.load(tmp_path / "plain.pt", weights_only=True), saved["tiny-sd"][1])


def test_this_repository_opens_them_in_the_dtype_they_were_saved_in(saved, capsys):
    for name, (folder, images) in saved.items():
        pipeline = load_pipeline(folder, torch.float32)
        assert torch.equal(images_in_memory(pipeline, 2), images), name
        assert {getattr(pipeline, model).dtype for model in MODELS} == {torch.bfloat16}
        assert image_to_image(pipeline).unet is pipeline.unet  # nothing was cast
        kind = "FP8 (torchao)" if name == "fp8" else "INT8 (torchao)"
        assert quantization_of(folder) == kind and saved_dtype(folder) == torch.bfloat16
        assert f"{folder}: {kind} weights, the rest in torch.bfloat16, as saved." in capsys.readouterr().out
    assert quantization_of(TINY_SD) is None


def test_linear_layers_convolutions_and_embeddings_are_covered(saved):
    pipeline = load_pipeline(saved["tiny-sd"][0])
    for model in MODELS:
        counts = quantization.coverage(getattr(pipeline, model))
        kinds = {kind for kind, dtype in counts if dtype == torch.int8}
        assert kinds == ({"Linear", "Embedding"} if model == "text_encoder" else {"Linear", "Conv2d"})
        assert quantization.covered(getattr(pipeline, model)) > 0.98
        size = (saved["tiny-sd"][0] / model).glob("*.safetensors")
        bytes_on_disk, bytes_of = sum(file.stat().st_size for file in size), quantization.bytes_of
        assert bytes_of(getattr(pipeline, model)) < 0.54 * bytes_of(getattr(load_pipeline(TINY_SD), model).half())
        assert abs(bytes_on_disk / bytes_of(getattr(pipeline, model)) - 1) < 0.45  # headers: much, of such a small one


def test_of_fp8_linear_layers_and_embeddings_alone(saved):
    """Convolutions stay in bfloat16; the bytes that are told are those of the files; the error is that of FP8."""
    pipeline, plain = load_pipeline(saved["fp8"][0]), load_pipeline(TINY_SD)
    for name in quantization.layers_of(plain.unet, kind="fp8")[:3]:
        weight, found = (p.unet.get_submodule(name).weight for p in (plain, pipeline))
        error = (found.dequantize().float() - weight).norm() / weight.norm()
        assert 0.01 < error < 0.035, name  # three bits of mantissa: 1/16 at most
    for model in MODELS:
        module, half = getattr(pipeline, model), quantization.bytes_of(getattr(plain, model).half())
        counts, size = quantization.coverage(module), quantization.bytes_of(module)
        kinds = {kind for kind, dtype in counts if dtype == torch.float8_e4m3fn}
        assert kinds == ({"Linear", "Embedding"} if model == "text_encoder" else {"Linear"})
        assert {dtype for kind, dtype in counts if kind == "Conv2d"} <= {torch.bfloat16}
        with safe_open(next((saved["fp8"][0] / model).glob("*.safetensors")), "pt") as file:
            assert size == sum(file.get_tensor(name).nbytes for name in file.keys())
        least = 1 - quantization.covered(module) / 2
        assert least < size / half < least + 0.05  # and the scales
    notes = quantization.covered_notes(pipeline, kind="fp8")
    assert "unet 33.9 %" in notes["FP8 weights"] and "linear layers alone" in notes["convolutions"]


def hardware(monkeypatch, capability):
    """This machine as if with a GPU of that compute capability: torch multiplies float8 on the CPU too."""
    monkeypatch.setattr("common.compression.quantized_folders.capability", lambda: capability)
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda *_: None)


def test_products_in_float8_where_the_hardware_has_them(tmp_path, monkeypatch):
    """Of layers whose sides are multiples of 16; of the others the weights alone are; refused by name elsewhere."""
    pipeline = load_pipeline(TINY_SD)
    expected = images_in_memory(pipeline, 2)
    for capability, there in (((0, 0), "there is none here"), ((8, 6), "this one has 8.6")):
        hardware(monkeypatch, capability)
        with pytest.raises(UsageError, match=f"--fp8_activations needs a CUDA GPU .* 8.9 or later.*, and {there}"):
            quantization.quantize_pipeline(pipeline, kind="fp8", activations=True)
    hardware(monkeypatch, (8, 9))
    quantization.quantize_pipeline(pipeline, kind="fp8", activations=True)
    for model in MODELS:
        module = getattr(pipeline, model)
        for name in quantization.layers_of(module, kind="fp8"):
            layer = module.get_submodule(name)
            sixteens = isinstance(layer, torch.nn.Linear) and not any(size % 16 for size in layer.weight.shape)
            assert (layer.weight.act_quant_kwargs is not None) == sixteens, name
    images = images_in_memory(pipeline, 2)
    assert 1e-3 < (images.float() - expected).abs().mean() < 0.04
    assert "8.9 or later" in quantization.covered_notes(pipeline, kind="fp8", activations=True)["linear layers"]
    pipeline.save_pretrained(tmp_path / "fp8")
    assert torch.equal(images_in_memory(load_pipeline(tmp_path / "fp8"), 2), images)
    hardware(monkeypatch, (0, 0))
    with pytest.raises(
        ModelError, match=r"fp8: its weights are FP8 \(torchao\): to run them takes a CUDA GPU of comp"
    ):
        load_pipeline(tmp_path / "fp8")


def test_a_diffusion_transformer_too(tmp_path):
    """SD3's, whose first and last layer and all norms stay; stock diffusers reloads it exactly."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    widths = dict(joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8)
    heads = dict(num_layers=2, attention_head_dim=8, num_attention_heads=2)
    transformer = SD3Transformer2DModel(sample_size=8, in_channels=4, out_channels=4, **widths, **heads)
    z, text, pooled = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16), torch.randn(1, 16)
    with torch.no_grad():
        expected = transformer(z, text, pooled, torch.tensor([500])).sample
        call = [value.to(quantization.DTYPE) for value in (z, text, pooled)]
        quantization.quantize_model(transformer)
        output = transformer(*call, torch.tensor([500])).sample
        assert (output - expected).norm() < 0.03 * expected.norm()
        assert type(transformer.proj_out.weight) is torch.nn.Parameter
        transformer.save_pretrained(tmp_path)
        again = SD3Transformer2DModel.from_pretrained(tmp_path, dtype=quantization.DTYPE)
        assert torch.equal(again(*call, torch.tensor([500])).sample, output)
    assert quantization.covered(again) > 0.9 and quantization_of(tmp_path) == "INT8 (torchao)"


def test_sd15_is_covered_to_99_percent_in_half_of_its_bytes():
    """Its UNet, counted without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    quantization.quantize_model(unet)
    counts = quantization.coverage(unet)
    assert sum(counts.values()) == 859520964 and quantization.covered(unet) > 0.999
    assert counts["Conv2d", torch.int8] > 2 * counts["Linear", torch.int8] > 5e8  # two thirds are convolutions
    assert quantization.bytes_of(unet) < 0.9e9


def test_the_error_of_the_output_is_small_and_rounding_after_the_integers_smaller():
    reference = load_pipeline(TINY_SD).unet
    calls = [inputs(reference)]
    with torch.no_grad():
        expected = [reference(*args, **kwargs)[0] for args, kwargs in calls]
    errors = []
    for before in (torch.float32, torch.bfloat16):
        unet = load_pipeline(TINY_SD, before).unet
        quantization.quantize_model(unet)
        errors.append(relative_error(unet, expected, [inputs(unet)]))
    assert 1e-3 < errors[0] < errors[1] < 0.015


def test_the_layers_that_mind_most_are_found_and_left(pipelines, tmp_path):
    pipeline = load_pipeline(pipelines())
    calls, layer = [inputs(pipeline.unet)], "up_blocks.1.resnets.0.conv1"
    weight = pipeline.unet.get_submodule(layer).weight
    weight.data[:, 0] *= 30  # beside which the other inputs are rounded to nearly nothing
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    errors = quantization.sensitivity(pipeline.unet, calls)
    assert set(errors) == set(quantization.layers_of(pipeline.unet)) and "conv_in" not in errors
    assert all(torch.equal(value, before[name]) for name, value in pipeline.unet.state_dict().items())
    assert quantization.worst(errors, 1) == [layer] and quantization.worst(errors, 0) == []
    with torch.no_grad():
        expected = [pipeline.unet(*args, **kwargs)[0] for args, kwargs in calls]
    whole = load_pipeline(pipelines())
    whole.unet.load_state_dict(before)
    quantization.quantize_pipeline(whole)
    quantization.quantize_pipeline(pipeline, skip=[f"unet.{layer}"])
    assert pipeline.unet.get_submodule(layer).weight.dtype == torch.bfloat16
    assert type(pipeline.unet.get_submodule(layer).weight) is torch.nn.Parameter
    half = [inputs(pipeline.unet)]
    assert relative_error(pipeline.unet, expected, half) < relative_error(whole.unet, expected, half)
    pipeline.save_pretrained(tmp_path / "skipped")
    assert torch.equal(images_in_memory(load_pipeline(tmp_path / "skipped"), 2), images_in_memory(pipeline, 2))


def test_a_lora_is_merged_before_it_is_rounded(pipelines, tmp_path):
    lora = tmp_path / "lora"
    save_random_lora(load_pipeline(pipelines()), lora, pipelines(), 8.0)
    export_pipeline(open_output(lora), lora, tmp_path / "lora-int8", "int8", {"made from": "a test"})
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    plain, merged = load_pipeline(pipelines()), open_output(lora)
    plain, merged = (pipeline.unet.get_submodule(layer).weight for pipeline in (plain, merged))
    found = load_pipeline(tmp_path / "lora-int8").unet.get_submodule(layer).weight.dequantize().float()
    assert (found - merged).norm() < 0.01 * merged.norm() < 0.1 * (merged - plain).norm()
    card = (tmp_path / "lora-int8" / "README.md").read_text()
    assert "dtype=torch.bfloat16" in card and "by torchao" in card and "unet 97." in card and "| a test |" in card


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_an_export_that_was_not_written_whole_is_not_called_done(pipelines, tmp_path, monkeypatch, kind):
    """One scale is missing of what torchao takes a weight apart into; floats of 8 bits were written as others."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    save = StableDiffusionPipeline.save_pretrained

    def in_part(pipeline, folder):
        save(pipeline, folder)
        file = next((folder / "unet").glob("*.safetensors"))
        tensors = load_file(file)
        if kind == "int8":
            del tensors[next(name for name in tensors if name.endswith("_scale"))]
        else:
            name = next(name for name in tensors if name.endswith("_qdata"))
            tensors[name] = tensors[name].to(torch.float8_e5m2)
        save_file(tensors, file)

    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", in_part)
    source = tmp_path / "source"
    source.mkdir()
    write_distillation(source, **CONTRACT)
    with pytest.raises(RuntimeError, match=f"{'_scale' if kind == 'int8' else '_qdata'} differs or is missing"):
        export_pipeline(load_pipeline(pipelines()), source, tmp_path / "out", kind, {})
    assert not (tmp_path / "out").exists()


# Refused


@pytest.mark.parametrize("script", ["train_guided", "train_student_kd", "train_text_encoder_kd", "prepare_unet_small"])
def test_a_quantized_pipeline_is_no_teacher(saved, tmp_path, capsys, script):
    import importlib

    path = str(saved["tiny-sd"][0])
    arguments = ["--pretrained_model_name_or_path", path, "--output_dir", tmp_path / "out"]
    arguments += ["--width_ratio", 0.5] if script == "prepare_unet_small" else SHAPES
    error = error_of(importlib.import_module(script), arguments, capsys)
    assert f"error: --pretrained_model_name_or_path {path}: its weights are quantized, INT8 (torchao)" in error
    assert "start from the unquantized" in error and error.count("error: ") == 1


def test_nor_a_student(saved, pipelines, tmp_path, capsys):
    import train_student_kd

    shutil.copytree(saved["tiny-sd"][0], tmp_path / "student")
    write_manifest(tmp_path / "student", {"feature_pairs": []})
    arguments = quick(pipelines, tmp_path, "--student_model", tmp_path / "student")
    arguments[arguments.index(pipelines())] = str(TINY_SD)
    assert "its weights are quantized" in error_of(train_student_kd, arguments, capsys)


# Packed in 4 bits: nunchaku's

DECLARED = {"method": "svdquant", "weight": {"dtype": "int4", "group_size": 64}, "activation": {"dtype": "int4"}}
LITE = {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16"}
LITE["svdq_w4a4"] = {"precision": "nvfp4", "group_size": 16, "rank": 32, "targets": ["conv_in"]}
FLUX_DEV = "nunchaku-tech/nunchaku-flux.1-dev/svdq-fp4_r32-flux.1-dev.safetensors"  # as a seed of this project has it


def save_packed(path, **metadata):
    """A small file in the layout of nunchaku's: a layer of qkv, and the header."""
    layer = "transformer_blocks.0.qkv_proj"
    tensors = {f"{layer}.qweight": torch.zeros(8, 4, dtype=torch.int8), f"{layer}.wscales": torch.zeros(1, 8)}
    tensors |= {f"{layer}.{name}": torch.zeros(8, 2) for name in ("proj_down", "proj_up", "smooth_factor")}
    save_file(tensors, path, metadata={key: json.dumps(value) for key, value in metadata.items()})
    return path


@pytest.fixture
def packed(pipelines, tmp_path):
    """{how it is known: (path, the model that it was made from)} of packed weights."""
    model_class = {"model_class": "NunchakuFluxTransformer2dModel"}
    by_config, by_name = tmp_path / "config", tmp_path / "svdq-int4_r32-flux.1-schnell.safetensors"
    shutil.copytree(pipelines(), by_config)
    config = by_config / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": LITE}))
    for name in ("header", "card"):
        (tmp_path / name).mkdir()
    (tmp_path / "card" / "README.md").write_text("---\nbase_model:\n- someone/FLUX-tuned\n---\n")
    named = {"config": {"_name_or_path": "black-forest-labs/FLUX.1-dev"}}
    return {
        "lite": (by_config, None),
        "name": (save_packed(by_name, **model_class), "black-forest-labs/FLUX.1-schnell"),
        "header": (
            save_packed(tmp_path / "header" / "model.safetensors", quantization_config=DECLARED, **named).parent,
            "black-forest-labs/FLUX.1-dev",
        ),
        "card": (save_packed(tmp_path / "card" / "model.safetensors"), "someone/FLUX-tuned"),
        "keys": (save_packed(tmp_path / "keys.safetensors"), None),
        "not here": (FLUX_DEV, "black-forest-labs/FLUX.1-dev"),
    }


def test_packed_weights_of_4_bits_are_known_by_names_configs_and_headers(packed, tmp_path):
    for how, (path, model) in packed.items():
        method = "nunchaku_lite" if how == "lite" else "svdquant"
        assert quantization_of(path) == f"4-bit ({method})" and unquantized_of(path) == model, how
        instead = f"the unquantized model, {model}," if model else "the FP16 or BF16 model that it was made from"
        said = f"--teacher {path}: its weights are packed in 4 bits ({method}), so nothing of it can be cut"
        with pytest.raises(ModelError, match=re.escape(said)) as refused:
            refuse_quantized(path, flag="--teacher")
        assert f"start from {instead}" in str(refused.value)
        with contextlib.nullcontext() if how == "lite" else pytest.raises(ModelError, match=re.escape(said)):
            refuse_packed(path, f"--teacher {path}")
        with pytest.raises(ModelError, match="model_path .*packed in 4 bits"):
            create_pruned_pipeline(model_path=str(path))
    save_file({"blocks.0.weight": torch.zeros(2, 2)}, tmp_path / "plain.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    assert quantization_of(tmp_path / "plain.safetensors") is quantization_of(tmp_path / "torn.safetensors") is None
    assert not is_packed(tmp_path / "torn.safetensors") and not is_packed("black-forest-labs/FLUX.1-dev")


def test_what_packed_weights_lack_here_is_said(packed, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DIFFUSERS_TRUST_REMOTE_KERNELS", raising=False)
    found = {}
    for how, capability in (("name", (0, 0)), ("not here", (8, 9)), ("lite", (9, 0)), ("keys", (8, 6))):
        hardware(monkeypatch, capability)
        words = ["--pretrained_model_name_or_path", packed[how][0], "--output_dir", tmp_path / "out"]
        found[how] = error_of(inference, words, capsys)
        assert found[how].count("\n") == 1 and "4-bit" in found[how]
    assert "nunchaku's package" in found["name"] and "compute capability 7.5 (Turing) or later" in found["name"]
    assert "10.0 (Blackwell)" in found["not here"]
    assert "the package kernels" in found["lite"] and "DIFFUSERS_TRUST_REMOTE_KERNELS=true" in found["lite"]
    assert "but Hopper" in found["lite"]
    assert "capability" not in found["keys"] and "what it was made from" in found["keys"]


def test_nunchaku_s_transformer_goes_into_the_pipeline_that_it_was_made_from(packed, tmp_path, capsys, monkeypatch):
    """With stand-ins for its package, the GPU and the hub: inference.py's images are that pipeline's."""
    random_transformer_pipeline("flux").save_pretrained(tmp_path / "flux")
    asked = []

    class Transformer:
        @staticmethod
        def from_pretrained(path):
            asked.append(path)
            return load_pipeline(tmp_path / "flux", torch.bfloat16).transformer

    package = types.ModuleType("nunchaku")
    package.__spec__ = importlib.machinery.ModuleSpec("nunchaku", None)
    monkeypatch.setitem(sys.modules, "nunchaku", package)
    monkeypatch.setitem(quantized_folders.MADE_FROM, "flux.1-schnell", str(tmp_path / "flux"))
    hardware(monkeypatch, (8, 6))
    with pytest.raises(ModelError, match="nunchaku that is installed is not"):  # PyPI's, about something else
        load_pipeline(packed["name"][0])
    package.NunchakuFluxTransformer2dModel = Transformer
    words = ["--prompt", "a red ring", "--steps", 2, "--resolution", 32, "--dtype", "bf16", "--device", "cpu"]
    images = []
    for path in (packed["name"][0], tmp_path / "flux"):
        run_in_process(inference, "--pretrained_model_name_or_path", path, "--output_dir", tmp_path / "out", *words)
        images.append(next((tmp_path / "out" / "images").glob("*/*.png")).read_bytes())
    flux, sources = {"path": tmp_path / "flux"}, {"path": str(packed["name"][0])}
    assert weight_files(sources, "transformer") == [packed["name"][0]]
    assert weight_files(sources, "vae") == weight_files(flux, "vae") != []
    assert asked == [str(packed["name"][0])] and images[0] == images[1]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["configurations"][0]["guidance_scale"] == 3.5 and results["configurations"][0]["timesteps"] == []
    for wrong in (["--compare_baseline"], ["--scheduler", "ddim"], ["--negative_prompt", "blue"]):
        model = ["--pretrained_model_name_or_path", tmp_path / "flux", "--output_dir", tmp_path / "refused"]
        error = error_of(inference, [*model, *words, *wrong], capsys)
        assert f"error: {wrong[0]} " in error and "FLUX" in error.upper() and not (tmp_path / "refused").exists()


def test_bitsandbytes_needs_a_gpu(pipelines, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--int8_backend bitsandbytes needs a CUDA GPU"):
        quantization.quantize_pipeline(load_pipeline(pipelines()), "bitsandbytes")


@pytest.mark.gpu
def test_bitsandbytes_covers_linear_layers(tmp_path):
    pipeline = load_pipeline(TINY_SD)
    quantization.quantize_pipeline(pipeline, "bitsandbytes")
    kinds = {kind for kind, dtype in quantization.coverage(pipeline.unet) if dtype == torch.int8}
    assert kinds == {"Linear8bitLt"} and 0.2 < quantization.covered(pipeline.unet) < 0.5
    pipeline.save_pretrained(tmp_path / "int8")
    assert quantization_of(tmp_path / "int8") == "INT8 (bitsandbytes)"
