"""Smoothed gradients for unlearning that lasts: SAM, RS, GP, CR, WA. Needs only torch; copy it.

A relearning attack is a small move of the weights. Each smoother turns the forget gradient g at theta
into one that also holds nearby (arXiv 2502.05374, section 5; v = g/||g||, one norm over all weights):

    SAM        g(theta + rho v)                                    2 passes    paper (7B): rho .01
    Momentum, Lookahead, Random: SAM along other directions   1, 2+, 1 passes  not in the paper
    RS         mean of g(theta + sigma z), z ~ N(0, I), K draws    K passes    sigma 1e-4, K = 3
    GP         gradient of l + lam ||g||                           2 passes
    CR         gradient of l + lam ||g(theta + mu v) - g(theta)||  4 passes
    WA         no change to a step; save the running mean          1 pass      last fifth of steps

In your own loop, the retain gradient at the unperturbed weights:

    sam = SAM(model.parameters(), rho=0.01)
    forget_loss().backward()
    with sam.perturbed():                  # ascent; restores bit for bit, also on an exception
        forget_loss().backward()
    (gamma * retain_loss()).backward()     # accumulates onto the SAM gradient
    optimizer.step(); optimizer.zero_grad()

Or give any smoother a closure that runs forward and backward of the whole forget batch, *adds* its
gradient to p.grad and returns the loss: `loss = smoother(closure)` adds the smoothed gradient to p.grad
and returns the loss at theta; those without a pass there (RS, Momentum, Lookahead, Random) that at the
perturbed weights. unlearn.py is the worked example. This is the way to accumulate gradients as well: all
micro-batches in one closure, or one call each; `perturbed()` takes all that p.grad holds as its direction.

A smoother also says what it did and needs: `stats` ({name: 0-dim tensor}, of the last call), `copies`
(how many tensors as large as the weights it puts aside), and `kept` ({parameter: tensor}) and `draws`
(int), which a run that is broken off has to save.

What it cannot see: parameters that are unfrozen later (make a new one), running statistics (BatchNorm's
move in the second pass, too: put such layers in eval mode), an optimizer (you call step() yourself).
Precision: a perturbation is rounded to the parameter's dtype. In bf16, and with a small rho, its norm
and direction can be far from what was asked for; stats has both.
Memory: SAM needs weights + gradient + moved weights, which take the ascent gradient's own memory.
Speed: with kernels/ beside this file and parameters on a GPU, an operation on the weights is one launch.
"""
import functools
import importlib.util
import os
import types
from contextlib import contextmanager
from pathlib import Path

import torch


# ---- five operations on lists of tensors; kernels/multi_tensor.py has the same ones in Triton ------

