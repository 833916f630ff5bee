"""Triton kernels over all parameters of a model at once: norm, ascent, restore, noise, running mean. Copy it alone.

    python kernels/multi_tensor.py                 # no GPU: compile for sm_80, sm_90, sm_100, gfx942 and read the code
    python kernels/multi_tensor.py --json out.json # the same as JSON; with a GPU: bandwidth at 1 and 7 billion weights

WHY. SAM climbs along the gradient and comes back at every step. In a Python loop that is several launches a tensor
and copies of the weights; here each operation is one launch for every (parameter dtype, gradient dtype) pair.
HOW. The kernel reads a table of addresses, so models stay as they are: a grid of chunks, and for each chunk the tensor
it belongs to and where it starts. Tensors may lie anywhere, also off alignment (a narrow variant takes those).

Bytes moved for a bf16 parameter: norm 2, ascent 8 (read w and g, write w and the old w into g), restore 4.
PRECISION. All arithmetic is fp32, without fused multiply-add, and stored with one rounding. Restore copies bits.
DETERMINISM. One partial sum a chunk, then a small second reduction; no atomics. Noise depends on (seed, tensor,
element) alone. Nothing here reads a value back to the host.

The functions are those of sam.py and may replace them. The `_ref` functions are what they must compute.

MEASURED: on no GPU yet. Compiled with Triton 3.9.0 on 2026-11-24: 16-byte accesses in all full tiles, no spills.
"""
import functools, os

import numpy as np
import torch
import triton
import triton.language as tl

CHUNK = 32768                                # elements a program handles, one tensor's at most
BLOCK = 4096                                 # elements a loop turn: 16 a thread, so int8 too comes in 16-byte pieces
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}


# ---- references: the definition of every operation, in plain torch --------------------------------------------

def norm_ref(tensors):
    """sqrt of the sum of squares over all elements of all tensors, in fp64."""
    return sum(t.double().square().sum() for t in tensors).sqrt()


def ascent_ref(w, d, scale, linf=False):
    """(new w, applied step in fp32) of one tensor: w + scale * d, or w + scale * sign(d), rounded to w's dtype."""
    step = d.float().sign() if linf else d.float()
    new = (w.float() + scale * step).to(w.dtype)
    return new, new.float() - w.float()


def philox_ref(seed, counters):
    """Philox4x32-10 (Salmon et al. 2011): counters (4, N) uint64 array of 32-bit words -> (4, N) random words."""
    c, low = [np.asarray(x, dtype=np.uint64) for x in counters], np.uint64(0xFFFFFFFF)
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ k0, b & low, (a >> np.uint64(32)) ^ c[3] ^ k1, a & low]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack(c)


