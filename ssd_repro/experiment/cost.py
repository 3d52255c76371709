"""What a token costs besides time: parameters, bytes, operations, memory, energy. Arithmetic on sizes of models."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch

from ..errors import InputError
from ..models.draft import draft_layers
from ..models.speech_lm import SpeechLM

BYTES = {"fp32": 4, "bf16": 2, "int8": 1, "w8a8": 1}  # of a weight; caches are fp32 but with bf16
COSYVOICE = {"text_vocab": 151_936, "speech_vocab": 6564}  # CosyVoice 2


@dataclass(frozen=True)
class Geometry:
    """The sizes of a SpeechLM with a Qwen2 decoder; head: of an attention head."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    text_vocab: int
    speech_vocab: int
    bias: bool = True  # of the head

    @classmethod
    def of(cls, lm: SpeechLM) -> Geometry:
        config = lm.model.config
        return cls(
            layers=len(lm.model.layers),
            hidden=config.hidden_size,
            ffn=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            text_vocab=config.vocab_size,
            speech_vocab=lm.speech_embedding.num_embeddings,
            bias=lm.head.bias is not None,
        )

    @classmethod
    def named(cls, size: str, text_vocab: int, speech_vocab: int) -> Geometry:
        """'24x896': layers and hidden size, in heads of 64, two of them keys'; InputError for anything else.

        The inner layer is four times as wide, as the bundled voice's; that of 896 is Qwen2.5-0.5B's, as CosyVoice 2's.
        """
        layers, _, hidden = size.partition("x")
        if not (layers.isdigit() and hidden.isdigit() and int(layers) > 1 and int(hidden) and int(hidden) % 128 == 0):
            raise InputError(
                f"size {size!r} must be LAYERSxHIDDEN, at least 2 layers, a hidden size in steps of 128, such as 24x384"
            )
        wide = int(hidden)
        ffn = 4864 if wide == 896 else 4 * wide
        return cls(int(layers), wide, ffn, wide // 64, 2, 64, text_vocab, speech_vocab)

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        q, kv = self.heads * self.head, 2 * self.kv_heads * self.head
        attention = self.hidden * (q + kv) + q + kv + q * self.hidden
        return attention + 3 * self.hidden * self.ffn + 2 * self.hidden

    @property
    def output(self) -> int:
        """Parameters of the head."""
        return (self.hidden + self.bias) * self.speech_vocab

    @property
    def step(self) -> int:
        """Parameters that a forward reads: all but the tables of embeddings."""
        return self.layers * self.layer + self.hidden + self.output

    @property
    def parameters(self) -> int:
        return self.step + (self.text_vocab + self.speech_vocab) * self.hidden

    def flops(self, context: int) -> int:
        """Of one token in a forward, ``context`` positions in the cache: two a weight, two a cached number and head."""
        return 2 * self.step + 4 * self.layers * self.heads * self.head * context

    @property
    def cache(self) -> int:
        """Numbers that the cache holds of one position."""
        return 2 * self.layers * self.kv_heads * self.head


def read_in_step(model: Geometry, precision: str, context: int) -> int:
    """Bytes that a forward reads, whatever its number of tokens: weights and cache."""
    cached = 2 if precision == "bf16" else 4
    return BYTES[precision] * model.step + cached * model.cache * context


def per_token(target: Geometry, draft: Geometry, rounds: dict, precision: str, context: int) -> dict:
    """MB read and MFLOP of each emitted token; ``rounds``: how many drafted, emitted, and calls of the target."""
    drafted, calls, emitted = (rounds[name] for name in ("drafted", "calls", "emitted"))
    read = drafted * read_in_step(draft, precision, context) + calls * read_in_step(target, precision, context)
    flops = drafted * draft.flops(context) + (drafted + calls) * target.flops(context)
    return {"MB read / token": read / emitted / 1e6, "MFLOP / token": flops / emitted / 1e6}


def of_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Cost of an emitted token, from the rows of ``bench.measure``: one line per model or SSD setting."""
    ours = rows[rows.system.isin(["ar", "ssd0", "ssd"])]
    first, context = ours.iloc[0], int((ours.prefix + ours.tokens / ours.pieces / 2).mean())
    models = {name: Geometry(**first.geometry[name]) for name in ("target", "draft")}
    where = first.precision, context
    alone = {"drafted": 0, "calls": 1, "emitted": 1}
    found = []
    for name, model in models.items():
        cost = per_token(model, model, alone, *where)
        joules = _joules(ours[ours.system == "ar"]) if name == "target" else float("nan")
        found.append({"model": name, "parameters, M": model.parameters / 1e6, **cost, "J / token": joules})
    for (beta, length), of in ours[ours.tolerance.notna()].groupby(["tolerance", "draft_length"]):
        rounds = {"drafted": of.drafted.sum(), "calls": of.calls.sum(), "emitted": of.tokens.sum() - of.pieces.sum()}
        cost = per_token(*models.values(), rounds, *where)
        label = f"SSD, beta {beta:g}, L_d {length:g}"
        found.append({"model": label, "parameters, M": float("nan"), **cost, "J / token": _joules(of)})
    return pd.DataFrame(found).set_index("model")


def _joules(rows: pd.DataFrame) -> float:
    return pd.to_numeric(rows.joules).sum(min_count=1) / rows.tokens.sum()


def memory(rows: pd.DataFrame) -> pd.DataFrame:
    """What a draft adds to its target: this voice's, and at CosyVoice 2's geometry the paper's 2 + 6 layers.

    own: what it does not share with the target (bottom layers and head); alone: a draft that shares its embeddings at
    most, as the runtimes keep it that pack the weights of each model (openvino).
    """
    first, large = rows.iloc[0], Geometry.named("24x896", **COSYVOICE)
    voice = {name: Geometry(**first.geometry[name]) for name in ("target", "draft")}
    bottom, top = draft_layers(large.layers)
    pairs = {
        "this voice": (*voice.values(), first.geometry["bottom"]),
        f"CosyVoice 2, {bottom} + {top} layers": (large, replace(large, layers=bottom + top), bottom),
    }
    found = []
    for label, (target, draft, own) in pairs.items():
        added = own * target.layer + draft.output
        shares = {"own": added / target.parameters, "alone": draft.step / target.parameters}
        shares["cache"] = draft.cache / target.cache
        line = {"models": label, "target, M": target.parameters / 1e6, "draft's own, M": added / 1e6}
        found.append(line | {f"{name} / target's %": 100 * share for name, share in shares.items()})
    return pd.DataFrame(found).set_index("models")


def facts(target: SpeechLM, draft: SpeechLM) -> dict:
    """What rows keep of the models, for the tables of this file."""
    shared = {id(parameter) for parameter in target.parameters()}
    own = [layer for layer in draft.model.layers if not shared.intersection(map(id, layer.parameters()))]
    sizes = {name: asdict(Geometry.of(lm)) for name, lm in (("target", target), ("draft", draft))}
    return sizes | {"bottom": len(own)}


def joules(device: torch.device) -> float | None:
    """What the GPU (NVML), or the CPU (RAPL), has used since some beginning; None where the machine does not say."""
    if device.type == "cuda":
        if not find_spec("pynvml"):
            return None
        import pynvml

        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        except pynvml.NVMLError:
            return None
    try:
        zones = Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj")
        return sum(int(zone.read_text()) for zone in zones) / 1e6 or None
    except OSError:  # for root's eyes alone
        return None


def note(rows: pd.DataFrame) -> str:
    known = pd.to_numeric(rows.joules).notna().any()
    energy = "J / token: RAPL's or NVML's, of the whole chip." if known else "Energy: not available here."
    return (
        "Of each emitted token, from the sizes of the models and the rounds of these rows: a forward reads all weights "
        f"but the tables of embeddings, and the cache, once for all of its tokens. {energy}"
    )
