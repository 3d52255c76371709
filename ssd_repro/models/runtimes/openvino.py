"""OpenVINO forwards for CPUs: the decoder as a graph, compiled once for each number of rows that is asked for.

The decoder is written down once in OpenVINO's operations, on the model's own weights. Keys and values lie outside of
it, in one array of a session that grows by ROOM positions: they are inputs, which a forward reads in place, and what
it adds to them is an output. So shapes change once in ROOM positions and not with every token, attention is a matrix
product over all rows of a block (OpenVINO's own kernel of attention and cache takes row after row, and a verification
of four three times a step's time for it), and a rollback is a number.

WEIGHTS: a matrix that is whole numbers of -127 .. 127 times a scale of each row, as the bundled voice's are, stands in
the graph as these: the same numbers, in a quarter of the bytes. Products are in fp32; logits are eager's but for
rounding. So a graph of its own for each number of rows, some four fifths of the time of one for any number, is cheap.

Prefills share one graph for any number. The rotary embedding is one kernel only where the plugin finds its pattern,
halves that are cut by Slice (a test counts these kernels).
"""

from __future__ import annotations

import threading
import weakref
from functools import cache

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaModel, PreTrainedModel, Qwen2Model, Qwen3Model

from ...errors import InputError
from ..int8 import by_row, is_by_row
from ..speech_lm import SpeechLM

DECODERS = (Qwen2Model, LlamaModel, Qwen3Model)  # what ``_graph`` writes down, and no class derived from them
PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}  # of products; int8: weights are rounded to it
ROOM = 128  # positions by which a session's cache grows
NARROW = 16  # so many rows at most have a graph of their own
WIDE, MOST = 32, 256  # more share one, in blocks of at most MOST rows, filled up to a multiple of WIDE: few shapes
ANY = -1  # number of rows of the graph that they share


