"""Pruning: what goes and what stays, by hand; importance, compensation, budgets; every kind of model and way back."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import random_pipeline
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from common.compression import calibration, channels, planning, pruned_models
from common.compression.pruning import apply_magnitude_pruning, create_pruned_pipeline
from common.errors import UsageError
from common.pipelines import load_pipeline

SIZES = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4}
PICTURE = {"sample_size": 8, "in_channels": 4, "out_channels": 4}
POOLED = {"joint_attention_dim": 16, "pooled_projection_dim": 8}
TRANSFORMERS = {
    "flux": (FluxTransformer2DModel, {**SIZES, **POOLED, "in_channels": 8, "axes_dims_rope": (2, 2, 4)}),
    "sd3": (
        SD3Transformer2DModel,
        {**SIZES, **POOLED, **PICTURE, "caption_projection_dim": 32, "pos_embed_max_size": 8},
    ),
    "pixart": (PixArtTransformer2DModel, {**SIZES, **PICTURE, "cross_attention_dim": 32, "caption_channels": 16}),
}
UNETS = ("sd", "sdxl")


def inputs_of(kind):
    """What a forward of a transformer of TRANSFORMERS takes."""
    generator = torch.Generator().manual_seed(0)
    text, pooled = (torch.randn(2, *size, generator=generator) for size in ((5, 16), (8,)))
    call = {"encoder_hidden_states": text, "timestep": torch.tensor([0.3, 0.9])}
    if kind == "flux":
        ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
        return {
            **call,
            **ids,
            "pooled_projections": pooled,
            "hidden_states": torch.randn(2, 16, 8, generator=generator),
        }
    more = {"pooled_projections": pooled}
    if kind == "pixart":
        more = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return {**call, **more, "hidden_states": torch.randn(2, 4, 8, 8, generator=generator)}


def model_and_calls(kind):
    """(model, recorded calls) of a UNet, a text encoder, a VAE or a transformer, with random weights."""
    if kind in TRANSFORMERS:
        torch.manual_seed(0)
        cls, config = TRANSFORMERS[kind]
        options = {"num_single_layers": 2} if kind == "flux" else {}
        return cls(**config, **options).eval().requires_grad_(False), {"": [((), inputs_of(kind))]}
    component, kind = (kind, "sd") if kind in ("text_encoder", "vae") else ("unet", kind)
    pipeline = random_pipeline(kind)
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.eval().requires_grad_(False)
    return getattr(pipeline, component), recorded(pipeline, [component])[component]


def recorded(pipeline, components, steps=2):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    options = {"num_inference_steps": steps, "height": 32, "width": 32, "guidance_scale": 3.0}
    return calibration.record_inputs(pipeline, components, ["a ring", "a disc"], generators, 2, **options)


@torch.no_grad()
def outputs(model, calls):
    return torch.cat(
        [calibration.output_of(half, call) for p, half in calibration.halves(model).items() for call in calls[p]],
        dim=1,
    )


every_model = pytest.mark.parametrize("kind", [*UNETS, "text_encoder", "vae", *TRANSFORMERS])


# Channels


@every_model
def test_removing_what_is_read_with_zero_weights_changes_nothing(kind, tmp_path):
    """Per kind of layer; and the model opens again, as exactly, by its own class."""
    model, calls = model_and_calls(kind)
    groups = channels.groups_of(model)
    assert {group.kind for group in groups} == {
        "vae": {"conv"},
        "text_encoder": {"attention", "feed_forward"},
        **dict.fromkeys(TRANSFORMERS, {"attention", "feed_forward"}),
    }.get(kind, set(channels.KINDS))
    kept = {group.name: list(range(group.units))[1::2] for group in groups}
    for group in groups:
        gone = sorted(set(range(group.units)) - set(kept[group.name]))
        for name, offset in calibration.readers(group):
            model.get_submodule(name).weight[:, group.channels(gone, offset)] = 0
    before, count = outputs(model, calls), channels.count(model)
    channels.prune(model, kept)
    assert channels.count(model) < count
    torch.testing.assert_close(outputs(model, calls), before, atol=1e-5, rtol=1e-4)
    assert type(model).__name__.startswith("Pruned")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(outputs(again.eval(), calls), outputs(model, calls))
    assert (tmp_path / "pruned_models.py").read_text() == open(pruned_models.__file__).read()


@every_model
def test_keeping_all_changes_nothing(kind):
    model, _ = model_and_calls(kind)
    before, cls = copy.deepcopy(model.state_dict()), type(model)
    channels.prune(model, {group.name: list(range(group.units)) for group in channels.groups_of(model)})
    assert type(model) is cls
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_counts_by_hand():
    """One resnet (16 -> 16, 8 groups of 2, time 64), one feed-forward (16, inner 64), one attention (16, text 32)."""
    model, _ = model_and_calls("sd")
    groups = {group.name: group for group in channels.groups_of(model)}
    resnet = groups["down_blocks.0.resnets.0"]
    feed_forward = groups["down_blocks.0.attentions.0.transformer_blocks.0.ff"]
    attention = groups["down_blocks.0.attentions.0.transformer_blocks.0.attn2"]
    assert [(g.units, g.width) for g in (resnet, feed_forward, attention)] == [(8, 2), (64, 1), (2, 8)]
    # conv1 rows 16*9+1, norm2 2, time_emb_proj rows 64+1, conv2 columns 16*9
    assert channels.cost_of_unit(model, resnet) == 2 * (145 + 2 + 65 + 144)
    # GEGLU's two rows 16+1 each, columns 16 of what reads them
    assert channels.cost_of_unit(model, feed_forward) == 2 * 17 + 16
    # to_q rows 16, to_k and to_v rows 32, to_out columns 16, 8 channels a head
    assert channels.cost_of_unit(model, attention) == 8 * (16 + 32 + 32 + 16)
    before = channels.count(model)
    channels.prune(model, {resnet.name: [0, 2, 3, 7], feed_forward.name: list(range(40)), attention.name: [1]})
    assert before - channels.count(model) == 4 * 712 + 24 * 50 + 768
    layer = model.down_blocks[0].resnets[0]
    assert (layer.conv1.out_channels, layer.norm2.num_groups, layer.norm2.num_channels) == (8, 4, 8)
    assert model.get_submodule(attention.name).heads == 1


def test_units_kept():
    conv = channels.Group("a", "conv", 8, 4, [])
    wide = channels.Group("b", "feed_forward", 1280, 1, [])
    assert [channels.units_kept(conv, ratio) for ratio in (0, 0.3, 0.9, 0.99)] == [8, 6, 1, 1]
    assert channels.units_kept(wide, 0.3) == 896 and channels.units_kept(wide, 0.31) % 8 == 0
    assert channels.units_kept(wide, 0) == 1280
    assert channels.units_kept(channels.Group("c", "conv", 6, 4, []), 0.5, units=8) == 4, "of what there was at first"


def test_pruned_again_is_pruned_by_both():
    model, calls = model_and_calls("sd")
    other = copy.deepcopy(model)
    groups = channels.groups_of(model)
    name = groups[-1].name
    first, second = {name: [0, 2, 3, 5, 6]}, {name: [1, 4]}
    entry = channels.record(groups, first)
    channels.prune(model, first)
    channels.prune(model, second)
    entry = channels.record(channels.groups_of(model), second, entry)
    assert entry[name]["kept"] == [2, 6]
    channels.prune(other, {name: entry[name]["kept"]})
    assert torch.equal(outputs(model, calls), outputs(other, calls))
    assert dict(model.config)["pruned"] == dict(other.config)["pruned"]


def test_a_uniform_text_encoder_stays_of_the_stock_class():
    model, calls = model_and_calls("text_encoder")
    cls = type(model)
    for group in channels.groups_of(model):
        if group.kind == "feed_forward":
            channels.prune(model, {group.name: list(range(40))})
    assert type(model) is cls and model.config.intermediate_size == 40
    assert outputs(cls(model.config).eval(), calls).shape == outputs(model, calls).shape


# Importance and compensation


def test_magnitude_is_the_sum_over_what_would_go():
    model, _ = model_and_calls("sd")
    group = next(g for g in channels.groups_of(model) if g.name.endswith("transformer_blocks.0.ff"))
    ff = model.get_submodule(group.name)
    for order in (1, 2):
        norm = [w.abs().pow(order) for w in (ff.net[0].proj.weight, ff.net[2].weight)]
        by_hand = norm[0][:64].sum(1) + norm[0][64:].sum(1) + norm[1].sum(0)
        torch.testing.assert_close(channels.magnitude(model, group, order), by_hand)
    assert channels.choose(torch.tensor([3.0, 1.0, 2.0]), 2) == [0, 2]


@pytest.mark.parametrize("kind", ["sd", "text_encoder", "flux"])
def test_taylor_is_the_gates_derivative(kind):
    """Against finite differences of the output with a gate on each unit; averaged over many directions."""
    model, calls = model_and_calls(kind)
    calls = {half: made[:1] for half, made in calls.items()}
    scores, draws = {}, 100
    for seed in range(draws):
        for name, value in calibration.taylor(model, calls, torch.Generator().manual_seed(seed)).items():
            scores[name] = scores.get(name, 0) + value / draws
    for group in channels.groups_of(model)[:2]:
        whole, found = outputs(model, calls), []
        for unit in range(min(group.units, 3)):
            changed = copy.deepcopy(model)
            for name, offset in calibration.readers(group):
                changed.get_submodule(name).weight[:, group.channels([unit], offset)] *= 1 - 1e-2
            slope = (whole - outputs(changed, calls)) / 1e-2
            found.append(slope.square().sum() / whole.shape[1])
        ratio = scores[group.name][: len(found)] / torch.stack(found)
        assert ((ratio > 0.6) & (ratio < 1.6)).all(), (group.name, ratio)


@pytest.mark.parametrize("kind", ["sd", "text_encoder", "vae", "sd3"])
def test_compensation_brings_the_output_nearer(kind):
    model, calls = model_and_calls(kind)
    groups, whole = channels.groups_of(model), outputs(model, calls)
    kept = {
        g.name: channels.choose(channels.magnitude(model, g), channels.units_kept(g, 0.5))
        for g in groups
        if g.units > 2
    }
    errors = []
    for moments in (None, calibration.Moments(model, calls)):
        smaller = copy.deepcopy(model)
        if moments:
            calibration.compensate(smaller, kept, moments)
        channels.prune(smaller, kept)
        errors.append((outputs(smaller, calls) - whole).norm())
    assert errors[1] < 0.97 * errors[0]  # random weights have little to stand in for each other


def test_compensation_recovers_channels_that_are_copies_of_others():
    """x_gone = 2 x_kept + 1 exactly: nothing is lost, but for the ridge."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 3), torch.randn(100, 2)
    x = torch.cat([x, 2 * x + 1], dim=1)
    mean, moment = x.double().mean(0), x.double().T @ x.double() / len(x)
    weight, bias = calibration.stand_in(layer, mean, moment, torch.tensor([0, 1]), torch.tensor([2, 3]))
    assert torch.equal(weight[:, 2:], torch.zeros(3, 2))
    torch.testing.assert_close(x @ weight.T + bias, layer(x), atol=0.02, rtol=0.02)
    weight, bias = calibration.stand_in(layer, mean * 0, moment * 0, torch.tensor([0, 1]), torch.tensor([2, 3]))
    assert torch.equal(weight[:, :2], layer.weight[:, :2]), "channels that are always zero are stood in for by none"


