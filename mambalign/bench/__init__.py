"""Benchmarks that anyone can repeat: time, memory, perplexity, scan and decoding, beside the peers that are installed.

Each checks correctness first and prints no number when that fails; contestants take turns in one process; what is
written is JSON with the environment, and a figure of it.
"""
