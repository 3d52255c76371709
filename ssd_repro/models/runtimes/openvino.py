"""OpenVINO forwards for CPUs: one graph with its caches inside, for blocks of any length.

The decoder is written down once in OpenVINO's operations, on the model's own weights. Keys and
values are states of the graph, so a step copies none of them, and the weights are packed once for
all block lengths. OpenVINO's plugin makes one kernel of attention and cache, and one of the rotary
embedding, only where it finds its patterns: ReadValue -> Gather by an int32 beam index -> Concat ->
ScaledDotProductAttention, and halves that are cut by Slice (a test counts these kernels).

A rollback moves nothing: rejected positions stay in the cache and are masked for good.
"""

from __future__ import annotations

import weakref
from functools import cache

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaModel, PreTrainedModel, Qwen2Model, Qwen3Model

from ...errors import InputError
from ..speech_lm import SpeechLM, in_int8

DECODERS = (Qwen2Model, LlamaModel, Qwen3Model)  # what ``_graph`` writes down, and no class derived from them
# Of products. int8 is of weights alone; w8a8 rounds the inputs of their products, too, GROUP numbers to one scale.
PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "f32", "w8a8": "f32"}
GROUP = 128
ROOM = 1024  # positions; tables and masks grow by doubling


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
    """InputError for a decoder that ``_graph`` would not write down as it is."""
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

        self.lm, self.threads = lm, threads
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "KV_CACHE_PRECISION": PRECISIONS[precision],
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP if precision == "w8a8" else 0,  # 32 by default, with int8 weights
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # two processes would be pinned to the same core
        }
        self.compiled = openvino.Core().compile_model(_graph(lm, precision in ("int8", "w8a8")), "CPU", settings)
        self._free: list = []
        self._cos = self._sin = np.zeros((1, 1, 0, 0), np.float32)

    def session(self) -> OpenVINOSession:
        """A new sequence; its states return to this model's store when the session is dropped."""
        return OpenVINOSession(self)

    def take(self):
        """An infer request without any trace of an earlier sequence."""
        try:
            request = self._free.pop()  # atomic: threads may share a model
        except IndexError:
            return self.compiled.create_infer_request()
        request.reset_state()
        return request

    def give_back(self, request) -> None:
        self._free.append(request)

    def angles(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines of the rotary embedding, (1, 1, end - begin, head size) both."""
        if end > self._cos.shape[2]:
            places = torch.arange(max(ROOM, 2 * end))[None]
            cos, sin = self.lm.model.rotary_emb(torch.zeros(1), places)
            self._cos, self._sin = (x.float().numpy()[:, None] for x in (cos, sin))
        return self._cos[:, :, begin:end], self._sin[:, :, begin:end]


class _Whole:
    """A causal model of transformers as ``_graph`` knows a SpeechLM: tokens are ids of its one vocabulary."""

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
    """One sequence: ``length`` counts positions; ``slots`` what the states hold, rejected positions among them."""

    BEAM = np.zeros(1, np.int32)

    def __init__(self, model: OpenVINOLM) -> None:
        self.model, self.request = model, model.take()
        self.length, self.slots, self.features = 0, 0, None
        self.slot_of = np.zeros(ROOM, np.int64)  # of each position
        self.hidden = np.zeros(ROOM, np.float32)  # of each slot: 0, or -inf where it was rejected
        weakref.finalize(self, model.give_back, self.request).atexit = False

    def prefill(self, prefix: Tensor) -> Tensor:
        """Embeddings (1, T, hidden), or ids (1, T), T >= 1, once -> logits (1, V) of the last position."""
        if self.length:
            raise RuntimeError("a session is prefilled once; open a new one")
        return self.feed(prefix if prefix.is_floating_point() else self.model.lm.speech_embedding(prefix))

    def feed(self, embeddings: Tensor) -> Tensor:
        """Embeddings (1, n, hidden), n >= 1 -> logits (1, V) of the last position."""
        return self._feed(embeddings, last=1)[:, -1]

    def extend(self, tokens: Tensor) -> Tensor:
        """Speech tokens (1, n) int64 -> logits (1, n, V), what follows each."""
        return self._feed(self.model.lm.speech_embedding(tokens), last=tokens.shape[1])

    def crop(self, length: int) -> None:
        """The one rollback: forget every position from ``length`` (at most self.length) on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} positions to {length}")
        self.hidden[self.slot_of[length : self.length]] = -np.inf
        self.length = length

    @torch.inference_mode()
    def _feed(self, embeddings: Tensor, last: int) -> Tensor:
        """Embeddings (1, n, hidden) -> logits (1, last, V) of the last positions."""
        n, past = embeddings.shape[1], self.slots
        self._make_room(past + n)
        mask = self.hidden[None, : past + n]
        if n > 1:
            mask = np.repeat(mask, n, 0)
            mask[:, past:] += _later(n)
        cos, sin = self.model.angles(self.length, self.length + n)
        given = {
            "embeddings": embeddings.float().contiguous().numpy(),
            "cos": cos,
            "sin": sin,
            "mask": mask[None, None],
            "beam": self.BEAM,
            "last": np.arange(n - last, n, dtype=np.int32),
        }
        self.request.infer(given, share_inputs=True)
        self.slot_of[self.length : self.length + n] = np.arange(past, past + n)
        self.length, self.slots = self.length + n, past + n
        logits, *features = (torch.from_numpy(x.data.copy()) for x in self.request.output_tensors)
        self.features = features[0] if features else None
        return logits

    def _make_room(self, slots: int) -> None:
        if slots > len(self.hidden):
            self.hidden, self.slot_of = (np.concatenate((x, np.zeros_like(x))) for x in (self.hidden, self.slot_of))
            self._make_room(slots)


