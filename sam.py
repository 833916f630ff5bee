"""Smoothed gradients for unlearning that lasts: SAM, RS, GP, CR, weight averaging. Needs only torch; copy it.

A relearning attack is a small move of the weights. Each smoother turns the forget gradient g at theta into
one that also holds nearby (arXiv 2502.05374, section 5; v = g/||g||, one global norm over all trainable
parameters):

    SAM   g(theta + rho v)                                         2 passes   paper rho = 0.01 (7B)
          v = sign(g), other directions: class SAM              1, 2 passes   not in the paper
    RS    mean of g(theta + sigma z) over K draws, z ~ N(0, I)     K passes   paper sigma = 1e-4, K = 3
    GP    gradient of l + lam ||g||                                2 passes
    CR    gradient of l + lam ||g(theta + mu v) - g(theta)||       4 passes
    WA    no change to a step; save the running mean of theta      1 pass     last fifth of training

In your own loop, the retain gradient at the unperturbed weights:

    sam = SAM(model.parameters(), rho=0.01)
    forget_loss().backward()
    with sam.perturbed():                  # ascent; restores bit for bit on the way out, also on an exception
        forget_loss().backward()
    (gamma * retain_loss()).backward()     # accumulates onto the SAM gradient
    optimizer.step(); optimizer.zero_grad()

Or give any smoother a closure that runs forward and backward of the whole forget batch, *adds* its gradient
to p.grad and returns the loss: `loss = smoother(closure)` leaves the smoothed gradient in p.grad and returns
the loss at theta; RS and the directions of SAM without a pass there, that at the perturbed weights. p.grad
must be empty before. unlearn.py is the worked example.

Precision: the perturbation is rounded to the parameter's dtype. `stats` says what was really applied: its
norm and its cosine with v. In bf16 and with a small rho both can be far from what was asked for.
Memory: SAM needs weights + gradient + saved weights; the ascent gradient's memory becomes the saved copy.
Momentum keeps its directions as well: a byte a weight with linf.
Speed: with kernels/ beside this file and parameters on a GPU, each operation on the weights is one launch.
"""
import functools, importlib.util, os, types
from contextlib import contextmanager
from pathlib import Path

import torch


# ---- five operations on lists of tensors; kernels/multi_tensor.py has the same ones in Triton --------------

