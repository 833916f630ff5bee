"""Command lines and run folders: flags, one-line errors, result.json, saved models, states to resume from.

A run folder OUT holds model.safetensors, config.json, the tokenizer and result.json; relearn.json and
evaluate.json join it. While it trains, OUT.state/ may hold what --resume goes on from.
"""
import argparse
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as checkpoint
import transformers
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from data import processes
from data.formats import InputError, read_json, warn, write_json

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny"                    # the built-in benchmark; tiny/seedS/ is the world of seed S


# ---- command lines ------------------------------------------------------------------------------------

@contextmanager
def one_line_errors():
    """Turn an InputError into one line on stderr and exit status 2; anything else keeps its traceback."""
    try:
        yield
    except InputError as e:
        warn("error: " + " ".join(str(e).split()))
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """ArgumentParser that shows a script's docstring as it is, and whose errors are one line, exit status 2."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        warn(f"error: {message} (--help lists every flag)")
        sys.exit(2)


def add_device(group):
    """The flag --device, with a GPU as its default where there is one."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    group.add_argument("--device", type=usable_device, default=found, help="cpu, cuda, cuda:1, ...")


def usable_device(text):
    """argparse type: the name of a device that can hold a tensor here; cuda is this process's own GPU."""
    if text == "cuda" and "LOCAL_RANK" in os.environ:
        text += ":" + os.environ["LOCAL_RANK"]
    try:
        torch.zeros(1, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise argparse.ArgumentTypeError(f"{text} cannot be used here ({str(e).splitlines()[0]}); try cpu")
    return text


def number(kind, low, above=False):
    """argparse type: a finite int or float of at least `low`, or above it."""
    def parse(text):
        value = kind(text)
        if not low <= value < math.inf or (above and value == low):
            bound = "above" if above else "of at least"
            raise argparse.ArgumentTypeError(f"{text} is not a finite number {bound} {low}")
        return value
    parse.__name__ = kind.__name__               # argparse says "invalid int value"
    return parse


# ---- what ran -----------------------------------------------------------------------------------------

def peak_bytes(device):
    """The most memory in use so far: of the GPU, or of this process; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource                          # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def provenance(device, start):
    """What every result file says about its run: versions, commit, device, seconds, peak memory in GB."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    cuda = torch.device(device).type == "cuda"
    peak = peak_bytes(device)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__,
                "python": sys.version.split()[0]}
    return {"versions": versions,
            "commit": git.stdout.strip() or None,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if cuda else str(device),
            "processes": processes.count(),
            "seconds": round(time.time() - start, 2),
            "peak_gb": None if peak is None else round(peak / 1e9, 3)}


# ---- run folders --------------------------------------------------------------------------------------

def world(data, seed):
    """The folder to read: data, or of the built-in benchmark the world of seed, prepared if missing."""
    if Path(data).resolve() != TINY:
        if not Path(data).is_dir():
            raise InputError(f"--data {data}: no such folder (data/README.md has the formats)")
        return Path(data)
    folder = Path(os.path.relpath(TINY / f"seed{seed}"))
    if processes.rank() == 0 and not (folder / "target" / "result.json").exists():
        subprocess.run([sys.executable, str(TINY / "prepare.py"), "--seed", str(seed)], check=True)
    processes.barrier()
    return folder


def load_result(run):
    """RUN/result.json of unlearn.py or a prepare.py; an equivalent for a plain Hugging Face folder."""
    path = Path(run) / "result.json"
    if path.is_file():
        return read_json(path, "run unlearn.py again")
    if (Path(run) / "config.json").is_file():
        return {"stage": "model", "args": {"model": str(run), "data": None, "seed": 0}}
    raise InputError(f"{path} is missing: {run} is not a run folder of unlearn.py")


def gathered(model):
    """The model's state_dict with every sharded tensor gathered on the CPU of the first process, tied weights
    once; None in a single process, whose model has it all."""
    if processes.count() == 1:
        return None
    named = model.state_dict(keep_vars=True)
    full = {}
    for p in named.values():
        if id(p) not in full:                    # all processes gather, the first one keeps
            kept = processes.whole(p)
            full[id(p)] = kept.cpu() if processes.rank() == 0 else None
    return {name: full[id(p)] for name, p in named.items()}


def save_run(out, model, tokenizer, result):
    """Write a whole run folder under a temporary name, then put it in the place of `out`."""
    tmp = out.with_name(f"{out.name}.tmp{os.getpid()}")
    weights = gathered(model)
    if processes.rank() == 0:
        model.save_pretrained(tmp, state_dict=weights)
        tokenizer.save_pretrained(tmp)
        write_json(tmp / "result.json", result)
        if out.exists():
            shutil.rmtree(out)
        tmp.rename(out)
    processes.barrier()


# ---- states to resume from: torch.distributed.checkpoint, as safetensors, for any number of processes -----

def save_state(folder, step, tensors, note):
    """Write {name: tensor} and note (JSON) as folder/STEP; its note.json comes last and says that it is
    whole. Then earlier steps go. Each process writes its own part of a sharded tensor."""
    part = Path(folder) / str(step)
    if processes.rank() == 0 and part.exists():  # what a kill in the middle of this left
        shutil.rmtree(part)
    processes.barrier()
    try:
        with quiet():
            checkpoint.save(tensors, storage_writer=HuggingFaceStorageWriter(part, save_distributed=True))
        write_json(part / "note.json", note)
    except (OSError, CheckpointException) as e:
        raise InputError(f"{part} cannot be written ({why(e)}): the state before it is kept; make room, then "
                         "go on with --resume")
    if processes.rank() == 0:
        for other in Path(folder).iterdir():
            if other != part:
                shutil.rmtree(other)
    processes.barrier()


def why(error):
    """The reason inside a CheckpointException, which holds one for each process; else the error itself."""
    for inner, _ in getattr(error, "failures", {}).values():
        return inner
    return error


def saved_state(folder):
    """(folder of the last whole state, its note), or (None, None)."""
    whole = [note.parent for note in Path(folder).glob("*/note.json")]
    if not whole:
        return None, None
    last = max(whole, key=lambda part: int(part.name))
    return last, read_json(last / "note.json", "remove the folder to start again")


def remove_state(folder):
    """Remove what save_state wrote."""
    if processes.rank() == 0 and Path(folder).is_dir():
        shutil.rmtree(folder)


def saved_tensors(part):
    """{name: dtype} of a state that save_state wrote."""
    found = HuggingFaceStorageReader(part).read_metadata().state_dict_metadata
    return {name: t.properties.dtype for name, t in found.items()}


def load_state(part, tensors):
    """Fill {name: tensor} in place; a process reads its own rows of a sharded tensor only."""
    with quiet():
        checkpoint.load(tensors, storage_reader=HuggingFaceStorageReader(part))


@contextmanager
def quiet():
    """Without the warning that a checkpoint of a single process is one of a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        yield
