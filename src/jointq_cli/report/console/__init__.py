"""The display and the log file of a running command. What they say comes from `summary` and `tables`."""
