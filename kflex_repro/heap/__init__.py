"""The artifact's heap: how large it must be, what fits into it, and where in the address space it can go."""
