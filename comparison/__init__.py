"""The comparison of `make bench`: this service and its rivals on one machine, in one run, over one checkpoint."""
