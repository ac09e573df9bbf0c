"""A page to try and compare models: their images of one prompt and seed side by side, with times and differences.

    python app.py                                             # tiny-sd, and what lies in outputs/
    python app.py outputs/run/lora/final out/small/final-int8
    python app.py --pruning_amount 0.5 --precision bf16 --steps 30 --prompt "a small red circle"

A model is a pipeline (folder or hub id) or a LoRA of this repository (its final/). Scheduler, timesteps and guidance
are those saved with it: the sliders move what the weights leave free. The image of a prompt and seed is the one that
`inference.py --prompt ... --seed ...` makes. The first of the chosen models is what the others are compared with.

Models load when they are first asked for, and stay; requests are served one after another, whoever sends them. The
page is for this machine alone (--host 127.0.0.1) unless it is told otherwise, and needs no internet. Ctrl-C ends it.
"""

import argparse
import errno
import gc
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common import arguments
from common.compression.lora_conversion import load_converted
from common.compression.pruning import METHODS, prune_pipeline
from common.compression.quantization import bytes_of, quantize_pipeline
from common.compression.quantized_folders import quantization_of, refuse_quantized
from common.contract import TINY_SD, comes_from_tiny_sd, sampling_guidance
from common.errors import UsageError, UserError, first_line
from common.judging.planning import Model, bytes_on_disk, plan_model
from common.judging.previews import image_difference, image_grid
from common.lora import check_lora_path
from common.outputs import find_outputs
from common.pipelines import keep_vae_right, load_pipeline
from common.randomness import sample_generator
from common.run import run_script
from common.sampling import place, sample_timed, settle_device
from common.schedulers import list_timesteps, saved_scheduler, scheduler_for
from common.single_file import pipeline_folder

try:
    import gradio as gr
    from gradio.tunneling import CURRENT_TUNNELS
except ModuleNotFoundError as missing:
    print(f"error: app.py needs {missing.name}: ./run.sh installs it; by hand, see the README.", file=sys.stderr)
    sys.exit(2)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDED = ("int8", "fp8")
PROMPT = "a small red circle above a large blue square on a white background"  # of the vocabulary of tiny-sd
MOST_STEPS, MOST_CHARACTERS, MOST_ROWS, MOST_WAITING = 100, 2000, 20, 32
LARGEST_SEED = 2**53 - 1  # the largest whole number that a browser holds exactly
CSS = """
.picture img {width: 100%; height: 100%; object-fit: contain} .small img {image-rendering: pixelated}
#status {min-height: 3.5em} footer {display: none !important}
"""


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    add = parser.add_argument_group("models").add_argument
    add("models", nargs="*", help="pipelines and LoRAs to compare (default: tiny-sd, and the outputs in outputs/)")
    add("--pretrained_model_name_or_path", help="pipeline that LoRAs go on (default: the one each was made from)")
    add("--revision", help="revision of hub ids (default: of a LoRA's pipeline, as recorded)")
    add("--variant", help="file variant of the pipelines, such as fp16 (default: of a LoRA's, as recorded)")
    add("--resolution", type=arguments.positive_int, help="pixels per side (default: each model's own)")
    add("--pruning_amount", type=arguments.fraction, help="show each pipeline also with this share of its UNet pruned")
    add(
        "--pruning_method",
        choices=tuple(METHODS),
        default="magnitude",
        help="what goes: weights, which become zero; channels of resnets and feed-forwards; or attention heads",
    )
    add = parser.add_argument_group("the page as it opens").add_argument
    add("--prompt", help="the prompt (default: for models that come from tiny-sd, one that it knows)")
    add("--seed", type=arguments.seed, default=0, help="the noise derives from it")
    add("--steps", type=arguments.step_count, help="steps of models that were trained for no number (default: 50)")
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 opens the page to the network")
    add("--port", type=arguments.positive_int, default=7860, help="port to listen at")
    add("--share", action="store_true", help="also a public link through gradio's servers, open to whoever has it")
    add("--max_loaded", type=arguments.positive_int, default=4, help="models kept in memory; the longest unused goes")
    add = arguments.add_device_arguments(parser).add_argument
    add(
        "--dtype",
        "--precision",
        choices=("auto", *DTYPES, *ROUNDED),
        default="auto",
        help="auto: fp16 on CUDA, else fp32; int8, fp8: the weights, on loading (quantized outputs stay as saved)",
    )
    return parser.parse_args(argv)


