"""What a small teacher learns from: rendered scenes, endless, or a user's own captioned pictures.

Both give samples by (seed, index), the index of a sample of the whole training of a part, in the same ways.
"""

import argparse
import functools

import torch
import torch.nn.functional as F

from common import shapes
from common.data import read_data, to_square
from common.errors import DataError
from common.randomness import sample_generator
from common.small_models import to_pixels

MAX_CLASSES, MIN_OF_CLASS = 1000, 5  # what a class reader tells apart; how many pictures of each there must be


class Scenes:
    """Rendered shapes (common/shapes.py)."""

    size, classes, attributes = shapes.IMAGE_SIZE, None, shapes.ATTRIBUTES

    def samples(self, seed, indices):
        """(pixels (B, 3, R, R) in [-1, 1], captions, labels (B, attributes) long) of training samples."""
        images, scenes = zip(*(shapes.training_sample(seed, int(index)) for index in indices))
        return to_pixels(images), [shapes.caption_of(scene) for scene in scenes], torch.tensor(scenes)

    def kept(self, count):
        """The samples, for `read`, as many as there are up to `count`, whose latents are kept for the UNet."""
        return range(count)

    def read(self, seed, kept):
        return self.samples(seed, kept)

    def order(self, seed, index, count):
        """Which of the `count` kept samples training sample `index` of the UNet is."""
        return int(index) % count

    def caption_of(self, label):
        """The caption that a row of labels stands for."""
        return shapes.caption_of(label.tolist())

    def pixel_weights(self, pixels):
        """(B, 1, R, R): most pixels are background, so an object's weigh more, and a small object's most.

        Without that, small crosses come back as diamonds.
        """
        objects = (pixels - pixels[:, :, :1, :1]).abs().amax(1, keepdim=True).gt(0.02).float()
        objects = F.max_pool2d(objects, 3, stride=1, padding=1)
        return 1 + 4 * objects / F.avg_pool2d(objects, 15, stride=1, padding=7).clamp(min=0.1)

    def held_out(self, count):
        """(pixels, captions) that are never trained on."""
        images = [shapes.held_out_sample(index)[0] for index in range(count)]
        return to_pixels(images), shapes.held_out_captions(count)


SCENES = Scenes()


class Pictures:
    """Pictures of --data_dir or --dataset_name, cut to their middle squares, in an order by epoch of the seed's.

    A picture's own caption is its class where there are few enough (`classes`: a sorted list, else None). Raises
    DataError as read_data does, and where there is one picture only.
    """

    def __init__(self, args, data_dir=None, dataset_name=None):
        places = {"data_dir": data_dir, "dataset_name": dataset_name, "center_crop": True, "random_flip": False}
        self.dataset = read_data(argparse.Namespace(**{**vars(args), **places}))
        self.size = args.resolution
        if len(self.dataset) < 2:
            raise DataError(f"{self.dataset.source} holds one picture: a model needs more.")
        self.captions = [self.dataset.captions(index)[0] for index in range(len(self.dataset))]
        self._distinct = distinct = sorted(set(self.captions))
        few = 2 <= len(distinct) <= min(MAX_CLASSES, len(self.captions) // MIN_OF_CLASS)
        self.classes = distinct if few else None
        self.attributes = {"caption": len(distinct)} if few else {}
        self._numbers = {caption: number for number, caption in enumerate(distinct)}
        self._permutation = functools.lru_cache(maxsize=2)(self._permutation)  # a batch may straddle two epochs

    def __len__(self):
        return len(self.captions)

    def _permutation(self, seed, epoch, count):
        return torch.randperm(count, generator=sample_generator(seed, epoch, 0, stream="order"))

    def order(self, seed, index, count):
        return int(self._permutation(seed, int(index) // count, count)[int(index) % count])

    def read(self, seed, places):
        """(pixels, captions, labels) of the pictures at `places`; one that can't be read is the next one."""
        found, images = zip(*(self.dataset.first_readable(place) for place in places))
        captions = [self.captions[place] for place in found]
        labels = torch.tensor([[self._numbers[caption]] for caption in captions])
        return torch.stack([to_square(image, self.size, 0.5, 0.5, False) for image in images]), captions, labels

    def samples(self, seed, indices):
        return self.read(seed, [self.order(seed, index, len(self)) for index in indices])

    def kept(self, count):
        return (
            torch.linspace(0, len(self) - 1, min(count, len(self))).long().tolist()
        )  # of all classes of a sorted set

    def caption_of(self, label):
        return self._distinct[int(label)]

    def pixel_weights(self, pixels):
        return torch.ones_like(pixels[:, :1])

    def held_out(self, count):
        return self.read(0, range(min(count, len(self))))[:2]
