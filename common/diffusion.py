"""Diffusion maths: schedules, conversions between epsilon, x0 and v, and DDIM steps.

Notation as in the papers: z_t = alpha_t x + sigma_t eps, alpha_t = sqrt(alphas_cumprod_t), sigma_t^2 = 1 - alpha_t^2,
v = alpha_t eps - sigma_t x. A timestep below 0 is the clean end: alpha = 1, sigma = 0. Everything is fp32: at the last
timestep of SD1.5 sigma / alpha is 14.6, so half precision would lose the prediction.
"""

import torch
from diffusers import DDPMScheduler

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class NoiseSchedule:
    """alpha_t and sigma_t of a diffusers scheduler (read from its config), indexed by integer timesteps.

    Raises ValueError for a scheduler without alphas_cumprod (EDM, flow matching), of another prediction_type, or that
    predicts noise where there is nothing else.
    """

    def __init__(self, scheduler, device="cpu"):
        if not hasattr(scheduler, "alphas_cumprod"):  # DDPMScheduler would give such a config its own default betas
            raise ValueError(f"the scheduler, {type(scheduler).__name__}, has no betas (EDM or flow matching)")
        config = DDPMScheduler.from_config(scheduler.config)
        self.num_train_timesteps = config.config.num_train_timesteps
        self.prediction_type = scheduler.config.get("prediction_type", "epsilon")
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"the scheduler's prediction_type is '{self.prediction_type}', not in {PREDICTION_TYPES}")
        alphas_cumprod = torch.cat([config.alphas_cumprod.double(), torch.ones(1, dtype=torch.float64)])
        if self.prediction_type == "epsilon" and alphas_cumprod[-2] < 1e-6:
            raise ValueError(
                "the scheduler's last timestep has no signal (rescale_betas_zero_snr), from which a prediction of the "
                "noise, its prediction_type epsilon, says nothing about the image"
            )
        self._alphas = alphas_cumprod.sqrt().float().to(device)  # the last entry is timestep -1
        self._sigmas = (1 - alphas_cumprod).sqrt().float().to(device)

    def alpha(self, timesteps):
        """alpha_t of timesteps (B,), shaped (B, 1, 1, 1)."""
        return self._alphas[timesteps.clamp(min=-1)].view(-1, 1, 1, 1)

    def sigma(self, timesteps):
        """sigma_t of timesteps (B,), shaped (B, 1, 1, 1)."""
        return self._sigmas[timesteps.clamp(min=-1)].view(-1, 1, 1, 1)

    def add_noise(self, x, noise, timesteps):
        """z_t = alpha_t x + sigma_t eps."""
        return self.alpha(timesteps) * x + self.sigma(timesteps) * noise

    def noisy_input(self, x, noise, timesteps):
        """add_noise, but pure noise at the last training timestep: there sampling starts."""
        pure = (timesteps == self.num_train_timesteps - 1).view(-1, 1, 1, 1)
        return torch.where(pure, noise, self.add_noise(x, noise, timesteps))

    def to_x0(self, output, z, timesteps):
        """The clean latents that a model output of this schedule's prediction_type stands for (B, C, H, W)."""
        output, z = output.float(), z.float()
        if self.prediction_type == "sample":
            return output
        alpha, sigma = self.alpha(timesteps), self.sigma(timesteps)
        return alpha * z - sigma * output if self.prediction_type == "v_prediction" else (z - sigma * output) / alpha

    def to_epsilon(self, output, z, timesteps):
        """The noise that a model output of this schedule's prediction_type stands for (B, C, H, W)."""
        output, z = output.float(), z.float()
        if self.prediction_type == "epsilon":
            return output
        alpha, sigma = self.alpha(timesteps), self.sigma(timesteps)
        return alpha * output + sigma * z if self.prediction_type == "v_prediction" else (z - alpha * output) / sigma

    def target(self, x0, noise, timesteps, prediction_type=None):
        """What a right model of `prediction_type` (default: this schedule's) says of x0 and noise (B, C, H, W)."""
        prediction_type = prediction_type or self.prediction_type
        if prediction_type == "v_prediction":
            return self.alpha(timesteps) * noise - self.sigma(timesteps) * x0
        return x0 if prediction_type == "sample" else noise

    def convert(self, output, z, timesteps, prediction_type):
        """A model output of this schedule's prediction_type as one of another, (B, C, H, W), in fp32."""
        if prediction_type == self.prediction_type:
            return output.float()
        x0, noise = self.to_x0(output, z, timesteps), self.to_epsilon(output, z, timesteps)
        return self.target(x0, noise, timesteps, prediction_type)

    def ddim_step(self, output, z, timesteps, next_timesteps):
        """Deterministic DDIM (Song et al. 2021, eq. 12, eta 0) from timesteps to next_timesteps, both (B,)."""
        x0 = self.to_x0(output, z, timesteps)
        epsilon = self.to_epsilon(output, z, timesteps)
        return self.alpha(next_timesteps) * x0 + self.sigma(next_timesteps) * epsilon

    def x0_of_step(self, z_next, z, timesteps, next_timesteps):
        """The x0 with which one DDIM step takes z to z_next (Salimans & Ho 2022, appendix G)."""
        ratio = self.sigma(next_timesteps) / self.sigma(timesteps)
        return (z_next - ratio * z) / (self.alpha(next_timesteps) - ratio * self.alpha(timesteps))

    def snr(self, timesteps):
        """alpha_t^2 / sigma_t^2, shaped (B, 1, 1, 1)."""
        return self.alpha(timesteps) ** 2 / self.sigma(timesteps) ** 2


