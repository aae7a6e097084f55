"""Reporting: one report(step, values), many destinations, never on the step's critical path."""
