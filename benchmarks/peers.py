"""Who is measured: fastrnn and its peers, each a small class that turns a problem into a function to call.

A later peer is one class and one entry in `PEERS`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import fastrnn
from benchmarks.cases import Case

MAX_COMPILED_STEPS = 32


@dataclass(frozen=True)
class Problem:
    """The weights and inputs of a case, the same for every contender.

    `x` is [T, B, I] and `grad` [T, B, H], or without T in mode "step", where `states` holds one [B, H] per state; a
    whole sequence starts from the zero state that a module makes by itself. `weights` has torch.nn's names.
    """

    case: Case
    weights: dict[str, Tensor]
    x: Tensor
    states: tuple[Tensor, ...]
    grad: Tensor

    @classmethod
    def of(cls, case: Case) -> Problem:
        torch.manual_seed(0)
        T, B, _, H = case.shape
        weights = make_module(nn, case).state_dict()
        x = torch.randn(T, B, case.shape.I).to(case.device, case.torch_dtype)
        states = torch.randn(2 if case.cell == "lstm" else 1, B, H).to(case.device, case.torch_dtype)
        grad = torch.randn(T, B, H).to(case.device, case.torch_dtype)
        if case.mode == "step":
            return cls(case, weights, x[0], states.unbind(), grad[0])
        return cls(case, weights, x, (), grad)

    @property
    def hx(self) -> Tensor | tuple[Tensor, ...] | None:
        """The states as a cell module takes them; None for a whole sequence."""
        return self.states[0] if len(self.states) == 1 else self.states or None


def make_module(library, case: Case, **options) -> nn.Module:
    """The recurrent module, or in mode "step" the cell module, that `library` has under torch.nn's name."""
    name = case.spec.module + ("Cell" if case.mode == "step" else "")
    module = getattr(library, name)(case.shape.I, case.shape.H, **options)
    return module.to(case.device, case.torch_dtype)


def module_call(module: nn.Module, problem: Problem) -> Callable[[], object]:
    """A function without arguments that runs `module` in the problem's mode and returns every output and gradient."""
    module.load_state_dict(problem.weights)
    mode = problem.case.mode
    if mode in ("inference", "step"):
        return inference_call(module.eval(), problem)
    x = problem.x.clone().requires_grad_()
    if mode == "forward":
        return lambda: module(x)
    return training_call(module, x, problem.grad)


def inference_call(module: nn.Module, problem: Problem) -> Callable[[], object]:
    x, hx = problem.x, problem.hx

    @torch.no_grad()
    def call():
        return module(x, hx)

    return call


