"""`pretrain doctor`: is this machine, are all nodes, fit for a run?"""
