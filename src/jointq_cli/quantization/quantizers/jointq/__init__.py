"""JointQ."""

from jointq_cli.quantization.quantizers.jointq.quantizer import GptqStart, JointQ

__all__ = ["GptqStart", "JointQ"]
