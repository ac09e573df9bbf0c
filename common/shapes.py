"""Shapes: text-to-image in miniature, rendered from (seed, index).

A scene is one or two objects (shape, colour, size) on a background; two objects stand one above or left of the
other. A scene has exactly one caption and a caption exactly one scene, so that a generated image can be judged
attribute by attribute. 2,000 captions are held out by their text: no training index ever draws them. 500 of them are
for choosing (a checkpoint, a flag), the other 1,500 for judging what was chosen.
"""

import functools
import hashlib
import re

import numpy as np

from common.errors import UsageError

IMAGE_SIZE = 32

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 40),
    "purple": (130, 50, 170),
    "orange": (245, 130, 30),
    "cyan": (50, 200, 220),
    "pink": (245, 130, 190),
}
SIZES = {"small": (3.8, 4.6), "large": (6.6, 7.5)}  # radius in pixels: uniform between the two
BACKGROUNDS = {"white": (250, 250, 250), "gray": (128, 128, 128), "black": (15, 15, 15), "brown": (100, 65, 35)}
RELATIONS = ("alone", "above", "left of")

# A scene is a tuple of class indices in this order; for "alone" the second object is (0, 0, 0) and not judged.
ATTRIBUTES = {
    "background": len(BACKGROUNDS),
    "relation": len(RELATIONS),
    "shape": len(SHAPES),
    "color": len(COLORS),
    "size": len(SIZES),
    "shape2": len(SHAPES),
    "color2": len(COLORS),
    "size2": len(SIZES),
}
SECOND_OBJECT = slice(5, 8)

HELD_OUT_ALONE, HELD_OUT_PAIRS = 100, 1900
SPLITS = ("choose", "judge", "all")
CHOOSING = 4  # every so manieth held-out scene, of those with one object and of those with two, is of "choose"
ALONE_SHARE = 0.15  # of the training scenes

_OBJECT = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{_OBJECT}(?: (above|left of) {_OBJECT})? on a ({'|'.join(BACKGROUNDS)}) background")


def caption_of(scene):
    """The caption of a scene (a tuple in ATTRIBUTES order)."""
    background, relation, shape, color, size, shape2, color2, size2 = scene
    sizes, colors, backgrounds = list(SIZES), list(COLORS), list(BACKGROUNDS)
    text = f"a {sizes[size]} {colors[color]} {SHAPES[shape]}"
    if relation:
        text += f" {RELATIONS[relation]} a {sizes[size2]} {colors[color2]} {SHAPES[shape2]}"
    return f"{text} on a {backgrounds[background]} background"


def scene_of(caption):
    """The scene of a caption, or None where the text is not a shapes caption."""
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        return None
    size, color, shape, relation, size2, color2, shape2, background = match.groups()
    sizes, colors, backgrounds = list(SIZES), list(COLORS), list(BACKGROUNDS)
    second = (SHAPES.index(shape2), colors.index(color2), sizes.index(size2)) if relation else (0, 0, 0)
    first = (SHAPES.index(shape), colors.index(color), sizes.index(size))
    return (backgrounds.index(background), RELATIONS.index(relation or "alone"), *first, *second)


def _ranked(scenes):
    return sorted(scenes, key=lambda scene: hashlib.sha256(caption_of(scene).encode()).digest())


@functools.cache
def held_out_scenes():
    """The 2,000 held-out scenes (100 with one object, 1,900 with two), in a fixed shuffled order."""
    objects = [(s, c, z) for s in range(len(SHAPES)) for c in range(len(COLORS)) for z in range(len(SIZES))]
    backgrounds = range(len(BACKGROUNDS))
    alone = [(b, 0, *first, 0, 0, 0) for b in backgrounds for first in objects]
    pairs = [(b, r, *first, *second) for b in backgrounds for r in (1, 2) for first in objects for second in objects]
    return tuple(_ranked(_ranked(alone)[:HELD_OUT_ALONE] + _ranked(pairs)[:HELD_OUT_PAIRS]))


@functools.cache
def _held_out_set():
    return frozenset(held_out_scenes())


@functools.cache
def held_out_indices(split="all"):
    """Indices of the held-out scenes of a split, in order: a tuple.

    "choose" (25 with one object, 475 with two) is for whatever is chosen by its figures, "judge" (75 and 1,425) for
    the figures of what was chosen; "all" is both. Which scene is of which does not depend on how many are asked for.
    """
    alone, pairs = [], []
    for index, scene in enumerate(held_out_scenes()):
        (pairs if scene[1] else alone).append(index)
    choose = {*alone[::CHOOSING], *pairs[::CHOOSING]}
    indices = range(len(held_out_scenes()))
    return tuple(index for index in indices if split == "all" or (index in choose) == (split == "choose"))


def held_out_captions(count=None, split="all"):
    """The first `count` (default: all) held-out captions of a split."""
    return [caption_of(held_out_scenes()[index]) for index in held_out_indices(split)[:count]]


def check_count(flag, count, split):
    """UsageError, naming the flag, where a split has fewer held-out captions than `count`."""
    there = len(held_out_indices(split))
    if count > there:
        raise UsageError(f"{flag} {count}: there are {there} held-out captions in the split {split!r}.")


