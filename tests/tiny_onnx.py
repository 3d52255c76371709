"""A speech tokenizer of upstream's shapes, in ONNX, written by hand: the package onnx is no dependency.

Field numbers: onnx.proto. feats (1, 128, T) and their length -> int32 (1, 1, T / 4): the mean of
each frame, the greatest of four, its size times 1000.
"""

import struct


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    value = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _node(kind: str, inputs: list[str], output: str, **attributes) -> bytes:
    out = b"".join(_field(1, name) for name in inputs) + _field(2, output) + _field(4, kind)
    for name, value in attributes.items():
        many = isinstance(value, list)
        body = b"".join(_field(8, v) for v in value) if many else _field(3, value)
        out += _field(5, _field(1, name) + body + _field(20, 7 if many else 2))
    return _field(1, out)


def _value(number: int, name: str, kind: int, shape: list[int | str]) -> bytes:
    sizes = b"".join(_field(1, _field(1 if isinstance(n, int) else 2, n)) for n in shape)
    return _field(number, _field(1, name) + _field(2, _field(1, _field(1, kind) + _field(2, sizes))))


def speech_tokenizer() -> bytes:
    graph = _node("ReduceMean", ["feats"], "mean", axes=[1], keepdims=1)
    graph += _node("MaxPool", ["mean"], "pooled", kernel_shape=[4], strides=[4])
    graph += _node("Abs", ["pooled"], "size") + _node("Mul", ["size", "k"], "scaled")
    graph += _node("Cast", ["scaled"], "tokens", to=6) + _field(2, "tiny")
    graph += _field(5, _field(1, 1) + _field(2, 1) + _field(8, "k") + _field(9, struct.pack("<f", 1000.0)))
    graph += _value(11, "feats", 1, [1, 128, "T"]) + _value(11, "feats_length", 6, [1])
    graph += _value(12, "tokens", 6, [1, 1, "U"])
    return _field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13))
