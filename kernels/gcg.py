"""Search for a prefix that makes one model answer as another does: enhanced GCG (arXiv 2409.18025). Copy it alone.

One universal prefix stands before several questions, or, as a suffix (arXiv 2408.10682), inside each.
Each iteration changes one of the best prefixes so far in `candidates` ways (swap a token by the
gradient, delete, insert, or sample one from the model) and keeps the best. evaluate.py --attack prefix
is the worked example. A model call is one pass of one model over the Q questions with one prefix; a
gradient counts as three.

Shapes: C candidates, H tokens of BOS (0 or 1), P of the prefix, Q questions, T their tokens, V vocabulary, D width.
"""
import math
import random

import torch
import torch.nn.functional as F

MOVES = ("swap", "delete", "insert", "sample")
METHODS = {            # weights of prefix_terms; shares of MOVES; how many prefixes are kept
    "gcg+": {"weights": [1.0, 1.0, 10.0, 1.5, 3.0], "moves": [0.7, 0.1, 0.1, 0.1], "buffer": 16},
    "gcg": {"weights": [1.0, 0.0, 0.0, 0.0, 0.0], "moves": [1.0, 0.0, 0.0, 0.0], "buffer": 1},
    "random": {"weights": [1.0, 0.0, 0.0, 0.0, 0.0], "moves": [0.0, 0.0, 0.0, 0.0], "buffer": 1}}


# ---- the loss -----------------------------------------------------------------------------------------

def embeddings(model):
    """(V, D) what the model's input layer makes of every token: through the module, which may scale."""
    layer = model.get_input_embeddings()
    return layer(torch.arange(len(layer.weight), device=model.device))


def places(task, P):
    """(Q, P+T) where each token of prefix and question stands behind the head: task["at"] (Q,) tokens of
    the question come first, none of them unless the prefix is a suffix."""
    at = task["at"][:, None]
    t = torch.arange(task["ids"].shape[1], device=at.device)
    prefix = at + torch.arange(P, device=at.device)                                  # (Q, P)
    return torch.cat([prefix, t + P * (t >= at)], 1)


def run_prefix(model, onehot, task):
    """(logits (C, Q, H+P+T, V), states (C, Q, T, D) of the questions at task["layer"]) with onehot (C, P, V)
    at its place in every question. Questions are padded on the right, which causal attention never
    sees."""
    table = embeddings(model)
    Q, T = task["ids"].shape
    C, P, _ = onehot.shape
    each = torch.arange(Q, device=model.device)[:, None]
    where = places(task, P)
    head = table[torch.tensor(task["head"], dtype=torch.long, device=model.device)]  # (H, D)
    prefix = onehot.to(table.dtype) @ table                                          # (C, P, D)
    x = torch.cat([prefix[:, None].expand(-1, Q, -1, -1), table[task["ids"]].expand(C, -1, -1, -1)], 2)
    x = x[:, each, where.argsort(1)]                                                 # (C, Q, P+T, D)
    x = torch.cat([head.expand(C, Q, -1, -1), x], 2)
    out = model(inputs_embeds=x.flatten(0, 1), output_hidden_states=True, use_cache=False)
    states = out.hidden_states[task["layer"]].unflatten(0, (C, Q))
    return out.logits.unflatten(0, (C, Q)), states[:, each, len(task["head"]) + where[:, P:]]


