"""Starting jobs: the environment, the quickstart, and recipes. Never imported by pretrain or data_tools."""
