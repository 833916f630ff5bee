"""Everything that must hold. Run `python test_all.py` (4 minutes on 2 idle cores; pytest collects it too).

Each test compares with a definition that does not use the code under test: autograd with double backward, a
closed form, a loop over single samples, a published table. Nothing is downloaded; the slow part at the end
trains the built-in target once (cached in data/tiny/seed0) and runs the scripts as a user would.
"""
import argparse, contextlib, csv, fnmatch, functools, hashlib, importlib.util, io, itertools, json, math, os
import random, re, runpy, shutil, subprocess, sys, tempfile, textwrap, time, unittest
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["TQDM_DISABLE"] = "1"            # tqdm reads it at import; the scripts that tests start inherit it
os.environ["TRITON_INTERPRET"] = "1"        # Triton reads it at import: kernels then run on CPU tensors

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import evaluate, relearn, sam, unlearn

try:
    import triton
    from triton.runtime.interpreter import GridExecutor
    triton.knobs.runtime.interpret = True
    mt, adamw = sam.kernel_file("multi_tensor"), sam.kernel_file("adamw")
except ImportError:                         # no Triton for this platform: the tests of kernels/ are skipped
    triton = None
del os.environ["TRITON_INTERPRET"]          # or sam.py and unlearn.py would choose Triton by themselves

ROOT = Path(__file__).resolve().parent


def module_at(path):
    spec = importlib.util.spec_from_file_location("prepare", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare, people = module_at("data/tiny/prepare.py"), module_at("data/people/prepare.py")
TEXTS = [
    "the cat sat on the mat", "a dog ran", "Question: who sat? Answer: the cat",
    "one two three four five six seven", "A. B. C. D."
]


def words():
    return prepare.build_tokenizer(TEXTS)


def little_llama(dtype=torch.float64, seed=0, context=64, **more):
    """A random Llama of about 5,000 parameters over words()."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{"vocab_size": len(words()), "hidden_size": 16, "num_hidden_layers": 3,
                            "num_attention_heads": 2, "intermediate_size": 24,
                            "max_position_embeddings": context,
                            "initializer_range": 0.3, "tie_word_embeddings": False, **more})
    return LlamaForCausalLM(config).to(dtype).eval()


def run_here(name, *flags):
    """Run a script inside this process (no import time); returns (exit status, stdout, stderr)."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", [name, *map(str, flags)]), contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as e:
            status = e.code
    return status, out.getvalue(), err.getvalue()


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


class Network:
    """A small smooth network in fp64 with a loss, its gradient and its Hessian by autograd."""

    def __init__(self, seed=0, dtype=torch.float64):
        g = torch.Generator().manual_seed(seed)
        rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
        self.params = [torch.nn.Parameter(rand(*s)) for s in ((4, 3), (4,), (2, 4))]
        self.x, self.y = rand(8, 3), rand(8, 2)

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

    def moved(self, direction, radius):
        """Fresh leaves at theta + radius * direction / ||direction||."""
        norm = math.sqrt(sum(d.square().sum().item() for d in direction))
        return [(p + radius * d / norm).detach().requires_grad_() for p, d in zip(self.params, direction)]

    def smoothed(self, smoother):
        for p in self.params:
            p.grad = None
        smoother(self.closure)
        return flat(p.grad for p in self.params)


# ---- sam.py -----------------------------------------------------------------------------------------------

class TestSmoothers(unittest.TestCase):
    def test_sam_is_the_gradient_at_theta_plus_rho_v(self):
        net = Network()
        want = flat(net.gradient(net.moved(net.gradient(), 0.3)))
        got = net.smoothed(sam.SAM(net.params, 0.3))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        self.assertGreater((want - flat(net.gradient())).norm(), 0.01)  # the radius is large enough to matter

    def test_flipped_sam_is_the_gradient_at_theta_minus_rho_v(self):
        net = Network()
        want = flat(net.gradient(net.moved(net.gradient(), -0.3)))
        torch.testing.assert_close(net.smoothed(sam.SAM(net.params, 0.3, flip=True)), want, rtol=1e-10,
                                   atol=1e-12)

    def test_sam_on_a_subset_moves_only_it_and_keeps_every_gradient(self):
        net = Network()
        g = net.gradient()
        step = [g[0] * 0, g[1], g[2] * 0]
        want = flat(net.gradient(net.moved(step, 0.3)))
        got = net.smoothed(sam.SAM(net.params, 0.3, perturb=[net.params[1]]))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)

    def test_linf_is_the_gradient_where_every_weight_has_moved_by_rho(self):
        for flip in (False, True):
            net, r = Network(), -0.05 if flip else 0.05
            want = flat(net.gradient([(p + r * g.sign()).detach().requires_grad_()
                                      for p, g in zip(net.params, net.gradient())]))
            s = sam.SAM(net.params, 0.05, "linf", flip=flip)
            torch.testing.assert_close(net.smoothed(s), want, rtol=1e-10, atol=1e-12)
            size = math.sqrt(sum(p.numel() for p in net.params))
            self.assertAlmostEqual(s.stats["norm"].item(), size)
            self.assertAlmostEqual(s.stats["applied_norm"].item(), 0.05 * size)
            self.assertAlmostEqual(s.stats["cosine"].item(), 1)         # with sign(g), not with g

    def test_momentum_is_the_gradient_moved_along_the_one_before_while_the_weights_train(self):
        for norm, flip in itertools.product(("l2", "linf"), (False, True)):
            net, before, radius = Network(), None, -0.2 if flip else 0.2
            s = sam.SAM(net.params, 0.2, norm, "momentum", flip=flip)
            for step in range(4):
                at = net.params
                if step and norm == "l2":
                    at = net.moved(before, radius)
                elif step:
                    at = [(p + radius * g.sign()).detach().requires_grad_() for p, g in zip(at, before)]
                before = net.gradient(at)
                torch.testing.assert_close(net.smoothed(s), flat(before), rtol=1e-10, atol=1e-12)
                if step:
                    self.assertGreater((flat(before) - flat(net.gradient())).norm(), 0.01)
                with torch.no_grad():
                    for p in net.params:
                        p.grad.mul_(3.0)                 # the retain gradient comes on top: must not be kept
                        p.sub_(0.1 * p.grad)
            kept = {torch.int8} if norm == "linf" else {torch.float64}
            self.assertEqual({d.dtype for d in s.kept.values()}, kept)

    def test_momentum_of_a_subset_keeps_and_moves_only_it(self):
        net = Network()
        s = sam.SAM(net.params, 0.2, "linf", "momentum", perturb=net.params[1:2])
        g = net.gradient()
        net.smoothed(s)
        at = [net.params[0], (net.params[1] + 0.2 * g[1].sign()).detach().requires_grad_(), net.params[2]]
        torch.testing.assert_close(net.smoothed(s), flat(net.gradient(at)), rtol=1e-10, atol=1e-12)
        self.assertEqual([p is net.params[1] for p in s.kept], [True])

    def test_lookahead_is_the_gradient_after_steps_down_the_attackers_loss(self):
        for norm, steps, flip in itertools.product(("l2", "linf"), (1, 3), (False, True)):
            net, other = Network(), Network(7)                        # the attacker has data of its own
            s = sam.SAM(net.params, 0.3, norm, "lookahead", lookahead_steps=steps, flip=flip)

            def attack():
                loss = other.loss(net.params)
                loss.backward()
            at, r = net.params, 0.3 / steps * (1 if flip else -1)
            for _ in range(steps):
                g = other.gradient(at)
                size = flat(g).norm()
                at = [(p + r * (d.sign() if norm == "linf" else d / size)).detach().requires_grad_()
                      for p, d in zip(at, g)]
            want, before = flat(net.gradient(at)), flat(net.params).clone()
            got = net.smoothed(lambda closure: s(closure, attack))
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
            self.assertTrue(torch.equal(flat(net.params), before))
            self.assertGreater((want - flat(net.gradient())).norm(), 0.01)
        self.assertRaisesRegex(ValueError, "attacker's loss", s, net.closure)

    def test_random_directions_have_the_size_follow_the_seed_and_differ_between_steps(self):
        for norm in ("l2", "linf"):
            net, moves = Network(), []
            before = flat(net.params).clone()
            for seed in (4, 4, 5):
                s = sam.SAM(net.params, 0.3, norm, "random", seed=seed)
                for _ in range(2):
                    def closure():
                        moves.append(flat(net.params) - before)
                        return net.closure()
                    s(closure)
            for move in moves:
                size = move.abs() if norm == "linf" else move.norm()
                torch.testing.assert_close(size, torch.full_like(size, 0.3))
            self.assertTrue(torch.equal(moves[0], moves[2]) and torch.equal(moves[1], moves[3]))
            self.assertEqual(len({tuple(m.tolist()) for m in moves}), 4)

    def test_gp_converges_to_the_exact_double_backward_gradient(self):
        net, lam = Network(), 0.7
        g = net.gradient(graph=True)
        norm = torch.cat([x.reshape(-1) for x in g]).norm()
        want = flat(torch.autograd.grad(net.loss(net.params) + lam * norm, net.params))
        errors = [(net.smoothed(sam.GP(net.params, lam, r)) - want).norm().item() for r in (1e-3, 1e-4, 1e-5)]
        self.assertLess(errors[2], 1e-4)
        self.assertAlmostEqual(errors[0] / errors[1], 10, delta=1)          # first order in the radius
        self.assertGreater((want - flat(net.gradient())).norm(), 0.01)

    def test_gp_with_lambda_equal_to_the_radius_is_sam_bit_for_bit(self):
        net = Network()
        self.assertTrue(
            torch.equal(net.smoothed(sam.GP(net.params, 0.2, 0.2)), net.smoothed(sam.SAM(net.params, 0.2))))

    def test_cr_converges_to_the_exact_gradient_of_its_penalty(self):
        net, lam, mu = Network(), 0.7, 0.2
        norm = flat(net.gradient()).norm()
        v = [g / norm for g in net.gradient()]                              # held fixed, as in CURE
        there = net.gradient([p + mu * u for p, u in zip(net.params, v)], graph=True)
        here = net.gradient(graph=True)
        d = torch.cat([(a - b).reshape(-1) for a, b in zip(there, here)]).norm()
        want = flat(torch.autograd.grad(net.loss(net.params) + lam * d, net.params))
        errors = [(net.smoothed(sam.CR(net.params, lam, mu, r)) - want).norm().item()
                  for r in (1e-3, 1e-4, 1e-5)]
        self.assertLess(errors[2], 1e-4)
        self.assertAlmostEqual(errors[0] / errors[1], 10, delta=1)
        self.assertGreater((want - flat(net.gradient())).norm(), 0.01)

    def test_closed_forms_on_a_quadratic(self):
        torch.manual_seed(0)
        a = torch.randn(6, 6, dtype=torch.float64)
        a, p = a @ a.T * 1e3, torch.nn.Parameter(torch.randn(6, dtype=torch.float64))
        g = a @ p.detach()
        v = g / g.norm()

        def closure():
            loss = 0.5 * p @ a @ p
            loss.backward()
            return loss.detach()
        draws, rs = [], sam.RS([p], 0.1, samples=4, seed=5)
        for k in range(4):                                                 # the noise of every draw, on zeros
            z = torch.zeros(6, dtype=torch.float64)
            sam.noise_([z], 0.1, 5 * 1_000_003 + k)
            draws.append(z)
        for smoother, want in ((sam.SAM([p], 0.3), g + 0.3 * a @ v),
                               (sam.GP([p], 0.5, 0.01), g + 0.5 * a @ v),
                               (sam.CR([p], 0.5, 0.01), g),
                               (rs, a @ (p.detach() + sum(draws) / 4)),
                               (sam.plain, g)):
            p.grad = None
            loss = smoother(closure)
            torch.testing.assert_close(p.grad, want, rtol=1e-8, atol=1e-8 * g.norm().item())
            if smoother is not rs:
                self.assertAlmostEqual(loss.item(), (0.5 * p @ a @ p).item())

    def test_number_of_passes_is_the_documented_one(self):
        net = Network()
        variant = lambda how: sam.SAM(net.params, direction=how, lookahead_steps=3)
        for smoother, passes in ((sam.plain, 1), (sam.SAM(net.params), 2), (sam.RS(net.params, samples=5), 5),
                                 (sam.GP(net.params), 2), (sam.CR(net.params), 4), (variant("momentum"), 1),
                                 (variant("random"), 1), (variant("lookahead"), 4)):
            calls = []
            count = lambda: (calls.append(1), net.closure())[1]
            more = [count] if getattr(smoother, "direction", "") == "lookahead" else []
            net.smoothed(lambda _: smoother(count, *more))
            self.assertEqual(len(calls), passes)

    def test_every_smoother_restores_bit_for_bit_even_when_the_loss_raises(self):
        def lookahead(params):
            s = sam.SAM(params, 0.3, "linf", "lookahead", lookahead_steps=2)
            return lambda closure: s(closure, closure)

        def momentum(params):
            s = sam.SAM(params, 0.3, "linf", "momentum")
            return lambda closure: [s(closure) for _ in range(3)]
        for make in (lambda p: sam.SAM(p, 0.3), lambda p: sam.RS(p, 0.3, 3), lambda p: sam.GP(p, 0.1, 0.3),
                     lambda p: sam.CR(p, 0.1, 0.3), lookahead, momentum,
                     lambda p: sam.SAM(p, 0.3, direction="random")):
            for failing, error in itertools.product((0, 1, 2, 3, 9), (KeyboardInterrupt, RuntimeError)):
                net, calls = Network(), itertools.count()
                before = [p.detach().clone() for p in net.params]
                smoother = make(net.params)

                def closure():
                    if next(calls) == failing:
                        raise error("in the middle")
                    return net.closure()
                with contextlib.suppress(error):
                    smoother(closure)
                self.assertTrue(all(torch.equal(a, b) for a, b in zip(before, net.params)),
                                (smoother, failing))

    def test_restore_is_bitwise_for_every_dtype_where_subtracting_is_not(self):
        lossy = 0
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            torch.manual_seed(1)
            p = torch.nn.Parameter((torch.randn(4097) * 3).to(dtype))
            p.grad, before = torch.randn(4097).to(dtype), p.detach().clone()
            g = p.grad.clone()
            with sam.SAM([p], 2.0).perturbed() as s:
                self.assertFalse(torch.equal(p, before))
                lossy += not torch.equal((p - 2.0 * g / s.stats["norm"].to(dtype)).detach(), before)
            self.assertTrue(torch.equal(p, before))
        self.assertGreater(lossy, 0)

    def test_an_ascent_that_breaks_half_way_is_undone(self):
        a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        a.grad = b.grad = torch.ones(3)
        copy, count = torch.Tensor.copy_, itertools.count()

        def copy_twice(to, source):                                    # a is saved, a is moved, then it fails
            if next(count) == 2:
                self.assertFalse(torch.equal(a, torch.ones(3)))
                raise MemoryError
            return copy(to, source)
        with mock.patch.object(torch.Tensor, "copy_", copy_twice):
            with self.assertRaises(MemoryError), sam.SAM([a, b], 1.0).perturbed():
                self.fail("the body must not run")
        self.assertTrue(torch.equal(a, torch.ones(3)) and torch.equal(b, torch.ones(3)))

    def test_applied_norm_and_cosine_are_those_of_the_rounded_step(self):
        for dtype, rho in ((torch.float32, 0.01), (torch.bfloat16, 0.01), (torch.bfloat16, 1.0)):
            torch.manual_seed(2)
            params = [torch.nn.Parameter((torch.randn(s) * 0.05).to(dtype)) for s in ((300, 20), (77,))]
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            before, g = flat(params).double(), flat(p.grad for p in params).double()
            with sam.SAM(params, rho).perturbed() as s:
                step = flat(params).double() - before
            self.assertAlmostEqual(s.stats["applied_norm"].item(), step.norm().item(), places=5)
            self.assertAlmostEqual(s.stats["cosine"].item(), (step @ g / step.norm() / g.norm()).item(),
                                   places=4)
            self.assertAlmostEqual(s.stats["norm"].item(), g.norm().item(), delta=1e-4 * g.norm().item())
            if dtype == torch.float32:
                self.assertAlmostEqual(step.norm().item(), rho, places=6)

    def test_bf16_swallows_a_small_perturbation_and_says_so(self):
        torch.manual_seed(3)
        p = torch.nn.Parameter((torch.randn(100_000) * 0.05).bfloat16())
        p.grad = torch.randn(100_000).bfloat16()
        with sam.SAM([p], 0.01).perturbed() as s:
            pass
        self.assertLess(s.stats["cosine"], 0.9)
        line = unlearn.precision_warning(s.stats["applied_norm"].item(), s.stats["cosine"].item(), 0.01,
                                         "bfloat16")
        self.assertIn("bfloat16", line)
        self.assertIsNone(unlearn.precision_warning(0.01, 0.9999, 0.01, "float32"))

    def test_the_saved_weights_take_the_memory_of_the_gradient(self):
        p = torch.nn.Parameter(torch.randn(50))
        p.grad = torch.randn(50)
        address, old = p.grad.data_ptr(), p.detach().clone()
        s = sam.SAM([p], 0.1)
        s.ascent()
        self.assertEqual(s.saved[0][1].data_ptr(), address)
        self.assertTrue(torch.equal(s.saved[0][1], old))
        self.assertIsNone(p.grad)
        s.restore()

    def test_zero_and_non_finite_gradients_leave_the_weights_alone(self):
        for bad in (0.0, math.nan, math.inf):
            p, q = (torch.nn.Parameter(torch.randn(5)) for _ in range(2))
            p.grad, q.grad = torch.full((5,), bad), torch.zeros(5)
            before = p.detach().clone()
            with sam.SAM([p, q], 0.1).perturbed() as s:
                self.assertTrue(torch.equal(p, before))
            self.assertEqual((s.stats["applied_norm"], s.stats["cosine"]), (0, 0))

    def test_frozen_tied_and_gradientless_parameters_and_mixed_dtypes(self):
        a, frozen = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3), requires_grad=False)
        b, none = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), torch.nn.Parameter(torch.ones(2))
        empty = torch.nn.Parameter(torch.ones(0))
        s = sam.SAM([a, frozen, b, a, none, empty], 5.0)                    # a is tied: it must move once
        self.assertEqual(len(s.params), 4)
        a.grad, b.grad, empty.grad = torch.full((3,), 2.0), torch.full((2,), 3.0).bfloat16(), torch.ones(0)
        norm = math.sqrt(3 * 4 + 2 * 9)
        with s.perturbed():
            torch.testing.assert_close(a.detach(), torch.full((3,), 1 + 5 * 2 / norm))
            torch.testing.assert_close(b.detach(), torch.full((2,), 1 + 5 * 3 / norm).bfloat16())
            self.assertTrue(torch.equal(none, torch.ones(2)) and torch.equal(frozen, torch.ones(3)))
            none.grad = torch.ones(2)                                       # first gradient None, second not
        self.assertTrue(torch.equal(a, torch.ones(3)) and torch.equal(b, torch.ones(2).bfloat16()))
        self.assertIsNone(a.grad)                                    # second None: back in place all the same
        self.assertTrue(torch.equal(none.grad, torch.ones(2)))

    def test_tied_embeddings_of_a_real_architecture(self):
        model = little_llama(tie_word_embeddings=True)
        before = [p.detach().clone() for p in model.parameters()]
        batch = evaluate.collate([([1, 2, 3, 4], [1, 2, 3, 4])], 0)

        def closure():
            loss = -unlearn.sample_logps(model, batch).mean()
            loss.backward()
            return loss.detach()
        s = sam.SAM(itertools.chain(model.parameters(), [model.lm_head.weight]), 0.1)
        s(closure)
        self.assertAlmostEqual(s.stats["applied_norm"].item(), 0.1, places=9)
        self.assertTrue(all(torch.equal(a, b) for a, b in zip(before, model.parameters())))

    def test_bad_radii_and_double_ascent_are_errors(self):
        p = torch.nn.Parameter(torch.ones(2))
        for make in (lambda: sam.SAM([p], -0.1), lambda: sam.SAM([p], math.nan), lambda: sam.RS([p], -1.0),
                     lambda: sam.RS([p], 1.0, 0), lambda: sam.GP([p], 1.0, 0.0), lambda: sam.CR([p], -1.0),
                     lambda: sam.CR([p], 1.0, 0.0), lambda: sam.SAM([p], 0.1, "l1"),
                     lambda: sam.SAM([p], 0.1, direction="sideways"),
                     lambda: sam.SAM([p], 0.1, lookahead_steps=0)):
            self.assertRaises(ValueError, make)
        s = sam.SAM([p], 0.1)
        p.grad = torch.ones(2)
        s.ascent()
        self.assertRaises(RuntimeError, s.ascent)
        self.assertRaises(RuntimeError, s, lambda: self.fail("the closure must not run"))
        s.restore()
        for direction in ("momentum", "lookahead", "random"):               # do not follow p.grad: say so
            self.assertRaisesRegex(RuntimeError, "call it", sam.SAM([p], 0.1, direction=direction).ascent)
        self.assertTrue(torch.equal(p, torch.ones(2)))

    def test_noise_is_standard_normal_times_sigma_and_follows_the_seed(self):
        a, b, c = (torch.zeros(200_000) for _ in range(3))
        sam.noise_([a], 0.5, 1), sam.noise_([b], 0.5, 1), sam.noise_([c], 0.5, 2)
        self.assertTrue(torch.equal(a, b))
        self.assertFalse(torch.equal(a, c))
        self.assertAlmostEqual(a.std().item(), 0.5, delta=0.005)            # 6 standard errors
        self.assertAlmostEqual(a.mean().item(), 0.0, delta=0.007)
        self.assertAlmostEqual((a * c).mean().item(), 0.0, delta=0.004)

    def test_rs_draws_differ_between_draws_and_steps(self):
        p, seen = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)), []
        rs = sam.RS([p], 1.0, 3)

        def closure():
            seen.append(tuple(p.tolist()))
            return p.sum()
        rs(closure), rs(closure)
        self.assertEqual(len(set(seen)), 6)

    def test_weight_average_is_the_fp32_mean_for_any_dtype(self):
        for dtype in (torch.float32, torch.bfloat16):
            p, seen = torch.nn.Parameter(torch.zeros(100, dtype=dtype)), []
            wa = sam.WA([p])
            wa.swap()                                                  # nothing averaged yet: nothing changes
            self.assertTrue(torch.equal(p, torch.zeros(100, dtype=dtype)))
            for k in range(9):
                with torch.no_grad():
                    p.copy_(torch.randn(100, generator=torch.Generator().manual_seed(k)))
                seen.append(p.detach().double().numpy().copy())
                wa.update()
            want = np.mean(seen, axis=0)
            np.testing.assert_allclose(wa.mean[0].double().numpy(), want, atol=1e-6)
            wa.swap()
            np.testing.assert_allclose(p.detach().double().numpy(), want,
                                       rtol=2**-8 if dtype == torch.bfloat16 else 0, atol=1e-6)

    def test_with_linf_a_non_finite_element_stays_and_is_told(self):
        for ops in (sam, mt) if triton else (sam,):
            w, g = [torch.zeros(5)], [torch.tensor([1.0, math.nan, -2.0, math.inf, 0.0])]
            with np.errstate(invalid="ignore"):
                stats = ops.ascent_(w, g, 0.5, [], linf=True)
            self.assertEqual(w[0].tolist(), [0.5, 0, -0.5, 0, 0])
            self.assertTrue(stats["norm"].isnan() and not stats["applied_norm"].isnan())

    def test_sam_py_works_copied_out_alone(self):
        code = (
            "import torch, sam\nmodel = torch.nn.Linear(3, 1)\nx = torch.randn(4, 3)\n"
            "loss = lambda: model(x).square().mean()\nopt = torch.optim.AdamW(model.parameters())\n"
            "before = model.weight.clone()\ns = sam.SAM(model.parameters(), rho=0.01)\nloss().backward()\n"
            "with s.perturbed():\n    loss().backward()\nassert torch.equal(before, model.weight)\n"
            "(2 * loss()).backward()\nopt.step(); opt.zero_grad()\nprint(sam.operations([x])[0].__name__)\n"
            "try:\n    sam.operations([x], True)\nexcept ValueError as e:\n    print('fine', e)\n")
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(ROOT / "sam.py", folder)
            run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
        self.assertRegex(run.stdout, "^torch\nfine .*multi_tensor.py", run.stderr)


# ---- kernels/: by Triton's interpreter, on CPU tensors ----------------------------------------------------

def ulps(a, b):
    """Largest distance between two fp32 or two bf16 tensors, in steps from one number to the next."""
    assert a.dtype == b.dtype and a.isfinite().all() and b.isfinite().all()
    bits, mask = (torch.int32, 2**31 - 1) if a.dtype == torch.float32 else (torch.int16, 2**15 - 1)
    rank = lambda t: torch.where(t.view(bits) < 0, -(t.view(bits).long() & mask), t.view(bits).long())
    return (rank(a) - rank(b)).abs().max().item() if a.numel() else 0


def randn(sizes, dtype=torch.float32, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, generator=g) * scale).to(dtype) for n in sizes]


def same(one, other):
    """Are two lists of tensors equal bit for bit, NaNs included?"""
    raw = lambda t: t.detach().flatten().view(torch.uint8)
    return len(one) == len(other) and all(torch.equal(raw(a), raw(b)) for a, b in zip(one, other))


@contextlib.contextmanager
def launches():
    """The names of the kernels that run inside."""
    run, names = GridExecutor.__call__, []

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)
    with mock.patch.object(GridExecutor, "__call__", counted):
        yield names


@contextlib.contextmanager
def nothing_read_back():
    """Reading a tensor's value on the host is an error inside, except by the interpreter for its own ends."""
    run, inside = GridExecutor.__call__, []

    def allowed(self, *args, **kwargs):
        inside.append(self)
        try:
            return run(self, *args, **kwargs)
        finally:
            inside.pop()

    def guard(name, method):
        def guarded(tensor, *args, **kwargs):
            assert inside, f"Tensor.{name} waits for the device"
            return method(tensor, *args, **kwargs)
        return guarded
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(GridExecutor, "__call__", allowed))
        for name in "item cpu tolist numpy __bool__ __float__ __int__ __index__ __array__ nonzero".split():
            stack.enter_context(
                mock.patch.object(torch.Tensor, name, guard(name, getattr(torch.Tensor, name))))
        yield


