"""OpenVINO forwards for CPUs: one graph for blocks of any length, keys and values in pages beside it.

The decoder is written down once in OpenVINO's operations, on the model's own weights, which are packed once for all
block lengths. Attention is the paged one that OpenVINO serves language models with: it writes a block's keys and
values into its pages and reads all of them there, so a step copies none, and a rollback is a smaller length. OpenVINO
calls that operation experimental: pyproject.toml pins what was tried. The plugin makes one kernel of the rotary
embedding only where its halves are cut by Slice (a test counts these kernels).
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
# Where rounding shows, the places of a verification are as many sequences over the same pages: each runs through the
# kernel of a step, and its logits are a step's to the bit. In fp32 one block is faster, and the same but for 1e-5.
APART = ("bf16", "w8a8")
PAGE = 32  # positions; what the plugin's kernels are written for
ROOM = 512  # positions; pages and tables grow by doubling


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

        self.lm, self.threads, self.apart = lm, threads, precision in APART
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "KV_CACHE_PRECISION": PRECISIONS[precision],
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP if precision == "w8a8" else 0,  # 32 by default, with int8 weights
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # two processes would be pinned to the same core
        }
        self.compiled = openvino.Core().compile_model(_graph(lm, precision in ("int8", "w8a8")), "CPU", settings)
        self._free: list[Pages] = []
        self._cos = self._sin = np.zeros((1, 1, 0, 0), np.float32)

    def session(self) -> OpenVINOSession:
        """A new sequence; its pages return to this model's store when the session is dropped."""
        return OpenVINOSession(self)

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

    def angles(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines of the rotary embedding, (1, 1, end - begin, head size) both."""
        if end > self._cos.shape[2]:
            places = torch.arange(max(ROOM, 2 * end))[None]
            cos, sin = self.lm.model.rotary_emb(torch.zeros(1), places)
            self._cos, self._sin = (x.float().numpy()[:, None] for x in (cos, sin))
        return self._cos[:, :, begin:end], self._sin[:, :, begin:end]


class Pages:
    """An infer request and the keys and values of one sequence, of each layer (pages, kv heads, PAGE, head size).

    room: positions that they have place for; used: positions that ever were written.
    """

    def __init__(self, compiled) -> None:
        self.request, self.room, self.used = compiled.create_infer_request(), 0, 0
        self.ports = [port for port in compiled.inputs if port.any_name.startswith(("key", "value"))]
        self.reserve(ROOM)

    def reserve(self, positions: int) -> None:
        """Make room for so many, what is there stays."""
        import openvino

        self.used = max(self.used, positions) if self.room else 0
        if positions <= self.room:
            return
        count = -(-max(positions, 2 * self.room) // PAGE)
        for port in self.ports:
            shape = [count, *(port.partial_shape[axis].get_length() for axis in (1, 2, 3))]
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
    """One sequence: ``length`` counts its positions."""

    def __init__(self, model: OpenVINOLM) -> None:
        self.model, self.pages = model, model.take()
        self.length, self.features = 0, None
        weakref.finalize(self, model.give_back, self.pages).atexit = False

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
        return self._feed(self.model.lm.speech_embedding(tokens), tokens.shape[1], self.model.apart)

    def crop(self, length: int) -> None:
        """The one rollback: forget every position from ``length`` (at most self.length) on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} positions to {length}")
        self.length = length

    @torch.inference_mode()
    def _feed(self, embeddings: Tensor, last: int, apart: bool = False) -> Tensor:
        """Embeddings (1, n, hidden) -> logits (1, last, V) of the last positions; apart: each as its own sequence."""
        n, past = embeddings.shape[1], self.length
        self.pages.reserve(past + n)
        cos, sin = self.model.angles(past, past + n)
        begins = np.arange(0, n + 1, 1 if apart else n, dtype=np.int32)
        pages = -(-(past + begins[1:]) // PAGE)  # of each sequence
        given = {
            "embeddings": embeddings.float().contiguous().numpy(),
            "cos": cos,
            "sin": sin,
            "last": np.arange(n - last, n, dtype=np.int32),
            "past": past + begins[:-1],
            "begins": begins,
            "pages": np.concatenate([np.arange(count, dtype=np.int32) for count in pages]),
            "page_begins": np.concatenate(([0], pages.cumsum(dtype=np.int32))).astype(np.int32),
            "longest": np.array(past + n, np.int32),
        }
        request = self.pages.request
        request.infer(given, share_inputs=True)
        self.length = past + n
        logits, *features = (torch.from_numpy(x.data.copy()) for x in request.output_tensors)
        self.features = features[0] if features else None
        return logits


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
        "last": ([-1], np.int32),  # the places whose logits are asked for
        "past": ([-1], np.int32),  # of each sequence: positions before it
        "begins": ([-1], np.int32),  # where its positions begin among those that are fed, and their number
        "pages": ([-1], np.int32),  # of all sequences, one after the other
        "page_begins": ([-1], np.int32),  # where those of each sequence begin, and their number
        "longest": ([], np.int32),  # positions of the longest sequence
    }
    kept = [f"{kind}{number}" for number in range(len(lm.model.layers)) for kind in ("key", "value")]
    inputs |= {name: ([-1, kv_heads, PAGE, size], np.float32) for name in kept}
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

    def rotate(x, count: int, norm):
        x = ops.reshape(x, integers(1, -1, count, size), False)
        x = ops.transpose(normalise(x, norm) if norm else x, integers(0, 2, 1, 3))
        left = ops.slice(x, integers(0), integers(size // 2), integers(1), integers(3))
        right = ops.slice(x, integers(size // 2), integers(size), integers(1), integers(3))
        turned = ops.concat([ops.multiply(right, ops.constant(np.float32(-1))), left], -1)
        turned = ops.add(ops.multiply(x, nodes["cos"]), ops.multiply(turned, nodes["sin"]))
        return ops.reshape(ops.transpose(turned, integers(0, 2, 1, 3)), integers(-1, count * size), False)

    attend = _attention(nodes, kv_heads, size)
    x, depths = nodes["embeddings"], []
    for number, layer in enumerate(lm.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        joined = linear(normalise(x, layer.input_layernorm), attention.q_proj, attention.k_proj, attention.v_proj)
        lengths = integers(heads * size, kv_heads * size, kv_heads * size)
        q, k, v = ops.variadic_split(joined, integers(-1), lengths).outputs()
        q = rotate(q, heads, getattr(attention, "q_norm", None))
        k = rotate(k, kv_heads, getattr(attention, "k_norm", None))
        seen = attend(number, q, k, ops.reshape(v, integers(-1, kv_heads * size), False))
        seen = ops.reshape(seen, integers(1, -1, heads * size), False)
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
    return Model([node.output(0) for node in outputs], list(nodes.values()), "speech_lm")


def _attention(nodes: dict, kv_heads: int, size: int):
    """-> (layer's number, q, k, v), of n positions (n, heads x size) each -> what they saw, (n, heads x size)."""
    from openvino import opset13 as ops
    from openvino.op import _PagedAttentionExtension as PagedAttention

    def unused(kind=np.int32):
        return ops.constant(np.zeros(0, kind)).output(0)

    def number(value, kind=np.int32):
        return ops.constant(np.array(value, kind)).output(0)

    places = [nodes[name].output(0) for name in ("past", "begins", "pages", "page_begins")]
    rest = [
        number(size**-0.5, np.float32),  # of the scores
        number(0),  # no sliding window
        unused(np.float32),  # alibi's slopes
        nodes["longest"].output(0),
        *(unused(), unused(), unused(), unused(np.float32)),  # scores to hand out; caches that are turned
        *(unused(np.float32), number(64), number(8), unused(np.float32)),  # sparse attention, sinks
        *(number(0), unused(), unused(), unused()),  # eviction
        *(unused(), unused(np.uint8), unused()),  # kinds of tokens, trees of drafted tokens
    ]

    def attend(layer: int, q, k, v):
        kept = [nodes[f"{kind}{layer}"].output(0) for kind in ("key", "value")]
        made = PagedAttention([q.output(0), k.output(0), v.output(0), *kept, *places, *rest])
        for kind in ("k", "v"):  # the plugin asks for them there
            made.get_rt_info()[f"num_{kind}_heads"] = kv_heads
            made.get_rt_info()[f"{kind}_head_size"] = size
        return made.output(0)

    return attend
