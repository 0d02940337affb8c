"""The floor every other room stands on: sites, steps, traces, artifacts, configuration, command line."""

__version__ = "0.1.0"