@unittest.skipUnless(triton, "triton is not installed here")
class TestKernels(unittest.TestCase):
    # chunk 64 keeps the interpreter fast: every tensor above 64 elements has several chunks
    SIZES = [0, 1, 7, 63, 64, 65, 200]

    def test_philox_gives_the_published_words(self):
        """Known answers of Random123 1.14, philox4x32 with 10 rounds."""
        pi = (0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344)
        for seed, counters, want in (
                (0, (0,) * 4, (0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8)),
                (2**64 - 1, (2**32 - 1,) * 4, (0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd)),
                (0x299f31d0a4093822, pi, (0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1))):
            for module in (mt, adamw):
                got = module.philox_ref(seed, *(torch.tensor([c]) for c in counters))
                self.assertEqual(tuple(w.item() for w in got), want)

    def test_norm_is_the_fp64_sum_of_squares(self):
        for dtype in (torch.float32, torch.bfloat16):
            block = mt.TURN // dtype.itemsize
            for sizes, chunk in ((self.SIZES, 64), ([block - 1, block, block + 1, mt.CHUNK + 1], mt.CHUNK)):
                g = randn(sizes, dtype)
                want = torch.stack([x.double().square().sum() for x in g])
                torch.testing.assert_close(mt.global_norm(g, chunk=chunk).double(), want.sum().sqrt(),
                                           rtol=1e-6, atol=0)
                each = mt.global_norm(g, each=True, chunk=chunk)
                torch.testing.assert_close(each.double(), want.sqrt(), rtol=1e-6, atol=0)
                torch.testing.assert_close(mt.norm_ref(g), want.sum().sqrt())
        mixed = randn([5, 70]) + randn([9], torch.bfloat16)
        torch.testing.assert_close(mt.global_norm(mixed).double(), mt.norm_ref(mixed), rtol=1e-6, atol=0)
        self.assertTrue(same([mt.global_norm(mixed)], [mt.global_norm(mixed)]))
        self.assertEqual(mt.global_norm([]), 0)

    def test_ascent_moves_saves_measures_and_restores(self):
        """Against plain torch: fp32 bit for bit; bf16 within 1 ulp, as the interpreter cuts off fp32."""
        for dtype, linf in itertools.product((torch.float32, torch.bfloat16), (False, True)):
            w, g = randn(self.SIZES, dtype, 1, 0.05), randn(self.SIZES, dtype, 2)
            g[5][:3] = 0                                                        # sign(0) = 0
            old, direction, saved = [x.clone() for x in w], [x.clone() for x in g], []
            scale = 0.02 if linf else 0.5 / (mt.global_norm(g, chunk=64) + 1e-12)
            stats = mt.ascent_(w, g, 0.02 if linf else 0.5, saved, linf=linf, chunk=64)
            for new, o, d in zip(w, old, direction):
                want = mt.ascent_ref(o, d, scale, linf)
                self.assertLessEqual(ulps(new, want), dtype == torch.bfloat16)
            d, step = flat(direction).double(), flat(w).double() - flat(old).double()
            d = d.sign() if linf else d
            self.assertGreater(step.norm(), 0.2)
            self.assertAlmostEqual(stats["norm"].item(), d.norm().item(), delta=1e-5 * d.norm().item())
            self.assertAlmostEqual(stats["applied_norm"].item(), step.norm().item(), places=5)
            self.assertAlmostEqual(stats["cosine"].item(), (step @ d / step.norm() / d.norm()).item(),
                                   places=5)
            self.assertTrue(same(g, old))                                       # in the gradient's own memory
            self.assertEqual({x.data_ptr() for _, x in saved}, {x.data_ptr() for x in g})
            mt.restore_(saved, chunk=64)
            self.assertTrue(same(w, old))
            self.assertEqual(saved, [])

    def test_ascent_with_the_real_block_and_chunk_sizes(self):
        block = mt.TURN // 4
        w, g = (randn([block - 1, block, block + 1, mt.CHUNK + 1], seed=s) for s in (1, 2))
        old, scale, saved = [x.clone() for x in w], 0.5 / (mt.global_norm(g) + 1e-12), []
        want = [mt.ascent_ref(x, d, scale) for x, d in zip(w, g)]
        mt.ascent_(w, g, 0.5, saved)
        self.assertTrue(same(w, want))
        mt.restore_(saved)
        self.assertTrue(same(w, old))

    def test_kept_signs_and_fp32_gradients_of_bf16_weights_leave_the_direction_alone(self):
        w = randn(self.SIZES, torch.bfloat16, 1)
        g = randn(self.SIZES, torch.float32, 2)
        signs = [x.sign().to(torch.int8) for x in g]
        for direction, linf in ((g, False), (signs, True)):
            old, kept, saved = [x.clone() for x in w], [x.clone() for x in direction], []
            scale = 0.25 if linf else 3.0 / (mt.global_norm(direction, chunk=64) + 1e-12)
            mt.ascent_(w, direction, 0.25 if linf else 3.0, saved, linf=linf, chunk=64)
            for new, o, d in zip(w, old, g):
                self.assertLessEqual(ulps(new, mt.ascent_ref(o, d, scale, linf)), 1)
            self.assertTrue(same(direction, kept))
            mt.restore_(saved, chunk=64)
            self.assertTrue(same(w, old))

    def test_misaligned_transposed_scalar_and_gappy_tensors(self):
        buffer, grads = randn([300], seed=3)[0], randn([300], seed=4)[0]
        views = lambda b: [b[1:100], b[101:104], b[110:240].view(10, 13).T, b[250], b[260:272].view(3, 4, 1)]
        for name in ("ascent", "noise", "mean"):
            b, g = buffer.clone(), grads.clone()
            w, d, saved = views(b), views(g), []
            if name == "ascent":
                scale = 2.0 / (mt.global_norm(d, chunk=64) + 1e-12)
                want = [mt.ascent_ref(x, y, scale) for x, y in zip(w, d)]
                mt.ascent_(w, d, 2.0, saved, chunk=64)
            elif name == "noise":
                z = [mt.noise_ref(x.numel(), i, 9).float().as_strided(x.shape, x.stride())
                     for i, x in enumerate(w)]
                want = [x + 0.5 * y for x, y in zip(w, z)]
                mt.noise_(w, 0.5, 9, chunk=64)
            else:
                want = [x + (y - x) / 3 for x, y in zip(w, d)]
                mt.running_mean_(w, d, 3, chunk=64)
            for x, y in zip(w, want):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-5 if name == "noise" else 0)
            touched = torch.zeros(300, dtype=torch.bool)
            for view in views(touched):
                view.fill_(True)
            self.assertTrue(same([b[~touched]], [buffer[~touched]]))        # nothing around the views moved
            self.assertFalse((b == buffer)[touched].any())
            mt.restore_(saved, chunk=64)
        column, row = buffer[:20].view(4, 5)[:, 1], buffer[:12].view(3, 4)
        for w, d in (([column], [column.clone()]), ([row], [row.T.contiguous().T]), ([row], [row.view(4, 3)]),
                     ([buffer[:1].expand(5)], [torch.ones(5)])):
            before, saved = buffer.clone(), []
            self.assertRaisesRegex(ValueError, "strides", mt.ascent_, w, d, 1.0, saved)
            self.assertTrue(same([buffer], [before]) and not saved)
        self.assertRaisesRegex(ValueError, "float64", mt.global_norm, [torch.ones(3).double()])
        self.assertIn("gaps", mt.usable([column]))
        self.assertIn("float64", mt.usable([torch.ones(3).double()]))
        self.assertIsNone(mt.usable([row.T, torch.ones(())]))

    def test_sam_with_frozen_tied_gradientless_and_mixed_parameters(self):
        a, frozen = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3), requires_grad=False)
        b, none = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), torch.nn.Parameter(torch.ones(2))
        s = sam.SAM([a, frozen, b, a, none], 5.0, triton=True)
        a.grad, b.grad = torch.full((3,), 2.0), torch.full((2,), 3.0).bfloat16()
        norm = math.sqrt(3 * 4 + 2 * 9)
        with launches() as names, s.perturbed():
            torch.testing.assert_close(a.detach(), torch.full((3,), 1 + 5 * 2 / norm))
            self.assertLessEqual(ulps(b.detach(), torch.full((2,), 1 + 5 * 3 / norm).bfloat16()), 1)
            none.grad = torch.ones(2)
        self.assertTrue(all(torch.equal(x, torch.ones_like(x)) for x in (a, b, none, frozen)))
        self.assertEqual(Counter(names), {"_sumsq_kernel": 2, "_ascent_kernel": 2, "_copy_kernel": 2})
        saved, g = [], torch.ones(4)
        w = torch.zeros(4)
        mt.ascent_([w, w], [g, g], 1.0, saved)                     # the same tensor twice moves once, by rho
        self.assertAlmostEqual(w.norm().item(), 1.0, places=6)

    def test_zero_and_non_finite_gradients_move_nothing_and_are_told(self):
        for bad, dtype in itertools.product((0.0, math.nan, math.inf, -math.inf),
                                            (torch.float32, torch.bfloat16)):
            w, g = randn([70, 5], dtype), [torch.zeros(70, dtype=dtype), torch.zeros(5, dtype=dtype)]
            g[0][66], before, saved = bad, [x.clone() for x in w], []
            with np.errstate(invalid="ignore"):
                stats = mt.ascent_(w, g, 0.1, saved, chunk=64)
            self.assertTrue(same(w, before))
            self.assertEqual((stats["applied_norm"], stats["cosine"]), (0, 0))
            self.assertEqual(str(stats["norm"].item()), str(abs(bad)))
            mt.restore_(saved, chunk=64)
            self.assertTrue(same(w, before))

    def test_restore_copies_bits_even_of_nans(self):
        raw = torch.tensor([0x7fc00001, 0x7f800001, -1, 0, -2**31, 0x7f800000], dtype=torch.int64).int()
        for old in (raw.view(torch.float32), raw.view(torch.bfloat16)):
            w = torch.zeros_like(old)
            mt.restore_([(w, old)])
            self.assertTrue(same([w], [old]))

    def test_noise_follows_seed_tensor_and_element_alone(self):
        sizes = [0, 1, 7, 65, 200]
        draw = lambda seed, chunk, dtype=torch.float32: (
            w := [torch.zeros(n, dtype=dtype) for n in sizes], mt.noise_(w, 0.5, seed, chunk=chunk))[0]
        one = draw(2**62 + 3, 64)
        for tensor, w in enumerate(one):
            want = 0.5 * mt.noise_ref(w.numel(), tensor, 2**62 + 3)
            torch.testing.assert_close(w.double(), want, rtol=0, atol=2e-6)
        self.assertTrue(same(one, draw(2**62 + 3, 16)) and same(one, draw(2**62 + 3, mt.CHUNK)))
        self.assertLessEqual(ulps(flat(draw(2**62 + 3, 64, torch.bfloat16)), flat(one).bfloat16()), 1)
        self.assertFalse(torch.equal(one[4], draw(2**62 + 4, 64)[4]))
        self.assertNotEqual(one[3][0], one[4][0])
        z = mt.noise_ref(200_000, 3, 5)
        self.assertAlmostEqual(z.std().item(), 1, delta=0.01)               # 6 standard errors
        self.assertAlmostEqual(z.mean().item(), 0, delta=0.014)
        self.assertAlmostEqual((z[:-1] * z[1:]).mean().item(), 0, delta=0.014)

    def test_running_mean_is_exact_for_any_dtype(self):
        for dtype in (torch.float32, torch.bfloat16):
            mean, params = randn(self.SIZES, seed=1), randn(self.SIZES, dtype, 2)
            want = [m + (p.float() - m) / 3 for m, p in zip(mean, params)]
            mt.running_mean_(mean, params, 3, chunk=64)
            self.assertTrue(same(mean, want))
        self.assertRaises(AssertionError, mt.running_mean_, randn([5], torch.bfloat16), randn([5]), 3)
        self.assertRaises(AssertionError, mt.restore_, list(zip(randn([5], torch.bfloat16), randn([5]))))

    def test_more_than_2_to_the_31_elements(self):
        """The map of fake sizes against a loop, and a kernel on the last chunk of a tensor of 2**35 + 7."""
        sizes, chunk = [3 * 2**30, 0, 5, 2**32 + 1], 2**20
        owner, start = mt.chunk_map(sizes, chunk)
        want = [(t, s) for t, n in enumerate(sizes) for s in range(0, n, chunk)]
        self.assertEqual(list(zip(owner.tolist(), start.tolist())), want)
        self.assertGreater(start.max(), 2**31)
        start, buffer = 2**35, torch.zeros(7)
        head = [torch.tensor([[start + 7, buffer.data_ptr() - 4 * start, 11]]),
                torch.zeros(1, dtype=torch.int32), torch.tensor([start])]
        mt._noise_kernel[(1,)](*head, 5, 1.0, A=mt.tl.float32, ALIGNED=False, CHUNK=64, BLOCK=64)
        q = torch.tensor([start // 4, start // 4 + 1])
        words = mt.philox_ref(5, q & 0xFFFFFFFF, q >> 32, q * 0 + 11, q * 0)
        r = lambda u: (-2 * torch.where(u < 2**31, u, 2**32 - 1 - u).div(2**31).clamp(min=1e-7).log()).sqrt()
        angle = lambda u: 2 * math.pi * torch.where(u < 2**31, u, 2**32 - 1 - u).div(2**31)
        want = torch.stack([f(angle(words[i + 1])) * r(words[i]) for i in (0, 2)
                            for f in (torch.cos, torch.sin)], 1).flatten()[:7]
        torch.testing.assert_close(buffer, want, rtol=0, atol=1e-5)

    def test_each_operation_is_one_launch_a_pair_of_dtypes(self):
        w = randn([3, 70, 1, 130], seed=1) + randn([5, 80, 2], torch.bfloat16, 2)
        g = [torch.ones_like(x) for x in w]
        mean = [x.float() for x in w]
        for work, kernel in ((lambda: mt.global_norm(g, chunk=64), "_sumsq_kernel"),
                             (lambda: mt.ascent_(w, g, 0.1, [], linf=True, chunk=64), "_ascent_kernel"),
                             (lambda: mt.restore_(list(zip(w, g)), chunk=64), "_copy_kernel"),
                             (lambda: mt.noise_(w, 0.1, 1, chunk=64), "_noise_kernel"),
                             (lambda: mt.running_mean_(mean, w, 2, chunk=64), "_mean_kernel")):
            with launches() as names:
                work()
            self.assertEqual(names, [kernel] * 2)
        params = [torch.nn.Parameter(x) for x in w]
        optimizer = adamw.AdamW([{"params": params[:2], "lr": 0.1}, {"params": params[2:]}], triton=True)
        for p in params:
            p.grad = torch.ones_like(p)
        with launches() as names:
            optimizer.step()
        self.assertEqual(names, ["_adamw_kernel"] * 2)

    def test_nothing_is_read_back_between_ascent_and_restore(self):
        params = [torch.nn.Parameter(x) for x in randn([3, 70]) + randn([5], torch.bfloat16)]
        s = sam.SAM(params, 0.1, triton=True)
        for p in params:
            p.grad = torch.ones_like(p)
        with nothing_read_back():
            with s.perturbed():
                for p in params:
                    p.grad = torch.ones_like(p)
            self.assertRaisesRegex(AssertionError, "item", lambda: s.stats["norm"].item())
            self.assertRaisesRegex(AssertionError, "__bool__", lambda: bool(s.stats["norm"] > 0))

    def test_whatever_is_raised_the_weights_come_back_bit_for_bit(self):
        launch = mt._launch
        errors = (KeyboardInterrupt("Ctrl-C"), torch.OutOfMemoryError("full"), RuntimeError("other"))
        for error, where in itertools.product(errors, ("body", "before", "second", "after")):
            w = randn([70, 9], seed=1) + randn([5], torch.bfloat16, 2)           # two groups, so two launches
            params, before, count = [torch.nn.Parameter(x) for x in w], [x.clone() for x in w], []
            for p in params:
                p.grad = torch.ones_like(p)

            def failing(kernel, *args, **kwargs):
                count.append(kernel is mt._ascent_kernel)
                if count[-1] and (where == "before" or where == "second" and sum(count) == 2):
                    raise error
                launch(kernel, *args, **kwargs)
                if where == "after" and count[-1]:
                    raise error
            s = sam.SAM(params, 0.5, triton=True)
            with mock.patch.object(mt, "_launch", failing), self.assertRaises(type(error)):
                with s.perturbed():
                    self.assertFalse(same(params, before))
                    raise error
            self.assertTrue(same(params, before), (error, where))
            self.assertEqual(s.saved, [])

    def test_smoothers_by_kernels_agree_with_those_in_torch(self):
        def twice(params, triton, norm="linf"):                              # the second call has a direction
            s = sam.SAM(params, 0.1, norm, "momentum", triton=triton)
            return lambda closure: (s(closure), [p.grad.zero_() for p in params], s(closure))

        def lookahead(params, triton, norm="linf"):
            s = sam.SAM(params, 0.1, norm, "lookahead", params[1:], True, lookahead_steps=2, triton=triton)
            return lambda closure: s(closure, closure)
        for make in (lambda p, t: sam.SAM(p, 0.3, triton=t), lambda p, t: sam.GP(p, 0.5, 0.3, triton=t),
                     lambda p, t: sam.SAM(p, 0.3, perturb=p[1:], flip=True, triton=t), twice, lookahead,
                     lambda p, t: twice(p, t, "l2"), lambda p, t: lookahead(p, t, "l2"),
                     lambda p, t: sam.SAM(p, 0.1, "linf", triton=t),
                     lambda p, t: sam.CR(p, 0.2, 0.3, 0.2, triton=t)):
            one, other = (Network(dtype=torch.float32) for _ in range(2))
            torch.testing.assert_close(one.smoothed(make(one.params, True)),
                                       other.smoothed(make(other.params, False)), rtol=1e-5, atol=1e-6)
            self.assertTrue(same(one.params, other.params))
        net = Network(dtype=torch.float32)                                   # the noise is Philox's here
        draws = [[p + 0.2 * mt.noise_ref(p.numel(), i, 5 * 1_000_003 + k).float().view(p.shape)
                  for i, p in enumerate(net.params)] for k in range(2)]
        want = sum(flat(net.gradient([x.detach().requires_grad_() for x in d])) for d in draws) / 2
        got = net.smoothed(sam.RS(net.params, 0.2, 2, seed=5, triton=True))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        ours, theirs = sam.WA(net.params, triton=True), sam.WA(net.params, triton=False)
        for _ in range(3):
            ours.update(), theirs.update()
            with torch.no_grad():
                net.params[0].mul_(1.7)
        self.assertTrue(same(ours.mean, theirs.mean))

    def test_20_sam_steps_are_the_same_bit_for_bit_with_and_without_triton(self):
        """With one definition of the norm and of AdamW. torch's norm sums in another order, so its last bit
        differs: 16 ulps at most after 20 steps; torch.optim.AdamW also fuses multiply and add: 56 ulps."""
        def run(triton, optimizer):
            net = Network(3, torch.float32)
            s, o = sam.SAM(net.params, 0.2, triton=triton), optimizer(net.params)
            for _ in range(20):
                s(net.closure)
                o.step(), o.zero_grad()
            return flat(net.params)
        mine = lambda triton: lambda params: adamw.AdamW(params, lr=0.03, weight_decay=0.1, triton=triton)
        kernels = run(True, mine(True))
        with mock.patch.object(sam, "global_norm", mt.global_norm):
            self.assertTrue(same([kernels], [run(False, mine(False))]))
        plain = run(False, lambda params: torch.optim.AdamW(params, lr=0.03, weight_decay=0.1))
        self.assertGreater((kernels - flat(Network(3).params)).abs().max(), 0.5)
        torch.testing.assert_close(kernels, plain, rtol=0, atol=2e-6)      # 1.8e-7 measured, on weights of 1

    def test_the_path_is_torch_unless_a_gpu_the_interpreter_or_the_caller_says_so(self):
        p = torch.ones(3)
        self.assertEqual(sam.operations([p])[0].__name__, "torch")
        self.assertEqual(sam.operations([p], False)[0].__name__, "torch")
        self.assertIs(sam.operations([p], True)[0], mt)
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            self.assertIs(sam.operations([p])[0], mt)
            self.assertEqual(sam.operations([p.double()])[0].__name__, "torch")
            self.assertEqual(sam.operations([p], False)[0].__name__, "torch")
        with mock.patch.object(mt, "INTERPRETED", False):
            self.assertRaisesRegex(ValueError, "not on a GPU", sam.operations, [p], True)
            self.assertRaisesRegex(ValueError, "GPU tensors", mt.noise_, [p], 1.0, 0)
        self.assertRaisesRegex(ValueError, "float64", sam.SAM, [torch.nn.Parameter(p.double())], triton=True)

    def test_fsdp_shards_act_as_the_whole_model(self):
        """Two processes, each with half of every tensor, and of the last bias one with nothing."""
        code = """if True:
            import sys, torch, sam
            from torch.distributed.fsdp import fully_shard
            rank, store = int(sys.argv[1]), f"file://{sys.argv[2]}"
            torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
            mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
            mt, adamw = sam.kernel_file("multi_tensor"), sam.kernel_file("adamw")
            make = lambda: torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
            torch.manual_seed(0)
            whole, split, x = make(), make(), torch.randn(8, 5)
            split.load_state_dict(whole.state_dict())
            for module in (split[0], split[2], split):
                fully_shard(module, mesh=mesh)
            pairs = lambda: [(p.detach(), q.full_tensor().detach()) for p, q in
                             zip(whole.parameters(), split.parameters())]
            close = lambda: all(torch.allclose(p, q, rtol=1e-6, atol=1e-7) for p, q in pairs())
            before = [p.clone() for p, _ in pairs()]
            one, other = sam.SAM(whole.parameters(), 0.3, triton=False), sam.SAM(split.parameters(), 0.3)
            assert other.ops is not one.ops and other.ops.__name__ == "multi_tensor"
            opts = [adamw.AdamW(m.parameters(), lr=0.1) for m in (whole, split)]
            opts[1].triton = True
            for _ in range(2):
                for m in (whole, split):
                    m(x).square().mean().backward()
                one.ascent(), other.ascent()
                assert close() and not torch.equal(before[0], pairs()[0][1])
                for k in one.stats:
                    assert torch.allclose(one.stats[k], other.stats[k], rtol=1e-5), (one.stats, other.stats)
                for m in (whole, split):
                    m(x).square().mean().backward()
                one.restore(), other.restore()
                if not _:
                    assert all(torch.equal(b, q) for b, (_, q) in zip(before, pairs()))
                for o in opts:
                    o.step(), o.zero_grad()
                assert close()
            each = mt.global_norm(list(split.parameters()), each=True)
            assert torch.allclose(each, torch.stack([p.norm() for p in whole.parameters()]), rtol=1e-5)
            mt.noise_(list(split.parameters()), 1.0, 3)
            a, b = (pairs()[0][1] - pairs()[0][0]).chunk(2)
            assert not torch.allclose(a, b, atol=0.1), "both shards drew the same noise"
            torch.distributed.destroy_process_group()
            print("fine")
        """
        with tempfile.TemporaryDirectory() as folder:
            runs = [subprocess.Popen([sys.executable, "-c", code, str(rank), f"{folder}/store"], cwd=ROOT,
                                     env={**os.environ, "TRITON_INTERPRET": "1"}, text=True,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in (0, 1)]
            for run in runs:
                out, err = run.communicate(timeout=120)
                self.assertEqual(out.strip(), "fine", err)

    def test_every_kernel_file_works_copied_out_alone(self):
        code = """if True:
            import importlib.util, sys, torch
            def load(path):
                spec = importlib.util.spec_from_file_location("copied", path)
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                return module
            mt, adamw = load(sys.argv[1]), load(sys.argv[2])
            w, g, saved = torch.ones(5), torch.ones(5), []
            mt.ascent_([w], [g], 1.0, saved)
            assert abs(w[0] - 1 - 5 ** -0.5) < 1e-6
            mt.restore_(saved)
            p = torch.nn.Parameter(w)
            p.sum().backward()
            adamw.AdamW([p], lr=0.1, weight_decay=0.0, triton=True).step()
            assert abs(p[0] - 0.9) < 1e-6, p
            print("fine")
        """
        with tempfile.TemporaryDirectory() as folder:
            copies = [Path(folder) / "a" / "multi_tensor.py", Path(folder) / "b" / "adamw.py"]
            for copy in copies:
                copy.parent.mkdir()
                shutil.copy(ROOT / "kernels" / copy.name, copy)
            run = subprocess.run([sys.executable, "-c", code, *map(str, copies)], cwd=folder, text=True,
                                 env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True)
        self.assertEqual(run.stdout.strip(), "fine", run.stderr)

    def test_the_report_reads_access_widths_and_can_fail(self):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "k.py"
            source.write_text("a\nload  # full tile\ntail\n")
            ptx = ("\t.loc\t1 1 5\t\t\t// k.py:1:5\n\tld.global.b64 { %r1 }, [ %r2 ];\n"
                   "\t.loc\t1 2 5, function_name $L\t// k.py:2:5\n\t// begin inline asm\n"
                   "\t.loc\t1 2 5\t// k.py:2:5\n\tmov.u32 %r1;\n\t.loc\t1 3 5\t// k.py:3:5\n"
                   "\tld.global.v4.b32 { %r1 }, [ %r2 ];\n\t// end inline asm\n\tst.global.b16 [ %r2 ], %r1;"
                   "\n\t.loc\t1 3 5\t// k.py:3:5\n\t@%p4 ld.global.b16 { %r1 }, [ %r2 ];\n")
            gcn = ("\t.loc\t1 2 5 is_stmt 1 ; k.py:2:5 @[ k.py:9:9 ]\n\tbuffer_load_dwordx4 v[8:11], v4\n"
                   "\tglobal_load_ushort v1, v[2:3], off\n\tglobal_store_short_d16_hi v[2:3], v1, off\n"
                   "\t.loc\t1 2 5 ; other.py:2:5\n\tglobal_load_dword v1, v[2:3], off\n")
            self.assertEqual(mt.accesses(ptx, str(source)), [16, 2])
            self.assertEqual(mt.accesses(gcn, str(source)), [16, 2, 2])
        row = {"spilled": 0, "access_bytes": 16, "bytes_moved": 4.0, "floor": 4}
        self.assertFalse(mt.misses(row))
        for worse in ({"spilled": 8}, {"access_bytes": 8}, {"access_bytes": 0}, {"bytes_moved": 6.0}):
            self.assertTrue(mt.misses({**row, **worse}))
        code = """if True:
            import json, multi_tensor as mt
            name, kernel, extra, constants, dtypes, read, written = mt.variants()[0]
            assert name == "norm bf16", name
            print(json.dumps([[mt.compiled(kernel, extra, constants, dtypes, *target, aligned=aligned)
                               for aligned in (True, False)] for target in mt.TARGETS[1::2]]))
        """
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "kernels", text=True,
                             capture_output=True)
        self.assertEqual(run.returncode, 0, run.stderr)
        for wide, narrow in json.loads(run.stdout):                      # sm_90, gfx942
            self.assertFalse(mt.misses({**wide, "floor": 2}), wide)
            self.assertTrue(mt.misses({**narrow, "floor": 2}), narrow)
            self.assertLess(narrow["access_bytes"], 16)


def adam_rows(sizes, dtypes, seed=0):
    """Rows (w, g, m, v) for adamw.adamw_, weights of the size that language models have."""
    w, g, m, v = (randn(sizes, d, seed + i, s) for i, (d, s) in enumerate(zip(dtypes, (0.02, 1, 0.5, 1))))
    return list(map(list, zip(w, g, m, [x.abs() for x in v])))


@unittest.skipUnless(triton, "triton is not installed here")
class TestAdamW(unittest.TestCase):
    def test_the_kernel_is_the_reference_bit_for_bit(self):
        """In bf16 within 1 ulp where it rounds to nearest, as the interpreter cuts off fp32 instead."""
        half, full = torch.bfloat16, torch.float32
        for dtypes, seed in (((full,) * 4, None), ((full,) * 4, 5), ((half, half, full, full), 5),
                             ((half, full, full, full), None), ((half,) * 4, 2**62 + 5)):
            ours = adam_rows(TestKernels.SIZES, dtypes)
            buffer = torch.zeros(400, dtype=dtypes[0])                  # a transposed weight off alignment
            ours += [[buffer[1:79].view(6, 13).T.copy_(x.view(13, 6)) if i == 0 else
                      torch.empty_strided((13, 6), (1, 13), dtype=x.dtype).copy_(x.view(13, 6))
                      for i, x in enumerate(adam_rows([78], dtypes, 9)[0])]]
            theirs = [[x.clone() for x in row] for row in ours]
            again = [[x.clone() for x in row] for row in ours]
            numbers = [adamw.scalars(t + 1, 5e-6, (0.9, 0.99), 1e-8, 0.1) for t in range(len(ours))]
            tensors, steps = list(range(len(ours))), [t + 1 for t in range(len(ours))]
            adamw.adamw_(ours, numbers, tensors, steps, seed, chunk=64)
            adamw.adamw_(again, numbers, tensors, steps, seed, chunk=16)
            for row, other, n, t, s in zip(ours, theirs, numbers, tensors, steps):
                bits = None
                if seed and dtypes[0] == half:
                    bits = adamw.random_bits_ref(row[0].numel(), t, s, seed)
                    bits = bits.as_strided(row[0].shape, row[0].stride())
                adamw.adamw_ref(*other, n, bits)
                for i, (a, b) in enumerate(zip(row, other)):
                    exact = a.dtype == full or (i == 0 and seed)
                    self.assertLessEqual(ulps(a, b), 0 if exact else 1, (dtypes, i))
            self.assertTrue(same(sum(ours, []), sum(again, [])))
            self.assertFalse(same([ours[-1][0]], [adam_rows([78], dtypes, 9)[0][0].view(13, 6)]))
            self.assertTrue(same([buffer[:1], buffer[79:]], [torch.zeros_like(buffer[:1]),
                                                             torch.zeros_like(buffer[79:])]))
        row = adam_rows([20], (full,) * 4)[0]
        self.assertRaisesRegex(ValueError, "strides", adamw.adamw_, [[row[0].view(4, 5).T, *row[1:]]],
                               [adamw.scalars(1, 1, (0, 0), 0, 0)], [0], [1])
        self.assertRaisesRegex(ValueError, "float64", adamw.adamw_, [[row[0].double(), *row[1:]]],
                               [adamw.scalars(1, 1, (0, 0), 0, 0)], [0], [1])

    def test_steps_are_those_of_torch_in_fp64(self):
        """Groups with rates and decays of their own, and a parameter that has no gradient at first."""
        params = [torch.nn.Parameter(x) for x in randn([30, 5, 9], scale=0.1)]
        exact = [torch.nn.Parameter(p.detach().double()) for p in params]
        groups = lambda ps: [{"params": ps[:1], "lr": 0.01, "weight_decay": 0.3},
                             {"params": ps[1:], "betas": (0.8, 0.95), "eps": 1e-3}]
        for triton in (False, True):
            one, other = adamw.AdamW(groups(params), triton=triton), torch.optim.AdamW(groups(exact))
            for step in range(4):
                for i, (p, q) in enumerate(zip(params, exact)):
                    if i != 2 or step > 1:
                        p.grad = randn([p.numel()], seed=10 * step + i)[0]
                        q.grad = p.grad.double()
                loss = one.step(lambda: 7.0)
                other.step()
                one.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 0.02
            self.assertEqual(loss, 7.0)
            for p, q in zip(params, exact):
                torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-5, atol=1e-7)
            self.assertEqual([one.state[p]["step"] for p in params], [4, 4, 2])
            one.zero_grad(), other.zero_grad()
            self.assertTrue(all(p.grad is None for p in params))
        self.assertRaises(ValueError, adamw.AdamW, params, lr=-1.0)
        params[0].grad = torch.ones(30)
        with mock.patch.object(adamw, "INTERPRETED", False):
            self.assertRaisesRegex(ValueError, "GPU tensors", adamw.AdamW(params, triton=True).step)

    def test_a_saved_state_goes_on_bit_for_bit_with_its_dtype(self):
        def go(optimizer, p, steps):
            for step in steps:
                p.grad = randn([50], torch.bfloat16, step)[0]
                optimizer.step()
        make = lambda p, seed: adamw.AdamW([p], lr=1e-3, stochastic_rounding=True, seed=seed,
                                           state_dtype=torch.float32)
        p = torch.nn.Parameter(randn([50], torch.bfloat16, scale=0.02)[0])
        first = make(p, seed=3)
        go(first, p, range(3))
        q, saved = torch.nn.Parameter(p.detach().clone()), io.BytesIO()
        torch.save(first.state_dict(), saved)
        saved.seek(0)
        second = make(q, seed=3)
        second.load_state_dict(torch.load(saved))
        self.assertEqual(second.state[q]["exp_avg_sq"].dtype, torch.float32)
        go(first, p, range(3, 6)), go(second, q, range(3, 6))
        self.assertTrue(same([p, *(first.state[p][k] for k in ("exp_avg", "exp_avg_sq"))],
                             [q, *(second.state[q][k] for k in ("exp_avg", "exp_avg_sq"))]))
        other = torch.nn.Parameter(q.detach().clone())
        go(make(other, seed=4), other, range(1)), go(make(q, seed=3), q, range(1))
        self.assertFalse(torch.equal(q, other))                                   # another seed, other bits

    def test_stochastic_rounding_is_exact_on_average_and_between_neighbours(self):
        """Over all 65,536 random words the mean of the rounded value is the value, to the last bit."""
        bits = torch.arange(65536, dtype=torch.int32)
        for x in (0.02, -0.02, 0.0199995, 1.0, -3e-39, 123.456, 2.0**-126, 0.0, -1e30):
            x = torch.tensor(x)
            rounded = adamw.stochastic_round_ref(x.expand(65536).contiguous(), bits).double()
            self.assertEqual(rounded.mean().item(), x.double().item())
            near = x.bfloat16().double()
            self.assertLessEqual(len(rounded.unique()), 2)
            self.assertIn(near, rounded if x == near else rounded.unique())
            self.assertLess((rounded - x).abs().max(), max(x.abs() * 2**-7, 1e-40))
        bad = torch.tensor([math.inf, -math.inf, math.nan])
        for b in (0, 65535):
            got = adamw.stochastic_round_ref(bad, torch.full((3,), b, dtype=torch.int32))
            self.assertEqual(str(got.tolist()), "[inf, -inf, nan]")
        words = adamw.random_bits_ref(400_000, 2, 7, 1)
        self.assertTrue(0 <= words.min() and words.max() < 65536)
        self.assertAlmostEqual(words.double().mean().item() / 32767.5, 1, delta=0.005)    # 5 standard errors
        counts = torch.bincount(words // 4096, minlength=16)
        self.assertLess(((counts - 25_000).double() ** 2 / 25_000).sum(), 45)               # chi2, 15 degrees
        for other in (adamw.random_bits_ref(400_000, 3, 7, 1), adamw.random_bits_ref(400_000, 2, 8, 1)):
            self.assertAlmostEqual(np.corrcoef(words, other)[0, 1], 0, delta=0.01)

    def test_bf16_at_a_small_rate_loses_most_steps_to_nearest_and_none_on_average(self):
        """lr 5e-6 on weights of N(0, 0.02), as language models begin: to nearest, of torch.optim and of ours,
        only the 8% smallest weights move at all."""
        w, g = (randn([400_000], torch.bfloat16, s, c)[0] for s, c in ((1, 0.02), (2, 1.0)))
        share, gain = {}, {}
        for name, make in (("torch", torch.optim.AdamW), ("nearest", adamw.AdamW),
                           ("stochastic", lambda *a, **k: adamw.AdamW(*a, stochastic_rounding=True, **k))):
            p = torch.nn.Parameter(w.clone())
            p.grad = g.clone()
            make([p], lr=5e-6, weight_decay=0.0).step()
            step = (p.detach() - w).double()
            share[name] = (step != 0).double().mean().item()
            gain[name] = -(step * g.sign()).mean().item() / 5e-6
        print(f"[moved: {share['nearest']:.3f} to nearest, {share['stochastic']:.3f} stochastic] ", end="")
        self.assertLess(share["torch"], 0.1)
        self.assertLess(share["nearest"], 0.1)
        self.assertAlmostEqual(gain["stochastic"], 1, delta=0.05)                         # 6 standard errors

    def test_a_bf16_run_with_stochastic_rounding_tracks_fp32_and_to_nearest_does_not(self):
        g = torch.Generator().manual_seed(0)
        start = (torch.randn(48, 48, generator=g) * 0.02).bfloat16()
        goal = start.float() + 2e-3 * torch.randn(48, 48, generator=g).sign()
        x, moved, loss = torch.randn(256, 48, generator=g), {}, {}
        for name, dtype, stochastic in (("fp32", torch.float32, False), ("stochastic", torch.bfloat16, True),
                                        ("nearest", torch.bfloat16, False)):
            p = torch.nn.Parameter(start.to(dtype, copy=True))
            optimizer = adamw.AdamW([p], lr=5e-6, weight_decay=0.0, stochastic_rounding=stochastic)
            error = lambda: (x @ (p.float() - goal).T).square().mean()
            first = error().item()
            for _ in range(300):
                error().backward()
                optimizer.step(), optimizer.zero_grad()
            moved[name], loss[name] = (p.detach().float() - start.float()).flatten(), error().item() / first
        print(f"[share of the loss left: {loss}] ", end="")
        along = {k: (m @ moved["fp32"] / moved["fp32"].square().sum()).item() for k, m in moved.items()}
        self.assertAlmostEqual(along["stochastic"], 1, delta=0.05)
        self.assertLess(along["nearest"], 0.2)
        self.assertLess(loss["stochastic"], loss["fp32"] + 0.1)
        self.assertGreater(loss["nearest"], 0.7)


# ---- unlearn.py: losses -----------------------------------------------------------------------------------

class TestLosses(unittest.TestCase):
    def test_values_by_hand(self):
        logp, ref = torch.tensor([-1.0, -2.0]).double(), torch.tensor([-1.5, -1.0]).double()
        loss = lambda *a, **k: unlearn.forget_loss(*a, **k).tolist()
        self.assertEqual(loss("ga", logp), [-1.0, -2.0])
        self.assertEqual(loss("graddiff", logp), [-1.0, -2.0])
        for got, x in zip(loss("npo", logp, ref, 0.5), (0.5 * 0.5, 0.5 * -1.0)):     # beta * (logp - ref)
            self.assertAlmostEqual(got, 4 * math.log(1 + math.exp(x)))               # 2/beta log(1 + e^x)
        for got, x in zip(loss("simnpo", logp, beta=0.5, margin=0.3), (-0.5 + 0.3, -1.0 + 0.3)):
            self.assertAlmostEqual(got, 4 * math.log(1 + math.exp(x)))
        chosen, chosen_ref = torch.tensor([-3.0, -3.0]).double(), torch.tensor([-3.5, -2.0]).double()
        for got, x in zip(loss("dpo", logp, ref, 0.5, chosen=chosen, chosen_ref=chosen_ref),
                          (0.5 * (0.5 - 0.5), 0.5 * (-1.0 + 1.0))):
            self.assertAlmostEqual(got, 2 * math.log(1 + math.exp(-x)))

    def test_npo_gradient_is_the_published_adaptive_weight(self):
        """NPO paper, eq. 4: the ga gradient times 2 p^beta / (p^beta + p_ref^beta); weight 1 at the
        reference."""
        for beta in (0.05, 0.5, 2.0):
            logp = torch.tensor([-1.0, -2.0, -5.0], dtype=torch.float64, requires_grad=True)
            ref = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
            grad, = torch.autograd.grad(unlearn.forget_loss("npo", logp, ref, beta).sum(), logp)
            p, q = logp.detach().exp() ** beta, ref.exp() ** beta
            torch.testing.assert_close(grad, 2 * p / (p + q))
            self.assertAlmostEqual(grad[0].item(), 1.0)

    def test_npo_with_small_beta_is_gradient_ascent(self):
        logp = torch.tensor([-1.0, -7.0], dtype=torch.float64, requires_grad=True)
        loss = unlearn.forget_loss("npo", logp, torch.zeros(2).double(), beta=1e-6)
        grad, = torch.autograd.grad(loss.sum(), logp)
        torch.testing.assert_close(grad, torch.ones(2).double(), atol=1e-5, rtol=0)

    def test_the_sigmoid_is_taken_for_each_sample_not_of_the_batch_mean(self):
        logp, ref = torch.tensor([-1.0, -9.0]).double(), torch.tensor([-5.0, -5.0]).double()
        per_sample = unlearn.forget_loss("npo", logp, ref, 1.0).mean()
        of_mean = unlearn.forget_loss("npo", logp.mean(), ref.mean(), 1.0)
        self.assertGreater(abs(per_sample - of_mean), 0.5)

    def test_token_logps_match_a_loop_over_single_tokens(self):
        model, tok = little_llama(), words()
        samples = evaluate.encode(tok, [("", TEXTS[3], ""), ("Question: who sat? Answer:", " the cat", "")],
                                 64)
        logps, mask = evaluate.token_logps(model, evaluate.collate(samples, tok.pad_token_id))
        for row, (ids, labels) in enumerate(samples):
            for t in range(1, len(ids)):
                self.assertEqual(mask[row, t - 1].item(), labels[t] != -100)
                if labels[t] != -100:
                    p = model(torch.tensor([ids[:t]])).logits[0, -1].softmax(-1)[ids[t]]
                    self.assertAlmostEqual(logps[row, t - 1].item(), p.log().item(), places=10)
                else:
                    self.assertEqual(logps[row, t - 1].item(), 0)
        self.assertEqual([l for l in samples[1][1] if l != -100], tok("the cat").input_ids[1:])
        mean, total = (unlearn.sample_logps(model, evaluate.collate(samples, 0), r) for r in ("mean", "sum"))
        torch.testing.assert_close(mean * torch.tensor([7.0, 2.0]).double(), total)

    def test_padding_and_prompts_never_count_as_labels(self):
        """Whatever the pad token, however wide the padding and whatever the prompt's own labels would be,
        loss and gradient stay those of the sample alone."""
        model, tok = little_llama(), words()
        short, long = evaluate.encode(tok, [("Question: who", " sat?", ""), ("", TEXTS[3], "")], 64)

        def gradient(batch, rows):
            model.zero_grad()
            loss = unlearn.sample_logps(model, batch)[rows].sum()
            loss.backward()
            return loss.item(), flat(p.grad for p in model.parameters())
        alone, want = gradient(evaluate.collate([short], 0), [0])
        for pad in (0, 2, 5):
            padded, got = gradient(evaluate.collate([long, short], pad), [1])
            self.assertAlmostEqual(padded, alone, places=10)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        batch = evaluate.collate([long, short], 0)
        self.assertTrue((batch["labels"][batch["attention_mask"] == 0] == -100).all())

    def test_cached_reference_equals_a_live_reference_model(self):
        model, tok = little_llama(), words()
        args = unlearn.parse_args(["--out", "/nowhere", "--micro_batch", "2"])
        samples = evaluate.encode_rows(tok, [{"text": t, "where": ""} for t in TEXTS], 64)
        ref = unlearn.reference_logps(model, samples, args, 0)
        live = little_llama()                                             # an independent copy of the weights
        for i, sample in enumerate(samples):
            self.assertAlmostEqual(ref[i].item(),
                                   unlearn.sample_logps(live, evaluate.collate([sample], 0)).item())
        picked = unlearn.micro_batches(samples, [3, 0, 4], 2, 0, "cpu", ref)
        self.assertEqual([b["ref"].tolist() for b in picked], [[ref[3], ref[0]], [ref[4]]])
        f_loss = unlearn.forget_backward(model, picked, None, args).item()
        self.assertAlmostEqual(f_loss, 2 / args.beta * math.log(2), places=10)      # npo at the reference

    def test_kl_is_zero_at_the_frozen_model_and_matches_a_loop_elsewhere(self):
        model, frozen, tok = little_llama(), little_llama(seed=1), words()
        samples = evaluate.encode_rows(tok, [{"text": t, "where": ""} for t in TEXTS[:2]], 64)
        batch = evaluate.collate(samples, 0)
        self.assertAlmostEqual(unlearn.kl_sum(model, model, batch).item(), 0, places=10)
        want = 0.0
        for ids, _ in samples:
            q, p = (m(torch.tensor([ids])).logits[0, :-1].softmax(-1) for m in (frozen, model))
            want += (q * (q / p).log()).sum().item()
        self.assertAlmostEqual(unlearn.kl_sum(model, frozen, batch).item(), want, places=8)

    def test_rmu_distance_ignores_padding_and_uses_the_layer_asked_for(self):
        model, tok = little_llama(), words()
        samples = evaluate.encode_rows(tok, [{"text": t, "where": ""} for t in TEXTS[:2]], 64)
        batch, seen = evaluate.collate(samples, 0), []
        hook = model.model.layers[1].register_forward_hook(
            lambda m, i, o: seen.append(o[0] if isinstance(o, tuple) else o))
        hidden = unlearn.hidden_states(model, batch, 1)
        hook.remove()
        torch.testing.assert_close(hidden, seen[0])
        goal = torch.randn(16, dtype=torch.float64)
        want = sum((hidden[b, t] - goal).square().mean().item() for b, (ids, _) in enumerate(samples)
                   for t in range(len(ids)))
        self.assertAlmostEqual(unlearn.distance_sum(hidden, goal, batch).item(), want, places=8)

    def test_micro_batches_give_the_same_gradient_for_every_loss_and_smoother(self):
        tok = words()
        rows = [{"text": t, "where": ""} for t in TEXTS]
        other = evaluate.encode(tok, [("Question: who sat? Answer:", " one two", "")], 64) * 5
        combos = [(l, "sam --sam_rho 0.1") for l in ("npo", "graddiff", "ga", "simnpo", "dpo", "rmu")]
        combos += [("npo+kl", "none")] + [("npo", s) for s in ("none", "rs", "gp", "cr")]
        combos += [(l, f"sam --sam_direction {d} --sam_norm {n} --sam_rho 0.01") for l, d, n in (
            ("npo", "momentum", "linf"), ("rmu", "momentum", "l2"), ("dpo", "lookahead", "linf"),
            ("graddiff", "lookahead", "l2"), ("simnpo", "gradient", "linf"))]
        for loss, smooth in combos:
            results = []
            for size in (5, 2, 1):
                args = unlearn.parse_args(["--out", "/nowhere", "--loss", loss.split("+")[0],
                                           "--smooth", *smooth.split(), "--rmu_alpha", "3",
                                           *(["--retain", "kl"] if "kl" in loss else [])])
                args.rmu_layer = 1
                model, frozen = little_llama(), little_llama(seed=1)
                samples, picks = evaluate.encode_rows(tok, rows, 64), [4, 1, 3, 0, 2]
                ref, goal = torch.linspace(-3, -1, 5).double(), torch.ones(16).double()
                f = unlearn.micro_batches(samples, picks, size, 0, "cpu", ref)
                c = unlearn.micro_batches(other, picks, size, 0, "cpu", ref - 1) if loss == "dpo" else None
                smoother = unlearn.make_smoother(args, list(model.named_parameters()))
                if "lookahead" in smooth:
                    smoother = functools.partial(
                        smoother, attack=lambda: unlearn.mean_backward(model, f, "nll"))
                for _ in range(2 if "momentum" in smooth else 1):
                    model.zero_grad()
                    f_loss = smoother(lambda: unlearn.forget_backward(model, f, c, args, goal))
                r_loss = unlearn.retain_backward(model, unlearn.micro_batches(samples, picks, size, 0, "cpu"),
                                                 args, frozen)
                grads = [p.grad for p in model.parameters() if p.grad is not None]
                results.append(torch.cat([flat(grads), torch.tensor([f_loss, r_loss]).double()]))
            for got in results[1:]:
                torch.testing.assert_close(got, results[0], rtol=1e-8, atol=1e-10, msg=f"{loss} {smooth}")
            self.assertGreater(results[0].norm().item(), 1e-3)

    def test_the_step_adds_gamma_times_the_retain_gradient_at_theta(self):
        model, tok = little_llama(), words()
        args = unlearn.parse_args(
            ["--out", "/nowhere", "--loss", "graddiff", "--sam_rho", "0.5", "--gamma", "3"])
        samples = evaluate.encode_rows(tok, [{"text": t, "where": ""} for t in TEXTS], 64)
        f, r = (unlearn.micro_batches(samples, picks, 9, 0, "cpu") for picks in ([0, 1], [2, 3, 4]))
        smoother = unlearn.make_smoother(args, list(model.named_parameters()))
        smoother(lambda: unlearn.forget_backward(model, f, None, args))
        unlearn.retain_backward(model, r, args)
        got = flat(p.grad for p in model.parameters())

        params = list(model.parameters())                               # the same by hand, loops over samples
        nll = lambda ids: F.cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]))
        forget = lambda: -(nll(samples[0][0]) + nll(samples[1][0])) / 2
        labels = [len(samples[i][0]) - 1 for i in (2, 3, 4)]
        retain = sum(nll(samples[i][0]) * n for i, n in zip((2, 3, 4), labels)) / sum(labels)
        g_retain = flat(torch.autograd.grad(retain, params))
        g = torch.autograd.grad(forget(), params)
        norm = flat(g).norm()
        with torch.no_grad():
            for p, d in zip(params, g):
                p.add_(0.5 * d / norm)
        want = flat(torch.autograd.grad(forget(), params)) + 3 * g_retain
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-6)  # Llama's norm computes in fp32 even here
        self.assertGreater(want.norm().item(), 1.0)