# What is shown


@dataclass
class Shown:
    """A model of the page, under its name there."""

    name: str
    model: Model
    pruning_amount: float = 0.0


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work; fill in device and dtype."""
    if args.resolution and args.resolution % 8:
        raise UsageError(f"--resolution {args.resolution} is not a multiple of 8.")
    if args.seed > LARGEST_SEED:
        raise UsageError(f"--seed {args.seed} is more than {LARGEST_SEED}, the largest that a browser holds exactly.")
    if args.prompt is not None and not args.prompt.strip():
        raise UsageError("--prompt is empty: give one, or leave the flag out and type it on the page.")
    settle_device(args)
    args.pretrained_model_name_or_path = pipeline_folder(args.pretrained_model_name_or_path)
    if args.port > 65535:
        raise UsageError(f"--port {args.port} is more than 65535, the last port.")
    try:
        socket.create_server((args.host, args.port)).close()
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = "is taken by another program" if taken else f"of --host {args.host} can't be had"
        raise UsageError(f"--port {args.port} {why}: choose another one.") from None


def plan_page(args, outputs="outputs"):
    """[Shown]: the models that are asked for, or else tiny-sd and what lies in `outputs`. Raises UsageError."""
    if args.models:
        shown = [plan(path, args) for path in dict.fromkeys(args.models)]
    else:
        shown = [plan(str(TINY_SD), args)]
        for path in find_outputs(outputs) if args.pruning_amount is None else []:
            try:
                shown.append(plan(path, args))
            except UserError as error:  # nobody asked for this one
                print(f"Left out: {error}", flush=True)
    if args.pruning_amount is not None:
        shown = [each for original in shown for each in (original, pruned(original, args))]
    return shown


def plan(path, args):
    """The Shown of a folder or hub id, its steps those that it was trained for, or else --steps."""
    own = argparse.Namespace(**{**vars(args), "steps": None, "trained_steps": False, "guidance_scale": None})
    model = plan_model(path, own, "the model")
    if model.kind == "images":
        raise UsageError(f"the model {path}: it is a folder of images, which evaluate.py compares.")
    if args.steps and not model.contract.get("steps"):
        model.steps = [args.steps]
    return Shown("tiny-sd" if path == str(TINY_SD) else path, model)


def pruned(original, args):
    if original.model.kind == "lora":
        raise UsageError(f"--pruning_amount is for pipelines, and {original.name} is a LoRA: leave one of them out.")
    refuse_quantized(original.model.path, args.revision, "the model")
    name = f"{original.name}, {args.pruning_amount:.0%} pruned"
    return Shown(name, original.model, args.pruning_amount)


# Sampling


def load(shown, args):
    """The pipeline of a model of the page, on the device, in --dtype. Raises UserError."""
    model, path = shown.model, shown.model.pipeline["path"]
    as_saved = quantization_of(path, model.pipeline["revision"]) is not None
    later = not as_saved and (args.dtype in ROUNDED or shown.pruning_amount)  # from whole weights, and rounded after
    dtype = DTYPES.get(args.dtype, torch.float32)
    pipeline = load_pipeline(dtype=torch.float32 if later else dtype, flag="the model", **model.pipeline)
    if model.kind == "lora":
        check_lora_path(model.path, "the model")  # it may be gone by now
        pipeline.scheduler = saved_scheduler(model.path)
        load_converted(pipeline, model.path, path, fuse=args.dtype in ROUNDED, flag="the model")
    if shown.pruning_amount:
        prune_pipeline(pipeline, shown.pruning_amount, args.pruning_method)
    if later and args.dtype in ROUNDED:
        quantize_pipeline(pipeline, kind=args.dtype)
    elif later:
        for module in models_of(pipeline).values():
            module.to(dtype)
    keep_vae_right(pipeline)
    place(pipeline, args)
    return pipeline


def models_of(pipeline):
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


class Loaded:
    """The pipelines in memory, --max_loaded at most, and the lock that whoever uses one holds."""

    def __init__(self, args):
        self.args, self.lock, self.pipelines = args, threading.Lock(), OrderedDict()

    def sample(self, shown, prompt, seed, steps, guidance_scale, progress):
        """(PIL image, {figure: value}) of one model, loaded first where it is not. Raises UserError.

        progress: called with (steps done, steps) or 0 and a text.
        """
        with self.lock:
            guidance_scale, _ = sampling_guidance(shown.model.contract, guidance_scale, "guidance")
            new = shown.name not in self.pipelines
            if new:
                progress(0, f"{shown.name}: loading")
                while len(self.pipelines) >= self.args.max_loaded:
                    self.pipelines.popitem(last=False)
                    gc.collect()
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                pipeline = load(shown, self.args)
                self.pipelines[shown.name] = pipeline, pipeline.scheduler, weights_of(shown, pipeline)
            self.pipelines.move_to_end(shown.name)
            pipeline, saved, weights = self.pipelines[shown.name]
            pipeline.scheduler = scheduler_for(saved, shown.model.contract, steps)
            timesteps = list_timesteps(pipeline.scheduler, steps)

            def run(steps, step_end=None):
                return sample_timed(
                    pipeline,
                    self.args.device,
                    prompt=[prompt],
                    num_inference_steps=steps,
                    guidance_scale=guidance_scale,
                    height=shown.model.resolution,
                    width=shown.model.resolution,
                    generator=[sample_generator(seed, 0, 0)],
                    callback_on_step_end=step_end,
                )

            def step_end(_, step, timestep, tensors):
                progress((min(step + 1, steps), steps), shown.name)
                return tensors

            if new:  # what a first call does besides is not timed
                run(min(2, steps))
            pixels, _, seconds = run(steps, step_end)
        figures = {"steps": steps, "guidance_scale": guidance_scale, "seconds": seconds, "timesteps": timesteps}
        length = len(pipeline.tokenizer(prompt).input_ids)
        if length > pipeline.tokenizer.model_max_length:
            figures["tokens"] = f"{pipeline.tokenizer.model_max_length} of {length}"
        return pipeline.image_processor.postprocess(pixels, output_type="pil")[0], {**figures, **weights}


def weights_of(shown, pipeline):
    """{figure: bytes} of a loaded model: its files, where it is as they are, and its tensors."""
    parts = models_of(pipeline)
    disk = {} if shown.pruning_amount else {"bytes_on_disk": bytes_on_disk(shown.model, parts)}
    return {**disk, "bytes_in_memory": sum(bytes_of(part) for part in parts.values())}


# The page


def in_words(figures):
    """The figures of an image as lines of Markdown."""
    made = f"**{figures['seconds']:.3g} s** per image, {figures['steps']} steps"
    lines = [f"{made}, guidance {figures['guidance_scale']:g}"]
    sizes = [("bytes_on_disk", "on disk"), ("bytes_in_memory", "of weights in memory")]
    lines.append(", ".join(f"{figures[name] / 1e6:.1f} MB {where}" for name, where in sizes if name in figures))
    if "tokens" in figures:
        lines.append(f"the prompt is cut: {figures['tokens']} tokens are read")
    if "mean_difference" in figures:
        mean = figures["mean_difference"]
        said = "not taken, as it is of another size" if mean is None else f"{mean:.2f} of 255 in the mean"
        lines.append(f"difference to the first: {said}")
    return "\n\n".join(lines)


def read_request(prompt, seed, chosen):
    """(prompt, seed) as they are used; UsageError, one sentence for the page, where they can't be."""
    prompt = (prompt or "").strip()
    if not prompt:
        raise UsageError("The prompt is empty: type what the image is to show.")
    if len(prompt) > MOST_CHARACTERS:
        raise UsageError(f"The prompt has {len(prompt)} characters; {MOST_CHARACTERS} are the most.")
    if seed is None or not float(seed).is_integer() or not 0 <= seed <= LARGEST_SEED:
        raise UsageError(f"The seed is a whole number from 0 to {LARGEST_SEED}.")
    if not chosen:
        raise UsageError("No model is chosen: tick one.")
    return prompt, int(seed)


