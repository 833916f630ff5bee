"""Triton kernels over all parameters of a model at once: norm, ascent, restore, noise, running mean.

    saved = []                                           # Needs torch and Triton; copy it alone.
    ascent_(params, grads, 0.01, saved, swap=True)       # theta + 0.01 g / ||g||, in the memory of grads
    restore_(saved, swap=True)                           # back: p.data points at the weights again

WHY. SAM climbs along the gradient and comes back, at every step. In a Python loop that is several
launches a tensor and copies of the weights; here each operation is one launch for every (parameter
dtype, gradient dtype) pair, however many tensors there are, and with swap the weights are not written.
HOW. The kernels read a table of addresses, so that models stay as they are: a grid of chunks, and for
each chunk the tensor it belongs to and where it starts. Tensors may lie anywhere, also off alignment (a
narrow variant takes those), in any order of dimensions, but without gaps.

Bytes moved for a bf16 parameter: norm 2, ascent 6 (read w and g, write the moved w over g), restore
none; in place, where addresses must stay, ascent 8 and restore 4; noise 4, running mean 10.
PRECISION. All arithmetic is fp32, with fused multiply-add in noise only, rounded once. Restore copies.
DETERMINISM. One partial sum a chunk, then a small second reduction; no atomics. Noise follows from
(seed, tensor, element) alone. Nothing here reads a value back to the host.
SHARDS. Of a DTensor (FSDP) the kernels take the local tensor; sums then go through one all_reduce.

The functions replace those of sam.py there; the `_ref` functions say what they must compute. `chunk`, in
all of them, is how many elements a program handles: a power of two from 16.

MEASURED: nothing on a GPU yet. On 2026-11-27 `python kernels/report.py` with Triton 3.7.1 (PyPI's for
torch 2.13) and 3.9.0: 16-byte accesses in full tiles (8 and 4 of signs as int8), the floor of bytes,
no spills, at most 76 registers a thread. Instructions bind noise on a B200, in bf16 on an MI300X,
bytes all else. SAM's ascent and restore take the host 3 ms at 291 tensors, 130 ms at 10,000, gradients
taken and all (launches mocked, one core).
"""
import functools
from array import array
from types import SimpleNamespace

import torch
import triton
import triton.language as tl

CHUNK = 32768              # elements that one program handles, of one tensor
TURN = 4096                # bytes of the narrowest tensor in a loop turn: 256 threads x 16
PLAIN = {torch.Tensor, torch.nn.Parameter}               # as against DTensor
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
         torch.int8: tl.int8}
INTERPRETED = bool(triton.knobs.runtime.interpret)      # TRITON_INTERPRET=1 when this was imported


# ---- references: the definition of every operation, in plain torch ---------------------------------

def ascent_ref(w, d, scale, linf=False):
    """w + scale * d, or w + scale * sign(d), of one tensor: fp32, rounded once to w's dtype."""
    d = d.float().sign() if linf else d.float()
    return (w.float() + scale * d).to(w.dtype)


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


def noise_ref(numel, tensor, seed, start=0):
    """The z of one tensor from element `start` = 8 k on, fp64 (numel,): two normals (Box and Muller) of
    each Philox word at counter (element // 8, its high half, tensor, 0). |z| is at most 5.4."""
    q = torch.arange(start // 8, (start + numel + 7) // 8)
    words = torch.stack(philox_ref(seed, q & 0xFFFFFFFF, q >> 32, torch.full_like(q, tensor), q * 0), 1)
    u = ((words >> 11 & 0xFFFFF).double() + 0.5) / 2**20                  # (N, 4) in (0, 1)
    radius = (-2 * u.log()).sqrt() * (1 - 2 * (words >> 31))              # the highest bit: its sign
    angle = torch.pi * (((words & 0x7FF).double() + 0.5) / 2**11 - 0.5)   # in half a turn
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 2).flatten()[:numel]


# ---- kernels ---------------------------------------------------------------------------------------
# Every kernel begins with the same table: table (n, ROW) int64, a row for each tensor: numel, an
# address for each column, number; owner (C,) int32 the tensor of chunk c; start (C,) int64 its first
# element. Every loop comes twice: over full tiles without a mask, then over what is left, if anything.
# Under a mask that comes from a loaded size all accesses are narrow, one element wide.

