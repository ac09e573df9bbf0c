"""Smaller UNets: the counts, which weights survive, and prepare_unet_small.py."""

import json

import pytest
import torch
from conftest import random_pipeline, read_json, run_in_process
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from launching import error_of

import prepare_unet_small
from common import shapes
from common.compression import students
from common.compression.manifest import read_manifest, write_manifest
from common.conditioning import encode_prompts
from common.contract import TINY_SD
from common.errors import ModelError
from common.pipelines import load_pipeline

SD15 = {"sample_size": 64, "cross_attention_dim": 768}
SDXL = {
    "sample_size": 64,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def config_of(options):
    return dict(students.empty_unet(options).config)


@pytest.fixture(scope="module")
def tiny_sd():
    return load_pipeline(TINY_SD)


@pytest.mark.parametrize(
    "variant, count", [(None, 859520964), ("sd_base", 579384964), ("sd_small", 482346884), ("sd_tiny", 323384964)]
)
def test_counts_of_sd15_from_its_config(variant, count):
    assert students.cost(students.student_config(config_of(SD15), variant))[0] == count


@pytest.mark.parametrize("tenths, millions", [(9, 698.0), (8, 553.2), (7, 425.3), (6, 314.1), (5, 219.8)])
def test_counts_of_narrower_sd15(tenths, millions):
    config = config_of(SD15)
    widths = students.scaled_widths(config["block_out_channels"], tenths / 10)
    assert round(students.cost(students.student_config(config, None, widths))[0] / 1e6, 1) == millions


def test_sdxl_loses_blocks_and_half_of_its_transformer_layers():
    config = config_of(SDXL)
    assert students.cost(config)[0] == 2567463684
    small = students.student_config(config, "sd_small")
    assert small["transformer_layers_per_block"] == [1, 1, 5] and small["mid_block_type"] is None
    narrow = students.student_config(small, None, [160, 320, 640])
    assert students.cost(narrow)[0] < students.cost(small)[0] / 3
    with pytest.raises(ModelError, match="the one above it is narrower"):
        students.student_config(config, "sd_tiny")


def test_multiply_accumulates_of_sd15():
    """Four more input channels make conv_in larger, and nothing else: 64 x 64 positions, 4 x 9 inputs, 320 outputs."""
    macs, more = (students.cost(config_of({**SD15, "in_channels": channels}))[1] for channels in (4, 8))
    assert more - macs == 64 * 64 * 4 * 9 * 320
    assert 3.9e11 < macs < 4.1e11  # 0.8 TFLOP a forward


def test_nothing_removed_is_the_teacher(tiny_sd):
    student, manifest = students.build_student(tiny_sd.unet)
    z, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 990]), torch.randn(2, 20, 96)
    with torch.no_grad():
        assert torch.equal(student(z, t, text).sample, tiny_sd.unet(z, t, text).sample)
    assert manifest["parameters"]["student"] == manifest["parameters"]["teacher"] and manifest["keep"] is None
    next(student.parameters()).data.zero_()
    assert next(tiny_sd.unet.parameters()).abs().sum() > 0  # a copy, not the teacher's own memory


@pytest.mark.parametrize("variant", students.VARIANTS)
def test_the_last_layer_of_an_up_block_survives(tiny_sd, variant):
    student, manifest = students.build_student(tiny_sd.unet, variant)
    shift = 1 if variant == "sd_tiny" else 0
    assert len(student.up_blocks[0].resnets) == 2 and (student.mid_block is None) == (variant != "sd_base")
    own, source = student.up_blocks[0].resnets[1], tiny_sd.unet.up_blocks[shift].resnets[2]
    assert torch.equal(own.conv1.weight, source.conv1.weight)
    assert manifest["block_map"]["up_blocks.0.resnets.1"] == f"up_blocks.{shift}.resnets.2"
    assert torch.equal(
        student.down_blocks[1].resnets[0].conv2.weight, tiny_sd.unet.down_blocks[1].resnets[0].conv2.weight
    )


@pytest.mark.parametrize("variant", students.VARIANTS)
def test_feature_pairs_have_one_resolution(tiny_sd, variant):
    from common.hooks import FeatureTap

    student, manifest = students.build_student(tiny_sd.unet, variant)
    own, theirs = zip(*manifest["feature_pairs"])
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 20, 96)
    with torch.no_grad(), FeatureTap(student, own) as mine, FeatureTap(tiny_sd.unet, theirs) as teachers:
        student(*inputs)
        tiny_sd.unet(*inputs)
    assert all(mine.features[a].shape == teachers.features[b].shape for a, b in zip(own, theirs))