def write_history(history):
    """(grid, its PNG file, JSON file) of a visitor's rows: prompts down, models across; the settings are in both."""
    names = list(dict.fromkeys(result["model"] for row in history["rows"] for result in row["results"]))
    images = [{result["model"]: result["image"] for result in row["results"]} for row in history["rows"]]
    empty = Image.new("RGB", (8, 8), "white")
    labels = [f"{row['prompt'][:40]} (seed {row['seed']})" for row in history["rows"]]
    grid = image_grid([[row.get(name, empty) for name in names] for row in images], labels, names, min_side=160)
    text = json.dumps(history["rows"], indent=2, default=lambda image: f"{image.width} x {image.height} pixels")
    folder, inside = Path(history["folder"]), PngInfo()
    inside.add_text("settings", text)
    grid.save(folder / "history.png", pnginfo=inside)
    (folder / "history.json").write_text(text + "\n")
    return grid, str(folder / "history.png"), str(folder / "history.json")


@dataclass
class Column:
    """The parts of the page that are about one model."""

    box: gr.Column
    image: gr.Image
    words: gr.Markdown
    steps: gr.Slider
    guidance: gr.Slider
    difference: gr.Image


def in_a_sentence(error, shown):
    """What became of a model of the page that made no image; it names the model."""
    if isinstance(error, torch.OutOfMemoryError):
        said = "out of GPU memory: start again with --max_loaded 1, --cpu_offload or the slicing flags"
    else:
        said = first_line(error)
    return f"{said}." if shown.model.path in said else f"{shown.name}: {said}."


