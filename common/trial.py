"""A run's networks on the meta device, where tensors have no memory, and one of its training steps on them.

They are made as the script makes them later, from config files alone. The step does what the script's loop does, in
its order: what is encoded, what the teacher says, the student's forward and backward. How much memory that would take
is counted by common/memory.py.
"""

import contextlib
import copy
from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch.utils.checkpoint import checkpoint
from torchvision.models import vgg16
from transformers import AutoConfig, Dinov2Model

from common.compression.distillation import Student, build_projections, kd_loss
from common.compression.manifest import read_manifest
from common.compression.planning import empty_models
from common.compression.students import empty_unet, feature_pairs, student_config
from common.conditioning import Conditioning, decode_latents, encode_images, predict, predict_guided
from common.discriminators import Heads, UNetFeatures, judge
from common.frozen import idle_encoders
from common.hooks import FeatureTap
from common.judging.metrics import LPIPS_CROP
from common.lora import add_lora, layers_to_quantize, without_adapters
from common.memory import DDP, AsOnDevice, LiveBytes, bytes_of, estimate
from common.text_encoders import TextStates, with_student

TOKENS = 77  # of a caption, where no text encoder says it
GUIDANCE_WIDTH = 256  # of the embedding that pipelines.with_guidance_input adds


@dataclass
class Networks:
    """The models of a run, on the meta device, in the dtypes that they are held in."""

    pipeline: dict  # name to frozen model, of the pipeline that is loaded
    trained: torch.nn.Module | None = None  # a UNet or TextStates; with adapters, its other layers are frozen
    teacher: torch.nn.Module | None = None  # what it learns from
    more: dict = field(default_factory=dict)  # name to another frozen model
    heads: torch.nn.Module | None = None  # of a discriminator, which are trained too
    target: bool = False  # whether a slow copy of what is trained is in memory and asked, beside the average
    pairs: list = field(default_factory=list)  # [name, teacher's name] of features that are compared
    latent_shape: tuple = ()
    rounded: int = 0  # bytes that INT8 weights save of what is frozen
    tokens: int = TOKENS
    dtype: torch.dtype = torch.float32  # of the conditioning that the pipeline makes

    def held(self):
        """{name: module}, each of them once."""
        named = {**self.pipeline, **self.more, "teacher": self.teacher, "student": self.trained}
        found = {}
        for name, module in named.items():
            if module is not None and all(module is not known for known in found.values()):
                found[name] = module
        return found


def make_networks(
    args, dtype, trains="unet", student=None, variant=None, embedded=False, target=False, own_teacher=False
):
    """The Networks of these arguments; dtype: the compute dtype, of what is frozen.

    trains: "unet" (with --lora_rank a LoRA of the teacher, which is the same UNet), "text_encoder", "pruned" (the
    UNet of a copy of the whole pipeline in fp32) or, without a teacher, None. student: pipeline whose UNet it is that
    is trained; variant: or what is cut out of the teacher's. embedded: its guidance scale is an input. target: see
    Networks. own_teacher: the teacher of a LoRA is a second UNet. Encoders that a cache stands for are not loaded.
    """
    models = {name: model.eval().requires_grad_(False) for name, model in empty_models_of(args).items()}
    found = Networks(models, target=target, tokens=tokens_of(models))
    if trains in ("unet", "text_encoder"):
        found.dtype = dtype
    if "unet" in models:
        side = args.resolution // 2 ** (len(models["vae"].config.block_out_channels) - 1)
        found.latent_shape = models["unet"].config.in_channels, side, side
    if trains is None:
        return found
    if trains == "pruned":
        found.more = {f"teacher's {name}": to(copy.deepcopy(model), dtype) for name, model in models.items()}
        found.teacher, found.trained = found.more["teacher's unet"], found.pipeline.pop("unet").requires_grad_(True)
    else:
        for name, model in models.items():
            wide = name == "vae" and "text_encoder_2" in models and dtype == torch.float16  # see keep_vae_right
            to(model, torch.float32 if wide else dtype)
    idle = idle_encoders(args, needs=[decodes(args)])
    found.pipeline = {name: model for name, model in found.pipeline.items() if name not in idle}
    if trains == "unet":
        found.teacher = models["unet"]
        if getattr(args, "lora_rank", None):
            found.trained = copy.deepcopy(found.teacher) if own_teacher else found.teacher
            if args.quantize_frozen:
                weights = [
                    found.teacher.get_submodule(name).weight for name in layers_to_quantize(found.teacher, args)
                ]
                found.rounded = sum(weight.numel() * (weight.itemsize - 1) for weight in weights)
            with torch.device("meta"):
                add_lora(found.trained, args)
        else:
            config = dict(models["unet"].config)
            if student:
                config = UNet2DConditionModel.load_config(student, subfolder="unet")
            elif variant:
                config = student_config(config, variant)
            if embedded and config.get("time_cond_proj_dim") is None:
                config["time_cond_proj_dim"] = GUIDANCE_WIDTH
            found.trained = empty_unet(config).eval().requires_grad_(True)
    if trains == "text_encoder":
        add_text_encoders(found, args, models)
    if getattr(args, "feature_weight", None) and trains in ("unet", "pruned"):
        read = read_manifest(student)["feature_pairs"] if student else None
        found.pairs = read or feature_pairs(found.trained, found.teacher, None, 0)
        found.trained = with_projections(found)
    if getattr(args, "loss", None) == "lpips":
        with torch.device("meta"):
            found.more["VGG-16"] = vgg16(weights=None).features.eval().requires_grad_(False)
    if getattr(args, "discriminator", None):
        add_discriminator(found, args, dtype)
    return found


