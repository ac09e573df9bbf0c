"""Train the parts of a pipeline one after the other, each to a number of steps, with an average of its weights.

A part is a module, its objective: `objective(seed, step, indices, device)` is the loss of the samples `indices`, whose
randomness derives from (seed, index) alone. Run again, a part resumes from its last checkpoint.
"""

import json
import math
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm


def learning_rate(step, steps, peak, warmup=200):
    """Linear warm-up, of a fifth of a short run, then cosine to zero."""
    warmup = max(1, min(warmup, steps // 5))
    return peak * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_part(name, objective, steps, batch_size, peak, seed, args, accelerator, sample=None):
    """Train one part to `steps` (resuming its last checkpoint) and leave it with its EMA weights.

    `sample(objective)` draws a picture (PIL) at each checkpoint, which is made every args.checkpointing_steps in
    args.work_dir.
    """
    folder = Path(args.work_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    device = accelerator.device
    objective.to(device)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    ema = {key: value.detach().clone() for key, value in objective.state_dict().items()}
    step, checkpoint = 0, folder / "checkpoint"
    if (checkpoint / "state.json").is_file():
        step = json.loads((checkpoint / "state.json").read_text())["step"]
        objective.load_state_dict(load_file(checkpoint / "weights.safetensors"))
        ema = {k: v.to(device) for k, v in load_file(checkpoint / "ema.safetensors").items()}
        optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
        accelerator.print(f"{name}: resuming at step {step} of {steps}")
    model = accelerator.prepare(objective) if step < steps else objective
    share = batch_size // accelerator.num_processes
    bar = tqdm(total=steps, initial=step, desc=name, disable=not accelerator.is_main_process, mininterval=10)
    losses = []
    while step < steps:
        first = step * batch_size + accelerator.process_index * share
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = model(seed, step, range(first, first + share), device)
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in objective.state_dict().items():
                ema[key].lerp_(value, 1 - decay) if value.is_floating_point() else ema[key].copy_(value)
        losses.append(loss.detach())
        bar.update()
        if step % args.checkpointing_steps == 0 or step == steps:
            average, losses = torch.stack(losses).mean().item(), []
            bar.set_postfix(loss=f"{average:.4f}")
            if accelerator.is_main_process:
                print(f"{name} step {step} loss {average:.5f}", flush=True)
                _save(checkpoint, step, objective, ema, optimizer)
                if sample is not None:
                    weights = {k: v.clone() for k, v in objective.state_dict().items()}
                    objective.load_state_dict(ema)
                    with torch.no_grad():
                        sample(objective).save(folder / f"sample-{step}.png")
                    objective.load_state_dict(weights)
            accelerator.wait_for_everyone()
    objective.load_state_dict(ema)
    return objective.eval()


def _save(checkpoint, step, objective, ema, optimizer):
    temporary = checkpoint.with_name(".checkpoint.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file({k: v.contiguous() for k, v in objective.state_dict().items()}, temporary / "weights.safetensors")
    save_file({k: v.contiguous() for k, v in ema.items()}, temporary / "ema.safetensors")
    torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
    (temporary / "state.json").write_text(json.dumps({"step": step}))
    older = checkpoint.with_name(".checkpoint.old")
    shutil.rmtree(older, ignore_errors=True)
    if checkpoint.exists():
        os.replace(checkpoint, older)
    os.replace(temporary, checkpoint)


def averaged_weights(args, part):
    """The averaged weights that a part's last checkpoint holds."""
    return load_file(Path(args.work_dir) / part / "checkpoint/ema.safetensors")
