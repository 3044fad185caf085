"""`reduce`: which formula for which site of a posterior, over which groups, and what is decided.
The formulas stand in `formulas/`.
"""
