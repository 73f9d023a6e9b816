"""Who is measured: fastrnn and its peers, each a small class that turns a problem into a function to call.

A later peer is one class and one entry in `PEERS`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.int8_peers import OnnxRuntimeInt8, TorchNNInt8
from benchmarks.onnx_peer import OnnxRuntime
from benchmarks.openvino_peer import OpenVino
from benchmarks.problem import Call, Peer, Problem, make_module, module_call, packed_call
from benchmarks.variants import VARIANTS, Fastrnn

MAX_COMPILED_STEPS = 32


class TorchNN(Peer):
    """PyTorch's own modules: ATen and oneDNN on the CPU, cuDNN on a GPU."""

    name = "torch.nn"
    package = "torch"

    def obstacle(self, case: Case) -> str | None:
        return None if case.spec.in_torch else "torch.nn has no such cell"

    def prepare(self, problem: Problem) -> Call:
        module = make_module(nn, problem.case)
        return module_call(module, problem) if problem.lengths is None else packed_call(module, problem)


class TorchNNHalf(TorchNN):
    """torch.nn in float16, next to layers in bfloat16: the faster of both is what these are measured against."""

    name = "torch.nn-fp16"
    limit_applies = False  # another type's

    def obstacle(self, case: Case) -> str | None:
        return super().obstacle(case) if case.dtype == "bfloat16" else "next to bfloat16 only"

    def prepare(self, problem: Problem) -> Call:
        half = {name: weight.half() for name, weight in problem.weights.items()}
        case = replace(problem.case, dtype="float16")
        return super().prepare(replace(problem, case=case, weights=half, x=problem.x.half(), grad=problem.grad.half()))


class TorchCompile(TorchNN):
    """torch.nn's modules compiled as one graph.

    By default torch.compile leaves these modules uncompiled, which would only measure torch.nn a second time; made to
    compile them, it unrolls the time loop, which takes about two seconds per step.
    """

    name = "torch.compile"

    def obstacle(self, case: Case) -> str | None:
        if case.lengths is not None:
            return "whole rows only"
        if case.shape.T > MAX_COMPILED_STEPS:
            return f"unrolls the time loop; more than {MAX_COMPILED_STEPS} steps take minutes to compile"
        return super().obstacle(case)

    def prepare(self, problem: Problem) -> Call:
        torch._dynamo.config.allow_rnn = True
        torch.compiler.reset()  # graphs of earlier cases would count towards the limit on recompilations
        module = make_module(nn, problem.case)
        module.forward = torch.compile(module.forward, fullgraph=True)
        return module_call(module, problem)


FASTRNN = Fastrnn()
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        TorchNN(),
        OnnxRuntime(),
        OpenVino(),
        TorchCompile(),
        TorchNNHalf(),
        TorchNNInt8(),
        OnnxRuntimeInt8(),
        *VARIANTS,
    )
}
