"""After training: generation from a checkpoint or an exported folder."""
