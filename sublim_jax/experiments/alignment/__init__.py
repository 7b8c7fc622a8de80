"""The one-step alignment theorem, checked (paper §6.1, App. C): `settings`, on what; `measure`; `run`; `report`.

`configs/theorem.py` explains the values.
"""