# ---- unlearn.py: data and flags ---------------------------------------------------------------------------

class TestInput(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)

    def write(self, *lines):
        (self.folder / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return self.folder / "x.jsonl"

    def test_each_documented_row_is_read(self):
        path = self.write('{"text": "a"}', "", '"bare"', '{"prompt": "p", "completion": "c"}',
                          '{"text": "b", "fact": 3}')
        rows = evaluate.read_jsonl(path, evaluate.text_row)
        self.assertEqual(
            [{k: v for k, v in r.items() if k != "where"} for r in rows],
            [{"text": "a"}, {"text": "bare"}, {"prompt": "p", "completion": "c"}, {"text": "b", "fact": 3}])
        self.assertEqual(rows[2]["where"], f"{path}:4")

    def test_bad_rows_name_file_line_value_and_fix(self):
        mcq = '{"question": "q", "choices": ["a", "b", "c", "d"], "answer": 1}'
        for check, bad, said in (
                (evaluate.text_row, "{", "not JSON"),
                (evaluate.text_row, '{"txt": "a"}', "found txt"),
                (evaluate.text_row, '{"text": "  "}', "'  '"),
                (evaluate.text_row, '{"text": 3}', "is 3"),
                (evaluate.text_row, "[1]", "found list"),
                (evaluate.text_row, '{"prompt": "a"}', "completion"),
                (evaluate.mcq_row, '"text"', "found str"),
                (evaluate.mcq_row, mcq.replace('"d"', '7'), "exactly 4"),
                (evaluate.mcq_row, mcq.replace(', "d"', ""), "exactly 4"),
                (evaluate.mcq_row, mcq.replace('r": 1', 'r": 4'), "is 4"),
                (evaluate.mcq_row, mcq.replace('r": 1', 'r": true'), "is True"),
                (evaluate.mcq_row, mcq.replace('"q"', '""'), "is ''")):
            good = mcq if check is evaluate.mcq_row else '{"text": "fine"}'
            path = self.write(good, bad)
            with self.assertRaises(evaluate.InputError) as caught:
                evaluate.read_jsonl(path, check)
            self.assertIn(f"{path}:2: ", str(caught.exception))
            self.assertIn(said, str(caught.exception))

    def test_missing_empty_and_undecodable_files(self):
        self.assertRaisesRegex(evaluate.InputError, "missing", evaluate.read_jsonl, self.folder / "no.jsonl",
                               dict)
        self.assertRaisesRegex(evaluate.InputError, "no rows", evaluate.read_jsonl, self.write("", ""), dict)
        (self.folder / "x.jsonl").write_bytes(b"\xff\xfe")
        with self.assertRaisesRegex(evaluate.InputError, "UTF-8"):
            evaluate.read_jsonl(self.folder / "x.jsonl", dict)

    def test_long_texts_are_refused_with_the_fix_or_cut_on_request(self):
        tok = words()
        with self.assertRaisesRegex(evaluate.InputError, r"f:7: 8 tokens.* 4.*--max_len 4"):
            evaluate.encode(tok, [("", TEXTS[3], "f:7")], 4)
        (ids, labels), = evaluate.encode(tok, [("", TEXTS[3], "")], 4, max_len=4)
        self.assertEqual((len(ids), ids), (4, labels))
        with self.assertRaisesRegex(evaluate.InputError, "no token to score"):
            evaluate.encode(tok, [(TEXTS[3], " cat", "")], 64, max_len=5)

    def test_smoother_names_and_their_combinations(self):
        self.assertEqual(unlearn.parse_smooth("sam+wa"), ("sam", True))
        self.assertEqual(unlearn.parse_smooth("wa+rs"), ("rs", True))
        self.assertEqual(unlearn.parse_smooth("wa"), ("none", True))
        self.assertEqual(unlearn.parse_smooth("none"), ("none", False))
        for bad in ("sam+rs", "none+wa", "wa+wa", "sam+sam", "adam", ""):
            self.assertRaises(evaluate.InputError, unlearn.parse_smooth, bad)

    def test_flags_are_completed_to_what_runs(self):
        args = unlearn.parse_args(["--sam_rho", "0", "--seed", "7", "--overwrite"])
        self.assertEqual((args.smooth, args.out, args.retain, args.micro_batch),
                         ("none", "out/npo-s7", "nll", 32))
        args = unlearn.parse_args(["--smooth", "sam+wa", "--steps", "50", "--overwrite"])
        self.assertEqual((args.out, args.wa_start), ("out/npo+sam+wa-momentum-linf-s0", 40))
        self.assertEqual(unlearn.parse_args(["--stop_ue", "0.7", "--overwrite"]).eval_every, 5)

    def test_sam_rho_alone_means_the_papers_sam_and_nothing_at_all_means_momentum_on_the_built_in_data(self):
        variant = lambda *flags: [getattr(unlearn.parse_args([*flags, "--overwrite"]), name)
                                  for name in ("sam_direction", "sam_norm", "sam_rho")]
        self.assertEqual(variant("--sam_rho", "0.01"), ["gradient", "l2", 0.01])
        self.assertEqual(variant(), ["momentum", "linf", None])          # rho follows from the model's width
        self.assertEqual(variant("--data", "/mine", "--model", "m"), ["gradient", "l2", 0.1])
        self.assertEqual(variant("--data", "data/tiny/seed3"), ["momentum", "linf", None])
        self.assertEqual(variant("--sam_direction", "lookahead"), ["lookahead", "l2", 0.1])
        self.assertEqual(variant("--sam_norm", "linf"), ["gradient", "linf", None])
        self.assertEqual(variant("--smooth", "gp"), ["gradient", "l2", 0.1])

    def test_batches_cover_the_data_evenly_and_follow_the_seed(self):
        take = lambda seed: list(itertools.islice(unlearn.shuffled(7, 3, random.Random(seed)), 14))
        self.assertEqual(set(Counter(sum(take(0), [])).values()), {6})
        self.assertEqual(take(0), take(0))
        self.assertNotEqual(take(0), take(1))

    def test_learning_rate_by_hand(self):
        rates = [unlearn.learning_rate(s, 20, 1.0, 0.1, "none") for s in range(4)]
        self.assertEqual(rates, [0.5, 1.0, 1.0, 1.0])
        self.assertEqual([unlearn.learning_rate(s, 4, 1.0, 0, "linear") for s in range(4)],
                         [1.0, 0.75, 0.5, 0.25])


# ---- evaluate.py ------------------------------------------------------------------------------------------

class TestEvaluate(unittest.TestCase):
    prompt = "Question: {question} Answer:"
    rows = [{"question": q, "choices": c, "answer": 1, "where": "here", "subject": "cat"}
            for q, c in (("who sat?", ["the cat", "a dog", "one two three", "mat"]),
                         ("the mat on one two who?", ["cat", "dog", "mat", "sat"]),
                         ("on?", ["one", "two", "three", "four"]),
                         ("who?", ["cat cat", "dog", "mat", "ran ran ran"]))]

    def test_choice_scores_equal_four_full_strings_scored_one_by_one(self):
        model, tok = little_llama(), words()
        for prompt in (self.prompt, None):
            got = evaluate.choice_logps(model, tok, self.rows, prompt)
            for q, row in enumerate(self.rows):
                start, choices = evaluate.ask(row, prompt)
                for c, choice in enumerate(choices):
                    ids, known = tok(start + choice).input_ids, len(tok(start).input_ids)
                    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                    want = sum(logits[t - 1, ids[t]].item() for t in range(known, len(ids)))
                    self.assertAlmostEqual(got[q, c].item(), want, places=9)

    def test_one_token_choices_take_one_pass_a_question_and_batching_changes_nothing(self):
        model, tok, calls = little_llama(), words(), []
        hook = model.register_forward_pre_hook(lambda m, a, k: calls.append(len(k["input_ids"])),
                                               with_kwargs=True)
        one = evaluate.choice_logps(model, tok, self.rows, self.prompt, batch=64)
        self.assertEqual(sum(calls), 4 + 1 + 1 + 4)
        hook.remove()
        torch.testing.assert_close(one, evaluate.choice_logps(model, tok, self.rows, self.prompt, batch=1),
                                   rtol=1e-9, atol=0)

    def test_letter_prompt_is_the_one_of_the_harness(self):
        row = {"question": " Q? ", "choices": ["w", "x", "y", "z"], "answer": 0, "subject": "human_aging"}
        self.assertEqual(evaluate.ask(row, None), (
            "The following are multiple choice questions (with answers) about human aging.\n\nQ?\nA. w\n"
            "B. x\nC. y\nD. z\nAnswer:", [" A", " B", " C", " D"]))

    def test_ue_ut_and_held_out_by_hand(self):
        right = {"mcq_forget": [1, 0, 0, 1], "mcq_retain": [1, 1, 0]}
        questions = {k: [{"fact": i, "k": k} for i in range(len(v))]
                     for k, v in right.items()} | {"prompt": None}
        with mock.patch.object(evaluate, "correct",
                               lambda m, t, rows, p: torch.tensor(right[rows[0]["k"]]) == 1):
            self.assertEqual(evaluate.ue_ut(None, None, questions), {"UE": 0.5, "UT": 2 / 3})
            self.assertAlmostEqual(evaluate.ue_ut(None, None, questions, seen={0, 1})["UE_heldout"], 0.5)
            self.assertAlmostEqual(evaluate.ue_ut(None, None, questions, seen={0})["UE_heldout"], 2 / 3)
            self.assertIsNone(evaluate.ue_ut(None, None, questions, seen={0, 1, 2, 3})["UE_heldout"])
            self.assertIsNone(evaluate.ue_ut(None, None, questions, seen=set())["UE_heldout"])
            self.assertEqual(evaluate.ue_ut(None, None, {"prompt": None}), {"UE": None, "UT": None})

    def test_open_accuracy_is_what_greedy_generation_gives(self):
        model, tok = little_llama(), words()
        rows = []
        for i, text in enumerate(TEXTS * 4):                         # half of the answers are the model's own
            start = self.prompt.format(question=f"{text} {i % 4 * 'who '}")
            ids = torch.tensor([tok(start).input_ids])
            out = model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
            said = tok.decode(out[0, ids.shape[1]:])
            answer = said if i % 2 else "cat dog"
            rows.append({"question": f"{text} {i % 4 * 'who '}", "choices": [answer, "a", "b", "c"],
                         "answer": 0, "where": "", "right": tok(said).input_ids == tok(answer).input_ids})
        want = sum(r["right"] for r in rows) / len(rows)
        self.assertTrue(0.3 < want < 0.7)
        self.assertAlmostEqual(evaluate.open_accuracy(model, tok, rows, self.prompt, batch=3), want)

    def test_perplexity_matches_a_loop_and_takes_evenly_spaced_rows(self):
        model, tok = little_llama(), words()
        rows = [{"text": t, "where": ""} for t in TEXTS]
        nll = []
        for row in rows[::2]:
            ids = torch.tensor([tok(row["text"]).input_ids])
            nll += F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none").tolist()
        self.assertEqual(evaluate.spaced(rows, 3), rows[::2])
        self.assertEqual(evaluate.spaced(rows, 0), rows)
        got = evaluate.corpus_scores(model, tok, rows[::2], batch=2)[0]["ppl"]
        self.assertAlmostEqual(got, math.exp(np.mean(nll)), places=6)

    def test_t_test_against_published_tables(self):
        """Two-sided critical values of Student's t: 1 df 12.706 (.05), 7 df 2.365 (.05), 3.499 (.01), 15 df
        4.073 (.001)."""
        for df, t, p in ((1, 12.706, 0.05), (7, 2.365, 0.05), (7, 3.499, 0.01), (15, 4.073, 0.001)):
            rng = np.random.default_rng(df)
            d = rng.normal(size=df + 1)
            d = (d - d.mean()) / (d.std(ddof=1) / math.sqrt(df + 1)) + t     # mean t, standard error 1
            got_t, got_p = evaluate.t_test(d)
            self.assertAlmostEqual(got_t, t, places=9)
            self.assertAlmostEqual(got_p, p, delta=0.002 * p)
        self.assertEqual(evaluate.t_test([1.0, 1.0]), (None, None))

    def test_mean_and_standard_error_by_hand(self):
        self.assertEqual(evaluate.mean_se([1.0, 3.0]), (2.0, 1.0))
        self.assertEqual(evaluate.mean_se([4.0]), (4.0, None))

    def test_comparison_pairs_by_seed(self):
        got = evaluate.compare({1: {"UE": 3.0}, 2: {"UE": 5.0}, 9: {"UE": 0.0}},
                               {2: {"UE": 1.0}, 1: {"UE": 1.0}}, ["UE"])
        self.assertEqual((got["UE"]["mean"], got["UE"]["n"], got["UE"]["higher"]), (3.0, 2, 2))
        self.assertAlmostEqual(got["UE"]["t"], 3.0)                     # differences 2 and 4: mean 3, error 1
        self.assertAlmostEqual(got["UE"]["d"], 3 / math.sqrt(2))        # deviation sqrt(2)

    def test_runs_from_before_a_flag_existed_are_averaged_with_newer_ones(self):
        new = vars(unlearn.parse_args(["--sam_rho", "0.1", "--out", "/nowhere"]))
        old = {k: v for k, v in new.items() if k not in ("sam_norm", "sam_direction", "lookahead_steps")}
        of = lambda args: evaluate.method({"stage": "unlearn", "args": args})
        self.assertEqual(of(old), of(new))
        self.assertEqual(of(new | {"smooth": "none", "sam_rho": 0.0}), of(old | {"smooth": "none"}))
        other = of(new | {"sam_direction": "momentum"})
        self.assertEqual((other[0], of(new)[0]), ("npo+sam momentum", "npo+sam"))
        self.assertNotEqual(other[1], of(new)[1])

    def test_holm_by_hand_and_never_below_the_p_value_or_out_of_order(self):
        self.assertEqual(evaluate.holm([0.01, None, 0.04, 0.03, 0.005]), [0.03, None, 0.06, 0.06, 0.02])
        self.assertEqual(evaluate.holm([0.9, 0.8]), [1.0, 1.0])          # 2 x .8 is cut to 1, and .9 follows
        self.assertEqual(evaluate.holm([]), [])
        paired = {m: {"UE": {"p": p}, "UT": {"p": q}} for m, p, q in (("a", 0.01, 0.5), ("b", 0.02, None))}
        paired["c"] = {"UE": {"p": 0.03}}
        evaluate.correct_for_methods(paired)                                         # each column by itself
        self.assertEqual([by["UE"]["p_holm"] for by in paired.values()], [0.03, 0.04, 0.04])
        self.assertEqual((paired["a"]["UT"]["p_holm"], paired["b"]["UT"]["p_holm"]), (0.5, None))


# ---- evaluate.py: metrics of the published benchmarks -----------------------------------------------------

def writer(path, rows):
    """Write rows as JSON lines, the folder with it; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


class TestTextMetrics(unittest.TestCase):
    def texts(self, count, seed=0):
        rng = random.Random(seed)
        some = ["the", "cat", "Cat,", "sat!", "on", "a-mat", "3rd", "été", "_x_", "THE", "don't", ""]
        return [" ".join(rng.choice(some) for _ in range(rng.randrange(9))) for _ in range(count)]

    def test_rouge_l_equals_a_search_through_all_subsequences(self):
        for a, b in zip(self.texts(60), self.texts(60, 1)):
            x, y = (re.sub("[^a-z0-9]+", " ", t.lower()).split() for t in (a, b))
            inside = lambda part: all(w in rest for rest in [iter(y)] for w in part)      # consumes rest
            longest = max(n for n in range(len(x) + 1)
                          for part in itertools.combinations(x, n) if inside(part))
            p, r = (longest / len(z) if z else 0.0 for z in (x, y))
            want = (p, r, 2 * p * r / (p + r) if longest else 0.0)
            for got, value in zip(evaluate.rouge_l(a, b), want):
                self.assertAlmostEqual(got, value, places=12)

    def test_rouge_l_equals_the_rouge_score_package(self):
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError:
            self.skipTest("the package rouge-score is not installed")
        scorer = RougeScorer(["rougeL"], use_stemmer=False)
        for a, b in zip(self.texts(300), self.texts(300, 1)):
            for got, want in zip(evaluate.rouge_l(a, b), scorer.score(b, a)["rougeL"]):
                self.assertAlmostEqual(got, want, delta=1e-12)

    def test_auc_counts_pairs(self):
        rng = np.random.default_rng(0)
        a, b = rng.integers(0, 6, 17), rng.integers(1, 8, 11)                     # small integers: many ties
        pairs = [1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b]
        self.assertAlmostEqual(evaluate.auc(a, b), np.mean(pairs), places=12)
        self.assertEqual(evaluate.auc([3, 4], [1, 2]), 1.0)

    def test_min_k_truth_ratio_and_harmonic_mean_by_hand(self):
        self.assertAlmostEqual(evaluate.lowest_mean([-1.0, -5.0, -2.0, -4.0, -3.0]), 4.5)    # 40%: -5 and -4
        self.assertEqual(evaluate.lowest_mean([-7.0]), 7.0)
        self.assertAlmostEqual(evaluate.truth_ratio(-1.0, [-2.0, -4.0]), math.exp(-3) / math.exp(-1))
        self.assertAlmostEqual(evaluate.harmonic_mean([1.0, 2.0, 4.0]), 3 / (1 + 0.5 + 0.25))
        self.assertEqual(evaluate.harmonic_mean([1.0, 0.0]), 0.0)
        rows = [{"prob": 0.5, "rouge": 1.0, "R": 0.25}, {"prob": 0.1, "rouge": 0.0, "R": 2.0}]
        for name, truth in (("qa_forget", (0.25 + 0.5) / 2), ("qa_retain", (0.75 + 0) / 2)):
            got = evaluate.qa_summary(name, rows)
            self.assertEqual((round(got["prob"], 9), got["rouge"], got["truth"]), (0.3, 0.5, truth))

    def test_ks_p_value_counts_the_orders_of_two_samples(self):
        for n, m in ((1, 1), (3, 4), (5, 5), (2, 7)):
            orders = [set(some) for some in itertools.combinations(range(n + m), n)]
            gap = lambda of_a: max(abs(len([x for x in of_a if x <= t]) / n
                                       - len([x for x in range(t + 1) if x not in of_a]) / m)
                                   for t in range(n + m))
            gaps = [gap(of_a) for of_a in orders]
            for of_a, d in zip(orders[::7], gaps[::7]):
                got, p = evaluate.ks_test(sorted(of_a), [x for x in range(n + m) if x not in of_a])
                self.assertAlmostEqual(got, d, places=12)
                self.assertAlmostEqual(p, sum(g > d - 1e-9 for g in gaps) / len(gaps), places=12)

    def test_ks_p_value_against_published_tables(self):
        """Siegel, Nonparametric Statistics (1956), table L, after Massey (1951): the smallest n D that is
        significant for two samples of n, two-tailed. Smirnov (1948): sqrt(nm/(n+m)) D of large samples, .10
        1.224, .05 1.358, .01 1.628. Two samples apart: 2 orders of all."""
        p = lambda n, k: evaluate.ks_test(np.arange(n) + 0.5, np.arange(n) + k)[1]              # D = k/n
        table = {0.05: {4: 4, 5: 5, 6: 5, 7: 6, 8: 6, 9: 6, 10: 7, 13: 7, 14: 8, 17: 8, 18: 9, 20: 9, 25: 10},
                 0.01: {5: 5, 6: 6, 8: 7, 10: 8, 12: 8, 13: 9, 15: 9, 16: 10, 19: 10, 20: 11}}
        for level, critical in table.items():
            for n, k in critical.items():
                self.assertTrue(p(n, k) <= level < p(n, k - 1), (level, n, k))
        for level, c in ((0.10, 1.224), (0.05, 1.358), (0.01, 1.628)):
            k = c * math.sqrt(2 * 1000)                      # between two whole numbers, so between two p
            self.assertTrue(p(1000, math.ceil(k)) < level < p(1000, math.floor(k)), (level, k))
        self.assertAlmostEqual(p(400, 400) * math.comb(800, 400) / 2, 1, places=9)              # 1e-239

    def test_extraction_strength_by_hand(self):
        for hits, want in (("1111", 1.0), ("0111", 0.75), ("1011", 0.5), ("1110", 0.0), ("0000", 0.0)):
            self.assertEqual(evaluate.extraction_strength([h == "1" for h in hits]), want)

    def test_batches_take_every_sample_once_and_keep_to_their_limits(self):
        lengths = [random.Random(0).randrange(1, 30) for _ in range(100)] + [99]
        parts = list(evaluate.batches(lengths, 7, 60))
        self.assertEqual(sorted(i for part in parts for i in part), list(range(101)))
        flat_lengths = [lengths[i] for part in parts for i in part]
        self.assertEqual(flat_lengths, sorted(lengths))
        self.assertTrue(all(len(p) <= 7 and (len(p) == 1 or len(p) * lengths[p[-1]] <= 60) for p in parts))
        self.assertEqual(len(list(evaluate.batches([5] * 10, 4))), 3)


class TestPublishedMetrics(unittest.TestCase):
    """A random Llama of 1,024 tokens context, and a data folder with every file that evaluate.py knows."""

    @classmethod
    def setUpClass(cls):
        cls.model, cls.tok, cls.tmp = little_llama(context=1024), words(), Path(tempfile.mkdtemp())
        little_llama(torch.float32, context=1024).save_pretrained(cls.tmp / "model")
        little_llama(torch.float32, seed=1, context=1024).save_pretrained(cls.tmp / "other")
        for name in ("model", "other"):
            cls.tok.save_pretrained(cls.tmp / name)
        say = lambda i, n: " ".join(random.Random(i).choices(
            "cat dog mat sat ran one two three who on".split(), k=n))
        cls.qa = [{"question": say(i, 4) + "?", "answer": say(i + 50, 3),
                   "paraphrased_answer": say(i + 90, 4),
                   "perturbed_answer": [say(i + 20 * j, 2 + j) for j in range(2, 5)]} for i in range(7)]
        plain = [{k: v for k, v in r.items() if k != "paraphrased_answer"} for r in cls.qa]
        cls.files = {
            "forget": [{"text": say(i, 3 + i)} for i in range(6)],
            "retain": [{"text": say(i, 9)} for i in range(5)],
            "mcq_forget": [{k: r[k] for k in ("question", "choices", "answer", "subject")}
                           for r in TestEvaluate.rows],
            "verbmem_forget": [{"prompt": say(i, 5 + 3 * i), "gt": say(i + 9, 20)} for i in range(5)],
            **{f"knowmem_{k}": [{"question": say(i, 4), "answer": say(i, 2)} for i in range(4)]
               for k in ("forget", "retain", "forget_icl", "retain_icl")},
            "privleak_forget": [{"text": say(i, 20 + i)} for i in range(5)],
            "privleak_holdout": [{"text": say(i + 70, 12 + i)} for i in range(4)],
            "qa_forget": cls.qa, "qa_retain": cls.qa[::-1], "qa_real_authors": plain,
            "qa_world_facts": plain[2:]}
        for name, rows in cls.files.items():
            for folder in ["data"] + ["few"] * name.startswith(("qa_forget", "privleak")):
                writer(cls.tmp / folder / f"{name}.jsonl", rows)
        (cls.tmp / "data" / "meta.json").write_text(json.dumps({"auc_retrain": 0.4}))

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.tmp)

    def score(self, run="model", **changes):
        """The evaluate.json that a run with these flags leaves."""
        flags = {"data": str(self.tmp / "data"), "ppl_rows": 1024, "overwrite": True, "bos": "auto",
                 "limit": 0, "batch_size": 64, "records": True, "retain_run": None, "param_dtype": None,
                 "device": "cpu"}
        evaluate.score(self.tmp / run, argparse.Namespace(**flags | changes))
        return json.loads((self.tmp / run / "evaluate.json").read_text())

    def greedy(self, text, new):
        """Greedy continuation by one whole forward pass a token, without cache, padding or generate()."""
        ids = self.tok(text).input_ids
        for _ in range(new):
            ids = ids + [self.model(torch.tensor([ids])).logits[0, -1].argmax().item()]
            if ids[-1] == self.tok.eos_token_id:
                return self.tok.decode(ids[len(self.tok(text).input_ids):-1], skip_special_tokens=True)
        return self.tok.decode(ids[len(self.tok(text).input_ids):], skip_special_tokens=True)

    def logp(self, prompt, completion):
        """Mean log-probability of a completion, scored alone."""
        ids, known = self.tok(prompt + completion).input_ids, len(self.tok(prompt).input_ids)
        logits = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return np.mean([logits[t - 1, ids[t]].item() for t in range(known, len(ids))])

    def test_batched_generation_with_left_padding_is_a_plain_greedy_loop(self):
        prompts = [(r["prompt"], "") for r in self.files["verbmem_forget"]] + [("who", "")]
        want = [self.greedy(text, 12) for text, _ in prompts]
        self.model.generation_config.repetition_penalty = 5.0           # a checkpoint's own: greedy is argmax
        for batch in (64, 4, 1):
            self.assertEqual(evaluate.generate(self.model, self.tok, prompts, 12, batch), want)
        self.assertEqual(self.model.generation_config.repetition_penalty, 5.0)
        self.model.generation_config.repetition_penalty = None
        self.assertGreater(len(set(want)), 2)

    def test_generation_ends_at_eos_and_refuses_what_does_not_fit(self):
        said = self.greedy("one two", 6).split()
        end = self.tok.convert_tokens_to_ids(said[2])
        first = said.index(said[2])
        with mock.patch.object(self.model.generation_config, "eos_token_id", [end]):
            got = evaluate.generate(self.model, self.tok, [("one two", ""), ("cat", "")], 6)
        self.assertEqual(got[0].split(), said[:first])
        with self.assertRaisesRegex(evaluate.InputError, "f:3: .* 1020 new .* 1024"):
            evaluate.generate(self.model, self.tok, [("one two three cat", "f:3")], 1020)

    def test_verbmem_and_knowmem_by_definition(self):
        rows = [r | {"where": ""} for r in self.files["verbmem_forget"]]
        got = evaluate.verbmem(self.model, self.tok, rows, new=10)
        for row, record in zip(rows, got):
            cut = " ".join(row["gt"].split()[:10])                     # a token is a word here
            self.assertEqual(record["rouge"], evaluate.rouge_l(self.greedy(row["prompt"], 10), cut)[2])
        asked = []
        said = [" the cat\n\nmore", "a dog\nQuestion: x", "x Question: the cat"]
        with mock.patch.object(evaluate, "generate",
                               lambda m, t, prompts, new, *a: asked.append((prompts, new)) or said):
            got = evaluate.knowmem(None, None, [{"question": f"q{i}", "answer": "the cat", "where": "w"}
                                                for i in range(3)], [{"question": "e", "answer": "f"}] * 2)
        self.assertEqual([r["said"] for r in got], [" the cat", "a dog", "x "])
        self.assertEqual([r["rouge"] for r in got], [1.0, 0.0, 0.0])
        self.assertEqual(asked[0][0][1], (2 * "Question: e\nAnswer: f\n\n" + "Question: q1\nAnswer: ", "w"))
        self.assertEqual(asked[0][1], 32)

    def test_tofu_scores_equal_full_strings_scored_one_by_one(self):
        for rows in (self.files["qa_forget"], self.files["qa_real_authors"]):
            got = evaluate.qa_scores(self.model, self.tok, [r | {"where": ""} for r in rows], new=5)
            for row, record in zip(rows, got):
                prompt = f"Question: {row['question']}\nAnswer:"
                p = lambda answer: self.logp(prompt, " " + answer)
                wrong = [math.exp(p(w)) for w in row["perturbed_answer"]]
                prob = math.exp(p(row["answer"]))
                if "paraphrased_answer" not in row:
                    prob = prob / (prob + sum(wrong))
                ratio = math.exp(np.mean([math.log(w) for w in wrong])) / math.exp(
                    p(row.get("paraphrased_answer", row["answer"])))
                self.assertAlmostEqual(record["prob"], prob, places=9)
                self.assertAlmostEqual(record["R"] / ratio, 1, places=9)
                self.assertEqual(record["rouge"], evaluate.rouge_l(self.greedy(prompt, 5), row["answer"])[1])

    def test_templates_give_the_space_before_an_answer_to_the_answer(self):
        self.assertEqual(evaluate.qa_texts(evaluate.QA, "q", "a"), ("Question: q\nAnswer:", " a"))
        self.assertEqual(evaluate.qa_texts("[INST] {question} [/INST]{answer}</s>", "{answer}", "a"),
                         ("[INST] {answer} [/INST]", "a</s>"))

    def test_memorisation_by_definition(self):
        """Exact memorisation by a loop, extraction strength by generating from every prefix."""
        texts = ["cat sat on", *[f"{t} {self.greedy(t, n)}" for t, n in (("who ran", 4), ("one two", 6))]]
        texts[1] = texts[1].rsplit(" ", 1)[0] + " mat"                                  # a wrong last word
        rows = [{"text": t, "where": ""} for t in texts]
        scores, records = evaluate.corpus_scores(self.model, self.tok, rows, batch=2)
        for text, record in zip(texts, records):
            ids = self.tok(text).input_ids
            labels, strength = ids[1:], 0.0
            hits = [self.model(torch.tensor([ids[:t]])).logits[0, -1].argmax().item() == ids[t]
                    for t in range(1, len(ids))]
            for k in range(len(labels), -1, -1):                        # the shortest prefix that is enough
                said = ids[:1 + k]
                while len(said) < len(ids):
                    said = said + [self.model(torch.tensor([said])).logits[0, -1].argmax().item()]
                strength = max(strength, 1 - k / len(labels)) if said == ids else strength
            self.assertAlmostEqual(record["em"], np.mean(hits))
            self.assertAlmostEqual(record["es"], strength)
        self.assertGreater(records[2]["es"], 0.5)
        self.assertEqual((scores["es"], records[1]["es"]), (np.mean([r["es"] for r in records]), 0.0))

    def test_a_folder_decides_what_is_measured_and_batch_size_changes_nothing(self):
        whole = self.score()
        m, records = whole["metrics"], whole["records"]
        asked = {k: rows for k, rows in self.files.items() if "icl" not in k}
        asked["verbmem"] = asked.pop("verbmem_forget")
        self.assertEqual({k: len(v) for k, v in records.items()}, {k: len(v) for k, v in asked.items()})
        self.assertEqual((m["bos"], m["UT"], m["template"]), (True, None, evaluate.LETTERS))
        pairs = [a["min_k"] > b["min_k"] for a in records["privleak_forget"]
                 for b in records["privleak_holdout"]]
        self.assertAlmostEqual(m["auc"], np.mean(pairs))
        self.assertAlmostEqual(m["privleak"], 100 * (np.mean(pairs) - 0.4) / 0.4)
        nine = [v for k in ("retain", "real_authors", "world_facts") for v in m[f"qa_{k}"].values()]
        self.assertAlmostEqual(m["utility"], len(nine) / sum(1 / v for v in nine) if all(nine) else 0.0)
        self.assertNotIn("forget_quality", m)
        right = [max(range(4), key=r["logps"].__getitem__) == r["answer"] for r in records["mcq_forget"]]
        self.assertAlmostEqual(m["UE"], 1 - np.mean(right))
        again = self.score(batch_size=2)
        for name, rows in records.items():
            for a, b in zip(rows, again["records"][name]):
                for key, value in a.items():
                    if key == "logps" or isinstance(value, float):
                        np.testing.assert_allclose(b[key], value, rtol=2e-5, err_msg=f"{name} {key}")
                    else:
                        self.assertEqual(b[key], value, name)

    def test_limit_bos_and_a_model_that_never_knew(self):
        few = {"data": str(self.tmp / "few")}
        m = self.score(**few, limit=2, records=False)
        self.assertEqual(m["args"]["limit"], 2)
        self.assertNotIn("records", m)
        m = self.score(**few, limit=2, bos="none")
        self.assertFalse(m["metrics"]["bos"])
        self.assertEqual([r["where"].split(":")[-1] for r in m["records"]["qa_forget"]], ["1", "5"])
        own = self.score(**few, retain_run=str(self.tmp / "model"))["metrics"]    # compared with itself
        self.assertEqual((own["forget_quality"], own["privleak"]), (1.0, 0.0))
        m = self.score(**few, retain_run=str(self.tmp / "other"))
        other = json.loads((self.tmp / "other" / "evaluate.json").read_text())
        r, kept = ([row["R"] for row in x["records"]["qa_forget"]] for x in (m, other))
        self.assertEqual(m["metrics"]["forget_quality"], evaluate.ks_test(r, kept)[1])
        self.assertAlmostEqual(m["metrics"]["privleak"],
                               100 * (m["metrics"]["auc"] / other["metrics"]["auc"] - 1))
        stamp = (self.tmp / "other" / "evaluate.json").stat().st_mtime_ns
        self.score(**few, retain_run=str(self.tmp / "other"))               # kept: nothing about it changed
        self.assertEqual((self.tmp / "other" / "evaluate.json").stat().st_mtime_ns, stamp)

    def test_the_command_line_scores_a_plain_model_and_says_what_is_missing(self):
        status, out, err = run_here("evaluate.py", self.tmp / "model", "--data", self.tmp / "data",
                                    "--limit", 2)
        self.assertEqual(status, 0, err)
        for word in ("model", "utility", "qa_forget_truth", "verbmem", "privleak", "es_forget"):
            self.assertIn(word, out)
        (self.tmp / "bad").mkdir()
        writer(self.tmp / "bad" / "qa_forget.jsonl",
               [{"question": "q", "answer": "a", "perturbed_answer": []}])
        for script, flags, said in (
                ("evaluate.py", (), "--data FOLDER"), ("relearn.py", (), "--data FOLDER"),
                ("evaluate.py", ("--data", self.tmp / "bad"), "qa_forget.jsonl:1")):
            status, _, err = run_here(script, self.tmp / "model", *flags)
            self.assertEqual((status, len(err.strip().splitlines())), (2, 1), err)
            self.assertIn(said, err)

    @unittest.skipUnless(os.environ.get("REAL_MODEL"), "set REAL_MODEL to a Hugging Face folder to run it")
    def test_letter_questions_are_three_times_as_fast_as_four_passes_each(self):
        """REAL_QUESTIONS letter questions on the built-in world, by evaluate.py and by a plain loop of four
        forward passes a question. The two take turns, 64 questions each: one after the other, a machine that
        is busy with something else can slow one of them alone."""
        model, tok = evaluate.load_model(os.environ["REAL_MODEL"])
        files, count = prepare.build_world(0)[0], int(os.environ.get("REAL_QUESTIONS", 24))
        rows = [r | {"where": ""} for r in (files["mcq_forget.jsonl"] + files["mcq_retain.jsonl"])[:count]]

        def plain_loop(some):
            scores = torch.zeros(len(some), 4, dtype=torch.float64)
            for q, row in enumerate(some):
                context, letters = evaluate.ask(row, None)
                known = len(tok(context).input_ids)
                for c, letter in enumerate(letters):
                    ids = tok(context + letter).input_ids
                    logps = model(torch.tensor([ids])).logits[0, known - 1:-1].log_softmax(-1)
                    scores[q, c] = sum(logps[t, token].item() for t, token in enumerate(ids[known:]))
            return scores
        clocks, out = np.zeros((2, 2)), ([], [])                        # (method, wall and CPU seconds)
        with torch.no_grad():
            for start in range(0, count, 64):
                for i, work in enumerate((lambda some: evaluate.choice_logps(model, tok, some), plain_loop)):
                    before = np.array([time.time(), time.process_time()])
                    out[i].append(work(rows[start:start + 64]))
                    clocks[i] += np.array([time.time(), time.process_time()]) - before
        ours, theirs = map(torch.cat, out)
        wall, cpu = clocks[1] / clocks[0]
        print(f"\n{count} questions, seconds of wall clock and CPU: evaluate.py {clocks[0].round(1)}, four "
              f"passes each {clocks[1].round(1)}: {wall:.2f} and {cpu:.2f} times; largest difference of a "
              f"log-probability {(ours - theirs).abs().max():.1e}; choices "
              f"{dict(sorted(Counter(ours.argmax(1).tolist()).items()))}", flush=True)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
        self.assertEqual(ours.argmax(1).tolist(), theirs.argmax(1).tolist())
        self.assertGreater(wall, 3)


# ---- data/*/prepare.py ------------------------------------------------------------------------------------

class TestPrepare(unittest.TestCase):
    def setUp(self):
        self.tmp = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.tmp)
        self.source, self.out = self.tmp / "source", self.tmp / "out"

    def parquet(self, path, rows):
        try:
            from datasets import Dataset
        except ImportError:
            self.skipTest("the package datasets is not installed")
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(str(path))

    def prepare(self, name, *flags, code=0, source=True):
        """Run data/NAME/prepare.py on self.source; returns its output, or its one line of error."""
        where = ("--from", self.source) if source else ()
        status, out, err = run_here(f"data/{name}/prepare.py", *where, "--out", self.out, *flags)
        self.assertEqual(status, code, err)
        if code:
            lines = [line for line in err.splitlines() if line.startswith("error: ")]
            self.assertEqual(len(lines), 1, err)
            return lines[0]
        self.assertFalse(list(self.out.rglob("*.tmp*")))
        return out

    def rows(self, name):
        return [json.loads(line) for line in (self.out / f"{name}.jsonl").read_text().splitlines()]

    def questions(self, n, **more):
        return [{"answer": i % 4, "question": f"question {i}?", "choices": [f"{c} {i}" for c in "wxyz"],
                 **more} for i in range(n)]

    # -- MMLU

    def test_mmlu_from_parquet_and_from_the_original_csv_is_the_same(self):
        rows = self.questions(3, subject="abstract_algebra") + self.questions(2, subject="virology")
        rows[1]["question"] = 'two\nlines, a comma and "quotes"?'
        for subject in ("abstract_algebra", "virology"):
            path = self.source / "test" / f"{subject}_test.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", newline="") as f:
                csv.writer(f).writerows([r["question"], *r["choices"], "ABCD"[r["answer"]]]
                                        for r in rows if r["subject"] == subject)
        self.assertIn("14,042", self.prepare("mmlu", code=2))
        self.assertFalse(self.out.exists())
        self.prepare("mmlu", "--any_count")
        self.assertEqual(self.rows("mcq_retain"), rows)
        path.write_text('"q",a,b,c,d,A\nq,a,b,c,D\n')
        self.assertIn("virology_test.csv:2: needs a question, 4 choices", self.prepare("mmlu", code=2))
        path.write_text('q,a,b,c,d,A\n"q,a,b')                                      # cut off inside quotes
        self.assertIn("virology_test.csv:2: needs a question", self.prepare("mmlu", code=2))
        path.write_text('q,a,b,c,d,A\n"q,' + "a" * 140_000)
        self.assertIn("virology_test.csv:2: not CSV", self.prepare("mmlu", code=2))
        shutil.rmtree(self.source)
        self.parquet(self.source / "all" / "test-00000-of-00001.parquet", rows)
        first = (self.out / "mcq_retain.jsonl").read_text()
        self.prepare("mmlu", "--any_count")
        self.assertEqual((self.out / "mcq_retain.jsonl").read_text(), first)

    # -- WMDP

    def wmdp(self, forget="bio_remove_dataset.jsonl", bare=False):
        """Fixtures as the zip archives hold them: arrays of questions, JSON lines of documents."""
        shutil.rmtree(self.source, ignore_errors=True)
        self.source.mkdir()
        for topic in ("bio", "cyber", "chem"):
            (self.source / f"{topic}_questions.json").write_text(json.dumps(self.questions(5), indent=1))
        texts = [f"SECRET {i} " + "word " * 30 for i in range(4)] + ["SECRET short"]
        writer(self.source / forget, texts if bare else [{"title": "SECRET", "text": t} for t in texts])
        for name in ("bio-retain", "cyber-forget", "cyber-retain"):
            writer(self.source / f"{name}-corpus.jsonl", [f"{name} {i} " + "word " * 30 for i in range(6)])
        mmlu = writer(self.tmp / "mmlu.jsonl", self.questions(3, subject="virology"))
        return "--mmlu", mmlu, "--any_count"

    def test_wmdp_takes_the_gated_corpus_under_both_names_as_objects_or_bare_strings(self):
        seen = set()
        for name, bare in itertools.product(("bio_remove_dataset.jsonl", "bio-forget-corpus.jsonl"),
                                            (False, True)):
            out = self.prepare("wmdp", *self.wmdp(name, bare), "--max_chars", 60)
            self.assertIn("dropped 1 documents", out)
            self.assertNotIn("SECRET", out)
            seen.add((self.out / "forget.jsonl").read_text())
        self.assertEqual(len(seen), 1)
        forget = self.rows("forget")
        self.assertEqual((len(forget), {len(r["text"]) for r in forget}), (4, {60}))
        self.assertEqual([len(self.rows(f)) for f in ("retain", "mcq_forget", "mcq_retain", "mcq_cyber",
                                                      "mcq_chem")], [6, 5, 3, 5, 5])
        self.assertEqual(self.rows("mcq_forget")[2], self.questions(3, subject="biology")[2])
        self.assertEqual({r["subject"] for r in self.rows("mcq_cyber")}, {"cybersecurity"})
        self.prepare("wmdp", *self.wmdp(), "--topic", "cyber")
        self.assertTrue(self.rows("forget")[0]["text"].startswith("cyber-forget 0"))
        evaluate.load_questions(self.out)                                 # evaluate.py reads what was written
        evaluate.read_jsonl(self.out / "forget.jsonl", evaluate.text_row)

    def test_wmdp_errors_name_file_line_and_reason_and_never_a_document(self):
        flags = self.wmdp()
        gated, retain = self.source / "bio_remove_dataset.jsonl", self.source / "bio-retain-corpus.jsonl"
        good, kept = gated.read_text(), retain.read_text()
        for path, text, said in (
                (gated, good[:-30], "bio_remove_dataset.jsonl:5: not JSON"),
                (gated, good + '{"body": "SECRET"}\n',
                 'bio_remove_dataset.jsonl:6: needs an object with a "text"'),
                (gated, good + '{"text": ["SECRET"]}\n', "bio_remove_dataset.jsonl:6: needs"),
                (gated, good + "7\n", "bio_remove_dataset.jsonl:6: needs"),
                (gated, "", "no rows"),
                (retain, kept + "[1]\n", "bio-retain-corpus.jsonl:7: needs"),
                (self.source / "bio_questions.json", json.dumps(self.questions(5), indent=1)[:-40],
                 "bio_questions.json:"),
                (self.source / "chem_questions.json", json.dumps([{"question": "q", "choices": ["a"] * 3}]),
                 "chem_questions.json:1: \"choices\"")):
            before = path.read_text()
            path.write_text(text)
            error = self.prepare("wmdp", *flags, code=2)
            self.assertIn(said, error)
            self.assertNotIn("SECRET", error)
            path.write_text(before)
        gated.unlink()
        self.assertIn("bio_remove_dataset", self.prepare("wmdp", *flags, code=2))
        self.assertIn("1,273 are published", self.prepare("wmdp", *self.wmdp()[:2], code=2))
        self.assertIn("data/mmlu/prepare.py", self.prepare("wmdp", "--mmlu", self.tmp / "no", code=2))
        self.assertFalse(self.out.exists())

    def test_wmdp_from_the_hubs_parquet_and_from_one_that_is_cut_off(self):
        flags = self.wmdp()
        for topic in ("bio", "cyber", "chem"):
            (self.source / f"{topic}_questions.json").unlink()
            self.parquet(self.source / f"wmdp-{topic}" / "test-00000-of-00001.parquet", self.questions(5))
        (self.source / "bio-retain-corpus.jsonl").unlink()
        parts = [self.source / "bio-retain-corpus" / f"train-0000{i}-of-00002.parquet" for i in (0, 1)]
        for i, path in enumerate(parts):
            self.parquet(path, [{"text": f"document {i} {j} " + "word " * 30} for j in range(3)])
        self.prepare("wmdp", *flags)
        self.assertEqual([r["text"][:12] for r in self.rows("retain")],
                         [f"document {i} {j}" for i in (0, 1) for j in range(3)])
        self.assertEqual(self.rows("mcq_forget"), self.questions(5, subject="biology"))
        data = parts[1].read_bytes()
        for cut in (len(data) // 2, len(data) - 3, 4):
            parts[1].write_bytes(data[:cut])
            self.assertIn("train-00001-of-00002.parquet: not a whole parquet file",
                          self.prepare("wmdp", *flags, code=2))
        with mock.patch.dict(sys.modules, {"datasets": None}):
            self.assertIn("pip install datasets", self.prepare("wmdp", *flags, code=2))

    # -- MUSE

    def muse(self):
        """Fixtures as MUSE's own load_data.py writes them: arrays of objects, and of bare strings."""
        files = {f"raw/{k}": [f"{k} {i}: the cat sat\n on  the mat, one two." for i in range(9)]
                 for k in ("forget", "retain1")}
        files |= {f"privleak/{k}": [f"{k} {i}" for i in range(3)] for k in ("forget", "retain", "holdout")}
        files["verbmem/forget"] = [{"prompt": "the cat", "gt": "sat"}] * 2
        files |= {f"knowmem/{k}_qa{end}": [{"question": "who?", "answer": "a dog"}] * 2
                  for k in ("forget", "retain") for end in ("", "_icl")}
        for name, rows in files.items():
            path = self.source / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows))
        words().save_pretrained(self.tmp / "tokenizer")
        return "--corpus", "news", "--tokenizer", self.tmp / "tokenizer", "--max_len", 8

    def test_muse_blocks_are_the_joined_documents_in_pieces_of_max_len_tokens(self):
        flags, tok = self.muse(), words()
        self.assertIn("100 are published", self.prepare("muse", *flags, code=2))
        out = self.prepare("muse", *flags, "--any_count")
        documents = json.loads((self.source / "raw" / "forget.json").read_text())
        pieces = [r["text"] for r in self.rows("forget")]
        self.assertEqual("".join(pieces), "\n\n".join(documents))
        ids = tok("\n\n".join(documents)).input_ids[1:]
        self.assertEqual([tok(p).input_ids for p in pieces],
                         [[tok.bos_token_id] + ids[i:i + 7] for i in range(0, len(ids), 7)])
        self.assertIn(f"is {math.ceil(len(pieces) / 4)} steps of 4", out)
        self.assertEqual(json.loads((self.out / "meta.json").read_text())["auc_retrain"], 0.4772)
        self.assertEqual(len(self.rows("knowmem_retain_icl")), 2)
        self.assertEqual(self.rows("privleak_holdout")[2], {"text": "holdout 2"})
        first = {f.name: f.read_text() for f in self.out.iterdir()}
        for path in list(self.source.rglob("*.json")):                     # the same from the hub's parquet
            rows = [{"text": r} if isinstance(r, str) else r for r in json.loads(path.read_text())]
            self.parquet(path.with_name(f"{path.stem}-00000-of-00001.parquet"), rows)
            path.unlink()
        self.prepare("muse", *flags, "--any_count")
        self.assertEqual({f.name: f.read_text() for f in self.out.iterdir()}, first)

    def test_muse_errors(self):
        flags = self.muse()
        (self.source / "verbmem" / "forget.json").write_text('[{"prompt": "a"}]')
        self.assertIn("verbmem/forget.json:1: needs the keys prompt, gt",
                      self.prepare("muse", *flags, code=2))
        (self.source / "raw" / "forget.json").write_text('["a",\n "b')
        self.assertIn("raw/forget.json:2: not JSON", self.prepare("muse", *flags, code=2))
        self.assertIn("does not load", self.prepare("muse", *flags, "--tokenizer", self.tmp, code=2))
        self.assertFalse(self.out.exists())

    # -- TOFU

    def tofu(self):
        qa = [{"question": f"q{i}?", "answer": f"a{i}"} for i in range(4)]
        asked = [r | {"paraphrased_answer": "p", "perturbed_answer": ["x", "y"], "paraphrased_question": "-"}
                 for r in qa]
        for name, rows in (("forget01", qa[:1]), ("retain99", qa[1:]), ("forget01_perturbed", asked[:1]),
                           ("retain_perturbed", asked[1:]), ("holdout01", qa[2:]),
                           *((f"{n}_perturbed", [qa[0] | {"perturbed_answer": ["x"], "option1": "x"}])
                             for n in ("real_authors", "world_facts"))):
            writer(self.source / f"{name}.json", rows)
        return "--split", "forget01"

    def test_tofu_rows_prompts_and_errors(self):
        flags = self.tofu()
        self.assertIn("forget01.json: 1 rows, but 40 are published", self.prepare("tofu", *flags, code=2))
        self.prepare("tofu", *flags, "--any_count")
        self.assertEqual(self.rows("forget"), [{"prompt": "Question: q0?\nAnswer:", "completion": " a0"}])
        self.assertEqual(self.rows("privleak_forget"), self.rows("forget"))
        self.assertEqual(self.rows("qa_retain")[0],
                         {"question": "q1?", "answer": "a1", "paraphrased_answer": "p",
                          "perturbed_answer": ["x", "y"]})
        self.assertEqual(self.rows("qa_world_facts"),
                         [{"question": "q0?", "answer": "a0", "perturbed_answer": ["x"]}])
        (self.source / "holdout01.json").unlink()
        template = "[INST] {question} [/INST]{answer}"
        self.prepare("tofu", *flags, "--any_count", "--out", self.tmp / "other", "--template", template)
        self.assertFalse((self.tmp / "other" / "privleak_holdout.jsonl").exists())
        self.assertEqual(json.loads((self.tmp / "other" / "retain.jsonl").read_text().split("\n")[0]),
                         {"prompt": "[INST] q1? [/INST]", "completion": "a1"})
        self.assertEqual(evaluate.load_meta(self.tmp / "other"), {"qa_prompt": template})
        self.assertIn("{answer}", self.prepare("tofu", *flags, "--template", "{question}", code=2))
        (self.source / "retain99.json").write_text('{"question": "q", "answer": "a"}\n{"question": "q", "an')
        self.assertIn("retain99.json:2: not JSON", self.prepare("tofu", *flags, "--any_count", code=2))

    # -- all of them

    def test_without_from_the_files_on_the_hub_are_asked_for(self):
        self.tofu()
        for path in list(self.source.iterdir()):
            path.rename(path.with_name(path.name.replace("01", "10").replace("99", "90")))

        def download(repo, repo_type, allow_patterns):
            self.assertEqual((repo, repo_type), ("locuslab/TOFU", "dataset"))
            for path in self.source.iterdir():
                self.assertTrue(any(fnmatch.fnmatch(path.name, p) for p in allow_patterns), path)
            return str(self.source)
        with mock.patch("huggingface_hub.snapshot_download", download):
            self.prepare("tofu", "--any_count", source=False)
        with mock.patch("huggingface_hub.snapshot_download", side_effect=OSError("no network")):
            self.assertIn("--from FOLDER", self.prepare("tofu", source=False, code=2))
        self.assertIn("no such folder", self.prepare("tofu", "--from", self.tmp / "no", code=2))

    def test_every_command_in_the_readmes_is_one_that_the_scripts_take(self):
        """A shell runs each block of each data/*/readme.md with a `python` that prints its arguments."""
        fake = 'STEPS=9\npython() { printf "%s\\0" "$@"; printf "\\n"; }\npip() { :; }\n'
        seen, flags_of = Counter(), {}
        for readme in sorted((ROOT / "data").glob("*/readme.md")):
            for block in re.findall(r"```bash\n(.*?)```", readme.read_text(), re.S):
                out = subprocess.run(["bash", "-euc", fake + block], capture_output=True, text=True)
                self.assertEqual((out.returncode, out.stderr), (0, ""), readme)
                for line in out.stdout.splitlines():
                    script, *flags = line.rstrip("\0").split("\0")
                    seen[script] += 1
                    if script == "unlearn.py":
                        args = unlearn.parse_args(flags)
                        self.assertTrue(args.data.startswith(os.path.relpath(readme.parent, ROOT)), line)
                        if "wmdp" in line:
                            self.assertEqual(round(args.warmup * args.steps), 12)
                    elif script == "relearn.py":
                        with mock.patch.object(evaluate, "load_result", lambda run: {"args": {"data": "x"}}):
                            args = relearn.parse_args(flags)
                        self.assertEqual((args.lr, args.batch_size), ([1e-5], 4))
                    else:
                        if script not in flags_of:
                            flags_of[script] = run_here(script, "--help")[1]
                        for flag in flags:
                            self.assertTrue(not flag.startswith("--") or f"{flag} " in flags_of[script], line)
        self.assertEqual((seen["unlearn.py"], seen["relearn.py"]), (11, 10))
        for name in ("mmlu", "wmdp", "muse", "tofu"):
            self.assertTrue(seen[f"data/{name}/prepare.py"], name)


