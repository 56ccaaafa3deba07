"""The MILP of one choice: its variables, its constraints, and its solution as counts."""
