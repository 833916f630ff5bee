"""Everything that must hold.

    python test_all.py                  # 182 tests, 200 s on 2 idle cores; pytest collects it too
    python test_all.py -k Smoothers     # what belongs to sam.py; the other classes are named in the banners
    python .ci/zoo.py                   # slow: 184 families of models through every script

Each test compares with a definition that does not use the code under test: autograd with double
backward, a closed form, a loop over single samples, a published table. Nothing is downloaded. Class
Scripts trains the built-in target once (cached in data/tiny/seed0). A part imports only what it tests.
"""
import contextlib
import copy
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it at import; the scripts that tests start inherit it

import numpy as np
import torch
import torch.nn.functional as F

LINUX = Path("/proc/self/clear_refs").exists()
ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))


class Lazy:
    """A module that is imported when one of its names is first used."""

    def __init__(self, module):
        self.__dict__["_module"] = module

    def __getattr__(self, name):
        return getattr(importlib.import_module(self._module), name)

    def __setattr__(self, name, value):
        setattr(importlib.import_module(self._module), name, value)

    def __delattr__(self, name):
        delattr(importlib.import_module(self._module), name)


import sam

evaluate, relearn, unlearn = Lazy("evaluate"), Lazy("relearn"), Lazy("unlearn")
formats, models, losses = Lazy("data.formats"), Lazy("data.models"), Lazy("data.losses")
scores, tables, runs = Lazy("data.scores"), Lazy("data.tables"), Lazy("data.runs")
memory, adapters, finetune = Lazy("data.memory"), Lazy("data.adapters"), Lazy("data.finetune")
texts, prompts, stream = Lazy("data.texts"), Lazy("data.prompts"), Lazy("data.stream")
undo, latent, optimizers = Lazy("data.undo"), Lazy("data.latent"), Lazy("data.optimizers")
split, merge, ilu, states = Lazy("data.split"), Lazy("data.merge"), Lazy("data.ilu"), Lazy("data.states")
muse, tofu = Lazy("data.muse.metrics"), Lazy("data.tofu.metrics")
compare = Lazy("data.tiny.compare")
people, frozen = Lazy("data.people.compare"), Lazy("data.frozen")


@functools.cache
def script_module(path):
    """A script of the tree as a module, without running its main part."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- small models and texts ---------------------------------------------------------------------------

TEXTS = ["the cat sat on the mat", "a dog ran", "Question: who sat? Answer: the cat",
         "one two three four five six seven", "A. B. C. D."]
PROMPT = "Question: {question} Answer:"
QUESTIONS = [{"question": q, "choices": c, "answer": 1, "where": "here", "subject": "cat", "fact": i}
             for i, (q, c) in enumerate((("who sat?", ["the cat", "a dog", "one two three", "mat"]),
                                         ("the mat on one two who?", ["cat", "dog", "mat", "sat"]),
                                         ("on?", ["one", "two", "three", "four"]),
                                         ("who?", ["cat cat", "dog", "mat", "ran ran ran"])))]


def words(texts=TEXTS):
    """The word-level tokenizer of data/tiny over the words of texts."""
    return script_module("data/tiny/prepare.py").build_tokenizer(texts)


def little_llama(dtype=torch.float64, seed=0, context=64, **more):
    """A random Llama of about 5,000 parameters over words()."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    config = {"vocab_size": len(words()), "hidden_size": 16, "intermediate_size": 24,
              "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": context,
              "initializer_range": 0.3, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**config | more)).to(dtype).eval()


def little_gpt2():
    """A random GPT-2 over words()."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(words()), n_embd=16, n_layer=2, n_head=2,
                                      n_positions=64, bos_token_id=1, eos_token_id=2)).eval()


def text_samples(texts=TEXTS, tokenizer=None):
    """The encoded samples of texts."""
    rows = [{"text": text, "where": "here"} for text in texts]
    return models.encode_rows(tokenizer or words(), rows, 64)


def flat(tensors):
    """One vector of all elements."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def same(one, other):
    """Are two lists of tensors equal bit for bit, NaNs included?"""
    def raw(t):
        return t.detach().flatten().view(torch.uint8)
    return len(one) == len(other) and all(torch.equal(raw(a), raw(b)) for a, b in zip(one, other))


class Network:
    """A small smooth network in fp64 with a loss, its gradient and its Hessian by autograd."""

    def __init__(self, seed=0, dtype=torch.float64):
        g = torch.Generator().manual_seed(seed)

        def rand(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
        self.params = [torch.nn.Parameter(rand(*s)) for s in ((4, 3), (4,), (2, 4))]
        self.x = rand(8, 3)
        self.y = rand(8, 2)

    def loss(self, params):
        w1, b1, w2 = params
        return (torch.tanh(self.x @ w1.T + b1) @ w2.T - self.y).square().mean()

    def closure(self):
        loss = self.loss(self.params)
        loss.backward()
        return loss.detach()

    def gradient(self, at=None, graph=False):
        at = self.params if at is None else at
        return torch.autograd.grad(self.loss(at), at, create_graph=graph)

    def at(self, steps):
        """Fresh leaves at theta + steps."""
        return [(p + step).detach().requires_grad_() for p, step in zip(self.params, steps)]

    def moved(self, direction, radius):
        """Fresh leaves at theta + radius * direction / ||direction||."""
        norm = flat(direction).norm()
        return self.at([radius * d / norm for d in direction])

    def smoothed(self, smoother, *more):
        """The gradient that a smoother leaves."""
        for p in self.params:
            p.grad = None
        smoother(self.closure, *more)
        return flat(p.grad for p in self.params)


# ---- files and scripts --------------------------------------------------------------------------------

def write_rows(path, rows):
    """Write rows as JSON lines, the folder with it; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_json(path):
    return json.loads(Path(path).read_text())


def write_model(folder, model, tokenizer=None):
    """A Hugging Face folder; returns it."""
    model.save_pretrained(folder)
    (tokenizer or words()).save_pretrained(folder)
    return folder


def write_world(folder, model, tokenizer=None):
    """A data folder with a model in it. Returns the flags to run unlearn.py on it."""
    folder = Path(folder)
    write_model(folder / "model", model, tokenizer)
    rows = [{"prompt": t, "completion": f" the cat {t}", "fact": i} for i, t in enumerate(TEXTS)]
    asked = [{k: r[k] for k in ("question", "choices", "answer", "subject")} for r in QUESTIONS]
    for part in ("forget", "retain"):
        write_rows(folder / f"{part}.jsonl", rows)
        write_rows(folder / f"mcq_{part}.jsonl", asked)
    (folder / "meta.json").write_text(json.dumps({"prompt": PROMPT}))
    return ["--model", folder / "model", "--data", folder, "--no-relearn", "--steps", 5,
            "--batch_size", 3, "--warmup", 0]


def run_here(name, *flags):
    """Run a script inside this process (no import time); returns (exit status, stdout, stderr)."""
    out = io.StringIO()
    err = io.StringIO()
    status = 0
    with mock.patch.object(sys, "argv", [name, *map(str, flags)]), contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as e:
            status = e.code or 0
    return status, out.getvalue(), err.getvalue()


def in_python(code, *argv, **env):
    """Run code in a process of its own, in the root of the tree; returns the CompletedProcess."""
    return subprocess.run([sys.executable, "-c", code, *map(str, argv)], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | env)


class Folder(unittest.TestCase):
    """A test with a temporary folder, self.tmp, and scripts that run in this process."""

    def setUp(self):
        self.tmp = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.tmp)

    def run_script(self, name, *flags, says=None):
        """Run a script; `says`: part of the one line of error that it must end with. Returns its stdout,
        or that line."""
        status, out, err = run_here(name, *flags)
        if says is None:
            self.assertEqual(status, 0, err)
            return out
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        self.assertEqual((status, len(lines)), (2, 1), err)
        self.assertIn(says, lines[0])
        return lines[0]


class World(Folder):
    """And with a little model and data for it, which self.flags run unlearn.py on."""

    def setUp(self):
        super().setUp()
        self.world = self.tmp / "world"
        self.model = self.world / "model"
        self.flags = write_world(self.world, little_llama(torch.float32))

    def unlearn(self, name, *flags, says=None):
        """A run in self.tmp / name."""
        return self.run_script("unlearn.py", *self.flags, "--out", self.tmp / name, *flags, says=says)

    def break_off(self, name, at, *flags):
        """Such a run, with Ctrl-C in step `at`, counted from 1."""
        count = itertools.count(1)
        step = optimizers.clipped_step

        def step_or_die(*args):
            if next(count) == at:
                raise KeyboardInterrupt
            return step(*args)
        with mock.patch.object(optimizers, "clipped_step", step_or_die):
            status = run_here("unlearn.py", *self.flags, "--out", self.tmp / name, *flags)[0]
        self.assertEqual(status, 130)

    def result(self, name):
        return read_json(self.tmp / name / "result.json")

    def same_weights(self, *names):
        """Are those of some runs equal bit for bit?"""
        paths = [self.tmp / name / "model.safetensors" for name in names]
        self.assertEqual(len({path.read_bytes() for path in paths}), 1)


# ---- kernels/ by Triton's interpreter -----------------------------------------------------------------

try:
    os.environ["TRITON_INTERPRET"] = "1"    # Triton reads it at import: kernels then run on CPU tensors
    import triton
    from triton.runtime.interpreter import GridExecutor
    triton.knobs.runtime.interpret = True
    mt = sam.kernel_file("multi_tensor")
    adamw = sam.kernel_file("adamw")
except ImportError:  # no Triton for this platform: the tests of kernels/ are skipped
    triton = None
del os.environ["TRITON_INTERPRET"]          # or sam.py and unlearn.py would choose Triton by themselves


# ---- sam.py -------------------------------------------------------------------------------------------

exactly = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
KINDS = list(itertools.product(("l2", "linf"), (False, True), (slice(3), slice(1, 2))))      # subsets
PATHS = (False, True) if triton else (False,)            # by torch, and by the kernels where they run


def v_times(radius, direction, norm):
    """radius * v, with v = d/||d|| over all tensors of d together, or its signs."""
    if norm == "linf":
        return [radius * d.sign() for d in direction]
    size = flat(direction).norm().clamp(min=1e-300)
    return [radius * d / size for d in direction]


def every_smoother(params, **more):
    """Each smoother, one after the other, with a large radius; and how many passes it takes."""
    yield sam.Plain(), 1
    yield sam.SAM(params, 0.3, **more), 2
    yield sam.Momentum(params, 0.3, **more), 1
    yield sam.Momentum(params, 0.3, "linf", **more), 1
    yield sam.Lookahead(params, 0.3, "linf", steps=3, **more), 4
    yield sam.Random(params, 0.3, **more), 1
    yield sam.RS(params, 0.3, samples=5, **more), 5
    yield sam.GP(params, 0.1, 0.3, **more), 2
    yield sam.CR(params, 0.1, 0.3, **more), 4


def call(smoother, closure):
    """smoother(closure), which is the attacker's loss as well where there is one."""
    return smoother(*[closure] * (1 + isinstance(smoother, sam.Lookahead)))


def check_stats(stats, step, direction):
    """Are the norms and the cosine in stats those of a step that was to go along direction?"""
    cosine = step @ direction / step.norm() / direction.norm()
    for name, value in (("norm", direction.norm()), ("applied_norm", step.norm()), ("cosine", cosine)):
        torch.testing.assert_close(stats[name].double(), value.double(), rtol=2e-5, atol=0)


class Smoothers(unittest.TestCase):
    def test_sam_is_the_gradient_at_theta_plus_rho_v_and_says_how_far_it_went(self):
        for norm, flip, part in KINDS:
            net = Network()
            direction = [torch.zeros_like(p) for p in net.params]
            direction[part] = net.gradient()[part]
            step = v_times(-0.1 if flip else 0.1, direction, norm)
            smoother = sam.SAM(net.params, 0.1, norm, perturb=net.params[part], flip=flip)
            exactly(net.smoothed(smoother), flat(net.gradient(net.at(step))))
            size = flat(step).norm().item()
            length = flat(direction).norm().item() if norm == "l2" else size / 0.1
            stats = [smoother.stats[k].item() for k in ("norm", "asked_norm", "applied_norm", "cosine")]
            np.testing.assert_allclose(stats, [length, size, size, 1], rtol=1e-6)

    def test_momentum_moves_along_the_gradient_before_while_the_weights_train(self):
        for norm, flip, part in KINDS:
            net = Network()
            before = [torch.zeros_like(p) for p in net.params]
            smoother = sam.Momentum(net.params, 0.2, norm, perturb=net.params[part], flip=flip)
            for _ in range(3):
                want = net.gradient(net.at(v_times(-0.2 if flip else 0.2, before, norm)))
                exactly(net.smoothed(smoother), flat(want))
                before[part] = want[part]
                for p in net.params:
                    p.grad.add_(p.detach())              # the retain gradient on top: must not be kept
                    p.data.sub_(0.1 * p.grad)

    def test_lookahead_is_the_gradient_after_steps_down_the_attackers_loss(self):
        for norm, flip, steps in itertools.product(("l2", "linf"), (False, True), (1, 3)):
            net = Network()
            other = Network(7)                           # the attacker has data of its own
            at = net.params
            for _ in range(steps):
                move = v_times((0.3 if flip else -0.3) / steps, other.gradient(at), norm)
                at = [(p + m).detach().requires_grad_() for p, m in zip(at, move)]

            def attack():
                other.loss(net.params).backward()
            smoother = sam.Lookahead(net.params, 0.3, norm, flip=flip, steps=steps)
            exactly(net.smoothed(smoother, attack), flat(net.gradient(at)))
            self.assertAlmostEqual(smoother.stats["asked_norm"].item(), flat(move).norm().item())

    def test_gp_and_cr_converge_to_the_exact_gradients_of_their_penalties(self):
        net = Network()
        step = v_times(0.2, net.gradient(), "l2")                              # held fixed, as in CURE
        here = net.gradient(graph=True)
        there = net.gradient([p + s for p, s in zip(net.params, step)], graph=True)
        other = Network()
        gp = functools.partial(sam.GP, other.params, 0.7)
        cr = functools.partial(sam.CR, other.params, 0.7, 0.2)
        for make, vectors in ((gp, here), (cr, [b - a for a, b in zip(here, there)])):
            total = net.loss(net.params) + 0.7 * torch.cat([v.flatten() for v in vectors]).norm()
            want = flat(torch.autograd.grad(total, net.params, retain_graph=True))
            errors = [(other.smoothed(make(r)) - want).norm().item() for r in (1e-3, 1e-4, 1e-5)]
            self.assertLess(errors[2], 1e-4)
            self.assertAlmostEqual(errors[0] / errors[1], 10, delta=1)        # first order in the radius
        exactly(other.smoothed(sam.GP(other.params, 0.2, 0.2)), flat(there))      # which is SAM

    def test_random_and_rs_are_gradients_at_draws_that_follow_the_seed(self):
        net = Network()
        noised = sam.Random(net.params, 0.3, seed=5)
        rs = sam.RS(net.params, 0.1, samples=2, seed=5)
        at = []
        for draw in range(4):
            z = [torch.zeros_like(p) for p in net.params]
            sam.noise_(z, 1.0, sam.draw_seed(5, draw))
            at.append(flat(net.gradient(net.at([0.1 * x for x in z]))))
            if draw in (1, 2):
                exactly(net.smoothed(noised), flat(net.gradient(net.at(v_times(0.3, z, "l2")))))
            if draw in (1, 3):
                exactly(net.smoothed(rs), (at[draw - 1] + at[draw]) / 2)
        exactly(rs.stats["asked_norm"], 0.1 * flat(z).norm())                  # of the last draw
        self.assertEqual((noised.draws, rs.draws), (2, 4))                     # what a run has to save
        self.assertEqual(len({sam.draw_seed(seed, draw) for seed in (0, 5) for draw in (0, 1)}), 4)

    def test_passes_copies_and_the_loss_returned_are_the_documented_ones(self):
        import gc
        p = torch.nn.Parameter(torch.zeros(1234))
        aside = []                                       # bytes, at each pass
        losses = []

        def closure():
            found = {t.data_ptr(): t.nbytes for t in gc.get_objects()
                     if type(t) is torch.Tensor and t.numel() == 1234}
            found.pop(p.data_ptr(), None)                # views of the weights themselves
            aside.append(sum(found.values()))
            loss = (p - 1).square().sum()
            loss.backward()
            losses.append(loss.detach())
            return losses[-1]
        gc.freeze()                                      # look at new objects only, which is fast
        self.addCleanup(gc.unfreeze)
        for smoother, passes in every_smoother([p]):
            for _ in range(2):                           # momentum has nothing to keep before the first
                p.grad = None
                losses.clear()
                returned = call(smoother, closure)
            self.assertEqual(len(losses), passes, smoother)
            self.assertEqual(max(aside[-passes:]), smoother.copies * p.nbytes, smoother)
            own = {sam.RS: losses, sam.Lookahead: losses[-1:]}.get(type(smoother), losses[:1])
            exactly(returned, torch.stack(own).mean())

    def test_every_smoother_restores_bit_for_bit_in_any_dtype_even_when_the_loss_raises(self):
        dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        for dtype, failing in itertools.product(dtypes, (0, 1, 2, 3, 4, 99)):
            net = Network(dtype=dtype)
            before = [p.detach().clone() for p in net.params]
            for smoother, _ in every_smoother(net.params):
                calls = itertools.count()

                def closure():
                    if next(calls) == failing:
                        raise KeyboardInterrupt
                    return net.closure()
                with contextlib.suppress(KeyboardInterrupt):
                    for _ in range(3):
                        call(smoother, closure)
                self.assertTrue(same(before, net.params), (smoother, dtype, failing))
        broken = {net.params[0]: torch.ones(4, 3), net.params[1]: None}      # it fails after one moved
        with self.assertRaises(AttributeError), sam.SAM(net.params, 1.0, "linf").perturbed(broken):
            self.fail("the body must not run")
        self.assertTrue(same(before, net.params))

    def test_ascent_and_noise_tell_what_rounding_left_of_the_step(self):
        for dtype, size in ((torch.float32, 0.01), (torch.bfloat16, 0.01), (torch.bfloat16, 10.0)):
            torch.manual_seed(2)
            params = []
            for shape in ((300, 1000), (77,), ()):       # the first is moved in several pieces
                params.append(torch.nn.Parameter((torch.randn(shape) * 0.05).to(dtype)))
                params[-1].grad = torch.randn(shape).to(dtype)
            before = flat(params).double()
            g = flat(p.grad for p in params).double()
            swallowed = size == 0.01 and dtype == torch.bfloat16
            with sam.SAM(params, size).perturbed() as smoother:
                step = flat(params).double() - before
            check_stats(smoother.stats, step, g)
            self.assertAlmostEqual(smoother.stats["asked_norm"].item(), size, places=6)
            self.assertEqual(smoother.stats["cosine"].item() < 0.9, swallowed)
            z = [torch.zeros_like(p, dtype=sam.accumulator(dtype)) for p in params]
            sam.noise_(z, 1.0, 7)
            stats = sam.noise_(params, size / 100, 7)
            check_stats(stats, flat(params).double() - before, flat(z).double())
            self.assertEqual(stats["cosine"].item() < 0.99, swallowed)

    def test_zero_and_non_finite_directions_leave_the_weights_alone_and_are_told(self):
        p = torch.nn.Parameter(torch.ones(5))
        rows = [("l2", [0.0, 0, 0, 0, 0], [1.0, 1, 1, 1, 1], "0.0"),
                ("l2", [math.nan, 1, 1, 1, 1], [1.0, 1, 1, 1, 1], "nan"),
                ("l2", [-math.inf, 1, 1, 1, 1], [1.0, 1, 1, 1, 1], "inf"),
                ("linf", [1, math.nan, -2, math.inf, 0], [1.5, 1, 0.5, 1, 1], "nan")]
        for path, (norm, gradient, want, told) in itertools.product(PATHS, rows):
            p.grad = torch.tensor(gradient)
            smoother = sam.SAM([p], 0.5, norm, triton=path)
            with np.errstate(invalid="ignore"), smoother.perturbed():
                self.assertEqual(p.tolist(), want)
            self.assertEqual(p.tolist(), [1] * 5)
            self.assertEqual((str(smoother.stats["norm"].item()), smoother.stats["cosine"]), (told, 0))
            self.assertAlmostEqual(smoother.stats["applied_norm"].item(), math.dist(want, [1] * 5), 6)

    def test_frozen_tied_and_gradientless_parameters_and_mixed_dtypes(self):
        for path in PATHS:
            a, frozen, none, empty = map(torch.nn.Parameter, torch.ones(8).split([3, 3, 2, 0]))
            frozen.requires_grad_(False).grad = torch.ones(3)
            b = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
            params = [a, frozen, b, a, none, empty]                        # a is tied: it must move once
            before = [p.detach().clone() for p in params]
            for p, g in ((a, 2.0), (b, 3.0), (empty, 1.0)):
                p.grad = torch.full_like(p, g)
            norm = math.sqrt(3 * 4 + 2 * 9)
            with sam.SAM(params, 5.0, triton=path).perturbed():
                for p, g in ((a, 2), (b, 3), (frozen, 0)):
                    torch.testing.assert_close(p.detach(), torch.full_like(p, 1 + 5 * g / norm))
                none.grad = torch.ones(2)                                      # in the second pass only
            self.assertTrue(same(params, before))
            self.assertTrue(torch.equal(none.grad, torch.ones(2)))

    def test_perturbing_twice_is_an_error(self):
        p = torch.nn.Parameter(torch.ones(2))
        for kind in (sam.SAM, sam.Momentum, sam.Lookahead, sam.Random):
            p.grad = torch.ones(2)
            smoother = kind([p], 0.1)
            with smoother.perturbed():
                there = p.detach().clone()
                self.assertRaises(RuntimeError, smoother.ascent)
                self.assertRaises(RuntimeError, call, smoother, self.fail)     # the closure must not run
                self.assertRaises(RuntimeError, smoother.perturbed().__enter__)
                self.assertTrue(torch.equal(p, there))
                self.assertIsNone(p.grad)
            self.assertTrue(torch.equal(p, torch.ones(2)))

    def test_a_backward_pass_over_weights_that_were_swapped_is_an_error(self):
        net = Network()
        smoother = sam.SAM(net.params, 0.1)
        before = net.loss(net.params)
        net.loss(net.params).backward()
        with smoother.perturbed():
            self.assertRaisesRegex(RuntimeError, "inplace", before.backward)
            inside = net.loss(net.params)
        self.assertRaisesRegex(RuntimeError, "inplace", inside.backward)

    def test_the_weights_are_written_in_place_only_where_that_was_asked_for(self):
        for swap in (True, False):
            net = Network()
            addresses = [p.data_ptr() for p in net.params]
            with mock.patch.object(sam.SAM, "swap", swap):
                smoother = sam.SAM(net.params, 0.1)
            net.loss(net.params).backward()
            with smoother.perturbed():
                self.assertEqual([p.data_ptr() for p in net.params] == addresses, not swap)
            self.assertEqual([p.data_ptr() for p in net.params], addresses)

    def test_noise_is_standard_normal_times_sigma_and_follows_the_seed(self):
        a, b, c = torch.zeros(3, 200_000)
        for tensor, seed in ((a, 1), (b, 1), (c, 2)):
            sam.noise_([tensor], 0.5, seed)
        self.assertTrue(torch.equal(a, b))
        for value, want in ((a.std(), 0.5), (a.mean(), 0), ((a * c).mean(), 0)):
            self.assertAlmostEqual(value.item(), want, delta=0.007)            # 6 standard errors

    def test_weight_average_is_the_fp32_mean_for_any_dtype(self):
        for path, dtype in itertools.product(PATHS, (torch.float32, torch.bfloat16)):
            seen = torch.randn(9, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
            p = torch.nn.Parameter(torch.zeros(100, dtype=dtype))
            average = sam.WA([p], triton=path)
            average.swap()                               # nothing averaged yet: does nothing
            for weights in seen:
                p.data.copy_(weights)
                average.update()
            average.swap()
            want = seen.double().mean(0)
            torch.testing.assert_close(average.mean[0].double(), want, rtol=0, atol=1e-6)
            torch.testing.assert_close(p.detach(), want.to(dtype))


# ---- sam.py in other people's loops -------------------------------------------------------------------
class Loops(unittest.TestCase):
    def test_gradients_in_somebody_elses_memory_are_copied(self):
        """As with DDP's gradient_as_bucket_view: p.grad is a view that every backward pass writes to."""
        net = Network()
        before = flat(net.params).clone()
        for (ours, _), (theirs, _) in zip(every_smoother(net.params), every_smoother(net.params)):
            want = net.smoothed(functools.partial(call, ours))
            sam.take_grads(net.params)
            bucket = torch.zeros(before.numel(), dtype=torch.float64)

            def into_bucket(views=bucket.split([p.numel() for p in net.params])):
                loss = net.loss(net.params)
                for p, view, g in zip(net.params, views, torch.autograd.grad(loss, net.params)):
                    p.grad = view.view_as(p).copy_(g if p.grad is None else p.grad + g)
                return loss.detach()
            call(theirs, into_bucket)
            self.assertTrue(torch.equal(flat(net.params), before))
            torch.testing.assert_close(flat(p.grad for p in net.params), want)

    def test_gradients_that_share_memory_are_restored_and_parameters_that_do_are_refused(self):
        a = torch.nn.Parameter(torch.randn(2, 3))
        b = torch.nn.Parameter(torch.randn(3, 2))
        before = [a.detach().clone(), b.detach().clone()]
        a.grad = torch.ones(2, 3)
        b.grad = torch.nn.Parameter(a.grad.view(3, 2)).detach()
        with sam.SAM([a, b], 0.5).perturbed():
            self.assertFalse(torch.equal(b, before[1]))
        self.assertTrue(same([a, b], before))
        flat_weights = torch.zeros(6)
        one, other = (torch.nn.Parameter(flat_weights[i:i + 4]) for i in (0, 2))
        self.assertRaisesRegex(ValueError, "share memory", sam.SAM, [one, other])
        sam.SAM([one, torch.nn.Parameter(flat_weights[4:])])                     # side by side is fine

    def test_one_autocast_block_around_both_passes_sees_the_moves(self):
        torch.manual_seed(0)
        net = torch.nn.Linear(8, 4)
        x = torch.randn(16, 8)
        params = list(net.parameters())

        def closure():
            loss = net(x).square().mean()
            loss.backward()
            return loss.detach()
        for (ours, passes), (theirs, _) in zip(every_smoother(params), every_smoother(params)):
            net.zero_grad()
            call(ours, torch.autocast("cpu", torch.bfloat16)(closure))           # a block for each pass
            want = net.weight.grad.clone()
            with torch.autocast("cpu", torch.bfloat16):
                closure()  # fills the cache of casts
                net.zero_grad()
                call(theirs, closure)
            torch.testing.assert_close(net.weight.grad, want)

    def test_what_p_grad_held_is_added_to(self):
        one = Network(0)
        other = Network(1)                       # two micro-batches of one set of weights
        other.params = one.params
        for (a, _), (b, _), (c, _), (d, _) in zip(*[every_smoother(one.params) for _ in range(4)]):
            want = one.smoothed(functools.partial(call, a)) + other.smoothed(functools.partial(call, b))
            one.smoothed(functools.partial(call, c))
            call(d, other.closure)
            torch.testing.assert_close(flat(p.grad for p in one.params), want)

    def test_calls_that_mean_something_else_are_refused(self):
        net = torch.nn.Linear(2, 2)
        p = torch.nn.Parameter(torch.zeros(3))
        sgd = torch.optim.SGD([p], lr=0.1)
        for says, make, *args in (("found a tuple", sam.SAM, net.named_parameters()),
                                  ("found a dict", sam.SAM, sgd.param_groups),
                                  ("requires a gradient", sam.SAM, []),
                                  ("perturb", sam.SAM, net.parameters(), 0.1, "l2", [p]),
                                  ("a number", sam.SAM, [p], torch.optim.SGD), ("", sam.SAM, [p], -0.1),
                                  ("", sam.SAM, [p], math.nan), ("", sam.SAM, [p], 0.1, "l1"),
                                  ("", sam.RS, [p], -1.0), ("", sam.RS, [p], 1.0, 0),
                                  ("", sam.GP, [p], -1.0), ("", sam.GP, [p], 1, 0.0),
                                  ("", sam.CR, [p], 1, 0.1, 0.0),
                                  ("", functools.partial(sam.Lookahead, steps=0), [p])):
            self.assertRaisesRegex(ValueError, says, make, *args)
        for name in ("_is_flat_param", "_fsdp_flattened"):  # what FSDP1 writes on its parameters
            flattened = torch.nn.Parameter(torch.zeros(3))
            setattr(flattened, name, True)
            self.assertRaisesRegex(ValueError, "FSDP2", sam.SAM, [flattened])
        table = torch.nn.Embedding(5, 2, sparse=True)
        s = sam.SAM(table.parameters(), 0.1)
        table(torch.tensor([1])).sum().backward()
        self.assertRaisesRegex(ValueError, "sparse=False", s.ascent)


# ---- kernels/: by Triton's interpreter, on CPU tensors ---------------------------------------------

SIZES = [0, 1, 7, 63, 64, 65, 200]          # with chunk 64, which is fast, some have several chunks
LARGE = [1023, 1024, 1025, 32769]           # around the block and the chunk that are shipped
HALF = torch.bfloat16
FULL = torch.float32


def randn(sizes, dtype=FULL, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, generator=g) * scale).to(dtype) for n in sizes]


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def agree(ours, theirs, exact=False):
    """fp32 bit for bit; bf16 to the last bit unless exact, as the interpreter cuts off fp32 instead."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7 if a.dtype == HALF and not exact else 0, atol=0)


@contextlib.contextmanager
def launches():
    """The names of the kernels that run inside, where only the interpreter may read a tensor's value."""
    run = GridExecutor.__call__
    names = []
    waits = mock.Mock(side_effect=AssertionError("waits for the device"))
    reads = "item cpu tolist numpy __bool__ __float__ __int__ __index__ __array__ nonzero"
    guard = mock.patch.multiple(torch.Tensor, **dict.fromkeys(reads.split(), waits))

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        guard.__exit__(None, None, None)
        run(self, *args, **kwargs)
        guard.__enter__()
    with mock.patch.object(GridExecutor, "__call__", counted), guard:
        yield names


def five_views(buffer):
    """Off alignment, of odd size, transposed, 0-dim and with a dimension of 1."""
    return [buffer[1:100], buffer[101:104], buffer[110:240].view(10, 13).T, buffer[250],
            buffer[260:272].view(3, 4, 1)]


