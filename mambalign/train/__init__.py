"""Objectives, the training step, reference log-probs, and runs that survive being killed."""
