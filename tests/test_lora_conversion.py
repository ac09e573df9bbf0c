"""LoRAs on compressed models: what arrives where, what is said of it, and what is refused."""

import json

import numpy as np
import pytest
import torch
from conftest import random_pipeline, save_random_lora
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from common.compression import channels, lora_check, lora_conversion, students
from common.compression.lora_conversion import Layer, convert_lora, layer_shapes, load_converted, read_lora
from common.compression.manifest import write_manifest
from common.contract import TINY_SD
from common.errors import UsageError
from common.lora import WEIGHTS, load_adapter
from common.pipelines import load_pipeline

TARGETS = ["to_q", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "time_emb_proj", "proj_in"]
PROMPTS = ["a small red circle on a white background", "a large blue ring on a black background"]


def prune(model, ratio):
    """Prune every group of a model by magnitude; its entry in the manifest."""
    groups = channels.groups_of(model)
    kept = {g.name: channels.choose(channels.magnitude(model, g), channels.units_kept(g, ratio)) for g in groups}
    channels.prune(model, kept)
    return channels.record(groups, kept)


def compress(pipeline, kind):
    """Compress a pipeline in place; its manifest."""
    manifest = {}
    if kind in students.VARIANTS or kind == "narrow sd_base":
        variant = kind.split()[-1]
        pipeline.unet, manifest = students.build_student(pipeline.unet, variant)
    if kind.startswith("narrow"):
        variant = "sd_base" if "sd_base" in kind else None
        pipeline.unet, manifest = students.build_student(load_pipeline(TINY_SD).unet, variant, [32, 64, 64])
    if kind.startswith("pruned"):
        if "sd_small" in kind:
            pipeline.unet, manifest = students.build_student(pipeline.unet, "sd_small")
        names = ("unet", "text_encoder")
        manifest["pruned"] = {name: prune(getattr(pipeline, name), 0.4) for name in names}
    return json.loads(json.dumps(manifest))


def weights_as_lora(pipeline, largest=1000):
    """A LoRA whose B A is the weight itself, of every layer that needs no larger rank."""
    layers = {}
    for name, module in lora_conversion.modules_of(pipeline):
        if name in layer_shapes(pipeline) and module.weight[0].numel() <= largest:
            weight = module.weight.detach()
            rank = weight[0].numel()
            down = torch.eye(rank).reshape(rank, *weight.shape[1:])
            up = weight.reshape(len(weight), rank, *[1] * (weight.dim() - 2))
            layers[name] = Layer(down, up, float(rank))
    return layers


@pytest.mark.parametrize(
    "kind", ["sd_base", "sd_small", "sd_tiny", "narrow", "narrow sd_base", "pruned", "pruned sd_small"]
)
def test_a_lora_that_is_the_weights_becomes_the_compressed_weights(kind):
    pipeline = load_pipeline(TINY_SD)
    layers = weights_as_lora(pipeline, largest=10000 if kind == "narrow" else 1000)
    manifest = compress(pipeline, kind)
    arrived, report = convert_lora(layers, layer_shapes(pipeline), manifest)
    modules = dict(lora_conversion.modules_of(pipeline))
    assert len(arrived) > 60 and report["converted"]
    for name, layer in arrived.items():
        product = (layer.up.flatten(1) @ layer.down.flatten(1)).reshape(modules[name].weight.shape)
        torch.testing.assert_close(product, modules[name].weight, atol=1e-6, rtol=1e-5, msg=name)
    gone = {entry["why"] for entry in report["dropped"]}
    assert gone == (set() if kind in ("narrow", "pruned") else {"no layer of the model came from it"})
    assert (report["coverage"]["layers"] == 1) == (not gone)


