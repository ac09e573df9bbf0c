"""app.py: the page in a real headless Chromium, one server for all of it; what is shown, and user's mistakes."""

import io
import json
import os
import shutil
import signal
import socket

import numpy as np
import pytest
import torch
from conftest import ROOT, fork, save_random_lora
from launching import assert_every_flag_has_help, error_of, wait_for
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import app
from common.compression.quantization import covered
from common.contract import TINY_SD, read_distillation, write_distillation
from common.judging.previews import image_difference
from common.outputs import find_outputs
from common.pipelines import load_pipeline
from common.randomness import sample_generator
from common.schedulers import saved_scheduler, scheduler_for

PROMPT, OTHER = "a large green ring on a white background", "a small red square on a black background"
SECONDS = 120_000  # that a browser waits at most, in ms: these cores are shared


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose outputs/ has a LoRA for 2 steps, twice, and what is no output or can't be used."""
    root = tmp_path_factory.mktemp("app")
    outputs, pipeline = root / "outputs", load_pipeline(TINY_SD)
    save_random_lora(pipeline, outputs / "run/lora/final", str(TINY_SD), alpha=16)
    for copy in ("run/lora/checkpoint-2/final", "run/lora/other", "soon_gone/best"):
        shutil.copytree(outputs / "run/lora/final", outputs / copy)
    (outputs / "broken/final").mkdir(parents=True)
    (outputs / "broken/final/model_index.json").write_text("{}")
    return root


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def server(folder):
    """(URL, process, file of what it says) of `python app.py --steps 3`, started in that folder."""
    port, said = free_port(), folder / "said.txt"
    process = fork(ROOT / "app.py", "--steps", 3, "--port", port, cwd=folder, output=said)
    wait_for(lambda: "The page is at" in said.read_text(), process)
    yield f"http://127.0.0.1:{port}", process, said
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert found, "these tests drive a real browser: apt-get install chromium (test.sh does so as root on Debian)"
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def visit(server, browser):
    """`visit()`: the page as a new visitor sees it, whose browser asks nobody but the server for anything."""
    asked = []

    def get():
        page = browser.new_context(accept_downloads=True, reduced_motion="reduce").new_page()
        page.set_default_timeout(SECONDS)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server[0])
        expect(page.locator("#generate")).to_be_visible(timeout=SECONDS)
        return page

    yield get
    assert asked and all(url.startswith((server[0], "data:", "blob:")) for url in asked)


@pytest.fixture(scope="module")
def page(visit):
    """One visitor's page, which the tests use one after another."""
    return visit()


def press(page, prompt, seed):
    page.fill("#prompt textarea, #prompt input", prompt)
    page.fill("#seed input", str(seed))
    page.click("#generate")


def see(page, text):
    expect(page.locator("#status")).to_contain_text(text, timeout=SECONDS)


def picture_of(page, number, kind=":not(.difference)"):
    """The pixels, as a PIL image, of a picture in column `number` that the browser has drawn."""
    img = page.locator(f"#model-{number} .picture{kind} img")
    expect(img).to_be_visible(timeout=SECONDS)
    page.wait_for_function("img => img.complete && img.naturalWidth > 0", arg=img.element_handle())
    return Image.open(io.BytesIO(page.request.get(img.evaluate("img => img.src")).body())).convert("RGB")


