"""Rules: one file per operation family. `claim` finds the rule of a parameter's use."""

from dither.rules import affine, conv, embedding, linear
from dither.rules.fallback import Fallback
from dither.rules.rule import Cost, Rule, make_claim, register_rule

claim = make_claim(Fallback())

__all__ = ["Cost", "Rule", "affine", "claim", "conv", "embedding", "linear", "register_rule"]