def accumulator(dtype):
    """The dtype to compute in: fp32 for half precision and fp32, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def is_spread(t):
    """Does FSDP2 spread this tensor over processes (DTensor)? The type first: hasattr is slow."""
    return type(t) not in (torch.Tensor, torch.nn.Parameter) and hasattr(t, "to_local")


def local(t):
    """What this process holds of a tensor that is spread; else itself."""
    return t.to_local() if is_spread(t) else t


def over_processes(sum_, tensors):
    """A sum over local(t) of tensors -> over all of each t: added up in place where they are spread."""
    spread = [t for t in tensors if is_spread(t)]
    if spread:
        torch.distributed.all_reduce(sum_, group=spread[0].device_mesh.get_group())
    return sum_


def global_norm(tensors):
    """||.||_2 over all tensors together: 0-dim, fp32 (fp64 for fp64), on the device of the first."""
    if not tensors:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(local(t), dtype=accumulator(t.dtype)) for t in tensors]
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    if is_spread(tensors[0]):
        norm = over_processes(norm.square(), tensors).sqrt()
    return norm


def pieces(*tensors):
    """Views of the same rows of each of some tensors of one shape: few enough for a CPU's cache, elsewhere
    2^24 elements, which bounds what a pass of several operations allocates."""
    tensors = [local(t) for t in tensors]
    p = tensors[0]
    if not p.dim():
        return [tensors]
    size = 2**17 if p.device.type == "cpu" else 2**24
    rows = max(1, size * len(p) // max(1, p.numel()))
    return zip(*(t.split(rows) for t in tensors))


def dots(step, d):
    """(3,) step.step, step.d and d.d of two tensors, flat."""
    step = step.flatten()
    d = d.flatten()
    return torch.stack([step.dot(step), step.dot(d), d.dot(d)])


def compared(sums, params):
    """0-dim {norm, applied_norm, cosine} of d, of step, and between them, from all dots(step, d)."""
    moved, along, size = over_processes(torch.stack(sums).sum(0), params).unbind()
    applied = moved.sqrt()
    norm = size.sqrt()
    cosine = torch.where((applied > 0) & (norm > 0), along / (applied * norm), 0.0)
    return {"norm": norm, "applied_norm": applied, "cosine": cosine}


def climb(w, d, scale, linf):
    """(w + scale d rounded to w's dtype, dots() of the step that is left and d) of one tensor; linf: of d's
    signs, and an element of d that is not finite moves nothing and makes the dots nan."""
    dtype = accumulator(w.dtype)
    old = w.to(dtype)
    if linf:
        moves = d.isfinite() if d.is_floating_point() else None
        d = d.sign().to(dtype)
        new = torch.add(old, d, alpha=scale)
        if moves is not None:
            new = torch.where(moves, new, old)
            d = torch.where(moves, d, torch.nan)
    else:
        d = d.to(dtype)
        new = torch.where(scale == 0, old, old + scale * d)          # 0 * inf would be nan
    new = new.to(w.dtype)
    return new, dots(new.to(dtype) - old, d)


@torch.no_grad()
def ascent_(params, directions, rho, saved, reuse=True, eps=1e-12, linf=False, swap=False):
    """theta <- theta + rho d / (||d|| + eps) in place; linf: theta <- theta + rho sign(d). No host sync.

    Returns 0-dim {norm, applied_norm, cosine}: of d or sign(d), of the step that rounding left, between
    them. directions: gradients, or with linf also int8 signs kept from earlier ones. saved: a list that
    grows by (parameter, old weights) *before* a parameter moves, so that restore_(saved) is right even
    when this is interrupted. reuse: what has to be written beside the weights goes into the direction's
    own memory where the dtypes agree (its values are lost), otherwise into a new tensor: the old weights,
    or with swap the moved ones, to which p.data then points: the weights are not touched. A zero or
    non-finite norm moves nothing; with linf a non-finite element does not move, and the norm is nan.
    """
    device = params[0].device if params else None
    norm = torch.zeros((), device=device) if linf else global_norm(directions)
    scale = rho if linf else torch.where(norm.isfinite() & (norm > 0), rho / (norm + eps), 0.0)
    sums = [torch.zeros(3, dtype=norm.dtype, device=device)]
    for p, d in zip(params, directions):
        alike = d.dtype == p.dtype and d.stride() == p.stride()
        beside = d if reuse and alike else torch.empty_like(p)
        if swap:
            saved.append((p, p.data))
        here = scale if linf else scale.to(p.device)
        for w, along, other in pieces(p, d, beside):
            new, products = climb(w, along, here, linf)
            sums.append(products.to(device))
            if swap:
                other.copy_(new)
            else:
                saved.append((w, other.copy_(w)))
                w.copy_(new)
        if swap:
            p.data = beside
            torch.autograd.graph.increment_version(p)            # an error in a backward pass
    stats = compared(sums, params)
    return stats if linf else stats | {"norm": norm}             # the same, but for rounding, inf and nan


@torch.no_grad()
def restore_(saved, swap=False):
    """Put back the old weights of (parameter, old weights), bit for bit, and empty the list: by a copy, or
    after ascent_(swap=True) by pointing p.data at them, which moves nothing."""
    if swap:
        for p, old in saved:
            p.data = old
        torch.autograd.graph.increment_version([p for p, _ in saved])    # an error in a backward pass
    elif saved:
        torch._foreach_copy_([local(p) for p, _ in saved], [local(w) for _, w in saved])
    saved.clear()


@torch.no_grad()
def noise_(params, sigma, seed):
    """theta <- theta + sigma * z in place, z ~ N(0, I). Same seed, same device: same noise. Returns 0-dim
    {norm, applied_norm, cosine}: of z, of the step that rounding left, between them."""
    device = params[0].device if params else None
    sums = [torch.zeros(3, device=device)]
    generators = {}
    for p in params:
        if p.device not in generators:
            generators[p.device] = torch.Generator(p.device).manual_seed(seed)
        dtype = accumulator(p.dtype)
        z = torch.randn(p.shape, generator=generators[p.device], device=p.device, dtype=dtype)
        if is_spread(p):                 # z is whole in every process: the same for any number of them
            from torch.distributed.tensor import distribute_tensor
            z = distribute_tensor(z, p.device_mesh, p.placements, src_data_rank=None)
        p = local(p)
        z = local(z)
        old = p.to(dtype, copy=True)
        p.copy_(old + sigma * z)
        sums.append(dots(p.to(dtype) - old, z).to(device))
    return compared(sums, params)


@torch.no_grad()
def running_mean_(mean, params, count):
    """mean <- mean + (theta - mean) / count in place, for the count-th weights; mean is fp32 or wider."""
    for m, p in zip(map(local, mean), map(local, params)):
        m.add_((p.to(m.dtype) - m) / count)


@functools.cache
def kernel_file(name):
    """kernels/NAME.py beside this file as a module: by path, as `import kernels` may find another
    package. FileNotFoundError without the file, ImportError without triton."""
    path = Path(__file__).resolve().parent / "kernels" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def operations(params, triton=None):
    """(whose ascent_, restore_, noise_, running_mean_ and global_norm to use on params, why):
    kernels/multi_tensor.py or the torch ones above. triton: True = the kernels, ValueError where they
    cannot run; False = torch; None = the kernels if all parameters are on a GPU, or if TRITON_INTERPRET=1
    (slow, for tests)."""
    plain = types.SimpleNamespace(__name__="torch", ascent_=ascent_, restore_=restore_, noise_=noise_,
                                  running_mean_=running_mean_, global_norm=global_norm)
    if triton is False:
        return plain, "asked for"
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    if triton is None and not interpret and not all(p.is_cuda for p in params):
        return plain, "the parameters are not on a GPU"
    try:
        kernels = kernel_file("multi_tensor")
        problem = kernels.usable(params)
    except (ImportError, FileNotFoundError) as e:
        problem = str(e)
    if problem is None:
        return kernels, "by the interpreter" if kernels.INTERPRETED else "the parameters are on a GPU"
    if triton:
        raise ValueError(f"the Triton kernels cannot run here: {problem}")
    return plain, problem


# ---- helpers on p.grad -----------------------------------------------------------------------------

def trainable(params):
    """The parameters that train, each once (tied weights are one tensor), in the order given."""
    params = list(params)
    for p in params:
        if not isinstance(p, torch.Tensor):
            raise ValueError(f"give model.parameters(): a list of tensors, found a {type(p).__name__}")
        if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
            raise ValueError("FSDP1's parameters are parts that nobody can tell from the whole: use "
                             "fully_shard (FSDP2)")
    found = list({id(p): p for p in params if p.requires_grad}.values())
    if not found:
        raise ValueError("none of the parameters requires a gradient")
    spans = []
    for p in map(local, found):
        if p.numel() and p.device.type != "meta":
            spans.append((p.data_ptr(), p.data_ptr() + p.nbytes))
    spans.sort()
    if any(before[1] > after[0] for before, after in zip(spans, spans[1:])):
        raise ValueError("two parameters share memory: tie weights by using one Parameter twice")
    return found


def take_grads(params):
    """Move the gradients out of p.grad, which is None after: {parameter: gradient} where there is one. A
    gradient in somebody else's memory (a view, as of DDP's buckets, or shared) is copied: that memory will
    be written to."""
    grads = {}
    memories = set()
    for p in params:
        g = p.grad
        p.grad = None
        if g is None:
            continue
        if g.is_sparse:
            raise ValueError("gradients must be dense: use sparse=False for the embedding")
        if not is_spread(g):                                     # FSDP2's are new at every step
            memory = g.untyped_storage().data_ptr()
            if g._is_view() or memory in memories:
                g = g.clone()
            memories.add(memory)
        grads[p] = g
    return grads


def on_top(call):
    """For a smoother's __call__: what p.grad held before is set aside, and added to p.grad after."""
    @functools.wraps(call)
    def called(self, *args):
        held = take_grads(self.params)
        try:
            return call(self, *args)
        finally:
            for p, g in held.items():
                p.grad = g if p.grad is None else p.grad + g
    return called


