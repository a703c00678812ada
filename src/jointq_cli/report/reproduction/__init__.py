"""Whether two runs are the same run: what was asked, made and measured, and what surrounded it, compared.

`comparison` has the verdict, and one module each has the steps. Runs no model and writes no file.
"""

from jointq_cli.report.reproduction.comparison import compare
from jointq_cli.report.reproduction.inputs import deciding_differences

__all__ = ["compare", "deciding_differences"]