def noise_ref(numel, tensor, seed):
    """The z of one tensor, fp64 (numel,): four normals by Box and Muller from the Philox words of counter
    (element // 4, its high half, tensor, 0)."""
    q = np.arange((numel + 3) // 4, dtype=np.uint64)
    words = philox_ref(seed, [q & np.uint64(0xFFFFFFFF), q >> np.uint64(32), np.full_like(q, tensor), np.zeros_like(q)])
    signed = words.astype(np.uint32).view(np.int32).reshape(4, -1).astype(np.int64)
    u = np.where(signed < 0, -signed - 1, signed) * 4.6566127342e-10                    # [0, 1)
    z = []
    for u1, u2 in ((u[0], u[1]), (u[2], u[3])):
        r = np.sqrt(-2 * np.log(np.maximum(1e-7, u1)))
        z += [r * np.cos(2 * np.pi * u2), r * np.sin(2 * np.pi * u2)]
    return np.stack(z, 1).reshape(-1)[:numel]


# ---- kernels --------------------------------------------------------------------------------------------------
# Every kernel begins with the same table: addr (K, n) int64 addresses, K columns such as weights and gradients;
# numel (n,) int64; owner (C,) int32 the tensor of chunk c; start (C,) int64 its first element. C = grid size.

@triton.jit
def _chunk(numel_ptr, owner_ptr, start_ptr):
    """(tensor, first element, elements left from there on) of this program's chunk."""
    c = tl.program_id(0)
    t = tl.load(owner_ptr + c)
    start = tl.load(start_ptr + c)
    return t, start, tl.load(numel_ptr + t) - start


@triton.jit
def _pointer(addr_ptr, column, n, t, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to the chunk's first element in a column."""
    ptr = tl.load(addr_ptr + column * n + t).to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)        # after the cast, or every access is one element wide
    return ptr


@triton.jit
def _load(ptr, offs, left, FULL: tl.constexpr):
    if FULL:
        return tl.load(ptr + offs)           # no mask: one built from a loaded size makes every access narrow
    return tl.load(ptr + offs, mask=offs < left, other=0)


@triton.jit
def _store(ptr, offs, value, left, FULL: tl.constexpr):
    if FULL:
        tl.store(ptr + offs, value)
    else:
        tl.store(ptr + offs, value, mask=offs < left)


@triton.jit
def _sumsq_kernel(addr_ptr, numel_ptr, owner_ptr, start_ptr, n, part_ptr,
                  A: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """part[c] = sum of squares of chunk c, fp32. Columns: g. Reads each element once."""
    t, start, left = _chunk(numel_ptr, owner_ptr, start_ptr)
    g_ptr = _pointer(addr_ptr, 0, n, t, start, A, ALIGNED)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, CHUNK, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        if i + BLOCK <= left:
            g = _load(g_ptr, offs, left, True).to(tl.float32)
            acc += g * g
        elif i < left:
            g = _load(g_ptr, offs, left, False).to(tl.float32)
            acc += g * g
    tl.store(part_ptr + tl.program_id(0), tl.sum(acc))


@triton.jit
def _ascent_tile(w_ptr, d_ptr, s_ptr, offs, left, scale, moved, along, size,
                 W: tl.constexpr, LINF: tl.constexpr, FULL: tl.constexpr):
    w = _load(w_ptr, offs, left, FULL)
    d = _load(d_ptr, offs, left, FULL).to(tl.float32)
    wide = w.to(tl.float32)
    if LINF:                                 # what is not finite has no sign to follow
        direction = tl.where(tl.abs(d) < float("inf"), tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0)), 0.0)
    else:
        direction = d
    # scale 0 stands for "do not move": 0 * inf would be nan
    new = tl.where(scale == 0, wide, wide + scale * direction).to(W)
    _store(s_ptr, offs, w, left, FULL)       # the old weights; s may be d itself, which was read above
    _store(w_ptr, offs, new, left, FULL)
    step = new.to(tl.float32) - wide
    return moved + step * step, along + step * d, size + d * d