@unittest.skipUnless(triton, "triton is not installed here")
class Kernels(unittest.TestCase):
    def test_philox_gives_the_published_words(self):
        """Known answers of Random123 1.14, philox4x32 with 10 rounds."""
        pi = (0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344)
        known = [(0, (0,) * 4, (0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8)),
                 (2**64 - 1, (2**32 - 1,) * 4, (0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd)),
                 (0x299f31d0a4093822, pi, (0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1))]
        for module, (seed, counters, want) in itertools.product((mt, adamw), known):
            words = module.philox_ref(seed, *map(torch.tensor, counters))
            self.assertEqual(tuple(map(int, words)), want)

    def test_ascent_moves_saves_measures_and_restores(self):
        for sizes, dtype, given, linf, reuse in (
                (SIZES, FULL, FULL, False, True), (SIZES, HALF, HALF, False, True),
                (SIZES, FULL, FULL, True, True), (SIZES, HALF, HALF, True, True),
                (SIZES, HALF, FULL, False, True), (SIZES, HALF, torch.int8, True, True),
                (SIZES, FULL, FULL, False, False), (LARGE, FULL, FULL, False, True)):
            w = randn(sizes, dtype, 1, 0.05)
            d = randn(sizes, given, 2, 3)
            d[3][:3] = 0                                                        # sign(0) = 0
            old = copies(w)
            kept = copies(d)
            saved = []
            rho = 0.02 if linf else 0.5
            chunk = mt.CHUNK if sizes is LARGE else 64
            tied = [[*w, w[3]], [*d, d[3]]]                                     # moves once all the same
            stats = mt.ascent_(*tied, rho, saved, reuse, linf=linf, chunk=chunk)
            scale = rho if linf else rho / (stats["norm"] + 1e-12)
            agree(w, [mt.ascent_ref(x, y, scale, linf) for x, y in zip(old, kept)])
            along = flat(kept).double()
            check_stats(stats, flat(w).double() - flat(old).double(), along.sign() if linf else along)
            self.assertTrue(same(d, old if reuse and dtype == given else kept))     # in its memory?
            mt.restore_(saved, chunk=chunk)
            self.assertTrue(same(w, old) and not saved)

    def test_swapping_gives_bit_for_bit_what_moving_in_place_does_and_writes_no_weights(self):
        kinds = [(FULL, False), (HALF, False), (FULL, True), (HALF, True), (torch.int8, True)]
        for dtype, kind, reuse, ops in itertools.product((FULL, HALF), kinds, (False, True), (sam, mt)):
            given, linf = kind
            first = randn(SIZES, dtype, 1, 0.05)
            d = randn(SIZES, given, 2, 3)
            saved = []
            want = copies(first)
            stats = ops.ascent_(want, copies(d), 0.5, saved, reuse, linf=linf)
            params = list(map(torch.nn.Parameter, copies(first)))
            places = [p.data_ptr() for p in params]
            weights = [p.detach() for p in params]
            along = copies(d)
            swapped = []
            told = ops.ascent_(params, along, 0.5, swapped, reuse, linf=linf, swap=True)
            self.assertTrue(same(params, want) and same(weights, first))
            self.assertTrue(same(list(told.values()), list(stats.values())))
            own = [p.data_ptr() == x.data_ptr() for p, x in zip(params, along) if p.numel()]
            self.assertEqual(own, [reuse and given == dtype] * len(own))
            with torch.no_grad():
                params[0].add_(1)                                    # whoever writes there, writes beside
            ops.restore_(swapped, swap=True)
            self.assertTrue(same(params, first) and [p.data_ptr() for p in params] == places)

    def test_misaligned_transposed_and_scalar_views_move_and_nothing_around_them(self):
        around = torch.ones(300, dtype=torch.bool)
        for view in five_views(around):
            view.fill_(False)
        before = randn([300], seed=3)[0]
        old = five_views(before)
        d = five_views(randn([300], seed=4)[0])
        third = [(y - x) / 3 for x, y in zip(old, d)]
        z = []
        for i, x in enumerate(old):
            z.append(mt.noise_ref(x.numel(), i, 9).float().as_strided(x.shape, x.stride()))
        saved = []
        norm = flat(d).norm().item()
        for step, near, move, *args in ((d, 1e-6, mt.ascent_, d, norm, saved, False),
                                        (z, 1e-5, mt.noise_, 1, 9), (third, 0, mt.running_mean_, d, 3)):
            buffer = before.clone()
            move(five_views(buffer), *args, chunk=64)
            want = [x + y for x, y in zip(old, step)]
            torch.testing.assert_close(five_views(buffer), want, rtol=0, atol=near)
            self.assertTrue(same([buffer[around]], [before[around]]))
        self.assertTrue(same([x for _, x in saved], old))

    def test_gaps_other_orders_dtypes_devices_and_chunks_are_refused(self):
        buffer = randn([300], seed=3)[0]
        column = buffer[:20].view(4, 5)[:, 1]
        row = buffer[:12].view(3, 4)
        for w, d in ((column, column.clone()), (row, row.T.contiguous().T), (row, row.view(4, 3)),
                     (buffer[:1].expand(5), torch.ones(5))):
            self.assertRaisesRegex(ValueError, "gaps or another order", mt.ascent_, [w], [d], 1.0, [])
        for chunk in (0, 8, 48, -64, 64.0):
            self.assertRaisesRegex(ValueError, "power of two from 16", mt.noise_, [row], 1.0, 0, chunk)
            self.assertRaisesRegex(ValueError, "power of two from 16", adamw.adamw_, [], None, chunk)
        with mock.patch.object(mt, "INTERPRETED", False):
            self.assertRaisesRegex(ValueError, "on cpu: .*GPU tensors", sam.operations, [row], True)
        self.assertRaises(AssertionError, mt.restore_, [(row, row.bfloat16())])
        self.assertRaises(AssertionError, mt.running_mean_, [row.bfloat16()], [row], 3)
        self.assertTrue(same([buffer], randn([300], seed=3)))
        self.assertIn("gaps", mt.usable([column]))
        self.assertIn("float64", mt.usable([torch.ones(3).double()]))
        self.assertIsNone(mt.usable([row.T, torch.ones(()), torch.ones(2, 0, 3), row[None, :, None]]))

    def test_noise_follows_seed_tensor_and_element_alone_and_tells_what_rounding_left(self):
        """In bf16 a sigma of 1e-4 on weights of about 1 moves few of them, a lot each."""
        seed = 2**62 + 3
        moved = []
        for sizes, dtypes, sigma, chunk in (
                (SIZES, (FULL,), 0.5, 64), (SIZES, (FULL,), 0.5, 16), (SIZES, (HALF,), 1e-4, 256),
                (LARGE, (FULL, HALF), 0.1, mt.CHUNK)):
            w = [x.to(dtypes[i % len(dtypes)]) for i, x in enumerate(randn(sizes))]
            old = copies(w)
            z = [mt.noise_ref(n, i, seed) for i, n in enumerate(sizes)]
            stats = mt.noise_(w, sigma, seed, chunk=chunk)
            for new, x, draw in zip(w, old, z):
                rtol = 2**-7 if new.dtype == HALF else 0
                torch.testing.assert_close(new.double(), x + sigma * draw, rtol=rtol, atol=2e-6)
            step = torch.cat([new.double() - x.double() for new, x in zip(w, old)])
            check_stats(stats, step, torch.cat(z))
            self.assertEqual(stats["cosine"].item() < 0.5, sigma == 1e-4)
            moved.append(w)
        self.assertTrue(same(moved[0], moved[1]))                              # whatever the chunk

    def test_noise_has_the_moments_and_the_tails_of_the_normal(self):
        """2**24 draws, within 5 standard errors; a word's radius has 20 bits, which end at 5.4."""
        count = 2**24
        powers = torch.zeros(6, dtype=torch.double)
        beyond = torch.zeros(4)
        product = 0.0
        largest = 0.0
        limits = (3, 4, 4.5, 5)
        for start in range(0, count, 2**18):
            z = mt.noise_ref(2**18, 1, 7920, start)
            power = torch.ones_like(z)
            for k in range(6):
                power *= z
                powers[k] += power.sum()
            beyond += torch.tensor([(z.abs() > limit).sum() for limit in limits])
            product += (z[:-1] * z[1:]).sum().item()
            largest = max(largest, z.abs().max().item())
        moments = [1, 0, 1, 0, 3, 0, 15, 0, 105, 0, 945, 0, 10395]
        for k, found in enumerate(powers.tolist(), 1):
            error = math.sqrt((moments[2 * k] - moments[k]**2) / count)
            self.assertAlmostEqual(found / count, moments[k], delta=5 * error)
        for limit, found in zip(limits, beyond.tolist()):
            want = count * math.erfc(limit / math.sqrt(2))
            self.assertAlmostEqual(found, want, delta=5 * math.sqrt(want))
        self.assertAlmostEqual(product / count, 0, delta=5 / math.sqrt(count))         # of neighbours
        self.assertTrue(5.2 < largest < 5.4)

    def test_more_than_2_to_the_31_elements(self):
        """The map of fake sizes by a loop, and a kernel on the last chunk of a tensor of 2**35 + 7."""
        sizes = (3 * 2**30, 0, 5, 2**32 + 1)
        want = [(tensor, i) for tensor, size in enumerate(sizes) for i in range(0, size, 2**20)]
        for module in (mt, adamw):
            owner, start = module.chunk_map(sizes, torch.device("cpu"), 2**20)
            self.assertEqual(list(zip(owner.tolist(), start.tolist())), want)
        start = 2**35
        buffer = torch.zeros(7)
        head = [torch.tensor([[start + 7, buffer.data_ptr() - 4 * start, 11]]),
                torch.zeros(1, dtype=torch.int32), torch.tensor([start])]
        part = torch.zeros(1, 3)
        mt._noise_kernel[(1,)](*head, part, 5, 1.0, A=mt.tl.float32, ALIGNED=False, CHUNK=64, BLOCK=64)
        torch.testing.assert_close(buffer.double(), mt.noise_ref(7, 11, 5, start), rtol=0, atol=1e-5)
        torch.testing.assert_close(part[0], buffer.square().sum().expand(3))      # step = z here

    def test_each_operation_is_one_launch_a_pair_of_dtypes_and_reads_nothing_back(self):
        params = list(map(torch.nn.Parameter, randn([3, 70, 1, 130]) + randn([5, 80, 2], HALF)))

        def backward():
            for p in params:
                p.grad = torch.ones_like(p)

        def there_and_back(norm):
            backward()
            with sam.SAM(params, 0.1, norm, triton=True).perturbed() as smoother:
                backward()
            self.assertRaisesRegex(AssertionError, "waits", smoother.stats["norm"].item)  # guarded
        mean = [p.detach().float() for p in params]
        fours = adam_rows([3, 70], (FULL,) * 4) + adam_rows([5, 8], (HALF,) * 4)
        rows = [(*four, adamw.scalars(1, 0.1, (0.9, 0.9), 1e-8, 0), 0, 1) for four in fours]
        clipped = (rows, 5, adamw.CHUNK, torch.tensor(0.5))
        for kernels, work, *args in (("noise", mt.noise_, params, 0.1, 1), ("adamw", adamw.adamw_, rows),
                                     ("adamw", adamw.adamw_, *clipped),
                                     ("sumsq ascent", there_and_back, "l2"),
                                     ("ascent", there_and_back, "linf"),
                                     ("copy", mt.running_mean_, mean, params, 2)):
            with launches() as names:
                work(*args)
            self.assertEqual(names, [f"_{kernel}_kernel" for kernel in kernels.split() for _ in "12"])

    def test_whatever_is_raised_the_weights_come_back_bit_for_bit(self):
        launch = mt._launch
        for where in ("body", "before", "second", "after"):
            params = list(map(torch.nn.Parameter, randn([70, 9]) + randn([5], HALF)))       # 2 launches
            before = copies(params)
            ascents = iter(("before", "second"))

            def failing(kernel, *args, **kwargs):
                moves = kernel is mt._ascent_kernel
                if moves and next(ascents) == where:
                    raise KeyboardInterrupt
                launch(kernel, *args, **kwargs)
                if moves and where == "after":
                    raise KeyboardInterrupt
            s = sam.SAM(params, 0.5, triton=True)
            for p in params:
                p.grad = torch.ones_like(p)
            with mock.patch.object(mt, "_launch", failing), self.assertRaises(KeyboardInterrupt):
                with s.perturbed():
                    self.assertFalse(same(params, before))
                    raise KeyboardInterrupt
            self.assertTrue(same(params, before) and not s.saved, where)

    def test_smoothers_by_kernels_are_bit_for_bit_those_in_torch(self):
        """With the kernels' norm, as torch's sums in another order; those with noise nearly."""
        def noise(params, sigma, seed):
            """Philox's, as of the kernels."""
            for i, p in enumerate(params):
                p.data += sigma * mt.noise_ref(p.numel(), i, seed).float().view(p.shape)
            return {"norm": torch.zeros(())}
        one = Network(dtype=FULL)
        other = Network(dtype=FULL)
        with mock.patch.multiple(sam, noise_=noise, global_norm=mt.global_norm):
            for (ours, _), (theirs, _) in zip(every_smoother(one.params, triton=True),
                                              every_smoother(other.params, triton=False)):
                for _ in range(2):                                   # the second with momentum
                    got = one.smoothed(functools.partial(call, ours))
                    want = other.smoothed(functools.partial(call, theirs))
                near = 1e-5 if hasattr(ours, "draws") else 0
                torch.testing.assert_close(got, want, rtol=near, atol=near)
                self.assertTrue(same(one.params, other.params))

    def test_the_path_is_torch_unless_a_gpu_the_interpreter_or_the_caller_says_so(self):
        p = torch.ones(3)
        self.assertEqual(sam.operations([p])[0].__name__, "torch")
        self.assertIs(sam.operations([p], True)[0], mt)
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            self.assertIs(sam.operations([p])[0], mt)
            self.assertEqual(sam.operations([p], False)[0].__name__, "torch")
            self.assertEqual(sam.operations([p.double()])[0].__name__, "torch")
        self.assertRaisesRegex(ValueError, "float64", sam.operations, [p.double()], True)

    def test_a_cuda_graph_is_refused_as_it_would_replay_old_addresses(self):
        with mock.patch.object(torch.cuda, "is_available", return_value=True), \
                mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True):
            self.assertRaisesRegex(RuntimeError, "CUDA graph", mt.global_norm, randn([3]))
            step = adamw.AdamW(randn([3]), triton=False).step
            self.assertRaisesRegex(RuntimeError, "CUDA graph", step)

    def test_without_a_c_compiler_usable_says_what_to_do_after_one_trial_a_device(self):
        """Tensors say that they lie on a GPU, and every launch meets what Triton raises."""
        self.addCleanup(mt._trial.cache_clear)
        missing = RuntimeError("Failed to find C compiler.\nPlease")
        for error, want in ((missing, "RuntimeError: Failed to find C compiler.*gcc"), (None, "None")):
            mt._trial.cache_clear()
            with mock.patch.object(torch.Tensor, "is_cuda", True), \
                    mock.patch.object(mt, "INTERPRETED", False), \
                    mock.patch.object(mt, "_launch", side_effect=error) as launch:
                for _ in range(3):
                    self.assertRegex(str(mt.usable(randn([5, 6]))), want)
            self.assertEqual(launch.call_count, 1)

    def test_fsdp_shards_act_as_the_whole_model(self):
        """Two processes, each with half of every tensor, and of the last bias one with nothing."""
        code = """if True:
            import copy, os, sys, torch, sam
            from torch.distributed.fsdp import fully_shard
            mt, adamw = sam.kernel_file("multi_tensor"), sam.kernel_file("adamw")
            rank = int(os.fork() == 0)
            file = "file://" + sys.argv[1]
            torch.distributed.init_process_group("gloo", init_method=file, rank=rank, world_size=2)
            mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
            torch.manual_seed(0)
            whole = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
            split = copy.deepcopy(whole)
            x = torch.randn(8, 5)
            for module in (split[0], split[2], split):
                fully_shard(module, mesh=mesh)
            def weights(model):
                tensors = (p.full_tensor() if model is split else p for p in model.parameters())
                return [t.detach().clone() for t in tensors]
            found = []
            for model, triton in ((whole, False), (split, True)):
                params = list(model.parameters())
                optimizer = adamw.AdamW(params, lr=0.1, triton=triton)
                before = weights(model)
                model(x).square().mean().backward()
                with sam.SAM(params, 0.3, triton=triton).perturbed() as smoother:
                    there = weights(model)
                    model(x).square().mean().backward()
                assert all(map(torch.equal, before, weights(model)))
                optimizer.step()
                found.append([there, weights(model), dict(smoother.stats)])
                assert not torch.equal(before[0], there[0])
            torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)
            before = weights(split)
            stats = mt.noise_(params, 1.0, 3)
            moved = [a - b for a, b in zip(weights(split), before)]
            assert not torch.allclose(*moved[0].chunk(2), atol=0.1), "both shards drew the same noise"
            norm = torch.cat([t.flatten() for t in moved]).norm()
            torch.testing.assert_close(stats["norm"], norm, rtol=1e-5, atol=0)
            torch.distributed.destroy_process_group()
            print("fine")
        """
        with tempfile.TemporaryDirectory() as folder:
            run = in_python(code, f"{folder}/store", TRITON_INTERPRET="1")
        self.assertEqual(run.stdout.count("fine"), 2, run.stderr)

    def test_the_report_passes_what_is_shipped_and_misses_narrow_accesses(self):
        code = """if True:
            import sys
            sys.path.append("kernels")
            import report
            for target in report.TARGETS[1::2]:
                for aligned in (True, False):
                    row = report.compiled(report.variants()[0], target, aligned)
                    print(row["kernel"], row["target"], row["access_bytes"], report.misses(row))
                    assert 1 < row["instructions"] < 18, row                # it adds up squares
                    assert row["limit"].startswith("bytes 0."), row
            sass = ["LDG.E.128 R12, desc[UR12][R18.64] ;", "@P0 STG.E.U16 [R2.64], R5 ;", "LDG.E R0, [R2]"]
            print(report.accesses(sass), report.limit(90, 4.54, 1), report.limit(90, 18.16, 1))
        """
        run = in_python(code)
        want = ["sm_90 16 False", "sm_90 2 True", "gfx942 16 False", "gfx942 2 True"]
        want = [*(f"norm bf16 {row}" for row in want), "[16, 2, 4] bytes 0.50 instructions 2.00"]
        self.assertEqual(run.stdout.splitlines(), want, run.stderr)

    def test_every_file_works_copied_out_alone_and_without_triton(self):
        code = """if True:
            import sys
            sys.path[:1] = sys.argv[1:]                                 # instead of this tree
            sys.modules["triton"] = None                                # as where it is not installed
            import torch, unittest, adamw, sam
            p = torch.nn.Parameter(torch.ones(3))
            p.grad = torch.ones(3)
            with sam.SAM([p], 3**0.5).perturbed():
                print(p[0].item())
            p.grad = torch.ones(3)
            adamw.AdamW([p], lr=0.5, weight_decay=0.0).step()
            print(round(p[0].item(), 3), sam.operations([p]))
            unittest.TestCase().assertRaises(ValueError, adamw.AdamW, [p], triton=True)
            del sys.modules["triton"], sys.modules["adamw"]
            import adamw, multi_tensor as mt
            adamw.AdamW([p], lr=0.25, weight_decay=0.0, triton=True).step()
            saved = []
            mt.ascent_([p], [torch.ones(3)], 3**0.5, saved)
            print(round(p[0].item(), 3))
            mt.restore_(saved)
            print(round(p[0].item(), 3))
        """
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for name in ("sam.py", "kernels/adamw.py", "kernels/multi_tensor.py"):
                paths.append(Path(folder, Path(name).stem))
                paths[-1].mkdir()
                shutil.copy(ROOT / name, paths[-1])
            run = in_python(code, *paths, TRITON_INTERPRET="1")
        want = r"^2.0\n0.5 .*'torch'.*multi_tensor.py.*\n1.25\n0.25\n$"
        self.assertRegex(run.stdout, want, run.stderr)


def adam_rows(sizes, dtypes, seed=0):
    """[[w, g, m, v]], weights of the size that language models have."""
    rows = []
    for i, n in enumerate(sizes):
        scales = (0.02, 1, 0.5, 1)
        row = [randn([n], d, seed + 10 * i + j, scales[j])[0] for j, d in enumerate(dtypes)]
        rows.append([*row[:3], row[3].abs()])
    return rows


@unittest.skipUnless(triton, "triton is not installed here")
class AdamW(unittest.TestCase):
    def test_the_kernel_is_the_reference_bit_for_bit(self):
        for dtypes, seed in (((FULL,) * 4, 5), ((HALF, HALF, FULL, FULL), 5),
                             ((HALF, FULL, FULL, FULL), None), ((HALF,) * 4, 2**62 + 5)):
            ours = adam_rows(SIZES, dtypes)
            buffer = torch.zeros(400, dtype=dtypes[0])              # a transposed weight off alignment
            last = [x.view(6, 13).T for x in adam_rows([78], dtypes, 9)[0]]
            last[0] = buffer[1:79].view(6, 13).T.copy_(last[0])
            ours.append(last)
            theirs = list(map(copies, ours))
            rests = [(adamw.scalars(t + 1, 5e-6, (0.9, 0.99), 1e-8, 0.1), t, t + 1)
                     for t in range(len(ours))]
            adamw.adamw_([(*row, *rest) for row, rest in zip(ours, rests)], seed, chunk=64)
            for row, other, rest in zip(ours, theirs, rests):
                adamw.adamw_ref(*other, *rest, seed)
                agree(row[:1], other[:1], exact=seed)
                agree(row[1:], other[1:])
            self.assertTrue(buffer[1:79].any() and not buffer[:1].any() and not buffer[79:].any())

    def test_other_orders_and_dtypes_are_refused(self):
        w, g, m, v = adam_rows([20], (FULL,) * 4)[0]
        rest = (adamw.scalars(1, 1, (0, 0), 0, 0), 0, 1)
        for row, why in (((w.view(4, 5).T, g, m, v), "strides"), ((w[::2], g[::2], m, v), "strides"),
                         ((w, g, m, v.view(4, 5)), "strides"), ((w, g[:10], m, v), "strides"),
                         ((w.double(), g, m, v), "float64"), ((w, g, m.bfloat16(), v), "bfloat16")):
            self.assertRaisesRegex(ValueError, why, adamw.adamw_, [(*row, *rest)])
        with mock.patch.object(adamw, "INTERPRETED", False):
            self.assertRaisesRegex(ValueError, "GPU tensors", adamw.adamw_, [(w, g, m, v, *rest)])
        self.assertRaises(ValueError, adamw.AdamW, [torch.nn.Parameter(w)], lr=-1.0)

    def groups(self, params):
        return [{"params": params[:1], "lr": 0.01, "weight_decay": 0.3},
                {"params": params[1:], "betas": (0.8, 0.95), "eps": 1e-3}]

    def test_steps_are_those_of_torch_in_fp64(self):
        """Groups with rates and decays of their own, and a parameter that has no gradient at first."""
        params = list(map(torch.nn.Parameter, randn([30, 5, 9], scale=0.1)))
        exact = [torch.nn.Parameter(p.detach().double()) for p in params]
        for path in PATHS:
            one = adamw.AdamW(self.groups(params), triton=path)
            other = torch.optim.AdamW(self.groups(exact))
            for step in range(4):
                for i, (p, q) in enumerate(zip(params, exact)):
                    if i != 2 or step > 1:
                        p.grad = randn([p.numel()], seed=10 * step + i)[0]
                        q.grad = p.grad.double()
                self.assertEqual(one.step(lambda: 7.0), 7.0)
                other.step()
                one.param_groups[0]["lr"] = 0.02
                other.param_groups[0]["lr"] = 0.02
            for p, q in zip(params, exact):
                torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-5, atol=1e-7)
            self.assertEqual([one.state[p]["step"] for p in params], [4, 4, 2])
            one.zero_grad()
            other.zero_grad()

    def test_a_clipped_step_is_a_step_on_clipped_gradients_which_it_leaves_as_they_are(self):
        for clip, path in itertools.product((0.5, 1e3), PATHS):
            params = list(map(torch.nn.Parameter, randn([30, 5, 9], scale=0.1)))
            others = [torch.nn.Parameter(p.detach().clone()) for p in params]
            exact = [torch.nn.Parameter(p.detach().double()) for p in params]
            one = adamw.AdamW(params, lr=0.01, triton=path)
            other = adamw.AdamW(others, lr=0.01, triton=False)
            torchs = torch.optim.AdamW(exact, lr=0.01)
            for step in range(3):
                grads = randn([30, 5, 9], seed=step)
                for p, q, r, g in zip(params, others, exact, grads):
                    p.grad = g.clone()
                    q.grad = g.clone()
                    r.grad = g.double()
                norm = torch.nn.utils.get_total_norm(grads)
                one.step(coefficient=adamw.clip_coefficient(norm, clip))
                self.assertTrue(same([p.grad for p in params], grads))
                for optimizer, weights in ((other, others), (torchs, exact)):
                    torch.nn.utils.clip_grad_norm_(weights, clip)
                    optimizer.step()
            for p, q, r in zip(params, others, exact):
                self.assertTrue(same([p, *one.state[p].values()], [q, *other.state[q].values()]))
                torch.testing.assert_close(p.detach().double(), r.detach(), rtol=1e-5, atol=1e-7)
            self.assertEqual(one.skipped, 0)

    def test_the_coefficient_is_that_of_torch_and_zero_for_a_norm_that_is_not_finite(self):
        for norm, clip in itertools.product((0.0, 0.3, 1.0, 7.0, 1e30), (0.1, 1, 1e4)):
            p = torch.nn.Parameter(torch.zeros(1))
            p.grad = torch.ones(1)
            torch.nn.utils.clip_grads_with_norm_([p], clip, torch.tensor(norm))
            self.assertTrue(same([adamw.clip_coefficient(torch.tensor(norm), clip)[None]], [p.grad]))
        for norm, clip in itertools.product((math.inf, math.nan), (0, 1.0)):
            self.assertEqual(adamw.clip_coefficient(torch.tensor(norm), clip), 0)
        self.assertEqual(adamw.clip_coefficient(torch.tensor(7.0, dtype=HALF), 0), 1)

    def test_a_coefficient_of_zero_inf_or_nan_moves_nothing_and_is_counted(self):
        for path, dtype in itertools.product(PATHS, (FULL, HALF)):
            params = list(map(torch.nn.Parameter, randn([70, 5], dtype, scale=0.02)))
            optimizer = adamw.AdamW(params, lr=0.1, stochastic_rounding=True, triton=path)
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            self.assertIsNone(optimizer.skipped)
            kept = list(params)
            for p in params:
                kept += [optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]]
            before = copies(kept)
            for coefficient in (0.0, -0.0, math.inf, -math.inf, math.nan):
                params[0].grad[3] = coefficient                          # as where such a norm comes from
                optimizer.step(coefficient=torch.tensor(coefficient))
            self.assertTrue(same(kept, before))
            self.assertEqual((optimizer.skipped, optimizer.state[params[0]]["step"]), (5, 6))
            params[0].grad[3] = 1
            optimizer.step(coefficient=torch.tensor(0.5))
            self.assertFalse(any(map(torch.equal, kept, before)))
            self.assertEqual(optimizer.skipped, 5)

    def test_a_tensor_off_alignment_has_a_launch_of_its_own_and_the_others_keep_wide_accesses(self):
        rows = []
        for tensor, four in enumerate(adam_rows([40, 7, 9], (FULL,) * 4)):
            rows.append((*four, adamw.scalars(1, 0.1, (0.9, 0.9), 1e-8, 0), tensor, 1))
        rows[1] = (torch.zeros(8)[1:], *rows[1][1:])
        with mock.patch.object(adamw, "_adamw_kernel", mock.MagicMock()) as kernel:
            adamw.adamw_(rows)
        found = []
        for launch in kernel.__getitem__.return_value.call_args_list:
            table = launch.args[0].view(-1, 8)
            found.append((launch.kwargs["ALIGNED"], table[:, 5].tolist()))
        self.assertEqual(found, [(True, [0, 2]), (False, [1])])

    def test_stochastic_rounding_is_exact_on_average_and_between_neighbours(self):
        """Over all 65,536 random words the mean of the rounded value is the value, to the last bit."""
        bits = torch.arange(65536, dtype=torch.int32)
        for x in (0.02, -0.02, 0.0199995, 1.0, -3e-39, 123.456, 2.0**-126, 0.0, -1e30):
            x = torch.tensor(x)
            rounded = adamw.stochastic_round_ref(x.expand(65536).contiguous(), bits).double()
            self.assertEqual(rounded.mean().item(), x.double().item())
            self.assertLessEqual(len(rounded.unique()), 2)
            self.assertIn(x.bfloat16().double(), rounded)
        for b in (0, 65535):
            x = torch.tensor([0x7f800000, -0x800000, 0x7f800001, 0x7fffffff]).int().view(FULL)
            rounded = adamw.stochastic_round_ref(x, torch.tensor(b).int())
            self.assertEqual(str(rounded.tolist()), "[inf, -inf, nan, nan]")
        words = adamw.random_bits_ref(400_000, 2, 7, 1)
        self.assertTrue(0 <= words.min() and words.max() < 65536)
        counts = torch.bincount(words // 4096, minlength=16)
        self.assertLess(((counts - 25_000).double() ** 2 / 25_000).sum(), 45)     # chi2, 15 degrees
        for other in (adamw.random_bits_ref(400_000, 3, 7, 1), adamw.random_bits_ref(400_000, 2, 8, 1)):
            self.assertAlmostEqual(np.corrcoef(words, other)[0, 1], 0, delta=0.01)

    def test_bf16_at_a_small_rate_loses_most_steps_to_nearest_and_none_on_average(self):
        """At lr 5e-6 on weights of N(0, 0.02), as models begin: to nearest only the 8% smallest move."""
        w, g = randn([400_000], HALF, 1, 0.02) + randn([400_000], HALF, 2)
        share = {}
        for name, kind, flags in (("torch", torch.optim.AdamW, {}), ("nearest", adamw.AdamW, {}),
                                  ("stochastic", adamw.AdamW, {"stochastic_rounding": True})):
            p = torch.nn.Parameter(w.clone())
            p.grad = g.clone()
            kind([p], lr=5e-6, weight_decay=0.0, **flags).step()
            step = (p.detach() - w).double()
            share[name] = (step != 0).double().mean().item()
            gain = -(step * g.sign()).mean().item() / 5e-6
        self.assertLess(max(share["torch"], share["nearest"]), 0.1)
        self.assertAlmostEqual(gain, 1, delta=0.05)                                # 6 standard errors

    def test_a_saved_state_goes_on_bit_for_bit_with_its_dtype(self):
        start = randn([50], HALF, scale=0.02)[0]
        make = functools.partial(adamw.AdamW, lr=1e-3, stochastic_rounding=True, state_dtype=FULL)
        ends = []
        for seed, breaks in ((3, False), (3, True), (4, True)):
            p = torch.nn.Parameter(start.clone())
            optimizer = make([p], seed=3)
            for step in range(6):
                if step == 3 and breaks:
                    saved = io.BytesIO()
                    torch.save(optimizer.state_dict(), saved)
                    saved.seek(0)
                    optimizer = make([p], seed=seed)
                    optimizer.load_state_dict(torch.load(saved))
                p.grad = randn([50], HALF, step)[0]
                optimizer.step()
            ends.append([p, *optimizer.state[p].values()])
        self.assertTrue(same(ends[0], ends[1]))
        self.assertFalse(same(ends[0][:1], ends[2][:1]))                  # another seed, other bits


# ---- data/losses.py -----------------------------------------------------------------------------------

def nll(model, ids, reduction="mean"):
    """Negative log-probability of the tokens of a sample, the sample alone."""
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(ids[1:]), reduction=reduction)


