"""JointQ."""

from jointq_cli.quantization.quantizers.jointq.quantizer import JointQ
from jointq_cli.quantization.quantizers.jointq.settings import GptqStart

__all__ = ["GptqStart", "JointQ"]