def prefix_terms(victim, teacher, onehot, task):
    """(C, 5) terms of the attack's loss for prefixes onehot (C, P, V), each to be weighted and added:

    mean cross-entropy of the teacher's answers; L2 distance of the victim's states to the teacher's on the
    same input (0 if teacher is None); 1 - cosine to the teacher's states on the clean input, both a mean over
    the tokens of questions and answers; the prefix's own cross-entropy, where it stands in the first
    question; sum of max(count - 1, 0)^1.5 / P.

    task: {"head": H ids, "at": see places, "front": all ids before the first question's prefix, "ids"
    (Q, T), "labels" (Q, T) with -100 where none, "mask" (Q, T) bool of real tokens, "layer", "clean"
    (Q, T, D): the teacher's states without a prefix}.
    """
    C, P, _ = onehot.shape
    Q, T = task["ids"].shape
    logits, states = run_prefix(victim, onehot, task)
    wide = torch.promote_types(logits.dtype, torch.float32)
    before = len(task["head"]) + places(task, P) - 1             # (Q, P+T) the place that predicts each
    each = torch.arange(Q, device=before.device)[:, None]
    predicts = logits[:, each, before[:, P:].clamp_min(0)].to(wide)                  # (C, Q, T, V)
    states = states.to(wide)
    same = run_prefix(teacher, onehot, task)[1] if teacher else states

    def mean(x):                                                                     # (C, Q, T) -> (C,)
        return (x * task["mask"]).sum((1, 2)) / task["mask"].sum()
    labels = task["labels"].expand(C, -1, -1).flatten()
    nll = F.cross_entropy(predicts.flatten(0, 2), labels, reduction="none")
    answers = nll.view(C, -1).sum(1) / (task["labels"] != -100).sum()
    same_input = mean((states - same).norm(dim=-1))
    clean_input = mean(1 - F.cosine_similarity(states, task["clean"].to(wide), dim=-1))
    told = before[0, :P][before[0, :P] >= 0]                     # without BOS nothing predicts the first
    said = logits[:, 0, told].to(wide).log_softmax(-1)
    fluency = -(onehot[:, P - said.shape[1]:] * said).sum(-1).mean(1)
    repetition = (onehot.sum(1) - 1).clamp_min(0).pow(1.5).sum(1) / P
    return torch.stack([answers, same_input, clean_input, fluency, repetition], 1)


# ---- the tokens of a prefix ---------------------------------------------------------------------------