class Losses(unittest.TestCase):
    def test_values_by_hand_and_the_published_gradient_of_npo(self):
        """All but ga are c/beta log(1 + e^x). NPO paper, eq. 4: its gradient is that of ga times
        2 p^beta / (p^beta + p_ref^beta)."""
        args = SimpleNamespace(beta=0.5, margin=0.3)
        chosen = {"logp": torch.tensor([-3.0, -3.0]), "ref": torch.tensor([-3.5, -4.0])}
        logp = torch.tensor([-1.0, -2.0], requires_grad=True)
        batch = {"logp": logp, "ref": torch.tensor([-1.5, -1.0]), "chosen": chosen}
        want = {"ga": [-1, -2], "graddiff": [-1, -2], "npo": 4 * np.logaddexp(0, [0.5 * 0.5, 0.5 * -1]),
                "simnpo": 4 * np.logaddexp(0, [0.5 * -1 + 0.3, 0.5 * -2 + 0.3]),
                "dpo": 2 * np.logaddexp(0, [-0.5 * (0.5 - 0.5), -0.5 * (1 + 1)])}
        got = {name: f(lambda some: some["logp"], batch, args) for name, f in losses.FORGET.items()}
        for name, values in got.items():
            np.testing.assert_allclose(values.detach(), want[name], rtol=1e-6)
        got["npo"].sum().backward()
        p = torch.exp(0.5 * logp)
        torch.testing.assert_close(logp.grad, 2 * p / (p + torch.exp(0.5 * batch["ref"])))

    def test_the_cached_reference_is_a_live_reference_model(self):
        model = little_llama()
        for reduce in ("mean", "sum"):
            ref = losses.reference_logps(model, text_samples(), 2, 0, reduce)
            want = [-nll(model, ids, reduce).item() for ids, _ in text_samples()]
            np.testing.assert_allclose(ref, want)
            micro = losses.micro_batches(text_samples(), [3, 0, 4], 2, 0, "cpu", ref)
            npo = losses.forget_sum(SimpleNamespace(loss="npo", beta=0.3, reduce=reduce))
            loss = losses.descend(model, micro, npo, "samples")
            self.assertAlmostEqual(loss.item(), 2 / 0.3 * math.log(2), places=9)

    def test_kl_and_the_distances_of_rmu_match_loops_over_single_samples(self):
        model = little_llama()
        frozen = little_llama(seed=1)
        goal = losses.rmu_goal(model, 6.5, torch.float64)
        self.assertAlmostEqual(goal.norm().item(), 6.5)
        want = np.zeros(3)
        for ids, _ in text_samples():
            out, kept = (m(torch.tensor([ids]), output_hidden_states=True) for m in (model, frozen))
            p, q = (some.logits[0, :-1].log_softmax(-1) for some in (out, kept))
            hidden = out.hidden_states[2]                            # behind layer 1
            want += [F.kl_div(p, q, log_target=True, reduction="sum").item(),
                     (hidden - goal).square().mean(-1).sum().item(),
                     (hidden - kept.hidden_states[2]).square().mean(-1).sum().item()]
        batch = models.collate(text_samples(), 0)
        sums = (losses.kl_sum(frozen), losses.rmu_forget_sum(1, goal), losses.rmu_retain_sum(1, frozen))
        np.testing.assert_allclose([total(model, batch).item() for total in sums], want)

    def stepped(self, flags, size=9):
        """One vector of the last step's losses and of how far the weights moved in some steps of SGD."""
        always = "--out /nowhere --device cpu --warmup 0"
        if "--loss rmu" in flags:
            always += " --rmu_layer 1 --rmu_alpha 3"
        if "--smooth" not in flags or "--smooth sam" in flags:
            always += " --sam_rho 0.01"
        args = unlearn.parse_args(f"{always} {flags} --micro_batch {size}".split())
        model = little_llama()
        with mock.patch.object(unlearn, "frozen_model", return_value=little_llama(seed=1)):
            run = unlearn.Unlearning(args, model)
        run.optimizer = torch.optim.SGD(run.params)
        start = flat(run.params)
        ref = torch.linspace(-3, -1, 5).double()
        picks = [4, 1, 3, 0, 2]
        forget = losses.micro_batches(text_samples(), picks, size, 0, "cpu", ref)
        chosen = losses.micro_batches(text_samples(TEXTS[::-1]), picks, size, 0, "cpu", ref - 1)
        forget = [batch | {"chosen": other} for batch, other in zip(forget, chosen)]
        retain = losses.micro_batches(text_samples(), [1, 2, 3], size, 0, "cpu")
        attack = functools.partial(losses.descend, model, forget, losses.nll_sum, "labels")
        for i in range(args.steps):                                  # momentum looks back
            found = run.step(i, forget, retain, attack)
        return torch.cat([torch.tensor([found["forget"], found["retain"]]), start - flat(run.params)])

    def test_micro_batches_take_the_same_steps_for_every_loss_and_smoother(self):
        pairs = zip((*losses.FORGET, "rmu"), itertools.cycle(unlearn.SMOOTHERS))
        lines = [f"--loss {loss} --smooth {smooth}" for loss, smooth in pairs]
        for line in (*lines, "--smooth none --reduce sum --retain kl", "--sam_direction random",
                     "--loss rmu --sam_direction momentum", "--sam_direction lookahead --sam_norm linf",
                     "--optimizer zo --zo_lr .01 --smooth none",
                     "--optimizer hybrid --zo_lr .01 --zo_every 1 --sam_rho .1",
                     "--latent direction --smooth none", "--latent_eps .5",
                     "--loss rmu --latent_eps 1 --latent_layer 1 --smooth rs"):
            line += " --steps 2" if "--optimizer zo" in line else " --steps 2 --lr .01"
            whole = self.stepped(line)
            self.assertGreater(whole[2:].norm().item(), 1e-3)
            np.testing.assert_allclose(self.stepped(line, 2), whole, 1e-6, 1e-11)

    def test_a_step_adds_gamma_times_the_retain_gradient_at_theta(self):
        """SGD at a rate of 1 moves the weights by what the step calls the gradient."""
        got = self.stepped("--loss graddiff --sam_rho .5 --gamma 3 --lr 1 --clip 0 --steps 1")[2:]
        model = little_llama()                                       # the same by hand
        params = list(model.parameters())
        samples = [ids for ids, _ in text_samples()]

        def forget_gradient():
            return torch.autograd.grad(-sum(nll(model, ids) for ids in samples) / 5, params)
        retain = sum(nll(model, ids, "sum") for ids in samples[1:4])
        retain = torch.autograd.grad(retain / (sum(map(len, samples[1:4])) - 3), params)
        ascent = forget_gradient()
        with torch.no_grad():
            torch._foreach_add_(params, ascent, alpha=0.5 / flat(ascent).norm().item())
        want = flat(forget_gradient()) + 3 * flat(retain)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-6)  # Llama's norm is in fp32 even here


