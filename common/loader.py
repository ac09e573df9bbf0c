"""The global batch: which samples a step has, in an order that the seed decides, and the loader that reads them."""

import atexit
import functools
import multiprocessing
import signal

import torch

from common.buckets import bucket_order
from common.cache import refreshed
from common.randomness import sample_generator
from common.streams import stream_order


class GlobalBatchSampler(torch.utils.data.Sampler):
    """Lists of (index, step, position) for this rank, one per micro-batch, from start_step until max_steps.

    The global batch of batch_size * num_processes * accumulation_steps samples is laid out by position; a sample's
    count is step * batch + position, which falls into an epoch and a place in that epoch's permutation. With
    cycle_steps M, step s is step s mod M again: the same samples with the same randomness; or, from a round on in
    which --rollout_refresh draws it, other ones. Without read_again such a step is read once, then its index is None.
    buckets: the number of each sample's bucket, for an order by buckets.bucket_order; counts: the samples of each
    shard of a stream, for an order by streams.stream_order.
    """

    def __init__(
        self,
        size,
        batch_size,
        accumulation_steps,
        process_index,
        num_processes,
        start_step,
        max_steps,
        seed,
        cycle_steps=None,
        refresh=0.0,
        read_again=True,
        buckets=None,
        counts=None,
    ):
        self.size, self.batch_size, self.accumulation_steps = size, batch_size, accumulation_steps
        self.process_index, self.num_processes = process_index, num_processes
        self.start_step, self.max_steps, self.seed = start_step, max_steps, seed
        self.cycle_steps, self.refresh, self.read_again = cycle_steps or max(max_steps, 1), refresh, read_again
        self.buckets, self.counts = buckets, counts

    def __len__(self):
        return max(self.max_steps - self.start_step, 0) * self.accumulation_steps

    def __iter__(self):
        global_batch = self.batch_size * self.num_processes * self.accumulation_steps
        index_of = order_of(self, global_batch)
        if self.buckets:
            index_of = bucket_order(self.seed, self.buckets, global_batch)
        seen = set()
        for step in map(self._drawn, range(self.start_step, self.max_steps)):
            reads = self.read_again or step not in seen
            seen.add(step)
            for micro_batch in range(self.accumulation_steps):
                first = (micro_batch * self.num_processes + self.process_index) * self.batch_size
                positions = range(first, first + self.batch_size)
                indices = [index_of(step * global_batch + position) if reads else None for position in positions]
                yield [(index, step, position) for index, position in zip(indices, positions)]

    def _drawn(self, step):
        """The step whose samples and randomness step `step` has."""
        cycle, place = divmod(step, self.cycle_steps)
        while self.refresh and cycle and not refreshed(self.seed, cycle * self.cycle_steps + place, self.refresh):
            cycle -= 1
        return cycle * self.cycle_steps * bool(self.refresh) + place


def order_of(data, global_batch):
    """index_of(count): which of `data.size` samples (None: endless) the so many-th is, in an order of `data.seed`.

    global_batch: how many samples are read together, by which a stream, which has `data.counts`, is laid out.
    """
    if getattr(data, "counts", None):
        return stream_order(data.seed, data.counts, global_batch)

    @functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
    def permutation(epoch):
        return torch.randperm(data.size, generator=sample_generator(data.seed, epoch, 0, stream="order"))

    return lambda count: count if data.size is None else int(permutation(count // data.size)[count % data.size])


def collate(samples):
    """Samples of one micro-batch -> {"captions", "positions", "step" and its tensors, "pixel_values" say, stacked}."""
    batch = {"positions": [sample["position"] for sample in samples], "step": samples[0]["step"]}
    for plural, name in (("captions", "caption"), ("indices", "index")):
        if name in samples[0]:
            batch[plural] = [sample[name] for sample in samples]
    tensors = [name for name, value in samples[0].items() if isinstance(value, torch.Tensor)]
    return {**batch, **{name: torch.stack([sample[name] for sample in samples]) for name in tensors}}


class Unread(torch.utils.data.Dataset):
    """A dataset whose samples without an index are their place alone: they are read no more."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, key):
        index, step, position = key
        return {"step": step, "position": position} if index is None else self.dataset[key]


def ignore_signals(worker):
    """Loader workers leave SIGTERM and SIGINT to the trainer, which saves at the next step and then ends them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """At exit: multiprocessing would send the workers SIGTERM, which they ignore, and wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as crashed
    for worker in multiprocessing.active_children():
        worker.kill()


def build_dataloader(dataset, args, accelerator, start_step, cycle_steps=None, updates=1, read_again=True):
    """This rank's micro-batches from start_step on. Not for accelerator.prepare: the sampler has split the batch.

    updates: batches of one step, each of which counts as a step of the data. cycle_steps, read_again: of
    GlobalBatchSampler, for a method that keeps what it made of so many steps.
    """
    if args.dataloader_num_workers:
        atexit.register(end_workers)
    steps, cycle_steps = (start_step * updates, args.max_train_steps * updates), (cycle_steps or 0) * updates
    share = args.gradient_accumulation_steps, accelerator.process_index, accelerator.num_processes
    laid_out = getattr(dataset, "buckets", None), getattr(dataset, "counts", None)
    again = cycle_steps, getattr(args, "rollout_refresh", 0.0) if cycle_steps else 0.0, read_again
    sampler = GlobalBatchSampler(dataset.size, args.train_batch_size, *share, *steps, args.seed, *again, *laid_out)
    return torch.utils.data.DataLoader(
        dataset if read_again else Unread(dataset),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_signals,
        persistent_workers=args.dataloader_num_workers > 0,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator().manual_seed(args.seed),  # else a loader's start would draw from the global one
    )
