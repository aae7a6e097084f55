"""Watching runs from their folders alone, while they train or years later: `pretrain monitor`.

run_history.py reads a run folder; alerts.py judges it; terminal_view.py and html_page.py show it. Nothing here talks to
a running process, so watching cannot disturb training.
"""