class Tokens:
    """Which tokens a prefix may have, and its text. Special ones are banned, and a prefix must be what its own
    text, followed by a question, is read as. question: the text of one; vocabulary: V of the model. Of a
    suffix, question is what stands behind it, and front, a text, what stands before."""

    def __init__(self, tokenizer, vocabulary, question, device, front=""):
        self.tokenizer = tokenizer
        self.question = question
        self.front = front
        self.head = self.in_front()
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= {*tokenizer.all_special_ids}
        self.allowed = [i for i in range(min(vocabulary, len(tokenizer))) if i not in special]
        self.banned = torch.full((vocabulary,), -math.inf, device=device)
        self.banned[self.allowed] = 0.0

    def bare(self, text):
        """ids of a text without special tokens."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def in_front(self):
        """The ids that the tokenizer puts in front of every text, such as BOS."""
        word = self.bare("a")
        ids = self.tokenizer("a").input_ids
        start = next(i for i in range(len(ids)) if ids[i:i + len(word)] == word)
        return ids[:start]

    def after_word(self, text):
        """The ids of a text as it is read after a word."""
        return self.bare("a " + text)[len(self.bare("a")):]

    def around(self, front, question):
        """(ids in front of a prefix, ids behind it) where it stands between two texts."""
        if not front:
            return [], self.after_word(question)
        return self.bare(front), self.bare("a" + question)[len(self.bare("a")):]

    def text(self, ids):
        """The text of a prefix."""
        return self.tokenizer.decode(ids).strip()

    def survives(self, ids):
        """Does decoding, putting a question behind, and encoding again give the same tokens?"""
        before, behind = self.around(self.front, self.question)
        if self.front:
            return self.bare(f"{self.front} {self.text(ids)}{self.question}") == before + ids + behind
        return self.bare(f"{self.text(ids)} {self.question}") == ids + behind

    def fresh(self, rng, length):
        """A random prefix that survives; ValueError when none of 100 does."""
        for _ in range(100):
            text = self.text(rng.choices(self.allowed, k=length))
            ids = (self.after_word(text) if self.front else self.bare(text))[:length]
            if len(ids) == length and self.survives(ids):
                return ids
        raise ValueError("of 100 random prefixes none survives decoding and encoding again")


# ---- the search ---------------------------------------------------------------------------------------

def mutate(ids, move, scores, count, topk, rng):
    """`count` prefixes, each one change away from ids. scores: for swap (P, V), minus the gradient: the token
    is any of the topk; for insert and sample (P+1, V), the model's logits: it is drawn from the topk.
    """
    out = []
    top = scores.topk(topk) if move != "delete" else None
    for _ in range(count):
        i = rng.randrange(len(ids) + (move == "insert"))
        new = []
        if move != "delete":
            weights = None if move == "swap" else top.values[i].softmax(-1).tolist()
            new = rng.choices(top.indices[i].tolist(), weights)
        rest = ids[i:] if move == "insert" else ids[i + 1:]
        out.append(ids[:i] + new + rest)
    return out


class Search:
    """The best prefixes so far, improved by step() until `calls` model calls are spent.

    victim, teacher: models; task: see prefix_terms; tokens: Tokens; how: {"weights", "moves", "buffer"}, one of
    METHODS; low, high: lengths, the shortest allowed grows from one to the other. state: {"calls",
    "iteration", "best": [[loss, terms, ids]]}, JSON: a search that is given a saved one goes on as if it had
    never stopped, since each iteration is seeded by (seed, iteration).
    """

    def __init__(self, victim, teacher, task, tokens, how, state, low, high, calls, candidates, topk, seed):
        self.victim = victim
        self.weights = torch.tensor(how["weights"], device=victim.device)
        self.teacher = teacher if self.weights[1] else None
        self.each = 2 if self.teacher else 1                     # model calls a prefix
        self.task = task
        self.tokens = tokens
        self.moves = how["moves"]
        self.buffer = how["buffer"]
        self.state = state
        self.low = low
        self.high = high if how["moves"][2] else low             # without insertion the length is fixed
        self.calls = calls
        self.candidates = candidates
        self.topk = min(topk, len(tokens.allowed))
        self.seed = seed

    def onehot(self, prefixes):
        """(C, P, V) of prefixes of one length."""
        ids = torch.tensor(prefixes, device=self.victim.device)
        return F.one_hot(ids, len(self.tokens.banned)).float()

    def ended(self):
        """Is the budget spent?"""
        return self.state["calls"] >= self.calls

    def step(self):
        """One iteration: candidates, their losses, the best of old and new."""
        state = self.state
        rng = random.Random(f"{self.seed} {state['iteration']}")
        shortest = self.low + (self.high - self.low) * state["calls"] // self.calls
        if not state["best"] or not any(self.moves):
            new = [self.tokens.fresh(rng, self.low) for _ in range(self.candidates)]
        else:
            new = self.propose(rng, shortest)
        seen = [ids for _, _, ids in state["best"]]
        kept = []
        for ids in new:
            if ids not in seen and self.tokens.survives(ids):
                kept.append(ids)
            seen.append(ids)
        if kept:
            with torch.no_grad():
                terms = prefix_terms(self.victim, self.teacher, self.onehot(kept), self.task)
            losses = (terms @ self.weights).tolist()
            state["best"] += map(list, zip(losses, terms.tolist(), kept))
            state["best"].sort(key=lambda b: (len(b[2]) < shortest, b[0]))
            del state["best"][self.buffer:]
        state["calls"] += max(1, self.each * len(kept))          # at least 1: the search must end
        state["iteration"] += 1

    def propose(self, rng, shortest):
        """`candidates` changes of one of the best prefixes, by a move drawn by its share."""
        ids = rng.choice(self.state["best"])[2]
        move = rng.choices(MOVES, self.moves)[0]
        if (move, len(ids)) in (("delete", shortest), ("insert", self.high)):
            move = "swap"
        if len(ids) < shortest:
            move = "insert"
        scores = None
        if move == "swap":
            x = self.onehot([ids]).requires_grad_()
            loss = (prefix_terms(self.victim, self.teacher, x, self.task) @ self.weights).sum()
            scores = self.tokens.banned - torch.autograd.grad(loss, x)[0][0]         # (P, V)
            self.state["calls"] += 3 * self.each
        elif move != "delete":
            front = self.task["front"]
            with torch.no_grad():
                x = torch.tensor([front + ids], device=self.victim.device)
                logits = self.victim(x, use_cache=False).logits[0]
            logits = F.pad(logits, (0, 0, 1, 0))[len(front):]    # (P+1, V): row i is for token i
            scores = self.tokens.banned + logits
            self.state["calls"] += 1
        return mutate(ids, move, scores, self.candidates, self.topk, rng)
