"""Adapters of `hold_frozen` to other trainers; each module imports its trainer, so import the one that you use."""
