"""Score models and compare methods: multiple choice, open questions, perplexity, what relearning brings back.

    python evaluate.py out/*-s0                       # one table; about 2 s a run the first time
    python evaluate.py out/* --baseline npo           # runs that differ only in seed become mean and standard
                                                      # error; each method against the baseline, pair by pair
    python evaluate.py MODEL --data data/muse/news --limit 20      # any Hugging Face folder, a quick look
    python evaluate.py out/* --sharpness own --plot assets         # Hessian numbers and pictures (matplotlib)
    python evaluate.py out/npo-s0 --attack prefix                  # a prompt that brings it back: 35 s

The files of the data folder decide what is measured: UE and UT, and the metrics of MUSE and TOFU. Reads
RUN/result.json, the model beside it, DATA/*.jsonl and every RUN/relearn*.json that is there. Writes
RUN/evaluate.json (kept while it is newer than the model) and, with --json, the table.

Multiple choice alone overstates forgetting (arXiv 2510.07626), so open questions are asked too: the share
whose answer is, token for token, what the model says greedily. UE = 1 - accuracy on mcq_forget, UT = accuracy
on mcq_retain.
"""
import argparse, atexit, csv, functools, io, itertools, json, logging, math, os, random, re, resource
import subprocess, sys, time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers.processors import TemplateProcessing
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sam import SAM, accumulator, restore_, trainable

IGNORE = -100                                # the label of a token that no loss looks at: prompt and padding
LETTERS = ("The following are multiple choice questions (with answers) about {subject}.\n\n{question}\n"
           "A. {0}\nB. {1}\nC. {2}\nD. {3}\nAnswer:")      # the prompt of lm-evaluation-harness, 0-shot
QA = "Question: {question}\nAnswer: {answer}"               # where meta.json has no "qa_prompt"
PASS_TOKENS = 8192                           # most tokens of a pass, with its padding: bounds memory
CHUNK = 2**24                                # most logits held at once in training: 64 MB in fp32
# Shapes: B samples, T tokens, V vocabulary, D width. unlearn.py and relearn.py read data and models with this
# file; data/*/prepare.py read with it what others published.


# ---- input and output -------------------------------------------------------------------------------------

class InputError(ValueError):
    """Something the user can mend: the message names the value, the place and the fix."""


@contextmanager
def one_line_errors():
    """Turn an InputError into one line on stderr and exit status 2; anything else keeps its traceback."""
    try:
        yield
    except InputError as e:
        warn("error: " + " ".join(str(e).split()))
        sys.exit(2)


def warn(line):
    """Print a line on stderr, above a progress bar, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)


def make_parser(doc, device=True):
    """ArgumentParser with doc as its help and, mostly, --device; errors are one line, exit status 2."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)

    def error(message):
        warn(f"error: {message} (--help lists every flag)")
        sys.exit(2)
    parser.error = error
    if device:
        found = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", type=usable_device, default=found, help="cpu, cuda, cuda:1, ...")
    return parser


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
    parse.__name__ = kind.__name__           # argparse says "invalid int value"
    return parse


def read_text(path):
    """The text of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 ({e}): convert it")


def json_lines(path):
    """(line number, value) of each line of a JSON-lines file that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as e:
                raise InputError(f"{path}:{number}: not JSON ({e}): one JSON object a line is expected")


def read_jsonl(path, check, parse=json_lines):
    """The rows of a JSON-lines file, each through check(row) -> row, which raises InputError on a bad one.

    Every row also gets "where", its file and line, for the errors that only show later. Another `parse`, a
    function path -> (number, value) pairs, reads another format.
    """
    path, rows = Path(path), []
    if not path.is_file():
        raise InputError(f"{path} is missing: prepare the data (data/README.md) or point --data elsewhere")
    for number, value in parse(path):
        try:
            rows.append(check(value) | {"where": f"{path}:{number}"})
        except InputError as e:
            raise InputError(f"{path}:{number}: {e}")
    if not rows:
        raise InputError(f"{path} has no rows: write at least one JSON object a line")
    return rows


def check_texts(row, *keys):
    """Raise InputError unless row is a dict with a text that is not empty under each of keys."""
    if not isinstance(row, dict) or not all(k in row for k in keys):
        found = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"needs the keys {', '.join(keys)}, found {found or 'none'}: see data/README.md")
    for key in keys:
        if not isinstance(row[key], str) or not row[key].strip():
            raise InputError(f'"{key}" is {row[key]!r}: give a text that is not empty')


def text_row(row):
    """Check a row of forget.jsonl or retain.jsonl: {"text"}, {"prompt", "completion"}, or a bare string."""
    row = {"text": row} if isinstance(row, str) else row
    pair = isinstance(row, dict) and "prompt" in row and "text" not in row
    check_texts(row, *(["prompt", "completion"] if pair else ["text"]))
    return row


def write_json(path, value):
    """Write JSON under a temporary name and rename it, so that a reader never sees half a file."""
    if processes()[0] > 0:
        return
    tmp = Path(f"{path}.tmp{os.getpid()}")
    tmp.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    tmp.replace(path)


def provenance(device, start):
    """What every result file says about its run: versions, commit, device, seconds, peak memory in GB."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).resolve().parent,
                         capture_output=True, text=True)
    cuda = torch.device(device).type == "cuda"
    ram = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated(device) if cuda else ram
    versions = {m.__name__: m.__version__ for m in (torch, transformers)} | {"python": sys.version.split()[0]}
    return {"versions": versions, "commit": git.stdout.strip() or None, "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if cuda else str(device),
            "processes": processes()[1],
            "seconds": round(time.time() - start, 2), "peak_gb": round(peak / 1e9, 3)}


def load_model(name, device="cpu", dtype=torch.float32):
    """(model, tokenizer) of a local folder or hub name. safetensors only, no remote code, dropout off.

    Under torchrun every process keeps its part of the weights; the processes of a machine load one after the
    other, so that its memory holds one whole model at a time.
    """
    if not Path(name).is_dir() and str(name).count("/") != 1:
        raise InputError(f"model {name}: neither a folder here nor a hub name ORG/NAME")
    together = processes()[1] > 1
    for turn in range(int(os.environ["LOCAL_WORLD_SIZE"]) if together else 1):
        if not together or turn == int(os.environ["LOCAL_RANK"]):
            try:
                tokenizer = AutoTokenizer.from_pretrained(name)
                model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
            except (OSError, ValueError) as e:
                raise InputError(f"model {name} does not load: {e}")
            if together:
                shard(model, device)
        barrier()
    rows = model.get_input_embeddings().num_embeddings
    if (tokenizer.pad_token_id or 0) >= rows:
        raise InputError(f"model {name}: its pad token {tokenizer.pad_token!r} has the id "
                         f"{tokenizer.pad_token_id}, but the model has {rows} embeddings; set pad_token to "
                         "null in tokenizer_config.json")
    # eval mode: with dropout the two passes of SAM, and the cached reference, would see different networks
    return model.to(device).eval(), tokenizer


def show(value):
    """A metric with three digits, or a dash for one that the data does not allow."""
    return "-" if value is None else f"{value:.3f}"


# ---- several processes (torchrun) -------------------------------------------------------------------------

def processes():
    """(rank of this process, how many there are): (0, 1) unless torchrun started several."""
    dist = torch.distributed
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(device):
    """Make the processes of torchrun one group: NCCL between GPUs, gloo on CPU. Only the first one prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or torch.distributed.is_initialized():
        return
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
    atexit.register(torch.distributed.destroy_process_group)
    if processes()[0] > 0:
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)


def barrier():
    """Wait until every process is here."""
    if processes()[1] > 1:
        torch.distributed.barrier()


def blocks(model):
    """The decoder layers: the parts that transformers says must not be split."""
    names = model._no_split_modules or ()
    return [m for m in model.modules() if type(m).__name__.removeprefix("FSDP") in names]


