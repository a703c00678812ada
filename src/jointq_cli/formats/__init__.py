"""How a quantised weight is stored. Each kind of stored weight is imported here, so that its files can be read."""

from jointq_cli.formats.base import StoredWeight
from jointq_cli.formats.binary_product import BinaryProduct
from jointq_cli.formats.column_scaled import ColumnScaledWeight
from jointq_cli.formats.k_quant import KQuantWeight
from jointq_cli.formats.turned import TurnedWeight
from jointq_cli.formats.uniform import UniformWeight

__all__ = ["BinaryProduct", "ColumnScaledWeight", "KQuantWeight", "StoredWeight", "TurnedWeight", "UniformWeight"]
