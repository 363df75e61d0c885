"""Small virtual machines: the distribution's kernels, booted in QEMU, running a command as root."""
