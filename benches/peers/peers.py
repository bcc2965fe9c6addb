#!/usr/bin/env python3
"""Measures peers that are Python packages, as src/measure.rs measures those that are crates; README.md says how.

The other program starts this one and tells it when to take a round (src/workers.rs). Each peer is optional; a missing
package is noted as such. Calls through Python cost some microseconds a product.
"""

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from importlib.metadata import version

BATCHES = [1, 8, 128]
BLOCK = 64
COPIES = 16
COLD_BYTES = 150_000_000
SAMPLE = 4e6  # ns
SLOW = 400e6  # ns
SLOW_ROUNDS = 3
WRONG = 0.03
CONVERTED_ROWS = 256


class Problem:
    """Weights [rows, cols] and inputs [128, cols], normally distributed, and the weights in two 4-bit formats."""

    def __init__(self, rows, cols, threads):
        import numpy as np

        rng = np.random.default_rng(1)
        self.rows, self.cols, self.threads = rows, cols, threads
        self.weights = rng.normal(0, 0.02, (rows, cols)).astype(np.float32)
        self.inputs = rng.normal(0, 1, (BATCHES[-1], cols)).astype(np.float32)
        self.bytes = rows * cols * 9 // 16
        self.copies = min(max(-(-COLD_BYTES // self.bytes), 2), COPIES)
        blocks = self.weights.reshape(rows, -1, BLOCK)
        self.absmax = np.abs(blocks).max(axis=2, keepdims=True)
        # The quantiles of QLoRA's NF4, as bitsandbytes rounds them.
        self.codebook = np.array([
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ], dtype=np.float32)
        edges = (self.codebook[1:] + self.codebook[:-1]) / 2
        self.nf4 = np.searchsorted(edges, blocks / self.absmax).astype(np.uint8)
        self.nf4_weights = (self.codebook[self.nf4] * self.absmax).reshape(rows, cols)
        self.scale = self.absmax / np.float32(7)
        self.int4 = np.clip(np.rint(blocks / self.scale), -8, 7).astype(np.int8)
        self.int4_weights = (self.int4.astype(np.float32) * self.scale).reshape(rows, cols)


def pack(codes, first_high):
    """Two codes a byte."""
    codes = codes.reshape(codes.shape[0], -1)
    high, low = (codes[:, ::2], codes[:, 1::2]) if first_high else (codes[:, 1::2], codes[:, ::2])
    return (high << 4) | low


class Peer:
    """`product(batch)` gives [batch, rows] of the first matrix; `cold(i)` multiplies one vector with matrices that are
    not in the cache, `cold_count` of them. `quantize()` and `dequantize()` convert the first rows, if it has them."""

    batches = BATCHES
    cold_count = 1
    converts = False

    def __init__(self, library, name, weights):
        self.library, self.name, self.weights = library, name, weights

    @property
    def version(self):
        return version(self.library)


class Read(Peer):
    """The pure read of the other program, in this one: what both have in common. It has no product to check."""

    batches, version = [1], ""

    def __init__(self, p, library):
        import numpy as np

        super().__init__("read", "the same read, called from Python", None)
        self.function = ctypes.CDLL(library).yardstick_read
        self.function.argtypes, self.function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], None
        self.matrices = [np.full(p.bytes, i + 1, np.uint8) for i in range(p.copies)]
        self.threads = p.threads

    def read(self, matrix):
        self.function(matrix.ctypes.data, matrix.size, self.threads)

    def product(self, _):
        self.read(self.matrices[0])

    def cold(self, i):
        self.read(self.matrices[i % len(self.matrices)])


class Onnx(Peer):
    def __init__(self, p, kind):
        import onnxruntime

        name = {
            "nf4": "onnxruntime NF4 (MatMulBnb4)",
            "int8": "onnxruntime int4 (MatMulNBits), int8 inputs",
            "f32": "onnxruntime int4 (MatMulNBits), f32 inputs",
        }[kind]
        super().__init__("onnxruntime", name, p.nf4_weights if kind == "nf4" else p.int4_weights)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = p.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3

        def session(count):
            model = self.model(p, kind, count).SerializeToString()
            return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

        self.hot, self.all, self.cold_count = session(1), session(p.copies), p.copies
        self.inputs = {n: {"x": p.inputs[:n]} for n in BATCHES}

    @staticmethod
    def model(p, kind, count):
        import numpy as np
        from onnx import TensorProto, helper, numpy_helper

        nodes, tensors, outputs = [], [], []
        for i in range(count):
            w, s, y = f"w{i}", f"s{i}", f"y{i}"
            # Other matrices have the rows of the first in another order, so that none can be shared.
            scale = np.roll(p.absmax if kind == "nf4" else p.scale, i, axis=0)
            attributes = {"K": p.cols, "N": p.rows, "block_size": BLOCK}
            if kind == "nf4":
                packed = pack(np.roll(p.nf4, i, axis=0), True).reshape(-1)
                operator, attributes["quant_type"] = "MatMulBnb4", 1
            else:
                codes = np.roll(p.int4 + 8, i, axis=0).astype(np.uint8)
                packed = pack(codes, False).reshape(p.rows, p.cols // BLOCK, BLOCK // 2)
                operator, attributes["bits"] = "MatMulNBits", 4
                attributes["accuracy_level"] = {"int8": 4, "f32": 1}[kind]
            nodes.append(helper.make_node(operator, ["x", w, s], [y], domain="com.microsoft", **attributes))
            tensors += [numpy_helper.from_array(packed, w), numpy_helper.from_array(scale.reshape(-1), s)]
            outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, ["batch", p.rows]))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", p.cols])
        graph = helper.make_graph(nodes, "peers", [x], outputs, tensors)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def product(self, batch):
        return self.hot.run(None, self.inputs[batch])[0]

    def cold(self, _):
        self.all.run(None, self.inputs[1])


class OpenVino(Peer):
    def __init__(self, p, kind):
        import openvino

        name = {
            "nf4": "OpenVINO NF4, f32 inputs",
            "f32": "OpenVINO int4, f32 inputs",
            "int8": "OpenVINO int4, int8 inputs",
        }[kind]
        super().__init__("openvino", name, p.nf4_weights if kind == "nf4" else p.int4_weights)
        # With groups of inputs it rounds them to 8 bits, on CPUs where that is faster.
        config = {
            "INFERENCE_NUM_THREADS": p.threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": BLOCK if kind == "int8" else 0,
            "NUM_STREAMS": 1,
        }

        # A constant made of a tensor shares its memory, and does not own it.
        self.kept = []

        def request(batch, count):
            model = self.model(p, kind, batch, count, self.kept)
            return openvino.Core().compile_model(model, "CPU", config).create_infer_request()

        self.hot = {n: request(n, 1) for n in BATCHES}
        self.all, self.cold_count = request(1, p.copies), p.copies
        self.inputs = {n: [p.inputs[:n]] for n in BATCHES}

    @staticmethod
    def model(p, kind, batch, count, kept):
        import numpy as np
        import openvino
        from openvino import opset13 as ops

        x, results = ops.parameter([batch, p.cols], np.float32), []
        for i in range(count):
            codes, scale = (p.nf4, p.absmax) if kind == "nf4" else (p.int4, p.scale)
            packed = np.ascontiguousarray(pack(np.roll(codes, i, axis=0).astype(np.uint8) & 15, False))
            kept.append(packed)
            element = openvino.Type.nf4 if kind == "nf4" else openvino.Type.i4
            w = ops.constant(openvino.Tensor(packed, [p.rows, p.cols // BLOCK, BLOCK], element))
            w = ops.multiply(ops.convert(w, np.float32), ops.constant(np.roll(scale, i, axis=0)))
            w = ops.reshape(w, ops.constant(np.array([p.rows, p.cols])), False)
            results.append(ops.matmul(x, w, False, True))
        return openvino.Model(results, [x], "peers")

    def product(self, batch):
        self.hot[batch].infer(self.inputs[batch], share_inputs=True)
        return self.hot[batch].get_output_tensor(0).data

    def cold(self, _):
        self.all.infer(self.inputs[1], share_inputs=True)


class BitsAndBytes(Peer):
    converts = True

    def __init__(self, p):
        import bitsandbytes
        import torch

        torch.set_num_threads(p.threads)
        weight = torch.from_numpy(p.weights)

        def layer():
            made = bitsandbytes.nn.Linear4bit(
                p.cols, p.rows, bias=False, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4"
            )
            made.weight = bitsandbytes.nn.Params4bit(
                weight, requires_grad=False, compress_statistics=False, quant_type="nf4", module=made
            )
            return made.to("cpu")

        self.torch, self.layers = torch, [layer() for _ in range(p.copies)]
        self.functional, self.converted = bitsandbytes.functional, weight[:CONVERTED_ROWS].contiguous()
        w = self.layers[0].weight
        assert w.dtype == torch.uint8, "the weight was not quantized"
        weights = bitsandbytes.functional.dequantize_4bit(w.data, w.quant_state)
        super().__init__("bitsandbytes", "bitsandbytes NF4 (Linear4bit)", weights.float().numpy())
        self.inputs = {n: torch.from_numpy(p.inputs[:n]) for n in BATCHES}

    def run(self, layer, batch):
        with self.torch.inference_mode():
            return layer(self.inputs[batch])

    def product(self, batch):
        return self.run(self.layers[0], batch).numpy()

    def cold(self, i):
        self.run(self.layers[i % len(self.layers)], 1)

    def quantize(self):
        self.quantized = self.functional.quantize_4bit(
            self.converted, blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
        )

    def dequantize(self):
        self.functional.dequantize_4bit(*self.quantized)


def check(peer, p):
    """Errors of one vector, after checking all batches."""
    import numpy as np

    errors = None
    exact_weights = peer.weights.astype(np.float64)
    for n in BATCHES:
        y = np.array(peer.product(n), dtype=np.float64)
        exact = p.inputs[:n].astype(np.float64) @ exact_weights.T
        rms = np.sqrt(np.mean(exact**2))
        difference = np.abs(y - exact)
        largest, mean = difference.max() / rms, np.sqrt(np.mean(difference**2)) / rms
        if not mean < WRONG:
            raise ValueError(f"wrong: the error of a batch of {n} is {mean:.1e} of the outputs")
        errors = errors or (float(largest), float(mean))
    return errors


class Cell:
    """One time to measure: `count` multiply-adds, or converted weights, in one call of `run`."""

    def __init__(self, run, count):
        self.run, self.count, self.times, self.calls = run, count, [], 0
        run(0)
        start = time.perf_counter_ns()
        run(1)
        elapsed = time.perf_counter_ns() - start
        self.slow = elapsed > SLOW
        self.repetitions = max(1, min(COPIES, round(SAMPLE / elapsed)))

    def sample(self):
        if not self.slow:
            self.run(self.calls)
        start = time.perf_counter_ns()
        for i in range(self.repetitions):
            self.run(self.calls + 1 + i)
        self.times.append((time.perf_counter_ns() - start) / self.repetitions)
        self.calls += 1 + self.repetitions

    def speed(self):
        return self.count / statistics.median(self.times)


class Measured:
    """A peer with its times."""

    def __init__(self, peer, p):
        self.record = {
            "library": peer.library,
            "version": peer.version,
            "name": peer.name,
            "process": "python",
            "threads": p.threads,
            "bits": 4.5,
        }
        if peer.weights is not None:
            self.record["error_max"], self.record["error_rms"] = check(peer, p)
        count = p.rows * p.cols
        names = {1: "cache", 8: "batch8", 128: "batch128"}
        self.cells = {names[n]: Cell(lambda _, n=n: peer.product(n), count * n) for n in peer.batches}
        self.cells["dram"] = Cell(peer.cold, count * peer.cold_count)
        if peer.converts and p.threads == 1:
            count = min(p.rows, CONVERTED_ROWS) * p.cols
            self.cells["quantize"] = Cell(lambda _: peer.quantize(), count)
            self.cells["dequantize"] = Cell(lambda _: peer.dequantize(), count)

    def round(self, index):
        for cell in self.cells.values():
            if not cell.slow or index < SLOW_ROUNDS:
                cell.sample()

    def result(self):
        return self.record | {name: cell.speed() for name, cell in self.cells.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--quick", action="store_true", help="small matrices, to see that everything works")
    parser.add_argument("--only", default="", help="only peers whose name has this text")
    parser.add_argument("--yardstick", required=True, help="the library with the pure read")
    parser.add_argument("--worker", action="store_true", required=True)
    args = parser.parse_args()
    run = {"tools": [f"Python {platform.python_version()}"], "missing": []}
    measured, index = [], 0
    try:
        p = Problem(*((1024, 1024) if args.quick else (4096, 4096)), args.threads)
        makes = {
            "a pure read": lambda: Read(p, args.yardstick),
            "onnxruntime MatMulBnb4": lambda: Onnx(p, "nf4"),
            "onnxruntime MatMulNBits, int8 inputs": lambda: Onnx(p, "int8"),
            "onnxruntime MatMulNBits, f32 inputs": lambda: Onnx(p, "f32"),
            "openvino int4, f32 inputs": lambda: OpenVino(p, "f32"),
            "openvino int4, int8 inputs": lambda: OpenVino(p, "int8"),
            "openvino NF4": lambda: OpenVino(p, "nf4"),
            "bitsandbytes": lambda: BitsAndBytes(p),
        }
    except ImportError as error:
        makes = {}
        run["missing"].append({"name": "peers.py", "why": str(error)})
    for name, make in makes.items():
        if args.only in name:
            try:
                measured.append(Measured(make(), p))
            except Exception as error:
                run["missing"].append({"name": name, "why": str(error).strip() or type(error).__name__})
    print("\n@ready", flush=True)
    for _ in sys.stdin:
        for peer in measured:
            peer.round(index)
            # Waiting threads of a pool spin for a while before they sleep.
            time.sleep(0.02)
        index += 1
        print("\n@done", flush=True)
    run["records"] = [peer.result() for peer in measured]
    print("\n@result", json.dumps(run), flush=True)


if __name__ == "__main__":
    main()
