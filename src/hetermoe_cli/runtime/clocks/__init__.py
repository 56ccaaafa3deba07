"""Time: of tasks and transfers, on devices, over machines, and emulated."""