@pytest.mark.parametrize("width", [1, 2])
def test_reconstruction_is_the_order_that_least_squares_find(width):
    """By brute force: of what is left the unit goes without which the layer's output can be fitted best."""
    torch.manual_seed(0)
    units, layer = 5, torch.nn.Linear(5 * width, 7)
    x = torch.randn(4000, 5 * width, dtype=torch.float64) @ torch.randn(5 * width, 5 * width, dtype=torch.float64)
    moments = SimpleNamespace(of={"0": (x.mean(0), x.T @ x / len(x))})
    group = channels.Group("0", "feed_forward", units, width, [("0", 1, 0)])
    scores = calibration.reconstruction(torch.nn.Sequential(layer), group, moments)
    centred, left, order = x - x.mean(0), list(range(units)), []
    target = centred @ layer.weight.detach().double().T

    def error(kept):
        fitted = centred[:, group.channels(sorted(kept))] if kept else centred[:, :0]
        return (target - fitted @ torch.linalg.lstsq(fitted, target).solution).norm() if kept else target.norm()

    while left:
        order.append(min(left, key=lambda unit: error([u for u in left if u != unit])))
        left.remove(order[-1])
    assert scores.argsort().tolist()[: units - 1] == order[: units - 1]


def test_reconstruction_lets_copies_go_first_however_large():
    layer, x = torch.nn.Linear(4, 3), torch.randn(500, 3, dtype=torch.float64)
    x = torch.cat([x, 5 * x[:, :1] + 1], dim=1)
    layer.weight.data[:, 3] *= 20
    moments = SimpleNamespace(of={"0": (x.mean(0), x.T @ x / len(x))})
    group = channels.Group("0", "feed_forward", 4, 1, [("0", 1, 0)])
    scores = calibration.reconstruction(torch.nn.Sequential(layer), group, moments)
    assert int(scores.argmin()) in (0, 3) and channels.magnitude(torch.nn.Sequential(layer), group).argmax() == 3


