"""Load models, turn texts into batches, and read log-probabilities off them.

Shapes: B samples, T tokens, V vocabulary, D width. A batch is {"input_ids", "attention_mask", "labels"}, each
(B, T) int64; a label is IGNORE where no loss looks: at prompts and padding.
"""
import math
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from data import processes
from data.adapters import add_peft, peft_base
from data.formats import InputError, warn
from sam import accumulator

IGNORE = -100
CHUNK = 2**24                                    # most logits held at once in training: 64 MB in fp32
PASS_TOKENS = 8192                               # most tokens of a pass when scoring, with their padding


# ---- models -------------------------------------------------------------------------------------------

def load_model(name, device="cpu", dtype=torch.float32):
    """(model, tokenizer) of a local folder or hub name. safetensors only, no remote code, dropout off.

    Under torchrun every process keeps its part of the weights; the processes of a machine load one after the
    other, so that its memory holds one whole model at a time.
    """
    together = processes.count() > 1
    turns = int(os.environ["LOCAL_WORLD_SIZE"]) if together else 1
    own_turn = int(os.environ["LOCAL_RANK"]) if together else 0
    for turn in range(turns):
        if turn == own_turn:
            model, tokenizer = read_model(name, dtype)
            if together:
                shard(model, device)
        processes.barrier()
    rows = model.get_input_embeddings().num_embeddings
    if (tokenizer.pad_token_id or 0) >= rows:
        raise InputError(f"model {name}: its pad token {tokenizer.pad_token!r} has the id "
                         f"{tokenizer.pad_token_id}, but the model has {rows} embeddings; set pad_token to "
                         "null in tokenizer_config.json")
    tokenizer.model_rows = rows                  # encode() refuses what the model has no embedding for
    # eval mode: with dropout the two passes of SAM, and the cached reference, would see different networks
    model.to(device).eval()
    refuse_unfit(model, name)
    return model, tokenizer


def differ(one, other):
    """Do two tensors of logits differ by more than rounding explains?"""
    return (one - other).abs().max() > 0.02 * one.abs().max()


@torch.no_grad()
def refuse_unfit(model, name):
    """Raise InputError unless the model says for every token what it makes of the ones before it, as no encoder
    does. Tried on two texts that share their first token."""
    def first(hidden, head):
        assert hidden.dim() == 3, f"states {tuple(hidden.shape)}"
        return head(hidden[:, :1])
    said = []
    for other in (4, 5):
        ids = torch.tensor([[3, other, other, other]], device=model.device)
        ids %= model.get_input_embeddings().num_embeddings
        try:
            out = with_head(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, first)
        except Exception as e:                   # a model can want anything beside tokens
            reason = str(e).strip().splitlines() or [""]
            raise InputError(f"model {name}: {type(model).__name__} does not run on tokens alone, or not as one "
                             f"state a token ({type(e).__name__}: {reason[0]})")
        said.append(out.logits)
    if differ(*said):
        raise InputError(f"model {name}: what {type(model).__name__} says of a token depends on the tokens after "
                         "it, so it is no causal language model (an encoder, if config.json says is_decoder "
                         "false)")


def read_model(name, dtype, adapted=()):
    """(model, tokenizer) on the CPU, as transformers reads them, with the adapters of a PEFT folder merged into
    their base, which those in `adapted` stand on; whatever is wrong with the files is one line."""
    folder = Path(name)
    if not folder.is_dir() and not re.fullmatch(r"[^/]+/[^/]+", str(name)):
        raise InputError(f"model {name}: neither a folder here nor a hub name ORG/NAME")
    if folder in adapted:
        raise InputError(f"{folder}: adapter_config.json names its own folder as base: name the model")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        model, tokenizer = read_model(peft_base(folder), dtype, (*adapted, folder))
        add_peft(model, folder)
        return model, tokenizer
    verbosity = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()                # its reports of many lines
    if 0 < sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 2**30:
        logging.disable_progress_bar()           # a second at most, but a line for each of many runs
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer("a")                           # what is wrong with its settings shows here
        saved = AutoConfig.from_pretrained(name, trust_remote_code=False).dtype
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True)        # they are an error below
    except Exception as e:                       # a foreign file can break a library anywhere
        reason = " ".join(str(e).split()[:60])
        raise InputError(f"model {name} does not load ({type(e).__name__}: {reason}): name the folder of "
                         "a causal language model with config.json, tokenizer and safetensors, or get it")
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    if found["mismatched_keys"]:
        key, here, wanted = sorted(found["mismatched_keys"])[0]
        raise InputError(f"model {name}: {key} is {tuple(here)} in its weights and {tuple(wanted)} by "
                         "its config.json: get the whole checkpoint")
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise InputError(f"model {name} lacks {len(missing)} of its weights ({missing[0]}, ...), which would "
                         "be random: get the whole checkpoint")
    model.saved_dtype = saved if isinstance(saved, torch.dtype) else None    # where the checkpoint says
    return model, tokenizer


