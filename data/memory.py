"""What a run of unlearn.py will hold in memory, said before it starts. An upper bound: parts peak apart."""
import os

import torch

from data import processes
from data.models import CHUNK, blocks, collate, with_head
from sam import local


def numel(module):
    """Elements of all parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def activation_bytes(model, samples, micro_batch, checkpointing, pad):
    """Estimate of what a pass over the largest micro-batch keeps for its backward pass: in the blocks, as
    measured on the longest of samples, and in the output layer three times the fp32 logits of a chunk."""
    longest = max(samples, key=lambda sample: len(sample[0]))
    config = model.config.get_text_config()
    weights = {local(p).untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        batch = collate([longest], pad, model.device)
        length = with_head(model, batch, lambda hidden, head: hidden.clone()).logits.shape[1]
    token = sum(kept.values()) / length
    size = model.dtype.itemsize
    if checkpointing:                            # each block's input, and the inside of one block
        depth = config.num_hidden_layers
        token = depth * config.hidden_size * size + token / depth
    tokens = -(-micro_batch // processes.count()) * len(longest[0])
    rows = min(tokens, max(1, CHUNK // config.vocab_size))
    gathered = 0
    if processes.count() > 1:                    # two blocks at a time, and what is in no block
        inside = [numel(block) for block in blocks(model)]
        gathered = numel(model) - sum(inside) + 2 * max(inside, default=0)
    return tokens * token + 3 * 4 * rows * config.vocab_size + gathered * size


def plan(args, total, trained, trained_size, copies, activations, count=1):
    """{part: bytes} of what a step holds in each of `count` processes; `trained` of `total` parameters train, or
    so many of adapters beside them, in trained_size bytes each; the smoother puts `copies` tensors of their size
    aside. The interpreter itself (0.5 GB) is not in it."""
    size = getattr(torch, args.param_dtype).itemsize
    state = getattr(torch, args.state_dtype).itemsize
    compares = args.loss == "rmu" or args.retain == "kl"
    models = 2 if compares and not args.lora else 1                  # with a frozen one, or with adapters off
    models += len(args.merge)
    if args.loss == "none":                      # UNDO or a merge: no step of their own
        trained = 0
    if args.undo_steps:                          # a teacher, and all weights train
        models += 1
        trained = total
    states = 2
    if args.optimizer in ("sign", "zo") and not args.undo_steps:
        states = 0
    if args.optimizer in ("zo", "hybrid"):       # the weights and a direction
        copies += 2
    if args.ilu_lambda:                          # the weights, two gradients and their sum
        copies += 4
    average = 4 if "wa" in args.smooth.split("+") else 0
    parts = {"weights": models * total * size,
             "adapters": trained * trained_size if args.lora else 0,
             "gradients": trained * trained_size,
             "put aside": copies * trained * trained_size,
             "optimizer": states * trained * state,
             "average": average * trained}
    if args.merge:                               # in fp64; TIES sorts all of a run's differences
        parts["merging"] = (42 if args.merge_ties else 13) * total
    shared = {name: value / count for name, value in parts.items() if value}
    return shared | {"activations": activations}


def attack_plan(args, model, texts):
    """plan() of relearn.py's usual attack on the result: all weights train, four samples a step, and a copy
    of them is put aside. Ask before any of the model is frozen."""
    weights = numel(model) * getattr(torch, args.param_dtype).itemsize / processes.count()
    return {"weights": weights, "gradients": weights, "put aside": weights, "optimizer": 2 * weights,
            "activations": activation_bytes(model, texts.forget, 4, args.gradient_checkpointing, texts.pad)}


def machine_bytes(device):
    """The memory of a GPU or of the machine; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):                    # Windows has no sysconf
        return None


LESS = "--gradient_checkpointing, a smaller --micro_batch, --param_dtype bfloat16, or torchrun with more GPUs"
LESS_ATTACK = "--no-relearn, then relearn.py under torchrun with more GPUs, or with --lora"


def plan_line(parts, device, advice=LESS):
    """The plan as one line, and a second one with what to do where it is more than the device has."""
    cuda = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else "cpu"
    room = machine_bytes(device)
    need = sum(parts.values())
    unit, size = ("GB", 1e9) if need >= 1e9 else ("MB", 1e6)
    words = ", ".join(f"{part} {value / size:.1f}" for part, value in parts.items())
    line = f"needs {need / size:.1f} {unit} ({words}) on {name}"
    if processes.count() > 1:
        line += f" in each of {processes.count()} processes"
    if room is None:
        return line
    line += f" with {room / 1e9:.0f} GB"
    if need > room:
        line += f"\nthat is too much: try {advice}"
    return line