def test_by_hand():
    """A block that moved, one of two heads, two of four GEGLU channels, two of three norm groups of a convolution."""
    numbers = torch.arange(1.0, 200)

    def layer(inputs, outputs, kernel=()):
        up = numbers[:outputs].reshape(outputs, 1, *[1] * len(kernel))
        return Layer(numbers[: inputs * int(np.prod(kernel))].reshape(1, inputs, *kernel), up, 4.0)

    old, new, ff = "up_blocks.0.x.2", "up_blocks.0.x.1", "up_blocks.0.x.1.ff.net"
    groups = {
        f"{new}.attn": (2, 2, [1], [[f"{new}.attn.to_q", 0, 0], [f"{new}.attn.to_out.0", 1, 0]]),
        f"{new}.ff": (4, 1, [0, 2], [[f"{ff}.0.proj", 0, 0], [f"{ff}.0.proj", 0, 4], [f"{ff}.2", 1, 0]]),
        f"{new}": (3, 2, [0, 2], [[f"{new}.conv1", 0, 0], [f"{new}.norm2", 0, 0], [f"{new}.conv2", 1, 0]]),
    }
    entries = {name: dict(zip(("units", "width", "kept", "spans"), values)) for name, values in groups.items()}
    manifest = {"block_map": {new: old}, "pruned": {"unet": entries}}
    sizes = {"attn.to_q": (3, 4), "attn.to_out.0": (4, 3), "ff.net.0.proj": (3, 8), "ff.net.2": (4, 3)}
    lora = {f"unet.{old}.{name}": layer(*size) for name, size in sizes.items()}
    lora |= {f"unet.{old}.conv1": layer(2, 6, (3, 3)), f"unet.{old}.conv2": layer(6, 2, (3, 3))}
    lora |= {"unet.conv_in": layer(2, 2, (3, 3)), "unet.mid_block.gone": layer(3, 3)}
    shapes = {"attn.to_q": (2, 3), "attn.to_out.0": (3, 2), "ff.net.0.proj": (4, 3), "ff.net.2": (3, 2)}
    shapes |= {"conv1": (4, 2, 3, 3), "conv2": (2, 4, 3, 3)}
    shapes = {f"unet.{new}.{name}": shape for name, shape in shapes.items()} | {"unet.conv_in": (2, 2, 3, 3)}

    arrived, report = convert_lora(lora, shapes, manifest)
    part = {name.removeprefix(f"unet.{new}."): value for name, value in arrived.items()}
    assert part["attn.to_q"].up.flatten().tolist() == [3, 4] and part["attn.to_q"].down.tolist() == [[1, 2, 3]]
    assert part["attn.to_out.0"].down.tolist() == [[3, 4]]
    assert part["ff.net.0.proj"].up.flatten().tolist() == [1, 3, 5, 7]
    assert part["ff.net.2"].down.tolist() == [[1, 3]]
    assert part["conv1"].up.flatten().tolist() == [1, 2, 5, 6]
    assert torch.equal(part["conv2"].down, lora[f"unet.{old}.conv2"].down[:, [0, 1, 4, 5]])
    assert arrived["unet.conv_in"] is not None and all(value.alpha == 4 for value in arrived.values())
    assert report["fitting"] == 1 and len(report["converted"]) == 6
    assert report["converted"][0] == {"layer": f"unet.{new}.attn.to_q", "why": f"was {old}.attn.to_q; 2 of 4 outputs"}
    assert report["dropped"] == [{"layer": "unet.mid_block.gone", "why": "no layer of the model came from it"}]
    assert report["coverage"]["layers"] == 7 / 8


def random_lora(pipeline, alpha=3.0):
    """A LoRA with random weights on UNet and text encoder, attached; {component: config}."""
    torch.manual_seed(1)
    common = {"r": 2, "lora_alpha": alpha, "init_lora_weights": False}
    configs = {
        "unet": LoraConfig(target_modules=TARGETS, **common),
        "text_encoder": LoraConfig(target_modules=["q_proj", "out_proj", "fc1"], **common),
    }
    for name, config in configs.items():
        getattr(pipeline, name).add_adapter(config)
    return configs


