"""Smaller CLIP text encoders: what of a teacher a student keeps, what it says, and how a pipeline takes it in."""

import contextlib
import copy

import torch

from common.conditioning import Conditioning

# What is kept


def kept_layers(teacher_layers, layers, penultimate=False):
    """Which of the teacher's layers the student copies: evenly spaced, the first and the last among them.

    A single layer is the first: it is the one that reads embeddings. With `penultimate` (SDXL, whose UNet gets the
    states before the last layer) the last layer is kept and the rule holds for those before it.
    """
    if penultimate:
        return [*kept_layers(teacher_layers - 1, layers - 1), teacher_layers - 1]
    return [round(i * (teacher_layers - 1) / max(layers - 1, 1)) for i in range(layers)]


def most_important(importance, count):
    """The indices of the `count` largest along the last dimension, in ascending order."""
    return importance.topk(count, dim=-1).indices.sort(dim=-1).values


@torch.no_grad()
def shrink_text_encoder(teacher, num_hidden_layers, intermediate_size, hidden_size, penultimate=False):
    """A smaller copy of a CLIP text encoder, in fp32.

    Layers by kept_layers. What is narrower keeps what has the largest sum of absolute weights in and out: MLP neurons
    per layer; channels of the hidden size one and the same everywhere; within each head (as many as before) the
    dimensions of queries and keys together, and of values and outputs together. Nothing removed is an exact copy.
    """
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers, config.intermediate_size = num_hidden_layers, intermediate_size
    config.hidden_size, config.attention_dropout = hidden_size, 0.0  # drop-out would be unseeded randomness
    student = type(teacher)(config).float()
    old, new = (getattr(model, "text_model", model) for model in (teacher, student))  # SDXL's second is wrapped
    layers = [old.encoder.layers[i] for i in kept_layers(len(old.encoder.layers), num_hidden_layers, penultimate)]
    heads = config.num_attention_heads

    importance = old.embeddings.token_embedding.weight.abs().float().mean(0)
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        importance += sum(x.weight.abs().float().sum(1) for x in (attention.out_proj, mlp.fc2))
        readers = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc1)
        importance += sum(x.weight.abs().float().sum(0) for x in readers)
    channels = most_important(importance, hidden_size)

    def inside_heads(importance):
        """Rows kept of a projection (hidden_size,): so many of each head."""
        dimensions = most_important(importance.view(heads, -1), hidden_size // heads)
        return (dimensions + torch.arange(heads)[:, None] * (importance.numel() // heads)).flatten()

    def copy_linear(target, source, rows, columns, scale=1.0):
        target.weight.copy_(source.weight[rows][:, columns] * scale)
        if source.bias is not None:
            target.bias.copy_(source.bias[rows] * scale)

    def copy_norm(target, source):
        target.weight.copy_(source.weight[channels])
        target.bias.copy_(source.bias[channels])

    for name in ("token_embedding", "position_embedding"):
        getattr(new.embeddings, name).weight.copy_(getattr(old.embeddings, name).weight[:, channels])
    copy_norm(new.final_layer_norm, old.final_layer_norm)
    for source, target in zip(layers, new.encoder.layers):
        copy_norm(target.layer_norm1, source.layer_norm1)
        copy_norm(target.layer_norm2, source.layer_norm2)
        neurons = most_important(
            source.mlp.fc1.weight.abs().sum(1) + source.mlp.fc2.weight.abs().sum(0), intermediate_size
        )
        copy_linear(target.mlp.fc1, source.mlp.fc1, neurons, channels)
        copy_linear(target.mlp.fc2, source.mlp.fc2, channels, neurons)
        a, b = source.self_attn, target.self_attn
        matched = inside_heads(a.q_proj.weight.abs().sum(1) + a.k_proj.weight.abs().sum(1))
        carried = inside_heads(a.v_proj.weight.abs().sum(1) + a.out_proj.weight.abs().sum(0))
        # Attention divides by the root of the head's size: the kept products count as much as they did.
        copy_linear(b.q_proj, a.q_proj, matched, channels, scale=(hidden_size / teacher.config.hidden_size) ** 0.5)
        copy_linear(b.k_proj, a.k_proj, matched, channels)
        copy_linear(b.v_proj, a.v_proj, carried, channels)
        copy_linear(b.out_proj, a.out_proj, channels, carried)
    if hasattr(teacher, "text_projection"):
        student.text_projection.weight.copy_(teacher.text_projection.weight[:, channels])
    return student


@torch.no_grad()
def fit_projection(hidden, teacher_hidden, ridge=1e-3):
    """The Linear d -> D that maps hidden states (..., d) to the teacher's (..., D) with the least squared error.

    `ridge`, relative to the mean variance of the states, keeps its weights small where their channels depend on each
    other, as after a norm, whose channels sum to a constant.
    """
    x, y = (states.double().flatten(0, -2).cpu() for states in (hidden, teacher_hidden))
    x_mean, y_mean = x.mean(0), y.mean(0)
    covariance = (x - x_mean).T @ (x - x_mean)
    penalty = ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    weight = torch.linalg.solve(covariance + penalty, (x - x_mean).T @ (y - y_mean)).T
    projection = torch.nn.Linear(x.shape[1], y.shape[1])
    projection.weight.copy_(weight)
    projection.bias.copy_(y_mean - weight @ x_mean)
    return projection


# What is said


class TextStates(torch.nn.Module):
    """input_ids (B, L) -> hidden states (B, L, D) as the UNet's cross-attention gets them, pooled output (B, P).

    With `penultimate` (SDXL) the states before the last layer, as its pipeline takes them.
    """

    def __init__(self, encoder, penultimate=False, projection=None):
        super().__init__()
        self.encoder, self.penultimate, self.projection = encoder, penultimate, projection

    def forward(self, input_ids):
        output = self.encoder(input_ids, output_hidden_states=self.penultimate)
        hidden = output.hidden_states[-2] if self.penultimate else output.last_hidden_state
        pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
        if self.projection is not None:  # an SD pipeline's pooled output is the states at the end of the text
            hidden, pooled = self.projection(hidden), self.projection(pooled)
        return hidden, pooled

    def enable_gradient_checkpointing(self):
        self.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def count(self):
        """Parameters, the projection's included."""
        return sum(p.numel() for p in self.parameters())


def tokenize(tokenizer, captions):
    """Token ids (B, L), padded and truncated to the model's length as stock pipelines do."""
    return tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def with_student(conditioning, hidden, pooled, name):
    """The teacher's Conditioning with the states of encoder `name` replaced by the student's."""
    embeds, width = conditioning.prompt_embeds, hidden.shape[-1]
    hidden = hidden.to(embeds.dtype)
    if conditioning.pooled_prompt_embeds is None:
        return Conditioning(hidden)
    if name == "text_encoder":  # the first half of SDXL's states; its pooled output is the second encoder's
        embeds = torch.cat([hidden, embeds[..., width:]], dim=-1)
        return Conditioning(embeds, conditioning.pooled_prompt_embeds, conditioning.time_ids)
    embeds = torch.cat([embeds[..., :-width], hidden], dim=-1)
    return Conditioning(embeds, pooled.to(embeds.dtype), conditioning.time_ids)


# In a pipeline


def set_projection(unet, projection):
    """Make a projection of text states the UNet's own, as stock diffusers saves and applies it; None takes it out."""
    unet.encoder_hid_proj = projection
    size, kind = (None, None) if projection is None else (projection.in_features, "text_proj")
    unet.register_to_config(encoder_hid_dim=size, encoder_hid_dim_type=kind)
    return unet


@contextlib.contextmanager
def student_in_place(pipeline, name, student):
    """Within the context `pipeline` is the student's: its encoder `name`, and where it is narrower its projection."""
    teacher = getattr(pipeline, name)
    setattr(pipeline, name, student.encoder)
    if student.projection is not None:
        set_projection(pipeline.unet, student.projection)
    try:
        yield
    finally:
        setattr(pipeline, name, teacher)
        if student.projection is not None:
            set_projection(pipeline.unet, None)
