"""One process, or several that torchrun started: who is who, and what they add up.

Every function also does the right thing in a single process, so that the scripts need no second path.
"""
import atexit
import functools
import os
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm


def rank():
    """Number of this process, counted from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count():
    """How many processes there are: 1 unless torchrun started several."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join(device):
    """Make the processes of torchrun one group: NCCL between GPUs, gloo on CPU. Only the first one prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    atexit.register(dist.destroy_process_group)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)


def barrier():
    """Wait until every process is here."""
    if count() > 1:
        dist.barrier()


def own_part(items):
    """(this process's part of a list, 1), or of a list too short for all ([its first], 0): to run and to
    count as nothing, because a sharded model runs only when it runs in every process."""
    if rank() < len(items):
        return items[rank()::count()], 1
    return items[:1], 0


def in_turns(batches):
    """(index, batch) of this process's share of a list; one that is a batch short does the last again."""
    rounds = -(-len(batches) // count())
    for i in range(rank(), rounds * count(), count()):
        i = min(i, len(batches) - 1)
        yield i, batches[i]


def all_sum(value, device):
    """The sum of a number or tensor over all processes; for one process the value itself."""
    if count() > 1:
        value = torch.as_tensor(value, device=device).clone()
        dist.all_reduce(value)
    return value


def all_max(values, device):
    """Elementwise maximum over all processes, each of which filled in its part of a tensor of -inf."""
    if count() > 1:
        values = values.to(device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.cpu()


def whole(t):
    """All of a sharded tensor, gathered in every process at once; any other tensor as it is."""
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()
