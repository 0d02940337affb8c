"""Asking a language model behind an OpenAI-compatible endpoint: paid for once, within limits, killed at any byte.

Knows nothing of traces, judges or rewriters: it takes questions and gives back outcomes.
"""
