"""Judges of generated images: the scene reader of the embedded shapes."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.shapes import ATTRIBUTES, SECOND_OBJECT


class SceneReader(nn.Module):
    """Reads every attribute of a rendered scene. Pixels (B, 3, 32, 32) in [-1, 1] to logits per attribute."""

    def __init__(self, width=32):
        super().__init__()
        self.config = {"width": width}
        layers, channels = [], 3
        for out, stride in ((width, 1), (2 * width, 2), (3 * width, 2), (3 * width, 1), (3 * width, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1), nn.GroupNorm(8, out), nn.SiLU()]
            channels = out
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, 256), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, classes) for name, classes in ATTRIBUTES.items()})

    def forward(self, pixel_values):
        features = self.features(pixel_values)
        return {name: head(features) for name, head in self.heads.items()}

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps(self.config) + "\n")
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, Path(folder) / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder):
        reader = cls(**json.loads((Path(folder) / "config.json").read_text()))
        reader.load_state_dict({k: v.float() for k, v in load_file(Path(folder) / "model.safetensors").items()})
        return reader.eval().requires_grad_(False)


def scenes_right(logits, scenes):
    """Whether every attribute that a scene has was read right: bool (B,). `scenes`: long (B, 8)."""
    right = torch.stack([logits[name].argmax(-1) == scenes[:, i] for i, name in enumerate(ATTRIBUTES)], dim=1)
    right[:, SECOND_OBJECT] |= (scenes[:, 1] == 0)[:, None]
    return right.all(dim=1)
