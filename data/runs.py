"""Command lines and run folders: flags, one-line errors, result.json, saved models, states to resume from.

A run folder OUT holds model.safetensors, config.json, the tokenizer and result.json; relearn.json and
evaluate.json join it. While it trains, OUT.state/ may hold what --resume goes on from.
"""
import argparse
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
import transformers
from huggingface_hub.utils import WeakFileLock

from data import processes
from data.formats import InputError, check_kinds, is_utf8, read_json, warn, write_json

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny"                    # the built-in benchmark; tiny/seedS/ is the world of seed S


# ---- command lines ------------------------------------------------------------------------------------

def give_up(message):
    """End with one line of error, of at most 1,000 characters, and exit status 2."""
    line = " ".join(str(message).split())
    if len(line) > 1000:
        line = f"{line[:500]} [...] {line[-480:]}"
    warn(f"error: {line}")
    sys.exit(2)


@contextmanager
def one_line_errors():
    """Turn what a user can mend into one line on stderr: an InputError or a file that cannot be written into
    exit status 2, Ctrl-C and SIGTERM into 130. Anything else keeps its traceback. Yields an ExitStack for what
    has to be undone; its attribute go_on, a text, says how to go on after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):      # a terminal that knows no ± gets its code
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def stop(number, frame):
        raise KeyboardInterrupt
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
    try:
        with ExitStack() as stack:
            stack.go_on = "nothing was written"
            yield stack
    except InputError as e:
        give_up(e)
    except OSError as e:
        if e.errno is None:
            raise
        give_up(f"{e.filename or 'a file'} cannot be read or written: {e.strerror}")
    except KeyboardInterrupt:
        warn(f"stopped: {stack.go_on}")
        sys.exit(130)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


class Help(argparse.RawDescriptionHelpFormatter):
    """The docstring as it is; of a flag its default, unless that is nothing or its help has the word."""

    def _get_help_string(self, action):
        if not action.default or action.default is argparse.SUPPRESS or "default" in action.help:
            return action.help
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """ArgumentParser that shows a script's docstring as it is, and whose errors are one line, exit status 2."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=Help, allow_abbrev=False)

    def error(self, message):
        give_up(f"{message} (--help lists every flag)")

    def parse_known_args(self, args=None, namespace=None):
        for text in sys.argv[1:] if args is None else args:
            if not is_utf8(text) or "\0" in text:
                self.error(f"{text!r} is not UTF-8 text: choose another name or value")
        return super().parse_known_args(args, namespace)


def add_device(group):
    """The flag --device, with a GPU as its default where there is one."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    group.add_argument("--device", type=usable_device, default=found, help="cpu, cuda, cuda:1, ...")


def usable_device(text):
    """argparse type: the name of a device that can hold a tensor here; cuda is this process's own GPU."""
    if text == "cuda" and "LOCAL_RANK" in os.environ:
        text += ":" + os.environ["LOCAL_RANK"]
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise argparse.ArgumentTypeError(f"{text} cannot be used here ({str(e).splitlines()[0]}); try cpu")
    return text


def refuse_torchrun(flags):
    """Raise InputError where torchrun started more than one process; flags: what does not take that."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"{flags} needs the whole model in one process: run without torchrun")


def number(kind, low, high=10**9, above=False):
    """argparse type: an int or float of at least `low`, or above it, and at most `high`."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or (above and value == low):
            bound = f"above {low}" if above else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is not a number {bound} and at most {high}")
        return value
    parse.__name__ = kind.__name__               # argparse says "invalid int value"
    return parse


SEED = number(int, 0, 2**63 - 1)                 # argparse type of every --seed: what torch takes
RATE = number(float, 0, 1e6, above=True)         # argparse type of every --lr
BATCH = number(int, 1, 2**20)                    # argparse type of every --batch_size


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

def resolved(path):
    """The path without links; Path.resolve() raises what is no OSError where links make a loop."""
    return Path(os.path.realpath(path))


def attack_rate(data):
    """The usual rate of a relearning attack: 2e-3 for the .3M parameters that know the built-in data, on
    other data the paper's 1e-5, which is for 7B."""
    folder = resolved(data)
    return 2e-3 if TINY in (folder, *folder.parents) else 1e-5