def save_lora(pipeline, folder, style):
    """The pipeline's adapter with the keys of peft, diffusers or kohya."""
    states = {name: get_peft_model_state_dict(getattr(pipeline, name)) for name in ("unet", "text_encoder")}
    configs = {name: getattr(pipeline, name).peft_config["default"] for name in states}
    if style == "peft":
        type(pipeline).save_lora_weights(
            folder,
            unet_lora_layers=states["unet"],
            text_encoder_lora_layers=states["text_encoder"],
            unet_lora_adapter_metadata=configs["unet"].to_dict(),
            text_encoder_lora_adapter_metadata=configs["text_encoder"].to_dict(),
        )
        return
    tensors = {}
    for name, state in states.items():
        for key, value in state.items():
            module, _, factor = key.removesuffix(".weight").rpartition(".")
            factor = {"lora_A": "down", "lora_B": "up"}[factor]
            if name == "text_encoder":
                module = f"text_model.{module}"  # as transformers 4 called it
            if style == "kohya":
                short = f"lora_{'unet' if name == 'unet' else 'te'}_{module.replace('.', '_')}"
                tensors[f"{short}.lora_{factor}.weight"] = value.contiguous()
                tensors[f"{short}.alpha"] = torch.tensor(float(configs[name].lora_alpha))
            else:
                middle = "lora" if name == "unet" else "lora_linear_layer"
                tensors[f"{name}.{module}.{middle}.{factor}.weight"] = value.contiguous()
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("style", ["peft", "diffusers", "kohya"])
def test_key_styles(style, tmp_path):
    pipeline = random_pipeline("sd")
    random_lora(pipeline, alpha=2.0 if style == "diffusers" else 3.0)  # diffusers' keys have no place for one
    save_lora(pipeline, tmp_path, style)
    expected = {
        f"{name}.{key}": value
        for name in ("unet", "text_encoder")
        for key, value in get_peft_model_state_dict(getattr(pipeline, name)).items()
    }
    plain = random_pipeline("sd")
    layers = read_lora(plain, tmp_path)
    assert len(layers) * 2 == len(expected) and layers.keys() <= layer_shapes(plain).keys()
    for name, layer in layers.items():
        assert torch.equal(layer.down, expected[f"{name}.lora_A.weight"]), name
        assert torch.equal(layer.up, expected[f"{name}.lora_B.weight"]), name
        assert layer.alpha == pipeline.unet.peft_config["default"].lora_alpha
    lora_conversion.attach(plain, layers, "default")
    for name in ("unet", "text_encoder"):
        ours, theirs = (dict(getattr(p, name).named_modules()) for p in (plain, pipeline))
        adapted = [key for key, module in theirs.items() if hasattr(module, "lora_A")]
        assert [ours[key].scaling for key in adapted] == [theirs[key].scaling for key in adapted]
        assert not any(p.requires_grad for key, p in getattr(plain, name).named_parameters() if "lora_" in key)


def test_nothing_pruned_changes_nothing(pipelines, tmp_path):
    pipeline = load_pipeline(pipelines())
    random_lora(pipeline)
    save_lora(pipeline, tmp_path, "peft")
    pruned = load_pipeline(pipelines())
    manifest = {"pruned": {"unet": prune(pruned.unet, 0.0)}}
    layers = read_lora(pruned, tmp_path)
    arrived, report = convert_lora(layers, layer_shapes(pruned), manifest)
    assert report["fitting"] == len(layers) and not report["converted"] and not report["dropped"]
    assert all(arrived[name].up is layer.up and arrived[name].down is layer.down for name, layer in layers.items())


@pytest.fixture
def pruned(pipelines, tmp_path):
    """The folder of a pruned pipeline, its manifest beside it."""
    pipeline = load_pipeline(pipelines())
    manifest = {"parent": pipelines(), "feature_pairs": [], **compress(pipeline, "pruned")}
    pipeline.register_modules(unet=pipeline.unet, text_encoder=pipeline.text_encoder)  # whose classes have changed
    pipeline.save_pretrained(tmp_path / "pruned")
    write_manifest(tmp_path / "pruned", manifest)
    return tmp_path / "pruned"


def fused_then_pruned(pipelines, path):
    """The original with the LoRA in its weights, of which then goes what is gone of the pruned one: by hand."""
    plain, original = load_pipeline(pipelines()), load_pipeline(pipelines())
    kept = {}
    for name in ("unet", "text_encoder"):
        groups = channels.groups_of(getattr(plain, name))
        model = getattr(plain, name)
        kept[name] = {
            g.name: channels.choose(channels.magnitude(model, g), channels.units_kept(g, 0.4)) for g in groups
        }
    load_adapter(original, path, "by_hand")
    original.fuse_lora()
    original.unload_lora_weights()
    for name, units in kept.items():
        channels.prune(getattr(original, name), units)
    return original


def test_fused_and_images_are_those_made_by_hand(pipelines, pruned, tmp_path, capsys):
    source = load_pipeline(pipelines())
    random_lora(source)
    save_lora(source, tmp_path / "lora", "peft")
    expected = fused_then_pruned(pipelines, tmp_path / "lora")
    adapted, fused = load_pipeline(pruned), load_pipeline(pruned)
    load_converted(adapted, tmp_path / "lora", pruned)
    load_converted(fused, tmp_path / "lora", pruned, fuse=True)
    said = capsys.readouterr().out
    assert "none is dropped" in said and "converted" in said
    for name in ("unet", "text_encoder"):
        ours = getattr(fused, name).state_dict()
        for key, value in getattr(expected, name).state_dict().items():
            torch.testing.assert_close(ours[key], value, atol=1e-5, rtol=1e-4, msg=key)
    images = [lora_check.pixels_of(p, PROMPTS, 2, 2.0) for p in (expected, adapted, fused, load_pipeline(pruned))]
    assert np.abs(images[1] - images[0]).max() <= 2 / 255 and np.abs(images[2] - images[0]).max() <= 2 / 255
    assert np.abs(images[3] - images[0]).max() > 10 / 255


