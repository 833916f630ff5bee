"""Everything that must hold. Run `python test_all.py` (about 2 minutes on 2 cores; pytest collects it too).

Each test compares with a definition that does not use the code under test: autograd with double backward, a
closed form, a loop over single samples, a published table. Nothing is downloaded; the slow part at the end
trains the built-in target once (cached in data/tiny/seed0) and runs the scripts as a user would.
"""
import contextlib, hashlib, importlib.util, io, itertools, json, math, os, random, runpy, shutil
import subprocess, sys, tempfile, textwrap, unittest
from collections import Counter
from pathlib import Path
from unittest import mock

os.environ["TQDM_DISABLE"] = "1"            # tqdm reads it at import; the scripts that tests start inherit it

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
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
    config = LlamaConfig(**{"vocab_size": len(words()), "hidden_size": 16, "num_hidden_layers": 3,
                            "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": context,
                            "initializer_range": 0.3, "tie_word_embeddings": False, **more})
    return LlamaForCausalLM(config).to(dtype).eval()


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
            np.testing.assert_allclose(p.detach().double().numpy(), want,
                                       rtol=2**-8 if dtype == torch.bfloat16 else 0, atol=1e-6)

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
        combos = [(l, "sam") for l in ("npo", "graddiff", "ga", "simnpo", "dpo", "rmu")]
        combos += [("npo+kl", "none")] + [("npo", s) for s in ("none", "rs", "gp", "cr")]
        for loss, smooth in combos:
            results = []
            for size in (5, 2, 1):
                args = unlearn.parse_args(["--out", "/nowhere", "--loss", loss.split("+")[0],
                                           "--smooth", smooth, "--rmu_alpha", "3",
                                           *(["--retain", "kl"] if "kl" in loss else [])])
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
        for check, bad, said in (
                (evaluate.text_row, "{", "not JSON"),
                (evaluate.text_row, '{"txt": "a"}', "found txt"),
                (evaluate.text_row, '{"text": "  "}', "'  '"),
                (evaluate.text_row, '{"text": 3}', "is 3"),
                (evaluate.text_row, "[1]", "found list"),
                (evaluate.text_row, '{"prompt": "a"}', "completion"),
                (evaluate.mcq_row, '"text"', "found str"),
                (evaluate.mcq_row, mcq.replace('"d"', '""'), "exactly 4"),
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
        self.assertEqual((args.out, args.wa_start), ("out/npo+sam+wa-s0", 40))
        self.assertEqual(unlearn.parse_args(["--stop_ue", "0.7", "--overwrite"]).eval_every, 5)

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
        self.assertAlmostEqual(evaluate.perplexity(model, tok, rows, 3, batch=2), math.exp(np.mean(nll)),
                               places=6)

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
        self.assertEqual(len(set(relearn.draw_samples([{"text": "a"}] * 9, 9, "0"))), 9)   # no facts: rows

    def test_relearning_equals_a_plain_loop(self):
        model, other, tok = little_llama(), little_llama(), words()
        samples = evaluate.encode_rows(tok, [{"text": t, "where": ""} for t in TEXTS], 64)
        relearn.relearn(model, samples, 0, 1e-2, 2, 2, "x")
        opt, rng = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0), random.Random("x")
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

    def test_attack_restores_the_weights_and_every_budget_starts_from_them(self):
        model, tok = little_llama(torch.float32), words()
        rows = [{"text": t, "where": "", "fact": i} for i, t in enumerate(TEXTS)]
        questions = {"mcq_forget": [dict(r, fact=i) for i, r in enumerate(TestEvaluate.rows)],
                     "prompt": "{question}"}
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

    def run_here(self, *flags, said=None):
        """Run unlearn.py inside this process; said: part of the error that it must end with."""
        status, out, err = TestScripts.here(self, "unlearn.py", *flags)
        self.assertEqual(status, 2 if said else 0, err)
        self.assertIn(said or "", err)
        return out, err

    def weights(self, name):
        return evaluate.load_model(self.tmp / name)[0].state_dict()

    def test_chunks_give_the_loss_and_the_gradient_of_all_logits_at_once(self):
        model, frozen, tok = little_llama(), little_llama(seed=1), words()
        samples = evaluate.encode(tok, [("", TEXTS[3], ""), ("Question: who sat? Answer:", " the cat", ""),
                                        ("", TEXTS[1], "")], 64)
        batch = evaluate.collate(samples, 0)
        for name, f in (("logps", lambda: (evaluate.token_logps(model, batch)[0] * torch.arange(1, 10)).sum()),
                        ("kl", lambda: unlearn.kl_sum(model, frozen, batch)),
                        ("labels", lambda: evaluate.label_logits(model, batch).square().sum())):
            results, rows = [], []
            for chunk in (2**24, 4 * len(tok), 1):              # all at once; four rows at a time; row by row
                model.zero_grad()
                head = model.lm_head.register_forward_hook(lambda m, i, o: rows.append(o.numel()))
                with mock.patch.object(evaluate, "CHUNK", chunk):
                    loss = f()
                loss.backward()
                head.remove()
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
            model = LlamaForCausalLM(LlamaConfig(
                vocab_size=49152, hidden_size=16, num_hidden_layers=1, intermediate_size=16, num_attention_heads=1))
            def status(key):
                return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
            for evaluate.CHUNK in (evaluate.CHUNK, 2**60):
                for tokens in (100, 600, 1200):                                          # the first is to warm up
                    ids = list(range(tokens))
                    open("/proc/self/clear_refs", "w").write("5")                        # resets the peak
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
                     num_key_value_heads=1, intermediate_size=24, max_position_embeddings=64)
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
            hooks = [m.self_attn.register_forward_hook(lambda *a: calls.append(1)) for m in model.model.layers]
            if again:
                unlearn.recompute_blocks(model)
            evaluate.token_logps(model, evaluate.collate([([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])], 0))[0].sum().backward()
            grads.append(flat(p.grad for p in model.parameters()))
            runs.append(len(calls))
        self.assertTrue(torch.equal(*grads))
        self.assertEqual(runs, [3, 6])

    def test_models_of_every_shape_run_or_name_the_fix(self):
        """No pad token, tied embeddings, more embeddings than tokens, learned positions and biases; a pad token
        that the model does not have, and a sample that is too long."""
        from transformers import GPT2Config, GPT2LMHeadModel
        plain, none = words(), words()
        none.pad_token = None
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(plain), n_embd=16, n_layer=2, n_head=2, n_positions=64))
        for n, (model, tok) in enumerate(((little_llama(torch.float32), none), (gpt2, none),
                                          (little_llama(torch.float32, tie_word_embeddings=True), plain),
                                          (little_llama(torch.float32, vocab_size=len(plain) + 19), plain))):
            flags = write_world(self.tmp / f"w{n}", model, tok)
            self.run_here(*flags, "--gradient_checkpointing", "--out", self.tmp / f"r{n}")
            before, after = self.weights(f"w{n}/model"), self.weights(f"r{n}")
            self.assertEqual(before.keys(), after.keys())
            self.assertFalse(torch.equal(flat(before.values()), flat(after.values())))
            saved, tied = set(safe_open(self.tmp / f"r{n}" / "model.safetensors", "pt").keys()), n in (1, 2)
            self.assertEqual("lm_head.weight" in saved, not tied)
        tok = words()
        tok.add_special_tokens({"pad_token": "<more>"})
        flags = write_world(self.tmp / "w", little_llama(torch.float32), tok)
        self.run_here(*flags, "--out", self.tmp / "r", said="set pad_token to null")
        flags = write_world(self.tmp / "w", little_llama(torch.float32, context=8))
        self.run_here(*flags, "--out", self.tmp / "r", said="--max_len 8")
        self.run_here(*flags, "--out", self.tmp / "r", "--state_dtype", "bfloat16", said="--param_dtype bfloat16")

    def test_seven_billion_parameters_with_sam_in_bf16_plan_ten_bytes_each(self):
        args = unlearn.parse_args(["--param_dtype", "bfloat16", "--sam_rho", "0.01", "--out", "/nowhere"])
        plan = unlearn.memory_plan(args, 7.24e9, 7.24e9, activations=1e9)
        self.assertEqual(sum(plan.values()) - 1e9, 10 * 7.24e9)
        shared = unlearn.memory_plan(args, 7.24e9, 7.24e9, 1e9, 4)
        self.assertEqual(sum(shared.values()) - 1e9, 10 * 7.24e9 / 4)
        for flags, bytes_each in ((["--smooth", "none"], 8), (["--smooth", "gp"], 12), (["--smooth", "cr"], 18),
                                  (["--smooth", "wa"], 12), (["--retain", "kl"], 12)):
            args = unlearn.parse_args(["--param_dtype", "bfloat16", "--out", "/nowhere", *flags])
            self.assertEqual(sum(unlearn.memory_plan(args, 100, 100, 0).values()), 100 * bytes_each)

    @unittest.skipUnless(Path("/proc/self/clear_refs").exists(), "needs Linux to measure a peak of memory")
    def test_the_plan_is_within_15_percent_of_the_measured_peak(self):
        """A 42M-parameter Llama on short samples; the base is what a run of a tiny model leaves behind."""
        code = textwrap.dedent(f"""
            import json, runpy, sys
            def run(world, smooth):
                sys.argv = ["unlearn.py", "--model", world + "/model", "--data", world, "--out", world + smooth,
                            "--smooth", smooth, "--steps", "3", "--batch_size", "2", "--no-relearn"]
                runpy.run_path("unlearn.py", run_name="__main__")
            def status(key):
                return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
            run("{self.tmp}/little", "SMOOTH")
            open("/proc/self/clear_refs", "w").write("5")                               # resets the peak
            base = status("VmRSS")
            run("{self.tmp}/large", "SMOOTH")
            plan = json.load(open("{self.tmp}/largeSMOOTH/result.json"))["plan_gb"]
            print("measured", status("VmHWM") - base, sum(plan.values()) * 1e9)
            """)
        write_world(self.tmp / "little", little_llama(torch.float32))
        write_world(self.tmp / "large", little_llama(torch.float32, vocab_size=8192, hidden_size=512,
                                                     num_hidden_layers=8, intermediate_size=2048))
        for smooth in ("none", "sam"):
            run = subprocess.run([sys.executable, "-c", code.replace("SMOOTH", smooth)], cwd=ROOT, text=True,
                                 capture_output=True)
            self.assertEqual(run.returncode, 0, run.stderr)
            measured, planned = map(float, run.stdout.split("measured")[1].split())
            self.assertAlmostEqual(planned / measured, 1, delta=0.15, msg=smooth)
            print(f"[{smooth}: planned {planned / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB]", end=" ",
                  file=sys.stderr)

    def broken_off(self, at, *flags):
        """Run unlearn.py in this process and interrupt it in step `at`, counted from 1."""
        count, clip = itertools.count(1), torch.nn.utils.clip_grad_norm_

        def clip_or_die(*args):
            if next(count) == at:
                raise KeyboardInterrupt
            return clip(*args)
        with mock.patch.object(torch.nn.utils, "clip_grad_norm_", clip_or_die), self.assertRaises(KeyboardInterrupt):
            self.run_here(*flags)

    def test_a_resumed_run_is_bitwise_the_unbroken_one(self):
        flags = write_world(self.tmp, little_llama(torch.float32))
        for smooth in ("sam+wa", "rs+wa", "cr"):
            more = ["--smooth", smooth, "--eval_every", 2, *(["--wa_start", 1, "--wa_every", 1] if "wa" in smooth else [])]
            self.run_here(*flags, *more, "--out", self.tmp / "whole", "--overwrite")
            self.broken_off(5, *flags, *more, "--out", self.tmp / smooth, "--save_every", 3)
            self.assertFalse((self.tmp / smooth).exists())
            self.run_here(*flags, *more, "--out", self.tmp / smooth, "--resume")
            a, b = (json.loads((self.tmp / n / "result.json").read_text())["curve"] for n in ("whole", smooth))
            for p in a + b:
                del p["seconds"]
            self.assertEqual(a, b)
            a, b = ((self.tmp / n / "model.safetensors").read_bytes() for n in ("whole", smooth))
            self.assertTrue(a == b, smooth)
            self.assertFalse(list(self.tmp.glob("*.state.*")))                     # no longer needed: removed

    def test_a_saved_state_is_whole_or_as_it_was_and_guards_its_run(self):
        flags = [*write_world(self.tmp, little_llama(torch.float32)), "--out", self.tmp / "run", "--save_every", 1]
        self.broken_off(2, *flags)
        state = self.tmp / "run.state.safetensors"
        kept = state.read_bytes()
        with safe_open(state, "pt") as file:                              # any reader of safetensors can read it
            self.assertEqual(file.get_tensor("step.model.norm.weight"), 1)
            self.assertEqual(file.get_slice("exp_avg.lm_head.weight").get_shape(), [len(words()), 16])
        self.run_here(*flags, said="--resume")
        self.run_here(*flags, "--resume", "--lr", 1e-3, said="--lr 0.0003")
        count = itertools.count()
        with mock.patch.object(evaluate, "whole", side_effect=lambda t: t if next(count) < 20 else exit("full disk")):
            TestScripts.here(self, "unlearn.py", *flags, "--resume")               # breaks off in the middle
        self.assertEqual(state.read_bytes(), kept)
        self.run_here(*flags, "--resume")
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
                 "dpo": [*flags, "--loss", "dpo", "--gradient_checkpointing"]}
        for name, job in jobs.items():
            self.run_here(*job, "--out", self.tmp / f"one-{name}")
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
            from_pretrained, clip = evaluate.AutoModelForCausalLM.from_pretrained, torch.nn.utils.clip_grad_norm_
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
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "drive.py"]
        run = subprocess.run(launch, cwd=self.tmp, capture_output=True, text=True)
        self.assertEqual(run.returncode, 0, run.stderr[-3000:])
        self.run_here(*jobs["rs"], "--out", self.tmp / "one-resumed", "--resume")
        same = {f"two-{name}": f"one-{name}" for name in jobs} | {"two-resumed": "one-wa", "one-resumed": "one-rs"}
        for got, want in same.items():
            got, want = self.weights(got), self.weights(want)
            self.assertEqual(got.keys(), want.keys())
            torch.testing.assert_close(flat(got.values()), flat(want.values()), rtol=0, atol=1e-5)
        self.assertEqual(json.loads((self.tmp / "two-sam" / "result.json").read_text())["processes"], 2)
        self.assertEqual(run.stdout.count("after   UE"), len(jobs) + 1)              # only one process prints

        for name, more in (("relearn.py", ["--samples", 2, 3, "--lr", 0.01]), ("evaluate.py", [])):
            status, _, err = TestScripts.here(self, name, self.tmp / "one-sam", *more)
            self.assertEqual(status, 0, err)
        rows = [evaluate.columns(self.tmp / run, json.loads((self.tmp / run / "evaluate.json").read_text())["metrics"])
                for run in ("one-sam", "two-sam")]                                   # with those of relearn.json
        self.assertEqual(rows[0].keys(), rows[1].keys())
        self.assertTrue({"UE 2", "UE 3", "open_forget", "ppl_retain"} <= rows[0].keys())
        for key, value in rows[0].items():
            self.assertAlmostEqual(rows[1][key], value, delta=1e-4 * abs(value), msg=key)

        # a process keeps its part, and no two hold a whole model at once
        (loads, held), (other_loads, _) = (json.loads((self.tmp / f"rank{r}.json").read_text()) for r in (0, 1))
        self.assertTrue(all(0.4 < part < 0.6 for part in held))
        self.assertEqual(len(loads), len(other_loads))
        self.assertTrue(all(a[1] <= b[0] or b[1] <= a[0] for a in loads for b in other_loads))


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

    def here(self, name, *flags):
        """Run a script inside this process (no import time); returns (exit status, stdout, stderr)."""
        out, err, status = io.StringIO(), io.StringIO(), 0
        with mock.patch.object(sys, "argv", [name, *map(str, flags)]), contextlib.redirect_stdout(out), \
                contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(ROOT / name), run_name="__main__")
            except SystemExit as e:
                status = e.code
        return status, out.getvalue(), err.getvalue()

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
        for n, flags in enumerate(combos):
            result, folder = self.unlearned(f"c{n}", "--steps", 2, "--no-relearn", "--warmup", 0, *flags)
            model = evaluate.load_model(folder)[0]
            moved = [k for (k, a), b in zip(start.named_parameters(), model.parameters())
                     if not torch.equal(a, b)]
            self.assertTrue(moved, flags)
            if "rmu" in flags:
                self.assertEqual(moved, ["model.layers.0.mlp.down_proj.weight"])
            self.assertTrue(all(math.isfinite(v) for p in result["curve"] for v in p.values()), flags)

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
        for name, flags in (("relearn.py", ["nowhere"]),
                            ("relearn.py", [self.data / "target", "--data", self.data, "--samples", 999]),
                            ("evaluate.py", ["nowhere"]),
                            ("evaluate.py", [self.data / "target"] * 2 + ["--data", self.data])):
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
