"""Layer quantizers: one module each, a dataclass whose fields are its config. Knows the list of them, no
maths."""

from jointq_cli.quantizers.base import Prepared, Quantizer, Solution
from jointq_cli.quantizers.gptq import GPTQ
from jointq_cli.quantizers.jointq import JointQ
from jointq_cli.quantizers.rtn import RTN

__all__ = ["GPTQ", "RTN", "JointQ", "Prepared", "Quantizer", "Solution"]
