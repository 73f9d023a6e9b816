"""The CSV: one row per contender of a case, complete enough to be read on its own years later."""

from __future__ import annotations

import csv
import datetime
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.cases import PEAK_MEMORY, Shape
from benchmarks.measure import Result, control_name
from benchmarks.peers import FASTRNN, PEERS
from benchmarks.problem import Peer
from benchmarks.timing import Ratio
from fastrnn import _C

UNITS = {"time per call": ("us", 1e6), PEAK_MEMORY: ("MB", 1e-6)}  # metric: unit, and how many one sample's unit has


@dataclass(frozen=True)
class Row:
    """One contender in one case, or, where `note` is not empty, the reason why it has no figures (then they are None).

    `p50`, `p20`, `p80` are quantiles over the rounds of what `metric` says. `ratio` is this contender's time or memory
    over `baseline`'s, the median over the rounds with quartiles: above 1 the baseline is better. `limit` is the
    shortest time possible on this machine (see `benchmarks.limits`), `limit_share` = limit / p50; memory has none.
    """

    timestamp: str  # UTC, of the start of the run
    git_sha: str
    fastrnn_version: str
    torch_version: str
    cpu: str
    isa: str
    gpu: str
    device: str
    threads: int
    dtype: str
    cell: str
    mode: str
    T: int
    B: int
    I: int
    H: int
    provider: str
    provider_version: str
    metric: str
    unit: str
    p50: float | None = None
    p20: float | None = None
    p80: float | None = None
    baseline: str = ""
    ratio: float | None = None
    ratio_q25: float | None = None
    ratio_q75: float | None = None
    limit: float | None = None
    limit_kind: str = ""
    limit_share: float | None = None
    note: str = ""

    @property
    def shape(self) -> Shape:
        return Shape(self.T, self.B, self.I, self.H)

    @property
    def machine(self) -> str:
        return self.gpu or f"{self.cpu}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    @property
    def is_on_gpu(self) -> bool:
        return bool(self.gpu)

    @property
    def setting(self) -> tuple[str, str, str, int, str]:
        """What must be equal for two rows to be comparable, beside the case itself."""
        return self.cpu, self.gpu, self.device, self.threads, self.dtype

    @property
    def case(self) -> tuple:
        return self.setting, self.cell, self.mode, self.shape

    @property
    def is_control(self) -> bool:
        return self.provider == control_name(self.baseline)

    @property
    def is_variant(self) -> bool:
        """Whether this is fastrnn used in another way, see `benchmarks.variants`; such a row is no peer's."""
        return self.provider.startswith(f"{FASTRNN.name}-")

    @property
    def is_of_threads(self) -> bool:
        """Whether this is fastrnn with another number of threads."""
        return re.fullmatch(rf"{FASTRNN.name}-\d+t", self.provider) is not None


@dataclass(frozen=True)
class Run:
    """What all rows of a run have in common."""

    timestamp: str
    git_sha: str
    fastrnn_version: str
    torch_version: str
    cpu: str
    isa: str
    gpu: str

    @classmethod
    def now(cls, device: str) -> Run:
        return cls(
            timestamp=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            git_sha=git_sha(),
            fastrnn_version=FASTRNN.version,
            torch_version=torch.__version__,
            cpu=cpu_name(),
            isa=_C.build_info()["isa"],
            gpu=torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "",
        )


def git_sha() -> str:
    """The commit, with "-dirty" where tracked files differ from it; "unknown" outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def cpu_name() -> str:
    """The CPU's name as Linux tells it, else the platform's word for it."""
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def rows_of(result: Result, run: Run) -> list[Row]:
    """The rows of a case: its contenders in the order they were measured, then the peers left out."""
    case = result.case
    common = Row(
        **asdict(run),
        **case.shape._asdict(),
        device=case.device,
        threads=case.threads,
        dtype=case.dtype,
        cell=case.cell,
        mode=case.mode,
        provider="",
        provider_version="",
        metric=case.metric,
        unit=UNITS[case.metric][0],
    )
    if result.failure:
        return [replace(common, provider=FASTRNN.name, provider_version=run.fastrnn_version, note=result.failure)]
    measured = [_measured_row(common, name, result) for name in result.samples]
    left_out = [
        replace(common, provider=name, provider_version=_version(name), note=reason)
        for name, reason in result.left_out.items()
    ]
    return measured + left_out


def _version(provider: str) -> str:
    return _peer(provider).version or ""


def _peer(provider: str) -> Peer:
    return FASTRNN if provider == FASTRNN.name else PEERS[provider]


def _measured_row(common: Row, name: str, result: Result) -> Row:
    is_control = name == control_name(result.controlled)
    baseline = result.controlled if is_control else FASTRNN.name
    factor = UNITS[common.metric][1]
    p20, p50, p80 = (float(value) for value in np.quantile(result.samples[name], (0.2, 0.5, 0.8)) * factor)
    ratio = Ratio.of(result.samples[name], result.samples[baseline])
    peer = _peer(result.controlled if is_control else name)
    limit = result.limit * factor if peer.limit_applies else 0.0
    return replace(
        common,
        provider=name,
        provider_version=peer.version or "",
        p20=round(p20, 3),
        p50=round(p50, 3),
        p80=round(p80, 3),
        baseline=baseline,
        ratio=round(ratio.median, 4),
        ratio_q25=round(ratio.low, 4),
        ratio_q75=round(ratio.high, 4),
        limit=round(limit, 3) if limit else None,
        limit_kind=result.limit_kind if limit else "",
        limit_share=round(limit / p50, 4) if limit else None,
    )


def append_csv(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a CSV file, which is made with a header where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(map(asdict, rows))


def check_csv(path: Path) -> None:
    """Raises ValueError if a file is there that has other columns than ours."""
    columns = [field.name for field in fields(Row)]
    if path.exists() and path.stat().st_size > 0:
        with path.open(newline="") as file:
            if next(csv.reader(file)) != columns:
                raise ValueError(f"{path} has other columns than this version writes; name a new file")


def read_csv(path: Path) -> list[Row]:
    """The rows of a file; of a case that was measured more than once, those of the last run."""
    check_csv(path)
    with path.open(newline="") as file:
        rows = [_parse(record) for record in csv.DictReader(file)]
    last = {}
    for row in rows:
        last[row.case] = max(row.timestamp, last.get(row.case, ""))
    return [row for row in rows if row.timestamp == last[row.case]]


def _parse(record: dict[str, str]) -> Row:
    parsers = {"str": str, "int": int, "float | None": lambda text: float(text) if text else None}
    return Row(**{field.name: parsers[field.type](record[field.name]) for field in fields(Row)})
