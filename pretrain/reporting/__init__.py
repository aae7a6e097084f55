"""Reporting: one report(step, values), many destinations, never on the step's critical path.

reporter.py builds and feeds; metrics_file.py is the truth; worker.py keeps one destination's slowness to itself; each
other file is one destination. A new destination is a file with the four methods of record.Destination and a line in
reporter.py.
"""
