"""Directions to steer along: what separates two kinds of traces, as vectors at sites."""