@torch.no_grad()
def combine(params, terms):
    """p.grad <- sum of coefficient * gradient over terms = [(coefficient, {parameter: gradient})]."""
    for p in params:
        parts = [(c, grads[p]) for c, grads in terms if p in grads]
        wide = [c * g.to(accumulator(g.dtype)) for c, g in parts]
        p.grad = sum(wide[1:], wide[0]).to(parts[0][1].dtype) if parts else None


# ---- the smoothers ---------------------------------------------------------------------------------

class Plain:
    """No smoothing: p.grad <- g(theta)."""
    copies = 0

    def __call__(self, closure):
        return closure()


class SAM:
    """Sharpness-aware minimization (arXiv 2010.01412): the gradient at theta + rho v.

    params: all trainable parameters; their gradients at theta must not leak into the result, so name all.
    rho: radius >= 0. norm: l2, v = d/||d||, one norm over what is perturbed; linf, v = sign(d): every
    weight moves by rho. Here d = g(theta). perturb: a subset to perturb (None = all). flip: along -v, a
    control that should do worse than no SAM at all. triton, also below: see operations().

    stats: 0-dim {norm, asked_norm, applied_norm, cosine}: of d or its signs, of rho v, of the step that
    was applied, of that step with v. Reading one stalls a GPU. A norm of inf or nan says that d was so.
    length: with l2, a function of {parameter: d} to a 0-dim tensor, which rho then bounds instead of ||d||.
    swap: the weights are never written: the moved ones take the memory of d, and p.data points there until
    restore(). Set SAM.swap = False where somebody keeps addresses: a CUDA graph of the forward pass, a flat
    buffer that is read instead of the parameters. FSDP2's shards are moved in place.
    """
    copies = 1
    length = None
    swap = True

    def __init__(self, params, rho=0.01, norm="l2", perturb=None, flip=False, triton=None):
        if not isinstance(rho, (int, float)) or not rho >= 0 or norm not in ("l2", "linf"):
            raise ValueError(f"SAM: rho must be a number of 0 or more, norm l2 or linf, got {rho} and {norm}")
        self.params = trainable(params)
        self.perturb = self.params if perturb is None else trainable(perturb)
        if not {*self.perturb} <= {*self.params}:
            raise ValueError("SAM: perturb has parameters that params has not")
        self.radius = -rho if flip else rho
        self.linf = norm == "linf"
        self.swap = self.swap and not any(map(is_spread, self.perturb))
        self.saved = []
        self.stats = {}
        self.ops = operations(self.params, triton)[0]

    def refuse_twice(self):
        if self.saved:
            raise RuntimeError("SAM: the weights are perturbed already; restore() first")

    def ascent(self, directions=None):
        """Move the weights by rho along `directions` ({parameter: tensor}, kept), by default along
        p.grad, whose memory is then used. p.grad is None afterwards."""
        self.refuse_twice()
        grads = take_grads(self.params)
        own = directions is None
        self.move(grads if own else directions, self.radius, self.saved, reuse=own)

    def move(self, directions, radius, saved, reuse=True):
        """One step of ascent_ on those of self.perturb that have a direction."""
        params = [p for p in self.perturb if p in directions]
        along = [directions[p] for p in params]
        flipped = radius < 0
        if self.length:
            length = self.length(dict(zip(params, along)))
            radius = radius * torch.where(length > 0, global_norm(along) / length, 0.0)
        stats = self.ops.ascent_(params, along, radius, saved, reuse=reuse, linf=self.linf, swap=self.swap)
        stats["asked_norm"] = abs(radius) * (stats["norm"] if self.linf else stats["norm"] > 0)
        if flipped:
            stats["cosine"] = -stats["cosine"]                   # with what was asked for
        self.stats = stats
        torch.clear_autocast_cache()                             # it holds casts of the weights as they were

    def restore(self):
        """Put the weights back, bit for bit."""
        self.ops.restore_(self.saved, swap=self.swap)
        torch.clear_autocast_cache()

    @contextmanager
    def perturbed(self, directions=None):
        """ascent on the way in, restore on the way out, whatever happens in between or in the ascent."""
        self.refuse_twice()
        try:
            self.ascent(directions)
            yield self
        finally:
            self.restore()

    @on_top
    def __call__(self, closure):
        self.refuse_twice()
        loss = closure()
        with self.perturbed():
            closure()
        return loss