@pytest.mark.parametrize("kind", ["sd", "v", "sdxl"])
@pytest.mark.parametrize("variant", [None, "sd_base", "sd_small"])
def test_every_kind_of_unet_gets_smaller_and_runs(kind, variant):
    unet = random_pipeline(kind).unet
    student, manifest = students.build_student(unet, variant, [8, 16])
    added = {"text_embeds": torch.randn(1, 32), "time_ids": torch.zeros(1, 6)} if kind == "sdxl" else None
    text = torch.randn(1, 20, unet.config.cross_attention_dim)
    with torch.no_grad():
        output = student(torch.randn(1, 4, 8, 8), torch.tensor([500]), text, added_cond_kwargs=added).sample
    assert output.shape == (1, 4, 8, 8) and output.isfinite().all()
    kept = sum(p.numel() for p in student.parameters())
    assert kept == manifest["parameters"]["student"] < manifest["parameters"]["teacher"] / 2
    assert manifest["macs"]["student"] < manifest["macs"]["teacher"]


def epsilon_error(student, pipeline):
    """Mean square difference of the student's prediction from the teacher's, on noisy renders of held-out scenes."""
    from common.small_models import to_pixels

    torch.manual_seed(0)
    text = encode_prompts(pipeline, shapes.held_out_captions(16), 32).prompt_embeds
    t = torch.linspace(20, 999, 16).long()
    with torch.no_grad():
        pixels = to_pixels([shapes.held_out_sample(i)[0] for i in range(16)])
        latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        z = pipeline.scheduler.add_noise(latents, torch.randn_like(latents), t)
        return (student(z, t, text).sample - pipeline.unet(z, t, text).sample).pow(2).mean().item()


@pytest.mark.parametrize("widths", [[40, 80, 80], [24, 48, 48]])
def test_aligned_slices_start_closer_than_naive_and_random_ones(tiny_sd, widths):
    ours = epsilon_error(students.build_student(tiny_sd.unet, None, widths)[0], tiny_sd)
    torch.manual_seed(0)
    config = students.student_config(tiny_sd.unet.config, None, widths)
    student = UNet2DConditionModel.from_config(config).eval()
    assert ours < 0.8 * epsilon_error(student, tiny_sd)
    state = tiny_sd.unet.state_dict()
    student.load_state_dict({k: state[k][tuple(slice(n) for n in v.shape)] for k, v in student.state_dict().items()})
    assert ours < 0.8 * epsilon_error(student, tiny_sd)


def test_aligned_slices_start_closer_than_globally_ranked_ones(tiny_sd, monkeypatch):
    """At five sixths of the width; at half of it, where half of every group goes, the two are equal."""
    ours = epsilon_error(students.build_student(tiny_sd.unet, None, [40, 80, 80])[0], tiny_sd)
    aligned = students.choose
    largest = lambda scores, new, kind: aligned(scores, new, kind if kind == "frequencies" else "free")  # noqa: E731
    monkeypatch.setattr(students, "choose", largest)
    assert ours < epsilon_error(students.build_student(tiny_sd.unet, None, [40, 80, 80])[0], tiny_sd)


