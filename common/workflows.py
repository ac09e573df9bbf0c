"""How an output is sampled elsewhere: a ComfyUI workflow, and the same settings in words for A1111 and Forge.

Both tools count steps along SGM Uniform as the students here do, evenly from the last training timestep ("trailing").
A student of target x0 predicts the clean latents and noises them again, which they call LCM; one of target next goes
straight from a timestep to the next, which in their terms is Euler.
"""

import json
from pathlib import Path

_SAMPLERS = {"x0": ("lcm", "LCM"), "next": ("euler", "Euler")}
WORKFLOW = "comfyui_workflow.json"
_GENERAL = ("final", "lora", "best", "")  # names of folders that say nothing of what is in them


def settings_of(contract):
    """{steps, sampler, scheduler, cfg, said: {sampler, scheduler}} of a few-step output, else None.

    None where the tools can't sample it: its guidance scale is an input of the UNet, or it is for any step count.
    """
    if not contract.get("steps") or contract["guidance"] == "embedded":
        return None
    sampler, said = _SAMPLERS.get(contract.get("target"), _SAMPLERS["next"])
    return {
        "steps": contract["steps"],
        "sampler": sampler,
        "scheduler": "sgm_uniform",
        "cfg": 1.0 if contract["guidance"] == "baked" else contract["guidance_scale"],
        "said": {"sampler": said, "scheduler": "SGM Uniform"},
    }


def in_words(settings):
    """The settings as A1111's and Forge's pages name them."""
    said = settings["said"]
    return (
        f"sampling method {said['sampler']}, schedule type {said['scheduler']}, {settings['steps']} sampling steps, "
        f"CFG scale {settings['cfg']:g}"
    )


def workflow(settings, resolution, scheduler, checkpoint, lora=None):
    """A ComfyUI workflow, as its page saves and loads it: a dict.

    settings: of `settings_of`; scheduler: config of the output's, whose v-prediction or zero terminal SNR ComfyUI is
    told by a node; checkpoint, lora: file names in ComfyUI's folders.
    """
    nodes, links = [], []

    def node(kind, values, outputs, **inputs):
        """Add a node; inputs: name to (the node it comes from, which of its outputs)."""
        number, slots = len(nodes) + 1, []
        for name, (source, output) in inputs.items():
            what = source["outputs"][output]
            links.append([len(links) + 1, source["id"], output, number, len(slots), what["type"]])
            what["links"].append(len(links))
            slots.append({"name": name, "type": what["type"], "link": len(links)})
        column, row = divmod(number - 1, 3)
        nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": [40 + 400 * column, 60 + 240 * row],
                "size": [360, 200],
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": slots,
                "outputs": [{"name": x, "type": x, "links": [], "slot_index": i} for i, x in enumerate(outputs)],
                "properties": {"Node name for S&R": kind},
                "widgets_values": values,
            }
        )
        return nodes[-1]

    loader = node("CheckpointLoaderSimple", [checkpoint], ["MODEL", "CLIP", "VAE"])
    model = (loader, 0)
    if lora:
        model = (node("LoraLoaderModelOnly", [lora, 1.0], ["MODEL"], model=model), 0)
    zsnr, v = bool(scheduler.get("rescale_betas_zero_snr")), scheduler.get("prediction_type") == "v_prediction"
    if zsnr or v:
        kind = "v_prediction" if v else "eps"
        model = (node("ModelSamplingDiscrete", [kind, zsnr], ["MODEL"], model=model), 0)
    positive = node("CLIPTextEncode", ["a prompt"], ["CONDITIONING"], clip=(loader, 1))
    negative = node("CLIPTextEncode", [""], ["CONDITIONING"], clip=(loader, 1))
    latents = node("EmptyLatentImage", [resolution, resolution, 1], ["LATENT"])
    sampled = node(
        "KSampler",
        [0, "fixed", settings["steps"], settings["cfg"], settings["sampler"], settings["scheduler"], 1.0],
        ["LATENT"],
        model=model,
        positive=(positive, 0),
        negative=(negative, 0),
        latent_image=(latents, 0),
    )
    decoded = node("VAEDecode", [], ["IMAGE"], samples=(sampled, 0), vae=(loader, 2))
    node("SaveImage", ["ComfyUI"], [], images=(decoded, 0))
    last = {"last_node_id": len(nodes), "last_link_id": len(links)}
    return {**last, "nodes": nodes, "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4}


def write_workflow(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n")


def name_of(path):
    """A name for an output elsewhere: of its file, or of the last folder on its path with a name of its own."""
    path = Path(path)
    if path.is_file():
        return path.stem
    return next((part for part in reversed(path.absolute().parts) if part.strip("/") not in _GENERAL), "export")


def files_of(output, parent, lora):
    """{"checkpoint", "lora"}: the files that a workflow of an output names; `parent`: what a LoRA goes on."""
    own = f"{name_of(output)}.safetensors"
    return {"checkpoint": f"{Path(parent).name}.safetensors", "lora": own} if lora else {"checkpoint": own}


def elsewhere(settings, folder, lora):
    """What the card of the output in `folder` says of other tools."""
    flag = "--lora_path" if lora else "--pretrained_model_name_or_path"
    return (
        f"`python export.py {flag} {folder}` writes it as other tools load it, and says which. ComfyUI: "
        f"`{WORKFLOW}`. A1111, Forge: {in_words(settings)}"
    )
