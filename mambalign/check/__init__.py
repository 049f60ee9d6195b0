"""`mambalign check`: validates a recipe without training. Importing this loads no torch."""

from mambalign.check.memory import Load, estimate
from mambalign.check.mistakes import Finding, known_mistakes
from mambalign.check.run import CheckReport, check
from mambalign.check.shapes import ModelShape
from mambalign.check.show import show

__all__ = ["CheckReport", "Finding", "Load", "ModelShape", "check", "estimate", "known_mistakes", "show"]