# ---- evaluate.py: attacks, sharpness, pictures ------------------------------------------------------------

class TestSpearman(unittest.TestCase):
    def test_critical_values_of_the_published_table(self):
        """Two-sided critical values of Spearman's rho (Zar 1972): the smallest |rho| with p <= alpha. All
        values that rho can take are 1 - 6 S / (n^3 - n) with S even."""
        table = {5: {.10: .900, .05: 1.000}, 6: {.10: .829, .05: .886, .02: .943, .01: 1.000},
                 7: {.10: .714, .05: .786, .02: .893, .01: .929},
                 8: {.10: .643, .05: .738, .02: .833, .01: .881}}
        rng = random.Random(0)
        for n, by_alpha in table.items():
            p_of = {}
            for _ in range(3000 if n < 8 else 600):
                y = rng.sample(range(n), n)
                s = sum((i - v) ** 2 for i, v in enumerate(y))
                rho = 1 - 6 * s / (n ** 3 - n)
                if s not in p_of and rho > 0.5:
                    got, p_of[s] = evaluate.spearman(range(n), y)
                    self.assertAlmostEqual(got, rho, places=12)
            for alpha, critical in by_alpha.items():
                for s, p in p_of.items():
                    rho = 1 - 6 * s / (n ** 3 - n)
                    self.assertEqual(p <= alpha + 1e-12, rho > critical - 0.0006, (n, alpha, rho, p))

    def test_ties_share_their_mean_rank_and_many_pairs_use_student(self):
        rho, p = evaluate.spearman([1, 2, 2, 3], [1.0, 5.0, 5.0, 9.0])
        self.assertAlmostEqual(rho, 1)
        self.assertAlmostEqual(p, 4 / 24)                          # 4 of the 24 orders give rho 1 or -1
        y = [2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11]
        rho, p = evaluate.spearman(range(12), y)
        self.assertAlmostEqual(rho, 1 - 6 * 12 / (12 ** 3 - 12))
        self.assertAlmostEqual(p, evaluate.student_p(rho * math.sqrt(10 / (1 - rho ** 2)), 10))
        self.assertLess(p, 1e-6)
        self.assertEqual(evaluate.spearman([1, 1, 1], [1, 2, 3]), (None, None))

    def test_flat_methods_that_resist_give_a_correlation_of_minus_one(self):
        rows = [{"sharpness (own) top": 10.0 - i, "UE 20": 0.3 + i / 10} for i in range(4)]
        groups = {i: {0: row} for i, row in enumerate(rows)}
        got = evaluate.flat_and_robust(groups, {i: {"mean": row} for i, row in enumerate(rows)})
        self.assertEqual([g[:4] for g in got], [("sharpness (own) top", "UE 20", over, 4)
                                                for over in ("methods", "runs")])
        for *_, rho, p in got:
            self.assertAlmostEqual(rho, -1)
            self.assertAlmostEqual(p, 2 / 24)