@pytest.mark.parametrize("kind", ["sd", "text_encoder", "vae", "flux", "sd3"])
def test_reconstruction_loses_less_than_the_norm(kind):
    model, calls = model_and_calls(kind)
    groups, whole, moments = channels.groups_of(model), outputs(model, calls), calibration.Moments(model, calls)
    errors = []
    for score in (channels.magnitude, lambda model, group: calibration.reconstruction(model, group, moments)):
        kept = {g.name: channels.choose(score(model, g), channels.units_kept(g, 0.5)) for g in groups if g.units > 2}
        smaller = copy.deepcopy(model)
        calibration.compensate(smaller, kept, moments)
        channels.prune(smaller, kept)
        errors.append((outputs(smaller, calls) - whole).norm())
    assert errors[1] < errors[0]


def test_sensitivity_and_budget():
    model, calls = model_and_calls("sd")
    groups = {g.name: g for g in channels.groups_of(model) if g.kind != "attention"}
    scores = {name: channels.magnitude(model, group) for name, group in groups.items()}
    before, state = outputs(model, calls), copy.deepcopy(model.state_dict())
    errors = calibration.sensitivity(model, calls, scores)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    name, (ratio, error) = next((name, list(curve.items())[-1]) for name, curve in errors.items())
    smaller = copy.deepcopy(model)
    channels.prune(smaller, {name: channels.choose(scores[name], channels.units_kept(groups[name], ratio))})
    found = [
        (
            (calibration.output_of(smaller, call) - calibration.output_of(model, call)).norm()
            / calibration.output_of(model, call).norm()
        ).item()
        for call in calls[""]
    ]  # by really pruning
    assert error == pytest.approx(sum(found) / len(found), rel=1e-3)
    total, cut = channels.count(model), 0
    for share in (0.1, 0.25):
        ratios = calibration.allocate({"unet": model}, {"unet": errors}, share * total)["unet"]
        taken = {n: channels.choose(scores[n], channels.units_kept(groups[n], r)) for n, r in ratios.items()}
        smaller = copy.deepcopy(model)
        channels.prune(smaller, taken)
        gone = total - channels.count(smaller)
        assert share * total <= gone < (share + 0.06) * total and gone > cut
        cut = gone
    uniform = copy.deepcopy(model)
    channels.prune(uniform, {n: channels.choose(scores[n], channels.units_kept(g, 0.3)) for n, g in groups.items()})
    assert channels.count(uniform) > channels.count(smaller)
    assert (outputs(smaller, calls) - before).norm() < (outputs(uniform, calls) - before).norm()


