"""What a step of unlearn.py costs beside plain NPO's, taken in turns with it: time, and memory on the CPU.

    python kernels/step.py                     # a table: every smoother at 2 x 128 and 2 x 512 tokens
    python kernels/step.py --one momentum 128 6

A 42M-parameter Llama in fp32, 2 forget and 2 retain samples a step. "live" is measured with malloc giving every
tensor pages of its own, which is slow; "resident" without, so that it has the allocator's gaps.

Measured with 2 threads on an AMD EPYC, at 2 x 128 tokens beside NPO's step: on 2026-11-27, two turns, SAM 1.51
and 1.55 times the time (floor 1.50) and 20.2 bytes a parameter, 23.7 resident; momentum in linf 1.10 and 1.21
times, 20.5 and 23.6 bytes. On 2026-11-24, before the weights were swapped: RS 2.47, GP 1.62, CR 2.88, WA 1.02.
"""
import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sam
import unlearn
from data import losses

PASSES = {"none": 6, "sam": 9, "momentum": 6, "rs": 12, "gp": 9, "cr": 15, "wa": 6}   # forward 1, backward 2


def llama(width, layers, vocabulary):
    """A random Llama."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=8,
        intermediate_size=4 * width, tie_word_embeddings=False, max_position_embeddings=1024)).eval()


def smoother_flags(smooth):
    """The flags of unlearn.py for a row of the table."""
    if smooth == "momentum":
        return ["--sam_rho", "1e-4", "--sam_norm", "linf", "--sam_direction", "momentum"]
    if smooth == "sam":
        return ["--sam_rho", "0.1"]
    if smooth == "wa":
        return ["--smooth", "wa", "--wa_start", "0"]
    return ["--smooth", smooth]


def timed_steps(model, smooth, tokens, count):
    """Median seconds of a step of NPO and of NPO + smooth, on 2 forget and 2 retain samples."""
    args = unlearn.parse_args([*smoother_flags(smooth), "--out", "/nowhere"])
    args.data = ""
    samples = [(ids, ids) for ids in torch.randint(model.config.vocab_size, (2, tokens)).tolist()]
    forget = losses.micro_batches(samples, [0, 1], 2, 0, "cpu", torch.full((2,), -9.0))
    retain = losses.micro_batches(samples, [0, 1], 2, 0, "cpu")
    smoothed = unlearn.Unlearning(args, model)
    plain = sam.Plain()
    own = smoothed.smoother
    average = smoothed.average
    seconds = {"npo": [], "smoothed": []}
    for i in range(2 * count):
        which = "smoothed" if i % 2 else "npo"
        smoothed.smoother = own if i % 2 else plain
        smoothed.average = average if i % 2 else None
        tick = time.perf_counter()
        smoothed.step(i // 2, forget, retain, None)
        seconds[which].append(time.perf_counter() - tick)
    warm = min(2, count - 1)
    return [statistics.median(s[warm:]) for s in seconds.values()]


def measure_one(smooth, tokens, count):
    """Print seconds of NPO, of NPO + smooth, and peak bytes a parameter, of this process."""
    timed_steps(llama(64, 1, 512), smooth, 16, 1)        # the libraries and their buffers are not ours
    with torch.no_grad():
        llama(512, 1, 512)(input_ids=torch.zeros(2, tokens, dtype=torch.int64))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    base = pages * os.sysconf("SC_PAGE_SIZE")
    model = llama(512, 8, 8192)
    seconds = timed_steps(model, smooth, tokens, count)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(*seconds, (peak - base) / sum(p.numel() for p in model.parameters()))


def in_a_process(smooth, tokens, count, threads, **env):
    """measure_one in a process of its own, so that its peak of memory is its own: three numbers."""
    command = [sys.executable, __file__, "--threads", str(threads), "--one", smooth, str(tokens), str(count)]
    run = subprocess.run(command, env=os.environ | env, check=True, stdout=subprocess.PIPE)
    return [float(word) for word in run.stdout.split()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="of each kind, after two to warm up")
    parser.add_argument("--one", nargs=3, metavar=("SMOOTH", "TOKENS", "COUNT"),
                        help="one row, in this process: seconds of NPO and of SMOOTH, bytes a parameter")
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(args.threads)
        measure_one(args.one[0], int(args.one[1]), int(args.one[2]))
        sys.exit()
    print("2 x tokens  smoother  s/step  x npo  floor  bytes a parameter: live  resident")
    for tokens in (128, 512):
        for smooth, passes in PASSES.items():
            npo, other, resident = in_a_process(smooth, tokens, args.steps + 2, args.threads)
            *_, live = in_a_process(smooth, tokens, 2, args.threads, MALLOC_MMAP_THRESHOLD_="65536")
            print(f"{tokens:10d}  {smooth:8s}  {other:6.2f}  {other / npo:5.2f}  {passes / 6:5.2f}  "
                  f"{live:23.1f}  {resident:8.1f}", flush=True)
