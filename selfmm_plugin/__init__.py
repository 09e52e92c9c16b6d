"""Self-MM, and its label generator ULGM for any fusion model."""

from .supervision import UnimodalSupervision
from .ulgm import UnimodalLabelGenerator

__all__ = ["UnimodalLabelGenerator", "UnimodalSupervision"]