def assert_same_picture(picture, expected):
    assert picture.size == expected.size
    difference = np.abs(np.asarray(picture, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= 1  # a rounding


@pytest.fixture(scope="module")
def directly(folder):
    """`directly(prompt, seed, steps, lora)`: what a call of the stock pipeline makes."""
    plain, adapted = load_pipeline(TINY_SD), load_pipeline(TINY_SD)
    lora, contract = folder / "outputs/run/lora/final", read_distillation(TINY_SD)
    adapted.load_lora_weights(str(lora))
    adapted.scheduler, saved = saved_scheduler(lora), plain.scheduler

    def get(prompt, seed, steps=3, lora=False):
        pipeline, scale = (adapted, 1.0) if lora else (plain, contract["guidance_scale"])
        if not lora:
            pipeline.scheduler = scheduler_for(saved, contract, steps)
        generator = sample_generator(seed, 0, 0)
        return pipeline(prompt, num_inference_steps=steps, guidance_scale=scale, generator=generator).images[0]

    return get


# In the browser


def test_a_prompt_and_two_models_side_by_side(page, directly):
    press(page, PROMPT, 7)
    see(page, "2 images of seed 7")
    teacher, student = picture_of(page, 0), picture_of(page, 1)
    assert_same_picture(teacher, directly(PROMPT, 7))
    assert_same_picture(student, directly(PROMPT, 7, steps=2, lora=True))
    distance, mean = image_difference(student, teacher)
    assert mean > 1
    assert_same_picture(picture_of(page, 1, ".difference"), distance)
    words = page.locator("#model-1").inner_text()
    for said in (f"{mean:.2f} of 255", "s per image, 2 steps, guidance 1", "MB on disk", "trained for 2"):
        assert said in words, said
    assert "3 steps, guidance 2" in page.locator("#model-0").inner_text()
    expect(page.locator("#model-2")).to_be_hidden()


def test_steps_move_and_a_baked_guidance_does_not(page, directly):
    expect(page.locator("#model-0 .guidance input[type=number]")).to_be_enabled()
    expect(page.locator("#model-1 .guidance input[type=number]")).to_be_disabled()
    page.fill("#model-0 .steps input[type=number]", "2")
    page.fill("#model-1 .steps input[type=number]", "1")
    press(page, PROMPT, 8)
    see(page, "2 images of seed 8")
    assert_same_picture(picture_of(page, 0), directly(PROMPT, 8, steps=2))
    assert_same_picture(picture_of(page, 1), directly(PROMPT, 8, steps=1, lora=True))


def test_two_visitors_at_once_each_get_their_own(page, visit, directly):
    pages = {PROMPT: page, OTHER: visit()}
    for prompt, page in pages.items():
        page.fill("#model-0 .steps input[type=number]", "12")
        press(page, prompt, 3)
    for prompt, page in pages.items():
        see(page, "2 images of seed 3")
        assert_same_picture(picture_of(page, 0), directly(prompt, 3, steps=12))
        assert {row["prompt"] for row in download(page, "#json")} == {prompt}


def test_what_can_t_be_made_is_said_on_the_page(page, folder):
    press(page, "   ", 1)
    see(page, "The prompt is empty: type what the image is to show.")
    press(page, PROMPT, 2**60)
    see(page, "The seed is a whole number from 0 to 9007199254740991.")
    press(page, "ring " * 500, 1)
    see(page, "The prompt has 2499 characters; 2000 are the most.")
    shutil.rmtree(folder / "outputs/soon_gone")  # while the server runs, which hasn't loaded it
    page.get_by_label("outputs/soon_gone/best").check()
    page.get_by_label("outputs/run/lora/final").uncheck()
    expect(page.locator("#model-2")).to_be_visible(timeout=SECONDS)
    press(page, "red " * 200, 2)
    see(page, "1 image of seed 2")
    see(page, "the model outputs/soon_gone/best: there is no such file or folder")
    assert "No image" in page.locator("#model-2").inner_text()
    assert "the prompt is cut" in page.locator("#model-0").inner_text()
    page.get_by_label("tiny-sd").uncheck()
    page.get_by_label("outputs/soon_gone/best").uncheck()
    expect(page.locator("#model-0")).to_be_hidden(timeout=SECONDS)
    press(page, PROMPT, 1)
    see(page, "No model is chosen")


def download(page, button):
    with page.expect_download() as started:
        page.click(button)
    path = started.value.path()
    return json.loads(path.read_text()) if button == "#json" else Image.open(path)


def test_a_reload_starts_anew_and_the_history_downloads(page):
    page.reload()
    expect(page.locator("#generate")).to_be_visible(timeout=SECONDS)
    expect(page.locator("#png")).to_be_hidden()
    press(page, PROMPT, 4)
    see(page, "2 images of seed 4")
    press(page, OTHER, 5)
    see(page, "2 images of seed 5")
    picture, rows = download(page, "#png"), download(page, "#json")
    assert picture.width > 320 and picture.height > 320  # two models, two prompts
    assert json.loads(picture.text["settings"]) == rows
    assert [(row["prompt"], row["seed"]) for row in rows] == [(PROMPT, 4), (OTHER, 5)]
    first, second = rows[1]["results"]
    assert (first["model"], first["steps"], first["guidance_scale"]) == ("tiny-sd", 3, 2)
    assert second["model"] == "outputs/run/lora/final" and second["mean_difference"] > 0


def test_ctrl_c_ends_it_quietly_in_the_middle_of_an_image(page, server):
    _, process, said = server
    page.fill("#model-0 .steps input[type=number]", "100")
    press(page, PROMPT, 9)
    expect(page.locator("#status")).to_contain_text("tiny-sd", timeout=SECONDS)  # progress
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 0
    assert said.read_text().endswith("Stopped.\n") and "Traceback" not in said.read_text()
    assert "Left out: the model outputs/broken/final" in said.read_text()


# Without one


def planned(*words, outputs="outputs"):
    args = app.parse_args([str(word) for word in words])
    app.settle_device(args)
    return app.plan_page(args, outputs), args


def test_outputs_are_found_and_checkpoints_are_not(folder):
    found = find_outputs(folder / "outputs")
    assert str(folder / "outputs/run/lora/final") in found
    assert not any("checkpoint" in path or "other" in path for path in found)
    assert find_outputs(folder / "nothing") == []


def test_contracts_decide_what_the_sliders_move(folder, pipelines, tmp_path):
    shutil.copytree(pipelines(), tmp_path / "embedded")
    contract = {"steps": 4, "timesteps": [999, 749, 499, 249], "target": "x0"}
    write_distillation(tmp_path / "embedded", guidance="embedded", guidance_scale=3.0, **contract)
    shown, args = planned(TINY_SD, folder / "outputs/run/lora/final", tmp_path / "embedded", "--steps", 9)
    with app.gr.Blocks(analytics_enabled=False):
        columns = [app.build_column(each, number, True) for number, each in enumerate(shown)]
    assert [column.steps.value for column in columns] == [9, 2, 4]
    assert [column.guidance.value for column in columns] == [2, 1, 3]
    assert [column.guidance.interactive for column in columns] == [True, False, True]
    with pytest.raises(app.UsageError, match="baked in"):  # whatever a browser sends
        app.Loaded(args).sample(shown[1], PROMPT, 0, 2, 5.0, None)


def test_pruned_and_quantized_on_loading(pipelines):
    shown, args = planned(pipelines(), "--pruning_amount", 0.5, "--precision", "int8")
    assert [each.pruning_amount for each in shown] == [0, 0.5] and shown[1].name.endswith("50% pruned")
    assert all(covered(app.load(each, args).unet) > 0.5 for each in shown)
    shown, args = planned(pipelines(), "--pruning_amount", 0.5, "--precision", "bf16")
    original, pruned = (app.load(each, args).unet for each in shown)
    assert original.dtype == pruned.dtype == torch.bfloat16
    zeros = [(unet.mid_block.resnets[0].conv1.weight == 0).float().mean().item() for unet in (original, pruned)]
    assert zeros[0] < 0.01 and 0.3 < zeros[1] < 0.7
    shown, args = planned("--pruning_amount", 0.25)
    assert [each.name for each in shown] == ["tiny-sd", "tiny-sd, 25% pruned"]


def test_the_longest_unused_model_makes_room(pipelines, folder):
    shown, args = planned(pipelines(), folder / "outputs/run/lora/final", TINY_SD, "--max_loaded", 2)
    loaded, told = app.Loaded(args), []
    for each in (shown[0], shown[1], shown[0], shown[2]):
        loaded.sample(each, PROMPT, 0, 1, each.model.guidance_scale, lambda *done: told.append(done))
    assert list(loaded.pipelines) == [shown[0].name, "tiny-sd"]
    assert told[:2] == [(0, f"{shown[0].name}: loading"), ((1, 1), shown[0].name)]
    assert len([done for done in told if done[0] == 0]) == 3


def test_a_difference_is_of_equal_sizes():
    black, gray = (Image.new("RGB", (4, 4), (level,) * 3) for level in (0, 10))
    picture, mean = image_difference(gray, black)
    assert mean == 10 and picture.getpixel((0, 0)) == (40, 40, 40)
    assert image_difference(gray, Image.new("RGB", (5, 4))) == (None, None)


def test_mistakes_are_one_sentence(folder, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    lora, port = folder / "outputs/run/lora/final", ["--port", free_port()]
    for words, said in {
        ("nothing/at/all",): "the model nothing/at/all: there is no such folder",
        (folder / "outputs/run",): "(did you mean",
        (tmp_path,): "it is a folder of images, which evaluate.py compares",
        (lora, "--pruning_amount", 0.5): "--pruning_amount is for pipelines, and",
        ("--precision", "fp16", "--device", "cpu"): "--dtype fp16 needs a GPU",
        ("--cpu_offload", "--device", "cpu"): "--cpu_offload needs a CUDA GPU",
        ("--resolution", 30): "--resolution 30 is not a multiple of 8",
        ("--prompt", " "): "--prompt is empty",
        ("--seed", 2**60): "--seed 1152921504606846976 is more than 9007199254740991",
        ("--port", 70000): "--port 70000 is more than 65535",
        ("--host", "203.0.113.1"): "of --host 203.0.113.1 can't be had",
    }.items():
        error = error_of(app, [*([] if "--port" in words else port), *words], capsys)
        assert error.startswith("error: ") and said in error and error.count("\n") == 1, error
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        error = error_of(app, ["--port", number], capsys)
        assert error == f"error: --port {number} is taken by another program: choose another one.\n"


def test_every_flag_has_help(monkeypatch):
    assert_every_flag_has_help(app, monkeypatch)