class Momentum(SAM):
    """SAM along d = the gradient that the last call returned, one pass; the first call moves nothing, nor
    does the one after an exception. `kept` holds d between calls: with linf its signs as int8 (which
    cannot tell inf and nan), else whole."""

    def __init__(self, params, *args, **more):
        super().__init__(params, *args, **more)
        self.kept = {}

    def take_kept(self):
        """Move the directions out of `kept`, so that they are gone when the pass needs the memory."""
        kept = self.kept
        self.kept = {}
        return kept

    @on_top
    def __call__(self, closure):
        self.refuse_twice()
        try:
            self.move(self.take_kept(), self.radius, self.saved)
            loss = closure()
        finally:
            self.restore()
        for p in self.perturb:
            if p.grad is not None:
                self.kept[p] = signs(p.grad) if self.linf else p.grad.clone()
        return loss


def signs(g):
    """The signs of a tensor as int8."""
    out = torch.empty_like(g, dtype=torch.int8)
    for to, part in pieces(out, g):
        to.copy_(part.sign())
    return out


class Lookahead(SAM):
    """SAM at `steps` steps of rho/steps down the attacker's own loss: 1 + steps passes; stats of the last."""

    def __init__(self, params, *args, steps=1, **more):
        super().__init__(params, *args, **more)
        if steps < 1:
            raise ValueError(f"Lookahead: steps must be 1 or more, got {steps}")
        self.steps = steps

    @on_top
    def __call__(self, closure, attack):
        """attack: like closure, for the attacker's loss on samples of its own."""
        self.refuse_twice()
        try:
            for p in self.perturb:
                self.saved.append((p, p.data if self.swap else p.detach().clone()))
            for _ in range(self.steps):
                attack()
                self.move(take_grads(self.params), -self.radius / self.steps, saved=[])
            return closure()
        finally:
            self.restore()