def accumulator(dtype):
    """The dtype to compute in: fp32 for half precision and fp32, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def local(t):
    """What this process holds of a tensor that FSDP2 spreads over processes (a DTensor); else the tensor."""
    return t.to_local() if hasattr(t, "to_local") else t


def local_rows(t, whole):
    """The rows of `whole` (or of anything sliced like a tensor of t's shape) that t holds in this process."""
    if not hasattr(t, "to_local"):
        return whole[...]
    mesh = t.device_mesh
    first = min(len(t), mesh.get_local_rank() * -(-len(t) // mesh.size()))      # FSDP2 cuts like torch.chunk
    return whole[first:first + len(t.to_local())]


def over_processes(sums, tensors):
    """Sums over local(t) of tensors -> sums over all of each t: added up in place where they are spread."""
    spread = [t for t in tensors if hasattr(t, "to_local")]
    if spread:
        torch.distributed.all_reduce(sums, group=spread[0].device_mesh.get_group())
    return sums


def global_norm(tensors):
    """||.||_2 over all tensors together: 0-dim, fp32 (fp64 for fp64 input), on the device of the first."""
    if not tensors:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(local(t), dtype=accumulator(t.dtype)) for t in tensors]
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    return over_processes(norm.square(), tensors).sqrt() if hasattr(tensors[0], "to_local") else norm


def pieces(p, *others):
    """Views of some rows of p and of each tensor of its shape, for a pass of several operations: small enough
    for a CPU's cache, elsewhere 2^24 elements, which bounds what the operations allocate."""
    tensors, size = [local(t) for t in (p, *others)], 2**17 if p.device.type == "cpu" else 2**24
    if not p.dim():
        return [tensors]
    rows = max(1, size * len(tensors[0]) // max(1, tensors[0].numel()))
    return zip(*(t.split(rows) for t in tensors))


@torch.no_grad()
def ascent_(params, directions, rho, saved, reuse=True, eps=1e-12, linf=False):
    """theta <- theta + rho d / (||d|| + eps) in place, or with linf theta <- theta + rho sign(d). Returns
    0-dim {norm, applied_norm, cosine}: of d or sign(d), of the step that rounding left, and between the two.

    directions: gradients, or with linf also signs kept from earlier ones, g.sign().to(torch.int8).
    saved: a list that grows by (parameter, old weights) *before* a parameter moves, so that restore_(saved)
    is right even when this function is interrupted. reuse: the old weights go into the direction's own memory
    where the dtypes agree (its values are lost); otherwise into a copy. A zero or non-finite norm moves
    nothing; with linf a non-finite element does not move, and the norm returned is nan. No host sync.
    """
    norm = torch.zeros((), device=params[0].device if params else None) if linf else global_norm(directions)
    ok = torch.isfinite(norm) & (norm > 0)
    scale = torch.where(ok, rho / (norm + eps), 0.0)
    sums = []                                # of step^2, step * d and sign^2, three for each piece
    for p, d in (pair for both in zip(params, directions) for pair in pieces(*both)):
        wide = d.to(accumulator(p.dtype))
        if linf:
            move, s = wide.isfinite(), rho
            wide = torch.where(move, wide.sign(), torch.nan)
        else:
            move, s = ok.to(p.device), scale.to(p.device)
        old = p.to(wide.dtype)
        new = torch.where(move, old + s * wide, old).to(p.dtype)
        step = (new.to(wide.dtype) - old).flatten()            # what survived the rounding
        sums.append(torch.stack([step.dot(step), step.dot(wide.flatten()),
                                 wide.square().sum() if linf else step.new_zeros(())]).to(norm.device))
        if reuse and d.dtype == p.dtype:
            saved.append((p, d.copy_(p)))
        else:
            saved.append((p, p.clone()))
        p.copy_(new)
    moved, along, signs = over_processes(torch.stack(sums).sum(0), params) if sums else (norm, norm, norm)
    applied, norm = moved.sqrt(), signs.sqrt() if linf else norm
    cosine = torch.where((applied > 0) & (norm > 0), along / (applied * norm), 0.0)
    return {"norm": norm, "applied_norm": applied, "cosine": cosine}


@torch.no_grad()
def restore_(saved):
    """Copy the old weights back, bit for bit, and empty the list. A copy, never a subtraction."""
    if saved:
        torch._foreach_copy_([local(p) for p, _ in saved], [local(w) for _, w in saved])
    saved.clear()


@torch.no_grad()
def noise_(params, sigma, seed):
    """theta <- theta + sigma * z in place, z ~ N(0, I). Same seed, same device: same noise."""
    generators = {}
    for p in params:
        if p.device not in generators:
            generators[p.device] = torch.Generator(p.device).manual_seed(seed)
        z = torch.randn(p.shape, generator=generators[p.device], device=p.device, dtype=accumulator(p.dtype))
        p, z = local(p), local_rows(p, z)    # z is whole in every process: the same for any number of them
        p.copy_(p.to(z.dtype) + sigma * z)


@torch.no_grad()
def running_mean_(mean, params, count):
    """mean <- mean + (theta - mean) / count in place, for the count-th weights; mean is fp32 or wider."""
    for m, p in zip(map(local, mean), map(local, params)):
        m.add_((p.to(m.dtype) - m) / count)


@functools.cache
def kernel_file(name):
    """kernels/NAME.py beside this file as a module: by path, as `import kernels` may find another package.
    FileNotFoundError without the file, ImportError without triton."""
    path = Path(__file__).resolve().parent / "kernels" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def operations(params, triton=None):
    """(whose ascent_, restore_, noise_ and running_mean_ to use on params, why): kernels/multi_tensor.py or
    the torch ones above. triton: True = the kernels, ValueError where they cannot run; False = torch; None =
    the kernels if all parameters are on a GPU, or (slow, on the CPU, for tests) if TRITON_INTERPRET=1."""
    why = "asked for" if triton is False else "the parameters are not on a GPU"
    automatic = all(p.is_cuda for p in params) or os.environ.get("TRITON_INTERPRET") == "1"
    if triton or (triton is None and automatic):
        try:
            kernels = kernel_file("multi_tensor")
            why = kernels.usable(params)
        except (ImportError, FileNotFoundError) as e:
            why = str(e)
        if why is None:
            return kernels, "by the interpreter" if kernels.INTERPRETED else "the parameters are on a GPU"
        if triton:
            raise ValueError(f"the Triton kernels cannot run here: {why}")
    return types.SimpleNamespace(__name__="torch", ascent_=ascent_, restore_=restore_, noise_=noise_,
                                 running_mean_=running_mean_), why


# ---- helpers on p.grad ------------------------------------------------------------------------------------

def trainable(params):
    """The parameters that train, each once (tied weights are one tensor), in the order given."""
    return list({id(p): p for p in params if p.requires_grad}.values())


def take_grads(params):
    """Move the gradients out of p.grad, which is None after: {parameter: gradient} where there is one."""
    grads = {p: p.grad for p in params if p.grad is not None}
    for p in params:
        p.grad = None
    return grads


@torch.no_grad()
def combine(params, terms):
    """p.grad <- sum of coefficient * gradient over terms = [(coefficient, {parameter: gradient})]."""
    for p in params:
        parts = [(c, g[p]) for c, g in terms if p in g]
        wide = [c * g.to(accumulator(g.dtype)) for c, g in parts]
        p.grad = sum(wide[1:], wide[0]).to(parts[0][1].dtype) if parts else None


# ---- the smoothers ----------------------------------------------------------------------------------------

class SAM:
    """Sharpness-aware minimization (arXiv 2010.01412): the gradient at theta + rho v.

    params: all trainable parameters; their gradients at theta must not leak into the result, so name all of
    them. rho: radius >= 0. perturb: a subset to perturb (None = all). flip: perturb along -v, a control that
    should do worse than no SAM at all. norm: l2, v = d/||d|| with one norm over the subset; or linf, v =
    sign(d), so that every weight moves by rho. direction:

        gradient    d = g(theta), the paper's SAM                                             2 passes
        momentum    d = the gradient that the last call returned, kept as int8 signs (l2: whole); the first
                    call perturbs nothing                                                     1 pass
        lookahead   `lookahead_steps` steps of rho/steps down the attacker's own loss      1 + steps passes
        random      d ~ N(0, I), a control: the same size without the direction                1 pass

    triton, also below: see operations(). stats: after a step {norm, applied_norm, cosine} as 0-dim tensors
    (reading one stalls a GPU): of d or its signs, of what was applied, between the two; of lookahead's last
    step. A norm of inf or nan says that the gradient was so; momentum's int8 signs cannot tell.
    """

    def __init__(self, params, rho=0.01, norm="l2", direction="gradient", perturb=None, flip=False,
                 lookahead_steps=1, seed=0, triton=None):
        if not rho >= 0 or norm not in ("l2", "linf") or lookahead_steps < 1:
            raise ValueError(f"SAM: rho must be 0 or more, norm l2 or linf, and lookahead_steps 1 or more, "
                             f"got {rho}, {norm} and {lookahead_steps}")
        if direction not in ("gradient", "momentum", "lookahead", "random"):
            raise ValueError(f"SAM: {direction} is not one of gradient, momentum, lookahead, random")
        self.params, self.rho, self.sign = trainable(params), rho, -1.0 if flip else 1.0
        self.perturb = self.params if perturb is None else trainable(perturb)
        self.linf, self.direction, self.steps = norm == "linf", direction, lookahead_steps
        self.kept, self.seed, self.draws = {}, seed, 0            # kept: the directions of momentum
        self.saved, self.stats, self.ops = [], {}, operations(self.params, triton)[0]

    def ascent(self, directions=None):
        """Move the weights by rho along `directions` ({parameter: tensor}, kept), by default along p.grad,
        whose memory then holds the old weights. p.grad is None afterwards."""
        own = directions is None
        if self.saved:
            raise RuntimeError("SAM: the weights are perturbed already; restore() first")
        if own and self.direction != "gradient":
            raise RuntimeError(f"SAM: {self.direction} does not follow p.grad: call it, loss = sam(closure)")
        grads = take_grads(self.params)
        self.move(grads if own else directions, self.sign * self.rho, self.saved, own)

    def move(self, directions, radius, saved, reuse):
        """One step of ascent_ on those of self.perturb that have a direction."""
        params = [p for p in self.perturb if p in directions]
        along = [directions[p] for p in params]
        self.stats = self.ops.ascent_(params, along, radius, saved, reuse=reuse, linf=self.linf)
        self.stats["cosine"] = self.stats["cosine"] * (-1 if radius < 0 else 1)      # with what was asked for

    def restore(self):
        """Put the weights back, bit for bit."""
        self.ops.restore_(self.saved)

    @contextmanager
    def perturbed(self, directions=None):
        """ascent on the way in, restore on the way out, whatever happens in between or during the ascent."""
        try:
            self.ascent(directions)
            yield self
        finally:
            self.restore()

    def __call__(self, closure, attack=None):
        """p.grad <- g(theta + rho v). attack, for lookahead: like closure, for the attacker's loss on samples
        of its own. Returns the loss at theta with gradient, else that of the last pass, at theta + rho v."""
        if self.direction == "lookahead" and attack is None:
            raise ValueError("SAM: lookahead needs the attacker's loss: smoother(closure, attack)")
        if self.saved:
            raise RuntimeError("SAM: the weights are perturbed already; restore() first")
        loss = None
        try:
            if self.direction == "gradient":
                loss = closure()
                self.ascent()
            elif self.direction == "momentum":
                self.ascent(self.kept)
            elif self.direction == "random":
                noise, self.draws = [torch.zeros_like(p) for p in self.perturb], self.draws + 1
                self.ops.noise_(noise, 1.0, (self.seed * 1_000_003 + self.draws) % 2**63)
                self.move(dict(zip(self.perturb, noise)), self.sign * self.rho, self.saved, reuse=True)
            else:
                self.saved.extend((p, p.detach().clone()) for p in self.perturb)
                for _ in range(self.steps):
                    attack()
                    self.move(take_grads(self.params), -self.sign * self.rho / self.steps, [], reuse=True)
            there = closure()
        finally:
            self.restore()
        if self.direction == "momentum":
            grads = {p: p.grad for p in self.perturb if p.grad is not None}
            self.kept = {p: g.sign().to(torch.int8) if self.linf else g.clone() for p, g in grads.items()}
        return there if loss is None else loss


class RS:
    """Randomized smoothing (arXiv 1902.02918): mean of g(theta + sigma z) over `samples` draws, z ~ N(0, I).

    The k-th draw since the start is seeded by (seed, k). The loss returned is the mean over the draws.
    """

    def __init__(self, params, sigma=1e-4, samples=3, seed=0, triton=None):
        if not sigma >= 0 or samples < 1:
            raise ValueError(f"RS: sigma must be 0 or more and samples 1 or more, got {sigma} and {samples}")
        self.params, self.sigma, self.samples, self.seed = trainable(params), sigma, samples, seed
        self.draws, self.stats, self.ops = 0, {}, operations(self.params, triton)[0]

    def __call__(self, closure):
        saved, losses = [(p, p.detach().clone()) for p in self.params], []
        try:
            for _ in range(self.samples):
                self.ops.noise_(self.params, self.sigma, (self.seed * 1_000_003 + self.draws) % 2**63)
                self.draws += 1
                losses.append(closure())
                self.ops.restore_(list(saved))
        finally:
            self.ops.restore_(saved)
        for p in self.params:
            if p.grad is not None:
                p.grad.div_(self.samples)
        return sum(losses) / self.samples


class GP:
    """Gradient penalty: the gradient of l + lam ||g||, that is g + lam H v, with the Hessian-vector product
    taken as (g(theta + r v) - g(theta)) / r. With lam = r it is SAM with rho = r.
    """

    def __init__(self, params, lam=0.01, radius=0.01, triton=None):
        if not lam >= 0 or not radius > 0:
            raise ValueError(f"GP: lam must be 0 or more and radius above 0, got {lam} and {radius}")
        self.sam, self.weight = SAM(params, radius, triton=triton), lam / radius
        self.params, self.stats = self.sam.params, {}

    def __call__(self, closure):
        loss = closure()
        g0 = take_grads(self.params)
        with self.sam.perturbed(g0):
            closure()
        self.stats = self.sam.stats
        terms = [(self.weight, take_grads(self.params))]
        combine(self.params, terms + [(1 - self.weight, g0)] * (self.weight != 1))
        return loss


class CR:
    """Curvature regularization: the gradient of l + lam ||d||, d = g(theta + mu v) - g(theta), v held fixed
    as in CURE (arXiv 1811.09716). With u = d/||d|| it is g + lam (H(theta + mu v) - H(theta)) u, each product
    a difference of gradients over `radius` (None = mu). Four passes.
    """

    def __init__(self, params, lam=1.0, mu=0.01, radius=None, triton=None):
        radius = mu if radius is None else radius
        if not lam >= 0 or not mu > 0 or not radius > 0:
            raise ValueError(
                f"CR: lam must be 0 or more, mu and radius above 0, got {lam}, {mu} and {radius}")
        params = trainable(params)
        self.sam, self.probe = (SAM(params, r, triton=triton) for r in (mu, radius))
        self.weight = lam / radius
        self.params, self.stats = self.sam.params, {}

    def __call__(self, closure):
        loss = closure()
        g0 = take_grads(self.params)
        with self.sam.perturbed(g0):
            closure()
            g1 = take_grads(self.params)
            combine(self.params, [(1.0, g1), (-1.0, g0)])
            d = take_grads(self.params)
            with self.probe.perturbed(d):
                closure()
                g2 = take_grads(self.params)                         # at theta + mu v + r u
        with self.probe.perturbed(d):
            closure()
            g3 = take_grads(self.params)                             # at theta + r u
        self.stats, c = self.sam.stats, self.weight
        combine(self.params, [(1.0 + c, g0), (-c, g1), (c, g2), (-c, g3)])
        return loss


class WA:
    """Weight averaging (arXiv 1803.05407): the running mean of theta in fp32 over every call of update().

    swap() writes the mean into the parameters, rounded to their dtype; the result to save and to evaluate.
    """

    def __init__(self, params, triton=None):
        self.params, self.count = trainable(params), 0
        self.ops = operations(self.params, triton)[0]
        self.mean = None                                             # allocated at the first update

    def update(self):
        """Take the current weights into the mean."""
        if self.mean is None:
            self.mean = [torch.zeros_like(p, dtype=accumulator(p.dtype)) for p in self.params]
        self.count += 1
        self.ops.running_mean_(self.mean, self.params, self.count)

    @torch.no_grad()
    def swap(self):
        """Overwrite the weights with the mean; does nothing before the first update."""
        if self.count:
            torch._foreach_copy_([local(p) for p in self.params], [local(m) for m in self.mean])


def plain(closure):
    """No smoothing: p.grad <- g(theta)."""
    return closure()


if __name__ == "__main__":
    # What a step costs beside plain npo's, taken in turns with it: python sam.py [--threads N] [--steps N]
    # "live" is measured with malloc giving every tensor pages of its own, which is slow; "resident" without.
    import argparse, resource, statistics, subprocess, sys, time
    from transformers import LlamaConfig, LlamaForCausalLM
    import unlearn

    def llama(width, layers, vocab):
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=8,
            intermediate_size=4 * width, tie_word_embeddings=False, max_position_embeddings=1024)).eval()

    def steps(model, smooth, tokens, count):
        """Median seconds of a step of npo and of npo + smooth, on 2 forget and 2 retain samples; fp32."""
        flags = {"sam": ["--sam_rho", "0.1"], "momentum": ["--sam_rho", "1e-4", "--sam_norm", "linf",
                                                           "--sam_direction", "momentum"]}.get(smooth, [])
        args = unlearn.parse_args(["--smooth", "sam" if flags else smooth, *flags, "--out", "/nowhere",
                                   "--wa_start", "0"])
        ids = torch.randint(model.config.vocab_size, (2, tokens)).tolist()
        forget, retain = (unlearn.micro_batches([(x, x) for x in ids], [0, 1], 2, 0, "cpu", ref)
                          for ref in (torch.full((2,), -9.0), None))
        params, seconds = list(model.parameters()), ([], [])
        optimizer, average = unlearn.make_optimizer(args, params), WA(params)
        smoothers = plain, unlearn.make_smoother(args, list(model.named_parameters()))
        for step in range(2 * count):
            tick = time.perf_counter()
            smoothers[step % 2](lambda: unlearn.forget_backward(model, forget, None, args))
            unlearn.retain_backward(model, retain, args)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if smooth == "wa" and step % 2:
                average.update()
            seconds[step % 2].append(time.perf_counter() - tick)
        return [statistics.median(s[min(2, count - 1):]) for s in seconds]

    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="of each kind, after two to warm up")
    parser.add_argument("--one", nargs=3, metavar=("SMOOTH", "TOKENS", "COUNT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:                                           # in a process of its own: so is its peak of memory
        torch.set_num_threads(args.threads)
        smooth, tokens, count = args.one[0], *map(int, args.one[1:])
        steps(llama(64, 1, 512), smooth, 16, 1)                # the libraries and their buffers are not ours
        with torch.no_grad():
            llama(512, 1, 512)(input_ids=torch.zeros(2, tokens, dtype=torch.int64))
        base = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        model = llama(512, 8, 8192)
        seconds = steps(model, smooth, tokens, count)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(*seconds, (peak - base) / sum(p.numel() for p in model.parameters()))
        sys.exit()
    print("2 x tokens  smoother  s/step  x npo  floor  bytes a parameter: live  resident")
    for tokens in (128, 512):
        for smooth, passes in {"none": 6, "sam": 9, "momentum": 6, "rs": 12, "gp": 9, "cr": 15,
                               "wa": 6}.items():
            one = [sys.executable, __file__, "--threads", str(args.threads), "--one", smooth, str(tokens)]
            run = lambda count, **env: map(float, subprocess.run(
                one + [str(count)], env=os.environ | env, check=True, stdout=subprocess.PIPE).stdout.split())
            npo, other, resident = run(args.steps + 2)
            *_, live = run(2, MALLOC_MMAP_THRESHOLD_="65536")
            print(f"{tokens:10d}  {smooth:8s}  {other:6.2f}  {other / npo:5.2f}  {passes / 6:5.2f}  "
                  f"{live:23.1f}  {resident:8.1f}", flush=True)
