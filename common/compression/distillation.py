"""A smaller UNet beside its teacher: the loss it learns by (BK-SDM, arXiv:2305.15798), and what reads their features.

Features of other widths are compared through learned 1x1 projections.
"""

from pathlib import Path

import torch

from common.compression.manifest import MANIFEST
from common.conditioning import predict
from common.errors import UsageError
from common.hooks import FeatureTap
from common.pipelines import latent_shape


def kd_loss(output, teacher_output, target, pairs, sample_weights, task_weight, kd_weight, feature_weight):
    """w_task |o_s - o|^2 + w_kd |o_s - o_T|^2 + w_feat sum_k |f_k^s - f_k^T|^2 / |f_k^T|^2: (loss, its three terms).

    output, teacher_output, target: o_s, o_T and o, (B, C, H, W), of one prediction type; kd_weight: alpha w_kd; target
    None: no task term. pairs: list of (f_k^s, f_k^T), (B, C_k, H_k, W_k) each; an error is relative to its own
    sample's teacher feature, or large features would dominate. sample_weights (B,): of the output errors, Min-SNR's or
    ones. Means over samples, in fp32; the terms are scalars without their weights.
    """
    task = output.new_zeros(()) if target is None else (output - target).square().mean(dim=(1, 2, 3))
    kd = (output - teacher_output).square().mean(dim=(1, 2, 3))
    features = output.new_zeros(())
    for student_feature, teacher_feature in pairs:
        student_feature, teacher_feature = student_feature.float().flatten(1), teacher_feature.float().flatten(1)
        error = (student_feature - teacher_feature).square().sum(dim=1)
        features = features + (error / teacher_feature.square().sum(dim=1).clamp(min=1e-12)).mean()
    task, kd = (sample_weights * task).mean(), (sample_weights * kd).mean()
    return task_weight * task + kd_weight * kd + feature_weight * features, (task, kd, features)


class Student(torch.nn.Module):
    """The student UNet with the 1x1 projections of its features that are of other widths: what is trained, in one."""

    def __init__(self, unet, projections):
        super().__init__()
        self.unet, self.projections = unet, torch.nn.ModuleDict(projections)

    def forward(self, *inputs, **options):
        return self.unet(*inputs, **options)

    def features(self, tap, names):
        """The tapped features, projected, in fp32; FSDP2 has gathered the projections, for `forward`, in its dtype."""
        found = [tap.features[name].float() for name in names]
        for place, name in enumerate(names):
            if (key := name.replace(".", "_")) in self.projections:
                projection = self.projections[key]
                found[place] = projection(found[place].to(projection.weight.dtype)).float()
        return found


@torch.no_grad()
def build_projections(tap, teacher_tap, pairs, folder):
    """{name: 1x1 convolution} of the pairs of other widths, after a forward of both UNets. Raises UsageError.

    They start at zero: a random one would pull the student away from what it took over from its teacher.
    """
    projections = {}
    for name, teacher_name in pairs:
        own, theirs = tap.features[name].shape, teacher_tap.features[teacher_name].shape
        if own[2:] != theirs[2:]:
            raise UsageError(
                f"{Path(folder) / MANIFEST}: the feature pair {name}, {teacher_name} is of different sizes, "
                f"{own[2:]} and {theirs[2:]}."
            )
        if own[1] != theirs[1]:
            projection = torch.nn.Conv2d(own[1], theirs[1], 1)
            torch.nn.init.zeros_(projection.weight)
            torch.nn.init.zeros_(projection.bias)
            projections[name.replace(".", "_")] = projection
    return projections


def make_student(args, run, pipeline, teacher, empty, pairs, folder):
    """(Student, tap of its features, tap of the teacher's), with projections where widths differ.

    One forward of both UNets, on `empty`, the conditionings of their empty captions, says how large their features
    are. Raises UsageError, of the `folder` whose manifest names them, where a pair doesn't fit.
    """
    names, teacher_names = [name for name, _ in pairs], [name for _, name in pairs]
    try:  # on the plain modules, before anything wraps them
        tap, teacher_tap = FeatureTap(pipeline.unet, names), FeatureTap(teacher.unet, teacher_names)
    except KeyError as error:
        raise UsageError(f"{Path(folder) / MANIFEST}: feature_pairs: {error.args[0]}.") from None
    shape = latent_shape(pipeline, args.resolution)
    probe = torch.zeros(1, *shape, device=run.device), torch.zeros(1, dtype=torch.long, device=run.device)
    with torch.no_grad(), run.accelerator.autocast():
        predict(pipeline.unet, *probe, empty[0])
        predict(teacher.unet, *probe, empty[1])
    projections = build_projections(tap, teacher_tap, pairs, folder)
    if getattr(args, "teacher_cpu_offload", False):
        teacher.unet.to("cpu")
    student = Student(pipeline.unet, projections).to(run.device)
    pipeline.unet.requires_grad_(True)
    return student, tap, teacher_tap