def test_part_of_it_is_said(students, tmp_path, capsys):
    """A block-removed student keeps a LoRA's layers where their blocks went; the others are counted aloud."""
    student = students("sd", "sd_small")
    source = random_pipeline("sd")
    random_lora(source)
    save_lora(source, tmp_path, "kohya")
    load_converted(load_pipeline(student), tmp_path, student)
    said = capsys.readouterr().out
    assert "are DROPPED" in said and "because no layer of the model came from it" in said and "% of its param" in said


def test_a_lora_for_another_model(pipelines, pruned, tmp_path):
    source = random_pipeline("plain-sdxl")
    source.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    type(source).save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(source.unet))
    with pytest.raises(UsageError, match="none of its layers fits this model .the LoRA was made for another unet: "):
        load_converted(load_pipeline(pruned), tmp_path, pruned)


def test_one_wrong_layer_gives_a_component_away(pipelines):
    """A text encoder of another width or depth: its layers go, with the reason, and the UNet's stay."""
    shapes = layer_shapes(load_pipeline(pipelines()))
    layers = {
        name: Layer(torch.ones(1, *shape[1:]), torch.ones(shape[0], 1, *[1] * (len(shape) - 2)), 1.0)
        for name, shape in shapes.items()
    }
    first = next(name for name in layers if name.startswith("text_encoder"))
    wrong = {**layers, first: Layer(torch.ones(1, 7), torch.ones(9, 1), 1.0)}
    deeper = {**layers, "text_encoder.encoder.layers.9.mlp.fc1": layers[first]}
    for lora in (wrong, deeper):
        arrived, report = convert_lora(lora, shapes, {})
        assert {name.partition(".")[0] for name in arrived} == {"unet"}
        assert all("made for another text_encoder" in entry["why"] for entry in report["dropped"])
    unknown = {**layers, "text_encoder_2.encoder.layers.0.mlp.fc1": layers[first]}
    assert convert_lora(unknown, shapes, {})[1]["dropped"][0]["why"] == "the pipeline has no text_encoder_2"


def test_a_lora_of_the_compressed_model_itself_is_loaded_as_it_is(pipelines, pruned, tmp_path, capsys):
    pipeline = load_pipeline(pruned)
    save_random_lora(pipeline, tmp_path / "own", str(pruned), alpha=4)
    assert lora_conversion.manifest_for(tmp_path / "own", pruned) is None
    load_converted(load_pipeline(pruned), tmp_path / "own", pruned)
    assert "LoRA: rank 2, alpha 4" in capsys.readouterr().out
    other = tmp_path / "other"
    other.mkdir()
    write_manifest(other, {"feature_pairs": [], "block_map": {"up_blocks.0": "up_blocks.1"}})
    with pytest.raises(UsageError, match="compressed in another way"):
        lora_conversion.manifest_for(tmp_path / "own", other)


def test_a_pruned_students_lora_keeps_the_names_it_has(students, tmp_path):
    """A LoRA of the student that was pruned then: only what pruning took is left to convert."""
    student, pruned = students("sd", "sd_small"), tmp_path / "pruned"
    save_random_lora(load_pipeline(student), tmp_path / "own", str(student), alpha=4)
    manifest = json.loads((student / "compression.json").read_text())
    pruned.mkdir()
    write_manifest(pruned, {**manifest, "pruned": {"unet": {"a group": 1}}})
    found = lora_conversion.manifest_for(tmp_path / "own", pruned)
    assert found["block_map"] is None and found["pruned"] == {"unet": {"a group": 1}}


