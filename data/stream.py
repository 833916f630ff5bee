"""The hidden states of a model on their way through its layers: read them, and change them.

Defences that attack hidden states (data/latent.py), relearn.py --ablate and evaluate.py --probe build
on it. Shapes: B samples, T tokens, D width, L layers.
"""
from contextlib import ExitStack, contextmanager

import torch

from data.formats import InputError
from data.models import batches, blocks, collate, context_of, tokenize, with_head


def no_logits(hidden, head):
    """For with_head(): the output layer does not run."""
    return hidden[:, :0]


@torch.no_grad()
def text_blocks(model):
    """Those of models.blocks() that a text runs through, in that order: not a vision tower's. Tried."""
    ran = []

    def note(module, inputs):
        ran.append(module)
    hooks = [block.register_forward_pre_hook(note) for block in blocks(model)]
    token = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    try:
        with_head(model, {"input_ids": token, "attention_mask": token}, no_logits)
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(ran))


@contextmanager
def at_input(block, f):
    """Inside, a decoder layer gets f(hidden) in the place of its hidden states (B, T, D)."""
    def change(module, inputs, named):
        if inputs:
            return (f(inputs[0]), *inputs[1:]), named
        return inputs, named | {"hidden_states": f(named["hidden_states"])}
    hook = block.register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def inputs_of(model, batch, layers):
    """The input (B, T, D) of each of some decoder layers on a batch."""
    found = []

    def keep(hidden):
        found.append(hidden)
        return hidden
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(at_input(layer, keep))
        with_head(model, batch, no_logits)
    return found


def on_stream(model, f):
    """Hooks that call f(layer, states (B, T, D)) in front of the first of text_blocks(), as layer 0, and
    behind each; what f returns, unless None, takes the states' place. Whoever calls removes them."""
    layers = text_blocks(model)
    if not layers:
        raise InputError(f"{type(model).__name__} does not name its layers, which --ablate and --probe "
                         "need: drop them")

    def before(module, inputs, named):
        if inputs:
            new = f(0, inputs[0])
            return None if new is None else ((new, *inputs[1:]), named)
        new = f(0, named["hidden_states"])
        return None if new is None else (inputs, named | {"hidden_states": new})

    def behind(layer):
        def hook(module, inputs, output):
            if not isinstance(output, tuple):
                return f(layer, output)
            new = f(layer, output[0])
            return None if new is None else (new, *output[1:])
        return hook
    hooks = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    for i, layer in enumerate(layers):
        hooks.append(layer.register_forward_hook(behind(i + 1)))
    return hooks


@torch.no_grad()
def residuals(model, tokenizer, texts, batch=64):
    """(N, L+1, D) on the CPU: on_stream() at the last token of each of texts, [(text, where)]."""
    context = context_of(model)
    encoded = tokenize(tokenizer, [text for text, _ in texts])
    for ids, (_, where) in zip(encoded, texts):
        if context and len(ids) > context:
            raise InputError(f"{where}: {len(ids)} tokens, but the model's context is {context}: "
                             "shorten the text")
    out = [None] * len(texts)
    kept = []

    def keep(layer, states):
        kept.append(states[range(len(states)), last].cpu())

    hooks = on_stream(model, keep)
    try:
        for part in batches([len(ids) for ids in encoded], batch):
            samples = [(encoded[i], encoded[i]) for i in part]
            x = collate(samples, tokenizer.pad_token_id or 0, model.device)
            last = x["attention_mask"].sum(1) - 1                                    # (B,)
            kept.clear()
            with_head(model, x, no_logits)
            for i, states in zip(part, torch.stack(kept, 1)):                        # (L+1, D) each
                out[i] = states
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(out)
