"""Tables of text and documents made of them, independent of where they are shown. Markup and colours are elsewhere."""
