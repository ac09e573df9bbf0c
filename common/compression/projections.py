"""A smaller UNet beside its teacher: features of other widths are compared through learned 1x1 projections."""

from pathlib import Path

import torch

from common.compression.manifest import MANIFEST
from common.conditioning import predict
from common.errors import UsageError
from common.hooks import FeatureTap
from common.pipelines import latent_shape


class Student(torch.nn.Module):
    """The student UNet with the 1x1 projections of its features that are of other widths: what is trained, in one."""

    def __init__(self, unet, projections):
        super().__init__()
        self.unet, self.projections = unet, torch.nn.ModuleDict(projections)

    def forward(self, *inputs, **options):
        return self.unet(*inputs, **options)

    def features(self, tap, names):
        """The tapped features, projected, in fp32."""
        found = (tap.features[name].float() for name in names)
        keys = (name.replace(".", "_") for name in names)
        return [self.projections[key](f) if key in self.projections else f for key, f in zip(keys, found)]


@torch.no_grad()
def build_projections(tap, teacher_tap, pairs, args):
    """{name: 1x1 convolution} of the pairs of other widths, after a forward of both UNets. Raises UsageError.

    They start at zero: a random one would pull the student away from what it took over from its teacher.
    """
    projections = {}
    for name, teacher_name in pairs:
        own, theirs = tap.features[name].shape, teacher_tap.features[teacher_name].shape
        if own[2:] != theirs[2:]:
            raise UsageError(
                f"{Path(args.student_model) / MANIFEST}: the feature pair {name}, "
                f"{teacher_name} is of different sizes, {own[2:]} and {theirs[2:]}."
            )
        if own[1] != theirs[1]:
            projection = torch.nn.Conv2d(own[1], theirs[1], 1)
            torch.nn.init.zeros_(projection.weight)
            torch.nn.init.zeros_(projection.bias)
            projections[name.replace(".", "_")] = projection
    return projections


def make_student(args, run, pipeline, teacher, unconditional, teacher_unconditional, pairs):
    """(Student, tap of its features, tap of the teacher's), with projections where widths differ.

    One forward of both UNets says how large their features are. Raises UsageError where a pair doesn't fit.
    """
    names, teacher_names = [name for name, _ in pairs], [name for _, name in pairs]
    try:  # on the plain modules, before anything wraps them
        tap, teacher_tap = FeatureTap(pipeline.unet, names), FeatureTap(teacher.unet, teacher_names)
    except KeyError as error:
        raise UsageError(f"{Path(args.student_model) / MANIFEST}: feature_pairs: {error.args[0]}.") from None
    shape = latent_shape(pipeline, args.resolution)
    probe = torch.zeros(1, *shape, device=run.device), torch.zeros(1, dtype=torch.long, device=run.device)
    with torch.no_grad(), run.accelerator.autocast():
        predict(pipeline.unet, *probe, unconditional)
        predict(teacher.unet, *probe, teacher_unconditional)
    projections = build_projections(tap, teacher_tap, pairs, args)
    if args.teacher_cpu_offload:
        teacher.unet.to("cpu")
    student = Student(pipeline.unet, projections).to(run.device)
    pipeline.unet.requires_grad_(True)
    return student, tap, teacher_tap
