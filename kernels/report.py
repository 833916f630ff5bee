"""Are the kernels beside this file as fast as memory allows? Read their machine code, or measure them.

    python kernels/report.py                    # 95 s, no GPU needed: compile for four, print a table
    python kernels/report.py --json out.json    # the same as JSON; on a GPU time 1 and 7 billion weights

A row is a kernel of multi_tensor.py or adamw.py as it is shipped, on a GPU: registers a thread, bytes
that it spills, shared memory and, in full tiles, bytes of the narrowest access to global memory, bytes
moved an element and their floor, instructions an element, and what limits the speed: the ratio is that of
the time these instructions take to the time these bytes take. The exit status is 1 if a row misses: if it
spills, has an access below 16 bytes, or what its variant says, or moves another number of bytes than the
floor.

HOW. Each kernel loops twice, over full tiles and then, masked, over what is left, and touches tensors
nowhere else. So the first loop of the assembly (PTX or AMD's) is the one to read. Line numbers would not
do: compilers merge them, each its own way. Registers, spills and, in the first loop again, instructions
are those of the machine code, which NVIDIA's cuobjdump prints and AMD's assembly is already; of AMD's, not
the scalar instructions (s_), which issue beside the others. A limit is an estimate: it knows neither
latency nor units slower than an instruction a cycle.
"""
import argparse
import contextlib
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from collections import namedtuple
from functools import partial as call
from pathlib import Path

import torch
import triton
from torch.optim.adamw import adamw as functional_adamw
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.append(str(Path(__file__).resolve().parents[1]))
import adamw
import multi_tensor as mt
import sam

TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]
# What a GPU does in a second, rounded: bytes that its memory moves, and instructions that it issues, each
# counted once a thread: units x schedulers x lanes x clock, the clock that its published bf16 peak implies.
# From public pages, not measured. 80: A100 80 GB. 90: H100 SXM. 100: B200. gfx942: MI300X, where a wave of 64
# issues over 4 cycles.
RATES = {80: (2.0e12, 108 * 4 * 32 * 1.4e9), 90: (3.35e12, 132 * 4 * 32 * 1.8e9),
         100: (8e12, 148 * 4 * 32 * 1.9e9), "gfx942": (5.3e12, 304 * 4 * 16 * 2.1e9)}
SASS = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+;)")             # address, instruction
JUMP = re.compile(r"\b(?:bra|BRA|s_branch|s_cbranch_\w+)(?:\.\w+)*\s+(?:!?U?P\d,\s*)?([.$\w]+)")
AMD_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}

# arguments: types of those after the table; columns: dtypes of the tensors; floor: bytes an element;
# narrowest: bytes that an access must have
Variant = namedtuple("Variant", "name kernel arguments constants columns floor narrowest", defaults=[16])


# ---- what is compiled ------------------------------------------------------------------------------

