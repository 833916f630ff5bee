"""Triton kernels over all parameters of a model at once: norm, ascent, restore, noise, running mean.

    python kernels/multi_tensor.py                   # no GPU needed: compile for four, read the machine code
    python kernels/multi_tensor.py --json out.json   # the same as JSON; on a GPU time 1 and 7 billion weights

WHY. SAM climbs along the gradient and comes back, at every step. In a Python loop that is several launches a
tensor and copies of the weights; here each operation is one launch for every (parameter dtype, gradient
dtype) pair, however many tensors there are.
HOW. The kernels read a table of addresses, so that models stay as they are: a grid of chunks, and for each
chunk the tensor it belongs to and where it starts. Tensors may lie anywhere, also off alignment (a narrow
variant takes those), in any order of dimensions, but without gaps.

Bytes moved for a bf16 parameter: norm 2, ascent 8 (read w and g, write w and the old w into g), restore 4.
PRECISION. All arithmetic is fp32, without fused multiply-add, stored with one rounding. Restore copies bits.
DETERMINISM. One partial sum a chunk, then a small second reduction; no atomics. Noise follows from (seed,
tensor, element) alone. Nothing here reads a value back to the host.
SHARDS. Of a DTensor (FSDP) the kernels take the local tensor; sums then go through one all_reduce.

The functions are those of sam.py and replace them there. The `_ref` functions say what they must compute.

MEASURED: nothing on a GPU yet. On 2026-11-24 the first command, with Triton 3.9.0 and with 3.8.0 (ptxas and
LLVM as shipped): each of 60 kernels and targets accesses global memory 16 bytes at a time in full tiles,
spills nothing and moves the floor, with at most 78 registers a thread (170 for signs as int8). test_all.py
passes with both versions by the interpreter. The table of Mistral-7B's 291 tensors takes the host 2 ms.
"""
import functools

import numpy as np
import torch
import triton
import triton.language as tl

CHUNK = 32768                             # elements that one program handles, of one tensor
TURN = 4096                               # bytes of the narrowest tensor in a loop turn: 256 threads x 16
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
         torch.int8: tl.int8}
INTERPRETED = bool(triton.knobs.runtime.interpret)         # TRITON_INTERPRET=1 when this file was imported


# ---- references: the definition of every operation, in plain torch -----------------------------------------

def norm_ref(tensors):
    """sqrt of the sum of squares over all elements of all tensors, in fp64."""
    return sum(t.double().square().sum() for t in tensors).sqrt()


def ascent_ref(w, d, scale, linf=False):
    """w + scale * d, or w + scale * sign(d), of one tensor: fp32 arithmetic, rounded once to w's dtype."""
    return (w.float() + scale * (d.float().sign() if linf else d.float())).to(w.dtype)


def philox_ref(seed, c0, c1, c2, c3):
    """Philox4x32-10 (Salmon et al., SC 2011): counters (N,) int64 of 32-bit words -> four such tensors."""
    low, k0, k1 = 0xFFFFFFFF, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57            # wraps at 64 bits, which the masks do not see
        c0, c1, c2, c3 = (b >> 32 & low) ^ c1 ^ k0, b & low, (a >> 32 & low) ^ c3 ^ k1, a & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0, c1, c2, c3


