"""A choice made ready: classes of devices, what their tasks cost, the task graph, and counts of experts."""