def random_scene(rng):
    """A uniformly drawn scene from a numpy Generator, held out or not."""
    first, second = ([int(rng.integers(n)) for n in (len(SHAPES), len(COLORS), len(SIZES))] for _ in range(2))
    alone = rng.random() < ALONE_SHARE
    relation = 0 if alone else int(rng.integers(1, len(RELATIONS)))
    return (int(rng.integers(len(BACKGROUNDS))), relation, *first, *((0, 0, 0) if alone else second))


def training_scene(seed, index):
    """The scene of training sample `index` and the generator that places it: never a held-out one."""
    rng = np.random.default_rng([seed, index])
    scene = random_scene(rng)
    while scene in _held_out_set():
        scene = random_scene(rng)
    return scene, rng


def hard_negatives(scene, rng, count):
    """`count` captions that differ from the scene's in ONE attribute, or have colours or objects swapped."""
    background, relation, *objects = scene
    first, second = tuple(objects[:3]), tuple(objects[3:])
    changes = []
    for position, classes in enumerate(ATTRIBUTES.values()):
        if position == 1:
            values = [3 - relation] if relation else []
        elif position >= SECOND_OBJECT.start and not relation:
            values = []
        else:
            values = [value for value in range(classes) if value != scene[position]]
        changes.append([scene[:position] + (value,) + scene[position + 1 :] for value in values])
    if relation:
        swapped_colors = (first[0], second[1], first[2], second[0], first[1], second[2])
        changes.append([(background, relation, *swapped_colors)])
        changes.append([(background, relation, *second, *first)])
    changes = [[other for other in kind if other != scene] for kind in changes]
    changes = [kind for kind in changes if kind]
    available = {other for kind in changes for other in kind}
    chosen = []
    # A kind of change first, then one of its values: colours have seven other values, a swap has one.
    while len(chosen) < min(count, len(available)):
        kind = changes[rng.integers(len(changes))]
        other = kind[rng.integers(len(kind))]
        if other not in chosen:
            chosen.append(other)
    return [caption_of(other) for other in chosen]


def _place(scene, rng):
    """Centre and radius of each object, in pixels, from the scene and a numpy Generator."""
    relation, half, ranges = scene[1], IMAGE_SIZE / 2, list(SIZES.values())
    sizes = (scene[4], scene[7]) if relation else (scene[4],)
    placed = []
    for position, size in enumerate(sizes):
        radius = rng.uniform(*ranges[size])
        if not relation:
            x, y = half + rng.uniform(-5, 5, size=2)
        else:
            # Along the relation's axis an object stays in its own half; across it, it stays near the middle.
            along = rng.uniform(radius + 0.5, max(half - 0.5 - radius, radius + 0.5)) + half * position
            across = half + rng.uniform(-3, 3)
            x, y = (across, along) if relation == 1 else (along, across)
        edge = radius + 0.5
        placed.append((np.clip(x, edge, IMAGE_SIZE - edge), np.clip(y, edge, IMAGE_SIZE - edge), radius))
    return placed


def _signed_distance(shape, x, y, radius):
    """Signed distance in pixels (negative inside) of coordinates relative to the centre; y points down."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(ax, ay) - 0.86 * radius
    if shape == "triangle":
        return np.maximum(y - 0.75 * radius, 0.894 * ax - 0.447 * (y + radius))
    if shape == "cross":
        arm, length = 0.32 * radius, radius
        return np.minimum(np.maximum(ax - arm, ay - length), np.maximum(ax - length, ay - arm))
    if shape == "diamond":
        return (ax + ay - radius) / np.sqrt(2)
    return np.abs(np.hypot(x, y) - 0.74 * radius) - 0.26 * radius  # ring


def render(scene, rng):
    """Draw a scene, placed by the numpy Generator. Returns uint8 (32, 32, 3), antialiased."""
    centers = np.arange(IMAGE_SIZE) + 0.5
    image = np.broadcast_to(np.array(list(BACKGROUNDS.values())[scene[0]], float), (IMAGE_SIZE, IMAGE_SIZE, 3))
    colors = list(COLORS.values())
    for (cx, cy, radius), shape, color in zip(_place(scene, rng), (scene[2], scene[5]), (scene[3], scene[6])):
        distance = _signed_distance(SHAPES[shape], centers[None, :] - cx, centers[:, None] - cy, radius)
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        image = image * (1 - cover) + np.array(colors[color], float) * cover
    return np.round(image).astype(np.uint8)


def training_sample(seed, index):
    """Training sample `index`: (uint8 image (32, 32, 3), scene)."""
    scene, rng = training_scene(seed, index)
    return render(scene, rng), scene


def reference_sample(index):
    """Held-out scene `index` in the fixed set of real images that Fréchet distances are taken to: as held_out_sample.

    Rendered with another seed than held_out_sample's own, so that the two sets can be compared with each other.
    """
    return held_out_sample(index, seed=1)


def held_out_sample(index, seed=0):
    """The render of held-out scene `index` (0 to 1,999): (uint8 image (32, 32, 3), scene)."""
    scene = held_out_scenes()[index]
    return render(scene, np.random.default_rng([seed, index])), scene
