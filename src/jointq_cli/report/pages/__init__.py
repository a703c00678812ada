"""The report files of runs and sweeps, in HTML, Markdown, CSV and JSON. Their content comes from the other parts."""