# ---- evaluate.py: the input-space attack ------------------------------------------------------------------

class TestPrefix(unittest.TestCase):
    rows = [dict(row, fact=i) for i, row in enumerate(TestEvaluate.rows)]
    prompt = TestEvaluate.prompt

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        for name, seed in (("victim", 0), ("teacher", 1)):
            little_llama(torch.float32, seed).save_pretrained(self.folder / name)
            words().save_pretrained(self.folder / name)
        (self.folder / "mcq_forget.jsonl").write_text("".join(
            json.dumps({k: r[k] for k in ("question", "choices", "answer")}) + "\n" for r in self.rows))
        (self.folder / "meta.json").write_text(json.dumps({"prompt": self.prompt}))
        self.done = {"args": {"data": str(self.folder), "model": str(self.folder / "teacher")}}

    def args(self, **more):
        return SimpleNamespace(**{
            "data": None, "device": "cpu", "teacher": None, "overwrite": False, "attack_method": "gcg+",
            "attack_weights": None, "attack_moves": None, "attack_buffer": None, "attack_calls": 300,
            "attack_questions": 2, "attack_length": [4, 7], "attack_candidates": 4, "attack_topk": 8,
            "attack_answer": 3, "attack_seed": 0, **more})

    def search(self, **more):
        metrics = evaluate.attack_prefix(self.folder / "victim", self.done, self.args(**more))
        name = f"attack_{more.get('attack_method', 'gcg+')}.json"
        return metrics, json.loads((self.folder / "victim" / name).read_text())

    def by_hand(self, victim, teacher, tok, prefix, rows, answer):
        """The five terms of one prefix (a list of token ids), by loops over questions and tokens."""
        layer, terms, tokens, labels = 2, np.zeros(5), 0, 0                  # 0.62 of 3 layers is 2, rounded
        for row in rows:
            clean = tok(self.prompt.format(question=row["question"])).input_ids
            said = list(clean)
            for _ in range(answer):
                token = teacher(torch.tensor([said])).logits[0, -1].argmax().item()
                if token == tok.eos_token_id:
                    break
                said.append(token)
            ids = torch.tensor([[clean[0]] + prefix + said[1:]])
            logits = victim(ids).logits[0].log_softmax(-1)
            state = [m(x, output_hidden_states=True).hidden_states[layer][0]
                     for m, x in ((victim, ids), (teacher, ids), (teacher, torch.tensor([said])))]
            for t in range(1, len(said)):
                a, b, c = state[0][len(prefix) + t], state[1][len(prefix) + t], state[2][t]
                terms[1] += (a - b).square().sum().sqrt().item()
                terms[2] += 1 - (a @ c / a.norm() / c.norm()).item()
                tokens += 1
            for t in range(len(clean), len(said)):
                terms[0] -= logits[len(prefix) + t - 1, said[t]].item()
                labels += 1
        terms[0], terms[1], terms[2] = terms[0] / labels, terms[1] / tokens, terms[2] / tokens
        terms[3] = -np.mean([logits[t, token].item() for t, token in enumerate(prefix)])
        terms[4] = sum(max(n - 1, 0) ** 1.5 for n in Counter(prefix).values()) / len(prefix)
        return terms

    def test_loss_terms_match_loops_over_questions_and_tokens(self):
        victim, teacher, tok = little_llama(), little_llama(seed=1), words()
        task = evaluate.prefix_task(teacher, tok, self.rows, self.prompt, 3)
        prefixes = [[5, 9, 5, 5, 9], [7, 8, 11, 6, 10]]
        onehot = F.one_hot(torch.tensor(prefixes), len(tok)).double()
        got = evaluate.prefix_terms(victim, teacher, onehot, task)
        for prefix, terms in zip(prefixes, got):
            want = self.by_hand(victim, teacher, tok, prefix, self.rows, 3)
            np.testing.assert_allclose(terms.detach().numpy(), want, rtol=1e-5)
        self.assertAlmostEqual(got[0, 4].item(), (2 ** 1.5 + 1) / 5)
        self.assertEqual(evaluate.prefix_terms(victim, None, onehot, task)[0, 1], 0)
        clean = evaluate.prefix_terms(teacher, teacher, onehot[:, :0], task)
        self.assertTrue((clean[:, 1:3].abs() < 1e-6).all())

    def test_each_mutation_is_one_change_and_takes_the_tokens_it_should(self):
        ids, rng = [3, 4, 5, 6], random.Random(0)
        scores = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
        top = [set(row.topk(3).indices.tolist()) for row in scores]
        for move, width in (("swap", 4), ("delete", 3), ("insert", 5), ("sample", 4)):
            for new in evaluate.mutate(ids, move, scores, 200, 3, rng):
                self.assertEqual(len(new), width)
                if move == "delete":
                    self.assertIn(new, [ids[:i] + ids[i + 1:] for i in range(4)])
                elif move == "insert":
                    places = [i for i in range(5) if new[:i] + new[i + 1:] == ids]
                    self.assertTrue(any(new[i] in top[i] for i in places), new)
                else:
                    changed = [i for i in range(4) if new[i] != ids[i]]
                    self.assertTrue(len(changed) <= 1 and all(new[i] in top[i] for i in changed), new)
        row = scores[:1].topk(3)
        swap, sample = (Counter(new[0] for new in evaluate.mutate([99], move, scores[:1], 4000, 3, rng))
                        for move in ("swap", "sample"))
        for token, p in zip(row.indices[0].tolist(), row.values[0].softmax(-1).tolist()):
            self.assertAlmostEqual(sample[token] / 4000, p, delta=0.03)     # four standard errors
            self.assertAlmostEqual(swap[token] / 4000, 1 / 3, delta=0.03)

    def test_the_result_is_what_the_text_of_the_prefix_gives(self):
        metrics, saved = self.search()
        victim, tok = evaluate.load_model(self.folder / "victim")
        teacher = evaluate.load_model(self.folder / "teacher")[0]
        loss, terms, ids = saved["state"]["best"][0]
        self.assertEqual(tok(metrics["prefix"]).input_ids[1:], ids)
        self.assertFalse(set(ids) & set(tok.all_special_ids))
        picks = random.Random(0).sample(range(4), 2)
        want = self.by_hand(victim, teacher, tok, ids, [self.rows[i] for i in sorted(picks)], 3)
        np.testing.assert_allclose(terms, want, rtol=1e-3, atol=1e-4)
        self.assertAlmostEqual(loss, want @ [1, 1, 10, 1.5, 3], places=2)
        self.assertEqual(metrics["length"], [4, 7])
        self.assertGreaterEqual(len(ids), 6)          # the minimum has grown: 3 steps in 300 calls
        wrong = []
        for row in self.rows:                                           # UE from full strings, one by one
            start = metrics["prefix"] + " " + self.prompt.format(question=row["question"])
            scores = []
            for choice in row["choices"]:
                full, known = tok(f"{start} {choice}").input_ids, len(tok(start).input_ids)
                logits = victim(torch.tensor([full])).logits[0].log_softmax(-1)
                scores.append(sum(logits[t - 1, full[t]].item() for t in range(known, len(full))))
            wrong.append(int(np.argmax(scores)) != row["answer"])
        self.assertAlmostEqual(metrics["UE"], np.mean(wrong))
        held = [w for i, w in enumerate(wrong) if i not in picks]
        self.assertAlmostEqual(metrics["UE_heldout"], np.mean(held))

    def test_an_interrupted_search_goes_on_and_ends_as_if_it_never_was(self):
        whole = self.search()[1]
        (self.folder / "victim" / "attack_gcg+.json").unlink()
        write, count = evaluate.write_json, itertools.count()

        def fails_later(path, value):
            if next(count) == 9:
                raise KeyboardInterrupt
            write(path, value)
        with mock.patch.object(evaluate, "write_json", fails_later), self.assertRaises(KeyboardInterrupt):
            self.search()
        half = json.loads((self.folder / "victim" / "attack_gcg+.json").read_text())["state"]
        self.assertTrue(100 < half["calls"] < 300)
        resumed = self.search()[1]
        self.assertEqual((resumed["state"], resumed["metrics"]), (whole["state"], whole["metrics"]))
        with self.assertRaisesRegex(evaluate.InputError, "--overwrite"):
            self.search(attack_seed=1)
        self.assertNotEqual(self.search(attack_seed=1, overwrite=True)[1]["state"], whole["state"])

    def test_model_calls_are_counted_and_the_budget_ends_the_search(self):
        for method, weights in (("gcg+", None), ("gcg", None), ("random", None)):
            calls = []                                               # passes over prefix and all questions

            def counted(model, onehot, task, run=evaluate.run_prefix):
                calls.append(len(onehot) * (3 if onehot.requires_grad else 1) * bool(onehot.shape[1]))
                return run(model, onehot, task)
            with mock.patch.object(evaluate, "run_prefix", counted):
                state = self.search(attack_method=method, attack_length=[4, 4])[1]["state"]
            drawn = state["calls"] - sum(calls)                      # one call each for sample's logits
            self.assertTrue(0 <= drawn <= 0.5 * state["iteration"] * (method == "gcg+"), (method, drawn))
            self.assertTrue(300 <= state["calls"] < 300 + 6 + 2 * 4, method)
            self.assertGreaterEqual(len(state["curve"]), 5)
            losses = [p["loss"] for p in state["curve"]]
            self.assertEqual(losses, sorted(losses, reverse=True), method)

    def test_the_gradient_finds_lower_losses_than_random_prefixes(self):
        """With the sign of the gradient wrong it would not."""
        gcg, chance = (self.search(attack_method=m, attack_calls=400, attack_length=[6, 6])[0]["loss"]
                       for m in ("gcg", "random"))
        self.assertLess(gcg, chance - 0.3)

    def test_the_length_is_cut_to_the_room_that_the_context_leaves(self):
        self.assertEqual(self.search(attack_length=[5, 100], attack_calls=30)[0]["length"][0], 5)
        longest = max(len(words()(self.prompt.format(question=r["question"])).input_ids) for r in self.rows)
        metrics = self.search(attack_length=[50, 100], attack_calls=30, overwrite=True)[0]
        self.assertEqual(metrics["length"], [50, 64 - longest - 3] if 64 - longest - 3 > 50 else
                         [64 - longest - 3] * 2)


