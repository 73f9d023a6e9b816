"""OpenVINO as a peer."""

from __future__ import annotations

from benchmarks.onnx_peer import OnnxRuntime, onnx_buffers, onnx_model, onnx_results
from benchmarks.problem import Call, Problem


class OpenVino(OnnxRuntime):
    """OpenVINO with the graph that ONNX Runtime gets: one LSTM, GRU or RNN node with constant weights, in float32.

    Input and output are memory of the caller's, bound once.
    """

    name = package = "openvino"

    def prepare(self, problem: Problem) -> Call:
        import openvino

        model = openvino.Core().read_model(onnx_model(problem).SerializeToString())
        settings = {
            "INFERENCE_NUM_THREADS": problem.case.threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": 1,
        }
        compiled = openvino.Core().compile_model(model, "CPU", settings)
        request = compiled.create_infer_request()
        inputs, outputs = onnx_buffers(problem, [port.any_name for port in compiled.outputs])
        for name, tensor in inputs.items():
            request.set_tensor(name, openvino.Tensor(tensor.numpy(), shared_memory=True))
        for name, tensor in outputs.items():
            request.set_tensor(name, openvino.Tensor(tensor.numpy(), shared_memory=True))
        results = onnx_results(problem.case, outputs)
        bound = inputs, outputs

        def run(keep_alive=bound):  # the request itself holds bare addresses
            request.infer()
            return results

        return Call(run)