def noise_ref(numel, tensor, seed):
    """The z of one tensor, fp64 (numel,): four normals (Box and Muller) of the Philox words at counter
    (element // 4, its high half, tensor, 0). |z| is at most 5.7."""
    q = torch.arange((numel + 3) // 4)
    words = torch.stack(philox_ref(seed, q & 0xFFFFFFFF, q >> 32, torch.full_like(q, tensor), q * 0))
    words = torch.where(words < 2**31, words, 2**32 - 1 - words)              # as triton.language maps them
    u, z = words.double() * 4.6566127342e-10, []                              # (4, N) in [0, 1)
    for u1, u2 in ((u[0], u[1]), (u[2], u[3])):
        r = (-2 * u1.clamp(min=1e-7).log()).sqrt()
        z += [r * (2 * torch.pi * u2).cos(), r * (2 * torch.pi * u2).sin()]
    return torch.stack(z, 1).flatten()[:numel]


# ---- kernels ----------------------------------------------------------------------------------------------
# Every kernel begins with the same table: table (n, WIDTH) int64, a row for each tensor: numel, an address
# for each column, sometimes more; owner (C,) int32 the tensor of chunk c; start (C,) int64 its first element.

@triton.jit
def _chunk(table_ptr, owner_ptr, start_ptr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """(row of the table, first element, number of elements) of this program's chunk."""
    c = tl.program_id(0)
    row_ptr = table_ptr + tl.load(owner_ptr + c) * WIDTH
    start = tl.load(start_ptr + c)
    return row_ptr, start, tl.minimum(tl.load(row_ptr) - start, CHUNK).to(tl.int32)


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
def _sumsq_kernel(table_ptr, owner_ptr, start_ptr, part_ptr,
                  A: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """part[c] = sum of squares of chunk c, fp32. Columns: g (dtype A). Reads each element once."""
    row_ptr, start, size = _chunk(table_ptr, owner_ptr, start_ptr, 2, CHUNK)
    g_ptr = _pointer(row_ptr, 1, start, A, ALIGNED)
    acc = tl.zeros((BLOCK,), tl.float32)
    full = size // BLOCK * BLOCK
    for i in range(0, full, BLOCK):
        g = _load(g_ptr, i + tl.arange(0, BLOCK), size, True).to(tl.float32)
        acc += g * g
    if full < size:
        g = _load(g_ptr, full + tl.arange(0, BLOCK), size, False).to(tl.float32)
        acc += g * g
    tl.store(part_ptr + tl.program_id(0), tl.sum(acc))


@triton.jit
def _ascent_tile(w_ptr, d_ptr, s_ptr, offs, size, scale, moved, along, norm,
                 A: tl.constexpr, LINF: tl.constexpr, FULL: tl.constexpr):
    w = _load(w_ptr, offs, size, FULL)
    d = _load(d_ptr, offs, size, FULL).to(tl.float32)
    wide = w.to(tl.float32)
    if LINF:                              # what is not finite has no sign to follow
        sign = (d > 0).to(tl.float32) - (d < 0).to(tl.float32)
        finite = tl.abs(d) < float("inf")
        d = tl.where(finite, sign, float("nan"))                           # the sums tell by being nan
        step = scale * tl.where(finite, sign, 0.0)
        norm += d * d
    else:
        step = scale * d
    new = tl.where(scale == 0, wide, wide + step).to(A)      # scale 0 says: do not move; 0 * inf would be nan
    _store(s_ptr, offs, w, size, FULL)    # s may be d: of one dtype, so the thread that read d writes there
    _store(w_ptr, offs, new, size, FULL)
    step = new.to(tl.float32) - wide      # what survived the rounding
    return moved + step * step, along + step * d, norm


@triton.jit
def _ascent_kernel(table_ptr, owner_ptr, start_ptr, scale_ptr, part_ptr,
                   A: tl.constexpr, B: tl.constexpr, SAVE: tl.constexpr, LINF: tl.constexpr,
                   ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """w <- w + scale * d, where LINF makes d its sign, the old w into column SAVE; part[c] = sums of
    step^2, step d and, with LINF, d^2 over chunk c. Columns: w (dtype A), d (dtype B), and a third to save
    into unless SAVE is 2, d's own memory. Reads w and d once, writes w and the saved w once."""
    row_ptr, start, size = _chunk(table_ptr, owner_ptr, start_ptr, SAVE + 1, CHUNK)
    w_ptr = _pointer(row_ptr, 1, start, A, ALIGNED)
    d_ptr = _pointer(row_ptr, 2, start, B, ALIGNED)
    s_ptr = _pointer(row_ptr, SAVE, start, A, ALIGNED)
    scale = tl.load(scale_ptr)
    moved = tl.zeros((BLOCK,), tl.float32)
    along = tl.zeros((BLOCK,), tl.float32)
    norm = tl.zeros((BLOCK,), tl.float32)
    full = size // BLOCK * BLOCK
    for i in range(0, full, BLOCK):
        moved, along, norm = _ascent_tile(w_ptr, d_ptr, s_ptr, i + tl.arange(0, BLOCK), size, scale,
                                          moved, along, norm, A, LINF, True)
    if full < size:
        moved, along, norm = _ascent_tile(w_ptr, d_ptr, s_ptr, full + tl.arange(0, BLOCK), size, scale,
                                          moved, along, norm, A, LINF, False)
    part_ptr += tl.program_id(0) * 3
    tl.store(part_ptr, tl.sum(moved))
    tl.store(part_ptr + 1, tl.sum(along))
    tl.store(part_ptr + 2, tl.sum(norm))


@triton.jit
def _copy_kernel(table_ptr, owner_ptr, start_ptr,
                 A: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Column 1 <- column 2, bit for bit."""
    row_ptr, start, size = _chunk(table_ptr, owner_ptr, start_ptr, 3, CHUNK)
    to_ptr = _pointer(row_ptr, 1, start, A, ALIGNED)
    from_ptr = _pointer(row_ptr, 2, start, A, ALIGNED)
    full = size // BLOCK * BLOCK
    for i in range(0, full, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        _store(to_ptr, offs, _load(from_ptr, offs, size, True), size, True)
    if full < size:
        offs = full + tl.arange(0, BLOCK)
        _store(to_ptr, offs, _load(from_ptr, offs, size, False), size, False)


@triton.jit
def _normals(a, b):
    """Two normals of two random words (Box and Muller). A turn has four quarters and a quarter a short
    series; tl.cos takes any angle, and needs stack memory for the large ones."""
    r = tl.sqrt_rn(-2.0 * tl.log(tl.maximum(tl.uint_to_uniform_float(a), 1e-7)))
    turn = 4.0 * tl.uint_to_uniform_float(b)
    quarter = tl.floor(turn + 0.5)
    x = (turn - quarter) * 1.5707963267948966                       # in [-pi/4, pi/4]
    y = x * x
    s = x * (1.0 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880)))))
    c = 1.0 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320))))
    odd = (quarter == 1) | (quarter == 3)
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    return (r * tl.where((quarter == 1) | (quarter == 2), -cos, cos),
            r * tl.where((quarter == 2) | (quarter == 3), -sin, sin))


@triton.jit
def _noise_tile(w_ptr, i, size, start, tensor, seed, sigma,
                A: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    q = (start + i) // 4 + tl.arange(0, BLOCK // 4)                 # int64: one counter for four elements
    low, high = (q & 0xFFFFFFFF).to(tl.uint32), (q >> 32).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, low, high, low * 0 + tensor.to(tl.uint32), low * 0)
    z0, z1 = _normals(r0, r1)
    z2, z3 = _normals(r2, r3)
    z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCK,))     # element 4 q + j takes z_j
    offs = i + tl.arange(0, BLOCK)
    w = _load(w_ptr, offs, size, FULL).to(tl.float32)
    _store(w_ptr, offs, (w + sigma * z).to(A), size, FULL)


@triton.jit(do_not_specialize=["seed"])
def _noise_kernel(table_ptr, owner_ptr, start_ptr, seed, sigma,
                  A: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """w <- w + sigma * z, z ~ N(0, 1) of Philox counters (element // 4, tensor). Columns: w (dtype A), and
    the number of the tensor. Reads w once, writes w once."""
    row_ptr, start, size = _chunk(table_ptr, owner_ptr, start_ptr, 3, CHUNK)
    w_ptr = _pointer(row_ptr, 1, start, A, ALIGNED)
    tensor = tl.load(row_ptr + 2)
    full = size // BLOCK * BLOCK
    for i in range(0, full, BLOCK):
        _noise_tile(w_ptr, i, size, start, tensor, seed, sigma, A, BLOCK, True)
    if full < size:
        _noise_tile(w_ptr, full, size, start, tensor, seed, sigma, A, BLOCK, False)


@triton.jit
def _mean_kernel(table_ptr, owner_ptr, start_ptr, count,
                 B: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """mean <- mean + (w - mean) / count. Columns: mean (fp32), w (dtype B). Reads both, writes the mean."""
    row_ptr, start, size = _chunk(table_ptr, owner_ptr, start_ptr, 3, CHUNK)
    m_ptr = _pointer(row_ptr, 1, start, tl.float32, ALIGNED)
    w_ptr = _pointer(row_ptr, 2, start, B, ALIGNED)
    full = size // BLOCK * BLOCK
    for i in range(0, full, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        m = _load(m_ptr, offs, size, True)
        w = _load(w_ptr, offs, size, True).to(tl.float32)
        _store(m_ptr, offs, m + tl.div_rn(w - m, count), size, True)
    if full < size:
        offs = full + tl.arange(0, BLOCK)
        m = _load(m_ptr, offs, size, False)
        w = _load(w_ptr, offs, size, False).to(tl.float32)
        _store(m_ptr, offs, m + tl.div_rn(w - m, count), size, False)


# ---- the table --------------------------------------------------------------------------------------------

def chunk_map(sizes, chunk=CHUNK):
    """(owner (C,) int32, start (C,) int64) as numpy arrays: the tensor of chunk c and its first element."""
    counts = (np.asarray(sizes, dtype=np.int64) + chunk - 1) // chunk
    owner = np.repeat(np.arange(len(sizes), dtype=np.int32), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)                # the first chunk of the same tensor
    return owner, (np.arange(len(owner), dtype=np.int64) - first) * chunk


@functools.lru_cache(maxsize=32)
def _device_map(sizes, device, chunk):
    """chunk_map on the device; it follows from sizes only, so that a model's map is built once."""
    return [torch.from_numpy(x).to(device) for x in chunk_map(sizes, chunk)]


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


def _process_groups(t):
    """The process groups over which a DTensor is sharded, () for other tensors and replicas."""
    places = getattr(t, "placements", ())
    if any(place.is_partial() for place in places):
        raise ValueError(f"a tensor with placements {places} has to be reduced first: redistribute() it")
    return tuple(t.device_mesh.get_group(i) for i, place in enumerate(places) if place.is_shard())


def tables(columns, extra=None, chunk=CHUNK):
    """Group the rows of columns (lists of tensors; a row has one shape) by device, dtypes and sharding.

    A group is what a launch needs: {"rows", "tensors" (kept alive here), "types", "head": the kernel's first
    three arguments, "grid", "block", "aligned", "shards"}. extra: one more int for every row. A tensor that
    is in the first column twice (a tied weight) counts once. ValueError for a dtype without kernel, for gaps
    in memory, and for a row whose elements lie in different orders: a pass over raw memory would be wrong.
    """
    groups, seen = {}, set()
    for row, tensors in enumerate(zip(*columns, strict=True)):
        if id(tensors[0]) in seen:
            continue
        seen.add(id(tensors[0]))
        shards = [_process_groups(t) for t in tensors][0]
        tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
        for t in tensors:
            if t.dtype not in TYPES:
                raise ValueError(f"tensor {row} is {t.dtype}: the kernels take {', '.join(map(str, TYPES))}")
            if gaps(t) or t.shape != tensors[0].shape or _order(t) != _order(tensors[0]):
                raise ValueError(
                    f"tensor {row} has shape {tuple(t.shape)} and strides {t.stride()} beside "
                    f"{tuple(tensors[0].shape)} and {tensors[0].stride()}: make it contiguous(), or use "
                    "triton=False")
        key = (tensors[0].device, tuple(t.dtype for t in tensors), shards)
        groups.setdefault(key, []).append((row, tensors))
    out = []
    for (device, dtypes, shards), members in groups.items():
        table = [[ts[0].numel(), *(t.data_ptr() for t in ts), *([extra[row]] if extra else [])]
                 for row, ts in members]
        owner, start = _device_map(tuple(line[0] for line in table), device, chunk)
        pin = device.type == "cuda"                                    # so that the copy does not wait
        head = torch.tensor(table, pin_memory=pin).to(device, non_blocking=True), owner, start
        out.append({"rows": [row for row, _ in members], "tensors": [ts for _, ts in members], "head": head,
                    "grid": (len(owner),), "types": [TYPES[t] for t in dtypes], "shards": shards,
                    "block": min(chunk, TURN // min(t.itemsize for t in dtypes)),
                    "aligned": all(a % 16 == 0 for line in table for a in line[1:1 + len(dtypes)])})
    return out


def _launch(kernel, group, *args, chunk=CHUNK, **constants):
    """One launch over a group, by 256 threads a program: 8 warps of 32, or 4 of 64 on AMD."""
    if group["head"][0].is_cuda == INTERPRETED:
        raise ValueError("the kernels take GPU tensors, or under TRITON_INTERPRET=1 CPU tensors")
    if group["grid"][0]:
        with torch.cuda.device_of(group["head"][0]):
            kernel[group["grid"]](*group["head"], *args, ALIGNED=group["aligned"], CHUNK=chunk,
                                  BLOCK=group["block"], num_warps=4 if torch.version.hip else 8,
                                  enable_fp_fusion=False, **constants)
        torch.autograd.graph.increment_version([ts[0] for ts in group["tensors"]])


def _over_shards(sums, group):
    """Add up sums over the shards of the group's tensors, in place: nothing to do for ordinary tensors."""
    for process_group in group["shards"]:
        torch.distributed.all_reduce(sums, group=process_group)
    return sums


def usable(tensors):
    """None when the kernels can run on these tensors, else the reason why not."""
    if INTERPRETED and any(t.is_cuda for t in tensors):
        return "under TRITON_INTERPRET=1 they reach no GPU memory"
    if not INTERPRETED and not all(t.is_cuda for t in tensors):
        return "the parameters are not on a GPU (TRITON_INTERPRET=1 takes them on the CPU, slowly)"
    for t in tensors:
        if t.dtype not in TYPES:
            return f"no kernel for {t.dtype}"
        if gaps(t):
            return f"a parameter of shape {tuple(t.shape)} with strides {t.stride()} has gaps in memory"
    return None


# ---- the operations ---------------------------------------------------------------------------------------

def global_norm(tensors, each=False, chunk=CHUNK):
    """||.||_2 over all tensors together, 0-dim fp32 on the device of the first; with each, of every tensor,
    (N,)."""
    device = tensors[0].device if tensors else None
    squares = torch.zeros(len(tensors) if each else 1, device=device)
    for group in tables([tensors], chunk=chunk):
        part = torch.empty(group["grid"], device=group["head"][0].device)                             # (C,)
        _launch(_sumsq_kernel, group, part, A=group["types"][0], chunk=chunk)
        if each:
            _, owner, start = group["head"]
            longest = max(-(-ts[0].numel() // chunk) for ts in group["tensors"])
            padded = part.new_zeros(len(group["rows"]), longest)                             # a row a tensor
            padded[owner, start // chunk] = part
            squares[group["rows"]] = _over_shards(padded.sum(1), group).to(device)
        else:
            squares += _over_shards(part.sum(0, keepdim=True), group).to(device)
    return squares.sqrt() if each else squares[0].sqrt()


def ascent_(params, directions, rho, saved, reuse=True, eps=1e-12, linf=False, chunk=CHUNK):
    """theta <- theta + rho d / (||d|| + eps) in place, or with linf theta <- theta + rho sign(d), which needs
    no norm. Returns 0-dim {norm, applied_norm, cosine}: of d or sign(d), of the step that rounding left, and
    between the two.

    directions: gradients, or with linf also signs kept from an earlier one, g.sign().to(torch.int8).
    saved: a list that gets (parameter, old weights) for whatever moved. With reuse the old weights go into
    the direction's own memory where dtypes agree, and its values are lost; otherwise into a new buffer.
    A zero or non-finite norm moves nothing, and with linf a non-finite element does not move: the norm
    returned tells (it is 0, inf or nan; with linf 0 or nan). An interrupt before, between or after the
    launches leaves saved right; one inside a launch, possible under the interpreter only, does not.
    """
    keep = [reuse and p.dtype == d.dtype for p, d in zip(params, directions)]
    into = [d if k else torch.empty_like(p) for p, d, k in zip(params, directions, keep)]
    device = params[0].device if params else None
    if linf:
        scale = torch.full((), rho, dtype=torch.float32, device=device)
    else:
        norm = global_norm(directions, chunk=chunk)
        scale = torch.where(torch.isfinite(norm) & (norm > 0), rho / (norm + eps), 0.0)
    sums = torch.zeros(3, device=device)
    for reused in (True, False):             # two sets of columns; most models have only the first
        rows = [i for i, k in enumerate(keep) if k == reused]
        columns = [[x[i] for i in rows] for x in (params, directions, into)[:2 if reused else 3]]
        for group in tables(columns, chunk=chunk):
            where = group["head"][0].device
            part = torch.full((*group["grid"], 3), -1.0, device=where)              # sums of squares are >= 0
            count, moved = len(saved), [(params[rows[r]], into[rows[r]]) for r in group["rows"]]
            try:
                saved.extend(moved)
                _launch(_ascent_kernel, group, scale.to(where), part, A=group["types"][0],
                        B=group["types"][1], SAVE=len(columns), LINF=linf, chunk=chunk)
            except BaseException:
                if (part[:, 0] == -1).all():     # it never ran: `into` does not hold the old weights
                    del saved[count:]
                raise
            sums += _over_shards(part.sum(0), group).to(device)
    applied, norm = sums[0].sqrt(), sums[2].sqrt() if linf else norm
    cosine = torch.where((applied > 0) & (norm > 0), sums[1] / (applied * norm), 0.0)
    return {"norm": norm, "applied_norm": applied, "cosine": cosine}


def restore_(saved, chunk=CHUNK):
    """Copy the old weights back, bit for bit, and empty the list."""
    assert all(p.dtype == w.dtype for p, w in saved), "the saved weights are not of the parameters' dtypes"
    for group in tables([[p for p, _ in saved], [w for _, w in saved]], chunk=chunk):
        _launch(_copy_kernel, group, A=group["types"][0], chunk=chunk)
    saved.clear()


def noise_(params, sigma, seed, chunk=CHUNK):
    """theta <- theta + sigma * z in place, z ~ N(0, I) = noise_ref(numel, index in params, seed), elements
    counted as they lie in memory; seed < 2**63. Shard k of the DTensor at i has the index i + k * 2**20."""
    numbers = [i + (shard(p) << 20) for i, p in enumerate(params)]
    for group in tables([params], numbers, chunk):
        _launch(_noise_kernel, group, seed, float(sigma), A=group["types"][0], chunk=chunk)


def running_mean_(mean, params, count, chunk=CHUNK):
    """mean <- mean + (theta - mean) / count in place, for the count-th set of weights; mean is fp32."""
    assert all(m.dtype == torch.float32 for m in mean), "the kernel keeps the mean in fp32"
    for group in tables([mean, params], chunk=chunk):
        _launch(_mean_kernel, group, float(count), B=group["types"][1], chunk=chunk)


# ---- what shows that it is fast: read the compiled code, or measure ---------------------------------------

TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]


def variants():
    """[(name, kernel, further arguments, constants, dtypes of the columns, bytes read and bytes written an
    element)] of what is shipped."""
    out = []
    for name, t, size in (("bf16", tl.bfloat16, 2), ("fp32", tl.float32, 4)):
        sums, i8 = {"scale_ptr": "*fp32", "part_ptr": "*fp32"}, tl.int8
        noise = {"seed": "i64", "sigma": "fp32"}
        out += [
            (f"norm {name}", _sumsq_kernel, {"part_ptr": "*fp32"}, {"A": t}, [t], size, 0),
            (f"ascent l2 {name}", _ascent_kernel, sums, {"A": t, "B": t, "SAVE": 2, "LINF": False}, [t],
             2 * size, 2 * size),
            (f"ascent linf {name}", _ascent_kernel, sums, {"A": t, "B": t, "SAVE": 2, "LINF": True}, [t],
             2 * size, 2 * size),
            (f"ascent signs {name}", _ascent_kernel, sums, {"A": t, "B": i8, "SAVE": 3, "LINF": True},
             [t, i8], size + 1, 2 * size),
            (f"restore {name}", _copy_kernel, {}, {"A": t}, [t], size, size),
            (f"noise {name}", _noise_kernel, noise, {"A": t}, [t], size, size),
            (f"mean {name}", _mean_kernel, {"count": "fp32"}, {"B": t}, [tl.float32, t], 4 + size, 4)]
    mixed = {"A": tl.bfloat16, "B": tl.float32, "SAVE": 3, "LINF": False}
    return out + [("ascent l2 bf16, fp32 g", _ascent_kernel, sums, mixed, [tl.bfloat16, tl.float32], 6, 4)]


def accesses(asm, source):
    """Bytes of every access to global memory that stands, in the assembly (PTX or AMD's), under the line
    number of a line of the file `source` that is marked "full tile"."""
    import re
    with open(source, encoding="utf-8") as f:
        full = {n for n, line in enumerate(f, 1) if line.rstrip().endswith("# full tile")}
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2,
             "ubyte": 1, "sbyte": 1, "byte": 1}
    out, here, frozen = [], False, None
    for line in asm.splitlines():
        where = re.search(r"\.loc\s.*(?:;|//) (\S+?):(\d+):", line)
        if where and not frozen:
            here = source.endswith(where[1]) and int(where[2]) in full
            frozen = None if frozen is None else True
        elif "begin inline asm" in line:      # PTX: only its first line number is one of ours
            frozen = False
        elif "end inline asm" in line:
            frozen = None
        nv = re.search(r"\b(?:ld|st)\.global(?:\.[a-z_]+)*(?:\.v(\d))?\.[busf](\d+)\s", line)
        amd = re.search(r"\b(?:global|buffer|flat)_(?:load|store)_([a-z]+?(?:x\d)?)(?=[\s_])", line)
        if here and (nv or amd):
            out.append(int(nv[1] or 1) * int(nv[2]) // 8 if nv else sizes[amd[1]])
    return out


def compiled(kernel, extra, constants, dtypes, backend, arch, warp, aligned=True):
    """Compile for a target that need not be here, as _launch would, and read the code: {"registers",
    "spilled" and "shared" in bytes, "access_bytes" of the narrowest full-tile access, "bytes_moved" an
    element by all of them}. Registers and spills are those of the machine code."""
    import re, subprocess, tempfile
    from pathlib import Path
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    block = TURN * 8 // min(t.primitive_bitwidth for t in dtypes)
    constants = {**constants, "ALIGNED": aligned, "CHUNK": CHUNK, "BLOCK": block}
    signature = {"table_ptr": "*i64", "owner_ptr": "*i32", "start_ptr": "*i64", **extra,
                 **{k: "constexpr" for k in constants}}
    code = triton.compile(ASTSource(kernel, signature, constexprs=constants),
                          target=GPUTarget(backend, arch, warp),
                          options={"num_warps": 256 // warp, "enable_fp_fusion": False})
    asm = code.asm["ptx" if backend == "cuda" else "amdgcn"]
    widths = accesses(asm, kernel.fn.__code__.co_filename)
    if backend == "cuda":
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(code.asm["cubin"])
            usage, sass = (subprocess.run([tools / "cuobjdump", flag, cubin], capture_output=True, text=True,
                                          check=True).stdout for flag in ("-res-usage", "-sass"))
        number = lambda key: int(re.search(rf"\b{key}:(\d+)", usage)[1])
        out = {"registers": number("REG"), "spilled": number("STACK") + number("LOCAL")}
        kept = len(re.findall(r"\b(?:LDG|STG)\.E(?:\.\w+)*\.128\b", sass))   # more where ptxas unrolls
        assert kept >= widths.count(16), f"ptxas split a 16-byte access: {kept} of {widths}"
    else:
        number = lambda key: int(re.search(rf"\.{key}:\s*(\d+)", asm)[1])
        out = {"registers": number("vgpr_count"), "spilled": number("private_segment_fixed_size")}
    return {**out, "shared": code.metadata.shared, "access_bytes": min(widths, default=0),
            "bytes_moved": sum(widths) * 256 / block}


def code_report(shipped):
    """Rows of the table: what the compiler made of each of variants(), for all TARGETS."""
    rows = []
    for name, kernel, extra, constants, dtypes, read, written in shipped:
        for backend, arch, warp in TARGETS:
            rows.append({"kernel": name, "target": f"sm_{arch}" if backend == "cuda" else arch,
                         **compiled(kernel, extra, constants, dtypes, backend, arch, warp),
                         "floor": read + written})
    return rows


def misses(row):
    """Does a row of code_report spill, access global memory in pieces below 16 bytes, or move too much?"""
    return bool(row["spilled"]) or row["access_bytes"] < 16 or row["bytes_moved"] != row["floor"]


def print_rows(rows):
    """Print a list of dicts of the same keys as a table."""
    text = lambda v: f"{v:g}" if isinstance(v, float) else str(v)
    cells = [list(rows[0])] + [[text(v) for v in r.values()] for r in rows]
    widths = [max(len(r[i]) for r in cells) for i in range(len(cells[0]))]
    for r in cells:
        print("  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip())


def mistral_shapes(layers):
    """Parameter shapes of Mistral-7B with this many of its 32 layers: 4 make 1.13e9 parameters, 32 make
    7.24e9."""
    d, kv, ff, vocab = 4096, 1024, 14336, 32000
    layer = [(d, d), (kv, d), (kv, d), (d, d), (ff, d), (ff, d), (d, ff), (d,), (d,)]
    return [(vocab, d)] + layer * layers + [(d,), (vocab, d)]


def measure(operation, floor, ways, count, device, repeats=20):
    """Rows of the benchmark of one operation on `count` elements: ways = {name: function}, which take turns;
    floor is bytes an element. Median seconds; launches and peak memory on a GPU only. A way that does not
    fit into memory gets a row that says so."""
    import statistics, time
    cuda = torch.device(device).type == "cuda"

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

    a = torch.empty(min(count, 2**28), dtype=torch.float32, device=device)
    ways, floors = {"device copy": lambda: a.copy_(b), **ways}, {"device copy": 8 * a.numel()}
    b, times, notes = torch.zeros_like(a), {}, {}
    for way, work in ways.items():                                   # warm up, count launches, take the peak
        notes[way] = {"launches": "-", "extra GB": "-"}
        try:
            work()
            if cuda:
                torch.cuda.synchronize()
                base = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    work()
                    torch.cuda.synchronize()
                launches = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())
                notes[way] = {"launches": launches,
                              "extra GB": round((torch.cuda.max_memory_allocated() - base) / 1e9, 3)}
            times[way] = []
        except torch.OutOfMemoryError:
            notes[way] = {"launches": "-", "extra GB": "out of memory"}
    for _ in range(repeats):
        for way in times:
            times[way].append(timed(ways[way]))
    rate = {way: floors.get(way, floor * count) / statistics.median(t) for way, t in times.items()}
    return [{"operation": operation, "way": way,
             "ms": round(statistics.median(times[way]) * 1e3, 3) if way in times else "-",
             "GB/s at the floor": round(rate[way] / 1e9, 1) if way in times else "-",
             "percent of copy": round(100 * rate[way] / rate["device copy"], 1) if way in times else "-",
             **notes[way]} for way in ways]


def benchmark(shapes, device, repeats=20):
    """Rows for norm, norm + ascent + restore, noise and mean in bf16: kernel, torch._foreach, Python loop."""
    params = [torch.randn(s, device=device, dtype=torch.bfloat16) * 0.02 for s in shapes]
    grads = [torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes]
    count = sum(p.numel() for p in params)

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

    def foreach_noise():
        torch._foreach_add_(params, [torch.randn_like(p) for p in params], alpha=1e-4)

    def loop_noise():
        for p in params:
            p.add_(torch.randn_like(p), alpha=1e-4)

    rows = measure("norm", 2, {
        "kernel": lambda: global_norm(grads),
        "foreach": lambda: torch.stack(torch._foreach_norm(grads)).norm(),
        "loop": lambda: torch.stack([g.norm() for g in grads]).norm()}, count, device, repeats)
    rows += measure("norm + ascent + restore", 14, {
        "kernel": kernel_sam, "foreach": foreach_sam, "loop": loop_sam}, count, device, repeats)
    rows += measure("noise", 4, {
        "kernel": lambda: noise_(params, 1e-4, 0), "foreach": foreach_noise, "loop": loop_noise},
        count, device, repeats)
    grads.clear()                                                    # room for the mean: 4 bytes a parameter
    mean = [torch.zeros(s, device=device) for s in shapes]

    def loop_mean():
        for m, p in zip(mean, params):
            m.add_((p.float() - m) / 2)
    return rows + measure("mean", 10, {
        "kernel": lambda: running_mean_(mean, params, 2),
        "foreach": lambda: torch._foreach_lerp_(mean, [p.float() for p in params], 0.5),
        "loop": loop_mean}, count, device, repeats)


def main(doc, shipped, bench):
    """The command line of a kernel file: read the compiled code, and where there is a GPU measure too."""
    import argparse, json, os
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default=None, metavar="PATH", help="write the rows there as well")
    args = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile: unset it")
    out = {"triton": triton.__version__, "torch": torch.__version__, "code": code_report(shipped),
           "measured": {}}
    print_rows(out["code"])
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
    bad = [r for r in out["code"] if misses(r)]
    raise SystemExit(f"{len(bad)} rows miss the floor: {bad[0]}" if bad else 0)


if __name__ == "__main__":
    main(__doc__, variants(), benchmark)
