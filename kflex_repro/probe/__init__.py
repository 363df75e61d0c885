"""Looking at a live process: what it calls, how often, and where its time goes."""
