"""What goes where: permutations of rows, lanes with their order, and the calls that all ranks must make."""
