"""What `torch.onnx.export(dynamo=True)` makes of our layers: ONNX's RNN, LSTM and GRU, one node for both directions,
and for all that these lack (other cells, resets, masks, projections) a Scan whose body is the cell's equation.

The exporter asks a registry for a function that translates `fastrnn::layer_forward`; ours is put there as soon as the
exporter is imported. Nothing of ONNX is imported before.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from fastrnn import schema
from fastrnn.cells import CELLS, NORM_EPSILON, Cell
from fastrnn.equation import record
from fastrnn.reference import Weights

Value: TypeAlias = Any  # of ONNX's graph


class Operator(NamedTuple):
    """An operator of ONNX that computes a cell: where it has our gates and unit weights, and its attributes."""

    name: str
    gates: tuple[int, ...]
    activations: tuple[str, ...] = ()
    attributes: tuple[tuple[str, int], ...] = ()
    peepholes: tuple[int, ...] = ()


OPERATORS = {
    "lstm": Operator("LSTM", (0, 3, 1, 2)),
    "lstm_peephole": Operator("LSTM", (0, 3, 1, 2), peepholes=(0, 2, 1)),
    "gru": Operator("GRU", (1, 0, 2), attributes=(("linear_before_reset", 1),)),
    "gru_reset_before": Operator("GRU", (1, 0, 2), attributes=(("linear_before_reset", 0),)),
    "rnn_tanh": Operator("RNN", (0,), ("Tanh",)),
    "rnn_relu": Operator("RNN", (0,), ("Relu",)),
    "rnn_sigmoid": Operator("RNN", (0,), ("Sigmoid",)),
}

_OF_WEIGHTS = "fastrnn: of weights alone"  # marks a node that is computed at export
_FUNCTIONS = {"sigmoid": "Sigmoid", "tanh": "Tanh", "relu": "Relu", "exp": "Exp", "maximum": "Max"}
_FUNCTIONS |= {"+": "Add", "-": "Sub", "*": "Mul", "/": "Div"}


def register() -> None:
    """Called when the exporter imports its translations, just before it makes a registry of them."""
    from torch.onnx._internal.exporter._torchlib._torchlib_registry import onnx_impl

    for op, translation in (("layer_forward", layer_forward), ("packed_forward", packed_forward)):
        onnx_impl(getattr(torch.ops.fastrnn, op).default, no_compile=True)(translation)


def fold_when_optimizing() -> None:
    """Has the exporter's optimizer arrange weights at export, where it leaves large constants to the runtime."""
    from torch.onnx._internal.exporter._onnx_program import ONNXProgram

    optimize = ONNXProgram.optimize

    @functools.wraps(optimize)
    def fold_and_optimize(self: Any) -> Any:
        _fold(self.model)
        return optimize(self)

    ONNXProgram.optimize = fold_and_optimize  # type: ignore[method-assign]


def _fold(model: Any) -> None:
    if not any(_OF_WEIGHTS in node.meta for node in model.graph):
        return
    from onnxscript.optimizer import fold_constants

    limit = torch.iinfo(torch.int64).max
    fold_constants(
        model,
        input_size_limit=limit,
        output_size_limit=limit,
        should_fold=lambda node: _OF_WEIGHTS in node.meta,
    )


def layer_forward(
    x: Value,
    h0: Value,
    c0: Value,
    weights: Sequence[Value],
    directions: int,
    lengths: Value,
    resets: Value,
    masks: Value,
    cell: str,
    save: bool = False,
    recompute: bool = False,
) -> tuple[Value, ...]:
    """The translation of the op of this name; arguments as in its schema, tensors as values of ONNX's graph.

    Returns:
        y, h_n, c_n, and what backward would need, which has no value here; nor has c_n of a cell without it.

    Raises:
        NotImplementedError: `save`, of a cell with other states than h: those of every step are read.
    """
    if save and schema.SIZES[cell]["carried"]:
        raise NotImplementedError(
            f"cell {cell}: expected a call that reads no states of every step but h, since ONNX's operators hand out "
            "none: without return_states=True, and of Regularized without recurrent dropout"
        )
    found = _layer(schema.Inputs(x, h0, c0, list(weights), directions, lengths, resets, masks, cell))
    return *found, *(_nothing() for _ in range(5 - len(found)))


