"""Figures as SVG. The pages that contain them are in `pages`. Each module here imports matplotlib."""
