"""AdamW for all parameters in one launch, with stochastic rounding of bf16 weights. Copy it alone.

    optimizer = AdamW(model.parameters(), lr=5e-6, stochastic_rounding=True)     # then as torch.optim.AdamW
    python kernels/adamw.py                   # no GPU needed: compile for four, read the machine code
    python kernels/adamw.py --json out.json   # the same as JSON; on a GPU time 1 and 7 billion weights
                                              # (these two want multi_tensor.py beside this file)

WHY. Around 0.02 neighbouring bf16 numbers lie 1.2e-4 apart, and a step of AdamW at lr 5e-6 moves a weight by
about 5e-6: round-to-nearest puts it back where it was, at every step. Stochastic rounding moves it to the
next number in 1 of 24 steps, so that the expected weight is right.
HOW. A table of addresses, a grid of chunks (as in multi_tensor.py, which has more on it). Every tensor has a
row of its own hyper-parameters too, so that parameter groups do not add launches.

Bytes moved a parameter: 14 in bf16 with bf16 moments (read w, g, m, v, write w, m, v), 22 with fp32 moments,
28 in fp32.
PRECISION. fp32 arithmetic in the order of torch.optim.AdamW, each result rounded once; moments to nearest.
Without fused multiply-add, which torch uses on the CPU: its fp32 results differ in the last bits.
DETERMINISM. The random bits follow from (seed, tensor, element, step) alone, here and in adamw_ref.

MEASURED: nothing on a GPU yet. On 2026-11-24 the report, with Triton 3.9.0 and with 3.8.0: each of 20
kernels and targets accesses global memory 16 bytes at a time in full tiles, spills nothing and moves the
floor, with at most 108 registers a thread. On the CPU: one step at lr 5e-6 on a million bf16 weights of
N(0, 0.02) moves 7.8% of them to nearest, torch.optim.AdamW's too (2.8% of data/tiny's target, whose weights
are larger); stochastically 15%, on average by 0.997 lr. After 300 such steps of a regression the loss is
0.15 of the first in fp32, 0.17 in bf16 with stochastic rounding, 0.94 to nearest (test_all.py has it).
"""
import functools

import numpy as np
import torch
import triton
import triton.language as tl

CHUNK = 32768                             # elements that one program handles, of one tensor
TURN = 4096                               # bytes of the narrowest tensor in a loop turn: 256 threads x 16
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INTERPRETED = bool(triton.knobs.runtime.interpret)         # TRITON_INTERPRET=1 when this file was imported


# ---- the definition, in plain torch -----------------------------------------------------------------------

def philox_ref(seed, c0, c1, c2, c3):
    """Philox4x32-10 (Salmon et al., SC 2011): counters (N,) int64 of 32-bit words -> four such tensors."""
    low, k0, k1 = 0xFFFFFFFF, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57            # wraps at 64 bits, which the masks do not see
        c0, c1, c2, c3 = (b >> 32 & low) ^ c1 ^ k0, b & low, (a >> 32 & low) ^ c3 ^ k1, a & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0, c1, c2, c3