def world(data, seed):
    """The folder to read: data, or of the built-in benchmark the world of seed, which may not be there yet."""
    if resolved(data) == TINY:
        return Path(os.path.relpath(TINY / f"seed{seed}"))
    if not Path(data).is_dir():
        raise InputError(f"--data {data}: no such folder (data/README.md has the formats)")
    return Path(data)


def prepare_world(folder, seed):
    """Make the built-in world of seed, if that is what folder is and it is missing."""
    missing = folder.resolve().parent == TINY and not (folder / "target" / "result.json").exists()
    if missing and processes.rank() == 0:
        subprocess.run([sys.executable, str(TINY / "prepare.py"), "--seed", str(seed)], check=True)
    processes.barrier()


def stamp(folder, *patterns):
    """[[name, bytes, time in ns]] of a folder's files: what tells that they changed."""
    found = []
    for pattern in patterns:
        for path in sorted(Path(folder).glob(pattern)):
            about = path.stat()
            found.append([path.name, about.st_size, about.st_mtime_ns])
    return found


NUMBER = (int, float)
STAGES = {                                       # what the args of a result.json must hold
    "unlearn": {"model": str, "loss": str, "smooth": str, "sam_flip": bool, "beta": NUMBER,
                "margin": NUMBER, "reduce": str},
    "prepare": {"exclude": str},
}
LATER = {"max_len": int, "sam_norm": str, "sam_direction": str}      # and may: newer than some runs


def load_result(run):
    """RUN/result.json of unlearn.py or a prepare.py; an equivalent for a plain Hugging Face folder."""
    path = Path(run) / "result.json"
    if path.is_file():
        fix = "run unlearn.py again"
        result = read_json(path, fix, stage=str, args=dict)
        ran = result["args"]
        needed = {"data": str, "seed": int} | STAGES.get(result["stage"], STAGES["unlearn"])
        check_kinds(ran, needed, f"{path}:1", fix)
        check_kinds(ran, {key: kind for key, kind in LATER.items() if key in ran}, f"{path}:1", fix)
        if ran.get("param_dtype", "float32") not in ("float32", "bfloat16"):
            raise InputError(f'{path}:1: "param_dtype" is {ran["param_dtype"]}: {fix}')
        return result
    if (Path(run) / "config.json").is_file() or (Path(run) / "adapter_config.json").is_file():
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