def empty_models_of(args):
    return empty_models(args.pretrained_model_name_or_path, args.revision)


def decodes(args):
    """ "vae" where a step decodes latents, else None."""
    judged = getattr(args, "loss", None) == "lpips" or getattr(args, "discriminator", None) == "dinov2"
    return "vae" if judged else None


def to(module, dtype):
    """In place, without what diffusers says of it."""
    return torch.nn.Module.to(module, dtype)


def tokens_of(models):
    encoder = models.get("text_encoder")
    return getattr(encoder and encoder.config, "max_position_embeddings", None) or TOKENS


def with_projections(networks):
    """The Student of common/compression/distillation.py: with projections of the features that are of other widths."""
    (student, teacher), pairs = (networks.trained, networks.teacher), networks.pairs
    with (
        FeatureTap(student, [name for name, _ in pairs]) as tap,
        FeatureTap(teacher, [name for _, name in pairs]) as teacher_tap,
        torch.device("meta"),
        torch.no_grad(),
    ):
        for unet in (student, teacher):
            predict(unet, *noisy(networks, 1), conditioning_of(unet, 1, networks.tokens))
        return Student(student, build_projections(tap, teacher_tap, pairs, ""))


def add_text_encoders(networks, args, models):
    """What train_text_encoder_kd.py trains, and what it learns from."""
    encoder, sdxl = models[args.text_encoder], "text_encoder_2" in models
    config = copy.deepcopy(encoder.config)
    for size in ("num_hidden_layers", "intermediate_size", "hidden_size"):
        setattr(config, size, getattr(args, size))
    with torch.device("meta"):
        projection = None
        if config.hidden_size < encoder.config.hidden_size:
            projection = torch.nn.Linear(config.hidden_size, encoder.config.hidden_size)
        networks.trained = TextStates(type(encoder)(config), sdxl, projection)
    networks.teacher = TextStates(encoder, sdxl)
    networks.pipeline = {name: model for name, model in models.items() if name != args.text_encoder}


def add_discriminator(networks, args, dtype):
    """What train_add.py looks with, and its heads."""
    unet = networks.teacher
    config = unet.config
    width = config.encoder_hid_dim or config.cross_attention_dim
    if config.addition_embed_type:
        width = conditioning_of(unet, 1, networks.tokens).pooled_prompt_embeds.shape[1]
    with torch.device("meta"):
        if args.discriminator == "unet":
            networks.heads = Heads(UNetFeatures(unet).channels, width)
        else:
            dino = Dinov2Model(AutoConfig.from_pretrained(args.feature_model_name_or_path))
            networks.more["dinov2"] = to(dino.eval().requires_grad_(False), dtype)
            networks.heads = Heads([dino.config.hidden_size] * 4, width + dino.config.hidden_size)


# A step