def context_of(model):
    """The longest sequence in tokens that the model takes, 0 if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0


def blocks(model):
    """The decoder layers: the parts that transformers says must not be split."""
    names = model._no_split_modules or ()
    return [m for m in model.modules() if type(m).__name__.removeprefix("FSDP") in names]


def shard(model, device):
    """Spread the weights over the processes by FSDP2, which gathers a block to run it; gradients add up."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(torch.device(device).type, (processes.count(),))
    policy = MixedPrecisionPolicy(reduce_dtype=accumulator(model.dtype))
    for module in [*blocks(model), model]:       # the last takes what no block has: embeddings, output layer
        # True for the model as well: weights that stay gathered would not see a later change of theirs
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def recompute_blocks(model):
    """Gradient checkpointing: keep only a decoder layer's input, and run it again in the backward pass."""
    if not blocks(model):
        raise InputError(
            f"--gradient_checkpointing: {type(model).__name__} does not name its layers; drop it")
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


# ---- texts to batches ---------------------------------------------------------------------------------

def appended(tokenizer):
    """How many tokens the tokenizer puts behind every text, such as EOS."""
    ids = tokenizer("a").input_ids
    word = tokenizer("a", add_special_tokens=False).input_ids
    for start in range(len(ids) - len(word) + 1):
        if ids[start:start + len(word)] == word:
            return len(ids) - start - len(word)
    return 0


def tokenize(tokenizer, texts):
    """[ids of each text], with what the tokenizer puts in front of a text, such as BOS, and without what it
    puts behind: what a text is a piece of goes on."""
    if not texts:
        return []
    end = appended(tokenizer)
    return [ids[:len(ids) - end] for ids in tokenizer(texts, return_attention_mask=False, verbose=False).input_ids]


def common_prefix(a, b):
    """How many first elements two lists share."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


def encode(tokenizer, triples, context, max_len=0):
    """[(ids, labels)] of (prompt, completion, where), the two tokenised as one; labels are IGNORE where prompt
    and joined text share their first tokens.

    A sample of more than `context` tokens is an error that names `where`; max_len > 0 cuts samples before.
    """
    prompts = list({prompt for prompt, _, _ in triples if prompt})
    alone = dict(zip(prompts, tokenize(tokenizer, prompts)))
    alone[""] = []
    out = []
    joined = tokenize(tokenizer, [prompt + completion for prompt, completion, _ in triples])
    for (prompt, _, where), ids in zip(triples, joined):
        known = common_prefix(alone[prompt], ids)
        if max_len:
            ids = ids[:max_len]
        if context and len(ids) > context:
            raise InputError(f"{where}: {len(ids)} tokens, but the model's context is {context}: shorten the "
                             f"text, or cut it with --max_len {context}")
        if max(ids, default=0) >= getattr(tokenizer, "model_rows", math.inf):
            raise InputError(f"{where}: {tokenizer.convert_ids_to_tokens(max(ids))!r} is token {max(ids)}, but "
                             f"the model has {tokenizer.model_rows} embeddings: resize them, or drop the token")
        labels = [IGNORE] * min(known, len(ids)) + ids[known:]
        if all(label == IGNORE for label in labels[1:]):         # nothing predicts the first token
            raise InputError(f"{where}: no token to score ({len(ids)} tokens, {known} of them prompt): "
                             "lengthen the text or raise --max_len")
        out.append((ids, labels))
    return out


def encode_rows(tokenizer, rows, context, max_len=0):
    """encode() for the rows of a corpus: all tokens of a text, or the completion of a prompt."""
    triples = []
    for row in rows:
        if "text" in row:
            triples.append(("", row["text"], row["where"]))
        else:
            triples.append((row["prompt"], row["completion"], row["where"]))
    return encode(tokenizer, triples, context, max_len)


def collate(samples, pad, device="cpu", left=False):
    """The batch of [(ids, labels)], padded on the right, or on the left; padding is never a label."""
    width = max(len(ids) for ids, _ in samples)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in samples:
        missing = width - len(ids)
        for key, row, filler in (("input_ids", ids, pad), ("attention_mask", [1] * len(ids), 0),
                                 ("labels", labels, IGNORE)):
            padding = [filler] * missing
            batch[key].append(padding + row if left else row + padding)
    return {key: torch.tensor(rows, device=device) for key, rows in batch.items()}


def batches(lengths, size, tokens=PASS_TOKENS):
    """Lists of indices, shortest first: at most `size` in each, and at most `tokens` with the padding."""
    part = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if part and (len(part) == size or lengths[i] * (len(part) + 1) > tokens):
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def progress(total, desc):
    """A bar that appears after two seconds and leaves nothing behind."""
    return tqdm(total=total, desc=desc, unit="sample", leave=False, delay=2)


# ---- a pass through the model -------------------------------------------------------------------------

PASSED = Counter()                               # samples: "trained" by run(), or "seen" without a gradient


def run(model, batch, **more):
    """The model's output on a batch, without a cache of keys and values."""
    PASSED["trained" if torch.is_grad_enabled() else "seen"] += len(batch["input_ids"])
    with parametrize.cached():                   # adapters of fused experts are multiplied out once
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False,
                     **more)