def moves(dtype, name):
    """The variants of multi_tensor.py for parameters of this dtype, their gradients and an fp32 mean."""
    w = mt.TYPES[dtype]
    size = dtype.itemsize
    part = {"part_ptr": "*fp32"}
    scaled = {"scale_ptr": "*fp32", **part}
    noise = {**part, "seed": "i64", "sigma": "fp32"}
    count = {"count": "fp32"}
    square = {"A": w, "COLUMN": 2, "ROW": 5}                     # in the table of the ascent
    l2 = {"A": w, "B": w, "LINF": False, "SWAP": True}
    linf = {"A": w, "B": w, "LINF": True, "SWAP": True}
    signs = {"A": w, "B": mt.tl.int8, "LINF": True, "SWAP": True}
    shards = {"A": w, "B": w, "LINF": False, "SWAP": False}
    copy = {"A": w, "B": w, "MEAN": False}
    mean = {"A": mt.tl.float32, "B": w, "MEAN": True}
    both = [dtype, torch.int8]
    return [
        Variant(f"norm {name}", mt._sumsq_kernel, part, square, [dtype], size),
        Variant(f"ascent l2 {name}", mt._ascent_kernel, scaled, l2, [dtype], 3 * size),
        Variant(f"ascent linf {name}", mt._ascent_kernel, scaled, linf, [dtype], 3 * size),
        Variant(f"ascent signs {name}", mt._ascent_kernel, scaled, signs, both, 2 * size + 1, 16 // size),
        Variant(f"ascent in place {name}", mt._ascent_kernel, scaled, shards, [dtype], 4 * size),
        Variant(f"restore {name}", mt._copy_kernel, count, copy, [dtype], 2 * size),
        Variant(f"noise {name}", mt._noise_kernel, noise, {"A": w}, [dtype], 2 * size),
        Variant(f"mean {name}", mt._copy_kernel, count, mean, [torch.float32, dtype], 8 + size)]


def step(name, dtype, state, stochastic):
    """The variant of adamw.py for weights and gradients of this dtype and moments of dtype `state`."""
    w = adamw.TYPES[dtype]
    constants = {"A": w, "B": w, "C": adamw.TYPES[state], "STOCHASTIC": stochastic}
    floor = 3 * dtype.itemsize + 4 * state.itemsize              # w twice and g, m and v twice
    arguments = {"numbers_ptr": "*fp32", "coefficient_ptr": "*fp32", "seed": "i64"}
    return Variant(f"adamw {name}", adamw._adamw_kernel, arguments, constants, [dtype, state], floor)


def variants():
    """All that is shipped: [Variant]."""
    half = torch.bfloat16
    full = torch.float32
    scaled = {"scale_ptr": "*fp32", "part_ptr": "*fp32"}
    mixed = {"A": mt.tl.bfloat16, "B": mt.tl.float32, "LINF": False, "SWAP": True}
    return [
        *moves(half, "bf16"), *moves(full, "fp32"),
        Variant("ascent l2 bf16, fp32 g", mt._ascent_kernel, scaled, mixed, [half, full], 8),
        step("bf16", half, half, False), step("bf16 stochastic", half, half, True),
        step("bf16, fp32 moments", half, full, False),
        step("bf16 stochastic, fp32 moments", half, full, True), step("fp32", full, full, False)]


# ---- reading the code ------------------------------------------------------------------------------

def first_loop(asm):
    """The lines of the first loop: from the first label that is jumped back to, until the last jump back
    to it or to a label within."""
    lines = asm.splitlines()
    labels = {}
    loops = []
    for n, line in enumerate(lines):
        label = re.match(r"([.$\w]+):", line)
        if label:
            labels[label[1]] = n
        jump = JUMP.search(line)
        if jump and jump[1] in labels:
            loops.append((labels[jump[1]], n))
    start, end = min(loops, default=(0, 0))
    for begin, back in sorted(loops):
        if begin <= end:
            end = max(end, back)
    return lines[start:end + 1]


def accesses(lines):
    """Bytes of every access to global memory in lines of PTX, of SASS or of AMD's assembly."""
    out = []
    for line in lines:
        ptx = re.search(r"\b(?:ld|st)\.global(?:\.[a-z_]+)*(?:\.v(\d))?\.[busf](\d+)\s", line)
        sass = re.search(r"\b(?:LDG|STG)\.E((?:\.\w+)*)\s", line)
        amd = re.search(r"\b(?:global|buffer|flat)_(?:load|store)_[us]?(byte|short|dword(?:x\d)?)", line)
        if ptx:
            out.append(int(ptx[1] or 1) * int(ptx[2]) // 8)
        if sass:
            bits = re.search(r"\.[US]?(8|16|64|128)\b", sass[1])       # 32 are not written
            out.append(int(bits[1]) // 8 if bits else 4)
        if amd:
            out.append(AMD_BYTES[amd[1]])
    return out


def machine_code(asm):
    """(lines of the machine code, registers a thread, bytes spilled). SASS jumps to addresses, so each
    instruction gets its address as a label."""
    if "amdgcn" in asm:
        text = asm["amdgcn"]
        found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", text))
        return text, int(found["vgpr_count"]), int(found["private_segment_fixed_size"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(asm["cubin"])
        run = subprocess.run([tool, "-res-usage", "-sass", path], capture_output=True, check=True)
    text = run.stdout.decode()
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    code = "\n".join(f"{int(at, 16):#x}:\n {line}" for at, line in re.findall(SASS, text))
    return code, int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def limit(arch, instructions, size):
    """What takes longer on a GPU, the bytes or the instructions of an element, and the ratio of the two."""
    bandwidth, issue = RATES[arch]
    ratio = instructions / issue / (size / bandwidth)
    return f"{'bytes' if ratio < 1 else 'instructions'} {ratio:.2f}"


def compiled(variant, target, aligned=True):
    """The row of a variant for a target, which need not be here, compiled as its launch would."""
    backend, arch, warp = target
    block = mt.TURN // mt.narrowest(variant.columns)
    constants = {**variant.constants, "ALIGNED": aligned, "CHUNK": mt.CHUNK, "BLOCK": block}
    signature = {"table_ptr": "*i64", "owner_ptr": "*i32", "start_ptr": "*i64", **variant.arguments}
    signature.update(dict.fromkeys(constants, "constexpr"))
    code = triton.compile(ASTSource(variant.kernel, signature, constexprs=constants),
                          target=GPUTarget(backend, arch, warp),
                          options={"num_warps": 256 // warp, "enable_fp_fusion": False})
    widths = accesses(first_loop(code.asm["ptx" if backend == "cuda" else "amdgcn"]))
    text, registers, spilled = machine_code(code.asm)
    loop = first_loop(text)
    kept = accesses(loop)                                        # of several turns, where ptxas unrolls
    assert set(kept) == set(widths), f"the machine code accesses {kept} bytes, the assembly {widths}"
    issued = sum(bool(re.match(r"\s+(?!s_|NOP)[@\w]", line)) for line in loop)
    moved = sum(widths) * 256 / block
    instructions = round(issued * moved / sum(kept), 1)
    return {"kernel": variant.name, "target": f"sm_{arch}" if backend == "cuda" else arch,
            "registers": registers, "spilled": spilled, "shared": code.metadata.shared,
            "access_bytes": min(widths, default=0), "narrowest": variant.narrowest, "bytes_moved": moved,
            "floor": variant.floor, "instructions": instructions, "limit": limit(arch, instructions, moved)}


def misses(row):
    """Does a row spill, access global memory in pieces that are too small, or move too much?"""
    narrow = row["access_bytes"] < row["narrowest"]
    return narrow or row["spilled"] > 0 or row["bytes_moved"] != row["floor"]


def print_rows(rows):
    """Print a list of dicts of the same keys as a table."""
    cells = [list(rows[0])]
    for row in rows:
        cells.append([f"{v:g}" if isinstance(v, float) else str(v) for v in row.values()])
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


# ---- measuring -------------------------------------------------------------------------------------

def mistral_shapes(layers):
    """Parameter shapes of Mistral-7B with this many of its 32 layers: 4 make 1.13e9 parameters."""
    attention = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)]
    layer = attention + [(14336, 4096), (14336, 4096), (4096, 14336), (4096,), (4096,)]
    return [(32000, 4096)] + layer * layers + [(4096,), (32000, 4096)]


def seconds(work):
    """How long a call of work takes on the GPU."""
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def first_call(work):
    """(launches, extra GB at the peak) of a call of work, which it also warms up."""
    work()
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    launches = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())
    return launches, round((torch.cuda.max_memory_allocated() - base) / 1e9, 3)


def measure(operation, size, repeats, **ways):
    """Rows for one operation, which has to move `size` bytes: ways = functions, which take turns with a
    copy of 1 GiB. Medians; GB/s are those of `size`, whatever a way moves."""
    a = torch.empty(2**28, device="cuda")
    ways = {"copy": call(a.copy_, torch.zeros_like(a)), **ways}
    rows = {}
    times = {}
    for way, work in ways.items():
        rows[way] = {"operation": operation, "way": way, "launches": "out of memory", "extra GB": "-",
                     "ms": "-", "GB/s": "-", "percent of copy": "-"}
        with contextlib.suppress(torch.OutOfMemoryError):
            rows[way]["launches"], rows[way]["extra GB"] = first_call(work)
            times[way] = []
    for _ in range(repeats):
        for way in times:
            times[way].append(seconds(ways[way]))
    for way in times:
        median = statistics.median(times[way])
        rate = (8 * a.numel() if way == "copy" else size) / median
        rows[way]["ms"] = round(median * 1e3, 3)
        rows[way]["GB/s"] = round(rate / 1e9, 1)
        rows[way]["percent of copy"] = round(100 * rows[way]["GB/s"] / rows["copy"]["GB/s"], 1)
    return list(rows.values())


def benchmark(shapes, repeats=20):
    """Rows for bf16 parameters of these shapes: the kernels, sam.py's torch, foreach, torch.optim."""
    half = {"device": "cuda", "dtype": torch.bfloat16}
    params = [torch.randn(s, **half) * 0.02 for s in shapes]
    grads = [torch.randn(s, **half) for s in shapes]
    count = sum(map(torch.numel, params))

    def there_and_back(operations, swap=True):
        saved = []
        operations.ascent_(params, grads, 0.01, saved, swap=swap)
        operations.restore_(saved, swap=swap)        # later turns climb along what is in grads now

    def foreach():
        scale = 0.01 / torch.stack(torch._foreach_norm(grads)).norm()
        saved = list(map(torch.clone, params))
        torch._foreach_add_(params, torch._foreach_mul(grads, scale))
        torch._foreach_copy_(params, saved)

    rows = measure("norm", 2 * count, repeats, kernel=call(mt.global_norm, grads),
                   torch=call(sam.global_norm, grads))
    in_place = call(there_and_back, mt, swap=False)              # moves 14 bytes
    rows += measure("norm + ascent + restore", 8 * count, repeats, kernel=call(there_and_back, mt),
                    in_place=in_place, torch=call(there_and_back, sam), foreach=foreach)
    rows += measure("noise", 4 * count, repeats, kernel=call(mt.noise_, params, 1e-4, 0),
                    torch=call(sam.noise_, params, 1e-4, 0))
    m = list(map(torch.zeros_like, params))
    v = list(map(torch.ones_like, params))
    numbers = adamw.scalars(10, 5e-6, (0.9, 0.999), 1e-8, 0.0)
    lines = [(*four, numbers, i, 10) for i, four in enumerate(zip(params, grads, m, v))]
    steps = [torch.tensor(9.0, device="cuda") for _ in shapes]
    theirs = call(functional_adamw, params, grads, m, v, [], steps, amsgrad=False, beta1=0.9,
                  beta2=0.999, lr=5e-6, weight_decay=0.0, eps=1e-8, maximize=False)
    rows += measure("adamw", 14 * count, repeats, kernel=call(adamw.adamw_, lines),
                    stochastic=call(adamw.adamw_, lines, 0), fused=call(theirs, fused=True),
                    foreach=call(theirs, foreach=True))

    def clipped():
        coefficient = adamw.clip_coefficient(mt.global_norm(grads), 1.0)
        adamw.adamw_(lines, coefficient=coefficient)

    def clipped_by_torch():
        norm = torch.nn.utils.get_total_norm(grads)
        torch._foreach_mul_(grads, (1.0 / (norm + 1e-6)).clamp(max=1.0))
        theirs(fused=True)
    rows += measure("clip + adamw", 16 * count, repeats, kernel=clipped, fused=clipped_by_torch)
    for tensors in (grads, m, v, lines):
        tensors.clear()                                          # room for the mean: 4 bytes a parameter
    mean = [torch.zeros(s, device="cuda") for s in shapes]
    return rows + measure("mean", 10 * count, repeats, kernel=call(mt.running_mean_, mean, params, 2),
                          torch=call(sam.running_mean_, mean, params, 2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default=None, metavar="PATH", help="write the rows there as well")
    args = parser.parse_args()
    if mt.INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so nothing compiles: unset it")
    code = [compiled(variant, target) for variant in variants() for target in TARGETS]
    print_rows(code)
    out = {"triton": triton.__version__, "torch": torch.__version__, "code": code, "measured": {}}
    gpu = torch.cuda.is_available()
    print("" if gpu else "\nno GPU here: compiled and read, not measured")
    for layers in (4, 32) if gpu else ():
        shapes = mistral_shapes(layers)
        billions = sum(map(math.prod, shapes)) / 1e9
        where = f"{torch.cuda.get_device_name()}, {billions:.2f}e9 bf16 parameters"
        out["measured"][where] = benchmark(shapes)
        print(f"{where}, medians of 20 turns")
        print_rows(out["measured"][where])
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=1), encoding="utf-8")
    bad = [row for row in code if misses(row)]
    raise SystemExit(f"{len(bad)} rows miss the floor: {bad[0]}" if bad else 0)