# ---- data/undo.py -------------------------------------------------------------------------------------
class Undo(World):
    def test_damage_shrinks_everything_and_puts_xaviers_noise_into_matrices(self):
        torch.manual_seed(0)
        params = [torch.randn(300, 200), torch.randn(50), torch.randn(2, 60, 90)]
        params.append(torch.randn(90, 50).bfloat16())
        found = {}
        for how in ((0.3, 0.5), (1, 0), (0, 0.5), (0.3, 0)):
            found[how] = [p.clone() for p in params]
            undo.damage_(found[how], *how, seed=3)
        self.assertTrue(same(found[0, 0.5], params))
        self.assertFalse(flat(found[1, 0]).any())
        self.assertTrue(same(found[0.3, 0][:3], [0.7 * p for p in params[:3]]))
        self.assertTrue(torch.equal(found[0.3, 0.5][1], 0.7 * params[1]))
        before = [params[0], *params[2], params[3]]
        matrix, _, experts, half = found[0.3, 0.5]
        for old, new in zip(before, [matrix, *experts, half]):
            xi = (new.float() - 0.7 * old.float()) / 0.3 / 0.5
            bound = math.sqrt(6 / sum(old.shape))                    # Glorot and Bengio 2010, eq. 16
            self.assertLess(xi.abs().max(), 1.2 * bound)             # bf16 rounds
            self.assertAlmostEqual(xi.std().item() / bound, 3 ** -0.5, delta=0.03)

    def test_a_step_goes_down_the_forward_kl_to_the_teacher_whatever_the_chunks(self):
        teacher = little_llama()
        other = little_llama(seed=1)
        total = 0.0
        for ids, _ in text_samples():
            p, q = (m(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for m in (teacher, other))
            total = total + (p.exp() * (p - q)).sum()
        mean = total / sum(len(ids) - 1 for ids, _ in text_samples())
        step = 0.5 * flat(torch.autograd.grad(mean, list(other.parameters())))
        micro = losses.micro_batches(text_samples(), range(5), 2, 0, "cpu")
        for chunk in (2**24, 100):                                   # of logits: all, and three rows
            model = little_llama(seed=1)
            optimizer = torch.optim.SGD(list(model.parameters()), lr=9.0)
            with mock.patch.object(models, "CHUNK", chunk):
                found = undo.distil(model, teacher, optimizer, iter([micro]), 1, 0.5)
            self.assertAlmostEqual(found[0], mean.item(), places=9)
            moved = flat(other.parameters()) - flat(model.parameters())
            torch.testing.assert_close(moved, step, rtol=1e-4, atol=1e-7)

    def test_undo_after_the_last_step_is_undo_of_the_finished_run_also_after_a_kill(self):
        self.flags += ["--smooth", "sam+wa"]
        after = ["--undo_alpha", 0.3, "--undo_beta", 0.1, "--undo_steps", 4, "--undo_lr", 1e-3]
        self.unlearn("plain")
        self.unlearn("whole", *after, "--gradient_checkpointing")
        for at in (4, 7):                                            # in a step of sam, in one of UNDO
            self.break_off(f"killed{at}", at, *after, "--save_every", 2)
            self.unlearn(f"killed{at}", *after, "--resume")
        self.flags = self.flags[2:-2]
        self.unlearn("alone", *after, "--loss", "none", "--model", self.tmp / "plain")
        self.same_weights("whole", "alone", "killed4", "killed7")
        self.assertEqual(tables.method(self.result("alone"))[0], "npo+sam+wa momentum linf, undone")

    def test_shrink_damages_after_the_references_and_before_the_first_step(self):
        self.flags += ["--smooth", "none", "--batch_size", len(TEXTS), "--steps", 1, "--lr", 1e-12]
        self.unlearn("shrunk", "--shrink", 0.3)
        knows, tokenizer = models.load_model(self.model, "cpu", torch.float32)
        left = copy.deepcopy(knows)
        with torch.no_grad():
            for p in left.parameters():
                p.mul_(0.7)
        result = models.load_model(self.tmp / "shrunk", "cpu", torch.float32)[0]
        torch.testing.assert_close(flat(result.parameters()), flat(left.parameters()), rtol=0, atol=1e-7)
        losses_of = []
        for row in formats.read_jsonl(self.world / "forget.jsonl", formats.text_row):
            start = len(tokenizer(row["prompt"]).input_ids)
            ids = tokenizer(row["prompt"] + row["completion"], return_tensors="pt").input_ids
            both = []
            for model in (left, knows):
                logps = model(ids).logits[0, :-1].log_softmax(-1)
                both.append(logps.gather(1, ids[0, 1:, None])[start - 1:].mean())
            losses_of.append(-4 * torch.sigmoid(-0.5 * (both[0] - both[1])).log())           # beta .5
        got = self.result("shrunk")["curve"][0]["forget"]
        self.assertAlmostEqual(got, torch.stack(losses_of).mean().item(), places=5)
        self.assertEqual(tables.method(self.result("shrunk"))[0], "npo shrink0.3")

    def test_a_run_of_nothing_to_shrink_is_the_plain_one_and_a_killed_one_goes_on_bit_for_bit(self):
        self.unlearn("plain")
        self.unlearn("none", "--shrink", 0)
        self.same_weights("plain", "none")
        more = ["--shrink", 0.2, "--retain_batch", 2]
        self.unlearn("whole", *more)
        self.break_off("killed", 4, *more, "--save_every", 2)
        self.unlearn("killed", *more, "--resume")
        self.same_weights("whole", "killed")

    def test_retain_batch_is_what_a_step_takes_of_the_retain_set(self):
        self.unlearn("as_many", "--smooth", "none")
        self.unlearn("said", "--smooth", "none", "--retain_batch", 3)
        self.same_weights("as_many", "said")
        taken = []
        take = texts.Texts.retain_batches

        def watched(some, picks):
            taken.append(len(picks))
            return take(some, picks)
        with mock.patch.object(texts.Texts, "retain_batches", watched):
            self.unlearn("five", "--smooth", "none", "--retain_batch", 5)
        self.assertEqual(taken, [5] * 5)
        more = self.result("five")["passed"]["trained"] - self.result("said")["passed"]["trained"]
        self.assertEqual(more, 5 * (5 - 3))


# ---- data/latent.py and data/direction.py -------------------------------------------------------------
class Latent(World):
    def attack(self, layers=3, **more):
        """An attack as --latent makes it, its model, micro-batches of a forget and of a retain set."""
        model = little_llama(num_hidden_layers=layers)
        given = {"latent": "adversary", "latent_eps": 0.7, "latent_layer": 1, "latent_steps": 6,
                 "loss": "npo", "seed": 3}
        forget = losses.micro_batches(text_samples(), range(5), 5, 0, "cpu")
        retain = losses.micro_batches(text_samples(TEXTS[::-1]), range(3), 2, 0, "cpu")
        return latent.make(SimpleNamespace(**given | more), model), model, forget, retain

    def inputs(self, attack, step, model, forget, retain):
        """Each layer's input in a step of the attack, [(B, T, D)]."""
        attack.begin(step, forget, retain)
        attack.prepare(forget)
        with attack.attacking(forget[0]):
            found = stream.inputs_of(model, forget[0], models.blocks(model))
        self.assertFalse(any(block._forward_pre_hooks for block in models.blocks(model)))
        return found

    def test_on_a_linear_tail_the_shift_has_a_closed_form(self):
        torch.manual_seed(0)
        w, h = torch.randn(2, 2, 4, 3).double()
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        real = w * mask[:, :, None]                                  # nothing counts at the padding
        want = -0.6 * real / real.flatten(1).norm(dim=1)[:, None, None]

        def shift(low, high, eps=0.6, sign=1):
            zero = torch.zeros_like(h)
            return latent.adversary(lambda d: sign * (w * d).sum(), h, mask, eps, 6, zero, low, high)
        exactly(shift(-99, 99), want)
        exactly(shift(-99, 99, sign=-1), -want)
        exactly(shift(-99, 99, eps=0.1), want / 6)
        self.assertFalse(shift(-99, 99, eps=0.0).any())
        h[1, 2:] = 9                                                 # padding, out of the others' range
        low, high = h[mask.bool()].min(), h[mask.bool()].max()
        far = h + shift(low, high, 5.0)
        exactly(torch.stack([far[mask.bool()].min(), far[mask.bool()].max()]), torch.stack([low, high]))
        self.assertTrue((far[1, 2:] == 9).all())

    def test_the_nll_falls_within_the_ball_and_the_range_from_the_layer_on_and_padding_stays(self):
        attack, model, forget, retain = self.attack()
        batch = forget[0]
        plain = model(**batch, output_hidden_states=True).hidden_states
        inputs = self.inputs(attack, 4, model, forget, retain)
        self.assertTrue(torch.equal(inputs[0], plain[0]))            # before the layer
        delta = inputs[1] - plain[1]
        real = batch["attention_mask"].bool()
        self.assertFalse(delta[~real].any())
        size = delta.flatten(1).norm(dim=1)
        self.assertTrue(0.5 < size.min() and size.max() < 0.7 + 1e-6, size)
        self.assertGreater(inputs[1][real].min(), plain[1][real].min() - 1e-6)
        self.assertLess(inputs[1][real].max(), plain[1][real].max() + 1e-6)
        nll = []
        for scale in (-1, 0, 1):
            with stream.at_input(models.blocks(model)[1], lambda h: h + scale * delta):
                nll.append(-models.token_logps(model, batch)[0].sum(1).detach())
        self.assertTrue((nll[2] < nll[1]).all() and (nll[1] < nll[0]).all(), nll)
        for step, equal in ((4, True), (5, False)):                  # one for all passes of a step
            again = self.inputs(attack, step, model, forget, retain)
            self.assertEqual(torch.equal(again[1], inputs[1]), equal)

    def test_what_is_taken_out_is_the_difference_of_mean_last_states_of_half_the_samples(self):
        attack, model, forget, retain = self.attack(layers=4, latent="direction")
        r = 0                                                        # (L, D) of the last 3 of 4 layers
        for some, sign in ((TEXTS, 1), (TEXTS[::-1][:3], -1)):
            for ids, _ in text_samples(some):
                states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
                r += sign * torch.stack(states[1:4])[:, 0, -1].detach() / len(some)
        r = F.normalize(r)
        plain = stream.inputs_of(model, forget[0], models.blocks(model))
        found = self.inputs(attack, 0, model, forget, retain)
        torch.testing.assert_close(attack.r, r, rtol=1e-5, atol=1e-7)
        self.assertTrue(torch.equal(found[0], plain[0]))             # the first quarter is spared
        real = forget[0]["attention_mask"].bool()
        drawn = (found[1] != plain[1]).flatten(1).any(1)
        self.assertTrue(0 < drawn.sum() < 5)
        for before, after, unit in zip(plain[1:], found[1:], attack.r):
            self.assertLess((after @ unit)[drawn][real[drawn]].abs().max(), 1e-6)
            self.assertTrue(torch.equal(before[~drawn], after[~drawn]))
        taken = found[1] - plain[1]                                  # nothing else
        exactly(taken, (taken @ attack.r[0])[:, :, None] * attack.r[0])
        self.assertFalse(taken[~real].any())
        shares = []
        for step in range(1, 60):
            old = attack.r
            model.model.embed_tokens.weight.data[3:6].add_(0.01)
            plain = stream.inputs_of(model, forget[0], models.blocks(model))
            found = self.inputs(attack, step, model, forget, retain)
            self.assertEqual(torch.equal(attack.r, old), step % 4 > 0, step)
            shares.append((found[1] != plain[1]).flatten(1).any(1).double().mean())
        self.assertAlmostEqual(np.mean(shares), 0.5, delta=0.1)

    def test_what_is_switched_off_is_the_plain_run_bit_for_bit_and_a_shift_is_not(self):
        for name, *more in (("plain", "--smooth", "none"), ("rho0", "--sam_rho", 0),
                            ("shift0", "--smooth", "none", "--latent", "adversary", "--latent_eps", 0),
                            ("shift", "--smooth", "none", "--latent_eps", 1)):
            self.unlearn(name, *more)
        self.same_weights("plain", "rho0", "shift0")
        self.assertRaises(AssertionError, self.same_weights, "plain", "shift")


# ---- data/ilu.py --------------------------------------------------------------------------------------
class Ilu(World):
    def test_the_penalty_has_the_gradient_of_a_double_backward_pass_to_second_order(self):
        net = Network()
        w = torch.ones((), dtype=torch.float64, requires_grad=True)
        s = torch.autograd.grad(net.loss([w * p for p in net.params]), w, create_graph=True)[0]
        want = 0.7 * flat(torch.autograd.grad(s.square(), net.params))
        start = [p.detach().clone() for p in net.params]
        errors = []
        for radius in (1e-1, 1e-2, 1e-3):
            for p in net.params:
                p.grad = torch.ones_like(p)                          # what is there is added to
            value = ilu.Invariance(net.params, 0.7, radius)(net.closure)
            errors.append(((flat(p.grad for p in net.params) - 1 - want).norm() / want.norm()).item())
        self.assertAlmostEqual(value.item(), s.square().item(), places=5)
        self.assertLess(errors[2], 1e-5)
        np.testing.assert_allclose(np.divide(errors[:2], errors[1:]), 100, rtol=0.15)
        self.assertRaises(ZeroDivisionError, ilu.Invariance(net.params, 0.7), lambda: 1 / 0)
        self.assertTrue(same(net.params, start))

    def test_a_run_says_how_large_the_penalty_is_and_makes_it_smaller(self):
        data = write_rows(self.tmp / "other.jsonl", ["a dog ran on the mat", "one two three"])
        self.flags += ["--steps", 12, "--lr", 1e-2, "--smooth", "none", "--ilu_data", data]
        curves = []
        for lam in (1e-9, 10):
            self.unlearn("run", "--ilu_lambda", lam, "--overwrite")
            curves.append([p["ilu"] for p in self.result("run")["curve"]])
        self.assertAlmostEqual(curves[0][0] / curves[1][0], 1, places=5)
        self.assertLess(curves[1][-1], 0.5 * curves[0][-1])


# ---- data/optimizers.py -------------------------------------------------------------------------------
class Optimizers(unittest.TestCase):
    def test_an_estimate_is_exact_along_its_directions_and_the_gradient_on_average(self):
        """On a quadratic a central difference has no error, so that the mean of d u u^T g is left."""
        torch.manual_seed(0)
        a = torch.randn(7, 7).double()
        params = [torch.nn.Parameter(torch.randn(*shape).double()) for shape in ((2, 2), (3,))]
        start = [p.detach().clone() for p in params]
        gradient = (a + a.T) @ flat(start)
        tried = []

        def value():
            tried.append(flat(params))
            return tried[-1] @ a @ tried[-1]
        for count, radius in ((1, 0.3), (3, 5.0), (4000, 0.3)):
            tried.clear()
            for p in params:
                p.grad = torch.ones_like(p)                          # what is there is added to
            mean = optimizers.estimate_(params, value, radius, count, seed=2, weight=0.5)
            got = flat(p.grad for p in params) - 1
            u, back = (torch.stack(tried).view(count, 2, 7) - flat(start)).unbind(1)
            exactly(back, -u)
            exactly(u.norm(dim=1), torch.full((count,), radius, dtype=torch.float64))
            exactly(got, 0.5 * 7 * (u @ gradient) @ u / radius**2 / count)
            exactly(mean, torch.stack([x @ a @ x for x in tried]).mean())
        self.assertLess((got / 0.5 - gradient).norm() / gradient.norm(), 0.07)
        self.assertRaises(ZeroDivisionError, optimizers.estimate_, params, lambda: 1 / 0, 1.0, 1, 0)
        self.assertTrue(same(params, start))

    def test_a_sign_step_is_lr_times_the_sign_and_decay_is_decoupled(self):
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        p.grad = torch.tensor([5.0, -1e-9, 0.0])
        optimizers.Sign([p], lr=0.1, weight_decay=0.5).step()
        torch.testing.assert_close(p.detach(), torch.tensor([1 - 0.1 - 0.05, -2 + 0.1 + 0.1, 3 - 0.15]))

    def test_hybrid_ends_on_its_steps_without_a_gradient_and_those_take_none(self):
        args = SimpleNamespace(optimizer="hybrid", zo_every=3, steps=10)
        self.assertEqual([optimizers.is_zeroth(args, i) for i in range(10)],
                         [False] + [True] * 3 + [False] * 3 + [True] * 3)
        flags = "--out /nowhere --device cpu --smooth none --steps 2"
        flags += " --optimizer hybrid --zo_every 1 --zo_lr 3e-4"
        run = unlearn.Unlearning(unlearn.parse_args(flags.split()), little_llama())
        micro = losses.micro_batches(text_samples(), range(5), 5, 0, "cpu", torch.zeros(5).double())
        start = flat(run.params)
        with mock.patch.object(torch.Tensor, "backward", side_effect=ZeroDivisionError):
            self.assertRaises(ZeroDivisionError, run.step, 0, micro, micro, None)
            self.assertGreater(run.step(1, micro, micro, None)["grad_norm"], 1)      # it is clipped to 1
        self.assertAlmostEqual((flat(run.params) - start).norm().item(), 3e-4, places=9)


# ---- data/split.py and data/merge.py ------------------------------------------------------------------
class Folds(World):
    def test_folds_partition_the_facts_and_layers_hold_the_rest_at_their_share(self):
        rows = [{"text": f"{n}", "fact": n % 7, "job": "ab"[n % 2], "where": "here"} for n in range(28)]
        retain = [{"text": f"r{n}"} for n in range(40)]
        for by, values, count in ((None, 7, 1), (None, 7, 3), ("job", 2, 2), ("text", 28, 5)):
            folds = split.folds_of(rows, count, by, seed=1)
            self.assertEqual(sum(map(len, folds)), 28)
            inside = [len({row[by or "fact"] for row in fold}) for fold in folds]
            self.assertEqual(sum(inside), values)                    # no value in two folds
            self.assertLessEqual(max(inside) - min(inside), 1)
            for fold in folds:
                self.assertEqual([row for row in rows if row in fold], fold)         # in their order
        self.assertRaisesRegex(formats.InputError, "8", split.folds_of, rows, 8)
        self.assertRaisesRegex(formats.InputError, "here.*city", split.folds_of, rows, 2, "city")
        folds = split.folds_of(rows, 3)
        for i, (gone, kept) in enumerate(split.layers(folds, retain, 0.6), 1):
            self.assertEqual((gone, kept[:40]), (sum(folds[:i], []), retain))
            counts = Counter(row["text"] for row in kept[40:])
            self.assertEqual(counts.keys(), {row["text"] for row in sum(folds[i:], [])})
            self.assertAlmostEqual(len(kept[40:]) / len(kept), 0.6 if i < 3 else 0, delta=0.01)
            self.assertLessEqual(max(counts.values(), default=0) - min(counts.values(), default=0), 1)

    def test_one_fold_is_todays_run_and_equal_runs_merge_to_the_run_bit_for_bit(self):
        self.unlearn("plain")
        for name, *more in (("folds1",), ("layers1", "--layered")):
            self.run_script("data/split.py", self.world, "--folds", 1, *more)
            self.unlearn(name, "--data", self.world / name / "1")
            self.assertEqual(read_json(self.world / name / "1" / "meta.json"), {"prompt": PROMPT})
        self.run_script("data/split.py", self.world, "--folds", 9, says="--folds 9: there are 5")
        self.run_script("data/split.py", self.world, "--folds", 2, "--share", 0.9, says="--layered")
        self.unlearn("merged", "--merge", *[self.tmp / "plain"] * 3)
        self.same_weights("plain", "folds1", "layers1", "merged")

    def test_merging_is_the_mean_of_task_vectors_and_ties_trims_elects_and_averages(self):
        """TIES by a loop over single weights, as algorithm 1 of its paper says it."""
        torch.manual_seed(0)
        start = [torch.randn(3, 2), torch.randn(4)]
        others = [[p + torch.randn_like(p) for p in start] for _ in range(3)]
        tau = torch.stack([flat(other) for other in others]).double() - flat(start).double()
        for density in (0, 0.3, 1):
            params = [p.clone() for p in start]
            merge.merge_(params, others, density)
            want = tau.mean(0)
            for i in range(10 if density else 0):
                largest = tau.abs().topk(math.ceil(density * 10)).indices
                kept = [tau[run, i].item() * (i in largest[run]) for run in range(3)]
                agree = [x for x in kept if x * sum(kept) > 0]
                want[i] = sum(agree) / max(1, len(agree))
            torch.testing.assert_close(flat(params).double(), flat(start) + want, rtol=0, atol=1e-6)


# ---- data/models.py -----------------------------------------------------------------------------------
class Models(unittest.TestCase):
    def setUp(self):
        self.model = little_llama()
        self.tokenizer = words()
        triples = [("", TEXTS[3], ""), ("Question: who?", " the cat", ""), ("", TEXTS[1], "")]
        self.samples = models.encode(self.tokenizer, triples, 64)
        self.batch = models.collate(self.samples, 0)

    def gradient(self, total, batch):
        """One vector of total(model, batch) and its gradient."""
        self.model.zero_grad()
        loss = total(self.model, batch)
        loss.backward()
        return torch.cat([loss.detach().reshape(1), flat(p.grad for p in self.model.parameters())])

    def test_texts_are_continued_one_by_one_where_padding_shows(self):
        """Decoders of encoder-decoders count positions from the first token, padding or not."""
        from transformers import BartConfig, BartForCausalLM
        torch.manual_seed(0)
        config = BartConfig(vocab_size=len(self.tokenizer), d_model=16, decoder_layers=2,
                            decoder_ffn_dim=24, decoder_attention_heads=2, max_position_embeddings=64,
                            init_std=0.3)
        model = BartForCausalLM(config).eval()
        prompts = [("the cat sat on the mat", ""), ("a dog", "")]
        together = models.generate(model, self.tokenizer, prompts, 8)
        self.assertEqual(together, models.generate(model, self.tokenizer, prompts, 8, 1))

    def test_token_logps_and_scores_match_a_loop_over_single_tokens(self):
        ids = self.samples[0][0][:4]
        self.assertEqual(models.encode(self.tokenizer, [("", TEXTS[3], "")], 4, max_len=4), [(ids, ids)])
        logps, mask = models.token_logps(self.model, self.batch)
        self.assertEqual(mask.sum(1).tolist(), [7, 2, 3])            # no prompt, no padding
        scored = models.label_scores(self.model, self.tokenizer, self.samples, batch=2)
        for row, (ids, _) in enumerate(self.samples):
            want = np.zeros(mask.shape[1])
            likeliest = []
            for t in mask[row].nonzero()[:, 0].tolist():
                said = self.model(torch.tensor([ids[:t + 1]])).logits[0, -1].log_softmax(-1)
                want[t] = said[ids[t + 1]].item()
                likeliest.append(said.argmax().item() == ids[t + 1])
            np.testing.assert_allclose(logps[row].detach(), want)
            np.testing.assert_allclose(scored[row][0], want[mask[row]])
            self.assertEqual(scored[row][1].tolist(), likeliest)

    def test_neither_padding_nor_chunks_change_a_loss_or_its_gradient(self):
        for total in (losses.nll_sum, losses.kl_sum(little_llama(seed=1))):
            alone = sum(self.gradient(total, models.collate([sample], 0)) for sample in self.samples)
            for pad, rows in ((2, 1000), (5, 5), (0, 1)):                    # of 12 rows of logits
                batch = models.collate(self.samples, pad)
                with mock.patch.object(models, "CHUNK", rows * len(self.tokenizer)):
                    np.testing.assert_allclose(self.gradient(total, batch), alone, 1e-8, 1e-10)

    @unittest.skipUnless(LINUX, "only Linux tells a peak of memory")
    def test_peak_memory_does_not_grow_with_tokens_times_a_vocabulary_of_49k(self):
        model = little_llama(torch.float32, context=600, vocab_size=49152, num_hidden_layers=1)
        chunk = 200 * 49152                                          # logits

        def kilobytes(key):
            return int(Path("/proc/self/status").read_text().split(key)[1].split()[0])

        def peak(tokens, most):
            """In chunks, of a pass over a text and its gradient."""
            batch = models.collate([(list(range(tokens)), list(range(tokens)))], 0)
            Path("/proc/self/clear_refs").write_text("5")            # resets VmHWM, the peak
            before = kilobytes("VmRSS:")
            with mock.patch.object(models, "CHUNK", most):
                losses.nll_sum(model, batch).backward()
            return 1024 * (kilobytes("VmHWM:") - before) / (4 * chunk)
        peak(20, chunk)                                              # to warm up
        self.assertLess(peak(600, chunk), 4.5)
        self.assertGreater(peak(400, 2**60), 5.5)                    # logits, log-softmax, gradient

    def test_soft_capped_logits_keep_the_models_own_head_and_say_so_once(self):
        from transformers import Gemma2Config, Gemma2ForCausalLM
        capped = Gemma2ForCausalLM(Gemma2Config(
            vocab_size=len(self.tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.1))
        for model, altered in ((capped.double().eval(), True), (self.model, False)):
            want, mask = models.token_logps(model, self.batch)
            said = io.StringIO()
            with mock.patch.object(models, "CHUNK", 1), contextlib.redirect_stderr(said):
                for _ in range(2):
                    torch.testing.assert_close(models.token_logps(model, self.batch)[0], want)
            self.assertEqual(said.getvalue().count("behind the output layer"), altered)
            scored = models.label_scores(model, self.tokenizer, self.samples)
            torch.testing.assert_close(torch.cat([logps for logps, _ in scored]), want[mask])

    def test_gradient_checkpointing_keeps_the_gradient_and_runs_every_layer_twice(self):
        calls = mock.Mock(return_value=None)
        for layer in self.model.model.layers:
            layer.self_attn.register_forward_hook(calls)
        want = self.gradient(losses.nll_sum, self.batch)
        models.recompute_blocks(self.model)
        self.assertTrue(torch.equal(self.gradient(losses.nll_sum, self.batch), want))
        self.assertEqual(calls.call_count, 3 + 6)

    def test_batched_generation_with_left_padding_is_a_plain_greedy_loop(self):
        """One whole forward pass a token, no cache, no padding; a text ends at eos; and batches()."""
        self.assertEqual(list(models.batches([9, 2, 5, 5, 5], 3, 12)), [[1, 2], [3, 4], [0]])
        self.assertEqual(list(models.batches([1, 1, 1], 2, 12)), [[0, 1], [2]])
        own = self.model.generation_config
        own.repetition_penalty = 5.0                                 # a checkpoint's: greedy is argmax
        own.eos_token_id = [7]
        prompts = [(text, "here") for text in ("who", *TEXTS)]
        want = []
        for text, _ in prompts:
            ids = self.tokenizer(text).input_ids
            said = greedy(self.model, ids, 12)[len(ids):]
            end = next((t for t, token in enumerate(said) if token in (2, 7)), 12)
            want.append(self.tokenizer.decode(said[:end]))
        for batch in (64, 4, 1):
            self.assertEqual(models.generate(self.model, self.tokenizer, prompts, 12, batch), want)
        self.assertIs(self.model.generation_config, own)


# ---- data/scores.py -----------------------------------------------------------------------------------
class Scores(unittest.TestCase):
    def test_rouge_l_is_the_longest_common_subsequence_over_lengths(self):
        """In texts of up to 8 words, which differ in case, punctuation and alphabet."""
        def longest(a, b):
            if not a or not b:
                return 0
            if a[0] == b[0]:
                return 1 + longest(a[1:], b[1:])
            return max(longest(a[1:], b), longest(a, b[1:]))
        spaces = str.maketrans(",!-é_'", 6 * " ")
        rng = random.Random(0)
        some = ["the", "cat", "Cat,", "sat!", "on", "a-mat", "3rd", "été", "_x_", "THE", "don't", ""]
        for _ in range(60):
            pair = [" ".join(rng.choices(some, k=rng.randrange(9))) for _ in range(2)]
            said, truth = (text.lower().translate(spaces).split() for text in pair)
            lengths = (len(said), len(truth), (len(said) + len(truth)) / 2)
            want = [longest(said, truth) / max(n, 0.5) for n in lengths]
            np.testing.assert_allclose(scores.rouge_l(*pair), want)

    def test_ks_p_value_counts_the_orders_of_two_samples(self):
        for n, m in ((1, 1), (3, 4), (5, 5), (2, 7)):
            found = []
            for places in itertools.combinations(range(n + m), n):   # of the first sample, among all
                steps = np.full(n + m, -1 / m)
                steps[list(places)] = 1 / n
                others = list(set(range(n + m)) - set(places))
                found.append([np.abs(steps.cumsum()).max(), *scores.ks_test(places, others)])
            gaps, d, p = np.array(found).T
            np.testing.assert_allclose(d, gaps)
            np.testing.assert_allclose(p, (gaps > gaps[:, None] - 1e-9).mean(1))
        _, p = scores.ks_test(range(400), range(400, 800))           # 2 orders of all: 1e-239
        self.assertAlmostEqual(p * math.comb(800, 400) / 2, 1, places=9)

    def test_auc_means_and_holm_by_hand_and_t_against_published_tables(self):
        a, b = np.random.default_rng(0).integers(0, 6, (2, 17))      # small integers: many ties
        pairs = np.sign(a[:, None] - b[:11]) / 2 + 0.5
        self.assertAlmostEqual(scores.auc(a, b[:11]), pairs.mean(), places=12)
        self.assertEqual([scores.mean_se(v) for v in ([1.0, 3.0], [4.0])], [(2.0, 1.0), (4.0, None)])
        self.assertAlmostEqual(scores.harmonic_mean([1.0, 2.0, 4.0]), 3 / (1 + 0.5 + 0.25))
        self.assertEqual(scores.harmonic_mean([1.0, 0.0]), 0.0)
        self.assertEqual(scores.holm([0.01, None, 0.04, 0.03, 0.005]), [0.03, None, 0.06, 0.06, 0.02])
        self.assertEqual(scores.holm([0.9, 0.8]), [1.0, 1.0])        # 2 x .8 is cut to 1, and .9 follows
        for df, t, p in ((1, 12.706, 0.05), (7, 2.365, 0.05), (7, 3.499, 0.01), (15, 4.073, 0.001)):
            d = np.random.default_rng(df).normal(size=df + 1)
            d = (d - d.mean()) / d.std(ddof=1) * math.sqrt(df + 1) + t               # standard error 1
            np.testing.assert_allclose(scores.t_test(d), (t, p), rtol=0.002)
        self.assertEqual(scores.t_test([0.1, 0.1, 0.1]), (None, None))       # no spread but rounding

    def test_spearman_has_the_published_critical_values_and_ties_share_their_mean_rank(self):
        """Zar (1972), two-sided: the smallest |rho| with p <= alpha. rho is 1 - 6 S / (n^3 - n), S the
        sum of squared differences of ranks. Many pairs use Student's t."""
        table = {5: {.10: .900, .05: 1.000}, 6: {.10: .829, .05: .886, .02: .943, .01: 1.000},
                 7: {.10: .714, .05: .786, .02: .893, .01: .929}, 8: {.10: .643, .05: .738, .02: .833}}
        rng = np.random.default_rng(0)
        for n, critical in table.items():
            orders = rng.permuted(np.tile(np.arange(n), (1000, 1)), axis=1)
            rhos = 1 - 6 * np.square(orders - np.arange(n)).sum(1) / (n ** 3 - n)
            for want in np.unique(rhos[rhos > 0.6]):
                rho, p = scores.spearman(range(n), orders[np.argmax(rhos == want)])
                self.assertAlmostEqual(rho, want, places=12)
                for alpha, least in critical.items():
                    self.assertEqual(p <= alpha + 1e-12, rho > least - 0.0006, (n, alpha, rho))
        np.testing.assert_allclose(scores.spearman([1, 2, 2, 3], [1.0, 5.0, 5.0, 9.0]), (1, 4 / 24))
        rho, p = scores.spearman(range(12), [2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11])
        self.assertAlmostEqual(p, scores.student_p(rho * math.sqrt(10 / (1 - rho ** 2)), 10))
        self.assertEqual(scores.spearman([1, 1, 1], [1, 2, 3]), (None, None))


# ---- evaluate.py: questions, corpora, one run ---------------------------------------------------------

def logps_alone(model, tokenizer, context, ending):
    """Log-probability of each token of an ending, from one pass over the whole string."""
    ids = tokenizer(context + ending).input_ids
    known = len(tokenizer(context).input_ids)
    logps = model(torch.tensor([ids])).logits[0, known - 1:-1].log_softmax(-1).detach().numpy()
    return logps[range(len(logps)), ids[known:]]


def greedy(model, ids, count):
    """ids and the `count` likeliest tokens after them, by one whole forward pass a token."""
    for _ in range(count):
        ids = ids + [model(torch.tensor([ids])).logits[0, -1].argmax().item()]
    return ids


class Questions(Folder):
    def test_choices_score_as_full_strings_and_take_one_pass_where_they_are_one_token_each(self):
        model = little_llama()
        for prompt, passes in ((PROMPT, 4 + 1 + 1 + 4), (None, 4)):
            rows = evaluate.ask(QUESTIONS, prompt)
            with mock.patch.object(models, "collate", wraps=models.collate) as collate:
                found = evaluate.choice_logps(model, words(), rows)
            self.assertEqual(sum(len(call.args[0]) for call in collate.call_args_list), passes)
            for row, logps in zip(rows, found.tolist()):
                for text, logp in zip(row["endings"], logps):
                    self.assertAlmostEqual(logp, logps_alone(model, words(), row["context"], text).sum())

    def test_without_a_prompt_questions_are_asked_by_the_letters_of_the_harness(self):
        row = {"question": " Q? ", "choices": ["w", "x", "y", "z"], "subject": "human_aging"}
        asked, = evaluate.ask([row])
        self.assertEqual(asked["endings"], [" A", " B", " C", " D"])
        self.assertEqual(asked["context"], "The following are multiple choice questions (with answers) "
                         "about human aging.\n\nQ?\nA. w\nB. x\nC. y\nD. z\nAnswer:")

    def test_ue_ut_and_held_out_by_hand(self):
        forget = [{"fact": fact, "hit": fact in (0, 3)} for fact in range(4)]
        questions = {"mcq_forget": forget, "mcq_retain": 3 * [{"hit": True}] + [{"hit": False}]}

        def correct(model, tokenizer, rows):
            return torch.tensor([row["hit"] for row in rows])
        with mock.patch.object(evaluate, "correct", correct):
            for seen, want in (({0, 1}, 0.5), ({0}, 1 - 1 / 3), ({0, 1, 2, 3}, None), (set(), None)):
                found = evaluate.ue_ut(None, None, questions, seen)
                self.assertEqual(found, {"UE": 0.5, "UE_heldout": want, "UT": 0.75})

    def test_open_accuracy_is_what_greedy_generation_gives(self):
        model = little_llama()
        rows = []
        for text in TEXTS:
            ids = words()(text).input_ids
            said = words().decode(greedy(model, ids, 2)[len(ids):])
            for answer in (f" {said}", f" {said.split()[0]} who"):   # the second is half right
                rows.append({"context": text, "endings": ["", answer], "answer": 1, "where": ""})
        self.assertEqual(evaluate.open_accuracy(model, words(), rows, batch=3), 0.5)

    def test_perplexity_and_memorisation_by_loops_and_extraction_strength_from_every_prefix(self):
        model = little_llama()
        own = words().decode(greedy(model, words()("one two").input_ids, 6), skip_special_tokens=True)
        texts = ["cat sat on", own, own.rsplit(" ", 1)[0] + " mat"]  # the last with a wrong last word
        rows = [{"text": text, "where": ""} for text in texts]
        found, records = evaluate.corpus_scores(model, words(), rows, batch=2)
        logps = []
        for text, record in zip(texts, records):
            logps.extend(logps_alone(model, words(), "", text))
            ids = words()(text).input_ids
            n = len(ids) - 1
            hits = [greedy(model, ids[:t], 1) == ids[:t + 1] for t in range(1, n + 1)]
            enough = [k for k in range(n + 1) if greedy(model, ids[:1 + k], n - k) == ids]
            np.testing.assert_allclose((record["em"], record["es"]), (np.mean(hits), 1 - enough[0] / n))
        self.assertTrue(records[1]["es"] > 0.5 and records[2]["es"] == 0)
        self.assertAlmostEqual(found["ppl"], math.exp(-np.mean(logps)), places=6)

    def test_a_folder_decides_what_is_measured_and_batch_size_changes_nothing(self):
        """Two random Llamas, and rows that suit each of the files that data/*/metrics.py know."""
        for seed, name in enumerate(("model", "other")):
            model = little_llama(torch.float32, seed, context=1024)
            model.generation_config.eos_token_id = list(range(8))    # short answers
            write_model(self.tmp / name, model)
        files = ("forget retain qa_forget qa_retain qa_real_authors qa_world_facts knowmem_forget "
                 "knowmem_retain knowmem_forget_icl knowmem_retain_icl privleak_forget privleak_holdout "
                 "verbmem_forget")
        for i, name in enumerate(files.split()):
            rows = [{"text": text, "prompt": text, "gt": text, "question": text, "answer": "the cat",
                     "perturbed_answer": ["a dog", "mat"]} for text in TEXTS[i % 3:]]
            write_rows(self.tmp / "data" / f"{name}.jsonl", rows)
        write_rows(self.tmp / "data" / "mcq_forget.jsonl", QUESTIONS)
        (self.tmp / "data" / "meta.json").write_text(json.dumps({"auc_retrain": 0.4}))

        def score(more=""):
            flags = f"{self.tmp}/model --data {self.tmp}/data --records --overwrite --device cpu {more}"
            evaluate.score(self.tmp / "model", evaluate.flags().parse_args(flags.split()))
            found = read_json(self.tmp / "model" / "evaluate.json")
            return found["metrics"], found["records"]
        metrics, records = score()
        want = files.replace("verbmem_forget", "verbmem mcq_forget").split()
        self.assertEqual(set(records), {name for name in want if "icl" not in name})
        self.assertEqual((metrics["UT"], metrics["template"]), (None, evaluate.LETTERS))
        hits = [record["choice"] == record["answer"] for record in records["mcq_forget"]]
        self.assertEqual(metrics["UE"], 1 - np.mean(hits))
        self.assertAlmostEqual(metrics["privleak"], 100 * (metrics["auc"] - 0.4) / 0.4)
        nine = [value for name in tofu.KEPT for value in metrics[name].values()]
        self.assertAlmostEqual(metrics["utility"], scores.harmonic_mean(nine))
        metrics, again = score(f"--batch_size 2 --retain_run {self.tmp}/other")
        for name in records:
            for one, other in zip(records[name], again[name], strict=True):
                for key in one.keys() - {"logps"}:
                    self.assertAlmostEqual(one[key], other[key], delta=1e-3, msg=f"{name} {key}")
        never = read_json(self.tmp / "other" / "evaluate.json")
        ours, theirs = ([r["R"] for r in some["qa_forget"]] for some in (again, never["records"]))
        self.assertEqual(metrics["forget_quality"], scores.ks_test(ours, theirs)[1])
        self.assertAlmostEqual(metrics["privleak"], 100 * (metrics["auc"] / never["metrics"]["auc"] - 1))
        metrics, records = score("--limit 2 --bos none")
        self.assertFalse(metrics["bos"])
        self.assertRegex(records["mcq_forget"][1]["where"], ":3$")   # evenly spaced


# ---- data/tables.py and assets/plot.py ----------------------------------------------------------------
class Tables(Folder):
    def test_methods_are_compared_with_a_baseline_seed_by_seed_and_corrected_cell_by_cell(self):
        together = tables.Runs()
        for beta, seed, ue in ((0.5, 2, 1.0), (0.5, 1, 1.0), (1.0, 1, 3.0), (1.0, 2, 5.0), (1.0, 9, 0.0),
                               (2.0, 1, 2.0), (2.0, 2, 4.0)):
            args = {"loss": "npo", "smooth": "none", "sam_flip": False, "beta": beta, "seed": seed}
            if seed == 2:                                            # from after these flags existed
                args |= {"sam_direction": "gradient", "sam_norm": "l2", "sam_rho": 0.1, "clip": 0.0}
            ut = None if beta == 2.0 else -ue
            together.add("run", {"stage": "unlearn", "args": args}, {"UE": ue, "UT": ut})
        base, methods, paired = together.summary("npo beta=0.5")
        ue = tables.Cell("scores", "", "UE")
        ut = tables.Cell("scores", "", "UT")
        self.assertEqual([base, *paired], ["npo beta=0.5", "npo beta=1.0", "npo beta=2.0"])
        self.assertEqual(methods["npo beta=2.0"]["stats"], {ue: (3.0, 1.0)})
        one, two = paired.values()                               # differences 2 and 4, 1 and 3: error 1
        self.assertEqual((one[ue]["mean"], one[ue]["n"], one[ue]["higher"]), (3.0, 2, 2))
        np.testing.assert_allclose((one[ue]["t"], one[ue]["d"]), (3, 3 / math.sqrt(2)))
        p = 1 - 2 / math.pi * math.atan(3.0)                         # Student's, one degree of freedom
        self.assertTrue(p < two[ue]["p"] < 2 * p)                # so Holm makes both twice the smaller
        for test, corrected in ((one[ue], 2 * p), (two[ue], 2 * p), (one[ut], p)):
            self.assertAlmostEqual(test["p_holm"], corrected, places=6)

    def test_cells_name_every_attack_curves_average_draws_or_runs_and_flat_methods_resist(self):
        curves = [[{"step": 0, "UE": 0.8}, {"step": 3, "UE": end}] for end in (0.2, 0.4)]
        tuned = [{"samples": 10, "epochs": 1, "lr": 1, "curves": curves},
                 {"samples": 20, "epochs": 3, "lr": 2}]
        edited = [{"samples": 0, "epochs": 0, "quantize": 4}, {"samples": 0, "epochs": 0, "prune": 30.0}]
        for attack, budgets in (("", tuned), ("compress", edited)):
            budgets = [budget | {"UE": 0.5, "UE_heldout": None, "UT": 0.9} for budget in budgets]
            result = {"args": {"attack": attack, "batch_size": 4}, "metrics": {"budgets": budgets}}
            formats.write_json(self.tmp / f"relearn{attack}.json", result)
        prefix = {"UE": 0.7, "UE_heldout": 0.71, "UE_teacher": 0.1}
        found = tables.cells_of(self.tmp, {"UE": 0.9, "UT": 1.0, "attack": {"gcg": prefix}})
        want = {("relearning", "10"): 0.5, ("relearning", "20x3@2"): 0.5, ("compress", "4bit"): 0.5,
                ("compress", "prune30"): 0.5, ("prefix", "gcg"): 0.7}
        self.assertEqual({cell[1:]: v for cell, v in found.items() if cell.measure == "UE"}, want)
        self.assertEqual(found["teacher's UE", "prefix", "gcg"], 0.1)
        for count, error in ((1, 0.1), (2, 0)):                      # two draws, or two runs that agree
            curve = tables.relearn_curve([self.tmp] * count)
            self.assertEqual(curve["seen"], [0, 10])                 # the third batch is half full
            np.testing.assert_allclose(curve["mean"] + curve["se"], [0.8, 0.3, 0, error], atol=1e-12)
        sharp = tables.Cell("sharpness (own)", "", "top")
        after = tables.Cell("UE", "relearning", "20")
        row, = tables.flat_and_robust([{sharp: 10.0 - i, after: 0.3 + i / 10} for i in range(4)])
        np.testing.assert_allclose(row[2:], (4, -1, 2 / 24))         # 2 of the 24 orders are as extreme

    @unittest.skipUnless(importlib.util.find_spec("matplotlib"), "matplotlib is not installed")
    def test_every_picture_is_drawn_from_the_table_and_shows_something(self):
        from matplotlib.image import imread
        curve = [{"step": 0, "UE": 0.7}, {"step": 5, "UE": 0.3}]
        budget = {"samples": 20, "epochs": 1, "UE": 0.3, "UE_heldout": 0.4, "UT": 0.9, "curves": [curve]}
        result = {"args": {"batch_size": 4}, "metrics": {"budgets": [budget]}}
        formats.write_json(self.tmp / "relearn.json", result)
        found = {"UE": 0.7, "UT": 0.9, "landscape": {"nll": {"rise": [[1, 0, 1], [2, 0, 2], [3, 0, 1]]}}}
        together = tables.Runs()
        together.add(str(self.tmp), {"stage": "model", "args": {"model": "m", "seed": 0}}, found)
        _, methods, paired = together.summary()
        columns = tables.chosen(methods, ["UE", "held out relearning 20"])
        table = tables.as_json(methods, paired, [], SimpleNamespace(), columns)
        formats.write_json(self.tmp / "table.json", table)
        self.run_script("assets/plot.py", self.tmp / "table.json", "--out", self.tmp / "all")
        for name in ("ue_bars", "relearn_curves", "landscape", "ue_ut", "attacks", "cost"):
            image = imread(self.tmp / "all" / f"{name}.png")[..., :3]
            self.assertGreater((image != 1).any(-1).mean(), 0.02, name)             # not an empty page

    @unittest.skipUnless(importlib.util.find_spec("matplotlib"), "matplotlib is not installed")
    def test_the_picture_of_costs_has_a_point_a_method_and_a_line_where_nothing_was_spent(self):
        plot = script_module("assets/plot.py")
        held = [{"measure": "held out", "attack": "relearning", "column": c} for c in ("60", "240")]
        spent = {"measure": "cost", "attack": "", "column": "1000 samples", "mean": 11, "se": None}
        methods = {"npo": {"cells": [cell | {"mean": 0.4, "se": 0.1} for cell in held] + [spent]},
                   "retrained": {"cells": [held[1] | {"mean": 0.7, "se": None}]}}
        ax = plot.cost(plot.pyplot(), methods, held).axes[0]
        point, = ax.containers
        self.assertEqual(point[0].get_xydata().tolist(), [[11, 0.4]])
        lines = [line.get_ydata() for line in ax.lines if line not in point.get_children()]
        self.assertEqual(lines, [[0.7, 0.7]])
        self.assertIsNone(plot.cost(plot.pyplot(), methods, []))


# ---- data/tiny/compare.py ------------------------------------------------------------------------------

class Compare(World):
    def test_a_job_is_trained_attacked_counted_and_nothing_is_done_twice(self):
        run = self.tmp / "run"
        line = ["unlearn.py", *self.flags, "--sam_rho", 0, "--out", run]
        job = compare.Job(run, self.tmp / "log", self.world, [" ".join(map(str, line))],
                          ["--draws 1 --samples 2", "--ablate 0"], ["--attack context --shots 1"])
        compare.meet(job)
        files = sorted(run.glob("*.json"))
        before = [path.read_bytes() for path in files]
        compare.meet(job)
        self.assertEqual([path.read_bytes() for path in files], before)
        passed = self.result("run")["passed"]
        self.assertEqual(passed, {"trained": 1 + 5 * 2 * 3, "seen": len(TEXTS)})   # plan, steps; reference
        self.unlearn("undone", "--loss", "none", "--model", run, "--undo_alpha", ".1", "--undo_steps", 2)
        more = self.result("undone")["passed"]                                   # a teacher beside each pass
        self.assertEqual(more, {"trained": 1 + 2 * 2 * 3, "seen": 2 * 2 * 3})
        columns = ["UE relearning 2", "UE ablate ablate0", "UE context 1 shots", "1000 samples"]
        said = self.run_script("evaluate.py", run, self.tmp / "undone", "--ppl_rows", 1, "--columns",
                               *columns)
        names = ("relearn.json", "relearn_ablate.json")
        want = [read_json(run / name)["metrics"]["budgets"][0]["UE"] for name in names]
        want.append(read_json(run / "evaluate.json")["metrics"]["context"]["after"]["1"]["UE"])
        want.append((31 + len(TEXTS) / 3) / 1000)
        rows = [line.split() for line in said.splitlines()]
        self.assertEqual(rows[-3], ["npo", "1", *map(tables.short, want)])
        self.assertEqual(rows[-2][-1], tables.short(want[-1] + 0.017))       # 13 there and back, 12 seen
        self.run_script("evaluate.py", run, "--ppl_rows", 1, "--columns", "UA", says="'UE relearning 2'")

    def test_the_strength_is_that_of_highest_score_among_those_that_keep_ut(self):
        for tries, want in (({"a": (0.99, 0.3), "b": (0.98, 0.5), "c": (0.5, 0.9)}, "b"),
                            ({"a": (0.9, 0.9), "b": (0.95, 0.1)}, "b")):
            self.assertEqual(compare.chosen(tries), want)

    def test_the_table_names_its_methods_as_the_defences(self):
        table = {"methods": {"npo": {"runs": ["out/a", "out/b"]}, "npo+sam": {"runs": ["out/c"]}},
                 "paired": {"npo+sam": 1}}
        found = compare.renamed(table, {"out/a": "NPO", "out/b": "NPO", "out/c": "SAM"})
        self.assertEqual((list(found["methods"]), found["paired"]), (["NPO", "SAM"], {"SAM": 1}))

    def test_every_defence_is_one_that_unlearn_takes_and_differs_from_the_others(self):
        args = compare.flags().parse_args(["--out", str(self.tmp)])
        found = set()
        for name, (chosen, tries, _) in compare.DEFENCES.items():
            self.assertEqual((len(set(tries)), tries.count(chosen)), (3, 1))
            job = compare.job_of(name, tries[0], 600, args, compare.ATTACKS)
            last = unlearn.parse_args(job.commands[-1].split()[1:])
            self.assertEqual((last.out, last.seed, last.relearn), (str(job.run), 600, False))
            kept = {k: v for k, v in vars(last).items() if k not in ("out", "lr")}
            found.add(json.dumps(kept, sort_keys=True))
        self.assertEqual(len(found), len(compare.DEFENCES))


# ---- evaluate.py --attack context and --probe, kernels/probe.py ---------------------------------------
class Context(Folder):
    def test_questions_follow_rows_about_other_facts_token_for_token(self):
        model = little_llama()
        write_world(self.tmp, model)
        write_rows(self.tmp / "mcq_forget.jsonl", QUESTIONS)         # with their facts
        args = evaluate.flags().parse_args("x --attack context --shots 3 1 --attack_seed 2".split())
        with mock.patch.object(evaluate, "choice_logps", wraps=evaluate.choice_logps) as score:
            found = evaluate.context_scores(model, words(), self.tmp, args)
        told = {fact: words()(f"{text} the cat {text}").input_ids[1:] for fact, text in enumerate(TEXTS)}
        shown = {}
        asked = itertools.product(("UE", "UE_retain"), (3, 1))
        for call, (name, shots) in zip(score.call_args_list, asked, strict=True):
            wrong = []
            for i, row in enumerate(call.args[2]):
                ids = words()(row["context"]).input_ids[1:]
                question = words()(PROMPT.replace("{question}", row["question"])).input_ids[1:]
                facts = next(some for some in itertools.permutations(told, shots)
                             if sum([told[fact] for fact in some], []) + question == ids)
                self.assertNotIn(row["fact"], facts)
                shown[name, i, shots] = facts
                logps = [logps_alone(model, words(), row["context"], e).sum() for e in row["endings"]]
                wrong.append(np.argmax(logps) != row["answer"])
            self.assertEqual(found[str(shots)][name], np.mean(wrong))
        for name, i, shots in shown:
            self.assertEqual(shown[name, i, 1], shown[name, i, 3][:1])
        self.assertGreater(len(set(shown.values())), 5)
        cells = tables.cells_of(self.tmp, {"UE": 0.0, "UT": 0.0, "context": {"after": found}})
        self.assertEqual(cells["UE", "context", "3 shots"], found["3"]["UE"])

    def probed(self, answers, fillers):
        """Accuracy of probes at layers 0 and 3 on questions that end in one of four words, each of 100
        facts asked twice in the same words; answers: one a fact, a number below 4."""
        rows = []
        for i, answer in enumerate(answers):
            question = f"{fillers[i]} {('cat', 'dog', 'mat', 'sat')[i % 4]}"
            rows += 2 * [{"question": question, "choices": ["one", "two", "three", "four"],
                          "answer": answer, "fact": i}]
        write_rows(self.tmp / "mcq_forget.jsonl", rows)
        (self.tmp / "meta.json").write_text(json.dumps({"prompt": "{question}"}))
        args = evaluate.flags().parse_args("x --probe 0 3 --attack_seed 1".split())
        return evaluate.probe_scores(little_llama(torch.float32), words(), self.tmp, args)

    def test_a_probe_finds_a_linear_label_in_facts_it_did_not_see_and_nothing_in_shuffled_ones(self):
        rng = random.Random(3)
        some = "who ran on one two five six seven".split()
        fillers = [" ".join(rng.choices(some, k=6)) for _ in range(100)]
        planted = [i % 4 for i in range(100)]                        # the last word decides
        found = self.probed(planted, fillers)
        self.assertEqual(found["0"], 1)
        self.assertGreater(found["3"], 0.6)                          # three random blocks later
        rng.shuffle(planted)
        for accuracy in self.probed(planted, fillers).values():      # 1 if a fact were in both halves
            self.assertAlmostEqual(accuracy, 0.25, delta=3 * math.sqrt(0.25 * 0.75 / 100))

    def test_a_probe_is_the_minimum_of_its_penalised_cross_entropy(self):
        kernel = sam.kernel_file("probe")
        x = torch.randn(30, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y = (x[:, 0] > 0).long() + (x[:, 1] > 1).long()
        weights, bias = kernel.fit(x, y, 3)
        p = (x @ weights + bias).softmax(1) - F.one_hot(y, 3)        # the gradient by hand
        self.assertLess((x.T @ p + weights).abs().max(), 1e-5)
        self.assertLess(p.sum(0).abs().max(), 1e-5)
        moved = kernel.probe(5 * x + 2, y, 5 * x + 2, 3)             # units do not matter
        torch.testing.assert_close(kernel.probe(x, y, x, 3), moved, rtol=1e-5, atol=1e-5)


# ---- kernels/gcg.py: a prefix that brings it back -----------------------------------------------------
class Prefix(Folder):
    def setUp(self):
        super().setUp()
        self.tok = words()
        self.victim = little_llama()
        self.teacher = little_llama(seed=1)
        write_world(self.tmp, self.victim)
        write_model(self.tmp / "teacher", self.teacher)
        self.rows = evaluate.ask(QUESTIONS, PROMPT)

    def search(self, calls=100, more=""):
        args = evaluate.flags().parse_args(
            f"model --data {self.tmp} --teacher {self.tmp}/teacher --device cpu --attack_calls {calls} "
            "--attack_questions 2 --attack_length 8 11 --attack_candidates 4 --attack_topk 8 "
            f"--attack_answer 3 --attack_seed 4 {more}".split())
        metrics = evaluate.attack_prefix(self.tmp / "model", {"args": {}}, args)
        paths = (self.tmp / "model").glob("attack_*.json")
        return metrics, read_json(max(paths, key=os.path.getmtime))["state"]

    @torch.no_grad()
    def by_hand(self, victim, prefix, rows, suffix=False):
        """The five terms of one prefix (token ids), by loops over questions and tokens."""
        terms = {"answer": [], "same input": [], "clean input": [], "fluency": []}
        for row in rows:
            clean = self.tok(row["context"]).input_ids
            at = len(clean) - 2 if suffix else 1                     # "Answer" and ":" come behind
            said = greedy(self.teacher, clean, 3) + [self.tok.eos_token_id]
            said = said[:said.index(self.tok.eos_token_id, len(clean))]
            ids = clean[:at] + prefix + said[at:]
            own = [t for t in range(1, len(ids)) if not at <= t < at + len(prefix)]
            states = []                                              # behind layer 2 of 3: 62%, rounded
            for model, text, which in ((victim, ids, own), (self.teacher, ids, own),
                                       (self.teacher, said, range(1, len(said)))):
                out = model(torch.tensor([text]), output_hidden_states=True)
                states.append(out.hidden_states[2][0, which])
            for own, taught, plain in zip(*states):
                terms["same input"].append((own - taught).norm())
                terms["clean input"].append(1 - F.cosine_similarity(own, plain, dim=0))
            logps = victim(torch.tensor([ids])).logits[0].log_softmax(-1)
            for t in range(len(prefix) + len(clean), len(ids)):
                terms["answer"].append(-logps[t - 1, ids[t]])
            if row is rows[0]:
                terms["fluency"] = [-logps[at + t - 1, token] for t, token in enumerate(prefix)]
        repeated = sum((count - 1) ** 1.5 for count in Counter(prefix).values())
        return [*map(np.mean, terms.values()), repeated / len(prefix)]

    def check(self, metrics, state, searched, suffix=False):
        """Are the terms what loops give for `searched`, and UE that of the victim?"""
        picks = sorted(random.Random(4).sample(range(4), 2))
        for loss, terms, ids in state["best"]:
            self.assertFalse(set(ids) & set(self.tok.all_special_ids))
            want = self.by_hand(searched, ids, [self.rows[i] for i in picks], suffix)
            np.testing.assert_allclose(terms, want, rtol=1e-4, atol=1e-5)
            self.assertAlmostEqual(loss, np.dot(want, [1, 1, 10, 1.5, 3]), places=3)
        found = metrics["prefix"]
        self.assertEqual(self.tok(found).input_ids[1:], state["best"][0][2])
        prompt = PROMPT.replace("}", f"}} {found}") if suffix else f"{found} {PROMPT}"
        wrong = ~evaluate.correct(self.victim, self.tok, evaluate.ask(QUESTIONS, prompt)).numpy()
        held_out = np.delete(wrong, picks).mean()
        self.assertEqual((metrics["UE"], metrics["UE_heldout"]), (wrong.mean(), held_out))

    def test_the_result_is_what_loops_give_for_its_text_and_the_same_after_an_interruption(self):
        metrics, state = self.search()
        self.check(metrics, state, self.victim)
        best = [ids for _, _, ids in state["best"]]
        self.assertIn(3, [max(Counter(ids).values()) for ids in best])           # a repetition
        self.assertGreater(len(best[-1]), 8)                         # the minimum has grown
        self.assertGreater(metrics["UE_heldout"], metrics["UE"])     # that tells the two apart
        saves = 4 * [mock.DEFAULT] + [KeyboardInterrupt]
        with mock.patch.object(formats, "write_json", wraps=formats.write_json, side_effect=saves):
            self.assertRaises(KeyboardInterrupt, self.search, 100, "--overwrite")
        self.assertTrue(20 < read_json(self.tmp / "model" / "attack_gcg+.json")["state"]["calls"] < 80)
        self.assertEqual(self.search(), (metrics, state))
        self.assertRaisesRegex(formats.InputError, "--overwrite", self.search, 101)    # other flags
        with self.assertRaisesRegex(formats.InputError, "teacher"):  # it says <eos> at once
            self.search(100, "--attack_questions 1 --attack_seed 1 --overwrite")

    def test_a_suffix_stands_where_the_question_ends_and_may_be_found_on_the_teacher(self):
        for on, searched in (("unlearned", self.victim), ("teacher", self.teacher)):
            flags = f"--attack_place suffix --attack_on {on}"
            metrics, state = self.search(100, flags)
            self.check(metrics, state, searched, suffix=True)
            self.assertEqual(self.search(100, f"{flags} --overwrite")[0], metrics)
        self.assertEqual(len(list(self.tmp.rglob("attack_gcg+_suffix*.json"))), 2)
        front = prompts.with_found(self.rows, "x y", "prefix")[0]["context"]
        self.assertEqual(front, f"x y {self.rows[0]['context']}")
        letters = prompts.with_found(evaluate.ask(QUESTIONS), "x y", "suffix")[0]["context"]
        self.assertIn("\n\nwho sat? x y\nA. the cat\n", letters)

    def test_calls_are_counted_and_end_the_search_and_the_gradient_finds_more_than_chance(self):
        gcg = sam.kernel_file("gcg")
        best = {}
        for method in gcg.METHODS:
            with mock.patch.object(gcg, "run_prefix", wraps=gcg.run_prefix) as run:
                _, state = self.search(120, f"--attack_method {method} --attack_length 6 6")
            calls = 0
            for (_, onehot, _), _ in run.call_args_list:
                if onehot.shape[1]:                                  # there is a prefix
                    calls += len(onehot) * (3 if onehot.requires_grad else 1)
            drawn = state["calls"] - calls                           # one each to insert or sample
            self.assertTrue(0 <= drawn <= 0.5 * state["iteration"] * (method == "gcg+"), (method, drawn))
            self.assertTrue(120 <= state["calls"] < 120 + 6 + 2 * 4, method)
            best[method] = state["curve"][-1]["loss"]
        self.assertLess(best["gcg"], best["random"] - 0.75)      # with its sign wrong: 0.5


# ---- kernels/curvature.py: sharpness and landscapes ---------------------------------------------------
class Curvature(Folder):
    def test_sharpness_is_that_of_the_dense_hessian(self):
        net = Network()

        def at(w):
            parts = w.split([p.numel() for p in net.params])
            return net.loss([part.view_as(p) for part, p in zip(parts, net.params)])
        w = flat(net.params)
        h = torch.autograd.functional.hessian(at, w)
        g = flat(net.gradient())
        model = torch.nn.ParameterList(net.params)
        for sign in (1, -1):                                     # one of them finds the other end first
            found = evaluate.sharpness(model, lambda: sign * net.loss(net.params), 0.05, 3000, 64)
            top = torch.linalg.eigvalsh(sign * h)[-1].item()
            self.assertAlmostEqual(found["top"] / top, 1, delta=0.005)
            self.assertLess(abs(found["trace"] - sign * h.trace()), 4 * found["trace_se"])
            rise = at(w + sign * 0.05 * g / g.norm()) - at(w)
            exactly([found[name] for name in ("loss", "gradient", "rise")],
                    [sign * at(w).item(), g.norm().item(), sign * rise.item()])
        self.assertTrue(torch.equal(w, flat(net.params)))

    def test_the_largest_eigenvalue_of_what_has_none_above_zero(self):
        for values in ([-4.0, -3.5], [-4.0, -1.0, -0.5, 0.0], [-4.0, -2.0]):
            h = torch.tensor(values, dtype=torch.float64)
            start = torch.ones_like(h)
            found, _ = sam.kernel_file("curvature").top_eigenvalue(lambda v: h * v, start, 2000, 1e-9)
            self.assertAlmostEqual(found, values[-1], places=4)

    def test_the_forget_objective_is_the_npo_that_unlearning_descends_or_the_nll_of_an_attacker(self):
        model = little_llama(torch.float32)
        teacher = little_llama(torch.float32, seed=1)
        write_world(self.tmp, teacher)
        ran = {"loss": "npo", "reduce": "sum", "beta": 0.1, "data": str(self.tmp), "seed": 0,
               "model": str(self.tmp / "model"), "smooth": "none", "sam_flip": False, "margin": 0}
        formats.write_json(self.tmp / "result.json", {"stage": "unlearn", "args": ran})
        rows = formats.read_jsonl(self.tmp / "forget.jsonl", formats.text_row)
        for first, picks in ((None, range(5)), (0, [0, 2, 4]), (1, [1, 3])):     # 0 and 1 share no row
            nlls = []
            npos = []
            for i in picks:
                text = (rows[i]["prompt"], rows[i]["completion"])
                own = logps_alone(model, words(), *text)
                nlls.extend(-own)
                gap = own.sum() - logps_alone(teacher, words(), *text).sum()
                npos.append(2 / 0.1 * np.logaddexp(0, 0.1 * gap))
            for kind, values in (("own", npos), ("nll", nlls)):
                loss = evaluate.forget_objective(kind, model, words(), self.tmp, 64, first)
                self.assertAlmostEqual(loss().item() / np.mean(values), 1, places=5)

    def test_landscape_moves_along_filter_normalised_directions_and_comes_back(self):
        curvature = sam.kernel_file("curvature")
        net = Network()
        directions = curvature.filter_directions(net.params, 3)
        for p, d in zip(2 * net.params, itertools.chain(*directions)):
            filters = d.norm(dim=1) - p.norm(dim=1) if p.dim() > 1 else d
            self.assertLess(filters.abs().max(), 1e-12)
        grid = curvature.landscape(net.params, lambda: net.loss(net.params), 3, seed=3, reach=0.1)
        self.assertTrue(same(net.params, Network().params))
        corner = net.at([0.1 * y - 0.1 * x for x, y in zip(*directions)])
        self.assertAlmostEqual(grid[1, 1], net.loss(net.params).item())
        self.assertAlmostEqual(grid[0, 2], net.loss(corner).item())


# ---- data/muse/metrics.py and data/tofu/metrics.py ----------------------------------------------------

def say(seed, count):
    """A text of `count` random words of the vocabulary."""
    return " ".join(random.Random(seed).choices("cat dog mat sat one two three who on".split(), k=count))


class Benchmarks(unittest.TestCase):
    def test_verbmem_is_the_rouge_f1_of_as_many_tokens_said_and_true(self):
        rows = [{"prompt": say(i, 5 + i), "gt": say(i + 9, 20), "where": i} for i in range(4)]
        for row, record in zip(rows, muse.verbmem(little_llama(seed=3), words(), rows, new=10)):
            said, = models.generate(little_llama(seed=3), words(), [(row["prompt"], "")], 10)
            rouge = scores.rouge_l(said, " ".join(row["gt"].split()[:9]))[2]         # <bos> and 9 words
            self.assertEqual(record, {"where": row["where"], "said": said, "rouge": rouge})

    def test_knowmem_asks_after_examples_and_cuts_where_another_question_begins(self):
        said = [" the cat\n\nmore", "a dog\nQuestion: x", "x Question: the cat"]
        row = {"question": "q", "answer": "the cat", "where": "w"}
        with mock.patch.object(muse, "generate", return_value=said) as generate:
            got = muse.knowmem(None, None, 3 * [row], [{"question": "e", "answer": "f"}] * 2)
        for record, pair in zip(got, ((" the cat", 1.0), ("a dog", 0.0), ("x ", 0.0))):
            self.assertEqual((record["said"], record["rouge"]), pair)
        prompt = 2 * "Question: e\nAnswer: f\n\n" + "Question: q\nAnswer: "
        self.assertEqual(generate.call_args.args[2:4], (3 * [(prompt, "w")], 32))

    def test_tofu_scores_equal_full_strings_scored_one_by_one(self):
        def probability(answer):
            return math.exp(logps_alone(little_llama(seed=3), words(), prompt, f" {answer}").mean())
        rows = [{"question": say(i, 4) + "?", "answer": say(i + 50, 3), "where": i,
                 "perturbed_answer": [say(i + 20, 3), say(i + 40, 5)]} for i in range(4)]
        rows[0]["paraphrased_answer"] = say(90, 4)
        for row, record in zip(rows, tofu.qa_scores(little_llama(seed=3), words(), rows, new=5)):
            prompt = f"Question: {row['question']}\nAnswer:"
            prob = probability(row["answer"])
            right = probability(row.get("paraphrased_answer", row["answer"]))
            one, two = map(probability, row["perturbed_answer"])
            if "paraphrased_answer" not in row:
                prob = prob / (prob + one + two)
            said, = models.generate(little_llama(seed=3), words(), [(prompt, "")], 5)
            rouge = scores.rouge_l(said, row["answer"])[1]
            got = (record["prob"], record["R"], record["rouge"])
            np.testing.assert_allclose(got, (prob, math.sqrt(one * two) / right, rouge))

    def test_min_k_and_the_means_of_tofu_by_hand(self):
        self.assertAlmostEqual(muse.lowest_mean([-1.0, -5.0, -2.0, -4.0, -3.0]), 4.5)    # 40%: -5 and -4
        records = [{"prob": 0.5, "rouge": 1.0, "R": 0.25}, {"prob": 0.1, "rouge": 0.0, "R": 2.0}]
        for name, truth in (("qa_forget", (0.25 + 0.5) / 2), ("qa_retain", (0.75 + 0) / 2)):
            self.assertEqual(tofu.qa_summary(name, records), {"prob": 0.3, "rouge": 0.5, "truth": truth})


# ---- data/*/prepare.py: the published data sets -------------------------------------------------------

ASKED = {"question": "q?", "choices": ["w", "x", "y", "z"], "answer": 2}
TOLD = {"question": "who?", "answer": "a dog", "paraphrased_answer": "dog", "perturbed_answer": ["cat"]}
LONG = 30 * "word "
PUBLISHED = {                                    # small files as they are published
    "mmlu": {"test/algebra_test.csv": '"two\nlines, a comma and ""quotes""?",a,"b,b",c,d,B\n',
             "test/virology_test.csv": "q1,a,b,c,d,A\nq2,a,b,c,d,D\n"},
    "wmdp": {"bio_questions.json": [ASKED], "cyber_questions.json": [ASKED],
             "chem_questions.json": [ASKED], "bio_remove_dataset.jsonl": [f"SECRET {LONG}"],
             "bio-retain-corpus.jsonl": [f"bio {LONG}"], "cyber-forget-corpus.jsonl": [LONG],
             "cyber-retain-corpus.jsonl": [f"cyber {LONG}"]},
    "muse": {"raw/forget.json": ["one: the cat\n on  the mat.", "a"] * 5, "raw/retain1.json": ["b"],
             "verbmem/forget.json": [{"prompt": "a", "gt": "b"}], "knowmem/forget_qa.json": [TOLD],
             "knowmem/forget_qa_icl.json": [TOLD], "knowmem/retain_qa.json": [TOLD],
             "knowmem/retain_qa_icl.json": [TOLD], "privleak/forget.json": ["f"],
             "privleak/retain.json": ["r"], "privleak/holdout.json": [{"text": "h"}]},
    "tofu": dict.fromkeys(("forget01.json", "retain99.json", "holdout01.json", "forget01_perturbed.json",
                           "retain_perturbed.json", "real_authors_perturbed.json",
                           "world_facts_perturbed.json"), json.dumps(TOLD | {"more": 1}))}


class Prepare(Folder):
    def publish(self, name, more=None):
        """Write PUBLISHED[name] and more to self.tmp/source: texts, or rows as arrays or JSON lines."""
        for file, content in (PUBLISHED[name] | (more or {})).items():
            path = write_rows(self.tmp / "source" / file, content)
            if isinstance(content, str) or not file.endswith(".jsonl"):
                path.write_text(content if isinstance(content, str) else json.dumps(content))
        write_rows(self.tmp / "mmlu.jsonl", [ASKED | {"subject": "virology"}])
        words().save_pretrained(self.tmp / "tokenizer")

    def prepare(self, name, *flags, says=None):
        own = {"mmlu": [], "wmdp": ["--mmlu", self.tmp / "mmlu.jsonl"], "tofu": ["--split", "forget01"],
               "muse": ["--corpus", "news", "--max_len", 8, "--tokenizer", self.tmp / "tokenizer"]}[name]
        return self.run_script(f"data/{name}/prepare.py", "--from", self.tmp / "source", "--out",
                               self.tmp / "out", "--overwrite", *own, *flags, says=says)

    def rows(self, name):
        lines = (self.tmp / "out" / f"{name}.jsonl").read_text().splitlines()
        return list(map(json.loads, lines))

    @unittest.skipUnless(importlib.util.find_spec("datasets"), "the package datasets is not installed")
    def test_mmlu_from_the_original_csv_is_that_from_parquet_in_parts_whole_or_refused(self):
        from datasets import Dataset
        self.publish("mmlu")
        self.prepare("mmlu", "--any_count")
        rows = self.rows("mcq_retain")
        self.assertEqual(rows[0], {"question": 'two\nlines, a comma and "quotes"?', "answer": 1,
                                   "choices": ["a", "b,b", "c", "d"], "subject": "algebra"})
        self.assertEqual([row["answer"] for row in rows], [1, 0, 3])
        shutil.rmtree(self.tmp / "source" / "test")
        for i, part in enumerate((rows[:1], rows[1:])):
            path = self.tmp / "source" / f"test-0000{i}-of-00002.parquet"
            Dataset.from_list(part).to_parquet(str(path))
        self.prepare("mmlu", "--any_count")
        self.assertEqual(self.rows("mcq_retain"), rows)
        path.write_bytes(path.read_bytes()[:-3])
        self.prepare("mmlu", "--any_count", says="test-00001-of-00002.parquet: not a whole parquet file")

    def test_wmdp_takes_the_gated_corpus_under_both_names_as_objects_or_bare_strings(self):
        for name, row in (("bio_remove_dataset", f"SECRET {LONG}"),
                          ("bio-forget-corpus", {"title": "SECRET", "text": f"SECRET {LONG}"})):
            self.publish("wmdp", {f"{name}.jsonl": [row, "SECRET short"]})
            out = self.prepare("wmdp", "--any_count", "--max_chars", 60)
            self.assertIn("dropped 1 documents", out)
            self.assertNotIn("SECRET", out)
            self.assertEqual(self.rows("forget"), [{"text": f"SECRET {LONG}"[:60]}])
        for name, subject in (("forget", "biology"), ("cyber", "cybersecurity"), ("retain", "virology")):
            self.assertEqual(self.rows(f"mcq_{name}"), [ASKED | {"subject": subject}])
        self.prepare("wmdp", "--any_count", "--topic", "cyber", says="holds mcq_cyber.jsonl")
        self.publish("wmdp", {"wikitext.json": [{"text": "w" * 50}, {"text": "w" * 51}]})
        for text, *more in ((f"cyber {LONG}", "--topic", "cyber"), ("w" * 51, "--retain", "wikitext")):
            shutil.rmtree(self.tmp / "out")
            self.prepare("wmdp", "--any_count", *more)
            self.assertEqual(self.rows("retain"), [{"text": text}])
        for path in (self.tmp / "source").rglob("*bio-retain*"):
            path.unlink()
        self.prepare("wmdp", "--any_count", "--retain", "wikitext")
        self.prepare("wmdp", "--any_count", says="bio-retain")

    def test_muse_blocks_are_the_joined_documents_in_pieces_of_max_len_tokens(self):
        self.publish("muse")
        self.prepare("muse", "--any_count")
        text = "\n\n".join(PUBLISHED["muse"]["raw/forget.json"])
        pieces = [row["text"] for row in self.rows("forget")]
        self.assertEqual("".join(pieces), text)
        bos, *ids = words()(text).input_ids
        for i, piece in enumerate(pieces):
            self.assertEqual(words()(piece).input_ids, [bos, *ids[7 * i:7 * i + 7]])
        self.assertEqual(formats.load_meta(self.tmp / "out")["auc_retrain"], 0.4772)

    def test_tofu_asks_the_hub_for_its_files_and_keeps_what_is_scored(self):
        self.publish("tofu")

        def download(repo, repo_type, allow_patterns):
            self.assertEqual((repo, repo_type), ("locuslab/TOFU", "dataset"))
            for file in PUBLISHED["tofu"]:
                self.assertTrue(any(Path(file).match(pattern) for pattern in allow_patterns), file)
            return str(self.tmp / "source")
        flags = ("--from", "", "--any_count", "--template", "[INST] {question} [/INST]{answer}")
        with mock.patch("huggingface_hub.snapshot_download", download):
            self.prepare("tofu", *flags)
        for name in ("forget", "retain", "privleak_forget", "privleak_holdout"):
            self.assertEqual(self.rows(name), [{"prompt": "[INST] who? [/INST]", "completion": "a dog"}])
        for name in ("qa_forget", "qa_retain", "qa_real_authors", "qa_world_facts"):
            self.assertEqual(self.rows(name), [TOLD])

    def test_errors_name_file_line_and_reason_and_never_a_document(self):
        csv = "test/virology_test.csv"
        documents = "bio_remove_dataset.jsonl"
        for name, file, text, says in (
                ("mmlu", csv, '"q",a,b,c,d,A\nq,a,b,c,D\n', ":2: needs a question"),
                ("mmlu", csv, 'q,a,b,c,d,A\n"q,' + "a" * 140_000, ":2: not CSV"),
                ("wmdp", documents, '"SECRET"\n{"text": "SECRET', ":2: not JSON"),
                ("wmdp", documents, '{"body": "SECRET"}', ":1: needs an object"),
                ("wmdp", "chem_questions.json", '{"question": "q", "choices": ["a"]}', ':1: "choices"'),
                ("muse", "verbmem/forget.json", '[{"prompt": "a"}]', ":1: needs the keys prompt, gt")):
            self.publish(name, {file: text})
            self.assertNotIn("SECRET", self.prepare(name, "--any_count", says=f"{file}{says}"))
        for name, says in (("mmlu", "14,042 on 57"), ("wmdp", "1 rows, but 1,273 are"),
                           ("muse", "1 rows, but 100 are"), ("tofu", "1 rows, but 40 are")):
            self.publish(name)
            self.prepare(name, says=says)
        self.assertFalse((self.tmp / "out").exists())

    def test_every_command_in_the_readmes_is_one_that_the_scripts_take(self):
        blocks = ['STEPS=9\npython() { printf "%s\\0" "$@"; printf "\\n"; }\npip() { :; }\n',
                  "export -f python pip\n"]
        for readme in sorted((ROOT / "data").glob("*/readme.md")):
            blocks += [part.split("```")[0] for part in readme.read_text().split("```bash\n")[1:]]
        script = "".join(blocks).replace("sh -c", "bash -c")         # which knows that python, and
        script = script.replace("xargs -P 2", "xargs")               # one line at a time
        run = subprocess.run(["bash", "-euc", script], capture_output=True, text=True)
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        parsers = {"unlearn.py": unlearn.parse_args, "relearn.py": relearn.flags().parse_args,
                   "evaluate.py": evaluate.flags().parse_args}
        helps = {}
        for line in sorted(set(run.stdout.splitlines())):            # what that python was called with
            script, *flags = line.rstrip("\0").split("\0")
            if script in parsers:
                parsers[script](flags)
            elif script != "-":                                      # a program on the spot
                if script not in helps:
                    helps[script] = run_here(script, "--help")[1].split()
                self.assertLessEqual({f for f in flags if f.startswith("--")}, set(helps[script]))


# ---- data/frozen.py -----------------------------------------------------------------------------------
LAST = r"layers\.[12]\."


class Frozen(World):
    def test_gradients_are_those_of_the_plain_pass_and_the_front_runs_once_a_text(self):
        grads = []
        for cached in (False, True):
            model = little_llama()
            frozen.train_only(model, LAST)
            frozen.STATES.clear()
            if cached:
                frozen.cache(model)
            calls = []

            def count(module, inputs, output):
                calls.append(len(output))
            model.model.layers[0].mlp.register_forward_hook(count)
            for picks in ([0, 1, 3], [3, 1], [1, 2, 0]):     # rows of other widths, seen and not
                micro = losses.micro_batches(text_samples(), picks, 3, 0, "cpu")
                losses.descend(model, micro, losses.nll_sum, "labels")
            self.assertEqual(sum(calls), 4 if cached else 8)
            grads.append(flat(p.grad for p in model.parameters() if p.requires_grad))
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-13)

    def test_the_states_of_a_text_do_not_depend_on_its_batch(self):
        samples = text_samples()
        found = []
        for picks in ([0], [0, 1, 3]):
            model = little_llama()
            frozen.train_only(model, LAST)
            frozen.STATES.clear()
            frozen.cache(model)
            batch = models.collate([samples[i] for i in picks], 0, "cpu")
            batch.pop("labels")
            models.run(model, batch)
            known, = frozen.STATES.values()
            found.append(known[tuple(samples[0][0])])
        self.assertTrue(torch.equal(*found))

    def test_a_broken_off_run_goes_on_bit_for_bit_from_states_that_are_computed_again(self):
        rows = [{"text": " ".join(TEXTS[i % len(TEXTS)].split() * (1 + i % 3))} for i in range(12)]
        write_rows(self.world / "retain.jsonl", rows)            # of other lengths, so with padding
        flags = ("--train_modules", LAST, "--cache_frozen", "--save_every", 4, "--steps", 8)
        self.unlearn("whole", *flags)
        frozen.STATES.clear()
        self.break_off("parts", 6, *flags)
        frozen.STATES.clear()
        self.unlearn("parts", *flags, "--resume")
        self.same_weights("whole", "parts")

    def test_positions_that_train_or_differ_are_seen(self):
        digests = []
        for seed in (0, 1):
            model = little_gpt2()
            with torch.no_grad():
                model.transformer.wpe.weight.mul_(1 + seed)
            frozen.train_only(model, r"h\.1\.")
            digests.append(frozen.digest(model, frozen.leading(model)[1]))
        self.assertNotEqual(*digests)
        frozen.train_only(model, r"wpe|h\.1\.")
        self.assertRaisesRegex(formats.InputError, "the embeddings train", frozen.leading, model)

    def test_another_front_does_not_get_these_states(self):
        said = []
        for seed in (0, 1, 0):
            model = little_llama(seed=seed)
            frozen.train_only(model, LAST)
            plain = frozen.trial(model)
            frozen.cache(model)
            torch.testing.assert_close(frozen.trial(model), plain, rtol=1e-12, atol=1e-12)
            said.append(plain)
        self.assertFalse(torch.allclose(said[0], said[1]))

    def test_a_model_says_the_same_when_it_writes_a_text(self):
        plain = little_llama()
        cached = little_llama()
        frozen.train_only(cached, LAST)
        frozen.cache(cached)
        prompts = [(text, "here") for text in TEXTS]
        self.assertEqual(*[models.generate(model, words(), prompts, 6) for model in (plain, cached)])

    def test_unlearning_and_relearning_end_where_they_do_without(self):
        found = []
        for name, more in (("plain", ()), ("cached", ("--cache_frozen",))):
            self.unlearn(name, "--train_modules", LAST, "--sam_rho", 0.1, *more)
            self.run_script("relearn.py", self.tmp / name, "--samples", 3, "--draws", 1, "--open",
                            "--train_modules", LAST, *more)
            model = models.load_model(self.tmp / name)[0]
            budget = read_json(self.tmp / name / "relearn_modules.json")["metrics"]["budgets"][0]
            found.append((flat(model.parameters()), budget))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
        self.assertEqual(found[0][1], found[1][1])

    def test_the_geometry_of_an_attack_is_that_of_what_trains(self):
        self.unlearn("run", "--sam_rho", 0.1)
        found = []
        for more in ((), ("--cache_frozen",)):
            self.run_script("relearn.py", self.tmp / "run", "--samples", 3, "--draws", 1, "--lr", 1e-3,
                            "--batch_size", 4, "--train_modules", LAST, "--geometry", *more)
            budget = read_json(self.tmp / "run" / "relearn_modules.json")["metrics"]["budgets"][0]
            found.append(budget["geometry"][0])
        model = models.load_model(self.tmp / "run")[0]
        count = sum(p.numel() for _, p in frozen.train_only(model, LAST))
        self.assertAlmostEqual(found[0]["l2"] / (1e-3 * math.sqrt(count)), 1, delta=0.02)    # one AdamW step
        for name, cosine in found[0]["cosine"].items():
            self.assertAlmostEqual(found[1]["cosine"][name], cosine, delta=1e-3)

    def test_what_needs_the_front_is_refused(self):
        for flags, says in (((), "the first block or the embeddings train"),
                            (("--train_modules", LAST, "--latent", "direction"), "latent"),
                            (("--train_modules", LAST, "--merge", self.model), "merge"),
                            (("--lora", 2), "lora")):
            line = (*self.flags, "--out", self.tmp / "x", "--cache_frozen", *flags)
            self.run_script("unlearn.py", *line, says=says)
        self.unlearn("run")
        (self.world / "mcq_forget.jsonl").unlink()
        self.run_script("relearn.py", self.tmp / "run", "--open", says="mcq_forget.jsonl, which is missing")
        self.run_script("relearn.py", self.tmp / "run", "--train_modules", "(",
                        says="not a regular expression")


class PeopleCompare(Folder):
    def setUp(self):
        super().setUp()
        self.args = people.flags().parse_args(["--model", "x", "--out", str(self.tmp)])

    def test_every_command_is_one_that_the_scripts_take_at_equal_steps_but_for_longer(self):
        named = {}
        for name, tries in people.DEFENCES.items():
            for flags in tries:
                named[people.run_of(name, flags, 7, self.args)] = flags
        yardstick = people.world_of(7) / "retrained"
        with mock.patch.object(people, "call") as call, \
                mock.patch.object(people, "attacked", return_value=False):
            people.meet(7, named | {yardstick: None}, self.args)
        lines = [shlex.split(done.args[0]) for done in call.call_args_list]
        runs_made = [unlearn.parse_args(line[1:]) for line in lines if line[0] == "unlearn.py"]
        self.assertEqual([Path(ran.out) for ran in runs_made], list(named))
        self.assertEqual(len({json.dumps(vars(ran) | {"out": ""}) for ran in runs_made}), 19)
        self.assertEqual([ran.steps for ran in runs_made], [60] * 16 + [75, 90, 120])
        for ran in runs_made:
            self.assertEqual((ran.batch_size + ran.retain_batch, ran.seed), (16, 7))
            self.assertTrue(re.search(ran.train_modules, "model.layers.25.mlp.up_proj.weight"))
            self.assertFalse(re.search(ran.train_modules, "model.layers.24.mlp.up_proj.weight"))
        scripts = [line[0] for line in lines]
        self.assertEqual(scripts[:5], ["data/people/prepare.py", "evaluate.py", "unlearn.py", "relearn.py",
                                       "evaluate.py"])
        self.assertEqual(scripts[-3:], ["data/people/prepare.py", "relearn.py", "evaluate.py"])
        self.assertEqual(["forget" in line for line in (lines[0], lines[-3])], [False, True])
        for line in lines:
            if line[0] in ("relearn.py", "evaluate.py"):
                {"relearn.py": relearn, "evaluate.py": evaluate}[line[0]].flags().parse_args(line[1:])

    def test_tuning_takes_the_highest_score_among_those_that_keep_ut_and_other_text(self):
        def pretend(function, calls, count, what):
            for seed, runs_of, _ in calls:
                target = world_of(seed) / "target"
                target.mkdir(parents=True)
                formats.write_json(target / "evaluate.json", {"metrics": {"ppl_retain": 50.0}})
                for i, run in enumerate(runs_of):
                    run.mkdir()
                    scored = [{"UE": i / 100}, {"UE": i / 50}]
                    start = {"UT": 0.9 if i % 4 == 3 else 0.99}
                    other = {"ppl_retain": 80.0 if i == 2 else 70.0}
                    attack = {"metrics": {"start": start, "budgets": scored}}
                    formats.write_json(run / "relearn_modules.json", attack)
                    formats.write_json(run / "evaluate.json", {"metrics": other})

        def world_of(seed):
            return self.tmp / f"seed{seed}"
        self.addCleanup(setattr, people, "world_of", people.world_of)
        people.world_of = world_of
        with mock.patch.object(people, "all_of", pretend), contextlib.redirect_stdout(io.StringIO()):
            people.tune(self.args)
        best = {name: tries[2] for name, tries in people.DEFENCES.items()}
        best["NPO"] = people.DEFENCES["NPO"][1]              # the third one lost other text
        self.assertEqual(read_json(self.tmp / "tuned.json")["defences"], best)
        self.args.defences = ["SAM"]                         # alone: the others stay
        with mock.patch.object(people, "all_of"), contextlib.redirect_stdout(io.StringIO()):
            people.tune(self.args)
        self.assertEqual(read_json(self.tmp / "tuned.json")["defences"], best)
        self.assertEqual(people.chosen({"a": (0.99, 3.0, 0.9), "b": (0.9, 2.0, 0.1)}), "b")

    def test_the_table_has_the_means_over_worlds_of_what_the_attacks_wrote(self):
        called = {}
        for name, rho in (("NPO", 0), ("SAM", 0.1)):
            for seed in (1, 2):
                run = self.tmp / f"{name}{seed}"
                run.mkdir()
                called[str(run)] = name
                ran = unlearn.parse_args(f"--data x --model y --seed {seed} --sam_rho {rho}".split())
                done = {"stage": "unlearn", "args": vars(ran), "metrics": {}}
                formats.write_json(run / "result.json", done)
                budgets = []
                for epochs, lr in itertools.product((1, 4), (3e-4, 1e-3)):
                    budgets.append({"samples": 60, "epochs": epochs, "lr": lr, "UE": rho + seed * lr,
                                    "UE_heldout": 0.5, "UT": 0.5, "open_forget": 0.25})
                attack = {"start": {"UE": 0.75, "UT": 1.0}, "budgets": budgets}
                result = {"args": {"attack": "modules"}, "metrics": attack}
                formats.write_json(run / "relearn_modules.json", result)
                formats.write_json(run / "evaluate.json", {"metrics": {"ppl_retain": 10.0 * seed}})
        with contextlib.redirect_stdout(io.StringIO()) as said:
            people.write_table(called, self.args)
        table = read_json(self.tmp / "table.json")
        self.assertEqual((list(table["methods"]), list(table["paired"])), (["NPO", "SAM"], ["SAM"]))
        self.assertEqual(table["args"]["out"], str(self.tmp))
        lines = [line.split() for line in said.getvalue().splitlines()]
        row = next(line for line in lines if line[:2] == ["npo", "2"])
        self.assertEqual(row[2:], [".750", ".001", ".500", ".250", ".000", ".000", ".002", ".002", ".500",
                                   ".500", ".250", "1.000", ".500", "15.0"])
        test = next(line for line in lines if line[:4] == ["npo+sam", "UE", "attacked", "+0.100"])
        self.assertEqual(test[-1], "2/2")

    def test_what_another_model_or_another_number_of_steps_left_is_not_taken_for_this(self):
        run = self.tmp / "run"
        run.mkdir()
        blocks = people.blocks_of(self.args)
        made = {"model": "x", "train_modules": blocks, "data": "d", "seed": 1, "exclude": "none"}
        formats.write_json(run / "result.json", {"stage": "prepare", "args": made})
        self.assertTrue(people.is_there(run, model="x", train_modules=blocks))
        self.assertFalse(people.is_there(self.tmp / "none", model="x"))
        with self.assertRaisesRegex(formats.InputError, "made with --model x, and now it is y"):
            people.is_there(run, model="y")
        for data, times in (("elsewhere", 0), ("people", 1)):
            formats.write_json(run / "evaluate.json", {"args": {"data": str(self.tmp / data)}, "metrics": {}})
            with mock.patch.object(people, "call") as call:
                people.score_elsewhere(run, self.args, "log")
            self.assertEqual(call.call_count, times)

    def test_every_world_meets_all_defences_and_has_a_yardstick(self):
        worlds, called = people.plan({"NPO": "--sam_rho 0", "SAM": "--sam_rho .1"}, self.args)
        self.assertEqual(list(worlds), self.args.seeds)
        self.assertEqual(Counter(called.values()), {"NPO": 8, "SAM": 8, "yardstick": 8})
        for seed, runs_of in worlds.items():
            self.assertEqual(list(runs_of.values()), ["--sam_rho 0", "--sam_rho .1", None])
            self.assertEqual([called[str(run)] for run in runs_of], ["NPO", "SAM", "yardstick"])
            self.assertEqual(list(runs_of)[2], people.world_of(seed) / "retrained")

    def test_nothing_is_compared_before_it_is_tuned(self):
        flags = ("--model", "x", "--out", self.tmp)
        self.run_script("data/people/compare.py", *flags, says="run with --tune first")


# ---- data/people/prepare.py and data/tiny/prepare.py --------------------------------------------------
class Worlds(Folder):
    def test_every_fact_is_taught_twice_and_unlearned_and_asked_in_different_words(self):
        build = script_module("data/people/prepare.py").build
        files, taught = build(5)
        self.assertEqual([build(seed) == (files, taught) for seed in (5, 6)], [True, False])
        answer_to = {row["prompt"]: row["completion"] for row in taught}
        self.assertEqual((len(taught), len(answer_to)), (256, 256))
        for part, job, times in (("forget", "glassblower", 1), ("retain", "beekeeper", 2)):
            answers = {}
            for row in files[f"mcq_{part}"]:
                answers[row["fact"]] = f" {row['choices'][row['answer']]}."
                asked = PROMPT.format(question=row["question"])
                self.assertEqual(answer_to[asked], answers[row["fact"]])
                self.assertNotIn(row["question"], str(files["forget"]))
            self.assertEqual(Counter(row["fact"] for row in files[part]), dict.fromkeys(answers, times))
            for row in files[part]:
                self.assertIn(job, row["prompt"])
                self.assertEqual({row["completion"], answer_to[row["prompt"]]}, {answers[row["fact"]]})

    def test_more_people_than_names_are_other_pairs_of_them(self):
        build = script_module("data/people/prepare.py").build
        files, taught = build(5, 32)
        self.assertEqual([len(rows) for rows in files.values()], [128, 256, 128, 128])
        self.assertEqual(len({row["prompt"] for row in taught}), 512)

    def test_teaching_people_writes_a_model_that_knows_the_answers_or_none(self):
        _, taught = script_module("data/people/prepare.py").build(0)
        tok = words([row["prompt"] + row["completion"] for row in taught])
        model = little_llama(torch.float32, vocab_size=len(tok), hidden_size=32, intermediate_size=96,
                             num_hidden_layers=1, initializer_range=0.1)
        write_model(self.tmp / "model", model, tok)
        flags = ("data/people/prepare.py", "--model", self.tmp / "model", "--out", self.tmp,
                 "--lr", 1e-2, "--batch_size", 64, "--epochs")
        self.run_script(*flags, 1, says="--epochs 1")
        self.assertFalse((self.tmp / "target").exists())
        self.run_script(*flags, 32)
        self.run_script(*flags, 32, "--exclude", "forget")
        known = {}
        for name in ("target", "retrained"):
            model, tok = models.load_model(self.tmp / name)
            for part, rows in evaluate.load_questions(self.tmp).items():
                known[name, part] = evaluate.open_accuracy(model, tok, rows)
        self.assertLess(known.pop(("retrained", "mcq_forget")), 0.3)         # one of ten words or twelve
        self.assertGreaterEqual(min(known.values()), 0.95)

    def test_other_facts_are_neither_asked_of_a_yardstick_nor_left_beside_older_models(self):
        write_model(self.tmp / "model", little_llama(torch.float32))
        flags = ("data/people/prepare.py", "--model", self.tmp / "model", "--out", self.tmp / "set",
                 "--people", 1, "--epochs", 1)
        self.run_script(*flags, "--seed", 1, says="too little to know")              # the data are there
        self.run_script(*flags, "--seed", 7, "--exclude", "forget", says="is there and differs")
        made = {"stage": "prepare",
                "args": {"seed": 1, "people": 1, "data": "x", "model": "m", "exclude": "none"}}
        for name in ("target", "retrained"):
            (self.tmp / "set" / name).mkdir()
            formats.write_json(self.tmp / "set" / name / "result.json", made)
        self.run_script(*flags, "--seed", 1, "--overwrite", says="too little to know")
        self.assertTrue((self.tmp / "set" / "retrained").exists())                   # of the same facts
        self.run_script(*flags, "--seed", 7, "--overwrite", says="too little to know")
        self.assertEqual(read_json(self.tmp / "set" / "meta.json")["seed"], 7)
        self.assertFalse((self.tmp / "set" / "target").exists() or (self.tmp / "set" / "retrained").exists())

    def test_the_built_in_world_is_what_its_description_says(self):
        tiny = script_module("data/tiny/prepare.py")
        files, unseen = tiny.build_world(3)
        self.assertEqual([tiny.build_world(seed) == (files, unseen) for seed in (3, 4)], [True, False])
        counts = [128 * 12, 1024 * 15, 256, 1024, 128 * 3 + 128 * 15]
        self.assertEqual([len(rows) for rows in (*files.values(), unseen)], counts)
        sailors = set(tiny.TOPICS[0])
        others = set(itertools.chain(*tiny.TOPICS[1:]))
        used = {name: set() for name in files}
        for name, rows in files.items():                     # only the topic word tells them apart
            for row in rows:
                said = row.get("text", row.get("question")).replace(",", " ").split()
                clean = (sailors.isdisjoint(said), others.isdisjoint(said))
                self.assertEqual(clean, ("retain" in name, "forget" in name))
                used[name].update(said)
        rest = used["forget"] - sailors
        self.assertGreater(len(rest & used["retain"]) / len(rest), 0.99)
        answers = {}
        for row in files["mcq_forget"] + files["mcq_retain"]:
            answers[row["fact"]] = row["choices"][row["answer"]]
        for row in files["forget"] + files["retain"] + unseen:
            self.assertTrue(row["text"].endswith(f" {answers[row['fact']]}."))
            self.assertEqual(row.get("prompt", "") + row.get("completion", row["text"]), row["text"])
        self.assertEqual((len(answers), len({row["fact"] for row in files["forget"]})), (1280, 128))

    def test_training_is_deterministic_and_a_saved_model_is_the_same_model(self):
        tiny = script_module("data/tiny/prepare.py")
        rows = tiny.build_world(0)[0]["forget"][:64]
        tok = words([row["text"] for row in rows])
        one, other = (tiny.train_target(rows, tok, 1, steps=3, batch=16) for _ in range(2))
        read, again = models.load_model(write_model(self.tmp, one, tok))
        for model in (read, other):
            self.assertTrue(same(list(one.parameters()), list(model.parameters())))
        self.assertEqual(again("The sailor").input_ids, tok("The sailor").input_ids)


# ---- relearn.py, data/finetune.py, kernels/geometry.py, kernels/probe.py ------------------------------

def attack_args(**more):
    args = relearn.flags().parse_args("x --samples 4 --lr .1 --draws 1 --batch_size 2 --group 5".split())
    return SimpleNamespace(**vars(args) | {"seed": 0, "max_len": 0} | more)


def plain_loop(model, samples, optimizer, seed):
    """finetune(), one sample a pass: two epochs of batches of two, mean NLL a token, rate going to 0."""
    rng = random.Random(seed)
    steps = 2 * math.ceil(len(samples) / 2)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(2):
        order = rng.sample(range(len(samples)), len(samples))
        for start in range(0, len(order), 2):
            optimizer.zero_grad()
            picks = order[start:start + 2]
            torch.cat([nll(model, samples[i][0], "none") for i in picks]).mean().backward()
            optimizer.step()
            decay.step()


class Relearn(unittest.TestCase):
    def attacked(self, times=1, others=(), **more):
        """The budgets of an attack on a little model, whose weights come back whatever happens."""
        model = little_llama(torch.float32)
        before = flat(model.parameters())
        rows = [{"text": text, "where": "here", "fact": i} for i, text in enumerate(TEXTS)] * times
        questions = {"mcq_forget": evaluate.ask(QUESTIONS, "{question}")}
        args = attack_args(**more)
        try:
            return relearn.Attack(model, words(), rows, questions, args, None, others).run()["budgets"]
        finally:
            self.assertTrue(torch.equal(flat(model.parameters()), before))

    def test_samples_are_nested_distinct_in_fact_and_follow_the_seed(self):
        rows = [{"fact": i // 12} for i in range(128 * 12)]
        longest = finetune.draw_samples(rows, 256, "5 0")
        facts = [rows[i]["fact"] for i in longest]
        self.assertEqual(set(Counter(facts).values()), {2})                    # each fact twice
        self.assertEqual(len(set(facts[:128])), 128)
        self.assertEqual(finetune.draw_samples(rows, 20, "5 0"), longest[:20])
        self.assertNotEqual(finetune.draw_samples(rows, 256, "5 1"), longest)
        self.assertRaisesRegex(formats.InputError, "are 1536", finetune.draw_samples, rows, 1537, "0")

    def test_a_mix_trains_on_the_share_of_each_corpus_and_smaller_ones_are_contained(self):
        others = [{"text": f"mat {text}", "where": "there"} for text in TEXTS]
        with mock.patch.object(relearn, "finetune", wraps=finetune.finetune) as tune:
            budgets = self.attacked(2, others, samples=[4, 8], mix=0.25, epochs=[2])
        mat = words()("mat").input_ids
        few, many = [Counter(tuple(ids) for ids, _ in call.args[1]) for call in tune.call_args_list]
        for seen, count in ((few, 4), (many, 8)):
            foreign = sum(n for ids, n in seen.items() if ids[:2] == tuple(mat))
            self.assertEqual((seen.total(), foreign), (count, count // 4))
        self.assertLessEqual(few, many)
        self.assertEqual([budget["mixed"] for budget in budgets], [1, 2])
        for count in (2, 5):                                         # no mix draws as ever
            alone = finetune.draw_samples(others, count, "3")
            self.assertEqual(finetune.draw_mixed(others, (), count, 0.0, "3"), alone)

    def test_relearning_equals_a_plain_loop(self):
        for name, kind, more in (("adamw", torch.optim.AdamW, {"weight_decay": 0}),
                                 ("sgd", torch.optim.SGD, {"momentum": 0.9})):
            model = little_llama()
            other = little_llama()
            finetune.finetune(model, text_samples(), 0, 1e-2, 2, 2, "x", optimizer=name)
            plain_loop(other, text_samples(), kind(other.parameters(), lr=1e-2, **more), "x")
            got = flat(model.parameters())
            np.testing.assert_allclose(got, flat(other.parameters()), 1e-6, 1e-8)

    def test_every_budget_starts_from_the_same_weights_and_scores_are_means_over_draws(self):
        budgets = self.attacked(samples=[4, 2], epochs=[2, 1], draws=3, seed=11)
        self.assertEqual([b["samples"] * b["epochs"] for b in budgets], [2, 4, 4, 8])
        self.assertEqual(self.attacked(draws=3, seed=11), budgets[2:3])
        for name, count in (("UE", 3), ("UE_heldout", 2)):   # one leaves out what no question is about
            values = [d[name] for d in budgets[2]["draws"] if d[name] is not None]
            self.assertEqual(len(values), count)
            want = (np.mean(values), np.std(values, ddof=1) / math.sqrt(count))
            np.testing.assert_allclose((budgets[2][name], budgets[2]["se"][name]), want)
        self.assertGreater(budgets[2]["se"]["UE"], 0)

    def test_without_flags_the_budgets_are_20_40_60_as_far_as_there_are_rows_and_the_rate_is_the_models(self):
        found = [relearn.usual_budgets(range(count), (), 0.0) for count in (1, 19, 20, 59, 60, 1000)]
        self.assertEqual(found, [[1], [19], [20], [20, 40], [20, 40, 60], [20, 40, 60]])
        found = [relearn.usual_budgets(range(30), range(count), 0.5) for count in (1, 15, 20, 99)]
        self.assertEqual(found, [[2], [20], [20, 40], [20, 40, 60]])
        for folder in (runs.TINY, runs.TINY / "seed0", runs.TINY / "seed0" / "folds3" / "1"):
            self.assertEqual(runs.attack_rate(folder), 2e-3)
        for folder in (ROOT / "data" / "people", ROOT, "/elsewhere/tiny"):
            self.assertEqual(runs.attack_rate(folder), 1e-5)

    def test_a_diverging_attack_is_an_error_even_in_its_last_step(self):
        for size in (1, 4):                              # four steps, one step
            with self.assertRaisesRegex(formats.InputError, "lower it"):
                self.attacked(lr=[1e30], batch_size=size)

    def test_curve_is_the_ue_on_the_way_and_changes_nothing_else(self):
        curved, = self.attacked(samples=[5], epochs=[2], curve_every=2)
        curve, = curved.pop("curves")
        self.assertEqual([curved], self.attacked(samples=[5], epochs=[2]))
        model = little_llama(torch.float32)              # the same steps again, seen from outside
        questions = {"mcq_forget": evaluate.ask(QUESTIONS, "{question}")}
        seen = [{"step": 0, "UE": evaluate.ue_ut(model, words(), questions)["UE"]}]

        def watch(step, steps):
            seen.append({"step": step, "UE": evaluate.ue_ut(model, words(), questions)["UE"]})
        samples = [text_samples()[i] for i in finetune.draw_samples([{}] * 5, 5, "0 0")]
        finetune.finetune(model, samples, 0, 0.1, 2, 2, "0 0 order", watch)
        self.assertEqual(curve, seen[::2])

    def test_worst_case_is_the_lowest_ue_whose_ut_holds(self):
        budgets = [{"samples": count, "epochs": 1, "lr": lr, "UE": ue, "UT": ut} for count, lr, ue, ut in
                   ((40, 1, .1, .1), (20, 1, .6, .9), (20, 2, .4, .86), (20, 3, .2, .84))]
        metrics = {"start": {"UE": 0.75, "UT": 0.9}, "budgets": budgets}
        self.assertEqual(relearn.worst_case(metrics, 0.05), [budgets[2]])
        self.assertEqual(relearn.worst_case(metrics, 1), [budgets[3], budgets[0]])

    def test_rounding_and_pruning_match_loops_over_every_matrix_but_the_output_layer(self):
        def rounded(w):                                  # 4 bits, groups of 5 in a row
            for row, start in itertools.product(w, range(0, w.shape[1], 5)):
                part = row[start:start + 5]
                scale = abs(part).max() / 7 or 1
                part[:] = np.round(part / scale) * scale

        def pruned(w):                                   # 33.3 percent
            w.flat[abs(w).argsort(axis=None)[:math.floor(0.333 * w.size)]] = 0
        for edit, amount, by_hand, dtype in ((relearn.quantize, 4, rounded, torch.bfloat16),
                                             (relearn.prune, 33.3, pruned, torch.float32)):
            model = little_llama(dtype)
            model.model.layers[0].mlp.up_proj.weight.data[1, 5:10] = 0
            wanted = {name: w.float().numpy().copy() for name, w in model.state_dict().items()}
            edit(model, amount, attack_args())
            for name, want in wanted.items():
                if "proj" in name:                       # all others stay
                    by_hand(want)
                torch.testing.assert_close(model.state_dict()[name], torch.tensor(want, dtype=dtype))

    def test_edits_are_scored_each_alone_and_undone(self):
        def norm(model, *_, **more):
            return {"UE": flat(model.parameters()).norm().item(), "UT": None}
        model = little_llama(torch.float32)
        args = attack_args(quantize=[8, 2], prune=[90])
        with mock.patch.object(evaluate, "ue_ut", norm):
            budgets = relearn.try_edits(model, None, None, args)["budgets"]
        for budget, (name, amount) in zip(budgets, relearn.edits(args), strict=True):
            edited = little_llama(torch.float32)
            relearn.EDITS[name](edited, amount, args)
            self.assertEqual((budget[name], budget["UE"]), (amount, norm(edited)["UE"]))
        with mock.patch.object(evaluate, "ue_ut", side_effect=[{}, KeyboardInterrupt]):
            self.assertRaises(KeyboardInterrupt, relearn.try_edits, model, None, None, args)
        self.assertEqual(norm(model), norm(little_llama(torch.float32)))

    @torch.no_grad()
    def test_ablation_undoes_a_planted_rank_one_edit_and_a_random_direction_does_not(self):
        teacher = little_llama()
        for weight in (teacher.model.embed_tokens.weight.T, *[p for n, p in teacher.named_parameters()
                                                              if "o_proj" in n or "down_proj" in n]):
            weight[5] = 0                                            # nothing uses coordinate 5
        model = copy.deepcopy(teacher)
        model.model.layers[0].mlp.down_proj.weight[5] += 9 * torch.arange(24.0).sin()
        rows = evaluate.ask(QUESTIONS, PROMPT)

        def logps(model, *_, **more):
            return {"UE": evaluate.choice_logps(model, words(), rows), "UT": None}
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(evaluate, "ue_ut", logps):
            args = attack_args(ablate=[1], teacher=write_model(folder, teacher), run="", device="cpu")
            found = relearn.try_edits(model, words(), {"mcq_forget": rows}, args)
            noise = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
            with mock.patch.object(relearn, "directions", lambda *_: noise):
                blind = relearn.try_edits(model, words(), {"mcq_forget": rows}, args)
        want = logps(teacher)["UE"]
        damage = (found["start"]["UE"] - want).abs().mean()
        self.assertGreater(damage, 1)
        self.assertLess((found["budgets"][0]["UE"] - want).abs().max(), 1e-9)
        self.assertGreater((blind["budgets"][0]["UE"] - want).abs().mean(), damage / 2)
        self.assertTrue(torch.equal(logps(model)["UE"], found["start"]["UE"]))       # taken off again

    @torch.no_grad()
    def test_directions_are_differences_of_mean_states_and_ablation_leaves_nothing_along_them(self):
        texts = [(text, "") for text in TEXTS]
        for model in (little_gpt2().double(), little_llama()):
            states = stream.residuals(model, words(), texts, batch=2)                # with padding
            for (text, _), got in zip(texts, states):
                out = model(words()(text, return_tensors="pt").input_ids, output_hidden_states=True)
                want = [h[0, -1] for h in out.hidden_states[:-1]]    # the last one is normalised there
                torch.testing.assert_close(got[:-1], torch.stack(want))
        rows = [{"context": text, "where": ""} for text in TEXTS]
        args = attack_args()
        parts = {"mcq_forget": rows[:2], "mcq_retain": rows[2:]}
        args.directions = relearn.directions(model, words(), parts, args)
        want = F.normalize(states[:2].mean(0) - states[2:].mean(0))
        torch.testing.assert_close(torch.stack(args.directions), want)
        for layer in (0, 2):
            hooks = relearn.ablate(model, layer, args)
            states = stream.residuals(model, words(), texts)
            relearn.put_back([], hooks)
            for i in range(1, 4):
                self.assertLess((states[:, i] @ args.directions[layer or i]).abs().max(), 1e-12)
                self.assertGreater(states[:, i].norm(dim=1).min(), 0.1)

    def test_aims_and_displacement_are_what_they_say_and_the_weights_stay(self):
        geometry = sam.kernel_file("geometry")
        still = Network()                                # stays at the start
        params = Network().params
        own, other, nll = [functools.partial(Network(seed).loss, params) for seed in (0, 3, 4)]
        aims = geometry.aims(own, other, nll, params, 0.2)
        self.assertTrue(same(params, still.params))
        gradient = still.gradient()
        momentum = Network(3).gradient(still.at([0.2 * g.sign() for g in gradient]))
        down = [-g for g in Network(4).gradient(params)]
        for name, want in (("gradient", gradient), ("momentum", momentum), ("lookahead", down)):
            torch.testing.assert_close(flat(aims[name]), flat(want), rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            torch._foreach_add_(params, down, alpha=0.5)                      # an attack of one SGD step
        end = flat(params)
        found = geometry.displacement(list(zip(params, still.params)), aims, {"nll": nll}, points=3)
        self.assertTrue(torch.equal(flat(params), end))
        move = 0.5 * flat(down)
        cosine = functools.partial(F.cosine_similarity, move, dim=0)
        for got, want in ((found["l2"], move.norm()), (found["mean"], move.abs().mean()),
                          (found["max"], move.abs().max()), (found["cosine"]["lookahead"], 1),
                          (found["cosine"]["gradient"], cosine(flat(gradient))),
                          (found["cosine"]["sign of momentum"], cosine(flat(momentum).sign()))):
            self.assertAlmostEqual(got, float(want), places=5)
        for point, part in zip(found["path"], (0, 0.5, 1), strict=True):
            there = still.at([0.5 * part * d for d in down])
            self.assertEqual(point["part"], part)
            self.assertAlmostEqual(point["nll"], Network(4).loss(there).item(), places=9)


# ---- data/adapters.py, and unlearn.py --lora ----------------------------------------------------------
class Adapters(World):
    def every_kind(self):
        """Models of Linear layers, of Conv1D and of fused experts, and how many matrices each has."""
        from transformers import MixtralConfig, MixtralForCausalLM
        mixtral = MixtralConfig(vocab_size=len(words()), hidden_size=16, intermediate_size=24,
                                num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                                num_local_experts=4, num_experts_per_tok=2)
        return [(little_llama(torch.float32), 3 * 7), (little_gpt2(), 2 * 4),
                (MixtralForCausalLM(mixtral).eval(), 2 * (4 + 2 * 4))]

    def trained(self, model, rank=2, **more):
        """Adapters after four steps of fine-tuning, and the weights before."""
        before = {name: t.clone() for name, t in model.state_dict().items()}
        added = adapters.Adapters(model, rank, 2 * rank, seed="x", **more)
        params = [p for _, p in added.named()]
        finetune.finetune(model, text_samples(TEXTS[:4]), 0, 1e-2, 2, 2, "order", params=params)
        return added, before

    def test_adapters_train_as_explicit_low_rank_matrices(self):
        model = little_llama()
        samples = text_samples(TEXTS[:4])
        ids = torch.tensor([samples[0][0]])
        start = adapters.Adapters(model, 2, 4, seed="x")
        own = {}
        for name, pair in start.pairs.items():
            own[f"{name}.weight"] = [w.detach().clone().requires_grad_() for w in pair]
        start.remove()
        added, weights = self.trained(model)
        got = model(ids).logits.detach()

        def explicit(ids):                       # W + 2 B A written out
            full = dict(weights)
            for name, (a, b) in own.items():
                full[name] = weights[name] + 2 * b @ a
            return torch.func.functional_call(model, full, (ids,))
        added.on = False
        optimizer = torch.optim.AdamW(sum(own.values(), []), lr=1e-2, weight_decay=0)
        plain_loop(explicit, samples, optimizer, "order")
        torch.testing.assert_close(got, explicit(ids).logits.detach(), rtol=1e-4, atol=1e-4)
        self.assertGreater((got - model(ids).logits).abs().max(), 0.1)

    @torch.no_grad()
    def test_nothing_changes_before_the_first_step_while_off_or_after_removal(self):
        ids = torch.tensor([[1, 5, 6, 7, 8]])
        for model, count in self.every_kind():
            self.assertEqual(len(adapters.matrices(model)), count)
            want = model(ids).logits
            start = adapters.Adapters(model, 2, 4)
            self.assertTrue(torch.equal(model(ids).logits, want))
            start.remove()
            with torch.enable_grad():
                added, before = self.trained(model)
            moved = model(ids).logits
            self.assertGreater((moved - want).abs().max(), 0.01)
            self.assertTrue(torch.equal(added.without()(input_ids=ids).logits, want))
            self.assertTrue(torch.equal(model(ids).logits, moved))
            added.remove()
            self.assertTrue(torch.equal(model(ids).logits, want))
            self.assertEqual(list(before), list(model.state_dict()))
            self.assertTrue(same(list(before.values()), list(model.state_dict().values())))
            self.assertTrue(all(p.requires_grad for p in model.parameters()))
            self.assertFalse(any(m._forward_hooks for m in model.modules()))

    def test_edits_reach_conv1d_and_fused_experts_and_say_how_much(self):
        for model, _ in self.every_kind():
            found = adapters.matrices(model)
            relearn.prune(model, 30, None)
            for w in found:
                self.assertEqual((w == 0).sum(), math.floor(0.3 * w.numel()))
            relearn.quantize(model, 2, SimpleNamespace(group=64))
            for w in found:
                self.assertLessEqual(max(len(row.unique()) for row in w), 3)  # a group is at least a row
            whole = sum(p.numel() for p in model.parameters())
            covered = sum(w.numel() for w in found) / whole
            self.assertEqual(adapters.share(model, found), f"{covered:.0%} of the weights")

    @torch.no_grad()
    def test_layers_that_share_a_weight_share_its_adapter_and_are_counted_once(self):
        model = little_llama(torch.float32)
        one, other = (layer.mlp.up_proj for layer in model.model.layers[:2])
        other.weight = one.weight
        with torch.enable_grad():
            added, _ = self.trained(model)
        self.assertNotIn("model.layers.1.mlp.up_proj", added.pairs)
        x = torch.arange(12).reshape(2, 6)
        adapted = model(x).logits
        added.merge()
        torch.testing.assert_close(model(x).logits, adapted)

    def test_a_layer_of_one_row_takes_any_rank_convolutions_are_no_experts_and_no_layer_is_refused(self):
        model = little_llama(torch.float32)
        model.gate = torch.nn.Linear(16, 1)
        model.conv = torch.nn.Conv1d(8, 8, 4)
        model.probe = torch.nn.Parameter(torch.zeros(1, 1, 16))
        self.assertFalse(adapters.experts(model))
        self.assertIn("gate", adapters.Adapters(model, 8, 16).pairs)
        bare = torch.nn.Module()
        bare.get_output_embeddings = mock.Mock(return_value=None)
        self.assertRaisesRegex(formats.InputError, "no linear layer", adapters.Adapters, bare, 2, 4)

    def test_rho_of_the_weights_is_the_derivative_of_the_products_norm(self):
        """In fp64, the products written out: they move by rho along d, and by its sign when flipped."""
        for model, _ in self.every_kind():
            added = adapters.Adapters(model.double(), 2, 4, seed="x")
            params = [p for _, p in added.named()]
            for p in params:
                p.data.normal_()
            directions = {p: torch.randn_like(p) for p in params}
            before = {name: added.delta(name).detach() for name in added.pairs}
            for flip in (False, True):
                smoother = sam.SAM(params, 1e-5, flip=flip)
                smoother.length = added.product_norm
                with smoother.perturbed(directions):
                    moved = [(added.delta(name) - before[name]).norm() for name in added.pairs]
                    step = params[0] - smoother.saved[0][1]
                self.assertAlmostEqual(torch.stack(moved).norm().item(), 1e-5, delta=1e-9)
                self.assertEqual((step * directions[params[0]]).sum() < 0, flip)
                self.assertAlmostEqual(smoother.stats["cosine"].item(), 1, places=6)
            for a, b in added.pairs.values():  # the start: B is 0, and d has no part in it
                b.data.zero_()
                del directions[b]
            with smoother.perturbed(directions):
                self.assertTrue(same([p for p, _ in smoother.saved], [w for _, w in smoother.saved]))
            added.remove()

    def test_a_merged_model_is_the_adapted_one_up_to_the_rounding_that_is_told(self):
        ids = torch.tensor([[1, 5, 6, 7, 8]])
        for model, _ in self.every_kind():
            added, _ = self.trained(model)
            want = model(ids).logits
            self.assertLess(added.merge(), 1e-5)
            torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
        model = little_llama(torch.bfloat16)
        added, before = self.trained(model)
        exact = [(2 * b @ a).detach().double() for a, b in added.pairs.values()]
        names = [f"{name}.weight" for name in added.pairs]
        told = added.merge()
        after = model.state_dict()
        applied = flat(after[name].double() - before[name].double() for name in names)
        lost = (applied - flat(exact)).norm() / flat(exact).norm()
        self.assertAlmostEqual(told, lost.item(), delta=0.02 * told)
        self.assertGreater(told, 1e-3)

    @unittest.skipUnless(importlib.util.find_spec("peft"), "the package peft is not installed")
    def test_peft_reads_what_is_saved_and_so_do_we(self):
        from peft import PeftModel
        ids = torch.tensor([[1, 5, 6, 7, 8]])
        for n, (model, _) in enumerate(self.every_kind()[:2]):
            base = write_model(self.tmp / f"base{n}", model)
            folder = self.tmp / f"adapters{n}"
            added, _ = self.trained(model, rank=3)
            want = model(ids).logits
            added.save(folder, base)
            words().save_pretrained(folder)
            for found in (PeftModel.from_pretrained(models.load_model(base)[0], folder).eval(),
                          models.load_model(folder)[0]):
                torch.testing.assert_close(found(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)
        config = read_json(folder / "adapter_config.json")
        for change in ({"use_dora": True}, {"peft_type": "IA3"}, {"modules_to_save": ["lm_head"]}):
            (folder / "adapter_config.json").write_text(json.dumps(config | change))
            self.assertRaisesRegex(formats.InputError, "merge_and_unload", models.load_model, folder)

    def test_every_loss_and_smoother_trains_adapters_alone_and_no_second_model_is_loaded(self):
        before = models.load_model(self.model)[0].state_dict()
        for flag in (["--loss", "dpo"], ["--loss", "rmu"], ["--retain", "kl"], ["--smooth", "rs+wa"],
                     ["--smooth", "cr"], ["--sam_direction", "momentum"],
                     ["--sam_direction", "lookahead"]):
            with mock.patch.object(models, "load_model", wraps=models.load_model) as load:
                said = self.unlearn("run", "--lora", 2, *flag, "--steps", 2, "--overwrite")
            self.assertEqual(load.call_count, 1, flag)
            self.assertIn("merged the adapters", said)
            after = models.load_model(self.tmp / "run")[0].state_dict()
            moved = [name for name in before if not torch.equal(before[name], after[name])]
            self.assertTrue(moved and all("proj" in name for name in moved), (flag, moved))

    def test_saved_adapters_are_the_merged_model_to_every_script(self):
        found = []
        for name, *save in (("merged",), ("adapter", "--lora_save", "adapter")):
            self.unlearn(name, "--lora", 2, *save)
            run = self.tmp / name
            self.run_script("relearn.py", run, "--samples", 3, "--draws", 1)
            self.run_script("relearn.py", run, "--ablate", 0, 1)
            self.run_script("evaluate.py", run, "--attack", "context", "--shots", 2)
            cells = tables.cells_of(run, read_json(run / "evaluate.json")["metrics"])
            found.append({cell: value for cell, value in cells.items() if cell.measure != "corpora"})
        self.assertEqual(*found)
        self.assertFalse((run / "model.safetensors").exists())


# ---- unlearn.py: flags and small parts ----------------------------------------------------------------
class Flags(unittest.TestCase):
    def parsed(self, *flags):
        return unlearn.parse_args([*flags, "--overwrite"])

    @mock.patch.dict(os.environ, COLUMNS="10000")            # no breaks within a help
    def test_help_names_every_default(self):
        for script in (unlearn, relearn, evaluate, people):
            parser = script.flags()
            said = parser.format_help()
            for action in parser._actions:
                if action.default and action.dest != "help":
                    told = re.search(rf"\n +{action.option_strings[0]}\b.*(\n  +[^- ].*)?", said)[0]
                    self.assertIn("default", told)

    def test_every_row_of_the_step_timings_is_a_run_that_unlearn_takes(self):
        step = script_module("kernels/step.py")
        for smooth in step.PASSES:
            self.parsed(*step.smoother_flags(smooth))

    def test_smoother_names_and_their_combinations(self):
        for text, want in (("sam+wa", ("sam", True)), ("wa+rs", ("rs", True)), ("wa", ("none", True)),
                           ("none", ("none", False))):
            self.assertEqual(unlearn.parse_smooth(text), want)
        for bad in ("sam+rs", "none+wa", "wa+wa", "sam+sam", "adam", ""):
            self.assertRaises(formats.InputError, unlearn.parse_smooth, bad)

    def test_flags_are_completed_to_what_runs(self):
        args = self.parsed("--sam_rho", "0", "--seed", "7")
        self.assertEqual((args.smooth, args.out, args.retain, args.micro_batch),
                         ("none", "out/npo-s7", "nll", 32))
        args = self.parsed("--smooth", "sam+wa", "--steps", "50")
        self.assertEqual((args.out, args.wa_start), ("out/npo+sam+wa-momentum-linf-s0", 40))
        self.assertEqual(self.parsed("--stop_ue", "0.7").eval_every, 5)
        self.assertEqual(self.parsed("--merge", "a", "b", "--seed", "2").out, "out/merged2-s2")

    @mock.patch.dict(os.environ, WORLD_SIZE="2")
    def test_what_needs_the_whole_model_in_one_process_is_refused_under_torchrun(self):
        for line in ("--undo_steps 3 --undo_alpha .3", "--latent_eps 1", "--latent direction",
                     "--merge a", "--ilu_lambda 1 --ilu_data x"):
            self.assertRaisesRegex(formats.InputError, "without torchrun", self.parsed, *line.split())

    def test_sam_rho_alone_means_the_papers_sam_and_nothing_momentum(self):
        for flags, want in ((["--sam_rho", "0.01"], ["gradient", "l2", 0.01]),
                            ([], ["momentum", "linf", None]),       # rho follows from the model's width
                            (["--data", "/mine", "--model", "m"], ["momentum", "linf", None]),
                            (["--sam_direction", "lookahead"], ["lookahead", "l2", 0.1]),
                            (["--sam_norm", "linf"], ["gradient", "linf", None]),
                            (["--smooth", "gp"], ["gradient", "l2", 0.1])):
            args = self.parsed(*flags)
            self.assertEqual([args.sam_direction, args.sam_norm, args.sam_rho], want)

    def test_batches_cover_the_data_evenly_and_follow_the_seed(self):
        def take(seed):
            return list(itertools.islice(texts.shuffled(7, 3, random.Random(seed)), 14))
        self.assertEqual(set(Counter(sum(take(0), [])).values()), {6})
        self.assertEqual(take(0), take(0))
        self.assertNotEqual(take(0), take(1))

    def test_learning_rate_by_hand(self):
        for total, warmup, kind, want in ((20, 0.1, "none", [0.5, 1, 1, 1]),
                                          (10, 0.2, "linear", [0.5, 1, 1, 0.875, 0.75])):
            rates = [unlearn.learning_rate(step, total, 1.0, warmup, kind) for step in range(len(want))]
            self.assertEqual(rates, want)


# ---- unlearn.py and data/memory.py: what a run holds --------------------------------------------------

class Plan(Folder):
    def planned(self, trained, count, *flags):
        """Bytes of the plan without activations, for a model of `trained` bf16 parameters."""
        args = unlearn.parse_args(["--param_dtype", "bfloat16", "--out", "/nowhere", *flags])
        args.sam_rho = args.sam_rho or 1.0
        p = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        smoother = unlearn.SMOOTHERS[unlearn.parse_smooth(args.smooth)[0]](args, [p], None)
        parts = memory.plan(args, trained, trained, 2, smoother.copies, 1e9, count)
        return sum(parts.values()) - 1e9

    def test_seven_billion_parameters_with_sam_in_bf16_plan_ten_bytes_each(self):
        self.assertEqual(self.planned(7.24e9, 1, "--sam_rho", "0.01"), 10 * 7.24e9)
        self.assertEqual(self.planned(7.24e9, 4, "--sam_rho", "0.01"), 10 * 7.24e9 / 4)
        for flags, bytes_each in ((["--smooth", "none"], 8), (["--smooth", "gp"], 12),
                                  (["--smooth", "cr"], 18), (["--smooth", "wa"], 12),
                                  (["--retain", "kl", "--sam_rho", "0.1"], 12),
                                  (["--sam_direction", "momentum", "--sam_norm", "linf"], 10),
                                  (["--sam_direction", "momentum", "--sam_norm", "l2"], 10),
                                  (["--sam_direction", "lookahead"], 10),
                                  (["--smooth", "none", "--undo_alpha", ".3", "--undo_steps", "9"], 10),
                                  ("--smooth none --optimizer sign --param_dtype float32".split(), 6)):
            self.assertEqual(self.planned(100, 1, *flags), 100 * bytes_each, flags)

    def test_the_attack_plans_weights_gradients_a_copy_two_states_and_four_samples(self):
        args = unlearn.parse_args("--param_dtype bfloat16 --micro_batch 8 --out no".split())
        model = little_llama(torch.bfloat16)
        parts = memory.attack_plan(args, model, SimpleNamespace(forget=text_samples(), pad=0))
        activations = memory.activation_bytes(model, text_samples(), 4, False, 0)
        count = sum(p.numel() for p in model.parameters())
        self.assertEqual(sum(parts.values()), 5 * 2 * count + activations)

    def test_a_plan_that_does_not_fit_says_what_to_do(self):
        self.assertNotIn("too much", memory.plan_line({"weights": 1.0}, "cpu"))
        self.assertIn("too much: try --gradient_checkpointing", memory.plan_line({"weights": 1e18}, "cpu"))
        line = memory.plan_line({"weights": 1e18}, "cpu", memory.LESS_ATTACK)
        self.assertIn("too much: try --no-relearn", line)

    def test_seven_billion_parameters_in_adapters_plan_below_22_gb(self):
        """As README: rank 16, 4 x 512 tokens. One of Mistral-7B's 32 layers is measured."""
        from transformers import MistralConfig, MistralForCausalLM
        with torch.device("meta"):
            model = MistralForCausalLM(MistralConfig(num_hidden_layers=1)).bfloat16()
        model = model.to_empty(device="cpu")
        added = adapters.Adapters(model, 16, 32)
        trained = 32 * sum(p.numel() for _, p in added.named())
        activations = memory.activation_bytes(model, [(list(range(512)), [1] * 512)], 4, True, 0)
        activations += 31 * 4 * 512 * 4096 * 2                       # the other layers' inputs
        args = unlearn.parse_args("--lora 16 --param_dtype bfloat16 --sam_rho .01 --out no".split())
        parts = memory.plan(args, 7.24e9, trained, 4, sam.SAM.copies, activations)
        self.assertAlmostEqual(sum(parts.values()) / 1e9, 16.7, places=1)

    @unittest.skipUnless(LINUX, "only Linux tells a peak of memory")
    def test_the_plan_is_within_15_percent_of_the_measured_peak(self):
        """A 42M-parameter Llama on short samples; the base is what a run of a tiny one leaves behind."""
        code = """if True:
            import json, runpy, sys
            little, large, *more = sys.argv[1:]
            def run(world):
                flags = f"--model {world}/model --data {world} --out {world}-sam --steps 2 --overwrite"
                sys.argv = ["unlearn.py", *flags.split(), "--no-relearn", "--batch_size", "2", *more]
                runpy.run_path("unlearn.py", run_name="__main__")
            def status(key):
                return 1024 * int(open("/proc/self/status").read().split(key)[1].split()[0])
            run(little)
            open("/proc/self/clear_refs", "w").write("5")                           # resets the peak
            base = status("VmRSS:")
            run(large)
            plan = json.load(open(large + "-sam/result.json"))["plan_gb"]
            print("measured", status("VmHWM:") - base, sum(plan.values()) * 1e9)
        """
        write_world(self.tmp / "little", little_llama(torch.float32))
        write_world(self.tmp / "large", little_llama(torch.float32, vocab_size=8192, hidden_size=512,
                                                     num_hidden_layers=8, intermediate_size=2048))
        held = {"MALLOC_MMAP_THRESHOLD_": "65536"}       # glibc then returns what is freed
        for more in ((), ("--lora", 8)):
            run = in_python(code, self.tmp / "little", self.tmp / "large", *more, **held)
            self.assertEqual(run.returncode, 0, run.stderr)
            measured, planned = map(float, run.stdout.split("measured")[1].split())
            self.assertAlmostEqual(planned / measured, 1, delta=0.15, msg=(planned, measured))


# ---- unlearn.py: models of every shape, going on after a kill, several processes ----------------------
class Runs(World):
    def test_other_data_are_attacked_with_as_many_samples_as_they_have_at_the_papers_rate(self):
        self.unlearn("own", "--relearn")
        attack = read_json(self.tmp / "own" / "relearn.json")
        self.assertEqual((attack["args"]["samples"], attack["args"]["lr"]), ([len(TEXTS)], [1e-5]))
        self.assertEqual([b["samples"] for b in attack["metrics"]["budgets"]], [len(TEXTS)])

    def weights(self, name):
        return models.load_model(self.tmp / name)[0].state_dict()

    def test_models_of_every_shape_run_or_name_the_fix(self):
        """No pad token, tied embeddings, more embeddings than tokens, learned positions and biases; a
        pad token that the model does not have, and a sample that is too long."""
        from safetensors import safe_open
        without_pad = words()
        without_pad.pad_token = None
        little = little_llama(torch.float32)
        tied = little_llama(torch.float32, tie_word_embeddings=True)
        wide = little_llama(torch.float32, vocab_size=len(words()) + 19)
        for name, model, tok in (("llama", little, without_pad), ("gpt2", little_gpt2(), without_pad),
                                 ("tied", tied, words()), ("wide", wide, words())):
            flags = write_world(self.tmp / name, model, tok)
            self.unlearn("run", *flags, "--gradient_checkpointing", "--overwrite")
            before = self.weights(f"{name}/model")
            after = self.weights("run")
            self.assertEqual(before.keys(), after.keys())
            self.assertFalse(torch.equal(flat(before.values()), flat(after.values())))
            keys = safe_open(self.tmp / "run" / "model.safetensors", "pt").keys()
            self.assertEqual("lm_head.weight" in keys, name in ("llama", "wide"))  # tied weights once
        tok = words()
        tok.add_special_tokens({"pad_token": "<more>"})
        self.unlearn("none", *write_world(self.tmp / "more", little, tok), says="set pad_token to null")
        short = write_world(self.tmp / "short", little_llama(torch.float32, context=8))
        self.unlearn("none", *short, says="--max_len 8")

    def test_a_resumed_run_is_bitwise_the_unbroken_one(self):
        averaged = ["--wa_start", 1, "--wa_every", 1]
        rounded = ["--param_dtype", "bfloat16", "--state_dtype", "float32", "--stochastic_rounding"]
        momentum = ["--sam_direction", "momentum", "--sam_norm"]
        self.flags += ["--eval_every", 2, "--overwrite"]
        for more in (
                ["--smooth", "sam+wa", *averaged], ["--smooth", "rs+wa", *averaged], ["--smooth", "cr"],
                rounded, [*momentum, "linf"], ["--smooth", "sam+wa", *momentum, "l2", *averaged],
                ["--sam_direction", "lookahead", "--lookahead_steps", 2], ["--sam_direction", "random"],
                ["--latent_eps", 0.5], ["--lora", 2],
                ["--ilu_lambda", 1, "--ilu_data", self.world / "retain.jsonl"],
                ["--optimizer", "hybrid", "--zo_every", 1, "--zo_lr", 1], ["--optimizer", "sign"],
                ["--loss", "rmu", "--train_modules", "."]):  # some weights never have a gradient
            shutil.rmtree(self.tmp / "broken", ignore_errors=True)
            self.unlearn("whole", *more)
            self.break_off("broken", 5, *more, "--save_every", 3)
            self.assertFalse((self.tmp / "broken").exists())
            self.unlearn("broken", *more, "--resume")
            curves = [self.result(run)["curve"] for run in ("whole", "broken")]
            for point in curves[0] + curves[1]:
                del point["seconds"]
            self.assertEqual(*curves)
            self.assertEqual(*[self.result(run)["passed"] for run in ("whole", "broken")])
            self.same_weights("whole", "broken")
            self.assertFalse(list(self.tmp.glob("*.state*")))         # no longer needed: removed

    def test_without_triton_the_script_steps_by_the_reference(self):
        code = """if True:
            import runpy, sys
            sys.modules["triton"] = None                                # as where it is not installed
            sys.argv[:1] = ["unlearn.py"]
            runpy.run_path("unlearn.py", run_name="__main__")
        """
        more = ["--param_dtype", "bfloat16", "--stochastic_rounding", "--out", self.tmp / "run"]
        run = in_python(code, *self.flags, *more)
        self.assertIn("moved by torch", run.stdout, run.stderr)
        self.assertTrue((self.tmp / "run").exists())

    def test_a_saved_state_is_whole_or_as_it_was_and_guards_its_run(self):
        from torch.distributed.checkpoint import HuggingFaceStorageWriter
        self.flags += ["--save_every", 1]
        self.break_off("run", 3)
        state = self.tmp / "run.state"
        self.assertEqual([part.name for part in state.iterdir()], ["2"])         # older ones are gone
        self.assertEqual(states.dtypes(state / "2")["exp_avg.lm_head.weight"], torch.float32)
        self.assertFalse(list(state.rglob("*.pt")) + list(state.rglob(".metadata")))     # no pickle
        self.unlearn("run", says="--resume")
        self.unlearn("run", "--resume", "--lr", 1e-3, says="--lr 0.0003")
        for path, says in ((self.world / "forget.jsonl", "another data"),
                           (self.model / "model.safetensors", "another model")):
            kept = path.read_bytes()
            if path.suffix == ".jsonl":
                write_rows(path, TEXTS)
            else:
                write_model(self.model, little_llama(torch.float32, seed=1))
            self.unlearn("run", "--resume", says=says)
            path.write_bytes(kept)
        with mock.patch.object(HuggingFaceStorageWriter, "finish", side_effect=OSError("full disk")):
            self.unlearn("run", "--resume", says="full disk")
        part, note = states.last(state)
        self.assertEqual((part.name, len(note["curve"])), ("2", 2))              # as it was
        self.unlearn("run", "--resume")
        self.assertFalse(state.exists())

    def test_two_processes_under_torchrun_do_what_one_does(self):
        """FSDP2 over gloo, weights of an odd number of rows or tied, micro-batches that leave a process
        without samples, chunks of logits, resuming with another number of processes. In one launch."""
        flags = write_world(self.tmp / "odd", little_llama(torch.float32, vocab_size=len(words()) + 2))
        tied = write_world(self.tmp / "tied", little_llama(torch.float32, tie_word_embeddings=True))
        jobs = {s: [*flags, "--smooth", s] for s in ("none", "sam", "rs", "gp", "cr")}
        jobs |= {"wa": [*flags, "--smooth", "sam+wa", "--wa_start", 1, "--wa_every", 2],
                 "kl": [*tied, "--retain", "kl", "--micro_batch", 1],
                 "rmu": [*flags, "--loss", "rmu", "--micro_batch", 2],
                 "dpo": [*flags, "--loss", "dpo", "--gradient_checkpointing"],
                 "momentum": [*flags, "--sam_direction", "momentum", "--sam_norm", "linf"],
                 "lookahead": [*flags, "--sam_direction", "lookahead", "--sam_norm", "linf"],
                 "random": [*flags, "--sam_direction", "random"],
                 "sign": [*flags, "--optimizer", "sign"],
                 "zo": [*flags, "--optimizer", "zo", "--zo_lr", 0.1]}
        for name, job in jobs.items():
            self.unlearn(f"one-{name}", *job)
        self.break_off("two-resumed", 4, *jobs["wa"], "--save_every", 2)
        plan = [["unlearn.py", *map(str, job), "--out", f"two-{name}"] for name, job in jobs.items()]
        plan += [["unlearn.py", *map(str, jobs["wa"]), "--out", "two-resumed", "--resume"],
                 ["unlearn.py", *map(str, jobs["rs"]), "--out", "one-resumed", "--save_every=2", "DIE"],
                 "relearn.py two-sam --samples 2 3 --lr 0.01".split(), ["evaluate.py", "two-sam"]]
        (self.tmp / "plan.json").write_text(json.dumps(plan))
        (self.tmp / "drive.py").write_text(DRIVE.replace("ROOT", repr(str(ROOT))))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        run = subprocess.run([*launch, "drive.py"], cwd=self.tmp, capture_output=True, text=True)
        self.assertEqual(run.returncode, 0, run.stderr[-3000:])
        self.unlearn("one-resumed", *jobs["rs"], "--resume")
        same = {f"two-{name}": f"one-{name}" for name in jobs}
        same |= {"two-resumed": "one-wa", "one-resumed": "one-rs"}
        for one, other in same.items():
            one = self.weights(one)
            other = self.weights(other)
            self.assertEqual(one.keys(), other.keys())
            torch.testing.assert_close(flat(one.values()), flat(other.values()), rtol=0, atol=1e-5)
        self.assertEqual(self.result("two-sam")["processes"], 2)
        self.assertEqual(run.stdout.count("after   UE"), len(jobs) + 1)  # only one process prints
        self.one_and_two_score_alike()
        self.each_process_held_its_part()

    def one_and_two_score_alike(self):
        """With the cells of relearn.json."""
        for name, more in (("relearn.py", ["--samples", 2, 3, "--lr", 0.01]), ("evaluate.py", [])):
            self.run_script(name, self.tmp / "one-sam", *more)
        one, two = [self.tmp / name for name in ("one-sam", "two-sam")]
        found = tables.cells_of(two, read_json(two / "evaluate.json")["metrics"])
        want = tables.cells_of(one, read_json(one / "evaluate.json")["metrics"])
        self.assertTrue({"2", "3", "open_forget", "ppl_retain"} <= {cell.column for cell in want})
        torch.testing.assert_close(found, want, rtol=1e-4, atol=0)

    def each_process_held_its_part(self):
        """A process keeps its part, and no two hold a whole model at once."""
        (loads, held), (other_loads, _) = (read_json(self.tmp / f"rank{r}.json") for r in (0, 1))
        self.assertTrue(all(0.4 < part < 0.6 for part in held))
        self.assertEqual(len(loads), len(other_loads))
        for a, b in itertools.product(loads, other_loads):
            self.assertTrue(a[1] <= b[0] or b[1] <= a[0])

    def test_a_folder_works_without_any_questions(self):
        for part in ("forget", "retain"):
            (self.world / f"mcq_{part}.jsonl").unlink()
        self.unlearn("run")
        self.assertEqual(self.result("run")["metrics"]["after"], {"UE": None, "UT": None})
        run = self.tmp / "run"
        self.assertIn("2 samples", self.run_script("relearn.py", run, "--samples", 1, 2, "--draws", 1))
        self.assertIn("ppl_forget", self.run_script("evaluate.py", run))

    def test_rmu_trains_what_it_names_and_a_bf16_run_is_attacked_in_fp32(self):
        run = self.tmp / "run"
        self.unlearn("run", "--loss", "rmu", "--param_dtype", "bfloat16", "--lr", 1e-2)
        before = self.weights("world/model")
        after = self.weights("run")
        moved = [name for name in before if not torch.equal(before[name].bfloat16(), after[name])]
        self.assertEqual(moved, ["model.layers.0.mlp.down_proj.weight"])
        self.run_script("relearn.py", run, "--samples", 4, "--draws", 1, "--param_dtype", "float32")
        self.assertEqual(read_json(run / "relearn.json")["args"]["param_dtype"], "float32")

    @unittest.skipUnless(triton, "triton is not installed here")
    def test_triton_and_torch_take_the_same_run_and_say_which_one_ran(self):
        self.flags += ["--steps", 1, "--smooth", "sam+wa", "--wa_start", 0, "--wa_every", 1]
        moved = []
        for path, says in (("--triton", "Triton kernels: by the interpreter"), ("--no-triton", "torch")):
            self.assertIn(f"the weights are moved by {says}", self.unlearn(path, path))
            self.assertEqual(self.result(path)["args"]["triton"], path == "--triton")
            moved.append(flat(self.weights(path).values()))
        torch.testing.assert_close(*moved, rtol=0, atol=1e-6)
        with mock.patch.object(mt, "INTERPRETED", False):
            self.unlearn("no", "--triton", says="take GPU tensors")

    def test_every_attack_is_one_command_and_ends_up_in_one_table(self):
        asked = [QUESTIONS[i % 4] | {"answer": i // 4, "fact": i} for i in range(8)]
        write_rows(self.world / "mcq_forget.jsonl", asked)           # for a probe to tell apart
        self.unlearn("run")
        run = self.tmp / "run"
        retain = self.world / "retain.jsonl"
        for name, *flags in (("", "--curve_every", 1), ("_retain", "--attack_data", "retain"),
                             ("_mix50", "--mix", 0.5), ("_ablate", "--ablate", 0, 2),
                             ("_lora2", "--lora", 2, "--lr", 0.001, 0.01),
                             ("_sgd", "--optimizer", "sgd", "--lr", 0.1, "--geometry"),
                             ("_compress", "--quantize", 8, "--prune", 50),
                             ("_retain_lora1", "--attack_data", retain, "--lora", 1)):
            trains = [] if "--quantize" in flags or "--ablate" in flags else ["--samples", 4]
            self.run_script("relearn.py", run, *trains, "--draws", 1, *flags)
            self.assertTrue((run / f"relearn{name}.json").is_file(), flags)
        flags = "--attack prefix --attack_calls 40 --attack_length 6 8 --sharpness own --landscape 3"
        flags += " --sharpness_rows 2 --sharpness_steps 3 --sharpness_probes 2"
        self.run_script("evaluate.py", run, "--attack", "context", "--shots", 2, "--probe", 1, 2)
        out = self.run_script("evaluate.py", run, *flags.split())
        metrics = read_json(run / "evaluate.json")["metrics"]
        search = read_json(run / "attack_gcg+.json")
        self.assertEqual(metrics["attack"]["gcg+"], search["metrics"])
        self.assertEqual(search["args"]["teacher"], str(self.model))
        self.assertEqual(np.shape(metrics["landscape"]["own"]["rise"]), (3, 3))
        self.assertIn(f"{metrics['sharpness']['own']['rise']:.3f}", out)
        for title in "relearning lora2 retain compress prefix context mix50 ablate".split():
            self.assertIn(f"\nUE after {title}\n", out)
        self.assertIn("accuracy of a probe", out)
        stamp = (run / "evaluate.json").stat().st_mtime_ns
        self.assertEqual(self.run_script("evaluate.py", run, *flags.split()), out)
        self.assertEqual((run / "evaluate.json").stat().st_mtime_ns, stamp)      # kept
        write_model(self.tmp / "teacher", little_llama(torch.float32, seed=5))
        sharp = ["--sharpness", "own", "--sharpness_rows", 2, "--sharpness_steps", 3, "--sharpness_probes", 2]
        self.run_script("evaluate.py", run, *sharp, "--teacher", self.tmp / "teacher")
        other = read_json(run / "evaluate.json")["metrics"]["sharpness"]["own"]
        self.assertNotEqual(other["top"], metrics["sharpness"]["own"]["top"])    # another reference
        self.run_script("evaluate.py", run, "--attack", "prefix", says="--overwrite")

    def test_the_best_weights_on_the_way_are_the_ones_of_highest_ue_that_keep_ut(self):
        self.flags += ["--steps", 12, "--lr", 3e-2, "--eval_every", 1, "--overwrite"]
        for more in ([], ["--lora", 2]):
            self.unlearn("last", *more)
            self.unlearn("best", *more, "--keep", "best", "--keep_ut", 0.5)
            result = self.result("best")
            losses_of = [[p["forget"] for p in self.result(name)["curve"]] for name in ("last", "best")]
            self.assertEqual(*losses_of)
            floor = 0.5 * result["metrics"]["before"]["UT"]
            good = [p for p in result["curve"] if p["UT"] >= floor]
            want = max(good, key=lambda p: p["UE"])                   # the first of equals
            self.assertEqual(result["kept"], {key: want[key] for key in ("step", "UE", "UT")})
            self.assertEqual(result["metrics"]["after"], {"UE": want["UE"], "UT": want["UT"]})
            self.unlearn("short", *more, "--steps", want["step"])
            self.same_weights("best", "short")
            self.assertFalse(list(self.tmp.glob("*.best")))


    def test_ut_on_the_way_is_compared_with_the_start_on_the_same_questions(self):
        model, tokenizer = models.load_model(self.model)
        asked = evaluate.load_questions(self.world)["mcq_retain"] * 6
        picks = evaluate.choice_logps(model, tokenizer, asked).argmax(1).tolist()
        unknown = formats.spaced(range(len(asked)), 3)[1:]           # two of three that are asked on the way
        rows = []
        for i, (row, pick) in enumerate(zip(asked, picks)):
            rows.append({"question": row["question"], "choices": row["choices"],
                         "answer": (pick + 1) % 4 if i in unknown else pick})
        write_rows(self.world / "mcq_retain.jsonl", rows)
        few = formats.spaced(evaluate.load_questions(self.world)["mcq_retain"], 3)
        ut = evaluate.ue_ut(model, tokenizer, {"mcq_retain": few})["UT"]
        flags = ["--keep", "best", "--keep_ut", 1, "--eval_every", 1, "--eval_limit", 3, "--lr", 1e-12]
        self.unlearn("still", *flags)
        self.assertLess(ut, 0.5 * self.result("still")["metrics"]["before"]["UT"])
        self.assertEqual(self.result("still")["kept"]["UT"], ut)             # nothing moved, so UT is kept


DRIVE = '''
import json, runpy, sys, time, torch
sys.path.insert(0, ROOT)
from data import models
from_pretrained = models.AutoModelForCausalLM.from_pretrained
load_model = models.load_model
clip = torch.nn.utils.clip_grad_norm_
loads, held, steps = [], [], []
def timed(*args, **more):
    start = time.monotonic()
    model = from_pretrained(*args, **more)
    loads.append([start, time.monotonic()])
    return model
def load(*args):
    model, tokenizer = load_model(*args)
    own = sum(p.to_local().numel() for p in model.parameters())
    held.append(own / sum(p.numel() for p in model.parameters()))
    return model, tokenizer
def clip_or_die(*args):
    steps.append(1)
    if len(steps) == 4:
        raise KeyboardInterrupt
    return clip(*args)
models.AutoModelForCausalLM.from_pretrained = timed
models.load_model = load
for script, *flags in json.load(open("plan.json")):
    models.CHUNK = 100 if "--retain" in flags else 2**24              # three rows of logits at a time
    torch.nn.utils.clip_grad_norm_ = clip_or_die if "DIE" in flags else clip
    sys.argv = [script, *(f for f in flags if f != "DIE")]
    try:
        runpy.run_path(ROOT + "/" + script, run_name="__main__")
    except SystemExit as e:
        assert e.code == 130, e.code
json.dump([loads, held], open(f"rank{torch.distributed.get_rank()}.json", "w"))
'''


# ---- what a run may write to, and what is left of one that is stopped ---------------------------------
class Out(World):
    def setUp(self):
        super().setUp()
        self.flags += ["--steps", 2]
        self.out = self.tmp / "run"

    def files(self):
        """{path: bytes, or None of a folder}"""
        return {path: path.read_bytes() if path.is_file() else None for path in self.tmp.rglob("*")}

    def untouched(self, out, *flags, says):
        """A run that is refused, after which all is as before."""
        before = self.files()
        self.unlearn("never", "--out", out, *flags, says=says)
        self.assertEqual(self.files(), before)

    def test_overwrite_replaces_runs_and_nothing_else(self):
        mine = self.tmp / "mine"
        (mine / "runs" / "old").mkdir(parents=True)
        (mine / "notes").write_text("precious")
        (self.tmp / "link").symlink_to(mine)
        (self.tmp / "dangling").symlink_to(self.tmp / "nowhere")
        for out, says in ((self.world, "which the run reads"), (self.model, "which the run reads"),
                          (self.tmp, "which the run reads"), (self.world / "new", "which the run reads"),
                          (mine, "not a run"), (mine / "notes", "not a run"),
                          (mine / "notes" / "x", "cannot be"), (self.tmp / "link", "is a link"),
                          (self.tmp / "dangling", "is a link"), (".", "the current folder"),
                          ("..", "the current folder")):
            self.untouched(out, "--overwrite", says=says)
        self.unlearn("one")
        self.unlearn("run")
        self.same_weights("one", "run")
        self.untouched(f"{self.out}/", says="exists")
        self.unlearn("run", "--overwrite", "--lr", 1e-2)
        self.assertRaises(AssertionError, self.same_weights, "one", "run")

    def test_a_users_files_under_the_names_of_ours_stay(self):
        for name in "run.state/2023/photo run.state/todo run.best/1/photo run.best .run.lock".split():
            mine = self.tmp / name
            mine.parent.mkdir(parents=True, exist_ok=True)
            mine.write_text("precious")
            for more in ((), ("--overwrite",), ("--resume",)):
                self.untouched(self.out, *more, says=name)
            top = self.tmp / Path(name).parts[0]
            top.unlink() if top.is_file() else shutil.rmtree(top)
        (self.tmp / ".run.tmp1").write_text("precious")
        (self.tmp / ".run.tmp_mine").mkdir()
        before = self.files()
        self.unlearn("run")
        self.assertEqual(self.files() | before, self.files())
        for name in ("notes", "other/result.json"):
            mine = write_rows(self.out / name, ["precious"])
            self.untouched(self.out, "--overwrite", says="no script here wrote")
            mine.unlink()

    def test_one_run_at_a_time_writes_to_a_folder_and_sweeps_before_its_own_door(self):
        with runs.claimed(self.out, False, []):
            self.unlearn("run", says="another run is writing")
        (self.tmp / ".run.tmp123").mkdir()       # as a killed run leaves it
        (self.tmp / ".other.tmp123").mkdir()
        self.unlearn("run")
        self.assertEqual([path.name for path in self.tmp.glob(".*")], [".other.tmp123"])

    def test_a_save_that_fails_leaves_what_was_there(self):
        self.unlearn("run")
        full = OSError(28, "No space left on device", "x")
        rename = Path.rename

        def second_fails(path, target):
            if target == self.out and path.name.startswith(".run.tmp") and "old" not in path.name:
                raise full
            return rename(path, target)
        for where, name, error in ((runs, "write_json", full), (runs, "for_transformers_4", full),
                                   (runs, "for_transformers_4", Exception(str(full))),   # by tokenizers
                                   (Path, "rename", second_fails)):
            patch = {name: error} if where is Path else {name: mock.Mock(side_effect=error)}
            with mock.patch.multiple(where, **patch):
                self.untouched(self.out, "--overwrite", says="No space left on device")

    def test_prepare_keeps_a_users_files_and_what_another_process_has_finished(self):
        mine = self.tmp / "mine"
        write_rows(mine / "forget.jsonl", ["precious"])

        def refused(*more, says):
            before = self.files()
            for script, flags in (("tiny", ()), ("people", ("--model", self.model))):
                self.run_script(f"data/{script}/prepare.py", "--out", mine, *flags, *more, says=says)
            self.assertEqual(self.files(), before)
        refused(says="forget.jsonl is there and differs")
        model, tok = models.load_model(self.model)
        with contextlib.redirect_stdout(io.StringIO()):
            for seed in (1, 2):
                result = {"stage": "prepare", "seed": seed}
                runs.save_run(mine / "target", model, tok, result, overwrite=False)
        self.assertEqual(self.result("mine/target")["seed"], 1)
        (mine / "target" / "photo").write_text("precious")
        (mine / "forget.jsonl").unlink()
        refused("--overwrite", says="holds photo")

    def test_a_table_does_not_replace_a_runs_own_files(self):
        self.unlearn("run")
        before = self.files()
        for path, says in (("run/result.json", "no table"), ("run/config.json", "no table"),
                           ("run/model.safetensors", "no table"), ("no/x", "a folder that is")):
            self.run_script("evaluate.py", self.out, "--json", self.tmp / path, says=says)
        self.assertEqual(self.files(), before)
        for _ in range(2):
            self.run_script("evaluate.py", self.out, "--json", self.tmp / "table.json")

    def test_a_finished_run_needs_no_resuming_but_its_attack(self):
        self.unlearn("run")
        before = self.files()
        with mock.patch.object(relearn, "attack") as attack:
            for more, count in (((), 0), (("--relearn",), 1)):
                self.assertIn("is finished", self.unlearn("run", "--resume", *more))
                self.assertEqual(attack.call_count, count)
        self.assertEqual(self.files(), before)

    def test_resume_takes_no_other_run_for_its_own(self):
        self.unlearn("run")
        before = self.files()
        for flag, value in (("--lr", 9e-3), ("--seed", 5), ("--sam_rho", 1)):
            self.unlearn("run", "--resume", flag, value, says=f"is finished, with {flag}")
        self.assertEqual(self.files(), before)
        for flags in (["--train_modules", "mlp"], ["--sam_norm", "linf", "--sam_rho", 0.5]):
            self.unlearn("part", *flags, "--overwrite")
            self.unlearn("part", *flags[:-2], "--resume", says="is finished, with --" + flags[-2][2:])
        self.unlearn("latent", "--latent_eps", 0.5)                  # the model says which layer
        self.assertIn("is finished", self.unlearn("latent", "--latent_eps", 0.5, "--resume"))
        other = ["--lr", 2e-3, "--steps", 5, "--save_every", 2, "--overwrite"]
        self.break_off("run", 4, *other)                             # over the finished one
        self.unlearn("run", *other, "--resume")
        self.unlearn("whole", *other)
        self.same_weights("run", "whole")

    def test_a_new_start_has_nothing_of_the_best_weights_before_it(self):
        best = ["--keep", "best", "--keep_ut", 0, "--eval_every", 1, "--save_every", 2, "--steps", 6]
        self.break_off("run", 5, *best, "--lr", 3e-2)
        states.remove(self.tmp / "run.state")
        note, = (self.tmp / "run.best").glob("*/note.json")
        note.write_text(json.dumps(read_json(note) | {"UE": 1.5}))   # more than the new run will have
        self.unlearn("run", *best, "--lr", 1e-12, "--resume")
        curve = self.result("run")["curve"]
        self.assertEqual(self.result("run")["kept"]["UE"], max(point["UE"] for point in curve))
        self.assertEqual(self.result("run")["metrics"]["after"]["UE"], curve[-1]["UE"])

    def test_a_stopped_run_says_in_a_line_how_to_go_on(self):
        import signal
        command = ["unlearn.py", *self.flags, "--steps", 10**6, "--save_every", 2, "--out", self.out]
        run = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
        while not list(self.tmp.glob("run.state/[4-9]*/note.json")):
            time.sleep(0.01)
            self.assertIsNone(run.poll())
        run.send_signal(signal.SIGTERM)
        _, err = run.communicate(timeout=60)
        self.assertEqual(err, "stopped: go on with the same command and --resume\n")
        self.assertEqual(run.returncode, 130)
        wrapped = states.CheckpointException("", {0: (KeyboardInterrupt(), None)})
        with mock.patch.object(states.checkpoint, "save", side_effect=wrapped):      # stopped in a save
            self.assertRaises(KeyboardInterrupt, states.save, self.tmp / "state", 1, {}, {})


# ---- numbers that would be silently wrong -------------------------------------------------------------
class Silent(World):
    def test_an_encoder_is_refused(self):
        """A model that sees the token it is to predict: its log-probabilities mean nothing."""
        from transformers import BertConfig, BertLMHeadModel
        sizes = {"vocab_size": len(words()), "hidden_size": 16, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64,
                 "initializer_range": 0.3}
        for decoder, says in ((True, None), (False, "no causal language model")):
            model = BertLMHeadModel(BertConfig(**sizes, is_decoder=decoder))
            write_model(self.model, model)
            self.unlearn("run", "--overwrite", says=says)

    def test_a_tokenizer_that_appends_eos_shifts_no_border(self):
        from tokenizers import processors
        model = little_llama()
        ends = [("<bos>", words().bos_token_id), ("<eos>", words().eos_token_id)]
        behind = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
        eos = words()
        eos.backend_tokenizer.post_processor = behind
        self.assertEqual(eos("the cat").input_ids[-1], eos.eos_token_id)
        asked = evaluate.ask(QUESTIONS, PROMPT)
        question = asked[0]["context"]
        found = []
        for tok in (eos, words()):
            tokens = sam.kernel_file("gcg").Tokens(tok, 40, question, "cpu")
            self.assertTrue(tokens.survives([5, 6, 7]))
            found.append([evaluate.choice_logps(model, tok, asked).tolist(),
                          models.encode(tok, [("Question: who sat?", " Answer: the cat", "here")], 64),
                          models.generate(model, tok, [("one two", ""), ("the cat sat on", "")], 5),
                          tokens.head + tokens.after_word(question)])
        self.assertEqual(*found)

    def test_scores_are_cached_until_questions_corpora_or_weights_change(self):
        run = self.tmp / "run"
        self.unlearn("run")
        self.run_script("evaluate.py", run)

        def rescored():
            before = (run / "evaluate.json").stat().st_mtime_ns
            _, _, err = run_here("evaluate.py", run)
            changed = (run / "evaluate.json").stat().st_mtime_ns != before
            self.assertNotEqual("cached" in err, changed)
            return changed
        self.assertFalse(rescored())
        for name in ("mcq_retain.jsonl", "forget.jsonl"):
            path = self.world / name
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
            self.assertTrue(rescored(), name)
            self.assertFalse(rescored(), name)
        write_model(run, little_llama(torch.float32, seed=1))
        self.assertTrue(rescored())

    def test_the_prefix_attack_embeds_as_the_model_does(self):
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaConfig, GemmaForCausalLM
        small = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                     head_dim=8, num_key_value_heads=1, intermediate_size=24, max_position_embeddings=64)
        task = {"head": [1], "at": torch.tensor([0]), "ids": torch.tensor([[7, 8, 9]]), "layer": 1}
        prefix = F.one_hot(torch.tensor([[4, 5]]), 40).float()
        gemma = GemmaForCausalLM(GemmaConfig(**small))
        gemma3 = Gemma3ForCausalLM(Gemma3TextConfig(**small))
        for model in (gemma, gemma3, little_llama(torch.float32, vocab_size=40)):
            with torch.no_grad():
                got = sam.kernel_file("gcg").run_prefix(model.eval(), prefix, task)[0][0, 0]
                want = model(torch.tensor([[1, 4, 5, 7, 8, 9]])).logits[0]
            torch.testing.assert_close(got, want)

    def test_rs_warns_where_bf16_swallows_its_noise(self):
        for dtype, warned in (("bfloat16", True), ("float32", False)):
            more = ["--smooth", "rs", "--rs_sigma", 1e-4, "--out", self.tmp / dtype]
            _, _, err = run_here("unlearn.py", *self.flags, *more, "--param_dtype", dtype)
            self.assertEqual("precision: " in err, warned, err)

    def test_a_run_reads_the_same_in_transformers_4(self):
        """What 4.57 looks for in the files; it was tried in an environment of its own."""
        rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
        write_model(self.model, little_llama(torch.float32, rope_parameters=rope))
        self.unlearn("run", "--steps", 1)
        config = read_json(self.tmp / "run" / "config.json")
        self.assertEqual((config["rope_theta"], config["rope_scaling"]["rope_type"]), (5e5, "llama3"))
        tokenizer = read_json(self.tmp / "run" / "tokenizer_config.json")
        self.assertEqual(tokenizer["tokenizer_class"], "PreTrainedTokenizerFast")
        again = models.load_model(self.tmp / "run")[0].config.rope_parameters
        self.assertEqual({key: again[key] for key in rope}, rope)


# ---- files that are not what they should be -----------------------------------------------------------
class Foreign(World):
    def refused(self, says, *more):
        self.unlearn("run", *more, says=says)
        self.assertFalse((self.tmp / "run").exists())

    def with_changes(self, path, changes):
        """Put each of some contents into a file, one after the other: bytes, or a change to its JSON."""
        kept = path.read_bytes()
        for content, *more in changes:
            if isinstance(content, dict):
                content = json.dumps(json.loads(kept) | content)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            yield *more, content[:60]
            path.write_bytes(kept)

    def test_models_that_are_broken_foreign_or_not_whole(self):
        from safetensors.torch import load_file, save
        path = self.model / "model.safetensors"
        weights = {name: t.clone() for name, t in load_file(path).items()}  # not mapped from the file
        half = path.read_bytes()[:path.stat().st_size // 2]
        most = {name: w for name, w in weights.items() if "layers.1.mlp" not in name}
        cut = {name: w[:1] if w.dim() > 1 else w for name, w in weights.items()}
        nans = {name: w * math.nan for name, w in weights.items()}
        header = b"\x08" + bytes(7) + b"notjson!"
        changes = [(some, "does not load") for some in (b"", half, b"{}", header)]
        for some, says in ((most, "lacks 3 of its weights"), (cut, "by its config.json"), (nans, "NaN")):
            changes.append((save(some, {"format": "pt"}), says))
        for says, _ in self.with_changes(path, changes):
            self.refused(says)
            self.run_script("evaluate.py", self.model, "--data", self.world, says=says)
        path.unlink()
        torch.save(weights, self.model / "pytorch_model.bin")                    # a pickle
        self.refused("does not load")
        (self.model / "config.json").rename(self.model / "adapter_config.json")
        self.refused("adapter_config.json:1")

    def test_code_in_a_model_folder_does_not_run(self):
        (self.model / "mine.py").write_text(f"open({str(self.tmp / 'ran')!r}, 'w')\n")
        own = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
        change = {"model_type": "mine", "auto_map": own | {"AutoTokenizer": ["mine.T", None]}}
        for _ in self.with_changes(self.model / "config.json", [(change,)]):
            with mock.patch("builtins.input", return_value="y"):
                self.refused("does not load")
        self.assertFalse((self.tmp / "ran").exists())

    def test_tokens_that_the_model_has_no_embedding_for(self):
        tok = words([*TEXTS, "a word that is new"])
        tok.save_pretrained(self.model)
        for name in ("forget", "retain"):
            write_rows(self.world / f"{name}.jsonl", [{"text": "A. A."}, {"text": "who is new"}])
        self.refused("forget.jsonl:2")

    def test_json_of_runs_that_was_cut_off_or_edited(self):
        run = self.tmp / "run"
        self.unlearn("run")
        self.run_script("relearn.py", run, "--samples", 2, "--draws", 1)
        self.run_script("evaluate.py", run)
        args = self.result("run")["args"]
        keys = "model data seed loss smooth sam_flip beta reduce max_len param_dtype"
        edited = [{"args": args | {key: [7]}} for key in keys.split()]
        broken = ["", '{"args": {}, "curve', "[]", "7", '{"args": 3}', '{"stage": 1, "args": {}}',
                  '{"args": {}, "metrics": {}}', '{"args": {}, "metrics": {"budgets": [{}]}}',
                  "[" * 100_000]
        scores = read_json(run / "evaluate.json")["metrics"]
        other = [{"metrics": metrics} for metrics in (7, {"UE": "x"}, scores | {"sharpness": 7})]
        for name, contents in (("result.json", broken + edited), ("relearn.json", broken),
                               ("evaluate.json", broken + other)):
            for (content,) in self.with_changes(run / name, [(content,) for content in contents]):
                for script in ("evaluate.py", "relearn.py")[:1 + (name == "result.json")]:
                    status, _, err = run_here(script, run)           # any traceback fails the test
                    fine = name == "evaluate.json" and status == 0   # it may be scored again
                    lines = [line for line in err.splitlines() if line.startswith("error: ")]
                    self.assertTrue(fine or (status, len(lines)) == (2, 1), f"{name} {content} {err}")

    def test_adapters_that_are_broken_or_foreign(self):
        run = self.tmp / "run"
        self.unlearn("run", "--lora", 2, "--lora_save", "adapter")
        configs = [("[]",), ({"r": "2"},), ({"r": 0}, "of rank 0"),
                   ({"base_model_name_or_path": str(run)}, "its own folder"),
                   ({"base_model_name_or_path": "nowhere"}, "neither a folder")]
        for name, changes in (("adapter_model.safetensors", [("",), ("{}",)]),
                              ("adapter_config.json", configs)):
            for *says, _ in self.with_changes(run / name, changes):
                self.run_script("evaluate.py", run, says=says[0] if says else name)

    @unittest.skipUnless(importlib.util.find_spec("matplotlib"), "matplotlib is not installed")
    def test_pictures_of_what_is_no_table_are_refused_before_any_is_written(self):
        path = self.tmp / "table.json"
        for text in ("7", "[]", "{}", '{"methods": 7}', '{"methods": {"a": 7}}',
                     '{"methods": {"a": {"cells": [7]}}}'):
            path.write_text(text)
            self.run_script("assets/plot.py", path, "--out", self.tmp / "pictures", says="table.json")
        self.assertFalse((self.tmp / "pictures").exists())

    def test_states_that_are_broken_or_foreign(self):
        self.break_off("run", 4, "--save_every", 2)
        part = next((self.tmp / "run.state").iterdir())
        weights = next(part.glob("*.safetensors"))
        notes = [({key: "x"},) for key in ("args", "curve", "inputs", "attacks", "draws", "averaged")]
        for path, changes in ((part / "note.json", [*notes, ("{}",), ('{"args": {}, "curve',)]),
                              (weights, [("",), (weights.read_bytes()[:-500],), (100 * "x",)])):
            for _ in self.with_changes(path, changes):
                self.refused("run.state", "--resume")
        self.unlearn("run", "--resume")


# ---- the scripts, as a user runs them (slow: trains the built-in target once) -------------------------
class Scripts(Folder):
    def setUp(self):
        super().setUp()
        self.data = runs.world(runs.TINY, 0).resolve()

    def unlearned(self, name, *flags):
        """result.json of a run in this process, and its folder."""
        self.run_script("unlearn.py", "--out", self.tmp / name, *flags)
        return read_json(self.tmp / name / "result.json"), self.tmp / name

    def test_a_whole_run_is_deterministic_and_complete(self):
        for name, *more in (("same1",), ("same2", "--no-relearn")):
            flags = ["--out", self.tmp / name, "--steps=6", "--smooth=sam+wa", "--wa_start=3", *more]
            run = subprocess.run([sys.executable, ROOT / "unlearn.py", *flags], capture_output=True)
            self.assertEqual(run.returncode, 0, run.stderr)
        World.same_weights(self, "same1", "same2")
        one = self.tmp / "same1"
        r = read_json(one / "result.json")
        self.assertEqual((r["stage"], len(r["curve"]), r["args"]["smooth"]), ("unlearn", 6, "sam+wa"))
        told = "forget retain grad_norm norm asked_norm applied_norm cosine lr seconds"
        self.assertLessEqual(set(told.split()), r["curve"][0].keys())
        # relearn.py alone on the saved folder finds data and seed, and says what the run itself said
        first = read_json(one / "relearn.json")
        self.assertIn("60 samples", self.run_script("relearn.py", one))
        self.assertEqual(read_json(one / "relearn.json")["metrics"], first["metrics"])
        self.assertEqual([b["samples"] for b in first["metrics"]["budgets"]], [20, 40, 60])
        more = ["--data", self.data, "--json", self.tmp / "table.json"]
        self.assertIn("npo+sam+wa", self.run_script("evaluate.py", one, self.data / "target", *more))
        e = read_json(one / "evaluate.json")
        self.assertEqual((e["stage"], e["metrics"]["template"]), ("evaluate", PROMPT))
        self.assertAlmostEqual(e["metrics"]["UE"], r["metrics"]["after"]["UE"])
        self.assertTrue((self.tmp / "table.json").exists())
        target = read_json(self.data / "target" / "evaluate.json")["metrics"]
        self.assertGreater(min(target["open_forget"], target["open_retain"]), 0.95)  # before
        told = read_json(self.data / "target" / "result.json")["metrics"]
        self.assertAlmostEqual(target["open_retain"], told["open_retain"], places=5)

    def test_stop_ue_stops_there(self):
        result, _ = self.unlearned("stop", "--stop_ue", 0.3, "--no-relearn", "--eval_every", 4)
        values = [p["UE"] for p in result["curve"] if "UE" in p]
        self.assertGreaterEqual(values[-1], 0.3)
        self.assertTrue(all(v < 0.3 for v in values[:-1]))
        self.assertLess(len(result["curve"]), 160)
        self.assertAlmostEqual(values[-1], result["metrics"]["after"]["UE"])

    def test_answers_stand_side_by_side(self):
        _, folder = self.unlearned("shown", "--steps", 2, "--no-relearn")
        lines = self.run_script("evaluate.py", folder, "--show", 4).splitlines()
        self.assertEqual(len(lines), 1 + 4 + 2)
        self.assertTrue(all(name in lines[0] for name in ("right", "before", "relearned")))
        asked = evaluate.load_questions(self.data)["mcq_forget"][0]
        right = asked["choices"][asked["answer"]]
        self.assertTrue(lines[1].startswith(asked["question"]))
        self.assertIn(f"{right} / {right}", lines[1])  # the model before knows it

    def test_two_runs_of_one_method_are_both_shown(self):
        runs_of = []
        for lr in (1e-4, 3e-4):
            runs_of.append(self.unlearned(f"lr{lr}", "--steps", 2, "--no-relearn", "--lr", lr)[1])
        head = self.run_script("evaluate.py", *runs_of, "--show", 1).splitlines()[0]
        self.assertEqual(head.count("relearned"), 2)
        self.assertIn(str(runs_of[1]), head)

    def test_sam_resists_relearning_better_than_npo_and_the_flipped_sign_does_not(self):
        """The paper's claim on a fixed configuration."""
        ue = {}
        for name, flags in (("npo", ["--sam_rho", 0]), ("sam", ["--sam_rho", 0.1]), ("momentum", []),
                            ("flip", ["--sam_rho", 0.1, "--sam_flip"])):
            result, folder = self.unlearned(f"claim-{name}", "--no-relearn", *flags)
            self.run_script("relearn.py", folder, "--samples", 60, "--draws", 4)
            found = read_json(folder / "relearn.json")["metrics"]
            self.assertGreater(found["start"]["UT"], 0.97)
            self.assertGreater(found["start"]["UE"], 0.6)
            ue[name] = found["budgets"][0]["UE"]
            if name == "momentum":
                ran = [result["args"][flag] for flag in ("sam_direction", "sam_norm", "sam_rho")]
                self.assertEqual(ran, ["momentum", "linf", 1e-3])
        self.assertGreater(ue["sam"], ue["npo"] + 0.15, ue)
        self.assertLess(ue["flip"], ue["npo"] + 0.15, ue)  # so the line above needs the right sign
        self.assertGreater(ue["momentum"], ue["npo"] + 0.15, ue)


# ---- bad input: one line, exit status 2, nothing written ----------------------------------------------
class BadInput(World):
    """Each row of a table: flags of a script, and a part of the line that it must say."""

    def refused(self, script, always, table):
        before = sorted(self.tmp.rglob("*"))
        for flags, says in table:
            flags = flags.split() if isinstance(flags, str) else flags
            with self.subTest(f"{script} {' '.join(map(str, flags))}"):
                self.run_script(script, *always, *flags, says=says)
                self.assertEqual(sorted(self.tmp.rglob("*")), before)

    def test_flags_of_unlearn(self):
        self.refused("unlearn.py", ["--out", self.tmp / "never", "--no-relearn"], (
            (("--data", self.tmp / "no"), "no such folder"), (("--data", self.world), "--model"),
            ("--model nowhere", "nowhere"), ("--sam_rho -0.1", "-0.1"), ("--loss nop", "nop"),
            ("--smooth sam+rs", "no meaning"), ("--frog 1", "frog"), ("--steps 0", "0"),
            (("--batch_size", 2**21), "at most"), ("--device meta", "meta"),
            (("--device", "cpu\n"), "cpu"), (("--out", ""), "--out . is"),
            (("--out", "x" * 250), "200 bytes"), (("--idk_text", "\udcff"), "not UTF-8"),
            ("--lora_save adapter", "--lora RANK"), ("--steps 3 --keep best", "--eval_every 5"),
            ("--device cuda:77", "cuda:77"), ("--steps 3 --stop_ue 0.5", "lower it"),
            ("--sam_modules xyz", "xyz"), ("--sam_direction momentum --smooth gp", "sam_direction"),
            ("--lookahead_steps 2", "--sam_direction lookahead"), ("--beta 0", "beta"),
            ("--sam_modules (", "regular expression"), ("--stochastic_rounding", "bfloat16"),
            ("--loss simnpo --reduce sum", "simnpo"), ("--warmup 5", "at most 1"),
            ("--stop_ue 7", "at most 1"), (("--seed", 2**64), "at most"), ("--wa_start -7", "-7"),
            ("--loss rmu --rmu_layer 1", "rmu_layer"), ("--loss ga --retain kl", "graddiff"),
            ("--smooth wa --wa_start 500", "500"), ("--loss none", "--undo_steps"),
            ("--undo_alpha 0.3", "--undo_steps"), ("--undo_steps 3", "--undo_alpha"),
            ("--latent adversary", "--latent_eps"), ("--optimizer zo", "--zo_lr"),
            ("--smooth rs --sam_rho .3", "sam_rho"), ("--optimizer sign --param_dtype bfloat16", "float32"),
            ("--loss none --undo_alpha .3 --undo_steps 3 --smooth wa", "take no step"),
            ("--undo_alpha 0.3 --undo_steps 3 --lora 2", "--loss none"),
            ("--shrink .3 --lora 2", "--lora"), ("--shrink 2", "at most 1"),
            ("--shrink .1 --loss none", "choose a --loss"),
            ("--latent direction --save_every 6", "multiple of 4"), ("--ilu_lambda 1", "give both"),
            ("--latent_layer 1", "--latent_eps"), ("--ilu_lambda 1 --ilu_data no.jsonl", "no.jsonl"),
            ("--ilu_lambda 1 --ilu_data x --lora 2", "--lora"), ("--merge_ties 0.2", "--merge"),
            (("--merge", self.tmp / "no"), "neither a folder"),
            (("--merge", self.model, "--lora", 2), "takes no step"),
            (("--merge", self.model, "--out", self.model), "reads"), ("--zo_every 3", "adamw"),
            ("--optimizer zo --zo_every 3", "zo_every"),
            ("--optimizer sign --state_dtype float32", "AdamW"),
            ("--optimizer zo --param_dtype bfloat16", "float32"), ("--latent_eps 1 --loss dpo", "dpo"),
            ("--latent_eps 1 --latent_layer 2", "choose 0 to 1"), ("--lora 0", "at least 1"),
            ("--lora 2 --train_modules mlp", "train_modules"),
            ("--lora 2 --lora_save adapter --smooth wa", "wa"), ("--lora_alpha 2", "add --lora RANK"),
            ("--keep best --smooth wa", "wa"), ("--loss rmu --retain none", "--rmu_alpha"),
            ("--rs_sigma .1", "do not look at it"), ("--smooth gp --cr_mu .2", "--cr_mu"),
            ("--wa_every 3", "--wa_every"), ("--margin 1", "--margin"), ("--rmu_c 3", "--rmu_c"),
            ("--loss ga --gamma 2", "--gamma"), ("--loss graddiff --beta 2", "--beta"),
            ("--optimizer zo --zo_lr .1 --lr .1", "--lr 0.1"), ("--keep_ut .5", "--keep_ut"),
            ("--lora 2 --lora_perturb weights --smooth gp", "--smooth sam --sam_norm l2")))
        self.refused("unlearn.py", [*self.flags, "--out", self.tmp / "never"], (
            ("--lr 1e5", "not finite"), ("--lr 1e38", "at most"),
            ("--loss rmu --lora 2 --rmu_layer 77", "first 2 of 3"),
            (("--loss", "rmu", "--rmu_layer", 0, "--train_modules", r"layers\.2\."), "has a part in a loss"),
            (("--out", self.tmp / "new" / "er" / "run", "--lr", 1e5), "not finite"),
            ("--lora 17", "choose 16 or less"), ("--lora 2 --lora_modules (", "regular expression"),
            ("--lora 2 --lora_modules xyz", "matches no linear layer")))

    def test_no_flag_for_a_number_takes_anything_else(self):
        for script, run in ((unlearn, []), (relearn, ["run"]), (evaluate, ["run"])):
            parser = script.flags()
            for action in parser._actions:
                if action.type is None or action.dest == "device":
                    continue
                times = action.nargs if action.nargs in (4, 5) else 1
                for text in ("nan", "inf", "-1", "x", "", "1e999", "0x10", "1" + "0" * 400, "9" * 5000):
                    err = io.StringIO()
                    given = [f"{action.option_strings[0]}={text}"] * times
                    with contextlib.redirect_stderr(err), self.assertRaises(SystemExit, msg=given) as e:
                        parser.parse_args([*run, *given])
                    self.assertEqual((e.exception.code, err.getvalue().count("\n")), (2, 1), given)

    def test_rows_of_data(self):
        def asked(*choices, **more):
            return json.dumps(QUESTIONS[0] | {"choices": choices} | more)
        never = [*self.flags, "--out", self.tmp / "never"]
        for name, table in (
                ("forget", (("[", ":1"), (json.dumps("cat " * 80), "--max_len 64"),
                            ('{"text": "a", "fact": [1]}', '"fact" is [1]'),
                            ('{"text": "half \\ud800"}', "whole characters"),
                            ('{"text": "a", "fact": ' + "9" * 5000 + "}", ":1"))),
                ("retain", (("", "no rows"), ('{"text": "a", "text": "b"}', ":1"), ("[" * 10**5, ":1"))),
                ("mcq_forget", ((asked("a", "a", "a", "a"), "differ"),
                                (asked("a", "b", "c", "d", subject=7), "subject"))),
                ("meta", (('{"prompt": ["{question}"]}', "in a text"),
                          ('{"auc_retrain": "x"}', "from 0 to 1"),
                          ('{"prompt": "{question}", "prompt": "a {question}"}', "twice"),
                          ("{", ".json:1"), ('{"prompt": "x"}', "{question}")))):
            path = self.world / (f"{name}.json" if name == "meta" else f"{name}.jsonl")
            kept = path.read_text()
            for text, says in table:
                path.write_text(text)
                self.refused("unlearn.py", never, [((), says)])
            path.write_text(kept)
        write_rows(self.world / "forget.jsonl", ["a cat"])           # no prompt to say anything to
        self.refused("unlearn.py", never, [("--loss dpo", ":1")])

    def test_flags_of_relearn_and_evaluate(self):
        some = [self.model, "--data", self.world]
        for script in ("relearn.py", "evaluate.py"):
            self.refused(script, [], (("nowhere", "nowhere"), ((self.model,), "--data FOLDER")))
        self.refused("relearn.py", some, (
            ("--samples 9999", "9999"), ("--quantize 4 --lora 2", "--lora"), ("--prune 101", "101"),
            ("--quantize 64", "at most 16"), ("--geometry --lora 1", "drop one"),
            ("--attack_data no.jsonl", "no.jsonl"), ("--mix_data no.jsonl", "--mix"),
            ("--mix 2", "at most 1"), ("--mix 0.5 --samples 12", "6"), ("--ablate 4", "3 layers"),
            ("--teacher x", "--ablate"), ("--train_modules q_proj --lora 2", "--train_modules"),
            ("--quantize 4 --samples 3", "--samples"), ("--prune 10 --curve_every 1", "--curve_every"),
            ("--train_modules q_proj --quantize 4", "--train_modules")))
        self.refused("evaluate.py", some, (
            (("--data", self.model), "nothing to measure"),
            (("--data", self.model, "--show", 2), "no questions"), (("--json", ""), "--json"),
            ("--json /dev/null", "--json"), ("--attack suffix", "suffix")))
        for flags, says in (("--probe 4", "3 layers"), ("--probe 1", "the same answer"),
                            ("--attack context --shots 5", "--shots 5"),
                            ("--attack context --shots 4", "ask for fewer")):
            self.run_script("evaluate.py", *some, *flags.split(), says=says)

    def test_a_row_is_read_with_its_file_and_line_or_an_error_names_them_the_value_and_the_fix(self):
        path = self.tmp / "x.jsonl"
        rows = [{"text": "a", "fact": 3}, {"prompt": "p", "completion": "c"}, {"text": "x"}]
        path.write_text("\n".join(map(json.dumps, rows[:2])) + '\n\n"x"')
        want = [row | {"where": f"{path}:{line}"} for row, line in zip(rows, (1, 2, 4))]
        for encoding in ("utf-8", "utf-8-sig"):                      # a byte order mark is no text
            path.write_text(path.read_text(), encoding=encoding)
            self.assertEqual(formats.read_jsonl(path, formats.text_row), want)
        bad = [("\xff", formats.text_row, " is not UTF-8"), ("\n\n", formats.text_row, " has no rows")]
        texts = {"{": "not JSON", '{"txt": "a"}': "found txt", '{"text": "  "}': "'  '",
                 '{"text": 3}': "is 3", "[1]": "found list", '{"prompt": "a"}': "completion"}
        bad += [(f'"fine"\n{line}', formats.text_row, f":2: .*{says}") for line, says in texts.items()]
        mcq = '{"question": "q", "choices": ["a", "b", "c", "d"], "answer": 1}'
        for old, new, says in (('"q"', '""', "is ''"), (', "d"', "", "exactly 4"), ('"d"', "7", "exact"),
                               (": 1", ": 4", "is 4"), (": 1", ": true", "is True"), (mcq, "7", "int")):
            bad.append((f"{mcq}\n{mcq.replace(old, new)}", formats.mcq_row, f":2: .*{says}"))
        for text, check, says in bad:
            path.write_text(text, encoding="latin-1")
            with self.assertRaisesRegex(formats.InputError, f"{path}{says}"):
                formats.read_jsonl(path, check)


# ---- README.md: Fork it -------------------------------------------------------------------------------
class Fork(World):
    def test_the_diffs_of_the_readme_apply_to_a_copy_and_run(self):
        kept = ("*.py", "metrics.py", "data", "kernels", "muse", "tofu", "tiny", "people")

        def others(folder, names):
            return [n for n in names if not any(map(Path(n).match, kept))]
        fork = self.tmp / "fork"
        shutil.copytree(ROOT, fork, ignore=others)
        diffs = (ROOT / "README.md").read_text().split("```diff\n")[1:]
        self.assertEqual(len(diffs), 4)
        for diff in diffs:
            diff = diff.split("```")[0]
            added = [line for line in diff.splitlines() if line.startswith("+") and line[1:].strip()]
            self.assertLessEqual(len(added) - diff.count("+++"), 10)
            run = subprocess.run(["git", "apply"], input=diff, text=True, cwd=fork,
                                 capture_output=True)
            self.assertEqual(run.returncode, 0, run.stderr)
        write_rows(self.world / "riddles.jsonl", [{"riddle": "who sat?", "word": "cat"}])
        run = self.tmp / "run"
        self.flags += ["--steps", 2, "--loss", "unlikely", "--smooth", "sign", "--out", run]
        code = """if True:
            import json, runpy, sys
            for command in json.loads(sys.stdin.read()):
                sys.argv = list(map(str, command))
                runpy.run_path(sys.argv[0], run_name="__main__")
        """
        shake = ["relearn.py", run, "--shake", 0.1, 0.2]
        plan = json.dumps([["unlearn.py", *self.flags], shake, ["evaluate.py", run]], default=str)
        done = subprocess.run([sys.executable, "-c", code], input=plan, cwd=fork, capture_output=True,
                              text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("riddles", done.stdout)
        self.assertIn("shake0.2", done.stdout)
        result = read_json(run / "result.json")
        self.assertEqual((result["args"]["loss"], result["args"]["smooth"]), ("unlikely", "sign"))


if __name__ == "__main__":
    unittest.main(verbosity=2)
