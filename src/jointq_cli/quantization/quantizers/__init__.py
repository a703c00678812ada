"""The layer quantizers: one module each, a dataclass whose fields are its config."""

from jointq_cli.quantization.quantizers.base import Prepared, Quantizer, Solution
from jointq_cli.quantization.quantizers.binary import Binary
from jointq_cli.quantization.quantizers.dbf.quantizer import DBF
from jointq_cli.quantization.quantizers.gptq import GPTQ
from jointq_cli.quantization.quantizers.jointq.quantizer import JointQ
from jointq_cli.quantization.quantizers.rtn import RTN

__all__ = ["DBF", "GPTQ", "RTN", "Binary", "JointQ", "Prepared", "Quantizer", "Solution"]
