"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers, and which layers those are.

Linear layers are torch's, GPT-2's Conv1D, and experts that transformers fuses into one 3-D parameter. The output
layer is not one of them, nor is a Linear that some model made into something else (a router that returns tuples).
unlearn.py and relearn.py train the adapters of class Adapters, which leave the model's own weights and state_dict
as they are until merge(). Shapes: E experts, r rank.
"""
import json
import math
import random
import re
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from data import runs
from data.formats import InputError, read_json
from sam import accumulator


# ---- which weights ------------------------------------------------------------------------------------

def is_linear(m):
    """Is a module y = W x + b and nothing else? Falcon's says so in words of its own."""
    plain = type(m).forward is torch.nn.Linear.forward or type(m).__name__ == "FalconLinear"
    return plain or isinstance(m, Conv1D)


def linears(model):
    """{name: module} of the linear layers but the output layer; of those that share a weight the first."""
    head = model.get_output_embeddings()
    found = {}
    seen = set()
    for name, m in model.named_modules():
        if is_linear(m) and m is not head and m.weight not in seen:
            found[name] = m
            seen.add(m.weight)
    return found


def experts(model):
    """{name: (module, attribute)} of the 3-D parameters, (E, rows, columns), but for kernels of convolutions and
    stacks of vectors."""
    found = {}
    for name, m in model.named_modules():
        for attribute, p in m.named_parameters(recurse=False):
            matrix = p.dim() == 3 and min(p.shape[1:]) > 1 and not isinstance(m, torch.nn.Conv1d)
            if matrix and p.is_floating_point():
                found[f"{name}.{attribute}"] = (m, attribute)
    return found


def matrices(model):
    """Every matrix of linears() and experts() as an (out, in) view of the weights that an edit may write to. Of a
    fused expert the last dimension is taken for in."""
    found = []
    for m in linears(model).values():
        found.append(m.weight.detach().T if isinstance(m, Conv1D) else m.weight.detach())
    for m, attribute in experts(model).values():
        found += getattr(m, attribute).detach().unbind()
    if not found:
        raise InputError(f"{type(model).__name__} has no linear layer: --lora, --quantize and --prune need one")
    return found


def share(model, tensors):
    """'98% of the weights': how much of the model the tensors are."""
    part = sum(t.numel() for t in tensors) / sum(p.numel() for p in model.parameters())
    return f"{part:.0%} of the weights"


# ---- adapters -----------------------------------------------------------------------------------------

class LowRank(torch.nn.Module):
    """Parametrization of fused experts: W + scale B A, each (E, rows, columns)."""

    def __init__(self, owner, name):
        super().__init__()
        self.delta = lambda: owner.delta(name)   # a function is no submodule: the state_dict stays as it is

    def forward(self, weight):
        delta = self.delta()
        return weight if delta is None else weight + delta.to(weight.dtype)


