"""Training the last blocks alone: what the blocks in front of them say of a text is computed once.

    python unlearn.py ... --train_modules 'layers\\.2[5-9]\\.' --cache_frozen
    python relearn.py RUN --train_modules 'layers\\.2[5-9]\\.' --cache_frozen

The last 5 of SmolLM2's 30 blocks take .76 s for 16 questions so, 1.7 without (data/people/readme.md). The
states stay in memory: tokens x width x 4 bytes in fp32, so this is for short texts that come again and again.
"""
import hashlib
import json
import re

import torch

from data import models, processes
from data.formats import InputError

STATES = {}              # digest of the frozen part -> {token ids: (T, D) states}; outlives a model


class Enough(Exception):
    """The block that was asked for has spoken: no need to go on."""


def matching(named, flag, pattern):
    """The (name, parameter) pairs whose name contains a match of pattern."""
    try:
        some = [(name, p) for name, p in named if re.search(pattern, name)]
    except re.error as e:
        raise InputError(f"--{flag} {pattern!r} is not a regular expression: {e}")
    if not some:
        raise InputError(
            f"--{flag} {pattern!r} matches no parameter: the names go from {named[0][0]} to {named[-1][0]}")
    return some


def train_only(model, pattern):
    """[(name, parameter)] of those that match; the others are frozen."""
    named = matching(list(model.named_parameters()), "train_modules", pattern)
    model.requires_grad_(False)
    for _, p in named:
        p.requires_grad_(True)
    return named


def flags(g):
    """Add the flag to a group that has --train_modules."""
    g.add_argument("--cache_frozen", action="store_true",
                   help="with --train_modules: run the blocks in front of the first one that trains once a "
                   "text, and keep what they say; for short texts")


def check(args):
    """Refuse what looks inside the blocks that no longer run, or trains them."""
    for name in ("lora", "latent", "undo_steps", "merge"):
        if args.cache_frozen and getattr(args, name):
            raise InputError(f"--cache_frozen: --{name} needs all blocks to run; drop one of them")


def leading(model):
    """(the blocks in front of the first one that trains, the parameters that decide what the last of them
    says)."""
    front = []
    for block in models.blocks(model):
        if any(p.requires_grad for p in block.parameters()):
            break
        front.append(block)
    deciding = parameters_up_to(model.base_model, front[-1], *little_batch(model)) if front else []
    if not front or any(p.requires_grad for p in deciding):
        raise InputError("--cache_frozen: the first block or the embeddings train, so nothing stays equal: "
                         "name later blocks with --train_modules")
    return front, deciding


def parameters_up_to(base, block, ids, mask):
    """[parameter] of every module that begins before the block has ended, in that order."""
    found = {}

    def note(module, inputs):
        found.update(dict.fromkeys(module.parameters(recurse=False)))
    hooks = [module.register_forward_pre_hook(note) for module in base.modules()]
    try:
        states_of(base, block, ids, mask)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found)


def digest(model, deciding):
    """A hash of all that decides the states: those parameters, and what config.json says."""
    config = model.config.to_diff_dict()
    for key in ("dtype", "transformers_version"):                # of the file, not of what is computed
        config.pop(key, None)
    out = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for p in deciding:
        out.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return out.hexdigest()


def cache(model):
    """Let the blocks in front of the first one that trains run once a text, in place; serves models.run().

    Equal to the plain pass up to rounding: a text's states are those that it has alone, in whatever batch it
    comes. Tried on one text; a model whose blocks hand on more than one state a token is refused.
    """
    if processes.count() > 1:
        raise InputError("--cache_frozen needs whole weights: run without torchrun")
    front, deciding = leading(model)
    plain = trial(model)
    known = STATES.setdefault(digest(model, deciding), {})
    served = []                                  # the states (B, T, D) of the pass that is under way

    @torch.no_grad()
    def look_up(module, positional, inputs):
        served.clear()
        if inputs.get("use_cache") is not False:                 # generating, token by token
            return
        ids = inputs["input_ids"]
        mask = inputs["attention_mask"]
        texts = []
        for i, (row, count) in enumerate(zip(ids.tolist(), mask.sum(1).tolist())):
            text = tuple(row[:count])
            texts.append(text)
            if text not in known:
                alone = states_of(model.base_model, front[-1], ids[i:i + 1, :count], mask[i:i + 1, :count])
                known[text] = alone[0]                           # (T, D)
        states = torch.zeros(*ids.shape, known[texts[0]].shape[1], dtype=model.dtype, device=ids.device)
        for row, text in zip(states, texts):
            row[:len(text)] = known[text]                        # (T, D)
        served.append(states)

    def serve(block, forward):
        """forward() of a block in front, which has nothing to do where states are served."""
        def instead(hidden_states, *args, **named):
            if not served:
                return forward(hidden_states, *args, **named)
            return served[0] if block is front[-1] else hidden_states
        return instead
    for block in front:
        block.forward = serve(block, block.forward)
    model.register_forward_pre_hook(look_up, with_kwargs=True)
    if models.differ(plain, trial(model)):
        raise InputError(f"--cache_frozen: {type(model).__name__} says something else when its first blocks "
                         "are left out: drop it")


def little_batch(model):
    """(ids, mask) of a short text, (1, T)."""
    ids = torch.tensor([[3, 4, 5, 6]], device=model.device) % model.get_input_embeddings().num_embeddings
    return ids, torch.ones_like(ids)


@torch.no_grad()
def trial(model):
    """The logits (1, T, V) of a short text."""
    ids, mask = little_batch(model)
    return models.run(model, {"input_ids": ids, "attention_mask": mask}).logits


@torch.no_grad()
def states_of(base, block, ids, mask):
    """What a block says of a batch: (B, T, D). base: the model without its output layer."""
    found = []

    def keep(module, inputs, output):
        if not torch.is_tensor(output):
            raise InputError(f"--cache_frozen: {type(block).__name__} hands on more than states; drop it")
        found.append(output)
        raise Enough
    hook = block.register_forward_hook(keep)
    try:
        base(input_ids=ids, attention_mask=mask, use_cache=False)
    except Enough:
        pass
    finally:
        hook.remove()
    return found[0]