def packed_forward(
    x: Value,
    h0: Value,
    c0: Value,
    weights: Sequence[Value],
    directions: int,
    lengths: Value,
    resets: Value,
    masks: Value,
    cell: str,
    rounded: str | None = None,
    packed: Value = None,
) -> tuple[Value, ...]:
    """The translation of the op of this name: with the weights as they are, whatever `rounded` says."""
    found = _layer(schema.Inputs(x, h0, c0, list(weights), directions, lengths, resets, masks, cell))
    return *found, *(_nothing() for _ in range(4 - len(found)))


def _layer(inputs: schema.Inputs) -> list[Value]:
    """y, h_n and, of a cell with more states than one, c_n."""
    import onnx_ir

    op = _opset()
    dtype: Any = inputs.x.dtype  # ONNX's, as the value is
    widened = dtype == onnx_ir.DataType.BFLOAT16  # which runtimes lack; the kernels add up in float32, too
    if widened:
        inputs = _in_float32(inputs)
    has_operator = inputs.cell in OPERATORS and inputs.resets is None and not schema.is_projected(inputs)
    found = _operator(inputs) if has_operator else _scans(inputs)
    return [op.Cast(value, to=dtype) for value in found] if widened else found


def _in_float32(inputs: schema.Inputs) -> schema.Inputs:
    import onnx_ir

    def cast(value: Value) -> Value:
        if value is None:
            return None
        new = _opset().Cast(value, to=onnx_ir.DataType.FLOAT)
        new.dtype, new.shape = onnx_ir.DataType.FLOAT, value.shape
        return new

    floats = {name: cast(getattr(inputs, name)) for name in ("x", "h0", "c0", "masks")}
    return inputs._replace(**floats, weights=[_of_weights(cast(weight), weight) for weight in inputs.weights])


def _opset() -> Any:
    from onnxscript import opset18

    return opset18


def _nothing() -> Value:
    """A value that is never read."""
    from onnxscript import evaluator
    from torch.onnx._internal.exporter._tensors import SymbolicTensor

    recorder: Any = evaluator.default()
    return SymbolicTensor(recorder.opset)


def _of_weights(value: Value, *sources: Value) -> Value:
    """Marks what is computed of `sources`, if these are parameters or are marked themselves."""
    for source in sources:
        producer = source.producer()
        if producer is not None and producer.op_type != "Constant" and _OF_WEIGHTS not in producer.meta:
            return value
    value.producer().meta[_OF_WEIGHTS] = True
    return value


# ---- RNN, LSTM, GRU


def _operator(inputs: schema.Inputs) -> list[Value]:
    """y, h_n and, of an LSTM, c_n by one node."""
    import onnx_ir

    op, operator = _opset(), OPERATORS[inputs.cell]
    units = inputs.weights[0].shape[0] // len(operator.gates)
    by_direction = schema.unflatten(inputs.cell, inputs.weights, inputs.directions)

    def together(parts: list[Value]) -> Value:
        parts = [_of_weights(op.Unsqueeze(part, [0]), part) for part in parts]
        return parts[0] if len(parts) == 1 else _of_weights(op.Concat(*parts, axis=0), *parts)

    def bias(w: Weights) -> Value:
        parts = [_reordered(b, operator.gates) for b in (w.b_ih, w.b_hh)]
        return _of_weights(op.Concat(*parts, axis=0), *parts)

    def peephole(w: Weights) -> Value:
        rows = _reordered(w.w_own, operator.peepholes)
        return _of_weights(op.Reshape(rows, [-1]), rows)

    W, R = (together([_reordered(w[i], operator.gates) for w in by_direction]) for i in range(2))
    B = None if by_direction[0].b_ih is None else together([bias(w) for w in by_direction])
    lengths = None if inputs.lengths is None else op.Cast(inputs.lengths, to=onnx_ir.DataType.INT32)
    arguments = [inputs.x, W, R, B, lengths, inputs.h0]
    if operator.name == "LSTM":
        arguments.append(inputs.c0)
        if operator.peepholes:
            arguments.append(together([peephole(w) for w in by_direction]))
    attributes: dict[str, Any] = dict(operator.attributes)
    if operator.activations:
        attributes["activations"] = list(operator.activations) * inputs.directions
    attributes["direction"] = "bidirectional" if inputs.directions == 2 else "forward"
    y, *states = getattr(op, operator.name)(*arguments, hidden_size=units, **attributes)
    if lengths is not None:
        states = [_kept_if_empty(lengths, *pair) for pair in zip(states, (inputs.h0, inputs.c0), strict=False)]
    if inputs.directions == 1:
        return [op.Squeeze(y, [1]), *states]
    return [op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, 2 * units]), *states]