class Adapters:
    """W + scale B A on every layer of linears() and experts() whose name matches pattern; B is 0, so that nothing
    changes before the first step.

    A (r, in) ~ N(0, 1/in) and B (out, r) are fp32 or wider, (E, r, in) and (E, out, r) for experts. scale is
    alpha / rank. The model's weights are frozen; remove() takes the adapters off and lets them train again.
    """

    def __init__(self, model, rank, alpha, pattern="", seed=0):
        self.model = model
        self.scale = alpha / rank
        self.on = True
        self.pairs = {}                          # name of a layer -> (A, B)
        self.layers = {name: m for name, m in linears(model).items() if re.search(pattern, name)}
        self.fused = {name: where for name, where in experts(model).items() if re.search(pattern, name)}
        if not self.layers and not self.fused:
            matrices(model)                      # says so where the model has no linear layer at all
            raise InputError(f"--lora_modules {pattern!r} matches no linear layer: the names go from "
                             f"{next(iter(linears(model)), '')} on")
        rng = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.hooks = []
        weights = {}
        for name, m in self.layers.items():
            weights[name] = m.weight.T if isinstance(m, Conv1D) else m.weight
        for name, (m, attribute) in self.fused.items():
            weights[name] = getattr(m, attribute)
        largest = max(min(w.shape[-2:]) for w in weights.values())
        if rank > largest:                       # a gate of one row takes any rank, and uses 1
            raise InputError(f"--lora {rank}: no layer is larger than {largest}; choose {largest} or less")
        for name, weight in weights.items():
            self.pairs[name] = self.new_pair(weight, rank, rng)
        model.requires_grad_(False)
        named = {m.weight: name for name, m in self.layers.items()}
        for m in model.modules():                # layers that share a weight share its adapter
            if is_linear(m) and m.weight in named:
                self.hooks.append(m.register_forward_hook(self.hook(named[m.weight])))
        for name, (m, attribute) in self.fused.items():
            parametrize.register_parametrization(m, attribute, LowRank(self, name), unsafe=True)

    def new_pair(self, weight, rank, rng):
        """(A, B) beside a weight (..., out, in)."""
        *lead, rows, columns = weight.shape
        kind = {"device": weight.device, "dtype": accumulator(weight.dtype)}
        a = torch.randn(*lead, rank, columns, generator=rng) / math.sqrt(columns)
        return torch.nn.Parameter(a.to(**kind)), torch.nn.Parameter(torch.zeros(*lead, rows, rank, **kind))

    def hook(self, name):
        """Forward hook of a linear layer: y + scale B A x, (B, T, out)."""
        a, b = self.pairs[name]

        def add(module, inputs, output):
            if not self.on:
                return output
            low = self.scale * inputs[0].to(a.dtype) @ a.T
            return output + (low @ b.T).to(output.dtype)
        return add

    def delta(self, name):
        """scale B A of a layer, None while the adapters are off."""
        a, b = self.pairs[name]
        return self.scale * b @ a if self.on else None

    def product_norm(self, moves):
        """||scale (B dA + dB A)|| over all layers, 0-dim: how far moves = {parameter: direction} carry the weights,
        to first order. By r x r Gram matrices; the products themselves are never formed."""
        total = 0.0
        for a, b in self.pairs.values():
            da = moves.get(a, torch.zeros_like(a))
            db = moves.get(b, torch.zeros_like(b))
            total += ((b.mT @ b) * (da @ da.mT)).sum()
            total += 2 * ((b.mT @ db) * (da @ a.mT)).sum()
            total += ((db.mT @ db) * (a @ a.mT)).sum()
        return self.scale * total.detach().clamp(min=0).sqrt()

    def named(self):
        """[(name, parameter)] of what trains."""
        out = []
        for name, (a, b) in self.pairs.items():
            out += [(f"{name}.lora_A", a), (f"{name}.lora_B", b)]
        return out

    def without(self):
        """The model before unlearning, as a function of the same inputs: the adapters are off while it runs."""
        return Without(self)

    @contextmanager
    def off(self):
        """The adapters do nothing inside."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def remove(self):
        """Take the adapters off; the weights are as they were."""
        for hook in self.hooks:
            hook.remove()
        for m, attribute in self.fused.values():
            if parametrize.is_parametrized(m, attribute):
                parametrize.remove_parametrizations(m, attribute, leave_parametrized=False)
        for p in self.trained:
            p.requires_grad_(True)

    @torch.no_grad()
    def merge(self):
        """W <- W + scale B A, rounded to W's dtype, and remove(). Returns how much of the adapters that rounding
        lost: ||W' - W - scale B A|| / ||scale B A||, over all of them."""
        self.remove()
        lost = 0.0
        size = 0.0
        for name in self.pairs:                  # one full matrix at a time, and one more of its size
            delta = self.delta(name)
            if name in self.fused:
                weight = getattr(*self.fused[name])
            else:
                m = self.layers[name]
                weight = m.weight.T if isinstance(m, Conv1D) else m.weight
            size += delta.norm().item() ** 2
            want = delta.add_(weight)
            weight.copy_(want)
            lost += want.sub_(weight).norm().item() ** 2
        return math.sqrt(lost / size) if size else 0.0

    def save(self, folder, base):
        """Write PEFT's two files, which peft.PeftModel.from_pretrained reads beside the model `base`."""
        if self.fused or len(self.hooks) > len(self.layers):
            raise InputError("--lora_save adapter: PEFT has no plain format for fused experts and layers that "
                             "share a weight; save merged, or leave them out with --lora_modules")
        rank = next(iter(self.pairs.values()))[0].shape[0]
        tensors = {}
        for name, (a, b) in self.pairs.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.detach().cpu().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.detach().cpu().contiguous()
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": rank,
                  "lora_alpha": self.scale * rank, "target_modules": sorted(self.layers), "bias": "none",
                  "fan_in_fan_out": any(isinstance(m, Conv1D) for m in self.layers.values()),
                  "lora_dropout": 0.0, "inference_mode": True}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


