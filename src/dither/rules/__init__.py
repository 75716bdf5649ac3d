"""Rules: one file per operation family. `table` finds the rule of a parameter's use."""

from dither.rules import (
    activation,
    affine,
    conv,
    elementwise,
    embedding,
    embedding_bag,
    indexing,
    joining,
    matmul,
    recurrent,
)
from dither.rules.fallback import CustomNode, Fallback
from dither.rules.rule import Cost, Rule, Table, register_decomposition, register_rule

table = Table(Fallback(), CustomNode())

__all__ = [
    "Cost",
    "Rule",
    "activation",
    "affine",
    "conv",
    "elementwise",
    "embedding",
    "embedding_bag",
    "indexing",
    "joining",
    "matmul",
    "recurrent",
    "register_decomposition",
    "register_rule",
    "table",
]