def shard(model, device):
    """Spread the weights over the processes by FSDP2, which gathers a block to run it; gradients add up."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(torch.device(device).type, (processes()[1],))
    for module in [*blocks(model), model]:   # the last one takes what no block has: embeddings, output layer
        # True for the model as well: weights that stay gathered would not see a later change of theirs
        fully_shard(module, mesh=mesh, reshard_after_forward=True,
                    mp_policy=MixedPrecisionPolicy(reduce_dtype=accumulator(model.dtype)))
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def whole(t):
    """All of a sharded tensor, gathered in every process at once; any other tensor as it is."""
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()


def own_part(items):
    """(this process's part of a list, 1); of a list too short for all ([its first], 0), to count as nothing,
    because a sharded model runs only when it runs in every process."""
    rank, count = processes()
    return (items[rank::count], 1) if rank < len(items) else (items[:1], 0)


def all_sum(value, device):
    """The sum of a number or tensor over all processes; for one process the value itself."""
    if processes()[1] > 1:
        value = torch.as_tensor(value, device=device).clone()
        torch.distributed.all_reduce(value)
    return value


def in_turns(batches):
    """(index, batch) of every count-th batch; a process short of one does the last again: see own_part."""
    rank, count = processes()
    for i in range(rank, -(-len(batches) // count) * count, count):
        yield min(i, len(batches) - 1), batches[min(i, len(batches) - 1)]


def all_max(values, device):
    """Elementwise maximum over all processes, each of which filled in its part of a tensor of -inf."""
    if processes()[1] > 1:
        values = values.to(device)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return values.cpu()


# ---- published data sets, for data/*/prepare.py -----------------------------------------------------------

def json_values(path):
    """(row number, value) of a .json file, which may hold one array or, as TOFU's do, a value a line."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        yield from json_lines(path)
        return
    try:
        yield from enumerate(json.loads(text), 1)
    except json.JSONDecodeError as e:
        raise InputError(f"{path}:{e.lineno}: not JSON ({e}): is the file cut off? Download it again")


def csv_rows(path):
    """(line number, list of cells) of a CSV file without a header."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as e:
        raise InputError(f"{path}:{reader.line_num}: not CSV ({e}): is the file cut off? Download it again")


def parquet_rows(path):
    """(row number, dict) of a parquet file; needs the package `datasets`."""
    try:
        from datasets import load_dataset           # not a requirement: only published data sets use parquet
    except ImportError:
        raise InputError(f"{path}: reading parquet takes one more package: pip install datasets")
    logging.getLogger("datasets").setLevel(logging.CRITICAL)      # a broken file is one line, and it is ours
    try:
        yield from enumerate(load_dataset("parquet", data_files=str(path), split="train", streaming=True), 1)
    except (ValueError, OSError) as e:
        raise InputError(f"{path}: not a whole parquet file ({e}): download it again")


FORMATS = {".parquet": parquet_rows, ".jsonl": json_lines, ".json": json_values, ".csv": csv_rows}


def fetch(repo, names, folder=None):
    """The folder that holds a data set: `folder`, or a download of those files of the hub data set `repo`
    whose path starts with one of names."""
    if folder:
        if not Path(folder).is_dir():
            raise InputError(f"--from {folder}: no such folder")
        return Path(folder)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=[f"{n}*" for n in names]))
    except (OSError, ValueError) as e:
        raise InputError(f"{repo} does not download ({e}): put its files in a folder and pass --from FOLDER")


def read_published(folder, names, check, count=None):
    """The rows of the first of names that folder holds, as NAME.EXT or in parts NAME-00000-of-00002.EXT.

    Each goes through check as in read_jsonl. Other than `count` rows, where count is given, is an error.
    """
    for name in names:
        for kind, parse in FORMATS.items():
            paths = sorted([*folder.glob(name + kind), *folder.glob(f"{name}-*-of-*{kind}")])
            if paths:
                rows = [row for path in paths for row in read_jsonl(path, check, parse)]
                if count is not None and len(rows) != count:
                    raise InputError(f"{paths[0]}: {len(rows):,} rows, but {count:,} are published: cut off, "
                                     "or another version? Download it again, or take it with --any_count")
                return rows
    raise InputError(f"{folder} has no {' or '.join(names)} ({', '.join(FORMATS)}): see the data's readme.md")


def write_data(folder, files, meta=None):
    """Write {name: rows} as folder/NAME.jsonl, and meta.json, each under a temporary name first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        tmp = folder / f"{name}.jsonl.tmp{os.getpid()}"
        with open(tmp, "w", encoding="utf-8") as f:
            f.writelines(json.dumps({k: v for k, v in row.items() if k != "where"}) + "\n" for row in rows)
        tmp.replace(folder / f"{name}.jsonl")
        print(f"{os.path.relpath(folder / name)}.jsonl: {len(rows):,} rows")
    if meta:
        write_json(folder / "meta.json", meta)


# ---- samples and log-probabilities ------------------------------------------------------------------------

def context_of(model):
    """The longest sequence in tokens that the model takes, 0 if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0


def encode(tokenizer, triples, context, max_len=0):
    """[(ids, labels)] of (prompt, completion, where), the two tokenised as one; a prompt's labels are IGNORE.

    A sample of more than `context` tokens is an error that names `where`; max_len > 0 cuts samples before.
    """
    prompts = list({p for p, _, _ in triples if p})
    quick = {"return_attention_mask": False, "verbose": False}
    tokens = lambda texts: tokenizer(texts, **quick).input_ids if texts else []
    known, out = dict(zip(prompts, map(len, tokens(prompts)))) | {"": 0}, []
    for (prompt, _, where), ids in zip(triples, tokens([p + c for p, c, _ in triples])):
        ids = ids[:max_len or None]
        if context and len(ids) > context:
            raise InputError(
                f"{where}: {len(ids)} tokens, but the model's context is {context}: shorten the text, "
                f"or cut it with --max_len {context}")
        labels = [IGNORE] * min(known[prompt], len(ids)) + ids[known[prompt]:]
        if all(label == IGNORE for label in labels[1:]):
            raise InputError(
                f"{where}: no token to score ({len(ids)} tokens, {known[prompt]} of them prompt): "
                f"lengthen the text or raise --max_len")
        out.append((ids, labels))
    return out


def encode_rows(tokenizer, rows, context, max_len=0):
    """encode() for the rows of a corpus: all tokens of a text, or the completion of a prompt."""
    return encode(tokenizer, [("", r["text"], r["where"]) if "text" in r else
                              (r["prompt"], r["completion"], r["where"]) for r in rows], context, max_len)


def collate(samples, pad, device="cpu"):
    """Right-padded {"input_ids", "attention_mask", "labels"}, each (B, T) int64; padding is never a label."""
    width = max(len(ids) for ids, _ in samples)
    rows = [(ids + [pad] * (width - len(ids)), [1] * len(ids) + [0] * (width - len(ids)),
             labels + [IGNORE] * (width - len(ids))) for ids, labels in samples]
    ids, mask, labels = (torch.tensor(x, device=device) for x in zip(*rows))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits_of(model, batch):
    """(B, T-1, V): position t predicts token t+1."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                 use_cache=False).logits[:, :-1]


def with_head(model, batch, f, **more):
    """The model's output with f(hidden (B, T, D), output layer) in the place of the output layer's logits.

    The model's own forward runs, so what hangs on it (FSDP gathers weights there) works as ever.
    """
    head = model.get_output_embeddings()
    layer = head.forward
    head.forward = lambda hidden: f(hidden, layer)
    try:
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False,
                     **more)
    finally:
        del head.forward                     # the class's own again


def alters_logits(model):
    """Does the model scale or soft-cap its logits behind the output layer? Tried once, on one token."""
    if not hasattr(model, "logits_altered"):
        token, seen = torch.ones(1, 1, dtype=torch.int64, device=model.device), []
        with torch.no_grad():
            out = with_head(model, {"input_ids": token, "attention_mask": token},
                            lambda hidden, _: seen.append(hidden) or hidden).logits
        model.logits_altered = not torch.equal(out.to(seen[0].dtype), seen[0])
        if model.logits_altered:
            warn(f"{type(model).__name__} changes its logits behind the output layer, so the loss needs all "
                 "of them at once: memory grows with tokens x vocabulary (--micro_batch bounds it)")
    return model.logits_altered


def chunk_rows(model, batch):
    """How many rows of V logits are CHUNK values; 0 if the batch has no more rows than that."""
    rows = max(1, CHUNK // model.config.get_text_config().vocab_size)
    return rows if batch["input_ids"].numel() > rows else 0


def over_labels(model, batch, size, f, *rows):
    """f(logits (n, V), part of each of rows) -> (n,) or (1,) of every `size` label positions, concatenated.

    The backward pass computes a part's logits again, so that no more than one part of them exists at a time.
    """
    mask, again = batch["labels"][:, 1:] != IGNORE, {"use_reentrant": False, "preserve_rng_state": False}

    def score(hidden, layer):                                                    # hidden: (B, T, D)
        parts = zip(*(r.split(size) for r in (hidden[:, :-1][mask], *rows)))
        return torch.cat([checkpoint(lambda h, *r: f(layer(h), *r), *part, **again) for part in parts])
    return with_head(model, batch, score).logits


def token_logps(model, batch):
    """log p(token t+1 | tokens to t) for every label, 0 where there is none; and the mask. Both (B, T-1)."""
    labels, size = batch["labels"][:, 1:], chunk_rows(model, batch)
    mask = labels != IGNORE

    def nll_of(logits, labels):                          # (B, V, ...): log-softmax in bf16 loses three digits
        logits = logits.to(accumulator(logits.dtype))
        return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    if size and not alters_logits(model):
        nll = over_labels(model, batch, size, nll_of, labels[mask])                                # (labels,)
        return torch.zeros_like(mask, dtype=nll.dtype).masked_scatter(mask, -nll), mask
    return -nll_of(logits_of(model, batch).transpose(1, 2), labels), mask


def batches(lengths, size, tokens=PASS_TOKENS):
    """Lists of indices, shortest first: at most `size` in each, and at most `tokens` with the padding."""
    part = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if part and (len(part) == size or lengths[i] * (len(part) + 1) > tokens):
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def progress(total, desc):
    """A bar that appears after two seconds and leaves nothing behind."""
    return tqdm(total=total, desc=desc, unit="sample", leave=False, delay=2)


@torch.no_grad()
def label_logits(model, tokenizer, samples, batch=64, desc="scoring"):
    """(index, (n, V) logits, (n,) labels) of this process's part of encoded samples: what the model says
    where a label is due. Logits of other positions, most of B x T x V on questions, are never computed.
    """
    bar = progress(len(samples), desc)
    for _, part in in_turns(list(batches([len(ids) for ids, _ in samples], batch))):
        x = collate([samples[i] for i in part], tokenizer.pad_token_id or 0, model.device)
        mask = x["labels"][:, 1:] != IGNORE                                                         # (B, T-1)
        logits = with_head(model, x, lambda hidden, layer: layer(hidden[:, :-1][mask])).logits   # (labels, V)
        counts = mask.sum(1).tolist()
        yield from zip(part, logits.split(counts), x["labels"][:, 1:][mask].split(counts))
        bar.update(len(part) * processes()[1])
    bar.close()


def label_scores(model, tokenizer, samples, batch=64, desc="scoring"):
    """[((n,) fp64 log-probability of each label, (n,) bool: is it the likeliest token?)], one a sample."""
    counts = [sum(label != IGNORE for label in labels[1:]) for _, labels in samples]
    ends, out = np.cumsum(counts), torch.full((2, sum(counts)), -math.inf, dtype=torch.float64)
    for i, logits, labels in label_logits(model, tokenizer, samples, batch, desc):
        logps = logits.to(accumulator(logits.dtype)).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        out[:, ends[i] - counts[i]:ends[i]] = torch.stack([logps, logits.argmax(-1) == labels])
    logps, hits = all_max(out, model.device)
    return list(zip(logps.split(counts), (hits > 0).split(counts)))


# ---- questions --------------------------------------------------------------------------------------------

def mcq_row(row):
    """Check a row of mcq_*.jsonl: {"question", "choices": [4 texts], "answer": 0-3}."""
    check_texts(row, "question")
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(c, str) for c in choices):
        raise InputError(f'"choices" is {choices!r}: give a list of exactly 4 texts')
    if type(row.get("answer")) is not int or not 0 <= row["answer"] <= 3:
        raise InputError(f'"answer" is {row.get("answer")!r}: give the index of the right choice, 0 to 3')
    return row


def load_meta(folder):
    """A data folder's meta.json as a dict, {} without one."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        meta.get("prompt")
    except (json.JSONDecodeError, AttributeError) as e:
        raise InputError(f"{path}:1: not a JSON object ({e}): mend it or remove it")
    for key, fields in (("prompt", ["{question}"]), ("qa_prompt", ["{question}", "{answer}"])):
        if key in meta and not all(field in str(meta[key]) for field in fields):
            raise InputError(f'{path}:1: "{key}" is {meta[key]!r}: put {" and ".join(fields)} in it')
    return meta


def load_questions(folder):
    """A data folder's mcq_*.jsonl: {"mcq_forget": rows, "mcq_retain": rows, ..., "prompt": template or None}.

    meta.json may give a "prompt" with {question} in it: then the choices' own texts are scored after it.
    Without one, the question and its choices are shown as LETTERS and " A" to " D" are scored.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"data folder {folder}: not found from here; name it with --data")
    prompt = load_meta(folder).get("prompt")
    return {**{f.stem: read_jsonl(f, mcq_row) for f in sorted(folder.glob("mcq_*.jsonl"))}, "prompt": prompt}


