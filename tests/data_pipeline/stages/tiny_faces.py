"""A YuNet of the real file format with weights made by hand: a white square of 32 pixels is a face of 64 pixels.

ONNX is a protocol buffer; the few fields that OpenCV reads are written here, since the `onnx` package is not needed
for anything else.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

SIDE = 640
FLOAT, INTS = 1, 7  # codes of ONNX: data type of a tensor, type of an attribute


def save_tiny_faces(file: Path) -> Path:
    """For each stride one convolution an output, as YuNet has them; only the coarsest one sees anything."""
    nodes, weights, outputs = [], [], []
    for output, channels in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
        for stride in (8, 16, 32):
            name = f"{output}_{stride}"
            kernel = np.zeros((channels, 3, stride, stride), np.float32)
            bias = np.zeros(channels, np.float32)
            if stride == 32 and channels == 1:
                kernel[:] = 1 / (255 * 3 * 32 * 32)  # mean brightness of the cell, 0..1: how surely it is a face
            if output == "bbox":
                bias[:] = (0.5, 0.5, math.log(2), math.log(2))  # middle of the cell, twice its side
            weights += [_tensor(f"{name}.weight", kernel), _tensor(f"{name}.bias", bias)]
            steps = _ints("kernel_shape", stride, stride) + _ints("strides", stride, stride)
            nodes.append(_node("Conv", ["input", f"{name}.weight", f"{name}.bias"], f"{name}.rows", steps))
            nodes.append(_node("Transpose", [f"{name}.rows"], name, _ints("perm", 0, 2, 3, 1)))
            cells = SIDE // stride
            outputs.append(_value(name, 1, cells, cells, channels))
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, b"yunet")
    graph += b"".join(_field(5, weight) for weight in weights)
    graph += _field(11, _value("input", 1, 3, SIDE, SIDE)) + b"".join(_field(12, output) for output in outputs)
    file.write_bytes(_number(1, 7) + _field(7, graph) + _field(8, _field(1, b"") + _number(2, 13)))
    return file


def _varint(value: int) -> bytes:
    groups = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([group | 128 for group in groups[:-1]] + groups[-1:])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _tensor(name: str, values: np.ndarray) -> bytes:
    sizes = b"".join(_number(1, size) for size in values.shape)
    return sizes + _number(2, FLOAT) + _field(8, name.encode()) + _field(9, values.tobytes())


def _ints(name: str, *values: int) -> bytes:
    return _field(5, _field(1, name.encode()) + b"".join(_number(8, value) for value in values) + _number(20, INTS))


def _node(kind: str, inputs: list[str], output: str, attributes: bytes) -> bytes:
    read = b"".join(_field(1, name.encode()) for name in inputs)
    return read + _field(2, output.encode()) + _field(3, output.encode()) + _field(4, kind.encode()) + attributes


def _value(name: str, *shape: int) -> bytes:
    sizes = b"".join(_field(1, _number(1, size)) for size in shape)
    return _field(1, name.encode()) + _field(2, _field(1, _number(1, FLOAT) + _field(2, sizes)))
