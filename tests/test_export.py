"""export.py and what reads single files: names and tensors against stock diffusers' own loaders, and back."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_pipeline, read_json, run_in_process, save_random_lora
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from launching import error_of, images_in_memory
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import export
import inference
from common import lora_formats, single_file, workflows
from common.compression import lora_conversion
from common.compression import students as smaller
from common.compression.lora_conversion import Layer, attach, layer_shapes, read_lora
from common.contract import TINY_SD, read_distillation
from common.errors import UsageError
from common.judging.planning import plan_model
from common.original_layout import original_tensors
from common.pipelines import load_pipeline
from common.schedulers import saved_scheduler
from common.settle import settle

KINDS = ("sd1", "sd2", "sdxl")


def pipeline_of(kind):
    """A random pipeline, in its structure of SD1.x, SD2.x (linear projections) or SDXL."""
    pipeline = random_pipeline("sdxl" if kind == "sdxl" else "sd")
    given = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    changes = {} if kind == "sd1" else {"use_linear_projection": True}
    torch.manual_seed(1)
    if kind == "sdxl":  # whose text encoders differ in width, by which diffusers knows them in a file
        config = type(pipeline.text_encoder_2.config)(
            **{**pipeline.text_encoder_2.config.to_dict(), "hidden_size": 64}
        )
        pipeline.text_encoder_2 = type(pipeline.text_encoder_2)(config).eval()
        changes["cross_attention_dim"] = 32 + 64
    pipeline.unet = UNet2DConditionModel(**{**given, **changes}).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: the folder of its pipeline}."""
    made = {kind: tmp_path_factory.mktemp(kind) / "pipeline" for kind in KINDS}
    for kind, folder in made.items():
        pipeline_of(kind).save_pretrained(folder)
    return made


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Where single files are converted to."""
    monkeypatch.setattr(single_file, "HF_HOME", str(tmp_path / "home"))


def random_layers(pipeline, rank=3):
    """{"<component>.<module>": Layer} of nearly every layer of UNet and text encoders; no rank equals its alpha."""
    generator, found = torch.Generator().manual_seed(0), {}
    for number, (name, shape) in enumerate(layer_shapes(pipeline).items()):
        if name.startswith("text") and not name.endswith(("q_proj", "fc1", "out_proj")):
            continue
        down = torch.randn(rank, *shape[1:], generator=generator) * 0.1
        up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) * 0.1
        found[name] = Layer(down, up, float(8 + number % 5))
    return found


def models_of(pipeline):
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None}


def assert_same_weights(a, b):
    for name, module in a.components.items():
        if isinstance(module, torch.nn.Module):
            ours, theirs = module.state_dict(), getattr(b, name).state_dict()
            assert ours.keys() == theirs.keys(), name
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


# Pipelines


@pytest.mark.parametrize("kind", [*KINDS, "sd_base", "sd_small", "sd_tiny"])
def test_stock_diffusers_reads_the_single_file(kind, folders, tmp_path):
    pipeline = load_pipeline(TINY_SD if kind in smaller.VARIANTS else folders[kind])
    if kind in smaller.VARIANTS:
        pipeline.unet, _ = smaller.build_student(pipeline.unet, kind)
    pipeline.save_pretrained(tmp_path / "pipeline")
    args = ["--pretrained_model_name_or_path", tmp_path / "pipeline", "--dtype", "fp32", "--output_dir", tmp_path]
    run_in_process(export, *args, "--name", "file")
    stock = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    loaded = stock.from_single_file(
        str(tmp_path / "file.safetensors"), config=str(tmp_path / "file-config"), local_files_only=True
    )
    assert_same_weights(pipeline, loaded)
    loaded.set_progress_bar_config(disable=True)
    for each in (pipeline, loaded):  # out of the files' mapped memory: kernels round by how a weight is aligned
        each.register_modules(**{n: copy.deepcopy(m) for n, m in each.components.items() if hasattr(m, "parameters")})
    assert torch.equal(images_in_memory(pipeline, 2), images_in_memory(loaded, 2))
    # And by the flag of every script here, with what was written beside it.
    folder = single_file.pipeline_folder(tmp_path / "file.safetensors")
    assert_same_weights(pipeline, load_pipeline(folder))
    assert load_pipeline(folder).scheduler.config == pipeline.scheduler.config
    assert load_pipeline(folder).tokenizer("a red ring").input_ids == pipeline.tokenizer("a red ring").input_ids


def test_names_of_published_models():
    """Some names of the original files, known by heart."""
    published = {
        "sd1": {
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 768),
            "model.diffusion_model.input_blocks.9.0.op.weight": (1280, 1280, 3, 3),
            "model.diffusion_model.middle_block.2.out_layers.3.weight": (1280, 1280, 3, 3),
            "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
            "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
            "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
            "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
            "first_stage_model.decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
            "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        },
        "sd2": {"cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024)},
        "sdxl": {
            "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
            "model.diffusion_model.output_blocks.2.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
            "conditioner.embedders.1.model.text_projection": (1280, 1280),
            "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        },
    }
    counts = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}
    for kind, expected in published.items():
        parts = single_file.empty_parts(read_json(single_file.ASSETS / f"{kind}.json"))
        tensors = {name: (tuple(tensor.shape), "F16") for name, tensor in original_tensors(parts).items()}
        assert {name: tensors[name][0] for name in expected} == expected
        assert sum(p.numel() for p in parts["unet"].parameters()) == counts[kind]
        assert single_file.kind_of_file(tensors, "x") == kind
        assert single_file.readers_of(parts) == list(single_file.EVERY_TOOL)


def test_a_published_file_needs_nothing_beside_it(folders, tmp_path, monkeypatch, capsys):
    """Configs and CLIP's tokenizer from assets/, here those of a small SD2.x."""
    configs = {
        str(file.relative_to(folders["sd2"])): json.loads(file.read_text()) for file in folders["sd2"].rglob("*.json")
    }
    configs = {name: content for name, content in configs.items() if not name.startswith("tokenizer")}
    configs["text_encoder/config.json"].update(vocab_size=49408, max_position_embeddings=77)
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "sd2.json").write_text(json.dumps({**configs, "tokenizer": {"pad_token": "!"}}))
    shutil.copy(single_file.ASSETS / "clip_merges.txt.gz", tmp_path / "assets")
    monkeypatch.setattr(single_file, "ASSETS", tmp_path / "assets")
    parts = single_file.empty_parts(configs)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator).half() for name, tensor in original_tensors(parts).items()
    }
    tensors["model_ema.decay"] = torch.ones(1)  # of a trainer's, beside what is needed
    save_file(tensors, tmp_path / "model.safetensors")
    folder = single_file.pipeline_folder(tmp_path / "model.safetensors")
    assert "SD2 in one file" in capsys.readouterr().out
    pipeline = load_pipeline(folder)
    found = original_tensors({name: getattr(pipeline, name) for name in parts})
    assert all(torch.equal(found[name], tensors[name].float()) for name in found)
    assert Path(folder, "unet", "diffusion_pytorch_model.safetensors").stat().st_size < 3 * sum(
        tensor.numel() for name, tensor in found.items() if "diffusion_model" in name
    )  # two bytes each, as they were
    known = [49406, 320, 1125, 539, 320, 2368, 267, 709, 7255, 127, 253, 528, 39121, 19277, 361, 49407]
    assert pipeline.tokenizer("a photo of a cat, größer 日本").input_ids == known  # by OpenCLIP's tokenizer
    assert pipeline.tokenizer.pad_token_id == 0
    assert single_file.pipeline_folder(tmp_path / "model.safetensors") == folder
    assert "in one file" not in capsys.readouterr().out  # only once
    save_file({**tensors, "a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert single_file.pipeline_folder(tmp_path / "model.safetensors") != folder


def test_prediction_type_of_a_file(tmp_path):
    name = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    for spread, kind in ((0.2, "v_prediction"), (0.05, "epsilon")):
        save_file({name: spread * torch.tensor([1.0, -1.0])}, tmp_path / "file.safetensors")
        configs = single_file.read_configs(tmp_path / "file.safetensors", "sd2", {})
        assert configs["scheduler/scheduler_config.json"]["prediction_type"] == kind
        assert configs["unet/config.json"]["sample_size"] == {"v_prediction": 96, "epsilon": 64}[kind]
    configs = single_file.read_configs(tmp_path / "file.safetensors", "sdxl", {"v_pred": 0, "ztsnr": 0})
    scheduler = configs["scheduler/scheduler_config.json"]
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["rescale_betas_zero_snr"]


def test_files_that_are_no_pipeline(folders, tmp_path):
    pipeline = load_pipeline(folders["sd1"])
    whole = original_tensors({name: getattr(pipeline, name) for name in ("unet", "vae", "text_encoder")})
    single_file.save_configs(pipeline, tmp_path / "small-config")

    def said(tensors, name="file"):
        path = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        with pytest.raises(single_file.ModelError) as error:
            single_file.pipeline_folder(path)
        assert str(path) in str(error.value)
        return str(error.value)

    def without(start):
        return {name: tensor for name, tensor in whole.items() if not name.startswith(start)}

    one = torch.ones(2, 2)
    assert "it is a LoRA" in said({"lora_unet_x.lora_down.weight": one})
    assert "no single file of SD1.x" in said({"model.diffusion_model.double_blocks.0.weight": one})
    assert "it has no VAE" in said(without("first_stage"))
    assert "no text encoder" in said(without("cond_stage"))
    assert "EDM's schedule" in said({**whole, "edm_mean": one})
    assert "none of the models as published" in said(whole)  # without its configs beside it
    lost = "first_stage_model.decoder.conv_out.weight"
    assert f"it lacks {lost}" in said(without(lost), "small")
    assert "is 1x8x3x3 and not 3x8x3x3" in said({**whole, lost: whole[lost][:1]}, "small")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08" + bytes(20))
    with pytest.raises(single_file.ModelError, match="no safetensors file, or a damaged one"):
        single_file.pipeline_folder(tmp_path / "torn.safetensors")


def test_every_way_in_takes_a_file(folders, tmp_path):
    """settle (all that train or prune), inference.py and evaluate.py; and what they then name is the folder."""
    run_in_process(export, "--pretrained_model_name_or_path", folders["sd1"], "--output_dir", tmp_path, "--name", "a")
    file = str(tmp_path / "a.safetensors")
    import train_guided

    args = train_guided.parse_args(["--pretrained_model_name_or_path", file, "--dataset_name", "shapes"])
    settle(args)
    assert args.pretrained_model_name_or_path == single_file.pipeline_folder(file) and args.resolution == 32
    args = inference.parse_args(["--pretrained_model_name_or_path", file])
    inference.check_arguments(args)
    assert inference.make_plan(args).model["path"] == single_file.pipeline_folder(file)
    import prepare_unet_small
    import train_add

    run_in_process(prepare_unet_small, "--pretrained_model_name_or_path", file, "--width_ratio", 0.5, "--dry_run")
    teacher = ["--pretrained_model_name_or_path", str(folders["sd1"])]
    student = train_add.parse_args([*teacher, "--student_model", file])
    train_add.check_models(student)
    assert student.student_model == single_file.pipeline_folder(file)
    args.guidance_scale, args.steps, args.trained_steps = None, [2], False
    assert plan_model(file, args).pipeline["path"] == single_file.pipeline_folder(file)


def test_who_reads_what():
    def readers(kind, spread=False, **changes):
        configs = read_json(single_file.ASSETS / f"{kind}.json")
        unet = dict(smaller.empty_unet(configs["unet/config.json"]).config)
        configs["unet/config.json"] = {**smaller.student_config(unet, changes.pop("variant", None)), **changes}
        return single_file.readers_of(single_file.empty_parts(configs), spread)

    assert readers("sd1", variant="sd_small") == readers("sd2", variant="sd_base") == ["ComfyUI"]
    assert readers("sd1", variant="sd_tiny") == ["ComfyUI"]
    assert readers("sd1", spread=True, variant="sd_tiny") == ["stable-diffusion.cpp"]
    assert readers("sd1", block_out_channels=[160, 320, 640, 640]) == []
    assert readers("sdxl", transformer_layers_per_block=[1, 1, 2]) == ["ComfyUI"]  # as deep as Vega
    assert readers("sdxl", variant="sd_base") == []  # as deep as no model that ComfyUI knows
    configs = read_json(single_file.ASSETS / "sd1.json")
    configs["text_encoder/config.json"]["num_hidden_layers"] = 6
    assert single_file.readers_of(single_file.empty_parts(configs)) == []


def test_tiny_for_stable_diffusion_cpp():
    """Three blocks a level, whether they are there or not."""
    configs = read_json(single_file.ASSETS / "sd1.json")
    whole = dict(smaller.empty_unet(configs["unet/config.json"]).config)
    configs["unet/config.json"] = smaller.student_config(whole, "sd_tiny")
    names = original_tensors(single_file.empty_parts(configs), spread=True)
    blocks = {name.removeprefix("model.diffusion_model.") for name in names if "_blocks." in name}
    inputs = {int(name.split(".")[1]) for name in blocks if name.startswith("input")}
    outputs = {int(name.split(".")[1]) for name in blocks if name.startswith("output")}
    assert inputs == {0, 1, 3, 4, 6, 7} and outputs == {0, 1, 2, 3, 4, 5, 6, 7}
    ups = {name.rsplit(".", 1)[0] for name in blocks if name.endswith("conv.weight") and "output" in name}
    assert ups == {"output_blocks.2.1.conv", "output_blocks.5.2.conv"}


# LoRAs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", ["kohya", "comfyui"])
def test_a_lora_comes_back_with_every_alpha(kind, style, folders, tmp_path):
    pipeline = load_pipeline(folders[kind])
    layers, file = random_layers(pipeline), tmp_path / "lora.safetensors"
    lora_formats.write_lora(file, layers, models_of(pipeline), style, {})
    assert lora_formats.same_layers(layers, read_lora(pipeline, file))
    args = ["--lora_path", file, "--pretrained_model_name_or_path", folders[kind], "--format", "diffusers"]
    run_in_process(export, *args, "--output_dir", tmp_path, "--name", "back")
    assert lora_formats.same_layers(layers, read_lora(pipeline, tmp_path / "back"))


@pytest.mark.parametrize("kind", KINDS)
def test_stock_diffusers_loads_kohyas_names(kind, folders, tmp_path):
    """The same images by stock diffusers' own loader as with the adapters themselves.

    With one alpha, as every LoRA made here has: of several, stock diffusers takes one for all.
    """
    ours, stock, plain = (load_pipeline(folders[kind]) for _ in range(3))
    chosen = ("attentions", "resnets", "text_encoder")
    layers = {
        name: layer._replace(alpha=32.0)
        for name, layer in random_layers(ours).items()
        if any(part in name for part in chosen)
    }
    attach(ours, layers, "student")
    lora_formats.write_lora(tmp_path / "lora.safetensors", layers, models_of(stock), "kohya", {})
    stock.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    expected = images_in_memory(ours, 2)
    torch.testing.assert_close(images_in_memory(stock, 2), expected, atol=1e-5, rtol=0)
    assert (images_in_memory(plain, 2) - expected).abs().max() > 0.01


def test_several_alphas_are_each_layers_own(folders, tmp_path):
    """By --lora_path here, where stock diffusers takes one for all."""
    ours, loaded = (load_pipeline(folders["sd1"]) for _ in range(2))
    layers, file = random_layers(ours), tmp_path / "lora.safetensors"
    attach(ours, layers, "student")
    lora_formats.write_lora(file, layers, models_of(loaded), "kohya", {})
    lora_conversion.load_converted(loaded, file, folders["sd1"])
    torch.testing.assert_close(images_in_memory(loaded, 2), images_in_memory(ours, 2), atol=1e-6, rtol=0)


def test_block_numbers_on_a_smaller_model(folders, tmp_path):
    """input_blocks.4 of the original is another block of a UNet that lost some: no guess is made."""
    manifest = {"block_map": {"up_blocks.0.resnets.1": "up_blocks.0.resnets.2"}}
    save_file({"diffusion_model.input_blocks.1.1.proj_in.alpha": torch.ones(())}, tmp_path / "lora.safetensors")
    with pytest.raises(UsageError, match="names layers by the original code's blocks"):
        lora_conversion.converted(load_pipeline(folders["sd1"]), tmp_path / "lora.safetensors", manifest)


def test_kohyas_names_are_kohyas(folders):
    names = lora_formats.names_of(models_of(load_pipeline(folders["sd1"])), "kohya").values()
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0" in names
    assert "lora_te_text_model_encoder_layers_1_self_attn_q_proj" in names
    names = lora_formats.names_of(models_of(load_pipeline(folders["sdxl"])), "kohya").values()
    assert "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q" in names
    assert "lora_te2_text_model_encoder_layers_1_mlp_fc1" in names
    names = lora_formats.names_of(models_of(load_pipeline(folders["sdxl"])), "comfyui").values()
    assert "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q" in names


def test_a_few_step_lora_keeps_its_contract(pipelines, tmp_path, capsys):
    """distillation.json and scheduler travel in the file's header, and come back; inference.py samples by them."""
    final, out = tmp_path / "run" / "lora" / "final", tmp_path / "out"
    save_random_lora(load_pipeline(pipelines()), final, pipelines(), alpha=32)
    run_in_process(export, "--lora_path", final, "--output_dir", out)
    with safe_open(out / "run.safetensors", "pt") as file:
        metadata = file.metadata()
    alphas = [v.item() for key, v in load_file(out / "run.safetensors").items() if key.endswith(".alpha")]
    assert set(alphas) == {32.0} and metadata["ss_network_alpha"] == "32" and metadata["ss_network_dim"] == "2"
    assert metadata["ss_base_model_version"] == "sd_v1" and metadata["modelspec.architecture"].endswith("v1/lora")
    assert read_distillation(out / "run.safetensors") == read_distillation(final)
    assert saved_scheduler(out / "run.safetensors").config == saved_scheduler(final).config
    plan = inference.make_plan(inference.parse_args(["--lora_path", str(out / "run.safetensors")]))
    assert plan.scheduler_from == "lora" and plan.steps == [2] and plan.guidance_scale == 1
    run_in_process(export, "--lora_path", out / "run.safetensors", "--format", "diffusers", "--output_dir", out)
    assert (out / "run" / "distillation.json").read_text() == (final / "distillation.json").read_text()
    assert saved_scheduler(out / "run").config == saved_scheduler(final).config
    nodes = {node["type"]: node["widgets_values"] for node in read_json(out / "run.json")["nodes"]}
    assert nodes["LoraLoaderModelOnly"] == ["run.safetensors", 1.0]
    assert nodes["KSampler"] == [0, "fixed", 2, 1.0, "lcm", "sgm_uniform", 1.0]
    assert (
        "sampling method LCM, schedule type SGM Uniform, 2 sampling steps, CFG scale 1" in (out / "run.md").read_text()
    )
    (out / "other-config").mkdir()
    whole = ["--lora_path", final, "--format", "single_file", "--name", "other", "--output_dir", out]
    assert "other-config is there already" in error_of(export, whole, capsys)
    error = error_of(export, ["--lora_path", final, "--output_dir", out], capsys)
    assert "run.safetensors is there already: give another --name, or --overwrite." in error
    run_in_process(export, "--lora_path", final, "--output_dir", out, "--overwrite", "--dtype", "fp16")
    assert {t.dtype for k, t in load_file(out / "run.safetensors").items() if "lora" in k[-16:]} == {torch.float16}


def test_a_lora_merged_into_a_file(pipelines, tmp_path):
    final = tmp_path / "run" / "lora" / "final"
    save_random_lora(load_pipeline(pipelines()), final, pipelines(), alpha=32)
    run_in_process(
        export, "--lora_path", final, "--format", "single_file", "--dtype", "fp32", "--output_dir", tmp_path
    )
    merged = load_pipeline(single_file.pipeline_folder(tmp_path / "run.safetensors"))
    adapted = load_pipeline(pipelines())
    lora_conversion.load_converted(adapted, final, pipelines())
    adapted.scheduler = saved_scheduler(final)
    expected = images_in_memory(adapted, 2, guidance_scale=1)
    torch.testing.assert_close(images_in_memory(merged, 2, guidance_scale=1), expected, atol=1e-5, rtol=0)
    assert read_distillation(tmp_path / "run-config")["steps"] == 2
    nodes = {node["type"]: node["widgets_values"] for node in read_json(tmp_path / "run.json")["nodes"]}
    assert nodes["CheckpointLoaderSimple"] == ["run.safetensors"] and "LoraLoaderModelOnly" not in nodes


# Workflows


@pytest.mark.parametrize("lora", [None, "lora.safetensors"])
def test_a_workflow_holds_together(lora):
    """Every link joins an output and an input of one type, and every input has one."""
    contract = {"steps": 4, "target": "next", "guidance": "baked", "guidance_scale": 1.0}
    scheduler = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    content = workflows.workflow(workflows.settings_of(contract), 512, scheduler, "model.safetensors", lora)
    nodes = {node["id"]: node for node in content["nodes"]}
    for number, source, output, target, slot, kind in content["links"]:
        assert number in nodes[source]["outputs"][output]["links"] and nodes[source]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][slot]["link"] == number and nodes[target]["inputs"][slot]["type"] == kind
    assert len(content["links"]) == sum(len(node["inputs"]) for node in nodes.values())
    by_type = {node["type"]: node for node in nodes.values()}
    assert by_type["KSampler"]["widgets_values"][2:6] == [4, 1.0, "euler", "sgm_uniform"]
    assert by_type["ModelSamplingDiscrete"]["widgets_values"] == ["v_prediction", True]
    assert ("LoraLoaderModelOnly" in by_type) == bool(lora)


def test_settings_elsewhere():
    few = {"steps": 2, "target": "x0", "guidance": "baked", "guidance_scale": 1.0}
    assert workflows.settings_of(few)["sampler"] == "lcm"
    assert workflows.settings_of({**few, "guidance": "cfg", "guidance_scale": 3.0})["cfg"] == 3.0
    assert workflows.settings_of({**few, "steps": None}) is None
    assert workflows.settings_of({**few, "guidance": "embedded"}) is None
    assert workflows.settings_of({"guidance": "cfg", "guidance_scale": 7.5}) is None


# Mistakes


def test_mistakes(folders, students, pipelines, tmp_path, capsys):
    def said(*words):
        return error_of(export, [*words, "--output_dir", tmp_path / "out"], capsys)

    model = ["--pretrained_model_name_or_path", folders["sd1"]]
    assert "Nothing to export" in said()
    assert "--format kohya is of a LoRA" in said(*model, "--format", "kohya")
    assert "--name a/b" in said(*model, "--name", "a/b")
    assert "has not BK-SDM-Tiny's blocks" in said(*model, "--format", "sd_cpp")
    assert "there is no such file or folder" in said("--lora_path", tmp_path / "nothing")
    assert "there is no such folder" in said("--pretrained_model_name_or_path", tmp_path / "nothing")
    (tmp_path / "model.ckpt").write_bytes(b"")
    assert "it is a pickle, which is never opened" in said("--pretrained_model_name_or_path", tmp_path / "model.ckpt")
    (tmp_path / "file").touch()
    assert "is a file, not a folder" in error_of(export, [*model, "--output_dir", tmp_path / "file"], capsys)
    assert not (tmp_path / "out").exists()


def test_pruned_and_embedded_are_refused(folders, tmp_path, capsys):
    from common.compression import channels
    from common.pipelines import with_guidance_input

    pipeline = load_pipeline(folders["sd1"])
    group = channels.groups_of(pipeline.unet)[0]
    channels.prune(pipeline.unet, {group.name: list(range(group.units - 1))})
    pipeline.register_modules(unet=pipeline.unet)
    pipeline.save_pretrained(tmp_path / "pruned")
    model = ["--output_dir", tmp_path / "out", "--pretrained_model_name_or_path"]
    assert "pruned to widths of their own, which no tool reads" in error_of(
        export, [*model, tmp_path / "pruned"], capsys
    )
    pipeline = load_pipeline(folders["sd1"])
    pipeline.unet = with_guidance_input(pipeline.unet)
    pipeline.save_pretrained(tmp_path / "embedded")
    assert "guidance scale is an input" in error_of(export, [*model, tmp_path / "embedded"], capsys)