def _kept_if_empty(lengths: Value, last: Value, first: Value) -> Value:
    """A final state, of rows without steps the first one: ONNX does not say so, and its runtime puts 0 there."""
    op = _opset()
    if first is None:
        return last
    return op.Where(op.Unsqueeze(op.Equal(lengths, op.CastLike(0, lengths)), [1]), first, last)


def _reordered(weight: Value, order: tuple[int, ...]) -> Value:
    """The row blocks of a weight in another order."""
    if order == tuple(range(len(order))):
        return weight
    op, rows = _opset(), torch.arange(weight.shape[0]).unflatten(0, (len(order), -1))
    return _of_weights(op.Gather(weight, op.Constant(value_ints=rows[list(order)].flatten().tolist()), axis=0), weight)


# ---- Scan


def _scans(inputs: schema.Inputs) -> list[Value]:
    """y, h_n and, of a cell with more states, c_n by one Scan for each direction."""
    op, spec = _opset(), CELLS[inputs.cell]
    active = None if inputs.lengths is None else _active(inputs.x, inputs.lengths)
    by_direction = schema.unflatten(inputs.cell, inputs.weights, inputs.directions)
    walks = [_scan(spec, inputs, w, d, active) for d, w in enumerate(by_direction)]

    def stacked(parts: list[Value]) -> Value:
        return _joined([op.Unsqueeze(part, [0]) for part in parts], axis=0)

    y = _joined([y for y, *_ in walks])
    results = [y, stacked([h for _, h, *_ in walks])]
    if spec.carried:
        results.append(stacked([_joined(others) for _, _, *others in walks]))
    return results


def _active(x: Value, lengths: Value) -> Value:
    """Bool `[T, B, 1]`: whether a row has not ended."""
    op = _opset()
    T = op.Squeeze(op.Shape(x, start=0, end=1), [0])
    times = op.Range(op.Constant(value_int=0), T, op.Constant(value_int=1))
    return op.Unsqueeze(op.Less(op.Unsqueeze(times, [1]), lengths), [2])


def _restarts(resets: Value, active: Value, d: int) -> Value:
    """Bool `[T, B, 1]`: whether the state is zeroed before direction d reads a step."""
    if resets is None:
        return None
    op = _opset()
    resets = op.Unsqueeze(resets, [2])
    resets = resets if active is None else op.And(resets, active)
    if d == 0:
        return resets
    first = op.Slice(resets, [0], [1], [0])
    later = op.Slice(resets, [1], [torch.iinfo(torch.int64).max], [0])
    return op.Concat(later, op.Xor(first, first), axis=0)  # and none before the last step


