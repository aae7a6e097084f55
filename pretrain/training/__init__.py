"""The training loop and what hangs on it. Reaches engines only through engines.base."""