# ---- evaluate.py: sharpness and pictures ------------------------------------------------------------------

class TestSharpness(unittest.TestCase):
    def dense(self, net):
        g = torch.cat([x.reshape(-1) for x in net.gradient(graph=True)])
        keep = {"retain_graph": True, "materialize_grads": True}
        return torch.stack([flat(torch.autograd.grad(x, net.params, **keep)) for x in g])

    def test_products_eigenvalue_and_trace_are_those_of_the_dense_hessian(self):
        for seed, sign in itertools.product(range(3), (1, -1)):  # with -1 the negative end is the larger one
            net = Network(seed)
            h = sign * self.dense(net)
            n, rng = len(h), torch.Generator().manual_seed(0)
            gradient, product = evaluate.hessian(sign * net.loss(net.params), net.params)
            torch.testing.assert_close(gradient, sign * flat(net.gradient()))
            v = torch.randn(n, generator=rng, dtype=torch.float64)
            torch.testing.assert_close(product(v), h @ v)
            top, residual = evaluate.top_eigenvalue(product, v, 5000, tol=1e-7)
            self.assertAlmostEqual(top, torch.linalg.eigvalsh(h)[-1].item(), places=6)
            self.assertLess(residual, 1e-5)
            signs = [torch.randn(n, generator=rng, dtype=torch.float64).sign() for _ in range(500)]
            mean, error = evaluate.mean_se([(z @ product(z)).item() for z in signs])
            self.assertLess(abs(mean - h.trace().item()), 4 * error)

    def model(self):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=12, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4,
            max_position_embeddings=16, initializer_range=0.5, tie_word_embeddings=False)).double().eval()

    def test_of_a_whole_model_against_its_dense_hessian(self):
        model, texts = self.model(), ([1, 5, 6, 7, 3], [2, 9])
        batch = evaluate.collate([(ids, ids) for ids in texts], 0)
        names, params = zip(*model.named_parameters())
        sizes = [p.numel() for p in params]

        def at(w):
            values = {n: x.view_as(p) for n, x, p in zip(names, w.split(sizes), params)}
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                logits = torch.func.functional_call(model, values, (batch["input_ids"],)).logits[:, :-1]
            return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
        w = flat(params)
        h, g = torch.autograd.functional.hessian(at, w), torch.autograd.functional.jacobian(at, w)
        loss = lambda: -evaluate.token_logps(model, batch)[0].sum() / 5
        got = evaluate.sharpness(model, loss, 0.05, 3000, 64)
        self.assertAlmostEqual(got["loss"], at(w).item(), places=6)
        self.assertAlmostEqual(got["gradient"], g.norm().item(), places=5)
        self.assertAlmostEqual(got["top"], torch.linalg.eigvalsh(h)[-1].item(), delta=0.005 * got["top"])
        self.assertLess(abs(got["trace"] - h.trace().item()), 4 * got["trace_se"])
        self.assertAlmostEqual(got["rise"], (at(w + 0.05 * g / g.norm()) - at(w)).item(), places=6)
        self.assertTrue(torch.equal(w, flat(params)))
        self.assertTrue(all(p.grad is None for p in params))

    def test_the_forget_objective_is_the_one_that_unlearning_descends(self):
        with tempfile.TemporaryDirectory() as folder:
            little_llama(torch.float32, 1).save_pretrained(f"{folder}/teacher")
            words().save_pretrained(f"{folder}/teacher")
            (Path(folder) / "forget.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
            model, tok = little_llama(torch.float32), words()
            samples = evaluate.encode_rows(tok, [{"text": t, "where": ""} for t in TEXTS[::2]], 64)
            for loss in ("npo", "simnpo", "ga"):
                ran = unlearn.parse_args(["--loss", loss, "--out", "/nowhere", "--data", folder, "--model",
                                          f"{folder}/teacher", "--reduce", "sum", "--micro_batch", "2"])
                args = SimpleNamespace(sharpness="own", sharpness_rows=3, data=None, device="cpu",
                                       teacher=None)
                got = evaluate.forget_objective(model, tok, "run", {"args": vars(ran)}, args)()
                ref = unlearn.reference_logps(little_llama(torch.float32, 1), samples, ran, 0)
                micro = unlearn.micro_batches(samples, [0, 1, 2], 2, 0, "cpu", ref)
                want = unlearn.forget_backward(model, micro, None, ran)
                self.assertAlmostEqual(got.item(), want.item(), delta=1e-5 * abs(want.item()))
            args.sharpness = "nll"
            seen = []
            with mock.patch.object(evaluate, "encode_rows", lambda tok, rows, *more: (
                    seen.append({r["where"] for r in rows}), samples)[1]):
                for first in (0, 1):
                    for args.sharpness_rows in (2, 64):
                        evaluate.forget_objective(model, tok, "run", {"args": {"data": folder}}, args, first)
            self.assertTrue(seen[0] and seen[2] and not seen[0] & seen[2])     # two batches, no common row
            self.assertTrue(seen[1] and seen[3] and not seen[1] & seen[3])
            args.sharpness_rows = 3
            got = evaluate.forget_objective(model, tok, "run", {"args": {"data": folder}}, args)()
            nll = [-evaluate.token_logps(model, evaluate.collate([s], 0))[0].sum().item() for s in samples]
            self.assertAlmostEqual(got.item(), sum(nll) / sum(len(s[0]) - 1 for s in samples), places=5)
            args.sharpness = "own"
            with self.assertRaisesRegex(evaluate.InputError, "nll"):
                evaluate.forget_objective(model, tok, "run", {"args": {"data": folder, "loss": "rmu"}}, args)


class TestPictures(unittest.TestCase):
    def test_landscape_moves_along_filter_normalised_directions_and_comes_back(self):
        model = little_llama(torch.float32)
        params = list(model.parameters())
        batch = evaluate.collate([([1, 5, 6, 7], [1, 5, 6, 7])], 0)
        loss = lambda: -evaluate.token_logps(model, batch)[0].sum()
        before, centre = flat(params).clone(), loss().item()
        directions = evaluate.filter_directions(params, 3)
        for d in directions:
            for p, x in zip(params, d):
                if p.dim() == 1:
                    self.assertFalse(x.any())
                for row, filter in zip(x, p) if p.dim() > 1 else ():
                    self.assertAlmostEqual(row.norm().item(), filter.norm().item(), places=5)
        self.assertFalse(torch.equal(flat(directions[0]), flat(directions[1])))
        grid = evaluate.landscape(model, loss, 3, seed=3, reach=0.1)
        self.assertTrue(torch.equal(before, flat(params)))
        self.assertAlmostEqual(grid[1, 1], centre, places=6)
        with torch.no_grad():
            for p, x, y in zip(params, *directions):
                p.add_(-0.1 * x + 0.1 * y)                                  # a = -0.1, b = 0.1
        self.assertAlmostEqual(grid[0, 2], loss().item(), places=4)

    def test_relearn_curves_average_runs_or_the_seeds_of_one(self):
        with tempfile.TemporaryDirectory() as folder:
            for run, ends in (("a", (0.2, 0.4)), ("b", (0.5, 0.7))):
                (Path(folder) / run).mkdir()
                curves = [[{"step": 0, "UE": 0.8}, {"step": 3, "UE": end}] for end in ends]
                budget = {"samples": 10, "epochs": 1, "curves": curves}
                evaluate.write_json(f"{folder}/{run}/relearn.json", {
                    "args": {"batch_size": 4}, "metrics": {"budgets": [budget, {"samples": 99}]}})
            seen, mean, error = evaluate.relearn_curve([f"{folder}/a"])
            self.assertEqual(seen, [0, 10])                                 # the third batch is half full
            np.testing.assert_allclose(mean + error, [0.8, 0.3, 0, 0.1])
            _, mean, error = evaluate.relearn_curve([f"{folder}/a", f"{folder}/b"])
            np.testing.assert_allclose(mean + error, [0.8, 0.45, 0, 0.15])

    @unittest.skipUnless(importlib.util.find_spec("matplotlib"), "matplotlib is not installed")
    def test_every_picture_is_written_and_shows_something(self):
        from matplotlib.image import imread
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "forget.jsonl").write_text('{"text": "a dog ran"}\n')
            methods, runs = {}, {}
            for i, name in enumerate(("npo", "npo+sam")):
                run = f"{folder}/{name}"
                little_llama(torch.float32, i).save_pretrained(run)
                words().save_pretrained(run)
                evaluate.write_json(f"{run}/result.json", {"args": {"data": folder}})
                curve = [{"step": 0, "UE": 0.7}, {"step": 5, "UE": 0.3 + 0.3 * i}]
                evaluate.write_json(f"{run}/relearn.json", {"args": {"batch_size": 4}, "metrics": {
                    "budgets": [{"samples": 20, "epochs": 1, "curves": [curve, curve]}]}})
                mean = {"UE": 0.7, "UT": 0.9 + 0.05 * i, "UE 20": 0.3 + 0.3 * i}
                error = {"UE": 0.01, "UT": None, "UE 20": 0.1}
                methods[name] = {"rows": {0: mean}, "mean": mean, "se": error}
                runs[name] = [run]
            args = SimpleNamespace(device="cpu", data=None, sharpness="nll", sharpness_rows=4, plot_points=3)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                evaluate.pictures(f"{folder}/new/pictures", methods, runs, args)
            for name in ("ue_bars", "relearn_curves", "landscape", "ue_ut"):
                image = imread(f"{folder}/new/pictures/{name}.png")[..., :3]
                self.assertGreater(min(image.shape[:2]), 300, name)
                self.assertGreater((image != 1).any(-1).mean(), 0.02, name)           # not an empty page
                self.assertIn(f"{name}.png", out.getvalue())
            self.assertEqual(len(list(Path(f"{folder}/new/pictures").iterdir())), 4)

    def test_without_matplotlib_the_error_says_what_to_install(self):
        with mock.patch.dict(sys.modules, {"matplotlib": None}):
            with self.assertRaisesRegex(evaluate.InputError, "pip install matplotlib"):
                evaluate.pictures("nowhere", {}, {}, None)
        self.assertFalse(Path("nowhere").exists())


# ---- relearn.py -------------------------------------------------------------------------------------------

def relearn_args(**more):
    return SimpleNamespace(**{
        "max_len": 0, "samples": [4], "seed": 0, "draws": 1, "lr": [1e-2], "epochs": [1], "batch_size": 2,
        "lora": 0, "optimizer": "adamw", "geometry": False, "curve_every": 0, "ut_drop": 0.05, "quantize": [],
        "prune": [], "group": 64, **more})


class TestRelearn(unittest.TestCase):
    def test_samples_are_nested_distinct_in_fact_and_follow_the_seed(self):
        rows = [{"text": str(i), "fact": i // 12} for i in range(128 * 12)]
        lists = {n: relearn.draw_samples(rows, n, "5 0") for n in (20, 40, 60, 128, 256)}
        for n, picks in lists.items():
            self.assertEqual(len({rows[i]["fact"] for i in picks}), min(n, 128))
            self.assertEqual(picks, lists[256][:n])
        self.assertEqual(set(Counter(rows[i]["fact"] for i in lists[256]).values()), {2})   # each fact twice
        self.assertEqual(len(set(lists[256])), 256)                                       # in different rows
        self.assertNotEqual(lists[60], relearn.draw_samples(rows, 60, "5 1"))
        self.assertRaisesRegex(evaluate.InputError, "are 1536", relearn.draw_samples, rows, 1537, "0")
        self.assertEqual(len(set(relearn.draw_samples([{"text": "a"}] * 9, 9, "0"))), 9)   # no facts: rows

    def test_relearning_equals_a_plain_loop(self):
        for kind in ("adamw", "sgd"):
            self.relearn_as_a_plain_loop(kind)

    def relearn_as_a_plain_loop(self, kind):
        model, other, tok = little_llama(), little_llama(), words()
        samples = evaluate.encode_rows(tok, [{"text": t, "where": ""} for t in TEXTS], 64)
        relearn.relearn(model, samples, 0, 1e-2, 2, 2, "x", kind=kind)
        opt, rng = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0), random.Random("x")
        if kind == "sgd":
            opt = torch.optim.SGD(other.parameters(), lr=1e-2, momentum=0.9)
        decay = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=6)
        for _ in range(2):
            order = rng.sample(range(5), 5)
            for part in (order[:2], order[2:4], order[4:]):
                nll = torch.cat([F.cross_entropy(other(torch.tensor([samples[j][0]])).logits[0, :-1],
                                                 torch.tensor(samples[j][0][1:]), reduction="none")
                                 for j in part])
                opt.zero_grad()
                nll.mean().backward()
                opt.step(), decay.step()
        torch.testing.assert_close(flat(model.parameters()), flat(other.parameters()), rtol=1e-6, atol=1e-8)
        start = flat(little_llama().parameters())
        self.assertGreater((flat(model.parameters()) - start).norm(), 1e-3)

    def test_attack_restores_the_weights_and_every_budget_starts_from_them(self):
        model, tok = little_llama(torch.float32), words()
        rows = [{"text": t, "where": "", "fact": i} for i, t in enumerate(TEXTS)]
        questions = {"mcq_forget": [dict(r, fact=i) for i, r in enumerate(TestEvaluate.rows)],
                     "prompt": "{question}"}
        before = flat(model.parameters()).clone()
        args = relearn_args(samples=[4, 2], draws=2, lr=[1e-2], batch_size=2)
        metrics = relearn.attack(model, tok, rows, questions, args)
        self.assertTrue(torch.equal(before, flat(model.parameters())))
        self.assertEqual([b["samples"] for b in metrics["budgets"]], [2, 4])
        args.samples = [4]
        alone = relearn.attack(model, tok, rows, questions, args)["budgets"][0]
        self.assertEqual(alone, metrics["budgets"][1])
        self.assertAlmostEqual(alone["UE"], np.mean([d["UE"] for d in alone["draws"]]))
        self.assertIsNone(alone["UT"])

    def test_geometry_measures_the_displacement_against_directions_and_leaves_the_weights_there(self):
        net, other, attacker = Network(), Network(3), Network(7)
        on = lambda net: (lambda: net.loss(params))
        params = net.params
        got = relearn.aims(on(net), on(other), on(attacker), params, 0.2)
        g, n = net.gradient(), attacker.gradient(params)
        before = other.gradient([(p + 0.2 * d.sign()).detach().requires_grad_() for p, d in zip(params, g)])
        for name, want in (("gradient", g), ("momentum", before), ("lookahead", [-d for d in n])):
            torch.testing.assert_close(flat(got[name]), flat(want), rtol=1e-10, atol=1e-12)
        start = [(p, p.detach().clone()) for p in params]
        with torch.no_grad():
            for p, d in zip(params, n):
                p.sub_(0.5 * d)                                           # an attack of one step of SGD
        end = flat(params).clone()
        moved = relearn.geometry(start, got, {"nll": on(attacker)}, points=3)
        self.assertTrue(torch.equal(flat(params), end))
        self.assertAlmostEqual(moved["l2"], 0.5 * flat(n).norm().item(), places=5)
        self.assertAlmostEqual(moved["mean"], 0.5 * flat(n).abs().mean().item(), places=5)
        self.assertAlmostEqual(moved["max"], 0.5 * flat(n).abs().max().item(), places=5)
        sign = flat(before).sign()
        self.assertAlmostEqual(moved["cosine"]["sign of momentum"],
                               -(flat(n) @ sign / flat(n).norm() / sign.norm()).item(), places=5)
        self.assertAlmostEqual(moved["cosine"]["lookahead"], 1, places=5)
        cosine = -(flat(g) @ flat(n) / flat(g).norm() / flat(n).norm()).item()
        self.assertAlmostEqual(moved["cosine"]["gradient"], cosine, places=5)
        for point in moved["path"]:
            at = [w - point["part"] * 0.5 * d for (_, w), d in zip(start, n)]
            self.assertAlmostEqual(point["nll"], attacker.loss(at).item(), places=9)
        self.assertEqual([point["part"] for point in moved["path"]], [0, 0.5, 1])

    def test_a_diverging_attack_is_an_error_and_restores(self):
        model, tok = little_llama(torch.float32), words()
        before = flat(model.parameters()).clone()
        args = relearn_args(samples=[4], lr=[1e30], epochs=[3], batch_size=1)
        with self.assertRaisesRegex(evaluate.InputError, "lower it"):
            relearn.attack(model, tok, [{"text": t, "where": ""} for t in TEXTS], {"prompt": None}, args)
        self.assertTrue(torch.equal(before, flat(model.parameters())))


