"""Redis GET and SET answered inside the kernel, and the KFlex artifact made to run."""

__version__ = "0.1.0"
