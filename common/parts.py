"""How a task vector file names the tensors of a layer; statistics have names of their own."""

LEFT, RIGHT = "#left", "#right"
"""The factors of a low-rank layer."""

SCALE = "#scale"
"""Beside a tensor of int8, after its whole name: its scales."""
