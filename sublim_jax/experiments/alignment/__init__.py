"""Check of the one-step alignment theorem (paper §6.1, App. C).

`settings` defines networks, teachers and inputs, `measure` computes, `verdicts` judges; `run` and `report` use them.
`configs/theorem.py` explains the values.
"""
