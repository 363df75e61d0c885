"""Redis's own TCL suite, plain and with module and offload: ``python -m tests.redis_suite``."""
