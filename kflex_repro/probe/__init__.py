"""Looking at a live process: what it calls, how often, and where its time goes."""
"""Probes: what a redis-server does, watched from outside while it runs."""
