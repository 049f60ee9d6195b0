"""Answers from models: sampled, scored, and the best of several."""
