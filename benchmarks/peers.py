"""Who is measured: fastrnn and its peers, each a small class that turns a problem into a function to call.

A later peer is one class and one entry in `PEERS`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.cases import Case
from benchmarks.onnx_peer import OnnxRuntime
from benchmarks.problem import Call, Peer, Problem, make_module, module_call, training_call
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


def packed_call(module: nn.Module, problem: Problem) -> Call:
    """Forward and backward of a packed sequence, which each call packs anew; the results stay packed."""
    module.load_state_dict(problem.weights)

    def packed(x):
        return pack_padded_sequence(x, problem.lengths, enforce_sorted=False)

    call = training_call(module, lambda x: module(packed(x))[0].data, problem.x, packed(problem.grad).data)

    def compared():
        y, gradients = call.run()
        return pad_packed_sequence(packed(problem.x)._replace(data=y))[0], gradients

    return Call(call.run, compared)


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
PEERS: dict[str, Peer] = {peer.name: peer for peer in (TorchNN(), OnnxRuntime(), TorchCompile(), *VARIANTS)}