class Random(SAM):
    """SAM along d ~ N(0, I), a control: the same size without the direction. One pass."""

    def __init__(self, params, *args, seed=0, **more):
        super().__init__(params, *args, **more)
        self.seed = seed
        self.draws = 0

    @on_top
    def __call__(self, closure):
        self.refuse_twice()
        noise = [torch.zeros_like(p) for p in self.perturb]
        self.draws += 1
        self.ops.noise_(noise, 1.0, draw_seed(self.seed, self.draws))
        for p, z in zip(self.perturb, noise):
            p.grad = z
        with self.perturbed():
            return closure()


def draw_seed(seed, draw):
    """The seed of the draw-th noise of a run."""
    return (seed * 1_000_003 + draw) % 2**63


class RS:
    """Randomized smoothing (arXiv 1902.02918): mean of g(theta + sigma z) over `samples` draws, z ~
    N(0, I). The k-th draw since the start is seeded by (seed, k). The loss is the mean over the draws."""
    copies = 1

    def __init__(self, params, sigma=1e-4, samples=3, seed=0, triton=None):
        if not sigma >= 0 or samples < 1:
            raise ValueError(f"RS: sigma must be 0 or more, samples 1 or more, got {sigma}, {samples}")
        self.params = trainable(params)
        self.sigma = sigma
        self.samples = samples
        self.seed = seed
        self.draws = 0
        self.stats = {}
        self.ops = operations(self.params, triton)[0]

    @on_top
    def __call__(self, closure):
        saved = [(p, p.detach().clone()) for p in self.params]
        losses = []
        try:
            for _ in range(self.samples):
                stats = self.ops.noise_(self.params, self.sigma, draw_seed(self.seed, self.draws))
                self.stats = stats | {"asked_norm": self.sigma * stats["norm"]}      # of the last draw
                self.draws += 1
                torch.clear_autocast_cache()
                losses.append(closure())
                self.ops.restore_(list(saved))
        finally:
            self.ops.restore_(saved)
            torch.clear_autocast_cache()
        for p in self.params:
            if p.grad is not None:
                p.grad.div_(self.samples)
        return sum(losses) / self.samples


