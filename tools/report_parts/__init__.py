"""The parts of tools/report.py: what is read, each section of the page, and the page."""