def test_kept_channels_stay_in_their_group():
    kept = students.choose(torch.rand(96), 48, ("groups", 16))
    assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == 48
    assert torch.equal(kept // 12, torch.arange(48) // 6)  # 8 GroupNorm groups: of 12 channels, then of 6


@pytest.mark.parametrize("old, new", [(320, 160), (48, 24)])
def test_kept_frequencies_are_those_of_the_narrower_embedding(old, new):
    t = torch.tensor([1, 77, 999])
    wide, narrow = (get_timestep_embedding(t, n, flip_sin_to_cos=True, downscale_freq_shift=0) for n in (old, new))
    kept = students.choose(torch.zeros(old), new, "frequencies")
    torch.testing.assert_close(wide[:, kept], narrow, atol=1e-3, rtol=0)


def test_manifest_round_trip_and_refusals(tmp_path, tiny_sd):
    _, manifest = students.build_student(tiny_sd.unet, "sd_small", [24, 48, 48])
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == json.loads(json.dumps(manifest))
    rows, columns = manifest["keep"]["layers"]["conv_in"]
    assert len(manifest["keep"]["indices"][rows[0]]) == 24 and columns is None
    for content in ("{", "{}", '{"feature_pairs": [["a"]]}'):
        (tmp_path / "compression.json").write_text(content)
        with pytest.raises(ModelError, match="compression.json can't be read"):
            read_manifest(tmp_path)
    with pytest.raises(ModelError, match="no such file"):
        read_manifest(tmp_path / "nowhere")


def test_the_script_writes_a_pipeline_that_stock_diffusers_loads(tmp_path, capsys):
    run_in_process(
        prepare_unet_small, "--student_variant", "sd_tiny", "--width_ratio", "0.5", "--output_dir", tmp_path / "s"
    )
    assert "484,900" in capsys.readouterr().out
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "s")
    images = pipeline("a small red ring on a white background", num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all()
    manifest = read_manifest(tmp_path / "s")
    assert manifest["parent"] == str(TINY_SD) and manifest["parameters"]["student"] == 484900
    assert manifest["variant"] == "sd_tiny"
    contract = read_json(tmp_path / "s/distillation.json")
    assert contract["guidance"] == "cfg" and contract["guidance_scale"] > 1
    assert "| blocks | sd_tiny |" in (tmp_path / "s/README.md").read_text()


def test_variant_is_of_the_files_and_the_old_spelling_is_understood(tmp_path, capsys):
    teacher = tmp_path / "teacher"
    random_pipeline("sd").to(dtype=torch.float16).save_pretrained(teacher, variant="fp16")
    flags = ["--pretrained_model_name_or_path", teacher, "--block_out_channels", 8, 16]
    run_in_process(prepare_unet_small, *flags, "--variant", "fp16", "--output_dir", tmp_path / "s")
    contract = read_json(tmp_path / "s/distillation.json")
    assert (contract["parent"], contract["variant"]) == (str(teacher), "fp16")
    assert read_manifest(tmp_path / "s")["variant"] is None
    capsys.readouterr()
    run_in_process(prepare_unet_small, "--variant", "sd_small", "--output_dir", tmp_path / "old")
    assert "--variant sd_small is taken as --student_variant sd_small" in capsys.readouterr().out
    assert read_manifest(tmp_path / "old")["variant"] == "sd_small"
    assert read_json(tmp_path / "old/distillation.json")["variant"] is None


def test_random_init_takes_nothing_over(tmp_path):
    for name, seed in (("a", []), ("b", ["--random_init", 0]), ("c", ["--random_init", 0])):
        run_in_process(prepare_unet_small, "--student_variant", "sd_small", "--output_dir", tmp_path / name, *seed)
    own, drawn, again = (load_pipeline(tmp_path / name).unet.state_dict() for name in "abc")
    taken = [name for name, value in own.items() if value.dim() > 1 and torch.equal(value, drawn[name])]
    assert not taken and all(torch.equal(value, again[name]) for name, value in drawn.items())
    manifest = read_manifest(tmp_path / "b")
    assert manifest["block_map"] == {} and manifest["keep"] is None
    assert manifest["feature_pairs"] == read_manifest(tmp_path / "a")["feature_pairs"]


MISTAKES = [
    ([], "nothing to do"),
    (["--variant", "fp16"], "nothing to do"),
    (["--variant", "sd_base", "--student_variant", "sd_tiny"], "--variant sd_base"),
    (["--width_ratio", "0.5", "--block_out_channels", "24", "48", "48"], "--width_ratio and --block_out_channels"),
    (["--width_ratio", "2"], "--width_ratio 2"),
    (["--width_ratio", "0.3"], "a width of 48 can become"),
    (["--block_out_channels", "24", "48"], "2 widths are given for 3 stages"),
    (["--block_out_channels", "24", "48", "96"], "stages of one width"),
    (["--student_variant", "sd_base", "--output_dir", "{full}"], "--output_dir {full} is not empty"),
    (["--student_variant", "sd_base", "--output_dir", "{full}", "--overwrite_output_dir"], "so it is not replaced"),
    (["--student_variant", "sd_base", "--pretrained_model_name_or_path", "no/such/folder"], "no/such/folder"),
]


@pytest.mark.parametrize("wrong, said", MISTAKES, ids=[" ".join(wrong) or "nothing" for wrong, _ in MISTAKES])
def test_mistakes_are_one_sentence(tmp_path, capsys, wrong, said):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("")
    arguments = ["--output_dir", tmp_path / "out", *(word.format(full=full) for word in wrong)]
    error = error_of(prepare_unet_small, arguments, capsys)
    assert said.format(full=full) in error and error.startswith("error: ")
    assert not (tmp_path / "out").exists() and (full / "mine").is_file()


def test_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare_unet_small, "load_pipeline", None)  # no weights are loaded either
    run_in_process(prepare_unet_small, "--student_variant", "sd_small", "--dry_run", "--output_dir", tmp_path / "s")
    assert "2,763,940 (56.0%)" in capsys.readouterr().out and not (tmp_path / "s").exists()