def test_multiply_accumulates_by_hand():
    model, calls = model_and_calls("sd")
    whole = calibration.macs(model, calls)
    group = next(g for g in channels.groups_of(model) if g.name == "down_blocks.0.resnets.0")
    channels.prune(model, {group.name: list(range(7))})
    # two channels of conv1, at 16 inputs, and of conv2, at 16 outputs, on 8 x 8; and their rows of the time embedding
    assert whole - calibration.macs(model, calls) == 2 * (2 * 16 * 9 * 64 + 64)


# Unstructured


@pytest.mark.parametrize("kind", ["sd", "vae", "flux"])
def test_magnitude_makes_zeros_of_the_smallest(kind):
    model, _ = model_and_calls(kind)
    before = {name: weight.clone() for name, weight in channels.prunable_weights(model).items()}
    channels.zero_smallest(model, 0.3)
    for name, share in channels.sparsity(model).items():
        assert share == pytest.approx(0.3, abs=0.01)
        weight = channels.prunable_weights(model)[name]
        gone, stay = before[name][weight == 0].abs(), before[name][weight != 0].abs()
        assert gone.max() <= stay.min() and torch.equal(weight[weight != 0], before[name][weight != 0])
    channels.zero_smallest(model, 0.0, "2:4")
    for weight in channels.prunable_weights(model).values():
        rows = weight.flatten(1)
        if rows.shape[1] % 4 == 0:
            assert ((rows.reshape(-1, 4) != 0).sum(1) <= 2).all()