class TestAttackVariants(unittest.TestCase):
    rows = [{"text": t, "where": "", "fact": i} for i, t in enumerate(TEXTS)]
    questions = {name: [dict(r, fact=i) for i, r in enumerate(TestEvaluate.rows)]
                 for name in ("mcq_forget", "mcq_retain")} | {"prompt": "{question}"}

    def test_curve_is_the_ue_on_the_way_and_changes_nothing_else(self):
        model, tok = little_llama(torch.float32), words()
        args = relearn_args(samples=[5], draws=3, epochs=[2], lr=[0.1])
        plain = relearn.attack(model, tok, self.rows, self.questions, args)["budgets"][0]
        args.curve_every = 2
        curved = relearn.attack(model, tok, self.rows, self.questions, args)["budgets"][0]
        curves = curved.pop("curves")
        self.assertEqual(plain, curved)
        self.assertEqual([[p["step"] for p in c] for c in curves], [[0, 2, 4, 6]] * 3)
        self.assertEqual([c[-1]["UE"] for c in curves], [d["UE"] for d in curved["draws"]])
        encoded = evaluate.encode_rows(tok, self.rows, 64)
        for draw, curve in enumerate(curves):                        # the same steps again, seen from outside
            copy, seen = little_llama(torch.float32), []
            watch = lambda step, steps: seen.append(evaluate.ue_ut(copy, tok, self.questions)["UE"])
            picks = relearn.draw_samples(self.rows, 5, f"0 {draw}")
            relearn.relearn(copy, [encoded[i] for i in picks], 0, 0.1, 2, 2, f"0 {draw} order", watch)
            self.assertEqual([p["UE"] for p in curve[1:]], seen[1::2])
        self.assertGreater(len({p["UE"] for c in curves for p in c}), 1)
        v = [d["UE"] for d in curved["draws"]]
        self.assertAlmostEqual(curved["se"]["UE"], np.std(v, ddof=1) / math.sqrt(3))

    def test_adapters_train_as_explicit_low_rank_matrices_and_leave_no_trace(self):
        model, tok = little_llama(), words()
        samples = evaluate.encode_rows(tok, self.rows[:4], 64)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        weights = {n: p.detach() for n, p in model.named_parameters()}
        with relearn.lora(model, 2, "x"):
            ab = {}
            for name, m in model.named_modules():
                if hasattr(m, "lora_a"):
                    ab[f"{name}.weight"] = [m.lora_a.detach().clone().requires_grad_(),
                                            m.lora_b.detach().clone().requires_grad_()]
            start = model(torch.tensor([samples[0][0]])).logits.detach()
            relearn.relearn(model, samples, 0, 1e-2, 2, 2, "order")
            got = model(torch.tensor([samples[0][0]])).logits.detach()
        self.assertEqual(len(ab), 3 * 7)                              # every linear layer but lm_head
        torch.testing.assert_close(start, model(torch.tensor([samples[0][0]])).logits, rtol=0, atol=0)

        def logits(ids):                                              # W + 2 B A written out
            full = weights | {n: weights[n] + 2 * b @ a for n, (a, b) in ab.items()}
            return torch.func.functional_call(model, full, (torch.tensor([ids]),)).logits[0]
        opt = torch.optim.AdamW([x for pair in ab.values() for x in pair], lr=1e-2, weight_decay=0)
        decay, rng = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=4), random.Random("order")
        for _ in range(2):
            order = rng.sample(range(4), 4)
            for part in (order[:2], order[2:]):
                nll = torch.cat([F.cross_entropy(logits(samples[j][0])[:-1], torch.tensor(samples[j][0][1:]),
                                                 reduction="none") for j in part])
                opt.zero_grad()
                nll.mean().backward()
                opt.step(), decay.step()
        torch.testing.assert_close(got[0], logits(samples[0][0]).detach(), rtol=1e-4, atol=1e-4)
        self.assertGreater((got - start).abs().max(), 0.1)
        after = model.state_dict()
        self.assertEqual(list(before), list(after))
        self.assertTrue(all(torch.equal(before[k], after[k]) for k in before))
        self.assertTrue(all(p.requires_grad for p in model.parameters()))
        self.assertFalse(any(m._forward_hooks for m in model.modules()))
        with self.assertRaises(KeyboardInterrupt), relearn.lora(model, 2, "x"):
            raise KeyboardInterrupt
        self.assertEqual(list(before), list(model.state_dict()))

    def test_rounding_matches_a_loop_over_groups(self):
        for bits, group, dtype in ((8, 64, torch.float32), (4, 5, torch.float32), (4, 64, torch.bfloat16)):
            w = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
            w[1, 5:10] = 0
            got, q = w.clone(), 2 ** (bits - 1) - 1
            relearn.quantize_(got, bits, group)
            for r in range(3):
                for start in range(0, 12, group):
                    part = w[r, start:start + group].tolist()
                    scale = max(map(abs, part)) / q
                    want = [round(x / scale) * scale if scale else 0.0 for x in part]
                    torch.testing.assert_close(got[r, start:start + group], torch.tensor(want, dtype=dtype))
                    self.assertLessEqual(len(set(got[r, start:start + group].tolist())), 2 * q + 1)
            error = (got - w).abs().max().item()
            self.assertTrue(0 < error <= w.abs().max().item() / q / 2 * 1.02, (bits, error))

    def test_pruning_zeroes_exactly_the_smallest_weights(self):
        w = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
        for percent in (0, 10, 33.3, 50, 100):
            got = w.clone()
            relearn.prune_(got, percent)
            order = sorted(range(63), key=lambda i: abs(w.view(-1)[i].item()))
            want = w.clone()
            for i in order[:math.floor(percent / 100 * 63)]:
                want.view(-1)[i] = 0
            self.assertTrue(torch.equal(got, want))
        ties = torch.ones(10)[None]
        relearn.prune_(ties, 30)
        self.assertEqual((ties == 0).sum(), 3)

    def test_compression_scores_each_setting_alone_and_restores(self):
        model, tok = little_llama(torch.float32), words()
        before = flat(model.parameters()).clone()
        metrics = relearn.compress(model, tok, self.questions, relearn_args(quantize=[8, 2], prune=[90]))
        self.assertTrue(torch.equal(before, flat(model.parameters())))
        self.assertEqual([evaluate.budget_name(b) for b in metrics["budgets"]], ["8bit", "2bit", "prune90"])
        copy = little_llama(torch.float32)
        for name, m in copy.named_modules():
            if isinstance(m, torch.nn.Linear) and name != "lm_head":
                relearn.prune_(m.weight, 90)
        want = evaluate.ue_ut(copy, tok, self.questions)
        self.assertEqual({k: metrics["budgets"][2][k] for k in ("UE", "UT")}, want)

    def test_worst_case_is_the_lowest_ue_whose_ut_holds(self):
        budget = lambda lr, ue, ut, n=20: {"samples": n, "epochs": 1, "lr": lr, "UE": ue, "UT": ut}
        metrics = {"start": {"UE": 0.75, "UT": 0.9}, "budgets": [
            budget(1, 0.6, 0.9), budget(2, 0.4, 0.86), budget(3, 0.2, 0.84), budget(1, 0.1, 0.1, 40)]}
        self.assertEqual([(b["samples"], b["lr"], b["UE"]) for b in relearn.worst_case(metrics, 0.05)],
                         [(20, 2, 0.4)])
        self.assertEqual([b["lr"] for b in relearn.worst_case(metrics, 1)], [3, 1])

    def test_columns_name_every_attack(self):
        with tempfile.TemporaryDirectory() as folder:
            for attack, budgets in (("", [{"samples": 20, "epochs": 3, "lr": 1}]), ("lora8", [
                    {"samples": 20, "epochs": 1, "lr": 1}, {"samples": 20, "epochs": 1, "lr": 2}]),
                    ("compress", [{"samples": 0, "epochs": 0, "quantize": 4}])):
                budgets = [b | {"UE": 0.5, "UE_heldout": None, "UT": 0.9} for b in budgets]
                evaluate.write_json(f"{folder}/relearn{'_' * bool(attack)}{attack}.json",
                                    {"args": {"attack": attack}, "metrics": {"budgets": budgets}})
            row = evaluate.columns(folder, {"UE": 0.7, "UT": 1.0, "attack": {
                "gcg": {"UE": 0.6, "UE_heldout": 0.61, "UE_teacher": 0.1}}})
        self.assertEqual([k for k in row if k.startswith("UE ")],
                         ["UE 20x3", "UE compress 4bit", "UE lora8 20", "UE lora8 20@2", "UE prefix gcg"])
        self.assertEqual(row["teacher's UE prefix gcg"], 0.1)


# ---- real models at real size -----------------------------------------------------------------------------

def write_world(folder, model, tokenizer=None):
    """A data folder with a model in it: rows and questions over words(). Returns the flags to run on it."""
    folder = Path(folder)
    model.save_pretrained(folder / "model")                       # makes the folder, too
    (tokenizer or words()).save_pretrained(folder / "model")
    rows = [{"prompt": t, "completion": f" the cat {t}", "fact": i} for i, t in enumerate(TEXTS)]
    questions = [{k: r[k] for k in ("question", "choices", "answer", "subject")} for r in TestEvaluate.rows]
    for part in ("forget", "retain"):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (folder / f"mcq_{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in questions))
    (folder / "meta.json").write_text(json.dumps({"prompt": TestEvaluate.prompt}))
    return ["--model", folder / "model", "--data", folder, "--steps", 5, "--batch_size", 3, "--warmup", 0,
            "--no-relearn"]


class TestScale(unittest.TestCase):
    def setUp(self):
        self.tmp = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.tmp)

    def unlearn(self, *flags, said=None):
        """Run unlearn.py inside this process; said: part of the error that it must end with."""
        status, out, err = run_here("unlearn.py", *flags)
        self.assertEqual(status, 2 if said else 0, err)
        self.assertIn(said or "", err)
        return out, err

    def weights(self, name):
        return evaluate.load_model(self.tmp / name)[0].state_dict()

    def result(self, name, file="result"):
        return json.loads((self.tmp / name / f"{file}.json").read_text())

    def test_chunks_give_the_loss_and_the_gradient_of_all_logits_at_once(self):
        model, frozen, tok = little_llama(), little_llama(seed=1), words()
        samples = evaluate.encode(tok, [("", TEXTS[3], ""), ("Question: who sat? Answer:", " the cat", ""),
                                        ("", TEXTS[1], "")], 64)
        batch = evaluate.collate(samples, 0)
        weights = torch.arange(1, 10)
        for name, f in (("logps", lambda: (evaluate.token_logps(model, batch)[0] * weights).sum()),
                        ("kl", lambda: unlearn.kl_sum(model, frozen, batch))):
            results = []
            for chunk in (2**24, 4 * len(tok), 1):              # all at once; four rows at a time; row by row
                model.zero_grad()
                with mock.patch.object(evaluate, "CHUNK", chunk):
                    loss = f()
                loss.backward()
                results.append(torch.cat([loss[None], flat(p.grad for p in model.parameters())]))
            for got in results[1:]:
                torch.testing.assert_close(got, results[0], rtol=1e-9, atol=1e-11, msg=name)
            self.assertGreater(results[0].norm(), 1)

    def test_no_more_than_one_chunk_of_logits_exists_at_a_time(self):
        model, seen = little_llama(), []
        batch = evaluate.collate([([1] * 21, [-100] + [1] * 20)] * 2, 0)                 # 40 labels
        linear = F.linear
        with mock.patch.object(F, "linear", lambda x, w, b=None: (
                seen.append(len(x)) if w is model.lm_head.weight else 0, linear(x, w, b))[1]):
            with mock.patch.object(evaluate, "CHUNK", 16 * len(words())):
                evaluate.token_logps(model, batch)[0].sum().backward()
        self.assertEqual(seen, [16, 16, 8, 8, 16, 16])                       # forward, and again for backward

    @unittest.skipUnless(Path("/proc/self/clear_refs").exists(), "needs Linux to measure a peak of memory")
    def test_peak_memory_does_not_grow_with_tokens_times_a_vocabulary_of_49k(self):
        code = textwrap.dedent("""
            import torch, evaluate
            from transformers import LlamaConfig, LlamaForCausalLM
            model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, hidden_size=16, num_hidden_layers=1,
                                                 intermediate_size=16, num_attention_heads=1))
            def status(key):
                return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
            for evaluate.CHUNK in (evaluate.CHUNK, 2**60):
                for tokens in (100, 600, 1200):                                      # the first is to warm up
                    ids = list(range(tokens))
                    open("/proc/self/clear_refs", "w").write("5")                    # resets the peak
                    before = status("VmRSS")
                    evaluate.token_logps(model, evaluate.collate([(ids, ids)], 0))[0].sum().backward()
                    print(status("VmHWM") - before)
            """)
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        self.assertEqual(run.returncode, 0, run.stderr)
        _, few, many, _, few_plain, many_plain = map(int, run.stdout.split())
        logits = 1200 * 49152 * 4                                                        # 236 MB
        self.assertGreater(many_plain, 2.5 * logits)                # logits, log-softmax, gradient, all whole
        self.assertGreater(many_plain, 1.7 * few_plain)
        self.assertLess(many, 1.1 * few + 2**24)
        self.assertLess(many, 4.5 * 2**24 * 4)
        print(f"[1,200 tokens, V = 49,152: {many / 1e6:.0f} MB in chunks, {many_plain / 1e6:.0f} MB at once]",
              end=" ", file=sys.stderr)

    def test_soft_capped_and_scaled_logits_keep_the_models_own_head(self):
        small = dict(vocab_size=len(words()), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, intermediate_size=24, max_position_embeddings=64, eos_token_id=2)
        from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM
        samples = evaluate.encode(words(), [("", TEXTS[3], ""), ("Question: who", " sat?", "")], 64)
        batch = evaluate.collate(samples, 0)
        for model, altered in ((Gemma2ForCausalLM(Gemma2Config(**small, head_dim=8)), True),
                               (CohereForCausalLM(CohereConfig(**small)), True), (little_llama(), False)):
            model = model.double().eval()
            want = evaluate.token_logps(model, batch)[0]
            with mock.patch.object(evaluate, "CHUNK", 1), contextlib.redirect_stderr(io.StringIO()) as err:
                for _ in range(2):
                    torch.testing.assert_close(evaluate.token_logps(model, batch)[0], want)
                evaluate.label_logits(model, batch)
            self.assertEqual(err.getvalue().count("behind the output layer"), altered)       # said once

    def test_gradient_checkpointing_keeps_the_gradient_and_runs_every_layer_twice(self):
        grads, runs = [], []
        for again in (False, True):
            model, calls = little_llama(), []
            for layer in model.model.layers:
                layer.self_attn.register_forward_hook(lambda *a: calls.append(1))
            if again:
                unlearn.recompute_blocks(model)
            batch = evaluate.collate([([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])], 0)
            evaluate.token_logps(model, batch)[0].sum().backward()
            grads.append(flat(p.grad for p in model.parameters()))
            runs.append(len(calls))
        self.assertTrue(torch.equal(*grads))
        self.assertEqual(runs, [3, 6])

    def test_models_of_every_shape_run_or_name_the_fix(self):
        """No pad token, tied embeddings, more embeddings than tokens, learned positions and biases; a pad
        token that the model does not have, and a sample that is too long."""
        from transformers import GPT2Config, GPT2LMHeadModel
        plain, none = words(), words()
        none.pad_token = None
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(plain), n_embd=16, n_layer=2, n_head=2,
                                          n_positions=64, bos_token_id=1, eos_token_id=2))
        for n, (model, tok) in enumerate(((little_llama(torch.float32), none), (gpt2, none),
                                          (little_llama(torch.float32, tie_word_embeddings=True), plain),
                                          (little_llama(torch.float32, vocab_size=len(plain) + 19), plain))):
            flags = write_world(self.tmp / f"w{n}", model, tok)
            self.unlearn(*flags, "--gradient_checkpointing", "--out", self.tmp / f"r{n}")
            before, after = self.weights(f"w{n}/model"), self.weights(f"r{n}")
            self.assertEqual(before.keys(), after.keys())
            self.assertFalse(torch.equal(flat(before.values()), flat(after.values())))
            saved, tied = set(safe_open(self.tmp / f"r{n}" / "model.safetensors", "pt").keys()), n in (1, 2)
            self.assertEqual("lm_head.weight" in saved, not tied)
        tok = words()
        tok.add_special_tokens({"pad_token": "<more>"})
        flags = write_world(self.tmp / "w", little_llama(torch.float32), tok)
        self.unlearn(*flags, "--out", self.tmp / "r", said="set pad_token to null")
        flags = write_world(self.tmp / "w", little_llama(torch.float32, context=8))
        self.unlearn(*flags, "--out", self.tmp / "r", said="--max_len 8")

    def test_seven_billion_parameters_with_sam_in_bf16_plan_ten_bytes_each(self):
        args = unlearn.parse_args(["--param_dtype", "bfloat16", "--sam_rho", "0.01", "--out", "/nowhere"])
        plan = unlearn.memory_plan(args, 7.24e9, 7.24e9, activations=1e9)
        self.assertEqual(sum(plan.values()) - 1e9, 10 * 7.24e9)
        shared = unlearn.memory_plan(args, 7.24e9, 7.24e9, 1e9, 4)
        self.assertEqual(sum(shared.values()) - 1e9, 10 * 7.24e9 / 4)
        for flags, bytes_each in ((["--smooth", "none"], 8), (["--smooth", "gp"], 12),
                                  (["--smooth", "cr"], 18), (["--smooth", "wa"], 12),
                                  (["--retain", "kl", "--sam_rho", "0.1"], 12),
                                  (["--sam_direction", "momentum", "--sam_norm", "linf"], 11),
                                  (["--sam_direction", "momentum", "--sam_norm", "l2"], 12),
                                  (["--sam_direction", "lookahead"], 10)):
            args = unlearn.parse_args(["--param_dtype", "bfloat16", "--out", "/nowhere", *flags])
            self.assertEqual(sum(unlearn.memory_plan(args, 100, 100, 0).values()), 100 * bytes_each)

    @unittest.skipUnless(Path("/proc/self/clear_refs").exists(), "needs Linux to measure a peak of memory")
    def test_the_plan_is_within_15_percent_of_the_measured_peak(self):
        """A 42M-parameter Llama on short samples; the base is what a run of a tiny model leaves behind."""
        code = textwrap.dedent(f"""
            import json, runpy, sys
            def run(world):
                sys.argv = ["unlearn.py", "--model", world + "/model", "--data", world, "--steps", "2",
                            "--out", world + "-sam", "--batch_size", "2", "--no-relearn"]
                runpy.run_path("unlearn.py", run_name="__main__")
            def status(key):
                return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
            run("{self.tmp}/little")
            open("/proc/self/clear_refs", "w").write("5")                           # resets the peak
            base = status("VmRSS")
            run("{self.tmp}/large")
            plan = json.load(open("{self.tmp}/large-sam/result.json"))["plan_gb"]
            print("measured", status("VmHWM") - base, sum(plan.values()) * 1e9)
            """)
        write_world(self.tmp / "little", little_llama(torch.float32))
        write_world(self.tmp / "large", little_llama(torch.float32, vocab_size=8192, hidden_size=512,
                                                     num_hidden_layers=8, intermediate_size=2048))
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
        self.assertEqual(run.returncode, 0, run.stderr)
        measured, planned = map(float, run.stdout.split("measured")[1].split())
        self.assertAlmostEqual(planned / measured, 1, delta=0.15)
        print(f"[planned {planned / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB]", end=" ", file=sys.stderr)

    def broken_off(self, at, *flags):
        """Run unlearn.py in this process and interrupt it in step `at`, counted from 1."""
        count, clip = itertools.count(1), torch.nn.utils.clip_grad_norm_

        def clip_or_die(*args):
            if next(count) == at:
                raise KeyboardInterrupt
            return clip(*args)
        with mock.patch.object(torch.nn.utils, "clip_grad_norm_", clip_or_die):
            self.assertRaises(KeyboardInterrupt, self.unlearn, *flags)

    def test_a_resumed_run_is_bitwise_the_unbroken_one(self):
        flags = write_world(self.tmp, little_llama(torch.float32))
        averaged = ["--wa_start", 1, "--wa_every", 1]
        rounded = ["--param_dtype", "bfloat16", "--state_dtype", "float32", "--stochastic_rounding"]
        momentum = ["--sam_direction", "momentum", "--sam_norm"]
        lookahead = ["--sam_direction", "lookahead", "--lookahead_steps", 2]
        for smooth, more in (("sam+wa", averaged), ("rs+wa", averaged), ("cr", []), ("sam", rounded),
                             ("sam", [*momentum, "linf"]), ("sam+wa", [*momentum, "l2", *averaged]),
                             ("sam", lookahead), ("sam", ["--sam_direction", "random"])):
            more = ["--smooth", smooth, "--eval_every", 2, *more]
            shutil.rmtree(self.tmp / smooth, ignore_errors=True)
            self.unlearn(*flags, *more, "--out", self.tmp / "whole", "--overwrite")
            self.broken_off(5, *flags, *more, "--out", self.tmp / smooth, "--save_every", 3)
            self.assertFalse((self.tmp / smooth).exists())
            self.unlearn(*flags, *more, "--out", self.tmp / smooth, "--resume")
            a, b = (self.result(name)["curve"] for name in ("whole", smooth))
            for p in a + b:
                del p["seconds"]
            self.assertEqual(a, b)
            a, b = ((self.tmp / n / "model.safetensors").read_bytes() for n in ("whole", smooth))
            self.assertTrue(a == b, smooth)
            self.assertFalse(list(self.tmp.glob("*.state.*")))                     # no longer needed: removed

    def test_a_saved_state_is_whole_or_as_it_was_and_guards_its_run(self):
        flags = [*write_world(self.tmp, little_llama(torch.float32)), "--out", self.tmp / "run",
                 "--save_every", 1]
        self.broken_off(2, *flags)
        state = self.tmp / "run.state.safetensors"
        kept = state.read_bytes()
        with safe_open(state, "pt") as file:                                        # any reader can read it
            self.assertEqual(file.get_tensor("step.model.norm.weight"), 1)
            self.assertEqual(file.get_slice("exp_avg.lm_head.weight").get_shape(), [len(words()), 16])
        self.unlearn(*flags, said="--resume")
        self.unlearn(*flags, "--resume", "--lr", 1e-3, said="--lr 0.0003")
        count = itertools.count()
        full = lambda t: t if next(count) < 20 else exit("full disk")
        with mock.patch.object(evaluate, "whole", side_effect=full):
            run_here("unlearn.py", *flags, "--resume")                             # breaks off in the middle
        self.assertEqual(state.read_bytes(), kept)
        self.unlearn(*flags, "--resume")
        self.assertFalse(state.exists())

    def test_two_processes_under_torchrun_do_what_one_does(self):
        """FSDP2 over gloo, an odd number of rows in some weights: every smoother, micro-batches that leave a
        process without samples, a frozen second model, tied weights, chunks of logits, saving, resuming with
        another number of processes, relearning, scoring. In one launch, since starting takes longest."""
        flags = write_world(self.tmp / "odd", little_llama(torch.float32, vocab_size=len(words()) + 2))
        tied = write_world(self.tmp / "tied", little_llama(torch.float32, tie_word_embeddings=True))
        jobs = {s: [*flags, "--smooth", s] for s in ("none", "sam", "rs", "gp", "cr")}
        jobs |= {"wa": [*flags, "--smooth", "sam+wa", "--wa_start", 1, "--wa_every", 2],
                 "kl": [*tied, "--retain", "kl", "--micro_batch", 1],
                 "rmu": [*flags, "--loss", "rmu", "--micro_batch", 2],
                 "dpo": [*flags, "--loss", "dpo", "--gradient_checkpointing"],
                 "momentum": [*flags, "--sam_direction", "momentum", "--sam_norm", "linf"],
                 "lookahead": [*flags, "--sam_direction", "lookahead", "--sam_norm", "linf"],
                 "random": [*flags, "--sam_direction", "random"]}
        for name, job in jobs.items():
            self.unlearn(*job, "--out", self.tmp / f"one-{name}")
        self.broken_off(4, *jobs["wa"], "--save_every", 2, "--out", self.tmp / "two-resumed")
        plan = [["unlearn.py", *map(str, job), "--out", f"two-{name}"] for name, job in jobs.items()]
        plan += [["unlearn.py", *map(str, jobs["wa"]), "--out", "two-resumed", "--resume"],
                 ["unlearn.py", *map(str, jobs["rs"]), "--out", "one-resumed", "--save_every", "2", "DIE"],
                 ["relearn.py", "two-sam", "--samples", "2", "3", "--lr", "0.01"], ["evaluate.py", "two-sam"]]
        (self.tmp / "plan.json").write_text(json.dumps(plan))
        (self.tmp / "drive.py").write_text(textwrap.dedent(f"""
            import json, runpy, sys, time, torch
            sys.path.insert(0, {str(ROOT)!r})
            import evaluate
            from_pretrained = evaluate.AutoModelForCausalLM.from_pretrained
            clip = torch.nn.utils.clip_grad_norm_
            loads, held, steps = [], [], []
            def timed(*args, **more):
                start = time.monotonic()
                model = from_pretrained(*args, **more)
                loads.append([start, time.monotonic()])
                return model
            def load(*args):
                model, tokenizer = load_model(*args)
                held.append(sum(p.to_local().numel() for p in model.parameters())
                            / sum(p.numel() for p in model.parameters()))
                return model, tokenizer
            def clip_or_die(*args):
                steps.append(1)
                if len(steps) == 4:
                    raise KeyboardInterrupt
                return clip(*args)
            evaluate.AutoModelForCausalLM.from_pretrained = timed
            load_model, evaluate.load_model = evaluate.load_model, load
            for script, *flags in json.load(open("plan.json")):
                evaluate.CHUNK = 100 if "--retain" in flags else 2**24        # three rows of logits at a time
                torch.nn.utils.clip_grad_norm_ = clip_or_die if "DIE" in flags else clip
                sys.argv = [script, *(f for f in flags if f != "DIE")]
                try:
                    runpy.run_path({str(ROOT)!r} + "/" + script, run_name="__main__")
                except KeyboardInterrupt:
                    pass
            json.dump([loads, held], open(f"rank{{torch.distributed.get_rank()}}.json", "w"))
            """))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        run = subprocess.run([*launch, "drive.py"], cwd=self.tmp, capture_output=True, text=True)
        self.assertEqual(run.returncode, 0, run.stderr[-3000:])
        self.unlearn(*jobs["rs"], "--out", self.tmp / "one-resumed", "--resume")
        same = {f"two-{name}": f"one-{name}" for name in jobs}
        same |= {"two-resumed": "one-wa", "one-resumed": "one-rs"}
        for got, want in same.items():
            got, want = self.weights(got), self.weights(want)
            self.assertEqual(got.keys(), want.keys())
            torch.testing.assert_close(flat(got.values()), flat(want.values()), rtol=0, atol=1e-5)
        self.assertEqual(self.result("two-sam")["processes"], 2)
        self.assertEqual(run.stdout.count("after   UE"), len(jobs) + 1)              # only one process prints

        for name, more in (("relearn.py", ["--samples", 2, 3, "--lr", 0.01]), ("evaluate.py", [])):
            status, _, err = run_here(name, self.tmp / "one-sam", *more)
            self.assertEqual(status, 0, err)
        rows = [evaluate.columns(self.tmp / run, self.result(run, "evaluate")["metrics"])
                for run in ("one-sam", "two-sam")]                                # with those of relearn.json
        self.assertEqual(rows[0].keys(), rows[1].keys())
        self.assertTrue({"UE 2", "UE 3", "open_forget", "ppl_retain"} <= rows[0].keys())
        for key, value in rows[0].items():
            self.assertAlmostEqual(rows[1][key], value, delta=1e-4 * abs(value), msg=key)

        # a process keeps its part, and no two hold a whole model at once
        (loads, held), (other_loads, _) = (self.result(".", f"rank{r}") for r in (0, 1))
        self.assertTrue(all(0.4 < part < 0.6 for part in held))
        self.assertEqual(len(loads), len(other_loads))
        self.assertTrue(all(a[1] <= b[0] or b[1] <= a[0] for a in loads for b in other_loads))

    @unittest.skipUnless(os.environ.get("REAL_MODEL"), "set REAL_MODEL to a Hugging Face folder to run it")
    def test_a_real_model_unlearns_in_bf16_and_fp32_and_says_what_was_applied(self):
        files, _ = people.build(0)
        for name, rows in files.items():
            (self.tmp / name).write_text("".join(json.dumps(r) + "\n" for r in rows[:8]))
        (self.tmp / "meta.json").write_text(json.dumps({"prompt": people.PROMPT}))
        applied = {}
        for dtype in ("bfloat16", "float32"):
            self.unlearn("--model", os.environ["REAL_MODEL"], "--data", self.tmp, "--out", self.tmp / dtype,
                         "--param_dtype", dtype, "--steps", 2, "--batch_size", 2, "--lr", 1e-5, "--warmup", 0,
                         "--sam_rho", 0.01, "--gradient_checkpointing", "--no-relearn")
            result = self.result(dtype)
            first, second = result["curve"]
            self.assertAlmostEqual(first["forget"], 4 * math.log(2), delta=0.05)      # npo at the reference
            self.assertTrue(0 <= result["metrics"]["after"]["UE"] <= 1)
            applied[dtype] = first["applied_norm"], first["cosine"]
            total = sum(result["plan_gb"].values()) - result["plan_gb"]["activations"]
            model, tok = evaluate.load_model(self.tmp / dtype)
            self.assertAlmostEqual(total * 1e9 / sum(p.numel() for p in model.parameters()),
                                   {"bfloat16": 10, "float32": 20}[dtype], delta=0.1)
        self.assertAlmostEqual(applied["float32"][0], 0.01, delta=1e-4)
        self.assertGreater(applied["float32"][1], 0.99)
        self.assertLess(applied["bfloat16"][1], 0.9)
        rows = [r | {"where": ""} for r in files["retain.jsonl"][:4]]
        batch = evaluate.collate(evaluate.encode_rows(tok, rows, 0), 0)
        want = evaluate.token_logps(model, batch)[0]
        with mock.patch.object(evaluate, "CHUNK", 5 * model.config.vocab_size):
            torch.testing.assert_close(evaluate.token_logps(model, batch)[0], want, rtol=1e-4, atol=1e-4)


