"""Peers with weights of int8."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch

from benchmarks.cases import Case
from benchmarks.onnx_peer import OnnxRuntime, onnx_model
from benchmarks.problem import Call, Peer, Problem, make_module, module_call

TOLERANCE = 5e-2  # relative: what one scale for a whole matrix, and one for all rows of an input, may cost


class TorchNNInt8(Peer):
    """torch.ao's dynamic quantization of torch.nn's modules."""

    name = "torch.nn-int8"
    package = "torch"
    tolerance = TOLERANCE
    limit_applies = False  # a quarter of the bytes

    def obstacle(self, case: Case) -> str | None:
        if (case.use, case.dtype, case.device) != ("inference", "float32", "cpu"):
            return "float32 inference on the CPU only"
        return None if case.cell in ("lstm", "gru") else "torch.ao quantizes LSTM and GRU"

    def prepare(self, problem: Problem) -> Call:
        module = make_module(torch.nn, problem.case)
        call = module_call(module, problem)  # loads the weights
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao is deprecated
            quantized = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(module), {type(module)})[0]
        return Call(lambda: quantized(problem.x), threads=call.threads)


class OnnxRuntimeInt8(OnnxRuntime):
    """ONNX Runtime's dynamic quantization: a node DynamicQuantizeLSTM. With 7 bits, since 8 overflow its 16-bit sums on
    CPUs without VNNI: there the output is off by a tenth and more."""

    name = "onnxruntime-int8"
    tolerance = TOLERANCE
    limit_applies = False

    def obstacle(self, case: Case) -> str | None:
        return super().obstacle(case) or (None if case.cell == "lstm" else "ONNX Runtime quantizes LSTM only")

    def model(self, problem: Problem) -> bytes:
        from onnxruntime.quantization import quantize_dynamic

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "layer.onnx")
            quantize_dynamic(onnx_model(problem), file, op_types_to_quantize=["LSTM"], reduce_range=True)
            return file.read_bytes()
