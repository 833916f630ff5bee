"""What tells forget from retain text, one direction of the hidden states, taken out (arXiv 2409.20089).

    python unlearn.py --latent direction

ReFAT: a jailbreak can work by taking out the direction by which a model knows what to refuse. So half of
the forget samples are unlearned without it, in the last three quarters of the layers.

Shapes: B samples, T tokens, D width, L layers.
"""
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from data import stream
from sam import accumulator, draw_seed, kernel_file

EVERY = 4                                        # steps that a set of directions serves, as in the paper


def last_states(model, micro, blocks):
    """(N, L, D) the last token's state of all N samples at the input of each layer."""
    found = []
    for batch in micro:
        last = batch["attention_mask"].sum(1) - 1                                    # (B,)
        rows = torch.arange(len(last), device=last.device)
        states = [hidden[rows, last] for hidden in stream.inputs_of(model, batch, blocks)]
        found.append(torch.stack(states, 1))                                         # (B, L, D)
    states = torch.cat(found)
    return states.to(accumulator(states.dtype))


def directions(model, forget, retain, blocks):
    """(L, D) unit vectors r = mean forget state minus mean retain state at each layer's input; 0 where
    only rounding tells them apart."""
    between = kernel_file("probe").between
    here = last_states(model, forget, blocks)
    there = last_states(model, retain, blocks)
    found = [between(a, b) for a, b in zip(here.unbind(1), there.unbind(1))]
    return torch.stack(found).to(here.dtype)


def without(hidden, r, where):
    """hidden (B, T, D) - r r^T hidden, where `where` (B, T) is True."""
    return torch.where(where[:, :, None], kernel_file("probe").project_out(hidden, r), hidden)


class Direction:
    """The directions of some steps, and which samples of a step go without; `begin`, `prepare` and
    `attacking` are called as those of latent.Adversary."""

    def __init__(self, args, model):
        self.model = model
        self.seed = args.seed
        blocks = stream.text_blocks(model)
        self.blocks = blocks[len(blocks) // 4:]

    def begin(self, step, forget, retain):
        """Before each step, counted from 0; forget, retain: its micro-batches."""
        self.step = step
        if step % EVERY == 0:
            self.r = directions(self.model, forget, retain, self.blocks)

    def prepare(self, micro):
        """Before each pass over a forget batch: the draws from their beginning."""
        self.rng = torch.Generator(self.model.device).manual_seed(draw_seed(self.seed, self.step))

    @contextmanager
    def attacking(self, batch):
        """Inside, half of the samples of this batch, at random, go without the directions."""
        mask = batch["attention_mask"].bool()                                        # (B, T)
        drawn = torch.rand(len(mask), generator=self.rng, device=mask.device) < 0.5
        where = mask & drawn[:, None]
        with ExitStack() as stack:
            for block, r in zip(self.blocks, self.r):
                stack.enter_context(stream.at_input(block, partial(without, r=r, where=where)))
            yield