def training_call(module: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    """Forward and backward.

    Each call first marks the parameters as changed, as an optimiser would, by a write of no elements: nothing derived
    from them can be carried over from the call before.
    """
    parameters = list(module.parameters())
    with torch.no_grad():
        nothing = [parameter[:0] for parameter in parameters]

    def call():
        with torch.no_grad():
            torch._foreach_zero_(nothing)
        y, _ = module(x)
        return y.detach(), torch.autograd.grad(y, [x, *parameters], grad)

    return call


class Peer:
    """Something that can run a case. `package` is the distribution it comes from."""

    name: str
    package: str

    @property
    def version(self) -> str | None:
        """The installed version; None if the package is not installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def obstacle(self, case: Case) -> str | None:
        """Why this peer cannot run the case; None if it can."""
        return None

    def prepare(self, problem: Problem) -> Callable[[], object]:
        """A function without arguments that does the work once and returns its outputs: y, then the last states, or in
        training the gradients of the input and of each parameter. Nested tuples are fine."""
        raise NotImplementedError


class Fastrnn(Peer):
    name = package = "fastrnn"
    version = fastrnn.__version__  # known without an installed distribution

    def prepare(self, problem: Problem) -> Callable[[], object]:
        case = problem.case
        return module_call(make_module(fastrnn, case, **case.spec.options), problem)


class TorchNN(Peer):
    """PyTorch's own modules: ATen and oneDNN on the CPU, cuDNN on a GPU."""

    name = "torch.nn"
    package = "torch"

    def obstacle(self, case: Case) -> str | None:
        return None if case.spec.in_torch else "torch.nn has no such cell"

    def prepare(self, problem: Problem) -> Callable[[], object]:
        return module_call(make_module(nn, problem.case), problem)


class TorchCompile(TorchNN):
    """torch.nn's modules compiled as one graph.

    By default torch.compile leaves these modules uncompiled, which would only measure torch.nn a second time; made to
    compile them, it unrolls the time loop, which takes about two seconds per step.
    """

    name = "torch.compile"

    def obstacle(self, case: Case) -> str | None:
        if case.shape.T > MAX_COMPILED_STEPS:
            return f"unrolls the time loop; more than {MAX_COMPILED_STEPS} steps take minutes to compile"
        return super().obstacle(case)

    def prepare(self, problem: Problem) -> Callable[[], object]:
        torch._dynamo.config.allow_rnn = True
        torch.compiler.reset()  # graphs of earlier cases would count towards the limit on recompilations
        module = make_module(nn, problem.case)
        module.forward = torch.compile(module.forward, fullgraph=True)
        return module_call(module, problem)


class OnnxRuntime(Peer):
    """ONNX Runtime with a graph of a single LSTM, GRU or RNN node and constant weights.

    Input and output stay in buffers bound once: no call pays for a copy or an allocation.
    """

    name = package = "onnxruntime"

    def obstacle(self, case: Case) -> str | None:
        if case.mode not in ("inference", "step"):
            return "inference only"
        if (case.device, case.dtype) != ("cpu", "float32"):
            return "measured on the CPU in float32 only"
        return None

    def prepare(self, problem: Problem) -> Callable[[], object]:
        import onnxruntime

        T, B, _, H = problem.case.shape
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = problem.case.threads
        options.inter_op_num_threads = 1
        model = onnx_model(problem).SerializeToString()
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        inputs = {"X": problem.x.view(T, B, -1)}
        inputs |= {f"initial_{name}": state.clone()[None] for name, state in zip("hc", problem.states, strict=False)}
        outputs = {output.name: torch.empty(1, B, H) for output in session.get_outputs()}
        outputs["Y"] = torch.empty(T, 1, B, H)
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                bind(name, "cpu", 0, np.float32, tuple(tensor.shape), tensor.data_ptr())
        results = onnx_results(problem.case, outputs)
        bound = inputs, outputs

        def call(keep_alive=bound):  # the binding itself holds bare addresses
            session.run_with_iobinding(binding)
            return results

        return call


ONNX_GATE_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}  # ONNX: iofc and zrh; torch: ifgo and rzn


def onnx_weights(problem: Problem) -> dict[str, np.ndarray]:
    """ONNX's W [1, G*H, I], R [1, G*H, H] and B [1, 2*G*H] from torch's parameters."""
    order = ONNX_GATE_ORDER[problem.case.spec.module]
    w_ih, w_hh, b_ih, b_hh = (
        torch.cat([weight.chunk(len(order))[gate] for gate in order]) for weight in problem.weights.values()
    )
    return {"W": w_ih[None].numpy(), "R": w_hh[None].numpy(), "B": torch.cat([b_ih, b_hh])[None].numpy()}


def onnx_model(problem: Problem):
    """The problem's layer as an ONNX model with the inputs X and initial_h, initial_c where states are given."""
    from onnx import TensorProto, helper, numpy_helper

    spec = problem.case.spec
    T, B, _, H = problem.case.shape

    def value(name, *shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    states = [f"initial_{name}" for name, _ in zip("hc", problem.states, strict=False)]
    last_states = ["Y_h", "Y_c"] if spec.module == "LSTM" else ["Y_h"]
    attributes = {"linear_before_reset": int(spec.in_torch)} if spec.module == "GRU" else {}
    node = helper.make_node(
        spec.module, ["X", "W", "R", "B", "", *states], ["Y", *last_states], hidden_size=H, **attributes
    )
    graph = helper.make_graph(
        [node],
        "layer",
        inputs=[value("X", T, B, problem.case.shape.I), *(value(name, 1, B, H) for name in states)],
        outputs=[value("Y", T, 1, B, H), *(value(name, 1, B, H) for name in last_states)],
        initializer=[numpy_helper.from_array(array, name) for name, array in onnx_weights(problem).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def onnx_results(case: Case, outputs: dict[str, Tensor]) -> list[Tensor]:
    """Views of the bound outputs in torch.nn's shapes and order."""
    last_states = [outputs[name] for name in ("Y_h", "Y_c") if name in outputs]
    if case.mode == "step":
        return [state[0] for state in last_states]
    return [outputs["Y"][:, 0], *last_states]


FASTRNN = Fastrnn()
PEERS: dict[str, Peer] = {peer.name: peer for peer in (TorchNN(), OnnxRuntime(), TorchCompile())}