@cache
def _later(n: int) -> np.ndarray:
    """(n, n): -inf where a position of a block would see a later one."""
    return np.triu(np.full((n, n), -np.inf, np.float32), 1)


def _graph(lm: SpeechLM, int8: bool = False):
    """The whole forward as an openvino.Model; int8: its weights as whole numbers of -127 .. 127 times a scale."""
    from openvino import Model
    from openvino import opset13 as ops

    config = lm.model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    inputs = {
        "embeddings": ([1, -1, config.hidden_size], np.float32),
        "cos": ([1, 1, -1, size], np.float32),
        "sin": ([1, 1, -1, size], np.float32),
        "mask": ([1, 1, -1, -1], np.float32),  # (1, 1, n, slots + n), added to the scores
        "beam": ([-1], np.int32),
        "last": ([-1], np.int32),  # the places whose logits are asked for
    }
    nodes = {name: ops.parameter(shape, kind, name=name) for name, (shape, kind) in inputs.items()}
    for name, node in nodes.items():
        node.output(0).get_tensor().set_names({name})

    def integers(*values: int):
        return ops.constant(np.array(values, np.int64))

    def linear(x, *layers):
        """Several projections of the same input, as one."""
        weight = torch.cat([layer.weight.detach().float() for layer in layers])
        if int8:
            whole, scale = (ops.constant(each.numpy()) for each in in_int8(weight))
            constant = ops.multiply(ops.convert(whole, np.float32), scale)
        else:
            constant = ops.constant(weight.numpy())
        product = ops.matmul(x, constant, False, True)
        if layers[0].bias is None:
            return product
        return ops.add(product, ops.constant(torch.cat([layer.bias.detach().float() for layer in layers]).numpy()))

    def normalise(x, norm):
        square = ops.reduce_mean(ops.power(x, ops.constant(np.float32(2))), integers(-1), keep_dims=True)
        root = ops.sqrt(ops.add(square, ops.constant(np.float32(config.rms_norm_eps))))
        scaled = ops.multiply(x, ops.divide(ops.constant(np.float32(1)), root))
        return ops.multiply(ops.constant(norm.weight.detach().float().numpy()), scaled)

    def by_head(x, count: int):
        return ops.transpose(ops.reshape(x, integers(1, -1, count, size), False), integers(0, 2, 1, 3))

    def rotate(x):
        left = ops.slice(x, integers(0), integers(size // 2), integers(1), integers(3))
        right = ops.slice(x, integers(size // 2), integers(size), integers(1), integers(3))
        turned = ops.concat([ops.multiply(right, ops.constant(np.float32(-1))), left], -1)
        return ops.add(ops.multiply(x, nodes["cos"]), ops.multiply(turned, nodes["sin"]))

    sinks = []

    def remember(x, name: str):
        """The state ``name`` with x, (1, kv heads, n, head size), behind it; one copy a query head."""
        empty = ops.broadcast(ops.constant(np.float32(0)), integers(1, kv_heads, 0, size))
        kept = ops.read_value(empty, name, np.float32, [-1, kv_heads, -1, size])
        kept = ops.gather(kept, nodes["beam"], ops.constant(np.int64(0)))
        whole = ops.concat([kept, x], 2)
        sinks.append(ops.assign(whole, name))
        if heads == kv_heads:
            return whole
        shape = integers(1, 1, heads // kv_heads, 1, 1)
        many = ops.broadcast(ops.unsqueeze(whole, integers(2)), shape, broadcast_spec="BIDIRECTIONAL")
        return ops.reshape(many, integers(1, heads, -1, size), False)

    x, depths = nodes["embeddings"], []
    for number, layer in enumerate(lm.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        joined = linear(normalise(x, layer.input_layernorm), attention.q_proj, attention.k_proj, attention.v_proj)
        lengths = integers(heads * size, kv_heads * size, kv_heads * size)
        q, k, v = ops.variadic_split(joined, integers(-1), lengths).outputs()
        q, k = by_head(q, heads), by_head(k, kv_heads)
        if hasattr(attention, "q_norm"):
            q, k = normalise(q, attention.q_norm), normalise(k, attention.k_norm)
        key = remember(rotate(k), f"key{number}")
        value = remember(by_head(v, kv_heads), f"value{number}")
        seen = ops.scaled_dot_product_attention(rotate(q), key, value, nodes["mask"])
        seen = ops.reshape(ops.transpose(seen, integers(0, 2, 1, 3)), integers(1, -1, heads * size), False)
        x = ops.add(x, linear(seen, attention.o_proj))
        both = linear(normalise(x, layer.post_attention_layernorm), mlp.gate_proj, mlp.up_proj)
        gate, up = ops.split(both, ops.constant(np.int64(-1)), 2).outputs()
        x = ops.add(x, linear(ops.multiply(ops.swish(gate), up), mlp.down_proj))
        depths.append(x)
    if lm.taps:
        x = depths[-1] = normalise(x, lm.model.norm)
    x = ops.gather(x, nodes["last"], ops.constant(np.int64(1)))
    x = x if lm.taps else normalise(x, lm.model.norm)
    for part in lm.head if isinstance(lm.head, torch.nn.Sequential) else [lm.head]:
        x = linear(x, part)
    outputs = [x, *([ops.concat([depths[tap - 1] for tap in lm.taps], -1)] if lm.taps else [])]
    return Model([node.output(0) for node in outputs], sinks, list(nodes.values()), "speech_lm")
