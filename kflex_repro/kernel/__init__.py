"""Kernels of one's own beside the distribution's: installed, booted once, taken away again.

Everything is in a record before it is on the disk (``record``); nothing of the distribution's is replaced.
"""
