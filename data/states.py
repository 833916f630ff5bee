"""States that --resume goes on from: torch.distributed.checkpoint, written as safetensors, no pickle.

OUT.state/STEP/ holds the tensors, in the parts that processes wrote, and note.json, which comes last and says that
the rest is whole. Any number of processes can read it.
"""
import os
import shutil
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from data import processes, runs
from data.formats import InputError, read_json, write_json


def save(folder, step, tensors, note):
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
        if processes.rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            with suppress(OSError):              # unless it holds the state before
                part.parent.rmdir()
        if not isinstance(why(e), Exception):    # Ctrl-C, which torch wraps
            raise why(e)
        raise InputError(f"{part} cannot be written ({why(e)}): the state before it is kept; make room, then "
                         "go on with --resume")
    if processes.rank() == 0:
        for other in Path(folder).iterdir():
            if other != part and other.name.isdigit():
                shutil.rmtree(other)
    processes.barrier()


def why(error):
    """The reason inside a CheckpointException, which holds one for each process; else the error itself."""
    for inner, _ in getattr(error, "failures", {}).values():
        return inner
    return error


def last(folder, **kinds):
    """(folder of the last whole state, its note, as formats.check_kinds() wants it), or (None, None)."""
    whole = [note.parent for note in Path(folder).glob("*/note.json") if note.parent.name.isdigit()]
    if not whole:
        return None, None
    part = max(whole, key=lambda part: int(part.name))
    return part, read_json(part / "note.json", f"remove {folder} to start again", **kinds)


def refuse_foreign(folder):
    """Raise InputError where `folder` is there and is, or holds, something that save did not write."""
    foreign = None if folder.is_dir() or not os.path.lexists(folder) else folder
    for path in folder.rglob("*"):
        step, *names = path.relative_to(folder).parts
        ours = path.name.startswith("note.json") or path.suffix == ".safetensors"
        if not step.isdigit() or len(names) > 1 or (names and not ours) or path.is_symlink():
            foreign = path
    if foreign:
        raise InputError(f"{foreign} is not of unlearn.py, which keeps its states in {folder}: choose "
                         "another --out, or move it away")


def remove(folder):
    """Remove what save wrote."""
    if processes.rank() == 0 and Path(folder).is_dir():
        for part in Path(folder).iterdir():
            if part.name.isdigit():
                shutil.rmtree(part)
        with suppress(OSError):                  # what somebody else put there stays
            Path(folder).rmdir()


@contextmanager
def unreadable(part):
    """Whatever is wrong with the files of a state, one line."""
    try:
        yield
    except (Exception, CheckpointException) as e:        # a foreign file can break a library anywhere
        raise InputError(f"{part} cannot be read ({type(why(e)).__name__}: {why(e)}): remove {part.parent} to "
                         "start again")


def dtypes(part):
    """{name: dtype} of a state that save wrote."""
    with unreadable(part):
        found = HuggingFaceStorageReader(part).read_metadata().state_dict_metadata
    return {name: t.properties.dtype for name, t in found.items()}


def load(part, tensors):
    """Fill {name: tensor} in place; a process reads its own rows of a sharded tensor only."""
    dtypes(part)                                 # says in one line what torch would say in many
    with quiet(), unreadable(part):
        checkpoint.load(tensors, storage_reader=HuggingFaceStorageReader(part))


@contextmanager
def quiet():
    """Without the warning that a checkpoint of a single process is one of a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        yield


# ---- is it this run's? --------------------------------------------------------------------------------

def other_flags(before, args):
    """[(name, value, value now)] of what a run with the args `before` did otherwise, not only elsewhere or at
    other times."""
    free = {"out", "overwrite", "resume", "save_every", "relearn", "device", "micro_batch"}
    out = []
    for key, value in before.items():
        now = vars(args).get(key)
        if key not in free and value != now:
            out.append((key, value, now))
    return out


def is_finished(args, out, state):
    """With --resume: did this very run write OUT? Refuses another one's OUT, unless it is to be replaced."""
    if not args.resume or runs.stage_of(out) != "unlearn":
        return False
    if args.overwrite and last(state)[0]:        # OUT is older than the run that was broken off
        return False
    done = runs.load_result(out)
    for key, value, now in other_flags(done["args"] | done.get("asked", {}), args):
        if args.overwrite:
            return False
        raise InputError(f"--resume: {out} is finished, with --{key} {value}, and now it is {now}: choose "
                         "another --out, or replace it with --overwrite")
    return True


# ---- what changes from step to step in a run ----------------------------------------------------------

def tensors_of(named, optimizer, smoother, average):
    """{name: tensor}: weights named = [(name, parameter)], optimizer states, what the smoother keeps, averages."""
    out = {}
    kept = getattr(smoother, "kept", {})
    for i, (name, p) in enumerate(named):
        out[f"weights.{name}"] = p.detach()
        for key, t in optimizer.state[p].items():
            out[f"{key}.{name}"] = t
        if p in kept:
            out[f"kept.{name}"] = kept[p]
        if average and average.mean:
            out[f"mean.{name}"] = average.mean[i]
    return out


def numbers_of(smoother, average):
    """The counts that go with tensors_of()."""
    return {"draws": getattr(smoother, "draws", 0), "averaged": average.count if average else 0}


@torch.no_grad()
def put_back(part, note, named, optimizer, smoother, average):
    """Fill a new run with the state in `part`, after making room for what a new run does not have yet."""
    saved = dtypes(part)
    for name, p in named:
        half = (f"exp_avg.{name}" in saved) != (f"exp_avg_sq.{name}" in saved)
        with unreadable(part):
            if saved[f"weights.{name}"] != p.dtype or half:
                raise ValueError(f"the state of {name} is not whole")
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{key}.{name}" in saved:
                like = p
                if key == "step":                # torch's fused AdamW has it where the weights are
                    like = torch.zeros((), device=p.device if optimizer.defaults.get("fused") else "cpu")
                optimizer.state[p][key] = torch.zeros_like(like, dtype=saved[f"{key}.{name}"])
        if f"kept.{name}" in saved:
            smoother.kept[p] = torch.zeros_like(p, dtype=saved[f"kept.{name}"])
    if average and note["averaged"]:
        average.update()
        average.count = note["averaged"]
    smoother.draws = note["draws"]
    load(part, tensors_of(named, optimizer, smoother, average))