def ask(row, prompt):
    """(context, four continuations) of a multiple-choice row."""
    question = row["question"].strip()
    if prompt:
        return prompt.replace("{question}", question), [" " + c.strip() for c in row["choices"]]
    subject = row.get("subject", "the topic").replace("_", " ")
    return LETTERS.format(*row["choices"], question=question, subject=subject), [" A", " B", " C", " D"]


def choice_logps(model, tokenizer, rows, prompt=None, batch=64):
    """(N, 4) fp64 summed log-probability of each choice after its context, both tokenised together.

    One forward pass a question where the four choices are one token each, else one a choice.
    """
    out, jobs = torch.full((len(rows), 4), -math.inf, dtype=torch.float64), []
    asked = [(start, choice, row["where"]) for row in rows for start, choices in [ask(row, prompt)]
             for choice in choices]
    samples = encode(tokenizer, asked, context_of(model))
    for q in range(len(rows)):
        encoded = samples[4 * q:4 * q + 4]
        if all(labels.count(IGNORE) == len(ids) - 1 for ids, labels in encoded) and (
                len({tuple(ids[:-1]) for ids, _ in encoded}) == 1):
            jobs.append((encoded[0], q, slice(None), [ids[-1] for ids, _ in encoded]))   # one for all four
        else:
            jobs += [(e, q, c, None) for c, e in enumerate(encoded)]
    for i, logits, labels in label_logits(model, tokenizer, [job[0] for job in jobs], batch, "questions"):
        _, q, choice, four = jobs[i]
        logps = logits.to(accumulator(logits.dtype)).log_softmax(-1)                      # (answer tokens, V)
        out[q, choice] = (logps[0, four] if four else logps.gather(-1, labels[:, None]).sum()).double().cpu()
    return all_max(out, model.device)


def correct(model, tokenizer, rows, prompt=None):
    """(N,) bool: is the likeliest choice the right one? Ties go to the first."""
    return choice_logps(model, tokenizer, rows, prompt).argmax(1) == torch.tensor([r["answer"] for r in rows])


def ue_ut(model, tokenizer, questions, seen=None, only_forget=False):
    """{"UE", "UT"}; None where the data has no mcq_forget or mcq_retain. With seen, a set of facts, also
    "UE_heldout": UE on the questions about other facts, None when no question names such a fact."""
    share = lambda right: right.double().mean().item() if len(right) else None
    names, prompt = ("mcq_forget", "mcq_retain")[:1 if only_forget else 2], questions["prompt"]
    right = {name: correct(model, tokenizer, questions[name], prompt) if name in questions else []
             for name in names}
    out = {"UE": 1 - share(right["mcq_forget"]) if "mcq_forget" in questions else None}
    if seen is not None:
        held = [seen and r.get("fact", None) not in seen | {None} for r in questions.get("mcq_forget", [])]
        out["UE_heldout"] = 1 - share(right["mcq_forget"][torch.tensor(held)]) if any(held) else None
    return out if only_forget else out | {"UT": share(right["mcq_retain"])}


def open_accuracy(model, tokenizer, rows, prompt, batch=64):
    """Share of questions whose greedy continuation starts, token for token, with the right answer.

    Greedy decoding gives the answer if and only if each of its tokens is the argmax after the ones before it,
    so one forward pass with the answer in place says what generating would.
    """
    asked = [(start, choices[row["answer"]], row["where"]) for row in rows
             for start, choices in [ask(row, prompt)]]
    samples = encode(tokenizer, asked, context_of(model))
    scores = label_scores(model, tokenizer, samples, batch, "open questions")
    return sum(hits.all().item() for _, hits in scores) / len(rows)


def corpus_scores(model, tokenizer, rows, max_len=0, batch=64):
    """{"ppl", "es", "em"} of rows of a corpus, and their per-row records.

    ppl  exp(mean negative log-probability of a label), over all tokens of all rows
    es   extraction strength, mean over rows: extraction_strength
    em   exact memorisation (arXiv 2205.10770), mean over rows: share of labels that are the likeliest token
    """
    samples = encode_rows(tokenizer, rows, 0, max_len or context_of(model))
    scores = label_scores(model, tokenizer, samples, batch, "corpus")
    records = [{"where": row["where"], "nll": -logps.mean().item(), "es": extraction_strength(hits.tolist()),
                "em": hits.double().mean().item()} for row, (logps, hits) in zip(rows, scores)]
    nll = -torch.cat([logps for logps, _ in scores]).mean().item()
    ppl = math.exp(min(nll, 700.0))                  # an unlearned model can pass fp64's largest exponent
    return {"ppl": ppl, "es": mean_of(records, "es"), "em": mean_of(records, "em")}, records


# ---- text metrics: pure functions -------------------------------------------------------------------------

def spaced(rows, limit):
    """At most `limit` of rows, evenly spaced; 0 = all."""
    return rows[::math.ceil(len(rows) / limit)] if limit else rows


def mean_of(records, key):
    """Mean of records[i][key]."""
    return math.fsum(r[key] for r in records) / len(records)


def rouge_l(said, truth):
    """(precision, recall, F1) of ROUGE-L: the longest common subsequence of the two texts' lower-case
    [a-z0-9]+ words, over the number of words said, of true words, and their harmonic mean. No stemming."""
    said, truth = (re.findall("[a-z0-9]+", text.lower()) for text in (said, truth))
    row = [0] * (len(truth) + 1)            # row[j]: longest common subsequence with the first j true words
    for a in said:
        diagonal = 0
        for j, b in enumerate(truth, 1):
            row[j], diagonal = diagonal + 1 if a == b else max(row[j], row[j - 1]), row[j]
    if not row[-1]:
        return 0.0, 0.0, 0.0
    p, r = row[-1] / len(said), row[-1] / len(truth)
    return p, r, 2 * p * r / (p + r)


def lowest_mean(logps, share=0.4):
    """Min-K%: minus the mean of the lowest `share` of a text's token log-probabilities (n,)."""
    return -np.sort(np.asarray(logps))[:max(1, int(share * len(logps)))].mean().item()


def auc(a, b):
    """Probability that a value of a is above one of b; a tie counts half. The area under the ROC curve."""
    b = np.sort(b)
    return float((np.searchsorted(b, a, "left") + np.searchsorted(b, a, "right")).mean() / (2 * len(b)))


def extraction_strength(hits):
    """1 - k/n for n labels: k is the shortest prefix after which greedy decoding gives all that follows.

    hits says for each label whether it is the likeliest token after the true ones before it, so k ends at the
    last miss. (open-unlearning never lets k reach n: a wrong last token gives 1/n there and 0 here.)
    """
    misses = [i for i, hit in enumerate(hits) if not hit]
    return 1 - (misses[-1] + 1 if misses else 0) / len(hits)


def truth_ratio(paraphrased, perturbed):
    """TOFU's R (arXiv 2401.06121): exp(mean of the wrong answers' mean token log-probabilities - that of the
    paraphrased right answer). Below 1: the model prefers what is true."""
    return math.exp(min(sum(perturbed) / len(perturbed) - paraphrased, 700.0))


def harmonic_mean(values):
    """n / sum(1/v); 0 if any value is 0."""
    return len(values) / math.fsum(1 / v for v in values) if all(values) else 0.0


def ks_test(a, b):
    """(D, p) of the two-sample Kolmogorov-Smirnov test: the largest distance of the two empirical
    distributions, and the exact probability that two samples of one, without ties, are as far apart.

    All orders of the n + m values are equally likely: walks from (0, 0) to (n, m). p is what leaves the band
    |i/n - j/m| < D on the way, summed as it leaves, so that a p of 1e-20 is right as well.
    """
    n, m, both = len(a), len(b), np.concatenate([a, b])
    below = lambda x: np.searchsorted(np.sort(x), both, "right")
    d = np.abs(below(a) * m - below(b) * n).max()                # in units of 1/nm: exact
    i, p = np.arange(n + 1), 0.0
    mass = np.where(i == 0, 1.0, 0.0)                  # (n+1,) probability of being at i and still inside
    for step in range(1, n + m + 1):
        left = n + m - step + 1
        up = np.concatenate([[0.0], mass[:-1] * (n - i[:-1]) / left])      # the next value is one of a,
        mass = mass * np.clip(m - (step - 1 - i), 0, None) / left + up     # or of b
        out = np.abs(i * m - (step - i) * n) >= d
        p, mass = p + mass[out].sum(), np.where(out, 0.0, mass)
    return float(d / (n * m)), float(min(p, 1.0))


# ---- generation -------------------------------------------------------------------------------------------

@torch.no_grad()
def generate(model, tokenizer, prompts, new, batch=64, desc="generating"):
    """The greedy continuation of each of prompts, [(text, where)]: texts of at most `new` tokens, cut at eos.

    Padded on the left, so that all rows of a batch continue at its end; the mask keeps the padding out of
    attention and positions.
    """
    encoded = tokenizer([text for text, _ in prompts], return_attention_mask=False, verbose=False).input_ids
    context, pad, texts = context_of(model), tokenizer.pad_token_id or 0, [None] * len(prompts)
    for ids, (_, where) in zip(encoded, prompts):
        if context and len(ids) + new > context:
            raise InputError(f"{where}: {len(ids)} tokens and {new} new ones, but the model's context is "
                             f"{context}: shorten the text or take another model")
    own = model.generation_config
    ends = {tokenizer.eos_token_id, *np.atleast_1d(own.eos_token_id).tolist()} - {None}
    # greedy is argmax: no repetition penalty or forced token that a checkpoint brings along
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=pad,
                                               eos_token_id=sorted(ends) or None)
    bar = progress(len(prompts), desc)
    try:
        for part in batches([len(ids) + new for ids in encoded], batch, 4 * PASS_TOKENS):
            width = max(len(encoded[i]) for i in part)
            ids = torch.tensor([[pad] * (width - len(encoded[i])) + encoded[i] for i in part])        # (B, T)
            mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in part])
            out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device))[:, width:]
            for i, said in zip(part, out.tolist()):
                end = next((t for t, token in enumerate(said) if token in ends), new)
                texts[i] = tokenizer.decode(said[:end], skip_special_tokens=True)
            bar.update(len(part))
    finally:
        model.generation_config = own
        bar.close()
    return texts


# ---- MUSE and TOFU ----------------------------------------------------------------------------------------

def verbmem(model, tokenizer, rows, new=128, batch=64):
    """MUSE VerbMem records of {"prompt", "gt"} rows: ROUGE-L F1 of `new` greedy tokens with as many of gt."""
    said = generate(model, tokenizer, [(r["prompt"], r["where"]) for r in rows], new, batch, "verbmem")
    truth = tokenizer([r["gt"] for r in rows], add_special_tokens=False, verbose=False).input_ids
    return [{"where": r["where"], "said": s, "rouge": rouge_l(s, tokenizer.decode(ids[:new]))[2]}
            for r, s, ids in zip(rows, said, truth)]