def test_from_python(pipelines, tmp_path):
    """As seeds and notebooks have it; what is saved opens again."""
    for method in ("magnitude", "structured", "heads"):
        pipeline = create_pruned_pipeline(model_path=pipelines(), pruning_amount=0.5, method=method)
        assert len(pipeline("a ring", num_inference_steps=1, height=32, width=32).images) == 1
        whole = channels.count(random_pipeline("sd").unet)
        assert (channels.count(pipeline.unet) < whole) == (method != "magnitude")
        pipeline.save_pretrained(tmp_path / method)
        assert channels.count(load_pipeline(tmp_path / method).unet) == channels.count(pipeline.unet)
    model = apply_magnitude_pruning(random_pipeline("sd").unet, 0.5)
    assert all(share >= 0.45 for share in channels.sparsity(model).values())
    for call, words in (
        (lambda: create_pruned_pipeline(pipelines(), 1.0), "pruning_amount 1.0|amount 1.0"),
        (lambda: create_pruned_pipeline(pipelines(), 0.3, "chance"), "method chance is none of"),
        (lambda: apply_magnitude_pruning(model, -1), "not in"),
    ):
        with pytest.raises(UsageError, match=words):
            call()


# Counted on architectures of real size, without their weights


def test_sd15_loses_a_fifth_at_ratio_030():
    config = {"sample_size": 64, "cross_attention_dim": 768}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert channels.count(unet) == 859520964
    gone = planning.planned_cut({"unet": unet}, {"unet": {"conv": 0.3, "feed_forward": 0.3}})["unet"]
    kept = {
        g.name: list(range(channels.units_kept(g, 0.3))) for g in channels.groups_of(unet) if g.kind != "attention"
    }
    channels.prune(unet, kept)
    assert 859520964 - channels.count(unet) == gone >= 0.20 * 859520964
