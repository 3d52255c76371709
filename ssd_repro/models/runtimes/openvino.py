"""OpenVINO forwards for CPUs: one graph for blocks of any length, keys and values in pages beside it.

Weights are packed once for all block lengths. A block's keys and values are written into the sequence's pages and read
there, so a step copies none, and a rollback is a smaller length.
"""

from __future__ import annotations

import weakref
from functools import cache

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaModel, PreTrainedModel, Qwen2Model, Qwen3Model

from ...errors import InputError
from ..speech_lm import SpeechLM
from .openvino_graph import PAGE, graph

DECODERS = (Qwen2Model, LlamaModel, Qwen3Model)  # what ``graph`` writes down, and no class derived from them
# Of products. int8 is of weights alone; w8a8 rounds the inputs of their products, too, GROUP numbers to one scale.
PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "f32", "w8a8": "f32"}
GROUP = 128
# Where rounding shows, the places of a verification are as many sequences over the same pages: each runs through the
# kernel of a step, and its logits are a step's to the bit. In fp32 one block is faster, and the same but for 1e-5.
APART = ("bf16", "w8a8")
ROOM = 512  # positions; pages and tables grow by doubling
INPUTS = (
    "embeddings",
    "cos",
    "sin",
    "last",
    "past",
    "begins",
    "pages",
    "page_begins",
    "longest",
)  # but for keys, values


