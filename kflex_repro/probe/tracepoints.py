"""The kernel's tracepoints that BPF can attach to (tp_btf, raw_tp), by its own BTF: tracefs is not needed."""

from __future__ import annotations

from kflex_repro.bpf import btf
from kflex_repro.build.objects import KERNEL_BTF

_PREFIX = "btf_trace_"


def names() -> list[str]:
    """Names of all tracepoints of the running kernel (those of modules left out), sorted."""
    return sorted(name.removeprefix(_PREFIX) for name in btf.load(KERNEL_BTF).typedefs(_PREFIX))
