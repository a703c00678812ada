"""How good a model is: perplexity, distance from the original, and simulated quantisation of activations.

How its weights were quantised or rotated has no place here.
"""
