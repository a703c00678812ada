"""Refinement by gradients: Adam on scales, norm gains and codes of a model that has been quantised."""
