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

    def multistep(self, x0, last, z, timesteps, next_timesteps):
        """DPM-Solver++(2M): z at next_timesteps by x0 here and `last`, (x0, timesteps) of the evaluation before.

        With h the step in lambda = log(alpha / sigma), D = x0 + h / (2 h_before) (x0 - x0_before), and the step is
        DDIM's with D as its x0. Of first order, which is DDIM, where there was none before (None, or timestep -1) and
        to the clean end, where h is infinite.
        """
        alpha, sigma = self.alpha(timesteps), self.sigma(timesteps)
        if last is not None:
            usable = ((next_timesteps >= 0) & (last[1] >= 0)).view(-1, 1, 1, 1)
            here, there, earlier = (
                (self.alpha(t).clamp(min=1e-6) / self.sigma(t).clamp(min=1e-6)).log()
                for t in (timesteps, next_timesteps, last[1])
            )
            factor = (there - here) / (2 * (here - earlier))
            x0 = torch.where(usable, x0 + factor * (x0 - last[0]), x0)
        epsilon = (z - alpha * x0) / sigma
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


def teacher_timesteps(timesteps, end_timesteps, num_ddim_steps, proportional_to=None):
    """K + 1 timesteps per sample, evenly from t to its end (-1 is the clean end): long (K + 1, B).

    tau_j = round((t + 1) + (end - t) j / K) - 1, which is round((t + 1)(1 - j / K)) - 1 for end = -1. proportional_to:
    the number of training timesteps, T: K steps from the last of them, ceil(K (t + 1) / T) from t, which come last: a
    sample that has fewer stays at t before.
    """
    # On the CPU: in float64, which Apple's GPUs don't have.
    start, end = timesteps[None].cpu().double(), end_timesteps[None].cpu().double()
    counts = torch.full_like(start, num_ddim_steps)
    if proportional_to:
        counts = (num_ddim_steps * (start + 1) / proportional_to).ceil().clamp(min=1)
    passed = torch.arange(num_ddim_steps + 1, dtype=torch.float64)[:, None] - (num_ddim_steps - counts)
    fractions = passed.clamp(min=0) / counts
    return (((start + 1) + (end - start) * fractions).round().long() - 1).to(timesteps.device)


def phase_grid(edges, num_ddim_steps):
    """A teacher's steps, as three long tensors (M,): from which timestep, to which, and the end of their phase.

    edges: long (P + 1,), the first timestep of each phase, which is where the one before ends, and -1. Every phase has
    as many steps, M in all: num_ddim_steps, or as near below it as P allows.
    """
    count = num_ddim_steps // (len(edges) - 1)
    grid = teacher_timesteps(edges[:-1], edges[1:], count)
    return grid[:-1].T.flatten(), grid[1:].T.flatten(), edges[1:].repeat_interleave(count)


def ddim_rollout(
    predict, schedule, z, timesteps, end_timesteps, num_ddim_steps, proportional=False, solver="ddim", states=None
):
    """K DDIM steps of `predict(z, t, rows) -> model output`, batched over samples that start at different timesteps.

    z (B, C, H, W); timesteps and end_timesteps long (B,), end < t: on the CPU, or every call waits for the device.
    predict gets the samples that move: all, rows None, or the rows (b,). Samples stay where the interval is shorter
    than K timesteps and, by `proportional`, in the first of fewer steps: see teacher_timesteps. Returns z at
    end_timesteps, in fp32. solver: "ddim", or "dpmsolver++", its second-order multistep twin (arXiv:2211.01095,
    algorithm 2). states: a list that gets the K - 1 latents between.
    """
    timesteps, end_timesteps = timesteps.cpu(), end_timesteps.cpu()
    counted = schedule.num_train_timesteps if proportional else None
    grid = teacher_timesteps(timesteps, end_timesteps, num_ddim_steps, counted)
    on_device, z, before = grid.to(z.device, non_blocking=True), z.float(), None
    for step in range(num_ddim_steps):
        moving = grid[step + 1] < grid[step]
        if moving.any():
            rows = None if moving.all() else moving.nonzero().flatten().to(z.device, non_blocking=True)
            now, after, part = (x if rows is None else x[rows] for x in (on_device[step], on_device[step + 1], z))
            output = predict(part, now, rows)
            if solver == "ddim":
                moved = schedule.ddim_step(output, part, now, after)
            else:
                x0 = schedule.to_x0(output, part, now)
                last = None if before is None else tuple(x if rows is None else x[rows] for x in before)
                moved = schedule.multistep(x0, last, part, now, after)
                before = _placed(x0, now, z, rows, before)
            z = moved if rows is None else z.index_copy(0, rows, moved)
        if states is not None and step + 1 < num_ddim_steps:
            states.append(z)
    return z


def _placed(x0, now, z, rows, before):
    """(x0, timesteps), (B, ...), of every sample's last evaluation; timestep -1 where there was none yet."""
    if rows is None:
        return x0, now
    if before is None:
        before = torch.zeros_like(z), torch.full((len(z),), -1, device=z.device)
    return before[0].index_copy(0, rows, x0), before[1].index_copy(0, rows, now)


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
