"""From text to tokens: corpora, tokenizers, windows, token weights; nothing of models."""
