"""Whether two runs are the same run: what was asked, made and measured, and what surrounded it, compared.

`comparison` has the verdict, and one module each has the steps. Runs no model and writes no file.
"""

from jointq_cli.reproduction.asked import GIVEN, NAMES, deciding_differences
from jointq_cli.reproduction.comparison import compare

__all__ = ["GIVEN", "NAMES", "compare", "deciding_differences"]