def knowmem(model, tokenizer, rows, icl, new=32, batch=64):
    """MUSE KnowMem records of {"question", "answer"} rows, asked after the answered questions of icl: ROUGE-L
    F1 of the greedy answer, cut where it begins another question."""
    shown = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in icl)
    asked = [(f"{shown}Question: {r['question']}\nAnswer: ", r["where"]) for r in rows]
    said = [re.split("\n\n|\nQuestion|Question:", text)[0]
            for text in generate(model, tokenizer, asked, new, batch, "knowmem")]
    return [{"where": r["where"], "said": s, "rouge": rouge_l(s, r["answer"])[2]} for r, s in zip(rows, said)]


def membership(model, tokenizer, rows, batch=64):
    """PrivLeak records of {"text"} rows: Min-40% of each text, cut to the model's context."""
    samples = encode_rows(tokenizer, rows, 0, context_of(model))
    scores = label_scores(model, tokenizer, samples, batch, "privleak")
    return [{"where": r["where"], "min_k": lowest_mean(logps)} for r, (logps, _) in zip(rows, scores)]


def qa_row(row):
    """Check a row of qa_*.jsonl: {"question", "answer", "perturbed_answer": [texts]} and, optional,
    "paraphrased_answer"."""
    check_texts(row, "question", "answer", *(["paraphrased_answer"] if "paraphrased_answer" in row else []))
    wrong = row.get("perturbed_answer")
    if not isinstance(wrong, list) or not wrong or not all(isinstance(w, str) and w.strip() for w in wrong):
        raise InputError(f'"perturbed_answer" is {wrong!r}: give a list of wrong answers')
    return row


def qa_texts(template, question, answer):
    """(prompt, completion) of a question by a template with {question} and {answer}. Spaces before the answer
    go with it: a tokenizer makes them part of its first word."""
    head, _, tail = template.partition("{answer}")
    start = head.rstrip(" ")
    return start.replace("{question}", question), head[len(start):] + answer + tail


def qa_scores(model, tokenizer, rows, template=QA, new=200, batch=64):
    """TOFU records: "prob" exp(mean log p of the answer), "R" truth_ratio, "rouge" recall of a greedy answer.

    Rows without a paraphrased_answer (TOFU's real authors and world facts) go as in TOFU: the answer stands
    in for it, and prob is divided by the sum over the answer and the wrong ones. TOFU's own code also counts
    the end-of-text token as part of an answer, and stems before ROUGE; this does neither.
    """
    answers = [[r["answer"], r.get("paraphrased_answer", r["answer"]), *r["perturbed_answer"]] for r in rows]
    triples = [(*qa_texts(template, r["question"], a), r["where"])
               for r, some in zip(rows, answers) for a in some]
    samples = encode(tokenizer, triples, context_of(model))
    scores = iter(label_scores(model, tokenizer, samples, batch, "answers"))
    asked = [(qa_texts(template, r["question"], "")[0], r["where"]) for r in rows]
    out = []
    for row, some, said in zip(rows, answers, generate(model, tokenizer, asked, new, batch, "answers")):
        answer, paraphrased, *wrong = (next(scores)[0].mean().item() for _ in some)
        prob = math.exp(answer)
        if "paraphrased_answer" not in row:
            prob = 1 / (1 + math.fsum(math.exp(min(w - answer, 700.0)) for w in wrong))
        out.append({"where": row["where"], "said": said, "prob": prob, "R": truth_ratio(paraphrased, wrong),
                    "rouge": rouge_l(said, row["answer"])[1]})
    return out


def qa_summary(name, records):
    """{"prob", "rouge", "truth"}: means over records; truth of R is min(R, 1/R) for the forget set, which is
    best at 1, and max(0, 1 - R) for what should be kept."""
    truth = [min(r["R"], 1 / max(r["R"], 1e-300)) if name == "qa_forget" else max(0.0, 1 - r["R"])
             for r in records]
    return {"prob": mean_of(records, "prob"), "rouge": mean_of(records, "rouge"),
            "truth": math.fsum(truth) / len(truth)}


def published_metrics(model, tokenizer, data, batch, thin, records, retained):
    """The MUSE and TOFU metrics that the files of folder `data` allow; adds their per-question records.

    thin(rows) -> rows to score. retained is the evaluate.json of a model that never saw the forget set, or
    None: PrivLeak and the forget quality compare with it.
    """
    out, meta = {}, load_meta(data)
    read = lambda name, check: thin(read_jsonl(data / f"{name}.jsonl", check))
    both = lambda *keys: lambda row: (check_texts(row, *keys), row)[1]
    has = lambda *names: all((data / f"{name}.jsonl").is_file() for name in names)
    if has("verbmem_forget"):
        rows = read("verbmem_forget", both("prompt", "gt"))
        records["verbmem"] = verbmem(model, tokenizer, rows, batch=batch)
        out["verbmem"] = mean_of(records["verbmem"], "rouge")
    for name in ("knowmem_forget", "knowmem_retain"):
        if has(name):
            icl = read_jsonl(data / f"{name}_icl.jsonl", both("question", "answer"))
            rows = read(name, both("question", "answer"))
            records[name] = knowmem(model, tokenizer, rows, icl, batch=batch)
            out[name] = mean_of(records[name], "rouge")
    if has("privleak_forget", "privleak_holdout"):
        for name in ("privleak_forget", "privleak_holdout"):
            records[name] = membership(model, tokenizer, read(name, text_row), batch)
        out["auc"] = auc(*([r["min_k"] for r in records[f"privleak_{k}"]] for k in ("forget", "holdout")))
        reference = retained["metrics"]["auc"] if retained else meta.get("auc_retrain")
        if reference:
            out["privleak"] = 100 * (out["auc"] - reference) / reference
    for path in sorted(data.glob("qa_*.jsonl")):
        rows = read(path.stem, qa_row)
        records[path.stem] = qa_scores(model, tokenizer, rows, meta.get("qa_prompt", QA), batch=batch)
        out[path.stem] = qa_summary(path.stem, records[path.stem])
    kept = [out.get(f"qa_{name}") for name in ("retain", "real_authors", "world_facts")]
    if all(kept):
        out["utility"] = harmonic_mean([v for summary in kept for v in summary.values()])
    if "qa_forget" in out and retained:
        ratios = ([r["R"] for r in some["qa_forget"]] for some in (records, retained["records"]))
        out["forget_quality"] = ks_test(*ratios)[1]
    return out


# ---- input-space attack -----------------------------------------------------------------------------------

METHODS = {            # weights of prefix_terms; shares of swap, delete, insert, sample; how many are kept
    "gcg+": {"weights": [1.0, 1.0, 10.0, 1.5, 3.0], "moves": [0.7, 0.1, 0.1, 0.1], "buffer": 16},
    "gcg": {"weights": [1.0, 0.0, 0.0, 0.0, 0.0], "moves": [1.0, 0.0, 0.0, 0.0], "buffer": 1},
    "random": {"weights": [1.0, 0.0, 0.0, 0.0, 0.0], "moves": [0.0, 0.0, 0.0, 0.0], "buffer": 1}}
# More shapes: C candidates, H tokens of BOS (0 or 1), P of the prefix, Q questions, T their tokens, D width.


def prefix_rows(rows, prompt, prefix):
    """Questions asked as prefix + " " + the prompt; what comes back goes with the template "{question}"."""
    return [{**row, "question": f"{prefix} {start}", "choices": [c.strip() for c in choices]}
            for row in rows for start, choices in [ask(row, prompt)]]