def memory_of(args, networks, kind, dtype, processes=1, rows=2, needs_images=True, sharding=DDP):
    """The Estimate of a training step of these networks, of one process.

    kind: of device, "cpu" or "cuda"; rows: of the teacher's batch, for each sample; needs_images: whether the VAE
    encodes any; sharding: of what is trained, among the processes.
    """
    student, mode = networks.trained, AsOnDevice(kind, dtype)
    cut = [p for p in student.parameters() if p.requires_grad]
    parameters = [*cut, *(networks.heads.parameters() if networks.heads is not None else ())]
    if args.gradient_checkpointing:
        again = {"use_reentrant": False, "context_fn": mode.contexts}
        if isinstance(student, TextStates):
            student.encoder.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
        else:
            unet = student.unet if isinstance(student, Student) else student
            unet.enable_gradient_checkpointing(partial(checkpoint, **again))
    trained, fsdp2 = bytes_of(student, True), sharding.engine == "fsdp2"
    # DDP's buckets, shards and gradients of earlier micro-batches are there before a backward begins; else gradients
    # come as activations go.
    sends = processes > 1 or args.gradient_accumulation_steps > 1 or sharding.engine != "ddp"
    with in_dtype(cut if fsdp2 else (), dtype), LiveBytes(parameters, sends) as live, mode:
        step = text_step if isinstance(student, TextStates) else unet_step
        without_gradients = step(args, networks, mode, live, rows, needs_images)
    frozen = sum(bytes_of(module) for module in networks.held().values()) - bytes_of(student, trained=True)
    frozen -= networks.rounded
    if kind == "cuda" and getattr(args, "teacher_cpu_offload", False):
        frozen -= bytes_of(networks.teacher)
    heads = 0 if networks.heads is None else bytes_of(networks.heads)
    gathered = 0, 0
    if fsdp2:
        root, largest, whole = sharding.gathered(student)
        # The target's root stays too. Gradients of a block are in the compute dtype, and are sent in fp32; those of
        # micro-batches before the last one are kept whole, and not sent.
        weights, gradients = whole + networks.target * root, largest * (dtype.itemsize + torch.float32.itemsize)
        gathered = weights * dtype.itemsize, gradients + (args.gradient_accumulation_steps > 1) * trained
    found = args, live, without_gradients, frozen, trained, heads, networks.target
    return estimate(*found, kind, processes, sharding, gathered)


@contextlib.contextmanager
def in_dtype(parameters, dtype):
    """Within it fp32 parameters are in a dtype: FSDP2 gathers them in the compute dtype, so that nothing is cast."""
    try:
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter in parameters:
            parameter.data = parameter.data.float()


def blank(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device="meta")


def noisy(networks, count):
    """(latents (count, C, H, W) fp32, timesteps (count,))."""
    return blank(count, *networks.latent_shape), blank(count, dtype=torch.long)


def conditioning_of(unet, count, tokens):
    """The Conditioning of so many captions, in the UNet's dtype."""
    config, dtype = unet.config, unet.conv_in.weight.dtype
    embeds = blank(count, tokens, config.encoder_hid_dim or config.cross_attention_dim, dtype=dtype)
    if config.addition_embed_type != "text_time":
        return Conditioning(embeds)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return Conditioning(embeds, blank(count, pooled, dtype=dtype), blank(count, 6, dtype=dtype))


@torch.no_grad()
def encode(args, networks, needs_images):
    """Latents and conditioning of a batch, by what encodes them where that is in memory."""
    pipeline, count = networks.pipeline, args.train_batch_size
    for name in ("text_encoder", "text_encoder_2"):
        if name in pipeline:
            pipeline[name](blank(count, networks.tokens, dtype=torch.long), output_hidden_states=True)
    z, timesteps = noisy(networks, count)
    if needs_images and "vae" in pipeline:
        z = encode_images(pipeline["vae"], blank(count, 3, args.resolution, args.resolution))
    return z, timesteps, conditioning_of(networks.teacher, count, networks.tokens)


