"""ONNX Runtime as a peer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.problem import Call, Peer, Problem


class OnnxRuntime(Peer):
    """ONNX Runtime with a graph of a single LSTM, GRU or RNN node and constant weights.

    Input and output stay in buffers bound once: no call pays for a copy or an allocation. Its threads keep their
    default, to spin between calls: no session option that ends this made it faster. Who comes next waits for them to
    sleep (`timing.rest`).
    """

    name = package = "onnxruntime"

    def obstacle(self, case: Case) -> str | None:
        if case.mode not in ("inference", "step"):
            return "measured in inference and single steps only"
        if (case.device, case.dtype) != ("cpu", "float32"):
            return "measured on the CPU in float32 only"
        return None

    def prepare(self, problem: Problem) -> Call:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = problem.case.threads
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(self.model(problem), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        inputs, outputs = onnx_buffers(problem, [output.name for output in session.get_outputs()])
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                bind(name, "cpu", 0, np.float32, tuple(tensor.shape), tensor.data_ptr())
        results = onnx_results(problem.case, outputs)
        bound = inputs, outputs

        def run(keep_alive=bound):  # the binding itself holds bare addresses
            session.run_with_iobinding(binding)
            return results

        return Call(run)

    def model(self, problem: Problem) -> bytes:
        return onnx_model(problem).SerializeToString()


def onnx_buffers(problem: Problem, output_names: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Memory for every input and output of the model, by name; the inputs hold the problem's."""
    T, B, _, H = problem.case.shape
    inputs = {"X": problem.x.view(T, B, -1)}
    inputs |= {f"initial_{name}": state.clone()[None] for name, state in zip("hc", problem.states, strict=False)}
    return inputs, {name: torch.empty((T, 1, B, H) if name == "Y" else (1, B, H)) for name in output_names}


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