@triton.jit
def _chunk(table_ptr, owner_ptr, start_ptr, ROW: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program's chunk: its row of the table, first element, size, and size in full tiles."""
    c = tl.program_id(0)
    row_ptr = table_ptr + tl.load(owner_ptr + c) * ROW
    start = tl.load(start_ptr + c)
    size = tl.minimum(tl.load(row_ptr) - start, CHUNK).to(tl.int32)
    return row_ptr, start, size, size // BLOCK * BLOCK


@triton.jit
def _pointer(row_ptr, column: tl.constexpr, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to the chunk's first element in a column, counted from 1."""
    ptr = tl.load(row_ptr + column).to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)     # after the cast, or every access is one element wide
    return ptr


@triton.jit
def _store_sums(part_ptr, moved, along, norm):
    """part (C, 3): the sums of this program's chunk."""
    part_ptr += tl.program_id(0) * 3
    tl.store(part_ptr, tl.sum(moved))
    tl.store(part_ptr + 1, tl.sum(along))
    tl.store(part_ptr + 2, tl.sum(norm))


@triton.jit
def _sumsq_kernel(table_ptr, owner_ptr, start_ptr, part_ptr,
                  A: tl.constexpr, COLUMN: tl.constexpr, ROW: tl.constexpr,
                  ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """part[c] = sum of squares of chunk c, fp32, of the tensors in COLUMN (dtype A) of a table of ROW
    columns. Reads each element once."""
    row_ptr, start, size, full = _chunk(table_ptr, owner_ptr, start_ptr, ROW, CHUNK, BLOCK)
    g_ptr = _pointer(row_ptr, COLUMN, start, A, ALIGNED)
    acc = tl.zeros((BLOCK,), tl.float32)
    for FULL in tl.static_range(1, -1, -1):
        for i in range(0 if FULL else full, full if FULL else size, BLOCK):
            offs = i + tl.arange(0, BLOCK)
            inside = True if FULL else offs < size
            g = tl.load(g_ptr + offs, mask=inside, other=0).to(tl.float32)
            acc += g * g
    tl.store(part_ptr + tl.program_id(0), tl.sum(acc))


@triton.jit
def _ascent_kernel(table_ptr, owner_ptr, start_ptr, scale_ptr, part_ptr,
                   A: tl.constexpr, B: tl.constexpr, LINF: tl.constexpr, SWAP: tl.constexpr,
                   ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """w <- w + scale * d, where LINF makes d its sign, s <- the old w; with SWAP s <- w + scale * d alone;
    part[c] = sums of step^2, step d and, with LINF, d^2 over chunk c. Columns: w (dtype A), d (B), s (A),
    which may be d's own memory. Reads w and d once, writes s and without SWAP w once."""
    row_ptr, start, size, full = _chunk(table_ptr, owner_ptr, start_ptr, 5, CHUNK, BLOCK)
    w_ptr = _pointer(row_ptr, 1, start, A, ALIGNED)
    d_ptr = _pointer(row_ptr, 2, start, B, ALIGNED)
    s_ptr = _pointer(row_ptr, 3, start, A, ALIGNED)
    scale = tl.load(scale_ptr)
    moved = tl.zeros((BLOCK,), tl.float32)
    along = tl.zeros((BLOCK,), tl.float32)
    norm = tl.zeros((BLOCK,), tl.float32)
    for FULL in tl.static_range(1, -1, -1):
        for i in range(0 if FULL else full, full if FULL else size, BLOCK):
            offs = i + tl.arange(0, BLOCK)
            inside = True if FULL else offs < size
            w = tl.load(w_ptr + offs, mask=inside, other=0)
            d = tl.load(d_ptr + offs, mask=inside, other=0).to(tl.float32)
            wide = w.to(tl.float32)
            if LINF:                      # what is not finite has no sign to follow
                sign = (d > 0).to(tl.float32) - (d < 0).to(tl.float32)
                finite = tl.abs(d) < float("inf")
                d = tl.where(finite, sign, float("nan"))         # the sums tell by being nan
                step = scale * tl.where(finite, sign, 0.0)
                norm += d * d
            else:
                step = scale * d
            new = tl.where(scale == 0, wide, wide + step).to(A)  # 0 says: stay; 0 * inf would be nan
            tl.store(s_ptr + offs, new if SWAP else w, mask=inside)          # over d: by who read it
            if not SWAP:
                tl.store(w_ptr + offs, new, mask=inside)
            step = new.to(tl.float32) - wide                     # what survived the rounding
            moved += step * step
            along += step * d
    _store_sums(part_ptr, moved, along, norm)


@triton.jit
def _copy_kernel(table_ptr, owner_ptr, start_ptr, count,
                 A: tl.constexpr, B: tl.constexpr, MEAN: tl.constexpr,
                 ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Column 1 (dtype A) <- column 2 (B), bit for bit; with MEAN <- column 1 + (column 2 - column 1) /
    count. Reads column 2, with MEAN both, and writes column 1."""
    row_ptr, start, size, full = _chunk(table_ptr, owner_ptr, start_ptr, 4, CHUNK, BLOCK)
    to_ptr = _pointer(row_ptr, 1, start, A, ALIGNED)
    from_ptr = _pointer(row_ptr, 2, start, B, ALIGNED)
    for FULL in tl.static_range(1, -1, -1):
        for i in range(0 if FULL else full, full if FULL else size, BLOCK):
            offs = i + tl.arange(0, BLOCK)
            inside = True if FULL else offs < size
            w = tl.load(from_ptr + offs, mask=inside)
            if MEAN:
                mean = tl.load(to_ptr + offs, mask=inside)
                w = mean + tl.div_rn(w.to(tl.float32) - mean, count)
            tl.store(to_ptr + offs, w, mask=inside)


@triton.jit
def _series(x, coefficients):
    """The polynomial in x with these coefficients, the highest first."""
    p = coefficients[0]
    for i in tl.static_range(1, len(coefficients)):
        p = tl.fma(x, p, coefficients[i])
    return p


@triton.jit
def _normals(word):
    """noise_ref's two normals of a word, to 4e-6: series for log2(1 + f) / f and, times sqrt(2 ln 2), for
    cos x and sin x / x, x in quarter turns. tl.log2 is twice as long, tl.cos needs stack memory."""
    u = ((word & 0x7FFFF800) | 0x400).to(tl.float32)                      # times 2^31, exactly
    power = (u.to(tl.int32, bitcast=True) - 0x3F3504F3) & -0x800000       # of two, so that f is smallest
    f = (u.to(tl.int32, bitcast=True) - power).to(tl.float32, bitcast=True) - 1.0
    log = _series(f, (0.17616724, -0.27097751, 0.29509973, -0.35918479, 0.4806487, -0.72136769, 1.44269631))
    r = tl.sqrt(tl.fma(-f, log, tl.fma(power.to(tl.float32), -(2.0**-23), 31.0)))
    r = (r.to(tl.uint32, bitcast=True) | (word & 0x80000000)).to(tl.float32, bitcast=True)
    x = tl.fma((word & 0x7FF).to(tl.float32), 2.0**-10, 2.0**-11 - 1.0)
    cos = _series(x * x, (0.0010104423, -0.024502642, 0.29865093, -1.4525686, 1.17741))
    sin = _series(x * x, (-0.0051018298, 0.093526793, -0.76048071, 1.8494651)) * x
    return r * cos, r * sin


@triton.jit(do_not_specialize=["seed"])
def _noise_kernel(table_ptr, owner_ptr, start_ptr, part_ptr, seed, sigma,
                  A: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """w <- w + sigma * z, z ~ N(0, 1) of Philox counters (element // 8, tensor); part[c] = sums of
    step^2, step z and z^2. Columns: w (dtype A), number of the tensor. Reads w once, writes it once."""
    row_ptr, start, size, full = _chunk(table_ptr, owner_ptr, start_ptr, 3, CHUNK, BLOCK)
    w_ptr = _pointer(row_ptr, 1, start, A, ALIGNED)
    tensor = tl.load(row_ptr + 2).to(tl.uint32)
    low = (start >> 3).to(tl.uint32)          # one counter, eight elements
    high = (start >> 35).to(tl.uint32)        # the same in a chunk, which starts at a multiple of its size
    moved = tl.zeros((BLOCK,), tl.float32)
    along = tl.zeros((BLOCK, 2), tl.float32)
    for FULL in tl.static_range(1, -1, -1):
        for i in range(0 if FULL else full, full if FULL else size, BLOCK):
            q = low + (i >> 3) + tl.arange(0, BLOCK // 8).to(tl.uint32)
            r0, r1, r2, r3 = tl.philox(seed, q, q * 0 + high, q * 0 + tensor, q * 0)
            cos, sin = _normals(tl.join(tl.join(r0, r2), tl.join(r1, r3)))
            z = tl.reshape(tl.join(cos, sin), (BLOCK,))                   # word j's two at 8 q + 2 j
            offs = i + tl.arange(0, BLOCK)
            inside = True if FULL else offs < size
            z = tl.where(inside, z, 0.0)                         # the sums end there too
            w = tl.load(w_ptr + offs, mask=inside, other=0).to(tl.float32)
            new = tl.fma(z, sigma, w).to(A)
            tl.store(w_ptr + offs, new, mask=inside)
            step = new.to(tl.float32) - w
            moved = tl.fma(step, step, moved)
            along = tl.fma(tl.join(step, z), tl.join(z, z), along)        # z^2 alone: in another layout
    _store_sums(part_ptr, moved, *tl.split(along))


# ---- the table -------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=32)
def chunk_map(sizes, device, chunk):
    """(owner (C,) int32, start (C,) int64) on the device: the tensor of chunk c and its first element.
    It follows from sizes (a tuple) only, so that a model's is built once."""
    counts = (torch.tensor(sizes) + chunk - 1) // chunk
    owner = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), counts)
    place = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]     # among its tensor's chunks
    return owner.to(device), (place * chunk).to(device)


def layout(t):
    """(shape, strides that matter) of a tensor, equal where elements lie in the same order; None when
    it leaves gaps in its memory or uses a place twice. A transposed tensor does not; a column does."""
    if not t.is_contiguous() and torch.empty_like(t, device="meta").stride() != t.stride():
        return None
    return t.shape, [stride for stride, size in zip(t.stride(), t.shape) if size > 1]


def _shards(t):
    """(process groups over which a DTensor is sharded, number of this process's shard), else ((), 0)."""
    groups = []
    number = 0
    for i, place in enumerate(getattr(t, "placements", ())):
        if place.is_partial():
            raise ValueError(f"a tensor is placed as {t.placements}, not summed up: redistribute() it")
        if place.is_shard():
            groups.append(t.device_mesh.get_group(i))
            number = number * t.device_mesh.size(i) + t.device_mesh.get_local_rank(i)
    return tuple(groups), number


def _check(row, tensors):
    """ValueError for what the kernels cannot take in a row: devices, dtypes, gaps, different orders."""
    first = tensors[0]
    if first.is_cuda == INTERPRETED:
        raise ValueError(f"tensor {row} is on {first.device}: the kernels take GPU tensors, or CPU "
                         "tensors under TRITON_INTERPRET=1")
    for t in tensors:
        if t.dtype not in TYPES:
            raise ValueError(f"tensor {row} is {t.dtype}: the kernels take {[*TYPES]}")
        if layout(t) is None or layout(t) != layout(first):
            raise ValueError(f"tensor {row} of {tuple(t.shape)}, strides {t.stride()}, has gaps or "
                             f"another order than {tuple(first.shape)}, {first.stride()}: make it "
                             "contiguous(), or use triton=False")


def tables(columns, chunk=CHUNK):
    """What a launch needs, for each group of rows of columns (lists of tensors; a row has one shape) of
    one device, dtypes, alignment and sharding. A tensor that is in the first column twice (a tied weight)
    counts once. ValueError for a chunk, device or dtype without kernel, for gaps in memory, and for a row
    whose elements lie in different orders: a pass over raw memory would be wrong."""
    if not isinstance(chunk, int) or chunk < 16 or chunk & (chunk - 1):
        raise ValueError(f"chunk must be a power of two from 16, got {chunk}")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the kernels cannot be captured in a CUDA graph: it would replay today's "
                           "addresses; use triton=False, or leave them out of the graph")
    groups = {}                                  # what a launch has of its own -> its rows
    seen = set()
    for row, tensors in enumerate(zip(*columns, strict=True)):
        first = tensors[0]
        if id(first) in seen:
            continue
        seen.add(id(first))
        over = ()
        number = row
        if not PLAIN.issuperset(map(type, tensors)):
            over, shard = _shards(first)
            number += shard << 20
            tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
            first = tensors[0]
        shape = first.shape
        line = [first.numel()]
        dtypes = []
        low = 0                                  # all addresses, ORed for their low bits
        dense = True
        for t in tensors:                        # all of a tensor at once, while it is cached
            address = t.data_ptr()
            low |= address
            line.append(address)
            dtypes.append(t.dtype)
            dense = dense and t.is_contiguous() and t.shape == shape
        key = (first.device, over, low % 16 == 0, *dtypes)
        group = groups.get(key)
        if group is None or not dense:
            _check(row, tensors)                 # which is slow
            group = groups.setdefault(key, SimpleNamespace(rows=[], tensors=[], flat=[]))
        group.rows.append(row)
        group.tensors.append(first)
        group.flat += line
        group.flat.append(number)
    for (device, over, aligned, *dtypes), group in groups.items():
        width = len(dtypes) + 2
        owner, start = chunk_map(tuple(group.flat[::width]), device, chunk)
        table = torch.frombuffer(array("q", group.flat), dtype=torch.int64)     # faster than tensor()
        if device.type == "cuda":
            table = table.pin_memory()                                # so that the copy does not wait
        group.head = (table.to(device, non_blocking=True), owner, start)
        group.device = device
        group.shards = over
        group.aligned = aligned
        group.grid = (len(owner),)
        group.types = [TYPES[dtype] for dtype in dtypes]
        group.block = min(chunk, TURN // narrowest(dtypes))
    return list(groups.values())


def narrowest(dtypes):
    """Bytes of the narrowest dtype that a thread reads 16 bytes of; int8 signs go along in 4 or 8, since 16
    would be as many weights, and too many registers."""
    return min(dtype.itemsize for dtype in dtypes if dtype.is_floating_point)


def _launch(kernel, group, chunk, *args, **constants):
    """One launch over a group."""
    if group.grid[0]:
        with torch.cuda.device_of(group.head[0]):
            kernel[group.grid](*group.head, *args, ALIGNED=group.aligned, CHUNK=chunk, BLOCK=group.block,
                               num_warps=4 if torch.version.hip else 8,      # 256 threads, also on AMD
                               enable_fp_fusion=False, **constants)
        torch.autograd.graph.increment_version(group.tensors)


def _over_shards(sums, group):
    """Add up sums over the shards of the group's tensors, in place; ordinary tensors have none."""
    for process_group in group.shards:
        torch.distributed.all_reduce(sums, group=process_group)
    return sums


def usable(tensors):
    """None when the kernels can run on these tensors, else the reason why not. On a GPU it tries."""
    try:
        tables([tensors])
    except ValueError as e:
        return str(e)
    problems = [] if INTERPRETED else [_trial(t.device) for t in tensors]
    return next(filter(None, problems), None)


@functools.cache
def _trial(device):
    """None when a kernel runs on this GPU, else what to do: the first launch wants a C compiler."""
    try:
        global_norm([torch.ones(1, device=device)])
    except Exception as e:
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        return (f"Triton cannot compile here ({reason}): install a C compiler such as gcc, or use "
                "triton=False")
    return None


# ---- the operations --------------------------------------------------------------------------------

def _sum_of_squares(groups, column, device, chunk):
    """0-dim fp32: over the tensors in a column of all groups."""
    square = torch.zeros((), device=device)
    for group in groups:
        part = torch.empty(group.grid, device=group.device)                                    # (C,)
        _launch(_sumsq_kernel, group, chunk, part, A=group.types[column - 1], COLUMN=column,
                ROW=len(group.types) + 2)
        square += _over_shards(part.sum(), group).to(device)
    return square


def global_norm(tensors, chunk=CHUNK):
    """||.||_2 over all tensors together, 0-dim fp32 on the device of the first."""
    device = tensors[0].device if tensors else None
    return _sum_of_squares(tables([tensors], chunk), 1, device, chunk).sqrt()


def _stats(norm, sums):
    """What a move did; sums (3,): of step^2, of step d, of d^2."""
    applied = sums[0].sqrt()
    cosine = torch.where((applied > 0) & (norm > 0), sums[1] / (applied * norm), 0.0)
    return {"norm": norm, "applied_norm": applied, "cosine": cosine}


def ascent_(params, directions, rho, saved, reuse=True, eps=1e-12, linf=False, swap=False, chunk=CHUNK):
    """theta <- theta + rho d / (||d|| + eps) in place, or with linf theta <- theta + rho sign(d), which
    needs no norm. Returns 0-dim {norm, applied_norm, cosine}: of d or sign(d), of the step that
    rounding left, and between the two.

    directions: gradients, or with linf also signs kept from an earlier one, g.sign().to(torch.int8).
    saved: a list that gets (parameter, old weights) for whatever moved. What is written beside the weights
    goes into the direction's own memory with reuse where dtypes agree, and its values are lost; otherwise
    into a new buffer: the old weights, or with swap the moved ones, to which p.data then points. A zero or
    non-finite norm moves nothing, and with linf a non-finite element does not move: the norm returned
    tells (it is 0, inf or nan; with linf 0 or nan). An interrupt before, between or after the launches
    leaves saved right; one inside a launch, under the interpreter only and without swap, does not.
    """
    device = params[0].device if params else None
    beside = []
    for p, d in zip(params, directions, strict=True):
        alike = p.dtype == d.dtype and p.stride() == d.stride()
        beside.append(d if reuse and alike else torch.empty_like(p))
    groups = tables([params, directions, beside], chunk)
    if linf:
        scale = torch.full((), rho, dtype=torch.float32, device=device)
    else:
        norm = _sum_of_squares(groups, 2, device, chunk).sqrt()
        scale = torch.where(torch.isfinite(norm) & (norm > 0), rho / (norm + eps), 0.0)
    sums = torch.zeros(3, device=device)
    for group in groups:
        part = torch.full((*group.grid, 3), -1.0, device=group.device)       # no sum of squares is -1
        count = len(saved)
        try:
            for row in group.rows:
                saved.append((params[row], params[row].data if swap else beside[row]))
            _launch(_ascent_kernel, group, chunk, scale.to(group.device), part, A=group.types[0],
                    B=group.types[1], LINF=linf, SWAP=swap)
            for row in group.rows if swap else ():
                params[row].data = beside[row]
        except BaseException:
            if not swap and (part[:, 0] == -1).all():    # it never ran: the old weights are not there
                del saved[count:]
            raise
        sums += _over_shards(part.sum(0), group).to(device)
    return _stats(sums[2].sqrt() if linf else norm, sums)


def restore_(saved, swap=False, chunk=CHUNK):
    """Put back the old weights of (parameter, old weights), bit for bit, and empty the list: by a copy,
    or after ascent_(swap=True) by pointing p.data at them, which moves nothing."""
    if swap:
        for p, old in saved:
            p.data = old
        torch.autograd.graph.increment_version([p for p, _ in saved])        # a backward pass is an error
        saved.clear()
        return
    for p, w in saved:
        assert p.dtype == w.dtype, f"the saved weights are {w.dtype}, the parameter is {p.dtype}"
    for group in tables([[p for p, _ in saved], [w for _, w in saved]], chunk):
        _launch(_copy_kernel, group, chunk, 1.0, A=group.types[0], B=group.types[1], MEAN=False)
    saved.clear()


def noise_(params, sigma, seed, chunk=CHUNK):
    """theta <- theta + sigma * z in place, z ~ N(0, I) = noise_ref(numel, index in params, seed),
    elements counted as they lie in memory; seed < 2**63. Shard k of the DTensor at i has the index
    i + k * 2**20. Returns 0-dim {norm, applied_norm, cosine}: of z, of the step that rounding left, and
    between the two."""
    sums = torch.zeros(3, device=params[0].device if params else None)
    for group in tables([params], chunk):
        part = torch.empty((*group.grid, 3), device=group.device)
        _launch(_noise_kernel, group, chunk, part, seed, float(sigma), A=group.types[0])
        sums += _over_shards(part.sum(0), group).to(sums.device)
    return _stats(sums[2].sqrt(), sums)


def running_mean_(mean, params, count, chunk=CHUNK):
    """mean <- mean + (theta - mean) / count in place, for the count-th weights; mean is fp32."""
    for m in mean:
        assert m.dtype == torch.float32, f"the kernel keeps the mean in fp32, this is {m.dtype}"
    for group in tables([mean, params], chunk):
        _launch(_copy_kernel, group, chunk, float(count), A=tl.float32, B=group.types[1], MEAN=True)
