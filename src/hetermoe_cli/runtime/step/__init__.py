"""One step: transfers carried, rows in and out of tasks, a schedule run, the optimizer."""
