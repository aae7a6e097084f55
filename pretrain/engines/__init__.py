"""Engines: how one optimizer step runs. The only package that may import deepspeed or accelerate."""