@cache
def capabilities() -> tuple[str, ...]:
    """What this CPU computes in, such as FP32, INT8, BF16. InputError without OpenVINO."""
    try:
        import openvino
    except ImportError:
        raise InputError("runtime openvino needs the package openvino, or choose runtime eager") from None
    return tuple(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def multiplies_int8() -> bool:
    """Whether this CPU has instructions for it: without them OpenVINO rounds no inputs, and says nothing."""
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_vnni") or known.get("avx_vnni"))


def check_decoder(model: PreTrainedModel) -> None:
    """InputError for a decoder that ``graph`` would not write down as it is."""
    config = model.config
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    activation = getattr(config, "hidden_act", "another")
    turning = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if type(model) not in DECODERS or not full or activation != "silu" or turning in ("dynamic", "longrope"):
        what = f"not {type(model).__name__} (activation {activation}, rotary embedding {turning})"
        raise InputError(
            f"runtime openvino knows Qwen2, Llama and Qwen3 decoders with full attention, {what}: choose runtime eager"
        )


class OpenVINOLM:
    """A SpeechLM whose forwards OpenVINO runs; takes its place wherever sessions are asked for.

    lm: on the CPU in fp32, its decoder one of DECODERS with full attention. threads: of a forward.
    precision: 'fp32'; 'int8' weights, a scale for each output, products in fp32; 'w8a8', those weights and
    int8 inputs, where the CPU multiplies them (VNNI); 'bf16' weights and products where it computes in it.
    Logits come as float32. InputError if one cannot be had.
    """

    def __init__(self, lm: SpeechLM, threads: int, precision: str = "fp32") -> None:
        check_decoder(lm.model)
        if lm.head.weight.device.type != "cpu":
            raise InputError(f"runtime openvino is for the CPU, the model is on {lm.head.weight.device}")
        if precision not in PRECISIONS or PRECISIONS[precision].upper() not in ("F32", *capabilities()):
            raise InputError(f"runtime openvino on this CPU has no precision {precision!r}: choose fp32 or int8")
        if precision == "w8a8" and not multiplies_int8():
            raise InputError("precision 'w8a8' needs a CPU that multiplies int8 (VNNI): choose int8 or fp32")
        import openvino

        self.lm, self.threads, self.apart = lm, threads, precision in APART
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "KV_CACHE_PRECISION": PRECISIONS[precision],
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP if precision == "w8a8" else 0,  # 32 by default, with int8 weights
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # two processes would be pinned to the same core
        }
        self.compiled = openvino.Core().compile_model(graph(lm, precision in ("int8", "w8a8")), "CPU", settings)
        self._free: list[Pages] = []
        self._cos = self._sin = np.zeros((1, 1, 0, 0), np.float32)

    def session(self) -> OpenVINOSession:
        """A new sequence; its pages return to this model's store when the session is dropped."""
        return OpenVINOSession(self)

    def batch(self, prefixes: list[Tensor], room: int) -> tuple[OpenVINOBatch, Tensor]:
        """As ``SpeechLM.batch``; nothing is padded."""
        session = OpenVINOBatch(self, len(prefixes), max(prefix.shape[1] for prefix in prefixes) + room)
        return session, session.prefill(prefixes)

    def take(self) -> Pages:
        """Pages without any trace of an earlier sequence (a NaN times 0 would be one)."""
        try:
            pages = self._free.pop()  # atomic: threads may share a model
        except IndexError:
            return Pages(self.compiled)
        pages.clear()
        return pages

    def give_back(self, pages: Pages) -> None:
        self._free.append(pages)

    @torch.inference_mode()
    def forward(
        self, pages: Pages, embeddings: Tensor, rows: list, past: list, counts: list, last, apart: bool = False
    ) -> list[Tensor]:
        """One forward of sequences that stand one behind the other in embeddings (1, N, hidden).

        rows, past, counts: of each sequence its row of pages, the positions before it and the new ones; apart: each of
        these as a sequence of its own. -> logits (1, L, V) of the places ``last`` (L) among the N, and where the model
        has taps their features.

        Between two forwards of a large model all else runs out of the cache: few calls, and of plain numbers.
        """
        if apart:
            rows = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
            past = [before + i for before, count in zip(past, counts, strict=True) for i in range(count)]
            counts = [1] * len(rows)
        ends = [before + count for before, count in zip(past, counts, strict=True)]
        needed = [-(-end // PAGE) for end in ends]
        given = pages.inputs(embeddings.shape[1], len(counts), len(last), sum(needed))
        given["embeddings"][...] = embeddings.float().numpy()
        self._make_angles(longest := max(ends))
        begins, page_begins, per_row = [0], [0], pages.room // PAGE
        for row, before, end, count in zip(rows, past, ends, needed, strict=True):
            fed, held = begins[-1], page_begins[-1]
            begins.append(fed + end - before)
            page_begins.append(held + count)
            given["cos"][:, :, fed : begins[-1]] = self._cos[:, :, before:end]
            given["sin"][:, :, fed : begins[-1]] = self._sin[:, :, before:end]
            given["pages"][held : page_begins[-1]] = range(row * per_row, row * per_row + count)
        given["last"][:], given["past"][:], given["begins"][:] = last, past, begins
        given["page_begins"][:], given["longest"][...] = page_begins, longest
        return pages.infer()

    def _make_angles(self, positions: int) -> None:
        """Cosines and sines of the rotary embedding, (1, 1, n, head size) both, for at least so many positions."""
        if positions > self._cos.shape[2]:
            places = torch.arange(max(ROOM, 2 * positions))[None]
            self._cos, self._sin = (
                x.float().numpy()[:, None] for x in self.lm.model.rotary_emb(torch.zeros(1), places)
            )


class Pages:
    """An infer request, and keys and values of its sequences, of each layer (pages, kv heads, PAGE, head size).

    room: positions that each of ``rows`` sequences has place for, a multiple of PAGE; used: of a lone one, how many
    were ever written.
    """

    def __init__(self, compiled, rows: int = 1, room: int = 0) -> None:
        self.request, self.rows, self.room, self.used = compiled.create_infer_request(), rows, 0, 0
        named = {port.any_name: port for port in compiled.inputs}
        self.ports = [port for name, port in named.items() if name.startswith(("key", "value"))]
        self.small = {name: port for name, port in named.items() if port not in self.ports}
        self.given, self.lengths = {}, (0,) * len(INPUTS)
        self.reserve(room or ROOM)

    def reserve(self, positions: int) -> None:
        """Make room for so many; what is there stays, of a lone sequence."""
        import openvino

        self.used = max(self.used, positions) if self.room else 0
        if positions <= self.room:
            return
        count = -(-max(positions, 2 * self.room) // PAGE)
        for port in self.ports:
            shape = [self.rows * count, *(port.partial_shape[axis].get_length() for axis in (1, 2, 3))]
            wider = openvino.Tensor(port.element_type, openvino.Shape(shape))
            wider.data[...] = 0
            if self.room:
                wider.data[: self.room // PAGE] = self.request.get_tensor(port).data
            self.request.set_tensor(port, wider)
        self.room = count * PAGE

    def clear(self) -> None:
        for port in self.ports:
            self.request.get_tensor(port).data[: -(-self.used // PAGE)] = 0
        self.used = 0

    def inputs(self, fed: int, sequences: int, asked: int, pages: int) -> dict[str, np.ndarray]:
        """The graph's inputs but for keys and values, to be written; the same memory until its length changes.

        Handing memory over takes OpenVINO's Python longer than a small model's forward.
        """
        import openvino

        lengths = (fed, fed, fed, asked, sequences, sequences + 1, pages, sequences + 1, 1)
        if lengths != self.lengths:
            for name, length, before in zip(INPUTS, lengths, self.lengths, strict=True):
                if length != before:
                    port = self.small[name]
                    shape = [size.get_length() if size.is_static else length for size in port.partial_shape]
                    tensor = openvino.Tensor(port.element_type, openvino.Shape(shape))
                    self.given[name] = tensor.data
                    self.request.set_tensor(port, tensor)
            self.lengths = lengths
        return self.given

    def infer(self) -> list[Tensor]:
        """The outputs. OpenVINO's ``infer`` (2026.4.1) keeps errors to itself: then they begin with a NaN."""
        self.request.infer(share_outputs=True)
        made = []
        for tensor in self.request.output_tensors:
            kept = tensor.data
            made.append(torch.from_numpy(kept.copy()))
            kept[..., :1] = np.nan
        return made


class _Whole:
    """A causal model of transformers as ``graph`` knows a SpeechLM: tokens are ids of its one vocabulary."""

    def __init__(self, model: PreTrainedModel, taps: tuple[int, ...] = ()) -> None:
        self.model, self.head = model.base_model, model.get_output_embeddings()
        self.speech_embedding, self.taps = model.get_input_embeddings(), taps

    def weights(self) -> list[Tensor]:
        """Those that stand in the graph: embeddings are looked up outside of it."""
        return [*self.model.layers.parameters(), *self.model.norm.parameters(), *self.head.parameters()]


_CAUSAL: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # causal model -> (its weights' state, OpenVINOLM)


def causal(model: PreTrainedModel, taps: tuple[int, ...] = ()) -> OpenVINOLM:
    """A causal model's forwards, or a ``HiddenDraft``'s; compiled anew only where weights, threads or taps changed.

    What has taps serves those who ask for none. InputError as ``OpenVINOLM``.
    """
    check_decoder(model.base_model)
    if model.dtype != torch.float32:
        raise InputError(f"runtime openvino computes in float32, the model is {model.dtype}: call model.float()")
    whole, threads = _Whole(model, taps), torch.get_num_threads()
    state = threads, [(weight.data_ptr(), weight._version) for weight in whole.weights()]
    known, compiled = _CAUSAL.get(model, (None, None))
    if known != state or taps not in ((), compiled.lm.taps):
        compiled = OpenVINOLM(whole, threads)
        _CAUSAL[model] = state, compiled
    return compiled


class OpenVINOSession:
    """One sequence. fed: of each position its embedding, (1, 1, hidden); pairs: whether two tokens were fed last."""

    def __init__(self, model: OpenVINOLM) -> None:
        self.model, self.pages = model, model.take()
        self.fed, self.features, self.pairs = [], None, False
        weakref.finalize(self, model.give_back, self.pages).atexit = False

    @property
    def length(self) -> int:
        return len(self.fed)

    def prefill(self, prefix: Tensor) -> Tensor:
        """Embeddings (1, T, hidden), or ids (1, T), T >= 1, once -> logits (1, V) of the last position."""
        if self.length:
            raise RuntimeError("a session is prefilled once; open a new one")
        return self.feed(prefix if prefix.is_floating_point() else self.model.lm.speech_embedding(prefix))

    def feed(self, embeddings: Tensor) -> Tensor:
        """Embeddings (1, n, hidden), n >= 1 -> logits (1, V) of the last position."""
        return self._feed(embeddings, last=1)[:, -1]

    def extend(self, tokens: Tensor) -> Tensor:
        """Speech tokens (1, n) int64 -> logits (1, n, V), what follows each.

        A draft that was accepted as a whole is fed with two tokens, then with one and one. Each change of length
        costs in w8a8 almost half a step of it, for OpenVINO looks up its kernels anew; so after two tokens one comes
        with the one before it, whose keys and values turn out the same to the bit.
        """
        n, embeddings = tokens.shape[1], self.model.lm.speech_embedding(tokens)
        if self.pairs and n == 1 and self.fed:
            embeddings = torch.cat((self.fed.pop(), embeddings), 1)
        self.pairs = self.model.apart and embeddings.shape[1] == 2
        logits = self._feed(embeddings, n, self.model.apart)
        self.features = self.features if self.features is None else self.features[:, -n:]
        return logits

    def crop(self, length: int) -> None:
        """The one rollback: forget every position from ``length`` (at most self.length) on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} positions to {length}")
        del self.fed[length:]

    def _feed(self, embeddings: Tensor, last: int, apart: bool = False) -> Tensor:
        """Embeddings (1, n, hidden) -> logits (1, last, V) of the last positions; apart: each as its own sequence."""
        n, past = embeddings.shape[1], self.length
        self.pages.reserve(past + n)
        logits, *features = self.model.forward(self.pages, embeddings, [0], [past], [n], range(n - last, n), apart)
        self.fed += embeddings.split(1, 1)
        self.features = features[0] if features else None
        return logits


class OpenVINOBatch:
    """``decoding.batch.BatchSession``: each sequence has a row of pages. rows: of those that are still there."""

    def __init__(self, model: OpenVINOLM, count: int, room: int) -> None:
        self.model, self.pages = model, Pages(model.compiled, count, room)
        self.rows, self.lengths = list(range(count)), torch.zeros(count, dtype=torch.int64)

    def prefill(self, prefixes: list[Tensor]) -> Tensor:
        """Embeddings (1, T, hidden) of each -> logits (B, V) of their last positions."""
        counts = [prefix.shape[1] for prefix in prefixes]
        self.lengths, last = torch.tensor(counts), np.cumsum(counts) - 1
        given = torch.cat(prefixes, 1), self.rows, [0] * len(counts), counts, last
        return self.model.forward(self.pages, *given)[0][0]

    def extend(self, tokens: Tensor) -> Tensor:
        count, n = tokens.shape
        embeddings, past = self.model.lm.speech_embedding(tokens).flatten(0, 1)[None], self.lengths.tolist()
        given = embeddings, self.rows, past, [n] * count, range(count * n), self.model.apart
        logits = self.model.forward(self.pages, *given)[0]
        self.lengths = self.lengths + n
        return logits.view(count, n, -1)

    def keep(self, rows: Tensor) -> None:
        self.rows, self.lengths = [self.rows[row] for row in rows.tolist()], self.lengths[rows]