def with_head(model, batch, f, **more):
    """run(), with f(hidden (B, T, D), output layer) in the place of the logits.

    Two hooks on the output layer: the first keeps its input and leaves it nothing to do, the second puts f's
    result in the place of what it returns. The model's own forward runs around them, so what hangs on that
    (FSDP gathers weights there) works as ever.
    """
    head = model.get_output_embeddings()
    kept = []

    def keep(module, inputs):
        kept.append(inputs[0])
        return inputs[0][:, :0]

    def replace(module, inputs, output):
        return f(kept.pop(), head.forward)
    hooks = [head.register_forward_pre_hook(keep), head.register_forward_hook(replace)]
    try:
        return run(model, batch, **more)
    finally:
        for hook in hooks:
            hook.remove()


def alters_logits(model):
    """Does the model scale or soft-cap its logits behind the output layer? Tried once, on one token."""
    if not hasattr(model, "logits_altered"):
        token = torch.ones(1, 1, dtype=torch.int64, device=model.device)
        seen = []

        def hidden_itself(hidden, head):
            seen.append(hidden)
            return hidden
        with torch.no_grad():
            out = with_head(model, {"input_ids": token, "attention_mask": token}, hidden_itself).logits
        model.logits_altered = not torch.equal(out.to(seen[0].dtype), seen[0])
        if model.logits_altered:
            warn(f"{type(model).__name__} changes its logits behind the output layer, so the loss needs all "
                 "of them at once: memory grows with tokens x vocabulary (--micro_batch bounds it)")
    return model.logits_altered