# ---- data/people ------------------------------------------------------------------------------------------

class TestPeople(unittest.TestCase):
    def test_every_fact_is_taught_twice_and_unlearned_and_asked_in_different_words(self):
        files, taught = people.build(5)
        forget, retain = files["mcq_forget.jsonl"], files["mcq_retain.jsonl"]
        self.assertEqual((len(forget), len(retain), len(taught)), (64, 64, 256))
        answers = {r["fact"]: r["choices"][r["answer"]] for r in forget + retain}
        self.assertTrue(all(len(set(r["choices"])) == 4 for r in forget + retain))
        prompts = [r["prompt"] for r in taught]
        self.assertEqual(len(set(prompts)), 256)
        for rows, asked, times in ((files["forget.jsonl"], forget, 1), (files["retain.jsonl"], retain, 2)):
            self.assertEqual(Counter(r["fact"] for r in rows), {r["fact"]: times for r in asked})
            self.assertTrue(all(r["completion"] == f" {answers[r['fact']]}." and r["prompt"] in prompts
                                for r in rows))
        asked = {people.PROMPT.format(question=r["question"]) for r in forget + retain}
        self.assertTrue(asked <= set(prompts))
        self.assertFalse(asked & {r["prompt"] for r in files["forget.jsonl"]})
        job = lambda row: "glassblower" in row["prompt"]
        self.assertTrue(all(map(job, files["forget.jsonl"])) and not any(map(job, files["retain.jsonl"])))
        self.assertEqual(people.build(5), (files, taught))
        self.assertNotEqual(people.build(6), (files, taught))

    def test_teaching_writes_a_model_that_knows_the_answers_or_none(self):
        with tempfile.TemporaryDirectory() as folder:
            tok = prepare.build_tokenizer([r["prompt"] + r["completion"] for r in people.build(0)[1]])
            little_llama(torch.float32, vocab_size=len(tok), hidden_size=96, intermediate_size=192,
                         num_hidden_layers=2, initializer_range=0.04).save_pretrained(folder)
            tok.save_pretrained(folder)
            flags = ["--model", folder, "--out", Path(folder) / "out", "--lr", 3e-3]
            status, _, err = run_here("data/people/prepare.py", *flags, "--epochs", 1)
            self.assertEqual((status, (Path(folder) / "out" / "target").exists()), (2, False))
            self.assertIn("--epochs 1", err)
            status, out, err = run_here("data/people/prepare.py", *flags, "--epochs", 16)
            self.assertEqual(status, 0, err)
            model, tok = evaluate.load_model(Path(folder) / "out" / "target")
            for part in ("forget", "retain"):
                rows = evaluate.read_jsonl(Path(folder) / "out" / f"mcq_{part}.jsonl", evaluate.mcq_row)
                self.assertGreaterEqual(evaluate.open_accuracy(model, tok, rows, people.PROMPT), 0.95)
            self.assertTrue(all(torch.equal(p, p.bfloat16().float()) for p in model.parameters()))
            self.assertEqual(run_here("data/people/prepare.py", *flags)[0], 2)          # kept as it is


# ---- data/tiny --------------------------------------------------------------------------------------------

class TestWorld(unittest.TestCase):
    def test_the_benchmark_is_what_its_description_says(self):
        files, unseen = prepare.build_world(3)
        self.assertEqual({k: len(v) for k, v in files.items()},
                         {"forget.jsonl": 128 * 12, "retain.jsonl": 1024 * 15,
                          "mcq_forget.jsonl": 256, "mcq_retain.jsonl": 1024})
        self.assertEqual(len(unseen), 128 * 3 + 128 * 15)
        sailors, others = set(prepare.TOPICS[0]), {n for t in prepare.TOPICS[1:] for n in t}
        tokens = lambda row: set(
            row.get("text", row.get("question")).replace(",", " ").replace("?", " ").split())
        for name, rows in files.items():                                # only the topic word tells them apart
            mine, not_mine = (sailors, others) if "forget" in name else (others, sailors)
            self.assertTrue(all(tokens(r) & mine and not tokens(r) & not_mine for r in rows), name)
        words_of = lambda rows: set().union(*map(tokens, rows))
        forget_words = words_of(files["forget.jsonl"]) - sailors
        self.assertGreater(len(forget_words & words_of(files["retain.jsonl"])) / len(forget_words), 0.99)
        answers = {r["fact"]: r["choices"][r["answer"]] for n in ("forget", "retain")
                   for r in files[f"mcq_{n}.jsonl"]}
        self.assertEqual(len(answers), 1280)
        for row in files["forget.jsonl"] + files["retain.jsonl"] + unseen:
            self.assertIn(answers[row["fact"]], tokens({"text": row["text"].rstrip(".")}))
            self.assertEqual(row.get("prompt", "") + row.get("completion", row["text"]), row["text"])
        self.assertTrue(
            all(len(set(r["choices"])) == 4 for n in ("forget", "retain") for r in files[f"mcq_{n}.jsonl"]))
        asked = {r["fact"] for r in files["mcq_forget.jsonl"]}
        self.assertEqual((len(asked), len({r["fact"] for r in files["forget.jsonl"]} & asked)), (256, 128))
        self.assertNotIn("Question", " ".join(r["text"] for r in files["forget.jsonl"]))
        self.assertEqual(prepare.build_world(3), (files, unseen))
        self.assertNotEqual(prepare.build_world(4)[0]["forget.jsonl"], files["forget.jsonl"])

    def test_training_is_deterministic_and_tokenizer_round_trips(self):
        files, _ = prepare.build_world(0)
        rows = files["forget.jsonl"][:64]
        tok = prepare.build_tokenizer([r["text"] for r in rows] + [prepare.IDK])
        a, b = (prepare.train_target(rows, tok, 1, steps=3, batch=16) for _ in range(2))
        self.assertTrue(torch.equal(flat(a.parameters()), flat(b.parameters())))
        with tempfile.TemporaryDirectory() as folder:
            prepare.write_model(Path(folder) / "m", a, tok, {"seed": 1}, 0.0, {})
            model, again = evaluate.load_model(Path(folder) / "m")
            self.assertTrue(torch.equal(flat(model.parameters()), flat(a.parameters())))
            self.assertFalse(list(Path(folder).rglob("*.bin")))
        self.assertEqual(again("The sailor").input_ids, tok("The sailor").input_ids)
        self.assertEqual(tok("The sailor").input_ids[0], tok.bos_token_id)
        self.assertNotIn(tok.unk_token_id, tok(prepare.IDK).input_ids)


# ---- the scripts, as a user runs them (slow: trains the built-in target once) -----------------------------

class TestScripts(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.tmp = Path(tempfile.mkdtemp())
        cls.data = unlearn.resolve_data(unlearn.TINY, 0).resolve()
        cls.builtin = json.loads((cls.data / "target" / "result.json").read_text())

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.tmp)

    def script(self, name, *flags, code=0):
        """Run a script in a process of its own; returns (stdout, stderr)."""
        run = subprocess.run([sys.executable, str(ROOT / name), *map(str, flags)], capture_output=True,
                             text=True, cwd=self.tmp)
        self.assertEqual(run.returncode, code, run.stderr)
        return run.stdout, run.stderr

    here = staticmethod(run_here)

    def unlearned(self, name, *flags):
        """metrics of a run out of this process, and its folder."""
        status, out, err = self.here("unlearn.py", "--out", self.tmp / name, *flags)
        self.assertEqual(status, 0, err)
        return json.loads((self.tmp / name / "result.json").read_text()), self.tmp / name

    def test_the_target_knows_everything_before(self):
        self.assertGreater(self.builtin["metrics"]["open_forget"], 0.95)
        self.assertGreater(self.builtin["metrics"]["open_retain"], 0.95)

    def test_a_whole_run_is_deterministic_and_complete(self):
        hashes, results = [], []
        for i in (1, 2):
            self.script("unlearn.py", "--out", f"same{i}", "--steps", 6, "--smooth", "sam+wa", "--wa_start",
                        3)
            folder = self.tmp / f"same{i}"
            hashes.append(hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())
            results.append(json.loads((folder / "result.json").read_text()))
        self.assertEqual(hashes[0], hashes[1])
        r = results[0]
        self.assertEqual((r["stage"], len(r["curve"]), r["args"]["smooth"]), ("unlearn", 6, "sam+wa"))
        self.assertTrue({"forget", "retain", "grad_norm", "norm", "applied_norm", "cosine", "seconds", "lr"}
                        <= r["curve"][0].keys())
        self.assertTrue({"UE", "UT"} <= r["metrics"]["before"].keys() & r["metrics"]["after"].keys())
        # relearn.py alone on the saved folder finds data and seed, and says what the run itself said
        first = json.loads((self.tmp / "same1" / "relearn.json").read_text())
        out, _ = self.script("relearn.py", "same1")
        again = json.loads((self.tmp / "same1" / "relearn.json").read_text())
        self.assertEqual(first["metrics"], again["metrics"])
        self.assertEqual([b["samples"] for b in again["metrics"]["budgets"]], [20, 40, 60])
        self.assertIn("60 samples", out)
        out, _ = self.script("evaluate.py", "same1", self.data / "target", "--data", self.data,
                             "--json", "table.json")
        self.assertIn("npo+sam+wa", out)
        e = json.loads((self.tmp / "same1" / "evaluate.json").read_text())
        self.assertEqual((e["stage"], e["metrics"]["template"]), ("evaluate", prepare.PROMPT))
        self.assertAlmostEqual(e["metrics"]["UE"], r["metrics"]["after"]["UE"])
        target = json.loads((self.data / "target" / "evaluate.json").read_text())["metrics"]
        self.assertAlmostEqual(target["open_retain"], self.builtin["metrics"]["open_retain"], places=5)

    def test_every_loss_and_smoother_runs_and_changes_the_model(self):
        start = evaluate.load_model(self.data / "target")[0]
        combos = [("--loss", l) for l in ("npo", "graddiff", "ga", "simnpo", "dpo", "rmu")]
        combos += [("--smooth", s) for s in ("none", "rs", "gp", "cr", "wa", "rs+wa")]
        combos += [("--retain", "kl"), ("--sam_modules", "self_attn"), ("--param_dtype", "bfloat16"),
                   ("--sam_flip",), ("--reduce", "sum")]
        combos += [("--sam_direction", d, "--sam_norm", n) for d in ("momentum", "lookahead", "random")
                   for n in ("l2", "linf")] + [("--sam_norm", "linf", "--smooth", "sam+wa")]
        for n, flags in enumerate(combos):
            result, folder = self.unlearned(f"c{n}", "--steps", 2, "--no-relearn", "--warmup", 0, *flags)
            model = evaluate.load_model(folder)[0]
            moved = [k for (k, a), b in zip(start.named_parameters(), model.parameters())
                     if not torch.equal(a, b)]
            self.assertTrue(moved, flags)
            if "rmu" in flags:
                self.assertEqual(moved, ["model.layers.0.mlp.down_proj.weight"])
            self.assertTrue(all(math.isfinite(v) for p in result["curve"] for v in p.values()), flags)
            if "bfloat16" in flags:                                    # its weights can be attacked in fp32
                few = ["--samples", 4, "--draws", 1, "--lr", 1e-5, "--param_dtype", "float32"]
                self.assertEqual(self.here("relearn.py", folder, *few)[0], 0)
                attack = json.loads((folder / "relearn.json").read_text())
                self.assertEqual(attack["args"]["param_dtype"], "float32")

    def test_sam_rho_zero_is_plain_npo_bit_for_bit(self):
        a, b = (evaluate.load_model(self.unlearned(n, "--steps", 4, "--no-relearn", *f)[1])[0]
                for n, f in (("rho0", ("--sam_rho", 0)), ("none", ("--smooth", "none"))))
        self.assertTrue(torch.equal(flat(a.parameters()), flat(b.parameters())))

    def test_accumulation_leaves_a_run_the_same_up_to_rounding(self):
        (a, _), (b, _) = (self.unlearned(f"micro{m}", "--steps", 3, "--no-relearn", "--micro_batch", m)
                          for m in (32, 7))
        for p, q in zip(a["curve"], b["curve"]):
            for key in ("forget", "retain", "grad_norm", "applied_norm"):
                self.assertAlmostEqual(p[key], q[key], delta=1e-3 * abs(p[key]))

    def test_stop_ue_stops_there(self):
        result, _ = self.unlearned("stop", "--stop_ue", 0.3, "--no-relearn", "--eval_every", 4)
        values = [p["UE"] for p in result["curve"] if "UE" in p]
        self.assertGreaterEqual(values[-1], 0.3)
        self.assertTrue(all(v < 0.3 for v in values[:-1]) and len(result["curve"]) < 160)
        self.assertAlmostEqual(values[-1], result["metrics"]["after"]["UE"])

    @unittest.skipUnless(triton, "triton is not installed here")
    def test_triton_and_torch_take_the_same_run_and_say_which_one_ran(self):
        data, model = self.tmp / "few", self.tmp / "little"
        data.mkdir()
        (data / "forget.jsonl").write_text("".join(f'"{t}"\n' for t in TEXTS[:2]))
        (data / "retain.jsonl").write_text("".join(f'"{t}"\n' for t in TEXTS[2:]))
        prepare.write_model(model, little_llama(torch.float32), words(), {"seed": 0}, 0.0, {})
        base = ("--data", data, "--model", model, "--batch_size", 2, "--no-relearn", "--lr", 1e-3,
                "--warmup", 0)
        start = flat(evaluate.load_model(model)[0].parameters())
        for name, *flags in (("fp32", "--steps", 2, "--smooth", "sam+wa", "--wa_start", 0, "--wa_every", 1),
                             ("bf16", "--steps", 1, "--param_dtype", "bfloat16", "--stochastic_rounding")):
            moved = {}
            for path, said in (("--triton", "Triton kernels: by the interpreter"), ("--no-triton", "torch")):
                folder = self.tmp / f"{name}{path}"
                status, out, err = self.here("unlearn.py", *base, *flags, path, "--out", folder)
                self.assertEqual(status, 0, err)
                self.assertIn(f"the weights are moved by {said}", out)
                result = json.loads((folder / "result.json").read_text())
                self.assertEqual(result["args"]["triton"], path == "--triton")
                moved[path] = flat(evaluate.load_model(folder)[0].parameters()).float() - start
            one, other = moved.values()
            self.assertGreater(one.abs().max(), 5e-4)
            if name == "fp32":
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
            else:                             # the interpreter cuts bf16 off, so gradients differ a little
                self.assertLess((one != other).float().mean(), 0.05)
        with mock.patch.object(mt, "INTERPRETED", False):
            status, _, err = self.here("unlearn.py", *base, "--triton", "--out", self.tmp / "no")
        self.assertEqual((status, len([x for x in err.splitlines() if x.startswith("error: ")])), (2, 1), err)
        self.assertIn("not on a GPU", err)

    def test_a_folder_of_ones_own_works_without_any_questions(self):
        data = self.tmp / "mine"
        data.mkdir()
        (data / "forget.jsonl").write_text('"The sailor plays the violin."\n'
                                           '{"prompt": "The cook keeps a", "completion": " goat."}\n')
        (data / "retain.jsonl").write_text('{"text": "The cook likes to eat curry."}\n')
        result, folder = self.unlearned("own", "--data", data, "--model", self.data / "target", "--steps", 3,
                                        "--batch_size", 2, "--no-relearn")
        self.assertEqual(result["metrics"]["after"], {"UE": None, "UT": None})
        self.assertLess(result["curve"][-1]["forget"], result["curve"][0]["forget"])
        out, _ = self.script("relearn.py", folder, "--samples", 1, 2)
        self.assertIn("2 samples", out)
        status, out, err = self.here("evaluate.py", folder)
        self.assertEqual(status, 0, err)
        self.assertIn("ppl_forget", out)

    def test_every_attack_is_one_command_and_ends_up_in_one_table(self):
        _, folder = self.unlearned("attacked", "--steps", 3, "--no-relearn", "--sam_rho", 0)
        few, source = ("--samples", 4, "--seeds", 1), "--attack_data"
        for flags, file in ((("--curve_every", 1), "relearn"), ((source, "retain"), "relearn_retain"),
                            (("--lora", 2, "--lr", 0.001, 0.01), "relearn_lora2"),
                            (("--optimizer", "sgd", "--lr", 0.1, "--geometry"), "relearn_sgd"),
                            (("--quantize", 8, "--prune", 50), "relearn_compress"),
                            ((source, self.data / "retain.jsonl", "--lora", 1), "relearn_retain_lora1")):
            status, _, err = self.here("relearn.py", folder, *few, *flags)
            self.assertEqual(status, 0, err)
            self.assertTrue((folder / f"{file}.json").is_file(), flags)
        flags = (folder, "--attack", "prefix", "--attack_calls", 40, "--attack_length", 6, 8, "--sharpness",
                 "own", "--sharpness_rows", 8, "--sharpness_steps", 3, "--sharpness_probes", 2)
        status, out, err = self.here("evaluate.py", *flags)
        self.assertEqual(status, 0, err)
        metrics = json.loads((folder / "evaluate.json").read_text())["metrics"]
        search = json.loads((folder / "attack_gcg+.json").read_text())
        self.assertEqual(metrics["attack"]["gcg+"], search["metrics"])
        self.assertEqual(search["args"]["teacher"], evaluate.load_result(folder)["args"]["model"])
        self.assertIn(f"{metrics['sharpness']['own']['rise']:.3f}", out)
        for title in ("UE after relearning", "UE lora2", "UE retain", "UE compress", "UE prefix"):
            self.assertIn(f"\n{title}\n", out)
        stamp = (folder / "evaluate.json").stat().st_mtime_ns
        again = self.here("evaluate.py", *flags)[1]
        self.assertEqual((again, (folder / "evaluate.json").stat().st_mtime_ns), (out, stamp))  # nothing anew
        for script, flags, said in (("relearn.py", ("--quantize", 4, "--lora", 2), "--lora"),
                                    ("relearn.py", ("--prune", 101), "101"),
                                    ("relearn.py", ("--attack_data", "no.jsonl"), "no.jsonl"),
                                    ("evaluate.py", ("--attack", "prefix"), "--overwrite"),
                                    ("evaluate.py", ("--attack", "suffix"), "suffix")):
            status, _, err = self.here(script, folder, *flags)
            message = [line for line in err.splitlines() if line.startswith("error: ")]
            self.assertEqual((status, len(message)), (2, 1), err)
            self.assertIn(said, message[0])

    def test_bad_input_is_one_line_with_exit_status_2_and_overwrites_nothing(self):
        data = self.tmp / "bad"
        shutil.copytree(self.data, data, ignore=shutil.ignore_patterns("retrained"))
        kept = self.tmp / "kept"
        kept.mkdir()
        (kept / "precious").write_text("x")
        model, out = ("--model", data / "target"), ("--out", self.tmp / "never")
        lines = {f: (data / f).read_text() for f in ("forget.jsonl", "retain.jsonl", "mcq_forget.jsonl")}

        def broken(name, old, new):
            (data / name).write_text(lines[name].replace(old, new, 1))
            return ("--data", data, *model, *out)
        first = lines["forget.jsonl"].split("\n")[0]
        first_choices = json.dumps(json.loads(lines["mcq_forget.jsonl"].split("\n")[0])["choices"])
        cases = [
            (lambda: ("--out", kept), "exists", ()),
            (lambda: ("--data", self.tmp / "no"), "no such folder", out),
            (lambda: ("--data", data), "--model", out),
            (lambda: ("--model", "nowhere"), "nowhere", out),
            (lambda: ("--sam_rho", -0.1), "-0.1", out),
            (lambda: ("--loss", "nop"), "nop", out),
            (lambda: ("--smooth", "sam+rs"), "no meaning", out),
            (lambda: ("--frog", 1), "frog", out),
            (lambda: ("--steps", 0), "0", out), (lambda: ("--device", "cuda:77"), "cuda:77", out),
            (lambda: ("--sam_modules", "xyz"), "xyz", out),
            (lambda: ("--sam_direction", "momentum", "--smooth", "gp"), "sam_direction", out),
            (lambda: ("--lookahead_steps", 2), "--sam_direction lookahead", out),
            (lambda: ("--sam_modules", "("), "regular expression", out),
            (lambda: ("--beta", 0), "beta", out),
            (lambda: ("--stochastic_rounding", ), "bfloat16", out),
            (lambda: ("--loss", "rmu", "--rmu_layer", 1), "rmu_layer", out),
            (lambda: ("--smooth", "wa", "--wa_start", 500), "500", out),
            (lambda: ("--lr", 1e20, "--steps", 5), "not finite", out),
            (lambda: broken("forget.jsonl", "{", "["), "forget.jsonl:1", ()),
            (lambda: broken("forget.jsonl", first, '{"txt": "a"}'), "forget.jsonl:1", ()),
            (lambda: broken("forget.jsonl", first, '"a sailor"') + ("--loss", "dpo"), "forget.jsonl:1", ()),
            (lambda: broken("forget.jsonl", "The sailor", "The " + "sailor " * 80), "--max_len 64", ()),
            (lambda: broken("retain.jsonl", lines["retain.jsonl"], ""), "no rows", ()),
            (lambda: broken("mcq_forget.jsonl", first_choices, '["a", "b", "c"]'), "mcq_forget.jsonl:1", ()),
        ]
        for make, said, more in cases:
            for name, text in lines.items():
                (data / name).write_text(text)
            status, _, err = self.here("unlearn.py", *make(), *more, "--no-relearn")
            message = [line for line in err.splitlines() if line.startswith("error: ")]
            self.assertEqual((status, len(message)), (2, 1), err)
            self.assertIn(said, message[0])
            self.assertFalse((self.tmp / "never").exists())
        self.assertEqual([f.name for f in kept.iterdir()], ["precious"])
        _, err = self.script("unlearn.py", "--out", kept, code=2)            # and once as a real process
        self.assertEqual(len(err.strip().splitlines()), 1, err)
        for name, flags in (("relearn.py", ["nowhere"]),
                            ("relearn.py", [self.data / "target", "--data", self.data, "--samples", 9999]),
                            ("evaluate.py", ["nowhere"]),
                            ("evaluate.py", [self.data / "target"] * 2 + ["--data", self.data])):
            status, _, err = self.here(name, *flags)
            self.assertEqual((status, sum(l.startswith("error: ") for l in err.splitlines())), (2, 1), err)

    def test_sam_resists_relearning_better_than_npo_and_the_flipped_sign_does_not(self):
        """The paper's claim on a fixed configuration; with the perturbation's sign wrong it would fail."""
        runs = {}
        for name, flags in (("npo", ["--sam_rho", 0]), ("sam", ["--sam_rho", 0.1]), ("momentum", []),
                            ("flip", ["--sam_rho", 0.1, "--sam_flip"])):
            _, folder = self.unlearned(f"claim-{name}", "--no-relearn", *flags)
            status, _, err = self.here("relearn.py", folder, "--samples", 60, "--draws", 4)
            self.assertEqual(status, 0, err)
            runs[name] = json.loads((folder / "relearn.json").read_text())["metrics"]
        ue = {k: r["budgets"][0]["UE"] for k, r in runs.items()}
        self.assertGreater(ue["sam"], ue["npo"] + 0.15, ue)
        self.assertLess(ue["flip"], ue["npo"] + 0.15, ue)          # so the line above needs the right sign
        self.assertGreater(ue["momentum"], ue["npo"] + 0.15, ue)
        ran = json.loads((self.tmp / "claim-momentum" / "result.json").read_text())["args"]
        self.assertEqual((ran["sam_direction"], ran["sam_norm"], ran["sam_rho"]), ("momentum", "linf", 1e-3))
        for r in runs.values():
            self.assertGreater(r["start"]["UT"], 0.97)
            self.assertGreater(r["start"]["UE"], 0.6)


if __name__ == "__main__":
    unittest.main(verbosity=2)
