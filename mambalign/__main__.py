"""`python -m mambalign`, which is also what `torchrun -m mambalign` runs."""

from mambalign.cli import main

main()
