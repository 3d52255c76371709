"""A decoder written down once in OpenVINO's operations, on the model's own weights.

Attention is the paged one that OpenVINO serves language models with. OpenVINO calls that operation experimental:
pyproject.toml admits the versions that were tried. The plugin makes one kernel of the rotary embedding only where its
halves are cut by Slice (a test counts these kernels).
"""

from __future__ import annotations

import numpy as np
import torch

from ..batch_session import kv_shape
from ..speech_lm import SpeechLM, in_int8

PAGE = 32  # positions; what the plugin's kernels are written for


def graph(lm: SpeechLM, int8: bool = False):
    """The whole forward as an openvino.Model; int8: its weights as whole numbers of -127 .. 127 times a scale."""
    from openvino import Model
    from openvino import opset13 as ops

    config = lm.model.config
    heads, (kv_heads, size) = config.num_attention_heads, kv_shape(lm)
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
