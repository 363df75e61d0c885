"""Looking at a live process: what it calls, what its commands take, and where its time goes."""
