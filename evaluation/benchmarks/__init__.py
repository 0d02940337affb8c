"""Benchmarks as data: a registry, a loader that names what is wrong, prompt templates, tests of programs."""
