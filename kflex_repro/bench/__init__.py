"""Interleaved benchmarks of plain Redis against the offload: scenarios, load, checks, figures, report."""
