"""Benchmarks judged by a language model: MT-Bench and AlpacaEval, their data, scores and statistics."""
