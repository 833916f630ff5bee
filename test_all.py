"""Everything that must hold. Run `python test_all.py` (about 3 minutes on 2 cores; pytest collects it too).

Each test compares with a definition that does not use the code under test: autograd with double backward, a
closed form, a loop over single samples, a published table. Nothing is downloaded; the slow part at the end
trains the built-in target once (cached in data/tiny/seed0) and runs the scripts as a user would.
"""
import argparse, contextlib, csv, fnmatch, hashlib, importlib.util, io, itertools, json, math, os, random, re
import runpy, shutil, subprocess, sys, tempfile, time, unittest
from collections import Counter
from pathlib import Path
from unittest import mock

os.environ["TQDM_DISABLE"] = "1"            # tqdm reads it at import; the scripts that tests start inherit it

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import evaluate, relearn, sam, unlearn

ROOT = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / "tiny" / "prepare.py")
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)
TEXTS = [
    "the cat sat on the mat", "a dog ran", "Question: who sat? Answer: the cat",
    "one two three four five six seven", "A. B. C. D."
]


def words():
    return prepare.build_tokenizer(TEXTS)


def little_llama(dtype=torch.float64, seed=0, context=64, **more):
    """A random Llama of about 5,000 parameters over words()."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(words()), hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                         intermediate_size=24, max_position_embeddings=context, initializer_range=0.3,
                         **{"tie_word_embeddings": False, **more})
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

    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
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
        for smoother, want in ((sam.SAM([p], 0.3), g + 0.3 * a @ v), (sam.GP([p], 0.5,
                                                                             0.01), g + 0.5 * a @ v),
                               (sam.CR([p], 0.5,
                                       0.01), g), (rs, a @ (p.detach() + sum(draws) / 4)), (sam.plain, g)):
            p.grad = None
            loss = smoother(closure)
            torch.testing.assert_close(p.grad, want, rtol=1e-8, atol=1e-8 * g.norm().item())
            if smoother is not rs:
                self.assertAlmostEqual(loss.item(), (0.5 * p @ a @ p).item())

    def test_number_of_passes_is_the_documented_one(self):
        net = Network()
        for smoother, passes in ((sam.plain, 1), (sam.SAM(net.params), 2), (sam.RS(net.params, samples=5), 5),
                                 (sam.GP(net.params), 2), (sam.CR(net.params), 4)):
            calls = []
            net.smoothed(lambda closure: smoother(lambda: (calls.append(1), closure())[1]))
            self.assertEqual(len(calls), passes)

    def test_every_smoother_restores_bit_for_bit_even_when_the_loss_raises(self):
        for make in (lambda p: sam.SAM(p, 0.3), lambda p: sam.RS(p, 0.3, 3), lambda p: sam.GP(p, 0.1, 0.3),
                     lambda p: sam.CR(p, 0.1, 0.3)):
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
                     lambda: sam.CR([p], 1.0, 0.0)):
            self.assertRaises(ValueError, make)
        s = sam.SAM([p], 0.1)
        p.grad = torch.ones(2)
        s.ascent()
        self.assertRaises(RuntimeError, s.ascent)

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
            self.assertTrue(
                torch.equal(p.detach(),
                            torch.tensor(want).float().to(dtype)) or dtype == torch.float32)

    def test_sam_py_works_copied_out_alone(self):
        code = (
            "import torch, sam\nmodel = torch.nn.Linear(3, 1)\nx = torch.randn(4, 3)\n"
            "loss = lambda: model(x).square().mean()\nopt = torch.optim.AdamW(model.parameters())\n"
            "before = model.weight.clone()\ns = sam.SAM(model.parameters(), rho=0.01)\nloss().backward()\n"
            "with s.perturbed():\n    loss().backward()\nassert torch.equal(before, model.weight)\n"
            "(2 * loss()).backward()\nopt.step(); opt.zero_grad()\nprint('fine')\n")
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(ROOT / "sam.py", folder)
            run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
        self.assertEqual(run.stdout.strip(), "fine", run.stderr)


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
        grad, = torch.autograd.grad(
            unlearn.forget_loss("npo", logp,
                                torch.zeros(2).double(), 1e-6).sum(), logp)
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
        f_loss = unlearn.forget_backward(model, picked, None,
                                         args).item()  # at the reference itself: 2/beta log 2
        self.assertAlmostEqual(f_loss, 2 / args.beta * math.log(2), places=10)

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
        hook = model.model.layers[1].register_forward_hook(lambda m, i, o: seen.append(o[0] if isinstance(
            o, tuple) else o))
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
        combos = [(l, "sam") for l in ("npo", "graddiff", "ga", "simnpo", "dpo", "rmu")
                  ] + [("npo+kl", "none")] + [("npo", s) for s in ("none", "rs", "gp", "cr")]
        for loss, smooth in combos:
            results = []
            for size in (5, 2, 1):
                args = unlearn.parse_args([
                    "--out", "/nowhere", "--loss",
                    loss.split("+")[0], "--smooth", smooth, "--rmu_alpha", "3",
                    *(["--retain", "kl"] if "kl" in loss else [])
                ])
                args.rmu_layer = 1
                model, frozen = little_llama(), little_llama(seed=1)
                samples, picks = evaluate.encode_rows(tok, rows, 64), [4, 1, 3, 0, 2]
                ref, goal = torch.linspace(-3, -1, 5).double(), torch.ones(16).double()
                f = unlearn.micro_batches(samples, picks, size, 0, "cpu", ref)
                c = unlearn.micro_batches(other, picks, size, 0, "cpu", ref - 1) if loss == "dpo" else None
                smoother = unlearn.make_smoother(args, list(model.named_parameters()))
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
        for check, bad, said in ((evaluate.text_row, "{",
                                  "not JSON"), (evaluate.text_row, '{"txt": "a"}',
                                                "found txt"), (evaluate.text_row, '{"text": "  "}', "'  '"),
                                 (evaluate.text_row, '{"text": 3}', "is 3"), (evaluate.text_row, "[1]",
                                                                             "found list"),
                                 (evaluate.text_row, '{"prompt": "a"}', "completion"), (evaluate.mcq_row,
                                                                                       '"text"', "found str"),
                                 (evaluate.mcq_row, mcq.replace('"d"', '7'),
                                  "exactly 4"), (evaluate.mcq_row, mcq.replace(', "d"', ""), "exactly 4"),
                                 (evaluate.mcq_row, mcq.replace('r": 1', 'r": 4'),
                                  "is 4"), (evaluate.mcq_row, mcq.replace('r": 1', 'r": true'),
                                            "is True"), (evaluate.mcq_row, mcq.replace('"q"',
                                                                                       '""'), "is ''")):
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
        self.assertEqual((args.out, args.wa_start), ("out/npo+sam+wa-s0", 40))
        self.assertEqual(unlearn.parse_args(["--stop_ue", "0.7", "--overwrite"]).eval_every, 5)

    def test_batches_cover_the_data_evenly_and_follow_the_seed(self):
        take = lambda seed: [
            next(it) for it in [unlearn.shuffled(7, 3, random.Random(seed))] for _ in range(14)
        ]
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
                         ("the mat on one two who?",
                          ["cat", "dog", "mat", "sat"]), ("on?", ["one", "two", "three", "four"]),
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
            rows.append({
                "question": f"{text} {i % 4 * 'who '}", "choices": [answer, "a", "b", "c"], "answer": 0,
                "where": "", "right": tok(said).input_ids == tok(answer).input_ids
            })
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


# ---- relearn.py -------------------------------------------------------------------------------------------

class TestRelearn(unittest.TestCase):
    def test_samples_are_nested_distinct_in_fact_and_follow_the_seed(self):
        rows = [{"text": str(i), "fact": i // 12} for i in range(128 * 12)]
        lists = {n: relearn.draw_samples(rows, n, "5 0") for n in (20, 40, 60, 128)}
        for n, picks in lists.items():
            self.assertEqual(len({rows[i]["fact"] for i in picks}), n)
            self.assertEqual(picks, lists[128][:n])
        self.assertNotEqual(lists[60], relearn.draw_samples(rows, 60, "5 1"))
        self.assertRaisesRegex(evaluate.InputError, "128 different", relearn.draw_samples, rows, 129, "0")
        self.assertEqual(len(set(relearn.draw_samples([{"text": "a"}] * 9, 9, "0"))),
                         9)  # no facts: rows count

    def test_relearning_equals_a_plain_loop(self):
        model, other, tok = little_llama(), little_llama(), words()
        samples = evaluate.encode_rows(tok, [{"text": t, "where": ""} for t in TEXTS], 64)
        relearn.relearn(model, samples, 0, 1e-2, 2, 2, "x")
        opt, rng = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0), random.Random("x")
        decay = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=6)
        for _ in range(2):
            order = rng.sample(range(5), 5)
            for part in (order[:2], order[2:4], order[4:]):
                nll = torch.cat([
                    F.cross_entropy(
                        other(torch.tensor([samples[j][0]])).logits[0, :-1], torch.tensor(samples[j][0][1:]),
                        reduction="none") for j in part
                ])
                opt.zero_grad()
                nll.mean().backward()
                opt.step(), decay.step()
        torch.testing.assert_close(flat(model.parameters()), flat(other.parameters()), rtol=1e-6, atol=1e-8)

    def test_attack_restores_the_weights_and_every_budget_starts_from_them(self):
        model, tok = little_llama(torch.float32), words()
        rows = [{"text": t, "where": "", "fact": i} for i, t in enumerate(TEXTS)]
        questions = {
            "mcq_forget": [dict(r, fact=i) for i, r in enumerate(TestEvaluate.rows)], "prompt": "{question}"
        }
        before = flat(model.parameters()).clone()
        args = mock.Mock(max_len=0, samples=[4, 2], seed=0, draws=2, lr=[1e-2], epochs=[1], batch_size=2)
        metrics = relearn.attack(model, tok, rows, questions, args)
        self.assertTrue(torch.equal(before, flat(model.parameters())))
        self.assertEqual([b["samples"] for b in metrics["budgets"]], [2, 4])
        args.samples = [4]
        alone = relearn.attack(model, tok, rows, questions, args)["budgets"][0]
        self.assertEqual(alone, metrics["budgets"][1])
        self.assertAlmostEqual(alone["UE"], np.mean([d["UE"] for d in alone["draws"]]))
        self.assertIsNone(alone["UT"])

    def test_a_diverging_attack_is_an_error_and_restores(self):
        model, tok = little_llama(torch.float32), words()
        before = flat(model.parameters()).clone()
        args = mock.Mock(max_len=0, samples=[4], seed=0, draws=1, lr=[1e30], epochs=[3], batch_size=1)
        with self.assertRaisesRegex(evaluate.InputError, "lower it"):
            relearn.attack(model, tok, [{"text": t, "where": ""} for t in TEXTS], {"prompt": None}, args)
        self.assertTrue(torch.equal(before, flat(model.parameters())))


# ---- data/tiny --------------------------------------------------------------------------------------------

class TestWorld(unittest.TestCase):
    def test_the_benchmark_is_what_its_description_says(self):
        files, unseen = prepare.build_world(3)
        self.assertEqual({k: len(v) for k, v in files.items()}, {
            "forget.jsonl": 128 * 12, "retain.jsonl": 1024 * 15, "mcq_forget.jsonl": 256, "mcq_retain.jsonl":
            1024
        })
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
        answers = {
            r["fact"]: r["choices"][r["answer"]] for n in ("forget", "retain")
            for r in files[f"mcq_{n}.jsonl"]
        }
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
        out, _ = self.script("evaluate.py", "same1", self.data / "target", "--json", "table.json")
        self.assertIn("npo+sam+wa", out)
        e = json.loads((self.tmp / "same1" / "evaluate.json").read_text())
        self.assertEqual((e["stage"], e["metrics"]["template"]), ("evaluate", prepare.PROMPT))
        self.assertAlmostEqual(e["metrics"]["UE"], r["metrics"]["after"]["UE"])
        target = json.loads((self.data / "target" / "evaluate.json").read_text())["metrics"]
        self.assertAlmostEqual(target["open_retain"], self.builtin["metrics"]["open_retain"], places=5)

    def test_every_loss_and_smoother_runs_and_changes_the_model(self):
        start = evaluate.load_model(self.data / "target")[0]
        combos = [("--loss", l) for l in ("npo", "graddiff", "ga", "simnpo", "dpo", "rmu")] + [
            ("--smooth", s) for s in ("none", "rs", "gp", "cr", "wa", "rs+wa")
        ] + [("--retain", "kl"), ("--sam_modules", "self_attn"), ("--param_dtype", "bfloat16"),
             ("--sam_flip", ), ("--reduce", "sum")]
        for n, flags in enumerate(combos):
            result, folder = self.unlearned(f"c{n}", "--steps", 2, "--no-relearn", "--warmup", 0, *flags)
            model = evaluate.load_model(folder)[0]
            moved = [
                k for (k, a), b in zip(start.named_parameters(), model.parameters()) if not torch.equal(a, b)
            ]
            self.assertTrue(moved, flags)
            if "rmu" in flags:
                self.assertEqual(moved, ["model.layers.0.mlp.down_proj.weight"])
            self.assertTrue(all(math.isfinite(v) for p in result["curve"] for v in p.values()), flags)

    def test_sam_rho_zero_is_plain_npo_bit_for_bit(self):
        a, b = (evaluate.load_model(self.unlearned(n, "--steps", 4, "--no-relearn", *f)[1])[0] for n, f in (
            ("rho0", ("--sam_rho", 0)), ("none", ("--smooth", "none"))))
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

    def test_a_folder_of_ones_own_works_without_any_questions(self):
        data = self.tmp / "mine"
        data.mkdir()
        (data / "forget.jsonl").write_text(
            '"The sailor plays the violin."\n{"prompt": "The cook keeps a", "completion": '
            '" goat."}\n')
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
            (lambda: ("--sam_modules", "("), "regular expression", out),
            (lambda: ("--beta", 0), "beta", out),
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
        for name, flags in (("relearn.py", ["nowhere"]), ("relearn.py",
                                                          [self.data / "target", "--samples", 999]),
                            ("evaluate.py", ["nowhere"]), ("evaluate.py", [self.data / "target"] * 2)):
            status, _, err = self.here(name, *flags)
            self.assertEqual((status, sum(l.startswith("error: ") for l in err.splitlines())), (2, 1), err)

    def test_sam_resists_relearning_better_than_npo_and_the_flipped_sign_does_not(self):
        """The claim of the paper on a fixed configuration: with the sign of the perturbation wrong it would
        fail."""
        runs = {}
        for name, flags in (("npo", ["--sam_rho", 0]), ("sam", []), ("flip", ["--sam_flip"])):
            _, folder = self.unlearned(f"claim-{name}", "--no-relearn", *flags)
            status, _, err = self.here("relearn.py", folder, "--samples", 60, "--draws", 4)
            self.assertEqual(status, 0, err)
            runs[name] = json.loads((folder / "relearn.json").read_text())["metrics"]
        ue = {k: r["budgets"][0]["UE"] for k, r in runs.items()}
        self.assertGreater(ue["sam"], ue["npo"] + 0.08, ue)
        self.assertLess(ue["flip"], ue["npo"] + 0.04, ue)
        for r in runs.values():
            self.assertGreater(r["start"]["UT"], 0.97)
            self.assertGreater(r["start"]["UE"], 0.6)


if __name__ == "__main__":
    unittest.main(verbosity=2)
