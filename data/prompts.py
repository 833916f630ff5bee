"""What an attacker puts around a question: rows that are about something else, a prefix, a suffix.

Questions are rows of evaluate.ask(): "context" with the beginning "asked", up to the question's end.
"""
import random

import torch

from data import models
from data.formats import InputError
from data.models import IGNORE
from sam import kernel_file


def in_context(rows, corpus, shots, most, seed):
    """Questions asked after `shots` rows of a corpus, a blank line behind each: the first of `most`
    drawn for a question among the rows about other facts (among all where it names no fact)."""
    out = []
    for i, row in enumerate(rows):
        fact = row.get("fact")
        others = [other for other in corpus if fact is None or other.get("fact") != fact]
        if most > len(others):
            raise InputError(f"--shots {most}: {row['where']} has {len(others)} rows about other facts; "
                             "ask for fewer")
        context = ""
        for other in random.Random(f"{seed} {i}").sample(others, most)[:shots]:
            told = other["text"] if "text" in other else other["prompt"] + other["completion"]
            context += f"{told}\n\n"
        out.append(row | {"context": context + row["context"], "asked": context + row["asked"]})
    return out


def around(row, place):
    """(text in front of what is searched, text behind it): a suffix stands where the question ends."""
    if place == "prefix":
        return "", row["context"]
    return row["asked"], row["context"][len(row["asked"]):]


def with_found(rows, text, place):
    """Questions asked with the text that was found: before them, or behind the question itself."""
    out = []
    for row in rows:
        front, behind = around(row, place)
        out.append(row | {"context": f"{front} {text}{behind}" if front else f"{text} {behind}"})
    return out


@torch.no_grad()
def prefix_task(teacher, tokenizer, rows, tokens, answer, place="prefix"):
    """What a prefix is to bring back, as gcg.prefix_terms takes it: the questions as they are tokenised
    around it, then up to `answer` tokens of the teacher's own greedy answer, and the teacher's states at
    62% depth.
    """
    gcg = kernel_file("gcg")
    pad = tokenizer.pad_token_id or 0
    samples = []
    fronts = []
    for row in rows:
        before, behind = tokens.around(*around(row, place))
        fronts.append(before)
        ids = before + behind
        x = torch.tensor([tokens.head + ids], device=teacher.device)
        said = teacher.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=answer,
                                do_sample=False, pad_token_id=pad)[0, x.shape[1]:].tolist()
        if tokenizer.eos_token_id in said:
            said = said[:said.index(tokenizer.eos_token_id)]
        samples.append((ids + said, [IGNORE] * len(ids) + said))
    if all(set(labels) == {IGNORE} for _, labels in samples):
        raise InputError("the teacher answers none of the questions searched on: raise "
                         "--attack_questions, or take another --attack_seed")
    batch = models.collate(samples, pad, teacher.device)
    depth = teacher.config.get_text_config().num_hidden_layers
    at = torch.tensor([len(before) for before in fronts], device=teacher.device)
    task = {"head": tokens.head, "at": at, "front": tokens.head + fronts[0], "ids": batch["input_ids"],
            "labels": batch["labels"], "mask": batch["attention_mask"].bool(),
            "layer": round(0.62 * depth)}
    vocabulary = len(teacher.get_input_embeddings().weight)
    nothing = torch.zeros(1, 0, vocabulary, device=teacher.device)
    try:
        logits, states = gcg.run_prefix(teacher, nothing, task)
        assert states.dim() == 4, f"states {tuple(states.shape)}"
        assert logits.shape[-1] == vocabulary, f"{vocabulary} embeddings, {logits.shape[-1]} outputs"
    except Exception as e:                       # a model can need its tokens by their ids
        reason = str(e).strip().splitlines() or [""]
        raise InputError(f"--attack prefix: {type(teacher).__name__} does not run on embeddings in the "
                         f"place of tokens, with one state a token ({type(e).__name__}: {reason[0]})")
    return task | {"clean": states[0]}