def build_column(shown, number, visible):
    """The Column of a model. Its sliders move what its contract leaves free."""
    contract, steps = shown.model.contract, shown.model.steps[0]
    trained, kind = contract.get("steps"), contract["guidance"]
    baked = kind == "baked"
    said = {"cfg": "two passes a step above 1", "embedded": "an input of the UNet", "baked": "baked into the weights"}
    picture = {"format": "png", "height": 270, "interactive": False, "buttons": ["download"]}
    picture["elem_classes"] = ["picture", "small"] if shown.model.resolution <= 128 else ["picture"]
    with gr.Column(visible=visible, min_width=260, elem_id=f"model-{number}") as box:
        image = gr.Image(label=shown.name, **picture)
        info = f"trained for {trained}" if trained else "any number"
        steps = gr.Slider(1, max(MOST_STEPS, steps), steps, step=1, label="Steps", info=info, elem_classes="steps")
        value, most = shown.model.guidance_scale, max(15, shown.model.guidance_scale)
        free = {"interactive": not baked, "info": said[kind], "elem_classes": "guidance"}
        guidance = gr.Slider(1, most, value, step=0.1, label="Guidance", **free)
        words = gr.Markdown()
        picture["elem_classes"] = [*picture["elem_classes"], "difference"]
        other = gr.Image(label="|difference to the first|, 4 times as bright", visible=number > 0, **picture)
    return Column(box, image, words, steps, guidance, other)