@torch.no_grad()
def prefix_task(teacher, tokenizer, rows, prompt, answer):
    """What a prefix is to bring back: {"head": H ids, "ids", "labels", "mask": (Q, T), "layer", "clean"}.

    ids: a question as it is tokenised after a word, then up to `answer` tokens of the teacher's own greedy
    answer; only these have labels. clean: the teacher's states (Q, T, D) at 62% depth without a prefix.
    """
    word, samples, pad = tokenizer("a").input_ids, [], tokenizer.pad_token_id or 0
    head = word[:len(word) - len(tokenizer("a", add_special_tokens=False).input_ids)]
    for row in rows:
        ids = tokenizer("a " + ask(row, prompt)[0]).input_ids[len(word):]
        x = torch.tensor([head + ids], device=teacher.device)
        said = teacher.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=answer, do_sample=False,
                                pad_token_id=pad)[0, x.shape[1]:].tolist()
        said = said[:said.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in said else said
        samples.append((ids + said, [IGNORE] * len(ids) + said))
    batch = collate(samples, pad, teacher.device)
    task = {"head": head, "ids": batch["input_ids"], "labels": batch["labels"],
            "mask": batch["attention_mask"].bool(), "layer": round(0.62 * teacher.config.num_hidden_layers)}
    nothing = torch.zeros(1, 0, len(teacher.get_input_embeddings().weight), device=teacher.device)
    return task | {"clean": run_prefix(teacher, nothing, task)[1][0]}


def run_prefix(model, onehot, task):
    """(logits (C, Q, H+P+T, V), states (C, Q, T, D) of the questions at task["layer"]) with onehot (C, P, V)
    before every question. Questions are padded on the right, which causal attention never sees."""
    embed, (Q, T), C = model.get_input_embeddings(), task["ids"].shape, len(onehot)
    head = embed(torch.tensor(task["head"], dtype=torch.long, device=model.device))                  # (H, D)
    prefix = onehot.to(embed.weight.dtype) @ embed.weight                                         # (C, P, D)
    x = torch.cat([head.expand(C, Q, -1, -1), prefix[:, None].expand(-1, Q, -1, -1),
                   embed(task["ids"]).expand(C, -1, -1, -1)], 2)                          # (C, Q, H+P+T, D)
    out = model(inputs_embeds=x.flatten(0, 1), output_hidden_states=True, use_cache=False)
    return out.logits.unflatten(0, (C, Q)), out.hidden_states[task["layer"]][:, -T:].unflatten(0, (C, Q))


def prefix_terms(victim, teacher, onehot, task):
    """(C, 5) terms of the attack's loss for prefixes onehot (C, P, V), each to be weighted and added:

    mean cross-entropy of the teacher's answers; L2 distance of the victim's states to the teacher's on the
    same input (0 if teacher is None); 1 - cosine to the teacher's states on the clean input, both a mean over
    the tokens of questions and answers; the prefix's own cross-entropy; sum of max(count - 1, 0)^1.5 / P.
    """
    (C, P, _), T, H = onehot.shape, task["ids"].shape[1], len(task["head"])
    logits, states = run_prefix(victim, onehot, task)
    logits, states = logits.to(accumulator(logits.dtype)), states.to(accumulator(states.dtype))
    same = run_prefix(teacher, onehot, task)[1] if teacher else states
    mean = lambda x: (x * task["mask"]).sum((1, 2)) / task["mask"].sum()                  # (C, Q, T) -> (C,)
    labels = task["labels"].expand(C, -1, -1).flatten()
    nll = F.cross_entropy(logits[:, :, -T - 1:-1].flatten(0, 2), labels, reduction="none")
    said = logits[:, 0, max(H - 1, 0):H + P - 1].log_softmax(-1)      # without BOS nothing predicts the first
    return torch.stack([nll.view(C, -1).sum(1) / (task["labels"] != IGNORE).sum(),
                        mean((states - same).norm(dim=-1)),
                        mean(1 - F.cosine_similarity(states, task["clean"].to(states.dtype), dim=-1)),
                        -(onehot[:, P - said.shape[1]:] * said).sum(-1).mean(1),
                        (onehot.sum(1) - 1).clamp_min(0).pow(1.5).sum(1) / P], 1)


def mutate(ids, move, scores, count, topk, rng):
    """`count` prefixes, each one change away from ids. scores: for swap (P, V), minus the gradient: the token
    is any of the topk; for insert and sample (P+1, V), the model's logits: it is drawn from the topk.
    """
    top, out = scores.topk(topk) if move != "delete" else None, []
    for _ in range(count):
        i, new = rng.randrange(len(ids) + (move == "insert")), []
        if move != "delete":
            weights = None if move == "swap" else top.values[i].softmax(-1).tolist()
            new = rng.choices(top.indices[i].tolist(), weights)
        out.append(ids[:i] + new + ids[i + (move != "insert"):])
    return out


def attack_prefix(run, done, args):
    """Search one prefix after which the victim, the model in `run`, answers as the teacher, the model before
    unlearning, does without (enhanced GCG, arXiv 2409.18025). Returns {"UE", "UE_heldout": on questions that
    the search did not use, "UE_teacher": of the teacher after the same prefix, "prefix", ...}.

    A model call is one pass of one model over the Q questions with one prefix; a gradient counts as three.
    RUN/attack_METHOD.json holds result and state: an interrupted search goes on, and ends as if it never was.
    """
    start, run, path = time.time(), Path(run), Path(run) / f"attack_{args.attack_method}.json"
    how = {k: getattr(args, f"attack_{k}") or v for k, v in METHODS[args.attack_method].items()}
    settings = {"run": str(run), "data": args.data or done["args"]["data"],
                "teacher": args.teacher or done["args"].get("model"),
                **{k: v for k, v in vars(args).items() if k.startswith("attack_")},
                **{f"attack_{k}": v for k, v in how.items()}}
    if settings["teacher"] is None:
        raise InputError(f"{run}: --attack needs the model before unlearning: name it with --teacher")
    state = {"calls": 0, "iteration": 0, "best": [], "curve": []}               # best: [[loss, terms, ids]]
    if path.is_file() and not args.overwrite:
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["args"] != settings:
            raise InputError(f"{path} holds a search with other flags: --overwrite starts a new one")
        state = old["state"]
        if state["calls"] >= args.attack_calls:
            return old["metrics"]

    # -- models, the questions searched on, and the room that the context leaves
    questions, dtype = load_questions(settings["data"]), done["args"].get("param_dtype", "float32")
    rows, prompt = questions.get("mcq_forget"), questions["prompt"]
    if not rows:
        raise InputError(f"{settings['data']} has no mcq_forget.jsonl: --attack prefix asks its questions")
    victim, tokenizer = load_model(run, args.device, getattr(torch, dtype))
    teacher, _ = load_model(settings["teacher"], args.device, getattr(torch, dtype))
    victim.requires_grad_(False), teacher.requires_grad_(False)
    picks = random.Random(args.attack_seed).sample(range(len(rows)), min(args.attack_questions, len(rows)))
    bare = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    asked = [ask(row, prompt) for row in rows]
    longest = max(len(bare(choice)) for _, choices in asked for choice in choices)
    answer = min(args.attack_answer, longest) if prompt else args.attack_answer     # choices are the answers
    task = prefix_task(teacher, tokenizer, [rows[i] for i in sorted(picks)], prompt, answer)
    head, device = task["head"], victim.device
    tails = [bare("a " + start)[len(bare("a")):] for start, _ in asked]
    used = len(head) + max(map(len, tails)) + max(answer, longest)
    low, high = (min(n, (context_of(victim) or math.inf) - used) for n in args.attack_length)
    if low < 1:
        raise InputError(f"{run}: the context of {context_of(victim)} tokens leaves no room for a prefix")
    high = high if how["moves"][2] else low                            # without insertion the length is fixed

    # -- tokens: special ones are banned, and a prefix must be what its own text is read as
    V = len(victim.get_input_embeddings().weight)
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    special |= {*tokenizer.all_special_ids}
    allowed = [i for i in range(min(V, len(tokenizer))) if i not in special]
    banned = torch.full((V,), -math.inf, device=device)
    banned[allowed] = 0.0
    text = lambda ids: tokenizer.decode(ids).strip()
    survives = lambda ids: tokenizer(f"{text(ids)} {asked[0][0]}").input_ids == head + ids + tails[0]
    onehot = lambda prefixes: F.one_hot(torch.tensor(prefixes, device=device), V).float()         # (C, P, V)
    right = lambda model, ids: correct(model, tokenizer, prefix_rows(rows, prompt, text(ids)), "{question}")

    def fresh(rng):
        for _ in range(100):
            ids = bare(text(rng.choices(allowed, k=low)))[:low]
            if len(ids) == low and survives(ids):
                return ids
        raise InputError(f"{run}: of 100 random prefixes none survives decoding and encoding again")

    # -- the search
    weights, best = torch.tensor(how["weights"], device=device), state["best"]
    other = teacher if weights[1] else None
    each, every = 1 + bool(other), max(1, args.attack_calls // 20)           # calls between points and saves
    bar = tqdm(total=args.attack_calls, initial=state["calls"], desc=args.attack_method, unit="call")
    while state["calls"] < args.attack_calls:
        rng, before = random.Random(f"{args.attack_seed} {state['iteration']}"), state["calls"]
        shortest = low + (high - low) * before // args.attack_calls
        if not best or args.attack_method == "random":
            new = [fresh(rng) for _ in range(args.attack_candidates)]
        else:
            ids, scores = rng.choice(best)[2], None
            move = rng.choices(("swap", "delete", "insert", "sample"), how["moves"])[0]
            if (move, len(ids)) in (("delete", shortest), ("insert", high)):
                move = "swap"
            move = "insert" if len(ids) < shortest else move
            if move == "swap":
                x = onehot([ids]).requires_grad_()
                loss = (prefix_terms(victim, other, x, task) @ weights).sum()
                scores = banned - torch.autograd.grad(loss, x)[0][0]                                 # (P, V)
                state["calls"] += 3 * each
            elif move != "delete":
                with torch.no_grad():
                    scores = victim(torch.tensor([head + ids], device=device)).logits[0]
                scores = banned + F.pad(scores, (0, 0, 1, 0))[len(head):]    # (P+1, V): row i is for token i
                state["calls"] += 1
            new = mutate(ids, move, scores, args.attack_candidates, min(args.attack_topk, len(allowed)), rng)
        known = [b[2] for b in best]
        new = [c for i, c in enumerate(new) if c not in known + new[:i] and survives(c)]
        if new:
            with torch.no_grad():
                terms = prefix_terms(victim, other, onehot(new), task)
            best += map(list, zip((terms @ weights).tolist(), terms.tolist(), new))
            best.sort(key=lambda b: (len(b[2]) < shortest, b[0]))
            del best[how["buffer"]:]
        state["calls"] += max(1, each * len(new))                           # at least 1: the search must end
        state["iteration"] += 1
        bar.update(state["calls"] - before)
        ended = state["calls"] >= args.attack_calls
        if ended or state["calls"] // every > before // every:
            loss, terms, ids = best[0]
            hit = right(victim, ids).double()                                                          # (N,)
            metrics = {"UE": 1 - hit.mean().item(), "loss": loss, "terms": terms, "answer": answer,
                       "calls": state["calls"], "length": [low, high], "prefix": text(ids)}
            if ended:
                held = [i for i in range(len(rows)) if i not in picks]
                metrics |= {"UE_heldout": 1 - hit[held].mean().item() if held else None,
                            "UE_teacher": 1 - right(teacher, ids).double().mean().item()}
            state["curve"].append({k: metrics[k] for k in ("calls", "loss", "UE")} | {"tokens": len(ids)})
            bar.set_postfix(loss=f"{loss:.3f}", UE=f"{metrics['UE']:.3f}", tokens=len(ids))
            write_json(path, {"stage": "attack", "args": settings, **provenance(args.device, start),
                              "metrics": metrics, "state": state})
    bar.close()
    return metrics


# ---- sharpness --------------------------------------------------------------------------------------------

def forget_objective(model, tokenizer, run, done, args, first=None):
    """A closure that gives the forget loss (0-dim, with graph) on a fixed batch: args.sharpness_rows rows of
    forget.jsonl, evenly spaced. own: the loss that the run descended; nll: what a relearning attack descends.
    first: the first row of two batches without a common row, 0 or 1 (None: of a single batch).
    """
    from unlearn import forget_loss, sample_logps                             # here: it imports this file
    ran, ref = done["args"], None
    rows = read_jsonl(Path(args.data or ran["data"]) / "forget.jsonl", text_row)
    apart = math.ceil(len(rows) / args.sharpness_rows)
    rows = rows[::apart] if first is None else rows[first::max(2, apart)]
    samples = encode_rows(tokenizer, rows, context_of(model), ran.get("max_len", 0))
    batch = collate(samples, tokenizer.pad_token_id or 0, model.device)
    if args.sharpness == "nll":
        return lambda: -token_logps(model, batch)[0].sum() / (batch["labels"][:, 1:] != IGNORE).sum()
    if ran.get("loss") not in ("npo", "simnpo", "ga", "graddiff"):
        raise InputError(f"{run}: the loss that a run descended can be measured for npo, simnpo, ga and "
                         f"graddiff, not {ran.get('loss', 'a model that nothing was unlearned from')}: "
                         "evaluate.py has --sharpness nll, for relearn.py drop --geometry")
    if ran["loss"] == "npo":
        with torch.no_grad():
            ref = sample_logps(load_model(args.teacher or ran["model"], args.device)[0], batch, ran["reduce"])
    return lambda: forget_loss(ran["loss"], sample_logps(model, batch, ran["reduce"]), ref, ran["beta"],
                               ran["margin"]).mean()


def hessian(loss, params):
    """(gradient (n,), function v (n,) -> H v (n,)) of a loss with graph, by double backward; n weights."""
    flat = lambda tensors: torch.cat([t.reshape(-1) for t in tensors])
    gradient = flat(torch.autograd.grad(loss, params, create_graph=True))
    return gradient.detach(), lambda v: flat(torch.autograd.grad(gradient, params, v, retain_graph=True,
                                                                 materialize_grads=True))


def top_eigenvalue(product, start, steps, tol=1e-3):
    """(largest eigenvalue, ||H v - eigenvalue v||) by power iteration from start (n,), at most `steps` steps.

    That finds the eigenvalue of largest magnitude. When it is negative, a second run on H - eigenvalue/2 I,
    where the largest one dominates, finds that.
    """
    def power(shift):
        v = start / start.norm()
        for _ in range(steps):
            w = product(v) - shift * v
            value = (v @ w).item()
            residual = (w - value * v).norm().item()
            if residual <= tol * abs(value + shift):
                break
            v = w / w.norm()
        return value + shift, residual
    first = power(0.0)
    return first if first[0] >= 0 else power(first[0] / 2)


def sharpness(model, loss, rho, steps, probes, seed=0):
    """{"loss", "gradient": norm, "top": largest eigenvalue of the Hessian, "residual", "trace", "trace_se":
    Hutchinson's estimate with `probes` random signs, "rise": loss(theta + rho g/||g||) - loss(theta)}."""
    params = trainable(model.parameters())
    rng = torch.Generator(params[0].device).manual_seed(seed)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):   # the others differentiate once
        value = loss()
        gradient, product = hessian(value, params)
        draw = lambda: torch.randn(len(gradient), generator=rng, device=gradient.device, dtype=gradient.dtype)
        top, residual = top_eigenvalue(product, draw(), steps)
        trace, error = mean_se([(z @ product(z)).item() for z in (draw().sign() for _ in range(probes))])
        pieces = gradient.split([p.numel() for p in params])
        with torch.no_grad(), SAM(params, rho).perturbed({p: g.view_as(p) for p, g in zip(params, pieces)}):
            rise = loss().item() - value.item()
    return {"loss": value.item(), "gradient": gradient.norm().item(), "top": top, "residual": residual,
            "trace": trace, "trace_se": error, "rise": rise}


# ---- statistics -------------------------------------------------------------------------------------------

def mean_se(values):
    """(mean, standard error of the mean); the error is None for a single value."""
    v = np.asarray(values, dtype=float)
    return float(v.mean()), float(v.std(ddof=1) / math.sqrt(len(v))) if len(v) > 1 else None


def student_p(t, k):
    """Two-sided p of Student's t with k degrees of freedom.

    With t = sqrt(k) tan(a) the density goes as cos(a)^(k-1): p is a ratio of two integrals.
    """
    area = lambda a: np.trapezoid(np.cos(np.linspace(a, math.pi / 2, 20001)) ** (k - 1), dx=math.pi / 2 - a)
    return float(area(math.atan(abs(t) / math.sqrt(k))) / area(0.0))


def t_test(differences):
    """(t, two-sided p) that the mean of n >= 2 paired differences is 0 (Student); None without any spread."""
    mean, se = mean_se(differences)
    return (mean / se, student_p(mean / se, len(differences) - 1)) if se else (None, None)


def holm(ps):
    """p-values corrected for their number by Holm's step-down rule, in the order given; None stays None."""
    order, worst, out = [i for i, p in enumerate(ps) if p is not None], 0.0, [None] * len(ps)
    order.sort(key=lambda i: ps[i])
    for rank, i in enumerate(order):
        worst = out[i] = max(worst, min(1.0, (len(order) - rank) * ps[i]))
    return out


def correct_for_methods(paired):
    """Add "p_holm" to each {method: compare()}: a column is a family of as many tests as it has methods."""
    for key in {key for by in paired.values() for key in by}:
        tests = [by[key] for by in paired.values() if key in by]
        for test, p in zip(tests, holm([test["p"] for test in tests])):
            test["p_holm"] = p


def spearman(x, y):
    """(rank correlation, two-sided p) of n >= 3 pairs; ties get their mean rank. None where one is constant.

    p counts all n! orders up to n = 8 and takes t = rho sqrt((n-2) / (1-rho^2)) as Student's t beyond.
    """
    ranks = [np.array([((v < a).sum() + (v <= a).sum() + 1) / 2 for a in v]) for v in map(np.asarray, (x, y))]
    a, b = (r - r.mean() for r in ranks)
    n, size = len(a), math.sqrt((a @ a) * (b @ b))
    if not size:
        return None, None
    rho = float(a @ b) / size
    if n <= 8:
        orders = np.array(list(itertools.permutations(b))) @ a / size                                 # (n!,)
        return rho, float((abs(orders) >= abs(rho) - 1e-9).mean())
    return rho, student_p(rho * math.sqrt((n - 2) / max(1 - rho * rho, 1e-300)), n - 2)


# ---- runs and tables --------------------------------------------------------------------------------------

def load_result(run):
    """RUN/result.json of unlearn.py or data/tiny/prepare.py; an equivalent for a plain Hugging Face one."""
    path = Path(run) / "result.json"
    if not path.is_file() and (Path(run) / "config.json").is_file():
        return {"stage": "model", "args": {"model": str(run), "data": None, "seed": 0}}
    if not path.is_file():
        raise InputError(f"{path} is missing: {run} is not a run folder of unlearn.py")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise InputError(f"{path}:{e.lineno}: not JSON ({e}): run unlearn.py again")


def method(result):
    """(short name, settings: its args but seed and paths) of a run; runs that agree in both are averaged."""
    args = result["args"]
    if result["stage"] == "model":
        return Path(args["model"]).name, json.dumps({"model": args["model"]})
    if result["stage"] == "prepare":
        name = "retrained" if args["exclude"] == "forget" else "target"
    else:
        name = args["loss"] + ("" if args["smooth"] == "none" else f"+{args['smooth']}")
        name += "".join(f" {args[k]}" for k, usual in (("sam_direction", "gradient"), ("sam_norm", "l2"))
                        if args.get(k, usual) != usual) + " flipped" * args["sam_flip"]
        args = {"sam_norm": "l2", "sam_direction": "gradient", "lookahead_steps": 1} | args   # of older runs
        if "sam" not in args["smooth"]:
            args = {k: v for k, v in args.items() if not k.startswith(("sam_", "lookahead_"))}
    skip = ("seed", "out", "data", "model", "overwrite", "relearn", "device", "eval_every")
    return name, json.dumps({k: v for k, v in args.items() if k not in skip}, sort_keys=True)


def budget_name(b):
    """A budget of relearn.py in a word: 20 samples, 20x3 with the epochs, 4bit, prune30 (percent)."""
    if b["samples"]:
        return f"{b['samples']}" + (f"x{b['epochs']}" if b["epochs"] > 1 else "")
    return f"{b['quantize']}bit" if "quantize" in b else f"prune{b['prune']:g}"


def columns(run, metrics):
    """One run as {column: number}: its scores, those of every relearn*.json that is there, prefix attacks,
    sharpness. A column with a space goes into the table that its first words name."""
    row = {"UE": metrics["UE"], "UT": metrics["UT"],
           **{k: v for k, v in metrics.items() if isinstance(v, float)},
           **{f"qa_forget_{k}": v for k, v in metrics.get("qa_forget", {}).items()}}
    for path in sorted(Path(run).glob("relearn*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        budgets, attack = result["metrics"]["budgets"], result["args"].get("attack", "")
        for b in budgets:
            tag = f"{attack} " * bool(attack) + budget_name(b)
            tag += f"@{b['lr']:g}" if b.get("lr") != budgets[0].get("lr") else ""
            row |= {f"UE {tag}": b["UE"], f"held out {tag}": b["UE_heldout"], f"UT {tag}": b["UT"]}
    for name, m in metrics.get("attack", {}).items():
        row |= {f"UE prefix {name}": m["UE"], f"held out prefix {name}": m["UE_heldout"],
                f"teacher's UE prefix {name}": m["UE_teacher"]}
    for kind, m in metrics.get("sharpness", {}).items():
        row |= {f"sharpness ({kind}) {k}": m[k] for k in ("top", "trace", "rise")}
    return {k: v for k, v in row.items() if v is not None}


def score(run, args):
    """(result.json, metrics) of one run folder; writes its evaluate.json, or reads it when up to date."""
    start, run = time.time(), Path(run)
    done, path = load_result(run), run / "evaluate.json"
    settings = {"run": str(run), "data": args.data or done["args"]["data"], "ppl_rows": args.ppl_rows,
                "max_len": done["args"].get("max_len", 0), "limit": args.limit, "bos": args.bos,
                "retain_run": args.retain_run, "device": args.device,
                "param_dtype": args.param_dtype or done["args"].get("param_dtype", "float32")}
    if settings["data"] is None:
        raise InputError(f"{run} is a plain model and names no data: add --data FOLDER")
    retained = None
    if args.retain_run:                               # scored on the same questions, unless it was already
        more = {"retain_run": None, "data": settings["data"], "records": True, "overwrite": False}
        score(args.retain_run, argparse.Namespace(**vars(args) | more))
        retained = json.loads((Path(args.retain_run) / "evaluate.json").read_text(encoding="utf-8"))
    newer = path.is_file() and path.stat().st_mtime >= (run / "config.json").stat().st_mtime
    if newer and not args.overwrite:
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["args"] == settings and (not args.records or "records" in old):
            return done, old["metrics"]
    questions, data, batch = load_questions(settings["data"]), Path(settings["data"]), args.batch_size
    prompt = questions.pop("prompt")
    model, tokenizer = load_model(run, args.device, getattr(torch, settings["param_dtype"]))
    if args.bos == "none":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    metrics, records, thin = {"UE": None, "UT": None}, {}, lambda rows: spaced(rows, args.limit)
    for name, rows in questions.items():
        rows = thin(rows)
        logps = choice_logps(model, tokenizer, rows, prompt, batch)
        records[name] = [{"where": r["where"], "answer": r["answer"], "choice": c, "logps": l}
                         for r, c, l in zip(rows, logps.argmax(1).tolist(), logps.tolist())]
        accuracy = sum(r["choice"] == r["answer"] for r in records[name]) / len(rows)
        metrics |= {"UE": 1 - accuracy} if name == "mcq_forget" else {
            "UT" if name == "mcq_retain" else name: accuracy}
        if prompt and name in ("mcq_forget", "mcq_retain"):
            metrics[name.replace("mcq", "open")] = open_accuracy(model, tokenizer, rows, prompt, batch)
    for part in ("forget", "retain"):
        if (data / f"{part}.jsonl").is_file():
            rows = thin(spaced(read_jsonl(data / f"{part}.jsonl", text_row), args.ppl_rows))
            scores, records[part] = corpus_scores(model, tokenizer, rows, settings["max_len"], batch)
            metrics |= {f"{k}_{part}": v for k, v in scores.items()}
    metrics |= published_metrics(model, tokenizer, data, batch, thin, records, retained)
    bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    metrics |= {"template": prompt or LETTERS, "bos": bos}
    result = {"stage": "evaluate", "args": settings, **provenance(args.device, start), "metrics": metrics,
              **({"records": records} if args.records else {})}
    write_json(path, result)
    barrier()                                         # before another process looks for the file
    return done, metrics


def extras(run, done, metrics, args):
    """metrics and what --attack and --sharpness find, or found before; RUN/evaluate.json keeps it too."""
    run, found = Path(run), {"attack": {}, "sharpness": dict(metrics.get("sharpness", {}))}
    if (args.attack or args.sharpness) and processes()[1] > 1:
        raise InputError("--attack and --sharpness need the whole model in one process: run without torchrun")
    if args.attack:
        attack_prefix(run, done, args)
    for path in sorted(run.glob("attack_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["metrics"]["calls"] >= result["args"]["attack_calls"]:                # the search has ended
            found["attack"][path.stem.removeprefix("attack_")] = result["metrics"]
    settings = {k: v for k, v in vars(args).items() if k.startswith("sharpness_")}
    if args.sharpness and (args.overwrite or
                           found["sharpness"].get(args.sharpness, {}).get("args") != settings):
        model, tokenizer = load_model(run, args.device)              # fp32: a Hessian in bf16 is mostly noise
        loss = forget_objective(model, tokenizer, run, done, args)
        found["sharpness"][args.sharpness] = {"args": settings, **sharpness(
            model, loss, args.sharpness_rho, args.sharpness_steps, args.sharpness_probes)}
    found = {k: v for k, v in found.items() if v}
    if found != {k: metrics[k] for k in ("attack", "sharpness") if k in metrics}:
        result = json.loads((run / "evaluate.json").read_text(encoding="utf-8"))
        write_json(run / "evaluate.json", result | {"metrics": result["metrics"] | found})
    return metrics | found


def table(rows):
    """Text of rows of cells; the first column to the left, the others to the right."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join([r[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(r[1:], widths[1:])])
                     for r in rows)


def cell(mean, se):
    """'.521 ±.030', or 'mean' alone for one run; a perplexity in the thousands in powers of ten."""
    digits = lambda v: f"{v:.3f}" if abs(v) < 1000 else f"{v:.1e}"
    return digits(mean) + ("" if se is None else f" ±{digits(se)}")


def compare(group, base, keys):
    """{column: {"mean", "t", "p", "n", "higher", "d"}} of group - base, both {seed: {column: number}}, by
    seed; d is Cohen's effect size for pairs, the mean difference over its standard deviation."""
    out = {}
    for key in keys:
        seeds = [s for s in sorted(group) if key in group[s] and key in base.get(s, {})]
        d = [group[s][key] - base[s][key] for s in seeds]
        if len(d) > 1:
            t, p = t_test(d)
            out[key] = {"mean": mean_se(d)[0], "t": t, "p": p, "n": len(d), "higher": sum(x > 0 for x in d),
                        "d": None if t is None else t / math.sqrt(len(d))}
    return out


def flat_and_robust(groups, methods):
    """[(sharpness column, UE column, "methods" or "runs", n, rho, p)]: over the means of methods, and over
    all runs, where p is too small, since runs of one method are not independent."""
    runs, out = [row for group in groups.values() for row in group.values()], []
    for over, rows in (("methods", [m["mean"] for m in methods.values()]), ("runs", runs)):
        keys = list(dict.fromkeys(k for row in rows for k in row))
        for flat, ue in itertools.product([k for k in keys if k.startswith("sharp")],
                                          [k for k in keys if k.startswith("UE ")]):
            both = [(row[flat], row[ue]) for row in rows if flat in row and ue in row]
            rho, p = spearman(*zip(*both)) if len(both) > 2 else (None, None)
            if rho is not None:
                out.append((flat, ue, over, len(both), rho, p))
    return out


# ---- pictures ---------------------------------------------------------------------------------------------

INK = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"),
       ("#E69F00", "v", "-"), ("#56B4E9", "P", "--"), ("#000000", "X", "-.")]      # Okabe and Ito's palette


def filter_directions(params, seed):
    """Two random directions, each filter (row of a matrix) scaled to the norm of that filter in theta; biases
    and norms, which have one dimension, stay (Li et al., arXiv 1712.09913). [[tensor like p], [...]]"""
    rng, out = torch.Generator().manual_seed(seed), []
    for _ in range(2):
        draws = [torch.randn(p.shape, generator=rng).to(p) for p in params]
        out.append([d * (p.flatten(1).norm(dim=1) / d.flatten(1).norm(dim=1)).view(-1, *[1] * (p.dim() - 1))
                    if p.dim() > 1 else torch.zeros_like(p) for d, p in zip(draws, params)])
    return out


@torch.no_grad()
def landscape(model, loss, points, seed=0, reach=0.05):
    """(points, points) array of loss(theta + a d1 + b d2), a down the rows and b along them, both from -reach
    to reach, with d1 and d2 of filter_directions(). Puts the weights back, bit for bit."""
    params, steps = trainable(model.parameters()), np.linspace(-reach, reach, points)
    saved, (d1, d2) = [(p, p.detach().clone()) for p in params], filter_directions(params, seed)
    try:
        out = np.zeros((points, points))
        for (i, a), (j, b) in itertools.product(enumerate(steps), enumerate(steps)):
            for (p, old), x, y in zip(saved, d1, d2):
                p.copy_(old + a * x + b * y)
            out[i, j] = loss().item()
        return out
    finally:
        restore_(saved)


def relearn_curve(runs):
    """(samples seen, mean UE, standard error or None) of the largest budget in the relearn.json of runs, over
    runs, or over the seeds of a single one; None where relearn.py ran without --curve_every."""
    found = []
    for run in runs:
        result = json.loads((Path(run) / "relearn.json").read_text(encoding="utf-8"))
        budgets = [b for b in result["metrics"]["budgets"] if "curves" in b]
        if not budgets:
            return None
        b = max(budgets, key=lambda b: b["samples"] * b["epochs"])
        found.append([[point["UE"] for point in curve] for curve in b["curves"]])
    batch, most = result["args"]["batch_size"], b["samples"] * b["epochs"]
    seen = [min(point["step"] * batch, most) for point in b["curves"][0]]
    stats = [mean_se(v) for v in zip(*(np.mean(f, axis=0) for f in found) if len(found) > 1 else found[0])]
    return seen, [m for m, _ in stats], [e or 0 for _, e in stats]


def pictures(folder, methods, runs, args):
    """Write ue_bars.png, relearn_curves.png, landscape.png and ue_ut.png into folder; needs matplotlib.

    methods: "methods" of the table, {name: {"rows": {seed: {column: number}}, "mean", "se"}}; runs: {name:
    [run folders]}, the first of which gives the landscape. A picture without data is named and left out.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "savefig.dpi": 200, "savefig.bbox": "tight", "legend.frameon": False})
    folder, ink, UE = Path(folder), dict(zip(methods, itertools.cycle(INK))), "UE (1 − forget accuracy)"
    folder.mkdir(parents=True, exist_ok=True)

    def save(name, figure):
        tmp = folder / f"{name}.tmp{os.getpid()}"
        figure.savefig(tmp, format="png")
        tmp.replace(folder / name)
        plt.close(figure)
        print(f"wrote {folder / name}")

    def chance(ax):
        ax.axhline(0.75, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)))
        ax.text(1.01, 0.75, "chance", color="0.4", size=8, va="center", transform=ax.get_yaxis_transform())

    # -- (a) UE after unlearning and after each relearning budget
    keys = [k for m in methods.values() for k in m["mean"] if re.fullmatch(r"UE( \d+)?", k)]
    keys = list(dict.fromkeys(keys))
    figure, ax = plt.subplots(figsize=(max(3.4, 1.1 * len(methods)), 2.6))
    for i, key in enumerate(keys):
        x = np.arange(len(methods)) + (i - (len(keys) - 1) / 2) * 0.8 / len(keys)
        ax.bar(x, [m["mean"].get(key, math.nan) for m in methods.values()], 0.8 / len(keys),
               yerr=[m["se"].get(key) or math.nan for m in methods.values()], capsize=2, edgecolor="black",
               linewidth=0.5, error_kw={"linewidth": 0.8},
               color=plt.get_cmap("Blues")(0.9 - 0.85 * i / max(1, len(keys) - 1)),
               label=f"relearned on {key[3:]} samples" if " " in key else "unlearned")
    chance(ax)
    ax.set(xticks=range(len(methods)), xticklabels=methods, ylim=(0, 1), ylabel=UE)
    ax.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    save("ue_bars.png", figure)

    # -- (b) UE along the largest relearning budget
    curves = {name: relearn_curve(runs[name]) for name in methods}
    if all(curves.values()):
        figure, ax = plt.subplots(figsize=(4.2, 2.8))
        for name, (seen, mean, error) in curves.items():
            color, marker, line = ink[name]
            low, high = np.subtract(mean, error), np.add(mean, error)
            ax.fill_between(seen, low, high, color=color, alpha=0.15, linewidth=0)
            ax.plot(seen, mean, line, color=color, marker=marker, markersize=4, linewidth=1.2, label=name)
        chance(ax)
        ax.set(xlabel="forget samples relearned", ylabel=UE, ylim=(0, 1))
        ax.legend(loc="upper left", bbox_to_anchor=(1.15, 1))
        save("relearn_curves.png", figure)
    else:
        print("relearn_curves.png left out: run relearn.py --curve_every 1 on every run", file=sys.stderr)

    # -- (c) how the forget loss changes around the weights: surface and contours, one scale for all
    grids = {}
    for name in methods:
        model, tokenizer = load_model(runs[name][0], args.device)
        loss = forget_objective(model, tokenizer, runs[name][0], load_result(runs[name][0]), args)
        grids[name] = landscape(model, loss, args.plot_points) - loss().item()
    low, high = min(z.min() for z in grids.values()), max(z.max() for z in grids.values())
    levels = matplotlib.ticker.MaxNLocator(14).tick_values(low, high)
    at, ticks, n = np.linspace(-0.05, 0.05, args.plot_points), [-0.05, 0, 0.05], len(grids)
    width = 1.7 * n + 1.8                                                                       # inches
    figure = plt.figure(figsize=(width, 3.6))
    figure.subplots_adjust(left=0.9 / width, right=1 - 0.9 / width, wspace=0.3, hspace=0.1)
    for i, (name, z) in enumerate(grids.items()):
        ax = figure.add_subplot(2, n, i + 1, projection="3d")
        ax.plot_surface(*np.meshgrid(at, at, indexing="ij"), z, vmin=levels[0], vmax=levels[-1], rstride=1,
                        cstride=1, cmap="cividis", linewidth=0.1, edgecolor="0.3")
        ax.set(zlim=(levels[0], levels[-1]), xticks=ticks, yticks=ticks, xticklabels=[], yticklabels=[])
        ax.set_box_aspect((1, 1, 0.8), zoom=1.1)
        ax.locator_params("z", nbins=4)
        ax.tick_params(labelsize=7, pad=0)
        ax.set_title(name, y=1)
        ax = figure.add_subplot(2, n, n + i + 1)
        shade = ax.contourf(at, at, z.T, levels, cmap="cividis")
        ax.contour(at, at, z.T, levels, colors="white", linewidths=0.4, linestyles="-")
        ax.plot(0, 0, "+", color="white")
        ax.set(aspect="equal", xticks=ticks, yticks=ticks, xlabel="direction 1")
        ax.tick_params(labelsize=7, labelleft=i == 0)
        if i == 0:
            ax.set_ylabel("direction 2\n(share of filter norm)")
    box = ax.get_position()
    figure.colorbar(shade, cax=figure.add_axes([box.x1 + 0.1 / width, box.y0, 0.1 / width, box.height]),
                    label="change of the\nforget loss (nats)", ticks=levels[::4])
    save("landscape.png", figure)

    # -- (d) forgetting against utility, one point a seed and the mean
    figure, ax = plt.subplots(figsize=(3.4, 2.8))
    for name, m in methods.items():
        color, marker, _ = ink[name]
        ax.scatter([r["UT"] for r in m["rows"].values()], [r["UE"] for r in m["rows"].values()], s=14,
                   color=color, marker=marker, alpha=0.4, linewidths=0)
        ax.errorbar(m["mean"]["UT"], m["mean"]["UE"], xerr=m["se"]["UT"], yerr=m["se"]["UE"], color=color,
                    marker=marker, markersize=7, capsize=2, linewidth=0.8, markeredgecolor="black",
                    markeredgewidth=0.5, linestyle="none", label=name)
    chance(ax)
    ax.set(xlabel="UT (accuracy on the rest)", ylabel=UE)
    ax.locator_params(nbins=5)
    ax.margins(0.15)
    ax.legend(loc="upper left", bbox_to_anchor=(1.12, 1))
    save("ue_ut.png", figure)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+",
                        help="folders of unlearn.py, or of any Hugging Face model (then add --data)")
    parser.add_argument("--baseline", default=None,
                        help="method to compare with, by seed (default: the first)")
    parser.add_argument("--data", default=None, help="data folder (default: each run's own)")
    parser.add_argument("--ppl_rows", type=number(int, 1), default=1024,
                        help="most rows of a corpus for perplexity")
    some, real = number(int, 1), number(float, 0, above=True)
    parser.add_argument("--attack", choices=["prefix"], default=None,
                        help="search one prefix that brings forget questions back")
    parser.add_argument("--attack_method", choices=list(METHODS), default="gcg+",
                        help="gcg: cross-entropy and swaps only; random: the best of random prefixes")
    parser.add_argument("--attack_calls", type=some, default=4000, help="model calls, the budget")
    parser.add_argument("--attack_questions", type=some, default=8, help="forget questions searched on")
    parser.add_argument("--attack_length", type=some, nargs=2, default=[32, 100], metavar=("MIN", "MAX"),
                        help="tokens; the minimum grows from MIN to MAX, both cut to the context's room")
    parser.add_argument("--attack_weights", type=number(float, 0), nargs=5, default=None,
                        metavar=("CE", "L2", "COSINE", "FLUENCY", "REPEAT"), help="(default: the method's)")
    parser.add_argument("--attack_moves", type=number(float, 0), nargs=4, default=None,
                        metavar=("SWAP", "DELETE", "INSERT", "SAMPLE"), help="shares (default: the method's)")
    parser.add_argument("--attack_buffer", type=some, default=None,
                        help="prefixes kept to start from (default: the method's)")
    parser.add_argument("--attack_candidates", type=some, default=16, help="prefixes tried an iteration")
    parser.add_argument("--attack_topk", type=some, default=64, help="tokens considered at each place")
    parser.add_argument("--attack_answer", type=some, default=10,
                        help="tokens of the answer; at most the longest choice's where choices are answers")
    parser.add_argument("--attack_seed", type=number(int, 0), default=0, help="of questions and search")
    parser.add_argument("--teacher", default=None,
                        help="the model before unlearning (default: the run's --model)")
    parser.add_argument("--sharpness", choices=["own", "nll"], default=None,
                        help="of the run's own forget loss, or of the attacker's: mean NLL of forget text")
    parser.add_argument("--sharpness_rows", type=some, default=64, help="rows of forget.jsonl, evenly spaced")
    parser.add_argument("--sharpness_rho", type=real, default=0.1, help="radius of the rise; 7B: .01")
    parser.add_argument("--sharpness_steps", type=some, default=100, help="most power iterations")
    parser.add_argument("--sharpness_probes", type=some, default=32, help="random signs for the trace")
    parser.add_argument("--plot", default=None, metavar="FOLDER", help="write pictures there (matplotlib)")
    parser.add_argument("--plot_points", type=some, default=21, help="of the loss landscape, along a side")
    parser.add_argument("--json", default=None, metavar="PATH", help="write the table there as well")
    parser.add_argument("--overwrite", action="store_true", help="score again what is up to date")
    parser.add_argument("--bos", choices=["auto", "none"], default="auto",
                        help="first token: the tokenizer's, or none, as lm-eval 0.4.5 to 0.4.9 had it")
    parser.add_argument("--limit", type=number(int, 0), default=0, metavar="N",
                        help="a quick look: at most N evenly spaced rows of each file (0 = all)")
    parser.add_argument("--batch_size", type=number(int, 1), default=64,
                        help="most samples a pass; changes no result beyond rounding")
    parser.add_argument("--records", action="store_true",
                        help="keep every question's scores in evaluate.json")
    parser.add_argument("--retain_run", default=None, metavar="RUN",
                        help="a model that never saw the forget set: for forget quality and PrivLeak")
    parser.add_argument("--param_dtype", choices=["float32", "bfloat16"], default=None,
                        help="of the weights (default: the run's, float32 for a plain model)")
    args = parser.parse_args()

    with one_line_errors():
        folders = defaultdict(list)                   # settings -> run folders
        join_processes(args.device)
        groups, names = defaultdict(dict), {}         # settings -> {seed: {column: number}}, settings -> name
        for run in tqdm(args.runs, desc="scoring", unit="run", disable=len(args.runs) < 2):
            done, metrics = score(run, args)
            metrics = extras(run, done, metrics, args)
            name, settings = method(done)
            seed = done["args"]["seed"]
            if seed in groups[settings]:
                raise InputError(
                    f"{run}: a second run of {name} with seed {seed} and the same settings; drop one")
            groups[settings][seed], names[settings] = columns(run, metrics), name
            folders[settings].append(run)
        for name in set(names.values()):               # same name, other settings: add what differs
            twins = {s: json.loads(s) for s in names if names[s] == name}
            values = {k: {json.dumps(p.get(k)) for p in twins.values()} for p in twins.values() for k in p}
            for s, p in twins.items():
                names[s] = name + "".join(f" {k}={p.get(k)}" for k in sorted(values) if len(values[k]) > 1)
        base = next((s for s in groups if args.baseline in (None, names[s])), None)
        if base is None:
            raise InputError(f"--baseline {args.baseline}: not among {', '.join(names.values())}")

        keys = list(dict.fromkeys(k for group in groups.values() for row in group.values() for k in row))
        out = {"args": vars(args), "methods": {}, "paired": {}}
        for s, group in groups.items():
            stats = {k: mean_se([row[k] for row in group.values() if k in row]) for k in keys
                     if any(k in row for row in group.values())}
            out["methods"][names[s]] = {"rows": group, "mean": {k: v[0] for k, v in stats.items()},
                                        "se": {k: v[1] for k, v in stats.items()}}
            if s != base:
                out["paired"][names[s]] = compare(group, groups[base], keys)
        correct_for_methods(out["paired"])
        relearned = [k for k in keys if " " in k]    # "UE 20" and so on: a table of their own for each prefix
        prefixes = list(dict.fromkeys(k.rsplit(" ", 1)[0] for k in relearned))
        texts = [k for k in keys if k.startswith(("ppl_", "es_", "em_"))]
        parts = [("scores", [k for k in keys if k not in relearned + texts]),
                 ("corpora: perplexity, extraction strength, exact memorisation", texts)] + [
            (prefix + " after relearning" * (prefix in ("UE", "held out", "UT")),
             [k for k in relearned if k.rsplit(" ", 1)[0] == prefix]) for prefix in prefixes]
        for title, block in [part for part in parts if part[1]]:
            print(f"\n{title}")
            lines = [["method", "seeds"] + [k.rsplit(" ", 1)[-1] for k in block]]
            for name, m in out["methods"].items():
                cells = [cell(m["mean"][k], m["se"][k]) if k in m["mean"] else "-" for k in block]
                lines.append([name, str(len(m["rows"]))] + cells)
            print(table(lines))
        paired = []
        for name, by in out["paired"].items():
            for key, c in by.items():
                if key.startswith(("UE", "held", "UT")):
                    test = ["-"] * 4 if c["t"] is None else [
                        f"{c['t']:.1f}", f"{c['p']:.1g}", f"{c['p_holm']:.1g}", f"{c['d']:+.1f}"]
                    paired.append([name, key, f"{c['mean']:+.3f}", *test, f"{c['higher']}/{c['n']}"])
        if paired:
            print(f"\ndifference to {names[base]}, paired by seed; Holm: p corrected for a column's methods")
            print(table([["method", "column", "difference", "t", "p", "Holm", "effect", "higher"]] + paired))
        out["spearman"] = flat_and_robust(groups, out["methods"])
        if out["spearman"]:
            print("\nis flatter more robust? Spearman's rank correlation with UE after attack, below 0 if so")
            print(table([["sharpness", "attack", "over", "n", "rho", "p"]] + [
                [*r[:3], str(r[3]), f"{r[4]:+.2f}", f"{r[5]:.2g}"] for r in out["spearman"]]))
        if args.json:
            write_json(args.json, out)
        if args.plot:
            pictures(args.plot, out["methods"], {names[s]: folders[s] for s in groups}, args)
