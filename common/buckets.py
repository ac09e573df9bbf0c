"""Aspect-ratio buckets: images of all shapes, cut to the nearest of some shapes of about as many pixels.

A global batch has one shape. Which one, and which samples, follows from (seed, step, position) alone: each bucket's
samples come in permutations, one after the other, and epoch e has floor((e + 1) n / B) - floor(e n / B) batches of a
bucket of n samples, in an order of the seed's. So no sample is left out or comes twice in a permutation, and a bucket
smaller than a batch gets one every few epochs.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from tqdm.auto import tqdm

from common.images import IMAGE_FORMATS, ORIENTATION
from common.randomness import sample_generator

MAX_ASPECT = 2.0  # of a bucket: longer images are cut to it
FACTOR = 8  # of the VAEs
LARGEST_STEP = 64  # pixels between two sides: what a UNet halves three times after a VAE of factor 8


def bucket_shapes(resolution):
    """[(height, width), ...] of at most resolution^2 pixels, sides multiples of up to 64 pixels; the square first."""
    step = max(FACTOR, min(LARGEST_STEP, resolution // 8) // FACTOR * FACTOR)
    shapes = {(resolution, resolution)}
    for height in range(step, int(resolution * MAX_ASPECT) + 1, step):
        width = resolution**2 // height // step * step
        if width and max(height / width, width / height) <= MAX_ASPECT:
            shapes |= {(height, width), (width, height)}
    return sorted(shapes, key=lambda shape: (shape != (resolution, resolution), shape))


def nearest(shapes, size):
    """The number of the shape, (height, width), whose aspect is nearest to that of an image, size (width, height)."""
    aspect = torch.tensor(size[1] / size[0]).log()
    return int((torch.tensor([height / width for height, width in shapes]).log() - aspect).abs().argmin())


def assign(dataset, shapes, threads=8):
    """The number of its shape of every sample, from the head of its file; of what can't be read, the square's."""

    def of(index):
        try:
            with Image.open(dataset.image_file(index), formats=IMAGE_FORMATS) as image:
                turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
                return nearest(shapes, image.size[::-1] if turned else image.size)
        except Exception:  # what is wrong with it is said when it is read
            return 0

    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(of, range(len(dataset)))
        return list(tqdm(found, desc="image sizes", total=len(dataset), disable=len(dataset) < 1000))


def to_shape(image, shape, crop_x, crop_y):
    """(PIL image of this shape, (height, width), time_ids (6,)): the largest part of an image that has it, resized.

    It is cut out at (crop_x, crop_y), fractions of the room there is. time_ids: SDXL's, as of data.square_time_ids.
    """
    height, width = shape
    scale = min(image.width / width, image.height / height)
    left, top = crop_x * (image.width - width * scale), crop_y * (image.height - height * scale)
    box = left, top, min(left + width * scale, image.width), min(top + height * scale, image.height)
    cut = image.resize((width, height), Image.Resampling.LANCZOS, box)
    ids = [image.height, image.width, round(top / scale), round(left / scale), height, width]
    return cut, torch.tensor(ids, dtype=torch.float32)


def bucket_order(seed, numbers, global_batch):
    """index_of(count), as data.order_of: of step count // B and position count % B, in buckets of one shape a step.

    numbers: of each sample, which bucket it is in.
    """
    members = {number: [i for i, n in enumerate(numbers) if n == number] for number in sorted(set(numbers))}

    def batches_before(epoch):
        return {number: epoch * len(of) // global_batch for number, of in members.items()}

    @functools.lru_cache(maxsize=2)
    def plan(epoch):
        """[(bucket, which of its batches), ...] of an epoch."""
        before, after = batches_before(epoch), batches_before(epoch + 1)
        turns = [number for number in members for _ in range(before[number], after[number])]
        order = torch.randperm(len(turns), generator=sample_generator(seed, epoch, 0, stream="buckets"))
        batches = {number: iter(range(before[number], after[number])) for number in members}
        return [(turns[place], next(batches[turns[place]])) for place in order.tolist()]

    @functools.lru_cache(maxsize=64)
    def permutation(number, epoch):
        generator = sample_generator(seed, epoch, number + 1, stream="buckets")
        return torch.randperm(len(members[number]), generator=generator)

    @functools.lru_cache(maxsize=2)
    def batch_of(step):
        low, high = 0, 1
        while sum(batches_before(high).values()) <= step:
            high *= 2
        while high - low > 1:  # low: the epoch that has begun before this step
            middle = (low + high) // 2
            low, high = (middle, high) if sum(batches_before(middle).values()) <= step else (low, middle)
        return plan(low)[step - sum(batches_before(low).values())]

    def index_of(count):
        step, position = divmod(count, global_batch)
        number, batch = batch_of(step)
        epoch, place = divmod(batch * global_batch + position, len(members[number]))
        return members[number][int(permutation(number, epoch)[place])]

    return index_of