def _scan(spec: Cell, inputs: schema.Inputs, w: Weights, d: int, active: Value) -> list[Value]:
    """y `[T, B, P]` and the final states of one direction."""
    import onnx_ir
    from onnxscript import evaluator
    from torch.onnx._internal.exporter._tensors import SymbolicTensor

    op = _opset()
    units = w.w_ih.shape[0] // len(record(spec).input_gates)
    steps = {"x": _input_products(spec, inputs.x, w), "active": active, "restarts": _restarts(inputs.resets, active, d)}
    shared = None
    if inputs.masks is not None:
        masks = op.Gather(inputs.masks, op.Constant(value_int=d), axis=0)
        is_shared = inputs.masks.shape[1] == 1
        steps["masks"], shared = (None, op.Squeeze(masks, [0])) if is_shared else (masks, None)
    steps = {name: value for name, value in steps.items() if value is not None}
    states = _first_states(spec, inputs, d, units)
    body = _Body(spec, w, inputs.x.dtype, shared).graph(list(steps))
    backwards = {"scan_input_directions": [1] * len(steps), "scan_output_directions": [1]} if d else {}
    attributes = {"body": body, "num_scan_inputs": len(steps), **backwards}
    recorder: Any = evaluator.default()
    node = onnx_ir.Node(
        "",
        "Scan",
        [*states, *steps.values()],
        onnx_ir.convenience.convert_attributes(attributes),
        outputs=[SymbolicTensor(recorder.opset) for _ in range(len(states) + 1)],
        version=16,
    )
    recorder.nodes.append(node)
    return [node.outputs[-1], *node.outputs[:-1]]


def _input_products(spec: Cell, x: Value, w: Weights) -> Value:
    """Of all steps."""
    if not spec.normalized:
        return _product(x, w.w_ih, w.b_ih)
    gates = record(spec).input_gates
    products = _split(_product(x, w.w_ih, None), len(gates), -1)
    weights = _norm_weights(spec, gates, w.w_own, len(spec.unit_weights), w.b_ih)
    op = _opset()

    def normalize(*values: Value, **attributes: Any) -> Value:
        return op.LayerNormalization(*values, **attributes)[0]

    return _joined(_normalized(spec, gates, products, weights, normalize, _joined, lambda v, n: _split(v, n, -1)))


def _groups(spec: Cell, gates: list[int]) -> list[list[int]]:
    """Which of these gates, by their places among them, are normalized together."""
    groups = [[i for i, gate in enumerate(gates) if spec.gates[gate] in group] for group in spec.normalized]
    return [group for group in groups if group]


