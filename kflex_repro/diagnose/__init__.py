"""Why the artifact does not run, here or elsewhere: read a trace or a log, try things, rank the causes."""
