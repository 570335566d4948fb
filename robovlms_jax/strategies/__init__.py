"""Experiments of many runs that begin with one another's policies: few-shot, continual, another domain."""
