"""The integer grid that weights are rounded to: scale, zero-point, codes.

(Placeholder signature; the quantizer room fills this in.)
"""
