"""The commands of `jointq`, a module each with `main(arguments) -> exit code`."""
