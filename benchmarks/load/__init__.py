"""Processes that put load on a controller: model replicas that answer at once, and a bare loop to compare with."""
