"""What the words after `jointq` do: each module has `main(arguments) -> exit code` and little else."""
