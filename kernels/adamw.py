"""AdamW for all parameters in one launch, with stochastic rounding of bf16 weights. Copy it alone.

    optimizer = AdamW(model.parameters(), lr=5e-6, stochastic_rounding=True)   # as torch.optim.AdamW

WHY. Around 0.02 neighbouring bf16 numbers lie 1.2e-4 apart, and a step of AdamW at lr 5e-6 moves a
weight by about 5e-6: round-to-nearest puts it back where it was, at every step. Stochastic rounding
moves it to the next number in 1 of 24 steps, so that the expected weight is right.
HOW. A table of addresses, a grid of chunks (as in multi_tensor.py, which has more on it). Every tensor
names its hyper-parameters too, so that parameter groups do not add launches. Without a GPU or without
Triton the same numbers come from torch, one tensor after the other.
CLIPPING. The kernel takes the clipped gradient's factor from the device, nothing waits for it:

    optimizer.step(coefficient=clip_coefficient(norm, 1.0))    # norm: of all gradients, 0-dim

Bytes moved a parameter: 14 in bf16 with bf16 moments (read w, g, m, v, write w, m, v), 22 with fp32
moments, 28 in fp32. Clipping adds the norm's 2 in bf16; scaled in a pass of its own it would be 6.
PRECISION. fp32 arithmetic in the order of torch.optim.AdamW, each result rounded once; moments to
nearest. Without fused multiply-add, which torch uses on the CPU: its fp32 differs in the last bits.
DETERMINISM. Random bits follow from (seed, tensor, element, step) alone, here and in adamw_ref.

MEASURED: nothing on a GPU yet. On 2026-11-27 `python kernels/report.py` with Triton 3.7.1 and 3.9.0:
16-byte accesses in full tiles, the floor, no spills, at most 107 registers a thread; on a B200
instructions bind the bf16 step that rounds stochastically, by 1.3 times. A step takes the host 2.5 ms
at 291 tensors, 100 ms at 10,000 (launches mocked, one core). On the CPU one step
at lr 5e-6 on 400,000 bf16 weights of N(0, 0.02) moves 7.8% of them to nearest, of torch.optim.AdamW
too; stochastically 15%, on average by 1.0 lr. After 300 steps of a regression the loss is 0.15 of the
first in fp32, 0.17 in bf16 with stochastic rounding, 0.94 to nearest (test_all.py has both).
"""
import functools
from array import array

import torch

try:
    import triton
    import triton.language as tl
    INTERPRETED = bool(triton.knobs.runtime.interpret)   # TRITON_INTERPRET=1 when this was imported
except ImportError:                                      # adamw_ref does without
    triton = None
    INTERPRETED = False

HAS_TRITON = triton is not None
CHUNK = 32768              # elements that one program handles, of one tensor
TURN = 4096                # bytes of the narrowest tensor in a loop turn: 256 threads x 16
PLAIN = {torch.Tensor, torch.nn.Parameter}


# ---- the definition, in plain torch ----------------------------------------------------------------

def philox_ref(seed, c0, c1, c2, c3):
    """Philox4x32-10 (Salmon et al., SC 2011): counters (N,) int64 of 32-bit words -> four of them."""
    low = 0xFFFFFFFF
    k0 = seed & low
    k1 = seed >> 32 & low
    for _ in range(10):
        a = c0 * 0xD2511F53                              # wraps at 64 bits, which the masks do not see
        b = c2 * 0xCD9E8D57
        c0 = (b >> 32 & low) ^ c1 ^ k0
        c1 = b & low
        c2 = (a >> 32 & low) ^ c3 ^ k1
        c3 = a & low
        k0 = k0 + 0x9E3779B9 & low
        k1 = k1 + 0xBB67AE85 & low
    return c0, c1, c2, c3


