"""jointq: quantise Hugging Face causal language models after training, and prove how good the result is."""

__version__ = "0.1.0"
