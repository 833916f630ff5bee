"""The texts that unlearn.py trains on: encoded samples, their reference log-probabilities, batches of a step."""
import hashlib

from data import losses, models
from data.formats import InputError, read_jsonl, text_row


def shuffled(n, size, rng):
    """Endless lists of `size` indices below n: one shuffled pass after another."""
    order = []
    while True:
        while len(order) < size:
            order += rng.sample(range(n), n)
        yield order[:size]
        order = order[size:]


class Texts:
    """Encoded samples [(ids, labels)]: forget, retain, and chosen, the preferred answers of dpo (else None); ref
    and chosen_ref are their log-probabilities before unlearning, (N,), where the loss compares with them."""

    def __init__(self, args, folder, model, tokenizer):
        self.args = args
        self.pad = tokenizer.pad_token_id or 0
        context = models.context_of(model)
        forget = read_jsonl(folder / "forget.jsonl", text_row)
        retain = read_jsonl(folder / "retain.jsonl", text_row)
        self.forget = models.encode_rows(tokenizer, forget, context, args.max_len)
        self.retain = models.encode_rows(tokenizer, retain, context, args.max_len)
        self.unrelated = []                      # --ilu_data
        if args.ilu_data:
            rows = read_jsonl(args.ilu_data, text_row)
            self.unrelated = models.encode_rows(tokenizer, rows, context, args.max_len)
        self.chosen = None
        self.ref = None
        self.chosen_ref = None
        if args.loss == "dpo":
            rejected = []
            chosen = []
            for row in forget:
                if "prompt" not in row or "completion" not in row:
                    raise InputError(f"{row['where']}: --loss dpo needs prompt and completion, found only a text")
                rejected.append((row["prompt"], row["completion"], row["where"]))
                chosen.append((row["prompt"], " " + args.idk_text, row["where"]))
            self.forget = models.encode(tokenizer, rejected, context, args.max_len)
            self.chosen = models.encode(tokenizer, chosen, context, args.max_len)

    def add_references(self, model):
        """Take the log-probabilities under the model as it is, for the losses that compare with them."""
        how = (self.args.micro_batch, self.pad, self.args.reduce)
        if self.args.loss in losses.NEEDS_REFERENCE:
            self.ref = losses.reference_logps(model, self.forget, *how)
        if self.chosen:
            self.chosen_ref = losses.reference_logps(model, self.chosen, *how)

    def batches(self, samples, picks, ref=None):
        """losses.micro_batches() of some samples."""
        return losses.micro_batches(samples, picks, self.args.micro_batch, self.pad, self.args.device, ref)

    def retain_batches(self, picks):
        """Micro-batches of the picked retain samples."""
        return self.batches(self.retain, picks)

    def forget_batches(self, picks):
        """Micro-batches of the picked forget samples, each with its preferred answers where there are any."""
        micro = self.batches(self.forget, picks, self.ref)
        if self.chosen:
            for batch, other in zip(micro, self.batches(self.chosen, picks, self.chosen_ref)):
                batch["chosen"] = other
        return micro

    def digest(self):
        """A hash of all tokens."""
        out = hashlib.sha256()
        for samples in (self.forget, self.retain, self.chosen or [], self.unrelated):
            for ids, labels in samples:
                out.update(repr((ids, labels)).encode())
        return out.hexdigest()[:16]
