"""What the arguments of an operator say, in one form for all its overloads; for all stages."""