def random_bits_ref(numel, tensor, step, seed, device="cpu"):
    """(numel,) int32 in [0, 65536): the low halves of the Philox words at counter (element // 4, its high
    half, tensor, step), four elements each."""
    q = torch.arange((numel + 3) // 4, device=device)
    words = philox_ref(seed, q & 0xFFFFFFFF, q >> 32, torch.full_like(q, tensor), torch.full_like(q, step))
    return (torch.stack(words, 1).flatten()[:numel] & 0xFFFF).int()


def stochastic_round_ref(x, bits):
    """fp32 x -> one of its two bf16 neighbours, the nearer the likelier: the bits (int32, below 65536) are
    added below the last bit that bf16 keeps, and what is below it is cut off."""
    cut = ((x.view(torch.int32) + bits) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(x), cut, x).bfloat16()


def scalars(step, lr, betas, eps, weight_decay):
    """The seven numbers of step 1, 2, ...: 1 - lr wd, 1 - b1, b2, 1 - b2, sqrt(1 - b2^t), eps,
    -lr / (1 - b1^t)."""
    b1, b2 = betas
    return [1 - lr * weight_decay, 1 - b1, b2, 1 - b2, (1 - b2 ** step) ** 0.5, eps, -lr / (1 - b1 ** step)]


def adamw_ref(w, g, m, v, numbers, bits=None):
    """One step of AdamW (arXiv 1711.05101) on one tensor, in place: weights w, gradient g, moments m and v,
    numbers = scalars(...); bits: round w stochastically with random_bits_ref(...) in its shape."""
    decay, c1, b2, c2, root, eps, size = torch.tensor(numbers, dtype=torch.float32, device=w.device)
    g, first, second = g.float(), m.float(), v.float()
    first = first + c1 * (g - first)
    second = second * b2 + c2 * g * g
    spread = second.double().sqrt().float()       # torch's own fp32 root misses the last bit on the CPU (MKL)
    new = w.float() * decay + size * first / (spread / root + eps)
    w.copy_(new if bits is None else stochastic_round_ref(new, bits))
    m.copy_(first)
    v.copy_(second)


# ---- the kernel -------------------------------------------------------------------------------------------

@triton.jit
def _pointer(row_ptr, column: tl.constexpr, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to the chunk's first element in a column, counted from 1."""
    ptr = tl.load(row_ptr + column).to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)     # after the cast, or every access is one element wide
    return ptr


@triton.jit
def _load(ptr, offs, size, FULL: tl.constexpr):
    if FULL:                              # no mask: one built from a loaded size makes every access narrow
        return tl.load(ptr + offs)                                                              # full tile
    return tl.load(ptr + offs, mask=offs < size, other=0)


@triton.jit
def _store(ptr, offs, value, size, FULL: tl.constexpr):
    if FULL:
        tl.store(ptr + offs, value)                                                             # full tile
    else:
        tl.store(ptr + offs, value, mask=offs < size)


@triton.jit
def _tile(w_ptr, g_ptr, m_ptr, v_ptr, numbers, counters, i, size, start, A: tl.constexpr, C: tl.constexpr,
          STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    decay, c1, b2, c2, root, eps, rate = numbers
    offs = i + tl.arange(0, BLOCK)
    w = _load(w_ptr, offs, size, FULL).to(tl.float32)
    g = _load(g_ptr, offs, size, FULL).to(tl.float32)
    m = _load(m_ptr, offs, size, FULL).to(tl.float32)
    v = _load(v_ptr, offs, size, FULL).to(tl.float32)
    m = m + c1 * (g - m)
    v = v * b2 + c2 * g * g
    w = w * decay + tl.div_rn(rate * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    if STOCHASTIC:
        seed, tensor, step = counters
        q = (start + i) // 4 + tl.arange(0, BLOCK // 4)             # int64: one counter for four elements
        low, high = (q & 0xFFFFFFFF).to(tl.uint32), (q >> 32).to(tl.uint32)
        r0, r1, r2, r3 = tl.philox(seed, low, high, low * 0 + tensor, low * 0 + step)
        bits = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (BLOCK,)) & 0xFFFF
        cut = (w.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000
        w = tl.where(tl.abs(w) < float("inf"), cut.to(tl.float32, bitcast=True), w)
    _store(w_ptr, offs, w.to(A), size, FULL)
    _store(m_ptr, offs, m.to(C), size, FULL)
    _store(v_ptr, offs, v.to(C), size, FULL)


@triton.jit(do_not_specialize=["seed"])
def _adamw_kernel(table_ptr, owner_ptr, start_ptr, numbers_ptr, seed,
                  A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, STOCHASTIC: tl.constexpr,
                  ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """One step on chunk c = program. table (n, 7) int64: numel, addresses of w (dtype A), g (B), m and v (C),
    number of the tensor, step; owner (C,) int32: the tensor of a chunk; start (C,) int64: its first element;
    numbers (n, 7) fp32: scalars(). Reads w, g, m, v once, writes w, m, v once."""
    c = tl.program_id(0)
    t = tl.load(owner_ptr + c)
    row_ptr, n_ptr = table_ptr + t * 7, numbers_ptr + t * 7
    start = tl.load(start_ptr + c)
    size = tl.minimum(tl.load(row_ptr) - start, CHUNK).to(tl.int32)
    w_ptr = _pointer(row_ptr, 1, start, A, ALIGNED)
    g_ptr = _pointer(row_ptr, 2, start, B, ALIGNED)
    m_ptr = _pointer(row_ptr, 3, start, C, ALIGNED)
    v_ptr = _pointer(row_ptr, 4, start, C, ALIGNED)
    numbers = (tl.load(n_ptr), tl.load(n_ptr + 1), tl.load(n_ptr + 2), tl.load(n_ptr + 3), tl.load(n_ptr + 4),
               tl.load(n_ptr + 5), tl.load(n_ptr + 6))
    counters = (seed, tl.load(row_ptr + 5).to(tl.uint32), tl.load(row_ptr + 6).to(tl.uint32))
    full = size // BLOCK * BLOCK
    for i in range(0, full, BLOCK):
        _tile(w_ptr, g_ptr, m_ptr, v_ptr, numbers, counters, i, size, start,
              A, C, STOCHASTIC, BLOCK, True)
    if full < size:
        _tile(w_ptr, g_ptr, m_ptr, v_ptr, numbers, counters, full, size, start,
              A, C, STOCHASTIC, BLOCK, False)


# ---- the launch -------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=32)
def _device_map(sizes, device, chunk):
    """(owner (C,) int32, start (C,) int64): the tensor of chunk c and its first element; from sizes only."""
    counts = (np.asarray(sizes, dtype=np.int64) + chunk - 1) // chunk
    owner = np.repeat(np.arange(len(sizes), dtype=np.int32), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)                # the first chunk of the same tensor
    start = (np.arange(len(owner), dtype=np.int64) - first) * chunk
    return [torch.from_numpy(x).to(device) for x in (owner, start)]


def _order(t):
    """Strides of the dimensions that matter: two dense tensors of a shape agree on it when elements lie in
    the same order."""
    return [stride for stride, size in zip(t.stride(), t.shape) if size > 1]


def gaps(t):
    """Does t leave gaps in its memory, or use a place twice? A transposed tensor does not; a column does."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape)):
        if size > 1 and stride != expected and t.numel():
            return True
        expected *= size
    return False


def shard(t):
    """Number of this process's shard of a DTensor (FSDP), counted over its sharded dimensions; else 0."""
    number = 0
    for i, place in enumerate(getattr(t, "placements", ())):
        if place.is_shard():
            number = number * t.device_mesh.size(i) + t.device_mesh.get_local_rank(i)
    return number


def adamw_(rows, numbers, tensors, steps, seed=None, chunk=CHUNK):
    """One step of AdamW on rows = [(w, g, m, v)], in place, one launch for each combination of dtypes.

    numbers: scalars() of every row. tensors, steps: its two counters for the random bits, and seed their key
    (below 2**63; None: no stochastic rounding). ValueError for a dtype without kernel, for gaps in memory,
    and for a row whose elements lie in different orders.
    """
    groups = {}
    for row, four in enumerate(rows):
        w, g, m, v = four
        if w.is_cuda == INTERPRETED:
            raise ValueError("the kernel takes GPU tensors, or under TRITON_INTERPRET=1 CPU tensors")
        if any(t.dtype not in TYPES for t in four) or m.dtype != v.dtype:
            raise ValueError(f"parameter {row}: no kernel for {', '.join(str(t.dtype) for t in four)}")
        if any(gaps(t) or t.shape != w.shape or _order(t) != _order(w) for t in four):
            raise ValueError(f"parameter {row} of shape {tuple(w.shape)} has strides {w.stride()}, its "
                             f"gradient {tuple(g.shape)} and {g.stride()}, its moments {m.stride()}: make "
                             "them contiguous(), or use triton=False")
        groups.setdefault((w.device, w.dtype, g.dtype, m.dtype), []).append(row)
    for (device, *dtypes), members in groups.items():
        table = [[rows[r][0].numel(), *(t.data_ptr() for t in rows[r]), tensors[r], steps[r]]
                 for r in members]
        owner, start = _device_map(tuple(line[0] for line in table), device, chunk)
        if not len(owner):
            continue                                                   # only empty tensors
        pin = device.type == "cuda"                                    # so that the copies do not wait
        head = torch.tensor(table, pin_memory=pin).to(device, non_blocking=True)
        values = torch.tensor([numbers[r] for r in members], dtype=torch.float32, pin_memory=pin).to(
            device, non_blocking=True)
        with torch.cuda.device_of(head):
            _adamw_kernel[(len(owner),)](
                head, owner, start, values, seed or 0, *(TYPES[t] for t in dtypes),
                STOCHASTIC=seed is not None and dtypes[0] == torch.bfloat16,
                ALIGNED=all(a % 16 == 0 for line in table for a in line[1:5]), CHUNK=chunk,
                BLOCK=min(chunk, TURN // min(t.itemsize for t in dtypes)),
                num_warps=4 if torch.version.hip else 8, enable_fp_fusion=False)    # 256 threads, also on AMD
        torch.autograd.graph.increment_version([rows[r][0] for r in members])


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW by the kernel above, or by adamw_ref where that cannot run.

    params, lr, betas, eps, weight_decay: as there. stochastic_rounding: of bf16 weights, seeded by seed;
    other dtypes are not affected. state_dtype: of both moments; None = the parameter's own, as there.
    triton: True = the kernel, False = adamw_ref, None = the kernel when all parameters are on a GPU.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
                 stochastic_rounding=False, state_dtype=None, seed=0, triton=None):
        if not (lr >= 0 and 0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps >= 0 and weight_decay >= 0):
            raise ValueError(f"AdamW: lr {lr}, betas {betas}, eps {eps}, weight_decay {weight_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.stochastic_rounding, self.seed = stochastic_rounding, seed % 2**63
        self.state_dtype, self.triton = state_dtype, triton

    @torch.no_grad()
    def step(self, closure=None):
        """One step on every parameter that has a gradient; returns the loss of closure, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rows, numbers, tensors, states = [], [], [], []
        every = [(p, group) for group in self.param_groups for p in group["params"]]
        for tensor, (p, group) in enumerate(every):
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p, dtype=self.state_dtype),
                             exp_avg_sq=torch.zeros_like(p, dtype=self.state_dtype))
            four = p, p.grad, state["exp_avg"], state["exp_avg_sq"]
            rows.append([t.to_local() if hasattr(t, "to_local") else t for t in four])      # FSDP: its shard
            numbers.append(scalars(int(state["step"]) + 1, group["lr"], group["betas"], group["eps"],
                                   group["weight_decay"]))
            tensors.append(tensor + (shard(p) << 20))
            states.append(state)
        steps = [int(state["step"]) + 1 for state in states]                  # 0-dim on the CPU: no GPU waits
        seed = self.seed if self.stochastic_rounding else None
        if self.triton or (self.triton is None and rows and all(p.is_cuda for p, _ in every)):
            adamw_(rows, numbers, tensors, steps, seed)
        else:
            for (w, g, m, v), values, tensor, step in zip(rows, numbers, tensors, steps):
                bits = None
                if seed is not None and w.dtype == torch.bfloat16:
                    bits = random_bits_ref(w.numel(), tensor, step, seed, w.device)     # in memory's order
                    bits = bits.view(w.shape) if gaps(w) else bits.as_strided(w.shape, w.stride())
                adamw_ref(w, g, m, v, values, bits)
        for state in states:
            state["step"] += 1
        return loss

    def load_state_dict(self, state_dict):
        """As in torch, but the moments keep the dtype in which they were saved."""
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, (p, _) in zip(ids, [(p, g) for g in self.param_groups for p in g["params"]]):
            for key, x in state_dict["state"].get(i, {}).items():
                if torch.is_tensor(x):
                    self.state[p][key] = x.to("cpu" if key == "step" else p.device, copy=True)


# ---- what shows that it is fast: read the compiled code, or measure ---------------------------------------

def variants():
    """What is shipped, as multi_tensor.variants() has it."""
    out = []
    for name, w, state, stochastic in (("bf16", tl.bfloat16, tl.bfloat16, False),
                                       ("bf16 stochastic", tl.bfloat16, tl.bfloat16, True),
                                       ("bf16, fp32 moments", tl.bfloat16, tl.float32, False),
                                       ("bf16 stochastic, fp32 moments", tl.bfloat16, tl.float32, True),
                                       ("fp32", tl.float32, tl.float32, False)):
        a, c = w.primitive_bitwidth // 8, state.primitive_bitwidth // 8
        out.append((f"adamw {name}", _adamw_kernel, {"numbers_ptr": "*fp32", "seed": "i64"},
                    {"A": w, "B": w, "C": state, "STOCHASTIC": stochastic}, [w, state],
                    2 * a + 2 * c, a + 2 * c))
    return out


def benchmark(shapes, device, repeats=20):
    """Rows for one step in bf16 with bf16 moments: this kernel (both roundings) beside torch's three."""
    from torch.optim.adamw import adamw       # the function: all ways share one set of tensors
    w, g, m = ([torch.randn(s, device=device, dtype=torch.bfloat16) * 0.02 for s in shapes] for _ in range(3))
    v = [torch.rand(s, device=device, dtype=torch.bfloat16) for s in shapes]
    rows, count = list(zip(w, g, m, v)), len(shapes)
    steps = [torch.tensor(9.0, device=device) for _ in shapes]
    values, where = [scalars(10, 5e-6, (0.9, 0.999), 1e-8, 0.0)] * count, list(range(count))
    ours = lambda seed: adamw_(rows, values, where, [10] * count, seed)

    def theirs(**way):
        adamw(w, g, m, v, [], steps, amsgrad=False, beta1=0.9, beta2=0.999, lr=5e-6, weight_decay=0.0,
              eps=1e-8, maximize=False, **way)
    return multi_tensor.measure("adamw", 14, {
        "kernel": lambda: ours(None), "kernel stochastic": lambda: ours(0),
        "torch fused": lambda: theirs(fused=True), "foreach": lambda: theirs(foreach=True),
        "loop": lambda: theirs(foreach=False)}, sum(x.numel() for x in w), device, repeats)


if __name__ == "__main__":
    import multi_tensor                       # the report and the clock; only this command needs it
    multi_tensor.main(__doc__, variants(), benchmark)