def unet_step(args, networks, mode, live, rows, needs_images):
    """The step of a script that trains a UNet; returns the peak of what it does without gradients."""
    student, teacher, pairs = networks.trained, networks.teacher, networks.pairs
    plain = student.unet if isinstance(student, Student) else student
    teacher_tap = FeatureTap(teacher, [name for _, name in pairs])
    z, timesteps, conditioning = encode(args, networks, needs_images)
    time_cond = plain.config.time_cond_proj_dim
    time_cond = blank(len(z), time_cond) if time_cond else None
    own = conditioning.to(networks.dtype)

    def teach():
        empty, asks = conditioning_of(teacher, 1, networks.tokens), teacher.config.time_cond_proj_dim
        with torch.no_grad(), without_adapters(teacher), mode.autocasting():
            if asks or rows == 1:
                return predict(teacher, z, timesteps, conditioning, time_cond if asks else None)
            return predict_guided(teacher, z, timesteps, conditioning, empty, 2.0)

    adversarial = networks.heads is not None
    target = None if adversarial else teach()
    if networks.target:
        with torch.no_grad(), mode.autocasting():
            target = predict(plain, z, timesteps, own, time_cond)
    without_gradients = live.peak
    tap = FeatureTap(plain, [name for name, _ in pairs])
    with mode.autocasting():
        output = predict(student, z, timesteps, own, time_cond)
    if adversarial:  # whose teacher looks at what the student made
        before, live.peak = live.now, live.now
        target = teach()
        without_gradients = max(without_gradients, live.peak - before)
        adversarial_step(args, networks, mode, z, output, target, timesteps, conditioning)
        return without_gradients
    if isinstance(student, Student):
        compared = zip(student.features(tap, [name for name, _ in pairs]), teacher_tap.features.values())
        loss, _ = kd_loss(output, target, z, list(compared), blank(len(z)), 1.0, 1.0, 1.0)
    else:
        loss = (output - target).square().mean()
    if "VGG-16" in networks.more:
        loss = loss + lpips_like(networks, output, target)
    torch.autograd.backward(loss)
    tap.close(), teacher_tap.close()
    return without_gradients


def lpips_like(networks, output, target):
    """What metrics.decoded_lpips computes, on crops of latents."""
    crops = [x[..., :LPIPS_CROP, :LPIPS_CROP] for x in (output, target)]
    with torch.no_grad():
        other = decode_latents(networks.pipeline["vae"], crops[1])
    features = [networks.more["VGG-16"](x) for x in (decode_latents(networks.pipeline["vae"], crops[0]), other)]
    return (features[0] - features[1]).square().mean()


def look(args, networks, mode, x, timesteps, conditioning):
    """Features of clean latents, by what the discriminator looks with."""
    if args.discriminator == "unet":
        with mode.autocasting():
            return UNetFeatures(networks.teacher)(x, timesteps, conditioning)
    model, size = networks.more["dinov2"], (args.feature_resolution, args.feature_resolution)
    pixels = decode_latents(networks.pipeline["vae"], x)
    pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    with mode.autocasting():
        tokens = model(pixels.to(model.dtype)).last_hidden_state[:, 1:].float()
    return [tokens.transpose(1, 2).unflatten(2, (size[0] // model.config.patch_size, -1))] * len(networks.heads.heads)


def adversarial_step(args, networks, mode, latents, output, target, timesteps, conditioning):
    """Both backwards of train_add.py, of the student and of the heads."""
    condition = blank(len(latents), networks.heads.heads[0].project.in_features)

    def heads(features, condition):
        return [head(x, condition) for head, x in zip(networks.heads.heads, features)]

    with torch.no_grad():
        real = look(args, networks, mode, latents, timesteps, conditioning)
    fake = look(args, networks, mode, output, timesteps, conditioning)
    networks.heads.requires_grad_(False)
    loss = (output - target).square().mean() - torch.stack([x.mean() for x in heads(fake, condition)]).mean()
    torch.autograd.backward(loss)
    networks.heads.requires_grad_(True)
    scores = judge(heads, real, [x.detach() for x in fake], condition, "autograd" if args.r1_gamma else None)
    torch.autograd.backward(torch.stack([x.mean() for x in (*scores[0], *scores[1])]).mean() + scores[3])


def text_step(args, networks, mode, live, rows, needs_images):
    """The step of train_text_encoder_kd.py; returns the peak of what it does without gradients."""
    unet, count = networks.pipeline.get("unet"), args.train_batch_size
    ids = blank(count, networks.tokens, dtype=torch.long)
    with torch.no_grad(), mode.autocasting():
        hidden, pooled = networks.teacher(ids)
        if args.through_unet:
            z, timesteps = noisy(networks, count)
            conditioning = conditioning_of(unet, count, networks.tokens)
            target = predict(unet, z, timesteps, conditioning)
    without_gradients = live.peak
    with mode.autocasting():
        own, own_pooled = networks.trained(ids)
        loss = (own.float() - hidden).square().mean() + (own_pooled.float() - pooled).square().mean()
        if args.through_unet:
            given = with_student(conditioning, own, own_pooled, args.text_encoder)
            loss = loss + (predict(unet, z, timesteps, given) - target).square().mean()
    torch.autograd.backward(loss)
    return without_gradients
