"""INT8 weights: what they cover and cost, that they come back exactly, and what is refused."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import environment, random_pipeline, save_random_lora
from launching import SHAPES, error_of, images_in_memory, quick
from safetensors.torch import save_file

from common.compression import channels, quantization
from common.compression.manifest import write_manifest
from common.compression.quantized_folders import quantization_of, refuse_quantized, saved_dtype
from common.contract import TINY_SD, write_distillation
from common.errors import ModelError, UsageError
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
    """{name: (folder, images in memory)} of quantized pipelines: tiny-sd, SDXL's shape, and tiny-sd pruned."""
    found = {}
    for name in ("tiny-sd", "sdxl", "pruned"):
        pipeline = random_pipeline("sdxl") if name == "sdxl" else load_pipeline(TINY_SD)
        for model in MODELS if name == "pruned" else ():
            module = getattr(pipeline, model)
            halves = {group.name: list(range(0, group.units, 2)) for group in channels.groups_of(module)[::2]}
            channels.prune(module, halves)
        quantization.quantize_pipeline(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        folder = tmp_path_factory.mktemp(name) / "pipeline"
        pipeline.save_pretrained(folder)
        found[name] = folder, images_in_memory(pipeline, 2)
    return found


def test_a_fresh_process_gives_the_images_of_memory_exactly(saved, tmp_path):
    """By stock diffusers, outside the repository; a pruned one by the file beside its weights, which it must trust."""
    jobs = [[str(saved[name][0]), str(tmp_path / f"{name}.pt"), {}] for name in ("tiny-sd", "sdxl")]
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
        assert quantization_of(folder) == "INT8 (torchao)" and saved_dtype(folder) == torch.bfloat16
    assert "INT8 (torchao) weights, the rest in torch.bfloat16, as saved." in capsys.readouterr().out
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


def test_an_export_that_was_not_written_whole_is_not_called_done(pipelines, tmp_path, monkeypatch):
    """One scale is missing of what torchao takes a weight apart into."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    save = StableDiffusionPipeline.save_pretrained

    def in_part(pipeline, folder):
        save(pipeline, folder)
        file = next((folder / "unet").glob("*.safetensors"))
        tensors = load_file(file)
        del tensors[next(name for name in tensors if name.endswith("_scale"))]
        save_file(tensors, file)

    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", in_part)
    source = tmp_path / "source"
    source.mkdir()
    write_distillation(source, **CONTRACT)
    with pytest.raises(RuntimeError, match="_scale differs or is missing"):
        export_pipeline(load_pipeline(pipelines()), source, tmp_path / "int8", "int8", {})
    assert not (tmp_path / "int8").exists()


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


def test_packed_weights_of_4_bits_are_known_by_their_configs_and_headers(pipelines, tmp_path):
    declared = {"method": "svdquant", "weight": {"dtype": "int4", "group_size": 64}}
    by_config, by_header, by_keys = tmp_path / "config", tmp_path / "header", tmp_path / "keys.safetensors"
    shutil.copytree(pipelines(), by_config)
    config = by_config / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": declared}))
    by_header.mkdir()
    tensors = {"blocks.0.qkv.qweight": torch.zeros(2, 2, dtype=torch.int8)}
    plain = {"blocks.0.weight": torch.zeros(2, 2)}
    save_file(plain, by_header / "model.safetensors", metadata={"quantization_config": json.dumps(declared)})
    save_file(tensors, by_keys)
    for path in (by_config, by_header, by_keys):
        assert quantization_of(path) == "4-bit (svdquant)"
        with pytest.raises(ModelError, match=f"--teacher {path}: its weights are packed.*start from the FP16 or BF16"):
            refuse_quantized(path, flag="--teacher")
    save_file(plain, tmp_path / "plain.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    assert quantization_of(tmp_path / "plain.safetensors") is quantization_of(tmp_path / "torn.safetensors") is None


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
