"""Whether two runs are the same run: compares inputs, computed artifacts, measurements and environment.

`comparison` gives the verdict; the other modules have the steps. Runs no model and writes no file.
"""

from jointq_cli.report.reproduction.comparison import compare
from jointq_cli.report.reproduction.inputs import deciding_differences

__all__ = ["compare", "deciding_differences"]
