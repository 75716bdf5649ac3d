"""Opacus's names and behaviour, for models whose forward takes anything."""