def _norm_weights(spec: Cell, gates: list[int], own: Value, first: int, bias: Value) -> list[list[Value]]:
    """The gain and the bias, if there is one, of each group; the gains are the rows of w_own from `first` on."""
    op, count = _opset(), len(gates)
    rows = _parts(own, [1] * own.shape[0])[first : first + count]
    columns = [[_of_weights(op.Reshape(row, op.Constant(value_ints=[-1])), own) for row in rows]]
    if bias is not None:
        columns.append(_parts(bias, [bias.shape[0] // count] * count))
    return [[_joined([column[i] for i in group]) for column in columns] for group in _groups(spec, gates)]


def _normalized(
    spec: Cell,
    gates: list[int],
    products: Sequence[Value],
    weights: list[list[Value]],
    normalize: Callable[..., Value],
    join: Callable[[list[Value]], Value],
    split: Callable[[Value, int], Sequence[Value]],
) -> list[Value]:
    """`reference.gate_products` in ONNX's operations, those of the graph or of a body, which join and split
    along the last axis."""
    found: dict[int, Value] = {}
    for group, of_group in zip(_groups(spec, gates), weights, strict=True):
        together = normalize(join([products[i] for i in group]), *of_group, axis=-1, epsilon=NORM_EPSILON)
        found |= dict(zip(group, split(together, len(group)), strict=True))
    return [found[i] for i in range(len(gates))]


def _first_states(spec: Cell, inputs: schema.Inputs, d: int, units: int) -> list[Value]:
    op = _opset()

    def of(states: Value, size: int) -> Value:
        if states is not None:
            return op.Gather(states, op.Constant(value_int=d), axis=0)
        shape = op.Concat(op.Shape(inputs.x, start=1, end=2), op.Constant(value_ints=[size]), axis=0)
        return op.Expand(op.CastLike(op.Constant(value_float=0.0), inputs.x), shape)

    h = of(inputs.h0, inputs.weights[1].shape[1] if record(spec).recurrent else units)
    if inputs.c0 is None:
        return [h, *(of(None, units) for _ in range(spec.carried))]
    return [h, *_split(of(inputs.c0, units), spec.carried, -1)]


def _joined(values: list[Value], axis: int = -1) -> Value:
    return values[0] if len(values) == 1 else _opset().Concat(*values, axis=axis)


def _split(value: Value, count: int, axis: int) -> list[Value]:
    return [value] if count == 1 else list(_opset().Split(value, num_outputs=count, axis=axis))


def _product(x: Value, weight: Value, bias: Value) -> Value:
    """`x [..., I]` times `weight [O, I]`, plus a bias."""
    op = _opset()
    product = op.MatMul(x, _transposed(weight))
    return product if bias is None else op.Add(product, bias)


def _transposed(weight: Value) -> Value:
    return _of_weights(_opset().Transpose(weight, perm=[1, 0]), weight)


class _Body:
    """The body of a Scan: one step of a cell. Weights are values of the graph around it."""

    def __init__(self, spec: Cell, w: Weights, dtype: Any, masks: Value) -> None:
        import onnx_ir

        self.spec, self.made, self.dtype, self.masks = spec, record(spec), dtype, masks
        self.tape = onnx_ir.tape.Tape()
        self.constants: dict[float, Value] = {}
        self.w_hr = None if w.w_hr is None else _transposed(w.w_hr)
        rows = [] if w.w_own is None else _parts(w.w_own, [1] * w.w_own.shape[0])
        self.unit_weights = rows[: len(spec.unit_weights)]
        recurrent, second = self.made.recurrent, self.made.second
        self.products = [gates for gates in (recurrent[: len(recurrent) - len(second)], second) if gates]
        rows = [len(gates) * (w.w_ih.shape[0] // len(self.made.input_gates)) for gates in self.products]
        self.matrices = [_transposed(part) for part in _parts(w.w_hh, rows)] if rows else []
        self.biases = _parts(w.b_hh, rows) if rows and w.b_hh is not None else [None] * len(rows)
        self.norm_weights = None  # of the recurrent products, which are all of h
        if spec.normalized and recurrent:
            first = len(spec.unit_weights) + len(self.made.input_gates)
            self.norm_weights = _norm_weights(spec, recurrent, w.w_own, first, w.b_hh)
            self.biases = [None]
        if self.made.normalized is not None:
            units = w.w_ih.shape[0] // len(self.made.input_gates)
            self.ones = _opset().Constant(value=onnx_ir.tensor([1.0] * units, dtype=dtype))

    def graph(self, steps: list[str]) -> Any:
        """Of the states and what there is of each step, to the states and the output."""
        import onnx_ir

        kinds = {"active": onnx_ir.DataType.BOOL, "restarts": onnx_ir.DataType.BOOL}
        states = [self._input(f"state {name}", self.dtype) for name in self.spec.states]
        given = {name: self._input(f"given {name}", kinds.get(name, self.dtype)) for name in steps}
        after = self._step(states, **given)
        output = after[0]
        if "active" in given:
            after = [self._op("Where", given["active"], new, old) for new, old in zip(after, states, strict=True)]
            output = self._op("Where", given["active"], output, self._number(0.0))
        outputs = [self._op("Identity", value) for value in (*after, output)]  # each of them once, and no input
        for value in outputs:
            value.type = onnx_ir.TensorType(self.dtype)
        for index, node in enumerate(self.tape.nodes):  # names that the graph around it has not
            node.name = f"step/{index}"
            for place, value in enumerate(node.outputs):
                value.name = f"step/{index}/{place}"
        return onnx_ir.Graph(
            [*states, *given.values()], outputs, nodes=self.tape.nodes, name=self.spec.equation.__name__
        )

    def _step(
        self, states: list[Value], x: Value, active: Value = None, restarts: Value = None, masks: Value = None
    ) -> list[Value]:
        """The new states. (`active` comes into it later.)"""
        if restarts is not None:
            states = [self._op("Where", restarts, self._number(0.0), state) for state in states]
        masks = masks or self.masks
        own = [] if masks is None else self._parts(masks, len(self.spec.masks))
        made = self.made
        values = dict(zip(made.states, states, strict=True))
        values |= zip(made.given, (*self.unit_weights, *own), strict=True)
        leaves = [made.inputs[gate] for gate in made.input_gates]
        values |= zip(leaves, self._parts(x, len(leaves)), strict=True)
        for gates, matrix, bias in zip(self.products, self.matrices, self.biases, strict=True):
            operand = states[0] if gates != made.second else self._value(made.operand, values)
            product = self._op("MatMul", operand, matrix)
            product = product if bias is None else self._op("Add", product, bias)
            leaves = [made.products[gate] for gate in gates]
            products = self._parts(product, len(leaves))
            if self.norm_weights is not None:
                ways = self._layer_norm, self._joined, self._parts
                products = _normalized(self.spec, gates, products, self.norm_weights, *ways)
            values |= zip(leaves, products, strict=True)
        h, *others = (self._value(node, values) for node in made.outputs)
        return [h if self.w_hr is None else self._op("MatMul", h, self.w_hr), *others]

    def _value(self, node: Any, values: dict[int, Value]) -> Value:
        """A node of the equation's graph."""
        if node not in values:
            operation, operands = self.made.graph.nodes[node]
            if node == self.made.normalized:
                values[node] = self._layer_norm(self._value(self.made.operand, values), self.ones)
            elif operation == "const":
                values[node] = self._number(*operands)
            else:
                values[node] = self._apply(operation, *(self._value(operand, values) for operand in operands))
        return values[node]

    def _apply(self, operation: str, *operands: Value) -> Value:
        if operation == "logsigmoid":
            return self._op("Neg", self._op("Softplus", self._op("Neg", *operands)))
        if operation == "step":
            (value,) = operands
            zero, one = self._number(0.0), self._number(1.0)
            rest = self._op("Where", self._op("LessOrEqual", value, zero), zero, value)  # NaN stays NaN
            return self._op("Where", self._op("Greater", value, zero), one, rest)
        return self._op(_FUNCTIONS[operation], *operands)

    def _layer_norm(self, *values: Value, axis: int = -1, epsilon: float = NORM_EPSILON) -> Value:
        return self.tape.op("LayerNormalization", values, {"axis": axis, "epsilon": epsilon})

    def _joined(self, values: list[Value]) -> Value:
        return values[0] if len(values) == 1 else self.tape.op("Concat", values, {"axis": -1})

    def _parts(self, value: Value, count: int) -> Sequence[Value]:
        if count == 1:
            return [value]
        return self.tape.op_multi_out("Split", [value], {"axis": -1, "num_outputs": count}, num_outputs=count)

    def _number(self, value: float) -> Value:
        """A constant of the graph around it, where the optimizer would move it in any case."""
        import onnx_ir

        if value not in self.constants:
            self.constants[value] = _opset().Constant(value=onnx_ir.tensor(value, dtype=self.dtype))
        return self.constants[value]

    def _op(self, name: str, *operands: Value) -> Value:
        return self.tape.op(name, operands)

    def _input(self, name: str, dtype: Any) -> Value:
        import onnx_ir

        return onnx_ir.Value(name=f"step/{name}", type=onnx_ir.TensorType(dtype))


def _parts(weight: Value, rows: list[int]) -> list[Value]:
    """A weight's rows as so many of them."""
    if len(rows) == 1:
        return [weight]
    ends = list(itertools.accumulate(rows))
    parts = [_opset().Slice(weight, [end - count], [end], [0]) for count, end in zip(rows, ends, strict=True)]
    return [_of_weights(part, weight) for part in parts]