def min_snr_weights(schedule, timesteps, gamma):
    """Min-SNR weights (B,) of an error in the schedule's prediction type (Hang et al., 2303.09556); None: ones.

    min(SNR, gamma) of an error in x0, which is min(SNR, gamma) / SNR of one in eps and / (SNR + 1) of one in v.
    """
    if gamma is None:
        return torch.ones(len(timesteps), device=timesteps.device)
    snr = schedule.snr(timesteps).flatten()
    return snr.clamp(max=gamma) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[schedule.prediction_type]


def pointwise_distance(error, loss):
    """l2: error^2; huber: sqrt(error^2 + c^2) - c with c = 1e-3, which a large error doesn't rule. Shaped as error."""
    return error**2 if loss == "l2" else torch.sqrt(error**2 + 1e-3**2) - 1e-3


def teacher_timesteps(timesteps, end_timesteps, num_ddim_steps):
    """K + 1 timesteps per sample, evenly from t to its end (-1 is the clean end): long (K + 1, B).

    tau_j = round((t + 1) + (end - t) j / K) - 1, which is round((t + 1)(1 - j / K)) - 1 for end = -1.
    """
    # On the CPU: in float64, which Apple's GPUs don't have.
    fractions = torch.arange(num_ddim_steps + 1, dtype=torch.float64)[:, None] / num_ddim_steps
    start, end = timesteps[None].cpu().double(), end_timesteps[None].cpu().double()
    return (((start + 1) + (end - start) * fractions).round().long() - 1).to(timesteps.device)


def phase_grid(edges, num_ddim_steps):
    """A teacher's steps, as three long tensors (M,): from which timestep, to which, and the end of their phase.

    edges: long (P + 1,), the first timestep of each phase, which is where the one before ends, and -1. Every phase has
    as many steps, M in all: num_ddim_steps, or as near below it as P allows.
    """
    count = num_ddim_steps // (len(edges) - 1)
    grid = teacher_timesteps(edges[:-1], edges[1:], count)
    return grid[:-1].T.flatten(), grid[1:].T.flatten(), edges[1:].repeat_interleave(count)


def ddim_rollout(predict, schedule, z, timesteps, end_timesteps, num_ddim_steps):
    """K DDIM steps of `predict(z, t) -> model output`, batched over samples that start at different timesteps.

    z (B, C, H, W); timesteps and end_timesteps long (B,), end < t. Returns z at end_timesteps. Where a sample's own
    interval is shorter than K timesteps, repeated grid points leave it where it is.
    """
    grid = teacher_timesteps(timesteps, end_timesteps, num_ddim_steps)
    for now, after in zip(grid[:-1], grid[1:]):
        # A sample that is already at its end (now = -1) is evaluated at 0 and then left as it was.
        at = now.clamp(min=0)
        moved = schedule.ddim_step(predict(z, at), z, at, after)
        z = torch.where((after < now).view(-1, 1, 1, 1), moved, z)
    return z


def boundary_scalings(timesteps):
    """c_skip and c_out of timesteps (B,), shaped (B, 1, 1, 1): LCMScheduler's, 1 and 0 at the clean end.

    c_skip = d^2 / ((s t)^2 + d^2), c_out = s t / sqrt((s t)^2 + d^2), with d = 0.5 and s = 10.
    """
    scaled = 10 * timesteps.clamp(min=0).float().view(-1, 1, 1, 1)
    return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()


def consistency_function(output, z, timesteps, schedule, edges=None):
    """f(z, t), (B, C, H, W): where the path through z at timesteps (B,) ends, by the model output there. In fp32.

    Without `edges` it ends at the clean latents, f = c_skip(t) z + c_out(t) x0 (LCM, arXiv:2310.04378); with them, at
    the timesteps `edges` (B,), f = DDIM_1(z : t -> e) (PCM, arXiv:2405.18407). At its end a path has arrived: f is z
    whatever the output.
    """
    if edges is None:
        c_skip, c_out = boundary_scalings(timesteps)
        return c_skip * z + c_out * schedule.to_x0(output, z, timesteps)
    return torch.where((timesteps > edges).view(-1, 1, 1, 1), schedule.ddim_step(output, z, timesteps, edges), z)
