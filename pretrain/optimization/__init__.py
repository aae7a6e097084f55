"""Optimization: parameter groups, optimizers and schedules."""