def random_bits_ref(numel, tensor, step, seed, device="cpu"):
    """(numel,) int32 in [0, 65536): the low halves of the Philox words at counter (element // 4, its
    high half, tensor, step), four elements each."""
    q = torch.arange((numel + 3) // 4, device=device)
    rest = (torch.full_like(q, tensor), torch.full_like(q, step))
    words = philox_ref(seed, q & 0xFFFFFFFF, q >> 32, *rest)
    return (torch.stack(words, 1).flatten()[:numel] & 0xFFFF).int()


def stochastic_round_ref(x, bits):
    """fp32 x -> one of its two bf16 neighbours, the nearer the likelier: the bits (int32, below 65536)
    are added below the last bit that bf16 keeps, and what is below it is cut off."""
    cut = ((x.view(torch.int32) + bits) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(x), cut, x).bfloat16()


def scalars(step, lr, betas, eps, weight_decay):
    """The seven numbers of step 1, 2, ...: 1 - lr wd, 1 - b1, b2, 1 - b2, sqrt(1 - b2^t), eps,
    -lr / (1 - b1^t)."""
    b1, b2 = betas
    root = (1 - b2 ** step) ** 0.5
    return (1 - lr * weight_decay, 1 - b1, b2, 1 - b2, root, eps, -lr / (1 - b1 ** step))


def clip_coefficient(norm, clip):
    """What torch.nn.utils.clip_grad_norm_ multiplies gradients of this norm (0-dim) by, 0-dim fp32 on its
    device; 0 where the norm is not finite. clip 0: 1, as nothing is clipped."""
    norm = norm.float()
    factor = (clip / (norm + 1e-6)).clamp(max=1.0) if clip else torch.ones_like(norm)
    return torch.where(torch.isfinite(norm), factor, 0.0)


def moves(coefficient):
    """Does a step with this coefficient move anything? 0-dim bool, on its device."""
    return (coefficient.abs() > 0) & torch.isfinite(coefficient)


def adamw_ref(w, g, m, v, numbers, tensor=0, step=1, seed=None, coefficient=None):
    """One step of AdamW (arXiv 1711.05101) on one tensor, in place: weights w, gradient g, moments m and
    v, numbers = scalars(...). With a seed bf16 weights are rounded by random_bits_ref. coefficient (0-dim
    fp32) multiplies g, in fp32; where it is 0, inf or nan nothing changes."""
    decay, c1, b2, c2, root, eps, size = torch.tensor(numbers, dtype=torch.float32, device=w.device)
    g = g.float()
    if coefficient is not None:
        coefficient = coefficient.to(w.device, torch.float32)
        g = g * coefficient
    first = m.float()
    first = first + c1 * (g - first)
    second = v.float() * b2 + c2 * g * g
    spread = second.double().sqrt().float()       # torch's own fp32 root misses the last bit on the CPU
    new = w.float() * decay + size * first / (spread / root + eps)
    if seed is not None and w.dtype == torch.bfloat16:
        bits = random_bits_ref(w.numel(), tensor, step, seed, w.device)
        dense = torch.empty_like(w, device="meta").stride()      # w's own, unless it leaves gaps
        new = stochastic_round_ref(new, bits.as_strided(w.shape, dense))
    for old, x in ((w, new), (m, first), (v, second)):
        old.copy_(x if coefficient is None else torch.where(moves(coefficient), x.to(old.dtype), old))


# ---- the kernel ------------------------------------------------------------------------------------

if HAS_TRITON:
    TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

    @triton.jit
    def _pointer(row_ptr, column: tl.constexpr, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
        """Pointer to the chunk's first element in a column, counted from 1."""
        ptr = tl.load(row_ptr + column).to(tl.pointer_type(DTYPE)) + start
        if ALIGNED:
            ptr = tl.multiple_of(ptr, 16)     # after the cast, or every access is one element wide
        return ptr

    @triton.jit(do_not_specialize=["seed"])
    def _adamw_kernel(table_ptr, owner_ptr, start_ptr, numbers_ptr, coefficient_ptr, seed,
                      A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, STOCHASTIC: tl.constexpr,
                      ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
        """One step on chunk c = program. table (n, 8) int64: numel, addresses of w (dtype A), g (B), m
        and v (C), number of the tensor, step, row of numbers; owner (C,) int32: the tensor of a chunk;
        start (C,) int64: its first element; numbers (., 7) fp32: scalars(); coefficient () fp32: of g.
        Reads w, g, m, v once, writes w, m, v once. The loop comes twice: over full tiles without a mask,
        then over what is left, if anything."""
        t = tl.load(owner_ptr + tl.program_id(0))
        row_ptr = table_ptr + t * 8
        start = tl.load(start_ptr + tl.program_id(0))
        size = tl.minimum(tl.load(row_ptr) - start, CHUNK).to(tl.int32)
        coefficient = tl.load(coefficient_ptr)
        moves = (tl.abs(coefficient) > 0) & (tl.abs(coefficient) < float("inf"))
        size = tl.where(moves, size, 0)                                   # of 0 elements nothing moves
        w_ptr = _pointer(row_ptr, 1, start, A, ALIGNED)
        g_ptr = _pointer(row_ptr, 2, start, B, ALIGNED)
        m_ptr = _pointer(row_ptr, 3, start, C, ALIGNED)
        v_ptr = _pointer(row_ptr, 4, start, C, ALIGNED)
        tensor = tl.load(row_ptr + 5).to(tl.uint32)
        step = tl.load(row_ptr + 6).to(tl.uint32)
        numbers_ptr += tl.load(row_ptr + 7) * 7
        decay = tl.load(numbers_ptr)
        c1 = tl.load(numbers_ptr + 1)
        b2 = tl.load(numbers_ptr + 2)
        c2 = tl.load(numbers_ptr + 3)
        root = tl.load(numbers_ptr + 4)
        eps = tl.load(numbers_ptr + 5)
        rate = tl.load(numbers_ptr + 6)
        full = size // BLOCK * BLOCK
        for FULL in tl.static_range(1, -1, -1):
            for i in range(0 if FULL else full, full if FULL else size, BLOCK):
                offs = i + tl.arange(0, BLOCK)
                inside = True if FULL else offs < size
                w = tl.load(w_ptr + offs, mask=inside).to(tl.float32)
                g = tl.load(g_ptr + offs, mask=inside).to(tl.float32) * coefficient
                m = tl.load(m_ptr + offs, mask=inside).to(tl.float32)
                v = tl.load(v_ptr + offs, mask=inside).to(tl.float32)
                m = m + c1 * (g - m)
                v = v * b2 + c2 * g * g
                w = w * decay + tl.div_rn(rate * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
                if STOCHASTIC:
                    q = (start + i) // 4 + tl.arange(0, BLOCK // 4)     # int64: a counter, four elements
                    low = (q & 0xFFFFFFFF).to(tl.uint32)
                    high = (q >> 32).to(tl.uint32)
                    r0, r1, r2, r3 = tl.philox(seed, low, high, low * 0 + tensor, low * 0 + step)
                    bits = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (BLOCK,)) & 0xFFFF
                    cut = (w.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000
                    w = tl.where(tl.abs(w) < float("inf"), cut.to(tl.float32, bitcast=True), w)
                tl.store(w_ptr + offs, w.to(A), mask=inside)
                tl.store(m_ptr + offs, m.to(C), mask=inside)
                tl.store(v_ptr + offs, v.to(C), mask=inside)


# ---- the launch ------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=32)
def chunk_map(sizes, device, chunk):
    """(owner (C,) int32, start (C,) int64): the tensor of chunk c and its first element."""
    counts = (torch.tensor(sizes) + chunk - 1) // chunk
    owner = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), counts)
    place = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]     # among its tensor's chunks
    return owner.to(device), (place * chunk).to(device)


def shard(t):
    """Number of this process's shard of a DTensor (FSDP), over its sharded dimensions; else 0."""
    number = 0
    for i, place in enumerate(getattr(t, "placements", ())):
        if place.is_shard():
            number = number * t.device_mesh.size(i) + t.device_mesh.get_local_rank(i)
    return number


def layout(t):
    """(shape, strides that matter) of a tensor, equal where elements lie in the same order; None when it
    leaves gaps in its memory or uses a place twice. A transposed tensor does not; a column does."""
    if not t.is_contiguous() and torch.empty_like(t, device="meta").stride() != t.stride():
        return None
    return t.shape, [stride for stride, size in zip(t.stride(), t.shape) if size > 1]


def check(w, g, m, v):
    """ValueError for what the kernel does not take: another device or dtype, gaps, different orders."""
    four = (w, g, m, v)
    if w.is_cuda == INTERPRETED:
        raise ValueError("the kernel takes GPU tensors, or under TRITON_INTERPRET=1 CPU tensors")
    layouts = list(map(layout, four))
    known = m.dtype == v.dtype and all(t.dtype in TYPES for t in four)
    if not known or layouts[0] is None or layouts != [layouts[0]] * 4:
        told = [(t.dtype, tuple(t.shape), t.stride()) for t in four]
        raise ValueError(f"no kernel for w, g, m, v of dtype, shape, strides {told}: m and v need "
                         "one dtype, all one order without gaps (contiguous() makes it), or use "
                         "triton=False")


def adamw_(rows, seed=None, chunk=CHUNK, coefficient=None):
    """One step of AdamW in place on rows of (w, g, m, v, numbers, tensor, step), as in adamw_ref, in one
    launch for each set of dtypes, and one more for rows off alignment. seed: below 2**63. chunk: elements
    that a program handles, a power of two from 16. coefficient: as there, on any device. ValueError for
    another chunk and for what check() refuses."""
    if not isinstance(chunk, int) or chunk < 16 or chunk & (chunk - 1):
        raise ValueError(f"chunk must be a power of two from 16, got {chunk}")
    groups = {}                                    # what a launch needs of its own -> its table, flat
    kinds = {}                                     # numbers -> their row
    weights = []
    for w, g, m, v, numbers, tensor, step in rows:               # all of a row at once, while it is cached
        w_at = w.data_ptr()
        g_at = g.data_ptr()
        m_at = m.data_ptr()
        v_at = v.data_ptr()
        key = (w.device, w.dtype, g.dtype, m.dtype, v.dtype, (w_at | g_at | m_at | v_at) % 16 == 0)
        dense = w.is_contiguous() and g.is_contiguous() and m.is_contiguous() and v.is_contiguous()
        flat = groups.get(key)
        if flat is None or not dense or not w.shape == g.shape == m.shape == v.shape:
            check(w, g, m, v)                                    # which is slow
            flat = groups.setdefault(key, [])
        place = kinds.setdefault(numbers, len(kinds))
        flat.extend((w.numel(), w_at, g_at, m_at, v_at, tensor, step, place))
        weights.append(w)
    values = torch.tensor(list(kinds), dtype=torch.float32)
    for (device, *dtypes, _, aligned), flat in groups.items():
        owner, start = chunk_map(tuple(flat[::8]), device, chunk)
        if not len(owner):
            continue                                                   # only empty tensors
        table = torch.frombuffer(array("q", flat), dtype=torch.int64)  # 4 times as fast as tensor()
        if device.type == "cuda":                                      # so that the copies do not wait
            table = table.pin_memory()
            values = values.pin_memory()
        factor = torch.ones((), device=device)
        if coefficient is not None:
            factor = coefficient.to(device, torch.float32)
        with torch.cuda.device_of(owner):
            _adamw_kernel[(len(owner),)](
                table.to(device, non_blocking=True), owner, start, values.to(device, non_blocking=True),
                factor, seed or 0, *map(TYPES.get, dtypes),
                STOCHASTIC=seed is not None and dtypes[0] == torch.bfloat16, ALIGNED=aligned,
                CHUNK=chunk, BLOCK=min(chunk, TURN // min(t.itemsize for t in dtypes)),
                num_warps=4 if torch.version.hip else 8, enable_fp_fusion=False)    # 256 threads
    torch.autograd.graph.increment_version(weights)


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW by the kernel above, or by adamw_ref where that cannot run.

    params, lr, betas, eps, weight_decay: as there. stochastic_rounding: of bf16 weights, seeded by seed;
    other dtypes are not affected. state_dtype: of both moments; None = the parameter's own, as there.
    triton: True = the kernel, ValueError without triton; False = adamw_ref; None = the kernel where
    there is triton and all parameters are on a GPU. by_kernel() tells which of the two it is.
    skipped: how many steps moved nothing for their coefficient, 0-dim on its device, so that reading it
    waits; None before the first step with one. state["step"], on the host, counts these steps too.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
                 stochastic_rounding=False, state_dtype=None, seed=0, triton=None):
        if not (lr >= 0 and 0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps >= 0 and weight_decay >= 0):
            raise ValueError(f"AdamW: lr {lr}, betas {betas}, eps {eps}, weight_decay {weight_decay}")
        if triton and not HAS_TRITON:
            raise ValueError("AdamW(triton=True): triton cannot be imported here; install it, or leave "
                             "triton=None, which takes torch then")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed % 2**63
        self.state_dtype = state_dtype
        self.triton = triton
        self.skipped = None

    def every(self):
        """Yield (parameter, its group) over all groups; the place in this order is a tensor's number."""
        for group in self.param_groups:
            for p in group["params"]:
                yield p, group

    def by_kernel(self):
        """Does step() launch the kernel? Else adamw_ref takes one tensor after the other."""
        if self.triton is not None:
            return self.triton
        return HAS_TRITON and not INTERPRETED and all(p.is_cuda for p, _ in self.every())

    def rows(self):
        """Yield the rows of adamw_() of all parameters that have a gradient, then count the step. No list:
        at 10,000 rows Python would look for garbage for as long as all else takes."""
        counts = []
        known = {}                                               # (group, step) -> numbers
        for tensor, (p, group) in enumerate(self.every()):
            g = p.grad
            if g is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)                # on the CPU: no GPU waits for it
                state["exp_avg"] = torch.zeros_like(p, dtype=self.state_dtype)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=self.state_dtype)
            counts.append(state["step"])
            step = int(state["step"].item()) + 1
            key = (id(group), step)
            if key not in known:
                known[key] = scalars(step, group["lr"], group["betas"], group["eps"], group["weight_decay"])
            four = (p, g, state["exp_avg"], state["exp_avg_sq"])
            if not PLAIN.issuperset(map(type, four)):
                four = [t.to_local() if hasattr(t, "to_local") else t for t in four]             # of FSDP
                tensor += shard(p) << 20
            yield *four, known[key], tensor, step
        if counts:
            torch._foreach_add_(counts, torch.tensor(1.0), alpha=1.0)      # of a number: 3 times as slow

    @torch.no_grad()
    def step(self, closure=None, coefficient=None):
        """One step on every parameter that has a gradient; returns the loss of closure, if any.
        coefficient: 0-dim fp32 on a device, see clip_coefficient(); multiplies all gradients, which stay
        as they are. Where it is 0, inf or nan neither weights nor moments move; no one waits for it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("this AdamW cannot be captured in a CUDA graph: it would replay today's "
                               "addresses and step; leave it out of the graph")
        seed = self.seed if self.stochastic_rounding else None
        if coefficient is not None:
            if self.skipped is None:
                self.skipped = torch.zeros((), dtype=torch.int64, device=coefficient.device)
            self.skipped += ~moves(coefficient)
        if self.by_kernel():
            adamw_(self.rows(), seed, coefficient=coefficient)
        else:
            for row in self.rows():
                adamw_ref(*row, seed, coefficient)
        return loss

    def load_state_dict(self, state_dict):
        """As in torch, but the moments keep the dtype in which they were saved."""
        super().load_state_dict(state_dict)
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for number, (p, _) in zip(numbers, self.every()):
            for key, x in state_dict["state"].get(number, {}).items():
                if torch.is_tensor(x):
                    self.state[p][key] = x.to("cpu" if key == "step" else p.device, copy=True)