class Without:
    """A model whose adapters are off while it runs; its output layer and configuration are the model's own."""

    def __init__(self, adapters):
        self.adapters = adapters

    def __call__(self, **inputs):
        with self.adapters.off():
            return self.adapters.model(**inputs)

    def __getattr__(self, name):
        return getattr(self.adapters.model, name)


# ---- folders that hold adapters alone -----------------------------------------------------------------

PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "modules_to_save": None, "rank_pattern": {},
         "alpha_pattern": {}, "layers_to_transform": None, "use_rslora": False}


def peft_base(folder):
    """The base model that a PEFT folder names."""
    config = read_json(folder / "adapter_config.json", "save the adapters again", peft_type=str, r=int,
                       lora_alpha=(int, float), base_model_name_or_path=str)
    if config["r"] < 1:
        raise InputError(f"{folder}: adapters of rank {config['r']}: save them again")
    for key, plain in PLAIN.items():
        if config.get(key) not in (plain, None, {}, []):
            raise InputError(f"{folder}: adapters with {key} {config[key]!r} are not read here: merge them, "
                             "PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(...)")
    return config["base_model_name_or_path"]


def add_peft(model, folder):
    """Merge the adapters of a PEFT folder into their base model; returns what merge() does."""
    config = read_json(folder / "adapter_config.json", "save the adapters again")
    path = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path} cannot be read ({e}): save the adapters again")
    pairs = {}
    for key, t in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if not found or found[1] not in linears(model):
            raise InputError(f"{folder}: {key} fits no linear layer of {type(model).__name__}: is it another "
                             "base, or another kind of adapter? merge_and_unload() it with PEFT")
        pairs.setdefault(found[1], {})[found[2]] = t
    names = "|".join(map(re.escape, pairs))
    own = Adapters(model, config["r"], config["lora_alpha"], f"^({names})$")
    with torch.no_grad():
        for name, pair in pairs.items():
            a, b = own.pairs[name]
            if len(pair) < 2 or pair["A"].shape != a.shape or pair["B"].shape != b.shape:
                raise InputError(f"{folder}: the adapter of {name} is not of the base's size")
            a.copy_(pair["A"])
            b.copy_(pair["B"])
    return own.merge()


# ---- the flags of unlearn.py --------------------------------------------------------------------------

def flags(g):
    """Add the flags of adapters to a group."""
    g.add_argument("--lora", type=runs.number(int, 1), default=0, metavar="RANK",
                   help="train adapters of this rank in fp32, the model frozen in --param_dtype (0 = the weights)")
    g.add_argument("--lora_alpha", type=runs.number(float, 0, above=True),
                   help="their weight is alpha / rank (default: 2 rank)")
    g.add_argument("--lora_modules", default="", metavar="REGEX", help="adapt only matching layers")
    g.add_argument("--lora_perturb", choices=["adapters", "weights"], default="adapters",
                   help="what rho of sam bounds: the move of A and B, or that of the weights which it makes")
    g.add_argument("--lora_save", choices=["merged", "adapter"], default="merged",
                   help="a whole model, or PEFT's two files beside its base")


def check(args, default_of):
    """Refuse what adapters do not go with, and fill in their weight."""
    if not args.lora:
        for name in ("lora_alpha", "lora_modules", "lora_perturb", "lora_save"):
            if getattr(args, name) != default_of(name):
                raise InputError(f"--{name}: there are no adapters; add --lora RANK, or drop it")
        return
    args.lora_alpha = args.lora_alpha or 2 * args.lora
    for name in ("train_modules", "stochastic_rounding"):
        if getattr(args, name) != default_of(name):
            raise InputError(f"--{name}: --lora {args.lora} trains adapters alone, in fp32; drop one of them")
    parts = args.smooth.split("+")
    if args.lora_perturb == "weights" and ("sam" not in parts or args.sam_norm != "l2"):
        raise InputError(f"--lora_perturb weights: it scales sam's rho in l2, here are --smooth {args.smooth} and "
                         f"--sam_norm {args.sam_norm}; take --smooth sam --sam_norm l2, or drop it")
    if args.lora_save == "adapter" and "wa" in parts:
        raise InputError("--lora_save adapter: the mean of adapters is not an adapter of that rank; drop wa, or "
                         "--lora_save merged")
    runs.refuse_torchrun(f"--lora {args.lora}")
