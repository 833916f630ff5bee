"""Low-rank adapters on the linear layers (LoRA, arXiv 2106.09685), and which layers those are."""
import math
import random
from contextlib import contextmanager

import torch

from data.formats import InputError
from sam import accumulator


def linears(model):
    """The nn.Linear layers but the output layer: what adapters go on, and what is quantized and pruned."""
    head = model.get_output_embeddings()
    found = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    if not found:
        raise InputError(f"{type(model).__name__} has no nn.Linear: --lora, --quantize and --prune need one")
    return found


def add_adapter(module, inputs, output):
    """Forward hook: y + 2 B A x, (B, T, out)."""
    low = 2 * inputs[0].to(module.lora_a.dtype) @ module.lora_a.T
    return output + (low @ module.lora_b.T).to(output.dtype)


@contextmanager
def lora(model, rank, seed):
    """Train adapters instead of the weights: y + 2 B A x on every layer of linears() (alpha = 2 rank). A
    (rank, in) ~ N(0, 1/in), B (out, rank) = 0, fp32 or wider: nothing changes before the first step. The
    weights are never written and the adapters go on the way out. Rank 0: does nothing.
    """
    if not rank:
        yield
        return
    layers = linears(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    rng = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    hooks = []
    try:
        model.requires_grad_(False)
        for m in layers:
            a = torch.randn(rank, m.in_features, generator=rng) / math.sqrt(m.in_features)
            kind = {"device": m.weight.device, "dtype": accumulator(m.weight.dtype)}
            m.lora_a = torch.nn.Parameter(a.to(**kind))
            m.lora_b = torch.nn.Parameter(torch.zeros(m.out_features, rank, **kind))
            hooks.append(m.register_forward_hook(add_adapter))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for m in layers:
            m._parameters.pop("lora_a", None)
            m._parameters.pop("lora_b", None)
        for p in trained:
            p.requires_grad_(True)
