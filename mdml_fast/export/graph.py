"""Writing an ONNX graph: operators by name, and the few functions that ONNX has no operator for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET, ML_OPSET = 18, 3
FLOAT, DOUBLE, INT64, BOOL, STRING = (
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.INT64,
    TensorProto.BOOL,
    TensorProto.STRING,
)

# Rational approximations of the normal quantile, highest power first (Moshier, Cephes, ndtri.c), in double precision:
# near the middle, and down to exp(-32).
# fmt: off
MIDDLE = (
    (-59.96335010141079, 98.00107541859997, -56.67628574690703, 13.931260938727968, -1.2391658386738125),
    (1.0, 1.9544885833814176, 4.676279128988815, 86.36024213908905, -225.46268785411937, 200.26021238006066,
     -82.03722561683334, 15.90562251262117, -1.1833162112133),
)
TAIL = (
    (4.0554489230596245, 31.525109459989388, 57.16281922464213, 44.08050738932008, 14.684956192885803,
     2.1866330685079025, -0.1402560791713545, -0.03504246268278482, -0.0008574567851546854),
    (1.0, 15.779988325646675, 45.39076351288792, 41.3172038254672, 15.04253856929075, 2.504649462083094,
     -0.14218292285478779, -0.03808064076915783, -0.0009332594808954574),
)
# fmt: on


class Graph:
    """An ONNX graph under construction; values are known by their names.

    `graph.op("Add", a, 1.0)` adds a node and gives its output's name; numbers and arrays become constants. Where the
    operator's inputs are of float64, give constants as arrays of float64.
    """

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[bytes | str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, kind: int) -> str:
        """An input [N]; its name."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, ["rows"]))
        return name

    def output(self, name: str, value: str, kind: int) -> None:
        """Give a value [N] out under a name."""
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, kind, ["rows"]))

    def op(self, kind: str, *inputs: Any, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add a node; the name of its output, or a list of names where it has several."""
        names = [f"{kind}.{len(self._nodes)}.{place}" for place in range(outputs)]
        values = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        self._nodes.append(helper.make_node(kind, values, names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value: Any) -> str:
        """A constant; equal ones are kept once."""
        array = np.asarray(value)
        key = f"{array.dtype}{array.shape}".encode() + array.tobytes()
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(array, f"constant.{len(self._constants)}")
        return str(self._constants[key].name)

    def model(self, description: str, metadata: dict[str, str]) -> onnx.ModelProto:
        """The checked model."""
        constants = list(self._constants.values())
        graph = helper.make_graph(self._nodes, "mdml_fast", self._inputs, self._outputs, constants)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", ML_OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9, producer_name="mdml-fast")
        model.doc_string = description
        helper.set_model_props(model, metadata)
        onnx.checker.check_model(model)
        return model

    # --- functions ---

    def cast(self, value: str, kind: int) -> str:
        """A value as another type."""
        return str(self.op("Cast", value, to=kind))

    def log1p(self, value: str) -> str:
        """log(1 + x) of float64 values."""
        return str(self.op("Log", self.op("Add", value, np.float64(1.0))))

    def clip_softly(self, value: str, limit: float) -> str:
        """Float64 values within the limit as they are, what lies beyond on a log scale."""
        size, bound = self.op("Abs", value), np.float64(limit)
        beyond = self.log1p(self.op("Relu", self.op("Sub", size, bound)))
        return str(self.op("Mul", self.op("Sign", value), self.op("Add", self.op("Min", size, bound), beyond)))

    def asinh(self, value: str) -> str:
        """The inverse hyperbolic sine of float64 values."""
        size = self.op("Abs", value)
        root = self.op("Sqrt", self.op("Add", self.op("Mul", size, size), np.float64(1.0)))
        usual = self.op("Log", self.op("Add", size, root))
        # Where the square would overflow.
        huge = self.op("Add", self.op("Log", size), np.float64(math.log(2.0)))
        logarithm = self.op("Where", self.op("Less", size, np.float64(1e100)), usual, huge)
        return str(self.op("Mul", self.op("Sign", value), logarithm))

    def count_below(self, ordered: np.ndarray, values: str, *, equal: bool) -> str:
        """How many of ordered numbers [C, n] are below each value [C, N], or equal to it: int64, by bisection."""
        n_steps = ordered.shape[1].bit_length()
        padding = 2**n_steps - ordered.shape[1]
        table = np.pad(ordered, ((0, 0), (0, padding)), constant_values=np.inf)
        below = "LessOrEqual" if equal else "Less"
        found = self.op("Cast", self.op("Mul", values, np.zeros(1, ordered.dtype)), to=INT64)
        for step in (2**power for power in reversed(range(n_steps))):
            probed = self.op("GatherElements", table, self.op("Add", found, np.int64(step - 1)), axis=1)
            passed = self.op("Cast", self.op(below, probed, values), to=INT64)
            found = self.op("Add", found, self.op("Mul", passed, np.int64(step)))
        return str(found)

    def ndtri(self, level: str) -> str:
        """The normal quantile of float64 levels in (exp(-32), 1 - exp(-32))."""
        half, edge = np.float64(0.5), np.float64(math.exp(-2.0))
        smaller = self.op("Min", level, self.op("Sub", np.float64(1.0), level))
        y = self.op("Sub", level, half)
        squared = self.op("Mul", y, y)
        middle = self.op("Add", y, self.op("Mul", y, self.op("Mul", squared, self._ratio(squared, *MIDDLE))))
        middle = self.op("Mul", middle, np.float64(math.sqrt(2 * math.pi)))
        x = self.op("Sqrt", self.op("Mul", self.op("Log", smaller), np.float64(-2.0)))
        z = self.op("Div", np.float64(1.0), x)
        tail = self.op("Sub", x, self.op("Mul", self.op("Log", x), z))
        tail = self.op("Sub", tail, self.op("Mul", z, self._ratio(z, *TAIL)))
        signed = self.op("Mul", self.op("Sign", y), tail)
        return str(self.op("Where", self.op("Greater", smaller, edge), middle, signed))

    def _ratio(self, x: str, numerator: Sequence[float], denominator: Sequence[float]) -> str:
        above, below = (self._polynomial(x, coefficients) for coefficients in (numerator, denominator))
        return str(self.op("Div", above, below))

    def _polynomial(self, x: str, coefficients: Sequence[float]) -> str:
        value: Any = np.float64(coefficients[0])
        for coefficient in coefficients[1:]:
            value = self.op("Add", self.op("Mul", value, x), np.float64(coefficient))
        return str(value)
