"""`mambalign demo`: a small Mamba from scratch, pre-trained, fine-tuned, aligned and judged by program."""