def build_page(models, args, folder):
    """The gradio page of [Shown]; `folder`: where the files to download are written."""
    loaded = Loaded(args)
    names = [shown.name for shown in models]
    first = args.prompt or (PROMPT if comes_from_tiny_sd(models[0].model.pipeline["path"]) else "")
    opened = names if args.models or args.pruning_amount is not None else names[:2]
    with gr.Blocks(title="Try and compare", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        kept = gr.State(None)
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(first, label="Prompt", scale=5, elem_id="prompt")
            seed = gr.Number(args.seed, label="Seed", scale=1, elem_id="seed")
            button = gr.Button("Generate", variant="primary", scale=1, elem_id="generate")
        chosen = gr.CheckboxGroup(names, value=opened, label="Models, compared with the first", elem_id="models")
        status = gr.Markdown(elem_id="status")
        with gr.Row():
            columns = [build_column(shown, n, shown.name in opened) for n, shown in enumerate(models)]
        grid = gr.Image(label="History", format="png", visible=False, interactive=False, elem_id="history", buttons=[])
        with gr.Row():
            png = gr.DownloadButton("Download the grid (PNG)", visible=False, elem_id="png")
            settings = gr.DownloadButton("Download its settings (JSON)", visible=False, elem_id="json")

        def show(chosen):
            return [gr.Column(visible=name in chosen) for name in names]

        def compare(prompt, seed, chosen, history, *sliders, progress=gr.Progress()):  # noqa: B008
            """Sample the chosen models one after another, and show each as soon as it is there."""
            try:
                prompt, seed = read_request(prompt, seed, chosen)
            except UsageError as error:
                yield {status: str(error)}
                return
            yield {status: "", **{part: None for c in columns for part in (c.image, c.words, c.difference)}}
            results, failed, began = [], [], time.perf_counter()
            for number, (shown, column) in enumerate(zip(models, columns)):
                if shown.name not in chosen:
                    continue
                steps, guidance_scale = sliders[2 * number : 2 * number + 2]
                try:
                    image, figures = loaded.sample(shown, prompt, seed, int(steps), guidance_scale, progress)
                except (UserError, OSError, torch.OutOfMemoryError) as error:
                    failed.append(in_a_sentence(error, shown))
                    yield {column.words: f"**No image.** {failed[-1]}"}
                    continue
                shown_too = {}
                if results:
                    distance, figures["mean_difference"] = image_difference(image, results[0]["image"])
                    shown_too = {column.difference: distance}
                results.append({"model": shown.name, **figures, "image": image})
                yield {column.image: image, column.words: in_words(figures), **shown_too}
            count = "1 image" if len(results) == 1 else f"{len(results)} images"
            said = f"{count} of seed {seed} in {time.perf_counter() - began:.1f} s, loading included."
            done = {status: " ".join([said, *failed])}
            if results:
                history = history or {"rows": [], "folder": tempfile.mkdtemp(dir=folder)}
                row = {"prompt": prompt, "seed": seed, "results": results}
                history = {**history, "rows": [*history["rows"], row][-MOST_ROWS:]}
                picture, *files = write_history(history)
                done |= {kept: history, grid: gr.Image(picture, visible=True)}
                for part, file in zip((png, settings), files):
                    done[part] = gr.DownloadButton(value=file, visible=True)
            yield done

        private = {"api_visibility": "private"}
        chosen.change(show, chosen, [c.box for c in columns], queue=False, show_progress="hidden", **private)
        gr.on(
            [button.click, prompt.submit],
            compare,
            [prompt, seed, chosen, kept, *(slider for c in columns for slider in (c.steps, c.guidance))],
            [status, kept, grid, png, settings, *(part for c in columns for part in (c.image, c.words, c.difference))],
            show_progress_on=status,
            **private,
        )
    # One at a time: a request sets the scheduler of what it samples, and two at once would share the same cores.
    return page.queue(max_size=MOST_WAITING, default_concurrency_limit=1)


def main(args):
    check_arguments(args)
    models = plan_page(args)
    with tempfile.TemporaryDirectory() as folder:
        page = build_page(models, args, folder)
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # nothing to fetch
        address = {"server_name": args.host, "server_port": args.port, "share": args.share}
        plain = {"ssr_mode": False, "run_history": False, "footer_links": [], "quiet": True}
        page.launch(**address, **plain, theme=theme, css=CSS, show_error=True, prevent_thread_lock=True)
        print(f"The page is at {page.local_url}" + (f" and {page.share_url}" if page.share_url else ""), flush=True)
        stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        stopped.wait()
        page.close(verbose=False)
        for tunnel in CURRENT_TUNNELS:  # of --share
            tunnel.kill()
    print("Stopped.", flush=True)
    os._exit(0)  # an image that is in the making is waited for by nobody


if __name__ == "__main__":
    run_script(main, parse_args())