@triton.jit
def _ascent_kernel(addr_ptr, numel_ptr, owner_ptr, start_ptr, n, scale_ptr, part_ptr,
                   A: tl.constexpr, B: tl.constexpr, SAVE: tl.constexpr, LINF: tl.constexpr,
                   ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """w <- w + scale * d (or sign(d)), the old w into column SAVE; part[c] = sums of step^2, step d, d^2 of chunk c.

    Columns: w (dtype A), d (dtype B), and a third to save into unless SAVE is 1, d's own memory.
    Reads w and d once, writes w and the saved w once.
    """
    t, start, left = _chunk(numel_ptr, owner_ptr, start_ptr)
    w_ptr = _pointer(addr_ptr, 0, n, t, start, A, ALIGNED)
    d_ptr = _pointer(addr_ptr, 1, n, t, start, B, ALIGNED)
    s_ptr = _pointer(addr_ptr, SAVE, n, t, start, A, ALIGNED)
    scale = tl.load(scale_ptr)
    moved = tl.zeros((BLOCK,), tl.float32)
    along = tl.zeros((BLOCK,), tl.float32)
    size = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, CHUNK, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        if i + BLOCK <= left:
            moved, along, size = _ascent_tile(w_ptr, d_ptr, s_ptr, offs, left, scale, moved, along, size, A, LINF, True)
        elif i < left:
            moved, along, size = _ascent_tile(w_ptr, d_ptr, s_ptr, offs, left, scale, moved, along, size, A, LINF, False)
    part_ptr += tl.program_id(0) * 3
    tl.store(part_ptr, tl.sum(moved))
    tl.store(part_ptr + 1, tl.sum(along))
    tl.store(part_ptr + 2, tl.sum(size))


@triton.jit
def _copy_kernel(addr_ptr, numel_ptr, owner_ptr, start_ptr, n,
                 A: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Column 0 <- column 1, bit for bit."""
    t, start, left = _chunk(numel_ptr, owner_ptr, start_ptr)
    to_ptr = _pointer(addr_ptr, 0, n, t, start, A, ALIGNED)
    from_ptr = _pointer(addr_ptr, 1, n, t, start, A, ALIGNED)
    for i in range(0, CHUNK, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        if i + BLOCK <= left:
            _store(to_ptr, offs, _load(from_ptr, offs, left, True), left, True)
        elif i < left:
            _store(to_ptr, offs, _load(from_ptr, offs, left, False), left, False)


@triton.jit
def _noise_tile(w_ptr, offs, left, first, tensor, seed, sigma, W: tl.constexpr, BLOCK: tl.constexpr,
                FULL: tl.constexpr):
    q = first // 4 + tl.arange(0, BLOCK // 4)                       # int64: one counter for four elements
    low, high = (q & 0xFFFFFFFF).to(tl.uint32), (q >> 32).to(tl.uint32)
    zero = low * 0
    r0, r1, r2, r3 = tl.philox(seed, low, high, zero + tensor.to(tl.uint32), zero)
    z0, z1 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(r0), tl.uint_to_uniform_float(r1))
    z2, z3 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(r2), tl.uint_to_uniform_float(r3))
    z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCK,))     # element 4 q + j takes z_j
    w = _load(w_ptr, offs, left, FULL)
    _store(w_ptr, offs, (w.to(tl.float32) + sigma * z).to(W), left, FULL)


@triton.jit
def _noise_kernel(addr_ptr, numel_ptr, owner_ptr, start_ptr, n, id_ptr, seed, sigma,
                  A: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """w <- w + sigma * z, z ~ N(0, 1) from Philox counters (element // 4, tensor). Columns: w. Reads and writes w."""
    t, start, left = _chunk(numel_ptr, owner_ptr, start_ptr)
    w_ptr = _pointer(addr_ptr, 0, n, t, start, A, ALIGNED)
    tensor = tl.load(id_ptr + t)
    for i in range(0, CHUNK, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        if i + BLOCK <= left:
            _noise_tile(w_ptr, offs, left, start + i, tensor, seed, sigma, A, BLOCK, True)
        elif i < left:
            _noise_tile(w_ptr, offs, left, start + i, tensor, seed, sigma, A, BLOCK, False)


@triton.jit
def _mean_kernel(addr_ptr, numel_ptr, owner_ptr, start_ptr, n, count,
                 B: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """mean <- mean + (w - mean) / count. Columns: mean (fp32), w (dtype B). Reads both, writes the mean."""
    t, start, left = _chunk(numel_ptr, owner_ptr, start_ptr)
    m_ptr = _pointer(addr_ptr, 0, n, t, start, tl.float32, ALIGNED)
    w_ptr = _pointer(addr_ptr, 1, n, t, start, B, ALIGNED)
    for i in range(0, CHUNK, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        if i + BLOCK <= left:
            m = _load(m_ptr, offs, left, True)
            w = _load(w_ptr, offs, left, True).to(tl.float32)
            _store(m_ptr, offs, m + tl.div_rn(w - m, count), left, True)
        elif i < left:
            m = _load(m_ptr, offs, left, False)
            w = _load(w_ptr, offs, left, False).to(tl.float32)
            _store(m_ptr, offs, m + tl.div_rn(w - m, count), left, False)


# ---- the table ------------------------------------------------------------------------------------------------

def chunk_map(sizes, chunk=CHUNK):
    """(owner (C,) int32, start (C,) int64) as numpy arrays: which tensor chunk c belongs to and where it starts."""
    counts = (np.asarray(sizes, dtype=np.int64) + chunk - 1) // chunk
    owner = np.repeat(np.arange(len(sizes), dtype=np.int32), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    return owner, (np.arange(len(owner), dtype=np.int64) - first) * chunk


@functools.lru_cache(maxsize=32)
def _device_map(sizes, device, chunk):
    """chunk_map and the sizes as device tensors; depends on sizes only, so a model's map is built once."""
    owner, start = chunk_map(sizes, chunk)
    return [torch.from_numpy(x).to(device) for x in (np.asarray(sizes, dtype=np.int64), owner, start)]


def _dense(t):
    """Does t fill its memory without gaps or overlaps, in whatever order of dimensions?"""
    expected = 1
    for stride, size in sorted((st, s) for st, s in zip(t.stride(), t.shape) if s > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _layout(t):
    return [st for st, s in zip(t.stride(), t.shape) if s > 1]


def tables(columns, chunk=CHUNK):
    """Group the rows of columns (lists of tensors, the same shape across a row) by device and dtypes; each group is
    {"rows", "tensors", "head", "grid", "aligned"}, head being the kernel's first five arguments.

    Empty tensors are left out. ValueError for a dtype without kernel, for gaps or overlaps in memory, and for
    columns whose elements lie in different orders: an element-wise pass over raw memory would be silently wrong.
    """
    groups = {}
    for row, tensors in enumerate(zip(*columns, strict=True)):
        for t in tensors:
            if t.dtype not in TYPES:
                raise ValueError(f"tensor {row} is {t.dtype}: the kernels take {', '.join(map(str, TYPES))}")
            if not _dense(t) or t.shape != tensors[0].shape or _layout(t) != _layout(tensors[0]):
                raise ValueError(f"tensor {row} of shape {tuple(t.shape)} has strides {t.stride()} beside "
                                 f"{tensors[0].stride()}: make it contiguous() or use --no-triton")
        if tensors[0].numel():
            key = (tensors[0].device, tuple(t.dtype for t in tensors))
            groups.setdefault(key, []).append((row, tensors))
    out = []
    for (device, _), members in groups.items():
        addresses = [[ts[k].data_ptr() for _, ts in members] for k in range(len(columns))]
        numel, owner, start = _device_map(tuple(ts[0].numel() for _, ts in members), device, chunk)
        table = torch.tensor(addresses, dtype=torch.int64).to(device, non_blocking=True)
        out.append({"rows": [row for row, _ in members], "tensors": [ts for _, ts in members],   # kept alive here
                    "head": (table, numel, owner, start, len(members)), "grid": (len(owner),),
                    "aligned": all(a % 16 == 0 for column in addresses for a in column)})
    return out


def _launch(kernel, group, *args, chunk=CHUNK, **constants):
    """One launch over a group. A thread takes 16 elements: 8 warps of 32 threads, or 4 of 64 on AMD."""
    warps = 4 if torch.version.hip else 8
    kernel[group["grid"]](*group["head"], *args, ALIGNED=group["aligned"], CHUNK=chunk, BLOCK=min(BLOCK, chunk),
                          num_warps=warps, enable_fp_fusion=False, **constants)


def usable(tensors):
    """None when the kernels can run on these tensors, else the reason why not."""
    if os.environ.get("TRITON_INTERPRET") != "1" and not all(t.is_cuda for t in tensors):
        return "the parameters are not on a GPU"
    odd = {str(t.dtype) for t in tensors} - {str(d) for d in TYPES}
    return f"no kernel for {', '.join(sorted(odd))}" if odd else None


# ---- the operations -------------------------------------------------------------------------------------------

def tensor_sumsq(tensors, chunk=CHUNK):
    """(N,) fp32 sum of squares of each tensor, on the first one's device; 0 for empty ones."""
    out = torch.zeros(len(tensors), device=tensors[0].device if tensors else None)
    for group in tables([tensors], chunk):
        part = torch.empty(group["grid"], device=group["head"][0].device)
        _launch(_sumsq_kernel, group, part, A=TYPES[group["tensors"][0][0].dtype], chunk=chunk)
        counts = (group["head"][1] + chunk - 1) // chunk
        sums = torch.segment_reduce(part, "sum", lengths=counts)    # one thread a tensor: deterministic
        out[group["rows"]] = sums.to(out.device)
    return out


def global_norm(tensors):
    """||.||_2 over all tensors together: 0-dim fp32 on the device of the first."""
    return tensor_sumsq(tensors).sum().sqrt()


def ascent_(params, directions, rho, saved, reuse=True, eps=1e-12, linf=False, chunk=CHUNK):
    """theta <- theta + rho d / (||d|| + eps) in place, or with linf theta <- theta + rho sign(d), which needs no norm.

    Returns 0-dim {norm, applied_norm, cosine}, cosine that of the applied step with d. directions: gradients, or for
    linf also int8 signs. saved: a list that takes (parameter, old weights) before anything moves; with reuse the old
    weights go into the direction's memory where the dtypes agree, its values are lost; otherwise into a new buffer.
    A zero or non-finite norm moves nothing (l2), a non-finite element does not move (linf); the norm returned tells.
    No host sync.
    """
    same = [reuse and p.dtype == d.dtype for p, d in zip(params, directions)]
    into = [d if s else torch.empty_like(p) for p, d, s in zip(params, directions, same)]
    device = params[0].device if params else None
    if linf:
        scale = torch.full((), rho, dtype=torch.float32, device=device)
    else:
        norm = global_norm(directions)
        scale = torch.where(torch.isfinite(norm) & (norm > 0), rho / (norm + eps), 0.0)
    sums = torch.zeros(3, device=device)
    for keep in (True, False):               # two sets of columns; most models have only the first
        rows = [i for i, s in enumerate(same) if s == keep]
        columns = [[x[i] for i in rows] for x in (params, directions, into)[:2 if keep else 3]]
        for group in tables(columns, chunk):
            where, tensors = group["head"][0].device, group["tensors"]
            part = torch.full((*group["grid"], 3), -1.0, device=where)              # sums of squares are >= 0
            moved = [(row[0], row[-1]) for row in tensors]
            try:
                _launch(_ascent_kernel, group, scale.to(where), part, A=TYPES[tensors[0][0].dtype],
                        B=TYPES[tensors[0][1].dtype], SAVE=len(columns) - 1, LINF=linf, chunk=chunk)
            except BaseException:
                if (part[:, 0] >= 0).any():  # interrupted behind the launch: the weights moved after all
                    saved.extend(moved)
                raise
            saved.extend(moved)
            sums += part.sum(0).to(device)
    applied, norm = sums[0].sqrt(), sums[2].sqrt()
    cosine = torch.where((applied > 0) & (norm > 0), sums[1] / (applied * norm), 0.0)
    return {"norm": norm, "applied_norm": applied, "cosine": cosine}


def restore_(saved, chunk=CHUNK):
    """Copy the old weights back, bit for bit, and empty the list."""
    for group in tables([[p for p, _ in saved], [w for _, w in saved]], chunk):
        _launch(_copy_kernel, group, A=TYPES[group["tensors"][0][0].dtype], chunk=chunk)
    saved.clear()


def noise_(params, sigma, seed, chunk=CHUNK):
    """theta <- theta + sigma * z in place, z ~ N(0, I) as noise_ref(numel, index in params, seed) defines it."""
    for group in tables([params], chunk):
        ids = torch.tensor(group["rows"], dtype=torch.int32).to(group["head"][0].device, non_blocking=True)
        _launch(_noise_kernel, group, ids, seed, float(sigma), A=TYPES[group["tensors"][0][0].dtype], chunk=chunk)


def running_mean_(mean, params, count, chunk=CHUNK):
    """mean <- mean + (theta - mean) / count in place, for the count-th set of weights; mean is fp32."""
    for group in tables([mean, params], chunk):
        _launch(_mean_kernel, group, float(count), B=TYPES[group["tensors"][0][1].dtype], chunk=chunk)


# ---- what shows that it is fast: read the compiled code, or measure --------------------------------------------

TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]


def variants():
    """[(name, kernel, extra arguments, constants, bytes read, bytes written an element)] of what is shipped."""
    out = []
    for name, t, size in (("bf16", tl.bfloat16, 2), ("fp32", tl.float32, 4)):
        sums = {"scale_ptr": "*fp32", "part_ptr": "*fp32"}
        out += [
            (f"norm {name}", _sumsq_kernel, {"part_ptr": "*fp32"}, {"A": t}, size, 0),
            (f"ascent l2 {name}", _ascent_kernel, sums, {"A": t, "B": t, "SAVE": 1, "LINF": False}, 2 * size, 2 * size),
            (f"ascent linf {name}", _ascent_kernel, sums, {"A": t, "B": t, "SAVE": 1, "LINF": True}, 2 * size, 2 * size),
            (f"ascent signs {name}", _ascent_kernel, sums, {"A": t, "B": tl.int8, "SAVE": 2, "LINF": True},
             size + 1, 2 * size),
            (f"restore {name}", _copy_kernel, {}, {"A": t}, size, size),
            (f"noise {name}", _noise_kernel, {"id_ptr": "*i32", "seed": "i64", "sigma": "fp32"}, {"A": t}, size, size),
            (f"mean {name}", _mean_kernel, {"count": "fp32"}, {"B": t}, 4 + size, 4)]
    return out


def compiled(kernel, extra, constants, backend, arch, warp):
    """Compile for a target that need not be here; {"registers", "spilled", "shared", "loads16", "stores16",
    "narrow"}: bytes, counts of 16-byte accesses in the machine code, widths of others on the full-tile path."""
    import re, subprocess, tempfile
    from pathlib import Path
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    constants = {**constants, "ALIGNED": True, "CHUNK": CHUNK, "BLOCK": BLOCK}
    signature = {"addr_ptr": "*i64", "numel_ptr": "*i64", "owner_ptr": "*i32", "start_ptr": "*i64", "n": "i32", **extra,
                 **{k: "constexpr" for k in constants}}
    code = triton.compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget(backend, arch, warp),
                          options={"num_warps": 256 // warp, "enable_fp_fusion": False})
    out = {"shared": code.metadata.shared}
    if backend == "hip":
        asm, number = code.asm["amdgcn"], lambda key: int(re.search(rf"\.{key}:\s*(\d+)", code.asm["amdgcn"])[1])
        out |= {"registers": number("vgpr_count"), "spilled": number("vgpr_spill_count") + number("sgpr_spill_count"),
                "loads16": len(re.findall(r"(?:global|buffer)_load_dwordx4", asm)),
                "stores16": len(re.findall(r"(?:global|buffer)_store_dwordx4", asm)), "narrow": []}
        return out
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "k.cubin", Path(folder) / "k.ptx"
        cubin.write_bytes(code.asm["cubin"]), ptx.write_text(code.asm["ptx"])
        run = lambda *a: subprocess.run(list(map(str, a)), capture_output=True, text=True)
        sass = run(tools / "cuobjdump", "-sass", cubin).stdout
        target = re.search(r"^\.target (\w+)", code.asm["ptx"], re.M)[1]
        for ptxas in ("ptxas", "ptxas-blackwell"):                   # Triton ships an older and a newer one
            again = run(tools / ptxas, "-v", "--fmad=false", f"--gpu-name={target}", ptx, "-o", f"{cubin}2")
            if again.returncode == 0:
                break
        said = again.stderr
    spills = [int(x) for x in re.findall(r"(\d+) bytes spill", said)]
    # The full-tile path is what stands in the loop without a predicate; the masked tail is predicated in the PTX.
    loop = code.asm["ptx"][code.asm["ptx"].index("$L__BB0_1:"):]
    wide = re.findall(r"^\s*(?:ld|st)\.global(?:\.\w+)*?((?:\.v\d)?)\.\w(\d+)\s", loop, re.M)
    bytes_each = [int(bits) // 8 * int(v[2:] or 1) for v, bits in wide]
    return out | {"registers": int(re.search(r"Used (\d+) registers", said)[1]), "spilled": sum(spills),
                  "loads16": len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128(?!\S*CONSTANT)", sass)),
                  "stores16": len(re.findall(r"\bSTG\.E(?:\.\w+)*\.128", sass)),
                  "narrow": sorted(b for b in bytes_each if b < 16)}


def code_report(shipped):
    """Rows of the table for variants() on every TARGETS: what the compiler made of each kernel."""
    rows = []
    for name, kernel, extra, constants, read, written in shipped:
        for backend, arch, warp in TARGETS:
            c = compiled(kernel, extra, constants, backend, arch, warp)
            moved = (c["loads16"] + c["stores16"]) * 16 * 256 / BLOCK     # 256 threads share a tile of BLOCK elements
            rows.append({"kernel": name, "target": f"sm_{arch}" if backend == "cuda" else arch, **c,
                         "access_bytes": min(c["narrow"], default=16), "bytes_moved": moved, "floor": read + written})
    return rows


def print_rows(rows):
    """Print a list of dicts of the same keys as a table."""
    cells = [list(rows[0])] + [[f"{v:g}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    widths = [max(len(r[i]) for r in cells) for i in range(len(cells[0]))]
    for r in cells:
        print("  ".join(c.ljust(w) for c, w in zip(r, widths)))


def mistral_shapes(layers):
    """Parameter shapes of Mistral-7B with this many of its 32 layers: 4 have 1.13e9 parameters, 32 have 7.24e9."""
    d, kv, ff, vocab = 4096, 1024, 14336, 32000
    layer = [(d, d), (kv, d), (kv, d), (d, d), (ff, d), (ff, d), (d, ff), (d,), (d,)]
    return [(vocab, d)] + layer * layers + [(d,), (vocab, d)]


def measure(cases, params, repeats=20):
    """Rows of the benchmark: cases = {operation: {way: function}}; the ways take turns, medians are reported."""
    import statistics, time
    cuda = params[0].is_cuda

    def timed(work):
        if not cuda:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    rows, count = [], sum(p.numel() for p in params)
    a = torch.empty(min(count, 2**30), dtype=torch.bfloat16, device=params[0].device)
    b = torch.empty_like(a)
    copy = 2 * a.nbytes / statistics.median(timed(lambda: b.copy_(a)) for _ in range(repeats))
    del a, b
    for operation, (floor, ways) in cases.items():
        times, launches, peaks = {w: [] for w in ways}, {}, {}
        for way, work in ways.items():                              # warm up, count launches, take the peak
            work()
            if cuda:
                torch.cuda.synchronize()
                base = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    work()
                    torch.cuda.synchronize()
                launches[way] = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())
                peaks[way] = (torch.cuda.max_memory_allocated() - base) / 1e9
        for _ in range(repeats):
            for way, work in ways.items():
                times[way].append(timed(work))
        for way in ways:
            seconds = statistics.median(times[way])
            rate = floor * count / seconds
            rows.append({"operation": operation, "way": way, "ms": round(seconds * 1e3, 3),
                         "GB/s at the floor": round(rate / 1e9, 1), "percent of copy": round(100 * rate / copy, 1),
                         "launches": launches.get(way, "-"), "extra GB": round(peaks.get(way, 0.0), 3)})
    return rows


def benchmark(shapes, device, repeats=20):
    """Rows for norm, ascent and restore, noise and mean in bf16: kernel, torch._foreach, Python loop."""
    params = [torch.randn(s, device=device, dtype=torch.bfloat16) * 0.02 for s in shapes]
    grads = [torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes]
    mean = [torch.zeros(s, device=device) for s in shapes]

    def kernel_sam():
        saved = []
        ascent_(params, grads, 0.01, saved)
        restore_(saved)                      # the old weights lie in grads now: later turns climb along those

    def foreach_sam():
        scale = 0.01 / torch.stack(torch._foreach_norm(grads)).norm()
        saved = [p.clone() for p in params]
        torch._foreach_add_(params, torch._foreach_mul(grads, scale))
        torch._foreach_copy_(params, saved)

    def loop_sam():
        scale = 0.01 / torch.stack([g.norm() for g in grads]).norm()
        saved = [p.clone() for p in params]
        for p, g in zip(params, grads):
            p.add_(g * scale)
        for p, w in zip(params, saved):
            p.copy_(w)

    def loop_noise():
        for p in params:
            p.add_(torch.randn_like(p), alpha=1e-4)

    def loop_mean():
        for m, p in zip(mean, params):
            m.add_((p.float() - m) / 2)
    return measure({
        "norm": (2, {"kernel": lambda: global_norm(grads),
                     "foreach": lambda: torch.stack(torch._foreach_norm(grads)).norm(),
                     "loop": lambda: torch.stack([g.norm() for g in grads]).norm()}),
        "norm + ascent + restore": (14, {"kernel": kernel_sam, "foreach": foreach_sam, "loop": loop_sam}),
        "noise": (4, {"kernel": lambda: noise_(params, 1e-4, 0), "loop": loop_noise}),
        "mean": (10, {"kernel": lambda: running_mean_(mean, params, 2),
                      "foreach": lambda: torch._foreach_lerp_(mean, [p.float() for p in params], 0.5),
                      "loop": loop_mean})}, params, repeats)


def main(doc, shipped, bench):
    """The command line of a kernel file: read the compiled code, and where there is a GPU measure too."""
    import argparse, json
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default=None, metavar="PATH", help="write the rows there as well")
    args = parser.parse_args()
    out = {"triton": triton.__version__, "torch": torch.__version__, "code": code_report(shipped), "measured": {}}
    print_rows([{k: v for k, v in r.items() if k not in ("loads16", "stores16", "narrow")} for r in out["code"]])
    if torch.cuda.is_available():
        out["device"] = torch.cuda.get_device_name()
        for layers in (4, 32):
            shapes = mistral_shapes(layers)
            print(f"\n{out['device']}, {sum(int(np.prod(s)) for s in shapes) / 1e9:.2f}e9 bf16 parameters in "
                  f"{len(shapes)} tensors, medians of 20 turns")
            rows = bench(shapes, "cuda")
            out["measured"][str(layers)] = rows
            print_rows(rows)
            torch.cuda.empty_cache()
    else:
        print("\nno GPU here: compiled and read, not measured")
    if args.json:
        with open(f"{args.json}.tmp", "w", encoding="utf-8") as f:
            json.dump(out, f, indent=1)
        os.replace(f"{args.json}.tmp", args.json)
    bad = [r for r in out["code"] if r["spilled"] or r["access_bytes"] < 16 or r["bytes_moved"] != r["floor"]]
    raise SystemExit(f"{len(bad)} rows miss the floor: {bad[0]}" if bad else 0)


if __name__ == "__main__":
    main(__doc__, variants(), benchmark)