class GP:
    """Gradient penalty: the gradient of l + lam ||g||, that is g + lam H v, with the Hessian-vector
    product taken as (g(theta + r v) - g(theta)) / r. With lam = r it is SAM with rho = r."""
    copies = 2

    def __init__(self, params, lam=0.01, radius=0.01, triton=None):
        if not lam >= 0 or not radius > 0:
            raise ValueError(f"GP: lam must be 0 or more, radius above 0, got {lam} and {radius}")
        self.sam = SAM(params, radius, triton=triton)
        self.params = self.sam.params
        self.weight = lam / radius
        self.stats = {}

    @on_top
    def __call__(self, closure):
        loss = closure()
        here = take_grads(self.params)
        with self.sam.perturbed(here):
            closure()
        self.stats = self.sam.stats
        terms = [(self.weight, take_grads(self.params))]
        if self.weight != 1:
            terms.append((1 - self.weight, here))
        combine(self.params, terms)
        return loss


class CR:
    """Curvature regularization: the gradient of l + lam ||d||, d = g(theta + mu v) - g(theta), v held
    fixed as in CURE (arXiv 1811.09716). With u = d/||d|| it is g + lam (H(theta + mu v) - H(theta)) u,
    each product a difference of gradients over `radius` (None = mu)."""
    copies = 5

    def __init__(self, params, lam=1.0, mu=0.01, radius=None, triton=None):
        radius = mu if radius is None else radius
        if not lam >= 0 or not mu > 0 or not radius > 0:
            raise ValueError(f"CR: lam >= 0, mu > 0, radius > 0, got {lam}, {mu} and {radius}")
        self.params = trainable(params)
        self.sam = SAM(self.params, mu, triton=triton)
        self.probe = SAM(self.params, radius, triton=triton)
        self.weight = lam / radius
        self.stats = {}

    @on_top
    def __call__(self, closure):
        loss = closure()
        g0 = take_grads(self.params)
        with self.sam.perturbed(g0):
            closure()
            g1 = take_grads(self.params)                         # at theta + mu v
            combine(self.params, [(1.0, g1), (-1.0, g0)])
            d = take_grads(self.params)
            with self.probe.perturbed(d):
                closure()
                g2 = take_grads(self.params)                     # at theta + mu v + r u
        with self.probe.perturbed(d):
            closure()
            g3 = take_grads(self.params)                         # at theta + r u
        self.stats = self.sam.stats
        c = self.weight
        combine(self.params, [(1.0 + c, g0), (-c, g1), (c, g2), (-c, g3)])
        return loss


class WA:
    """Weight averaging (arXiv 1803.05407): the running mean of theta in fp32 over every update().
    swap() writes it into the parameters, rounded to their dtype: the result to save and to evaluate."""

    def __init__(self, params, triton=None):
        self.params = trainable(params)
        self.count = 0
        self.mean = None                                         # allocated at the first update
        self.ops = operations(self.params, triton)[0]

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
            torch.clear_autocast_cache()
