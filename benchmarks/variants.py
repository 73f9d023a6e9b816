"""fastrnn, and the ways to use it that are measured next to its plain one. Their names begin with "fastrnn-"."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import fastrnn
from benchmarks.cases import Case
from benchmarks.problem import STREAMED, Call, Peer, Problem, make_module, module_call, packed_call
from fastrnn import _C

THREAD_COUNTS = (1, 2, 4, 8, 16)


class Fastrnn(Peer):
    name = package = "fastrnn"
    version = fastrnn.__version__  # known without an installed distribution

    def prepare(self, problem: Problem) -> Call:
        return self.call_of(make_module(fastrnn, problem.case, **problem.case.spec.options), problem)

    def call_of(self, module: nn.Module, problem: Problem) -> Call:
        keywords = {} if problem.lengths is None else {"lengths": problem.lengths.to(problem.x.device)}
        return module_call(module, problem, **keywords)


class RoundedWeights(Fastrnn):
    """Weights in bfloat16, while inputs, outputs and arithmetic stay in float32; or int8 weights and products."""

    tolerance = 5e-2
    limit_applies = False  # fewer bytes

    def __init__(self, weights: str):
        self.name = f"fastrnn-{weights}"
        self.weights = weights

    def obstacle(self, case: Case) -> str | None:
        return None if (case.use, case.dtype) == ("inference", "float32") else "float32 inference only"

    def prepare(self, problem: Problem) -> Call:
        options = problem.case.spec.options
        return self.call_of(make_module(fastrnn, problem.case, weights=self.weights, **options), problem)


class Bf16Products(Fastrnn):
    """Products of numbers rounded to bfloat16 in float32 layers, as torch's switch allows."""

    name = "fastrnn-bf16-products"
    tolerance = 5e-2
    limit_applies = False  # twice as many operations at a time

    def obstacle(self, case: Case) -> str | None:
        if not _C.build_info()["bfloat16_products"]:
            return "this machine has no AVX512_BF16"
        return None if (case.dtype, case.device) == ("float32", "cpu") else "float32 on the CPU only"

    def prepare(self, problem: Problem) -> Call:
        call = super().prepare(problem)

        def allowed(run):
            def switched():
                torch.backends.mkldnn.rnn.fp32_precision = "bf16"
                try:
                    return run()
                finally:
                    torch.backends.mkldnn.rnn.fp32_precision = "none"

            return switched

        return replace(call, run=allowed(call.run), compared=allowed(call.outputs))


class Recompute(Fastrnn):
    """The backward pass computes again what the forward pass did not keep."""

    name = "fastrnn-recompute"

    def obstacle(self, case: Case) -> str | None:
        return None if case.use == "training" else "training only"

    def prepare(self, problem: Problem) -> Call:
        return self.call_of(make_module(fastrnn, problem.case, recompute=True, **problem.case.spec.options), problem)


class Packed(Fastrnn):
    """Unequal lengths as a packed sequence, as torch.nn takes them."""

    name = "fastrnn-packed"

    def obstacle(self, case: Case) -> str | None:
        return "unequal lengths only" if case.lengths is None else None

    def prepare(self, problem: Problem) -> Call:
        return packed_call(make_module(fastrnn, problem.case, **problem.case.spec.options), problem)


def sequence_module(problem: Problem) -> nn.Module:
    """The module for whole sequences, with the weights of a cell."""
    module = make_module(fastrnn, replace(problem.case, mode="inference"), **problem.case.spec.options)
    module.load_state_dict({f"{name}_l0": weight for name, weight in problem.weights.items()})
    return module.eval()


class OneStep(Fastrnn):
    """A module for whole sequences, called with a sequence of one step."""

    name = "fastrnn-module"

    def obstacle(self, case: Case) -> str | None:
        return None if case.use == "step" else "single steps only"

    def prepare(self, problem: Problem) -> Call:
        module, x = sequence_module(problem), problem.x[None]
        states = tuple(state[None] for state in problem.states)
        hx = states[0] if len(states) == 1 else states

        def compared():
            last = module(x, hx)[1]
            return [state[0] for state in (last if isinstance(last, tuple) else (last,))]

        return Call(lambda: module(x, hx), compared)


class Stream(Fastrnn):
    """A module's stream, which keeps the state between calls."""

    name = "fastrnn-stream"

    def obstacle(self, case: Case) -> str | None:
        return None if case.use == "stream" else "streaming only"

    def prepare(self, problem: Problem) -> Call:
        step, x = sequence_module(problem).stream(batch=problem.case.shape.B), problem.x

        def compared():
            step.reset()
            return [step(x).clone() for _ in range(STREAMED)]

        return Call(lambda: step(x), compared)


class Threads(Fastrnn):
    """With another number of threads than the case's."""

    limit_applies = False

    def __init__(self, threads: int):
        self.name = f"fastrnn-{threads}t"
        self.threads = threads

    def prepare(self, problem: Problem) -> Call:
        return replace(super().prepare(problem), threads=self.threads)


VARIANTS = (
    RoundedWeights("bf16"),
    RoundedWeights("int8"),
    Bf16Products(),
    OneStep(),
    Stream(),
    Recompute(),
    Packed(),
    *map(Threads, THREAD_COUNTS),
)
