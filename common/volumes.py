"""Volumes: density and colour on grids, rendered differentiably (NeRF, arXiv:2003.08934), their cameras and files.

A volume fills the cube [-1, 1]^3, y up; a camera looks at the origin from a sphere around it, azimuth 0 being the
front (+z). Colours and pixels are in [-1, 1], as images are elsewhere; angles are in degrees.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

RADIUS, FIELD_OF_VIEW = 3.0, 40.0  # of the camera: what is within 1 of the origin is in the picture
BLOB = 10.0  # DreamFusion's density bias at the origin; it falls to 0 at half the way out
VIEWS = ("front view", "side view", "back view", "overhead view")


def camera_rays(azimuths, elevations, size):
    """(origins (B, 3), directions (B, size, size, 3)) of square pictures, row by row from the top; directions have
    length 1.

    azimuths, elevations: (B,) degrees; azimuth 90 looks from +x, elevation 90 from above.
    """
    azimuths, elevations = torch.deg2rad(azimuths), torch.deg2rad(elevations.clamp(-89, 89))
    flat = elevations.cos()
    back = torch.stack([flat * azimuths.sin(), elevations.sin(), flat * azimuths.cos()], dim=1)  # origin to camera
    right = torch.stack([azimuths.cos(), torch.zeros_like(azimuths), -azimuths.sin()], dim=1)
    up = torch.linalg.cross(back, right)
    reach = float(np.tan(np.deg2rad(FIELD_OF_VIEW / 2)))
    steps = ((torch.arange(size, device=azimuths.device) + 0.5) / size * 2 - 1) * reach
    across, along = right[:, None, None] * steps[:, None], up[:, None, None] * -steps[:, None, None]
    return RADIUS * back, F.normalize(across + along - back[:, None, None], dim=-1)


def compositing_weights(densities, spacing):
    """T_i (1 - exp(-sigma_i delta)), T_i = exp(-sum_{j < i} sigma_j delta): the share of each sample in its ray's
    colour (NeRF, eq. 3).

    densities: sigma >= 0 (..., S), nearest first; spacing: delta. The shares of a ray sum to 1 at most; the rest is
    the background's.
    """
    passed = torch.exp(-spacing * densities.cumsum(dim=-1))
    before = torch.cat([torch.ones_like(passed[..., :1]), passed[..., :-1]], dim=-1)
    return before - passed


class Volumes(nn.Module):
    """N volumes, (N, 1 + 3, D, D, D) before their activations, each with a background colour (N, 3) of its own.

    noise: (N, 4, D, D, D), what the grids start as, around a blob at the origin. learns_background: whether the
    background is trained, from gray; else `forward` is told it.
    """

    def __init__(self, noise, num_samples=64, learns_background=True):
        super().__init__()
        self.grid, self.num_samples = nn.Parameter(noise.clone()), num_samples
        self.background = nn.Parameter(noise.new_zeros(len(noise), 3)) if learns_background else None

    def field(self, indices, points):
        """(sigma (B, P), colour (B, P, 3)) of volumes indices (B,) at points (B, P, 3); nothing is outside of the
        unit sphere."""
        found = F.grid_sample(self.grid[indices], points[:, None, None], align_corners=True)[:, :, 0, 0]
        distance = points.norm(dim=-1)
        density = F.softplus(found[:, 0] + BLOB * (1 - 2 * distance)) * (distance < 1)
        return density, torch.tanh(found[:, 1:]).movedim(1, -1)

    def forward(self, indices, azimuths, elevations, size, background=None):
        """(pixels (B, 3, size, size), opacity (B, size, size)) of volumes indices (B,), seen by B cameras.

        background: (B, 3) in [-1, 1], where none is learned.
        """
        origins, directions = camera_rays(azimuths, elevations, size)
        spacing = 2 / self.num_samples
        depths = RADIUS - 1 + spacing * (torch.arange(self.num_samples, device=origins.device) + 0.5)
        points = origins[:, None, None, None] + directions[..., None, :] * depths[:, None]
        density, color = self.field(indices, points.flatten(1, 3))
        weights = compositing_weights(density.view(points.shape[:-1]), spacing)
        opacity = weights.sum(dim=-1)
        if self.background is not None:
            background = torch.tanh(5 * self.background[indices])
        pixels = (weights[..., None] * color.view(points.shape)).sum(dim=-2)
        pixels = pixels + (1 - opacity)[..., None] * background[:, None, None]
        return pixels.movedim(-1, 1), opacity


def view_of(azimuths, elevations):
    """Which of VIEWS a camera sees, long (B,): overhead from 60 degrees on, front and back within 60 of the middle."""
    turned = (azimuths + 180) % 360 - 180
    view = torch.where(turned.abs() <= 60, 0, torch.where(turned.abs() >= 120, 2, 1))
    return torch.where(elevations >= 60, 3, view)


@torch.no_grad()
def dense_points(volumes, index, size=64):
    """(places (M, 3), colours uint8 (M, 3)) of one volume: the points of a size^3 grid that are dense, which is a
    density that hides half of what is behind a quarter's way.
    """
    line = torch.linspace(-1, 1, size, device=volumes.grid.device)
    points = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), dim=-1).view(1, -1, 3)
    density, color = volumes.field(torch.tensor([index], device=line.device), points)
    kept = torch.exp(-density[0] / 4) <= 0.5
    return points[0, kept].cpu(), ((color[0, kept].cpu() + 1) * 127.5).round().to(torch.uint8)


def write_ply(path, places, colors):
    """A point cloud, float (M, 3) and uint8 (M, 3), as a binary PLY that MeshLab, Blender and CloudCompare open."""
    kinds = [(name, "<f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")]
    vertices = np.empty(len(places), dtype=kinds)
    for column, name in enumerate("xyz"):
        vertices[name] = places[:, column].numpy()
    for column, name in enumerate(("red", "green", "blue")):
        vertices[name] = colors[:, column].numpy()
    properties = [f"property {'float' if name in 'xyz' else 'uchar'} {name}" for name, _ in kinds]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}", *properties, "end_header"]
    with open(path, "wb") as file:
        file.write(("\n".join(header) + "\n").encode())
        file.write(vertices.tobytes())