def stage_of(folder):
    """The "stage" of a folder's result.json, None where it has none of ours."""
    try:
        return json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))["stage"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


WRITTEN = (                                      # what a run folder may hold
    "result.json", "relearn*.json", "evaluate.json", "attack_*.json", "*config.json", "*.safetensors*",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "*.jinja", "additional_chat_templates")


def refuse_out(out, overwrite, inputs):
    """Raise InputError where `out` is not a place that this program may write to or replace."""
    if out.is_symlink():
        raise InputError(f"--out {out} is a link: name the folder itself")
    place = resolved(out)
    if len(os.fsencode(place.name)) > 200:
        raise InputError(f"--out {out}: over 200 bytes leave no room for temporary names: shorten it")
    for path in inputs:
        if place in path.parents or path in place.parents or place == path:
            raise InputError(f"--out {out} is, holds or lies in {path}, which the run reads: choose another")
    here = Path.cwd().resolve()
    if place == here or place in here.parents:
        raise InputError(f"--out {out} is or holds the current folder: choose another name")
    if not out.exists():
        return
    if not overwrite:
        raise InputError(f"--out {out} exists: choose another name, or replace it with --overwrite")
    refuse_foreign(out, "unlearn")


def refuse_foreign(out, stage):
    """Raise InputError where `out` is not a run of that stage, or holds what no script here wrote."""
    script = {"unlearn": "unlearn.py", "prepare": "prepare.py"}[stage]
    if not out.is_dir() or (any(out.iterdir()) and stage_of(out) != stage):
        raise InputError(f"{out} is not a run of {script}, which alone --overwrite replaces: choose "
                         "another --out, or remove it yourself")
    for path in out.iterdir():
        if not any(path.match(pattern) for pattern in WRITTEN):
            raise InputError(f"{out} holds {path.name}, which no script here wrote and --overwrite "
                             "would remove: move it away, or choose another --out")


def remove_stale(folder, **made):
    """Remove what prepare.py taught in a data folder that is to be replaced, target/ and retrained/, where it
    was made with other args than `made`: it would not go with the new questions."""
    for name in ("target", "retrained"):
        model = folder / name
        if model.exists():
            refuse_foreign(model, "prepare")
            before = load_result(model)["args"]
            if any(before.get(key) != value for key, value in made.items()):
                shutil.rmtree(model)


@contextmanager
def claimed(out, overwrite, inputs):
    """Make sure, before any work, that `out` may and can be written, and keep other runs away from it. inputs:
    the folders that the run reads. Removes what killed runs of the same name left behind."""
    if processes.rank() > 0:
        yield
        return
    refuse_out(out, overwrite, [resolved(path) for path in inputs])
    lock = out.with_name(f".{out.name}.lock")
    if lock.is_symlink() or (lock.exists() and lock.stat().st_size):
        raise InputError(f"--out {out}: {lock}, whose name keeps other runs away, is a link or not "
                         "empty: is it yours? Choose another --out, or remove it")
    missing = [parent for parent in out.parents if not parent.exists()]
    with ExitStack() as stack:
        try:
            stack.callback(remove_empty, missing)
            out.parent.mkdir(parents=True, exist_ok=True)
            stack.callback(remove, lock)
            stack.enter_context(WeakFileLock(lock, timeout=0.5))
        except TimeoutError:
            stack.pop_all()                      # it is not ours to remove
            raise InputError(f"--out {out}: another run is writing to it; choose another name, or wait")
        except OSError as e:
            raise InputError(f"--out {out} cannot be written: {e.strerror}")
        for left in out.parent.glob(f".{glob.escape(out.name)}.tmp*"):
            number = left.name.removeprefix(f".{out.name}.tmp").removesuffix("-old")
            if number.isdigit() and left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
        yield


def remove(path):
    """Remove a file, if it is there and the system allows it."""
    with suppress(OSError):
        path.unlink()


def remove_empty(folders):
    """Remove those of folders that hold nothing, the first ones first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def save_run(out, model, tokenizer, result, overwrite=True, save=None):
    """Write a whole run folder under a hidden temporary name, then put it in the place of `out`: the old one
    aside, the new one in, the old one away. Without overwrite a folder that another process has put there in
    the meantime stays. save(folder) writes something else than the whole model."""
    tmp = out.with_name(f".{out.name}.tmp{os.getpid()}")
    aside = out.with_name(f".{out.name}.tmp{os.getpid()}-old")
    weights = gathered(model)
    if processes.rank() == 0:
        try:
            if save:
                save(tmp)
            else:
                model.save_pretrained(tmp, state_dict=weights)
            tokenizer.save_pretrained(tmp)
            for_transformers_4(tmp)
            write_json(tmp / "result.json", result)
            if out.exists() and overwrite:
                out.rename(aside)
            if not out.exists():
                tmp.rename(out)
        except Exception as e:                   # tokenizers raises a bare one where the disk is full
            raise InputError(f"{tmp} cannot be written ({type(e).__name__}: {e}): what was there is kept; make "
                             "room, or choose another --out")
        finally:
            if aside.exists() and not out.exists():
                aside.rename(out)
            for left in (tmp, aside):
                shutil.rmtree(left, ignore_errors=True)
    processes.barrier()


def for_transformers_4(folder):
    """Say in a saved folder's JSON what transformers 5 writes in words that 4.57 does not read: the base of the
    rotary positions, which it would take as 10,000, and the class of a tokenizer."""
    path = folder / "config.json"
    config = read_json(path, "") if path.exists() else {}            # adapters come without
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        write_json(path, config)
    path = folder / "tokenizer_config.json"
    config = read_json(path, "")
    if config.get("tokenizer_class") == "TokenizersBackend":
        write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})
