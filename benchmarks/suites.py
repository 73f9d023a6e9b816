"""What a run measures: suites of cases, and who is measured in each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.cases import MODES, SINGLE_STEP, Case, Shape


@dataclass(frozen=True)
class Group:
    """Every cell runs in each of these shapes and modes, fastrnn against `peers` (names in `benchmarks.peers`).

    With `dtypes`, these types alone.
    """

    shapes: tuple[Shape, ...]
    modes: tuple[str, ...]
    peers: tuple[str, ...] = ("torch.nn",)
    dtypes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """Groups of cases, how long each case may take (see `benchmarks.timing.Protocol`), and the whole run.

    `dtypes` and `device` are those of a command that names none.
    """

    groups: tuple[Group, ...]
    rounds: int = 12
    block: float = 0.1  # seconds
    budget: float = math.inf  # seconds
    total: float = math.inf  # seconds
    dtypes: tuple[str, ...] = ("float32",)
    device: str = "cpu"


LATENCY = tuple(Shape(100, 1, H, H) for H in (64, 128, 256, 512, 1024))
TRAINING = (
    Shape(128, 16, 128, 128),
    Shape(128, 32, 256, 256),
    Shape(100, 64, 512, 512),
    Shape(512, 32, 128, 128),
    Shape(50, 64, 1024, 1024),
)
ODD = (  # as people have them: no powers of two, other inputs than units, any batch
    Shape(60, 1, 200, 320),
    Shape(200, 3, 40, 100),
    Shape(300, 8, 64, 96),
    Shape(64, 24, 80, 192),
    Shape(48, 48, 300, 600),
    Shape(50, 128, 100, 150),
)
LOOPS = tuple(Shape(20, B, H, H) for B, H in ((1, 64), (8, 64), (8, 256), (32, 128), (32, 512), (128, 256)))
MEMORY = (Shape(512, 32, 128, 128), Shape(100, 64, 512, 512))
BATCHES = tuple(Shape(100, B, 256, 256) for B in (1, 4, 16, 64, 256))
QUICK = (Shape(100, 1, 128, 128), Shape(128, 16, 128, 128))

GPU = tuple(
    Shape(T, B, H, H)
    for T, B, H in (
        (512, 1, 64),
        (512, 64, 128),
        (512, 1, 256),
        (512, 64, 256),
        (512, 16, 512),
        (512, 64, 512),
        (512, 256, 512),
        (1024, 16, 768),
        (512, 1, 1024),
        (512, 16, 1024),
        (512, 64, 1024),
        (256, 256, 1024),
        (256, 1, 2048),
        (256, 64, 2048),
    )
)
GPU_QUICK = (Shape(512, 1, 256, 256), Shape(512, 64, 256, 256), Shape(512, 64, 512, 512), Shape(512, 16, 1024, 1024))
GPU_OPTIONS = (Shape(512, 64, 512, 512),)  # of a stack and of unequal lengths

BEST = ("torch.nn", "onnxruntime", "openvino")
INT8 = ("fastrnn-int8", "torch.nn-int8", "onnxruntime-int8")
THREADS = ("fastrnn-1t", "fastrnn-2t", "fastrnn-4t", "fastrnn-8t", "fastrnn-16t")

LATENCY_GROUPS = (Group(LATENCY, ("inference",), (*BEST, "fastrnn-bf16", *INT8)), Group(LATENCY, ("training",)))
TRAINING_GROUPS = (
    Group(TRAINING, ("training",)),
    Group(TRAINING[1:3], ("training",), ("fastrnn-bf16-products",)),
    Group(TRAINING, ("inference",), BEST),
)
PEOPLE_GROUPS = (  # what people do, with torch's own operations around the layer
    Group(ODD + TRAINING[1:2], ("step-of-training",)),
    Group(ODD, ("training",)),
    Group(ODD, ("inference",), BEST),
)
LOOP_GROUP = Group(LOOPS, ("loop",))
STEP_GROUPS = (
    Group(LATENCY, ("step",), (*BEST, "fastrnn-module")),
    Group(LATENCY, ("stream",), ("torch.nn", "fastrnn-stream")),
)
RAGGED_GROUP = Group(GPU_OPTIONS, ("ragged-inference", "ragged"), ("torch.nn", "fastrnn-packed"))
MEMORY_TWICE = MEMORY + tuple(shape._replace(T=2 * shape.T) for shape in MEMORY)  # to see what grows with T
MEMORY_GROUP = Group(MEMORY, ("training-memory",), ("torch.nn", "fastrnn-recompute"))


def gpu_groups(*groups: Group) -> tuple[Group, ...]:
    """The groups; layers in bfloat16 are measured against float16 of torch.nn, too, as cuDNN may be faster in it."""
    return (*groups, *(replace(group, peers=("torch.nn-fp16",), dtypes=("bfloat16",)) for group in groups))


SUITES = {
    "quick": Suite((Group(QUICK, ("inference", "training")), Group(QUICK[:1], ("step",))), rounds=8, block=0.05),
    "latency": Suite(LATENCY_GROUPS),
    "training": Suite(TRAINING_GROUPS),
    "step-of-training": Suite(PEOPLE_GROUPS[:1]),
    "lengths": Suite((Group(TRAINING, ("lengths", "ragged")),), budget=20),
    "threads": Suite((Group(LATENCY + TRAINING, ("inference", "training"), THREADS),), rounds=6, budget=10),
    "loop": Suite((LOOP_GROUP,)),
    "step": Suite(STEP_GROUPS),
    "memory": Suite((MEMORY_GROUP, Group(MEMORY_TWICE, ("inference-memory",)))),
    "sweep": Suite((Group(LATENCY + BATCHES, ("inference",), BEST), Group(LATENCY + BATCHES, ("training",)))),
    "full": Suite(
        (
            *LATENCY_GROUPS,
            *TRAINING_GROUPS,
            *PEOPLE_GROUPS,
            Group(LATENCY + TRAINING, ("inference", "training"), ("fastrnn-16t",)),
            Group(TRAINING, ("lengths",)),
            *STEP_GROUPS,
            LOOP_GROUP,
            MEMORY_GROUP,
            Group(MEMORY_TWICE, ("inference-memory",), ()),
        ),
        rounds=6,
        budget=8,
    ),
    "gpu": Suite(
        gpu_groups(
            Group(GPU, ("inference", "training")),
            Group(GPU_OPTIONS, ("stack-inference", "stack")),
            RAGGED_GROUP,
        ),
        rounds=6,
        block=0.02,
        total=330,
        dtypes=("bfloat16", "float32", "float16", "tf32"),  # what matters most first: a slow GPU may not get to the end
        device="cuda:0",
    ),
    "gpu-quick": Suite(
        gpu_groups(Group(GPU_QUICK, ("inference", "training")), Group(GPU_OPTIONS, ("stack",)), RAGGED_GROUP),
        rounds=4,
        block=0.02,
        total=45,
        dtypes=("bfloat16", "float32"),
        device="cuda:0",
    ),
}


def custom_suite(shapes: list[Shape]) -> Suite:
    """The suite of shapes given by hand."""
    return Suite((Group(tuple(shapes), ("inference", "training"), BEST),))


def plan(
    suite: Suite, cells: list[str], modes: list[str] | None, dtypes: Sequence[str], device: str, threads: int
) -> dict[Case, list[str]]:
    """The cases of a suite, type by type and group by group, each with its peers; a case of two groups has the peers of
    both.

    `modes` replaces the modes that the suite would run.
    """
    cases = {}
    for dtype in dtypes:
        for group in (group for group in suite.groups if not group.dtypes or dtype in group.dtypes):
            for mode in modes or group.modes:
                for cell in cells:
                    for shape in group.shapes:
                        size = shape._replace(T=1) if MODES[mode].use in SINGLE_STEP else shape
                        peers = cases.setdefault(Case(cell, mode, size, dtype, device, threads), [])
                        peers += [name for name in group.peers if name not in peers]
    return cases