def test_what_is_no_lora_to_convert(pipelines, tmp_path):
    pipeline = load_pipeline(pipelines())
    for name, tensors, said in (
        ("dora", {"unet.conv_in.lora_A.weight": 1, "unet.conv_in.lora_magnitude_vector": 1}, "no plain LoRA"),
        ("loha", {"lora_unet_conv_in.hada_w1_a": 1}, "no plain LoRA .it has lora_unet_conv_in.hada_w1_a"),
        ("half", {"unet.conv_in.lora_A.weight": 1}, "lacks one of the two factors of unet.conv_in"),
        ("other", {"transformer.x.lora_A.weight": 1}, "no LoRA for a UNet or text encoder .it has transformer.x"),
        ("model", {"weight": 1}, "no LoRA"),
    ):
        save_file({key: torch.ones(2, 2) for key in tensors}, tmp_path / f"{name}.safetensors")
        with pytest.raises(UsageError, match=said):
            read_lora(pipeline, tmp_path / f"{name}.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(UsageError, match="no LoRA that can be read"):
        read_lora(pipeline, tmp_path / "broken.safetensors")
    (tmp_path / "pickle.bin").write_bytes(b"no")
    with pytest.raises(UsageError, match="only .safetensors files are loaded"):
        read_lora(pipeline, tmp_path / "pickle.bin")


def test_lora_files(tmp_path):
    with pytest.raises(UsageError, match="--lora_dir .*there is no such folder"):
        lora_check.lora_files(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no LoRA"):
        lora_check.lora_files(tmp_path)
    for name in ("a.safetensors", f"run/final/{WEIGHTS}", f"own/{WEIGHTS}"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": torch.ones(1)}, tmp_path / name)
    assert lora_check.lora_files(tmp_path).keys() == {"a", "run", "own"}
    assert lora_check.lora_files(tmp_path / "own").keys() == {"own"}
    (tmp_path / "old.ckpt").write_bytes(b"")
    with pytest.raises(UsageError, match="old.ckpt is a pickle"):
        lora_check.lora_files(tmp_path)


def test_check_loras(pipelines, pruned, tmp_path):
    source, loras = load_pipeline(pipelines()), tmp_path / "loras"
    random_lora(source)
    save_lora(source, loras / "strong", "peft")
    save_file({"lora_unet_conv_in.hada_w1_a": torch.ones(2)}, loras / "loha.safetensors")
    pipeline, manifest = load_pipeline(pruned), json.loads((pruned / "compression.json").read_text())
    before = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    teacher = load_pipeline(pipelines())
    report = lora_check.check_loras(pipeline, loras, manifest, PROMPTS, 2, 2.0, teacher=teacher, output=tmp_path)
    after = pipeline.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / lora_check.REPORT).read_text()) == report
    strong = report["strong"]
    assert strong["loads"] and strong["fuses"] and strong["unfuses"] and strong["error"] is None
    assert strong["image_difference"] > 0.01 and -1 <= strong["style_cosine"] <= 1 and strong["converted"]
    assert "no plain LoRA" in report["loha"]["error"] and not report["loha"]["loads"]
    rows = lora_check.rows_of(report)
    assert [row["configuration"] for (row,) in rows] == ["loha", "strong"] and rows[1][0]["dropped"] == 0


def test_style_cosine():
    a, b = np.array([[[[1.0, 0, 0]]], [[[0, 2.0, 0]]]]), np.array([[[[3.0, 0, 0]]], [[[0, 0, 1.0]]]])
    assert lora_check.style_cosine(a, a) == 1 and lora_check.style_cosine(a, -a) == -1
    assert lora_check.style_cosine(a, b) == 0.5


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_on_quantized_layers(pipelines, pruned, tmp_path, capsys, kind):
    """Beside such weights an adapter runs; fused, the layers that it is for become plain ones, and it is said."""
    from torchao.quantization import quantize_

    from common.compression import quantization

    def quantized():
        pipeline = load_pipeline(pruned)
        kinds = (torch.nn.Linear, torch.nn.Conv2d) if kind == "int8" else torch.nn.Linear
        config = quantization.INT8 if kind == "int8" else quantization.FP8
        quantize_(pipeline.unet, config, filter_fn=lambda module, name: isinstance(module, kinds))
        return pipeline

    source = load_pipeline(pipelines())
    random_lora(source)
    save_lora(source, tmp_path / "lora", "peft")
    adapted, fused, plain = quantized(), quantized(), load_pipeline(pruned)
    for pipeline, fuse in ((adapted, False), (fused, True), (plain, False)):
        load_converted(pipeline, tmp_path / "lora", pruned, fuse=fuse)
    assert "layers with a LoRA are no longer quantized" in capsys.readouterr().out
    layers = [x for x in lora_conversion.adapted_layers(adapted) if kind == "int8" or isinstance(x, torch.nn.Linear)]
    assert layers and all(lora_conversion.is_quantized(layer) for layer in layers[:20])
    pixels = [lora_check.pixels_of(p, PROMPTS, 2, 2.0) for p in (adapted, fused, plain)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 2 / 255 and np.abs(pixels[0] - pixels[2]).mean() < 0.02