def in_chunks(model, batch):
    """Should the logits of this batch be computed at labels alone, chunk by chunk? Where all would be too
    many, or few are due and the output layer costs more than a block, as in a small model of many words."""
    config = model.config.get_text_config()
    tokens = batch["input_ids"].numel()
    few = config.vocab_size > 12 * config.hidden_size and (batch["labels"] != IGNORE).sum() < tokens / 2
    return (few or tokens > max(1, CHUNK // config.vocab_size)) and not alters_logits(model)


def over_labels(model, batch, f, *rows):
    """f(logits (n, V), part of each of rows) -> (n,) or (1,) of every chunk of label positions, concatenated.

    The backward pass computes a chunk's logits again, so that no more than CHUNK of them exist at a time.
    """
    mask = batch["labels"][:, 1:] != IGNORE
    size = max(1, CHUNK // model.config.get_text_config().vocab_size)                # rows of V logits

    def score(hidden, head):                                                         # hidden: (B, T, D)
        def scored(part, *others):
            return f(head(part), *others)
        wanted = [hidden[:, :-1][mask], *rows]                                       # (labels, ...) each
        parts = zip(*(r.split(size) for r in wanted))
        return torch.cat([checkpoint(scored, *part, use_reentrant=False, preserve_rng_state=False)
                          for part in parts])
    return with_head(model, batch, score).logits


def nll_of(logits, labels):
    """-log p of labels (B, ...) from logits (B, V, ...), 0 where IGNORE. In fp32 or wider: a log-softmax in
    bf16 loses three digits."""
    logits = logits.to(accumulator(logits.dtype))
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")


def token_logps(model, batch):
    """log p(token t+1 | tokens to t) for every label, 0 where there is none; and the mask. Both (B, T-1)."""
    labels = batch["labels"][:, 1:]
    mask = labels != IGNORE
    if in_chunks(model, batch):
        nll = over_labels(model, batch, nll_of, labels[mask])                        # (labels,)
        return torch.zeros_like(mask, dtype=nll.dtype).masked_scatter(mask, -nll), mask
    logits = run(model, batch).logits[:, :-1]                                        # (B, T-1, V)
    return -nll_of(logits.transpose(1, 2), labels), mask


# ---- scoring without gradients ------------------------------------------------------------------------

@torch.no_grad()
def label_logits(model, tokenizer, samples, batch=64, desc="scoring"):
    """(index, (n, V) logits, (n,) labels) of this process's part of encoded samples: what the model says
    where a label is due. Logits of other positions, most of B x T x V on questions, are never computed.
    """
    def at_labels(hidden, head):
        return head(hidden[:, :-1][mask])                                            # (labels, V)
    bar = progress(len(samples), desc)
    parts = list(batches([len(ids) for ids, _ in samples], batch))
    for _, part in processes.in_turns(parts):
        x = collate([samples[i] for i in part], tokenizer.pad_token_id or 0, model.device)
        labels = x["labels"][:, 1:]
        mask = labels != IGNORE                                                      # (B, T-1)
        logits = with_head(model, x, at_labels).logits
        if logits.isnan().any():                 # argmax would take them for the likeliest
            raise InputError("the model says NaN: its weights are broken, or an --lr was too high")
        counts = mask.sum(1).tolist()
        yield from zip(part, logits.split(counts), labels[mask].split(counts))
        bar.update(len(part) * processes.count())
    bar.close()


def label_scores(model, tokenizer, samples, batch=64, desc="scoring"):
    """[((n,) fp64 log-probability of each label, (n,) bool: is it the likeliest token?)], one a sample."""
    counts = [len(labels) - 1 - labels[1:].count(IGNORE) for _, labels in samples]
    ends = np.cumsum(counts)
    out = torch.full((2, sum(counts)), -torch.inf, dtype=torch.float64)
    for i, logits, labels in label_logits(model, tokenizer, samples, batch, desc):
        logps = logits.to(accumulator(logits.dtype)).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        out[:, ends[i] - counts[i]:ends[i]] = torch.stack([logps, logits.argmax(-1) == labels])
    logps, hits = processes.all_max(out, model.device)
    return list(zip(logps.split(counts), (hits > 0).split(counts)))


def stop_tokens(model, tokenizer):
    """The ids that end a generated text: the tokenizer's, and those that the checkpoint names."""
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *np.atleast_1d(own).tolist()}
    return ends - {None}


def shows_padding(model, pad):
    """Does padding on the left change what the model says next, as where positions count it or a state runs
    through it? Tried on four tokens and two new ones."""
    said = []
    for front in (0, 3):
        ids = [pad] * front + [3, 4, 5, 6]
        mask = torch.tensor([[0] * front + [1] * 4], device=model.device)
        ids = torch.tensor([ids], device=model.device) % model.get_input_embeddings().num_embeddings
        out = model.generate(ids, attention_mask=mask, max_new_tokens=2, min_new_tokens=2, output_logits=True,
                             return_dict_in_generate=True)
        said.append(out.logits[-1])
    return differ(*said)


@torch.no_grad()
def generate(model, tokenizer, prompts, new, batch=64, desc="generating"):
    """The greedy continuation of each of prompts, [(text, where)]: texts of at most `new` tokens, cut at eos.

    Padded on the left, so that all rows of a batch continue at its end; the mask keeps the padding out of
    attention and positions. Where it does not, texts are continued one by one.
    """
    encoded = tokenize(tokenizer, [text for text, _ in prompts])
    context = context_of(model)
    for ids, (_, where) in zip(encoded, prompts):
        if context and len(ids) + new > context:
            raise InputError(f"{where}: {len(ids)} tokens and {new} new ones, but the model's context is "
                             f"{context}: shorten the text or take another model")
    own = model.generation_config
    pad = tokenizer.pad_token_id or 0
    ends = stop_tokens(model, tokenizer)
    # greedy is argmax: no repetition penalty or forced token that a checkpoint brings along
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=pad,
                                               eos_token_id=sorted(ends) or None)
    texts = [None] * len(prompts)
    bar = progress(len(prompts), desc)
    try:
        if shows_padding(model, pad):
            batch = 1
        for part in batches([len(ids) + new for ids in encoded], batch, 4 * PASS_TOKENS):
            x = collate([(encoded[i], encoded[i]) for i in part], pad, model.device, left=True)
            out = model.generate(x["input_ids"], attention_mask=x["attention_mask"])
            said = []
            for tokens in out[:, x["input_ids"].shape[1]:].tolist():
                end = next((t for t, token in enumerate(tokens) if token in ends), new)
                said.append(tokens[:end])
            for i, text in zip(part, tokenizer.batch_decode(said, skip_special_tokens=True)):
                texts[i] = text
            bar.update(len(part))
    finally:
        model.generation_config = own
        bar.close()
    return texts