@cache
def capabilities() -> tuple[str, ...]:
    """What this CPU computes in, such as FP32, INT8, BF16. InputError without OpenVINO."""
    try:
        import openvino
    except ImportError:
        raise InputError("runtime openvino needs the package openvino, or choose runtime eager") from None
    return tuple(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


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
    precision: 'fp32'; 'int8' weights, a scale for each output, products in fp32; 'bf16' weights and
    products where the CPU computes in it. Logits come as float32. InputError if one cannot be had.
    weight_bytes: of a weight in memory; 1 in fp32, too, where that rounds nothing.
    """

    def __init__(self, lm: SpeechLM, threads: int, precision: str = "fp32") -> None:
        check_decoder(lm.model)
        if lm.head.weight.device.type != "cpu":
            raise InputError(f"runtime openvino is for the CPU, the model is on {lm.head.weight.device}")
        if precision not in PRECISIONS or PRECISIONS[precision].upper() not in ("F32", *capabilities()):
            raise InputError(f"runtime openvino on this CPU has no precision {precision!r}: choose fp32 or int8")
        self.lm, self.threads = lm, threads
        self.settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # two processes would be pinned to the same core
        }
        self.graph, self.weight_bytes = _graph(lm, precision)
        self._compiled: dict = {}  # rows -> the graph for so many
        self._free: dict[int, list] = {}  # rows -> infer requests that no session has
        self._lock = threading.Lock()  # threads may share a model
        self._cos = self._sin = np.zeros((1, 1, 0, 0), np.float32)
        self.compiled(ANY)

    def session(self) -> OpenVINOSession:
        """A new sequence; its infer requests return to this model's store when the session is dropped."""
        return OpenVINOSession(self)

    def compiled(self, rows: int):
        """The graph for blocks of so many rows; it takes seconds where it is asked for the first time."""
        with self._lock:
            if rows not in self._compiled:
                import openvino

                graph, shapes = self.graph.clone(), {}  # the clone has the same weights
                for each in graph.inputs:
                    shape = each.partial_shape
                    for place in ROWS.get(each.any_name, ()):
                        shape[place] = rows
                    shapes[each.any_name] = shape
                graph.reshape(shapes)
                self._compiled[rows] = openvino.Core().compile_model(graph, "CPU", self.settings)
            return self._compiled[rows]

    def take(self, rows: int):
        """An infer request of ``compiled(rows)``."""
        try:
            return self._free[rows].pop()  # atomic
        except (KeyError, IndexError):
            return self.compiled(rows).create_infer_request()

    def give_back(self, requests: dict) -> None:
        for rows, request in requests.items():
            self._free.setdefault(rows, []).append(request)

    def angles(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines of the rotary embedding, (1, 1, end - begin, head size) both."""
        if end > self._cos.shape[2]:
            places = torch.arange(max(1024, 2 * end))[None]
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
    """One sequence. cache (2 x layers, key-value heads, room, head size): keys and values, of ``length`` positions."""

    def __init__(self, model: OpenVINOLM) -> None:
        self.model, self.length, self.features = model, 0, None
        layers, *shape = _cache_shape(model.lm.model.config)
        self.cache = np.zeros((2 * layers, shape[0], 1, shape[1]), np.float32)  # a prefill has nothing to look back at
        self.requests: dict = {}  # rows -> infer request
        self.bound: set[int] = set()  # rows of those that read ``cache``
        weakref.finalize(self, model.give_back, self.requests).atexit = False

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
        self.length = length

    @torch.inference_mode()
    def _feed(self, embeddings: Tensor, last: int) -> Tensor:
        """Embeddings (1, n, hidden) -> logits (1, last, V) of the last positions."""
        n = embeddings.shape[1]
        blocks = [self._block(block.float().numpy(), last > 1) for block in embeddings.split(min(n, MOST), 1)]
        logits, *features = (torch.cat(parts, 1) for parts in zip(*blocks, strict=True))
        self.features = features[0] if features else None
        return logits[:, -last:]

    def _block(self, embeddings: np.ndarray, every: bool) -> list[Tensor]:
        """Embeddings (1, n, hidden) -> logits (1, n, V), or (1, 1, V) of the last, and the features, if any."""
        n, past = embeddings.shape[1], self.length
        narrow = n <= NARROW
        rows = n if narrow else -(-n // WIDE) * WIDE
        request = self._request(rows if narrow else ANY)
        mask = np.full((rows, self.cache.shape[2] + rows), -np.inf, np.float32)
        mask[:, :past], mask[:, -rows:] = 0.0, _later(rows)
        cos, sin = self.model.angles(past, past + rows)
        given = {
            "embeddings": np.pad(embeddings, ((0, 0), (0, rows - n), (0, 0))) if n < rows else embeddings,
            "cos": cos,
            "sin": sin,
            "mask": mask,
            "last": np.arange(0 if every else n - 1, n, dtype=np.int32),
        }
        request.infer(given, share_inputs=True)
        news, logits, *features = (each.data for each in request.output_tensors)
        self._make_room(past + n)
        self.cache[:, :, past : past + n] = news[:, :, :n]
        self.length += n
        return [torch.from_numpy(each.copy()) for each in (logits, *(each[:, :n] for each in features))]

    def _make_room(self, positions: int) -> None:
        if positions > self.cache.shape[2]:
            more = -(-positions // ROOM) * ROOM - self.cache.shape[2]
            self.cache = np.pad(self.cache, ((0, 0), (0, 0), (0, more), (0, 0)))
            self.bound.clear()

    def _request(self, rows: int):
        """The infer request for so many rows, or ANY, its inputs bound to the cache."""
        if rows not in self.requests:
            self.requests[rows] = self.model.take(rows)
        if rows not in self.bound:
            from openvino import Tensor as Shared

            for place, each in enumerate(self.cache):
                self.requests[rows].set_tensor(f"cache{place}", Shared(each, shared_memory=True))
            self.bound.add(rows)
        return self.requests[rows]


def _cache_shape(config) -> tuple[int, int, int]:
    """Layers, key-value heads, head size."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, size


@cache
def _later(n: int) -> np.ndarray:
    """(n, n): -inf where a position of a block would see a later one."""
    return np.triu(np.full((n, n), -np.inf, np.float32), 1)


ROWS = {"embeddings": (1,), "cos": (2,), "sin": (2,), "mask": (0,)}  # inputs of ``_graph``: where their rows stand


def _graph(lm: SpeechLM, precision: str):
    """The whole forward as an openvino.Model, and the bytes of a weight in it: 1 if all matrices are int8.

    Outputs: keys and values of the new positions, shaped as a session's cache; logits; the features, if any.
    """
    from openvino import Model
    from openvino import opset13 as ops

    config = lm.model.config
    layers, kv_heads, size = _cache_shape(config)
    heads = config.num_attention_heads
    inputs = {
        "embeddings": ([1, -1, config.hidden_size], np.float32),
        "cos": ([1, 1, -1, size], np.float32),
        "sin": ([1, 1, -1, size], np.float32),
        "mask": ([-1, -1], np.float32),  # (n, room + n), added to the scores
        "last": ([-1], np.int32),  # the places whose logits are asked for
        **{f"cache{place}": ([kv_heads, -1, size], np.float32) for place in range(2 * layers)},
    }
    nodes = {name: ops.parameter(shape, kind, name=name) for name, (shape, kind) in inputs.items()}
    for name, node in nodes.items():
        node.output(0).get_tensor().set_names({name})

    def integers(*values: int):
        return ops.constant(np.array(values, np.int64))

    weight_bytes = []  # of each matrix

    def linear(x, *layers):
        """Several projections of the same input, as one."""
        weight = torch.cat([layer.weight.detach().float() for layer in layers])
        if precision == "int8" or (precision == "fp32" and is_by_row(weight)):
            whole, scale = (ops.constant(each.numpy()) for each in by_row(weight))
            constant = ops.multiply(ops.convert(whole, np.float32), scale)
            weight_bytes.append(1)
        else:
            constant = ops.constant(weight.numpy())
            weight_bytes.append(2 if precision == "bf16" else 4)
        product = ops.matmul(x, constant, False, True)
        if layers[0].bias is None:
            return product
        return ops.add(product, ops.constant(torch.cat([layer.bias.detach().float() for layer in layers]).numpy()))

    def normalise(x, norm):
        square = ops.reduce_mean(ops.power(x, ops.constant(np.float32(2))), integers(-1), keep_dims=True)
        root = ops.sqrt(ops.add(square, ops.constant(np.float32(config.rms_norm_eps))))
        scaled = ops.multiply(x, ops.divide(ops.constant(np.float32(1)), root))
        return ops.multiply(ops.constant(norm.weight.detach().float().numpy()), scaled)

    def split(x, *counts: int):
        """(1, sum of counts, n, size) -> its heads, so many each."""
        return ops.variadic_split(x, integers(1), integers(*counts)).outputs()

    def rotate(x):
        left = ops.slice(x, integers(0), integers(size // 2), integers(1), integers(3))
        right = ops.slice(x, integers(size // 2), integers(size), integers(1), integers(3))
        turned = ops.concat([ops.multiply(right, ops.constant(np.float32(-1))), left], -1)
        return ops.add(ops.multiply(x, nodes["cos"]), ops.multiply(turned, nodes["sin"]))

    def sizes(name: str, axis: int):
        return ops.gather(ops.shape_of(nodes[name]), integers(axis), ops.constant(np.int64(0)))

    rows, wide = sizes("mask", 0), sizes("mask", 1)
    room, grouped = ops.subtract(wide, rows), integers(kv_heads, heads // kv_heads)
    news = []  # (kv heads, n, size) each

    def attend(q, k, v):
        """q (1, heads, n, size), scaled; k, v (1, kv heads, n, size) -> (1, heads, n, size)."""
        key, value = (nodes[f"cache{len(news) + i}"] for i in range(2))
        k, v = (ops.squeeze(each, integers(0)) for each in (k, v))
        news.extend((k, v))
        q = ops.reshape(q, integers(kv_heads, -1, size), False)  # the query heads of a key-value head are rows of it
        cached = ops.transpose(ops.matmul(key, q, False, True), integers(0, 2, 1))
        scores = ops.concat([cached, ops.matmul(q, k, False, True)], 2)
        scores = ops.add(ops.reshape(scores, ops.concat([grouped, rows, wide], 0), False), nodes["mask"])
        weights = ops.reshape(ops.softmax(scores, -1), ops.concat([integers(kv_heads, -1), wide], 0), False)
        old, new = ops.variadic_split(weights, integers(2), ops.concat([room, rows], 0)).outputs()
        seen = ops.add(ops.matmul(old, value, False, False), ops.matmul(new, v, False, False))
        return ops.reshape(seen, integers(1, heads, -1, size), False)

    x, depths = nodes["embeddings"], []
    for layer in lm.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        joined = linear(normalise(x, layer.input_layernorm), attention.q_proj, attention.k_proj, attention.v_proj)
        joined = ops.reshape(joined, integers(1, -1, heads + 2 * kv_heads, size), False)
        both, v = split(ops.transpose(joined, integers(0, 2, 1, 3)), heads + kv_heads, kv_heads)
        if hasattr(attention, "q_norm"):
            q, k = split(both, heads, kv_heads)
            both = ops.concat([normalise(q, attention.q_norm), normalise(k, attention.k_norm)], 1)
        q, k = split(rotate(both), heads, kv_heads)
        seen = attend(ops.multiply(q, ops.constant(np.float32(size**-0.5))), k, v)
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
    outputs = [ops.concat([ops.unsqueeze(each, integers(0)) for each in news], 0), x]
    outputs += [ops.concat([depths[tap - 1] for tap in lm.taps], -1)] if lm.taps else []
    return Model([node.output(0) for node in outputs], list(nodes.values()), "speech_lm"), max(weight_bytes)
